//! The side that is copied from and to. It does nothing for that; only notifications have a thread here that polls.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Mailbox, Offer, RawAddress};
use crate::answering::Ledger;
use crate::arena::Arena;
use crate::clock::now_ns;
use crate::measure::Stamp;
use crate::pinning;

/// Polls between two looks whether it is over.
const POLLS_PER_LOOK: u32 = 1024;
/// How often the thread looks whether a pass has begun.
const PAUSE: Duration = Duration::from_micros(200);

/// Memory that an initiator reaches, and the thread that answers its notifications; dropping it ends both.
pub(crate) struct RawLocalTarget {
    offer: Offer,
    answering: Option<Answering>,
}

struct Answering {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl RawLocalTarget {
    /// Offers `arena`, which is `memory` where that is a file.
    pub(crate) fn start(
        arena: &Arena,
        memory: Option<File>,
        one_core: bool,
    ) -> Result<(Self, Mailbox)> {
        let (offer, mailbox) = Offer::new(arena, memory, one_core)?;
        Ok((Self { offer, answering: None }, mailbox))
    }

    /// Answers what arrives in `mailbox`, by a thread on `core` if one is given.
    pub(crate) fn answer(
        &mut self,
        mailbox: Mailbox,
        arena: Arena,
        core: Option<usize>,
        ledger: Ledger,
    ) -> Result<()> {
        let stop = Arc::new(AtomicBool::new(false));
        let body = {
            let stop = Arc::clone(&stop);
            move || {
                let pinned = core.map_or(Ok(()), pinning::pin_current_thread);
                if let Err(error) = pinned.and_then(|()| serve(mailbox, &arena, &stop, &ledger)) {
                    ledger.fail(format!("{error:#}"));
                }
            }
        };
        let thread = std::thread::Builder::new().name("raw-local-target".to_owned()).spawn(body);
        let thread = Some(thread.context("starting the thread that answers notifications")?);
        self.answering = Some(Answering { stop, thread });
        Ok(())
    }

    /// What the initiator needs.
    pub(crate) fn address(&self) -> &RawAddress {
        self.offer.address()
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // The thread looks at the flag all the time and catches its own errors.
            let _ = thread.join();
        }
    }
}

fn serve(mut mailbox: Mailbox, arena: &Arena, stop: &AtomicBool, ledger: &Ledger) -> Result<()> {
    let mut idle_polls = 0u32;
    loop {
        let Some(payload) = mailbox.try_receive() else {
            idle_polls = idle_polls.wrapping_add(1);
            if idle_polls.is_multiple_of(POLLS_PER_LOOK) {
                if stop.load(Ordering::Acquire) {
                    return Ok(());
                }
                // During verification there is nothing to poll for, and the other side may need the core.
                if ledger.is_paused() {
                    std::thread::sleep(PAUSE);
                }
            }
            continue;
        };
        let arrived = now_ns();
        let stamp = Stamp::decode(payload).context("a notification without a stamp")?;
        let intact = ledger.data_is_there(arena, &stamp);
        let mut answer = [0; Stamp::LEN];
        answer.copy_from_slice(&payload[..Stamp::LEN]);
        mailbox.send(&answer)?;
        ledger.arrived(&stamp, arrived, intact);
    }
}
