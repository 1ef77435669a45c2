//! Peers that are reached by RDMA: queue pairs are agreed on over the session's link, completions are polled, transfers and
//! notifications are posted.
//!
//! The side that opened the session's link offers. It makes its queue pairs and sends a `QUEUE_PAIR` for each; the other makes
//! and connects one for each, and answers; then the first connects its own and sends a `HELLO` on each, whose completion shows
//! that packets go there and back. RDMA up says which of them work, and from then on transfers use them.
//!
//! When one fails, all of the connection are destroyed, and both sides tell each other so by RDMA down: only then no packet of
//! the old ones can touch memory any more, and what was lost is begun again on new ones. Notifications that the peer does not
//! have are sent again.

use std::time::{Duration, Instant};

use corelane_runtime::{Cx, Interest, Lane, Start};
use smallvec::SmallVec;

use super::lane::{LaneDriver, Message, RDMA_CHANNEL, RDMA_EVENTS, RDMA_TIMER};
use crate::error::Error;
use crate::session::{LinkId, RailPairs, RingState, Wired, WiredEnd};
use crate::sys;
use crate::transport::local::Message as RingMessage;
use crate::transport::rdma::{EndedJob, Job, Link, Pair, PairId, Phase, Rail, WorkId};
use crate::verbs::{AsyncEvent, Completion, WorkStatus};
use crate::wire::frame::{FrameKind, Header};
use crate::wire::rdma::{MAX_MESSAGE_PAYLOAD, QueuePairFrame, RdmaFrame, RdmaMessage, Verdict};

/// How long a rail that has failed is left alone.
const RAIL_PAUSE: Duration = Duration::from_secs(30);
/// Failures within the pause, after which transfers go another way.
const MAX_FAILURES: u32 = 5;
/// How often a transfer is begun again before it counts as what breaks the connection.
const MAX_TRIES: u8 = 3;

/// What a failed queue pair means for others.
enum Blame {
    /// A transfer: only it fails.
    Job(usize, WorkStatus),
    /// The way, of this rail.
    Rail(usize),
    /// Nobody in particular.
    Nobody,
}

fn reason_of(status: WorkStatus, rail: &str) -> String {
    format!("RDMA over {rail} has failed: {status}")
}

impl LaneDriver {
    /// Watches the channels of this lane's completion queues, and on the first lane the devices' events.
    pub(super) fn rdma_start(&mut self, cx: &mut Cx<'_>) {
        use std::os::fd::AsRawFd;
        for (rail, channel) in self.rdma.channels() {
            let token = RDMA_CHANNEL | rail as u64;
            cx.add_fd(channel.fd().as_raw_fd(), token, Interest::READABLE, Start::Quiet);
        }
        if self.index == 0 {
            for (index, rail) in self.rdma.rails().all().iter().enumerate() {
                let token = RDMA_EVENTS | index as u64;
                let fd = rail.device.events().as_raw_fd();
                cx.add_fd(fd, token, Interest::READABLE, Start::Quiet);
            }
        }
    }

    /// A session is up whose peer may be reached by RDMA: finds out whether it is.
    /// False: it may not.
    pub(super) fn rdma_attach(&mut self, slot: usize, session: LinkId, cx: &mut Cx<'_>) -> bool {
        let theirs = self.peers.get(slot).map_or(0, |peer| peer.transports);
        if !self.rdma_expected(theirs) {
            return false;
        }
        let Some(peer) = self.peers.get_mut(slot) else { return false };
        let ours = peer.core.is_link_ours(session);
        let stripe = self.engine.config.rdma.stripe_bytes;
        peer.rdma = Some(Box::new(Link::new(session, ours, stripe)));
        peer.core.rdma_pending();
        let deadline = cx.now() + self.engine.config.connect_timeout;
        self.rdma_set_deadline(slot, deadline, cx);
        if ours {
            self.rdma_offer(slot, cx);
        }
        self.mark(slot);
        true
    }

    /// When to look at the link next, whatever happens.
    fn rdma_set_deadline(&mut self, slot: usize, at: Instant, cx: &mut Cx<'_>) {
        if let Some(link) = self.rdma_link(slot) {
            link.deadline = Some(at);
            cx.set_timer(at, RDMA_TIMER | slot as u64);
        }
    }

