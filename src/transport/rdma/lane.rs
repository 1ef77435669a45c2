//! What one lane polls: completion queues, and the queue pairs that have shares of them.

use std::io;
use std::sync::Arc;

use slab::Slab;
use smallvec::SmallVec;

use super::link::{Link, Posted};
use super::pair::{CHAIN, MAX_SGE, Pair};
use super::rails::Rails;
use crate::verbs::{Completion, CompletionChannel, CompletionQueue, SendList};
use crate::wire::rdma::RdmaMessage;

/// Entries of a completion queue; a lane makes another when all are taken.
const QUEUE_ENTRIES: u32 = 8192;

/// Names a queue pair of a lane, and tells it from a later one in the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PairId {
    pub(crate) slot: u16,
    stamp: u16,
}

/// The ID of a work request: which queue pair it was posted to, whether it is a receive, and a number.
///
/// ```text
/// 63 receive | 62..48 stamp | 47..32 slot | 31..0 buffer of a receive, or the counter of posted requests
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WorkId(u64);

const RECEIVE: u64 = 1 << 63;

impl WorkId {
    fn of(pair: PairId) -> Self {
        Self(u64::from(pair.stamp & 0x7fff) << 48 | u64::from(pair.slot) << 32)
    }

    pub(crate) fn send(self, counter: u32) -> u64 {
        self.0 | u64::from(counter)
    }

    pub(crate) fn receive(self, buffer: u32) -> u64 {
        self.0 | RECEIVE | u64::from(buffer)
    }

    /// Queue pair, whether it is a receive, number.
    pub(crate) fn split(id: u64) -> (PairId, bool, u32) {
        let pair = PairId { slot: (id >> 32) as u16, stamp: (id >> 48) as u16 & 0x7fff };
        (pair, id & RECEIVE != 0, id as u32)
    }
}

#[derive(Debug)]
struct Queue {
    cq: Arc<CompletionQueue>,
    /// Entries that queue pairs have shares of: it cannot overrun.
    taken: u32,
    /// The device has given it up: nothing more comes out of it.
    is_broken: bool,
}

impl Queue {
    #[inline]
    fn poll(&mut self, batch: &mut Vec<Completion>, news: &mut bool) {
        if !self.is_broken && self.cq.poll(|completion| batch.push(completion)).is_err() {
            (self.is_broken, *news) = (true, true);
        }
    }

    fn drain(&mut self, batch: &mut Vec<Completion>, news: &mut bool) {
        if !self.is_broken && self.cq.drain(|completion| batch.push(completion)).is_err() {
            (self.is_broken, *news) = (true, true);
        }
    }
}

#[derive(Debug)]
struct RailLane {
    channel: Arc<CompletionChannel>,
    queues: Vec<Queue>,
}

#[derive(Debug)]
struct Entry {
    stamp: u16,
    /// The peer on the lane.
    peer: usize,
    pair: Pair,
}

/// The RDMA side of a lane.
#[derive(Debug)]
pub(crate) struct LaneRdma {
    rails: Arc<Rails>,
    lanes: Vec<Option<RailLane>>,
    pairs: Slab<Entry>,
    next_stamp: u16,
    /// What is about to be posted.
    list: SendList,
    batch: Vec<Completion>,
    /// A completion queue has broken, and those whose queue pairs it is for do not know.
    has_broken: bool,
}

impl LaneRdma {
    pub(crate) fn new(rails: Arc<Rails>) -> Self {
        let lanes = rails
            .all()
            .iter()
            .map(|rail| {
                CompletionChannel::new(&rail.device)
                    .map(|channel| RailLane { channel, queues: Vec::new() })
                    .inspect_err(
                        |error| tracing::warn!(rail = rail.name(), %error, "no completion channel"),
                    )
                    .ok()
            })
            .collect();
        Self {
            rails,
            lanes,
            pairs: Slab::new(),
            next_stamp: 0,
            list: SendList::new(CHAIN + 1, (CHAIN + 1) * MAX_SGE as usize),
            batch: Vec::with_capacity(64),
            has_broken: false,
        }
    }

    pub(crate) fn rails(&self) -> &Arc<Rails> {
        &self.rails
    }

    /// The channel of each rail that has one.
    pub(crate) fn channels(&self) -> impl Iterator<Item = (usize, &Arc<CompletionChannel>)> {
        let lanes = self.lanes.iter().enumerate();
        lanes.filter_map(|(rail, lane)| lane.as_ref().map(|lane| (rail, &lane.channel)))
    }

    pub(crate) fn take_events(&self, rail: usize) {
        if let Some(Some(lane)) = self.lanes.get(rail) {
            lane.channel.take_events();
        }
    }

