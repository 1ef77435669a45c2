//! GPU memory by RDMA: devices read and write it themselves, or it goes through pinned host memory where they cannot. In the rig, on a
//! driver whose GPUs are threads (tests/fake-cuda) and a libibverbs whose devices reach their memory (tests/fake-verbs); of its
//! three GPUs the second has to be flushed, and the third never sees what devices write.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::process::Command;

use corelane::{
    Access, Engine, EngineConfig, GpuRdma, LocalSegment, Operation, Peer, Region, RegionDescriptor,
    RemoteSegment, TransportKind,
};
use corelane_tests::{
    BOUND, Buffer, Cuda, GpuBuffer, POISON, PeerProcess, Random, collect, end_of, eventually,
    from_hex, gpus, kind, outcome, pattern, rdma_config, to_hex, transport,
};

#[path = "rdma_gpu/lost.rs"]
mod lost;
#[path = "rdma_gpu/rails.rs"]
mod rails;
#[path = "rdma_gpu/ways.rs"]
mod ways;

const LEN: usize = (2 << 20) + 1000;
const BOTH: [Operation; 2] = [Operation::Read, Operation::Write];

struct Side {
    engine: Engine,
    memory: GpuBuffer,
    region: Region,
}

fn config(way: GpuRdma) -> EngineConfig {
    let mut config = rdma_config();
    config.gpu.rdma = way;
    config
}

/// As `config`, with a way for what devices do not reach.
fn config_with_tcp(way: GpuRdma) -> EngineConfig {
    let mut config = config(way);
    config.transports = vec![TransportKind::Rdma, TransportKind::Tcp];
    config
}

fn side(name: &str, config: EngineConfig, gpu: u32) -> Side {
    let engine = Engine::new(name, config).unwrap();
    let memory = GpuBuffer::new(gpu, LEN);
    let region = memory.register(&engine, Access::READ_WRITE).unwrap();
    Side { engine, memory, region }
}

/// A second process with one region of the first GPU, `r`, which holds pattern 1.
struct Far {
    process: PeerProcess,
    metadata: Vec<u8>,
    region: RegionDescriptor,
}

fn far(settings: &str, variables: &[(&str, &str)]) -> Far {
    far_named("far", settings, variables)
}

fn far_named(name: &str, settings: &str, variables: &[(&str, &str)]) -> Far {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-test-peer"));
    command.envs(variables.iter().copied());
    let mut process = PeerProcess::start_command(&mut command).unwrap();
    process.ask("keep-log");
    let metadata = process.engine(name, settings);
    let bytes = from_hex(&process.ask(&format!("gpu-region r {LEN} read-write 0"))).unwrap();
    process.ask(&format!("gpu-fill r 1 0 {LEN} 0"));
    Far { process, metadata, region: RegionDescriptor::from_bytes(&bytes).unwrap() }
}

fn connect(engine: &Engine, metadata: &[u8]) -> Peer {
    let peer = engine.load_peer(metadata).unwrap();
    peer.connect(BOUND).unwrap();
    assert_eq!(transport(engine, peer.name()), TransportKind::Rdma);
    peer
}

fn copy(
    engine: &Engine,
    peer: &Peer,
    operation: Operation,
    local: LocalSegment,
    remote: RemoteSegment<'_>,
) {
    let plan = engine.prepare(operation, peer, &[local], &[remote]).unwrap();
    end_of(&plan.transfer()).unwrap();
}

/// Whether there are so many GPUs. In the rig there have to be, of the fake driver.
fn has_gpus(count: usize) -> bool {
    let found = gpus(count).is_some();
    let is_rig = std::env::var_os("CORELANE_RDMA_RIG").is_some();
    assert!(found || !is_rig, "the rig runs these tests with tests/fake-cuda: tests/run.sh rdma");
    found
}

/// Work requests that an engine has rung for.
fn doorbells(engine: &Engine) -> u64 {
    engine.stats().totals.rdma_doorbells
}

#[track_caller]
fn assert_bytes(found: &[u8], expected: &[u8], what: &str) {
    let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!(wrong, None, "{what}: the first wrong byte");
    assert_eq!(found.len(), expected.len());
}

