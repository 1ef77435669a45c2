//! The links of a peer and what is sent on them next.

use std::collections::VecDeque;
use std::time::Instant;

use super::requests::Queue;
use super::staged::PackSize;
use super::{
    ACK_COUNT, AckPlan, BULK_WINDOW, Core, Env, Event, LinkId, MAX_OUTSTANDING, Phase, Sent,
    TxFrame, TxPayload,
};
use crate::gpu::Block;
use crate::memory::{RegionUses, Segments};
use crate::session::outbox::Fragment;
use crate::wire::frame::{FLAG_COUNTED, FLAG_VOID, FrameKind, Header};
use crate::wire::hello::LinkKind;

/// An answer to a request of the peer.
pub(super) enum Reply {
    Status(Header),
    Data {
        header: Header,
        segments: Segments,
        uses: RegionUses,
    },
    /// The bytes are in this block.
    Packed {
        header: Header,
        block: Block,
    },
}

/// A link that is up.
pub(super) struct CoreLink {
    pub(super) id: LinkId,
    pub(super) kind: LinkKind,
    /// We opened it: on a bulk link only the opener sends requests.
    pub(super) ours: bool,
    /// Our requests on it without an answer.
    pub(super) outstanding: usize,
    /// Answers that we owe.
    pub(super) replies: VecDeque<Reply>,
    /// Further answers, whose bytes are on their way from a GPU.
    pub(super) packing: usize,
    pub(super) last_use: Instant,
    pub(super) since: Instant,
    /// When the last of our requests on it was answered, or the first of those that wait was sent.
    pub(super) answered: Instant,
    /// The driver has been asked to close it: nothing is taken from it or sent on it any more.
    pub(super) closing: bool,
}

impl Core {
    pub(super) fn add_link(&mut self, id: LinkId, kind: LinkKind, ours: bool, now: Instant) {
        self.links.push(CoreLink {
            id,
            kind,
            ours,
            outstanding: 0,
            replies: VecDeque::new(),
            packing: 0,
            last_use: now,
            since: now,
            answered: now,
            closing: false,
        });
    }

    pub(super) fn link(&mut self, id: LinkId) -> Option<&mut CoreLink> {
        self.links.iter_mut().find(|link| link.id == id)
    }

    pub(crate) fn session_link(&self) -> Option<LinkId> {
        let mut open = self.links.iter().filter(|link| !link.closing);
        open.find(|link| link.kind == LinkKind::Session).map(|link| link.id)
    }

    /// Whether there is nothing to send on any link.
    pub(crate) fn is_silent(&self) -> bool {
        self.control.is_empty()
            && self.latency.is_empty()
            && self.bulk.is_empty()
            && self.ack == AckPlan::None
            && !self.has_unsent()
            && self.links.iter().all(|link| link.replies.is_empty())
    }

    /// Whether this side has opened a link.
    pub(crate) fn is_link_ours(&self, id: LinkId) -> bool {
        self.links.iter().any(|link| link.id == id && link.ours)
    }

    pub(super) fn own_bulk_links(&self) -> usize {
        let open = self.links.iter().filter(|link| !link.closing);
        open.filter(|link| link.kind == LinkKind::Bulk && link.ours).count()
    }

    pub(super) fn close(&mut self, link: LinkId, reason: impl Into<String>, after_flush: bool) {
        self.events.push_back(Event::Close { link, reason: reason.into(), after_flush });
    }

    /// A bulk link of ours came up.
    pub(crate) fn bulk_up(&mut self, id: LinkId, ours: bool, env: &mut Env<'_>) {
        if ours {
            self.bulk_connecting = self.bulk_connecting.saturating_sub(1);
        }
        if self.session_link().is_none() {
            return self.close(id, "its session is gone", false);
        }
        self.add_link(id, LinkKind::Bulk, ours, env.now);
        if ours {
            self.bulk_over_session = false;
        }
    }

