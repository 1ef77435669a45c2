//! Plans that touch GPU memory: two lists of ranges become one list that a kernel copies.

use std::sync::Arc;

use smallvec::SmallVec;

use super::cuda::{
    Device, Mapping, Table, Tile, Watched, first_unpinned, is_device_memory, is_open_to_peers,
    open_mapping,
};
use super::{GpuError, Launch};
use crate::error::{Error, Result};
use crate::memory::{RegionInner, RemoteSegment};
use crate::peer::PeerShared;
use crate::plan::Operation;
use crate::transport::local::RemoteRange;
use crate::wire::{DeviceMemory, MemoryKind, RegionDescriptor};

/// How an engine copies GPU memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settings {
    /// At most so many multiprocessors of a GPU are used by a copy.
    pub(crate) multiprocessors: u32,
    /// Contiguous ranges from this length on go by the GPU's copy engine.
    pub(crate) copy_engine_bytes: u64,
}

/// The kernel copies ranges in tiles, a warp each: all of a plan's in some thousand, none shorter than this.
const SMALLEST_TILE: u64 = 4 << 10;
const LARGEST_TILE: u64 = 64 << 10;
const TILES: u64 = 8192;

/// One pair of contiguous ranges.
#[derive(Debug, Clone, Copy)]
struct Pair {
    local: u64,
    remote: u64,
    len: u64,
    own: u32,
    theirs: u32,
}

/// A region of the peer that a plan touches.
#[derive(Debug)]
struct Theirs {
    key: u128,
    memory: Option<Box<DeviceMemory>>,
    start: u64,
    end: u64,
}

/// Collects the pairs of a plan; `finish` makes it ready to be posted.
#[derive(Debug)]
pub(crate) struct DeviceBuilder {
    operation: Operation,
    peer: Arc<str>,
    owner: u128,
    local_kind: MemoryKind,
    remote_on_gpu: bool,
    pairs: Vec<Pair>,
    theirs: Vec<Theirs>,
    bytes: u64,
}

/// What a lane needs to post such a plan.
#[derive(Debug)]
pub(crate) struct DevicePlan {
    /// The peer's memory is addressed directly: it is of this process.
    pub(crate) same_process: bool,
    /// The keys that are checked are those of GPU memory.
    pub(crate) remote_on_gpu: bool,
    table: Table,
    /// Ranges for the copy engine: to, from, length.
    large: Box<[(u64, u64, u64)]>,
    blocks: u32,
    /// Memory besides that of our own regions of a GPU: pinned, and the peer's in this process.
    watched: Watched,
    /// Memory of the peer's process, mapped here.
    _mappings: SmallVec<[Arc<Mapping>; 2]>,
}

impl DeviceBuilder {
    pub(crate) fn new(
        operation: Operation,
        peer: &PeerShared,
        own: &RegionDescriptor,
        remote: &RegionDescriptor,
        descriptors: usize,
    ) -> Self {
        Self {
            operation,
            peer: peer.name.clone(),
            owner: peer.incarnation,
            local_kind: own.kind(),
            remote_on_gpu: remote.kind() != MemoryKind::Dram,
            pairs: Vec::with_capacity(descriptors),
            theirs: Vec::new(),
            bytes: 0,
        }
    }

    /// Adds a checked pair.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]: the plan is of several kinds of memory.
    pub(crate) fn add(
        &mut self,
        index: usize,
        local: u64,
        own_index: usize,
        own: &RegionInner,
        remote: &RemoteSegment<'_>,
    ) -> Result<()> {
        if own.descriptor.kind() != self.local_kind
            || (remote.region.kind() != MemoryKind::Dram) != self.remote_on_gpu
        {
            return Err(Error::InvalidArgument(format!(
                "descriptor {index} is another kind of memory, or of another GPU, than those before: a plan \
                 with GPU memory is of one kind on each side"
            )));
        }
        if remote.len == 0 {
            return Ok(());
        }
        let key = remote.region.key.0;
        // Lists go through the regions one after the other, mostly.
        let known = self.theirs.iter().rposition(|known| known.key == key);
        let theirs = known.unwrap_or_else(|| {
            let memory = remote.region.device.clone();
            self.theirs.push(Theirs { key, memory, start: u64::MAX, end: 0 });
            self.theirs.len() - 1
        });
        let range = &mut self.theirs[theirs];
        range.start = range.start.min(remote.addr);
        range.end = range.end.max(remote.addr + remote.len);
        self.bytes += remote.len;
        let (own, theirs) = (own_index as u32, theirs as u32);
        if let Some(last) = self.pairs.last_mut()
            && (last.own, last.theirs) == (own, theirs)
            && last.local + last.len == local
            && last.remote + last.len == remote.addr
        {
            last.len += remote.len;
            return Ok(());
        }
        self.pairs.push(Pair { local, remote: remote.addr, len: remote.len, own, theirs });
        Ok(())
    }

    /// What is touched of the peer's memory, by key.
    pub(crate) fn ranges(&self) -> Vec<RemoteRange> {
        let range = |theirs: &Theirs| {
            let key = crate::wire::RegionKey(theirs.key);
            RemoteRange { key, digest: key.digest(), start: theirs.start, end: theirs.end }
        };
        self.theirs.iter().map(range).collect()
    }

