//! Bytes between engines of one host, by every way that copies go: in one process, into another one range by range and in
//! lists, by the caller and by the lanes.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use corelane::{
    Access, AssistMode, EngineConfig, LaneSpec, LocalEngine, Operation, Peer, RegionDescriptor,
    TransportKind,
};
use corelane_tests::{
    Buffer, DescriptorField, Near, POISON, Random, Target, collect, end_of, eventually,
    forge_descriptor, kind, local_config, outcome, pattern, target, to_hex, transport,
};

/// Around the borders of pages, of what goes through `/proc`, of what the caller copies, of what lanes share and of what
/// goes past the caches.
const LENGTHS: [usize; 16] = [
    1,
    63,
    4095,
    4097,
    (12 << 10) - 1,
    12 << 10,
    (12 << 10) + 1,
    (20 << 10) - 1,
    (20 << 10) + 1,
    (512 << 10) - 1,
    (512 << 10) + 1,
    (1 << 20) - 1,
    (1 << 20) + 1,
    (3 << 20) + 7,
    (16 << 20) + 3,
    40 << 20,
];
const LARGEST: usize = (40 << 20) + 1000;

fn by_lanes() -> EngineConfig {
    let mut config = local_config();
    config.inline_bytes = 0;
    config
}

fn with_two_lanes() -> EngineConfig {
    let mut config = local_config();
    config.lanes = LaneSpec::Unpinned { count: 2 };
    config
}

fn with_strict_writes() -> EngineConfig {
    let mut config = local_config();
    config.strict_writes = true;
    config
}

/// Every length in both directions, at odd places; nothing around them changes.
fn every_length(near: &Near, peer: &Peer, far: &mut Target) {
    for (round, &len) in LENGTHS.iter().enumerate() {
        let (here, there) = (round * 13 + 1, round * 7 + 3);
        let read = near.transfer(peer, Operation::Read, (here, there), &far.region, len);
        end_of(&read).unwrap();
        near.memory.assert_pattern(1, here, len, there as u64);
        near.memory.assert_poison(0, here);
        near.memory.assert_poison(here + len, LARGEST - here - len);

        near.memory.fill(2, here, len, here as u64);
        let whole = format!("r 0 {}", there + len + 4096.min(LARGEST - there - len));
        far.process.ask(&format!("poison {whole}"));
        end_of(&near.transfer(peer, Operation::Write, (here, there), &far.region, len)).unwrap();
        far.assert_pattern(2, there, len, here as u64);
        far.assert_poison(0, there);
        far.assert_poison(there + len, 4096.min(LARGEST - there - len));
        near.memory.poison(here, len);
        far.process.ask(&format!("fill r 1 0 {LARGEST} 0"));
    }
}

fn every_length_with(config: EngineConfig, copied_by_callers: bool) {
    let mut far = target!("far", LARGEST);
    let near = Near::new(config, LARGEST);
    let peer = near.connect_locally(&far.metadata);
    every_length(&near, &peer, &mut far);
    let totals = near.engine.stats().totals;
    assert_eq!(totals.copied_by_callers > 0, copied_by_callers, "{totals:?}");
    assert_eq!(totals.requests_sent, 0, "the peer was asked to serve");
    assert_eq!(far.process.number("served"), 0);
}

#[test]
fn every_length_arrives_whole_between_two_processes() {
    every_length_with(local_config(), true);
}

#[test]
fn every_length_arrives_whole_when_only_lanes_copy() {
    every_length_with(by_lanes(), false);
}

#[test]
fn every_length_arrives_whole_when_two_lanes_share_the_work() {
    every_length_with(with_two_lanes(), true);
}

/// The lane of the peer stands still, and no caller waits: all the bytes come nevertheless.
#[test]
fn another_lane_copies_what_the_lane_of_the_peer_does_not() {
    const BYTES: usize = 40 << 20;
    let mut config = with_two_lanes();
    config.inline_bytes = 0;
    config.assist = AssistMode::Never;
    let far = target!("far", LARGEST);
    let near = Near::new(config, LARGEST);
    let peer = near.connect_locally(&far.metadata);
    let read = Arc::new(near.transfer(&peer, Operation::Read, (0, 0), &far.region, BYTES));
    let (go_on, goes_on) = std::sync::mpsc::channel::<()>();
    let posted = read.clone();
    let task = near.engine.spawn_on(&peer, move |local: LocalEngine| async move {
        posted.post().unwrap();
        // It takes the transfer up, and copies for its share of some turns.
        for _ in 0..3 {
            local.yield_now().await;
        }
        let _ = goes_on.recv();
    });
    let task = task.unwrap();
    eventually("all bytes have come", || near.memory.check(1, 0, BYTES, 0).is_ok());
    go_on.send(()).unwrap();
    task.wait().unwrap();
    outcome(&read).unwrap();
}

