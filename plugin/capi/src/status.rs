//! Statuses, the last error of a thread, and the wall that no panic passes.

use std::cell::RefCell;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use corelane::Error;

use crate::log;

/// What a call came to. Negative values are errors; `corelane_last_error` has the words.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum corelane_status {
    /// The transfer is under way.
    CORELANE_IN_PROGRESS = 1,
    /// Success; of a transfer: all bytes are where they belong.
    CORELANE_OK = 0,
    /// The transfer was never posted.
    CORELANE_ERR_NOT_POSTED = -1,
    /// An argument is unusable (null, not UTF-8, wraps around, lists of different lengths, ...).
    CORELANE_ERR_INVALID_ARGUMENT = -2,
    /// The handle is stale, of another kind, of another engine, or made up.
    CORELANE_ERR_INVALID_HANDLE = -3,
    /// What was asked for does not exist (yet).
    CORELANE_ERR_NOT_FOUND = -4,
    /// A local range is in no registered region.
    CORELANE_ERR_NOT_REGISTERED = -5,
    /// A range leaves its region.
    CORELANE_ERR_OUT_OF_BOUNDS = -6,
    /// Bytes that should be metadata or a descriptor are not, or are damaged.
    CORELANE_ERR_MALFORMED = -7,
    /// The descriptor was made by another incarnation of the peer: it has restarted.
    CORELANE_ERR_STALE_DESCRIPTOR = -8,
    /// The peer refused the access: stale key, range or permission.
    CORELANE_ERR_PERMISSION = -9,
    /// The peer cannot be reached, or refused the connection.
    CORELANE_ERR_CONNECT = -10,
    /// The peer is gone: closed, reset, silent past the liveness timeout, restarted.
    CORELANE_ERR_REMOTE_DISCONNECT = -11,
    /// Something did not finish in time, with a peer that lives, or without one.
    CORELANE_ERR_TIMEOUT = -12,
    /// Cancelled by this side.
    CORELANE_ERR_CANCELLED = -13,
    /// Still in use: wait, or try again.
    CORELANE_ERR_BUSY = -14,
    /// A bounded queue is full: try again after the peer has taken something.
    CORELANE_ERR_BACKPRESSURE = -15,
    /// A configured limit is exceeded for good.
    CORELANE_ERR_LIMIT = -16,
    /// The engine is shut down, or belongs to the parent of this forked process.
    CORELANE_ERR_SHUTDOWN = -17,
    /// Registered memory cannot be accessed: it was unmapped.
    CORELANE_ERR_FAULT = -18,
    /// The operating system refused something.
    CORELANE_ERR_IO = -19,
    /// An option is unknown or unusable.
    CORELANE_ERR_CONFIG = -20,
    /// A lane could not be started, or did not stop as it should.
    CORELANE_ERR_LANE = -21,
    /// The caller's buffer is too small; the length that is needed was stored.
    CORELANE_ERR_BUFFER_TOO_SMALL = -22,
    /// The library itself is at fault; please report it.
    CORELANE_ERR_BACKEND = -23,
    /// No transport moves this kind of memory to and from this peer, or there is no driver for it.
    CORELANE_ERR_NOT_SUPPORTED = -24,
}

use corelane_status::{
    CORELANE_ERR_BACKEND, CORELANE_ERR_BACKPRESSURE, CORELANE_ERR_BUFFER_TOO_SMALL,
    CORELANE_ERR_BUSY, CORELANE_ERR_CANCELLED, CORELANE_ERR_CONFIG, CORELANE_ERR_CONNECT,
    CORELANE_ERR_FAULT, CORELANE_ERR_INVALID_ARGUMENT, CORELANE_ERR_INVALID_HANDLE,
    CORELANE_ERR_IO, CORELANE_ERR_LANE, CORELANE_ERR_LIMIT, CORELANE_ERR_MALFORMED,
    CORELANE_ERR_NOT_FOUND, CORELANE_ERR_NOT_POSTED, CORELANE_ERR_NOT_REGISTERED,
    CORELANE_ERR_NOT_SUPPORTED, CORELANE_ERR_OUT_OF_BOUNDS, CORELANE_ERR_PERMISSION,
    CORELANE_ERR_REMOTE_DISCONNECT, CORELANE_ERR_SHUTDOWN, CORELANE_ERR_STALE_DESCRIPTOR,
    CORELANE_ERR_TIMEOUT, CORELANE_IN_PROGRESS, CORELANE_OK,
};

