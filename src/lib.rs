//! corelane: a transfer engine for LLM inference.
//!
//! A decode node must fetch thousands of scattered KV-cache blocks from a prefill node, learn within
//! microseconds that they have arrived, and never hang when the other side dies. corelane does that
//! with one pinned, io_uring-driven executor per core (a *lane*); every peer belongs to one lane, and
//! every transfer runs on the lane that owns its peer, so the hot path has no contended lock (within a host,
//! the thread that posts a small one copies it). It goes over TCP, RDMA (feature `rdma`, on by default) or within
//! the host ([`EngineConfig::transports`]), and from and to memory of GPUs
//! ([`Engine::register_kind`], [`MemoryKind::Vram`]), too.
//!
//! ```text
//!  application thread                 lane (one core)                       remote lane
//!  ┌────────────────┐  post: one     ┌──────────────────────┐   TCP        ┌──────────────────┐
//!  │ Plan, Transfer │ ─ pointer ───> │ session core: cuts   │ ── READ ───> │ checks the key,  │
//!  │                │                │ requests, counts     │              │ sends straight   │
//!  │ status: 1 load │ <── Done ───── │ answers              │ <── DATA ─── │ out of the region│
//!  └────────────────┘                └──────────────────────┘  into region └──────────────────┘
//! ```
//!
//! ```
//! use corelane::{Access, Engine, EngineConfig, Operation};
//! use std::time::Duration;
//!
//! # fn main() -> corelane::Result<()> {
//! # let config = || {
//! #     let mut config = EngineConfig::default();
//! #     config.listen.addresses = vec![std::net::Ipv4Addr::LOCALHOST.into()];
//! #     config
//! # };
//! let prefill = Engine::new("prefill", config())?;
//! let decode = Engine::new("decode", config())?;
//!
//! let mut cache = vec![7u8; 1 << 20];
//! let mut pages = vec![0u8; 1 << 20];
//! // SAFETY: both buffers outlive their registrations and are not touched while transfers run.
//! let (source, target) = unsafe {
//!     (
//!         prefill.register(cache.as_mut_ptr(), cache.len(), Access::REMOTE_READ)?,
//!         decode.register(pages.as_mut_ptr(), pages.len(), Access::LOCAL)?,
//!     )
//! };
//!
//! // Metadata and descriptors travel over a channel of the application.
//! let peer = decode.load_peer(&prefill.metadata())?;
//! let remote = source.descriptor();
//!
//! let plan = decode.prepare(
//!     Operation::Read,
//!     &peer,
//!     &[target.segment(0, 4096), target.segment(8192, 4096)],
//!     &[remote.segment(65536, 4096), remote.segment(0, 4096)],
//! )?;
//! let transfer = plan.transfer();
//! transfer.post_with_notification(b"request 1: blocks fetched")?;
//! transfer.wait(Duration::from_secs(10))?;
//!
//! decode.deregister(&target)?;
//! prefill.deregister(&source)?;
//! assert_eq!(pages[8192], 7);
//! # Ok(())
//! # }
//! ```
//!
//! Where things are: [`Engine`] starts everything; [`Peer`], [`Region`], [`Plan`] and [`Transfer`]
//! are the words of the API, one module each. `session` is the protocol without sockets and clocks,
//! `transport` moves its frames, copies within a host and posts RDMA requests (over `verbs`), `gpu` copies
//! memory of GPUs, `engine` drives them all on a lane of `corelane-runtime`. The bytes on the wire are in
//! docs/protocol.md.

#![warn(clippy::pedantic)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::module_name_repetitions,
    clippy::must_use_candidate,
    clippy::missing_panics_doc
)]
// The protocol knows of transport `rdma` whether it was built or not.
#![cfg_attr(not(feature = "rdma"), allow(dead_code, unused_imports))]

#[macro_use]
mod mutation;

mod config;
mod engine;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod gpu;
mod memory;
mod notification;
mod peer;
mod plan;
mod session;
#[cfg(feature = "sim")]
#[doc(hidden)]
pub mod sim;
mod stats;
mod sync;
mod sys;
mod transfer;
mod transport;
#[cfg(feature = "rdma")]
mod verbs;
mod wire;

/// Whether there is a GPU and its driver, so that memory of [`MemoryKind::Vram`] can be registered. Until they are
/// found they are looked for again, at most once a second. Where the system has files of GPUs in `/dev`, the driver is not
/// initialised for that.
pub fn supports_gpu_memory() -> bool {
    gpu::gpu_is_present()
}

pub use config::{
    AssistMode, EngineConfig, GpuConfig, GpuRdma, LaneSpec, Limits, Listen, MAX_AGENT_NAME,
    MAX_NOTIFICATION_BYTES, RdmaConfig, Spin, TransportKind,
};
pub use engine::{Engine, LocalEngine, Task};
pub use error::{Error, Result};
pub use memory::{
    Access, Buffer, LocalSegment, MemoryKind, Region, RegionDescriptor, RemoteSegment,
};
pub use notification::Notification;
pub use peer::{Estimate, Peer};
pub use plan::{DescriptorPair, LocalBlocks, Operation, RemoteBlocks};
pub use stats::{EngineStats, PeerStats, Totals};
pub use transfer::{Plan, Status, Transfer};
