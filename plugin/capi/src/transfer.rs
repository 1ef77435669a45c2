//! Transfers: posting, asking, ending.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use corelane::{Error, Status, Transfer};

use crate::handles::{XFERS, corelane_xfer_t, free};
use crate::status::{
    Failure,
    corelane_status::{self, CORELANE_IN_PROGRESS, CORELANE_OK},
    guard, remember, run, status_of,
};
use crate::{log, raw};

/// A transfer and what was said of its last posting.
pub(crate) struct Posting {
    transfer: Transfer,
    /// Calls of `post` under way; with `RELEASING`, no more begin.
    posts: AtomicU32,
    /// The failure of this posting has been logged.
    reported: AtomicBool,
}

/// A release has begun.
const RELEASING: u32 = 1 << 31;

impl Posting {
    pub(crate) fn new(transfer: Transfer) -> Self {
        Self { transfer, posts: AtomicU32::new(0), reported: AtomicBool::new(false) }
    }

    /// Posts, unless a release has begun. Two uncontended atomic operations more than the engine's.
    #[inline]
    fn post(&self, notification: Option<&[u8]>) -> Result<(), Failure> {
        if self.posts.fetch_add(1, Ordering::AcqRel) & RELEASING != 0 {
            self.posts.fetch_sub(1, Ordering::AcqRel);
            return Err(Failure::new(
                corelane_status::CORELANE_ERR_CANCELLED,
                "the transfer is being released",
            ));
        }
        self.reported.store(false, Ordering::Relaxed);
        let posted = match notification {
            None => self.transfer.post(),
            Some(payload) => self.transfer.post_with_notification(payload),
        };
        self.posts.fetch_sub(1, Ordering::AcqRel);
        Ok(posted?)
    }

    /// No posting begins from now on; false: one is beginning just now.
    fn close(&self) -> bool {
        self.posts.fetch_or(RELEASING, Ordering::AcqRel) & !RELEASING == 0
    }

    fn is_beginning(&self) -> bool {
        self.posts.load(Ordering::Acquire) & !RELEASING != 0
    }

    fn is_in_flight(&self) -> bool {
        self.is_beginning() || matches!(self.transfer.status(), Status::InProgress)
    }
}

/// What `corelane_post` and those that prepare and post do.
#[inline]
pub(crate) fn post(xfer: corelane_xfer_t, notification: Option<&[u8]>) -> Result<(), Failure> {
    XFERS.get(xfer)?.value.post(notification)
}

/// Starts a prepared transfer, for the first time or again after its end. One message to the lane;
/// allocates nothing. All that has to do with the peer is reported by `corelane_xfer_status`.
///
/// Any thread. Errors: `CORELANE_ERR_BUSY` while it is in flight; `CORELANE_ERR_CANCELLED` once a
/// release has begun; `CORELANE_ERR_SHUTDOWN`, `CORELANE_ERR_BACKEND`.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_post(xfer: corelane_xfer_t) -> corelane_status {
    run("corelane_post", || post(xfer, None))
}

/// As `corelane_post`, and the peer's application sees `len` bytes of `payload` (0 to 16 MiB) as a
/// notification once all bytes have arrived: of a write there, of a read here.
///
/// Any thread. Errors: `CORELANE_ERR_BUSY`; `CORELANE_ERR_BACKPRESSURE`, `CORELANE_ERR_LIMIT`: then no
/// data has moved.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_post_notify(
    xfer: corelane_xfer_t,
    payload: *const c_void,
    len: usize,
) -> corelane_status {
    run("corelane_post_notify", || {
        // SAFETY: the caller promises `len` bytes.
        let payload = unsafe { raw::bytes(payload, len, "the payload")? };
        post(xfer, Some(payload))
    })
}

impl Posting {
    fn failed(&self, error: &Error) {
        let failure = Failure::from(error.clone());
        // Its handle is valid: what is wrong is the posting. Logged once, however often it is asked.
        let quiet = matches!(error, Error::Cancelled | Error::Shutdown);
        remember(&failure.message);
        if !quiet && !self.reported.swap(true, Ordering::Relaxed) {
            // Without what differs from one transfer to the next: many may end for one cause.
            log::complain("transfer", &failure.message);
        }
    }
}

/// Where a transfer stands: `CORELANE_IN_PROGRESS`, `CORELANE_OK` when it is done,
/// `CORELANE_ERR_NOT_POSTED`, or the error in which it ended (`corelane_xfer_error` and
/// `corelane_last_error` have its words). A peer that is gone gives `CORELANE_ERR_REMOTE_DISCONNECT`,
/// or `CORELANE_ERR_CONNECT` where the attempt to connect again was what failed.
/// The same answer however often it is asked, until it is posted again.
///
/// Any thread. Costs a load of a finished transfer; of an unfinished one, where cores are few, a turn
/// of its lane.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_xfer_status(xfer: corelane_xfer_t) -> corelane_status {
    guard("corelane_xfer_status", || {
        let entry = XFERS.get(xfer)?;
        Ok(match entry.value.transfer.status() {
            Status::Done => CORELANE_OK,
            Status::InProgress => CORELANE_IN_PROGRESS,
            Status::Idle => corelane_status::CORELANE_ERR_NOT_POSTED,
            Status::Failed(error) => {
                entry.value.failed(&error);
                status_of(&error)
            }
        })
    })
}

