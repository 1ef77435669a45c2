//! The protocol core of one peer. See the module above for its place.

#[cfg(feature = "sim")]
mod inspect;
mod links;
mod local;
mod rdma;
mod requests;
mod serve;
mod session;
mod staged;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use slab::Slab;

use self::links::CoreLink;
use self::local::Local;
use self::rdma::Rdma;
use self::requests::{Active, ActiveKey, Request};
use self::staged::{PackSize, Packs};
use super::inbox::{Inbox, InboxError};
use super::liveness::Liveness;
use super::outbox::Outbox;
use crate::error::Error;
use crate::gpu::Block;
use crate::memory::{LaneRegions, RegionUses, Segments};
use crate::notification::NotificationQueue;
use crate::peer::PeerShared;
use crate::plan::PlanInner;
use crate::stats::Counters;
use crate::sync::Ticket;
use crate::wire::frame::{FrameError, HEADER_BYTES, Header};
use crate::wire::hello::LinkKind;

pub(crate) use self::local::RingState;
pub(crate) use self::rdma::{RailPairs, Wired, WiredEnd};
pub(crate) use self::serve::{Dest, Landing};
pub(crate) use self::session::ConnectFailure;
pub(crate) use self::staged::{LandingKey, NextPack, PackJob, PackKind};

/// Requests that one side may have outstanding on one link. Part of the protocol: a peer that
/// exceeds it is cut off, so that what a server remembers is bounded.
pub(crate) const MAX_OUTSTANDING: usize = 128;
/// Requests that we have outstanding on a bulk link: enough to keep it busy while answers travel.
const BULK_WINDOW: usize = 16;
/// How long an acknowledgement waits for another frame to travel with.
const ACK_DELAY: Duration = Duration::from_millis(2);
/// Notifications that arrive before an acknowledgement is sent by itself.
const ACK_COUNT: u64 = 64;
/// First and longest pause between attempts to connect for notifications that wait.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// How long after our link came up an attempt of the peer may still be on its way that began before.
const SIMULTANEOUS: Duration = Duration::from_secs(1);
/// How long the session of a peer that only connected to us is kept after its link was lost.
const KEEP_LOST: Duration = Duration::from_secs(30);

/// A link, as the driver names it.
pub(crate) type LinkId = u64;

/// What the core of a peer needs to know of the engine's configuration.
#[derive(Debug, Clone)]
pub(crate) struct CoreConfig {
    pub(crate) operation_timeout: Duration,
    pub(crate) stream_idle: Duration,
    pub(crate) streams: usize,
}

/// What the core works on besides its own state; owned by the lane.
pub(crate) struct Env<'a> {
    /// The time at which the lane's turn began.
    pub(crate) now: Instant,
    /// Where to look for the time within a turn; without, it stands still.
    pub(crate) clock: Option<fn() -> Instant>,
    pub(crate) regions: &'a mut LaneRegions,
    pub(crate) notifications: &'a NotificationQueue,
    pub(crate) counters: &'a Counters,
}

/// What the driver has to do.
#[derive(Debug)]
pub(crate) enum Event {
    /// Open a link of this kind; answer with a link or `connect_failed`. `again`: right after the
    /// link before it was lost.
    Connect { kind: LinkKind, again: bool },
    /// Give up attempts to connect the session.
    AbortConnect,
    /// Close the link; `after_flush`: once all frames taken so far are sent. Answer: `link_down`.
    Close { link: LinkId, reason: String, after_flush: bool },
    /// End a transfer that the driver has posted; `stuck`: whatever it costs.
    StopWired { key: u64, stuck: bool },
    /// The session has been left as asked.
    Left,
    /// Nothing depends on the peer, and it is not loaded (any more).
    Forget,
}

