//! GPU memory between engines. Skipped, and said so, where there is no GPU.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::{Duration, Instant};

use corelane::{
    Access, Engine, EngineConfig, LocalSegment, MemoryKind, Operation, RegionDescriptor, Status,
    Transfer, TransportKind,
};
use corelane_tests::{
    BOUND, Buffer, Cuda, FarGpu, GPU_LEN, GpuBuffer, GpuSide, POISON, PeerProcess, PinnedBuffer,
    Random, assert_bytes, collect, cut_short, end_of, from_hex, gpus, kind, local_config, outcome,
    pattern, peer_process, tcp_config, to_hex,
};

#[path = "gpu/kernels.rs"]
mod kernels;
#[path = "gpu/reach.rs"]
mod reach;
#[path = "gpu/registration.rs"]
mod registration;
#[path = "gpu/staged.rs"]
mod staged;

const LEN: usize = GPU_LEN;

/// Around the borders of vectors, of tiles, and of what the copy engine takes.
const LENGTHS: [usize; 14] = [
    1,
    15,
    16,
    17,
    4095,
    4096,
    4097,
    (64 << 10) - 1,
    (1 << 20) + 3,
    (4 << 20) - 1,
    4 << 20,
    (4 << 20) + 1,
    (16 << 20) + 5,
    20 << 20,
];

fn side(name: &str, config: EngineConfig, gpu: u32) -> GpuSide {
    GpuSide::new(name, config, gpu)
}

fn far(gpu: u32, settings: &str) -> FarGpu {
    FarGpu::new(peer_process!(), gpu, settings)
}

fn every_length_between_processes(near_gpu: u32, far_gpu: u32) {
    let mut far = far(far_gpu, "");
    let near = side("near", local_config(), near_gpu);
    let peer = near.connect(&far.metadata);
    near.exchange_lengths(&peer, &mut far, LENGTHS, &[0, 1, 4, 8]);
    let (small, large): (Vec<_>, Vec<_>) = LENGTHS.into_iter().partition(|len| *len <= 1 << 20);
    near.exchange_lists(&peer, &mut far, small, &[0, 1, 8]);
    let fit = large.into_iter().filter(|len| 2 * len + 2000 <= LEN);
    near.exchange_lists(&peer, &mut far, fit, &[1]);
    assert_eq!(near.engine.stats().totals.requests_sent, 0, "the peer was asked to serve");
}

#[test]
fn every_length_arrives_whole_between_two_processes_on_one_gpu() {
    if gpus(1).is_some() {
        every_length_between_processes(0, 0);
    }
}

#[test]
fn every_length_arrives_whole_between_two_gpus() {
    if gpus(2).is_some() {
        every_length_between_processes(0, 1);
        every_length_between_processes(1, 0);
    }
}

#[test]
fn engines_of_one_process_copy_directly_between_all_gpus() {
    let Some(count) = gpus(1) else { return };
    for other in 0..count.min(2) as u32 {
        let (near, far) = (side("near", local_config(), 0), side("far", local_config(), other));
        far.memory.write(0, &pattern(1, 0, LEN));
        let peer = near.connect(&far.engine.metadata());
        for len in LENGTHS {
            near.copy(&peer, Operation::Read, (100, 7), far.region.descriptor(), len);
            assert_bytes(&near.memory.read(100, len), &pattern(1, 7, len), "read");
        }
        near.memory.write(0, &pattern(2, 0, LEN));
        near.copy(&peer, Operation::Write, (3, 90), far.region.descriptor(), LEN - 90);
        assert_bytes(&far.memory.read(90, LEN - 90), &pattern(2, 3, LEN - 90), "write");
    }
}

