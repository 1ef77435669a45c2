//! Counters.

use corelane::TransportKind;

use crate::handles::{CONNS, ENGINES, corelane_conn_t, corelane_engine_t};
use crate::status::{Failure, corelane_status, run};

/// Totals since the engine was created, then what is there now. Later versions append.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct corelane_engine_stats {
    /// Transfers posted.
    pub posted: u64,
    /// Transfers that ended well.
    pub completed: u64,
    /// Transfers that ended in an error.
    pub failed: u64,
    /// Bytes read from peers.
    pub bytes_read: u64,
    /// Bytes written to peers.
    pub bytes_written: u64,
    /// Requests sent to peers.
    pub requests_sent: u64,
    /// Requests of peers served.
    pub requests_served: u64,
    /// Requests of peers refused.
    pub requests_refused: u64,
    /// Bytes of this engine's memory that peers have read.
    pub bytes_served_read: u64,
    /// Bytes of this engine's memory that peers have written.
    pub bytes_served_write: u64,
    /// Notifications sent.
    pub notifications_sent: u64,
    /// Notifications dropped because their session ended before they were acknowledged.
    pub notifications_dropped: u64,
    /// Connections that came up.
    pub links_up: u64,
    /// Connections that went down.
    pub links_down: u64,
    /// Connections refused or dropped before they were authenticated.
    pub links_refused: u64,
    /// Sessions that ended because the peer was silent past the liveness timeout.
    pub liveness_timeouts: u64,
    /// `recv` and `recvmsg` calls.
    pub receive_calls: u64,
    /// `sendmsg` calls.
    pub send_calls: u64,
    /// Registered regions.
    pub regions: u64,
    /// Peers known.
    pub peers: u64,
    /// Peers with a session that is up.
    pub connected_peers: u64,
    /// Notifications received and not yet taken.
    pub pending_notifications: u64,
    /// Their bytes.
    pub pending_notification_bytes: u64,
    /// Notifications received so far.
    pub notifications_received: u64,
    /// Lanes.
    pub lanes: u64,
    /// Transfers that the thread which posted them copied by itself (transport `local`).
    pub copied_by_callers: u64,
    /// Calls that posted work requests of transfers to a device (transport `rdma`).
    pub rdma_doorbells: u64,
    /// Completions of transfers' work requests that a device has told (transport `rdma`).
    pub rdma_completions: u64,
    /// Connections whose queue pairs failed and were made anew, or given up (transport `rdma`).
    pub rdma_failures: u64,
}

fn snapshot(stats: &corelane::EngineStats) -> corelane_engine_stats {
    let totals = &stats.totals;
    corelane_engine_stats {
        posted: totals.posted,
        completed: totals.completed,
        failed: totals.failed,
        bytes_read: totals.bytes_read,
        bytes_written: totals.bytes_written,
        requests_sent: totals.requests_sent,
        requests_served: totals.requests_served,
        requests_refused: totals.requests_refused,
        bytes_served_read: totals.bytes_served_read,
        bytes_served_write: totals.bytes_served_write,
        notifications_sent: totals.notifications_sent,
        notifications_dropped: totals.notifications_dropped,
        links_up: totals.links_up,
        links_down: totals.links_down,
        links_refused: totals.links_refused,
        liveness_timeouts: totals.liveness_timeouts,
        receive_calls: totals.receive_calls,
        send_calls: totals.send_calls,
        regions: stats.regions as u64,
        peers: stats.peers.len() as u64,
        connected_peers: stats.peers.iter().filter(|peer| peer.connected).count() as u64,
        pending_notifications: stats.pending_notifications as u64,
        pending_notification_bytes: stats.pending_notification_bytes as u64,
        notifications_received: stats.notifications_received,
        lanes: stats.lanes.len() as u64,
        copied_by_callers: totals.copied_by_callers,
        rdma_doorbells: totals.rdma_doorbells,
        rdma_completions: totals.rdma_completions,
        rdma_failures: totals.rdma_failures,
    }
}

/// The state of one peer.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct corelane_peer_stats {
    /// 1 while a session is up, else 0.
    pub connected: u64,
    /// Lane that owns the peer.
    pub lane: u64,
    /// Transfers in flight.
    pub in_flight: u64,
    /// Notifications sent and not yet acknowledged.
    pub unacknowledged: u64,
    /// Their bytes.
    pub unacknowledged_bytes: u64,
    /// Which way transfers go now: 1 `local`, 2 `rdma`, 3 `tcp`; 0 while there is no session, while it is being found out, and
    /// where none that is allowed works.
    pub transport: u64,
}

/// Copies as much of `value` as the caller's structure has room for.
unsafe fn copy_out<T: Copy>(value: &T, place: *mut T, size: usize) -> Result<(), Failure> {
    if place.is_null() {
        return Err(Failure::argument("the place for the answer is null"));
    }
    let len = size.min(size_of::<T>());
    // SAFETY: the caller promises `size` bytes; of ours, no more are read than there are.
    unsafe {
        std::ptr::copy_nonoverlapping(std::ptr::from_ref(value).cast::<u8>(), place.cast(), len);
    }
    Ok(())
}

/// Counters and levels of an engine, into a structure of `size` bytes (`sizeof` as the caller was
/// compiled: a caller and a library of different versions understand each other). What of a longer
/// structure this library does not know is left as it is.
///
/// Any thread, also in a forked child, where levels are 0. Errors: `CORELANE_ERR_INVALID_ARGUMENT`
/// without a structure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_stats(
    engine: corelane_engine_t,
    stats: *mut corelane_engine_stats,
    size: usize,
) -> corelane_status {
    run("corelane_stats", || {
        let value = snapshot(&ENGINES.get(engine)?.engine.stats());
        // SAFETY: the caller promises `size` bytes.
        unsafe { copy_out(&value, stats, size) }
    })
}

/// The state of one peer, into a structure of `size` bytes as in `corelane_stats`.
///
/// The peer that has the name now: another one once other metadata was loaded under it.
///
/// Any thread. Errors: `CORELANE_ERR_NOT_FOUND` when the engine has forgotten the peer, and in a
/// forked child; `CORELANE_ERR_INVALID_ARGUMENT` without a structure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_conn_stats(
    conn: corelane_conn_t,
    stats: *mut corelane_peer_stats,
    size: usize,
) -> corelane_status {
    run("corelane_conn_stats", || {
        let peer = CONNS.get(conn)?;
        let of_engine = ENGINES.get(peer.owner)?.engine.stats();
        let found = of_engine.peers.iter().find(|known| known.name == peer.value.name());
        let known = found.ok_or_else(|| {
            Failure::new(
                corelane_status::CORELANE_ERR_NOT_FOUND,
                format!("`{}` is not known any more", peer.value.name()),
            )
        })?;
        let value = corelane_peer_stats {
            connected: u64::from(known.connected),
            lane: known.lane as u64,
            in_flight: known.in_flight as u64,
            unacknowledged: known.unacknowledged as u64,
            unacknowledged_bytes: known.unacknowledged_bytes as u64,
            transport: match known.transport {
                Some(TransportKind::Local) => 1,
                Some(TransportKind::Rdma) => 2,
                Some(TransportKind::Tcp) => 3,
                _ => 0,
            },
        };
        // SAFETY: the caller promises `size` bytes.
        unsafe { copy_out(&value, stats, size) }
    })
}
