//! Links on a lane, from the first byte of a handshake to the last frame.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use corelane_runtime::{Cx, FdId, Interest, Readiness, Start, TimerId};

use super::lane::{LaneDriver, env};
use crate::session::handshake::{HandshakeError, Initiator, InitiatorStep, Target};
use crate::session::{ConnectFailure, LinkId};
use crate::sys::{self, IoSegment};
use crate::transport::addresses::{self, Remote};
use crate::transport::link::Flow;
use crate::transport::receive::Receiver;
use crate::transport::send::Sender;
use crate::wire::hello::{LinkKind, MAX_MESSAGE, Welcome};

/// A connected socket: TCP, or a Unix socket between engines of one host.
pub(super) struct Link {
    stamp: u32,
    pub(super) fd: OwnedFd,
    fd_id: FdId,
    pub(super) remote: Remote,
    timer: Option<TimerId>,
    pub(super) phase: Phase,
}

/// How far a link has come.
#[expect(clippy::large_enum_variant, reason = "nearly all links are open, and those must be quick")]
pub(super) enum Phase {
    /// The kernel connects.
    Connecting { peer: usize, kind: LinkKind },
    /// Connected, and waiting for another attempt to fail or win.
    Standby { peer: usize, kind: LinkKind },
    /// We opened it and prove ourselves.
    Initiating { peer: usize, kind: LinkKind, machine: Box<Initiator>, input: Input },
    /// Somebody opened it and has proven nothing yet.
    Accepting { machine: Box<Target>, input: Input },
    /// Frames flow.
    Open { peer: usize, kind: LinkKind, receiver: Receiver, sender: Sender, blocked: bool },
}

impl Link {
    pub(super) fn fd_id(&self) -> FdId {
        self.fd_id
    }
}

impl Phase {
    pub(super) fn peer(&self) -> Option<usize> {
        match self {
            Self::Connecting { peer, .. }
            | Self::Standby { peer, .. }
            | Self::Initiating { peer, .. }
            | Self::Open { peer, .. } => Some(*peer),
            Self::Accepting { .. } => None,
        }
    }
}

/// A handshake message that is arriving. Never reads past it: frames may follow.
#[derive(Default)]
pub(super) struct Input {
    bytes: Vec<u8>,
}

impl Input {
    /// Receives as far as the end of one message; `Ok(None)`: not there yet.
    fn receive(&mut self, fd: &OwnedFd) -> Result<Option<Vec<u8>>, String> {
        loop {
            let want = match self.bytes.first_chunk::<2>() {
                None => 2,
                Some(len) => 2 + usize::from(u16::from_le_bytes(*len)),
            };
            if want > MAX_MESSAGE {
                return Err(HandshakeError::Protocol.reason().into());
            }
            if want > 2 && self.bytes.len() == want {
                return Ok(Some(self.bytes.drain(..).skip(2).collect()));
            }
            if want == 2 && self.bytes.len() == 2 {
                return Err(HandshakeError::Protocol.reason().into());
            }
            let have = self.bytes.len();
            self.bytes.resize(want, 0);
            let got = sys::recv(fd.as_fd(), &mut self.bytes[have..]);
            self.bytes.truncate(have + *got.as_ref().unwrap_or(&0));
            match got {
                Ok(0) => return Err("it closed the connection during the handshake".into()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e.to_string()),
            }
        }
    }
}

/// Sends a handshake message. The socket is new and its buffer empty: it is sent whole or the link
/// is given up.
pub(super) fn send_whole(fd: &OwnedFd, bytes: &[u8]) -> Result<(), String> {
    match sys::send_segments(fd.as_fd(), &[IoSegment::of(bytes)]) {
        Ok(n) if n == bytes.len() => Ok(()),
        Ok(_) => Err("the socket took only part of a handshake message".into()),
        Err(e) => Err(e.to_string()),
    }
}

