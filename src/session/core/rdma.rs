//! A peer that is reached by RDMA: transfers that the driver posts to a device, notifications that go over its queue pairs.
//!
//! What device and queue pairs there are, the driver knows. Here is which transfers go that way, and what becomes of them. The
//! queue pairs carry notifications as the ring of a peer on this host does ([`local`](super::local)), with its rules of order;
//! those that are bound to a WRITE go behind it and have no order.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use smallvec::SmallVec;

use super::requests::ActiveKey;
use super::{Core, Env, Event, ProtocolError};
use crate::error::Error;
use crate::plan::PlanInner;
use crate::wire::frame::Header;
use crate::wire::rdma::MAX_QUEUE_PAIRS;

/// Frames about queue pairs that may wait to be sent: more than two engines ever have to say at a time.
const MAX_TOLD: usize = 4 * MAX_QUEUE_PAIRS;

/// Rails that a connection uses: ours, and the peer's number for its own.
pub(crate) type RailPairs = SmallVec<[(usize, usize); 2]>;

/// Whether transfers go by RDMA.
#[derive(Debug, Default)]
pub(super) enum Rdma {
    /// The session has no such way, or there is no session.
    #[default]
    Off,
    /// It is being found out: transfers wait.
    Pending,
    Up(RailPairs),
}

/// A transfer for the driver to post.
#[derive(Debug)]
pub(crate) struct Wired {
    pub(crate) key: u64,
    pub(crate) plan: Arc<PlanInner>,
    /// Goes with it if it can.
    pub(crate) notification: Option<Arc<[u8]>>,
}

/// How a transfer that the driver had posted has ended.
#[derive(Debug)]
pub(crate) enum WiredEnd {
    /// All bytes are where they belong; `notified`: so is its notification.
    Done {
        notified: bool,
    },
    /// Nothing of it moves any more; it was told to end.
    Stopped,
    Failed(Error),
}

impl Core {
    /// The session is up, and both sides have devices: `rdma_resolved` tells what comes of it.
    pub(crate) fn rdma_pending(&mut self) {
        self.rdma = Rdma::Pending;
        self.peer.settled.store(false, Ordering::Release);
    }

    /// Whether it is being found out how to reach the peer.
    pub(super) fn is_way_pending(&self) -> bool {
        self.is_local_pending() || self.is_rdma_pending()
    }

    pub(super) fn is_rdma_pending(&self) -> bool {
        matches!(self.rdma, Rdma::Pending)
    }

    pub(super) fn rdma_off(&mut self) {
        self.rdma = Rdma::Off;
        self.peer.wired.store(false, Ordering::Release);
        // Those that were never begun take whatever way the next link has.
        while let Some(key) = self.wired.pop_front() {
            if self.live(key).is_some() {
                self.enqueue_for_links(key);
            }
        }
    }

    /// The rails that connect both sides, or why there are none. Transfers that waited for it go on.
    pub(crate) fn rdma_resolved(&mut self, outcome: Result<RailPairs, String>, env: &mut Env<'_>) {
        let up = outcome.is_ok();
        self.rdma = match outcome {
            Ok(rails) => Rdma::Up(rails),
            Err(reason) => {
                self.rdma_reason = reason;
                Rdma::Off
            }
        };
        if up {
            self.peer.wired.store(true, Ordering::Release);
        } else {
            self.rdma_off();
        }
        self.peer.settled.store(!self.is_local_pending(), Ordering::Release);
        self.enqueue_waiting(env);
        self.enqueue_on_device(env);
    }

    /// Whether a plan can go by RDMA: all that it touches is registered on a rail of the connection, with both its ends. It goes
    /// over such only. A comparison for each region, and rail that has not all.
    #[inline]
    pub(super) fn is_wired(&self, plan: &PlanInner) -> bool {
        let Rdma::Up(rails) = &self.rdma else { return false };
        #[cfg(feature = "sim")]
        if rails.is_empty() {
            return crate::sim::is_wired(plan);
        }
        !plan.rdma.runs.is_empty()
            && rails.iter().any(|(own, theirs)| plan.is_open_on(*own, *theirs))
    }

    pub(super) fn is_rdma_up(&self) -> bool {
        matches!(self.rdma, Rdma::Up(_))
    }

    /// The next transfer for the driver to post: it ends with `wired_ended`, or comes back by `wired_back`.
    #[inline]
    pub(crate) fn next_wired(&mut self) -> Option<Wired> {
        loop {
            let key = self.wired.pop_front()?;
            if let Some(active) = self.live_mut(key) {
                let (plan, notification) = active.begin_wired();
                return Some(Wired { key: key.to_bits(), plan, notification });
            }
        }
    }

