//! The life of a session: connecting, silence, goodbye, restart.

use std::time::Duration;

use super::net::Handshake;
use super::world::{CHUNK, World, ms};
use crate::error::Error;
use crate::plan::Operation::{Read, Write};
use crate::sync::{SlotState, Ticket};
use crate::wire::Access;
use crate::wire::hello::LinkKind;

const LEN: usize = 12 * CHUNK;

fn world(seed: u64, both: bool) -> World {
    let mut world = World::new(seed, both);
    for node in 0..2 {
        world.register(node, 8 * LEN, Access::READ_WRITE);
    }
    world
}

fn seen(w: &mut World, node: usize, count: usize) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for _ in 0..2000 {
        all.extend(w.take(node));
        if all.len() >= count {
            break;
        }
        w.run(ms(5));
    }
    all
}

#[test]
fn the_first_transfer_connects() {
    let mut w = world(1, false);
    let bytes = w.fill(1, 0, 0, LEN);
    let t = w.move_bytes(0, Read, (0, 0), (0, 0), LEN, None);
    w.run_to_end(t);
    assert!(w.is_done(t));
    assert_eq!(w.read(0, 0, 0, LEN), bytes);
    w.assert_clean();
}

#[test]
fn both_sides_connecting_at_once_converge_to_one_session_and_lose_nothing() {
    for seed in 0..300 {
        let mut w = world(seed, true);
        w.net.delay_us = 20..4000;
        let first = w.rng.below(2) as usize;
        let pause = Duration::from_micros(w.rng.below(20_000));
        let mut transfers = Vec::new();
        for node in [first, 1 - first] {
            transfers.push(w.move_bytes(node, Read, (0, 0), (0, 0), 64, None));
            transfers.push(w.move_bytes(node, Write, (0, LEN), (0, 2 * LEN), LEN, Some(b"bound")));
            w.notify(node, b"one");
            w.run(pause);
            w.notify(node, b"two");
        }
        for t in transfers {
            w.run_to_end(t);
            assert!(w.is_done(t), "seed {seed}: {:?}", w.error(t));
        }
        w.run(ms(500));
        for node in 0..2 {
            let mut all = w.take(node);
            all.sort();
            assert_eq!(all, [&b"bound"[..], b"one", b"two"], "seed {seed} node {node}");
        }
        assert_eq!(w.open_wires(LinkKind::Session).len(), 1, "seed {seed}");
        assert_eq!(w.nodes[0].core.session, w.nodes[1].core.session);
        w.assert_clean();
    }
}

#[test]
fn a_refused_connection_fails_what_waits_and_says_why() {
    let mut w = world(2, false);
    w.refusing[1] = true;
    let ticket = Ticket::new();
    let answer = ticket.clone();
    w.call(0, |core, env| core.request_connect(ticket, env));
    let t = w.move_bytes(0, Read, (0, 0), (0, 0), LEN, Some(b"never"));
    w.run_to_end(t);
    assert!(matches!(w.error(t), Error::Connect { .. }), "{:?}", w.error(t));
    let outcome = answer.wait(std::time::Instant::now(), || ());
    assert!(matches!(outcome, Some(Err(Error::Connect { .. }))));
    assert!(w.nodes[0].peer.last_error().is_some());
    w.assert_clean();
    w.refusing[1] = false;
    let t = w.move_bytes(0, Read, (0, 0), (0, 0), LEN, None);
    w.run_to_end(t);
    assert!(w.is_done(t), "the peer is usable afterwards");
    w.assert_clean();
}

#[test]
fn notifications_that_wait_try_again_with_growing_pauses() {
    let mut w = world(3, false);
    w.refusing[1] = true;
    w.notify(0, b"patient");
    w.run(Duration::from_secs(10));
    let attempts = w.wires.len();
    // 50, 100, 200, ... 2000 ms: 6 pauses to 3.15 s, then every 2 s.
    assert!((8..=12).contains(&attempts), "{attempts} attempts");
    w.refusing[1] = false;
    w.run(Duration::from_secs(3));
    assert_eq!(w.take(1), [b"patient"]);
    w.assert_clean();
}

