//! Whether there is memory for what is about to be measured, asked before any is taken: pages are touched at once, and a machine that
//! runs out of them ends some process of its choice.

use std::fs;

use nix::sys::resource::{Resource, getrlimit};

use crate::manifest::control_groups;
use crate::units::Bytes;

/// Refuses what there is no memory for: `bytes` in all processes together, and `most` in one of them.
pub(crate) fn ensure_available(bytes: usize, most: usize) -> Result<(), String> {
    let limit = getrlimit(Resource::RLIMIT_AS).map_or(u64::MAX, |(soft, _)| soft);
    check(bytes, most, available_bytes(), limit)
}

fn check(bytes: usize, most: usize, available: u64, limit: u64) -> Result<(), String> {
    let smaller = "choose smaller --sizes, --kv or --prefill-bytes";
    if bytes as u64 > available {
        return Err(format!(
            "this takes {} of memory and the machine has {} left: {smaller}",
            Bytes(bytes),
            Bytes(usize::try_from(available).unwrap_or(usize::MAX) >> 20 << 20)
        ));
    }
    if most as u64 > limit {
        return Err(format!(
            "this takes {} of memory in one process, and a process may have {limit} bytes (ulimit -v): {smaller}",
            Bytes(most)
        ));
    }
    Ok(())
}

/// Memory that can be had without swapping, on the machine and in the control groups of this process.
fn available_bytes() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    let machine = kib.map_or(u64::MAX, |kib| kib * 1024);
    control_groups().iter().filter_map(|group| left_in(group)).fold(machine, u64::min)
}

/// What a control group may still take; pages of files that nobody needs are given up for it.
fn left_in(group: &std::path::Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let most: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    let statistics = read("memory.stat")?;
    let line = statistics.lines().find_map(|line| line.strip_prefix("inactive_file "));
    let files: u64 = line.and_then(|count| count.trim().parse().ok()).unwrap_or(0);
    Some(most.saturating_sub(used.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_no_memory_for_is_refused_with_both_figures() {
        let (gib, mib) = (1 << 30, 1 << 20);
        assert_eq!(check(gib, gib, 2 * gib as u64, u64::MAX), Ok(()));
        let text = check(3 * gib, gib, 2 * gib as u64 + 1, u64::MAX).expect_err("too much");
        assert!(text.contains("3GiB") && text.contains("2GiB left"), "{text}");
        let text = check(gib, gib, u64::MAX, 64 * mib as u64).expect_err("too much");
        assert!(text.contains("1GiB") && text.contains("ulimit -v"), "{text}");
    }

    #[test]
    fn this_machine_has_some() {
        assert!((1 << 20..1 << 60).contains(&available_bytes()), "{}", available_bytes());
        assert_eq!(ensure_available(4096, 4096), Ok(()));
    }

    #[test]
    fn a_control_group_bounds_what_is_left() {
        let group = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| fs::write(group.path().join(name), text).expect(name);
        assert_eq!(left_in(group.path()), None);
        write("memory.max", "max\n");
        write("memory.current", "1000\n");
        write("memory.stat", "anon 600\ninactive_file 300\n");
        assert_eq!(left_in(group.path()), None);
        write("memory.max", "1500\n");
        assert_eq!(left_in(group.path()), Some(800));
        write("memory.max", "100\n");
        assert_eq!(left_in(group.path()), Some(0));
    }
}
