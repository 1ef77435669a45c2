//! What one lane drives: its peers, their links, its copy of the region table.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use corelane_runtime::{Cx, Driver, FdId, Interest, Readiness, Start, TimerId};
use slab::Slab;
use smallvec::SmallVec;

use super::EngineShared;
use super::accept::Adopted;
use super::connect::Connector;
use super::equipment::Equipment;
use super::gpu::GpuCopies;
use super::issued::{self, Issuers};
use super::links::Link;
use super::local::Attachment;
use super::strays::Strays;
use crate::error::Error;
use crate::memory::{LaneRegions, RegionInner};
use crate::peer::{NO_SLOT, PeerShared};
use crate::session::{ConnectTicket, Core, CoreConfig, Env, Event, LinkId};
use crate::stats::Counters;
use crate::sync::Ticket;
use crate::transfer::{Issuer, TransferShared};
use crate::transport::addresses::Remote;
use crate::transport::link::Scratch;
use crate::transport::local::Accessor;
use crate::transport::local::{Held, Pid};
use crate::transport::rdma::{AsyncEvent, LaneRdma, Link as RdmaLink};

/// What other threads send to a lane.
pub(crate) enum Message {
    Post(Arc<TransferShared>),
    Cancel(Arc<TransferShared>),
    Notify(Box<(Arc<PeerShared>, Arc<[u8]>)>),
    Connect(Arc<PeerShared>, ConnectTicket),
    Disconnect(Arc<PeerShared>, Arc<Ticket<usize>>),
    AddPeer(Arc<PeerShared>),
    RemovePeer(Arc<PeerShared>),
    /// Disconnect and forget.
    Unload(Arc<PeerShared>, Arc<Ticket<usize>>),
    /// Other metadata was loaded under the peer's name: it is over.
    Retire(Arc<PeerShared>),
    AddRegion(Arc<RegionInner>),
    /// What this lane needs of a GPU.
    Equip(Box<Equipment>),
    CloseRegion(Arc<RegionInner>, Arc<Ticket<()>>),
    /// Another lane's transfer, to be copied by whoever has time.
    Help(Arc<TransferShared>),
    /// Somebody has copied the last chunk of a transfer.
    Copied(Arc<TransferShared>),
    /// A caller has begun a copy of a GPU.
    Issued(Arc<Issuer>),
    /// A link that another lane accepted and that belongs here.
    Adopt(Box<Adopted>),
    /// Something has happened to an RDMA device.
    Rdma(Box<(String, AsyncEvent)>),
    /// The application has made room for notifications.
    Drain,
    /// The engine shuts down: leave all peers.
    Leave,
}

/// Tokens of descriptors and timers: a tag above a 60-bit number.
pub(super) const LISTENER: u64 = 1 << 63;
pub(super) const PEER_TIMER: u64 = 1 << 63;
pub(super) const CONNECT_TIMER: u64 = 1 << 62;
/// Something waits for the notification ring of a peer on this host.
pub(super) const LOCAL_TIMER: u64 = 1 << 61;
/// Queue pairs to a peer should be there by now, or are tried again.
pub(super) const RDMA_TIMER: u64 = 1 << 60;
/// The process of a peer on this host may be dying. Both tags: asked for before either.
pub(super) const DEATH_TIMER: u64 = LOCAL_TIMER | RDMA_TIMER;
/// A peer on this host should have done its part of sharing memory by now.
pub(super) const ATTACH_TIMER: u64 = PEER_TIMER | LOCAL_TIMER;
/// Descriptors: the events of a device, and the completion channel of a rail.
pub(super) const RDMA_EVENTS: u64 = 1 << 62;
pub(super) const RDMA_CHANNEL: u64 = RDMA_EVENTS | 1 << 61;
/// Both tags of timers: a listener that rests is watched again.
const LISTENER_TIMER: u64 = PEER_TIMER | CONNECT_TIMER;
const TAGS: u64 = LISTENER | CONNECT_TIMER;
/// What copying and the like may take of one turn.
pub(super) const LANE_TURN: std::time::Duration = std::time::Duration::from_micros(100);
/// How long a listener rests that cannot accept.
const LISTENER_REST: std::time::Duration = std::time::Duration::from_millis(100);

