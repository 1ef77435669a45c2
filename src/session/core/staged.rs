//! Frames whose payload is in memory of a GPU, which no socket reaches: it goes through blocks of pinned memory.
//!
//! What is sent is packed first: an answer, or a piece of a WRITE, takes its place among the frames once the driver has its bytes in a
//! block. What is received lands later: the driver copies its block to the GPU, and only then the request is answered, or
//! the piece counted. So a notification stays behind its data by the same counts as with host memory.

use std::collections::VecDeque;
use std::sync::Arc;

use super::links::{CoreLink, Reply};
use super::requests::{Active, ActiveKey};
use super::serve::{Dest, Landing};
use super::{Core, Env, LinkId, ProtocolError, Sent, TxFrame, TxPayload};
use crate::error::Error;
use crate::gpu::Block;
use crate::memory::{RegionUses, Segments};
use crate::plan::{Class, Operation, PlanInner};
use crate::sys::IoSegment;
use crate::wire::frame::{FrameKind, Header, ServeStatus};

/// What blocks are taken for. Each has its own: a piece of a WRITE may have to wait until something is answered, so answers must
/// not wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PackKind {
    Reply,
    Write,
}

impl PackKind {
    pub(crate) const ALL: [Self; 2] = [Self::Reply, Self::Write];
}

/// Blocks that the frames of one kind hold at most for one peer: so that one which reads slowly leaves some to others.
const MAX_PACKED: usize = 12;
/// Small payloads take some more, and do not wait for large ones.
const MORE_FOR_SMALL: usize = 4;
/// The longest payload that counts as small.
const SMALL_BYTES: u64 = 64 << 10;

/// Something that waits to be packed.
pub(super) enum ToPack {
    Reply {
        link: LinkId,
        header: Header,
        segments: Segments,
        uses: RegionUses,
    },
    /// The next piece of a WRITE.
    Write(ActiveKey),
}

/// What one peer has to pack of one kind.
#[derive(Default)]
pub(super) struct Packs {
    /// Small payloads, and others.
    queues: [VecDeque<ToPack>; 2],
    /// Blocks that its frames hold, or are about to.
    pub(super) held: usize,
}

/// How far a WRITE of GPU memory is.
#[derive(Default)]
pub(super) struct Packed {
    /// The next piece to pack.
    next: u32,
    /// Pieces in blocks, and not sent.
    pub(super) ready: VecDeque<(u32, Block)>,
    /// It waits for a link, in its queue.
    queued: bool,
}

/// What the driver copies from a GPU into a block. To be given back to `packed`.
#[must_use]
pub(crate) enum PackJob {
    Reply { link: LinkId, header: Header, segments: Segments, uses: RegionUses },
    Write { key: LandingKey, plan: Arc<PlanInner>, piece: u32 },
}

/// The transfer whose memory a copy touches: it does not end before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LandingKey(ActiveKey);

impl Packs {
    fn has_some(&self) -> bool {
        self.queues.iter().any(|queue| !queue.is_empty())
    }
}

impl PackJob {
    /// Where the bytes are.
    pub(crate) fn segments(&self) -> &[IoSegment] {
        match self {
            Self::Reply { segments, .. } => segments,
            Self::Write { plan, piece, .. } => plan.local(*piece),
        }
    }
}

impl TxFrame {
    pub(super) fn packed(header: &Header, block: Block, write: Option<u64>) -> Self {
        let payload = TxPayload::Served(smallvec::smallvec![block.segment(header.len as usize)]);
        Self { payload, sent: Sent::Packed(block, write), ..Self::header(header) }
    }
}

impl Active {
    /// The piece that is asked for or sent next, its block, and whether its answer lands in memory of a GPU. `None`: it is not packed.
    #[inline]
    pub(super) fn next_payload(&mut self) -> Option<(u32, Option<Block>, bool)> {
        let plan = &self.shared.plan;
        if plan.device.is_none() || plan.own_gpu().is_none() {
            return Some((self.next_piece, None, false));
        }
        if plan.operation == Operation::Read {
            return Some((self.next_piece, None, true));
        }
        let packed = self.packed.as_mut()?;
        let ready = packed.ready.pop_front();
        packed.queued = !packed.ready.is_empty();
        ready.map(|(piece, block)| (piece, Some(block), false))
    }

    /// Whether it is not a WRITE whose next piece is on its way into a block.
    #[inline]
    pub(super) fn has_next_payload(&self) -> bool {
        self.packed.is_none() || self.is_next_packed()
    }

