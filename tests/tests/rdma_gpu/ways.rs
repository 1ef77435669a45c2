//! Which way devices take to GPU memory, what becomes of it where they have none, and what makes its GPU see what they write.

use super::*;

fn is_fake() -> bool {
    let fake = Cuda::get().is_some_and(Cuda::is_fake);
    if !fake {
        eprintln!("SKIPPED: takes the driver of tests/fake-cuda");
    }
    fake
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn where_dmabuf_is_refused_the_kernel_module_serves() {
    if !has_gpus(1) || !is_fake() {
        return;
    }
    for refused in [("FAKE_VERBS_DMABUF", "off"), ("FAKE_CUDA_NO_DMABUF", "1")] {
        let mut far = far("transports=rdma", &[refused]);
        let said = far.process.ask("log RDMA devices reach GPU memory");
        assert!(said.contains("peermem"), "{said}");
        lengths_arrive_whole(&side("near", config(GpuRdma::Auto), 0), &mut far, true);
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn what_devices_do_not_reach_goes_through_pinned_memory_on_the_same_session() {
    if !has_gpus(1) || !is_fake() {
        return;
    }
    let neither = [("FAKE_VERBS_DMABUF", "off"), ("FAKE_VERBS_PEERMEM", "off")];
    let mut theirs = far("transports=rdma,tcp", &neither);
    // A second registration says nothing more.
    theirs.process.ask("gpu-region s 4096 read-write 0");
    let said = theirs.process.ask("log do not reach GPU memory");
    assert!(said.contains("dmabuf: ") && said.contains("nvidia_peermem: "), "{said}");
    assert_eq!(said.matches("do not reach GPU memory").count(), 1, "{said}");
    assert!(said.contains("through pinned host memory and sockets"), "{said}");
    // Where there are none: the log does not say so.
    let mut nowhere = far("transports=rdma", &neither);
    let said = nowhere.process.ask("log do not reach GPU memory");
    assert!(said.contains("`tcp` is not allowed") && !said.contains("sockets"), "{said}");
    let near = side("near", config_with_tcp(GpuRdma::Auto), 0);
    lengths_arrive_whole(&near, &mut theirs, false);
    // Host memory of the same peer goes by its devices.
    let bytes = from_hex(&theirs.process.ask("region h 8192 read-write")).unwrap();
    let host = RegionDescriptor::from_bytes(&bytes).unwrap();
    theirs.process.ask("fill h 4 0 8192 0");
    let peer = near.engine.load_peer(&theirs.metadata).unwrap();
    let before = doorbells(&near.engine);
    copy(&near.engine, &peer, Operation::Read, near.memory.segment(1, 8192), host.segment(0, 8192));
    assert_bytes(&near.memory.read(1, 8192), &pattern(4, 0, 8192), "host memory of that peer");
    assert!(doorbells(&near.engine) > before, "it went another way");
    near.memory.poison();
    // And so when this side does without.
    let mut willing = far("transports=rdma,tcp", &[]);
    lengths_arrive_whole(&side("none", config_with_tcp(GpuRdma::Off), 0), &mut willing, false);
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn what_no_allowed_way_carries_is_refused_when_it_is_prepared() {
    if !has_gpus(1) {
        return;
    }
    for (ours, theirs, said) in [
        (GpuRdma::Auto, GpuRdma::Off, "the peer's memory is not registered"),
        (GpuRdma::Off, GpuRdma::Auto, "is not registered with an RDMA device (gpu_rdma=off)"),
    ] {
        let (near, far) = (side("near", config(ours), 0), side("far", config(theirs), 0));
        let peer = connect(&near.engine, &far.engine.metadata());
        let remote = far.region.descriptor().segment(0, 100);
        let local = near.memory.segment(0, 100);
        let refused = near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap_err();
        let told = refused.to_string();
        assert_eq!(kind(&refused), "NoTransport", "{told}");
        assert!(told.contains(said) && told.contains("`tcp` is not allowed"), "{told}");
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_way_that_is_asked_for_and_fails_fails_the_registration_only() {
    if !has_gpus(1) || !is_fake() {
        return;
    }
    for (way, refused, other) in [
        ("dmabuf", "FAKE_VERBS_DMABUF", "nvidia_peermem"),
        ("peermem", "FAKE_VERBS_PEERMEM", "dmabuf:"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-test-peer"));
        let mut process = PeerProcess::start_command(command.env(refused, "off")).unwrap();
        process.engine("far", &format!("transports=rdma,tcp gpu_rdma={way}"));
        let error = process.try_ask("gpu-region r 4096 read-write 0").unwrap_err();
        let asked = format!("gpu_rdma={way}");
        assert!(error.contains(&asked) && !error.contains(other), "{error}");
        assert_eq!(error.contains("modprobe nvidia_peermem"), way == "peermem", "{error}");
        // Host memory of the same engine is none of its concern.
        process.ask("region h 4096 read-write");
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_gpu_that_has_to_be_flushed_is_before_anybody_is_told() {
    if !has_gpus(3) || !is_fake() {
        return;
    }
    let cuda = Cuda::get().unwrap();
    let (near, far) =
        (side("near", config(GpuRdma::Auto), 1), side("far", config(GpuRdma::Auto), 1));
    let peer = connect(&near.engine, &far.engine.metadata());
    let (local, remote) = (near.memory.segment(0, 5000), far.region.descriptor().segment(0, 5000));
    let transfer =
        |operation| near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer();
    let (read, write) = (transfer(Operation::Read), transfer(Operation::Write));
    for round in 0..20u64 {
        far.memory.write(0, &pattern(round, 0, 5000));
        let before = cuda.fake_count("flushes");
        end_of(&read).unwrap();
        assert!(cuda.fake_count("flushes") > before, "what was read was not flushed");
        assert_bytes(&near.memory.read(0, 5000), &pattern(round, 0, 5000), "read");
        near.memory.write(0, &pattern(round + 7, 0, 5000));
        let before = cuda.fake_count("flushes");
        write.post_with_notification(b"written").unwrap();
        assert_eq!(collect(&far.engine, 1).len(), 1);
        assert!(cuda.fake_count("flushes") > before, "what was written was not flushed");
        assert_bytes(&far.memory.read(0, 5000), &pattern(round + 7, 0, 5000), "written");
        outcome(&write).unwrap();
    }
    // Both sides have been told to the driver as memory that devices look at.
    assert!(cuda.fake_count("synchronised") >= 2);
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_gpu_that_never_sees_what_devices_write_is_not_left_to_them() {
    if !has_gpus(3) || !is_fake() {
        return;
    }
    let near = side("near", config_with_tcp(GpuRdma::Auto), 2);
    let mut theirs = far("transports=rdma,tcp", &[]);
    lengths_arrive_whole(&near, &mut theirs, false);
    let forced = Engine::new("forced", config(GpuRdma::DmaBuf)).unwrap();
    let error = near.memory.register(&forced, Access::READ_WRITE).unwrap_err();
    assert_eq!(kind(&error), "Gpu", "{error}");
}
