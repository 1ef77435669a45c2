//! Does a polling thread share its core, and with whom? Told from the clock alone.
//!
//! Times are nanoseconds of any one clock.

/// A pause between two turns, or a `sched_yield`, that takes longer says that another thread ran meanwhile.
pub(crate) const AWAY_NS: u64 = 200_000;
/// How long a polling thread that was away yields when idle.
const YIELD_FOR_NS: u64 = 100_000_000;
/// So many late yields in a row: whoever shares the core does not yield back, and yielding to it costs a time slice each.
const LATE_YIELDS: u32 = 3;
/// How long yielding is given up then. Shorter than `LATE_YIELDS` time slices (3-4 ms each): when several threads that
/// would yield take each other for ones that do not, the last to give up outlasts the others, and all yield again.
const STUBBORN_FOR_NS: u64 = 10_000_000;

/// A `sched_yield` that took no longer: nobody else wanted the core. A system call and a clock reading, 0.1 to 0.3 us.
const ALONE_NS: u64 = 1_000;
/// Who has the core alone yields less and less often, from the first to the second: on every idle turn, 0.1 us, the
/// system call would be most of what the thread does. Somebody who comes back waits so long at most.
const YIELD_GAP_FIRST_NS: u64 = 500;
const YIELD_GAP_MAX_NS: u64 = 16_000;

/// A thread that was away first naps, so often at most: the scheduler looks for a free core when a thread wakes up, but
/// hardly moves one that never sleeps.
const NAP_EVERY_NS: u64 = 100_000_000;

/// What an idle turn is followed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Courtesy {
    /// The core is this thread's: poll on.
    None,
    /// `sched_yield`.
    Yield,
    /// Sleep as shortly as possible, once.
    Nap,
}

/// When a thread that turns a pump without pause should yield its core.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CoreWatch {
    last_turn_ns: u64,
    yield_until_ns: u64,
    /// When the next yield is due, and how far it was from the last.
    yield_from_ns: u64,
    yield_gap_ns: u64,
    stubborn_until_ns: u64,
    nap_from_ns: u64,
    wants_nap: bool,
    late_yields: u32,
}

impl CoreWatch {
    pub(crate) const NEW: Self = Self {
        last_turn_ns: u64::MAX,
        yield_until_ns: 0,
        yield_from_ns: 0,
        yield_gap_ns: 0,
        stubborn_until_ns: 0,
        nap_from_ns: 0,
        wants_nap: false,
        late_yields: 0,
    };

    /// A turn begins. The watch notices when the thread was away since the turn before.
    #[inline]
    pub(crate) fn turn(&mut self, now_ns: u64) {
        let gap = now_ns.saturating_sub(self.last_turn_ns);
        self.last_turn_ns = now_ns;
        if gap > AWAY_NS {
            self.was_away(now_ns);
        }
    }

    #[cold]
    fn was_away(&mut self, now_ns: u64) {
        if now_ns >= self.nap_from_ns {
            self.nap_from_ns = now_ns + NAP_EVERY_NS;
            self.wants_nap = true;
        } else {
            self.yield_until_ns = now_ns + YIELD_FOR_NS;
            (self.yield_from_ns, self.yield_gap_ns) = (now_ns, 0);
        }
    }

    /// What an idle turn at `now_ns` should be followed by.
    #[inline]
    pub(crate) fn courtesy(&mut self, now_ns: u64) -> Courtesy {
        if self.wants_nap {
            self.wants_nap = false;
            Courtesy::Nap
        } else if now_ns < self.yield_until_ns
            && now_ns >= self.stubborn_until_ns.max(self.yield_from_ns)
        {
            Courtesy::Yield
        } else {
            Courtesy::None
        }
    }

    /// The thread napped until `now_ns`: that gap is its own.
    pub(crate) fn napped(&mut self, now_ns: u64) {
        self.last_turn_ns = now_ns;
    }

