//! Scenario `trace` on the initiator's side: every request is prepared and posted when it arrives, as an engine does.

use std::collections::VecDeque;

use anyhow::{Result, bail};

use super::case::NixlCase;
use super::contents::{Blocks, Nudge};
use super::driver::Driver;
use super::layout::NixlLayout;
use super::trace::Trace;
use super::wire::Outcome;
use crate::clock::now_ns;
use crate::measure::{OPERATION_TIMEOUT_NS, histogram, points_of};

/// Requests that are under way at a time; later ones wait, which counts.
const MOST_OUTSTANDING: usize = 64;

/// A request that is under way.
struct Outstanding<P> {
    prepared: P,
    due_ns: u64,
}

/// Reads all blocks once, untimed, and checks every block; with a duration, then what the recording asks for, and checks what
/// that was.
pub(super) fn run<D: Driver>(
    agent: &D,
    case: &NixlCase,
    trace: &Trace,
    sequence: u64,
    duration_ns: u64,
    seed: u64,
) -> Result<Outcome> {
    let layout = NixlLayout::new(case, seed);
    let blocks = Blocks { agent, case, layout: &layout };
    blocks.renew(sequence);
    let (local, remote) = layout.slot(0, case.blocks);
    let all = agent.prepare(case.operation, (local, remote), case.block_bytes)?;
    agent.transfer(&all)?;
    drop(all);
    blocks.check(sequence, |_| true)?;
    let mut outcome = Outcome::default();
    if duration_ns > 0 {
        let nudge = Nudge::new(agent, case.operation, &layout)?;
        blocks.renew(sequence);
        nudge.wake()?;
        let mut read = vec![false; case.blocks];
        replay(agent, case, trace, (local, remote), &mut read, &mut outcome)?;
        blocks.check(sequence, |block| read[block])?;
    }
    Ok(outcome)
}

fn replay<D: Driver>(
    agent: &D,
    case: &NixlCase,
    trace: &Trace,
    (local, remote): (&[u64], &[u64]),
    read: &mut [bool],
    outcome: &mut Outcome,
) -> Result<()> {
    let (mut response, mut prepare, mut post) = (histogram(), histogram(), histogram());
    let mut outstanding: VecDeque<Outstanding<D::Prepared>> = VecDeque::new();
    let mut waiting = trace.requests.iter().peekable();
    let mut cursor = 0;
    let begin = now_ns();
    let mut progress_at = begin;
    loop {
        let now = now_ns();
        let due = waiting.peek().is_some_and(|request| begin + request.at_ns <= now);
        if due
            && outstanding.len() < MOST_OUTSTANDING
            && let Some(request) = waiting.next()
        {
            // Wherever they begin: the lists are in random order.
            let from = (outcome.operations as usize * 7919) % (case.blocks - request.blocks + 1);
            let blocks = from..from + request.blocks;
            read[blocks.clone()].fill(true);
            let places = (&local[blocks.clone()], &remote[blocks]);
            let prepared = agent.prepare(case.operation, places, case.block_bytes)?;
            let ready = now_ns();
            agent.post(&prepared)?;
            prepare.saturating_record(ready - now);
            post.saturating_record(now_ns() - ready);
            outstanding.push_back(Outstanding { prepared, due_ns: begin + request.at_ns });
            outcome.operations += 1;
            outcome.bytes += (request.blocks * case.block_bytes) as u64;
            progress_at = now_ns();
        }
        if outstanding.is_empty() {
            if waiting.peek().is_none() {
                break;
            }
            progress_at = now;
            continue;
        }
        cursor = (cursor + 1) % outstanding.len();
        if agent.is_finished(&outstanding[cursor].prepared)? {
            let ended = now_ns();
            if let Some(request) = outstanding.remove(cursor) {
                response.saturating_record(ended - request.due_ns);
            }
            progress_at = ended;
        } else if now.saturating_sub(progress_at) > OPERATION_TIMEOUT_NS {
            bail!("no request ended within {} s", OPERATION_TIMEOUT_NS / 1_000_000_000);
        }
    }
    outcome.completion = points_of(&response);
    outcome.prepare = points_of(&prepare);
    outcome.post = points_of(&post);
    Ok(())
}
