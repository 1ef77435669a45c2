//! The system calls that move bytes between sockets and registered memory.
//!
//! Registered memory is not a Rust slice: its owner may read and write it at any time, and peers
//! do. So it is only ever named by [`IoSegment`] and touched by the kernel, which answers a range
//! that is not mapped with `EFAULT` instead of a fault signal.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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

    /// As [`of`](Self::of), for memory that will be written.
    pub(crate) fn of_mut(bytes: &mut [u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() })
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

/// Bytes of a page of this host.
pub(crate) fn page_size() -> u64 {
    // SAFETY: no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}

/// The NUMA node of the page at each address; `None`: it is not there yet, or the kernel does not say. One system call.
#[cfg(feature = "rdma")]
pub(crate) fn node_of_pages(addresses: &[u64]) -> Vec<Option<usize>> {
    let mut nodes: Vec<libc::c_int> = vec![-1; addresses.len()];
    let (own_process, count, no_targets, no_flags) =
        (0, addresses.len(), std::ptr::null::<libc::c_int>(), 0);
    // SAFETY: both lists are as long as said. Without targets the kernel moves nothing: it reads the addresses, which may be
    // anything, and writes the nodes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            own_process,
            count,
            addresses.as_ptr(),
            no_targets,
            nodes.as_mut_ptr(),
            no_flags,
        )
    };
    let known = |node: libc::c_int| usize::try_from(node).ok().filter(|_| result == 0);
    nodes.into_iter().map(known).collect()
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

/// Descriptors that came, or go, with the first byte of a message.
pub(crate) type Fds = smallvec::SmallVec<[OwnedFd; 2]>;

/// Room for the control message of as many descriptors as one message may carry.
#[repr(align(8))]
struct ControlBuffer([u8; 64]);

