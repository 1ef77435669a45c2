//! Building a plan: checks, merges, splits and encodes two lists of descriptors in one pass.

use std::sync::Arc;

use smallvec::SmallVec;

use super::rdma::{RdmaBuilder, RdmaRequests};
use super::{Chunk, Class, Device, Operation, Piece, PlanInner};
use crate::error::{Error, Result};
use crate::gpu::{BLOCK_BYTES, DeviceBuilder};
use crate::memory::{LocalSegment, Region, RegionInner, Registry, RemoteSegment};
use crate::peer::PeerShared;
use crate::sys::IoSegment;
use crate::transport::local::RemoteRange;
use crate::transport::rdma::near_all;
use crate::wire::frame::{FrameKind, Header, KEY_BYTES, MAX_SEGMENTS, SEGMENT_BYTES};
use crate::wire::{Access, MemoryKind, RegionDescriptor, RegionKey};

/// A list of local descriptors, expanded one at a time.
pub(crate) trait LocalList {
    fn len(&self) -> usize;
    fn get(&self, index: usize) -> LocalSegment;
}

/// A list of remote descriptors, expanded one at a time.
pub(crate) trait RemoteList<'a> {
    fn len(&self) -> usize;
    fn get(&self, index: usize) -> RemoteSegment<'a>;
}

impl LocalList for [LocalSegment] {
    fn len(&self) -> usize {
        <[LocalSegment]>::len(self)
    }

    fn get(&self, index: usize) -> LocalSegment {
        self[index]
    }
}

impl<'a> RemoteList<'a> for [RemoteSegment<'a>] {
    fn len(&self) -> usize {
        <[RemoteSegment<'a>]>::len(self)
    }

    fn get(&self, index: usize) -> RemoteSegment<'a> {
        self[index]
    }
}

/// One pair of ranges of a transfer; see [`Engine::prepare_pairs`](crate::Engine::prepare_pairs).
#[derive(Debug, Clone, Copy)]
pub struct DescriptorPair<'a> {
    /// The range of this engine's memory.
    pub local: LocalSegment,
    /// The registration that the local range belongs to; `None`: any that holds it. Where
    /// registrations overlap, the plan depends on this one only.
    pub region: Option<&'a Region>,
    /// The range of the peer's memory.
    pub remote: RemoteSegment<'a>,
}

/// What a plan is built with.
pub(crate) struct PlanBuilder<'e> {
    pub(crate) operation: Operation,
    pub(crate) peer: &'e Arc<PeerShared>,
    pub(crate) registry: &'e Registry,
    pub(crate) chunk_bytes: u64,
    pub(crate) latency_bytes: u64,
    pub(crate) max_descriptors: usize,
    /// The peer may be on this host: lists for copying by ourselves are wanted.
    pub(crate) local: bool,
    /// The peer may be reached by RDMA: requests for that are wanted.
    pub(crate) rdma: bool,
}

/// Bytes that one thread copies at a time: some 50 us, so that whoever is fair can be. Of a large transfer half of that:
/// several threads copy it then and take turns at the memory, and a caller that asks how it stands, and copies a chunk, has
/// others to look after. Each chunk costs a system call, 0.5 us, and the look at the nonce of a write, 0.9 us.
const COPY_BYTES: u64 = 512 << 10;
const LARGE_COPY_BYTES: u64 = 256 << 10;
/// Larger ones are large; shorter ones are over soon, and the more chunks they are of, the less of them the lane wakes up for.
const LARGE_BYTES: u64 = 8 << 20;

/// The request that is being filled.
struct Open {
    local_start: u32,
    body_start: u32,
    bytes: u64,
    keys: Vec<u128>,
    /// Address, length, key index.
    segments: Vec<(u64, u32, u32)>,
}

struct Output {
    pieces: Vec<Piece>,
    local: Vec<IoSegment>,
    /// For copying by ourselves: the peer's ranges, piece after piece, and where the pieces end.
    remote: Vec<IoSegment>,
    remote_ends: Vec<u32>,
    ranges: Vec<RemoteRange>,
    rdma: Option<RdmaBuilder>,
    device: Option<Box<DeviceBuilder>>,
    /// Of the descriptor before, where GPU memory is copied.
    remote_kind: Option<MemoryKind>,
    /// Bytes of a request.
    chunk_bytes: u64,
    bodies: Vec<u8>,
    regions: SmallVec<[Arc<RegionInner>; 2]>,
    /// One bit for each slot of a region that is in `regions`.
    seen: SmallVec<[u64; 4]>,
    open: Open,
}

