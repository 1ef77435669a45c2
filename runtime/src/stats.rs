//! Counters of a lane.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

use crate::histogram::{Histogram, Percentiles};

/// A counter that only one thread at a time adds to (the holder of the token, or the lane's thread), and any may read:
/// adding costs a load and a store, no locked instruction.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline(always)]
    pub(crate) fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) turns: Counter,
    pub(crate) assisted_turns: Counter,
    pub(crate) messages: Counter,
    pub(crate) fd_calls: Counter,
    pub(crate) polls_fired: Counter,
    pub(crate) timers: Counter,
    pub(crate) parks: Counter,
    pub(crate) standbys: Counter,
    /// Counted by any thread.
    pub(crate) doorbells: AtomicU64,
    pub(crate) late_yields: Counter,
    pub(crate) gaps: Mutex<Histogram>,
}

/// What a lane has done since it started. Values are read one by one: no snapshot at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaneStats {
    /// Turns of the pump on the lane's thread.
    pub turns: u64,
    /// Turns of the pump on callers' threads.
    pub assisted_turns: u64,
    /// Messages handled.
    pub messages: u64,
    /// Calls of `on_fd`.
    pub fd_calls: u64,
    /// Quiet descriptors that the kernel reported.
    pub polls_fired: u64,
    /// Timers fired.
    pub timers: u64,
    /// Times the lane went to sleep until an event.
    pub parks: u64,
    /// Times the lane stood by while callers drove it.
    pub standbys: u64,
    /// Times a thread rang the doorbell.
    pub doorbells: u64,
    /// Times the lane yielded its core and got it back more than 200 us later.
    pub late_yields: u64,
    /// Slots of the inbox in use.
    pub inbox_used: usize,
    /// Whether the lane is dedicated just now: callers cannot assist.
    pub dedicated: bool,
    /// Gaps of more than 100 us between two turns on the lane's thread while it was awake, in nanoseconds.
    pub turn_gaps: Percentiles,
}

impl Counters {
    pub(crate) fn snapshot(&self) -> LaneStats {
        LaneStats {
            turns: self.turns.get(),
            assisted_turns: self.assisted_turns.get(),
            messages: self.messages.get(),
            fd_calls: self.fd_calls.get(),
            polls_fired: self.polls_fired.get(),
            timers: self.timers.get(),
            parks: self.parks.get(),
            standbys: self.standbys.get(),
            doorbells: self.doorbells.load(Ordering::Relaxed),
            late_yields: self.late_yields.get(),
            inbox_used: 0,
            dedicated: false,
            turn_gaps: self.gaps.lock().map(|gaps| gaps.percentiles()).unwrap_or_default(),
        }
    }
}
