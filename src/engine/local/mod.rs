//! Peers on this host: shared memory is exchanged over the session's Unix socket, the notification rings
//! are polled, and transfers are copied.
//!
//! Each side sends ATTACH with its region table and its channel, and answers the other's with ATTACHED: from
//! then on the other has mapped the channel, so that copies announced in it are seen.

mod copies;
mod life;
mod memory;
mod rings;

use self::memory::take_share;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use corelane_runtime::{Cx, Lane, TimerId, WordId};
use smallvec::SmallVec;

use crate::engine::lane::{ATTACH_TIMER, LaneDriver, LanePeer};
use crate::engine::links::Phase;
use crate::session::LinkId;
use crate::sys;
use crate::transport::local::{
    self, Accessor, Consumer, LAYOUT, Life, LocalPath, PathParts, PeerProcess, Producer,
    RING_MESSAGES, SharedFd, TableView,
};
use crate::transport::receive::LocalFrame;
use crate::wire::RegionKey;
use crate::wire::frame::{FrameKind, Header};

/// `status` of ATTACHED.
const TAKEN: u16 = 0;
const REFUSED: u16 = 1;

/// Mappings that one peer can make us have.
const MAX_MAPPED_OF_PEER: usize = 4096;

/// A frame about shared memory on its way, with its descriptors.
struct Outgoing {
    header: Header,
    fds: SmallVec<[SharedFd; 2]>,
}

/// What the peer has shared with us.
struct Theirs {
    ring: Consumer,
    accessor: Arc<Accessor>,
    path: Arc<LocalPath>,
    /// Where it is seen that its process dies, the watch of that, and how often the watch has ended for nothing.
    life: Option<Life>,
    watch: Option<WordId>,
    idle_wakes: u32,
    /// It runs as the user that we run as.
    same_user: bool,
}

/// The shared memory of one session.
pub(in crate::engine) struct Attachment {
    link: LinkId,
    ring: Producer,
    theirs: Option<Theirs>,
    /// The peer has mapped what is ours.
    taken: bool,
    /// Until when the peer may take for its part, and the timer for that; none once both have done theirs.
    until: Option<(Instant, TimerId)>,
    outgoing: VecDeque<Outgoing>,
    /// Since when something waits for the ring, and whether a timer is set for it.
    waiting: Option<(Instant, bool)>,
}

impl Attachment {
    pub(in crate::engine) fn is_up(&self) -> bool {
        self.taken && self.theirs.is_some()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // Whoever still looks sees that this session is over.
        self.ring.set_nonce([0; 16]);
    }
}

fn frame(kind: FrameKind, status: u16) -> Outgoing {
    Outgoing { header: Header { status, ..Header::new(kind) }, fds: SmallVec::new() }
}

impl LaneDriver {
    /// A session has come up over a Unix socket: our side of the exchange.
    pub(in crate::engine) fn attach(&mut self, slot: usize, link: LinkId, cx: &mut Cx<'_>) {
        let made = self.make_attachment(link);
        // One that stands still is silent first, which ends all at once: no further attempt is waited for.
        let until = cx.now() + self.attach_patience();
        let Some(peer) = self.peers.get_mut(slot) else { return };
        match made {
            Ok(mut attachment) => {
                let timer = cx.set_timer(until, ATTACH_TIMER | slot as u64);
                attachment.until = Some((until, timer));
                peer.local = Some(Box::new(attachment));
            }
            Err(reason) => {
                tracing::warn!(peer = &*peer.core.peer.name, reason, "no shared memory");
                // The peer must not wait for ours.
                let refusal = frame(FrameKind::Attached, REFUSED).header.encode();
                if let Some(link) = self.link(link) {
                    let _ = sys::send_with_fds(link.fd.as_fd(), &refusal, &[]);
                }
                self.local_resolved(slot, Err(reason), cx);
            }
        }
        self.mark(slot);
    }

