//! The target's account of notifications: one-way latencies, and whether each came once, in order and behind its data.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use hdrhistogram::Histogram;

use crate::arena::Arena;
use crate::engine_side::PATIENCE;
use crate::measure::{Points, Stamp, histogram, points_of};

/// Shared by the target's application, which writes it, and the control connection, which reads it between passes.
#[derive(Clone)]
pub(crate) struct Ledger {
    shared: Arc<Shared>,
}

struct Shared {
    paused: AtomicBool,
    account: Mutex<Account>,
}

struct Account {
    one_way: Histogram<u64>,
    next_sequence: u64,
    failure: Option<String>,
}

impl Ledger {
    pub(crate) fn new() -> Self {
        let account = Account { one_way: histogram(), next_sequence: 0, failure: None };
        Self {
            shared: Arc::new(Shared {
                paused: AtomicBool::new(false),
                account: Mutex::new(account),
            }),
        }
    }

    /// Never contended while a pass runs: the control connection is silent then.
    fn account(&self) -> MutexGuard<'_, Account> {
        self.shared.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no pass is under way.
    pub(crate) fn is_paused(&self) -> bool {
        self.shared.paused.load(Ordering::Relaxed)
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::Relaxed);
    }

    /// Whether the last word of a bound write is in memory. Called when its notification is seen, before the answer.
    pub(crate) fn data_is_there(&self, arena: &Arena, stamp: &Stamp) -> bool {
        stamp.last_word_at == 0 || arena.load_word(stamp.last_word_at) == Some(stamp.last_word)
    }

    /// Books a notification, after it was answered, so that the booking is part of nobody's latency.
    pub(crate) fn arrived(&self, stamp: &Stamp, arrived_ns: u64, data_intact: bool) {
        let mut account = self.account();
        let expected = account.next_sequence;
        if stamp.sequence != expected && account.failure.is_none() {
            account.failure = Some(format!(
                "verification failed: notification {} arrived where {expected} was due: lost, repeated or out of order",
                stamp.sequence
            ));
        }
        if !data_intact && account.failure.is_none() {
            account.failure = Some(format!(
                "verification failed: notification {} was seen before the data it is bound to",
                stamp.sequence
            ));
        }
        if stamp.sent_ns != 0 {
            account.one_way.saturating_record(arrived_ns.saturating_sub(stamp.sent_ns));
        }
        // Last, and whatever came: `settle` waits for this count.
        account.next_sequence = stamp.sequence + 1;
    }

    /// Keeps the first failure of a serving thread for the control connection to report.
    pub(crate) fn fail(&self, message: String) {
        self.account().failure.get_or_insert(message);
    }

    /// Waits until `notifications` have been booked since the case was opened, and hands out the latencies so far.
    pub(crate) fn settle(&self, notifications: u64) -> Result<Points> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            {
                let mut account = self.account();
                if let Some(failure) = &account.failure {
                    bail!("{failure}");
                }
                if account.next_sequence == notifications {
                    let points = points_of(&account.one_way);
                    account.one_way.reset();
                    return Ok(points);
                }
                ensure!(
                    Instant::now() < deadline,
                    "verification failed: {} of {notifications} notifications reached the target's application",
                    account.next_sequence
                );
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(sequence: u64) -> Stamp {
        Stamp { sequence, sent_ns: 1000, last_word_at: 0, last_word: 0 }
    }

    #[test]
    fn latencies_are_handed_out_once() {
        let ledger = Ledger::new();
        ledger.arrived(&stamp(0), 6000, true);
        ledger.arrived(&stamp(1), 7000, true);
        let points = ledger.settle(2).expect("both came");
        assert_eq!(points.iter().map(|point| point.1).sum::<u64>(), 2);
        assert!(ledger.settle(2).expect("still settled").is_empty());
    }

    #[test]
    fn losses_repeats_and_early_notifications_are_failures() {
        let lost = Ledger::new();
        lost.arrived(&stamp(1), 2000, true);
        assert!(lost.settle(2).expect_err("0 is missing").to_string().contains("lost"));
        let repeated = Ledger::new();
        repeated.arrived(&stamp(0), 2000, true);
        repeated.arrived(&stamp(0), 2000, true);
        assert!(repeated.settle(2).is_err());
        let early = Ledger::new();
        early.arrived(&stamp(0), 2000, false);
        assert!(early.settle(1).expect_err("early").to_string().contains("before the data"));
    }

    #[test]
    fn warm_up_is_not_measured_and_data_is_looked_at() {
        let ledger = Ledger::new();
        ledger.arrived(&Stamp { sent_ns: 0, ..stamp(0) }, 2000, true);
        assert!(ledger.settle(1).expect("settled").is_empty());
        let arena = Arena::new(4096).expect("map");
        arena.fill(0, 64, 3, 4);
        let bound = Stamp { last_word_at: 8, last_word: 4, ..stamp(0) };
        assert!(ledger.data_is_there(&arena, &bound));
        assert!(!ledger.data_is_there(&arena, &Stamp { last_word: 5, ..bound }));
    }
}