#[test]
fn every_length_arrives_whole_with_strict_writes() {
    every_length_with(with_strict_writes(), true);
}

/// Cuts `total` bytes into pieces of 1 to `largest` bytes.
fn pieces(random: &mut Random, total: usize, largest: usize) -> Vec<usize> {
    let mut left = total;
    let mut pieces = Vec::new();
    while left > 0 {
        let len = (random.below(largest) + 1).min(left);
        pieces.push(len);
        left -= len;
    }
    pieces
}

/// Disjoint places for pieces, in another order than the pieces, with gaps and without.
fn places(random: &mut Random, pieces: &[usize], space: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    random.shuffle(&mut order);
    let gap = (space - pieces.iter().sum::<usize>()) / pieces.len();
    let mut places = vec![0; pieces.len()];
    let mut at = 0;
    for index in order {
        at += if random.below(3) == 0 { 0 } else { random.below(gap + 1) };
        places[index] = at;
        at += pieces[index];
    }
    places
}

/// Lists of odd lengths whose neighbours touch on one side and not on the other, so that what is one range here is
/// several there.
fn lists_both_ways(near: &Near, peer: &Peer, far: &mut Target, count: usize, largest: usize) {
    let mut random = Random::new((count * largest) as u64);
    let lens: Vec<usize> = (0..count).map(|_| random.below(largest) | 1).collect();
    let total: usize = lens.iter().sum();
    let space = total * 2;
    assert!(space <= near.memory.len());
    // Here all in a row, there scattered; then the other way round; then scattered on both sides.
    let row: Vec<usize> = lens
        .iter()
        .scan(5, |at, len| {
            *at += len;
            Some(*at - len)
        })
        .collect();
    for (dense_here, dense_there) in [(true, false), (false, true), (false, false)] {
        let mut side = |dense| if dense { row.clone() } else { places(&mut random, &lens, space) };
        let (here, there) = (side(dense_here), side(dense_there));
        let with_lens = |offsets: &[usize]| -> Vec<(usize, usize)> {
            offsets.iter().copied().zip(lens.iter().copied()).collect()
        };
        let (here, there) = (with_lens(&here), with_lens(&there));
        let local: Vec<_> =
            here.iter().map(|&(at, len)| near.region.segment(at as u64, len as u64)).collect();
        let remote: Vec<_> =
            there.iter().map(|&(at, len)| far.region.segment(at as u64, len as u64)).collect();

        near.memory.poison(0, near.memory.len());
        far.process.ask(&format!("fill r 1 0 {space} 0"));
        end_of(&near.transfer_of_lists(peer, Operation::Read, &local, &remote)).unwrap();
        let mut expected = vec![POISON; near.memory.len()];
        for (&(to, len), &(from, _)) in here.iter().zip(&there) {
            expected[to..to + len].copy_from_slice(&pattern(1, from as u64, len));
        }
        near.memory.assert_image(&expected);

        near.memory.fill(3, 0, near.memory.len(), 0);
        far.process.ask(&format!("poison r 0 {space}"));
        end_of(&near.transfer_of_lists(peer, Operation::Write, &local, &remote)).unwrap();
        let mut expected = vec![POISON; space];
        for (&(from, len), &(to, _)) in here.iter().zip(&there) {
            expected[to..to + len].copy_from_slice(&pattern(3, from as u64, len));
        }
        let found = far.process.dump("r", 0, space);
        let wrong = (0..space).find(|&at| found[at] != expected[at]);
        assert!(wrong.is_none(), "byte {wrong:?} of the target is wrong");
    }
}

fn lists_with(config: EngineConfig) {
    let len = 13 << 20;
    let mut far = target!("far", len);
    let near = Near::new(config, len);
    let peer = near.connect_locally(&far.metadata);
    // Below and above what one call takes, the last of each call being the nonce's: 1022 to 1025.
    for (count, largest) in
        [(2, 5000), (37, 500), (1022, 900), (1023, 90), (1024, 90), (1025, 90), (1500, 3001)]
    {
        lists_both_ways(&near, &peer, &mut far, count, largest);
    }
    lists_both_ways(&near, &peer, &mut far, 7, 700_001);
}

#[test]
fn lists_of_odd_ranges_land_where_they_belong() {
    lists_with(local_config());
}

#[test]
fn lists_of_odd_ranges_land_where_they_belong_when_only_lanes_copy() {
    lists_with(by_lanes());
}

#[test]
fn lists_of_odd_ranges_land_where_they_belong_with_strict_writes() {
    lists_with(with_strict_writes());
}

