//! Failed queue pairs: both sides destroy theirs and say so, and what was lost is done again or ends.

use super::{Job, MAX_FAILURES, MAX_TRIES, Phase};
use crate::error::Error;
use crate::plan::Operation;
use crate::session::{RingState, WiredEnd};
use crate::sim::coverage::Event as Input;
use crate::sim::node::{Node, Outside};
use crate::wire::rdma::RdmaFrame;

impl Node {
    pub(super) fn wire_fail(&mut self, slot: usize, refused: Option<u64>, out: &mut dyn Outside) {
        let Some(wire) = self.wire(slot) else { return };
        let early = wire.phase == Phase::Connecting && !wire.offers && wire.exists;
        if wire.phase != Phase::Up && !early {
            return;
        }
        if wire.ignored {
            let link = wire.link;
            return self.close_link(link, "its queue pair has failed", out);
        }
        wire.phase = Phase::Down;
        wire.deadline = None;
        let culprit = refused.and_then(|work| wire.works.get(&work).copied().flatten());
        wire.failures += u32::from(culprit.is_none());
        let generation = wire.generation;
        self.wire_take_down(slot, culprit, out);
        if mutated!(RedoneUnconfirmed) {
            // Over the socket, and the peer is told nothing.
            self.wire_give_back(slot);
            return self.with_core(slot, Input::RdmaResolved, |core, env| {
                core.rdma_resolved(Err("it failed".into()), env);
            });
        }
        let Some(peer) = self.peers.get(slot) else { return };
        let expects = peer.core.expects();
        self.wire_tell(slot, RdmaFrame::Down { generation, expects }.encode());
        let deadline = self.now + self.wire_patience(true) + self.config.liveness;
        if let Some(wire) = self.wire(slot).filter(|_| !mutated!(DownWithoutEnd)) {
            wire.deadline = Some(deadline);
        }
    }

    pub(super) fn wire_take_down(
        &mut self,
        slot: usize,
        culprit: Option<u64>,
        out: &mut dyn Outside,
    ) {
        self.wire_destroy(slot, out);
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let gone = peer.core.peer.gone("RDMA has failed");
        let Some(wire) = peer.wire.as_mut() else { return };
        let mut over = Vec::new();
        for (key, job) in &mut wire.jobs {
            job.tries += u8::from(culprit.is_none());
            if job.stopped {
                // Packets of it may be on their way.
                over.push((*key, WiredEnd::Failed(gone.clone())));
            } else if culprit == Some(*key) {
                job.refused = true;
            } else if job.notified && !mutated!(NotifiedRedone) || job.tries > MAX_TRIES {
                over.push((*key, WiredEnd::Failed(gone.clone())));
            } else if !wire.parked.contains(key) {
                wire.parked.push(*key);
            }
        }
        for (key, end) in over {
            if let Some(wire) = self.wire(slot) {
                wire.jobs.remove(&key);
                wire.parked.retain(|parked| *parked != key);
            }
            self.wire_ended(slot, key, end);
        }
        let Some(peer) = self.peers.get_mut(slot) else { return };
        peer.core.rdma_pending();
        let nothing = RingState { has_room: false, is_empty: false, longest: usize::MAX };
        peer.core.set_ring(Some(nothing));
    }

    /// Destroys the queue pair; what has arrived by then is taken first.
    pub(super) fn wire_destroy(&mut self, slot: usize, out: &mut dyn Outside) {
        let Some(wire) = self.wire(slot).filter(|wire| wire.exists) else { return };
        wire.exists = false;
        wire.asked = false;
        let link = wire.link;
        if !mutated!(PairKept) || wire.offers {
            out.pair(link, None);
        }
        while let Some(completion) = out.completion(link) {
            self.wire_completed(slot, completion, out);
        }
        let Some(wire) = self.wire(slot) else { return };
        wire.works.clear();
        for job in wire.jobs.values_mut() {
            job.outstanding = 0;
        }
    }

