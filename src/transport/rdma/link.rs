//! The queue pairs of one connection, and the transfers that are on their way over them.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use corelane_runtime::TimerId;
use slab::Slab;
use smallvec::SmallVec;

use super::lane::PairId;
use super::pair::{CHAIN, Pair};
use crate::gpu::Device;
use crate::plan::{Class, Operation, PlanInner, RdmaRequests};
use crate::session::LinkId;
use crate::verbs::SendList;
use crate::wire::rdma::{MAX_MESSAGE_PAYLOAD, MAX_QUEUE_PAIRS};

/// A transfer that is shared by several rails has so many stripes at least.
const SHARED_STRIPES: u64 = 2;

/// Bytes that one chain moves, and that the chains of a queue pair move at a time: what is posted cannot be taken back, is ahead of
/// whatever comes next, and is not there for another rail. Two chains take a device of 400 Gb/s 0.7 ms, in which one completion
/// is seen in time for the next.
const CHAIN_BYTES: u32 = 16 << 20;
const WINDOW_BYTES: u64 = 2 * CHAIN_BYTES as u64;
/// The same of a transfer that rails share, in stripes, each a chain: who is faster takes more of them.
const WINDOW_STRIPES: u64 = 4;

/// A place in the requests of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Cursor {
    run: u32,
    /// Bytes of the run that are behind it.
    run_done: u32,
    piece: u32,
    piece_done: u32,
}

/// A part of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Span {
    from: Cursor,
    to: Cursor,
}

impl Span {
    fn of(requests: &RdmaRequests) -> Self {
        let to = Cursor {
            run: requests.runs.len() as u32,
            piece: requests.pieces.len() as u32,
            ..Cursor::default()
        };
        Self { from: Cursor::default(), to }
    }

    fn is_empty(&self) -> bool {
        (self.from.run, self.from.run_done) == (self.to.run, self.to.run_done)
    }
}

/// A transfer on its way.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not states")]
pub(crate) struct Job {
    /// How the session's core names it.
    pub(crate) key: u64,
    plan: Arc<PlanInner>,
    /// What is still to be issued.
    todo: SmallVec<[Span; 1]>,
    /// Chains that have not completed.
    outstanding: u32,
    /// Goes behind the last request, if all are on one queue pair.
    notification: Option<Arc<[u8]>>,
    notified: bool,
    /// Something was issued. What is known of that once its queue pairs are gone is only that it may have been carried out.
    begun: bool,
    /// Nothing more is issued: it ends when nothing is outstanding.
    stopped: bool,
    /// How often it was begun again.
    pub(crate) tries: u8,
    /// The peer's device has refused its access. Whether it was to blame, or the peer's process about to end, is known when the
    /// peer answers.
    pub(crate) refused: bool,
    /// Queue pairs that it may use.
    alone: bool,
}

impl Job {
    pub(crate) fn new(key: u64, plan: Arc<PlanInner>, notification: Option<Arc<[u8]>>) -> Self {
        let todo = SmallVec::from_buf([Span::of(&plan.rdma)]);
        let notification = notification.filter(|payload| {
            payload.len() <= MAX_MESSAGE_PAYLOAD && plan.operation == Operation::Write
        });
        Self {
            key,
            plan,
            todo,
            outstanding: 0,
            notification,
            notified: false,
            begun: false,
            stopped: false,
            tries: 0,
            refused: false,
            alone: true,
        }
    }

    fn is_issued(&self) -> bool {
        self.todo.is_empty()
    }

    fn is_over(&self) -> bool {
        self.outstanding == 0 && (self.is_issued() || self.stopped)
    }

    /// Whether anything was issued that the peer may have seen.
    pub(crate) fn has_begun(&self) -> bool {
        self.begun
    }

    pub(crate) fn is_write(&self) -> bool {
        self.plan.operation == Operation::Write
    }

    /// Whether its notification may have been seen.
    pub(crate) fn is_notified(&self) -> bool {
        self.notified
    }
}

/// A job that has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EndedJob {
    pub(crate) key: u64,
    /// Its notification has arrived with it.
    pub(crate) notified: bool,
    pub(crate) stopped: bool,
    /// The GPU that does not see by itself what was written.
    pub(crate) flush: Option<&'static Device>,
}

/// What was posted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Posted {
    pub(crate) requests: u64,
    /// Calls that posted them.
    pub(crate) doorbells: u64,
}

/// Where a connection's queue pairs stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// There are none.
    Off,
    /// Offered, or waited for.
    Connecting,
    Up,
    /// They have failed, and the peer does not know yet, or has not said so.
    Down,
}

