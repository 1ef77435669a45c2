//! A peer that speaks the protocol by hand, from docs/protocol.md and not from the engine's code, so that it can break any rule.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use crate::BOUND;

/// Frame types.
#[allow(missing_docs, reason = "named as in docs/protocol.md")]
pub mod frame {
    pub const READ: u8 = 1;
    pub const DATA: u8 = 2;
    pub const WRITE: u8 = 3;
    pub const STATUS: u8 = 4;
    pub const NOTIFY: u8 = 5;
    pub const ACK: u8 = 6;
    pub const PING: u8 = 7;
    pub const PONG: u8 = 8;
    pub const GOODBYE: u8 = 9;
    pub const ABANDON: u8 = 10;
    pub const ATTACH: u8 = 11;
    pub const ATTACHED: u8 = 12;
    pub const SHARE: u8 = 13;
    pub const UNSHARE: u8 = 14;
    pub const QUEUE_PAIR: u8 = 15;
    pub const RDMA: u8 = 16;
}

/// Transports, as a handshake and metadata name them.
pub const TCP: u32 = 1;
/// Between engines of one host.
pub const LOCAL: u32 = 2;
/// RDMA.
pub const RDMA: u32 = 4;

/// Who an engine is, out of its metadata.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Agent name.
    pub name: String,
    /// Random number of the engine.
    pub incarnation: u128,
    /// What a handshake proves.
    pub secret: [u8; 32],
}

impl Identity {
    /// Reads metadata.
    pub fn of(metadata: &[u8]) -> Self {
        let len = usize::from(u16::from_le_bytes([metadata[6], metadata[7]]));
        let (name, rest) = metadata[8..].split_at(len);
        Self {
            name: String::from_utf8(name.to_vec()).expect("a name"),
            incarnation: u128::from_le_bytes(rest[..16].try_into().expect("16 bytes")),
            secret: rest[16..48].try_into().expect("32 bytes"),
        }
    }

    /// An engine that does not exist.
    pub fn invented(name: &str, number: u128) -> Self {
        Self { name: name.to_owned(), incarnation: number, secret: [number as u8; 32] }
    }

    /// Metadata of an engine that listens on a port of this host.
    pub fn metadata(&self, port: u16) -> Vec<u8> {
        self.metadata_with(port, TCP)
    }

    /// The same, with the transports that it says it has.
    pub fn metadata_with(&self, port: u16, transports: u32) -> Vec<u8> {
        let mut bytes = b"CLMD\x01\0".to_vec();
        bytes.extend((self.name.len() as u16).to_le_bytes());
        bytes.extend(self.name.as_bytes());
        bytes.extend(self.incarnation.to_le_bytes());
        bytes.extend(self.secret);
        bytes.extend(transports.to_le_bytes());
        bytes.extend(1u16.to_le_bytes());
        bytes.push(4);
        bytes.extend(Ipv4Addr::LOCALHOST.octets());
        bytes.extend(port.to_le_bytes());
        let sum = Sha256::digest(&bytes);
        bytes.extend(&sum[..4]);
        bytes
    }
}

/// First message of a handshake.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "named as in docs/protocol.md")]
pub struct Hello {
    pub versions: (u16, u16),
    pub kind: u8,
    pub transports: u32,
    pub initiator: u128,
    pub target: u128,
    pub nonce: [u8; 32],
    pub session: u64,
    pub attempt: u64,
    pub expects: u64,
    pub liveness_ms: u32,
    pub name: Vec<u8>,
}

impl Hello {
    /// As an honest engine says it. `attempt` must grow from one to the next.
    pub fn honest(from: &Identity, to: &Identity, attempt: u64) -> Self {
        Self {
            versions: (1, 1),
            kind: 1,
            transports: 3,
            initiator: from.incarnation,
            target: to.incarnation,
            nonce: [7; 32],
            session: 0,
            attempt,
            expects: 0,
            liveness_ms: 60_000,
            name: from.name.clone().into_bytes(),
        }
    }

    /// The bytes, without their length.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = b"CLNE\x01".to_vec();
        bytes.extend(self.versions.0.to_le_bytes());
        bytes.extend(self.versions.1.to_le_bytes());
        bytes.push(self.kind);
        bytes.extend(self.transports.to_le_bytes());
        bytes.extend(self.initiator.to_le_bytes());
        bytes.extend(self.target.to_le_bytes());
        bytes.extend(self.nonce);
        bytes.extend(self.session.to_le_bytes());
        bytes.extend(self.attempt.to_le_bytes());
        bytes.extend(self.expects.to_le_bytes());
        bytes.extend(self.liveness_ms.to_le_bytes());
        bytes.extend((self.name.len() as u16).to_le_bytes());
        bytes.extend(&self.name);
        bytes
    }
}

