//! What one engine tells another on its host by shared memory: which copies it makes, and notifications.
//!
//! ```text
//! byte     0  layout; at 16 the nonce that shows the consumer whose memory it reaches; at 32, written by the consumer once: closed
//!         64  written by the consumer, rarely, and read by the producer at every message: asleep
//!        128  written by the consumer at every message, and read by the producer when the ring looks full: head
//!        256  written by the producer's threads: uses[32], a line each. Bit 0: a copy is in progress; bits 1 to 32: in which
//!             place of the consumer's table its region is, or all ones: several; above: copies so far
//!       4096  ring[512] of 128 bytes, written by the producer's lane
//! ```
//!
//! A message takes one slot, or several in a row (the ring is seen as endless: its end is followed by its
//! start). The first word of a slot says which message is there: its position plus one, written last. It
//! is never written by anything else, so that no payload can look like a message.
//!
//! Both sides may die at any instant, and may lie: the consumer reads each word once, checks it, and copies
//! payloads out; the producer checks how far the consumer says it is.

use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::LAYOUT;
use super::shm::{self, Mapping, SharedFd};

const MAGIC: u64 = 0x6e61_6863_7261_6300 | LAYOUT as u64;
const NONCE: usize = 2;
/// In a line that nothing changes as long as it may be copied: looking at it costs nothing.
const CLOSED: usize = 4;
/// In lines of their own, and of the pair that is fetched together: where they shared one, it went to and fro with every
/// message.
const ASLEEP: usize = 8;
const HEAD: usize = 16;
const USES: usize = 32;
const USE_COUNT: usize = 32;
const LINE_WORDS: usize = 8;
/// The word of a use: in progress, and of which region.
const IN_PROGRESS: u64 = 1;
const REGION_SHIFT: u32 = 1;
const COPY: u64 = 1 << 33;
/// In place of a region's place in the table: more than one.
pub(crate) const SEVERAL: u32 = u32::MAX;
const RING: usize = 4096;
const SLOTS: u64 = 512;
/// More messages than a ring holds at a time.
pub(crate) const RING_MESSAGES: usize = SLOTS as usize;
const SLOT_BYTES: usize = 128;
/// Bytes of a slot before the payload: in the first slot of a message, and in the others.
const FIRST_HEADER: usize = 32;
const NEXT_HEADER: usize = 8;
const LEN: usize = RING + SLOTS as usize * SLOT_BYTES;

/// The longest notification that the ring takes: larger ones go over the socket.
pub(crate) const MAX_RING_PAYLOAD: usize = 4096;

const NOTIFY: u8 = 1;
const ACK: u8 = 2;

/// One message of the ring.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message<P> {
    /// A whole notification with its sequence number, and perhaps an acknowledgement (0: none).
    Notify { seq: u64, ack: u64, payload: P },
    /// All notifications below have arrived.
    Ack(u64),
}

/// The other side breaks the rules of the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its shared memory holds what no engine writes")]
pub(crate) struct Broken;

/// Makes a channel; the descriptor is for the consumer.
pub(crate) fn create() -> io::Result<(Producer, SharedFd)> {
    let fd = shm::create(c"corelane-channel", LEN, false)?;
    let map = Arc::new(Mapping::new(fd.as_fd(), LEN, true)?);
    shm::seal(fd.as_fd(), false)?;
    map.words()[0].store(MAGIC, Ordering::Release);
    Ok((Producer { map, tail: 0, head: 0 }, Arc::new(fd)))
}

/// Maps a channel that a peer has made.
pub(crate) fn open(fd: &impl AsFd) -> Result<Consumer, String> {
    let map = Arc::new(Mapping::received(fd.as_fd(), LEN..=LEN, true, false)?);
    if map.words()[0].load(Ordering::Acquire) != MAGIC {
        return Err("its notification ring has another layout".into());
    }
    Ok(Consumer { map, head: 0 })
}

fn slots_of(payload: usize) -> u64 {
    let first = SLOT_BYTES - FIRST_HEADER;
    let rest = payload.saturating_sub(first);
    1 + rest.div_ceil(SLOT_BYTES - NEXT_HEADER) as u64
}

fn offset_of(position: u64) -> usize {
    RING + (position % SLOTS) as usize * SLOT_BYTES
}

/// The places of a payload of `len` bytes at `position`: offset in the mapping, range of the payload.
fn places(position: u64, len: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let (mut done, mut slot) = (0, 0);
    std::iter::from_fn(move || {
        let header = if slot == 0 { FIRST_HEADER } else { NEXT_HEADER };
        let part = (len - done).min(SLOT_BYTES - header);
        if part == 0 {
            return None;
        }
        let offset = offset_of(position + slot) + header;
        let range = done..done + part;
        (done, slot) = (range.end, slot + 1);
        Some((offset, range))
    })
}