/// One peer on its lane.
pub(super) struct LanePeer {
    pub(super) core: Core,
    pub(super) links: SmallVec<[LinkId; 4]>,
    pub(super) connector: Option<Connector>,
    /// Why the last attempt to connect has not reached it on this host.
    pub(super) not_local: Option<String>,
    /// The address that worked last: bulk links go there.
    pub(super) address: Option<Remote>,
    timer: Option<(Instant, TimerId)>,
    dirty: bool,
    /// Until then, failures to connect are counted and not logged.
    pub(super) silent_until: Option<Instant>,
    pub(super) unsaid_failures: u32,
    /// To be forgotten once it has been left.
    pub(super) unload: bool,
    /// In which order they came.
    pub(super) born: u64,
    /// It is to connect once who was unloaded before it has left: `again` of the event that asked for it.
    pub(super) connects_later: Option<bool>,
    /// What is shared with a peer on this host.
    pub(super) local: Option<Box<Attachment>>,
    /// Whose memory it was, while there is no session.
    pub(super) last_process: Option<Arc<Accessor>>,
    /// Its process, while something is expected of it on this host and its life is not watched, and when it is asked for next.
    pub(super) suspect: Option<(Pid, TimerId)>,
    /// The queue pairs to it.
    pub(super) rdma: Option<Box<RdmaLink>>,
    /// The transports that it allows.
    pub(super) transports: u32,
}

impl LanePeer {
    /// Nothing new may begin with it.
    pub(super) fn is_leaving(&self) -> bool {
        self.unload || self.core.is_leaving()
    }
}

/// The state of one lane. All of it belongs to whoever holds the lane's pump.
pub(crate) struct LaneDriver {
    pub(super) engine: Arc<EngineShared>,
    pub(super) index: usize,
    pub(super) counters: Arc<Counters>,
    pub(super) regions: LaneRegions,
    pub(super) peers: Slab<LanePeer>,
    pub(super) links: Slab<Link>,
    pub(super) next_stamp: u32,
    next_birth: u64,
    pub(super) scratch: Scratch,
    /// Peers with something to do at the end of this turn.
    dirty: Vec<usize>,
    /// Peers that could not finish their sends in their share of the turn.
    pub(super) busy: Vec<usize>,
    listeners: Vec<(OwnedFd, FdId)>,
    /// Transfers that are being copied by this lane, those of other lanes included.
    pub(super) copies: VecDeque<Arc<TransferShared>>,
    /// Peers whose notification rings are polled, and the one that was last.
    pub(super) rings: Vec<usize>,
    pub(super) next_ring: usize,
    /// The peers on this host have been told that this lane sleeps.
    pub(super) asleep: bool,
    /// Links that have not proven anything yet, oldest first.
    pub(super) half_open: VecDeque<LinkId>,
    pub(super) mirror: Option<usize>,
    pub(super) rdma: LaneRdma,
    pub(super) gpu: GpuCopies,
    pub(super) issuers: Issuers,
    leaving: bool,
    strays: Strays,
    /// Shows peers on this host that this process lives, of the first lane.
    _life: Option<Held>,
}

impl LaneDriver {
    pub(crate) fn new(
        engine: Arc<EngineShared>,
        index: usize,
        listeners: Vec<OwnedFd>,
        cx: &mut Cx<'_>,
    ) -> Self {
        use std::os::fd::AsRawFd;
        let listeners = listeners
            .into_iter()
            .enumerate()
            .map(|(number, listener)| {
                let (raw, token) = (listener.as_raw_fd(), LISTENER | number as u64);
                let fd_id = cx.add_fd(raw, token, Interest::READABLE, Start::Quiet);
                (listener, fd_id)
            })
            .collect();
        let counters = engine.counters[index].clone();
        let rdma = LaneRdma::new(engine.rails.clone());
        let life = engine.table.as_ref().filter(|_| index == 0).and_then(|table| {
            let told =
                |error| tracing::warn!(%error, "peers will see the death of this process late");
            table.hold_lives().map_err(told).ok()
        });
        let engine_config = engine.config.gpu.clone();
        let mut driver = Self {
            engine,
            index,
            counters,
            regions: LaneRegions::default(),
            peers: Slab::new(),
            links: Slab::new(),
            next_stamp: 0,
            next_birth: 0,
            scratch: Scratch::new(engine_config.staging_bytes / 2),
            dirty: Vec::with_capacity(64),
            busy: Vec::with_capacity(64),
            listeners,
            copies: VecDeque::with_capacity(64),
            rings: Vec::new(),
            next_ring: 0,
            asleep: false,
            half_open: VecDeque::new(),
            mirror: None,
            rdma,
            gpu: GpuCopies::new(&engine_config),
            issuers: Issuers::new(),
            leaving: false,
            strays: Strays::default(),
            _life: life,
        };
        driver.rdma_start(cx);
        driver
    }

