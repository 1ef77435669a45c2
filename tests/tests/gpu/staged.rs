//! GPU memory over sockets: through blocks of pinned memory.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use corelane::Peer;
use sha2::{Digest, Sha256};

use super::*;

/// The least pinned memory that an engine takes: eight blocks for what it receives, four for answers, four for WRITEs.
const LEAST: usize = 8 << 20;
const BLOCK: usize = 512 << 10;

fn small_config() -> EngineConfig {
    let mut config = tcp_config();
    config.gpu.staging_bytes = LEAST;
    config
}

/// Two engines of this process, which nothing but sockets connects.
fn pair() -> (GpuSide, GpuSide, Peer) {
    let (near, far) = (side("near", tcp_config(), 0), side("far", tcp_config(), 0));
    let peer = near.connect(&far.engine.metadata());
    (near, far, peer)
}

fn lengths() -> impl Iterator<Item = usize> {
    [1, 15, 17, 4097, (64 << 10) + 1, BLOCK - 1, BLOCK, BLOCK + 1, (3 << 20) + 7, 20 << 20]
        .into_iter()
}

fn every_length(near_gpu: u32, far_gpu: u32) {
    let mut far = far(far_gpu, "transports=tcp");
    let near = side("near", tcp_config(), near_gpu);
    let peer = near.connect(&far.metadata);
    near.exchange_lengths(&peer, &mut far, lengths(), &[0, 1, 8]);
    assert!(near.engine.stats().totals.requests_sent > 0, "it went another way");
}

#[test]
fn every_length_arrives_whole_over_tcp() {
    if let Some(count) = gpus(1) {
        every_length(0, u32::from(count > 1));
    }
}

/// Host memory here and a GPU there, and the reverse.
fn host_memory(config: EngineConfig, settings: &str) {
    let mut far = far(0, settings);
    let near = side("near", config, 0);
    let peer = near.connect(&far.metadata);
    let host = Buffer::new(LEN);
    let _own = host.register(&near.engine, Access::LOCAL);
    let theirs = far.process.region("h", LEN, "read-write");
    for len in lengths() {
        let (local, remote) = (host.segment(9, len), far.region.segment(5, len as u64));
        let plan = near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap();
        end_of(&plan.transfer()).unwrap();
        host.check(1, 9, len, 5).unwrap();
        host.fill(3, 9, len, 1);
        let plan = near.engine.prepare(Operation::Write, &peer, &[local], &[remote]).unwrap();
        end_of(&plan.transfer()).unwrap();
        far.process.ask(&format!("gpu-check r 3 5 {len} 1"));
        far.process.ask(&format!("gpu-fill r 1 0 {LEN} 0"));

        far.process.ask(&format!("fill h 4 3 {len} 0"));
        near.copy(&peer, Operation::Read, (1, 3), &theirs, len);
        assert_bytes(&near.memory.read(1, len), &pattern(4, 0, len), "read");
        near.memory.write(1, &pattern(6, 2, len));
        near.copy(&peer, Operation::Write, (1, 3), &theirs, len);
        far.process.ask(&format!("check h 6 3 {len} 2"));
    }
}

#[test]
fn host_memory_and_gpus_exchange_over_tcp() {
    if gpus(1).is_some() {
        host_memory(tcp_config(), "transports=tcp");
    }
}

#[test]
fn host_memory_that_is_not_pinned_and_gpus_exchange_within_a_host() {
    if gpus(1).is_some() {
        host_memory(local_config(), "");
    }
}

#[test]
fn a_process_without_a_driver_exchanges_with_a_gpu_of_its_peer() {
    if gpus(1).is_none() {
        return;
    }
    for settings in ["", "transports=local,tcp", "transports=tcp"] {
        let target = far(0, settings);
        let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-test-peer"));
        // Where the fake driver is found; a real one stays.
        let mut process =
            PeerProcess::start_command(command.env_remove("LD_LIBRARY_PATH")).unwrap();
        exchange_from_host_memory(&mut process, settings, target);
    }
}

/// A process reads from and writes to GPU memory of another, which holds pattern 1.
fn exchange_from_host_memory(process: &mut PeerProcess, settings: &str, mut target: FarGpu) {
    process.engine("plain", settings);
    process.ask("region h 700000 read-write");
    process.load(&target.metadata);
    let descriptor = to_hex(&target.region.to_bytes());
    process.ask(&format!("read far h 3 {descriptor} 5 600000"));
    process.ask("check h 1 3 600000 5");
    process.ask("check-poison h 0 3");
    process.ask("fill h 9 0 700000 0");
    process.ask(&format!("write far h 1 {descriptor} 70 650000"));
    target.process.ask("gpu-check r 9 70 650000 1");
    target.process.ask("gpu-check r 1 0 70 0");
}

