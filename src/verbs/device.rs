//! Devices, their ports and GIDs, protection domains, async events.

use std::ffi::CStr;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as sys;

use super::api::{Api, api};

/// A device that is open (`ibv_context`). Any thread.
pub(crate) struct Device {
    pub(super) api: &'static Api,
    context: NonNull<sys::ibv_context>,
    name: String,
    limits: Limits,
}

// SAFETY: the verbs functions that take a context are thread-safe (`man 3 ibv_open_device`, libibverbs' thread-safety
// statement); the name and the limits never change.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// What a device can do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) max_qp_wr: u32,
    pub(crate) max_sge: u32,
    /// Scatter entries of one RDMA READ.
    pub(crate) max_sge_rd: u32,
    pub(crate) max_cqe: u32,
    /// RDMA READs that one of our queue pairs may have outstanding.
    pub(crate) max_rd_atomic: u8,
    /// Those that it serves at a time.
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) ports: u8,
}

/// A GID, in network byte order: for RoCE an IP address, IPv4 in its IPv6 form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Gid(pub(crate) [u8; 16]);

impl std::fmt::Display for Gid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let address = std::net::Ipv6Addr::from(self.0);
        match address.to_ipv4_mapped() {
            Some(v4) => v4.fmt(f),
            None => address.fmt(f),
        }
    }
}

/// A port as it is now.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PortState {
    pub(crate) active: bool,
    /// Ethernet: addresses are GIDs, and every packet has a global route.
    pub(crate) ethernet: bool,
    pub(crate) lid: u16,
    /// The code of verbs: 1..=5 for 256..=4096 bytes.
    pub(crate) mtu: u8,
    pub(crate) max_msg_sz: u32,
    pub(crate) gids: u32,
}

/// Something happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AsyncEvent {
    /// The queue pair with this number is in error, or soon will be.
    QueuePair(u32),
    /// The completion queue with this name is broken: an overrun, or the device's own error.
    CompletionQueue(usize),
    PortDown(u8),
    PortUp(u8),
    /// GIDs, LIDs or keys of a port have changed.
    PortChanged(u8),
    /// The device does nothing any more.
    Fatal,
    Other,
}

/// The RDMA devices of this machine, by name.
///
/// # Errors
/// Why there can be none: the library is missing, or the kernel has no support.
pub(crate) fn devices() -> Result<Vec<String>, String> {
    with_devices(|_, list| list.iter().map(|(_, name)| name.clone()).collect::<Vec<_>>())
}

