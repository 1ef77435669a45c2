//! What a subcommand does from beginning to end: check the options, start the processes, measure, report.

use std::fmt;
use std::io::Write as _;

use anyhow::{Context as _, Result};

use crate::case::{Memory, Scenario};
use crate::cli::{ClientArgs, LoopbackArgs, MeasureArgs, ServerArgs};
use crate::client::{Client, ClientOptions};
use crate::coordinator::{self, Pair, Plan};
use crate::loopback::{LoopbackPair, Placement};
use crate::manifest::Host;
use crate::memory::ensure_available;
use crate::parent::Refusal;
use crate::pinning::{Cores, allowed_cores, default_cores, ensure_allowed, lane_order};
use crate::plot;
use crate::progress::Progress;
use crate::report::{
    self, Environment, Load, Options, Output, Percentiles, Results, Row, RunInfo, Series, Started,
    Tally, comparison_table, comparisons, load_table, series_table, summary, write_atomically,
};
use crate::server::{self, ServerOptions};

/// Why a subcommand ended without success.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The user asked for something that cannot be; exit code 2.
    Options(String),
    /// It went wrong; exit code 1.
    Run(anyhow::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Options(message) => f.write_str(message),
            Self::Run(error) => write!(f, "{error:#}"),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        if error.is::<Refusal>() { Self::Options(format!("{error:#}")) } else { Self::Run(error) }
    }
}

/// `corelane-bench server`.
pub(crate) fn serve(options: &ServerArgs) -> Result<(), Failure> {
    let allowed = allowed_cores()?;
    let (first, other) = default_cores(&allowed);
    let cores = lane_cores(options.core.as_ref(), || lane_order(&allowed, first, other, false));
    ensure_allowed(&cores, &allowed, "--core").map_err(Failure::Options)?;
    Ok(server::run(&ServerOptions {
        listen: options.listen,
        cores,
        max_memory: options.max_memory,
        once: options.once,
        announce: options.announce,
    })?)
}

/// `corelane-bench client`.
pub(crate) fn client(options: &ClientArgs) -> Result<(), Failure> {
    let plan = options.measure.plan().map_err(Failure::Options)?;
    let allowed = allowed_cores()?;
    let (other, first) = default_cores(&allowed);
    let cores = lane_cores(options.core.as_ref(), || lane_order(&allowed, first, other, true));
    ensure_allowed(&cores, &allowed, "--core").map_err(Failure::Options)?;
    ensure_enough(&cores, options.measure.lanes, "--core")?;
    check_caller(options.caller_core.0, &allowed)?;
    let bytes = plan.memory_bytes();
    ensure_available(bytes, bytes).map_err(Failure::Options)?;
    // First: where nobody answers nothing is to be left behind.
    let (client, target) = Client::connect(ClientOptions {
        connect: options.connect.clone(),
        cores,
        caller_core: options.caller_core.0,
        max_memory: options.measure.max_memory,
    })?;
    let output = output(&options.measure)?;
    let initiator = Host::describe();
    if initiator.clock != target.clock {
        crate::say!(
            "corelane-bench: two hosts, two clocks: one-way times are not taken, round trips are"
        );
    }
    let environment = Environment { initiator, target: *target };
    measure(&plan, &mut [Box::new(client)], environment, &options.measure, 2, &output)
}