    /// The next frame for this link. `batched`: others are sent with it, so that an
    /// acknowledgement costs nothing extra.
    pub(crate) fn poll_transmit(
        &mut self,
        id: LinkId,
        batched: bool,
        env: &mut Env<'_>,
    ) -> Option<TxFrame> {
        let index = self.links.iter().position(|link| link.id == id)?;
        match (self.links[index].kind, self.links[index].ours) {
            _ if self.links[index].closing => None,
            (LinkKind::Session, _) => self.poll_session(index, batched, env),
            (LinkKind::Bulk, true) => self.next_request(index, Queue::Bulk, BULK_WINDOW, env),
            (LinkKind::Bulk, false) => self.next_reply(index, env),
        }
    }

    fn poll_session(&mut self, index: usize, batched: bool, env: &mut Env<'_>) -> Option<TxFrame> {
        if let Some(header) = self.control.pop_front() {
            return Some(TxFrame::header(&header));
        }
        for _ in 0..3 {
            self.turn = (self.turn + 1) % 3;
            let frame = match self.turn {
                0 => self.next_reply(index, env),
                1 => self.next_request(index, Queue::Latency, MAX_OUTSTANDING, env),
                _ => self.next_notification(env),
            };
            if frame.is_some() {
                return frame;
            }
        }
        if self.bulk_over_session
            && let Some(frame) = self.next_request(index, Queue::Bulk, 2, env)
        {
            return Some(frame);
        }
        self.next_acknowledgement(batched, env)
    }

    fn next_reply(&mut self, index: usize, env: &mut Env<'_>) -> Option<TxFrame> {
        let link = &mut self.links[index];
        link.last_use = env.now;
        match link.replies.pop_front()? {
            Reply::Status(header) => Some(TxFrame::header(&header)),
            Reply::Data { header, segments, uses } => Some(TxFrame {
                payload: TxPayload::Served(segments),
                sent: Sent::Served(uses),
                ..TxFrame::header(&header)
            }),
            Reply::Packed { header, block } => {
                let size = PackSize::of_reply(&header);
                Some(TxFrame::packed(&header, block, size, None))
            }
        }
    }

    fn next_notification(&mut self, env: &mut Env<'_>) -> Option<TxFrame> {
        if self.session == 0 || !self.confirmed {
            // The session has ended, or may not have begun for the peer: one that it throws away
            // could not be told from one that it has seen.
            return None;
        }
        if !self.may_use_socket() {
            return None;
        }
        let Fragment { seq, payload, range, bound, void } = self.outbox.next_fragment()?;
        self.socket_until = seq + 1;
        let mut header = Header::new(FrameKind::Notify);
        header.aux = seq;
        header.id = range.start as u64;
        header.len = range.len() as u64;
        if void {
            header.flags = FLAG_VOID;
        } else {
            header.addr = payload.len() as u64;
        }
        if let (Some(bound), false) = (bound, void) {
            header.flags |= FLAG_COUNTED;
            header.key = u128::from(bound.transfer) | u128::from(bound.pieces) << 64;
        }
        if range.end == payload.len() && !void {
            env.counters.notifications_sent.add(1);
        }
        if let Some(below) = self.acknowledgement(true, env) {
            header.set_acknowledges(below);
        }
        Some(TxFrame { payload: TxPayload::Bytes(payload, range), ..TxFrame::header(&header) })
    }

    fn next_acknowledgement(&mut self, batched: bool, env: &Env<'_>) -> Option<TxFrame> {
        if self.acknowledges_by_ring() {
            return None;
        }
        let below = self.acknowledgement(batched, env)?;
        Some(TxFrame::header(&Header { aux: below, ..Header::new(FrameKind::Ack) }))
    }

    /// What to acknowledge now; `batched`: something is sent anyway.
    pub(super) fn acknowledgement(&mut self, batched: bool, env: &Env<'_>) -> Option<u64> {
        match self.ack {
            AckPlan::None => return None,
            AckPlan::At(due) => {
                let many = self.inbox.expects().saturating_sub(self.ack_base) >= ACK_COUNT;
                if !batched && !many && due > env.now {
                    return None;
                }
            }
            AckPlan::Now => {}
        }
        self.ack = AckPlan::None;
        if mutated!(NeverAcknowledges) {
            return None;
        }
        let below = self.inbox.acknowledgement()?;
        self.ack_base = below;
        Some(below)
    }

