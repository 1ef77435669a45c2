//! The functions of NIXL's C API that the tests use. `nixl-sys` keeps its bindings to itself, but it carries these
//! symbols: each finds the real one in libnixl_capi.so.

use std::ffi::{c_char, c_int, c_void};

// Linked for its symbols.
use nixl_sys as _;

/// A handle of the C API. Its first field is the pointer to a C++ object.
pub(crate) type Handle = *mut c_void;

/// The configuration of an agent.
#[repr(C)]
pub(crate) struct AgentConfig {
    pub(crate) progress_thread: bool,
    pub(crate) listen_thread: bool,
    pub(crate) listen_port: c_int,
    /// 0 is `NIXL_THREAD_SYNC_NONE`, 2 is `NIXL_THREAD_SYNC_RW`.
    pub(crate) thread_sync: u32,
    pub(crate) workers: u32,
    pub(crate) progress_delay_us: u64,
    pub(crate) listen_delay_us: u64,
    pub(crate) telemetry: bool,
}

unsafe extern "C" {
    pub(crate) fn nixl_capi_create_configured_agent(
        name: *const c_char,
        config: *const AgentConfig,
        agent: *mut Handle,
    ) -> c_int;
    pub(crate) fn nixl_capi_destroy_agent(agent: Handle) -> c_int;
    pub(crate) fn nixl_capi_create_backend(
        agent: Handle,
        plugin: *const c_char,
        params: Handle,
        backend: *mut Handle,
    ) -> c_int;
    pub(crate) fn nixl_capi_destroy_backend(backend: Handle) -> c_int;

    pub(crate) fn nixl_capi_create_params(params: *mut Handle) -> c_int;
    pub(crate) fn nixl_capi_params_add(
        params: Handle,
        key: *const c_char,
        value: *const c_char,
    ) -> c_int;
    pub(crate) fn nixl_capi_destroy_params(params: Handle) -> c_int;
    pub(crate) fn nixl_capi_get_plugin_params(
        agent: Handle,
        plugin: *const c_char,
        mems: *mut Handle,
        params: *mut Handle,
    ) -> c_int;
    pub(crate) fn nixl_capi_params_create_iterator(params: Handle, iterator: *mut Handle) -> c_int;
    pub(crate) fn nixl_capi_params_iterator_next(
        iterator: Handle,
        key: *mut *const c_char,
        value: *mut *const c_char,
        has_next: *mut bool,
    ) -> c_int;
    pub(crate) fn nixl_capi_params_destroy_iterator(iterator: Handle) -> c_int;
    pub(crate) fn nixl_capi_mem_list_size(list: Handle, size: *mut usize) -> c_int;
    pub(crate) fn nixl_capi_mem_list_get(list: Handle, index: usize, mem: *mut c_int) -> c_int;
    pub(crate) fn nixl_capi_destroy_mem_list(list: Handle) -> c_int;

    pub(crate) fn nixl_capi_create_opt_args(args: *mut Handle) -> c_int;
    pub(crate) fn nixl_capi_destroy_opt_args(args: Handle) -> c_int;
    pub(crate) fn nixl_capi_opt_args_add_backend(args: Handle, backend: Handle) -> c_int;
    pub(crate) fn nixl_capi_opt_args_set_notif_msg(
        args: Handle,
        data: *const c_void,
        len: usize,
    ) -> c_int;
    pub(crate) fn nixl_capi_opt_args_set_has_notif(args: Handle, has_notif: bool) -> c_int;

    pub(crate) fn nixl_capi_create_xfer_dlist(mem: c_int, list: *mut Handle) -> c_int;
    pub(crate) fn nixl_capi_destroy_xfer_dlist(list: Handle) -> c_int;
    pub(crate) fn nixl_capi_xfer_dlist_add_desc(
        list: Handle,
        addr: usize,
        len: usize,
        device: u64,
    ) -> c_int;
    pub(crate) fn nixl_capi_create_reg_dlist(mem: c_int, list: *mut Handle) -> c_int;
    pub(crate) fn nixl_capi_destroy_reg_dlist(list: Handle) -> c_int;
    pub(crate) fn nixl_capi_reg_dlist_add_desc(
        list: Handle,
        addr: usize,
        len: usize,
        device: u64,
        metadata: *const c_void,
        metadata_len: usize,
    ) -> c_int;

    pub(crate) fn nixl_capi_get_local_md(
        agent: Handle,
        data: *mut *mut c_void,
        len: *mut usize,
    ) -> c_int;
    pub(crate) fn nixl_capi_get_local_partial_md(
        agent: Handle,
        list: Handle,
        data: *mut *mut c_void,
        len: *mut usize,
        args: Handle,
    ) -> c_int;
    pub(crate) fn nixl_capi_load_remote_md(
        agent: Handle,
        data: *const c_void,
        len: usize,
        name: *mut *mut c_char,
    ) -> c_int;
    pub(crate) fn nixl_capi_check_remote_md(
        agent: Handle,
        name: *const c_char,
        list: Handle,
    ) -> c_int;

    pub(crate) fn nixl_capi_create_notif_map(map: *mut Handle) -> c_int;
    pub(crate) fn nixl_capi_destroy_notif_map(map: Handle) -> c_int;
    pub(crate) fn nixl_capi_get_notifs(agent: Handle, map: Handle, args: Handle) -> c_int;
    pub(crate) fn nixl_capi_notif_map_size(map: Handle, size: *mut usize) -> c_int;
    pub(crate) fn nixl_capi_notif_map_get_agent_at(
        map: Handle,
        index: usize,
        agent: *mut *const c_char,
    ) -> c_int;
    pub(crate) fn nixl_capi_notif_map_get_notifs_size(
        map: Handle,
        agent: *const c_char,
        size: *mut usize,
    ) -> c_int;
    pub(crate) fn nixl_capi_notif_map_get_notif(
        map: Handle,
        agent: *const c_char,
        index: usize,
        data: *mut *const c_void,
        len: *mut usize,
    ) -> c_int;

    pub(crate) fn nixl_capi_estimate_xfer_cost(
        agent: Handle,
        request: Handle,
        args: Handle,
        duration_us: *mut i64,
        margin_us: *mut i64,
        method: *mut c_int,
    ) -> c_int;
    pub(crate) fn nixl_capi_get_xfer_telemetry(
        agent: Handle,
        request: Handle,
        telemetry: *mut [u64; 5],
    ) -> c_int;

    pub(crate) fn nixl_capi_create_query_resp_list(list: *mut Handle) -> c_int;
    pub(crate) fn nixl_capi_destroy_query_resp_list(list: Handle) -> c_int;
    pub(crate) fn nixl_capi_query_resp_list_size(list: Handle, size: *mut usize) -> c_int;
    pub(crate) fn nixl_capi_query_resp_list_has_value(
        list: Handle,
        index: usize,
        has_value: *mut bool,
    ) -> c_int;
    pub(crate) fn nixl_capi_query_mem(
        agent: Handle,
        descs: Handle,
        response: Handle,
        args: Handle,
    ) -> c_int;
}