    pub(super) fn listener(&self, number: usize) -> Option<&OwnedFd> {
        self.listeners.get(number).map(|(socket, _)| socket)
    }

    /// Looks away from a listener that cannot accept, for a while.
    pub(super) fn rest_listener(&mut self, number: usize, cx: &mut Cx<'_>) {
        if let Some((_, fd_id)) = self.listeners.get(number) {
            cx.set_interest(*fd_id, Interest::NONE);
            let again = cx.now() + LISTENER_REST;
            cx.set_timer(again, LISTENER_TIMER | number as u64);
        }
    }

    /// Where a peer of this lane is; `None` after it was removed.
    pub(super) fn slot_of(&self, peer: &Arc<PeerShared>) -> Option<usize> {
        let slot = peer.slot.load(Ordering::Relaxed) as usize;
        self.peers.get(slot).filter(|known| Arc::ptr_eq(&known.core.peer, peer)).map(|_| slot)
    }

    pub(super) fn add_peer(&mut self, peer: &Arc<PeerShared>, mirror: bool) -> usize {
        if let Some(slot) = self.slot_of(peer) {
            return slot;
        }
        let config = &self.engine.config;
        let core = Core::new(
            peer.clone(),
            CoreConfig {
                operation_timeout: config.operation_timeout,
                stream_idle: config.stream_idle,
                streams: config.streams,
            },
            self.engine.identity.incarnation,
            !mirror,
        );
        let slot = self.peers.insert(LanePeer {
            core,
            links: SmallVec::new(),
            connector: None,
            not_local: None,
            address: None,
            timer: None,
            dirty: false,
            silent_until: None,
            unsaid_failures: 0,
            unload: false,
            born: self.next_birth,
            connects_later: None,
            local: None,
            last_process: None,
            suspect: None,
            rdma: None,
            transports: 0,
        });
        self.next_birth += 1;
        peer.slot.store(slot as u32, Ordering::Relaxed);
        slot
    }

    pub(super) fn remove_peer(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let links = self.peers[slot].links.clone();
        for link in links {
            self.close_link(link, "the peer was unloaded", cx);
        }
        self.detach(slot, cx);
        self.rdma_detach(slot, "the peer was unloaded", cx);
        self.abort_connect(slot, cx);
        // Those on their way would come up for whoever gets the place next.
        for link in self.links_of(slot) {
            drop(self.take_link(link, cx));
        }
        self.settle_gpu_of(slot, cx);
        crate::gpu::forget_mappings(self.peers[slot].core.peer.incarnation);
        let mut peer = self.peers.remove(slot);
        let timers = [peer.timer.map(|(_, timer)| timer), peer.suspect.map(|(_, timer)| timer)];
        for timer in timers.into_iter().flatten() {
            cx.cancel_timer(timer);
        }
        // Its place in `dirty` stays: `service` is walking that list, and skips who is not there.
        let mut env = env(&mut self.regions, &self.engine, &self.counters, cx.now());
        peer.core.abort(&Error::Cancelled, &mut env);
        peer.core.peer.slot.store(NO_SLOT, Ordering::Relaxed);
        self.engine.arrivals.forget(&peer.core.peer);
        peer.core.peer.set_forgotten();
        peer.core.peer.connected.store(false, Ordering::Release);
        self.connect_next(peer.core.peer.incarnation, cx);
    }

    pub(super) fn mark(&mut self, slot: usize) {
        if let Some(peer) = self.peers.get_mut(slot)
            && !peer.dirty
        {
            peer.dirty = true;
            self.dirty.push(slot);
        }
    }

