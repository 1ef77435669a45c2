//! The measuring loop: one generic function for closed and open loops, for every backend and for both kinds of
//! application (a thread that polls, a task on the lane).

mod load;
mod recorder;
mod schedule;
mod turn;

#[cfg(feature = "nixl")]
pub(crate) use load::Posting;
pub(crate) use load::{LoadOutcome, LoadShape, Phase, PhaseOutcome, READ_SLOTS, run_phase};
pub(crate) use recorder::{Points, Recorder, histogram, points_of, restore};
pub(crate) use schedule::Schedule;
pub(crate) use turn::{Pass, PassOutcome, run_pass};

use anyhow::Result;

/// How long one operation may take before the run is given up. Far above any real latency, so that it only ends hangs.
pub(crate) const OPERATION_TIMEOUT_NS: u64 = 30_000_000_000;

/// The initiating side of a backend, as the application sees it: post, then poll or wait.
///
/// The `async` methods are what makes one loop serve two worlds: on a thread they poll without yielding and never
/// return `Pending`; on a lane they give the lane back. All times are [`crate::clock::now_ns`].
pub(crate) trait Initiator {
    /// Posts the transfer of a slot; the index after the last slot is the warm-up transfer.
    fn post(&mut self, slot: usize) -> Result<()>;

    /// Posts the transfer of a slot with a notification bound to it.
    fn post_with_notification(&mut self, slot: usize, payload: &[u8]) -> Result<()>;

    /// A posted slot that has finished since the last call, if any.
    fn poll_finished(&mut self) -> Result<Option<usize>>;

    /// Waits until a posted slot has finished; fails when none does within [`OPERATION_TIMEOUT_NS`].
    async fn finished(&mut self) -> Result<usize>;

    /// Sends a free-standing notification.
    fn notify(&mut self, payload: &[u8]) -> Result<()>;

    /// Waits for the target's answer to a notification and returns its sequence number.
    async fn answer(&mut self) -> Result<u64>;

    /// Waits until the clock shows `at_ns`, with nothing in flight.
    async fn idle_until(&mut self, at_ns: u64);

    /// Gives way for a moment while something is in flight: nothing on a thread, one turn of the lane on a lane.
    async fn relax(&mut self);
}

/// The first bytes of a notification: what the other side needs to account for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Counts up by one per notification of a pass.
    pub(crate) sequence: u64,
    /// When it was (or, in an open loop, should have been) sent.
    pub(crate) sent_ns: u64,
    /// Where the bound write ends in the target's arena, with its expected last word; 0 when nothing is bound.
    pub(crate) last_word_at: u64,
    pub(crate) last_word: u64,
}

impl Stamp {
    /// Bytes of an encoded stamp, hence the least size of a notification.
    pub(crate) const LEN: usize = 32;

    /// Writes the stamp into the front of a notification.
    pub(crate) fn encode(&self, payload: &mut [u8]) {
        let words = [self.sequence, self.sent_ns, self.last_word_at, self.last_word];
        for (chunk, word) in payload.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *chunk = word.to_le_bytes();
        }
    }

    /// Reads it back; `None` when the notification is too short.
    pub(crate) fn decode(payload: &[u8]) -> Option<Self> {
        let words = payload.as_chunks::<8>().0;
        let word = |position: usize| words.get(position).map(|word| u64::from_le_bytes(*word));
        Some(Self {
            sequence: word(0)?,
            sent_ns: word(1)?,
            last_word_at: word(2)?,
            last_word: word(3)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_round_trip_and_short_notifications_are_refused() {
        let stamp = Stamp { sequence: 7, sent_ns: u64::MAX, last_word_at: 4096, last_word: 3 };
        let mut payload = [0xEE; 40];
        stamp.encode(&mut payload);
        assert_eq!(Stamp::decode(&payload), Some(stamp));
        assert_eq!(payload[32..], [0xEE; 8]);
        assert_eq!(Stamp::decode(&payload[..31]), None);
    }
}
