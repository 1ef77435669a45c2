//! What the peer says.

use super::super::Choices;
use super::{LEN, World};
use crate::session::handshake::HandshakeError;
use crate::session::{ConnectFailure, Core, Dest, LinkId, RingState};
use crate::transport::local::{MAX_RING_PAYLOAD, Message};
use crate::wire::frame::{FrameKind, HEADER_BYTES, Header, KEY_BYTES, MAX_SEGMENTS, SEGMENT_BYTES};
use crate::wire::hello::{Hello, LinkKind, Refusal, Welcome};

impl World {
    /// The link that a choice names.
    pub(super) fn pick(&self, choices: &mut Choices<'_>) -> Option<LinkId> {
        let count = self.links.len();
        (count > 0).then(|| self.links[usize::from(choices.u8()) % count].id)
    }

    pub(super) fn frame(&mut self, choices: &mut Choices<'_>) {
        let Some(id) = self.pick(choices) else { return };
        self.end_payload(id, choices.u8());
        let (header, body) = if choices.u8() < 32 {
            let bytes = choices.array::<HEADER_BYTES>();
            let Ok(header) = Header::decode(&bytes) else { return self.link_down(id) };
            let mut body = choices.bytes(header.body as usize).to_vec();
            body.resize(header.body as usize, 0);
            (header, body)
        } else {
            self.nearly(id, choices)
        };
        if header.kind.is_local() || header.kind.is_rdma() {
            // The receiver keeps them from the core.
            return;
        }
        let outcome = self.call(|core, env| core.on_frame(id, &header, &body, env));
        self.handle_events();
        match outcome {
            Ok(Dest::None) => {}
            Ok(dest) => {
                assert!(header.kind.has_payload());
                let wait = choices.rarely(4);
                match self.links.iter_mut().find(|link| link.id == id) {
                    Some(link) => link.arriving = Some(dest),
                    None => self.call(|_, env| Core::drop_payload(dest, env)),
                }
                if !wait {
                    self.end_payload(id, choices.u8());
                }
            }
            Err(_) => self.link_down(id),
        }
    }

    /// The payload that is under way on a link arrives.
    pub(super) fn end_payload(&mut self, id: LinkId, filler: u8) {
        let Some(link) = self.links.iter_mut().find(|link| link.id == id) else { return };
        let Some(mut dest) = link.arriving.take() else { return };
        self.land(&mut dest, filler);
        let fault = (filler == 13).then_some(1);
        let outcome = self.call(|core, env| core.on_payload(id, dest, fault, env));
        self.handle_events();
        if outcome.is_err() {
            self.link_down(id);
        }
    }

    /// A frame that may well be right.
    pub(super) fn nearly(&mut self, id: LinkId, choices: &mut Choices<'_>) -> (Header, Vec<u8>) {
        use FrameKind::{Abandon, Ack, Data, Goodbye, Notify, Ping, Pong, Read, Status, Write};
        let kinds = [Read, Data, Write, Status, Notify, Ack, Ping, Pong, Goodbye, Abandon];
        let mut header = Header::new(kinds[usize::from(choices.u8()) % kinds.len()]);
        header.flags = choices.u8();
        header.id = u64::from(choices.u8());
        header.aux = u64::from(choices.u8());
        header.len = u64::from(choices.u16());
        let mut body = Vec::new();
        match header.kind {
            Read | Write => {
                let memory = &self.memory[usize::from(choices.u8()) % self.memory.len()];
                let descriptor = memory.region.descriptor.clone();
                let offset = u64::from(choices.u16());
                header.addr = descriptor.base.wrapping_add(offset).wrapping_sub(8);
                header.key = descriptor.key.0 ^ u128::from(choices.u8() & 1);
                header.len %= 2 * LEN as u64;
                let segments = usize::from(choices.u8()) % 8;
                if segments > 0 {
                    header.segments = segments.min(MAX_SEGMENTS) as u32;
                    header.keys = 1;
                    header.len = 0;
                    body.extend(header.key.to_le_bytes());
                    for _ in 0..segments {
                        let (at, len) = (u64::from(choices.u16()) % 5000, u32::from(choices.u8()));
                        body.extend((descriptor.base + at).to_le_bytes());
                        body.extend(len.to_le_bytes());
                        body.extend(u32::from(choices.u8() == 7).to_le_bytes());
                        header.len += u64::from(len);
                    }
                    header.len += u64::from(choices.u8() == 7);
                    assert_eq!(body.len(), KEY_BYTES + segments * SEGMENT_BYTES);
                    header.body = body.len() as u32;
                }
            }
            Data | Status => {
                let mine: Vec<usize> =
                    (0..self.asked.len()).filter(|at| self.asked[*at].0 == id).collect();
                let choice = usize::from(choices.u8());
                if choice < 240 && !mine.is_empty() {
                    let (_, asked) = self.asked.swap_remove(mine[choice % mine.len()]);
                    (header.id, header.len) = (asked.id, asked.len);
                } else if choice > 250 {
                    header.id = choices.u64();
                }
                header.status = u16::from(choices.u8() % 6);
                if header.kind == Status {
                    header.len = 0;
                }
            }
            Notify => {
                if header.aux < 200 {
                    header.aux = self.next_notification;
                    header.id = 0;
                    self.next_notification += 1;
                }
                header.addr = header.len + u64::from(choices.u8() & 0x80);
                header.key = u128::from(choices.u8() & 7) | u128::from(choices.u8() & 3) << 64;
                if choices.rarely(8) {
                    header.set_acknowledges(u64::from(choices.u8()));
                }
                if header.flags & 2 != 0 {
                    (header.len, header.addr) = (0, 0);
                }
            }
            _ => {}
        }
        (header, body)
    }

