//! The engine as an application sees it, on a thread and on the lane.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use corelane::{Engine, LocalEngine, Peer, Status, Transfer};

use crate::clock::now_ns;
use crate::measure::{Initiator, OPERATION_TIMEOUT_NS, Stamp};
use crate::pinning;

/// What an application holds: everything is prepared once, and posted again and again.
#[derive(Clone)]
pub(super) struct Handles {
    pub(super) engine: Engine,
    pub(super) peer: Peer,
    /// One per slot, one for warming up behind them, and with a load the large write.
    pub(super) transfers: Arc<[Transfer]>,
}

/// Where the application runs, and therefore how it waits.
pub(super) enum Place {
    /// A thread of its own, polling without yielding.
    Thread,
    /// A task on the lane.
    Lane(LocalEngine),
}

/// Drives the prepared transfers for one pass.
pub(super) struct EngineInitiator {
    handles: Handles,
    place: Place,
    in_flight: VecDeque<usize>,
    answers: VecDeque<u64>,
}

impl EngineInitiator {
    pub(super) fn new(handles: Handles, place: Place) -> Self {
        let slots = handles.transfers.len();
        Self { handles, place, in_flight: VecDeque::with_capacity(slots), answers: VecDeque::new() }
    }

    /// Whether the transfer at this position of the queue has ended; takes it out if so.
    #[inline]
    fn take_ended(&mut self, position: usize) -> Result<Option<usize>> {
        let Some(&slot) = self.in_flight.get(position) else { return Ok(None) };
        match self.handles.transfers[slot].status() {
            Status::InProgress => Ok(None),
            Status::Done => {
                self.in_flight.remove(position);
                Ok(Some(slot))
            }
            Status::Failed(error) => {
                Err(error).with_context(|| format!("the transfer of slot {slot} failed"))
            }
            Status::Idle => bail!("the engine forgot the transfer of slot {slot}"),
        }
    }

    fn poll_answer(&mut self) -> Result<Option<u64>> {
        if self.answers.is_empty() {
            let answers = &mut self.answers;
            let mut malformed = false;
            self.handles.engine.take_notifications(|notification| {
                match Stamp::decode(&notification.payload) {
                    Some(stamp) => answers.push_back(stamp.sequence),
                    None => malformed = true,
                }
            })?;
            ensure!(!malformed, "verification failed: an answer that is not what was sent");
        }
        Ok(self.answers.pop_front())
    }
}

/// A deadline that is looked at rarely: reading the clock on every poll would be a good part of its cost.
struct Patience {
    polls: u32,
    deadline: u64,
}

impl Patience {
    fn new() -> Self {
        Self { polls: 0, deadline: u64::MAX }
    }

    #[inline]
    fn check(&mut self, what: &str) -> Result<()> {
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(4096) {
            let now = now_ns();
            if self.deadline == u64::MAX {
                self.deadline = now + OPERATION_TIMEOUT_NS;
            }
            ensure!(now < self.deadline, "{what} within 30 s");
        }
        Ok(())
    }
}

impl Initiator for EngineInitiator {
    #[inline]
    fn post(&mut self, slot: usize) -> Result<()> {
        self.handles.transfers[slot].post()?;
        self.in_flight.push_back(slot);
        Ok(())
    }

    fn post_with_notification(&mut self, slot: usize, payload: &[u8]) -> Result<()> {
        self.handles.transfers[slot].post_with_notification(payload)?;
        self.in_flight.push_back(slot);
        Ok(())
    }

    /// Looks at all transfers, by one load each, and where none has ended helps the engine along once, for the oldest: asking
    /// each for its status would be a turn of the lane for each where cores are few.
    #[inline]
    fn poll_finished(&mut self) -> Result<Option<usize>> {
        let transfers = &self.handles.transfers;
        let ended = |slot: &usize| !matches!(transfers[*slot].peek(), Status::InProgress);
        let position = self.in_flight.iter().position(ended);
        self.take_ended(position.unwrap_or(0))
    }

    async fn finished(&mut self) -> Result<usize> {
        if matches!(self.place, Place::Lane(_)) && self.in_flight.len() == 1 {
            let slot = self.in_flight.pop_front().unwrap_or_default();
            // Bounded by the engine's operation timeout.
            self.handles.transfers[slot]
                .completed()
                .await
                .with_context(|| format!("the transfer of slot {slot} failed"))?;
            return Ok(slot);
        }
        ensure!(!self.in_flight.is_empty(), "nothing was posted");
        let mut patience = Patience::new();
        loop {
            if let Some(slot) = self.poll_finished()? {
                return Ok(slot);
            }
            patience.check("no transfer finished")?;
            self.relax().await;
        }
    }

    fn notify(&mut self, payload: &[u8]) -> Result<()> {
        Ok(self.handles.peer.notify(payload)?)
    }

    async fn answer(&mut self) -> Result<u64> {
        let mut patience = Patience::new();
        loop {
            if let Some(sequence) = self.poll_answer()? {
                return Ok(sequence);
            }
            patience.check("the target's application did not answer a notification")?;
            self.relax().await;
        }
    }

    async fn idle_until(&mut self, at_ns: u64) {
        match &self.place {
            Place::Thread => pinning::sleep_then_spin_until(at_ns),
            Place::Lane(local) => {
                // Timers are a tick late: sleep short of the moment and yield for the rest.
                const SPIN_NS: u64 = 2_500_000;
                let left = at_ns.saturating_sub(now_ns());
                if left > SPIN_NS {
                    local.sleep(std::time::Duration::from_nanos(left - SPIN_NS)).await;
                }
                while now_ns() < at_ns {
                    local.yield_now().await;
                }
            }
        }
    }

    #[inline]
    async fn relax(&mut self) {
        if let Place::Lane(local) = &self.place {
            local.yield_now().await;
        }
    }
}
