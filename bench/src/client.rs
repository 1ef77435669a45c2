//! The initiator's process: runs one case after the other against a target, and verifies what it measures.

use std::net::SocketAddr;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::arena::{self, Arena};
use crate::case::{App, Backend, Operation, RunSpec, Sabotage};
use crate::clock::{self, now_ns};
use crate::control::{Ask, Control, Reply, TargetAddress};
use crate::cpu::{Burners, Usage};
use crate::engine_side::{EngineSession, describe_lanes};
use crate::layout::{BULK_INDEX, Layout};
use crate::manifest::Host;
use crate::measure::{
    Initiator, LoadOutcome, LoadShape, Pass, PassOutcome, Phase, Points, Recorder, histogram,
    points_of, restore, run_pass,
};
use crate::pinning::{self, Cores};
use crate::polling::complete_now;
use crate::raw_local::RawLocalInitiator;
use crate::raw_tcp::RawInitiator;
use crate::sabotage::Sabotaged;
use crate::units::to_hex;

/// How the initiator's process is placed and bounded.
#[derive(Clone, Debug)]
pub(crate) struct ClientOptions {
    pub(crate) connect: String,
    /// Cores for lanes, of which a run takes as many as it wants; a baseline's thread takes the first.
    pub(crate) cores: Vec<usize>,
    /// Core of the application's thread; `None` leaves it unpinned.
    pub(crate) caller_core: Option<usize>,
    pub(crate) max_memory: usize,
}

/// What one run of one pair measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) operations: u64,
    /// Operations whose every byte was compared, among those and in the warm-up.
    pub(crate) verified: u64,
    pub(crate) bytes: u64,
    /// Time spent in passes, without verification.
    pub(crate) span_ns: u64,
    /// Operations of an open loop that were due but cut off.
    pub(crate) unserved: u64,
    pub(crate) used_initiator: Usage,
    pub(crate) used_target: Usage,
    pub(crate) response: Points,
    pub(crate) service: Option<Points>,
    /// Of scenario `decode-under-prefill`; `response` and `service` are then those of the reads beside writes.
    pub(crate) load: Option<LoadOutcome>,
    /// From sending a notification to the target's application seeing it; `None` between hosts.
    pub(crate) one_way: Option<Points>,
    pub(crate) placement: String,
}

/// A connection to a target, and the memory of this side.
pub(crate) struct Client {
    control: Control,
    options: ClientOptions,
    allowed: Vec<usize>,
    memory: Option<Arena>,
    one_clock: bool,
    prepared: Option<Prepared>,
}

/// A run that is open on both sides. Fields drop in this order: first whoever touches the memory, then the memory.
struct Prepared {
    session: Session,
    burners: Burners,
    spec: RunSpec,
    layout: Layout,
    arena: Arena,
    placement: String,
}

enum Session {
    Engine(Box<EngineSession>),
    RawTcp(Box<RawInitiator>),
    RawLocal(Box<RawLocalInitiator>),
}

impl Prepared {
    fn close(&mut self) -> Result<()> {
        match &mut self.session {
            Session::Engine(session) => session.close(),
            Session::RawTcp(_) | Session::RawLocal(_) => Ok(()),
        }
    }
}

impl Client {
    /// Connects to a server; also returns what it said about its host.
    pub(crate) fn connect(options: ClientOptions) -> Result<(Self, Box<Host>)> {
        let (control, target) = Control::connect(&options.connect)?;
        let allowed = pinning::allowed_cores()?;
        let one_clock = target.clock == clock::clock_identity();
        Ok((Self { control, options, allowed, memory: None, one_clock, prepared: None }, target))
    }

