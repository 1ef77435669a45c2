//! Plans: prepared descriptor lists.
//!
//! Everything that can be done once is done here: checks, merging, splitting, encoding. Posting a
//! plan touches nothing but what is sent.

mod build;
mod rdma;
mod strided;

pub use build::DescriptorPair;
pub use strided::{LocalBlocks, RemoteBlocks};

pub(crate) use build::{LocalList, PlanBuilder, RemoteList};
pub(crate) use rdma::RdmaRequests;

use std::sync::Arc;

use smallvec::SmallVec;

use crate::gpu::{Allocation, DeviceBuilder, DevicePlan};
use crate::memory::RegionInner;
use crate::peer::PeerShared;
use crate::sys::IoSegment;
use crate::transfer::Issuer;
use crate::transport::local::RemoteRange;
use crate::wire::frame::Header;

/// Which way a transfer moves bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// From the peer's memory into ours.
    Read,
    /// From our memory into the peer's.
    Write,
}

/// The class of traffic of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// One small request on the session's stream.
    Latency,
    /// Requests of `chunk_bytes` on the bulk streams.
    Bulk,
}

/// One request of a plan: a range of the local list and an encoded list of remote segments.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    /// Everything but request and transfer number.
    pub(crate) header: Header,
    local: std::ops::Range<u32>,
    body: std::ops::Range<u32>,
}

/// What one thread copies at a time where the initiator copies by itself: a few whole pieces.
#[derive(Debug, Clone)]
pub(crate) struct Chunk {
    local: std::ops::Range<u32>,
    remote: std::ops::Range<u32>,
}

/// What `prepare` makes; shared by all transfers of the plan.
#[derive(Debug)]
pub(crate) struct PlanInner {
    pub(crate) operation: Operation,
    pub(crate) class: Class,
    pub(crate) peer: Arc<PeerShared>,
    pub(crate) pieces: Box<[Piece]>,
    pub(crate) bytes: u64,
    pub(crate) descriptors: usize,
    /// The local regions that the plan touches.
    pub(crate) regions: SmallVec<[Arc<RegionInner>; 2]>,
    /// Empty where the peer is on another host, or its memory must not be reached directly.
    pub(crate) chunks: Box<[Chunk]>,
    /// What the chunks touch of the peer's memory, by key.
    pub(crate) remote_ranges: Box<[RemoteRange]>,
    pub(crate) rdma: RdmaRequests,
    /// How GPU memory in it is copied: not in chunks.
    pub(crate) device: Option<Device>,
    local: Box<[IoSegment]>,
    remote: Box<[IoSegment]>,
    bodies: Box<[u8]>,
}

/// The GPU's part of a plan.
#[derive(Debug)]
pub(crate) enum Device {
    /// Checked, and not known to any GPU.
    Listed(Box<DeviceBuilder>),
    /// A GPU of ours copies it where the peer turns out to be reached so; else it goes as RDMA requests or as frames. Where
    /// callers may begin the copy, with what they do that by.
    Ready(Box<DevicePlan>, Option<Arc<Issuer>>),
    /// No GPU of ours does, because of this: it goes as RDMA requests or as frames.
    Elsewhere(String),
}

impl PlanInner {
    /// In how many parts it is copied, where this side copies.
    pub(crate) fn parts(&self) -> usize {
        if self.device.is_some() { 1 } else { self.chunks.len() }
    }

    /// What a GPU copies of it.
    pub(crate) fn on_device(&self) -> Option<&DevicePlan> {
        match &self.device {
            Some(Device::Ready(plan, _)) => Some(plan),
            Some(Device::Listed(_) | Device::Elsewhere(_)) | None => None,
        }
    }

    /// By what callers begin its copy, if they may.
    #[inline]
    pub(crate) fn issuer(&self) -> Option<&Arc<Issuer>> {
        match &self.device {
            Some(Device::Ready(_, issuer)) => issuer.as_ref(),
            _ => None,
        }
    }

