//! Our transfers: posting, cutting into requests, answers, ends.

mod answers;
mod losses;
mod settling;

use std::sync::Arc;
use std::time::{Duration, Instant};

use self::settling::leaves_the_peer;
use super::staged::{PackSize, Packed};
use super::{Core, Env, LinkId, Phase};
use crate::error::Error;
use crate::memory::RegionUses;
use crate::plan::{Class, Operation, PlanInner};
#[cfg(feature = "sim")]
use crate::sim::coverage::{TransferEvent, TransferState};
use crate::transfer::TransferShared;
use crate::transport::local::LocalPath;
use crate::wire::frame::{FrameKind, Header};
use crate::wire::hello::LinkKind;

/// How long a lane that ends waits for threads in the middle of a copy.
const COPY_PATIENCE: Duration = Duration::from_secs(5);

/// How often a READ is begun again that has lost a link.
const MAX_REDONE: u8 = 3;

/// Names an active transfer; the stamp tells it from a later one in the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ActiveKey {
    pub(super) slot: usize,
    stamp: u32,
}

impl ActiveKey {
    pub(super) fn to_bits(self) -> u64 {
        u64::from(self.stamp) << 32 | self.slot as u64 & u64::from(u32::MAX)
    }

    pub(super) fn from_bits(bits: u64) -> Self {
        Self { slot: bits as u32 as usize, stamp: (bits >> 32) as u32 }
    }
}

/// Which transfers a link may take requests from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Queue {
    Latency,
    Bulk,
}

/// A posted transfer that has not ended.
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not states")]
pub(super) struct Active {
    pub(super) shared: Arc<TransferShared>,
    posted: Instant,
    stamp: u32,
    pub(super) next_piece: u32,
    /// Requests without an answer.
    outstanding: u32,
    /// WRITE frames that still read local memory, and copies of GPUs between it and blocks.
    pub(super) unsent: u32,
    /// It will end in this error as soon as its memory is quiet.
    ending: Option<Error>,
    /// A WRITE that is to end, and some of which the peer may still write: its answers are waited for.
    settling: bool,
    /// Number of the transfer in this session, for the count of its pieces.
    number: u64,
    notification: Option<Arc<[u8]>>,
    /// Sequence number of the bound notification once it is queued.
    notified: Option<u64>,
    /// The peer counts its pieces.
    counted: bool,
    /// It is copied by this side: its job is open, or not quiet.
    copying: bool,
    /// It was at some time.
    copied: bool,
    /// A WRITE of GPU memory that goes as frames: how far it is in blocks.
    pub(super) packed: Option<Box<Packed>>,
    /// The driver has posted it to a device, or is about to: only it knows when its memory is quiet.
    wired: bool,
    /// How often it was begun again.
    redone: u8,
    uses: RegionUses,
}

impl Active {
    pub(super) fn plan(&self) -> &Arc<PlanInner> {
        &self.shared.plan
    }

    /// Opens the job of copying it.
    pub(super) fn begin_copy(&mut self, path: Arc<LocalPath>) -> Arc<TransferShared> {
        (self.copying, self.copied) = (true, true);
        self.next_piece = self.shared.plan.pieces.len() as u32;
        self.shared.copy.open(path, self.shared.plan.parts());
        self.shared.clone()
    }

    /// The driver takes it up; it looks at the notification, and may send it with the data.
    #[inline]
    pub(super) fn begin_wired(&mut self) -> (Arc<PlanInner>, Option<Arc<[u8]>>) {
        self.wired = true;
        (self.shared.plan.clone(), self.notification.clone())
    }

    /// The driver is done with it. The answer is the length of its notification, if that was sent.
    #[inline]
    pub(super) fn end_wired(&mut self, notified: bool) -> Option<usize> {
        self.wired = false;
        if !notified {
            return None;
        }
        self.notification.take().map(|payload| payload.len())
    }

    #[inline]
    pub(super) fn was_posted_before(&self, now: Instant) -> bool {
        self.posted < now
    }

    pub(super) fn begin_again(&mut self) {
        self.redone = self.redone.saturating_add(1);
    }

