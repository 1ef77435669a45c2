//! How full the state of a peer is.

/// Entries of everything that a core keeps for its peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Levels {
    pub active: usize,
    pub requests: usize,
    pub deadlines: usize,
    pub queued: usize,
    pub links: usize,
    pub control: usize,
    /// Answers that the fullest link owes.
    pub replies: usize,
    /// Requests without an answer on the fullest bulk link of ours.
    pub bulk_outstanding: usize,
    /// The same on the session's link.
    pub session_outstanding: usize,
    pub outbox: usize,
    /// Notifications on the wire without an acknowledgement, and their bytes.
    pub on_wire: usize,
    pub on_wire_bytes: usize,
    /// The longest of those.
    pub longest_on_wire: usize,
    pub ready: usize,
    pub ready_bytes: usize,
    pub held_bytes: usize,
    pub counted: usize,
    pub abandoned: usize,
    /// A session link is up.
    pub is_up: bool,
    pub session: u64,
}
