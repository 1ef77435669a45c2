//! Whose memory an address is, and pinned memory.

use std::ffi::{c_int, c_void};
#[cfg(feature = "rdma")]
use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;

use super::super::GpuError;
use super::api::{self, Api, IpcHandle, SUCCESS};
use super::device::Device;
use crate::error::{Error, Result};
use crate::sys;
use crate::wire::{Access, DeviceMemory};

const ATTRIBUTE_CONTEXT: c_int = 1;
const ATTRIBUTE_TYPE: c_int = 2;
const ATTRIBUTE_DEVICE_POINTER: c_int = 3;
const ATTRIBUTE_BUFFER_ID: c_int = 7;
const ATTRIBUTE_MANAGED: c_int = 8;
const ATTRIBUTE_ORDINAL: c_int = 9;
const ATTRIBUTE_LEGACY_IPC: c_int = 10;
const TYPE_HOST: u32 = 1;
const TYPE_DEVICE: u32 = 2;

const HOST_PORTABLE_MAPPED: u32 = 1 | 2;

/// Allocations of a region whose identity is remembered; a region of more is watched at as many places.
const WATCHED: usize = 64;

/// An attribute of an address; `None`: the driver does not know the address.
fn attribute<T: Default>(api: &Api, which: c_int, address: u64) -> Option<T> {
    let mut value = T::default();
    // SAFETY: room for the value; the driver looks the address up and touches nothing there.
    let status = unsafe { (api.pointer_attribute)((&raw mut value).cast(), which, address) };
    (status == SUCCESS).then_some(value)
}

/// The number of the GPU whose memory this is, and no host memory at the same time. Where no driver was loaded: one look.
pub(crate) fn is_device_memory(address: u64) -> Option<u32> {
    let api = api::loaded_before()?;
    let is_device = attribute::<u32>(api, ATTRIBUTE_TYPE, address)? == TYPE_DEVICE
        && attribute::<u32>(api, ATTRIBUTE_MANAGED, address).unwrap_or(0) & 1 == 0;
    is_device
        .then(|| attribute::<c_int>(api, ATTRIBUTE_ORDINAL, address))?
        .map(c_int::cast_unsigned)
}

/// As [`is_device_memory`], for a range: by both its ends.
pub(crate) fn holds_device_memory(base: u64, len: u64) -> Option<u32> {
    is_device_memory(base).or_else(|| is_device_memory(base + len.max(1) - 1))
}

/// The first of these ranges of host memory that a GPU cannot address by the host's addresses. Of others both ends are pinned, by
/// the application, and the GPU has them where the host has them: it has not where they are write-combined, or were pinned later
/// on a machine whose GPUs have other addresses for such memory.
///
/// # Errors
/// The driver's.
pub(crate) fn first_unpinned(
    device: &Device,
    ranges: impl Iterator<Item = (u64, u64)>,
) -> std::result::Result<Option<u64>, GpuError> {
    let api = device.api;
    // What a GPU's address for memory is, the driver only says within the GPU's context.
    let _entered = device.enter()?;
    let id = |address| attribute::<u64>(api, ATTRIBUTE_BUFFER_ID, address);
    let is_host = |address| attribute::<u32>(api, ATTRIBUTE_TYPE, address) == Some(TYPE_HOST);
    let is_pinned = |base: u64, len: u64| {
        let last = base + len.max(1) - 1;
        // Of one allocation: what is between two pinned ones may not be.
        is_host(base)
            && is_host(last)
            && id(base).is_some_and(|first| id(last) == Some(first))
            && attribute::<u64>(api, ATTRIBUTE_DEVICE_POINTER, base) == Some(base)
    };
    let mut ranges = ranges;
    Ok(ranges.find(|&(base, len)| !is_pinned(base, len)).map(|(base, _)| base))
}

/// Whether a range of a GPU's memory is of the kind that other GPUs reach once their contexts may: access to virtual memory and to
/// that of pools is given GPU by GPU, by whoever made it.
///
/// # Errors
/// The driver's.
pub(crate) fn is_open_to_peers(
    owner: &Device,
    start: u64,
    end: u64,
) -> std::result::Result<bool, GpuError> {
    let _entered = owner.enter()?;
    let mut at = start;
    while at < end {
        // That of others is of no context.
        let is_of_context =
            attribute::<usize>(owner.api, ATTRIBUTE_CONTEXT, at) == Some(owner.context_address());
        // A driver that does not know of this has no others.
        let is_legacy =
            attribute::<u32>(owner.api, ATTRIBUTE_LEGACY_IPC, at).is_none_or(|is| is & 1 != 0);
        let next = allocation_end(owner, at);
        if !is_of_context || !is_legacy || next <= at {
            return Ok(false);
        }
        at = next;
    }
    Ok(true)
}

