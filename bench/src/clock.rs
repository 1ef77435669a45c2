//! The clock of every measurement: `CLOCK_MONOTONIC` in nanoseconds.
//!
//! It is read raw rather than through [`std::time::Instant`] because one-way latencies subtract a time taken in one
//! process from a time taken in another, which is sound only on one host (one clock) and needs a number to send.

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Nanoseconds of `CLOCK_MONOTONIC`; the same for all processes of a host (and time namespace).
#[inline]
pub(crate) fn now_ns() -> u64 {
    // The monotonic clock exists on every Linux; a failure would mean a broken kernel, and 0 makes it visible.
    match clock_gettime(ClockId::CLOCK_MONOTONIC) {
        Ok(time) => time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64,
        Err(_) => 0,
    }
}

/// What identifies the clock: two processes with equal values share it.
pub(crate) fn clock_identity() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/time")
        .map(|path| path.to_string_lossy().into_owned())
        .unwrap_or_default();
    format!("{} {namespace}", boot.trim())
}

/// How noisy the machine is before anything is measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Noise {
    /// Median cost of reading the clock once; every latency contains about one of them.
    pub(crate) timer_overhead_ns: u64,
    /// The smallest step seen between two different readings.
    pub(crate) timer_step_ns: u64,
    /// How long the machine was watched.
    pub(crate) watched_ms: u64,
    /// The longest time for which a spinning thread was not running.
    pub(crate) longest_gap_us: f64,
    /// Interruptions longer than 20 us, per second: preemptions, interrupts, the hypervisor.
    pub(crate) gaps_over_20us_per_second: f64,
}

/// Spins for `watched` and reports how often and how long this thread was interrupted.
pub(crate) fn measure_noise(watched: std::time::Duration) -> Noise {
    const SAMPLES: usize = 2001;
    let mut costs = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        let start = now_ns();
        for _ in 0..8 {
            std::hint::black_box(now_ns());
        }
        costs.push((now_ns() - start) / 9);
    }
    costs.sort_unstable();

    let watched_ns = watched.as_nanos() as u64;
    let begin = now_ns();
    let (mut last, mut longest, mut gaps, mut step) = (begin, 0, 0u64, u64::MAX);
    while last - begin < watched_ns {
        let now = now_ns();
        let gap = now - last;
        longest = longest.max(gap);
        gaps += u64::from(gap > 20_000);
        if gap > 0 {
            step = step.min(gap);
        }
        last = now;
    }
    let seconds = (last - begin) as f64 / 1e9;
    Noise {
        timer_overhead_ns: costs[SAMPLES / 2],
        timer_step_ns: step,
        watched_ms: (last - begin) / 1_000_000,
        longest_gap_us: longest as f64 / 1e3,
        gaps_over_20us_per_second: gaps as f64 / seconds,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_clock_advances_and_is_cheap_to_read() {
        let noise = measure_noise(Duration::from_millis(5));
        assert!(noise.watched_ms >= 5);
        assert!(noise.timer_overhead_ns < 100_000);
        assert!(noise.timer_step_ns > 0);
    }

    #[test]
    fn one_host_has_one_clock_identity() {
        assert_eq!(clock_identity(), clock_identity());
        assert!(clock_identity().len() > 10);
    }
}
