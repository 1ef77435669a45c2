//! Transfers whose link is lost, whose time is over, or for which no connection can be had.

#[cfg(test)]
use std::sync::Arc;
use std::time::Instant;

use super::super::{Core, Env, LinkId};
use super::{Active, ActiveKey, MAX_REDONE, Request};
use crate::error::Error;
use crate::plan::Operation;
#[cfg(test)]
use crate::transfer::TransferShared;
use crate::wire::hello::LinkKind;

impl Core {
    /// The transfers that have begun on links which are all gone: what was asked for will not be answered, and the peer does not
    /// count on across links.
    pub(in crate::session::core) fn lose_begun(&mut self, reason: &str, env: &mut Env<'_>) {
        let begun = |active: &Active| active.outstanding > 0 || active.counted || active.copying;
        let slots: Vec<usize> =
            self.active.iter().filter(|(_, active)| begun(active)).map(|(slot, _)| slot).collect();
        for slot in slots {
            self.lost(slot, reason, env);
        }
    }

    /// A transfer has lost requests with their link. A READ is begun again: it has changed nothing at the peer, and answers that
    /// are still on their way are thrown away. A WRITE is not: the peer may still be taking what the old link carries, so that
    /// bytes of the first try could arrive after the end of the second.
    fn lost(&mut self, slot: usize, reason: &str, env: &mut Env<'_>) {
        let active = &mut self.active[slot];
        let again = active.plan().operation == Operation::Read
            && active.ending.is_none()
            && !active.copying
            && !active.wired
            && active.redone < MAX_REDONE;
        if !again {
            let error = self.peer.gone(reason);
            return self.fail(slot, error, env);
        }
        active.begin_again();
        (active.next_piece, active.outstanding) = (0, 0);
        let key = ActiveKey { slot, stamp: active.stamp };
        // Scans: losing links is rare, and the windows bound the slab.
        for (_, request) in &mut self.requests {
            request.orphan |= request.active == key;
        }
        if self.active[slot].plan().device.is_some() {
            self.enqueue(key, env);
        } else if !self.latency.contains(&key) && !self.bulk.contains(&key) {
            self.enqueue_for_links(key);
        }
    }

    #[cfg(test)]
    pub(in crate::session::core) fn has_requests_of(&self, shared: &Arc<TransferShared>) -> bool {
        let mut all = self.active.iter().map(|(_, active)| active);
        all.any(|active| Arc::ptr_eq(&active.shared, shared) && active.outstanding > 0)
    }

    /// No other link comes up for the transfers that were begun again.
    pub(in crate::session::core) fn fail_redone(&mut self, reason: &str, env: &mut Env<'_>) {
        let redone = self.active.iter().filter(|(_, active)| active.redone > 0);
        let slots: Vec<usize> = redone.map(|(slot, _)| slot).collect();
        for slot in slots {
            let error = self.peer.gone(reason);
            self.fail(slot, error, env);
        }
    }

    /// The requests of a link that is gone: nobody will answer them.
    pub(in crate::session::core) fn lose_requests_of(
        &mut self,
        link: LinkId,
        reason: &str,
        env: &mut Env<'_>,
    ) {
        let lost: Vec<usize> = self
            .requests
            .iter()
            .filter(|(_, request)| request.link == link && !mutated!(LostLinkFailsNobody))
            .map(|(slot, _)| slot)
            .collect();
        for slot in lost {
            let Request { active: key, orphan, .. } = self.requests[slot];
            if self.requests[slot].unsent {
                // Removed by `write_sent`, which the transfer's end waits for.
                self.requests[slot].orphan = true;
            } else {
                self.requests.remove(slot);
            }
            // One that was begun again by the loss of another request is waiting, and has lost no more.
            let waits = !orphan || self.active_mut(key).is_some_and(|active| active.settling);
            if waits && self.is_active(key) {
                self.lost(key.slot, reason, env);
            }
        }
    }

    /// Ends the transfers that wait for a connection which cannot be had.
    pub(in crate::session::core) fn fail_all(&mut self, error: &Error, env: &mut Env<'_>) {
        let slots: Vec<usize> = self.active.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            if self.active.contains(slot) {
                self.fail(slot, error.clone(), env);
            }
        }
        self.latency.clear();
        self.bulk.clear();
        self.copies.clear();
        self.on_device.clear();
        self.forget_writes_to_pack();
        self.wired.clear();
    }

    /// The sockets and queue pairs are gone for good: no frame reads local memory any more.
    pub(in crate::session::core) fn drop_unsent(&mut self) {
        for (_, active) in &mut self.active {
            (active.unsent, active.wired) = (0, false);
        }
        for (_, request) in &mut self.requests {
            request.unsent = false;
        }
    }

    /// Fails what is past its deadline. A WRITE that is stuck in a socket costs the socket: nothing
    /// else makes its memory quiet.
    pub(in crate::session::core) fn expire_transfers(&mut self, env: &mut Env<'_>) {
        while let Some((at, key)) = self.deadlines.front().copied() {
            if mutated!(NoOperationTimeout) {
                self.deadlines.clear();
                break;
            }
            if self.is_active(key) && at > env.now {
                break;
            }
            self.deadlines.pop_front();
            if !self.is_active(key) {
                continue;
            }
            let (peer, after) = (self.peer.name.clone(), self.config.operation_timeout);
            let error = if self.session_link().is_some() {
                Error::Timeout { what: "a transfer", peer, after }
            } else {
                // There is no living peer that could be slow.
                let reason =
                    format!("no connection came up within the operation timeout, {after:?}");
                Error::Connect { peer, reason }
            };
            if mutated!(TimeoutTellsTheEnd)
                && let Some(active) = self.active.get(key.slot)
            {
                active.shared.slot.complete(Err(error));
                continue;
            }
            self.fail(key.slot, error, env);
            self.close_stuck(key, env.now);
        }
    }

    /// Closes the links that a transfer past its deadline is stuck in: those whose sockets do not take
    /// its frames, and streams that answer nothing at all (of the session link, liveness judges).
    fn close_stuck(&mut self, key: ActiveKey, now: Instant) {
        let patience = self.config.operation_timeout / 2;
        let mut stuck: Vec<LinkId> = Vec::new();
        for (_, request) in self.requests.iter().filter(|(_, request)| request.active == key) {
            let silent = self.links.iter().any(|link| {
                let quiet = now.saturating_duration_since(link.answered) >= patience;
                link.id == request.link && link.kind == LinkKind::Bulk && quiet
            });
            if (request.unsent || silent) && !stuck.contains(&request.link) {
                stuck.push(request.link);
            }
        }
        for link in stuck {
            self.close(link, "a transfer stuck in it passed the operation timeout", false);
        }
    }
}
