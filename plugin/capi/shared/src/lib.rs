//! `libcorelane.so`. All of it is in `corelane-capi`; a library of that crate itself could not have
//! the name that C programs expect, because the engine's crate has it.

pub use corelane_capi::*;
