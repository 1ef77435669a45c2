//! Queue pairs are offered, answered, tried, and found to work or not.

use corelane_runtime::Cx;
use smallvec::SmallVec;

use super::RAIL_PAUSE;
use crate::engine::lane::LaneDriver;
use crate::session::{LinkId, RailPairs};
use crate::sys;
use crate::transport::rdma::{Candidate, PairId, Phase, Rail, nearest};
use crate::verbs::Gid;
use crate::wire::frame::{FrameKind, Header};
use crate::wire::rdma::{QueuePairFrame, RdmaFrame, RdmaMessage, Verdict};

impl LaneDriver {
    /// Makes queue pairs and offers them.
    pub(super) fn rdma_offer(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Some(link) = self.peers.get_mut(slot).and_then(|peer| peer.rdma.as_deref_mut()) else {
            return;
        };
        link.generation = link.generation.wrapping_add(1);
        link.phase = Phase::Connecting;
        let (generation, suspects) = (link.generation, link.suspects);
        let rails = self.rdma.rails().clone();
        let usable = |rail: &usize| rails.get(*rail).is_some_and(Rail::is_usable);
        let all: SmallVec<[usize; 8]> = (0..rails.all().len()).filter(usable).collect();
        let trusted: SmallVec<[usize; 8]> =
            all.iter().copied().filter(|rail| suspects >> rail & 1 == 0).collect();
        let chosen = if trusted.is_empty() { all } else { trusted };
        let mut wanted: SmallVec<[usize; 8]> = SmallVec::new();
        // One for what is small on the first rail, then those for bulk.
        wanted.extend(chosen.first().copied());
        for rail in chosen {
            wanted.extend(std::iter::repeat_n(rail, self.engine.config.rdma.bulk_queue_pairs));
        }
        wanted.truncate(crate::wire::rdma::MAX_QUEUE_PAIRS);
        let mut made: SmallVec<[(u8, PairId); 8]> = SmallVec::new();
        let mut failure = String::from("no device is usable");
        for rail in wanted {
            let index = made.len() as u8;
            match self.rdma.add_pair(rail, slot, index, random_psn()) {
                Ok(id) => made.push((index, id)),
                Err(error) => {
                    let name = rails.get(rail).map(Rail::name).unwrap_or_default();
                    failure = format!("a queue pair on {name}: {error}");
                }
            }
        }
        if made.is_empty() {
            self.rdma_tell(slot, RdmaFrame::None.encode());
            return self.rdma_resolve(slot, Err(failure), cx);
        }
        let count = made.len() as u8;
        for (index, id) in &made {
            let Some(pair) = self.rdma.pair(*id) else { continue };
            let Some(rail) = rails.get(pair.rail) else { continue };
            let frame = pair.describe(rail, blank(Verdict::Offer, generation, *index, count));
            self.rdma_tell(slot, frame.encode());
        }
        if let Some(link) = self.rdma_link(slot) {
            link.undecided = made.iter().fold(0, |mask, (index, _)| mask | 1 << index);
            link.pairs = made.into_iter().collect();
        }
    }

