//! Links of an engine, from the first byte of a handshake until frames flow.

use std::time::Instant;

use super::coverage::Event as Input;
use super::node::{Node, Outside, Trust, Way};
use super::peers::Connector;
use super::stream::Stream;
use crate::session::handshake::{
    HandshakeError, Initiator, InitiatorStep, Proven, Target, TargetStep,
};
use crate::session::{ConnectFailure, Core};
use crate::wire::hello::{
    Auth, Challenge, Hello, LinkKind, MAX_MESSAGE, Message, Refusal, Welcome,
};

const AFTER_SIMULTANEOUS: std::time::Duration = std::time::Duration::from_millis(50);

pub(super) struct Link {
    pub(super) phase: Phase,
    since_limit: Instant,
}

// Most links of a simulation are open: smaller others would save nothing.
#[allow(clippy::large_enum_variant)]
pub(super) enum Phase {
    Connecting { peer: usize, kind: LinkKind },
    Initiating { peer: usize, kind: LinkKind, machine: Box<Opening>, input: Vec<u8> },
    Accepting { machine: Box<Answering>, input: Vec<u8> },
    Open { peer: usize, kind: LinkKind, stream: Stream },
}

/// The initiator's part of a handshake.
pub(super) enum Opening {
    Honest(Initiator),
    /// Goes on whatever it is told, with proofs of its own making.
    Impostor,
}

/// The target's part of a handshake.
#[expect(clippy::large_enum_variant, reason = "the small one is for tests of trust only")]
pub(super) enum Answering {
    Honest(Target),
    /// Believes everything.
    Impostor(Option<Box<Hello>>),
}

impl Link {
    /// When its handshake must be over.
    pub(super) fn deadline(&self) -> Option<Instant> {
        (!matches!(self.phase, Phase::Open { .. })).then_some(self.since_limit)
    }

    pub(super) fn is_half_open(&self) -> bool {
        matches!(self.phase, Phase::Accepting { .. })
    }

    fn peer(&self) -> Option<usize> {
        match self.phase {
            Phase::Connecting { peer, .. }
            | Phase::Initiating { peer, .. }
            | Phase::Open { peer, .. } => Some(peer),
            Phase::Accepting { .. } => None,
        }
    }
}

/// Takes one whole handshake message off the front, without its length.
fn take_message(input: &mut Vec<u8>) -> Result<Option<Vec<u8>>, HandshakeError> {
    let Some(len) = input.first_chunk::<2>() else { return Ok(None) };
    let len = 2 + usize::from(u16::from_le_bytes(*len));
    if len > MAX_MESSAGE || len == 2 {
        return Err(HandshakeError::Protocol);
    }
    if input.len() < len {
        return Ok(None);
    }
    Ok(Some(input.drain(..len).skip(2).collect()))
}

impl Node {
    pub(super) fn links_of(&self, slot: usize) -> Vec<u64> {
        let of_slot = self.links.iter().filter(|(_, link)| link.peer() == Some(slot));
        of_slot.map(|(id, _)| *id).collect()
    }

    fn nonce(out: &mut dyn Outside) -> [u8; 32] {
        let mut nonce = [0; 32];
        for part in nonce.chunks_mut(8) {
            part.copy_from_slice(&out.random().to_le_bytes());
        }
        nonce
    }

    fn add_link(&mut self, phase: Phase) -> u64 {
        let id = self.next_link;
        self.next_link += 1;
        let since_limit = self.now + self.config.connect_timeout;
        self.links.insert(id, Link { phase, since_limit });
        id
    }

    // Links that this engine opens.

    pub(super) fn connect_session(
        &mut self,
        slot: usize,
        deadline: Instant,
        out: &mut dyn Outside,
    ) {
        let metadata = self.peers[slot].core.peer.metadata();
        self.abort_connect(slot, out);
        let mut untried = metadata.map(|metadata| metadata.addresses.clone()).unwrap_or_default();
        untried.reverse();
        self.peers[slot].connector =
            Some(Connector { untried, link: None, deadline, again: None, refused: true });
        self.try_next(slot, out);
    }

