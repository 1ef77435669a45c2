//! Simulated links: bytes in order within a link, links in any order, cut at any moment.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::memory::{gather, scatter};
use super::world::World;
use crate::session::core::{ConnectFailure, Core, Dest, LinkId, TxFrame, TxPayload};
use crate::session::handshake::HandshakeError;
use crate::sys::IoSegment;
use crate::wire::frame::{FrameKind, HEADER_BYTES, Header};
use crate::wire::hello::{Hello, LinkKind, Refusal, Welcome};

/// How a network behaves. Delays are drawn for each chunk of bytes.
#[derive(Clone)]
pub(super) struct Net {
    pub(super) delay_us: std::ops::Range<u64>,
    /// Bytes under way in one direction of a link.
    pub(super) capacity: usize,
    /// Bytes that one call moves at most.
    pub(super) chunk: usize,
}

impl Default for Net {
    fn default() -> Self {
        Self { delay_us: 20..300, capacity: 16 << 10, chunk: 3000 }
    }
}

enum Rx {
    Header,
    Body(Header),
    Payload { dest: Dest, left: usize, done: usize },
}

pub(super) enum Handshake {
    Hello { at: Instant, hello: Hello },
    Answer { at: Instant, answer: Result<Welcome, Refusal> },
    Over,
}

/// One engine's side of a link.
pub(super) struct End {
    pub(super) node: usize,
    /// The core knows it.
    pub(super) open: bool,
    pub(super) closed: bool,
    pub(super) dirty: bool,
    frames: VecDeque<TxFrame>,
    sent: usize,
    /// What this end has sent and the other has not received.
    pub(super) pipe: VecDeque<(Instant, Vec<u8>)>,
    last: Instant,
    /// When the other end learns that this one is closed.
    pub(super) fin: Option<Instant>,
    state: Rx,
    input: Vec<u8>,
}

impl End {
    fn new(node: usize, now: Instant) -> Self {
        Self {
            node,
            open: false,
            closed: false,
            dirty: false,
            frames: VecDeque::new(),
            sent: 0,
            pipe: VecDeque::new(),
            last: now,
            fin: None,
            state: Rx::Header,
            input: Vec::new(),
        }
    }

    pub(super) fn in_pipe(&self) -> usize {
        self.pipe.iter().map(|(_, bytes)| bytes.len()).sum()
    }
}

/// A connection; end 0 opened it.
pub(super) struct Wire {
    pub(super) kind: LinkKind,
    pub(super) ends: [End; 2],
    pub(super) handshake: Handshake,
    pub(super) began: Instant,
    /// Nothing gets through any more, and nobody is told.
    pub(super) silent: bool,
    /// What is sent from now on is lost; both ends are about to learn it.
    pub(super) cut: bool,
}

pub(super) fn link_id(wire: usize, side: usize) -> LinkId {
    (wire as u64 + 1) << 1 | side as u64
}

fn payload<'a>(frame: &'a TxFrame, own: &'a mut [IoSegment; 1]) -> &'a [IoSegment] {
    match &frame.payload {
        TxPayload::None => &[],
        TxPayload::Plan(plan, piece) => plan.local(*piece),
        TxPayload::Served(segments) => segments,
        TxPayload::Bytes(bytes, range) => {
            own[0] = IoSegment::of(&bytes[range.clone()]);
            &own[..]
        }
    }
}

fn frame_len(frame: &TxFrame) -> usize {
    let mut own = [IoSegment::new(0, 0)];
    let body = frame.body.as_ref().map_or(0, |(plan, piece)| plan.body(*piece).len());
    HEADER_BYTES + body + payload(frame, &mut own).iter().map(IoSegment::len).sum::<usize>()
}

impl World {
    fn delay(&mut self) -> Duration {
        let range = self.net.delay_us.clone();
        Duration::from_micros(range.start + self.rng.below(range.end - range.start))
    }

