//! The lane's inbox: a bounded queue from many threads to whoever holds the lane's token.
//!
//! Dmitry Vyukov's array queue with one consumer at a time and a closed bit in the tail, so that "closed" and "pushed"
//! have one order: a push either fails, or is seen by the drain that follows the close.

use std::mem::MaybeUninit;

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicUsize, Ordering, UnsafeCell, spin_loop, yield_thread};

/// The tail counts in steps of two; its lowest bit says that the inbox is closed.
const CLOSED: usize = 1;
const STEP: usize = 2;

struct Slot<T> {
    /// `position` when free for the push at `position`, `position + 1` when it holds that push's value.
    sequence: AtomicUsize,
    value: UnsafeCell<MaybeUninit<T>>,
}

/// Why a push gave the value back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PushError<T> {
    Full(T),
    Closed(T),
}

pub(crate) struct Inbox<T> {
    slots: Box<[Slot<T>]>,
    mask: usize,
    tail: CachePadded<AtomicUsize>,
    head: CachePadded<AtomicUsize>,
}

// SAFETY: values move between threads through the slots (hence `T: Send`); a slot's value is touched only by the thread
// that owns the position: the pusher between winning the tail and publishing the sequence, the consumer after that.
unsafe impl<T: Send> Sync for Inbox<T> {}
// SAFETY: as above; the inbox owns its values.
unsafe impl<T: Send> Send for Inbox<T> {}

impl<T> Inbox<T> {
    /// Room for `capacity` values, rounded up to a power of two of at least 2. Allocates here and never again.
    pub(crate) fn new(capacity: usize) -> Self {
        let capacity = capacity.clamp(2, 1 << 24).next_power_of_two();
        let slots = (0..capacity)
            .map(|position| Slot {
                sequence: AtomicUsize::new(position),
                value: UnsafeCell::new(MaybeUninit::uninit()),
            })
            .collect();
        Self {
            slots,
            mask: capacity - 1,
            tail: CachePadded::new(AtomicUsize::new(0)),
            head: CachePadded::new(AtomicUsize::new(0)),
        }
    }

    /// Any thread. Values of one thread come out in the order in which it pushed them.
    pub(crate) fn push(&self, value: T) -> Result<(), PushError<T>> {
        let mut tail = self.tail.load(Ordering::Relaxed);
        loop {
            if tail & CLOSED != 0 {
                return Err(PushError::Closed(value));
            }
            let position = tail / STEP;
            let slot = &self.slots[position & self.mask];
            let sequence = slot.sequence.load(Ordering::Acquire);
            let lead = distance(sequence, position);
            if lead == 0 {
                match self.tail.compare_exchange_weak(
                    tail,
                    tail.wrapping_add(STEP),
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => {
                        // SAFETY: winning the tail made this thread the only one to touch the slot's value until the
                        // store below publishes it; the acquire load of the sequence ordered us after the consumer that
                        // emptied the slot.
                        slot.value.with_mut(|cell| unsafe { (*cell).write(value) });
                        slot.sequence
                            .store(position.wrapping_add(1) & POSITION_MASK, Ordering::Release);
                        return Ok(());
                    }
                    Err(now) => tail = now,
                }
            } else if lead < 0 {
                let now = self.tail.load(Ordering::Relaxed);
                if now == tail {
                    return Err(PushError::Full(value));
                }
                tail = now;
            } else {
                tail = self.tail.load(Ordering::Relaxed);
            }
        }
    }

    /// Takes the oldest value.
    ///
    /// # Safety
    /// No other thread may be in `pop` or `drain` at the same time, and the previous one must happen before this one:
    /// hold the lane's token.
    pub(crate) unsafe fn pop(&self) -> Option<T> {
        let position = self.head.load(Ordering::Relaxed);
        let slot = &self.slots[position & self.mask];
        if slot.sequence.load(Ordering::Acquire) != (position.wrapping_add(1) & POSITION_MASK) {
            return None;
        }
        // SAFETY: the sequence says that the push at this position has been published, and we are the only consumer.
        let value = slot.value.with_mut(|cell| unsafe { (*cell).assume_init_read() });
        let next_lap = position.wrapping_add(self.slots.len()) & POSITION_MASK;
        slot.sequence.store(next_lap, Ordering::Release);
        self.head.store(position.wrapping_add(1) & POSITION_MASK, Ordering::Relaxed);
        Some(value)
    }

    /// Whether a published value waits. Any thread; one that is just being pushed may be missed, which the doorbell
    /// protocol (`sleep`) covers: its pusher looks at the lane's state after publishing.
    pub(crate) fn has_values(&self) -> bool {
        let position = self.head.load(Ordering::Relaxed);
        let sequence = self.slots[position & self.mask].sequence.load(Ordering::Acquire);
        sequence == (position.wrapping_add(1) & POSITION_MASK)
    }

    /// Where the next push goes, and where the next pop comes from, in pushes since the start (modulo `usize` / 2).
    pub(crate) fn positions(&self) -> (usize, usize) {
        (self.tail.load(Ordering::Relaxed) / STEP, self.head.load(Ordering::Relaxed))
    }