impl PlanBuilder<'_> {
    /// Builds the plan from two lists.
    pub(crate) fn build<'d>(
        &self,
        local: &(impl LocalList + ?Sized),
        remote: &(impl RemoteList<'d> + ?Sized),
    ) -> Result<PlanInner> {
        let count = local.len();
        if count != remote.len() {
            return Err(Error::InvalidArgument(format!(
                "{count} local and {} remote descriptors: the lists must have the same length",
                remote.len()
            )));
        }
        self.build_pairs(count, |index| {
            let (local, remote) = (local.get(index), remote.get(index));
            Ok(DescriptorPair { local, region: None, remote })
        })
    }

    /// Builds the plan of `count` pairs, asked for in order.
    ///
    /// Neighbours that are contiguous in one address space and inside one registration become one
    /// segment there, whatever the other side looks like: a TCP request is a stream of bytes.
    pub(crate) fn build_pairs<'d>(
        &self,
        count: usize,
        mut pair: impl FnMut(usize) -> Result<DescriptorPair<'d>>,
    ) -> Result<PlanInner> {
        if count == 0 {
            return Err(Error::InvalidArgument("the descriptor lists are empty".into()));
        }
        if count > self.max_descriptors {
            return Err(Error::Limit {
                what: "descriptors in one plan",
                value: count as u64,
                limit: self.max_descriptors as u64,
            });
        }
        let mut out = Output::new(count, self.rdma, self.chunk_bytes);
        let (mut found, mut named, mut checked) = (None, None, None);
        for index in 0..count {
            let DescriptorPair { local, region, remote } = pair(index)?;
            if local.len != remote.len {
                return Err(Error::InvalidArgument(format!(
                    "descriptor {index} has {} bytes locally and {} remotely",
                    local.len, remote.len
                )));
            }
            self.check_remote(index, &remote, &mut checked)?;
            let own = match region {
                None => self.find_local(index, &local, &mut found)?,
                Some(region) => self.check_local(&local, &region.inner, &mut named)?,
            };
            let own_index = out.add_region(own);
            let host = MemoryKind::Dram;
            if own.descriptor.kind != host || remote.region.kind != host || out.device.is_some() {
                if index > 0 && out.device.is_none() {
                    return Err(Error::InvalidArgument(format!(
                        "descriptor {index} has GPU memory, and those before have none: prepare two plans"
                    )));
                }
                let device = out.device.get_or_insert_with(|| {
                    let (own, theirs) = (&own.descriptor, remote.region);
                    Box::new(DeviceBuilder::new(self.operation, self.peer, own, theirs, count))
                });
                device.add(index, local.addr, own_index, own, &remote)?;
                // As frames, should no GPU reach the peer's memory: one is of one GPU and fits into a block.
                out.chunk_bytes = BLOCK_BYTES as u64;
                if out.remote_kind.replace(remote.region.kind) != Some(remote.region.kind) {
                    self.finish_piece(&mut out);
                }
            }
            self.add_pair(&mut out, local.addr, own, &remote);
            if let Some(rdma) = &mut out.rdma {
                rdma.add(local.addr, own_index, &remote);
            }
        }
        self.finish_piece(&mut out);
        Ok(self.finish(out, count))
    }

    /// Checks a local range against the region that the caller names.
    fn check_local<'r>(
        &self,
        segment: &LocalSegment,
        region: &'r Arc<RegionInner>,
        last: &mut Option<&'r Arc<RegionInner>>,
    ) -> Result<&'r Arc<RegionInner>> {
        let LocalSegment { addr, len } = *segment;
        if !last.is_some_and(|last| Arc::ptr_eq(last, region)) {
            if !self.registry.is_live(region) {
                return Err(Error::NotRegistered { addr, len });
            }
            *last = Some(region);
        }
        if !region.descriptor.contains(addr, len) {
            return Err(out_of_bounds("local", addr, len, &region.descriptor));
        }
        Ok(region)
    }

    fn find_local<'r>(
        &'r self,
        index: usize,
        segment: &LocalSegment,
        last: &mut Option<&'r Arc<RegionInner>>,
    ) -> Result<&'r Arc<RegionInner>> {
        let LocalSegment { addr, len } = *segment;
        if addr.checked_add(len).is_none() {
            return Err(Error::InvalidArgument(format!(
                "descriptor {index}: {len} bytes at {addr:#x} wrap around the address space"
            )));
        }
        if let Some(region) = *last
            && region.descriptor.contains(addr, len)
        {
            return Ok(region);
        }
        let region = self.registry.find(addr, len).ok_or_else(|| {
            // A range that starts inside a region is the more common mistake: say so.
            match self.registry.find(addr, 1) {
                Some(region) if len > 0 => out_of_bounds("local", addr, len, &region.descriptor),
                _ => Error::NotRegistered { addr, len },
            }
        })?;
        *last = Some(region);
        Ok(region)
    }

    fn check_remote<'d>(
        &self,
        index: usize,
        segment: &RemoteSegment<'d>,
        last: &mut Option<&'d RegionDescriptor>,
    ) -> Result<()> {
        let region = segment.region;
        if !last.is_some_and(|last| std::ptr::eq(last, region)) {
            if region.incarnation != self.peer.incarnation {
                return Err(Error::StaleDescriptor { peer: self.peer.name.clone() });
            }
            let needs = match self.operation {
                Operation::Read => Access::REMOTE_READ,
                Operation::Write => Access::REMOTE_WRITE,
            };
            if !region.access.allows(needs) {
                return Err(Error::Permission {
                    peer: self.peer.name.clone(),
                    reason: "the region was registered without this permission",
                });
            }
            *last = Some(region);
        }
        if segment.addr.checked_add(segment.len).is_none() {
            return Err(Error::InvalidArgument(format!(
                "descriptor {index}: {} bytes at {:#x} wrap around the address space",
                segment.len, segment.addr
            )));
        }
        if !region.contains(segment.addr, segment.len) {
            return Err(out_of_bounds("remote", segment.addr, segment.len, region));
        }
        Ok(())
    }

    /// Adds one pair of equally long ranges, opening new requests where one is full.
    fn add_pair(
        &self,
        out: &mut Output,
        local: u64,
        own: &RegionInner,
        remote: &RemoteSegment<'_>,
    ) {
        let bounds = &own.descriptor;
        let mut done = 0;
        while done < remote.len {
            let len = (remote.len - done).min(out.chunk_bytes - out.open.bytes);
            if len == 0 || out.is_full() {
                self.finish_piece(out);
                continue;
            }
            out.push_local(local + done, len, bounds);
            out.push_remote(remote.region.key.0, remote.addr + done, len, remote.region);
            out.open.bytes += len;
            done += len;
        }
    }

    fn finish_piece(&self, out: &mut Output) {
        let Open { local_start, body_start, bytes, .. } = out.open;
        if bytes == 0 {
            return;
        }
        let kind = match self.operation {
            Operation::Read => FrameKind::Read,
            Operation::Write => FrameKind::Write,
        };
        let mut header = Header { len: bytes, ..Header::new(kind) };
        if let [(addr, _, _)] = out.open.segments[..] {
            (header.key, header.addr) = (out.open.keys[0], addr);
        } else {
            for key in &out.open.keys {
                out.bodies.extend_from_slice(&key.to_le_bytes());
            }
            for (addr, len, key) in &out.open.segments {
                let wide = u128::from(*addr) | u128::from(*len) << 64 | u128::from(*key) << 96;
                out.bodies.extend_from_slice(&wide.to_le_bytes());
            }
            header.keys = out.open.keys.len() as u32;
            header.segments = out.open.segments.len() as u32;
            header.body =
                (out.open.keys.len() * KEY_BYTES + out.open.segments.len() * SEGMENT_BYTES) as u32;
        }
        if self.local && out.device.is_none() {
            out.add_remote();
        }
        let (local_end, body_end) = (out.local.len() as u32, out.bodies.len() as u32);
        out.pieces.push(Piece {
            header,
            local: local_start..local_end,
            body: body_start..body_end,
        });
        out.open.local_start = local_end;
        out.open.body_start = body_end;
        out.open.bytes = 0;
        out.open.keys.clear();
        out.open.segments.clear();
    }

    fn finish(&self, mut out: Output, descriptors: usize) -> PlanInner {
        let bytes = out.pieces.iter().map(|piece| piece.header.len).sum();
        if let Some(device) = &out.device {
            out.ranges = device.ranges();
        }
        let near = near_all(out.regions.iter().map(|region| region.registrations.near()));
        let small = out.pieces.len() <= 1 && bytes <= self.latency_bytes;
        PlanInner {
            operation: self.operation,
            class: if small { Class::Latency } else { Class::Bulk },
            peer: self.peer.clone(),
            bytes,
            descriptors,
            regions: out.regions,
            chunks: chunks(&out.pieces, &out.remote_ends, bytes),
            remote_ranges: out.ranges.into_boxed_slice(),
            rdma: out.rdma.map_or_else(RdmaRequests::default, |rdma| rdma.finish(near)),
            device: out.device.map(Device::Listed),
            pieces: out.pieces.into_boxed_slice(),
            local: out.local.into_boxed_slice(),
            remote: out.remote.into_boxed_slice(),
            bodies: out.bodies.into_boxed_slice(),
        }
    }
}

