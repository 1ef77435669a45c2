//! GPU memory: which device it is on, how another process reaches it, and the copies that a device makes.
//!
//! The one place that decides the vendor: the rest of the engine uses what is exported here. There is CUDA; another one
//! would be a module beside it with the same types.
//!
//! The driver is found at run time. A process that never registers GPU memory does not initialise it, but to find that there is no GPU.

mod bounce;
mod cuda;
mod plan;

pub(crate) use bounce::{BLOCK_BYTES, Block, Bounce, Slab};
pub(crate) use cuda::{
    Allocation, CallerStream, Device, Flight, LaneGpu, LanePart, Launch, allocation_of,
    forget_mappings, gpu_is_present, holds_device_memory,
};
#[cfg(feature = "rdma")]
pub(crate) use cuda::{DmaBuf, Look, Visibility};
pub(crate) use plan::{DeviceBuilder, DevicePlan, Settings};

/// What the driver said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct GpuError(pub(crate) String);
