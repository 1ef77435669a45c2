//! What people and programs read of a comparison: a table with ratios, and a JSON file.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::case::NixlScenario;
use super::cost_table::cost_table;
use super::fault::{self, Fault, FaultKind};
use super::nixlbench::Memories;
use super::options::{NixlArgs, NixlPlan, NixlTargetApp, Pin};
use super::pair::BackendThreads;
use super::summary::summary;
use super::tally::{NixlTally, Part};
use super::trace::Replay;
use crate::case::Operation;
use crate::manifest::Host;
use crate::measure::{Points, points_of};
use crate::raw_local::RawKind;
use crate::report::{
    Costs, Load, Output, Percentiles, RunInfo, Spread, Versus, align, hgrm_name, load_table,
};
use crate::units::microseconds;

/// Version of the layout below: grows when a field changes its meaning or goes away, not when one is added.
pub(crate) const SCHEMA_VERSION: u32 = 1;
/// What tells the file from others.
pub(crate) const SCHEMA: &str = "corelane-bench-nixl";

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct NixlResults {
    #[serde(flatten)]
    pub(crate) run: RunInfo,
    pub(crate) options: NixlOptions,
    pub(crate) environment: Host,
    pub(crate) series: Vec<NixlSeries>,
    pub(crate) comparisons: Vec<Versus>,
    /// Of scenario `decode-under-prefill`, one for each backend.
    #[serde(default)]
    pub(crate) loads: Vec<Load>,
    /// Of each backend, in the order of the options.
    #[serde(default)]
    pub(crate) threads: Vec<BackendThreads>,
    /// Of scenario `fault`, one for each backend, kind and round.
    #[serde(default)]
    pub(crate) faults: Vec<Fault>,
}

/// The options in effect.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct NixlOptions {
    /// Version of NIXL.
    pub(crate) nixl: String,
    pub(crate) backend: String,
    pub(crate) vs: Vec<String>,
    pub(crate) baselines: Vec<RawKind>,
    pub(crate) parameters: Vec<(String, String)>,
    pub(crate) prog_thread: bool,
    /// Cores of the initiator's threads, where there are several.
    #[serde(default)]
    pub(crate) thread_cores: Vec<usize>,
    pub(crate) target_app: NixlTargetApp,
    pub(crate) pin: Pin,
    pub(crate) rounds: u16,
    /// Of one case on one backend in one round.
    pub(crate) duration_ms: f64,
    pub(crate) seed: u64,
    /// Timed transfers of a case in a round, in the place of a duration.
    #[serde(default)]
    pub(crate) num_iter: Option<u64>,
    /// Untimed ones before them, where their number was given.
    #[serde(default)]
    pub(crate) warmup_iter: Option<u64>,
    /// Of each phase of scenario `decode-under-prefill`.
    #[serde(default)]
    pub(crate) phase_duration_ms: f64,
    #[serde(default)]
    pub(crate) memory: Memories,
    /// Of scenario `fault`, where it was asked for.
    #[serde(default)]
    pub(crate) faults: Vec<FaultKind>,
    #[serde(default)]
    pub(crate) fault_at_ms: f64,
    #[serde(default)]
    pub(crate) fault_timeout_ms: f64,
    /// Of scenario `trace`, where it was asked for.
    #[serde(default)]
    pub(crate) trace: Option<Replay>,
    /// What the shapes of scenario `kv` stand for.
    #[serde(default)]
    pub(crate) models: Vec<String>,
}

/// One part of one case on one backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct NixlSeries {
    pub(crate) id: String,
    pub(crate) backend: String,
    pub(crate) part: Part,
    pub(crate) operation: Operation,
    pub(crate) blocks: usize,
    pub(crate) block_bytes: usize,
    pub(crate) notification_bytes: usize,
    pub(crate) target_sleeps: bool,
    pub(crate) samples: u64,
    /// CPU time and context switches, where `part` is `completion` or `round-trip`.
    #[serde(default)]
    pub(crate) costs: Option<Costs>,
    /// Of all threads together, the median over the rounds; where `part` is `completion`.
    #[serde(default)]
    pub(crate) operations_per_s: Option<f64>,
    /// Of all rounds together.
    pub(crate) latency_us: Percentiles,
    /// File name of the percentile distribution, next to the other outputs.
    #[serde(default)]
    pub(crate) hgrm: String,
    pub(crate) rounds: Vec<Percentiles>,
    /// Non-empty histogram buckets as [nanoseconds, count].
    pub(crate) histogram_ns: Points,
}