    pub(super) fn on_wire_down(
        &mut self,
        slot: usize,
        generation: u32,
        expects: u64,
        out: &mut dyn Outside,
    ) -> Result<(), String> {
        if let Some(link) = self.wire(slot).map(|wire| wire.link) {
            self.look_at_wire(link, out);
        }
        let deaf = self.config.is_deaf;
        let Some(wire) = self.wire(slot) else { return Ok(()) };
        if wire.generation != generation {
            return Ok(());
        }
        if deaf && wire.phase == Phase::Up {
            wire.ignored = true;
            return Ok(());
        }
        match wire.phase {
            Phase::Up => {
                wire.phase = Phase::Down;
                self.wire_take_down(slot, None, out);
                let Some(peer) = self.peers.get(slot) else { return Ok(()) };
                let ours = peer.core.expects();
                self.wire_tell(slot, RdmaFrame::Down { generation, expects: ours }.encode());
            }
            Phase::Down => {}
            Phase::Off | Phase::Connecting => return Ok(()),
        }
        if self.wire(slot).is_none() {
            return Ok(());
        }
        self.with_core(slot, Input::RdmaDown, |core, env| core.rdma_resync(expects, env))
            .map_err(|error| error.to_string())?;
        self.wire_end_refused(slot);
        let Some(wire) = self.wire(slot) else { return Ok(()) };
        wire.phase = Phase::Connecting;
        let (offers, failures) = (wire.offers, wire.failures);
        if failures >= MAX_FAILURES {
            self.wire_tell(slot, RdmaFrame::None.encode());
            self.wire_resolve(slot, false);
            return Ok(());
        }
        let deadline = self.now + self.wire_patience(offers);
        if let Some(wire) = self.wire(slot) {
            wire.deadline = Some(deadline);
        }
        if offers {
            self.wire_offer(slot);
        }
        Ok(())
    }

    /// The peer lives: it has refused what it has refused.
    pub(super) fn wire_end_refused(&mut self, slot: usize) {
        let Some(wire) = self.wire(slot) else { return };
        let refused = wire.jobs.iter().filter(|(_, job)| job.refused);
        let refused: Vec<u64> = refused.map(|(key, _)| *key).collect();
        for key in refused {
            if let Some(wire) = self.wire(slot) {
                wire.jobs.remove(&key);
            }
            let peer = self.peers[slot].core.peer.name.clone();
            let reason = "the peer's device refused the access";
            self.wire_ended(slot, key, WiredEnd::Failed(Error::Permission { peer, reason }));
        }
    }

    /// Jobs that waited for a queue pair take another way.
    pub(super) fn wire_give_back(&mut self, slot: usize) {
        self.wire_end_refused(slot);
        self.wire_end_jobs(slot, "RDMA was given up amid the transfer", |job| job.notified);
    }

    pub(super) fn wire_end_jobs(
        &mut self,
        slot: usize,
        reason: &str,
        is_lost: impl Fn(&Job) -> bool,
    ) {
        let Some(wire) = self.wire(slot) else { return };
        wire.parked.clear();
        for (key, job) in std::mem::take(&mut wire.jobs) {
            if is_lost(&job) {
                let error = self.peers[slot].core.peer.gone(reason);
                self.wire_ended(slot, key, WiredEnd::Failed(error));
            } else {
                self.with_core(slot, Input::WiredBack, |core, env| core.wired_back(key, env));
            }
        }
    }

    /// The session's link is going, and with it the queue pair.
    pub(in crate::sim) fn wire_detach(&mut self, slot: usize, link: u64, out: &mut dyn Outside) {
        if self.wire(slot).is_none_or(|wire| wire.link != link) {
            return;
        }
        self.wire_destroy(slot, out);
        let Some(wire) = self.wire(slot) else { return };
        let jobs = std::mem::take(&mut wire.jobs);
        self.peers[slot].wire = None;
        for (key, job) in jobs {
            if job.begun && job.plan.operation == Operation::Write {
                let error = self.peers[slot].core.peer.gone("its session link is gone");
                self.wire_ended(slot, key, WiredEnd::Failed(error));
            } else {
                self.with_core(slot, Input::WiredBack, |core, env| core.wired_back(key, env));
            }
        }
        self.peers[slot].core.set_ring(None);
    }

    /// The lane ends: no device touches anything any more.
    pub(in crate::sim) fn destroy_wires(&mut self, out: &mut dyn Outside) {
        let slots: Vec<usize> = self.peers.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.wire_destroy(slot, out);
            self.peers[slot].wire = None;
        }
    }
}
