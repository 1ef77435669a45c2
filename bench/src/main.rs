//! `corelane-bench`: measures corelane between two processes, and proves that the bytes arrived.
//!
//! ```text
//!   loopback ──orders (pipe)──> client process ──control (TCP)──> server process
//!   rounds, tables, files       lane + application                lane + application
//!                                     └──────── engine under test ───────┘
//! ```
//!
//! A *case* is one shape of one operation; a *run* is a case on a backend in a round. Between two *passes* of a run the
//! contents are renewed and what arrived is compared byte for byte; the control connection is silent during a pass.
//! docs/benchmarks.md describes the method.

/// Writes a line to standard error. Unlike `eprintln!` it does not panic when nobody reads it any more.
macro_rules! say {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($argument)*);
    }};
}
use say;

mod answering;
mod arena;
mod case;
mod cli;
mod client;
mod clock;
mod control;
mod coordinator;
mod cpu;
mod engine_side;
mod layout;
mod load_options;
mod loopback;
mod manifest;
mod measure;
mod memory;
mod models;
mod nixl;
mod parent;
mod pattern;
mod peers;
mod pinning;
mod plot;
mod polling;
mod posting;
mod process;
mod progress;
mod raw_local;
mod raw_tcp;
mod report;
mod sabotage;
mod server;
mod session;
mod units;
mod vram;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{Cli, Command};
use crate::client::ClientOptions;
use crate::session::Failure;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            say!("{}", cli::one_line(&error));
            return ExitCode::from(2);
        }
        Err(help) => {
            // A closed pipe behind `--help` is nobody's problem.
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say!("corelane-bench: {failure}");
            match failure {
                Failure::Options(_) => ExitCode::from(2),
                Failure::Run(_) => ExitCode::FAILURE,
            }
        }
    }
}

fn dispatch(cli: Cli) -> Result<(), Failure> {
    if let Some(parent) = cli.parent_pid {
        process::die_with(parent)?;
    }
    match cli.command {
        Command::Server(options) => session::serve(&options),
        Command::Client(options) => session::client(&options),
        Command::Loopback(options) => session::loopback(&options),
        Command::Nixl(options) => nixl::compare(&options),
        Command::ManyPeers(options) => peers::measure(&options),
        Command::PeersSide => Ok(peers::serve_side()?),
        Command::Plot(options) => plot::plot(&options),
        Command::Posting(options) => Ok(posting::run(&options)?),
        #[cfg(feature = "nixl")]
        Command::NixlSide => Ok(nixl::serve_side()?),
        Command::Worker(options) => Ok(loopback::work(ClientOptions {
            connect: options.connect,
            cores: options.core.0,
            caller_core: options.caller_core.0,
            max_memory: options.max_memory,
        })?),
    }
}