#[test]
fn a_transfer_does_not_wait_for_the_pause_of_notifications() {
    let mut w = world(4, false);
    w.refusing[1] = true;
    w.notify(0, b"patient");
    w.run(Duration::from_secs(8));
    w.refusing[1] = false;
    let t = w.move_bytes(0, Read, (0, 0), (0, 0), 64, None);
    w.run(ms(20));
    assert!(w.is_done(t), "{:?}", w.error(t));
    assert_eq!(seen(&mut w, 1, 1), [b"patient"]);
    w.assert_clean();
}

#[test]
fn a_silent_peer_is_dead_after_the_liveness_timeout() {
    for both in [false, true] {
        let mut w = world(5, both);
        w.connect();
        w.partition();
        let t = w.move_bytes(0, Read, (0, 0), (0, 0), 64, None);
        let start = w.now;
        w.run_to_end(t);
        assert!(matches!(w.error(t), Error::RemoteDisconnect { .. }), "{:?}", w.error(t));
        let took = w.now - start;
        assert!(took >= ms(2900) && took <= ms(3000 * 6 / 5 + 100), "{took:?}");
        assert_eq!(w.nodes[0].counters.liveness_timeouts.get(), 1);
        w.run(Duration::from_secs(5));
        assert!(!w.is_up(0) && !w.is_up(1));
        w.heal();
        let t = w.move_bytes(0, Read, (0, 0), (0, 0), 64, None);
        w.run_to_end(t);
        assert!(w.is_done(t));
        w.assert_quiet();
    }
}

#[test]
fn an_idle_connection_stays_up_by_pings() {
    let mut w = world(6, false);
    w.connect();
    w.run(Duration::from_mins(1));
    assert_eq!(w.wires.len(), 1);
    assert!(w.is_up(0) && w.is_up(1));
    w.assert_clean();
}

#[test]
fn a_gap_in_our_own_scheduling_is_not_held_against_the_peer() {
    for node in 0..2 {
        let mut w = world(7, false);
        w.connect();
        // Longer than the timeout for whoever was stopped, shorter for the one that watched.
        w.nodes[node].stopped = Some(w.now + ms(2000));
        w.liveness = ms(3000);
        w.run(ms(2000));
        w.run(Duration::from_secs(10));
        assert_eq!(w.wires.len(), 1, "the link survived");
        let mut w = world(7, false);
        w.liveness = ms(400);
        w.connect();
        w.nodes[0].stopped = Some(w.now + ms(5000));
        w.nodes[1].stopped = Some(w.now + ms(5000));
        w.run(Duration::from_secs(10));
        assert_eq!(w.wires.len(), 1, "both were stopped (a paused VM): neither is to blame");
        w.assert_clean();
    }
}

#[test]
fn a_killed_peer_ends_every_transfer() {
    for seed in 0..40 {
        let mut w = world(seed, true);
        w.connect();
        let transfers: Vec<usize> = (0..6)
            .map(|i| {
                let operation = if i % 2 == 0 { Read } else { Write };
                let len = if i < 2 { 64 } else { LEN };
                w.move_bytes(0, operation, (0, i * LEN), (0, i * LEN), len, Some(b"n"))
            })
            .collect();
        w.run(Duration::from_micros(seed * 60));
        w.kill(1);
        let start = w.now;
        for t in transfers {
            w.run_to_end(t);
            assert!(w.is_done(t) || w.error(t).is_disconnect(), "{:?}", w.error(t));
        }
        assert!(w.now - start < ms(100));
        let at_end = w.read(0, 0, 0, 8 * LEN);
        let ticket = w.leave(0, ms(100));
        w.run(ms(500));
        assert!(ticket.is_complete());
        assert_eq!(w.read(0, 0, 0, 8 * LEN), at_end);
        w.assert_quiet();
    }
}

