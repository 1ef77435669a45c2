//! The table of a lane's file descriptors: hot ones are tried every turn, quiet ones are watched by the ring.

use std::os::fd::RawFd;

use slab::Slab;

use crate::{Interest, Readiness, Start};

/// From so many hot descriptors on, one call asks the kernel about all of them, and only those are tried that are ready. Trying
/// one in vain costs 0.3 us, asking about one more 0.03 us.
const MANY_HOT: usize = 4;

/// An idle descriptor goes quiet after this time, if it is not among the few that may stay hot.
pub(crate) const HOT_IDLE_NS: u64 = 200_000;

const NOT_HOT: u32 = u32::MAX;

/// Names a descriptor of [`Cx::add_fd`](crate::Cx::add_fd). It stays harmless after the descriptor was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FdId {
    index: u32,
    generation: u32,
}

/// A one-shot poll that the ring holds for a descriptor.
#[derive(Clone, Copy)]
struct Armed {
    sequence: u32,
    mask: u32,
}

struct Entry {
    fd: RawFd,
    token: u64,
    generation: u32,
    interest: Interest,
    /// Position in the hot list.
    hot_at: u32,
    /// Never one of the few that stay hot while they are idle.
    calm: bool,
    armed: Option<Armed>,
    last_active_ns: u64,
    /// What the kernel reported since the last call of `on_fd`.
    reported: Option<Readiness>,
    /// The kernel was asked just now, and there is nothing to do.
    at_rest: bool,
}

/// Work for the ring, which only the lane's thread may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingOp {
    Arm { fd: RawFd, mask: u32, user_data: u64 },
    Cancel { user_data: u64 },
}

enum Pending {
    Arm(FdId),
    Cancel(u64),
}

pub(crate) struct FdTable {
    entries: Slab<Entry>,
    hot: Vec<u32>,
    pending: Vec<Pending>,
    scratch: Vec<(u64, u32)>,
    /// What the kernel is asked about the hot ones.
    questions: Vec<libc::pollfd>,
    next_generation: u32,
    next_sequence: u32,
}