impl LaneDriver {
    /// Adds a link and watches its socket; a handshake must end before the connect timeout.
    pub(super) fn add_link(
        &mut self,
        fd: OwnedFd,
        remote: Remote,
        phase: Phase,
        interest: Interest,
        cx: &mut Cx<'_>,
    ) -> LinkId {
        self.next_stamp = (self.next_stamp + 1) & 0x0fff_ffff;
        let (stamp, slot) = (self.next_stamp, self.links.vacant_key());
        let id = u64::from(stamp) << 32 | slot as u64;
        let fd_id = cx.add_fd(fd.as_raw_fd(), id, interest, Start::Quiet);
        let deadline = cx.now() + self.engine.config.connect_timeout;
        let timer = Some(cx.set_timer(deadline, id));
        self.links.insert(Link { stamp, fd, fd_id, remote, timer, phase });
        id
    }

    pub(super) fn watch(&mut self, id: LinkId, interest: Interest, cx: &mut Cx<'_>) {
        if let Some(link) = self.link(id) {
            let fd_id = link.fd_id;
            cx.set_interest(fd_id, interest);
        }
    }

    pub(super) fn link(&mut self, id: LinkId) -> Option<&mut Link> {
        let link = self.links.get_mut(id as u32 as usize)?;
        (u64::from(link.stamp) == id >> 32).then_some(link)
    }

    /// Takes a link out; its socket is watched no more.
    pub(super) fn take_link(&mut self, id: LinkId, cx: &mut Cx<'_>) -> Option<Link> {
        self.link(id)?;
        let link = self.links.remove(id as u32 as usize);
        cx.remove_fd(link.fd_id);
        if let Some(timer) = link.timer {
            cx.cancel_timer(timer);
        }
        Some(link)
    }

    /// All links of a peer, whatever their phase.
    pub(super) fn links_of(&self, slot: usize) -> Vec<LinkId> {
        self.links
            .iter()
            .filter(|(_, link)| link.phase.peer() == Some(slot))
            .map(|(index, link)| u64::from(link.stamp) << 32 | index as u64)
            .collect()
    }

    pub(super) fn on_link(&mut self, id: LinkId, readiness: Readiness, cx: &mut Cx<'_>) -> bool {
        let Some(link) = self.link(id) else { return false };
        match &mut link.phase {
            Phase::Open { .. } => self.on_open(id, readiness, cx),
            Phase::Connecting { peer, .. } => {
                let peer = *peer;
                self.on_connecting(id, peer, cx)
            }
            Phase::Standby { .. } => false,
            Phase::Initiating { peer, input, .. } => {
                let peer = *peer;
                match input.receive(&link.fd) {
                    Ok(Some(message)) => self.on_initiator(id, peer, &message, cx),
                    Ok(None) => false,
                    Err(reason) => {
                        self.attempt_failed(id, &reason, None, cx);
                        true
                    }
                }
            }
            Phase::Accepting { input, .. } => match input.receive(&link.fd) {
                Ok(Some(message)) => {
                    self.on_target(id, &message, cx);
                    true
                }
                Ok(None) => false,
                Err(reason) => {
                    self.refuse_link(id, &reason, cx);
                    true
                }
            },
        }
    }

