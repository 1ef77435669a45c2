//! Frames of the peer: its requests are served, its answers and notifications taken.

use super::links::{CoreLink, Reply};
use super::{ACK_DELAY, AckPlan, Core, Env, LinkId, MAX_OUTSTANDING, ProtocolError};
use crate::gpu::BLOCK_BYTES;
use crate::memory::{RegionUses, Segments};
use crate::notification::Notification;
use crate::session::inbox::Arrival;
use crate::session::outbox::Bound;
use crate::sys::IoSegment;
use crate::wire::frame::{
    FLAG_COUNTED, FLAG_VOID, FrameKind, Header, ServeStatus, WireSegment, segments,
};
use crate::wire::hello::LinkKind;
use crate::wire::{Access, MemoryKind};

/// How a WRITE is answered once its payload is off the wire.
#[derive(Debug)]
pub(crate) struct ServedWrite {
    id: u64,
    status: ServeStatus,
    /// The transfer to count the piece for.
    counted: Option<u64>,
    uses: RegionUses,
}

impl ServedWrite {
    /// The regions that it goes into.
    pub(crate) fn uses(&self) -> &RegionUses {
        &self.uses
    }
}

/// Where the payload of a frame goes. Given back to `on_payload` when it has arrived.
#[derive(Debug)]
#[must_use]
pub(crate) enum Dest {
    /// There is no payload; nothing is given back.
    None,
    /// The answer to one of our READs: ask `destination` before every byte.
    Request(u64),
    /// Memory of ours that the peer writes.
    Region { segments: Segments, write: ServedWrite },
    /// A WRITE that was refused: its payload is thrown away.
    Refused(ServedWrite),
    /// Memory of a GPU: the payload goes into a block first.
    Landing(Landing),
    /// A notification; the buffer has the payload's length.
    Notification { arrival: Arrival, payload: Vec<u8> },
}

/// A payload for memory of a GPU of ours.
#[derive(Debug)]
#[must_use]
pub(crate) enum Landing {
    /// The answer to one of our READs.
    Request(u64),
    /// A WRITE of the peer.
    Region { segments: Segments, write: ServedWrite },
}

/// The memory of an admitted request, counted as used, and whether it is a GPU's.
struct Admitted {
    segments: Segments,
    uses: RegionUses,
    on_gpu: bool,
}

impl Core {
    /// Takes a header and its body.
    ///
    /// # Errors
    /// The peer broke the protocol: close the link.
    pub(crate) fn on_frame(
        &mut self,
        link: LinkId,
        header: &Header,
        body: &[u8],
        env: &mut Env<'_>,
    ) -> Result<Dest, ProtocolError> {
        let (kind, ours) = match self.link(link) {
            Some(link) if !link.closing => (link.kind, link.ours),
            _ => return Err(ProtocolError::Rule("a frame on a link that is closing")),
        };
        let session = kind == LinkKind::Session;
        self.confirmed |= session;
        match header.kind {
            FrameKind::Read if session || !ours => self.on_read(link, header, body, env)?,
            FrameKind::Write if session || !ours => return self.on_write(link, header, body, env),
            FrameKind::Data if session || ours => {
                let lands = self.check_data(link, header)?;
                return Ok(if lands {
                    Dest::Landing(Landing::Request(header.id))
                } else {
                    Dest::Request(header.id)
                });
            }
            FrameKind::Status if session || ours => self.on_status(link, header, env)?,
            FrameKind::Notify if session => {
                if let Some(below) = header.acknowledges() {
                    self.on_ack(below, env)?;
                }
                return self.on_notify(header);
            }
            // What has been dropped with its session may be acknowledged while the link closes.
            FrameKind::Ack if session => self.on_ack(header.aux, env)?,
            FrameKind::Ping if session => {
                let pongs = || self.control.iter().filter(|h| h.kind == FrameKind::Pong).count();
                if self.control.len() >= 2 * MAX_OUTSTANDING && pongs() >= 2 * MAX_OUTSTANDING {
                    return Err(ProtocolError::Rule("too many unanswered PINGs"));
                }
                self.control.push_back(Header { id: header.id, ..Header::new(FrameKind::Pong) });
            }
            FrameKind::Pong if session => {}
            FrameKind::Goodbye if session => self.on_goodbye(env),
            FrameKind::Abandon if session => self.inbox.abandon(header.aux),
            _ => return Err(ProtocolError::Rule("a frame that does not belong on this link")),
        }
        Ok(Dest::None)
    }

