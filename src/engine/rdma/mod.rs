//! Peers that are reached by RDMA: queue pairs are agreed on over the session's link, completions are polled, transfers and
//! notifications are posted.
//!
//! The side that opened the session's link offers. It makes its queue pairs and sends a `QUEUE_PAIR` for each; the other makes
//! and connects one for each, and answers; then the first connects its own and sends a `HELLO` on each, whose completion shows
//! that packets go there and back. RDMA up says which of them work, and from then on transfers use them.
//!
//! When one fails, all of the connection are destroyed, and both sides tell each other so by RDMA down: only then no packet of
//! the old ones can touch memory any more, and what was lost is begun again on new ones. Notifications that the peer does not
//! have are sent again.

mod connect;
mod failure;
mod transfers;

use std::time::{Duration, Instant};

use corelane_runtime::{Cx, Interest, Lane, Start};
use smallvec::SmallVec;

use self::failure::Blame;
use crate::engine::lane::{LaneDriver, Message, RDMA_CHANNEL, RDMA_EVENTS, RDMA_TIMER};
use crate::session::{LinkId, RailPairs};
use crate::transport::rdma::{Late, Link, PairId, Phase, Rail};
use crate::verbs::AsyncEvent;
use crate::wire::frame::Header;
use crate::wire::rdma::{QueuePairFrame, RdmaFrame, Verdict};

/// How long a rail that has failed is left alone.
const RAIL_PAUSE: Duration = Duration::from_secs(30);

impl LaneDriver {
    /// Watches the channels of this lane's completion queues, and on the first lane the devices' events.
    pub(in crate::engine) fn rdma_start(&mut self, cx: &mut Cx<'_>) {
        use std::os::fd::AsRawFd;
        for (rail, channel) in self.rdma.channels() {
            let token = RDMA_CHANNEL | rail as u64;
            cx.add_fd(channel.fd().as_raw_fd(), token, Interest::READABLE, Start::Quiet);
        }
        if self.index == 0 {
            for (index, rail) in self.rdma.rails().all().iter().enumerate() {
                let token = RDMA_EVENTS | index as u64;
                let fd = rail.device.events().as_raw_fd();
                cx.add_fd(fd, token, Interest::READABLE, Start::Quiet);
            }
        }
    }

    /// A session is up whose peer may be reached by RDMA: finds out whether it is.
    /// False: it may not.
    pub(in crate::engine) fn rdma_attach(
        &mut self,
        slot: usize,
        session: LinkId,
        cx: &mut Cx<'_>,
    ) -> bool {
        let theirs = self.peers.get(slot).map_or(0, |peer| peer.transports);
        if !self.rdma_expected(theirs) {
            return false;
        }
        let Some(peer) = self.peers.get_mut(slot) else { return false };
        let ours = peer.core.is_link_ours(session);
        let stripe = self.engine.config.rdma.stripe_bytes;
        peer.rdma = Some(Box::new(Link::new(session, ours, stripe)));
        peer.core.rdma_pending();
        let deadline = cx.now() + self.rdma_patience(ours);
        self.rdma_set_deadline(slot, deadline, cx);
        if ours {
            self.rdma_offer(slot, cx);
        }
        self.mark(slot);
        true
    }

    /// When to look at the link next, whatever happens.
    pub(super) fn rdma_set_deadline(&mut self, slot: usize, at: Instant, cx: &mut Cx<'_>) {
        self.rdma_clear_deadline(slot, cx);
        if let Some(link) = self.rdma_link(slot) {
            link.deadline = Some(at);
            link.timer = Some(cx.set_timer(at, RDMA_TIMER | slot as u64));
        }
    }

    pub(super) fn rdma_clear_deadline(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Some(link) = self.rdma_link(slot) else { return };
        link.deadline = None;
        if let Some(timer) = link.timer.take() {
            cx.cancel_timer(timer);
        }
    }

    /// How long the peer may take for its part of the agreement. What it does takes no longer than connecting, and that it lives
    /// is asked for otherwise.
    pub(super) fn rdma_patience(&self, offers: bool) -> Duration {
        let timeout = self.engine.config.connect_timeout;
        // Who offers gives up first, and says so.
        if offers { timeout } else { timeout + timeout }
    }

