//! One engine, as far as its lane goes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use slab::Slab;

use super::copies::{Copied, Neighbours, Shared};
use super::links::Link;
use super::peers::NodePeer;
use super::wired::{Completion, Work};
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::memory::{
    Access, LaneRegions, LocalSegment, MemoryKind, RegionDescriptor, RegionInner, Registry,
    RemoteSegment,
};
use crate::notification::NotificationQueue;
use crate::peer::{PeerShared, PeerTable};
use crate::plan::{Operation, PlanBuilder, PlanInner};
use crate::session::handshake::Identity;
use crate::stats::Counters;
use crate::sync::{SlotState, Ticket};
use crate::transfer::TransferShared;
use crate::transport::local::InProgress;
use crate::transport::rdma::Registrations;
use crate::wire::{Metadata, RegionKey};

/// What virtual time counts from; only differences matter.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

pub(super) fn instant(at: Duration) -> Instant {
    *START + at
}

/// Which way transfers and notifications go, once a session is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Frames over sockets.
    Sockets,
    /// Frames over sockets, and small notifications by a ring in shared memory.
    Ring,
    /// As that, and transfers are copied by the engine that posts them, out of and into the memory of the other.
    Copies,
    /// By queue pairs of devices, and else as frames over sockets.
    Wired,
}

/// Whether an engine keeps to the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// As every engine.
    Honest,
    /// It lets in whoever comes, and proves things at random.
    Impostor,
}

/// What an engine is made with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Agent name.
    pub name: String,
    /// Incarnation.
    pub incarnation: u128,
    /// Secret of the metadata.
    pub secret: [u8; 32],
    /// Where it listens.
    pub addresses: Vec<SocketAddr>,
    /// Liveness timeout that it proposes.
    pub liveness: Duration,
    /// See [`crate::EngineConfig`].
    pub operation_timeout: Duration,
    /// See [`crate::EngineConfig`].
    pub connect_timeout: Duration,
    /// See [`crate::EngineConfig`].
    pub reconnect_timeout: Duration,
    /// See [`crate::EngineConfig`].
    pub stream_idle: Duration,
    /// See [`crate::EngineConfig`].
    pub linger: Duration,
    /// Bulk streams to a peer.
    pub streams: usize,
    /// Bytes of a request.
    pub chunk_bytes: u64,
    /// Bytes of the largest transfer of the latency class.
    pub latency_bytes: u64,
    /// Bounds.
    pub limits: Limits,
    /// Which way transfers go.
    pub way: Way,
    /// It never answers that queue pairs are gone, and goes on with its own, though it answers pings.
    pub is_deaf: bool,
    /// Whether it keeps to the handshake.
    pub trust: Trust,
}

/// Who touches registered memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// A transfer of this engine.
    Own,
    /// A request of the peer with this incarnation.
    Served(u128),
    /// This engine's device, for the peer with this incarnation.
    Device(u128),
}

/// Registered memory of one engine.
pub trait Memory {
    /// Reads for a frame that is being sent.
    fn read(&mut self, touch: Touch, addr: u64, into: &mut [u8]);
    /// Writes what has arrived; false: it is not mapped.
    fn write(&mut self, touch: Touch, addr: u64, bytes: &[u8]) -> bool;
    /// Whether all of a range can be read and written.
    fn is_mapped(&self, addr: u64, len: u64) -> bool;
}