    fn try_next(&mut self, slot: usize, out: &mut dyn Outside) {
        let Some(connector) = &mut self.peers[slot].connector else { return };
        let Some(address) = connector.untried.pop() else {
            return self.give_up(slot, "no address answers", None, out);
        };
        let link = self.add_link(Phase::Connecting { peer: slot, kind: LinkKind::Session });
        if let Some(connector) = &mut self.peers[slot].connector {
            connector.link = Some(link);
        }
        self.peers[slot].address = Some(address);
        out.open(link, address);
    }

    pub(super) fn connector_time(&mut self, slot: usize, out: &mut dyn Outside) {
        let now = self.now;
        let Some(connector) = &mut self.peers[slot].connector else { return };
        let deadline = connector.deadline;
        if connector.again.is_some_and(|at| at <= now) && now < deadline {
            return self.connect_session(slot, deadline, out);
        }
        if now >= deadline {
            connector.refused = false;
            self.give_up(slot, "no answer", None, out);
        }
    }

    fn give_up(
        &mut self,
        slot: usize,
        reason: &str,
        handshake: Option<HandshakeError>,
        out: &mut dyn Outside,
    ) {
        let Some(connector) = &self.peers[slot].connector else { return };
        let failure =
            ConnectFailure { reason: reason.into(), handshake, refused: connector.refused };
        self.abort_connect(slot, out);
        self.with_core(slot, Input::ConnectFailed, |core, env| {
            core.connect_failed(LinkKind::Session, &failure, env);
        });
    }

    pub(super) fn abort_connect(&mut self, slot: usize, out: &mut dyn Outside) {
        self.peers[slot].connects_later = None;
        let Some(connector) = self.peers[slot].connector.take() else { return };
        if let Some(link) = connector.link
            && self.links.remove(&link).is_some()
        {
            out.close(link);
        }
    }

    pub(super) fn connect_bulk(&mut self, slot: usize, out: &mut dyn Outside) {
        let peer = &self.peers[slot];
        let listed = || peer.core.peer.metadata()?.addresses.last().copied();
        match peer.address.or_else(listed) {
            Some(address) => {
                let link = self.add_link(Phase::Connecting { peer: slot, kind: LinkKind::Bulk });
                out.open(link, address);
            }
            None => self.bulk_failed(slot, "no address is known"),
        }
    }

    fn bulk_failed(&mut self, slot: usize, reason: &str) {
        let failure = ConnectFailure { reason: reason.into(), handshake: None, refused: false };
        self.with_core(slot, Input::BulkFailed, |core, env| {
            core.connect_failed(LinkKind::Bulk, &failure, env);
        });
    }

    /// A link is connected: hello.
    pub fn opened(&mut self, link: u64, out: &mut dyn Outside) {
        let Some(Link { phase: Phase::Connecting { peer, kind }, .. }) = self.links.get(&link)
        else {
            return;
        };
        let (peer, kind) = (*peer, *kind);
        let core = &self.peers[peer].core;
        let Some(metadata) = core.peer.metadata() else {
            return self.handshake_failed(link, "its metadata has not been loaded", None, out);
        };
        let (machine, hello) =
            Initiator::start(self.identity.clone(), &metadata, core.intent(kind), Self::nonce(out));
        let machine = match self.config.trust {
            Trust::Honest => Opening::Honest(machine),
            Trust::Impostor => Opening::Impostor,
        };
        out.send(link, hello);
        if let Some(known) = self.links.get_mut(&link) {
            known.phase =
                Phase::Initiating { peer, kind, machine: Box::new(machine), input: Vec::new() };
        }
    }

    /// Nobody answers there; `refused`: the host says so.
    pub fn open_failed(&mut self, link: u64, refused: bool, out: &mut dyn Outside) {
        if let Some(Link { phase: Phase::Connecting { peer, kind: LinkKind::Session }, .. }) =
            self.links.get(&link)
            && let Some(connector) = &mut self.peers[*peer].connector
        {
            connector.refused &= refused;
        }
        self.attempt_failed(link, "nobody answers", None, refused, out);
    }

