//! `corelane-bench nixl`: backends of NIXL side by side, driven through NIXL's C API with no Python in the path.
//!
//! ```text
//!   nixl ──lines (pipe)──> initiator: agent, backend, one thread that posts and polls without yielding
//!   rounds, ratios            │ metadata goes through the parent
//!        └─lines (pipe)──> target:    agent, backend, one thread that polls for notifications, or sleeps
//! ```
//!
//! Both sides are fresh processes for every backend in every round: no backend sees what another left behind, and the
//! environment variables of one reach only its own processes. A baseline has two processes of its own likewise, which do
//! bare copies instead. The crate nixl-sys loads libnixl_capi.so at run time. Its
//! bindings need libclang to build, so all that touches it sits behind the feature `nixl`.

#[cfg(feature = "nixl")]
mod agent;
mod backend;
mod case;
mod choice;
#[cfg(feature = "nixl")]
mod contents;
mod cost_table;
#[cfg(feature = "nixl")]
mod driver;
#[cfg(all(feature = "nixl", test))]
mod fake;
mod fault;
#[cfg(feature = "nixl")]
mod initiator;
#[cfg(any(feature = "nixl", test))]
mod layout;
#[cfg(feature = "nixl")]
mod load;
mod nixlbench;
mod options;
mod pair;
#[cfg(feature = "nixl")]
mod raw;
#[cfg(feature = "nixl")]
mod replay;
mod report;
mod rounds;
#[cfg(feature = "nixl")]
mod sabotage;
#[cfg(feature = "nixl")]
mod side;
#[cfg(any(feature = "nixl", test))]
mod stamp;
mod summary;
mod tally;
#[cfg(feature = "nixl")]
mod target;
#[cfg(feature = "nixl")]
mod timing;
mod trace;
mod wire;

#[cfg(feature = "nixl")]
pub(crate) use agent::{NixlAgent, Prepared, nixl_version};
pub(crate) use backend::BackendSpec;
pub(crate) use case::load_id;
pub(crate) use choice::{BackendArgs, ensure_distinct, ensure_driver};
#[cfg(feature = "nixl")]
pub(crate) use driver::Driver;
pub(crate) use fault::{Fault, FaultKind};
#[cfg(test)]
pub(crate) use nixlbench::SegmentType;
pub(crate) use options::NixlArgs;
#[cfg(test)]
pub(crate) use report::tests::compared as nixl_compared;
pub(crate) use report::{NixlResults, SCHEMA, SCHEMA_VERSION};
pub(crate) use rounds::compare;
#[cfg(feature = "nixl")]
pub(crate) use side::serve as serve_side;
pub(crate) use tally::Part;
pub(crate) use wire::NixlSystem;
