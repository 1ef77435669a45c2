//! The system calls that reach into another process.
//!
//! Two ways, measured on the development machine (64 B / 4 KiB / 64 KiB, us): through `/proc/PID/mem`
//! 0.85 / 0.89 / 8.0, by `process_vm_readv` 1.15 / 1.18 / 4.8. The first looks the process up, and checks
//! the right to, once, when the file is opened, and then belongs to that address space: whatever becomes of
//! the process ID, it reaches nobody else. It copies twice, and takes one call for each remote range. The
//! second moves a thousand ranges in one call, but goes by the process ID, which may be used again.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::sys::IoSegment;

fn moved(n: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Which process, by its ID in this process's own namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pid(pub(crate) libc::pid_t);

impl Pid {
    pub(crate) fn own() -> Self {
        Self(std::process::id().cast_signed())
    }

    pub(crate) fn is_own(self) -> bool {
        self == Self::own()
    }

    /// Whether the kernel knows a process of this number, be it a dead one that nobody has waited for.
    fn exists(self) -> bool {
        // SAFETY: no pointers, and no signal: the kernel only looks whether one could be sent.
        let answer = unsafe { libc::kill(self.0, 0) };
        answer == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
    }
}

/// Copies from `remote`, ranges of the other process, to `local`. May stop early.
///
/// # Safety
/// `local` names memory that may be overwritten now. Ranges that are not mapped give `EFAULT`.
#[inline]
pub(crate) unsafe fn read(
    pid: Pid,
    local: &[IoSegment],
    remote: &[IoSegment],
) -> io::Result<usize> {
    // SAFETY: both lists outlive the call and have the layout of `iovec`; the kernel checks every
    // address. The caller answers for what is overwritten.
    moved(unsafe {
        libc::process_vm_readv(
            pid.0,
            local.as_ptr().cast(),
            local.len() as _,
            remote.as_ptr().cast(),
            remote.len() as _,
            0,
        )
    })
}

/// Copies from `local` to `remote`, ranges of the other process. May stop early.
#[inline]
pub(crate) fn write(pid: Pid, local: &[IoSegment], remote: &[IoSegment]) -> io::Result<usize> {
    // SAFETY: both lists outlive the call and have the layout of `iovec`; the kernel checks every
    // address, and only reads what is local.
    moved(unsafe {
        libc::process_vm_writev(
            pid.0,
            local.as_ptr().cast(),
            local.len() as _,
            remote.as_ptr().cast(),
            remote.len() as _,
            0,
        )
    })
}

/// The length of a list for one call, which takes 1024 ranges.
#[expect(clippy::cast_possible_wrap, reason = "lists of one call are short")]
fn count_of(list: &[IoSegment]) -> libc::c_int {
    list.len() as libc::c_int
}

/// The address space of another process, as a file: pinned, whatever becomes of the process.
#[derive(Debug)]
pub(crate) struct ProcessMemory(OwnedFd);

impl ProcessMemory {
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        let path = format!("/proc/{}/mem", pid.0);
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self(file.into()))
    }

    /// Copies one range of the other process into `local`. 0: its address space is gone.
    ///
    /// # Safety
    /// As for [`read`].
    #[inline]
    pub(crate) unsafe fn read(&self, local: &[IoSegment], remote: u64) -> io::Result<usize> {
        let (fd, count) = (self.0.as_raw_fd(), count_of(local));
        // SAFETY: the list outlives the call and has the layout of `iovec`; the kernel checks every
        // address. The caller answers for what is overwritten.
        moved(unsafe { libc::preadv(fd, local.as_ptr().cast(), count, remote.cast_signed()) })
    }

    /// Copies `local` to one range of the other process. 0: its address space is gone.
    #[inline]
    pub(crate) fn write(&self, local: &[IoSegment], remote: u64) -> io::Result<usize> {
        let (fd, count) = (self.0.as_raw_fd(), count_of(local));
        // SAFETY: the list outlives the call and has the layout of `iovec`; the kernel checks every
        // address, and only reads what is local.
        moved(unsafe { libc::pwritev(fd, local.as_ptr().cast(), count, remote.cast_signed()) })
    }

    /// Whether no thread lives in this address space any more. Reading then gives nothing, whatever the
    /// address; in a living one an address that is not mapped is an error.
    pub(crate) fn is_empty(&self) -> bool {
        let mut byte = [0u8; 1];
        let into = [IoSegment::of_mut(&mut byte)];
        // SAFETY: `byte` is ours.
        matches!(unsafe { self.read(&into, 1) }, Ok(0))
    }

    /// Whether `value` lies at `addr` there.
    #[inline]
    pub(crate) fn holds(&self, addr: u64, value: &[u8; 16]) -> bool {
        let mut found = [0u8; 16];
        let into = [IoSegment::of_mut(&mut found)];
        // SAFETY: `found` is ours.
        matches!(unsafe { self.read(&into, addr) }, Ok(16)) && found == *value
    }
}

