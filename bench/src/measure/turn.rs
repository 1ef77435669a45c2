//! One pass: a stretch of operations between two pauses (in which contents are renewed and verified).

use anyhow::{Result, bail, ensure};

use super::{
    Initiator, LoadShape, OPERATION_TIMEOUT_NS, Phase, PhaseOutcome, Recorder, Schedule, Stamp,
    run_phase,
};
use crate::case::Operation;
use crate::clock::now_ns;

/// Untimed operations before a pass: a lane that parked during the pause is spinning again, caches and branch
/// predictors have seen the path.
const WARM_OPERATIONS: usize = 16;
/// How much later than planned an open loop may end before it is cut off: what it still owes is then accounted for.
/// Generous enough for a machine that was busy elsewhere for a moment.
const OVERRUN_NS: u64 = 250_000_000;

/// What to do in a pass.
#[derive(Clone, Debug)]
pub(crate) struct Pass {
    pub(crate) operation: Operation,
    pub(crate) slots: usize,
    pub(crate) window: usize,
    /// Operations to do, unless `until_ns` comes first.
    pub(crate) operations: u64,
    /// When to stop starting operations.
    pub(crate) until_ns: Option<u64>,
    /// Operations per second of an open loop.
    pub(crate) rate: Option<f64>,
    /// Content tag of the pass.
    pub(crate) sequence: u64,
    pub(crate) notification_bytes: usize,
    /// Per slot, the arena offset and value of the last word that a bound write delivers.
    pub(crate) last_words: Vec<(u64, u64)>,
    /// Sequence number of the pass's first notification.
    pub(crate) first_notification: u64,
    /// A phase of a load and how long it takes; then nothing else of the above says what to do but `slots`.
    pub(crate) phase: Option<(Phase, LoadShape, u64)>,
}

/// What became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PassOutcome {
    /// Finished operations, each recorded.
    pub(crate) operations: u64,
    /// From the first post to the last completion.
    pub(crate) span_ns: u64,
    /// Operations of the schedule that were cut off; recorded with what they had waited.
    pub(crate) unserved: u64,
    /// Notifications sent, including those of warm-up.
    pub(crate) notifications: u64,
    /// Of a phase of a load, whose latencies are here and not in the recorder.
    pub(crate) phase: Option<PhaseOutcome>,
}

/// Runs a pass.
pub(crate) async fn run_pass<I: Initiator>(
    initiator: &mut I,
    pass: &Pass,
    recorder: &mut Recorder,
) -> Result<PassOutcome> {
    ensure!(
        pass.window >= 1 && pass.window <= pass.slots,
        "a window of {} on {} slots",
        pass.window,
        pass.slots
    );
    if pass.operation.notifies() {
        return run_notifications(initiator, pass, recorder).await;
    }
    for _ in 0..WARM_OPERATIONS {
        initiator.post(pass.slots)?;
        initiator.finished().await?;
    }
    if let Some((phase, shape, duration_ns)) = pass.phase {
        let bulk_slot = pass.slots + 1;
        // Whatever the phase, one write: both sides can then check it.
        initiator.post(bulk_slot)?;
        initiator.finished().await?;
        let done = run_phase(initiator, phase, shape, bulk_slot, duration_ns).await?;
        let operations = done.response.iter().map(|point| point.1).sum::<u64>();
        let ended = done.service.iter().map(|point| point.1).sum();
        let unserved = operations - ended;
        return Ok(PassOutcome {
            operations: ended,
            unserved,
            phase: Some(done),
            ..PassOutcome::default()
        });
    }
    match pass.rate {
        None if pass.window == 1 => run_serial(initiator, pass, recorder).await,
        None => run_window(initiator, pass, recorder, None).await,
        Some(rate) => run_window(initiator, pass, recorder, Some(rate)).await,
    }
}

/// Closed loop, one operation at a time: the latency path, kept as short as an application's.
async fn run_serial<I: Initiator>(
    initiator: &mut I,
    pass: &Pass,
    recorder: &mut Recorder,
) -> Result<PassOutcome> {
    let begin = now_ns();
    let (mut operations, mut end) = (0, begin);
    while operations < pass.operations && pass.until_ns.is_none_or(|until| end < until) {
        let slot = (operations % pass.slots as u64) as usize;
        let start = now_ns();
        initiator.post(slot)?;
        initiator.finished().await?;
        end = now_ns();
        recorder.record(start, start, end);
        operations += 1;
    }
    Ok(PassOutcome { operations, span_ns: end - begin, ..PassOutcome::default() })
}

