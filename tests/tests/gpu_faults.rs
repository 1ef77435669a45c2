//! GPUs that fail, and drivers that refuse: mostly by the driver of tests/fake-cuda, which can be told to. Each test has a process
//! of its own, since a lost GPU is lost to a process. Skipped, and said so, where there is no such driver.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::process::Command;
use std::time::{Duration, Instant};

use corelane::{
    Access, EngineConfig, MemoryKind, Operation, Peer, Status, Transfer, TransportKind,
};
use corelane_tests::{
    BOUND, Buffer, Cuda, FakeCuda, FarGpu, GPU_LEN, GpuBuffer, GpuSide, POISON, PeerProcess,
    assert_bytes, end_of, eventually, gpus, kind, local_config, outcome, pattern, peer_process,
    tcp_config,
};

#[path = "gpu/busy.rs"]
mod busy;
#[path = "gpu/issued.rs"]
mod issued;
#[path = "gpu/pinning.rs"]
mod pinning;
#[path = "gpu/unreachable.rs"]
mod unreachable;

const ALONE: &str = "CORELANE_TEST_ALONE";
const LAUNCH_FAILED: i32 = 719;
const OUT_OF_MEMORY: i32 = 2;
const AMID_CAPTURE: i32 = 900;

/// Runs a test in a process of its own, with these settings of the driver; false: that has been done.
fn alone(test: &str, settings: &[(&str, &str)]) -> bool {
    if std::env::var(ALONE).is_ok_and(|name| name == test) {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(ALONE, test);
    command.envs(settings.iter().copied());
    let output = command.output().unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let whole = output.status.success() && out.contains("1 passed");
    assert!(whole, "in a process of its own: {}\n{out}\n{err}", output.status);
    eprintln!("{err}");
    false
}

/// The driver's switches, in a process for this test alone.
fn fake(test: &str) -> Option<FakeCuda> {
    let fake = Cuda::fake()?;
    alone(test, &[]).then_some(fake)
}

fn side(config: EngineConfig, gpu: u32) -> GpuSide {
    GpuSide::new("near", config, gpu)
}

fn far(gpu: u32, settings: &str) -> FarGpu {
    FarGpu::new(peer_process!(), gpu, settings)
}

fn transfer(
    near: &GpuSide,
    peer: &Peer,
    operation: Operation,
    far: &FarGpu,
    len: usize,
) -> Transfer {
    let (local, remote) = (near.memory.segment(3, len), far.region.segment(5, len as u64));
    near.engine.prepare(operation, peer, &[local], &[remote]).unwrap().transfer()
}

/// As `transfer`, in blocks: what a kernel copies, which the lane starts.
fn in_blocks(
    near: &GpuSide,
    peer: &Peer,
    operation: Operation,
    far: &FarGpu,
    len: usize,
) -> Transfer {
    let (count, gap) = (5, 100);
    let local: Vec<_> =
        (0..count).map(|at| near.memory.segment(3 + at * (len + gap), len)).collect();
    let remote: Vec<_> = (0..count)
        .map(|at| far.region.segment((5 + at * (len + 2 * gap)) as u64, len as u64))
        .collect();
    near.engine.prepare(operation, peer, &local, &remote).unwrap().transfer()
}

/// Host memory goes to and from the peer, whatever has become of GPUs.
fn host_memory_goes_on(near: &GpuSide, peer: &Peer, far: &mut FarGpu) {
    let theirs = far.process.region("h", 1 << 20, "read-write");
    far.process.ask(&format!("fill h 4 0 {} 0", 1 << 20));
    let host = Buffer::new(1 << 20);
    let region = host.register(&near.engine, Access::LOCAL);
    let (local, remote) = (host.segment(0, 1 << 20), theirs.segment(0, 1 << 20));
    for operation in [Operation::Read, Operation::Write] {
        let plan = near.engine.prepare(operation, peer, &[local], &[remote]).unwrap();
        end_of(&plan.transfer()).unwrap();
    }
    host.check(4, 0, 1 << 20, 0).unwrap();
    near.engine.deregister(&region).unwrap();
}

fn lost(error: &corelane::Error) {
    assert_eq!(kind(error), "Gpu", "{error}");
    assert!(error.to_string().contains("lost"), "{error}");
}

fn a_gpu_is_lost_amid_transfers(fake: FakeCuda, config: fn() -> EngineConfig, settings: &str) {
    let mut far = far(1, settings);
    let near = side(config(), 0);
    let peer = near.connect(&far.metadata);
    let all: Vec<Transfer> = (0..24)
        .map(|at| {
            let operation = if at % 2 == 0 { Operation::Read } else { Operation::Write };
            match at % 4 {
                0 => in_blocks(&near, &peer, operation, &far, 7000),
                1 => in_blocks(&near, &peer, operation, &far, 300_000),
                2 => transfer(&near, &peer, operation, &far, 5000),
                _ => transfer(&near, &peer, operation, &far, 3 << 20),
            }
        })
        .collect();
    fake.lose(0, LAUNCH_FAILED, 30);
    let deadline = Instant::now() + BOUND;
    let mut failed = 0;
    while failed < all.len() {
        assert!(Instant::now() < deadline, "the GPU is not lost");
        failed = 0;
        all.iter().for_each(|one| one.post().unwrap());
        for one in &all {
            if let Err(error) = outcome(one) {
                lost(&error);
                failed += 1;
            }
        }
    }
    // What is new on it is refused as well.
    let (local, remote) = (near.memory.segment(0, 9000), far.region.segment(0, 9000));
    match near.engine.prepare(Operation::Read, &peer, &[local], &[remote]) {
        Ok(plan) => lost(&end_of(&plan.transfer()).unwrap_err()),
        Err(error) => lost(&error),
    }
    let vram = MemoryKind::Vram { device: 0 };
    let base = near.memory.base();
    // SAFETY: it is refused.
    lost(&unsafe { near.engine.register_kind(base, 4096, vram, Access::LOCAL) }.unwrap_err());
    near.engine.deregister(&near.region).unwrap();

    host_memory_goes_on(&near, &peer, &mut far);
    let other = GpuBuffer::new(1, 1 << 20);
    let region = other.register(&near.engine, Access::LOCAL).unwrap();
    far.process.ask(&format!("gpu-fill r 1 0 {GPU_LEN} 0"));
    let (local, remote) = (other.segment(0, 1 << 20), far.region.segment(9, 1 << 20));
    let plan = near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap();
    end_of(&plan.transfer()).unwrap();
    assert_bytes(&other.read(0, 1 << 20), &pattern(1, 9, 1 << 20), "the other GPU");
    near.engine.deregister(&region).unwrap();
    near.engine.shutdown().unwrap();
    // The driver takes nothing of a lost GPU back.
    std::mem::forget(near);
}

#[test]
fn a_gpu_that_is_lost_amid_transfers_ends_them_and_other_memory_goes_on() {
    if let Some(fake) = fake("a_gpu_that_is_lost_amid_transfers_ends_them_and_other_memory_goes_on")
    {
        a_gpu_is_lost_amid_transfers(fake, local_config, "");
    }
}

#[test]
fn a_gpu_that_is_lost_amid_transfers_over_tcp_ends_them_and_other_memory_goes_on() {
    let name = "a_gpu_that_is_lost_amid_transfers_over_tcp_ends_them_and_other_memory_goes_on";
    if let Some(fake) = fake(name) {
        a_gpu_is_lost_amid_transfers(fake, tcp_config, "transports=tcp");
    }
}

#[test]
fn a_peer_whose_gpu_is_lost_refuses_and_serves_host_memory() {
    if fake("a_peer_whose_gpu_is_lost_refuses_and_serves_host_memory").is_none() {
        return;
    }
    let mut far = far(0, "transports=tcp");
    let near = side(tcp_config(), 0);
    let peer = near.connect(&far.metadata);
    far.process.ask(&format!("gpu-lose 0 {LAUNCH_FAILED} 10"));
    for operation in [Operation::Read, Operation::Write] {
        let transfer = transfer(&near, &peer, operation, &far, 8 << 20);
        let error = end_of(&transfer).and_then(|()| end_of(&transfer)).unwrap_err();
        assert_eq!(kind(&error), "Permission", "{error}");
    }
    host_memory_goes_on(&near, &peer, &mut far);
}

/// A GPU that does not end what it has begun: the engine lets go of the peer and of itself, and of nothing that the GPU may touch.
fn a_gpu_is_stuck(
    fake: FakeCuda,
    config: fn() -> EngineConfig,
    settings: &str,
    unload: bool,
    blocks: bool,
) {
    let mut config = config();
    config.linger = Duration::from_millis(100);
    config.deregister_timeout = Duration::from_millis(100);
    let far = far(1, settings);
    let near = side(config, 0);
    let peer = near.connect(&far.metadata);
    let make = if blocks { in_blocks } else { transfer };
    let transfer = make(&near, &peer, Operation::Read, &far, 1 << 20);
    end_of(&transfer).unwrap();
    near.memory.poison();
    fake.hold(0, true);
    transfer.post().unwrap();
    let launched = Instant::now() + Duration::from_millis(200);
    while Instant::now() < launched {
        assert!(matches!(transfer.status(), Status::InProgress), "the GPU is held");
    }
    if unload {
        near.engine.unload_peer(&peer).unwrap();
        let error = outcome(&transfer).unwrap_err();
        assert!(["Cancelled", "Gpu"].contains(&kind(&error)), "{error}");
        assert_eq!(kind(&near.engine.deregister(&near.region).unwrap_err()), "Busy");
    }
    let stopped = near.engine.shutdown();
    eprintln!("shut down: {stopped:?}");
    assert!(stopped.is_err(), "memory that the GPU still writes was given up");
    outcome(&transfer).unwrap_err();
    drop(transfer);
    let GpuSide { engine, memory, .. } = near;
    drop((engine, peer));
    // Were anything unmapped that it uses, this would lose the GPU.
    fake.hold(0, false);
    memory.poison();
    GpuBuffer::new(0, 4096).poison();
}

#[test]
fn what_a_stuck_gpu_may_touch_is_not_given_back_with_its_engine() {
    if let Some(fake) = fake("what_a_stuck_gpu_may_touch_is_not_given_back_with_its_engine") {
        a_gpu_is_stuck(fake, local_config, "", false, false);
    }
}

#[test]
fn what_a_stuck_gpu_may_touch_is_not_given_back_with_its_engine_over_tcp() {
    let name = "what_a_stuck_gpu_may_touch_is_not_given_back_with_its_engine_over_tcp";
    if let Some(fake) = fake(name) {
        a_gpu_is_stuck(fake, tcp_config, "transports=tcp", false, false);
    }
}

#[test]
fn what_a_stuck_gpu_may_touch_is_not_given_back_with_its_peer() {
    if let Some(fake) = fake("what_a_stuck_gpu_may_touch_is_not_given_back_with_its_peer") {
        a_gpu_is_stuck(fake, local_config, "", true, false);
    }
}

#[test]
fn what_a_stuck_gpu_may_touch_is_not_given_back_with_its_peer_over_tcp() {
    let name = "what_a_stuck_gpu_may_touch_is_not_given_back_with_its_peer_over_tcp";
    if let Some(fake) = fake(name) {
        a_gpu_is_stuck(fake, tcp_config, "transports=tcp", true, false);
    }
}

#[test]
fn what_a_kernel_of_a_stuck_gpu_may_touch_is_not_given_back_with_its_engine() {
    let name = "what_a_kernel_of_a_stuck_gpu_may_touch_is_not_given_back_with_its_engine";
    if let Some(fake) = fake(name) {
        a_gpu_is_stuck(fake, local_config, "", false, true);
    }
}

#[test]
fn what_a_kernel_of_a_stuck_gpu_may_touch_is_not_given_back_with_its_peer() {
    let name = "what_a_kernel_of_a_stuck_gpu_may_touch_is_not_given_back_with_its_peer";
    if let Some(fake) = fake(name) {
        a_gpu_is_stuck(fake, local_config, "", true, true);
    }
}

#[test]
fn a_cancelled_kernel_is_waited_for() {
    let Some(fake) = fake("a_cancelled_kernel_is_waited_for") else { return };
    let far = far(1, "");
    let near = side(local_config(), 0);
    let peer = near.connect(&far.metadata);
    let transfer = in_blocks(&near, &peer, Operation::Read, &far, 9000);
    let kernels = || fake.calls(c"cuLaunchKernel");
    end_of(&transfer).unwrap();
    for _ in 0..10 {
        near.memory.poison();
        fake.hold(0, true);
        let before = kernels();
        transfer.post().unwrap();
        eventually("the kernel is launched", || {
            let _ = transfer.status();
            kernels() > before
        });
        transfer.cancel();
        let waited = Instant::now() + Duration::from_millis(20);
        while Instant::now() < waited {
            assert!(matches!(transfer.status(), Status::InProgress), "the GPU is held");
        }
        fake.hold(0, false);
        let _ = outcome(&transfer);
        // From here on nothing is written.
        near.memory.poison();
        std::thread::sleep(Duration::from_millis(2));
        assert!(near.memory.read(0, 60_000).iter().all(|byte| *byte == POISON), "written later");
    }
}

#[test]
fn a_driver_that_cannot_say_how_a_copy_stands_ends_none() {
    let Some(fake) = fake("a_driver_that_cannot_say_how_a_copy_stands_ends_none") else { return };
    let far = far(0, "");
    let near = side(local_config(), 0);
    let peer = near.connect(&far.metadata);
    let (local, remote) = (near.memory.segment(30_000, 4000), far.region.segment(20_000, 4000));
    let whole = (near.memory.segment(3, 9000), far.region.segment(5, 9000));
    let prepare = |local: &[_], remote: &[_]| {
        near.engine.prepare(Operation::Read, &peer, local, remote).unwrap().transfer()
    };
    // The lane's has a flag that tells of its end; of the caller's only the driver does.
    let by_lane = prepare(&[whole.0, local], &[whole.1, remote]);
    let by_caller = prepare(&[whole.0], &[whole.1]);
    for (transfer, has_flag) in [(by_lane, true), (by_caller, false)] {
        end_of(&transfer).unwrap();
        near.memory.poison();
        fake.hold(0, true);
        fake.refuse(c"cuStreamQuery", AMID_CAPTURE, u64::MAX);
        transfer.post().unwrap();
        let asked = Instant::now() + Duration::from_millis(100);
        while Instant::now() < asked {
            assert!(matches!(transfer.status(), Status::InProgress), "the GPU is held");
        }
        fake.hold(0, false);
        if !has_flag {
            fake.refuse(c"cuStreamQuery", 0, 0);
        }
        outcome(&transfer).unwrap();
        fake.refuse(c"cuStreamQuery", 0, 0);
        assert_bytes(&near.memory.read(3, 9000), &pattern(1, 5, 9000), "after all");
    }
}

#[test]
fn captures_of_the_process_and_transfers_leave_each_other_alone() {
    if gpus(1).is_none() {
        return;
    }
    let name = "captures_of_the_process_and_transfers_leave_each_other_alone";
    if !alone(name, &[]) {
        return;
    }
    for (config, settings) in [(local_config(), ""), (tcp_config(), "transports=tcp")] {
        let far = far(0, settings);
        let near = side(config, 0);
        let peer = near.connect(&far.metadata);
        let more = GpuBuffer::new(0, 1 << 20);
        Cuda::get().unwrap().capturing(0, || {
            for len in [100, 5000, 6 << 20] {
                near.copy(&peer, Operation::Read, (3, 5), &far.region, len);
            }
            // New memory and lists of many ranges, too.
            let region = more.register(&near.engine, Access::LOCAL).unwrap();
            let local: Vec<_> = (0..50).map(|at| more.segment(at * 2000, 1000)).collect();
            let remote: Vec<_> = (0..50).map(|at| far.region.segment(at * 3000, 1000)).collect();
            let plan = near.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
            end_of(&plan.transfer()).unwrap();
            near.engine.deregister(&region).unwrap();
        });
        assert_bytes(&near.memory.read(3, 6 << 20), &pattern(1, 5, 6 << 20), "amid a capture");
        assert_bytes(&more.read(49 * 2000, 1000), &pattern(1, 49 * 3000, 1000), "the last range");
    }
}

#[test]
fn a_gpu_whose_first_use_fails_is_tried_again() {
    let Some(fake) = fake("a_gpu_whose_first_use_fails_is_tried_again") else { return };
    let engine = corelane::Engine::new("near", local_config()).unwrap();
    let memory = GpuBuffer::new(0, 8192);
    fake.refuse(c"cuModuleLoadData", OUT_OF_MEMORY, 1);
    let error = memory.register(&engine, Access::LOCAL).unwrap_err();
    assert_eq!(kind(&error), "Gpu", "{error}");
    assert!(error.to_string().contains("out of memory"), "{error}");
    let mut region = None;
    eventually("the GPU is used", || {
        region = memory.register(&engine, Access::LOCAL).ok();
        region.is_some()
    });
    let (retained, released) =
        (fake.calls(c"cuDevicePrimaryCtxRetain"), fake.calls(c"cuDevicePrimaryCtxRelease_v2"));
    assert!(released >= 1 && retained > released, "{retained} contexts taken, {released} back");
    engine.deregister(&region.unwrap()).unwrap();
}

#[test]
fn a_lane_that_gets_no_streams_keeps_nothing_and_tries_again() {
    let Some(fake) = fake("a_lane_that_gets_no_streams_keeps_nothing_and_tries_again") else {
        return;
    };
    drop(side(local_config(), 0));
    let held = || {
        let left = |made, gone| fake.calls(made) - fake.calls(gone);
        [
            left(c"cuStreamCreateWithPriority", c"cuStreamDestroy_v2"),
            left(c"cuMemAlloc_v2", c"cuMemFree_v2"),
            left(c"cuMemHostAlloc", c"cuMemFreeHost"),
        ]
    };
    eventually("the first engine has ended", || held() == [1, 0, 0]);
    for refused in [c"cuStreamCreateWithPriority", c"cuMemAlloc_v2", c"cuMemcpyAsync"] {
        let engine = corelane::Engine::new("near", local_config()).unwrap();
        let memory = GpuBuffer::new(0, 1 << 20);
        fake.refuse(refused, OUT_OF_MEMORY, 1);
        let region = memory.register(&engine, Access::LOCAL).unwrap();
        eventually("the lane has tried", || fake.has_refused(refused));
        let far = far(0, "");
        let peer = engine.load_peer(&far.metadata).unwrap();
        peer.connect(BOUND).unwrap();
        // One range: a list would stay with the GPU, to be used again.
        let (local, remote) = (memory.segment(0, 4000), far.region.segment(1, 4000));
        let plan = engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap();
        end_of(&plan.transfer()).unwrap();
        assert_bytes(&memory.read(0, 4000), &pattern(1, 1, 4000), "the second try");
        drop(plan);
        engine.deregister(&region).unwrap();
        engine.shutdown().unwrap();
        drop((engine, peer, memory));
        eventually("all is given back", || held() == [1, 0, 0]);
    }
}

#[test]
fn a_side_without_pinned_memory_fails_and_recovers() {
    let Some(fake) = fake("a_side_without_pinned_memory_fails_and_recovers") else { return };
    let mut far = far(0, "transports=tcp");
    // The lane's flags, which are pinned, are there.
    let engine = corelane::Engine::new("near", tcp_config()).unwrap();
    let memory = GpuBuffer::new(0, GPU_LEN);
    let flags = fake.calls(c"cuMemHostAlloc");
    fake.refuse_later(c"cuMemHostAlloc", OUT_OF_MEMORY, 1, u64::MAX);
    let region = memory.register(&engine, Access::READ_WRITE).unwrap();
    eventually("the lane has flags", || fake.calls(c"cuMemHostAlloc") == flags + 1);
    let near = GpuSide { engine, memory, region };
    let peer = near.connect(&far.metadata);
    for operation in [Operation::Read, Operation::Write] {
        let transfer = transfer(&near, &peer, operation, &far, 3 << 20);
        let error = end_of(&transfer).unwrap_err();
        assert_eq!(kind(&error), "Gpu", "{error}");
        assert!(error.to_string().contains("out of memory"), "{error}");
    }
    assert!(near.memory.read(0, GPU_LEN).iter().all(|byte| *byte == POISON), "bytes were written");
    host_memory_goes_on(&near, &peer, &mut far);
    fake.refuse(c"cuMemHostAlloc", 0, 0);
    near.copy(&peer, Operation::Read, (3, 5), &far.region, 3 << 20);
    assert_bytes(&near.memory.read(3, 3 << 20), &pattern(1, 5, 3 << 20), "once there is some");
}

#[test]
fn a_list_of_one_range_takes_nothing_of_the_gpu() {
    let Some(fake) = fake("a_list_of_one_range_takes_nothing_of_the_gpu") else { return };
    let far = far(0, "");
    let near = side(local_config(), 0);
    let peer = near.connect(&far.metadata);
    end_of(&transfer(&near, &peer, Operation::Read, &far, 4096)).unwrap();
    let uploads = || fake.calls(c"cuMemcpyAsync") + fake.calls(c"cuMemAlloc_v2");
    let before = uploads();
    let small = transfer(&near, &peer, Operation::Read, &far, 4000);
    let by_engine = transfer(&near, &peer, Operation::Read, &far, 20 << 20);
    assert_eq!(uploads(), before);
    near.memory.poison();
    for (one, len) in [(small, 4000), (by_engine, 20 << 20)] {
        end_of(&one).unwrap();
        assert_bytes(&near.memory.read(3, len), &pattern(1, 5, len), "one range");
    }
}

#[test]
fn memory_that_a_peer_frees_and_allocates_again_is_mapped_anew() {
    let Some(fake) = fake("memory_that_a_peer_frees_and_allocates_again_is_mapped_anew") else {
        return;
    };
    let mut far = far(0, "");
    let near = side(local_config(), 0);
    let peer = near.connect(&far.metadata);
    for round in 0..5 {
        near.copy(&peer, Operation::Read, (0, round), &far.region, 100_000);
        let expected = pattern(1 + round as u64, round as u64, 100_000);
        assert_bytes(&near.memory.read(0, 100_000), &expected, "what is there now");
        let before = far.region.segment(0, 1).addr;
        far.process.ask("gpu-drop r");
        let region = far.process.ask(&format!("gpu-region r {GPU_LEN} read-write 0"));
        let region = corelane_tests::from_hex(&region).unwrap();
        far.region = corelane::RegionDescriptor::from_bytes(&region).unwrap();
        let seed = 2 + round;
        far.process.ask(&format!("gpu-fill r {seed} 0 {GPU_LEN} 0"));
        let again = far.region.segment(0, 1).addr == before;
        if again {
            near.copy(&peer, Operation::Read, (0, 0), &far.region, 1000);
            let mapped =
                || fake.calls(c"cuIpcOpenMemHandle_v2") - fake.calls(c"cuIpcCloseMemHandle");
            eventually("what the peer has freed is not mapped any more", || mapped() == 1);
        }
    }
}

#[test]
fn where_the_system_allows_no_ipc_memory_goes_through_host_memory_or_is_refused() {
    if Cuda::fake().is_none() {
        return;
    }
    let name = "where_the_system_allows_no_ipc_memory_goes_through_host_memory_or_is_refused";
    if !alone(name, &[]) {
        return;
    }
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-test-peer"));
        command.env("FAKE_CUDA_NO_IPC", "1");
        FarGpu::new(PeerProcess::start_command(&mut command).unwrap(), 0, "")
    };
    let mut far = start();
    let near = side(local_config(), 0);
    let peer = near.connect(&far.metadata);
    near.copy(&peer, Operation::Read, (3, 5), &far.region, 1 << 20);
    assert_bytes(&near.memory.read(3, 1 << 20), &pattern(1, 5, 1 << 20), "through host memory");
    assert!(near.engine.stats().totals.requests_sent > 0, "it was mapped");
    host_memory_goes_on(&near, &peer, &mut far);

    let mut config = local_config();
    config.transports = vec![TransportKind::Local];
    let (mut far, near) = (start(), side(config, 0));
    let peer = near.connect(&far.metadata);
    let (local, remote) = (near.memory.segment(0, 4096), far.region.segment(0, 4096));
    let refused = near
        .engine
        .prepare(Operation::Read, &peer, &[local], &[remote])
        .and_then(|plan| end_of(&plan.transfer()))
        .unwrap_err();
    assert_eq!(kind(&refused), "NoTransport", "{refused}");
    assert!(refused.to_string().contains("IPC"), "{refused}");
    host_memory_goes_on(&near, &peer, &mut far);
}
