//! Memory of GPUs, by the driver itself and without anything of the engine: what cases fill and check, and the bare copy between
//! two GPUs. The driver is found at run time.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::OnceLock;

use anyhow::{Result, bail, ensure};
use libloading::os::unix::Library;
use serde::{Deserialize, Serialize};

use crate::parent::Refusal;
use crate::units::{from_hex, to_hex};

const LIBRARY: &str = "libcuda.so.1";
const NOT_READY: c_int = 600;
const STREAM_NON_BLOCKING: c_uint = 1;
const LAZY_PEER_ACCESS: c_uint = 1;

type Context = usize;
type Stream = usize;

/// What names an allocation to other processes.
#[repr(C)]
#[derive(Clone, Copy)]
struct IpcHandle([u8; 64]);

macro_rules! driver {
    ($(fn $name:ident = $symbol:literal ($($kind:ty),*);)+) => {
        struct Driver {
            $($name: unsafe extern "C" fn($($kind),*) -> c_int,)+
            /// Of each GPU; kept until the process ends.
            contexts: Vec<Context>,
        }

        impl Driver {
            fn look_up(library: &Library) -> Result<Self, String> {
                // SAFETY: the types are those of the driver's manual; the library is never unloaded.
                unsafe {
                    Ok(Self {
                        $($name: *library
                            .get($symbol.as_bytes())
                            .map_err(|_| concat!($symbol, " is missing in it"))?,)+
                        contexts: Vec::new(),
                    })
                }
            }
        }
    };
}

driver! {
    fn init = "cuInit"(c_uint);
    fn device_count = "cuDeviceGetCount"(*mut c_int);
    fn device = "cuDeviceGet"(*mut c_int, c_int);
    fn retain = "cuDevicePrimaryCtxRetain"(*mut Context, c_int);
    fn enter = "cuCtxSetCurrent"(Context);
    fn allocate = "cuMemAlloc_v2"(*mut u64, usize);
    fn free = "cuMemFree_v2"(u64);
    fn set = "cuMemsetD8_v2"(u64, u8, usize);
    fn to_gpu = "cuMemcpyHtoD_v2"(u64, *const c_void, usize);
    fn from_gpu = "cuMemcpyDtoH_v2"(*mut c_void, u64, usize);
    fn copy = "cuMemcpyAsync"(u64, u64, usize, Stream);
    fn new_stream = "cuStreamCreate"(*mut Stream, c_uint);
    fn destroy_stream = "cuStreamDestroy_v2"(Stream);
    fn is_idle = "cuStreamQuery"(Stream);
    fn wait = "cuCtxSynchronize"();
    fn export = "cuIpcGetMemHandle"(*mut IpcHandle, u64);
    fn open = "cuIpcOpenMemHandle_v2"(*mut u64, IpcHandle, c_uint);
    fn close = "cuIpcCloseMemHandle"(u64);
}

fn check(call: &str, status: c_int) -> Result<()> {
    ensure!(status == 0, "{call} of the GPU's driver fails with error {status}");
    Ok(())
}

fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    let driver = DRIVER.get_or_init(|| load().map_err(|error| format!("{error:#}")));
    driver.as_ref().map_err(|why| Refusal(format!("memory of GPUs: {why}")).into())
}

fn load() -> Result<Driver> {
    // SAFETY: loading runs the library's initialisers, as for every program that is linked with it.
    let Ok(library) = (unsafe { Library::new(LIBRARY) }) else {
        bail!("{LIBRARY} not found: this takes an NVIDIA GPU and its driver");
    };
    let mut driver = Driver::look_up(&library).map_err(anyhow::Error::msg)?;
    std::mem::forget(library);
    let mut count = 0;
    // SAFETY: places for the results, of the types that the manual gives.
    unsafe {
        check("cuInit", (driver.init)(0))?;
        check("cuDeviceGetCount", (driver.device_count)(&raw mut count))?;
        for ordinal in 0..count {
            let (mut device, mut context) = (0, 0);
            check("cuDeviceGet", (driver.device)(&raw mut device, ordinal))?;
            check("cuDevicePrimaryCtxRetain", (driver.retain)(&raw mut context, device))?;
            driver.contexts.push(context);
        }
    }
    ensure!(count > 0, "the driver is there, and no GPU");
    Ok(driver)
}

impl Driver {
    fn context(&self, gpu: u32) -> Result<Context> {
        let context = self.contexts.get(gpu as usize).copied();
        let count = self.contexts.len();
        context.ok_or_else(|| Refusal(format!("there is no GPU {gpu}: there are {count}")).into())
    }

    /// Makes this thread's calls go to a GPU.
    fn enter(&self, gpu: u32) -> Result<Context> {
        let context = self.context(gpu)?;
        // SAFETY: a living context.
        check("cuCtxSetCurrent", unsafe { (self.enter)(context) })?;
        Ok(context)
    }
}

/// Refuses, in words for the user, where there is no driver or no such GPU.
pub(crate) fn ensure_gpu(gpu: u32) -> Result<()> {
    driver()?.context(gpu).map(drop)
}

/// Memory of a GPU: of this process, or mapped from another.
pub(crate) struct Vram {
    gpu: u32,
    base: u64,
    len: usize,
    is_mapped: bool,
}

/// Where another process finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VramAddress {
    gpu: u32,
    handle: String,
}

