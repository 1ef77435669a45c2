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
mod mapping;
mod memory;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use caller::CallerStream;
pub(crate) use device::Device;
#[cfg(feature = "rdma")]
pub(crate) use direct::{DmaBuf, Visibility};
pub(crate) use lane::{Flight, LaneGpu, LanePart, Launch};
pub(crate) use mapping::{Mapping, forget_mappings, open_mapping};
#[cfg(feature = "rdma")]
pub(crate) use memory::Look;
pub(crate) use memory::{
    Allocation, HostMemory, Watched, allocation_of, first_unpinned, holds_device_memory,
    is_device_memory, is_open_to_peers,
};
pub(crate) use table::{Table, Tile, Tiles};

/// Whether the driver is there, and a GPU that it lets this process use. Where the system has files of GPUs, that is believed, and
/// the driver is not initialised: children that are forked afterwards could not use it.
pub(crate) fn gpu_is_present() -> bool {
    if api::loaded().is_err() {
        return false;
    }
    match device::count_if_initialised() {
        Some(count) => count > 0,
        None if has_device_files() && !are_hidden() => true,
        // Nothing to lose, mostly: it says that there are none.
        None => device::count_all().is_ok_and(|count| count > 0),
    }
}

fn has_device_files() -> bool {
    const NAMES: [&str; 4] = ["nvidia", "dxg", "nvhost-gpu", "nvgpu"];
    let is_gpu =
        |name: &str| NAMES.contains(&name.trim_end_matches(|digit: char| digit.is_ascii_digit()));
    let files = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    files.into_iter().any(|file| file.file_name().to_str().is_some_and(is_gpu))
}

/// Whether the process is told to see no GPU.
fn are_hidden() -> bool {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES");
    visible.is_ok_and(|list| list.trim().is_empty() || list.trim().starts_with('-'))
}
