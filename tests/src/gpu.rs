//! Memory of GPUs, for tests: allocated, filled and looked at by the driver itself, without anything of corelane.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use corelane::{Access, Engine, Error, LocalSegment, MemoryKind, Region};
use libloading::os::unix::Library;

use crate::POISON;

type Call<A, B, C> = unsafe extern "C" fn(A, B, C) -> c_int;

/// The driver. Everything happens in the primary contexts, as with the CUDA runtime.
pub struct Cuda {
    library: Library,
    contexts: Vec<usize>,
}

impl Cuda {
    /// The driver, if this machine has one and a GPU.
    pub fn get() -> Option<&'static Self> {
        static CUDA: OnceLock<Option<Cuda>> = OnceLock::new();
        CUDA.get_or_init(Self::open).as_ref()
    }

    fn open() -> Option<Self> {
        // SAFETY: loading the driver runs its initialisers.
        let library = unsafe { Library::new("libcuda.so.1") }.ok()?;
        let mut cuda = Self { library, contexts: Vec::new() };
        // SAFETY: types as in the driver's manual, here and below; each pointer has room for what is stored.
        unsafe {
            if cuda.symbol::<unsafe extern "C" fn(c_uint) -> c_int>("cuInit")(0) != 0 {
                return None;
            }
            let mut count = 0;
            let count_devices: unsafe extern "C" fn(*mut c_int) -> c_int =
                cuda.symbol("cuDeviceGetCount");
            count_devices(&raw mut count);
            let get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int = cuda.symbol("cuDeviceGet");
            let retain: unsafe extern "C" fn(*mut usize, c_int) -> c_int =
                cuda.symbol("cuDevicePrimaryCtxRetain");
            for ordinal in 0..count {
                let (mut device, mut context) = (0, 0);
                assert_eq!(get(&raw mut device, ordinal), 0);
                assert_eq!(retain(&raw mut context, device), 0, "the context of GPU {ordinal}");
                cuda.contexts.push(context);
            }
        }
        (!cuda.contexts.is_empty()).then_some(cuda)
    }

    /// Whether it is the one of `tests/fake-cuda`.
    pub fn is_fake(&self) -> bool {
        // SAFETY: the function is not called.
        unsafe { self.library.get::<unsafe extern "C" fn()>("corelane_fake_cuda") }.is_ok()
    }

    /// How often the fake driver has done something: `flushes`, `synchronised`.
    pub fn fake_count(&self, what: &str) -> u64 {
        let count: unsafe extern "C" fn() -> u64 =
            self.symbol(&format!("corelane_fake_cuda_{what}"));
        // SAFETY: no pointers.
        unsafe { count() }
    }

    /// The switches of the one of `tests/fake-cuda`. Says so on standard error if it is another: the test is skipped.
    pub fn fake() -> Option<FakeCuda> {
        let fake = Self::get().filter(|cuda| cuda.is_fake()).map(FakeCuda);
        if fake.is_none() {
            eprintln!("SKIPPED: needs the driver of tests/fake-cuda (tests/run.sh fake-gpu)");
        }
        fake
    }

    /// Runs `work` while a stream of that GPU is captured into a graph, in the mode in which the whole process may make no call
    /// that is unsafe meanwhile, as `PyTorch` does for CUDA graphs. Panics if something has spoilt the capture.
    pub fn capturing<R>(&self, gpu: u32, work: impl FnOnce() -> R) -> R {
        let (mut stream, mut graph) = (0usize, 0usize);
        self.call(gpu, "cuStreamCreate", (&raw mut stream, 1 as c_uint, 0usize));
        self.call(gpu, "cuStreamBeginCapture_v2", (stream, 0 as c_int, 0usize));
        let done = work();
        self.call(gpu, "cuStreamEndCapture", (stream, &raw mut graph, 0usize));
        self.call(gpu, "cuGraphDestroy", (graph, 0usize, 0usize));
        self.call(gpu, "cuStreamDestroy_v2", (stream, 0usize, 0usize));
        done
    }

    pub(crate) fn symbol<T: Copy>(&self, name: &str) -> T {
        // SAFETY: the caller names the type that the driver's manual gives.
        unsafe { *self.library.get::<T>(name).unwrap_or_else(|error| panic!("{name}: {error}")) }
    }

    /// Calls a function of three arguments in a GPU's context; panics if it fails.
    pub(crate) fn call<A, B, C>(&self, gpu: u32, name: &str, (a, b, c): (A, B, C)) {
        self.enter(gpu);
        let call: Call<A, B, C> = self.symbol(name);
        // SAFETY: as the manual says of these functions; the callers' pointers are good.
        let status = unsafe { call(a, b, c) };
        assert_eq!(status, 0, "{name} on GPU {gpu}");
    }

    /// As `call`, of four.
    pub(crate) fn call4<A, B, C, D>(&self, gpu: u32, name: &str, (a, b, c, d): (A, B, C, D)) {
        self.enter(gpu);
        let call: unsafe extern "C" fn(A, B, C, D) -> c_int = self.symbol(name);
        // SAFETY: as above.
        let status = unsafe { call(a, b, c, d) };
        assert_eq!(status, 0, "{name} on GPU {gpu}");
    }

    /// Makes this thread's calls go to a GPU.
    pub(crate) fn enter(&self, gpu: u32) {
        let set: unsafe extern "C" fn(usize) -> c_int = self.symbol("cuCtxSetCurrent");
        // SAFETY: a living context.
        assert_eq!(unsafe { set(self.contexts[gpu as usize]) }, 0);
    }

    fn wait(&self) {
        let wait: unsafe extern "C" fn() -> c_int = self.symbol("cuCtxSynchronize");
        // SAFETY: no pointers.
        assert_eq!(unsafe { wait() }, 0);
    }
}

