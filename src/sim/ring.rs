//! The ring of notifications between engines of one host, as the core sees it. Where transfers are not copied ([`super::copies`]),
//! the peer's memory cannot be reached, and they go as frames.

use super::coverage::Event as Input;
use super::links::Phase;
use super::node::{Node, Outside, Way};
use crate::session::RingState;
use crate::transport::local::{MAX_RING_PAYLOAD, Message};
use crate::wire::Reader;
use crate::wire::frame::{FrameKind, Header};
use crate::wire::hello::LinkKind;

pub(super) fn encode(message: &Message<std::sync::Arc<[u8]>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    match message {
        Message::Ack(below) => {
            bytes.push(2);
            bytes.extend(below.to_le_bytes());
        }
        Message::Notify { seq, ack, payload } => {
            bytes.push(1);
            bytes.extend(seq.to_le_bytes());
            bytes.extend(ack.to_le_bytes());
            bytes.extend_from_slice(payload);
        }
    }
    bytes
}

pub(super) fn decode(bytes: &[u8]) -> Option<Message<Vec<u8>>> {
    let mut reader = Reader::new(bytes);
    match reader.u8()? {
        1 => Some(Message::Notify {
            seq: reader.u64()?,
            ack: reader.u64()?,
            payload: bytes.get(17..)?.to_vec(),
        }),
        2 => Some(Message::Ack(reader.u64()?)),
        _ => None,
    }
}

impl Node {
    /// A session is up on this host: our side of the exchange.
    pub(super) fn attach(&mut self, slot: usize, link: u64, out: &mut dyn Outside) {
        if self.config.way == Way::Copies {
            self.share(slot, link, out);
        }
        self.peers[slot].core.tell(Header::new(FrameKind::Attach));
    }

    pub(super) fn on_local_frame(
        &mut self,
        link: u64,
        slot: usize,
        kind: LinkKind,
        header: &Header,
        out: &mut dyn Outside,
    ) -> Result<(), String> {
        if kind != LinkKind::Session || !self.has_ring() {
            return Err("shared memory where there can be none".into());
        }
        match header.kind {
            FrameKind::Attach => {
                if self.config.way == Way::Copies {
                    self.take_shared(slot, link, out)?;
                }
                self.peers[slot].core.tell(Header::new(FrameKind::Attached));
            }
            FrameKind::Attached => {
                // The ring that the peer has mapped.
                self.peers[slot].ring = Some(link);
                let path = self.local_path(slot).ok_or_else(|| "not in this world".into());
                self.with_core(slot, Input::LocalResolved, |core, env| {
                    core.local_resolved(path, env);
                });
            }
            _ => return Err("no frame about shared memory".into()),
        }
        self.mark(slot);
        Ok(())
    }

    /// Puts what a core has into its ring.
    pub(super) fn flush_ring(&mut self, slot: usize, out: &mut dyn Outside) {
        let Some(link) = self.peers.get(slot).and_then(|peer| peer.ring) else { return };
        loop {
            let seen = out.ring(link);
            let state = RingState {
                has_room: seen.has_room,
                is_empty: seen.is_empty,
                longest: MAX_RING_PAYLOAD,
            };
            let message = self.quiet_core(slot, |core, env| {
                core.set_ring(Some(state));
                if state.has_room { core.next_ring_message(env) } else { None }
            });
            let Some(message) = message else { return };
            out.note(&|| format!("ring of link {link} gets {}", describe(&message)));
            out.ring_push(link, encode(&message));
        }
    }

    /// Something is in the peer's ring, or it has taken something out of ours.
    pub fn look_at_ring(&mut self, link: u64, most: usize, out: &mut dyn Outside) {
        let Some(Phase::Open { peer, kind: LinkKind::Session, .. }) =
            self.links.get(&link).map(|link| &link.phase)
        else {
            return;
        };
        let slot = *peer;
        self.mark(slot);
        for _ in 0..most {
            if !matches!(self.links.get(&link).map(|l| &l.phase), Some(Phase::Open { .. })) {
                return;
            }
            let Some(bytes) = out.ring_pop(link) else { return };
            let Some(message) = decode(&bytes) else { return };
            let handled = self.with_core(slot, Input::RingMessage, |core, env| {
                core.on_ring_message(message, env)
            });
            if let Err(error) = handled {
                let peer = self.peers[slot].core.peer.incarnation;
                out.broken(peer, &error.to_string());
                return self.close_broken(link, &error.to_string(), out);
            }
        }
    }

    fn close_broken(&mut self, link: u64, reason: &str, out: &mut dyn Outside) {
        while out.ring_pop(link).is_some() {}
        self.close_link(link, reason, out);
    }

    /// The session's link is going: what the peer has put into its ring is taken first.
    pub(super) fn take_rest_of_ring(&mut self, link: u64, out: &mut dyn Outside) {
        if !self.has_ring() {
            return;
        }
        let Some(Phase::Open { peer, kind: LinkKind::Session, .. }) =
            self.links.get(&link).map(|link| &link.phase)
        else {
            return;
        };
        let slot = *peer;
        while let Some(bytes) = out.ring_pop(link) {
            let Some(message) = decode(&bytes) else { return };
            let handled = self.with_core(slot, Input::RingMessage, |core, env| {
                core.on_ring_message(message, env)
            });
            if let Err(error) = handled {
                let peer = self.peers[slot].core.peer.incarnation;
                out.broken(peer, &error.to_string());
                while out.ring_pop(link).is_some() {}
            }
        }
    }
}

fn describe(message: &Message<std::sync::Arc<[u8]>>) -> String {
    match message {
        Message::Ack(below) => format!("ACK {below}"),
        Message::Notify { seq, ack, payload } => {
            format!("NOTIFY {seq} of {} bytes, ack {ack}", payload.len())
        }
    }
}