    #[cfg(feature = "sim")]
    fn state(&self) -> TransferState {
        if self.ending.is_some() {
            TransferState::Ending
        } else if self.next_piece == 0 {
            TransferState::Waiting
        } else if (self.next_piece as usize) < self.shared.plan.pieces.len() {
            TransferState::Partly
        } else {
            TransferState::Asked
        }
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// Whether nothing keeps it from its end, and it has reached it: all that was asked for is there, or it has failed.
    pub(super) fn may_end(&self) -> bool {
        let asked = self.next_piece as usize == self.shared.plan.pieces.len();
        let over = self.ending.is_some() || (self.outstanding == 0 && asked);
        over && self.unsent == 0 && !self.copying && !self.wired && self.is_settled()
    }

    /// Whether requests of it went over a link.
    pub(super) fn has_begun(&self) -> bool {
        self.next_piece > 0
    }

    /// Closes that job; false: a thread is still copying.
    fn stop_copy(&mut self) -> bool {
        self.copying &= !self.shared.copy.close(self.shared.plan.parts());
        !self.copying
    }
}

/// A request that was sent.
pub(super) struct Request {
    active: ActiveKey,
    piece: u32,
    len: u64,
    operation: Operation,
    stamp: u32,
    link: LinkId,
    unsent: bool,
    /// The answer's payload lands in memory of a GPU.
    landing: bool,
    /// Its transfer has ended or is ending: the answer is awaited and thrown away.
    orphan: bool,
}

impl Request {
    pub(super) fn is_orphan(&self) -> bool {
        self.orphan
    }

    /// The transfer and its piece.
    pub(super) fn place(&self) -> (ActiveKey, u32) {
        (self.active, self.piece)
    }
}

fn request_id(slot: usize, stamp: u32) -> u64 {
    u64::from(stamp) << 32 | slot as u64
}

impl Core {
    /// Starts a transfer. It ends exactly once, perhaps before this returns.
    pub(crate) fn post(&mut self, shared: Arc<TransferShared>, env: &mut Env<'_>) {
        env.counters.posted.add(1);
        let notification = shared.take_notification();
        let plan = &shared.plan;
        let mut uses = RegionUses::new();
        for region in &plan.regions {
            let Some(one) = env.regions.use_own(region) else {
                env.regions.release(uses);
                let d = &region.descriptor;
                let error = Error::NotRegistered { addr: d.base, len: d.len };
                return self.refuse(&shared, notification, error, env);
            };
            uses.push(one);
        }
        if matches!(self.phase, Phase::Leaving { .. }) {
            env.regions.release(uses);
            return self.refuse(&shared, notification, Error::Cancelled, env);
        }
        let stamp = self.stamp();
        let class = plan.class;
        let empty = plan.bytes == 0;
        let number = self.next_transfer;
        self.next_transfer += 1;
        let slot = self.active.insert(Active {
            shared,
            posted: env.now,
            stamp,
            next_piece: 0,
            outstanding: 0,
            unsent: 0,
            ending: None,
            settling: false,
            number,
            notification,
            notified: None,
            counted: false,
            copying: false,
            copied: false,
            packed: None,
            wired: false,
            redone: 0,
            uses,
        });
        let key = ActiveKey { slot, stamp };
        self.active[slot].shared.set_lane_key(slot);
        if empty {
            return self.finish(slot, env);
        }
        self.push_deadline(env.now + self.config.operation_timeout, key);
        self.enqueue(key, env);
        if class == Class::Bulk {
            self.want_bulk();
        }
        self.ensure_connected(env);
    }

    /// A transfer that has not ended and is not about to.
    pub(super) fn live(&self, key: ActiveKey) -> Option<&Active> {
        let active = self.active.get(key.slot)?;
        (active.stamp == key.stamp && active.ending.is_none()).then_some(active)
    }

    /// A transfer that has not ended.
    pub(super) fn active_mut(&mut self, key: ActiveKey) -> Option<&mut Active> {
        self.active.get_mut(key.slot).filter(|active| active.stamp == key.stamp)
    }