/// What tests can do to the driver of `tests/fake-cuda`, in this process.
#[derive(Clone, Copy)]
pub struct FakeCuda(&'static Cuda);

impl FakeCuda {
    /// A GPU does nothing while it is held.
    pub fn hold(self, gpu: u32, held: bool) {
        let hold: unsafe extern "C" fn(c_int, c_int) = self.0.symbol("corelane_fake_hold");
        // SAFETY: no pointers.
        unsafe { hold(gpu.cast_signed(), c_int::from(held)) };
    }

    /// A GPU is lost after so much more work: from then on its calls fail with this error.
    pub fn lose(self, gpu: u32, status: i32, after: u64) {
        let lose: unsafe extern "C" fn(c_int, c_int, u64) = self.0.symbol("corelane_fake_lose");
        // SAFETY: no pointers.
        unsafe { lose(gpu.cast_signed(), status, after) };
    }

    /// The next calls of a function fail with this error.
    pub fn refuse(self, name: &CStr, status: i32, count: u64) {
        self.refuse_later(name, status, 0, count);
    }

    /// As `refuse`, after some more calls.
    pub fn refuse_later(self, name: &CStr, status: i32, before: u64, count: u64) {
        let refuse: unsafe extern "C" fn(*const c_char, c_int, u64, u64) =
            self.0.symbol("corelane_fake_refuse");
        // SAFETY: a text that ends in a zero.
        unsafe { refuse(name.as_ptr(), status, before, count) };
    }

    /// Whether all calls were made that `refuse` has spoken of.
    pub fn has_refused(self, name: &CStr) -> bool {
        let left: unsafe extern "C" fn(*const c_char) -> u64 =
            self.0.symbol("corelane_fake_to_refuse");
        // SAFETY: a text that ends in a zero.
        unsafe { left(name.as_ptr()) == 0 }
    }

    /// How many calls of a function were made and not refused.
    pub fn calls(self, name: &CStr) -> u64 {
        let calls: unsafe extern "C" fn(*const c_char) -> u64 =
            self.0.symbol("corelane_fake_calls");
        // SAFETY: a text that ends in a zero.
        unsafe { calls(name.as_ptr()) }
    }
}

/// How many GPUs there are. Says so on standard error if fewer than `needed`: the test is skipped.
pub fn gpus(needed: usize) -> Option<usize> {
    let count = Cuda::get().map_or(0, |cuda| cuda.contexts.len());
    if count < needed {
        eprintln!("SKIPPED: needs {needed} GPUs, and this machine has {count}");
        return None;
    }
    Some(count)
}

/// Memory of a GPU, poison at first.
#[derive(Debug)]
pub struct GpuBuffer {
    gpu: u32,
    base: u64,
    len: usize,
    freed: bool,
}

impl GpuBuffer {
    /// Allocates it; there is such a GPU.
    pub fn new(gpu: u32, len: usize) -> Self {
        let mut base = 0u64;
        Self::cuda().call(gpu, "cuMemAlloc_v2", (&raw mut base, len, 0usize));
        let buffer = Self { gpu, base, len, freed: false };
        buffer.poison();
        buffer
    }

    /// As `new`, out of the GPU's pool: memory that no other GPU reaches, nor another process.
    pub fn of_pool(gpu: u32, len: usize) -> Self {
        let mut base = 0u64;
        Self::cuda().call(gpu, "cuMemAllocAsync", (&raw mut base, len, 0usize));
        Self::cuda().wait();
        let buffer = Self { gpu, base, len, freed: false };
        buffer.poison();
        buffer
    }

    fn cuda() -> &'static Cuda {
        Cuda::get().expect("a GPU")
    }

    /// All of it becomes poison.
    pub fn poison(&self) {
        Self::cuda().call(self.gpu, "cuMemsetD8_v2", (self.base, POISON, self.len));
        Self::cuda().wait();
    }

    /// Whose it is.
    pub fn gpu(&self) -> u32 {
        self.gpu
    }

    /// Its address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Registers all of it.
    ///
    /// # Errors
    /// The engine's.
    pub fn register(&self, engine: &Engine, access: Access) -> Result<Region, Error> {
        self.register_part(engine, (0, self.len), access)
    }

    /// Registers a part of it: where it begins, and its length.
    ///
    /// # Errors
    /// The engine's.
    pub fn register_part(
        &self,
        engine: &Engine,
        (offset, len): (usize, usize),
        access: Access,
    ) -> Result<Region, Error> {
        assert!(offset + len <= self.len);
        let kind = MemoryKind::Vram { device: self.gpu };
        let base = self.base + offset as u64;
        // SAFETY: it lives until the test has ended, and only engines and the driver touch it.
        unsafe { engine.register_kind(base, len as u64, kind, access) }
    }

    /// A part of it.
    pub fn segment(&self, offset: usize, len: usize) -> LocalSegment {
        LocalSegment { addr: self.base + offset as u64, len: len as u64 }
    }

    /// Copies bytes in, and waits until they are there.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        let at = self.base + offset as u64;
        Self::cuda().call(
            self.gpu,
            "cuMemcpyHtoD_v2",
            (at, bytes.as_ptr().cast::<c_void>(), bytes.len()),
        );
        Self::cuda().wait();
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len);
        let mut bytes = vec![0u8; len];
        let at = self.base + offset as u64;
        Self::cuda().call(
            self.gpu,
            "cuMemcpyDtoH_v2",
            (bytes.as_mut_ptr().cast::<c_void>(), at, len),
        );
        bytes
    }

    /// Gives it back, registered or not.
    pub fn free(&mut self) {
        if !std::mem::replace(&mut self.freed, true) {
            Self::cuda().call(self.gpu, "cuMemFree_v2", (self.base, 0usize, 0usize));
        }
    }
}

