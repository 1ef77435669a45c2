//! Frames of an open link as bytes: what [`crate::transport`] does with sockets.

use std::collections::VecDeque;

use super::coverage::Event as Input;
use super::links::Phase;
use super::node::{Node, Outside, Touch};
use crate::session::{Core, Dest, TxFrame, TxPayload};
use crate::sys::IoSegment;
use crate::wire::frame::{FrameKind, HEADER_BYTES, Header};
use crate::wire::hello::LinkKind;

/// Frames taken from the core before they are on the wire, as the driver does.
const TX_FRAMES: usize = 32;
const TX_BYTES: usize = 3 << 10;

enum Rx {
    Header,
    Body(Header),
    Payload { dest: Dest, left: usize, done: usize, fault: Option<u64> },
}

/// Both halves of a link.
pub(super) struct Stream {
    frames: VecDeque<TxFrame>,
    /// Bytes of the first frame that are sent.
    sent: usize,
    state: Rx,
    input: Vec<u8>,
}

impl Stream {
    pub(super) fn new() -> Self {
        Self { frames: VecDeque::new(), sent: 0, state: Rx::Header, input: Vec::new() }
    }
}

fn body(frame: &TxFrame) -> &[u8] {
    frame.body.as_ref().map_or(&[][..], |(plan, piece)| plan.body(*piece))
}

/// The memory that a payload is in; bytes of a notification are in none.
fn segments(frame: &TxFrame) -> &[IoSegment] {
    match &frame.payload {
        TxPayload::Plan(plan, piece) => plan.local(*piece),
        TxPayload::Served(segments) => segments,
        TxPayload::None | TxPayload::Bytes(..) => &[],
    }
}

fn frame_len(frame: &TxFrame) -> usize {
    let payload = match &frame.payload {
        TxPayload::Bytes(_, range) => range.len(),
        _ => segments(frame).iter().map(IoSegment::len).sum(),
    };
    HEADER_BYTES + body(frame).len() + payload
}

/// The parts of `segments` that hold `len` bytes from `skip` on.
fn parts(segments: &[IoSegment], mut skip: usize, mut len: usize) -> Vec<(u64, usize)> {
    let mut parts = Vec::new();
    for segment in segments {
        if skip >= segment.len() {
            skip -= segment.len();
            continue;
        }
        let now = (segment.len() - skip).min(len);
        if now == 0 {
            break;
        }
        parts.push((segment.addr() + skip as u64, now));
        (skip, len) = (0, len - now);
    }
    parts
}

/// Bytes of a frame from `from` on, at most `max`.
fn frame_bytes(
    frame: &TxFrame,
    touch: Touch,
    from: usize,
    max: usize,
    out: &mut dyn Outside,
) -> Vec<u8> {
    let head = HEADER_BYTES + body(frame).len();
    if from < head {
        let bytes = frame.header.iter().chain(body(frame));
        return bytes.skip(from).take(max).copied().collect();
    }
    let skip = from - head;
    if let TxPayload::Bytes(bytes, range) = &frame.payload {
        let start = range.start + skip;
        return bytes[start..range.end.min(start + max)].to_vec();
    }
    let mut all = Vec::new();
    for (addr, len) in parts(segments(frame), skip, max) {
        let at = all.len();
        all.resize(at + len, 0);
        out.read(touch, addr, &mut all[at..]);
    }
    all
}

impl Node {
    pub(super) fn flush_peer(&mut self, slot: usize, out: &mut dyn Outside) {
        self.flush_ring(slot, out);
        self.take_copies(slot);
        self.flush_wire(slot, out);
        let mut at = 0;
        while let Some(&link) = self.peers.get(slot).and_then(|peer| peer.links.get(at)) {
            self.flush_link(link, out);
            at += 1;
        }
    }

    /// There is room again.
    pub fn writable(&mut self, link: u64) {
        if let Some(Phase::Open { peer, .. }) = self.links.get(&link).map(|link| &link.phase) {
            let slot = *peer;
            self.mark(slot);
        }
    }

    /// Takes frames from the core and sends them, until there are none or the link is full.
    pub(super) fn flush_link(&mut self, link: u64, out: &mut dyn Outside) {
        loop {
            let Some(known) = self.links.get_mut(&link) else { return };
            let Phase::Open { peer, stream, .. } = &mut known.phase else { return };
            let slot = *peer;
            let mut queued: usize = stream.frames.iter().map(frame_len).sum();
            let mut frames = stream.frames.len();
            let mut taken = Vec::new();
            while frames < TX_FRAMES && queued < TX_BYTES {
                let batched = frames > 0;
                let frame =
                    self.quiet_core(slot, |core, env| core.poll_transmit(link, batched, env));
                let Some(frame) = frame else { break };
                out.note(&|| describe_frame("sends", link, &frame.header));
                queued += frame_len(&frame);
                frames += 1;
                taken.push(frame);
            }
            let Some(known) = self.links.get_mut(&link) else { return };
            let Phase::Open { stream, .. } = &mut known.phase else { return };
            stream.frames.extend(taken);
            if stream.frames.is_empty() || !self.send_some(link, slot, out) {
                return;
            }
        }
    }