#[test]
fn scattered_blocks_arrive_whole_over_tcp() {
    if gpus(1).is_none() {
        return;
    }
    let far = far(0, "transports=tcp");
    let near = side("near", tcp_config(), 0);
    let peer = near.connect(&far.metadata);
    let mut random = Random::new(8);
    for count in [2, 33, 4096] {
        let list = blocks(&mut random, count);
        let local: Vec<LocalSegment> =
            list.iter().map(|&(here, _, len)| near.memory.segment(here, len)).collect();
        let remote: Vec<_> = list
            .iter()
            .map(|&(_, there, len)| far.region.segment(there as u64, len as u64))
            .collect();
        let plan = near.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
        let mut expected = vec![POISON; LEN];
        for &(here, there, len) in &list {
            expected[here..here + len].copy_from_slice(&pattern(1, there as u64, len));
        }
        near.memory.poison();
        end_of(&plan.transfer()).unwrap();
        assert_bytes(&near.memory.read(0, LEN), &expected, "blocks");
    }
}

#[test]
fn regions_of_several_gpus_are_one_plan_over_tcp() {
    if gpus(2).is_none() {
        return;
    }
    let (near, far) = (side("near", tcp_config(), 0), side("far", tcp_config(), 0));
    let other = GpuBuffer::new(1, LEN);
    let region = other.register(&far.engine, Access::READ_WRITE).unwrap();
    far.memory.write(0, &pattern(1, 0, 8192));
    other.write(0, &pattern(2, 0, 8192));
    let peer = near.connect(&far.engine.metadata());
    let local: Vec<_> = (0..4).map(|at| near.memory.segment(at * 1000, 1000)).collect();
    let remote: Vec<_> = (0..4)
        .map(|at| if at % 2 == 0 { far.region.descriptor() } else { region.descriptor() })
        .map(|region| region.segment(7, 1000))
        .collect();
    let plan = near.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
    end_of(&plan.transfer()).unwrap();
    for at in 0..4 {
        let expected = pattern(1 + at as u64 % 2, 7, 1000);
        assert_bytes(&near.memory.read(at * 1000, 1000), &expected, "one of four");
    }
}

#[test]
fn more_than_the_blocks_hold_goes_both_ways_at_once() {
    if gpus(1).is_none() {
        return;
    }
    let (near, far) = (side("near", small_config(), 0), side("far", small_config(), 0));
    let (to_far, to_near) =
        (near.connect(&far.engine.metadata()), far.connect(&near.engine.metadata()));
    let half = LEN / 2;
    near.memory.write(0, &pattern(1, 0, half));
    far.memory.write(0, &pattern(2, 0, half));
    let transfers = |side: &GpuSide, peer: &Peer, there: &GpuSide| -> Vec<_> {
        // Large and small ones, each of which reads what the other side has, and writes what this has, behind that.
        (0..40)
            .map(|at| {
                let len = if at % 2 == 0 { 500_000 } else { 3000 };
                let (here, place) = (half + at * 250_000, at * 250_000);
                let local = side.memory.segment(here, len.min(250_000));
                let remote =
                    there.region.descriptor().segment(place as u64, len.min(250_000) as u64);
                side.engine.prepare(Operation::Read, peer, &[local], &[remote]).unwrap().transfer()
            })
            .collect()
    };
    let (reads, back) = (transfers(&near, &to_far, &far), transfers(&far, &to_near, &near));
    let large = |side: &GpuSide, peer: &Peer, there: &GpuSide, operation| {
        let local = side.memory.segment(if operation == Operation::Read { half } else { 0 }, half);
        let at = if operation == Operation::Read { 0 } else { half as u64 };
        let remote = there.region.descriptor().segment(at, half as u64);
        side.engine.prepare(operation, peer, &[local], &[remote]).unwrap().transfer()
    };
    for _ in 0..3 {
        for transfer in reads.iter().chain(&back) {
            transfer.post().unwrap();
        }
        for transfer in reads.iter().chain(&back) {
            outcome(transfer).unwrap();
        }
        for (side, seed) in [(&near, 2), (&far, 1)] {
            for at in 0..40 {
                let len = if at % 2 == 0 { 250_000 } else { 3000 };
                let found = side.memory.read(half + at * 250_000, len);
                assert_bytes(&found, &pattern(seed, at as u64 * 250_000, len), "one of many");
            }
            side.memory.write(half, &vec![POISON; half]);
        }
        let all = [
            large(&near, &to_far, &far, Operation::Write),
            large(&far, &to_near, &near, Operation::Write),
            large(&near, &to_far, &far, Operation::Read),
            large(&far, &to_near, &near, Operation::Read),
        ];
        for transfer in &all {
            transfer.post().unwrap();
        }
        for transfer in &all {
            outcome(transfer).unwrap();
        }
        for (side, seed) in [(&near, 2), (&far, 1)] {
            assert_bytes(&side.memory.read(half, half), &pattern(seed, 0, half), "half of all");
        }
    }
}

