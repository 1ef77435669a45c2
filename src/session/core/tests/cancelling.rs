//! WRITEs that are to end after the peer has been sent some of them: their end says that it writes no more.

use std::time::Duration;

use super::world::{CHUNK, World, ms};
use crate::error::Error;
use crate::plan::Operation::Write;
use crate::sync::{SlotState, Ticket};
use crate::wire::Access;
use crate::wire::hello::LinkKind;

const LEN: usize = 40 * CHUNK;

/// A small one, which goes over the session's link, and one over several streams.
const LENGTHS: [usize; 2] = [200, LEN];

/// A world with memory on both sides, a session and streams.
fn world(seed: u64) -> World {
    let mut w = World::new(seed, false);
    for node in 0..2 {
        w.register(node, 2 * LEN, Access::READ_WRITE);
    }
    w.connect();
    let warm = w.move_bytes(0, Write, (0, LEN), (0, LEN), LEN, None);
    w.run_to_end(warm);
    assert!(w.is_done(warm) && w.open_wires(LinkKind::Bulk).len() == 2);
    w
}

/// Posts a WRITE to a peer that stands still for so long, and cancels it when its requests are on their way.
fn cancelled(w: &mut World, len: usize, still: Duration) -> usize {
    w.fill(0, 0, 0, len);
    w.nodes[1].stopped = Some(w.now + still);
    let t = w.move_bytes(0, Write, (0, 0), (0, 0), len, Some(b"bound"));
    w.run(ms(20));
    assert!(w.is_asked_for(t));
    w.cancel(t);
    t
}

/// The peer writes nothing for a while, whatever becomes of its memory.
fn assert_quiet_there(w: &mut World) {
    let poison = w.fill(1, 0, 0, 2 * LEN);
    let written = w.nodes[1].written;
    w.run(ms(5000));
    assert_eq!(w.nodes[1].written, written, "written after the end");
    assert!(w.read(1, 0, 0, 2 * LEN) == poison);
}

#[test]
fn a_cancelled_write_ends_when_the_peer_has_answered_what_it_was_sent() {
    for len in LENGTHS {
        for seed in 0..20 {
            let mut w = world(seed);
            let t = cancelled(&mut w, len, ms(1000));
            w.run(ms(900));
            assert_eq!(w.state(t), SlotState::Posted, "the peer has not taken it yet");
            w.run_to_end(t);
            assert!(matches!(w.error(t), Error::Cancelled), "{:?}", w.error(t));
            assert_quiet_there(&mut w);
            // That of the small one had left before.
            assert_eq!(w.take(1).len(), usize::from(len == LENGTHS[0]));
            w.assert_clean();
        }
    }
}

#[test]
fn local_memory_is_free_before_the_peer_has_answered() {
    let mut w = world(1);
    let t = cancelled(&mut w, 200, ms(1000));
    let ticket = Ticket::new();
    let region = w.nodes[0].buffers[0].region.clone();
    w.nodes[0].regions.close(&region, ticket.clone());
    assert!(ticket.is_complete(), "its frame was sent");
    assert_eq!(w.state(t), SlotState::Posted);
    w.run_to_end(t);
    w.nodes[0].regions.add(region);
    w.assert_clean();
}

#[test]
fn cancelling_is_bounded_by_the_operation_timeout_and_says_so() {
    for len in LENGTHS {
        let mut w = world(2);
        w.nodes[0].core.config.operation_timeout = ms(700);
        let start = w.now;
        let t = cancelled(&mut w, len, ms(1500));
        w.run_to_end(t);
        assert!(matches!(w.error(t), Error::Timeout { .. }), "{:?}", w.error(t));
        assert!(w.now - start <= ms(710), "{:?}", w.now - start);
        w.run(ms(3000));
        let again = w.move_bytes(0, Write, (0, 0), (0, 0), len, None);
        w.run_to_end(again);
        assert!(w.is_done(again), "the peer is usable: {:?}", w.error(again));
        w.assert_clean();
    }
}

