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
/// So many small ones go before a large one that waits, at most.
const MAX_PASSED: usize = 16;

/// Which of the two queues something waits in, and whose blocks it counts among.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PackSize {
    Small,
    Large,
}

impl PackSize {
    pub(super) fn of_reply(header: &Header) -> Self {
        if header.len > SMALL_BYTES { Self::Large } else { Self::Small }
    }

    pub(super) fn of_write(plan: &PlanInner) -> Self {
        match plan.class {
            Class::Latency => Self::Small,
            Class::Bulk => Self::Large,
        }
    }
}

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
    /// By size.
    queues: [VecDeque<ToPack>; 2],
    /// Blocks that its frames hold, or are about to, by size.
    held: [usize; 2],
    /// Small payloads that went before the first of the large ones.
    passed: usize,
}

/// What to pack next.
#[must_use]
pub(crate) enum NextPack<B> {
    Job(PackJob, B),
    /// There is no block for it.
    Hungry,
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

    fn push(&mut self, size: PackSize, what: ToPack) {
        self.queues[size as usize].push_back(what);
    }

    /// The sizes of which something may be packed now, in the order in which to look for a block. Small ones go first, but for a
    /// large one that enough of them have passed: it is next, and until it has found a block they take no more than one, so that
    /// they do not take every block that becomes free.
    fn order(&self) -> [Option<PackSize>; 2] {
        let [small, large] = self.queues.each_ref().map(|queue| !queue.is_empty());
        let [held_small, held_large] = self.held;
        let all = held_small + held_large;
        let room_for_small = all < MAX_PACKED + MORE_FOR_SMALL;
        let is_due = large && self.passed >= MAX_PASSED && held_large < MAX_PACKED;
        if is_due {
            let may_large = room_for_small.then_some(PackSize::Large);
            [may_large, (small && held_small == 0 && room_for_small).then_some(PackSize::Small)]
        } else {
            let may_small = (small && room_for_small).then_some(PackSize::Small);
            [may_small, (large && all < MAX_PACKED).then_some(PackSize::Large)]
        }
    }

    /// Takes out what is first of a size; it is about to hold a block.
    fn pop(&mut self, size: PackSize) -> Option<ToPack> {
        let what = self.queues[size as usize].pop_front()?;
        self.held[size as usize] += 1;
        let passes = size == PackSize::Small && !self.queues[PackSize::Large as usize].is_empty();
        self.passed = if passes { self.passed + 1 } else { 0 };
        Some(what)
    }

    /// A block is free again.
    pub(super) fn release(&mut self, size: PackSize) {
        self.release_all(size, 1);
    }

