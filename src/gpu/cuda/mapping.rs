//! Memory of other processes, mapped by CUDA IPC.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::super::GpuError;
use super::api::IpcHandle;
use super::device::Device;

const LAZY_PEER_ACCESS: u32 = 1;
/// Memory of other processes that is mapped at the same time, in this process.
const MAX_MAPPINGS: usize = 4096;
/// What was refused is not tried again for so long: a try takes milliseconds, and who prepares a plan would make one each time.
const TRY_AGAIN_AFTER: Duration = Duration::from_mins(1);
/// So many refusals are remembered, the latest.
const MAX_REFUSED: usize = 256;

/// Memory of another process that this one can address.
#[derive(Debug)]
pub(crate) struct Mapping {
    device: &'static Device,
    base: u64,
}

impl Mapping {
    /// Where the allocation begins here.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }
}

impl Drop for Mapping {
    /// Where this happens nobody knows: with the last plan on a caller's thread, or a lane's. Neither waits for the GPU.
    fn drop(&mut self) {
        let mut closing = CLOSING.lock().unwrap_or_else(PoisonError::into_inner);
        closing.mappings.push((self.device, self.base));
        if !closing.has_thread {
            let name = "corelane-unmap".to_owned();
            // Where no thread can be had, the next one that can closes this, too.
            closing.has_thread = std::thread::Builder::new().name(name).spawn(close_all).is_ok();
        }
    }
}

