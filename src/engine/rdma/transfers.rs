//! Transfers and messages are posted, completions taken.

use corelane_runtime::Cx;
use smallvec::SmallVec;

use super::failure::{Blame, Refusal};
use crate::engine::lane::{LaneDriver, env as lane_env};
use crate::error::Error;
use crate::gpu::{Device, GpuError, Look};
use crate::plan::PlanInner;
use crate::session::{RingState, Wired, WiredEnd};
use crate::transport::local::Message as RingMessage;
use crate::transport::rdma::{Job, Pair, PairId, Phase, Rail, WorkId};
use crate::verbs::{Completion, WorkStatus};
use crate::wire::rdma::{MAX_MESSAGE_PAYLOAD, RdmaMessage};

fn reason_of(status: WorkStatus, rail: &str) -> String {
    format!("RDMA over {rail} has failed: {status}")
}

fn unseen(error: &GpuError) -> Error {
    let what = "making what was read visible to the GPU".to_owned();
    Error::Gpu { what, reason: error.to_string() }
}

/// Why memory of a GPU in a plan is not what was registered: devices would move the bytes of what it was, or of nothing, and say
/// that all is well.
fn gone(plan: &PlanInner, look: &mut Option<Look>) -> Option<Error> {
    plan.device.as_ref()?;
    let lost = |error: GpuError| {
        let what = format!("a transfer by RDMA with `{}`", plan.peer.name);
        Error::Gpu { what, reason: error.0 }
    };
    plan.regions.iter().find_map(|region| {
        let allocation = region.gpu()?;
        let device = allocation.device();
        if let Some(error) = device.lost() {
            return Some(lost(error.clone()));
        }
        let look = *look.get_or_insert_with(Look::new);
        if allocation.is_live_in(look) {
            return None;
        }
        // The driver of a lost GPU knows no memory of it.
        let addr = region.descriptor.base();
        Some(device.check_alive().map_or_else(lost, |()| Error::Fault { addr }))
    })
}

impl LaneDriver {
    /// Posts what the core has for the device, and sends its messages; true: something was.
    pub(in crate::engine) fn rdma_flush(&mut self, slot: usize, cx: &mut Cx<'_>) -> bool {
        let Some(peer) = self.peers.get_mut(slot) else { return false };
        let Some(link) = peer.rdma.as_deref_mut().filter(|link| link.phase == Phase::Up) else {
            return false;
        };
        let mut posted = false;
        // Each allocation is asked for once, however many transfers go now.
        let mut look = None;
        while let Some(Wired { key, plan, notification }) = peer.core.next_wired() {
            if let Some(error) = gone(&plan, &mut look) {
                let mut env = lane_env(&mut self.regions, &self.engine, &self.counters, cx.now());
                peer.core.wired_ended(key, WiredEnd::Failed(error), &mut env);
                continue;
            }
            let job = link.add(Job::new(key, plan, notification));
            if self.rdma.assign(link, job) {
                posted = true;
            } else {
                // It was queued for rails that are not there any more.
                link.end(job);
                let mut env = lane_env(&mut self.regions, &self.engine, &self.counters, cx.now());
                peer.core.wired_back(key, &mut env);
            }
        }
        match self.rdma.issue_all(link) {
            Ok(some) => {
                posted |= some.doorbells > 0;
                self.counters.requests_sent.add(some.requests);
                self.counters.rdma_doorbells.add(some.doorbells);
            }
            Err((rail, error)) => {
                self.rdma_fail(slot, &Blame::Rail(rail), &format!("posting: {error}"), cx);
                return true;
            }
        }
        posted | self.rdma_flush_messages(slot, cx)
    }

    /// Sends notifications, acknowledgements and credits over the first queue pair.
    pub(super) fn rdma_flush_messages(&mut self, slot: usize, cx: &mut Cx<'_>) -> bool {
        let now = cx.now();
        let has_messages = self.has_rdma_messages(slot);
        let Self { peers, regions, engine, counters, rdma, .. } = self;
        let Some(peer) = peers.get_mut(slot) else { return false };
        let Some(link) = peer.rdma.as_deref_mut().filter(|link| link.phase == Phase::Up) else {
            return false;
        };
        let Some(first) = link.first() else { return false };
        let mut env = lane_env(regions, engine, counters, now);
        let mut moved = false;
        let core = &mut peer.core;
        let sent = rdma.with_list(first, |pair, list| {
            if !has_messages {
                return Ok(());
            }
            loop {
                let has_room = pair.can_send();
                let state = RingState { has_room, is_empty: false, longest: MAX_MESSAGE_PAYLOAD };
                core.set_ring(Some(state));
                let message = if has_room { core.next_ring_message(&mut env) } else { None };
                let Some(message) = message else { break };
                moved = true;
                pair.send(
                    list,
                    &match &message {
                        RingMessage::Notify { seq, ack, payload } => {
                            RdmaMessage::Notify { seq: *seq, ack: *ack, payload }
                        }
                        RingMessage::Ack(below) => RdmaMessage::Ack(*below),
                    },
                )?;
            }
            // What is too long for it goes over the socket, once all that went before has arrived.
            let is_empty = core.is_all_acknowledged();
            core.set_ring(Some(RingState {
                has_room: pair.can_send(),
                is_empty,
                longest: MAX_MESSAGE_PAYLOAD,
            }));
            link.asked &= !is_empty;
            if core.has_unsent() && !is_empty && !link.asked && pair.can_send() {
                link.asked = true;
                pair.send(list, &RdmaMessage::AckRequest)?;
            }
            Ok(())
        });
        let backlogged = peer.core.is_backlogged();
        let sent = sent.unwrap_or(Ok(())).and_then(|()| rdma.return_credits(link, backlogged));
        if let Err(error) = sent {
            self.rdma_fail(slot, &Blame::Nobody, &format!("sending a message: {error}"), cx);
        }
        moved
    }

