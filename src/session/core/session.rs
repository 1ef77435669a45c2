//! The life of the session: connecting, coming up, silence, goodbye.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{
    AckPlan, ConnectTicket, Core, Env, Event, KEEP_LOST, LinkId, Phase, RETRY_MAX, RETRY_MIN,
    SIMULTANEOUS,
};
use crate::error::Error;
use crate::session::handshake::{HandshakeError, Intent};
use crate::session::liveness::{Liveness, Verdict};
use crate::session::outbox::Freed;
use crate::sync::Ticket;
use crate::wire::frame::{FrameKind, Header};
use crate::wire::hello::{Hello, LinkKind, Refusal, Welcome};

/// Why a link could not be opened.
#[derive(Debug, Clone)]
pub(crate) struct ConnectFailure {
    /// Every address and what it said.
    pub(crate) reason: String,
    /// The handshake error, when one address got that far.
    pub(crate) handshake: Option<HandshakeError>,
    /// The peer's host answered that nobody listens there, on every address that answered at all.
    pub(crate) refused: bool,
}

impl Core {
    /// What a link of this kind says in its handshake.
    pub(crate) fn intent(&self, kind: LinkKind) -> Intent {
        // Of the process and not of the core, which may be made anew for the same peer.
        static ATTEMPTS: AtomicU64 = AtomicU64::new(1);
        let attempt = ATTEMPTS.fetch_add(1, Ordering::Relaxed);
        Intent { kind, session: self.session, attempt, expects: self.inbox.expects() }
    }

    fn start_session(&mut self, number: u64, env: &mut Env<'_>) {
        self.session = number;
        let freed = self.outbox.restart();
        self.dropped(freed, env);
        self.inbox.restart();
        self.ack_base = 0;
        self.socket_until = 0;
    }

    /// Starts connecting if something waits and nothing is under way.
    pub(super) fn ensure_connected(&mut self, env: &mut Env<'_>) {
        if !matches!(self.phase, Phase::Idle) {
            return;
        }
        if self.can_connect() {
            self.connect(false);
        } else {
            self.fail_all(&self.peer.away(), env);
        }
    }

    fn can_connect(&self) -> bool {
        self.active_side && self.peer.metadata().is_some()
    }

    pub(super) fn connect(&mut self, again: bool) {
        self.retry = self.retry.map(|(_, pause)| (None, pause));
        match &mut self.phase {
            Phase::Idle => self.phase = Phase::Connecting,
            Phase::Leaving { connecting, .. } if !*connecting => *connecting = true,
            _ => return,
        }
        self.events.push_back(Event::Connect { kind: LinkKind::Session, again });
    }

    /// `connect` of the application.
    pub(crate) fn request_connect(&mut self, ticket: ConnectTicket, env: &mut Env<'_>) {
        match self.phase {
            Phase::Up => ticket.complete(Ok(())),
            Phase::Leaving { .. } => ticket.complete(Err(Error::Cancelled)),
            Phase::Idle | Phase::Connecting => {
                self.connecting.push(ticket);
                self.ensure_connected(env);
                if matches!(self.phase, Phase::Idle) {
                    let error = self.peer.gone("its metadata has not been loaded");
                    self.answer_connects(&Err(error));
                }
            }
        }
    }

    fn answer_connects(&mut self, outcome: &Result<(), Error>) {
        for ticket in self.connecting.drain(..) {
            ticket.complete(outcome.clone());
        }
    }

    /// Queues a free-standing notification, whose place was reserved.
    pub(crate) fn notify(&mut self, payload: Arc<[u8]>, env: &mut Env<'_>) {
        self.outbox.push(payload, None);
        if matches!(self.phase, Phase::Idle) && self.retry.is_none() {
            if self.can_connect() {
                self.connect(false);
            } else if self.session == 0 {
                // It was taken just before the session was over.
                self.peer.set_away();
                self.drop_notifications(env);
            }
            // Else only the peer can connect, and it may yet resume the session.
        }
    }

