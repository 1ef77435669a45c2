//! Notifications from a peer: put together, de-duplicated, held behind their data, delivered.

use std::collections::{HashMap, HashSet, VecDeque};

use super::outbox::{Bound, WINDOW_BYTES, WINDOW_COUNT};
use crate::config::MAX_NOTIFICATION_BYTES;
#[cfg(feature = "sim")]
use crate::sim::coverage::Arrival as Seen;

/// Transfers with a bound notification that may be under way from one peer at a time.
const MAX_COUNTED: usize = 1 << 17;
/// Abandoned transfers that are remembered: more than can have requests on the way at a time.
const MAX_ABANDONED: usize = 4096;
/// Bytes of notifications that may wait for their data. A sender keeps larger ones than
/// [`MAX_IN_BAND`](super::outbox::MAX_IN_BAND) to itself until their transfer has ended.
const MAX_HELD_BYTES: usize = 64 << 20;
/// Bytes that may wait for the application after the sender was told that they have arrived: what
/// was held for its data, and what links lost meanwhile have left behind.
const MAX_SETTLED_BYTES: usize = MAX_HELD_BYTES + 2 * MAX_NOTIFICATION_BYTES;

/// The peer broke the rules of the notification channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InboxError {
    #[error("a notification has the wrong sequence number")]
    Sequence,
    #[error("a notification fragment does not fit its notification")]
    Fragment,
    #[error("a notification is larger than allowed")]
    Size,
    #[error("too many unacknowledged notifications")]
    Window,
}

/// One NOTIFY frame, as far as its header says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) seq: u64,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) total: u64,
    pub(crate) bound: Option<Bound>,
    pub(crate) void: bool,
}

#[derive(Debug, Default)]
struct Count {
    arrived: u32,
    failed: bool,
    /// The notification that waits for the rest, and how many pieces it waits for.
    held: Option<(u32, Vec<u8>)>,
}

/// The receiving half of one session.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    /// Next sequence number to arrive.
    expects: u64,
    partial: Vec<u8>,
    /// Arrived, in order, and not yet taken by the application's queue. With their sequence
    /// number, unless it was acknowledged already.
    ready: VecDeque<(Option<u64>, Vec<u8>)>,
    ready_bytes: usize,
    /// How many of them, and of their bytes, the sender does not count any more.
    settled: usize,
    settled_bytes: usize,
    held_bytes: usize,
    /// Acknowledged so far.
    told: u64,
    counted: HashMap<u64, Count>,
    /// Transfers that were abandoned last: pieces of theirs may still arrive on other links.
    abandoned: HashSet<u64>,
    abandoned_order: VecDeque<u64>,
}

impl Inbox {
    pub(crate) fn expects(&self) -> u64 {
        self.expects
    }

    /// Whether the payload of this frame is wanted; checks all that the header says.
    pub(crate) fn check(&self, arrival: &Arrival) -> Result<(), InboxError> {
        if arrival.seq != self.expects {
            return Err(InboxError::Sequence);
        }
        if arrival.total > MAX_NOTIFICATION_BYTES as u64 {
            return Err(InboxError::Size);
        }
        let end = arrival.offset.checked_add(arrival.len).ok_or(InboxError::Fragment)?;
        let empty = arrival.len == 0 && arrival.total > 0;
        if arrival.offset != self.partial.len() as u64 || end > arrival.total || empty {
            return Err(InboxError::Fragment);
        }
        if arrival.void && arrival.total != 0 {
            return Err(InboxError::Fragment);
        }
        // The sender's window, checked: at most so much may wait here unacknowledged.
        let waiting = self.ready.len() - self.settled;
        let waiting_bytes = self.ready_bytes - self.settled_bytes;
        let over = waiting_bytes as u64 + arrival.total > WINDOW_BYTES as u64;
        if waiting > 0 && (over || waiting >= WINDOW_COUNT) {
            return Err(InboxError::Window);
        }
        if self.settled_bytes > MAX_SETTLED_BYTES || self.settled > MAX_COUNTED {
            return Err(InboxError::Window);
        }
        Ok(())
    }

    /// Takes the payload of a frame that `check` accepted.
    pub(crate) fn arrive(&mut self, arrival: &Arrival, bytes: Vec<u8>) -> Result<(), InboxError> {
        let whole = if self.partial.is_empty() && bytes.len() as u64 == arrival.total {
            reached!(arrival, self.state(), Seen::Whole);
            bytes
        } else {
            reached!(arrival, self.state(), Seen::Fragment);
            self.partial.extend_from_slice(&bytes);
            if (self.partial.len() as u64) < arrival.total {
                return Ok(());
            }
            std::mem::take(&mut self.partial)
        };
        let seq = self.expects;
        self.expects += 1;
        match arrival.bound {
            _ if arrival.void => reached!(arrival, self.state(), Seen::Void),
            None => self.make_ready(Some(seq), whole),
            Some(_) if mutated!(BoundNotHeld) => self.make_ready(Some(seq), whole),
            Some(bound) => self.hold(seq, bound, whole)?,
        }
        Ok(())
    }