impl Drop for GpuBuffer {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.free();
        }
    }
}

/// Pinned host memory.
#[derive(Debug)]
pub struct PinnedBuffer {
    base: *mut u8,
    len: usize,
    freed: bool,
}

impl PinnedBuffer {
    /// Allocates it, for all GPUs; poison at first.
    pub fn new(len: usize) -> Self {
        const PORTABLE: c_uint = 1;
        Self::with_flags(len, PORTABLE)
    }

    /// As `new`, write-combined: GPUs do not have it where the host has it.
    pub fn write_combined(len: usize) -> Self {
        const PORTABLE_MAPPED_WRITE_COMBINED: c_uint = 1 | 2 | 4;
        Self::with_flags(len, PORTABLE_MAPPED_WRITE_COMBINED)
    }

    fn with_flags(len: usize, flags: c_uint) -> Self {
        let mut base = std::ptr::null_mut::<u8>();
        GpuBuffer::cuda().call(0, "cuMemHostAlloc", (&raw mut base, len, flags));
        // SAFETY: so many bytes were just allocated.
        unsafe { std::ptr::write_bytes(base, POISON, len) };
        Self { base, len, freed: false }
    }

    /// Gives it back, registered or not.
    pub fn free(&mut self) {
        if !std::mem::replace(&mut self.freed, true) {
            GpuBuffer::cuda().call(0, "cuMemFreeHost", (self.base, 0usize, 0usize));
        }
    }

    /// Its address.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// All bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: nobody else touches it while a test looks.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.free();
        }
    }
}
