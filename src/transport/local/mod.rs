//! The transport between engines of one host: the initiator's threads copy by themselves.
//!
//! ```text
//!   initiator                                              target
//!   ┌───────────────┐  reads: keys, bounds, rights  ┌──────────────┐
//!   │ LocalPath     │ ────────────────────────────> │ region table │ memfd, written by its owner only
//!   │ copy(chunk)   │                               └──────────────┘
//!   │   │           │  counts its copies            ┌──────────────┐
//!   │   ├───────────┼─────────────────────────────> │ channel      │ memfd, one for each direction:
//!   │   │           │  puts notifications           │  uses, ring  │ uses in progress, notifications
//!   │   │           │ ────────────────────────────> └──────────────┘
//!   │   │ memcpy (same process, memory of the engine), /proc/PID/mem, process_vm_readv / writev
//!   │   └─────────────────────────────────────────> registered memory
//!   └───────────────┘
//! ```
//!
//! The session's own socket (a Unix socket) carries the descriptors of that shared memory, and notifications that
//! are too long for the ring. `engine::local` drives all this on a lane.

mod accessors;
mod channel;
mod cma;
mod copy;
mod death;
mod life;
mod memory;
mod path;
mod shm;
mod table;

pub(crate) use accessors::{Accessor, Accessors};
pub(crate) use channel::{
    Consumer, MAX_RING_PAYLOAD, Message, OwnedUse, Producer, Pushed, RING_MESSAGES,
    create as create_channel, open as open_channel,
};
pub(crate) use cma::{PeerCredentials, Pid, allow_any_tracer, has_no_address_space};
pub(crate) use death::PeerProcess;
pub(crate) use life::{Held, Life};
pub(crate) use memory::{OwnMemory, node_of};
pub(crate) use path::{CopyError, LocalPath, PathParts, PeerMemory, reach};
pub(crate) use shm::{Mapping, SharedFd};
pub(crate) use table::{RemoteRange, Table, TableView};
#[cfg(feature = "sim")]
pub(crate) use {accessors::InProgress, channel::Uses};

/// Layout of the shared memory; both sides must agree.
pub(crate) const LAYOUT: u16 = 3;
