//! `libibverbs.so.1` for tests of GPUDirect RDMA without a GPU: everything is done by the real library, whose devices get at the memory
//! of the GPUs of `tests/fake-cuda` in the two ways in which real ones get at real ones.
//!
//! A dmabuf of that driver is a file, and the position in it where the exported range begins; what registers it is the mapping of
//! the file. `FAKE_VERBS_DMABUF=off`: refused, as by devices that take none. `FAKE_VERBS_PEERMEM=off`: addresses of GPUs are such that
//! nothing can be pinned at, as without the kernel module nvidia_peermem. `FAKE_VERBS_NO_GPU=rxe1`: this device has neither way. The
//! variables are looked at with every registration.

#![cfg(feature = "rdma")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the manual pages of verbs say what each caller has to keep to"
)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use ibverbs_sys as sys;
use libloading::os::unix::Library;

/// Another real library than the system's.
const REAL: &str = "FAKE_VERBS_LIBRARY";

fn real() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let name = std::env::var(REAL).unwrap_or_else(|_| "libibverbs.so.1".to_owned());
        // SAFETY: loading runs the library's initialisers.
        let library = unsafe { Library::open(Some(&name), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        library.unwrap_or_else(|error| panic!("{name}: {error}"))
    })
}

macro_rules! forwarded {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)+) => {
        mod original {
            use super::*;
            $(
                pub(super) unsafe fn $name($($argument: $kind),*) -> $result {
                    type Call = unsafe extern "C" fn($($kind),*) -> $result;
                    static CALL: OnceLock<Call> = OnceLock::new();
                    let call = CALL.get_or_init(|| {
                        // SAFETY: the type is that of the manual page; the library is never unloaded.
                        let symbol = unsafe { real().get::<Call>(stringify!($name).as_bytes()) };
                        *symbol.unwrap_or_else(|error| panic!("{error}"))
                    });
                    // SAFETY: what the caller promises.
                    unsafe { call($($argument),*) }
                }
            )+
        }
    };
}

macro_rules! exported {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)+) => {
        forwarded! {
            $(fn $name($($argument: $kind),*) -> $result;)+
            fn ibv_reg_mr(pd: *mut sys::ibv_pd, addr: *mut c_void, len: usize, access: c_int) -> *mut sys::ibv_mr;
            fn ibv_reg_mr_iova2(pd: *mut sys::ibv_pd, addr: *mut c_void, len: usize, iova: u64, access: c_uint) -> *mut sys::ibv_mr;
        }
        $(
            #[unsafe(no_mangle)]
            #[allow(missing_docs)]
            pub unsafe extern "C" fn $name($($argument: $kind),*) -> $result {
                // SAFETY: what the caller promises.
                unsafe { original::$name($($argument),*) }
            }
        )+
    };
}

exported! {
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
}

fn is_off(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|value| value == "off")
}

fn fail(error: c_int) -> *mut sys::ibv_mr {
    // SAFETY: the place of this thread's error number.
    unsafe { *libc::__errno_location() = error };
    std::ptr::null_mut()
}

/// Whether the device of a protection domain gets at no memory of a GPU.
///
/// # Safety
/// The protection domain is one.
unsafe fn is_without_gpu(pd: *mut sys::ibv_pd) -> bool {
    // SAFETY: the caller's promise; its device lives as long, and a device has a name that ends in a zero.
    let name = unsafe { CStr::from_ptr(original::ibv_get_device_name((*(*pd).context).device)) };
    std::env::var("FAKE_VERBS_NO_GPU").is_ok_and(|without| name.to_bytes() == without.as_bytes())
}

/// Where the memory of a fake GPU can be touched; `None`: it is none, or the kernel module is not there.
///
/// # Safety
/// As for `is_without_gpu`.
unsafe fn place(pd: *mut sys::ibv_pd, address: u64, len: usize) -> Option<u64> {
    // SAFETY: the caller's promise.
    if is_off("FAKE_VERBS_PEERMEM") || unsafe { is_without_gpu(pd) } {
        return None;
    }
    let flags = libc::RTLD_NOW | libc::RTLD_LOCAL | libc::RTLD_NOLOAD;
    // SAFETY: nothing is loaded.
    let driver = unsafe { Library::open(Some("libcuda.so.1"), flags) }.ok()?;
    // SAFETY: the type of the function in tests/fake-cuda.
    let place = unsafe {
        driver
            .get::<unsafe extern "C" fn(u64, usize) -> u64>(b"corelane_fake_cuda_place")
            .map(|call| call(address, len))
    };
    place.ok().filter(|place| *place != 0)
}

#[unsafe(no_mangle)]
#[allow(missing_docs)]
pub unsafe extern "C" fn ibv_reg_mr_iova2(
    pd: *mut sys::ibv_pd,
    addr: *mut c_void,
    len: usize,
    iova: u64,
    access: c_uint,
) -> *mut sys::ibv_mr {
    // SAFETY: what the caller promises; the other place is of the same memory.
    unsafe {
        let addr = place(pd, addr as u64, len).map_or(addr, |place| place as *mut c_void);
        original::ibv_reg_mr_iova2(pd, addr, len, iova, access)
    }
}

#[unsafe(no_mangle)]
#[allow(missing_docs)]
pub unsafe extern "C" fn ibv_reg_mr(
    pd: *mut sys::ibv_pd,
    addr: *mut c_void,
    len: usize,
    access: c_int,
) -> *mut sys::ibv_mr {
    // SAFETY: what the caller promises; the other place is of the same memory.
    unsafe {
        match place(pd, addr as u64, len) {
            Some(place) => {
                let place = place as *mut c_void;
                original::ibv_reg_mr_iova2(pd, place, len, addr as u64, access.cast_unsigned())
            }
            None => original::ibv_reg_mr(pd, addr, len, access),
        }
    }
}

#[unsafe(no_mangle)]
#[allow(missing_docs)]
pub unsafe extern "C" fn ibv_reg_dmabuf_mr(
    pd: *mut sys::ibv_pd,
    offset: u64,
    len: usize,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut sys::ibv_mr {
    // SAFETY: what the caller promises.
    if is_off("FAKE_VERBS_DMABUF") || unsafe { is_without_gpu(pd) } {
        return fail(libc::EOPNOTSUPP);
    }
    // SAFETY: looks at a descriptor.
    let (begin, page) =
        unsafe { (libc::lseek(fd, 0, libc::SEEK_CUR), libc::sysconf(libc::_SC_PAGESIZE)) };
    if begin < 0 || page <= 0 {
        return fail(libc::EBADF);
    }
    let within = offset % page as u64;
    let (at, whole) = (begin + (offset - within) as libc::off_t, len + within as usize);
    // SAFETY: a new mapping, where the kernel likes it.
    let mapped = unsafe {
        let open = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), whole, open, libc::MAP_SHARED, fd, at)
    };
    if mapped == libc::MAP_FAILED {
        return fail(libc::EINVAL);
    }
    // SAFETY: a range of the mapping. Registering pins its pages, which are the file's: the mapping itself may go.
    unsafe {
        let addr = mapped.cast::<u8>().add(within as usize).cast::<c_void>();
        let mr = original::ibv_reg_mr_iova2(pd, addr, len, iova, access.cast_unsigned());
        let error = *libc::__errno_location();
        libc::munmap(mapped, whole);
        if mr.is_null() { fail(error) } else { mr }
    }
}
