//! Notifications: order, exactly once, behind their data, back-pressure.

use std::time::Duration;

use super::world::{CHUNK, World, ms};
use crate::notification::NotificationQueue;
use crate::plan::Operation::{Read, Write};
use crate::session::RingState;
use crate::session::outbox::{MAX_IN_BAND, WINDOW_BYTES};
use crate::transport::local::Message;
use crate::wire::Access;
use crate::wire::hello::LinkKind;

const LEN: usize = 12 * CHUNK;

fn world(seed: u64) -> World {
    let mut world = World::new(seed, false);
    for node in 0..2 {
        world.register(node, 8 * LEN, Access::READ_WRITE);
    }
    world.connect();
    world
}

fn numbered(range: std::ops::Range<u32>) -> Vec<Vec<u8>> {
    range.map(|n| n.to_le_bytes().to_vec()).collect()
}

/// What a node has been told, with time passing until there are `count`.
fn collect(w: &mut World, node: usize, count: usize) -> Vec<Vec<u8>> {
    let mut all = w.take(node);
    for _ in 0..2000 {
        if all.len() >= count {
            break;
        }
        w.run(ms(5));
        all.extend(w.take(node));
    }
    all
}

#[test]
fn free_standing_ones_arrive_in_order_in_both_directions() {
    let mut w = world(1);
    for n in numbered(0..300) {
        w.notify(0, &n);
        w.notify(1, &n);
        if n[0] % 50 == 0 {
            w.run(ms(1));
        }
    }
    assert_eq!(collect(&mut w, 1, 300), numbered(0..300));
    assert_eq!(collect(&mut w, 0, 300), numbered(0..300));
    w.assert_clean();
}

#[test]
fn large_ones_are_cut_and_small_transfers_pass_between() {
    let mut w = world(2);
    (w.net.capacity, w.net.chunk) = (256 << 10, 64 << 10);
    let large: Vec<u8> = (0..3 * WINDOW_BYTES + 5).map(|i| (i * 7 / 3) as u8).collect();
    w.notify(0, &large);
    w.notify(0, b"behind");
    let t = w.move_bytes(0, Read, (0, 0), (0, 0), 64, None);
    w.run_to_end(t);
    assert!(w.take(1).is_empty(), "the transfer passed");
    assert_eq!(collect(&mut w, 1, 2), [large, b"behind".to_vec()]);
    w.assert_clean();
}

#[test]
fn a_bound_one_is_never_seen_before_its_data_whatever_link_is_late() {
    for seed in 0..60 {
        let mut w = world(seed);
        // Links differ by up to 5 ms: the notification often overtakes the data, or comes late.
        w.net.delay_us = 20..5000;
        let mut transfers = Vec::new();
        for i in 0..6 {
            let (operation, len) = match (seed + i) % 3 {
                0 => (Write, 200),
                1 => (Write, LEN),
                _ => (Read, LEN),
            };
            let from = usize::from(operation == Read);
            let at = i as usize * LEN;
            let bytes = w.fill(from, 0, at, len);
            // One is too large to be sent before the transfer has ended.
            let mut text = vec![i as u8; if i == 4 { MAX_IN_BAND + 1 } else { 40 }];
            text[0] = i as u8;
            let t = w.move_bytes(0, operation, (0, at), (0, at), len, Some(&text));
            transfers.push((t, 1 - from, at, bytes));
        }
        let mut seen = [0; 6];
        for _ in 0..3000 {
            w.run(Duration::from_micros(200));
            for text in w.take(1) {
                let (_, to, at, bytes) = &transfers[usize::from(text[0])];
                seen[usize::from(text[0])] += 1;
                assert_eq!(&w.read(*to, 0, *at, bytes.len()), bytes, "seed {seed}");
            }
        }
        assert_eq!(seen, [1; 6], "seed {seed}");
        assert!(transfers.iter().all(|(t, ..)| w.is_done(*t)));
        w.assert_clean();
    }
}