/// Where the allocation at an address ends; 0: there is none. The thread has entered a context.
fn allocation_end(device: &Device, at: u64) -> u64 {
    let (mut base, mut bytes) = (0, 0);
    // SAFETY: room for two numbers; the driver looks the address up.
    let status = unsafe { (device.api.memory_range)(&raw mut base, &raw mut bytes, at) };
    if status == SUCCESS { base.saturating_add(bytes as u64) } else { 0 }
}

/// Places in memory that the driver knows, and what lies there: a number that is never given to another allocation.
#[derive(Debug, Default)]
pub(crate) struct Watched(SmallVec<[(u64, u64); 1]>);

impl Watched {
    /// Adds a place, if no allocation is there that is watched already; false: there is none at all.
    pub(crate) fn add(&mut self, address: u64) -> bool {
        let id = api::loaded_before()
            .and_then(|api| attribute::<u64>(api, ATTRIBUTE_BUFFER_ID, address));
        let Some(id) = id else { return false };
        if self.0.len() < WATCHED && !self.0.iter().any(|&(_, known)| known == id) {
            self.0.push((address, id));
        }
        true
    }

    /// Adds all that is in a range of GPU memory; false: not all of it is any.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn add_range(
        &mut self,
        device: &Device,
        start: u64,
        end: u64,
    ) -> std::result::Result<bool, GpuError> {
        let _entered = device.enter()?;
        let mut at = start;
        while at < end {
            let next = allocation_end(device, at);
            if next <= at || !self.add(at) {
                return Ok(false);
            }
            at = next;
        }
        Ok(true)
    }

    /// Whether all that was there still is. Some hundred nanoseconds: a kernel that touches memory which was freed takes the
    /// context of the whole process down.
    pub(crate) fn are_live(&self) -> bool {
        self.0.is_empty()
            || api::loaded_before().is_some_and(|api| {
                self.0.iter().all(|&(address, id)| {
                    attribute::<u64>(api, ATTRIBUTE_BUFFER_ID, address) == Some(id)
                })
            })
    }
}

/// A moment in which memory is looked at: what was found alive in it needs no second look.
#[cfg(feature = "rdma")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look(u64);

#[cfg(feature = "rdma")]
impl Look {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The last look in which something was alive.
#[cfg(feature = "rdma")]
#[derive(Debug, Default)]
struct Seen(AtomicU64);

#[cfg(feature = "rdma")]
impl Seen {
    fn alive_in(&self, Look(look): Look, ask: impl FnOnce() -> bool) -> bool {
        if self.0.load(Ordering::Relaxed) == look {
            return true;
        }
        let alive = ask();
        if alive {
            self.0.store(look, Ordering::Relaxed);
        }
        alive
    }
}

/// Memory of a GPU that is registered.
#[derive(Debug)]
pub(crate) struct Allocation {
    device: &'static Device,
    /// Of the allocation that holds the region: what an IPC handle names.
    base: u64,
    len: u64,
    handle: Option<[u8; 64]>,
    watched: Watched,
    #[cfg(feature = "rdma")]
    seen: Seen,
}

impl Allocation {
    pub(crate) fn device(&self) -> &'static Device {
        self.device
    }

    /// What peers are told of it; what opens it, only those that may access it.
    pub(crate) fn describe(&self, access: Access) -> DeviceMemory {
        DeviceMemory {
            uuid: self.device.uuid(),
            host: sys::host_id(),
            base: self.base,
            len: self.len,
            handle: self.handle.filter(|_| access != Access::LOCAL),
        }
    }

    /// Whether the memory still is what was registered.
    pub(crate) fn is_live(&self) -> bool {
        self.watched.are_live()
    }