    /// The thread yielded. True: it came back late.
    pub(crate) fn yielded(&mut self, before_ns: u64, after_ns: u64) -> bool {
        self.last_turn_ns = after_ns;
        let took_ns = after_ns.saturating_sub(before_ns);
        self.yield_gap_ns = match took_ns <= ALONE_NS {
            true => (2 * self.yield_gap_ns).clamp(YIELD_GAP_FIRST_NS, YIELD_GAP_MAX_NS),
            false => 0,
        };
        self.yield_from_ns = after_ns + self.yield_gap_ns;
        if took_ns <= AWAY_NS {
            self.late_yields = 0;
            return false;
        }
        self.late_yields += 1;
        if self.late_yields >= LATE_YIELDS {
            self.late_yields = 0;
            self.stubborn_until_ns = after_ns + STUBBORN_FOR_NS;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURN: u64 = 1_000;
    const SLICE: u64 = 4_000_000;

    #[test]
    fn a_thread_alone_polls_on() {
        let mut watch = CoreWatch::NEW;
        assert!((1..10_000).all(|turn| {
            watch.turn(turn * TURN);
            watch.courtesy(turn * TURN) == Courtesy::None
        }));
    }

    /// A watch that has napped in vain: it was away again soon after.
    fn crowded() -> CoreWatch {
        let mut watch = CoreWatch::NEW;
        watch.turn(0);
        watch.turn(SLICE);
        assert_eq!(watch.courtesy(SLICE), Courtesy::Nap);
        assert_eq!(watch.courtesy(SLICE), Courtesy::None);
        watch.napped(SLICE + TURN);
        watch.turn(2 * SLICE);
        watch
    }

    #[test]
    fn a_thread_that_was_away_naps_then_yields_for_a_while() {
        let mut watch = crowded();
        assert_eq!(watch.courtesy(2 * SLICE), Courtesy::Yield);
        assert_eq!(watch.courtesy(2 * SLICE + YIELD_FOR_NS), Courtesy::None);
    }

    #[test]
    fn yields_that_nobody_takes_become_rare_until_one_is_taken() {
        let mut watch = crowded();
        // A turn of 100 ns, a yield of 200 ns when nobody is there.
        let (begin, mut now, mut yields) = (2 * SLICE, 2 * SLICE, 0);
        while now < begin + 1_000_000 {
            match watch.courtesy(now) {
                Courtesy::Yield => {
                    yields += 1;
                    watch.yielded(now, now + 200);
                    now += 200;
                }
                courtesy => assert_eq!(courtesy, Courtesy::None),
            }
            now += 100;
            watch.turn(now);
        }
        assert!((1_000_000 / YIELD_GAP_MAX_NS..80).contains(&yields), "{yields}");
        // Somebody is there: they share turn by turn.
        now = watch.yield_from_ns;
        for _ in 0..100 {
            assert_eq!(watch.courtesy(now), Courtesy::Yield);
            assert!(!watch.yielded(now, now + 5_000));
            now += 5_100;
            watch.turn(now);
        }
    }

    #[test]
    fn yielding_to_a_thread_that_does_not_yield_back_is_given_up() {
        let mut watch = crowded();
        let mut now = 2 * SLICE;
        for _ in 0..LATE_YIELDS {
            assert_eq!(watch.courtesy(now), Courtesy::Yield);
            assert!(watch.yielded(now, now + SLICE));
            now += SLICE;
        }
        assert_eq!(watch.courtesy(now), Courtesy::None);
        assert_eq!(watch.courtesy(now + STUBBORN_FOR_NS), Courtesy::Yield);
        // One short yield, and it trusts again.
        watch.yielded(now, now + SLICE);
        watch.yielded(now, now + TURN);
        watch.yielded(now, now + SLICE);
        assert_eq!(watch.courtesy(now + STUBBORN_FOR_NS), Courtesy::Yield);
    }
}
