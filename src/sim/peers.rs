//! The peers of an engine: what its application asks of them, and the turns in which their cores are served.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::copies::Attachment;
use super::coverage::{self, Event as Input};
use super::node::{
    Node, Outside, Peer, PlanHandle, TicketHandle, TicketKind, TransferHandle, instant,
};
use super::wired::Wire;
use super::{Levels, Way};
use crate::error::{Error, Result};
use crate::peer::{NO_SLOT, PeerShared};
use crate::session::{Core, CoreConfig, Env, Event};
use crate::sync::Ticket;
use crate::transfer::TransferShared;
use crate::wire::Metadata;
use crate::wire::hello::LinkKind;

/// The attempt to open a session link.
pub(super) struct Connector {
    pub(super) untried: Vec<SocketAddr>,
    pub(super) link: Option<u64>,
    pub(super) deadline: Instant,
    /// Both sides connected at the same time: look again then.
    pub(super) again: Option<Instant>,
    pub(super) refused: bool,
}

/// One peer of an engine.
pub(super) struct NodePeer {
    pub(super) core: Core,
    /// Those whose frames flow.
    pub(super) links: Vec<u64>,
    pub(super) connector: Option<Connector>,
    pub(super) address: Option<SocketAddr>,
    dirty: bool,
    unload: bool,
    born: u64,
    /// As in the engine's lane.
    pub(super) connects_later: Option<bool>,
    /// The session's link, where a ring belongs to it that both sides have.
    pub(super) ring: Option<u64>,
    /// What the two share of their memory.
    pub(super) local: Option<Attachment>,
    /// The queue pair of the session.
    pub(super) wire: Option<Wire>,
}

impl Node {
    pub(super) fn slot_of(&self, peer: &Arc<PeerShared>) -> Option<usize> {
        let slot = peer.slot.load(Ordering::Relaxed) as usize;
        self.peers.get(slot).filter(|known| Arc::ptr_eq(&known.core.peer, peer)).map(|_| slot)
    }

    pub(super) fn add_peer(&mut self, peer: &Arc<PeerShared>, mirror: bool) -> usize {
        if let Some(slot) = self.slot_of(peer) {
            return slot;
        }
        let config = CoreConfig {
            operation_timeout: self.config.operation_timeout,
            stream_idle: self.config.stream_idle,
            streams: self.config.streams,
        };
        let mut core = Core::new(peer.clone(), config, self.config.incarnation, !mirror);
        core.set_rdma_expected(self.config.way == Way::Wired);
        let slot = self.peers.insert(NodePeer {
            core,
            links: Vec::new(),
            connector: None,
            address: None,
            dirty: false,
            unload: false,
            born: self.next_birth,
            connects_later: None,
            ring: None,
            local: None,
            wire: None,
        });
        self.next_birth += 1;
        peer.slot.store(slot as u32, Ordering::Relaxed);
        slot
    }

    /// Whether who was unloaded before it is still being left.
    fn is_preceded(&self, slot: usize) -> bool {
        let Some(peer) = self.peers.get(slot) else { return false };
        let incarnation = peer.core.peer.incarnation;
        self.peers.iter().any(|(_, other)| {
            other.unload && other.born < peer.born && other.core.peer.incarnation == incarnation
        })
    }

    fn start_session(&mut self, slot: usize, again: bool, out: &mut dyn Outside) {
        let later = self.is_preceded(slot);
        self.peers[slot].connects_later = later.then_some(again);
        if later {
            return;
        }
        let config = &self.config;
        let timeout = if again { config.reconnect_timeout } else { config.connect_timeout };
        self.connect_session(slot, self.now + timeout, out);
    }

