//! Transfers of one range that a GPU copies, begun within `post`: the thread that posts gives the range to the copy engine.
//!
//! Handing over and coming back would cost such a transfer 2 us of some 8. Whoever asks how it stands sees its end, and so does
//! its lane, which looks from time to time: for those who do not ask, for the notification, and to wait with what has to wait.
//! One at a time on each GPU of an engine; further ones are the lane's, as all others are.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use corelane_runtime::TrySubmitError;
use smallvec::SmallVec;

use super::{Transfer, TransferShared};
use crate::engine::{EngineShared, Message};
use crate::error::Error;
use crate::gpu::{CallerStream, Device, GpuError};
use crate::memory::OwnedRegionCopy;
use crate::peer::PeerShared;
use crate::plan::PlanInner;
use crate::transport::local::{LocalPath, OwnedUse};

/// Longer ones are the lane's: it waits for what is under way, with all that it has, before it leaves a peer. By the slowest bus,
/// 2 ms.
const LONGEST: u64 = 128 << 20;
/// How long a thread that has begun a copy waits for it where the lane is gone that would.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the transfers of one engine and one GPU are begun.
#[derive(Debug)]
pub(crate) struct Issuer {
    device: &'static Device,
    /// One is being begun or under way, or was given up. Whoever sets it may begin one.
    taken: AtomicBool,
    place: Mutex<Place>,
}

#[derive(Debug)]
struct Place {
    stream: CallerStream,
    issued: Option<Issued>,
}

/// A copy under way.
#[derive(Debug)]
struct Issued {
    transfer: Arc<TransferShared>,
    began: Instant,
    /// The peer keeps its memory until this is dropped.
    in_use: OwnedUse,
    /// Our own stays registered.
    regions: SmallVec<[OwnedRegionCopy; 2]>,
}

/// What a look has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// None that was meant is under way.
    Nothing,
    UnderWay,
    /// It has ended, and that is told.
    Ended,
}

impl Issuer {
    /// # Errors
    /// The driver's.
    pub(crate) fn new(device: &'static Device) -> Result<Self, GpuError> {
        let place = Mutex::new(Place { stream: CallerStream::new(device)?, issued: None });
        Ok(Self { device, taken: AtomicBool::new(false), place })
    }

    pub(crate) fn is_for(&self, device: &Device) -> bool {
        self.device.ordinal() == device.ordinal()
    }

    /// Begins the copy of a transfer that was posted. False: nothing was begun, and its lane finds out why, if there is a reason.
    pub(super) fn issue(&self, transfer: &Arc<TransferShared>) -> bool {
        if transfer.plan.bytes > LONGEST || self.taken.swap(true, Ordering::AcqRel) {
            return false;
        }
        // A lane that leaves the peer takes the way away, and then looks whether the place is taken.
        fence(Ordering::SeqCst);
        // Who looks holds it for a moment.
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        let path = transfer.plan.peer.path();
        place.issued = path.as_ref().and_then(|path| place.begin(transfer, path));
        let begun = place.issued.is_some();
        if !begun {
            self.taken.store(false, Ordering::Release);
        }
        begun
    }

