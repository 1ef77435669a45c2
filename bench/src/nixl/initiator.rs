//! The measuring side: posts, polls without yielding, and keeps the times.

use anyhow::{Context as _, Result, bail};

use super::case::NixlCase;
use super::driver::Driver;
use super::fault;
use super::layout::NixlLayout;
use super::load;
use super::replay;
use super::stamp::Stamped;
use super::wire::{Iterations, Order, Outcome, Reply};
use crate::case::Operation;
use crate::clock::now_ns;
use crate::cpu::Usage;
use crate::measure::{histogram, points_of};
use crate::parent::Parent;
use crate::units::from_hex;

/// Untimed operations at the beginning of a timed pass: what slept during the pause is awake again.
const WARM_OPERATIONS: u64 = 16;
/// Timed operations, even when the time is over.
const MIN_OPERATIONS: u64 = 3;
/// Timed preparations of a case.
const PREPARATIONS: usize = 50;

/// The two processes, for what they use of the processors.
#[derive(Clone, Copy)]
pub(crate) struct Meter {
    pub(crate) own: i32,
    pub(crate) target: i32,
}

impl Meter {
    fn read(self) -> (Usage, Usage) {
        (Usage::of(self.own), Usage::of(self.target))
    }

    /// Books what was used since `begin`.
    fn book(self, begin: (Usage, Usage), outcome: &mut Outcome) {
        let (own, target) = self.read();
        outcome.used_initiator = own.since(begin.0);
        outcome.used_target = target.since(begin.1);
    }
}

/// Obeys orders until they end.
pub(crate) fn run(
    agent: &mut impl Driver,
    parent: &Parent<Order>,
    seed: u64,
    mut meter: Meter,
) -> Result<()> {
    while let Some(order) = parent.wait()? {
        let (case, sequence, duration_ns, iterations) = match order {
            Order::Run { case, sequence, duration_ns, iterations } => {
                (case, sequence, duration_ns, iterations)
            }
            Order::Watch { case, limit_ns } => {
                let watched = fault::watch(agent, &case, limit_ns, seed)?;
                parent.reply(&Reply::Watched(watched))?;
                continue;
            }
            // Another target in the place of one that is gone.
            Order::Meet { metadata, address, pid } => {
                let metadata = from_hex(&metadata).context("metadata that is no hexadecimal")?;
                agent.meet(&metadata, address)?;
                meter.target = pid;
                parent.reply(&Reply::Met)?;
                continue;
            }
            order => bail!("an initiator cannot obey {order:?}"),
        };
        let outcome = if let Some(trace) = &case.trace {
            replay::run(agent, &case, trace, sequence, duration_ns, seed)
        } else if let Some(shape) = case.load {
            load::run(agent, &case, shape, sequence, duration_ns, seed)
        } else if case.operation == Operation::Notify {
            ping_pong(agent, &case, (duration_ns, iterations), meter)
        } else {
            transfers(agent, &case, sequence, (duration_ns, iterations), seed, meter)
        };
        parent.reply(&Reply::Ran(Box::new(outcome.with_context(|| case.id())?)))?;
    }
    Ok(())
}

/// How long a pass takes: a time, or a number of operations in its place.
type Length = (u64, Iterations);

/// Whether to go on with a timed or warming loop.
struct Until {
    at_ns: u64,
    least: u64,
    most: u64,
}

impl Until {
    /// A part of the warm-up that a quarter of the pass's duration bounds: one operation of a long list may take long.
    fn warm(begin_ns: u64, (duration_ns, iterations): Length) -> Self {
        match iterations.warm {
            Some(exactly) => Self { at_ns: 0, least: exactly, most: exactly },
            None => Self { at_ns: begin_ns + duration_ns / 4, least: 1, most: WARM_OPERATIONS },
        }
    }

    fn timed(begin_ns: u64, (duration_ns, iterations): Length) -> Self {
        match iterations.timed {
            Some(exactly) => Self { at_ns: 0, least: exactly, most: exactly },
            None => Self { at_ns: begin_ns + duration_ns, least: MIN_OPERATIONS, most: u64::MAX },
        }
    }

    fn goes_on(&self, done: u64) -> bool {
        done < self.least || (done < self.most && now_ns() < self.at_ns)
    }
}