    /// The driver has nothing more to do with a transfer: no device touches its memory.
    #[inline]
    pub(crate) fn wired_ended(&mut self, key: u64, end: WiredEnd, env: &mut Env<'_>) {
        let key = ActiveKey::from_bits(key);
        let Some(active) = self.active_mut(key) else { return };
        let notified = matches!(end, WiredEnd::Done { notified: true });
        let later_turn = active.was_posted_before(env.now);
        if let Some(payload) = active.end_wired(notified) {
            self.peer.release(1, payload);
            env.counters.notifications_sent.add(1);
        }
        match end {
            WiredEnd::Done { .. } => {
                // Completions are looked for when a turn begins, just after its look at the clock: that is good enough, but for
                // what was posted in the same turn.
                if later_turn {
                    env.clock = None;
                }
                self.finish(key.slot, env);
            }
            WiredEnd::Stopped => {
                self.fail(key.slot, Error::Cancelled, env);
                self.try_finish_leaving(env);
            }
            WiredEnd::Failed(error) => {
                if let Some(active) = self.active_mut(key) {
                    active.give_up_answers(&error);
                }
                self.fail(key.slot, error, env);
                self.try_finish_leaving(env);
            }
        }
    }

    /// The driver cannot post a transfer, of which nothing was done: it takes another way.
    pub(crate) fn wired_back(&mut self, key: u64, env: &mut Env<'_>) {
        let key = ActiveKey::from_bits(key);
        let Some(active) = self.active_mut(key) else { return };
        active.end_wired(false);
        active.begin_again();
        if active.is_ending() {
            self.fail(key.slot, Error::Cancelled, env);
        } else {
            self.enqueue(key, env);
            self.want_bulk();
        }
    }

    /// The driver is to end a transfer early.
    pub(super) fn stop_wired(&mut self, key: ActiveKey, stuck: bool) {
        self.events.push_back(Event::StopWired { key: key.to_bits(), stuck });
    }

    /// A notification has arrived behind the data that it is bound to.
    pub(crate) fn on_bound(&mut self, payload: Vec<u8>, env: &mut Env<'_>) {
        self.inbox.bound(payload);
        self.deliver(env);
    }

    /// What the next notification of the peer is numbered.
    pub(crate) fn expects(&self) -> u64 {
        self.inbox.expects()
    }

    /// The queue pairs are gone on both sides, and the peer has all notifications below `expects`: what it does not have is
    /// sent again, over whatever there is.
    pub(crate) fn rdma_resync(
        &mut self,
        expects: u64,
        env: &mut Env<'_>,
    ) -> Result<(), ProtocolError> {
        self.ring = None;
        if self.session == 0 {
            // The session has ended here, and the peer does not know yet.
            return Ok(());
        }
        if mutated!(ResyncForgets) {
            return Ok(());
        }
        let expects =
            if mutated!(ResyncFromAcknowledged) { self.outbox.acknowledged() } else { expects };
        if self.outbox.acknowledged() < self.socket_until {
            // Those that are under way went over the socket, which has lost nothing. But their acknowledgement may have gone
            // by the queue pairs, and nothing else would ever repeat it.
            if mutated!(LostAcknowledgementForgotten) {
                return Ok(());
            }
            return self.on_ack(expects, env);
        }
        let freed = self
            .outbox
            .resync(expects)
            .ok_or(ProtocolError::Rule("it expects a notification that was not sent"))?;
        self.peer.release(freed.count, freed.bytes);
        self.try_finish_leaving(env);
        Ok(())
    }

    /// Says something about transport `rdma` to the peer. A peer that makes this side say more and more, and reads none of it,
    /// is cut off.
    pub(crate) fn tell(&mut self, header: Header) {
        let waiting = self.control.iter().filter(|waiting| waiting.kind.is_rdma()).count();
        if waiting < MAX_TOLD {
            return self.control.push_back(header);
        }
        if let Some(link) = self.session_link() {
            self.close(
                link,
                "protocol error: too many RDMA frames without reading the answers",
                false,
            );
        }
    }

    /// An acknowledgement was asked for.
    pub(crate) fn acknowledge_now(&mut self) {
        self.ack = super::AckPlan::Now;
    }

    /// All notifications that were sent have been acknowledged.
    pub(crate) fn is_all_acknowledged(&self) -> bool {
        self.outbox.is_all_acknowledged()
    }
}
