//! Adds up the outcomes of a case on a backend over the rounds, and compares.

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::case::{NixlCase, NixlScenario};
use super::wire::Outcome;
use crate::cpu::Usage;
use crate::measure::{LoadOutcome, Points, histogram, points_of, restore};
use crate::report::{Costs, LoadTally, Percentiles};

/// What of an operation a series is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Part {
    /// From posting to the moment at which the end was seen.
    Completion,
    /// The caller's time in postXfer.
    Post,
    /// The caller's time in createXferReq.
    Prepare,
    /// From sending a notification to its answer.
    RoundTrip,
    /// From sending a notification to the moment at which the target's application held it.
    OneWay,
    /// From a request's arrival in a recording to its end.
    Request,
    /// Reads at a rate, from the moment at which they were due, alone.
    Idle,
    /// The same beside large writes.
    Loaded,
}

/// Everything measured of one part of one case on one backend.
pub(crate) struct PartTally {
    pub(crate) part: Part,
    pub(crate) all: Histogram<u64>,
    /// Per round; empty where nothing was measured.
    pub(crate) rounds: Vec<Percentiles>,
    pub(crate) round_points: Vec<Points>,
}

/// Everything measured of one case on one backend.
pub(crate) struct NixlTally {
    pub(crate) case: NixlCase,
    /// Index into the plan's backends.
    pub(crate) backend: usize,
    pub(crate) operations: u64,
    pub(crate) parts: Vec<PartTally>,
    pub(crate) load: LoadTally,
    /// Operations per second of each round, of all threads together; empty where that makes no sense.
    pub(crate) rates: Vec<f64>,
    bytes: u64,
    used: (Usage, Usage),
}

impl NixlTally {
    pub(crate) fn new(case: NixlCase, backend: usize) -> Self {
        let parts = match case.scenario {
            NixlScenario::Notify => &[Part::OneWay, Part::RoundTrip][..],
            NixlScenario::Post => &[Part::Prepare, Part::Post, Part::Completion],
            NixlScenario::DecodeUnderPrefill => &[Part::Idle, Part::Loaded],
            NixlScenario::Trace => &[Part::Request, Part::Post, Part::Prepare],
            NixlScenario::Sizes | NixlScenario::Kv | NixlScenario::Fault | NixlScenario::All => {
                &[Part::Completion, Part::Post, Part::Prepare]
            }
        };
        let part = |&part| PartTally {
            part,
            all: histogram(),
            rounds: Vec::new(),
            round_points: Vec::new(),
        };
        Self {
            backend,
            operations: 0,
            parts: parts.iter().map(part).collect(),
            load: LoadTally::new(),
            rates: Vec::new(),
            bytes: 0,
            used: <(Usage, Usage)>::default(),
            case,
        }
    }

    /// Adds a round.
    pub(crate) fn add_round(&mut self, outcome: &Outcome) -> Result<()> {
        self.operations += outcome.operations;
        self.bytes += outcome.bytes;
        if outcome.elapsed_ns > 0 {
            self.rates.push(outcome.operations as f64 * 1e9 / outcome.elapsed_ns as f64);
        }
        self.used.0 += outcome.used_initiator;
        self.used.1 += outcome.used_target;
        if let (Some(shape), Some(load)) = (self.case.load, &outcome.load) {
            self.load.add(shape, load)?;
        }
        let no_load = LoadOutcome::default();
        let load = outcome.load.as_ref().unwrap_or(&no_load);
        for part in &mut self.parts {
            let points: &Points = match part.part {
                Part::Completion | Part::RoundTrip | Part::Request => &outcome.completion,
                Part::OneWay => &outcome.one_way,
                Part::Post => &outcome.post,
                Part::Prepare => &outcome.prepare,
                Part::Idle => &load.reads.response,
                Part::Loaded => &load.both.response,
            };
            let mut round = histogram();
            restore(&mut round, points)?;
            part.rounds.push(Percentiles::of(&round));
            let points = points_of(&round);
            restore(&mut part.all, &points)?;
            part.round_points.push(points);
        }
        Ok(())
    }

    /// Name of a part's series: completion is what a case is about and goes without.
    pub(crate) fn series_id(&self, part: Part) -> String {
        let id = self.case.id();
        match part {
            Part::Completion if self.case.scenario != NixlScenario::Post => id,
            Part::Request => id,
            Part::Completion => format!("{id}/completion"),
            Part::Post => format!("{id}/post"),
            Part::Prepare => format!("{id}/prepare"),
            Part::RoundTrip => format!("{id}/round-trip"),
            Part::OneWay => format!("{id}/one-way"),
            Part::Idle => format!("{id}/idle"),
            Part::Loaded => format!("{id}/loaded"),
        }
    }

    /// What the operations cost both processes; `None` where that was not counted.
    pub(crate) fn costs(&self, part: Part) -> Option<Costs> {
        let counted = matches!(part, Part::Completion | Part::RoundTrip);
        let (initiator, target) = self.used;
        Costs::of(initiator, target, self.operations, self.bytes).filter(|_| counted)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::nixl::case::tests::all;

    pub(crate) fn outcome(completion_ns: u64) -> Outcome {
        Outcome {
            operations: 10,
            completion: vec![(completion_ns, 10)],
            post: vec![(completion_ns / 10, 10)],
            prepare: vec![(completion_ns * 2, 5)],
            one_way: vec![(completion_ns / 2, 10)],
            load: Some(crate::report::load_outcome(8)),
            ..Outcome::default()
        }
    }

    pub(crate) fn tally(id: &str, backend: usize, rounds_ns: &[u64]) -> NixlTally {
        let case = all().into_iter().find(|case| case.id() == id).expect("one of the cases");
        let mut tally = NixlTally::new(case, backend);
        rounds_ns.iter().for_each(|&ns| tally.add_round(&outcome(ns)).expect("in range"));
        tally
    }

    #[test]
    fn rounds_add_up_per_part() {
        let tally = tally("post/read/4096x4KiB", 0, &[10_000, 20_000]);
        assert_eq!(tally.operations, 20);
        let ids: Vec<String> = tally.parts.iter().map(|part| tally.series_id(part.part)).collect();
        assert_eq!(
            ids,
            [
                "post/read/4096x4KiB/prepare",
                "post/read/4096x4KiB/post",
                "post/read/4096x4KiB/completion"
            ]
        );
        let p50: Vec<f64> = tally.parts.iter().map(|part| part.rounds[0].p50.round()).collect();
        assert_eq!(p50, [20.0, 1.0, 10.0]);
        let counts: Vec<u64> = tally.parts.iter().map(|part| part.all.len()).collect();
        assert_eq!(counts, [10, 20, 20]);
    }

    #[test]
    fn a_notification_is_measured_one_way_and_there_and_back() {
        let tally = tally("notify/16B", 1, &[8_000]);
        let p50 = |part: &PartTally| (tally.series_id(part.part), part.rounds[0].p50.round());
        let found: Vec<(String, f64)> = tally.parts.iter().map(p50).collect();
        let expected = [("notify/16B/one-way", 4.0), ("notify/16B/round-trip", 8.0)];
        assert_eq!(found, expected.map(|(id, us)| (id.to_owned(), us)));
    }
}
