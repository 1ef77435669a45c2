//! The engine: lanes, memory, peers.

mod accept;
mod connect;
mod equipment;
mod gpu;
mod issued;
mod lane;
mod links;
mod local;
mod memory;
mod notifications;
mod peers;
mod plans;
#[cfg(feature = "rdma")]
mod rdma;
#[cfg(not(feature = "rdma"))]
#[path = "no_rdma.rs"]
mod rdma;
mod shared;
mod staging;
mod start;
mod strays;

pub(crate) use lane::{LaneDriver, Message};
pub(crate) use shared::EngineShared;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use corelane_runtime::{Lane, LaneTask, LocalLane};

use self::shared::{shutdown, watch_forks};

use crate::config::{EngineConfig, MAX_AGENT_NAME};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::peer::{Peer, PeerShared};
use crate::stats::{EngineStats, PeerStats, Totals};

/// A task that runs on a lane; await it, or `wait()` from an ordinary thread.
pub type Task<T> = LaneTask<T>;

/// Shuts the engine down when the last handle is dropped.
#[derive(Debug)]
struct Guard(Arc<EngineShared>);

impl Drop for Guard {
    fn drop(&mut self) {
        // Dropping cannot report; `shutdown` can.
        let _ = shutdown(&self.0);
    }
}

/// A transfer engine. Cheap to clone; any thread may call anything.
///
/// The last handle that is dropped shuts it down, like [`shutdown`](Self::shutdown).
#[derive(Clone, Debug)]
pub struct Engine {
    shared: Arc<EngineShared>,
    _guard: Arc<Guard>,
}

impl Engine {
    /// Starts an engine: its lanes and its listener. Takes some milliseconds.
    ///
    /// `agent_name` is what peers see as the sender of notifications; 1..=1024 bytes.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Lane`] (`io_uring` forbidden, core outside the affinity mask, ...),
    /// [`Error::Io`] (port in use, ...). Nothing is left behind.
    pub fn new(agent_name: &str, config: EngineConfig) -> Result<Self> {
        config.validate(agent_name)?;
        watch_forks();
        debug_assert!(agent_name.len() <= MAX_AGENT_NAME);
        let shared = start::start(agent_name, config)?;
        Ok(Self { _guard: Arc::new(Guard(shared.clone())), shared })
    }

    /// The name given at creation.
    pub fn agent_name(&self) -> &str {
        &self.shared.name
    }

    /// What a peer needs to connect: name, addresses, secret. The same bytes on every call. Who
    /// holds them can connect: exchange them over a channel that you trust.
    pub fn metadata(&self) -> Vec<u8> {
        self.shared.metadata.get().cloned().unwrap_or_default()
    }

    /// Whether the engine can be used: it runs, and belongs to this process. Two loads, no lock.
    ///
    /// # Errors
    /// [`Error::Shutdown`]; [`Error::Backend`] after a lane has failed.
    pub fn check_usable(&self) -> Result<()> {
        self.shared.check()
    }

    /// Runs a task on the lane that owns `peer`: no thread is crossed on the way to its sockets.
    /// Transfers are posted as anywhere else and awaited with
    /// [`Transfer::completed`](crate::Transfer::completed).
    ///
    /// # Errors
    /// [`Error::Shutdown`].
    pub fn spawn_on<F, Fut, T>(&self, peer: &Peer, task: F) -> Result<Task<T>>
    where
        F: FnOnce(LocalEngine) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        self.shared.check()?;
        let lane = self.shared.lane(peer.shared.lane)?;
        Ok(lane.spawn(move |local| task(LocalEngine { local })))
    }

    /// Counters, queue levels and the state of every peer.
    pub fn stats(&self) -> EngineStats {
        let shared = &self.shared;
        let mut totals = Totals::default();
        for counters in &shared.counters {
            totals.add(counters);
        }
        totals.add_inline(&shared.inline);
        if shared.check_process().is_err() {
            // The parent's locks may be held for ever in this child.
            return EngineStats { totals, ..EngineStats::default() };
        }
        let peers = shared.peers().all().map(|peer| peer_stats(peer)).collect();
        EngineStats {
            totals,
            regions: shared.registry().len(),
            peers,
            pending_notifications: shared.notifications.len(),
            pending_notification_bytes: shared.notifications.bytes(),
            notifications_received: shared.notifications.delivered(),
            lanes: shared.lanes().iter().map(Lane::stats).collect(),
        }
    }

    /// The core of each lane; `None` for one that is not pinned.
    pub fn lane_cores(&self) -> Vec<Option<usize>> {
        self.shared.lanes().iter().map(Lane::core).collect()
    }

    /// Says goodbye to all peers (notifications are flushed for at most `linger`), ends all
    /// transfers, stops the lanes and joins their threads. Idempotent, bounded. On a lane's own
    /// thread it only asks for all that: there, memory must stay until the engine is dropped or
    /// shut down elsewhere.
    ///
    /// # Errors
    /// [`Error::Lane`] when a lane had failed or did not stop in time.
    pub fn shutdown(&self) -> Result<()> {
        shutdown(&self.shared)
    }

    fn submit(&self, lane: usize, message: Message) -> Result<()> {
        self.shared.lane(lane)?.submit(message).map_err(|_| self.shared.dead())
    }
}

fn peer_stats(peer: &PeerShared) -> PeerStats {
    let (unacknowledged, unacknowledged_bytes) = peer.unacknowledged();
    PeerStats {
        name: peer.name.to_string(),
        connected: peer.connected.load(Ordering::Acquire),
        transport: peer.transport(),
        lane: peer.lane,
        in_flight: peer.in_flight(),
        unacknowledged,
        unacknowledged_bytes,
        last_error: peer.last_error(),
    }
}

/// An engine as seen by a task on one of its lanes.
#[derive(Clone)]
pub struct LocalEngine {
    local: LocalLane<LaneDriver>,
}

impl LocalEngine {
    /// Sleeps without stopping the lane.
    pub async fn sleep(&self, duration: Duration) {
        self.local.sleep(duration).await;
    }

    /// Lets the lane and its other tasks run.
    pub async fn yield_now(&self) {
        self.local.yield_now().await;
    }
}
