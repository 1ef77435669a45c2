//! How long transfers to a peer have taken: what estimates are made from.

// Bytes and nanoseconds of this world are below 2^52, and none is negative.
#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::plan::Operation;

/// Size classes: two for each power of two.
const CLASSES: usize = 80;
/// Weight of the newest transfer in the running mean: 1 / 8.
const WEIGHT: f64 = 0.125;
/// Descriptors that are shorter on average make a list scattered: their number costs, too.
const SCATTERED_BELOW: u64 = 64 << 10;

/// Running means of one size class. The lane that owns the peer writes, and callers' threads that copy by
/// themselves: one may overwrite what another has just measured, and readers may see one mean newer than the other,
/// which is as good.
#[derive(Debug, Default)]
struct Class {
    nanoseconds: AtomicU64,
    bytes: AtomicU64,
    deviation: AtomicU64,
}

fn load(cell: &AtomicU64) -> f64 {
    f64::from_bits(cell.load(Ordering::Relaxed))
}

fn store(cell: &AtomicU64, value: f64) {
    cell.store(value.to_bits(), Ordering::Relaxed);
}

impl Class {
    fn record(&self, bytes: f64, nanoseconds: f64) {
        let (mean, mean_bytes) = (load(&self.nanoseconds), load(&self.bytes));
        if mean == 0.0 {
            store(&self.bytes, bytes);
            store(&self.deviation, nanoseconds / 2.0);
            store(&self.nanoseconds, nanoseconds);
            return;
        }
        // One that took many times as long (a pause of a thread) counts like a slow one only.
        let capped = nanoseconds.min(mean * 4.0);
        let deviation = load(&self.deviation);
        store(&self.deviation, deviation + ((capped - mean).abs() - deviation) * WEIGHT);
        store(&self.bytes, mean_bytes + (bytes - mean_bytes) * WEIGHT);
        store(&self.nanoseconds, mean + (capped - mean) * WEIGHT);
    }

    fn point(&self) -> Option<Point> {
        let nanoseconds = load(&self.nanoseconds);
        (nanoseconds > 0.0).then(|| Point {
            bytes: load(&self.bytes),
            nanoseconds,
            deviation: load(&self.deviation),
        })
    }
}

#[derive(Debug, Clone, Copy)]
struct Point {
    bytes: f64,
    nanoseconds: f64,
    deviation: f64,
}

/// How long a transfer is expected to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// From `post` to the end.
    pub duration: Duration,
    /// How far transfers like it were from it, on average; larger where none was like it.
    pub margin: Duration,
}

/// What the transfers to one peer have cost, by direction, shape and size. 8 KiB.
#[derive(Debug)]
pub(crate) struct History {
    kinds: [[Class; CLASSES]; 4],
}

impl Default for History {
    fn default() -> Self {
        let kinds = std::array::from_fn(|_| std::array::from_fn(|_| Class::default()));
        Self { kinds }
    }
}

fn kind(operation: Operation, bytes: u64, descriptors: usize) -> usize {
    let scattered = descriptors > 4 && bytes / descriptors as u64 <= SCATTERED_BELOW;
    usize::from(operation == Operation::Write) * 2 + usize::from(scattered)
}

/// Two classes for each power of two: 4, 6, 8, 12, 16, ...
fn class(bytes: u64) -> usize {
    if bytes < 2 {
        return 0;
    }
    let log = bytes.ilog2() as usize;
    let half = (bytes >> (log - 1)) as usize & 1;
    (2 * log + half).min(CLASSES - 1)
}

impl History {
    /// A transfer has ended well. Some tens of instructions and three stores; no lock.
    pub(crate) fn record(
        &self,
        operation: Operation,
        bytes: u64,
        descriptors: usize,
        took: Duration,
    ) {
        let nanoseconds = (took.as_nanos() as f64).max(1.0);
        self.kinds[kind(operation, bytes, descriptors)][class(bytes)]
            .record(bytes as f64, nanoseconds);
    }

    /// What a transfer of this kind would take; `None` before any has ended well.
    pub(crate) fn estimate(
        &self,
        operation: Operation,
        bytes: u64,
        descriptors: usize,
    ) -> Option<Estimate> {
        let own = kind(operation, bytes, descriptors);
        // The same direction in the other shape, then the other direction.
        let alike = [own, own ^ 1, own ^ 2, own ^ 3];
        let (rank, (below, above)) = alike.into_iter().enumerate().find_map(|(rank, kind)| {
            let found = self.around(kind, bytes);
            (found.0.is_some() || found.1.is_some()).then_some((rank, found))
        })?;
        let (nanoseconds, deviation) = between(below, above, bytes as f64);
        let doubt = if rank == 0 { deviation } else { deviation.max(nanoseconds) };
        let duration = |nanoseconds: f64| Duration::from_nanos(nanoseconds.max(1.0) as u64);
        Some(Estimate { duration: duration(nanoseconds), margin: duration(doubt) })
    }

