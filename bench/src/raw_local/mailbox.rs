//! Notifications through memory that both processes map: the floor for any that are polled for.
//!
//! Each direction has one message at a time, behind a word that tells it from the one before. Word and payload share a
//! cache line as long as the payload fits: 56 bytes. A sender must not send again before it was answered, which is how
//! both scenarios use it; so neither side waits for room.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};

use crate::arena::Arena;
use crate::case::MAX_NOTIFICATION;
use crate::clock::now_ns;
use crate::measure::OPERATION_TIMEOUT_NS;

/// Bytes of the word in front of a payload: the message's number, and its length in the low bits.
const HEAD: usize = 8;
const LENGTH_BITS: u32 = 24;
/// Bytes of one direction.
const DIRECTION: usize = (HEAD + MAX_NOTIFICATION).next_multiple_of(4096);
/// Polls between two looks at the clock.
const POLLS_PER_LOOK: u32 = 4096;

/// One end of a mailbox.
pub(crate) struct Mailbox {
    memory: Arena,
    /// Where this end writes, and where it reads.
    outgoing: usize,
    incoming: usize,
    sent: u64,
    /// The word of the last message that was taken.
    seen: u64,
    payload: Vec<u8>,
    /// Whether the other side has no core but this one.
    one_core: bool,
}

impl Mailbox {
    /// A new mailbox, and the file by which the other side opens it. This is the target's end.
    pub(super) fn create(one_core: bool) -> Result<(Self, File)> {
        let (memory, file) = Arena::shared(2 * DIRECTION)?;
        Ok((Self::new(memory, DIRECTION, 0, one_core), file))
    }

    /// The initiator's end.
    pub(super) fn open(file: &File, one_core: bool) -> Result<Self> {
        Ok(Self::new(Arena::of_file(file, 2 * DIRECTION)?, 0, DIRECTION, one_core))
    }

    fn new(memory: Arena, outgoing: usize, incoming: usize, one_core: bool) -> Self {
        let payload = vec![0; MAX_NOTIFICATION];
        Self { memory, outgoing, incoming, sent: 0, seen: 0, payload, one_core }
    }

    fn head(&self, direction: usize) -> &AtomicU64 {
        // SAFETY: word-aligned and inside of the mapping, which lives as long as `self`; only accessed as an atomic.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(direction).cast()) }
    }

    /// Sends a message. The one before must have been answered.
    #[inline]
    pub(crate) fn send(&mut self, payload: &[u8]) -> Result<()> {
        ensure!(payload.len() <= MAX_NOTIFICATION, "a notification of {} bytes", payload.len());
        // SAFETY: in bounds (checked; the mapping holds two directions), and no payload lies in the mapping. The other
        // side does not read there: it has taken the message before, for it has answered, and sees the new number only
        // after these bytes.
        unsafe {
            let to = self.memory.as_ptr().add(self.outgoing + HEAD);
            std::ptr::copy_nonoverlapping(payload.as_ptr(), to, payload.len());
        }
        self.sent += 1;
        let word = self.sent << LENGTH_BITS | payload.len() as u64;
        self.head(self.outgoing).store(word, Ordering::Release);
        Ok(())
    }

    /// The message that has arrived since the last call, if any.
    #[inline]
    pub(crate) fn try_receive(&mut self) -> Option<&[u8]> {
        let len = self.take()?;
        Some(&self.payload[..len])
    }

    /// Sends the message that has arrived, if any, back, and then tells `seen` of it and since when it was held.
    #[cfg(any(feature = "nixl", test))]
    #[inline]
    pub(crate) fn send_back(&mut self, mut seen: impl FnMut(&[u8], u64)) -> Result<()> {
        let Some(len) = self.take() else { return Ok(()) };
        let arrived_ns = now_ns();
        let payload = std::mem::take(&mut self.payload);
        let sent = self.send(&payload[..len]);
        seen(&payload[..len], arrived_ns);
        self.payload = payload;
        sent
    }

    /// Copies a message that has arrived to `payload` and returns its length.
    #[inline]
    fn take(&mut self) -> Option<usize> {
        let word = self.head(self.incoming).load(Ordering::Acquire);
        if word == self.seen {
            self.relax();
            return None;
        }
        self.seen = word;
        let len = ((word & ((1 << LENGTH_BITS) - 1)) as usize).min(self.payload.len());
        // SAFETY: in bounds (the length is bounded by that of `payload`, which is what a direction holds). The sender
        // wrote it before the number, which was loaded with acquire, and writes again only when it has been answered.
        unsafe {
            let from = self.memory.as_ptr().add(self.incoming + HEAD);
            std::ptr::copy_nonoverlapping(from, self.payload.as_mut_ptr(), len);
        }
        Some(len)
    }

    #[inline]
    fn relax(&self) {
        if self.one_core {
            // Cannot fail on Linux.
            let _ = nix::sched::sched_yield();
        } else {
            std::hint::spin_loop();
        }
    }

    /// Waits for the next message, polling without yielding where there are two cores; gives up when `pid` has ended or says nothing for too long.
    #[inline]
    pub(crate) fn receive(&mut self, pid: i32) -> Result<&[u8]> {
        let (mut polls, mut begin) = (0u32, 0);
        let len = loop {
            if let Some(len) = self.take() {
                break len;
            }
            polls = polls.wrapping_add(1);
            if polls.is_multiple_of(POLLS_PER_LOOK) {
                begin = look(begin, pid)?;
            }
        };
        Ok(&self.payload[..len])
    }
}

/// Fails when the wait that began at `begin` (0: now) has become hopeless; returns when it began.
#[cold]
fn look(begin: u64, pid: i32) -> Result<u64> {
    let now = now_ns();
    if begin == 0 {
        return Ok(now);
    }
    // Not before it has taken long beside any answer: asking the kernel costs as much as one.
    if now - begin > 100_000_000 {
        let alive = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None).is_ok();
        ensure!(alive, "process {pid}, which should have answered a notification, has ended");
    }
    ensure!(now - begin < OPERATION_TIMEOUT_NS, "a notification was not answered within 30 s");
    Ok(begin)
}
