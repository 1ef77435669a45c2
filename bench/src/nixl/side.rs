//! A process of a pair: obeys its parent until its input ends.

use anyhow::{Context as _, Result, bail};

use super::agent::{NixlAgent, nixl_version};
use super::driver::Driver;
use super::initiator::{self, Meter};
use super::raw::RawSide;
use super::sabotage::Sabotaged;
use super::target;
use super::wire::{Order, Reply, Role, Setup, System};
use crate::parent::{Parent, Refusal, leave};
use crate::pinning;
use crate::units::{from_hex, to_hex};

/// Runs one side, and ends the process with it.
pub(crate) fn serve() -> Result<()> {
    let parent = Parent::connect(std::io::stdin())?;
    let ended = work(&parent);
    if let Err(error) = &ended {
        let message = format!("{error:#}");
        let failure = if error.is::<Refusal>() {
            Reply::Refused { message }
        } else {
            Reply::Failed { message }
        };
        // The parent may be gone; there is nobody else to tell.
        let _ = parent.reply(&failure);
    }
    leave(&ended)
}

fn work(parent: &Parent<Order>) -> Result<()> {
    let Some(Order::Setup(setup)) = parent.wait()? else {
        bail!("expected to be set up first");
    };
    match &setup.system {
        System::Nixl(system) => {
            let agent =
                NixlAgent::with_memory(setup.role.name(), system, setup.arena()?, setup.gpus[1])?;
            drive_as_asked(parent, agent, &setup)
        }
        System::Raw(kind) => drive_as_asked(parent, RawSide::new(*kind, &setup)?, &setup),
    }
}

/// Measuring loops of their own for what is broken on purpose: the others do not pay for it.
fn drive_as_asked(parent: &Parent<Order>, agent: impl Driver, setup: &Setup) -> Result<()> {
    match setup.sabotage {
        None => drive(parent, agent, setup),
        Some(mode) => drive(parent, Sabotaged::new(agent, mode), setup),
    }
}

fn drive(parent: &Parent<Order>, mut agent: impl Driver, setup: &Setup) -> Result<()> {
    // After the backend has started its threads: only the application's own thread is placed.
    if let Some(core) = setup.core {
        pinning::pin_current_thread(core)?;
    }
    let metadata = to_hex(&agent.metadata()?);
    let nixl = match &setup.system {
        System::Raw(_) => String::new(),
        System::Nixl(_) => nixl_version(),
    };
    let address = agent.arena().as_ptr() as u64;
    let pid = std::process::id() as i32;
    // The harness has this one, and one that reads orders.
    let threads = pinning::threads(&["orders"]);
    parent.reply(&Reply::Ready { metadata, address, pid, nixl, threads })?;
    let other = match parent.wait()? {
        Some(Order::Meet { metadata, address, pid }) => {
            let metadata = from_hex(&metadata).context("metadata that is no hexadecimal")?;
            agent.meet(&metadata, address)?;
            parent.reply(&Reply::Met)?;
            pid
        }
        None => return Ok(()),
        Some(other) => bail!("expected to meet the other side, not {other:?}"),
    };
    match setup.role {
        Role::Initiator => {
            let meter = Meter { own: pid, target: other };
            initiator::run(&mut agent, parent, setup.seed, meter, &setup.thread_cores)
        }
        Role::Target => target::run(&mut agent, parent, setup.seed, setup.sleeps),
    }
}
