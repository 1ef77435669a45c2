//! Registered memory and descriptors.

use std::ffi::c_void;

use corelane::{Access, Engine, Error, MemoryKind, RegionDescriptor};

use crate::allocation::Memory;
use crate::handles::{
    DESCRIPTORS, ENGINES, REGIONS, adopt, corelane_desc_t, corelane_engine_t, corelane_region_t,
    free,
};
use crate::raw;
use crate::status::{Failure, corelane_status, guard, remember, run};

/// Host memory.
pub const CORELANE_MEMORY_DRAM: u32 = 0;
/// GPU memory.
pub const CORELANE_MEMORY_VRAM: u32 = 1;

/// Only this engine's own transfers may use the memory.
pub const CORELANE_ACCESS_LOCAL: u32 = 0;
/// Peers may read.
pub const CORELANE_ACCESS_REMOTE_READ: u32 = 1;
/// Peers may write.
pub const CORELANE_ACCESS_REMOTE_WRITE: u32 = 2;

/// A registered region.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct corelane_region_info {
    /// Address of the first byte, in its owner's address space.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// `CORELANE_MEMORY_DRAM` or `CORELANE_MEMORY_VRAM`.
    pub kind: u32,
    /// CUDA ordinal of the GPU in its owner's process; 0 for host memory.
    pub device: u32,
    /// `CORELANE_ACCESS_...`, added up.
    pub access: u32,
    /// 0.
    pub reserved: u32,
}

fn info_of(descriptor: &RegionDescriptor) -> corelane_region_info {
    let (kind, device) = match descriptor.kind() {
        MemoryKind::Vram { device } => (CORELANE_MEMORY_VRAM, device),
        _ => (CORELANE_MEMORY_DRAM, 0),
    };
    let flag = |access, flag| if descriptor.access().allows(access) { flag } else { 0 };
    corelane_region_info {
        addr: descriptor.base(),
        len: descriptor.len(),
        kind,
        device,
        access: flag(Access::REMOTE_READ, CORELANE_ACCESS_REMOTE_READ)
            | flag(Access::REMOTE_WRITE, CORELANE_ACCESS_REMOTE_WRITE),
        reserved: 0,
    }
}

fn kind_of(kind: u32, device: u32) -> Result<MemoryKind, Failure> {
    match kind {
        CORELANE_MEMORY_DRAM => Ok(MemoryKind::Dram),
        CORELANE_MEMORY_VRAM => Ok(MemoryKind::Vram { device }),
        other => Err(Failure::argument(format!("{other} is no kind of memory"))),
    }
}

fn access_of(access: u32) -> Result<Access, Failure> {
    match access {
        0 => Ok(Access::LOCAL),
        1 => Ok(Access::REMOTE_READ),
        2 => Ok(Access::REMOTE_WRITE),
        3 => Ok(Access::READ_WRITE),
        other => Err(Failure::argument(format!("{other} is no sum of access flags"))),
    }
}

/// Whether memory of a kind (`CORELANE_MEMORY_...`) can be registered here: GPU memory where there is the CUDA driver and
/// a GPU that it lets this process use. Where the system has files of GPUs in /dev, the driver is not initialised for that.
///
/// Any thread. Errors: `CORELANE_ERR_NOT_SUPPORTED`, `CORELANE_ERR_INVALID_ARGUMENT` (no such kind).
#[unsafe(no_mangle)]
pub extern "C" fn corelane_memory_supported(kind: u32) -> corelane_status {
    guard("corelane_memory_supported", || match kind_of(kind, 0)? {
        MemoryKind::Dram => Ok(corelane_status::CORELANE_OK),
        _ if corelane::supports_gpu_memory() => Ok(corelane_status::CORELANE_OK),
        _ => {
            // An answer and no failure: on most hosts it is nothing to log.
            remember(
                "there is no CUDA driver (libcuda.so.1), or no GPU that it lets this process use",
            );
            Ok(corelane_status::CORELANE_ERR_NOT_SUPPORTED)
        }
    })
}