/// `corelane-bench loopback`.
pub(crate) fn loopback(options: &LoopbackArgs) -> Result<(), Failure> {
    let plan = options.measure.plan().map_err(Failure::Options)?;
    let allowed = allowed_cores()?;
    let (server, client) = default_cores(&allowed);
    let server_cores =
        lane_cores(options.server_cores.as_ref(), || lane_order(&allowed, server, client, false));
    let client_cores =
        lane_cores(options.client_cores.as_ref(), || lane_order(&allowed, client, server, true));
    ensure_allowed(&server_cores, &allowed, "--server-cores").map_err(Failure::Options)?;
    ensure_allowed(&client_cores, &allowed, "--client-cores").map_err(Failure::Options)?;
    let lanes = options.measure.lanes;
    ensure_enough(&server_cores, lanes, "--server-cores")?;
    ensure_enough(&client_cores, lanes, "--client-cores")?;
    check_caller(options.caller_core.0, &allowed)?;
    let bytes = plan.memory_bytes();
    ensure_available(bytes.saturating_mul(options.engines), bytes).map_err(Failure::Options)?;
    let output = output(&options.measure)?;
    let mut pairs: Vec<Box<dyn Pair>> = Vec::new();
    let mut environment = Environment::default();
    for number in 0..options.engines / 2 {
        // Cores that were asked for are used in turn; without, all pairs share those of the first.
        let of_pair = |cores: &[usize], given: bool| {
            let at = if given { number * lanes % cores.len() } else { 0 };
            Cores(cores.iter().copied().cycle().skip(at).take(lanes).collect())
        };
        let placement = Placement {
            server_cores: of_pair(&server_cores, options.server_cores.is_some()),
            client_cores: of_pair(&client_cores, options.client_cores.is_some()),
            caller_core: options.caller_core.0,
        };
        let pair = LoopbackPair::start(number, placement, options.measure.max_memory)?;
        let (initiator, target) = pair.hosts().clone();
        environment = Environment { initiator, target };
        pairs.push(Box::new(pair));
    }
    measure(&plan, &mut pairs, environment, &options.measure, options.engines, &output)
}

/// The cores that were asked for, else those of `default`.
fn lane_cores(given: Option<&Cores>, default: impl FnOnce() -> Vec<usize>) -> Vec<usize> {
    given.map_or_else(default, |cores| cores.0.clone())
}

fn ensure_enough(cores: &[usize], lanes: usize, option: &str) -> Result<(), Failure> {
    if lanes <= cores.len() {
        return Ok(());
    }
    let cores = Cores(cores.to_vec());
    Err(Failure::Options(format!(
        "--lanes {lanes} needs a core for each lane, more than there are for {option} ({cores})"
    )))
}

fn check_caller(core: Option<usize>, allowed: &[usize]) -> Result<(), Failure> {
    core.map_or(Ok(()), |core| ensure_allowed(&[core], allowed, "--caller-core"))
        .map_err(Failure::Options)
}

fn output(options: &MeasureArgs) -> Result<Output, Failure> {
    Output::prepare(&options.out_dir, options.json.as_deref())
        .map_err(|error| Failure::Options(format!("{error:#}")))
}

fn measure(
    plan: &Plan,
    pairs: &mut [Box<dyn Pair>],
    environment: Environment,
    options: &MeasureArgs,
    engines: usize,
    output: &Output,
) -> Result<(), Failure> {
    let started = Started::now();
    let mut progress = Progress::new(plan.runs_in_all());
    let (tallies, failure) = coordinator::run(plan, pairs, &mut progress);

    let rows: Vec<Row> = tallies.iter().flat_map(Tally::series).collect();
    if let (true, Some(refused)) =
        (rows.is_empty(), failure.as_ref().filter(|it| it.is::<Refusal>()))
    {
        output.forsake();
        return Err(Failure::Options(format!("{refused:#}")));
    }
    let series: Vec<Series> = rows.iter().map(|row| row.series.clone()).collect();
    let comparisons = plan
        .baselines
        .iter()
        .flat_map(|&baseline| comparisons(&series, plan.template.backend, baseline))
        .collect();
    let results = Results {
        run: RunInfo::new(
            (report::SCHEMA, report::SCHEMA_VERSION),
            &started,
            failure.as_ref().map(|error| format!("{error:#}")),
        ),
        options: Options {
            transport: plan.template.transports.join(","),
            memory: plan.template.memory,
            gpus: plan.template.gpus,
            lanes: plan.template.lanes,
            backend: plan.template.backend,
            baselines: plan.baselines.clone(),
            rounds: plan.rounds,
            duration_ms: plan.template.duration.as_secs_f64() * 1e3,
            rate: plan.template.rate,
            app: plan.template.app,
            target_app: plan.template.target_app,
            engines,
            burn: plan.template.burn,
            spin: plan.template.spin.clone(),
            seed: options.seed,
            models: options.model.descriptions(),
        },
        environment,
        series,
        comparisons,
        loads: tallies.iter().filter_map(Tally::load).collect(),
    };
    for Row { series, histogram, rounds } in &rows {
        let begun = results.run.started_unix_s;
        let round = match series.scenario {
            Scenario::DecodeUnderPrefill => plan.phase_duration,
            _ => plan.template.duration,
        };
        output.histograms(&series.hgrm, histogram, begun, round, rounds)?;
    }
    let json = serde_json::to_vec_pretty(&results).context("encoding the results")?;
    write_atomically(&output.json, &json)?;
    if !results.series.is_empty() {
        output.report(&plot::page(&plot::of_engine(&results)))?;
    }
    if !results.series.is_empty() {
        print(&results, output).context("writing to standard output")?;
    }
    failure.map_or(Ok(()), |error| Err(error.into()))
}