    pub(super) fn handshake_failed(
        &mut self,
        link: u64,
        reason: &str,
        error: Option<HandshakeError>,
        out: &mut dyn Outside,
    ) {
        self.attempt_failed(link, reason, error, false, out);
    }

    fn attempt_failed(
        &mut self,
        link: u64,
        reason: &str,
        error: Option<HandshakeError>,
        refused: bool,
        out: &mut dyn Outside,
    ) {
        let Some(known) = self.links.remove(&link) else { return };
        out.close(link);
        match known.phase {
            Phase::Connecting { peer, kind: LinkKind::Bulk }
            | Phase::Initiating { peer, kind: LinkKind::Bulk, .. } => {
                self.bulk_failed(peer, reason);
            }
            Phase::Connecting { peer, .. } | Phase::Initiating { peer, .. } => {
                let now = self.now;
                let Some(connector) = &mut self.peers[peer].connector else { return };
                if connector.link != Some(link) {
                    return;
                }
                connector.link = None;
                connector.refused &= refused;
                let simultaneous = HandshakeError::Refused(Refusal::Simultaneous);
                if error == Some(simultaneous) && now < connector.deadline {
                    connector.again = Some(now + AFTER_SIMULTANEOUS);
                } else if connector.untried.is_empty() {
                    self.give_up(peer, reason, error, out);
                } else {
                    self.try_next(peer, out);
                }
            }
            Phase::Accepting { .. } | Phase::Open { .. } => {}
        }
    }

    /// The other end has closed the link, or it was reset.
    pub fn closed(&mut self, link: u64, reason: &str, out: &mut dyn Outside) {
        match self.links.get(&link).map(|link| &link.phase) {
            None => {}
            Some(Phase::Open { .. }) => self.close_link(link, reason, out),
            Some(_) => self.handshake_failed(link, reason, None, out),
        }
    }

    /// Bytes have arrived.
    pub fn receive(&mut self, link: u64, bytes: &[u8], out: &mut dyn Outside) {
        let mut rest = bytes.to_vec();
        while !rest.is_empty() {
            let Some(known) = self.links.get_mut(&link) else { return };
            let message = match &mut known.phase {
                Phase::Connecting { .. } => return,
                Phase::Open { peer, kind, .. } => {
                    let (peer, kind) = (*peer, *kind);
                    return self.receive_frames(link, peer, kind, &rest, out);
                }
                Phase::Initiating { input, .. } | Phase::Accepting { input, .. } => {
                    input.append(&mut rest);
                    let message = take_message(input);
                    if matches!(message, Ok(Some(_))) {
                        rest = std::mem::take(input);
                    }
                    message
                }
            };
            match message {
                Ok(None) => return,
                Ok(Some(message)) => self.on_message(link, &message, out),
                Err(error) => {
                    return self.handshake_failed(link, error.reason(), Some(error), out);
                }
            }
        }
    }

    fn on_message(&mut self, link: u64, message: &[u8], out: &mut dyn Outside) {
        let Some(known) = self.links.get_mut(&link) else { return };
        match &mut known.phase {
            Phase::Initiating { peer, kind, machine, .. } => {
                let (peer, kind) = (*peer, *kind);
                let step = match &mut **machine {
                    Opening::Honest(initiator) => initiator.receive(message),
                    Opening::Impostor => pretend(message, out),
                };
                match step {
                    Ok(InitiatorStep::Send(bytes)) => out.send(link, bytes),
                    Ok(InitiatorStep::Up(welcome)) => {
                        self.initiated(link, peer, kind, &welcome, out);
                    }
                    Err(error) => self.handshake_failed(link, error.reason(), Some(error), out),
                }
            }
            Phase::Accepting { machine, .. } => {
                let table = &self.table;
                let step = match &mut **machine {
                    Answering::Honest(target) => {
                        target.receive(message, |incarnation| table.secret_of(incarnation))
                    }
                    Answering::Impostor(hello) => {
                        believe(self.config.incarnation, hello, message, out)
                    }
                };
                match step {
                    Ok(TargetStep::Send(bytes)) => out.send(link, bytes),
                    Ok(TargetStep::Proven(proven)) => self.adopt(link, &proven.hello, out),
                    Err(error) => {
                        let refusal = match error {
                            HandshakeError::Refused(refusal) => Some(refusal),
                            HandshakeError::Proof => Some(Refusal::Proof),
                            HandshakeError::Protocol => None,
                        };
                        if let Some(refusal) = refusal {
                            out.send(link, Message::Refused(refusal).encode());
                        }
                        self.handshake_failed(link, error.reason(), Some(error), out);
                    }
                }
            }
            Phase::Connecting { .. } | Phase::Open { .. } => {}
        }
    }

