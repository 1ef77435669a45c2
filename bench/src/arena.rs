//! The memory that is transferred from and into, faulted in before it is measured: an anonymous mapping, a file in memory
//! that two processes map, or memory of the engine.
//!
//! An engine writes this memory behind the compiler's back, from its lanes, so nothing here hands out a reference that
//! outlives a call: callers get offsets, and the harness touches a block only between passes, when nothing is in flight.

use std::any::Any;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::memory::ensure_available;
use crate::parent::Refusal;
use crate::pattern::{self, Mismatch};
use crate::vram::{Vram, VramAddress};

/// A shared handle; the mapping lives until the last one is gone.
#[derive(Clone)]
pub(crate) struct Arena {
    mapping: Arc<Mapping>,
}

struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// Memory of a GPU, which this process does not touch itself.
    vram: Option<Vram>,
    /// Gives the memory back when it is dropped.
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: the mapping is plain memory without thread affinity. All access goes through `Arena`, whose methods copy in
// or out within one call.
unsafe impl Send for Mapping {}
// SAFETY: as above. Concurrent writers of one block would be a bug of the schedule, which the verification reports;
// the harness accesses blocks only between passes, except for `load_word`, which is atomic.
unsafe impl Sync for Mapping {}

/// Pages that this process mapped itself.
struct Pages {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: only an address range to unmap; nothing is accessed through it.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: `start` and `len` are those of the mapping that was made for this value, and the last handle is gone.
        // A failure leaks address space of a process that is about to end; there is nobody to tell.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

impl Arena {
    /// Maps `len` bytes and touches every page, so that no page fault falls into a timed span.
    pub(crate) fn new(len: usize) -> Result<Self> {
        let size = whole_pages(len)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe {
            mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)
        };
        Self::mapped(start, size)
    }

    /// As [`Arena::new`], but of a file in memory, which another process can map too.
    pub(crate) fn shared(len: usize) -> Result<(Self, File)> {
        let size = whole_pages(len)?;
        let file = memfd_create("corelane-bench", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
        let file = File::from(file);
        file.set_len(size.get() as u64).context("the length of a file in memory")?;
        Ok((Self::of_file(&file, len)?, file))
    }

    /// Maps the first `len` bytes of a file in memory, whoever made it, and touches every page.
    pub(crate) fn of_file(file: &File, len: usize) -> Result<Self> {
        let size = whole_pages(len)?;
        let there = file.metadata().context("the length of a file in memory")?.len();
        ensure!(there >= size.get() as u64, "a file of {there} bytes instead of {size}");
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing. The file is as long (checked)
        // and the processes of the harness never shorten it.
        let start = unsafe {
            mmap(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, file, 0)
        };
        Self::mapped(start, size)
    }

    /// Memory of a GPU.
    pub(crate) fn of_gpu(gpu: u32, len: usize) -> Result<Self> {
        Self::of_vram(Vram::new(gpu, whole_pages(len)?.get())?, whole_pages(len)?.get())
    }

    /// As [`Arena::of_gpu`], of another process, mapped for that GPU of this one.
    pub(crate) fn of_other_gpu(address: &VramAddress, gpu: u32, len: usize) -> Result<Self> {
        Self::of_vram(Vram::open(address, gpu, len)?, len)
    }

    fn of_vram(vram: Vram, len: usize) -> Result<Self> {
        let start = NonNull::new(vram.base() as *mut u8).context("memory at no address")?;
        let mapping = Mapping { start, len, vram: Some(vram), _owner: Box::new(()) };
        Ok(Self { mapping: Arc::new(mapping) })
    }

    /// The memory of a GPU that it is.
    pub(crate) fn vram(&self) -> Option<&Vram> {
        self.mapping.vram.as_ref()
    }

    fn mapped(start: nix::Result<NonNull<std::ffi::c_void>>, size: NonZeroUsize) -> Result<Self> {
        let start = start.with_context(|| {
            format!(
                "cannot map {size} bytes of memory: free some, or choose smaller --sizes and --kv"
            )
        })?;
        let (start, len) = (start.cast(), size.get());
        // SAFETY: mapped readable and writable just now, zeroed by the kernel, and unmapped by its owner only.
        Ok(unsafe { Self::owned_by(start, len, Pages { start, len }) })
    }

    /// Memory that `owner` gives back when it is dropped, with the last handle.
    ///
    /// # Safety
    /// `len` initialised bytes from `start` on, at least word-aligned, are readable and writable for as long as `owner`
    /// lives, and only transfers touch them besides this arena.
    pub(crate) unsafe fn owned_by(
        start: NonNull<u8>,
        len: usize,
        owner: impl Any + Send + Sync,
    ) -> Self {
        Self { mapping: Arc::new(Mapping { start, len, vram: None, _owner: Box::new(owner) }) }
    }

    /// Bytes of the memory.
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
        if let Some(vram) = &self.mapping.vram {
            let mut block = vec![0; len];
            must(vram.read(offset, &mut block));
            let done = access(&mut block);
            must(vram.write(offset, &block));
            return done;
        }
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
        if let Some(vram) = &self.mapping.vram {
            let mut word = [0; 8];
            vram.read(offset, &mut word).ok()?;
            return Some(u64::from_le_bytes(word));
        }
        // SAFETY: aligned and in bounds (checked; the memory is word-aligned), valid for the mapping's life, and
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
        if let Some(vram) = &self.mapping.vram {
            // Not written back: what is checked stays what it is.
            let mut block = vec![0; len];
            must(vram.read(offset, &mut block));
            return pattern::check(&block, sequence, index);
        }
        self.with_block(offset, len, |block| pattern::check(block, sequence, index))
    }
}

