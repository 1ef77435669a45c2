//! `libcuda.so.1` for tests on machines without a GPU. Its GPUs are threads that copy, later and in no order but that of their
//! streams; their memory faults when the process touches it, and a kernel that touches anything but it and pinned memory loses the
//! GPU, as with the real ones. What there is, is what the engine and its tests call.
//!
//! `FAKE_CUDA_GPUS`: how many, 2 by default. `FAKE_CUDA_ORDERING`: for each of them whether it sees in order what other devices
//! write: `native`, as all do by default, `flush`, if the host flushes it, `none`. `FAKE_CUDA_NO_DMABUF`: memory is not exported.
//! `FAKE_CUDA_PCI`: the address of each on the PCI bus, which is not known by default.
//! `FAKE_CUDA_NO_IPC`: memory has no handles for other processes. `FAKE_CUDA_NO_PEER_ACCESS`: no GPU reaches another one's memory.
//! `FAKE_CUDA_PINNED_BYTES`: there is no more pinned memory.
//! `switches` has what tests do to it while they run.

#![allow(
    clippy::missing_safety_doc,
    reason = "the manual of the driver says what each caller has to keep to"
)]
#![allow(private_interfaces, reason = "streams are opaque to callers")]

mod memory;
mod stream;
mod switches;

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use memory::Kind;
use stream::{Stream, Tile, Work};

type Status = c_int;

const INVALID_VALUE: Status = 1;
const OUT_OF_MEMORY: Status = 2;
const NOT_INITIALISED: Status = 3;
const NO_DEVICE: Status = 100;
const INVALID_CONTEXT: Status = 201;
const PEER_ACCESS_UNSUPPORTED: Status = 217;
const NOT_READY: Status = 600;
const PEER_ACCESS_ALREADY_ENABLED: Status = 704;
const NOT_SUPPORTED: Status = 801;
const CAPTURE_INVALIDATED: Status = 901;

const NOT_FOUND: Status = 500;

const WRITE_COMBINED: c_uint = 4;

/// The kernels that there are: the engine's, which copies tiles, and those of tests.
const COPY: usize = 1;
const FILL: usize = 2;
const CHECK: usize = 3;

/// Contexts are these and the number of their GPU.
const CONTEXTS: usize = 0x1000;

thread_local! {
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// What names an allocation to other processes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IpcHandle {
    magic: [u8; 8],
    pid: u64,
    fd: u64,
    len: u64,
    gpu: u64,
    id: u64,
    unused: [u64; 2],
}

const MAGIC: [u8; 8] = *b"fake-gpu";

static INITIALISED: AtomicBool = AtomicBool::new(false);
static FLUSHES: AtomicU64 = AtomicU64::new(0);
static SYNCHRONISED: AtomicU64 = AtomicU64::new(0);
static PINNED: AtomicUsize = AtomicUsize::new(0);

fn number(name: &str) -> Option<usize> {
    std::env::var(name).ok()?.parse().ok()
}

fn gpus() -> c_int {
    number("FAKE_CUDA_GPUS").unwrap_or(2) as c_int
}

fn have_peer_access() -> bool {
    std::env::var_os("FAKE_CUDA_NO_PEER_ACCESS").is_none()
}

/// How a GPU sees what other devices write.
fn ordering(gpu: c_int) -> String {
    let all = std::env::var("FAKE_CUDA_ORDERING").unwrap_or_default();
    let one = all.split(',').nth(gpu.max(0) as usize).filter(|one| !one.is_empty());
    one.unwrap_or("native").to_owned()
}

/// The GPU that the calling thread has entered.
fn current() -> Option<c_int> {
    CURRENT.with_borrow(|stack| stack.last().map(|context| (context - CONTEXTS) as c_int))
}

/// Runs `call` unless no context is current, the GPU was lost, or a capture goes on that does not allow it.
fn within(call: impl FnOnce(c_int) -> Status) -> Status {
    let Some(gpu) = current() else { return INVALID_CONTEXT };
    match (stream::lost(gpu as usize), switches::refuse_amid_capture()) {
        (0, 0) => call(gpu),
        (0, refused) => refused,
        (lost, _) => lost,
    }
}