    /// A frame about queue pairs has arrived.
    pub(in crate::engine) fn on_rdma_frame(
        &mut self,
        slot: usize,
        session: LinkId,
        header: &Header,
        cx: &mut Cx<'_>,
    ) -> Result<(), String> {
        if self.rdma_link(slot).is_none() && !self.rdma_follow(slot, session, header, cx)? {
            return Ok(());
        }
        let Some(link) = self.rdma_link(slot) else { return Ok(()) };
        if link.session != session {
            return Err("RDMA on a stream for bulk".into());
        }
        let offers = link.offers;
        let unknown = || "an RDMA frame that no engine sends".to_owned();
        if header.kind == FrameKind::QueuePair {
            let frame = QueuePairFrame::decode(header).ok_or_else(unknown)?;
            match frame.verdict {
                Verdict::Offer if !offers => return self.on_rdma_offer(slot, &frame, cx),
                Verdict::Answer if offers => self.on_rdma_answer(slot, &frame, cx),
                Verdict::Refused if offers => {
                    self.rdma_decided(slot, frame.generation, frame.index, false, cx);
                }
                _ => return Err("RDMA frames of the wrong side".into()),
            }
            return Ok(());
        }
        match RdmaFrame::decode(header).ok_or_else(unknown)? {
            RdmaFrame::Up { generation, working } if !offers => {
                self.on_rdma_up(slot, generation, working, cx);
            }
            RdmaFrame::Up { .. } => return Err("RDMA frames of the wrong side".into()),
            RdmaFrame::Down { generation, expects } => {
                return self.on_rdma_down(slot, generation, expects, cx);
            }
            // Who has something up tells first what is gone with it.
            RdmaFrame::None if self.rdma_owes_down(slot) => {
                return Err("RDMA is given up without a word of what was lost".into());
            }
            RdmaFrame::None => match self.rdma_link(slot).map(|link| (link.phase, link.offers)) {
                None | Some((Phase::Off, _)) => {}
                Some((_, offers)) => {
                    self.rdma_destroy(slot, cx);
                    if offers {
                        // It has given up, and may be answering what was offered meanwhile.
                        self.rdma_tell(slot, RdmaFrame::None.encode());
                    }
                    let reason = "the peer has no usable device, or has given up";
                    self.rdma_resolve(slot, Err(reason.into()), cx);
                }
            },
        }
        Ok(())
    }

    /// Whether the peer must say that its queue pairs are gone before it may say anything else. One that offers and has not gone up
    /// owes nothing: its end was never used.
    fn rdma_owes_down(&mut self, slot: usize) -> bool {
        self.rdma_link(slot).is_some_and(|link| match link.phase {
            Phase::Up => true,
            Phase::Down => link.offers,
            Phase::Off | Phase::Connecting => false,
        })
    }

    /// The peer offers a queue pair: one is made for it.
    pub(super) fn on_rdma_offer(
        &mut self,
        slot: usize,
        offer: &QueuePairFrame,
        cx: &mut Cx<'_>,
    ) -> Result<(), String> {
        let Some(link) = self.rdma_link(slot) else { return Ok(()) };
        let again = link.generation == offer.generation && link.pair_at(offer.index).is_some();
        if again || matches!(link.phase, Phase::Up | Phase::Down) {
            return Err("a queue pair is offered that there is already".into());
        }
        let was_off = link.phase == Phase::Off;
        let is_late = was_off && offer.generation == link.generation;
        if offer.generation != link.generation {
            // The first of a new generation. The one before has gone down on both sides, or never came up.
            link.generation = offer.generation;
            link.phase = Phase::Connecting;
            if was_off {
                // It is tried anew, after a pause: as on the other side, what was before does not count any more.
                link.failures = 0;
            }
            self.rdma_destroy(slot, cx);
            if was_off {
                // Else one is set: a peer that offers anew and anew does not put it off.
                let deadline = cx.now() + self.rdma_patience(false);
                self.rdma_set_deadline(slot, deadline, cx);
            }
        }
        let accepted = if is_late {
            Err("this side has waited long enough for the rest of them".into())
        } else {
            self.rdma_accept(slot, offer)
        };
        let answer = match accepted {
            Ok(answer) => answer,
            Err(reason) => {
                let peer = self.peers.get(slot).map(|peer| peer.core.peer.name.clone());
                tracing::warn!(
                    peer = peer.as_deref(),
                    reason,
                    "a queue pair of the peer is refused"
                );
                blank(Verdict::Refused, offer.generation, offer.index, offer.count)
            }
        };
        self.rdma_tell(slot, answer.encode());
        Ok(())
    }

