//! Messages of the handshake. Each travels behind a 16-bit length of at most [`MAX_MESSAGE`].

use super::{Reader, Writer};
use crate::config::MAX_AGENT_NAME;

/// Largest handshake message in bytes.
pub(crate) const MAX_MESSAGE: usize = 2048;
/// Protocol versions this build speaks.
pub(crate) const VERSIONS: std::ops::RangeInclusive<u16> = 1..=1;

const MAGIC: u32 = u32::from_le_bytes(*b"CLNE");

/// What a link is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum LinkKind {
    /// The session: notifications, liveness, small transfers; both directions.
    Session = 1,
    /// Bulk transfers of the side that opened it.
    Bulk = 2,
}

/// First message, initiator to target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) min_version: u16,
    pub(crate) max_version: u16,
    pub(crate) kind: LinkKind,
    /// Transports the initiator offers.
    pub(crate) transports: u32,
    pub(crate) initiator: u128,
    /// The incarnation that the initiator wants to reach.
    pub(crate) target: u128,
    pub(crate) nonce: [u8; 32],
    /// The session that this link resumes or belongs to; 0: none.
    pub(crate) session: u64,
    /// Numbers the attempts of an initiator: one that was given up may arrive behind a later one.
    pub(crate) attempt: u64,
    /// Sequence number of the next notification that the initiator expects.
    pub(crate) expects: u64,
    /// Liveness timeout that the initiator proposes, in milliseconds.
    pub(crate) liveness_ms: u32,
    pub(crate) name: String,
}

/// Second message, target to initiator: proves that the target has its own secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Challenge {
    pub(crate) version: u16,
    pub(crate) transports: u32,
    pub(crate) target: u128,
    pub(crate) nonce: [u8; 32],
    pub(crate) proof: [u8; 32],
}

/// Third message, initiator to target: proves that the initiator holds the target's metadata, and
/// that it is the engine whose metadata the target may have loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Auth {
    pub(crate) proof: [u8; 32],
    pub(crate) own_proof: [u8; 32],
}

/// Fourth message, target to initiator: the link is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Welcome {
    /// The target still has the session that the initiator wants to resume.
    pub(crate) resumed: bool,
    /// The session of the link: the one that was asked for, or a new one. Its number is the
    /// target's choice, so that an initiator which never reads this message cannot take a later
    /// attempt for the resumption of a session that it knows nothing of.
    pub(crate) session: u64,
    /// Sequence number of the next notification that the target expects.
    pub(crate) expects: u64,
    /// The liveness timeout of the link: the smaller proposal.
    pub(crate) liveness_ms: u32,
}

/// Why a target refuses a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Refusal {
    Version = 1,
    Incarnation = 2,
    Transports = 3,
    Proof = 4,
    NameInUse = 5,
    Limit = 6,
    NoSession = 7,
    Simultaneous = 8,
    ShuttingDown = 9,
    NotAccepting = 10,
}

impl Refusal {
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Version => {
                "it speaks another protocol version; use the same corelane on both sides"
            }
            Self::Incarnation => {
                "another engine answers at this address: the peer has restarted; exchange metadata \
                 again"
            }
            Self::Transports => "no transport is allowed on both sides; compare `transports`",
            Self::Proof => "the secrets do not match: the metadata is old or forged",
            Self::NameInUse => {
                "the agent name is in use there by another engine; load this engine's new metadata \
                 there, or give it another name"
            }
            Self::Limit => "it has reached its limit of peers",
            Self::NoSession => "it does not know the session",
            Self::Simultaneous => "both sides connected at the same time",
            Self::ShuttingDown => "it is shutting down",
            Self::NotAccepting => "it accepts no new peers",
        }
    }

    fn from_u8(v: u8) -> Option<Self> {
        Some(match v {
            1 => Self::Version,
            2 => Self::Incarnation,
            3 => Self::Transports,
            4 => Self::Proof,
            5 => Self::NameInUse,
            6 => Self::Limit,
            7 => Self::NoSession,
            8 => Self::Simultaneous,
            9 => Self::ShuttingDown,
            10 => Self::NotAccepting,
            _ => return None,
        })
    }
}

/// A handshake message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    Hello(Hello),
    Challenge(Challenge),
    Auth(Auth),
    Welcome(Welcome),
    Refused(Refusal),
}

