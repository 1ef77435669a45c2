//! Lists of ranges in the memory of a GPU, where its kernel reads them.

use std::ffi::c_void;
use std::sync::PoisonError;

use super::super::GpuError;
use super::device::{Device, SET_UP_PATIENCE};

/// One range of a copy; the kernel's `Tile`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) len: u32,
    pub(crate) reserved: u32,
}

/// A list that the kernel can read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiles {
    pub(crate) address: u64,
    pub(crate) count: u32,
    /// What the kernel is given besides, for a list of one.
    pub(crate) first: Tile,
}

/// Tables take powers of two of these bytes.
const SMALLEST: usize = 1 << 10;
/// The driver is asked for so much at a time.
const SLAB: usize = 4 << 20;
const CLASSES: usize = 32;

/// Memory for tables. It is used again, and never given back: `cuMemFree` would stop the whole GPU until all that runs
/// there has ended, the model included. There is as much of it as there ever were tables at a time.
#[derive(Debug, Default)]
pub(super) struct Arena {
    free: [Vec<u64>; CLASSES],
    slab: Option<(u64, usize)>,
}

fn class_of(bytes: usize) -> usize {
    bytes.max(SMALLEST).next_power_of_two().trailing_zeros() as usize
}

impl Arena {
    /// The thread has entered the device.
    fn take(&mut self, device: &Device, bytes: usize) -> Result<u64, GpuError> {
        let class = class_of(bytes);
        let Some(free) = self.free.get_mut(class) else {
            return Err(GpuError(format!("a table of {bytes} bytes is longer than any")));
        };
        if let Some(address) = free.pop() {
            return Ok(address);
        }
        let len = 1usize << class;
        if len >= SLAB {
            return allocate(device, len);
        }
        if let Some((address, left)) = &mut self.slab
            && *left >= len
        {
            let taken = *address;
            (*address, *left) = (*address + len as u64, *left - len);
            return Ok(taken);
        }
        let slab = allocate(device, SLAB)?;
        // What was left of the one before is below a table of this length: smaller ones find it.
        if let Some((mut address, mut left)) = self.slab.take() {
            while left >= SMALLEST {
                let class = left.ilog2() as usize;
                self.free[class].push(address);
                (address, left) = (address + (1 << class), left - (1 << class));
            }
        }
        self.slab = Some((slab + len as u64, SLAB - len));
        Ok(slab)
    }
}

fn allocate(device: &Device, bytes: usize) -> Result<u64, GpuError> {
    let mut address = 0;
    // SAFETY: room for one address.
    let status = unsafe { (device.api.memory_alloc)(&raw mut address, bytes) };
    device.check("cuMemAlloc of a block table", status)?;
    Ok(address)
}

/// A list in the memory of a GPU. To be dropped when no kernel reads it any more.
#[derive(Debug)]
pub(crate) struct Table {
    device: &'static Device,
    address: u64,
    bytes: usize,
    count: u32,
    first: Tile,
}

impl Table {
    /// Copies the list to the device and waits for that: some 10 us. One of a single range takes nothing of the device.
    pub(crate) fn new(device: &'static Device, tiles: Vec<Tile>) -> Result<Self, GpuError> {
        let count = u32::try_from(tiles.len())
            .map_err(|_| GpuError(format!("a table of {} ranges", tiles.len())))?;
        let nothing = Tile { to: 0, from: 0, len: 0, reserved: 0 };
        let first = tiles.first().copied().unwrap_or(nothing);
        if count <= 1 {
            // The kernel is given it with its arguments.
            return Ok(Self { device, address: 0, bytes: 0, count, first });
        }
        let bytes = size_of_val(tiles.as_slice());
        let address = {
            let _entered = device.enter()?;
            device.arena.lock().unwrap_or_else(PoisonError::into_inner).take(device, bytes)?
        };
        let table = Self { device, address, bytes, count, first };
        let from = tiles.as_ptr().cast::<c_void>() as usize as u64;
        let uploaded = device.set_up(SET_UP_PATIENCE, |stream| {
            // SAFETY: the table has room for it. `set_up` waits until it is there; where it gives that up, both stay.
            let status = unsafe { (device.api.copy_async)(address, from, bytes, stream) };
            device.check("cuMemcpyAsync of a block table", status)
        });
        match uploaded {
            Ok(()) => Ok(table),
            Err(error) => {
                if device.is_stuck() {
                    std::mem::forget((table, tiles));
                }
                Err(error)
            }
        }
    }

    pub(crate) fn device(&self) -> &'static Device {
        self.device
    }

    pub(crate) fn tiles(&self) -> Tiles {
        Tiles { address: self.address, count: self.count, first: self.first }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let mut arena = self.device.arena.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(free) = arena.free.get_mut(class_of(self.bytes)) {
            free.push(self.address);
        }
    }
}
