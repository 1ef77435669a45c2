//! The C API of corelane: the functions behind `plugin/capi/include/corelane.h`.
//!
//! Every function returns a [`corelane_status`], never lets a panic out, and takes handles that are
//! numbers: one that is stale, of another kind, or made up is answered with
//! `CORELANE_ERR_INVALID_HANDLE`. A handle lookup costs two uncontended atomic operations.
//!
//! The header is generated from this crate by cbindgen; a test compares the two
//! (`CORELANE_UPDATE_HEADER=1 cargo test -p corelane-capi` writes it anew).

#![allow(non_camel_case_types, clippy::missing_safety_doc)]

mod allocation;
mod engine;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod handles;
mod log;
mod memory;
mod notification;
mod options;
mod peer;
mod prepare;
mod raw;
mod stats;
mod status;
mod transfer;

pub use engine::*;
pub use handles::{
    corelane_conn_t, corelane_desc_t, corelane_engine_t, corelane_region_t, corelane_xfer_t,
};
pub use memory::*;
pub use notification::*;
pub use options::{
    corelane_option, corelane_option_at, corelane_option_count, corelane_option_info,
};
pub use peer::*;
pub use prepare::*;
pub use stats::*;
pub use status::{corelane_last_error, corelane_status, corelane_status_name};
pub use transfer::*;