impl NixlSeries {
    /// Whether it has a row and a chart of its own: what a transfer spends in preparing and posting does only where a
    /// scenario is about it.
    pub(crate) fn is_shown(&self) -> bool {
        !matches!(self.part, Part::Post | Part::Prepare) || self.id.starts_with("post/")
    }
}

impl NixlResults {
    /// Assembles the file.
    pub(crate) fn new(
        options: &NixlArgs,
        plan: &NixlPlan,
        tallies: &[NixlTally],
        (run, nixl, environment): (RunInfo, String, Host),
    ) -> Self {
        let label = |backend: usize| plan.backends[backend].to_string();
        let rate = |tally: &NixlTally| Spread::of(tally.rates.clone()).map(|rate| rate.median);
        let mut series = Vec::new();
        let mut comparisons = Vec::new();
        let mut loads = Vec::new();
        for tally in tallies {
            if let Some(shape) = tally.case.load {
                let case = (tally.case.block_bytes, shape);
                loads.extend(tally.load.figures(&tally.case.id(), &label(tally.backend), case));
            }
            for part in tally.parts.iter().filter(|part| !part.all.is_empty()) {
                let id = tally.series_id(part.part);
                let case = &tally.case;
                let backend = &plan.backends[tally.backend];
                series.push(NixlSeries {
                    id: id.clone(),
                    backend: backend.to_string(),
                    part: part.part,
                    operation: case.operation,
                    blocks: case.blocks,
                    block_bytes: case.block_bytes,
                    notification_bytes: case.notification_bytes,
                    target_sleeps: case.operation != Operation::Notify
                        && options.target_app.sleeps(backend),
                    samples: part.all.len(),
                    costs: tally.costs(part.part),
                    operations_per_s: rate(tally).filter(|_| part.part == Part::Completion),
                    latency_us: Percentiles::of(&part.all),
                    hgrm: hgrm_name(&id, &backend.to_string()),
                    rounds: part.rounds.clone(),
                    histogram_ns: points_of(&part.all),
                });
                let ours = tallies
                    .iter()
                    .filter(|ours| ours.backend == 0 && tally.backend != 0)
                    .find(|ours| ours.case == *case);
                comparisons.extend(ours.and_then(|ours| {
                    let same = ours.parts.iter().find(|ours| ours.part == part.part)?;
                    let (name, vs) = (label(0), backend.to_string());
                    let versus = Versus::of(&id, (&name, &same.rounds), (&vs, &part.rounds))?;
                    // Of one caller they are the same once more, turned round.
                    Some(match case.threads > 1 && part.part == Part::Completion {
                        true => versus.with_rates(&ours.rates, &tally.rates),
                        false => versus,
                    })
                }));
            }
        }
        Self {
            run,
            options: NixlOptions {
                nixl,
                backend: label(0),
                vs: options.choice.vs.iter().map(ToString::to_string).collect(),
                baselines: options.baseline.clone(),
                parameters: options.choice.parameters.clone(),
                prog_thread: options.choice.prog_thread,
                thread_cores: plan.thread_cores.clone(),
                target_app: options.target_app,
                pin: options.pin,
                rounds: options.rounds,
                duration_ms: options.duration.as_secs_f64() * 1e3,
                seed: options.seed,
                num_iter: options.nixlbench.num_iter,
                warmup_iter: options.nixlbench.warmup_iter,
                phase_duration_ms: options.load.phase_duration.as_secs_f64() * 1e3,
                memory: options.memories(),
                faults: plan.faults.clone(),
                fault_at_ms: options.fault_at.as_secs_f64() * 1e3,
                trace: plan
                    .cases
                    .iter()
                    .filter(|case| case.scenario == NixlScenario::Trace)
                    .find_map(|case| Some(Replay::of(case.trace.as_ref()?, &options.trace))),
                fault_timeout_ms: options.fault_timeout.as_secs_f64() * 1e3,
                models: options.model.descriptions(),
            },
            environment,
            series,
            comparisons,
            loads,
            threads: Vec::new(),
            faults: Vec::new(),
        }
    }

