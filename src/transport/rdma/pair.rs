//! One queue pair of a connection: what is posted on it, and its messages.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::buffers::Buffers;
use super::lane::WorkId;
use super::link::Span;
use super::rails::Rail;
use crate::verbs::{CompletionQueue, Connect, Gid, QueuePair, QueuePairCaps, Receive, SendList};
use crate::wire::rdma::{MESSAGE_BYTES, QueuePairFrame, RdmaMessage};

/// Work requests of one doorbell at most. On soft-RoCE and with a provider that does nothing, the cost of a request falls until
/// some 16 to a doorbell and then stays; what comes later waits for less behind short chains (docs/benchmarks.md).
pub(crate) const CHAIN: usize = 32;
/// Scatter/gather entries of one request, where the device has so many.
pub(crate) const MAX_SGE: u32 = 16;
/// Work requests that a queue pair holds.
const SEND_DEPTH: u32 = 256;
/// Of these, the ones that only messages may take.
const MESSAGE_RESERVE: u32 = 16;
/// Messages that a peer may send ahead: on the first queue pair, and on those for bulk, where they are rare.
const RECEIVES: u8 = 32;
const BULK_RECEIVES: u8 = 16;
/// Receives for messages that take no credit: HELLO, and CREDITS, of which at most two can be on the way, since each stands
/// for half of all credits.
const SPARE_RECEIVES: usize = 4;
/// Every how many messages one tells that it, and those before it, have been sent.
const SIGNAL_EVERY: u32 = 16;

/// Requests that were posted with one doorbell, in order.
#[derive(Debug)]
pub(crate) struct Chain {
    /// The counter of posted requests behind its last.
    pub(crate) end: u32,
    /// The job that it belongs to; `None`: a message, which nothing waits for but its place.
    pub(crate) job: Option<usize>,
    /// What of the job's plan it moves.
    pub(crate) span: Span,
    /// How many bytes that is.
    bytes: u64,
}

/// A queue pair with its accounts. Its methods cost no system call but what the provider needs.
#[derive(Debug)]
pub(crate) struct Pair {
    // Destroyed before its buffers are freed.
    qp: QueuePair,
    buffers: Buffers,
    id: WorkId,
    /// Index in the connection.
    pub(crate) index: u8,
    /// Ours, and the peer's number for its.
    pub(crate) rail: usize,
    pub(crate) peer_rail: usize,
    /// The completion queue that it has a share of.
    pub(crate) queue: usize,
    /// The first packet number that we send.
    psn: u32,
    /// Bytes of one request.
    pub(crate) longest: u32,
    pub(crate) max_sge: usize,
    pub(crate) max_sge_read: usize,
    /// Requests posted and completed so far, modulo 2^32.
    posted: u32,
    completed: u32,
    /// Bytes of the transfers' chains that have not completed.
    moving: u64,
    /// Messages since the last request that tells of its end.
    untold: u32,
    chains: VecDeque<Chain>,
    /// Jobs that have something to issue here, taking turns: place and key, since a job may end while it is here, and another
    /// get its place.
    pub(super) waiting: VecDeque<(usize, u64)>,

    receives: u8,
    peer_receives: u32,
    /// Messages that took a credit: sent, and taken by the peer as far as it has said.
    sent: u32,
    returned: u32,
    /// Messages of the peer that took a credit: taken here, and as far as the peer has been told.
    taken: u32,
    told: u32,
    /// Taken, but not to be told before the application makes room.
    withheld: u32,
    /// Whether the peer has answered on it.
    pub(crate) works: bool,
    pub(crate) connected: bool,
}

fn pair_caps(rail: &Rail, receives: u8) -> QueuePairCaps {
    let limits = rail.device.limits();
    let depth = SEND_DEPTH.min(limits.max_qp_wr.max(2 * MESSAGE_RESERVE));
    QueuePairCaps {
        send: depth,
        receive: (u32::from(receives) + SPARE_RECEIVES as u32).min(limits.max_qp_wr.max(8)),
        sge: limits.max_sge.clamp(1, MAX_SGE),
        inline: 256,
    }
}