    /// Calls into a peer's core.
    pub(super) fn with_core<R>(
        &mut self,
        slot: usize,
        cx: &mut Cx<'_>,
        call: impl FnOnce(&mut Core, &mut Env<'_>) -> R,
    ) -> Option<R> {
        let now = cx.now();
        let peer = self.peers.get_mut(slot)?;
        let result =
            call(&mut peer.core, &mut env(&mut self.regions, &self.engine, &self.counters, now));
        self.mark(slot);
        Some(result)
    }

    /// Does what the cores of the dirty peers ask for and sends what they have.
    fn service(&mut self, cx: &mut Cx<'_>) -> bool {
        let mut worked = false;
        // Peers that become dirty on the way come at the end of the same list; what does not fit
        // into this turn's share stays for the next.
        let mut at = 0;
        while let Some(&slot) = self.dirty.get(at) {
            at += 1;
            let Some(peer) = self.peers.get_mut(slot) else { continue };
            peer.dirty = false;
            self.handle_events(slot, cx);
            self.take_copies(slot, cx);
            self.pack(slot, cx);
            worked |= self.flush_peer(slot, cx);
            self.pack(slot, cx);
            self.handle_events(slot, cx);
            self.arm_timer(slot, cx);
            if at >= 1024 {
                break;
            }
        }
        self.dirty.drain(..at);
        while let Some(slot) = self.busy.pop() {
            self.mark(slot);
        }
        worked
    }

    pub(super) fn handle_events(&mut self, slot: usize, cx: &mut Cx<'_>) {
        while let Some(event) = self.peers.get_mut(slot).and_then(|p| p.core.poll_event()) {
            match event {
                Event::Connect { kind, again } => self.start_connect(slot, kind, again, cx),
                Event::AbortConnect => self.abort_connect(slot, cx),
                Event::Close { link, reason, after_flush } => {
                    if after_flush {
                        // One try: a peer that does not read learns it from the closed socket.
                        let _ = self.flush_link(link, cx);
                    }
                    self.close_link(link, &reason, cx);
                }
                Event::StopWired { key, stuck } => self.stop_wired(slot, key, stuck, cx),
                Event::Left => {
                    if self.peers.get(slot).is_some_and(|peer| peer.unload) {
                        return self.remove_peer(slot, cx);
                    }
                }
                Event::Forget => {
                    let peer = &self.peers[slot].core.peer;
                    if self.mirror != Some(slot) && self.engine.peers().forget(peer) {
                        return self.remove_peer(slot, cx);
                    }
                }
            }
        }
    }

    fn arm_timer(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let Some(next) = peer.core.next_timeout() else { return };
        if let Some((at, timer)) = peer.timer {
            if at <= next {
                // It fires early, finds nothing to do, and is set again.
                return;
            }
            cx.cancel_timer(timer);
        }
        peer.timer = Some((next, cx.set_timer(next, PEER_TIMER | slot as u64)));
    }

    fn drain(&mut self, cx: &mut Cx<'_>) {
        let backlogged: Vec<usize> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.core.is_backlogged())
            .map(|(slot, _)| slot)
            .collect();
        for slot in backlogged {
            self.with_core(slot, cx, Core::deliver);
        }
    }

