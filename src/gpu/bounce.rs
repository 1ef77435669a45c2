//! Pinned host memory that the bytes of GPUs pass through on their way to and from sockets.
//!
//! A block holds the payload of one frame, and behind it the list of ranges by which a GPU fills or empties it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::cuda::{Device, HostMemory, LaneGpu, Launch, Tile, Tiles};
use super::plan::cut;
use super::{Flight, GpuError};
use crate::sys::IoSegment;

/// The longest payload of a frame from or to GPU memory, and what requests of large transfers have: half the launches of the usual
/// length, and up to a tenth more bandwidth. Part of the protocol: longer ones are refused.
pub(crate) const BLOCK_BYTES: usize = 512 << 10;
/// Room for the list of a frame: a thousand ranges, the longest of which are cut.
const LIST_BYTES: usize = 32 << 10;
const STRIDE: usize = BLOCK_BYTES + LIST_BYTES;
/// The driver is asked for so many at a time: 2.1 MiB.
const SLAB_BLOCKS: usize = 4;
/// Kept for payloads of at most this length, so that they do not wait for large ones.
const SMALL_BYTES: usize = 64 << 10;
const KEPT_FOR_SMALL: usize = 2;
/// What a warp of the kernel copies at a time.
const TILE: u64 = 4 << 10;
/// One or two ranges of a payload of this length go by the copy engine, which takes no multiprocessor.
const ENGINE_BYTES: u64 = 64 << 10;
const ENGINE_RANGES: usize = 2;

/// Where the driver has refused more while there are blocks, it is asked again after so long: who asks is in the middle of transfers.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Store {
    free: Vec<u64>,
    /// Never given back before the lane's end: pinning memory takes milliseconds.
    slabs: Vec<HostMemory>,
}

type Home = Mutex<Store>;

fn lock(home: &Home) -> MutexGuard<'_, Store> {
    home.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The blocks of one lane for one direction, so that neither waits for the other.
pub(crate) struct Bounce {
    home: Arc<Home>,
    /// In whose contexts they are pinned: in the first that is not lost. Every GPU addresses them.
    devices: SmallVec<[&'static Device; 8]>,
    made: usize,
    limit: usize,
    refused: Option<Instant>,
}

/// The first blocks of a lane for one direction.
pub(crate) struct Slab(HostMemory);

/// A block in use; dropped, it is free again. To be dropped when no GPU touches it any more.
pub(crate) struct Block {
    address: u64,
    home: Arc<Home>,
}

impl Bounce {
    /// At most `bytes` of payload at a time; nothing is pinned yet.
    pub(crate) fn new(bytes: usize) -> Self {
        let limit = (bytes / BLOCK_BYTES).max(SLAB_BLOCKS);
        Self { home: Arc::default(), devices: SmallVec::new(), made: 0, limit, refused: None }
    }

    /// Pins the first blocks of one, for a lane that is not to wait for that: some milliseconds.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn slab(device: &'static Device) -> Result<Slab, GpuError> {
        HostMemory::pinned(device, SLAB_BLOCKS * STRIDE).map(Slab)
    }

    /// Adds what was pinned elsewhere.
    pub(crate) fn add(&mut self, Slab(memory): Slab) {
        self.add_blocks(memory, SLAB_BLOCKS);
    }

    /// Blocks may be pinned in the context of this GPU.
    pub(crate) fn know(&mut self, device: &'static Device) {
        if !self.devices.iter().any(|known| known.ordinal() == device.ordinal()) {
            self.devices.push(device);
        }
    }

    /// Pins more blocks, as far as there may be more.
    fn pin_more(&mut self) -> Result<(), GpuError> {
        let count = SLAB_BLOCKS.min(self.limit.saturating_sub(self.made));
        if count == 0 {
            return Ok(());
        }
        let is_working = |device: &&&'static Device| device.lost().is_none();
        let slab = loop {
            let Some(device) = self.devices.iter().find(is_working).or(self.devices.last()) else {
                return Ok(());
            };
            let slab = HostMemory::pinned(device, count * STRIDE);
            // That a GPU is lost may be news.
            let others = device.lost().is_some() && self.devices.iter().any(|it| is_working(&it));
            if slab.is_ok() || !others {
                break slab?;
            }
        };
        self.add_blocks(slab, count);
        Ok(())
    }

