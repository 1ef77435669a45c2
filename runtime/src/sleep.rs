//! How a lane falls asleep without losing a wake-up: a state word, and the fences of Dekker's algorithm.
//!
//! The lane: announce, fence, look for work once more, sleep. Everyone else: make the work visible, fence, look at the
//! state. One of the two sees the other, whichever was first. Of several wakers one wins the state and rings.

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicU32, Ordering, fence};

/// What a lane is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum LaneState {
    /// Turning: it will see new work by itself.
    Awake = 0,
    /// Asleep for at most ten milliseconds while callers drive the pump.
    Standby = 1,
    /// Asleep until a file descriptor, a timer or the doorbell.
    Parked = 2,
}

impl LaneState {
    fn from_word(word: u32) -> Self {
        match word {
            1 => Self::Standby,
            2 => Self::Parked,
            _ => Self::Awake,
        }
    }
}

pub(crate) struct Sleep {
    state: CachePadded<AtomicU32>,
}

impl Sleep {
    pub(crate) fn new() -> Self {
        Self { state: CachePadded::new(AtomicU32::new(LaneState::Awake as u32)) }
    }

    /// Lane: about to sleep. Afterwards look for work once more; if there is some, call `awake` and go on.
    pub(crate) fn announce(&self, how: LaneState) {
        self.state.store(how as u32, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Lane: awake again.
    pub(crate) fn awake(&self) {
        self.state.store(LaneState::Awake as u32, Ordering::Release);
    }

    /// Any thread, after making work visible: what the lane is doing.
    pub(crate) fn look(&self) -> LaneState {
        fence(Ordering::SeqCst);
        LaneState::from_word(self.state.load(Ordering::Relaxed))
    }

    /// Any thread, after `look` said that the lane sleeps: true for the one thread that has to ring the doorbell.
    pub(crate) fn claim_wake(&self, seen: LaneState) -> bool {
        seen != LaneState::Awake
            && self
                .state
                .compare_exchange(
                    seen as u32,
                    LaneState::Awake as u32,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                )
                .is_ok()
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::{
        sync::{Arc, Condvar, Mutex},
        thread,
    };

    use super::*;
    use crate::inbox::Inbox;

    /// An eventfd.
    struct Bell(Mutex<bool>, Condvar);

    impl Bell {
        fn ring(&self) {
            *self.0.lock().unwrap() = true;
            self.1.notify_one();
        }

        fn wait(&self) {
            let mut rung = self.0.lock().unwrap();
            while !*rung {
                rung = self.1.wait(rung).unwrap();
            }
            *rung = false;
        }
    }

    /// If a wake-up could be lost, the lane would wait for ever and loom would report the deadlock.
    #[test]
    fn loom_no_wakeup_is_lost() {
        loom::model(|| {
            let shared =
                Arc::new((Inbox::new(2), Sleep::new(), Bell(Mutex::new(false), Condvar::new())));
            let sender = {
                let shared = shared.clone();
                thread::spawn(move || {
                    let (inbox, sleep, bell) = &*shared;
                    inbox.push(7u32).unwrap();
                    let state = sleep.look();
                    if sleep.claim_wake(state) {
                        bell.ring();
                    }
                })
            };
            let (inbox, sleep, bell) = &*shared;
            loop {
                // SAFETY: only this thread pops.
                if unsafe { inbox.pop() }.is_some() {
                    break;
                }
                sleep.announce(LaneState::Parked);
                if inbox.has_values() {
                    sleep.awake();
                    continue;
                }
                bell.wait();
                sleep.awake();
            }
            sender.join().unwrap();
        });
    }

    #[test]
    fn loom_of_two_wakers_exactly_one_rings() {
        loom::model(|| {
            let sleep = Arc::new(Sleep::new());
            sleep.announce(LaneState::Parked);
            let wakers: Vec<_> = (0..2)
                .map(|_| {
                    let sleep = sleep.clone();
                    thread::spawn(move || {
                        let state = sleep.look();
                        sleep.claim_wake(state)
                    })
                })
                .collect();
            let rings = wakers.into_iter().filter(|_| true).map(|w| w.join().unwrap());
            assert_eq!(rings.filter(|rang| *rang).count(), 1);
        });
    }
}
