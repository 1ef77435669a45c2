//! The protocol core of one engine against a peer that says anything at any time.
//!
//! The peer may be an honest one for a while: frames can name requests that were made, keys that exist and sequence numbers
//! that are due. The other side's socket is a sink.

mod peer;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Choices;
use crate::config::Limits;
use crate::memory::{LaneRegions, LocalSegment, RegionInner, Registry};
use crate::notification::NotificationQueue;
use crate::peer::PeerShared;
use crate::plan::{Operation, PlanBuilder};
use crate::session::{Core, CoreConfig, Dest, Env, Event, LinkId, TxFrame, TxPayload};
use crate::stats::Counters;
use crate::sync::{SlotState, Ticket};
use crate::sys::IoSegment;
use crate::transfer::TransferShared;
use crate::transport::rdma::Registrations;
use crate::wire::frame::{FrameKind, Header};
use crate::wire::hello::LinkKind;
use crate::wire::{Access, MemoryKind, Metadata, RailKeys, RegionDescriptor, RegionKey};

/// Bytes of each region of the engine.
const LEN: usize = 4096;
/// Bytes of one request; transfers of more are bulk.
const CHUNK: u64 = 1024;
/// Steps of one input.
const STEPS: usize = 400;

/// Registered memory, touched by its address only.
struct Memory {
    base: *mut u8,
    region: Arc<RegionInner>,
}

impl Memory {
    fn holds(&self, segment: &IoSegment) -> bool {
        let base = self.base as u64;
        segment.addr() >= base && segment.addr() + segment.len() as u64 <= base + LEN as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let whole = std::ptr::slice_from_raw_parts_mut(self.base, LEN);
        // SAFETY: `base` is that of a boxed slice of `LEN` bytes, which `World::new` leaked.
        drop(unsafe { Box::from_raw(whole) });
    }
}

/// A link that the core knows.
struct Link {
    id: LinkId,
    kind: LinkKind,
    /// A payload that has not arrived as a whole.
    arriving: Option<Dest>,
    /// Frames that are not wholly in the kernel's hands.
    leaving: Vec<TxFrame>,
}

pub(super) struct World {
    now: Instant,
    pub(super) core: Core,
    pub(super) regions: LaneRegions,
    pub(super) queue: NotificationQueue,
    pub(super) counters: Counters,
    peer: Arc<PeerShared>,
    registry: Registry,
    memory: Vec<Memory>,
    remote: RegionDescriptor,
    links: Vec<Link>,
    next_link: LinkId,
    /// Links that the core wants to have opened.
    wanted: Vec<LinkKind>,
    /// Requests that were made, and not answered as far as this side knows.
    asked: Vec<(LinkId, Header)>,
    posted: Vec<Arc<TransferShared>>,
    session: u64,
    attempt: u64,
    /// What an honest peer would number its next notification.
    next_notification: u64,
    forgotten: bool,
}

impl World {
    pub(super) fn new() -> Self {
        let metadata = Metadata {
            name: "b".into(),
            incarnation: 2,
            secret: [0; 32],
            transports: 1,
            addresses: Vec::new(),
        };
        let limits = Limits::default();
        let peer = PeerShared::new("b".into(), 2, 0, Some(Arc::new(metadata)), &limits);
        let peer = Arc::new(peer);
        let config = CoreConfig {
            operation_timeout: Duration::from_secs(30),
            stream_idle: Duration::from_secs(10),
            streams: 2,
        };
        let remote = RegionDescriptor {
            incarnation: 2,
            key: RegionKey::new(3, 12345),
            base: 1 << 20,
            len: 1 << 20,
            kind: MemoryKind::Dram,
            access: Access::READ_WRITE,
            rail_keys: RailKeys::new(),
            device: None,
        };
        let mut world = Self {
            now: Instant::now(),
            core: Core::new(peer.clone(), config, 1, true),
            regions: LaneRegions::default(),
            queue: NotificationQueue::new(64, 256 << 10),
            counters: Counters::default(),
            peer,
            registry: Registry::new(100),
            memory: Vec::new(),
            remote,
            links: Vec::new(),
            next_link: 1,
            wanted: Vec::new(),
            asked: Vec::new(),
            posted: Vec::new(),
            session: 0,
            attempt: 0,
            next_notification: 0,
            forgotten: false,
        };
        for access in [Access::READ_WRITE, Access::REMOTE_READ, Access::LOCAL] {
            world.register(access);
        }
        world
    }

    fn register(&mut self, access: Access) {
        let base = Box::into_raw(vec![0u8; LEN].into_boxed_slice()).cast::<u8>();
        let make = |slot| RegionDescriptor {
            incarnation: 1,
            key: RegionKey::new(slot, 77),
            base: base as u64,
            len: LEN as u64,
            kind: MemoryKind::Dram,
            access,
            rail_keys: RailKeys::new(),
            device: None,
        };
        let Ok(region) = self.registry.insert(
            make,
            crate::memory::Backing::Application,
            Registrations::default(),
        ) else {
            unreachable!("three regions are within the limit")
        };
        self.regions.add(region.clone());
        self.memory.push(Memory { base, region });
    }