    fn make_attachment(&self, link: LinkId) -> Result<Attachment, String> {
        let told = |what: &str, error: std::io::Error| format!("{what}: {error}");
        let table = self.engine.table.as_ref().ok_or("it is not allowed on this side")?;
        let (ring, channel) = local::create_channel().map_err(|e| told("a memfd", e))?;
        let nonce = sys::random::<16>().map_err(|e| told("random bytes", e))?;
        let mut attach = frame(FrameKind::Attach, LAYOUT);
        attach.header.id = ring.set_nonce(nonce);
        attach.header.key = u128::from_le_bytes(nonce);
        attach.fds.extend([table.fd(), channel]);
        Ok(Attachment {
            link,
            ring,
            theirs: None,
            taken: false,
            until: None,
            outgoing: VecDeque::from([attach]),
            waiting: None,
        })
    }

    /// Sends the frames that carry descriptors, as far as the socket takes them.
    ///
    /// # Errors
    /// The link is broken.
    pub(in crate::engine) fn flush_local(&mut self, slot: usize, id: LinkId) -> Result<(), String> {
        let Self { links, peers, .. } = self;
        let Some(attachment) = peers.get_mut(slot).and_then(|peer| peer.local.as_mut()) else {
            return Ok(());
        };
        if attachment.link != id || attachment.outgoing.is_empty() {
            return Ok(());
        }
        let Some(link) = links.get_mut(id as u32 as usize) else { return Ok(()) };
        let Phase::Open { sender, .. } = &link.phase else { return Ok(()) };
        while sender.is_between_frames()
            && let Some(next) = attachment.outgoing.front()
        {
            let bytes = next.header.encode();
            let sent = {
                let fds: SmallVec<[_; 2]> = next.fds.iter().map(|fd| fd.as_fd()).collect();
                sys::send_with_fds(link.fd.as_fd(), &bytes, &fds)
            };
            match sent {
                Ok(n) if n == bytes.len() => {
                    attachment.outgoing.pop_front();
                }
                Ok(_) => return Err("the socket took half of a header".into()),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(format!("sharing memory: {e}")),
            }
        }
        Ok(())
    }

    /// Frames about shared memory have arrived.
    pub(in crate::engine) fn on_local_frames(
        &mut self,
        slot: usize,
        id: LinkId,
        frames: Vec<LocalFrame>,
        cx: &mut Cx<'_>,
    ) {
        for frame in frames {
            if let Err(reason) = self.on_local_frame(slot, id, frame, cx) {
                return self.close_link(id, &format!("protocol error: {reason}"), cx);
            }
        }
        self.mark(slot);
    }

    fn on_local_frame(
        &mut self,
        slot: usize,
        id: LinkId,
        LocalFrame { header, fds }: LocalFrame,
        cx: &mut Cx<'_>,
    ) -> Result<(), String> {
        let Some(attachment) = self.peers.get_mut(slot).and_then(|peer| peer.local.as_mut()) else {
            // What came of it was said when it failed.
            return Ok(());
        };
        if attachment.link != id {
            return Err("shared memory on a stream for bulk".into());
        }
        match header.kind {
            FrameKind::Attach if attachment.theirs.is_some() => {
                return Err("ATTACH a second time".into());
            }
            FrameKind::Attach => {
                let theirs = self.take_attach(slot, id, &header, fds);
                let taken = self.set_theirs(slot, theirs, cx);
                if taken {
                    self.share_all(slot);
                }
            }
            FrameKind::Attached if header.status == TAKEN => attachment.taken = true,
            FrameKind::Attached => {
                let reason = "the peer cannot share memory with this engine (its log says why)";
                self.detach(slot, cx);
                self.local_resolved(slot, Err(reason.into()), cx);
                return Ok(());
            }
            FrameKind::Share => {
                let Some(theirs) = &attachment.theirs else {
                    return Err("SHARE before ATTACH".into());
                };
                // What is not mapped is reached as other memory is.
                let most = MAX_MAPPED_OF_PEER.min(self.engine.config.limits.regions);
                if theirs.path.mapped_regions() < most {
                    take_share(theirs, &header, &fds)?;
                }
            }
            FrameKind::Unshare => {
                if let Some(theirs) = &attachment.theirs {
                    theirs.path.unmap(RegionKey(header.key));
                }
            }
            _ => return Err("no frame about shared memory".into()),
        }
        self.try_local_up(slot, id, cx);
        Ok(())
    }