    pub(super) fn live_mut(&mut self, key: ActiveKey) -> Option<&mut Active> {
        let active = self.active.get_mut(key.slot)?;
        (active.stamp == key.stamp && active.ending.is_none()).then_some(active)
    }

    /// What copying a transfer came to, once nobody copies any more.
    pub(super) fn end_copy(
        &mut self,
        slot: usize,
        shared: &Arc<TransferShared>,
    ) -> Option<Result<(), Error>> {
        let active = self.active.get_mut(slot)?;
        let ended = active.copying && Arc::ptr_eq(&active.shared, shared) && shared.copy.is_quiet();
        if !ended {
            return None;
        }
        active.copying = false;
        Some(match active.ending.clone().or_else(|| shared.copy.error()) {
            None => Ok(()),
            Some(error) => Err(error),
        })
    }

    /// Waits for threads that copy in transfers which are to end now: some 50 us. They cannot be stopped,
    /// and after the end nothing may touch the memory.
    pub(super) fn wait_for_copies(&mut self, env: &mut Env<'_>) {
        let patience = Instant::now() + COPY_PATIENCE;
        let slots: Vec<usize> = self.active.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            while let Some(active) = self.active.get_mut(slot)
                && !active.stop_copy()
                && Instant::now() < patience
            {
                std::thread::yield_now();
            }
            if let Some(active) = self.active.get_mut(slot)
                && active.ending.is_some()
            {
                active.copying = false;
                self.finish(slot, env);
            }
        }
    }

    fn stamp(&mut self) -> u32 {
        self.next_stamp = self.next_stamp.wrapping_add(1);
        self.next_stamp
    }

    /// Deadlines are in order because the timeout is constant; those of ended transfers are
    /// dropped before the queue would grow, so that its length stays within twice the number of
    /// transfers in flight.
    fn push_deadline(&mut self, at: Instant, key: ActiveKey) {
        while let Some((_, front)) = self.deadlines.front()
            && !self.is_active(*front)
            && !mutated!(DeadlinesPile)
        {
            self.deadlines.pop_front();
        }
        if self.deadlines.len() > 64 + 2 * self.active.len() && !mutated!(DeadlinesPile) {
            let active = &self.active;
            self.deadlines
                .retain(|(_, key)| active.get(key.slot).is_some_and(|a| a.stamp == key.stamp));
        }
        self.deadlines.push_back((at, key));
    }

    fn is_active(&self, key: ActiveKey) -> bool {
        self.active.get(key.slot).is_some_and(|active| active.stamp == key.stamp)
    }

    fn refuse(
        &mut self,
        shared: &TransferShared,
        notification: Option<Arc<[u8]>>,
        error: Error,
        env: &Env<'_>,
    ) {
        if let Some(payload) = notification {
            self.peer.release(1, payload.len());
        }
        env.counters.failed.add(1);
        self.peer.leave();
        shared.slot.complete(Err(error));
    }

    /// Asks for the end of a transfer: what is not issued is dropped, what is issued is waited for.
    pub(crate) fn cancel(&mut self, shared: &Arc<TransferShared>, env: &mut Env<'_>) {
        let slot = shared.lane_key();
        if mutated!(MissingCancel) {
            return;
        }
        if mutated!(CancelTellsTheEnd) {
            return shared.slot.complete(Err(Error::Cancelled));
        }
        if self.active.get(slot).is_some_and(|active| Arc::ptr_eq(&active.shared, shared)) {
            self.fail(slot, Error::Cancelled, env);
        }
    }