/// Waits as calls do that change what memory there is: for the GPU of this thread.
fn wait_for_gpu() {
    if let Some(gpu) = current() {
        stream::wait_for_all(gpu as usize);
    }
}

/// Gives memory back.
fn release(address: u64) -> Status {
    within(|_| {
        wait_for_gpu();
        if memory::free(address) { 0 } else { INVALID_VALUE }
    })
}

/// # Safety
/// `to` is a place for a `T`.
unsafe fn put<T>(to: *mut T, value: T) -> Status {
    // SAFETY: as the caller promises.
    unsafe { to.write(value) };
    0
}

macro_rules! driver {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) $body:block)+) => {
        $(
            #[unsafe(no_mangle)]
            #[allow(missing_docs, non_snake_case)]
            pub unsafe extern "C" fn $name($($argument: $kind),*) -> Status {
                if let Some(refused) = switches::begin(stringify!($name)) {
                    return refused;
                }
                // SAFETY: the driver's manual asks callers for places to write to that are good, and for streams that it made
                // and that are not destroyed.
                #[allow(unused_unsafe)]
                unsafe { $body }
            }
        )+
    };
}

driver! {
    fn cuInit(_flags: c_uint) {
        if gpus() == 0 {
            return NO_DEVICE;
        }
        INITIALISED.store(true, Ordering::Release);
        0
    }
    fn cuGetErrorString(status: Status, text: *mut *const c_char) {
        let said = match status {
            OUT_OF_MEMORY => c"out of memory",
            700 => c"an illegal memory access was encountered",
            719 => c"unspecified launch failure",
            900 => c"operation not permitted when stream is capturing",
            NOT_SUPPORTED => c"operation not supported",
            _ => c"an error of the fake driver",
        };
        put(text, said.as_ptr())
    }
    fn cuDeviceGetCount(count: *mut c_int) {
        if INITIALISED.load(Ordering::Acquire) { put(count, gpus()) } else { NOT_INITIALISED }
    }
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) { put(device, ordinal) }
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) { put(uuid, [0xf0 | device as u8; 16]) }
    fn cuDeviceGetPCIBusId(text: *mut c_char, len: c_int, device: c_int) {
        let all = std::env::var("FAKE_CUDA_PCI").unwrap_or_default();
        let address = all.split(',').nth(device.max(0) as usize).unwrap_or_default();
        if address.is_empty() || address.len() >= len.max(0) as usize {
            return INVALID_VALUE;
        }
        std::ptr::copy_nonoverlapping(address.as_ptr().cast::<c_char>(), text, address.len());
        put(text.add(address.len()), 0)
    }
    fn cuDeviceCanAccessPeer(can: *mut c_int, _device: c_int, _peer: c_int) {
        put(can, c_int::from(have_peer_access()))
    }
    fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) {
        put(context, CONTEXTS + device as usize)
    }
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) { 0 }
    fn cuCtxPushCurrent_v2(context: usize) {
        CURRENT.with_borrow_mut(|stack| stack.push(context));
        0
    }
    fn cuCtxPopCurrent_v2(context: *mut usize) {
        match CURRENT.with_borrow_mut(Vec::pop) {
            Some(popped) => put(context, popped),
            None => INVALID_CONTEXT,
        }
    }
    fn cuCtxSetCurrent(context: usize) {
        CURRENT.with_borrow_mut(|stack| {
            stack.pop();
            stack.push(context);
        });
        0
    }
    fn cuCtxEnablePeerAccess(peer: usize, _flags: c_uint) {
        within(|gpu| match have_peer_access() {
            true if stream::open_peer(gpu as usize, peer - CONTEXTS) => 0,
            true => PEER_ACCESS_ALREADY_ENABLED,
            false => PEER_ACCESS_UNSUPPORTED,
        })
    }
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        // SAFETY: the caller's place for the result.
        within(|_| unsafe { put(least, 0) + put(greatest, -5) })
    }
    fn cuCtxSynchronize() {
        wait_for_gpu();
        within(|_| 0)
    }
    fn cuStreamCreateWithPriority(stream: *mut *mut Stream, _flags: c_uint, _priority: c_int) {
        // SAFETY: the caller's place for the result.
        within(|gpu| unsafe { put(stream, Box::into_raw(Box::new(Stream::new(gpu as usize)))) })
    }
    fn cuStreamCreate(stream: *mut *mut Stream, flags: c_uint) {
        // SAFETY: the caller's place for the result.
        unsafe { cuStreamCreateWithPriority(stream, flags, 0) }
    }
    fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) {
        let before = switches::exchange_mode(*mode);
        put(mode, before)
    }
    fn cuStreamBeginCapture_v2(_stream: *mut Stream, mode: c_int) {
        if mode == switches::GLOBAL {
            switches::begin_capture();
            return 0;
        }
        NOT_SUPPORTED
    }
    fn cuStreamEndCapture(_stream: *mut Stream, graph: *mut usize) {
        if switches::end_capture() { put(graph, 1) } else { CAPTURE_INVALIDATED }
    }
    fn cuGraphDestroy(_graph: usize) { 0 }
    fn cuStreamDestroy_v2(stream: *mut Stream) {
        drop(Box::from_raw(stream));
        0
    }
    fn cuStreamQuery(stream: *mut Stream) {
        let idle = (*stream).is_idle();
        within(|_| if idle { 0 } else { NOT_READY })
    }
    fn cuStreamSynchronize(stream: *mut Stream) {
        (*stream).wait();
        stream::lost((*stream).gpu())
    }
    fn cuStreamWriteValue32_v2(stream: *mut Stream, at: u64, value: u32, _flags: c_uint) {
        within(|_| {
            // SAFETY: a stream that was made and is not destroyed.
            unsafe { &*stream }.enqueue(Work::Write { at, value });
            0
        })
    }
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        within(|gpu| match memory::of_gpu(bytes, gpu, Kind::Plain) {
            // SAFETY: the caller's place for the result.
            Some(made) => unsafe { put(address, made.base) },
            None => OUT_OF_MEMORY,
        })
    }
    fn cuMemAllocAsync(address: *mut u64, bytes: usize, _stream: *mut Stream) {
        within(|gpu| match memory::of_gpu(bytes, gpu, Kind::Pool) {
            // SAFETY: the caller's place for the result.
            Some(made) => unsafe { put(address, made.base) },
            None => OUT_OF_MEMORY,
        })
    }
    fn cuMemFree_v2(address: u64) {
        release(address)
    }
    fn cuMemGetAddressRange_v2(base: *mut u64, bytes: *mut usize, address: u64) {
        match memory::at(address) {
            // As the real one: within the context of another GPU it is not found.
            Some(found) if found.context().is_some_and(|gpu| current() != Some(gpu)) => NOT_FOUND,
            Some(found) => put(base, found.base) + put(bytes, found.len),
            None => INVALID_VALUE,
        }
    }
    fn cuMemsetD8Async(at: u64, value: u8, len: usize, stream: *mut Stream) {
        within(|_| {
            // SAFETY: a stream that was made and is not destroyed.
            unsafe { &*stream }.enqueue(Work::Set { at, value, len });
            0
        })
    }
    fn cuMemsetD8_v2(at: u64, value: u8, len: usize) {
        match memory::shadow(at, len) {
            Some(at) => {
                std::ptr::write_bytes(at as *mut u8, value, len);
                0
            }
            None => INVALID_VALUE,
        }
    }
    fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint) {
        let kind = if flags & WRITE_COMBINED == 0 { Kind::Plain } else { Kind::Elsewhere };
        let most = number("FAKE_CUDA_PINNED_BYTES").unwrap_or(usize::MAX);
        within(|_| {
            if PINNED.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > most {
                PINNED.fetch_sub(bytes, Ordering::Relaxed);
                return OUT_OF_MEMORY;
            }
            match memory::pinned(bytes, kind) {
                // SAFETY: the caller's place for the result.
                Some(made) => unsafe { put(address, made.base as *mut c_void) },
                None => OUT_OF_MEMORY,
            }
        })
    }
    fn cuMemFreeHost(address: *mut c_void) {
        release(address as u64)
    }
    fn cuMemcpyAsync(to: u64, from: u64, len: usize, stream: *mut Stream) {
        within(|_| {
            // SAFETY: a stream that was made and is not destroyed.
            unsafe { &*stream }.enqueue(Work::Copy { to, from, len });
            0
        })
    }
    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, len: usize) {
        match memory::shadow(to, len) {
            Some(to) => {
                std::ptr::copy_nonoverlapping(from.cast::<u8>(), to as *mut u8, len);
                0
            }
            None => INVALID_VALUE,
        }
    }
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, len: usize) {
        match memory::shadow(from, len) {
            Some(from) => {
                std::ptr::copy_nonoverlapping(from as *const u8, to.cast::<u8>(), len);
                0
            }
            None => INVALID_VALUE,
        }
    }
    fn cuPointerGetAttribute(value: *mut c_void, attribute: c_int, address: u64) {
        let Some(found) = memory::at(address) else { return INVALID_VALUE };
        let lost = found.gpu.map_or(0, |gpu| stream::lost(gpu as usize));
        if lost != 0 {
            return lost;
        }
        match attribute {
            // What is of no context.
            1 if found.kind == Kind::Pool => put(value.cast::<usize>(), 0),
            1 => put(value.cast::<usize>(), CONTEXTS + found.gpu.unwrap_or(0) as usize),
            3 if current().is_none() => INVALID_CONTEXT,
            3 => put(value.cast::<u64>(), found.on_gpus(address)),
            2 => put(value.cast::<u32>(), if found.gpu.is_some() { 2 } else { 1 }),
            7 => put(value.cast::<u64>(), found.id),
            8 => put(value.cast::<u32>(), 0),
            9 => put(value.cast::<c_int>(), found.gpu.unwrap_or(0)),
            10 => put(value.cast::<u32>(), u32::from(found.gpu.is_some() && found.kind == Kind::Plain)),
            _ => INVALID_VALUE,
        }
    }
    fn cuIpcGetMemHandle(handle: *mut IpcHandle, address: u64) {
        let Some((found, gpu)) = memory::at(address).and_then(|found| Some((found, found.gpu?)))
        else {
            return INVALID_VALUE;
        };
        if found.kind != Kind::Plain {
            return INVALID_VALUE;
        }
        if std::env::var_os("FAKE_CUDA_NO_IPC").is_some() {
            return NOT_SUPPORTED;
        }
        put(handle, IpcHandle {
            magic: MAGIC,
            pid: u64::from(std::process::id()),
            fd: found.fd as u64,
            len: found.len as u64,
            gpu: gpu as u64,
            // A handle is never given to another allocation.
            id: found.id,
            unused: [0; 2],
        })
    }
    fn cuIpcOpenMemHandle_v2(address: *mut u64, handle: IpcHandle, _flags: c_uint) {
        let IpcHandle { magic, pid, fd, len, gpu, .. } = handle;
        if magic != MAGIC {
            return INVALID_VALUE;
        }
        within(|by| {
            if by != gpu as c_int && !have_peer_access() {
                return PEER_ACCESS_UNSUPPORTED;
            }
            match memory::of_process((pid as u32, fd as c_int), len as usize, gpu as c_int, by) {
                // SAFETY: the caller's place for the result.
                Some(mapped) => unsafe { put(address, mapped.base) },
                None => INVALID_VALUE,
            }
        })
    }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) {
        let ordering = ordering(device);
        match attribute {
            117 => put(value, c_int::from(ordering == "flush")),
            118 => put(value, if ordering == "native" { 100 } else { 0 }),
            124 => put(value, c_int::from(std::env::var_os("FAKE_CUDA_NO_DMABUF").is_none())),
            _ => INVALID_VALUE,
        }
    }
    fn cuPointerSetAttribute(value: *const c_void, attribute: c_int, address: u64) {
        match (attribute, memory::at(address)) {
            (6, Some(found)) if found.gpu.is_some() && value.cast::<c_uint>().read() <= 1 => {
                SYNCHRONISED.fetch_add(1, Ordering::Relaxed);
                0
            }
            _ => INVALID_VALUE,
        }
    }
    fn cuMemGetHandleForAddressRange(handle: *mut c_void, address: u64, bytes: usize, kind: c_int, flags: u64) {
        within(|_| {
            if kind != 1 || flags != 0 {
                return INVALID_VALUE;
            }
            if std::env::var_os("FAKE_CUDA_NO_DMABUF").is_some() {
                return NOT_SUPPORTED;
            }
            match memory::export(address, bytes) {
                // SAFETY: the caller's place for a descriptor.
                Some(fd) => unsafe { put(handle.cast::<c_int>(), fd) },
                None => INVALID_VALUE,
            }
        })
    }
    fn cuFlushGPUDirectRDMAWrites(target: c_int, scope: c_int) {
        within(|gpu| match (target, scope, ordering(gpu).as_str()) {
            (0, 100 | 200, "flush") => {
                FLUSHES.fetch_add(1, Ordering::SeqCst);
                0
            }
            (0, 100 | 200, "native") => 0,
            (0, 100 | 200, _) => NOT_SUPPORTED,
            _ => INVALID_VALUE,
        })
    }
    fn cuIpcCloseMemHandle(address: u64) {
        release(address)
    }
    fn cuModuleLoadData(module: *mut usize, _image: *const c_void) { put(module, 1) }
    fn cuModuleUnload(_module: usize) { 0 }
    fn cuModuleGetFunction(function: *mut usize, _module: usize, name: *const c_char) {
        let number = match CStr::from_ptr(name).to_bytes() {
            b"corelane_copy" => COPY,
            b"corelane_test_fill" => FILL,
            b"corelane_test_check" => CHECK,
            _ => return NOT_FOUND,
        };
        put(function, number)
    }
}

