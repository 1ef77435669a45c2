//! Preparing transfers, and what they are prepared from.

use corelane::{
    DescriptorPair, Error, LocalBlocks, LocalSegment, Operation, Plan, RemoteBlocks, RemoteSegment,
};

use crate::allocation::Memory;
use crate::handles::{
    CONNS, DESCRIPTORS, ENGINES, InUse, Owned, REGIONS, Table, XFERS, adopt, corelane_conn_t,
    corelane_desc_t, corelane_region_t, corelane_xfer_t,
};
use crate::raw;
use crate::status::{Failure, corelane_status, run};
use crate::transfer::{Posting, post};

/// From the peer's memory into ours.
pub const CORELANE_READ: u32 = 0;
/// From our memory into the peer's.
pub const CORELANE_WRITE: u32 = 1;

/// A range of this engine's memory, inside one registered region.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct corelane_local_segment {
    /// First byte.
    pub addr: u64,
    /// Length in bytes; 0 moves nothing.
    pub len: u64,
    /// The registration that the transfer depends on; 0: any that holds the range. It matters where
    /// registrations overlap and one of them is taken back.
    pub region: corelane_region_t,
}

/// A range of a peer's memory.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct corelane_remote_segment {
    /// The region it lies in.
    pub desc: corelane_desc_t,
    /// First byte, in the peer's address space.
    pub addr: u64,
    /// Length in bytes; 0 moves nothing.
    pub len: u64,
}

/// Blocks of this engine's memory: block `i` is `block_bytes` bytes at `base + indices[i] * stride`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct corelane_local_blocks {
    /// Address of block 0.
    pub base: u64,
    /// Bytes from the start of a block to the start of the next.
    pub stride: u64,
    /// Length of a block in bytes.
    pub block_bytes: u64,
    /// Which blocks, in which order.
    pub indices: *const u32,
    /// How many.
    pub count: usize,
}

/// Blocks of a peer's memory: block `i` is `block_bytes` bytes at `base + indices[i] * stride`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct corelane_remote_blocks {
    /// The region that all blocks lie in.
    pub desc: corelane_desc_t,
    /// Address of block 0, in the peer's address space.
    pub base: u64,
    /// Bytes from the start of a block to the start of the next.
    pub stride: u64,
    /// Length of a block in bytes.
    pub block_bytes: u64,
    /// Which blocks, in which order.
    pub indices: *const u32,
    /// How many; the same as on the local side.
    pub count: usize,
}

fn operation_of(operation: u32) -> Result<Operation, Failure> {
    match operation {
        CORELANE_READ => Ok(Operation::Read),
        CORELANE_WRITE => Ok(Operation::Write),
        other => Err(Failure::argument(format!("{other} is neither read (0) nor write (1)"))),
    }
}

fn finish(owner: u64, plan: &Plan) -> Result<corelane_xfer_t, Failure> {
    adopt(&XFERS, owner, Posting::new(plan.transfer()))
}

/// The objects that a list names, each looked up once where neighbours share it.
struct Named<'a, T> {
    /// The first index that an object is for, and the object; `None`: for none.
    runs: Vec<(usize, Option<InUse<'a, Owned<T>>>)>,
}

impl<'a, T> Named<'a, T> {
    /// `zero`: whether the handle 0 stands for no object.
    fn find(
        table: &'a Table<Owned<T>>,
        handles: impl Iterator<Item = u64>,
        owner: u64,
        zero: bool,
    ) -> Result<Self, Failure> {
        let (mut runs, mut last) = (Vec::new(), None);
        for (index, handle) in handles.enumerate() {
            if last == Some(handle) {
                continue;
            }
            last = Some(handle);
            let object =
                if zero && handle == 0 { None } else { Some(find_of(table, handle, owner)?) };
            runs.push((index, object));
        }
        Ok(Self { runs })
    }

    /// Answers for indices that never fall: the run that the last one was in is where to look.
    fn cursor<'s>(&'s self) -> impl FnMut(usize) -> Option<&'s T> {
        let mut run = 0;
        move |index| {
            while self.runs.get(run + 1).is_some_and(|(first, _)| *first <= index) {
                run += 1;
            }
            self.runs.get(run).and_then(|(_, object)| object.as_ref()).map(|object| &object.value)
        }
    }
}

/// An object of this engine and of no other.
fn find_of<T>(
    table: &Table<Owned<T>>,
    handle: u64,
    owner: u64,
) -> Result<InUse<'_, Owned<T>>, Failure> {
    let object = table.get(handle)?;
    if object.owner == owner {
        Ok(object)
    } else {
        let message = format!("the {} belongs to another engine", table.what());
        Err(Failure::new(corelane_status::CORELANE_ERR_INVALID_HANDLE, message))
    }
}

