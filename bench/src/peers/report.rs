//! What `many-peers` found: a row for each number of peers, with what each peer got and what it costs the hub.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::options::{Direction, PeersArgs, PeersCase, PeersPlan};
use super::run::PeersOutcome;
use crate::case::Operation;
use crate::manifest::Host;
use crate::measure::{Points, histogram, points_of, restore};
use crate::report::{Output, Percentiles, Spread, align};
use crate::units::microseconds;

/// Name of the schema of `results.json`.
pub(crate) const SCHEMA: &str = "corelane-bench-many-peers";
pub(crate) const SCHEMA_VERSION: u32 = 1;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeersResults {
    /// Always [`SCHEMA`].
    pub(crate) schema: String,
    pub(crate) schema_version: u32,
    /// False when a run failed: the series are those that had been measured by then.
    pub(crate) complete: bool,
    pub(crate) failure: Option<String>,
    /// Seconds since 1970 at the start.
    pub(crate) started_unix_s: u64,
    pub(crate) elapsed_s: f64,
    pub(crate) options: PeersOptions,
    pub(crate) environment: Host,
    pub(crate) series: Vec<PeersSeries>,
}

/// The options in effect, defaults filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeersOptions {
    /// Names with commas between them.
    pub(crate) transport: String,
    /// Processes that the peers' engines are spread over, where there are as many peers.
    pub(crate) processes: usize,
    pub(crate) hub_core: usize,
    pub(crate) peer_core: usize,
    pub(crate) rounds: usize,
    pub(crate) duration_ms: f64,
}

/// One case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeersSeries {
    pub(crate) id: String,
    /// The id without the number of peers.
    pub(crate) group: String,
    pub(crate) direction: Direction,
    pub(crate) operation: Operation,
    pub(crate) block_bytes: usize,
    pub(crate) peers: usize,
    /// Transfers that ended in time, of all rounds and peers.
    pub(crate) operations: u64,
    /// All peers together; per round.
    pub(crate) operations_per_s: Spread,
    /// All peers' transfers together.
    pub(crate) latency_us: Percentiles,
    /// Jain's index of the peers' operations, per round: 1 where all get as much, 1/N where one gets all.
    pub(crate) fairness: Spread,
    /// Operations of the peer that got the least, as a share of the mean; per round.
    pub(crate) least_share: Spread,
    /// In the order of the peers.
    pub(crate) per_peer: Vec<PeerFigures>,
    /// What a connected and used peer adds to the hub's process; per round.
    pub(crate) hub_kib_per_peer: Spread,
    pub(crate) hub_descriptors_per_peer: Spread,
    /// Of the hub's process, with all peers.
    pub(crate) hub_resident_mib: Spread,
    pub(crate) hub_descriptors: u64,
    pub(crate) hub_threads: u64,
    /// CPU time of the hub's process, polling included; per round.
    pub(crate) hub_cpu_us_per_operation: Spread,
    /// File name of the percentile distribution, next to the other outputs.
    pub(crate) hgrm: String,
    /// Non-empty histogram buckets as [nanoseconds, count].
    pub(crate) histogram_ns: Points,
}

/// One peer, all rounds together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeerFigures {
    pub(crate) operations: u64,
    pub(crate) latency_us: Percentiles,
    pub(crate) histogram_ns: Points,
}

impl PeersSeries {
    /// Least and most of a figure of the peers.
    pub(crate) fn range(&self, figure: impl Fn(&Percentiles) -> f64) -> (f64, f64) {
        let values = || self.per_peer.iter().map(|peer| figure(&peer.latency_us));
        (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max))
    }

    /// The peer with the highest p99.
    pub(crate) fn slowest(&self) -> Option<&PeerFigures> {
        let p99 = |peer: &&PeerFigures| peer.latency_us.p99;
        self.per_peer.iter().max_by(|one, other| p99(one).total_cmp(&p99(other)))
    }
}

/// Adds up the rounds of a case.
pub(crate) struct PeersTally {
    case: PeersCase,
    all: Histogram<u64>,
    round_points: Vec<Points>,
    peers: Vec<(u64, Histogram<u64>)>,
    rates: Vec<f64>,
    fairness: Vec<f64>,
    least_share: Vec<f64>,
    kib: Vec<f64>,
    descriptors: Vec<f64>,
    resident_mib: Vec<f64>,
    cpu_us: Vec<f64>,
    hub_descriptors: u64,
    hub_threads: u64,
}