    /// Maps what the peer shares, and finds out how far its memory can be reached.
    fn take_attach(
        &self,
        slot: usize,
        id: LinkId,
        header: &Header,
        fds: sys::Fds,
    ) -> Result<Theirs, String> {
        let peer = self.peers.get(slot).ok_or("the peer is gone")?;
        let attachment = peer.local.as_ref().ok_or("the session is gone")?;
        let link = self.links.get(id as u32 as usize).ok_or("the link is gone")?;
        if header.status != LAYOUT {
            return Err(format!("its shared memory has layout {} and not {LAYOUT}", header.status));
        }
        let Ok([table, channel]) = <[OwnedFd; 2]>::try_from(fds.into_vec()) else {
            return Err("descriptors are missing (too many are open?)".into());
        };
        let table = TableView::open(&table)?;
        let ring = local::open_channel(&channel)?;
        let local::PeerCredentials { pid, same_user } =
            local::PeerCredentials::of(link.fd.as_fd()).map_err(|e| e.to_string())?;
        // A child that this process has forked knows of the incarnation, too, and has other memory.
        let own = pid.is_some_and(local::Pid::is_own)
            && super::shared::is_of_this_process(peer.core.peer.incarnation);
        let nonce = (header.id, header.key.to_le_bytes());
        let (reach, reason) = local::reach(pid, own, nonce);
        let life = table.life(self.engine.identity.incarnation);
        let process = PeerProcess::new(pid, reach.process_memory(), life.clone(), own);
        let accessor = Arc::new(Accessor::new(pid, ring.uses(), process));
        let path = Arc::new(LocalPath::new(PathParts {
            peer: peer.core.peer.name.clone(),
            reach,
            reason,
            table,
            life: life.clone(),
            uses: attachment.ring.uses(),
            nonce,
            strict_writes: self.engine.config.strict_writes,
        }));
        let (watch, idle_wakes) = (None, 0);
        Ok(Theirs { ring, accessor, path, life, watch, idle_wakes, same_user })
    }

    /// Answers ATTACH; true: it was taken.
    fn set_theirs(&mut self, slot: usize, theirs: Result<Theirs, String>, cx: &mut Cx<'_>) -> bool {
        let Some(peer) = self.peers.get_mut(slot) else { return false };
        let Some(attachment) = peer.local.as_mut() else { return false };
        let theirs = theirs.and_then(|theirs| {
            let is_known = self.engine.accessors.add(theirs.accessor.clone());
            let reason = || "copies that its process announced in earlier sessions never ended";
            is_known.then_some(theirs).ok_or_else(|| reason().into())
        });
        match theirs {
            Ok(theirs) => {
                theirs.ring.set_asleep(self.asleep);
                attachment.theirs = Some(theirs);
                attachment.outgoing.push_back(frame(FrameKind::Attached, TAKEN));
                self.rings.push(slot);
                self.begin_to_watch(slot, cx);
                true
            }
            Err(reason) => {
                attachment.outgoing.push_back(frame(FrameKind::Attached, REFUSED));
                let link = attachment.link;
                // A link that cannot take it says so by itself.
                let _ = self.flush_local(slot, link);
                self.detach(slot, cx);
                self.local_resolved(slot, Err(reason), cx);
                false
            }
        }
    }

    /// Which way transfers go is not known before both have answered: a peer that lives and does not is not waited for without
    /// end. It is no engine that works; with the link goes all that it may have of this one.
    pub(in crate::engine) fn attach_timer(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let now = cx.now();
        let late = |driver: &Self| {
            let attachment = driver.peers.get(slot)?.local.as_ref()?;
            // Another timer, of one that had its place before, may be early.
            attachment.until.is_some_and(|(until, _)| until <= now).then_some(attachment.link)
        };
        let Some(link) = late(self) else { return };
        // Where it is this lane that stood still, the answer is there.
        self.receive_last(link, cx);
        if late(self) == Some(link) {
            let patience = self.attach_patience();
            let reason =
                format!("it has not shared memory within {patience:?}, as engines on one host do");
            self.close_link(link, &reason, cx);
        }
    }