/// Registers `len` bytes at `addr`: makes them usable in transfers and, as far as `access`
/// (`CORELANE_ACCESS_...` added up) goes, by peers that get the descriptor. Nothing is pinned or
/// touched. Ranges may overlap and repeat.
///
/// The memory must stay mapped until `corelane_mr_destroy` or `corelane_engine_destroy` has returned
/// `CORELANE_OK`.
///
/// Any thread. Errors: `CORELANE_ERR_INVALID_ARGUMENT` (null, empty, wraps around),
/// `CORELANE_ERR_LIMIT`; of GPU memory also `CORELANE_ERR_INVALID_ARGUMENT` (host memory, memory of another GPU or context),
/// `CORELANE_ERR_IO` (the driver's words are in `corelane_last_error`).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_reg(
    engine: corelane_engine_t,
    addr: *mut c_void,
    len: usize,
    kind: u32,
    device: u32,
    access: u32,
    region: *mut corelane_region_t,
) -> corelane_status {
    run("corelane_reg", || {
        // SAFETY: the caller promises room for a handle.
        unsafe { raw::store(region, 0, "region")? };
        let (kind, access) = (kind_of(kind, device)?, access_of(access)?);
        let entry = ENGINES.get(engine)?;
        // SAFETY: the caller promises that the memory stays mapped while it is registered.
        let registered =
            unsafe { entry.engine.register_kind(addr as u64, len as u64, kind, access)? };
        let handle = adopt(&REGIONS, engine, Memory::registered(registered))?;
        // SAFETY: as above.
        unsafe { raw::store(region, handle, "region") }
    })
}

/// Takes a registration back and frees its handle. When it returns `CORELANE_OK`, nothing of this
/// engine or of a peer touches the memory any more, and descriptors of it are refused.
///
/// Waits for accesses in progress, at most `deregister_timeout_ms`. Any thread but a lane. Errors:
/// `CORELANE_ERR_BUSY` past that time: the region is kept, try again; `CORELANE_ERR_INVALID_ARGUMENT`
/// for memory of `corelane_alloc`, which `corelane_free` gives back.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_mr_destroy(region: corelane_region_t) -> corelane_status {
    run("corelane_mr_destroy", || {
        let entry = REGIONS.get(region)?;
        if entry.value.is_allocated() {
            return Err(Failure::argument(
                "the region is memory of corelane_alloc: corelane_free gives it back",
            ));
        }
        let (owner, registered) = (entry.owner, entry.value.region().clone());
        drop(entry);
        let engine = ENGINES.get(owner)?.engine.clone();
        engine.deregister(&registered)?;
        free(&REGIONS, region);
        Ok(())
    })
}

/// Allocates `len` zero bytes that peers on this host map: a peer that reads or writes them copies
/// plainly, without a system call. For transfers that this side begins, that holds where the peer's
/// memory is of its engine. Registers them as `corelane_reg` would, for `access`
/// (`CORELANE_ACCESS_...` added up). Over other transports they are memory like any other.
///
/// The address of the first byte, at the start of a page, is stored in `*addr` and the handle of the
/// region in `*region`; null and 0 when there is no memory. In huge pages where some are reserved,
/// and near the core of the first lane. All of it is taken at once, some 0.3 ms a MiB: for pools that
/// live long, not for each request.
///
/// To be given back by `corelane_free`. What was not goes with its engine: not to be touched after
/// `corelane_engine_destroy`. A forked child has none of it: at these addresses nothing is mapped
/// there, and touching it is a SIGSEGV.
///
/// Any thread. Errors: `CORELANE_ERR_INVALID_ARGUMENT` (no bytes), `CORELANE_ERR_IO` (there is not so
/// much memory), `CORELANE_ERR_LIMIT`, `CORELANE_ERR_SHUTDOWN`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_alloc(
    engine: corelane_engine_t,
    len: usize,
    access: u32,
    addr: *mut *mut c_void,
    region: *mut corelane_region_t,
) -> corelane_status {
    run("corelane_alloc", || {
        // SAFETY: the caller promises room for an address and a handle.
        unsafe {
            raw::store(addr, std::ptr::null_mut(), "addr")?;
            raw::store(region, 0, "region")?;
        }
        let access = access_of(access)?;
        // Not held while allocating: the engine may be destroyed meanwhile.
        let api = ENGINES.get(engine)?.engine.clone();
        let buffer = api.alloc(len, access)?;
        let start = buffer.as_mut_ptr();
        let handle = adopt(&REGIONS, engine, Memory::allocated(buffer))?;
        // SAFETY: as above.
        unsafe {
            raw::store(addr, start.cast(), "addr")?;
            raw::store(region, handle, "region")
        }
    })
}