    /// Opens a run on both sides, up to the point where measuring can begin.
    pub(crate) fn prepare(&mut self, spec: RunSpec) -> Result<()> {
        self.prepared = None;
        spec.validate(self.options.max_memory).map_err(anyhow::Error::msg)?;
        let Reply::Opened { address, placement: target } =
            self.control.ask(&Ask::Open { spec: Box::new(spec.clone()) })?
        else {
            bail!("the server did not open the case");
        };
        let layout = Layout::new(&spec);
        let limit = self.options.max_memory + (1 << 20);
        arena::ensure_within(layout.arena_bytes, limit)?;
        let core = pinning::first(&self.options.cores)?;
        let lanes = pinning::lanes(&self.options.cores, spec.lanes)?;
        let (session, arena, initiator) = match (spec.backend, address) {
            (Backend::RawTcp, TargetAddress::RawTcp { port }) => {
                let arena = arena::grow(&mut self.memory, layout.arena_bytes, limit)?;
                pinning::pin_current_thread(core)?;
                let target = SocketAddr::new(self.control.peer_ip()?, port);
                let raw =
                    RawInitiator::connect(target, arena.clone(), spec.case.operation, &layout)?;
                (Session::RawTcp(Box::new(raw)), arena, format!("thread on core {core}"))
            }
            (
                Backend::RawCma | Backend::RawMemcpy | Backend::RawGpu,
                TargetAddress::RawLocal(address),
            ) => {
                let Some(kind) = spec.backend.local_kind().filter(|_| self.one_clock) else {
                    bail!("{} copies within one host: leave it out, or use loopback", spec.backend)
                };
                let arena = if spec.backend == Backend::RawGpu {
                    Arena::of_gpu(spec.gpus[0], layout.arena_bytes)?
                } else {
                    arena::grow(&mut self.memory, layout.arena_bytes, limit)?
                };
                pinning::pin_current_thread(core)?;
                let (operation, one_core) = (spec.case.operation, self.allowed.len() == 1);
                let raw =
                    RawLocalInitiator::reach(kind, address, &arena, operation, &layout, one_core)?;
                (Session::RawLocal(Box::new(raw)), arena, format!("thread on core {core}"))
            }
            (Backend::Corelane, TargetAddress::Engine { metadata, descriptor }) => {
                let caller = self.place_caller(&spec)?;
                let ip = self.control.local_ip()?;
                if spec.needs_other_memory() {
                    // What was kept for other cases would stand beside this one's.
                    self.memory = None;
                }
                let memory = &mut self.memory;
                let own = || arena::grow(memory, layout.arena_bytes, limit);
                let session =
                    EngineSession::open(&spec, own, lanes, ip, &layout, &metadata, &descriptor)?;
                let introduction = Ask::Introduce { metadata: to_hex(&session.metadata()) };
                self.control.ask(&introduction)?;
                let (arena, place) = (session.arena().clone(), describe_lanes(lanes));
                (Session::Engine(Box::new(session)), arena, format!("{place}, {caller}"))
            }
            _ => bail!("the server opened another backend than {}", spec.backend),
        };
        let burners = if spec.burn { Burners::start(lanes)? } else { Burners::none() };
        let burning = if spec.burn { "; a CPU-bound thread on each lane's core" } else { "" };
        let placement = format!("initiator: {initiator}; target: {target}{burning}");
        self.prepared = Some(Prepared { session, burners, spec, layout, arena, placement });
        Ok(())
    }

    /// Puts this thread, which is the application, where the options want it.
    fn place_caller(&self, spec: &RunSpec) -> Result<String> {
        match (spec.app, self.options.caller_core) {
            (App::Thread, Some(core)) => {
                pinning::pin_current_thread(core)?;
                Ok(format!("application on a thread on core {core}"))
            }
            (app, _) => {
                pinning::restrict_current_thread(&self.allowed)?;
                let cores = Cores(self.allowed.clone());
                Ok(match app {
                    App::Thread => format!("application on an unpinned thread (cores {cores})"),
                    App::Lane => "application on the lane".to_owned(),
                })
            }
        }
    }

    /// Measures the prepared run and closes it on both sides.
    pub(crate) fn measure(&mut self) -> Result<Outcome> {
        let Some(mut prepared) = self.prepared.take() else { bail!("no run was prepared") };
        let measured = Measuring {
            control: &mut self.control,
            recorder: Recorder::new(prepared.spec.rate.is_some()),
            one_way: histogram(),
            outcome: Outcome::default(),
            pass: 0,
            notifications: 0,
            phase: None,
            run: &mut prepared,
        }
        .run();
        let closed_here = prepared.close();
        let closed_there = self.control.ask(&Ask::Close);
        // The first failure is the cause of the later ones.
        let mut outcome = measured?;
        closed_here?;
        closed_there?;
        outcome.placement = prepared.placement.clone();
        if !self.one_clock {
            outcome.one_way = None;
        }
        Ok(outcome)
    }
}

/// The state of a run between two passes.
struct Measuring<'a> {
    control: &'a mut Control,
    run: &'a mut Prepared,
    recorder: Recorder,
    one_way: hdrhistogram::Histogram<u64>,
    outcome: Outcome,
    pass: u32,
    notifications: u64,
    /// Of a load: what the next pass does, and for how long.
    phase: Option<(Phase, LoadShape, u64)>,
}

/// The longest warm-up of a load.
const LOAD_WARM_UP_NS: u64 = 250_000_000;

