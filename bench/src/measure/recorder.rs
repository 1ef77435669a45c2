//! Where latencies are collected: HDR histograms of nanoseconds, three significant digits.

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;

use super::Schedule;

/// The longest latency that a histogram tells from longer ones: two minutes.
const MAX_NS: u64 = 120_000_000_000;
const DIGITS: u8 = 3;

/// Non-empty buckets of a histogram as (nanoseconds, count): compact, mergeable, and readable in any language.
pub(crate) type Points = Vec<(u64, u64)>;

/// An empty histogram of the range and precision that all series share.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_NS, DIGITS)
        .expect("constants within the documented bounds: at least 1, at most 5 digits")
}

/// Non-empty buckets of a histogram.
pub(crate) fn points_of(histogram: &Histogram<u64>) -> Points {
    histogram
        .iter_recorded()
        .map(|step| (step.value_iterated_to(), step.count_at_value()))
        .collect()
}

/// The inverse of [`points_of`], added to `histogram`.
pub(crate) fn restore(histogram: &mut Histogram<u64>, points: &[(u64, u64)]) -> Result<()> {
    points.iter().try_for_each(|&(value, count)| {
        histogram.record_n(value, count).context("a latency outside of the histogram's range")
    })
}

/// Collects the latencies of one run.
///
/// In an open loop it keeps two: the *response* time counts from the moment at which the schedule wanted the operation
/// to start, the *service* time from the moment at which it did. A system that stalls makes later operations start
/// late; only the former shows that (coordinated omission).
pub(crate) struct Recorder {
    response: Histogram<u64>,
    service: Option<Histogram<u64>>,
}

impl Recorder {
    pub(crate) fn new(open_loop: bool) -> Self {
        Self { response: histogram(), service: open_loop.then(histogram) }
    }

    /// Adds one finished operation.
    #[inline]
    pub(crate) fn record(&mut self, intended_ns: u64, started_ns: u64, finished_ns: u64) {
        self.response.saturating_record(finished_ns.saturating_sub(intended_ns));
        if let Some(service) = &mut self.service {
            service.saturating_record(finished_ns.saturating_sub(started_ns));
        }
    }

    /// Adds the operations that a schedule still owed when it was cut off: each took at least until now.
    ///
    /// Leaving them out would make an overloaded system look better the more it is overloaded.
    pub(crate) fn record_unserved(&mut self, schedule: &Schedule, from: u64, to: u64, now_ns: u64) {
        for operation in from..to {
            self.response.saturating_record(now_ns.saturating_sub(schedule.intended_ns(operation)));
        }
    }

    pub(crate) fn response(&self) -> &Histogram<u64> {
        &self.response
    }

    pub(crate) fn service(&self) -> Option<&Histogram<u64>> {
        self.service.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_restore_the_same_histogram() {
        let mut original = histogram();
        for value in [1, 900, 7_777, 1_234_567, 59_000_000_000] {
            original.record_n(value, value % 7 + 1).expect("in range");
        }
        let mut copy = histogram();
        restore(&mut copy, &points_of(&original)).expect("in range");
        assert_eq!(copy, original);
        assert!(restore(&mut copy, &[(u64::MAX, 1)]).is_err());
    }

    #[test]
    fn a_stall_is_charged_to_every_operation_that_had_to_wait_for_it() {
        // 1000 operations, one each 100 us, 10 us of service; the first one stalls for 50 ms.
        let schedule = Schedule::new(0, 10_000.0);
        let mut open = Recorder::new(true);
        let mut free_at = 0;
        for operation in 0..1000 {
            let intended = schedule.intended_ns(operation);
            let started = intended.max(free_at);
            let finished = started + if operation == 0 { 50_000_000 } else { 10_000 };
            free_at = finished;
            open.record(intended, started, finished);
        }
        let service = open.service().expect("an open loop keeps service times");
        assert!(service.value_at_quantile(0.99) < 11_000, "service times hide the stall");
        let delayed = open.response().len() - open.response().count_between(0, 20_000);
        assert!((540..=560).contains(&delayed), "{delayed} operations waited");
        assert!(open.response().value_at_quantile(0.50) > 1_000_000, "the median waited too");
        assert!(open.response().max() >= 49_900_000);
    }

    #[test]
    fn unserved_operations_count_from_their_intended_start() {
        let schedule = Schedule::new(1_000, 1e6);
        let mut recorder = Recorder::new(true);
        recorder.record_unserved(&schedule, 5, 10, 1_000_000);
        assert_eq!(recorder.response().len(), 5);
        assert!(recorder.response().min() > 980_000);
    }
}