    /// The peer opens a link.
    pub(super) fn accept(&mut self, choices: &mut Choices<'_>) {
        let kind = if choices.u8() & 1 == 0 { LinkKind::Session } else { LinkKind::Bulk };
        self.attempt += u64::from(choices.u8() & 3);
        let session = match choices.u8() % 4 {
            0 => 0,
            1 => choices.u64(),
            _ => self.session,
        };
        let hello = Hello {
            min_version: 1,
            max_version: 1,
            kind,
            transports: 1,
            initiator: 2,
            target: 1,
            nonce: [0; 32],
            session,
            attempt: self.attempt,
            expects: u64::from(choices.u8() % 8),
            liveness_ms: choices.u32(),
            name: "b".into(),
        };
        let random = choices.u64();
        let answer = self.call(|core, env| match kind {
            LinkKind::Session => core.accept_session(&hello, 3000, random, env),
            LinkKind::Bulk => core.accept_bulk(&hello),
        });
        self.handle_events();
        let Ok(welcome) = answer else { return };
        if kind == LinkKind::Bulk {
            let id = self.add_link(kind);
            self.call(|core, env| core.bulk_up(id, false, env));
            return self.handle_events();
        }
        self.next_notification = welcome.expects;
        self.session = welcome.session;
        if choices.rarely(8) {
            self.call(Core::accept_failed);
        } else {
            let on_this_host = choices.rarely(4);
            let id = self.add_link(kind);
            let liveness = welcome.liveness_ms;
            self.call(|core, env| core.session_up(id, liveness, false, on_this_host, env));
        }
        self.handle_events();
    }

    /// An attempt of the core comes to something.
    pub(super) fn answer_attempt(&mut self, choices: &mut Choices<'_>) {
        let Some(kind) = self.wanted.pop() else { return };
        let refused = choices.u8();
        if refused.is_multiple_of(4) {
            return self.fail_attempt(kind, refused);
        }
        if kind == LinkKind::Bulk {
            let id = self.add_link(kind);
            self.call(|core, env| core.bulk_up(id, true, env));
            return self.handle_events();
        }
        let welcome = Welcome {
            resumed: choices.rarely(4),
            session: if choices.u8() & 1 == 0 { self.session } else { u64::from(choices.u8()) },
            expects: u64::from(choices.u8() % 8),
            liveness_ms: choices.u32(),
        };
        let on_this_host = choices.rarely(4);
        let id = self.add_link(kind);
        let up = self.call(|core, env| core.session_welcomed(id, &welcome, on_this_host, env));
        if up.is_err() {
            self.links.retain(|link| link.id != id);
            self.handle_events();
            return self.fail_attempt(kind, 0);
        }
        self.session = welcome.session.max(1);
        if !welcome.resumed {
            self.next_notification = 0;
        }
        self.handle_events();
    }

    pub(super) fn fail_attempt(&mut self, kind: LinkKind, how: u8) {
        let handshake = match how >> 2 & 7 {
            0 => Some(HandshakeError::Refused(Refusal::Incarnation)),
            1 => Some(HandshakeError::Refused(Refusal::NoSession)),
            2 => Some(HandshakeError::Proof),
            _ => None,
        };
        let failure = ConnectFailure { reason: "no".into(), handshake, refused: how >> 5 & 1 == 1 };
        self.call(|core, env| core.connect_failed(kind, &failure, env));
        self.handle_events();
    }

    pub(super) fn ring(&mut self, choices: &mut Choices<'_>) {
        let up = choices.u8() & 1 == 0;
        let state = RingState {
            has_room: choices.u8() & 3 != 0,
            is_empty: choices.u8() & 1 == 0,
            longest: MAX_RING_PAYLOAD,
        };
        self.core.set_ring(up.then_some(state));
        while up && self.call(Core::next_ring_message).is_some() {}
        // Only where there is a session has the driver a ring.
        let Some(session) = self.links.iter().find(|link| link.kind == LinkKind::Session) else {
            return;
        };
        let session = session.id;
        let seq = if choices.u8() < 200 { self.next_notification } else { u64::from(choices.u8()) };
        let message = if choices.rarely(4) {
            Message::Ack(u64::from(choices.u8() % 16))
        } else {
            self.next_notification += 1;
            let len = usize::from(choices.u16()) % (MAX_RING_PAYLOAD + 1);
            Message::Notify { seq, ack: u64::from(choices.u8() % 4), payload: vec![0; len] }
        };
        let outcome = self.call(|core, env| core.on_ring_message(message, env));
        self.handle_events();
        if outcome.is_err() {
            self.link_down(session);
        }
    }
}
