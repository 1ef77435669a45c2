//! A deterministic simulator of corelane's protocol: engines without sockets, on virtual time, in a network that fails.
//!
//! One seed is one run: it draws how many engines there are, what they do, and what befalls them. After every step the
//! promises of docs/reliability.md are checked; a run that breaks one is replayed, with a trace, by its seed.

#![forbid(unsafe_code)]

mod calls;
mod checks;
mod expected;
mod faults;
mod memory;
mod model;
mod net;
mod ports;
mod profile;
mod promise;
mod report;
mod rest;
mod rng;
mod runs;
mod wire;
mod workload;
mod world;

use std::process::ExitCode;

use clap::Parser;
use corelane::sim::Mutation;

/// Runs corelane's protocol on virtual time, against a model.
#[derive(Debug, Parser)]
#[command(name = "corelane-sim", max_term_width = 100)]
struct Options {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Replay this seed, with a trace of all that happens.
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// With --seed: say only how it ends.
    #[arg(long, requires = "seed")]
    quiet: bool,
    /// Run a variant of the protocol that breaks a promise, until it is found out; `all`: every one, each in up to --seeds runs.
    #[arg(long, value_name = "NAME")]
    mutation: Option<String>,
    /// List these variants.
    #[arg(long)]
    list: bool,
    /// Engines of each run, instead of what the seed draws.
    #[arg(long)]
    engines: Option<usize>,
    /// Threads, each with a run of its own.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Say how often each state has met each event, and fail when one that is expected never has.
    #[arg(long)]
    coverage: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.list {
        report::list_mutations();
        return ExitCode::SUCCESS;
    }
    // A panic is a finding, told with its seed.
    std::panic::set_hook(Box::new(|_| {}));
    let passed = match (&options.mutation, options.seed) {
        (mutation, Some(seed)) => {
            let Ok(mutation) = mutation.as_deref().map(find).transpose() else {
                return unknown();
            };
            runs::replay(seed, mutation, options.engines, !options.quiet)
        }
        (Some(all), None) if all == "all" => {
            report::all_mutations(options.from, options.seeds, options.jobs)
        }
        (Some(name), None) => match find(name) {
            Ok(mutation) => {
                report::some_mutations(&[mutation], options.from, options.seeds, options.jobs)
            }
            Err(()) => return unknown(),
        },
        (None, None) => report::clean_runs(
            options.from,
            options.seeds,
            options.jobs,
            options.engines,
            options.coverage,
        ),
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn find(name: &str) -> Result<Mutation, ()> {
    Mutation::ALL.iter().copied().find(|mutation| mutation.name() == name).ok_or(())
}

fn unknown() -> ExitCode {
    eprintln!("there is no such variant; --list lists them");
    ExitCode::from(2)
}