fn transfers<D: Driver>(
    agent: &D,
    case: &NixlCase,
    sequence: u64,
    length: Length,
    seed: u64,
    meter: Meter,
) -> Result<Outcome> {
    let layout = NixlLayout::new(case, seed);
    let reads = case.operation == Operation::Read;
    for (index, &offset) in layout.local.iter().enumerate() {
        if reads {
            agent.arena().poison(offset, case.block_bytes);
        } else {
            agent.arena().fill(offset, case.block_bytes, sequence, index as u64);
        }
    }
    let prepared: Vec<D::Prepared> = (0..case.slots())
        .map(|slot| agent.prepare(case.operation, layout.slot(slot, case.blocks), case.block_bytes))
        .collect::<Result<_>>()?;
    let mut outcome = Outcome::default();
    for transfer in &prepared {
        agent.transfer(transfer)?;
    }
    if length.0 > 0 {
        if D::PREPARES {
            measure_preparing(agent, &prepared[0], &mut outcome)?;
        }
        measure_transfers(agent, &prepared, length, &mut outcome, meter)?;
        outcome.bytes = outcome.operations * case.bytes() as u64;
    }
    if reads {
        // The target's blocks were filled in the order of its own offsets, which is that of the lists.
        for (index, &offset) in layout.local.iter().enumerate() {
            agent.arena().check(offset, case.block_bytes, sequence, index as u64).map_err(
                |mismatch| anyhow::anyhow!("verification failed: block {index}: {mismatch}"),
            )?;
        }
    }
    Ok(outcome)
}

fn measure_transfers<D: Driver>(
    agent: &D,
    prepared: &[D::Prepared],
    length: Length,
    outcome: &mut Outcome,
    meter: Meter,
) -> Result<()> {
    let slots = prepared.len() as u64;
    let next = |done: u64| &prepared[(done % slots) as usize];
    let warm = Until::warm(now_ns(), length);
    let mut warmed = 0;
    while warm.goes_on(warmed) {
        agent.transfer(next(warmed))?;
        warmed += 1;
    }
    let (mut completion, mut post) = (histogram(), histogram());
    let begin = meter.read();
    let until = Until::timed(now_ns(), length);
    let mut done = 0;
    while until.goes_on(done) {
        let times = agent.transfer(next(done))?;
        completion.saturating_record(times.completed_ns);
        if let Some(posted_ns) = times.posted_ns {
            post.saturating_record(posted_ns);
        }
        done += 1;
    }
    meter.book(begin, outcome);
    outcome.operations = done;
    outcome.completion = points_of(&completion);
    outcome.post = points_of(&post);
    Ok(())
}

/// Times the preparation of a list whose descriptors NIXL has already: what is left is NIXL's and the backend's.
fn measure_preparing<D: Driver>(
    agent: &D,
    prepared: &D::Prepared,
    outcome: &mut Outcome,
) -> Result<()> {
    let mut prepare = histogram();
    for _ in 0..PREPARATIONS {
        let started = now_ns();
        let request = agent.request(prepared)?;
        prepare.saturating_record(now_ns() - started);
        drop(request);
    }
    outcome.prepare = points_of(&prepare);
    Ok(())
}

fn ping_pong<D: Driver>(
    agent: &mut D,
    case: &NixlCase,
    length: Length,
    meter: Meter,
) -> Result<Outcome> {
    // Text, because the bindings read notifications as text.
    let mut stamped = Stamped::new(case.notification_bytes);
    let mut exchange = |agent: &mut D, measured: bool| -> Result<u64> {
        let started = now_ns();
        let text = stamped.at(started, measured);
        agent.notify(text)?;
        agent.await_answer(text)?;
        Ok(now_ns() - started)
    };
    let mut outcome = Outcome::default();
    exchange(agent, false)?;
    if length.0 == 0 {
        return Ok(outcome);
    }
    let warm = Until::warm(now_ns(), length);
    let mut warmed = 0;
    while warm.goes_on(warmed) {
        exchange(agent, false)?;
        warmed += 1;
    }
    let mut round_trip = histogram();
    let begin = meter.read();
    let until = Until::timed(now_ns(), length);
    while until.goes_on(outcome.operations) {
        round_trip.saturating_record(exchange(agent, true)?);
        outcome.operations += 1;
    }
    meter.book(begin, &mut outcome);
    outcome.completion = points_of(&round_trip);
    Ok(outcome)
}