impl Pair {
    /// Entries of a completion queue that one takes, whatever becomes of it.
    pub(crate) fn share(rail: &Rail) -> u32 {
        let caps = pair_caps(rail, RECEIVES);
        caps.send + caps.receive
    }

    /// Makes a queue pair and posts its receives.
    pub(crate) fn new(
        rail: (usize, &Rail),
        cq: (usize, &Arc<CompletionQueue>),
        id: WorkId,
        index: u8,
        psn: u32,
    ) -> io::Result<Self> {
        let (rail_index, rail) = rail;
        let (queue, cq) = cq;
        let receives = if index == 0 { RECEIVES } else { BULK_RECEIVES };
        let caps = pair_caps(rail, receives);
        let qp = QueuePair::new(&rail.pd, cq, rail.port, caps)?;
        let all_receives = usize::from(receives) + SPARE_RECEIVES;
        // Behind the receives, one for each message that may be on the way, and those that take no credit.
        let buffers = Buffers::new(&rail.pd, 2 * all_receives)?;
        let limits = rail.device.limits();
        let mut pair = Self {
            max_sge: qp.caps().sge as usize,
            max_sge_read: qp.caps().sge.min(limits.max_sge_rd).max(1) as usize,
            qp,
            buffers,
            id,
            index,
            rail: rail_index,
            peer_rail: 0,
            queue,
            psn: psn & 0xff_ffff,
            longest: rail.max_msg_sz.clamp(4096, 1 << 30),
            posted: 0,
            completed: 0,
            moving: 0,
            untold: 0,
            chains: VecDeque::with_capacity(SEND_DEPTH as usize),
            waiting: VecDeque::with_capacity(64),
            receives,
            peer_receives: 0,
            sent: 0,
            returned: 0,
            taken: 0,
            told: 0,
            withheld: 0,
            works: false,
            connected: false,
        };
        for buffer in 0..all_receives {
            pair.post_receive(buffer)?;
        }
        Ok(pair)
    }

    fn post_receive(&mut self, buffer: usize) -> io::Result<()> {
        let receive = Receive {
            id: self.id.receive(buffer as u32),
            addr: self.buffers.addr(buffer),
            len: MESSAGE_BYTES as u32,
            lkey: self.buffers.key(),
        };
        // SAFETY: the buffer is ours and not posted, and is freed after the queue pair has been destroyed.
        unsafe { self.qp.post_receive(&receive) }
    }

    /// This end, for the peer.
    pub(crate) fn describe(&self, rail: &Rail, frame: QueuePairFrame) -> QueuePairFrame {
        let limits = rail.device.limits();
        let address = rail.address();
        QueuePairFrame {
            index: self.index,
            rail: self.rail as u8,
            receives: self.receives,
            number: self.qp.number(),
            psn: self.psn,
            mtu: address.mtu,
            ethernet: rail.ethernet,
            gid: address.gid.0,
            lid: address.lid,
            max_rd_atomic: limits.max_rd_atomic,
            max_dest_rd_atomic: limits.max_dest_rd_atomic,
            max_msg_sz: rail.max_msg_sz,
            ..frame
        }
    }