    fn on_open(&mut self, id: LinkId, readiness: Readiness, cx: &mut Cx<'_>) -> bool {
        let now = cx.now();
        let Self { links, peers, regions, engine, counters, scratch, .. } = self;
        let Some(link) = links.get_mut(id as u32 as usize) else { return false };
        let Phase::Open { peer, kind, receiver, blocked, .. } = &mut link.phase else {
            return false;
        };
        let slot = *peer;
        let Some(peer) = peers.get_mut(slot) else { return false };
        let mut worked = false;
        let unblocked = *blocked && readiness.may_write();
        if unblocked {
            // Worth a try, and no progress by itself: a socket that stays full must go quiet.
            *blocked = false;
        }
        if readiness.may_read() {
            let one = *kind == LinkKind::Session;
            let mut env = env(regions, engine, counters, now);
            match receiver.receive(&link.fd, id, one, &mut peer.core, &mut env, scratch) {
                Ok(Flow::Progress) => worked = true,
                Ok(Flow::Idle | Flow::Blocked) => {}
                Err(reason) => {
                    self.close_link(id, &reason, cx);
                    worked = true;
                }
            }
        }
        if self.scratch.arrivals.has_news() {
            self.land(slot, cx);
        }
        if worked
            && let Some(link) = self.link(id)
            && let Phase::Open { receiver, .. } = &mut link.phase
        {
            let frames = receiver.take_local();
            let rdma = receiver.take_rdma();
            if !frames.is_empty() {
                self.on_local_frames(slot, id, frames, cx);
            }
            for header in rdma {
                if let Err(reason) = self.on_rdma_frame(slot, id, &header, cx) {
                    self.close_link(id, &format!("protocol error: {reason}"), cx);
                    break;
                }
            }
        }
        if worked || unblocked {
            self.mark(slot);
        }
        worked
    }

    /// Sends what a peer's core has for its links. Bulk streams share one link's share of the turn, and take turns at it:
    /// what the session's stream has waits for one of them, not for all.
    pub(super) fn flush_peer(&mut self, slot: usize, cx: &mut Cx<'_>) -> bool {
        let mut worked = self.flush_ring(slot, cx) | self.rdma_flush(slot, cx);
        let (mut at, mut left) = (0, self.peers.get(slot).map_or(0, |peer| peer.links.len()));
        let mut used_up = false;
        // By index: a link that breaks takes itself out of the list.
        while left > 0
            && let Some(&id) = self.peers.get(slot).and_then(|peer| peer.links.get(at))
        {
            left -= 1;
            if used_up && self.is_bulk(id) {
                at += 1;
                continue;
            }
            let waiting = self.busy.len();
            match self.flush_link(id, cx) {
                Ok(flow) => {
                    worked |= flow == Flow::Progress;
                    let has_more = self.busy.len() > waiting && self.is_bulk(id);
                    used_up |= has_more;
                    match self.peers.get_mut(slot).filter(|_| has_more) {
                        // Behind the others, which come first in the next turn.
                        Some(peer) if peer.links.get(at) == Some(&id) => {
                            peer.links.remove(at);
                            peer.links.push(id);
                        }
                        _ => at += 1,
                    }
                }
                Err(reason) => {
                    self.receive_last(id, cx);
                    self.close_link(id, &reason, cx);
                }
            }
        }
        worked
    }

    fn is_bulk(&mut self, id: LinkId) -> bool {
        let phase = self.link(id).map(|link| &link.phase);
        matches!(phase, Some(Phase::Open { kind: LinkKind::Bulk, .. }))
    }

    /// A link may be at its end. The peer may have said why before it closed it: a goodbye that is not read looks
    /// like a lost link.
    pub(super) fn receive_last(&mut self, id: LinkId, cx: &mut Cx<'_>) {
        const TURNS: usize = 64;
        for _ in 0..TURNS {
            if !self.on_open(id, Readiness::Hot, cx) {
                break;
            }
        }
    }

