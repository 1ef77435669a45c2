//! The sockets of another process, reached from outside and without its knowledge.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

fn own(raw: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(raw) {
        // SAFETY: a fresh descriptor that nothing else owns.
        Ok(raw) if raw >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(raw) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A port on which nobody listens, for somebody who is told it and listens later. Not one of those that the kernel gives to who asks
/// for any, of which the connections of other tests take thousands meanwhile.
pub fn free_port() -> u16 {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    const LOWEST: usize = 10_000;
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let lowest_of_kernel = range
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse::<usize>().ok())
        .filter(|lowest| *lowest > LOWEST + 1000)
        .unwrap_or(32_768);
    // Tests run beside each other: those of other processes begin elsewhere.
    let begin = std::process::id() as usize * 97;
    let free = (0..10_000).find_map(|_| {
        let turn = begin + ASKED.fetch_add(1, Ordering::Relaxed);
        let port = (LOWEST + turn % (lowest_of_kernel - LOWEST)) as u16;
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).ok().map(|_| port)
    });
    free.expect("a free port")
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