unsafe fn prepare(
    conn: corelane_conn_t,
    operation: u32,
    local: *const corelane_local_segment,
    remote: *const corelane_remote_segment,
    count: usize,
) -> Result<corelane_xfer_t, Failure> {
    let operation = operation_of(operation)?;
    // SAFETY: the caller promises `count` segments in both lists.
    let (local, remote) = unsafe {
        (raw::slice(local, count, "the local list")?, raw::slice(remote, count, "the remote list")?)
    };
    let peer = CONNS.get(conn)?;
    let engine = ENGINES.get(peer.owner)?;
    let regions =
        Named::find(&REGIONS, local.iter().map(|segment| segment.region), peer.owner, true)?;
    let descriptors =
        Named::find(&DESCRIPTORS, remote.iter().map(|segment| segment.desc), peer.owner, false)?;
    let (mut region_of, mut descriptor_of) = (regions.cursor(), descriptors.cursor());
    let plan = engine.engine.prepare_pairs(operation, &peer.value, count, |index| {
        let (own, theirs) = (&local[index], &remote[index]);
        let descriptor = descriptor_of(index)
            .ok_or_else(|| Error::InvalidArgument("a descriptor is missing".into()))?;
        Ok(DescriptorPair {
            local: LocalSegment { addr: own.addr, len: own.len },
            region: region_of(index).map(Memory::region),
            remote: RemoteSegment { region: descriptor, addr: theirs.addr, len: theirs.len },
        })
    })?;
    finish(peer.owner, &plan)
}

unsafe fn prepare_blocks(
    conn: corelane_conn_t,
    operation: u32,
    local: *const corelane_local_blocks,
    remote: *const corelane_remote_blocks,
) -> Result<corelane_xfer_t, Failure> {
    let operation = operation_of(operation)?;
    // SAFETY: the caller promises one list of blocks behind each pointer, ...
    let (local, remote) =
        unsafe { (raw::slice(local, 1, "local")?[0], raw::slice(remote, 1, "remote")?[0]) };
    // SAFETY: ... and as many indices as they say.
    let (own, theirs) = unsafe {
        (
            raw::slice(local.indices, local.count, "the local indices")?,
            raw::slice(remote.indices, remote.count, "the remote indices")?,
        )
    };
    let peer = CONNS.get(conn)?;
    let engine = ENGINES.get(peer.owner)?;
    let descriptor = find_of(&DESCRIPTORS, remote.desc, peer.owner)?;
    let plan = engine.engine.prepare_blocks(
        operation,
        &peer.value,
        &LocalBlocks {
            base: local.base,
            stride: local.stride,
            block_bytes: local.block_bytes,
            indices: own,
        },
        &RemoteBlocks {
            region: &descriptor.value,
            base: remote.base,
            stride: remote.stride,
            block_bytes: remote.block_bytes,
            indices: theirs,
        },
    )?;
    finish(peer.owner, &plan)
}

/// Prepares a transfer of `local[i]` from (`CORELANE_READ`) or to (`CORELANE_WRITE`) `remote[i]`, for
/// all `count` of them. All checks, merging and splitting happen here, once; some tens of nanoseconds
/// each. Starts connecting if need be, without waiting.
///
/// Any thread. Errors: `CORELANE_ERR_INVALID_ARGUMENT`, `CORELANE_ERR_NOT_REGISTERED`,
/// `CORELANE_ERR_OUT_OF_BOUNDS`, `CORELANE_ERR_PERMISSION`, `CORELANE_ERR_STALE_DESCRIPTOR`,
/// `CORELANE_ERR_LIMIT`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_prepare(
    conn: corelane_conn_t,
    operation: u32,
    local: *const corelane_local_segment,
    remote: *const corelane_remote_segment,
    count: usize,
    xfer: *mut corelane_xfer_t,
) -> corelane_status {
    run("corelane_prepare", || {
        // SAFETY: the caller promises the lists and room for a handle.
        unsafe {
            raw::store(xfer, 0, "xfer")?;
            let handle = prepare(conn, operation, local, remote, count)?;
            raw::store(xfer, handle, "xfer")
        }
    })
}

