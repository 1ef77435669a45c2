//! Links that we open.
//!
//! All addresses of the peer are candidates. The best one (a shared subnet) is tried first, the
//! others together a moment later; the first that connects does the handshake while the others wait
//! for it to fail.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use corelane_runtime::{Cx, Interest, TimerId};
use smallvec::SmallVec;

use super::lane::{CONNECT_TIMER, LaneDriver};
use super::links::{Input, Phase, send_whole};
use crate::config::TransportKind;
use crate::session::handshake::{HandshakeError, Initiator};
use crate::session::{ConnectFailure, LinkId};
use crate::sys;
use crate::transport::addresses::{self, Remote};
use crate::wire::hello::{LinkKind, Refusal};

/// Head start of the best address.
const STAGGER: Duration = Duration::from_millis(30);
/// Pause before another try when both sides connected at the same time and the peer's link has not
/// come.
const AFTER_SIMULTANEOUS: Duration = Duration::from_millis(50);

/// How long a peer that cannot be reached is not spoken of again.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// The attempts to open one session link.
pub(super) struct Connector {
    untried: VecDeque<Remote>,
    attempts: SmallVec<[LinkId; 4]>,
    connected: VecDeque<LinkId>,
    handshaking: Option<LinkId>,
    errors: Vec<String>,
    /// How many of the errors say that nobody listens there.
    refusals: usize,
    handshake_error: Option<HandshakeError>,
    /// The engine of this host that has the peer's incarnation lives, and too many want to connect to it at the moment.
    is_crowded: bool,
    deadline: Instant,
    timer: Option<TimerId>,
}

/// Whether a Unix socket that cannot be connected to is nobody's.
fn is_nobody(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNREFUSED | libc::ENOENT))
}

/// Whether it is somebody's who has not accepted yet as many as may wait for that.
fn is_crowd(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAGAIN)
}

/// Why a peer that both sides' transports would let be reached on this host is reached otherwise.
fn why_not_local(error: &std::io::Error) -> String {
    let meaning = if is_nobody(error) {
        ": no engine of this host and network namespace has its incarnation"
    } else if is_crowd(error) {
        ": too many are connecting to it"
    } else {
        ""
    };
    format!("transport `local`: its unix socket: {error}{meaning}")
}

fn ended() -> ConnectFailure {
    let reason = "its process has ended".into();
    ConnectFailure { reason, handshake: None, refused: true }
}

impl LaneDriver {
    pub(super) fn start_connect(
        &mut self,
        slot: usize,
        kind: LinkKind,
        again: bool,
        cx: &mut Cx<'_>,
    ) {
        match kind {
            LinkKind::Session if self.is_preceded(slot) => {
                if let Some(peer) = self.peers.get_mut(slot) {
                    peer.connects_later = Some(again);
                }
            }
            LinkKind::Session => {
                if let Some(peer) = self.peers.get_mut(slot) {
                    peer.connects_later = None;
                }
                let config = &self.engine.config;
                let timeout = if again { config.reconnect_timeout } else { config.connect_timeout };
                let deadline = cx.now() + timeout;
                self.connect_session(slot, deadline, cx);
            }
            LinkKind::Bulk => self.connect_bulk(slot, cx),
        }
    }

    /// Whether this peer was loaded anew while what was said to it before is still being flushed, for the time to linger at most. A
    /// second session would take the place of that one at the peer, and what is not acknowledged would be lost.
    fn is_preceded(&self, slot: usize) -> bool {
        let Some(peer) = self.peers.get(slot) else { return false };
        let incarnation = peer.core.peer.incarnation;
        self.peers.iter().any(|(_, other)| {
            other.unload && other.born < peer.born && other.core.peer.incarnation == incarnation
        })
    }

