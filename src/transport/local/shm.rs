//! Shared memory: memfds that cannot shrink, and mappings of them.
//!
//! What is mapped here may be written by another process at any time. It is seen only as atomic words, or
//! copied out byte by byte; no Rust reference to its bytes is ever made.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A descriptor that several messages may carry.
pub(crate) type SharedFd = Arc<OwnedFd>;

/// A mapping that cannot be cut short under its user has these.
const REQUIRED_SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes a memfd of `len` zero bytes, of huge pages if asked for. It is not sealed yet.
pub(crate) fn create(name: &std::ffi::CStr, len: usize, huge: bool) -> io::Result<OwnedFd> {
    let huge = if huge { libc::MFD_HUGETLB } else { 0 };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
    // SAFETY: `name` is a C string; the result is checked.
    let raw = check(unsafe { libc::memfd_create(name.as_ptr(), flags) })?;
    // SAFETY: a fresh descriptor that nothing else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    let len = libc::off_t::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: no pointers.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), len) })?;
    Ok(fd)
}

/// Forbids for ever to change the size, and, if `owner_only`, to map it for writing from now on.
pub(crate) fn seal(fd: BorrowedFd<'_>, owner_only: bool) -> io::Result<()> {
    let writing = if owner_only { libc::F_SEAL_FUTURE_WRITE } else { 0 };
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, REQUIRED_SEALS | writing) })?;
    Ok(())
}