    fn leave(&mut self, cx: &mut Cx<'_>) {
        self.leaving = true;
        self.stop_listening();
        let deadline = cx.now() + self.engine.config.linger;
        let slots: Vec<usize> = self.peers.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.close_path(slot, cx);
            self.with_core(slot, cx, |core, env| core.leave(deadline, Ticket::new(), env));
        }
    }

    /// Gives the ports back at once: the ring may hold on to closed sockets for a while.
    fn stop_listening(&mut self) {
        for (listener, _) in &self.listeners {
            // One that is not connected answers with an error, and has stopped all the same.
            let _ = socket2::SockRef::from(listener).shutdown(std::net::Shutdown::Both);
        }
    }

    fn post(&mut self, transfer: Arc<TransferShared>, cx: &mut Cx<'_>) {
        match self.slot_of(&transfer.plan.peer) {
            // Not while it is being left for good: it would be connected to once more.
            Some(slot) if !self.peers[slot].unload => {
                self.with_core(slot, cx, |core, env| core.post(transfer, env));
            }
            _ => refuse(&transfer, &transfer.plan.peer.unloaded()),
        }
    }

    fn fail_everything(&mut self, error: &Error) {
        self.copies.clear();
        self.gpu.settle(&self.regions);
        self.issuers.settle(&self.engine, self.index, super::gpu::PATIENCE);
        // Nothing moves any more once the queue pairs are destroyed.
        self.rdma.clear();
        for (_, peer) in &mut self.peers {
            peer.rdma = None;
            peer.core.peer.set_path(None);
        }
        let Self { peers, regions, engine, counters, .. } = self;
        let mut env = env(regions, engine, counters, Instant::now());
        for (_, peer) in peers.iter_mut() {
            peer.core.abort(error, &mut env);
            peer.core.peer.connected.store(false, Ordering::Release);
        }
        self.engine.notifications.wake_all();
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

pub(super) fn env<'a>(
    regions: &'a mut LaneRegions,
    engine: &'a EngineShared,
    counters: &'a Counters,
    now: Instant,
) -> Env<'a> {
    Env { now, clock: Some(Instant::now), regions, notifications: &engine.notifications, counters }
}

impl Driver for LaneDriver {
    type Message = Message;

    fn on_message(&mut self, cx: &mut Cx<'_>, message: Message) {
        match message {
            Message::Post(transfer) => self.post(transfer, cx),
            Message::Cancel(transfer) => {
                if let Some(slot) = self.slot_of(&transfer.plan.peer) {
                    self.with_core(slot, cx, |core, env| core.cancel(&transfer, env));
                }
            }
            Message::Notify(message) => {
                let (peer, payload) = *message;
                match self.slot_of(&peer) {
                    Some(slot) => {
                        self.with_core(slot, cx, |core, env| core.notify(payload, env));
                    }
                    // It was taken just before the peer was forgotten.
                    None => self.strays.drop_one(&peer, payload.len(), &self.counters),
                }
            }
            Message::Connect(peer, ticket) => match self.slot_of(&peer) {
                Some(slot) => {
                    self.with_core(slot, cx, |core, env| core.request_connect(ticket, env));
                }
                None => ticket.complete(Err(peer.unloaded())),
            },
            Message::Disconnect(peer, ticket) => match self.slot_of(&peer) {
                Some(slot) => {
                    self.close_path(slot, cx);
                    let deadline = cx.now() + self.engine.config.linger;
                    self.with_core(slot, cx, |core, env| core.leave(deadline, ticket, env));
                }
                None => ticket.complete(0),
            },
            Message::Unload(peer, ticket) => match self.slot_of(&peer) {
                Some(slot) => {
                    self.peers[slot].unload = true;
                    self.close_path(slot, cx);
                    let deadline = cx.now() + self.engine.config.linger;
                    self.with_core(slot, cx, |core, env| core.leave(deadline, ticket, env));
                }
                None => ticket.complete(0),
            },
            Message::AddPeer(peer) => {
                self.add_peer(&peer, false);
            }
            Message::RemovePeer(peer) => {
                if let Some(slot) = self.slot_of(&peer) {
                    self.remove_peer(slot, cx);
                }
            }
            Message::Retire(peer) => {
                if let Some(slot) = self.slot_of(&peer) {
                    self.close_path(slot, cx);
                    self.with_core(slot, cx, Core::retire);
                }
            }
            Message::AddRegion(region) => {
                if let Some(allocation) = region.gpu() {
                    self.know_for_staging(allocation.device());
                }
                self.share_with_all(&region);
                self.regions.add(region);
            }
            Message::Equip(equipment) => self.equip(*equipment),
            Message::CloseRegion(region, ticket) => {
                self.unshare_with_all(&region);
                self.regions.close(&region, ticket);
            }
            Message::Help(transfer) => self.add_copy(transfer),
            Message::Copied(transfer) => self.copied(&transfer, cx),
            Message::Issued(issuer) => self.watch_issuer(issuer),
            Message::Adopt(adopted) => self.adopt(*adopted, cx),
            Message::Rdma(event) => self.on_rdma_event(&event.0, event.1, cx),
            Message::Drain => self.drain(cx),
            Message::Leave => self.leave(cx),
        }
    }