    /// Takes a notification that came behind its data, on a way that keeps order and counts what is there.
    pub(crate) fn bound(&mut self, payload: Vec<u8>) {
        self.make_ready(None, payload);
    }

    fn make_ready(&mut self, seq: Option<u64>, payload: Vec<u8>) {
        self.ready_bytes += payload.len();
        if seq.is_none() {
            self.settled += 1;
            self.settled_bytes += payload.len();
        }
        if mutated!(LastInFirstOut) {
            return self.ready.push_front((seq, payload));
        }
        self.ready.push_back((seq, payload));
    }

    fn hold(&mut self, seq: u64, bound: Bound, payload: Vec<u8>) -> Result<(), InboxError> {
        #[cfg(feature = "sim")]
        let state = self.state();
        if mutated!(BoundSeenTwice) {
            self.make_ready(None, payload.clone());
        }
        let pieces = bound.pieces - u32::from(mutated!(OnePieceEarly));
        let bound = Bound { pieces, ..bound };
        let count = self.count(bound.transfer)?;
        if count.failed || count.arrived >= bound.pieces {
            let failed = count.failed;
            reached!(arrival, state, if failed { Seen::BoundFailed } else { Seen::BoundAfterData });
            self.counted.remove(&bound.transfer);
            if !failed {
                self.make_ready(Some(seq), payload);
            }
        } else {
            reached!(arrival, state, Seen::BoundBeforeData);
            let len = payload.len();
            if count.held.replace((bound.pieces, payload)).is_some() {
                return Err(InboxError::Sequence);
            }
            self.held_bytes += len;
            if self.held_bytes > MAX_HELD_BYTES {
                return Err(InboxError::Window);
            }
        }
        Ok(())
    }

    fn count(&mut self, transfer: u64) -> Result<&mut Count, InboxError> {
        if self.counted.len() >= MAX_COUNTED && !self.counted.contains_key(&transfer) {
            return Err(InboxError::Window);
        }
        Ok(self.counted.entry(transfer).or_default())
    }

    /// A piece of a counted WRITE has landed, or was refused.
    pub(crate) fn piece(&mut self, transfer: u64, ok: bool) -> Result<(), InboxError> {
        if !self.abandoned.is_empty() && self.abandoned.contains(&transfer) {
            reached!(arrival, self.state(), Seen::Abandoned);
            return Ok(());
        }
        let count = self.count(transfer)?;
        count.failed |= !ok;
        count.arrived += u32::from(ok);
        let done = match &count.held {
            Some((pieces, _)) => count.failed || count.arrived >= *pieces,
            None => false,
        };
        if done
            && let Some((payload, failed)) = self.forget(transfer)
            && !failed
        {
            // Its number was acknowledged when it arrived; what is left is to deliver it.
            self.make_ready(None, payload);
        }
        Ok(())
    }

    /// Forgets a count; the answer is the notification that it held, and whether a piece failed.
    fn forget(&mut self, transfer: u64) -> Option<(Vec<u8>, bool)> {
        let count = self.counted.remove(&transfer)?;
        let (_, payload) = count.held?;
        self.held_bytes -= payload.len();
        Some((payload, count.failed))
    }

    /// The transfer has ended without its notification.
    pub(crate) fn abandon(&mut self, transfer: u64) {
        self.forget(transfer);
        if self.abandoned.insert(transfer) {
            self.abandoned_order.push_back(transfer);
        }
        if self.abandoned_order.len() > MAX_ABANDONED
            && let Some(oldest) = self.abandoned_order.pop_front()
        {
            self.abandoned.remove(&oldest);
        }
    }

    /// Hands over what is ready, as far as `deliver` takes it.
    pub(crate) fn deliver(&mut self, mut deliver: impl FnMut(Vec<u8>) -> Result<(), Vec<u8>>) {
        while let Some((seq, payload)) = self.ready.pop_front() {
            let len = payload.len();
            match deliver(payload) {
                Ok(()) => {
                    self.ready_bytes -= len;
                    if seq.is_none() {
                        self.settled -= 1;
                        self.settled_bytes -= len;
                    }
                }
                Err(payload) => {
                    self.ready.push_front((seq, payload));
                    return;
                }
            }
        }
    }

