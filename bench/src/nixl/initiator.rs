//! The measuring side: posts, polls without yielding, and keeps the times.

use std::cell::Cell;

use anyhow::{Context as _, Result, bail};

use super::case::NixlCase;
use super::contents::{Before, Blocks, Nudge};
use super::driver::Driver;
use super::fault;
use super::layout::NixlLayout;
use super::load;
use super::replay;
use super::stamp::Stamped;
use super::timing::{Length, Until, time, transfer_rest, warm_up};
use super::wire::{Order, Outcome, Reply};
use crate::case::Operation;
use crate::clock::now_ns;
use crate::cpu::Usage;
use crate::measure::{histogram, points_of};
use crate::parent::Parent;
use crate::units::from_hex;

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

/// Obeys orders until they end. `cores`: of the threads that post and poll, where there are several.
pub(crate) fn run(
    agent: &mut impl Driver,
    parent: &Parent<Order>,
    seed: u64,
    mut meter: Meter,
    cores: &[usize],
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
        let length = (duration_ns, iterations);
        let outcome = pass(agent, &case, sequence, length, seed, (meter, cores));
        parent.reply(&Reply::Ran(Box::new(outcome.with_context(|| case.id())?)))?;
    }
    Ok(())
}

/// Runs a case once, and verifies what it moved to this side.
pub(super) fn pass(
    agent: &mut impl Driver,
    case: &NixlCase,
    sequence: u64,
    length: Length,
    seed: u64,
    (meter, cores): (Meter, &[usize]),
) -> Result<Outcome> {
    agent.begin_pass();
    if let Some(trace) = &case.trace {
        replay::run(agent, case, trace, sequence, length.0, seed)
    } else if let Some(shape) = case.load {
        load::run(agent, case, shape, sequence, length.0, seed)
    } else if case.operation == Operation::Notify {
        ping_pong(agent, case, length, meter)
    } else {
        transfers(agent, case, sequence, length, seed, (meter, cores))
    }
}

fn transfers<D: Driver>(
    agent: &D,
    case: &NixlCase,
    sequence: u64,
    length: Length,
    seed: u64,
    (meter, cores): (Meter, &[usize]),
) -> Result<Outcome> {
    let layout = NixlLayout::new(case, seed);
    let blocks = Blocks { agent, case, layout: &layout };
    let timed = length.0 > 0;
    blocks.renew(if timed { Before::Untimed.tag(sequence) } else { sequence });
    let prepared: Vec<D::Prepared> = (0..case.all_slots())
        .map(|slot| agent.prepare(case.operation, layout.slot(slot, case.blocks), case.block_bytes))
        .collect::<Result<_>>()?;
    let mut outcome = Outcome::default();
    for transfer in &prepared {
        agent.transfer(transfer)?;
        if outcome.first_ended_ns == 0 {
            outcome.first_ended_ns = now_ns();
        }
    }
    if timed {
        if D::PREPARES {
            measure_preparing(agent, &prepared[0], &mut outcome)?;
        }
        let (duration_ns, iterations) = length;
        let length = (duration_ns, iterations.share(case.threads));
        let nudge = Nudge::new(agent, case.operation, &layout)?;
        // Else what the untimed ones moved would be what is checked.
        let renew = || {
            blocks.renew(sequence);
            nudge.wake()
        };
        measure_transfers(agent, prepared, length, renew, &mut outcome, (meter, cores))?;
        outcome.bytes = outcome.operations * case.bytes() as u64;
    }
    blocks.check(sequence, |_| true)?;
    Ok(outcome)
}

fn measure_transfers<D: Driver>(
    agent: &D,
    mut prepared: Vec<D::Prepared>,
    length: Length,
    renew: impl FnOnce() -> Result<()>,
    outcome: &mut Outcome,
    (meter, cores): (Meter, &[usize]),
) -> Result<()> {
    let begin = Cell::default();
    let times = if cores.len() > 1 {
        let slots = prepared.len() / cores.len();
        let mut lists: Vec<Vec<D::Prepared>> = Vec::new();
        while !prepared.is_empty() {
            let rest = prepared.split_off(slots.min(prepared.len()));
            lists.push(std::mem::replace(&mut prepared, rest));
        }
        let mut renewed = Ok(());
        let begun = || {
            renewed = renew();
            begin.set(meter.read());
        };
        // While the threads are there: the context switches of one that has ended are not to be had from outside.
        let ended = || meter.book(begin.get(), outcome);
        let times = agent.time_in_threads(&lists, cores, length, (begun, ended))?;
        renewed?;
        times
    } else {
        let transfer = |transfer: &D::Prepared| agent.transfer(transfer);
        warm_up(&prepared, length, transfer)?;
        renew()?;
        begin.set(meter.read());
        let times = time(&prepared, length, transfer)?;
        meter.book(begin.get(), outcome);
        transfer_rest(&prepared, &times, transfer)?;
        times
    };
    times.book(outcome);
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
