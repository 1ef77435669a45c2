//! What goes over the session about transport `rdma`, and the messages on its queue pairs.
//!
//! Frames without payload, in the fields of the header:
//!
//! ```text
//! QUEUE_PAIR  status  1 offer, 2 answer, 3 refused
//!             aux     generation u32, index u8, how many are offered u8, rail of the sender u8, receives posted u8
//!             id      queue pair number u24, first packet number u24, MTU code u8, flags u8 (1: Ethernet)
//!             key     GID of the sender's port
//!             addr    LID u16, READs sent at a time u8, READs served at a time u8, longest message u32
//! RDMA        status  1 up, 2 down, 3 none
//!             aux     generation
//!             id      up: the queue pairs that work, a bit each; down: next notification expected
//! ```
//!
//! A message is a SEND of at most [`MESSAGE_BYTES`]:
//!
//! ```text
//!  0  kind     u8
//!  1  zero     u8
//!  2  len      u16   of the payload
//!  4  credits  u32   messages of the peer on this queue pair that were taken so far, modulo 2^32
//!  8  seq      u64   of NOTIFY
//! 16  ack      u64   of NOTIFY (0: nothing) and ACK
//! 24  payload
//! ```

use super::Reader;
use super::frame::{FrameKind, Header};

/// The largest message: one receive buffer.
pub(crate) const MESSAGE_BYTES: usize = 512;
pub(crate) const MESSAGE_HEADER: usize = 24;
/// The longest notification that goes over a queue pair.
pub(crate) const MAX_MESSAGE_PAYLOAD: usize = MESSAGE_BYTES - MESSAGE_HEADER;
/// Queue pairs of one connection at most.
pub(crate) const MAX_QUEUE_PAIRS: usize = 64;

/// What a `QUEUE_PAIR` frame says of its queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The sender wants to connect it.
    Offer,
    /// The sender has connected it to the one that was offered.
    Answer,
    /// The sender has none for the one that was offered.
    Refused,
}

/// One end of a queue pair, as its owner describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueuePairFrame {
    pub(crate) verdict: Verdict,
    pub(crate) generation: u32,
    pub(crate) index: u8,
    /// How many are offered together.
    pub(crate) count: u8,
    /// The number of the rail, as the sender counts: which key of a region is good there.
    pub(crate) rail: u8,
    /// Messages that the peer may send ahead.
    pub(crate) receives: u8,
    pub(crate) number: u32,
    pub(crate) psn: u32,
    pub(crate) mtu: u8,
    pub(crate) ethernet: bool,
    pub(crate) gid: [u8; 16],
    pub(crate) lid: u16,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) max_msg_sz: u32,
}

impl QueuePairFrame {
    pub(crate) fn encode(&self) -> Header {
        let mut header = Header::new(FrameKind::QueuePair);
        header.status = match self.verdict {
            Verdict::Offer => 1,
            Verdict::Answer => 2,
            Verdict::Refused => 3,
        };
        header.aux = u64::from(self.generation)
            | u64::from(self.index) << 32
            | u64::from(self.count) << 40
            | u64::from(self.rail) << 48
            | u64::from(self.receives) << 56;
        header.id = u64::from(self.number & 0xff_ffff)
            | u64::from(self.psn & 0xff_ffff) << 24
            | u64::from(self.mtu) << 48
            | u64::from(self.ethernet) << 56;
        header.key = u128::from_le_bytes(self.gid);
        header.addr = u64::from(self.lid)
            | u64::from(self.max_rd_atomic) << 16
            | u64::from(self.max_dest_rd_atomic) << 24
            | u64::from(self.max_msg_sz) << 32;
        header
    }

