//! The parent of a measuring process, over pipes.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, Stdin};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

use anyhow::{Context as _, Result};
use nix::unistd::{dup, dup2_stdout};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::{read_line, write_line};

/// Something that the user has to put right; ends with exit code 2.
#[derive(Debug)]
pub(crate) struct Refusal(pub(crate) String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

/// Where orders of type `O` come from and replies go to. Orders are read by a thread of their own so that the application
/// can poll for them.
pub(crate) struct Parent<O> {
    orders: Receiver<Result<Option<O>>>,
    replies: File,
}

impl<O: DeserializeOwned + Send + 'static> Parent<O> {
    /// Descriptors and threads that a process has for its parent besides the standard ones.
    pub(crate) const DESCRIPTORS: u64 = 1;
    pub(crate) const THREADS: u64 = 1;

    /// Reads orders from standard input, and keeps standard output for replies: whatever a library prints there from
    /// now on goes to standard error.
    pub(crate) fn connect(stdin: Stdin) -> Result<Self> {
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
    pub(crate) fn wait(&self) -> Result<Option<O>> {
        self.orders.recv().unwrap_or(Ok(None))
    }

    /// The order that has arrived, if any; `Some(None)` at the end.
    pub(crate) fn poll(&self) -> Result<Option<Option<O>>> {
        match self.orders.try_recv() {
            Ok(order) => order.map(Some),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Ok(Some(None)),
        }
    }

    /// As [`Parent::poll`], after sleeping for `pause` unless an order comes first.
    #[cfg(feature = "nixl")]
    pub(crate) fn sleep(&self, pause: std::time::Duration) -> Result<Option<Option<O>>> {
        use std::sync::mpsc::RecvTimeoutError;
        match self.orders.recv_timeout(pause) {
            Ok(order) => order.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Ok(Some(None)),
        }
    }

    /// Answers an order.
    pub(crate) fn reply(&self, reply: &impl Serialize) -> Result<()> {
        write_line(&mut &self.replies, reply)
    }
}

fn next<O: DeserializeOwned>(lines: &mut impl BufRead) -> Result<Option<O>> {
    read_line(lines).context("the parent's orders")
}

/// Ends the process at once: libraries that some backends bring crash in their destructors, and a process that has said
/// all it has to say need not run them.
#[cfg(feature = "nixl")]
pub(crate) fn leave(ended: &Result<()>) -> ! {
    // SAFETY: ends the process without running exit handlers, which is the point. Replies are written without a
    // buffer, and nothing else is worth keeping.
    unsafe { libc::_exit(i32::from(ended.is_err())) }
}