    /// Sends as much as there is room for; false: the link is full, or gone.
    fn send_some(&mut self, link: u64, slot: usize, out: &mut dyn Outside) -> bool {
        let mut room = out.room(link);
        let incarnation = self.peers[slot].core.peer.incarnation;
        let mut bytes = Vec::new();
        loop {
            let Some(known) = self.links.get_mut(&link) else { return false };
            let Phase::Open { stream, .. } = &mut known.phase else { return false };
            let Some(frame) = stream.frames.front() else { break };
            if room == 0 {
                break;
            }
            let unmapped = segments(frame).iter().any(|s| !out.is_mapped(s.addr(), s.len() as u64));
            if unmapped {
                if !bytes.is_empty() {
                    // It is taken up when what goes before is sent.
                    break;
                }
                if !self.send_fault(link, slot, out) {
                    return false;
                }
                continue;
            }
            let touch = match frame.payload {
                TxPayload::Served(_) => Touch::Served(incarnation),
                _ => Touch::Own,
            };
            let len = frame_len(frame);
            let some = frame_bytes(frame, touch, stream.sent, room.min(len - stream.sent), out);
            room -= some.len();
            stream.sent += some.len();
            bytes.extend(some);
            if stream.sent == len {
                stream.sent = 0;
                if let Some(frame) = stream.frames.pop_front() {
                    self.quiet_core(slot, |core, env| core.on_sent(frame.sent, env));
                }
            }
        }
        let sent = !bytes.is_empty();
        if sent {
            out.send(link, bytes);
        }
        sent && room > 0
    }

    /// The first frame names memory that is not mapped; false: the link is closed for it.
    fn send_fault(&mut self, link: u64, slot: usize, out: &mut dyn Outside) -> bool {
        let Some(known) = self.links.get_mut(&link) else { return false };
        let Phase::Open { stream, .. } = &mut known.phase else { return false };
        let Some(frame) = stream.frames.pop_front() else { return false };
        if stream.sent == 0 {
            let instead =
                self.with_core(slot, Input::SendFault, |core, env| core.on_send_fault(frame, env));
            if let (Some(instead), Some(known)) = (instead, self.links.get_mut(&link))
                && let Phase::Open { stream, .. } = &mut known.phase
            {
                stream.frames.push_front(instead);
            }
            return true;
        }
        stream.frames.push_front(frame);
        let Some(front) = stream.frames.front() else { return false };
        let mut env = crate::session::Env {
            now: self.now,
            clock: None,
            regions: &mut self.regions,
            notifications: &self.queue,
            counters: &self.counters,
        };
        self.peers[slot].core.blame_send_fault(&front.sent, &mut env);
        self.close_link(link, "registered memory could not be read", out);
        false
    }

    pub(super) fn receive_frames(
        &mut self,
        link: u64,
        slot: usize,
        kind: LinkKind,
        mut bytes: &[u8],
        out: &mut dyn Outside,
    ) {
        let now = self.now;
        self.quiet_core(slot, |core, _| core.heard(now));
        while !bytes.is_empty() {
            let Some(known) = self.links.get_mut(&link) else { return };
            let Phase::Open { stream, .. } = &mut known.phase else { return };
            let want = match &stream.state {
                Rx::Header => HEADER_BYTES - stream.input.len(),
                Rx::Body(header) => header.body as usize - stream.input.len(),
                Rx::Payload { left, .. } => *left,
            };
            let (now, rest) = bytes.split_at(want.min(bytes.len()));
            bytes = rest;
            let outcome = if let Rx::Payload { .. } = stream.state {
                self.take_payload(link, slot, now, out);
                Ok(())
            } else {
                stream.input.extend(now);
                if now.len() == want { self.header_or_body(link, slot, kind, out) } else { Ok(()) }
            };
            let outcome = outcome.and_then(|()| self.end_payload(link, slot));
            if let Err(reason) = outcome {
                let peer = self.peers[slot].core.peer.incarnation;
                out.broken(peer, &reason);
                return self.close_link(link, &reason, out);
            }
            self.mark(slot);
        }
    }