fn with_devices<R>(
    look: impl FnOnce(&'static Api, &[(*mut sys::ibv_device, String)]) -> R,
) -> Result<R, String> {
    let api = api()?;
    let mut count = 0;
    // SAFETY: `count` is ours; the list is freed below, and nothing of it is used afterwards.
    let list = unsafe { (api.ibv_get_device_list)(&raw mut count) };
    if list.is_null() {
        return Err(format!("asking for RDMA devices: {}", io::Error::last_os_error()));
    }
    let devices: Vec<_> = (0..usize::try_from(count).unwrap_or(0))
        .map(|index| {
            // SAFETY: the list has `count` devices, whose names live as long as it does.
            unsafe {
                let device = *list.add(index);
                let name = CStr::from_ptr((api.ibv_get_device_name)(device));
                (device, name.to_string_lossy().into_owned())
            }
        })
        .collect();
    let result = look(api, &devices);
    // SAFETY: it was returned by `ibv_get_device_list`, and is freed once. Devices that were opened stay valid.
    unsafe { (api.ibv_free_device_list)(list) };
    Ok(result)
}

impl Device {
    pub(crate) fn open(name: &str) -> Result<Arc<Self>, String> {
        with_devices(|api, list| {
            let (device, _) = list
                .iter()
                .find(|(_, known)| known == name)
                .ok_or_else(|| format!("there is no RDMA device `{name}`"))?;
            // SAFETY: the device is of the list, which lives until this closure returns.
            let context = NonNull::new(unsafe { (api.ibv_open_device)(*device) })
                .ok_or_else(|| format!("opening {name}: {}", io::Error::last_os_error()))?;
            let mut opened =
                Self { api, context, name: name.to_owned(), limits: Limits::default() };
            opened.limits = opened.query()?;
            opened.set_nonblocking().map_err(|e| format!("events of {name}: {e}"))?;
            Ok(Arc::new(opened))
        })?
    }

    fn query(&self) -> Result<Limits, String> {
        // SAFETY: plain data, for which zeros are valid.
        let mut attr: sys::ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, `attr` is ours.
        let code = unsafe { (self.api.ibv_query_device)(self.context.as_ptr(), &raw mut attr) };
        check(code).map_err(|e| format!("asking {} what it can do: {e}", self.name))?;
        let count = |value: i32| u32::try_from(value).unwrap_or(0);
        let byte = |value: i32| u8::try_from(value.clamp(0, 255)).unwrap_or(0);
        let max_sge = count(attr.max_sge).max(1);
        Ok(Limits {
            max_qp_wr: count(attr.max_qp_wr),
            max_sge,
            // Some providers leave it out.
            max_sge_rd: if attr.max_sge_rd > 0 { count(attr.max_sge_rd) } else { max_sge },
            max_cqe: count(attr.max_cqe),
            max_rd_atomic: byte(attr.max_qp_init_rd_atom).max(1),
            max_dest_rd_atomic: byte(attr.max_qp_rd_atom).max(1),
            ports: attr.phys_port_cnt.max(1),
        })
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        set_nonblocking(self.async_fd())
    }

    pub(super) fn context(&self) -> *mut sys::ibv_context {
        self.context.as_ptr()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The state of a port, counted from 1. A system call.
    pub(crate) fn port(&self, port: u8) -> Result<PortState, String> {
        // SAFETY: plain data, for which zeros are valid. The entry point fills the part of it that its version knows.
        let mut attr: sys::ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, `attr` is ours.
        let code = unsafe { (self.api.ibv_query_port)(self.context(), port, &raw mut attr) };
        check(code).map_err(|e| format!("{} port {port}: {e}", self.name))?;
        Ok(PortState {
            active: attr.state == sys::ibv_port_state::IBV_PORT_ACTIVE,
            ethernet: u32::from(attr.link_layer) == sys::IBV_LINK_LAYER_ETHERNET,
            lid: attr.lid,
            mtu: attr.active_mtu as u8,
            max_msg_sz: attr.max_msg_sz,
            gids: u32::try_from(attr.gid_tbl_len).unwrap_or(0),
        })
    }

    /// The GID at `index`; `None`: the place is empty.
    pub(crate) fn gid(&self, port: u8, index: u8) -> Option<Gid> {
        // SAFETY: plain data, for which zeros are valid.
        let mut gid: sys::ibv_gid = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, `gid` is ours.
        let code = unsafe {
            (self.api.ibv_query_gid)(self.context(), port, i32::from(index), &raw mut gid)
        };
        // SAFETY: all bytes of the union were set.
        let raw = unsafe { gid.raw };
        (code == 0 && raw != [0; 16]).then_some(Gid(raw))
    }

    /// Whether the GID at `index` is for RoCE version 2. What the kernel does not say counts as yes.
    pub(crate) fn is_roce_v2(&self, port: u8, index: u8) -> bool {
        let path = self.sysfs().join(format!("ports/{port}/gid_attrs/types/{index}"));
        std::fs::read_to_string(path).map_or(true, |kind| kind.trim() == "RoCE v2")
    }

    fn sysfs(&self) -> PathBuf {
        Path::new("/sys/class/infiniband").join(&self.name)
    }

    /// The NUMA node that the device is attached to; `None`: not known, or there is just one.
    pub(crate) fn numa_node(&self) -> Option<usize> {
        numa_node(&self.sysfs().join("device"))
    }

    fn async_fd(&self) -> RawFd {
        // SAFETY: the context is open.
        unsafe { (*self.context.as_ptr()).async_fd }
    }

    /// Readable when `next_event` has something.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: it is open as long as the context is.
        unsafe { BorrowedFd::borrow_raw(self.async_fd()) }
    }

    /// Takes an event; does not wait. One thread.
    pub(crate) fn next_event(&self) -> Option<AsyncEvent> {
        use sys as kind;
        // SAFETY: plain data, for which zeros are valid.
        let mut event: sys::ibv_async_event = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open, `event` is ours; the descriptor does not block.
        if unsafe { (self.api.ibv_get_async_event)(self.context(), &raw mut event) } != 0 {
            return None;
        }
        // SAFETY: which member of the union is set follows from the type. A queue pair that an event is about exists until
        // the event is acknowledged.
        let answer = unsafe {
            match event.event_type {
                kind::IBV_EVENT_QP_FATAL
                | kind::IBV_EVENT_QP_REQ_ERR
                | kind::IBV_EVENT_QP_ACCESS_ERR
                | kind::IBV_EVENT_PATH_MIG_ERR => AsyncEvent::QueuePair((*event.element.qp).qp_num),
                kind::IBV_EVENT_CQ_ERR => AsyncEvent::CompletionQueue(event.element.cq as usize),
                kind::IBV_EVENT_PORT_ERR => {
                    AsyncEvent::PortDown(event.element.port_num.cast_unsigned() as u8)
                }
                kind::IBV_EVENT_PORT_ACTIVE => {
                    AsyncEvent::PortUp(event.element.port_num.cast_unsigned() as u8)
                }
                kind::IBV_EVENT_GID_CHANGE
                | kind::IBV_EVENT_LID_CHANGE
                | kind::IBV_EVENT_PKEY_CHANGE => {
                    AsyncEvent::PortChanged(event.element.port_num.cast_unsigned() as u8)
                }
                kind::IBV_EVENT_DEVICE_FATAL => AsyncEvent::Fatal,
                _ => AsyncEvent::Other,
            }
        };
        // SAFETY: it was returned by `ibv_get_async_event`, and is acknowledged once.
        unsafe { (self.api.ibv_ack_async_event)(&raw mut event) };
        Some(answer)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_qp_wr: 0,
            max_sge: 1,
            max_sge_rd: 1,
            max_cqe: 0,
            max_rd_atomic: 1,
            max_dest_rd_atomic: 1,
            ports: 1,
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: whatever was made of it has held it, so that this is the last.
        unsafe { (self.api.ibv_close_device)(self.context.as_ptr()) };
    }
}

/// Memory and queue pairs that may be used together (`ibv_pd`). Any thread.
#[derive(Debug)]
pub(crate) struct ProtectionDomain {
    pd: NonNull<sys::ibv_pd>,
    pub(super) device: Arc<Device>,
}

// SAFETY: the functions that take a protection domain are thread-safe; it is never changed.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(crate) fn new(device: &Arc<Device>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open.
        let pd = unsafe { (device.api.ibv_alloc_pd)(device.context()) };
        let pd = NonNull::new(pd).ok_or_else(io::Error::last_os_error)?;
        Ok(Arc::new(Self { pd, device: device.clone() }))
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ibv_pd {
        self.pd.as_ptr()
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: memory regions and queue pairs hold it, so that this is the last use.
        unsafe { (self.device.api.ibv_dealloc_pd)(self.pd.as_ptr()) };
    }
}

/// Verbs functions return 0 or an error number.
pub(super) fn check(code: i32) -> io::Result<()> {
    match code {
        0 => Ok(()),
        code if code > 0 => Err(io::Error::from_raw_os_error(code)),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(super) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: two calls on a descriptor that its owner keeps open.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The NUMA node of a device in sysfs.
pub(crate) fn numa_node(device: &Path) -> Option<usize> {
    let text = std::fs::read_to_string(device.join("numa_node")).ok()?;
    // -1: not known.
    text.trim().parse().ok()
}