    /// The same, asked once in a look.
    #[cfg(feature = "rdma")]
    pub(crate) fn is_live_in(&self, look: Look) -> bool {
        self.seen.alive_in(look, || self.is_live())
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(GpuError) -> Error {
    let what = what.into();
    move |error| Error::Gpu { what, reason: error.0 }
}

/// Looks memory up that is to be registered as that of GPU `ordinal`.
///
/// # Errors
/// [`Error::Gpu`] where there is no driver or no such GPU; [`Error::InvalidArgument`] for other memory.
pub(crate) fn allocation_of(base: u64, len: u64, ordinal: u32) -> Result<Allocation> {
    let device = Device::get(ordinal).map_err(failed(format!("GPU {ordinal}")))?;
    device.check_alive().map_err(failed(format!("GPU {ordinal}")))?;
    let api = device.api;
    let refuse = |why: String| {
        Err(Error::InvalidArgument(format!(
            "{len} bytes at {base:#x} as memory of GPU {ordinal}: {why}"
        )))
    };
    let Some(kind) = attribute::<u32>(api, ATTRIBUTE_TYPE, base) else {
        return refuse("this is host memory, or no memory at all: register it as DRAM".into());
    };
    if kind != TYPE_DEVICE {
        return refuse("this is pinned host memory: register it as DRAM".into());
    }
    if attribute::<u32>(api, ATTRIBUTE_MANAGED, base).unwrap_or(0) & 1 != 0 {
        return refuse("this is managed memory, which moves: register it as DRAM".into());
    }
    let _entered = device.enter().map_err(failed("entering the context"))?;
    let end = base + len;
    let (mut at, mut first) = (base, None);
    let mut ids: Vec<(u64, u64)> = Vec::new();
    // One allocation, mostly; memory that grows (PyTorch's expandable segments) is several in a row.
    while at < end {
        let ordinal_there = attribute::<c_int>(api, ATTRIBUTE_ORDINAL, at);
        if ordinal_there != Some(ordinal.cast_signed()) {
            return refuse(match ordinal_there {
                Some(other) => format!("it is memory of GPU {other}"),
                None => format!("the allocation ends at {at:#x}"),
            });
        }
        let (mut start, mut bytes) = (0, 0);
        // SAFETY: room for two numbers; the driver looks the address up.
        let status = unsafe { (api.memory_range)(&raw mut start, &raw mut bytes, at) };
        device.check("cuMemGetAddressRange", status).map_err(failed("the allocation"))?;
        let Some(id) = attribute::<u64>(api, ATTRIBUTE_BUFFER_ID, at) else {
            return refuse("the driver does not name the allocation".into());
        };
        first.get_or_insert((start, bytes as u64));
        ids.push((at, id));
        let next = start.saturating_add(bytes as u64);
        if next <= at {
            return refuse(format!("the allocation ends at {at:#x}"));
        }
        at = next;
    }
    // Null for memory that belongs to no context (the driver's virtual memory API, pools): what other GPUs may use of it is asked
    // when they are to.
    let context = attribute::<usize>(api, ATTRIBUTE_CONTEXT, base).unwrap_or(0);
    if context != 0 && context != device.context_address() {
        return refuse(
            "it belongs to a context of its own, and only the device's primary one is supported"
                .into(),
        );
    }
    let (whole, whole_len) = first.unwrap_or((base, len));
    let mut handle = IpcHandle([0; 64]);
    // SAFETY: room for one handle. Memory that has none (virtual memory, no IPC on this system) is an error, and is
    // reached in this process only.
    let exported = unsafe { (api.ipc_export)(&raw mut handle, base) } == SUCCESS;
    let handle = (exported && ids.len() == 1).then_some(handle.0);
    if ids.len() > WATCHED {
        let step = ids.len().div_ceil(WATCHED);
        let last = ids.len() - 1;
        ids = ids
            .into_iter()
            .enumerate()
            .filter(|(at, _)| at % step == 0 || *at == last)
            .map(|(_, id)| id)
            .collect();
    }
    Ok(Allocation {
        device,
        base: whole,
        len: whole_len,
        handle,
        watched: Watched(ids.into()),
        #[cfg(feature = "rdma")]
        seen: Seen::default(),
    })
}

/// Pinned host memory that every GPU can address, zeroed.
pub(crate) struct HostMemory {
    device: &'static Device,
    start: *mut c_void,
}

// SAFETY: it is memory; who touches what is up to its users.
unsafe impl Send for HostMemory {}

impl HostMemory {
    /// As `new`, for any thread.
    pub(crate) fn pinned(
        device: &'static Device,
        len: usize,
    ) -> std::result::Result<Self, GpuError> {
        let _entered = device.enter()?;
        Self::new(device, len)
    }

    /// The thread has entered `device`.
    pub(super) fn new(device: &'static Device, len: usize) -> std::result::Result<Self, GpuError> {
        let mut start = std::ptr::null_mut();
        // SAFETY: room for one address.
        let status = unsafe { (device.api.host_alloc)(&raw mut start, len, HOST_PORTABLE_MAPPED) };
        device.check("cuMemHostAlloc", status)?;
        // SAFETY: so many bytes have just been allocated.
        unsafe { std::ptr::write_bytes(start.cast::<u8>(), 0, len) };
        Ok(Self { device, start })
    }

    pub(crate) fn address(&self) -> u64 {
        self.start as usize as u64
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // The driver waits for the GPU, before it takes memory back.
        if !self.device.is_stuck()
            && let Ok(_entered) = self.device.enter()
        {
            // SAFETY: nothing uses it any more. An error leaves nothing to be done.
            unsafe { (self.device.api.host_free)(self.start) };
        }
    }
}

#[cfg(all(test, feature = "rdma"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_alive_is_asked_for_once_in_a_look_and_what_is_not_every_time() {
        let seen = Seen::default();
        let (first, second) = (Look::new(), Look::new());
        let ask = |look, alive: bool| {
            let mut asked = false;
            let answer = seen.alive_in(look, || {
                asked = true;
                alive
            });
            (answer, asked)
        };
        assert_eq!(ask(first, false), (false, true));
        assert_eq!(ask(first, true), (true, true), "an answer that was no is not kept");
        assert_eq!(ask(first, false), (true, false));
        assert_eq!(ask(second, false), (false, true), "it was freed between two looks");
    }
}