    /// A node opens a link to the other one.
    pub(super) fn attempt(&mut self, node: usize, kind: LinkKind) {
        let other = 1 - node;
        let now = self.now;
        let intent = self.nodes[node].core.intent(kind);
        let (from, to) = (&self.nodes[node], self.nodes[node].peer.incarnation);
        let hello = Hello {
            min_version: 1,
            max_version: 1,
            kind,
            transports: 1,
            initiator: from.incarnation,
            target: to,
            nonce: [0; 32],
            session: intent.session,
            attempt: intent.attempt,
            expects: intent.expects,
            liveness_ms: self.liveness_ms(node),
            name: from.name.into(),
        };
        let at = now + self.delay() * 2;
        self.wires.push(Wire {
            kind,
            ends: [End::new(node, now), End::new(other, now)],
            handshake: Handshake::Hello { at, hello },
            began: now,
            silent: self.partitioned,
            cut: false,
        });
    }

    /// The target has the initiator's proof.
    pub(super) fn hello_arrives(&mut self, wire: usize) {
        let Handshake::Hello { hello, .. } =
            std::mem::replace(&mut self.wires[wire].handshake, Handshake::Over)
        else {
            return;
        };
        let target = self.wires[wire].ends[1].node;
        let node = &self.nodes[target];
        let (liveness, random) = (self.liveness_ms(target), self.rng.next());
        let refused = self.wires[wire].ends[0].closed && self.rng.chance(50);
        let answer = if !node.alive || self.refusing[target] {
            Err(Refusal::ShuttingDown)
        } else if hello.target != node.incarnation {
            Err(Refusal::Incarnation)
        } else if hello.initiator != node.peer.incarnation {
            Err(Refusal::NameInUse)
        } else {
            self.call(target, |core, env| match hello.kind {
                LinkKind::Session => core.accept_session(&hello, liveness, random, env),
                LinkKind::Bulk => core.accept_bulk(&hello),
            })
        };
        if let Ok(welcome) = &answer {
            let id = link_id(wire, 1);
            if refused {
                // The initiator is gone before the welcome can be sent.
                if hello.kind == LinkKind::Session {
                    self.call(target, Core::accept_failed);
                }
                return self.close_end(wire, 1, "gone");
            }
            self.wires[wire].ends[1].open = true;
            self.call(target, |core, env| match hello.kind {
                LinkKind::Session => core.session_up(id, welcome.liveness_ms, false, false, env),
                LinkKind::Bulk => core.bulk_up(id, false, env),
            });
        }
        let at = self.now + self.delay();
        self.wires[wire].ends[1].last = at;
        self.wires[wire].handshake = Handshake::Answer { at, answer };
    }

    /// The initiator has the target's answer.
    pub(super) fn answer_arrives(&mut self, wire: usize) {
        let Handshake::Answer { answer, .. } =
            std::mem::replace(&mut self.wires[wire].handshake, Handshake::Over)
        else {
            return;
        };
        let (node, kind) = (self.wires[wire].ends[0].node, self.wires[wire].kind);
        if self.wires[wire].ends[0].closed {
            return;
        }
        let id = link_id(wire, 0);
        match answer {
            Ok(welcome) => {
                let outcome = self.call(node, |core, env| match kind {
                    LinkKind::Session => core.session_welcomed(id, &welcome, false, env),
                    LinkKind::Bulk => {
                        core.bulk_up(id, true, env);
                        Ok(())
                    }
                });
                match outcome {
                    Ok(()) => {
                        let end = &mut self.wires[wire].ends[0];
                        (end.open, end.dirty) = (true, true);
                        if kind == LinkKind::Session {
                            self.nodes[node].connector = None;
                        }
                    }
                    Err(reason) => self.attempt_failed(wire, reason, None),
                }
            }
            Err(refusal) => self.attempt_failed(wire, refusal.reason(), Some(refusal)),
        }
    }

    pub(super) fn attempt_failed(&mut self, wire: usize, reason: &str, refusal: Option<Refusal>) {
        let (node, kind) = (self.wires[wire].ends[0].node, self.wires[wire].kind);
        self.close_end(wire, 0, reason);
        if kind == LinkKind::Session {
            let now = self.now;
            let Some(connector) = &mut self.nodes[node].connector else { return };
            if connector.wire != wire {
                return;
            }
            if refusal == Some(Refusal::Simultaneous) && now < connector.deadline {
                connector.retry = Some(now + Duration::from_millis(50));
                return;
            }
            self.nodes[node].connector = None;
        }
        let failure = ConnectFailure {
            reason: reason.into(),
            handshake: refusal.map(HandshakeError::Refused),
            refused: !self.nodes[1 - node].alive,
        };
        self.call(node, |core, env| core.connect_failed(kind, &failure, env));
    }