    /// Whether there is anything to poll.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Makes a queue pair on a rail.
    pub(crate) fn add_pair(
        &mut self,
        rail_index: usize,
        peer: usize,
        index: u8,
        psn: u32,
    ) -> io::Result<PairId> {
        let gone = || io::Error::from_raw_os_error(libc::ENODEV);
        let rails = self.rails.clone();
        let rail = rails.get(rail_index).filter(|rail| rail.is_usable()).ok_or_else(gone)?;
        let lane = self.lanes.get_mut(rail_index).and_then(Option::as_mut).ok_or_else(gone)?;
        let share = Pair::share(rail);
        let room = |queue: &Queue| !queue.is_broken && queue.taken + share <= queue.cq.capacity();
        let queue = if let Some(queue) = lane.queues.iter().position(room) {
            queue
        } else {
            let entries = QUEUE_ENTRIES.min(rail.device.limits().max_cqe).max(share);
            let cq = CompletionQueue::new(&rail.device, &lane.channel, entries)?;
            let made = Queue { cq, taken: 0, is_broken: false };
            // In the place of one that is broken, once all have left it.
            let left = lane.queues.iter().position(|queue| queue.is_broken && queue.taken == 0);
            let place = left.unwrap_or(lane.queues.len());
            match lane.queues.get_mut(place) {
                Some(broken) => *broken = made,
                None => lane.queues.push(made),
            }
            place
        };
        let slot = u16::try_from(self.pairs.vacant_key())
            .map_err(|_| io::Error::from_raw_os_error(libc::EMFILE))?;
        self.next_stamp = self.next_stamp.wrapping_add(1) & 0x7fff;
        let id = PairId { slot, stamp: self.next_stamp };
        let cq = (queue, &lane.queues[queue].cq);
        let pair = Pair::new((rail_index, rail), cq, WorkId::of(id), index, psn)?;
        lane.queues[queue].taken += share;
        self.pairs.insert(Entry { stamp: id.stamp, peer, pair });
        Ok(id)
    }

    /// Takes a queue pair out; it is destroyed when it is dropped.
    pub(crate) fn take_pair(&mut self, id: PairId) -> Option<Pair> {
        self.pair(id)?;
        let Entry { pair, .. } = self.pairs.remove(usize::from(id.slot));
        if let Some(rail) = self.rails.get(pair.rail)
            && let Some(Some(lane)) = self.lanes.get_mut(pair.rail)
            && let Some(queue) = lane.queues.get_mut(pair.queue)
        {
            queue.taken = queue.taken.saturating_sub(Pair::share(rail));
        }
        Some(pair)
    }

    #[inline]
    pub(crate) fn pair(&mut self, id: PairId) -> Option<&mut Pair> {
        self.entry(id).map(|(_, pair)| pair)
    }

    /// A queue pair, and the peer that it belongs to.
    #[inline]
    pub(crate) fn entry(&mut self, id: PairId) -> Option<(usize, &mut Pair)> {
        let entry = self.pairs.get_mut(usize::from(id.slot))?;
        (entry.stamp == id.stamp).then_some((entry.peer, &mut entry.pair))
    }

    /// The queue pair with a number on a rail.
    pub(crate) fn peer_of(&self, rail: usize, number: u32) -> Option<usize> {
        let mut all = self.pairs.iter().map(|(_, entry)| entry);
        all.find(|entry| entry.pair.rail == rail && entry.pair.number() == number)
            .map(|entry| entry.peer)
    }

    /// Polls every completion queue once. The answer is to be given back by `recycle`.
    #[inline]
    pub(crate) fn poll(&mut self) -> Vec<Completion> {
        let mut batch = std::mem::take(&mut self.batch);
        batch.clear();
        for lane in self.lanes.iter_mut().flatten() {
            for queue in &mut lane.queues {
                queue.poll(&mut batch, &mut self.has_broken);
            }
        }
        batch
    }

    /// Takes all that every completion queue has. As for `poll`.
    pub(crate) fn drain(&mut self) -> Vec<Completion> {
        let mut batch = std::mem::take(&mut self.batch);
        batch.clear();
        for lane in self.lanes.iter_mut().flatten() {
            for queue in &mut lane.queues {
                queue.drain(&mut batch, &mut self.has_broken);
            }
        }
        batch
    }

    /// An event says that a completion queue of a rail is broken, which may be another lane's.
    pub(crate) fn set_broken(&mut self, rail: usize, name: usize) {
        let Some(Some(lane)) = self.lanes.get_mut(rail) else { return };
        for queue in lane.queues.iter_mut().filter(|queue| queue.cq.name() == name) {
            self.has_broken |= !queue.is_broken;
            queue.is_broken = true;
        }
    }

    /// Whether `take_broken` has something.
    #[inline]
    pub(crate) fn has_broken(&self) -> bool {
        self.has_broken
    }

    /// The peers with queue pairs whose completions will not come, and the rail of each.
    #[cold]
    pub(crate) fn take_broken(&mut self) -> Vec<(usize, usize)> {
        self.has_broken = false;
        let is_broken = |pair: &Pair| {
            let lane = self.lanes.get(pair.rail).and_then(Option::as_ref);
            lane.and_then(|lane| lane.queues.get(pair.queue)).is_some_and(|queue| queue.is_broken)
        };
        let mut peers: Vec<(usize, usize)> = self
            .pairs
            .iter()
            .filter(|(_, entry)| is_broken(&entry.pair))
            .map(|(_, entry)| (entry.peer, entry.pair.rail))
            .collect();
        peers.sort_unstable();
        peers.dedup();
        peers
    }