    /// Asked before a region is counted as used for a request.
    pub(super) fn on_ack(&mut self, below: u64, env: &mut Env<'_>) -> Result<(), ProtocolError> {
        if self.session == 0 {
            // The session has ended here, and the peer does not know yet.
            return Ok(());
        }
        let freed = self
            .outbox
            .acknowledge(below)
            .ok_or(ProtocolError::Rule("ACK for a notification that was not sent"))?;
        self.peer.release(freed.count, freed.bytes);
        self.try_finish_leaving(env);
        Ok(())
    }

    fn check_room(&mut self, link: LinkId) -> Result<(), ProtocolError> {
        let owed = |link: &mut CoreLink| link.replies.len() + link.packing;
        if self.link(link).is_some_and(|link| owed(link) >= MAX_OUTSTANDING) {
            return Err(ProtocolError::Rule("more requests outstanding than allowed"));
        }
        Ok(())
    }

    fn push_reply(&mut self, link: LinkId, reply: Reply) {
        if let Some(link) = self.link(link) {
            link.replies.push_back(reply);
        }
    }

    /// Checks all segments of a request. Either all are admitted, or none.
    fn admit(
        header: &Header,
        body: &[u8],
        needs: Access,
        env: &mut Env<'_>,
    ) -> Result<Result<Admitted, ServeStatus>, ProtocolError> {
        let mut admitted = env.regions.segments(header.segments as usize);
        let mut uses = RegionUses::new();
        let mut total = 0u64;
        let mut outcome = Ok(());
        for segment in segments(header, body) {
            let segment: WireSegment = match segment {
                Ok(segment) => segment,
                Err(error) => {
                    env.regions.release(uses);
                    return Err(error.into());
                }
            };
            if segment.len == 0 && header.segments > 0 {
                env.regions.release(uses);
                return Err(ProtocolError::Rule("a segment without bytes in a table"));
            }
            total = total.saturating_add(segment.len);
            if outcome.is_ok() {
                match env.regions.admit(&segment, needs, &mut uses) {
                    Ok(memory) => admitted.push(memory),
                    Err(status) => outcome = Err(status),
                }
            }
        }
        if total != header.len {
            env.regions.release(uses);
            return Err(ProtocolError::Rule("the segments do not add up to the length"));
        }
        let mut on_gpu = false;
        if env.regions.has_gpu() && outcome.is_ok() {
            match env.regions.kind_of(&uses) {
                Some(MemoryKind::Dram) => {}
                Some(MemoryKind::Vram { .. }) if total <= BLOCK_BYTES as u64 => on_gpu = total > 0,
                // No engine asks for that.
                Some(MemoryKind::Vram { .. }) | None => outcome = Err(ServeStatus::Denied),
            }
        }
        match outcome {
            Ok(()) => {
                env.counters.requests_served.add(1);
                Ok(Ok(Admitted { segments: admitted, uses, on_gpu }))
            }
            Err(status) => {
                env.regions.release(uses);
                env.counters.requests_refused.add(1);
                tracing::debug!(reason = status.reason(), "refused a request of a peer");
                Ok(Err(status))
            }
        }
    }

    fn on_read(
        &mut self,
        link: LinkId,
        header: &Header,
        body: &[u8],
        env: &mut Env<'_>,
    ) -> Result<(), ProtocolError> {
        self.check_room(link)?;
        let reply = match Self::admit(header, body, Access::REMOTE_READ, env)? {
            Ok(Admitted { segments, uses, on_gpu }) => {
                env.counters.bytes_served_read.add(header.len);
                let answer =
                    Header { id: header.id, len: header.len, ..Header::new(FrameKind::Data) };
                let uses = if mutated!(ServedUsesNotKept) {
                    env.regions.release(uses);
                    RegionUses::new()
                } else {
                    uses
                };
                if on_gpu {
                    self.pack_reply(link, answer, segments, uses);
                    return Ok(());
                }
                Reply::Data { header: answer, segments, uses }
            }
            Err(status) => Reply::Status(status_header(header.id, status)),
        };
        self.push_reply(link, reply);
        Ok(())
    }

