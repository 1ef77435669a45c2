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

/// Watches one session link.
///
/// A ping goes out when nothing was heard for a quarter of the timeout, so that a healthy peer is
/// asked three times before it is given up.
#[derive(Debug)]
pub(crate) struct Liveness {
    timeout: Duration,
    heard: Instant,
    asked: Instant,
    next: Instant,
}

impl Liveness {
    pub(crate) fn new(timeout: Duration, now: Instant) -> Self {
        Self { timeout, heard: now, asked: now, next: now + timeout / 4 }
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Something arrived.
    #[inline]
    pub(crate) fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// When to call `check`.
    pub(crate) fn next(&self) -> Instant {
        self.next
    }

    /// Judges the silence. A call that comes late by more than a quarter of the timeout means that
    /// this lane was not running (preempted, stopped, VM paused): that gap is not held against the
    /// peer, whose bytes may be waiting in our socket.
    pub(crate) fn check(&mut self, now: Instant) -> Verdict {
        let late = now.saturating_duration_since(self.next);
        if late > self.timeout / 4 {
            let half = now.checked_sub(self.timeout / 2).unwrap_or(now);
            self.heard = self.heard.max(half);
        }
        let silent = now.saturating_duration_since(self.heard);
        if silent >= self.timeout {
            return Verdict::Dead;
        }
        let interval = self.timeout / 4;
        if silent >= interval && now.saturating_duration_since(self.asked) >= interval {
            self.asked = now;
            self.next = now + interval;
            return Verdict::Ping(self.next);
        }
        self.next = (self.heard.max(self.asked) + interval).max(now + interval / 4);
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
    fn a_silent_peer_is_asked_three_times_and_then_dead() {
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
                    assert!(at - start >= T && at - start <= T + T / 4, "{:?}", at - start);
                    break;
                }
            }
        }
        assert_eq!(pings, 3);
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