    fn initiated(
        &mut self,
        link: u64,
        slot: usize,
        kind: LinkKind,
        welcome: &Welcome,
        out: &mut dyn Outside,
    ) {
        let on_this_host = self.has_ring();
        let refused = match kind {
            LinkKind::Session => self.with_core(slot, Input::Welcomed, |core, env| {
                core.session_welcomed(link, welcome, on_this_host, env)
            }),
            LinkKind::Bulk => {
                self.with_core(slot, Input::BulkUp, |core, env| core.bulk_up(link, true, env));
                Ok(())
            }
        };
        match refused {
            Ok(()) => self.open_link(link, slot, kind, true, out),
            Err(reason) => self.handshake_failed(link, reason, None, out),
        }
    }

    /// Frames flow from here on; the core knows the link already.
    fn open_link(
        &mut self,
        link: u64,
        slot: usize,
        kind: LinkKind,
        ours: bool,
        out: &mut dyn Outside,
    ) {
        let Some(known) = self.links.get_mut(&link) else { return };
        known.phase = Phase::Open { peer: slot, kind, stream: Stream::new() };
        if ours && kind == LinkKind::Session {
            if let Some(connector) = &mut self.peers[slot].connector {
                connector.link = None;
            }
            self.abort_connect(slot, out);
        }
        self.peers[slot].links.push(link);
        if kind == LinkKind::Session && self.config.way == Way::Wired {
            self.wire_attach(slot, link, ours);
        }
        if kind == LinkKind::Session && self.has_ring() {
            self.attach(slot, link, out);
        }
        self.mark(slot);
    }

    // Links that peers open.

    /// Somebody has connected; the answer names the link.
    pub fn accept(&mut self, out: &mut dyn Outside) -> u64 {
        let machine = match self.config.trust {
            Trust::Honest => {
                Answering::Honest(Target::new(self.identity.clone(), Self::nonce(out)))
            }
            Trust::Impostor => Answering::Impostor(None),
        };
        let link =
            self.add_link(Phase::Accepting { machine: Box::new(machine), input: Vec::new() });
        if self.half_open() > self.config.limits.half_open {
            let oldest = self.links.iter().find(|(_, link)| link.is_half_open());
            if let Some(oldest) = oldest.map(|(id, _)| *id) {
                self.handshake_failed(oldest, "too many without a handshake", None, out);
            }
        }
        link
    }

    fn adopt(&mut self, link: u64, hello: &Hello, out: &mut dyn Outside) {
        match self.welcome(hello, out) {
            Ok((slot, _)) if out.is_broken(link) => {
                self.links.remove(&link);
                out.close(link);
                if hello.kind == LinkKind::Session {
                    self.with_core(slot, Input::AcceptFailed, Core::accept_failed);
                }
            }
            Ok((slot, welcome)) => {
                out.send(link, Message::Welcome(welcome.clone()).encode());
                let on_this_host = self.has_ring();
                match hello.kind {
                    LinkKind::Session => self.with_core(slot, Input::SessionUp, |core, env| {
                        core.session_up(link, welcome.liveness_ms, false, on_this_host, env);
                    }),
                    LinkKind::Bulk => self.with_core(slot, Input::BulkUp, |core, env| {
                        core.bulk_up(link, false, env);
                    }),
                }
                self.open_link(link, slot, hello.kind, false, out);
            }
            Err(refusal) => {
                out.send(link, Message::Refused(refusal).encode());
                self.links.remove(&link);
                out.close(link);
            }
        }
    }

