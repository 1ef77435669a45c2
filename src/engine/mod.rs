//! The engine: lanes, memory, peers.

mod accept;
mod connect;
mod lane;
mod links;
mod shared;
mod start;

pub(crate) use lane::{LaneDriver, Message};
pub(crate) use shared::EngineShared;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};

use corelane_runtime::{Lane, LaneTask, LocalLane};

use self::shared::{shutdown, watch_forks};

use crate::config::{EngineConfig, MAX_AGENT_NAME};
use crate::error::{Error, Result};
use crate::memory::{LocalSegment, Region, RemoteSegment};
use crate::notification::Notification;
use crate::peer::{Arrival, Loaded, Peer, PeerShared};
use crate::plan::{
    DescriptorPair, LocalBlocks, LocalList, Operation, PlanBuilder, PlanInner, RemoteBlocks,
    RemoteList,
};
use crate::stats::{EngineStats, PeerStats, Totals};
use crate::sync::{Patience, Ticket, deadline, sleep_until_woken};
use crate::sys;
use crate::transfer::Plan;
use crate::wire::{Access, MemoryKind, Metadata, RegionDescriptor, RegionKey};

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

    /// Registers memory: makes it usable in plans and, as far as `access` goes, by peers that get
    /// its descriptor. Costs a message to each lane; nothing is pinned or touched.
    ///
    /// Ranges may overlap and repeat.
    ///
    /// # Safety
    /// The memory must stay mapped, and must not be used through Rust references in ways that
    /// conflict with the transfers that the application and its peers start, until
    /// [`deregister`](Self::deregister) has returned `Ok` or the engine is shut down.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] (null, empty, wraps around), [`Error::Limit`], [`Error::Shutdown`].
    pub unsafe fn register(&self, ptr: *mut u8, len: usize, access: Access) -> Result<Region> {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.register_kind(ptr as u64, len as u64, MemoryKind::Dram, access) }
    }

    /// As [`register`](Self::register), for memory of any kind, by address.
    ///
    /// # Safety
    /// As for [`register`](Self::register).
    ///
    /// # Errors
    /// As for [`register`](Self::register).
    pub unsafe fn register_kind(
        &self,
        base: u64,
        len: u64,
        kind: MemoryKind,
        access: Access,
    ) -> Result<Region> {
        let shared = &self.shared;
        shared.check()?;
        if base == 0 || len == 0 || base.checked_add(len).is_none() || len > isize::MAX as u64 {
            return Err(Error::InvalidArgument(format!(
                "a region of {len} bytes at {base:#x} is null, empty or wraps around"
            )));
        }
        let random = sys::random::<12>().map_err(|e| Error::io("reading random bytes", e))?;
        let mut wide = [0; 16];
        wide[..12].copy_from_slice(&random);
        let random = u128::from_le_bytes(wide);
        let incarnation = shared.identity.incarnation;
        let region = shared.registry_mut().insert(|slot| RegionDescriptor {
            incarnation,
            key: RegionKey::new(slot, random),
            base,
            len,
            kind,
            access,
        })?;
        for lane in shared.lanes() {
            if lane.submit(Message::AddRegion(region.clone())).is_err() {
                let mut registry = shared.registry_mut();
                registry.close(&region);
                registry.remove(&region);
                return Err(shared.dead());
            }
        }
        Ok(Region { inner: region })
    }

    /// Takes a registration back. When it returns `Ok`, nothing of this engine or of a peer touches
    /// the memory any more, and descriptors of it are refused.
    ///
    /// # Errors
    /// [`Error::Busy`] when accesses in progress did not end within
    /// [`deregister_timeout`](EngineConfig::deregister_timeout): the region is kept, try again.
    /// [`Error::InvalidArgument`] when it is not registered here (any more).
    pub fn deregister(&self, region: &Region) -> Result<()> {
        let shared = &self.shared;
        shared.check_process()?;
        shared.check_may_wait("deregister")?;
        if !shared.registry_mut().close(&region.inner) {
            return Err(Error::InvalidArgument(format!(
                "{region:?} is not registered with this engine (any more)"
            )));
        }
        let deadline = deadline(shared.config.deregister_timeout);
        let tickets: Vec<Arc<Ticket<()>>> = shared.lanes().iter().map(|_| Ticket::new()).collect();
        for (lane, ticket) in shared.lanes().iter().zip(&tickets) {
            let message = Message::CloseRegion(region.inner.clone(), ticket.clone());
            if lane.submit(message).is_err() {
                // A lane that is gone touches nothing.
                ticket.complete(());
            }
        }
        let quiet = shared.lanes().iter().zip(&tickets).all(|(lane, ticket)| {
            let assist = || {
                lane.assist();
            };
            ticket.wait(deadline, assist).is_some() || !lane.is_alive()
        });
        if quiet {
            shared.registry_mut().remove(&region.inner);
            return Ok(());
        }
        for lane in shared.lanes() {
            let _ = lane.submit(Message::ReopenRegion(region.inner.clone()));
        }
        shared.registry_mut().reopen(&region.inner);
        Err(Error::Busy {
            what: "the region",
            hint: "; transfers or peers still use it: wait for them, cancel them, or try again",
        })
    }

    /// A region of this engine that holds all of `len` bytes at `addr`, if one is registered. With
    /// several, the one that starts last.
    pub fn region_at(&self, addr: u64, len: u64) -> Option<Region> {
        self.shared.check_process().ok()?;
        let inner = self.shared.registry().find(addr, len)?.clone();
        Some(Region { inner })
    }

    /// Waits for a peer that connects by itself, and that was not returned here before. Never
    /// needed: such peers are served, and their notifications arrive, whether or not anybody asks.
    ///
    /// # Errors
    /// [`Error::Timeout`]; [`Error::Cancelled`] once [`stop_accepting`](Self::stop_accepting) was
    /// called and nobody is left to return; [`Error::Shutdown`].
    pub fn accept(&self, timeout: Duration) -> Result<Peer> {
        let shared = &self.shared;
        shared.check()?;
        shared.check_may_wait("accept")?;
        let deadline = deadline(timeout);
        loop {
            match shared.arrivals.take() {
                Arrival::Peer(peer) => return Ok(Peer { shared: peer, engine: shared.clone() }),
                Arrival::None => {}
                Arrival::Closed => {
                    shared.check()?;
                    return Err(Error::Cancelled);
                }
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Error::Timeout {
                    what: "waiting for a peer",
                    peer: shared.name.clone(),
                    after: timeout,
                });
            }
            shared.wake_lanes();
            sleep_until_woken(deadline - now, |waker| shared.arrivals.register(waker));
            shared.check()?;
        }
    }

    /// Refuses peers that are not known yet, and ends [`accept`](Self::accept). Peers that are
    /// known go on, and may connect again.
    ///
    /// # Errors
    /// [`Error::Shutdown`].
    pub fn stop_accepting(&self) -> Result<()> {
        self.shared.check()?;
        self.shared.arrivals.set_open(false);
        Ok(())
    }

    /// Accepts new peers again; an engine does from its creation.
    ///
    /// # Errors
    /// [`Error::Shutdown`].
    pub fn start_accepting(&self) -> Result<()> {
        self.shared.check()?;
        self.shared.arrivals.set_open(true);
        Ok(())
    }

    /// Makes a peer known by its metadata. Cheap: nothing is connected. Loading the same metadata
    /// again gives the same peer; other metadata under a known name replaces it: the session with
    /// the engine that had the name before ends, and its transfers in [`Error::RemoteDisconnect`].
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Limit`], [`Error::Config`] when no transport is shared.
    pub fn load_peer(&self, metadata: &[u8]) -> Result<Peer> {
        self.load(Metadata::decode(metadata)?)
    }

    /// As [`load_peer`](Self::load_peer), for an application that knows the peer by a name of its
    /// own: nothing is loaded when the metadata belongs to another.
    ///
    /// # Errors
    /// Those of `load_peer`; [`Error::InvalidArgument`] for metadata of another agent.
    pub fn load_peer_as(&self, name: &str, metadata: &[u8]) -> Result<Peer> {
        let metadata = Metadata::decode(metadata)?;
        if metadata.name != name {
            return Err(Error::InvalidArgument(format!(
                "this is the metadata of `{}` and not of `{name}`",
                metadata.name
            )));
        }
        self.load(metadata)
    }

    fn load(&self, metadata: Metadata) -> Result<Peer> {
        let shared = &self.shared;
        shared.check()?;
        if metadata.transports & shared.identity.transports == 0 {
            return Err(Error::Config(format!(
                "`{}` offers no transport that is allowed here; compare `transports` on both sides",
                metadata.name
            )));
        }
        let Loaded { peer, replaced, .. } = shared.peers().load(metadata)?;
        // Also when another thread was first: its message may not have been sent yet.
        self.submit(peer.lane, Message::AddPeer(peer.clone()))?;
        if let Some(old) = replaced {
            self.submit(old.lane, Message::Retire(old))?;
        }
        Ok(Peer { shared: peer, engine: shared.clone() })
    }

    /// The peer that was loaded under this name.
    pub fn peer(&self, name: &str) -> Option<Peer> {
        self.shared.check_process().ok()?;
        let shared = self.shared.peers().named(name).cloned()?;
        Some(Peer { shared, engine: self.shared.clone() })
    }

    /// Disconnects a peer (see [`Peer::disconnect`]) and forgets it. Its plans can be posted no
    /// more: their transfers end in [`Error::Cancelled`].
    ///
    /// # Errors
    /// Those of [`Peer::disconnect`]. The peer is forgotten all the same.
    pub fn unload_peer(&self, peer: &Peer) -> Result<usize> {
        let limit = self.shared.config.linger + Duration::from_secs(2);
        let dropped = self.unload_peer_within(peer, limit)?;
        if dropped.is_none() {
            self.submit(peer.shared.lane, Message::RemovePeer(peer.shared.clone()))?;
        }
        dropped.ok_or_else(|| Error::Timeout {
            what: "disconnecting",
            peer: peer.shared.name.clone(),
            after: limit,
        })
    }

    /// As [`unload_peer`](Self::unload_peer), and waits for the flush of notifications during at
    /// most `patience`: `None` when it goes on by itself, for at most
    /// [`linger`](EngineConfig::linger). The peer is forgotten in any case: its name and its
    /// metadata may be loaded anew.
    ///
    /// # Errors
    /// [`Error::Shutdown`].
    pub fn unload_peer_within(&self, peer: &Peer, patience: Duration) -> Result<Option<usize>> {
        self.shared.check()?;
        self.shared.check_may_wait("unload_peer")?;
        self.shared.peers().remove(&peer.shared);
        peer.shared.set_unloaded();
        let ticket = Ticket::new();
        self.submit(peer.shared.lane, Message::Unload(peer.shared.clone(), ticket.clone()))?;
        let lane = self.shared.lane(peer.shared.lane)?;
        let assist = || {
            lane.assist();
        };
        Ok(ticket.wait(deadline(patience), assist))
    }

    /// Whether the engine can be used: it runs, and belongs to this process. Two loads, no lock.
    ///
    /// # Errors
    /// [`Error::Shutdown`]; [`Error::Backend`] after a lane has failed.
    pub fn check_usable(&self) -> Result<()> {
        self.shared.check()
    }

    /// Prepares a transfer of `local[i]` from or to `remote[i]`, for every `i`. All checks, merging
    /// and splitting happen here, once; some tens of nanoseconds a descriptor.
    ///
    /// Starts connecting if need be, without waiting.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], [`Error::NotRegistered`], [`Error::OutOfBounds`],
    /// [`Error::Permission`], [`Error::StaleDescriptor`], [`Error::Limit`].
    pub fn prepare(
        &self,
        operation: Operation,
        peer: &Peer,
        local: &[LocalSegment],
        remote: &[RemoteSegment<'_>],
    ) -> Result<Plan> {
        self.build(operation, peer, local, remote)
    }

    /// As [`prepare`](Self::prepare), for lists of blocks.
    ///
    /// # Errors
    /// As for [`prepare`](Self::prepare).
    pub fn prepare_blocks(
        &self,
        operation: Operation,
        peer: &Peer,
        local: &LocalBlocks<'_>,
        remote: &RemoteBlocks<'_>,
    ) -> Result<Plan> {
        local.check()?;
        remote.check()?;
        self.build(operation, peer, local, remote)
    }

    /// As [`prepare`](Self::prepare), for `count` pairs that are asked for one after the other, so
    /// that no lists have to be made. `pair` may refuse with an error, which is returned.
    ///
    /// # Errors
    /// As for [`prepare`](Self::prepare).
    pub fn prepare_pairs<'d>(
        &self,
        operation: Operation,
        peer: &Peer,
        count: usize,
        pair: impl FnMut(usize) -> Result<DescriptorPair<'d>>,
    ) -> Result<Plan> {
        self.build_with(operation, peer, |builder| builder.build_pairs(count, pair))
    }

    fn build<'d>(
        &self,
        operation: Operation,
        peer: &Peer,
        local: &(impl LocalList + ?Sized),
        remote: &(impl RemoteList<'d> + ?Sized),
    ) -> Result<Plan> {
        self.build_with(operation, peer, |builder| builder.build(local, remote))
    }

    fn build_with(
        &self,
        operation: Operation,
        peer: &Peer,
        build: impl FnOnce(&PlanBuilder<'_>) -> Result<PlanInner>,
    ) -> Result<Plan> {
        let shared = &self.shared;
        shared.check()?;
        if !Arc::ptr_eq(&peer.engine, shared) {
            return Err(Error::InvalidArgument("the peer belongs to another engine".into()));
        }
        let registry = shared.registry();
        let builder = PlanBuilder {
            operation,
            peer: &peer.shared,
            registry: &registry,
            chunk_bytes: shared.config.chunk_bytes as u64,
            latency_bytes: shared.config.latency_bytes as u64,
            max_descriptors: shared.config.limits.descriptors,
        };
        let plan = Plan { inner: Arc::new(build(&builder)?), engine: shared.clone() };
        drop(registry);
        if !peer.is_connected() {
            let warm_up = Message::Connect(peer.shared.clone(), Ticket::new());
            self.submit(peer.shared.lane, warm_up)?;
        }
        Ok(plan)
    }

    /// All notifications that have arrived, oldest first per peer. Never blocks.
    ///
    /// # Errors
    /// [`Error::Shutdown`]; [`Error::Backend`] after a lane has failed.
    pub fn notifications(&self) -> Result<Vec<Notification>> {
        let mut all = Vec::new();
        self.take_notifications(|notification| all.push(notification))?;
        Ok(all)
    }

    /// As [`notifications`](Self::notifications), without a list. The answer is how many there were.
    /// Costs one load when there are none, and where cores are few a turn of the lanes.
    ///
    /// # Errors
    /// As for [`notifications`](Self::notifications).
    pub fn take_notifications(&self, mut take: impl FnMut(Notification)) -> Result<usize> {
        let shared = &self.shared;
        shared.check_process()?;
        let queue = &shared.notifications;
        if queue.is_empty() {
            shared.check()?;
            for lane in 0..shared.lanes().len() {
                shared.drive(lane);
            }
        }
        // What comes meanwhile is for the next call: a fast sender must not keep this one.
        let mut count = 0;
        for _ in 0..queue.len() {
            let Some(notification) = queue.pop() else { break };
            take(notification);
            count += 1;
        }
        self.drain_stalled();
        Ok(count)
    }

    /// Lets lanes try again that found the queue of notifications full.
    fn drain_stalled(&self) {
        if self.shared.notifications.take_stalled() {
            for lane in self.shared.lanes() {
                let _ = lane.submit(Message::Drain);
            }
        }
    }

    /// Resolves when there is a notification to take. Any number of tasks may wait, on lanes or
    /// elsewhere; all are woken and may find that another was faster.
    ///
    /// # Errors
    /// As for [`notifications`](Self::notifications).
    pub async fn notified(&self) -> Result<()> {
        std::future::poll_fn(|context| {
            if !self.shared.notifications.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if let Err(error) = self.shared.check() {
                return Poll::Ready(Err(error));
            }
            if !self.shared.notifications.register(context.waker()) {
                return Poll::Ready(Ok(()));
            }
            self.drain_stalled();
            self.shared.wake_lanes();
            Poll::Pending
        })
        .await
    }

    /// Takes all notifications; while there are none, waits for the first: polls for a millisecond
    /// and then sleeps. Empty after `timeout`.
    ///
    /// # Errors
    /// As for [`notifications`](Self::notifications).
    pub fn wait_notifications(&self, timeout: Duration) -> Result<Vec<Notification>> {
        let shared = &self.shared;
        shared.check_may_wait("wait_notifications")?;
        let deadline = deadline(timeout);
        let patience = Patience::new();
        loop {
            let all = self.notifications()?;
            let now = Instant::now();
            if !all.is_empty() || now >= deadline {
                return Ok(all);
            }
            if patience.is_over(now) {
                shared.wake_lanes();
                sleep_until_woken(deadline - now, |waker| shared.notifications.register(waker));
            }
        }
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
