//! What processes hold over time: memory, files, threads; and how long a thread waits for a core.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::side::Usage;

/// How long this thread could have run and did not, since others had the cores, by the kernel's account.
pub(crate) struct Waits(Option<File>);

impl Waits {
    pub(crate) fn of_this_thread() -> Self {
        Self(File::open("/proc/thread-self/schedstat").ok())
    }

    /// All of it so far. Zero where the kernel keeps no account.
    pub(crate) fn so_far(&self) -> Duration {
        let mut text = [0; 96];
        let told = self.0.as_ref().and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
        let words = text[..told].split(|byte| *byte == b' ');
        let ns = words.skip(1).map(|word| std::str::from_utf8(word).ok()?.parse().ok()).next();
        Duration::from_nanos(ns.flatten().unwrap_or(0))
    }
}

/// Samples of one process.
#[derive(Debug)]
pub(crate) struct Samples {
    name: String,
    samples: Vec<Usage>,
}

/// Fewer say nothing.
const LEAST: usize = 12;
/// Fewer are judged with twice the room, since each of them weighs more, and memory with four times the room: pools still fill. Over tcp they do
/// from 20 to 75 MiB, which 400 rounds leave where they are.
const ENOUGH: usize = 100;

impl Samples {
    pub(crate) fn new(name: String) -> Self {
        Self { name, samples: Vec::new() }
    }

    pub(crate) fn add(&mut self, usage: Usage) {
        self.samples.push(usage);
    }

    fn mean(samples: &[Usage], of: impl Fn(&Usage) -> f64) -> f64 {
        samples.iter().map(of).sum::<f64>() / samples.len().max(1) as f64
    }

    /// Prints the second quarter (in the first, pools fill) beside the last; false: it has grown.
    pub(crate) fn report(&self) -> bool {
        let quarter = self.samples.len() / 4;
        if self.samples.len() < LEAST {
            println!("{:<14}  {} samples are too few to judge", self.name, self.samples.len());
            return true;
        }
        let is_short = self.samples.len() < ENOUGH;
        let (coarser, share) = if is_short { (2.0, 0.1) } else { (1.0, 0.05) };
        let (early, late) =
            (&self.samples[quarter..2 * quarter], &self.samples[self.samples.len() - quarter..]);
        let mut good = true;
        let mut line = format!("{:<14}", self.name);
        let mib = |usage: &Usage| usage.resident as f64 / f64::from(1 << 20);
        // More than what allocators and a process table move by.
        let columns: [(&str, f64, f64, f64); 3] = [
            (
                "MiB",
                Self::mean(early, mib),
                Self::mean(late, mib),
                if is_short { 32.0 } else { 16.0 },
            ),
            (
                "files",
                Self::mean(early, |usage| usage.files as f64),
                Self::mean(late, |usage| usage.files as f64),
                4.0,
            ),
            (
                "threads",
                Self::mean(early, |usage| usage.threads as f64),
                Self::mean(late, |usage| usage.threads as f64),
                2.0,
            ),
        ];
        for (what, early, late, room) in columns {
            let grown = late > early + room * coarser + early * share;
            good &= !grown;
            let mark = if grown { " GROWN" } else { "" };
            line += &format!("  {early:>8.1} -> {late:>8.1} {what}{mark}");
        }
        println!("{line}");
        good
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_shares_its_core_waits_for_it() {
        let waits = Waits::of_this_thread();
        if waits.0.is_none() {
            return eprintln!("SKIPPED: this kernel keeps no account of threads that wait");
        }
        let (over, core) =
            (std::sync::atomic::AtomicBool::new(false), corelane_tests::allowed_cores()[0]);
        corelane_tests::pin_process(core);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            corelane_tests::eventually("it waits", || {
                (0..100_000).for_each(|_| std::hint::spin_loop());
                waits.so_far() > Duration::from_millis(1)
            });
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn what_leaks_is_found_and_what_is_flat_is_not() {
        let report = |count: usize, usage: &dyn Fn(usize) -> Usage| {
            let mut samples = Samples::new("x".into());
            (0..count).for_each(|i| samples.add(usage(i)));
            samples.report()
        };
        let files = |files: usize| Usage { resident: 100 << 20, files, threads: 5 };
        assert!(report(100, &|i| files(20 + i % 3)));
        assert!(!report(100, &|i| files(20 + i / 5)));
        // As many as a job of a short campaign has: a file, a thread or 8 MiB in each round is found.
        assert!(report(30, &|i| files(25 + i * 7 % 10)));
        assert!(!report(30, &|i| files(25 + i)));
        assert!(!report(30, &|i| Usage { threads: 12 + i, ..files(25) }));
        assert!(!report(30, &|i| Usage { resident: (100 + 8 * i as u64) << 20, ..files(25) }));
        assert!(report(8, &|i| files(25 + i)), "too few to tell");
    }
}