impl FdTable {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self {
            entries: Slab::with_capacity(capacity),
            hot: Vec::with_capacity(capacity),
            pending: Vec::with_capacity(capacity),
            scratch: Vec::with_capacity(capacity),
            questions: Vec::with_capacity(capacity),
            next_generation: 0,
            next_sequence: 0,
        }
    }

    pub(crate) fn add(
        &mut self,
        fd: RawFd,
        token: u64,
        interest: Interest,
        start: Start,
        now_ns: u64,
    ) -> FdId {
        self.next_generation = self.next_generation.wrapping_add(1);
        let generation = self.next_generation;
        let index = self.entries.insert(Entry {
            fd,
            token,
            generation,
            interest,
            hot_at: NOT_HOT,
            calm: false,
            armed: None,
            last_active_ns: now_ns,
            reported: None,
            at_rest: false,
        }) as u32;
        // So that asking never allocates.
        self.questions.reserve(self.entries.len());
        let id = FdId { index, generation };
        match start {
            _ if interest.is_none() => {}
            Start::Hot => self.heat(index),
            Start::Quiet => self.pending.push(Pending::Arm(id)),
        }
        id
    }

    pub(crate) fn remove(&mut self, id: FdId) -> bool {
        if self.get(id).is_none() {
            return false;
        }
        self.cool(id.index);
        self.disarm(id.index);
        self.entries.remove(id.index as usize);
        true
    }

    pub(crate) fn set_interest(&mut self, id: FdId, interest: Interest, now_ns: u64) -> bool {
        let Some(entry) = self.get(id) else { return false };
        if entry.interest == interest {
            return true;
        }
        let uncovered = entry.armed.is_some_and(|armed| interest.poll_mask() & !armed.mask != 0);
        let (was_none, is_hot) = (entry.interest.is_none(), entry.hot_at != NOT_HOT);
        self.entries[id.index as usize].interest = interest;
        if interest.is_none() {
            self.cool(id.index);
            self.disarm(id.index);
        } else if !is_hot && (uncovered || was_none) {
            // Hot for a while: what is newly wanted may be possible already, and the new poll is armed when it cools.
            self.disarm(id.index);
            self.entries[id.index as usize].last_active_ns = now_ns;
            self.heat(id.index);
        }
        true
    }

    /// Cheap when the descriptor is hot already.
    pub(crate) fn make_hot(&mut self, id: FdId, now_ns: u64) -> bool {
        let Some(entry) = self.get(id) else { return false };
        let watched = !entry.interest.is_none();
        self.entries[id.index as usize].last_active_ns = now_ns;
        if watched {
            self.heat(id.index);
        }
        true
    }

    /// Whether the descriptor may stay hot while it is idle.
    pub(crate) fn set_calm(&mut self, id: FdId, calm: bool) {
        if self.get(id).is_some() {
            self.entries[id.index as usize].calm = calm;
        }
    }

    #[inline]
    pub(crate) fn hot_count(&self) -> usize {
        self.hot.len()
    }

    /// Finds out which of the hot descriptors are ready, where they are many. `ask` fills in the answers, as poll(2) does, and says
    /// whether it could.
    #[inline]
    pub(crate) fn ask(&mut self, ask: impl FnOnce(&mut [libc::pollfd]) -> bool) {
        if self.hot.len() >= MANY_HOT {
            self.ask_about_all(ask);
        }
    }

    fn ask_about_all(&mut self, ask: impl FnOnce(&mut [libc::pollfd]) -> bool) {
        self.questions.clear();
        for index in &self.hot {
            let Entry { fd, interest, .. } = self.entries[*index as usize];
            let events = interest.poll_mask() as libc::c_short;
            self.questions.push(libc::pollfd { fd, events, revents: 0 });
        }
        // Where nothing is known, all are tried.
        let known = ask(&mut self.questions);
        for (index, question) in self.hot.iter().zip(&self.questions) {
            let entry = &mut self.entries[*index as usize];
            entry.at_rest = known && question.revents == 0;
            if known && question.revents != 0 {
                entry.reported = Some(readiness(question.revents as u16 as u32, false));
            }
        }
    }

    /// The descriptor at `position` of the hot list, and why to call it now.
    #[inline]
    pub(crate) fn visit(&mut self, position: usize) -> Option<(FdId, u64, Readiness)> {
        let index = *self.hot.get(position)?;
        let entry = &mut self.entries[index as usize];
        let at_rest = std::mem::take(&mut entry.at_rest);
        let readiness = match entry.reported.take() {
            Some(reported) => reported,
            None if at_rest => return None,
            None => Readiness::Hot,
        };
        Some((FdId { index, generation: entry.generation }, entry.token, readiness))
    }

    #[inline]
    pub(crate) fn made_progress(&mut self, id: FdId, now_ns: u64) {
        if let Some(entry) = self.entries.get_mut(id.index as usize)
            && entry.generation == id.generation
        {
            entry.last_active_ns = now_ns;
        }
    }

    /// The ring completed a poll: the descriptor is hot again. False: it was of a descriptor or poll that is gone.
    pub(crate) fn poll_completed(&mut self, user_data: u64, result: i32, now_ns: u64) -> bool {
        let (index, sequence) = (user_data as u32, (user_data >> 32) as u32);
        let Some(entry) = self.entries.get_mut(index as usize) else { return false };
        if entry.armed.is_none_or(|armed| armed.sequence != sequence) {
            return false;
        }
        entry.armed = None;
        // A poll that failed is a hang-up, too: the driver's next try finds out why.
        entry.reported = Some(readiness(result.max(0) as u32, result < 0));
        entry.last_active_ns = now_ns;
        self.heat(index);
        true
    }

    /// Whether the lane's thread has ring work to do.
    #[inline]
    pub(crate) fn has_ring_work(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether a hot descriptor is not watched by the ring: a lane must not stay parked then.
    pub(crate) fn has_unwatched_hot(&self) -> bool {
        self.hot.iter().any(|index| self.entries[*index as usize].armed.is_none())
    }

    /// Lane's thread: the next piece of ring work. A poll that is handed out counts as armed.
    pub(crate) fn next_ring_op(&mut self) -> Option<RingOp> {
        loop {
            match self.pending.pop()? {
                Pending::Cancel(user_data) => return Some(RingOp::Cancel { user_data }),
                Pending::Arm(id) => {
                    let wanted = self.get(id).is_some_and(|entry| {
                        entry.hot_at == NOT_HOT
                            && entry.armed.is_none()
                            && !entry.interest.is_none()
                    });
                    if wanted {
                        return Some(self.arm(id.index));
                    }
                }
            }
        }
    }

    /// Lane's thread: lets descriptors cool that have been idle for long, but keeps the `keep` most recently active ones
    /// hot. `keep` is ignored (nothing stays hot) with `all`, which is for parking.
    pub(crate) fn cool_idle(&mut self, now_ns: u64, keep: usize, all: bool) {
        if all {
            while let Some(index) = self.hot.last().copied() {
                self.cool_and_watch(index);
            }
            return;
        }
        self.cool_calm(now_ns);
        let excess = self.hot.len().saturating_sub(keep);
        if excess == 0 {
            return;
        }
        let mut idle = std::mem::take(&mut self.scratch);
        idle.clear();
        for index in &self.hot {
            let last = self.entries[*index as usize].last_active_ns;
            if now_ns.saturating_sub(last) > HOT_IDLE_NS {
                idle.push((last, *index));
            }
        }
        if idle.len() > excess {
            idle.select_nth_unstable(excess);
            idle.truncate(excess);
        }
        for (_, index) in &idle {
            self.cool_and_watch(*index);
        }
        self.scratch = idle;
    }

    /// Lets calm descriptors cool that have been idle for long; whoever called has the lane's thread do the ring work.
    pub(crate) fn cool_calm(&mut self, now_ns: u64) {
        let mut position = self.hot.len();
        while position > 0 {
            position -= 1;
            let Some(index) = self.hot.get(position).copied() else { continue };
            let entry = &self.entries[index as usize];
            if entry.calm && now_ns.saturating_sub(entry.last_active_ns) > HOT_IDLE_NS {
                self.cool_and_watch(index);
            }
        }
    }

    fn cool_and_watch(&mut self, index: u32) {
        self.cool(index);
        let entry = &self.entries[index as usize];
        let missing = entry.armed.is_none_or(|armed| entry.interest.poll_mask() & !armed.mask != 0);
        if missing {
            let id = FdId { index, generation: entry.generation };
            self.disarm(index);
            self.pending.push(Pending::Arm(id));
        }
    }

    fn arm(&mut self, index: u32) -> RingOp {
        self.next_sequence = (self.next_sequence + 1) & 0x7fff_ffff;
        let entry = &mut self.entries[index as usize];
        let armed = Armed { sequence: self.next_sequence, mask: entry.interest.poll_mask() };
        entry.armed = Some(armed);
        RingOp::Arm { fd: entry.fd, mask: armed.mask, user_data: user_data(index, armed) }
    }

    fn disarm(&mut self, index: u32) {
        if let Some(armed) = self.entries[index as usize].armed.take() {
            self.pending.push(Pending::Cancel(user_data(index, armed)));
        }
    }

    fn heat(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        if entry.hot_at == NOT_HOT {
            entry.hot_at = self.hot.len() as u32;
            self.hot.push(index);
        }
    }

    fn cool(&mut self, index: u32) {
        let at = std::mem::replace(&mut self.entries[index as usize].hot_at, NOT_HOT);
        if at == NOT_HOT {
            return;
        }
        self.hot.swap_remove(at as usize);
        if let Some(moved) = self.hot.get(at as usize) {
            self.entries[*moved as usize].hot_at = at;
        }
    }

    fn get(&self, id: FdId) -> Option<&Entry> {
        self.entries.get(id.index as usize).filter(|entry| entry.generation == id.generation)
    }
}

