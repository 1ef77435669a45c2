//! A hostile network between two engines: everything goes through [`Proxy`], which may record, cut, alter or crumble it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What becomes of bytes on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passing {
    /// Passed on unchanged.
    Whole,
    /// Passed on in writes of so few bytes.
    Crumbs(usize),
    /// Passed on unchanged, each byte so long after it came; those behind it do not wait for that.
    Delayed(Duration),
    /// One bit is turned in the byte of this number, in each direction of each connection.
    Flipped(u64),
    /// Passed on up to this many bytes in each direction of each connection, then cut.
    CutAfter(u64),
    /// Passed on up to this many bytes in each direction of each connection; what follows is not taken, and nobody is told.
    HeldAfter(u64),
}

#[derive(Debug)]
struct Shared {
    passing: Mutex<Passing>,
    target: Mutex<Option<SocketAddr>>,
    open: Mutex<Vec<TcpStream>>,
    /// What the connecting side said, one list for each connection.
    recorded: Mutex<Vec<Arc<Mutex<Vec<u8>>>>>,
    passed: AtomicU64,
    ended: AtomicBool,
}

/// A relay on the loopback address. An engine uses it by advertising its address instead of its own.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    /// Listens. Connections are refused until [`aim`](Self::aim) has said where they go.
    pub fn new(passing: Passing) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port for the proxy");
        let address = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            passing: Mutex::new(passing),
            target: Mutex::new(None),
            open: Mutex::new(Vec::new()),
            recorded: Mutex::new(Vec::new()),
            passed: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if accepting.ended.load(Ordering::SeqCst) {
                    break;
                }
                relay(&accepting, client);
            }
        });
        Self { address, shared }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where connections go.
    pub fn aim(&self, port: u16) {
        *lock(&self.shared.target) = Some((Ipv4Addr::LOCALHOST, port).into());
    }

    /// What becomes of bytes from now on, on connections that are still to come.
    pub fn set(&self, passing: Passing) {
        *lock(&self.shared.passing) = passing;
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        for stream in lock(&self.shared.open).drain(..) {
            // It may be gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Bytes passed on in both directions.
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::SeqCst)
    }

    /// What the connecting sides have said, one list for each connection.
    pub fn recorded(&self) -> Vec<Vec<u8>> {
        lock(&self.shared.recorded).iter().map(|list| lock(list).clone()).collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.cut();
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
    }
}

fn relay(shared: &Arc<Shared>, client: TcpStream) {
    let target = *lock(&shared.target);
    let Some(server) = target.and_then(|target| TcpStream::connect(target).ok()) else { return };
    let record = Arc::new(Mutex::new(Vec::new()));
    lock(&shared.recorded).push(record.clone());
    let passing = *lock(&shared.passing);
    for stream in [&client, &server] {
        stream.set_nodelay(true).expect("TCP_NODELAY");
        lock(&shared.open).push(stream.try_clone().expect("another handle"));
    }
    let ways =
        [(client.try_clone(), server.try_clone(), Some(record)), (Ok(server), Ok(client), None)];
    for (from, to, record) in ways {
        let (from, to) = (from.expect("another handle"), to.expect("another handle"));
        let shared = shared.clone();
        std::thread::spawn(move || {
            pass(&shared, passing, &from, &to, record.as_deref());
            // The other end may be gone already.
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
}

/// Recorded of each connection: handshake and more.
const RECORD_BYTES: usize = 1 << 16;

fn pass(
    shared: &Shared,
    passing: Passing,
    mut from: &TcpStream,
    mut to: &TcpStream,
    record: Option<&Mutex<Vec<u8>>>,
) {
    if let Passing::Delayed(delay) = passing {
        return pass_later(shared, delay, from, to);
    }
    let mut buffer = vec![0; 64 << 10];
    let mut position = 0u64;
    loop {
        let Ok(len @ 1..) = from.read(&mut buffer) else { return };
        let bytes = &mut buffer[..len];
        if let Some(record) = record {
            let mut record = lock(record);
            let room = RECORD_BYTES - record.len();
            record.extend_from_slice(&bytes[..len.min(room)]);
        }
        let mut step = len;
        let mut send = len;
        match passing {
            Passing::Whole => {}
            Passing::Crumbs(size) => step = size,
            Passing::Flipped(at) if (position..position + len as u64).contains(&at) => {
                bytes[(at - position) as usize] ^= 0x10;
            }
            Passing::Flipped(_) | Passing::Delayed(_) => {}
            Passing::CutAfter(limit) | Passing::HeldAfter(limit) => {
                send = len.min(limit.saturating_sub(position) as usize);
            }
        }
        for crumb in bytes[..send].chunks(step) {
            if to.write_all(crumb).is_err() {
                return;
            }
        }
        shared.passed.fetch_add(send as u64, Ordering::SeqCst);
        position += len as u64;
        if send < len {
            while matches!(passing, Passing::HeldAfter(_)) && !shared.ended.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
            return;
        }
    }
}

/// Pieces that are on their way at most.
const UNDER_WAY: usize = 4096;

fn pass_later(shared: &Shared, delay: Duration, mut from: &TcpStream, mut to: &TcpStream) {
    std::thread::scope(|scope| {
        let (pieces, due) = std::sync::mpsc::sync_channel::<(Instant, Vec<u8>)>(UNDER_WAY);
        scope.spawn(move || {
            for (at, piece) in due {
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
                if to.write_all(&piece).is_err() {
                    // Whoever reads is told, too.
                    let _ = from.shutdown(Shutdown::Both);
                    return;
                }
                shared.passed.fetch_add(piece.len() as u64, Ordering::SeqCst);
            }
        });
        let mut buffer = vec![0; 64 << 10];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            if pieces.send((Instant::now() + delay, buffer[..len].to_vec())).is_err() {
                return;
            }
        }
    });
}
