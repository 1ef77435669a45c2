//! A peer on the same host: transfers that are copied by this side, notifications that go through shared
//! memory. What that memory holds, the driver knows; here is what is sent where, and in which order.
//!
//! Notifications have one order and two ways. A way is changed only when all that went the other one has
//! arrived: the socket is taken when the ring is empty, the ring when what went over the socket is
//! acknowledged. So nothing has to be put in order at the other side.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::requests::{Active, ActiveKey};
use super::{Core, Env, ProtocolError};
use crate::error::Error;
use crate::plan::{Class, Device, PlanInner};
use crate::session::inbox::Arrival;
use crate::session::outbox::Fragment;
use crate::transfer::TransferShared;
use crate::transport::local::{LocalPath, Message};

/// Whether transfers are copied by this side.
#[derive(Debug, Default)]
pub(super) enum Local {
    /// The session has no such way, or there is no session.
    #[default]
    Off,
    /// The session's link is on this host, and it is being found out: transfers wait.
    Pending,
    Up(Arc<LocalPath>),
}

/// The ring to the peer, as the driver has just seen it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingState {
    /// It has room for a message of any length.
    pub(crate) has_room: bool,
    /// The peer has taken everything.
    pub(crate) is_empty: bool,
    /// The longest notification that it takes.
    pub(crate) longest: usize,
}

impl Core {
    /// The session's link is up on this host; `local_resolved` tells what came of it.
    pub(super) fn local_pending(&mut self, on_this_host: bool, env: &mut Env<'_>) {
        // Of an earlier session.
        self.local_reason.clear();
        self.local = if on_this_host { Local::Pending } else { Local::Off };
        if self.rdma_expected && !on_this_host {
            self.rdma_pending();
        } else {
            self.peer.settled.store(!on_this_host, Ordering::Release);
        }
        if !on_this_host {
            self.enqueue_on_device(env);
        }
    }

    /// Transfers of GPU memory that waited: they go on, or end because nothing carries them.
    pub(super) fn enqueue_on_device(&mut self, env: &mut Env<'_>) {
        for key in std::mem::take(&mut self.on_device) {
            self.enqueue(key, env);
        }
    }

    /// Puts a transfer of GPU memory where the driver takes it up, or ends it.
    fn enqueue_device(&mut self, key: ActiveKey, env: &mut Env<'_>) {
        let Some(active) = self.live(key) else { return };
        let (plan, begun) = (active.plan().clone(), active.has_begun() || active.is_packed());
        if self.is_copied_by_gpu(&plan) && !begun {
            return self.copies.push_back(key);
        }
        let reason = match (&self.local, plan.on_device()) {
            (Local::Pending, _) => return self.on_device.push_back(key),
            (Local::Off, _) if self.session_link().is_none() => {
                return self.on_device.push_back(key);
            }
            // Devices may come to carry it, unless frames do already.
            _ if self.is_rdma_pending() && plan.may_be_wired() && !begun => {
                return self.on_device.push_back(key);
            }
            (Local::Up(path), Some(device)) => path.obstacle(device).unwrap_or_default(),
            (Local::Up(_), None) => match &plan.device {
                Some(Device::Elsewhere(reason)) => reason.clone(),
                _ => "the plan was never made ready".into(),
            },
            (Local::Off, _) if self.local_reason.is_empty() => {
                "the peer is on another host, or transport `local` is not allowed".into()
            }
            (Local::Off, _) => format!("transport `local` fails: {}", self.local_reason),
        };
        if self.are_frames_allowed() {
            return self.enqueue_staged(key);
        }
        let rdma = if self.is_rdma_up() {
            format!("transport `rdma`: {}; ", plan.why_not_wired())
        } else if self.rdma_reason.is_empty() {
            String::new()
        } else {
            format!("transport `rdma` fails: {}; ", self.rdma_reason)
        };
        let reason = format!("{rdma}transport `tcp` is not allowed by both sides; {reason}");
        let error = Error::NoTransport { peer: self.peer.name.clone(), reason };
        self.fail(key.slot, error, env);
    }

    /// Whether a GPU of ours copies this plan.
    fn is_copied_by_gpu(&self, plan: &PlanInner) -> bool {
        match (&self.local, plan.on_device()) {
            (Local::Up(path), Some(device)) => path.obstacle(device).is_none(),
            _ => false,
        }
    }