    fn header_or_body(
        &mut self,
        link: u64,
        slot: usize,
        kind: LinkKind,
        out: &mut dyn Outside,
    ) -> Result<(), String> {
        let Some(known) = self.links.get_mut(&link) else { return Ok(()) };
        let Phase::Open { stream, .. } = &mut known.phase else { return Ok(()) };
        let input = std::mem::take(&mut stream.input);
        let (header, body) = if let Rx::Body(header) = stream.state {
            (header, input)
        } else {
            let bytes: [u8; HEADER_BYTES] = input.try_into().map_err(|_| "no header")?;
            out.note(&|| describe_frame("takes", link, &bytes));
            let header = Header::decode(&bytes).map_err(|e| e.to_string())?;
            if header.body > 0 {
                stream.state = Rx::Body(header);
                return Ok(());
            }
            (header, Vec::new())
        };
        stream.state = Rx::Header;
        if header.kind.is_local() {
            return self.on_local_frame(link, slot, kind, &header, out);
        }
        let input = Input::of_frame(header.kind);
        if header.kind.is_rdma() {
            return self.on_wire_frame(link, slot, &header, out);
        }
        let dest = self
            .with_core(slot, input, |core, env| core.on_frame(link, &header, &body, env))
            .map_err(|e| e.to_string())?;
        if header.kind.has_payload()
            && let Some(known) = self.links.get_mut(&link)
            && let Phase::Open { stream, .. } = &mut known.phase
        {
            let left = header.len as usize;
            stream.state = Rx::Payload { dest, left, done: 0, fault: None };
        }
        Ok(())
    }

    fn take_payload(&mut self, link: u64, slot: usize, now: &[u8], out: &mut dyn Outside) {
        let incarnation = self.peers[slot].core.peer.incarnation;
        let Some(known) = self.links.get_mut(&link) else { return };
        let Phase::Open { stream, .. } = &mut known.phase else { return };
        let Rx::Payload { dest, left, done, fault } = &mut stream.state else { return };
        let at = *done;
        *done += now.len();
        *left -= now.len();
        if fault.is_some() {
            return;
        }
        let (segments, touch) = match dest {
            Dest::Request(id) => {
                let core = &mut self.peers[slot].core;
                (core.destination(*id).unwrap_or(&[]).to_vec(), Touch::Own)
            }
            Dest::Region { segments, .. } => (segments.to_vec(), Touch::Served(incarnation)),
            Dest::Notification { payload, .. } => {
                payload[at..at + now.len()].copy_from_slice(now);
                return;
            }
            Dest::Refused(_) | Dest::Landing(_) | Dest::None => return,
        };
        let mut from = 0;
        for (addr, len) in parts(&segments, at, now.len()) {
            if !out.write(touch, addr, &now[from..from + len]) {
                *fault = Some(addr);
                return;
            }
            from += len;
        }
    }

    fn end_payload(&mut self, link: u64, slot: usize) -> Result<(), String> {
        let Some(known) = self.links.get_mut(&link) else { return Ok(()) };
        let Phase::Open { stream, .. } = &mut known.phase else { return Ok(()) };
        if !matches!(stream.state, Rx::Payload { left: 0, .. }) {
            return Ok(());
        }
        if let Rx::Payload { dest, fault, .. } = std::mem::replace(&mut stream.state, Rx::Header) {
            self.with_core(slot, Input::Payload, |core, env| {
                core.on_payload(link, dest, fault, env)
            })
            .map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn detach_wire_of(&mut self, link: u64, out: &mut dyn Outside) {
        if let Some(Phase::Open { peer, kind: LinkKind::Session, .. }) =
            self.links.get(&link).map(|link| &link.phase)
        {
            let slot = *peer;
            self.wire_detach(slot, link, out);
        }
    }

    /// Ends an open link.
    pub(super) fn close_link(&mut self, link: u64, reason: &str, out: &mut dyn Outside) {
        if !matches!(self.links.get(&link).map(|link| &link.phase), Some(Phase::Open { .. })) {
            return;
        }
        self.take_rest_of_ring(link, out);
        self.detach_wire_of(link, out);
        let Some(known) = self.links.remove(&link) else { return };
        let Phase::Open { peer: slot, kind, stream } = known.phase else { return };
        out.note(&|| format!("closes link {link}: {reason}"));
        out.close(link);
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.links.retain(|known| *known != link);
        if peer.ring == Some(link) {
            peer.ring = None;
            peer.core.set_ring(None);
        }
        if peer.local.as_ref().is_some_and(|local| local.link == link) {
            peer.local = None;
        }
        let input = if kind == LinkKind::Session { Input::SessionDown } else { Input::BulkDown };
        self.with_core(slot, input, |core, env| {
            if let Rx::Payload { dest, .. } = stream.state {
                Core::drop_payload(dest, env);
            }
            for frame in stream.frames {
                core.on_sent(frame.sent, env);
            }
            core.link_down(link, reason, env);
        });
    }
}

fn describe_frame(verb: &str, link: u64, bytes: &[u8; HEADER_BYTES]) -> String {
    match Header::decode(bytes) {
        Ok(Header { kind, flags, status, len, id, aux, .. }) => {
            let text = format!("link {link} {verb} {kind:?} len {len} id {id:#x} aux {aux}");
            if flags != 0 || (kind == FrameKind::Status && status != 0) {
                return format!("{text} flags {flags} status {status}");
            }
            text
        }
        Err(error) => format!("link {link} {verb} {error}"),
    }
}