#[test]
fn notifications_come_after_the_data_over_tcp() {
    if gpus(1).is_none() {
        return;
    }
    let (near, far, peer) = pair();
    for (rounds, len) in [(2000, 30_000), (60, 3_000_000)] {
        let local = near.memory.segment(0, len);
        let remote = far.region.descriptor().segment(64, len as u64);
        let write =
            near.engine.prepare(Operation::Write, &peer, &[local], &[remote]).unwrap().transfer();
        let read =
            near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap().transfer();
        for round in 0..rounds {
            near.memory.write(0, &pattern(round, 0, len));
            write.post_with_notification(b"written").unwrap();
            let all = collect(&far.engine, 1);
            assert_eq!((all.len(), all[0].payload.as_slice()), (1, &b"written"[..]));
            assert_bytes(&far.memory.read(64, len), &pattern(round, 0, len), "at the notification");
            outcome(&write).unwrap();
            far.memory.write(64, &pattern(round + 1, 0, len));
            read.post_with_notification(b"read").unwrap();
            assert_eq!(collect(&far.engine, 1)[0].payload, b"read");
            assert_bytes(&near.memory.read(0, len), &pattern(round + 1, 0, len), "when told");
            outcome(&read).unwrap();
        }
    }
}

#[test]
fn cancelled_transfers_are_quiet_at_their_end_over_tcp() {
    if gpus(1).is_none() {
        return;
    }
    let (near, far) = (side("near", tcp_config(), 0), side("far", tcp_config(), 0));
    far.memory.write(0, &pattern(1, 0, LEN));
    let peer = near.connect(&far.engine.metadata());
    let len = 8 << 20;
    let mut cancelled = 0;
    for round in 0..60u64 {
        let operation = if round % 2 == 0 { Operation::Read } else { Operation::Write };
        let local = near.memory.segment(0, len);
        let remote = far.region.descriptor().segment(8, len as u64);
        let transfer =
            near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer();
        transfer.post().unwrap();
        std::thread::sleep(Duration::from_micros(round * 50));
        transfer.cancel();
        cancelled += u32::from(cut_short(&transfer));
        if operation == Operation::Read {
            near.memory.poison();
            std::thread::sleep(Duration::from_millis(2));
            assert!(near.memory.read(0, len).iter().all(|byte| *byte == POISON), "written later");
        }
    }
    assert!(cancelled > 0);
    near.copy(&peer, Operation::Read, (0, LEN - 5000), far.region.descriptor(), 5000);
    let expected = pattern(1, LEN as u64 - 5000, 5000);
    assert_bytes(&near.memory.read(0, 5000), &expected, "afterwards");
}

#[test]
fn a_peer_that_is_killed_amid_transfers_ends_them_over_tcp() {
    if gpus(1).is_none() {
        return;
    }
    let mut near = side("near", small_config(), 0);
    for _ in 0..4 {
        let far = far(0, "transports=tcp");
        let peer = near.connect(&far.metadata);
        let transfers: Vec<_> = (0..8)
            .map(|at| {
                let operation = if at % 2 == 0 { Operation::Read } else { Operation::Write };
                let local = near.memory.segment(at << 20, 20 << 18);
                let remote = far.region.segment((at << 20) as u64, 20 << 18);
                near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer()
            })
            .collect();
        for transfer in &transfers {
            transfer.post().unwrap();
        }
        std::thread::sleep(Duration::from_millis(3));
        far.process.end();
        let ends: Vec<_> = transfers.iter().map(|transfer| outcome(transfer)).collect();
        eprintln!("{} of {} ended well", ends.iter().filter(|end| end.is_ok()).count(), ends.len());
        near.memory.poison();
        std::thread::sleep(Duration::from_millis(2));
        assert!(near.memory.read(0, 1 << 20).iter().all(|byte| *byte == POISON), "written later");
        near.engine.deregister(&near.region).unwrap();
        near.region = near.memory.register(&near.engine, Access::READ_WRITE).unwrap();
    }
}