    /// Maps the peer's memory and gives the GPU its list. `same_process`: the peer's addresses are good here.
    ///
    /// # Errors
    /// [`Error::NoTransport`]: no GPU of this process addresses both sides. [`Error::Gpu`]: the driver's.
    pub(crate) fn finish(self, same_process: bool, settings: Settings) -> Result<DevicePlan> {
        self.direct(same_process, settings).map_err(|unfit| match unfit {
            Unfit::Never(reason) => Error::NoTransport { peer: self.peer.clone(), reason },
            Unfit::Failed(error) => {
                let what = format!("preparing a transfer with `{}`", self.peer);
                Error::Gpu { what, reason: error.0 }
            }
        })
    }

    /// The device whose kernel copies.
    fn device(&self, same_process: bool) -> std::result::Result<&'static Device, Unfit> {
        if let MemoryKind::Vram { device } = self.local_kind {
            return Ok(Device::get(device)?);
        }
        // Our side is host memory. In this process the peer's GPU, else the same one by its identity.
        let first = self.theirs.first();
        if same_process {
            let address = first.map_or(0, |theirs| theirs.start);
            let ordinal = is_device_memory(address).ok_or_else(|| {
                Unfit::Never("the peer's GPU memory is not there any more".into())
            })?;
            return Ok(Device::get(ordinal)?);
        }
        let memory = first.and_then(|theirs| theirs.memory.as_ref());
        if memory.is_some_and(|memory| !crate::sys::is_own_host(memory.host)) {
            // No driver is woken up for that.
            return Err(Unfit::Never("the peer is on another host".into()));
        }
        // Nor is one needed here: others carry the plan.
        let device = memory.map(|memory| Device::with_uuid(&memory.uuid)).transpose();
        match device.map(Option::flatten) {
            Ok(Some(device)) => Ok(device),
            Ok(None) => Err(Unfit::Never(
                "the peer's GPU is not visible in this process (CUDA_VISIBLE_DEVICES)".into(),
            )),
            Err(error) => {
                Err(Unfit::Never(format!("no GPU of this process addresses the peer's: {error}")))
            }
        }
    }

    fn direct(
        &self,
        same_process: bool,
        settings: Settings,
    ) -> std::result::Result<DevicePlan, Unfit> {
        let mut mappings = SmallVec::new();
        let mut watched = Watched::default();
        let device = self.device(same_process)?;
        if self.local_kind == MemoryKind::Dram {
            self.require_pinned(device, "this side's", &mut watched, |pair| pair.local)?;
        }
        if !self.remote_on_gpu {
            if !same_process {
                return Err(Unfit::Never(
                    "the peer's side is host memory of another process, which no GPU addresses: bring both sides \
                     into GPU memory, or let that process fetch"
                        .into(),
                ));
            }
            self.require_pinned(device, "the peer's", &mut watched, |pair| pair.remote)?;
        } else if same_process {
            self.watch_theirs(&mut watched)?;
        }
        let mut shifts = Vec::with_capacity(self.theirs.len());
        for theirs in &self.theirs {
            shifts.push(self.shift(device, theirs, same_process, &mut mappings)?);
        }
        let tile = (self.bytes / TILES).next_power_of_two().clamp(SMALLEST_TILE, LARGEST_TILE);
        let (mut tiles, mut large) = (Vec::with_capacity(self.pairs.len()), Vec::new());
        // One range alone goes by the copy engine however small: from another GPU a call of it ends 2 to 5 us sooner than a
        // kernel, on one GPU at the same time, and a model that has every multiprocessor is not waited for. A second range
        // would cost as much again, in the kernel nothing.
        let alone = self.pairs.len() == 1;
        for pair in &self.pairs {
            let remote = pair.remote.wrapping_add(shifts[pair.theirs as usize]);
            let (to, from) = match self.operation {
                Operation::Read => (pair.local, remote),
                Operation::Write => (remote, pair.local),
            };
            if alone || pair.len >= settings.copy_engine_bytes {
                large.push((to, from, pair.len));
            } else {
                cut(to, from, pair.len, tile, |tile| tiles.push(tile));
            }
        }
        let table = Table::new(device, tiles)?;
        Ok(DevicePlan {
            same_process,
            remote_on_gpu: self.remote_on_gpu,
            table,
            large: large.into(),
            blocks: settings.multiprocessors,
            watched,
            _mappings: mappings,
        })
    }

    /// Remembers what is there of the peer's GPU memory, which is addressed directly.
    fn watch_theirs(&self, watched: &mut Watched) -> std::result::Result<(), Unfit> {
        for theirs in &self.theirs {
            let is_there = match is_device_memory(theirs.start) {
                // Within the context of its own GPU: in another's the driver does not find it.
                Some(owner) => watched.add_range(Device::get(owner)?, theirs.start, theirs.end)?,
                None => false,
            };
            if !is_there {
                return Err(Unfit::Never("the peer's GPU memory is not there any more".into()));
            }
        }
        Ok(())
    }

    fn require_pinned(
        &self,
        device: &Device,
        whose: &str,
        watched: &mut Watched,
        address: impl Fn(&Pair) -> u64,
    ) -> std::result::Result<(), Unfit> {
        let ranges = self.pairs.iter().map(|pair| (address(pair), pair.len));
        match first_unpinned(device, ranges)? {
            None => {
                self.pairs.iter().for_each(|pair| {
                    watched.add(address(pair));
                });
                Ok(())
            }
            Some(unpinned) => Err(Unfit::Never(format!(
                "{whose} host memory at {unpinned:#x} is not pinned, so that no GPU addresses it, or not so that GPUs have it at \
                 the host's addresses: allocate it with cudaHostAlloc, not write-combined, or pin_memory=True"
            ))),
        }
    }

    /// What is added to the peer's addresses to reach them here.
    fn shift(
        &self,
        device: &'static Device,
        theirs: &Theirs,
        same_process: bool,
        mappings: &mut SmallVec<[Arc<Mapping>; 2]>,
    ) -> std::result::Result<u64, Unfit> {
        if !self.remote_on_gpu {
            return Ok(0);
        }
        if same_process {
            let ordinal = is_device_memory(theirs.start).ok_or_else(|| {
                Unfit::Never("the peer's GPU memory is not there any more".into())
            })?;
            let owner = Device::get(ordinal)?;
            device.reach(owner).map_err(|error| Unfit::Never(error.0))?;
            if ordinal != device.ordinal() && !is_open_to_peers(owner, theirs.start, theirs.end)? {
                return Err(Unfit::Never(format!(
                    "the peer's memory of GPU {ordinal} is virtual memory or of a pool (PyTorch's expandable_segments and \
                     cudaMallocAsync), which is open to other GPUs only where its owner has said so"
                )));
            }
            return Ok(0);
        }
        let memory = theirs.memory.as_ref();
        let Some((memory, handle)) = memory.and_then(|memory| Some((memory, memory.handle?)))
        else {
            return Err(Unfit::Never(
                "the peer's GPU memory cannot be exported by CUDA IPC: it is virtual memory (PyTorch's \
                 expandable_segments), or its system allows no IPC"
                    .into(),
            ));
        };
        if !crate::sys::is_own_host(memory.host) {
            return Err(Unfit::Never("the peer is on another host".into()));
        }
        let mapping = open_mapping(device, self.owner, &handle, (memory.base, memory.len)).map_err(|error| {
            Unfit::Never(format!(
                "its GPU memory cannot be mapped: {error}; both processes must share the IPC and PID namespaces"
            ))
        })?;
        // The region lies inside the allocation: the descriptor was checked for that.
        let shift = mapping.base().wrapping_sub(memory.base);
        mappings.push(mapping);
        Ok(shift)
    }
}