    /// Closes one side of a link, as the driver does.
    pub(super) fn close_end(&mut self, wire: usize, side: usize, reason: &str) {
        let delay = self.delay();
        let at = self.wires[wire].ends[side].last.max(self.now) + delay;
        let end = &mut self.wires[wire].ends[side];
        if std::mem::replace(&mut end.closed, true) {
            return;
        }
        end.fin = Some(at);
        let (node, open) = (end.node, std::mem::replace(&mut end.open, false));
        let state = std::mem::replace(&mut end.state, Rx::Header);
        let frames: Vec<TxFrame> = end.frames.drain(..).collect();
        self.wires[wire].ends[1 - side].pipe.clear();
        self.call(node, |core, env| {
            if let Rx::Payload { dest, .. } = state {
                Core::drop_payload(dest, env);
            }
            for frame in frames {
                core.on_sent(frame.sent, env);
            }
            if open {
                core.link_down(link_id(wire, side), reason, env);
            }
        });
    }

    /// Sends what one side of a link has, as far as this turn goes.
    pub(super) fn flush(&mut self, wire: usize, side: usize) {
        let node = self.wires[wire].ends[side].node;
        let id = link_id(wire, side);
        let limit = 1 + self.rng.below(8) as usize;
        while self.wires[wire].ends[side].frames.len() < limit {
            let batched = !self.wires[wire].ends[side].frames.is_empty();
            let frame = self.quiet_call(node, |core, env| core.poll_transmit(id, batched, env));
            let Some(frame) = frame else { break };
            if let Ok(header) = Header::decode(&frame.header)
                && matches!(header.kind, FrameKind::Read | FrameKind::Write)
                && node == 0
            {
                self.asked.push((wire, header));
            }
            self.wires[wire].ends[side].frames.push_back(frame);
        }
        if self.wires[wire].ends[side].frames.is_empty() {
            self.wires[wire].ends[side].dirty = false;
            return;
        }
        let room = self.net.capacity.saturating_sub(self.wires[wire].ends[side].in_pipe());
        let mut budget = room.min(1 + self.rng.below(self.net.chunk as u64) as usize);
        let mut bytes = Vec::new();
        while budget > 0
            && let Some(frame) = self.wires[wire].ends[side].frames.front()
        {
            let (from, len) = (self.wires[wire].ends[side].sent, frame_len(frame));
            let some = self.frame_bytes(node, frame, from, budget.min(len - from));
            budget -= some.len();
            let end = &mut self.wires[wire].ends[side];
            end.sent += some.len();
            bytes.extend(some);
            if end.sent == len {
                end.sent = 0;
                if let Some(frame) = end.frames.pop_front() {
                    self.call(node, |core, env| core.on_sent(frame.sent, env));
                }
            }
        }
        let at = (self.now + self.delay()).max(self.wires[wire].ends[side].last);
        let end = &mut self.wires[wire].ends[side];
        end.last = at;
        if !bytes.is_empty() && !self.wires[wire].cut {
            let end = &mut self.wires[wire].ends[side];
            end.pipe.push_back((at, bytes));
        }
    }

    fn frame_bytes(&self, node: usize, frame: &TxFrame, from: usize, max: usize) -> Vec<u8> {
        let body = frame.body.as_ref().map_or(&[][..], |(plan, piece)| plan.body(*piece));
        let head: Vec<u8> = frame.header.iter().chain(body).copied().collect();
        if from < head.len() {
            return head[from..head.len().min(from + max)].to_vec();
        }
        let skip = from - head.len();
        if let TxPayload::Bytes(bytes, range) = &frame.payload {
            return bytes[range.clone()][skip..skip + max].to_vec();
        }
        if let TxPayload::Plan(plan, _) = &frame.payload {
            assert!(self.is_posted(plan), "memory of a transfer is read after its end");
        }
        let mut own = [IoSegment::new(0, 0)];
        gather(&self.nodes[node].buffers, payload(frame, &mut own), skip, max)
    }