    fn welcome(
        &mut self,
        hello: &Hello,
        out: &mut dyn Outside,
    ) -> Result<(usize, Welcome), Refusal> {
        if self.stopping {
            return Err(Refusal::ShuttingDown);
        }
        let slot = self.peer_slot(hello)?;
        if let (LinkKind::Session, Some(old)) = (hello.kind, self.peers[slot].core.session_link()) {
            // What it has put into its ring before it lost the link counts, or it is told too little.
            self.take_rest_of_ring(old, out);
            self.look_at_wire(old, out);
        }
        let (liveness, number) = (self.identity.liveness_ms, out.random());
        let welcome = match hello.kind {
            LinkKind::Session => self.with_core(slot, Input::Accept, |core, env| {
                core.accept_session(hello, liveness, number, env)
            }),
            LinkKind::Bulk => {
                self.with_core(slot, Input::AcceptBulk, |core, _| core.accept_bulk(hello))
            }
        };
        if hello.kind == LinkKind::Session && welcome.is_ok() {
            // A link that this one replaces is closed before there is anything new that its end could be taken for that of.
            self.handle_events(slot, out);
            if self.peers.get(slot).is_none() {
                return Err(Refusal::NoSession);
            }
        }
        welcome.map(|welcome| (slot, welcome))
    }

    fn peer_slot(&mut self, hello: &Hello) -> Result<usize, Refusal> {
        if hello.initiator == self.config.incarnation {
            return Ok(self.mirror_slot());
        }
        if hello.kind == LinkKind::Bulk && !self.table.contains(hello.initiator) {
            return Err(Refusal::NoSession);
        }
        let (peer, _) = self.table.admit(&hello.name, hello.initiator)?;
        Ok(self.add_peer(&peer, false))
    }

    fn mirror_slot(&mut self) -> usize {
        if let Some(slot) = self.mirror {
            return slot;
        }
        let name = self.config.name.as_str().into();
        let (incarnation, limits) = (self.config.incarnation, &self.config.limits);
        let peer = crate::peer::PeerShared::new(name, incarnation, 0, None, limits);
        let slot = self.add_peer(&std::sync::Arc::new(peer), true);
        self.mirror = Some(slot);
        slot
    }
}

/// An initiator that does not have the secret.
fn pretend(message: &[u8], out: &mut dyn Outside) -> Result<InitiatorStep, HandshakeError> {
    match Message::decode(message) {
        Some(Message::Challenge(_)) => {
            let (proof, own_proof) = (Node::nonce(out), Node::nonce(out));
            Ok(InitiatorStep::Send(Message::Auth(Auth { proof, own_proof }).encode()))
        }
        Some(Message::Welcome(welcome)) => Ok(InitiatorStep::Up(welcome)),
        Some(Message::Refused(refusal)) => Err(HandshakeError::Refused(refusal)),
        _ => Err(HandshakeError::Protocol),
    }
}

/// A target that does not have the secret.
fn believe(
    incarnation: u128,
    heard: &mut Option<Box<Hello>>,
    message: &[u8],
    out: &mut dyn Outside,
) -> Result<TargetStep, HandshakeError> {
    match (Message::decode(message), heard.take()) {
        (Some(Message::Hello(hello)), None) => {
            let challenge = Challenge {
                version: hello.max_version,
                transports: hello.transports,
                target: incarnation,
                nonce: Node::nonce(out),
                proof: Node::nonce(out),
            };
            *heard = Some(Box::new(hello));
            Ok(TargetStep::Send(Message::Challenge(challenge).encode()))
        }
        (Some(Message::Auth(_)), Some(hello)) => {
            let own_secret = crate::session::handshake::OwnSecret::NotKnown;
            Ok(TargetStep::Proven(Box::new(Proven { hello: *hello, own_secret })))
        }
        _ => Err(HandshakeError::Protocol),
    }
}
