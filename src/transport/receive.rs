//! The receiving half of a link.
//!
//! Calls per frame: one `recv` for the header and one `recvmsg` for the payload, straight into its
//! destination; and a single one for both where the answer to our only READ is what will come next.
//! No allocation in steady state.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::link::{Broken, Cursor, Flow, Scratch, TURN_BYTES, broken};
use crate::session::{Core, Dest, Env, Expected, LinkId};
use crate::sys::{self, IoSegment};
use crate::wire::frame::{FLAG_COUNTED, FrameKind, HEADER_BYTES, Header};

enum Rx {
    Header,
    Body(Header),
    Payload { dest: Dest, left: usize, cursor: Cursor, fault: Option<u64> },
}

/// Where a link's bytes come from: the socket, after what was read from it too early.
#[derive(Default)]
struct Source {
    early: Vec<u8>,
    at: usize,
}

impl Source {
    fn is_empty(&self) -> bool {
        self.at == self.early.len()
    }

    fn recv(&mut self, fd: &OwnedFd, buf: &mut [u8]) -> io::Result<usize> {
        if self.is_empty() {
            return sys::recv(fd.as_fd(), buf);
        }
        let early = &self.early[self.at..];
        let n = early.len().min(buf.len());
        buf[..n].copy_from_slice(&early[..n]);
        self.took(n);
        Ok(n)
    }

    /// # Safety
    /// As for [`sys::recv_segments`].
    unsafe fn recv_segments(&mut self, fd: &OwnedFd, segments: &[IoSegment]) -> io::Result<usize> {
        if self.is_empty() {
            // SAFETY: the caller's promise.
            return unsafe { sys::recv_segments(fd.as_fd(), segments) };
        }
        // SAFETY: the caller's promise.
        let n = unsafe { sys::write_into(segments, &self.early[self.at..]) }?;
        self.took(n);
        Ok(n)
    }

    fn took(&mut self, n: usize) {
        self.at += n;
        if self.is_empty() {
            self.early.clear();
            self.at = 0;
        }
    }
}

/// The receiving half.
pub(crate) struct Receiver {
    source: Source,
    /// The kind and flags of the last frame.
    last: (FrameKind, u8),
    header: [u8; HEADER_BYTES],
    body: Vec<u8>,
    have: usize,
    state: Rx,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self {
            source: Source::default(),
            last: (FrameKind::Pong, 0),
            header: [0; HEADER_BYTES],
            body: Vec::new(),
            have: 0,
            state: Rx::Header,
        }
    }

    /// Receives frames until the socket is empty or this link's share of the turn is used up. The
    /// share of a session link is `one` frame: asking an empty socket once more would cost 0.3 us
    /// before the answer is sent. A WRITE with a bound notification is one with it.
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
                Rx::Header if one && self.have == 0 => {
                    self.expected_step(fd, id, core, env, scratch)
                }
                Rx::Header => self.header_step(fd, id, core, env),
                Rx::Body(header) => {
                    let header = *header;
                    self.body_step(fd, id, &header, core, env)
                }
                Rx::Payload { .. } => self.payload_step(fd, core, env, scratch),
            };
            match step {
                Ok(0) => return Err(self.end_of_stream().into()),
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
            let done = self.have == 0 && matches!(self.state, Rx::Header) && self.source.is_empty();
            if one && done && self.last != (FrameKind::Write, FLAG_COUNTED) {
                break;
            }
        }
        Ok(Flow::Progress)
    }

    fn end_of_stream(&self) -> &'static str {
        match &self.state {
            Rx::Payload { dest: Dest::Request(_), .. } => {
                "the peer closed the connection in the middle of data (was the memory that it was \
                 reading unmapped there?)"
            }
            _ => "the peer closed the connection",
        }
    }

    /// Receives the next header, and with it the payload of the DATA that is expected: one call
    /// instead of two. If something else came first, what went to the wrong place is fetched back.
    fn expected_step(
        &mut self,
        fd: &OwnedFd,
        id: LinkId,
        core: &mut Core,
        env: &mut Env<'_>,
        scratch: &mut Scratch,
    ) -> Result<usize, Step> {
        let possible = self.source.is_empty() && sys::can_read_back();
        let Some(Expected { request, segments, len }) = core.expected(id).filter(|_| possible)
        else {
            return self.header_step(fd, id, core, env);
        };
        scratch.segments.clear();
        scratch.segments.push(IoSegment::new(self.header.as_mut_ptr() as u64, HEADER_BYTES as u64));
        Cursor::default().rest(segments, &mut scratch.segments);
        env.counters.receive_calls.add(1);
        // SAFETY: the header is ours and not borrowed; for the rest as in `payload_step`: it is the
        // destination of a READ in flight, whose bytes are unspecified until it ends.
        let n = match unsafe { sys::recv_segments(fd.as_fd(), &scratch.segments) } {
            Ok(n) => n,
            // Not mapped: nothing was taken from the socket, and one by one it will show.
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                return self.header_step(fd, id, core, env);
            }
            Err(e) => return Err(e.into()),
        };
        if n < HEADER_BYTES {
            self.have = n;
            return Ok(n);
        }
        let early = n - HEADER_BYTES;
        let header = Header::decode(&self.header).map_err(|e| e.to_string())?;
        if (header.kind, header.id, header.len) != (FrameKind::Data, request, len) && early > 0 {
            env.counters.receives_fetched_back.add(1);
            self.source.early = sys::read_back(segments, early).map_err(|e| broken(&e))?;
            self.take_header(id, &header, core, env)?;
            return Ok(n);
        }
        self.take_header(id, &header, core, env)?;
        if let Rx::Payload { left, cursor, .. } = &mut self.state
            && early > 0
        {
            cursor.advance(core.destination(request).unwrap_or(&[]), early);
            *left -= early;
        }
        Ok(n)
    }

    fn header_step(
        &mut self,
        fd: &OwnedFd,
        id: LinkId,
        core: &mut Core,
        env: &mut Env<'_>,
    ) -> Result<usize, Step> {
        env.counters.receive_calls.add(1);
        let n = self.source.recv(fd, &mut self.header[self.have..])?;
        self.have += n;
        if self.have == HEADER_BYTES {
            self.have = 0;
            let header = Header::decode(&self.header).map_err(|e| e.to_string())?;
            self.take_header(id, &header, core, env)?;
        }
        Ok(n)
    }

    fn take_header(
        &mut self,
        id: LinkId,
        header: &Header,
        core: &mut Core,
        env: &mut Env<'_>,
    ) -> Result<(), Step> {
        self.last = (header.kind, header.flags);
        if header.body == 0 {
            return self.frame(id, header, core, env);
        }
        self.body.resize(header.body as usize, 0);
        self.state = Rx::Body(*header);
        Ok(())
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
        let n = self.source.recv(fd, &mut self.body[self.have..])?;
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
                let n = self.source.recv(fd, &mut payload[have..])?;
                *left -= n;
                return Ok(n);
            }
            Dest::Refused(_) | Dest::None => &[],
        };
        cursor.rest(segments, &mut scratch.segments);
        if scratch.segments.is_empty() {
            let len = scratch.discard.len().min(*left);
            let n = self.source.recv(fd, &mut scratch.discard[..len])?;
            *left -= n;
            return Ok(n);
        }
        // SAFETY: the segments are ranges of live registered regions that are counted as used by
        // this request (`LaneRegions`), so that deregistration waits for it; their owner allowed
        // writing. The kernel checks that they are mapped.
        match unsafe { self.source.recv_segments(fd, &scratch.segments) } {
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
