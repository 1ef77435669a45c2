//! Transfers that GPUs copy: started here, watched every turn, ended when the GPU has said so.
//!
//! Such a transfer is one part of a copy job. It is claimed here and finished here, so that whoever cancels it or loses its
//! link waits for the GPU as for a thread in the middle of a copy.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use corelane_runtime::Cx;
use smallvec::SmallVec;

use super::lane::LaneDriver;
use super::staging::Staging;
use crate::config::GpuConfig;
use crate::error::Error;
use crate::gpu::{Flight, GpuError, LaneGpu};
use crate::memory::LaneRegions;
use crate::plan::Class;
use crate::transfer::{TransferShared, gpu_failed as failed};
use crate::transport::local::{CopyError, OwnedUse};

/// Copies of GPUs to and from one peer at the same time: half of the places that it has for copies. Threads that copy host
/// memory wait for a place, and this lane may be one of them, on whom the others here depend.
const AT_ONCE: usize = 16;
/// How often one turn looks whether a copy has ended: for a microsecond, which is about what the rest of a turn takes.
const LOOKS: usize = 16;
/// How long a lane that ends, or leaves a peer for good, waits for GPUs.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// A transfer that a GPU is copying.
struct Flying {
    transfer: Arc<TransferShared>,
    flight: Flight,
    /// The peer keeps its memory until this is dropped.
    in_use: OwnedUse,
}

/// What one lane has on GPUs.
pub(super) struct GpuCopies {
    pub(super) lane: LaneGpu,
    /// What goes over sockets.
    pub(super) staging: Staging,
    /// Claimed, and not started: a GPU or the peer's places for copies are full.
    waiting: VecDeque<Arc<TransferShared>>,
    flying: Vec<Flying>,
}

impl GpuCopies {
    pub(super) fn new(config: &GpuConfig) -> Self {
        Self {
            lane: LaneGpu::default(),
            staging: Staging::new(config),
            waiting: VecDeque::new(),
            flying: Vec::new(),
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.flying.is_empty() && self.staging.is_idle()
    }
}

enum Started {
    Yes,
    /// Not now.
    Full,
    Failed(Error),
}

impl LaneDriver {
    /// Takes a transfer up, whose job is open.
    pub(super) fn copy_on_gpu(&mut self, transfer: Arc<TransferShared>, cx: &mut Cx<'_>) {
        if transfer.copy.claim(1).is_none() {
            // It was ended before.
            return self.copied(&transfer, cx);
        }
        // Behind those of its own peer only.
        if self.gpu.waiting.iter().any(|waiting| is_of_same_peer(waiting, &transfer)) {
            return self.gpu.waiting.push_back(transfer);
        }
        self.try_start(transfer, cx);
    }

    /// False: it was put at the end of those that wait.
    fn try_start(&mut self, transfer: Arc<TransferShared>, cx: &mut Cx<'_>) -> bool {
        match self.gpu.start(&transfer) {
            Started::Yes => true,
            Started::Full => {
                self.gpu.waiting.push_back(transfer);
                false
            }
            Started::Failed(error) => {
                transfer.copy.finish(Err(error), 1);
                self.copied(&transfer, cx);
                true
            }
        }
    }

    /// Looks at what is under way; true: something has ended.
    pub(super) fn poll_gpu(&mut self, cx: &mut Cx<'_>) -> bool {
        // Once: the lane has the wire to look after meanwhile.
        let moved = self.look_at_staging(cx);
        if self.gpu.flying.is_empty() && self.gpu.waiting.is_empty() {
            return moved;
        }
        let ended = (0..LOOKS).any(|look| {
            if look > 0 {
                std::hint::spin_loop();
            }
            self.look_at_gpu(look == 0, cx)
        });
        self.start_waiting(cx) || ended || moved
    }

    /// Of the copies whose ranges are being given to the driver one at most is given more, and only with `give`: thirty-two
    /// calls take some 70 us, which is what a turn may do of this.
    fn look_at_gpu(&mut self, mut give: bool, cx: &mut Cx<'_>) -> bool {
        let mut worked = false;
        let mut at = 0;
        while at < self.gpu.flying.len() {
            match self.gpu.poll(at, &mut give) {
                Some(transfer) => {
                    worked = true;
                    self.copied(&transfer, cx);
                }
                None => at += 1,
            }
        }
        worked
    }

    /// Tries each that waits, but none behind another of its peer's that has to wait on: they keep their order, and no peer
    /// waits for another. One that was ended meanwhile needs no room.
    fn start_waiting(&mut self, cx: &mut Cx<'_>) -> bool {
        let mut started = false;
        let mut full: SmallVec<[Arc<TransferShared>; 4]> = SmallVec::new();
        for _ in 0..self.gpu.waiting.len() {
            let Some(transfer) = self.gpu.waiting.pop_front() else { break };
            let must_wait = full.iter().any(|other| is_of_same_peer(other, &transfer));
            if must_wait && !transfer.copy.is_closed() {
                self.gpu.waiting.push_back(transfer);
            } else if self.try_start(transfer.clone(), cx) {
                started = true;
            } else {
                full.push(transfer);
            }
        }
        started
    }
}

fn is_of_same_peer(one: &TransferShared, other: &TransferShared) -> bool {
    Arc::ptr_eq(&one.plan.peer, &other.plan.peer)
}

impl LaneDriver {
    /// A peer is about to be forgotten: waits until no GPU copies anything for its transfers. What a GPU does not end is
    /// abandoned.
    pub(super) fn settle_gpu_of(&mut self, slot: usize, cx: &mut Cx<'_>) {
        self.settle_or_abandon_issued_of(slot, PATIENCE, cx);
        let Some(peer) = self.peers.get(slot).map(|peer| peer.core.peer.clone()) else { return };
        let is_of = |transfer: &TransferShared| Arc::ptr_eq(&transfer.plan.peer, &peer);
        let patience = Instant::now() + PATIENCE;
        let is_busy = |driver: &Self| {
            driver.gpu.transfers().any(is_of) || driver.gpu.staging.is_busy_with(slot)
        };
        while is_busy(self) {
            if Instant::now() >= patience {
                self.gpu.abandon(is_of);
                return self.abandon_moves_of(slot, cx);
            }
            if !self.poll_gpu(cx) {
                std::hint::spin_loop();
            }
        }
    }
}

impl GpuCopies {
    fn transfers(&self) -> impl Iterator<Item = &TransferShared> {
        let flying = self.flying.iter().map(|flying| &*flying.transfer);
        flying.chain(self.waiting.iter().map(|transfer| &**transfer))
    }

