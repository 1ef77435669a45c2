//! One TCP stream: frames in ([`receive`](super::receive)), frames out ([`send`](super::send)).
//! What both halves share.

use std::io;

use super::ahead::Ahead;
use crate::gpu::{Block, Bounce, GpuError};
use crate::session::{Landing, LinkId};
use crate::sys::{IoSegment, MAX_IO_SEGMENTS};

/// Bytes moved in one direction per turn and link: about 100 us of copying.
pub(super) const TURN_BYTES: usize = 512 << 10;
/// What is thrown away is read in pieces of this size.
const DISCARD_BYTES: usize = 64 << 10;

/// Buffers that all links of a lane share, because only one is at work at a time.
pub(crate) struct Scratch {
    pub(super) segments: Vec<IoSegment>,
    pub(super) discard: Box<[u8]>,
    pub(super) ahead: Ahead,
    pub(crate) arrivals: Arrivals,
}

/// Payloads for memory of GPUs, on their way through blocks.
pub(crate) struct Arrivals {
    pub(crate) bounce: Bounce,
    /// Whole ones, for the driver to take.
    pub(crate) landed: Vec<Arrived>,
    /// Links that wait for a block, for the driver to call again.
    pub(crate) starved: Vec<LinkId>,
}

impl Arrivals {
    /// Whether the driver has something to take.
    #[inline]
    pub(crate) fn has_news(&self) -> bool {
        !self.landed.is_empty() || !self.starved.is_empty()
    }
}

/// A payload that is off the wire.
pub(crate) struct Arrived {
    pub(crate) link: LinkId,
    pub(crate) landing: Landing,
    /// Without pinned memory it was thrown away.
    pub(crate) block: Result<Block, GpuError>,
    pub(crate) len: usize,
}

impl Scratch {
    /// `bounce_bytes`: of pinned memory for GPUs, once there are some.
    pub(crate) fn new(bounce_bytes: usize) -> Self {
        let bounce = Bounce::new(bounce_bytes);
        Self {
            arrivals: Arrivals { bounce, landed: Vec::new(), starved: Vec::new() },
            segments: Vec::with_capacity(MAX_IO_SEGMENTS + 2),
            discard: vec![0; DISCARD_BYTES].into_boxed_slice(),
            ahead: Ahead::new(),
        }
    }
}

/// What a call to receive or send came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Nothing more to do now.
    Idle,
    /// Something moved, and more may.
    Progress,
    /// The socket is full.
    Blocked,
}

/// A position in a list of segments.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Cursor {
    index: usize,
    offset: usize,
}

impl Cursor {
    pub(super) fn advance(&mut self, segments: &[IoSegment], mut bytes: usize) {
        while bytes > 0
            && let Some(segment) = segments.get(self.index)
        {
            let left = segment.len() - self.offset;
            if bytes < left {
                self.offset += bytes;
                return;
            }
            bytes -= left;
            (self.index, self.offset) = (self.index + 1, 0);
        }
    }

    /// Appends what is left of `segments`, as far as one call takes it.
    pub(super) fn rest(&self, segments: &[IoSegment], out: &mut Vec<IoSegment>) {
        let Some(rest) = segments.get(self.index..) else { return };
        let room = MAX_IO_SEGMENTS.saturating_sub(out.len());
        for (i, segment) in rest.iter().take(room).enumerate() {
            out.push(if i == 0 { segment.advanced(self.offset) } else { *segment });
        }
    }
}

/// Why a link cannot go on.
pub(crate) type Broken = String;

pub(super) fn broken(error: &io::Error) -> Broken {
    format!("the connection broke: {error}")
}
