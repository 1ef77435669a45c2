//! What becomes of transfers, notifications and queue pairs when one fails, and when the session goes.

use corelane_runtime::Cx;
use smallvec::SmallVec;

use super::RAIL_PAUSE;
use crate::engine::lane::LaneDriver;
use crate::error::Error;
use crate::session::{RingState, WiredEnd};
use crate::transport::rdma::{EndedJob, Phase};
use crate::verbs::WorkStatus;
use crate::wire::rdma::RdmaFrame;

/// Failures within the pause, after which transfers go another way.
const MAX_FAILURES: u32 = 5;
/// How often a transfer is begun again before it counts as what breaks the connection.
const MAX_TRIES: u8 = 3;

/// Whose memory was closed to a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    Theirs,
    /// Our own, at about this address.
    Ours {
        addr: u64,
    },
}

/// What a failed queue pair means for others.
pub(super) enum Blame {
    /// A transfer: only it fails.
    Job(usize, Refusal),
    /// The way, of this rail.
    Rail(usize),
    /// Nobody in particular.
    Nobody,
    /// Perhaps a request of the peer's, which this side's device has refused: who posts is told what it was, who is written to
    /// only that its queue pair is in error.
    Unsaid,
}

impl LaneDriver {
    /// A queue pair has failed: all of the connection are destroyed, and the peer is told.
    pub(super) fn rdma_fail(&mut self, slot: usize, blame: &Blame, reason: &str, cx: &mut Cx<'_>) {
        let now = cx.now();
        let Some(link) = self.rdma_link(slot) else { return };
        // The side that offered may use them before this one has heard that they work.
        let early = link.phase == Phase::Connecting && !link.offers && !link.pairs.is_empty();
        if link.phase != Phase::Up && !early {
            return;
        }
        if link.up_since.is_some_and(|since| now.saturating_duration_since(since) > RAIL_PAUSE) {
            // What was long ago does not count, nor is a rail left out for it.
            link.failures = 0;
            link.suspects = 0;
        }
        link.phase = Phase::Down;
        if let Blame::Rail(rail) = blame {
            link.suspects |= 1 << rail;
        }
        // What was refused says nothing against the way.
        if matches!(blame, Blame::Rail(_) | Blame::Nobody) {
            link.failures += 1;
        }
        let generation = link.generation;
        self.counters.rdma_failures.add(1);
        if let Some(peer) = self.peers.get(slot) {
            tracing::warn!(peer = &*peer.core.peer.name, reason, "RDMA is interrupted");
        }
        let culprit = match blame {
            Blame::Job(job, refusal) => Some((*job, *refusal)),
            Blame::Rail(_) | Blame::Nobody | Blame::Unsaid => None,
        };
        self.rdma_take_down(slot, culprit, reason, cx);
        let Some(expects) = self.peers.get(slot).map(|peer| peer.core.expects()) else { return };
        self.rdma_tell(slot, RdmaFrame::Down { generation, expects }.encode());
        // A peer that lives may still never answer.
        let deadline = now + self.rdma_down_patience();
        self.rdma_set_deadline(slot, deadline, cx);
        if let Blame::Rail(rail) = blame
            && let Some(rail) = self.rdma.rails().get(*rail)
        {
            // A new address is a reason to fail, and the event that tells of it may be on its way.
            rail.suspect_address(now);
        }
    }

    /// Destroys all queue pairs of a connection. Jobs that cannot be begun again end, the others wait.
    pub(super) fn rdma_take_down(
        &mut self,
        slot: usize,
        culprit: Option<(usize, Refusal)>,
        reason: &str,
        cx: &mut Cx<'_>,
    ) {
        // The culprit's job has a place that may be given to another while messages are taken: it ends first.
        let key = culprit.and_then(|(job, refusal)| {
            let link = self.rdma_link(slot)?;
            link.jobs.get(job).map(|job| (job.key, refusal))
        });
        self.rdma_destroy(slot, cx);
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let name = peer.core.peer.name.clone();
        let Some(link) = peer.rdma.as_deref_mut() else { return };
        let mut over: SmallVec<[(EndedJob, WiredEnd); 8]> = SmallVec::new();
        let slots: SmallVec<[usize; 16]> = link.jobs.iter().map(|(job, _)| job).collect();
        for job_slot in slots {
            let Some(job) = link.jobs.get_mut(job_slot) else { continue };
            // Where another job is to blame, this one is not tried in vain.
            job.tries += u8::from(key.is_none());
            let blamed = key.filter(|(key, _)| *key == job.key).map(|(_, refusal)| refusal);
            let error = match blamed {
                Some(Refusal::Theirs) => {
                    // So does a process whose memory is torn down: whether this one lives, its answer tells.
                    job.refused = true;
                    continue;
                }
                Some(Refusal::Ours { addr }) => Some(Error::Fault { addr }),
                None if job.is_notified() || job.tries > MAX_TRIES => {
                    Some(Error::RemoteDisconnect { peer: name.clone(), reason: reason.into() })
                }
                None => None,
            };
            match error {
                Some(error) => {
                    if let Some(ended) = link.end(job_slot) {
                        over.push((ended, WiredEnd::Failed(error)));
                    }
                }
                None if !link.parked.contains(&job_slot) => link.parked.push(job_slot),
                None => {}
            }
        }
        self.rdma_end_stopped(slot, reason, cx);
        for (ended, end) in over {
            self.with_core(slot, cx, |core, env| core.wired_ended(ended.key, end, env));
        }
        self.with_core(slot, cx, |core, _| core.rdma_pending());
        // Until it is known what the peer has, no notification is sent.
        let nothing = RingState { has_room: false, is_empty: false, longest: usize::MAX };
        self.rdma_set_ring(slot, Some(nothing));
    }