    /// How long it may take to say that its queue pairs are gone. One that stands still is silent first, which ends all at once:
    /// no further attempt to connect is waited for.
    pub(super) fn rdma_down_patience(&self) -> Duration {
        self.rdma_patience(true) + self.engine.config.liveness
    }

    /// The peer offers what this side has not asked for, since it has a better way or none; `Ok(true)`: it may.
    ///
    /// # Errors
    /// It is this side that offers, or nobody.
    pub(super) fn rdma_follow(
        &mut self,
        slot: usize,
        session: LinkId,
        header: &Header,
        cx: &mut Cx<'_>,
    ) -> Result<bool, String> {
        let offered =
            QueuePairFrame::decode(header).is_some_and(|frame| frame.verdict == Verdict::Offer);
        let theirs = self.peers.get(slot).map_or(0, |peer| peer.transports);
        let expected = self.rdma_expected(theirs);
        let stripe = self.engine.config.rdma.stripe_bytes;
        let Some(peer) = self.peers.get_mut(slot).filter(|_| offered) else { return Ok(false) };
        if peer.core.is_link_ours(session) {
            // What was made for it would be in the way of what this side may be about to offer.
            return Err("RDMA frames of the wrong side".into());
        }
        if !expected || peer.core.session_link() != Some(session) {
            self.rdma_tell(slot, RdmaFrame::None.encode());
            return Ok(false);
        }
        peer.rdma = Some(Box::new(Link::new(session, false, stripe)));
        let deadline = cx.now() + self.rdma_patience(false);
        self.rdma_set_deadline(slot, deadline, cx);
        Ok(true)
    }

    pub(super) fn rdma_link(&mut self, slot: usize) -> Option<&mut Link> {
        self.peers.get_mut(slot)?.rdma.as_deref_mut()
    }

