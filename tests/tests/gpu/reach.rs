//! Memory that GPUs reach not at all, or not where the host has it: a kernel that tried would lose its context. Lists of blocks,
//! which a kernel copies if anything does.

use super::*;
use corelane::Peer;

/// Blocks that are small enough for a kernel, of odd places and lengths: here, there, how long.
fn list() -> Vec<(usize, usize, usize)> {
    (0..40).map(|at| (at * 3000 + at % 16, at * 5000 + 7, 1000 + at * 37)).collect()
}

/// Reads the list from memory which holds pattern 1, writes it back behind a megabyte, and looks at both.
#[track_caller]
fn exchange(
    engine: &Engine,
    peer: &Peer,
    (local, read): (impl Fn(usize, usize) -> LocalSegment, impl Fn() -> Vec<u8>),
    (remote, written): (&RegionDescriptor, impl Fn() -> Vec<u8>),
) {
    const BEHIND: usize = 1 << 20;
    let list = list();
    let here: Vec<_> = list.iter().map(|&(here, _, len)| local(here, len)).collect();
    let there = |behind: usize| -> Vec<_> {
        list.iter().map(|&(_, at, len)| remote.segment((behind + at) as u64, len as u64)).collect()
    };
    for (operation, behind) in [(Operation::Read, 0), (Operation::Write, BEHIND)] {
        let plan = engine.prepare(operation, peer, &here, &there(behind)).unwrap();
        end_of(&plan.transfer()).unwrap();
    }
    let (found, back) = (read(), written());
    for &(here, there, len) in &list {
        let expected = pattern(1, there as u64, len);
        assert_bytes(&found[here..here + len], &expected, "read");
        assert_bytes(&back[BEHIND + there..][..len], &expected, "written");
    }
}

const BYTES: usize = 2 << 20;

/// Where copies went that `work` has made: by requests to the peer, or directly.
fn requests(engine: &Engine, work: impl FnOnce()) -> u64 {
    let sent = || engine.stats().totals.requests_sent;
    let before = sent();
    work();
    sent() - before
}

/// Memory of GPU 0, or of its pool, reads from and writes to that of another engine of this process.
fn between(near: GpuBuffer, far: GpuBuffer) -> u64 {
    let engines = ["near", "far"].map(|name| Engine::new(name, local_config()).unwrap());
    let [near_region, far_region] =
        [(&near, 0), (&far, 1)].map(|(it, at)| it.register(&engines[at], Access::READ_WRITE));
    let (near_region, far_region) = (near_region.unwrap(), far_region.unwrap());
    far.write(0, &pattern(1, 0, BYTES));
    let peer = engines[0].load_peer(&engines[1].metadata()).unwrap();
    peer.connect(BOUND).unwrap();
    let requests = requests(&engines[0], || {
        let local = (|at, len| near.segment(at, len), || near.read(0, BYTES));
        exchange(&engines[0], &peer, local, (far_region.descriptor(), || far.read(0, BYTES)));
    });
    engines[0].deregister(&near_region).unwrap();
    engines[1].deregister(&far_region).unwrap();
    // Its context is alive.
    GpuBuffer::new(near.gpu(), 4096).poison();
    requests
}

#[test]
fn memory_of_a_pool_of_another_gpu_is_left_to_that_gpu() {
    if gpus(2).is_none() {
        return;
    }
    for (near, far) in [(0, 1), (1, 0)] {
        let plain = between(GpuBuffer::new(near, BYTES), GpuBuffer::new(far, BYTES));
        assert_eq!(plain, 0, "GPUs do not reach each other's plain memory");
        let own = between(GpuBuffer::of_pool(near, BYTES), GpuBuffer::new(far, BYTES));
        assert_eq!(own, 0, "a GPU does not reach its own pool");
        let same = between(GpuBuffer::new(near, BYTES), GpuBuffer::of_pool(near, BYTES));
        assert_eq!(same, 0, "a GPU does not reach its own pool");
        let other = between(GpuBuffer::new(near, BYTES), GpuBuffer::of_pool(far, BYTES));
        assert!(other > 0, "a kernel went there");
    }
}

#[test]
fn memory_of_a_pool_of_another_gpu_is_refused_where_nothing_else_carries_it() {
    if gpus(2).is_none() {
        return;
    }
    let mut config = local_config();
    config.transports = vec![TransportKind::Local];
    let near = side("near", config.clone(), 0);
    let far = Engine::new("far", config).unwrap();
    let memory = GpuBuffer::of_pool(1, BYTES);
    let region = memory.register(&far, Access::READ_WRITE).unwrap();
    let peer = near.engine.load_peer(&far.metadata()).unwrap();
    let (local, remote) = (near.memory.segment(0, 4096), region.descriptor().segment(0, 4096));
    let refused = near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap_err();
    assert_eq!(kind(&refused), "NoTransport", "{refused}");
    assert!(refused.to_string().contains("pool"), "{refused}");
    far.deregister(&region).unwrap();
}

#[test]
fn memory_of_a_pool_goes_to_another_process_all_the_same() {
    if gpus(1).is_none() {
        return;
    }
    let mut far = far(0, "");
    let near = Engine::new("near", local_config()).unwrap();
    let memory = GpuBuffer::of_pool(0, BYTES);
    let region = memory.register(&near, Access::READ_WRITE).unwrap();
    let peer = near.load_peer(&far.metadata).unwrap();
    peer.connect(BOUND).unwrap();
    let (local, remote) = (memory.segment(1, 100_000), far.region.segment(3, 100_000));
    let plan = near.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap();
    end_of(&plan.transfer()).unwrap();
    assert_bytes(&memory.read(1, 100_000), &pattern(1, 3, 100_000), "into a pool");
    // And from there: that process has no handle of it.
    memory.write(0, &pattern(7, 0, BYTES));
    far.process.load(&near.metadata());
    let descriptor = to_hex(&region.descriptor().to_bytes());
    far.process.region("h", 200_000, "read-write");
    far.process.ask(&format!("read near h 0 {descriptor} 9 150000"));
    far.process.ask("check h 7 0 150000 9");
    near.deregister(&region).unwrap();
}

#[test]
fn write_combined_memory_and_a_gpu_exchange() {
    if gpus(1).is_none() {
        return;
    }
    let far = side("far", local_config(), 0);
    let near = Engine::new("near", local_config()).unwrap();
    let mut memory = PinnedBuffer::write_combined(BYTES);
    // SAFETY: it outlives the registration.
    let region = unsafe { near.register(memory.base(), BYTES, Access::READ_WRITE) }.unwrap();
    far.memory.write(0, &pattern(1, 0, BYTES));
    let peer = near.load_peer(&far.engine.metadata()).unwrap();
    peer.connect(BOUND).unwrap();
    let base = memory.base() as u64;
    let memory = std::cell::RefCell::new(&mut memory);
    let requests = requests(&near, || {
        let read = || memory.borrow_mut().bytes().to_vec();
        let local =
            |at: usize, len: usize| LocalSegment { addr: base + at as u64, len: len as u64 };
        let remote = (far.region.descriptor(), || far.memory.read(0, BYTES));
        exchange(&near, &peer, (local, read), remote);
    });
    if Cuda::get().is_some_and(Cuda::is_fake) {
        assert!(requests > 0, "a kernel went where the host has it");
    }
    far.memory.poison();
    near.deregister(&region).unwrap();
}
