//! What lanes and callers share: the state of one posting, and tickets for slow calls.

use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

#[cfg(loom)]
use loom::sync::{
    Mutex,
    atomic::{AtomicU32, Ordering},
};
#[cfg(not(loom))]
use std::sync::{
    Mutex,
    atomic::{AtomicU32, Ordering},
};

use crate::error::Error;

/// The instant `timeout` from now; a timeout beyond what the clock can express is as good as none.
pub(crate) fn deadline(timeout: Duration) -> Instant {
    const FAR: Duration = Duration::from_hours(100 * 365 * 24);
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now.checked_add(FAR).unwrap_or(now))
}

const IDLE: u32 = 0;
const POSTED: u32 = 1;
const DONE: u32 = 2;
const FAILED: u32 = 3;
const STATE: u32 = 3;
/// A waker is registered: whoever completes must wake it.
const WAITING: u32 = 4;

/// Where a posting stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotState {
    Idle,
    Posted,
    Done,
    Failed,
}

/// The state of a slot before a posting.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub(crate) struct Before(u32);

/// The state of one posting, shared by caller and lane.
///
/// `begin` (caller) and `complete` (lane) alternate: a posting ends exactly once. Everything that
/// the lane wrote before `complete` is visible to whoever sees `Done` or `Failed`. One cache line;
/// an unfinished check is one load.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Slot {
    state: AtomicU32,
    waker: Mutex<Option<Waker>>,
    error: Mutex<Option<Error>>,
    /// Postings that have begun, and ends that were told.
    #[cfg(feature = "sim")]
    tally: Mutex<(u64, u64)>,
}

fn lock<T>(mutex: &Mutex<T>) -> impl std::ops::DerefMut<Target = T> + '_ {
    // Nothing panics while it holds one of these locks, and their contents are valid anyway.
    match mutex.lock() {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}