/// A list of blocks of any length and place, none of which overlap, and as many on the other side.
fn blocks(random: &mut Random, count: usize) -> Vec<(usize, usize, usize)> {
    let place = LEN / count;
    let mut order: Vec<usize> = (0..count).collect();
    for at in (1..count).rev() {
        order.swap(at, random.next() as usize % (at + 1));
    }
    let len = |random: &mut Random| 1 + random.next() as usize % (place - 20);
    (0..count)
        .map(|at| {
            let (here, there) = (random.next() as usize % 16, random.next() as usize % 16);
            (at * place + here, order[at] * place + there, len(random))
        })
        .collect()
}

#[test]
fn scattered_blocks_of_any_shape_arrive_whole_again_and_again() {
    if gpus(1).is_none() {
        return;
    }
    let gpu = u32::from(gpus(1).unwrap() > 1);
    let far = far(gpu, "");
    let near = side("near", local_config(), 0);
    let peer = near.connect(&far.metadata);
    let mut random = Random::new(7);
    for count in [2, 33, 500, 4096] {
        let list = blocks(&mut random, count);
        let local: Vec<LocalSegment> =
            list.iter().map(|&(here, _, len)| near.memory.segment(here, len)).collect();
        let remote: Vec<_> = list
            .iter()
            .map(|&(_, there, len)| far.region.segment(there as u64, len as u64))
            .collect();
        let plan = near.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
        let transfer = plan.transfer();
        let mut expected = vec![POISON; LEN];
        for &(here, there, len) in &list {
            expected[here..here + len].copy_from_slice(&pattern(1, there as u64, len));
        }
        for _ in 0..3 {
            near.memory.poison();
            end_of(&transfer).unwrap();
            assert_bytes(&near.memory.read(0, LEN), &expected, "blocks");
        }
    }
}

#[test]
fn many_transfers_at_once_all_arrive() {
    if gpus(1).is_none() {
        return;
    }
    let far = far(0, "");
    let near = side("near", local_config(), 0);
    let peer = near.connect(&far.metadata);
    // More than there are places on the GPU, and for copies at the peer.
    let transfers: Vec<_> = (0..200)
        .map(|at| {
            let local = near.memory.segment(at * 65_536, 40_000);
            let remote = far.region.segment(at as u64 * 50_000 + 1, 40_000);
            near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap().transfer()
        })
        .collect();
    for _ in 0..20 {
        near.memory.poison();
        for transfer in &transfers {
            transfer.post().unwrap();
        }
        for (at, transfer) in transfers.iter().enumerate() {
            outcome(transfer).unwrap();
            if at % 20 == 0 {
                let expected = pattern(1, at as u64 * 50_000 + 1, 40_000);
                assert_bytes(&near.memory.read(at * 65_536, 40_000), &expected, "one of many");
            }
        }
    }
}

#[test]
fn pinned_host_memory_and_a_gpu_exchange_both_ways() {
    if gpus(1).is_none() {
        return;
    }
    let far = far(0, "");
    let engine = Engine::new("near", local_config()).unwrap();
    let mut memory = PinnedBuffer::new(LEN);
    // SAFETY: it outlives the engine.
    let region = unsafe { engine.register(memory.base(), LEN, Access::READ_WRITE) }.unwrap();
    let peer = engine.load_peer(&far.metadata).unwrap();
    peer.connect(BOUND).unwrap();
    let mut far = far;
    for len in [1, 4097, (1 << 20) + 3, 20 << 20] {
        let (local, remote) = (region.segment(33, len), far.region.segment(5, len));
        let read = engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap().transfer();
        end_of(&read).unwrap();
        let len = len as usize;
        assert_bytes(&memory.bytes()[33..33 + len], &pattern(1, 5, len), "read");
        memory.bytes()[33..33 + len].copy_from_slice(&pattern(2, 9, len));
        let write =
            engine.prepare(Operation::Write, &peer, &[local], &[remote]).unwrap().transfer();
        end_of(&write).unwrap();
        far.process.ask(&format!("gpu-check r 2 5 {len} 9"));
        far.process.ask(&format!("gpu-fill r 1 0 {LEN} 0"));
    }
    engine.deregister(&region).unwrap();
}

