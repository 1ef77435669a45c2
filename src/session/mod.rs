//! The protocol core: everything about a conversation with a peer that needs neither socket nor
//! clock.
//!
//! ```text
//!  caller's post, cancel, notify ---> +------+ ---> frames to send (poll_transmit)
//!  headers and ends of payloads  ---> | Core | ---> where payloads go (Dest)
//!  links up and down, timeouts   ---> +------+ ---> events: connect, close, deliver
//! ```
//!
//! The core is deterministic: bytes, completions and instants go in, frames and events come out.
//! The driver ([`crate::engine`]) owns the sockets and moves payloads by the segments that the core
//! names, so that the same core can be driven by a simulator.

mod core;
pub(crate) mod handshake;
mod inbox;
mod liveness;
mod outbox;

pub(crate) use core::{
    ConnectFailure, ConnectTicket, Core, CoreConfig, Dest, Env, Event, Landing, LandingKey, LinkId,
    NextPack, PackJob, PackKind, RailPairs, RingState, TxFrame, TxPayload, Wired, WiredEnd,
};