impl Vram {
    /// Allocates `len` bytes, zeroed.
    pub(crate) fn new(gpu: u32, len: usize) -> Result<Self> {
        let driver = driver()?;
        driver.enter(gpu)?;
        let mut base = 0;
        // SAFETY: room for an address; then the bytes that were just allocated.
        unsafe {
            let status = (driver.allocate)(&raw mut base, len);
            check(&format!("cuMemAlloc of {len} bytes"), status)?;
            let memory = Self { gpu, base, len, is_mapped: false };
            check("cuMemsetD8", (driver.set)(base, 0, len))?;
            check("cuCtxSynchronize", (driver.wait)())?;
            Ok(memory)
        }
    }

    pub(crate) fn gpu(&self) -> u32 {
        self.gpu
    }

    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// Copies bytes in, and returns when they are there.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let driver = driver()?;
        self.enter(driver, offset, bytes.len())?;
        // SAFETY: within the allocation (checked), which nothing else touches between passes.
        unsafe {
            let from = bytes.as_ptr().cast();
            check("cuMemcpyHtoD", (driver.to_gpu)(self.base + offset, from, bytes.len()))?;
            check("cuCtxSynchronize", (driver.wait)())
        }
    }

    /// Copies bytes out.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let driver = driver()?;
        self.enter(driver, offset, bytes.len())?;
        // SAFETY: within the allocation (checked); room for as many bytes.
        let status = unsafe {
            (driver.from_gpu)(bytes.as_mut_ptr().cast(), self.base + offset, bytes.len())
        };
        check("cuMemcpyDtoH", status)
    }

    fn enter(&self, driver: &Driver, offset: u64, len: usize) -> Result<()> {
        let end = offset.checked_add(len as u64);
        ensure!(
            end.is_some_and(|end| end <= self.len as u64),
            "{offset}+{len} leaves the GPU's memory"
        );
        driver.enter(self.gpu).map(drop)
    }

    /// Lets other processes map it.
    pub(crate) fn address(&self) -> Result<VramAddress> {
        let driver = driver()?;
        driver.enter(self.gpu)?;
        let mut handle = IpcHandle([0; 64]);
        // SAFETY: room for a handle.
        let status = unsafe { (driver.export)(&raw mut handle, self.base) };
        check("cuIpcGetMemHandle", status)?;
        Ok(VramAddress { gpu: self.gpu, handle: to_hex(&handle.0) })
    }

    /// Maps memory of another process that sees the same GPUs, for a GPU of this one: it reaches the other's memory directly
    /// where the driver lets it.
    pub(crate) fn open(address: &VramAddress, gpu: u32, len: usize) -> Result<Self> {
        let driver = driver()?;
        driver.context(address.gpu)?;
        driver.enter(gpu)?;
        let bytes = from_hex(&address.handle).unwrap_or_default();
        let Ok(handle) = <[u8; 64]>::try_from(bytes) else { bail!("this is no handle of memory") };
        let mut base = 0;
        // SAFETY: room for an address; the driver checks the handle.
        let status = unsafe { (driver.open)(&raw mut base, IpcHandle(handle), LAZY_PEER_ACCESS) };
        check("cuIpcOpenMemHandle", status)?;
        Ok(Self { gpu, base, len, is_mapped: true })
    }
}

impl Drop for Vram {
    fn drop(&mut self) {
        let Ok(driver) = driver() else { return };
        if driver.enter(self.gpu).is_ok() {
            // SAFETY: it was allocated or mapped so, and is used no more. An error leaves nothing to be done.
            unsafe {
                if self.is_mapped { (driver.close)(self.base) } else { (driver.free)(self.base) }
            };
        }
    }
}

/// Bare copies between GPUs, a call for each block, in a stream of their own.
pub(crate) struct PeerCopies {
    blocks: Vec<(u64, u64)>,
    len: usize,
    /// The GPU in whose context they are enqueued: the initiator's.
    gpu: u32,
    stream: Stream,
}

impl PeerCopies {
    /// Of blocks of `len` bytes from `from` to `to`, which lie inside (checked by the caller).
    pub(crate) fn new(
        gpu: u32,
        (to, from): (&Vram, &Vram),
        blocks: Vec<(u64, u64)>,
        len: usize,
    ) -> Result<Self> {
        let driver = driver()?;
        driver.enter(gpu)?;
        let mut stream = 0;
        // SAFETY: room for a handle.
        let status = unsafe { (driver.new_stream)(&raw mut stream, STREAM_NON_BLOCKING) };
        check("cuStreamCreate", status)?;
        let blocks = blocks.into_iter().map(|(t, f)| (to.base + t, from.base + f)).collect();
        Ok(Self { blocks, len, gpu, stream })
    }

    /// Moves the bytes; they are there when it returns.
    #[inline]
    pub(crate) fn run(&self) -> Result<()> {
        let driver = driver()?;
        driver.enter(self.gpu)?;
        for &(to, from) in &self.blocks {
            // SAFETY: both ends lie in memory (checked when the list was made) that the owner of this value keeps.
            let status = unsafe { (driver.copy)(to, from, self.len, self.stream) };
            check("cuMemcpyAsync", status)?;
        }
        loop {
            // SAFETY: a living stream.
            match unsafe { (driver.is_idle)(self.stream) } {
                NOT_READY => std::hint::spin_loop(),
                status => return check("cuStreamQuery", status),
            }
        }
    }
}

impl Drop for PeerCopies {
    fn drop(&mut self) {
        if let Ok(driver) = driver()
            && driver.enter(self.gpu).is_ok()
        {
            // SAFETY: nothing runs in it. An error leaves nothing to be done.
            unsafe { (driver.destroy_stream)(self.stream) };
        }
    }
}