/// What is to be done when what a link waits for has not come in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Late {
    /// Those of the queue pairs that were offered count as broken of which nothing has been heard; the others go up.
    Conclude,
    /// The peer offers none, or does not say which of them work: transfers take another way.
    GiveUp,
    /// It is time to offer again.
    Offer,
    /// The peer does not say that its queue pairs are gone. Without that nothing may be done again, and nobody knows which
    /// notifications it has: the session's link goes, whose next one begins with both.
    Close,
}

/// The RDMA side of one session.
#[derive(Debug)]
pub(crate) struct Link {
    /// The session's link that it is agreed on over.
    pub(crate) session: LinkId,
    /// This side offers.
    pub(crate) offers: bool,
    pub(crate) generation: u32,
    pub(crate) phase: Phase,
    /// By index; those that do not work are not there.
    pub(crate) pairs: SmallVec<[(u8, PairId); 4]>,
    /// Offered, and still undecided.
    pub(crate) undecided: u64,
    pub(crate) jobs: Slab<Job>,
    /// Those that wait for queue pairs.
    pub(crate) parked: Vec<usize>,
    stripe: u32,
    /// Failures since it last was up for a while.
    pub(crate) failures: u32,
    pub(crate) up_since: Option<Instant>,
    /// When what is under way is over, or is begun again.
    pub(crate) deadline: Option<Instant>,
    pub(crate) timer: Option<TimerId>,
    /// An `ACK_REQUEST` is on its way.
    pub(crate) asked: bool,
    /// Rails of ours that did not answer: not offered while there are others.
    pub(crate) suspects: u32,
}

impl Link {
    pub(crate) fn new(session: LinkId, offers: bool, stripe_bytes: usize) -> Self {
        Self {
            session,
            offers,
            generation: 0,
            phase: Phase::Connecting,
            pairs: SmallVec::new(),
            undecided: 0,
            jobs: Slab::new(),
            parked: Vec::new(),
            stripe: stripe_bytes.min(1 << 30) as u32,
            failures: 0,
            up_since: None,
            deadline: None,
            timer: None,
            asked: false,
            suspects: 0,
        }
    }

    /// What to do now, if it is time for anything. A timer that is early finds nothing.
    pub(crate) fn take_late(&mut self, now: Instant) -> Option<Late> {
        self.deadline.take_if(|at| *at <= now)?;
        match (self.phase, self.offers) {
            (Phase::Connecting, true) => Some(Late::Conclude),
            (Phase::Connecting, false) => Some(Late::GiveUp),
            (Phase::Off, true) => Some(Late::Offer),
            (Phase::Down, _) => Some(Late::Close),
            (Phase::Off, false) | (Phase::Up, _) => None,
        }
    }

    /// The queue pair for small transfers and messages.
    #[inline]
    pub(crate) fn first(&self) -> Option<PairId> {
        self.pairs.first().map(|(_, id)| *id)
    }

    pub(crate) fn pair_at(&self, index: u8) -> Option<PairId> {
        self.pairs.iter().find(|(known, _)| *known == index).map(|(_, id)| *id)
    }

    /// One bit for each that there is.
    pub(crate) fn mask(&self) -> u64 {
        self.pairs
            .iter()
            .fold(0, |mask, (index, _)| mask | 1 << (u32::from(*index) % MAX_QUEUE_PAIRS as u32))
    }

    /// Adds a job; the answer is its place. It is issued on the queue pairs that it is given to.
    pub(crate) fn add(&mut self, job: Job) -> usize {
        self.jobs.insert(job)
    }

    /// Says how many queue pairs a job has been given: with several, its notification waits for all of it.
    pub(super) fn share(&mut self, slot: usize, over: usize) {
        if let Some(job) = self.jobs.get_mut(slot) {
            job.alone = over == 1;
        }
    }

    /// Whether a job is so large that every rail is to have a share; `None`: it is a small one.
    pub(super) fn is_large(&self, slot: usize) -> Option<bool> {
        let job = self.jobs.get(slot)?;
        (job.plan.class == Class::Bulk)
            .then(|| job.plan.bytes >= SHARED_STRIPES * u64::from(self.stripe))
    }

    /// Where a part of a job's plan begins in our memory.
    pub(crate) fn address_of(&self, slot: usize, span: Span) -> u64 {
        let pieces = self.jobs.get(slot).map(|job| &job.plan.rdma.pieces);
        let piece = pieces.and_then(|pieces| pieces.get(span.from.piece as usize));
        piece.map_or(0, |piece| piece.addr + u64::from(span.from.piece_done))
    }

    /// Whether a job's memory is registered with both ends of a queue pair.
    pub(super) fn is_open_on(&self, slot: usize, pair: &Pair) -> bool {
        self.jobs.get(slot).is_some_and(|job| job.plan.is_open_on(pair.rail, pair.peer_rail))
    }

