//! What lanes and callers of an engine share, and how it ends.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use corelane_runtime::{Assist, Lane, SubmitError};

use super::equipment::Given;
use super::{LaneDriver, Message};
use crate::config::{AssistMode, EngineConfig, TransportKind};
use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::memory::{RegionInner, Registry, close_all};
use crate::notification::NotificationQueue;
use crate::peer::{Arrivals, PeerShared, PeerTable};
use crate::session::handshake::Identity;
use crate::stats::{Counters, InlineCounters};
use crate::transfer::Issuer;
use crate::transport::local::{Accessors, Table};
use crate::transport::rdma::Rails;

/// Counts forks: an engine of another generation belongs to a parent process.
pub(super) static FORKS: AtomicU64 = AtomicU64::new(0);

pub(super) fn watch_forks() {
    extern "C" fn in_child() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    static WATCH: OnceLock<()> = OnceLock::new();
    WATCH.get_or_init(|| {
        // SAFETY: the handler does one atomic addition, which is safe in a forked child.
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    });
}

/// Incarnations whose memory is that of this process. Without a lock: a process that is forked while a thread holds one, which is not
/// there in the child, could make no engine any more.
static OWN_INCARNATIONS: ArcSwapOption<BTreeSet<u128>> = ArcSwapOption::const_empty();

/// Whether this engine was made here: by this process, or by the parent that it was forked from.
pub(super) fn is_of_this_process(incarnation: u128) -> bool {
    OWN_INCARNATIONS.load().as_ref().is_some_and(|known| known.contains(&incarnation))
}

pub(super) fn set_of_this_process(incarnation: u128) {
    change_own(|known| known.insert(incarnation));
}

fn change_own(change: impl Fn(&mut BTreeSet<u128>) -> bool) {
    OWN_INCARNATIONS.rcu(|known| {
        let mut known = known.as_deref().cloned().unwrap_or_default();
        change(&mut known);
        Some(Arc::new(known))
    });
}

impl Drop for EngineShared {
    fn drop(&mut self) {
        if self.check_process().is_ok() {
            change_own(|known| known.remove(&self.identity.incarnation));
        }
    }
}

pub(super) const RUNNING: u32 = 0;
const STOPPING: u32 = 1;
/// A lane has panicked.
const FAILED: u32 = 2;

/// All that lanes and callers share.
pub(crate) struct EngineShared {
    pub(crate) name: Arc<str>,
    pub(crate) config: EngineConfig,
    pub(crate) identity: Identity,
    pub(crate) notifications: NotificationQueue,
    pub(super) metadata: OnceLock<Vec<u8>>,
    pub(super) registry: RwLock<Registry>,
    pub(super) peers: Mutex<PeerTable>,
    pub(crate) arrivals: Arrivals,
    pub(super) lanes: OnceLock<Vec<Lane<LaneDriver>>>,
    pub(super) counters: Vec<Arc<Counters>>,
    /// What callers' threads have copied by themselves.
    pub(crate) inline: InlineCounters,
    /// By what callers begin copies of GPUs, for each GPU that it was asked for.
    pub(super) issuers: Mutex<Vec<Arc<Issuer>>>,
    /// What lanes have of GPUs.
    pub(super) given: Mutex<Vec<Given>>,
    /// The regions, for peers on this host; `None`: transport `local` is not allowed.
    pub(super) table: Option<Table>,
    pub(super) accessors: Accessors,
    /// The RDMA devices; none, where transport `rdma` is not allowed or not there.
    pub(crate) rails: Arc<Rails>,
    pub(super) forks: u64,
    pub(super) state: AtomicU32,
}

impl std::fmt::Debug for EngineShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("name", &self.name).finish_non_exhaustive()
    }
}

impl EngineShared {
    /// The engine belongs to this process.
    #[inline]
    pub(crate) fn check_process(&self) -> Result<()> {
        if self.forks == FORKS.load(Ordering::Relaxed) { Ok(()) } else { Err(Error::Shutdown) }
    }

