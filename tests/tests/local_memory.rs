//! Memory of the engine, which peers on the same host map: on either side, on both, beside other memory, and while it is
//! given back.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::Duration;

use corelane::{Access, EngineConfig, Operation, Peer, Region, RegionDescriptor};
use corelane_tests::{
    BOUND, Buffer, DescriptorField, Near, PeerProcess, collect, end_of, eventually,
    forge_descriptor, from_hex, kind, local_config, peer_process, target, to_hex,
};

const LEN: usize = 20 << 20;
const SIZES: [usize; 7] = [1, 4097, 20_481, 512 << 10, (3 << 20) + 7, (16 << 20) + 1, LEN];

/// Memory of the peer's engine.
fn alloc(process: &mut PeerProcess, id: &str, len: usize, access: &str) -> RegionDescriptor {
    let bytes = from_hex(&process.ask(&format!("alloc {id} {len} {access}"))).unwrap();
    RegionDescriptor::from_bytes(&bytes).unwrap()
}

fn by_lanes() -> EngineConfig {
    let mut config = local_config();
    config.inline_bytes = 0;
    config
}

/// Runs one transfer between ranges of two regions.
fn copy(
    near: &Near,
    peer: &Peer,
    operation: Operation,
    local: (&Region, usize),
    remote: (&RegionDescriptor, usize),
    len: usize,
) -> Result<(), corelane::Error> {
    let local = local.0.segment(local.1 as u64, len as u64);
    let remote = remote.0.segment(remote.1 as u64, len as u64);
    end_of(&near.engine.prepare(operation, peer, &[local], &[remote])?.transfer())
}

/// Every size in both directions, between memory of any kind here and there.
fn both_ways(
    near: &Near,
    peer: &Peer,
    (memory, region): (&Buffer, &Region),
    far: &mut PeerProcess,
    (id, remote): (&str, &RegionDescriptor),
) {
    for (round, &len) in SIZES.iter().enumerate() {
        let (here, there) = ((round * 13 + 1).min(LEN - len), (round * 7 + 3).min(LEN - len));
        far.ask(&format!("fill {id} 1 0 {LEN} 0"));
        memory.poison(0, LEN);
        copy(near, peer, Operation::Read, (region, here), (remote, there), len).unwrap();
        memory.assert_pattern(1, here, len, there as u64);
        memory.assert_poison(0, here);
        memory.assert_poison(here + len, LEN - here - len);

        memory.fill(2, here, len, 0);
        far.ask(&format!("poison {id} 0 {LEN}"));
        copy(near, peer, Operation::Write, (region, here), (remote, there), len).unwrap();
        far.ask(&format!("check {id} 2 {there} {len} 0"));
        far.ask(&format!("check-poison {id} 0 {there}"));
        far.ask(&format!("check-poison {id} {} {}", there + len, LEN - there - len));
    }
}

#[test]
fn memory_of_either_engine_and_of_both_is_copied_from_and_to() {
    for config in [local_config(), by_lanes()] {
        let mut far = peer_process!();
        let metadata = far.engine("far", "");
        // Before the connection, and after it.
        let early = alloc(&mut far, "early", LEN, "read-write");
        let near = Near::new(config, LEN);
        let (early_here, early_region) = Buffer::of_engine(&near.engine, LEN, Access::LOCAL);
        let peer = near.connect_locally(&metadata);
        let late = alloc(&mut far, "late", LEN, "read-write");
        let plain = far.region("plain", LEN, "read-write");
        let (late_here, late_region) = Buffer::of_engine(&near.engine, LEN, Access::READ_WRITE);
        let here = [
            (&near.memory, &near.region),
            (&early_here, &early_region),
            (&late_here, &late_region),
        ];
        for (index, &local) in here.iter().enumerate() {
            for remote in [("early", &early), ("late", &late), ("plain", &plain)] {
                // Not all nine in full, but each kind with each.
                if index == 0 || remote.0 != "early" {
                    both_ways(&near, &peer, local, &mut far, remote);
                }
            }
        }
        assert_eq!(near.engine.stats().totals.requests_sent, 0);
    }
}

