//! Links that peers open.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use corelane_runtime::{Cx, Interest};

use super::lane::{LaneDriver, Message};
use super::links::{Input, Phase, send_whole};
use crate::peer::home_lane;
use crate::session::handshake::{HandshakeError, Proven, Target, TargetStep};
use crate::session::{Core, LinkId};
use crate::sys;
use crate::transport::addresses::{self, Remote};
use crate::transport::local::RING_MESSAGES;
use crate::wire::hello::{Hello, LinkKind, Message as HelloMessage, Refusal, Welcome};

/// Connections accepted in one turn.
const ACCEPT_BATCH: usize = 16;

/// A proven link on its way to the lane of its peer.
pub(crate) struct Adopted {
    fd: OwnedFd,
    remote: Remote,
    hello: Hello,
}

/// What `accept4` answers.
fn accept(listener: &OwnedFd) -> std::io::Result<(OwnedFd, Remote)> {
    use nix::sys::socket::SockFlag;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let raw = nix::sys::socket::accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: accept4 has just returned this descriptor, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    let remote = socket2::SockRef::from(&fd).peer_addr()?;
    let Some(address) = remote.as_socket() else {
        // Who it is, the handshake tells.
        return Ok((fd, Remote::Unix(0)));
    };
    addresses::set_up(&socket2::SockRef::from(&fd))?;
    Ok((fd, Remote::Inet(address)))
}

/// The connection was gone before it was accepted; the next may be well.
fn is_of_one_connection(error: &std::io::Error) -> bool {
    let gone = [libc::ECONNABORTED, libc::ENOTCONN, libc::EINVAL, libc::EPROTO];
    error.raw_os_error().is_some_and(|code| gone.contains(&code))
}

impl LaneDriver {
    /// A listener is readable.
    pub(super) fn accept(&mut self, number: usize, cx: &mut Cx<'_>) -> bool {
        for accepted in 0..ACCEPT_BATCH {
            let Some(listener) = self.listener(number) else { return false };
            match accept(listener) {
                Ok((fd, remote)) => self.accepted(fd, remote, cx),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return accepted > 0,
                Err(e) if is_of_one_connection(&e) => {}
                Err(e) => {
                    // Out of descriptors, most likely: a connection that cannot be had now may be
                    // had when others have ended.
                    tracing::warn!(error = %e, "cannot accept connections for a while");
                    self.rest_listener(number, cx);
                    return false;
                }
            }
        }
        true
    }

    fn accepted(&mut self, fd: OwnedFd, remote: Remote, cx: &mut Cx<'_>) {
        if self.engine.is_stopping() {
            return;
        }
        let Ok(nonce) = sys::random() else { return };
        let machine = Box::new(Target::new(self.engine.identity.clone(), nonce));
        let phase = Phase::Accepting { machine, input: Input::default() };
        let id = self.add_link(fd, remote, phase, Interest::READABLE, cx);
        self.half_open.push_back(id);
        if self.half_open.len() > self.engine.config.limits.half_open
            && let Some(oldest) = self.half_open.pop_front()
        {
            self.refuse_link(oldest, "too many connections without a handshake", cx);
        }
    }

    /// Ends a link that has proven nothing.
    pub(super) fn refuse_link(&mut self, id: LinkId, reason: &str, cx: &mut Cx<'_>) {
        self.half_open.retain(|known| *known != id);
        if let Some(link) = self.take_link(id, cx) {
            self.counters.links_refused.add(1);
            tracing::debug!(address = %link.remote, reason, "refused a connection");
        }
    }

    /// The handshake of a link that somebody opened has got a message.
    pub(super) fn on_target(&mut self, id: LinkId, message: &[u8], cx: &mut Cx<'_>) {
        let engine = self.engine.clone();
        let Some(link) = self.link(id) else { return };
        let Phase::Accepting { machine, .. } = &mut link.phase else { return };
        let outcome = machine.receive(message, |incarnation| engine.peers().secret_of(incarnation));
        match outcome {
            Ok(TargetStep::Send(bytes)) => {
                if let Err(reason) = send_whole(&link.fd, &bytes) {
                    self.refuse_link(id, &reason, cx);
                }
            }
            Ok(TargetStep::Proven(proven)) => self.proven(id, *proven, cx),
            Err(error) => {
                let refusal = match error {
                    HandshakeError::Refused(refusal) => Some(refusal),
                    HandshakeError::Proof => Some(Refusal::Proof),
                    HandshakeError::Protocol => None,
                };
                if let Some(refusal) = refusal {
                    let _ = send_whole(&link.fd, &HelloMessage::Refused(refusal).encode());
                }
                let address = link.remote;
                tracing::warn!(%address, reason = error.reason(), "refused a connection");
                self.refuse_link(id, error.reason(), cx);
            }
        }
    }

    /// The initiator holds our metadata: hand the link to its peer's lane.
    fn proven(&mut self, id: LinkId, proven: Proven, cx: &mut Cx<'_>) {
        self.half_open.retain(|known| *known != id);
        let Some(link) = self.take_link(id, cx) else { return };
        let adopted = Adopted { fd: link.fd, remote: link.remote, hello: proven.hello };
        let lanes = self.engine.config.lanes.count();
        let home = home_lane(adopted.hello.initiator, lanes);
        if home == self.index {
            return self.adopt(adopted, cx);
        }
        if let Ok(lane) = self.engine.lane(home) {
            // A lane that is gone drops the link, which closes it.
            let _ = lane.submit(Message::Adopt(Box::new(adopted)));
        }
    }

