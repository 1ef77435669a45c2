//! GPU memory over sockets: copies between it and blocks of pinned memory, while the wire moves other blocks.
//!
//! The session's core says what is to be packed, and takes what has landed. Everything here is started and watched by the lane's
//! turns; nothing waits. A copy that was started keeps its block and the regions that it touches until the GPU has ended it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use corelane_runtime::{Cx, Readiness};

use super::lane::{LaneDriver, env};
use super::links::Phase;
use crate::config::GpuConfig;
use crate::error::Error;
use crate::gpu::{Block, Bounce, Device, Flight, GpuError, LaneGpu};
use crate::memory::{LaneRegions, RegionInner};
use crate::plan::PlanInner;
use crate::session::{Landing, LandingKey, LinkId, NextPack, PackJob, PackKind};
use crate::sys::IoSegment;
use crate::transport::link::Arrived;

/// How long links wait for blocks that others have not filled: none of a peer that has stopped may hold up all.
const YIELD_AFTER: Duration = Duration::from_millis(50);

/// A copy between a block and a GPU's memory.
struct Move {
    slot: usize,
    device: &'static Device,
    block: Block,
    what: What,
}

enum What {
    Pack(PackJob),
    Land {
        link: LinkId,
        landing: Landing,
        /// Of a READ of ours.
        own: Option<(LandingKey, Arc<PlanInner>, u32)>,
    },
}

impl What {
    /// Whether the block is filled.
    fn is_out(&self) -> bool {
        matches!(self, Self::Pack(_))
    }

    fn ranges(&self) -> &[IoSegment] {
        match self {
            Self::Pack(job) => job.segments(),
            Self::Land { own: Some((_, plan, piece)), .. } => plan.local(*piece),
            Self::Land { landing: Landing::Region { segments, .. }, .. } => segments,
            Self::Land { landing: Landing::Request(_), .. } => &[],
        }
    }

    /// Passes the regions that it touches to `look`.
    fn each_region(&self, regions: &LaneRegions, look: impl FnMut(&RegionInner)) {
        let uses = match self {
            Self::Pack(PackJob::Write { plan, .. })
            | Self::Land { own: Some((_, plan, _)), .. } => {
                return plan.regions.iter().map(|region| &**region).for_each(look);
            }
            Self::Pack(PackJob::Reply { uses, .. }) => uses,
            Self::Land { landing: Landing::Region { write, .. }, .. } => write.uses(),
            Self::Land { landing: Landing::Request(_), .. } => return,
        };
        regions.used(uses).for_each(look);
    }

    /// The GPU that makes the copy; the memory still is what was registered. A kernel that touches memory which is gone takes the
    /// model's context down.
    fn check(&self, regions: &LaneRegions) -> Result<&'static Device, Error> {
        let (mut device, mut freed) = (None, None);
        self.each_region(regions, |region| {
            if let Some(allocation) = region.gpu() {
                device.get_or_insert(allocation.device());
                if !allocation.is_live() {
                    freed.get_or_insert(region.descriptor.base());
                }
            }
        });
        match (device, freed) {
            // The driver of a lost GPU knows no memory of it.
            (Some(device), Some(addr)) => {
                Err(device.check_alive().map_or_else(failed, |()| Error::Fault { addr }))
            }
            (None, Some(addr)) => Err(Error::Fault { addr }),
            (Some(device), None) => Ok(device),
            (None, None) => Err(failed(GpuError("this is no memory of a GPU".into()))),
        }
    }
}

/// What one lane has on its way between GPUs and sockets.
pub(super) struct Staging {
    /// For answers, and for WRITEs; what is received has its own.
    bounces: [Bounce; 2],
    multiprocessors: u32,
    moving: Vec<(Move, Flight)>,
    /// Not started: the GPU has enough to do.
    waiting: VecDeque<Move>,
    /// Peers that have something to pack and found no block.
    hungry: Vec<usize>,
    /// Links that cannot receive without one, and since when there always were some.
    starved: Vec<LinkId>,
    starved_since: Option<Instant>,
}

impl Staging {
    pub(super) fn new(config: &GpuConfig) -> Self {
        Self {
            bounces: PackKind::ALL.map(|_| Bounce::new(config.staging_bytes / 4)),
            multiprocessors: config.multiprocessors,
            moving: Vec::new(),
            waiting: VecDeque::new(),
            hungry: Vec::new(),
            starved: Vec::new(),
            starved_since: None,
        }
    }

    pub(super) fn bounces_mut(&mut self) -> &mut [Bounce] {
        &mut self.bounces
    }