enum Unfit {
    /// There is no way for this plan.
    Never(String),
    Failed(GpuError),
}

impl From<GpuError> for Unfit {
    fn from(error: GpuError) -> Self {
        Self::Failed(error)
    }
}

/// Cuts a range into tiles. The first one ends where the rest is aligned.
pub(super) fn cut(to: u64, from: u64, len: u64, tile: u64, mut each: impl FnMut(Tile)) {
    let mut done = 0;
    while done < len {
        let border = tile - (to + done) % 16;
        let part = (len - done).min(border);
        each(Tile { to: to + done, from: from + done, len: part as u32, reserved: 0 });
        done += part;
    }
}

impl DevicePlan {
    /// Whether the memory that is no region of a GPU here is what it was when the plan was made: to be asked before each
    /// launch.
    pub(crate) fn is_live(&self) -> bool {
        self.watched.are_live()
    }

    pub(crate) fn device(&self) -> &'static Device {
        self.table.device()
    }

    /// The one range that it is, which the copy engine moves: to, from, length. `None`: it is something else.
    pub(crate) fn only_range(&self) -> Option<(u64, u64, u64)> {
        match *self.large {
            [range] if self.table.tiles().count == 0 => Some(range),
            _ => None,
        }
    }

    /// What is to be started for a posting.
    pub(crate) fn launch(&self, bulk: bool) -> Launch<'_> {
        Launch {
            device: self.table.device(),
            tiles: self.table.tiles(),
            large: &self.large,
            blocks: self.blocks,
            bulk,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tiles_cover_a_range_once_and_all_but_the_first_are_aligned(
            to in 0u64..1 << 40, from in 0u64..1 << 40, len in 1u64..1 << 20, shift in 12u32..17,
        ) {
            let tile = 1 << shift;
            let mut tiles = Vec::new();
            cut(to, from, len, tile, |tile| tiles.push(tile));
            let mut done = 0;
            for (at, one) in tiles.iter().enumerate() {
                prop_assert_eq!((one.to, one.from), (to + done, from + done));
                prop_assert!(one.len > 0 && u64::from(one.len) <= tile);
                prop_assert!(at == 0 || one.to % 16 == 0);
                done += u64::from(one.len);
            }
            prop_assert_eq!(done, len);
        }
    }
}