    /// Two lines: the machine, and how the two sides ran.
    pub(crate) fn header(&self) -> String {
        let Self { environment: host, options, .. } = self;
        let core = |core: Option<usize>| {
            core.map_or_else(|| "not pinned".to_owned(), |core| format!("on core {core}"))
        };
        let sleeper = match options.target_app {
            NixlTargetApp::Poll => "polls",
            NixlTargetApp::Sleep => "sleeps where the backend serves alone (CORELANE), else polls",
            NixlTargetApp::SleepAll => "sleeps",
        };
        let initiator = match &options.thread_cores[..] {
            [] => format!("initiator polls without yielding, {}", core(options.pin.initiator)),
            cores => format!(
                "{} threads of the initiator poll without yielding, on cores {}",
                cores.len(),
                cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
            ),
        };
        format!(
            "{} ({} allowed); NIXL {}; corelane {}; {}\n\
             {initiator}; target {sleeper} (polls to answer notifications), {}; progress threads {}; \
             {}; {} rounds of {} per case\n",
            host.machine(),
            host.cores_allowed,
            options.nixl,
            host.corelane_version,
            host.quiet(),
            core(options.pin.target),
            if options.prog_thread { "on" } else { "off" },
            options.memory,
            options.rounds,
            match options.num_iter {
                Some(transfers) => format!("{transfers} transfers"),
                None => format!("{:.0} ms", options.duration_ms),
            },
        ) + &options.models.iter().map(|model| format!("{model}\n")).collect::<String>()
    }

    /// One row per series that is shown; the file has all.
    pub(crate) fn table(&self) -> String {
        if self.series.is_empty() {
            return String::new();
        }
        let mut rows = vec![
            ["case", "backend", "samples", "p50 us", "p99", "p99.9"].map(str::to_owned).to_vec(),
        ];
        let threads = self.options.thread_cores.len() > 1;
        rows[0].extend(threads.then(|| "ops/s".to_owned()));
        if !self.comparisons.is_empty() {
            rows[0].extend(Versus::titles(&self.comparisons));
        }
        for row in self.series.iter().filter(|row| row.is_shown()) {
            let Percentiles { p50, p99, p999, .. } = row.latency_us;
            let mut cells = vec![row.id.clone(), row.backend.clone(), row.samples.to_string()];
            cells.extend([p50, p99, p999].map(|us| microseconds((us * 1e3).round() as u64)));
            if threads {
                cells.push(row.operations_per_s.map_or_else(String::new, |it| format!("{it:.0}")));
            }
            let comparison =
                self.comparisons.iter().find(|other| other.id == row.id && other.vs == row.backend);
            cells.extend(comparison.into_iter().flat_map(Versus::cells));
            rows.push(cells);
        }
        let explanation = if self.comparisons.is_empty() {
            String::new()
        } else {
            Versus::explanation(&self.options.backend, &self.comparisons)
        };
        align(&rows, 2) + &explanation + &cost_table(&self.series) + &self.load_table()
    }

    /// The five figures that people ask for first.
    pub(crate) fn summary(&self) -> [String; 5] {
        summary(self)
    }

    /// Where everything is.
    pub(crate) fn files(&self, output: &Output) -> String {
        format!(
            "files         {}, {}, and {} histograms (*.hgrm, *.hlog) beside\n",
            output.report_path().display(),
            output.json.display(),
            self.series.len()
        )
    }

    /// What was noticed when of targets that died or stopped.
    pub(crate) fn fault_table(&self) -> String {
        let limit = Duration::from_secs_f64(self.options.fault_timeout_ms / 1e3);
        match fault::table(&self.faults, limit) {
            table if table.is_empty() => table,
            table => format!("\n{table}"),
        }
    }

