//! Is this machine able to run a lane? Asked before glommio is, which panics where it is not.

use std::{fs, io, os::fd::FromRawFd};

use crate::{
    LaneError,
    executor::MEMLOCK_NEEDED_BYTES,
    placement::{CoreList, allowed_cores},
};

/// File descriptors that a lane needs, with some to spare.
const FDS_NEEDED: usize = 16;

/// Checks that need no thread of the lane's own.
pub(crate) fn check_core(core: Option<usize>) -> Result<(), LaneError> {
    let Some(core) = core else { return Ok(()) };
    let allowed = allowed_cores().unwrap_or_else(|_| CoreList::default());
    if allowed.contains(core) { Ok(()) } else { Err(LaneError::CoreNotAllowed { core, allowed }) }
}

/// Checks on the lane's thread: a seccomp filter belongs to a thread.
pub(crate) fn check_thread() -> Result<(), LaneError> {
    check_kernel(&kernel_release())?;
    check_memlock()?;
    check_fds()?;
    check_io_uring()
}

fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

fn check_kernel(release: &str) -> Result<(), LaneError> {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < (6, 1) => {
            Err(LaneError::KernelTooOld { release: release.to_owned() })
        }
        // A release that cannot be read is no reason to refuse: the probes below decide.
        _ => Ok(()),
    }
}

fn check_memlock() -> Result<(), LaneError> {
    let (limit_bytes, _) = limit(libc::RLIMIT_MEMLOCK);
    if limit_bytes < MEMLOCK_NEEDED_BYTES {
        return Err(LaneError::MemlockTooLow { limit_bytes, needed_bytes: MEMLOCK_NEEDED_BYTES });
    }
    Ok(())
}

fn check_fds() -> Result<(), LaneError> {
    let mut held = Vec::with_capacity(FDS_NEEDED);
    for _ in 0..FDS_NEEDED {
        // SAFETY: no pointers; a descriptor that was made is owned at once.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(out_of_fds(io::Error::last_os_error()));
        }
        // SAFETY: as above.
        held.push(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) });
    }
    Ok(())
}

pub(crate) fn out_of_fds(source: io::Error) -> LaneError {
    LaneError::OutOfFileDescriptors { source, limit: limit(libc::RLIMIT_NOFILE).0 }
}

fn check_io_uring() -> Result<(), LaneError> {
    let Err(source) = io_uring::IoUring::new(2) else { return Ok(()) };
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
        .ok()
        .and_then(|text| text.trim().parse::<u32>().ok())
        .unwrap_or(0);
    Err(explain_io_uring(source, disabled))
}

fn explain_io_uring(source: io::Error, disabled: u32) -> LaneError {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if disabled != 0 => {
            LaneError::IoUringDisabledBySysctl { value: disabled }
        }
        Some(libc::EPERM | libc::EACCES) => LaneError::IoUringForbiddenBySeccomp { source },
        // Some container runtimes answer ENOSYS from their filter.
        Some(libc::ENOSYS) if seccomp_is_active() => {
            LaneError::IoUringForbiddenBySeccomp { source }
        }
        Some(libc::ENOSYS) => LaneError::IoUringUnavailable { source },
        Some(libc::EMFILE | libc::ENFILE) => out_of_fds(source),
        Some(libc::ENOMEM) => {
            let (limit_bytes, _) = limit(libc::RLIMIT_MEMLOCK);
            LaneError::MemlockTooLow { limit_bytes, needed_bytes: MEMLOCK_NEEDED_BYTES }
        }
        _ => LaneError::Ring(source),
    }
}

fn seccomp_is_active() -> bool {
    fs::read_to_string("/proc/thread-self/status").is_ok_and(|status| {
        status
            .lines()
            .any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
    })
}

#[allow(clippy::unnecessary_cast)] // The type of the resource differs between C libraries.
fn limit(resource: impl Into<u64>) -> (u64, u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid structure to write to.
    unsafe { libc::getrlimit(resource.into() as _, &mut limit) };
    (limit.rlim_cur, limit.rlim_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_refused() {
        for (release, ok) in [
            ("5.15.0-91-generic", false),
            ("6.0.19", false),
            ("6.1.0-18-amd64", true),
            ("6.18.44", true),
            ("10.0", true),
            ("strange", true),
        ] {
            assert_eq!(check_kernel(release).is_ok(), ok, "{release}");
        }
        let text = check_kernel("5.4.0").unwrap_err().to_string();
        assert!(text.contains("5.4.0") && text.contains("6.1"), "{text}");
    }

    #[test]
    fn refusals_of_io_uring_are_told_apart() {
        let explain =
            |errno, disabled| explain_io_uring(io::Error::from_raw_os_error(errno), disabled);
        assert!(matches!(explain(libc::EPERM, 0), LaneError::IoUringForbiddenBySeccomp { .. }));
        assert!(matches!(explain(libc::EPERM, 2), LaneError::IoUringDisabledBySysctl { value: 2 }));
        assert!(matches!(explain(libc::EMFILE, 0), LaneError::OutOfFileDescriptors { .. }));
        assert!(explain(libc::EPERM, 1).to_string().contains("sysctl kernel.io_uring_disabled=0"));
    }
}
