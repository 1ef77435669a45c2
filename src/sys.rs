//! The system calls that move bytes between sockets and registered memory.
//!
//! Registered memory is not a Rust slice: its owner may read and write it at any time, and peers
//! do. So it is only ever named by [`IoSegment`] and touched by the kernel, which answers a range
//! that is not mapped with `EFAULT` instead of a fault signal.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A range of registered memory, in the kernel's own format.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct IoSegment(libc::iovec);

// SAFETY: an `IoSegment` is an address and a length; it gives no access by itself. The functions
// of this module that use it are `unsafe` and name their conditions.
unsafe impl Send for IoSegment {}
// SAFETY: as above; there is no interior mutability.
unsafe impl Sync for IoSegment {}

impl IoSegment {
    pub(crate) fn new(addr: u64, len: u64) -> Self {
        Self(libc::iovec { iov_base: addr as usize as *mut _, iov_len: len as usize })
    }

    /// Memory of this process that the caller keeps alive while the segment is used.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() })
    }

    pub(crate) fn addr(&self) -> u64 {
        self.0.iov_base as usize as u64
    }

    pub(crate) fn len(&self) -> usize {
        self.0.iov_len
    }

    /// The segment without its first `skip` bytes.
    pub(crate) fn advanced(&self, skip: usize) -> Self {
        Self::new(self.addr() + skip as u64, (self.len() - skip) as u64)
    }
}

impl std::fmt::Debug for IoSegment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}+{}", self.addr(), self.len())
    }
}

/// The most segments that one call takes (`IOV_MAX`).
pub(crate) const MAX_IO_SEGMENTS: usize = 1024;

fn result(n: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// One non-blocking `recv` into ordinary memory. `Ok(0)`: the peer has closed.
#[inline]
pub(crate) fn recv(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `buf` is valid for writes of its length for the duration of the call.
    result(unsafe {
        libc::recv(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), libc::MSG_DONTWAIT)
    })
}

fn message(segments: &[IoSegment]) -> libc::msghdr {
    // SAFETY: `msghdr` is plain data for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = segments.as_ptr().cast_mut().cast();
    message.msg_iovlen = segments.len().min(MAX_IO_SEGMENTS) as _;
    message
}

/// One non-blocking `recvmsg` straight into `segments`. `Ok(0)`: the peer has closed.
///
/// # Safety
/// The segments name memory that may be overwritten now: a registered region, or a buffer of the
/// caller. Ranges that are not mapped give `EFAULT`.
#[inline]
pub(crate) unsafe fn recv_segments(
    fd: BorrowedFd<'_>,
    segments: &[IoSegment],
) -> io::Result<usize> {
    let mut message = message(segments);
    // SAFETY: `message` points to `segments`, which outlive the call; the caller answers for what
    // they name. `IoSegment` has the layout of `iovec`.
    result(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
}

/// One non-blocking `sendmsg` straight out of `segments`; never raises SIGPIPE.
///
/// The kernel only reads: a range that is not mapped gives `EFAULT`, and bytes that change
/// meanwhile are sent as they happen to be.
#[inline]
pub(crate) fn send_segments(fd: BorrowedFd<'_>, segments: &[IoSegment]) -> io::Result<usize> {
    let message = message(segments);
    // SAFETY: `message` points to `segments`, which outlive the call. The kernel copies from the
    // ranges they name and checks each address.
    result(unsafe {
        libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    })
}

/// Random bytes from the kernel.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn unmapped_memory_is_an_error_and_not_a_signal() {
        let (a, b) = UnixStream::pair().unwrap();
        let nowhere = [IoSegment::new(4096, 8)];
        let error = send_segments(a.as_fd(), &nowhere).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        assert_eq!(send_segments(a.as_fd(), &[IoSegment::of(b"12345678")]).unwrap(), 8);
        // SAFETY: nothing is mapped there; the kernel refuses.
        let error = unsafe { recv_segments(b.as_fd(), &nowhere) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn bytes_are_scattered_and_gathered() {
        let (a, b) = UnixStream::pair().unwrap();
        let gather =
            [IoSegment::of(b"abc"), IoSegment::of(b""), IoSegment::of(b"defg").advanced(1)];
        assert_eq!(send_segments(a.as_fd(), &gather).unwrap(), 6);
        let (mut x, mut y) = ([0u8; 2], [0u8; 4]);
        let scatter =
            [IoSegment::new(x.as_mut_ptr() as u64, 2), IoSegment::new(y.as_mut_ptr() as u64, 4)];
        // SAFETY: both buffers are live, writable and not borrowed elsewhere.
        assert_eq!(unsafe { recv_segments(b.as_fd(), &scatter) }.unwrap(), 6);
        assert_eq!((&x, &y), (b"ab", b"cefg"));
        let mut one = [0];
        let error = recv(b.as_fd(), &mut one).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