/// Mappings that nothing uses any more.
struct Closing {
    mappings: Vec<(&'static Device, u64)>,
    has_thread: bool,
}

static CLOSING: Mutex<Closing> = Mutex::new(Closing { mappings: Vec::new(), has_thread: false });

/// Closes mappings until there are none.
fn close_all() {
    loop {
        let (device, base) = {
            let mut closing = CLOSING.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(next) = closing.mappings.pop() else {
                closing.has_thread = false;
                return;
            };
            next
        };
        if !device.is_stuck()
            && let Ok(_entered) = device.enter()
        {
            // SAFETY: it was opened in this context, and nothing uses it any more. An error leaves nothing to be done.
            unsafe { (device.api.ipc_close)(base) };
        }
    }
}

struct Opened {
    owner: u128,
    handle: [u8; 64],
    /// Where the allocation is in its owner's process.
    theirs: std::ops::Range<u64>,
    device: u32,
    /// As the driver says, not as the peer did.
    bytes: u64,
    mapping: Arc<Mapping>,
}

/// An allocation of another process that could not be mapped.
struct Refused {
    owner: u128,
    handle: [u8; 64],
    device: u32,
    at: Instant,
    error: GpuError,
}

struct Mappings {
    opened: Vec<Opened>,
    refused: VecDeque<Refused>,
}

static MAPPINGS: Mutex<Mappings> =
    Mutex::new(Mappings { opened: Vec::new(), refused: VecDeque::new() });

fn mappings() -> std::sync::MutexGuard<'static, Mappings> {
    MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mappings {
    fn refusal(&mut self, owner: u128, handle: &[u8; 64], device: u32) -> Option<GpuError> {
        self.refused.retain(|known| known.at.elapsed() < TRY_AGAIN_AFTER);
        let is_this = |known: &&Refused| {
            (known.owner, known.device) == (owner, device) && known.handle == *handle
        };
        self.refused.iter().find(is_this).map(|known| known.error.clone())
    }

    fn refuse(&mut self, owner: u128, handle: &[u8; 64], device: u32, error: &GpuError) {
        if self.refused.len() >= MAX_REFUSED {
            self.refused.pop_front();
        }
        let (handle, at, error) = (*handle, Instant::now(), error.clone());
        self.refused.push_back(Refused { owner, handle, device, at, error });
    }
}

/// Maps an allocation of another process, so that `device` addresses it: 155 ms the first time.
///
/// # Errors
/// The driver's: the processes share no IPC namespace, the memory is gone, no peer access.
pub(crate) fn open_mapping(
    device: &'static Device,
    owner: u128,
    handle: &[u8; 64],
    (theirs, len): (u64, u64),
) -> Result<Arc<Mapping>, GpuError> {
    let theirs = theirs..theirs.saturating_add(len);
    // Closed when the list is not locked any more.
    let mut stale: Vec<Opened>;
    let mut mappings = mappings();
    let known = mappings.opened.iter().find(|known| {
        known.handle == *handle && known.owner == owner && known.device == device.ordinal()
    });
    if let Some(known) = known {
        check_length(known.bytes, len)?;
        return Ok(known.mapping.clone());
    }
    if let Some(error) = mappings.refusal(owner, handle, device.ordinal()) {
        return Err(device.lost().cloned().unwrap_or(error));
    }
    let all = &mut mappings.opened;
    // The driver never gives a handle twice. Where the owner has another one for these addresses, it has freed what was
    // there, and what is mapped here of it only takes the GPU's room; plans that still use it keep it.
    (stale, *all) = all.drain(..).partition(|known| {
        known.owner == owner
            && known.handle != *handle
            && known.theirs.start < theirs.end
            && theirs.start < known.theirs.end
    });
    if all.len() >= MAX_MAPPINGS {
        // Of those that no plan uses, the one that was opened first.
        let Some(unused) = all.iter().position(|known| Arc::strong_count(&known.mapping) == 1)
        else {
            return Err(GpuError(format!(
                "{MAX_MAPPINGS} allocations of other processes are mapped and in use"
            )));
        };
        stale.push(all.remove(unused));
    }
    match open(device, handle, len) {
        Ok((mapping, bytes)) => {
            let (mapping, device) = (Arc::new(mapping), device.ordinal());
            let (handle, known) = (*handle, mapping.clone());
            all.push(Opened { owner, handle, theirs, device, bytes, mapping: known });
            Ok(mapping)
        }
        Err(error) => {
            // The device is lost; or it is the other process's fault, mostly, and will not be another time.
            device.check_alive()?;
            mappings.refuse(owner, handle, device.ordinal(), &error);
            Err(error)
        }
    }
}

/// Maps it; with its length, as the driver says.
fn open(device: &'static Device, handle: &[u8; 64], len: u64) -> Result<(Mapping, u64), GpuError> {
    let _entered = device.enter()?;
    let mut base = 0;
    // SAFETY: room for one address. Whatever the bytes of the handle are, the driver checks them.
    let status =
        unsafe { (device.api.ipc_open)(&raw mut base, IpcHandle(*handle), LAZY_PEER_ACCESS) };
    device.api.check("cuIpcOpenMemHandle", status)?;
    let mapping = Mapping { device, base };
    let (mut start, mut bytes) = (0, 0);
    // SAFETY: room for two numbers.
    let status = unsafe { (device.api.memory_range)(&raw mut start, &raw mut bytes, base) };
    device.check("cuMemGetAddressRange", status)?;
    let bytes = if start == base { bytes as u64 } else { 0 };
    check_length(bytes, len)?;
    Ok((mapping, bytes))
}

/// A kernel that goes beyond what is mapped would end the work of the whole process on that GPU: each descriptor is held to
/// it, not only the first of an allocation.
fn check_length(mapped: u64, promised: u64) -> Result<(), GpuError> {
    if mapped < promised {
        return Err(GpuError(format!(
            "the handle opens {mapped} bytes where {promised} were promised"
        )));
    }
    Ok(())
}

/// Lets go of the memory of a peer that is gone, which is not freed before. What plans still use stays until they are
/// dropped. On a thread of its own, because who maps something holds the list for long.
pub(crate) fn forget_mappings(owner: u128) {
    // A lane must not wait for who maps something at this moment: that one is not this peer's, or is found the next time.
    let has_some = MAPPINGS.try_lock().map_or(true, |all| {
        all.opened.iter().any(|it| it.owner == owner)
            || all.refused.iter().any(|it| it.owner == owner)
    });
    if has_some {
        let name = "corelane-unmap".to_owned();
        // Where no thread can be had, they stay until others need their places.
        let _ = std::thread::Builder::new().name(name).spawn(move || drop_mappings(owner));
    }
}

fn drop_mappings(owner: u128) {
    let gone: Vec<Opened> = {
        let mut mappings = mappings();
        mappings.refused.retain(|known| known.owner != owner);
        let (gone, kept) = mappings.opened.drain(..).partition(|known| known.owner == owner);
        mappings.opened = kept;
        gone
    };
    drop(gone);
}
