//! Adds up the outcomes of one case on one backend, over rounds and pairs.

use anyhow::Result;
use hdrhistogram::Histogram;

use super::costs::Costs;
use super::load::{Load, LoadTally};
use super::results::{Comparison, CpuCost, Percentiles, Round, Series, Spread};
use crate::case::{Backend, Case};
use crate::client::Outcome;
use crate::cpu::Usage;
use crate::measure::{Points, histogram, points_of, restore};

/// Everything measured so far for one case on one backend.
pub(crate) struct Tally {
    pub(crate) case: Case,
    pub(crate) backend: Backend,
    pairs: usize,
    placement: String,
    operations: u64,
    verified: u64,
    unserved: u64,
    bytes: u64,
    span_ns: u64,
    used_initiator: Usage,
    used_target: Usage,
    response: Measured,
    service: Measured,
    one_way: Measured,
    idle: Measured,
    load: LoadTally,
}

/// A row of the table with its histograms: of all rounds, and of each.
pub(crate) struct Row {
    pub(crate) series: Series,
    pub(crate) histogram: Histogram<u64>,
    pub(crate) rounds: Vec<Points>,
}

/// One kind of latency: all rounds together, and what each contributed.
struct Measured {
    all: Histogram<u64>,
    rounds: Vec<Round>,
    round_points: Vec<Points>,
}

impl Measured {
    fn new() -> Self {
        Self { all: histogram(), rounds: Vec::new(), round_points: Vec::new() }
    }

    fn add_round<'a>(
        &mut self,
        pairs: impl Iterator<Item = Option<&'a Points>>,
        operations_per_s: Option<f64>,
    ) -> Result<()> {
        let mut round = histogram();
        for points in pairs.flatten() {
            restore(&mut round, points)?;
        }
        if !round.is_empty() {
            let Percentiles { p50, p99, p999, .. } = Percentiles::of(&round);
            self.rounds.push(Round {
                operations: round.len(),
                p50_us: p50,
                p99_us: p99,
                p999_us: p999,
                operations_per_s,
            });
            let points = points_of(&round);
            restore(&mut self.all, &points)?;
            self.round_points.push(points);
        }
        Ok(())
    }
}

impl Tally {
    pub(crate) fn new(case: Case, backend: Backend) -> Self {
        Self {
            case,
            backend,
            pairs: 1,
            placement: String::new(),
            operations: 0,
            verified: 0,
            unserved: 0,
            bytes: 0,
            span_ns: 0,
            used_initiator: Usage::default(),
            used_target: Usage::default(),
            response: Measured::new(),
            service: Measured::new(),
            one_way: Measured::new(),
            idle: Measured::new(),
            load: LoadTally::new(),
        }
    }

    /// Adds one round: the outcomes of all pairs that ran at the same time.
    pub(crate) fn add_round(&mut self, outcomes: &[Outcome]) -> Result<()> {
        self.pairs = outcomes.len().max(1);
        let mut placements: Vec<&str> =
            outcomes.iter().map(|outcome| outcome.placement.as_str()).collect();
        placements.dedup();
        self.placement = placements.join(" | ");
        for outcome in outcomes {
            self.operations += outcome.operations;
            self.verified += outcome.verified;
            self.unserved += outcome.unserved;
            self.bytes += outcome.bytes;
            self.span_ns += outcome.span_ns;
            self.used_initiator += outcome.used_initiator;
            self.used_target += outcome.used_target;
            if let (Some(shape), Some(load)) = (self.case.load, &outcome.load) {
                self.load.add(shape, load)?;
            }
        }
        fn idle(outcome: &Outcome) -> Option<&Points> {
            outcome.load.as_ref().map(|load| &load.reads.response)
        }
        self.idle.add_round(outcomes.iter().map(idle), None)?;
        let done: u64 = outcomes.iter().map(|outcome| outcome.operations).sum();
        let span_ns: u64 = outcomes.iter().map(|outcome| outcome.span_ns).sum();
        let rate = (span_ns > 0).then(|| done as f64 * 1e9 * self.pairs as f64 / span_ns as f64);
        self.response.add_round(outcomes.iter().map(|outcome| Some(&outcome.response)), rate)?;
        self.service.add_round(outcomes.iter().map(|outcome| outcome.service.as_ref()), None)?;
        self.one_way.add_round(outcomes.iter().map(|outcome| outcome.one_way.as_ref()), None)
    }