    pub(crate) fn recycle(&mut self, batch: Vec<Completion>) {
        self.batch = batch;
    }

    /// Has the channels tell of the next completion.
    pub(crate) fn arm(&self) {
        for lane in self.lanes.iter().flatten() {
            for queue in lane.queues.iter().filter(|queue| queue.taken > 0) {
                queue.cq.arm();
            }
        }
    }

    /// A queue pair, and the list to fill for it.
    pub(crate) fn with_list<R>(
        &mut self,
        id: PairId,
        call: impl FnOnce(&mut Pair, &mut SendList) -> R,
    ) -> Option<R> {
        let entry = self.pairs.get_mut(usize::from(id.slot)).filter(|e| e.stamp == id.stamp)?;
        Some(call(&mut entry.pair, &mut self.list))
    }

    /// Chooses the queue pairs that a job goes over, of those whose rails have its memory: the first, if it is small; all for bulk on
    /// the rails near its memory, if it is large and they are several; of these else the one for bulk that has least to do. False: none
    /// has it, and the job is left as it was.
    #[must_use]
    pub(crate) fn assign(&mut self, link: &mut Link, job: usize) -> bool {
        let Some(key) = link.jobs.get(job).map(|job| job.key) else { return true };
        let has_memory = |id: PairId| {
            let entry = self.pairs.get(usize::from(id.slot));
            entry.is_some_and(|entry| link.is_open_on(job, &entry.pair))
        };
        let first = link.first().filter(|id| has_memory(*id));
        let large = link.is_large(job);
        if let (None, Some(first)) = (large, first) {
            if let Some(pair) = self.pair(first) {
                pair.waiting.push_back((job, key));
            }
            return true;
        }
        let bulk = link.pairs.iter().skip(1).map(|(_, id)| *id).filter(|id| has_memory(*id));
        let bulk = self.near_memory(link.near(job), bulk.collect());
        let mut chosen: SmallVec<[PairId; 8]> = SmallVec::new();
        if large == Some(true) && self.rails_of(&bulk) > 1 {
            chosen = bulk;
        } else {
            let load = |id: &PairId| {
                self.pairs.get(usize::from(id.slot)).map_or(0, |entry| entry.pair.load())
            };
            chosen.extend(bulk.iter().copied().min_by_key(load).or(first));
        }
        if chosen.is_empty() {
            return false;
        }
        link.share(job, chosen.len());
        for id in chosen {
            if let Some(pair) = self.pair(id) {
                pair.waiting.push_back((job, key));
            }
        }
        true
    }

    /// Those of the queue pairs that are on these rails; all, if none is.
    fn near_memory(&self, rails: u32, pairs: SmallVec<[PairId; 8]>) -> SmallVec<[PairId; 8]> {
        let is_near = |id: &PairId| {
            let entry = self.pairs.get(usize::from(id.slot));
            entry.is_some_and(|entry| rails >> entry.pair.rail & 1 != 0)
        };
        if rails == 0 || !pairs.iter().any(is_near) {
            return pairs;
        }
        pairs.into_iter().filter(is_near).collect()
    }

    fn rails_of(&self, pairs: &[PairId]) -> usize {
        let mut rails: SmallVec<[usize; 4]> = SmallVec::new();
        for id in pairs {
            if let Some(entry) = self.pairs.get(usize::from(id.slot))
                && !rails.contains(&entry.pair.rail)
            {
                rails.push(entry.pair.rail);
            }
        }
        rails.len()
    }

    /// Issues what the link's jobs have, as far as there is room.
    ///
    /// # Errors
    /// The rail whose queue pair takes nothing, and why.
    #[inline]
    pub(crate) fn issue_all(&mut self, link: &mut Link) -> Result<Posted, (usize, io::Error)> {
        let mut posted = Posted::default();
        for index in 0..link.pairs.len() {
            let Some((_, id)) = link.pairs.get(index).copied() else { break };
            let entry = self.pairs.get_mut(usize::from(id.slot)).filter(|e| e.stamp == id.stamp);
            let Some(Entry { pair, .. }) = entry else { continue };
            if !pair.waiting.is_empty() {
                let rail = pair.rail;
                let some = link.issue(pair, &mut self.list).map_err(|error| (rail, error))?;
                posted.requests += some.requests;
                posted.doorbells += some.doorbells;
            }
        }
        Ok(posted)
    }

    /// Lets the peer send more messages for those that were taken, unless notifications wait for the application.
    pub(crate) fn return_credits(&mut self, link: &Link, backlogged: bool) -> io::Result<()> {
        for (_, id) in &link.pairs {
            let Some(entry) = self.pairs.get_mut(usize::from(id.slot)) else { continue };
            let pair = &mut entry.pair;
            if !backlogged {
                pair.release_credits();
            }
            if pair.owes_credits() {
                pair.send(&mut self.list, &RdmaMessage::Credits)?;
            }
        }
        Ok(())
    }

    /// Destroys everything: no device touches anything for this lane any more.
    pub(crate) fn clear(&mut self) {
        self.pairs.clear();
    }
}
