//! Completion queues and reliable-connection queue pairs.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as sys;

use super::device::{Device, Gid, ProtectionDomain, check, set_nonblocking};

/// Says when a completion queue that was armed has something (`ibv_comp_channel`).
#[derive(Debug)]
pub(crate) struct CompletionChannel {
    channel: NonNull<sys::ibv_comp_channel>,
    device: Arc<Device>,
}

// SAFETY: the functions that take a channel are thread-safe.
unsafe impl Send for CompletionChannel {}
// SAFETY: as above.
unsafe impl Sync for CompletionChannel {}

impl CompletionChannel {
    pub(crate) fn new(device: &Arc<Device>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open.
        let channel = unsafe { (device.api.ibv_create_comp_channel)(device.context()) };
        let channel = NonNull::new(channel).ok_or_else(io::Error::last_os_error)?;
        let channel = Self { channel, device: device.clone() };
        set_nonblocking(channel.raw_fd())?;
        Ok(Arc::new(channel))
    }

    fn raw_fd(&self) -> RawFd {
        // SAFETY: the channel exists; its descriptor never changes.
        unsafe { self.channel.as_ref().fd }
    }

    /// Readable when `take_events` has something.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: it is open as long as the channel is.
        unsafe { BorrowedFd::borrow_raw(self.raw_fd()) }
    }

    /// Takes what it has said; the completion queues are polled next. Does not wait.
    pub(crate) fn take_events(&self) {
        loop {
            let (mut cq, mut user) = (std::ptr::null_mut(), std::ptr::null_mut());
            let get = self.device.api.ibv_get_cq_event;
            // SAFETY: the channel exists and does not block; the places are ours. A queue that an event is about exists
            // until the event is acknowledged, which is done at once.
            unsafe {
                if get(self.channel.as_ptr(), &raw mut cq, &raw mut user) != 0 {
                    return;
                }
                (self.device.api.ibv_ack_cq_events)(cq, 1);
            }
        }
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: completion queues hold it, so that this is the last use.
        unsafe { (self.device.api.ibv_destroy_comp_channel)(self.channel.as_ptr()) };
    }
}

/// A completion queue (`ibv_cq`). One thread at a time polls it.
#[derive(Debug)]
pub(crate) struct CompletionQueue {
    cq: NonNull<sys::ibv_cq>,
    poll: unsafe extern "C" fn(*mut sys::ibv_cq, i32, *mut sys::ibv_wc) -> i32,
    arm: unsafe extern "C" fn(*mut sys::ibv_cq, i32) -> i32,
    capacity: u32,
    channel: Arc<CompletionChannel>,
}

// SAFETY: the functions that take a completion queue are thread-safe.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

/// How a work request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WorkStatus {
    Success,
    /// The queue pair was in error before: this request is not to blame, and may have been carried out in part.
    Flushed,
    /// The peer's memory is not open to it: a wrong key, range or right.
    RemoteAccess,
    /// The peer's queue pair does not take such a request.
    RemoteInvalid,
    /// Our own memory is not open to it.
    LocalProtection,
    /// No answer after all retries: the peer, or the network, is gone.
    NoAnswer,
    /// The peer had no receive posted.
    NotReady,
    /// Any other, by its code: the device, or a queue pair of it, is in a state in which it carries nothing out.
    Other(u32),
}

impl WorkStatus {
    fn of(wc: &sys::ibv_wc) -> Self {
        use sys::ibv_wc_status as status;
        match wc.error() {
            None => Self::Success,
            Some((code, _)) => match code {
                status::IBV_WC_WR_FLUSH_ERR => Self::Flushed,
                status::IBV_WC_REM_ACCESS_ERR => Self::RemoteAccess,
                status::IBV_WC_REM_INV_REQ_ERR | status::IBV_WC_REM_OP_ERR => Self::RemoteInvalid,
                status::IBV_WC_LOC_PROT_ERR
                | status::IBV_WC_LOC_ACCESS_ERR
                | status::IBV_WC_LOC_LEN_ERR => Self::LocalProtection,
                status::IBV_WC_RETRY_EXC_ERR | status::IBV_WC_RESP_TIMEOUT_ERR => Self::NoAnswer,
                status::IBV_WC_RNR_RETRY_EXC_ERR => Self::NotReady,
                other => Self::Other(other),
            },
        }
    }
}

impl std::fmt::Display for WorkStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Success => "success",
            Self::Flushed => "flushed after another request's failure",
            Self::RemoteAccess => "remote access error",
            Self::RemoteInvalid => "remote invalid request",
            Self::LocalProtection => "local protection error",
            Self::NoAnswer => "transport retry counter exceeded: no answer",
            Self::NotReady => "receiver-not-ready retry counter exceeded",
            Self::Other(code) => {
                return write!(f, "the device's own error, work completion status {code}");
            }
        })
    }
}