/// The writing end, of one lane.
#[derive(Debug)]
pub(crate) struct Producer {
    map: Arc<Mapping>,
    tail: u64,
    /// How far the consumer was when last looked at.
    head: u64,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// It is there, and the consumer's lane will see it by itself.
    Seen,
    /// It is there, and the consumer's lane sleeps: wake it.
    Asleep,
    /// There is no room.
    Full,
}

impl Producer {
    /// Puts a value here that the consumer looks for; the answer is its address. A child that this process forks does
    /// not have it, whatever else it has a copy of: should it get our process ID one day, it is not taken for us.
    pub(crate) fn set_nonce(&self, nonce: [u8; 16]) -> u64 {
        let value = u128::from_le_bytes(nonce);
        let words = self.map.words();
        words[NONCE].store(value as u64, Ordering::Release);
        words[NONCE + 1].store((value >> 64) as u64, Ordering::Release);
        self.map.addr() + NONCE as u64 * 8
    }

    fn look(&mut self) -> Result<u64, Broken> {
        let head = self.map.words()[HEAD].load(Ordering::Acquire);
        // It never goes back, and never beyond what was written.
        if head < self.head || head > self.tail {
            return Err(Broken);
        }
        self.head = head;
        Ok(head)
    }

    /// Whether the consumer has taken everything. One load.
    pub(crate) fn is_empty(&mut self) -> Result<bool, Broken> {
        Ok(self.head == self.tail || self.look()? == self.tail)
    }

    /// Whether a message of any length fits. Two loads at most.
    pub(crate) fn has_room(&mut self) -> Result<bool, Broken> {
        let most = slots_of(MAX_RING_PAYLOAD);
        Ok(self.tail - self.head + most <= SLOTS || self.tail - self.look()? + most <= SLOTS)
    }

    /// Writes a message. No system call; a fence, and where the ring was last seen full, a load.
    pub(crate) fn push(&mut self, message: &Message<&[u8]>) -> Result<Pushed, Broken> {
        let (kind, seq, ack, payload) = match message {
            Message::Notify { seq, ack, payload } => (NOTIFY, *seq, *ack, *payload),
            Message::Ack(below) => (ACK, 0, *below, &[][..]),
        };
        let slots = slots_of(payload.len());
        if self.tail - self.head + slots > SLOTS && self.tail - self.look()? + slots > SLOTS {
            return Ok(Pushed::Full);
        }
        for (offset, range) in places(self.tail, payload.len()) {
            self.map.put(offset, &payload[range]);
        }
        let words = self.map.words();
        let Some(slot) = words.get(offset_of(self.tail) / 8..) else { return Err(Broken) };
        slot[1].store(u64::from(kind) | (payload.len() as u64) << 32, Ordering::Relaxed);
        slot[2].store(seq, Ordering::Relaxed);
        slot[3].store(ack, Ordering::Relaxed);
        slot[0].store(self.tail + 1, Ordering::Release);
        self.tail += slots;
        // With the fence of whoever goes to sleep: either this sees that it sleeps, or it sees this.
        fence(Ordering::SeqCst);
        let asleep = words[ASLEEP].load(Ordering::Relaxed) != 0;
        Ok(if asleep { Pushed::Asleep } else { Pushed::Seen })
    }

    /// The uses that this engine announces to the consumer.
    pub(crate) fn uses(&self) -> Uses {
        Uses { map: self.map.clone() }
    }
}

/// The reading end, of one lane.
#[derive(Debug)]
pub(crate) struct Consumer {
    map: Arc<Mapping>,
    head: u64,
}

impl Consumer {
    /// Whether a message waits. One load.
    #[inline]
    pub(crate) fn has_message(&self) -> bool {
        let word = self.map.words().get(offset_of(self.head) / 8);
        word.is_some_and(|word| word.load(Ordering::Acquire) == self.head + 1)
    }

    /// Takes the next message.
    pub(crate) fn pop(&mut self) -> Result<Option<Message<Vec<u8>>>, Broken> {
        if !self.has_message() {
            return Ok(None);
        }
        let words = self.map.words();
        let Some(slot) = words.get(offset_of(self.head) / 8..) else { return Err(Broken) };
        let [shape, seq, ack] = [1, 2, 3].map(|word| slot[word].load(Ordering::Relaxed));
        let (kind, len) = (shape as u8, (shape >> 32) as usize);
        if len > MAX_RING_PAYLOAD {
            return Err(Broken);
        }
        let message = match kind {
            NOTIFY => {
                let mut payload = vec![0; len];
                for (offset, range) in places(self.head, len) {
                    self.map.get(offset, &mut payload[range]);
                }
                Message::Notify { seq, ack, payload }
            }
            ACK if len == 0 => Message::Ack(ack),
            _ => return Err(Broken),
        };
        self.head += slots_of(len);
        words[HEAD].store(self.head, Ordering::Release);
        Ok(Some(message))
    }

    /// Tells the producer to ring from now on, or not any more. After telling so to all producers, a
    /// fence, and a last look for messages.
    pub(crate) fn set_asleep(&self, asleep: bool) {
        self.map.words()[ASLEEP].store(u64::from(asleep), Ordering::Relaxed);
    }