    /// What the header says; `None`: nothing that an engine says.
    pub(crate) fn decode(header: &Header) -> Option<Self> {
        let verdict = match header.status {
            1 => Verdict::Offer,
            2 => Verdict::Answer,
            3 => Verdict::Refused,
            _ => return None,
        };
        let byte = |word: u64, shift: u32| (word >> shift) as u8;
        let frame = Self {
            verdict,
            generation: header.aux as u32,
            index: byte(header.aux, 32),
            count: byte(header.aux, 40),
            rail: byte(header.aux, 48),
            receives: byte(header.aux, 56),
            number: header.id as u32 & 0xff_ffff,
            psn: (header.id >> 24) as u32 & 0xff_ffff,
            mtu: byte(header.id, 48),
            ethernet: byte(header.id, 56) & 1 != 0,
            gid: header.key.to_le_bytes(),
            lid: header.addr as u16,
            max_rd_atomic: byte(header.addr, 16),
            max_dest_rd_atomic: byte(header.addr, 24),
            max_msg_sz: (header.addr >> 32) as u32,
        };
        let plausible = frame.index < frame.count
            && usize::from(frame.count) <= MAX_QUEUE_PAIRS
            && usize::from(frame.rail) < super::MAX_RAILS
            && (1..=5).contains(&frame.mtu)
            && frame.receives > 0
            && frame.max_msg_sz >= 4096;
        plausible.then_some(frame)
    }
}

/// Where transport `rdma` stands at the sender of an RDMA frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RdmaFrame {
    /// These queue pairs of the generation work.
    Up { generation: u32, working: u64 },
    /// None of the generation is used any more; this side's are destroyed.
    Down { generation: u32, expects: u64 },
    /// There is no such way.
    None,
}

impl RdmaFrame {
    pub(crate) fn encode(self) -> Header {
        let header = Header::new(FrameKind::Rdma);
        match self {
            Self::Up { generation, working } => {
                Header { status: 1, aux: u64::from(generation), id: working, ..header }
            }
            Self::Down { generation, expects } => {
                Header { status: 2, aux: u64::from(generation), id: expects, ..header }
            }
            Self::None => Header { status: 3, ..header },
        }
    }

    pub(crate) fn decode(header: &Header) -> Option<Self> {
        let generation = header.aux as u32;
        Some(match header.status {
            1 => Self::Up { generation, working: header.id },
            2 => Self::Down { generation, expects: header.id },
            3 => Self::None,
            _ => return None,
        })
    }
}

