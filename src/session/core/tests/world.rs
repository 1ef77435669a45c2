//! Two engines, the clock, and what tests do with them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::memory::{Buffer, Rng};
use super::net::{Net, Wire};
use crate::config::Limits;
use crate::error::Error;
use crate::memory::{LaneRegions, LocalSegment, Registry, RemoteSegment};
use crate::notification::NotificationQueue;
use crate::peer::PeerShared;
use crate::plan::{Operation, PlanBuilder, PlanInner};
use crate::session::core::{Core, CoreConfig, Env, Phase};
use crate::stats::Counters;
use crate::sync::{SlotState, Ticket};
use crate::sys::IoSegment;
use crate::transfer::TransferShared;
use crate::wire::frame::Header;
use crate::wire::hello::LinkKind;
use crate::wire::{Access, MemoryKind, Metadata, RegionDescriptor, RegionKey};

/// Bytes of one request, and of the largest transfer of the latency class.
pub(super) const CHUNK: usize = 1024;
pub(super) const SMALL: usize = 256;

/// A buffer of a node, and an offset in it.
pub(super) type Place = (usize, usize);

pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Attempts to open one session link.
pub(super) struct Connector {
    pub(super) deadline: Instant,
    pub(super) retry: Option<Instant>,
    pub(super) wire: usize,
}

/// One engine, as far as its peer is concerned.
pub(super) struct Node {
    pub(super) name: &'static str,
    pub(super) incarnation: u128,
    pub(super) peer: Arc<PeerShared>,
    pub(super) core: Core,
    pub(super) regions: LaneRegions,
    pub(super) registry: Registry,
    pub(super) queue: NotificationQueue,
    pub(super) counters: Counters,
    pub(super) buffers: Vec<Buffer>,
    pub(super) connector: Option<Connector>,
    pub(super) alive: bool,
    /// Its lane is not scheduled before this instant.
    pub(super) stopped: Option<Instant>,
    /// Bytes that the peer has written here.
    pub(super) written: usize,
    /// Sessions left.
    pub(super) left: usize,
}

/// A posted transfer.
pub(super) struct Posted {
    pub(super) node: usize,
    pub(super) shared: Arc<TransferShared>,
}

pub(super) struct World {
    pub(super) now: Instant,
    pub(super) start: Instant,
    pub(super) rng: Rng,
    pub(super) net: Net,
    pub(super) nodes: [Node; 2],
    pub(super) wires: Vec<Wire>,
    pub(super) posted: Vec<Posted>,
    pub(super) config: CoreConfig,
    pub(super) liveness: Duration,
    /// Where engine 1 has another than engine 0.
    pub(super) liveness_of_b: Option<Duration>,
    pub(super) partitioned: bool,
    pub(super) refusing: [bool; 2],
    /// Links that a node has closed because of what it received, with the reason.
    pub(super) broken: Vec<(usize, String)>,
    /// Requests that engine 0 has sent: link, header.
    pub(super) asked: Vec<(usize, Header)>,
    /// Faults that the next payloads meet.
    pub(super) faults: Vec<u64>,
}

fn peer(name: &str, incarnation: u128, loaded: bool, limits: &Limits) -> Arc<PeerShared> {
    let metadata = loaded.then(|| {
        let name = name.to_owned();
        let secret = [0; 32];
        Arc::new(Metadata { name, incarnation, secret, transports: 1, addresses: vec![] })
    });
    Arc::new(PeerShared::new(name.into(), incarnation, 0, metadata, limits))
}

impl Node {
    fn new(
        name: &'static str,
        incarnation: u128,
        peer: Arc<PeerShared>,
        config: &CoreConfig,
    ) -> Self {
        Self {
            name,
            incarnation,
            core: Core::new(peer.clone(), config.clone(), incarnation, true),
            peer,
            regions: LaneRegions::default(),
            registry: Registry::new(100),
            queue: NotificationQueue::new(1 << 16, 64 << 20),
            counters: Counters::default(),
            buffers: Vec::new(),
            connector: None,
            alive: true,
            stopped: None,
            written: 0,
            left: 0,
        }
    }
}

