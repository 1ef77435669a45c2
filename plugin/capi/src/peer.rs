//! Connections: peers of an engine.

use std::ffi::{c_char, c_void};
use std::time::Duration;

use corelane::Error;

use crate::handles::{CONNS, ENGINES, adopt, corelane_conn_t, corelane_engine_t, free};
use crate::raw;
use crate::status::{Failure, corelane_status, run};

/// Makes a peer known by its metadata. Cheap: nothing is connected. Loading the same metadata again
/// gives another handle of the same peer; other metadata under a known name replaces it: transfers
/// to the engine that had the name before end in `CORELANE_ERR_REMOTE_DISCONNECT`.
///
/// Any thread. Errors: `CORELANE_ERR_MALFORMED`, `CORELANE_ERR_LIMIT`, `CORELANE_ERR_CONFIG` when no
/// transport is allowed on both sides.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_load_peer(
    engine: corelane_engine_t,
    metadata: *const c_void,
    metadata_len: usize,
    conn: *mut corelane_conn_t,
) -> corelane_status {
    run("corelane_load_peer", || {
        // SAFETY: the caller promises `metadata_len` bytes and room for a handle.
        let metadata = unsafe {
            raw::store(conn, 0, "conn")?;
            raw::bytes(metadata, metadata_len, "metadata")?
        };
        let peer = ENGINES.get(engine)?.engine.load_peer(metadata)?;
        let handle = adopt(&CONNS, engine, peer)?;
        // SAFETY: as above.
        unsafe { raw::store(conn, handle, "conn") }
    })
}

/// As `corelane_load_peer`, for a caller that knows the peer by the name `agent_name`: metadata of
/// another agent is refused with `CORELANE_ERR_INVALID_ARGUMENT`, and nothing is loaded.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_load_peer_as(
    engine: corelane_engine_t,
    agent_name: *const c_char,
    agent_name_len: usize,
    metadata: *const c_void,
    metadata_len: usize,
    conn: *mut corelane_conn_t,
) -> corelane_status {
    run("corelane_load_peer_as", || {
        // SAFETY: the caller promises the lengths and room for a handle.
        let (name, metadata) = unsafe {
            raw::store(conn, 0, "conn")?;
            (
                raw::text(agent_name, agent_name_len, "the agent name")?,
                raw::bytes(metadata, metadata_len, "metadata")?,
            )
        };
        let peer = ENGINES.get(engine)?.engine.load_peer_as(name, metadata)?;
        let handle = adopt(&CONNS, engine, peer)?;
        // SAFETY: as above.
        unsafe { raw::store(conn, handle, "conn") }
    })
}

/// The agent name of a peer, without a final zero byte; lengths as in `corelane_get_metadata`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_conn_name(
    conn: corelane_conn_t,
    buffer: *mut c_void,
    capacity: usize,
    len: *mut usize,
) -> corelane_status {
    run("corelane_conn_name", || {
        let peer = CONNS.get(conn)?;
        // SAFETY: the caller promises a buffer of `capacity` bytes.
        unsafe { raw::fill(peer.value.name().as_bytes(), buffer, capacity, len) }
    })
}

/// Connects now and waits for it, at most `timeout_ms` (negative: as long as the engine tries, which
/// is `connect_timeout_ms`). Never needed: the first transfer or notification connects.
///
/// Any thread but a lane. Errors: `CORELANE_ERR_CONNECT` (with every address and what it said).
#[unsafe(no_mangle)]
pub extern "C" fn corelane_connect(conn: corelane_conn_t, timeout_ms: i64) -> corelane_status {
    run("corelane_connect", || {
        let peer = CONNS.get(conn)?.value.clone();
        match peer.connect(raw::timeout(timeout_ms)) {
            Ok(()) => Ok(()),
            // Nobody has answered: there is no living peer to wait for.
            Err(Error::Timeout { .. }) => Err(Failure::new(
                corelane_status::CORELANE_ERR_CONNECT,
                format!("`{}` was not connected within {timeout_ms} ms", peer.name()),
            )),
            Err(error) => Err(error.into()),
        }
    })
}

/// Ends the session: transfers in flight end in `CORELANE_ERR_CANCELLED` (a write in
/// `CORELANE_ERR_REMOTE_DISCONNECT` where the peer may still write it), notifications are flushed
/// for at most `linger_ms`. `*dropped` (may be null) is set to the number that were dropped. The
/// peer stays known: the next transfer connects again.
///
/// Any thread but a lane.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_disconnect(
    conn: corelane_conn_t,
    dropped: *mut u64,
) -> corelane_status {
    run("corelane_disconnect", || {
        let peer = CONNS.get(conn)?.value.clone();
        let count = peer.disconnect()?;
        // SAFETY: the caller promises room for a number, or null.
        unsafe { raw::store_if_wanted(dropped, count as u64) };
        Ok(())
    })
}

/// Disconnects a peer, forgets its metadata, and frees the handle. Transfers prepared for it end in
/// `CORELANE_ERR_CANCELLED`, now and when they are posted again. Notifications are flushed for at
/// most `linger_ms`; this call waits for that during at most `timeout_ms` (negative: as long as it
/// takes), and the rest goes on by itself.
///
/// Any thread but a lane. The handle is freed whatever the answer.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_unload_peer(conn: corelane_conn_t, timeout_ms: i64) -> corelane_status {
    run("corelane_unload_peer", || {
        let entry = CONNS.get(conn)?;
        let (owner, peer) = (entry.owner, entry.value.clone());
        drop(entry);
        if !free(&CONNS, conn) {
            return Err(Failure::handle("connection", conn));
        }
        let engine = ENGINES.get(owner)?.engine.clone();
        match u64::try_from(timeout_ms) {
            Ok(limit) => {
                engine.unload_peer_within(&peer, Duration::from_millis(limit))?;
            }
            Err(_) => {
                engine.unload_peer(&peer)?;
            }
        }
        Ok(())
    })
}

/// Frees a handle. The peer stays connected and known; transfers prepared for it go on.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_conn_destroy(conn: corelane_conn_t) -> corelane_status {
    run("corelane_conn_destroy", || {
        if free(&CONNS, conn) { Ok(()) } else { Err(Failure::handle("connection", conn)) }
    })
}
