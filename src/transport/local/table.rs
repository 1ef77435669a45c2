//! The regions of an engine, in memory that its peers on this host can read.
//!
//! ```text
//! word 0: layout   1: open   2: slots   3: where the words of its life are, in bytes (0: none)   8 + 8n: digest of the key (2 words), base, length, access of slot n
//! ```
//!
//! Digests and not keys: who may look at the table does not learn what opens the regions. Only the owner can write (the memfd is sealed against it). An initiator says that it copies, in its
//! channel, *before* it looks at a key; the owner takes the key away *before* it looks at who copies: one
//! of the two sees the other, and the slot is not used again before all who might have seen it are done.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::LAYOUT;
use super::life::{self, Held, Life};
use super::shm::{self, Mapping, SharedFd};
use crate::wire::frame::ServeStatus;
use crate::wire::{Access, MemoryKind, RegionDescriptor, RegionKey};

const MAGIC: u64 = 0x7264_6c65_7261_6300 | LAYOUT as u64;
const OPEN: usize = 1;
const SLOTS: usize = 2;
const LIVES: usize = 3;
const FIRST: usize = 8;
const SLOT_WORDS: usize = 8;
/// More slots than any engine may have regions.
const MAX_SLOTS: usize = 1 << 24;

/// The words of a slot, of `slots`: behind the last there is something else.
#[inline]
fn slot_words(words: &[AtomicU64], slot: usize, slots: usize) -> Option<&[AtomicU64]> {
    if slot >= slots {
        return None;
    }
    let start = FIRST + slot.checked_mul(SLOT_WORDS)?;
    words.get(start..start + 5)
}

/// The owner's side.
#[derive(Debug)]
pub(crate) struct Table {
    map: Arc<Mapping>,
    fd: SharedFd,
    slots: usize,
    lives: usize,
}

impl Table {
    /// A table for `slots` regions. Memory is used only for slots that are.
    pub(crate) fn create(slots: usize) -> io::Result<Self> {
        let lives = (FIRST + slots * SLOT_WORDS) * 8;
        let len = lives + life::BYTES;
        let fd = shm::create(c"corelane-regions", len, false)?;
        let map = Arc::new(Mapping::new(fd.as_fd(), len, true)?);
        shm::seal(fd.as_fd(), true)?;
        let words = map.words();
        words[SLOTS].store(slots as u64, Ordering::Relaxed);
        words[OPEN].store(1, Ordering::Relaxed);
        words[0].store(MAGIC, Ordering::Release);
        Ok(Self { map, fd: Arc::new(fd), slots, lives })
    }

    /// Shows peers that the calling thread lives, for as long as it keeps what this returns. Once.
    pub(crate) fn hold_lives(&self) -> io::Result<Held> {
        let held = Held::take(self.map.clone(), self.lives)?;
        self.map.words()[LIVES].store(self.lives as u64, Ordering::Release);
        Ok(held)
    }

    pub(crate) fn fd(&self) -> SharedFd {
        self.fd.clone()
    }

    /// Lets peers see a region.
    pub(crate) fn publish(&self, region: &RegionDescriptor) {
        let Some(slot) = slot_words(self.map.words(), region.key.slot(), self.slots) else {
            return;
        };
        slot[2].store(region.base, Ordering::Relaxed);
        slot[3].store(region.len, Ordering::Relaxed);
        let rights = match region.kind {
            MemoryKind::Dram => region.access,
            MemoryKind::Vram { .. } => region.access.of_device(),
        };
        slot[4].store(u64::from(rights.bits()), Ordering::Relaxed);
        let digest = region.key.digest();
        slot[1].store((digest >> 64) as u64, Ordering::Release);
        slot[0].store(digest as u64, Ordering::Release);
    }