/// As [`recv`], on a Unix socket: descriptors that come with the bytes are added to `fds`.
pub(crate) fn recv_with_fds(
    fd: BorrowedFd<'_>,
    buf: &mut [u8],
    fds: &mut Fds,
) -> io::Result<usize> {
    let into = [IoSegment::of_mut(buf)];
    let mut message = message(&into);
    let mut control = ControlBuffer([0; 64]);
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len() as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` points to `into` and `control`, which outlive the call; `buf` is ours.
    let n = result(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) })?;
    // SAFETY: the kernel has filled `control` with whole headers; the loop follows them as CMSG(3) says,
    // and takes each descriptor over once.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while let Some(one) = header.as_ref() {
            if one.cmsg_level == libc::SOL_SOCKET && one.cmsg_type == libc::SCM_RIGHTS {
                #[expect(clippy::cast_ptr_alignment, reason = "read as unaligned")]
                let data = libc::CMSG_DATA(header).cast::<libc::c_int>();
                let bytes = one.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                for index in 0..bytes / size_of::<libc::c_int>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok(n)
}

/// One non-blocking `sendmsg` on a Unix socket, with up to two descriptors.
pub(crate) fn send_with_fds(
    fd: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let from = [IoSegment::of(bytes)];
    let mut message = message(&from);
    let mut control = ControlBuffer([0; 64]);
    let raw: smallvec::SmallVec<[libc::c_int; 2]> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let len = size_of_val(&raw[..]);
    // SAFETY: computes a length.
    let space = unsafe { libc::CMSG_SPACE(len as libc::c_uint) } as usize;
    if space > control.0.len() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    if !raw.is_empty() {
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = space as _;
        // SAFETY: `control` has room for one header and the numbers, which was just checked.
        unsafe {
            if let Some(header) = libc::CMSG_FIRSTHDR(&raw const message).as_mut() {
                header.cmsg_level = libc::SOL_SOCKET;
                header.cmsg_type = libc::SCM_RIGHTS;
                header.cmsg_len = libc::CMSG_LEN(len as libc::c_uint) as _;
                let data = libc::CMSG_DATA(header);
                std::ptr::copy_nonoverlapping(raw.as_ptr().cast::<u8>(), data, len);
            }
        }
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` points to `from` and `control`, which outlive the call.
    result(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
}

/// What [`host_id`] is where the host is not known.
const NO_HOST: u64 = 0;

/// Whether memory is on this host by the number that its owner told. A host that is not known is nobody's.
pub(crate) fn is_own_host(id: u64) -> bool {
    is_one_host(id, host_id())
}

fn is_one_host(a: u64, b: u64) -> bool {
    a == b && a != NO_HOST
}

/// A number of this host's since it was started: the same in all of its containers.
pub(crate) fn host_id() -> u64 {
    use sha2::{Digest, Sha256};
    static ID: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *ID.get_or_init(|| {
        let Ok(id) = std::fs::read("/proc/sys/kernel/random/boot_id") else {
            // Nobody's: then nobody takes this host for its own.
            return random().map_or(NO_HOST, u64::from_le_bytes);
        };
        let hash: [u8; 32] =
            Sha256::new_with_prefix(b"corelane host").chain_update(id).finalize().into();
        let mut short = [0; 8];
        short.copy_from_slice(&hash[..8]);
        u64::from_le_bytes(short)
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
    fn a_host_that_is_not_known_is_no_hosts_own() {
        assert!(is_own_host(host_id()) && !is_own_host(host_id() ^ 1));
        assert!(is_one_host(7, 7) && !is_one_host(7, 8));
        assert!(!is_own_host(NO_HOST) && !is_one_host(NO_HOST, NO_HOST));
    }

    #[cfg(feature = "rdma")]
    #[test]
    fn pages_that_were_touched_have_a_node_and_others_none() {
        let touched = vec![7u8; 4096];
        let nodes = node_of_pages(&[touched.as_ptr() as u64, 4096]);
        assert_eq!(nodes[1], None);
        // A kernel without NUMA does not know the call.
        if std::path::Path::new("/sys/devices/system/node/node0").exists() {
            assert!(nodes[0].is_some(), "{nodes:?}");
        }
    }

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
    fn descriptors_travel_with_their_bytes() {
        let (a, b) = UnixStream::pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let sent = [writer.as_fd(), reader.as_fd()];
        assert_eq!(send_with_fds(a.as_fd(), b"with", &sent).unwrap(), 4);
        assert_eq!(send_with_fds(a.as_fd(), b"without", &[]).unwrap(), 7);
        let (mut fds, mut bytes) = (Fds::new(), [0; 16]);
        let n = recv_with_fds(b.as_fd(), &mut bytes, &mut fds).unwrap();
        assert_eq!((&bytes[..n], fds.len()), (&b"with"[..], 2), "not glued to what follows");
        drop((reader, writer));
        std::io::Write::write_all(&mut std::fs::File::from(fds.remove(0)), b"x").unwrap();
        let mut one = [0];
        std::io::Read::read_exact(&mut std::fs::File::from(fds.remove(0)), &mut one).unwrap();
        assert_eq!(&one, b"x");
        let n = recv_with_fds(b.as_fd(), &mut bytes, &mut fds).unwrap();
        assert_eq!((&bytes[..n], fds.len()), (&b"without"[..], 0));
        let four = [a.as_fd(); 20];
        assert!(send_with_fds(a.as_fd(), b"x", &four).is_err());
    }

    #[test]
    fn a_socket_that_nobody_reads_is_an_error_and_not_a_signal() {
        let (a, b) = UnixStream::pair().unwrap();
        drop(b);
        // In a child, whose signals are those of a program in C: the standard library ignores this one.
        // SAFETY: the child makes system calls only, with memory that was there before.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "{}", io::Error::last_os_error());
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
            let sent = [
                send_segments(a.as_fd(), &[IoSegment::of(b"x")]),
                send_with_fds(a.as_fd(), b"x", &[]),
            ];
            let broken = |result: &io::Result<usize>| {
                result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EPIPE))
            };
            // SAFETY: as above; nothing of the parent's is flushed or dropped.
            unsafe { libc::_exit(i32::from(!sent.iter().all(broken))) };
        }
        let mut status = 0;
        // SAFETY: `status` is ours to write to.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "a signal, or the wrong error");
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
