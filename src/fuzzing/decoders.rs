//! The formats of `src/wire/`. What is accepted is what an encoder writes, byte for byte.

use crate::config::MAX_AGENT_NAME;
use crate::wire::frame::{
    FrameKind, HEADER_BYTES, Header, KEY_BYTES, MAX_PAYLOAD, MAX_SEGMENTS, SEGMENT_BYTES, segments,
};
use crate::wire::hello::{MAX_MESSAGE, Message};
use crate::wire::rdma::{MESSAGE_BYTES, QueuePairFrame, RdmaFrame, RdmaMessage};
use crate::wire::{MAX_RAILS, Metadata, RegionDescriptor, checksum};

/// The bytes behind their checksum, so that a mutation does not end there.
pub(super) fn sealed(bytes: &[u8]) -> Vec<u8> {
    [bytes, &checksum(bytes).to_le_bytes()].concat()
}

/// An engine's metadata, as it is and with the checksum that fits.
pub fn metadata(bytes: &[u8]) {
    for bytes in [bytes, &sealed(bytes)] {
        let Ok(value) = Metadata::decode(bytes) else { continue };
        assert_eq!(value.encode(), bytes);
        assert!((1..=MAX_AGENT_NAME).contains(&value.name.len()));
        assert!(value.addresses.len() <= 256);
    }
}

/// A region descriptor, as it is and with the checksum that fits.
pub fn descriptor(bytes: &[u8]) {
    for bytes in [bytes, &sealed(bytes)] {
        let Ok(value) = RegionDescriptor::from_bytes(bytes) else { continue };
        assert_eq!(value.to_bytes(), bytes);
        let (base, len) = (value.base(), value.len());
        assert!(base.checked_add(len).is_some());
        assert!(value.contains(base, len) && value.contains(base + len, 0));
        assert!(!value.contains(base, len.saturating_add(1)) || len == u64::MAX);
        assert!(!value.contains(base.wrapping_sub(1), 1));
        assert!(value.rail_keys.len() <= MAX_RAILS);
    }
}

/// A message of the handshake, without its length.
pub fn hello(bytes: &[u8]) {
    let Some(message) = Message::decode(bytes) else { return };
    assert_eq!(message.body(), bytes);
    let framed = message.encode();
    assert!(framed.len() <= MAX_MESSAGE, "longer than a receiver takes");
    assert_eq!(framed[2..], *bytes);
}

/// A frame's header and the segment table behind it.
pub fn frame(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = Header::decode(head) else { return };
    assert_eq!(header.encode(), *head);
    assert!(header.len <= MAX_PAYLOAD);
    let body = header.body as usize;
    assert!(body <= MAX_SEGMENTS * (SEGMENT_BYTES + KEY_BYTES));
    if !matches!(header.kind, FrameKind::Read | FrameKind::Write) {
        assert_eq!(body, 0);
        return;
    }
    // Whatever there is of a table; and as a receiver has it, all of it.
    let _ = segments(&header, rest).count();
    let mut whole = rest[..rest.len().min(body)].to_vec();
    whole.resize(body, 0);
    let expected = (header.segments as usize).max(1);
    assert_eq!(segments(&header, &whole).count(), expected);
}

/// What goes over the session about queue pairs, and a message on one.
pub fn rdma(bytes: &[u8]) {
    if let Some((head, _)) = bytes.split_first_chunk::<HEADER_BYTES>() {
        for kind in [FrameKind::QueuePair, FrameKind::Rdma] {
            let mut head = *head;
            head[0] = kind as u8;
            let Ok(header) = Header::decode(&head) else { continue };
            if let Some(frame) = QueuePairFrame::decode(&header) {
                assert_eq!(QueuePairFrame::decode(&frame.encode()), Some(frame));
                assert!(frame.index < frame.count && usize::from(frame.rail) < MAX_RAILS);
                assert!(frame.number < 1 << 24 && frame.psn < 1 << 24);
            }
            if let Some(frame) = RdmaFrame::decode(&header) {
                assert_eq!(RdmaFrame::decode(&frame.encode()), Some(frame));
            }
        }
    }
    // A receive buffer is no longer.
    let message = &bytes[..bytes.len().min(MESSAGE_BYTES)];
    if let Some((value, credits)) = RdmaMessage::decode(message) {
        let mut buffer = [0; MESSAGE_BYTES];
        let len = value.encode(credits, &mut buffer);
        // Fields and payload of a kind that has none of them are dropped.
        assert!(len <= message.len());
        assert_eq!(RdmaMessage::decode(&buffer[..len]), Some((value, credits)));
    }
}
