//! Indexed block lists: KV pages as `base + index * stride`, so that 100,000 blocks need not be
//! 100,000 structs.

use super::{LocalList, RemoteList};
use crate::error::{Error, Result};
use crate::memory::{LocalSegment, RemoteSegment};
use crate::wire::RegionDescriptor;

/// Blocks of this engine's memory: block `i` is `block_bytes` at `base + indices[i] * stride`.
#[derive(Debug, Clone, Copy)]
pub struct LocalBlocks<'a> {
    /// Address of block 0.
    pub base: u64,
    /// Distance between the starts of neighbouring blocks in bytes.
    pub stride: u64,
    /// Length of a block in bytes.
    pub block_bytes: u64,
    /// Which blocks, in which order.
    pub indices: &'a [u32],
}

/// Blocks of a peer's memory: block `i` is `block_bytes` at `base + indices[i] * stride`.
#[derive(Debug, Clone, Copy)]
pub struct RemoteBlocks<'a> {
    /// The region that all blocks lie in.
    pub region: &'a RegionDescriptor,
    /// Address of block 0, in the peer's address space.
    pub base: u64,
    /// Distance between the starts of neighbouring blocks in bytes.
    pub stride: u64,
    /// Length of a block in bytes.
    pub block_bytes: u64,
    /// Which blocks, in which order.
    pub indices: &'a [u32],
}

/// Block addresses must not wrap: checked once for the largest index.
fn check(base: u64, stride: u64, block_bytes: u64, indices: &[u32]) -> Result<()> {
    let largest = u64::from(indices.iter().copied().max().unwrap_or(0));
    let end = largest
        .checked_mul(stride)
        .and_then(|offset| offset.checked_add(base))
        .and_then(|start| start.checked_add(block_bytes));
    match end {
        Some(_) => Ok(()),
        None => Err(Error::InvalidArgument(format!(
            "block {largest} of {block_bytes} bytes at {base:#x} + {largest} * {stride} wraps \
             around the address space"
        ))),
    }
}

impl LocalBlocks<'_> {
    pub(crate) fn check(&self) -> Result<()> {
        check(self.base, self.stride, self.block_bytes, self.indices)
    }
}

impl RemoteBlocks<'_> {
    pub(crate) fn check(&self) -> Result<()> {
        check(self.base, self.stride, self.block_bytes, self.indices)
    }
}

impl LocalList for LocalBlocks<'_> {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn get(&self, index: usize) -> LocalSegment {
        let addr = self.base + u64::from(self.indices[index]) * self.stride;
        LocalSegment { addr, len: self.block_bytes }
    }
}

impl<'a> RemoteList<'a> for RemoteBlocks<'a> {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn get(&self, index: usize) -> RemoteSegment<'a> {
        let addr = self.base + u64::from(self.indices[index]) * self.stride;
        RemoteSegment { region: self.region, addr, len: self.block_bytes }
    }
}
