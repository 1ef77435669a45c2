//! The control connection: one JSON value per line, over TCP between initiator and target, over pipes between the
//! coordinator and its children. It is silent while anything is measured.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::case::RunSpec;
use crate::cpu::Usage;
use crate::manifest::Host;
use crate::measure::Points;
use crate::parent::Refusal;
use crate::raw_local::RawAddress;

/// Version of these messages; both sides must have the same.
pub(crate) const PROTOCOL: u32 = 4;
/// No line is longer: metadata, descriptors and histograms stay far below.
const MAX_LINE: u64 = 4 << 20;
/// Filling, checking and engine start-up take milliseconds to seconds; beyond this something hangs.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// What the initiator asks of the target.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ask {
    /// Must come first.
    Hello { protocol: u32 },
    /// Opens a case: engine, memory, application.
    Open { spec: Box<RunSpec> },
    /// Tells the target's engine who the initiator is, in hexadecimal, so that its application can answer.
    Introduce { metadata: String },
    /// Before a pass: renew the source of reads, poison the destination of writes, in the first `slots` slots.
    Begin { sequence: u64, slots: usize },
    /// After a pass: check the destination of writes in the first `slots` slots, account for all notifications of
    /// this case so far.
    End { sequence: u64, slots: usize, notifications: u64 },
    /// Closes the case.
    Close,
}

/// What the target answers, one reply per question.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    Welcome {
        protocol: u32,
        host: Box<Host>,
    },
    /// What the initiator needs to reach the memory; hexadecimal where it is binary.
    Opened {
        address: TargetAddress,
        placement: String,
    },
    Ready,
    Ended {
        usage: Usage,
        one_way: Points,
    },
    Closed,
    Failed {
        message: String,
    },
    /// The user asked for something that cannot be.
    Refused {
        message: String,
    },
}

/// How an initiator reaches the target of an open case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TargetAddress {
    /// Metadata of the engine and the descriptor of its region, in hexadecimal.
    Engine { metadata: String, descriptor: String },
    /// Port of the baseline on the control connection's host.
    RawTcp { port: u16 },
    /// Process and memory of a baseline that copies within one host.
    RawLocal(RawAddress),
}

/// Writes one value as one line.
pub(crate) fn write_line<T: Serialize>(writer: &mut impl Write, value: &T) -> Result<()> {
    let mut line = serde_json::to_vec(value).context("encoding a control message")?;
    line.push(b'\n');
    writer.write_all(&line).and_then(|()| writer.flush()).context("writing a control message")
}

/// Reads one line as one value; `None` at the end of the stream.
pub(crate) fn read_line<T: DeserializeOwned>(reader: &mut impl BufRead) -> Result<Option<T>> {
    let mut line = Vec::new();
    let len =
        reader.take(MAX_LINE).read_until(b'\n', &mut line).context("reading a control message")?;
    if len == 0 {
        return Ok(None);
    }
    ensure!(
        line.ends_with(b"\n"),
        "a control message was cut off or is longer than {MAX_LINE} bytes"
    );
    serde_json::from_slice(&line).map(Some).context("not a control message of this protocol")
}

