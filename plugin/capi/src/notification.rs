//! Notifications.

use std::ffi::{c_char, c_void};

use corelane::Notification;

use crate::handles::{CONNS, ENGINES, corelane_conn_t, corelane_engine_t};
use crate::raw;
use crate::status::{corelane_status, run};

/// Called once per notification: the sender's agent name (`from_len` bytes, no final zero byte) and
/// the payload. Both are valid during the call only. Must not throw or jump out.
pub type corelane_notif_fn = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        from: *const c_char,
        from_len: usize,
        payload: *const c_void,
        payload_len: usize,
    ),
>;

/// Sends `len` bytes (0 to 16 MiB) to the peer's application: exactly once within the session, and
/// in the order in which this thread sends. Does not wait; connects if need be.
///
/// Any thread. Errors: `CORELANE_ERR_BACKPRESSURE` when too many are not acknowledged,
/// `CORELANE_ERR_LIMIT` above 16 MiB, `CORELANE_ERR_CONNECT` within a second after the peer could not
/// be reached, `CORELANE_ERR_REMOTE_DISCONNECT` for a peer that connected by itself, was never loaded, and has left or did not come
/// back within 30 s, `CORELANE_ERR_CANCELLED` once it was unloaded, `CORELANE_ERR_SHUTDOWN`, `CORELANE_ERR_BACKEND` after a lane has failed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_send_notif(
    conn: corelane_conn_t,
    payload: *const c_void,
    len: usize,
) -> corelane_status {
    run("corelane_send_notif", || {
        // SAFETY: the caller promises `len` bytes.
        let payload = unsafe { raw::bytes(payload, len, "the payload")? };
        CONNS.get(conn)?.value.notify(payload)?;
        Ok(())
    })
}

fn hand_over(take: corelane_notif_fn, context: *mut c_void, notification: &Notification) {
    let Some(take) = take else { return };
    // SAFETY: a function of the caller's, with the context it asked for; the pointers are valid for
    // their lengths during the call.
    unsafe {
        take(
            context,
            notification.from.as_ptr().cast(),
            notification.from.len(),
            notification.payload.as_ptr().cast(),
            notification.payload.len(),
        );
    }
}

/// Takes all notifications that have arrived, oldest first per peer, and hands each to `take`.
/// `*count` (may be null) is set to how many there were. Does not wait.
///
/// Any thread. Costs a load when there are none, and where cores are few a turn of the lanes.
/// Errors: `CORELANE_ERR_INVALID_ARGUMENT` without `take`; `CORELANE_ERR_BACKEND` after a lane has
/// failed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_get_notifs(
    engine: corelane_engine_t,
    take: corelane_notif_fn,
    context: *mut c_void,
    count: *mut usize,
) -> corelane_status {
    run("corelane_get_notifs", || {
        check(take)?;
        let entry = ENGINES.get(engine)?;
        let taken = entry.engine.take_notifications(|one| hand_over(take, context, &one))?;
        // SAFETY: the caller promises room for a number, or null.
        unsafe { raw::store_if_wanted(count, taken) };
        Ok(())
    })
}

/// As `corelane_get_notifs`; while there are none, waits for the first, at most `timeout_ms`
/// (negative: without limit). `*count` is 0 when none came.
///
/// Any thread but a lane.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_wait_notifs(
    engine: corelane_engine_t,
    timeout_ms: i64,
    take: corelane_notif_fn,
    context: *mut c_void,
    count: *mut usize,
) -> corelane_status {
    run("corelane_wait_notifs", || {
        check(take)?;
        // Not held while waiting: the engine may be destroyed meanwhile.
        let api = ENGINES.get(engine)?.engine.clone();
        let all = api.wait_notifications(raw::timeout(timeout_ms))?;
        all.iter().for_each(|one| hand_over(take, context, one));
        // SAFETY: the caller promises room for a number, or null.
        unsafe { raw::store_if_wanted(count, all.len()) };
        Ok(())
    })
}

fn check(take: corelane_notif_fn) -> Result<(), crate::status::Failure> {
    match take {
        Some(_) => Ok(()),
        None => {
            Err(crate::status::Failure::argument("take is null: the notifications need a taker"))
        }
    }
}