    /// Transfers whose pieces are being counted.
    #[cfg(test)]
    pub(crate) fn counts(&self) -> usize {
        self.counted.len()
    }

    /// Notifications that wait for the application, their bytes, bytes that wait for data, counted and abandoned transfers.
    #[cfg(feature = "sim")]
    pub(crate) fn levels(&self) -> (usize, usize, usize, usize, usize) {
        let (ready, counted) = (self.ready.len(), self.counted.len());
        (ready, self.ready_bytes, self.held_bytes, counted, self.abandoned_order.len())
    }

    #[cfg(feature = "sim")]
    fn state(&self) -> crate::sim::coverage::InboxState {
        use crate::sim::coverage::InboxState;
        if self.is_backlogged() { InboxState::Backlogged } else { InboxState::Open }
    }

    pub(crate) fn is_backlogged(&self) -> bool {
        !self.ready.is_empty()
    }

    /// What to acknowledge now, if that is news: all below it are in the application's queue, or
    /// held here behind their data.
    pub(crate) fn acknowledgement(&mut self) -> Option<u64> {
        if self.settled_bytes > WINDOW_BYTES || self.settled > WINDOW_COUNT {
            // The application takes nothing: stop the sender although its data has arrived.
            return None;
        }
        let waiting = self.ready.iter().find_map(|(seq, _)| *seq);
        let below = waiting.unwrap_or(self.expects);
        if below <= self.told {
            return None;
        }
        self.told = below;
        Some(below)
    }

