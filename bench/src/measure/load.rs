//! Small reads at a rate beside large writes on the same connection, from one caller: what a decode node's fetches feel
//! of a prefill node's pushes.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{Initiator, OPERATION_TIMEOUT_NS, Points, Recorder, Schedule, points_of};
use crate::clock::now_ns;

/// How late a read may end, counted from the end of its phase, and still count as served: the last ones that are due
/// must not be charged with the end itself. The writes go on as long, or the end would be when all are served.
const GRACE_NS: u64 = 100_000_000;
/// Slots of the reads: more than this many are never outstanding, and later ones wait, which counts.
pub(crate) const READ_SLOTS: usize = 64;

/// The two kinds of transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LoadShape {
    /// Reads that are due per second.
    pub(crate) reads_per_s: u32,
    /// Bytes of each write.
    pub(crate) bulk_bytes: usize,
}

/// What runs during a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The reads alone.
    Reads,
    /// The writes alone, back to back.
    Bulk,
    /// Both.
    Both,
}

impl Phase {
    pub(crate) const ALL: [Self; 3] = [Self::Reads, Self::Bulk, Self::Both];

    fn reads(self) -> bool {
        self != Self::Bulk
    }

    fn bulk(self) -> bool {
        self != Self::Reads
    }
}

/// Where the caller posts: reads by their slot, the write as the slot behind those.
pub(crate) trait Posting {
    fn post(&mut self, slot: usize) -> Result<()>;
    /// A posted slot that has ended since the last call, if any.
    fn poll_finished(&mut self) -> Result<Option<usize>>;
    async fn relax(&mut self);
}

impl<I: Initiator> Posting for I {
    fn post(&mut self, slot: usize) -> Result<()> {
        Initiator::post(self, slot)
    }

    fn poll_finished(&mut self) -> Result<Option<usize>> {
        Initiator::poll_finished(self)
    }

    async fn relax(&mut self) {
        Initiator::relax(self).await;
    }
}

/// What became of a phase.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PhaseOutcome {
    /// Reads that the schedule asked for.
    pub(crate) due: u64,
    /// Reads of those that ended in time.
    pub(crate) served: u64,
    /// From the moment at which a read was due to its end; those that were never posted count with what they waited.
    pub(crate) response: Points,
    /// From the moment at which it was posted.
    pub(crate) service: Points,
    /// Writes that ended, and how long they took together.
    pub(crate) bulk_operations: u64,
    pub(crate) bulk_span_ns: u64,
}

/// Everything that one round measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LoadOutcome {
    pub(crate) reads: PhaseOutcome,
    pub(crate) bulk: PhaseOutcome,
    pub(crate) both: PhaseOutcome,
}

impl LoadOutcome {
    /// The place of a phase.
    pub(crate) fn of(&mut self, phase: Phase) -> &mut PhaseOutcome {
        match phase {
            Phase::Reads => &mut self.reads,
            Phase::Bulk => &mut self.bulk,
            Phase::Both => &mut self.both,
        }
    }
}

