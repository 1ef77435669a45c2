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

    /// The session has ended: its process begins no copy any more.
    pub(crate) fn leave(&self) {
        self.uses.close();
        self.process.set_disconnected();
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
        // Those that are gone for good make room: of a session that was left, when none of its copies is in progress. Its channel was
        // closed before that is looked at, so that no thread of its process, which may live, begins one later.
        all.retain(|known| {
            let over = || known.uses.in_progress(None).is_empty() || known.process.is_gone();
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

    /// The copies that are in progress now, of the region in one place of the table or of all. What it was that they must not touch
    /// any more has been taken out of the table before.
    pub(crate) fn in_progress(&self, region: Option<u32>) -> InProgress {
        let all = self.lock();
        let copies =
            all.iter().map(|accessor| (accessor.clone(), accessor.uses.in_progress(region)));
        InProgress(copies.filter(|(_, copies)| !copies.is_empty()).collect())
    }

    /// Waits until every copy that is in progress now, of one region or of all, has ended, or its process has; false: not in time.
    pub(crate) fn wait_until_quiet(&self, region: Option<u32>, deadline: Instant) -> bool {
        let mut waiting = self.in_progress(region);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::local::{create_channel, open_channel};

    /// An accessor of this process, as the target has it, and the initiator's side.
    fn accessor() -> (Arc<Accessor>, Uses) {
        let (producer, fd) = create_channel().unwrap();
        let consumer = open_channel(&*fd).unwrap();
        let process = PeerProcess::new(None, None, None, true);
        (Arc::new(Accessor::new(Some(Pid::own()), consumer.uses(), process)), producer.uses())
    }

    fn now() -> Instant {
        Instant::now()
    }

    /// A thread of a session that was left may hold the way to our memory and begin a copy long after: it must not, where
    /// nobody would wait for it.
    #[test]
    fn nobody_begins_a_copy_in_a_session_that_is_not_watched_any_more() {
        let accessors = Accessors::default();
        let (first, theirs) = accessor();
        assert!(accessors.add(first.clone()));
        assert!(!theirs.is_closed());
        first.leave();
        assert!(accessors.add(accessor().0));
        let late = theirs.begin(3);
        assert!(late.is_some());
        let seen = !accessors.wait_until_quiet(Some(3), now());
        assert!(seen || theirs.is_closed(), "it copies, and nobody waits for it");
    }

    #[test]
    fn a_copy_that_began_before_its_session_was_left_is_waited_for() {
        let accessors = Accessors::default();
        let (first, theirs) = accessor();
        assert!(accessors.add(first.clone()));
        let copy = theirs.begin(3).unwrap();
        first.leave();
        assert!(accessors.add(accessor().0));
        assert!(!accessors.wait_until_quiet(Some(3), now()));
        assert!(!accessors.wait_until_quiet(None, now()));
        assert!(accessors.wait_until_quiet(Some(4), now()), "it is of another region");
        drop(copy);
        assert!(accessors.wait_until_quiet(Some(3), now()));
    }
}
