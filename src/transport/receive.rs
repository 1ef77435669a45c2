//! The receiving half of a link.
//!
//! Calls per frame: one `recv` for the header and one `recvmsg` for the payload, straight into its
//! destination. One call for both would save 0.35 us, but would hand user memory to the kernel before
//! it is known what arrives: a refusal would land in it. Behind a notification one call takes all
//! that is there ([`ahead`](super::ahead)). No allocation in steady state.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::ahead::Ahead;
use super::link::{Arrived, Broken, Cursor, Flow, Scratch, TURN_BYTES, broken};
use crate::gpu::{Block, GpuError};
use crate::session::{Core, Dest, Env, Landing, LinkId};
use crate::sys::{self, Fds, IoSegment};
use crate::wire::frame::{FLAG_COUNTED, FrameKind, HEADER_BYTES, Header};

const MISPLACED: &str = "protocol error: shared memory where there can be none";
/// Descriptors that one frame carries at most. A peer may send some with every byte of a header.
const MAX_FDS: usize = 2;

enum Rx {
    Header,
    Body(Header),
    Payload {
        dest: Dest,
        left: usize,
        cursor: Cursor,
        fault: Option<u64>,
    },
    /// For memory of a GPU: it goes into a block first.
    Landing {
        landing: Landing,
        block: Hold,
        have: usize,
        len: usize,
    },
}

/// Where the payload goes that is to land.
enum Hold {
    /// None is free, or none was asked for yet.
    Nothing,
    Block(Block),
    /// There is no pinned memory: it is thrown away.
    Refused(GpuError),
}

/// The receiving half.
pub(crate) struct Receiver {
    /// The kind and flags of the last frame.
    last: (FrameKind, u8),
    header: [u8; HEADER_BYTES],
    body: Vec<u8>,
    have: usize,
    state: Rx,
    /// What was ahead when it had to wait for a block.
    aside: Vec<u8>,
    /// On a Unix socket: descriptors that came with the header, and frames about shared memory, which
    /// are not the core's.
    unix: Option<Box<UnixSide>>,
    /// Frames about queue pairs, which are not the core's either.
    rdma: Vec<Header>,
}

#[derive(Default)]
struct UnixSide {
    fds: Fds,
    frames: Vec<LocalFrame>,
}

/// A frame about shared memory.
pub(crate) struct LocalFrame {
    pub(crate) header: Header,
    pub(crate) fds: Fds,
}

