//! The sockets of another process, reached from outside and without its knowledge.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn own(raw: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(raw) {
        // SAFETY: a fresh descriptor that nothing else owns.
        Ok(raw) if raw >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(raw) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Every socket of a process, once more: each stays open whatever becomes of that process, as for as long as the kernel takes a
/// large process's memory away.
pub fn sockets_of(pid: u32) -> Vec<OwnedFd> {
    // SAFETY: no pointers.
    let process = own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }).expect("a pidfd");
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").flatten();
    let is_socket = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
    };
    let numbers =
        all.filter(is_socket).filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let copies = numbers.filter_map(|number: i32| {
        // SAFETY: no pointers.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
        match own(raw) {
            Ok(copy) => Some(copy),
            // It was closed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => None,
            Err(error) => panic!("a socket of another process: {error}"),
        }
    });
    copies.collect()
}

/// Ends a TCP connection by a reset; false: it is none.
pub fn reset(socket: &OwnedFd) -> bool {
    if socket2::SockRef::from(socket)
        .peer_addr()
        .map_or(true, |address| address.as_socket().is_none())
    {
        return false;
    }
    let nowhere =
        libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let len = size_of_val(&nowhere) as libc::socklen_t;
    // SAFETY: `nowhere` is as long as `len` says.
    unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, len) == 0 }
}
