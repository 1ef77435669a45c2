//! What the end-to-end tests of corelane share.
//!
//! A test is one process with engines of its own; others are [`PeerProcess`]es, driven line by line. All that the tests
//! know of corelane is its public API and the bytes that it publishes (metadata, descriptors, the listening port).
//! Nothing here asserts a time: whatever is waited for may take [`BOUND`].

mod allocations;
mod buffer;
mod children;
mod forge;
mod gpu;
mod gpu_kernels;
mod gpu_sides;
pub mod hostile;
mod limits;
mod log;
mod near;
mod peer_process;
mod process;
mod proxy;
mod random;
mod script;
mod settings;
pub mod shared_memory;
mod slots;
mod sockets;
mod streams;
mod wait;

pub use allocations::{
    Beside, CountingAllocator, assert_allocation_free, exempt_harness, exempt_this_thread,
};
pub use buffer::{Buffer, POISON, pattern};
pub use children::{Killed, in_forked_child, not_run, skipped, start_with_id, wait_for_process};
pub use forge::{DescriptorField, device_keys, forge_descriptor, forge_metadata, forge_secret};
pub use gpu::{Cuda, FakeCuda, GpuBuffer, PinnedBuffer, gpus};
pub use gpu_kernels::{GpuKernels, WordRange};
pub use gpu_sides::{FarGpu, GPU_LEN, GpuSide, assert_bytes};
pub use log::Log;
pub use near::{Near, transport};
pub use peer_process::{PeerProcess, Target, from_hex, to_hex};
pub use process::{
    allowed_cores, listening_ports, mappings, mappings_of, open_files, pin_process, resident_bytes,
    resident_bytes_of, threads, threads_of, writable_ranges,
};
pub use proxy::{Passing, Proxy};
pub use random::Random;
pub use script::run_script;
pub use settings::{
    Configuration, apply, engine_on_a_known_port, local_config, needs_the_peer, rdma_config,
    tcp_config,
};
pub use slots::{Slots, block_holds, check_either_block, fill_block, watch};
pub use sockets::{free_port, reset, sockets_of};
pub use streams::{exchange, exchange_sizes, sized_payload};
pub use wait::{BOUND, collect, cut_short, end_of, eventually, kind, outcome, rounds};

/// Makes tests of functions that take a [`Configuration`], `local::NAME`, `rdma::NAME` and `tcp::NAME`: of what each transport
/// promises. Those of `rdma` are ignored unless they are asked for, on a machine with a device: in the rig (tests/rdma).
#[macro_export]
macro_rules! over_each_transport {
    ($($test:ident),+ $(,)?) => {
        $crate::over_each_transport!(@over local, local_config, $($test)+);
        $crate::over_each_transport!(@over tcp, tcp_config, $($test)+);
        mod rdma {
            $(
                #[test]
                #[ignore = "needs an RDMA device: tests/run.sh rdma"]
                fn $test() {
                    super::$test($crate::rdma_config);
                }
            )+
        }
    };
    (@over $transport:ident, $config:ident, $($test:ident)+) => {
        mod $transport {
            $(
                #[test]
                fn $test() {
                    super::$test($crate::$config);
                }
            )+
        }
    };
}

/// As `over_each_transport`, without RDMA: for tests that bound how long a lane may be silent, which where soft-RoCE is emulated is seconds,
/// or that are about sockets.
#[macro_export]
macro_rules! over_local_and_tcp {
    ($($test:ident),+ $(,)?) => {
        $crate::over_each_transport!(@over local, local_config, $($test)+);
        $crate::over_each_transport!(@over tcp, tcp_config, $($test)+);
    };
}

/// Starts the second process of a test.
#[macro_export]
macro_rules! peer_process {
    () => {
        $crate::PeerProcess::start(env!("CARGO_BIN_EXE_corelane-test-peer"))
    };
}

/// Starts a second process with one engine and one region that holds pattern 1: `(name, bytes, access, settings)`.
#[macro_export]
macro_rules! target {
    ($name:expr, $len:expr, $access:expr, $settings:expr) => {
        $crate::Target::start($crate::peer_process!(), $name, $len, $access, $settings)
    };
    ($name:expr, $len:expr) => {
        $crate::target!($name, $len, "read-write", "")
    };
}
