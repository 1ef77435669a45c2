//! The only module that knows the engine: everything else measures an [`crate::measure::Initiator`].

mod initiator;
mod memory;
mod session;
mod target;

pub(crate) use session::EngineSession;
pub(crate) use target::EngineTarget;

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;
use corelane::{Engine, EngineConfig, LaneSpec, Listen, TransportKind};

use crate::case::RunSpec;
use crate::parent::Refusal;
use crate::pinning::Cores;

/// How long anything may take that is not measured. Where lanes and applications outnumber the cores, and other programs run,
/// each step of a handshake waits for its turn; no failure of a peer is measured, so that nothing is gained by giving up early.
/// Below what the other process waits for an answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The engine's version: all crates of the workspace share it.
pub(crate) fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// A transport by its name, as the engine spells it; the message says which there are.
pub(crate) fn parse_transport(name: &str) -> Result<String, String> {
    let known: Result<TransportKind, _> = name.parse();
    known.map(|kind| kind.to_string()).map_err(|error| error.to_string())
}

/// Starts an engine with a lane on each of `cores`, that listens on `ip` only.
fn start_engine(role: &str, spec: &RunSpec, cores: &[usize], ip: IpAddr) -> Result<Engine> {
    let mut config = EngineConfig::default();
    config.lanes = LaneSpec::Cores(cores.to_vec());
    config.transports =
        spec.transports.iter().map(|name| name.parse()).collect::<Result<_, corelane::Error>>()?;
    config.connect_timeout = PATIENCE;
    config.liveness = PATIENCE;
    config.deregister_timeout = PATIENCE;
    let devices = if role == "target" { &spec.server_rdma_devices } else { &spec.rdma_devices };
    config.rdma.devices.clone_from(devices);
    config.listen = Listen { addresses: vec![ip], ..Listen::default() };
    if let Some(spin) = &spec.spin {
        config.spin = spin.parse().map_err(|error| anyhow::anyhow!("--spin {spin}: {error}"))?;
    }
    let name = format!("bench-{role}-{}-{}", std::process::id(), spec.run);
    Engine::new(&name, config).map_err(|error| {
        not_started(format!("starting the {role}'s engine, {}", describe_lanes(cores)), &error)
    })
}

/// Why an engine did not start: a configuration that cannot be, such as a device that there is not, is the user's to put right.
pub(crate) fn not_started(what: String, error: &corelane::Error) -> anyhow::Error {
    let message = format!("{what}: {error}");
    match error {
        corelane::Error::Config(_) => Refusal(message).into(),
        _ => anyhow::anyhow!(message),
    }
}

/// Where the lanes are, in words.
pub(crate) fn describe_lanes(cores: &[usize]) -> String {
    match cores {
        [core] => format!("lane on core {core}"),
        cores => format!("{} lanes on cores {}", cores.len(), Cores(cores.to_vec())),
    }
}
