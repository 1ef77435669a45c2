//! What a lane drives, and how file descriptors are spoken of.

use std::{fmt, io, ops::BitOr};

use crate::Cx;

/// The code that a lane drives: it owns the sockets and all the state that a lane's work needs.
///
/// All methods run with the lane's token held: on the lane's thread, or, where cores are few, on the thread of a caller
/// that [assists](crate::Lane::assist). They are never entered twice at the same time. None may block, and none should
/// take longer than 200 us. A panic in any of them ends the lane (see [`on_panic`](Driver::on_panic)), not the process.
pub trait Driver: Send + 'static {
    /// What other threads send to the lane; make it the size of a pointer.
    type Message: Send + 'static;

    /// A message from another thread, or from this lane. Messages of one sender come in the order in which it submitted
    /// them.
    fn on_message(&mut self, cx: &mut Cx<'_>, message: Self::Message);

    /// `token`'s file descriptor may be ([`Readiness::Hot`]: just try) or is ([`Readiness::Ready`]) readable or writable.
    /// Returns true if it made progress, which keeps the descriptor hot.
    fn on_fd(&mut self, cx: &mut Cx<'_>, token: u64, readiness: Readiness) -> bool;

    /// A timer of [`Cx::set_timer`] is due: never early, late by up to a tick (1.05 ms) and the lane's own lateness.
    fn on_timer(&mut self, cx: &mut Cx<'_>, token: u64);

    /// A word of [`Cx::watch_word`] was woken, or does not hold what it was expected to hold: look at it, and watch it again
    /// where that was nothing. Default: nothing.
    fn on_word(&mut self, cx: &mut Cx<'_>, token: u64) {
        let _ = (cx, token);
    }

    /// The kernel does not watch a word of [`Cx::watch_word`], or not any more, for want of memory above all: the driver has to
    /// look at it by itself. Watching it again at once may fail as often as it is tried. Default: nothing.
    fn on_word_lost(&mut self, cx: &mut Cx<'_>, token: u64, error: &io::Error) {
        let _ = (cx, token, error);
    }

    /// Once a turn, after messages, descriptors and timers, and in between after messages: flush queued work, poll what
    /// only polling can see. Returns true if it made progress.
    fn on_turn(&mut self, cx: &mut Cx<'_>) -> bool;

    /// True while something must be polled that cannot wake a parked lane: the lane then does not park. Asked once per
    /// idle turn. Default: false.
    fn must_poll(&self) -> bool {
        false
    }

    /// A caller that does nothing but wait finds the lane at work, and would turn the pump itself: whether it may have it
    /// alone, while the lane's thread sleeps. False where two threads at work are faster than one. Default: true.
    fn may_hand_over(&self) -> bool {
        true
    }

    /// The lane is about to sleep until a descriptor, a timer or a message wakes it. Tell whoever hands it work in another way
    /// (another process, in shared memory) to make a descriptor readable from now on, and look once more for what they did before
    /// they could know: false if there is something, then the lane does not sleep. Default: true.
    ///
    /// The next [`on_turn`](Driver::on_turn) on the lane's own thread ([`Cx::on_lane_thread`]) is after the sleep.
    fn before_sleep(&mut self, cx: &mut Cx<'_>) -> bool {
        let _ = cx;
        true
    }

    /// A stop was requested: called every turn until it returns true or the stop's deadline passes. Finish what can be
    /// finished. Default: nothing to finish.
    fn on_stop(&mut self, cx: &mut Cx<'_>) -> bool {
        let _ = cx;
        true
    }

    /// A message that was accepted but can no longer be handled: the lane has stopped or died. Called for each such
    /// message before the driver is dropped. Default: drops it.
    fn on_abandoned(&mut self, message: Self::Message) {
        drop(message);
    }

    /// The lane panicked with `message`, in the driver or in the runtime. Called once; fail all work here. Afterwards the
    /// lane is dead, and the driver is dropped on the lane's thread.
    fn on_panic(&mut self, message: &str);
}

/// Why [`Driver::on_fd`] is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// The descriptor is hot: nothing is known, a non-blocking try will tell.
    Hot,
    /// The kernel reported the descriptor.
    Ready {
        /// Data, an end of stream or a connection waits.
        readable: bool,
        /// A write will not block, or a connect has ended.
        writable: bool,
        /// The kernel reported an error or a hang-up: a read or `SO_ERROR` tells which.
        hangup: bool,
    },
}

impl Readiness {
    /// Whether a read is worth a try.
    pub fn may_read(self) -> bool {
        match self {
            Self::Hot => true,
            Self::Ready { readable, hangup, .. } => readable || hangup,
        }
    }

    /// Whether a write is worth a try.
    pub fn may_write(self) -> bool {
        match self {
            Self::Hot => true,
            Self::Ready { writable, hangup, .. } => writable || hangup,
        }
    }
}

/// What a quiet descriptor is watched for. Errors and hang-ups are reported with any non-empty interest.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Interest(u8);

impl Interest {
    /// Not watched, not polled: `on_fd` is not called.
    pub const NONE: Self = Self(0);
    /// Data, an end of stream, a connection to accept.
    pub const READABLE: Self = Self(1);
    /// Room to write, the end of a connect.
    pub const WRITABLE: Self = Self(2);
    /// Both.
    pub const BOTH: Self = Self(3);

    /// Whether all of `other` is in `self`.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// `self` without `other`.
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether nothing is watched.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn poll_mask(self) -> u32 {
        let mut mask = 0;
        if self.contains(Self::READABLE) {
            mask |= (libc::POLLIN | libc::POLLRDHUP) as u32;
        }
        if self.contains(Self::WRITABLE) {
            mask |= libc::POLLOUT as u32;
        }
        mask
    }
}

impl BitOr for Interest {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Interest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0 => "NONE",
            1 => "READABLE",
            2 => "WRITABLE",
            _ => "BOTH",
        })
    }
}

/// How a descriptor begins its life on a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Tried every turn until it was idle for a while: an answer is expected soon.
    Hot,
    /// Watched by the lane's ring: nothing is expected soon, and it costs nothing.
    Quiet,
}
