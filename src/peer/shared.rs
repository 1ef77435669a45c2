//! What callers and a lane know of a peer together.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

use super::history::History;
use crate::config::{Limits, TransportKind};
use crate::error::{Error, Result};
use crate::transport::local::LocalPath;
use crate::wire::Metadata;

/// A peer has no place on its lane yet.
pub(crate) const NO_SLOT: u32 = u32::MAX;

/// While a peer cannot be reached, it takes one notification in this time.
const ATTEMPT_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Unreachable {
    error: Error,
    until: Until,
}

/// How long a peer takes no notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// A while after an attempt to connect has failed, or was last made.
    Tried(Instant),
    /// It connects by itself, or is loaded: only then is there anything to connect to.
    Back,
    /// For good.
    Never,
}

/// One incarnation of a remote engine.
#[derive(Debug)]
pub(crate) struct PeerShared {
    pub(crate) name: Arc<str>,
    pub(crate) incarnation: u128,
    /// The lane that owns all of this peer's links.
    pub(crate) lane: usize,
    /// Where the lane keeps the peer; set once by the lane.
    pub(crate) slot: AtomicU32,
    /// Known once the application has loaded it; a peer that only connected to us has none.
    metadata: Mutex<Option<Arc<Metadata>>>,
    pub(crate) connected: AtomicBool,
    /// It is known which way transfers go over the session that is up.
    pub(crate) settled: AtomicBool,
    /// They go by RDMA.
    pub(crate) wired: AtomicBool,
    /// Both sides allow them to go as frames over a socket.
    pub(crate) framed: AtomicBool,
    /// The application has loaded other metadata under this name.
    replaced: AtomicBool,
    in_flight: AtomicUsize,
    unacknowledged: AtomicUsize,
    unacknowledged_bytes: AtomicUsize,
    last_error: Mutex<Option<String>>,
    /// The last attempt to connect has failed, and no link came up since.
    is_unreachable: AtomicBool,
    unreachable: Mutex<Option<Unreachable>>,
    /// The application has been told that it connected by itself.
    announced: AtomicBool,
    /// The way to the peer's memory, where callers' threads may copy by themselves.
    path: ArcSwapOption<LocalPath>,
    /// The application is done with this peer: no `path` any more.
    closed: AtomicBool,
    pub(crate) history: History,
    max_in_flight: usize,
    max_unacknowledged: usize,
    max_unacknowledged_bytes: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PeerShared {
    pub(crate) fn new(
        name: Arc<str>,
        incarnation: u128,
        lane: usize,
        metadata: Option<Arc<Metadata>>,
        limits: &Limits,
    ) -> Self {
        Self {
            name,
            incarnation,
            lane,
            slot: AtomicU32::new(NO_SLOT),
            metadata: Mutex::new(metadata),
            connected: AtomicBool::new(false),
            settled: AtomicBool::new(false),
            wired: AtomicBool::new(false),
            framed: AtomicBool::new(true),
            replaced: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            unacknowledged: AtomicUsize::new(0),
            unacknowledged_bytes: AtomicUsize::new(0),
            last_error: Mutex::new(None),
            is_unreachable: AtomicBool::new(false),
            unreachable: Mutex::new(None),
            announced: AtomicBool::new(false),
            path: ArcSwapOption::empty(),
            closed: AtomicBool::new(false),
            history: History::default(),
            max_in_flight: limits.transfers,
            max_unacknowledged: limits.unacknowledged_notifications,
            max_unacknowledged_bytes: limits.unacknowledged_bytes,
        }
    }

    pub(crate) fn metadata(&self) -> Option<Arc<Metadata>> {
        lock(&self.metadata).clone()
    }

    pub(crate) fn set_metadata(&self, metadata: Arc<Metadata>) {
        *lock(&self.metadata) = Some(metadata);
    }

    pub(crate) fn is_loaded(&self) -> bool {
        lock(&self.metadata).is_some()
    }

    /// The name now belongs to another incarnation: this one can be connected to no more.
    pub(crate) fn replace(&self) {
        *lock(&self.metadata) = None;
        self.replaced.store(true, Ordering::Relaxed);
        self.close();
    }

    /// The way to the peer's memory, if callers' threads may copy by themselves. One load where there is none.
    #[inline]
    pub(crate) fn path(&self) -> arc_swap::Guard<Option<Arc<LocalPath>>> {
        self.path.load()
    }

    /// Sets or takes the way away; the lane.
    pub(crate) fn set_path(&self, path: Option<Arc<LocalPath>>) {
        self.path.store(path);
        if self.closed.load(Ordering::SeqCst) {
            self.path.store(None);
        }
    }

    /// Takes the way away for good. What was begun by then goes on.
    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.path.store(None);
    }

