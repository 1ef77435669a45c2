//! Queue pairs between engines, as the core sees them: what [`crate::engine::rdma`] does on a lane, with one queue pair a session
//! and a device that is the world's. The rules are the same: when one fails, both sides destroy theirs and say so, and only
//! then is anything done again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::coverage::Event as Input;
use super::links::Phase as LinkPhase;
use super::node::{Node, Outside};
use super::ring;
use crate::error::Error;
use crate::plan::{Operation, PlanInner};
use crate::session::{RailPairs, RingState, Wired, WiredEnd};
use crate::wire::Access;
use crate::wire::frame::{FrameKind, Header};
use crate::wire::hello::LinkKind;
use crate::wire::rdma::{MAX_MESSAGE_PAYLOAD, QueuePairFrame, RdmaFrame, Verdict};

const MAX_FAILURES: u32 = 5;
const MAX_TRIES: u8 = 3;
const PAUSE: Duration = Duration::from_secs(30);
/// Messages under way.
const CREDITS: usize = 8;

/// Kinds of messages besides those of a ring.
const BOUND: u8 = 3;
const ACK_REQUEST: u8 = 4;

/// Whether a device reaches all that a plan touches. One plan in four has memory of which it knows nothing, and goes as frames beside
/// what goes by queue pairs.
pub(crate) fn is_wired(plan: &PlanInner) -> bool {
    plan.bytes % 4 != 3
}

/// A range here, one there, and the key that opens it.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    /// First byte here.
    pub local: u64,
    /// First byte there.
    pub remote: u64,
    /// Bytes.
    pub len: usize,
    /// Key of the region there.
    pub key: u32,
}

/// What is posted to a queue pair; all that is posted is carried out in order.
#[derive(Debug, Clone)]
pub enum Work {
    /// From there to here.
    Read(Vec<Range>),
    /// From here to there.
    Write(Vec<Range>),
    /// For the engine there.
    Send(Vec<u8>),
}

/// What a queue pair has to say.
#[derive(Debug, Clone)]
pub enum Completion {
    /// The work of this number is done.
    Done(u64),
    /// The other engine has sent this.
    Received(Vec<u8>),
    /// The queue pair is in error; the number is that of a work whose access was refused.
    Failed(Option<u64>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Off,
    Connecting,
    Up,
    Down,
}

#[expect(clippy::struct_excessive_bools, reason = "independent facts, not states")]
struct Job {
    plan: Arc<PlanInner>,
    notification: Option<Arc<[u8]>>,
    notified: bool,
    outstanding: u32,
    stopped: bool,
    refused: bool,
    begun: bool,
    tries: u8,
}

impl Job {
    fn new(plan: Arc<PlanInner>, notification: Option<Arc<[u8]>>) -> Self {
        let notification = notification.filter(|payload| {
            payload.len() <= MAX_MESSAGE_PAYLOAD && plan.operation == Operation::Write
        });
        Self {
            plan,
            notification,
            notified: false,
            outstanding: 0,
            stopped: false,
            refused: false,
            begun: false,
            tries: 0,
        }
    }
}

/// The queue pair of a session.
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not states")]
pub(super) struct Wire {
    pub(super) link: u64,
    offers: bool,
    generation: u32,
    phase: Phase,
    exists: bool,
    jobs: BTreeMap<u64, Job>,
    parked: Vec<u64>,
    /// Works without a completion, and the job that each belongs to.
    works: BTreeMap<u64, Option<u64>>,
    next_work: u64,
    failures: u32,
    pub(super) deadline: Option<Instant>,
    asked: bool,
    /// It was told that the other end is gone, and does not care.
    ignored: bool,
}

impl Wire {
    fn sending(&self) -> usize {
        self.works.values().filter(|job| job.is_none()).count()
    }
}

fn frame(verdict: Verdict, generation: u32) -> Header {
    QueuePairFrame {
        verdict,
        generation,
        index: 0,
        count: 1,
        rail: 0,
        receives: CREDITS as u8,
        number: 1,
        psn: 1,
        mtu: 5,
        ethernet: true,
        gid: [0; 16],
        lid: 0,
        max_rd_atomic: 1,
        max_dest_rd_atomic: 1,
        max_msg_sz: 1 << 30,
    }
    .encode()
}

/// The ranges of a plan.
fn ranges(plan: &PlanInner) -> Vec<Range> {
    let rdma = &plan.rdma;
    let mut ranges = Vec::new();
    for (index, run) in rdma.runs.iter().enumerate() {
        let end = rdma.runs.get(index + 1).map_or(rdma.pieces.len(), |next| next.pieces as usize);
        let keys = rdma.keys.get(run.region as usize);
        let key = keys.and_then(|keys| keys.first().copied()).unwrap_or(0);
        let mut remote = run.addr;
        for piece in rdma.pieces.get(run.pieces as usize..end).unwrap_or(&[]) {
            ranges.push(Range { local: piece.addr, remote, len: piece.len as usize, key });
            remote += u64::from(piece.len);
        }
    }
    ranges
}

impl Node {
    fn wire(&mut self, slot: usize) -> Option<&mut Wire> {
        self.peers.get_mut(slot)?.wire.as_mut()
    }