    /// The rows of this case: one, or two where the target saw something too.
    pub(crate) fn series(&self) -> Vec<Row> {
        if self.response.all.is_empty() {
            return Vec::new();
        }
        let id = self.case.id();
        if self.case.load.is_some() {
            let rows = [("idle", &self.idle), ("loaded", &self.response)];
            let row = |(part, measured): (&str, &Measured)| {
                self.row(&format!("{id}/{part}"), measured, false)
            };
            return rows.map(row).into();
        }
        if !self.case.operation.notifies() {
            return vec![self.row(&id, &self.response, true)];
        }
        let mut rows = Vec::new();
        if !self.one_way.all.is_empty() {
            rows.push(self.row(&format!("{id}/one-way"), &self.one_way, false));
        }
        rows.push(self.row(&format!("{id}/round-trip"), &self.response, true));
        rows
    }

    /// What the two kinds of transfer of a load did to each other.
    pub(crate) fn load(&self) -> Option<Load> {
        let case = (self.case.block_bytes, self.case.load?);
        self.load.figures(&self.case.id(), &self.backend.to_string(), case)
    }

    fn row(&self, id: &str, measured: &Measured, rates: bool) -> Row {
        // Pairs run side by side: the time that passed is the mean of theirs, the work is the sum.
        let seconds = self.span_ns as f64 / 1e9 / self.pairs as f64;
        let rate = |amount: f64| (rates && seconds > 0.0).then_some(amount / seconds);
        let moved = (rates && self.bytes > 0).then_some(self.bytes as f64);
        let costs = Costs::of(self.used_initiator, self.used_target, self.operations, self.bytes)
            .filter(|_| rates);
        let series = Series {
            id: id.to_owned(),
            backend: self.backend,
            scenario: self.case.scenario,
            operation: self.case.operation,
            blocks: self.case.blocks,
            block_bytes: self.case.block_bytes,
            window: self.case.window,
            notification_bytes: self.case.notification_bytes,
            pairs: self.pairs,
            placement: self.placement.clone(),
            operations: self.operations,
            verified_operations: self.verified,
            unserved_operations: self.unserved,
            latency_us: Percentiles::of(&measured.all),
            service_us: (rates && !self.service.all.is_empty())
                .then(|| Percentiles::of(&self.service.all)),
            gigabytes_per_s: moved.and_then(|bytes| rate(bytes / 1e9)),
            operations_per_s: rate(self.operations as f64),
            cpu_s_per_gib: costs.and_then(|costs| {
                Some(CpuCost {
                    initiator: costs.initiator.cpu_s_per_gib?,
                    target: costs.target.cpu_s_per_gib?,
                })
            }),
            costs,
            rounds: measured.rounds.clone(),
            hgrm: format!("{}.{}.hgrm", id.replace('/', "-"), self.backend),
            histogram_ns: points_of(&measured.all),
        };
        Row { series, histogram: measured.all.clone(), rounds: measured.round_points.clone() }
    }
}

