//! What can go wrong with a lane, and what the user can do about it.

use std::io;

use crate::placement::CoreList;

/// Why a lane could not be started or stopped. Each message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaneError {
    /// The core is not one this process may run on.
    #[error(
        "core {core} is not in this process's affinity mask ({allowed}): choose one of those, or widen the mask \
         (taskset, the cgroup's cpuset, Kubernetes' CPU manager)"
    )]
    CoreNotAllowed {
        /// The core asked for.
        core: usize,
        /// The cores that are allowed.
        allowed: CoreList,
    },
    /// A seccomp filter (container runtime, sandbox) refuses io_uring.
    #[error(
        "io_uring is forbidden by a seccomp filter ({source}): allow io_uring_setup, io_uring_enter and \
         io_uring_register in the container's seccomp profile (Docker and containerd forbid them by default)"
    )]
    IoUringForbiddenBySeccomp {
        /// What io_uring_setup answered.
        source: io::Error,
    },
    /// The sysctl kernel.io_uring_disabled refuses io_uring.
    #[error(
        "io_uring is disabled on this host (kernel.io_uring_disabled = {value}): as root run `sysctl \
         kernel.io_uring_disabled=0`, or with the value 1 put this user into the group kernel.io_uring_group"
    )]
    IoUringDisabledBySysctl {
        /// The sysctl's value.
        value: u32,
    },
    /// The kernel has no usable io_uring.
    #[error(
        "this kernel has no io_uring ({source}): use a kernel of 6.1 or newer with CONFIG_IO_URING=y"
    )]
    IoUringUnavailable {
        /// What io_uring_setup answered.
        source: io::Error,
    },
    /// The kernel is too old.
    #[error("kernel {release} is too old: corelane needs Linux 6.1 or newer")]
    KernelTooOld {
        /// What uname says.
        release: String,
    },
    /// RLIMIT_MEMLOCK is too low for the executor's rings.
    #[error(
        "the limit of locked memory is too low: {limit_bytes} bytes, a lane needs {needed_bytes}: raise it with \
         `ulimit -l {}`, LimitMEMLOCK= in the systemd unit, or `docker run --ulimit memlock=-1`",
        needed_bytes / 1024
    )]
    MemlockTooLow {
        /// The soft limit.
        limit_bytes: u64,
        /// What is needed.
        needed_bytes: u64,
    },
    /// No file descriptors are left.
    #[error(
        "no file descriptors are left for the lane ({source}; the limit is {limit}): raise it (`ulimit -n`, \
         LimitNOFILE= in the systemd unit) or close some"
    )]
    OutOfFileDescriptors {
        /// What the system said.
        source: io::Error,
        /// The soft limit RLIMIT_NOFILE.
        limit: u64,
    },
    /// The lane's thread could not be made.
    #[error(
        "could not start the lane's thread ({0}): look at `ulimit -u` and the cgroup's pids.max"
    )]
    SpawnThread(#[source] io::Error),
    /// The thread could not be pinned although the core is allowed.
    #[error("could not pin the lane to core {core} ({source}): is the core online?")]
    Pin {
        /// The core.
        core: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The lane's own ring could not be made.
    #[error("could not set up the lane's io_uring ring: {0}")]
    Ring(#[source] io::Error),
    /// The executor could not be made.
    #[error("could not set up the lane's executor: {0}")]
    Executor(String),
    /// The function that makes the driver panicked.
    #[error("the driver could not be made, it panicked: {0}")]
    MakeDriver(String),
    /// The lane did not end within the deadline: a driver's callback or a task blocks.
    #[error(
        "lane {name} did not stop in time: a callback of its driver or a task on it blocks. It ends by itself once that \
         returns"
    )]
    StopTimedOut {
        /// The lane.
        name: String,
    },
    /// The lane died by a panic.
    #[error("lane {name} panicked: {message}")]
    Panicked {
        /// The lane.
        name: String,
        /// The panic's message.
        message: String,
    },
}

/// The lane has stopped or died; the message comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the lane has stopped")]
pub struct SubmitError<M>(
    /// The message that was not accepted.
    pub M,
);

/// Why [`Lane::try_submit`](crate::Lane::try_submit) did not take the message; it comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TrySubmitError<M> {
    /// The inbox is full just now.
    #[error("the lane's inbox is full")]
    Full(M),
    /// The lane has stopped or died.
    #[error("the lane has stopped")]
    Stopped(M),
}

/// Why an on-lane task gave no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// The lane stopped or died before the task ended.
    #[error("the lane stopped before the task ended")]
    LaneStopped,
    /// The task panicked.
    #[error("the task panicked: {0}")]
    Panicked(String),
}

/// The text of a panic.
pub(crate) fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".to_owned())
}