#[test]
fn they_arrive_exactly_once_and_in_order_across_lost_links() {
    for seed in 0..40 {
        let mut w = world(seed);
        w.net.delay_us = 20..2000;
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for n in numbered(0..200) {
            w.notify(0, &n);
            if n[0] < 100 {
                w.notify(1, &n);
            }
            if w.rng.chance(30) {
                w.run(ms(1));
            }
            if w.rng.chance(4)
                && let Some(wire) = w.open_wires(LinkKind::Session).first()
            {
                w.cut(*wire);
            }
            here.extend(w.take(0));
            there.extend(w.take(1));
        }
        there.extend(collect(&mut w, 1, 200 - there.len()));
        here.extend(collect(&mut w, 0, 100 - here.len()));
        assert_eq!(there, numbered(0..200), "seed {seed}");
        assert_eq!(here, numbered(0..100), "seed {seed}");
        w.run(ms(300));
        assert_eq!(w.take(1), Vec::<Vec<u8>>::new());
        w.assert_clean();
    }
}

#[test]
fn acknowledged_ones_are_not_sent_again() {
    let mut w = world(3);
    for n in numbered(0..50) {
        w.notify(0, &n);
    }
    assert_eq!(collect(&mut w, 1, 50).len(), 50);
    w.run(ms(20));
    let sent = w.nodes[0].counters.notifications_sent.get();
    assert_eq!((sent, w.nodes[0].peer.unacknowledged()), (50, (0, 0)));
    let wire = w.open_wires(LinkKind::Session)[0];
    w.cut(wire);
    w.run(ms(20));
    w.notify(0, b"next");
    assert_eq!(collect(&mut w, 1, 1), [b"next"]);
    assert_eq!(w.nodes[0].counters.notifications_sent.get(), 51);
    w.assert_clean();
}

#[test]
fn a_failed_write_voids_its_notification_and_others_follow() {
    for seed in 0..30 {
        let mut w = world(seed);
        let readable = w.register(1, LEN, Access::REMOTE_READ);
        let key = w.nodes[1].buffers[readable].region.descriptor.key.0;
        let good = w.plan(0, Write, &[((0, 0), (0, 0), LEN)]);
        let mut bad = std::sync::Arc::into_inner(good).unwrap();
        // The middle piece is refused.
        let middle = bad.pieces.len() / 2;
        bad.pieces[middle].header.key = key;
        w.notify(0, b"first");
        let t = w.post(0, std::sync::Arc::new(bad), Some(b"void"));
        w.notify(0, b"second");
        w.run_to_end(t);
        w.notify(0, b"third");
        let mut seen = collect(&mut w, 1, 3);
        w.run(ms(50));
        seen.extend(w.take(1));
        assert_eq!(seen, [&b"first"[..], b"second", b"third"]);
        w.assert_clean();
    }
}

#[test]
fn a_link_lost_between_data_and_notification_voids_or_delivers_but_never_both() {
    for seed in 0..80 {
        let mut w = world(seed);
        w.net.delay_us = 20..1500;
        let bytes = w.fill(0, 0, 0, LEN);
        let t = w.move_bytes(0, Write, (0, 0), (0, 0), LEN, Some(b"bound"));
        w.run(Duration::from_micros(seed * 100));
        let kind = if seed % 2 == 0 { LinkKind::Session } else { LinkKind::Bulk };
        if let Some(wire) = w.open_wires(kind).first() {
            w.cut(*wire);
        }
        w.run_to_end(t);
        w.notify(0, b"after");
        let mut seen = collect(&mut w, 1, 1);
        w.run(ms(100));
        seen.extend(w.take(1));
        let bound = seen.iter().filter(|text| *text == b"bound").count();
        assert_eq!(seen.iter().filter(|text| *text == b"after").count(), 1, "seed {seed}");
        assert!(bound <= 1 && (bound == 1 || !w.is_done(t)), "seed {seed}: {bound}");
        if bound == 1 {
            assert_eq!(w.read(1, 0, 0, LEN), bytes, "seed {seed}");
        }
        w.assert_clean();
    }
}