impl PeersTally {
    pub(crate) fn new(case: PeersCase) -> Self {
        Self {
            case,
            all: histogram(),
            round_points: Vec::new(),
            peers: (0..case.peers).map(|_| (0, histogram())).collect(),
            rates: Vec::new(),
            fairness: Vec::new(),
            least_share: Vec::new(),
            kib: Vec::new(),
            descriptors: Vec::new(),
            resident_mib: Vec::new(),
            cpu_us: Vec::new(),
            hub_descriptors: 0,
            hub_threads: 0,
        }
    }

    pub(crate) fn has_rounds(&self) -> bool {
        !self.rates.is_empty()
    }

    /// Latencies of all rounds and peers.
    pub(crate) fn histogram(&self) -> &Histogram<u64> {
        &self.all
    }

    pub(crate) fn round_points(&self) -> &[Points] {
        &self.round_points
    }

    /// Adds a round.
    pub(crate) fn add(&mut self, outcome: &PeersOutcome, duration: Duration) -> Result<()> {
        let numbers: Vec<usize> = outcome.peers.iter().map(|peer| peer.peer).collect();
        anyhow::ensure!(
            numbers.iter().copied().eq(0..self.case.peers),
            "outcomes of the peers {numbers:?} instead of {}",
            self.case.peers
        );
        let mut round = histogram();
        for (peer, (operations, latency)) in outcome.peers.iter().zip(&mut self.peers) {
            *operations += peer.operations;
            restore(latency, &peer.latency)?;
            restore(&mut round, &peer.latency)?;
        }
        let points = points_of(&round);
        restore(&mut self.all, &points)?;
        self.round_points.push(points);
        let counts: Vec<u64> = outcome.peers.iter().map(|peer| peer.operations).collect();
        let total: u64 = counts.iter().sum();
        self.rates.push(total as f64 / duration.as_secs_f64());
        let (index, least) = fairness(&counts);
        self.fairness.push(index);
        self.least_share.push(least);
        let (before, after) = (outcome.before, outcome.after);
        let each =
            |after: u64, before: u64| (after as f64 - before as f64) / self.case.peers as f64;
        self.kib.push(each(after.resident_bytes, before.resident_bytes) / 1024.0);
        self.descriptors.push(each(after.descriptors, before.descriptors));
        self.resident_mib.push(after.resident_bytes as f64 / (1u64 << 20) as f64);
        self.cpu_us.push(outcome.used.cpu_ns as f64 / 1e3 / total.max(1) as f64);
        (self.hub_descriptors, self.hub_threads) = (after.descriptors, after.threads);
        Ok(())
    }

    fn series(&self) -> Option<PeersSeries> {
        let spread = |values: &[f64]| Spread::of(values.to_vec());
        let id = self.case.id();
        let figures = |(operations, latency): &(u64, Histogram<u64>)| PeerFigures {
            operations: *operations,
            latency_us: Percentiles::of(latency),
            histogram_ns: points_of(latency),
        };
        let PeersCase { direction, operation, block_bytes, peers } = self.case;
        Some(PeersSeries {
            hgrm: format!("{}.hgrm", id.replace('/', "-")),
            id,
            group: self.case.group(),
            direction,
            operation,
            block_bytes,
            peers,
            operations: self.peers.iter().map(|peer| peer.0).sum(),
            operations_per_s: spread(&self.rates)?,
            latency_us: Percentiles::of(&self.all),
            fairness: spread(&self.fairness)?,
            least_share: spread(&self.least_share)?,
            per_peer: self.peers.iter().map(figures).collect(),
            hub_kib_per_peer: spread(&self.kib)?,
            hub_descriptors_per_peer: spread(&self.descriptors)?,
            hub_resident_mib: spread(&self.resident_mib)?,
            hub_descriptors: self.hub_descriptors,
            hub_threads: self.hub_threads,
            hub_cpu_us_per_operation: spread(&self.cpu_us)?,
            histogram_ns: points_of(&self.all),
        })
    }
}