/// Puts small neighbouring pieces together: fewer system calls, each of which takes a thousand segments.
fn chunks(pieces: &[Piece], remote_ends: &[u32], total: u64) -> Box<[Chunk]> {
    let most = if total > LARGE_BYTES { LARGE_COPY_BYTES } else { COPY_BYTES };
    let mut chunks: Vec<Chunk> = Vec::with_capacity(remote_ends.len());
    let (mut start, mut bytes) = (0, 0);
    for (piece, &end) in pieces.iter().zip(remote_ends) {
        let remote = start..end;
        start = end;
        if let Some(open) = chunks.last_mut()
            && bytes + piece.header.len <= most
            && (piece.local.end - open.local.start) as usize <= MAX_SEGMENTS
            && (remote.end - open.remote.start) as usize <= MAX_SEGMENTS
        {
            bytes += piece.header.len;
            (open.local.end, open.remote.end) = (piece.local.end, remote.end);
        } else {
            bytes = piece.header.len;
            chunks.push(Chunk { local: piece.local.clone(), remote });
        }
    }
    chunks.into_boxed_slice()
}

fn out_of_bounds(side: &'static str, addr: u64, len: u64, region: &RegionDescriptor) -> Error {
    let (base, end) = (region.base, region.base + region.len);
    Error::OutOfBounds { side, addr, len, base, end }
}

