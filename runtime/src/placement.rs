//! Which core a lane may, should and does run on.

mod claim;
mod cores;
mod quota;

pub use claim::{CoreClaim, auto_core, auto_core_near, claim_core, claimed_cores};
pub(crate) use cores::process_cores;
pub use cores::{
    CoreList, ParseCoreListError, allowed_cores, cores_of_numa_node, current_core, numa_distance,
    numa_node_of_core, numa_node_of_nic, pin_thread,
};
pub use quota::{cpu_quota, throttled_periods};
