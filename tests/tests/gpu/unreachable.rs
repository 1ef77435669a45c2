//! Where the driver opens no way to the peer's memory, it goes through host memory.

use super::*;

/// A second engine of this process on GPU 1, which holds pattern 1.
fn beside() -> GpuSide {
    let beside = GpuSide::new("beside", local_config(), 1);
    beside.memory.write(0, &pattern(1, 0, GPU_LEN));
    beside
}

fn requests(near: &GpuSide) -> u64 {
    near.engine.stats().totals.requests_sent
}

/// Reads and writes a list of blocks.
#[track_caller]
fn exchange(near: &GpuSide, peer: &Peer, far: &corelane::RegionDescriptor) {
    let local: Vec<_> = (0..20).map(|at| near.memory.segment(at * 2000, 1500)).collect();
    let remote = |behind: u64| -> Vec<_> {
        (0..20).map(|at| far.segment(behind + at * 3000 + 1, 1500)).collect()
    };
    near.memory.poison();
    for (operation, behind) in
        [(Operation::Read, 0), (Operation::Write, 1 << 20), (Operation::Read, 1 << 20)]
    {
        let plan = near.engine.prepare(operation, peer, &local, &remote(behind)).unwrap();
        end_of(&plan.transfer()).unwrap();
        if operation == Operation::Write {
            near.memory.poison();
        }
    }
    for at in 0..20 {
        let expected = pattern(1, at as u64 * 3000 + 1, 1500);
        assert_bytes(&near.memory.read(at * 2000, 1500), &expected, "there and back");
    }
}

#[test]
fn gpus_without_peer_access_exchange_through_host_memory() {
    if Cuda::fake().is_none() {
        return;
    }
    let name = "unreachable::gpus_without_peer_access_exchange_through_host_memory";
    if !alone(name, &[("FAKE_CUDA_NO_PEER_ACCESS", "1")]) {
        return;
    }
    let (near, beside, far) = (side(local_config(), 0), beside(), far(1, ""));
    for (metadata, region) in [
        (beside.engine.metadata(), beside.region.descriptor()),
        (far.metadata.clone(), &far.region),
    ] {
        let before = requests(&near);
        exchange(&near, &near.connect(&metadata), region);
        assert!(requests(&near) > before, "a GPU went there");
    }
    // GPU 0 is alive.
    GpuBuffer::new(0, 4096).poison();
}

#[test]
fn gpus_with_peer_access_reach_each_other() {
    if fake("unreachable::gpus_with_peer_access_reach_each_other").is_none() {
        return;
    }
    let (near, beside, far) = (side(local_config(), 0), beside(), far(1, ""));
    exchange(&near, &near.connect(&beside.engine.metadata()), beside.region.descriptor());
    exchange(&near, &near.connect(&far.metadata), &far.region);
    assert_eq!(requests(&near), 0, "the peers were asked to serve");
}

#[test]
fn what_cannot_be_mapped_goes_through_host_memory_and_is_not_tried_each_time() {
    let name =
        "unreachable::what_cannot_be_mapped_goes_through_host_memory_and_is_not_tried_each_time";
    let Some(fake) = fake(name) else { return };
    const INVALID_VALUE: i32 = 1;
    let (near, mut far) = (side(local_config(), 0), far(0, ""));
    let peer = near.connect(&far.metadata);
    fake.refuse(c"cuIpcOpenMemHandle_v2", INVALID_VALUE, 1);
    // Three plans, the second of which would find it open.
    exchange(&near, &peer, &far.region);
    assert!(fake.has_refused(c"cuIpcOpenMemHandle_v2"));
    let mapped = || fake.calls(c"cuIpcOpenMemHandle_v2");
    assert_eq!(mapped(), 0, "it was tried again");
    let before = requests(&near);
    assert!(before > 0, "it went another way");
    // That says nothing of another allocation of that peer.
    let other = far.process.ask(&format!("gpu-region s {GPU_LEN} read-write 0"));
    let other = corelane_tests::from_hex(&other).unwrap();
    let other = corelane::RegionDescriptor::from_bytes(&other).unwrap();
    far.process.ask(&format!("gpu-fill s 1 0 {GPU_LEN} 0"));
    exchange(&near, &peer, &other);
    assert_eq!((mapped(), requests(&near)), (1, before));
}

