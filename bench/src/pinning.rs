//! Cores: which ones this process may use, which ones the two sides get, and staying there.

use std::fmt;
use std::fs;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::clock::now_ns;

/// A list of cores, written `0,2-5`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cores(pub(crate) Vec<usize>);

impl FromStr for Cores {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| -> Result<usize, String> {
            let core = text
                .trim()
                .parse()
                .map_err(|_| format!("'{}' is not a core number", text.trim()))?;
            if core < CpuSet::count() {
                Ok(core)
            } else {
                Err(format!("core {core} is beyond the last possible one"))
            }
        };
        let mut cores = Vec::new();
        for part in text.split(',') {
            let range = match part.split_once('-') {
                None => number(part)?..=number(part)?,
                Some((first, last)) => number(first)?..=number(last)?,
            };
            if range.is_empty() {
                return Err(format!("'{part}' runs backwards"));
            }
            cores.extend(range);
        }
        if (1..cores.len()).any(|at| cores[..at].contains(&cores[at])) {
            return Err("names a core twice".to_owned());
        }
        Ok(Self(cores))
    }
}

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cores: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&cores.join(","))
    }
}

/// A core, or explicitly none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MaybeCore(pub(crate) Option<usize>);

impl FromStr for MaybeCore {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            _ => text
                .parse()
                .map(|core| Self(Some(core)))
                .map_err(|_| "expected a core number or 'none'".to_owned()),
        }
    }
}

/// Cores that this process may run on.
pub(crate) fn allowed_cores() -> Result<Vec<usize>> {
    let mask = sched_getaffinity(Pid::from_raw(0)).context("reading the affinity mask")?;
    Ok((0..CpuSet::count()).filter(|&core| mask.is_set(core).unwrap_or(false)).collect())
}

/// Refuses cores that the process may not use, with a message that names those it may.
pub(crate) fn ensure_allowed(
    cores: &[usize],
    allowed: &[usize],
    option: &str,
) -> Result<(), String> {
    match cores.iter().find(|core| !allowed.contains(core)) {
        None => Ok(()),
        Some(core) => Err(format!(
            "{option}: core {core} is not in this process's affinity mask ({})",
            Cores(allowed.to_vec())
        )),
    }
}

/// Pins the calling thread to one core.
pub(crate) fn pin_current_thread(core: usize) -> Result<()> {
    restrict_current_thread(&[core])
}

/// Lets the calling thread run on any of `cores`, and nowhere else.
pub(crate) fn restrict_current_thread(cores: &[usize]) -> Result<()> {
    ensure!(!cores.is_empty(), "no core to run on");
    let mut mask = CpuSet::new();
    for &core in cores {
        mask.set(core).with_context(|| format!("core {core} is beyond the last possible one"))?;
    }
    sched_setaffinity(Pid::from_raw(0), &mask)
        .with_context(|| format!("cannot pin a thread to core {}", Cores(cores.to_vec())))
}

/// Lane cores of the two sides when the user names none: (target, initiator).
///
/// Two cores that are no siblings of one physical core and lie on one NUMA node; core 0 is left to the interrupts it
/// usually serves while there are others. With a single core both sides share it.
pub(crate) fn default_cores(allowed: &[usize]) -> (usize, usize) {
    let mut candidates: Vec<usize> = allowed.to_vec();
    if candidates.len() > 2 {
        candidates.retain(|&core| core != 0);
    }
    let first = candidates.first().copied().unwrap_or_default();
    let physical = |core| topology(core, "thread_siblings_list");
    let package = |core| topology(core, "physical_package_id");
    let others = || candidates.iter().copied().filter(|&core| core != first);
    let best = others()
        .find(|&core| physical(core) != physical(first) && package(core) == package(first))
        .or_else(|| others().find(|&core| physical(core) != physical(first)))
        .or_else(|| others().next());
    (first, best.unwrap_or(first))
}

/// All allowed cores in the order in which one side's lanes take them: `first`, and at the very end what the other side
/// begins with. Backwards, two sides meet as late as possible.
pub(crate) fn lane_order(
    allowed: &[usize],
    first: usize,
    other: usize,
    backwards: bool,
) -> Vec<usize> {
    let mut between: Vec<usize> =
        allowed.iter().copied().filter(|&core| core != first && core != other).collect();
    if backwards {
        between.reverse();
    }
    let last = Some(other).filter(|&other| other != first && allowed.contains(&other));
    std::iter::once(first).chain(between).chain(last).collect()
}

/// The cores that `count` lanes take.
pub(crate) fn lanes(cores: &[usize], count: usize) -> Result<&[usize]> {
    cores.get(..count).with_context(|| {
        format!("{count} lanes need {count} cores: there is {}", Cores(cores.to_vec()))
    })
}

/// The core of whatever has only one.
pub(crate) fn first(cores: &[usize]) -> Result<usize> {
    cores.first().copied().context("no core to run on")
}

