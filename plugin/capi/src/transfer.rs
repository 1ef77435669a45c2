//! Transfers.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use corelane::{
    DescriptorPair, Error, LocalBlocks, LocalSegment, Operation, Plan, RemoteBlocks, RemoteSegment,
    Status, Transfer,
};

use crate::handles::{
    CONNS, DESCRIPTORS, ENGINES, InUse, Owned, REGIONS, Table, XFERS, adopt, corelane_conn_t,
    corelane_desc_t, corelane_region_t, corelane_xfer_t, free,
};
use crate::status::{
    Failure,
    corelane_status::{self, CORELANE_IN_PROGRESS, CORELANE_OK},
    guard, remember, run, status_of,
};
use crate::{log, raw};

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

/// A transfer and what was said of its last posting.
pub(crate) struct Posting {
    transfer: Transfer,
    /// Calls of `post` under way; with `RELEASING`, no more begin.
    posts: AtomicU32,
    /// The failure of this posting has been logged.
    reported: AtomicBool,
}

/// A release has begun.
const RELEASING: u32 = 1 << 31;

impl Posting {
    /// Posts, unless a release has begun. Two uncontended atomic operations more than the engine's.
    #[inline]
    fn post(&self, notification: Option<&[u8]>) -> Result<(), Failure> {
        if self.posts.fetch_add(1, Ordering::AcqRel) & RELEASING != 0 {
            self.posts.fetch_sub(1, Ordering::AcqRel);
            return Err(Failure::new(
                corelane_status::CORELANE_ERR_CANCELLED,
                "the transfer is being released",
            ));
        }
        self.reported.store(false, Ordering::Relaxed);
        let posted = match notification {
            None => self.transfer.post(),
            Some(payload) => self.transfer.post_with_notification(payload),
        };
        self.posts.fetch_sub(1, Ordering::AcqRel);
        Ok(posted?)
    }

    /// No posting begins from now on; false: one is beginning just now.
    fn close(&self) -> bool {
        self.posts.fetch_or(RELEASING, Ordering::AcqRel) & !RELEASING == 0
    }

    fn is_beginning(&self) -> bool {
        self.posts.load(Ordering::Acquire) & !RELEASING != 0
    }

    fn is_in_flight(&self) -> bool {
        self.is_beginning() || matches!(self.transfer.status(), Status::InProgress)
    }
}

fn operation_of(operation: u32) -> Result<Operation, Failure> {
    match operation {
        CORELANE_READ => Ok(Operation::Read),
        CORELANE_WRITE => Ok(Operation::Write),
        other => Err(Failure::argument(format!("{other} is neither read (0) nor write (1)"))),
    }
}

fn finish(owner: u64, plan: &Plan) -> Result<corelane_xfer_t, Failure> {
    let posting = Posting {
        transfer: plan.transfer(),
        posts: AtomicU32::new(0),
        reported: AtomicBool::new(false),
    };
    adopt(&XFERS, owner, posting)
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
            region: region_of(index),
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

#[inline]
fn post(xfer: corelane_xfer_t, notification: Option<&[u8]>) -> Result<(), Failure> {
    XFERS.get(xfer)?.value.post(notification)
}

/// Starts a prepared transfer, for the first time or again after its end. One message to the lane;
/// allocates nothing. All that has to do with the peer is reported by `corelane_xfer_status`.
///
/// Any thread. Errors: `CORELANE_ERR_BUSY` while it is in flight; `CORELANE_ERR_CANCELLED` once a
/// release has begun; `CORELANE_ERR_SHUTDOWN`, `CORELANE_ERR_BACKEND`.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_post(xfer: corelane_xfer_t) -> corelane_status {
    run("corelane_post", || post(xfer, None))
}

/// As `corelane_post`, and the peer's application sees `len` bytes of `payload` (0 to 16 MiB) as a
/// notification once all bytes have arrived: of a write there, of a read here.
///
/// Any thread. Errors: `CORELANE_ERR_BUSY`; `CORELANE_ERR_BACKPRESSURE`, `CORELANE_ERR_LIMIT`: then no
/// data has moved.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_post_notify(
    xfer: corelane_xfer_t,
    payload: *const c_void,
    len: usize,
) -> corelane_status {
    run("corelane_post_notify", || {
        // SAFETY: the caller promises `len` bytes.
        let payload = unsafe { raw::bytes(payload, len, "the payload")? };
        post(xfer, Some(payload))
    })
}

impl Posting {
    fn failed(&self, error: &Error) {
        let failure = Failure::from(error.clone());
        // Its handle is valid: what is wrong is the posting. Logged once, however often it is asked.
        let quiet = matches!(error, Error::Cancelled | Error::Shutdown);
        remember(&failure.message);
        if !quiet && !self.reported.swap(true, Ordering::Relaxed) {
            // Without what differs from one transfer to the next: many may end for one cause.
            log::complain("transfer", &failure.message);
        }
    }
}

/// Where a transfer stands: `CORELANE_IN_PROGRESS`, `CORELANE_OK` when it is done,
/// `CORELANE_ERR_NOT_POSTED`, or the error in which it ended (`corelane_xfer_error` and
/// `corelane_last_error` have its words). A peer that is gone gives `CORELANE_ERR_REMOTE_DISCONNECT`,
/// or `CORELANE_ERR_CONNECT` where the attempt to connect again was what failed.
/// The same answer however often it is asked, until it is posted again.
///
/// Any thread. Costs a load of a finished transfer; of an unfinished one, where cores are few, a turn
/// of its lane.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_xfer_status(xfer: corelane_xfer_t) -> corelane_status {
    guard("corelane_xfer_status", || {
        let entry = XFERS.get(xfer)?;
        Ok(match entry.value.transfer.status() {
            Status::Done => CORELANE_OK,
            Status::InProgress => CORELANE_IN_PROGRESS,
            Status::Idle => corelane_status::CORELANE_ERR_NOT_POSTED,
            Status::Failed(error) => {
                entry.value.failed(&error);
                status_of(&error)
            }
        })
    })
}