    /// The uses that the producer's engine announces to us.
    pub(crate) fn uses(&self) -> Uses {
        Uses { map: self.map.clone() }
    }
}

/// Who copies from or to whose memory now: places that the initiator's threads take for each copy.
#[derive(Debug, Clone)]
pub(crate) struct Uses {
    map: Arc<Mapping>,
}

thread_local! {
    /// Where this thread found a free place last.
    static PLACE: Cell<usize> = const { Cell::new(usize::MAX) };
}

impl Uses {
    fn place(&self, index: usize) -> Option<&AtomicU64> {
        self.map.words().get(USES + index * LINE_WORDS)
    }

    /// Announces a copy from or to the region in this place of the consumer's table, or [`SEVERAL`]; what is looked at
    /// afterwards cannot be taken away before the guard is dropped.
    /// One atomic operation, uncontended unless more threads than places copy. `None`: all are taken.
    #[inline]
    pub(crate) fn begin(&self, region: u32) -> Option<Use<'_>> {
        let first = match PLACE.get() {
            usize::MAX => {
                static NEXT: std::sync::atomic::AtomicUsize =
                    std::sync::atomic::AtomicUsize::new(0);
                NEXT.fetch_add(1, Ordering::Relaxed)
            }
            place => place,
        };
        for step in 0..USE_COUNT {
            let index = (first + step) % USE_COUNT;
            let place = self.place(index)?;
            let seen = place.load(Ordering::Relaxed);
            let so_far = seen & !(COPY - 1);
            let begun = so_far | u64::from(region) << REGION_SHIFT | IN_PROGRESS;
            if seen & IN_PROGRESS == 0
                && place.compare_exchange(seen, begun, Ordering::SeqCst, Ordering::Relaxed).is_ok()
            {
                PLACE.set(index);
                return Some(Use { place, so_far });
            }
        }
        None
    }

    /// As `begin`, for a copy that outlives the call: one that a GPU makes.
    pub(crate) fn begin_owned(&self, region: u32) -> Option<OwnedUse> {
        let in_use = self.begin(region)?;
        #[cfg(feature = "sim")]
        if mutated!(CopyNotAnnounced) {
            drop(in_use);
            return Some(OwnedUse { uses: self.clone(), index: NO_PLACE, so_far: 0 });
        }
        let (index, so_far) = (PLACE.get(), in_use.so_far);
        std::mem::forget(in_use);
        Some(OwnedUse { uses: self.clone(), index, so_far })
    }

    /// The copies in progress now, of the region in one place of the table or of all. Take the region's key away first.
    pub(crate) fn in_progress(&self, region: Option<u32>) -> Vec<(usize, u64)> {
        fence(Ordering::SeqCst);
        let concerns = |seen: u64| {
            let of = (seen >> REGION_SHIFT) as u32;
            seen & IN_PROGRESS != 0 && region.is_none_or(|region| of == region || of == SEVERAL)
        };
        (0..USE_COUNT)
            .filter_map(|index| {
                let seen = self.place(index)?.load(Ordering::SeqCst);
                concerns(seen).then_some((index, seen))
            })
            .collect()
    }

    /// The consumer lets nothing begin any more: who announces a copy from now on finds that it must not. What is in progress now may
    /// be. For good.
    pub(crate) fn close(&self) {
        self.map.words()[CLOSED].store(1, Ordering::SeqCst);
        // With the announcement in `begin`: either this side sees that, or the other side sees this.
        fence(Ordering::SeqCst);
    }

    /// Whether the consumer has closed it. To be asked after `begin`.
    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.map.words()[CLOSED].load(Ordering::SeqCst) != 0
    }

    /// Of these copies, those that have not ended.
    pub(crate) fn still(&self, copies: &mut Vec<(usize, u64)>) {
        copies.retain(|(index, seen)| {
            self.place(*index).is_some_and(|place| place.load(Ordering::Acquire) == *seen)
        });
    }
}

/// A copy in progress.
#[derive(Debug)]
#[must_use]
pub(crate) struct Use<'a> {
    place: &'a AtomicU64,
    /// What the word says of the copies before.
    so_far: u64,
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.place.store(self.so_far.wrapping_add(COPY), Ordering::Release);
    }
}

/// Behind all places.
#[cfg(feature = "sim")]
const NO_PLACE: usize = LEN;

/// A copy in progress that no thread waits for.
#[derive(Debug)]
#[must_use]
pub(crate) struct OwnedUse {
    uses: Uses,
    index: usize,
    so_far: u64,
}

#[cfg(feature = "sim")]
impl OwnedUse {
    /// The process has died amid the copy: its announcement stays.
    pub(crate) fn never_ends(mut self) {
        self.index = NO_PLACE;
    }
}

impl Drop for OwnedUse {
    fn drop(&mut self) {
        if let Some(place) = self.uses.place(self.index) {
            drop(Use { place, so_far: self.so_far });
        }
    }
}

#[cfg(test)]
#[path = "channel_tests.rs"]
mod tests;
