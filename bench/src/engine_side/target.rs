//! The target's engine during one run, and the application beside it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use corelane::{Access, Engine, Notification, Peer};

use super::memory::EngineMemory;
use super::{PATIENCE, describe_lanes, start_engine};
use crate::answering::Ledger;
use crate::arena::Arena;
use crate::case::{App, RunSpec, TargetApp};
use crate::clock::now_ns;
use crate::control::TargetAddress;
use crate::measure::Stamp;
use crate::polling::complete_now;
use crate::units::to_hex;

/// How often the application looks whether a pass has begun.
const PAUSE: Duration = Duration::from_micros(200);
/// How often one that waits looks whether it is to end.
const WAIT: Duration = Duration::from_millis(200);

/// Whether the target's application takes part.
fn has_application(spec: &RunSpec) -> bool {
    spec.case.operation.notifies() || spec.target_app == TargetApp::Poll
}

/// An engine whose memory the initiator reads and writes.
pub(crate) struct EngineTarget {
    engine: Engine,
    memory: EngineMemory,
    ledger: Ledger,
    application: Option<Application>,
    cores: Vec<usize>,
}

/// A running application.
struct Application {
    stop: Arc<AtomicBool>,
    runs: Runs,
}

enum Runs {
    Thread(JoinHandle<()>),
    /// Ends (by disconnecting) with the task.
    Lane(Receiver<()>),
}

impl EngineTarget {
    /// Starts the engine and registers or allocates `len` bytes; `own` provides the application's memory.
    pub(crate) fn start(
        spec: &RunSpec,
        len: usize,
        own: impl FnOnce() -> Result<Arena>,
        cores: &[usize],
        ip: IpAddr,
        ledger: Ledger,
    ) -> Result<Self> {
        let engine = start_engine("target", spec, cores, ip)?;
        let memory =
            EngineMemory::provide(&engine, spec, spec.gpus[1], len, Access::READ_WRITE, own)?;
        Ok(Self { engine, memory, ledger, application: None, cores: cores.to_vec() })
    }

    /// The memory that is transferred from and into.
    pub(crate) fn arena(&self) -> &Arena {
        &self.memory.arena
    }

    /// What the initiator needs.
    pub(crate) fn address(&self) -> TargetAddress {
        TargetAddress::Engine {
            metadata: to_hex(&self.engine.metadata()),
            descriptor: to_hex(&self.memory.region.descriptor().to_bytes()),
        }
    }

    pub(crate) fn placement(&self, spec: &RunSpec) -> String {
        let application = match (has_application(spec), spec.target_app, spec.app) {
            (false, ..) => "application asleep",
            (true, TargetApp::Wait, App::Lane) => "application waiting on the lane",
            (true, TargetApp::Wait, App::Thread) => "application waiting on an unpinned thread",
            (true, _, App::Lane) => "application polling on the lane",
            (true, _, App::Thread) => "application polling on an unpinned thread",
        };
        format!("{}, {application}", describe_lanes(&self.cores))
    }

    /// Learns who the initiator is, and starts the application if this run needs one.
    pub(crate) fn introduce(&mut self, spec: &RunSpec, metadata: &[u8]) -> Result<()> {
        if !has_application(spec) {
            return Ok(());
        }
        let waits = spec.target_app == TargetApp::Wait;
        let peer = self.engine.load_peer(metadata)?;
        let stop = Arc::new(AtomicBool::new(false));
        let answering = Answering {
            engine: self.engine.clone(),
            peer: peer.clone(),
            arena: self.memory.arena.clone(),
            ledger: self.ledger.clone(),
            stop: Arc::clone(&stop),
        };
        let runs = match spec.app {
            App::Thread => {
                let ledger = self.ledger.clone();
                let body = move || {
                    if waits {
                        return answering.wait();
                    }
                    let pause = async || std::thread::sleep(PAUSE);
                    let application = async {
                        answering.run(pause, async || {}).await;
                        Ok(())
                    };
                    if let Err(error) = complete_now(application) {
                        ledger.fail(format!("{error:#}"));
                    }
                };
                let thread = std::thread::Builder::new().name("target-app".to_owned()).spawn(body);
                Runs::Thread(thread.context("starting the target's application")?)
            }
            App::Lane => {
                let (running, ended) = mpsc::channel();
                drop(self.engine.spawn_on(&peer, move |local| async move {
                    let _running = running;
                    let pause = async || local.sleep(PAUSE).await;
                    let relax = async || {
                        if waits {
                            // An engine that is shut down is told by the next poll.
                            let _ = answering.engine.notified().await;
                        } else {
                            local.yield_now().await;
                        }
                    };
                    answering.run(pause, relax).await;
                })?);
                Runs::Lane(ended)
            }
        };
        self.application = Some(Application { stop, runs });
        Ok(())
    }

    /// Ends the application, takes the memory back and stops the engine.
    pub(crate) fn close(&mut self) -> Result<()> {
        let stopped = self.stop_application();
        let released = self.memory.release(&self.engine);
        self.engine.shutdown().context("stopping the target's engine")?;
        stopped?;
        released.context("on the target's side")
    }

    fn stop_application(&mut self) -> Result<()> {
        let Some(Application { stop, runs }) = self.application.take() else { return Ok(()) };
        stop.store(true, Ordering::Release);
        match runs {
            // The application books its own failures; how its thread ended says nothing more.
            Runs::Thread(thread) => drop(thread.join()),
            Runs::Lane(ended) => {
                let stuck = ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
                ensure!(
                    !stuck,
                    "the target's application on the lane does not end: its lane is stuck"
                );
            }
        }
        Ok(())
    }
}

impl Drop for EngineTarget {
    fn drop(&mut self) {
        // The application holds handles of the engine: it would go on polling for nobody.
        if let Err(error) = self.stop_application() {
            tracing::error!("{error:#}");
        }
    }
}

/// The target's application: polls for notifications, and answers those of the initiator.
struct Answering {
    engine: Engine,
    peer: Peer,
    arena: Arena,
    ledger: Ledger,
    stop: Arc<AtomicBool>,
}

impl Answering {
    async fn run(&self, pause: impl AsyncFn(), relax: impl AsyncFn()) {
        while !self.stop.load(Ordering::Relaxed) {
            match self.poll() {
                Err(error) => {
                    return self.ledger.fail(format!("the target's application: {error:#}"));
                }
                Ok(0) if self.ledger.is_paused() => pause().await,
                Ok(_) => relax().await,
            }
        }
    }

    /// As `run`, on a thread that sleeps until a notification comes.
    fn wait(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let answered =
                self.engine.wait_notifications(WAIT).map_err(anyhow::Error::from).and_then(|all| {
                    all.iter().try_for_each(|notification| self.answer(notification))
                });
            if let Err(error) = answered {
                return self.ledger.fail(format!("the target's application: {error:#}"));
            }
        }
    }

    fn poll(&self) -> Result<usize> {
        let mut answered = Ok(());
        let taken = self.engine.take_notifications(|notification| {
            if answered.is_ok() {
                answered = self.answer(&notification);
            }
        })?;
        answered.map(|()| taken)
    }

    fn answer(&self, notification: &Notification) -> Result<()> {
        let arrived = now_ns();
        let stamp = Stamp::decode(&notification.payload)
            .context("verification failed: a notification that nobody sent")?;
        let intact = self.ledger.data_is_there(&self.arena, &stamp);
        // The stamp is enough of an answer, and as much as the baseline sends.
        let sent = self.peer.notify(&notification.payload[..Stamp::LEN]);
        self.ledger.arrived(&stamp, arrived, intact);
        Ok(sent?)
    }
}
