//! The receiving half of a link.
//!
//! Calls per frame: one `recv` for the header and one `recvmsg` for the payload, straight into its
//! destination. One call for both would save 0.35 us, but would hand user memory to the kernel before
//! it is known what arrives: a refusal would land in it. No allocation in steady state.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::link::{Broken, Cursor, Flow, Scratch, TURN_BYTES, broken};
use crate::session::{Core, Dest, Env, LinkId};
use crate::sys::{self, IoSegment};
use crate::wire::frame::{FLAG_COUNTED, FrameKind, HEADER_BYTES, Header};

enum Rx {
    Header,
    Body(Header),
    Payload { dest: Dest, left: usize, cursor: Cursor, fault: Option<u64> },
}

/// The receiving half.
pub(crate) struct Receiver {
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
            let done = self.have == 0 && matches!(self.state, Rx::Header);
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
