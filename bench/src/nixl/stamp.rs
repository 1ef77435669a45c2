//! The text of a measured notification: when it was sent, so that the target can tell how long it travelled.
//!
//! Both processes of a pair run on one host and share its `CLOCK_MONOTONIC`. No two exchanges begin at the same
//! nanosecond, so the time also tells every notification of an initiator from all others.

use hdrhistogram::Histogram;

use crate::measure::{Points, histogram, points_of};

/// Digits of the time, hence the least bytes of a notification.
pub(crate) const DIGITS: usize = 16;
/// Set in the time of an exchange that is measured; a monotonic clock takes three centuries to get there.
const MEASURED: u64 = 1 << 63;

/// A notification that is written again and again, in the same memory.
pub(crate) struct Stamped {
    text: Vec<u8>,
}

impl Stamped {
    /// A text of `width` bytes, at least [`DIGITS`].
    pub(crate) fn new(width: usize) -> Self {
        Self { text: vec![b'0'; width.max(DIGITS)] }
    }

    /// The text of an exchange that begins at `sent_ns`.
    #[inline]
    pub(crate) fn at(&mut self, sent_ns: u64, measured: bool) -> &str {
        let mut rest = sent_ns | if measured { MEASURED } else { 0 };
        for digit in self.text.iter_mut().rev().take(DIGITS) {
            *digit = b"0123456789abcdef"[(rest & 15) as usize];
            rest >>= 4;
        }
        // Only digits were ever written.
        std::str::from_utf8(&self.text).unwrap_or_default()
    }
}

/// The target's account of one pass: how long the measured notifications travelled.
pub(crate) struct Arrivals {
    one_way: Histogram<u64>,
}

impl Arrivals {
    pub(crate) fn new() -> Self {
        Self { one_way: histogram() }
    }

    /// Books a notification that the application has held since `arrived_ns`, if its exchange is measured.
    #[inline]
    pub(crate) fn book(&mut self, text: &[u8], arrived_ns: u64) {
        let digits = text.len().checked_sub(DIGITS).and_then(|at| text.get(at..));
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let Some(word) = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()) else {
            // The initiator compares the answer with what it sent, and says what is wrong.
            return;
        };
        if word & MEASURED != 0 {
            self.one_way.saturating_record(arrived_ns.saturating_sub(word & !MEASURED));
        }
    }

    /// What was booked since the last call.
    pub(crate) fn take(&mut self) -> Points {
        let points = points_of(&self.one_way);
        self.one_way.reset();
        points
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measured_notification_tells_how_long_it_travelled() {
        let mut arrivals = Arrivals::new();
        for width in [16, 40] {
            let mut text = Stamped::new(width);
            assert_eq!(text.at(1_000_000, true).len(), width);
            arrivals.book(text.at(1_000_000, true).as_bytes(), 1_008_000);
            arrivals.book(text.at(2_000_000, false).as_bytes(), 9_000_000);
        }
        let points = arrivals.take();
        assert_eq!(points.len(), 1, "{points:?}");
        assert!((8_000..8_010).contains(&points[0].0) && points[0].1 == 2, "{points:?}");
        assert!(arrivals.take().is_empty(), "handed out once");
    }

    #[test]
    fn every_moment_has_a_text_of_its_own() {
        let mut text = Stamped::new(16);
        assert_eq!(text.at(0xAB, false), "00000000000000ab");
        assert_eq!(text.at(0xAC, true), "80000000000000ac");
        assert_eq!(text.at(u64::MAX >> 1, false), "7fffffffffffffff");
    }

    #[test]
    fn what_is_no_stamp_is_not_booked() {
        let mut arrivals = Arrivals::new();
        for text in [&b""[..], b"80000000", b"800000000000000g", "8000000000000é".as_bytes()] {
            arrivals.book(text, u64::MAX);
        }
        assert!(arrivals.take().is_empty());
    }
}