impl Receiver {
    pub(crate) fn new(unix: bool) -> Self {
        Self {
            unix: unix.then(Box::default),
            rdma: Vec::new(),
            last: (FrameKind::Pong, 0),
            header: [0; HEADER_BYTES],
            body: Vec::new(),
            aside: Vec::new(),
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
        scratch.ahead.clear();
        if !self.aside.is_empty() {
            scratch.ahead.put_back(&mut self.aside);
        }
        // What is ahead is used up in this turn: nothing would call for it later.
        while moved < TURN_BYTES || !scratch.ahead.is_empty() {
            let step = match &self.state {
                Rx::Header => self.header_step(fd, id, core, env, &mut scratch.ahead),
                Rx::Body(header) => {
                    let header = *header;
                    self.body_step(fd, id, &header, core, env, &mut scratch.ahead)
                }
                Rx::Payload { .. } => self.payload_step(fd, core, env, scratch),
                Rx::Landing { .. } => self.landing_step(fd, id, env, scratch),
            };
            match step {
                Ok(0) => return Err(self.end_of_stream().into()),
                Ok(n) => {
                    moved += n;
                    core.heard(env.now);
                }
                Err(Step::Broken(reason)) => return Err(reason),
                Err(Step::Starved) => {
                    self.aside = scratch.ahead.set_aside();
                    if !scratch.arrivals.starved.contains(&id) {
                        scratch.arrivals.starved.push(id);
                    }
                    return Ok(if moved == 0 { Flow::Idle } else { Flow::Progress });
                }
                Err(Step::Empty) if moved == 0 => return Ok(Flow::Idle),
                Err(Step::Empty) => return Ok(Flow::Progress),
            }
            if let Rx::Payload { left: 0, .. } = self.state {
                self.end_payload(id, core, env)?;
            }
            let done = self.have == 0 && matches!(self.state, Rx::Header);
            if one
                && done
                && scratch.ahead.is_empty()
                && self.last != (FrameKind::Write, FLAG_COUNTED)
            {
                break;
            }
        }
        Ok(Flow::Progress)
    }

    /// The frames about shared memory that have arrived; to be taken after each call of `receive`.
    pub(crate) fn take_local(&mut self) -> Vec<LocalFrame> {
        self.unix.as_mut().map(|unix| std::mem::take(&mut unix.frames)).unwrap_or_default()
    }

    /// The frames about queue pairs that have arrived; to be taken after each call of `receive`.
    pub(crate) fn take_rdma(&mut self) -> Vec<Header> {
        std::mem::take(&mut self.rdma)
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
        ahead: &mut Ahead,
    ) -> Result<usize, Step> {
        if self.last.0 == FrameKind::Notify && ahead.is_empty() && self.unix.is_none() {
            env.counters.receive_calls.add(1);
            if ahead.fill(fd)? == 0 {
                return Ok(0);
            }
        }
        let into = &mut self.header[self.have..];
        let n = match &mut self.unix {
            None => receive(fd, ahead, into, env)?,
            Some(unix) => {
                env.counters.receive_calls.add(1);
                let n = sys::recv_with_fds(fd.as_fd(), into, &mut unix.fds)?;
                if unix.fds.len() > MAX_FDS {
                    return Err("protocol error: too many descriptors with a frame"
                        .to_owned()
                        .into());
                }
                n
            }
        };
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
        if header.kind.is_local() {
            let unix = self.unix.as_mut().ok_or_else(|| MISPLACED.to_owned())?;
            let fds = std::mem::take(&mut unix.fds);
            unix.frames.push(LocalFrame { header: *header, fds });
            return Ok(());
        }
        if self.unix.as_ref().is_some_and(|unix| !unix.fds.is_empty()) {
            return Err(MISPLACED.to_owned().into());
        }
        if header.kind.is_rdma() {
            self.rdma.push(*header);
            return Ok(());
        }
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
        ahead: &mut Ahead,
    ) -> Result<usize, Step> {
        let n = receive(fd, ahead, &mut self.body[self.have..], env)?;
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
            self.state = match dest {
                Dest::Landing(landing) => {
                    Rx::Landing { landing, block: Hold::Nothing, have: 0, len: left }
                }
                dest => Rx::Payload { dest, left, cursor: Cursor::default(), fault: None },
            };
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
        scratch.segments.clear();
        let segments: &[IoSegment] = match dest {
            _ if fault.is_some() => &[],
            Dest::Request(id) => core.destination(*id).unwrap_or(&[]),
            Dest::Region { segments, .. } => segments,
            Dest::Notification { payload, .. } => {
                let have = payload.len() - *left;
                let n = receive(fd, &mut scratch.ahead, &mut payload[have..], env)?;
                *left -= n;
                return Ok(n);
            }
            Dest::Refused(_) | Dest::Landing(_) | Dest::None => &[],
        };
        cursor.rest(segments, &mut scratch.segments);
        if scratch.segments.is_empty() {
            let len = scratch.discard.len().min(*left);
            let n = match scratch.ahead.skip(len) {
                0 => receive(fd, &mut scratch.ahead, &mut scratch.discard[..len], env)?,
                skipped => skipped,
            };
            *left -= n;
            return Ok(n);
        }
        // SAFETY: the segments are ranges of live registered regions that are counted as used by
        // this request (`LaneRegions`), so that deregistration waits for it; their owner allowed
        // writing. The kernel checks that they are mapped.
        let received = unsafe {
            if scratch.ahead.is_empty() {
                env.counters.receive_calls.add(1);
                sys::recv_segments(fd.as_fd(), &scratch.segments)
            } else {
                scratch.ahead.copy_out(&scratch.segments, *left)
            }
        };
        match received {
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

    /// Receives what belongs into memory of a GPU.
    fn landing_step(
        &mut self,
        fd: &OwnedFd,
        id: LinkId,
        env: &mut Env<'_>,
        scratch: &mut Scratch,
    ) -> Result<usize, Step> {
        let Scratch { ahead, arrivals, discard, .. } = scratch;
        let Self { state, body, .. } = self;
        let Rx::Landing { block, have, len, .. } = state else { return Ok(1) };
        if let Hold::Nothing = block {
            *block = match arrivals.bounce.take(*len) {
                Ok(None) => return Err(Step::Starved),
                Ok(Some(mut block)) => {
                    block.bytes()[..body.len()].copy_from_slice(body);
                    body.clear();
                    Hold::Block(block)
                }
                Err(error) => {
                    body.clear();
                    Hold::Refused(error)
                }
            };
        }
        let left = *len - *have;
        let n = match block {
            Hold::Block(block) => receive(fd, ahead, &mut block.bytes()[*have..*len], env)?,
            Hold::Nothing | Hold::Refused(_) => {
                let most = discard.len().min(left);
                receive(fd, ahead, &mut discard[..most], env)?
            }
        };
        *have += n;
        if n == left
            && let Rx::Landing { landing, block, len, .. } =
                std::mem::replace(&mut self.state, Rx::Header)
        {
            let block = match block {
                Hold::Block(block) => Ok(block),
                Hold::Refused(error) => Err(error),
                Hold::Nothing => Err(GpuError("no block".into())),
            };
            arrivals.landed.push(Arrived { link: id, landing, block, len });
        }
        Ok(n)
    }

    /// Lets go of a block that the peer has not filled yet, because others wait for one. What is in it is kept for the next.
    pub(crate) fn yield_block(&mut self) {
        if let Rx::Landing { block: hold, have, .. } = &mut self.state
            && let Hold::Block(block) = hold
        {
            self.body.clear();
            self.body.extend_from_slice(&block.bytes()[..*have]);
            *hold = Hold::Nothing;
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
        match std::mem::replace(&mut self.state, Rx::Header) {
            Rx::Payload { dest, .. } => Core::drop_payload(dest, env),
            Rx::Landing { landing, .. } => Core::drop_payload(Dest::Landing(landing), env),
            Rx::Header | Rx::Body(_) => {}
        }
    }
}

/// Receives into ordinary memory: what is ahead, else from the socket.
#[inline]
fn receive(
    fd: &OwnedFd,
    ahead: &mut Ahead,
    out: &mut [u8],
    env: &mut Env<'_>,
) -> io::Result<usize> {
    if !ahead.is_empty() {
        return Ok(ahead.take(out));
    }
    env.counters.receive_calls.add(1);
    sys::recv(fd.as_fd(), out)
}

/// Why a step moved nothing.
enum Step {
    Empty,
    /// No block is free.
    Starved,
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