    /// Attaches a proven link to its peer and welcomes it.
    pub(super) fn adopt(&mut self, adopted: Adopted, cx: &mut Cx<'_>) {
        let Adopted { fd, remote, hello } = adopted;
        let refused = match self.welcome(&hello, cx) {
            Ok((slot, welcome)) => {
                match send_whole(&fd, &HelloMessage::Welcome(welcome.clone()).encode()) {
                    Ok(()) => return self.adopted(fd, remote, slot, &hello, &welcome, cx),
                    Err(reason) => {
                        if hello.kind == LinkKind::Session {
                            self.with_core(slot, cx, Core::accept_failed);
                        }
                        reason
                    }
                }
            }
            Err(refusal) => {
                let _ = send_whole(&fd, &HelloMessage::Refused(refusal).encode());
                refusal.reason().to_owned()
            }
        };
        self.counters.links_refused.add(1);
        if !refused.is_empty() {
            tracing::debug!(peer = hello.name, address = %remote, reason = refused, "refused a link");
        }
    }

    fn welcome(&mut self, hello: &Hello, cx: &mut Cx<'_>) -> Result<(usize, Welcome), Refusal> {
        if self.engine.is_stopping() {
            return Err(Refusal::ShuttingDown);
        }
        let slot = match self.peer_slot(hello) {
            Err(Refusal::NameInUse) => {
                // Its owner may have died just now, and this is who was started in its place.
                self.look_for_end_of(&hello.name, cx);
                self.peer_slot(hello)?
            }
            found => found?,
        };
        let liveness = self.engine.identity.liveness_ms;
        let number = u64::from_le_bytes(sys::random().map_err(|_| Refusal::Limit)?);
        if hello.kind == LinkKind::Session {
            // What the peer has put into the ring before it connected again belongs to the session so far; it may go on to
            // fill it for as long as it likes.
            self.drain_ring(slot, RING_MESSAGES, cx);
            // And what queue pairs have brought: in the next session its numbers would name other notifications.
            self.drain_rdma(cx);
        }
        let welcome = self.with_core(slot, cx, |core, env| match hello.kind {
            LinkKind::Session => core.accept_session(hello, liveness, number, env),
            LinkKind::Bulk => core.accept_bulk(hello),
        });
        if hello.kind == LinkKind::Session && matches!(welcome, Some(Ok(_))) {
            // A link that this one replaces is closed before there is anything new that its end could be taken for that of.
            self.handle_events(slot, cx);
            if self.peers.get(slot).is_none() {
                return Err(Refusal::NoSession);
            }
        }
        match welcome {
            Some(Ok(welcome)) => Ok((slot, welcome)),
            Some(Err(refusal)) => Err(refusal),
            None => Err(Refusal::NoSession),
        }
    }

    fn adopted(
        &mut self,
        fd: OwnedFd,
        remote: Remote,
        slot: usize,
        hello: &Hello,
        welcome: &Welcome,
        cx: &mut Cx<'_>,
    ) {
        let phase = Phase::Standby { peer: slot, kind: hello.kind };
        let id = self.add_link(fd, remote, phase, Interest::READABLE, cx);
        let theirs = hello.transports;
        let (frames, rdma) = (self.frames_allowed(theirs), self.rdma_expected(theirs));
        if let Some(peer) = self.peers.get_mut(slot).filter(|_| hello.kind == LinkKind::Session) {
            peer.transports = hello.transports;
        }
        self.with_core(slot, cx, |core, env| match hello.kind {
            LinkKind::Session => {
                core.set_frames_allowed(frames);
                core.set_rdma_expected(rdma);
                core.session_up(id, welcome.liveness_ms, false, remote.is_unix(), env);
            }
            LinkKind::Bulk => core.bulk_up(id, false, env),
        });
        self.open(id, slot, hello.kind, false, cx);
        if hello.kind == LinkKind::Session
            && self.mirror != Some(slot)
            && let Some(peer) = self.peers.get(slot)
        {
            self.engine.arrivals.push(&peer.core.peer);
        }
    }

    /// The peer behind an incoming link; a stranger that holds our metadata becomes one.
    fn peer_slot(&mut self, hello: &Hello) -> Result<usize, Refusal> {
        if hello.initiator == self.engine.identity.incarnation {
            return Ok(self.mirror_slot());
        }
        let mut peers = self.engine.peers();
        if hello.kind == LinkKind::Bulk && !peers.contains(hello.initiator) {
            return Err(Refusal::NoSession);
        }
        if !peers.contains(hello.initiator) && !self.engine.arrivals.is_open() {
            return Err(Refusal::NotAccepting);
        }
        let (peer, _) = peers.admit(&hello.name, hello.initiator)?;
        drop(peers);
        Ok(self.add_peer(&peer, false))
    }

    /// A connection to ourselves has two ends here, and each needs a core.
    fn mirror_slot(&mut self) -> usize {
        if let Some(slot) = self.mirror {
            return slot;
        }
        let engine = &self.engine;
        let peer = crate::peer::PeerShared::new(
            engine.name.clone(),
            engine.identity.incarnation,
            self.index,
            None,
            &engine.config.limits,
        );
        let slot = self.add_peer(&std::sync::Arc::new(peer), true);
        self.mirror = Some(slot);
        slot
    }
}
