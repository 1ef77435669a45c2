//! One TCP stream: frames in, frames out.
//!
//! Calls per frame: one `recv` for the header and one `recvmsg` for the payload, straight into its
//! destination; one `sendmsg` for as many frames as are ready. No allocation in steady state.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::session::{Core, Dest, Env, LinkId, TxFrame, TxPayload};
use crate::sys::{self, IoSegment, MAX_IO_SEGMENTS};
use crate::wire::frame::{HEADER_BYTES, Header};

/// Frames gathered into one `sendmsg`.
const TX_FRAMES: usize = 32;
/// Bytes gathered into one `sendmsg`; a frame that starts below is taken whole.
const TX_BYTES: usize = 256 << 10;
/// Bytes moved in one direction per turn and link: about 100 us of copying.
const TURN_BYTES: usize = 512 << 10;
/// What is thrown away is read in pieces of this size.
const DISCARD_BYTES: usize = 64 << 10;

/// Buffers that all links of a lane share, because only one is at work at a time.
pub(crate) struct Scratch {
    segments: Vec<IoSegment>,
    discard: Box<[u8]>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self {
            segments: Vec::with_capacity(MAX_IO_SEGMENTS + 2),
            discard: vec![0; DISCARD_BYTES].into_boxed_slice(),
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
struct Cursor {
    index: usize,
    offset: usize,
}

impl Cursor {
    fn advance(&mut self, segments: &[IoSegment], mut bytes: usize) {
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
    fn rest(&self, segments: &[IoSegment], out: &mut Vec<IoSegment>) {
        let Some(rest) = segments.get(self.index..) else { return };
        let room = MAX_IO_SEGMENTS.saturating_sub(out.len());
        for (i, segment) in rest.iter().take(room).enumerate() {
            out.push(if i == 0 { segment.advanced(self.offset) } else { *segment });
        }
    }
}

enum Rx {
    Header,
    Body(Header),
    Payload { dest: Dest, left: usize, cursor: Cursor, fault: Option<u64> },
}

/// The receiving half.
pub(crate) struct Receiver {
    header: [u8; HEADER_BYTES],
    body: Vec<u8>,
    have: usize,
    state: Rx,
}

/// Why a link cannot go on.
pub(crate) type Broken = String;

fn broken(error: &io::Error) -> Broken {
    format!("the connection broke: {error}")
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self { header: [0; HEADER_BYTES], body: Vec::new(), have: 0, state: Rx::Header }
    }

    /// Receives frames until the socket is empty or this link's share of the turn is used up. The
    /// share of a session link is `one` frame: asking an empty socket once more would cost 0.3 us
    /// before the answer is sent.
    pub(crate) fn receive(
        &mut self,
        fd: &OwnedFd,
        id: LinkId,
        one: bool,
        core: &mut Core,
        env: &mut Env<'_>,
        scratch: &mut Scratch,
    ) -> Result<Flow, Broken> {
        let mut moved = 0;
        while moved < TURN_BYTES {
            let step = match &self.state {
                Rx::Header => self.header_step(fd, id, core, env),
                Rx::Body(header) => {
                    let header = *header;
                    self.body_step(fd, id, &header, core, env)
                }
                Rx::Payload { .. } => self.payload_step(fd, core, env, scratch),
            };
            match step {
                Ok(0) => return Err("the peer closed the connection".into()),
                Ok(n) => {
                    moved += n;
                    core.heard(env.now);
                }
                Err(Step::Broken(reason)) => return Err(reason),
                Err(Step::Empty) if moved == 0 => return Ok(Flow::Idle),
                Err(Step::Empty) => return Ok(Flow::Progress),
            }
            if let Rx::Payload { left: 0, .. } = self.state {
                self.end_payload(id, core, env)?;
            }
            if one && self.have == 0 && matches!(self.state, Rx::Header) {
                break;
            }
        }
        Ok(Flow::Progress)
    }

    fn header_step(
        &mut self,
        fd: &OwnedFd,
        id: LinkId,
        core: &mut Core,
        env: &mut Env<'_>,
    ) -> Result<usize, Step> {
        env.counters.receive_calls.add(1);
        let n = sys::recv(fd.as_fd(), &mut self.header[self.have..])?;
        self.have += n;
        if self.have == HEADER_BYTES {
            self.have = 0;
            let header = Header::decode(&self.header).map_err(|e| e.to_string())?;
            if header.body > 0 {
                self.body.resize(header.body as usize, 0);
                self.state = Rx::Body(header);
            } else {
                self.frame(id, &header, core, env)?;
            }
        }
        Ok(n)
    }

    fn body_step(
        &mut self,
        fd: &OwnedFd,
        id: LinkId,
        header: &Header,
        core: &mut Core,
        env: &mut Env<'_>,
    ) -> Result<usize, Step> {
        env.counters.receive_calls.add(1);
        let n = sys::recv(fd.as_fd(), &mut self.body[self.have..])?;
        self.have += n;
        if self.have == self.body.len() {
            self.have = 0;
            self.frame(id, header, core, env)?;
            self.body.clear();
        }
        Ok(n)
    }

    fn frame(
        &mut self,
        id: LinkId,
        header: &Header,
        core: &mut Core,
        env: &mut Env<'_>,
    ) -> Result<(), Step> {
        let dest = core.on_frame(id, header, &self.body, env).map_err(|e| e.to_string())?;
        self.state = Rx::Header;
        if header.kind.has_payload() {
            let left = header.len as usize;
            self.state = Rx::Payload { dest, left, cursor: Cursor::default(), fault: None };
        }
        Ok(())
    }

    fn payload_step(
        &mut self,
        fd: &OwnedFd,
        core: &mut Core,
        env: &mut Env<'_>,
        scratch: &mut Scratch,
    ) -> Result<usize, Step> {
        let Rx::Payload { dest, left, cursor, fault } = &mut self.state else { return Ok(1) };
        if *left == 0 {
            return Ok(1);
        }
        env.counters.receive_calls.add(1);
        scratch.segments.clear();
        let segments: &[IoSegment] = match dest {
            _ if fault.is_some() => &[],
            Dest::Request(id) => core.destination(*id).unwrap_or(&[]),
            Dest::Region { segments, .. } => segments,
            Dest::Notification { payload, .. } => {
                let have = payload.len() - *left;
                let n = sys::recv(fd.as_fd(), &mut payload[have..])?;
                *left -= n;
                return Ok(n);
            }
            Dest::Refused(_) | Dest::None => &[],
        };
        cursor.rest(segments, &mut scratch.segments);
        if scratch.segments.is_empty() {
            let len = scratch.discard.len().min(*left);
            let n = sys::recv(fd.as_fd(), &mut scratch.discard[..len])?;
            *left -= n;
            return Ok(n);
        }
        // SAFETY: the segments are ranges of live registered regions that are counted as used by
        // this request (`LaneRegions`), so that deregistration waits for it; their owner allowed
        // writing. The kernel checks that they are mapped.
        match unsafe { sys::recv_segments(fd.as_fd(), &scratch.segments) } {
            Ok(n) => {
                cursor.advance(segments, n);
                *left -= n;
                Ok(n)
            }
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                *fault = Some(scratch.segments[0].addr());
                Ok(1)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn end_payload(
        &mut self,
        id: LinkId,
        core: &mut Core,
        env: &mut Env<'_>,
    ) -> Result<(), Broken> {
        if let Rx::Payload { dest, fault, .. } = std::mem::replace(&mut self.state, Rx::Header) {
            core.on_payload(id, dest, fault, env).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// The link is gone: what was being received never will be.
    pub(crate) fn abandon(&mut self, env: &mut Env<'_>) {
        if let Rx::Payload { dest, .. } = std::mem::replace(&mut self.state, Rx::Header) {
            Core::drop_payload(dest, env);
        }
    }
}

/// Why a step moved nothing.
enum Step {
    Empty,
    Broken(Broken),
}

impl From<io::Error> for Step {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Self::Empty,
            _ => Self::Broken(broken(&error)),
        }
    }
}

impl From<String> for Step {
    fn from(reason: String) -> Self {
        Self::Broken(reason)
    }
}

/// The sending half.
pub(crate) struct Sender {
    frames: VecDeque<TxFrame>,
    /// Bytes of the first frame that are sent.
    sent: usize,
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
        Self { frames: VecDeque::with_capacity(TX_FRAMES), sent: 0 }
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
                    // The header that promises these bytes may be on the wire: nothing but the end
                    // of the link tells the peer.
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
            if out.len() >= MAX_IO_SEGMENTS {
                return;
            }
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
