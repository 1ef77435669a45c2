//! The one error type of the engine.

use std::io;
use std::sync::Arc;
use std::time::Duration;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with what failed, to whom, and what to do about it.
///
/// Errors are cheap to clone: a transfer that failed answers the same error however often it is
/// asked.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration value is unusable.
    #[error("configuration: {0}")]
    Config(String),

    /// A lane could not be started or has died.
    #[error("lane: {0}")]
    Lane(String),

    /// An argument of the call is unusable: nothing was started.
    #[error("invalid argument: {0}")]
    InvalidArgument(String),

    /// A local address is in no registered region.
    #[error(
        "{len} bytes at {addr:#x} are not inside one registered region of this engine; \
         register the memory before preparing a transfer with it"
    )]
    NotRegistered {
        /// First byte of the range.
        addr: u64,
        /// Length of the range in bytes.
        len: u64,
    },

    /// A range leaves the region it names.
    #[error(
        "{len} bytes at {addr:#x} leave the {side} region {base:#x}..{end:#x}; \
         check offset and length against the registration"
    )]
    OutOfBounds {
        /// `local` or `remote`.
        side: &'static str,
        /// First byte of the range.
        addr: u64,
        /// Length of the range in bytes.
        len: u64,
        /// First byte of the region.
        base: u64,
        /// One past the last byte of the region.
        end: u64,
    },

    /// Bytes that should be metadata or a region descriptor are not.
    #[error("{what} cannot be used: {reason}")]
    Malformed {
        /// What was being decoded.
        what: &'static str,
        /// Why it was refused.
        reason: String,
    },

    /// A region descriptor belongs to another incarnation of the peer (it restarted).
    #[error(
        "the region descriptor was made by another incarnation of `{peer}`; \
         the peer has restarted: exchange metadata and descriptors again"
    )]
    StaleDescriptor {
        /// Agent name of the peer.
        peer: Arc<str>,
    },

    /// The peer refused an access: stale or wrong key, range or permission.
    #[error("`{peer}` refused the access: {reason}")]
    Permission {
        /// Agent name of the peer.
        peer: Arc<str>,
        /// Which check failed.
        reason: &'static str,
    },

    /// No address of the peer could be connected, or the handshake was refused.
    #[error("cannot connect to `{peer}`: {reason}")]
    Connect {
        /// Agent name of the peer.
        peer: Arc<str>,
        /// The addresses tried and what each said.
        reason: String,
    },

    /// The connection to the peer ended while something depended on it.
    #[error("connection to `{peer}` is gone: {reason}")]
    RemoteDisconnect {
        /// Agent name of the peer.
        peer: Arc<str>,
        /// Why (closed, reset, silent past the liveness timeout, goodbye, restarted).
        reason: String,
    },

    /// A living peer did not finish an operation in time.
    #[error("{what} with `{peer}` did not finish within {after:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// Agent name of the peer.
        peer: Arc<str>,
        /// The limit that passed.
        after: Duration,
    },

    /// The operation was cancelled by this side.
    #[error("cancelled")]
    Cancelled,

    /// A transfer slot, region or queue is still in use.
    #[error("{what} is still in use{hint}")]
    Busy {
        /// What is in use.
        what: &'static str,
        /// What to do, starting with `; ` or empty.
        hint: &'static str,
    },

    /// A bounded queue is full: try again after the peer has taken something.
    #[error("{what} to `{peer}` is full ({limit}); poll the receiver, or wait and try again")]
    Backpressure {
        /// The queue.
        what: &'static str,
        /// Agent name of the peer.
        peer: Arc<str>,
        /// The bound that was met.
        limit: String,
    },

    /// A configured limit is exceeded for good.
    #[error("{what}: {value} exceeds the limit of {limit}")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// The value asked for.
        value: u64,
        /// The limit.
        limit: u64,
    },

    /// The engine has been shut down, or belongs to the parent of this forked process.
    #[error("the engine is shut down")]
    Shutdown,

    /// The registered memory itself could not be read or written (it was unmapped).
    #[error(
        "registered memory at {addr:#x} cannot be accessed: was it unmapped before it was deregistered?"
    )]
    Fault {
        /// An address inside the range that faulted.
        addr: u64,
    },

    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// The cause.
        source: Arc<io::Error>,
    },

    /// The driver of a GPU refused something, or there is none.
    #[error("GPU: {what}: {reason}")]
    Gpu {
        /// What was attempted.
        what: String,
        /// What the driver said.
        reason: String,
    },

    /// No transport of this build moves this kind of memory to and from this peer.
    #[error("no transport moves this memory to and from `{peer}`: {reason}")]
    NoTransport {
        /// Agent name of the peer.
        peer: Arc<str>,
        /// What is missing.
        reason: String,
    },

    /// The engine itself is at fault; please report it.
    #[error("internal error: {0}")]
    Backend(String),
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source: Arc::new(source) }
    }

    pub(crate) fn malformed(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Malformed { what, reason: reason.into() }
    }

    /// Whether the peer is gone, so that its metadata should be exchanged again.
    pub fn is_disconnect(&self) -> bool {
        matches!(self, Self::RemoteDisconnect { .. } | Self::Connect { .. })
    }
}

impl From<corelane_runtime::LaneError> for Error {
    fn from(error: corelane_runtime::LaneError) -> Self {
        Self::Lane(error.to_string())
    }
}