    /// Sends what the core has for one link.
    pub(super) fn flush_link(&mut self, id: LinkId, cx: &mut Cx<'_>) -> Result<Flow, String> {
        let now = cx.now();
        let Some(link) = self.link(id) else { return Ok(Flow::Idle) };
        let Phase::Open { peer, blocked, .. } = &link.phase else { return Ok(Flow::Idle) };
        if *blocked {
            return Ok(Flow::Blocked);
        }
        let slot = *peer;
        self.flush_local(slot, id)?;
        let Self { links, peers, regions, engine, counters, scratch, .. } = self;
        let Some(link) = links.get_mut(id as u32 as usize) else { return Ok(Flow::Idle) };
        let Phase::Open { sender, blocked, .. } = &mut link.phase else {
            return Ok(Flow::Idle);
        };
        let Some(peer) = peers.get_mut(slot) else { return Ok(Flow::Idle) };
        if sender.is_empty() && peer.core.is_silent() {
            // The rule where transfers go another way.
            return Ok(Flow::Idle);
        }
        let mut env = env(regions, engine, counters, now);
        let (flow, more) = sender.send(&link.fd, id, &mut peer.core, &mut env, scratch)?;
        match flow {
            Flow::Idle => {}
            Flow::Progress => cx.make_hot(link.fd_id),
            Flow::Blocked => {
                *blocked = true;
                cx.set_interest(link.fd_id, Interest::BOTH);
                return Ok(flow);
            }
        }
        cx.set_interest(link.fd_id, Interest::READABLE);
        if more {
            self.busy.push(slot);
        }
        Ok(flow)
    }

    /// Ends an open link, or one on its way.
    pub(super) fn close_link(&mut self, id: LinkId, reason: &str, cx: &mut Cx<'_>) {
        let Some(link) = self.take_link(id, cx) else { return };
        let Phase::Open { peer: slot, kind, mut receiver, mut sender, .. } = link.phase else {
            return;
        };
        let now = cx.now();
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.links.retain(|known| *known != id);
        if kind == LinkKind::Session {
            self.detach(slot, cx);
            self.rdma_detach(slot, reason, cx);
        }
        let Self { peers, regions, engine, counters, .. } = self;
        let Some(peer) = peers.get_mut(slot) else { return };
        let mut env = env(regions, engine, counters, now);
        receiver.abandon(&mut env);
        sender.abandon(&mut peer.core, &mut env);
        peer.core.link_down(id, reason, &mut env);
        if kind == LinkKind::Session {
            tracing::info!(peer = &*peer.core.peer.name, address = %link.remote, reason, "disconnected");
        } else {
            tracing::debug!(peer = &*peer.core.peer.name, address = %link.remote, reason, "bulk stream closed");
        }
        self.mark(slot);
    }

    /// The handshake of a link that we opened has got a message.
    fn on_initiator(&mut self, id: LinkId, slot: usize, message: &[u8], cx: &mut Cx<'_>) -> bool {
        let Some(link) = self.link(id) else { return false };
        let Phase::Initiating { kind, machine, .. } = &mut link.phase else { return false };
        let kind = *kind;
        match machine.receive(message) {
            Ok(InitiatorStep::Send(bytes)) => {
                if let Err(reason) = send_whole(&link.fd, &bytes) {
                    self.attempt_failed(id, &reason, None, cx);
                }
            }
            Ok(InitiatorStep::Up(welcome)) => self.initiated(id, slot, kind, &welcome, cx),
            Err(error) => self.attempt_failed(id, error.reason(), Some(error), cx),
        }
        true
    }

    fn initiated(
        &mut self,
        id: LinkId,
        slot: usize,
        kind: LinkKind,
        welcome: &Welcome,
        cx: &mut Cx<'_>,
    ) {
        let on_this_host = self.link(id).is_some_and(|link| link.remote.is_unix());
        let theirs = self.peers.get(slot).and_then(|peer| peer.core.peer.metadata());
        let theirs = theirs.map_or(0, |metadata| metadata.transports);
        let (frames, rdma) = (self.frames_allowed(theirs), self.rdma_expected(theirs));
        if let Some(peer) = self.peers.get_mut(slot).filter(|_| kind == LinkKind::Session) {
            peer.transports = theirs;
        }
        let refused = self.with_core(slot, cx, |core, env| match kind {
            LinkKind::Session => {
                core.set_frames_allowed(frames);
                core.set_rdma_expected(rdma);
                core.session_welcomed(id, welcome, on_this_host, env)
            }
            LinkKind::Bulk => {
                core.bulk_up(id, true, env);
                Ok(())
            }
        });
        match refused {
            Some(Ok(())) => self.open(id, slot, kind, true, cx),
            Some(Err(reason)) => self.attempt_failed(id, reason, None, cx),
            None => drop(self.take_link(id, cx)),
        }
    }

