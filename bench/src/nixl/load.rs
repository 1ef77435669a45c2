//! Scenario `decode-under-prefill`: small reads and large writes of one caller, through one agent.

use std::collections::VecDeque;

use anyhow::{Result, anyhow};

use super::case::NixlCase;
use super::contents::{Before, Blocks, Nudge};
use super::driver::Driver;
use super::layout::NixlLayout;
use super::wire::Outcome;
use crate::case::Operation;
use crate::measure::{LoadOutcome, LoadShape, Phase, Posting, READ_SLOTS, run_phase};
use crate::polling::complete_now;

/// The slot of the write, behind those of the reads.
const BULK_SLOT: usize = READ_SLOTS;

/// The prepared transfers of a load, and which of them are under way.
struct Caller<'a, D: Driver> {
    agent: &'a D,
    /// One per slot; the write is the last.
    prepared: Vec<D::Prepared>,
    in_flight: VecDeque<usize>,
    cursor: usize,
    /// Slots that were posted.
    posted: [bool; READ_SLOTS + 1],
}

impl<D: Driver> Caller<'_, D> {
    fn take_ended(&mut self, position: usize) -> Result<Option<usize>> {
        let Some(&slot) = self.in_flight.get(position) else { return Ok(None) };
        if !self.agent.is_finished(&self.prepared[slot])? {
            return Ok(None);
        }
        self.in_flight.remove(position);
        Ok(Some(slot))
    }
}

impl<D: Driver> Posting for Caller<'_, D> {
    #[inline]
    fn post(&mut self, slot: usize) -> Result<()> {
        // One that is over already is found by the next look.
        self.agent.post(&self.prepared[slot])?;
        self.in_flight.push_back(slot);
        self.posted[slot] = true;
        Ok(())
    }

    /// Looks at each in turn: a caller with two kinds of transfer cannot know which ends next.
    #[inline]
    fn poll_finished(&mut self) -> Result<Option<usize>> {
        if self.in_flight.is_empty() {
            return Ok(None);
        }
        self.cursor = (self.cursor + 1) % self.in_flight.len();
        self.take_ended(self.cursor)
    }

    async fn relax(&mut self) {}
}

/// Runs the phases one after the other, each as long, with contents of its own, and checks what it moved; with no duration
/// every transfer once. The target checks what was written last.
pub(super) fn run<D: Driver>(
    agent: &D,
    case: &NixlCase,
    shape: LoadShape,
    sequence: u64,
    duration_ns: u64,
    seed: u64,
) -> Result<Outcome> {
    let layout = NixlLayout::new(case, seed);
    let blocks = Blocks { agent, case, layout: &layout };
    let renew = |tag: u64| {
        blocks.renew(sequence);
        agent.arena().fill(layout.bulk, shape.bulk_bytes, tag, BULK_SLOT as u64);
    };
    renew(if duration_ns > 0 { Before::Untimed.tag(sequence) } else { sequence });
    let mut prepared: Vec<D::Prepared> = (0..READ_SLOTS)
        .map(|slot| agent.prepare(Operation::Read, layout.slot(slot, 1), case.block_bytes))
        .collect::<Result<_>>()?;
    let bulk = [layout.bulk];
    prepared.push(agent.prepare(Operation::Write, (&bulk, &bulk), shape.bulk_bytes)?);
    let read_back = agent.prepare(Operation::Read, (&bulk, &bulk), shape.bulk_bytes)?;
    let nudge = Nudge::new(agent, Operation::Read, &layout)?;
    for transfer in &prepared {
        agent.transfer(transfer)?;
    }
    blocks.check(sequence, |_| true)?;
    let posted = [false; READ_SLOTS + 1];
    let mut caller = Caller { agent, prepared, in_flight: VecDeque::new(), cursor: 0, posted };
    let mut load = LoadOutcome::default();
    for phase in Phase::ALL.into_iter().filter(|_| duration_ns > 0) {
        let tag = match phase {
            Phase::Reads | Phase::Bulk => Before::BulkAlone.tag(sequence),
            Phase::Both => sequence,
        };
        renew(tag);
        caller.posted.fill(false);
        nudge.wake()?;
        *load.of(phase) =
            complete_now(run_phase(&mut caller, phase, shape, BULK_SLOT, duration_ns))?;
        blocks.check(sequence, |slot| caller.posted[slot])?;
        if phase == Phase::Bulk {
            // The next phase writes to the same place, and the target looks only at the end.
            agent.arena().poison(layout.bulk, shape.bulk_bytes);
            agent.transfer(&read_back)?;
            check_bulk(agent, &layout, shape, tag)?;
        }
    }
    let operations = load.reads.served + load.both.served + load.both.bulk_operations;
    Ok(Outcome { operations, load: Some(load), ..Outcome::default() })
}

/// Target: renews the source of the reads, poisons the destination of the write.
pub(super) fn renew(
    agent: &impl Driver,
    case: &NixlCase,
    shape: LoadShape,
    sequence: u64,
    seed: u64,
) {
    let layout = NixlLayout::new(case, seed);
    for (index, &offset) in layout.remote.iter().enumerate() {
        agent.arena().fill(offset, case.block_bytes, sequence, index as u64);
    }
    agent.arena().poison(layout.bulk, shape.bulk_bytes);
}

/// Target: checks the destination of the write.
pub(super) fn verify(
    agent: &impl Driver,
    case: &NixlCase,
    shape: LoadShape,
    sequence: u64,
    seed: u64,
) -> Result<()> {
    check_bulk(agent, &NixlLayout::new(case, seed), shape, sequence)
}

fn check_bulk(agent: &impl Driver, layout: &NixlLayout, shape: LoadShape, tag: u64) -> Result<()> {
    agent
        .arena()
        .check(layout.bulk, shape.bulk_bytes, tag, BULK_SLOT as u64)
        .map_err(|mismatch| anyhow!("verification failed: the large write: {mismatch}"))
}