    /// The peer lives: it has refused what it has refused.
    fn rdma_end_refused(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Some(link) = self.rdma_link(slot) else { return };
        for ended in link.take_refused() {
            self.with_core(slot, cx, |core, env| {
                let error = Error::Permission {
                    peer: core.peer.name.clone(),
                    reason: "the peer's device refused the access: the region is not registered (any more), or not \
                             with this permission",
                };
                core.wired_ended(ended.key, WiredEnd::Failed(error), env);
            });
        }
    }

    /// Whether notifications go over queue pairs: a peer on this host has a ring that is nearer.
    pub(super) fn has_rdma_messages(&self, slot: usize) -> bool {
        self.peers
            .get(slot)
            .is_some_and(|peer| !peer.local.as_ref().is_some_and(|local| local.is_up()))
    }

    pub(super) fn rdma_set_ring(&mut self, slot: usize, ring: Option<RingState>) {
        if self.has_rdma_messages(slot)
            && let Some(peer) = self.peers.get_mut(slot)
        {
            peer.core.set_ring(ring);
        }
    }

    /// Jobs that were told to end, and that nothing holds any more here. Packets of theirs may be on their way, until the
    /// peer has destroyed its queue pairs, too: a WRITE ends in why.
    fn rdma_end_stopped(&mut self, slot: usize, reason: &str, cx: &mut Cx<'_>) {
        let Some(link) = self.rdma_link(slot) else { return };
        for ended in link.take_stopped() {
            self.with_core(slot, cx, |core, env| {
                let gone = core.peer.gone(reason);
                core.wired_ended(ended.key, WiredEnd::Failed(gone), env);
            });
        }
    }

    /// Destroys the queue pairs of a connection; what has arrived by then is taken first.
    pub(super) fn rdma_destroy(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Some(link) = self.rdma_link(slot) else { return };
        let pairs = std::mem::take(&mut link.pairs);
        link.undecided = 0;
        link.asked = false;
        if pairs.is_empty() {
            return;
        }
        for (_, id) in &pairs {
            if let Some(pair) = self.rdma.pair(*id) {
                // The peer gets no acknowledgement of anything that arrives from now on.
                pair.set_error();
            }
        }
        // All of it: a notification that came behind a WRITE is nowhere else, once its sender has seen the end of the WRITE.
        let batch = self.rdma.drain();
        // Errors of these are what is expected; of others they come up again.
        let (good, bad): (Vec<_>, Vec<_>) =
            batch.iter().partition(|completion| completion.status == WorkStatus::Success);
        self.on_completions(&good, cx);
        self.rdma.recycle(batch);
        for (_, id) in pairs {
            // Nothing of it moves when it has been dropped.
            let Some(pair) = self.rdma.take_pair(id) else { continue };
            if let Some(link) = self.rdma_link(slot) {
                link.chains_lost(&pair);
            }
        }
        self.on_completions(&bad, cx);
        self.mark(slot);
    }