/// With the owner's own pages gone, a process finds nothing at its addresses by any call: what arrives has come by the mapping.
#[test]
fn memory_of_the_peers_engine_is_reached_without_its_process() {
    for config in [local_config(), by_lanes()] {
        let mut far = peer_process!();
        let metadata = far.engine("far", "");
        let early = alloc(&mut far, "early", LEN, "read-write");
        let near = Near::new(config, LEN);
        let peer = near.connect_locally(&metadata);
        let late = alloc(&mut far, "late", LEN, "read-write");
        let plain = far.region("plain", LEN, "read-write");
        for id in ["early", "late", "plain"] {
            far.ask(&format!("fill {id} 1 0 {LEN} 0"));
        }
        let own = (&near.region, 0);
        far.load(&near.engine.metadata());
        // Too long for the ring, it comes by the socket behind all that is shared there.
        far.ask(&format!("notify near {}", to_hex(&[7; 5000])));
        collect(&near.engine, 1);
        for id in ["early", "late", "plain"] {
            far.ask(&format!("unmap {id}"));
        }
        let error = copy(&near, &peer, Operation::Read, own, (&plain, 0), 64).unwrap_err();
        assert_eq!(kind(&error), "Permission", "{error}");
        for remote in [&early, &late] {
            for &len in &SIZES {
                near.memory.poison(0, LEN);
                copy(&near, &peer, Operation::Read, own, (remote, LEN - len), len).unwrap();
                near.memory.assert_pattern(1, 0, len, (LEN - len) as u64);
            }
            near.memory.fill(2, 0, LEN, 0);
            copy(&near, &peer, Operation::Write, own, (remote, 0), LEN).unwrap();
            near.memory.poison(0, LEN);
            copy(&near, &peer, Operation::Read, own, (remote, 0), LEN).unwrap();
            near.memory.assert_pattern(2, 0, LEN, 0);
        }
    }
}

#[test]
fn one_plan_takes_ranges_of_memory_of_every_kind() {
    const PIECE: usize = 50_001;
    let mut far = peer_process!();
    let metadata = far.engine("far", "");
    let near = Near::new(local_config(), LEN);
    let peer = near.connect_locally(&metadata);
    let regions = [
        alloc(&mut far, "a", LEN, "read-write"),
        far.region("b", LEN, "read-write"),
        alloc(&mut far, "c", LEN, "read-write"),
    ];
    for (seed, id) in ["a", "b", "c"].iter().enumerate() {
        far.ask(&format!("fill {id} {} 0 {LEN} 0", seed + 1));
    }
    let count = 120;
    for (from, to) in [(0, 3), (0, 1), (1, 3)] {
        let kinds = &regions[from..to];
        let local: Vec<_> =
            (0..count).map(|i| near.region.segment((i * PIECE) as u64, PIECE as u64)).collect();
        let place = |i: usize| ((count - 1 - i) * PIECE * 3 / 2) as u64;
        let remote: Vec<_> =
            (0..count).map(|i| kinds[i % kinds.len()].segment(place(i), PIECE as u64)).collect();
        near.memory.poison(0, LEN);
        end_of(&near.transfer_of_lists(&peer, Operation::Read, &local, &remote)).unwrap();
        for i in 0..count {
            let seed = (from + i % kinds.len() + 1) as u64;
            near.memory.assert_pattern(seed, i * PIECE, PIECE, place(i));
        }
        near.memory.assert_poison(count * PIECE, LEN - count * PIECE);
        // Back to where it came from, after a change: the peer sees it.
        near.memory.fill(9, 0, count * PIECE, 0);
        end_of(&near.transfer_of_lists(&peer, Operation::Write, &local, &remote)).unwrap();
        for i in 0..count {
            let id = ["a", "b", "c"][from + i % kinds.len()];
            far.ask(&format!("check {id} 9 {} {PIECE} {}", place(i), i * PIECE));
        }
        for (seed, id) in ["a", "b", "c"].iter().enumerate() {
            far.ask(&format!("fill {id} {} 0 {LEN} 0", seed + 1));
        }
    }
}