    /// Jobs that waited for queue pairs have some; where these are on rails that do not have their memory, they take another way.
    pub(super) fn rdma_resume(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Self { peers, rdma, .. } = self;
        let Some(link) = peers.get_mut(slot).and_then(|peer| peer.rdma.as_deref_mut()) else {
            return;
        };
        let mut parked = std::mem::take(&mut link.parked);
        parked.retain(|job| !rdma.assign(link, *job));
        self.rdma_give_back(slot, parked, cx);
        self.mark(slot);
    }

    /// A transfer is to end early.
    pub(in crate::engine) fn stop_wired(
        &mut self,
        slot: usize,
        key: u64,
        stuck: bool,
        cx: &mut Cx<'_>,
    ) {
        let Some(link) = self.rdma_link(slot) else { return };
        let quiet = link.phase != Phase::Down;
        if let Some(ended) = link.stop(key) {
            self.with_core(slot, cx, |core, env| {
                // Packets of what a queue pair has lost may land until the peer has destroyed its own.
                let end = if quiet {
                    WiredEnd::Stopped
                } else {
                    WiredEnd::Failed(core.peer.gone("its queue pair has failed"))
                };
                core.wired_ended(ended.key, end, env);
            });
        } else if stuck && link.phase == Phase::Up {
            // Nothing else makes its memory quiet.
            let reason = "a transfer passed the operation timeout";
            self.rdma_fail(slot, &Blame::Nobody, reason, cx);
        }
    }

    /// Looks into the completion queues; true: there was something.
    #[inline]
    pub(in crate::engine) fn poll_rdma(&mut self, cx: &mut Cx<'_>) -> bool {
        if self.rdma.is_idle() {
            return false;
        }
        let batch = self.rdma.poll();
        let worked = !batch.is_empty();
        self.on_completions(&batch, cx);
        self.rdma.recycle(batch);
        worked | (self.rdma.has_broken() && self.rdma_leave_broken(cx))
    }

    /// Takes all that the completion queues have: where what comes next depends on it.
    pub(in crate::engine) fn drain_rdma(&mut self, cx: &mut Cx<'_>) {
        if self.rdma.is_idle() {
            return;
        }
        let batch = self.rdma.drain();
        self.on_completions(&batch, cx);
        self.rdma.recycle(batch);
    }

    /// Queue pairs whose completions will not come are made anew, on another completion queue.
    #[cold]
    fn rdma_leave_broken(&mut self, cx: &mut Cx<'_>) -> bool {
        for (slot, rail) in self.rdma.take_broken() {
            let Some(link) = self.rdma_link(slot) else { continue };
            if link.phase == Phase::Connecting && link.offers {
                let generation = link.generation;
                let all: SmallVec<[(u8, PairId); 4]> = link.pairs.clone();
                for (index, id) in all {
                    if self.rdma.pair(id).is_some_and(|pair| pair.rail == rail) {
                        self.rdma_decided(slot, generation, index, false, cx);
                    }
                }
                continue;
            }
            let name = self.rdma.rails().get(rail).map(Rail::name).unwrap_or_default();
            let reason = format!("{name}: the device has given a completion queue up");
            self.rdma_fail(slot, &Blame::Rail(rail), &reason, cx);
        }
        true
    }

    /// Good news first: a failure destroys queue pairs, and with them what is known of their completions.
    pub(super) fn on_completions(&mut self, batch: &[Completion], cx: &mut Cx<'_>) {
        let mut failed = false;
        for completion in batch {
            if completion.status == WorkStatus::Success {
                self.on_completion(completion, cx);
            } else {
                failed = true;
            }
        }
        if failed {
            let bad = batch.iter().filter(|completion| completion.status != WorkStatus::Success);
            for completion in bad {
                self.on_work_error(completion, cx);
            }
        }
    }