/// Whether a transfer that was posted is over already: `CORELANE_OK` when it is done, `CORELANE_IN_PROGRESS` while it
/// is not, or when it failed, which `corelane_xfer_status` tells. For right after posting: small transfers to a peer on the
/// same host are copied there. Who waits asks `corelane_xfer_status`, since this helps nothing along.
///
/// Any thread. Costs a load. Errors: `CORELANE_ERR_INVALID_HANDLE`.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_xfer_peek(xfer: corelane_xfer_t) -> corelane_status {
    guard("corelane_xfer_peek", || {
        Ok(match XFERS.get(xfer)?.value.transfer.peek() {
            Status::Done => CORELANE_OK,
            _ => CORELANE_IN_PROGRESS,
        })
    })
}

/// Waits for the end, at most `timeout_ms` (negative: without limit), and returns what
/// `corelane_xfer_status` would.
///
/// Any thread but a lane. `CORELANE_IN_PROGRESS`: the time has passed, the transfer goes on.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_xfer_wait(xfer: corelane_xfer_t, timeout_ms: i64) -> corelane_status {
    guard("corelane_xfer_wait", || {
        let entry = XFERS.get(xfer)?;
        // What it came to is asked for afterwards: `wait` has a timeout of its own.
        let waited = entry.value.transfer.wait(raw::timeout(timeout_ms));
        Ok(match (entry.value.transfer.status(), waited) {
            (Status::Done, _) => CORELANE_OK,
            (Status::InProgress, Err(error)) if !matches!(error, Error::Timeout { .. }) => {
                return Err(error.into());
            }
            (Status::InProgress, _) => CORELANE_IN_PROGRESS,
            (Status::Idle, _) => corelane_status::CORELANE_ERR_NOT_POSTED,
            (Status::Failed(error), _) => {
                entry.value.failed(&error);
                status_of(&error)
            }
        })
    })
}

/// The words of the error in which a transfer ended, without a final zero byte; empty while it has
/// not failed. Lengths as in `corelane_get_metadata`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_xfer_error(
    xfer: corelane_xfer_t,
    buffer: *mut c_void,
    capacity: usize,
    len: *mut usize,
) -> corelane_status {
    run("corelane_xfer_error", || {
        let words = match XFERS.get(xfer)?.value.transfer.status() {
            Status::Failed(error) => error.to_string(),
            _ => String::new(),
        };
        // SAFETY: the caller promises a buffer of `capacity` bytes.
        unsafe { raw::fill(words.as_bytes(), buffer, capacity, len) }
    })
}

/// Asks a transfer to end: what is not sent is dropped. It ends (in `CORELANE_ERR_CANCELLED`, or done
/// if it was faster) as soon as nothing touches its local memory any more, and the peer writes nothing
/// more of a write. A write ends in why (`CORELANE_ERR_TIMEOUT`, `CORELANE_ERR_REMOTE_DISCONNECT`) where
/// the peer does not say so: its memory may then still be written.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_cancel(xfer: corelane_xfer_t) -> corelane_status {
    run("corelane_cancel", || {
        XFERS.get(xfer)?.value.transfer.cancel();
        Ok(())
    })
}

/// Frees a transfer. One in flight is cancelled first, and waited for during at most `timeout_ms`
/// (0: not at all; negative: without limit). From the first call on it cannot be posted any more.
///
/// Any thread but a lane. `CORELANE_OK`: freed, and nothing touches its local memory any more.
/// `CORELANE_ERR_BUSY`: not yet quiet; the handle is kept, call again.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_release(xfer: corelane_xfer_t, timeout_ms: i64) -> corelane_status {
    run("corelane_release", || {
        let entry = XFERS.get(xfer)?;
        let posting = &entry.value;
        let quiet = posting.close() && !posting.is_in_flight();
        if !quiet && !end_within(posting, raw::timeout(timeout_ms)) {
            return Err(Failure::new(
                corelane_status::CORELANE_ERR_BUSY,
                "the transfer is being cancelled, and its memory is not quiet yet: release it again",
            ));
        }
        if free(&XFERS, xfer) { Ok(()) } else { Err(Failure::handle("transfer", xfer)) }
    })
}

/// Cancels a transfer that cannot be posted any more; true: it has ended.
fn end_within(posting: &Posting, timeout: Duration) -> bool {
    let started = Instant::now();
    loop {
        posting.transfer.cancel();
        // Where cores are few, this look drives the lane, and the end may be here at once.
        if !posting.is_in_flight() {
            return true;
        }
        let left = timeout.saturating_sub(started.elapsed());
        if left.is_zero() {
            return false;
        }
        // Only whether it has ended counts, not how. In slices: a post that had begun before the
        // release may start it after it was cancelled.
        match posting.transfer.wait(left.min(Duration::from_millis(100))) {
            // This thread may not wait, unless the transfer is just about to be posted.
            Err(Error::InvalidArgument(_)) if !posting.is_beginning() => return false,
            Err(_) => std::thread::yield_now(),
            Ok(()) => {}
        }
    }
}

/// How long a posting is expected to take, in nanoseconds, from what transfers to this peer have
/// taken so far, and how far like ones were from that.
///
/// Any thread. Errors: `CORELANE_ERR_NOT_FOUND` before any transfer to the peer has ended well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_estimate(
    xfer: corelane_xfer_t,
    duration_ns: *mut u64,
    margin_ns: *mut u64,
) -> corelane_status {
    run("corelane_estimate", || {
        let estimate = XFERS.get(xfer)?.value.transfer.plan().estimate().ok_or_else(|| {
            Failure::new(
                corelane_status::CORELANE_ERR_NOT_FOUND,
                "no transfer to this peer has ended well yet",
            )
        })?;
        let nanoseconds = |duration: Duration| duration.as_nanos().min(u128::from(u64::MAX)) as u64;
        // SAFETY: the caller promises room for the numbers.
        unsafe {
            raw::store(duration_ns, nanoseconds(estimate.duration), "duration_ns")?;
            raw::store(margin_ns, nanoseconds(estimate.margin), "margin_ns")
        }
    })
}
