//! Registered memory of an engine, at addresses of its own, and who may touch it.

use std::collections::BTreeMap;

use corelane::sim::RegionHandle;
use corelane::{Access, RegionDescriptor};

/// Bytes of a cell: what one transfer uses of a region.
pub(crate) const CELL: usize = 6 << 10;
/// Cells of a region.
pub(crate) const CELLS: usize = 8;

/// What a cell is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Free,
    /// Its own engine's transfer reads it (WRITE), or the peer's does (READ).
    Source {
        transfer: usize,
        own: bool,
    },
    /// Its own engine's transfer fills it (READ), or the peer's does (WRITE).
    Target {
        transfer: usize,
        own: bool,
    },
    /// Not used again before its region is gone: late frames of a failed WRITE may land in it, but not of one that
    /// was cancelled (`quiet`).
    Spoilt {
        transfer: usize,
        quiet: bool,
    },
}

#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) base: u64,
    pub(crate) serial: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) cells: Vec<Role>,
    pub(crate) access: Access,
    pub(crate) handle: RegionHandle,
    pub(crate) descriptor: RegionDescriptor,
    /// Deregistration has begun.
    pub(crate) closing: Option<std::time::Duration>,
    pub(crate) mapped: bool,
}

/// The memory of one process.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// By address: those that are registered, or about to leave.
    pub(crate) regions: BTreeMap<u64, Region>,
    free: Vec<u64>,
    next: u64,
}

/// A cell of one registration: another one at the same address is not meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CellRef {
    pub(crate) base: u64,
    pub(crate) serial: u64,
    pub(crate) index: usize,
}

impl Space {
    /// An address range for a region: one that was used before, if there is any.
    pub(crate) fn reserve(&mut self) -> u64 {
        self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next << 20
        })
    }

    pub(crate) fn give_back(&mut self, base: u64) {
        self.regions.remove(&base);
        self.free.push(base);
    }

    /// The region around an address, the offset in it.
    pub(crate) fn find(&self, addr: u64, len: usize) -> Option<(u64, usize)> {
        let (base, region) = self.regions.range(..=addr).next_back()?;
        let offset = (addr - base) as usize;
        (offset + len <= region.bytes.len()).then_some((*base, offset))
    }

    fn region_mut(&mut self, cell: CellRef) -> Option<&mut Region> {
        self.regions.get_mut(&cell.base).filter(|region| region.serial == cell.serial)
    }

    pub(crate) fn cell_mut(&mut self, cell: CellRef) -> Option<&mut Role> {
        self.region_mut(cell).map(|region| &mut region.cells[cell.index])
    }

    pub(crate) fn bytes(&self, cell: CellRef, len: usize) -> Option<&[u8]> {
        let region = self.regions.get(&cell.base).filter(|region| region.serial == cell.serial)?;
        region.bytes.get(cell.index * CELL..cell.index * CELL + len)
    }

    pub(crate) fn fill(&mut self, cell: CellRef, len: usize, byte: impl Fn(usize) -> u8) {
        if let Some(region) = self.region_mut(cell) {
            for (offset, place) in region.bytes[cell.index * CELL..][..len].iter_mut().enumerate() {
                *place = byte(offset);
            }
        }
    }

    /// Free cells of regions that are open for it.
    pub(crate) fn free_cells(&self, needs: Access) -> Vec<CellRef> {
        let open = self.regions.values().filter(|region| {
            region.closing.is_none() && region.mapped && region.access.allows(needs)
        });
        open.flat_map(|region| {
            let free = region.cells.iter().enumerate().filter(|(_, role)| **role == Role::Free);
            let (base, serial) = (region.base, region.serial);
            free.map(move |(index, _)| CellRef { base, serial, index })
        })
        .collect()
    }
}