    pub(super) fn on_completion(&mut self, completion: &Completion, cx: &mut Cx<'_>) {
        let (id, receive, number) = WorkId::split(completion.id);
        // Of one that is gone: stale.
        let Some((slot, pair)) = self.rdma.entry(id) else { return };
        if receive {
            match pair.received(number, completion.len) {
                Ok((bytes, len)) => self.on_rdma_message(slot, &bytes[..len], cx),
                Err(reason) => self.rdma_protocol_error(slot, reason, cx),
            }
            return;
        }
        // One that tells of messages only is no transfer's.
        let of_transfer = pair.chain_of(number).is_some_and(|chain| chain.job.is_some());
        self.counters.rdma_completions.add(u64::from(of_transfer));
        pair.completed(number);
        let index = pair.index;
        if !pair.works {
            pair.works = true;
            if let Some(generation) =
                self.rdma_link(slot).filter(|l| l.offers).map(|l| l.generation)
            {
                self.rdma_decided(slot, generation, index, true, cx);
            }
        }
        loop {
            let chain = self.rdma.pair(id).and_then(Pair::next_ended);
            let Some(chain) = chain else { break };
            let Some(job) = chain.job else { continue };
            let Some(ended) = self.rdma_link(slot).and_then(|link| link.chain_ended(job)) else {
                continue;
            };
            let end = match ended.flush.map(Device::flush_writes) {
                _ if ended.stopped => WiredEnd::Stopped,
                Some(Err(error)) => WiredEnd::Failed(unseen(&error)),
                Some(Ok(())) | None => WiredEnd::Done { notified: ended.notified },
            };
            self.with_core(slot, cx, |core, env| core.wired_ended(ended.key, end, env));
        }
        self.mark(slot);
    }

    #[cold]
    pub(super) fn on_work_error(&mut self, completion: &Completion, cx: &mut Cx<'_>) {
        let (id, receive, number) = WorkId::split(completion.id);
        let status = completion.status;
        let Some((slot, pair)) = self.rdma.entry(id) else { return };
        let (index, rail) = (pair.index, pair.rail);
        let chain = pair.chain_of(number).filter(|_| !receive);
        let work = chain.and_then(|chain| Some((chain.job?, chain.span)));
        let Some(link) = self.rdma_link(slot) else { return };
        if link.phase == Phase::Connecting && link.offers {
            let generation = link.generation;
            return self.rdma_decided(slot, generation, index, false, cx);
        }
        let blame = match (status, work) {
            (WorkStatus::RemoteAccess | WorkStatus::RemoteInvalid, Some((job, _))) => {
                Blame::Job(job, Refusal::Theirs)
            }
            (WorkStatus::LocalProtection, Some((job, span))) => {
                Blame::Job(job, Refusal::Ours { addr: link.address_of(job, span) })
            }
            // What the device has no better word for is its own doing, and no transfer's.
            (WorkStatus::NoAnswer | WorkStatus::Other(_), _) => Blame::Rail(rail),
            (WorkStatus::Flushed, _) => Blame::Unsaid,
            _ => Blame::Nobody,
        };
        let name = self.rdma.rails().get(rail).map(Rail::name).unwrap_or_default();
        self.rdma_fail(slot, &blame, &reason_of(status, &name), cx);
    }

    pub(super) fn on_rdma_message(&mut self, slot: usize, bytes: &[u8], cx: &mut Cx<'_>) {
        let Some((message, _)) = RdmaMessage::decode(bytes) else { return };
        let handled = self.with_core(slot, cx, |core, env| {
            core.heard(env.now);
            match message {
                RdmaMessage::Hello | RdmaMessage::Credits => Ok(()),
                RdmaMessage::AckRequest => {
                    core.acknowledge_now();
                    Ok(())
                }
                RdmaMessage::Ack(below) => core.on_ring_message(RingMessage::Ack(below), env),
                RdmaMessage::Notify { seq, ack, payload } => {
                    let payload = payload.to_vec();
                    core.on_ring_message(RingMessage::Notify { seq, ack, payload }, env)
                }
                RdmaMessage::Bound { payload } => {
                    core.on_bound(payload.to_vec(), env);
                    Ok(())
                }
            }
        });
        if let Some(Err(error)) = handled {
            self.rdma_protocol_error(slot, &error.to_string(), cx);
        }
    }

    pub(super) fn rdma_protocol_error(&mut self, slot: usize, reason: &str, cx: &mut Cx<'_>) {
        if let Some(session) = self.rdma_link(slot).map(|link| link.session) {
            self.close_link(session, &format!("protocol error over RDMA: {reason}"), cx);
        }
    }
}
