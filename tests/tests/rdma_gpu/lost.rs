//! GPUs that are lost while devices reach their memory. Each test has a process of its own, since a lost GPU is lost to a process.

use super::*;

const ALONE: &str = "CORELANE_TEST_ALONE";
const LAUNCH_FAILED: i32 = 719;

/// Runs a test in a process of its own; false: that has been done, or there is no driver that can lose a GPU.
fn alone(test: &str) -> bool {
    if !has_gpus(2) || Cuda::fake().is_none() {
        return false;
    }
    if std::env::var(ALONE).is_ok_and(|name| name == test) {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--include-ignored"]).env(ALONE, test);
    let output = command.output().unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let whole = output.status.success() && out.contains("1 passed");
    assert!(whole, "in a process of its own: {}\n{out}\n{err}", output.status);
    false
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_lost_gpu_ends_its_transfers_by_saying_so_and_others_go_on() {
    if !alone("lost::a_lost_gpu_ends_its_transfers_by_saying_so_and_others_go_on") {
        return;
    }
    let near = side("near", config(GpuRdma::Auto), 0);
    let far = side("far", config(GpuRdma::Auto), 1);
    let peer = connect(&near.engine, &far.engine.metadata());
    let second = GpuBuffer::new(1, LEN);
    let _region = second.register(&near.engine, Access::READ_WRITE).unwrap();
    let transfer = |operation, local| {
        let remote = far.region.descriptor().segment(0, 5000);
        near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer()
    };
    let all = BOTH.map(|operation| transfer(operation, near.memory.segment(0, 5000)));
    for transfer in &all {
        end_of(transfer).unwrap();
    }
    far.memory.write(0, &pattern(3, 0, 5000));
    Cuda::fake().unwrap().lose(0, LAUNCH_FAILED, 0);
    // The first finds it out, by asking what has become of its memory; the others are told.
    for _ in 0..2 {
        for transfer in &all {
            let error = end_of(transfer).unwrap_err();
            let told = error.to_string();
            assert!(kind(&error) == "Gpu" && told.contains("lost to this process"), "{told}");
        }
    }
    assert_bytes(&far.memory.read(0, 5000), &pattern(3, 0, 5000), "the peer's");
    end_of(&transfer(Operation::Read, second.segment(1, 5000))).unwrap();
    assert_bytes(&second.read(1, 5000), &pattern(3, 0, 5000), "by another GPU");
    let host = Buffer::new(5000);
    let _host_region = host.register(&near.engine, Access::LOCAL);
    end_of(&transfer(Operation::Read, host.segment(0, 5000))).unwrap();
    host.check(3, 0, 5000, 0).unwrap();
    near.engine.deregister(&near.region).unwrap();
    // Its memory is the driver's, who does not give it back.
    std::mem::forget(near.memory);
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn notifications_of_memory_that_can_be_flushed_no_more_are_delivered_and_said_once() {
    if !has_gpus(3) || Cuda::fake().is_none() {
        return;
    }
    let near = side("near", config(GpuRdma::Auto), 0);
    let mut target = far("transports=rdma", &[]);
    let bytes = target.process.ask(&format!("gpu-region f {LEN} read-write 1"));
    let flushed = RegionDescriptor::from_bytes(&from_hex(&bytes).unwrap()).unwrap();
    let peer = connect(&near.engine, &target.metadata);
    let (local, remote) = (near.memory.segment(0, 5000), flushed.segment(0, 5000));
    let write = near.engine.prepare(Operation::Write, &peer, &[local], &[remote]).unwrap();
    let write = write.transfer();
    let tell = |far: &mut Far| {
        write.post_with_notification(b"w").unwrap();
        outcome(&write).unwrap();
        assert!(far.process.ask("take 1").contains("near:77"));
    };
    tell(&mut target);
    assert_eq!(target.process.ask("log is not flushed"), "");
    target.process.ask(&format!("gpu-lose 1 {LAUNCH_FAILED} 0"));
    for _ in 0..5 {
        tell(&mut target);
    }
    let said = target.process.ask("log is not flushed");
    assert_eq!(said.matches("is not flushed").count(), 1, "{said}");
    assert!(said.contains("ERROR"), "{said}");
}
