//! Is the peer still there?

use std::time::{Duration, Instant};

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing before this instant.
    Wait(Instant),
    /// Send a ping; ask again at this instant.
    Ping(Instant),
    /// Nothing was heard for the whole timeout.
    Dead,
}

/// How much of a silence may be the lane's own delays: half of a timeout that is about as long as threads wait for a core where
/// there are too few, and not much of a long one.
fn excusable(timeout: Duration) -> Duration {
    (timeout / 5 + Duration::from_millis(25)).min(timeout / 2)
}

/// What a peer gets beyond the timeout, since its lane may have to wait for a core: ten time slices and more of others. Nothing beside an
/// ordinary timeout; as much again as the shortest one.
const GRACE: Duration = Duration::from_millis(50);

/// Long gaps of one silence after which the peer gets time. A machine that stands still again and again knows nothing of anybody.
const MOST_GAPS: u8 = 3;

/// Watches one session link.
///
/// A ping goes out when nothing was heard for a quarter of the timeout, so that a healthy peer is
/// asked at least four times before it is given up.
#[derive(Debug)]
pub(crate) struct Liveness {
    timeout: Duration,
    heard: Instant,
    asked: Instant,
    next: Instant,
    /// For how long of this silence the lane itself had no core, long gaps apart.
    late: Duration,
    /// How many long gaps there were in it.
    gaps: u8,
}

impl Liveness {
    pub(crate) fn new(timeout: Duration, now: Instant) -> Self {
        Self {
            timeout,
            heard: now,
            asked: now,
            next: now + timeout / 4,
            late: Duration::ZERO,
            gaps: 0,
        }
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Something arrived.
    #[inline]
    pub(crate) fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.late = Duration::ZERO;
        self.gaps = 0;
    }

    /// When to call `check`.
    pub(crate) fn next(&self) -> Instant {
        self.next
    }

    /// Judges the silence. A call that comes late means that this lane was not running (preempted, stopped, VM paused), and a
    /// peer's bytes may be waiting in our socket. After a gap of more than a quarter of the timeout the peer has half a
    /// timeout left, [`MOST_GAPS`] times in one silence; shorter delays, as where many threads share a core, are not held against it
    /// up to [`excusable`]. So a peer that is dead is so in the end, however busy this side is.
    pub(crate) fn check(&mut self, now: Instant) -> Verdict {
        let late = now.saturating_duration_since(self.next);
        if late > self.timeout / 4 && self.gaps < MOST_GAPS {
            self.gaps += 1;
            let half = now.checked_sub(self.timeout / 2).unwrap_or(now);
            self.heard = self.heard.max(half);
        } else {
            self.late = (self.late + late).min(excusable(self.timeout));
        }
        let silent = now.saturating_duration_since(self.heard).saturating_sub(self.late);
        let limit = self.timeout + GRACE;
        if silent >= limit {
            return Verdict::Dead;
        }
        let interval = self.timeout / 4;
        let end = self.heard + self.late + limit;
        if silent >= interval && now.saturating_duration_since(self.asked) >= interval {
            self.asked = now;
            self.next = end.min(now + interval);
            return Verdict::Ping(self.next);
        }
        let next = (self.heard.max(self.asked) + interval).max(now + interval / 4);
        self.next = end.min(next);
        Verdict::Wait(self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Duration = Duration::from_millis(400);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_silent_peer_is_asked_four_times_and_then_dead() {
        let start = Instant::now();
        let mut liveness = Liveness::new(T, start);
        let mut pings = 0;
        loop {
            let at = liveness.next();
            match liveness.check(at) {
                Verdict::Ping(next) | Verdict::Wait(next) if next <= at => panic!("no progress"),
                Verdict::Ping(_) => pings += 1,
                Verdict::Wait(_) => {}
                Verdict::Dead => {
                    assert_eq!(at - start, T + GRACE);
                    break;
                }
            }
        }
        assert_eq!(pings, 4);
    }

    #[test]
    fn delays_of_our_own_are_not_held_against_the_peer_for_ever() {
        // Each look a fifth of the timeout late, or now and then: how long it takes until the peer is given up.
        let given_up = |late: Duration| {
            let start = Instant::now();
            let mut liveness = Liveness::new(T, start);
            let (mut at, mut pings) = (start, 0);
            loop {
                at = liveness.next().max(at) + late;
                match liveness.check(at) {
                    Verdict::Ping(_) => pings += 1,
                    Verdict::Wait(_) => {}
                    Verdict::Dead => return (at - start, pings),
                }
            }
        };
        assert_eq!(given_up(Duration::ZERO), (T + GRACE, 4));
        for late in [T / 20, T / 10, T / 5] {
            let (after, pings) = given_up(late);
            assert!(
                after >= T + (3 * late).min(excusable(T)) && pings >= 2,
                "{late:?}: {after:?}, {pings}"
            );
            assert!(after <= T + GRACE + excusable(T) + T / 4 + late, "{late:?}: {after:?}");
        }
    }

    #[test]
    fn gaps_of_our_own_are_excused_a_few_times_in_one_silence() {
        let start = Instant::now();
        let mut liveness = Liveness::new(T, start);
        let mut looks = 0;
        loop {
            looks += 1;
            assert!(looks < 10, "it is never given up");
            if liveness.check(liveness.next() + T / 2) == Verdict::Dead {
                break;
            }
        }
        assert!(looks > usize::from(MOST_GAPS), "{looks}");
    }

    #[test]
    fn what_is_heard_ends_the_excuse() {
        let start = Instant::now();
        let mut liveness = Liveness::new(T, start);
        let late = liveness.next() + T / 5;
        liveness.check(late);
        liveness.heard(late);
        loop {
            let at = liveness.next();
            if liveness.check(at) == Verdict::Dead {
                assert_eq!(at - late, T + GRACE);
                break;
            }
        }
    }

    #[test]
    fn a_talking_peer_is_not_asked() {
        let start = Instant::now();
        let mut liveness = Liveness::new(T, start);
        let mut at = start;
        for _ in 0..50 {
            at += ms(30);
            liveness.heard(at);
            if at >= liveness.next() {
                assert!(matches!(liveness.check(at), Verdict::Wait(_)));
            }
        }
    }

    #[test]
    fn a_gap_of_our_own_is_not_held_against_the_peer() {
        let start = Instant::now();
        let mut liveness = Liveness::new(T, start);
        let at = start + ms(5000);
        assert!(matches!(liveness.check(at), Verdict::Ping(_)));
        assert!(liveness.next() > at);
    }
}
