//! An allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

thread_local! {
    static EXEMPT: Cell<bool> = const { Cell::new(false) };
}

/// The system's allocator, counting the allocations of all threads that are not exempt.
#[derive(Debug, Default)]
pub struct CountingAllocator {
    count: AtomicU64,
}

impl CountingAllocator {
    /// For a `#[global_allocator]`.
    pub const fn new() -> Self {
        Self { count: AtomicU64::new(0) }
    }

    /// Allocations and reallocations so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    fn note(&self) {
        if !EXEMPT.with(Cell::get) {
            self.count.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// What the calling thread allocates is not counted from now on.
pub fn exempt_this_thread() {
    EXEMPT.with(|exempt| exempt.set(true));
}

/// Runs `work` in 100 short windows, and panics if memory is allocated in more than `tolerated` of them. With automatic
/// assistance a lane may allocate when it looks at its surroundings about once a second; without it, nothing may.
#[track_caller]
pub fn assert_allocation_free(
    what: &str,
    tolerated: usize,
    mut count: impl FnMut() -> u64,
    mut work: impl FnMut(),
) {
    let allocated: Vec<u64> = (0..100)
        .map(|_| {
            let before = count();
            work();
            count() - before
        })
        .collect();
    let windows = allocated.iter().filter(|&&allocated| allocated > 0).count();
    assert!(windows <= tolerated, "{what}: {allocated:?} allocations");
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.note();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.note();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        self.note();
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}
