//! The other side: an application that answers notifications, and memory that transfers read from and write into.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};

use super::case::NixlCase;
use super::driver::Driver;
use super::layout::NixlLayout;
use super::load;
use super::stamp::Arrivals;
use super::wire::{Order, Reply};
use crate::case::Operation;
use crate::parent::Parent;

/// Polls between two looks for an order, which would be a cost of their own otherwise.
const POLLS_PER_LOOK: u32 = 256;
/// How long a sleeping application sleeps between polls.
const PAUSE: Duration = Duration::from_millis(1);

/// Polls and obeys until the orders end.
pub(crate) fn run(
    agent: &mut impl Driver,
    parent: &Parent<Order>,
    seed: u64,
    sleeps: bool,
) -> Result<()> {
    let mut asleep = sleeps;
    let mut arrivals = Arrivals::new();
    loop {
        let order = if asleep {
            agent.answer(|text, at_ns| arrivals.book(text, at_ns))?;
            parent.sleep(PAUSE)?
        } else {
            for _ in 0..POLLS_PER_LOOK {
                agent.answer(|text, at_ns| arrivals.book(text, at_ns))?;
            }
            parent.poll()?
        };
        match order {
            None => {}
            Some(None) => return Ok(()),
            Some(Some(order)) => {
                if let Order::Begin { case, .. } = &order {
                    // Who has to answer must look.
                    asleep = sleeps && case.operation != Operation::Notify;
                }
                obey(agent, parent, order, seed, &mut arrivals)?;
            }
        }
    }
}

fn obey(
    agent: &impl Driver,
    parent: &Parent<Order>,
    order: Order,
    seed: u64,
    arrivals: &mut Arrivals,
) -> Result<()> {
    match order {
        Order::Begin { case, sequence } => {
            renew_case(agent, &case, sequence, seed);
            parent.reply(&Reply::Begun)
        }
        Order::End { case, sequence } => {
            verify_case(agent, &case, sequence, seed).with_context(|| case.id())?;
            parent.reply(&Reply::Ended { one_way: arrivals.take() })
        }
        other => bail!("a target cannot obey {other:?}"),
    }
}

/// Renews the source of reads, poisons the destination of writes.
pub(super) fn renew_case(agent: &impl Driver, case: &NixlCase, sequence: u64, seed: u64) {
    match case.load {
        Some(shape) => load::renew(agent, case, shape, sequence, seed),
        None => renew(agent, case, sequence, seed),
    }
}

/// Checks the destination of writes.
pub(super) fn verify_case(
    agent: &impl Driver,
    case: &NixlCase,
    sequence: u64,
    seed: u64,
) -> Result<()> {
    match case.load {
        Some(shape) => load::verify(agent, case, shape, sequence, seed),
        None => verify(agent, case, sequence, seed),
    }
}

fn renew(agent: &impl Driver, case: &NixlCase, sequence: u64, seed: u64) {
    for (index, &offset) in NixlLayout::new(case, seed).remote.iter().enumerate() {
        match case.operation {
            Operation::Read => {
                agent.arena().fill(offset, case.block_bytes, sequence, index as u64);
            }
            _ => agent.arena().poison(offset, case.block_bytes),
        }
    }
}

fn verify(agent: &impl Driver, case: &NixlCase, sequence: u64, seed: u64) -> Result<()> {
    if case.operation != Operation::Write {
        return Ok(());
    }
    for (index, &offset) in NixlLayout::new(case, seed).remote.iter().enumerate() {
        agent
            .arena()
            .check(offset, case.block_bytes, sequence, index as u64)
            .map_err(|mismatch| anyhow!("verification failed: block {index}: {mismatch}"))?;
    }
    Ok(())
}