/// Blocks one after the other, as a plan of one range is not: what a kernel copies.
fn spread(count: usize, len: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..count).map(move |at| (at * (len + 40), 64 + at * (len + 24), len))
}

fn notifications_after(blocks: usize, rounds: u64) {
    let gpu = u32::from(gpus(1).unwrap() > 1);
    let (near, far) = (side("near", local_config(), 0), side("far", local_config(), gpu));
    let peer = near.connect(&far.engine.metadata());
    let list: Vec<_> = spread(blocks, 30_000 / blocks).collect();
    let local: Vec<_> = list.iter().map(|&(here, _, len)| near.memory.segment(here, len)).collect();
    let remote: Vec<_> = list
        .iter()
        .map(|&(_, there, len)| far.region.descriptor().segment(there as u64, len as u64))
        .collect();
    let [write, read] = [Operation::Write, Operation::Read]
        .map(|way| near.engine.prepare(way, &peer, &local, &remote).unwrap().transfer());
    let told = |payload: &[u8]| {
        let all = collect(&far.engine, 1);
        assert_eq!((all.len(), all[0].payload.as_slice()), (1, payload));
    };
    const ALL: usize = 32_000;
    for round in 0..rounds {
        near.memory.write(0, &pattern(2 * round, 0, ALL));
        write.post_with_notification(b"written").unwrap();
        told(b"written");
        // Whatever the GPU does from here on sees the data: this copy, for one.
        let found = far.memory.read(0, ALL);
        for &(here, there, len) in &list {
            let expected = pattern(2 * round, here as u64, len);
            assert_bytes(&found[there..][..len], &expected, "at the notification");
        }
        outcome(&write).unwrap();
        far.memory.write(0, &pattern(2 * round + 1, 0, ALL));
        read.post_with_notification(b"read").unwrap();
        told(b"read");
        let found = near.memory.read(0, ALL);
        for &(here, there, len) in &list {
            let expected = pattern(2 * round + 1, there as u64, len);
            assert_bytes(&found[here..][..len], &expected, "when the peer was told");
        }
        outcome(&read).unwrap();
    }
}

#[test]
fn notifications_come_after_the_data() {
    if gpus(1).is_none() {
        return;
    }
    // Less to prove, and each round a hundred times as long, where the GPUs are threads.
    let rounds = if Cuda::get().is_some_and(Cuda::is_fake) { 120 } else { 5_000 };
    for blocks in [1, 3, 40] {
        notifications_after(blocks, rounds);
    }
}

/// `cargo test --release -p corelane-tests --test gpu -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, on a machine with a GPU"]
fn what_reads_between_two_processes_take() {
    let Some(count) = gpus(1) else { return };
    for gpu in 0..count.min(2) as u32 {
        let far = far(gpu, "");
        let near = side("near", local_config(), 0);
        let peer = near.connect(&far.metadata);
        for (blocks, bytes) in
            [(1, 4096), (1, 1 << 20), (1, 16 << 20), (256, 16 << 10), (2048, 4096)]
        {
            let step = if blocks == 1 { bytes } else { 2 * bytes };
            let local: Vec<_> =
                (0..blocks).map(|at| near.memory.segment(at * step, bytes)).collect();
            let remote: Vec<_> = (0..blocks)
                .map(|at| far.region.segment(((blocks - 1 - at) * step) as u64, bytes as u64))
                .collect();
            let began = Instant::now();
            let plan = near.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
            let prepared = began.elapsed();
            let transfer = plan.transfer();
            let (mut posts, mut ends) = (Vec::new(), Vec::new());
            for _ in 0..1000 {
                let began = Instant::now();
                transfer.post().unwrap();
                posts.push(began.elapsed());
                while matches!(transfer.status(), Status::InProgress) {}
                ends.push(began.elapsed());
            }
            posts.sort_unstable();
            ends.sort_unstable();
            let us = |time: Duration| time.as_secs_f64() * 1e6;
            eprintln!(
                "GPU 0 from GPU {gpu}: {blocks:>4} x {bytes:>8} B: prepare {:.0}, post {:.1}, end p50 {:.1} p99 {:.1} us",
                us(prepared),
                us(posts[500]),
                us(ends[500]),
                us(ends[990]),
            );
        }
    }
}

