//! The entry points of libibverbs, looked up at run time.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use ibverbs_sys as sys;
use libloading::os::unix::Library;

/// Where to find the library instead of the usual places: for tests and measurements with another provider.
const LIBRARY_VARIABLE: &str = "CORELANE_LIBIBVERBS";
const LIBRARY: &str = "libibverbs.so.1";

macro_rules! entry_points {
    (
        $(fn $name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)+
        optional: $(fn $optional:ident($($oarg:ident: $okind:ty),*) -> $oresult:ty;)+
    ) => {
        /// Addresses of functions of the library, which is never unloaded.
        pub(super) struct Api {
            $(pub(super) $name: unsafe extern "C" fn($($argument: $kind),*) -> $result,)+
            $(pub(super) $optional: Option<unsafe extern "C" fn($($oarg: $okind),*) -> $oresult>,)+
        }

        impl Api {
            fn look_up(library: &Library) -> Result<Self, String> {
                // SAFETY: the types are those that the manual pages of these functions declare; the library stays
                // loaded for the life of the process.
                unsafe {
                    Ok(Self {
                        $($name: *library
                            .get(concat!(stringify!($name), "\0").as_bytes())
                            .map_err(|_| concat!(stringify!($name), " is missing in it"))?,)+
                        $($optional: library
                            .get(concat!(stringify!($optional), "\0").as_bytes())
                            .ok()
                            .map(|symbol| *symbol),)+
                    })
                }
            }
        }
    };
}

entry_points! {
    fn ibv_get_device_list(count: *mut c_int) -> *mut *mut sys::ibv_device;
    fn ibv_free_device_list(list: *mut *mut sys::ibv_device) -> ();
    fn ibv_get_device_name(device: *mut sys::ibv_device) -> *const c_char;
    fn ibv_open_device(device: *mut sys::ibv_device) -> *mut sys::ibv_context;
    fn ibv_close_device(context: *mut sys::ibv_context) -> c_int;
    fn ibv_query_device(context: *mut sys::ibv_context, attr: *mut sys::ibv_device_attr) -> c_int;
    fn ibv_query_port(context: *mut sys::ibv_context, port: u8, attr: *mut sys::ibv_port_attr) -> c_int;
    fn ibv_query_gid(context: *mut sys::ibv_context, port: u8, index: c_int, gid: *mut sys::ibv_gid) -> c_int;
    fn ibv_get_async_event(context: *mut sys::ibv_context, event: *mut sys::ibv_async_event) -> c_int;
    fn ibv_ack_async_event(event: *mut sys::ibv_async_event) -> ();
    fn ibv_alloc_pd(context: *mut sys::ibv_context) -> *mut sys::ibv_pd;
    fn ibv_dealloc_pd(pd: *mut sys::ibv_pd) -> c_int;
    fn ibv_reg_mr(pd: *mut sys::ibv_pd, addr: *mut c_void, len: usize, access: c_int) -> *mut sys::ibv_mr;
    fn ibv_dereg_mr(mr: *mut sys::ibv_mr) -> c_int;
    fn ibv_create_comp_channel(context: *mut sys::ibv_context) -> *mut sys::ibv_comp_channel;
    fn ibv_destroy_comp_channel(channel: *mut sys::ibv_comp_channel) -> c_int;
    fn ibv_create_cq(context: *mut sys::ibv_context, cqe: c_int, user: *mut c_void, channel: *mut sys::ibv_comp_channel, vector: c_int) -> *mut sys::ibv_cq;
    fn ibv_destroy_cq(cq: *mut sys::ibv_cq) -> c_int;
    fn ibv_get_cq_event(channel: *mut sys::ibv_comp_channel, cq: *mut *mut sys::ibv_cq, user: *mut *mut c_void) -> c_int;
    fn ibv_ack_cq_events(cq: *mut sys::ibv_cq, count: c_uint) -> ();
    fn ibv_create_qp(pd: *mut sys::ibv_pd, attr: *mut sys::ibv_qp_init_attr) -> *mut sys::ibv_qp;
    fn ibv_modify_qp(qp: *mut sys::ibv_qp, attr: *mut sys::ibv_qp_attr, mask: c_int) -> c_int;
    fn ibv_destroy_qp(qp: *mut sys::ibv_qp) -> c_int;
    optional:
    fn ibv_reg_mr_iova2(pd: *mut sys::ibv_pd, addr: *mut c_void, len: usize, iova: u64, access: c_uint) -> *mut sys::ibv_mr;
    fn ibv_reg_dmabuf_mr(pd: *mut sys::ibv_pd, offset: u64, len: usize, iova: u64, fd: c_int, access: c_int) -> *mut sys::ibv_mr;
}

/// The library, loaded by whoever asks first.
pub(super) fn api() -> Result<&'static Api, String> {
    static API: OnceLock<Result<Api, String>> = OnceLock::new();
    API.get_or_init(load).as_ref().map_err(Clone::clone)
}

fn load() -> Result<Api, String> {
    let name = std::env::var(LIBRARY_VARIABLE).unwrap_or_else(|_| LIBRARY.to_owned());
    // Now and not lazily: a provider that lacks a symbol is found out here, not amid a transfer. It stays: providers are not
    // made to be unloaded.
    // SAFETY: loading runs the library's initialisers, as for every program that is linked with it.
    let library = unsafe { Library::open(Some(&name), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    let library = library.map_err(|_| format!("{name} not found"))?;
    let api = Api::look_up(&library).map_err(|missing| format!("{name}: {missing}"))?;
    std::mem::forget(library);
    Ok(api)
}
