//! Figures of scenario `decode-under-prefill`: what becomes of small reads beside large writes, and of the writes.

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::results::{Percentiles, Spread};
use super::table::align;
use crate::measure::{LoadOutcome, LoadShape, PhaseOutcome, histogram, restore};
use crate::units::{Bytes, microseconds};

/// Everything measured so far of one backend.
pub(crate) struct LoadTally {
    service: Histogram<u64>,
    idle: (u64, u64),
    loaded: (u64, u64),
    /// Per round: bytes per second of the writes alone, and beside the reads.
    bulk: Vec<(f64, f64)>,
}

impl LoadTally {
    pub(crate) fn new() -> Self {
        Self { service: histogram(), idle: (0, 0), loaded: (0, 0), bulk: Vec::new() }
    }

    /// Adds a round.
    pub(crate) fn add(&mut self, shape: LoadShape, outcome: &LoadOutcome) -> Result<()> {
        let LoadOutcome { reads, bulk, both } = outcome;
        for (sum, phase) in [(&mut self.idle, reads), (&mut self.loaded, both)] {
            *sum = (sum.0 + phase.due, sum.1 + phase.served);
        }
        let rate = |phase: &PhaseOutcome| {
            phase.bulk_operations as f64 * shape.bulk_bytes as f64
                / (phase.bulk_span_ns.max(1) as f64 / 1e9)
        };
        self.bulk.push((rate(bulk), rate(both)));
        restore(&mut self.service, &both.service)
    }

    /// The figures; `None` before the first round.
    pub(crate) fn figures(
        &self,
        id: &str,
        backend: &str,
        case: (usize, LoadShape),
    ) -> Option<Load> {
        let gigabytes = |rate: fn(&(f64, f64)) -> f64| {
            Spread::of(self.bulk.iter().map(|round| rate(round) / 1e9).collect())
        };
        let share = |(due, served): (u64, u64)| served as f64 / due.max(1) as f64;
        let (read_bytes, LoadShape { reads_per_s, bulk_bytes }) = case;
        Some(Load {
            id: id.to_owned(),
            backend: backend.to_owned(),
            read_bytes,
            reads_per_s,
            bulk_bytes,
            reads_due: self.loaded.0,
            reads_served: self.loaded.1,
            served_share: share(self.loaded),
            idle_served_share: share(self.idle),
            service_us: Percentiles::of(&self.service),
            bulk_alone_gb_per_s: gigabytes(|round| round.0)?,
            bulk_beside_gb_per_s: gigabytes(|round| round.1)?,
            bulk_share: Spread::of(self.bulk.iter().map(|round| round.1 / round.0).collect())?,
        })
    }
}

/// What the two kinds of transfer did to each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) id: String,
    pub(crate) backend: String,
    pub(crate) read_bytes: usize,
    pub(crate) reads_per_s: u32,
    pub(crate) bulk_bytes: usize,
    /// Reads that were due beside the writes, and those of them that ended in time.
    pub(crate) reads_due: u64,
    pub(crate) reads_served: u64,
    pub(crate) served_share: f64,
    /// The same share without writes.
    pub(crate) idle_served_share: f64,
    /// Beside the writes, from the moment at which a read was posted; the series counts from when it was due.
    pub(crate) service_us: Percentiles,
    pub(crate) bulk_alone_gb_per_s: Spread,
    pub(crate) bulk_beside_gb_per_s: Spread,
    /// Of the per-round ratios beside / alone.
    pub(crate) bulk_share: Spread,
}

/// Idle and loaded latency of a load's reads, as their series have them.
pub(crate) type Latencies = (Percentiles, Percentiles);

/// One row per backend; empty without any.
pub(crate) fn load_table<'a>(loads: impl Iterator<Item = (&'a Load, Option<Latencies>)>) -> String {
    let header = [
        "small reads beside large writes",
        "backend",
        "served",
        "reads/s due",
        "idle p50 us",
        "p99",
        "p99.9",
        "loaded p50 us",
        "p99",
        "p99.9",
        "bulk alone GB/s",
        "beside",
        "kept",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for (load, latencies) in loads {
        let us = |value: f64| microseconds((value * 1e3).round() as u64);
        let mut cells = vec![
            format!("{} reads, {} writes", Bytes(load.read_bytes), Bytes(load.bulk_bytes)),
            load.backend.clone(),
            format!("{:.1}%", load.served_share * 100.0),
            load.reads_per_s.to_string(),
        ];
        for side in [latencies.map(|both| both.0), latencies.map(|both| both.1)] {
            let of = |value: fn(&Percentiles) -> f64| {
                side.as_ref().map_or_else(|| "-".to_owned(), |side| us(value(side)))
            };
            cells.extend([of(|side| side.p50), of(|side| side.p99), of(|side| side.p999)]);
        }
        cells.push(format!("{:.2}", load.bulk_alone_gb_per_s.median));
        cells.push(format!("{:.2}", load.bulk_beside_gb_per_s.median));
        cells.push(format!("{:.0}%", load.bulk_share.median * 100.0));
        rows.push(cells);
    }
    if rows.len() == 1 { String::new() } else { align(&rows, 2) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const SHAPE: LoadShape = LoadShape { reads_per_s: 1000, bulk_bytes: 1_000_000_000 };

    pub(crate) fn outcome(served: u64) -> LoadOutcome {
        let reads = PhaseOutcome {
            due: 100,
            served: 100,
            response: vec![(20_000, 100)],
            service: vec![(19_000, 100)],
            ..PhaseOutcome::default()
        };
        let bulk = PhaseOutcome {
            bulk_operations: 4,
            bulk_span_ns: 1_000_000_000,
            ..PhaseOutcome::default()
        };
        let both = PhaseOutcome {
            served,
            response: vec![(90_000, 100)],
            bulk_span_ns: 1_000_000_000,
            bulk_operations: 3,
            ..reads.clone()
        };
        LoadOutcome { reads, bulk, both }
    }

    pub(crate) fn load(backend: &str) -> Load {
        let mut tally = LoadTally::new();
        tally.add(SHAPE, &outcome(80)).expect("in range");
        tally.add(SHAPE, &outcome(100)).expect("in range");
        let id = "decode-under-prefill/4KiB@1000+953MiB";
        tally.figures(id, backend, (4096, SHAPE)).expect("rounds")
    }

    #[test]
    fn shares_are_of_what_was_due() {
        let load = load("CORELANE");
        assert_eq!((load.reads_due, load.reads_served), (200, 180));
        assert!((load.served_share - 0.9).abs() < 1e-9 && load.idle_served_share == 1.0);
        assert!((load.bulk_alone_gb_per_s.median - 4.0).abs() < 1e-9);
        assert!((load.bulk_share.median - 0.75).abs() < 1e-9);
        assert!(LoadTally::new().figures("x", "y", (1, SHAPE)).is_none());
    }

    #[test]
    fn the_table_shows_both_latencies_and_both_rates() {
        let percentiles = |p50| Percentiles { p50, p99: p50, p999: p50, ..Percentiles::default() };
        let load = load("UCX");
        let table = load_table([(&load, Some((percentiles(20.0), percentiles(90.0))))].into_iter());
        let row = table.lines().nth(1).expect("a row");
        for part in ["UCX", "90.0%", "20.0", "90.0", "4.00", "3.00", "75%"] {
            assert!(row.contains(part), "{part}: {table}");
        }
        assert_eq!(load_table(std::iter::empty()), "");
    }
}
