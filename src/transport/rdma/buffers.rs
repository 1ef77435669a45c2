//! Registered memory for the messages of one queue pair.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::verbs::{MemoryAccess, MemoryRegion, ProtectionDomain};
use crate::wire::rdma::MESSAGE_BYTES;

/// Buffers of [`MESSAGE_BYTES`] each, which the device writes received messages into and sends others from.
#[derive(Debug)]
pub(super) struct Buffers {
    /// Given back before the memory is.
    region: Option<MemoryRegion>,
    memory: NonNull<u8>,
    layout: Layout,
    count: usize,
}

// SAFETY: the memory belongs to it alone; the device touches only buffers that are posted.
unsafe impl Send for Buffers {}

impl Buffers {
    pub(super) fn new(pd: &Arc<ProtectionDomain>, count: usize) -> io::Result<Self> {
        let too_many = || io::Error::from_raw_os_error(libc::ENOMEM);
        let layout =
            Layout::from_size_align(count.max(1) * MESSAGE_BYTES, 4096).map_err(|_| too_many())?;
        // SAFETY: the layout has a size.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(too_many)?;
        let mut buffers = Self { region: None, memory, layout, count: count.max(1) };
        let access = MemoryAccess { local_write: true, ..MemoryAccess::default() };
        let addr = memory.as_ptr() as usize as u64;
        // SAFETY: the memory is freed after the region has been given back.
        let region = unsafe { MemoryRegion::new(pd, addr, layout.size(), access) }?;
        buffers.region = Some(region);
        Ok(buffers)
    }

    pub(super) fn key(&self) -> u32 {
        self.region.as_ref().map_or(0, MemoryRegion::lkey)
    }

    /// Where a buffer is.
    pub(super) fn addr(&self, index: usize) -> u64 {
        let index = index % self.count;
        self.memory.as_ptr() as usize as u64 + (index * MESSAGE_BYTES) as u64
    }

    /// Copies the first `len` bytes of a buffer that is not posted.
    pub(super) fn read(&self, index: usize, len: usize) -> ([u8; MESSAGE_BYTES], usize) {
        let mut bytes = [0; MESSAGE_BYTES];
        let (index, len) = (index % self.count, len.min(MESSAGE_BYTES));
        // SAFETY: the buffer lies within the memory, and nothing else touches it: its receive has completed.
        unsafe {
            let from = self.memory.as_ptr().add(index * MESSAGE_BYTES);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len);
        }
        (bytes, len)
    }

    /// Fills a buffer that is not posted.
    pub(super) fn write(&mut self, index: usize, bytes: &[u8; MESSAGE_BYTES], len: usize) {
        let (index, len) = (index % self.count, len.min(MESSAGE_BYTES));
        // SAFETY: the buffer lies within the memory, and nothing else touches it: it is not posted.
        unsafe {
            let to = self.memory.as_ptr().add(index * MESSAGE_BYTES);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, len);
        }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        self.region = None;
        // SAFETY: allocated with this layout; the device does not know it any more.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) };
    }
}
