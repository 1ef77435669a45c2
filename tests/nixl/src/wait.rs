//! Waiting for notifications.

use std::time::{Duration, Instant};

use corelane_tests::BOUND;

use crate::Agent;

/// A notification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The name of the agent that has sent it.
    pub from: String,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// Takes notifications until there are `count` or more.
#[track_caller]
pub fn collect(agent: &Agent, count: usize) -> Vec<Message> {
    let mut all = Vec::new();
    let deadline = Instant::now() + BOUND;
    while all.len() < count {
        let got = all.len();
        assert!(Instant::now() < deadline, "{got} of {count} notifications within {BOUND:?}");
        let new = agent.notifications();
        if new.is_empty() {
            std::thread::yield_now();
        }
        all.extend(new);
    }
    all
}

/// Panics if a notification comes within a moment. (A late one is caught by whatever counts next.)
#[track_caller]
pub fn assert_quiet(agent: &Agent) {
    let end = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        let new = agent.notifications();
        assert!(new.is_empty(), "one notification too many: {new:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