    pub(super) fn drop_notifications(&mut self, env: &mut Env<'_>) -> usize {
        let freed = self.outbox.clear();
        self.dropped(freed, env)
    }

    fn dropped(&mut self, freed: Freed, env: &mut Env<'_>) -> usize {
        self.peer.release(freed.count, freed.bytes);
        env.counters.notifications_dropped.add(freed.count as u64);
        if freed.count > 0 {
            tracing::warn!(
                peer = &*self.peer.name,
                notifications = freed.count,
                bytes = freed.bytes,
                "dropped notifications that were not acknowledged when their session ended"
            );
        }
        freed.count
    }

    /// Decides on a session link that the peer opened and proved. `random` numbers a new session.
    /// The driver calls `session_up` next, or `accept_failed`.
    pub(crate) fn accept_session(
        &mut self,
        hello: &Hello,
        liveness_ms: u32,
        random: u64,
        env: &mut Env<'_>,
    ) -> Result<Welcome, Refusal> {
        if hello.attempt <= self.newest_attempt
            || (mutated!(AcceptsNoSecondAttempt) && self.newest_attempt > 0)
        {
            // It was given up before the one that was accepted.
            return Err(Refusal::Simultaneous);
        }
        let connecting =
            matches!(self.phase, Phase::Connecting | Phase::Leaving { connecting: true, .. });
        // An attempt that the peer began before it knew of our link may arrive after it.
        let won = self.links.iter().any(|link| {
            let young = env.now.saturating_duration_since(link.since) < SIMULTANEOUS;
            link.kind == LinkKind::Session && link.ours && !link.closing && young
        });
        let ours_stays = self.own_incarnation < hello.initiator || mutated!(BothRefuse);
        if (connecting || won) && self.active_side && ours_stays {
            // Both sides connect: the link of the smaller incarnation stays.
            return Err(Refusal::Simultaneous);
        }
        self.newest_attempt = hello.attempt;
        if self.session_link().is_some() {
            // The peer would not connect if its link were alive.
            self.session_lost("the peer has connected again", env);
        }
        if connecting {
            self.events.push_back(Event::AbortConnect);
        }
        match &mut self.phase {
            Phase::Leaving { connecting, .. } => *connecting = false,
            phase => *phase = Phase::Idle,
        }
        let known = self.session != 0 && self.session == hello.session;
        let resumed = known && self.resume_outbox(hello.expects);
        if !resumed {
            self.start_session(random.max(1), env);
        }
        let liveness_ms = liveness_ms.min(hello.liveness_ms).max(50);
        let (session, expects) = (self.session, self.inbox.expects());
        Ok(Welcome { resumed, session, expects, liveness_ms })
    }

    /// The link that `accept_session` agreed to has broken before it was up.
    pub(crate) fn accept_failed(&mut self, env: &mut Env<'_>) {
        match self.phase {
            Phase::Idle => self.reconnect("it connected and was gone at once", env),
            Phase::Leaving { .. } => self.try_finish_leaving(env),
            Phase::Connecting | Phase::Up => {}
        }
    }

    fn resume_outbox(&mut self, expects: u64) -> bool {
        match self.outbox.resume(expects) {
            Some(freed) => {
                self.peer.release(freed.count, freed.bytes);
                true
            }
            None => false,
        }
    }

    /// Whether a bulk link that the peer opened belongs to the session.
    pub(crate) fn accept_bulk(&self, hello: &Hello) -> Result<Welcome, Refusal> {
        if self.session == 0 || hello.session != self.session || self.session_link().is_none() {
            return Err(Refusal::NoSession);
        }
        let theirs = self.links.iter().filter(|l| l.kind == LinkKind::Bulk && !l.ours).count();
        if theirs >= 64 {
            return Err(Refusal::Limit);
        }
        let (session, liveness_ms) = (self.session, hello.liveness_ms);
        Ok(Welcome { resumed: true, session, expects: 0, liveness_ms })
    }

