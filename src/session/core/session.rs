//! The life of the session: connecting, coming up, silence, goodbye.

use std::sync::Arc;
use std::time::Instant;

use super::{ConnectTicket, Core, Env, Event, LinkId, Phase, RETRY_MAX, RETRY_MIN};
use crate::error::Error;
use crate::session::handshake::{HandshakeError, Intent};
use crate::session::liveness::{Liveness, Verdict};
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
}

impl Core {
    /// What a link of this kind says in its handshake. `random` numbers a new session.
    pub(crate) fn intent(&mut self, kind: LinkKind, random: u64) -> Intent {
        if self.session == 0 && kind == LinkKind::Session {
            self.start_session(random.max(1));
        }
        Intent { kind, session: self.session, expects: self.inbox.expects() }
    }

    fn start_session(&mut self, number: u64) {
        self.session = number;
        self.outbox.restart();
        self.inbox.restart();
        self.ack_base = 0;
    }

    /// Starts connecting if something waits and nothing is under way.
    pub(super) fn ensure_connected(&mut self, env: &mut Env<'_>) {
        if !matches!(self.phase, Phase::Idle) {
            return;
        }
        if self.can_connect() {
            self.connect();
        } else {
            let error = self.peer.gone(
                "it connected to us and is gone; load its metadata to be able to connect to it",
            );
            self.fail_all(&error, env);
        }
    }

    fn can_connect(&self) -> bool {
        self.active_side && self.peer.metadata().is_some()
    }

