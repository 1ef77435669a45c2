//! What the kernel says about a process.

use std::fs;

fn entries(directory: &str) -> usize {
    fs::read_dir(directory).map(Iterator::count).unwrap_or(0)
}

/// Open files of a process.
pub fn open_files(pid: u32) -> usize {
    // In this process, less the one that the listing itself opens.
    entries(&format!("/proc/{pid}/fd")) - usize::from(pid == std::process::id())
}

/// Threads of this process.
pub fn threads() -> usize {
    entries("/proc/self/task")
}

/// Threads of a process.
pub fn threads_of(pid: u32) -> usize {
    entries(&format!("/proc/{pid}/task"))
}

/// Memory mappings of this process.
pub fn mappings() -> usize {
    mappings_of(std::process::id())
}

/// Memory mappings of a process.
pub fn mappings_of(pid: u32) -> usize {
    fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process lives").lines().count()
}

/// Where a process has memory that it may write: addresses and lengths.
pub fn writable_ranges(pid: u32) -> Vec<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process lives");
    let range = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        rest.starts_with("rw").then_some((start, end - start))
    };
    maps.lines().filter_map(range).collect()
}

/// Bytes of this process that are in memory.
pub fn resident_bytes() -> u64 {
    resident_bytes_of(std::process::id())
}

/// Bytes of a process that are in memory.
pub fn resident_bytes_of(pid: u32) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).expect("the process lives");
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("statm");
    pages * 4096
}

/// TCP ports on which a process listens on IPv4.
pub fn listening_ports(pid: u32) -> Vec<u16> {
    let inodes: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("the process lives")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|link| {
            Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).expect("/proc/net/tcp");
    let port = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let listens = *fields.get(3)? == "0A" && inodes.iter().any(|i| i == fields[9]);
        let (_, port) = fields[1].split_once(':')?;
        listens.then(|| u16::from_str_radix(port, 16).ok()).flatten()
    };
    table.lines().skip(1).filter_map(port).collect()
}

/// The cores that this thread may run on.
pub fn allowed_cores() -> Vec<usize> {
    // SAFETY: an all-zero set is a valid value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most the size given.
    let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    assert_eq!(result, 0, "sched_getaffinity");
    let is_set = |core: &usize| {
        // SAFETY: the index is below the size of the set.
        unsafe { libc::CPU_ISSET(*core, &set) }
    };
    (0..libc::CPU_SETSIZE as usize).filter(is_set).collect()
}

/// Binds this thread, and the threads and processes that it starts from now on, to one core.
pub fn pin_process(core: usize) {
    // SAFETY: an all-zero set is a valid value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the index is below the size of the set; the kernel only reads it.
    let result = unsafe {
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set)
    };
    assert_eq!(result, 0, "sched_setaffinity to core {core}");
}
