//! One backend in one round: a target and an initiator, fresh processes that end with it.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::backend::Contender;
use super::case::NixlCase;
use super::fault::Watched;
use super::options::{NixlArgs, NixlPlan};
use super::wire::{Iterations, NixlSystem, Order, Outcome, Reply, Role, Setup, System};
use crate::process::Helper;
use crate::session::Failure;

/// Loading libraries, creating a backend and registering memory; some backends look around for seconds.
const START_PATIENCE: Duration = Duration::from_secs(90);
/// Added to a pass's own duration: filling, preparing, checking, and the time that one operation may take.
const PASS_PATIENCE: Duration = Duration::from_secs(120);
/// How often the other process is looked at while one is waited for.
const LOOK: Duration = Duration::from_millis(200);

/// The threads that a backend and its NIXL started in both processes, each with the cores that it may run on: `NAME on CORES`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BackendThreads {
    pub(crate) backend: String,
    pub(crate) initiator: Vec<String>,
    pub(crate) target: Vec<String>,
}

/// Both processes, introduced to each other.
pub(crate) struct NixlPair {
    initiator: Helper<Reply>,
    target: Helper<Reply>,
    /// Version of the NIXL in use; empty where there is none.
    pub(crate) nixl: String,
    pub(crate) threads: BackendThreads,
    sequence: u64,
    /// What each has to be told of the other.
    target_order: Order,
    initiator_order: Order,
}

impl NixlPair {
    /// Starts both sides.
    pub(crate) fn start(
        backend: &Contender,
        options: &NixlArgs,
        plan: &NixlPlan,
    ) -> Result<Self, Failure> {
        // One after the other: what NIXL or a backend objects to is then logged once.
        let mut target = start_side(Role::Target, backend, options, plan)?;
        let (target_order, nixl, of_target) =
            introduction(receive(&mut target, None, START_PATIENCE)?)?;
        let mut initiator = start_side(Role::Initiator, backend, options, plan)?;
        let (initiator_order, _, of_initiator) =
            introduction(receive(&mut initiator, Some(&mut target), START_PATIENCE)?)?;
        let threads = BackendThreads {
            backend: backend.to_string(),
            initiator: of_initiator,
            target: of_target,
        };
        let mut pair =
            Self { initiator, target, nixl, threads, sequence: 0, target_order, initiator_order };
        pair.introduce()?;
        Ok(pair)
    }

    /// Whether a backend can be had at all: what is wrong with the last of several must not show after all others have run.
    pub(crate) fn probe(
        backend: &Contender,
        options: &NixlArgs,
        plan: &NixlPlan,
    ) -> Result<(), Failure> {
        let smallest = NixlPlan { arena_bytes: 4096, ..plan.clone() };
        let mut target = start_side(Role::Target, backend, options, &smallest)?;
        introduction(receive(&mut target, None, START_PATIENCE)?).map(|_| ())
    }

    /// Introduces the two to each other.
    pub(crate) fn introduce(&mut self) -> Result<(), Failure> {
        self.target.send(&self.initiator_order)?;
        self.initiator.send(&self.target_order)?;
        for helper in [&mut self.target, &mut self.initiator] {
            match receive(helper, None, START_PATIENCE)? {
                Reply::Met => {}
                other => return Err(unexpected(&other)),
            }
        }
        Ok(())
    }

    /// Starts another target in the place of one that is gone; the two do not know each other yet.
    pub(crate) fn replace_target(
        &mut self,
        backend: &Contender,
        options: &NixlArgs,
        plan: &NixlPlan,
    ) -> Result<(), Failure> {
        self.target = start_side(Role::Target, backend, options, plan)?;
        self.target_order = introduction(receive(&mut self.target, None, START_PATIENCE)?)?.0;
        Ok(())
    }

    /// Lets the initiator run a case again and again until a transfer fails, at most for `limit`.
    pub(crate) fn watch(&mut self, case: &NixlCase, limit: Duration) -> Result<(), Failure> {
        let limit_ns = limit.as_nanos() as u64;
        Ok(self.initiator.send(&Order::Watch { case: case.clone(), limit_ns })?)
    }

