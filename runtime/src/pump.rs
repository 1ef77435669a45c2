//! The pump's own state (clock, descriptors, timers) and what a driver may do with it.

use std::{
    os::fd::RawFd,
    sync::Arc,
    task::Waker,
    time::{Duration, Instant},
};

use slab::Slab;

use crate::{
    FdId, Interest, SharedWord, Start, TimerId, WordId, fds::FdTable, wheel::Wheel,
    words::WordTable,
};

/// A tick of the timer wheel is 2^20 ns, 1.05 ms.
pub(crate) const TICK_BITS: u32 = 20;
/// How often hot descriptors are looked through for idle ones.
pub(crate) const COOL_EVERY_NS: u64 = 50_000;

/// What a timer of the wheel is for.
#[derive(Clone, Copy)]
pub(crate) enum TimerKind {
    Driver(u64),
    /// An on-lane task that sleeps.
    Sleeper(u32),
}

/// What the lane meant to do when it last gave up the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Intent {
    Turn,
    Standby,
    /// Asleep until this tick (`u64::MAX`: no timer).
    Park {
        until_tick: u64,
    },
}

pub(crate) struct Pump {
    epoch: Instant,
    now_ns: u64,
    clock_is_fresh: bool,
    pub(crate) on_lane_thread: bool,
    pub(crate) intent: Intent,
    pub(crate) fds: FdTable,
    pub(crate) words: WordTable,
    pub(crate) wheel: Wheel<TimerKind>,
    sleepers: Slab<Waker>,
    /// When callers look for calm descriptors next.
    calm_at_ns: u64,
}

impl Pump {
    pub(crate) fn new(epoch: Instant, capacity: usize, waits_for_words: bool) -> Self {
        Self {
            epoch,
            now_ns: nanos_since(epoch, Instant::now()),
            clock_is_fresh: true,
            on_lane_thread: true,
            intent: Intent::Turn,
            fds: FdTable::with_capacity(capacity),
            words: WordTable::new(waits_for_words),
            wheel: Wheel::with_capacity(capacity),
            sleepers: Slab::with_capacity(64),
            calm_at_ns: 0,
        }
    }

    /// A turn begins: what the clock said is old.
    #[inline]
    pub(crate) fn begin_turn(&mut self, on_lane_thread: bool) {
        self.clock_is_fresh = false;
        self.on_lane_thread = on_lane_thread;
    }

    /// The clock of this turn, read at most once.
    #[inline]
    pub(crate) fn now_ns(&mut self) -> u64 {
        if !self.clock_is_fresh {
            self.now_ns = nanos_since(self.epoch, Instant::now());
            self.clock_is_fresh = true;
        }
        self.now_ns
    }

    /// The clock was just read elsewhere.
    #[inline]
    pub(crate) fn set_now_ns(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        self.clock_is_fresh = true;
    }

    /// The last reading, of this turn or of one shortly before.
    #[inline]
    pub(crate) fn recent_ns(&self) -> u64 {
        self.now_ns
    }

    /// The first tick at which `deadline` has passed.
    fn tick_of(&self, deadline: Instant) -> u64 {
        let ns = nanos_since(self.epoch, deadline);
        ns.saturating_add((1 << TICK_BITS) - 1) >> TICK_BITS
    }

    pub(crate) fn add_sleeper(&mut self, deadline: Instant, waker: Waker) -> (u32, TimerId) {
        let key = self.sleepers.insert(waker) as u32;
        let tick = self.tick_of(deadline);
        (key, self.wheel.insert(tick, TimerKind::Sleeper(key)))
    }

    /// Replaces the waker of a sleeper that is still waiting.
    pub(crate) fn set_sleeper_waker(&mut self, key: u32, waker: &Waker) {
        if let Some(slot) = self.sleepers.get_mut(key as usize) {
            slot.clone_from(waker);
        }
    }

    pub(crate) fn remove_sleeper(&mut self, timer: TimerId) {
        if let Some(TimerKind::Sleeper(key)) = self.wheel.cancel(timer) {
            self.sleepers.try_remove(key as usize);
        }
    }

    pub(crate) fn take_sleeper(&mut self, key: u32) -> Option<Waker> {
        self.sleepers.try_remove(key as usize)
    }

    /// After a turn on a caller's thread: the lane's own may not come for as long as callers drive, and until then a calm
    /// descriptor that was hot at the beginning would cost each of their turns a system call, 0.2 us. A load where none is hot.
    #[inline]
    pub(crate) fn cool_calm(&mut self) {
        if self.fds.hot_count() > 0 && self.now_ns >= self.calm_at_ns {
            self.calm_at_ns = self.now_ns + COOL_EVERY_NS;
            self.fds.cool_calm(self.now_ns);
        }
    }

    /// Whether the lane's thread has something for the ring.
    #[inline]
    pub(crate) fn has_ring_work(&self) -> bool {
        self.fds.has_ring_work() || self.words.has_ring_work()
    }

    /// After a turn on a caller's thread: whether the lane's thread must wake up to keep its promises.
    pub(crate) fn needs_lane(&self) -> bool {
        match self.intent {
            Intent::Turn => false,
            Intent::Standby => self.has_ring_work(),
            Intent::Park { until_tick } => {
                self.has_ring_work()
                    || self.fds.has_unwatched_hot()
                    || self.wheel.next_tick().is_some_and(|tick| tick < until_tick)
            }
        }
    }
}