    /// The peer offers what this side has not asked for, since it has a better way or none; true: it may.
    fn rdma_follow(&mut self, slot: usize, session: LinkId, header: &Header) -> bool {
        let offered =
            QueuePairFrame::decode(header).is_some_and(|frame| frame.verdict == Verdict::Offer);
        let theirs = self.peers.get(slot).map_or(0, |peer| peer.transports);
        let expected = self.rdma_expected(theirs);
        let stripe = self.engine.config.rdma.stripe_bytes;
        let Some(peer) = self.peers.get_mut(slot).filter(|_| offered) else { return false };
        if !expected || peer.core.session_link() != Some(session) {
            self.rdma_tell(slot, RdmaFrame::None.encode());
            return false;
        }
        peer.rdma = Some(Box::new(Link::new(session, false, stripe)));
        true
    }

    fn rdma_link(&mut self, slot: usize) -> Option<&mut Link> {
        self.peers.get_mut(slot)?.rdma.as_deref_mut()
    }

    fn rdma_tell(&mut self, slot: usize, header: Header) {
        if let Some(peer) = self.peers.get_mut(slot) {
            peer.core.tell(header);
        }
        self.mark(slot);
    }

    // --- connecting

    /// Makes queue pairs and offers them.
    fn rdma_offer(&mut self, slot: usize, cx: &mut Cx<'_>) {
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
    pub(super) fn on_rdma_frame(
        &mut self,
        slot: usize,
        session: LinkId,
        header: &Header,
        cx: &mut Cx<'_>,
    ) -> Result<(), String> {
        if self.rdma_link(slot).is_none() && !self.rdma_follow(slot, session, header) {
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
            RdmaFrame::None => {
                self.rdma_destroy(slot, cx);
                self.rdma_resolve(slot, Err("the peer has no usable device".into()), cx);
            }
        }
        Ok(())
    }

    /// The peer offers a queue pair: one is made for it.
    fn on_rdma_offer(
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
        if offer.generation != link.generation {
            // The first of a new generation. The one before has gone down on both sides, or never came up.
            link.generation = offer.generation;
            link.phase = Phase::Connecting;
            self.rdma_destroy(slot, cx);
        }
        let answer = match self.rdma_accept(slot, offer) {
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

    fn rdma_accept(
        &mut self,
        slot: usize,
        offer: &QueuePairFrame,
    ) -> Result<QueuePairFrame, String> {
        let rails = self.rdma.rails().clone();
        let rail_index = nearest_rail(&rails, offer).ok_or("no device is usable")?;
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

    /// The peer has connected its end: ours is, and HELLO goes over it.
    fn on_rdma_answer(&mut self, slot: usize, answer: &QueuePairFrame, cx: &mut Cx<'_>) {
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
    fn rdma_decided(
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
    fn rdma_conclude(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let now = cx.now();
        let Some(link) = self.rdma_link(slot) else { return };
        if link.undecided != 0 || link.phase != Phase::Connecting {
            return;
        }
        let (generation, working) = (link.generation, link.mask());
        if working == 0 {
            self.rdma_set_deadline(slot, now + RAIL_PAUSE, cx);
            self.rdma_tell(slot, RdmaFrame::None.encode());
            let reason = "no packets go to the peer's device and back".to_owned();
            return self.rdma_resolve(slot, Err(reason), cx);
        }
        self.rdma_tell(slot, RdmaFrame::Up { generation, working }.encode());
        self.rdma_up(slot, cx);
    }

    /// The peer says which queue pairs work.
    fn on_rdma_up(&mut self, slot: usize, generation: u32, working: u64, cx: &mut Cx<'_>) {
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

    fn rdma_up(&mut self, slot: usize, cx: &mut Cx<'_>) {
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
        self.rdma_resume(slot);
    }

    fn rdma_resolve(&mut self, slot: usize, outcome: Result<RailPairs, String>, cx: &mut Cx<'_>) {
        self.log_rdma(slot, &outcome);
        if let (Err(_), Some(link)) = (&outcome, self.rdma_link(slot)) {
            link.phase = Phase::Off;
        }
        let failed = outcome.is_err();
        self.rdma_set_ring(slot, None);
        self.with_core(slot, cx, |core, env| core.rdma_resolved(outcome, env));
        if failed {
            self.rdma_give_back_jobs(slot, cx);
        }
        self.mark(slot);
    }

    /// The line that says how bytes will go to and from a peer.
    fn log_rdma(&self, slot: usize, outcome: &Result<RailPairs, String>) {
        let Some(peer) = self.peers.get(slot) else { return };
        let name = &*peer.core.peer.name;
        let core = self.engine.lane(self.index).ok().and_then(Lane::core);
        let core = core.map_or("unpinned".to_owned(), |core| core.to_string());
        match outcome {
            Ok(rails) => {
                let all = self.rdma.rails();
                let named = |(own, _): &(usize, usize)| all.get(*own).map(Rail::name);
                let nics: Vec<String> = rails.iter().filter_map(named).collect();
                let pairs = peer.rdma.as_ref().map_or(0, |link| link.pairs.len());
                let (nics, lane) = (nics.join(","), self.index);
                tracing::info!(
                    peer = name,
                    transport = "rdma",
                    nics,
                    queue_pairs = pairs,
                    lane,
                    core,
                    "connected"
                );
            }
            Err(reason) => {
                let transport = if peer.core.are_frames_allowed() { "tcp" } else { "none" };
                tracing::warn!(peer = name, transport, reason, "no RDMA");
            }
        }
    }

    /// A timer of a link: what was offered is decided on now, or it is time to try again.
    pub(super) fn rdma_timer(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let now = cx.now();
        // Another timer of this link, or of one that had its place before, may be early.
        let due = |link: &&mut Link| link.deadline.is_some_and(|at| at <= now);
        let Some(link) = self.rdma_link(slot).filter(due) else { return };
        link.deadline = None;
        match link.phase {
            Phase::Connecting if link.offers => {
                let late = std::mem::take(&mut link.undecided);
                let ids: SmallVec<[PairId; 4]> = link
                    .pairs
                    .iter()
                    .filter(|(index, _)| late >> (index % 64) & 1 != 0)
                    .map(|(_, id)| *id)
                    .collect();
                link.pairs.retain(|(index, _)| late >> (*index % 64) & 1 == 0);
                for id in ids {
                    drop(self.rdma.take_pair(id));
                }
                self.rdma_conclude(slot, cx);
            }
            Phase::Connecting => {
                self.rdma_destroy(slot, cx);
                self.rdma_resolve(slot, Err("the peer offers no queue pair".into()), cx);
            }
            Phase::Off if link.offers => {
                link.suspects = 0;
                link.failures = 0;
                let deadline = now + self.engine.config.connect_timeout;
                self.rdma_set_deadline(slot, deadline, cx);
                self.rdma_offer(slot, cx);
            }
            Phase::Off | Phase::Up | Phase::Down => {}
        }
    }

    // --- failing

    /// A queue pair has failed: all of the connection are destroyed, and the peer is told.
    fn rdma_fail(&mut self, slot: usize, blame: &Blame, reason: &str, cx: &mut Cx<'_>) {
        let now = cx.now();
        let Some(link) = self.rdma_link(slot) else { return };
        // The side that offered may use them before this one has heard that they work.
        let early = link.phase == Phase::Connecting && !link.offers && !link.pairs.is_empty();
        if link.phase != Phase::Up && !early {
            return;
        }
        if link.up_since.is_some_and(|since| now.saturating_duration_since(since) > RAIL_PAUSE) {
            link.failures = 0;
        }
        link.phase = Phase::Down;
        if let Blame::Rail(rail) = blame {
            link.suspects |= 1 << rail;
        }
        if !matches!(blame, Blame::Job(..)) {
            link.failures += 1;
        }
        let generation = link.generation;
        self.counters.rdma_failures.add(1);
        if let Some(peer) = self.peers.get(slot) {
            tracing::warn!(peer = &*peer.core.peer.name, reason, "RDMA is interrupted");
        }
        let culprit = match blame {
            Blame::Job(job, status) => Some((*job, *status)),
            Blame::Rail(_) | Blame::Nobody => None,
        };
        self.rdma_take_down(slot, culprit, reason, cx);
        let Some(expects) = self.peers.get(slot).map(|peer| peer.core.expects()) else { return };
        self.rdma_tell(slot, RdmaFrame::Down { generation, expects }.encode());
    }

    /// Destroys all queue pairs of a connection. Jobs that cannot be begun again end, the others wait.
    fn rdma_take_down(
        &mut self,
        slot: usize,
        culprit: Option<(usize, WorkStatus)>,
        reason: &str,
        cx: &mut Cx<'_>,
    ) {
        // The culprit's job has a place that may be given to another while messages are taken: it ends first.
        let key = culprit.and_then(|(job, status)| {
            let link = self.rdma_link(slot)?;
            link.jobs.get(job).map(|job| (job.key, status))
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
            let blamed = key.filter(|(key, _)| *key == job.key).map(|(_, status)| status);
            let error = match blamed {
                Some(WorkStatus::RemoteAccess | WorkStatus::RemoteInvalid) => {
                    Some(Error::Permission {
                        peer: name.clone(),
                        reason: "the peer's device refused the access: the region is not registered (any more), or \
                             not with this permission",
                    })
                }
                Some(_) => Some(Error::Permission {
                    peer: name.clone(),
                    reason: "this side's device refused the access to its own memory: is it mapped and writable?",
                }),
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
        self.rdma_end_stopped(slot, cx);
        for (ended, end) in over {
            self.with_core(slot, cx, |core, env| core.wired_ended(ended.key, end, env));
        }
        self.with_core(slot, cx, |core, _| core.rdma_pending());
        // Until it is known what the peer has, no notification is sent.
        let nothing = RingState { has_room: false, is_empty: false, longest: usize::MAX };
        self.rdma_set_ring(slot, Some(nothing));
    }

    /// Whether notifications go over queue pairs: a peer on this host has a ring that is nearer.
    fn has_rdma_messages(&self, slot: usize) -> bool {
        self.peers
            .get(slot)
            .is_some_and(|peer| !peer.local.as_ref().is_some_and(|local| local.is_up()))
    }

    fn rdma_set_ring(&mut self, slot: usize, ring: Option<RingState>) {
        if self.has_rdma_messages(slot)
            && let Some(peer) = self.peers.get_mut(slot)
        {
            peer.core.set_ring(ring);
        }
    }

    /// Jobs that were told to end, and that nothing holds any more.
    fn rdma_end_stopped(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Some(link) = self.rdma_link(slot) else { return };
        for ended in link.take_stopped() {
            self.with_core(slot, cx, |core, env| {
                core.wired_ended(ended.key, WiredEnd::Stopped, env);
            });
        }
    }

    /// Destroys the queue pairs of a connection; what has arrived by then is taken first.
    fn rdma_destroy(&mut self, slot: usize, cx: &mut Cx<'_>) {
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
        let batch = self.rdma.poll();
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
    fn on_rdma_down(
        &mut self,
        slot: usize,
        generation: u32,
        expects: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), String> {
        // What this side's own completions say of it comes first: they name the transfer that is to blame.
        self.poll_rdma(cx);
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
            Phase::Off | Phase::Connecting => return Ok(()),
        }
        let resync = self.with_core(slot, cx, |core, env| core.rdma_resync(expects, env));
        resync.unwrap_or(Ok(())).map_err(|error| error.to_string())?;
        let now = cx.now();
        let timeout = self.engine.config.connect_timeout;
        let Some(link) = self.rdma_link(slot) else { return Ok(()) };
        link.phase = Phase::Connecting;
        let (offers, failures) = (link.offers, link.failures);
        if !offers {
            self.rdma_set_deadline(slot, now + timeout + timeout, cx);
            return Ok(());
        }
        if failures >= MAX_FAILURES {
            self.rdma_set_deadline(slot, now + RAIL_PAUSE, cx);
            self.rdma_tell(slot, RdmaFrame::None.encode());
            self.rdma_resolve(slot, Err("it has failed again and again".into()), cx);
            return Ok(());
        }
        self.rdma_set_deadline(slot, now + timeout, cx);
        self.rdma_offer(slot, cx);
        Ok(())
    }

    /// Jobs that waited for queue pairs which will not come take another way.
    fn rdma_give_back_jobs(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Some(link) = self.rdma_link(slot) else { return };
        link.parked.clear();
        let slots: SmallVec<[usize; 16]> = link.jobs.iter().map(|(job, _)| job).collect();
        for job in slots {
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
    pub(super) fn rdma_detach(&mut self, slot: usize, reason: &str, cx: &mut Cx<'_>) {
        if self.rdma_link(slot).is_none() {
            return;
        }
        self.rdma_destroy(slot, cx);
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let Some(mut link) = peer.rdma.take() else { return };
        let begun: SmallVec<[(usize, bool); 16]> =
            link.jobs.iter().map(|(slot, job)| (slot, job.has_begun())).collect();
        for (job, begun) in begun {
            let Some(ended) = link.end(job) else { continue };
            self.with_core(slot, cx, |core, env| {
                if begun {
                    let error = core.peer.gone(reason);
                    core.wired_ended(ended.key, WiredEnd::Failed(error), env);
                } else {
                    core.wired_back(ended.key, env);
                }
            });
        }
        self.rdma_set_ring(slot, None);
    }

    // --- transfers

    /// Posts what the core has for the device, and sends its messages; true: something was.
    pub(super) fn rdma_flush(&mut self, slot: usize, cx: &mut Cx<'_>) -> bool {
        let Some(peer) = self.peers.get_mut(slot) else { return false };
        let Some(link) = peer.rdma.as_deref_mut().filter(|link| link.phase == Phase::Up) else {
            return false;
        };
        let mut posted = false;
        while let Some(Wired { key, plan, notification }) = peer.core.next_wired() {
            let job = link.add(Job::new(key, plan, notification));
            self.rdma.assign(link, job);
            posted = true;
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
    fn rdma_flush_messages(&mut self, slot: usize, cx: &mut Cx<'_>) -> bool {
        let now = cx.now();
        let has_messages = self.has_rdma_messages(slot);
        let Self { peers, regions, engine, counters, rdma, .. } = self;
        let Some(peer) = peers.get_mut(slot) else { return false };
        let Some(link) = peer.rdma.as_deref_mut().filter(|link| link.phase == Phase::Up) else {
            return false;
        };
        let Some(first) = link.first() else { return false };
        let mut env = super::lane::env(regions, engine, counters, now);
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

    /// Jobs that waited for queue pairs have some.
    fn rdma_resume(&mut self, slot: usize) {
        let Self { peers, rdma, .. } = self;
        let Some(link) = peers.get_mut(slot).and_then(|peer| peer.rdma.as_deref_mut()) else {
            return;
        };
        for job in std::mem::take(&mut link.parked) {
            rdma.assign(link, job);
        }
        self.mark(slot);
    }

    /// A transfer is to end early.
    pub(super) fn stop_wired(&mut self, slot: usize, key: u64, stuck: bool, cx: &mut Cx<'_>) {
        let Some(link) = self.rdma_link(slot) else { return };
        if let Some(ended) = link.stop(key) {
            self.with_core(slot, cx, |core, env| {
                core.wired_ended(ended.key, WiredEnd::Stopped, env);
            });
        } else if stuck && link.phase == Phase::Up {
            // Nothing else makes its memory quiet.
            let reason = "a transfer passed the operation timeout";
            self.rdma_fail(slot, &Blame::Nobody, reason, cx);
        }
    }

    // --- completions

    /// Looks into the completion queues; true: there was something.
    #[inline]
    pub(super) fn poll_rdma(&mut self, cx: &mut Cx<'_>) -> bool {
        if self.rdma.is_idle() {
            return false;
        }
        let batch = self.rdma.poll();
        let worked = !batch.is_empty();
        self.on_completions(&batch, cx);
        self.rdma.recycle(batch);
        worked
    }

    /// Good news first: a failure destroys queue pairs, and with them what is known of their completions.
    fn on_completions(&mut self, batch: &[Completion], cx: &mut Cx<'_>) {
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

    fn on_completion(&mut self, completion: &Completion, cx: &mut Cx<'_>) {
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
            self.counters.rdma_completions.add(1);
            let Some(ended) = self.rdma_link(slot).and_then(|link| link.chain_ended(job)) else {
                continue;
            };
            let end = if ended.stopped {
                WiredEnd::Stopped
            } else {
                WiredEnd::Done { notified: ended.notified }
            };
            self.with_core(slot, cx, |core, env| core.wired_ended(ended.key, end, env));
        }
        self.mark(slot);
    }

    #[cold]
    fn on_work_error(&mut self, completion: &Completion, cx: &mut Cx<'_>) {
        let (id, receive, number) = WorkId::split(completion.id);
        let status = completion.status;
        let Some((slot, pair)) = self.rdma.entry(id) else { return };
        let (index, rail) = (pair.index, pair.rail);
        let job = pair.job_of(number).filter(|_| !receive);
        let Some(link) = self.rdma_link(slot) else { return };
        if link.phase == Phase::Connecting && link.offers {
            let generation = link.generation;
            return self.rdma_decided(slot, generation, index, false, cx);
        }
        let name = self.rdma.rails().get(rail).map(Rail::name).unwrap_or_default();
        let blame = match (status, job) {
            (
                WorkStatus::RemoteAccess
                | WorkStatus::RemoteInvalid
                | WorkStatus::LocalProtection
                | WorkStatus::Other(_),
                Some(job),
            ) => Blame::Job(job, status),
            (WorkStatus::NoAnswer, _) => Blame::Rail(rail),
            _ => Blame::Nobody,
        };
        self.rdma_fail(slot, &blame, &reason_of(status, &name), cx);
    }

    fn on_rdma_message(&mut self, slot: usize, bytes: &[u8], cx: &mut Cx<'_>) {
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

    fn rdma_protocol_error(&mut self, slot: usize, reason: &str, cx: &mut Cx<'_>) {
        if let Some(session) = self.rdma_link(slot).map(|link| link.session) {
            self.close_link(session, &format!("protocol error over RDMA: {reason}"), cx);
        }
    }

    // --- sleeping, and what devices tell

    /// Has the devices wake this lane; false: something has come by then.
    pub(super) fn rdma_before_sleep(&mut self, cx: &mut Cx<'_>) -> bool {
        if self.rdma.is_idle() {
            return true;
        }
        self.rdma.arm();
        !self.poll_rdma(cx)
    }

    /// A channel or a device has something to tell.
    pub(super) fn on_rdma_fd(&mut self, token: u64, cx: &mut Cx<'_>) -> bool {
        if token & RDMA_CHANNEL == RDMA_CHANNEL {
            self.rdma.take_events((token & !RDMA_CHANNEL) as usize);
            return self.poll_rdma(cx);
        }
        let rail = (token & !RDMA_EVENTS) as usize;
        let rails = self.rdma.rails().clone();
        let Some(device) = rails.get(rail).map(|rail| rail.device.clone()) else { return false };
        let mut any = false;
        while let Some(event) = device.next_event() {
            any = true;
            // Rails may be ports of one device: whoever looked first has it.
            for lane in self.engine.lanes() {
                let _ = lane.submit(Message::Rdma(Box::new((device.name().to_owned(), event))));
            }
        }
        any
    }

    /// Something has happened to a device.
    pub(super) fn on_rdma_event(&mut self, device: &str, event: AsyncEvent, cx: &mut Cx<'_>) {
        let rails = self.rdma.rails().clone();
        for (index, rail) in rails.all().iter().enumerate() {
            if rail.device.name() != device {
                continue;
            }
            let reason = match event {
                AsyncEvent::PortDown(port) if port == rail.port => {
                    rail.set_down(true);
                    "its port is down"
                }
                AsyncEvent::PortUp(port) if port == rail.port => {
                    rail.set_down(false);
                    continue;
                }
                AsyncEvent::Fatal => {
                    rail.set_dead();
                    "the device is gone"
                }
                AsyncEvent::QueuePair(number) => {
                    if let Some(slot) = self.rdma.peer_of(index, number) {
                        // Its completions say more, if they are there already.
                        self.poll_rdma(cx);
                        let reason = "the device says that a queue pair is in error";
                        self.rdma_fail(slot, &Blame::Nobody, reason, cx);
                    }
                    continue;
                }
                _ => continue,
            };
            if self.index == 0 {
                tracing::warn!(rail = rail.name(), reason, "a rail is out of use");
            }
            let slots: Vec<usize> = self.peers.iter().map(|(slot, _)| slot).collect();
            for slot in slots {
                if self.uses_rail(slot, index) {
                    let reason = format!("{}: {reason}", rail.name());
                    self.rdma_fail(slot, &Blame::Rail(index), &reason, cx);
                }
            }
        }
    }

    fn uses_rail(&mut self, slot: usize, rail: usize) -> bool {
        let Some(link) = self.rdma_link(slot) else { return false };
        let ids: SmallVec<[PairId; 4]> = link.pairs.iter().map(|(_, id)| *id).collect();
        ids.into_iter().any(|id| self.rdma.pair(id).is_some_and(|pair| pair.rail == rail))
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

/// Which of our rails is best for a queue pair of the peer: whose address has most in common, else the one with its number.
fn nearest_rail(rails: &crate::transport::rdma::Rails, offer: &QueuePairFrame) -> Option<usize> {
    let count = rails.all().len();
    let theirs = u128::from_be_bytes(offer.gid);
    let usable = rails
        .all()
        .iter()
        .enumerate()
        .filter(|(_, rail)| rail.is_usable() && rail.ethernet == offer.ethernet);
    usable
        .max_by_key(|(index, rail)| {
            let common = (u128::from_be_bytes(rail.gid.0) ^ theirs).leading_zeros();
            (common, *index == usize::from(offer.rail) % count, std::cmp::Reverse(*index))
        })
        .map(|(index, _)| index)
}