/// The world around an engine.
pub trait Outside: Memory {
    /// Random bits.
    fn random(&mut self) -> u64;
    /// Connect to this address; answered by [`Node::opened`] or [`Node::open_failed`].
    fn open(&mut self, link: u64, address: SocketAddr);
    /// Bytes that the link takes now.
    fn room(&mut self, link: u64) -> usize;
    /// Sends bytes, as many as it has room for.
    fn send(&mut self, link: u64, bytes: Vec<u8>);
    /// The other side has reset the link, though this side has not looked at it yet.
    fn is_broken(&self, link: u64) -> bool;
    /// Gives up this end of the link.
    fn close(&mut self, link: u64);
    /// What is seen of the ring to the peer over the session's link.
    fn ring(&mut self, link: u64) -> RingLook;
    /// Puts a message into that ring, which has room.
    fn ring_push(&mut self, link: u64, message: Vec<u8>);
    /// Takes the next message of the peer's ring.
    fn ring_pop(&mut self, link: u64) -> Option<Vec<u8>>;
    /// Hands the other end of the session's link what it can map.
    fn share(&mut self, link: u64, shared: Shared);
    /// What the other end has handed over.
    fn shared(&mut self, link: u64) -> Option<Shared>;
    /// Copies between this engine's memory and that of another.
    fn copy(
        &mut self,
        peer: u128,
        operation: Operation,
        local: u64,
        remote: u64,
        len: usize,
    ) -> Copied;
    /// Makes this end's queue pair of a session's link, or destroys it: then nothing of it moves any more at this end.
    fn pair(&mut self, link: u64, generation: Option<u32>);
    /// Posts to it.
    fn post(&mut self, link: u64, number: u64, work: Work);
    /// What it has to tell.
    fn completion(&mut self, link: u64) -> Option<Completion>;
    /// A peer has broken the protocol.
    fn broken(&mut self, peer: u128, reason: &str);
    /// For traces.
    fn note(&mut self, text: &dyn Fn() -> String);
}

/// What is seen of a ring.
#[derive(Debug, Clone, Copy)]
pub struct RingLook {
    /// It takes one more.
    pub has_room: bool,
    /// The other side has taken all.
    pub is_empty: bool,
}

/// A peer, as an application holds it.
#[derive(Debug, Clone)]
pub struct Peer(pub(super) Arc<PeerShared>);

/// A plan, as an application holds it.
#[derive(Debug, Clone)]
pub struct PlanHandle(pub(super) Arc<PlanInner>);

/// Registered memory, as an application holds it.
#[derive(Debug, Clone)]
pub struct RegionHandle(pub(super) Arc<RegionInner>);

/// A posting slot.
#[derive(Debug, Clone)]
pub struct TransferHandle(pub(super) Arc<TransferShared>);

/// The answer to a slow call.
#[derive(Debug, Clone)]
pub struct TicketHandle(pub(super) TicketKind);

#[derive(Debug, Clone)]
pub(super) enum TicketKind {
    Connect(Arc<Ticket<Result<()>>>),
    Left(Arc<Ticket<usize>>),
    Closed(Arc<Ticket<()>>, Arc<Mutex<InProgress>>),
}

/// Where a transfer stands.
#[derive(Debug, Clone)]
pub enum State {
    /// Never posted.
    Idle,
    /// Posted and not ended.
    Posted,
    /// Ended well.
    Done,
    /// Ended in an error.
    Failed(Error),
}

impl TicketHandle {
    /// The answer is there.
    pub fn is_complete(&self) -> bool {
        match &self.0 {
            TicketKind::Connect(ticket) => ticket.is_complete(),
            TicketKind::Left(ticket) => ticket.is_complete(),
            TicketKind::Closed(ticket, copies) => {
                let mut copies = copies.lock().unwrap_or_else(PoisonError::into_inner);
                copies.are_over(true) && ticket.is_complete()
            }
        }
    }
}

impl Peer {
    /// Its incarnation.
    pub fn incarnation(&self) -> u128 {
        self.0.incarnation
    }

    /// A session is up.
    pub fn is_connected(&self) -> bool {
        self.0.connected.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Notifications that it has not acknowledged, and their bytes.
    pub fn unacknowledged(&self) -> (usize, usize) {
        self.0.unacknowledged()
    }

    /// Transfers in flight.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
}

impl RegionHandle {
    /// What peers are given.
    pub fn descriptor(&self) -> RegionDescriptor {
        self.0.descriptor.clone()
    }
}

impl PlanHandle {
    /// Requests that it is cut into.
    pub fn requests(&self) -> usize {
        self.0.pieces.len()
    }
}

impl TransferHandle {
    /// Where it stands.
    pub fn state(&self) -> State {
        match self.0.slot.state() {
            SlotState::Idle => State::Idle,
            SlotState::Posted => State::Posted,
            SlotState::Done => State::Done,
            SlotState::Failed => State::Failed(self.0.slot.error().unwrap_or(Error::Shutdown)),
        }
    }