    /// The driver is done with a frame: it was sent, or its link is gone.
    pub(crate) fn on_sent(&mut self, sent: Sent, env: &mut Env<'_>) {
        match sent {
            Sent::Nothing => {}
            Sent::Served(uses) => env.regions.release(uses),
            Sent::Write(id) => self.write_sent(id, env),
            Sent::Packed { block, size, write } => {
                drop(block);
                match write {
                    None => self.replies_to_pack.release(size),
                    Some(id) => {
                        self.writes_to_pack.release(size);
                        self.write_sent(id, env);
                    }
                }
            }
        }
    }

    /// A link is gone. The driver has called `on_sent` for all its frames.
    pub(crate) fn link_down(&mut self, id: LinkId, reason: &str, env: &mut Env<'_>) {
        let Some(index) = self.links.iter().position(|link| link.id == id) else { return };
        let link = self.links.swap_remove(index);
        env.counters.links_down.add(1);
        for reply in link.replies {
            match reply {
                Reply::Data { uses, .. } if !mutated!(LostRepliesKeepUses) => {
                    env.regions.release(uses);
                }
                Reply::Packed { header, .. } => {
                    self.replies_to_pack.release(PackSize::of_reply(&header));
                }
                Reply::Data { .. } | Reply::Status(_) => {}
            }
        }
        self.forget_packs_of(id, env);
        self.lose_requests_of(id, reason, env);
        match link.kind {
            LinkKind::Session if !link.closing => self.session_down(reason, env),
            LinkKind::Session => {}
            LinkKind::Bulk => {
                self.want_bulk();
                self.try_finish_leaving(env);
            }
        }
    }

    pub(super) fn idle_deadline(&self, link: &CoreLink) -> Option<Instant> {
        let idle = link.kind == LinkKind::Bulk && link.ours && link.outstanding == 0;
        (idle && !link.closing).then(|| link.last_use + self.config.stream_idle)
    }

    pub(super) fn close_idle_links(&mut self, env: &Env<'_>) {
        if !self.bulk.is_empty() {
            for link in &mut self.links {
                link.last_use = link.last_use.max(env.now);
            }
        }
        let idle: smallvec::SmallVec<[LinkId; 8]> = self
            .links
            .iter()
            .filter(|link| self.idle_deadline(link).is_some_and(|at| at <= env.now))
            .map(|link| link.id)
            .collect();
        for id in idle {
            self.close(id, "idle", false);
            // One that is closing takes no further request.
            if let Some(link) = self.link(id) {
                link.closing = true;
            }
        }
    }

    /// Closes streams of ours that have answered nothing for as long as a transfer may take: the other end may be gone
    /// without a word. Transfers that were cancelled do not watch over them any more.
    pub(super) fn close_dumb_streams(&mut self, now: Instant) {
        let dumb: smallvec::SmallVec<[LinkId; 8]> = self
            .links
            .iter()
            .filter(|link| self.answer_deadline(link).is_some_and(|at| at <= now))
            .map(|link| link.id)
            .collect();
        for id in dumb {
            self.close(id, "it has answered nothing within the operation timeout", false);
        }
    }

    /// When a stream of ours must have answered something.
    pub(super) fn answer_deadline(&self, link: &CoreLink) -> Option<Instant> {
        let waits = link.kind == LinkKind::Bulk && link.ours && link.outstanding > 0;
        (waits && !link.closing).then(|| link.answered + self.config.operation_timeout)
    }

    /// Opens bulk links when something waits for them.
    pub(super) fn want_bulk(&mut self) {
        let ready = matches!(self.phase, Phase::Up) && self.session_link().is_some();
        if !ready || self.bulk.is_empty() || self.bulk_over_session || self.is_way_pending() {
            return;
        }
        if self.own_bulk_links() + self.bulk_connecting == 0 {
            for _ in 0..self.config.streams {
                self.bulk_connecting += 1;
                self.events.push_back(Event::Connect { kind: LinkKind::Bulk, again: false });
            }
        }
    }
}