/// Takes memory for all of a memfd now, so that touching it later cannot fail.
pub(crate) fn allocate(fd: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: no pointers.
    match unsafe { libc::posix_fallocate(fd.as_raw_fd(), 0, len) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

/// The same memfd, through a descriptor that allows no writing.
pub(crate) fn read_only(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let file = std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(file.into())
}

/// Memory of a memfd, mapped and shared; unmapped when dropped. Children of a fork do not get it.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// Whose it is: at this address a child has nothing, or something of its own.
    process: u32,
}

// SAFETY: the mapping is only used through atomics and raw copies, which any thread may do.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

fn is_of_huge_pages(fd: BorrowedFd<'_>) -> Result<bool, String> {
    let system = nix::sys::statfs::fstatfs(fd).map_err(|e| format!("fstatfs: {e}"))?;
    Ok(system.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC)
}

impl Mapping {
    /// Maps `len` bytes.
    pub(crate) fn new(fd: BorrowedFd<'_>, len: usize, writable: bool) -> io::Result<Self> {
        let access = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                access,
                libc::MAP_SHARED,
                fd.as_fd().as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let Some(start) = NonNull::new(start.cast::<u8>()) else {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        };
        let mapping = Self { start, len, process: std::process::id() };
        mapping.advise(libc::MADV_DONTFORK)?;
        Ok(mapping)
    }

    /// Maps shared memory that another process has made: all of it, if it has a permitted length and
    /// can never be cut short. Of huge pages, holes can be made, and touching one where no such page is free is
    /// a SIGBUS: `may_be_huge` is for who could kill us anyway.
    pub(crate) fn received(
        fd: BorrowedFd<'_>,
        permitted: std::ops::RangeInclusive<usize>,
        writable: bool,
        may_be_huge: bool,
    ) -> Result<Self, String> {
        // SAFETY: no pointers.
        let seals = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) })
            .map_err(|e| format!("it shares something that is no memfd: {e}"))?;
        if seals & REQUIRED_SEALS != REQUIRED_SEALS {
            return Err("it shares memory that is not sealed".into());
        }
        // SAFETY: `stat` is plain data for which all zeroes is a valid value.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: `stat` is writable.
        check(unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) }).map_err(|e| e.to_string())?;
        if !may_be_huge && is_of_huge_pages(fd)? {
            return Err("it shares huge pages, which another user could take away again".into());
        }
        let len = usize::try_from(stat.st_size).unwrap_or(0);
        if !permitted.contains(&len) {
            return Err(format!("it shares memory of {len} bytes"));
        }
        Self::new(fd, len, writable).map_err(|e| format!("its memory cannot be mapped: {e}"))
    }

    pub(crate) fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the range is this mapping.
        check(unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, advice) })?;
        Ok(())
    }

    /// Prefers the memory of one NUMA node for pages that are not there yet.
    pub(crate) fn prefer_node(&self, node: usize) -> io::Result<()> {
        const MPOL_PREFERRED: libc::c_int = 1;
        let mut mask = [0u64; 16];
        let Some(word) = mask.get_mut(node / 64) else { return Ok(()) };
        *word |= 1 << (node % 64);
        // SAFETY: the range is this mapping; `mask` has as many bits as are announced.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.start.as_ptr(),
                self.len,
                MPOL_PREFERRED,
                mask.as_ptr(),
                mask.len() * 64,
                0,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    pub(crate) fn addr(&self) -> u64 {
        self.start.as_ptr() as usize as u64
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The mapping as words. Storing to one that is not mapped for writing is a fault of the caller.
    #[inline]
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: a mapping is aligned to a page and lives as long as `self`; atomics may be changed by
        // others at any time, also from another process.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / 8) }
    }

    /// A word of 32 bits; `None`: it is not inside, or not aligned.
    #[inline]
    pub(crate) fn word32(&self, offset: usize) -> Option<&AtomicU32> {
        // SAFETY: a mapping is aligned to a page and lives as long as `self`; atomics may be changed by others at any time.
        let words: &[AtomicU32] =
            unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / 4) };
        words.get(offset / 4).filter(|_| offset.is_multiple_of(4))
    }

    /// Copies bytes in; false: out of bounds.
    #[inline]
    pub(crate) fn put(&self, offset: usize, bytes: &[u8]) -> bool {
        let fits = offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len);
        if fits {
            // SAFETY: checked to be inside the mapping, which `bytes`, a Rust slice, is not part of.
            unsafe {
                let to = self.start.as_ptr().add(offset);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
            }
        }
        fits
    }

    /// Copies bytes out, once; false: out of bounds.
    #[inline]
    pub(crate) fn get(&self, offset: usize, bytes: &mut [u8]) -> bool {
        let fits = offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len);
        if fits {
            // SAFETY: checked to be inside the mapping. The other side may change the bytes meanwhile:
            // then what arrives is a mixture, which the reader must expect of it.
            unsafe {
                let from = self.start.as_ptr().add(offset);
                std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len());
            }
        }
        fits
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            return;
        }
        // SAFETY: the range is this mapping, and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn a_forked_child_unmaps_nothing_of_its_own_for_the_parents_mapping() {
        let fd = create(c"test", 4096, false).unwrap();
        let mapping = std::mem::ManuallyDrop::new(Mapping::new(fd.as_fd(), 4096, true).unwrap());
        let (start, len) = (mapping.start.as_ptr(), mapping.len);
        // SAFETY: the child makes system calls only, and ends at once.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: a mapping where there is none, as the flag demands; the parent's was not inherited.
            let own = unsafe { libc::mmap(start.cast(), len, libc::PROT_READ, flags, -1, 0) };
            let is_free = own == start.cast();
            drop(std::mem::ManuallyDrop::into_inner(mapping));
            // SAFETY: asks whether the range is mapped.
            let is_there = unsafe { libc::msync(start.cast(), len, libc::MS_ASYNC) } == 0;
            // SAFETY: nothing of the parent's is flushed or dropped.
            unsafe { libc::_exit(i32::from(!is_free) + 2 * i32::from(!is_there)) };
        }
        let mut status = 0;
        // SAFETY: `status` is ours to write to.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(
            (waited, status),
            (child, 0),
            "256: it was inherited; 512: the child's own is gone"
        );
        drop(std::mem::ManuallyDrop::into_inner(mapping));
    }

    #[test]
    fn memory_is_shared_by_its_mappings_and_checked_before_it_is_mapped() {
        let fd = create(c"test", 8192, false).unwrap();
        assert!(Mapping::received(fd.as_fd(), 1..=8192, true, true).is_err(), "not sealed");
        let own = Mapping::new(fd.as_fd(), 8192, true).unwrap();
        seal(fd.as_fd(), true).unwrap();
        assert!(Mapping::received(fd.as_fd(), 1..=4096, false, true).is_err(), "too long");
        assert!(
            Mapping::received(fd.as_fd(), 8192..=8192, true, true).is_err(),
            "the owner writes"
        );
        let other = Mapping::received(fd.as_fd(), 8192..=8192, false, true).unwrap();
        own.words()[1].store(7, Ordering::Relaxed);
        assert_eq!(other.words()[1].load(Ordering::Relaxed), 7);
        assert!(own.put(4000, b"abc") && !own.put(8190, b"abc"));
        let mut out = [0; 3];
        assert!(other.get(4000, &mut out) && !other.get(usize::MAX, &mut out));
        assert_eq!(&out, b"abc");
        let pipe = std::io::pipe().unwrap();
        assert!(Mapping::received(pipe.0.as_fd(), 0..=1 << 20, false, true).is_err());
    }

    #[test]
    fn a_read_only_descriptor_cannot_be_mapped_for_writing() {
        let fd = create(c"test", 4096, false).unwrap();
        seal(fd.as_fd(), false).unwrap();
        let readable = read_only(fd.as_fd()).unwrap();
        assert!(Mapping::received(readable.as_fd(), 4096..=4096, true, true).is_err());
        assert!(Mapping::received(readable.as_fd(), 4096..=4096, false, true).is_ok());
    }

    #[test]
    fn huge_pages_are_mapped_only_from_who_may_be_trusted_with_that() {
        const HUGE: usize = 2 << 20;
        let Ok(fd) = create(c"test", HUGE, true) else {
            eprintln!("not tested: this kernel has no huge pages of 2 MiB");
            return;
        };
        seal(fd.as_fd(), false).unwrap();
        let refused = Mapping::received(fd.as_fd(), HUGE..=HUGE, true, false).unwrap_err();
        assert!(refused.contains("huge pages"), "{refused}");
    }
}