    /// Ends a transfer in an error, at once or when its memory is quiet, on both sides.
    ///
    /// Payloads arrive by calls that this lane makes, so that nothing can arrive any more once its
    /// requests are orphans; only frames that are partly in a socket still need local memory. What the peer
    /// has been sent of a WRITE it writes when it comes to it, and answers: that is waited for, as long as
    /// it can be told.
    pub(super) fn fail(&mut self, slot: usize, error: Error, env: &mut Env<'_>) {
        let Some(active) = self.active.get_mut(slot) else { return };
        reached!(transfer, active.state(), TransferEvent::of_error(&error));
        if active.ending.is_none() {
            active.settling = active.outstanding > 0
                && active.plan().operation == Operation::Write
                && leaves_the_peer(&error)
                && !mutated!(EndsUnanswered);
            active.ending = Some(error);
            if let Some(seq) = active.notified {
                // Now and not at the end: numbers are good for this session only.
                self.outbox.void(seq + u64::from(mutated!(VoidsTheNext)));
            }
            let key = ActiveKey { slot, stamp: active.stamp };
            let (counted, number) = (active.counted, active.number);
            if counted && self.session_link().is_some() && !mutated!(NoAbandon) {
                // Now as well: a notification that the peer holds for what is on its way is not seen.
                let abandon = Header { aux: number, ..Header::new(FrameKind::Abandon) };
                self.control.push_back(abandon);
            }
            // A scan: failing is rare and the slab is bounded by the windows of the links.
            for (_, request) in &mut self.requests {
                request.orphan |= request.active == key;
            }
            if self.active[slot].wired {
                let stuck = matches!(self.active[slot].ending, Some(Error::Timeout { .. }));
                self.stop_wired(key, stuck);
            }
        } else if active.waits_for_the_peer() && !leaves_the_peer(&error) {
            active.give_up_answers(&error);
        }
        let active = &mut self.active[slot];
        let quiet = (!active.copying || active.stop_copy() || mutated!(CopyCutShort))
            && (!active.wired || mutated!(WiredEndsAtOnce));
        let is_over = active.unsent == 0 && active.is_settled();
        if quiet && (is_over || mutated!(EndsWhileSending)) {
            return self.finish(slot, env);
        }
        if mutated!(EndsTwice)
            && let Some(error) = &active.ending
        {
            active.shared.slot.complete(Err(error.clone()));
        }
        self.release_unread(slot, env);
    }

    /// The one place where transfers end.
    pub(super) fn finish(&mut self, slot: usize, env: &mut Env<'_>) {
        let active = self.active.remove(slot);
        if active.copied {
            active.shared.copy.reset();
        }
        if let Some(packed) = active.packed {
            let size = PackSize::of_write(&active.shared.plan);
            self.writes_to_pack.release_all(size, packed.ready.len());
        }
        env.regions.release(active.uses);
        self.peer.leave();
        match active.ending {
            None => {
                let bytes = active.shared.plan.bytes;
                match active.shared.plan.operation {
                    Operation::Read => env.counters.bytes_read.add(bytes),
                    Operation::Write => env.counters.bytes_written.add(bytes),
                }
                env.counters.completed.add(1);
                if bytes > 0 {
                    // An answer may come in the turn that sent the request: while the call that sent
                    // it had not returned, if the peer runs on this core. 30 ns.
                    let now = env.clock.map_or(env.now, |clock| clock());
                    let took = now.saturating_duration_since(active.posted);
                    let (history, plan) = (&self.peer.history, &active.shared.plan);
                    history.record(plan.operation, bytes, plan.descriptors, took);
                }
                if let Some(payload) = active.notification {
                    self.notify(payload, env);
                }
                active.shared.slot.complete(Ok(()));
                if mutated!(DoneIsToldTwice) && active.counted {
                    active.shared.slot.complete(Ok(()));
                }
            }
            Some(error) => {
                if let Some(payload) = active.notification
                    && !mutated!(BudgetKept)
                {
                    self.peer.release(1, payload.len());
                }
                env.counters.failed.add(1);
                if mutated!(EachRequestTells) && active.outstanding > 1 {
                    active.shared.slot.complete(Err(error.clone()));
                }
                active.shared.slot.complete(Err(error));
            }
        }
    }

    pub(super) fn has_transfers(&self) -> bool {
        !self.active.is_empty()
    }

    /// Whether a link of this kind could be used by something that waits.
    pub(super) fn wants(&self, kind: LinkKind) -> bool {
        match kind {
            LinkKind::Session => self.has_transfers() || !self.outbox.is_empty(),
            LinkKind::Bulk => !self.bulk.is_empty(),
        }
    }
}