#[test]
fn a_cancelled_transfer_is_quiet_at_its_end() {
    if gpus(1).is_none() {
        return;
    }
    let far = far(0, "");
    let near = side("near", local_config(), 0);
    let peer = near.connect(&far.metadata);
    let (mut cancelled, mut done) = (0, 0);
    let blocks: Vec<_> = spread(300, 50_000).collect();
    for round in 0..100 {
        // One range, which the caller begins, and a list, which is a kernel of the lane.
        let list = if round % 4 < 2 { vec![(0, 8, 16 << 20)] } else { blocks.clone() };
        let local: Vec<_> =
            list.iter().map(|&(here, _, len)| near.memory.segment(here, len)).collect();
        let remote: Vec<_> = list
            .iter()
            .map(|&(_, there, len)| far.region.segment(there as u64, len as u64))
            .collect();
        let transfer =
            near.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap().transfer();
        transfer.post().unwrap();
        if round % 2 == 0 {
            // Before, while and after the lane starts it.
            let until = Instant::now() + Duration::from_micros(round % 25 * 4);
            while Instant::now() < until {
                let _ = transfer.status();
            }
            transfer.cancel();
        }
        if cut_short(&transfer) {
            cancelled += 1;
        } else {
            done += 1;
        }
        // From here on nothing is written.
        near.memory.poison();
        assert!(near.memory.read(0, 1 << 20).iter().all(|byte| *byte == POISON));
        assert!(near.memory.read(14 << 20, 2 << 20).iter().all(|byte| *byte == POISON));
    }
    eprintln!("{cancelled} cancelled, {done} done");
    assert!(done >= 50);
}

#[test]
fn a_killed_peer_ends_its_transfers_and_the_engine_goes_on() {
    if gpus(1).is_none() {
        return;
    }
    let near = side("near", local_config(), 0);
    let first = far(0, "");
    let peer = near.connect(&first.metadata);
    near.copy(&peer, Operation::Read, (0, 0), &first.region, 1 << 20);
    first.process.end();
    let local = near.memory.segment(0, 1 << 20);
    let remote = first.region.segment(0, 1 << 20);
    if let Ok(plan) = near.engine.prepare(Operation::Read, &peer, &[local], &[remote]) {
        // Its memory is kept by the mapping until the peer is known to be gone: done, or an error, and never a hang.
        let _ = end_of(&plan.transfer());
    }
    let second = far(0, "");
    let peer = near.connect(&second.metadata);
    near.copy(&peer, Operation::Read, (0, 9), &second.region, 1 << 20);
    assert_bytes(&near.memory.read(0, 1 << 20), &pattern(1, 9, 1 << 20), "from the second");
}

#[test]
fn registering_the_wrong_kind_of_memory_is_refused() {
    let host = Buffer::new(8192);
    let engine = Engine::new("near", local_config()).unwrap();
    let vram = MemoryKind::Vram { device: 0 };
    // SAFETY: nothing is done with what is registered.
    let as_kind = |base, kind| unsafe { engine.register_kind(base, 4096, kind, Access::LOCAL) };
    let refused = as_kind(host.segment(0, 1).addr, vram).unwrap_err();
    let Some(count) = gpus(1) else {
        assert_eq!(kind(&refused), "Gpu", "{refused}");
        return;
    };
    assert_eq!(kind(&refused), "InvalidArgument", "{refused}");
    let device = GpuBuffer::new(0, 4096);
    let refused = as_kind(device.base(), MemoryKind::Dram).unwrap_err();
    assert_eq!(kind(&refused), "InvalidArgument", "{refused}");
    let nobody = MemoryKind::Vram { device: count as u32 };
    assert_eq!(kind(&as_kind(device.base(), nobody).unwrap_err()), "Gpu");
    if count > 1 {
        let refused = as_kind(device.base(), MemoryKind::Vram { device: 1 }).unwrap_err();
        assert!(refused.to_string().contains("GPU 0"), "{refused}");
    }
    // 2 MiB is what the driver allocates at a time; nothing is behind it for certain.
    // SAFETY: as above.
    let too_long = unsafe { engine.register_kind(device.base(), 1 << 40, vram, Access::LOCAL) };
    assert_eq!(kind(&too_long.unwrap_err()), "InvalidArgument");
    as_kind(device.base(), vram).unwrap();
    host.register(&engine, Access::LOCAL);
}

