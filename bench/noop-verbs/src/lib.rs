//! `libibverbs.so.1` for measurements: one device, `noop0`, whose work requests complete when they are polled and move nothing.
//!
//! What is left is what the engine spends on a transfer by itself. `corelane-bench posting` starts the engine with it; no
//! program is linked with it.
//!
//! For tests it breaks as real devices do (tests/tests/broken_device.rs): see `faults`.

#![cfg(feature = "rdma")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the manual pages of verbs say what each caller has to keep to"
)]

mod faults;

use std::collections::VecDeque;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicU32, Ordering};

use ibverbs_sys as sys;

/// As `struct ibv_wc` of verbs.h.
#[repr(C)]
struct WorkCompletion {
    wr_id: u64,
    status: u32,
    opcode: u32,
    vendor_err: u32,
    byte_len: u32,
    imm_data: u32,
    qp_num: u32,
    src_qp: u32,
    wc_flags: u32,
    pkey_index: u16,
    slid: u16,
    sl: u8,
    dlid_path_bits: u8,
}

#[repr(C)]
struct CompletionQueue {
    public: sys::ibv_cq,
    /// IDs of requests that were to tell of their end, or failed, and how they ended.
    done: VecDeque<(u64, u32)>,
    /// Cannot be polled any more.
    is_broken: bool,
    /// Is about to be reported; nothing comes out of it any more.
    is_silent: bool,
}

#[repr(C)]
struct QueuePair {
    public: sys::ibv_qp,
    done: *mut CompletionQueue,
    /// A request has failed: all that follow are flushed.
    has_failed: bool,
}

/// Handed out, never used up.
static NUMBERS: AtomicU32 = AtomicU32::new(1);

fn number() -> u32 {
    NUMBERS.fetch_add(1, Ordering::Relaxed) & 0xff_ffff
}

fn zeroed<T>() -> Box<T> {
    // SAFETY: only for structures of C, for which zeros are valid.
    unsafe { Box::new(std::mem::zeroed()) }
}