    /// A region of ours in the memory of a GPU that is not what was registered any more.
    pub(crate) fn freed_region(&self) -> Option<&Arc<RegionInner>> {
        self.regions.iter().find(|region| region.gpu().is_some_and(|gpu| !gpu.is_live()))
    }

    /// Whether all that a GPU is going to touch is there. A kernel that touches memory which is gone takes the model's context down:
    /// better to look first.
    pub(crate) fn is_memory_live(&self) -> bool {
        self.freed_region().is_none() && self.on_device().is_some_and(DevicePlan::is_live)
    }

    /// The memory of a GPU that this engine's side is.
    pub(crate) fn own_gpu(&self) -> Option<&Allocation> {
        self.device.as_ref().and(self.regions.first()).and_then(|region| region.gpu())
    }

    /// The GPU that has to be told before it sees what a device has written for this plan.
    #[cfg(feature = "rdma")]
    #[inline]
    pub(crate) fn flush(&self) -> Option<&'static crate::gpu::Device> {
        self.device.as_ref()?;
        // One kind of memory on a side, where a GPU is part of it.
        let own = self.regions.first().filter(|_| self.operation == Operation::Read)?;
        own.registrations.flush()
    }

    /// Whether these rails carry it, ours and the peer's: all that it touches is registered with both. A comparison for each
    /// region.
    #[inline]
    pub(crate) fn is_open_on(&self, own: usize, theirs: usize) -> bool {
        self.rdma.is_open_on(theirs)
            && self.regions.iter().all(|region| region.registrations.key(own) != 0)
    }

    /// Whether devices may come to carry it: each region that it touches is registered with some, on its side.
    pub(crate) fn may_be_wired(&self) -> bool {
        !self.rdma.runs.is_empty()
            && self.rdma.keys.iter().all(|keys| keys.iter().any(|key| *key != 0))
            && self.regions.iter().all(|region| region.registrations.is_some())
    }

    /// Why devices do not carry it: what is not registered, on which side.
    pub(crate) fn why_not_wired(&self) -> String {
        let refused =
            |region: &Arc<RegionInner>| region.registrations.why_refused().map(str::to_owned);
        if let Some(region) = self.regions.iter().find(|region| !region.registrations.is_some()) {
            let why = refused(region).map(|why| format!(" ({why})")).unwrap_or_default();
            let base = region.descriptor.base();
            return format!("our memory at {base:#x} is not registered with an RDMA device{why}");
        }
        if self.rdma.keys.iter().any(|keys| keys.iter().all(|key| *key == 0)) {
            return "the peer's memory is not registered with an RDMA device of its (its log says why)".into();
        }
        let why = self.regions.iter().find_map(refused).map(|why| format!(" (ours: {why})"));
        let why = why.unwrap_or_default();
        format!("no two RDMA devices that reach each other have both sides' memory{why}")
    }

    /// Where the bytes of a piece lie in this engine's memory.
    pub(crate) fn local(&self, piece: u32) -> &[IoSegment] {
        self.pieces.get(piece as usize).map_or(&[], |piece| {
            let range = piece.local.start as usize..piece.local.end as usize;
            self.local.get(range).unwrap_or(&[])
        })
    }

    /// Where the bytes of a chunk lie in this engine's memory.
    pub(crate) fn chunk_local(&self, chunk: usize) -> &[IoSegment] {
        self.chunks.get(chunk).map_or(&[], |chunk| {
            self.local.get(chunk.local.start as usize..chunk.local.end as usize).unwrap_or(&[])
        })
    }

    /// Where the bytes of a chunk lie in the peer's memory.
    pub(crate) fn chunk_remote(&self, chunk: usize) -> &[IoSegment] {
        self.chunks.get(chunk).map_or(&[], |chunk| {
            self.remote.get(chunk.remote.start as usize..chunk.remote.end as usize).unwrap_or(&[])
        })
    }

    /// The segment table of a piece, as it goes on the wire.
    pub(crate) fn body(&self, piece: u32) -> &[u8] {
        self.pieces.get(piece as usize).map_or(&[], |piece| {
            let range = piece.body.start as usize..piece.body.end as usize;
            self.bodies.get(range).unwrap_or(&[])
        })
    }
}
