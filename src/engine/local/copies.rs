//! Transfers that are copied.

use std::sync::Arc;
use std::time::{Duration, Instant};

use corelane_runtime::Cx;

use crate::config::TransportKind;
use crate::engine::lane::{LANE_TURN, LaneDriver, Message};
use crate::error::Error;
use crate::plan::Class;
use crate::session::LinkId;
use crate::transfer::{Chunk, TransferShared};
use crate::transport::local::CopyError;

/// Transfers of so many bytes are shared among the lanes.
const SHARED_BYTES: u64 = 2 << 20;

impl LaneDriver {
    /// Takes up the transfers of a peer that are to be copied.
    pub(in crate::engine) fn take_copies(&mut self, slot: usize, cx: &mut Cx<'_>) {
        while let Some(transfer) = self.peers.get_mut(slot).and_then(|peer| peer.core.next_copy()) {
            if transfer.plan.device.is_some() {
                self.copy_on_gpu(transfer, cx);
                continue;
            }
            if transfer.plan.bytes >= SHARED_BYTES {
                for (index, lane) in self.engine.lanes().iter().enumerate() {
                    if index != self.index {
                        // One that is gone does not help.
                        let _ = lane.try_submit(Message::Help(transfer.clone()));
                    }
                }
            }
            self.add_copy(transfer);
        }
    }

    pub(in crate::engine) fn add_copy(&mut self, transfer: Arc<TransferShared>) {
        match transfer.plan.class {
            Class::Latency => self.copies.push_front(transfer),
            Class::Bulk => self.copies.push_back(transfer),
        }
    }

    /// Copies for this lane's share of the turn, a chunk of each transfer in turn. A turn on a caller's thread copies one:
    /// that thread asked how a transfer stands, and has others to post; it copies its own share besides, and comes again.
    pub(in crate::engine) fn run_copies(&mut self, cx: &mut Cx<'_>) -> bool {
        if self.copies.is_empty() {
            return false;
        }
        let began = Instant::now();
        // Of those that were looked at last, how many have no place to copy in.
        let (mut worked, mut waiting) = (false, 0);
        let share = if self.engine.is_lane_thread() { LANE_TURN } else { Duration::ZERO };
        while let Some(transfer) = self.copies.pop_front() {
            match transfer.copy_chunk() {
                // Others have the rest.
                Chunk::None => continue,
                Chunk::Busy => {
                    waiting += 1;
                    self.copies.push_back(transfer);
                }
                Chunk::Copied { last } => {
                    (worked, waiting) = (true, 0);
                    if last {
                        self.copied(&transfer, cx);
                    } else {
                        self.copies.push_back(transfer);
                    }
                }
            }
            if waiting >= self.copies.len() || began.elapsed() >= share {
                break;
            }
        }
        worked
    }

    /// Nothing may be left to copy of a transfer.
    pub(in crate::engine) fn copied(&mut self, transfer: &Arc<TransferShared>, cx: &mut Cx<'_>) {
        let home = transfer.plan.peer.lane;
        if home == self.index {
            let Some(slot) = self.slot_of(&transfer.plan.peer) else { return };
            if transfer.copy.error().is_some_and(|error| error.is_disconnect()) {
                self.look_for_end(slot, cx);
            }
            self.with_core(slot, cx, |core, env| core.copied(transfer, env));
        } else if let Ok(lane) = self.engine.lane(home) {
            // A lane that is gone has ended the transfer itself.
            let _ = lane.submit(Message::Copied(transfer.clone()));
        }
    }

    /// Finds out whether the peers of this name are still there; those of this lane.
    pub(in crate::engine) fn look_for_end_of(&mut self, name: &str, cx: &mut Cx<'_>) {
        let named: Vec<(usize, LinkId)> = self
            .peers
            .iter()
            .filter(|(_, peer)| &*peer.core.peer.name == name)
            .filter_map(|(slot, peer)| Some((slot, *peer.links.first()?)))
            .collect();
        for (slot, link) in named {
            self.look_for_end(slot, cx);
            self.receive_last(link, cx);
        }
    }

    /// The peer's memory is out of reach: whoever is told of that finds the connection in the same state.
    pub(super) fn look_for_end(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let attachment = |driver: &Self| {
            let attachment = driver.peers.get(slot)?.local.as_ref()?;
            Some((attachment.link, attachment.theirs.as_ref()?.accessor.clone()))
        };
        let Some((link, accessor)) = attachment(self) else { return };
        // A goodbye, or the end of the stream, may be there and not read yet.
        self.receive_last(link, cx);
        if attachment(self).is_some() && (accessor.has_ended() || accessor.process.is_gone()) {
            self.close_link(link, "its process has ended", cx);
        }
    }

    /// Whether both sides have devices for transport `rdma`.
    pub(in crate::engine) fn rdma_expected(&self, theirs: u32) -> bool {
        theirs & self.engine.identity.transports & TransportKind::Rdma.bit() != 0
    }

    /// Whether both sides allow transfers as frames over a socket.
    pub(in crate::engine) fn frames_allowed(&self, theirs: u32) -> bool {
        theirs & self.engine.identity.transports & TransportKind::Tcp.bit() != 0
    }
}

impl TransferShared {
    /// Copies one chunk, if one is left to claim. Any thread. The place for it comes first: no chunk is claimed that would have to wait
    /// for one, and hold its transfer's end off, for as long as the peer likes.
    pub(crate) fn copy_chunk(&self) -> Chunk {
        let (plan, job) = (&*self.plan, &self.copy);
        let chunks = plan.chunks.len();
        let Some(path) = job.path_to_claim(chunks) else { return Chunk::None };
        let Some(place) = path.begin(plan) else {
            if !job.is_out_of_patience() {
                return Chunk::Busy;
            }
            return match job.claim(chunks) {
                Some(_) => Chunk::Copied { last: job.finish(Err(CopyError::Busy.into()), chunks) },
                None => Chunk::None,
            };
        };
        job.has_place();
        let Some((chunk, current)) = job.claim(chunks) else { return Chunk::None };
        // SAFETY: a claimed chunk holds the transfer's end off, and with it the uses of its regions that
        // its lane counts.
        let outcome = unsafe {
            if Arc::ptr_eq(&path, &current) {
                path.copy_in(place, plan, chunk)
            } else {
                // Posted anew meanwhile, after another session has begun.
                drop(place);
                current.copy(plan, chunk).map_err(Error::from)
            }
        };
        Chunk::Copied { last: job.finish(outcome, chunks) }
    }
}

impl From<CopyError> for Error {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Failed(error) => error,
            CopyError::Busy => Error::Busy {
                what: "every place for a copy to the peer",
                hint: "; too many threads copy at the same time, or the peer keeps them taken",
            },
        }
    }
}
