//! WRITEs that are to end while the peer has some of them: it may be writing, or be about to. It answers each request, so
//! that its last answer says that it writes no more. Their end waits for that, as long as answers may come.

use super::super::staged::PackSize;
use super::super::{Core, Env};
use super::{Active, ActiveKey};
use crate::error::Error;
use crate::plan::Operation;
#[cfg(feature = "sim")]
use crate::sim::coverage::TransferEvent;

/// Whether a peer goes on to answer what it was sent of a transfer that ends in this.
pub(super) fn leaves_the_peer(error: &Error) -> bool {
    matches!(
        error,
        Error::Cancelled | Error::Permission { .. } | Error::Fault { .. } | Error::Gpu { .. }
    )
}

impl Active {
    /// Whether the peer writes nothing of it any more, or will not say when it does not.
    pub(super) fn is_settled(&self) -> bool {
        !self.settling || self.outstanding == 0
    }

    /// Whether it is a WRITE that is to end, and waits for the peer to write no more: for answers, or for a device to say so.
    pub(super) fn waits_for_the_peer(&self) -> bool {
        let by_device = self.wired && self.ending.is_some();
        self.settling || (by_device && self.plan().operation == Operation::Write)
    }

    /// Nobody will say when the peer writes no more: that is not waited for, and the error does not claim it.
    pub(in crate::session::core) fn give_up_answers(&mut self, error: &Error) {
        self.settling = false;
        let claims = matches!(self.ending, Some(Error::Cancelled)) && !leaves_the_peer(error);
        if claims && self.plan().operation == Operation::Write {
            self.ending = Some(error.clone());
        }
    }
}

impl Core {
    /// Gives up what is not needed any more while answers are waited for: blocks that will not be sent, and local memory that
    /// nothing reads.
    pub(super) fn release_unread(&mut self, slot: usize, env: &mut Env<'_>) {
        let Some(active) = self.active.get_mut(slot).filter(|active| active.settling) else {
            return;
        };
        if let Some(packed) = active.packed.take() {
            let size = PackSize::of_write(&active.shared.plan);
            self.writes_to_pack.release_all(size, packed.ready.len());
        }
        if active.unsent == 0 {
            env.regions.release(std::mem::take(&mut active.uses));
        }
    }

    /// The answer to a request of a transfer that has ended or is about to.
    pub(super) fn orphan_answered(&mut self, key: ActiveKey, env: &mut Env<'_>) {
        let Some(active) = self.active_mut(key).filter(|active| active.settling) else { return };
        reached!(transfer, active.state(), TransferEvent::Answered);
        active.outstanding -= 1;
        if active.may_end() && !mutated!(EndingForgotten) {
            self.finish(key.slot, env);
            self.try_finish_leaving(env);
        }
    }

    /// Whether it is waited for that the peer writes no more of WRITEs that are to end.
    pub(in crate::session::core) fn is_settling(&self) -> bool {
        self.active.iter().any(|(_, active)| active.waits_for_the_peer())
    }

    /// That is not waited for any longer.
    pub(in crate::session::core) fn stop_settling(&mut self, error: &Error, env: &mut Env<'_>) {
        let settling = self.active.iter().filter(|(_, active)| active.waits_for_the_peer());
        let slots: Vec<usize> = settling.map(|(slot, _)| slot).collect();
        for slot in slots {
            self.active[slot].give_up_answers(error);
            self.fail(slot, error.clone(), env);
        }
    }
}