/// Gives memory of `corelane_alloc` back, with its registration and its handle. When it returns
/// `CORELANE_OK`, nothing of this engine or of a peer touches it any more, descriptors of it are
/// refused, and it must not be touched. The pages go back to the system once no transfer that was
/// prepared with them is left either, and peers have let go of them.
///
/// Waits for accesses in progress, at most `deregister_timeout_ms`. Any thread but a lane. Errors:
/// `CORELANE_ERR_BUSY` past that time, or while another thread is freeing it: the memory is kept, try
/// again; `CORELANE_ERR_INVALID_HANDLE` when it was freed before, or its engine was destroyed;
/// `CORELANE_ERR_INVALID_ARGUMENT` for memory of `corelane_reg`; `CORELANE_ERR_SHUTDOWN` while its
/// engine is being destroyed (the memory goes with it), and in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_free(region: corelane_region_t) -> corelane_status {
    run("corelane_free", || {
        let entry = REGIONS.get(region)?;
        let memory = &entry.value;
        if !memory.is_allocated() {
            return Err(Failure::argument(
                "the region is memory of the application: corelane_mr_destroy takes it back",
            ));
        }
        let engine = ENGINES.get(entry.owner)?.engine.clone();
        ensure_ours(&engine)?;
        let buffer = memory.take_buffer().ok_or_else(|| {
            Failure::new(
                corelane_status::CORELANE_ERR_BUSY,
                "another thread is freeing this memory, or destroying its engine",
            )
        })?;
        if let Err((error, buffer)) = engine.free(buffer) {
            memory.put_back(buffer);
            return Err(error.into());
        }
        free(&REGIONS, region);
        Ok(())
    })
}

/// The engine is not about to be destroyed, and no parent's: there, a lock may be held for ever. One
/// whose lanes have failed gives memory back.
fn ensure_ours(engine: &Engine) -> Result<(), Failure> {
    match engine.check_usable() {
        Err(error @ Error::Shutdown) => Err(error.into()),
        _ => Ok(()),
    }
}

/// The bytes that a peer needs to access the region; the same on every call. Lengths as in
/// `corelane_get_metadata`. Who holds them can access the region: send them over a trusted channel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_get_descriptor(
    region: corelane_region_t,
    buffer: *mut c_void,
    capacity: usize,
    len: *mut usize,
) -> corelane_status {
    run("corelane_get_descriptor", || {
        let bytes = REGIONS.get(region)?.value.region().descriptor().to_bytes();
        // SAFETY: the caller promises a buffer of `capacity` bytes.
        unsafe { raw::fill(&bytes, buffer, capacity, len) }
    })
}

/// Describes a registered region of the engine that holds all of `len` bytes at `addr`.
///
/// Any thread. Errors: `CORELANE_ERR_NOT_FOUND` when there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_query_memory(
    engine: corelane_engine_t,
    addr: *const c_void,
    len: usize,
    info: *mut corelane_region_info,
) -> corelane_status {
    run("corelane_query_memory", || {
        let found = ENGINES.get(engine)?.engine.region_at(addr as u64, len as u64);
        let region = found.ok_or_else(|| {
            Failure::new(
                corelane_status::CORELANE_ERR_NOT_FOUND,
                format!("{len} bytes at {addr:p} are in no registered region"),
            )
        })?;
        // SAFETY: the caller promises room for the answer.
        unsafe { raw::store(info, info_of(region.descriptor()), "info") }
    })
}

/// Reads a descriptor that a peer's `corelane_get_descriptor` gave. The peer need not be known yet.
///
/// Any thread. Errors: `CORELANE_ERR_MALFORMED` for anything else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_import_descriptor(
    engine: corelane_engine_t,
    bytes: *const c_void,
    len: usize,
    desc: *mut corelane_desc_t,
) -> corelane_status {
    run("corelane_import_descriptor", || {
        // SAFETY: the caller promises `len` bytes and room for a handle.
        let bytes = unsafe {
            raw::store(desc, 0, "desc")?;
            raw::bytes(bytes, len, "the descriptor")?
        };
        let handle = adopt(&DESCRIPTORS, engine, RegionDescriptor::from_bytes(bytes)?)?;
        // SAFETY: as above.
        unsafe { raw::store(desc, handle, "desc") }
    })
}

/// Describes the region that a descriptor names.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_descriptor_info(
    desc: corelane_desc_t,
    info: *mut corelane_region_info,
) -> corelane_status {
    run("corelane_descriptor_info", || {
        let value = info_of(&DESCRIPTORS.get(desc)?.value);
        // SAFETY: the caller promises room for the answer.
        unsafe { raw::store(info, value, "info") }
    })
}

/// Frees a descriptor. Transfers prepared with it keep what they need.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_descriptor_destroy(desc: corelane_desc_t) -> corelane_status {
    run("corelane_descriptor_destroy", || {
        if free(&DESCRIPTORS, desc) { Ok(()) } else { Err(Failure::handle("descriptor", desc)) }
    })
}