    fn connect_next(&mut self, incarnation: u128, out: &mut dyn Outside) {
        let waiting: Vec<(usize, bool)> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.core.peer.incarnation == incarnation)
            .filter_map(|(slot, peer)| Some((slot, peer.connects_later?)))
            .collect();
        for (slot, again) in waiting {
            self.start_session(slot, again, out);
        }
    }

    fn remove_peer(&mut self, slot: usize, out: &mut dyn Outside) {
        for link in self.peers[slot].links.clone() {
            self.close_link(link, "the peer was unloaded", out);
        }
        self.abort_connect(slot, out);
        for link in self.links_of(slot) {
            self.links.remove(&link);
            out.close(link);
        }
        self.finish_copies(out);
        self.with_core(slot, Input::Abort, |core, env| core.abort(&Error::Cancelled, env));
        let peer = self.peers.remove(slot);
        peer.core.peer.slot.store(NO_SLOT, Ordering::Relaxed);
        peer.core.peer.set_forgotten();
        peer.core.peer.connected.store(false, Ordering::Release);
        self.connect_next(peer.core.peer.incarnation, out);
    }

    /// Calls into a peer's core.
    pub(super) fn with_core<R>(
        &mut self,
        slot: usize,
        input: Input,
        call: impl FnOnce(&mut Core, &mut Env<'_>) -> R,
    ) -> R {
        let peer = &mut self.peers[slot];
        coverage::session(peer.core.session_state(), input);
        let mut env = Env {
            now: self.now,
            clock: None,
            regions: &mut self.regions,
            notifications: &self.queue,
            counters: &self.counters,
        };
        let result = call(&mut peer.core, &mut env);
        self.mark(slot);
        result
    }

    /// As `with_core`, for what is no event.
    pub(super) fn quiet_core<R>(
        &mut self,
        slot: usize,
        call: impl FnOnce(&mut Core, &mut Env<'_>) -> R,
    ) -> R {
        let mut env = Env {
            now: self.now,
            clock: None,
            regions: &mut self.regions,
            notifications: &self.queue,
            counters: &self.counters,
        };
        call(&mut self.peers[slot].core, &mut env)
    }

    pub(super) fn mark(&mut self, slot: usize) {
        if let Some(peer) = self.peers.get_mut(slot)
            && !peer.dirty
        {
            peer.dirty = true;
            self.dirty.push(slot);
        }
    }

    // What the application asks for.

    /// Makes a peer known by its metadata.
    ///
    /// # Errors
    /// Those of [`crate::Engine::load_peer`].
    pub fn load(&mut self, metadata: &[u8]) -> Result<Peer> {
        let loaded = self.table.load(Metadata::decode(metadata)?)?;
        self.add_peer(&loaded.peer, false);
        if let Some(old) = loaded.replaced
            && let Some(slot) = self.slot_of(&old)
        {
            self.with_core(slot, Input::Retire, Core::retire);
        }
        Ok(Peer(loaded.peer))
    }

    /// The peer with this incarnation, loaded or not.
    pub fn peer(&self, incarnation: u128) -> Option<Peer> {
        self.table.all().find(|peer| peer.incarnation == incarnation).cloned().map(Peer)
    }

    /// Disconnects a peer and forgets it.
    pub fn unload(&mut self, peer: &Peer) -> TicketHandle {
        self.table.remove(&peer.0);
        peer.0.set_unloaded();
        if let Some(slot) = self.slot_of(&peer.0) {
            self.peers[slot].unload = true;
        }
        self.disconnect(peer)
    }

    /// Ends the session with a peer.
    pub fn disconnect(&mut self, peer: &Peer) -> TicketHandle {
        let ticket = Ticket::new();
        match self.slot_of(&peer.0) {
            Some(slot) => {
                let deadline = self.now + self.config.linger;
                let answer = ticket.clone();
                self.with_core(slot, Input::Leave, |core, env| core.leave(deadline, answer, env));
            }
            None => ticket.complete(0),
        }
        TicketHandle(TicketKind::Left(ticket))
    }

    /// Connects to a peer.
    pub fn connect(&mut self, peer: &Peer) -> TicketHandle {
        let ticket = Ticket::new();
        match self.slot_of(&peer.0) {
            Some(slot) => {
                let answer = ticket.clone();
                self.with_core(slot, Input::Connect, |core, env| core.request_connect(answer, env));
            }
            None => ticket.complete(Err(peer.0.unloaded())),
        }
        TicketHandle(TicketKind::Connect(ticket))
    }

    /// Shuts down: leaves all peers, and lets nobody in any more.
    pub fn shut_down(&mut self) {
        self.stopping = true;
        let deadline = self.now + self.config.linger;
        let slots: Vec<usize> = self.peers.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.with_core(slot, Input::Leave, |core, env| {
                core.leave(deadline, Ticket::new(), env);
            });
        }
    }

    /// Whether nobody is left to say goodbye to.
    pub fn has_shut_down(&self) -> bool {
        self.peers.iter().all(|(_, peer)| peer.core.has_left())
    }

    /// Ends all at once, as the drop of an engine does.
    pub fn abort(&mut self, out: &mut dyn Outside) {
        self.finish_copies(out);
        self.neighbours.shut();
        self.destroy_wires(out);
        let slots: Vec<usize> = self.peers.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.with_core(slot, Input::Abort, |core, env| core.abort(&Error::Shutdown, env));
            self.peers[slot].core.peer.connected.store(false, Ordering::Release);
        }
        for link in std::mem::take(&mut self.links).into_keys() {
            out.close(link);
        }
    }

    /// Sends a free-standing notification.
    ///
    /// # Errors
    /// [`Error::Backpressure`]; why a peer that is unloaded, or that only it could connect to, is gone.
    pub fn notify(&mut self, peer: &Peer, payload: &[u8]) -> Result<()> {
        if let Some(error) = peer.0.refuses() {
            return Err(error);
        }
        peer.0.reserve(payload.len())?;
        let Some(slot) = self.slot_of(&peer.0) else {
            // As in the engine's lane. Here no message is under way while a peer is forgotten.
            peer.0.release(1, payload.len());
            self.counters.notifications_dropped.add(1);
            return Ok(());
        };
        self.with_core(slot, Input::Notify, |core, env| core.notify(payload.into(), env));
        Ok(())
    }

    /// Posts a transfer.
    ///
    /// # Errors
    /// [`Error::Busy`] while it is in flight or too many are; [`Error::Backpressure`].
    pub fn post(&mut self, transfer: &TransferHandle, notification: Option<&[u8]>) -> Result<()> {
        let shared = &transfer.0;
        let peer = &shared.plan.peer;
        let busy = Error::Busy { what: "the transfer", hint: "" };
        let before = shared.slot.begin().ok_or(busy.clone())?;
        if let Some(payload) = notification {
            if let Err(error) = peer.reserve(payload.len()) {
                shared.slot.abort(before);
                return Err(error);
            }
            *shared.notification() = Some(payload.into());
        }
        if !peer.try_enter() {
            if let Some(payload) = shared.take_notification() {
                peer.release(1, payload.len());
            }
            shared.slot.abort(before);
            return Err(busy);
        }
        match self.slot_of(peer) {
            Some(slot) if !self.peers[slot].unload => {
                let shared = shared.clone();
                self.with_core(slot, Input::Post, |core, env| core.post(shared, env));
            }
            _ => refuse(shared, &peer.unloaded()),
        }
        Ok(())
    }

    /// Asks for the end of a transfer.
    pub fn cancel(&mut self, transfer: &TransferHandle) {
        if transfer.0.slot.state() != crate::sync::SlotState::Posted {
            return;
        }
        if let Some(slot) = self.slot_of(&transfer.0.plan.peer) {
            self.with_core(slot, Input::Cancel, |core, env| core.cancel(&transfer.0, env));
        }
    }

    // Turns.

    /// Does what the cores ask for, and sends what they have; returns when there is nothing left to be done now.
    pub fn turn(&mut self, out: &mut dyn Outside) {
        let mut at = 0;
        while let Some(&slot) = self.dirty.get(at) {
            at += 1;
            let Some(peer) = self.peers.get_mut(slot) else { continue };
            peer.dirty = false;
            self.handle_events(slot, out);
            self.flush_peer(slot, out);
            self.handle_events(slot, out);
        }
        self.dirty.clear();
    }

    pub(super) fn handle_events(&mut self, slot: usize, out: &mut dyn Outside) {
        while let Some(event) = self.peers.get_mut(slot).and_then(|p| p.core.poll_event()) {
            match event {
                Event::Connect { kind: LinkKind::Session, again } => {
                    self.start_session(slot, again, out);
                }
                Event::Connect { kind: LinkKind::Bulk, .. } => self.connect_bulk(slot, out),
                Event::AbortConnect => self.abort_connect(slot, out),
                Event::Close { link, reason, after_flush } => {
                    if after_flush {
                        self.flush_link(link, out);
                    }
                    self.close_link(link, &reason, out);
                }
                Event::StopWired { key, stuck } => self.stop_wired(slot, key, stuck, out),
                Event::Left => {
                    if self.peers.get(slot).is_some_and(|peer| peer.unload) {
                        return self.remove_peer(slot, out);
                    }
                }
                Event::Forget => {
                    let peer = self.peers[slot].core.peer.clone();
                    if self.mirror != Some(slot) && self.table.forget(&peer) {
                        return self.remove_peer(slot, out);
                    }
                }
            }
        }
    }

    /// When to call `on_time`.
    pub fn next_timeout(&self) -> Option<Duration> {
        let peers = self.peers.iter().filter_map(|(_, peer)| {
            let connector = peer
                .connector
                .as_ref()
                .and_then(|connector| connector.again.or(Some(connector.deadline)));
            let wire = peer.wire.as_ref().and_then(|wire| wire.deadline);
            [peer.core.next_timeout(), connector, wire].into_iter().flatten().min()
        });
        let links = self.links.values().filter_map(super::links::Link::deadline);
        peers.chain(links).min().map(|at| at.saturating_duration_since(instant(Duration::ZERO)))
    }

    /// Does what time has made due.
    pub fn on_time(&mut self, out: &mut dyn Outside) {
        let now = self.now;
        let slots: Vec<usize> = self.peers.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            if self.peers[slot].core.next_timeout().is_some_and(|at| at <= now) {
                self.with_core(slot, Input::Time, Core::on_timeout);
            }
            self.connector_time(slot, out);
            self.wire_time(slot, out);
        }
        let late: Vec<u64> = self
            .links
            .iter()
            .filter(|(_, link)| link.deadline().is_some_and(|at| at <= now))
            .map(|(id, _)| *id)
            .collect();
        for link in late {
            self.handshake_failed(link, "its handshake took too long", None, out);
        }
    }

    /// How full everything is, peer by peer.
    pub fn levels(&self) -> impl Iterator<Item = (u128, Levels)> + '_ {
        self.peers.iter().map(|(_, peer)| (peer.core.peer.incarnation, peer.core.levels()))
    }

    /// Links that are on their way and have proven nothing.
    pub fn half_open(&self) -> usize {
        self.links.values().filter(|link| link.is_half_open()).count()
    }

    pub(super) fn has_ring(&self) -> bool {
        matches!(self.config.way, Way::Ring | Way::Copies)
    }
}

impl PlanHandle {
    /// The peer that it was prepared for.
    pub fn peer(&self) -> Peer {
        Peer(self.0.peer.clone())
    }
}

/// Ends a transfer that never reached a core.
fn refuse(transfer: &TransferShared, error: &Error) {
    let peer = &transfer.plan.peer;
    if let Some(payload) = transfer.take_notification() {
        peer.release(1, payload.len());
    }
    peer.leave();
    transfer.slot.complete(Err(error.clone()));
}
