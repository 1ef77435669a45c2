//! Pinned host memory that the driver refuses for a while, and a GPU that is lost in whose context it was pinned.

use super::*;

/// More than the first blocks hold.
const LEN: usize = 20 << 20;

fn pinned(fake: FakeCuda) -> u64 {
    fake.calls(c"cuMemHostAlloc")
}

/// Writes it to the peer, and looks at it there.
#[track_caller]
fn write(near: &GpuSide, memory: &GpuBuffer, peer: &Peer, far: &mut FarGpu, seed: u64) {
    memory.write(0, &pattern(seed, 0, LEN));
    let (local, remote) = (memory.segment(0, LEN), far.region.segment(0, LEN as u64));
    let plan = near.engine.prepare(Operation::Write, peer, &[local], &[remote]).unwrap();
    end_of(&plan.transfer()).unwrap();
    far.process.ask(&format!("gpu-check r {seed} 0 {LEN} 0"));
}

#[test]
fn blocks_that_the_driver_has_refused_once_are_had_later() {
    let name = "pinning::blocks_that_the_driver_has_refused_once_are_had_later";
    let Some(fake) = fake(name) else { return };
    let (near, mut far) = (side(tcp_config(), 0), far(1, "transports=tcp"));
    let peer = near.connect(&far.metadata);
    near.copy(&peer, Operation::Read, (0, 0), &far.region, 100);
    let before = pinned(fake);
    fake.refuse(c"cuMemHostAlloc", OUT_OF_MEMORY, 1);
    write(&near, &near.memory, &peer, &mut far, 2);
    assert!(fake.has_refused(c"cuMemHostAlloc"), "the first blocks were enough");
    let mut seed = 3;
    eventually("there are more blocks", || {
        write(&near, &near.memory, &peer, &mut far, seed);
        seed += 1;
        pinned(fake) > before
    });
}

#[test]
fn other_gpus_have_blocks_where_the_first_one_is_lost() {
    let name = "pinning::other_gpus_have_blocks_where_the_first_one_is_lost";
    let Some(fake) = fake(name) else { return };
    let (near, mut far) = (side(tcp_config(), 0), far(1, "transports=tcp"));
    let other = GpuBuffer::new(1, LEN);
    let region = other.register(&near.engine, Access::READ_WRITE).unwrap();
    let peer = near.connect(&far.metadata);
    near.copy(&peer, Operation::Read, (0, 0), &far.region, 100);
    let before = pinned(fake);
    fake.lose(0, LAUNCH_FAILED, 0);
    write(&near, &other, &peer, &mut far, 2);
    assert!(pinned(fake) > before, "no more blocks");
    near.engine.deregister(&region).unwrap();
    near.engine.shutdown().unwrap();
    // The driver takes nothing of a lost GPU back.
    std::mem::forget(near);
}