impl Slot {
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU32::new(IDLE),
            waker: Mutex::new(None),
            error: Mutex::new(None),
            #[cfg(feature = "sim")]
            tally: Mutex::new((0, 0)),
        }
    }

    #[inline]
    pub(crate) fn state(&self) -> SlotState {
        match self.state.load(Ordering::Acquire) & STATE {
            IDLE => SlotState::Idle,
            POSTED => SlotState::Posted,
            DONE => SlotState::Done,
            _ => SlotState::Failed,
        }
    }

    /// Takes the slot for a new posting; `None`: one is in flight. The answer is for `abort`.
    pub(crate) fn begin(&self) -> Option<Before> {
        let mut seen = self.state.load(Ordering::Relaxed);
        while seen & STATE != POSTED {
            match self.state.compare_exchange_weak(
                seen,
                POSTED,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(before) => {
                    #[cfg(feature = "sim")]
                    {
                        lock(&self.tally).0 += 1;
                    }
                    return Some(Before(before & STATE));
                }
                Err(now) => seen = now,
            }
        }
        None
    }

    /// Takes back a `begin` whose posting never reached the lane: the answer to the posting before
    /// stands.
    pub(crate) fn abort(&self, before: Before) {
        #[cfg(feature = "sim")]
        {
            lock(&self.tally).0 -= 1;
        }
        let seen = self.state.swap(before.0, Ordering::AcqRel);
        self.wake(seen);
    }

    /// Ends the posting. The lane calls this exactly once per `begin`.
    pub(crate) fn complete(&self, outcome: Result<(), Error>) {
        #[cfg(feature = "sim")]
        {
            lock(&self.tally).1 += 1;
        }
        let state = match outcome {
            Ok(()) => DONE,
            Err(error) => {
                *lock(&self.error) = Some(error);
                FAILED
            }
        };
        let before = self.state.swap(state, Ordering::AcqRel);
        #[cfg(feature = "sim")]
        if before & STATE != POSTED {
            crate::sim::count_double_end();
        }
        debug_assert_eq!(before & STATE, POSTED, "a transfer ended twice");
        self.wake(before);
    }

    fn wake(&self, before: u32) {
        if before & WAITING != 0 {
            let waker = lock(&self.waker).take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    /// Registers a waker for the end of the posting; false: it has ended (or never began).
    pub(crate) fn register(&self, waker: &Waker) -> bool {
        *lock(&self.waker) = Some(waker.clone());
        let mut seen = self.state.load(Ordering::Acquire);
        while seen & STATE == POSTED {
            match self.state.compare_exchange_weak(
                seen,
                seen | WAITING,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Postings that have begun, and ends that were told.
    #[cfg(feature = "sim")]
    pub(crate) fn begun_and_ended(&self) -> (u64, u64) {
        *lock(&self.tally)
    }

    /// The error of a failed posting.
    pub(crate) fn error(&self) -> Option<Error> {
        lock(&self.error).clone()
    }
}

/// The answer to a slow call (connect, deregister), given once by a lane.
#[derive(Debug)]
pub(crate) struct Ticket<T> {
    slot: Slot,
    value: Mutex<Option<T>>,
}

impl<T> Ticket<T> {
    pub(crate) fn new() -> Arc<Self> {
        let ticket = Self { slot: Slot::new(), value: Mutex::new(None) };
        let _ = ticket.slot.begin();
        Arc::new(ticket)
    }

    /// Gives the answer; a second one is ignored.
    pub(crate) fn complete(&self, value: T) {
        let mut place = lock(&self.value);
        if place.is_some() || self.is_complete() {
            return;
        }
        *place = Some(value);
        drop(place);
        self.slot.complete(Ok(()));
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.slot.state() == SlotState::Done
    }

    /// Waits until the answer is there or `deadline` passes. `progress` is called again and again
    /// at first (it may drive a lane); then the thread sleeps, a millisecond at a time, so that a
    /// lane which needs driving gets it.
    pub(crate) fn wait(&self, deadline: Instant, mut progress: impl FnMut()) -> Option<T> {
        let start = Instant::now();
        loop {
            if self.is_complete() {
                return lock(&self.value).take();
            }
            let now = Instant::now();
            if now >= deadline {
                return None;
            }
            progress();
            if now - start > Duration::from_micros(200) && !self.is_complete() {
                let nap = (deadline - now).min(Duration::from_millis(1));
                sleep_until_woken(nap, |waker| self.slot.register(waker));
            }
        }
    }
}

/// How long a waiting caller polls before it sleeps.
pub(crate) struct Patience {
    since: Instant,
}

impl Patience {
    /// Long beside a transfer, short beside a time slice.
    const POLL: Duration = Duration::from_millis(1);

    pub(crate) fn new() -> Self {
        Self { since: Instant::now() }
    }

    /// There was progress: poll on.
    pub(crate) fn renew(&mut self, now: Instant) {
        self.since = now;
    }

    pub(crate) fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) > Self::POLL
    }
}

/// Sleeps until woken, at most for `timeout` and for a tenth of a second: whatever became of the
/// wake-up, the caller looks again. `register` says whether there is something to wait for.
#[cfg(not(loom))]
pub(crate) fn sleep_until_woken(timeout: Duration, register: impl FnOnce(&Waker) -> bool) {
    const LOOK_AGAIN: Duration = Duration::from_millis(100);
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    thread_local! {
        // Made once per thread: waiting allocates nothing.
        static WAKER: Waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    }
    let registered = WAKER.try_with(register).unwrap_or(false);
    if registered {
        std::thread::park_timeout(timeout.min(LOOK_AGAIN));
    } else {
        // Ended meanwhile, or this thread is ending and has no waker any more.
        std::thread::yield_now();
    }
}

#[cfg(loom)]
pub(crate) fn sleep_until_woken(_timeout: Duration, _register: impl FnOnce(&Waker) -> bool) {
    loom::thread::yield_now();
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_slot_can_be_used_again_and_keeps_its_answer() {
        let slot = Slot::new();
        assert_eq!(slot.state(), SlotState::Idle);
        assert!(slot.begin().is_some() && slot.begin().is_none());
        slot.complete(Err(Error::Cancelled));
        assert_eq!(slot.state(), SlotState::Failed);
        assert!(matches!(slot.error(), Some(Error::Cancelled)));
        assert!(matches!(slot.error(), Some(Error::Cancelled)), "asking again gives the same");
        let before = slot.begin().unwrap();
        slot.abort(before);
        assert_eq!(slot.state(), SlotState::Failed, "the last answer stands");
        assert!(slot.error().is_some());
        assert!(slot.begin().is_some());
        slot.complete(Ok(()));
        assert_eq!(slot.state(), SlotState::Done);
        assert!(!slot.register(Waker::noop()));
    }

    #[test]
    fn a_ticket_answers_once_and_gives_up_at_the_deadline() {
        let ticket = Ticket::<u32>::new();
        assert_eq!(ticket.wait(Instant::now() + Duration::from_millis(3), || ()), None);
        let other = ticket.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            other.complete(5);
            other.complete(6);
        });
        assert_eq!(ticket.wait(Instant::now() + Duration::from_secs(20), || ()), Some(5));
        thread.join().unwrap();
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test --release --lib loom`
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    struct Count(std::sync::Arc<std::sync::atomic::AtomicUsize>);
    impl std::task::Wake for Count {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }

    #[test]
    fn loom_what_the_lane_wrote_is_seen_with_done() {
        loom::model(|| {
            let slot = Arc::new(Slot::new());
            let data = Arc::new(AtomicUsize::new(0));
            assert!(slot.begin().is_some());
            let lane = {
                let (slot, data) = (slot.clone(), data.clone());
                loom::thread::spawn(move || {
                    data.store(42, Ordering::Relaxed);
                    slot.complete(Ok(()));
                })
            };
            if slot.state() == SlotState::Done {
                assert_eq!(data.load(Ordering::Relaxed), 42);
            }
            lane.join().unwrap();
            assert_eq!(slot.state(), SlotState::Done);
        });
    }

    #[test]
    fn loom_a_registered_waker_is_always_woken() {
        loom::model(|| {
            let slot = Arc::new(Slot::new());
            let woken = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
            assert!(slot.begin().is_some());
            let lane = {
                let slot = slot.clone();
                loom::thread::spawn(move || slot.complete(Err(Error::Cancelled)))
            };
            let waker = Waker::from(std::sync::Arc::new(Count(woken.clone())));
            let registered = slot.register(&waker);
            lane.join().unwrap();
            let wakes = woken.load(std::sync::atomic::Ordering::SeqCst);
            assert_eq!(wakes, usize::from(registered));
            assert!(matches!(slot.error(), Some(Error::Cancelled)));
        });
    }

    #[test]
    fn loom_two_posters_never_both_begin() {
        loom::model(|| {
            let slot = Arc::new(Slot::new());
            let other = {
                let slot = slot.clone();
                loom::thread::spawn(move || slot.begin().is_some())
            };
            let mine = slot.begin().is_some();
            let theirs = other.join().unwrap();
            assert!(mine ^ theirs);
        });
    }
}