#[test]
fn an_engine_that_ends_amid_transfers_lets_go_of_gpu_memory() {
    if gpus(1).is_none() {
        return;
    }
    for round in 0..6 {
        let (near, far, peer) = pair();
        let operation = if round % 2 == 0 { Operation::Read } else { Operation::Write };
        let local = near.memory.segment(0, LEN);
        let remote = far.region.descriptor().segment(0, LEN as u64);
        let transfer =
            near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer();
        transfer.post().unwrap();
        std::thread::sleep(Duration::from_micros(500 * round));
        let (first, second) = if round % 3 == 0 { (near, far) } else { (far, near) };
        first.engine.shutdown().unwrap();
        let mut memory = first.memory;
        // A copy that is still under way would lose the GPU.
        memory.free();
        let _ = outcome(&transfer);
        second.engine.shutdown().unwrap();
    }
    GpuBuffer::new(0, 4096).poison();
}

#[test]
fn memory_that_is_gone_is_refused_over_tcp_and_the_engines_go_on() {
    if gpus(1).is_none() {
        return;
    }
    let (near, far, peer) = pair();
    let transfer = |local: &GpuBuffer, remote: &RegionDescriptor, operation| {
        let (local, remote) = (local.segment(0, 500_000), remote.segment(0, 500_000));
        near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer()
    };
    for operation in [Operation::Read, Operation::Write] {
        let mut own = GpuBuffer::new(0, 1 << 20);
        let own_region = own.register(&near.engine, Access::LOCAL).unwrap();
        let mut theirs = GpuBuffer::new(0, 1 << 20);
        let their_region = theirs.register(&far.engine, Access::READ_WRITE).unwrap();
        let ours_freed = transfer(&own, far.region.descriptor(), operation);
        let theirs_freed = transfer(&near.memory, their_region.descriptor(), operation);
        end_of(&ours_freed).unwrap();
        end_of(&theirs_freed).unwrap();
        own.free();
        theirs.free();
        assert_eq!(kind(&end_of(&ours_freed).unwrap_err()), "Fault");
        assert_eq!(kind(&end_of(&theirs_freed).unwrap_err()), "Permission");
        far.engine.deregister(&their_region).unwrap();
        assert_eq!(kind(&end_of(&theirs_freed).unwrap_err()), "Permission");
        near.engine.deregister(&own_region).unwrap();
        end_of(&transfer(&near.memory, far.region.descriptor(), operation)).unwrap();
    }
}

#[test]
fn what_a_peer_may_not_do_with_gpu_memory_is_refused_over_tcp() {
    if gpus(1).is_none() {
        return;
    }
    let near = side("near", tcp_config(), 0);
    let far_engine = Engine::new("far", tcp_config()).unwrap();
    let memory = GpuBuffer::new(0, 8192);
    let readable = memory.register(&far_engine, Access::REMOTE_READ).unwrap();
    let peer = near.connect(&far_engine.metadata());
    let original = readable.descriptor().to_bytes();
    // Whoever forges a descriptor gets no further than the target's table.
    for forgery in ["access", "key", "length"] {
        let mut bytes = original.clone();
        let (operation, offset) = match forgery {
            "access" => {
                bytes[6] = 3;
                (Operation::Write, 0)
            }
            "key" => {
                bytes[40] ^= 1;
                (Operation::Read, 0)
            }
            _ => {
                // Of the region, and of its allocation.
                (bytes[54], bytes[95]) = (255, 255);
                (Operation::Read, 8000)
            }
        };
        let end = bytes.len() - 4;
        let sum = Sha256::digest(&bytes[..end]);
        bytes[end..].copy_from_slice(&sum[..4]);
        let descriptor = RegionDescriptor::from_bytes(&bytes).unwrap();
        let (local, remote) = (near.memory.segment(0, 4096), descriptor.segment(offset, 4096));
        let plan = near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap();
        let error = end_of(&plan.transfer()).unwrap_err();
        assert_eq!(kind(&error), "Permission", "{forgery}: {error}");
    }
    assert!(memory.read(0, 8192).iter().all(|byte| *byte == POISON));
    assert!(near.memory.read(0, 8192).iter().all(|byte| *byte == POISON));
}

