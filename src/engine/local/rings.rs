//! The notification rings of peers on this host.

use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use corelane_runtime::Cx;

use crate::engine::lane::{LOCAL_TIMER, LaneDriver, env as lane_env};
use crate::session::RingState;
use crate::transport::local::{MAX_RING_PAYLOAD, Message as RingMessage, Pushed};
use crate::wire::frame::FrameKind;

/// Messages of one ring in one turn.
const RING_BATCH: usize = 64;
/// Rings that a turn looks at; with more peers they take turns.
const RINGS_PER_TURN: usize = 64;
/// How long what waits for a ring is tried every turn; afterwards it is tried every millisecond.
const RING_PATIENCE: Duration = Duration::from_micros(200);

impl LaneDriver {
    /// Looks into the rings; true: there was something.
    pub(in crate::engine) fn poll_rings(&mut self, cx: &mut Cx<'_>) -> bool {
        if self.asleep && cx.on_lane_thread() {
            self.set_asleep(false);
        }
        let count = self.rings.len();
        let mut worked = false;
        for _ in 0..count.min(RINGS_PER_TURN) {
            self.next_ring =
                if self.next_ring + 1 < self.rings.len() { self.next_ring + 1 } else { 0 };
            let Some(&slot) = self.rings.get(self.next_ring) else { break };
            worked |= self.drain_ring(slot, RING_BATCH, cx) || self.look_for_death(slot, cx);
        }
        worked
    }

    /// Takes messages of one ring.
    pub(in crate::engine) fn drain_ring(
        &mut self,
        slot: usize,
        most: usize,
        cx: &mut Cx<'_>,
    ) -> bool {
        let mut taken = 0;
        while taken < most {
            let Some(peer) = self.peers.get_mut(slot) else { break };
            let Some(attachment) = peer.local.as_mut() else { break };
            let Some(theirs) = attachment.theirs.as_mut() else { break };
            if !theirs.ring.has_message() {
                break;
            }
            let link = attachment.link;
            let popped = theirs.ring.pop().map_err(|error| error.to_string());
            let handled = popped.and_then(|message| {
                let Some(message) = message else { return Ok(()) };
                let handled =
                    self.with_core(slot, cx, |core, env| core.on_ring_message(message, env));
                handled.unwrap_or(Ok(())).map_err(|error| error.to_string())
            });
            if let Err(reason) = handled {
                // Nothing of a ring that is broken is looked at again.
                self.rings.retain(|known| *known != slot);
                self.end_watch(slot, cx);
                if let Some(peer) = self.peers.get_mut(slot) {
                    peer.core.set_ring(None);
                    peer.core.peer.set_path(None);
                    if let Some(theirs) = peer.local.take().as_ref().and_then(|a| a.theirs.as_ref())
                    {
                        theirs.accessor.leave();
                    }
                }
                self.close_link(link, &reason, cx);
                return true;
            }
            taken += 1;
        }
        taken > 0
    }

    /// Puts what a peer's core has into the ring; true: it moved something.
    pub(in crate::engine) fn flush_ring(&mut self, slot: usize, cx: &mut Cx<'_>) -> bool {
        let now = cx.now();
        let Self { peers, regions, engine, counters, busy, .. } = self;
        let Some(peer) = peers.get_mut(slot) else { return false };
        let Some(attachment) = peer.local.as_mut().filter(|attachment| attachment.is_up()) else {
            return false;
        };
        let link = attachment.link;
        let (mut moved, mut asleep) = (false, false);
        let mut env = lane_env(regions, engine, counters, now);
        let filled = loop {
            let has_room = match attachment.ring.has_room() {
                Ok(has_room) => has_room,
                Err(broken) => break Err(broken),
            };
            let state = RingState { has_room, is_empty: false, longest: MAX_RING_PAYLOAD };
            peer.core.set_ring(Some(state));
            let message = if has_room { peer.core.next_ring_message(&mut env) } else { None };
            let Some(message) = message else {
                // Only what may have to take the other way makes it worth a look at the peer's cache line.
                if !peer.core.has_unsent() {
                    break Ok(());
                }
                break attachment.ring.is_empty().map(|is_empty| {
                    peer.core.set_ring(Some(RingState { is_empty, ..state }));
                });
            };
            let message = match &message {
                RingMessage::Notify { seq, ack, payload } => {
                    RingMessage::Notify { seq: *seq, ack: *ack, payload: &payload[..] }
                }
                RingMessage::Ack(below) => RingMessage::Ack(*below),
            };
            match attachment.ring.push(&message) {
                Ok(pushed) => asleep |= pushed == Pushed::Asleep,
                Err(broken) => break Err(broken),
            }
            moved = true;
        };
        // A byte on the session's socket wakes the peer's lane, and its side of that is its own: an eventfd or a pipe that both have
        // could be made to block whoever rings, or whoever is rung. What waits to be sent already does as well, and so does what the
        // socket has no room for: then there is something to read at the other end.
        if asleep && attachment.outgoing.is_empty() {
            attachment.outgoing.push_back(super::frame(FrameKind::Pong, 0));
        }
        if peer.core.waits_for_ring() {
            let (since, timer) = attachment.waiting.get_or_insert((now, false));
            if now - *since < RING_PATIENCE {
                busy.push(slot);
            } else if !*timer {
                *timer = true;
                cx.set_timer(now + Duration::from_millis(1), LOCAL_TIMER | slot as u64);
            }
        } else {
            attachment.waiting = None;
        }
        if let Err(broken) = filled {
            self.close_link(link, &broken.to_string(), cx);
        }
        moved
    }

    /// Time to look again whether the ring has room.
    pub(in crate::engine) fn ring_timer(&mut self, slot: usize) {
        if let Some(attachment) = self.peers.get_mut(slot).and_then(|peer| peer.local.as_mut())
            && let Some((_, timer)) = attachment.waiting.as_mut()
        {
            *timer = false;
        }
        self.mark(slot);
    }

    pub(super) fn set_asleep(&mut self, asleep: bool) {
        self.asleep = asleep;
        for &slot in &self.rings {
            if let Some(theirs) =
                self.peers.get(slot).and_then(|peer| peer.local.as_ref()?.theirs.as_ref())
            {
                theirs.ring.set_asleep(asleep);
            }
        }
    }

    /// Tells the peers on this host to ring; false: one of them has not seen it, and a message waits.
    pub(in crate::engine) fn rings_before_sleep(&mut self) -> bool {
        if self.rings.is_empty() {
            return true;
        }
        self.set_asleep(true);
        // With the fence in `Producer::push`.
        fence(Ordering::SeqCst);
        let waits = self.rings.iter().any(|&slot| {
            let theirs = self.peers.get(slot).and_then(|peer| peer.local.as_ref()?.theirs.as_ref());
            theirs.is_some_and(|theirs| theirs.ring.has_message())
        });
        if waits {
            self.set_asleep(false);
        }
        !waits
    }
}