    /// The peer's queue pairs are gone.
    pub(super) fn on_rdma_down(
        &mut self,
        slot: usize,
        generation: u32,
        expects: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), String> {
        // What this side's own completions say of it comes first: they name the transfer that is to blame.
        self.drain_rdma(cx);
        let Some(link) = self.rdma_link(slot) else { return Ok(()) };
        if link.generation != generation {
            return Ok(());
        }
        match link.phase {
            Phase::Up => {
                link.phase = Phase::Down;
                self.rdma_take_down(slot, None, "the peer has found RDMA to fail", cx);
                let ours = self.peers.get(slot).map_or(0, |peer| peer.core.expects());
                self.rdma_tell(slot, RdmaFrame::Down { generation, expects: ours }.encode());
            }
            // It answers, or both have found out at once.
            Phase::Down => {}
            // The peer has lost what it had connected, before this side has decided. Completions of HELLOs that went well before
            // would have this side go up on queue pairs which lead nowhere, and then wait for an answer that has come already.
            Phase::Connecting if link.offers => {
                link.phase = Phase::Down;
                link.failures += 1;
                self.rdma_destroy(slot, cx);
                let ours = self.peers.get(slot).map_or(0, |peer| peer.core.expects());
                self.rdma_tell(slot, RdmaFrame::Down { generation, expects: ours }.encode());
            }
            // This side has given up what the peer then took to be up: it was too late, or none of what works there does here.
            // Nothing is left of it, which the peer waits to hear before it moves anything of its own again, and offers anew.
            Phase::Off if !link.offers => {
                let ours = self.peers.get(slot).map_or(0, |peer| peer.core.expects());
                self.rdma_tell(slot, RdmaFrame::Down { generation, expects: ours }.encode());
                return Ok(());
            }
            // Who offers and has given up has said so by `None`, which the peer is about to hear. And a peer that offers goes up
            // before it goes down: this side would not be connecting any more.
            Phase::Off | Phase::Connecting => return Ok(()),
        }
        // What is in a ring of shared memory is not lost, and the peer is not to get it twice.
        if self.has_rdma_messages(slot) {
            let resync = self.with_core(slot, cx, |core, env| core.rdma_resync(expects, env));
            resync.unwrap_or(Ok(())).map_err(|error| error.to_string())?;
        }
        self.rdma_end_refused(slot, cx);
        let Some(link) = self.rdma_link(slot) else { return Ok(()) };
        link.phase = Phase::Connecting;
        let (offers, failures) = (link.offers, link.failures);
        // Either side may be the only one that finds out, since it is the one that posts.
        if failures >= MAX_FAILURES {
            self.rdma_tell(slot, RdmaFrame::None.encode());
            self.rdma_resolve(slot, Err("it has failed again and again".into()), cx);
            return Ok(());
        }
        let deadline = cx.now() + self.rdma_patience(offers);
        self.rdma_set_deadline(slot, deadline, cx);
        if offers {
            self.rdma_offer(slot, cx);
        }
        Ok(())
    }

    /// Jobs that waited for queue pairs which will not come take another way.
    pub(super) fn rdma_give_back_jobs(&mut self, slot: usize, cx: &mut Cx<'_>) {
        self.rdma_end_refused(slot, cx);
        let Some(link) = self.rdma_link(slot) else { return };
        link.parked.clear();
        let slots: SmallVec<[usize; 16]> = link.jobs.iter().map(|(job, _)| job).collect();
        self.rdma_give_back(slot, slots, cx);
    }

    /// These jobs, which no queue pair has, take another way.
    pub(super) fn rdma_give_back(
        &mut self,
        slot: usize,
        jobs: impl IntoIterator<Item = usize>,
        cx: &mut Cx<'_>,
    ) {
        for job in jobs {
            let Some(ended) = self.rdma_link(slot).and_then(|link| link.end(job)) else { continue };
            self.with_core(slot, cx, |core, env| {
                if ended.notified {
                    // The peer may have seen the notification: it must not see it again.
                    let error = core.peer.gone("RDMA was given up amid the transfer");
                    core.wired_ended(ended.key, WiredEnd::Failed(error), env);
                } else {
                    core.wired_back(ended.key, env);
                }
            });
        }
    }

    /// The session's link is going, and with it the queue pairs.
    pub(in crate::engine) fn rdma_detach(&mut self, slot: usize, reason: &str, cx: &mut Cx<'_>) {
        if self.rdma_link(slot).is_none() {
            return;
        }
        self.rdma_destroy(slot, cx);
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let Some(mut link) = peer.rdma.take() else { return };
        if let Some(timer) = link.timer.take() {
            cx.cancel_timer(timer);
        }
        // A READ may be done again: the queue pairs that could write are destroyed.
        let lost: SmallVec<[(usize, bool); 16]> =
            link.jobs.iter().map(|(slot, job)| (slot, job.has_begun() && job.is_write())).collect();
        for (job, lost) in lost {
            let Some(ended) = link.end(job) else { continue };
            self.with_core(slot, cx, |core, env| {
                if lost {
                    let error = core.peer.gone(reason);
                    core.wired_ended(ended.key, WiredEnd::Failed(error), env);
                } else {
                    core.wired_back(ended.key, env);
                }
            });
        }
        self.rdma_set_ring(slot, None);
    }
}