    pub(super) fn rdma_tell(&mut self, slot: usize, header: Header) {
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.core.tell(header);
        }
        self.mark(slot);
    }

    /// The line that says how bytes will go to and from a peer.
    pub(super) fn log_rdma(&self, slot: usize, outcome: &Result<RailPairs, String>) {
        let Some(peer) = self.peers.get(slot) else { return };
        let name = &*peer.core.peer.name;
        let core = self.engine.lane(self.index).ok().and_then(Lane::core);
        let core = core.map_or("unpinned".to_owned(), |core| core.to_string());
        match outcome {
            Ok(rails) => {
                let all = self.rdma.rails();
                let named = |(own, _): &(usize, usize)| all.get(*own).map(Rail::name);
                let nics: Vec<String> = rails.iter().filter_map(named).collect();
                let pairs = peer.rdma.as_ref().map_or(0, |link| link.pairs.len());
                let (nics, lane) = (nics.join(","), self.index);
                tracing::info!(
                    peer = name,
                    transport = "rdma",
                    nics,
                    queue_pairs = pairs,
                    lane,
                    core,
                    "connected"
                );
            }
            Err(reason) => {
                let transport = if peer.core.are_frames_allowed() { "tcp" } else { "none" };
                tracing::warn!(peer = name, transport, reason, "no RDMA");
            }
        }
    }

    /// A timer of a link: what the peer has not done by now it is not waited for any more.
    pub(in crate::engine) fn rdma_timer(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let now = cx.now();
        // Another timer of this link, or of one that had its place before, may be early.
        let Some(link) = self.rdma_link(slot) else { return };
        match link.take_late(now) {
            Some(Late::Conclude) => {
                let late = std::mem::take(&mut link.undecided);
                let ids: SmallVec<[PairId; 4]> = link
                    .pairs
                    .iter()
                    .filter(|(index, _)| late >> (index % 64) & 1 != 0)
                    .map(|(_, id)| *id)
                    .collect();
                link.pairs.retain(|(index, _)| late >> (*index % 64) & 1 == 0);
                for id in ids {
                    drop(self.rdma.take_pair(id));
                }
                self.rdma_conclude(slot, cx);
            }
            Some(Late::GiveUp) => {
                self.rdma_destroy(slot, cx);
                let reason = "the peer offers no queue pair, or does not say which work";
                self.rdma_resolve(slot, Err(reason.into()), cx);
            }
            Some(Late::Offer) => {
                link.suspects = 0;
                link.failures = 0;
                let deadline = now + self.rdma_patience(true);
                self.rdma_set_deadline(slot, deadline, cx);
                self.rdma_offer(slot, cx);
            }
            Some(Late::Close) => {
                let session = link.session;
                // Where it is this lane that stood still, the answer is there.
                self.receive_last(session, cx);
                let waits = |link: &mut Link| link.phase == Phase::Down && link.deadline.is_none();
                if !self.rdma_link(slot).is_some_and(waits) {
                    return;
                }
                let patience = self.rdma_down_patience();
                let reason =
                    format!("it has not said within {patience:?} that its queue pairs are gone");
                self.close_link(session, &reason, cx);
            }
            None => {}
        }
    }

    // --- sleeping, and what devices tell

    /// Has the devices wake this lane; false: something has come by then.
    pub(in crate::engine) fn rdma_before_sleep(&mut self, cx: &mut Cx<'_>) -> bool {
        if self.rdma.is_idle() {
            return true;
        }
        self.rdma.arm();
        !self.poll_rdma(cx)
    }

    /// A channel or a device has something to tell.
    pub(in crate::engine) fn on_rdma_fd(&mut self, token: u64, cx: &mut Cx<'_>) -> bool {
        if token & RDMA_CHANNEL == RDMA_CHANNEL {
            self.rdma.take_events((token & !RDMA_CHANNEL) as usize);
            return self.poll_rdma(cx);
        }
        let rail = (token & !RDMA_EVENTS) as usize;
        let rails = self.rdma.rails().clone();
        let Some(device) = rails.get(rail).map(|rail| rail.device.clone()) else { return false };
        let mut any = false;
        while let Some(event) = device.next_event() {
            any = true;
            if let AsyncEvent::PortChanged(port) | AsyncEvent::PortUp(port) = event {
                let same = |rail: &&Rail| rail.device.name() == device.name() && rail.port == port;
                rails.all().iter().filter(same).for_each(Rail::look_up_address);
            }
            // Rails may be ports of one device: whoever looked first has it.
            for lane in self.engine.lanes() {
                let _ = lane.submit(Message::Rdma(Box::new((device.name().to_owned(), event))));
            }
        }
        any
    }

    /// Something has happened to a device.
    pub(in crate::engine) fn on_rdma_event(
        &mut self,
        device: &str,
        event: AsyncEvent,
        cx: &mut Cx<'_>,
    ) {
        let rails = self.rdma.rails().clone();
        for (index, rail) in rails.all().iter().enumerate() {
            if rail.device.name() != device {
                continue;
            }
            let reason = match event {
                AsyncEvent::PortDown(port) if port == rail.port => {
                    rail.set_down(true);
                    "its port is down"
                }
                AsyncEvent::PortUp(port) if port == rail.port => {
                    rail.set_down(false);
                    // Queue pairs that are made from now on are made on it, too.
                    for (_, peer) in &mut self.peers {
                        if let Some(link) = peer.rdma.as_deref_mut() {
                            link.suspects &= !(1 << index);
                        }
                    }
                    continue;
                }
                AsyncEvent::Fatal => {
                    rail.set_dead();
                    "the device is gone"
                }
                AsyncEvent::QueuePair(number) => {
                    if let Some(slot) = self.rdma.peer_of(index, number) {
                        // Its completions say more, if they are there already.
                        self.drain_rdma(cx);
                        let reason = "the device says that a queue pair is in error";
                        self.rdma_fail(slot, &Blame::Unsaid, reason, cx);
                    }
                    continue;
                }
                AsyncEvent::CompletionQueue(name) => {
                    self.rdma.set_broken(index, name);
                    self.poll_rdma(cx);
                    continue;
                }
                _ => continue,
            };
            if self.index == 0 {
                tracing::warn!(rail = rail.name(), reason, "a rail is out of use");
            }
            let slots: Vec<usize> = self.peers.iter().map(|(slot, _)| slot).collect();
            for slot in slots {
                if self.uses_rail(slot, index) {
                    let reason = format!("{}: {reason}", rail.name());
                    self.rdma_fail(slot, &Blame::Rail(index), &reason, cx);
                }
            }
        }
    }

    pub(super) fn uses_rail(&mut self, slot: usize, rail: usize) -> bool {
        let Some(link) = self.rdma_link(slot) else { return false };
        let ids: SmallVec<[PairId; 4]> = link.pairs.iter().map(|(_, id)| *id).collect();
        ids.into_iter().any(|id| self.rdma.pair(id).is_some_and(|pair| pair.rail == rail))
    }
}