    /// What the initiator saw. The target may be gone.
    pub(crate) fn watched(&mut self, limit: Duration) -> Result<Watched, Failure> {
        match receive(&mut self.initiator, None, limit + PASS_PATIENCE)? {
            Reply::Watched(watched) => Ok(watched),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends a signal to the target.
    pub(crate) fn signal_target(&self, signal: Signal) -> Result<(), Failure> {
        Ok(self.target.signal(signal)?)
    }

    /// Runs a case: once untimed and once timed, both verified.
    pub(crate) fn measure(
        &mut self,
        case: &NixlCase,
        duration: Duration,
        iterations: Iterations,
    ) -> Result<Outcome, Failure> {
        self.pass(case, Duration::ZERO, iterations)?;
        self.pass(case, duration, iterations)
    }

    /// Runs a case's transfers once and verifies them; tells when the first of them ended, by the clock of all processes.
    pub(crate) fn read_once(&mut self, case: &NixlCase) -> Result<u64, Failure> {
        Ok(self.pass(case, Duration::ZERO, Iterations::default())?.first_ended_ns)
    }

    fn pass(
        &mut self,
        case: &NixlCase,
        duration: Duration,
        iterations: Iterations,
    ) -> Result<Outcome, Failure> {
        self.sequence += 1;
        let sequence = self.sequence;
        let Self { initiator, target, .. } = self;
        target.send(&Order::Begin { case: case.clone(), sequence })?;
        match receive(target, Some(initiator), PASS_PATIENCE)? {
            Reply::Begun => {}
            other => return Err(unexpected(&other)),
        }
        let duration_ns = duration.as_nanos() as u64;
        initiator.send(&Order::Run { case: case.clone(), sequence, duration_ns, iterations })?;
        let mut outcome = match receive(initiator, Some(target), duration * 4 + PASS_PATIENCE)? {
            Reply::Ran(outcome) => *outcome,
            other => return Err(unexpected(&other)),
        };
        target.send(&Order::End { case: case.clone(), sequence })?;
        match receive(target, Some(initiator), PASS_PATIENCE)? {
            Reply::Ended { one_way } => {
                outcome.one_way = one_way;
                Ok(outcome)
            }
            other => Err(unexpected(&other)),
        }
    }
}

/// Starts one side; it will say when it is ready.
fn start_side(
    role: Role,
    backend: &Contender,
    options: &NixlArgs,
    plan: &NixlPlan,
) -> Result<Helper<Reply>, Failure> {
    let system = match backend {
        Contender::Raw(kind) => System::Raw(*kind),
        Contender::Nixl(spec) => System::Nixl(NixlSystem {
            threads: options.threads() > 1,
            ..options.choice.system(spec)
        }),
    };
    let setup = Setup {
        role,
        system,
        core: match role {
            Role::Initiator => options.pin.initiator,
            Role::Target => options.pin.target,
        },
        thread_cores: plan.thread_cores.clone(),
        sleeps: options.target_app.sleeps(backend),
        arena_bytes: plan.arena_bytes,
        gpus: match (role, options.vram()) {
            (Role::Initiator, gpus) => gpus,
            (Role::Target, [initiator, target]) => [target, initiator],
        },
        seed: options.seed,
        sabotage: options.sabotage.filter(|_| role == Role::Initiator),
    };
    let name = format!("{backend} {}", role.name());
    let environment = options.environment(backend);
    let mut helper = Helper::start_with(&name, &["nixl-side".to_owned()], &environment)?;
    helper.send(&Order::Setup(setup))?;
    Ok(helper)
}

/// What the other side has to be told of a process that is ready, its version of NIXL, and its threads.
fn introduction(reply: Reply) -> Result<(Order, String, Vec<String>), Failure> {
    match reply {
        Reply::Ready { metadata, address, pid, nixl, threads } => {
            Ok((Order::Meet { metadata, address, pid }, nixl, threads))
        }
        other => Err(unexpected(&other)),
    }
}

/// The next reply of a process, as long as the other one lives.
fn receive(
    helper: &mut Helper<Reply>,
    mut other: Option<&mut Helper<Reply>>,
    patience: Duration,
) -> Result<Reply, Failure> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(reply) = helper.receive_within(LOOK)? {
            return match reply {
                Reply::Refused { message } => Err(Failure::Options(message)),
                Reply::Failed { message } => Err(helper.blame(message).into()),
                reply => Ok(reply),
            };
        }
        if let Some(other) = &mut other {
            // What it said last says more than that it ended.
            match other.receive_within(Duration::ZERO)? {
                Some(Reply::Failed { message }) => return Err(other.blame(message).into()),
                Some(reply) => return Err(unexpected(&reply)),
                None => {}
            }
        }
        if Instant::now() > deadline {
            return Err(helper.blame(format!("no answer within {} s", patience.as_secs())).into());
        }
    }
}

fn unexpected(reply: &Reply) -> Failure {
    anyhow!("unexpected reply {reply:?}; this is a bug of corelane-bench").into()
}