#[test]
fn another_incarnation_is_not_the_peer() {
    let mut w = world(8, false);
    w.connect();
    w.notify(0, b"seen");
    assert_eq!(seen(&mut w, 1, 1), [b"seen"]);
    w.restart(1, 3);
    w.notify(0, b"for the one that died");
    w.run(ms(500));
    assert_eq!(w.take(1), Vec::<Vec<u8>>::new());
    assert_eq!(w.nodes[0].peer.unacknowledged(), (0, 0), "given up");
    assert!(w.nodes[0].counters.notifications_dropped.get() >= 1);
    assert!(w.nodes[0].peer.last_error().unwrap().contains("restarted"));
    // And it still tries, and says so, whenever it is asked to.
    let wires = w.wires.len();
    w.notify(0, b"again");
    w.run(ms(500));
    assert!(w.wires.len() > wires);
    assert_eq!(w.nodes[0].peer.unacknowledged(), (0, 0));
    w.assert_quiet();
}

#[test]
fn leaving_flushes_what_was_sent_and_says_goodbye() {
    for seed in 0..30 {
        let mut w = world(seed, true);
        w.connect();
        for n in 0..100u32 {
            w.notify(0, &n.to_le_bytes());
        }
        let theirs = w.move_bytes(1, Read, (0, 0), (0, 0), 4 * LEN, None);
        let own = w.move_bytes(0, Read, (0, 4 * LEN), (0, 0), 4 * LEN, Some(b"dropped"));
        let ticket = w.leave(0, ms(1000));
        w.run_until("left", |_| ticket.is_complete());
        assert_eq!(ticket.wait(std::time::Instant::now(), || ()), Some(0), "nothing was dropped");
        assert!(matches!(w.error(own), Error::Cancelled));
        w.run_to_end(theirs);
        w.run(ms(100));
        assert_eq!(w.take(1).len(), 100);
        assert!(w.is_done(theirs) || w.error(theirs).is_disconnect());
        assert!(!w.is_up(0) && !w.is_up(1), "and nobody connects again by himself");
        assert_eq!(w.nodes[0].left, 1);
        w.assert_clean();
        let t = w.move_bytes(0, Read, (0, 0), (0, 0), LEN, Some(b"new session"));
        w.run_to_end(t);
        assert!(w.is_done(t));
        assert_eq!(seen(&mut w, 1, 1), [b"new session"]);
        w.assert_clean();
    }
}

#[test]
fn leaving_ends_at_its_deadline_and_says_how_much_it_dropped() {
    let mut w = world(9, false);
    w.connect();
    w.partition();
    for _ in 0..5 {
        w.notify(0, b"stuck");
    }
    let start = w.now;
    let ticket = w.leave(0, ms(400));
    let second = w.leave(0, ms(9000));
    w.run_until("left", |_| ticket.is_complete());
    assert_eq!(w.now - start, ms(400));
    assert_eq!(ticket.wait(std::time::Instant::now(), || ()), Some(5));
    assert!(second.is_complete());
    assert_eq!(w.nodes[0].peer.unacknowledged(), (0, 0));
    assert_eq!(w.nodes[0].counters.notifications_dropped.get(), 5);
}

#[test]
fn leaving_connects_once_more_for_what_waits_and_ends_when_it_is_flushed() {
    let mut w = world(10, false);
    w.refusing[1] = true;
    w.notify(0, b"late");
    w.run(ms(1000));
    w.refusing[1] = false;
    let ticket = w.leave(0, ms(5000));
    let start = w.now;
    w.run_until("left", |_| ticket.is_complete());
    assert!(w.now - start < ms(100));
    assert_eq!(w.take(1), [b"late"]);
    w.run(ms(50));
    w.assert_clean();
}