#[test]
fn freed_memory_is_an_error_and_the_engine_goes_on() {
    if gpus(1).is_none() {
        return;
    }
    let far = far(0, "");
    let near = side("near", local_config(), 0);
    let peer = near.connect(&far.metadata);
    let mut freed = GpuBuffer::new(0, 8 << 20);
    let region = freed.register(&near.engine, Access::LOCAL).unwrap();
    let plan = near
        .engine
        .prepare(Operation::Read, &peer, &[freed.segment(0, 4096)], &[far.region.segment(0, 4096)])
        .unwrap();
    let transfer = plan.transfer();
    end_of(&transfer).unwrap();
    freed.free();
    let error = end_of(&transfer).unwrap_err();
    assert_eq!(kind(&error), "Fault", "{error}");
    near.engine.deregister(&region).unwrap();
    near.copy(&peer, Operation::Read, (0, 0), &far.region, 4096);
    assert_bytes(&near.memory.read(0, 4096), &pattern(1, 0, 4096), "afterwards");
}

/// Posts it once, takes memory away by `free`, and posts it again: the engine is told why, and goes on.
fn fails_once_freed(near: &GpuSide, transfer: &Transfer, free: impl FnOnce()) {
    end_of(transfer).unwrap();
    free();
    let error = end_of(transfer).unwrap_err();
    assert_eq!(kind(&error), "Gpu", "{error}");
    assert!(error.to_string().contains("freed"), "{error}");
    let other = side("other", local_config(), 0);
    let peer = near.connect(&other.engine.metadata());
    near.copy(&peer, Operation::Read, (0, 0), other.region.descriptor(), 4096);
    assert_bytes(&near.memory.read(0, 4096), &[POISON; 4096], "afterwards");
}

#[test]
fn pinned_memory_that_was_freed_is_an_error_and_the_engine_goes_on() {
    if gpus(1).is_none() {
        return;
    }
    let (near, far) = (side("near", local_config(), 0), side("far", local_config(), 0));
    let peer = near.connect(&far.engine.metadata());
    let mut memory = PinnedBuffer::new(1 << 20);
    // SAFETY: nothing is done with it once it is freed: that is what is tested.
    let region = unsafe { near.engine.register(memory.base(), 1 << 20, Access::LOCAL) }.unwrap();
    let (local, remote) = (region.segment(0, 9000), far.region.descriptor().segment(0, 9000));
    let plan = near.engine.prepare(Operation::Write, &peer, &[local], &[remote]).unwrap();
    fails_once_freed(&near, &plan.transfer(), || memory.free());
    near.engine.deregister(&region).unwrap();
}

#[test]
fn memory_that_a_peer_of_this_process_has_freed_is_an_error_and_the_engine_goes_on() {
    if gpus(1).is_none() {
        return;
    }
    let (near, mut far) = (side("near", local_config(), 0), side("far", local_config(), 0));
    let peer = near.connect(&far.engine.metadata());
    let (local, remote) = (near.memory.segment(0, 9000), far.region.descriptor().segment(0, 9000));
    let plan = near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap();
    fails_once_freed(&near, &plan.transfer(), || far.memory.free());
    far.engine.deregister(&far.region).unwrap();
}

