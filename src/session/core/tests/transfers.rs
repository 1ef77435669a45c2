//! Transfers: bytes, fairness, refusals, cancelling, timeouts.

use std::time::Duration;

use super::world::{CHUNK, SMALL, World, ms};
use crate::error::Error;
use crate::plan::Operation::{self, Read, Write};
use crate::sync::{SlotState, Ticket};
use crate::wire::Access;
use crate::wire::hello::LinkKind;

const BIG: usize = 60 * CHUNK + 77;

/// A world with one buffer on each side, connected.
fn world(seed: u64) -> World {
    let mut world = World::new(seed, false);
    for node in 0..2 {
        world.register(node, 4 * BIG, Access::READ_WRITE);
    }
    world.connect();
    world
}

#[test]
fn small_reads_and_writes_move_exactly_the_bytes_asked_for() {
    let mut w = world(1);
    for (len, offset) in [(1, 3), (64, 0), (255, 17), (256, 1000)] {
        let there = w.fill(1, 0, offset, len);
        let before = w.read(0, 0, 0, BIG);
        let t = w.move_bytes(0, Read, (0, 40), (0, offset), len, None);
        w.run_to_end(t);
        assert!(w.is_done(t));
        let after = w.read(0, 0, 0, BIG);
        assert_eq!(after[40..40 + len], there);
        assert_eq!((&after[..40], &after[40 + len..]), (&before[..40], &before[40 + len..]));

        let here = w.fill(0, 0, offset, len);
        let before = w.read(1, 0, 0, BIG);
        let t = w.move_bytes(0, Write, (0, offset), (0, 5000), len, None);
        w.run_to_end(t);
        let after = w.read(1, 0, 0, BIG);
        assert_eq!(after[5000..5000 + len], here);
        assert_eq!(
            (&after[..5000], &after[5000 + len..]),
            (&before[..5000], &before[5000 + len..])
        );
    }
    assert_eq!(w.open_wires(LinkKind::Bulk).len(), 0, "small ones need no stream of their own");
    w.assert_clean();
}

#[test]
fn bulk_transfers_use_several_streams_and_scattered_descriptors() {
    for seed in 0..20 {
        let mut w = world(seed);
        for operation in [Read, Write] {
            let (from, to) = if operation == Read { (1, 0) } else { (0, 1) };
            let source = w.fill(from, 0, 0, 2 * BIG);
            // Blocks of 100 bytes every 150 on one side, every 120 on the other, in reverse order.
            let count = 400;
            let (local, remote) = if operation == Read { (120, 150) } else { (150, 120) };
            let pairs: Vec<_> =
                (0..count).rev().map(|i| ((0, i * local), (0, i * remote), 100)).collect();
            let plan = w.plan(0, operation, &pairs);
            assert!(plan.pieces.len() > 20);
            let t = w.post(0, plan, None);
            w.run_to_end(t);
            assert!(w.is_done(t), "{:?}", w.error(t));
            let target = w.read(to, 0, 0, 2 * BIG);
            for i in 0..count {
                assert_eq!(target[i * 120..][..100], source[i * 150..][..100], "block {i}");
            }
        }
        assert_eq!(w.open_wires(LinkKind::Bulk).len(), 2);
        w.assert_clean();
        w.run(Duration::from_secs(12));
        assert_eq!(w.open_wires(LinkKind::Bulk).len(), 0, "idle streams are closed");
        let t = w.move_bytes(0, Read, (0, 0), (0, 0), BIG, None);
        w.run_to_end(t);
        assert!(w.is_done(t), "and opened again");
        w.assert_clean();
    }
}

#[test]
fn a_small_transfer_passes_while_bulk_goes_on() {
    for operation in [Read, Write] {
        let mut w = world(2);
        let bulk = w.move_bytes(0, operation, (0, 0), (0, 0), 4 * BIG, None);
        w.run(ms(1));
        let mut passed = 0;
        while w.state(bulk) == SlotState::Posted {
            let small = w.move_bytes(0, Read, (0, 2 * BIG), (0, 2 * BIG), 64, None);
            w.run_to_end(small);
            assert!(w.is_done(small));
            passed += 1;
        }
        assert!(passed >= 3, "{passed} passed");
        w.assert_clean();
    }
}

#[test]
fn bulk_transfers_of_one_peer_take_turns() {
    let mut w = world(3);
    let long = w.move_bytes(0, Read, (0, 0), (0, 0), BIG, None);
    w.run(ms(1));
    let short = w.move_bytes(0, Read, (0, BIG), (0, BIG), 6 * CHUNK, None);
    w.run_to_end(short);
    assert_eq!(w.state(long), SlotState::Posted, "the shorter one did not wait for the longer");
    w.run_to_end(long);
    w.assert_clean();
}