    fn attach_patience(&self) -> Duration {
        self.engine.config.connect_timeout + self.engine.config.liveness
    }

    fn try_local_up(&mut self, slot: usize, id: LinkId, cx: &mut Cx<'_>) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let Some(attachment) = peer.local.as_mut() else { return };
        if attachment.is_up()
            && let Some((_, timer)) = attachment.until.take()
        {
            cx.cancel_timer(timer);
        }
        let Some(Theirs { path, .. }) = attachment.theirs.as_ref().filter(|_| attachment.is_up())
        else {
            return;
        };
        if peer.core.peer.path().is_some() {
            return;
        }
        let path = path.clone();
        if let Some(fd_id) = self.link(id).map(|link| link.fd_id()) {
            // Notifications come by the ring now.
            cx.set_calm(fd_id, true);
        }
        self.local_resolved(slot, Ok(path), cx);
    }

    fn local_resolved(
        &mut self,
        slot: usize,
        outcome: Result<Arc<LocalPath>, String>,
        cx: &mut Cx<'_>,
    ) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        if let (Ok(path), false) = (&outcome, peer.is_leaving()) {
            peer.core.peer.set_path(Some(path.clone()));
        }
        self.log_local(slot, outcome.as_ref().err().map(String::as_str));
        let session = peer_session(self.peers.get(slot));
        if !outcome.as_ref().is_ok_and(|path| path.reaches_all())
            && let Some(session) = session.filter(|session| self.is_ours(slot, *session))
        {
            // The next best way. The other side comes along if it is offered.
            self.rdma_attach(slot, session, cx);
        }
        self.with_core(slot, cx, |core, env| core.local_resolved(outcome, env));
    }

    fn is_ours(&self, slot: usize, session: LinkId) -> bool {
        self.peers.get(slot).is_some_and(|peer| peer.core.is_link_ours(session))
    }

    /// The line that says how bytes will go to and from a peer on this host.
    fn log_local(&self, slot: usize, failure: Option<&str>) {
        let Some(peer) = self.peers.get(slot) else { return };
        let theirs = peer.local.as_ref().and_then(|attachment| attachment.theirs.as_ref());
        let path = theirs.map(|theirs| &theirs.path);
        let reached = path.is_some_and(|path| path.reaches_all());
        let reason = failure.or_else(|| path.and_then(|path| path.reason()));
        let core = self.engine.lane(self.index).ok().and_then(Lane::core);
        tracing::info!(
            peer = &*peer.core.peer.name,
            transport = if reached { "local" } else { "tcp, over a unix socket" },
            copies = path.map_or("none", |path| path.method()),
            reason = reason.unwrap_or(""),
            lane = self.index,
            core = core.map_or("unpinned".to_owned(), |core| core.to_string()),
            "connected"
        );
    }

    /// The session's link is going: what the peer has put into its ring is taken first.
    pub(in crate::engine) fn detach(&mut self, slot: usize, cx: &mut Cx<'_>) {
        // No more: the peer may go on to fill it for as long as it likes.
        self.drain_ring(slot, RING_MESSAGES, cx);
        self.rings.retain(|known| *known != slot);
        self.end_watch(slot, cx);
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.core.peer.set_path(None);
        peer.core.set_ring(None);
        let attachment = peer.local.take();
        if let Some((_, timer)) = attachment.as_ref().and_then(|attachment| attachment.until) {
            cx.cancel_timer(timer);
        }
        if let Some(theirs) = attachment.as_ref().and_then(|attachment| attachment.theirs.as_ref())
        {
            theirs.accessor.leave();
            crate::gpu::forget_mappings(peer.core.peer.incarnation);
            peer.last_process = Some(theirs.accessor.clone());
        }
    }

    /// No further transfer is copied by callers: the session is being left.
    pub(in crate::engine) fn close_path(&mut self, slot: usize, cx: &mut Cx<'_>) {
        if let Some(peer) = self.peers.get(slot) {
            peer.core.peer.set_path(None);
        }
        self.settle_issued_of(slot, cx);
    }
}

/// The session's link.
fn peer_session(peer: Option<&LanePeer>) -> Option<LinkId> {
    peer?.core.session_link()
}