    /// Postings that have begun, and ends that were told.
    pub fn begun_and_ended(&self) -> (u64, u64) {
        self.0.slot.begun_and_ended()
    }
}

/// An engine without its lane.
pub struct Node {
    pub(super) config: Config,
    pub(super) identity: Identity,
    pub(super) now: Instant,
    pub(super) table: PeerTable,
    pub(super) registry: Registry,
    pub(super) regions: LaneRegions,
    pub(super) queue: NotificationQueue,
    pub(super) counters: Counters,
    pub(super) peers: Slab<NodePeer>,
    pub(super) mirror: Option<usize>,
    pub(super) links: BTreeMap<u64, Link>,
    pub(super) next_link: u64,
    pub(super) dirty: Vec<usize>,
    pub(super) next_birth: u64,
    pub(super) stopping: bool,
    pub(super) neighbours: Neighbours,
    /// What the keys that peers' devices use are for.
    pub(super) keys: BTreeMap<u32, (u64, u64, Access)>,
}

impl Node {
    /// An engine that has just been created.
    pub fn new(config: Config, now: Duration) -> Self {
        let identity = Identity {
            name: config.name.clone(),
            incarnation: config.incarnation,
            secret: config.secret,
            transports: 1,
            liveness_ms: config.liveness.as_millis() as u32,
        };
        let limits = config.limits.clone();
        Self {
            identity,
            now: instant(now),
            table: PeerTable::new(1, limits.clone()),
            registry: Registry::new(limits.regions),
            regions: LaneRegions::default(),
            queue: NotificationQueue::new(
                limits.pending_notifications,
                limits.pending_notification_bytes,
            ),
            counters: Counters::default(),
            peers: Slab::new(),
            mirror: None,
            links: BTreeMap::new(),
            next_link: 1,
            dirty: Vec::new(),
            next_birth: 0,
            stopping: false,
            neighbours: Neighbours::new(limits.regions),
            keys: BTreeMap::new(),
            config,
        }
    }

    /// Sets the time of this turn.
    pub fn set_time(&mut self, now: Duration) {
        self.now = instant(now);
    }

    /// The metadata that peers load.
    pub fn metadata(&self) -> Vec<u8> {
        Metadata {
            name: self.config.name.clone(),
            incarnation: self.config.incarnation,
            secret: self.config.secret,
            transports: 1,
            addresses: self.config.addresses.clone(),
        }
        .encode()
    }

    /// Registers memory under a key of these random bits.
    ///
    /// # Errors
    /// The limit of regions.
    pub fn register(
        &mut self,
        base: u64,
        len: u64,
        access: Access,
        out: &mut dyn Outside,
    ) -> Result<RegionHandle> {
        let random = u128::from(out.random()) | u128::from(out.random() as u32) << 64;
        let incarnation = self.config.incarnation;
        let mut rail_keys = crate::wire::RailKeys::new();
        if self.config.way == Way::Wired {
            let key = out.random() as u32 | 1;
            rail_keys.push(key);
            self.keys.insert(key, (base, len, access));
        }
        let describe = |slot| RegionDescriptor {
            incarnation,
            key: RegionKey::new(slot, random),
            base,
            len,
            kind: MemoryKind::Dram,
            access,
            rail_keys: rail_keys.clone(),
            device: None,
        };
        let region = self.registry.insert(
            describe,
            crate::memory::Backing::Application,
            Registrations::default(),
        )?;
        self.regions.add(region.clone());
        self.neighbours.publish(&region.descriptor);
        Ok(RegionHandle(region))
    }