/// A pass of an open loop is at most this long, so that verification happens regularly.
const OPEN_LOOP_PASS_SECONDS: f64 = 0.5;

impl Measuring<'_> {
    fn run(mut self) -> Result<Outcome> {
        if let Some(shape) = self.run.spec.case.load {
            return self.run_load(shape);
        }
        let begin = now_ns();
        let until = begin + self.run.spec.duration.as_nanos() as u64;
        let (verified, plain) = self.operations_per_pass();
        // The first pass finds cold caches and fresh connections: verified, but not measured.
        self.verified_pass(verified)?;
        let warm = self.outcome.verified;
        self.recorder = Recorder::new(self.run.spec.rate.is_some());
        self.one_way.reset();
        self.outcome = Outcome { verified: warm, ..Outcome::default() };
        let mut enough = false;
        loop {
            self.verified_pass(verified)?;
            // An open loop is measured in its long passes: there is at least one.
            enough |=
                self.run.spec.rate.is_none() && self.outcome.operations >= self.run.spec.min_ops;
            if now_ns() >= until && enough {
                break;
            }
            if plain > 0 {
                enough |= self.run.spec.rate.is_some();
                let stop = self.run.spec.rate.is_none().then_some(until.max(now_ns() + 1));
                self.pass(plain, stop, 0)?;
            }
        }
        self.outcome.response = points_of(self.recorder.response());
        self.outcome.service = self.recorder.service().map(points_of);
        if self.run.spec.case.operation.notifies() {
            self.outcome.one_way = Some(points_of(&self.one_way));
        }
        Ok(self.outcome)
    }

    /// The three phases of a load, after a short one with both kinds of transfer that is thrown away.
    fn run_load(mut self, shape: LoadShape) -> Result<Outcome> {
        let slots = self.run.spec.case.slots();
        let duration_ns = self.run.spec.duration.as_nanos() as u64;
        self.phase = Some((Phase::Both, shape, (duration_ns / 4).min(LOAD_WARM_UP_NS)));
        let warm = self.pass(0, None, slots)?.operations;
        self.outcome = Outcome { verified: warm, ..Outcome::default() };
        let mut load = LoadOutcome::default();
        for phase in Phase::ALL {
            let before = self.outcome.clone();
            self.phase = Some((phase, shape, duration_ns));
            let done = self.pass(0, None, slots)?;
            let outcome = done.phase.unwrap_or_default();
            if phase == Phase::Both {
                self.outcome.bytes += outcome.bulk_operations * shape.bulk_bytes as u64;
            } else {
                // What the processors did counts with both under way.
                self.outcome = before;
            }
            self.outcome.verified += done.operations;
            *load.of(phase) = outcome;
        }
        self.outcome.response = load.both.response.clone();
        self.outcome.service = Some(load.both.service.clone());
        self.outcome.load = Some(load);
        Ok(self.outcome)
    }

    /// Operations of a verified pass and of the one without verification that follows it.
    fn operations_per_pass(&self) -> (u64, u64) {
        let spec = &self.run.spec;
        let slots = spec.case.slots() as u64;
        match spec.rate {
            None => (slots, spec.case.plain_ops_per_pass()),
            Some(rate) => {
                let seconds = OPEN_LOOP_PASS_SECONDS.min(spec.duration.as_secs_f64() / 2.0);
                // Slow schedules must not spend minutes on one pass.
                let verified = slots.min((rate * seconds / 5.0) as u64).max(1);
                (verified, ((rate * seconds) as u64).max(1))
            }
        }
    }

    /// Renews the contents of as many slots as there are operations, runs them once, and checks every byte.
    fn verified_pass(&mut self, operations: u64) -> Result<()> {
        let done = self.pass(operations, None, operations as usize)?;
        self.outcome.verified += done.operations;
        Ok(())
    }

    fn pass(
        &mut self,
        operations: u64,
        until_ns: Option<u64>,
        slots: usize,
    ) -> Result<PassOutcome> {
        self.pass += u32::from(slots > 0);
        let sequence = self.run.spec.sequence(self.pass);
        let slots = if self.run.spec.case.operation.moves_data() { slots } else { 0 };
        self.renew(sequence, slots);
        match self.control.ask(&Ask::Begin { sequence, slots })? {
            Reply::Ready => {}
            other => bail!("unexpected answer {other:?}"),
        }
        let used = self.run.burners.net_usage();
        let pass = self.plan(operations, until_ns, sequence);
        let done =
            self.run_in_session(pass).map_err(|error| self.with_targets_view(error, sequence))?;
        let used = self.run.burners.net_usage().since(used);
        // An overloaded open loop leaves slots unused: those still hold the poison.
        let checked = slots.min(done.operations as usize);
        self.notifications += done.notifications;
        let ended = self.control.ask(&Ask::End {
            sequence,
            slots: checked,
            notifications: self.notifications,
        })?;
        let Reply::Ended { usage, one_way } = ended else { bail!("unexpected answer {ended:?}") };
        self.verify(sequence, checked)?;
        restore(&mut self.one_way, &one_way)?;
        let outcome = &mut self.outcome;
        outcome.operations += done.operations;
        outcome.bytes += done.operations * self.run.spec.case.bytes() as u64;
        outcome.span_ns += done.span_ns;
        outcome.unserved += done.unserved;
        outcome.used_initiator += used;
        outcome.used_target += usage;
        Ok(done)
    }

    /// Adds what the target knows about a failed pass: it is often the side that saw the cause.
    fn with_targets_view(&mut self, error: anyhow::Error, sequence: u64) -> anyhow::Error {
        let end = Ask::End { sequence, slots: 0, notifications: self.notifications };
        match self.control.ask(&end) {
            Err(view) => anyhow::anyhow!("{error:#}; the target says: {view:#}"),
            Ok(_) => error,
        }
    }

    /// Poisons the destination of reads, renews the source of writes.
    fn renew(&self, sequence: u64, slots: usize) {
        let Prepared { spec, layout, arena, .. } = &*self.run;
        for (index, local, _) in layout.blocks().take(slots * spec.case.blocks) {
            match spec.case.operation {
                Operation::Read => arena.poison(local, layout.block_bytes),
                _ => arena.fill(local, layout.block_bytes, sequence, index),
            }
        }
        if let Some((at, len)) = layout.bulk {
            arena.fill(at, len, sequence, BULK_INDEX);
        }
    }

    fn verify(&self, sequence: u64, slots: usize) -> Result<()> {
        let Prepared { spec, layout, arena, .. } = &*self.run;
        if spec.case.operation != Operation::Read {
            return Ok(());
        }
        for (index, local, _) in layout.blocks().take(slots * spec.case.blocks) {
            if let Err(mismatch) = arena.check(local, layout.block_bytes, sequence, index) {
                bail!(
                    "verification failed: {}: block {index} in the initiator's memory: {mismatch}",
                    spec.case.id()
                );
            }
        }
        Ok(())
    }

    fn plan(&self, operations: u64, until_ns: Option<u64>, sequence: u64) -> Pass {
        let Prepared { spec, layout, arena, .. } = &*self.run;
        let last_word = |slot: &crate::layout::Slot| {
            let offset = layout.block_bytes as u64;
            let (local, remote) = (*slot.local.last()? + offset, *slot.remote.last()? + offset);
            Some((remote.checked_sub(8)?, arena.load_word(local.checked_sub(8)?)?))
        };
        let last_words = match spec.case.operation {
            Operation::WriteNotify => layout.slots.iter().filter_map(last_word).collect(),
            _ => Vec::new(),
        };
        Pass {
            operation: spec.case.operation,
            slots: layout.slots.len(),
            window: spec.case.window,
            operations,
            until_ns,
            rate: spec.rate,
            sequence,
            notification_bytes: spec.case.notification_bytes,
            last_words,
            first_notification: self.notifications,
            phase: self.phase,
        }
    }

    fn run_in_session(&mut self, pass: Pass) -> Result<PassOutcome> {
        let sabotage = self.run.spec.sabotage;
        match &mut self.run.session {
            Session::Engine(session) => {
                let recorder = std::mem::replace(&mut self.recorder, Recorder::new(false));
                let (outcome, recorder) = session.run(pass, recorder, sabotage)?;
                self.recorder = recorder;
                Ok(outcome)
            }
            Session::RawTcp(raw) => run_raw(raw.as_mut(), &pass, &mut self.recorder, sabotage),
            Session::RawLocal(raw) => run_raw(raw.as_mut(), &pass, &mut self.recorder, sabotage),
        }
    }
}

/// Runs a pass of a baseline, on this thread.
fn run_raw(
    raw: &mut impl Initiator,
    pass: &Pass,
    recorder: &mut Recorder,
    sabotage: Option<Sabotage>,
) -> Result<PassOutcome> {
    let mut raw = Sabotaged::new(raw, sabotage, pass);
    let outcome = complete_now(run_pass(&mut raw, pass, recorder))?;
    ensure!(raw.is_drained(), "a pass left transfers behind");
    Ok(outcome)
}
