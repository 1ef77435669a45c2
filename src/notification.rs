//! Notifications on their way to the application.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;

use crossbeam_queue::SegQueue;

/// Bytes that a peer's application sent, or bound to a transfer of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    /// Agent name of the sender.
    pub from: Arc<str>,
    /// What it sent.
    pub payload: Vec<u8>,
}

/// The engine's queue of notifications that the application has not taken yet.
///
/// Lanes push and callers pop without a lock, so that a preempted caller never stops a lane. The
/// bounds are kept by counting; a lane that meets one keeps the notification, acknowledges
/// nothing, and is told by `drained` to try again.
#[derive(Debug)]
pub(crate) struct NotificationQueue {
    queue: SegQueue<Notification>,
    count: AtomicUsize,
    bytes: AtomicUsize,
    delivered: AtomicU64,
    max_count: usize,
    max_bytes: usize,
    /// A lane was turned away since the last `drained`.
    stalled: AtomicBool,
    /// Somebody in `wakers` waits for the queue to be not empty.
    waiting: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
}

/// Waiters remembered at a time.
const MAX_WAITERS: usize = 1024;

impl NotificationQueue {
    pub(crate) fn new(max_count: usize, max_bytes: usize) -> Self {
        Self {
            queue: SegQueue::new(),
            count: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            delivered: AtomicU64::new(0),
            max_count,
            max_bytes,
            stalled: AtomicBool::new(false),
            waiting: AtomicBool::new(false),
            wakers: Mutex::new(Vec::new()),
        }
    }

    /// Wakes `waker` once the queue is not empty; false: it is not empty now.
    pub(crate) fn register(&self, waker: &Waker) -> bool {
        let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.store(true, Ordering::Relaxed);
        // With the fence in `push`: either the pusher sees `waiting`, or this sees what it pushed.
        fence(Ordering::SeqCst);
        if !self.queue.is_empty() {
            return false;
        }
        if !wakers.iter().any(|known| known.will_wake(waker)) {
            if wakers.len() >= MAX_WAITERS {
                // Callers that gave up leave their wakers behind: the oldest is woken for nothing,
                // and registers again if it still waits.
                wakers.remove(0).wake();
            }
            wakers.push(waker.clone());
        }
        true
    }

    /// Wakes everybody that waits: a notification is there, or never will be.
    pub(crate) fn wake_all(&self) {
        self.waiting.store(false, Ordering::Relaxed);
        let wakers =
            std::mem::take(&mut *self.wakers.lock().unwrap_or_else(PoisonError::into_inner));
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Takes a notification, or gives it back because the queue is full. A queue that is empty
    /// takes one of any size.
    pub(crate) fn push(&self, notification: Notification) -> Result<(), Notification> {
        self.try_push(notification).or_else(|back| {
            self.stalled.store(true, Ordering::Relaxed);
            // With the fence in `take_stalled`: either the consumer sees `stalled`, or this sees
            // the room that it has made.
            fence(Ordering::SeqCst);
            self.try_push(back)
        })
    }

    fn try_push(&self, notification: Notification) -> Result<(), Notification> {
        let len = notification.payload.len();
        let count = self.count.fetch_add(1, Ordering::AcqRel);
        let bytes = self.bytes.fetch_add(len, Ordering::AcqRel);
        let full = count >= self.max_count || bytes.saturating_add(len) > self.max_bytes;
        if full && count > 0 && !mutated!(QueueWithoutBound) {
            self.count.fetch_sub(1, Ordering::AcqRel);
            self.bytes.fetch_sub(len, Ordering::AcqRel);
            return Err(notification);
        }
        self.queue.push(notification);
        self.delivered.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) {
            self.wake_all();
        }
        Ok(())
    }

    pub(crate) fn pop(&self) -> Option<Notification> {
        let notification = self.queue.pop()?;
        self.count.fetch_sub(1, Ordering::AcqRel);
        self.bytes.fetch_sub(notification.payload.len(), Ordering::AcqRel);
        Some(notification)
    }

    /// Whether a lane waits for room; asked after popping.
    pub(crate) fn take_stalled(&self) -> bool {
        fence(Ordering::SeqCst);
        self.stalled.load(Ordering::Relaxed) && self.stalled.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn may_be_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notification(len: usize) -> Notification {
        Notification { from: "a".into(), payload: vec![7; len] }
    }

    #[test]
    fn both_bounds_hold_and_a_stalled_lane_is_remembered() {
        let queue = NotificationQueue::new(2, 100);
        queue.push(notification(60)).unwrap();
        assert!(!queue.take_stalled());
        let back = queue.push(notification(50)).unwrap_err();
        assert_eq!(back.payload.len(), 50);
        assert!(queue.take_stalled() && !queue.take_stalled());
        queue.push(notification(40)).unwrap();
        queue.push(notification(0)).unwrap_err();
        assert_eq!((queue.len(), queue.bytes()), (2, 100));
        assert_eq!(queue.pop().unwrap().payload.len(), 60);
        assert_eq!((queue.len(), queue.bytes()), (1, 40));
    }

    #[test]
    fn a_waiter_is_woken_once_and_not_left_behind() {
        struct Count(AtomicUsize);
        impl std::task::Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let queue = NotificationQueue::new(10, 100);
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(count.clone());
        assert!(queue.register(&waker) && queue.register(&waker));
        queue.push(notification(1)).unwrap();
        queue.push(notification(1)).unwrap();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(!queue.register(&waker), "there is something to take");
    }

    #[test]
    fn an_empty_queue_takes_one_of_any_size() {
        let queue = NotificationQueue::new(2, 100);
        queue.push(notification(5000)).unwrap();
        queue.push(notification(1)).unwrap_err();
        assert!(queue.pop().is_some() && queue.pop().is_none());
    }
}