#[test]
fn bulk_goes_over_the_session_link_where_streams_cannot_be_had() {
    let mut w = world(4);
    w.refusing[1] = true;
    let expected = w.fill(1, 0, 0, BIG);
    let t = w.move_bytes(0, Read, (0, 0), (0, 0), BIG, None);
    w.run_to_end(t);
    assert!(w.is_done(t));
    assert_eq!(w.read(0, 0, 0, BIG), expected);
    assert_eq!(w.open_wires(LinkKind::Bulk).len(), 0);
    w.assert_clean();
}

#[test]
fn an_empty_transfer_is_done_at_once_and_still_notifies() {
    let mut w = world(5);
    let t = w.move_bytes(0, Write, (0, 0), (0, 0), 0, Some(b"empty"));
    assert!(w.is_done(t));
    w.run(ms(20));
    assert_eq!(w.take(1), [b"empty"]);
    w.assert_clean();
}

#[test]
fn refused_accesses_fail_typed_and_leave_memory_untouched() {
    for len in [64, 20 * CHUNK] {
        let mut w = world(6);
        let readable = w.register(1, BIG, Access::REMOTE_READ);
        let untouched = w.fill(1, readable, 0, BIG);
        // A plan made while the peer allowed more: what the peer checks is what counts.
        let plan = w.plan(0, Write, &[((0, 0), (0, 0), len)]);
        let forged = |w: &World, key: u128, addr: u64| {
            let mut plan = std::sync::Arc::into_inner(w.plan(0, Write, &[((0, 0), (0, 0), len)]));
            for piece in &mut plan.as_mut().unwrap().pieces {
                (piece.header.key, piece.header.addr) = (key, addr);
            }
            std::sync::Arc::new(plan.unwrap())
        };
        let region = w.nodes[1].buffers[readable].region.descriptor.clone();
        let cases = [
            (region.key.0, region.base, "permission"),
            (region.key.0 ^ 1 << 100, region.base, "key"),
            (region.key.0 ^ 7, region.base, "slot"),
            (plan.pieces[0].header.key, region.base, "range"),
            (plan.pieces[0].header.key, u64::MAX - 10, "wrapping range"),
        ];
        let before = w.read(1, 0, 0, 4 * BIG);
        for (key, addr, what) in cases {
            let plan = forged(&w, key, addr);
            let t = w.post(0, plan, Some(b"must not be seen"));
            w.run_to_end(t);
            assert!(matches!(w.error(t), Error::Permission { .. }), "{what}: {:?}", w.error(t));
        }
        w.run(ms(100));
        assert_eq!(w.take(1), Vec::<Vec<u8>>::new());
        assert_eq!(w.read(1, readable, 0, BIG), untouched);
        assert_eq!(w.read(1, 0, 0, 4 * BIG), before);
        assert_eq!(w.nodes[1].written, 0);
        w.assert_clean();
    }
}

#[test]
fn memory_that_faults_ends_the_transfer_typed() {
    let mut w = world(7);
    w.faults = vec![0x1000];
    let read = w.move_bytes(0, Read, (0, 0), (0, 0), 64, None);
    w.run_to_end(read);
    assert!(matches!(w.error(read), Error::Fault { addr: 0x1000 }));
    w.faults = vec![0x1000];
    let write = w.move_bytes(0, Write, (0, 0), (0, 0), 64, Some(b"n"));
    w.run_to_end(write);
    assert!(matches!(w.error(write), Error::Permission { .. }));
    w.run(ms(50));
    assert_eq!(w.take(1), Vec::<Vec<u8>>::new());
    w.assert_clean();
}

#[test]
fn deregistration_waits_for_transfers_and_for_requests_of_the_peer() {
    for operation in [Read, Write] {
        for node in 0..2 {
            let mut w = world(8);
            let t = w.move_bytes(0, operation, (0, 0), (0, 0), 4 * BIG, None);
            w.run(ms(1));
            let ticket = Ticket::new();
            let region = w.nodes[node].buffers[0].region.clone();
            w.nodes[node].regions.close(&region, ticket.clone());
            w.run_until("the region is free", |_| ticket.is_complete());
            let written = w.nodes[1].written;
            w.run_to_end(t);
            // Our own region is free when the transfer has ended; the peer's, when its last
            // admitted request has: the others are refused.
            assert_eq!(w.is_done(t), node == 0);
            w.run(ms(50));
            assert_eq!(w.nodes[1].written, written, "written after deregistration");
            assert!(node == 0 || matches!(w.error(t), Error::Permission { .. }));
            w.nodes[node].regions.add(region);
            w.assert_clean();
        }
    }
}