    pub(super) fn rdma_accept(
        &mut self,
        slot: usize,
        offer: &QueuePairFrame,
    ) -> Result<QueuePairFrame, String> {
        let rails = self.rdma.rails().clone();
        let rail_index = self.nearest_rail(slot, offer).ok_or("no device is usable")?;
        let rail = rails.get(rail_index).ok_or("no device is usable")?;
        let told = |error: std::io::Error| format!("{}: {error}", rail.name());
        let id = self.rdma.add_pair(rail_index, slot, offer.index, random_psn()).map_err(told)?;
        let config = self.engine.config.rdma.clone();
        let Some(pair) = self.rdma.pair(id) else { return Err("it is gone".into()) };
        if let Err(error) = pair.connect(rail, &config, offer) {
            drop(self.rdma.take_pair(id));
            return Err(told(error));
        }
        let answer =
            pair.describe(rail, blank(Verdict::Answer, offer.generation, offer.index, offer.count));
        if let Some(link) = self.rdma_link(slot) {
            link.pairs.push((offer.index, id));
        }
        Ok(answer)
    }

    /// Which of our rails is best for a queue pair of the peer.
    fn nearest_rail(&mut self, slot: usize, offer: &QueuePairFrame) -> Option<usize> {
        let rails = self.rdma.rails().clone();
        let ids: SmallVec<[PairId; 4]> =
            self.rdma_link(slot)?.pairs.iter().map(|(_, id)| *id).collect();
        let mut made: SmallVec<[(usize, usize); 8]> = SmallVec::new();
        for id in ids {
            let both = self.rdma.pair(id).map(|pair| (pair.rail, pair.peer_rail));
            made.extend(both.filter(|both| !made.contains(both)));
        }
        let theirs = usize::from(offer.rail);
        let usable = rails.all().iter().enumerate();
        let usable = usable.filter(|(_, rail)| rail.is_usable() && rail.ethernet == offer.ethernet);
        let candidates = usable.map(|(index, rail)| {
            let others = made.iter().filter(|(own, peer)| *own == index && *peer != theirs);
            Candidate { rail: index, address: rail.address(), others: others.count() }
        });
        nearest(candidates, rails.all().len(), Gid(offer.gid), theirs)
    }

