//! The part of verbs that transport `rdma` needs: small, and safe to use.
//!
//! Types, constants and the layout of the provider's function table are those of `ibverbs-sys`. Entry points are looked up
//! in `libibverbs.so.1` when the first device is asked for, so that whatever contains this module starts on a machine
//! without it. Posting and polling go through the provider's function table, as the inline functions of `verbs.h` do.
//!
//! Objects hold what they depend on: a queue pair its completion queue and protection domain, these their device. So none is
//! destroyed while the kernel would refuse it. Names are those of the verbs manual pages (`man 7 rdma`, `ibv_create_qp(3)`).

mod api;
mod device;
mod memory;
mod queue;

pub(crate) use device::{AsyncEvent, Device, Gid, ProtectionDomain, devices, numa_node};
pub(crate) use memory::{MemoryAccess, MemoryRegion};
pub(crate) use queue::{
    Completion, CompletionChannel, CompletionQueue, Connect, QueuePair, QueuePairCaps, Receive,
    SendList, WorkStatus,
};
