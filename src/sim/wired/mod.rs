//! Queue pairs between engines, as the core sees them: what [`crate::engine::rdma`] does on a lane, with one queue pair a session
//! and a device that is the world's. The rules are the same: when one fails, both sides destroy theirs and say so, and only
//! then is anything done again.

mod failure;
mod work;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::coverage::Event as Input;
use super::node::{Node, Outside};
use crate::plan::{Operation, PlanInner};
use crate::session::RailPairs;
use crate::wire::Access;
use crate::wire::frame::{FrameKind, Header};
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
                            wire.failures = 0;
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
}