/// Waits for the end, at most `timeout_ms` (negative: without limit), and returns what
/// `corelane_xfer_status` would.
///
/// Any thread but a lane. `CORELANE_IN_PROGRESS`: the time has passed, the transfer goes on.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_xfer_wait(xfer: corelane_xfer_t, timeout_ms: i64) -> corelane_status {
    guard("corelane_xfer_wait", || {
        let entry = XFERS.get(xfer)?;
        // What it came to is asked for afterwards: `wait` has a timeout of its own.
        let waited = entry.value.transfer.wait(raw::timeout(timeout_ms));
        Ok(match (entry.value.transfer.status(), waited) {
            (Status::Done, _) => CORELANE_OK,
            (Status::InProgress, Err(error)) if !matches!(error, Error::Timeout { .. }) => {
                return Err(error.into());
            }
            (Status::InProgress, _) => CORELANE_IN_PROGRESS,
            (Status::Idle, _) => corelane_status::CORELANE_ERR_NOT_POSTED,
            (Status::Failed(error), _) => {
                entry.value.failed(&error);
                status_of(&error)
            }
        })
    })
}

/// The words of the error in which a transfer ended, without a final zero byte; empty while it has
/// not failed. Lengths as in `corelane_get_metadata`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_xfer_error(
    xfer: corelane_xfer_t,
    buffer: *mut c_void,
    capacity: usize,
    len: *mut usize,
) -> corelane_status {
    run("corelane_xfer_error", || {
        let words = match XFERS.get(xfer)?.value.transfer.status() {
            Status::Failed(error) => error.to_string(),
            _ => String::new(),
        };
        // SAFETY: the caller promises a buffer of `capacity` bytes.
        unsafe { raw::fill(words.as_bytes(), buffer, capacity, len) }
    })
}

/// Asks a transfer to end: what is not sent is dropped. It ends (in `CORELANE_ERR_CANCELLED`, or done
/// if it was faster) as soon as nothing touches its local memory any more.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_cancel(xfer: corelane_xfer_t) -> corelane_status {
    run("corelane_cancel", || {
        XFERS.get(xfer)?.value.transfer.cancel();
        Ok(())
    })
}

/// Frees a transfer. One in flight is cancelled first, and waited for during at most `timeout_ms`
/// (0: not at all; negative: without limit). From the first call on it cannot be posted any more.
///
/// Any thread but a lane. `CORELANE_OK`: freed, and nothing touches its local memory any more.
/// `CORELANE_ERR_BUSY`: not yet quiet; the handle is kept, call again.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_release(xfer: corelane_xfer_t, timeout_ms: i64) -> corelane_status {
    run("corelane_release", || {
        let entry = XFERS.get(xfer)?;
        let posting = &entry.value;
        let quiet = posting.close() && !posting.is_in_flight();
        if !quiet && !end_within(posting, raw::timeout(timeout_ms)) {
            return Err(Failure::new(
                corelane_status::CORELANE_ERR_BUSY,
                "the transfer is being cancelled, and its memory is not quiet yet: release it again",
            ));
        }
        if free(&XFERS, xfer) { Ok(()) } else { Err(Failure::handle("transfer", xfer)) }
    })
}

/// Cancels a transfer that cannot be posted any more; true: it has ended.
fn end_within(posting: &Posting, timeout: Duration) -> bool {
    let started = Instant::now();
    loop {
        posting.transfer.cancel();
        // Where cores are few, this look drives the lane, and the end may be here at once.
        if !posting.is_in_flight() {
            return true;
        }
        let left = timeout.saturating_sub(started.elapsed());
        if left.is_zero() {
            return false;
        }
        // Only whether it has ended counts, not how. In slices: a post that had begun before the
        // release may start it after it was cancelled.
        match posting.transfer.wait(left.min(Duration::from_millis(100))) {
            // This thread may not wait, unless the transfer is just about to be posted.
            Err(Error::InvalidArgument(_)) if !posting.is_beginning() => return false,
            Err(_) => std::thread::yield_now(),
            Ok(()) => {}
        }
    }
}

/// How long a posting is expected to take, in nanoseconds, from what transfers to this peer have
/// taken so far, and how far like ones were from that.
///
/// Any thread. Errors: `CORELANE_ERR_NOT_FOUND` before any transfer to the peer has ended well.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_estimate(
    xfer: corelane_xfer_t,
    duration_ns: *mut u64,
    margin_ns: *mut u64,
) -> corelane_status {
    run("corelane_estimate", || {
        let estimate = XFERS.get(xfer)?.value.transfer.plan().estimate().ok_or_else(|| {
            Failure::new(
                corelane_status::CORELANE_ERR_NOT_FOUND,
                "no transfer to this peer has ended well yet",
            )
        })?;
        let nanoseconds = |duration: Duration| duration.as_nanos().min(u128::from(u64::MAX)) as u64;
        // SAFETY: the caller promises room for the numbers.
        unsafe {
            raw::store(duration_ns, nanoseconds(estimate.duration), "duration_ns")?;
            raw::store(margin_ns, nanoseconds(estimate.margin), "margin_ns")
        }
    })
}