    pub(super) fn release_all(&mut self, size: PackSize, count: usize) {
        let held = &mut self.held[size as usize];
        debug_assert!(*held >= count);
        *held = held.saturating_sub(count);
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
    pub(super) fn packed(
        header: &Header,
        block: Block,
        size: PackSize,
        write: Option<u64>,
    ) -> Self {
        let payload = TxPayload::Served(smallvec::smallvec![block.segment(header.len as usize)]);
        Self { payload, sent: Sent::Packed { block, size, write }, ..Self::header(header) }
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
                self.writes_to_pack.push(PackSize::of_write(&plan), ToPack::Write(key));
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
        let size = PackSize::of_reply(&header);
        let reply = ToPack::Reply { link: to, header, segments, uses };
        self.replies_to_pack.push(size, reply);
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

    /// The length of what is first of a size.
    fn pack_len(&mut self, kind: PackKind, size: PackSize) -> Option<usize> {
        Some(match self.packs(kind).queues[size as usize].front()? {
            ToPack::Reply { header, .. } => header.len as usize,
            ToPack::Write(key) => {
                let key = *key;
                let active = self.live(key)?;
                let next = active.packed.as_ref()?.next as usize;
                active.plan().pieces.get(next)?.header.len as usize
            }
        })
    }

    /// Forgets WRITEs that have ended.
    fn skip_ended_packs(&mut self, kind: PackKind) {
        for queue in 0..2 {
            while let Some(ToPack::Write(key)) = self.packs(kind).queues[queue].front() {
                let key = *key;
                if self.live(key).is_some_and(Active::is_packed) {
                    break;
                }
                self.packs(kind).queues[queue].pop_front();
            }
        }
    }

    /// What the driver is to pack now, in a block of this length that `take` gives, `None`: it has none.
    pub(crate) fn next_pack<B, E>(
        &mut self,
        kind: PackKind,
        mut take: impl FnMut(usize) -> Result<Option<B>, E>,
    ) -> Option<NextPack<Result<B, E>>> {
        self.skip_ended_packs(kind);
        let mut is_hungry = false;
        for size in self.packs(kind).order().into_iter().flatten() {
            let Some(len) = self.pack_len(kind, size) else { continue };
            match take(len).transpose() {
                Some(block) => return Some(NextPack::Job(self.take_pack(kind, size)?, block)),
                None => is_hungry = true,
            }
        }
        is_hungry.then_some(NextPack::Hungry)
    }

    fn take_pack(&mut self, kind: PackKind, size: PackSize) -> Option<PackJob> {
        Some(match self.packs(kind).pop(size)? {
            ToPack::Reply { link, header, segments, uses } => {
                PackJob::Reply { link, header, segments, uses }
            }
            ToPack::Write(key) => {
                let Some((plan, piece)) = self.next_piece_to_pack(key) else {
                    self.packs(kind).release(size);
                    return None;
                };
                if (piece as usize + 1) < plan.pieces.len() {
                    self.packs(kind).push(size, ToPack::Write(key));
                }
                PackJob::Write { key: LandingKey(key), plan, piece }
            }
        })
    }

    fn next_piece_to_pack(&mut self, key: ActiveKey) -> Option<(Arc<PlanInner>, u32)> {
        let active = self.live_mut(key)?;
        let plan = active.plan().clone();
        let packed = active.packed.as_mut()?;
        let piece = packed.next;
        packed.next += 1;
        active.unsent += 1;
        Some((plan, piece))
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
                let size = PackSize::of_reply(&header);
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
                if !sent {
                    self.replies_to_pack.release(size);
                }
            }
            PackJob::Write { key: LandingKey(key), plan, piece } => {
                let live = self.live(key).is_some();
                let size = PackSize::of_write(&plan);
                match outcome {
                    Ok(block) if live => self.piece_packed(key, piece, block),
                    Ok(_) => self.writes_to_pack.release(size),
                    Err(error) => {
                        self.writes_to_pack.release(size);
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

#[cfg(test)]
mod tests {
    use super::*;

    impl Packs {
        fn add(&mut self, size: PackSize) {
            let len = if size == PackSize::Small { SMALL_BYTES } else { SMALL_BYTES + 1 };
            let header = Header { len, ..Header::new(FrameKind::Data) };
            let (segments, uses) = (Segments::new(), RegionUses::new());
            self.push(
                PackSize::of_reply(&header),
                ToPack::Reply { link: 0, header, segments, uses },
            );
        }

        /// Takes the first for which there is a block; large ones leave some of `free`.
        fn take(&mut self, free: usize) -> Option<PackSize> {
            let kept = |size| if size == PackSize::Small { 0 } else { 2 };
            let size = self.order().into_iter().flatten().find(|size| free > kept(*size))?;
            self.pop(size).map(|_| size)
        }
    }

    const BLOCKS: usize = 4;

    /// Small ones without end, each of which gives its block back after the next was begun.
    fn with_small_ones_without_end(blocks: usize) -> usize {
        let mut packs = Packs::default();
        let mut held = VecDeque::new();
        (0..3).for_each(|_| packs.add(PackSize::Large));
        let mut large = 0;
        for _ in 0..200 {
            (0..2).for_each(|_| packs.add(PackSize::Small));
            while let Some(size) = packs.take(blocks - held.len()) {
                large += usize::from(size == PackSize::Large);
                held.push_back(size);
            }
            if let Some(size) = held.pop_front() {
                packs.release(size);
            }
        }
        large
    }

    #[test]
    fn small_payloads_without_end_do_not_keep_large_ones_out() {
        for blocks in [BLOCKS, MAX_PACKED + MORE_FOR_SMALL, 1000] {
            assert_eq!(with_small_ones_without_end(blocks), 3, "{blocks} blocks");
        }
    }

    #[test]
    fn so_many_small_ones_go_before_each_large_one() {
        let mut packs = Packs::default();
        (0..100).for_each(|_| packs.add(PackSize::Small));
        (0..2).for_each(|_| packs.add(PackSize::Large));
        for _ in 0..2 {
            for _ in 0..MAX_PASSED {
                assert_eq!(packs.take(1000), Some(PackSize::Small));
                packs.release(PackSize::Small);
            }
            assert_eq!(packs.take(1000), Some(PackSize::Large));
        }
        // Those that come when nothing large waits count for nothing.
        while packs.take(1000).is_some() {
            packs.release(PackSize::Small);
        }
        packs.add(PackSize::Large);
        packs.add(PackSize::Small);
        assert_eq!(packs.take(1000), Some(PackSize::Small));
    }

    #[test]
    fn large_ones_that_nobody_reads_leave_room_for_small_ones() {
        let mut packs = Packs::default();
        (0..100).for_each(|_| packs.add(PackSize::Large));
        while packs.take(1000).is_some() {}
        assert_eq!(packs.held, [0, MAX_PACKED]);
        for _ in 0..10 * MAX_PASSED {
            packs.add(PackSize::Small);
            assert_eq!(packs.take(1000), Some(PackSize::Small), "at once, however often");
            packs.release(PackSize::Small);
        }
        assert_eq!(packs.held, [0, MAX_PACKED]);
    }

    #[test]
    fn while_others_hold_the_blocks_small_ones_go_one_by_one() {
        let mut packs = Packs { passed: MAX_PASSED, ..Packs::default() };
        packs.add(PackSize::Large);
        (0..2).for_each(|_| packs.add(PackSize::Small));
        assert_eq!(packs.take(2), Some(PackSize::Small));
        assert_eq!(packs.take(1), None, "the large one is next");
        packs.release(PackSize::Small);
        assert_eq!(packs.take(2), Some(PackSize::Small));
        packs.release(PackSize::Small);
        assert_eq!(packs.take(3), Some(PackSize::Large));
    }
}