#[test]
fn whoever_drops_the_last_plan_does_not_wait_for_the_gpu() {
    let name = "unreachable::whoever_drops_the_last_plan_does_not_wait_for_the_gpu";
    let Some(fake) = fake(name) else { return };
    let (near, far) = (side(local_config(), 0), far(0, ""));
    let beside = GpuSide::new("beside", local_config(), 0);
    let (peer, other) = (near.connect(&far.metadata), near.connect(&beside.engine.metadata()));
    let last = transfer(&near, &peer, Operation::Read, &far, 4096);
    end_of(&last).unwrap();
    near.engine.unload_peer(&peer).unwrap();
    // By then only the plan keeps what was mapped.
    std::thread::sleep(Duration::from_millis(100));
    let closed = || fake.calls(c"cuIpcCloseMemHandle");
    assert_eq!(closed(), 0, "a plan uses it");
    let (local, remote) = (near.memory.segment(0, 4096), beside.region.descriptor());
    let plan = near.engine.prepare(Operation::Read, &other, &[local], &[remote.segment(0, 4096)]);
    let busy = plan.unwrap().transfer();
    fake.hold(0, true);
    busy.post().unwrap();
    let dropping = std::thread::spawn(move || drop((last, peer)));
    eventually("the plan is dropped", || dropping.is_finished());
    assert!(matches!(busy.status(), Status::InProgress), "the GPU is held");
    fake.hold(0, false);
    outcome(&busy).unwrap();
    dropping.join().unwrap();
    eventually("what was mapped is closed", || closed() == 1);
}

#[test]
fn there_is_gpu_memory_where_there_is_a_gpu() {
    if Cuda::fake().is_none() {
        return;
    }
    let name = "unreachable::there_is_gpu_memory_where_there_is_a_gpu";
    if !alone(name, &[]) {
        return;
    }
    use corelane_capi::{
        CORELANE_MEMORY_DRAM, CORELANE_MEMORY_VRAM, corelane_memory_supported, corelane_status,
    };
    assert!(corelane::supports_gpu_memory());
    for kind in [CORELANE_MEMORY_DRAM, CORELANE_MEMORY_VRAM] {
        assert_eq!(corelane_memory_supported(kind), corelane_status::CORELANE_OK);
    }
}

/// The driver is there, as in many images, and no GPU.
#[test]
fn a_driver_without_a_gpu_has_no_gpu_memory() {
    let name = "unreachable::a_driver_without_a_gpu_has_no_gpu_memory";
    if std::env::var_os(ALONE).is_none() && Cuda::fake().is_none() {
        return;
    }
    if !alone(name, &[("FAKE_CUDA_GPUS", "0"), ("CUDA_VISIBLE_DEVICES", "")]) {
        return;
    }
    use corelane_capi::{
        CORELANE_MEMORY_DRAM, CORELANE_MEMORY_VRAM, corelane_memory_supported, corelane_status,
    };
    assert!(!corelane::supports_gpu_memory());
    let answers = [CORELANE_MEMORY_DRAM, CORELANE_MEMORY_VRAM, 77]
        .map(|kind| corelane_memory_supported(kind));
    use corelane_status::{
        CORELANE_ERR_INVALID_ARGUMENT as INVALID, CORELANE_ERR_NOT_SUPPORTED as NOT, CORELANE_OK,
    };
    assert_eq!(answers, [CORELANE_OK, NOT, INVALID]);
    let engine = corelane::Engine::new("near", local_config()).unwrap();
    let host = Buffer::new(4096);
    let vram = MemoryKind::Vram { device: 0 };
    let base = host.segment(0, 1).addr;
    // SAFETY: it is refused.
    let refused = unsafe { engine.register_kind(base, 4096, vram, Access::LOCAL) }.unwrap_err();
    assert_eq!(kind(&refused), "Gpu", "{refused}");
}