    /// The engine works. Two loads.
    #[inline]
    pub(crate) fn check(&self) -> Result<()> {
        self.check_process()?;
        if self.state.load(Ordering::Relaxed) == RUNNING { Ok(()) } else { Err(self.dead()) }
    }

    /// The calling thread may wait: it is no lane of this engine.
    pub(crate) fn check_may_wait(&self, what: &str) -> Result<()> {
        if self.is_lane_thread() {
            return Err(Error::InvalidArgument(format!(
                "{what} would stop the lane that it is called on; use the async API there"
            )));
        }
        Ok(())
    }

    /// Whether the calling thread is one of this engine's lanes.
    pub(crate) fn is_lane_thread(&self) -> bool {
        self.lanes().iter().any(Lane::is_lane_thread)
    }

    /// By what callers begin copies of this GPU; `None`: they do not.
    pub(super) fn issuer(&self, device: &'static Device) -> Option<Arc<Issuer>> {
        if self.config.copied_by_callers().is_none() || self.config.assist == AssistMode::Never {
            // What is the lane's stays on the lane.
            return None;
        }
        let mut issuers = self.issuers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = issuers.iter().find(|issuer| issuer.is_for(device)) {
            return Some(known.clone());
        }
        match Issuer::new(device) {
            Ok(issuer) => {
                let issuer = Arc::new(issuer);
                issuers.push(issuer.clone());
                Some(issuer)
            }
            Err(error) => {
                tracing::debug!(%error, "no stream for callers: the lane begins all copies");
                None
            }
        }
    }

    /// Why a lane takes nothing any more.
    pub(crate) fn dead(&self) -> Error {
        let lanes = self.lanes.get().map_or(&[][..], Vec::as_slice);
        match lanes.iter().find_map(Lane::failure) {
            Some(message) => Error::Backend(format!("a lane has failed: {message}")),
            None => Error::Shutdown,
        }
    }

    pub(crate) fn lane(&self, index: usize) -> Result<&Lane<LaneDriver>> {
        self.lanes.get().and_then(|lanes| lanes.get(index)).ok_or(Error::Shutdown)
    }

    /// Gives a lane that needs it a turn of this thread. Not on the lane itself, which runs anyway.
    #[inline]
    pub(crate) fn drive(&self, index: usize) -> Assist {
        match self.lane(index) {
            Ok(lane) if !lane.is_lane_thread() => lane.assist(),
            _ => Assist::Busy,
        }
    }

    /// Gives a lane a message, and where nobody drives it a turn of this thread, in which it takes it.
    #[inline]
    pub(crate) fn hand_over(
        &self,
        index: usize,
        message: Message,
    ) -> std::result::Result<(), SubmitError<Message>> {
        match self.lane(index) {
            Ok(lane) => lane.hand_over(message),
            Err(_) => Err(SubmitError(message)),
        }
    }

    /// The calling thread stops driving lanes: those that stand by must take over.
    pub(crate) fn wake_lanes(&self) {
        for lane in self.lanes() {
            if !lane.is_lane_thread() {
                lane.wake();
            }
        }
    }

    pub(crate) fn lanes(&self) -> &[Lane<LaneDriver>] {
        self.lanes.get().map_or(&[], Vec::as_slice)
    }

    pub(crate) fn peers(&self) -> MutexGuard<'_, PeerTable> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether transfers to this peer may come to be copied by us: whether it is on this host, only
    /// connecting tells.
    pub(crate) fn may_be_local(&self, peer: &PeerShared) -> bool {
        let theirs = peer.metadata().map_or(u32::MAX, |metadata| metadata.transports);
        theirs & self.identity.transports & TransportKind::Local.bit() != 0
    }

    /// Whether transfers to this peer may come to be RDMA requests.
    pub(crate) fn may_be_rdma(&self, peer: &PeerShared) -> bool {
        let theirs = peer.metadata().map_or(u32::MAX, |metadata| metadata.transports);
        theirs & self.identity.transports & TransportKind::Rdma.bit() != 0
    }

    /// Whether transfers to this peer may go as frames over a socket.
    pub(crate) fn may_be_framed(&self, peer: &PeerShared) -> bool {
        let theirs = peer.metadata().map_or(u32::MAX, |metadata| metadata.transports);
        theirs & self.identity.transports & TransportKind::Tcp.bit() != 0
    }

