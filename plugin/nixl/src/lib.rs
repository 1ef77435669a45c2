//! `libplugin_CORELANE.so`: corelane as a backend of NIXL.
//!
//! The backend itself is C++ (`cpp/`), because NIXL's plugin interface is; it only translates to the
//! C API of `corelane-capi`, which is linked in. What NIXL calls by name is exported here, since
//! Rust decides what a shared library of its exports.

#![allow(non_snake_case)]

use std::ffi::c_void;

// Its functions are called from C++.
extern crate corelane_capi as _;

unsafe extern "C" {
    fn corelane_nixl_plugin_init() -> *mut c_void;
    fn corelane_nixl_plugin_fini();
}

/// Describes the plugin to NIXL; null (with a line in the log) where NIXL is too old.
#[unsafe(no_mangle)]
pub extern "C" fn nixl_plugin_init() -> *mut c_void {
    // SAFETY: no preconditions; the answer lives as long as the library.
    unsafe { corelane_nixl_plugin_init() }
}

/// Called by NIXL when it unloads the plugin. Engines are destroyed by their agents before.
#[unsafe(no_mangle)]
pub extern "C" fn nixl_plugin_fini() {
    // SAFETY: no preconditions.
    unsafe { corelane_nixl_plugin_fini() }
}