    fn wire_tell(&mut self, slot: usize, header: Header) {
        self.peers[slot].core.tell(header);
        self.mark(slot);
    }

    /// Whether a device of a peer may touch this; the key says of which region.
    pub fn opens(&self, key: u32, addr: u64, len: u64, needs: Access) -> bool {
        self.keys.get(&key).is_some_and(|(base, size, access)| {
            addr >= *base && addr + len <= base + size && access.allows(needs)
        })
    }

    // --- agreeing on queue pairs

    /// A session is up: it is found out whether there is a way.
    pub(super) fn wire_attach(&mut self, slot: usize, link: u64, ours: bool) {
        let deadline = Some(self.now + self.wire_patience(ours));
        let peer = &mut self.peers[slot];
        peer.wire = Some(Wire {
            link,
            offers: ours,
            generation: 0,
            phase: Phase::Connecting,
            exists: false,
            jobs: BTreeMap::new(),
            parked: Vec::new(),
            works: BTreeMap::new(),
            next_work: 1,
            failures: 0,
            deadline,
            asked: false,
            ignored: false,
        });
        if ours {
            self.wire_offer(slot);
        }
    }

    /// How long the peer may take for its part of the agreement.
    fn wire_patience(&self, offers: bool) -> Duration {
        self.config.connect_timeout * if offers { 1 } else { 2 }
    }

    fn wire_offer(&mut self, slot: usize) {
        let Some(wire) = self.wire(slot) else { return };
        wire.generation += 1;
        wire.phase = Phase::Connecting;
        let generation = wire.generation;
        self.wire_tell(slot, frame(Verdict::Offer, generation));
    }

    pub(super) fn on_wire_frame(
        &mut self,
        link: u64,
        slot: usize,
        header: &Header,
        out: &mut dyn Outside,
    ) -> Result<(), String> {
        let Some(wire) = self.wire(slot) else { return Ok(()) };
        if wire.link != link {
            return Err("RDMA on a stream for bulk".into());
        }
        let (offers, phase) = (wire.offers, wire.phase);
        if header.kind == FrameKind::QueuePair {
            let frame = QueuePairFrame::decode(header).ok_or("no QUEUE_PAIR")?;
            let generation = frame.generation;
            match frame.verdict {
                Verdict::Offer if !offers => {
                    if matches!(phase, Phase::Up | Phase::Down) {
                        return Err("a queue pair is offered that there is already".into());
                    }
                    if phase == Phase::Off {
                        let deadline = self.now + self.wire_patience(false);
                        if let Some(wire) = self.wire(slot) {
                            wire.deadline = Some(deadline);
                        }
                    }
                    self.wire_destroy(slot, out);
                    self.wire_make(slot, generation, out);
                    self.wire_tell(slot, self::frame(Verdict::Answer, generation));
                }
                Verdict::Answer if offers => {
                    if phase == Phase::Connecting && wire.generation == generation {
                        self.wire_make(slot, generation, out);
                        let up = RdmaFrame::Up { generation, working: 1 };
                        self.wire_tell(slot, up.encode());
                        self.wire_up(slot);
                    }
                }
                _ => return Err("RDMA frames of the wrong side".into()),
            }
            return Ok(());
        }
        match RdmaFrame::decode(header).ok_or("no RDMA")? {
            RdmaFrame::Up { generation, .. } => {
                if phase == Phase::Connecting && wire.generation == generation && !offers {
                    self.wire_up(slot);
                }
            }
            RdmaFrame::Down { generation, expects } => {
                return self.on_wire_down(slot, generation, expects, out);
            }
            RdmaFrame::None if phase == Phase::Up || phase == Phase::Down && offers => {
                return Err("RDMA is given up without a word of what was lost".into());
            }
            RdmaFrame::None if phase == Phase::Off => {}
            RdmaFrame::None => {
                self.wire_destroy(slot, out);
                if offers {
                    self.wire_tell(slot, RdmaFrame::None.encode());
                }
                self.wire_resolve(slot, false);
            }
        }
        Ok(())
    }

    fn wire_make(&mut self, slot: usize, generation: u32, out: &mut dyn Outside) {
        let Some(wire) = self.wire(slot) else { return };
        wire.generation = generation;
        wire.phase = Phase::Connecting;
        wire.exists = true;
        out.pair(wire.link, Some(generation));
    }

    fn wire_up(&mut self, slot: usize) {
        let Some(wire) = self.wire(slot) else { return };
        wire.phase = Phase::Up;
        wire.deadline = None;
        self.wire_resolve(slot, true);
    }