#[test]
fn rights_hold_for_memory_of_the_engine_even_against_forged_descriptors() {
    let lengths = [8, 4096, 300_000, 3 << 20];
    for config in [local_config(), by_lanes()] {
        let mut far = peer_process!();
        let metadata = far.engine("far", "");
        let near = Near::new(config, LEN);
        let readable = alloc(&mut far, "readable", LEN, "read");
        let peer = near.connect_locally(&metadata);
        let writable = alloc(&mut far, "writable", LEN, "write");
        let private = alloc(&mut far, "private", LEN, "local");
        far.ask(&format!("fill readable 1 0 {LEN} 0"));
        let all =
            |region: &RegionDescriptor| forge_descriptor(region, DescriptorField::Access, |_| 3);
        for len in lengths {
            for (operation, region) in [
                (Operation::Write, all(&readable)),
                (Operation::Read, all(&writable)),
                (Operation::Read, all(&private)),
                (Operation::Write, all(&private)),
                (
                    Operation::Read,
                    forge_descriptor(&readable, DescriptorField::KeySecret, |k| k ^ 1),
                ),
                (Operation::Read, forge_descriptor(&readable, DescriptorField::KeySlot, |s| s + 1)),
                (Operation::Read, forge_descriptor(&readable, DescriptorField::Base, |b| b - 4096)),
                (
                    Operation::Write,
                    forge_descriptor(&writable, DescriptorField::Base, |b| b + LEN as u64),
                ),
            ] {
                let ended = copy(&near, &peer, operation, (&near.region, 0), (&region, 0), len);
                let error = ended.unwrap_err();
                assert_eq!(kind(&error), "Permission", "{operation:?} of {len}: {error}");
            }
            // Past the end: of the region, and of the pages behind it.
            let longer = forge_descriptor(&writable, DescriptorField::Len, |len| len + (64 << 20));
            for place in [LEN - len + 1, LEN, LEN + (4 << 20)] {
                let write = (&near.region, 0);
                let ended = copy(&near, &peer, Operation::Write, write, (&longer, place), len);
                assert_eq!(kind(&ended.unwrap_err()), "Permission");
            }
            near.memory.assert_poison(0, LEN);
            copy(&near, &peer, Operation::Read, (&near.region, 0), (&readable, 0), len).unwrap();
            near.memory.assert_pattern(1, 0, len, 0);
            near.memory.poison(0, len);
        }
        far.ask(&format!("check readable 1 0 {LEN} 0"));
        for id in ["writable", "private"] {
            far.ask(&format!("check-poison {id} 0 {LEN}"));
        }
    }
}

#[test]
fn what_is_given_back_while_a_peer_copies_is_waited_for_and_then_refused() {
    for command in ["hammer-reads", "hammer-writes"] {
        for len in [1000, 200_000, LEN] {
            let mut config = local_config();
            config.deregister_timeout = Duration::from_millis(300);
            let near = Near::new(config, 4096);
            let mut far = target!("far", len);
            far.process.load(&near.engine.metadata());
            for _ in 0..4 {
                let (mut memory, region) = Buffer::of_engine(&near.engine, len, Access::READ_WRITE);
                let descriptor = to_hex(&region.descriptor().to_bytes());
                let failed = far.process.number("failed");
                let before = far.process.number("completed");
                for _ in 0..2 {
                    far.process.ask(&format!("{command} near r {descriptor}"));
                }
                eventually("the peer copies", || far.process.number("completed") > before + 5);
                let start = std::time::Instant::now();
                while let Err((error, kept)) = memory.free(&near.engine) {
                    assert_eq!(kind(&error), "Busy", "{error}");
                    assert!(start.elapsed() < BOUND, "busy for ever");
                    memory = kept;
                }
                eventually("it is refused", || far.process.number("failed") == failed + 2);
                let error = far.process.try_ask("stop-hammers").unwrap_err();
                assert!(error.contains("Permission"), "{error}");
                let again = far.process.try_ask(&format!("read near r 0 {descriptor} 0 8"));
                assert!(again.unwrap_err().contains("Permission"));
            }
            assert_eq!(near.engine.stats().regions, 1);
        }
    }
}