pub(crate) fn nanos_since(epoch: Instant, instant: Instant) -> u64 {
    instant.saturating_duration_since(epoch).as_nanos() as u64
}

/// What a [`Driver`](crate::Driver) may do in a turn: the clock, timers and file descriptors of its lane.
///
/// Valid on whichever thread holds the lane's token; all of it is cheap (no system call, no lock).
pub struct Cx<'a> {
    pub(crate) pump: &'a mut Pump,
}

impl Cx<'_> {
    /// The time of this turn. The clock is read at most once a turn.
    pub fn now(&mut self) -> Instant {
        let now_ns = self.pump.now_ns();
        self.pump.epoch + Duration::from_nanos(now_ns)
    }

    /// Calls [`on_timer`](crate::Driver::on_timer) with `token` once `deadline` has passed: never early, and at most a
    /// tick (1.05 ms) late on a lane that is not overloaded. A deadline in the past fires in the next turn. O(1).
    pub fn set_timer(&mut self, deadline: Instant, token: u64) -> TimerId {
        let tick = self.pump.tick_of(deadline);
        self.pump.wheel.insert(tick, TimerKind::Driver(token))
    }

    /// Cancels a timer: true if it had not fired. An id of a timer that has fired or was cancelled is harmless. O(1).
    pub fn cancel_timer(&mut self, id: TimerId) -> bool {
        self.pump.wheel.cancel(id).is_some()
    }

    /// Takes `fd` into the lane's care: [`on_fd`](crate::Driver::on_fd) is called with `token`. The descriptor stays the
    /// driver's, must be non-blocking or used with `MSG_DONTWAIT`, and has to be [removed](Self::remove_fd) before it is
    /// closed.
    pub fn add_fd(&mut self, fd: RawFd, token: u64, interest: Interest, start: Start) -> FdId {
        let now = self.pump.now_ns();
        self.pump.fds.add(fd, token, interest, start, now)
    }

    /// Changes what a quiet descriptor is watched for. More interest makes the descriptor hot for a moment, so it is
    /// tried at once; [`Interest::NONE`] silences it.
    pub fn set_interest(&mut self, id: FdId, interest: Interest) {
        let now = self.pump.recent_ns();
        self.pump.fds.set_interest(id, interest, now);
    }

    /// "An answer is expected here now": the descriptor is tried every turn until it was idle for a while (200 us). A few
    /// nanoseconds when it is hot already.
    pub fn make_hot(&mut self, id: FdId) {
        let now = self.pump.recent_ns();
        self.pump.fds.make_hot(id, now);
    }

    /// A calm descriptor goes quiet whenever it is idle, even if it is the last that was hot: for one beside which there is
    /// a faster way, so that trying it every turn (0.3 us) is a waste.
    pub fn set_calm(&mut self, id: FdId, calm: bool) {
        self.pump.fds.set_calm(id, calm);
    }

    /// Ends the lane's interest in a descriptor: no [`on_fd`](crate::Driver::on_fd) for it follows. Close it afterwards;
    /// the kernel lets go of the file once the lane's ring has dropped its watch, at the end of the turn (or, after a
    /// turn on a caller's thread, when the lane has woken up for it).
    pub fn remove_fd(&mut self, id: FdId) {
        self.pump.fds.remove(id);
    }

    /// Calls [`on_word`](crate::Driver::on_word) with `token`, once, when the futex word is woken or does not hold `expected`
    /// (any more); it may be called without either. It costs nothing until then, and ends a lane's sleep. None: this
    /// kernel's rings cannot wait for words (before Linux 6.7), and the caller has to look at the word itself.
    pub fn watch_word(
        &mut self,
        word: Arc<dyn SharedWord>,
        expected: u32,
        token: u64,
    ) -> Option<WordId> {
        self.pump.words.watch(word, expected, token)
    }

    /// Ends a watch: no [`on_word`](crate::Driver::on_word) for it follows, unless it has fired already.
    pub fn unwatch_word(&mut self, id: WordId) {
        self.pump.words.remove(id);
    }

    /// Whether this turn runs on the lane's own thread.
    pub fn on_lane_thread(&self) -> bool {
        self.pump.on_lane_thread
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fds::HOT_IDLE_NS;

    #[test]
    fn callers_let_calm_descriptors_cool_and_call_the_lane_that_stands_by() {
        let mut pump = Pump::new(Instant::now(), 4, false);
        let calm = pump.fds.add(8, 1, Interest::READABLE, Start::Hot, 0);
        pump.fds.set_calm(calm, true);
        pump.fds.add(9, 2, Interest::READABLE, Start::Hot, 0);
        pump.intent = Intent::Standby;
        pump.set_now_ns(HOT_IDLE_NS);
        pump.cool_calm();
        assert_eq!((pump.fds.hot_count(), pump.needs_lane()), (2, false), "not idle yet");
        pump.set_now_ns(HOT_IDLE_NS + COOL_EVERY_NS);
        pump.cool_calm();
        assert_eq!(
            (pump.fds.hot_count(), pump.needs_lane()),
            (1, true),
            "the ring has to watch it"
        );
        // The other is one of those that may stay hot.
        pump.set_now_ns(10 * HOT_IDLE_NS);
        pump.cool_calm();
        assert_eq!(pump.fds.hot_count(), 1);
    }
}