    /// One of this incarnation has left: who waited for it connects.
    pub(super) fn connect_next(&mut self, incarnation: u128, cx: &mut Cx<'_>) {
        let waiting: SmallVec<[(usize, bool); 2]> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.core.peer.incarnation == incarnation)
            .filter_map(|(slot, peer)| Some((slot, peer.connects_later?)))
            .collect();
        for (slot, again) in waiting {
            self.start_connect(slot, LinkKind::Session, again, cx);
        }
    }

    fn connect_session(&mut self, slot: usize, deadline: Instant, cx: &mut Cx<'_>) {
        let Some(peer) = self.peers.get(slot) else { return };
        let Some(metadata) = peer.core.peer.metadata() else {
            return self.cannot_try(slot, "its metadata has not been loaded", cx);
        };
        if self.peers[slot].last_process.as_ref().is_some_and(|process| process.has_ended()) {
            // An engine lives in one process. What the kernel has not closed yet would take a connection, and answer nothing.
            return self.give_up(slot, &ended(), cx);
        }
        let common = metadata.transports & self.engine.identity.transports;
        let mut untried = VecDeque::new();
        if common & TransportKind::Local.bit() != 0 {
            // Only an engine of this host, and of this network namespace, answers there.
            untried.push_back(Remote::Unix(metadata.incarnation));
        }
        if common & (TransportKind::Tcp.bit() | TransportKind::Rdma.bit()) != 0 {
            let own = addresses::own_addresses(None).unwrap_or_default();
            let inet = addresses::preferred(&metadata.addresses, &own);
            untried.extend(inet.into_iter().map(Remote::Inet));
        }
        if untried.is_empty() {
            return self.cannot_try(slot, "its metadata lists no address", cx);
        }
        self.abort_connect(slot, cx);
        self.peers[slot].not_local = None;
        let second = cx.now() + STAGGER;
        let timer = cx.set_timer(second, CONNECT_TIMER | slot as u64);
        self.peers[slot].connector = Some(Connector {
            untried,
            attempts: SmallVec::new(),
            connected: VecDeque::new(),
            handshaking: None,
            errors: Vec::new(),
            refusals: 0,
            handshake_error: None,
            is_crowded: false,
            deadline,
            timer: Some(timer),
        });
        self.try_next(slot, cx);
    }

    /// Starts the next untried address; without any attempt left, gives up.
    fn try_next(&mut self, slot: usize, cx: &mut Cx<'_>) {
        loop {
            let Some(connector) = self.connector(slot) else { return };
            let Some(address) = connector.untried.pop_front() else {
                if connector.attempts.is_empty() {
                    self.all_failed(slot, cx);
                }
                return;
            };
            match addresses::connect(address) {
                Err(error) if address.is_unix() && !connector.untried.is_empty() => {
                    if !is_nobody(&error) {
                        // That nobody listens elsewhere does not say then that nobody is there.
                        connector.errors.push(format!("{address}: {error}"));
                    }
                    self.peers[slot].not_local = Some(why_not_local(&error));
                }
                Ok(fd) => {
                    let phase = Phase::Connecting { peer: slot, kind: LinkKind::Session };
                    let id = self.add_link(fd, address, phase, Interest::WRITABLE, cx);
                    if let Some(connector) = self.connector(slot) {
                        connector.attempts.push(id);
                    }
                    return;
                }
                Err(error) => {
                    // Where nobody listens there, nobody ever will under this incarnation. Anything else says nothing about it.
                    connector.refusals += usize::from(address.is_unix() && is_nobody(&error));
                    connector.is_crowded |= address.is_unix() && is_crowd(&error);
                    connector.errors.push(format!("{address}: {error}"));
                }
            }
        }
    }

    fn connector(&mut self, slot: usize) -> Option<&mut Connector> {
        self.peers.get_mut(slot)?.connector.as_mut()
    }

    pub(super) fn connect_timer(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let now = cx.now();
        let Some(connector) = self.connector(slot) else { return };
        connector.timer = None;
        if connector.attempts.is_empty() && connector.untried.is_empty() {
            // Waiting after a simultaneous connect.
            let deadline = connector.deadline;
            if now >= deadline {
                return self.all_failed(slot, cx);
            }
            return self.connect_session(slot, deadline, cx);
        }
        let deadline = connector.deadline;
        if now >= deadline {
            return self.out_of_time(slot, cx);
        }
        while self.connector(slot).is_some_and(|connector| !connector.untried.is_empty()) {
            self.try_next(slot, cx);
        }
        if let Some(connector) = self.connector(slot)
            && connector.timer.is_none()
        {
            connector.timer = Some(cx.set_timer(deadline, CONNECT_TIMER | slot as u64));
        }
    }

    /// The attempts under way have had their time.
    fn out_of_time(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Some(connector) = self.connector(slot) else { return };
        let attempts = connector.attempts.clone();
        for id in attempts {
            let Some(remote) = self.link(id).map(|link| link.remote) else { continue };
            if let Some(connector) = self.connector(slot) {
                connector.errors.push(format!("{remote}: no answer (is a firewall in the way?)"));
            }
        }
        let Some(connector) = self.connector(slot) else { return };
        let failure = ConnectFailure {
            reason: connector.errors.join("; "),
            handshake: connector.handshake_error,
            refused: false,
        };
        self.give_up(slot, &failure, cx);
    }

    fn connect_bulk(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let address = self.peers.get(slot).and_then(|peer| {
            // A peer that connected to us is reached where its metadata says.
            let listed = || peer.core.peer.metadata()?.addresses.first().copied().map(Remote::Inet);
            peer.address.or_else(listed)
        });
        let outcome = match address {
            Some(address) => addresses::connect(address)
                .map(|fd| (fd, address))
                .map_err(|error| format!("{address}: {error}")),
            None => Err("no address is known".into()),
        };
        match outcome {
            Ok((fd, address)) => {
                let phase = Phase::Connecting { peer: slot, kind: LinkKind::Bulk };
                self.add_link(fd, address, phase, Interest::WRITABLE, cx);
            }
            Err(reason) => self.bulk_failed(slot, reason, None, cx),
        }
    }

    fn bulk_failed(
        &mut self,
        slot: usize,
        reason: String,
        handshake: Option<HandshakeError>,
        cx: &mut Cx<'_>,
    ) {
        tracing::warn!(slot, reason, "a bulk stream could not be opened");
        let failure = ConnectFailure { reason, handshake, refused: false };
        self.connect_failed(slot, LinkKind::Bulk, &failure, cx);
    }

    /// The kernel has finished connecting, or may have.
    pub(super) fn on_connecting(&mut self, id: LinkId, slot: usize, cx: &mut Cx<'_>) -> bool {
        let Some(link) = self.link(id) else { return false };
        let Phase::Connecting { kind, .. } = link.phase else { return false };
        let socket = socket2::SockRef::from(&link.fd);
        let failed = match socket.take_error() {
            Ok(None) => match socket.peer_addr() {
                Ok(_) => None,
                Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => return false,
                Err(e) => Some(e),
            },
            Ok(Some(e)) | Err(e) => Some(e),
        };
        if let Some(error) = failed {
            if error.kind() == std::io::ErrorKind::ConnectionRefused
                && let Some(connector) = self.connector(slot)
            {
                connector.refusals += usize::from(kind == LinkKind::Session);
            }
            self.attempt_failed(id, &error.to_string(), None, cx);
            return true;
        }
        link.phase = Phase::Standby { peer: slot, kind };
        self.watch(id, Interest::NONE, cx);
        if kind == LinkKind::Bulk {
            self.initiate(id, slot, kind, cx);
            return true;
        }
        match self.connector(slot) {
            Some(connector) if connector.handshaking.is_none() => {
                connector.handshaking = Some(id);
                self.initiate(id, slot, kind, cx);
            }
            Some(connector) => connector.connected.push_back(id),
            None => drop(self.take_link(id, cx)),
        }
        true
    }

    /// Says hello on a connected socket.
    fn initiate(&mut self, id: LinkId, slot: usize, kind: LinkKind, cx: &mut Cx<'_>) {
        let identity = self.engine.identity.clone();
        let (Some(peer), Ok(nonce)) = (self.peers.get(slot), sys::random()) else {
            return self.attempt_failed(id, "no random bytes from the kernel", None, cx);
        };
        let Some(metadata) = peer.core.peer.metadata() else {
            return self.attempt_failed(id, "its metadata has not been loaded", None, cx);
        };
        let intent = peer.core.intent(kind);
        let (machine, hello) = Initiator::start(identity, &metadata, intent, nonce);
        let Some(link) = self.link(id) else { return };
        match send_whole(&link.fd, &hello) {
            Ok(()) => {
                link.phase = Phase::Initiating {
                    peer: slot,
                    kind,
                    machine: Box::new(machine),
                    input: Input::default(),
                };
                self.watch(id, Interest::READABLE, cx);
                if kind == LinkKind::Session {
                    self.suspect(slot, id, cx);
                }
            }
            Err(reason) => self.attempt_failed(id, &reason, None, cx),
        }
    }

    /// An attempt has failed, wherever it was.
    pub(super) fn attempt_failed(
        &mut self,
        id: LinkId,
        reason: &str,
        handshake: Option<HandshakeError>,
        cx: &mut Cx<'_>,
    ) {
        let Some(link) = self.take_link(id, cx) else { return };
        let Some(slot) = link.phase.peer() else { return };
        let bulk = matches!(
            link.phase,
            Phase::Connecting { kind: LinkKind::Bulk, .. }
                | Phase::Standby { kind: LinkKind::Bulk, .. }
                | Phase::Initiating { kind: LinkKind::Bulk, .. }
        );
        let reason = format!("{}: {reason}", link.remote);
        if bulk {
            return self.bulk_failed(slot, reason, handshake, cx);
        }
        let Some(connector) = self.connector(slot) else { return };
        connector.attempts.retain(|attempt| *attempt != id);
        connector.connected.retain(|attempt| *attempt != id);
        connector.errors.push(reason);
        connector.handshake_error = handshake.or(connector.handshake_error);
        if connector.handshaking == Some(id) {
            connector.handshaking = connector.connected.pop_front();
            if let Some(next) = connector.handshaking {
                return self.initiate(next, slot, LinkKind::Session, cx);
            }
        }
        if self.connector(slot).is_some_and(|connector| connector.attempts.is_empty()) {
            self.try_next(slot, cx);
        }
    }

    fn all_failed(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let now = cx.now();
        let Some(connector) = self.connector(slot) else { return };
        let simultaneous =
            connector.handshake_error == Some(HandshakeError::Refused(Refusal::Simultaneous));
        if (simultaneous || connector.is_crowded) && now < connector.deadline {
            // The peer's own attempt is about to arrive; look again in case it does not. Or it is about to accept.
            connector.handshake_error = None;
            if let Some(timer) = connector.timer.take() {
                cx.cancel_timer(timer);
            }
            let Some(connector) = self.connector(slot) else { return };
            let timer = cx.set_timer(now + AFTER_SIMULTANEOUS, CONNECT_TIMER | slot as u64);
            connector.timer = Some(timer);
            return;
        }
        let failure = ConnectFailure {
            reason: connector.errors.join("; "),
            handshake: connector.handshake_error,
            refused: connector.refusals > 0 && connector.refusals == connector.errors.len(),
        };
        self.give_up(slot, &failure, cx);
    }

    fn give_up(&mut self, slot: usize, failure: &ConnectFailure, cx: &mut Cx<'_>) {
        self.abort_connect(slot, cx);
        let now = cx.now();
        if let Some(peer) = self.peers.get_mut(slot) {
            // An application may try again and again: it has the reason in its own errors.
            if peer.silent_until.is_none_or(|until| now >= until) {
                let unsaid = std::mem::take(&mut peer.unsaid_failures);
                peer.silent_until = Some(now + SAY_AGAIN);
                let (peer, reason) = (&*peer.core.peer.name, failure.reason.as_str());
                tracing::warn!(peer, reason, unsaid, "cannot connect");
            } else {
                peer.unsaid_failures += 1;
            }
        }
        self.connect_failed(slot, LinkKind::Session, failure, cx);
    }

    /// Ends the attempts to reach a process on this host that has ended.
    pub(super) fn cannot_connect_to_the_dead(&mut self, slot: usize, cx: &mut Cx<'_>) {
        if self.connector(slot).is_some() {
            self.give_up(slot, &ended(), cx);
        }
    }

    fn cannot_try(&mut self, slot: usize, reason: &str, cx: &mut Cx<'_>) {
        let failure = ConnectFailure { reason: reason.into(), handshake: None, refused: false };
        self.give_up(slot, &failure, cx);
    }

    /// A link of ours is open: the other attempts are not needed.
    pub(super) fn attempt_won(
        &mut self,
        id: LinkId,
        slot: usize,
        kind: LinkKind,
        remote: Remote,
        cx: &mut Cx<'_>,
    ) {
        if kind == LinkKind::Bulk {
            return;
        }
        if let Some(connector) = self.connector(slot) {
            connector.attempts.retain(|attempt| *attempt != id);
        }
        self.abort_connect(slot, cx);
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.silent_until = None;
            peer.address = Some(remote);
        }
    }

    /// Drops all attempts to open the session link.
    pub(super) fn abort_connect(&mut self, slot: usize, cx: &mut Cx<'_>) {
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.connects_later = None;
        }
        let Some(connector) = self.peers.get_mut(slot).and_then(|peer| peer.connector.take())
        else {
            return;
        };
        if let Some(timer) = connector.timer {
            cx.cancel_timer(timer);
        }
        for attempt in connector.attempts {
            drop(self.take_link(attempt, cx));
        }
    }
}
