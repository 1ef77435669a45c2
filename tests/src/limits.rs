//! What a process may have is used up.

use std::os::fd::OwnedFd;

use nix::sys::eventfd::EventFd;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn told(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Sets the soft limit of `nofile` or `memlock`.
pub(crate) fn set(resource: &str, value: usize) -> Result<(), String> {
    let resource = match resource {
        "nofile" => Resource::RLIMIT_NOFILE,
        "memlock" => Resource::RLIMIT_MEMLOCK,
        _ => return Err("which resource?".into()),
    };
    let (_, most) = getrlimit(resource).map_err(told)?;
    setrlimit(resource, (value as u64).min(most), most).map_err(told)
}

/// Takes descriptors until only `left` more can be had.
pub(crate) fn use_up_descriptors(left: usize) -> Result<Vec<OwnedFd>, String> {
    set("nofile", 400)?;
    let mut taken = Vec::new();
    loop {
        match EventFd::new() {
            Ok(fd) => taken.push(fd.into()),
            Err(nix::errno::Errno::EMFILE) => break,
            Err(error) => return Err(told(error)),
        }
    }
    taken.truncate(taken.len().saturating_sub(left));
    Ok(taken)
}
