//! Latency histograms: a thin layer over [`hdrhistogram`] that cannot fail.

/// Nanoseconds, from 1 ns to 60 s with three significant digits; larger values count as 60 s.
///
/// Recording costs about 10 ns and allocates nothing. About 200 KiB are allocated when it is made.
#[derive(Clone, Debug)]
pub struct Histogram {
    inner: Option<hdrhistogram::Histogram<u64>>,
}

const MAX_NS: u64 = 60_000_000_000;

/// The usual percentiles, in nanoseconds; all zero when nothing was recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Percentiles {
    /// Values recorded.
    pub count: u64,
    /// Half of the values are at most this.
    pub p50: u64,
    /// 90% of the values are at most this.
    pub p90: u64,
    /// 99% of the values are at most this.
    pub p99: u64,
    /// 99.9% of the values are at most this.
    pub p999: u64,
    /// The largest value.
    pub max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// An empty histogram. Takes its memory now, so that recording allocates nothing.
    pub fn new() -> Self {
        Self { inner: hdrhistogram::Histogram::new_with_bounds(1, MAX_NS, 3).ok() }
    }

    /// Records `ns` nanoseconds.
    pub fn record(&mut self, ns: u64) {
        if let Some(inner) = &mut self.inner {
            inner.saturating_record(ns.clamp(1, MAX_NS));
        }
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: &Self) {
        match (&mut self.inner, &other.inner) {
            // Both have the same bounds, so adding cannot fail.
            (Some(inner), Some(other)) => _ = inner.add(other),
            (inner @ None, Some(other)) => *inner = Some(other.clone()),
            (_, None) => {}
        }
    }

    /// The value at `quantile` (0.0 to 1.0), in nanoseconds; 0 when empty.
    pub fn value_at(&self, quantile: f64) -> u64 {
        self.inner.as_ref().map_or(0, |inner| inner.value_at_quantile(quantile))
    }

    /// The usual percentiles.
    pub fn percentiles(&self) -> Percentiles {
        Percentiles {
            count: self.inner.as_ref().map_or(0, |inner| inner.len()),
            p50: self.value_at(0.5),
            p90: self.value_at(0.9),
            p99: self.value_at(0.99),
            p999: self.value_at(0.999),
            max: self.inner.as_ref().map_or(0, |inner| inner.max()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_a_known_series() {
        let mut low = Histogram::new();
        let mut high = Histogram::new();
        assert_eq!(low.percentiles(), Percentiles::default());
        for value in 1..=500 {
            low.record(value * 1000);
            high.record((value + 500) * 1000);
        }
        low.merge(&high);
        let all = low.percentiles();
        assert_eq!(all.count, 1000);
        for (got, wanted) in [(all.p50, 500_000), (all.p99, 990_000), (all.max, 1_000_000)] {
            assert!(got.abs_diff(wanted) <= wanted / 500, "{got} instead of {wanted}");
        }
        low.record(u64::MAX);
        assert!(low.percentiles().max.abs_diff(MAX_NS) < MAX_NS / 500);
    }
}
