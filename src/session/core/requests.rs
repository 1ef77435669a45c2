//! Our transfers: posting, cutting into requests, answers, ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::links::CoreLink;
use super::{Core, Env, LinkId, Phase, ProtocolError, Sent, TxFrame, TxPayload};
use crate::error::Error;
use crate::memory::RegionUses;
use crate::plan::{Class, Operation, PlanInner};
use crate::session::outbox::{Bound, MAX_IN_BAND};
#[cfg(feature = "sim")]
use crate::sim::coverage::{TransferEvent, TransferState};
use crate::sys::IoSegment;
use crate::transfer::TransferShared;
use crate::transport::local::LocalPath;
use crate::wire::frame::{FLAG_COUNTED, FrameKind, Header, ServeStatus};
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
    shared: Arc<TransferShared>,
    posted: Instant,
    stamp: u32,
    next_piece: u32,
    /// Requests without an answer.
    outstanding: u32,
    /// WRITE frames that still read local memory.
    unsent: u32,
    /// It will end in this error as soon as its memory is quiet.
    ending: Option<Error>,
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
    /// Its transfer has ended or is ending: the answer is awaited and thrown away.
    orphan: bool,
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
            number,
            notification,
            notified: None,
            counted: false,
            copying: false,
            copied: false,
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

    /// Ends a transfer in an error, at once or when its memory is quiet.
    ///
    /// Payloads arrive by calls that this lane makes, so that nothing can arrive any more once its
    /// requests are orphans; only frames that are partly in a socket still need local memory.
    pub(super) fn fail(&mut self, slot: usize, error: Error, env: &mut Env<'_>) {
        let Some(active) = self.active.get_mut(slot) else { return };
        reached!(transfer, active.state(), TransferEvent::of_error(&error));
        if active.ending.is_none() {
            active.ending = Some(error);
            if let Some(seq) = active.notified {
                // Now and not at the end: numbers are good for this session only.
                self.outbox.void(seq + u64::from(mutated!(VoidsTheNext)));
            }
            let key = ActiveKey { slot, stamp: active.stamp };
            // A scan: failing is rare and the slab is bounded by the windows of the links.
            for (_, request) in &mut self.requests {
                request.orphan |= request.active == key;
            }
            if self.active[slot].wired {
                let stuck = matches!(self.active[slot].ending, Some(Error::Timeout { .. }));
                self.stop_wired(key, stuck);
            }
        }
        let active = &mut self.active[slot];
        let quiet = (!active.copying || active.stop_copy()) && !active.wired;
        if quiet && (active.unsent == 0 || mutated!(EndsWhileSending)) {
            self.finish(slot, env);
        } else if mutated!(EndsTwice)
            && let Some(error) = &active.ending
        {
            active.shared.slot.complete(Err(error.clone()));
        }
    }

    /// The one place where transfers end.
    pub(super) fn finish(&mut self, slot: usize, env: &mut Env<'_>) {
        let active = self.active.remove(slot);
        if active.copied {
            active.shared.copy.reset();
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
                if active.counted && self.session_link().is_some() && !mutated!(NoAbandon) {
                    self.control.push_back(Header {
                        aux: active.number,
                        ..Header::new(FrameKind::Abandon)
                    });
                }
                env.counters.failed.add(1);
                if mutated!(EachRequestTells) && active.outstanding > 1 {
                    active.shared.slot.complete(Err(error.clone()));
                }
                active.shared.slot.complete(Err(error));
            }
        }
    }

    /// Cuts the next request out of the transfer whose turn it is.
    pub(super) fn next_request(
        &mut self,
        link: usize,
        queue: Queue,
        window: usize,
        env: &mut Env<'_>,
    ) -> Option<TxFrame> {
        let window = if mutated!(WindowIgnored) { 8 * window } else { window };
        if self.links[link].outstanding >= window || self.is_way_pending() {
            return None;
        }
        let key = loop {
            let queue = match queue {
                Queue::Latency => &mut self.latency,
                Queue::Bulk => &mut self.bulk,
            };
            let key = queue.pop_front()?;
            let live = self
                .active
                .get(key.slot)
                .is_some_and(|active| active.stamp == key.stamp && active.ending.is_none());
            if live {
                break key;
            }
        };
        let stamp = self.stamp();
        let slot = self.requests.vacant_key();
        let id = request_id(slot, stamp);
        let active = &mut self.active[key.slot];
        let piece = active.next_piece;
        active.next_piece += 1;
        active.outstanding += 1;
        let last = active.next_piece as usize == active.shared.plan.pieces.len();
        let mut header = active.shared.plan.pieces[piece as usize].header;
        header.id = id;
        let write = active.shared.plan.operation == Operation::Write;
        if write && active.notification.as_ref().is_some_and(|n| n.len() <= MAX_IN_BAND) {
            active.counted = true;
            header.aux = active.number;
            header.flags |= FLAG_COUNTED;
            if last && let Some(payload) = active.notification.take() {
                let bound = Bound { transfer: active.number, pieces: active.next_piece };
                active.notified = Some(self.outbox.push(payload, Some(bound)));
            }
        }
        active.unsent += u32::from(write);
        let early = last && !write && mutated!(ReadNotifiesEarly);
        let early = if early { active.notification.take() } else { None };
        let link: &mut CoreLink = &mut self.links[link];
        if link.outstanding == 0 {
            link.answered = env.now;
        }
        link.outstanding += 1;
        link.last_use = env.now;
        self.requests.insert(Request {
            active: key,
            piece,
            len: header.len,
            operation: active.shared.plan.operation,
            stamp,
            link: link.id,
            unsent: write,
            orphan: false,
        });
        let frame = TxFrame {
            header: header.encode(),
            body: (header.body > 0).then(|| (active.plan().clone(), piece)),
            payload: if write {
                TxPayload::Plan(active.plan().clone(), piece)
            } else {
                TxPayload::None
            },
            sent: if write { Sent::Write(id) } else { Sent::Nothing },
        };
        if !last {
            match queue {
                Queue::Latency => self.latency.push_back(key),
                Queue::Bulk => self.bulk.push_back(key),
            }
        }
        if let Some(payload) = early {
            self.notify(payload, env);
        }
        env.counters.requests_sent.add(1);
        Some(frame)
    }

    fn request(&mut self, id: u64) -> Option<&mut Request> {
        let request = self.requests.get_mut((id & u64::from(u32::MAX)) as usize)?;
        (request.stamp == (id >> 32) as u32).then_some(request)
    }

    /// Local memory of a WRITE is not read any more.
    pub(super) fn write_sent(&mut self, id: u64, env: &mut Env<'_>) {
        let Some(request) = self.request(id) else { return };
        if !request.unsent {
            return;
        }
        request.unsent = false;
        let (key, link) = (request.active, request.link);
        if self.link(link).is_none() {
            // Its link went down while the frame was on its way: nobody will answer.
            self.requests.remove((id & u64::from(u32::MAX)) as usize);
        }
        if let Some(active) = self.active.get_mut(key.slot)
            && active.stamp == key.stamp
        {
            active.unsent -= 1;
            let ending = active.ending.is_some() && !mutated!(EndingForgotten);
            if active.unsent == 0 && ending && !active.copying && !active.wired {
                reached!(transfer, TransferState::Ending, TransferEvent::Flushed);
                self.finish(key.slot, env);
            }
        }
    }

    /// Checks a DATA header against the request that it answers.
    pub(super) fn check_data(
        &mut self,
        link: LinkId,
        header: &Header,
    ) -> Result<(), ProtocolError> {
        let request = self.request(header.id).ok_or(ProtocolError::Rule("DATA for no request"))?;
        if request.link != link || request.operation != Operation::Read {
            return Err(ProtocolError::Rule("DATA for another request"));
        }
        if request.len != header.len {
            return Err(ProtocolError::Rule("DATA of another length than asked for"));
        }
        Ok(())
    }

    /// Where the payload of a DATA goes: nowhere, once its transfer has ended.
    #[inline]
    pub(crate) fn destination(&mut self, id: u64) -> Option<&[IoSegment]> {
        let request =
            self.request(id).filter(|request| !request.orphan || mutated!(OrphansLand))?;
        let (key, piece) = (request.active, request.piece);
        let shift = u32::from(mutated!(PayloadShifted) && piece > 0);
        self.active.get(key.slot).map(|active| active.shared.plan.local(piece - shift))
    }

    /// A frame of which nothing is sent names memory of ours that is not mapped: it is dropped. The
    /// answer is the frame to send instead.
    pub(crate) fn on_send_fault(&mut self, frame: TxFrame, env: &mut Env<'_>) -> Option<TxFrame> {
        match frame.sent {
            Sent::Nothing => None,
            Sent::Served(uses) => {
                env.regions.release(uses);
                let id = Header::decode(&frame.header).ok()?.id;
                let status = ServeStatus::Fault as u16;
                let refused = Header { status, id, ..Header::new(FrameKind::Status) };
                Some(TxFrame::header(&refused))
            }
            Sent::Write(id) => {
                self.blame_send_fault(&Sent::Write(id), env);
                self.write_sent(id, env);
                if self.request(id).is_some() {
                    self.answered(id, None, env);
                }
                None
            }
        }
    }

    /// A frame that is partly sent names memory of ours that is not mapped. The link is about to be
    /// closed for it; the transfer that is to blame says why.
    pub(crate) fn blame_send_fault(&mut self, sent: &Sent, env: &mut Env<'_>) {
        let Sent::Write(id) = sent else { return };
        let Some(request) = self.request(*id).filter(|request| !request.orphan) else { return };
        let (key, piece) = (request.active, request.piece);
        let Some(active) = self.active.get(key.slot) else { return };
        let addr = active.shared.plan.local(piece).first().map_or(0, IoSegment::addr);
        self.fail(key.slot, Error::Fault { addr }, env);
    }

    /// The payload of a DATA has arrived, or could not be written into local memory.
    pub(super) fn data_arrived(&mut self, id: u64, fault: Option<u64>, env: &mut Env<'_>) {
        if self.request(id).is_none() {
            return;
        }
        let error = fault.map(|addr| Error::Fault { addr });
        self.answered(id, error, env);
    }

    /// A STATUS has arrived.
    pub(super) fn on_status(
        &mut self,
        link: LinkId,
        header: &Header,
        env: &mut Env<'_>,
    ) -> Result<(), ProtocolError> {
        let peer = self.peer.name.clone();
        let status = ServeStatus::from_u16(header.status)
            .ok_or(ProtocolError::Rule("unknown status of a request"))?;
        let request =
            self.request(header.id).ok_or(ProtocolError::Rule("STATUS for no request"))?;
        if request.link != link || request.unsent {
            return Err(ProtocolError::Rule("STATUS for another request"));
        }
        if request.operation == Operation::Read && status == ServeStatus::Ok {
            return Err(ProtocolError::Rule("STATUS ok for a READ"));
        }
        let error = match status {
            ServeStatus::Ok => None,
            refused => Some(Error::Permission { peer, reason: refused.reason() }),
        };
        self.answered(header.id, error, env);
        Ok(())
    }

    fn answered(&mut self, id: u64, error: Option<Error>, env: &mut Env<'_>) {
        let slot = (id & u64::from(u32::MAX)) as usize;
        let request = self.requests.remove(slot);
        let now = env.now;
        if let Some(link) = self.link(request.link) {
            link.outstanding -= 1;
            (link.last_use, link.answered) = (now, now);
        }
        if request.orphan {
            return;
        }
        let key = request.active;
        let active = &mut self.active[key.slot];
        reached!(transfer, active.state(), TransferEvent::Answered);
        active.outstanding -= 1;
        if let Some(error) = error {
            return self.fail(key.slot, error, env);
        }
        let answered = active.outstanding == 0 || mutated!(AnyAnswerCompletes);
        let asked = active.next_piece as usize == active.shared.plan.pieces.len();
        if answered && (asked || mutated!(EarlyCompletion)) {
            self.finish(key.slot, env);
        }
    }

    /// The transfers that have begun on links which are all gone: what was asked for will not be answered, and the peer does not
    /// count on across links.
    pub(super) fn lose_begun(&mut self, reason: &str, env: &mut Env<'_>) {
        let begun = |active: &Active| active.outstanding > 0 || active.counted || active.copying;
        let slots: Vec<usize> =
            self.active.iter().filter(|(_, active)| begun(active)).map(|(slot, _)| slot).collect();
        for slot in slots {
            self.lost(slot, reason, env);
        }
    }

    /// A transfer has lost requests with their link. A READ is begun again: it has changed nothing at the peer, and answers that
    /// are still on their way are thrown away. A WRITE is not: the peer may still be taking what the old link carries, so that
    /// bytes of the first try could arrive after the end of the second.
    fn lost(&mut self, slot: usize, reason: &str, env: &mut Env<'_>) {
        let active = &mut self.active[slot];
        let again = active.plan().operation == Operation::Read
            && active.ending.is_none()
            && !active.copying
            && !active.wired
            && active.redone < MAX_REDONE;
        if !again {
            let error = self.peer.gone(reason);
            return self.fail(slot, error, env);
        }
        active.begin_again();
        (active.next_piece, active.outstanding) = (0, 0);
        let key = ActiveKey { slot, stamp: active.stamp };
        // Scans: losing links is rare, and the windows bound the slab.
        for (_, request) in &mut self.requests {
            request.orphan |= request.active == key;
        }
        if !self.latency.contains(&key) && !self.bulk.contains(&key) {
            self.enqueue_for_links(key);
        }
    }

    #[cfg(test)]
    pub(super) fn has_requests_of(&self, shared: &Arc<TransferShared>) -> bool {
        let mut all = self.active.iter().map(|(_, active)| active);
        all.any(|active| Arc::ptr_eq(&active.shared, shared) && active.outstanding > 0)
    }

    /// No other link comes up for the transfers that were begun again.
    pub(super) fn fail_redone(&mut self, reason: &str, env: &mut Env<'_>) {
        let redone = self.active.iter().filter(|(_, active)| active.redone > 0);
        let slots: Vec<usize> = redone.map(|(slot, _)| slot).collect();
        for slot in slots {
            let error = self.peer.gone(reason);
            self.fail(slot, error, env);
        }
    }

    /// The requests of a link that is gone: nobody will answer them.
    pub(super) fn lose_requests_of(&mut self, link: LinkId, reason: &str, env: &mut Env<'_>) {
        let lost: Vec<usize> = self
            .requests
            .iter()
            .filter(|(_, request)| request.link == link && !mutated!(LostLinkFailsNobody))
            .map(|(slot, _)| slot)
            .collect();
        for slot in lost {
            let Request { active: key, orphan, .. } = self.requests[slot];
            if self.requests[slot].unsent {
                // Removed by `write_sent`, which the transfer's end waits for.
                self.requests[slot].orphan = true;
            } else {
                self.requests.remove(slot);
            }
            // One that was begun again by the loss of another request is waiting, and has lost no more.
            if !orphan && self.is_active(key) {
                self.lost(key.slot, reason, env);
            }
        }
    }

    /// Ends the transfers that wait for a connection which cannot be had.
    pub(super) fn fail_all(&mut self, error: &Error, env: &mut Env<'_>) {
        let slots: Vec<usize> = self.active.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            if self.active.contains(slot) {
                self.fail(slot, error.clone(), env);
            }
        }
        self.latency.clear();
        self.bulk.clear();
        self.copies.clear();
        self.on_device.clear();
        self.wired.clear();
    }

    /// The sockets and queue pairs are gone for good: no frame reads local memory any more.
    pub(super) fn drop_unsent(&mut self) {
        for (_, active) in &mut self.active {
            (active.unsent, active.wired) = (0, false);
        }
        for (_, request) in &mut self.requests {
            request.unsent = false;
        }
    }

    pub(super) fn has_transfers(&self) -> bool {
        !self.active.is_empty()
    }

    /// Fails what is past its deadline. A WRITE that is stuck in a socket costs the socket: nothing
    /// else makes its memory quiet.
    pub(super) fn expire_transfers(&mut self, env: &mut Env<'_>) {
        while let Some((at, key)) = self.deadlines.front().copied() {
            if mutated!(NoOperationTimeout) {
                self.deadlines.clear();
                break;
            }
            if self.is_active(key) && at > env.now {
                break;
            }
            self.deadlines.pop_front();
            if !self.is_active(key) {
                continue;
            }
            let (peer, after) = (self.peer.name.clone(), self.config.operation_timeout);
            let error = if self.session_link().is_some() {
                Error::Timeout { what: "a transfer", peer, after }
            } else {
                // There is no living peer that could be slow.
                let reason =
                    format!("no connection came up within the operation timeout, {after:?}");
                Error::Connect { peer, reason }
            };
            if mutated!(TimeoutTellsTheEnd)
                && let Some(active) = self.active.get(key.slot)
            {
                active.shared.slot.complete(Err(error));
                continue;
            }
            self.fail(key.slot, error, env);
            self.close_stuck(key, env.now);
        }
    }

    /// Closes the links that a transfer past its deadline is stuck in: those whose sockets do not take
    /// its frames, and streams that answer nothing at all (of the session link, liveness judges).
    fn close_stuck(&mut self, key: ActiveKey, now: Instant) {
        let patience = self.config.operation_timeout / 2;
        let mut stuck: Vec<LinkId> = Vec::new();
        for (_, request) in self.requests.iter().filter(|(_, request)| request.active == key) {
            let silent = self.links.iter().any(|link| {
                let quiet = now.saturating_duration_since(link.answered) >= patience;
                link.id == request.link && link.kind == LinkKind::Bulk && quiet
            });
            if (request.unsent || silent) && !stuck.contains(&request.link) {
                stuck.push(request.link);
            }
        }
        for link in stuck {
            self.close(link, "a transfer stuck in it passed the operation timeout", false);
        }
    }

    /// Whether a link of this kind could be used by something that waits.
    pub(super) fn wants(&self, kind: LinkKind) -> bool {
        match kind {
            LinkKind::Session => self.has_transfers() || !self.outbox.is_empty(),
            LinkKind::Bulk => !self.bulk.is_empty(),
        }
    }
}