impl Message {
    /// The message behind its length, as it goes on the wire.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let body = self.body();
        let mut w = Writer::new();
        w.u16(body.len() as u16).raw(&body);
        w.finish()
    }

    /// The message without its length: what proofs are computed over.
    pub(crate) fn body(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(MAGIC);
        match self {
            Self::Hello(m) => {
                w.u8(1).u16(m.min_version).u16(m.max_version).u8(m.kind as u8).u32(m.transports);
                w.u128(m.initiator).u128(m.target).raw(&m.nonce).u64(m.session);
                w.u64(m.attempt).u64(m.expects);
                w.u32(m.liveness_ms).string(&m.name);
            }
            Self::Challenge(m) => {
                w.u8(2).u16(m.version).u32(m.transports).u128(m.target).raw(&m.nonce).raw(&m.proof);
            }
            Self::Auth(m) => {
                w.u8(3).raw(&m.proof).raw(&m.own_proof);
            }
            Self::Welcome(m) => {
                w.u8(4).u8(u8::from(m.resumed)).u64(m.session).u64(m.expects).u32(m.liveness_ms);
            }
            Self::Refused(refusal) => {
                w.u8(5).u8(*refusal as u8);
            }
        }
        w.finish()
    }

    /// Decodes a message without its length. `None`: these bytes are no such message.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        if r.u32()? != MAGIC {
            return None;
        }
        let message = match r.u8()? {
            1 => Self::Hello(Hello {
                min_version: r.u16()?,
                max_version: r.u16()?,
                kind: match r.u8()? {
                    1 => LinkKind::Session,
                    2 => LinkKind::Bulk,
                    _ => return None,
                },
                transports: r.u32()?,
                initiator: r.u128()?,
                target: r.u128()?,
                nonce: r.array()?,
                session: r.u64()?,
                attempt: r.u64()?,
                expects: r.u64()?,
                liveness_ms: r.u32()?,
                name: r.string(MAX_AGENT_NAME).filter(|name| !name.is_empty())?.to_owned(),
            }),
            2 => Self::Challenge(Challenge {
                version: r.u16()?,
                transports: r.u32()?,
                target: r.u128()?,
                nonce: r.array()?,
                proof: r.array()?,
            }),
            3 => Self::Auth(Auth { proof: r.array()?, own_proof: r.array()? }),
            4 => Self::Welcome(Welcome {
                resumed: match r.u8()? {
                    0 => false,
                    1 => true,
                    _ => return None,
                },
                session: r.u64()?,
                expects: r.u64()?,
                liveness_ms: r.u32()?,
            }),
            5 => Self::Refused(Refusal::from_u8(r.u8()?)?),
            _ => return None,
        };
        r.is_empty().then_some(message)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn hello() -> Hello {
        Hello {
            min_version: 1,
            max_version: 1,
            kind: LinkKind::Session,
            transports: 1,
            initiator: 11,
            target: 22,
            nonce: [3; 32],
            session: 44,
            attempt: 8,
            expects: 5,
            liveness_ms: 3000,
            name: "decode-1".into(),
        }
    }

    fn all() -> Vec<Message> {
        vec![
            Message::Hello(hello()),
            Message::Challenge(Challenge {
                version: 1,
                transports: 1,
                target: 22,
                nonce: [8; 32],
                proof: [9; 32],
            }),
            Message::Auth(Auth { proof: [1; 32], own_proof: [2; 32] }),
            Message::Welcome(Welcome { resumed: true, session: 6, expects: 77, liveness_ms: 50 }),
            Message::Refused(Refusal::NameInUse),
        ]
    }

    #[test]
    fn messages_survive_the_round_trip_and_refuse_truncation() {
        for message in all() {
            let body = message.body();
            assert!(body.len() <= MAX_MESSAGE);
            assert_eq!(Message::decode(&body), Some(message.clone()));
            for len in 0..body.len() {
                assert_eq!(Message::decode(&body[..len]), None, "{message:?} cut to {len}");
            }
            let mut longer = body.clone();
            longer.push(0);
            assert_eq!(Message::decode(&longer), None);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_message_or_none(kind in 0u8..8, tail in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = MAGIC.to_le_bytes().to_vec();
            bytes.push(kind);
            bytes.extend(tail);
            if let Some(message) = Message::decode(&bytes) {
                prop_assert_eq!(message.body(), bytes);
            }
        }
    }
}