/// Lets a cancel come after each number of microseconds.
fn cancel_everywhere(operation: Operation, len: usize) {
    let (mut cancelled, mut done) = (0, 0);
    for step in 0..120 {
        let mut w = world(step);
        w.net.chunk = 700;
        let poison = w.fill(0, 0, 0, 2 * BIG);
        let source = w.fill(1, 0, 0, 2 * BIG);
        let connected = step % 3 != 0;
        if !connected {
            let wire = w.open_wires(LinkKind::Session)[0];
            w.cut(wire);
            w.run(ms(5));
        }
        let t = w.move_bytes(0, operation, (0, 0), (0, 0), len, Some(b"bound"));
        w.run(Duration::from_micros(step * if len > CHUNK { 16 } else { 8 }));
        w.cancel(t);
        w.cancel(t);
        w.run_to_end(t);
        let at_end = [0, 1].map(|node| w.read(node, 0, 0, 2 * BIG));
        w.run(ms(300));
        for (node, at_end) in at_end.into_iter().enumerate() {
            let now = w.read(node, 0, 0, 2 * BIG);
            assert!(now == at_end, "seed {step}: {node} was written after the end");
        }
        let seen = w.take(1);
        if w.is_done(t) {
            done += 1;
            assert_eq!(seen, [b"bound"], "seed {step}");
        } else {
            cancelled += 1;
            assert!(matches!(w.error(t), Error::Cancelled));
            assert!(seen.len() <= 1);
            if operation == Read {
                assert!(seen.is_empty(), "of a read: only after its end");
            }
        }
        if !seen.is_empty() {
            let (from, to) = if operation == Read { (&source, 0) } else { (&poison, 1) };
            assert_eq!(w.read(to, 0, 0, len), from[..len], "seed {step}: seen before its data");
        }
        w.assert_clean();
    }
    assert!(cancelled > 20 && done > 5, "{cancelled} cancelled, {done} done");
}

#[test]
fn a_small_read_can_be_cancelled_at_every_step() {
    cancel_everywhere(Read, 200);
}

#[test]
fn a_small_write_can_be_cancelled_at_every_step() {
    cancel_everywhere(Write, 200);
}

#[test]
fn a_bulk_read_can_be_cancelled_at_every_step() {
    cancel_everywhere(Read, 12 * CHUNK);
}

#[test]
fn a_bulk_write_can_be_cancelled_at_every_step() {
    cancel_everywhere(Write, 12 * CHUNK);
}

#[test]
fn a_transfer_that_takes_too_long_fails_and_frees_its_memory() {
    for operation in [Read, Write] {
        for len in [64, 40 * CHUNK] {
            let mut w = world(9);
            w.nodes[0].core.config.operation_timeout = ms(700);
            // The peer's lane does not run, but its liveness timeout is far away.
            w.nodes[1].stopped = Some(w.now + ms(1500));
            let start = w.now;
            let t = w.move_bytes(0, operation, (0, 0), (0, 0), len, Some(b"late"));
            w.run_to_end(t);
            assert!(matches!(w.error(t), Error::Timeout { .. }), "{:?}", w.error(t));
            assert!(w.now - start <= ms(710), "{:?}", w.now - start);
            let at_end = w.read(0, 0, 0, 4 * BIG);
            w.run(ms(3000));
            assert_eq!(w.read(0, 0, 0, 4 * BIG), at_end);
            w.take(1);
            let again = w.move_bytes(0, operation, (0, 0), (0, 0), len, None);
            w.run_to_end(again);
            assert!(w.is_done(again), "the peer is usable: {:?}", w.error(again));
            w.assert_clean();
        }
    }
}

#[test]
fn a_lost_stream_fails_its_writes_begins_its_reads_again_and_the_others_go_on() {
    let mut lost = 0;
    for seed in 0..40 {
        let mut w = world(seed);
        let expected = w.fill(1, 0, 0, 4 * BIG);
        let warm = w.move_bytes(0, Read, (0, 0), (0, 0), 10 * CHUNK, None);
        w.run_to_end(warm);
        let transfers: Vec<usize> = (0..3)
            .map(|i| {
                let operation = if i == 2 { Write } else { Read };
                w.move_bytes(0, operation, (0, i * BIG), (0, i * BIG), BIG, None)
            })
            .collect();
        w.run(Duration::from_micros(300 + seed * 40));
        for wire in w.open_wires(LinkKind::Bulk) {
            w.cut(wire);
        }
        let later = w.move_bytes(0, Read, (0, 3 * BIG), (0, 3 * BIG), BIG, None);
        for t in transfers.iter().copied().chain([later]) {
            w.run_to_end(t);
        }
        for t in [transfers[0], transfers[1], later] {
            assert!(w.is_done(t), "seed {seed}: {:?}", w.error(t));
        }
        if !w.is_done(transfers[2]) {
            lost += 1;
            assert!(matches!(w.error(transfers[2]), Error::RemoteDisconnect { .. }));
        }
        assert_eq!(w.read(0, 0, 0, 2 * BIG), expected[..2 * BIG]);
        assert_eq!(w.read(0, 0, 3 * BIG, BIG), expected[3 * BIG..]);
        w.assert_clean();
    }
    assert!(lost > 5, "{lost} writes were on their way");
}

