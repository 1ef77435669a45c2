//! Memory of a side: poisoned when its registration has ended, looked at again a second later, then used again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use corelane_tests::Buffer;

use crate::load::{self, CHURN_BYTES, CHURNS};

/// How long nothing may write to memory that is nobody's any more.
const QUARANTINE: Duration = Duration::from_millis(1100);
/// Sets at a time; then a round waits for the oldest.
const MAX_SETS: usize = 10;

/// What a side needs in a round. All poison while it rests.
#[derive(Debug)]
pub(crate) struct Set {
    /// Of the side's own transfers.
    pub(crate) local: Buffer,
    /// What the other side reads and writes.
    pub(crate) served: Buffer,
    /// As `served`, for showing that the session is back.
    pub(crate) spare: Buffer,
    /// Registered one after another, and deregistered while they are used.
    pub(crate) churn: Vec<Buffer>,
}

impl Set {
    fn new() -> Self {
        Self {
            local: Buffer::new(load::local_bytes()),
            served: Buffer::new(load::served_bytes()),
            spare: Buffer::new(load::SPARE_BYTES),
            churn: (0..CHURNS).map(|_| Buffer::new(CHURN_BYTES)).collect(),
        }
    }

    fn all(&self) -> impl Iterator<Item = (&'static str, &Buffer)> {
        [("local", &self.local), ("served", &self.served), ("spare", &self.spare)]
            .into_iter()
            .chain(self.churn.iter().map(|buffer| ("churned", buffer)))
    }

    fn bytes(&self) -> usize {
        self.all().map(|(_, buffer)| buffer.len()).sum()
    }

    fn check(&self) -> Vec<String> {
        let wrong = |(name, buffer): (&str, &Buffer)| {
            buffer.check_poison(0, buffer.len()).err().map(|why| format!("{name} memory: {why}"))
        };
        self.all().filter_map(wrong).collect()
    }
}

#[derive(Debug)]
struct Resting {
    since: Instant,
    /// Of the round that it was used in.
    seed: u64,
    set: Set,
}

/// What was written late, with the seed of the round whose memory it was.
pub(crate) type Late = (u64, String);

/// Sets that rest, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    resting: VecDeque<Resting>,
    made: usize,
}

impl Pool {
    /// A set of poison, and what was written late to the one that is used again.
    pub(crate) fn take(&mut self) -> (Set, Vec<Late>) {
        let due = self.resting.front().is_some_and(|oldest| oldest.since.elapsed() >= QUARANTINE);
        if !due && self.made < MAX_SETS {
            self.made += 1;
            return (Set::new(), Vec::new());
        }
        match self.resting.pop_front() {
            Some(resting) => release(resting),
            None => (Set::new(), Vec::new()),
        }
    }

    /// Takes a set back whose registrations and transfers have ended, and which was poisoned since.
    pub(crate) fn give_back(&mut self, seed: u64, set: Set) {
        self.resting.push_back(Resting { since: Instant::now(), seed, set });
    }

    /// Bytes of all sets that were made and rest, each of them written to.
    pub(crate) fn bytes(&self) -> usize {
        self.resting.iter().map(|resting| resting.set.bytes()).sum()
    }

    /// Waits for the end of every quarantine: what was written late.
    pub(crate) fn check_all(&mut self) -> Vec<Late> {
        let mut late = Vec::new();
        for resting in std::mem::take(&mut self.resting) {
            let seed = resting.seed;
            let (set, wrong) = release(resting);
            late.extend(wrong);
            self.give_back(seed, set);
        }
        late
    }
}

/// Ends a quarantine when it is time.
fn release(Resting { since, seed, set }: Resting) -> (Set, Vec<Late>) {
    std::thread::sleep(QUARANTINE.saturating_sub(since.elapsed()));
    let late = set.check();
    for (_, buffer) in set.all().filter(|_| !late.is_empty()) {
        buffer.poison(0, buffer.len());
    }
    (set, late.into_iter().map(|why| (seed, why)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_write_is_found_when_the_memory_is_used_again() {
        let mut pool = Pool::default();
        let (set, late) = pool.take();
        assert!(late.is_empty());
        pool.give_back(7, set);
        assert!(pool.check_all().is_empty());
        pool.resting[0].set.churn[3].write(77, b"late");
        let late = pool.check_all();
        assert_eq!((late.len(), late[0].0), (1, 7));
        assert!(late[0].1.contains("churned") && late[0].1.contains("byte 77"), "{}", late[0].1);
        assert!(pool.check_all().is_empty(), "told once");
    }
}