    /// The peer has connected its end: ours is, and HELLO goes over it.
    pub(super) fn on_rdma_answer(&mut self, slot: usize, answer: &QueuePairFrame, cx: &mut Cx<'_>) {
        let Some(link) = self.rdma_link(slot) else { return };
        if link.generation != answer.generation || link.phase != Phase::Connecting {
            return;
        }
        let Some(id) = link.pair_at(answer.index) else { return };
        let config = self.engine.config.rdma.clone();
        let rails = self.rdma.rails().clone();
        let connected = self.rdma.with_list(id, |pair, list| {
            let rail = rails
                .get(pair.rail)
                .ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENODEV))?;
            pair.connect(rail, &config, answer)?;
            pair.send(list, &RdmaMessage::Hello)
        });
        if !matches!(connected, Some(Ok(()))) {
            self.rdma_decided(slot, answer.generation, answer.index, false, cx);
        }
    }

    /// One of the queue pairs that were offered works, or does not.
    pub(super) fn rdma_decided(
        &mut self,
        slot: usize,
        generation: u32,
        index: u8,
        works: bool,
        cx: &mut Cx<'_>,
    ) {
        let Some(link) = self.rdma_link(slot) else { return };
        if link.generation != generation || link.phase != Phase::Connecting {
            return;
        }
        link.undecided &= !(1 << index);
        if !works && let Some(id) = link.pair_at(index) {
            link.pairs.retain(|(known, _)| *known != index);
            if let Some(pair) = self.rdma.take_pair(id)
                && let Some(link) = self.rdma_link(slot)
            {
                link.suspects |= 1 << pair.rail;
            }
        }
        self.rdma_conclude(slot, cx);
    }

    /// All that were offered are decided on.
    pub(super) fn rdma_conclude(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Some(link) = self.rdma_link(slot) else { return };
        if link.undecided != 0 || link.phase != Phase::Connecting {
            return;
        }
        let (generation, working) = (link.generation, link.mask());
        if working == 0 {
            self.rdma_tell(slot, RdmaFrame::None.encode());
            let reason = "no packets go to the peer's device and back".to_owned();
            return self.rdma_resolve(slot, Err(reason), cx);
        }
        self.rdma_tell(slot, RdmaFrame::Up { generation, working }.encode());
        self.rdma_up(slot, cx);
    }

    /// The peer says which queue pairs work.
    pub(super) fn on_rdma_up(
        &mut self,
        slot: usize,
        generation: u32,
        working: u64,
        cx: &mut Cx<'_>,
    ) {
        let Some(link) = self.rdma_link(slot) else { return };
        if link.generation != generation || link.phase != Phase::Connecting {
            return;
        }
        let broken: SmallVec<[PairId; 4]> = link
            .pairs
            .iter()
            .filter(|(index, _)| working >> (index % 64) & 1 == 0)
            .map(|(_, id)| *id)
            .collect();
        link.pairs.retain(|(index, _)| working >> (*index % 64) & 1 != 0);
        for id in broken {
            drop(self.rdma.take_pair(id));
        }
        self.rdma_up(slot, cx);
    }

    pub(super) fn rdma_up(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let now = cx.now();
        let Some(link) = self.rdma_link(slot) else { return };
        link.phase = Phase::Up;
        link.up_since = Some(now);
        link.pairs.sort_unstable_by_key(|(index, _)| *index);
        let ids: SmallVec<[PairId; 4]> = link.pairs.iter().map(|(_, id)| *id).collect();
        let mut rails = RailPairs::new();
        for id in ids {
            if let Some(pair) = self.rdma.pair(id) {
                let both = (pair.rail, pair.peer_rail);
                if !rails.contains(&both) {
                    rails.push(both);
                }
            }
        }
        if rails.is_empty() {
            return self.rdma_resolve(slot, Err("no queue pair works".into()), cx);
        }
        self.rdma_resolve(slot, Ok(rails), cx);
        self.rdma_resume(slot, cx);
    }

    /// Where notifications come over queue pairs, trying the socket every turn would be a waste of 0.3 us.
    fn rdma_calm_session(&mut self, slot: usize, calm: bool, cx: &mut Cx<'_>) {
        let Some(session) = self.rdma_link(slot).map(|link| link.session) else { return };
        if let Some(link) = self.link(session) {
            cx.set_calm(link.fd_id(), calm);
        }
    }

    pub(super) fn rdma_resolve(
        &mut self,
        slot: usize,
        outcome: Result<RailPairs, String>,
        cx: &mut Cx<'_>,
    ) {
        self.log_rdma(slot, &outcome);
        let failed = outcome.is_err();
        self.rdma_clear_deadline(slot, cx);
        if let Some(link) = self.rdma_link(slot).filter(|_| failed) {
            link.phase = Phase::Off;
            if link.offers {
                let again = cx.now() + RAIL_PAUSE;
                self.rdma_set_deadline(slot, again, cx);
            }
        }
        self.rdma_calm_session(slot, !failed, cx);
        self.rdma_set_ring(slot, None);
        self.with_core(slot, cx, |core, env| core.rdma_resolved(outcome, env));
        if failed {
            self.rdma_give_back_jobs(slot, cx);
        }
        self.mark(slot);
    }
}

fn blank(verdict: Verdict, generation: u32, index: u8, count: u8) -> QueuePairFrame {
    QueuePairFrame {
        verdict,
        generation,
        index,
        count,
        rail: 0,
        receives: 1,
        number: 0,
        psn: 0,
        mtu: 1,
        ethernet: false,
        gid: [0; 16],
        lid: 0,
        max_rd_atomic: 0,
        max_dest_rd_atomic: 0,
        max_msg_sz: 4096,
    }
}

/// A first packet number that stray packets of an earlier connection do not have. Without random bytes, any will do.
fn random_psn() -> u32 {
    u32::from_le_bytes(sys::random().unwrap_or([7; 4])) & 0xff_ffff
}