    /// From now on every push fails. Idempotent, any thread.
    pub(crate) fn close(&self) {
        self.tail.fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// After `close`: takes all that was pushed before it, waiting for pushes that are half done.
    ///
    /// # Safety
    /// As for `pop`.
    pub(crate) unsafe fn drain(&self, mut take: impl FnMut(T)) {
        loop {
            // SAFETY: the caller's promise.
            if let Some(value) = unsafe { self.pop() } {
                take(value);
                continue;
            }
            if self.head.load(Ordering::Relaxed) == self.tail.load(Ordering::Acquire) / STEP {
                return;
            }
            // A pusher has won its position and is about to publish.
            spin_loop();
            yield_thread();
        }
    }
}

/// Positions count modulo half of `usize`, because the tail's lowest bit is taken.
const POSITION_MASK: usize = usize::MAX / STEP;

/// `a - b` in positions, as a signed number.
fn distance(a: usize, b: usize) -> isize {
    (a.wrapping_sub(b).wrapping_mul(STEP)) as isize
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        self.close();
        // SAFETY: `&mut self`: nobody else is here.
        unsafe { self.drain(drop) };
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn full_and_closed_give_the_value_back() {
        let inbox = Inbox::new(2);
        inbox.push(1).unwrap();
        inbox.push(2).unwrap();
        assert_eq!(inbox.push(3), Err(PushError::Full(3)));
        assert!(inbox.has_values());
        // SAFETY: only this thread pops.
        assert_eq!(unsafe { inbox.pop() }, Some(1));
        inbox.push(3).unwrap();
        inbox.close();
        assert_eq!(inbox.push(4), Err(PushError::Closed(4)));
        let mut rest = Vec::new();
        // SAFETY: only this thread pops.
        unsafe { inbox.drain(|value| rest.push(value)) };
        assert_eq!(rest, [2, 3]);
        assert!(!inbox.has_values());
    }

    #[test]
    fn values_left_inside_are_dropped_once() {
        let value = Arc::new(());
        let inbox = Inbox::new(8);
        for _ in 0..5 {
            inbox.push(value.clone()).unwrap();
        }
        drop(inbox);
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn order_holds_per_sender_and_nothing_is_lost() {
        const EACH: u64 = 20_000;
        let inbox = Arc::new(Inbox::new(64));
        let senders: Vec<_> = (0..3u64)
            .map(|sender| {
                let inbox = inbox.clone();
                std::thread::spawn(move || {
                    for number in 0..EACH {
                        let mut value = (sender, number);
                        while let Err(error) = inbox.push(value) {
                            let PushError::Full(back) = error else { panic!("closed") };
                            value = back;
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let mut next = [0u64; 3];
        while next.iter().sum::<u64>() < 3 * EACH {
            // SAFETY: only this thread pops.
            match unsafe { inbox.pop() } {
                Some((sender, number)) => {
                    assert_eq!(next[sender as usize], number);
                    next[sender as usize] += 1;
                }
                None => std::thread::yield_now(),
            }
        }
        for sender in senders {
            sender.join().unwrap();
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::{sync::Arc, thread};

    use super::*;

    #[test]
    fn loom_two_senders_one_consumer() {
        loom::model(|| {
            let inbox = Arc::new(Inbox::new(2));
            let senders: Vec<_> = (1..=2u32)
                .map(|value| {
                    let inbox = inbox.clone();
                    thread::spawn(move || inbox.push(value).is_ok())
                })
                .collect();
            let mut sum = 0;
            // SAFETY: only this thread pops.
            while let Some(value) = unsafe { inbox.pop() } {
                sum += value;
            }
            for sender in senders {
                assert!(sender.join().unwrap());
            }
            // SAFETY: only this thread pops.
            while let Some(value) = unsafe { inbox.pop() } {
                sum += value;
            }
            assert_eq!(sum, 3);
        });
    }

    #[test]
    fn loom_slot_is_reused_only_after_it_was_read() {
        loom::model(|| {
            let inbox = Arc::new(Inbox::new(2));
            inbox.push(Box::new(1)).unwrap();
            inbox.push(Box::new(2)).unwrap();
            let sender = {
                let inbox = inbox.clone();
                thread::spawn(move || inbox.push(Box::new(3)).is_ok())
            };
            // SAFETY: only this thread pops.
            assert_eq!(unsafe { inbox.pop() }, Some(Box::new(1)));
            let pushed = sender.join().unwrap();
            let mut rest = Vec::new();
            // SAFETY: only this thread pops.
            while let Some(value) = unsafe { inbox.pop() } {
                rest.push(*value);
            }
            assert_eq!(rest.len(), 1 + usize::from(pushed));
        });
    }

    #[test]
    fn loom_a_push_that_beats_the_close_is_drained() {
        loom::model(|| {
            let inbox = Arc::new(Inbox::new(2));
            let sender = {
                let inbox = inbox.clone();
                thread::spawn(move || inbox.push(7u32).is_ok())
            };
            inbox.close();
            let mut drained = 0;
            // SAFETY: only this thread pops.
            unsafe { inbox.drain(|_| drained += 1) };
            assert_eq!(drained, u32::from(sender.join().unwrap()));
        });
    }
}