    fn load_table(&self) -> String {
        let latency = |load: &Load, part: &str| {
            let id = format!("{}/{part}", load.id);
            let row = self.series.iter().find(|row| row.id == id && row.backend == load.backend);
            row.map(|row| row.latency_us)
        };
        let latencies = |load: &Load| Some((latency(load, "idle")?, latency(load, "loaded")?));
        match load_table(self.loads.iter().map(|load| (load, latencies(load)))) {
            table if table.is_empty() => table,
            table => format!("\n{table}"),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::nixl::SegmentType;
    use crate::nixl::tally::tests::tally;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        nixl: NixlArgs,
    }

    fn results(words: &[&str], tallies: &[NixlTally]) -> NixlResults {
        let options = Line::try_parse_from([&["nixl"], words].concat()).expect("parses").nixl;
        let plan = options.plan().expect("a plan");
        let run = RunInfo::complete(SCHEMA, SCHEMA_VERSION);
        NixlResults::new(&options, &plan, tallies, (run, "1.5.1".to_owned(), Host::default()))
    }

    pub(crate) fn compared() -> NixlResults {
        let tallies = [
            tally("read/64B", 0, &[6_000, 6_000]),
            tally("read/64B", 1, &[10_000, 12_000]),
            tally("notify/16B", 0, &[8_000, 8_000]),
            tally("notify/16B", 1, &[16_000, 16_000]),
        ];
        results(&["--vs", "UCX@UCX_TLS=tcp", "--prog-thread", "--pin", "target=1"], &tallies)
    }

    #[test]
    fn the_table_lines_up_and_carries_the_ratio_on_the_row_compared_with() {
        let table = compared().table();
        let lines: Vec<&str> = table.lines().collect();
        let find = |id: &str, backend: &str| -> &str {
            lines
                .iter()
                .find(|line| line.starts_with(id) && line.contains(backend))
                .unwrap_or_else(|| panic!("no {id} of {backend}:\n{table}"))
        };
        let end = lines[0].find("p50 us").expect("a column") + "p50 us".len();
        assert!(find("read/64B", "CORELANE")[..end].ends_with(" 6.00"), "{table}");
        let ucx = find("read/64B", "UCX@UCX_TLS=tcp");
        assert!(ucx.contains("0.55") && ucx.contains("0.50..0.60"), "{table}");
        assert!(ucx.contains("-5.00") && ucx.contains("-6.00..-4.00"), "{table}");
        assert!(find("notify/16B/round-trip", "UCX").contains("0.50..0.50"), "{table}");
        assert!(!table.contains("read/64B/post"), "{table}");
    }

    #[test]
    fn a_backend_alone_has_no_ratio() {
        let table = results(&["--backend", "UCX"], &[tally("read/64B", 0, &[6_000])]).table();
        assert!(!table.contains("ratio"), "{table}");
    }

    #[test]
    fn the_header_says_how_the_sides_ran() {
        let header = compared().header();
        for part in ["NIXL 1.5.1", "not pinned", "on core 1", "progress threads on", "polls"] {
            assert!(header.contains(part), "{part}: {header}");
        }
        assert!(header.contains("DRAM on both sides; 5 rounds of 400 ms per case"), "{header}");
    }

    #[test]
    fn what_a_figure_depends_on_is_recorded() {
        let mut results = results(
            &["--num_iter", "99", "--warmup_iter", "7", "--fault-at", "50ms", "--gpus", "0,1"],
            &[],
        );
        let options = serde_json::to_value(&results.options).expect("encodes");
        assert_eq!((&options["num_iter"], &options["warmup_iter"]), (&99.into(), &7.into()));
        assert_eq!(
            (&options["fault_at_ms"], &options["phase_duration_ms"]),
            (&50.0.into(), &2000.0.into())
        );
        assert_eq!(
            (&options["memory"]["initiator"], &options["memory"]["gpus"][1]),
            (&"DRAM".into(), &1.into())
        );
        assert!(
            results.header().contains("5 rounds of 99 transfers per case"),
            "{}",
            results.header()
        );
        assert_eq!(results.options.memory.tag(), None);
        results.options.memory.target = SegmentType::Vram;
        assert_eq!(results.options.memory.tag().as_deref(), Some("dram-vram1"));
        assert!(
            results.header().contains("initiator's DRAM, target's VRAM of GPU 1"),
            "{}",
            results.header()
        );
        // A file from before these were recorded.
        let mut old = serde_json::to_value(&results.options).expect("encodes");
        let fields = old.as_object_mut().expect("fields");
        for name in [
            "num_iter",
            "warmup_iter",
            "phase_duration_ms",
            "memory",
            "faults",
            "fault_at_ms",
            "trace",
        ] {
            assert!(fields.remove(name).is_some(), "{name}");
        }
        let old: NixlOptions = serde_json::from_value(old).expect("decodes");
        assert_eq!(old.memory, Memories::default());
    }

    #[test]
    fn results_survive_a_round_trip() {
        let results = compared();
        let json = serde_json::to_string(&results).expect("encodes");
        assert_eq!(serde_json::from_str::<NixlResults>(&json).expect("decodes"), results);
        let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(value["schema"], "corelane-bench-nixl");
        assert_eq!(value["series"][0]["part"], "completion");
        assert_eq!(value["comparisons"][0]["vs"], "UCX@UCX_TLS=tcp");
        assert!(value["comparisons"][0]["ratios"]["p99.9"]["median"].is_number());
        assert!(value["comparisons"][0]["p50_difference_us"]["median"].is_number());
    }
}