    /// Whether both sides allow transfers to go as frames over a socket.
    pub(crate) fn set_frames_allowed(&mut self, allowed: bool) {
        self.peer.framed.store(allowed, Ordering::Relaxed);
    }

    /// Whether both sides have devices, so that a session begins with finding out whether they reach each other.
    pub(crate) fn set_rdma_expected(&mut self, expected: bool) {
        self.rdma_expected = expected;
    }

    pub(crate) fn are_frames_allowed(&self) -> bool {
        self.peer.framed.load(Ordering::Relaxed)
    }

    /// Whether it is being found out how to reach the peer's memory.
    pub(super) fn is_local_pending(&self) -> bool {
        matches!(self.local, Local::Pending)
    }

    pub(super) fn local_off(&mut self) {
        self.local = Local::Off;
        self.ring = None;
        self.socket_until = 0;
        // Those that were never begun take whatever way the next link has.
        while let Some(key) = self.copies.pop_front() {
            self.enqueue_for_links(key);
        }
    }

    /// The way to the peer's memory, or why there is none. Transfers that waited for it go on.
    pub(crate) fn local_resolved(
        &mut self,
        outcome: Result<Arc<LocalPath>, String>,
        env: &mut Env<'_>,
    ) {
        if !self.is_local_pending() {
            return;
        }
        self.local = match outcome {
            Ok(path) => Local::Up(path),
            Err(reason) => {
                self.local_reason = reason;
                Local::Off
            }
        };
        self.peer.settled.store(true, Ordering::Release);
        self.enqueue_waiting(env);
        self.enqueue_on_device(env);
    }

    /// Transfers that waited for it to be known which way they go.
    pub(super) fn enqueue_waiting(&mut self, env: &mut Env<'_>) {
        let waiting: Vec<ActiveKey> = self.latency.drain(..).chain(self.bulk.drain(..)).collect();
        for key in waiting {
            self.enqueue(key, env);
        }
        self.want_bulk();
    }

    /// Puts a transfer where links take it up.
    pub(super) fn enqueue_for_links(&mut self, key: ActiveKey) {
        let Some(plan) = self.live(key).map(Active::plan) else { return };
        if plan.device.is_some() {
            // No link carries it.
            return self.on_device.push_back(key);
        }
        match plan.class {
            Class::Latency => self.latency.push_back(key),
            Class::Bulk => self.bulk.push_back(key),
        }
    }

    /// Puts a transfer where it is taken up: by the driver to copy it, or by a link. One that nothing may
    /// carry ends.
    pub(super) fn enqueue(&mut self, key: ActiveKey, env: &mut Env<'_>) {
        let Some(active) = self.live(key) else { return };
        // A transfer that some of is done may have begun as requests over a link: it goes on there.
        let plan = active.plan();
        let copied = matches!(&self.local, Local::Up(path) if path.carries(plan));
        if copied {
            return self.copies.push_back(key);
        }
        let untouched = !active.has_begun() && !active.is_packed();
        if untouched && self.is_wired(plan) && !self.is_copied_by_gpu(plan) {
            return self.wired.push_back(key);
        }
        if plan.device.is_some() {
            return self.enqueue_device(key, env);
        }
        let connected = self.session_link().is_some() && !self.is_way_pending();
        if connected && !self.are_frames_allowed() && self.is_rdma_up() {
            let reason = "the region is not registered for transport `rdma`, the only one allowed, or not \
                          with this permission";
            let error = Error::Permission { peer: self.peer.name.clone(), reason };
            return self.fail(key.slot, error, env);
        }
        if connected && !self.are_frames_allowed() {
            let reason = match &self.local {
                Local::Up(path) => format!(
                    "its memory cannot be reached from this process ({}), and transport `tcp` is not allowed",
                    path.reason().unwrap_or("no reason is known"),
                ),
                _ => self.why_no_way(),
            };
            let error = Error::Connect { peer: self.peer.name.clone(), reason };
            return self.fail(key.slot, error, env);
        }
        self.enqueue_for_links(key);
    }

