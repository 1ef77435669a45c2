//! One GPU: its primary context and the kernel in it.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::super::GpuError;
use super::api::{
    self, Api, Context, Function, PEER_ACCESS_ALREADY_ENABLED, SUCCESS, Stream, Uuid,
};
use super::table::Arena;

/// More GPUs than a process sees.
const MAX_DEVICES: usize = 64;
const STREAM_NON_BLOCKING: u32 = 1;

/// Ends in a zero, as the driver wants it.
const KERNEL: &str = concat!(include_str!("kernel.ptx"), "\0");

/// A GPU that is in use by an engine of this process; it stays so until the process ends.
pub(crate) struct Device {
    pub(super) api: &'static Api,
    ordinal: u32,
    uuid: [u8; 16],
    pub(super) raw: c_int,
    context: Context,
    kernel: Function,
    /// For what is done once, by whatever thread: uploads of tables.
    setup: Mutex<Stream>,
    pub(super) arena: Mutex<Arena>,
    /// Peers whose memory this GPU can address.
    peers: Mutex<u64>,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Device {}
// SAFETY: as above; what the driver does not order is behind the locks.
unsafe impl Sync for Device {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({})", self.ordinal)
    }
}

static DEVICES: [OnceLock<Result<Device, GpuError>>; MAX_DEVICES] =
    [const { OnceLock::new() }; MAX_DEVICES];

/// The calling thread is in the device's context until this is dropped.
pub(super) struct Entered<'a> {
    api: &'a Api,
    /// Contexts are of threads.
    _not_send: PhantomData<*mut c_void>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: room for one handle. Takes what `enter` has put there; an error leaves nothing to be done.
        unsafe { (self.api.context_pop)(&raw mut popped) };
    }
}

