//! One GPU: its primary context and the kernel in it.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::super::GpuError;
use super::api::{
    self, Api, Context, Function, INVALID_HANDLE, NOT_READY, Once, PEER_ACCESS_ALREADY_ENABLED,
    SUCCESS, Status, Stream, UNKNOWN, Uuid,
};
use super::table::Arena;

/// More GPUs than a process sees.
const MAX_DEVICES: usize = 64;
const STREAM_NON_BLOCKING: u32 = 1;
/// Calls of this thread neither fail because of a capture that goes on elsewhere in the process, nor spoil it.
const CAPTURE_RELAXED: c_int = 2;
/// How long the control plane waits for a GPU: what it enqueues takes 10 us.
pub(super) const SET_UP_PATIENCE: Duration = Duration::from_secs(5);

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
    /// Why it is of no use to this process any more.
    lost: OnceLock<GpuError>,
    /// Something was left to it that it has not ended. Calls that wait for it might never return.
    stuck: AtomicBool,
    /// The same, of what the control plane has enqueued; until that has ended.
    late: AtomicBool,
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

static DEVICES: [Once<Device>; MAX_DEVICES] = [const { Once::new() }; MAX_DEVICES];

/// The calling thread is in the device's context until this is dropped.
pub(super) struct Entered<'a> {
    api: &'a Api,
    /// How the thread was about captures before.
    capture: Option<c_int>,
    /// Contexts are of threads.
    _not_send: PhantomData<*mut c_void>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let (Some(mut mode), Some(exchange)) = (self.capture, self.api.exchange_capture_mode) {
            // SAFETY: room for one number; a mode that the driver has given.
            unsafe { exchange(&raw mut mode) };
        }
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
        slot.get_or_try(|| Self::open(api, ordinal))
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
            lost: OnceLock::new(),
            stuck: AtomicBool::new(false),
            late: AtomicBool::new(false),
        };
        match device.load_kernel() {
            Ok((kernel, setup)) => {
                device.kernel = kernel;
                device.setup = Mutex::new(setup);
                Ok(device)
            }
            Err(error) => {
                // It may be tried again: nothing of this try stays.
                // SAFETY: it was retained above, and is used no more.
                unsafe { (api.context_release)(raw) };
                Err(error)
            }
        }
    }

    fn load_kernel(&self) -> Result<(Function, Stream), GpuError> {
        let _entered = self.enter()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a text that ends in a zero; room for one handle.
        let status = unsafe { (self.api.module_load)(&raw mut module, KERNEL.as_ptr().cast()) };
        self.check("cuModuleLoadData", status)?;
        let mut kernel = std::ptr::null_mut();
        // SAFETY: the name ends in a zero; room for one handle.
        let status = unsafe {
            (self.api.module_function)(&raw mut kernel, module, c"corelane_copy".as_ptr())
        };
        let found = self.check("cuModuleGetFunction", status);
        found.and_then(|()| Ok((kernel, self.new_stream()?))).inspect_err(|_| {
            // SAFETY: nothing of it was ever launched.
            unsafe { (self.api.module_unload)(module) };
        })
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

    /// As [`Api::check`], for a call in this device's context: notes where it is lost.
    pub(super) fn check(&self, call: &'static str, status: Status) -> Result<(), GpuError> {
        if status == SUCCESS { Ok(()) } else { Err(self.error(call, status)) }
    }

    /// What a call has failed of.
    #[cold]
    pub(super) fn error(&self, call: &'static str, status: Status) -> GpuError {
        let error = self.api.error(call, status);
        if api::is_sticky(status) { self.lose(&error) } else { error }
    }

    /// It is of no use to this process from now on; the answer is what its users are told.
    pub(super) fn lose(&self, error: &GpuError) -> GpuError {
        let lost = self.lost.get_or_init(|| {
            tracing::error!(%error, gpu = self.ordinal, "a GPU is lost to this process");
            GpuError(format!(
                "GPU {} is lost to this process, which has to start again to use it: {error}",
                self.ordinal
            ))
        });
        lost.clone()
    }

    /// Why it is of no use to this process any more. One load.
    pub(crate) fn lost(&self) -> Option<&GpuError> {
        self.lost.get()
    }

    /// Something was given up that it had begun, and what that touches is left as it is.
    pub(super) fn set_stuck(&self) {
        if !self.stuck.swap(true, Ordering::AcqRel) {
            tracing::error!(
                gpu = self.ordinal,
                "a GPU does not end what it has begun: what that uses is not given back"
            );
        }
    }

    /// Whether memory and streams are better kept than given back, which waits for the GPU.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Acquire) || self.late.load(Ordering::Acquire)
    }

    /// Makes this thread's calls go to the device.
    pub(super) fn enter(&self) -> Result<Entered<'static>, GpuError> {
        if let Some(lost) = self.lost() {
            return Err(lost.clone());
        }
        // SAFETY: a living context.
        let status = unsafe { (self.api.context_push)(self.context) };
        self.check("cuCtxPushCurrent", status)?;
        let capture = self.api.exchange_capture_mode.and_then(|exchange| {
            let mut mode = CAPTURE_RELAXED;
            // SAFETY: room for one number. The mode is the thread's, and is put back.
            (unsafe { exchange(&raw mut mode) } == SUCCESS).then_some(mode)
        });
        Ok(Entered { api: self.api, capture, _not_send: PhantomData })
    }

    /// A stream that waits for no other one, before those of the model. The thread has entered.
    pub(super) fn new_stream(&self) -> Result<Stream, GpuError> {
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: room for two numbers.
        let status = unsafe { (self.api.context_priorities)(&raw mut least, &raw mut greatest) };
        self.check("cuCtxGetStreamPriorityRange", status)?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: room for one handle.
        let status =
            unsafe { (self.api.stream_create)(&raw mut stream, STREAM_NON_BLOCKING, greatest) };
        self.check("cuStreamCreateWithPriority", status)?;
        Ok(stream)
    }

    /// Enqueues work by `work` and waits for it, with patience: for the control plane.
    ///
    /// # Errors
    /// The driver's. Where [`is_stuck`](Self::is_stuck) says so then, the work may be done at any time.
    pub(super) fn set_up(
        &self,
        patience: Duration,
        work: impl FnOnce(Stream) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        let stream = self.setup.lock().unwrap_or_else(PoisonError::into_inner);
        let _entered = self.enter()?;
        if self.is_stuck() {
            if self.query(*stream)?.is_none() {
                return Err(self.does_not_answer());
            }
            // It was late, and what it was late with is over. What that touched was left alone for good.
            self.late.store(false, Ordering::Release);
        }
        let done = work(*stream);
        let patience = Instant::now() + patience;
        // Also after an error: what was enqueued before may name the caller's memory.
        while self.query(*stream)?.is_none() {
            if Instant::now() >= patience {
                tracing::warn!(gpu = self.ordinal, "a GPU does not answer");
                self.late.store(true, Ordering::Release);
                return Err(self.does_not_answer());
            }
            std::thread::yield_now();
        }
        done
    }

    /// Asks the driver whether it is lost, where nobody was told so yet.
    ///
    /// # Errors
    /// It is.
    pub(crate) fn check_alive(&self) -> Result<(), GpuError> {
        let _entered = self.enter()?;
        // Who holds it is asking, too.
        let Ok(stream) = self.setup.try_lock() else { return Ok(()) };
        self.query(*stream).map(drop)
    }

    pub(super) fn does_not_answer(&self) -> GpuError {
        GpuError(format!("GPU {} does not end what it has begun", self.ordinal))
    }

    /// Whether all that was enqueued in a stream has ended. Of what a call may fail without anything having ended, nothing is
    /// learnt: `None`, as for work under way. The thread has entered.
    ///
    /// # Errors
    /// The device is lost: nothing runs in it any more.
    pub(super) fn query(&self, stream: Stream) -> Result<Option<()>, GpuError> {
        // SAFETY: a living stream.
        match unsafe { (self.api.stream_query)(stream) } {
            SUCCESS => Ok(Some(())),
            NOT_READY => Ok(None),
            // Streams go with their context; and what has no name is no way to go on.
            status @ (INVALID_HANDLE | UNKNOWN) => {
                Err(self.lose(&self.api.error("cuStreamQuery", status)))
            }
            status if api::is_sticky(status) => Err(self.error("cuStreamQuery", status)),
            status => {
                tracing::debug!(status, gpu = self.ordinal, "cuStreamQuery does not say");
                Ok(None)
            }
        }
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
        self.check("cuDeviceCanAccessPeer", status)?;
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
            return Err(self.error("cuCtxEnablePeerAccess", status));
        }
        *peers |= 1 << other.ordinal;
        Ok(())
    }
}

/// How many GPUs this process sees; `None`: nobody has initialised the driver.
pub(super) fn count_if_initialised() -> Option<u32> {
    count(api::loaded().ok()?).ok()
}

/// The same, and initialises it.
pub(super) fn count_all() -> Result<u32, GpuError> {
    count(api::ready()?)
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