/// Every series of `candidate` that `baseline` has too: ratios are taken within a round, where both ran in turn under
/// the same conditions, and only then summarised.
pub(crate) fn comparisons(
    series: &[Series],
    candidate: Backend,
    baseline: Backend,
) -> Vec<Comparison> {
    let candidates = series.iter().filter(|row| row.backend == candidate);
    let compare = |row: &Series| {
        let base = series.iter().find(|base| base.backend == baseline && base.id == row.id)?;
        let per_round = |compare: &dyn Fn(&Round, &Round) -> Option<f64>| {
            let pairs = row.rounds.iter().zip(&base.rounds);
            Spread::of(pairs.filter_map(|(ours, theirs)| compare(ours, theirs)).collect())
        };
        let ratios = |figure: fn(&Round) -> Option<f64>| {
            per_round(&|ours, theirs| Some(figure(ours)? / figure(theirs)?))
        };
        Some(Comparison {
            id: row.id.clone(),
            backend: row.backend,
            baseline,
            rounds: row.rounds.len().min(base.rounds.len()),
            p50_ratio: ratios(|round| Some(round.p50_us))?,
            p99_ratio: ratios(|round| Some(round.p99_us))?,
            p999_ratio: ratios(|round| Some(round.p999_us))?,
            p50_difference_us: per_round(&|ours, theirs| Some(ours.p50_us - theirs.p50_us))?,
            rate_ratio: ratios(|round| round.operations_per_s),
        })
    };
    candidates.filter_map(compare).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::tests::options;
    use crate::case::{Operation, cases};

    fn case(operation: Operation) -> Case {
        cases(&options())
            .into_iter()
            .find(|case| case.operation == operation)
            .expect("one of the cases")
    }

    fn outcome(latency_ns: u64) -> Outcome {
        Outcome {
            operations: 100,
            verified: 164,
            bytes: 100 << 20,
            span_ns: 500_000_000,
            used_initiator: Usage { cpu_ns: 400_000_000, ..Usage::default() },
            used_target: Usage { cpu_ns: 200_000_000, ..Usage::default() },
            response: vec![(latency_ns, 100)],
            one_way: Some(vec![(latency_ns / 2, 100)]),
            placement: "here".to_owned(),
            ..Outcome::default()
        }
    }

    #[test]
    fn rounds_and_pairs_add_up() {
        let mut tally = Tally::new(case(Operation::Read), Backend::Corelane);
        tally.add_round(&[outcome(10_000), outcome(30_000)]).expect("adds");
        tally.add_round(&[outcome(20_000), outcome(20_000)]).expect("adds");
        let Row { series: row, histogram, rounds } = tally.series().remove(0);
        assert_eq!(rounds.len(), 2);
        assert_eq!(
            (row.operations, histogram.len(), row.pairs, row.rounds.len()),
            (400, 400, 2, 2)
        );
        // Two pairs, a second each: 400 operations of 1 MiB in one second of wall time.
        assert_eq!(row.operations_per_s, Some(400.0));
        assert!((row.gigabytes_per_s.expect("moved") - 0.4194304).abs() < 1e-9);
        let cpu = row.cpu_s_per_gib.expect("moved");
        assert!((cpu.initiator - 4.096).abs() < 1e-9 && (cpu.target - 2.048).abs() < 1e-9);
        assert_eq!(row.placement, "here");
    }

    #[test]
    fn notifications_give_a_one_way_and_a_round_trip_series() {
        let mut tally = Tally::new(case(Operation::WriteNotify), Backend::Corelane);
        tally.add_round(&[outcome(10_000)]).expect("adds");
        let rows = tally.series();
        let ids: Vec<&str> = rows.iter().map(|row| row.series.id.as_str()).collect();
        assert_eq!(ids, ["write+notify/4KiB/one-way", "write+notify/4KiB/round-trip"]);
        assert!(rows[0].series.latency_us.p50 < rows[1].series.latency_us.p50);
        assert_eq!(rows[0].series.operations_per_s, None);
        assert_eq!(rows[0].series.hgrm, "write+notify-4KiB-one-way.corelane.hgrm");
    }

    #[test]
    fn ratios_are_taken_per_round_and_then_their_median() {
        let tally = |backend, latencies: &[u64]| {
            let mut tally = Tally::new(case(Operation::Read), backend);
            latencies.iter().for_each(|&ns| tally.add_round(&[outcome(ns)]).expect("adds"));
            tally.series().remove(0).series
        };
        // The third round was disturbed for both, the second for ours only.
        let ours = tally(Backend::Corelane, &[11_000, 40_000, 110_000]);
        let base = tally(Backend::RawTcp, &[10_000, 10_000, 100_000]);
        let others = tally(Backend::RawCma, &[1_000, 1_000, 1_000]);
        let series = [ours, others, base];
        let comparison = comparisons(&series, Backend::Corelane, Backend::RawTcp).remove(0);
        assert!((comparison.p50_ratio.median - 1.1).abs() < 0.01, "{comparison:?}");
        assert!((comparison.p50_ratio.max - 4.0).abs() < 0.01);
        // 1, 30 and 10 us more.
        assert!((comparison.p50_difference_us.median - 10.0).abs() < 0.1, "{comparison:?}");
        assert_eq!((comparison.rounds, comparison.backend), (3, Backend::Corelane));
        // Both did 100 operations in half a second.
        assert_eq!(comparison.rate_ratio.map(|ratio| ratio.median), Some(1.0));
    }

    #[test]
    fn nothing_measured_gives_no_row() {
        assert!(Tally::new(case(Operation::Read), Backend::Corelane).series().is_empty());
    }
}