#[test]
fn reads_go_on_over_the_next_link_of_their_session() {
    for seed in 0..60 {
        let mut w = world(seed);
        let expected = w.fill(1, 0, 0, 4 * BIG);
        let small = w.move_bytes(0, Read, (0, 0), (0, 0), SMALL, Some(b"small"));
        let large = w.move_bytes(0, Read, (0, BIG), (0, BIG), BIG, Some(b"large"));
        w.run(Duration::from_micros(seed * 60));
        for kind in [LinkKind::Session, LinkKind::Bulk] {
            for wire in w.open_wires(kind) {
                w.cut(wire);
            }
        }
        for t in [small, large] {
            w.run_to_end(t);
            assert!(w.is_done(t), "seed {seed}: {:?}", w.error(t));
        }
        assert_eq!(w.read(0, 0, 0, SMALL), expected[..SMALL]);
        assert_eq!(w.read(0, 0, BIG, BIG), expected[BIG..2 * BIG]);
        w.run(ms(300));
        let mut seen = w.take(1);
        seen.sort();
        assert_eq!(seen, [b"large".to_vec(), b"small".to_vec()], "seed {seed}");
        w.assert_clean();
    }
}

#[test]
fn a_read_that_loses_link_after_link_is_given_up() {
    let mut w = world(3);
    w.fill(1, 0, 0, 4 * BIG);
    let read = w.move_bytes(0, Read, (0, 0), (0, 0), 3 * BIG, None);
    let mut cuts = 0;
    while w.state(read) == SlotState::Posted {
        w.run(Duration::from_micros(200));
        if w.is_up(0) && w.open_wires(LinkKind::Session).len() == 1 && w.is_asked_for(read) {
            cuts += 1;
            for kind in [LinkKind::Session, LinkKind::Bulk] {
                for wire in w.open_wires(kind) {
                    w.cut(wire);
                }
            }
        }
        assert!(cuts < 10, "it does not end");
    }
    assert!(matches!(w.error(read), Error::RemoteDisconnect { .. }), "{:?}", w.error(read));
    assert_eq!(cuts, 4);
    w.assert_clean();
}

#[test]
fn a_peer_that_falls_silent_ends_what_waits_for_its_links_too() {
    for seed in 0..20 {
        let mut w = world(seed);
        w.fill(1, 0, 0, 4 * BIG);
        let liveness = w.liveness;
        let warm = w.move_bytes(0, Read, (0, 0), (0, 0), SMALL, None);
        w.run_to_end(warm);
        w.partition();
        let start = w.now;
        // More than the links take at a time.
        let mut transfers: Vec<usize> = (0..300)
            .map(|i| w.move_bytes(0, Read, (0, i * SMALL), (0, i * SMALL), SMALL, None))
            .collect();
        transfers.extend((0..40).map(|_| w.move_bytes(0, Write, (0, 0), (0, 0), BIG, None)));
        for t in transfers {
            w.run_to_end(t);
            assert!(matches!(w.error(t), Error::RemoteDisconnect { .. }), "{:?}", w.error(t));
        }
        assert!(w.now - start <= liveness + liveness / 5, "{:?}", w.now - start);
        w.heal();
        w.assert_clean();
    }
}

#[test]
fn a_stream_that_answers_nothing_is_given_up_though_its_transfers_were_cancelled() {
    let mut w = world(21);
    w.config.streams = 1;
    let t = w.move_bytes(0, Read, (0, 0), (0, 0), BIG, None);
    w.run_to_end(t);
    assert!(w.is_done(t));
    let streams = w.open_wires(LinkKind::Bulk);
    for stream in &streams {
        w.wires[*stream].silent = true;
    }
    let t = w.move_bytes(0, Read, (0, 0), (0, 0), BIG, None);
    w.run(ms(20));
    w.cancel(t);
    assert!(matches!(w.error(t), Error::Cancelled));
    // Nothing that is alive waits for it any more.
    w.run(Duration::from_secs(31));
    let t = w.move_bytes(0, Read, (0, 0), (0, 0), BIG, None);
    w.run(Duration::from_secs(2));
    assert!(w.is_done(t), "{:?}", w.state(t));
    w.assert_quiet();
}