impl World {
    /// Engine 0 (`a`, incarnation 1) knows the metadata of engine 1 (`b`, incarnation 2); `both`:
    /// and the other way round.
    pub(super) fn new(seed: u64, both: bool) -> Self {
        let config = CoreConfig {
            operation_timeout: Duration::from_secs(30),
            stream_idle: Duration::from_secs(10),
            streams: 2,
        };
        let limits = Limits::default();
        let a = Node::new("a", 1, peer("b", 2, true, &limits), &config);
        let b = Node::new("b", 2, peer("a", 1, both, &limits), &config);
        let now = Instant::now();
        Self {
            now,
            start: now,
            rng: Rng::new(seed),
            net: Net::default(),
            nodes: [a, b],
            wires: Vec::new(),
            posted: Vec::new(),
            config,
            liveness: Duration::from_secs(3),
            liveness_of_b: None,
            partitioned: false,
            refusing: [false; 2],
            broken: Vec::new(),
            asked: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// What a node is configured to.
    pub(super) fn liveness_ms(&self, node: usize) -> u32 {
        let own = self.liveness_of_b.filter(|_| node == 1).unwrap_or(self.liveness);
        own.as_millis() as u32
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    /// Another engine takes the place of this one, with nothing of its state.
    pub(super) fn restart(&mut self, node: usize, incarnation: u128) {
        self.kill(node);
        let old = &self.nodes[node];
        let other = &self.nodes[1 - node];
        let known = peer(other.name, other.incarnation, old.peer.is_loaded(), &Limits::default());
        self.nodes[node] = Node::new(old.name, incarnation, known, &self.config);
    }

    /// The process dies: its sockets are reset, its core does nothing any more.
    pub(super) fn kill(&mut self, node: usize) {
        self.nodes[node].alive = false;
        for wire in 0..self.wires.len() {
            for side in 0..2 {
                if self.wires[wire].ends[side].node == node && !self.wires[wire].ends[side].closed {
                    let at = self.now + ms(1);
                    let end = &mut self.wires[wire].ends[side];
                    (end.closed, end.open, end.fin) = (true, false, Some(at));
                }
            }
        }
    }

    /// Calls a core, and lets its links be looked at again.
    pub(super) fn call<R>(
        &mut self,
        node: usize,
        call: impl FnOnce(&mut Core, &mut Env<'_>) -> R,
    ) -> R {
        for wire in &mut self.wires {
            for end in &mut wire.ends {
                end.dirty |= end.node == node && end.open;
            }
        }
        self.quiet_call(node, call)
    }

    pub(super) fn quiet_call<R>(
        &mut self,
        node: usize,
        call: impl FnOnce(&mut Core, &mut Env<'_>) -> R,
    ) -> R {
        let now = self.now;
        let Node { core, regions, queue, counters, .. } = &mut self.nodes[node];
        call(core, &mut Env { now, clock: None, regions, notifications: queue, counters })
    }

    // Memory and transfers.

    /// Registers a buffer; the answer is its number.
    pub(super) fn register(&mut self, node: usize, len: usize, access: Access) -> usize {
        let random = u128::from(self.rng.next());
        let Node { incarnation, registry, regions, buffers, .. } = &mut self.nodes[node];
        let buffer = Buffer::new(len, |base, len| {
            let make = |slot| RegionDescriptor {
                incarnation: *incarnation,
                key: RegionKey::new(slot, random),
                base,
                len,
                kind: MemoryKind::Dram,
                access,
                rail_keys: crate::wire::RailKeys::new(),
                device: None,
            };
            registry
                .insert(
                    make,
                    crate::memory::Backing::Application,
                    crate::transport::rdma::Registrations::default(),
                )
                .unwrap()
        });
        regions.add(buffer.region.clone());
        buffers.push(buffer);
        buffers.len() - 1
    }

    pub(super) fn fill(
        &mut self,
        node: usize,
        buffer: usize,
        offset: usize,
        len: usize,
    ) -> Vec<u8> {
        let bytes: Vec<u8> = (0..len).map(|_| self.rng.next() as u8).collect();
        self.nodes[node].buffers[buffer].write(offset, &bytes);
        bytes
    }

    pub(super) fn read(&self, node: usize, buffer: usize, offset: usize, len: usize) -> Vec<u8> {
        self.nodes[node].buffers[buffer].read(offset, len)
    }

    /// A plan over (local buffer, offset), (remote buffer, offset), length.
    pub(super) fn plan(
        &self,
        node: usize,
        operation: Operation,
        pairs: &[(Place, Place, usize)],
    ) -> Arc<PlanInner> {
        let (own, other) = (&self.nodes[node], &self.nodes[1 - node]);
        let local: Vec<_> = pairs
            .iter()
            .map(|&((buffer, offset), _, len)| LocalSegment {
                addr: own.buffers[buffer].addr() + offset as u64,
                len: len as u64,
            })
            .collect();
        let remote: Vec<RemoteSegment<'_>> = pairs
            .iter()
            .map(|&(_, (buffer, offset), len)| {
                other.buffers[buffer].region.descriptor.segment(offset as u64, len as u64)
            })
            .collect();
        let builder = PlanBuilder {
            operation,
            peer: &own.peer,
            registry: &own.registry,
            chunk_bytes: CHUNK as u64,
            latency_bytes: SMALL as u64,
            max_descriptors: 10_000,
            local: false,
            rdma: false,
        };
        Arc::new(builder.build(&local[..], &remote[..]).unwrap())
    }

    /// Posts a plan as the public API does; the answer is the number of the transfer.
    pub(super) fn post(
        &mut self,
        node: usize,
        plan: Arc<PlanInner>,
        notification: Option<&[u8]>,
    ) -> usize {
        let shared = Arc::new(TransferShared::new(plan));
        assert!(shared.slot.begin().is_some() && self.nodes[node].peer.try_enter());
        if let Some(payload) = notification {
            self.nodes[node].peer.reserve(payload.len()).unwrap();
            *shared.notification() = Some(payload.into());
        }
        self.posted.push(Posted { node, shared: shared.clone() });
        self.call(node, |core, env| core.post(shared, env));
        self.posted.len() - 1
    }

    /// Posts a transfer of one range.
    pub(super) fn move_bytes(
        &mut self,
        node: usize,
        operation: Operation,
        local: Place,
        remote: Place,
        len: usize,
        notification: Option<&[u8]>,
    ) -> usize {
        let plan = self.plan(node, operation, &[(local, remote, len)]);
        self.post(node, plan, notification)
    }

    pub(super) fn cancel(&mut self, transfer: usize) {
        let Posted { node, shared } = &self.posted[transfer];
        let (node, shared) = (*node, shared.clone());
        if shared.slot.state() == SlotState::Posted {
            self.call(node, |core, env| core.cancel(&shared, env));
        }
    }

    pub(super) fn state(&self, transfer: usize) -> SlotState {
        self.posted[transfer].shared.slot.state()
    }

    pub(super) fn is_done(&self, transfer: usize) -> bool {
        self.state(transfer) == SlotState::Done
    }

    pub(super) fn error(&self, transfer: usize) -> Error {
        assert_eq!(self.state(transfer), SlotState::Failed);
        self.posted[transfer].shared.slot.error().unwrap()
    }

    /// Whether requests of a transfer wait for answers.
    pub(super) fn is_asked_for(&self, transfer: usize) -> bool {
        let posted = &self.posted[transfer];
        self.nodes[posted.node].core.has_requests_of(&posted.shared)
    }

    /// Some transfer of this plan has not ended.
    pub(super) fn is_posted(&self, plan: &Arc<PlanInner>) -> bool {
        let mut of_plan = self.posted.iter().filter(|p| Arc::ptr_eq(&p.shared.plan, plan));
        of_plan.any(|p| p.shared.slot.state() == SlotState::Posted)
    }

    /// Some transfer of the node that has not ended may write there.
    pub(super) fn is_receiving(&self, node: usize, segment: IoSegment) -> bool {
        self.posted.iter().any(|p| {
            let plan = &p.shared.plan;
            let mut local = (0..plan.pieces.len() as u32).flat_map(|piece| plan.local(piece));
            p.node == node
                && p.shared.slot.state() == SlotState::Posted
                && local.any(|s| s.addr() == segment.addr())
        })
    }

    pub(super) fn notify(&mut self, node: usize, payload: &[u8]) {
        self.nodes[node].peer.reserve(payload.len()).unwrap();
        self.call(node, |core, env| core.notify(payload.into(), env));
    }

    /// Takes what the application of a node would see.
    pub(super) fn take(&mut self, node: usize) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(notification) = self.nodes[node].queue.pop() {
            all.push(notification.payload);
        }
        if self.nodes[node].queue.take_stalled() {
            self.call(node, Core::deliver);
        }
        all
    }

    pub(super) fn leave(&mut self, node: usize, linger: Duration) -> Arc<Ticket<usize>> {
        let (ticket, deadline) = (Ticket::new(), self.now + linger);
        let answer = ticket.clone();
        self.call(node, |core, env| core.leave(deadline, ticket, env));
        answer
    }

    pub(super) fn is_up(&self, node: usize) -> bool {
        matches!(self.nodes[node].core.phase, Phase::Up)
            && self.nodes[node].core.session_link().is_some()
    }

    // Links.

    /// Open links of this kind.
    pub(super) fn open_wires(&self, kind: LinkKind) -> Vec<usize> {
        let all = self.wires.iter().enumerate();
        all.filter(|(_, w)| w.kind == kind && w.ends.iter().all(|e| e.open))
            .map(|(i, _)| i)
            .collect()
    }

    /// A link breaks: what is under way is lost, both ends learn it when their turn comes.
    pub(super) fn cut(&mut self, wire: usize) {
        self.wires[wire].cut = true;
        for side in 0..2 {
            self.wires[wire].ends[side].pipe.clear();
            if !self.wires[wire].ends[side].closed {
                self.wires[wire].ends[side].fin = Some(self.now + ms(side as u64));
            }
        }
    }

    /// Nothing gets through on the links there are, nor on new ones, until `heal`.
    pub(super) fn partition(&mut self) {
        self.partitioned = true;
        for wire in &mut self.wires {
            wire.silent = true;
        }
    }

    pub(super) fn heal(&mut self) {
        self.partitioned = false;
    }

    pub(super) fn connect(&mut self) {
        let ticket = Ticket::new();
        self.call(0, |core, env| core.request_connect(ticket, env));
        self.run_until("connected", |w| w.is_up(0) && w.is_up(1));
    }

    /// Nothing is left over: no transfer, request or count, no budget taken, every region free.
    pub(super) fn assert_quiet(&mut self) {
        for node in 0..2 {
            if !self.nodes[node].alive {
                continue;
            }
            let Node { core, peer, .. } = &self.nodes[node];
            assert!(core.active.is_empty() && core.requests.is_empty(), "requests of {node}");
            assert_eq!(peer.in_flight(), 0, "transfers in flight of {node}");
            assert_eq!(peer.unacknowledged(), (0, 0), "notification budget of {node}");
            assert_eq!(core.inbox.counts(), 0, "counted transfers at {node}");
            for buffer in 0..self.nodes[node].buffers.len() {
                let ticket = Ticket::new();
                let Node { regions, buffers, .. } = &mut self.nodes[node];
                regions.close(&buffers[buffer].region, ticket.clone());
                assert!(ticket.is_complete(), "region {buffer} of {node} is in use");
                regions.add(buffers[buffer].region.clone());
            }
        }
    }

    /// As `assert_quiet`, and no link was broken by a rule.
    pub(super) fn assert_clean(&mut self) {
        self.run(ms(200));
        assert_eq!(self.broken, [], "links broken");
        self.assert_quiet();
    }
}
