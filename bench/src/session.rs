//! What a subcommand does from beginning to end: check the options, start the processes, measure, report.

use std::io::Write as _;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

use crate::case::Backend;
use crate::cli::{ClientArgs, LoopbackArgs, MeasureArgs, ServerArgs};
use crate::client::{Client, ClientOptions};
use crate::coordinator::{self, Pair, Plan};
use crate::loopback::{LoopbackPair, Placement};
use crate::manifest::Host;
use crate::pinning::{allowed_cores, default_cores, ensure_allowed};
use crate::progress::Progress;
use crate::report::{
    Environment, Options, Output, Results, Series, comparison_table, comparisons,
    percentile_distribution, series_table, summary, write_atomically,
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

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Run(error)
    }
}

/// `corelane-bench server`.
pub(crate) fn serve(options: &ServerArgs) -> Result<(), Failure> {
    let allowed = allowed_cores()?;
    let core = options.core.unwrap_or_else(|| default_cores(&allowed).0);
    ensure_allowed(&[core], &allowed, "--core").map_err(Failure::Options)?;
    Ok(server::run(&ServerOptions {
        listen: options.listen,
        core,
        max_memory: options.max_memory,
        once: options.once,
        announce: options.announce,
    })?)
}

/// `corelane-bench client`.
pub(crate) fn client(options: &ClientArgs) -> Result<(), Failure> {
    let plan = options.measure.plan().map_err(Failure::Options)?;
    let allowed = allowed_cores()?;
    let core = options.core.unwrap_or_else(|| default_cores(&allowed).1);
    ensure_allowed(&[core], &allowed, "--core").map_err(Failure::Options)?;
    check_caller(options.caller_core.0, &allowed)?;
    let output = output(&options.measure)?;
    let (client, target) = Client::connect(ClientOptions {
        connect: options.connect.clone(),
        core,
        caller_core: options.caller_core.0,
        max_memory: options.measure.max_memory,
    })?;
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
    let cores = |given: &Option<crate::pinning::Cores>, default: usize| {
        given.as_ref().map_or_else(|| vec![default], |cores| cores.0.clone())
    };
    let server_cores = cores(&options.server_cores, server);
    let client_cores = cores(&options.client_cores, client);
    ensure_allowed(&server_cores, &allowed, "--server-cores").map_err(Failure::Options)?;
    ensure_allowed(&client_cores, &allowed, "--client-cores").map_err(Failure::Options)?;
    check_caller(options.caller_core.0, &allowed)?;
    let output = output(&options.measure)?;
    let mut pairs: Vec<Box<dyn Pair>> = Vec::new();
    let mut environment = Environment::default();
    for number in 0..options.engines / 2 {
        let placement = Placement {
            server_core: server_cores[number % server_cores.len()],
            client_core: client_cores[number % client_cores.len()],
            caller_core: options.caller_core.0,
        };
        let pair = LoopbackPair::start(number, placement, options.measure.max_memory)?;
        let (initiator, target) = pair.hosts().clone();
        environment = Environment { initiator, target };
        pairs.push(Box::new(pair));
    }
    measure(&plan, &mut pairs, environment, &options.measure, options.engines, &output)
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
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let begin = Instant::now();
    let runs = plan.cases.len() * plan.rounds * plan.backends().len();
    let mut progress = Progress::new(runs);
    let (tallies, failure) = coordinator::run(plan, pairs, &mut progress);

    let rows: Vec<_> = tallies.iter().flat_map(|tally| tally.series()).collect();
    let series: Vec<Series> = rows.iter().map(|(row, _)| row.clone()).collect();
    let comparisons =
        plan.baseline.map_or_else(Vec::new, |baseline| comparisons(&series, baseline));
    let results = Results {
        schema: "corelane-bench".to_owned(),
        schema_version: crate::report::SCHEMA_VERSION,
        complete: failure.is_none(),
        failure: failure.as_ref().map(|error| format!("{error:#}")),
        started_unix_s: started,
        elapsed_s: begin.elapsed().as_secs_f64(),
        options: Options {
            transport: "tcp".to_owned(),
            backend: plan.template.backend,
            baseline: plan.baseline,
            rounds: plan.rounds,
            duration_ms: plan.template.duration.as_secs_f64() * 1e3,
            rate: plan.template.rate,
            app: plan.template.app,
            target_app: plan.template.target_app,
            engines,
            burn: plan.template.burn,
            spin: plan.template.spin.clone(),
            seed: options.seed,
        },
        environment,
        series,
        comparisons,
    };
    for (row, histogram) in &rows {
        let text = percentile_distribution(histogram);
        write_atomically(&output.directory.join(&row.hgrm), text.as_bytes())?;
    }
    let json = serde_json::to_vec_pretty(&results).context("encoding the results")?;
    write_atomically(&output.json, &json)?;
    if !results.series.is_empty() {
        print(&results, output).context("writing to standard output")?;
    }
    failure.map_or(Ok(()), |error| Err(Failure::Run(error)))
}

/// The table, the ratios, what deserves a remark, and the five lines.
fn print(results: &Results, output: &Output) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let Environment { initiator, target } = &results.environment;
    writeln!(
        out,
        "{}, {} cores, {}; corelane {}{}",
        initiator.cpu_model,
        initiator.cores_online,
        initiator.kernel,
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
    let open = results
        .options
        .rate
        .map(|rate| format!("open loop at {rate} operations/s and pair, from the intended start"));
    writeln!(
        out,
        "{}; clock read {} ns, {:.0} interruptions over 20 us per second (longest {:.0} us) before the run\n",
        open.as_deref().unwrap_or("closed loop"),
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
    if !results.comparisons.is_empty() {
        let baseline = results.options.baseline.unwrap_or(Backend::RawTcp);
        writeln!(out, "Median over the rounds of the per-round ratio to {baseline}:")?;
        writeln!(out, "{}", comparison_table(&results.comparisons))?;
    }
    for line in summary(results, &output.json, &output.directory) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}
