//! Broken on purpose: an initiator that claims to be done without moving the bytes. A verification that lets it pass
//! verifies nothing, and the tests run it.

use std::collections::VecDeque;

use anyhow::Result;

use crate::case::Sabotage;
use crate::measure::{Initiator, Pass};

/// Passes every call on to `inner`, except for the transfers that `mode` drops.
pub(crate) struct Sabotaged<'a, I> {
    inner: &'a mut I,
    mode: Option<Sabotage>,
    slots: usize,
    first_pass: bool,
    posted: u64,
    in_flight: usize,
    /// Slots that were posted and dropped.
    dropped: VecDeque<usize>,
}

impl<'a, I: Initiator> Sabotaged<'a, I> {
    /// Wraps `inner` for one pass; without a mode it changes nothing.
    pub(crate) fn new(inner: &'a mut I, mode: Option<Sabotage>, pass: &Pass) -> Self {
        // The low half of a pass's sequence counts from 2: 1 would be the pass before the first.
        let first_pass = pass.sequence as u32 == 2;
        Self {
            inner,
            mode,
            slots: pass.slots,
            first_pass,
            posted: 0,
            in_flight: 0,
            dropped: VecDeque::new(),
        }
    }

    /// Whether everything that was posted has been taken.
    pub(crate) fn is_drained(&self) -> bool {
        self.in_flight == 0 && self.dropped.is_empty()
    }

    fn drops(&mut self, slot: usize) -> bool {
        self.posted += 1;
        // Warm-up transfers are nobody's claim.
        slot < self.slots
            && match self.mode {
                None => false,
                Some(Sabotage::Noop) => true,
                Some(Sabotage::Stale) => !self.first_pass,
                Some(Sabotage::Rare) => self.posted.is_multiple_of(50),
            }
    }
}

impl<I: Initiator> Initiator for Sabotaged<'_, I> {
    #[inline]
    fn post(&mut self, slot: usize) -> Result<()> {
        if self.mode.is_some() && self.drops(slot) {
            self.dropped.push_back(slot);
            return Ok(());
        }
        self.in_flight += 1;
        self.inner.post(slot)
    }

    fn post_with_notification(&mut self, slot: usize, payload: &[u8]) -> Result<()> {
        if self.mode.is_some() && self.drops(slot) {
            self.dropped.push_back(slot);
            return self.inner.notify(payload);
        }
        self.in_flight += 1;
        self.inner.post_with_notification(slot, payload)
    }

    #[inline]
    fn poll_finished(&mut self) -> Result<Option<usize>> {
        if let Some(slot) = self.dropped.pop_front() {
            return Ok(Some(slot));
        }
        let finished = self.inner.poll_finished()?;
        self.in_flight -= usize::from(finished.is_some());
        Ok(finished)
    }

    #[inline]
    async fn finished(&mut self) -> Result<usize> {
        if let Some(slot) = self.dropped.pop_front() {
            return Ok(slot);
        }
        let slot = self.inner.finished().await?;
        self.in_flight -= 1;
        Ok(slot)
    }

    fn notify(&mut self, payload: &[u8]) -> Result<()> {
        self.inner.notify(payload)
    }

    async fn answer(&mut self) -> Result<u64> {
        self.inner.answer().await
    }

    async fn idle_until(&mut self, at_ns: u64) {
        self.inner.idle_until(at_ns).await;
    }

    async fn relax(&mut self) {
        self.inner.relax().await;
    }
}