    /// Begins to deregister; false: somebody else does. Once the ticket is complete, call `deregistered`.
    pub fn deregister(&mut self, region: &RegionHandle) -> Option<TicketHandle> {
        if !self.registry.close(&region.0) {
            return None;
        }
        let copies = self.neighbours.close(&region.0.descriptor);
        let ticket = Ticket::new();
        self.regions.close(&region.0, ticket.clone());
        Some(TicketHandle(TicketKind::Closed(ticket, Arc::new(Mutex::new(copies)))))
    }

    /// The region is gone: its slot may be used again.
    pub fn deregistered(&mut self, region: &RegionHandle) {
        self.registry.remove(&region.0);
        for key in &region.0.descriptor.rail_keys {
            self.keys.remove(key);
        }
    }

    /// Whether a region is in use by requests or transfers.
    pub fn is_used(&self, region: &RegionHandle) -> bool {
        self.regions.users(&region.0) > 0
    }

    /// A plan over (local address, index of the descriptor, remote address, length).
    ///
    /// # Errors
    /// Those of `prepare`.
    pub fn plan(
        &self,
        peer: &Peer,
        operation: Operation,
        descriptors: &[RegionDescriptor],
        pairs: &[(u64, usize, u64, u64)],
    ) -> Result<PlanHandle> {
        let local: Vec<LocalSegment> =
            pairs.iter().map(|&(addr, _, _, len)| LocalSegment { addr, len }).collect();
        let remote: Vec<RemoteSegment<'_>> = pairs
            .iter()
            .map(|&(_, region, addr, len)| RemoteSegment {
                region: &descriptors[region],
                addr,
                len,
            })
            .collect();
        let builder = PlanBuilder {
            operation,
            peer: &peer.0,
            registry: &self.registry,
            chunk_bytes: self.config.chunk_bytes,
            latency_bytes: self.config.latency_bytes,
            max_descriptors: self.config.limits.descriptors,
            local: self.config.way == Way::Copies,
            rdma: self.config.way == Way::Wired,
        };
        Ok(PlanHandle(Arc::new(builder.build(&local[..], &remote[..])?)))
    }

    /// A descriptor that says more than its owner allows: another key, longer, or open for everything.
    pub fn forge(
        descriptor: &RegionDescriptor,
        key_bits: u128,
        len: u64,
        access: Access,
    ) -> RegionDescriptor {
        let key = RegionKey(descriptor.key.0 ^ key_bits);
        // Another key is one for devices, too.
        let bits = if key_bits == 0 { 0 } else { 2 << (key_bits.trailing_zeros() % 30) };
        let rail_keys = descriptor.rail_keys.iter().map(|known| known ^ bits).collect();
        RegionDescriptor { key, len, access, rail_keys, ..descriptor.clone() }
    }

    /// A posting slot of a plan.
    pub fn transfer(plan: &PlanHandle) -> TransferHandle {
        TransferHandle(Arc::new(TransferShared::new(plan.0.clone())))
    }

    /// Takes a notification, as the application does.
    pub fn take_notification(&mut self) -> Option<(Arc<str>, Vec<u8>)> {
        self.queue.pop().map(|notification| (notification.from, notification.payload))
    }

    /// The application has made room for notifications.
    pub fn drain(&mut self) {
        if !self.queue.take_stalled() {
            return;
        }
        let backlogged: Vec<usize> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.core.is_backlogged())
            .map(|(slot, _)| slot)
            .collect();
        for slot in backlogged {
            self.with_core(slot, super::coverage::Event::Drain, crate::session::Core::deliver);
        }
    }

    /// Notifications that the application has not taken, and their bytes.
    pub fn pending(&self) -> (usize, usize) {
        (self.queue.len(), self.queue.bytes())
    }

    /// Notifications that were dropped with their session.
    pub fn dropped(&self) -> u64 {
        self.counters.notifications_dropped.get()
    }

    /// Sessions that were given up because their peer was silent.
    pub fn liveness_timeouts(&self) -> u64 {
        self.counters.liveness_timeouts.get()
    }
}
