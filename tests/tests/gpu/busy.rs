//! GPUs that have something else to do for long: a lane does not wait for them with what it needs there.

use super::*;

fn copies(fake: FakeCuda) -> u64 {
    fake.calls(c"cuMemcpyAsync")
}

#[test]
fn a_lane_goes_on_while_it_is_equipped_for_a_busy_gpu() {
    let Some(fake) = Cuda::fake() else { return };
    // One round each for all but the first: on a machine that stands still a round says nothing.
    const GPUS: u32 = 5;
    if !alone(
        "busy::a_lane_goes_on_while_it_is_equipped_for_a_busy_gpu",
        &[("FAKE_CUDA_GPUS", "5")],
    ) {
        return;
    }
    let (near, far) = (side(local_config(), 0), far(0, ""));
    let peer = near.connect(&far.metadata);
    let transfer = in_blocks(&near, &peer, Operation::Read, &far, 4000);
    end_of(&transfer).unwrap();
    let went_on = (1..GPUS).any(|gpu| {
        let memory = GpuBuffer::new(gpu, 1 << 20);
        let before = copies(fake);
        fake.hold(gpu, true);
        let (region, went_on) = std::thread::scope(|scope| {
            let registering = scope.spawn(|| memory.register(&near.engine, Access::READ_WRITE));
            eventually("the GPU is asked for something", || copies(fake) > before);
            end_of(&transfer).unwrap();
            let went_on = !registering.is_finished();
            fake.hold(gpu, false);
            (registering.join().unwrap().unwrap(), went_on)
        });
        let (local, remote) = (memory.segment(0, 9000), far.region.segment(1, 9000));
        let plan = near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap();
        end_of(&plan.transfer()).unwrap();
        assert_bytes(&memory.read(0, 9000), &pattern(1, 1, 9000), "once the GPU has time");
        near.engine.deregister(&region).unwrap();
        went_on
    });
    assert!(went_on, "the lane has waited for the GPU");
}

#[test]
fn a_gpu_that_was_late_is_used_and_gets_everything_back() {
    let Some(fake) = fake("busy::a_gpu_that_was_late_is_used_and_gets_everything_back") else {
        return;
    };
    let (near, far) = (side(local_config(), 0), far(1, ""));
    let peer = near.connect(&far.metadata);
    let memory = GpuBuffer::new(1, 1 << 20);
    fake.hold(1, true);
    // Longer than anybody waits.
    let region = memory.register(&near.engine, Access::READ_WRITE).unwrap();
    fake.hold(1, false);
    let blocks = || -> (Vec<_>, Vec<_>) {
        let local = (0..20).map(|at| memory.segment(at * 2000, 1000)).collect();
        (local, (0..20).map(|at| far.region.segment(at as u64 * 3000, 1000)).collect())
    };
    let (local, remote) = blocks();
    eventually("the GPU has caught up", || {
        near.engine
            .prepare(Operation::Read, &peer, &local, &remote)
            .and_then(|plan| end_of(&plan.transfer()))
            .is_ok()
    });
    assert_bytes(&memory.read(38_000, 1000), &pattern(1, 57_000, 1000), "the last block");
    near.engine.deregister(&region).unwrap();
    let kept = || fake.calls(c"cuStreamCreateWithPriority") - fake.calls(c"cuStreamDestroy_v2");
    let before = kept();
    near.engine.shutdown().unwrap();
    let GpuSide { engine, .. } = near;
    drop((engine, peer));
    // Four on each GPU; a lane's that was late are lost.
    eventually("streams are given back", || kept() <= before.saturating_sub(8));
}