/// Jain's index of what each got, and the least of it as a share of the mean. Nobody getting anything is fair.
fn fairness(counts: &[u64]) -> (f64, f64) {
    let sum: f64 = counts.iter().map(|&count| count as f64).sum();
    let squares: f64 = counts.iter().map(|&count| (count as f64).powi(2)).sum();
    if squares == 0.0 {
        return (1.0, 1.0);
    }
    let (number, least) = (counts.len() as f64, counts.iter().min().copied().unwrap_or(0));
    (sum * sum / (number * squares), least as f64 * number / sum)
}

impl PeersResults {
    pub(crate) fn new(
        options: &PeersArgs,
        plan: &PeersPlan,
        tallies: &[PeersTally],
        elapsed: Duration,
        failure: Option<&anyhow::Error>,
    ) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            schema: SCHEMA.to_owned(),
            schema_version: SCHEMA_VERSION,
            complete: failure.is_none(),
            failure: failure.map(|error| format!("{error:#}")),
            started_unix_s: now.saturating_sub(elapsed).as_secs(),
            elapsed_s: elapsed.as_secs_f64(),
            options: PeersOptions {
                transport: options.transport.join(","),
                processes: plan.processes,
                hub_core: plan.hub_core,
                peer_core: plan.peer_core,
                rounds: usize::from(options.rounds),
                duration_ms: options.duration.as_secs_f64() * 1e3,
            },
            environment: Host::describe(),
            series: tallies.iter().filter_map(PeersTally::series).collect(),
        }
    }

    /// Where and how it ran.
    pub(crate) fn header(&self) -> String {
        let Host { cpu_model, cores_online, kernel, corelane_version, noise, .. } =
            &self.environment;
        format!(
            "{cpu_model}, {cores_online} cores, {kernel}; corelane {corelane_version}\n{}\nclosed loop, one transfer outstanding for \
             each peer, {} rounds of {:.0} ms; clock read {} ns, {:.0} interruptions over 20 us per second\n\n",
            self.placement(),
            self.options.rounds,
            self.options.duration_ms,
            noise.timer_overhead_ns,
            noise.gaps_over_20us_per_second,
        )
    }

    /// Who runs where.
    pub(crate) fn placement(&self) -> String {
        let PeersOptions { transport, processes, hub_core, peer_core, .. } = &self.options;
        format!(
            "hub: one engine with {transport}, lane on core {hub_core}; peers: an engine each, all lanes on core {peer_core}, in at \
             most {processes} process(es); who posts does it from one unpinned thread a process, polling"
        )
    }

    /// One row per case.
    pub(crate) fn table(&self) -> String {
        let header = [
            "case",
            "ops/s",
            "p50 us",
            "p99",
            "p99.9",
            "max",
            "peers' p50",
            "peers' p99",
            "fairness",
            "least share",
            "hub KiB/peer",
            "fds/peer",
            "fds",
            "threads",
            "cpu us/op",
        ];
        let us = |value: f64| microseconds((value * 1e3).round() as u64);
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        for row in &self.series {
            let range = |figure: fn(&Percentiles) -> f64| {
                let (least, most) = row.range(figure);
                format!("{}..{}", us(least), us(most))
            };
            let at = &row.latency_us;
            rows.push(vec![
                row.id.clone(),
                format!("{:.0}", row.operations_per_s.median),
                us(at.p50),
                us(at.p99),
                us(at.p999),
                us(at.max),
                range(|at| at.p50),
                range(|at| at.p99),
                format!("{:.3}", row.fairness.median),
                format!("{:.0}%", row.least_share.median * 100.0),
                format!("{:.0}", row.hub_kib_per_peer.median),
                format!("{:.1}", row.hub_descriptors_per_peer.median),
                row.hub_descriptors.to_string(),
                row.hub_threads.to_string(),
                format!("{:.2}", row.hub_cpu_us_per_operation.median),
            ]);
        }
        align(&rows, 1)
    }

    /// Where everything is.
    pub(crate) fn files(&self, output: &Output) -> String {
        format!(
            "\nfiles  {}, {}, and {} histograms (*.hgrm, *.hlog) beside\n",
            output.report_path().display(),
            output.json.display(),
            self.series.len()
        )
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cpu::Usage;
    use crate::peers::wire::{PeerOutcome, Resources};

    fn round(counts: &[u64]) -> PeersOutcome {
        let before = Resources { resident_bytes: 10 << 20, descriptors: 20, threads: 4 };
        let peers = counts.len() as u64;
        let outcome = |(peer, &operations): (usize, &u64)| PeerOutcome {
            peer,
            operations,
            latency: vec![(10_000 * (peer as u64 + 1), operations.max(1))],
        };
        PeersOutcome {
            peers: counts.iter().enumerate().map(outcome).collect(),
            before,
            after: Resources {
                resident_bytes: before.resident_bytes + peers * (100 << 10),
                descriptors: before.descriptors + 3 * peers,
                threads: 4,
            },
            used: Usage { cpu_ns: 1_000_000, ..Usage::default() },
        }
    }

    pub(crate) fn results() -> PeersResults {
        let case = |peers| PeersCase {
            direction: Direction::ToOne,
            operation: Operation::Read,
            block_bytes: 4096,
            peers,
        };
        let mut tallies =
            [PeersTally::new(case(1)), PeersTally::new(case(4)), PeersTally::new(case(16))];
        for _ in 0..2 {
            tallies[0].add(&round(&[100]), Duration::from_secs(1)).expect("in range");
            tallies[1].add(&round(&[40, 40, 40, 0]), Duration::from_secs(1)).expect("in range");
        }
        PeersResults {
            schema: SCHEMA.to_owned(),
            schema_version: SCHEMA_VERSION,
            complete: true,
            failure: None,
            started_unix_s: 0,
            elapsed_s: 1.0,
            options: PeersOptions {
                transport: "tcp".to_owned(),
                processes: 1,
                hub_core: 0,
                peer_core: 1,
                rounds: 2,
                duration_ms: 1000.0,
            },
            environment: Host::default(),
            series: tallies.iter().filter_map(PeersTally::series).collect(),
        }
    }

    #[test]
    fn a_peer_that_gets_nothing_shows() {
        let results = results();
        assert_eq!(results.series.len(), 2, "16 peers were never measured");
        let (one, four) = (&results.series[0], &results.series[1]);
        assert_eq!((one.fairness.median, one.least_share.median), (1.0, 1.0));
        assert!((four.fairness.median - 0.75).abs() < 1e-9 && four.least_share.median == 0.0);
        assert_eq!((four.operations, four.operations_per_s.median), (240, 120.0));
        assert_eq!(four.per_peer[3].operations, 0);
        // What the peer had to wait is there all the same.
        let (least, most) = four.range(|at| at.p50);
        assert!((least - 10.0).abs() < 0.1 && (most - 40.0).abs() < 0.1, "{least} {most}");
        assert!(four.slowest().is_some_and(|peer| (peer.latency_us.p50 - 40.0).abs() < 0.1));
    }

    #[test]
    fn resources_are_those_that_a_peer_adds() {
        let four = &results().series[1];
        assert_eq!(four.hub_kib_per_peer.median, 100.0);
        assert_eq!((four.hub_descriptors_per_peer.median, four.hub_descriptors), (3.0, 32));
        assert!((four.hub_cpu_us_per_operation.median - 1000.0 / 120.0).abs() < 1e-9);
    }

    #[test]
    fn outcomes_of_other_peers_are_refused() {
        let case = PeersCase {
            direction: Direction::FromOne,
            operation: Operation::Read,
            block_bytes: 64,
            peers: 2,
        };
        assert!(PeersTally::new(case).add(&round(&[1]), Duration::from_secs(1)).is_err());
    }

    #[test]
    fn fairness_is_one_for_equals_and_the_share_for_a_single_winner() {
        assert_eq!(fairness(&[7, 7, 7]), (1.0, 1.0));
        assert_eq!(fairness(&[9, 0, 0]), (1.0 / 3.0, 0.0));
        assert_eq!(fairness(&[0, 0]), (1.0, 1.0));
    }

    #[test]
    fn results_survive_a_round_trip_and_the_table_has_a_row_for_each_case() {
        let results = results();
        let json = serde_json::to_string(&results).expect("encodes");
        assert_eq!(serde_json::from_str::<PeersResults>(&json).expect("decodes"), results);
        let table = results.table();
        let row = table.lines().nth(2).expect("a row");
        for part in ["many-peers/to-one/read/4KiB/x4", "120", "0.750", "0%", "100", "3.0"] {
            assert!(row.contains(part), "{part}: {table}");
        }
    }
}