    /// Connects it to the peer's end. What both can is used: the smaller MTU, as many READs at a time as the other serves.
    pub(crate) fn connect(
        &mut self,
        rail: &Rail,
        config: &crate::config::RdmaConfig,
        peer: &QueuePairFrame,
    ) -> io::Result<()> {
        let limits = rail.device.limits();
        let address = rail.address();
        self.qp.connect(&Connect {
            port: rail.port,
            sgid_index: address.gid_index,
            ethernet: rail.ethernet,
            mtu: address.mtu.min(peer.mtu),
            service_level: config.service_level,
            traffic_class: config.traffic_class,
            timeout: config.timeout,
            retry_count: config.retry_count,
            max_rd_atomic: limits.max_rd_atomic.min(peer.max_dest_rd_atomic),
            max_dest_rd_atomic: limits.max_dest_rd_atomic.min(peer.max_rd_atomic),
            psn: self.psn,
            peer_qpn: peer.number,
            peer_psn: peer.psn,
            peer_lid: peer.lid,
            peer_gid: Gid(peer.gid),
        })?;
        self.peer_rail = usize::from(peer.rail);
        // As many as there are buffers to send from, at most.
        self.peer_receives = u32::from(peer.receives.min(self.receives));
        self.longest = self.longest.min(peer.max_msg_sz).max(4096);
        self.connected = true;
        Ok(())
    }

    pub(crate) fn number(&self) -> u32 {
        self.qp.number()
    }

    /// Nothing is sent, and nothing that arrives is taken, from now on.
    pub(crate) fn set_error(&mut self) {
        self.qp.set_error();
    }

    /// Chains that have not completed, oldest first.
    pub(super) fn chains(&self) -> impl Iterator<Item = &Chain> {
        self.chains.iter()
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.posted.wrapping_sub(self.completed)
    }

    /// Requests that may be posted for transfers now.
    #[inline]
    pub(crate) fn room(&self) -> usize {
        (self.qp.caps().send - MESSAGE_RESERVE).saturating_sub(self.in_flight()) as usize
    }

    /// Bytes that chains in flight move.
    #[inline]
    pub(super) fn moving(&self) -> u64 {
        self.moving
    }

    fn has_message_room(&self) -> bool {
        self.qp.caps().send > self.in_flight()
    }

    fn credits(&self) -> u32 {
        self.peer_receives.saturating_sub(self.sent.wrapping_sub(self.returned))
    }

    /// Whether a message that takes a credit can be sent.
    #[inline]
    pub(crate) fn can_send(&self) -> bool {
        self.connected && self.credits() > 0 && self.has_message_room()
    }

    /// The ID of the request that follows `listed` others of the same list: the counter that it brings.
    #[inline]
    pub(super) fn id_behind(&self, listed: usize) -> u64 {
        self.id.send(self.posted.wrapping_add(listed as u32 + 1))
    }

    /// Adds a message to a list; its buffer is in use until the peer has taken it.
    fn add_message(&mut self, list: &mut SendList, message: &RdmaMessage<'_>) {
        let id = self.id_behind(list.len());
        let mut bytes = [0; MESSAGE_BYTES];
        let len = message.encode(self.taken, &mut bytes);
        self.told = self.taken;
        let receives = usize::from(self.receives) + SPARE_RECEIVES;
        let slot = if message.takes_credit() {
            let slot = self.sent as usize % self.peer_receives.max(1) as usize;
            self.sent = self.sent.wrapping_add(1);
            slot
        } else {
            // Before the next of its kind this one has long been sent.
            usize::from(self.receives) + self.taken as usize % SPARE_RECEIVES
        };
        let buffer = receives + slot;
        self.buffers.write(buffer, &bytes, len);
        let inline = len <= self.qp.caps().inline as usize;
        list.send(id, inline);
        list.piece(self.buffers.addr(buffer), len as u32, self.buffers.key());
    }

    /// Puts a notification behind the requests of a list, which are a chain with it.
    pub(super) fn add_bound(&mut self, list: &mut SendList, payload: &[u8]) {
        self.add_message(list, &RdmaMessage::Bound { payload });
    }