    /// Takes a region's key away. Look at the uses of all peers next.
    pub(crate) fn close(&self, region: &RegionDescriptor) {
        if let Some(slot) = slot_words(self.map.words(), region.key.slot(), self.slots)
            && !mutated!(TableStaysOpen)
        {
            slot[0].store(0, Ordering::SeqCst);
            slot[1].store(0, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
    }

    /// Takes all keys away, for good.
    pub(crate) fn shut(&self) {
        self.map.words()[OPEN].store(0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
}

/// A range of a peer's memory that a plan touches, by key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RemoteRange {
    pub(crate) key: RegionKey,
    /// Of the key.
    pub(crate) digest: u128,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// Why a range must not be touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The engine is shut down.
    Shut,
    Region(ServeStatus),
}

/// A peer's table, for reading.
#[derive(Debug)]
pub(crate) struct TableView {
    map: Arc<Mapping>,
    slots: usize,
}

impl TableView {
    /// Maps what a peer has sent.
    pub(crate) fn open(fd: &impl AsFd) -> Result<Self, String> {
        let smallest = FIRST * 8;
        let largest = (FIRST + MAX_SLOTS * SLOT_WORDS) * 8 + life::BYTES;
        let map = Arc::new(Mapping::received(fd.as_fd(), smallest..=largest, false, false)?);
        if map.words()[0].load(Ordering::Acquire) != MAGIC {
            return Err("its region table has another layout".into());
        }
        // Looked at once: what it says must not change under us. What it says wrongly ends at the end of the mapping.
        let slots = map.words()[SLOTS].load(Ordering::Relaxed).min(MAX_SLOTS as u64) as usize;
        Ok(Self { map, slots })
    }

    /// Where it is seen that the owner dies, by the engine of this incarnation; `None`: the owner does not show it.
    pub(crate) fn life(&self, reader: u128) -> Option<Life> {
        Life::of(&self.map, self.map.words()[LIVES].load(Ordering::Acquire), reader)
    }

    /// Whether the range may be touched. The caller has announced its use before. Some loads of a line
    /// that changes only when regions do.
    #[inline]
    pub(crate) fn check(&self, range: &RemoteRange, needs: Access) -> Result<(), Refused> {
        let words = self.map.words();
        if words[OPEN].load(Ordering::SeqCst) != 1 {
            return Err(Refused::Shut);
        }
        let refuse = |status| Err(Refused::Region(status));
        let Some(slot) = slot_words(words, range.key.slot(), self.slots) else {
            return refuse(ServeStatus::UnknownKey);
        };
        let low = slot[0].load(Ordering::SeqCst) ^ range.digest as u64;
        let high = slot[1].load(Ordering::SeqCst) ^ (range.digest >> 64) as u64;
        if low | high != 0 {
            return refuse(ServeStatus::UnknownKey);
        }
        let (base, len) = (slot[2].load(Ordering::Relaxed), slot[3].load(Ordering::Relaxed));
        let access = Access::from_bits_truncate(slot[4].load(Ordering::Relaxed) as u8);
        if !access.allows(needs) {
            return refuse(ServeStatus::Denied);
        }
        if range.start < base || range.end < range.start || range.end - base > len {
            return refuse(ServeStatus::OutOfBounds);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(slot: u32, access: Access) -> RegionDescriptor {
        RegionDescriptor {
            incarnation: 1,
            key: RegionKey::new(slot, 77 << 40 | 5),
            base: 1000,
            len: 100,
            kind: MemoryKind::Dram,
            access,
            rail_keys: crate::wire::RailKeys::new(),
            device: None,
        }
    }

    #[test]
    fn key_bounds_and_permission_are_checked_against_what_the_owner_says() {
        let table = Table::create(16).unwrap();
        let view = TableView::open(&*table.fd()).unwrap();
        let readable = region(3, Access::REMOTE_READ);
        let of = |key: RegionKey, start, end| RemoteRange { key, digest: key.digest(), start, end };
        let range = |start, end| of(readable.key, start, end);
        let unknown = Err(Refused::Region(ServeStatus::UnknownKey));
        let read = Access::REMOTE_READ;
        assert_eq!(view.check(&range(1000, 1100), read), unknown);
        table.publish(&readable);
        assert_eq!(view.check(&range(1000, 1100), read), Ok(()));
        for (start, end) in [(999, 1000), (1001, 1101), (1050, 1049), (0, u64::MAX)] {
            let refused = Err(Refused::Region(ServeStatus::OutOfBounds));
            assert_eq!(view.check(&range(start, end), read), refused);
        }
        let denied = Err(Refused::Region(ServeStatus::Denied));
        assert_eq!(view.check(&range(1000, 1001), Access::REMOTE_WRITE), denied);
        for bit in [0, 5, 40, 90, 127] {
            let forged = of(RegionKey(readable.key.0 ^ 1 << bit), 1000, 1001);
            assert_eq!(view.check(&forged, read), unknown, "{bit}");
        }
        table.close(&readable);
        assert_eq!(view.check(&range(1000, 1001), read), unknown);
        table.publish(&readable);
        assert_eq!(view.check(&range(1000, 1001), read), Ok(()));
        table.shut();
        assert_eq!(view.check(&range(1000, 1001), read), Err(Refused::Shut));
    }

    #[test]
    fn rights_to_gpu_memory_are_none_to_host_memory_and_the_reverse() {
        let table = Table::create(16).unwrap();
        let view = TableView::open(&*table.fd()).unwrap();
        let host = region(1, Access::READ_WRITE);
        let kind = MemoryKind::Vram { device: 0 };
        let device = RegionDescriptor { kind, ..region(2, Access::REMOTE_READ) };
        table.publish(&host);
        table.publish(&device);
        let of = |key: RegionKey| RemoteRange { key, digest: key.digest(), start: 1000, end: 1100 };
        let (host, device) = (of(host.key), of(device.key));
        let (read, write) = (Access::REMOTE_READ, Access::REMOTE_WRITE);
        let denied = Err(Refused::Region(ServeStatus::Denied));
        assert_eq!(view.check(&host, read), Ok(()));
        assert_eq!(view.check(&host, read.of_device()), denied);
        assert_eq!(view.check(&device, read.of_device()), Ok(()));
        assert_eq!(view.check(&device, write.of_device()), denied);
        assert_eq!(view.check(&device, read), denied);
    }

    #[test]
    fn behind_the_last_slot_there_is_none() {
        let table = Table::create(16).unwrap();
        let view = TableView::open(&*table.fd()).unwrap();
        for slot in [16, 17, 19, 47, 1000] {
            let beyond = region(slot, Access::READ_WRITE);
            table.publish(&beyond);
            let key = beyond.key;
            let range = RemoteRange { key, digest: key.digest(), start: 1000, end: 1100 };
            let unknown = Err(Refused::Region(ServeStatus::UnknownKey));
            assert_eq!(view.check(&range, Access::REMOTE_READ), unknown, "slot {slot}");
        }
        let first = FIRST + 16 * SLOT_WORDS;
        assert!(table.map.words()[first..].iter().all(|word| word.load(Ordering::SeqCst) == 0));
    }

    #[test]
    fn what_a_peer_sends_is_checked() {
        let fd = shm::create(c"test", 4096, false).unwrap();
        shm::seal(fd.as_fd(), false).unwrap();
        assert!(TableView::open(&fd).is_err(), "no magic");
        let tiny = shm::create(c"test", 8, false).unwrap();
        shm::seal(tiny.as_fd(), false).unwrap();
        assert!(TableView::open(&tiny).is_err());
    }
}