#[test]
fn an_application_that_takes_nothing_stops_the_sender_and_loses_nothing() {
    for seed in 0..6 {
        let mut w = world(seed);
        w.nodes[1].queue = NotificationQueue::new(3, 1 << 20);
        (w.net.capacity, w.net.chunk) = (256 << 10, 64 << 10);
        let texts: Vec<Vec<u8>> = (0..700u32).map(|n| n.to_le_bytes().repeat(1024)).collect();
        for (n, text) in texts.iter().enumerate() {
            if n % 4 == 3 {
                let at = n % 7 * CHUNK;
                w.move_bytes(0, Write, (0, at), (0, at), CHUNK, Some(text));
            } else {
                w.notify(0, text);
            }
            w.run(Duration::from_micros(300));
            if n % 150 == 100 {
                let wire = w.open_wires(LinkKind::Session).first().copied();
                w.run(ms(30));
                // All that was under way has ended: only waiting ones are touched.
                wire.inspect(|wire| w.cut(*wire));
                w.run(ms(30));
            }
        }
        w.run(ms(500));
        assert_eq!(w.broken, [], "seed {seed}: no rule is broken by being patient");
        let (count, _) = w.nodes[0].peer.unacknowledged();
        assert!(count > 50, "{count} are not acknowledged");
        let mut seen = collect(&mut w, 1, texts.len());
        seen.sort();
        let mut expected = texts.clone();
        expected.sort();
        assert_eq!(seen.len(), expected.len(), "seed {seed}");
        assert!(seen == expected);
        w.assert_clean();
    }
}

#[test]
fn counts_do_not_stay_when_notifications_wait_longer_than_their_transfers() {
    let mut w = world(4);
    w.nodes[1].queue = NotificationQueue::new(20, 1 << 20);
    for n in 0..6000u32 {
        w.notify(0, &n.to_le_bytes());
    }
    w.run(ms(100));
    for n in 0..50u32 {
        let t = w.move_bytes(0, Write, (0, 0), (0, 0), 100, Some(&n.to_le_bytes()));
        w.run_to_end(t);
        assert!(w.is_done(t));
    }
    assert_eq!(collect(&mut w, 1, 6050).len(), 6050);
    w.assert_clean();
}

#[test]
fn a_passive_side_keeps_its_notifications_until_the_peer_comes_back() {
    let mut w = world(5);
    w.notify(1, b"one");
    assert_eq!(collect(&mut w, 0, 1), [b"one"]);
    w.run(ms(10));
    let wire = w.open_wires(LinkKind::Session)[0];
    w.cut(wire);
    w.run(ms(10));
    assert!(!w.is_up(1));
    w.notify(1, b"two");
    w.run(ms(500));
    assert_eq!(w.nodes[1].peer.unacknowledged(), (1, 3));
    w.connect();
    assert_eq!(collect(&mut w, 0, 1), [b"two"]);
    w.assert_clean();
}

#[test]
fn a_goodbye_that_overtakes_an_acknowledgement_in_the_ring_loses_nothing() {
    let mut w = world(7);
    w.call(1, |core, _| {
        core.set_ring(Some(RingState { has_room: true, is_empty: true, longest: 4096 }));
    });
    w.notify(0, b"last words");
    assert_eq!(collect(&mut w, 1, 1), [b"last words"]);
    w.run(ms(200));
    // Nobody looks into the ring before the goodbye is there.
    let in_ring = w.call(1, crate::session::core::Core::next_ring_message);
    assert!(matches!(in_ring, Some(Message::Ack(1))));
    w.leave(1, ms(100));
    w.run(ms(200));
    assert_eq!(w.nodes[0].counters.notifications_dropped.get(), 0);
    w.assert_clean();
}

#[test]
fn a_passive_side_without_a_session_drops_and_says_so() {
    let mut w = World::new(6, false);
    w.notify(1, b"to nobody");
    assert_eq!(w.nodes[1].counters.notifications_dropped.get(), 1);
    w.assert_clean();
}