/// Every byte of some transfers of any length and place, and of what is around them.
fn lengths_arrive_whole(near: &Side, far: &mut Far, by_devices: bool) {
    let peer = connect(&near.engine, &far.metadata);
    let before = doorbells(&near.engine);
    for (round, len) in [1, 15, 4096, 4097, (64 << 10) + 1, (1 << 20) + 3].into_iter().enumerate() {
        let (here, there) = (round * 16 + 65, round * 16 + 32);
        let local = near.memory.segment(here, len);
        let remote = far.region.segment(there as u64, len as u64);
        copy(&near.engine, &peer, Operation::Read, local, remote);
        let found = near.memory.read(0, LEN);
        assert_bytes(&found[here..here + len], &pattern(1, there as u64, len), "read");
        let around = found[..here].iter().chain(&found[here + len..]);
        assert!(around.copied().all(|byte| byte == POISON), "bytes around {len} were written");

        near.memory.write(here, &pattern(2, here as u64, len));
        far.process.ask(&format!("gpu-poison r 0 {LEN}"));
        copy(&near.engine, &peer, Operation::Write, local, remote);
        far.process.ask(&format!("gpu-check r 2 {there} {len} {here}"));
        far.process.ask(&format!("gpu-check-poison r 0 {there}"));
        let behind = there + len;
        far.process.ask(&format!("gpu-check-poison r {behind} {}", LEN - behind));
        far.process.ask(&format!("gpu-fill r 1 0 {LEN} 0"));
        near.memory.poison();
    }
    assert_eq!(doorbells(&near.engine) > before, by_devices, "which way it went");
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn every_length_is_read_and_written_by_devices_in_each_way() {
    if !has_gpus(1) {
        return;
    }
    for way in [GpuRdma::Auto, GpuRdma::DmaBuf, GpuRdma::PeerMem] {
        let mut far = far(&format!("transports=rdma gpu_rdma={}", way.name()), &[]);
        let used = if way == GpuRdma::PeerMem { "peermem" } else { "dmabuf" };
        let said = far.process.ask("log RDMA devices reach GPU memory");
        assert!(said.contains(used), "{said}");
        lengths_arrive_whole(&side("near", config(way), 0), &mut far, true);
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_part_of_an_allocation_is_reached_where_it_begins_and_no_further() {
    if !has_gpus(1) {
        return;
    }
    let near = side("near", config(GpuRdma::DmaBuf), 0);
    let far = Engine::new("far", config(GpuRdma::DmaBuf)).unwrap();
    let memory = GpuBuffer::new(0, LEN);
    // Neither end is one of a page.
    let (offset, len) = (3 * 4096 + 513, 70_001);
    let region = memory.register_part(&far, (offset, len), Access::READ_WRITE).unwrap();
    memory.write(0, &pattern(1, 0, LEN));
    let peer = connect(&near.engine, &far.metadata());
    let (local, all) = (near.memory.segment(7, len), region.descriptor().segment(0, len as u64));
    copy(&near.engine, &peer, Operation::Read, local, all);
    assert_bytes(&near.memory.read(7, len), &pattern(1, offset as u64, len), "read");
    near.memory.write(7, &pattern(5, 0, len));
    copy(&near.engine, &peer, Operation::Write, local, all);
    let mut expected = pattern(1, 0, LEN);
    expected[offset..offset + len].copy_from_slice(&pattern(5, 0, len));
    assert_bytes(&memory.read(0, LEN), &expected, "written, and around it");
}

/// Blocks of any length and place, none of which overlap, and as many on the other side.
fn blocks(random: &mut Random, count: usize) -> Vec<(usize, usize, usize)> {
    let place = LEN / count;
    let mut order: Vec<usize> = (0..count).collect();
    for at in (1..count).rev() {
        order.swap(at, random.below(at + 1));
    }
    (0..count)
        .map(|at| {
            let (here, there) = (random.below(16), random.below(16));
            (at * place + here, order[at] * place + there, 1 + random.below(place - 20))
        })
        .collect()
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn scattered_blocks_arrive_whole_both_ways() {
    if !has_gpus(1) {
        return;
    }
    let (near, far) =
        (side("near", config(GpuRdma::Auto), 0), side("far", config(GpuRdma::Auto), 0));
    let peer = connect(&near.engine, &far.engine.metadata());
    let mut random = Random::new(9);
    for count in [2, 33, 1000] {
        let list = blocks(&mut random, count);
        let local: Vec<_> =
            list.iter().map(|&(here, _, len)| near.memory.segment(here, len)).collect();
        let theirs = far.region.descriptor();
        let remote: Vec<_> =
            list.iter().map(|&(_, there, len)| theirs.segment(there as u64, len as u64)).collect();
        for operation in BOTH {
            let (from, to) = match operation {
                Operation::Read => (&far.memory, &near.memory),
                Operation::Write => (&near.memory, &far.memory),
            };
            from.write(0, &pattern(count as u64, 0, LEN));
            to.poison();
            let plan = near.engine.prepare(operation, &peer, &local, &remote).unwrap();
            let before = doorbells(&near.engine);
            end_of(&plan.transfer()).unwrap();
            assert!(doorbells(&near.engine) > before, "it went another way");
            let mut expected = vec![POISON; LEN];
            for &(here, there, len) in &list {
                let (at, source) = match operation {
                    Operation::Read => (here, there),
                    Operation::Write => (there, here),
                };
                let bytes = pattern(count as u64, source as u64, len);
                expected[at..at + len].copy_from_slice(&bytes);
            }
            assert_bytes(&to.read(0, LEN), &expected, "blocks");
            assert_bytes(&from.read(0, LEN), &pattern(count as u64, 0, LEN), "their source");
        }
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn notifications_come_after_the_data() {
    if !has_gpus(1) {
        return;
    }
    let (near, far) =
        (side("near", config(GpuRdma::Auto), 0), side("far", config(GpuRdma::Auto), 0));
    let peer = connect(&near.engine, &far.engine.metadata());
    // Behind the WRITE on its queue pair; too long for that; behind a large one.
    for (rounds, len, told) in [(150, 30_000, 40), (20, 5000, 3000), (6, LEN - 64, 40)] {
        let local = near.memory.segment(0, len);
        let remote = far.region.descriptor().segment(64, len as u64);
        let transfer = |operation| {
            near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer()
        };
        let (write, read) = (transfer(Operation::Write), transfer(Operation::Read));
        for round in 0..rounds {
            near.memory.write(0, &pattern(round, 0, len));
            write.post_with_notification(&vec![round as u8; told]).unwrap();
            assert_eq!(collect(&far.engine, 1)[0].payload, vec![round as u8; told]);
            assert_bytes(&far.memory.read(64, len), &pattern(round, 0, len), "at the notification");
            outcome(&write).unwrap();
            far.memory.write(64, &pattern(round + 1, 0, len));
            read.post_with_notification(b"read").unwrap();
            assert_eq!(collect(&far.engine, 1)[0].payload, b"read");
            assert_bytes(&near.memory.read(0, len), &pattern(round + 1, 0, len), "when told");
            outcome(&read).unwrap();
        }
    }
    assert!(doorbells(&near.engine) > 0, "it went another way");
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn host_and_gpu_memory_of_one_engine_mix() {
    if !has_gpus(1) {
        return;
    }
    let (near, far) =
        (side("near", config(GpuRdma::Auto), 0), side("far", config(GpuRdma::Auto), 0));
    let (here, there) = (Buffer::new(LEN), Buffer::new(LEN));
    let ours = here.register(&near.engine, Access::READ_WRITE);
    let theirs = there.register(&far.engine, Access::READ_WRITE);
    let peer = connect(&near.engine, &far.engine.metadata());
    let quarter = LEN / 4;
    far.memory.write(0, &pattern(1, 0, 2 * quarter));
    there.fill(2, 0, 2 * quarter, 0);
    near.memory.write(2 * quarter, &pattern(3, 0, 2 * quarter));
    here.fill(4, 2 * quarter, 2 * quarter, 0);
    // All kinds in both directions, at once: what is read goes to the first half, what is written to the second.
    let transfers: Vec<_> = (0..8)
        .map(|case| {
            let operation = BOTH[case / 4];
            let (gpu_here, gpu_there) = (case % 2 == 0, case % 4 < 2);
            // Each source once to host memory and once to a GPU's.
            let reading = operation == Operation::Read;
            let (source, target) =
                if reading { (gpu_there, gpu_here) } else { (gpu_here, gpu_there) };
            let half = if reading { 0 } else { 2 * quarter };
            let (from, to) =
                (half + usize::from(target) * quarter, half + usize::from(source) * quarter);
            let (at, remote_at) = if reading { (to, from) } else { (from, to) };
            let local = if gpu_here {
                near.memory.segment(at, quarter)
            } else {
                ours.segment(at as u64, quarter as u64)
            };
            let region = if gpu_there { &far.region } else { &theirs };
            let remote = region.descriptor().segment(remote_at as u64, quarter as u64);
            near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer()
        })
        .collect();
    for transfer in &transfers {
        transfer.post().unwrap();
    }
    for transfer in &transfers {
        outcome(transfer).unwrap();
    }
    // A quarter for what came from host memory, and one for what came from a GPU.
    let check = |found: &[u8], host: u64, gpu: u64, to_gpu: usize, what| {
        let at = (to_gpu * quarter) as u64;
        assert_bytes(&found[..quarter], &pattern(host, at, quarter), what);
        assert_bytes(&found[quarter..], &pattern(gpu, at, quarter), what);
    };
    check(&near.memory.read(0, 2 * quarter), 2, 1, 1, "read into GPU memory");
    check(&here.snapshot(0, 2 * quarter), 2, 1, 0, "read into host memory");
    check(&far.memory.read(2 * quarter, 2 * quarter), 4, 3, 1, "written into GPU memory");
    check(&there.snapshot(2 * quarter, 2 * quarter), 4, 3, 0, "written into host memory");
    assert!(doorbells(&near.engine) >= 8, "they went another way");
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_process_without_a_driver_exchanges_with_a_gpu_of_its_peer() {
    if !has_gpus(1) {
        return;
    }
    let mut target = far("transports=rdma", &[]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-test-peer"));
    let mut process = PeerProcess::start_command(command.env_remove("LD_LIBRARY_PATH")).unwrap();
    process.engine("plain", "transports=rdma");
    process.ask("region h 700000 read-write");
    process.load(&target.metadata);
    let descriptor = to_hex(&target.region.to_bytes());
    process.ask(&format!("read far h 3 {descriptor} 5 600000 aa"));
    process.ask("check h 1 3 600000 5");
    process.ask("check-poison h 0 3");
    process.ask("fill h 9 0 700000 0");
    process.ask(&format!("write far h 1 {descriptor} 70 650000 bb"));
    let told = target.process.ask("take 2");
    assert!(told.contains("plain:aa") && told.contains("plain:bb"), "{told}");
    target.process.ask("gpu-check r 9 70 650000 1");
    target.process.ask("gpu-check r 1 0 70 0");
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_deregistered_region_is_refused_and_left_alone() {
    if !has_gpus(1) {
        return;
    }
    for way in [GpuRdma::DmaBuf, GpuRdma::PeerMem] {
        let (near, far) = (side("near", config(way), 0), side("far", config(way), 0));
        let peer = connect(&near.engine, &far.engine.metadata());
        let mut other = GpuBuffer::new(0, 8192);
        let second = other.register(&far.engine, Access::READ_WRITE).unwrap();
        let transfer = |operation, region: &RegionDescriptor| {
            let (local, remote) = (near.memory.segment(0, 8192), region.segment(0, 8192));
            near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer()
        };
        let all = BOTH.map(|operation| transfer(operation, second.descriptor()));
        for transfer in &all {
            end_of(transfer).unwrap();
        }
        far.engine.deregister(&second).unwrap();
        other.poison();
        near.memory.write(0, &pattern(6, 0, 8192));
        for transfer in &all {
            assert_eq!(kind(&end_of(transfer).unwrap_err()), "Permission");
        }
        assert!(other.read(0, 8192).iter().all(|byte| *byte == POISON), "written all the same");
        assert_bytes(&near.memory.read(0, 8192), &pattern(6, 0, 8192), "ours");
        other.free();
        // The engines go on.
        far.memory.write(0, &pattern(7, 0, 8192));
        end_of(&transfer(Operation::Read, far.region.descriptor())).unwrap();
        assert_bytes(&near.memory.read(0, 8192), &pattern(7, 0, 8192), "afterwards");
        let own = transfer(Operation::Read, far.region.descriptor());
        near.engine.deregister(&near.region).unwrap();
        near.memory.poison();
        assert_eq!(kind(&end_of(&own).unwrap_err()), "NotRegistered");
        assert!(near.memory.read(0, LEN).iter().all(|byte| *byte == POISON), "read all the same");
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn registrations_with_devices_go_with_their_engines() {
    if !has_gpus(1) {
        return;
    }
    let near = side("near", config(GpuRdma::Auto), 0);
    // Those of this thread, which the kernel names: other tests run beside this one.
    let own = || {
        let told = Command::new("rdma").args(["resource", "show", "mr"]).output().ok()?;
        let id = format!(" pid {} ", nix::unistd::gettid());
        let lines = String::from_utf8_lossy(&told.stdout).into_owned();
        Some(lines.lines().filter(|line| line.contains(&id)).count())
    };
    let Some(before) = own().filter(|count| *count > 0) else {
        let is_rig = std::env::var_os("CORELANE_RDMA_RIG").is_some();
        assert!(!is_rig, "the region of the first side is not among those of this thread");
        return eprintln!("SKIPPED: `rdma resource` does not say who has made what");
    };
    let more: Vec<_> = (0..50)
        .map(|at| {
            near.memory.register_part(&near.engine, (at * 4096 + 1, 4096), Access::LOCAL).unwrap()
        })
        .collect();
    assert!(own() >= Some(before + 50), "they are registered with a device");
    for region in &more {
        near.engine.deregister(region).unwrap();
    }
    eventually("all that was registered is given back", || own() == Some(before));
    near.engine.deregister(&near.region).unwrap();
    eventually("and so is the first", || own() < Some(before));
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn memory_that_was_freed_is_refused_here() {
    if !has_gpus(1) {
        return;
    }
    let (near, far) =
        (side("near", config(GpuRdma::Auto), 0), side("far", config(GpuRdma::Auto), 0));
    let peer = connect(&near.engine, &far.engine.metadata());
    for operation in BOTH {
        let mut own = GpuBuffer::new(0, 1 << 20);
        let region = own.register(&near.engine, Access::LOCAL).unwrap();
        let local = own.segment(0, 5000);
        let remote = far.region.descriptor().segment(0, 5000);
        let transfer =
            near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer();
        far.memory.write(0, &pattern(3, 0, 5000));
        own.write(0, &pattern(3, 0, 5000));
        end_of(&transfer).unwrap();
        own.free();
        assert_eq!(kind(&end_of(&transfer).unwrap_err()), "Fault");
        assert_bytes(&far.memory.read(0, 5000), &pattern(3, 0, 5000), "the other side");
        near.engine.deregister(&region).unwrap();
    }
    copy(
        &near.engine,
        &peer,
        Operation::Read,
        near.memory.segment(0, 5000),
        far.region.descriptor().segment(0, 5000),
    );
    assert_bytes(&near.memory.read(0, 5000), &pattern(3, 0, 5000), "afterwards");
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_peer_that_is_killed_amid_transfers_ends_them() {
    if !has_gpus(1) {
        return;
    }
    let mut near = side("near", config_with_tcp(GpuRdma::Auto), 0);
    for round in 0..3 {
        let far = far("transports=rdma,tcp liveness_ms=20000", &[]);
        let peer = connect(&near.engine, &far.metadata);
        let transfers: Vec<_> = (0..6)
            .map(|at| {
                let local = near.memory.segment(0, LEN);
                let remote = far.region.segment(0, LEN as u64);
                near.engine.prepare(BOTH[at % 2], &peer, &[local], &[remote]).unwrap().transfer()
            })
            .collect();
        for transfer in &transfers {
            transfer.post().unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(5 * round));
        far.process.end();
        for transfer in &transfers {
            let _ = outcome(transfer);
        }
        near.memory.poison();
        near.engine.deregister(&near.region).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(near.memory.read(0, LEN).iter().all(|byte| *byte == POISON), "written later");
        near.region = near.memory.register(&near.engine, Access::READ_WRITE).unwrap();
    }
}