    /// What was acknowledged last: the peer may not have it yet.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.told
    }

    /// The link is gone. Counts belong to transfers that have failed with it, and the next
    /// handshake settles what has arrived.
    pub(crate) fn rewind(&mut self) {
        self.partial.clear();
        self.counted.clear();
        self.abandoned.clear();
        self.abandoned_order.clear();
        self.held_bytes = 0;
        if mutated!(NoDeduplication) {
            self.expects = self.told;
        }
        for (seq, _) in &mut self.ready {
            *seq = None;
        }
        (self.settled, self.settled_bytes) = (self.ready.len(), self.ready_bytes);
    }

    /// A new session begins.
    pub(crate) fn restart(&mut self) {
        self.rewind();
        // What is ready is delivered as soon as there is room, whatever becomes of the session.
        (self.expects, self.told) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(seq: u64, len: u64) -> Arrival {
        Arrival { seq, offset: 0, len, total: len, bound: None, void: false }
    }

    fn take(inbox: &mut Inbox) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        inbox.deliver(|payload| {
            all.push(payload);
            Ok(())
        });
        all
    }

    #[test]
    fn fragments_are_put_together() {
        let mut inbox = Inbox::default();
        let first = Arrival { len: 3, total: 5, ..whole(0, 0) };
        let second = Arrival { offset: 3, len: 2, total: 5, ..whole(0, 0) };
        inbox.check(&first).unwrap();
        inbox.arrive(&first, b"abc".to_vec()).unwrap();
        assert_eq!(inbox.acknowledgement(), None);
        assert_eq!(inbox.check(&first), Err(InboxError::Fragment));
        inbox.check(&second).unwrap();
        inbox.arrive(&second, b"de".to_vec()).unwrap();
        assert_eq!(take(&mut inbox), [b"abcde"]);
        assert_eq!(inbox.acknowledgement(), Some(1));
        assert_eq!(inbox.acknowledgement(), None);
    }

    #[test]
    fn repeated_skipped_and_oversized_numbers_are_refused() {
        let mut inbox = Inbox::default();
        assert_eq!(inbox.check(&whole(1, 0)), Err(InboxError::Sequence));
        inbox.arrive(&whole(0, 0), vec![]).unwrap();
        assert_eq!(inbox.check(&whole(0, 0)), Err(InboxError::Sequence));
        let huge = Arrival { len: 1, total: MAX_NOTIFICATION_BYTES as u64 + 1, ..whole(1, 0) };
        assert_eq!(inbox.check(&huge), Err(InboxError::Size));
        let stuck = Arrival { len: 0, total: 4, ..whole(1, 0) };
        assert_eq!(inbox.check(&stuck), Err(InboxError::Fragment), "no endless empty fragments");
    }

    #[test]
    fn a_bound_one_waits_for_all_pieces_wherever_it_arrives() {
        let bound = Some(Bound { transfer: 9, pieces: 2 });
        for early in [true, false] {
            let mut inbox = Inbox::default();
            let arrival = Arrival { bound, ..whole(0, 1) };
            inbox.piece(9, true).unwrap();
            if early {
                inbox.arrive(&arrival, vec![1]).unwrap();
                assert!(take(&mut inbox).is_empty());
                assert_eq!(inbox.acknowledgement(), Some(1), "held counts as arrived");
                inbox.arrive(&whole(1, 1), vec![2]).unwrap();
                assert_eq!(take(&mut inbox), [[2]], "others pass");
                inbox.piece(9, true).unwrap();
            } else {
                inbox.piece(9, true).unwrap();
                inbox.arrive(&arrival, vec![1]).unwrap();
            }
            assert_eq!(take(&mut inbox), [[1]]);
            assert!(inbox.counted.is_empty());
        }
    }

    #[test]
    fn a_bound_one_of_a_refused_write_is_dropped() {
        let arrival = Arrival { bound: Some(Bound { transfer: 9, pieces: 2 }), ..whole(0, 1) };
        let mut inbox = Inbox::default();
        inbox.piece(9, false).unwrap();
        inbox.arrive(&arrival, vec![1]).unwrap();
        let mut late = Inbox::default();
        late.arrive(&arrival, vec![1]).unwrap();
        late.piece(9, false).unwrap();
        for inbox in [&mut inbox, &mut late] {
            assert!(take(inbox).is_empty());
            assert!(inbox.counted.is_empty());
            assert_eq!(inbox.acknowledgement(), Some(1));
        }
    }

    #[test]
    fn pieces_of_an_abandoned_transfer_leave_nothing_behind() {
        let mut inbox = Inbox::default();
        for transfer in 0..3 * MAX_ABANDONED as u64 {
            inbox.piece(transfer, true).unwrap();
            inbox.abandon(transfer);
            inbox.piece(transfer, true).unwrap();
            assert!(inbox.counted.is_empty());
        }
        assert_eq!(inbox.abandoned.len(), MAX_ABANDONED);
        assert_eq!(inbox.abandoned_order.len(), MAX_ABANDONED);
    }

    #[test]
    fn what_the_application_has_no_room_for_is_not_acknowledged() {
        let mut inbox = Inbox::default();
        for seq in 0..3 {
            inbox.arrive(&whole(seq, 1), vec![seq as u8]).unwrap();
        }
        let mut room = 1;
        inbox.deliver(|payload| {
            room -= 1;
            if room >= 0 { Ok(()) } else { Err(payload) }
        });
        assert!(inbox.is_backlogged());
        assert_eq!(inbox.acknowledgement(), Some(1));
        assert_eq!(take(&mut inbox), [[1], [2]]);
        assert_eq!(inbox.acknowledgement(), Some(3));
    }

    #[test]
    fn what_waits_across_a_lost_link_leaves_the_next_link_its_window() {
        let mut inbox = Inbox::default();
        inbox.arrive(&whole(0, 2), vec![0; WINDOW_BYTES]).unwrap();
        inbox.rewind();
        inbox.check(&whole(1, WINDOW_BYTES as u64)).unwrap();
        inbox.arrive(&whole(1, 2), vec![0; 2]).unwrap();
        assert_eq!(inbox.acknowledgement(), Some(1), "and what comes then is held back");
        assert_eq!(take(&mut inbox).len(), 2);
        assert_eq!((inbox.settled, inbox.settled_bytes), (0, 0));
        assert_eq!(inbox.acknowledgement(), Some(2));
    }

    #[test]
    fn bound_ones_that_nobody_takes_stop_the_sender() {
        let mut inbox = Inbox::default();
        let mut acknowledged = 0;
        for seq in 0..3 * WINDOW_COUNT as u64 {
            let bound = Some(Bound { transfer: seq, pieces: 1 });
            if inbox.check(&whole(seq, 1)).is_err() || seq >= acknowledged + WINDOW_COUNT as u64 {
                assert!(acknowledged <= WINDOW_COUNT as u64 + 2, "{acknowledged}");
                assert_eq!(inbox.check(&whole(seq, 1)), Ok(()), "the window was kept");
                return;
            }
            inbox.arrive(&Arrival { bound, ..whole(seq, 1) }, vec![1]).unwrap();
            acknowledged = inbox.acknowledgement().unwrap_or(acknowledged);
            inbox.piece(seq, true).unwrap();
        }
        panic!("the sender was never stopped");
    }

    #[test]
    fn a_sender_that_ignores_the_window_is_refused() {
        let mut inbox = Inbox::default();
        let big = WINDOW_BYTES as u64;
        inbox.check(&whole(0, 2 * big)).unwrap();
        inbox.arrive(&whole(0, 2 * big), vec![0; 2 * WINDOW_BYTES]).unwrap();
        assert_eq!(inbox.check(&whole(1, 1)), Err(InboxError::Window));
    }
}