#[test]
fn a_lost_link_ends_what_was_cancelled_and_says_so() {
    for (len, kind) in [(200, LinkKind::Session), (LEN, LinkKind::Session), (LEN, LinkKind::Bulk)] {
        for seed in 0..20 {
            let mut w = world(seed);
            let t = cancelled(&mut w, len, ms(300));
            for wire in w.open_wires(kind) {
                w.cut(wire);
            }
            w.run(ms(100));
            // Nobody will say what the peer takes of what the link carried.
            assert!(w.state(t) != SlotState::Posted, "seed {seed}, {kind:?}, {len}");
            assert!(matches!(w.error(t), Error::RemoteDisconnect { .. }), "{:?}", w.error(t));
            w.run(ms(1000));
            let again = w.move_bytes(0, Write, (0, 0), (0, 0), len, None);
            w.run_to_end(again);
            assert!(w.is_done(again), "{:?}", w.error(again));
            // Frames of the old links may reach a peer that is closing them.
            w.run(ms(200));
            w.assert_quiet();
        }
    }
}

#[test]
fn a_peer_that_falls_silent_ends_what_was_cancelled() {
    let mut w = world(3);
    let (start, liveness) = (w.now, w.liveness);
    let t = cancelled(&mut w, LEN, Duration::from_secs(100));
    w.run_to_end(t);
    assert!(matches!(w.error(t), Error::RemoteDisconnect { .. }), "{:?}", w.error(t));
    assert!(w.now - start <= liveness + liveness / 5, "{:?}", w.now - start);
}

#[test]
fn who_leaves_waits_for_the_answers_first() {
    for len in LENGTHS {
        let mut w = world(4);
        w.nodes[1].stopped = Some(w.now + ms(500));
        let t = w.move_bytes(0, Write, (0, 0), (0, 0), len, Some(b"bound"));
        w.run(ms(20));
        assert!(w.is_asked_for(t));
        let (ticket, start) = (w.leave(0, ms(2000)), w.now);
        w.run(ms(400));
        assert!(!ticket.is_complete() && w.state(t) == SlotState::Posted);
        w.run_until("left", |_| ticket.is_complete());
        assert!(w.now - start < ms(600), "{:?}", w.now - start);
        assert!(matches!(w.error(t), Error::Cancelled), "{:?}", w.error(t));
        assert_quiet_there(&mut w);
        w.assert_clean();
    }
}

#[test]
fn who_leaves_waits_no_longer_than_it_was_told_to() {
    for len in LENGTHS {
        let mut w = world(5);
        let t = cancelled(&mut w, len, ms(2000));
        let (ticket, start) = (w.leave(0, ms(300)), w.now);
        w.run_until("left", |_| ticket.is_complete());
        assert!(w.now - start <= ms(310), "{:?}", w.now - start);
        w.run_to_end(t);
        assert!(matches!(w.error(t), Error::RemoteDisconnect { .. }), "{:?}", w.error(t));
        w.run(ms(3000));
        w.assert_clean();
    }
}

#[test]
fn a_refused_write_ends_when_its_other_requests_are_answered() {
    for seed in 0..20 {
        let mut w = world(seed);
        let readable = w.register(1, LEN, Access::REMOTE_READ);
        // Every second request is refused: what a forged plan asks for.
        let plan = w.plan(0, Write, &[((0, 0), (0, 0), LEN)]);
        let region = w.nodes[1].buffers[readable].region.descriptor.clone();
        let mut plan = std::sync::Arc::into_inner(plan).unwrap();
        for piece in plan.pieces.iter_mut().step_by(2) {
            (piece.header.key, piece.header.addr) = (region.key.0, region.base);
        }
        let t = w.post(0, std::sync::Arc::new(plan), None);
        w.run_to_end(t);
        assert!(matches!(w.error(t), Error::Permission { .. }), "{:?}", w.error(t));
        assert_quiet_there(&mut w);
        w.assert_clean();
    }
}
