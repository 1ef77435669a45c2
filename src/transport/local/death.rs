//! Whether another process can still be copying.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::cma::{self, Pid, ProcessMemory};
use super::life::Life;

/// The process of a peer on this host, as far as it can be watched from here.
///
/// What it counts as a use of our memory is dropped only when no thread of it can be in a copy any more.
/// That its socket is closed does not say so: a process may close a socket and copy on.
#[derive(Debug)]
pub(crate) struct PeerProcess {
    pidfd: Option<OwnedFd>,
    memory: Option<Arc<ProcessMemory>>,
    life: Option<Life>,
    /// Our own process.
    own: bool,
    /// Its end of the session's socket is closed.
    disconnected: AtomicBool,
}

impl PeerProcess {
    pub(crate) fn new(
        pid: Option<Pid>,
        memory: Option<Arc<ProcessMemory>>,
        life: Option<Life>,
        own: bool,
    ) -> Self {
        let pidfd = pid.and_then(|pid| cma::open_pidfd(pid).ok());
        Self { pidfd, memory, life, own, disconnected: AtomicBool::new(false) }
    }

    pub(crate) fn set_disconnected(&self) {
        self.disconnected.store(true, Ordering::Release);
    }

    pub(crate) fn is_disconnected(&self) -> bool {
        self.disconnected.load(Ordering::Acquire)
    }

    /// Whether it is known that its engine will never answer again, since its process is ending or has become another program: long
    /// before the kernel has taken its memory away and closes its sockets, 60 ms for each GiB. Threads of it may still be
    /// in a copy. Some system calls.
    pub(crate) fn has_ended(&self) -> bool {
        if self.own {
            return false;
        }
        self.life.as_ref().is_some_and(Life::has_ended)
            || self.memory.as_ref().is_some_and(|memory| memory.is_empty())
            || self.pidfd.as_ref().is_some_and(|pidfd| cma::has_exited(pidfd.as_fd()))
    }

    /// Whether no thread of it touches our memory any more, whatever it has counted. Some system calls.
    pub(crate) fn is_gone(&self) -> bool {
        if self.own {
            return false;
        }
        if self.pidfd.as_ref().is_some_and(|pidfd| cma::has_exited(pidfd.as_fd())) {
            return true;
        }
        if !self.is_disconnected() {
            return false;
        }
        match (&self.memory, &self.pidfd) {
            // The address space that copied has no thread any more: the process runs another program.
            (Some(memory), _) => memory.is_empty(),
            (None, Some(_)) => false,
            // It cannot be seen from here: that all its descriptors are closed is all there is to go by.
            (None, None) => true,
        }
    }
}