/// Whether `value` lies at `addr` of the process.
pub(crate) fn holds(pid: Pid, addr: u64, value: &[u8; 16]) -> io::Result<bool> {
    let mut found = [0u8; 16];
    let into = [IoSegment::of_mut(&mut found)];
    // SAFETY: `found` is ours.
    let n = unsafe { read(pid, &into, &[IoSegment::new(addr, 16)]) }?;
    Ok(n == 16 && found == *value)
}

/// Whether no thread of the process has an address space any more: it is ending, though the kernel may still be taking its memory
/// away. False where that cannot be seen: without /proc, with the /proc of another PID namespace, and where it hides the process
/// (option `hidepid`). Costs system calls for each thread that has ended already, and some more.
pub(crate) fn has_no_address_space(pid: Pid) -> bool {
    let own = std::fs::read_link("/proc/self").ok();
    let own = own.as_deref().and_then(|link| link.to_str()?.parse().ok());
    if own != Some(Pid::own().0) {
        // The same number is another process there.
        return false;
    }
    let is_gone =
        |error: &io::Error| matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH));
    let threads = match std::fs::read_dir(format!("/proc/{}/task", pid.0)) {
        Ok(threads) => threads,
        Err(error) => return is_gone(&error) && !pid.exists(),
    };
    for thread in threads {
        let memory = match thread {
            Ok(thread) => {
                File::open(thread.path().join("mem")).map(|file| ProcessMemory(file.into()))
            }
            Err(error) => Err(error),
        };
        match memory {
            // What a kernel before 6.15 opens for a thread without one.
            Ok(memory) if memory.is_empty() => {}
            Err(error) if is_gone(&error) => {}
            _ => return false,
        }
    }
    true
}

/// A descriptor of the process itself; readable once it has ended.
pub(crate) fn open_pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) };
    let raw = libc::c_int::try_from(raw).ok().filter(|raw| *raw >= 0);
    let raw = raw.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: a fresh descriptor (close-on-exec by itself) that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Whether the process of this descriptor has ended, with all of its threads.
pub(crate) fn has_exited(pidfd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure, as announced.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 && poll.revents & libc::POLLIN != 0 }
}

/// Who is at the other end of a Unix socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PeerCredentials {
    /// By its ID in our namespace; `None`: it cannot be seen from here.
    pub(crate) pid: Option<Pid>,
    /// It belongs to the user that we belong to.
    pub(crate) same_user: bool,
}

impl PeerCredentials {
    pub(crate) fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        use nix::sys::socket::{getsockopt, sockopt};
        let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
        Ok(Self {
            pid: Some(Pid(credentials.pid())).filter(|pid| pid.0 > 0),
            same_user: credentials.uid() == nix::unistd::geteuid().as_raw(),
        })
    }
}

/// Lets any process of this user reach into this one, where Yama would ask for a named one.
pub(crate) fn allow_any_tracer() -> io::Result<()> {
    // SAFETY: no pointers.
    match unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // A kernel without Yama forbids nothing of the kind.
            error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            error => Err(error),
        },
    }
}