    /// Which way transfers go now.
    pub(crate) fn transport(&self) -> Option<TransportKind> {
        // First: the way is set before it is said to be settled, so that who sees this sees that.
        let settled =
            self.connected.load(Ordering::Acquire) && self.settled.load(Ordering::Acquire);
        if self.path().as_ref().is_some_and(|path| path.reaches_all()) {
            return Some(TransportKind::Local);
        }
        if settled && self.wired.load(Ordering::Acquire) {
            return Some(TransportKind::Rdma);
        }
        (settled && self.framed.load(Ordering::Relaxed)).then_some(TransportKind::Tcp)
    }

    /// Marks the peer as announced; false: it was.
    pub(crate) fn announce(&self) -> bool {
        !self.announced.swap(true, Ordering::AcqRel)
    }

    /// Why a peer that its lane has forgotten takes nothing.
    pub(crate) fn unloaded(&self) -> Error {
        if self.replaced.load(Ordering::Relaxed) {
            return self.over();
        }
        let unreachable = lock(&self.unreachable);
        let last = unreachable.as_ref().filter(|known| known.until == Until::Never);
        last.map_or(Error::Cancelled, |known| known.error.clone())
    }

    pub(crate) fn set_last_error(&self, error: Option<String>) {
        *lock(&self.last_error) = error;
    }

    pub(crate) fn last_error(&self) -> Option<String> {
        lock(&self.last_error).clone()
    }

    /// An attempt to connect has failed, or a link is up.
    pub(crate) fn set_unreachable(&self, failure: Option<Error>) {
        let mut unreachable = lock(&self.unreachable);
        if unreachable.as_ref().is_some_and(|known| known.until == Until::Never) {
            return;
        }
        self.is_unreachable.store(failure.is_some(), Ordering::Release);
        *unreachable =
            failure.map(|error| Unreachable { error, until: Until::Tried(Instant::now()) });
    }

    /// The session is over, and nothing is known by which to begin another: it takes nothing until it comes back.
    pub(crate) fn set_away(&self) {
        let mut unreachable = lock(&self.unreachable);
        // Whoever loads it meanwhile sets the metadata before this is taken back.
        let known = unreachable.as_ref().is_some_and(|known| known.until == Until::Never);
        if known || self.is_loaded() {
            return;
        }
        self.is_unreachable.store(true, Ordering::Release);
        *unreachable = Some(Unreachable { error: self.over(), until: Until::Back });
    }

    /// Its lane has forgotten the peer: who still has a handle to it sends nothing by it any more.
    pub(crate) fn set_forgotten(&self) {
        self.refuse_for_good(self.over());
    }

    /// The peer is unloaded: it takes nothing any more.
    pub(crate) fn set_unloaded(&self) {
        self.refuse_for_good(Error::Cancelled);
        self.close();
    }

    /// The first reason counts.
    fn refuse_for_good(&self, error: Error) {
        let mut unreachable = lock(&self.unreachable);
        if unreachable.as_ref().is_some_and(|known| known.until == Until::Never) {
            return;
        }
        self.is_unreachable.store(true, Ordering::Release);
        *unreachable = Some(Unreachable { error, until: Until::Never });
    }

    /// Why the peer takes no notification now: for a while after an attempt to connect has failed, then one is taken again, and with it
    /// an attempt is made; until it comes back, where only it can connect; for good, once it is unloaded or forgotten. One load
    /// while it can be reached.
    pub(crate) fn unreachable(&self) -> Option<Error> {
        if !self.is_unreachable.load(Ordering::Acquire) {
            return None;
        }
        let mut unreachable = lock(&self.unreachable);
        let known = unreachable.as_mut()?;
        match &mut known.until {
            Until::Tried(at) if at.elapsed() >= ATTEMPT_PAUSE => {
                *at = Instant::now();
                None
            }
            Until::Tried(_) | Until::Back | Until::Never => Some(known.error.clone()),
        }
    }

