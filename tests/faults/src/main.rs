//! Fault injection: peers that are killed, stopped and cut off under load, and a watch that judges from outside what the
//! others notice, when, and whether a byte or a notification is wrong.
//!
//! Three processes make a round. The *survivor* has one engine that lives through all rounds; the *victim* is new in each.
//! Both post transfers of every kind to each other, number their notifications, and write down on the *board* (shared
//! memory of the *watch*, this process) what they do. The watch waits until the board shows the phase that it is after,
//! strikes the victim, and from then on only reads the board: no engine is asked whether it is still alive.

mod agents;
mod board;
mod campaign;
mod churn;
mod cut;
mod load;
mod memory;
mod notes;
mod phase;
mod round;
mod side;
mod usage;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "corelane-faults",
    about = "Faults injected into corelane, and what comes of them",
    version
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Peers are killed (SIGKILL).
    Kill(campaign::Options),
    /// Peers are stopped (SIGSTOP) for less and for longer than the liveness timeout, and go on.
    Stall(campaign::Options),
    /// Twenty agents connect, transfer, die and return, and nothing grows.
    Soak(agents::Options),
    /// Nobody is taken for dead, with a short liveness timeout on cores that are busy.
    Liveness(agents::Options),
    /// Some agents; started by the others.
    #[command(hide = true)]
    Agents(agents::Role),
    /// A side of a round; started by the others.
    #[command(hide = true)]
    Side(side::Options),
}

fn main() -> Result<ExitCode> {
    let good = match Cli::parse().command {
        Command::Kill(options) => campaign::run(&options, false)?,
        Command::Stall(options) => campaign::run(&options, true)?,
        Command::Soak(options) => agents::soak(&options)?,
        Command::Liveness(options) => agents::liveness(&options)?,
        Command::Agents(role) => {
            agents::run_role(&role)?;
            true
        }
        Command::Side(options) => {
            side::run(&options)?;
            true
        }
    };
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