impl Output {
    fn new(descriptors: usize, rdma: bool, chunk_bytes: u64) -> Self {
        Self {
            rdma: rdma.then(|| RdmaBuilder::new(descriptors)),
            device: None,
            remote_kind: None,
            chunk_bytes,
            pieces: Vec::new(),
            local: Vec::with_capacity(descriptors),
            remote: Vec::new(),
            remote_ends: Vec::new(),
            ranges: Vec::new(),
            // At most; what is not needed goes back at the end.
            bodies: Vec::with_capacity(descriptors * SEGMENT_BYTES),
            regions: SmallVec::new(),
            seen: SmallVec::new(),
            open: Open {
                local_start: 0,
                body_start: 0,
                bytes: 0,
                keys: Vec::new(),
                segments: Vec::with_capacity(descriptors.min(MAX_SEGMENTS)),
            },
        }
    }

    fn is_full(&self) -> bool {
        let local = self.local.len() - self.open.local_start as usize;
        local >= MAX_SEGMENTS || self.open.segments.len() >= MAX_SEGMENTS
    }

    /// Adds a region that is not there yet; the answer is its index.
    fn add_region(&mut self, region: &Arc<RegionInner>) -> usize {
        let count = self.regions.len();
        if self.regions.last().is_some_and(|last| Arc::ptr_eq(last, region)) {
            return count - 1;
        }
        let (word, bit) = (region.slot() / 64, 1 << (region.slot() % 64));
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit == 0 {
            self.seen[word] |= bit;
            self.regions.push(region.clone());
            return count;
        }
        self.regions.iter().rposition(|known| Arc::ptr_eq(known, region)).unwrap_or(0)
    }

    /// The peer's ranges of the open request once more, for copying by ourselves.
    fn add_remote(&mut self) {
        let Self { remote, ranges, open, .. } = self;
        for &(addr, len, index) in &open.segments {
            let end = addr + u64::from(len);
            remote.push(IoSegment::new(addr, u64::from(len)));
            let Some(&key) = open.keys.get(index as usize) else { continue };
            // Segments of one key stand together.
            if let Some(range) = ranges.iter_mut().rev().find(|range| range.key.0 == key) {
                range.start = range.start.min(addr);
                range.end = range.end.max(end);
            } else {
                let key = RegionKey(key);
                ranges.push(RemoteRange { key, digest: key.digest(), start: addr, end });
            }
        }
        self.remote_ends.push(self.remote.len() as u32);
    }

    fn push_local(&mut self, addr: u64, len: u64, bounds: &RegionDescriptor) {
        let first = self.open.local_start as usize;
        if let Some(last) = self.local.get_mut(first..).and_then(<[_]>::last_mut)
            && last.addr() + last.len() as u64 == addr
            && bounds.contains(last.addr(), last.len() as u64 + len)
        {
            *last = IoSegment::new(last.addr(), last.len() as u64 + len);
            return;
        }
        self.local.push(IoSegment::new(addr, len));
    }

    fn push_remote(&mut self, key: u128, addr: u64, len: u64, bounds: &RegionDescriptor) {
        if let Some((start, size, index)) = self.open.segments.last_mut()
            && *start + u64::from(*size) == addr
            && self.open.keys.get(*index as usize) == Some(&key)
            && bounds.contains(*start, u64::from(*size) + len)
        {
            *size += len as u32;
            return;
        }
        let known = self.open.keys.iter().rposition(|known| *known == key);
        let index = known.unwrap_or_else(|| {
            self.open.keys.push(key);
            self.open.keys.len() - 1
        });
        self.open.segments.push((addr, len as u32, index as u32));
    }
}

#[cfg(test)]
#[path = "build_tests.rs"]
mod tests;