    /// Hands the next bytes under way from `side` to the other side.
    pub(super) fn deliver(&mut self, wire: usize, side: usize) {
        let Some((_, bytes)) = self.wires[wire].ends[side].pipe.pop_front() else { return };
        self.wires[wire].ends[side].dirty = true;
        let node = self.wires[wire].ends[1 - side].node;
        let now = self.now;
        self.quiet_call(node, |core, _| core.heard(now));
        if let Err(reason) = self.receive(wire, 1 - side, &bytes) {
            self.broken.push((node, reason.clone()));
            self.close_end(wire, 1 - side, &reason);
        }
    }

    pub(super) fn receive(
        &mut self,
        wire: usize,
        side: usize,
        mut bytes: &[u8],
    ) -> Result<(), String> {
        let node = self.wires[wire].ends[side].node;
        while !bytes.is_empty() && !self.wires[wire].ends[side].closed {
            let end = &mut self.wires[wire].ends[side];
            let want = match &end.state {
                Rx::Header => HEADER_BYTES - end.input.len(),
                Rx::Body(header) => header.body as usize - end.input.len(),
                Rx::Payload { left, .. } => *left,
            };
            let (now, rest) = bytes.split_at(want.min(bytes.len()));
            bytes = rest;
            match &mut end.state {
                Rx::Header | Rx::Body(_) => {
                    end.input.extend(now);
                    if now.len() == want {
                        self.header_or_body(wire, side)?;
                    }
                }
                Rx::Payload { .. } => self.take_payload(wire, side, node, now),
            }
            self.end_payload(wire, side)?;
        }
        Ok(())
    }

    fn header_or_body(&mut self, wire: usize, side: usize) -> Result<(), String> {
        let end = &mut self.wires[wire].ends[side];
        let input = std::mem::take(&mut end.input);
        let (header, body) = if let Rx::Body(header) = end.state {
            (header, input)
        } else {
            let bytes: [u8; HEADER_BYTES] = input.try_into().map_err(|_| "header")?;
            let header = Header::decode(&bytes).map_err(|e| e.to_string())?;
            if header.body > 0 {
                end.state = Rx::Body(header);
                return Ok(());
            }
            (header, Vec::new())
        };
        let (node, id) = (end.node, link_id(wire, side));
        end.state = Rx::Header;
        let dest = self
            .call(node, |core, env| core.on_frame(id, &header, &body, env))
            .map_err(|e| e.to_string())?;
        if header.kind.has_payload() {
            let left = header.len as usize;
            self.wires[wire].ends[side].state = Rx::Payload { dest, left, done: 0 };
        }
        Ok(())
    }

    fn take_payload(&mut self, wire: usize, side: usize, node: usize, now: &[u8]) {
        let Rx::Payload { dest, left, done } = &mut self.wires[wire].ends[side].state else {
            return;
        };
        let (at, total) = (*done, *done + *left);
        *done += now.len();
        *left -= now.len();
        match dest {
            Dest::Request(id) => {
                let id = *id;
                let segments = self.nodes[node].core.destination(id).unwrap_or(&[]).to_vec();
                if let Some(first) = segments.first() {
                    assert!(self.is_receiving(node, *first), "written after the end of a transfer");
                    scatter(&self.nodes[node].buffers, &segments, at, now);
                }
            }
            Dest::Region { segments, .. } => {
                scatter(&self.nodes[node].buffers, segments, at, now);
                self.nodes[node].written += now.len();
            }
            Dest::Notification { payload, .. } => {
                assert_eq!(payload.len(), total);
                payload[at..at + now.len()].copy_from_slice(now);
            }
            Dest::Refused(_) | Dest::Landing(_) | Dest::None => {}
        }
    }

    fn end_payload(&mut self, wire: usize, side: usize) -> Result<(), String> {
        let end = &mut self.wires[wire].ends[side];
        if !matches!(end.state, Rx::Payload { left: 0, .. }) {
            return Ok(());
        }
        let state = std::mem::replace(&mut end.state, Rx::Header);
        let (node, id) = (end.node, link_id(wire, side));
        if let Rx::Payload { dest, .. } = state {
            let fault = self.faults.pop();
            self.call(node, |core, env| core.on_payload(id, dest, fault, env))
                .map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}