    /// Frames flow from here on; the core knows the link already.
    pub(super) fn open(
        &mut self,
        id: LinkId,
        slot: usize,
        kind: LinkKind,
        ours: bool,
        cx: &mut Cx<'_>,
    ) {
        self.counters.links_up.add(1);
        let Some(link) = self.link(id) else { return };
        let unix = link.remote.is_unix();
        link.phase = Phase::Open {
            peer: slot,
            kind,
            receiver: Receiver::new(unix),
            sender: Sender::new(),
            blocked: false,
        };
        let (timer, remote, fd_id) = (link.timer.take(), link.remote, link.fd_id);
        if let Some(timer) = timer {
            cx.cancel_timer(timer);
        }
        cx.set_interest(fd_id, Interest::READABLE);
        cx.make_hot(fd_id);
        if ours {
            self.attempt_won(id, slot, kind, remote, cx);
        }
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.links.push(id);
        match kind {
            LinkKind::Session if unix => {
                self.attach(slot, id, cx);
                self.suspect(slot, id, cx);
            }
            LinkKind::Session => {
                if !self.rdma_attach(slot, id, cx) {
                    self.log_connected(id, slot, ours);
                }
            }
            LinkKind::Bulk => self.bound_stream(id, slot),
        }
        self.mark(slot);
    }

    /// A stream is given up no later than a session that is silent, or after half a second, whichever is longer.
    fn bound_stream(&mut self, id: LinkId, slot: usize) {
        let Some(peer) = self.peers.get(slot) else { return };
        let liveness = peer.core.liveness_timeout().unwrap_or(self.engine.config.liveness);
        let Some(link) = self.link(id).filter(|link| !link.remote.is_unix()) else { return };
        if let Err(error) = addresses::bound_stream(&link.fd, liveness) {
            // The kernel's own patience then is the bound.
            tracing::debug!(%error, "TCP_USER_TIMEOUT");
        }
    }

    /// The line that says how bytes will go to and from a peer.
    fn log_connected(&self, id: LinkId, slot: usize, ours: bool) {
        let Some(link) = self.links.get(id as u32 as usize) else { return };
        let Some(peer) = self.peers.get(slot) else { return };
        let core = self.engine.lane(self.index).ok().and_then(corelane_runtime::Lane::core);
        tracing::info!(
            peer = &*peer.core.peer.name,
            transport = "tcp",
            nic = addresses::interface_of(&link.fd).unwrap_or_else(|| "unknown".to_owned()),
            lane = self.index,
            core = core.map_or("unpinned".to_owned(), |core| core.to_string()),
            address = %link.remote,
            direction = if ours { "to" } else { "from" },
            reason = peer.not_local.as_deref().filter(|_| ours).unwrap_or(""),
            "connected"
        );
    }

    /// A handshake took too long.
    pub(super) fn handshake_timeout(&mut self, id: LinkId, cx: &mut Cx<'_>) {
        let Some(link) = self.link(id) else { return };
        link.timer = None;
        match link.phase {
            Phase::Open { .. } => {}
            Phase::Accepting { .. } => self.refuse_link(id, "its handshake took too long", cx),
            Phase::Connecting { .. } => {
                self.attempt_failed(id, "no answer (is a firewall in the way?)", None, cx);
            }
            Phase::Standby { .. } | Phase::Initiating { .. } => {
                self.attempt_failed(id, "its handshake took too long", None, cx);
            }
        }
    }

    /// Tells a core that a link cannot be had.
    pub(super) fn connect_failed(
        &mut self,
        slot: usize,
        kind: LinkKind,
        failure: &ConnectFailure,
        cx: &mut Cx<'_>,
    ) {
        self.with_core(slot, cx, |core, env| core.connect_failed(kind, failure, env));
    }
}