    /// Whether a further piece is in a block.
    pub(super) fn is_next_packed(&self) -> bool {
        self.packed.as_ref().is_some_and(|packed| !packed.ready.is_empty())
    }

    pub(super) fn is_packed(&self) -> bool {
        self.packed.is_some()
    }
}

impl Core {
    /// Puts a transfer of GPU memory where it goes as frames.
    pub(super) fn enqueue_staged(&mut self, key: ActiveKey) {
        let Some(active) = self.live_mut(key) else { return };
        let plan = active.plan().clone();
        if plan.operation == Operation::Write && plan.own_gpu().is_some() {
            if active.packed.is_none() {
                active.packed = Some(Box::default());
                let queue = usize::from(plan.class == Class::Bulk);
                self.writes_to_pack.queues[queue].push_back(ToPack::Write(key));
                return;
            }
            let is_next_there = active.is_next_packed();
            if let Some(packed) = &mut active.packed {
                packed.queued = is_next_there;
            }
            if !is_next_there {
                return;
            }
        }
        self.enqueue_for_a_link(key, plan.class);
    }

    fn enqueue_for_a_link(&mut self, key: ActiveKey, class: Class) {
        let queue = if class == Class::Latency { &mut self.latency } else { &mut self.bulk };
        if !queue.contains(&key) {
            queue.push_back(key);
        }
        self.want_bulk();
    }

    /// An answer whose bytes are in memory of a GPU.
    pub(super) fn pack_reply(
        &mut self,
        to: LinkId,
        header: Header,
        segments: Segments,
        uses: RegionUses,
    ) {
        if let Some(link) = self.link(to) {
            link.packing += 1;
        }
        let queue = usize::from(header.len > SMALL_BYTES);
        let reply = ToPack::Reply { link: to, header, segments, uses };
        self.replies_to_pack.queues[queue].push_back(reply);
    }

    /// Whether something is to be packed.
    #[inline]
    pub(crate) fn has_packs(&self) -> bool {
        self.replies_to_pack.has_some() || self.writes_to_pack.has_some()
    }

    fn packs(&mut self, kind: PackKind) -> &mut Packs {
        match kind {
            PackKind::Reply => &mut self.replies_to_pack,
            PackKind::Write => &mut self.writes_to_pack,
        }
    }

    /// The length of what is to be packed next, if its blocks are not used up. Small ones go first.
    pub(crate) fn next_pack_len(&mut self, kind: PackKind) -> Option<usize> {
        let queue = self.pack_queue(kind)?;
        let front = match kind {
            PackKind::Reply => self.replies_to_pack.queues[queue].front()?,
            PackKind::Write => self.writes_to_pack.queues[queue].front()?,
        };
        Some(match front {
            ToPack::Reply { header, .. } => header.len as usize,
            ToPack::Write(key) => {
                let active = self.live(*key)?;
                let next = active.packed.as_ref()?.next as usize;
                active.plan().pieces.get(next)?.header.len as usize
            }
        })
    }

    fn pack_queue(&mut self, kind: PackKind) -> Option<usize> {
        for (queue, room) in [MAX_PACKED + MORE_FOR_SMALL, MAX_PACKED].into_iter().enumerate() {
            while let Some(ToPack::Write(key)) = self.packs(kind).queues[queue].front() {
                let key = *key;
                if self.live(key).is_some_and(Active::is_packed) {
                    break;
                }
                self.packs(kind).queues[queue].pop_front();
            }
            let packs = self.packs(kind);
            if !packs.queues[queue].is_empty() && packs.held < room {
                return Some(queue);
            }
        }
        None
    }

    /// What the driver is to pack now.
    pub(crate) fn next_pack(&mut self, kind: PackKind) -> Option<PackJob> {
        let queue = self.pack_queue(kind)?;
        let job = match self.packs(kind).queues[queue].pop_front()? {
            ToPack::Reply { link, header, segments, uses } => {
                PackJob::Reply { link, header, segments, uses }
            }
            ToPack::Write(key) => {
                let active = self.live_mut(key)?;
                active.unsent += 1;
                let plan = active.plan().clone();
                let packed = active.packed.as_mut()?;
                let piece = packed.next;
                packed.next += 1;
                if (packed.next as usize) < plan.pieces.len() {
                    self.packs(kind).queues[queue].push_back(ToPack::Write(key));
                }
                PackJob::Write { key: LandingKey(key), plan, piece }
            }
        };
        self.packs(kind).held += 1;
        Some(job)
    }

