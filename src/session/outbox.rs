//! Notifications to a peer: numbered, cut into fragments, kept until acknowledged.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of one NOTIFY frame at most: pings and small notifications pass between.
pub(crate) const FRAGMENT_BYTES: usize = 64 << 10;
/// Unacknowledged bytes on the wire at most (one larger notification may travel alone).
pub(crate) const WINDOW_BYTES: usize = 1 << 20;
/// A larger notification is not sent before the WRITE that it is bound to has ended: the receiver
/// keeps those that arrive before their data.
pub(crate) const MAX_IN_BAND: usize = 4 << 10;
/// Unacknowledged notifications on the wire at most.
pub(crate) const WINDOW_COUNT: usize = 4096;

/// The WRITE that a notification must not overtake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bound {
    pub(crate) transfer: u64,
    pub(crate) pieces: u32,
}

#[derive(Debug)]
struct Outgoing {
    payload: Arc<[u8]>,
    /// Bytes of it on the wire of this link.
    on_wire: usize,
    /// Only on the first link: the receiver counts pieces per link.
    bound: Option<Bound>,
    /// Its transfer failed: only the number is still sent, to close the gap.
    void: bool,
}

/// One NOTIFY frame to send.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) seq: u64,
    pub(crate) payload: Arc<[u8]>,
    pub(crate) range: Range<usize>,
    pub(crate) bound: Option<Bound>,
    pub(crate) void: bool,
}

/// Slots and bytes given back to the sender's budget.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Freed {
    pub(crate) count: usize,
    pub(crate) bytes: usize,
}

impl Freed {
    fn add(&mut self, bytes: usize) {
        self.count += 1;
        self.bytes += bytes;
    }
}

/// The resend buffer of one session, in order of sequence numbers.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    queue: VecDeque<Outgoing>,
    /// Sequence number of the front of the queue: all below are acknowledged.
    acknowledged: u64,
    /// How many of the queue are wholly on the wire, and bytes of the next that are.
    sent: usize,
    sent_bytes: usize,
    /// Bytes on the wire and not acknowledged.
    in_flight: usize,
    /// How many of the queue the peer may have seen, on whatever link of this session.
    exposed: usize,
}