    /// The rails that are near a job's memory, as its plan has them.
    pub(super) fn near(&self, slot: usize) -> u32 {
        self.jobs.get(slot).map_or(0, |job| job.plan.rdma.near)
    }

    /// Issues chains of the jobs that wait for a queue pair, in turns, while it has room.
    pub(super) fn issue(&mut self, pair: &mut Pair, list: &mut SendList) -> io::Result<Posted> {
        let mut posted = Posted::default();
        while let Some(&(slot, key)) = pair.waiting.front() {
            let room = pair.room().min(CHAIN);
            if room == 0 {
                break;
            }
            let waits = |job: &&mut Job| job.key == key && !job.is_issued();
            let Some(job) = self.jobs.get_mut(slot).filter(waits) else {
                pair.waiting.pop_front();
                continue;
            };
            let window =
                if job.alone { WINDOW_BYTES } else { WINDOW_STRIPES * u64::from(self.stripe) };
            if pair.moving() >= window {
                break;
            }
            job.issue(slot, pair, list, room, self.stripe)?;
            posted.requests += list.len() as u64;
            posted.doorbells += 1;
            if job.is_issued() {
                pair.waiting.pop_front();
            } else if pair.waiting.len() > 1 {
                pair.waiting.rotate_left(1);
            }
        }
        Ok(posted)
    }

    /// A chain of a job has completed; the answer is the job, if that was the last.
    #[inline]
    pub(crate) fn chain_ended(&mut self, slot: usize) -> Option<EndedJob> {
        let job = self.jobs.get_mut(slot)?;
        job.outstanding = job.outstanding.saturating_sub(1);
        if job.is_over() { self.end(slot) } else { None }
    }

    /// Takes a job out.
    pub(crate) fn end(&mut self, slot: usize) -> Option<EndedJob> {
        let job = self.jobs.try_remove(slot)?;
        let flush = job.plan.flush();
        Some(EndedJob { key: job.key, notified: job.notified, stopped: job.stopped, flush })
    }

    /// Issues no more of a job; the answer is the job, if nothing is outstanding.
    pub(crate) fn stop(&mut self, key: u64) -> Option<EndedJob> {
        let slot = self.jobs.iter().find(|(_, job)| job.key == key)?.0;
        self.parked.retain(|parked| *parked != slot);
        let job = &mut self.jobs[slot];
        job.stopped = true;
        job.todo.clear();
        if job.is_over() { self.end(slot) } else { None }
    }

    /// The jobs whose access the peer's device has refused.
    pub(crate) fn take_refused(&mut self) -> SmallVec<[EndedJob; 4]> {
        let refused = |(slot, job): (usize, &Job)| job.refused.then_some(slot);
        let slots: SmallVec<[usize; 4]> = self.jobs.iter().filter_map(refused).collect();
        slots.into_iter().filter_map(|slot| self.end(slot)).collect()
    }

    /// The jobs that were told to end, and of which nothing is outstanding.
    pub(crate) fn take_stopped(&mut self) -> SmallVec<[EndedJob; 4]> {
        let over =
            |(slot, job): (usize, &Job)| (job.stopped && job.outstanding == 0).then_some(slot);
        let slots: SmallVec<[usize; 4]> = self.jobs.iter().filter_map(over).collect();
        self.parked.retain(|parked| !slots.contains(parked));
        slots.into_iter().filter_map(|slot| self.end(slot)).collect()
    }

    /// A queue pair is gone, and with it these chains, which may have been carried out or not. What they were to move is to
    /// be moved again.
    pub(crate) fn chains_lost(&mut self, pair: &Pair) {
        for chain in pair.chains() {
            let Some(job) = chain.job.and_then(|slot| self.jobs.get_mut(slot)) else { continue };
            job.outstanding = job.outstanding.saturating_sub(1);
            if !chain.span.is_empty() && !job.stopped {
                job.todo.push(chain.span);
            }
        }
    }
}

impl Job {
    /// Posts one chain of at most `room` requests.
    fn issue(
        &mut self,
        slot: usize,
        pair: &mut Pair,
        list: &mut SendList,
        room: usize,
        stripe: u32,
    ) -> io::Result<()> {
        let Some(span) = self.todo.last_mut() else { return Ok(()) };
        list.clear();
        let from = span.from;
        // A chain of a job that others share the work of moves a stripe, so that each gets some.
        let most = if self.alone { CHAIN_BYTES } else { stripe };
        let longest = pair.longest.min(most);
        let bytes = fill(&self.plan, span, pair, list, room, longest, u64::from(most));
        let done = Span { from, to: span.from };
        if span.is_empty() {
            self.todo.pop();
        }
        let is_whole = self.todo.is_empty();
        // All of the job is on this queue pair, and what follows it there follows all of it.
        let in_band = is_whole && self.alone && pair.can_send();
        let notification = self.notification.take_if(|_| in_band);
        let notified = notification.is_some();
        if let Some(payload) = &notification {
            pair.add_bound(list, payload);
        }
        list.signal_last();
        self.outstanding += 1;
        self.begun = true;
        self.notified |= notified;
        // SAFETY: the plan's regions are counted as used until the transfer ends, which is not before its chains have
        // completed or their queue pair has been destroyed.
        unsafe { pair.post(list, true, Some(slot), (done, bytes)) }
    }
}