/// A topology file of a core; where it cannot be read, the core stands for itself.
fn topology(core: usize, file: &str) -> String {
    fs::read_to_string(format!("/sys/devices/system/cpu/cpu{core}/topology/{file}"))
        .map(|text| text.trim().to_owned())
        .unwrap_or_else(|_| match file {
            "physical_package_id" => String::new(),
            _ => core.to_string(),
        })
}

/// Waits for a moment: sleeping while it is far, spinning for the rest, because a sleep ends late by tens of us.
pub(crate) fn sleep_then_spin_until(at_ns: u64) {
    const SPIN_NS: u64 = 150_000;
    let left = at_ns.saturating_sub(now_ns());
    if left > SPIN_NS {
        std::thread::sleep(Duration::from_nanos(left - SPIN_NS));
    }
    while now_ns() < at_ns {
        std::hint::spin_loop();
    }
}

/// Every thread of this process but the first and those of these names, with the cores that it may run on: `NAME on CORES`.
#[cfg(any(feature = "nixl", test))]
pub(crate) fn threads(but: &[&str]) -> Vec<String> {
    let first = std::process::id().to_string();
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten();
    let mut threads: Vec<String> = tasks
        .filter_map(Result::ok)
        .filter(|task| task.file_name().to_str() != Some(first.as_str()))
        .filter_map(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).ok()?;
            let field =
                |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            let name = field("Name:")?;
            let cores = field("Cpus_allowed_list:")?;
            (!but.contains(&name)).then(|| format!("{name} on {cores}"))
        })
        .collect();
    threads.sort_unstable();
    threads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_lists_parse_and_print() {
        assert_eq!("0,2-5".parse(), Ok(Cores(vec![0, 2, 3, 4, 5])));
        assert_eq!(Cores(vec![3, 1]).to_string(), "3,1");
        for text in ["", "a", "1-", "5-2", "1,1", "0-3,2", "99999", "-1"] {
            assert!(text.parse::<Cores>().is_err(), "{text}");
        }
        assert_eq!("none".parse(), Ok(MaybeCore(None)));
        assert_eq!("3".parse(), Ok(MaybeCore(Some(3))));
        assert!("any".parse::<MaybeCore>().is_err());
    }

    #[test]
    fn defaults_come_from_the_allowed_cores() {
        let allowed = allowed_cores().expect("readable");
        let (target, initiator) = default_cores(&allowed);
        assert!(allowed.contains(&target) && allowed.contains(&initiator));
        assert_eq!(target == initiator, allowed.len() == 1);
        assert_eq!(default_cores(&[7]), (7, 7));
    }

    #[test]
    fn lanes_of_two_sides_share_cores_only_where_there_are_too_few() {
        let allowed = [0, 1, 2, 3, 4, 5];
        let (target, initiator) =
            (lane_order(&allowed, 1, 2, false), lane_order(&allowed, 2, 1, true));
        assert_eq!(target, [1, 0, 3, 4, 5, 2]);
        assert_eq!(initiator, [2, 5, 4, 3, 0, 1]);
        assert_eq!(
            (lane_order(&[0, 1], 0, 1, false), lane_order(&[7], 7, 7, true)),
            (vec![0, 1], vec![7])
        );
        assert_eq!(lanes(&target, 3).expect("enough"), [1, 0, 3]);
        assert!(lanes(&target, 7).is_err() && first(&[]).is_err());
    }

    #[test]
    fn a_forbidden_core_is_refused_by_name() {
        let message =
            ensure_allowed(&[0, 9], &[0, 1], "--server-cores").expect_err("9 is not allowed");
        assert!(
            message.contains("--server-cores")
                && message.contains("core 9")
                && message.contains("(0,1)")
        );
        assert_eq!(ensure_allowed(&[1], &[0, 1], "x"), Ok(()));
    }

    #[test]
    fn pinning_holds_and_can_be_undone() {
        let allowed = allowed_cores().expect("readable");
        std::thread::spawn(move || {
            pin_current_thread(allowed[0]).expect("allowed");
            assert_eq!(allowed_cores().expect("readable"), [allowed[0]]);
            restrict_current_thread(&allowed).expect("allowed");
            assert_eq!(allowed_cores().expect("readable"), allowed);
        })
        .join()
        .expect("the thread ran");
    }

    #[test]
    fn waiting_is_precise() {
        let at = now_ns() + 2_000_000;
        sleep_then_spin_until(at);
        assert!(now_ns() >= at);
    }

    #[test]
    fn threads_are_named_with_their_cores() {
        let core = allowed_cores().expect("a mask")[0];
        let (ready, go) = (std::sync::Barrier::new(3), std::sync::Barrier::new(3));
        std::thread::scope(|scope| {
            for name in ["bench-one", "bench-other"] {
                let body = || {
                    pin_current_thread(core).expect("allowed");
                    ready.wait();
                    go.wait();
                };
                let thread = std::thread::Builder::new().name(name.to_owned());
                thread.spawn_scoped(scope, body).expect("a thread");
            }
            ready.wait();
            let found = threads(&["bench-other"]);
            go.wait();
            assert!(found.contains(&format!("bench-one on {core}")), "{found:?}");
            assert!(!found.iter().any(|it| it.starts_with("bench-other")), "{found:?}");
        });
    }
}
