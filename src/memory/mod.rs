//! Registered memory.

mod flushes;
mod lane_table;
mod registry;

pub(crate) use lane_table::{LaneRegions, RegionUses, Segments};
pub(crate) use registry::{Backing, OwnedRegionCopy, RegionInner, Registry};

pub use crate::wire::{Access, MemoryKind, RegionDescriptor};

use std::sync::Arc;

use crate::engine::Engine;
use crate::error::Error;
use crate::transport::local::OwnMemory;

/// A range of this engine's own memory in a list of descriptors.
///
/// It must lie inside one registered region; `prepare` finds which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalSegment {
    /// First byte.
    pub addr: u64,
    /// Length in bytes; 0 is allowed and moves nothing.
    pub len: u64,
}

/// A range of a peer's memory in a list of descriptors.
#[derive(Debug, Clone, Copy)]
pub struct RemoteSegment<'a> {
    /// The region it lies in.
    pub region: &'a RegionDescriptor,
    /// First byte, in the peer's address space.
    pub addr: u64,
    /// Length in bytes; 0 is allowed and moves nothing.
    pub len: u64,
}

impl RegionDescriptor {
    /// `len` bytes at `offset` of this region; bounds are checked by `prepare`.
    pub fn segment(&self, offset: u64, len: u64) -> RemoteSegment<'_> {
        RemoteSegment { region: self, addr: self.base.saturating_add(offset), len }
    }
}

/// Registered memory of this engine. Cheap to clone; any thread.
///
/// Dropping it deregisters nothing: call [`Engine::deregister`](crate::Engine::deregister).
#[derive(Clone)]
pub struct Region {
    pub(crate) inner: Arc<RegionInner>,
}

impl Region {
    /// The form to hand to peers.
    pub fn descriptor(&self) -> &RegionDescriptor {
        &self.inner.descriptor
    }

    /// `len` bytes at `offset` of this region; bounds are checked by `prepare`.
    pub fn segment(&self, offset: u64, len: u64) -> LocalSegment {
        LocalSegment { addr: self.inner.descriptor.base.saturating_add(offset), len }
    }
}

/// Memory of an engine, registered: see [`Engine::alloc`](crate::Engine::alloc).
///
/// Dropping it deregisters and frees it, waiting for what touches it; what cannot be waited for leaves it
/// allocated and registered, until the engine is gone.
pub struct Buffer {
    pub(crate) region: Region,
    pub(crate) engine: Engine,
    pub(crate) freed: bool,
}

impl Buffer {
    /// The registration: for plans, and its descriptor for peers.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// The first byte. Peers may read and write the memory at any time, as far as its access goes: use it
    /// by raw pointers, or where they do not.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.region().descriptor().base() as usize as *mut u8
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.region().descriptor().len() as usize
    }

    /// Never so.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it lies in huge pages.
    pub fn is_huge(&self) -> bool {
        self.region().inner.memory().is_some_and(OwnMemory::is_huge)
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("region", &self.region).finish_non_exhaustive()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.freed
            && let Err(error) = self.engine.deregister(&self.region)
            && !matches!(error, Error::Shutdown)
        {
            tracing::warn!(%error, "memory of the engine stays allocated");
        }
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let d = self.descriptor();
        f.debug_struct("Region")
            .field("base", &format_args!("{:#x}", d.base))
            .field("len", &d.len)
            .field("kind", &d.kind)
            .field("access", &d.access)
            .finish()
    }
}