    pub(super) fn connect(&mut self) {
        self.retry = self.retry.map(|(_, pause)| (None, pause));
        match &mut self.phase {
            Phase::Idle => self.phase = Phase::Connecting,
            Phase::Leaving { connecting, .. } if !*connecting => *connecting = true,
            _ => return,
        }
        self.events.push_back(Event::Connect(LinkKind::Session));
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
                self.connect();
            } else {
                self.drop_notifications(env);
            }
        }
    }

    fn drop_notifications(&mut self, env: &mut Env<'_>) -> usize {
        let freed = self.outbox.clear();
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

    /// Decides on a session link that the peer opened and proved.
    pub(crate) fn accept_session(
        &mut self,
        hello: &Hello,
        liveness_ms: u32,
        env: &mut Env<'_>,
    ) -> Result<Welcome, Refusal> {
        let connecting =
            matches!(self.phase, Phase::Connecting | Phase::Leaving { connecting: true, .. });
        if connecting && self.active_side && self.own_incarnation < hello.initiator {
            // Both sides connect: the link of the smaller incarnation stays.
            return Err(Refusal::Simultaneous);
        }
        if let Some(old) = self.session_link() {
            // The peer would not connect if its link were alive.
            self.close(old, "the peer has connected again", false);
            self.link_down(old, "the peer has connected again", env);
        }
        if connecting {
            self.events.push_back(Event::AbortConnect);
        }
        let resumed = self.session != 0 && self.session == hello.session;
        if !resumed {
            self.start_session(hello.session.max(1));
        } else if !self.resume_outbox(hello.expects) {
            return Err(Refusal::NoSession);
        }
        let liveness_ms = liveness_ms.min(hello.liveness_ms).max(50);
        Ok(Welcome { resumed, expects: self.inbox.expects(), liveness_ms })
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
        Ok(Welcome { resumed: true, expects: 0, liveness_ms: hello.liveness_ms })
    }

    /// The session link that we opened is welcome.
    pub(crate) fn session_welcomed(
        &mut self,
        link: LinkId,
        welcome: &Welcome,
        env: &mut Env<'_>,
    ) -> Result<(), &'static str> {
        if welcome.resumed {
            if !self.resume_outbox(welcome.expects) {
                return Err("it claims notifications that were never sent");
            }
        } else {
            let number = self.session;
            self.start_session(number);
        }
        self.session_up(link, welcome.liveness_ms, true, env);
        Ok(())
    }

    /// The session link is up, whoever opened it.
    pub(crate) fn session_up(
        &mut self,
        link: LinkId,
        liveness_ms: u32,
        ours: bool,
        env: &mut Env<'_>,
    ) {
        let timeout = std::time::Duration::from_millis(u64::from(liveness_ms.max(50)));
        self.liveness = Some(Liveness::new(timeout, env.now));
        self.add_link(link, LinkKind::Session, ours, env.now);
        self.retry = None;
        self.bulk_over_session = false;
        self.bulk_connecting = 0;
        match &mut self.phase {
            Phase::Leaving { connecting, .. } => *connecting = false,
            phase => *phase = Phase::Up,
        }
        self.peer.connected.store(true, std::sync::atomic::Ordering::Release);
        self.peer.set_last_error(None);
        self.answer_connects(&Ok(()));
        self.want_bulk();
    }

    /// The session link is gone; the session itself may be resumed.
    pub(super) fn session_down(&mut self, reason: &str, env: &mut Env<'_>) {
        self.peer.connected.store(false, std::sync::atomic::Ordering::Release);
        self.peer.set_last_error(Some(reason.to_owned()));
        self.liveness = None;
        self.control.clear();
        self.ack_due = None;
        self.outbox.rewind();
        self.inbox.rewind();
        let bulk: Vec<LinkId> = self.links.iter().map(|link| link.id).collect();
        for link in bulk {
            self.close(link, "its session link is gone", false);
        }
        match &mut self.phase {
            Phase::Leaving { .. } => self.finish_leaving(env),
            phase => {
                *phase = Phase::Idle;
                // Transfers that had not issued anything, and notifications, try once more.
                if self.wants(LinkKind::Session) {
                    if self.can_connect() {
                        self.connect();
                    } else {
                        let error = self.peer.gone(reason);
                        self.fail_all(&error, env);
                    }
                }
            }
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
        self.fail_all(&error, env);
        self.answer_connects(&Err(error));
        let restarted =
            matches!(failure.handshake, Some(HandshakeError::Refused(Refusal::Incarnation)));
        if restarted || leaving {
            // Nobody will ever take them: another engine lives there now, or we are leaving.
            self.session = 0;
            self.drop_notifications(env);
            return self.try_finish_leaving(env);
        }
        if !self.outbox.is_empty() {
            let pause = self.retry.map_or(RETRY_MIN, |(_, pause)| (pause * 2).min(RETRY_MAX));
            self.retry = Some((Some(env.now + pause), pause));
        }
    }

    /// The peer has left: the session is over.
    pub(super) fn on_goodbye(&mut self, env: &mut Env<'_>) {
        let reason = "it has disconnected";
        let error = self.peer.gone(reason);
        self.fail_all(&error, env);
        self.drop_notifications(env);
        self.session = 0;
        if let Some(link) = self.session_link() {
            self.close(link, reason, false);
        }
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
            self.connect();
        }
        self.try_finish_leaving(env);
    }

    /// Ends the session as soon as nothing is left to flush, or nobody to flush it to.
    pub(super) fn try_finish_leaving(&mut self, env: &mut Env<'_>) {
        if let Phase::Leaving { connecting, .. } = self.phase {
            let reachable = connecting || self.session_link().is_some();
            if self.outbox.is_empty() || !reachable {
                self.finish_leaving(env);
            }
        }
    }

    pub(super) fn finish_leaving(&mut self, env: &mut Env<'_>) {
        if !matches!(self.phase, Phase::Leaving { .. }) {
            return;
        }
        let dropped = self.drop_notifications(env);
        self.session = 0;
        self.retry = None;
        self.phase = Phase::Idle;
        self.events.push_back(Event::AbortConnect);
        if let Some(link) = self.session_link() {
            self.control.push_back(Header::new(FrameKind::Goodbye));
            self.close(link, "disconnected by this side", true);
        }
        for ticket in self.leaving.drain(..) {
            ticket.complete(dropped);
        }
        self.events.push_back(Event::Left);
    }

    pub(super) fn check_liveness(&mut self, env: &mut Env<'_>) {
        let Some(liveness) = &mut self.liveness else { return };
        if liveness.next() > env.now {
            return;
        }
        match liveness.check(env.now) {
            Verdict::Wait(_) => {}
            Verdict::Ping(_) => self.control.push_back(Header::new(FrameKind::Ping)),
            Verdict::Dead => {
                let timeout = liveness.timeout();
                env.counters.liveness_timeouts.add(1);
                self.liveness = None;
                if let Some(link) = self.session_link() {
                    self.close(link, format!("it was silent for {timeout:?}"), false);
                }
            }
        }
    }
}
