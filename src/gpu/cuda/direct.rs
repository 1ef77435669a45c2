//! Memory of a GPU that other devices of the bus read and write (`GPUDirect` RDMA): how they get at it, and what it takes until what
//! they have written is seen by kernels.

#![cfg_attr(
    not(feature = "rdma"),
    allow(dead_code, reason = "only devices of transport `rdma` get at it")
)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use super::super::GpuError;
use super::api::SUCCESS;
use super::device::Device;
use super::memory::Allocation;

const ATTRIBUTE_FLUSH_OPTIONS: c_int = 117;
const ATTRIBUTE_WRITES_ORDERING: c_int = 118;
const ATTRIBUTE_DMA_BUF: c_int = 124;

/// The host can flush, by `cuFlushGPUDirectRDMAWrites`.
const FLUSH_BY_HOST: c_int = 1;
/// From here on the GPU that owns the memory sees writes in order by itself.
const ORDERED_FOR_OWNER: c_int = 100;
const FLUSH_TARGET_CONTEXT: c_int = 0;
const FLUSH_TO_OWNER: c_int = 100;

const HANDLE_DMA_BUF: c_int = 1;
/// Domain, bus, device and function, and more than that.
const PCI_ADDRESS_BYTES: c_int = 32;
const POINTER_SYNC_MEMOPS: c_int = 6;

/// When kernels see what another device has written to a GPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Visibility {
    /// Those that are launched after the write is known to have ended do.
    Native,
    /// They do once this side has flushed.
    AfterFlush,
}

/// A range of a GPU's memory as a dmabuf, which other devices import.
#[derive(Debug)]
pub(crate) struct DmaBuf {
    fd: OwnedFd,
    offset: u64,
}

impl DmaBuf {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where the range that was asked for begins in it.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }
}

/// The pages of the host that hold a range: the driver exports such only, and lets them reach beyond the allocation. First byte and length; `None`: it wraps around.
fn whole_pages(base: u64, len: u64, page: u64) -> Option<(u64, u64)> {
    let start = base - base % page;
    let end = base.checked_add(len)?.checked_next_multiple_of(page)?;
    Some((start, end - start))
}

impl Device {
    fn attribute(&self, which: c_int) -> Option<c_int> {
        let ask = self.api.device_attribute?;
        let mut value = 0;
        // SAFETY: room for one number.
        let status = unsafe { ask(&raw mut value, which, self.raw) };
        (status == SUCCESS).then_some(value)
    }

    /// Where it is on the PCI bus: `0000:3b:00.0`; `None`: the driver does not say.
    pub(crate) fn pci_address(&self) -> Option<String> {
        let ask = self.api.device_pci_address?;
        let mut text = [0u8; PCI_ADDRESS_BYTES as usize];
        // SAFETY: room for so many bytes, the last of which the driver makes a zero.
        let status =
            unsafe { ask(text.as_mut_ptr().cast::<c_char>(), PCI_ADDRESS_BYTES, self.raw) };
        let text = CStr::from_bytes_until_nul(&text).ok()?.to_str().ok()?;
        (status == SUCCESS && !text.is_empty()).then(|| text.to_owned())
    }

    /// What it takes until kernels see what other devices write.
    ///
    /// # Errors
    /// Nothing helps, so that no device may write: a transfer would end before its data is there.
    pub(crate) fn visibility(&self) -> Result<Visibility, GpuError> {
        let ordering = self.attribute(ATTRIBUTE_WRITES_ORDERING).ok_or_else(|| {
            GpuError("the driver does not say when the GPU sees what other devices write".into())
        })?;
        if ordering >= ORDERED_FOR_OWNER {
            return Ok(Visibility::Native);
        }
        let options = self.attribute(ATTRIBUTE_FLUSH_OPTIONS).unwrap_or(0);
        if options & FLUSH_BY_HOST != 0 && self.api.flush_writes.is_some() {
            return Ok(Visibility::AfterFlush);
        }
        Err(GpuError(
            "the GPU does not see in order what other devices write, and the host cannot flush it"
                .into(),
        ))
    }