static NAME: &[u8] = b"noop0\0";

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_list(count: *mut c_int) -> *mut *mut sys::ibv_device {
    // SAFETY: the caller's place for the count.
    unsafe { *count = 1 };
    // Its contents are looked at by nobody but this library.
    let device: *mut sys::ibv_device = NAME.as_ptr().cast_mut().cast();
    Box::into_raw(Box::new([device, std::ptr::null_mut()])).cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_free_device_list(list: *mut *mut sys::ibv_device) {
    // SAFETY: made by `ibv_get_device_list`.
    drop(unsafe { Box::from_raw(list.cast::<[*mut sys::ibv_device; 2]>()) });
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_name(_: *mut sys::ibv_device) -> *const c_char {
    NAME.as_ptr().cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_open_device(device: *mut sys::ibv_device) -> *mut sys::ibv_context {
    let mut context: Box<sys::ibv_context> = zeroed();
    context.device = device;
    // SAFETY: makes a descriptor.
    context.async_fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    faults::read();
    context.ops.post_send = Some(post_send);
    context.ops.post_recv = Some(post_recv);
    context.ops.poll_cq = Some(poll_cq);
    context.ops.req_notify_cq = Some(req_notify_cq);
    Box::into_raw(context)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_close_device(context: *mut sys::ibv_context) -> c_int {
    // SAFETY: made by `ibv_open_device`, and closed once.
    unsafe {
        libc::close((*context).async_fd);
        drop(Box::from_raw(context));
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_device(
    _: *mut sys::ibv_context,
    attr: *mut sys::ibv_device_attr,
) -> c_int {
    // SAFETY: the caller's structure. The limits are those of a ConnectX-7.
    let attr = unsafe { &mut *attr };
    attr.max_qp_wr = 32_768;
    attr.max_sge = 30;
    attr.max_sge_rd = 30;
    attr.max_cqe = 4_194_303;
    attr.max_qp_rd_atom = 16;
    attr.max_qp_init_rd_atom = 16;
    attr.phys_port_cnt = 1;
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_port(
    _: *mut sys::ibv_context,
    _: u8,
    attr: *mut sys::ibv_port_attr,
) -> c_int {
    // SAFETY: the caller's structure.
    let attr = unsafe { &mut *attr };
    attr.state = sys::ibv_port_state::IBV_PORT_ACTIVE;
    attr.active_mtu = 5;
    attr.max_msg_sz = 1 << 30;
    attr.gid_tbl_len = 1;
    attr.link_layer = sys::IBV_LINK_LAYER_ETHERNET as u8;
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_gid(
    _: *mut sys::ibv_context,
    _: u8,
    _: c_int,
    gid: *mut sys::ibv_gid,
) -> c_int {
    let address = std::net::Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped();
    // SAFETY: the caller's structure.
    unsafe { (*gid).raw = address.octets() };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_async_event(
    context: *mut sys::ibv_context,
    event: *mut sys::ibv_async_event,
) -> c_int {
    let Some(cq) = faults::next_event() else { return -1 };
    let mut told = 0u64;
    // SAFETY: the descriptor is the context's, the event the caller's.
    unsafe {
        libc::read((*context).async_fd, (&raw mut told).cast(), size_of_val(&told));
        (*event).event_type = sys::IBV_EVENT_CQ_ERR;
        (*event).element.cq = cq as *mut sys::ibv_cq;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_async_event(_: *mut sys::ibv_async_event) {}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_alloc_pd(context: *mut sys::ibv_context) -> *mut sys::ibv_pd {
    let mut pd: Box<sys::ibv_pd> = zeroed();
    pd.context = context;
    Box::into_raw(pd)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dealloc_pd(pd: *mut sys::ibv_pd) -> c_int {
    // SAFETY: made by `ibv_alloc_pd`, and given back once.
    drop(unsafe { Box::from_raw(pd) });
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr(
    pd: *mut sys::ibv_pd,
    addr: *mut c_void,
    len: usize,
    _: c_int,
) -> *mut sys::ibv_mr {
    let mut mr: Box<sys::ibv_mr> = zeroed();
    (mr.pd, mr.addr, mr.length) = (pd, addr, len);
    (mr.lkey, mr.rkey) = (number(), number());
    Box::into_raw(mr)
}

/// As far as a file of any kind can be a dmabuf: the range has to lie in it.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_dmabuf_mr(
    pd: *mut sys::ibv_pd,
    offset: u64,
    len: usize,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut sys::ibv_mr {
    // SAFETY: looks at a descriptor.
    let size = unsafe { libc::lseek(fd, 0, libc::SEEK_END) };
    let end = offset.checked_add(len as u64);
    if len == 0 || size < 0 || end.is_none_or(|end| end > size.cast_unsigned()) {
        // SAFETY: the place of this thread's error number.
        unsafe { *libc::__errno_location() = if size < 0 { libc::EBADF } else { libc::EINVAL } };
        return std::ptr::null_mut();
    }
    // SAFETY: what the caller promises.
    unsafe { ibv_reg_mr(pd, iova as *mut c_void, len, access) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dereg_mr(mr: *mut sys::ibv_mr) -> c_int {
    // SAFETY: made by `ibv_reg_mr`, and given back once.
    drop(unsafe { Box::from_raw(mr) });
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_comp_channel(
    context: *mut sys::ibv_context,
) -> *mut sys::ibv_comp_channel {
    let mut channel: Box<sys::ibv_comp_channel> = zeroed();
    channel.context = context;
    // SAFETY: makes a descriptor.
    channel.fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    Box::into_raw(channel)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_comp_channel(channel: *mut sys::ibv_comp_channel) -> c_int {
    // SAFETY: made by `ibv_create_comp_channel`, and given back once.
    unsafe {
        libc::close((*channel).fd);
        drop(Box::from_raw(channel));
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_cq(
    context: *mut sys::ibv_context,
    entries: c_int,
    _: *mut c_void,
    channel: *mut sys::ibv_comp_channel,
    _: c_int,
) -> *mut sys::ibv_cq {
    // SAFETY: zeros are valid for the structure of C; the queue is written over at once, without being dropped.
    let mut public: sys::ibv_cq = unsafe { std::mem::zeroed() };
    (public.context, public.channel, public.cqe) = (context, channel, entries);
    let done = VecDeque::with_capacity(usize::try_from(entries).unwrap_or(0));
    let queue = CompletionQueue { public, done, is_broken: false, is_silent: false };
    Box::into_raw(Box::new(queue)).cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_cq(cq: *mut sys::ibv_cq) -> c_int {
    // SAFETY: made by `ibv_create_cq`, and given back once.
    drop(unsafe { Box::from_raw(cq.cast::<CompletionQueue>()) });
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_cq_event(
    _: *mut sys::ibv_comp_channel,
    _: *mut *mut sys::ibv_cq,
    _: *mut *mut c_void,
) -> c_int {
    -1
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_cq_events(_: *mut sys::ibv_cq, _: c_uint) {}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_qp(
    pd: *mut sys::ibv_pd,
    attr: *mut sys::ibv_qp_init_attr,
) -> *mut sys::ibv_qp {
    // SAFETY: zeros are valid for the structure of C; the caller's domain and attributes exist.
    let (mut public, context, cq) = unsafe {
        let public: sys::ibv_qp = std::mem::zeroed();
        (public, (*pd).context, (*attr).send_cq)
    };
    (public.context, public.pd, public.send_cq, public.qp_num) = (context, pd, cq, number());
    Box::into_raw(Box::new(QueuePair { public, done: cq.cast(), has_failed: false })).cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_modify_qp(
    _: *mut sys::ibv_qp,
    _: *mut sys::ibv_qp_attr,
    _: c_int,
) -> c_int {
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_qp(qp: *mut sys::ibv_qp) -> c_int {
    // SAFETY: made by `ibv_create_qp`, and given back once.
    drop(unsafe { Box::from_raw(qp.cast::<QueuePair>()) });
    0
}

/// Walks the chain, as a provider has to, and keeps the IDs of those that tell of their end.
unsafe extern "C" fn post_send(
    qp: *mut sys::ibv_qp,
    mut request: *mut sys::ibv_send_wr,
    _: *mut *mut sys::ibv_send_wr,
) -> c_int {
    // SAFETY: made by `ibv_create_qp`; its completion queue outlives it, and one thread uses both.
    let (pair, queue) = unsafe {
        let pair = &mut *qp.cast::<QueuePair>();
        let queue = &mut *pair.done;
        (pair, queue)
    };
    let may_fail = faults::are_asked_for();
    while !request.is_null() {
        // SAFETY: the caller's chain.
        let wr = unsafe { &*request };
        if may_fail && fails(pair, queue, wr) {
            // It has told of itself, or nothing will.
        } else if wr.send_flags & sys::ibv_send_flags::IBV_SEND_SIGNALED.0 != 0 {
            queue.done.push_back((wr.wr_id, sys::ibv_wc_status::IBV_WC_SUCCESS));
        }
        request = wr.next;
    }
    0
}

/// Whether a request is not carried out.
#[cold]
fn fails(pair: &mut QueuePair, queue: &mut CompletionQueue, wr: &sys::ibv_send_wr) -> bool {
    use sys::ibv_wr_opcode as opcode;
    if pair.has_failed {
        queue.done.push_back((wr.wr_id, sys::ibv_wc_status::IBV_WC_WR_FLUSH_ERR));
        return true;
    }
    if !matches!(wr.opcode, opcode::IBV_WR_RDMA_READ | opcode::IBV_WR_RDMA_WRITE) {
        return false;
    }
    match faults::next() {
        None => return false,
        Some(faults::Fault::Status(status)) => {
            pair.has_failed = true;
            queue.done.push_back((wr.wr_id, status));
        }
        Some(faults::Fault::Poll) => queue.is_broken = true,
        Some(faults::Fault::Event) => {
            queue.is_silent = true;
            // SAFETY: the context is open as long as its queue pairs exist.
            let fd = unsafe { (*pair.public.context).async_fd };
            faults::report((&raw const queue.public) as usize, fd);
        }
    }
    true
}

unsafe extern "C" fn post_recv(
    _: *mut sys::ibv_qp,
    _: *mut sys::ibv_recv_wr,
    _: *mut *mut sys::ibv_recv_wr,
) -> c_int {
    0
}

unsafe extern "C" fn poll_cq(cq: *mut sys::ibv_cq, most: c_int, out: *mut sys::ibv_wc) -> c_int {
    // SAFETY: made by `ibv_create_cq`, polled by one thread.
    let queue = unsafe { &mut *cq.cast::<CompletionQueue>() };
    if queue.is_broken {
        return -1;
    }
    if queue.is_silent {
        return 0;
    }
    let mut count = 0;
    while count < most
        && let Some((wr_id, status)) = queue.done.pop_front()
    {
        let completion = WorkCompletion {
            wr_id,
            status,
            opcode: 0,
            vendor_err: 0,
            byte_len: 0,
            imm_data: 0,
            qp_num: 0,
            src_qp: 0,
            wc_flags: 0,
            pkey_index: 0,
            slid: 0,
            sl: 0,
            dlid_path_bits: 0,
        };
        // SAFETY: the caller has room for `most`, in the layout of verbs.h.
        unsafe { out.cast::<WorkCompletion>().offset(count as isize).write(completion) };
        count += 1;
    }
    count
}

unsafe extern "C" fn req_notify_cq(_: *mut sys::ibv_cq, _: c_int) -> c_int {
    0
}