    /// Looks whether the copy of a transfer that is meant has ended, and ends it then. Its notification, if it has one and may be
    /// sent, is given to `tell` before; that may give it back: then it is looked at again later. Never waits.
    pub(crate) fn look(
        &self,
        engine: &EngineShared,
        is_meant: impl Fn(&TransferShared) -> bool,
        tell: impl FnOnce(&Arc<PeerShared>, Arc<[u8]>) -> Result<(), Arc<[u8]>>,
    ) -> Look {
        if !self.taken.load(Ordering::Acquire) {
            return Look::Nothing;
        }
        let mut place = match self.place.try_lock() {
            Ok(place) => place,
            // Another thread begins or ends one.
            Err(TryLockError::WouldBlock) => return Look::UnderWay,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        let Some(issued) = place.issued.as_ref().filter(|issued| is_meant(&issued.transfer)) else {
            return Look::Nothing;
        };
        let Some(ended) = place.stream.poll() else { return Look::UnderWay };
        let (transfer, plan) = (&issued.transfer, &*issued.transfer.plan);
        // With the place locked: who waits for copies to a peer before it says goodbye finds this one until then.
        if let Some(payload) = transfer.take_notification() {
            if ended.is_err() {
                plan.peer.release(1, payload.len());
            } else if let Err(payload) = tell(&plan.peer, payload) {
                *transfer.notification() = Some(payload);
                return Look::UnderWay;
            }
        }
        let Some(issued) = place.issued.take() else { return Look::Nothing };
        self.taken.store(false, Ordering::Release);
        drop(place);
        issued.end(engine, ended);
        Look::Ended
    }

    /// Looks until there is nothing to be looked for, or for too long; false.
    pub(crate) fn settle(
        &self,
        engine: &EngineShared,
        patience: Instant,
        is_meant: impl Fn(&TransferShared) -> bool,
        mut tell: impl FnMut(&Arc<PeerShared>, Arc<[u8]>) -> Result<(), Arc<[u8]>>,
    ) -> bool {
        while self.look(engine, &is_meant, &mut tell) == Look::UnderWay {
            if Instant::now() >= patience {
                return false;
            }
            std::hint::spin_loop();
        }
        true
    }

    /// As `settle`, for a lane that is gone or about to go: no notification is sent any more, and what the GPU does not end in time
    /// is given up.
    pub(crate) fn settle_or_abandon(
        &self,
        engine: &EngineShared,
        patience: Instant,
        is_meant: impl Fn(&TransferShared) -> bool,
    ) {
        let never_sent = |peer: &Arc<PeerShared>, payload: Arc<[u8]>| {
            peer.release(1, payload.len());
            Ok(())
        };
        if !self.settle(engine, patience, &is_meant, never_sent) {
            self.abandon(engine, is_meant);
        }
    }

    /// Ends a transfer that is meant though the GPU does not end its copy. What that touches stays for ever: the regions are never
    /// quiet, the peer is never told that its memory is left alone, the mappings of the plan are kept. No other is begun here.
    pub(crate) fn abandon(
        &self,
        engine: &EngineShared,
        is_meant: impl Fn(&TransferShared) -> bool,
    ) {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(issued) = place.issued.take_if(|issued| is_meant(&issued.transfer)) else {
            return;
        };
        let error = place.stream.give_up();
        drop(place);
        let Issued { transfer, began, in_use, regions } = issued;
        transfer.plan.regions.iter().for_each(|region| region.abandon());
        std::mem::forget((in_use, transfer.plan.clone()));
        if let Some(payload) = transfer.take_notification() {
            transfer.plan.peer.release(1, payload.len());
        }
        drop(regions);
        tell_end(engine, &transfer, began, Err(error));
    }
}

impl Place {
    fn begin(&mut self, transfer: &Arc<TransferShared>, path: &LocalPath) -> Option<Issued> {
        let plan = &*transfer.plan;
        let on_device = plan.on_device()?;
        let range = on_device.only_range()?;
        if path.obstacle(on_device).is_some() {
            return None;
        }
        let mut regions = SmallVec::new();
        for region in &plan.regions {
            regions.push(OwnedRegionCopy::begin(region)?);
        }
        let in_use = path.begin_on_device(plan).ok()?;
        if !plan.is_memory_live() {
            return None;
        }
        let began = Instant::now();
        // SAFETY: the plan's own regions stay registered while `regions` is there; the peer's rights were just checked, and it
        // keeps the memory while `in_use` is. Both are kept until the stream has said that the copy has ended.
        unsafe { self.stream.copy(range) }.ok()?;
        Some(Issued { transfer: transfer.clone(), began, in_use, regions })
    }
}

impl Transfer {
    /// A transfer of one range that a GPU copies is begun by this thread, and seen by its lane, too. False: the lane's as a whole.
    pub(super) fn issue(&self, issuer: &Arc<Issuer>) -> bool {
        let (shared, engine) = (&self.shared, &*self.engine);
        let home = shared.plan.peer.lane;
        let is_reached = shared.plan.peer.path().is_some();
        if !is_reached || engine.is_lane_thread() || !issuer.issue(shared) {
            return false;
        }
        if engine.hand_over(home, Message::Issued(issuer.clone())).is_err() {
            // The lane is gone, which would have waited for it.
            let is_meant = |other: &TransferShared| std::ptr::eq(other, Arc::as_ptr(shared));
            let patience = Instant::now() + PATIENCE;
            issuer.settle_or_abandon(engine, patience, is_meant);
        }
        true
    }

    /// Looks whether a copy that a caller has begun has ended, if it is this transfer's; true: it has.
    pub(super) fn look_at_issued(&self, issuer: &Issuer) -> bool {
        let (shared, engine) = (&self.shared, &*self.engine);
        let is_meant = |other: &TransferShared| std::ptr::eq(other, Arc::as_ptr(shared));
        let tell = |peer: &Arc<PeerShared>, payload: Arc<[u8]>| {
            let message = Message::Notify(Box::new((peer.clone(), payload.clone())));
            match engine.lane(peer.lane).map(|lane| lane.try_submit(message)) {
                Ok(Ok(())) => Ok(()),
                // The lane sends it when it has come to that.
                Ok(Err(TrySubmitError::Full(_))) => Err(payload),
                Ok(Err(TrySubmitError::Stopped(_))) | Err(_) => {
                    peer.release(1, payload.len());
                    Ok(())
                }
            }
        };
        issuer.look(engine, is_meant, tell) == Look::Ended
    }
}

impl Issued {
    fn end(self, engine: &EngineShared, ended: Result<(), GpuError>) {
        let Self { transfer, began, in_use, regions } = self;
        drop((in_use, regions));
        tell_end(engine, &transfer, began, ended);
    }
}

fn tell_end(
    engine: &EngineShared,
    transfer: &TransferShared,
    began: Instant,
    ended: Result<(), GpuError>,
) {
    let plan = &*transfer.plan;
    match ended {
        Ok(()) => {
            engine.inline.completed(plan.operation, plan.bytes);
            plan.peer.history.record(plan.operation, plan.bytes, plan.descriptors, began.elapsed());
            transfer.slot.complete(Ok(()));
        }
        Err(error) => {
            engine.inline.failed();
            transfer.slot.complete(Err(gpu_failed(plan, error)));
        }
    }
}

/// What a transfer ends in whose copy a GPU has failed.
pub(crate) fn gpu_failed(plan: &PlanInner, error: GpuError) -> Error {
    let what = format!("copying to or from the memory of `{}`", plan.peer.name);
    Error::Gpu { what, reason: error.0 }
}