    /// The session link that we opened is welcome.
    pub(crate) fn session_welcomed(
        &mut self,
        link: LinkId,
        welcome: &Welcome,
        on_this_host: bool,
        env: &mut Env<'_>,
    ) -> Result<(), &'static str> {
        if !matches!(self.phase, Phase::Connecting | Phase::Leaving { connecting: true, .. }) {
            return Err("the session is up already, or not wanted any more");
        }
        if !welcome.resumed {
            self.start_session(welcome.session.max(1), env);
        } else if welcome.session != self.session || !self.resume_outbox(welcome.expects) {
            // The next attempt begins a new session.
            self.session = 0;
            return Err("it resumes a session that never was");
        }
        self.session_up(link, welcome.liveness_ms, true, on_this_host, env);
        Ok(())
    }

    /// The session link is up, whoever opened it. `on_this_host`: over a Unix socket, so that the driver
    /// finds out whether there is more, and says so by `local_resolved`.
    pub(crate) fn session_up(
        &mut self,
        link: LinkId,
        liveness_ms: u32,
        ours: bool,
        on_this_host: bool,
        env: &mut Env<'_>,
    ) {
        let timeout = Duration::from_millis(u64::from(liveness_ms.max(50)));
        self.liveness = Some(Liveness::new(timeout, env.now));
        self.add_link(link, LinkKind::Session, ours, env.now);
        self.local_pending(on_this_host, env);
        self.confirmed = ours;
        if ours {
            // The first frame tells the peer that its welcome has arrived.
            self.control.push_back(Header::new(FrameKind::Ping));
        }
        self.retry = None;
        self.forget = None;
        self.bulk_over_session = false;
        self.bulk_connecting = 0;
        match &mut self.phase {
            Phase::Leaving { connecting, .. } => *connecting = false,
            phase => *phase = Phase::Up,
        }
        self.peer.connected.store(true, std::sync::atomic::Ordering::Release);
        self.peer.set_last_error(None);
        self.peer.set_unreachable(None);
        self.answer_connects(&Ok(()));
        self.want_bulk();
        self.try_finish_leaving(env);
    }

    /// The session link is gone, and all links with it; the session itself may be resumed.
    fn session_lost(&mut self, reason: &str, env: &mut Env<'_>) {
        if !mutated!(LostStaysConnected) {
            self.peer.connected.store(false, std::sync::atomic::Ordering::Release);
        }
        self.peer.set_last_error(Some(reason.to_owned()));
        self.liveness = None;
        self.control.clear();
        self.ack = AckPlan::None;
        for link in &mut self.links {
            if !link.closing {
                link.closing = true;
                let reason = format!("its session link is gone: {reason}");
                self.events.push_back(Event::Close { link: link.id, reason, after_flush: false });
            }
        }
        self.lose_begun(reason, env);
        self.local_off();
        self.rdma_off();
        if mutated!(LostLinkEmptiesTheOutbox) {
            let freed = self.outbox.clear();
            self.peer.release(freed.count, freed.bytes);
        }
        self.outbox.rewind();
        self.inbox.rewind();
    }

    pub(super) fn session_down(&mut self, reason: &str, env: &mut Env<'_>) {
        self.session_lost(reason, env);
        match self.phase {
            Phase::Leaving { .. } => self.finish_leaving(env),
            Phase::Up => {
                self.phase = Phase::Idle;
                self.reconnect(reason, env);
            }
            // It had been left, and perhaps asked for again.
            Phase::Idle | Phase::Connecting => {}
        }
        if matches!(self.phase, Phase::Idle) && !self.peer.is_loaded() {
            // The session may be resumed for a while, unless it is over.
            let keep = if self.session == 0 { Duration::ZERO } else { KEEP_LOST };
            self.forget = Some(env.now + keep);
        }
    }

    /// Transfers that had not issued anything, and notifications, try once more.
    fn reconnect(&mut self, reason: &str, env: &mut Env<'_>) {
        if !self.wants(LinkKind::Session) && self.connecting.is_empty() {
            return;
        }
        if self.can_connect() {
            self.connect(true);
        } else {
            let error = self.peer.gone(reason);
            self.fail_all(&error, env);
            self.answer_connects(&Err(error));
        }
    }

    /// An attempt to open a link has failed.
    pub(crate) fn connect_failed(
        &mut self,
        kind: LinkKind,
        failure: &ConnectFailure,
        env: &mut Env<'_>,
    ) {
        if kind == LinkKind::Bulk {
            self.bulk_connecting = self.bulk_connecting.saturating_sub(1);
            if self.bulk_connecting == 0 && self.own_bulk_links() == 0 {
                self.bulk_over_session = true;
            }
            return;
        }
        let leaving = match &mut self.phase {
            Phase::Connecting => {
                self.phase = Phase::Idle;
                false
            }
            Phase::Leaving { connecting: connecting @ true, .. } => {
                *connecting = false;
                true
            }
            _ => return,
        };
        self.peer.set_last_error(Some(failure.reason.clone()));
        let error = Error::Connect { peer: self.peer.name.clone(), reason: failure.reason.clone() };
        self.peer.set_unreachable(Some(error.clone()));
        self.fail_redone(&failure.reason, env);
        self.fail_all(&error, env);
        self.answer_connects(&Err(error));
        let restarted =
            matches!(failure.handshake, Some(HandshakeError::Refused(Refusal::Incarnation)));
        if restarted || failure.refused || leaving {
            // Nobody will ever take them: its process is gone, another engine lives there now, or
            // we are leaving.
            self.session = 0;
            self.retry = None;
            self.drop_notifications(env);
            return self.try_finish_leaving(env);
        }
        self.retry = if self.outbox.is_empty() {
            None
        } else {
            let pause = self.retry.map_or(RETRY_MIN, |(_, pause)| (pause * 2).min(RETRY_MAX));
            Some((Some(env.now + pause * self.jitter() / 1024), pause))
        };
    }

    /// Between 768 and 1279 of 1024, another for each attempt and each pair of engines: so that those who have lost the same peer do not
    /// all come back to it at once.
    fn jitter(&mut self) -> u32 {
        self.attempts = self.attempts.wrapping_add(1);
        let both = self.own_incarnation ^ self.peer.incarnation.rotate_left(64);
        let mut bits = (both as u64) ^ ((both >> 64) as u64) ^ self.attempts << 32;
        // The finaliser of SplitMix64.
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        768 + (bits >> 55) as u32
    }

    /// The peer has left: the session is over.
    pub(super) fn on_goodbye(&mut self, env: &mut Env<'_>) {
        let reason = "it has disconnected";
        let error = self.peer.gone(reason);
        self.fail_all(&error, env);
        self.peer.set_away();
        self.drop_notifications(env);
        self.session = 0;
        if let Some(link) = self.session_link() {
            self.close(link, reason, false);
        }
    }

    /// The peer's name belongs to another incarnation now: two that claim one name never mix.
    pub(crate) fn retire(&mut self, env: &mut Env<'_>) {
        let reason = "other metadata was loaded under its name";
        let error = self.peer.gone(reason);
        self.fail_all(&error, env);
        self.answer_connects(&Err(error));
        self.peer.set_away();
        self.drop_notifications(env);
        self.session = 0;
        self.retry = None;
        match self.session_link() {
            Some(link) => self.close(link, reason, false),
            None => self.forget_if_unused(env),
        }
    }

    /// A peer without metadata is of no use once its session is over: it can only come back as a
    /// new link, and is then made anew.
    pub(super) fn forget_if_unused(&mut self, env: &Env<'_>) {
        let unused = matches!(self.phase, Phase::Idle)
            && self.links.is_empty()
            && !self.has_transfers()
            && !self.peer.is_loaded();
        if !unused {
            return;
        }
        if self.inbox.is_backlogged() {
            self.forget = Some(env.now + KEEP_LOST);
        } else {
            self.events.push_back(Event::Forget);
        }
    }

    /// The session is being left.
    pub(crate) fn is_leaving(&self) -> bool {
        matches!(self.phase, Phase::Leaving { .. })
    }

    /// Nothing is left to say goodbye to.
    pub(crate) fn has_left(&self) -> bool {
        matches!(self.phase, Phase::Idle) && self.session_link().is_none()
    }

    /// Leaves the session: transfers are cancelled, notifications flushed until `deadline`.
    pub(crate) fn leave(
        &mut self,
        deadline: Instant,
        ticket: Arc<Ticket<usize>>,
        env: &mut Env<'_>,
    ) {
        self.leaving.push(ticket);
        self.fail_all(&Error::Cancelled, env);
        self.answer_connects(&Err(Error::Cancelled));
        let connecting = match self.phase {
            Phase::Leaving { .. } => return,
            Phase::Connecting => true,
            Phase::Idle | Phase::Up => false,
        };
        let retrying = self.retry.is_some();
        self.phase = Phase::Leaving { deadline, connecting };
        if retrying && !connecting {
            self.connect(false);
        }
        self.try_finish_leaving(env);
    }

    /// Ends the session as soon as nothing is left to flush, or nobody to flush it to.
    pub(super) fn try_finish_leaving(&mut self, env: &mut Env<'_>) {
        if let Phase::Leaving { connecting, .. } = self.phase {
            let reachable = connecting || self.session_link().is_some();
            if (self.outbox.is_empty() && !self.is_settling()) || !reachable {
                self.finish_leaving(env);
            }
        }
    }

    pub(super) fn finish_leaving(&mut self, env: &mut Env<'_>) {
        if !matches!(self.phase, Phase::Leaving { .. }) {
            return;
        }
        self.peer.set_away();
        let dropped = self.drop_notifications(env);
        let error = self.peer.gone("left before it had said that it writes nothing more");
        self.stop_settling(&error, env);
        self.session = 0;
        self.retry = None;
        self.phase = Phase::Idle;
        self.events.push_back(Event::AbortConnect);
        if let Some(link) = self.session_link() {
            // What has arrived is acknowledged, or the peer would count it as lost. What the ring holds of that
            // the goodbye overtakes.
            let in_ring = self.ring.map(|_| self.inbox.acknowledged());
            if let Some(below) = self.inbox.acknowledgement().or(in_ring) {
                self.control.push_back(Header { aux: below, ..Header::new(FrameKind::Ack) });
            }
            self.control.push_back(Header::new(FrameKind::Goodbye));
            self.close(link, "disconnected by this side", true);
        }
        // Before anybody is told: who was told may ask.
        self.peer.connected.store(false, std::sync::atomic::Ordering::Release);
        for ticket in self.leaving.drain(..) {
            ticket.complete(dropped);
        }
        self.events.push_back(Event::Left);
    }

    /// How long the peer may be silent; `None` while there is no session.
    pub(crate) fn liveness_timeout(&self) -> Option<Duration> {
        self.liveness.as_ref().map(Liveness::timeout)
    }

    pub(super) fn check_liveness(&mut self, env: &mut Env<'_>) {
        let Some(liveness) = &mut self.liveness else { return };
        if liveness.next() > env.now {
            return;
        }
        match liveness.check(env.now) {
            Verdict::Wait(_) => {}
            Verdict::Ping(_) if mutated!(NoPing) => {}
            Verdict::Dead if mutated!(NeverDead) => liveness.heard(env.now),
            Verdict::Ping(_) if mutated!(OwnPingsCount) => {
                liveness.heard(env.now);
                self.control.push_back(Header::new(FrameKind::Ping));
            }
            Verdict::Ping(_) => self.control.push_back(Header::new(FrameKind::Ping)),
            Verdict::Dead => {
                let reason = format!("it was silent for {:?}", liveness.timeout());
                env.counters.liveness_timeouts.add(1);
                self.liveness = None;
                // One that does not answer will not answer a new link either: nothing waits for that.
                let error = self.peer.gone(&reason);
                self.fail_all(&error, env);
                if let Some(link) = self.session_link()
                    && !mutated!(SilentLinkKept)
                {
                    self.close(link, reason, false);
                }
            }
        }
    }
}