/// A proof of the handshake: `label` without the protocol's name.
pub fn proof(secret: &[u8; 32], label: &str, hello: &[u8], challenge: &[u8]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("any length will do");
    mac.update(format!("corelane 1: {label}").as_bytes());
    // The challenge counts without the proof that it carries.
    let mut unproven = challenge.to_vec();
    unproven[59..91].fill(0);
    for part in [hello, &unproven] {
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// The label of the proof that an initiator has the target's metadata.
pub const INITIATOR: &str = "initiator has the target's secret";
/// The label of the proof that an initiator has its own secret.
pub const INITIATOR_OWN: &str = "initiator has its own secret";
/// The label of the proof that a target has its own secret.
pub const TARGET: &str = "target has its own secret";

/// A frame's header, field by field.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as in docs/protocol.md")]
pub struct Header {
    pub kind: u8,
    pub flags: u8,
    pub status: u16,
    pub body: u32,
    pub len: u64,
    pub id: u64,
    pub aux: u64,
    pub segments: u32,
    pub keys: u32,
    pub key: u128,
    pub addr: u64,
}

impl Header {
    /// A header of zeros but for its type.
    pub fn new(kind: u8) -> Self {
        Self { kind, ..Self::default() }
    }

    /// As it goes on the wire.
    pub fn encode(&self) -> [u8; 64] {
        let mut bytes = vec![self.kind, self.flags];
        bytes.extend(self.status.to_le_bytes());
        bytes.extend(self.body.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.id.to_le_bytes());
        bytes.extend(self.aux.to_le_bytes());
        bytes.extend(self.segments.to_le_bytes());
        bytes.extend(self.keys.to_le_bytes());
        bytes.extend(self.key.to_le_bytes());
        bytes.extend(self.addr.to_le_bytes());
        bytes.try_into().expect("64 bytes")
    }

    /// Reads what an engine has written.
    pub fn decode(bytes: &[u8; 64]) -> Self {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        Self {
            kind: bytes[0],
            flags: bytes[1],
            status: u16::from_le_bytes([bytes[2], bytes[3]]),
            body: word(4) as u32,
            len: word(8),
            id: word(16),
            aux: word(24),
            segments: word(32) as u32,
            keys: word(36) as u32,
            key: u128::from(word(40)) | u128::from(word(48)) << 64,
            addr: word(56),
        }
    }
}

/// A frame of an engine, with body and payload.
pub type Frame = (Header, Vec<u8>);

/// A link to an engine, over TCP or a Unix socket.
#[derive(Debug)]
pub enum Stream {
    /// Over the network.
    Tcp(TcpStream),
    /// On this host.
    Unix(UnixStream),
}

impl Stream {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }

    /// Says that nothing more will be sent.
    pub fn end(&self) {
        // It may be closed by the other side.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
        };
    }

    /// Takes nothing any more: on a Unix socket whoever sends gets an error, and no sign of it before.
    pub fn stop_hearing(&self) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Read),
            Self::Unix(stream) => stream.shutdown(Shutdown::Read),
        };
    }

    /// How long sending may wait for a reader.
    pub fn set_patience(&self, patience: std::time::Duration) {
        match self {
            Self::Tcp(stream) => stream.set_write_timeout(Some(patience)),
            Self::Unix(stream) => stream.set_write_timeout(Some(patience)),
        }
        .expect("a timeout");
    }

    fn set_bound(&self) {
        match self {
            Self::Tcp(stream) => {
                stream.set_nodelay(true).expect("an option");
                stream.set_read_timeout(Some(BOUND))
            }
            Self::Unix(stream) => stream.set_read_timeout(Some(BOUND)),
        }
        .expect("a timeout");
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(bytes),
            Self::Unix(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection to the engine's port.
pub fn knock(port: u16) -> Stream {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the listener accepts");
    let stream = Stream::Tcp(stream);
    stream.set_bound();
    stream
}

fn local_address(incarnation: u128) -> SocketAddr {
    let name = format!("corelane-{incarnation:032x}");
    SocketAddr::from_abstract_name(name).expect("an address")
}

/// A connection to the engine's socket for peers on its host.
pub fn knock_locally(incarnation: u128) -> Stream {
    let stream =
        UnixStream::connect_addr(&local_address(incarnation)).expect("the listener accepts");
    let stream = Stream::Unix(stream);
    stream.set_bound();
    stream
}

/// Sends a message of the handshake behind its length. False: the engine has hung up.
pub fn say(stream: &mut Stream, message: &[u8]) -> bool {
    let len = (message.len() as u16).to_le_bytes();
    stream.write_all(&[&len[..], message].concat()).is_ok()
}

/// A message of the handshake; `None`: the engine has hung up. Panics if it does neither in time.
pub fn hear(stream: &mut Stream) -> Option<Vec<u8>> {
    let mut len = [0; 2];
    read_all(stream, &mut len)?;
    let mut message = vec![0; usize::from(u16::from_le_bytes(len))];
    read_all(stream, &mut message)?;
    Some(message)
}

/// Fills `bytes`; `None`: the engine has hung up before.
fn read_all(stream: &mut Stream, bytes: &mut [u8]) -> Option<()> {
    match stream.read_exact(bytes) {
        Ok(()) => Some(()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("the engine neither answers nor hangs up within {BOUND:?}")
        }
        Err(_) => None,
    }
}

/// What a handshake came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The link is up: number of the session.
    Welcome(u64),
    /// The engine said why not.
    Refused(u8),
    /// The engine hung up.
    HungUp,
}

/// The initiator's part of a handshake, with both secrets, whatever the hello says.
pub fn shake(stream: &mut Stream, hello: &[u8], own: &[u8; 32], theirs: &[u8; 32]) -> Verdict {
    shake_with(stream, hello, own, theirs, |say_who| say_who())
}

/// As [`shake`]; `around` is to call what says who it is, and may do something else before and after.
pub fn shake_with(
    stream: &mut Stream,
    hello: &[u8],
    own: &[u8; 32],
    theirs: &[u8; 32],
    around: impl FnOnce(&mut dyn FnMut() -> bool) -> bool,
) -> Verdict {
    if !say(stream, hello) {
        return Verdict::HungUp;
    }
    let Some(challenge) = hear(stream) else { return Verdict::HungUp };
    if challenge[4] == 5 {
        return Verdict::Refused(challenge[5]);
    }
    assert_eq!((challenge[4], challenge.len()), (2, 91), "no challenge");
    let mut auth = b"CLNE\x03".to_vec();
    auth.extend(proof(theirs, INITIATOR, hello, &challenge));
    auth.extend(proof(own, INITIATOR_OWN, hello, &challenge));
    if !around(&mut || say(stream, &auth)) {
        return Verdict::HungUp;
    }
    match hear(stream) {
        None => Verdict::HungUp,
        Some(answer) if answer[4] == 5 => Verdict::Refused(answer[5]),
        Some(answer) => {
            assert_eq!((answer[4], answer.len()), (4, 26), "no welcome");
            Verdict::Welcome(u64::from_le_bytes(answer[6..14].try_into().expect("8 bytes")))
        }
    }
}

/// A session link that is up.
#[derive(Debug)]
pub struct HostilePeer {
    /// Its socket.
    pub stream: Stream,
    /// Number of the session.
    pub session: u64,
}

impl HostilePeer {
    /// Connects as an honest engine would.
    #[track_caller]
    pub fn connect(mut stream: Stream, from: &Identity, to: &Identity) -> Self {
        static ATTEMPTS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let attempt = ATTEMPTS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let hello = Hello::honest(from, to, attempt);
        match shake(&mut stream, &hello.encode(), &from.secret, &to.secret) {
            Verdict::Welcome(session) => Self { stream, session },
            other => panic!("an honest handshake: {other:?}"),
        }
    }

    /// Sends a header and what follows it. False: the engine has hung up, or takes nothing for too long.
    pub fn send(&mut self, header: &Header, rest: &[u8]) -> bool {
        self.stream.write_all(&[&header.encode()[..], rest].concat()).is_ok()
    }

    /// Sends a header with descriptors. False: the engine has hung up.
    pub fn send_with(&mut self, header: &Header, descriptors: &[BorrowedFd<'_>]) -> bool {
        send_with(&self.stream, &header.encode(), descriptors)
    }

    /// The next frame with its payload; `None`: the engine has hung up.
    #[track_caller]
    pub fn receive(&mut self) -> Option<Frame> {
        let mut bytes = [0; 64];
        read_all(&mut self.stream, &mut bytes)?;
        let header = Header::decode(&bytes);
        assert!((1..=16).contains(&header.kind), "the engine sends no such frame: {header:?}");
        let with_payload = [frame::DATA, frame::WRITE, frame::NOTIFY].contains(&header.kind);
        let len = header.body as usize + if with_payload { header.len as usize } else { 0 };
        let mut payload = vec![0; len];
        read_all(&mut self.stream, &mut payload)?;
        Some((header, payload))
    }

    /// Asks whether the engine is still there, and gives all frames until it says so; `Err`: it has hung up.
    #[track_caller]
    pub fn ping(&mut self, id: u64) -> Result<Vec<Frame>, Vec<Frame>> {
        self.send(&Header { id, ..Header::new(frame::PING) }, &[]);
        let mut frames = Vec::new();
        while let Some((header, payload)) = self.receive() {
            if header.kind == frame::PONG && header.id == id {
                return Ok(frames);
            }
            frames.push((header, payload));
        }
        Err(frames)
    }

    /// Ends the conversation, and gives all frames that the engine has sent until it has hung up, too.
    #[track_caller]
    pub fn end(mut self) -> Vec<Frame> {
        self.stream.end();
        let mut frames = Vec::new();
        while let Some(next) = self.receive() {
            frames.push(next);
        }
        frames
    }

    /// The next frame and the descriptors that came with it (Unix sockets only).
    #[track_caller]
    pub fn receive_with(&mut self) -> Option<(Header, Vec<OwnedFd>)> {
        let (mut bytes, mut descriptors) = ([0; 64], Vec::new());
        let mut have = 0;
        while have < bytes.len() {
            let (n, more) = receive_with(&self.stream, &mut bytes[have..])?;
            have += n;
            descriptors.extend(more);
        }
        Some((Header::decode(&bytes), descriptors))
    }
}

/// Sends bytes with descriptors. False: the other side has hung up.
pub fn send_with(stream: &Stream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> bool {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let from = [io::IoSlice::new(bytes)];
    let fd = stream.fd().as_raw_fd();
    sendmsg::<()>(fd, &from, control, MsgFlags::MSG_NOSIGNAL, None).is_ok_and(|n| n == bytes.len())
}

fn receive_with(stream: &Stream, bytes: &mut [u8]) -> Option<(usize, Vec<OwnedFd>)> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut space = nix::cmsg_space!([i32; 8]);
    let mut into = [io::IoSliceMut::new(bytes)];
    let fd = stream.fd().as_raw_fd();
    let message =
        recvmsg::<()>(fd, &mut into, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).ok()?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for us.
            descriptors.extend(raw.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
        }
    }
    (message.bytes > 0).then_some((message.bytes, descriptors))
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A listener that engines connect to when they are given the metadata of an engine that does not exist.
#[derive(Debug)]
pub struct HostileTarget {
    /// Who it says it is.
    pub identity: Identity,
    /// What it says it has.
    pub transports: u32,
    listener: Listener,
}

impl HostileTarget {
    /// Listens on a free port.
    pub fn new(identity: Identity) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        Self { identity, transports: TCP, listener: Listener::Tcp(listener) }
    }

    /// Listens where peers on its host look for it, and nowhere else.
    pub fn on_this_host(identity: Identity) -> Self {
        let listener = UnixListener::bind_addr(&local_address(identity.incarnation));
        let listener = Listener::Unix(listener.expect("an address that nobody has"));
        Self { identity, transports: LOCAL, listener }
    }

    /// What engines need to connect.
    pub fn metadata(&self) -> Vec<u8> {
        let port = match &self.listener {
            Listener::Tcp(listener) => listener.local_addr().expect("its address").port(),
            // Nobody looks there.
            Listener::Unix(_) => 9,
        };
        self.identity.metadata_with(port, self.transports)
    }

    /// The next connection and the hello on it.
    pub fn accept(&self) -> (Stream, Vec<u8>) {
        let mut stream = match &self.listener {
            Listener::Tcp(listener) => Stream::Tcp(listener.accept().expect("a connection").0),
            Listener::Unix(listener) => Stream::Unix(listener.accept().expect("a connection").0),
        };
        stream.set_bound();
        let hello = hear(&mut stream).expect("a hello");
        (stream, hello)
    }

    /// A challenge to a hello, with the proof that belongs to it.
    pub fn challenge(&self, hello: &[u8]) -> Vec<u8> {
        let mut challenge = b"CLNE\x02\x01\0".to_vec();
        challenge.extend(self.transports.to_le_bytes());
        challenge.extend(self.identity.incarnation.to_le_bytes());
        challenge.extend([9; 32]);
        challenge.extend([0; 32]);
        let proof = proof(&self.identity.secret, TARGET, hello, &challenge);
        challenge[59..].copy_from_slice(&proof);
        challenge
    }

    /// Accepts a session as an honest engine would.
    pub fn session(&self) -> HostilePeer {
        let (mut stream, hello) = self.accept();
        say(&mut stream, &self.challenge(&hello));
        hear(&mut stream).expect("an auth");
        let mut welcome = b"CLNE\x04\0".to_vec();
        welcome.extend(77u64.to_le_bytes());
        welcome.extend(0u64.to_le_bytes());
        welcome.extend(60_000u32.to_le_bytes());
        say(&mut stream, &welcome);
        HostilePeer { stream, session: 77 }
    }
}
