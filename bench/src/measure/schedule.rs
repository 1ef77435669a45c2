//! The arrival times of an open loop.

/// Operation `n` is due at `begin + n / rate`, whatever became of the ones before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    begin_ns: u64,
    interval_ns: f64,
}

impl Schedule {
    /// A schedule of `rate` operations per second from `begin_ns` on.
    pub(crate) fn new(begin_ns: u64, rate: f64) -> Self {
        Self { begin_ns, interval_ns: 1e9 / rate }
    }

    /// When an operation should start. Computed from its number, so that rounding never accumulates.
    #[inline]
    pub(crate) fn intended_ns(&self, operation: u64) -> u64 {
        self.begin_ns + (operation as f64 * self.interval_ns) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_does_not_accumulate() {
        let schedule = Schedule::new(5, 3.0e6);
        assert_eq!(schedule.intended_ns(0), 5);
        assert_eq!(schedule.intended_ns(3_000_000), 1_000_000_005);
        assert_eq!(schedule.intended_ns(30_000_000), 10_000_000_005);
    }
}
