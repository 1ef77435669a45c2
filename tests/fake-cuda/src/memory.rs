//! Memory: of a GPU, which the process itself cannot touch, and pinned.

use std::collections::BTreeMap;
use std::ffi::{CString, c_int};
use std::ptr;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// What decides which GPUs' kernels reach it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Of a GPU: others do once their contexts may. Pinned: all do.
    Plain,
    /// Of a pool of a GPU: no other does.
    Pool,
    /// Write-combined: all do, where they have it, which is not where the host has it.
    Elsewhere,
    /// Another process's, mapped for this GPU.
    Mapped(c_int),
}

/// What lies between the addresses that the host and GPUs have for the same memory.
const ELSEWHERE: u64 = 1 << 46;

/// An allocation, or one of another process that was mapped.
#[derive(Clone, Copy)]
pub(crate) struct Allocation {
    pub(crate) base: u64,
    pub(crate) len: usize,
    /// `None`: pinned host memory.
    pub(crate) gpu: Option<c_int>,
    pub(crate) kind: Kind,
    /// Never given to another one.
    pub(crate) id: u64,
    /// Where it can be touched.
    shadow: u64,
    pub(crate) fd: c_int,
}

static ALL: LazyLock<Mutex<(BTreeMap<u64, Allocation>, u64)>> = LazyLock::new(Mutex::default);

fn all() -> MutexGuard<'static, (BTreeMap<u64, Allocation>, u64)> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

fn map(fd: c_int, len: usize, protection: c_int) -> Option<u64> {
    let flags = if fd < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    // SAFETY: a new mapping, where the kernel likes it.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, 0) };
    (start != libc::MAP_FAILED).then_some(start as u64)
}

fn add(fd: c_int, len: usize, gpu: Option<c_int>, kind: Kind) -> Option<Allocation> {
    const OPEN: c_int = libc::PROT_READ | libc::PROT_WRITE;
    let base = map(fd, len, if gpu.is_some() { libc::PROT_NONE } else { OPEN })?;
    let shadow = if gpu.is_some() { map(fd, len, OPEN)? } else { base };
    let mut all = all();
    all.1 += 1;
    let allocation = Allocation { base, len, gpu, kind, id: all.1, shadow, fd };
    all.0.insert(base, allocation);
    Some(allocation)
}

pub(crate) fn pinned(len: usize, kind: Kind) -> Option<Allocation> {
    add(-1, len, None, kind)
}

pub(crate) fn of_gpu(len: usize, gpu: c_int, kind: Kind) -> Option<Allocation> {
    // SAFETY: the name ends in a zero; what is wrong with the rest, the kernel says.
    let fd = unsafe {
        let fd = libc::memfd_create(c"fake-gpu".as_ptr(), libc::MFD_CLOEXEC);
        (fd >= 0 && libc::ftruncate(fd, len as libc::off_t) == 0).then_some(fd)?
    };
    add(fd, len, Some(gpu), kind)
}

/// Memory of another process, by what its `of_gpu` has made, for GPU `by` of this one.
pub(crate) fn of_process(
    (pid, fd): (u32, c_int),
    len: usize,
    gpu: c_int,
    by: c_int,
) -> Option<Allocation> {
    let path = CString::new(format!("/proc/{pid}/fd/{fd}")).ok()?;
    // SAFETY: the path ends in a zero.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    add(fd, len, Some(gpu), Kind::Mapped(by))
}

/// A descriptor of whole pages of a GPU's memory; its position is where they begin.
pub(crate) fn export(address: u64, len: usize) -> Option<c_int> {
    // SAFETY: no pointers.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    let found = at(address).filter(|found| found.gpu.is_some())?;
    let offset = (address - found.base) as usize;
    let whole = found.len.next_multiple_of(page);
    let is_whole = (address as usize).is_multiple_of(page) && len.is_multiple_of(page);
    if len == 0 || !is_whole || offset + len > whole {
        return None;
    }
    // With a position of its own, which a duplicate would not have.
    let path = CString::new(format!("/proc/self/fd/{}", found.fd)).ok()?;
    // SAFETY: the path ends in a zero; what is wrong with the rest, the kernel says.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        (fd >= 0 && libc::lseek(fd, offset as libc::off_t, libc::SEEK_SET) >= 0).then_some(fd)
    }
}

/// Whether there was such a one.
pub(crate) fn free(base: u64) -> bool {
    let Some(gone) = all().0.remove(&base) else { return false };
    // SAFETY: mappings of our own, which the caller does not want any more.
    unsafe {
        libc::munmap(gone.base as *mut _, gone.len);
        if gone.gpu.is_some() {
            libc::munmap(gone.shadow as *mut _, gone.len);
            libc::close(gone.fd);
        }
    }
    true
}

pub(crate) fn at(address: u64) -> Option<Allocation> {
    let all = all();
    let (_, found) = all.0.range(..=address).next_back()?;
    (address < found.base + found.len as u64).then_some(*found)
}

/// Where all of a range can be touched; `None`: it is not all in one allocation.
pub(crate) fn shadow(address: u64, len: usize) -> Option<u64> {
    let found = at(address)?;
    let offset = address - found.base;
    (offset as usize + len <= found.len).then_some(found.shadow + offset)
}

impl Allocation {
    /// The GPU in whose context it is found; `None`: in any.
    pub(crate) fn context(&self) -> Option<c_int> {
        if let Kind::Mapped(by) = self.kind { Some(by) } else { self.gpu }
    }

    /// Where GPUs have an address of it.
    pub(crate) fn on_gpus(&self, address: u64) -> u64 {
        if self.kind == Kind::Elsewhere { address + ELSEWHERE } else { address }
    }

    /// Whether a kernel of GPU `by`, whose context has access to those of `peers`, reaches it where the host has it.
    pub(crate) fn is_reached(&self, by: c_int, peers: u64) -> bool {
        match (self.kind, self.gpu) {
            (Kind::Elsewhere, _) => false,
            (Kind::Mapped(to), _) => to == by,
            (_, None) => true,
            (_, Some(gpu)) if gpu == by => true,
            (Kind::Pool, _) => false,
            (Kind::Plain, Some(gpu)) => peers & 1 << gpu != 0,
        }
    }
}
