//! Streams: what is enqueued happens in order, later, on a thread of the stream.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::memory;

/// As the kernel's `Tile`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) len: u32,
    pub(crate) reserved: u32,
}

pub(crate) enum Work {
    /// By the copy engine, which takes any host memory.
    Copy {
        to: u64,
        from: u64,
        len: usize,
    },
    Set {
        at: u64,
        value: u8,
        len: usize,
    },
    Write {
        at: u64,
        value: u32,
    },
    Kernel {
        tiles: u64,
        count: u32,
        done: u64,
        value: u32,
        only: Tile,
    },
}

pub(crate) struct Stream {
    work: Sender<Work>,
    pending: Arc<AtomicU64>,
}

/// The first error, which stays.
static LOST: AtomicI32 = AtomicI32::new(0);
static ALL: Mutex<Vec<Arc<AtomicU64>>> = Mutex::new(Vec::new());
const ILLEGAL_ADDRESS: i32 = 700;

/// The error that has lost the GPU, or 0.
pub(crate) fn lost() -> i32 {
    LOST.load(Ordering::Acquire)
}

fn illegal(address: u64) {
    eprintln!("fake GPU: illegal address {address:#x}");
    LOST.store(ILLEGAL_ADDRESS, Ordering::Release);
}

fn copy(to: u64, from: u64, len: usize, host: bool) {
    let place = |address| match memory::shadow(address, len) {
        Some(place) => Some(place),
        None if host && memory::at(address).is_none() => Some(address),
        None => {
            illegal(address);
            None
        }
    };
    if let (Some(to), Some(from)) = (place(to), place(from)) {
        // SAFETY: both are in allocations, or memory of the caller of a copy.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, len) };
    }
}

fn store(at: u64, value: u32) {
    match memory::shadow(at, 4) {
        // SAFETY: within an allocation, and aligned as the engine has it.
        Some(at) => unsafe {
            (*(at as *const std::sync::atomic::AtomicU32)).store(value, Ordering::Release);
        },
        None => illegal(at),
    }
}

fn run(work: &Work) {
    if lost() != 0 {
        return;
    }
    match *work {
        Work::Copy { to, from, len } => copy(to, from, len, true),
        Work::Set { at, value, len } => match memory::shadow(at, len) {
            // SAFETY: within an allocation.
            Some(at) => unsafe { std::ptr::write_bytes(at as *mut u8, value, len) },
            None => illegal(at),
        },
        Work::Write { at, value } => store(at, value),
        Work::Kernel { tiles, count, done, value, only } => {
            for at in 0..u64::from(count) {
                let size = size_of::<Tile>();
                let tile = if count == 1 {
                    only
                } else {
                    match memory::shadow(tiles + at * size as u64, size) {
                        // SAFETY: within an allocation.
                        Some(place) => unsafe { std::ptr::read_unaligned(place as *const Tile) },
                        None => return illegal(tiles),
                    }
                };
                copy(tile.to, tile.from, tile.len as usize, false);
            }
            if lost() == 0 {
                store(done, value);
            }
        }
    }
}

impl Stream {
    pub(crate) fn new() -> Self {
        let (work, queue) = channel();
        let pending = Arc::new(AtomicU64::new(0));
        let left = pending.clone();
        ALL.lock().unwrap_or_else(PoisonError::into_inner).push(pending.clone());
        std::thread::spawn(move || {
            let mut random = 1u64;
            for work in queue {
                // Most follow at once, some take their time: so ends come in another order than beginnings.
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let pause = Duration::from_micros([0, 0, 20, 300][(random >> 62) as usize]);
                let until = Instant::now() + pause;
                while Instant::now() < until {
                    std::thread::yield_now();
                }
                run(&work);
                left.fetch_sub(1, Ordering::Release);
            }
        });
        Self { work, pending }
    }

    pub(crate) fn enqueue(&self, work: Work) {
        self.pending.fetch_add(1, Ordering::AcqRel);
        if self.work.send(work).is_err() {
            self.pending.fetch_sub(1, Ordering::AcqRel);
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.pending.load(Ordering::Acquire) == 0
    }

    pub(crate) fn wait(&self) {
        while !self.is_idle() {
            std::thread::yield_now();
        }
    }
}

/// Waits for all streams.
pub(crate) fn wait_for_all() {
    let all = ALL.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for pending in all {
        while pending.load(Ordering::Acquire) != 0 {
            std::thread::yield_now();
        }
    }
}