/// All lengths and lists within this process: `from` reads from and writes to memory of `to`, which may be itself.
fn within_this_process(from: &Near, to: &Near, memory: &Buffer, remote: &RegionDescriptor) {
    let peer = from.connect_locally(&to.engine.metadata());
    for (round, &len) in LENGTHS.iter().enumerate() {
        let (here, there) = (round * 13 + 1, round * 7 + 3);
        memory.fill(1, 0, LARGEST, 0);
        end_of(&from.transfer(&peer, Operation::Read, (here, there), remote, len)).unwrap();
        from.memory.assert_pattern(1, here, len, there as u64);
        from.memory.assert_poison(0, here);
        from.memory.assert_poison(here + len, LARGEST - here - len);

        from.memory.fill(2, here, len, 0);
        memory.poison(0, LARGEST);
        end_of(&from.transfer(&peer, Operation::Write, (here, there), remote, len)).unwrap();
        memory.assert_pattern(2, there, len, 0);
        memory.assert_poison(0, there);
        memory.assert_poison(there + len, LARGEST - there - len);
        from.memory.poison(here, len);
    }
    let transfer = from.transfer(&peer, Operation::Write, (0, 0), remote, 64);
    transfer.post_with_notification(b"after the data").unwrap();
    outcome(&transfer).unwrap();
    let [notification] = &collect(&to.engine, 1)[..] else { panic!("one notification") };
    assert_eq!(&*notification.payload, b"after the data");
    assert_eq!(&*notification.from, from.engine.agent_name());
}

#[test]
fn two_engines_of_one_process_copy_directly() {
    for config in [local_config(), by_lanes()] {
        let near = Near::new(config, LARGEST);
        let far = Near::named("far", local_config(), LARGEST, Access::READ_WRITE);
        within_this_process(&near, &far, &far.memory, far.region.descriptor());
        assert_eq!(near.engine.stats().totals.requests_sent, 0);
    }
}

#[test]
fn an_engine_copies_within_itself() {
    let near = Near::new(local_config(), LARGEST);
    let other = Buffer::new(LARGEST);
    let region = other.register(&near.engine, Access::READ_WRITE);
    within_this_process(&near, &near, &other, region.descriptor());
    assert_eq!(near.engine.stats().totals.requests_sent, 0);
}

#[test]
fn both_sides_read_and_write_at_the_same_time() {
    const LEN: usize = 3_000_001;
    let mut far = target!("far", LEN * 2);
    let near = Near::named("near", local_config(), LEN * 2, Access::READ_WRITE);
    near.memory.fill(7, 0, LEN, 0);
    let peer = near.connect_locally(&far.metadata);
    far.process.load(&near.engine.metadata());
    far.process.ask(&format!("fill r 1 0 {LEN} 0"));
    far.process.region("fetched", LEN, "local");
    assert_eq!(far.process.ask("transport near"), "local");
    let descriptor = to_hex(&near.region.descriptor().to_bytes());
    // We read what is there, and the peer at the same time what is here.
    let read = near.transfer(&peer, Operation::Read, (LEN, 0), &far.region, LEN);
    for _ in 0..20 {
        near.memory.poison(LEN, LEN);
        far.process.send(&format!("read near fetched 0 {descriptor} 0 {LEN}"));
        end_of(&read).unwrap();
        far.process.answer().unwrap();
        near.memory.assert_pattern(1, LEN, LEN, 0);
        far.process.ask(&format!("check fetched 7 0 {LEN} 0"));
        far.process.ask(&format!("poison fetched 0 {LEN}"));
    }
}

/// What one thread does in the test below: its own part of both sides, reads and writes of any shape.
fn one_of_many(near: &Near, peer: &Peer, remote: &RegionDescriptor, base: usize, seed: u64) {
    const PART: usize = 1 << 20;
    let mut random = Random::new(seed);
    for round in 0..60 {
        let largest = [300, 20_000, 300_000][random.below(3)];
        let total = random.below(largest * 4) + 1;
        let total = total.min(PART / 2);
        let lens = pieces(&mut random, total, largest);
        let here = places(&mut random, &lens, PART);
        let there = places(&mut random, &lens, PART);
        let segments: Vec<_> = lens.iter().zip(here.iter().zip(&there)).collect();
        let local: Vec<_> = segments
            .iter()
            .map(|&(&len, (&at, _))| near.region.segment((base + at) as u64, len as u64))
            .collect();
        let far: Vec<_> = segments
            .iter()
            .map(|&(&len, (_, &at))| remote.segment((base + at) as u64, len as u64))
            .collect();
        let content = seed * 1000 + round;
        near.memory.fill(content, base, PART, 0);
        let image = near.memory.snapshot(base, PART);
        end_of(&near.transfer_of_lists(peer, Operation::Write, &local, &far)).unwrap();
        near.memory.poison(base, PART);
        end_of(&near.transfer_of_lists(peer, Operation::Read, &local, &far)).unwrap();
        let mut expected = vec![POISON; PART];
        for &(&len, (&at, _)) in &segments {
            expected[at..at + len].copy_from_slice(&image[at..at + len]);
        }
        let found = near.memory.snapshot(base, PART);
        let wrong = (0..PART).find(|&at| found[at] != expected[at]);
        assert!(wrong.is_none(), "seed {seed}, round {round}: byte {wrong:?}");
    }
}

