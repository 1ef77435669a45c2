//! The initiator's engine during one run.

use std::net::IpAddr;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use corelane::{Access, Engine, Operation as Direction, RegionDescriptor, Transfer};

use super::initiator::{EngineInitiator, Handles, Place};
use super::memory::EngineMemory;
use super::{PATIENCE, start_engine};
use crate::arena::Arena;
use crate::case::{App, Operation, RunSpec, Sabotage};
use crate::layout::{Layout, Slot, WARM_LEN};
use crate::measure::{Pass, PassOutcome, Recorder, run_pass};
use crate::polling::complete_now;
use crate::sabotage::Sabotaged;
use crate::units::from_hex;

/// Longer than any pass with the waits inside of it, shorter than the coordinator's patience.
const PASS_LIMIT: Duration = Duration::from_secs(100);

/// An engine that is connected to the target, with a transfer prepared for every slot.
pub(crate) struct EngineSession {
    handles: Option<Handles>,
    engine: Engine,
    memory: EngineMemory,
    app: App,
}

impl EngineSession {
    /// Starts the engine, registers or allocates the memory, connects, prepares. `own` provides the application's memory.
    pub(crate) fn open(
        spec: &RunSpec,
        own: impl FnOnce() -> Result<Arena>,
        cores: &[usize],
        ip: IpAddr,
        layout: &Layout,
        metadata: &str,
        descriptor: &str,
    ) -> Result<Self> {
        let metadata =
            from_hex(metadata).context("the server sent metadata that is not hexadecimal")?;
        let descriptor =
            from_hex(descriptor).context("the server sent a descriptor that is not hexadecimal")?;
        let remote = RegionDescriptor::from_bytes(&descriptor)?;
        let engine = start_engine("initiator", spec, cores, ip)?;
        let memory = EngineMemory::provide(
            &engine,
            spec,
            spec.gpus[0],
            layout.arena_bytes,
            Access::LOCAL,
            own,
        )?;
        let region = &memory.region;
        let peer = engine.load_peer(&metadata)?;
        peer.connect(PATIENCE)?;
        let direction = match spec.case.operation {
            Operation::Read => Direction::Read,
            _ => Direction::Write,
        };
        let prepare = |direction, slot: &Slot, len: usize| -> Result<Transfer> {
            let len = len as u64;
            let local: Vec<_> =
                slot.local.iter().map(|&offset| region.segment(offset, len)).collect();
            let there: Vec<_> =
                slot.remote.iter().map(|&offset| remote.segment(offset, len)).collect();
            Ok(engine.prepare(direction, &peer, &local, &there)?.transfer())
        };
        let mut transfers = Vec::with_capacity(layout.slots.len() + 1);
        // Notifications alone have slots without blocks: there is nothing to prepare.
        for slot in layout.slots.iter().filter(|slot| !slot.local.is_empty()) {
            transfers.push(prepare(direction, slot, layout.block_bytes)?);
        }
        transfers.push(prepare(direction, &Slot { local: vec![0], remote: vec![0] }, WARM_LEN)?);
        if let Some((at, len)) = layout.bulk {
            let slot = Slot { local: vec![at], remote: vec![at] };
            transfers.push(prepare(Direction::Write, &slot, len)?);
        }
        let handles = Handles { engine: engine.clone(), peer, transfers: transfers.into() };
        Ok(Self { handles: Some(handles), engine, memory, app: spec.app })
    }

    /// The memory that is transferred from and into.
    pub(crate) fn arena(&self) -> &Arena {
        &self.memory.arena
    }

    /// What the target needs to answer notifications.
    pub(crate) fn metadata(&self) -> Vec<u8> {
        self.engine.metadata()
    }

    /// Runs one pass where the application lives. The recorder travels with it and comes back.
    pub(crate) fn run(
        &mut self,
        pass: Pass,
        mut recorder: Recorder,
        sabotage: Option<Sabotage>,
    ) -> Result<(PassOutcome, Recorder)> {
        let handles = self.handles.clone().context("the session is closed")?;
        match self.app {
            App::Thread => {
                let mut initiator = EngineInitiator::new(handles, Place::Thread);
                let outcome = complete_now(drive(&mut initiator, &pass, &mut recorder, sabotage))?;
                Ok((outcome, recorder))
            }
            App::Lane => {
                let (engine, peer) = (handles.engine.clone(), handles.peer.clone());
                let (sender, receiver) = mpsc::channel();
                // The task's own handle can only be waited for without a limit; the channel bounds the wait.
                drop(engine.spawn_on(&peer, move |local| async move {
                    let mut initiator = EngineInitiator::new(handles, Place::Lane(local));
                    let outcome = drive(&mut initiator, &pass, &mut recorder, sabotage).await;
                    // Gone only if the limit below has passed.
                    let _ = sender.send(outcome.map(|outcome| (outcome, recorder)));
                })?);
                receiver.recv_timeout(PASS_LIMIT).map_err(|cause| {
                    anyhow!(
                        "the application's task on the lane: {cause} (limit {} s)",
                        PASS_LIMIT.as_secs()
                    )
                })?
            }
        }
    }

    /// Takes the memory back and stops the engine; both must work, they are part of what is tested.
    pub(crate) fn close(&mut self) -> Result<()> {
        self.handles = None;
        let released = self.memory.release(&self.engine);
        self.engine.shutdown().context("stopping the initiator's engine")?;
        released.context("on the initiator's side")
    }
}

async fn drive(
    initiator: &mut EngineInitiator,
    pass: &Pass,
    recorder: &mut Recorder,
    sabotage: Option<Sabotage>,
) -> Result<PassOutcome> {
    let mut initiator = Sabotaged::new(initiator, sabotage, pass);
    let outcome = run_pass(&mut initiator, pass, recorder).await?;
    ensure!(initiator.is_drained(), "a pass left transfers behind");
    Ok(outcome)
}