/// A message on a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RdmaMessage<'a> {
    /// The first on each queue pair: when it has completed, the way there and back works.
    Hello,
    /// A whole free-standing notification, and perhaps an acknowledgement.
    Notify { seq: u64, ack: u64, payload: &'a [u8] },
    /// All notifications below have arrived.
    Ack(u64),
    /// A notification bound to the WRITEs before it on this queue pair.
    Bound { payload: &'a [u8] },
    /// Nothing but the credits.
    Credits,
    /// Acknowledge now.
    AckRequest,
}

impl<'a> RdmaMessage<'a> {
    fn kind(&self) -> u8 {
        match self {
            Self::Hello => 1,
            Self::Notify { .. } => 2,
            Self::Ack(_) => 3,
            Self::Bound { .. } => 4,
            Self::Credits => 5,
            Self::AckRequest => 6,
        }
    }

    /// Whether the sender needs a credit for it. There are receives to spare for those that need none.
    pub(crate) fn takes_credit(&self) -> bool {
        !matches!(self, Self::Hello | Self::Credits)
    }

    /// Writes the message into a buffer of [`MESSAGE_BYTES`]; the answer is its length. A longer payload is cut off, which
    /// whoever made the message has prevented.
    pub(crate) fn encode(&self, credits: u32, buffer: &mut [u8; MESSAGE_BYTES]) -> usize {
        let (seq, ack, payload): (u64, u64, &[u8]) = match *self {
            Self::Notify { seq, ack, payload } => (seq, ack, payload),
            Self::Ack(below) => (0, below, &[]),
            Self::Bound { payload } => (0, 0, payload),
            Self::Hello | Self::Credits | Self::AckRequest => (0, 0, &[]),
        };
        let len = payload.len().min(MAX_MESSAGE_PAYLOAD);
        buffer[0] = self.kind();
        buffer[1] = 0;
        buffer[2..4].copy_from_slice(&(len as u16).to_le_bytes());
        buffer[4..8].copy_from_slice(&credits.to_le_bytes());
        buffer[8..16].copy_from_slice(&seq.to_le_bytes());
        buffer[16..24].copy_from_slice(&ack.to_le_bytes());
        buffer[MESSAGE_HEADER..MESSAGE_HEADER + len].copy_from_slice(&payload[..len]);
        MESSAGE_HEADER + len
    }

    /// Reads a message and the credits that it brings; `None`: nothing that an engine sends.
    pub(crate) fn decode(bytes: &'a [u8]) -> Option<(Self, u32)> {
        let mut r = Reader::new(bytes);
        let kind = r.u8()?;
        r.u8().filter(|zero| *zero == 0)?;
        let (len, credits, seq, ack) = (r.u16()?, r.u32()?, r.u64()?, r.u64()?);
        let payload = r.bytes(usize::from(len))?;
        let message = match kind {
            1 => Self::Hello,
            2 => Self::Notify { seq, ack, payload },
            3 => Self::Ack(ack),
            4 => Self::Bound { payload },
            5 => Self::Credits,
            6 => Self::AckRequest,
            _ => return None,
        };
        r.is_empty().then_some((message, credits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame() -> QueuePairFrame {
        QueuePairFrame {
            verdict: Verdict::Answer,
            generation: 0xdead_beef,
            index: 2,
            count: 3,
            rail: 1,
            receives: 32,
            number: 0x00ab_cdef,
            psn: 0x0012_3456,
            mtu: 5,
            ethernet: true,
            gid: [9; 16],
            lid: 77,
            max_rd_atomic: 16,
            max_dest_rd_atomic: 128,
            max_msg_sz: 1 << 30,
        }
    }

    #[test]
    fn frames_survive_the_round_trip() {
        for verdict in [Verdict::Offer, Verdict::Answer, Verdict::Refused] {
            let frame = QueuePairFrame { verdict, ..frame() };
            let header = Header::decode(&frame.encode().encode()).unwrap();
            assert_eq!(QueuePairFrame::decode(&header), Some(frame));
        }
        for frame in [
            RdmaFrame::Up { generation: 7, working: 5 },
            RdmaFrame::Down { generation: u32::MAX, expects: u64::MAX },
            RdmaFrame::None,
        ] {
            let header = Header::decode(&frame.encode().encode()).unwrap();
            assert_eq!(RdmaFrame::decode(&header), Some(frame));
        }
    }

    #[test]
    fn frames_that_no_engine_sends_are_refused() {
        let bad = [
            QueuePairFrame { index: 3, ..frame() },
            QueuePairFrame { count: 65, ..frame() },
            QueuePairFrame { rail: 16, ..frame() },
            QueuePairFrame { mtu: 6, ..frame() },
            QueuePairFrame { receives: 0, ..frame() },
            QueuePairFrame { max_msg_sz: 1, ..frame() },
        ];
        for frame in bad {
            assert_eq!(QueuePairFrame::decode(&frame.encode()), None, "{frame:?}");
        }
        let odd = Header { status: 9, ..frame().encode() };
        assert_eq!(QueuePairFrame::decode(&odd), None);
        assert_eq!(RdmaFrame::decode(&Header { status: 0, ..RdmaFrame::None.encode() }), None);
    }

    #[test]
    fn messages_survive_the_round_trip() {
        let payload = [3; MAX_MESSAGE_PAYLOAD];
        for message in [
            RdmaMessage::Hello,
            RdmaMessage::Notify { seq: 5, ack: 6, payload: &payload },
            RdmaMessage::Ack(9),
            RdmaMessage::Bound { payload: b"x" },
            RdmaMessage::Credits,
            RdmaMessage::AckRequest,
        ] {
            let mut buffer = [0xee; MESSAGE_BYTES];
            let len = message.encode(0x1234_5678, &mut buffer);
            assert_eq!(RdmaMessage::decode(&buffer[..len]), Some((message, 0x1234_5678)));
            assert_eq!(RdmaMessage::decode(&buffer[..len - 1]), None);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_message_or_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..MESSAGE_BYTES), kind in 0u8..8) {
            let mut bytes = bytes;
            let _ = RdmaMessage::decode(&bytes);
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            let _ = RdmaMessage::decode(&bytes);
        }
    }
}
