//! What goes over queue pairs: chains of transfers, and messages.

use super::{ACK_REQUEST, BOUND, CREDITS, Completion, Job, Phase, Work, ranges};
use crate::plan::Operation;
use crate::session::{RingState, Wired, WiredEnd};
use crate::sim::coverage::Event as Input;
use crate::sim::links::Phase as LinkPhase;
use crate::sim::node::{Node, Outside};
use crate::sim::ring;
use crate::wire::hello::LinkKind;
use crate::wire::rdma::MAX_MESSAGE_PAYLOAD;

impl Node {
    /// Posts what the core has.
    pub(in crate::sim) fn flush_wire(&mut self, slot: usize, out: &mut dyn Outside) {
        loop {
            let Some(peer) = self.peers.get_mut(slot) else { return };
            let Some(wire) = peer.wire.as_mut().filter(|wire| wire.phase == Phase::Up) else {
                return;
            };
            let key = if let Some(key) = wire.parked.pop() {
                key
            } else {
                let Some(Wired { key, plan, notification }) = peer.core.next_wired() else {
                    break;
                };
                wire.jobs.insert(key, Job::new(plan, notification));
                key
            };
            self.wire_issue(slot, key, out);
        }
        self.flush_messages(slot, out);
    }

    pub(super) fn wire_issue(&mut self, slot: usize, key: u64, out: &mut dyn Outside) {
        let Some(wire) = self.wire(slot) else { return };
        let room = wire.sending() < CREDITS;
        let Some(job) = wire.jobs.get_mut(&key) else { return };
        let all = ranges(&job.plan);
        let work = match job.plan.operation {
            Operation::Read => Work::Read(all),
            Operation::Write => Work::Write(all),
        };
        job.outstanding = 1;
        job.begun = true;
        let message = job.notification.clone().filter(|_| room);
        job.notified = message.is_some();
        job.outstanding += u32::from(job.notified);
        self.wire_post(slot, Some(key), work, out);
        if let Some(payload) = message {
            let bytes = [&[BOUND], &payload[..]].concat();
            self.wire_post(slot, Some(key), Work::Send(bytes), out);
        }
    }

    pub(super) fn wire_post(
        &mut self,
        slot: usize,
        job: Option<u64>,
        work: Work,
        out: &mut dyn Outside,
    ) {
        let Some(wire) = self.wire(slot) else { return };
        let number = wire.next_work;
        wire.next_work += 1;
        wire.works.insert(number, job);
        out.post(wire.link, number, work);
    }

    pub(super) fn flush_messages(&mut self, slot: usize, out: &mut dyn Outside) {
        loop {
            let Some(wire) = self.wire(slot) else { return };
            let has_room = wire.sending() < CREDITS;
            let state = RingState { has_room, is_empty: false, longest: MAX_MESSAGE_PAYLOAD };
            let message = self.quiet_core(slot, |core, env| {
                core.set_ring(Some(state));
                if has_room { core.next_ring_message(env) } else { None }
            });
            let Some(message) = message else {
                let core = &mut self.peers[slot].core;
                let (is_empty, unsent) = (core.is_all_acknowledged(), core.has_unsent());
                core.set_ring(Some(RingState { is_empty, ..state }));
                let Some(wire) = self.wire(slot) else { return };
                wire.asked &= !is_empty;
                if unsent && !is_empty && !wire.asked && has_room {
                    wire.asked = true;
                    self.wire_post(slot, None, Work::Send(vec![ACK_REQUEST]), out);
                }
                return;
            };
            self.wire_post(slot, None, Work::Send(ring::encode(&message)), out);
        }
    }

    /// A transfer is to end early.
    pub(in crate::sim) fn stop_wired(
        &mut self,
        slot: usize,
        key: u64,
        stuck: bool,
        out: &mut dyn Outside,
    ) {
        let Some(wire) = self.wire(slot) else { return };
        wire.parked.retain(|parked| *parked != key);
        let Some(job) = wire.jobs.get_mut(&key) else { return };
        job.stopped = true;
        if job.outstanding == 0 {
            wire.jobs.remove(&key);
            // Packets of what the queue pair has lost may land until the peer has destroyed its own.
            let end = if wire.phase == Phase::Down {
                let Some(peer) = self.peers.get(slot) else { return };
                WiredEnd::Failed(peer.core.peer.gone("its queue pair has failed"))
            } else {
                WiredEnd::Stopped
            };
            self.wire_ended(slot, key, end);
        } else if stuck && wire.phase == Phase::Up {
            self.wire_fail(slot, None, out);
        }
    }

    pub(super) fn wire_ended(&mut self, slot: usize, key: u64, end: WiredEnd) {
        self.with_core(slot, Input::WiredEnded, |core, env| core.wired_ended(key, end, env));
    }

    /// The device has something to tell of the queue pair of a session's link.
    pub fn look_at_wire(&mut self, link: u64, out: &mut dyn Outside) {
        let Some(LinkPhase::Open { peer, kind: LinkKind::Session, .. }) =
            self.links.get(&link).map(|link| &link.phase)
        else {
            return;
        };
        let slot = *peer;
        let mut failed = None;
        while let Some(completion) = out.completion(link) {
            match completion {
                // Good news first.
                Completion::Failed(refused) => failed = Some(failed.flatten().or(refused)),
                good => self.wire_completed(slot, good, out),
            }
        }
        if let Some(refused) = failed {
            self.wire_fail(slot, refused, out);
        }
        self.mark(slot);
    }

    pub(super) fn wire_completed(
        &mut self,
        slot: usize,
        completion: Completion,
        out: &mut dyn Outside,
    ) {
        let number = match completion {
            Completion::Received(bytes) => return self.wire_received(slot, &bytes, out),
            Completion::Failed(_) => return,
            Completion::Done(number) => number,
        };
        let Some(wire) = self.wire(slot) else { return };
        let Some(Some(key)) = wire.works.remove(&number) else { return };
        let Some(job) = wire.jobs.get_mut(&key) else { return };
        job.outstanding -= 1;
        if job.outstanding == 0 {
            let (stopped, notified) = (job.stopped, job.notified);
            wire.jobs.remove(&key);
            let end = if stopped { WiredEnd::Stopped } else { WiredEnd::Done { notified } };
            self.wire_ended(slot, key, end);
        }
    }

    pub(super) fn wire_received(&mut self, slot: usize, bytes: &[u8], out: &mut dyn Outside) {
        let handled = self.with_core(slot, Input::WireMessage, |core, env| {
            core.heard(env.now);
            match bytes.split_first() {
                Some((&BOUND, payload)) => core.on_bound(payload.to_vec(), env),
                Some((&ACK_REQUEST, _)) => core.acknowledge_now(),
                _ => {
                    if let Some(message) = ring::decode(bytes) {
                        return core.on_ring_message(message, env);
                    }
                }
            }
            Ok(())
        });
        if let Err(error) = handled
            && let Some(link) = self.wire(slot).map(|wire| wire.link)
        {
            let peer = self.peers[slot].core.peer.incarnation;
            out.broken(peer, &error.to_string());
            self.close_link(link, &error.to_string(), out);
        }
    }
}
