//! Cutting the connections of another process, as a network does: from outside, and without its knowledge.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn told(result: libc::c_long) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

/// Shuts down every connected socket of a process in both directions; how many.
///
/// # Errors
/// The process is gone, or this one may not reach into it.
pub(crate) fn cut_sockets(pid: u32) -> io::Result<usize> {
    // SAFETY: no pointers.
    let process = told(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: made above, and nobody else's.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    let mut cut = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_socket = fs::read_link(entry.path())
            .is_ok_and(|target| target.to_string_lossy().starts_with("socket:"));
        let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if !is_socket {
            continue;
        }
        // SAFETY: no pointers.
        let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) };
        let copy = match told(copy) {
            // SAFETY: made above, and nobody else's.
            Ok(copy) => unsafe { OwnedFd::from_raw_fd(copy) },
            // It was closed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => continue,
            Err(error) => return Err(error),
        };
        // A listening socket has no peer, and stays.
        if is_connected(&copy) {
            // SAFETY: no pointers.
            cut += usize::from(unsafe { libc::shutdown(copy.as_raw_fd(), libc::SHUT_RDWR) } == 0);
        }
    }
    Ok(cut)
}

fn is_connected(socket: &OwnedFd) -> bool {
    // SAFETY: an all-zero value is valid, and overwritten by the kernel.
    let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&address) as libc::socklen_t;
    let to = (&raw mut address).cast();
    // SAFETY: `address` is as long as `len` says.
    unsafe { libc::getpeername(socket.as_raw_fd(), to, &raw mut len) == 0 }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn connected_sockets_are_cut_and_listening_ones_are_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_far, _) = listener.accept().unwrap();
        assert!(super::cut_sockets(std::process::id()).unwrap() >= 2);
        assert_eq!(near.read(&mut [0; 8]).unwrap(), 0);
        TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    }
}