#[test]
fn a_peer_without_pinned_memory_refuses_and_goes_on() {
    if gpus(1).is_none() {
        return;
    }
    if !Cuda::get().unwrap().is_fake() {
        return eprintln!("SKIPPED: a real driver has pinned memory");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-test-peer"));
    // Enough for the flags of its lane, and for no block.
    command.env("FAKE_CUDA_PINNED_BYTES", "65536");
    let mut far =
        FarGpu::new(PeerProcess::start_command(&mut command).unwrap(), 0, "transports=tcp");
    let near = side("near", tcp_config(), 0);
    let peer = near.connect(&far.metadata);
    for len in [100, 3 << 20] {
        for operation in [Operation::Read, Operation::Write] {
            let (local, remote) = (near.memory.segment(0, len), far.region.segment(0, len as u64));
            let plan = near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap();
            assert_eq!(kind(&end_of(&plan.transfer()).unwrap_err()), "Permission");
        }
    }
    assert!(near.memory.read(0, 3 << 20).iter().all(|byte| *byte == POISON));
    far.process.ask(&format!("gpu-check r 1 0 {LEN} 0"));
    let theirs = far.process.region("h", 4096, "read-write");
    far.process.ask("fill h 4 0 4096 0");
    near.copy(&peer, Operation::Read, (0, 0), &theirs, 4096);
    assert_bytes(&near.memory.read(0, 4096), &pattern(4, 0, 4096), "host memory of that peer");
}

#[test]
fn a_peer_that_stops_amid_its_frames_holds_up_nobody() {
    if gpus(1).is_none() {
        return;
    }
    let mut config = small_config();
    // Nothing else comes to help.
    config.liveness = Duration::from_secs(120);
    config.operation_timeout = Duration::from_secs(60);
    let near = side("near", config, 0);
    // More streams than there are blocks.
    let settings = "transports=tcp streams=24 liveness_ms=120000";
    let mut stopped = peer_process!();
    stopped.engine("stopped", settings);
    stopped.region("h", LEN, "read-write");
    stopped.load(&near.engine.metadata());
    let descriptor = to_hex(&near.region.descriptor().to_bytes());
    stopped.ask(&format!("hammer-writes near h {descriptor}"));
    let second = far(0, "transports=tcp");
    let peer = near.connect(&second.metadata);
    let memory = GpuBuffer::new(0, 16 << 20);
    let region = memory.register(&near.engine, Access::LOCAL).unwrap();
    for round in 0..5 {
        std::thread::sleep(Duration::from_millis(20 + 7 * round));
        stopped.freeze();
        for _ in 0..3 {
            memory.poison();
            let local = memory.segment(0, 16 << 20);
            let remote = second.region.segment(round, 16 << 20);
            let plan = near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap();
            end_of(&plan.transfer()).unwrap();
            let expected = pattern(1, round, 16 << 20);
            assert_bytes(&memory.read(0, 16 << 20), &expected, "beside a stopped peer");
        }
        stopped.thaw();
    }
    near.engine.deregister(&region).unwrap();
}

#[test]
fn deregistering_waits_for_copies_and_no_longer() {
    if gpus(1).is_none() {
        return;
    }
    let (near, far, peer) = pair();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let plan = |operation| {
                let local = near.memory.segment(0, 1 << 20);
                let remote = far.region.descriptor().segment(0, 1 << 20);
                near.engine.prepare(operation, &peer, &[local], &[remote]).unwrap().transfer()
            };
            let all = [plan(Operation::Read), plan(Operation::Write)];
            while !stop.load(Ordering::Relaxed) {
                for transfer in &all {
                    transfer.post().unwrap();
                }
                for transfer in &all {
                    let _ = outcome(transfer);
                }
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        far.engine.deregister(&far.region).unwrap();
        far.memory.poison();
        std::thread::sleep(Duration::from_millis(20));
        assert!(far.memory.read(0, 1 << 20).iter().all(|byte| *byte == POISON), "written later");
        stop.store(true, Ordering::Relaxed);
    });
}