const NAMES: [(corelane_status, &CStr); 26] = [
    (CORELANE_IN_PROGRESS, c"in progress"),
    (CORELANE_OK, c"ok"),
    (CORELANE_ERR_NOT_POSTED, c"not posted"),
    (CORELANE_ERR_INVALID_ARGUMENT, c"invalid argument"),
    (CORELANE_ERR_INVALID_HANDLE, c"invalid handle"),
    (CORELANE_ERR_NOT_FOUND, c"not found"),
    (CORELANE_ERR_NOT_REGISTERED, c"memory not registered"),
    (CORELANE_ERR_OUT_OF_BOUNDS, c"out of bounds"),
    (CORELANE_ERR_MALFORMED, c"malformed"),
    (CORELANE_ERR_STALE_DESCRIPTOR, c"stale descriptor"),
    (CORELANE_ERR_PERMISSION, c"refused by the peer"),
    (CORELANE_ERR_CONNECT, c"cannot connect"),
    (CORELANE_ERR_REMOTE_DISCONNECT, c"remote disconnect"),
    (CORELANE_ERR_TIMEOUT, c"timeout"),
    (CORELANE_ERR_CANCELLED, c"cancelled"),
    (CORELANE_ERR_BUSY, c"busy"),
    (CORELANE_ERR_BACKPRESSURE, c"queue full"),
    (CORELANE_ERR_LIMIT, c"limit exceeded"),
    (CORELANE_ERR_SHUTDOWN, c"shut down"),
    (CORELANE_ERR_FAULT, c"memory fault"),
    (CORELANE_ERR_IO, c"system error"),
    (CORELANE_ERR_CONFIG, c"bad configuration"),
    (CORELANE_ERR_LANE, c"lane failed to start"),
    (CORELANE_ERR_BUFFER_TOO_SMALL, c"buffer too small"),
    (CORELANE_ERR_BACKEND, c"internal error"),
    (CORELANE_ERR_NOT_SUPPORTED, c"not supported"),
];

pub(crate) fn status_of(error: &Error) -> corelane_status {
    match error {
        Error::Config(_) => CORELANE_ERR_CONFIG,
        Error::Lane(_) => CORELANE_ERR_LANE,
        Error::InvalidArgument(_) => CORELANE_ERR_INVALID_ARGUMENT,
        Error::NotRegistered { .. } => CORELANE_ERR_NOT_REGISTERED,
        Error::OutOfBounds { .. } => CORELANE_ERR_OUT_OF_BOUNDS,
        Error::Malformed { .. } => CORELANE_ERR_MALFORMED,
        Error::StaleDescriptor { .. } => CORELANE_ERR_STALE_DESCRIPTOR,
        Error::Permission { .. } => CORELANE_ERR_PERMISSION,
        Error::Connect { .. } => CORELANE_ERR_CONNECT,
        Error::RemoteDisconnect { .. } => CORELANE_ERR_REMOTE_DISCONNECT,
        Error::Timeout { .. } => CORELANE_ERR_TIMEOUT,
        Error::Cancelled => CORELANE_ERR_CANCELLED,
        Error::Busy { .. } => CORELANE_ERR_BUSY,
        Error::Backpressure { .. } => CORELANE_ERR_BACKPRESSURE,
        Error::Limit { .. } => CORELANE_ERR_LIMIT,
        Error::Shutdown => CORELANE_ERR_SHUTDOWN,
        Error::Fault { .. } => CORELANE_ERR_FAULT,
        Error::Io { .. } | Error::Gpu { .. } => CORELANE_ERR_IO,
        Error::NoTransport { .. } => CORELANE_ERR_NOT_SUPPORTED,
        // `Backend`, and whatever a later engine adds.
        _ => CORELANE_ERR_BACKEND,
    }
}

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: corelane_status,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(status: corelane_status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub(crate) fn argument(message: impl Into<String>) -> Self {
        Self::new(CORELANE_ERR_INVALID_ARGUMENT, message)
    }

    pub(crate) fn limit(message: impl Into<String>) -> Self {
        Self::new(CORELANE_ERR_LIMIT, message)
    }

    #[cold]
    pub(crate) fn handle(what: &str, handle: u64) -> Self {
        let message = if handle == 0 {
            format!("0 is no {what} handle")
        } else {
            format!("{handle:#x} is no {what} handle: freed, of another kind, or made up")
        };
        Self::new(CORELANE_ERR_INVALID_HANDLE, message)
    }

    /// Whether it is worth a line in the log: what waiting or trying again will change is not.
    fn is_news(&self) -> bool {
        !matches!(
            self.status,
            CORELANE_ERR_BUSY
                | CORELANE_ERR_BUFFER_TOO_SMALL
                | CORELANE_ERR_NOT_FOUND
                | CORELANE_ERR_CANCELLED
                | CORELANE_ERR_TIMEOUT
                // Also the answer to all calls in a forked child.
                | CORELANE_ERR_SHUTDOWN
        )
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { status: status_of(&error), message: error.to_string() }
    }
}

