//! Requests on their way: cut out of transfers, sent, and answered.

use super::super::links::CoreLink;
use super::super::staged::PackSize;
use super::super::{Core, Env, LinkId, ProtocolError, Sent, TxFrame, TxPayload};
use super::{Queue, Request, request_id};
use crate::error::Error;
use crate::plan::Operation;
use crate::session::outbox::{Bound, MAX_IN_BAND};
#[cfg(feature = "sim")]
use crate::sim::coverage::{TransferEvent, TransferState};
use crate::sys::IoSegment;
use crate::wire::frame::{FLAG_COUNTED, FrameKind, Header, ServeStatus};

impl Core {
    /// Cuts the next request out of the transfer whose turn it is.
    pub(in crate::session::core) fn next_request(
        &mut self,
        link: usize,
        queue: Queue,
        window: usize,
        env: &mut Env<'_>,
    ) -> Option<TxFrame> {
        let window = if mutated!(WindowIgnored) { 8 * window } else { window };
        if self.links[link].outstanding >= window || self.is_way_pending() {
            return None;
        }
        let key = loop {
            let queue = match queue {
                Queue::Latency => &mut self.latency,
                Queue::Bulk => &mut self.bulk,
            };
            let key = queue.pop_front()?;
            let live = self
                .active
                .get(key.slot)
                .is_some_and(|active| active.stamp == key.stamp && active.ending.is_none())
                && self.active[key.slot].has_next_payload();
            if live {
                break key;
            }
        };
        let stamp = self.stamp();
        let slot = self.requests.vacant_key();
        let id = request_id(slot, stamp);
        let active = &mut self.active[key.slot];
        let (piece, block, landing) = active.next_payload()?;
        active.next_piece += 1;
        active.outstanding += 1;
        let last = active.next_piece as usize == active.shared.plan.pieces.len();
        let mut header = active.shared.plan.pieces[piece as usize].header;
        header.id = id;
        let write = active.shared.plan.operation == Operation::Write;
        if write && active.notification.as_ref().is_some_and(|n| n.len() <= MAX_IN_BAND) {
            active.counted = true;
            header.aux = active.number;
            header.flags |= FLAG_COUNTED;
            if last && let Some(payload) = active.notification.take() {
                let bound = Bound { transfer: active.number, pieces: active.next_piece };
                active.notified = Some(self.outbox.push(payload, Some(bound)));
            }
        }
        active.unsent += u32::from(write);
        let early = last && !write && mutated!(ReadNotifiesEarly);
        let early = if early { active.notification.take() } else { None };
        let link: &mut CoreLink = &mut self.links[link];
        if link.outstanding == 0 {
            link.answered = env.now;
        }
        link.outstanding += 1;
        link.last_use = env.now;
        self.requests.insert(Request {
            active: key,
            piece,
            len: header.len,
            operation: active.shared.plan.operation,
            stamp,
            link: link.id,
            unsent: write,
            landing,
            orphan: false,
        });
        let body = (header.body > 0).then(|| (active.plan().clone(), piece));
        let is_next_there = block.is_none() || active.is_next_packed();
        let frame = if let Some(block) = block {
            let size = PackSize::of_write(active.plan());
            TxFrame { body, ..TxFrame::packed(&header, block, size, Some(id)) }
        } else {
            TxFrame {
                header: header.encode(),
                body,
                payload: if write {
                    TxPayload::Plan(active.plan().clone(), piece)
                } else {
                    TxPayload::None
                },
                sent: if write { Sent::Write(id) } else { Sent::Nothing },
            }
        };
        if !last && is_next_there {
            match queue {
                Queue::Latency => self.latency.push_back(key),
                Queue::Bulk => self.bulk.push_back(key),
            }
        }
        if let Some(payload) = early {
            self.notify(payload, env);
        }
        env.counters.requests_sent.add(1);
        Some(frame)
    }

    pub(in crate::session::core) fn request(&mut self, id: u64) -> Option<&mut Request> {
        let request = self.requests.get_mut((id & u64::from(u32::MAX)) as usize)?;
        (request.stamp == (id >> 32) as u32).then_some(request)
    }

    /// Local memory of a WRITE is not read any more.
    pub(in crate::session::core) fn write_sent(&mut self, id: u64, env: &mut Env<'_>) {
        let Some(request) = self.request(id) else { return };
        if !request.unsent {
            return;
        }
        request.unsent = false;
        let (key, link) = (request.active, request.link);
        if self.link(link).is_none() {
            // Its link went down while the frame was on its way: nobody will answer.
            self.requests.remove((id & u64::from(u32::MAX)) as usize);
        }
        if let Some(active) = self.active.get_mut(key.slot)
            && active.stamp == key.stamp
        {
            active.unsent -= 1;
            let ending = active.ending.is_some() && !mutated!(EndingForgotten);
            if ending && active.may_end() {
                reached!(transfer, TransferState::Ending, TransferEvent::Flushed);
                self.finish(key.slot, env);
            } else if ending {
                self.release_unread(key.slot, env);
            }
        }
    }

