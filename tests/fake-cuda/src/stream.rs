//! Streams: what is enqueued happens in order, later, on a thread of the stream.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering};
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
    /// A test's: word i becomes i * FACTOR + seed.
    Fill {
        base: u64,
        words: u32,
        seed: u32,
    },
    /// A test's: counts words that are not what was filled.
    Check {
        base: u64,
        list: u64,
        count: u32,
        seed: u32,
        wrong: u64,
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
    gpu: usize,
    work: Sender<Work>,
    pending: Arc<AtomicU64>,
}

const GPUS: usize = 64;

/// What tests do to a GPU, and what it does to itself.
struct State {
    /// The first error, which stays.
    lost: AtomicI32,
    /// It is lost by this after so much more work.
    to_lose: (AtomicI32, AtomicI64),
    held: AtomicBool,
    /// Those whose memory its kernels reach, a bit each.
    peers: AtomicU64,
}

static STATES: [State; GPUS] = [const {
    State {
        lost: AtomicI32::new(0),
        to_lose: (AtomicI32::new(0), AtomicI64::new(0)),
        held: AtomicBool::new(false),
        peers: AtomicU64::new(0),
    }
}; GPUS];
static ALL: Mutex<Vec<(usize, Arc<AtomicU64>)>> = Mutex::new(Vec::new());
const ILLEGAL_ADDRESS: i32 = 700;

/// The error that has lost the GPU, or 0.
pub(crate) fn lost(gpu: usize) -> i32 {
    STATES[gpu].lost.load(Ordering::Acquire)
}

/// It is lost after so much more work.
pub(crate) fn lose(gpu: usize, status: i32, after: u64) {
    let state = &STATES[gpu];
    if after == 0 {
        state.lost.store(status, Ordering::Release);
    }
    state.to_lose.1.store(after as i64, Ordering::Release);
    state.to_lose.0.store(status, Ordering::Release);
}

/// It does nothing while this is set.
pub(crate) fn hold(gpu: usize, held: bool) {
    STATES[gpu].held.store(held, Ordering::Release);
}

/// Kernels reach the memory of another GPU from now on; false: they did before.
pub(crate) fn open_peer(gpu: usize, other: usize) -> bool {
    STATES[gpu].peers.fetch_or(1 << other, Ordering::AcqRel) & 1 << other == 0
}

fn illegal(gpu: usize, address: u64) {
    eprintln!("fake GPU {gpu}: illegal address {address:#x}");
    STATES[gpu].lost.store(ILLEGAL_ADDRESS, Ordering::Release);
}

/// By the copy engine or by a kernel. The engine takes any host memory, and plain memory of all GPUs.
fn copy(gpu: usize, to: u64, from: u64, len: usize, engine: bool) {
    let peers = if engine { u64::MAX } else { STATES[gpu].peers.load(Ordering::Acquire) };
    let place = |address| {
        let found = memory::at(address);
        let reached = |found: &memory::Allocation| {
            found.is_reached(gpu as i32, peers) || engine && found.gpu.is_none()
        };
        let place = match found {
            Some(found) => memory::shadow(address, len).filter(|_| reached(&found)),
            None => engine.then_some(address),
        };
        if place.is_none() {
            illegal(gpu, address);
        }
        place
    };
    if let (Some(to), Some(from)) = (place(to), place(from)) {
        // SAFETY: both are in allocations, or memory of the caller of a copy.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, len) };
    }
}

fn store(gpu: usize, at: u64, value: u32) {
    match memory::shadow(at, 4) {
        // SAFETY: within an allocation, and aligned as the engine has it.
        Some(at) => unsafe {
            (*(at as *const std::sync::atomic::AtomicU32)).store(value, Ordering::Release);
        },
        None => illegal(gpu, at),
    }
}

/// What the kernels of tests take a word for.
fn filled(word: u32, seed: u32) -> u32 {
    const FACTOR: u32 = 2654435761;
    word.wrapping_mul(FACTOR).wrapping_add(seed)
}

fn word_at(base: u64, word: u32) -> *mut u32 {
    (base + u64::from(word) * 4) as *mut u32
}

fn run(gpu: usize, work: &Work) {
    let state = &STATES[gpu];
    while state.held.load(Ordering::Acquire) && lost(gpu) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let status = state.to_lose.0.load(Ordering::Acquire);
    if status != 0 && state.to_lose.1.fetch_sub(1, Ordering::AcqRel) <= 0 {
        state.lost.store(status, Ordering::Release);
    }
    if lost(gpu) != 0 {
        return;
    }
    match *work {
        Work::Copy { to, from, len } => copy(gpu, to, from, len, true),
        Work::Set { at, value, len } => match memory::shadow(at, len) {
            // SAFETY: within an allocation.
            Some(at) => unsafe { std::ptr::write_bytes(at as *mut u8, value, len) },
            None => illegal(gpu, at),
        },
        Work::Write { at, value } => store(gpu, at, value),
        Work::Fill { base, words, seed } => {
            let Some(at) = memory::shadow(base, words as usize * 4) else {
                return illegal(gpu, base);
            };
            for word in 0..words {
                // SAFETY: within an allocation.
                unsafe { word_at(at, word).write(filled(word, seed)) };
            }
        }
        Work::Check { base, list, count, seed, wrong } => {
            let Some(list) = memory::shadow(list, count as usize * 16) else {
                return illegal(gpu, list);
            };
            let mut bad = 0;
            for range in 0..count {
                // SAFETY: within an allocation, each.
                let [here, there, words] =
                    [0, 1, 2].map(|at| unsafe { word_at(list, range * 4 + at).read() });
                let start = base + u64::from(here) * 4;
                let Some(found) = memory::shadow(start, words as usize * 4) else {
                    return illegal(gpu, start);
                };
                // SAFETY: as above.
                let is_bad = |at: &u32| unsafe {
                    word_at(found, *at).read() != filled(there.wrapping_add(*at), seed)
                };
                bad += (0..words).filter(is_bad).count() as u32;
            }
            store(gpu, wrong, bad);
        }
        Work::Kernel { tiles, count, done, value, only } => {
            for at in 0..u64::from(count) {
                let size = size_of::<Tile>();
                let tile = if count == 1 {
                    only
                } else {
                    match memory::shadow(tiles + at * size as u64, size) {
                        // SAFETY: within an allocation.
                        Some(place) => unsafe { std::ptr::read_unaligned(place as *const Tile) },
                        None => return illegal(gpu, tiles),
                    }
                };
                copy(gpu, tile.to, tile.from, tile.len as usize, false);
            }
            if lost(gpu) == 0 {
                store(gpu, done, value);
            }
        }
    }
}

impl Stream {
    pub(crate) fn new(gpu: usize) -> Self {
        let (work, queue) = channel();
        let pending = Arc::new(AtomicU64::new(0));
        let left = pending.clone();
        ALL.lock().unwrap_or_else(PoisonError::into_inner).push((gpu, pending.clone()));
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
                run(gpu, &work);
                left.fetch_sub(1, Ordering::Release);
            }
        });
        Self { gpu, work, pending }
    }

    pub(crate) fn gpu(&self) -> usize {
        self.gpu
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

/// Waits for all streams of a GPU.
pub(crate) fn wait_for_all(gpu: usize) {
    let all = ALL.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for (_, pending) in all.into_iter().filter(|(of, _)| *of == gpu) {
        while pending.load(Ordering::Acquire) != 0 {
            std::thread::yield_now();
        }
    }
}