/// As `corelane_prepare`, for blocks at multiples of a stride (pages of a KV cache).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_prepare_strided(
    conn: corelane_conn_t,
    operation: u32,
    local: *const corelane_local_blocks,
    remote: *const corelane_remote_blocks,
    xfer: *mut corelane_xfer_t,
) -> corelane_status {
    run("corelane_prepare_strided", || {
        // SAFETY: the caller promises the lists and room for a handle.
        unsafe {
            raw::store(xfer, 0, "xfer")?;
            let handle = prepare_blocks(conn, operation, local, remote)?;
            raw::store(xfer, handle, "xfer")
        }
    })
}

/// Prepares and posts. Once the handle is stored it is the caller's to release, whatever fails.
///
/// # Safety
/// `xfer` is null or points to room for a handle.
unsafe fn start(
    xfer: *mut corelane_xfer_t,
    prepare: impl FnOnce() -> Result<corelane_xfer_t, Failure>,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe { raw::store(xfer, 0, "xfer")? };
    let handle = prepare()?;
    // SAFETY: as above.
    unsafe { raw::store(xfer, handle, "xfer")? };
    post(handle, None)
}

/// Prepares and posts a read of one range; see `corelane_readv`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_read(
    conn: corelane_conn_t,
    local_addr: u64,
    desc: corelane_desc_t,
    remote_addr: u64,
    len: u64,
    xfer: *mut corelane_xfer_t,
) -> corelane_status {
    let local = corelane_local_segment { addr: local_addr, len, region: 0 };
    let remote = corelane_remote_segment { desc, addr: remote_addr, len };
    run("corelane_read", || {
        // SAFETY: the lists are ours; the caller promises room for a handle.
        unsafe {
            start(xfer, || prepare(conn, CORELANE_READ, &raw const local, &raw const remote, 1))
        }
    })
}

/// Prepares and posts a write of one range; see `corelane_writev`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_write(
    conn: corelane_conn_t,
    local_addr: u64,
    desc: corelane_desc_t,
    remote_addr: u64,
    len: u64,
    xfer: *mut corelane_xfer_t,
) -> corelane_status {
    let local = corelane_local_segment { addr: local_addr, len, region: 0 };
    let remote = corelane_remote_segment { desc, addr: remote_addr, len };
    run("corelane_write", || {
        // SAFETY: the lists are ours; the caller promises room for a handle.
        unsafe {
            start(xfer, || prepare(conn, CORELANE_WRITE, &raw const local, &raw const remote, 1))
        }
    })
}

/// Prepares and posts a read of `count` ranges: `corelane_prepare` and `corelane_post` in one call.
/// Release the handle when it is done, or post it again; also when posting failed and it is not 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_readv(
    conn: corelane_conn_t,
    local: *const corelane_local_segment,
    remote: *const corelane_remote_segment,
    count: usize,
    xfer: *mut corelane_xfer_t,
) -> corelane_status {
    run("corelane_readv", || {
        // SAFETY: the caller promises the lists and room for a handle.
        unsafe { start(xfer, || prepare(conn, CORELANE_READ, local, remote, count)) }
    })
}

/// Prepares and posts a write of `count` ranges: `corelane_prepare` and `corelane_post` in one call.
/// Release the handle when it is done, or post it again; also when posting failed and it is not 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_writev(
    conn: corelane_conn_t,
    local: *const corelane_local_segment,
    remote: *const corelane_remote_segment,
    count: usize,
    xfer: *mut corelane_xfer_t,
) -> corelane_status {
    run("corelane_writev", || {
        // SAFETY: the caller promises the lists and room for a handle.
        unsafe { start(xfer, || prepare(conn, CORELANE_WRITE, local, remote, count)) }
    })
}

/// Prepares and posts a read of blocks; see `corelane_prepare_strided` and `corelane_readv`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_read_strided(
    conn: corelane_conn_t,
    local: *const corelane_local_blocks,
    remote: *const corelane_remote_blocks,
    xfer: *mut corelane_xfer_t,
) -> corelane_status {
    run("corelane_read_strided", || {
        // SAFETY: the caller promises the lists and room for a handle.
        unsafe { start(xfer, || prepare_blocks(conn, CORELANE_READ, local, remote)) }
    })
}

/// Prepares and posts a write of blocks; see `corelane_prepare_strided` and `corelane_writev`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_write_strided(
    conn: corelane_conn_t,
    local: *const corelane_local_blocks,
    remote: *const corelane_remote_blocks,
    xfer: *mut corelane_xfer_t,
) -> corelane_status {
    run("corelane_write_strided", || {
        // SAFETY: the caller promises the lists and room for a handle.
        unsafe { start(xfer, || prepare_blocks(conn, CORELANE_WRITE, local, remote)) }
    })
}