#[test]
fn what_is_given_back_while_own_transfers_run_is_waited_for_and_then_refused() {
    let mut far = target!("far", LEN);
    for config in [local_config(), by_lanes()] {
        let near = Near::new(config, 4096);
        let peer = near.connect_locally(&far.metadata);
        for len in [1000, 1 << 20, LEN] {
            for _ in 0..5 {
                let (memory, region) = Buffer::of_engine(&near.engine, len, Access::LOCAL);
                let local = [region.segment(0, len as u64)];
                let remote = [far.region.segment(0, len as u64)];
                let plan = near.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
                let transfer = plan.transfer();
                std::thread::scope(|scope| {
                    let posting = scope.spawn(|| {
                        loop {
                            if let Err(error) = end_of(&transfer) {
                                break error;
                            }
                        }
                    });
                    let mut memory = memory;
                    while let Err((error, kept)) = memory.free(&near.engine) {
                        assert_eq!(kind(&error), "Busy", "{error}");
                        memory = kept;
                    }
                    let error = posting.join().unwrap();
                    assert_eq!(kind(&error), "NotRegistered", "{error}");
                });
            }
        }
        near.engine.shutdown().unwrap();
    }
    far.assert_pattern(1, 0, LEN, 0);
}

#[test]
fn memory_that_is_dropped_is_given_back() {
    let mut far = peer_process!();
    let near = Near::new(local_config(), 4096);
    far.engine("far", "");
    far.load(&near.engine.metadata());
    far.region("r", LEN, "local");
    let mappings = corelane_tests::mappings();
    for round in 0..40 {
        let (memory, region) = Buffer::of_engine(&near.engine, LEN, Access::READ_WRITE);
        memory.fill(round, 0, LEN, 0);
        let descriptor = to_hex(&region.descriptor().to_bytes());
        far.ask(&format!("read near r 0 {descriptor} 0 {LEN}"));
        far.ask(&format!("check r {round} 0 {LEN} 0"));
        drop(region);
        drop(memory);
        let again = far.try_ask(&format!("read near r 0 {descriptor} 0 8")).unwrap_err();
        assert!(again.contains("Permission"), "{again}");
    }
    assert_eq!(near.engine.stats().regions, 1);
    // Nothing is kept: neither here, nor in the peer, which holds a mapping of at most what exists.
    eventually("the memory is unmapped here", || corelane_tests::mappings() < mappings + 10);
    let kept = || {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", far.id())).unwrap();
        maps.lines().filter(|line| line.contains("corelane-memory")).count()
    };
    eventually("the memory is unmapped in the peer", || kept() == 0);
}

#[test]
fn memory_of_an_engine_outlives_its_shutdown_only_here() {
    let near = Near::new(local_config(), 4096);
    let mut far = peer_process!();
    let metadata = far.engine("far", "");
    let region = alloc(&mut far, "m", LEN, "read-write");
    let peer = near.connect_locally(&metadata);
    copy(&near, &peer, Operation::Write, (&near.region, 0), (&region, 0), 4096).unwrap();
    far.ask(&format!("fill m 4 0 {LEN} 0"));
    far.ask("shutdown");
    for (operation, len) in [(Operation::Write, 64), (Operation::Read, 4096)] {
        let ended = copy(&near, &peer, operation, (&near.region, 0), (&region, 0), len);
        assert!(ended.unwrap_err().is_disconnect());
    }
    // Its owner still has it.
    far.ask(&format!("check m 4 0 {LEN} 0"));
}

#[test]
fn no_memory_and_more_than_there_are_addresses_are_errors() {
    let near = Near::new(local_config(), 4096);
    let error = near.engine.alloc(0, Access::READ_WRITE).unwrap_err();
    assert_eq!(kind(&error), "InvalidArgument", "{error}");
    // Not what only this machine has too little memory for: a mistake would take it from everybody else.
    for len in [usize::MAX, usize::MAX / 2] {
        let error = near.engine.alloc(len, Access::READ_WRITE).unwrap_err();
        assert!(matches!(kind(&error), "Io" | "InvalidArgument" | "Limit"), "{error}");
    }
    assert_eq!(near.engine.stats().regions, 1);
}
