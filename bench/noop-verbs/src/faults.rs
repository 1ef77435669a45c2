//! How READs and WRITEs fail, for tests: `NOOP_VERBS_FAULT` says how, `NOOP_VERBS_FAULTS` how many of them do, by default all.
//!
//! `status:N`: they end with this status, and all that follows on the queue pair is flushed. `poll`: the completion queue cannot be
//! polled any more. `event`: nothing comes out of it any more, and an event says that it is in error.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    Status(u32),
    Poll,
    Event,
}

static ASKED_FOR: AtomicBool = AtomicBool::new(false);
static FAULT: Mutex<Option<Fault>> = Mutex::new(None);
static LEFT: AtomicU32 = AtomicU32::new(0);
/// Completion queues whose error nobody has been told of.
static EVENTS: Mutex<VecDeque<usize>> = Mutex::new(VecDeque::new());

fn parse(text: &str) -> Option<Fault> {
    match text.split_once(':') {
        Some(("status", status)) => status.parse().ok().map(Fault::Status),
        None if text == "poll" => Some(Fault::Poll),
        None if text == "event" => Some(Fault::Event),
        _ => None,
    }
}

/// Looks at the variables.
pub(crate) fn read() {
    let Ok(text) = std::env::var("NOOP_VERBS_FAULT") else { return };
    let Some(fault) = parse(&text) else {
        eprintln!("NOOP_VERBS_FAULT={text} is none");
        return;
    };
    let count = std::env::var("NOOP_VERBS_FAULTS").ok().and_then(|count| count.parse().ok());
    LEFT.store(count.unwrap_or(u32::MAX), Ordering::Relaxed);
    *FAULT.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
    ASKED_FOR.store(true, Ordering::Relaxed);
}

#[inline]
pub(crate) fn are_asked_for() -> bool {
    ASKED_FOR.load(Ordering::Relaxed)
}

/// What the next READ or WRITE meets.
pub(crate) fn next() -> Option<Fault> {
    let less = |left: u32| left.checked_sub(1);
    LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok()?;
    *FAULT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the device tell that a completion queue is in error.
pub(crate) fn report(cq: usize, fd: RawFd) {
    EVENTS.lock().unwrap_or_else(PoisonError::into_inner).push_back(cq);
    let one = 1u64;
    // SAFETY: eight bytes, to a descriptor that is open.
    unsafe { libc::write(fd, (&raw const one).cast(), size_of_val(&one)) };
}

pub(crate) fn next_event() -> Option<usize> {
    EVENTS.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
}
