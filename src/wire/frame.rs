//! Frames of an authenticated link: a header of one cache line, a body, a payload.
//!
//! ```text
//!  0  type      u8        what the frame is
//!  1  flags     u8
//!  2  status    u16       of STATUS and GOODBYE
//!  4  body      u32       bytes between header and payload (a segment table)
//!  8  len       u64       bytes the operation is about; the payload of DATA, WRITE and NOTIFY
//! 16  id        u64       request number, chosen by the requester; offset of a NOTIFY fragment
//! 24  aux       u64       transfer number of a WRITE, sequence number of NOTIFY and ACK
//! 32  segments  u32       entries of the segment table; 0: the one segment is in the header
//! 36  keys      u32       region keys at the head of the body
//! 32  ack       u64       of a NOTIFY, in their place: as ACK; 0: nothing
//! 40  key       u128      region key of the one segment; or transfer and piece count of a NOTIFY
//! 56  addr      u64       address of the one segment; total length of a NOTIFY
//! ```
//!
//! Headers of 64 bytes let a receiver ask the kernel for exactly one header and then for exactly
//! the payload, straight into its region, and let the common request (one segment) be nothing but
//! a header.

use super::Reader;

/// Bytes of a header: one cache line.
pub(crate) const HEADER_BYTES: usize = 64;
/// Bytes of one entry of a segment table: address, length, index of the key.
pub(crate) const SEGMENT_BYTES: usize = 16;
/// Bytes of one region key.
pub(crate) const KEY_BYTES: usize = 16;
/// Segments in one frame: fewer than `IOV_MAX`, which leaves room for the header.
pub(crate) const MAX_SEGMENTS: usize = 1000;
/// The largest body that a receiver accepts: what `Header::decode` lets pass.
#[cfg(test)]
pub(crate) const MAX_BODY: usize = MAX_SEGMENTS * (SEGMENT_BYTES + KEY_BYTES);
/// The largest payload of one frame that a receiver accepts (`chunk_bytes` is at most this).
pub(crate) const MAX_PAYLOAD: u64 = 16 << 20;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FrameKind {
    /// Asks for the bytes of the segments. Answer: DATA or STATUS.
    Read = 1,
    /// The bytes that a READ asked for.
    Data = 2,
    /// Bytes for the segments. Answer: STATUS.
    Write = 3,
    /// How a WRITE ended, or why a READ has no DATA.
    Status = 4,
    /// A notification, or a fragment of one.
    Notify = 5,
    /// All notifications below `aux` have arrived.
    Ack = 6,
    /// Are you there? Answered by PONG with the same `id`.
    Ping = 7,
    /// I am. Without a PING before it, between engines of one host: wake up and look into the ring.
    Pong = 8,
    /// The session ends here; nothing follows.
    Goodbye = 9,
    /// The transfer `aux` has ended without its notification: forget its count.
    Abandon = 10,
    /// On a Unix socket: what the sender shares with the receiver, with two descriptors.
    Attach = 11,
    /// On a Unix socket: how ATTACH was taken.
    Attached = 12,
    /// On a Unix socket: memory of the engine, with its descriptor.
    Share = 13,
    /// On a Unix socket: it is shared no more.
    Unshare = 14,
    /// A queue pair for transport `rdma`: offered, or what came of the offer.
    QueuePair = 15,
    /// Where transport `rdma` stands at the sender.
    Rdma = 16,
}

impl FrameKind {
    fn from_u8(v: u8) -> Option<Self> {
        Some(match v {
            1 => Self::Read,
            2 => Self::Data,
            3 => Self::Write,
            4 => Self::Status,
            5 => Self::Notify,
            6 => Self::Ack,
            7 => Self::Ping,
            8 => Self::Pong,
            9 => Self::Goodbye,
            10 => Self::Abandon,
            11 => Self::Attach,
            12 => Self::Attached,
            13 => Self::Share,
            14 => Self::Unshare,
            15 => Self::QueuePair,
            16 => Self::Rdma,
            _ => return None,
        })
    }

    /// Whether the frame is about shared memory, and so between engines of one host only.
    pub(crate) fn is_local(self) -> bool {
        matches!(self, Self::Attach | Self::Attached | Self::Share | Self::Unshare)
    }

    /// Whether the frame is about queue pairs.
    pub(crate) fn is_rdma(self) -> bool {
        matches!(self, Self::QueuePair | Self::Rdma)
    }