    fn on_fd(&mut self, cx: &mut Cx<'_>, token: u64, readiness: Readiness) -> bool {
        if token & LISTENER != 0 {
            return self.accept((token & !TAGS) as usize, cx);
        }
        if token & RDMA_EVENTS != 0 {
            return self.on_rdma_fd(token, cx);
        }
        self.on_link(token, readiness, cx)
    }

    fn on_timer(&mut self, cx: &mut Cx<'_>, token: u64) {
        let slot = (token & !TAGS) as usize;
        if token & DEATH_TIMER == DEATH_TIMER {
            self.death_timer((token & !DEATH_TIMER) as usize, cx);
        } else if token & ATTACH_TIMER == ATTACH_TIMER {
            self.attach_timer((token & !ATTACH_TIMER) as usize, cx);
        } else if token & LOCAL_TIMER != 0 {
            self.ring_timer((token & !LOCAL_TIMER) as usize);
        } else if token & RDMA_TIMER != 0 {
            self.rdma_timer((token & !RDMA_TIMER) as usize, cx);
        } else if token & TAGS == LISTENER_TIMER {
            if let Some((_, fd_id)) = self.listeners.get(slot) {
                cx.set_interest(*fd_id, Interest::READABLE);
            }
        } else if token & PEER_TIMER != 0 {
            if let Some(peer) = self.peers.get_mut(slot) {
                peer.timer = None;
            }
            self.with_core(slot, cx, Core::on_timeout);
        } else if token & CONNECT_TIMER != 0 {
            self.connect_timer(slot, cx);
        } else {
            self.handshake_timeout(token, cx);
        }
    }

    fn on_word(&mut self, cx: &mut Cx<'_>, token: u64) {
        self.on_life(token, cx);
    }

    fn on_word_lost(&mut self, cx: &mut Cx<'_>, token: u64, error: &std::io::Error) {
        self.on_life_unwatched(token, error, cx);
    }

    fn on_turn(&mut self, cx: &mut Cx<'_>) -> bool {
        let mut worked = !self.rings.is_empty() && self.poll_rings(cx);
        worked |= self.poll_rdma(cx);
        worked |= !self.gpu.is_idle() && self.poll_gpu(cx);
        worked |= !self.issuers.is_idle() && self.look_at_issuers(cx);
        worked |= !self.dirty.is_empty() && self.service(cx);
        self.strays.say();
        if self.run_copies(cx) {
            worked = true;
            // What has been copied is told now.
            self.service(cx);
        }
        worked
    }

    fn must_poll(&self) -> bool {
        let idle = self.copies.is_empty() && self.gpu.is_idle() && self.issuers.is_idle();
        !self.dirty.is_empty() || !idle
    }

    fn may_hand_over(&self) -> bool {
        // Lane and callers copy side by side.
        self.copies.is_empty()
    }

    fn before_sleep(&mut self, cx: &mut Cx<'_>) -> bool {
        self.rdma_before_sleep(cx) && self.rings_before_sleep()
    }

    fn on_stop(&mut self, cx: &mut Cx<'_>) -> bool {
        if !self.leaving {
            self.leave(cx);
        }
        self.peers.iter().all(|(_, peer)| peer.core.has_left())
    }

    fn on_abandoned(&mut self, message: Message) {
        let gone = self.engine.dead();
        match message {
            Message::Post(transfer) => refuse(&transfer, &gone),
            Message::Notify(message) => {
                self.strays.drop_one(&message.0, message.1.len(), &self.counters);
            }
            Message::Connect(_, ticket) => ticket.complete(Err(gone)),
            Message::Disconnect(_, ticket) | Message::Unload(_, ticket) => ticket.complete(0),
            Message::CloseRegion(_, ticket) => ticket.complete(()),
            Message::Issued(issuer) => {
                issued::settle_for(&issuer, &self.engine, self.index, super::gpu::PATIENCE);
            }
            _ => {}
        }
    }

    fn on_panic(&mut self, message: &str) {
        self.engine.set_failed();
        self.fail_everything(&Error::Backend(format!("lane {} failed: {message}", self.index)));
    }
}

impl Drop for LaneDriver {
    fn drop(&mut self) {
        self.stop_listening();
        self.fail_everything(&Error::Shutdown);
    }
}