/// A GPU that fails while its memory is filled or checked leaves nothing to be measured.
fn must(done: Result<()>) {
    if let Err(error) = done {
        panic!("{error:#}");
    }
}

fn whole_pages(len: usize) -> Result<NonZeroUsize> {
    len.checked_next_multiple_of(4096).and_then(NonZeroUsize::new).context("an empty arena")
}

/// Replaces `arena` by a larger one when it is too small; keeps it otherwise, with its pages already touched.
pub(crate) fn grow(arena: &mut Option<Arena>, len: usize, limit: usize) -> Result<Arena> {
    ensure_within(len, limit)?;
    match arena {
        Some(arena) if arena.len() >= len => Ok(arena.clone()),
        _ => {
            // The old mapping goes first: two of the largest might not fit.
            *arena = None;
            ensure_available(len, len).map_err(Refusal)?;
            Ok(arena.insert(Arena::new(len)?).clone())
        }
    }
}

/// Refuses a case that needs more memory than this process may use.
pub(crate) fn ensure_within(len: usize, limit: usize) -> Result<()> {
    ensure!(
        len <= limit,
        "the case needs {len} bytes of memory, more than --max-memory allows ({limit})"
    );
    Ok(())
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
    fn a_shared_arena_is_seen_through_its_file() {
        let (arena, file) = Arena::shared(10_000).expect("map");
        let other = Arena::of_file(&file, 10_000).expect("map");
        assert_ne!(arena.as_ptr(), other.as_ptr());
        arena.fill(64, 640, 5, 9);
        assert_eq!(other.check(64, 640, 5, 9), Ok(()));
        assert!(Arena::of_file(&file, 1 << 20).is_err(), "longer than the file");
    }

    #[test]
    fn memory_is_given_back_with_the_last_handle() {
        let owner = Arc::new(());
        let mut bytes = vec![0u64; 512];
        let start = NonNull::new(bytes.as_mut_ptr().cast()).expect("not null");
        // SAFETY: `bytes` is declared before the arena and outlives it.
        let arena = unsafe { Arena::owned_by(start, 4096, Arc::clone(&owner)) };
        let copy = arena.clone();
        drop(arena);
        assert_eq!(Arc::strong_count(&owner), 2);
        copy.fill(0, 64, 1, 1);
        drop(copy);
        assert_eq!((Arc::strong_count(&owner), bytes[0]), (1, 1));
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