    /// Sends a message: one doorbell. Those that take a credit only where `can_send`.
    pub(crate) fn send(
        &mut self,
        list: &mut SendList,
        message: &RdmaMessage<'_>,
    ) -> io::Result<()> {
        if !self.has_message_room() {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        list.clear();
        self.add_message(list, message);
        self.untold += 1;
        let tells = self.untold >= SIGNAL_EVERY || matches!(message, RdmaMessage::Hello);
        if tells {
            list.signal_last();
        }
        // SAFETY: the one piece is a buffer of ours, which is freed after the queue pair has been destroyed.
        unsafe { self.post(list, tells, None, (Span::default(), 0)) }
    }

    /// Posts a list, the last request of which tells of its end if `tells`; `work` is what of a job it moves, in bytes, too.
    ///
    /// # Safety
    /// As for [`QueuePair::post_send`].
    #[inline]
    pub(crate) unsafe fn post(
        &mut self,
        list: &mut SendList,
        tells: bool,
        job: Option<usize>,
        work: (Span, u64),
    ) -> io::Result<()> {
        let count = list.len() as u32;
        // SAFETY: the caller's promise. What was posted before one that was refused is counted below: it ends with the queue
        // pair, which is given up.
        let outcome = unsafe { self.qp.post_send(list) };
        self.posted = self.posted.wrapping_add(count);
        if tells {
            self.untold = 0;
            let (span, bytes) = work;
            self.moving += bytes;
            self.chains.push_back(Chain { end: self.posted, job, span, bytes });
        }
        outcome.map_err(|(_, error)| error)
    }

    /// The request with this counter has completed, and all before it: `next_ended` has their chains.
    #[inline]
    pub(crate) fn completed(&mut self, end: u32) {
        // Never back, and never beyond what was posted.
        if end.wrapping_sub(self.completed) <= self.in_flight() {
            self.completed = end;
        }
    }

    /// The next chain that is over.
    #[inline]
    pub(crate) fn next_ended(&mut self) -> Option<Chain> {
        let front = self.chains.front()?;
        // The order of counters that wrap around: all in flight are within 2^31.
        let over = self.completed.wrapping_sub(front.end) < 1 << 31;
        if !over {
            return None;
        }
        let ended = self.chains.pop_front()?;
        self.moving = self.moving.saturating_sub(ended.bytes);
        Some(ended)
    }

    /// The chain that a request with this counter is in.
    pub(crate) fn chain_of(&self, counter: u32) -> Option<&Chain> {
        // The first chain that ends with it or behind it.
        let holds = |chain: &&Chain| chain.end.wrapping_sub(counter) < 1 << 31;
        self.chains.iter().find(holds)
    }

    /// A message has arrived: its bytes, and the credits that come with it are counted.
    ///
    /// # Errors
    /// The peer breaks the rules.
    pub(crate) fn received(
        &mut self,
        buffer: u32,
        len: usize,
    ) -> Result<([u8; MESSAGE_BYTES], usize), &'static str> {
        let (bytes, len) = self.buffers.read(buffer as usize, len);
        let (message, credits) = RdmaMessage::decode(&bytes[..len])
            .ok_or("a message on a queue pair that no engine sends")?;
        let takes_credit = message.takes_credit();
        // Never back, and never more than was sent.
        if credits.wrapping_sub(self.returned) > self.sent.wrapping_sub(self.returned) {
            return Err("a peer counts messages that were not sent");
        }
        self.returned = credits;
        if takes_credit {
            self.withheld += 1;
        }
        self.post_receive(buffer as usize).map_err(|_| "a receive cannot be posted again")?;
        Ok((bytes, len))
    }

    /// What was received has been dealt with; `told` says whether the peer may send more instead.
    pub(crate) fn release_credits(&mut self) {
        self.taken = self.taken.wrapping_add(self.withheld);
        self.withheld = 0;
    }

    /// How much it has to do.
    pub(super) fn load(&self) -> usize {
        self.in_flight() as usize + CHAIN * self.waiting.len()
    }

    /// Whether the peer should be told of credits by a message of its own.
    pub(crate) fn owes_credits(&self) -> bool {
        let owed = self.taken.wrapping_sub(self.told);
        self.connected && owed >= u32::from(self.receives) / 2 && self.has_message_room()
    }
}
