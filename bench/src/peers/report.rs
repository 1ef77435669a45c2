//! What `many-peers` found: a row for each number of peers, with what each peer got and what it costs the hub.

use serde::{Deserialize, Serialize};

use super::options::{Direction, PeersArgs, PeersPlan};
use super::tally::PeersTally;
use crate::case::Operation;
use crate::manifest::Host;
use crate::measure::Points;
use crate::report::{Output, Percentiles, RunInfo, Spread, Versus, align};
use crate::units::microseconds;

/// Name of the schema of `results.json`.
pub(crate) const SCHEMA: &str = "corelane-bench-many-peers";
pub(crate) const SCHEMA_VERSION: u32 = 2;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeersResults {
    #[serde(flatten)]
    pub(crate) run: RunInfo,
    pub(crate) options: PeersOptions,
    pub(crate) environment: Host,
    pub(crate) series: Vec<PeersSeries>,
    /// The first backend of NIXL against each other one.
    pub(crate) comparisons: Vec<Versus>,
}

/// The options in effect, defaults filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeersOptions {
    /// The backend of NIXL that ratios are about; null where engines without NIXL were measured.
    pub(crate) backend: Option<String>,
    pub(crate) vs: Vec<String>,
    pub(crate) parameters: Vec<(String, String)>,
    pub(crate) prog_thread: bool,
    /// Version of NIXL; empty without.
    pub(crate) nixl: String,
    /// Of engines without NIXL: names with commas between them.
    pub(crate) transport: String,
    /// Processes that the peers are spread over, where there are as many peers.
    pub(crate) processes: usize,
    /// Of engines without NIXL, the core of their lanes; of agents, that of the application's thread, null where it was
    /// not pinned.
    pub(crate) hub_core: Option<usize>,
    pub(crate) peer_core: Option<usize>,
    pub(crate) rounds: usize,
    pub(crate) duration_ms: f64,
}

/// One case on one backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeersSeries {
    pub(crate) id: String,
    /// `corelane` where engines without NIXL were measured.
    pub(crate) backend: String,
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
    /// The same, per round.
    pub(crate) rounds: Vec<Percentiles>,
    pub(crate) rounds_operations_per_s: Vec<f64>,
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

/// Every other backend of a case beside the first.
fn comparisons(series: &[PeersSeries], backend: Option<&str>) -> Vec<Versus> {
    let others = series.iter().filter(|row| Some(row.backend.as_str()) != backend);
    let compared = others.filter_map(|row| {
        let ours =
            |other: &&PeersSeries| other.id == row.id && Some(other.backend.as_str()) == backend;
        let ours = series.iter().find(ours)?;
        let versus =
            Versus::of(&row.id, (&ours.backend, &ours.rounds), (&row.backend, &row.rounds))?;
        Some(versus.with_rates(&ours.rounds_operations_per_s, &row.rounds_operations_per_s))
    });
    compared.collect()
}

impl PeersResults {
    pub(crate) fn new(
        options: &PeersArgs,
        plan: &PeersPlan,
        tallies: &[PeersTally],
        (run, environment): (RunInfo, Host),
    ) -> Self {
        let series: Vec<PeersSeries> = tallies.iter().filter_map(PeersTally::series).collect();
        let backend = plan.is_nixl().then(|| plan.contenders[0].to_string());
        let nixl = tallies.iter().map(PeersTally::nixl).find(|nixl| !nixl.is_empty());
        Self {
            run,
            options: PeersOptions {
                backend: backend.clone(),
                vs: options.choice.vs.iter().map(ToString::to_string).collect(),
                parameters: options.choice.parameters.clone(),
                prog_thread: options.choice.prog_thread,
                nixl: nixl.unwrap_or_default().to_owned(),
                transport: plan.transports.join(","),
                processes: plan.processes,
                hub_core: plan.hub_core,
                peer_core: plan.peer_core,
                rounds: usize::from(options.rounds),
                duration_ms: options.duration.as_secs_f64() * 1e3,
            },
            environment,
            comparisons: comparisons(&series, backend.as_deref()),
            series,
        }
    }

    /// Where and how it ran.
    pub(crate) fn header(&self) -> String {
        let Host { corelane_version, .. } = &self.environment;
        let nixl = match &self.options.backend {
            Some(_) => format!("NIXL {}; ", self.options.nixl),
            None => String::new(),
        };
        format!(
            "{}; {nixl}corelane {corelane_version}\n{}\nclosed loop, one transfer outstanding for each peer, {} rounds of {:.0} ms; \
             {}\n\n",
            self.environment.machine(),
            self.placement(),
            self.options.rounds,
            self.options.duration_ms,
            self.environment.quiet(),
        )
    }

    /// Who runs where.
    pub(crate) fn placement(&self) -> String {
        let PeersOptions { transport, processes, hub_core, peer_core, prog_thread, .. } =
            &self.options;
        let on = |core: &Option<usize>| {
            core.map_or_else(|| "not pinned".to_owned(), |core| format!("on core {core}"))
        };
        if self.options.backend.is_none() {
            return format!(
                "hub: one engine with {transport}, lane {}; peers: an engine each, all lanes {}, in at most {processes} process(es); who \
                 posts does it from one unpinned thread a process, polling",
                on(hub_core),
                on(peer_core)
            );
        }
        let passive = match prog_thread {
            true => "who posts nothing sleeps; progress threads on",
            false => {
                "who posts nothing sleeps where the backend serves alone (CORELANE), else polls for notifications; progress threads off"
            }
        };
        format!(
            "hub: one agent, its application's thread {}; peers: an agent each, in at most {processes} process(es) with one thread \
             {}; who posts polls without yielding, {passive}",
            on(hub_core),
            on(peer_core)
        )
    }