/// Where memory of a GPU can be touched, 0: not at all. For what stands in for nvidia_peermem (tests/fake-verbs).
#[unsafe(no_mangle)]
#[allow(missing_docs)]
pub extern "C" fn corelane_fake_cuda_place(address: u64, len: usize) -> u64 {
    let is_gpu = memory::at(address).is_some_and(|found| found.gpu.is_some());
    memory::shadow(address, len).filter(|_| is_gpu).unwrap_or(0)
}

/// How often GPUs that need it have been flushed, for tests.
#[unsafe(no_mangle)]
#[allow(missing_docs)]
pub extern "C" fn corelane_fake_cuda_flushes() -> u64 {
    FLUSHES.load(Ordering::SeqCst)
}

/// How often calls on memory have been made synchronous, for tests.
#[unsafe(no_mangle)]
#[allow(missing_docs)]
pub extern "C" fn corelane_fake_cuda_synchronised() -> u64 {
    SYNCHRONISED.load(Ordering::Relaxed)
}

/// Of the kernels that there are.
#[unsafe(no_mangle)]
#[allow(missing_docs, non_snake_case, clippy::too_many_arguments)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: usize,
    _grid_x: c_uint,
    _grid_y: c_uint,
    _grid_z: c_uint,
    _block_x: c_uint,
    _block_y: c_uint,
    _block_z: c_uint,
    _shared_bytes: c_uint,
    stream: *mut Stream,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Status {
    if let Some(refused) = switches::begin("cuLaunchKernel") {
        return refused;
    }
    // SAFETY: the kernels have these arguments, in this order, and their caller a stream that is not destroyed.
    within(|_| unsafe {
        let long = |at: usize| (*arguments.add(at)).cast::<u64>().read();
        let short = |at: usize| (*arguments.add(at)).cast::<u32>().read();
        let work = match function {
            FILL => Work::Fill { base: long(0), words: short(1), seed: short(2) },
            CHECK => Work::Check {
                base: long(0),
                list: long(1),
                count: short(2),
                seed: short(3),
                wrong: long(4),
            },
            _ => Work::Kernel {
                tiles: long(0),
                count: short(1),
                done: long(3),
                value: short(4),
                only: (*arguments.add(5)).cast::<Tile>().read(),
            },
        };
        (*stream).enqueue(work);
        0
    })
}