    pub(super) fn is_idle(&self) -> bool {
        self.moving.is_empty()
            && self.waiting.is_empty()
            && self.hungry.is_empty()
            && self.starved.is_empty()
    }

    /// Whether a copy for this peer is on its way.
    pub(super) fn is_busy_with(&self, slot: usize) -> bool {
        let moving = self.moving.iter().map(|(one, _)| one);
        moving.chain(&self.waiting).any(|one| one.slot == slot)
    }

    /// Starts a copy, or lets it wait. The answer is one that cannot be, and why.
    fn start(&mut self, lane: &mut LaneGpu, mut one: Move) -> Option<(Move, Error)> {
        // SAFETY: the block is the move's; the ranges are of regions that are counted as used until the move has ended: by the
        // transfer, which waits for its key, or by the peer's request.
        let started = unsafe {
            let (ranges, out) = (one.what.ranges(), one.what.is_out());
            one.block.copy(lane, one.device, ranges, out, self.multiprocessors)
        };
        match started {
            Ok(Some(flight)) => self.moving.push((one, flight)),
            Ok(None) => self.waiting.push_back(one),
            Err(error) => return Some((one, failed(error))),
        }
        None
    }

    /// A lane ends: waits until no GPU touches a block or a region. What a GPU does not end is abandoned.
    pub(super) fn settle(&mut self, lane: &mut LaneGpu, regions: &LaneRegions, patience: Instant) {
        self.waiting.clear();
        while !self.moving.is_empty() && Instant::now() < patience {
            self.moving.retain_mut(|(_, flight)| lane.poll(flight, None).is_none());
            std::hint::spin_loop();
        }
        self.abandon(lane, regions, |_| true);
    }

    /// What a GPU does not let go of is never used again: block and regions stay as they are.
    fn abandon(
        &mut self,
        lane: &LaneGpu,
        regions: &LaneRegions,
        is_concerned: impl Fn(&Move) -> bool,
    ) {
        for (one, flight) in self.moving.extract_if(.., |(one, _)| is_concerned(one)) {
            one.what.each_region(regions, RegionInner::abandon);
            let error = lane.give_up(&flight);
            tracing::error!(%error, "a block of pinned memory is given up");
            std::mem::forget(one);
        }
    }
}

fn failed(error: GpuError) -> Error {
    Error::Gpu { what: "copying between a GPU and pinned host memory".into(), reason: error.0 }
}

impl LaneDriver {
    /// Blocks may be pinned in the context of this GPU.
    pub(super) fn know_for_staging(&mut self, device: &'static Device) {
        let staging = &mut self.gpu.staging;
        for bounce in staging.bounces.iter_mut().chain([&mut self.scratch.arrivals.bounce]) {
            bounce.know(device);
        }
    }

    /// Starts to bring into blocks what a peer's frames are to carry.
    pub(super) fn pack(&mut self, slot: usize, cx: &mut Cx<'_>) {
        if self.peers.get(slot).is_some_and(|peer| peer.core.has_packs()) {
            for kind in PackKind::ALL {
                self.pack_kind(slot, kind, cx);
            }
        }
    }

    fn pack_kind(&mut self, slot: usize, kind: PackKind, cx: &mut Cx<'_>) {
        while let Some(peer) = self.peers.get_mut(slot) {
            let bounce = &mut self.gpu.staging.bounces[kind as usize];
            let Some(next) = peer.core.next_pack(kind, |len| bounce.take(len)) else { return };
            let NextPack::Job(job, block) = next else {
                if !self.gpu.staging.hungry.contains(&slot) {
                    self.gpu.staging.hungry.push(slot);
                }
                return;
            };
            match block {
                Ok(block) => self.begin_move(slot, block, What::Pack(job), cx),
                Err(error) => self.end_move(slot, What::Pack(job), Err(failed(error)), cx),
            }
        }
    }

    /// Takes what links have received for GPUs.
    pub(super) fn land(&mut self, slot: usize, cx: &mut Cx<'_>) {
        for link in self.scratch.arrivals.starved.drain(..) {
            if !self.gpu.staging.starved.contains(&link) {
                self.gpu.staging.starved.push(link);
            }
        }
        // In whatever order: what depends on them counts them.
        while let Some(arrived) = self.scratch.arrivals.landed.pop() {
            let Arrived { link, landing, block, len } = arrived;
            let own = match &landing {
                Landing::Request(id) => {
                    self.peers.get_mut(slot).and_then(|peer| peer.core.begin_landing(*id))
                }
                Landing::Region { .. } => None,
            };
            let unwanted = matches!(landing, Landing::Request(_)) && own.is_none();
            let what = What::Land { link, landing, own };
            match block {
                _ if unwanted => self.end_move(slot, what, Ok(None), cx),
                Ok(block) => {
                    debug_assert_eq!(what.ranges().iter().map(IoSegment::len).sum::<usize>(), len);
                    self.begin_move(slot, block, what, cx);
                }
                Err(error) => self.end_move(slot, what, Err(failed(error)), cx),
            }
        }
    }

