//! GPUs of the CUDA driver.
//!
//! Everything runs in the devices' primary contexts, which the CUDA runtime and so `PyTorch` use: addresses are the same, and
//! kernels run beside the model's. Calls are made from whatever thread drives a lane: each brings its context and puts the
//! one that was there back. The driver's default stream is never used: it would wait for the model, and the model for it.

mod api;
mod caller;
mod device;
mod direct;
mod lane;
mod memory;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use caller::CallerStream;
pub(crate) use device::Device;
#[cfg(feature = "rdma")]
pub(crate) use direct::{DmaBuf, Visibility};
pub(crate) use lane::{Flight, LaneGpu, Launch};
#[cfg(feature = "rdma")]
pub(crate) use memory::Look;
pub(crate) use memory::{
    Allocation, HostMemory, Mapping, Watched, allocation_of, forget_mappings, holds_device_memory,
    is_device_memory, is_pinned_host, open_mapping,
};
pub(crate) use table::{Table, Tile, Tiles};

/// Whether the driver is there; nothing of it is initialised.
pub(crate) fn driver_is_present() -> bool {
    api::loaded().is_ok()
}