    fn start(&mut self, transfer: &Arc<TransferShared>) -> Started {
        let plan = &transfer.plan;
        let failed = |error| Started::Failed(failed(plan, error));
        if transfer.copy.is_closed() {
            return Started::Failed(Error::Cancelled);
        }
        let Some(path) = transfer.copy.path() else { return Started::Failed(Error::Cancelled) };
        let Some(on_device) = plan.on_device() else {
            return Started::Failed(Error::Backend("a plan for no GPU was given to one".into()));
        };
        let of_peer = |flying: &&Flying| Arc::ptr_eq(&flying.transfer.plan.peer, &plan.peer);
        if self.flying.iter().filter(of_peer).count() >= AT_ONCE {
            return Started::Full;
        }
        let in_use = match path.begin_on_device(plan) {
            Ok(in_use) => in_use,
            Err(CopyError::Busy) => return Started::Full,
            Err(CopyError::Failed(error)) => return Started::Failed(error),
        };
        // Last, since it asks the driver.
        let freed = plan.freed_region();
        if freed.is_some() || !on_device.is_live() {
            // The driver of a lost GPU knows no memory of it.
            if let Err(error) = on_device.device().check_alive() {
                return failed(error);
            }
            return match freed {
                Some(region) => {
                    Started::Failed(Error::Fault { addr: region.descriptor.base() })
                }
                None => failed(GpuError(
                    "pinned host memory, or the peer's GPU memory in this process, is not what it was when the \
                     transfer was prepared: it was freed"
                        .into(),
                )),
            };
        }
        let launch = on_device.launch(plan.class == Class::Bulk);
        // SAFETY: the plan's own regions are counted as used by this lane until the transfer ends, which waits for the
        // claimed part of its job; the peer's rights were just checked, and it keeps the memory while `in_use` is there.
        match unsafe { self.lane.launch(&launch) } {
            Ok(Some(flight)) => {
                self.flying.push(Flying { transfer: transfer.clone(), flight, in_use });
                Started::Yes
            }
            Ok(None) => Started::Full,
            Err(error) => failed(error),
        }
    }

    /// The transfer in this place, if its copy has ended; it is taken out, and its part counted. A copy of which the driver
    /// has not been given everything is given more if it may be, and none is afterwards.
    fn poll(&mut self, at: usize, give: &mut bool) -> Option<Arc<TransferShared>> {
        let Flying { transfer, flight, .. } = &mut self.flying[at];
        let plan = &transfer.plan;
        let go_on = flight.wants_more() && !transfer.copy.is_closed();
        if go_on && !std::mem::take(give) {
            return None;
        }
        let rest = plan.on_device().filter(|_| go_on);
        let rest = rest.map(|device| device.launch(plan.class == Class::Bulk));
        let ended = self.lane.poll(flight, rest.as_ref())?;
        let outcome = ended.map_err(|error| failed(plan, error));
        let Flying { transfer, .. } = self.flying.swap_remove(at);
        transfer.copy.finish(outcome, 1);
        Some(transfer)
    }

    /// Transfers are about to end whose copies the GPU does not end. Whatever these touch stays for ever: the regions are
    /// never quiet, the peer is never told that its memory is left alone, list and mappings of the plan are kept.
    fn abandon(&mut self, is_concerned: impl Fn(&TransferShared) -> bool) {
        self.waiting.retain(|transfer| {
            let concerned = is_concerned(transfer);
            if concerned {
                transfer.copy.finish(Err(Error::Cancelled), 1);
            }
            !concerned
        });
        let given_up = self.flying.extract_if(.., |flying| is_concerned(&flying.transfer));
        for flying in given_up {
            let Flying { transfer, flight, in_use } = flying;
            let error = self.lane.give_up(&flight);
            transfer.plan.regions.iter().for_each(|region| region.abandon());
            std::mem::forget(in_use);
            std::mem::forget(transfer.plan.clone());
            transfer.copy.finish(Err(failed(&transfer.plan, error)), 1);
        }
    }

    /// Waits until no GPU copies anything for a lane that ends: its transfers are about to end, and nothing may touch
    /// their memory afterwards. Some 100 us, as a rule; what a GPU does not end is abandoned.
    pub(super) fn settle(&mut self, regions: &LaneRegions) {
        for transfer in self.waiting.drain(..) {
            transfer.copy.finish(Err(Error::Cancelled), 1);
        }
        let patience = Instant::now() + PATIENCE;
        self.staging.settle(&mut self.lane, regions, patience);
        while !self.flying.is_empty() {
            if Instant::now() >= patience {
                return self.abandon(|_| true);
            }
            let mut at = 0;
            while at < self.flying.len() {
                if self.poll(at, &mut true).is_none() {
                    at += 1;
                }
            }
            std::hint::spin_loop();
        }
    }
}
