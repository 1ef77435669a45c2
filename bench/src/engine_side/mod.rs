//! The only module that knows the engine: everything else measures an [`crate::measure::Initiator`].

mod initiator;
mod session;
mod target;

pub(crate) use session::EngineSession;
pub(crate) use target::EngineTarget;

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use corelane::{Engine, EngineConfig, LaneSpec, Listen, TransportKind};

use crate::case::RunSpec;

/// The engine's version: all crates of the workspace share it.
pub(crate) fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Starts an engine with one lane on `core`, that listens on `ip` only.
fn start_engine(role: &str, spec: &RunSpec, core: usize, ip: IpAddr) -> Result<Engine> {
    let mut config = EngineConfig::default();
    config.lanes = LaneSpec::Cores(vec![core]);
    config.transports = vec![TransportKind::Tcp];
    config.listen = Listen { addresses: vec![ip], ..Listen::default() };
    if let Some(spin) = &spec.spin {
        config.spin = spin.parse().map_err(|error| anyhow::anyhow!("--spin {spin}: {error}"))?;
    }
    let name = format!("bench-{role}-{}-{}", std::process::id(), spec.run);
    Engine::new(&name, config)
        .with_context(|| format!("starting the {role}'s engine on core {core}"))
}