    /// Whether `len` bytes of payload follow header and body.
    pub(crate) fn has_payload(self) -> bool {
        matches!(self, Self::Data | Self::Write | Self::Notify)
    }
}

/// `flags` of a WRITE: count its pieces, a notification waits for them. Of a NOTIFY: it is bound
/// to the transfer in `key`.
pub(crate) const FLAG_COUNTED: u8 = 1;
/// `flags` of a NOTIFY: its transfer has failed; only the number counts.
pub(crate) const FLAG_VOID: u8 = 2;

/// How the serving side ended a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum ServeStatus {
    Ok = 0,
    /// No region has this key (any more).
    UnknownKey = 1,
    /// The range leaves the region.
    OutOfBounds = 2,
    /// The region does not allow this to peers.
    Denied = 3,
    /// The serving process unmapped registered memory.
    Fault = 4,
}

impl ServeStatus {
    pub(crate) fn from_u16(v: u16) -> Option<Self> {
        Some(match v {
            0 => Self::Ok,
            1 => Self::UnknownKey,
            2 => Self::OutOfBounds,
            3 => Self::Denied,
            4 => Self::Fault,
            _ => return None,
        })
    }

    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::UnknownKey => "no region has this key (was it deregistered?)",
            Self::OutOfBounds => "the range leaves the region",
            Self::Denied => "the region was registered without this permission",
            Self::Fault => "the peer's registered memory could not be accessed (unmapped?)",
        }
    }
}

/// A decoded header. Unused fields are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: FrameKind,
    pub(crate) flags: u8,
    pub(crate) status: u16,
    pub(crate) body: u32,
    pub(crate) len: u64,
    pub(crate) id: u64,
    pub(crate) aux: u64,
    pub(crate) segments: u32,
    pub(crate) keys: u32,
    pub(crate) key: u128,
    pub(crate) addr: u64,
}

/// Why bytes are not a frame. The link cannot be used any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("unknown frame type {0}")]
    Kind(u8),
    #[error("frame body of {0} bytes")]
    Body(u32),
    #[error("frame payload of {0} bytes")]
    Payload(u64),
    #[error("inconsistent segment table")]
    Segments,
}

impl Header {
    pub(crate) fn new(kind: FrameKind) -> Self {
        Self {
            kind,
            flags: 0,
            status: 0,
            body: 0,
            len: 0,
            id: 0,
            aux: 0,
            segments: 0,
            keys: 0,
            key: 0,
            addr: 0,
        }
    }

    /// Lets a NOTIFY carry an acknowledgement: all notifications below `below` have arrived.
    pub(crate) fn set_acknowledges(&mut self, below: u64) {
        (self.segments, self.keys) = (below as u32, (below >> 32) as u32);
    }

    /// The acknowledgement that a NOTIFY carries.
    pub(crate) fn acknowledges(&self) -> Option<u64> {
        let below = u64::from(self.segments) | u64::from(self.keys) << 32;
        (below != 0).then_some(below)
    }

    #[inline]
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        b[0] = self.kind as u8;
        b[1] = self.flags;
        b[2..4].copy_from_slice(&self.status.to_le_bytes());
        b[4..8].copy_from_slice(&self.body.to_le_bytes());
        b[8..16].copy_from_slice(&self.len.to_le_bytes());
        b[16..24].copy_from_slice(&self.id.to_le_bytes());
        b[24..32].copy_from_slice(&self.aux.to_le_bytes());
        b[32..36].copy_from_slice(&self.segments.to_le_bytes());
        b[36..40].copy_from_slice(&self.keys.to_le_bytes());
        b[40..56].copy_from_slice(&self.key.to_le_bytes());
        b[56..64].copy_from_slice(&self.addr.to_le_bytes());
        b
    }

    /// Decodes and checks what can be checked without state: type, sizes, table shape.
    #[inline]
    pub(crate) fn decode(b: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let u32_at = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
        let header = Self {
            kind: FrameKind::from_u8(b[0]).ok_or(FrameError::Kind(b[0]))?,
            flags: b[1],
            status: u16::from_le_bytes([b[2], b[3]]),
            body: u32_at(4),
            len: u64_at(8),
            id: u64_at(16),
            aux: u64_at(24),
            segments: u32_at(32),
            keys: u32_at(36),
            key: u128::from(u64_at(40)) | u128::from(u64_at(48)) << 64,
            addr: u64_at(56),
        };
        header.check().map(|()| header)
    }

    fn check(&self) -> Result<(), FrameError> {
        if self.len > MAX_PAYLOAD {
            return Err(FrameError::Payload(self.len));
        }
        let (segments, keys) = (self.segments as usize, self.keys as usize);
        match self.kind {
            FrameKind::Read | FrameKind::Write => {
                if segments > MAX_SEGMENTS || keys > segments || (keys == 0) != (segments == 0) {
                    return Err(FrameError::Segments);
                }
                if self.body as usize != segments * SEGMENT_BYTES + keys * KEY_BYTES {
                    return Err(FrameError::Body(self.body));
                }
            }
            _ if self.body != 0 => return Err(FrameError::Body(self.body)),
            _ => {}
        }
        Ok(())
    }
}