    /// Where the first region is.
    pub(super) fn base(&self) -> u64 {
        self.memory[0].base as u64
    }

    fn call<R>(&mut self, call: impl FnOnce(&mut Core, &mut Env<'_>) -> R) -> R {
        let Self { core, regions, queue, counters, .. } = self;
        let env = &mut Env { now: self.now, clock: None, regions, notifications: queue, counters };
        call(core, env)
    }

    // --- what the driver does

    fn handle_events(&mut self) {
        for _ in 0..1000 {
            match self.core.poll_event() {
                None => return,
                Some(Event::Connect { kind, .. }) => self.wanted.push(kind),
                Some(Event::AbortConnect) => self.wanted.retain(|kind| *kind != LinkKind::Session),
                Some(Event::Close { link, after_flush, .. }) => {
                    if after_flush {
                        self.flush(link, usize::MAX);
                    }
                    self.link_down(link);
                }
                Some(Event::StopWired { .. }) => unreachable!("nothing was given to a device"),
                Some(Event::Left) => {}
                Some(Event::Forget) => self.forgotten = true,
            }
        }
        panic!("the core never comes to rest");
    }

    fn add_link(&mut self, kind: LinkKind) -> LinkId {
        let id = self.next_link;
        self.next_link += 1;
        self.links.push(Link { id, kind, arriving: None, leaving: Vec::new() });
        id
    }

    fn link_down(&mut self, id: LinkId) {
        let Some(index) = self.links.iter().position(|link| link.id == id) else { return };
        let link = self.links.swap_remove(index);
        self.asked.retain(|(known, _)| *known != id);
        self.call(|core, env| {
            if let Some(dest) = link.arriving {
                Core::drop_payload(dest, env);
            }
            for frame in link.leaving {
                core.on_sent(frame.sent, env);
            }
            core.link_down(id, "gone", env);
        });
        self.handle_events();
    }

    /// Takes frames to send, and looks at them as the other side would.
    fn flush(&mut self, id: LinkId, most: usize) {
        for _ in 0..most.min(1000) {
            let Some(frame) = self.call(|core, env| core.poll_transmit(id, false, env)) else {
                break;
            };
            let Ok(header) = Header::decode(&frame.header) else {
                panic!("an engine writes a header that none reads")
            };
            match &frame.payload {
                TxPayload::None | TxPayload::Bytes(..) => {}
                TxPayload::Plan(plan, piece) => self.assert_mine(plan.local(*piece), &[0, 1, 2]),
                // Never of the region that is open to no peer.
                TxPayload::Served(segments) => self.assert_mine(segments, &[0, 1]),
            }
            if matches!(header.kind, FrameKind::Read | FrameKind::Write) {
                self.asked.push((id, header));
            }
            if let Some(link) = self.links.iter_mut().find(|link| link.id == id) {
                link.leaving.push(frame);
            }
        }
    }

    fn sent(&mut self, id: LinkId) {
        let Some(link) = self.links.iter_mut().find(|link| link.id == id) else { return };
        for frame in std::mem::take(&mut link.leaving) {
            self.call(|core, env| core.on_sent(frame.sent, env));
        }
        self.handle_events();
    }

    fn assert_mine(&self, segments: &[IoSegment], regions: &[usize]) {
        for segment in segments {
            let mine = regions.iter().any(|index| self.memory[*index].holds(segment));
            assert!(mine, "{segment:?} is not in regions {regions:?}");
        }
    }

    /// Writes a payload where the core says, as a receiver does.
    fn land(&mut self, dest: &mut Dest, filler: u8) {
        let segments: Vec<IoSegment> = match dest {
            Dest::Request(id) => {
                let segments = self.core.destination(*id).unwrap_or(&[]).to_vec();
                self.assert_mine(&segments, &[0, 1, 2]);
                if let Some(first) = segments.first() {
                    assert!(self.is_receiving(*first), "written after the end of a transfer");
                }
                segments
            }
            Dest::Region { segments, .. } => {
                // Only the first region is open to writes.
                self.assert_mine(segments, &[0]);
                segments.to_vec()
            }
            Dest::Notification { payload, .. } => {
                payload.fill(filler);
                return;
            }
            Dest::Refused(_) | Dest::Landing(_) | Dest::None => return,
        };
        for segment in segments {
            // SAFETY: just checked to lie in memory of this world, to which nothing refers.
            unsafe { std::ptr::write_bytes(segment.addr() as *mut u8, filler, segment.len()) };
        }
    }

    fn is_receiving(&self, segment: IoSegment) -> bool {
        self.posted.iter().any(|posted| {
            let mut local =
                (0..posted.plan.pieces.len() as u32).flat_map(|piece| posted.plan.local(piece));
            posted.slot.state() == SlotState::Posted
                && local.any(|own| own.addr() == segment.addr())
        })
    }

    // --- what this engine's application does

    fn post(&mut self, choices: &mut Choices<'_>) {
        let operation = if choices.u8() & 1 == 0 { Operation::Read } else { Operation::Write };
        let len = [8, 64, 200, CHUNK, 3 * CHUNK, LEN as u64][usize::from(choices.u8()) % 6];
        let memory = &self.memory[usize::from(choices.u8()) % self.memory.len()];
        let local = LocalSegment { addr: memory.base as u64, len };
        let builder = PlanBuilder {
            operation,
            peer: &self.peer,
            registry: &self.registry,
            chunk_bytes: CHUNK,
            latency_bytes: 256,
            max_descriptors: 1000,
            local: false,
            rdma: false,
        };
        let offset = u64::from(choices.u16());
        let Ok(plan) = builder.build(&[local][..], &[self.remote.segment(offset, len)][..]) else {
            return;
        };
        if self.posted.len() >= 64 || !self.peer.try_enter() {
            return;
        }
        let shared = Arc::new(TransferShared::new(Arc::new(plan)));
        assert!(shared.slot.begin().is_some());
        if choices.u8() & 1 == 0 {
            let payload = vec![1; usize::from(choices.u16()) % 6000];
            if self.peer.reserve(payload.len()).is_ok() {
                *shared.notification() = Some(payload.into());
            }
        }
        self.posted.push(shared.clone());
        self.call(|core, env| core.post(shared, env));
        self.handle_events();
    }

    fn step(&mut self, choices: &mut Choices<'_>) {
        match choices.u8() % 20 {
            0..=7 => self.frame(choices),
            8 => self.accept(choices),
            9 => self.answer_attempt(choices),
            10 | 11 => self.post(choices),
            12 => {
                if let Some(id) = self.pick(choices) {
                    self.flush(id, usize::from(choices.u8() & 15) + 1);
                    if choices.u8() & 3 != 0 {
                        self.sent(id);
                    }
                }
            }
            13 => {
                let payload = vec![2u8; usize::from(choices.u16())];
                if self.peer.reserve(payload.len()).is_ok() {
                    self.call(|core, env| core.notify(payload.into(), env));
                    self.handle_events();
                }
            }
            14 => {
                let all = self.posted.len();
                if all > 0 {
                    let shared = self.posted[usize::from(choices.u8()) % all].clone();
                    if shared.slot.state() == SlotState::Posted {
                        self.call(|core, env| core.cancel(&shared, env));
                        self.handle_events();
                    }
                }
            }
            15 => self.pass(Duration::from_millis(u64::from(choices.u16()))),
            16 => {
                if let Some(id) = self.pick(choices) {
                    self.link_down(id);
                }
            }
            17 => {
                while self.queue.pop().is_some() {}
                if self.queue.take_stalled() {
                    self.call(Core::deliver);
                    self.handle_events();
                }
            }
            18 => self.ring(choices),
            _ => match choices.u8() % 8 {
                0 => {
                    let deadline = self.now + Duration::from_millis(u64::from(choices.u8()));
                    self.call(|core, env| core.leave(deadline, Ticket::new(), env));
                    self.handle_events();
                }
                1 => {
                    let ticket = Ticket::new();
                    self.call(|core, env| core.request_connect(ticket, env));
                    self.handle_events();
                }
                _ => {
                    let reason = Err("not mapped".to_owned());
                    self.call(|core, env| core.local_resolved(reason, env));
                    self.handle_events();
                }
            },
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        for _ in 0..10_000 {
            match self.core.next_timeout() {
                Some(at) if at <= end => {
                    self.now = at.max(self.now);
                    self.call(Core::on_timeout);
                    self.handle_events();
                }
                _ => {
                    self.now = end;
                    return;
                }
            }
        }
        panic!("the core asks for time without end");
    }

    /// The peer is gone, and the application leaves: nothing may stay behind.
    fn finish(mut self) {
        for _ in 0..3 {
            while let Some(id) = self.links.first().map(|link| link.id) {
                self.link_down(id);
            }
            while let Some(kind) = self.wanted.pop() {
                self.fail_attempt(kind, 0xff);
            }
            self.pass(Duration::from_secs(31));
        }
        while self.queue.pop().is_some() {}
        self.call(Core::deliver);
        self.handle_events();
        let left = Ticket::new();
        let (deadline, ticket) = (self.now, left.clone());
        self.call(|core, env| core.leave(deadline, ticket, env));
        self.handle_events();
        while let Some(kind) = self.wanted.pop() {
            self.fail_attempt(kind, 0xff);
        }
        self.pass(Duration::from_secs(1));
        assert!(left.is_complete(), "leaving takes for ever");
        for posted in &self.posted {
            assert!(posted.slot.state() != SlotState::Posted, "a transfer never ends");
        }
        assert_eq!(self.peer.in_flight(), 0);
        assert_eq!(self.peer.unacknowledged(), (0, 0));
        self.assert_unused();
    }

    /// No region is counted as used by anybody.
    pub(super) fn assert_unused(&mut self) {
        for memory in &self.memory {
            let ticket = Ticket::new();
            self.regions.close(&memory.region, ticket.clone());
            assert!(ticket.is_complete(), "a region stays in use");
        }
    }
}

/// Any conversation.
pub fn session(bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    let mut world = World::new();
    for _ in 0..STEPS {
        if choices.is_empty() || world.forgotten {
            break;
        }
        world.step(&mut choices);
    }
    world.finish();
}