    fn add_blocks(&mut self, slab: HostMemory, count: usize) {
        let mut store = lock(&self.home);
        store.free.extend((0..count).rev().map(|at| slab.address() + (at * STRIDE) as u64));
        store.slabs.push(slab);
        self.made += count;
    }

    /// A block for a payload of `len` bytes; `None`: all are in use.
    ///
    /// # Errors
    /// The driver's, where there is no pinned memory at all.
    pub(crate) fn take(&mut self, len: usize) -> Result<Option<Block>, GpuError> {
        let kept = if len <= SMALL_BYTES { 0 } else { KEPT_FOR_SMALL };
        let may_ask = self.refused.is_none_or(|at| at.elapsed() >= ASK_AGAIN_AFTER);
        if lock(&self.home).free.len() <= kept && may_ask {
            self.refused = None;
            match self.pin_more() {
                Ok(()) => {}
                // What there is has to do, for now.
                Err(error) if self.made > 0 => {
                    tracing::debug!(%error, blocks = self.made, "no more pinned host memory");
                    self.refused = Some(Instant::now());
                }
                Err(error) => return Err(error),
            }
        }
        let mut store = lock(&self.home);
        if store.free.len() <= kept {
            return Ok(None);
        }
        let home = self.home.clone();
        Ok(store.free.pop().map(|address| Block { address, home }))
    }
}

impl Block {
    /// What is in it, of `len` bytes.
    pub(crate) fn segment(&self, len: usize) -> IoSegment {
        IoSegment::new(self.address, len.min(BLOCK_BYTES) as u64)
    }

    /// Its bytes; no GPU is copying to or from it.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        let start = self.address as usize as *mut u8;
        // SAFETY: a block of this length, initialised, which belongs to this value alone.
        unsafe { std::slice::from_raw_parts_mut(start, BLOCK_BYTES) }
    }

    fn list(&mut self) -> &mut [Tile] {
        let start = (self.address as usize + BLOCK_BYTES) as *mut Tile;
        // SAFETY: behind the block is room for so many, initialised and aligned to a page's part; it belongs to this value.
        unsafe { std::slice::from_raw_parts_mut(start, LIST_BYTES / size_of::<Tile>()) }
    }

    /// Starts a copy between this block and ranges of a GPU's memory; `None`: the GPU has enough to do.
    ///
    /// # Safety
    /// Nothing else touches the block and, if `out` is not set, the ranges, and the ranges stay allocated until the flight has
    /// ended.
    pub(crate) unsafe fn copy(
        &mut self,
        lane: &mut LaneGpu,
        device: &'static Device,
        ranges: &[IoSegment],
        out: bool,
        multiprocessors: u32,
    ) -> Result<Option<Flight>, GpuError> {
        let bytes: usize = ranges.iter().map(IoSegment::len).sum();
        if bytes > BLOCK_BYTES {
            return Err(GpuError(format!("{bytes} bytes at once")));
        }
        let by_engine = ranges.len() <= ENGINE_RANGES && bytes as u64 >= ENGINE_BYTES;
        let mut large: SmallVec<[(u64, u64, u64); ENGINE_RANGES]> = SmallVec::new();
        let nothing = Tile { to: 0, from: 0, len: 0, reserved: 0 };
        let mut tiles = Tiles { address: 0, count: 0, first: nothing };
        let (mut at, mut count) = (self.address, 0);
        let list = self.list();
        for range in ranges {
            let (to, from) = if out { (at, range.addr()) } else { (range.addr(), at) };
            let len = range.len() as u64;
            at += len;
            if by_engine {
                large.push((to, from, len));
                continue;
            }
            cut(to, from, len, TILE, |tile| {
                if let Some(place) = list.get_mut(count) {
                    *place = tile;
                }
                count += 1;
            });
        }
        if count > list.len() {
            return Err(GpuError(format!("{count} ranges at once")));
        }
        if count > 0 {
            tiles = Tiles {
                address: list.as_ptr() as usize as u64,
                count: count as u32,
                first: list[0],
            };
        }
        let bulk = bytes > SMALL_BYTES;
        let launch = Launch { device, tiles, large: &large, blocks: multiprocessors, bulk };
        // SAFETY: the caller's promise; the list belongs to the block.
        unsafe { lane.launch(&launch) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        lock(&self.home).free.push(self.address);
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Block({:#x})", self.address)
    }
}
