//! A process of a pair: obeys its parent until its input ends.

use std::fs::File;
use std::io::{BufRead, Stdin};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::unistd::{dup, dup2_stdout};

use super::agent::{NixlAgent, Refusal, nixl_version};
use super::driver::Driver;
use super::initiator::{self, Meter};
use super::raw::RawSide;
use super::target;
use super::wire::{NixlSystem, Order, Reply, Role, Setup, System};
use crate::control::{read_line, write_line};
use crate::pinning;
use crate::units::{from_hex, to_hex};

/// The parent, over pipes. Its orders are read by a thread of their own so that the application can poll for them.
pub(crate) struct Parent {
    orders: Receiver<Result<Option<Order>>>,
    replies: File,
}

impl Parent {
    /// Reads orders from standard input, and keeps standard output for replies: whatever a library prints there from
    /// now on goes to standard error.
    fn connect(stdin: Stdin) -> Result<Self> {
        let replies = File::from(dup(std::io::stdout()).context("duplicating standard output")?);
        dup2_stdout(std::io::stderr()).context("redirecting standard output")?;
        let (sender, receiver) = sync_channel(1);
        let read = move || {
            let mut lines = stdin.lock();
            loop {
                let order = next(&mut lines);
                let last = !matches!(order, Ok(Some(_)));
                if sender.send(order).is_err() || last {
                    return;
                }
            }
        };
        let name = "orders".to_owned();
        std::thread::Builder::new().name(name).spawn(read).context("starting a thread")?;
        Ok(Self { orders: receiver, replies })
    }

    /// Waits for an order; `None` at the end.
    pub(crate) fn wait(&self) -> Result<Option<Order>> {
        self.orders.recv().unwrap_or(Ok(None))
    }

    /// The order that has arrived, if any; `Some(None)` at the end.
    pub(crate) fn poll(&self) -> Result<Option<Option<Order>>> {
        match self.orders.try_recv() {
            Ok(order) => order.map(Some),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Ok(Some(None)),
        }
    }

    /// As [`Parent::poll`], after sleeping for `pause` unless an order comes first.
    pub(crate) fn sleep(&self, pause: Duration) -> Result<Option<Option<Order>>> {
        match self.orders.recv_timeout(pause) {
            Ok(order) => order.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Ok(Some(None)),
        }
    }

    /// Answers an order.
    pub(crate) fn reply(&self, reply: &Reply) -> Result<()> {
        write_line(&mut &self.replies, reply)
    }
}

fn next(lines: &mut impl BufRead) -> Result<Option<Order>> {
    read_line(lines).context("the parent's orders")
}

/// Runs one side. Does not return: libraries that some backends bring crash in their destructors, and a process that
/// has said all it has to say need not run them.
pub(crate) fn serve() -> Result<()> {
    let parent = Parent::connect(std::io::stdin())?;
    let ended = work(&parent);
    if let Err(error) = &ended {
        let message = format!("{error:#}");
        let failure = if error.is::<Refusal>() {
            Reply::Refused { message }
        } else {
            Reply::Failed { message }
        };
        // The parent may be gone; there is nobody else to tell.
        let _ = parent.reply(&failure);
    }
    // SAFETY: ends the process without running exit handlers, which is the point. Replies are written without a
    // buffer, and nothing else is worth keeping.
    unsafe { libc::_exit(i32::from(ended.is_err())) }
}

fn work(parent: &Parent) -> Result<()> {
    let Some(Order::Setup(setup)) = parent.wait()? else {
        bail!("expected to be set up first");
    };
    match &setup.system {
        System::Nixl(system) => drive(parent, NixlAgent::new(system, &setup)?, &setup),
        System::Raw(kind) => drive(parent, RawSide::new(*kind, &setup)?, &setup),
    }
}

fn drive(parent: &Parent, mut agent: impl Driver, setup: &Setup) -> Result<()> {
    // After the backend has started its threads: only the application's own thread is placed.
    if let Some(core) = setup.core {
        pinning::pin_current_thread(core)?;
    }
    let (metadata, nixl) = match &setup.system {
        System::Raw(_) => (agent.metadata()?, String::new()),
        System::Nixl(NixlSystem { backend, .. }) => {
            let metadata = agent.metadata();
            let question = || format!("is {backend} a backend for transfers between agents?");
            (metadata.with_context(question)?, nixl_version())
        }
    };
    let metadata = to_hex(&metadata);
    let address = agent.arena().as_ptr() as u64;
    let pid = std::process::id() as i32;
    parent.reply(&Reply::Ready { metadata, address, pid, nixl })?;
    let other = match parent.wait()? {
        Some(Order::Meet { metadata, address, pid }) => {
            let metadata = from_hex(&metadata).context("metadata that is no hexadecimal")?;
            agent.meet(&metadata, address)?;
            parent.reply(&Reply::Met)?;
            pid
        }
        None => return Ok(()),
        Some(other) => bail!("expected to meet the other side, not {other:?}"),
    };
    match setup.role {
        Role::Initiator => {
            initiator::run(&mut agent, parent, setup.seed, Meter { own: pid, target: other })
        }
        Role::Target => target::run(&mut agent, parent, setup.seed, setup.sleeps),
    }
}
