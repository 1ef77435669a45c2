//! The memory that is transferred from and into: one anonymous mapping per process, faulted in before it is measured.
//!
//! An engine writes this memory behind the compiler's back, from its lanes, so nothing here hands out a reference that
//! outlives a call: callers get offsets, and the harness touches a block only between passes, when nothing is in flight.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, ensure};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::pattern::{self, Mismatch};

/// A shared handle; the mapping lives until the last one is gone.
#[derive(Clone)]
pub(crate) struct Arena {
    mapping: Arc<Mapping>,
}

struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory without thread affinity. All access goes through `Arena`, whose methods copy in
// or out within one call.
unsafe impl Send for Mapping {}
// SAFETY: as above. Concurrent writers of one block would be a bug of the schedule, which the verification reports;
// the harness accesses blocks only between passes, except for `load_word`, which is atomic.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `len` are those of the mapping made in `Arena::new`, and the last handle is gone.
        // A failure leaks address space of a process that is about to end; there is nobody to tell.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

impl Arena {
    /// Maps `len` bytes and touches every page, so that no page fault falls into a timed span.
    pub(crate) fn new(len: usize) -> Result<Self> {
        let size = NonZeroUsize::new(len.next_multiple_of(4096)).context("an empty arena")?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe {
            mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)
        };
        let start = start.with_context(|| {
            format!(
                "cannot map {len} bytes of memory: free some, or choose smaller --sizes and --kv"
            )
        })?;
        Ok(Self { mapping: Arc::new(Mapping { start: start.cast(), len: size.get() }) })
    }

    /// Bytes of the mapping, a multiple of 4096.
    pub(crate) fn len(&self) -> usize {
        self.mapping.len
    }

    /// The first byte, to register with an engine.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.mapping.start.as_ptr()
    }

    /// Whether `[offset, offset + len)` lies inside.
    pub(crate) fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.mapping.len as u64)
    }

    /// Runs `access` on a block that nothing else touches during the call.
    ///
    /// # Panics
    /// Outside of the arena; every layout is checked against its length when a case is opened.
    pub(crate) fn with_block<R>(
        &self,
        offset: u64,
        len: usize,
        access: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        assert!(
            self.contains(offset, len as u64),
            "block {offset}+{len} lies outside of the arena"
        );
        // SAFETY: in bounds (asserted) of a live mapping of initialised bytes. Exclusive for the duration of the call:
        // passes and verification alternate, no transfer is in flight during the latter, and one thread does it. The
        // raw TCP pair uses it for the block that its one thread is receiving into or sending from.
        access(unsafe { std::slice::from_raw_parts_mut(self.as_ptr().add(offset as usize), len) })
    }

    /// Reads one aligned word while an engine may be writing around it.
    pub(crate) fn load_word(&self, offset: u64) -> Option<u64> {
        if !offset.is_multiple_of(8) || !self.contains(offset, 8) {
            return None;
        }
        // SAFETY: aligned and in bounds (checked; the mapping is page-aligned), valid for the mapping's life, and
        // only ever read through this atomic while transfers are under way.
        let word = unsafe { AtomicU64::from_ptr(self.as_ptr().add(offset as usize).cast()) };
        Some(word.load(Ordering::Acquire))
    }

    /// Fills a block with its pattern.
    pub(crate) fn fill(&self, offset: u64, len: usize, sequence: u64, index: u64) {
        self.with_block(offset, len, |block| pattern::fill(block, sequence, index));
    }

    /// Poisons a block.
    pub(crate) fn poison(&self, offset: u64, len: usize) {
        self.with_block(offset, len, pattern::poison);
    }

    /// Checks a block against its pattern.
    pub(crate) fn check(
        &self,
        offset: u64,
        len: usize,
        sequence: u64,
        index: u64,
    ) -> Result<(), Mismatch> {
        self.with_block(offset, len, |block| pattern::check(block, sequence, index))
    }
}

/// Replaces `arena` by a larger one when it is too small; keeps it otherwise, with its pages already touched.
pub(crate) fn grow(arena: &mut Option<Arena>, len: usize, limit: usize) -> Result<Arena> {
    ensure!(
        len <= limit,
        "the case needs {len} bytes of memory, more than --max-memory allows ({limit})"
    );
    match arena {
        Some(arena) if arena.len() >= len => Ok(arena.clone()),
        _ => {
            // The old mapping goes first: two of the largest might not fit.
            *arena = None;
            Ok(arena.insert(Arena::new(len)?).clone())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_what_was_written() {
        let arena = Arena::new(10_000).expect("map");
        assert_eq!(arena.len(), 12_288);
        arena.fill(64, 640, 5, 9);
        assert_eq!(arena.check(64, 640, 5, 9), Ok(()));
        assert_eq!(arena.load_word(64), Some(5));
        arena.poison(64, 8);
        assert!(arena.check(64, 640, 5, 9).is_err());
    }

    #[test]
    fn bounds_are_checked() {
        let arena = Arena::new(4096).expect("map");
        assert!(
            arena.contains(4096, 0) && !arena.contains(4096, 1) && !arena.contains(u64::MAX, 2)
        );
        assert_eq!(arena.load_word(4096), None);
        assert_eq!(arena.load_word(4), None);
    }

    #[test]
    fn growing_keeps_a_large_enough_arena_and_respects_the_limit() {
        let mut slot = None;
        let first = grow(&mut slot, 8192, 1 << 20).expect("map");
        let same = grow(&mut slot, 4096, 1 << 20).expect("kept");
        assert_eq!(first.as_ptr(), same.as_ptr());
        assert!(grow(&mut slot, 2 << 20, 1 << 20).is_err());
    }
}
