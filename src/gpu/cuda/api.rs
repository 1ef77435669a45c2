//! The entry points of the CUDA driver, looked up at run time.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use libloading::os::unix::Library;

use super::super::GpuError;

const LIBRARY: &str = "libcuda.so.1";

pub(super) type Status = c_int;
pub(super) type Context = *mut c_void;
pub(super) type Stream = *mut c_void;
pub(super) type Module = *mut c_void;
pub(super) type Function = *mut c_void;

/// What names an allocation to other processes.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct IpcHandle(pub(super) [u8; 64]);

/// Identifies a GPU, whatever its number in a process is.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Uuid(pub(super) [u8; 16]);

pub(super) const SUCCESS: Status = 0;
pub(super) const INVALID_HANDLE: Status = 400;
pub(super) const NOT_READY: Status = 600;
pub(super) const UNKNOWN: Status = 999;
pub(super) const PEER_ACCESS_ALREADY_ENABLED: Status = 704;

macro_rules! entry_points {
    (
        $(fn $name:ident = $symbol:literal ($($argument:ident: $kind:ty),*);)+
        optional: $(fn $optional:ident = $osymbol:literal ($($oarg:ident: $okind:ty),*);)+
    ) => {
        /// Addresses of functions of the driver, which is never unloaded.
        #[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "some are for RDMA"))]
        pub(super) struct Api {
            $(pub(super) $name: unsafe extern "C" fn($($argument: $kind),*) -> Status,)+
            $(pub(super) $optional: Option<unsafe extern "C" fn($($oarg: $okind),*) -> Status>,)+
        }

        impl Api {
            fn look_up(library: &Library) -> Result<Self, String> {
                // SAFETY: the types are those that the driver's manual declares for these versions of the functions;
                // the library stays loaded for the life of the process.
                unsafe {
                    Ok(Self {
                        $($name: *library
                            .get(concat!($symbol, "\0").as_bytes())
                            .map_err(|_| concat!($symbol, " is missing in it"))?,)+
                        $($optional: library
                            .get(concat!($osymbol, "\0").as_bytes())
                            .ok()
                            .map(|symbol| *symbol),)+
                    })
                }
            }
        }
    };
}

entry_points! {
    fn init = "cuInit"(flags: c_uint);
    fn error_string = "cuGetErrorString"(status: Status, text: *mut *const c_char);
    fn device_count = "cuDeviceGetCount"(count: *mut c_int);
    fn device_get = "cuDeviceGet"(device: *mut c_int, ordinal: c_int);
    fn device_uuid = "cuDeviceGetUuid"(uuid: *mut Uuid, device: c_int);
    fn device_can_access = "cuDeviceCanAccessPeer"(can: *mut c_int, device: c_int, peer: c_int);
    fn context_retain = "cuDevicePrimaryCtxRetain"(context: *mut Context, device: c_int);
    fn context_release = "cuDevicePrimaryCtxRelease_v2"(device: c_int);
    fn context_push = "cuCtxPushCurrent_v2"(context: Context);
    fn context_pop = "cuCtxPopCurrent_v2"(context: *mut Context);
    fn context_enable_peer = "cuCtxEnablePeerAccess"(peer: Context, flags: c_uint);
    fn context_priorities = "cuCtxGetStreamPriorityRange"(least: *mut c_int, greatest: *mut c_int);
    fn stream_create = "cuStreamCreateWithPriority"(stream: *mut Stream, flags: c_uint, priority: c_int);
    fn stream_destroy = "cuStreamDestroy_v2"(stream: Stream);
    fn stream_query = "cuStreamQuery"(stream: Stream);
    fn stream_write = "cuStreamWriteValue32_v2"(stream: Stream, address: u64, value: u32, flags: c_uint);
    fn memory_alloc = "cuMemAlloc_v2"(address: *mut u64, bytes: usize);
    fn memory_free = "cuMemFree_v2"(address: u64);
    fn memory_range = "cuMemGetAddressRange_v2"(base: *mut u64, bytes: *mut usize, address: u64);
    fn host_alloc = "cuMemHostAlloc"(address: *mut *mut c_void, bytes: usize, flags: c_uint);
    fn host_free = "cuMemFreeHost"(address: *mut c_void);
    fn copy_async = "cuMemcpyAsync"(to: u64, from: u64, bytes: usize, stream: Stream);
    fn pointer_attribute = "cuPointerGetAttribute"(value: *mut c_void, attribute: c_int, address: u64);
    fn ipc_export = "cuIpcGetMemHandle"(handle: *mut IpcHandle, address: u64);
    fn ipc_open = "cuIpcOpenMemHandle_v2"(address: *mut u64, handle: IpcHandle, flags: c_uint);
    fn ipc_close = "cuIpcCloseMemHandle"(address: u64);
    fn module_load = "cuModuleLoadData"(module: *mut Module, image: *const c_void);
    fn module_unload = "cuModuleUnload"(module: Module);
    fn module_function = "cuModuleGetFunction"(function: *mut Function, module: Module, name: *const c_char);
    fn launch = "cuLaunchKernel"(
        function: Function,
        grid_x: c_uint, grid_y: c_uint, grid_z: c_uint,
        block_x: c_uint, block_y: c_uint, block_z: c_uint,
        shared_bytes: c_uint,
        stream: Stream,
        arguments: *mut *mut c_void,
        extra: *mut *mut c_void
    );
    optional:
    fn device_pci_address = "cuDeviceGetPCIBusId"(text: *mut c_char, len: c_int, device: c_int);
    fn device_attribute = "cuDeviceGetAttribute"(value: *mut c_int, attribute: c_int, device: c_int);
    fn set_pointer_attribute = "cuPointerSetAttribute"(value: *const c_void, attribute: c_int, address: u64);
    fn range_handle = "cuMemGetHandleForAddressRange"(handle: *mut c_void, address: u64, bytes: usize, kind: c_int, flags: u64);
    fn flush_writes = "cuFlushGPUDirectRDMAWrites"(target: c_int, scope: c_int);
    fn exchange_capture_mode = "cuThreadExchangeStreamCaptureMode"(mode: *mut c_int);
}

