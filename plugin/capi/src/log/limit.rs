//! How often the same may be said.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What has been said is remembered for so long.
pub(super) const WINDOW: Duration = Duration::from_secs(5);

const SETS: usize = 64;
const WAYS: usize = 8;
const SLOTS: usize = SETS * WAYS;

/// Milliseconds of a clock that never goes back. No lock, so that it can be read in a forked child.
pub(super) fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is ours. The clock exists on every Linux; if not, time stands still at 0.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// A key for what is said.
pub(super) fn key_of(what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

/// Since when it has been said, how often it has, and how often it was held back.
#[derive(Clone, Copy)]
struct State {
    since: u64,
    said: u64,
    held: u64,
}

impl State {
    const SAID_BITS: u32 = 4;
    const HELD_BITS: u32 = 20;
    const MOST_HELD: u64 = (1 << Self::HELD_BITS) - 1;

    /// In one word, so that it changes as a whole.
    fn pack(self) -> u64 {
        (self.since << Self::SAID_BITS | self.said) << Self::HELD_BITS | self.held
    }

    fn unpack(word: u64) -> Self {
        Self {
            since: word >> (Self::SAID_BITS + Self::HELD_BITS),
            said: word >> Self::HELD_BITS & ((1 << Self::SAID_BITS) - 1),
            held: word & Self::MOST_HELD,
        }
    }
}

struct Slot {
    /// 0: free.
    key: AtomicU64,
    state: AtomicU64,
}

/// Lets the same thing through a few times per [`WINDOW`], and counts the rest.
///
/// A table of fixed size: what was said longest ago is forgotten first. No locks: a forked child
/// could find one held. Threads that meet in a slot may miscount by a line, no more.
pub(super) struct Limiter {
    slots: [Slot; SLOTS],
    times: u64,
}

impl Limiter {
    /// `times` per window, at most 15.
    pub(super) const fn new(times: u64) -> Self {
        assert!(0 < times && times < 1 << State::SAID_BITS);
        let slots = [const { Slot { key: AtomicU64::new(0), state: AtomicU64::new(0) } }; SLOTS];
        Self { slots, times }
    }

    /// Whether `key` may be said at `now`: if so, how often it was held back since it was last said.
    pub(super) fn admit(&self, key: u64, now: u64) -> Option<u64> {
        let key = key.max(1);
        let first = key as usize % SETS * WAYS;
        let set = &self.slots[first..first + WAYS];
        match set.iter().find(|slot| slot.key.load(Ordering::Relaxed) == key) {
            Some(slot) => self.again(slot, now),
            None => {
                Self::replace_oldest(set, key, now);
                Some(0)
            }
        }
    }

    fn again(&self, slot: &Slot, now: u64) -> Option<u64> {
        let mut word = slot.state.load(Ordering::Relaxed);
        loop {
            let state = State::unpack(word);
            let over = now.saturating_sub(state.since) >= WINDOW.as_millis() as u64;
            let (next, answer) = if over {
                (State { since: now, said: 1, held: 0 }, Some(state.held))
            } else if state.said < self.times {
                (State { said: state.said + 1, ..state }, Some(0))
            } else {
                (State { held: (state.held + 1).min(State::MOST_HELD), ..state }, None)
            };
            let swapped = slot.state.compare_exchange_weak(
                word,
                next.pack(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match swapped {
                Ok(_) => return answer,
                Err(changed) => word = changed,
            }
        }
    }

    fn replace_oldest(set: &[Slot], key: u64, now: u64) {
        let age = |slot: &&Slot| match slot.key.load(Ordering::Relaxed) {
            0 => 0,
            _ => State::unpack(slot.state.load(Ordering::Relaxed)).since + 1,
        };
        if let Some(slot) = set.iter().min_by_key(age) {
            slot.state.store(State { since: now, said: 1, held: 0 }.pack(), Ordering::Relaxed);
            slot.key.store(key, Ordering::Relaxed);
        }
    }
}

/// Lets `BURST` things through at once, and then one per `EARNED`.
pub(super) struct Budget {
    /// When all that was let through has been earned.
    earned_at: AtomicU64,
}

const BURST: u64 = 20;
const EARNED: u64 = 500;

impl Budget {
    pub(super) const fn new() -> Self {
        Self { earned_at: AtomicU64::new(0) }
    }

    pub(super) fn spend(&self, now: u64) -> bool {
        let spent = |earned_at: u64| {
            let next = earned_at.max(now) + EARNED;
            (next <= now + BURST * EARNED).then_some(next)
        };
        self.earned_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spent).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OVER: u64 = WINDOW.as_millis() as u64;

    #[test]
    fn the_same_is_said_a_few_times_and_then_with_the_number_held_back() {
        let limiter = Limiter::new(3);
        let start = now();
        let said = |at| limiter.admit(7, at);
        assert_eq!([said(start), said(start), said(start + 1)], [Some(0); 3]);
        assert!((0..200).all(|_| said(start + 2).is_none()));
        assert_eq!(limiter.admit(8, start + 2), Some(0), "another is not affected");
        assert_eq!(said(start + OVER), Some(200));
        assert_eq!([said(start + OVER), said(start + OVER)], [Some(0); 2]);
        assert_eq!(said(start + OVER), None);
        assert_eq!(said(start + 2 * OVER), Some(1));
    }

    #[test]
    fn a_count_stops_at_its_largest() {
        let limiter = Limiter::new(1);
        let most = State::MOST_HELD;
        assert_eq!(limiter.admit(7, 1), Some(0));
        assert!((0..most + 5).all(|_| limiter.admit(7, 1).is_none()));
        assert_eq!(limiter.admit(7, 1 + OVER), Some(most));
    }

    #[test]
    fn what_was_said_longest_ago_is_forgotten_for_what_is_new() {
        let limiter = Limiter::new(1);
        // All in one set.
        let key = |number: u64| 3 + number * SETS as u64;
        for number in 0..WAYS as u64 {
            assert_eq!(limiter.admit(key(number), 10 + number), Some(0));
        }
        assert_eq!(limiter.admit(key(100), 50), Some(0));
        assert_eq!(limiter.admit(key(1), 50), None, "remembered");
        assert_eq!(limiter.admit(key(0), 50), Some(0), "forgotten");
        for number in 0..100_000 {
            assert_eq!(limiter.admit(key(1000 + number), 60), Some(0), "new ones always pass");
        }
    }

    #[test]
    fn threads_say_no_more_together_than_one_alone() {
        let limiter = Limiter::new(5);
        assert_eq!(limiter.admit(7, 1), Some(0));
        let threads = || (0..4).map(|_| 1000);
        let said: usize = std::thread::scope(|scope| {
            let count = |times| (0..times).filter(|_| limiter.admit(7, 1).is_some()).count();
            let running: Vec<_> =
                threads().map(|times| scope.spawn(move || count(times))).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(said, 4);
        assert_eq!(limiter.admit(7, 1 + OVER), Some(4000 - 4));
    }

    #[test]
    fn a_budget_is_a_burst_and_then_what_is_earned() {
        let budget = Budget::new();
        let spend = |at, times| (0..times).filter(|_| budget.spend(at)).count() as u64;
        assert_eq!(spend(1_000_000, 100), BURST);
        assert_eq!(spend(1_000_000 + EARNED, 100), 1);
        assert_eq!(spend(1_000_000 + EARNED * 4, 100), 3);
        assert_eq!(spend(9_000_000, 100), BURST);
    }
}