    /// Checks a DATA header against the request that it answers; true: it lands in memory of a GPU.
    pub(in crate::session::core) fn check_data(
        &mut self,
        link: LinkId,
        header: &Header,
    ) -> Result<bool, ProtocolError> {
        let request = self.request(header.id).ok_or(ProtocolError::Rule("DATA for no request"))?;
        if request.link != link || request.operation != Operation::Read {
            return Err(ProtocolError::Rule("DATA for another request"));
        }
        if request.len != header.len {
            return Err(ProtocolError::Rule("DATA of another length than asked for"));
        }
        Ok(request.landing)
    }

    /// Where the payload of a DATA goes: nowhere, once its transfer has ended.
    #[inline]
    pub(crate) fn destination(&mut self, id: u64) -> Option<&[IoSegment]> {
        let request =
            self.request(id).filter(|request| !request.orphan || mutated!(OrphansLand))?;
        let (key, piece) = (request.active, request.piece);
        let shift = u32::from(mutated!(PayloadShifted) && piece > 0);
        self.active.get(key.slot).map(|active| active.shared.plan.local(piece - shift))
    }

    /// A frame of which nothing is sent names memory of ours that is not mapped: it is dropped. The
    /// answer is the frame to send instead.
    pub(crate) fn on_send_fault(&mut self, frame: TxFrame, env: &mut Env<'_>) -> Option<TxFrame> {
        match frame.sent {
            Sent::Nothing => None,
            Sent::Served(uses) => {
                env.regions.release(uses);
                let id = Header::decode(&frame.header).ok()?.id;
                let status = ServeStatus::Fault as u16;
                let refused = Header { status, id, ..Header::new(FrameKind::Status) };
                Some(TxFrame::header(&refused))
            }
            // Pinned memory is always there.
            sent @ Sent::Packed { .. } => {
                self.on_sent(sent, env);
                None
            }
            Sent::Write(id) => {
                self.blame_send_fault(&Sent::Write(id), env);
                self.write_sent(id, env);
                if self.request(id).is_some() {
                    self.answered(id, None, env);
                }
                None
            }
        }
    }

    /// A frame that is partly sent names memory of ours that is not mapped. The link is about to be
    /// closed for it; the transfer that is to blame says why.
    pub(crate) fn blame_send_fault(&mut self, sent: &Sent, env: &mut Env<'_>) {
        let Sent::Write(id) = sent else { return };
        let Some(request) = self.request(*id).filter(|request| !request.orphan) else { return };
        let (key, piece) = (request.active, request.piece);
        let Some(active) = self.active.get(key.slot) else { return };
        let addr = active.shared.plan.local(piece).first().map_or(0, IoSegment::addr);
        self.fail(key.slot, Error::Fault { addr }, env);
    }

    /// The payload of a DATA has arrived, or could not be written into local memory.
    pub(in crate::session::core) fn data_arrived(
        &mut self,
        id: u64,
        fault: Option<u64>,
        env: &mut Env<'_>,
    ) {
        if self.request(id).is_none() {
            return;
        }
        let error = fault.map(|addr| Error::Fault { addr });
        self.answered(id, error, env);
    }

    /// A STATUS has arrived.
    pub(in crate::session::core) fn on_status(
        &mut self,
        link: LinkId,
        header: &Header,
        env: &mut Env<'_>,
    ) -> Result<(), ProtocolError> {
        let peer = self.peer.name.clone();
        let status = ServeStatus::from_u16(header.status)
            .ok_or(ProtocolError::Rule("unknown status of a request"))?;
        let request =
            self.request(header.id).ok_or(ProtocolError::Rule("STATUS for no request"))?;
        if request.link != link || request.unsent {
            return Err(ProtocolError::Rule("STATUS for another request"));
        }
        if request.operation == Operation::Read && status == ServeStatus::Ok {
            return Err(ProtocolError::Rule("STATUS ok for a READ"));
        }
        let error = match status {
            ServeStatus::Ok => None,
            refused => Some(Error::Permission { peer, reason: refused.reason() }),
        };
        self.answered(header.id, error, env);
        Ok(())
    }

    pub(in crate::session::core) fn answered(
        &mut self,
        id: u64,
        error: Option<Error>,
        env: &mut Env<'_>,
    ) {
        let slot = (id & u64::from(u32::MAX)) as usize;
        let request = self.requests.remove(slot);
        let now = env.now;
        if let Some(link) = self.link(request.link) {
            link.outstanding -= 1;
            (link.last_use, link.answered) = (now, now);
        }
        let key = request.active;
        if request.orphan {
            return self.orphan_answered(key, env);
        }
        let active = &mut self.active[key.slot];
        reached!(transfer, active.state(), TransferEvent::Answered);
        active.outstanding -= 1;
        if let Some(error) = error {
            return self.fail(key.slot, error, env);
        }
        // What landed from a lost link, before it was begun again, may be on its way still.
        let quiet = active.unsent == 0;
        let answered = (active.outstanding == 0 && quiet) || mutated!(AnyAnswerCompletes);
        let asked = active.next_piece as usize == active.shared.plan.pieces.len();
        if answered && (asked || mutated!(EarlyCompletion)) {
            self.finish(key.slot, env);
        }
    }
}
