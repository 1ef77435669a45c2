//! Registered memory.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as sys;

use super::device::ProtectionDomain;

/// What may be done with registered memory, besides reading it by this side.
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent rights, as the flags of verbs are")]
pub(crate) struct MemoryAccess {
    pub(crate) local_write: bool,
    pub(crate) remote_read: bool,
    pub(crate) remote_write: bool,
    /// Writes may pass each other on the way to memory; a completion still comes after all of them.
    pub(crate) relaxed_ordering: bool,
    /// Pages are not pinned, but faulted in by the device when it touches them.
    pub(crate) on_demand: bool,
}

impl MemoryAccess {
    fn bits(self) -> u32 {
        use sys::ibv_access_flags as flag;
        let chosen = [
            (self.local_write, flag::IBV_ACCESS_LOCAL_WRITE),
            (self.remote_read, flag::IBV_ACCESS_REMOTE_READ),
            (self.remote_write, flag::IBV_ACCESS_REMOTE_WRITE),
            (self.relaxed_ordering, flag::IBV_ACCESS_RELAXED_ORDERING),
            (self.on_demand, flag::IBV_ACCESS_ON_DEMAND),
        ];
        chosen.iter().filter(|(on, _)| *on).fold(0, |bits, (_, chosen)| bits | chosen.0)
    }
}

/// Why memory behind a dmabuf cannot be registered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DmaBufError {
    #[error("libibverbs is too old for it (rdma-core before 34)")]
    NoEntryPoint,
    #[error("the device or its driver takes no dmabuf: {0}")]
    Unsupported(#[source] io::Error),
    #[error(transparent)]
    Refused(io::Error),
}

impl DmaBufError {
    fn of(error: io::Error) -> Self {
        match error.raw_os_error() {
            // The kernel's words for a driver that has no such function, and libibverbs' for a provider.
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) => Self::Unsupported(error),
            _ => Self::Refused(error),
        }
    }
}

/// A memory region (`ibv_mr`). Any thread. When it is dropped, the device does not touch the memory any more.
#[derive(Debug)]
pub(crate) struct MemoryRegion {
    mr: NonNull<sys::ibv_mr>,
    lkey: u32,
    rkey: u32,
    pd: Arc<ProtectionDomain>,
}

// SAFETY: the keys never change, and deregistering is thread-safe.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// Registers memory of this process: pins it, page by page, which takes some 0.3 us each.
    ///
    /// # Safety
    /// The range stays mapped until this is dropped. What peers and own work requests write to it, they may.
    pub(crate) unsafe fn new(
        pd: &Arc<ProtectionDomain>,
        addr: u64,
        len: usize,
        access: MemoryAccess,
    ) -> io::Result<Self> {
        let (api, bits, start) = (pd.device.api, access.bits(), addr as *mut std::ffi::c_void);
        // SAFETY: the kernel checks the range and the rights; the caller answers for what happens to its bytes. Access
        // flags that an old kernel does not know are only for the second entry point, which lets it ignore them.
        let mr = unsafe {
            if let Some(register) = api.ibv_reg_mr_iova2 {
                register(pd.as_ptr(), start, len, addr, bits)
            } else {
                let plain = MemoryAccess { relaxed_ordering: false, ..access }.bits();
                (api.ibv_reg_mr)(pd.as_ptr(), start, len, plain.cast_signed())
            }
        };
        Self::of(mr, pd)
    }

    /// Registers `len` bytes at `offset` of the memory behind a dmabuf, which work requests and peers address from `iova` on.
    /// The region keeps that memory, so that the descriptor may be closed and its exporter free what it exported.
    ///
    /// # Safety
    /// What peers and own work requests write to it, they may.
    ///
    /// # Errors
    /// Why not, in particular whether it is in vain to try again.
    pub(crate) unsafe fn of_dmabuf(
        pd: &Arc<ProtectionDomain>,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        iova: u64,
        access: MemoryAccess,
    ) -> Result<Self, DmaBufError> {
        let register = pd.device.api.ibv_reg_dmabuf_mr.ok_or(DmaBufError::NoEntryPoint)?;
        // The kernel maps the buffer as a whole: there is nothing to fault in.
        let bits = MemoryAccess { on_demand: false, ..access }.bits().cast_signed();
        // SAFETY: the kernel checks descriptor, range and rights; the caller answers for what happens to the bytes.
        let mr = unsafe { register(pd.as_ptr(), offset, len, iova, fd.as_raw_fd(), bits) };
        Self::of(mr, pd).map_err(DmaBufError::of)
    }

    fn of(mr: *mut sys::ibv_mr, pd: &Arc<ProtectionDomain>) -> io::Result<Self> {
        let mr = NonNull::new(mr).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: it was just made, and its keys never change.
        let (lkey, rkey) = unsafe { (mr.as_ref().lkey, mr.as_ref().rkey) };
        Ok(Self { mr, lkey, rkey, pd: pd.clone() })
    }

    /// Names the memory in our own work requests.
    pub(crate) fn lkey(&self) -> u32 {
        self.lkey
    }

    /// Opens the memory to work requests of peers.
    pub(crate) fn rkey(&self) -> u32 {
        self.rkey
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: it is deregistered once. Work requests that name it fail from now on.
        unsafe { (self.pd.device.api.ibv_dereg_mr)(self.mr.as_ptr()) };
    }
}