/// Turns the part of a plan into requests, as far as the list has room, and moves its beginning on. The answer is how many
/// bytes they move.
#[inline]
fn fill(
    plan: &PlanInner,
    span: &mut Span,
    pair: &Pair,
    list: &mut SendList,
    room: usize,
    longest: u32,
    most: u64,
) -> u64 {
    let write = plan.operation == Operation::Write;
    let requests = &plan.rdma;
    let max_sge = if write { pair.max_sge } else { pair.max_sge_read };
    let (rail, peer_rail) = (pair.rail, pair.peer_rail);
    let key_of = |region: u32| {
        plan.regions.get(region as usize).map_or(0, |region| region.registrations.key(rail))
    };
    // Nearly always all are of one region.
    let mut known = requests.pieces.get(span.from.piece as usize).map_or(0, |piece| piece.region);
    let mut lkey = key_of(known);
    let mut moved = 0;
    let at = &mut span.from;
    while list.len() < room
        && moved < most
        && (at.run, at.run_done) != (span.to.run, span.to.run_done)
    {
        let Some(run) = requests.runs.get(at.run as usize) else { break };
        let end = if at.run == span.to.run { span.to.run_done } else { run.len };
        let mut left = (end - at.run_done).min(longest);
        let rkey = requests
            .keys
            .get(run.region as usize)
            .and_then(|keys| keys.get(peer_rail))
            .copied()
            .unwrap_or(0);
        list.rdma(write, pair.id_behind(list.len()), run.addr + u64::from(at.run_done), rkey);
        let mut entries = 0;
        while left > 0 && entries < max_sge {
            let Some(piece) = requests.pieces.get(at.piece as usize) else { break };
            if piece.region != known {
                (known, lkey) = (piece.region, key_of(piece.region));
            }
            let len = (piece.len - at.piece_done).min(left);
            list.piece(piece.addr + u64::from(at.piece_done), len, lkey);
            entries += 1;
            left -= len;
            moved += u64::from(len);
            at.run_done += len;
            at.piece_done += len;
            if at.piece_done == piece.len {
                (at.piece, at.piece_done) = (at.piece + 1, 0);
            }
        }
        if at.run_done == run.len {
            (at.run, at.run_done) = (at.run + 1, 0);
        } else if entries == 0 {
            // A plan without a piece for a run: there is none.
            break;
        }
    }
    moved
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ALL: [Phase; 4] = [Phase::Off, Phase::Connecting, Phase::Up, Phase::Down];

    fn link(phase: Phase, offers: bool, deadline: Option<Instant>) -> Link {
        Link { phase, deadline, ..Link::new(7, offers, 1 << 20) }
    }

    #[test]
    fn whatever_is_waited_for_has_an_end() {
        let now = Instant::now();
        let late = |phase, offers| link(phase, offers, Some(now)).take_late(now);
        assert_eq!(late(Phase::Connecting, true), Some(Late::Conclude));
        assert_eq!(late(Phase::Connecting, false), Some(Late::GiveUp));
        for offers in [true, false] {
            assert_eq!(late(Phase::Down, offers), Some(Late::Close), "a peer that never answers");
            assert_eq!(late(Phase::Up, offers), None);
        }
        assert_eq!(late(Phase::Off, true), Some(Late::Offer));
        assert_eq!(late(Phase::Off, false), None, "the other side offers, or nobody");
    }

    #[test]
    fn a_timer_that_is_early_or_late_finds_nothing() {
        let now = Instant::now();
        for (phase, offers) in ALL.into_iter().flat_map(|phase| [(phase, true), (phase, false)]) {
            let soon = now + Duration::from_millis(1);
            let mut waiting = link(phase, offers, Some(soon));
            assert_eq!(waiting.take_late(now), None);
            assert_eq!(waiting.deadline, Some(soon), "{phase:?}: it is still waited for");
            let first = waiting.take_late(soon);
            assert_eq!(waiting.deadline, None, "{phase:?}");
            assert_eq!(waiting.take_late(soon), None, "{phase:?}: once, {first:?}");
            assert_eq!(link(phase, offers, None).take_late(soon), None, "{phase:?}");
        }
    }
}
