//! An engine without sockets, clock and threads, for the simulator (`tests/sim`). Not part of the API: only in builds with
//! the cargo feature `sim`, and changed at will.
//!
//! A [`Node`] is what a lane is ([`crate::engine`]), with bytes and virtual time where that has sockets and timers: the same
//! protocol cores, handshakes, frames, tables of peers and regions. Whoever drives it is its world ([`Outside`]): network,
//! memory, chance.

mod copies;
pub mod coverage;
mod inspect;
mod links;
mod mutation;
mod node;
mod peers;
mod ring;
mod stream;
mod wired;

pub use copies::{Copied, Shared};
pub use inspect::Levels;
pub use mutation::Mutation;
pub use node::{
    Config, Memory, Node, Outside, Peer, PlanHandle, RegionHandle, RingLook, State, TicketHandle,
    Touch, TransferHandle, Trust, Way,
};
pub(crate) use wired::is_wired;
pub use wired::{Completion, Range, Work};

thread_local! {
    static DOUBLE_ENDS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Ends of postings that had ended, on this thread since the last call.
pub fn take_double_ends() -> u64 {
    DOUBLE_ENDS.take()
}

pub(crate) fn count_double_end() {
    DOUBLE_ENDS.set(DOUBLE_ENDS.get() + 1);
}
