//! The side that copies.

use std::collections::VecDeque;

use anyhow::{Context as _, Result};

use super::{Copies, Direction, Mailbox, RawAddress, RawKind, Reached};
use crate::arena::Arena;
use crate::case::Operation;
use crate::layout::{Layout, WARM_LEN};
use crate::measure::{Initiator, Stamp};
use crate::vram::Vram;

/// Copies from and to a target; an operation is over when it was posted.
pub(crate) struct RawLocalInitiator {
    /// One per slot; the last one is for warming up.
    slots: Vec<Copies>,
    finished: VecDeque<usize>,
    mailbox: Mailbox,
    pid: i32,
}

impl RawLocalInitiator {
    pub(crate) fn reach(
        kind: RawKind,
        address: RawAddress,
        arena: &Arena,
        operation: Operation,
        layout: &Layout,
        one_core: bool,
    ) -> Result<Self> {
        let pid = address.pid();
        let (target, mailbox) = Reached::new(kind, address, arena.vram().map(Vram::gpu), one_core)?;
        let direction = match operation {
            Operation::Read => Direction::Read,
            _ => Direction::Write,
        };
        let mut slots = Vec::with_capacity(layout.slots.len() + 1);
        for slot in &layout.slots {
            let places = (slot.local.as_slice(), slot.remote.as_slice());
            slots.push(target.copies(direction, arena, places, layout.block_bytes)?);
        }
        slots.push(target.copies(direction, arena, (&[0], &[0]), WARM_LEN)?);
        let finished = VecDeque::with_capacity(slots.len());
        Ok(Self { slots, finished, mailbox, pid })
    }
}

impl Initiator for RawLocalInitiator {
    #[inline]
    fn post(&mut self, slot: usize) -> Result<()> {
        self.slots[slot].run()?;
        self.finished.push_back(slot);
        Ok(())
    }

    #[inline]
    fn post_with_notification(&mut self, slot: usize, payload: &[u8]) -> Result<()> {
        self.post(slot)?;
        self.notify(payload)
    }

    #[inline]
    fn poll_finished(&mut self) -> Result<Option<usize>> {
        Ok(self.finished.pop_front())
    }

    #[inline]
    async fn finished(&mut self) -> Result<usize> {
        self.finished.pop_front().context("nothing was posted")
    }

    #[inline]
    fn notify(&mut self, payload: &[u8]) -> Result<()> {
        self.mailbox.send(payload)
    }

    #[inline]
    async fn answer(&mut self) -> Result<u64> {
        let answer = self.mailbox.receive(self.pid)?;
        Ok(Stamp::decode(answer).context("a short answer")?.sequence)
    }

    async fn idle_until(&mut self, at_ns: u64) {
        crate::pinning::sleep_then_spin_until(at_ns);
    }

    async fn relax(&mut self) {}
}
