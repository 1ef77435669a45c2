//! What the blocks of a case hold before transfers and after them, on the initiator's side, and what wakes the backend in between.

use anyhow::{Result, anyhow};

use super::case::NixlCase;
use super::driver::Driver;
use super::layout::{NUDGE_BYTES, NixlLayout};
use super::timing::WARM_OPERATIONS;
use crate::case::Operation;

/// What is moved within one pass before the transfers that are checked at its end. Their contents differ, so that what was
/// moved before is never mistaken for what they had to move.
#[derive(Clone, Copy)]
pub(super) enum Before {
    /// The untimed transfers.
    Untimed = 1,
    /// The large writes of a load that run alone.
    BulkAlone = 2,
}

impl Before {
    /// Content tag for a pass of that sequence number, which is far below.
    pub(super) fn tag(self, sequence: u64) -> u64 {
        sequence | (self as u64) << 56
    }
}

/// The blocks of the initiator.
pub(super) struct Blocks<'a, D> {
    pub(super) agent: &'a D,
    pub(super) case: &'a NixlCase,
    pub(super) layout: &'a NixlLayout,
}

impl<D: Driver> Blocks<'_, D> {
    fn reads(&self) -> bool {
        self.case.operation == Operation::Read
    }

    /// Poisons the destination of reads; fills the source of writes.
    pub(super) fn renew(&self, tag: u64) {
        for (index, &offset) in self.layout.local.iter().enumerate() {
            if self.reads() {
                self.agent.arena().poison(offset, self.case.block_bytes);
            } else {
                self.agent.arena().fill(offset, self.case.block_bytes, tag, index as u64);
            }
        }
    }

    /// Checks the destination of reads, of all blocks that `read` says were read. What was written is the target's to check.
    pub(super) fn check(&self, sequence: u64, read: impl Fn(usize) -> bool) -> Result<()> {
        if !self.reads() {
            return Ok(());
        }
        // The target's blocks were filled in the order of its own offsets, which is that of the lists.
        let blocks = self.layout.local.iter().enumerate();
        for (index, &offset) in blocks.filter(|(index, _)| read(*index)) {
            self.agent
                .arena()
                .check(offset, self.case.block_bytes, sequence, index as u64)
                .map_err(|mismatch| anyhow!("verification failed: block {index}: {mismatch}"))?;
        }
        Ok(())
    }
}

/// A transfer on memory of its own: whoever slept while contents were renewed would otherwise be woken by the first timed one.
pub(super) struct Nudge<'a, D: Driver> {
    agent: &'a D,
    prepared: D::Prepared,
}

impl<'a, D: Driver> Nudge<'a, D> {
    pub(super) fn new(agent: &'a D, operation: Operation, layout: &NixlLayout) -> Result<Self> {
        let at = [layout.nudge];
        Ok(Self { agent, prepared: agent.prepare(operation, (&at, &at), NUDGE_BYTES)? })
    }

    /// What follows is timed.
    pub(super) fn wake(&self) -> Result<()> {
        self.agent.timing();
        for _ in 0..WARM_OPERATIONS {
            self.agent.transfer(&self.prepared)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_moved_before_is_never_what_is_checked() {
        let tags = [7, Before::Untimed.tag(7), Before::BulkAlone.tag(7), Before::Untimed.tag(8)];
        for (at, tag) in tags.iter().enumerate() {
            assert!(!tags[..at].contains(tag), "{tags:x?}");
        }
    }
}