    fn wire_resolve(&mut self, slot: usize, up: bool) {
        if !up {
            let again = self.now + PAUSE;
            if let Some(wire) = self.wire(slot) {
                wire.phase = Phase::Off;
                wire.deadline = wire.offers.then_some(again);
            }
            self.peers[slot].core.set_ring(None);
            self.wire_give_back(slot);
        }
        let outcome = if up { Ok(RailPairs::new()) } else { Err("it failed".to_owned()) };
        self.with_core(slot, Input::RdmaResolved, |core, env| core.rdma_resolved(outcome, env));
    }

    pub(super) fn wire_time(&mut self, slot: usize, out: &mut dyn Outside) {
        let now = self.now;
        let patience = self.wire_patience(true);
        let Some(wire) = self.wire(slot) else { return };
        if wire.deadline.is_none_or(|at| at > now) {
            return;
        }
        wire.deadline = None;
        match wire.phase {
            Phase::Connecting => {
                let offers = wire.offers;
                self.wire_destroy(slot, out);
                if offers {
                    self.wire_tell(slot, RdmaFrame::None.encode());
                }
                self.wire_resolve(slot, false);
            }
            Phase::Off if wire.offers => {
                wire.failures = 0;
                wire.deadline = Some(now + patience);
                self.wire_offer(slot);
            }
            Phase::Down => {
                let link = wire.link;
                self.close_link(link, "it has not said that its queue pairs are gone", out);
            }
            Phase::Off | Phase::Up => {}
        }
    }

    // --- work

    /// Posts what the core has.
    pub(super) fn flush_wire(&mut self, slot: usize, out: &mut dyn Outside) {
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

    fn wire_issue(&mut self, slot: usize, key: u64, out: &mut dyn Outside) {
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

    fn wire_post(&mut self, slot: usize, job: Option<u64>, work: Work, out: &mut dyn Outside) {
        let Some(wire) = self.wire(slot) else { return };
        let number = wire.next_work;
        wire.next_work += 1;
        wire.works.insert(number, job);
        out.post(wire.link, number, work);
    }

    fn flush_messages(&mut self, slot: usize, out: &mut dyn Outside) {
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
    pub(super) fn stop_wired(&mut self, slot: usize, key: u64, stuck: bool, out: &mut dyn Outside) {
        let Some(wire) = self.wire(slot) else { return };
        wire.parked.retain(|parked| *parked != key);
        let Some(job) = wire.jobs.get_mut(&key) else { return };
        job.stopped = true;
        if job.outstanding == 0 {
            wire.jobs.remove(&key);
            self.wire_ended(slot, key, WiredEnd::Stopped);
        } else if stuck && wire.phase == Phase::Up {
            self.wire_fail(slot, None, out);
        }
    }

    fn wire_ended(&mut self, slot: usize, key: u64, end: WiredEnd) {
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

    fn wire_completed(&mut self, slot: usize, completion: Completion, out: &mut dyn Outside) {
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

    fn wire_received(&mut self, slot: usize, bytes: &[u8], out: &mut dyn Outside) {
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

    // --- failure

    fn wire_fail(&mut self, slot: usize, refused: Option<u64>, out: &mut dyn Outside) {
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
        let deadline = self.now + self.wire_patience(true);
        if let Some(wire) = self.wire(slot).filter(|_| !mutated!(DownWithoutEnd)) {
            wire.deadline = Some(deadline);
        }
    }

    fn wire_take_down(&mut self, slot: usize, culprit: Option<u64>, out: &mut dyn Outside) {
        self.wire_destroy(slot, out);
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let gone = peer.core.peer.gone("RDMA has failed");
        let Some(wire) = peer.wire.as_mut() else { return };
        let mut over = Vec::new();
        for (key, job) in &mut wire.jobs {
            job.tries += u8::from(culprit.is_none());
            if job.stopped {
                over.push((*key, WiredEnd::Stopped));
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
    fn wire_destroy(&mut self, slot: usize, out: &mut dyn Outside) {
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

    fn on_wire_down(
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
    fn wire_end_refused(&mut self, slot: usize) {
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
    fn wire_give_back(&mut self, slot: usize) {
        self.wire_end_refused(slot);
        self.wire_end_jobs(slot, "RDMA was given up amid the transfer", |job| job.notified);
    }

    fn wire_end_jobs(&mut self, slot: usize, reason: &str, is_lost: impl Fn(&Job) -> bool) {
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
    pub(super) fn wire_detach(&mut self, slot: usize, link: u64, out: &mut dyn Outside) {
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
    pub(super) fn destroy_wires(&mut self, out: &mut dyn Outside) {
        let slots: Vec<usize> = self.peers.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.wire_destroy(slot, out);
            self.peers[slot].wire = None;
        }
    }
}
