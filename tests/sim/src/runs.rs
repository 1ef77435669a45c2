//! Runs of seeds.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use corelane::sim::Mutation;
use corelane::sim::coverage::{self, Coverage};

use crate::promise::Violation;
use crate::world::World;

/// What a run came to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    pub(crate) violation: Option<Violation>,
    pub(crate) steps: u64,
    pub(crate) transfers: u64,
    pub(crate) done: u64,
    pub(crate) notes: u64,
    pub(crate) seen: u64,
    pub(crate) engines: u64,
    pub(crate) crashes: u64,
    pub(crate) bytes: u64,
    pub(crate) virtual_ms: u64,
}

impl Outcome {
    pub(crate) fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.transfers += other.transfers;
        self.done += other.done;
        self.notes += other.notes;
        self.seen += other.seen;
        self.engines += other.engines;
        self.crashes += other.crashes;
        self.bytes += other.bytes;
        self.virtual_ms += other.virtual_ms;
    }
}

/// One run.
pub(crate) fn run(
    seed: u64,
    mutation: Option<Mutation>,
    engines: Option<usize>,
    trace: bool,
) -> Outcome {
    Mutation::activate(mutation);
    corelane::sim::take_double_ends();
    let mut world = World::new(seed, engines, trace);
    let start = world.now;
    world.run();
    let posted = world.model.transfers.iter();
    let (begun, done) = posted.fold((0, 0), |(begun, done), transfer| {
        (begun + transfer.handle.begun_and_ended().0, done + u64::from(transfer.done))
    });
    Mutation::activate(None);
    Outcome {
        steps: world.steps,
        transfers: begun,
        done,
        notes: world.model.notes.len() as u64,
        seen: world.notes_seen,
        engines: world.engines.iter().map(|engine| u64::from(engine.generation)).sum(),
        crashes: world.crashes,
        bytes: world.model.bytes_moved,
        virtual_ms: (world.now - start).as_millis() as u64,
        violation: world.model.violation.take(),
    }
}

/// Runs one seed again; true: it keeps every promise.
pub(crate) fn replay(
    seed: u64,
    mutation: Option<Mutation>,
    engines: Option<usize>,
    trace: bool,
) -> bool {
    let outcome = run(seed, mutation, engines, trace);
    match outcome.violation {
        None => {
            println!("seed {seed}: {} steps, every promise is kept", outcome.steps);
            true
        }
        Some(Violation { promise, text }) => {
            println!("seed {seed}: after {} steps, \"{}\": {text}", outcome.steps, promise.name());
            false
        }
    }
}

/// What many runs came to.
pub(crate) struct Many {
    pub(crate) total: Outcome,
    pub(crate) ran: u64,
    /// The lowest seed that broke a promise.
    pub(crate) first: Option<(u64, Violation)>,
    pub(crate) coverage: Coverage,
}

/// Runs seeds on some threads until one breaks a promise. The answer does not depend on the number of threads: of those that
/// do, it names the lowest.
pub(crate) fn many(
    from: u64,
    count: u64,
    jobs: usize,
    mutation: Option<Mutation>,
    engines: Option<usize>,
    progress: &(dyn Fn() + Sync),
) -> Many {
    let next = AtomicU64::new(from);
    let stop = AtomicBool::new(false);
    let many = Mutex::new(Many {
        total: Outcome::default(),
        ran: 0,
        first: None,
        coverage: Coverage::default(),
    });
    let work = || {
        coverage::take();
        let mut total = Outcome::default();
        let mut ran = 0;
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= from + count {
                break;
            }
            let outcome = run(seed, mutation, engines, false);
            progress();
            total.add(&outcome);
            ran += 1;
            if let Some(violation) = outcome.violation {
                stop.store(true, Ordering::Relaxed);
                let mut many = lock(&many);
                if many.first.as_ref().is_none_or(|(known, _)| seed < *known) {
                    many.first = Some((seed, violation));
                }
            }
        }
        let mut many = lock(&many);
        many.total.add(&total);
        many.ran += ran;
        many.coverage.add(&coverage::take());
    };
    std::thread::scope(|scope| {
        for _ in 1..jobs.max(1) {
            scope.spawn(work);
        }
        work();
    });
    many.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