thread_local! {
    static LAST_ERROR: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What `corelane_last_error` says from now on.
pub(crate) fn remember(message: &str) {
    // A thread that is ending has no place for it.
    let _ = LAST_ERROR.try_with(|last| {
        let mut last = last.borrow_mut();
        last.clear();
        last.extend(message.bytes().filter(|byte| *byte != 0));
        last.push(0);
    });
}

/// Runs the body of an exported function. Costs nothing when the body succeeds.
pub(crate) fn guard(
    function: &'static str,
    body: impl FnOnce() -> Result<corelane_status, Failure>,
) -> corelane_status {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(status)) => status,
        Ok(Err(failure)) => {
            remember(&failure.message);
            if failure.is_news() {
                log::complain(function, &failure.message);
            }
            failure.status
        }
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            // What a panic carries may itself panic when dropped.
            std::mem::forget(panic);
            let message = format!("internal error in {function}: {text}");
            remember(&message);
            let _ = catch_unwind(AssertUnwindSafe(|| log::complain(function, &message)));
            CORELANE_ERR_BACKEND
        }
    }
}

/// As `guard`, for a body that only succeeds or fails.
pub(crate) fn run(
    function: &'static str,
    body: impl FnOnce() -> Result<(), Failure>,
) -> corelane_status {
    guard(function, || body().map(|()| CORELANE_OK))
}

/// Words for a status, as a string that is never freed. Any number is allowed.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_status_name(status: i32) -> *const c_char {
    NAMES
        .iter()
        .find(|(known, _)| *known as i32 == status)
        .map_or(c"unknown status", |(_, name)| *name)
        .as_ptr()
}

/// Why the last failed call of this thread failed: what failed, to whom, and what to do. Valid until
/// this thread's next failed call, or its end; empty when none has failed.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_last_error() -> *const c_char {
    LAST_ERROR
        .try_with(|last| {
            let last = last.borrow();
            if last.is_empty() { c"".as_ptr() } else { last.as_ptr().cast() }
        })
        .unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        // SAFETY: the pointer is a string that lives until the next failed call of this thread.
        unsafe { CStr::from_ptr(corelane_last_error()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_with_its_words() {
        let status = run("corelane_test", || panic!("seven {}", 7));
        assert_eq!(status, CORELANE_ERR_BACKEND);
        assert!(last_error().contains("corelane_test: seven 7"), "{}", last_error());
        assert_eq!(run("corelane_test", || Ok(())), CORELANE_OK);
    }

    #[test]
    fn every_status_has_a_name_of_its_own() {
        let mut names: Vec<_> = NAMES
            .iter()
            .map(|(status, _)| {
                // SAFETY: a string that is never freed.
                unsafe { CStr::from_ptr(corelane_status_name(*status as i32)) }
            })
            .collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), NAMES.len());
        assert_eq!(NAMES.iter().map(|(status, _)| *status as i32).min(), Some(-24));
    }

    #[test]
    fn the_last_error_of_a_thread_is_its_own() {
        run("corelane_test", || Err(Failure::argument("mine")));
        std::thread::spawn(|| assert_eq!(last_error(), "")).join().unwrap();
        assert_eq!(last_error(), "mine");
    }
}