    /// Makes what other devices have written visible to kernels that are launched from now on. A microsecond.
    pub(crate) fn flush_writes(&self) -> Result<(), GpuError> {
        let Some(flush) = self.api.flush_writes else {
            return Err(GpuError("the driver has no cuFlushGPUDirectRDMAWrites".into()));
        };
        let _entered = self.enter()?;
        // SAFETY: no pointers; the thread has entered the context.
        let status = unsafe { flush(FLUSH_TARGET_CONTEXT, FLUSH_TO_OWNER) };
        self.check("cuFlushGPUDirectRDMAWrites", status)
    }
}

impl Allocation {
    /// Exports a registered range for other devices.
    ///
    /// # Errors
    /// The driver's, or its lack of the means.
    pub(crate) fn export(&self, base: u64, len: u64) -> Result<DmaBuf, GpuError> {
        let device = self.device();
        let Some(export) = device.api.range_handle else {
            return Err(GpuError("the driver has no cuMemGetHandleForAddressRange".into()));
        };
        if device.attribute(ATTRIBUTE_DMA_BUF) != Some(1) {
            return Err(GpuError(
                "the driver exports no dmabuf of this GPU (it takes NVIDIA's open kernel modules)"
                    .into(),
            ));
        }
        let page = crate::sys::page_size();
        let (start, bytes) = whole_pages(base, len, page)
            .ok_or_else(|| GpuError(format!("{len} bytes at {base:#x} wrap around")))?;
        let bytes = usize::try_from(bytes).map_err(|_| GpuError(format!("{bytes} bytes")))?;
        let _entered = device.enter()?;
        let mut fd: c_int = -1;
        // SAFETY: room for one descriptor; the driver checks the range.
        let status =
            unsafe { export((&raw mut fd).cast::<c_void>(), start, bytes, HANDLE_DMA_BUF, 0) };
        device.api.check("cuMemGetHandleForAddressRange", status)?;
        if fd < 0 {
            return Err(GpuError("cuMemGetHandleForAddressRange gave no descriptor".into()));
        }
        // SAFETY: it was just made, for the caller to close.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(DmaBuf { fd, offset: base - start })
    }

    /// Has calls of the driver that the application takes to be over when they return (copies within a GPU) be over: a device
    /// that then reads the memory waits for no stream.
    pub(crate) fn synchronise_calls(&self, base: u64, len: u64) -> Result<(), GpuError> {
        let device = self.device();
        let Some(set) = device.api.set_pointer_attribute else {
            return Err(GpuError("the driver has no cuPointerSetAttribute".into()));
        };
        let _entered = device.enter()?;
        let on: u32 = 1;
        // It is an attribute of an allocation, and the range may be several.
        let mut at = base;
        while at < base.saturating_add(len) {
            // SAFETY: the attribute is a number of this width; the driver looks the address up.
            let status = unsafe { set((&raw const on).cast(), POINTER_SYNC_MEMOPS, at) };
            device.api.check("cuPointerSetAttribute", status)?;
            let (mut start, mut bytes) = (0, 0);
            // SAFETY: room for two numbers; the driver looks the address up.
            let status = unsafe { (device.api.memory_range)(&raw mut start, &raw mut bytes, at) };
            device.api.check("cuMemGetAddressRange", status)?;
            at = start.saturating_add(bytes as u64).max(at + 1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_exported_is_whole_pages_around_the_range() {
        assert_eq!(whole_pages(0x20_0000, 4096, 4096), Some((0x20_0000, 4096)));
        assert_eq!(whole_pages(0x20_0200, 512, 4096), Some((0x20_0000, 4096)));
        assert_eq!(whole_pages(0x20_0fff, 2, 4096), Some((0x20_0000, 8192)));
        assert_eq!(whole_pages(0x20_1000, 4097, 4096), Some((0x20_1000, 8192)));
        assert_eq!(whole_pages(0x21_0001, 1, 65_536), Some((0x21_0000, 65_536)));
        assert_eq!(whole_pages(u64::MAX - 10, 11, 4096), None);
        assert_eq!(whole_pages(u64::MAX, 2, 4096), None);
    }
}
