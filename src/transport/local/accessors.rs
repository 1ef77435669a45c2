//! Who copies from and to this engine's memory, and when a region is left in peace.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::channel::Uses;
use super::cma::Pid;
use super::death::PeerProcess;

/// Sessions of one process that may have ended with copies in progress. Those of an engine end within microseconds.
const MAX_LEFT_BEHIND: usize = 16;

/// What a peer on this host does with our memory.
#[derive(Debug)]
pub(crate) struct Accessor {
    pid: Option<Pid>,
    uses: Uses,
    pub(crate) process: PeerProcess,
}

impl Accessor {
    pub(crate) fn new(pid: Option<Pid>, uses: Uses, process: PeerProcess) -> Self {
        Self { pid, uses, process }
    }

    /// Whether the process is known to be gone for good, and its engine with it. Threads of it may still be in a copy.
    pub(crate) fn has_ended(&self) -> bool {
        self.process.has_ended()
    }
}

/// All that have, or had, access.
#[derive(Debug, Default)]
pub(crate) struct Accessors(Mutex<Vec<Arc<Accessor>>>);

impl Accessors {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Accessor>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one. False: its process has left too many sessions with copies that never ended. Each of them is watched until the
    /// process ends, with a mapping and descriptors, which must not become more and more.
    pub(crate) fn add(&self, accessor: Arc<Accessor>) -> bool {
        let mut all = self.lock();
        // Those that are gone for good make room.
        all.retain(|known| {
            let over = || known.uses.in_progress().is_empty() || known.process.is_gone();
            !(known.process.is_disconnected() && over())
        });
        let left_behind =
            |known: &&Arc<Accessor>| known.process.is_disconnected() && known.pid == accessor.pid;
        if all.iter().filter(left_behind).count() >= MAX_LEFT_BEHIND {
            return false;
        }
        all.push(accessor);
        true
    }

    /// The copies that are in progress now. What it was that they must not touch any more has been taken out of the table before.
    pub(crate) fn in_progress(&self) -> InProgress {
        let all = self.lock();
        let copies = all.iter().map(|accessor| (accessor.clone(), accessor.uses.in_progress()));
        InProgress(copies.filter(|(_, copies)| !copies.is_empty()).collect())
    }

    /// Waits until every copy that is in progress now has ended, or its process has; false: not in time.
    pub(crate) fn wait_until_quiet(&self, deadline: Instant) -> bool {
        let mut waiting = self.in_progress();
        let began = Instant::now();
        loop {
            let now = Instant::now();
            // Asking the kernel whether a process lives is not for the first moments.
            let ask = now - began > Duration::from_millis(1);
            if waiting.are_over(ask) {
                return true;
            }
            if now >= deadline {
                return false;
            }
            if ask {
                std::thread::sleep(Duration::from_micros(200));
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// Copies that were in progress at some moment, and that have not been seen to end.
#[derive(Debug, Default)]
pub(crate) struct InProgress(Vec<(Arc<Accessor>, Copies)>);

/// Places of copies, and what stood there.
type Copies = Vec<(usize, u64)>;

impl InProgress {
    /// Whether all of them have ended; `ask`: those of a process that is gone have, too.
    pub(crate) fn are_over(&mut self, ask: bool) -> bool {
        self.0.retain_mut(|(accessor, copies)| {
            accessor.uses.still(copies);
            let gone = || accessor.process.is_gone() && !mutated!(DeadCopiersCount);
            !(copies.is_empty() || ask && gone())
        });
        self.0.is_empty() || mutated!(CopiesNotWaitedFor)
    }
}