/// The peer broke the protocol: the link is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtocolError {
    #[error("protocol error: {0}")]
    Frame(#[from] FrameError),
    #[error("protocol error: {0}")]
    Inbox(#[from] InboxError),
    #[error("protocol error: {0}")]
    Rule(&'static str),
}

/// The payload of a frame to send.
#[derive(Debug)]
pub(crate) enum TxPayload {
    None,
    /// This engine's memory, by a piece of a plan.
    Plan(Arc<PlanInner>, u32),
    /// This engine's memory, as a peer asked for it.
    Served(Segments),
    /// Bytes of a notification.
    Bytes(Arc<[u8]>, std::ops::Range<usize>),
}

/// What to tell the core when a frame is wholly in the kernel's hands, or will never be.
#[derive(Debug)]
#[must_use]
pub(crate) enum Sent {
    Nothing,
    /// A WRITE: its local memory is not read any more.
    Write(u64),
    /// A DATA: the regions are not read any more.
    Served(RegionUses),
    /// The payload came from this block; a WRITE has a number.
    Packed {
        block: Block,
        size: PackSize,
        write: Option<u64>,
    },
}

/// One frame to send.
#[derive(Debug)]
pub(crate) struct TxFrame {
    pub(crate) header: [u8; HEADER_BYTES],
    /// A segment table, by a piece of a plan.
    pub(crate) body: Option<(Arc<PlanInner>, u32)>,
    pub(crate) payload: TxPayload,
    pub(crate) sent: Sent,
}

impl TxFrame {
    fn header(header: &Header) -> Self {
        Self { header: header.encode(), body: None, payload: TxPayload::None, sent: Sent::Nothing }
    }
}

#[derive(Debug)]
enum Phase {
    Idle,
    Connecting,
    Up,
    /// `disconnect` was called: notifications are flushed until the deadline.
    Leaving {
        deadline: Instant,
        connecting: bool,
    },
}

/// When to acknowledge notifications.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AckPlan {
    None,
    /// At this instant, or with other frames before it.
    At(Instant),
    /// As soon as the link takes a frame.
    Now,
}

/// A free-standing call that waits for the session.
pub(crate) type ConnectTicket = Arc<Ticket<Result<(), Error>>>;

/// The conversation with one peer.
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not states")]
pub(crate) struct Core {
    pub(crate) peer: Arc<PeerShared>,
    config: CoreConfig,
    /// Whether this core may open links: false for the passive half of a connection to ourselves.
    active_side: bool,
    own_incarnation: u128,

    phase: Phase,
    /// Random number of the session; 0: none.
    session: u64,
    /// The peer knows that its session link is up: before, it might forget what we tell it.
    confirmed: bool,
    /// The last attempt of the peer that was accepted.
    newest_attempt: u64,
    liveness: Option<Liveness>,
    outbox: Outbox,
    inbox: Inbox,
    ack: AckPlan,
    ack_base: u64,
    /// When to connect again for notifications that wait (`None`: under way), and the last pause.
    retry: Option<(Option<Instant>, Duration)>,
    /// How often that was decided.
    attempts: u64,
    /// When to forget a peer that is not loaded and has no link.
    forget: Option<Instant>,
    connecting: Vec<ConnectTicket>,
    leaving: Vec<Arc<Ticket<usize>>>,

    links: Vec<CoreLink>,
    bulk_connecting: usize,
    /// Bulk links cannot be had: bulk goes over the session link.
    bulk_over_session: bool,
    /// Frames of the session link that go before all others.
    control: VecDeque<Header>,
    /// Takes turns between answers, requests and notifications on the session link.
    turn: u8,

    active: Slab<Active>,
    next_stamp: u32,
    next_transfer: u64,
    requests: Slab<Request>,
    latency: VecDeque<ActiveKey>,
    bulk: VecDeque<ActiveKey>,
    /// Transfers that this side copies, and that nobody has taken up.
    copies: VecDeque<ActiveKey>,
    /// Transfers of GPU memory that wait for it to be known how the peer is reached.
    on_device: VecDeque<ActiveKey>,
    /// What is to be brought from GPUs into blocks before it is sent.
    replies_to_pack: Packs,
    writes_to_pack: Packs,
    local: Local,
    /// Why the last session on this host has no way to the peer's memory.
    local_reason: String,
    /// Transfers that go by RDMA, and that the driver has not taken up.
    wired: VecDeque<ActiveKey>,
    rdma: Rdma,
    rdma_expected: bool,
    rdma_reason: String,
    ring: Option<RingState>,
    /// The ring is used again when all notifications below are acknowledged.
    socket_until: u64,
    /// Deadlines in order; entries of ended transfers are skipped.
    deadlines: VecDeque<(Instant, ActiveKey)>,

    events: VecDeque<Event>,
}

impl Core {
    pub(crate) fn new(
        peer: Arc<PeerShared>,
        config: CoreConfig,
        own_incarnation: u128,
        active_side: bool,
    ) -> Self {
        Self {
            peer,
            config,
            active_side,
            own_incarnation,
            phase: Phase::Idle,
            session: 0,
            confirmed: false,
            newest_attempt: 0,
            liveness: None,
            outbox: Outbox::default(),
            inbox: Inbox::default(),
            ack: AckPlan::None,
            ack_base: 0,
            retry: None,
            attempts: 0,
            forget: None,
            connecting: Vec::new(),
            leaving: Vec::new(),
            links: Vec::new(),
            bulk_connecting: 0,
            bulk_over_session: false,
            control: VecDeque::new(),
            turn: 0,
            active: Slab::new(),
            next_stamp: 0,
            next_transfer: 1,
            requests: Slab::new(),
            latency: VecDeque::new(),
            bulk: VecDeque::new(),
            copies: VecDeque::new(),
            on_device: VecDeque::new(),
            replies_to_pack: Packs::default(),
            writes_to_pack: Packs::default(),
            local: Local::Off,
            local_reason: String::new(),
            wired: VecDeque::new(),
            rdma: Rdma::Off,
            rdma_expected: false,
            rdma_reason: String::new(),
            ring: None,
            socket_until: 0,
            deadlines: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Bytes of the peer have arrived.
    #[inline]
    pub(crate) fn heard(&mut self, now: Instant) {
        if let Some(liveness) = &mut self.liveness
            && !mutated!(HearsNothing)
        {
            liveness.heard(now);
        }
    }

    /// What the driver has to do; call until `None` after every other call.
    #[inline]
    pub(crate) fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call `on_timeout`.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let leaving = match self.phase {
            Phase::Leaving { deadline, .. } => Some(deadline),
            _ => None,
        };
        let idle = self.links.iter().filter_map(|link| self.idle_deadline(link)).min();
        let dumb = self.links.iter().filter_map(|link| self.answer_deadline(link)).min();
        [
            self.liveness.as_ref().map(Liveness::next),
            self.deadlines.front().map(|(at, _)| *at),
            if let AckPlan::At(at) = self.ack { Some(at) } else { None },
            self.forget,
            self.retry.and_then(|(at, _)| at),
            leaving,
            idle,
            dumb,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Does what time has made due.
    pub(crate) fn on_timeout(&mut self, env: &mut Env<'_>) {
        if matches!(self.ack, AckPlan::At(at) if at <= env.now) {
            self.ack = AckPlan::Now;
        }
        self.check_liveness(env);
        self.expire_transfers(env);
        self.close_dumb_streams(env.now);
        self.close_idle_links(env);
        if self.retry.is_some_and(|(at, _)| at.is_some_and(|at| at <= env.now)) {
            self.connect(false);
        }
        if self.forget.is_some_and(|at| at <= env.now) {
            self.forget = None;
            self.forget_if_unused(env);
        }
        if let Phase::Leaving { deadline, .. } = self.phase
            && deadline <= env.now
        {
            self.finish_leaving(env);
        }
        self.try_finish_leaving(env);
    }

    /// A stopped or dead lane: everything ends now, with this error.
    pub(crate) fn abort(&mut self, error: &Error, env: &mut Env<'_>) {
        self.stop_settling(error, env);
        self.drop_unsent();
        self.fail_all(error, env);
        self.wait_for_copies(env);
        let dropped = self.drop_notifications(env);
        for ticket in self.connecting.drain(..) {
            ticket.complete(Err(error.clone()));
        }
        for ticket in self.leaving.drain(..) {
            ticket.complete(dropped);
        }
    }
}

#[cfg(test)]
mod tests;