/// Runs one phase. Reads use the slots below [`READ_SLOTS`], the write is posted as slot `bulk_slot`.
pub(crate) async fn run_phase<P: Posting>(
    caller: &mut P,
    phase: Phase,
    shape: LoadShape,
    bulk_slot: usize,
    duration_ns: u64,
) -> Result<PhaseOutcome> {
    ensure!(bulk_slot >= READ_SLOTS, "the slot of the writes is one of a read");
    let due_in_all = if phase.reads() {
        ((duration_ns as f64 / 1e9 * f64::from(shape.reads_per_s)) as u64).max(1)
    } else {
        0
    };
    let mut recorder = Recorder::new(true);
    let mut outcome = PhaseOutcome { due: due_in_all, ..PhaseOutcome::default() };
    // Per slot: when the read was due and when it was posted; `None` where none is outstanding.
    let mut started: [Option<(u64, u64)>; READ_SLOTS] = [None; READ_SLOTS];
    let begin = now_ns();
    let schedule = Schedule::new(begin, f64::from(shape.reads_per_s));
    let limit = begin + duration_ns + GRACE_NS;
    let last = if phase.bulk() { limit } else { begin + duration_ns };
    let (mut posted, mut ended) = (0u64, 0u64);
    let (mut bulk_in_flight, mut bulk_end) = (false, begin);
    let mut progress_at = begin;
    loop {
        let mut now = now_ns();
        if phase.bulk() && !bulk_in_flight && now < limit {
            caller.post(bulk_slot)?;
            bulk_in_flight = true;
            progress_at = now;
            // Posting a long list, or waking who sends it, may take long; the reads must not pay twice for it.
            now = now_ns();
        }
        let mut more = posted < due_in_all && now < limit;
        let slot = (posted % READ_SLOTS as u64) as usize;
        if more && started[slot].is_none() && schedule.intended_ns(posted) <= now {
            caller.post(slot)?;
            started[slot] = Some((schedule.intended_ns(posted), now));
            posted += 1;
            progress_at = now;
            more = posted < due_in_all;
        }
        match caller.poll_finished()? {
            Some(slot) if slot == bulk_slot => {
                now = now_ns();
                outcome.bulk_operations += 1;
                (bulk_in_flight, bulk_end, progress_at) = (false, now, now);
            }
            Some(slot) => {
                now = now_ns();
                let Some((intended, at)) = started.get_mut(slot).and_then(Option::take) else {
                    bail!("slot {slot} ended without having been posted")
                };
                recorder.record(intended, at, now);
                outcome.served += u64::from(now < limit);
                ended += 1;
                progress_at = now;
            }
            None if !more && !bulk_in_flight && ended == posted && now >= last => break,
            None => {
                let outstanding = bulk_in_flight || ended < posted;
                if outstanding && now.saturating_sub(progress_at) > OPERATION_TIMEOUT_NS {
                    bail!("nothing of what was posted has ended within 30 s");
                }
                caller.relax().await;
            }
        }
    }
    recorder.record_unserved(&schedule, posted, due_in_all, now_ns());
    outcome.response = points_of(recorder.response());
    outcome.service = recorder.service().map(points_of).unwrap_or_default();
    outcome.bulk_span_ns = bulk_end - begin;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::polling::complete_now;

    const BULK: usize = READ_SLOTS;

    /// A system on the real clock: a read takes 5 us of its own, and waits for the write that is under way where
    /// `blocking`; a write takes 2 ms.
    struct Fake {
        blocking: bool,
        busy_until: u64,
        in_flight: Vec<(usize, u64)>,
    }

    impl Posting for Fake {
        fn post(&mut self, slot: usize) -> Result<()> {
            let now = now_ns();
            let ends = if slot == BULK { now + 2_000_000 } else { now + 5_000 };
            let ends = if self.blocking { ends.max(self.busy_until + 5_000) } else { ends };
            if slot == BULK {
                self.busy_until = ends;
            }
            self.in_flight.push((slot, ends));
            Ok(())
        }

        fn poll_finished(&mut self) -> Result<Option<usize>> {
            let now = now_ns();
            let ended = self.in_flight.iter().position(|&(_, at)| at <= now);
            Ok(ended.map(|at| self.in_flight.remove(at).0))
        }

        async fn relax(&mut self) {}
    }

    fn run(phase: Phase, blocking: bool, duration_ns: u64) -> PhaseOutcome {
        let mut fake = Fake { blocking, busy_until: 0, in_flight: Vec::new() };
        let shape = LoadShape { reads_per_s: 1000, bulk_bytes: 1 << 20 };
        let outcome = complete_now(run_phase(&mut fake, phase, shape, BULK, duration_ns));
        assert!(fake.in_flight.is_empty(), "something was left behind");
        outcome.expect("runs")
    }

    fn count(points: &Points) -> u64 {
        points.iter().map(|point| point.1).sum()
    }

    #[test]
    fn every_read_that_was_due_is_counted_whatever_became_of_it() {
        let alone = run(Phase::Reads, false, 100_000_000);
        assert_eq!((alone.due, alone.bulk_operations, alone.bulk_span_ns), (100, 0, 0));
        assert_eq!(count(&alone.response), 100);
        let both = run(Phase::Both, true, 100_000_000);
        assert_eq!((both.due, count(&both.response)), (100, 100));
        assert!(both.bulk_operations > 0 && both.bulk_span_ns > 0);
        assert!(both.served <= both.due && count(&both.service) <= both.due);
    }

    #[test]
    fn writes_alone_read_nothing() {
        let bulk = run(Phase::Bulk, false, 30_000_000);
        assert_eq!((bulk.due, bulk.served, count(&bulk.response)), (0, 0, 0));
        assert!(bulk.bulk_operations >= 1);
    }

    /// Mean of the points: robust on a machine that stops for a while.
    fn mean(points: &Points) -> f64 {
        let sum: f64 = points.iter().map(|&(ns, count)| ns as f64 * count as f64).sum();
        sum / count(points) as f64
    }

    #[test]
    fn reads_that_wait_for_writes_show_it_from_when_they_were_due() {
        let blocked = run(Phase::Both, true, 200_000_000);
        assert!(mean(&blocked.response) > 300_000.0, "{}", mean(&blocked.response));
        assert!(mean(&blocked.response) + 1.0 >= mean(&blocked.service));
    }

    #[test]
    fn what_never_ends_is_an_error_not_a_hang() {
        struct Deaf;
        impl Posting for Deaf {
            fn post(&mut self, _: usize) -> Result<()> {
                bail!("cannot post")
            }
            fn poll_finished(&mut self) -> Result<Option<usize>> {
                Ok(None)
            }
            async fn relax(&mut self) {}
        }
        let shape = LoadShape { reads_per_s: 1000, bulk_bytes: 1 };
        assert!(complete_now(run_phase(&mut Deaf, Phase::Both, shape, BULK, 1_000)).is_err());
    }
}
