//! The baseline: one bare pair of TCP sockets, as fast as this kernel lets two polling threads be.
//!
//! A 64-byte request, answered by the payload (read) or by 8 bytes (write). Both sides poll `recv(MSG_DONTWAIT)`
//! without yielding and set `TCP_NODELAY`; there is no engine, no check, no thread hand-over. What the engine takes
//! beyond this is the engine's.

mod initiator;
mod target;

pub(crate) use initiator::RawInitiator;
pub(crate) use target::RawTarget;

use std::io::IoSlice;
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, sendmsg};

use crate::case::MAX_NOTIFICATION;
use crate::clock::now_ns;
use crate::measure::OPERATION_TIMEOUT_NS;

/// Bytes of a request.
const REQUEST_LEN: usize = 64;
/// Bytes that answer a write.
const ACK_LEN: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Notify,
    WriteNotify,
}

/// What travels in front of everything; `payload` and `notification` bytes follow where the kind has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    kind: Kind,
    offset: u64,
    len: u64,
    notification_len: u64,
}

impl Request {
    const MAGIC: u64 = 0x7463_705F_7761_7221;

    fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut bytes = [0; REQUEST_LEN];
        let words = [Self::MAGIC, self.kind as u64, self.offset, self.len, self.notification_len];
        for (chunk, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *chunk = word.to_le_bytes();
        }
        bytes
    }

    fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self> {
        let words = bytes.as_chunks::<8>().0;
        let word = |position: usize| u64::from_le_bytes(words[position]);
        ensure!(word(0) == Self::MAGIC, "not a request of the raw TCP baseline");
        let kind = match word(1) {
            0 => Kind::Read,
            1 => Kind::Write,
            2 => Kind::Notify,
            3 => Kind::WriteNotify,
            other => bail!("unknown request {other} on the raw TCP baseline"),
        };
        let notification_len = word(4);
        ensure!(
            notification_len <= MAX_NOTIFICATION as u64,
            "a notification of {notification_len} bytes"
        );
        Ok(Self { kind, offset: word(2), len: word(3), notification_len })
    }
}

/// Receives what is there, without waiting: `None` when nothing is.
#[inline]
fn try_receive(stream: &TcpStream, into: &mut [u8]) -> Result<Option<usize>> {
    match recv(stream.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT) {
        Ok(0) => bail!("the other side of the raw TCP pair closed its socket"),
        Ok(len) => Ok(Some(len)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        Err(errno) => Err(errno).context("receiving on the raw TCP pair"),
    }
}

/// Receives exactly `into.len()` bytes, polling without yielding.
fn receive(stream: &TcpStream, into: &mut [u8]) -> Result<()> {
    let (mut have, mut idle_polls, mut begin) = (0, 0u32, 0);
    while have < into.len() {
        match try_receive(stream, &mut into[have..])? {
            Some(len) => (have, idle_polls) = (have + len, 0),
            None => {
                // The clock is read rarely: it would be a tenth of the polling cost.
                idle_polls += 1;
                if idle_polls == 1024 {
                    begin = now_ns();
                } else if idle_polls.is_multiple_of(1024) && now_ns() - begin > OPERATION_TIMEOUT_NS
                {
                    bail!("nothing arrived on the raw TCP pair for 30 s");
                }
            }
        }
    }
    Ok(())
}

/// Sends all `parts` as one message, waiting in the kernel while the socket's buffer is full.
///
/// One system call for header and payload: two would leave in two segments and wake the receiver twice.
fn send_all<const N: usize>(stream: &TcpStream, parts: [&[u8]; N]) -> Result<()> {
    let mut slices = parts.map(IoSlice::new);
    let mut left = slices.as_mut_slice();
    while !left.is_empty() {
        match sendmsg::<()>(stream.as_raw_fd(), left, &[], MsgFlags::MSG_NOSIGNAL, None) {
            Ok(len) => IoSlice::advance_slices(&mut left, len),
            Err(Errno::EINTR) => {}
            // The socket has a send timeout, so that a stopped peer ends the run.
            Err(Errno::EAGAIN) => bail!("the raw TCP pair took no data for 30 s"),
            Err(errno) => return Err(errno).context("sending on the raw TCP pair"),
        }
    }
    Ok(())
}

fn configure(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true).context("TCP_NODELAY")?;
    let timeout = std::time::Duration::from_nanos(OPERATION_TIMEOUT_NS);
    stream.set_write_timeout(Some(timeout)).context("SO_SNDTIMEO")
}

#[cfg(test)]
mod tests;
