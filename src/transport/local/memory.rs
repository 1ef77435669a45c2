//! Memory that an engine owns, so that peers on its host can map it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::shm::{self, Mapping, SharedFd};

/// Memory of a memfd, mapped here.
#[derive(Debug)]
pub(crate) struct OwnMemory {
    map: Mapping,
    fd: SharedFd,
    huge: bool,
}

const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;

impl OwnMemory {
    /// At least `len` bytes, zeroed: of huge pages where some are reserved, else such as the kernel makes
    /// by itself; on NUMA node `node` where it has memory. All of it is taken now.
    pub(crate) fn allocate(len: usize, node: Option<usize>) -> io::Result<Self> {
        if len >= HUGE_PAGE
            && let Some(rounded) = len.checked_next_multiple_of(HUGE_PAGE)
            && let Ok(memory) = Self::make(rounded, node, true)
        {
            return Ok(memory);
        }
        let rounded = len
            .checked_next_multiple_of(PAGE)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Self::make(rounded, node, false)
    }

    fn make(len: usize, node: Option<usize>, huge: bool) -> io::Result<Self> {
        // Reserved huge pages are counted by the kernel. Of others it gives what it has, and then ends other
        // processes to give more, before it says that there is not enough.
        if !huge && free_bytes().is_some_and(|free| len as u64 > free) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        // Memory of a memfd that is not there makes the kernel kill processes instead of saying so. Huge pages are
        // set aside, and it does say so.
        if !huge && len as u64 > available() {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let fd = shm::create(c"corelane-memory", len, huge)?;
        let map = Mapping::new(fd.as_fd(), len, true)?;
        if !huge {
            // A kernel that makes no huge pages for shared memory says so, and nothing else happens.
            let _ = map.advise(libc::MADV_HUGEPAGE);
        }
        if let Some(node) = node {
            // A preference: without it the memory is only farther away.
            let _ = map.prefer_node(node);
        }
        shm::allocate(fd.as_fd(), len)?;
        shm::seal(fd.as_fd(), false)?;
        Ok(Self { map, fd: Arc::new(fd), huge })
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.map.as_ptr()
    }

    pub(crate) fn is_huge(&self) -> bool {
        self.huge
    }

    /// What a peer maps: read-only unless it may write.
    pub(crate) fn fd_for_peers(&self, writable: bool) -> io::Result<SharedFd> {
        if writable {
            return Ok(self.fd.clone());
        }
        shm::read_only(self.fd.as_fd()).map(Arc::new)
    }
}

/// Bytes that may be taken now, as far as the kernel says: of the machine, and of the control group's limit.
fn available() -> u64 {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    });
    let group = std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| {
        let path = text.lines().find_map(|line| line.strip_prefix("0::"))?.to_owned();
        let read = |file: &str| {
            let path = format!("/sys/fs/cgroup{path}/{file}");
            std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()
        };
        Some(read("memory.max")?.saturating_sub(read("memory.current")?))
    });
    let machine = machine.map_or(u64::MAX, |kib| kib.saturating_mul(1024));
    machine.min(group.unwrap_or(u64::MAX))
}

/// What this machine could give, swap included; `None`: it does not say.
fn free_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.strip_prefix(':')?.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    let available = kib("MemAvailable")?;
    Some(available.saturating_add(kib("SwapFree").unwrap_or(0)).saturating_mul(1024))
}

/// The NUMA node of a core; `None` where there is only one.
pub(crate) fn node_of(core: usize) -> Option<usize> {
    let nodes = std::fs::read_dir("/sys/devices/system/node").ok()?;
    let is_node = |name: &str| {
        let number = name.strip_prefix("node")?;
        number.parse::<usize>().ok()
    };
    let count = nodes.flatten().filter(|e| e.file_name().to_str().and_then(is_node).is_some());
    if count.count() < 2 {
        return None;
    }
    let mut links = std::fs::read_dir(format!("/sys/devices/system/cpu/cpu{core}")).ok()?.flatten();
    links.find_map(|entry| entry.file_name().to_str().and_then(is_node))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_whole_pages_of_zeros_and_the_same_for_who_maps_it() {
        let memory = OwnMemory::allocate(5000, None).unwrap();
        let writer = memory.fd_for_peers(true).unwrap();
        let reader = memory.fd_for_peers(false).unwrap();
        let mapped = Mapping::received(writer.as_fd(), 1..=1 << 30, true, true).unwrap();
        assert!(Mapping::received(reader.as_fd(), 1..=1 << 30, true, true).is_err());
        let seen = Mapping::received(reader.as_fd(), 1..=1 << 30, false, true).unwrap();
        assert!(mapped.put(4999, &[7]));
        // SAFETY: within the 5000 bytes.
        assert_eq!(unsafe { memory.as_ptr().add(4999).read_volatile() }, 7);
        let mut byte = [0];
        assert!(seen.get(4999, &mut byte));
        assert_eq!((byte[0], seen.len()), (7, 8192));
        for too_much in [1 << 40, 1 << 46, usize::MAX - 10] {
            assert!(OwnMemory::allocate(too_much, None).is_err());
        }
    }
}