    fn why_no_way(&self) -> String {
        let mut reasons = Vec::new();
        if !self.local_reason.is_empty() {
            reasons.push(format!("transport `local` fails: {}", self.local_reason));
        }
        if !self.rdma_reason.is_empty() {
            reasons.push(format!("transport `rdma` fails: {}", self.rdma_reason));
        }
        if reasons.is_empty() {
            reasons.push("the memory is not registered for transport `rdma`".into());
        }
        reasons.push("no other transport is allowed".into());
        reasons.join("; ")
    }

    /// The next transfer to copy: its job is open, and `copied` is called once nothing is left of it.
    pub(crate) fn next_copy(&mut self) -> Option<Arc<TransferShared>> {
        let Local::Up(path) = &self.local else { return None };
        let path = path.clone();
        loop {
            let key = self.copies.pop_front()?;
            if let Some(active) = self.live_mut(key) {
                return Some(active.begin_copy(path));
            }
        }
    }

    /// Somebody has copied the last chunk of a transfer, or may have.
    pub(crate) fn copied(&mut self, shared: &Arc<TransferShared>, env: &mut Env<'_>) {
        let slot = shared.lane_key();
        let Some(outcome) = self.end_copy(slot, shared) else { return };
        match outcome {
            Ok(()) => self.finish(slot, env),
            Err(error) => self.fail(slot, error, env),
        }
    }

    /// What the driver has seen of the ring; `None`: there is none.
    pub(crate) fn set_ring(&mut self, ring: Option<RingState>) {
        self.ring = ring;
    }

    /// The next message for the ring, which has room for it.
    pub(crate) fn next_ring_message(&mut self, env: &mut Env<'_>) -> Option<Message<Arc<[u8]>>> {
        if self.session == 0 || !self.confirmed {
            return None;
        }
        let longest = self.ring.map_or(0, |ring| ring.longest);
        if self.outbox.acknowledged() >= self.socket_until
            && let Some(Fragment { seq, payload, .. }) = self.outbox.next_whole(longest)
        {
            env.counters.notifications_sent.add(1);
            let ack = self.acknowledgement(true, env).unwrap_or(0);
            return Some(Message::Notify { seq, ack, payload });
        }
        self.acknowledgement(false, env).map(Message::Ack)
    }

    /// Whether the next notification may go over the socket now.
    pub(super) fn may_use_socket(&self) -> bool {
        let Some(ring) = self.ring else { return true };
        !self.may_use_ring() && (ring.is_empty || self.outbox.is_between_fragments())
    }

    /// Whether acknowledgements go through the ring.
    pub(super) fn acknowledges_by_ring(&self) -> bool {
        self.ring.is_some_and(|ring| ring.has_room)
    }

    /// Whether a notification waits to be sent.
    pub(crate) fn has_unsent(&self) -> bool {
        self.outbox.has_unsent()
    }

    /// Whether something waits for the ring: for room, or for the peer to empty it.
    pub(crate) fn waits_for_ring(&self) -> bool {
        self.ring.is_some_and(|ring| {
            self.outbox.has_unsent() && (!ring.has_room || (!ring.is_empty && !self.may_use_ring()))
        })
    }

    /// Whether the next notification is one for the ring.
    fn may_use_ring(&self) -> bool {
        self.ring.is_some_and(|ring| self.outbox.is_next_whole(ring.longest))
            && self.outbox.acknowledged() >= self.socket_until
    }

    /// A message of the peer's ring.
    ///
    /// # Errors
    /// The peer broke the protocol: close the link.
    pub(crate) fn on_ring_message(
        &mut self,
        message: Message<Vec<u8>>,
        env: &mut Env<'_>,
    ) -> Result<(), ProtocolError> {
        self.confirmed = true;
        self.heard(env.now);
        match message {
            Message::Ack(below) => self.on_ack(below, env),
            Message::Notify { seq, ack, payload } => {
                if ack != 0 {
                    self.on_ack(ack, env)?;
                }
                let len = payload.len() as u64;
                let arrival = Arrival { seq, offset: 0, len, total: len, bound: None, void: false };
                self.inbox.check(&arrival)?;
                self.inbox.arrive(&arrival, payload)?;
                self.deliver(env);
                Ok(())
            }
        }
    }
}