    fn on_write(
        &mut self,
        link: LinkId,
        header: &Header,
        body: &[u8],
        env: &mut Env<'_>,
    ) -> Result<Dest, ProtocolError> {
        self.check_room(link)?;
        let counted = (header.flags & FLAG_COUNTED != 0).then_some(header.aux);
        let mut write = ServedWrite {
            id: header.id,
            status: ServeStatus::Ok,
            counted,
            uses: RegionUses::new(),
        };
        match Self::admit(header, body, Access::REMOTE_WRITE, env)? {
            Ok(Admitted { segments, uses, on_gpu }) => {
                write.uses = uses;
                if on_gpu {
                    return Ok(Dest::Landing(Landing::Region { segments, write }));
                }
                Ok(Dest::Region { segments, write })
            }
            Err(status) => {
                write.status = status;
                Ok(Dest::Refused(write))
            }
        }
    }

    fn on_notify(&mut self, header: &Header) -> Result<Dest, ProtocolError> {
        let bound = (header.flags & FLAG_COUNTED != 0)
            .then_some(Bound { transfer: header.key as u64, pieces: (header.key >> 64) as u32 });
        let arrival = Arrival {
            seq: header.aux,
            offset: header.id,
            len: header.len,
            total: header.addr,
            bound,
            void: header.flags & FLAG_VOID != 0,
        };
        self.inbox.check(&arrival)?;
        // At most MAX_PAYLOAD, checked with the header; `check` has bounded it by the total.
        Ok(Dest::Notification { arrival, payload: vec![0; header.len as usize] })
    }

    /// A payload is off the wire. `fault`: an address that could not be written.
    pub(crate) fn on_payload(
        &mut self,
        link: LinkId,
        dest: Dest,
        fault: Option<u64>,
        env: &mut Env<'_>,
    ) -> Result<(), ProtocolError> {
        if self.link(link).is_none_or(|link| link.closing) {
            Self::drop_payload(dest, env);
            return Ok(());
        }
        match dest {
            Dest::None => Ok(()),
            Dest::Landing(landing) => self.landed(link, landing, None, Ok(()), env),
            Dest::Request(id) => {
                self.data_arrived(id, fault, env);
                Ok(())
            }
            Dest::Region { segments, mut write } => {
                if fault.is_some() {
                    write.status = ServeStatus::Fault;
                }
                let len: usize = segments.iter().map(IoSegment::len).sum();
                env.counters.bytes_served_write.add(len as u64);
                env.regions.recycle(segments);
                self.finish_write(link, write, env)
            }
            Dest::Refused(write) => self.finish_write(link, write, env),
            Dest::Notification { arrival, payload } => {
                self.inbox.arrive(&arrival, payload)?;
                self.deliver(env);
                Ok(())
            }
        }
    }

    /// A payload will never be complete: its link is gone.
    pub(crate) fn drop_payload(dest: Dest, env: &mut Env<'_>) {
        if let Dest::Region { write, .. }
        | Dest::Refused(write)
        | Dest::Landing(Landing::Region { write, .. }) = dest
            && !mutated!(DroppedPayloadKeepsUses)
        {
            env.regions.release(write.uses);
        }
    }

    fn finish_write(
        &mut self,
        link: LinkId,
        write: ServedWrite,
        env: &mut Env<'_>,
    ) -> Result<(), ProtocolError> {
        env.regions.release(write.uses);
        if let Some(transfer) = write.counted {
            self.inbox.piece(transfer, write.status == ServeStatus::Ok)?;
            self.deliver(env);
        }
        self.push_reply(link, Reply::Status(status_header(write.id, write.status)));
        if mutated!(AnswersTwice) {
            self.push_reply(link, Reply::Status(status_header(write.id, write.status)));
        }
        Ok(())
    }

    /// Hands notifications to the application's queue, and plans their acknowledgement.
    pub(crate) fn deliver(&mut self, env: &mut Env<'_>) {
        let from = &self.peer.name;
        let mut flushed = false;
        self.inbox.deliver(|payload| {
            if !std::mem::replace(&mut flushed, true) {
                // What it tells of may have been written by a device, into memory of a GPU.
                env.regions.flush();
            }
            env.notifications
                .push(Notification { from: from.clone(), payload })
                .or_else(|back| if mutated!(FullQueueDrops) { Ok(()) } else { Err(back.payload) })
        });
        // Without a link the next handshake tells the peer.
        if self.ack == AckPlan::None && self.session_link().is_some() {
            self.ack = AckPlan::At(env.now + ACK_DELAY);
        }
    }

    /// Whether notifications wait for room in the application's queue.
    pub(crate) fn is_backlogged(&self) -> bool {
        self.inbox.is_backlogged()
    }
}

fn status_header(id: u64, status: ServeStatus) -> Header {
    Header { id, status: status as u16, ..Header::new(FrameKind::Status) }
}