/// The table, the ratios, what deserves a remark, and the five lines.
fn print(results: &Results, output: &Output) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let Environment { initiator, target } = &results.environment;
    writeln!(
        out,
        "{}; corelane {}{}",
        initiator.machine(),
        initiator.corelane_version,
        initiator
            .git_revision
            .get(..12)
            .map_or_else(String::new, |revision| format!(" ({revision})")),
    )?;
    let mut placements: Vec<String> =
        results.series.iter().map(|row| format!("{}: {}", row.backend, row.placement)).collect();
    placements.sort_unstable();
    placements.dedup();
    for placement in placements {
        writeln!(out, "{placement}")?;
    }
    for model in &results.options.models {
        writeln!(out, "{model}")?;
    }
    let open = results
        .options
        .rate
        .map(|rate| format!("open loop at {rate} operations/s and pair, from the intended start"));
    writeln!(
        out,
        "{}; {}; clock read {} ns, {:.0} interruptions over 20 us per second (longest {:.0} us) before the run\n",
        open.as_deref().unwrap_or("closed loop"),
        engine_options(&results.options),
        initiator.noise.timer_overhead_ns,
        initiator.noise.gaps_over_20us_per_second.max(target.noise.gaps_over_20us_per_second),
        initiator.noise.longest_gap_us.max(target.noise.longest_gap_us),
    )?;
    writeln!(out, "{}", series_table(&results.series))?;
    for row in results.series.iter().filter(|row| row.unserved_operations > 0) {
        writeln!(
            out,
            "{} on {} is overloaded: {} of {} operations were due but never started; they count as waiting",
            row.id,
            row.backend,
            row.unserved_operations,
            row.unserved_operations + row.operations
        )?;
    }
    let latency = |load: &Load, part: &str| -> Option<Percentiles> {
        let id = format!("{}/{part}", load.id);
        let row = results.series.iter().find(|row| row.id == id)?;
        Some(row.latency_us)
    };
    let latencies = |load| Some((latency(load, "idle")?, latency(load, "loaded")?));
    let table = load_table(results.loads.iter().map(|load| (load, latencies(load))));
    if !table.is_empty() {
        writeln!(out, "{table}")?;
    }
    for &baseline in &results.options.baselines {
        let table = comparison_table(&results.comparisons, baseline);
        if !table.is_empty() {
            writeln!(
                out,
                "Median over the rounds of the per-round ratio to {baseline}, and of the difference of p50:"
            )?;
            writeln!(out, "{table}")?;
        }
    }
    for line in summary(results, &output.json, &output.directory) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn engine_options(options: &Options) -> String {
    let Options { transport, lanes, memory, gpus, .. } = options;
    let lanes = match lanes {
        1 => "1 lane".to_owned(),
        lanes => format!("{lanes} lanes"),
    };
    let memory = match memory {
        Memory::Registered => "registered memory".to_owned(),
        Memory::Engine => "memory of the engine".to_owned(),
        Memory::Vram => format!("memory of GPUs {} and {}", gpus[0], gpus[1]),
    };
    format!("engine with {transport}, {lanes}, {memory}")
}
