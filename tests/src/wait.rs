//! Waiting, with one generous bound.

use std::time::{Duration, Instant};

use corelane::{Engine, Error, Notification, Status, Transfer};

/// How long anything may take before a test says that it hangs.
pub const BOUND: Duration = Duration::from_secs(60);

/// How often to do what is done again and again to meet a rare moment: a fifth of `all` in the RDMA rig, whose processor is emulated
/// and some 30 times slower.
pub fn rounds(all: u64) -> u64 {
    if std::env::var_os("CORELANE_RDMA_RIG").is_some() { all.div_ceil(5) } else { all }
}

/// Waits until `done`, looking every millisecond.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + BOUND;
    while !done() {
        assert!(Instant::now() < deadline, "not within {BOUND:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How a transfer ended. Panics if it does not end, or if two ways of asking do not agree.
#[track_caller]
pub fn outcome(transfer: &Transfer) -> Result<(), Error> {
    let waited = transfer.wait(BOUND);
    match (transfer.status(), waited) {
        (Status::Done, Ok(())) => Ok(()),
        (Status::Failed(error), Err(waited)) => {
            assert_eq!(error.to_string(), waited.to_string());
            Err(error)
        }
        (status, waited) => panic!("after waiting ({waited:?}) the transfer is {status:?}"),
    }
}

/// How a posting of a transfer ended: the error of `post` itself, or that of the transfer.
#[track_caller]
pub fn end_of(transfer: &Transfer) -> Result<(), Error> {
    transfer.post().and_then(|()| outcome(transfer))
}

/// Takes notifications until there are `count` or more.
#[track_caller]
pub fn collect(engine: &Engine, count: usize) -> Vec<Notification> {
    let mut all = Vec::new();
    let deadline = Instant::now() + BOUND;
    while all.len() < count {
        assert!(
            Instant::now() < deadline,
            "{} of {count} notifications within {BOUND:?}",
            all.len()
        );
        let new = engine.notifications().expect("taking notifications");
        if new.is_empty() {
            std::thread::yield_now();
        }
        all.extend(new);
    }
    all
}

/// Whether a transfer that was cancelled ended in that; done is the only other end that it may have.
pub fn cut_short(transfer: &Transfer) -> bool {
    match outcome(transfer) {
        Ok(()) => false,
        Err(Error::Cancelled) => true,
        Err(other) => panic!("cancelled, and ended in {other}"),
    }
}

/// The name of an error's variant.
pub fn kind(error: &Error) -> &'static str {
    match error {
        Error::Config(_) => "Config",
        Error::Lane(_) => "Lane",
        Error::InvalidArgument(_) => "InvalidArgument",
        Error::NotRegistered { .. } => "NotRegistered",
        Error::OutOfBounds { .. } => "OutOfBounds",
        Error::Malformed { .. } => "Malformed",
        Error::StaleDescriptor { .. } => "StaleDescriptor",
        Error::Permission { .. } => "Permission",
        Error::Connect { .. } => "Connect",
        Error::RemoteDisconnect { .. } => "RemoteDisconnect",
        Error::Timeout { .. } => "Timeout",
        Error::Cancelled => "Cancelled",
        Error::Busy { .. } => "Busy",
        Error::Backpressure { .. } => "Backpressure",
        Error::Limit { .. } => "Limit",
        Error::Shutdown => "Shutdown",
        Error::Fault { .. } => "Fault",
        Error::Io { .. } => "Io",
        Error::Gpu { .. } => "Gpu",
        Error::NoTransport { .. } => "NoTransport",
        Error::Backend(_) => "Backend",
        _ => "other",
    }
}
