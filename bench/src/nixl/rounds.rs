//! `corelane-bench nixl` from beginning to end: rounds, tallies, output.

use std::io::Write as _;

use anyhow::Context as _;

use super::backend::Contender;
use super::choice::ensure_driver;
use super::fault::{self, Fault};
use super::nixlbench::{self, Format};
use super::options::{NixlArgs, NixlPlan};
use super::pair::{BackendThreads, NixlPair};
use super::report::{NixlResults, SCHEMA, SCHEMA_VERSION};
use super::tally::NixlTally;
use crate::coordinator::in_turn;
use crate::manifest::Host;
use crate::memory::ensure_available;
use crate::pinning::{allowed_cores, ensure_allowed};
use crate::plot;
use crate::report::{Output, RunInfo, Started, hgrm_name, write_atomically};
use crate::session::Failure;

/// Measures all cases on all backends, round after round.
pub(crate) fn compare(options: &NixlArgs) -> Result<(), Failure> {
    let mut plan = options.plan().map_err(Failure::Options)?;
    let pinned: Vec<usize> =
        [options.pin.initiator, options.pin.target].into_iter().flatten().collect();
    let allowed = allowed_cores()?;
    ensure_allowed(&pinned, &allowed, "--pin").map_err(Failure::Options)?;
    plan.thread_cores = options.thread_cores(&allowed);
    ensure_driver()?;
    let (bytes, most) = plan.memory_bytes(options.vram());
    ensure_available(bytes, most).map_err(Failure::Options)?;
    let output = Output::prepare(&options.out_dir, options.json.as_deref())
        .map_err(|error| Failure::Options(format!("{error:#}")))?;
    let started = Started::now();
    let environment = Host::describe();
    let mut tallies: Vec<NixlTally> = Vec::new();
    for case in &plan.cases {
        tallies
            .extend((0..plan.backends.len()).map(|backend| NixlTally::new(case.clone(), backend)));
    }
    let mut nixl = String::new();
    let (mut faults, mut threads) = (Vec::new(), Vec::new());
    let seen = (&mut nixl, &mut threads);
    let measured = run(options, &plan, (&mut tallies, &mut faults), seen, &started);

    let failure = measured.as_ref().err().map(ToString::to_string);
    let run = RunInfo::new((SCHEMA, SCHEMA_VERSION), &started, failure);
    let mut results = NixlResults::new(options, &plan, &tallies, (run, nixl, environment));
    results.faults = faults;
    results.threads = threads;
    if results.series.is_empty() && results.faults.is_empty() {
        output.forsake();
        return measured;
    }
    write(&results, &tallies, &plan, options, &output)?;
    let mut out = std::io::stdout().lock();
    let figures = match results.series.is_empty() {
        true => String::new(),
        false => results.summary().join("\n"),
    };
    let table = match options.nixlbench.format {
        Format::Table => results.table() + &results.fault_table(),
        Format::Nixlbench => nixlbench::table(&results),
    };
    write!(out, "{}\n{}\n{figures}\n{}", results.header(), table, results.files(&output))
        .and_then(|()| out.flush())
        .context("writing to standard output")?;
    measured
}

fn write(
    results: &NixlResults,
    tallies: &[NixlTally],
    plan: &NixlPlan,
    options: &NixlArgs,
    output: &Output,
) -> anyhow::Result<()> {
    for tally in tallies {
        let backend = plan.backends[tally.backend].to_string();
        for part in tally.parts.iter().filter(|part| !part.all.is_empty()) {
            let name = hgrm_name(&tally.series_id(part.part), &backend);
            let (started, round) = (results.run.started_unix_s, options.duration_of(&tally.case));
            output.histograms(&name, &part.all, started, round, &part.round_points)?;
        }
    }
    let bytes = serde_json::to_vec_pretty(results).context("encoding the results")?;
    write_atomically(&output.json, &bytes)?;
    output.report(&plot::page(&plot::of_nixl(results)))
}

fn run(
    options: &NixlArgs,
    plan: &NixlPlan,
    (tallies, faults): (&mut [NixlTally], &mut Vec<Fault>),
    (nixl, threads): (&mut String, &mut Vec<BackendThreads>),
    started: &Started,
) -> Result<(), Failure> {
    let backends = plan.backends.len();
    if backends > 1 {
        for backend in &plan.backends {
            NixlPair::probe(backend, options, plan)?;
        }
    }
    for round in 1..=options.rounds {
        for index in in_turn(usize::from(round - 1), backends) {
            let backend = &plan.backends[index];
            crate::say!(
                "[{:5.1} s] round {round}/{}: {backend}",
                started.elapsed().as_secs_f64(),
                options.rounds
            );
            if matches!(backend, Contender::Nixl(_)) {
                for &kind in &plan.faults {
                    faults.push(fault::run(kind, backend, options, plan, nixl)?);
                }
            }
            if plan.cases.is_empty() {
                continue;
            }
            let mut pair = NixlPair::start(backend, options, plan)?;
            if round == 1 {
                threads.push(pair.threads.clone());
            }
            if !pair.nixl.is_empty() {
                nixl.clone_from(&pair.nixl);
            }
            for (at, case) in plan.cases.iter().enumerate().filter(|(_, case)| backend.runs(case)) {
                let outcome =
                    pair.measure(case, options.duration_of(case), options.iterations())?;
                tallies[at * backends + index].add_round(&outcome)?;
            }
        }
    }
    Ok(())
}
