//! `Engine`: taking notifications.

use std::task::Poll;
use std::time::{Duration, Instant};

use super::{Engine, Message};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::notification::Notification;
use crate::sync::{Patience, deadline, sleep_until_woken};

impl Engine {
    /// All notifications that have arrived, oldest first per peer. Never blocks.
    ///
    /// # Errors
    /// [`Error::Shutdown`]; [`Error::Backend`] after a lane has failed.
    pub fn notifications(&self) -> Result<Vec<Notification>> {
        let mut all = Vec::new();
        self.take_notifications(|notification| all.push(notification))?;
        Ok(all)
    }

    /// As [`notifications`](Self::notifications), without a list. The answer is how many there were.
    /// Costs one load when there are none, and where cores are few a turn of the lanes.
    ///
    /// # Errors
    /// As for [`notifications`](Self::notifications).
    pub fn take_notifications(&self, mut take: impl FnMut(Notification)) -> Result<usize> {
        let shared = &self.shared;
        shared.check_process()?;
        let queue = &shared.notifications;
        if queue.is_empty() {
            shared.check()?;
            for lane in 0..shared.lanes().len() {
                shared.drive(lane);
            }
        }
        // What comes meanwhile is for the next call: a fast sender must not keep this one.
        let mut count = 0;
        for _ in 0..queue.len() {
            let Some(notification) = queue.pop() else { break };
            take(notification);
            count += 1;
        }
        // After an empty look none was made room for: a flag is seen at the next look, too, without a fence.
        if count > 0 || queue.may_be_stalled() {
            self.drain_stalled();
        }
        Ok(count)
    }

    /// Lets lanes try again that found the queue of notifications full.
    fn drain_stalled(&self) {
        if self.shared.notifications.take_stalled() {
            for lane in self.shared.lanes() {
                let _ = lane.submit(Message::Drain);
            }
        }
    }

    /// Resolves when there is a notification to take. Any number of tasks may wait, on lanes or
    /// elsewhere; all are woken and may find that another was faster.
    ///
    /// # Errors
    /// As for [`notifications`](Self::notifications).
    pub async fn notified(&self) -> Result<()> {
        std::future::poll_fn(|context| {
            if !self.shared.notifications.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if let Err(error) = self.shared.check() {
                return Poll::Ready(Err(error));
            }
            if !self.shared.notifications.register(context.waker()) {
                return Poll::Ready(Ok(()));
            }
            self.drain_stalled();
            self.shared.wake_lanes();
            Poll::Pending
        })
        .await
    }

    /// Takes all notifications; while there are none, waits for the first: polls for a millisecond
    /// and then sleeps. Empty after `timeout`.
    ///
    /// # Errors
    /// As for [`notifications`](Self::notifications).
    pub fn wait_notifications(&self, timeout: Duration) -> Result<Vec<Notification>> {
        let shared = &self.shared;
        shared.check_may_wait("wait_notifications")?;
        let deadline = deadline(timeout);
        let patience = Patience::new();
        loop {
            let all = self.notifications()?;
            let now = Instant::now();
            if !all.is_empty() || now >= deadline {
                return Ok(all);
            }
            if patience.is_over(now) {
                shared.wake_lanes();
                sleep_until_woken(deadline - now, |waker| shared.notifications.register(waker));
            }
        }
    }
}