#[test]
fn many_threads_write_and_read_back_every_byte() {
    const THREADS: usize = 6;
    let len = THREADS << 20;
    for (config, settings) in [
        (local_config(), ""),
        (with_two_lanes(), "unpinned=2"),
        (by_lanes(), ""),
        (with_strict_writes(), ""),
    ] {
        let far = target!("far", len, "read-write", settings);
        let near = Near::new(config, len);
        let peer = near.connect_locally(&far.metadata);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (near, peer, far) = (&near, &peer, &far.region);
                scope.spawn(move || {
                    one_of_many(near, peer, far, thread << 20, thread as u64 + 1);
                });
            }
        });
        assert_eq!(near.engine.stats().totals.failed, 0);
    }
}

#[test]
fn more_threads_than_places_for_copies_all_get_through() {
    const LEN: usize = 2 << 20;
    let far = target!("far", LEN);
    let near = Near::new(local_config(), LEN * 80);
    let peer = near.connect_locally(&far.metadata);
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..80 {
            let (near, peer, far, done) = (&near, &peer, &far, &done);
            scope.spawn(move || {
                for len in [100, 100_000, LEN] {
                    let places = (thread * LEN, 0);
                    let transfer = near.transfer(peer, Operation::Read, places, &far.region, len);
                    end_of(&transfer).unwrap();
                    near.memory.assert_pattern(1, thread * LEN, len, 0);
                    near.memory.poison(thread * LEN, len);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(done.into_inner(), 240);
}

#[test]
fn what_a_target_does_not_allow_is_refused_and_touches_nothing_whoever_copies() {
    const LEN: usize = 4 << 20;
    for config in [local_config(), by_lanes(), with_two_lanes(), with_strict_writes()] {
        let mut far = target!("far", LEN, "read", "");
        let near = Arc::new(Near::new(config, LEN));
        let peer = near.connect_locally(&far.metadata);
        // Plans are refused without asking the peer where a descriptor says so itself: these do not.
        let lie = |region| forge_descriptor(&region, DescriptorField::Access, |_| 3);
        let read_only = lie(far.region.clone());
        let write_only = lie(far.process.region("w", LEN, "write"));
        let gone = far.process.region("gone", LEN, "read-write");
        far.process.ask("deregister gone");
        for len in [8, 4096, 100_000, LEN] {
            for (operation, remote) in [
                (Operation::Write, &read_only),
                (Operation::Read, &write_only),
                (Operation::Read, &gone),
                (Operation::Write, &gone),
            ] {
                let error =
                    end_of(&near.transfer(&peer, operation, (0, 0), remote, len)).unwrap_err();
                assert_eq!(kind(&error), "Permission", "{operation:?} of {len}: {error}");
            }
            near.memory.assert_poison(0, LEN);
            end_of(&near.transfer(&peer, Operation::Read, (0, 0), &far.region, len)).unwrap();
            near.memory.assert_pattern(1, 0, len, 0);
            near.memory.poison(0, len);
        }
        far.assert_pattern(1, 0, LEN, 0);
        far.process.ask(&format!("check-poison w 0 {LEN}"));
        far.process.ask(&format!("check-poison gone 0 {LEN}"));
    }
}

#[test]
fn a_side_that_forbids_the_transport_is_reached_by_the_next() {
    const LEN: usize = 2 << 20;
    for (config, settings) in
        [(local_config(), "transports=tcp"), (corelane_tests::tcp_config(), "")]
    {
        let mut far = target!("far", LEN, "read-write", settings);
        let near = Near::new(config, LEN);
        let peer = near.connect(&far.metadata);
        assert_eq!(transport(&near.engine, "far"), TransportKind::Tcp);
        for len in [100, LEN] {
            end_of(&near.transfer(&peer, Operation::Read, (0, 0), &far.region, len)).unwrap();
            near.memory.assert_pattern(1, 0, len, 0);
        }
        assert!(far.process.number("served") > 0);
    }
}
