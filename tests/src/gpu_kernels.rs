//! Kernels that fill memory of a GPU and check it there: what was copied is looked at by whoever it was copied for.

use std::ffi::{CStr, c_int, c_uint, c_void};

use crate::{Cuda, GpuBuffer};

const PTX: &str = concat!(include_str!("gpu_kernels.ptx"), "\0");
const THREADS: c_uint = 256;
const BLOCKS: c_uint = 64;
/// Of a range: the kernel reads four words.
const ENTRY_BYTES: usize = 16;

/// Words that were copied together: the first one here, the first one there, how many.
pub type WordRange = (u32, u32, u32);

/// The kernels on one GPU, in a stream of their own.
#[derive(Debug)]
pub struct GpuKernels {
    gpu: u32,
    fill: usize,
    check: usize,
    stream: usize,
    list: GpuBuffer,
    count: u32,
    wrong: GpuBuffer,
}

impl GpuKernels {
    /// Loads them; `ranges` is what [`GpuKernels::wrong`] looks at.
    pub fn new(gpu: u32, ranges: &[WordRange]) -> Self {
        let cuda = Cuda::get().expect("a GPU");
        let (mut module, mut stream) = (0usize, 0usize);
        cuda.call(gpu, "cuModuleLoadData", (&raw mut module, PTX.as_ptr(), 0usize));
        cuda.call(gpu, "cuStreamCreate", (&raw mut stream, 1 as c_uint, 0usize));
        let function = |name: &CStr| {
            let mut function = 0usize;
            cuda.call(gpu, "cuModuleGetFunction", (&raw mut function, module, name.as_ptr()));
            function
        };
        let list = GpuBuffer::new(gpu, (ranges.len() * ENTRY_BYTES).max(ENTRY_BYTES));
        let words = ranges.iter().flat_map(|&(here, there, words)| [here, there, words, 0]);
        list.write(0, &words.flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
        let wrong = GpuBuffer::new(gpu, 4);
        let (fill, check) = (function(c"corelane_test_fill"), function(c"corelane_test_check"));
        Self { gpu, fill, check, stream, list, count: ranges.len() as u32, wrong }
    }

    /// The first words of a buffer become what belongs to `seed`, and are there when this returns.
    pub fn fill(&self, memory: &GpuBuffer, words: u32, seed: u32) {
        let (mut base, mut words, mut seed) = (memory.base(), words, seed);
        let mut arguments: [*mut c_void; 3] =
            [(&raw mut base).cast(), (&raw mut words).cast(), (&raw mut seed).cast()];
        self.launch(self.fill, &mut arguments);
        self.wait();
    }

    /// How many words of the ranges are not what belongs to `seed`. The kernel is launched at once, whatever else is done.
    pub fn wrong(&self, memory: &GpuBuffer, seed: u32) -> u32 {
        let (mut base, mut list, mut count, mut seed, mut wrong) =
            (memory.base(), self.list.base(), self.count, seed, self.wrong.base());
        let cuda = Cuda::get().expect("a GPU");
        cuda.call4(self.gpu, "cuMemsetD8Async", (wrong, 0 as c_int, 4usize, self.stream));
        let mut arguments: [*mut c_void; 5] = [
            (&raw mut base).cast(),
            (&raw mut list).cast(),
            (&raw mut count).cast(),
            (&raw mut seed).cast(),
            (&raw mut wrong).cast(),
        ];
        self.launch(self.check, &mut arguments);
        self.wait();
        let found = self.wrong.read(0, 4);
        u32::from_le_bytes([found[0], found[1], found[2], found[3]])
    }

    fn launch(&self, function: usize, arguments: &mut [*mut c_void]) {
        type Launch = unsafe extern "C" fn(
            usize,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            usize,
            *mut *mut c_void,
            *mut *mut c_void,
        ) -> c_int;
        let cuda = Cuda::get().expect("a GPU");
        cuda.enter(self.gpu);
        let launch: Launch = cuda.symbol("cuLaunchKernel");
        // SAFETY: the arguments have the kernel's types, and are copied by the call; the memory is the tests'.
        let status = unsafe {
            let (list, none) = (arguments.as_mut_ptr(), std::ptr::null_mut());
            launch(function, BLOCKS, 1, 1, THREADS, 1, 1, 0, self.stream, list, none)
        };
        assert_eq!(status, 0, "cuLaunchKernel on GPU {}", self.gpu);
    }

    fn wait(&self) {
        let cuda = Cuda::get().expect("a GPU");
        cuda.call(self.gpu, "cuStreamSynchronize", (self.stream, 0usize, 0usize));
    }
}