    /// The rows of all cases, and below them the ratios.
    pub(crate) fn tables(&self) -> String {
        self.table() + &self.ratio_table()
    }

    /// One row per case and backend that has another to be compared with.
    fn ratio_table(&self) -> String {
        let (Some(backend), false) = (&self.options.backend, self.comparisons.is_empty()) else {
            return String::new();
        };
        let mut rows = vec![vec!["case".to_owned(), "backend".to_owned()]];
        rows[0].extend(Versus::titles(&self.comparisons));
        for row in &self.comparisons {
            let mut cells = vec![row.id.clone(), row.vs.clone()];
            cells.extend(row.cells());
            rows.push(cells);
        }
        format!("\n{}{}", align(&rows, 2), Versus::explanation(backend, &self.comparisons))
    }

    /// One row per case and backend.
    fn table(&self) -> String {
        let named = self.options.backend.is_some();
        let header = [
            "case",
            "backend",
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
                row.backend.clone(),
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
        if !named {
            // All rows would say the same.
            rows.iter_mut().for_each(|row| drop(row.remove(1)));
        }
        align(&rows, if named { 2 } else { 1 })
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
    use crate::peers::tally::tests::{case, round};
    use clap::Parser;
    use std::time::Duration;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        peers: PeersArgs,
    }

    fn results_of(words: &str, tallies: &[PeersTally]) -> PeersResults {
        let words = std::iter::once("many-peers").chain(words.split_whitespace());
        let options = Line::try_parse_from(words).expect("parses").peers;
        let plan = options.plan(&[0, 1]).expect("a plan");
        let run = RunInfo::complete(SCHEMA, SCHEMA_VERSION);
        PeersResults::new(&options, &plan, tallies, (run, Host::default()))
    }

    fn tally(backend: &str, peers: usize, rounds: &[&[u64]]) -> PeersTally {
        let mut tally = PeersTally::new(case(peers), backend.to_owned());
        for counts in rounds {
            tally.add(&round(counts), Duration::from_secs(1)).expect("in range");
        }
        tally
    }

    /// Of engines: 16 peers were never measured.
    pub(crate) fn results() -> PeersResults {
        let four: &[u64] = &[40, 40, 40, 0];
        let tallies = [
            tally("corelane", 1, &[&[100], &[100]]),
            tally("corelane", 4, &[four, four]),
            tally("corelane", 16, &[]),
        ];
        results_of("", &tallies)
    }

    /// Of two backends of NIXL, with one peer and with four.
    pub(crate) fn compared() -> PeersResults {
        let (one, four): (&[u64], &[u64]) = (&[100], &[40, 40, 40, 0]);
        let of = |backend, peers, counts| tally(backend, peers, &[counts, counts]);
        let tallies = [
            of("CORELANE", 1, one),
            of("UCX@UCX_TLS=tcp", 1, one),
            of("CORELANE", 4, four),
            of("UCX@UCX_TLS=tcp", 4, four),
        ];
        results_of("--vs UCX@UCX_TLS=tcp --peer-core 1", &tallies)
    }

    #[test]
    fn results_survive_a_round_trip_and_the_table_has_a_row_for_each_case() {
        let results = results();
        let json = serde_json::to_string(&results).expect("encodes");
        assert_eq!(serde_json::from_str::<PeersResults>(&json).expect("decodes"), results);
        let table = results.tables();
        let row = table.lines().nth(2).expect("a row");
        for part in ["many-peers/to-one/read/4KiB/x4", "120", "0.750", "0%", "100", "3.0"] {
            assert!(row.contains(part), "{part}: {table}");
        }
        assert_eq!(table.lines().count(), 3, "16 peers were never measured: {table}");
        assert!(!table.contains("backend") && !table.contains("ratio"), "{table}");
        assert!(results.header().contains("one engine with tcp"), "{}", results.header());
    }

    #[test]
    fn backends_have_rows_each_and_ratios_below() {
        let results = compared();
        let value: serde_json::Value = serde_json::to_value(&results).expect("encodes");
        assert_eq!(value["schema_version"], 2);
        assert_eq!(value["options"]["backend"], "CORELANE");
        assert_eq!(value["comparisons"][1]["vs"], "UCX@UCX_TLS=tcp");
        assert_eq!(value["comparisons"][1]["ratios"]["p99"]["median"], 1.0);
        assert_eq!(serde_json::from_value::<PeersResults>(value).expect("decodes"), results);
        let table = results.tables();
        let of = |backend: &str| table.lines().filter(|line| line.contains(backend)).count();
        // Two cases; the ratios are on the rows of the other, and explained with ours.
        assert_eq!((of("x4  UCX@"), of("x4  CORELANE")), (2, 1), "{table}");
        assert!(table.contains("ops/s ratio") && table.contains("does more above 1"), "{table}");
        assert!(table.contains("p50 ratio") && table.contains("1.00..1.00"), "{table}");
        let names: Vec<&str> = results.series.iter().map(|row| row.hgrm.as_str()).collect();
        assert_eq!(names[1], "many-peers-to-one-read-4KiB-x1.UCX@UCX_TLS=tcp.hgrm");
        let header = results.header();
        for part in ["one agent", "not pinned", "on core 1", "NIXL 1.5.1", "progress threads off"] {
            assert!(header.contains(part), "{part}: {header}");
        }
    }
}
