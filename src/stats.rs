//! Counters.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::TransportKind;
use crate::plan::Operation;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What one lane has done. Written only by whoever holds the lane's pump, so that counting
        /// costs a plain load and store; read by anybody.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        /// Totals of an engine since it was created; see the field's words for units.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Totals {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Totals {
            pub(crate) fn add(&mut self, counters: &Counters) {
                $(self.$name += counters.$name.get();)*
            }
        }
    };
}

counters! {
    /// Transfers posted.
    posted,
    /// Transfers that ended well.
    completed,
    /// Transfers that ended in an error.
    failed,
    /// Transfers that the thread which posted them copied by itself (transport `local`).
    copied_by_callers,
    /// Bytes read from peers.
    bytes_read,
    /// Bytes written to peers.
    bytes_written,
    /// Requests sent to peers: frames, and work requests of transport `rdma`.
    requests_sent,
    /// Calls that posted work requests of transfers to a device (transport `rdma`).
    rdma_doorbells,
    /// Completions of transfers' work requests that a device has told (transport `rdma`).
    rdma_completions,
    /// Requests of peers served.
    requests_served,
    /// Requests of peers refused (key, bounds, permission).
    requests_refused,
    /// Bytes of this engine's memory sent to peers that read it.
    bytes_served_read,
    /// Bytes of this engine's memory written by peers.
    bytes_served_write,
    /// Notifications sent (once each, without resends).
    notifications_sent,
    /// Notifications dropped because their session ended before they were acknowledged.
    notifications_dropped,
    /// Connections whose queue pairs failed and were made anew, or given up (transport `rdma`).
    rdma_failures,
    /// Links (TCP connections) that came up.
    links_up,
    /// Links that went down.
    links_down,
    /// Links refused or dropped before they were authenticated.
    links_refused,
    /// Sessions that ended because the peer was silent past the liveness timeout.
    liveness_timeouts,
    /// `recv` and `recvmsg` calls.
    receive_calls,
    /// `sendmsg` calls.
    send_calls,
}

/// What callers' threads have copied by themselves. Several write: 5 ns for each number.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct InlineCounters {
    completed: AtomicU64,
    failed: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

impl InlineCounters {
    #[inline]
    pub(crate) fn completed(&self, operation: Operation, bytes: u64) {
        self.completed.fetch_add(1, Ordering::Relaxed);
        match operation {
            Operation::Read => self.bytes_read.fetch_add(bytes, Ordering::Relaxed),
            Operation::Write => self.bytes_written.fetch_add(bytes, Ordering::Relaxed),
        };
    }

    pub(crate) fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }
}

impl Totals {
    pub(crate) fn add_inline(&mut self, inline: &InlineCounters) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (completed, failed) = (get(&inline.completed), get(&inline.failed));
        self.posted += completed + failed;
        self.completed += completed;
        self.failed += failed;
        self.bytes_read += get(&inline.bytes_read);
        self.bytes_written += get(&inline.bytes_written);
        self.copied_by_callers += completed;
    }
}

/// A counter with one writer at a time.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        // Not a read-modify-write: there is one writer.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The state of one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerStats {
    /// Agent name.
    pub name: String,
    /// Whether a session is up.
    pub connected: bool,
    /// Which way transfers go now: `local` by copies of this side, `rdma` by work requests of a device, `tcp` as
    /// requests over a socket. `None` while there is no session, while it is being found out, and where none that is
    /// allowed works.
    pub transport: Option<TransportKind>,
    /// Lane that owns the peer.
    pub lane: usize,
    /// Transfers in flight.
    pub in_flight: usize,
    /// Notifications sent and not yet acknowledged.
    pub unacknowledged: usize,
    /// Their bytes.
    pub unacknowledged_bytes: usize,
    /// Why the last link went down, or the last attempt to connect failed.
    pub last_error: Option<String>,
}

/// A snapshot of an engine.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct EngineStats {
    /// Counters summed over the lanes.
    pub totals: Totals,
    /// Registered regions.
    pub regions: usize,
    /// Peers known.
    pub peers: Vec<PeerStats>,
    /// Notifications received and not yet taken.
    pub pending_notifications: usize,
    /// Their bytes.
    pub pending_notification_bytes: usize,
    /// Notifications received since the engine was created.
    pub notifications_received: u64,
    /// The lanes' own counters.
    pub lanes: Vec<corelane_runtime::LaneStats>,
}
