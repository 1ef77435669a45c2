//! CPU time of a process, and threads that burn it on purpose.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;

use crate::pinning;

/// User and system time of this process, all threads, in nanoseconds.
fn process_ns() -> u64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| {
        let total = usage.user_time() + usage.system_time();
        total.num_microseconds().unsigned_abs() * 1000
    })
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
            time.map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
        };
        self.threads.iter().map(|(_, clock)| used(clock)).sum()
    }

    /// CPU time of this process without what the burners used, in nanoseconds.
    pub(crate) fn net_process_ns(&self) -> u64 {
        process_ns().saturating_sub(self.used_ns())
    }
}

/// The CPU-time clock of a thread, as clock_getcpuclockid and pthread_getcpuclockid build it (`man 3`): the inverted
/// thread id above three bits that say "of one thread" and "all of its CPU time".
fn thread_clock(tid: i32) -> ClockId {
    const PER_THREAD: i32 = 4;
    const SCHEDULED: i32 = 2;
    ClockId::from_raw((!tid << 3) | PER_THREAD | SCHEDULED)
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
        let (gross, net) = (process_ns(), burners.net_process_ns());
        let begin = Instant::now();
        while burners.used_ns() < 30_000_000 {
            assert!(begin.elapsed() < Duration::from_secs(20), "the burner does not burn");
            std::thread::sleep(Duration::from_millis(5));
        }
        let (gross, net) = (process_ns() - gross, burners.net_process_ns() - net);
        assert!(gross >= 20_000_000, "{gross}");
        assert!(net < gross, "net {net}, gross {gross}");
    }

    #[test]
    fn a_forbidden_core_is_an_error() {
        assert!(Burners::start(&[1023]).is_err());
    }
}