/// A work completion.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completion {
    pub(crate) id: u64,
    pub(crate) status: WorkStatus,
    /// Bytes received.
    pub(crate) len: usize,
}

/// A completion queue that the device has given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken;

/// Completions taken by one call.
const POLL_BATCH: i32 = 32;

impl CompletionQueue {
    pub(crate) fn new(
        device: &Arc<Device>,
        channel: &Arc<CompletionChannel>,
        entries: u32,
    ) -> io::Result<Arc<Self>> {
        // Spread over the device's interrupt vectors by whoever balances them; polling needs none.
        let (entries, vector) = (entries.cast_signed(), 0);
        let user = std::ptr::null_mut();
        // SAFETY: context and channel exist, and the channel is held below.
        let cq = unsafe {
            let channel = channel.channel.as_ptr();
            (device.api.ibv_create_cq)(device.context(), entries, user, channel, vector)
        };
        let cq = NonNull::new(cq).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the queue exists; `verbs.h` reads its context's table in the same way.
        let (ops, capacity) = unsafe { ((*cq.as_ref().context).ops, cq.as_ref().cqe) };
        let (Some(poll), Some(arm)) = (ops.poll_cq, ops.req_notify_cq) else {
            // SAFETY: it was just made and is used by nobody.
            unsafe { (device.api.ibv_destroy_cq)(cq.as_ptr()) };
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the provider cannot poll"));
        };
        let capacity = capacity.cast_unsigned();
        Ok(Arc::new(Self { cq, poll, arm, capacity, channel: channel.clone() }))
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Takes what is there, at most a batch; the answer is how many there were. An empty queue costs some 10 ns.
    ///
    /// # Errors
    /// The queue is broken: no completion of its queue pairs will come any more.
    #[inline]
    pub(crate) fn poll(&self, mut each: impl FnMut(Completion)) -> Result<usize, Broken> {
        let mut batch =
            [const { std::mem::MaybeUninit::<sys::ibv_wc>::uninit() }; POLL_BATCH as usize];
        // SAFETY: the queue exists, and the batch has room for what is asked for.
        let count = unsafe { (self.poll)(self.cq.as_ptr(), POLL_BATCH, batch.as_mut_ptr().cast()) };
        let count = usize::try_from(count).map_err(|_| Broken)?.min(batch.len());
        for entry in &batch[..count] {
            // SAFETY: the provider has filled the first `count`.
            let wc = unsafe { entry.assume_init_ref() };
            each(Completion { id: wc.wr_id(), status: WorkStatus::of(wc), len: wc.len() });
        }
        Ok(count)
    }

    /// Takes all that was there when it was called, and perhaps some of what has come since.
    ///
    /// # Errors
    /// As for `poll`; what came before is taken.
    pub(crate) fn drain(&self, mut each: impl FnMut(Completion)) -> Result<(), Broken> {
        // It never has more than it has room for.
        let mut left = self.capacity as usize;
        loop {
            let count = self.poll(&mut each)?;
            left = left.saturating_sub(count);
            if count == 0 || left == 0 {
                return Ok(());
            }
        }
    }

    /// How events name it.
    pub(crate) fn name(&self) -> usize {
        self.cq.as_ptr() as usize
    }

    /// The channel says when the next completion comes. Poll once more afterwards: what came before is not told.
    pub(crate) fn arm(&self) {
        // SAFETY: the queue exists.
        unsafe { (self.arm)(self.cq.as_ptr(), 0) };
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold it, so that this is the last use; all its events are acknowledged as they are taken.
        unsafe { (self.channel.device.api.ibv_destroy_cq)(self.cq.as_ptr()) };
    }
}

/// How much a queue pair holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueuePairCaps {
    pub(crate) send: u32,
    pub(crate) receive: u32,
    pub(crate) sge: u32,
    /// Bytes of a SEND that are copied when it is posted.
    pub(crate) inline: u32,
}

/// What is needed to connect a queue pair to another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Connect {
    pub(crate) port: u8,
    pub(crate) sgid_index: u8,
    pub(crate) ethernet: bool,
    pub(crate) mtu: u8,
    pub(crate) service_level: u8,
    pub(crate) traffic_class: u8,
    /// 4.096 us times two to the power of this.
    pub(crate) timeout: u8,
    pub(crate) retry_count: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) psn: u32,
    pub(crate) peer_qpn: u32,
    pub(crate) peer_psn: u32,
    pub(crate) peer_lid: u16,
    pub(crate) peer_gid: Gid,
}

