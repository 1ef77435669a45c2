//! The side that serves: one thread that polls without yielding while a case runs.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{ACK_LEN, Kind, REQUEST_LEN, Request, configure, receive, send_all, try_receive};
use crate::answering::Ledger;
use crate::arena::Arena;
use crate::case::MAX_NOTIFICATION;
use crate::clock::now_ns;
use crate::measure::Stamp;
use crate::pinning;

/// A listening target and its serving thread; dropping it ends both.
pub(crate) struct RawTarget {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl RawTarget {
    /// Serves one initiator from `arena`, on `core` if one is given.
    pub(crate) fn start(
        ip: IpAddr,
        arena: Arena,
        core: Option<usize>,
        ledger: Ledger,
    ) -> Result<Self> {
        let listener = TcpListener::bind((ip, 0))
            .with_context(|| format!("cannot listen on {ip} for the raw TCP pair"))?;
        let address = listener.local_addr().context("the address of the raw TCP pair")?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = Arc::clone(&stop);
            std::thread::Builder::new().name("raw-tcp-target".to_owned()).spawn(move || {
                let served = pin(core).and_then(|()| serve(&listener, &arena, &stop, &ledger));
                if let Err(error) = served
                    && !stop.load(Ordering::Acquire)
                {
                    ledger.fail(format!("{error:#}"));
                }
            })
        };
        Ok(Self {
            address,
            stop,
            thread: Some(thread.context("starting the thread of the raw TCP pair")?),
        })
    }

    /// Where the initiator connects to.
    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for RawTarget {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // The thread looks at the flag at least every 100 ms and catches its own errors.
            let _ = thread.join();
        }
    }
}

fn pin(core: Option<usize>) -> Result<()> {
    core.map_or(Ok(()), pinning::pin_current_thread)
}

fn accept(listener: &TcpListener, stop: &AtomicBool) -> Result<Option<TcpStream>> {
    loop {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::from(100u8));
        if stop.load(Ordering::Acquire) {
            return Ok(None);
        }
        if ready.is_ok_and(|ready| ready > 0) {
            let (stream, _) = listener.accept().context("accepting the raw TCP pair")?;
            configure(&stream)?;
            return Ok(Some(stream));
        }
    }
}

fn serve(listener: &TcpListener, arena: &Arena, stop: &AtomicBool, ledger: &Ledger) -> Result<()> {
    let Some(stream) = accept(listener, stop)? else { return Ok(()) };
    let mut notification = vec![0; MAX_NOTIFICATION];
    let mut header = [0; REQUEST_LEN];
    loop {
        let mut have = 0;
        let mut idle_polls = 0u32;
        while have < REQUEST_LEN {
            match try_receive(&stream, &mut header[have..])? {
                Some(len) => have += len,
                None => {
                    idle_polls = idle_polls.wrapping_add(1);
                    if idle_polls.is_multiple_of(1024) {
                        if stop.load(Ordering::Acquire) {
                            return Ok(());
                        }
                        // During verification there is nothing to poll for, and the other side may need the core.
                        if ledger.is_paused() {
                            wait_readable(&stream, Duration::from_millis(100));
                        }
                    }
                }
            }
        }
        let request = Request::decode(&header)?;
        let (offset, len) = (request.offset, request.len as usize);
        ensure!(
            arena.contains(offset, request.len),
            "{len} bytes at {offset} lie outside of the target's memory"
        );
        match request.kind {
            Kind::Read => arena.with_block(offset, len, |block| send_all(&stream, [block]))?,
            Kind::Write => {
                arena.with_block(offset, len, |block| receive(&stream, block))?;
                send_all(&stream, [&[0; ACK_LEN]])?;
            }
            Kind::Notify | Kind::WriteNotify => {
                if request.kind == Kind::WriteNotify {
                    arena.with_block(offset, len, |block| receive(&stream, block))?;
                }
                let payload = &mut notification[..request.notification_len as usize];
                receive(&stream, payload)?;
                let arrived = now_ns();
                let Some(stamp) = Stamp::decode(payload) else {
                    bail!("a notification without a stamp")
                };
                let intact = ledger.data_is_there(arena, &stamp);
                send_all(&stream, [&payload[..Stamp::LEN]])?;
                ledger.arrived(&stamp, arrived, intact);
            }
        }
    }
}

fn wait_readable(stream: &TcpStream, limit: Duration) {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::ZERO);
    // Whatever it returns, the caller's receive tells the truth.
    let _ = poll(&mut fds, timeout);
}