impl Outbox {
    /// Queues a notification; the answer is its sequence number in this session.
    pub(crate) fn push(&mut self, payload: Arc<[u8]>, bound: Option<Bound>) -> u64 {
        if mutated!(SmallOnesFirst) && bound.is_none() && payload.len() < 12 {
            let at = (self.sent + usize::from(self.sent_bytes > 0)).min(self.queue.len());
            self.queue.insert(at, Outgoing { payload, on_wire: 0, bound, void: false });
            return self.acknowledged + at as u64;
        }
        self.queue.push_back(Outgoing { payload, on_wire: 0, bound, void: false });
        self.acknowledged + self.queue.len() as u64 - 1
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The next frame, if the window has room for it.
    pub(crate) fn next_fragment(&mut self) -> Option<Fragment> {
        while mutated!(GapLeft) && self.queue.get(self.sent).is_some_and(|next| next.void) {
            self.sent += 1;
        }
        let next = self.queue.get_mut(self.sent)?;
        let len = if next.void { 0 } else { next.payload.len() };
        if self.sent_bytes == 0 {
            let alone = self.in_flight == 0 && self.sent == 0;
            let room = self.in_flight + len <= WINDOW_BYTES && self.sent < WINDOW_COUNT;
            if !room && !alone {
                return None;
            }
        }
        let range = self.sent_bytes..len.min(self.sent_bytes + FRAGMENT_BYTES);
        self.in_flight += range.len();
        next.on_wire += range.len();
        let fragment = Fragment {
            seq: self.acknowledged + self.sent as u64,
            payload: next.payload.clone(),
            range: range.clone(),
            bound: next.bound,
            void: next.void,
        };
        if range.end == len {
            self.sent += 1;
            self.sent_bytes = 0;
            self.exposed = self.exposed.max(self.sent);
        } else {
            self.sent_bytes = range.end;
        }
        Some(fragment)
    }

    /// Numbers below are acknowledged.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Notifications that are kept.
    #[cfg(feature = "sim")]
    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Notifications on the wire without an acknowledgement, their bytes, and those of the longest.
    #[cfg(feature = "sim")]
    pub(crate) fn on_wire(&self) -> (usize, usize, usize) {
        let on_wire = self.queue.iter().take(self.sent + usize::from(self.sent_bytes > 0));
        let longest = on_wire.map(|outgoing| outgoing.payload.len()).max().unwrap_or(0);
        (self.sent, self.in_flight, longest)
    }

    /// Whether nothing is on the wire that the peer has not acknowledged.
    pub(crate) fn is_all_acknowledged(&self) -> bool {
        self.sent == 0 && self.sent_bytes == 0
    }

    /// Whether something is not wholly on the wire.
    pub(crate) fn has_unsent(&self) -> bool {
        self.sent < self.queue.len()
    }

    /// Whether the next one has been sent in part.
    pub(crate) fn is_between_fragments(&self) -> bool {
        self.sent_bytes > 0
    }

    /// Whether the next one can be sent whole, in at most `limit` bytes, and waits for nothing.
    pub(crate) fn is_next_whole(&self, limit: usize) -> bool {
        self.sent_bytes == 0
            && self.queue.get(self.sent).is_some_and(|next| {
                next.payload.len() <= limit && next.bound.is_none() && !next.void
            })
    }

    /// The next notification as a whole, if it is such a one and the window has room for it.
    pub(crate) fn next_whole(&mut self, limit: usize) -> Option<Fragment> {
        if self.is_next_whole(limit) { self.next_fragment() } else { None }
    }

    /// The peer has all notifications below `below`. `None`: it acknowledges what was never sent.
    pub(crate) fn acknowledge(&mut self, below: u64) -> Option<Freed> {
        let count = below.saturating_sub(self.acknowledged);
        if count > self.sent as u64 {
            return None;
        }
        let mut freed = Freed::default();
        for _ in 0..count {
            if let Some(outgoing) = self.queue.pop_front() {
                self.in_flight = self.in_flight.saturating_sub(outgoing.on_wire);
                freed.add(outgoing.payload.len());
            }
        }
        self.sent -= count as usize;
        self.exposed = self.exposed.saturating_sub(count as usize);
        self.acknowledged += count;
        Some(freed)
    }

    /// The transfer behind a bound notification has failed: it must not be sent (again).
    pub(crate) fn void(&mut self, seq: u64) {
        let index = seq.checked_sub(self.acknowledged).map(|index| index as usize);
        if let Some(outgoing) = index.and_then(|index| self.queue.get_mut(index)) {
            outgoing.void = true;
        }
    }

    /// The link is gone: all that is not acknowledged will be sent again on the next. Transfers
    /// whose pieces were under way have failed, so what is not void need not wait for any.
    pub(crate) fn rewind(&mut self) {
        self.take_back();
        self.queue.iter_mut().for_each(|outgoing| outgoing.bound = None);
    }

    /// Nothing is on the wire.
    fn take_back(&mut self) {
        (self.sent, self.sent_bytes, self.in_flight) = (0, 0, 0);
        self.queue.iter_mut().for_each(|outgoing| outgoing.on_wire = 0);
    }

    /// The session is resumed on a new link by a peer that has all below `expects`.
    /// `None`: it has more than was ever numbered.
    pub(crate) fn resume(&mut self, expects: u64) -> Option<Freed> {
        self.rewind();
        self.skip_to(expects)
    }

    /// What carried notifications only is gone; the peer has all below `expects`. Pieces of transfers go on, and what is bound to
    /// them still waits for them. `None` as for `resume`.
    pub(crate) fn resync(&mut self, expects: u64) -> Option<Freed> {
        self.take_back();
        if mutated!(ResyncLoosens) {
            self.rewind();
        }
        self.skip_to(expects)
    }

    fn skip_to(&mut self, expects: u64) -> Option<Freed> {
        let count = expects.saturating_sub(self.acknowledged);
        if count > self.queue.len() as u64 {
            return None;
        }
        self.sent = count as usize;
        self.acknowledge(expects)
    }

    /// A new session: what was never sent keeps its order and gets new numbers from 0. What the
    /// peer may have seen in the old session is dropped: sent again it could be seen twice.
    pub(crate) fn restart(&mut self) -> Freed {
        self.rewind();
        let mut freed = Freed::default();
        let exposed = if mutated!(SeenOnesAgain) { 0 } else { self.exposed };
        for outgoing in self.queue.drain(..exposed.min(self.queue.len())) {
            freed.add(outgoing.payload.len());
        }
        (self.acknowledged, self.exposed) = (0, 0);
        freed
    }

    /// The session has ended: everything is dropped.
    pub(crate) fn clear(&mut self) -> Freed {
        let mut freed = Freed::default();
        for outgoing in self.queue.drain(..) {
            freed.add(outgoing.payload.len());
        }
        *self = Self::default();
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(len: usize) -> Arc<[u8]> {
        vec![1; len].into()
    }

    #[test]
    fn large_notifications_travel_in_fragments() {
        let mut outbox = Outbox::default();
        outbox.push(payload(FRAGMENT_BYTES + 10), None);
        outbox.push(payload(0), None);
        let ranges: Vec<_> =
            std::iter::from_fn(|| outbox.next_fragment()).map(|f| (f.seq, f.range)).collect();
        assert_eq!(
            ranges,
            [(0, 0..FRAGMENT_BYTES), (0, FRAGMENT_BYTES..FRAGMENT_BYTES + 10), (1, 0..0)]
        );
        assert_eq!(outbox.acknowledge(3), None, "more than was sent");
        let freed = outbox.acknowledge(2).unwrap();
        assert_eq!((freed.count, freed.bytes), (2, FRAGMENT_BYTES + 10));
    }

    #[test]
    fn the_window_stops_the_sender_until_acknowledged() {
        let mut outbox = Outbox::default();
        outbox.push(payload(WINDOW_BYTES * 3), None);
        outbox.push(payload(5), None);
        let sent = std::iter::from_fn(|| outbox.next_fragment()).count();
        assert_eq!(sent, 3 * WINDOW_BYTES / FRAGMENT_BYTES, "a large one travels alone");
        outbox.acknowledge(1).unwrap();
        assert_eq!(outbox.next_fragment().unwrap().seq, 1);
    }

    #[test]
    fn unacknowledged_ones_are_sent_again_with_the_same_numbers() {
        let mut outbox = Outbox::default();
        for _ in 0..3 {
            outbox.push(payload(4), None);
        }
        while outbox.next_fragment().is_some() {}
        assert_eq!(outbox.resume(1).unwrap().count, 1);
        assert_eq!(outbox.next_fragment().unwrap().seq, 1);
        assert_eq!(outbox.next_fragment().unwrap().seq, 2);
        assert!(outbox.next_fragment().is_none());
        assert_eq!(outbox.resume(9), None);
    }

    #[test]
    fn what_is_bound_stays_bound_unless_the_pieces_are_lost_too() {
        let mut outbox = Outbox::default();
        let bound = Some(Bound { transfer: 8, pieces: 2 });
        outbox.push(payload(4), None);
        outbox.push(payload(4), bound);
        outbox.next_whole(64).unwrap();
        assert!(outbox.next_whole(64).is_none(), "not by what carries no pieces");
        assert_eq!(outbox.resync(1).unwrap().count, 1);
        assert_eq!(outbox.next_fragment().unwrap().bound, bound);
        assert_eq!(outbox.resume(1).unwrap().count, 0);
        assert_eq!(outbox.next_fragment().unwrap().bound, None);
    }

    #[test]
    fn a_failed_transfer_voids_its_notification_but_keeps_the_number() {
        let mut outbox = Outbox::default();
        let bound = Some(Bound { transfer: 8, pieces: 2 });
        let seq = outbox.push(payload(4), bound);
        outbox.push(payload(4), bound);
        outbox.void(seq);
        let first = outbox.next_fragment().unwrap();
        assert!(first.void && first.range.is_empty());
        assert_eq!(outbox.next_fragment().unwrap().bound, bound);
        assert_eq!(outbox.acknowledge(2).unwrap().bytes, 8, "the budget was taken for all bytes");
    }

    #[test]
    fn a_void_one_that_was_on_the_wire_gives_its_window_back() {
        let mut outbox = Outbox::default();
        let bound = Some(Bound { transfer: 8, pieces: 1 });
        for _ in 0..2 * WINDOW_BYTES / MAX_IN_BAND {
            let seq = outbox.push(payload(MAX_IN_BAND), bound);
            assert_eq!(outbox.next_fragment().unwrap().seq, seq);
            outbox.void(seq);
            outbox.acknowledge(seq + 1).unwrap();
        }
    }

    #[test]
    fn a_new_session_drops_what_may_have_been_seen_and_keeps_the_rest() {
        let mut outbox = Outbox::default();
        for len in [1, 2, 3] {
            outbox.push(payload(len), None);
        }
        outbox.next_fragment().unwrap();
        outbox.next_fragment().unwrap();
        outbox.acknowledge(1).unwrap();
        outbox.rewind();
        assert_eq!(outbox.restart(), Freed { count: 1, bytes: 2 });
        let kept = outbox.next_fragment().unwrap();
        assert_eq!((kept.seq, kept.payload.len()), (0, 3));
    }
}