    /// As `unreachable`, without what takes a clock.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn refuses(&self) -> Option<Error> {
        let unreachable = lock(&self.unreachable);
        let known = unreachable.as_ref()?;
        (!matches!(known.until, Until::Tried(_))).then(|| known.error.clone())
    }

    /// Why there is no session any more, and none to come from this side.
    fn over(&self) -> Error {
        if self.replaced.load(Ordering::Relaxed) {
            self.gone("other metadata was loaded under its name")
        } else {
            self.away()
        }
    }

    /// What is said of a peer that connected to us, and whose session is over.
    pub(crate) fn away(&self) -> Error {
        self.gone("it connected to us and is gone; load its metadata to be able to connect to it")
    }

    /// Takes a place for a transfer; false: the limit is reached, yield and try again.
    pub(crate) fn try_enter(&self) -> bool {
        let before = self.in_flight.fetch_add(1, Ordering::AcqRel);
        if before >= self.max_in_flight {
            self.in_flight.fetch_sub(1, Ordering::AcqRel);
            return false;
        }
        true
    }

    pub(crate) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Reserves room for one notification in the resend buffer. An empty buffer takes any size.
    ///
    /// # Errors
    /// [`Error::Backpressure`]: the peer has not acknowledged enough.
    pub(crate) fn reserve(&self, bytes: usize) -> Result<()> {
        let count = self.unacknowledged.fetch_add(1, Ordering::AcqRel);
        let held = self.unacknowledged_bytes.fetch_add(bytes, Ordering::AcqRel);
        let over_bytes = held.saturating_add(bytes) > self.max_unacknowledged_bytes;
        let full = count >= self.max_unacknowledged || (over_bytes && count > 0);
        if full && !mutated!(BudgetNotChecked) {
            self.release(1, bytes);
            return Err(Error::Backpressure {
                what: "the notification buffer",
                peer: self.name.clone(),
                limit: format!(
                    "{} notifications or {} bytes",
                    self.max_unacknowledged, self.max_unacknowledged_bytes
                ),
            });
        }
        Ok(())
    }

    pub(crate) fn release(&self, count: usize, bytes: usize) {
        self.unacknowledged.fetch_sub(count, Ordering::AcqRel);
        self.unacknowledged_bytes.fetch_sub(bytes, Ordering::AcqRel);
    }

    pub(crate) fn unacknowledged(&self) -> (usize, usize) {
        (
            self.unacknowledged.load(Ordering::Acquire),
            self.unacknowledged_bytes.load(Ordering::Acquire),
        )
    }

    pub(crate) fn gone(&self, reason: impl Into<String>) -> Error {
        Error::RemoteDisconnect { peer: self.name.clone(), reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_gone(error: Option<&Error>) -> bool {
        matches!(error, Some(Error::RemoteDisconnect { .. }))
    }

    #[test]
    fn who_can_only_come_back_by_itself_refuses_until_then() {
        let peer = PeerShared::new("p".into(), 1, 0, None, &Limits::default());
        assert!(peer.unreachable().is_none());
        peer.set_away();
        for _ in 0..3 {
            assert!(is_gone(peer.unreachable().as_ref()));
        }
        peer.set_unreachable(None);
        assert!(peer.unreachable().is_none(), "it is back");
        // Loaded by another thread while its lane says that it is away.
        let metadata = Metadata {
            name: "p".into(),
            incarnation: 1,
            secret: [1; 32],
            transports: 1,
            addresses: vec![],
        };
        peer.set_metadata(Arc::new(metadata));
        peer.set_away();
        assert!(peer.unreachable().is_none(), "it can be connected to");
    }

    #[test]
    fn who_is_forgotten_refuses_for_good_and_says_why() {
        let new = || PeerShared::new("p".into(), 1, 0, None, &Limits::default());
        let peer = new();
        peer.set_forgotten();
        peer.set_unreachable(None);
        assert!(is_gone(peer.unreachable().as_ref()) && is_gone(Some(&peer.unloaded())));
        let peer = new();
        peer.set_unloaded();
        peer.set_forgotten();
        assert!(matches!(peer.unreachable(), Some(Error::Cancelled)), "the first reason");
        assert!(matches!(peer.unloaded(), Error::Cancelled));
    }

    #[test]
    fn the_resend_budget_is_bounded_in_count_and_bytes() {
        let limits = Limits {
            unacknowledged_notifications: 2,
            unacknowledged_bytes: 100,
            transfers: 1,
            ..Limits::default()
        };
        let peer = PeerShared::new("p".into(), 1, 0, None, &limits);
        peer.reserve(500).unwrap();
        assert!(matches!(peer.reserve(1), Err(Error::Backpressure { .. })));
        peer.release(1, 500);
        peer.reserve(50).unwrap();
        peer.reserve(50).unwrap();
        assert!(peer.reserve(0).is_err());
        assert_eq!(peer.unacknowledged(), (2, 100));
        assert!(peer.try_enter() && !peer.try_enter());
        peer.leave();
        assert!(peer.try_enter());
    }
}