/// One end of a control connection.
pub(crate) struct Control {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Control {
    /// Takes over a connected stream. `patience` bounds every later wait for a message; `None` waits for ever.
    pub(crate) fn new(stream: TcpStream, patience: Option<Duration>) -> Result<Self> {
        stream.set_nodelay(true).context("TCP_NODELAY")?;
        stream.set_read_timeout(patience).context("SO_RCVTIMEO")?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT)).context("SO_SNDTIMEO")?;
        let writer = stream.try_clone().context("duplicating the control connection")?;
        Ok(Self { reader: BufReader::new(stream), writer })
    }

    /// Connects to a target and greets it.
    pub(crate) fn connect(address: &str) -> Result<(Self, Box<Host>)> {
        let resolved = address
            .to_socket_addrs()
            .map_err(|error| Refusal(format!("cannot resolve '{address}': {error}")))?;
        let mut failure = None;
        for candidate in resolved {
            match TcpStream::connect_timeout(&candidate, Duration::from_secs(5)) {
                Err(error) => failure = Some(error),
                Ok(stream) => {
                    let mut control = Self::new(stream, Some(REPLY_TIMEOUT))?;
                    return match control.ask(&Ask::Hello { protocol: PROTOCOL })? {
                        Reply::Welcome { protocol: PROTOCOL, host } => Ok((control, host)),
                        Reply::Welcome { protocol, .. } => bail!(
                            "the server speaks control protocol {protocol}, this client {PROTOCOL}: use the same build on both hosts"
                        ),
                        other => bail!("unexpected greeting {other:?}"),
                    };
                }
            }
        }
        match failure {
            Some(error) => bail!(Refusal(format!(
                "cannot reach a server at {address}: is `corelane-bench server` running there? ({error})"
            ))),
            None => bail!(Refusal(format!("'{address}' has no address"))),
        }
    }

    /// The other side's IP address.
    pub(crate) fn peer_ip(&self) -> Result<std::net::IpAddr> {
        Ok(self.writer.peer_addr().context("the control connection's peer")?.ip())
    }

    /// This side's IP address on the connection.
    pub(crate) fn local_ip(&self) -> Result<std::net::IpAddr> {
        Ok(self.writer.local_addr().context("the control connection's address")?.ip())
    }

    /// Sends a question and waits for its answer; a `Failed` answer becomes the error it carries.
    pub(crate) fn ask(&mut self, ask: &Ask) -> Result<Reply> {
        write_line(&mut self.writer, ask)?;
        match read_line(&mut self.reader)? {
            Some(Reply::Failed { message }) => bail!("{message}"),
            Some(Reply::Refused { message }) => bail!(Refusal(message)),
            Some(reply) => Ok(reply),
            None => {
                bail!("the server closed the control connection: see its output for the reason")
            }
        }
    }

    /// The next question, `None` when the initiator is gone.
    pub(crate) fn next(&mut self) -> Result<Option<Ask>> {
        read_line(&mut self.reader)
    }

    /// Answers a question.
    pub(crate) fn reply(&mut self, reply: &Reply) -> Result<()> {
        write_line(&mut self.writer, reply)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // The peer may be gone already.
        let _ = self.writer.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_round_trip_as_lines() {
        let mut bytes = Vec::new();
        write_line(&mut bytes, &Ask::Begin { sequence: u64::MAX, slots: 3 }).expect("encodes");
        write_line(&mut bytes, &Ask::Close).expect("encodes");
        let mut reader = bytes.as_slice();
        let first: Option<Ask> = read_line(&mut reader).expect("decodes");
        assert!(matches!(first, Some(Ask::Begin { sequence: u64::MAX, slots: 3 })));
        assert!(matches!(read_line(&mut reader).expect("decodes"), Some(Ask::Close)));
        assert!(read_line::<Ask>(&mut reader).expect("the end").is_none());
    }

    #[test]
    fn garbage_and_cut_off_lines_are_errors() {
        for text in ["{}\n", "nonsense\n", "\"close\"", "{\"begin\":{\"sequence\":1}}\n", "\u{0}\n"]
        {
            assert!(read_line::<Ask>(&mut text.as_bytes()).is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_endless_line_is_not_read_to_its_end() {
        let mut endless = BufReader::new(std::io::repeat(b'x'));
        assert!(read_line::<Ask>(&mut endless).is_err());
    }

    #[test]
    fn an_unreachable_server_is_explained() {
        let Err(error) = Control::connect("127.0.0.1:1") else {
            panic!("nobody listens on port 1")
        };
        assert!(format!("{error:#}").contains("corelane-bench server"), "{error:#}");
        assert!(Control::connect("no-port").is_err());
    }
}