    /// The nearest size classes with a history, at or below and above `bytes`.
    fn around(&self, kind: usize, bytes: u64) -> (Option<Point>, Option<Point>) {
        let classes = &self.kinds[kind];
        let split = class(bytes);
        let below = classes[..=split].iter().rev().find_map(Class::point);
        let above = classes[split + 1..].iter().find_map(Class::point);
        (below, above)
    }
}

/// Duration and deviation at `bytes`, on the line through what is known around it.
fn between(below: Option<Point>, above: Option<Point>, bytes: f64) -> (f64, f64) {
    match (below, above) {
        (Some(low), Some(high)) if class(low.bytes as u64) != class(bytes as u64) => {
            let share = ((bytes - low.bytes) / (high.bytes - low.bytes)).clamp(0.0, 1.0);
            let mix = |a: f64, b: f64| a + (b - a) * share;
            (mix(low.nanoseconds, high.nanoseconds), mix(low.deviation, high.deviation))
        }
        (Some(low), _) => {
            // Beyond the largest known, time grows with the bytes: at least, the wire does not get
            // faster.
            let growth = (bytes / low.bytes.max(1.0)).max(1.0);
            let known = growth < 2.0;
            let nanoseconds = low.nanoseconds * growth;
            (nanoseconds, if known { low.deviation } else { nanoseconds })
        }
        (None, Some(high)) => {
            // Below the smallest known: no longer than that, and no shorter than its share.
            let share = bytes / high.bytes.max(1.0);
            let nanoseconds = high.nanoseconds * share.max(0.25);
            (nanoseconds, nanoseconds)
        }
        (None, None) => (0.0, 0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(estimate: Option<Estimate>) -> f64 {
        estimate.unwrap().duration.as_nanos() as f64 / 1000.0
    }

    #[test]
    fn nothing_is_estimated_before_anything_was_measured() {
        let history = History::default();
        assert_eq!(history.estimate(Operation::Read, 4096, 1), None);
    }

    #[test]
    fn size_classes_are_half_powers_of_two() {
        assert_eq!([0, 1, 2, 3, 4, 6, 8].map(class), [0, 0, 2, 3, 4, 5, 6]);
        assert!(class(5) == class(4) && class(7) == class(6));
        assert_eq!(class(u64::MAX), CLASSES - 1);
        for bytes in 2..100_000u64 {
            assert!(class(bytes) <= class(bytes + 1));
        }
    }

    #[test]
    fn known_sizes_give_their_own_mean_and_sizes_between_them_a_mix() {
        let history = History::default();
        for _ in 0..100 {
            history.record(Operation::Read, 64, 1, Duration::from_micros(10));
            history.record(Operation::Read, 1 << 20, 1, Duration::from_micros(210));
        }
        assert!((micros(history.estimate(Operation::Read, 64, 1)) - 10.0).abs() < 0.1);
        assert!((micros(history.estimate(Operation::Read, 1 << 20, 1)) - 210.0).abs() < 1.0);
        let middle = micros(history.estimate(Operation::Read, 1 << 19, 1));
        assert!((100.0..120.0).contains(&middle), "{middle}");
        let beyond = micros(history.estimate(Operation::Read, 4 << 20, 1));
        assert!((800.0..900.0).contains(&beyond), "{beyond}");
        // A direction without a history borrows, and says that it is in doubt.
        let other = history.estimate(Operation::Write, 64, 1).unwrap();
        assert!(other.margin >= other.duration);
    }

    #[test]
    fn the_mean_follows_a_change_and_one_pause_does_not_move_it_far() {
        let history = History::default();
        for _ in 0..50 {
            history.record(Operation::Write, 4096, 1, Duration::from_micros(10));
        }
        history.record(Operation::Write, 4096, 1, Duration::from_secs(1));
        assert!(micros(history.estimate(Operation::Write, 4096, 1)) < 15.0);
        for _ in 0..50 {
            history.record(Operation::Write, 4096, 1, Duration::from_micros(40));
        }
        let now = micros(history.estimate(Operation::Write, 4096, 1));
        assert!((35.0..41.0).contains(&now), "{now}");
    }

    #[test]
    fn scattered_lists_have_a_history_of_their_own() {
        let history = History::default();
        for _ in 0..20 {
            history.record(Operation::Read, 16 << 20, 1, Duration::from_millis(3));
            history.record(Operation::Read, 16 << 20, 4096, Duration::from_millis(9));
        }
        let estimate = |descriptors| history.estimate(Operation::Read, 16 << 20, descriptors);
        assert!(micros(estimate(1)) < 3100.0 && micros(estimate(4096)) > 8900.0);
    }
}