impl Device {
    /// The device with this ordinal in this process. The first call takes its context into use, which takes some
    /// hundred milliseconds and GPU memory where nobody else has.
    pub(crate) fn get(ordinal: u32) -> Result<&'static Self, GpuError> {
        let api = api::ready()?;
        let count = count(api)?;
        let slot = DEVICES.get(ordinal as usize).filter(|_| ordinal < count).ok_or_else(|| {
            GpuError(format!("there is no GPU {ordinal}: this process sees {count}"))
        })?;
        slot.get_or_init(|| Self::open(api, ordinal)).as_ref().map_err(Clone::clone)
    }

    /// The device with this identity, if this process sees it.
    pub(crate) fn with_uuid(uuid: &[u8; 16]) -> Result<Option<&'static Self>, GpuError> {
        let api = api::ready()?;
        for ordinal in 0..count(api)? {
            if uuid_of(api, raw_of(api, ordinal)?)? == *uuid {
                return Self::get(ordinal).map(Some);
            }
        }
        Ok(None)
    }

    fn open(api: &'static Api, ordinal: u32) -> Result<Self, GpuError> {
        let raw = raw_of(api, ordinal)?;
        let uuid = uuid_of(api, raw)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: room for one handle. The context is kept until the process ends.
        let status = unsafe { (api.context_retain)(&raw mut context, raw) };
        api.check("cuDevicePrimaryCtxRetain", status)?;
        let mut device = Self {
            api,
            ordinal,
            uuid,
            raw,
            context,
            kernel: std::ptr::null_mut(),
            setup: Mutex::new(std::ptr::null_mut()),
            arena: Mutex::new(Arena::default()),
            peers: Mutex::new(0),
        };
        let (kernel, setup) = {
            let _entered = device.enter()?;
            let mut module = std::ptr::null_mut();
            // SAFETY: the image is a text that ends in a zero; room for one handle.
            let status = unsafe { (api.module_load)(&raw mut module, KERNEL.as_ptr().cast()) };
            api.check("cuModuleLoadData", status)?;
            let mut kernel = std::ptr::null_mut();
            // SAFETY: the name ends in a zero; room for one handle.
            let status = unsafe {
                (api.module_function)(&raw mut kernel, module, c"corelane_copy".as_ptr())
            };
            api.check("cuModuleGetFunction", status)?;
            (kernel, device.new_stream()?)
        };
        device.kernel = kernel;
        device.setup = Mutex::new(setup);
        Ok(device)
    }

    pub(crate) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    pub(crate) fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    pub(super) fn context_address(&self) -> usize {
        self.context as usize
    }

    pub(super) fn kernel(&self) -> Function {
        self.kernel
    }

    /// Makes this thread's calls go to the device.
    pub(super) fn enter(&self) -> Result<Entered<'static>, GpuError> {
        // SAFETY: a living context.
        let status = unsafe { (self.api.context_push)(self.context) };
        self.api.check("cuCtxPushCurrent", status)?;
        Ok(Entered { api: self.api, _not_send: PhantomData })
    }

    /// A stream that waits for no other one, before those of the model. The thread has entered.
    pub(super) fn new_stream(&self) -> Result<Stream, GpuError> {
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: room for two numbers.
        let status = unsafe { (self.api.context_priorities)(&raw mut least, &raw mut greatest) };
        self.api.check("cuCtxGetStreamPriorityRange", status)?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: room for one handle.
        let status =
            unsafe { (self.api.stream_create)(&raw mut stream, STREAM_NON_BLOCKING, greatest) };
        self.api.check("cuStreamCreateWithPriority", status)?;
        Ok(stream)
    }

    /// Enqueues work by `work` and waits for it: for the control plane.
    pub(super) fn set_up(
        &self,
        work: impl FnOnce(Stream) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        let stream = self.setup.lock().unwrap_or_else(PoisonError::into_inner);
        let _entered = self.enter()?;
        let done = work(*stream);
        // SAFETY: a living stream. Also after an error: what was enqueued before may name the caller's memory.
        let status = unsafe { (self.api.stream_synchronize)(*stream) };
        done?;
        self.api.check("cuStreamSynchronize", status)
    }

    /// Lets this GPU address the memory of another one.
    pub(crate) fn reach(&self, other: &Self) -> Result<(), GpuError> {
        if self.ordinal == other.ordinal {
            return Ok(());
        }
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if *peers & 1 << other.ordinal != 0 {
            return Ok(());
        }
        let mut can = 0;
        // SAFETY: room for one number.
        let status = unsafe { (self.api.device_can_access)(&raw mut can, self.raw, other.raw) };
        self.api.check("cuDeviceCanAccessPeer", status)?;
        if can == 0 {
            return Err(GpuError(format!(
                "GPU {} cannot address the memory of GPU {}: the host has no peer access between them",
                self.ordinal, other.ordinal
            )));
        }
        let _entered = self.enter()?;
        // SAFETY: a living context.
        let status = unsafe { (self.api.context_enable_peer)(other.context, 0) };
        if status != SUCCESS && status != PEER_ACCESS_ALREADY_ENABLED {
            return Err(self.api.error("cuCtxEnablePeerAccess", status));
        }
        *peers |= 1 << other.ordinal;
        Ok(())
    }
}

fn count(api: &Api) -> Result<u32, GpuError> {
    let mut count = 0;
    // SAFETY: room for one number.
    api.check("cuDeviceGetCount", unsafe { (api.device_count)(&raw mut count) })?;
    Ok(u32::try_from(count).unwrap_or(0))
}

fn raw_of(api: &Api, ordinal: u32) -> Result<c_int, GpuError> {
    let mut raw = 0;
    // SAFETY: room for one number.
    let status = unsafe { (api.device_get)(&raw mut raw, ordinal.cast_signed()) };
    api.check("cuDeviceGet", status)?;
    Ok(raw)
}

fn uuid_of(api: &Api, raw: c_int) -> Result<[u8; 16], GpuError> {
    let mut uuid = Uuid([0; 16]);
    // SAFETY: room for one identity.
    api.check("cuDeviceGetUuid", unsafe { (api.device_uuid)(&raw mut uuid, raw) })?;
    Ok(uuid.0)
}