/// Several operations outstanding, closed or open.
async fn run_window<I: Initiator>(
    initiator: &mut I,
    pass: &Pass,
    recorder: &mut Recorder,
    rate: Option<f64>,
) -> Result<PassOutcome> {
    let slots = pass.slots as u64;
    // Per slot: when it should have started and when it did.
    let mut started = vec![(0u64, 0u64); pass.slots];
    let mut idle = vec![true; pass.slots];
    let begin = now_ns();
    let schedule = rate.map(|rate| Schedule::new(begin, rate));
    let cut_off = schedule.map(|schedule| schedule.intended_ns(pass.operations) + OVERRUN_NS);
    let (mut posted, mut finished, mut end) = (0u64, 0u64, begin);
    let mut progress_at = begin;
    loop {
        let mut now = now_ns();
        let stop = pass.until_ns.is_some_and(|until| now >= until)
            || cut_off.is_some_and(|cut_off| now >= cut_off);
        let more = posted < pass.operations && !stop;
        if !more && posted == finished {
            break;
        }
        let slot = (posted % slots) as usize;
        if more && posted - finished < pass.window as u64 && idle[slot] {
            let intended = schedule.map_or(now, |schedule| schedule.intended_ns(posted));
            if intended <= now {
                initiator.post(slot)?;
                started[slot] = (intended, now);
                idle[slot] = false;
                posted += 1;
                progress_at = now;
                // More may be due at once; but completions are looked at in between, or a backlog of posts would
                // delay the moment at which they are seen.
            } else if posted == finished {
                initiator.idle_until(intended).await;
                continue;
            }
        }
        match initiator.poll_finished()? {
            Some(slot) => {
                now = now_ns();
                let (intended, start) = started[slot];
                recorder.record(intended, start, now);
                idle[slot] = true;
                finished += 1;
                (end, progress_at) = (now, now);
            }
            None if now.saturating_sub(progress_at) > OPERATION_TIMEOUT_NS && posted > finished => {
                bail!("{} of {posted} posted transfers did not finish in 30 s", posted - finished);
            }
            None => initiator.relax().await,
        }
    }
    let mut unserved = 0;
    if let Some(schedule) = schedule
        && posted < pass.operations
    {
        let now = now_ns();
        // With a stop time, what was due later was never asked for.
        let due = (posted..pass.operations)
            .take_while(|&n| schedule.intended_ns(n) < pass.until_ns.unwrap_or(now));
        unserved = due.count() as u64;
        recorder.record_unserved(&schedule, posted, posted + unserved, now);
        end = now;
    }
    Ok(PassOutcome {
        operations: finished,
        span_ns: end - begin,
        unserved,
        ..PassOutcome::default()
    })
}

/// Notifications, answered one by one by the target's application; free-standing or bound to a write.
async fn run_notifications<I: Initiator>(
    initiator: &mut I,
    pass: &Pass,
    recorder: &mut Recorder,
) -> Result<PassOutcome> {
    let mut payload = vec![0u8; pass.notification_bytes.max(Stamp::LEN)];
    crate::pattern::fill(&mut payload, pass.sequence, 0);
    let mut sequence = pass.first_notification;
    for _ in 0..WARM_OPERATIONS {
        // A send time of 0 tells the target that this one is not part of the measurement.
        Stamp { sequence, sent_ns: 0, last_word_at: 0, last_word: 0 }.encode(&mut payload);
        initiator.notify(&payload)?;
        expect_answer(initiator, sequence).await?;
        sequence += 1;
    }
    let bound = pass.operation == Operation::WriteNotify;
    let begin = now_ns();
    let schedule = pass.rate.map(|rate| Schedule::new(begin, rate));
    let cut_off =
        schedule.map_or(u64::MAX, |schedule| schedule.intended_ns(pass.operations) + OVERRUN_NS);
    let (mut operations, mut end) = (0, begin);
    while operations < pass.operations && pass.until_ns.is_none_or(|until| end < until) {
        let mut start = now_ns();
        let mut intended = start;
        if let Some(schedule) = schedule {
            intended = schedule.intended_ns(operations);
            if intended > start {
                initiator.idle_until(intended).await;
                start = now_ns();
            } else if start > cut_off {
                break;
            }
        }
        let slot = (operations % pass.slots as u64) as usize;
        let (last_word_at, last_word) = pass.last_words.get(slot).copied().unwrap_or_default();
        let stamp = Stamp { sequence, sent_ns: intended, last_word_at, last_word };
        stamp.encode(&mut payload);
        if bound {
            initiator.post_with_notification(slot, &payload)?;
        } else {
            initiator.notify(&payload)?;
        }
        expect_answer(initiator, sequence).await?;
        end = now_ns();
        if bound {
            // The answer implies that the data arrived; the completion itself may still be on its way.
            initiator.finished().await?;
        }
        recorder.record(intended, start, end);
        sequence += 1;
        operations += 1;
    }
    let mut unserved = 0;
    if let Some(schedule) = schedule {
        let now = now_ns();
        let limit = pass.until_ns.unwrap_or(now);
        let due =
            (operations..pass.operations).take_while(|&n| schedule.intended_ns(n) < limit.min(now));
        unserved = due.count() as u64;
        recorder.record_unserved(&schedule, operations, operations + unserved, now);
    }
    Ok(PassOutcome {
        operations,
        span_ns: end - begin,
        unserved,
        notifications: sequence - pass.first_notification,
        phase: None,
    })
}

async fn expect_answer<I: Initiator>(initiator: &mut I, sequence: u64) -> Result<()> {
    let answered = initiator.answer().await?;
    ensure!(
        answered == sequence,
        "verification failed: notification {sequence} was answered as {answered}: lost, repeated or out of order"
    );
    Ok(())
}

#[cfg(test)]
mod tests;
