//! Bytes that were received before it was known what they are.
//!
//! Behind a notification comes another one more often than not, and small. One call that takes
//! whatever has arrived then gets header, payload and the frames behind them: 0.4 us less per
//! notification, and a dozen of them at a time when they come in a burst. Such bytes never lie in
//! user memory; should they turn out to belong there, they are copied by the kernel, because memory
//! that its owner has unmapped must give an error and not a signal.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::sys::{self, IoSegment};

/// Bytes received at most ahead of their frame.
const AHEAD_BYTES: usize = 4096;

/// The bytes that are ahead. One per lane: it is empty whenever a link's turn ends.
pub(crate) struct Ahead {
    bytes: Box<[u8]>,
    at: usize,
    end: usize,
    /// Takes bytes into the kernel and back; made when first needed.
    detour: Option<(UnixStream, UnixStream)>,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; AHEAD_BYTES].into_boxed_slice(), at: 0, end: 0, detour: None }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.at == self.end
    }

    /// Forgets what a link has left behind that broke.
    pub(super) fn clear(&mut self) {
        (self.at, self.end) = (0, 0);
    }

    /// Receives what has arrived, as far as there is room. Called when empty.
    pub(super) fn fill(&mut self, fd: &OwnedFd) -> io::Result<usize> {
        self.clear();
        self.end = sys::recv(fd.as_fd(), &mut self.bytes)?;
        Ok(self.end)
    }

    /// Takes all of it out, for a link that has to wait.
    pub(super) fn set_aside(&mut self) -> Vec<u8> {
        let rest = self.bytes[self.at..self.end].to_vec();
        self.clear();
        rest
    }

    /// Puts back what was set aside.
    pub(super) fn put_back(&mut self, rest: &mut Vec<u8>) {
        self.clear();
        self.end = rest.len().min(self.bytes.len());
        self.bytes[..self.end].copy_from_slice(&rest[..self.end]);
        rest.clear();
    }

    /// Moves as many bytes as there are into `out`.
    pub(super) fn take(&mut self, out: &mut [u8]) -> usize {
        let n = out.len().min(self.end - self.at);
        out[..n].copy_from_slice(&self.bytes[self.at..self.at + n]);
        self.at += n;
        n
    }

    /// Throws `limit` bytes away, or as many as there are.
    pub(super) fn skip(&mut self, limit: usize) -> usize {
        let n = limit.min(self.end - self.at);
        self.at += n;
        n
    }

    /// Copies at most `limit` bytes into `segments`.
    ///
    /// # Errors
    /// `EFAULT` when the segments are not mapped; other errors when the kernel has no pipe for us.
    ///
    /// # Safety
    /// The segments name memory that may be overwritten now.
    pub(super) unsafe fn copy_out(
        &mut self,
        segments: &[IoSegment],
        limit: usize,
    ) -> io::Result<usize> {
        let (inlet, outlet) = match &self.detour {
            Some(detour) => detour,
            None => &*self.detour.insert(UnixStream::pair()?),
        };
        let room: usize = segments.iter().map(IoSegment::len).sum();
        let n = limit.min(self.end - self.at).min(room);
        let bytes = IoSegment::of(&self.bytes[self.at..self.at + n]);
        let sent = sys::send_segments(inlet.as_fd(), &[bytes])?;
        // SAFETY: the caller's promise, passed on.
        let copied = unsafe { sys::recv_segments(outlet.as_fd(), segments) };
        if copied.as_ref().is_ok_and(|copied| *copied == sent) {
            self.at += sent;
        } else {
            // What did not fit anywhere must not be met by the next copy.
            self.detour = None;
        }
        match copied {
            Ok(copied) if copied < sent => Err(io::Error::from_raw_os_error(libc::EFAULT)),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ahead(bytes: &[u8]) -> Ahead {
        let mut ahead = Ahead::new();
        ahead.bytes[..bytes.len()].copy_from_slice(bytes);
        ahead.end = bytes.len();
        ahead
    }

    #[test]
    fn bytes_are_taken_in_order_and_once() {
        let mut ahead = ahead(b"abcdefgh");
        let mut two = [0; 2];
        assert_eq!((ahead.take(&mut two), &two), (2, b"ab"));
        assert_eq!(ahead.skip(3), 3);
        let mut many = [0; 9];
        assert_eq!(ahead.take(&mut many), 3);
        assert_eq!(&many[..3], b"fgh");
        assert!(ahead.is_empty() && ahead.take(&mut many) == 0 && ahead.skip(1) == 0);
    }

    #[test]
    fn what_is_set_aside_comes_back_behind_what_was_taken() {
        let mut ahead = ahead(b"abcdefgh");
        let mut out = [0; 3];
        assert_eq!(ahead.take(&mut out), 3);
        let mut rest = ahead.set_aside();
        assert!(ahead.is_empty());
        ahead.put_back(&mut rest);
        assert!(rest.is_empty());
        let mut out = [0; 9];
        assert_eq!(ahead.take(&mut out), 5);
        assert_eq!(&out[..5], b"defgh");
    }

    #[test]
    fn bytes_reach_segments_and_unmapped_ones_are_an_error() {
        let mut ahead = ahead(b"abcdefgh");
        let (mut first, mut second) = ([0u8; 2], [0u8; 3]);
        let segments = [
            IoSegment::new(first.as_mut_ptr() as u64, 2),
            IoSegment::new(second.as_mut_ptr() as u64, 3),
        ];
        // SAFETY: both arrays are live, writable and not borrowed elsewhere.
        assert_eq!(unsafe { ahead.copy_out(&segments, 100) }.unwrap(), 5);
        assert_eq!((&first, &second), (b"ab", b"cde"));
        let nowhere = [IoSegment::new(4096, 3)];
        // SAFETY: nothing is mapped there; the kernel refuses.
        let refused = unsafe { ahead.copy_out(&nowhere, 2) };
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EFAULT));
        let segments = [IoSegment::new(second.as_mut_ptr() as u64, 2)];
        // SAFETY: as above.
        assert_eq!(unsafe { ahead.copy_out(&segments, 2) }.unwrap(), 2);
        assert_eq!(&second, b"fge", "nothing of the refused copy is left");
    }
}
