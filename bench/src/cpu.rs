//! CPU time and context switches of a process, and threads that burn CPU time on purpose.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;
use serde::{Deserialize, Serialize};

use crate::pinning;

/// What a process has used of the processors, all its threads together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// User and system time.
    pub(crate) cpu_ns: u64,
    /// Context switches in which a thread gave way, asleep or by sched_yield.
    pub(crate) voluntary_switches: u64,
    /// Context switches that the scheduler forced.
    pub(crate) involuntary_switches: u64,
}

impl Usage {
    /// Of this process.
    pub(crate) fn own() -> Self {
        getrusage(UsageWho::RUSAGE_SELF).map_or_else(
            |_| Self::default(),
            |usage| {
                let total = usage.user_time() + usage.system_time();
                let count = |count: libc::c_long| count.unsigned_abs();
                Self {
                    cpu_ns: total.num_microseconds().unsigned_abs() * 1000,
                    voluntary_switches: count(usage.voluntary_context_switches()),
                    involuntary_switches: count(usage.involuntary_context_switches()),
                }
            },
        )
    }

    /// Of another process of this host, from outside. Threads that have ended are missing from the switches.
    #[cfg(any(feature = "nixl", test))]
    pub(crate) fn of(pid: i32) -> Self {
        let cpu_ns = clock_gettime(process_clock(pid)).map_or(0, nanoseconds);
        let mut usage = Self { cpu_ns, ..Self::default() };
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
        for thread in threads.filter_map(Result::ok) {
            let status = std::fs::read_to_string(thread.path().join("status")).unwrap_or_default();
            let count = |name: &str| -> u64 {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
            };
            usage.voluntary_switches += count("voluntary_ctxt_switches:");
            usage.involuntary_switches += count("nonvoluntary_ctxt_switches:");
        }
        usage
    }

    /// What was used since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        let past = |now: u64, then: u64| now.saturating_sub(then);
        Self {
            cpu_ns: past(self.cpu_ns, earlier.cpu_ns),
            voluntary_switches: past(self.voluntary_switches, earlier.voluntary_switches),
            involuntary_switches: past(self.involuntary_switches, earlier.involuntary_switches),
        }
    }
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.cpu_ns += other.cpu_ns;
        self.voluntary_switches += other.voluntary_switches;
        self.involuntary_switches += other.involuntary_switches;
    }
}

fn nanoseconds(time: nix::sys::time::TimeSpec) -> u64 {
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}

/// CPU-bound threads, one per core; they burn until dropped.
///
/// They stand for whatever shares a core with a lane: a Python interpreter, another tenant.
pub(crate) struct Burners {
    stop: Arc<AtomicBool>,
    threads: Vec<(JoinHandle<()>, Option<ClockId>)>,
}

impl Burners {
    /// Starts one burner on each core; they are running when this returns.
    pub(crate) fn start(cores: &[usize]) -> Result<Self> {
        let mut burners = Self { stop: Arc::new(AtomicBool::new(false)), threads: Vec::new() };
        for &core in cores {
            let stop = Arc::clone(&burners.stop);
            let (started, ready) = mpsc::channel();
            let body = move || {
                let pinned = pinning::pin_current_thread(core);
                let clock = thread_clock(gettid().as_raw());
                let burn = pinned.is_ok();
                // The receiver waits for exactly this message.
                let _ = started.send(pinned.map(|()| clock));
                let mut value = 1u64;
                while burn && !stop.load(Ordering::Relaxed) {
                    for _ in 0..1024 {
                        value = std::hint::black_box(value.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
                    }
                }
            };
            let thread = std::thread::Builder::new().name(format!("burn-{core}")).spawn(body);
            let thread = thread.context("starting a burner thread")?;
            let clock = ready.recv().context("a burner thread ended at once")??;
            burners.threads.push((thread, Some(clock)));
        }
        Ok(burners)
    }

    /// No burners.
    pub(crate) fn none() -> Self {
        Self { stop: Arc::new(AtomicBool::new(false)), threads: Vec::new() }
    }

    fn used_ns(&self) -> u64 {
        let used = |clock: &Option<ClockId>| {
            let time = clock.and_then(|clock| clock_gettime(clock).ok());
            time.map_or(0, nanoseconds)
        };
        self.threads.iter().map(|(_, clock)| used(clock)).sum()
    }

    /// What this process has used, without the CPU time of the burners.
    pub(crate) fn net_usage(&self) -> Usage {
        let usage = Usage::own();
        Usage { cpu_ns: usage.cpu_ns.saturating_sub(self.used_ns()), ..usage }
    }
}

/// The CPU-time clock of a thread, as clock_getcpuclockid and pthread_getcpuclockid build it (`man 3`): the inverted
/// thread id above three bits that say "of one thread" and "all of its CPU time".
fn thread_clock(tid: i32) -> ClockId {
    const PER_THREAD: i32 = 4;
    ClockId::from_raw((!tid << 3) | PER_THREAD | SCHEDULED)
}

/// "All of its CPU time" in the id of a CPU-time clock.
const SCHEDULED: i32 = 2;

/// The same of a whole process.
#[cfg(any(feature = "nixl", test))]
fn process_clock(pid: i32) -> ClockId {
    ClockId::from_raw((!pid << 3) | SCHEDULED)
}

impl Drop for Burners {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for (thread, _) in self.threads.drain(..) {
            // A burner cannot panic; and if it had, it burns no more.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn burners_use_cpu_that_is_not_charged_to_the_engine() {
        let cores = pinning::allowed_cores().expect("readable");
        let burners = Burners::start(&cores[..1]).expect("starts");
        let (gross, net) = (Usage::own().cpu_ns, burners.net_usage().cpu_ns);
        let begin = Instant::now();
        while burners.used_ns() < 30_000_000 {
            assert!(begin.elapsed() < Duration::from_secs(20), "the burner does not burn");
            std::thread::sleep(Duration::from_millis(5));
        }
        let (gross, net) = (Usage::own().cpu_ns - gross, burners.net_usage().cpu_ns - net);
        assert!(gross >= 20_000_000, "{gross}");
        assert!(net < gross, "net {net}, gross {gross}");
    }

    #[test]
    fn a_process_is_seen_from_outside_as_from_inside() {
        let pid = std::process::id() as i32;
        let (before, outside) = (Usage::own(), Usage::of(pid));
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let after = Usage::of(pid).since(outside);
        assert!(after.voluntary_switches >= 5, "{after:?}");
        assert!(outside.cpu_ns > 0 && outside.cpu_ns + 20_000_000 > before.cpu_ns, "{outside:?}");
        let mut sum = after;
        sum += after;
        assert_eq!(sum.since(after), after);
    }

    #[test]
    fn a_forbidden_core_is_an_error() {
        assert!(Burners::start(&[1023]).is_err());
    }
}
