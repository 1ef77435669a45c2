//! The lane's io_uring ring: it watches quiet descriptors and the doorbell, and the lane sleeps in it.
//!
//! Only readiness and sleeping go through it, so the kernel never writes to user memory; the words that it watches it reads
//! once, when a watch begins. Touched by the lane's thread only.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue, types};

use crate::{SharedWord, fds::RingOp};

const SUBMISSION_SLOTS: u32 = 256;
const COMPLETION_SLOTS: u32 = 4096;
/// User data of requests whose completion says nothing.
const IGNORED: u64 = u64::MAX;
const DOORBELL: u64 = u64::MAX - 1;

/// An eventfd that ends a lane's sleep. Any thread of this process may ring it; it costs a system call. No other process may have
/// it: whoever has can take its flag away that nobody blocks on it, for all, and then fill or empty it.
#[derive(Debug)]
pub(crate) struct Doorbell {
    fd: OwnedFd,
}

impl Doorbell {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: no pointers; the result is checked before it becomes an owned descriptor.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    pub(crate) fn ring(&self) {
        let one = 1u64;
        // SAFETY: eight readable bytes. The only failure is a full counter, which still wakes the lane.
        unsafe { libc::write(self.fd.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    fn silence(&self) {
        let mut count = 0u64;
        // SAFETY: eight writable bytes; non-blocking.
        unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}

/// Work with words that other processes share.
pub(crate) enum WordOp {
    /// Completes once the word is woken, or at once if it does not hold `expected`.
    Wait {
        word: Arc<dyn SharedWord>,
        expected: u32,
        user_data: u64,
    },
    Cancel {
        user_data: u64,
    },
}

impl std::fmt::Debug for WordOp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, user_data) = match self {
            Self::Wait { user_data, .. } => ("Wait", user_data),
            Self::Cancel { user_data } => ("Cancel", user_data),
        };
        write!(f, "{name}({user_data:#x})")
    }
}

pub(crate) struct Ring {
    uring: IoUring,
    doorbell: Arc<Doorbell>,
    doorbell_watched: bool,
}

impl Ring {
    /// Must run on the lane's thread: the ring belongs to the thread that makes it.
    pub(crate) fn new(doorbell: Arc<Doorbell>) -> io::Result<Self> {
        let mut result = Self::build(|builder| {
            builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        });
        // Flags are probed, not assumed: a kernel or sandbox that knows fewer answers EINVAL.
        if is_invalid(&result) {
            result = Self::build(|builder| {
                builder.setup_coop_taskrun().setup_taskrun_flag();
            });
        }
        if is_invalid(&result) {
            result = Self::build(|_| {});
        }
        Ok(Self { uring: result?, doorbell, doorbell_watched: false })
    }

    fn build(flags: impl FnOnce(&mut io_uring::Builder)) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(COMPLETION_SLOTS).dontfork();
        flags(&mut builder);
        builder.build(SUBMISSION_SLOTS)
    }

    pub(crate) fn queue(&mut self, op: RingOp) -> io::Result<()> {
        let entry = match op {
            RingOp::Arm { fd, mask, user_data } => {
                opcode::PollAdd::new(types::Fd(fd), mask).build().user_data(user_data)
            }
            RingOp::Cancel { user_data } => {
                opcode::PollRemove::new(user_data).build().user_data(IGNORED)
            }
        };
        self.push(&entry)
    }

    /// Whether this kernel's rings can wait for words: Linux 6.7.
    pub(crate) fn can_wait_for_words(&self) -> bool {
        let mut probe = io_uring::Probe::new();
        self.uring.submitter().register_probe(&mut probe).is_ok()
            && probe.is_supported(opcode::FutexWait::CODE)
    }

    pub(crate) fn queue_word(&mut self, op: &WordOp) -> io::Result<()> {
        /// `FUTEX2_SIZE_U32`, and not `FUTEX2_PRIVATE`.
        const SHARED_U32: u32 = 2;
        const ANY: u64 = u32::MAX as u64;
        let entry = match op {
            WordOp::Wait { word, expected, user_data } => {
                let futex = word.word().as_ptr().cast_const();
                opcode::FutexWait::new(futex, u64::from(*expected), ANY, SHARED_U32)
                    .build()
                    .user_data(*user_data)
            }
            WordOp::Cancel { user_data } => {
                opcode::AsyncCancel::new(*user_data).build().user_data(IGNORED)
            }
        };
        self.push(&entry)
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: polls refer to no user memory. A word that is waited for is kept by the table of words until its wait has
            // completed.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// Hands queued requests to the kernel; one system call if there are any.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        if self.uring.submission().is_empty() {
            return Ok(());
        }
        match self.uring.submit() {
            Ok(_) => Ok(()),
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether completions may wait. No system call.
    #[inline]
    pub(crate) fn has_completions(&mut self) -> bool {
        !self.uring.completion().is_empty() || self.uring.submission().taskrun()
    }

    /// Calls `take` with each completed poll (user data, result). No system call when there are none.
    pub(crate) fn reap(&mut self, mut take: impl FnMut(u64, i32)) -> io::Result<()> {
        if self.uring.submission().taskrun() {
            // SAFETY: no argument pointer. It lets the kernel post completions that are held back for this thread.
            let entered = unsafe { self.uring.submitter().enter::<()>(0, 0, GETEVENTS, None) };
            match entered {
                Err(error) if !is_transient(&error) => return Err(error),
                _ => {}
            }
        }
        let mut rung = false;
        for completion in self.uring.completion() {
            match completion.user_data() {
                IGNORED => {}
                DOORBELL => rung = true,
                user_data => take(user_data, completion.result()),
            }
        }
        if rung {
            self.doorbell_watched = false;
            self.doorbell.silence();
        }
        Ok(())
    }

    /// Sleeps until a watched descriptor, the doorbell or `timeout` (None: no limit). Submits what is queued in the same
    /// system call.
    pub(crate) fn sleep(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if !self.doorbell_watched {
            let entry =
                opcode::PollAdd::new(types::Fd(self.doorbell.fd.as_raw_fd()), libc::POLLIN as u32)
                    .build()
                    .user_data(DOORBELL);
            self.push(&entry)?;
            self.doorbell_watched = true;
        }
        let result = match timeout {
            Some(timeout) => {
                let timeout = types::Timespec::from(timeout);
                let arguments = types::SubmitArgs::new().timespec(&timeout);
                self.uring.submitter().submit_with_args(1, &arguments)
            }
            None => self.uring.submit_and_wait(1),
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Which descriptors are ready, for any thread. False: the kernel could not say.
pub(crate) fn ready_now(questions: &mut [libc::pollfd]) -> bool {
    // SAFETY: that many valid structures, to be read and written; it does not wait.
    let ready = unsafe { libc::poll(questions.as_mut_ptr(), questions.len() as libc::nfds_t, 0) };
    ready >= 0
}

/// `IORING_ENTER_GETEVENTS`
const GETEVENTS: u32 = 1;

fn is_invalid<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.raw_os_error() == Some(libc::EINVAL))
}

/// A timeout, a signal, or completions that want to be taken first: all of them mean "go on".
fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN))
}
