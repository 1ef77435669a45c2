//! Devices of which only some get at GPU memory.

use super::*;

const RAILS: [&str; 2] = ["rxe0", "rxe1"];

/// In the rig, both devices have their addresses; what is closed there is closed by tests/fake-verbs.
fn has_two_rails() -> bool {
    if std::env::var_os("CORELANE_RDMA_RIG").is_none() || !has_gpus(1) {
        eprintln!("SKIPPED: takes the two devices of the rig");
        return false;
    }
    for rail in RAILS {
        eventually("both devices are there", || {
            let gid = format!("/sys/class/infiniband/{rail}/ports/1/gids/1");
            std::fs::read_to_string(gid).is_ok_and(|gid| gid.contains("ffff"))
        });
    }
    true
}

fn other(rail: &str) -> &'static str {
    if rail == RAILS[0] { RAILS[1] } else { RAILS[0] }
}

/// A transfer that both rails would share.
fn large_ones_arrive_whole(near: &Side, far: &mut Far) {
    let peer = connect(&near.engine, &far.metadata);
    near.memory.write(0, &pattern(8, 0, LEN));
    copy(
        &near.engine,
        &peer,
        Operation::Write,
        near.memory.segment(0, LEN),
        far.region.segment(0, LEN as u64),
    );
    far.process.ask(&format!("gpu-check r 8 0 {LEN} 0"));
    near.memory.poison();
    copy(
        &near.engine,
        &peer,
        Operation::Read,
        near.memory.segment(3, LEN - 10),
        far.region.segment(7, LEN as u64 - 10),
    );
    assert_bytes(&near.memory.read(3, LEN - 10), &pattern(8, 7, LEN - 10), "read");
    near.memory.poison();
    far.process.ask(&format!("gpu-fill r 1 0 {LEN} 0"));
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_device_that_takes_no_gpu_memory_is_left_out_and_the_others_carry_it() {
    if !has_two_rails() {
        return;
    }
    let mut config = config(GpuRdma::Auto);
    config.rdma.stripe_bytes = 64 << 10;
    for closed in RAILS {
        // Without another transport that could stand in. The first device has the small transfers, elsewhere.
        let mut theirs = far("transports=rdma", &[("FAKE_VERBS_NO_GPU", closed)]);
        let said = theirs.process.ask("log RDMA devices reach GPU memory");
        assert!(said.contains(&format!("{}:1 by dmabuf", other(closed))), "{said}");
        assert!(said.contains(&format!("{closed}:1: dmabuf: ")), "{said}");
        assert!(!said.contains(&format!("{closed}:1 by")), "{said}");
        let near = side("near", config.clone(), 0);
        lengths_arrive_whole(&near, &mut theirs, true);
        large_ones_arrive_whole(&near, &mut theirs);
        // A notification that is bound to a WRITE goes with it, wherever that goes.
        let peer = connect(&near.engine, &theirs.metadata);
        let (local, remote) = (near.memory.segment(0, 700), theirs.region.segment(0, 700));
        let write = near.engine.prepare(Operation::Write, &peer, &[local], &[remote]).unwrap();
        let write = write.transfer();
        for round in 0..40u8 {
            near.memory.write(0, &pattern(u64::from(round), 0, 700));
            write.post_with_notification(&[round]).unwrap();
            outcome(&write).unwrap();
            let told = theirs.process.ask("take 1");
            assert!(told.contains(&format!("near:{}", to_hex(&[round]))), "{told}");
            theirs.process.ask(&format!("gpu-check r {round} 0 700 0"));
        }
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_device_that_was_named_has_to_take_gpu_memory_where_that_is_forced() {
    if !has_two_rails() {
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-test-peer"));
    let mut process = PeerProcess::start_command(command.env("FAKE_VERBS_NO_GPU", "rxe1")).unwrap();
    process.engine("named", "transports=rdma gpu_rdma=dmabuf rdma_devices=rxe0,rxe1");
    let error = process.try_ask("gpu-region r 4096 read-write 0").unwrap_err();
    assert!(error.contains("rxe1:1: dmabuf"), "{error}");
    // Of those that nobody has named, one is enough.
    let _ = far("transports=rdma gpu_rdma=dmabuf", &[("FAKE_VERBS_NO_GPU", "rxe1")]);
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn memory_on_devices_that_do_not_reach_each_other_goes_another_way_or_the_error_says_so() {
    if !has_two_rails() {
        return;
    }
    for tcp in [true, false] {
        let settings = if tcp { "transports=rdma,tcp" } else { "transports=rdma" };
        let theirs = far(settings, &[("FAKE_VERBS_NO_GPU", "rxe1")]);
        let mut ours = far_named("near", settings, &[("FAKE_VERBS_NO_GPU", "rxe0")]);
        ours.process.load(&theirs.metadata);
        ours.process.ask("connect far");
        assert_eq!(ours.process.ask("transport far"), "rdma");
        let descriptor = to_hex(&theirs.region.to_bytes());
        ours.process.ask(&format!("gpu-fill r 5 0 {LEN} 0"));
        let read = ours.process.try_ask(&format!("read far r 3 {descriptor} 5 70000"));
        if tcp {
            read.unwrap();
            ours.process.ask("gpu-check r 1 3 70000 5");
            continue;
        }
        let error = read.unwrap_err();
        let both = error.contains("no two RDMA devices") && error.contains("rxe0:1: dmabuf");
        assert!(both && error.contains("`tcp` is not allowed"), "{error}");
        ours.process.ask(&format!("gpu-check r 5 0 {LEN} 0"));
    }
}
