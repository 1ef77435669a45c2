//! An allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

thread_local! {
    static EXEMPT: Cell<bool> = const { Cell::new(false) };
}

/// What the main thread allocates is not counted.
static EXEMPT_MAIN: AtomicBool = AtomicBool::new(false);

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
        let exempt_main = EXEMPT_MAIN.load(Ordering::Relaxed) && is_main_thread();
        if !EXEMPT.with(Cell::get) && !exempt_main {
            self.count.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// What the calling thread allocates is not counted from now on.
pub fn exempt_this_thread() {
    EXEMPT.with(|exempt| exempt.set(true));
}

fn is_main_thread() -> bool {
    // SAFETY: neither has arguments.
    unsafe { libc::gettid() == libc::getpid() }
}

/// What the harness of the tests allocates is not counted from now on. Beside the threads of the tests it has the main one, which
/// tells after a minute that a test is still running.
pub fn exempt_harness() {
    // Where it runs tests one by one it does so on the main thread, and tells nothing meanwhile.
    EXEMPT_MAIN.store(!is_main_thread(), Ordering::Relaxed);
}

/// What may allocate beside transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// Nothing.
    Nothing,
    /// A lane that helps itself with automatic assistance: it looks at its surroundings once a second.
    Surroundings,
}

impl Beside {
    /// In how many windows within this time: a look may begin in one and end in the next.
    fn windows(self, within: Duration) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Surroundings => 2 * (within.as_secs() as usize + 1),
        }
    }
}

/// Runs `work` in 100 short windows, and panics if memory is allocated in any of them, but for what may allocate beside it.
#[track_caller]
pub fn assert_allocation_free(
    what: &str,
    beside: Beside,
    mut count: impl FnMut() -> u64,
    mut work: impl FnMut(),
) {
    let begin = Instant::now();
    let allocated: Vec<u64> = (0..100)
        .map(|_| {
            let before = count();
            work();
            count() - before
        })
        .collect();
    let tolerated = beside.windows(begin.elapsed());
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
