//! The sending half of a link: one `sendmsg` for as many frames as are ready.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::link::{Broken, Cursor, Flow, Scratch, TURN_BYTES, broken};
use crate::session::{Core, Env, LinkId, TxFrame, TxPayload};
use crate::sys::{self, IoSegment, MAX_IO_SEGMENTS};
use crate::wire::frame::HEADER_BYTES;

/// Frames gathered into one `sendmsg`.
const TX_FRAMES: usize = 32;
/// Bytes gathered into one `sendmsg`; a frame that starts below is taken whole.
const TX_BYTES: usize = 256 << 10;

/// The sending half.
pub(crate) struct Sender {
    frames: VecDeque<TxFrame>,
    /// Bytes of the first frame that are sent.
    sent: usize,
    /// One of several frames names memory that is not mapped: they go one by one until it shows
    /// which.
    alone: bool,
}

/// The three parts of a frame on the wire, as segments.
fn parts<'a>(frame: &'a TxFrame, own: &'a mut [IoSegment; 1]) -> (&'a [u8], &'a [IoSegment]) {
    let body = frame.body.as_ref().map_or(&[][..], |(plan, piece)| plan.body(*piece));
    let payload = match &frame.payload {
        TxPayload::None => &[][..],
        TxPayload::Plan(plan, piece) => plan.local(*piece),
        TxPayload::Served(segments) => segments,
        TxPayload::Bytes(bytes, range) => {
            own[0] = IoSegment::of(&bytes[range.clone()]);
            &own[..]
        }
    };
    (body, payload)
}

fn wire_len(frame: &TxFrame) -> usize {
    let mut own = [IoSegment::new(0, 0)];
    let (body, payload) = parts(frame, &mut own);
    HEADER_BYTES + body.len() + payload.iter().map(IoSegment::len).sum::<usize>()
}

impl Sender {
    pub(crate) fn new() -> Self {
        Self { frames: VecDeque::with_capacity(TX_FRAMES), sent: 0, alone: false }
    }

    /// Whether it has no frame, not even one that the socket did not take.
    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Whether a frame that is not the core's may be sent now: none is partly sent.
    pub(crate) fn is_between_frames(&self) -> bool {
        self.sent == 0
    }

    /// Takes frames from the core and sends them until there are none, the socket is full, or this
    /// link's share of the turn is used up: then the flag says that there is more.
    pub(crate) fn send(
        &mut self,
        fd: &OwnedFd,
        id: LinkId,
        core: &mut Core,
        env: &mut Env<'_>,
        scratch: &mut Scratch,
    ) -> Result<(Flow, bool), Broken> {
        let mut moved = 0;
        loop {
            self.fill(id, core, env);
            if self.frames.is_empty() {
                return Ok((if moved == 0 { Flow::Idle } else { Flow::Progress }, false));
            }
            if moved >= TURN_BYTES {
                return Ok((Flow::Progress, true));
            }
            self.gather(&mut scratch.segments);
            env.counters.send_calls.add(1);
            match sys::send_segments(fd.as_fd(), &scratch.segments) {
                Ok(n) => {
                    self.alone = false;
                    moved += n;
                    self.advance(n, core, env);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Ok((Flow::Blocked, false));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    return Ok((Flow::Progress, true));
                }
                Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                    if self.sent == 0 {
                        self.drop_faulty(core, env);
                        continue;
                    }
                    // The header that promises these bytes is on the wire: nothing but the end of
                    // the link tells the peer.
                    if let Some(front) = self.frames.front() {
                        core.blame_send_fault(&front.sent, env);
                    }
                    return Err("registered memory could not be read: was it unmapped before it \
                                was deregistered?"
                        .into());
                }
                Err(e) => return Err(broken(&e)),
            }
        }
    }

    fn fill(&mut self, id: LinkId, core: &mut Core, env: &mut Env<'_>) {
        let mut bytes: usize = 0;
        while self.frames.len() < TX_FRAMES && bytes < TX_BYTES {
            let Some(frame) = core.poll_transmit(id, !self.frames.is_empty(), env) else { return };
            bytes += match &frame.payload {
                TxPayload::None => HEADER_BYTES,
                _ => wire_len(&frame),
            };
            self.frames.push_back(frame);
        }
    }

    fn gather(&self, out: &mut Vec<IoSegment>) {
        out.clear();
        let mut skip = self.sent;
        for frame in &self.frames {
            let mut own = [IoSegment::new(0, 0)];
            let (body, payload) = parts(frame, &mut own);
            for bytes in [&frame.header[..], body] {
                if skip < bytes.len() && out.len() < MAX_IO_SEGMENTS {
                    out.push(IoSegment::of(&bytes[skip..]));
                }
                skip = skip.saturating_sub(bytes.len());
            }
            let mut cursor = Cursor::default();
            if skip > 0 {
                cursor.advance(payload, skip);
                skip = 0;
            }
            cursor.rest(payload, out);
            if self.alone || out.len() >= MAX_IO_SEGMENTS {
                return;
            }
        }
    }

    /// The kernel could not read what the frames name, and has taken nothing.
    fn drop_faulty(&mut self, core: &mut Core, env: &mut Env<'_>) {
        if !self.alone && self.frames.len() > 1 {
            self.alone = true;
            return;
        }
        self.alone = false;
        if let Some(frame) = self.frames.pop_front()
            && let Some(instead) = core.on_send_fault(frame, env)
        {
            self.frames.push_front(instead);
        }
    }

    fn advance(&mut self, mut n: usize, core: &mut Core, env: &mut Env<'_>) {
        while let Some(front) = self.frames.front() {
            let left = wire_len(front) - self.sent;
            if n < left {
                self.sent += n;
                return;
            }
            n -= left;
            self.sent = 0;
            if let Some(frame) = self.frames.pop_front() {
                if let TxPayload::Served(segments) = frame.payload {
                    env.regions.recycle(segments);
                }
                core.on_sent(frame.sent, env);
            }
        }
    }

    /// The link is gone: frames that were not sent never will be.
    pub(crate) fn abandon(&mut self, core: &mut Core, env: &mut Env<'_>) {
        for frame in self.frames.drain(..) {
            core.on_sent(frame.sent, env);
        }
        self.sent = 0;
    }
}