    /// The GPU is done with a job, or never began it.
    pub(crate) fn packed(
        &mut self,
        job: PackJob,
        outcome: Result<Block, Error>,
        env: &mut Env<'_>,
    ) {
        match job {
            PackJob::Reply { link, header, segments, uses } => {
                env.regions.recycle(segments);
                env.regions.release(uses);
                let reply = outcome.map_or_else(
                    |_| {
                        let status = ServeStatus::Fault as u16;
                        Reply::Status(Header {
                            id: header.id,
                            status,
                            ..Header::new(FrameKind::Status)
                        })
                    },
                    |block| Reply::Packed { header, block },
                );
                let is_packed = matches!(reply, Reply::Packed { .. });
                let link: Option<&mut CoreLink> = self.link(link);
                let sent = link.is_some() && is_packed;
                if let Some(link) = link {
                    link.packing -= 1;
                    link.replies.push_back(reply);
                }
                self.replies_to_pack.held -= usize::from(!sent);
            }
            PackJob::Write { key: LandingKey(key), piece, .. } => {
                let live = self.live(key).is_some();
                match outcome {
                    Ok(block) if live => self.piece_packed(key, piece, block),
                    Ok(_) => self.writes_to_pack.held -= 1,
                    Err(error) => {
                        self.writes_to_pack.held -= 1;
                        if live {
                            self.fail(key.slot, error, env);
                        }
                    }
                }
                self.untouched(key, env);
            }
        }
    }

    fn piece_packed(&mut self, key: ActiveKey, piece: u32, block: Block) {
        let Some(active) = self.live_mut(key) else { return };
        let class = active.plan().class;
        if let Some(packed) = &mut active.packed {
            packed.ready.push_back((piece, block));
            if std::mem::replace(&mut packed.queued, true) {
                return;
            }
        }
        self.enqueue_for_a_link(key, class);
    }

    /// A copy between a transfer's memory and a block has ended.
    fn untouched(&mut self, key: ActiveKey, env: &mut Env<'_>) {
        let Some(active) = self.active_mut(key) else { return };
        active.unsent = active.unsent.saturating_sub(1);
        if active.may_end() {
            self.finish(key.slot, env);
        }
    }

    /// The answer to a READ is in a block: where its bytes belong, as long as its transfer wants them. Then `landed` is called with
    /// the key.
    pub(crate) fn begin_landing(&mut self, id: u64) -> Option<(LandingKey, Arc<PlanInner>, u32)> {
        let (key, piece) = self
            .request(id)
            .filter(|request| !request.is_orphan())
            .map(|request| request.place())?;
        let active = self.live_mut(key)?;
        active.unsent += 1;
        Some((LandingKey(key), active.plan().clone(), piece))
    }

    /// A payload has landed, or will not.
    ///
    /// # Errors
    /// The peer broke the protocol: close the link.
    pub(crate) fn landed(
        &mut self,
        link: LinkId,
        landing: Landing,
        key: Option<LandingKey>,
        outcome: Result<(), Error>,
        env: &mut Env<'_>,
    ) -> Result<(), ProtocolError> {
        if let Some(LandingKey(key)) = key {
            self.untouched(key, env);
        }
        match landing {
            Landing::Request(id) => {
                let open = self.link(link).is_some_and(|link| !link.closing);
                if open && self.request(id).is_some() {
                    self.answered(id, outcome.err(), env);
                }
                Ok(())
            }
            Landing::Region { segments, write } => {
                let fault = outcome.err().map(|_| 0);
                self.on_payload(link, Dest::Region { segments, write }, fault, env)
            }
        }
    }

    /// A link is gone: what was to be packed for it is not.
    pub(super) fn forget_packs_of(&mut self, gone: LinkId, env: &mut Env<'_>) {
        for queue in &mut self.replies_to_pack.queues {
            for one in std::mem::take(queue) {
                match one {
                    ToPack::Reply { link, uses, .. } if link == gone => env.regions.release(uses),
                    other => queue.push_back(other),
                }
            }
        }
    }

    /// All transfers end.
    pub(super) fn forget_writes_to_pack(&mut self) {
        self.writes_to_pack.queues.iter_mut().for_each(VecDeque::clear);
    }
}