/// A reliable-connection queue pair (`ibv_qp`). One thread at a time posts to it.
#[derive(Debug)]
pub(crate) struct QueuePair {
    qp: NonNull<sys::ibv_qp>,
    post_send: unsafe extern "C" fn(
        *mut sys::ibv_qp,
        *mut sys::ibv_send_wr,
        *mut *mut sys::ibv_send_wr,
    ) -> i32,
    post_recv: unsafe extern "C" fn(
        *mut sys::ibv_qp,
        *mut sys::ibv_recv_wr,
        *mut *mut sys::ibv_recv_wr,
    ) -> i32,
    number: u32,
    caps: QueuePairCaps,
    pd: Arc<ProtectionDomain>,
    _cq: Arc<CompletionQueue>,
}

// SAFETY: the functions that take a queue pair are thread-safe.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// Makes one in state INIT, which takes receives. What of `caps` the device cannot have is made smaller.
    pub(crate) fn new(
        pd: &Arc<ProtectionDomain>,
        cq: &Arc<CompletionQueue>,
        port: u8,
        caps: QueuePairCaps,
    ) -> io::Result<Self> {
        let mut last = io::Error::from_raw_os_error(libc::EINVAL);
        // What can be sent inline depends on the provider in ways that nothing tells but trying.
        for inline in [caps.inline, 128, 64, 0] {
            match Self::create(pd, cq, QueuePairCaps { inline, ..caps }) {
                Ok(qp) => {
                    qp.init(port)?;
                    return Ok(qp);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn create(
        pd: &Arc<ProtectionDomain>,
        cq: &Arc<CompletionQueue>,
        caps: QueuePairCaps,
    ) -> io::Result<Self> {
        let api = pd.device.api;
        // SAFETY: plain data, for which zeros are valid.
        let mut attr: sys::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        attr.send_cq = cq.cq.as_ptr();
        attr.recv_cq = cq.cq.as_ptr();
        attr.qp_type = sys::ibv_qp_type::IBV_QPT_RC;
        attr.cap.max_send_wr = caps.send;
        attr.cap.max_recv_wr = caps.receive;
        attr.cap.max_send_sge = caps.sge;
        attr.cap.max_recv_sge = 1;
        attr.cap.max_inline_data = caps.inline;
        // SAFETY: domain and queue exist, and are held by what is made.
        let qp = unsafe { (api.ibv_create_qp)(pd.as_ptr(), &raw mut attr) };
        let qp = NonNull::new(qp).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: it was just made; `verbs.h` reads its context's table in the same way.
        let (ops, number) = unsafe { ((*qp.as_ref().context).ops, qp.as_ref().qp_num) };
        let (Some(post_send), Some(post_recv)) = (ops.post_send, ops.post_recv) else {
            // SAFETY: it was just made and is used by nobody.
            unsafe { (api.ibv_destroy_qp)(qp.as_ptr()) };
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the provider cannot post"));
        };
        // A provider gives more than was asked for; the shares of the completion queue are what was asked for.
        let caps = QueuePairCaps { inline: attr.cap.max_inline_data.max(caps.inline), ..caps };
        Ok(Self { qp, post_send, post_recv, number, caps, pd: pd.clone(), _cq: cq.clone() })
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn caps(&self) -> &QueuePairCaps {
        &self.caps
    }

    fn modify(
        &self,
        attr: &mut sys::ibv_qp_attr,
        mask: &[sys::ibv_qp_attr_mask],
    ) -> io::Result<()> {
        let bits = mask.iter().fold(sys::ibv_qp_attr_mask::IBV_QP_STATE.0, |bits, m| bits | m.0);
        // SAFETY: the queue pair exists, `attr` is ours.
        check(unsafe {
            (self.pd.device.api.ibv_modify_qp)(self.qp.as_ptr(), attr, bits.cast_signed())
        })
    }

    fn attributes() -> sys::ibv_qp_attr {
        // SAFETY: plain data, for which zeros are valid.
        unsafe { std::mem::zeroed() }
    }

    fn init(&self, port: u8) -> io::Result<()> {
        use sys::{ibv_access_flags as flag, ibv_qp_attr_mask as mask};
        let mut attr = Self::attributes();
        attr.qp_state = sys::ibv_qp_state::IBV_QPS_INIT;
        attr.port_num = port;
        let access = flag::IBV_ACCESS_REMOTE_READ | flag::IBV_ACCESS_REMOTE_WRITE;
        attr.qp_access_flags = access.0;
        self.modify(
            &mut attr,
            &[mask::IBV_QP_PKEY_INDEX, mask::IBV_QP_PORT, mask::IBV_QP_ACCESS_FLAGS],
        )
    }

    /// Connects it: RTR, then RTS. From then on it answers the peer, and takes sends.
    pub(crate) fn connect(&self, to: &Connect) -> io::Result<()> {
        use sys::ibv_qp_attr_mask as mask;
        let mut attr = Self::attributes();
        attr.qp_state = sys::ibv_qp_state::IBV_QPS_RTR;
        attr.path_mtu = mtu(to.mtu);
        attr.dest_qp_num = to.peer_qpn;
        attr.rq_psn = to.peer_psn;
        attr.max_dest_rd_atomic = to.max_dest_rd_atomic;
        // 0.64 ms, where a peer is not ready at all.
        attr.min_rnr_timer = 12;
        attr.ah_attr.port_num = to.port;
        attr.ah_attr.sl = to.service_level;
        attr.ah_attr.dlid = to.peer_lid;
        attr.ah_attr.is_global = u8::from(to.ethernet);
        attr.ah_attr.grh.dgid = sys::ibv_gid { raw: to.peer_gid.0 };
        attr.ah_attr.grh.sgid_index = to.sgid_index;
        attr.ah_attr.grh.hop_limit = 64;
        attr.ah_attr.grh.traffic_class = to.traffic_class;
        self.modify(
            &mut attr,
            &[
                mask::IBV_QP_AV,
                mask::IBV_QP_PATH_MTU,
                mask::IBV_QP_DEST_QPN,
                mask::IBV_QP_RQ_PSN,
                mask::IBV_QP_MAX_DEST_RD_ATOMIC,
                mask::IBV_QP_MIN_RNR_TIMER,
            ],
        )?;
        let mut attr = Self::attributes();
        attr.qp_state = sys::ibv_qp_state::IBV_QPS_RTS;
        attr.timeout = to.timeout;
        attr.retry_cnt = to.retry_count;
        // Receives are counted, so that a peer is never not ready; should it be, it is waited for as for any other loss.
        attr.rnr_retry = to.retry_count;
        attr.sq_psn = to.psn;
        attr.max_rd_atomic = to.max_rd_atomic;
        self.modify(
            &mut attr,
            &[
                mask::IBV_QP_TIMEOUT,
                mask::IBV_QP_RETRY_CNT,
                mask::IBV_QP_RNR_RETRY,
                mask::IBV_QP_SQ_PSN,
                mask::IBV_QP_MAX_QP_RD_ATOMIC,
            ],
        )
    }

    /// Takes it out of use: what is posted is flushed, and what arrives is not acknowledged any more.
    pub(crate) fn set_error(&self) {
        let mut attr = Self::attributes();
        attr.qp_state = sys::ibv_qp_state::IBV_QPS_ERR;
        // On a device that is gone it has no effect, and needs none.
        let _ = self.modify(&mut attr, &[]);
    }

    /// Posts all of a list: one doorbell.
    ///
    /// # Errors
    /// How many were posted before the one that was refused, and why it was.
    ///
    /// # Safety
    /// The memory that the list names stays registered, and what is read into is written by nobody else, until the requests
    /// have completed or this queue pair is dropped.
    #[inline]
    pub(crate) unsafe fn post_send(&self, list: &mut SendList) -> Result<(), (usize, io::Error)> {
        let Some(tail) = list.len.checked_sub(1) else { return Ok(()) };
        let next = std::mem::replace(&mut list.requests[tail].next, std::ptr::null_mut());
        let mut bad = std::ptr::null_mut();
        // SAFETY: the list is a chain of `len` requests, whose entries live until the call returns; the caller answers for the
        // memory that they name.
        let code =
            unsafe { (self.post_send)(self.qp.as_ptr(), list.requests.as_mut_ptr(), &raw mut bad) };
        list.requests[tail].next = next;
        if code == 0 {
            return Ok(());
        }
        let first = list.requests.as_ptr();
        // Where a provider does not say which, the first is the worst that is possible.
        let posted = (bad as usize).saturating_sub(first as usize) / size_of::<sys::ibv_send_wr>();
        Err((posted.min(tail), check(code).err().unwrap_or_else(io::Error::last_os_error)))
    }

    /// Posts one receive.
    ///
    /// # Safety
    /// The memory stays registered, and is not touched, until the receive has completed or this queue pair is dropped.
    #[inline]
    pub(crate) unsafe fn post_receive(&self, receive: &Receive) -> io::Result<()> {
        let mut sge = sys::ibv_sge { addr: receive.addr, length: receive.len, lkey: receive.lkey };
        let mut request = sys::ibv_recv_wr {
            wr_id: receive.id,
            next: std::ptr::null_mut(),
            sg_list: &raw mut sge,
            num_sge: 1,
        };
        let mut bad = std::ptr::null_mut();
        // SAFETY: one request, which lives until the call returns; the caller answers for its memory.
        check(unsafe { (self.post_recv)(self.qp.as_ptr(), &raw mut request, &raw mut bad) })
    }
}

impl Drop for QueuePair {
    /// When this returns, the device touches nothing for it any more, and answers the peer no more.
    fn drop(&mut self) {
        // First the state: requests that are under way end at once, and not when they have been retried.
        self.set_error();
        // SAFETY: it is destroyed once. Its completions may still be in the queue: their IDs say that they are stale.
        unsafe { (self.pd.device.api.ibv_destroy_qp)(self.qp.as_ptr()) };
    }
}

fn mtu(code: u8) -> sys::ibv_mtu {
    u32::from(code.clamp(1, 5))
}

/// A receive to post.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Receive {
    pub(crate) id: u64,
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) lkey: u32,
}

/// Work requests to post together. Made once; filled and posted again and again, it allocates nothing.
pub(crate) struct SendList {
    requests: Box<[sys::ibv_send_wr]>,
    entries: Box<[sys::ibv_sge]>,
    len: usize,
    used: usize,
}

// SAFETY: its pointers lead into its own boxes.
unsafe impl Send for SendList {}

impl SendList {
    /// Room for `requests`, with `entries` scatter/gather entries in all.
    pub(crate) fn new(requests: usize, entries: usize) -> Self {
        let requests = requests.max(1);
        let entries = entries.max(requests);
        // SAFETY: plain data, for which zeros are valid.
        let zero: sys::ibv_send_wr = unsafe { std::mem::zeroed() };
        let mut all = vec![zero; requests].into_boxed_slice();
        let first = all.as_mut_ptr();
        for (index, request) in all.iter_mut().enumerate() {
            // The chain is there from the start: posting cuts it where the list ends.
            request.next = if index + 1 < requests {
                // SAFETY: within the same allocation.
                unsafe { first.add(index + 1) }
            } else {
                std::ptr::null_mut()
            };
        }
        let none = sys::ibv_sge { addr: 0, length: 0, lkey: 0 };
        Self { requests: all, entries: vec![none; entries].into(), len: 0, used: 0 }
    }

    #[inline]
    pub(crate) fn clear(&mut self) {
        (self.len, self.used) = (0, 0);
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Begins an RDMA READ or WRITE of memory of the peer, without pieces yet. There has to be room for it.
    #[inline]
    pub(crate) fn rdma(&mut self, write: bool, id: u64, remote: u64, rkey: u32) {
        use sys::ibv_wr_opcode as opcode;
        let op = if write { opcode::IBV_WR_RDMA_WRITE } else { opcode::IBV_WR_RDMA_READ };
        let request = self.begin(id, op);
        request.send_flags = 0;
        request.wr.rdma.remote_addr = remote;
        request.wr.rdma.rkey = rkey;
    }

    /// Begins a SEND, without pieces yet. There has to be room for it.
    #[inline]
    pub(crate) fn send(&mut self, id: u64, inline: bool) {
        let request = self.begin(id, sys::ibv_wr_opcode::IBV_WR_SEND);
        request.send_flags = if inline { sys::ibv_send_flags::IBV_SEND_INLINE.0 } else { 0 };
    }

    #[inline]
    fn begin(&mut self, id: u64, op: sys::ibv_wr_opcode::Type) -> &mut sys::ibv_send_wr {
        let entries = self.entries[self.used..].as_mut_ptr();
        let request = &mut self.requests[self.len];
        self.len += 1;
        request.wr_id = id;
        request.opcode = op;
        request.sg_list = entries;
        request.num_sge = 0;
        request
    }

    /// Adds a piece of our memory to the request that was begun last.
    #[inline]
    pub(crate) fn piece(&mut self, addr: u64, len: u32, lkey: u32) {
        self.entries[self.used] = sys::ibv_sge { addr, length: len, lkey };
        self.used += 1;
        if let Some(last) = self.len.checked_sub(1) {
            self.requests[last].num_sge += 1;
        }
    }

    /// Has the last request tell when it, and with it all before it, has completed.
    #[inline]
    pub(crate) fn signal_last(&mut self) {
        if let Some(last) = self.len.checked_sub(1) {
            self.requests[last].send_flags |= sys::ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
    }
}

impl std::fmt::Debug for SendList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendList").field("len", &self.len).finish_non_exhaustive()
    }
}
