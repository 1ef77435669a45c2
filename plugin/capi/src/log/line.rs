//! One line, and its way to standard error.

use std::fmt::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of the longest line: below `PIPE_BUF`, so that a pipe takes a line whole or not at all.
pub(super) const LONGEST: usize = 4000;
/// Kept free for the counts at the end of a line that was cut.
const RESERVE: usize = 96;

/// A line of bounded length. What is written cannot end it or steer a terminal: control characters
/// are escaped.
pub(super) struct Line {
    bytes: [u8; LONGEST],
    len: usize,
    cut: bool,
}

impl Line {
    pub(super) fn new() -> Self {
        Self { bytes: [0; LONGEST], len: 0, cut: false }
    }

    /// Appends as much as stays below `limit`, at whole characters.
    fn push(&mut self, text: &str, limit: usize) {
        let mut fits = text.len().min(limit.saturating_sub(self.len));
        while !text.is_char_boundary(fits) {
            fits -= 1;
        }
        self.bytes[self.len..self.len + fits].copy_from_slice(&text.as_bytes()[..fits]);
        self.len += fits;
        self.cut |= fits < text.len();
    }

    /// Ends the line, with what was not said before it.
    pub(super) fn end(&mut self, counts: &[(&str, u64)]) -> &[u8] {
        if self.cut {
            self.push("...", LONGEST);
        }
        for (what, count) in counts.iter().filter(|(_, count)| *count > 0) {
            self.push(&format!(" {what}={count}"), LONGEST - 1);
        }
        self.push("\n", LONGEST);
        &self.bytes[..self.len]
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let limit = LONGEST - RESERVE;
        for piece in text.split_inclusive(char::is_control) {
            // After a cut nothing follows, not even what would fit.
            if self.cut {
                break;
            }
            let plain = piece.trim_end_matches(char::is_control);
            self.push(plain, limit);
            for control in piece[plain.len()..].chars() {
                match control {
                    '\n' => self.push("\\n", limit),
                    '\t' => self.push("\\t", limit),
                    _ => self.push(&control.escape_unicode().to_string(), limit),
                }
            }
        }
        Ok(())
    }
}

/// Lines that standard error did not take, and that no line has told of yet.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Writes a line to standard error if that is possible at once: a thread that waited for a reader
/// of the log would stop the lane that it drives. Else the line is dropped and counted.
pub(super) fn send(mut line: Line, suppressed: u64) {
    let dropped = DROPPED.swap(0, Ordering::Relaxed);
    if !write(line.end(&[("suppressed", suppressed), ("dropped_lines", dropped)])) {
        DROPPED.fetch_add(dropped + 1, Ordering::Relaxed);
    }
}

/// Standard error takes `PIPE_BUF` bytes without waiting, and somebody may read them: without, the
/// process would get a SIGPIPE.
fn ready() -> bool {
    let mut fd = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one structure, ours; a timeout of 0 does not wait.
    let answer = unsafe { libc::poll(&raw mut fd, 1, 0) };
    answer == 1 && fd.revents == libc::POLLOUT
}

/// Standard error once more, if it is a terminal: one that is nearly full takes a part of a line and
/// waits with the rest, and whether it does is a matter of how it was opened.
fn terminal() -> Option<OwnedFd> {
    // SAFETY: a plain integer, and a string that is never freed; the descriptor is new and ours.
    unsafe {
        if libc::isatty(libc::STDERR_FILENO) == 0 {
            return None;
        }
        let flags = libc::O_WRONLY | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
        let fd = libc::open(c"/proc/self/fd/2".as_ptr(), flags);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
    }
}

fn write(line: &[u8]) -> bool {
    let mut rest = line;
    // Between `ready` and the write somebody else may fill a pipe, so the kernel is told not to
    // wait. Not every file knows how: a regular one does not need to.
    let mut nowait = true;
    // The first attempt is the only one but for signals and files that take part of a line.
    for _ in 0..8 {
        if !ready() {
            return false;
        }
        let piece = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
        let written = if nowait {
            // An offset of -1: where the file stands, as `write` does.
            // SAFETY: one piece, what is left of `line`, which is only read.
            unsafe {
                libc::pwritev2(libc::STDERR_FILENO, &raw const piece, 1, -1, libc::RWF_NOWAIT)
            }
        } else {
            let terminal = terminal();
            let fd = terminal.as_ref().map_or(libc::STDERR_FILENO, AsRawFd::as_raw_fd);
            // SAFETY: as above.
            unsafe { libc::write(fd, piece.iov_base, piece.iov_len) }
        };
        match usize::try_from(written) {
            Ok(written) => rest = &rest[written.min(rest.len())..],
            Err(_) if std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
            Err(_) if nowait => nowait = false,
            Err(_) => return false,
        }
        if rest.is_empty() {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str, counts: &[(&str, u64)]) -> String {
        let mut line = Line::new();
        write!(line, "{text}").unwrap();
        String::from_utf8(line.end(counts).to_vec()).unwrap()
    }

    #[test]
    fn a_line_is_one_line_whatever_it_says() {
        assert_eq!(line("plain grüße", &[]), "plain grüße\n");
        assert_eq!(line("a\nb\r\u{1b}[2J\t\n", &[]), "a\\nb\\u{d}\\u{1b}[2J\\t\\n\n");
        assert_eq!(line("x", &[("none", 0), ("some", 3)]), "x some=3\n");
    }

    #[test]
    fn a_long_line_is_cut_at_a_character_and_keeps_its_counts() {
        for (text, unit) in [("x", 1), ("ß", 2), ("\n", 2), ("\u{1b}", 6), ("€", 3)] {
            let cut = line(&text.repeat(5000), &[("suppressed", u64::MAX), ("dropped", u64::MAX)]);
            assert!(cut.len() <= LONGEST && cut.len() > LONGEST - RESERVE - unit, "{}", cut.len());
            let end = format!("... suppressed={0} dropped={0}\n", u64::MAX);
            assert!(cut.ends_with(&end), "{cut}");
            assert_eq!(cut.matches('\n').count(), 1);
        }
    }
}