    pub(crate) fn set_failed(&self) {
        let _ = self.state.compare_exchange(RUNNING, FAILED, Ordering::AcqRel, Ordering::Relaxed);
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.state.load(Ordering::Relaxed) != RUNNING
    }

    pub(super) fn registry_mut(&self) -> std::sync::RwLockWriteGuard<'_, Registry> {
        self.registry.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn registry(&self) -> std::sync::RwLockReadGuard<'_, Registry> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says goodbye to all peers and stops the lanes; see `Engine::shutdown`.
pub(super) fn shutdown(shared: &EngineShared) -> Result<()> {
    shared.check_process()?;
    let before = shared.state.swap(STOPPING, Ordering::AcqRel);
    // A lane leaves its peers for `linger`; the rest is for its thread to wind down.
    let deadline = shared.config.linger + Duration::from_secs(2);
    shared.notifications.wake_all();
    shared.arrivals.set_open(false);
    let lanes = shared.lanes();
    if let Some(table) = &shared.table {
        // Peers on this host find nothing here any more; what they are copying is waited for below.
        table.shut();
    }
    if before != STOPPING {
        for lane in lanes {
            // Lanes that are dead already need no telling.
            let _ = lane.submit(Message::Leave);
        }
    }
    // Whoever calls second waits as the first does: memory may be freed once this has returned.
    let mut outcome = Ok(());
    for lane in lanes {
        if let Err(error) = lane.stop(deadline) {
            outcome = Err(error.into());
        }
    }
    if outcome.is_ok() {
        // The lanes have destroyed their queue pairs, so that no peer is on the way to this memory.
        let regions: Vec<Arc<RegionInner>> = shared.registry().all().cloned().collect();
        for region in regions {
            region.registrations.give_back();
        }
    }
    if !wait_for_copies(shared) && outcome.is_ok() {
        let abandoned = shared.registry().all().any(|region| region.is_abandoned());
        let hint = if abandoned {
            "; a GPU does not end a copy that it began there: keep the memory, and start the process again"
        } else {
            "; a process of this host is stopped in the middle of a copy: keep the memory mapped"
        };
        outcome = Err(Error::Busy { what: "registered memory", hint });
    }
    outcome
}

/// Waits until no thread of this process, and no peer of this host, copies from or to our memory.
fn wait_for_copies(shared: &EngineShared) -> bool {
    let deadline = Instant::now() + shared.config.deregister_timeout;
    let regions: Vec<Arc<RegionInner>> = shared.registry().all().cloned().collect();
    // One that is never quiet does not keep the others from being.
    let quiet = close_all(&regions, deadline);
    shared.accessors.wait_until_quiet(None, deadline) && quiet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_was_forked_while_engines_came_and_went_may_have_its_own() {
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..2u128 {
                let over = &over;
                scope.spawn(move || {
                    // Numbers that no engine of another test has.
                    for number in (0..64).cycle().take_while(|_| !over.load(Ordering::Relaxed)) {
                        set_of_this_process(thread << 64 | number);
                        change_own(|known| known.remove(&(thread << 64 | number)));
                    }
                });
            }
            let mut ended = Vec::new();
            for round in 0..100 {
                // SAFETY: the child allocates, which the C library allows, looks at one static, and ends at once.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    // SAFETY: no pointers. One that hangs is ended by the signal.
                    unsafe { libc::alarm(60) };
                    let own = 7 << 64 | round;
                    set_of_this_process(own);
                    // SAFETY: nothing of the parent's is flushed or dropped.
                    unsafe { libc::_exit(i32::from(!is_of_this_process(own))) };
                }
                let mut status = 0;
                // SAFETY: `status` is ours to write to.
                let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
                // The child's own are not the parent's.
                ended.push(waited == child && status == 0 && !is_of_this_process(7 << 64 | round));
                if ended.last() == Some(&false) {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
            assert_eq!(ended, [true; 100], "a child hung, or lost its own");
        });
    }
}