fn readiness(events: u32, failed: bool) -> Readiness {
    let has = |bits: libc::c_short| events & bits as u32 != 0;
    Readiness::Ready {
        readable: has(libc::POLLIN | libc::POLLRDHUP),
        writable: has(libc::POLLOUT),
        hangup: failed || has(libc::POLLERR | libc::POLLHUP | libc::POLLNVAL),
    }
}

fn user_data(index: u32, armed: Armed) -> u64 {
    u64::from(index) | u64::from(armed.sequence) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATER: u64 = 2 * HOT_IDLE_NS;

    fn table() -> FdTable {
        FdTable::with_capacity(4)
    }

    fn ops(table: &mut FdTable) -> Vec<RingOp> {
        std::iter::from_fn(|| table.next_ring_op()).collect()
    }

    fn armed(op: RingOp) -> (RawFd, u64) {
        match op {
            RingOp::Arm { fd, user_data, .. } => (fd, user_data),
            RingOp::Cancel { .. } => panic!("a cancel"),
        }
    }

    #[test]
    fn a_calm_descriptor_goes_quiet_although_it_is_the_only_one() {
        let mut table = table();
        let id = table.add(9, 42, Interest::READABLE, Start::Hot, 0);
        table.cool_idle(LATER, 1, false);
        assert_eq!(table.hot_count(), 1, "one may stay hot");
        table.set_calm(id, true);
        table.cool_idle(LATER, 1, false);
        assert_eq!(table.hot_count(), 0);
        assert!(matches!(ops(&mut table)[..], [RingOp::Arm { fd: 9, .. }]));
    }

    #[test]
    fn a_quiet_descriptor_is_watched_and_becomes_hot_when_it_fires() {
        let mut table = table();
        let id = table.add(9, 42, Interest::READABLE, Start::Quiet, 0);
        assert_eq!(table.hot_count(), 0);
        let ops = ops(&mut table);
        assert_eq!(ops.len(), 1);
        let (fd, user_data) = armed(ops[0]);
        assert_eq!(fd, 9);
        assert!(table.poll_completed(user_data, libc::POLLIN.into(), 0));
        assert!(!table.poll_completed(user_data, libc::POLLIN.into(), 0), "one shot");
        let ready = Readiness::Ready { readable: true, writable: false, hangup: false };
        assert_eq!(table.visit(0), Some((id, 42, ready)));
        assert_eq!(table.visit(0), Some((id, 42, Readiness::Hot)));
    }

    #[test]
    fn the_most_recently_active_stay_hot() {
        let mut table = table();
        let ids: Vec<_> = (0..6u64)
            .map(|n| table.add(n as RawFd, n, Interest::READABLE, Start::Hot, n))
            .collect();
        table.cool_idle(LATER, 4, false);
        assert_eq!(table.hot_count(), 4);
        let mut cooled: Vec<_> = ops(&mut table).into_iter().map(|op| armed(op).0).collect();
        cooled.sort_unstable();
        assert_eq!(cooled, [0, 1]);
        table.made_progress(ids[2], LATER);
        table.cool_idle(LATER + 10, 0, false);
        assert_eq!(table.hot_count(), 1, "an active one is not idle");
        table.cool_idle(LATER + 10, 4, true);
        assert_eq!((table.hot_count(), table.has_unwatched_hot()), (0, false));
    }

    #[test]
    fn removing_cancels_the_watch_and_stale_completions_are_ignored() {
        let mut table = table();
        let id = table.add(9, 1, Interest::READABLE, Start::Quiet, 0);
        let (_, user_data) = armed(ops(&mut table)[0]);
        assert!(table.remove(id));
        assert!(!table.remove(id));
        assert_eq!(ops(&mut table), [RingOp::Cancel { user_data }]);
        let again = table.add(9, 2, Interest::READABLE, Start::Quiet, 0);
        assert_ne!(again, id);
        assert!(!table.poll_completed(user_data, libc::POLLIN.into(), 0));
        assert!(!table.make_hot(id, 0));
        assert_eq!(table.hot_count(), 0);
    }

    #[test]
    fn more_interest_takes_effect_although_armed() {
        let mut table = table();
        let id = table.add(9, 1, Interest::READABLE, Start::Quiet, 0);
        let (_, old) = armed(ops(&mut table)[0]);
        table.set_interest(id, Interest::BOTH, 0);
        assert_eq!(table.hot_count(), 1, "what is wanted may be possible already");
        table.cool_idle(LATER, 0, true);
        let ops = ops(&mut table);
        assert!(ops.contains(&RingOp::Cancel { user_data: old }));
        let masks = ops.iter().filter_map(|op| match op {
            RingOp::Arm { mask, .. } => Some(*mask),
            RingOp::Cancel { .. } => None,
        });
        assert_eq!(masks.collect::<Vec<_>>(), [Interest::BOTH.poll_mask()]);
    }

    #[test]
    fn no_interest_silences_a_descriptor() {
        let mut table = table();
        let id = table.add(9, 1, Interest::READABLE, Start::Hot, 0);
        table.set_interest(id, Interest::NONE, 0);
        table.make_hot(id, 0);
        table.cool_idle(LATER, 0, true);
        assert_eq!((table.hot_count(), ops(&mut table).len()), (0, 0));
        table.set_interest(id, Interest::READABLE, 0);
        assert_eq!(table.hot_count(), 1);
    }

    #[test]
    fn a_hot_descriptor_that_is_still_watched_is_not_armed_twice() {
        let mut table = table();
        let id = table.add(9, 1, Interest::READABLE, Start::Quiet, 0);
        ops(&mut table);
        table.make_hot(id, 0);
        table.cool_idle(LATER, 0, true);
        assert_eq!(ops(&mut table), []);
    }

    #[test]
    fn of_many_hot_descriptors_only_those_that_are_ready_are_visited() {
        let mut table = table();
        let visited = |table: &mut FdTable| -> Vec<(u64, Readiness)> {
            let visits = (0..table.hot_count()).filter_map(|position| table.visit(position));
            visits.map(|(_, token, readiness)| (token, readiness)).collect()
        };
        for n in 0..MANY_HOT as u64 - 1 {
            table.add(n as RawFd, n, Interest::READABLE, Start::Hot, 0);
        }
        table.ask(|_| panic!("too few to ask"));
        assert_eq!(visited(&mut table).len(), MANY_HOT - 1);
        table.add(70, 70, Interest::BOTH, Start::Hot, 0);
        let answer = |questions: &mut [libc::pollfd]| {
            assert_eq!(questions.len(), MANY_HOT);
            for question in questions.iter_mut() {
                let both = question.fd == 70;
                let wanted = if both { Interest::BOTH } else { Interest::READABLE };
                assert_eq!(question.events as u16 as u32, wanted.poll_mask());
                question.revents = match question.fd {
                    1 => libc::POLLIN | libc::POLLRDHUP,
                    70 => libc::POLLOUT,
                    _ => 0,
                };
            }
            true
        };
        table.ask(answer);
        let ready = |readable, writable| Readiness::Ready { readable, writable, hangup: false };
        assert_eq!(visited(&mut table), [(1, ready(true, false)), (70, ready(false, true))]);
        // The answers are those of one turn.
        assert_eq!(visited(&mut table).len(), MANY_HOT);
        // And where there are none, everything is tried.
        table.ask(|_| false);
        assert!(visited(&mut table).iter().all(|(_, readiness)| *readiness == Readiness::Hot));
    }

    #[test]
    fn what_the_ring_reported_is_not_forgotten_over_an_answer() {
        let mut table = table();
        let quiet = table.add(9, 42, Interest::READABLE, Start::Quiet, 0);
        for n in 0..MANY_HOT as u64 {
            table.add(20 + n as RawFd, n, Interest::READABLE, Start::Hot, 0);
        }
        let (_, user_data) = armed(ops(&mut table)[0]);
        assert!(table.poll_completed(user_data, libc::POLLHUP.into(), 0));
        table.ask(|_| true);
        let visits: Vec<_> =
            (0..table.hot_count()).filter_map(|position| table.visit(position)).collect();
        let hangup = Readiness::Ready { readable: false, writable: false, hangup: true };
        assert_eq!(visits, [(quiet, 42, hangup)]);
    }

    #[test]
    fn a_failed_poll_is_reported_as_a_hang_up() {
        let mut table = table();
        table.add(9, 1, Interest::READABLE, Start::Quiet, 0);
        let (_, user_data) = armed(ops(&mut table)[0]);
        assert!(table.poll_completed(user_data, -libc::EBADF, 0));
        let (_, _, readiness) = table.visit(0).unwrap();
        assert!(readiness.may_read() && readiness.may_write());
    }
}