#[test]
fn a_goodbye_that_is_lost_does_not_show_a_notification_twice() {
    for seed in 0..50 {
        let mut w = world(seed, false);
        w.connect();
        w.notify(0, b"x0");
        let mut all = seen(&mut w, 1, 1);
        w.notify(0, b"x1");
        w.notify(0, b"x2");
        w.run(Duration::from_micros(seed * 20));
        // The passive side leaves, and its goodbye is lost with its link.
        w.partition();
        let ticket = w.leave(1, ms(0));
        w.run(ms(10));
        assert!(ticket.is_complete());
        w.heal();
        w.run(Duration::from_secs(5));
        w.notify(0, b"x3");
        for _ in 0..100 {
            w.run(ms(50));
            all.extend(w.take(1));
        }
        let mut once = all.clone();
        once.dedup();
        assert_eq!(all, once, "seed {seed}");
        assert_eq!(all.last().unwrap(), b"x3", "seed {seed}");
        w.assert_quiet();
    }
}

#[test]
fn a_peer_that_connects_again_takes_the_place_of_its_old_link() {
    for seed in 0..60 {
        let mut w = world(seed, true);
        w.connect();
        // Engine 0 loses the link; engine 1 does not notice, and has work under way.
        let t = w.move_bytes(1, Write, (0, 0), (0, 0), 4 * LEN, Some(b"bound"));
        let small = w.move_bytes(1, Write, (0, 0), (0, 5 * LEN), 100, Some(b"small"));
        w.notify(1, b"free");
        w.run(Duration::from_micros(seed * 40));
        let wire = w.open_wires(LinkKind::Session)[0];
        w.wires[wire].silent = true;
        let side = usize::from(w.wires[wire].ends[1].node == 0);
        w.close_end(wire, side, "lost");
        w.notify(0, b"again");
        for t in [t, small] {
            w.run_to_end(t);
            assert!(w.is_done(t) || w.error(t).is_disconnect(), "seed {seed}: {:?}", w.error(t));
        }
        assert_eq!(seen(&mut w, 1, 1), [b"again"], "seed {seed}");
        w.run(ms(3500));
        let all = w.take(0);
        assert_eq!(all.iter().filter(|text| *text == b"free").count(), 1, "seed {seed}");
        for (t, text) in [(t, &b"bound"[..]), (small, b"small")] {
            let count = all.iter().filter(|seen| *seen == text).count();
            assert!(count <= 1 && (count == 1 || !w.is_done(t)), "seed {seed}");
        }
        assert_eq!(w.open_wires(LinkKind::Session).len(), 1, "seed {seed}");
        w.assert_quiet();
    }
}

#[test]
fn a_welcome_that_is_lost_leaves_both_sides_able_to_meet() {
    for seed in 0..60 {
        let mut w = world(seed, false);
        w.connect();
        for n in 0..5u8 {
            w.notify(0, &[n]);
            w.notify(1, &[n]);
        }
        assert_eq!(seen(&mut w, 1, 5).len() + seen(&mut w, 0, 5).len(), 10);
        // The passive side ends the session; then attempts are cut at every moment.
        let ticket = w.leave(1, ms(100));
        w.run(ms(50));
        assert!(ticket.is_complete());
        for _ in 0..3 {
            let t = w.move_bytes(0, Read, (0, 0), (0, 0), 64, None);
            w.run(Duration::from_micros(100 + seed * 15));
            let last = w.wires.len() - 1;
            w.cut(last);
            w.run_to_end(t);
        }
        w.notify(0, b"end");
        assert_eq!(seen(&mut w, 1, 1), [b"end"], "seed {seed}");
        w.notify(1, b"end");
        assert_eq!(seen(&mut w, 0, 1), [b"end"], "seed {seed}");
        w.assert_clean();
    }
}

#[test]
fn notifications_are_tried_again_after_the_peer_was_found_restarted() {
    let mut w = world(12, false);
    w.connect();
    w.refusing[1] = true;
    let wire = w.open_wires(LinkKind::Session)[0];
    w.cut(wire);
    w.run(ms(20));
    w.notify(0, b"waits");
    w.run(ms(20));
    w.restart(1, 3);
    w.refusing[1] = false;
    w.run(ms(3000));
    assert_eq!(w.nodes[0].peer.unacknowledged(), (0, 0), "given up");
    let wires = w.wires.len();
    w.notify(0, b"again");
    w.run(ms(50));
    assert!(w.wires.len() > wires, "and tried again when asked");
}

