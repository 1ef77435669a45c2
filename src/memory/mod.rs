//! Registered memory.

mod lane_table;
mod registry;

pub(crate) use lane_table::{LaneRegions, RegionUses, Segments};
pub(crate) use registry::{RegionInner, Registry};

pub use crate::wire::{Access, MemoryKind, RegionDescriptor};

use std::sync::Arc;

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