impl Api {
    /// What a status means, with the call that gave it.
    pub(super) fn check(&self, call: &'static str, status: Status) -> Result<(), GpuError> {
        if status == SUCCESS { Ok(()) } else { Err(self.error(call, status)) }
    }

    #[cold]
    pub(super) fn error(&self, call: &'static str, status: Status) -> GpuError {
        let mut text = std::ptr::null();
        // SAFETY: room for one pointer; the text lives as long as the library.
        let told = unsafe { (self.error_string)(status, &raw mut text) };
        let text = if told == SUCCESS && !text.is_null() {
            // SAFETY: the driver's text ends in a zero.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        } else {
            format!("error {status}")
        };
        GpuError(format!("{call}: {text} ({status})"))
    }
}

/// Whether a context is of no more use after this status: every call in it answers so from then on, and what ran there has
/// ended. All others say something of one call, and nothing of what is under way.
pub(super) fn is_sticky(status: Status) -> bool {
    matches!(
        status,
        // The driver is shutting down; the device is gone; its context is.
        4 | 46 | 201 | 709
        // Memory errors that cannot be corrected, of the device, its links, and the process's own.
        | 214 | 220 | 226
        // What kernels did: addresses, time, assertions, instructions.
        | 700 | 702 | 710 | 714..=719 | 721
    )
}

/// What succeeds once and stays; what fails is tried again, but not more often than once in this time.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// The outcome of something that is done once in a process.
pub(super) struct Once<T> {
    done: OnceLock<T>,
    failed: Mutex<Option<(Instant, GpuError)>>,
}

impl<T> Once<T> {
    pub(super) const fn new() -> Self {
        Self { done: OnceLock::new(), failed: Mutex::new(None) }
    }

    pub(super) fn get(&self) -> Option<&T> {
        self.done.get()
    }

    /// Does it, unless it is done or has failed just now: then the answer is that error.
    pub(super) fn get_or_try(
        &self,
        attempt: impl FnOnce() -> Result<T, GpuError>,
    ) -> Result<&T, GpuError> {
        if let Some(done) = self.done.get() {
            return Ok(done);
        }
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(done) = self.done.get() {
            return Ok(done);
        }
        if let Some((at, error)) = &*failed
            && at.elapsed() < TRY_AGAIN_AFTER
        {
            return Err(error.clone());
        }
        match attempt() {
            Ok(done) => Ok(self.done.get_or_init(|| done)),
            Err(error) => {
                *failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }
}

static API: Once<Api> = Once::new();

/// The driver's functions, loaded by whoever asks first. Nothing is initialised.
pub(super) fn loaded() -> Result<&'static Api, GpuError> {
    API.get_or_try(load)
}

/// The driver's functions if somebody in this process has loaded the driver; otherwise no address can be a GPU's.
pub(super) fn loaded_before() -> Option<&'static Api> {
    if let Some(api) = API.get() {
        return Some(api);
    }
    let flags = libc::RTLD_NOW | libc::RTLD_LOCAL | libc::RTLD_NOLOAD;
    // SAFETY: nothing is loaded, and no initialiser runs.
    let library = unsafe { Library::open(Some(LIBRARY), flags) }.ok()?;
    API.get_or_try(|| look_up_in(library)).ok()
}

/// The driver, initialised.
pub(super) fn ready() -> Result<&'static Api, GpuError> {
    static READY: Once<()> = Once::new();
    let api = loaded()?;
    // SAFETY: no pointers.
    READY.get_or_try(|| api.check("cuInit", unsafe { (api.init)(0) }))?;
    Ok(api)
}

fn load() -> Result<Api, GpuError> {
    // SAFETY: loading runs the library's initialisers, as for every program that is linked with it.
    let library = unsafe { Library::open(Some(LIBRARY), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    look_up_in(library.map_err(|_| GpuError(format!("{LIBRARY} (the driver) not found")))?)
}

fn look_up_in(library: Library) -> Result<Api, GpuError> {
    let api = Api::look_up(&library).map_err(|why| GpuError(format!("{LIBRARY}: {why}")))?;
    std::mem::forget(library);
    Ok(api)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_tried_again_but_not_at_once() {
        let once = Once::new();
        let mut tries = 0;
        let mut attempt = |outcome: Result<u32, &str>| {
            let attempt = || {
                tries += 1;
                outcome.map_err(|why| GpuError(why.into()))
            };
            once.get_or_try(attempt).copied().map_err(|error| error.0)
        };
        assert_eq!(attempt(Err("busy")), Err("busy".into()));
        let earlier = || {
            let mut failed = once.failed.lock().unwrap();
            failed.as_mut().unwrap().0 -= TRY_AGAIN_AFTER;
        };
        // So soon that nothing is tried; a machine that sleeps here for a second tries, and fails likewise.
        assert_eq!(attempt(Err("busy")), Err("busy".into()));
        earlier();
        assert_eq!(attempt(Ok(7)), Ok(7));
        assert_eq!(attempt(Err("never tried")), Ok(7));
        assert!(matches!(tries, 2 | 3));
    }
}