#[test]
fn hundreds_of_ranges_for_the_copy_engine_arrive_whole_or_are_cut_short() {
    if gpus(1).is_none() {
        return;
    }
    let far = far(0, "");
    let mut config = local_config();
    config.gpu.copy_engine_bytes = 64 << 10;
    let near = side("near", config, 0);
    let peer = near.connect(&far.metadata);
    let (count, len) = (300, 70_000);
    let local: Vec<_> = (0..count).map(|at| near.memory.segment(at * 80_000, len)).collect();
    let there = |at: usize| (count - 1 - at) * 75_000;
    let remote: Vec<_> =
        (0..count).map(|at| far.region.segment(there(at) as u64, len as u64)).collect();
    let plan = near.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
    let transfer = plan.transfer();
    let mut cut = 0;
    for round in 0..20u64 {
        near.memory.poison();
        transfer.post().unwrap();
        if round % 2 == 1 {
            std::thread::sleep(Duration::from_micros(round * 20));
            transfer.cancel();
            cut += u32::from(cut_short(&transfer));
            // From here on nothing is written.
            near.memory.poison();
            assert!(near.memory.read(0, LEN).iter().all(|byte| *byte == POISON), "written later");
            continue;
        }
        outcome(&transfer).unwrap();
        let found = near.memory.read(0, LEN);
        for at in 0..count {
            let (range, gap) = found[at * 80_000..][..80_000].split_at(len);
            assert_bytes(range, &pattern(1, there(at) as u64, len), "a range");
            assert!(gap.iter().all(|byte| *byte == POISON), "bytes behind a range were written");
        }
    }
    eprintln!("{cut} of 10 were cut short");
}

#[test]
fn a_deregistered_region_of_a_peer_is_refused() {
    if gpus(1).is_none() {
        return;
    }
    let (near, far) = (side("near", local_config(), 0), side("far", local_config(), 0));
    let peer = near.connect(&far.engine.metadata());
    let local = near.memory.segment(0, 4096);
    let remote = far.region.descriptor().segment(0, 4096);
    let transfer =
        near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap().transfer();
    end_of(&transfer).unwrap();
    far.engine.deregister(&far.region).unwrap();
    assert_eq!(kind(&end_of(&transfer).unwrap_err()), "Permission");
    assert!(matches!(transfer.status(), Status::Failed(_)));
}

#[test]
fn where_no_transport_carries_gpu_memory_its_plans_are_refused() {
    if gpus(1).is_none() {
        return;
    }
    let mut config = local_config();
    config.transports = vec![TransportKind::Local];
    let (near, far) = (side("near", config.clone(), 0), side("far", config, 0));
    let peer = near.engine.load_peer(&far.engine.metadata()).unwrap();
    // No GPU addresses memory that is not pinned.
    let host = Buffer::new(4096);
    host.register(&near.engine, Access::LOCAL);
    let local = host.segment(0, 4096);
    let remote = far.region.descriptor().segment(0, 4096);
    let refused = near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap_err();
    assert_eq!(kind(&refused), "NoTransport", "{refused}");
}

#[test]
fn a_plan_of_host_and_gpu_memory_is_refused() {
    if gpus(1).is_none() {
        return;
    }
    let (near, far) = (side("near", local_config(), 0), side("far", local_config(), 0));
    let peer = near.connect(&far.engine.metadata());
    let host = Buffer::new(4096);
    host.register(&near.engine, Access::LOCAL);
    let remote = far.region.descriptor().segment(0, 4096);
    for local in [
        [near.memory.segment(0, 4096), host.segment(0, 4096)],
        [host.segment(0, 4096), near.memory.segment(0, 4096)],
    ] {
        let refused = near.engine.prepare(Operation::Read, &peer, &local, &[remote, remote]);
        assert_eq!(kind(&refused.unwrap_err()), "InvalidArgument");
    }
}