/// One remote segment of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WireSegment {
    pub(crate) key: u128,
    pub(crate) addr: u64,
    pub(crate) len: u64,
}

/// The segments of a READ or WRITE: from the header, or from the table in its body.
///
/// Allocates nothing. `body` must have `header.body` bytes; a shorter one yields fewer segments.
pub(crate) fn segments<'a>(
    header: &Header,
    body: &'a [u8],
) -> impl Iterator<Item = Result<WireSegment, FrameError>> + use<'a> {
    let inline = (header.segments == 0).then_some(WireSegment {
        key: header.key,
        addr: header.addr,
        len: header.len,
    });
    let (keys, table) = body.split_at_checked(header.keys as usize * KEY_BYTES).unwrap_or_default();
    let listed = table.chunks_exact(SEGMENT_BYTES).map(move |entry| {
        let mut r = Reader::new(entry);
        let (Some(addr), Some(len), Some(index)) = (r.u64(), r.u32(), r.u32()) else {
            return Err(FrameError::Segments);
        };
        let key = keys.chunks_exact(KEY_BYTES).nth(index as usize).ok_or(FrameError::Segments)?;
        let key = Reader::new(key).u128().ok_or(FrameError::Segments)?;
        Ok(WireSegment { key, addr, len: u64::from(len) })
    });
    inline.map(Ok).into_iter().chain(listed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn header_survives_the_round_trip() {
        let header = Header {
            flags: FLAG_COUNTED,
            status: 4,
            body: 2 * 16 + 16,
            len: 1 << 20,
            id: 0x1122_3344_5566_7788,
            aux: 99,
            segments: 2,
            keys: 1,
            key: u128::MAX - 7,
            addr: u64::MAX,
            ..Header::new(FrameKind::Write)
        };
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn oversized_and_inconsistent_frames_are_refused() {
        let read = Header::new(FrameKind::Read);
        let cases = [
            Header { len: MAX_PAYLOAD + 1, ..read },
            Header { segments: 1001, keys: 1, body: 1001 * 16 + 16, ..read },
            Header { segments: 1, keys: 0, body: 16, ..read },
            Header { segments: 0, keys: 1, body: 16, ..read },
            Header { segments: 1, keys: 2, body: 48, ..read },
            Header { body: 1, ..read },
            Header { body: 16, ..Header::new(FrameKind::Data) },
        ];
        for case in cases {
            assert!(Header::decode(&case.encode()).is_err(), "{case:?}");
        }
        let mut unknown = read.encode();
        unknown[0] = 200;
        assert_eq!(Header::decode(&unknown), Err(FrameError::Kind(200)));
    }

    #[test]
    fn one_segment_travels_in_the_header() {
        let header = Header { len: 64, key: 5, addr: 1000, ..Header::new(FrameKind::Read) };
        let all: Vec<_> = segments(&header, &[]).collect();
        assert_eq!(all, [Ok(WireSegment { key: 5, addr: 1000, len: 64 })]);
    }

    proptest! {
        #[test]
        fn any_header_is_decoded_or_refused(bytes in any::<[u8; 32]>(), tail in any::<[u8; 32]>(), kind in 0u8..12) {
            let mut b = [0; HEADER_BYTES];
            b[..32].copy_from_slice(&bytes);
            b[32..].copy_from_slice(&tail);
            b[0] = kind;
            if let Ok(header) = Header::decode(&b) {
                prop_assert_eq!(header.encode(), b);
                prop_assert!(header.body as usize <= MAX_BODY);
            }
        }

        #[test]
        fn any_table_is_total(body in proptest::collection::vec(any::<u8>(), 0..200), keys in 0u32..4) {
            let header = Header { segments: 3, keys, ..Header::new(FrameKind::Read) };
            let count = segments(&header, &body).count();
            prop_assert!(count <= body.len() / SEGMENT_BYTES);
        }
    }
}