#[test]
fn leaving_ends_at_once_when_the_handshake_acknowledges_everything() {
    let mut w = world(13, false);
    w.connect();
    w.run(ms(10));
    w.notify(0, b"seen");
    w.run_until("it has arrived", |w| w.nodes[1].queue.len() == 1);
    w.refusing[1] = true;
    let wire = w.open_wires(LinkKind::Session)[0];
    w.cut(wire);
    w.run(ms(20));
    assert_eq!(w.nodes[0].peer.unacknowledged().0, 1, "its acknowledgement is lost");
    w.refusing[1] = false;
    let (ticket, start) = (w.leave(0, ms(5000)), w.now);
    w.run_until("left", |_| ticket.is_complete());
    assert!(w.now - start < ms(200), "{:?}", w.now - start);
    assert_eq!(ticket.wait(std::time::Instant::now(), || ()), Some(0));
    assert_eq!(w.take(1), [b"seen"]);
    w.assert_clean();
}

#[test]
fn a_write_between_two_of_its_requests_fails_with_its_session_link() {
    let mut between = 0;
    for seed in 0..60 {
        let mut w = world(seed, false);
        // Without streams two requests go at a time, and the transfers take turns.
        w.connect();
        w.refusing[1] = true;
        let transfers: Vec<usize> = (0..5u8)
            .map(|i| {
                let at = usize::from(i) * LEN;
                w.move_bytes(0, Write, (0, at), (0, at), 6 * CHUNK, Some(&[i]))
            })
            .collect();
        w.run(Duration::from_micros(2000 + seed * 100));
        let posted = w.posted.iter().filter(|p| p.shared.slot.state() == SlotState::Posted);
        between += posted.count();
        for wire in w.open_wires(LinkKind::Session) {
            w.cut(wire);
        }
        w.refusing[1] = false;
        let mut done: Vec<Vec<u8>> = Vec::new();
        for (i, t) in transfers.into_iter().enumerate() {
            w.run_to_end(t);
            if w.is_done(t) {
                done.push(vec![i as u8]);
            }
        }
        w.notify(0, b"end");
        w.run(ms(300));
        let seen = w.take(1);
        assert!(done.iter().all(|text| seen.contains(text)), "seed {seed}: {done:?} {seen:?}");
        w.assert_clean();
    }
    assert!(between > 50, "{between} were under way");
}

#[test]
fn an_attempt_that_was_given_up_does_not_replace_a_later_one() {
    let mut w = world(14, false);
    w.attempt(0, LinkKind::Session);
    if let Handshake::Hello { at, .. } = &mut w.wires[0].handshake {
        *at += ms(30);
    }
    w.wires[0].ends[0].closed = true;
    w.connect();
    let session = w.nodes[1].core.session;
    w.run(ms(100));
    assert!(matches!(w.wires[0].handshake, Handshake::Over), "it arrived late");
    assert!(w.is_up(0) && w.is_up(1));
    assert_eq!((w.nodes[0].core.session, w.nodes[1].core.session), (session, session));
    w.assert_clean();
}

#[test]
fn an_aborted_core_ends_everything_at_once() {
    let mut w = world(11, false);
    w.connect();
    let transfers: Vec<usize> = (0..4)
        .map(|i| w.move_bytes(0, Write, (0, i * LEN), (0, i * LEN), LEN, Some(b"n")))
        .collect();
    w.notify(0, b"free");
    w.run(ms(1));
    w.call(0, |core, env| core.abort(&Error::Shutdown, env));
    for t in transfers {
        assert!(w.state(t) == SlotState::Done || matches!(w.error(t), Error::Shutdown));
    }
    assert_eq!(w.nodes[0].peer.in_flight(), 0);
    assert_eq!(w.nodes[0].peer.unacknowledged(), (0, 0));
}