    fn begin_move(&mut self, slot: usize, block: Block, what: What, cx: &mut Cx<'_>) {
        let device = match what.check(&self.regions) {
            Ok(device) => device,
            Err(error) => return self.end_move(slot, what, Err(error), cx),
        };
        let one = Move { slot, device, block, what };
        if let Some((one, error)) = self.gpu.staging.start(&mut self.gpu.lane, one) {
            self.end_move(slot, one.what, Err(error), cx);
        }
    }

    /// Tells the core of the end of a copy, or that it cannot be.
    fn end_move(
        &mut self,
        slot: usize,
        what: What,
        outcome: Result<Option<Block>, Error>,
        cx: &mut Cx<'_>,
    ) {
        if let Err(error) = &outcome {
            tracing::debug!(%error, lane = self.index, "a frame of GPU memory");
        }
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let mut env = env(&mut self.regions, &self.engine, &self.counters, cx.now());
        match what {
            What::Pack(job) => {
                let block = outcome.and_then(|block| {
                    block.ok_or_else(|| failed(GpuError("nothing was packed".into())))
                });
                peer.core.packed(job, block, &mut env);
            }
            What::Land { link, landing, own } => {
                let key = own.map(|(key, _, _)| key);
                let taken = peer.core.landed(link, landing, key, outcome.map(drop), &mut env);
                if let Err(reason) = taken {
                    self.close_link(link, &reason.to_string(), cx);
                }
            }
        }
        self.mark(slot);
    }

    /// A peer is about to be forgotten, and a GPU does not end copies for it.
    pub(super) fn abandon_moves_of(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Self { gpu, regions, .. } = self;
        gpu.staging.abandon(&gpu.lane, regions, |one| one.slot == slot);
        let waiting = &mut gpu.staging.waiting;
        let (unstarted, others): (VecDeque<Move>, _) =
            std::mem::take(waiting).into_iter().partition(|one| one.slot == slot);
        *waiting = others;
        for one in unstarted {
            self.end_move(slot, one.what, Err(Error::Cancelled), cx);
        }
    }

    /// Looks at what is on its way; true: something has ended.
    pub(super) fn look_at_staging(&mut self, cx: &mut Cx<'_>) -> bool {
        if self.gpu.staging.is_idle() {
            return false;
        }
        let mut worked = false;
        let mut at = 0;
        while at < self.gpu.staging.moving.len() {
            let flight = &mut self.gpu.staging.moving[at].1;
            let Some(ended) = self.gpu.lane.poll(flight, None) else {
                at += 1;
                continue;
            };
            worked = true;
            let (Move { slot, block, what, .. }, _) = self.gpu.staging.moving.swap_remove(at);
            self.end_move(slot, what, ended.map(|()| Some(block)).map_err(failed), cx);
        }
        for _ in 0..self.gpu.staging.waiting.len() {
            let Some(Move { slot, block, what, .. }) = self.gpu.staging.waiting.pop_front() else {
                break;
            };
            self.begin_move(slot, block, what, cx);
        }
        for slot in std::mem::take(&mut self.gpu.staging.hungry) {
            self.mark(slot);
        }
        for link in std::mem::take(&mut self.gpu.staging.starved) {
            worked |= self.on_link(link, Readiness::Hot, cx);
        }
        self.help_the_starved(cx);
        worked
    }

    /// Where links wait for blocks and others have some that they do not fill, the others give theirs back.
    fn help_the_starved(&mut self, cx: &mut Cx<'_>) {
        let staging = &mut self.gpu.staging;
        if staging.starved.is_empty() {
            staging.starved_since = None;
        } else if cx.now() - *staging.starved_since.get_or_insert(cx.now()) >= YIELD_AFTER {
            staging.starved_since = None;
            for (_, link) in &mut self.links {
                if let Phase::Open { receiver, .. } = &mut link.phase {
                    receiver.yield_block();
                }
            }
        }
    }
}
