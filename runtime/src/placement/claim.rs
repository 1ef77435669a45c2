//! One advisory lock per core, so that the engines of a host spread over its cores.
//!
//! Open-file-description locks on files in /dev/shm (or /tmp): host-wide as far as that folder is shared (containers with
//! their own /dev/shm do not see each other), asked for without taking them, and released by the kernel with the process.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{CoreList, allowed_cores, current_core};

/// The lock that makes a core this engine's own on this host, until the last clone is dropped. (A forked child shares the
/// lock for as long as it keeps the descriptor; exec closes it.)
#[derive(Clone, Debug)]
pub struct CoreClaim {
    core: usize,
    _file: Arc<File>,
}

impl CoreClaim {
    /// The core.
    pub fn core(&self) -> usize {
        self.core
    }
}

/// Claims `core`. `Ok(None)`: another engine has it. Err: the lock file cannot be used. Some system calls.
pub fn claim_core(core: usize) -> io::Result<Option<CoreClaim>> {
    claim_in(&lock_folder(), core)
}

/// Claims a core of the calling thread's affinity mask that no other engine of this host has claimed; core 0 and the
/// calling thread's own core only when no other is free. `Ok(None)`: none is free; run unpinned then.
pub fn auto_core() -> io::Result<Option<CoreClaim>> {
    auto_in(&lock_folder(), &allowed_cores()?, current_core(), None)
}

/// As [`auto_core`], but one of `near` where one of them is free, other than core 0 and the calling thread's: next to a device, for
/// example, by [`cores_of_numa_node`](super::cores_of_numa_node).
pub fn auto_core_near(near: &CoreList) -> io::Result<Option<CoreClaim>> {
    auto_in(&lock_folder(), &allowed_cores()?, current_core(), Some(near))
}

/// Which of `cores` are claimed just now, by anyone on this host, this process included.
pub fn claimed_cores(cores: &CoreList) -> CoreList {
    claimed_in(&lock_folder(), cores)
}

fn lock_folder() -> PathBuf {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() }
}

fn lock_path(folder: &Path, core: usize) -> PathBuf {
    folder.join(format!("corelane-core-{core}.lock"))
}

fn open(folder: &Path, core: usize, create: bool) -> io::Result<File> {
    let path = lock_path(folder, core);
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    // Without O_CREAT first: fs.protected_regular forbids that on other users' files in a sticky folder.
    match options.open(&path) {
        Err(error) if create && error.kind() == io::ErrorKind::NotFound => {
            let file = options.create(true).mode(0o666).open(&path)?;
            // The umask has narrowed the mode; other users' engines need the lock too. Not ours to change is fine.
            _ = file.set_permissions(std::fs::Permissions::from_mode(0o666));
            Ok(file)
        }
        other => other,
    }
}

fn whole_file(kind: libc::c_int) -> libc::flock {
    // SAFETY: a plain structure for which zeroes are valid (whole file, no process id as these locks require).
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

fn claim_in(folder: &Path, core: usize) -> io::Result<Option<CoreClaim>> {
    let file = open(folder, core, true)?;
    let lock = whole_file(libc::F_WRLCK);
    // SAFETY: an open descriptor and a valid structure.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(Some(CoreClaim { core, _file: Arc::new(file) }));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(None),
        _ => Err(error),
    }
}

fn claimed_in(folder: &Path, cores: &CoreList) -> CoreList {
    let is_claimed = |core: &usize| {
        let Ok(file) = open(folder, *core, false) else { return false };
        let mut lock = whole_file(libc::F_WRLCK);
        // SAFETY: an open descriptor and a valid structure to write the answer to.
        let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
        asked == 0 && lock.l_type != libc::F_UNLCK as libc::c_short
    };
    cores.cores().iter().copied().filter(is_claimed).collect()
}

fn auto_in(
    folder: &Path,
    allowed: &CoreList,
    own: Option<usize>,
    near: Option<&CoreList>,
) -> io::Result<Option<CoreClaim>> {
    let second_choice = |core: &usize| *core == 0 || Some(*core) == own;
    let (last, mut first): (Vec<usize>, Vec<usize>) =
        allowed.cores().iter().partition(|core| second_choice(core));
    // In their order, the near ones first. What a core that others want costs is more than the way between two nodes.
    first.sort_by_key(|core| near.is_some_and(|near| !near.contains(*core)));
    // Core 0 takes the interrupts, but the creating thread's core would be fought over all the time: that one is last.
    let last = last
        .iter()
        .filter(|core| Some(**core) != own)
        .chain(own.iter().filter(|core| allowed.contains(**core)));
    let mut failure = None;
    for core in first.iter().chain(last) {
        match claim_in(folder, *core) {
            Ok(Some(claim)) => return Ok(Some(claim)),
            Ok(None) => {}
            Err(error) => failure = Some(error),
        }
    }
    failure.map_or(Ok(None), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_folder(name: &str, check: impl FnOnce(&Path)) {
        let folder =
            std::env::temp_dir().join(format!("corelane-claims-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        check(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_core_has_one_owner_at_a_time() {
        in_folder("one", |folder| {
            let cores: CoreList = (0..4).collect();
            let claim = claim_in(folder, 2).unwrap().unwrap();
            assert_eq!(claim.core(), 2);
            assert!(claim_in(folder, 2).unwrap().is_none());
            assert_eq!(claimed_in(folder, &cores).cores(), [2]);
            let second_handle = claim.clone();
            drop(claim);
            assert!(claim_in(folder, 2).unwrap().is_none());
            drop(second_handle);
            assert!(claimed_in(folder, &cores).is_empty());
            assert!(claim_in(folder, 2).unwrap().is_some());
        });
    }

    #[test]
    fn auto_prefers_other_cores_than_zero_and_the_callers() {
        in_folder("auto", |folder| {
            let allowed: CoreList = (0..4).collect();
            let mut claims = Vec::new();
            while let Some(claim) = auto_in(folder, &allowed, Some(1), None).unwrap() {
                claims.push(claim);
            }
            assert_eq!(claims.iter().map(CoreClaim::core).collect::<Vec<_>>(), [2, 3, 0, 1]);
        });
    }

    #[test]
    fn auto_takes_near_cores_first_but_not_the_callers() {
        in_folder("near", |folder| {
            let allowed: CoreList = (0..8).collect();
            // Core 9 is near, too, but not allowed.
            let near: CoreList = [0, 4, 5, 6, 9].into_iter().collect();
            let mut claims = Vec::new();
            while let Some(claim) = auto_in(folder, &allowed, Some(5), Some(&near)).unwrap() {
                claims.push(claim);
            }
            let taken: Vec<usize> = claims.iter().map(CoreClaim::core).collect();
            assert_eq!(taken, [4, 6, 1, 2, 3, 7, 0, 5]);
        });
    }

    #[test]
    fn a_symbolic_link_is_not_followed() {
        in_folder("link", |folder| {
            let victim = folder.join("victim");
            std::fs::write(&victim, "data").unwrap();
            std::os::unix::fs::symlink(&victim, lock_path(folder, 0)).unwrap();
            assert!(claim_in(folder, 0).is_err());
            assert_eq!(std::fs::read(&victim).unwrap(), b"data");
        });
    }
}
