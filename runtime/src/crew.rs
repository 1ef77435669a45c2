//! Lanes of one process that have no core of their own: while several are busy, one of them turns those that have little to do.
//!
//! Each on a thread of its own would poll and yield its core to the next, and a message would wait for its turn among all of
//! them, and for whoever else the scheduler puts between. So a lane that finds nothing to do *rests* while another *leads*: its
//! thread sleeps, and the leader turns its pump, as a caller that assists would. What takes long goes back to the lane's own
//! thread, so that large transfers still use all cores; what is idle for long parks as always. A lane with a claimed core leads
//! rather than one without, and never rests; a dedicated one does neither.

use std::sync::{
    Arc, Mutex, TryLockError, Weak,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use crate::{
    Driver,
    shared::{Shared, Turn, lock},
};

/// A leader that was not seen for so long is held up: its place can be taken, and nobody counts on it.
const LED_NS: u64 = 1_000_000;
/// A turn for another lane that takes longer is work for that lane's own thread.
pub(crate) const LONG_NS: u64 = 50_000;
/// A resting lane without progress for so long parks: trying its descriptors would cost the others 0.5 us a round.
const IDLE_NS: u64 = 1_000_000;
/// Who was turned by a caller this recently is left to callers.
const CALLERS_NS: u64 = 300_000;

/// A lane, as its leader sees it.
trait Member: Send + Sync {
    /// Whether its thread sleeps and counts on the leader, or was called and is not awake yet: with busy cores that may take
    /// milliseconds.
    fn rests(&self) -> bool;
    /// One turn, at this time of the process's clock. False: nothing was done.
    fn turn(&self, now_ns: u64) -> bool;
    /// Wakes its thread. `parks`: it was idle for long enough.
    fn call(&self, parks: bool);
}

impl<D: Driver> Member for Shared<D> {
    fn rests(&self) -> bool {
        self.drive.rests.load(Ordering::Relaxed)
    }

    fn turn(&self, now_ns: u64) -> bool {
        if self.is_left_to_callers(now_ns) || !self.token.try_acquire() {
            return false;
        }
        // SAFETY: the token was just acquired, and a leader is in no turn.
        let (turn, needs_lane) = unsafe {
            let turn = self.turn(None, Some(now_ns.saturating_sub(self.epoch_ns)));
            let needs_lane = self.token.with(|core| {
                core.pump.cool_calm();
                core.pump.needs_lane()
            });
            (turn, needs_lane)
        };
        self.counters.led_turns.add(1);
        self.token.release();
        if needs_lane || turn == Turn::Ended {
            self.wakeup.call_attention();
        }
        turn == Turn::Progress
    }

    fn call(&self, parks: bool) {
        if parks {
            self.drive.parks_next.store(true, Ordering::Relaxed);
        }
        self.wakeup.call_attention();
    }
}

impl<D: Driver> Shared<D> {
    /// The time of the clock that all lanes of the process share.
    pub(crate) fn process_ns(&self) -> u64 {
        self.clock_ns() + self.epoch_ns
    }

    /// Whether a caller has turned this lane's pump just now.
    pub(crate) fn is_left_to_callers(&self, now_ns: u64) -> bool {
        let last_ns = self.drive.last_turn_ns.load(Ordering::Relaxed);
        last_ns != 0 && now_ns.saturating_sub(last_ns + self.epoch_ns) <= CALLERS_NS
    }
}

/// All lanes of the process that are not dedicated.
pub(crate) struct Crew {
    /// Number of the lane that leads; 0: none.
    leader: AtomicU64,
    /// When the leader was last seen, by the process's clock.
    led_ns: AtomicU64,
    /// Lanes whose threads sleep and count on it.
    resting: AtomicUsize,
    /// Lanes that may rest.
    count: AtomicUsize,
    /// Changes with the list.
    generation: AtomicU64,
    members: Mutex<Vec<(u64, Weak<dyn Member>)>>,
}

static CREW: Crew = Crew::new();
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(1);
/// In numbers: this lane has claimed its core.
const CLAIMED: u64 = 1 << 63;

impl Crew {
    const fn new() -> Self {
        Self {
            leader: AtomicU64::new(0),
            led_ns: AtomicU64::new(0),
            resting: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
            members: Mutex::new(Vec::new()),
        }
    }

    fn is_led_by_another(&self, number: u64, now_ns: u64) -> bool {
        let leader = self.leader.load(Ordering::SeqCst);
        leader != 0 && leader != number && self.is_recent(now_ns)
    }

    fn is_recent(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.led_ns.load(Ordering::Relaxed)) <= LED_NS
    }

    /// Makes that lane the leader, if it is not and can be.
    fn take_lead(&self, number: u64, now_ns: u64) -> bool {
        let leader = self.leader.load(Ordering::Relaxed);
        if leader != number {
            let outranks = number & CLAIMED != 0 && leader & CLAIMED == 0;
            if leader != 0 && !outranks && self.is_recent(now_ns) {
                return false;
            }
            let (set, fail) = (Ordering::SeqCst, Ordering::Relaxed);
            if self.leader.compare_exchange(leader, number, set, fail).is_err() {
                return false;
            }
        }
        self.led_ns.store(now_ns, Ordering::Relaxed);
        true
    }
}

/// Whether somebody leads just now: lanes that rest are looked after.
pub(crate) fn is_led(now_ns: u64) -> bool {
    CREW.is_led_by_another(0, now_ns)
}

/// A lane's place in the crew, for its own thread.
pub(crate) struct Place {
    crew: &'static Crew,
    number: u64,
    leads: bool,
    generation: u64,
    followers: Vec<Follower>,
}

struct Follower {
    member: Arc<dyn Member>,
    active_ns: u64,
}

impl Place {
    /// A lane with a claimed core leads if need be. One without rests, too.
    pub(crate) fn join<D: Driver>(shared: &Arc<Shared<D>>, claimed: bool) -> Self {
        Self::join_crew(&CREW, shared, claimed)
    }

    fn join_crew<D: Driver>(crew: &'static Crew, shared: &Arc<Shared<D>>, claimed: bool) -> Self {
        let flag = if claimed { CLAIMED } else { 0 };
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed) | flag;
        if !claimed {
            let member: Weak<dyn Member> = Arc::downgrade(&(shared.clone() as Arc<dyn Member>));
            lock(&crew.members).push((number, member));
            crew.count.fetch_add(1, Ordering::Relaxed);
            crew.generation.fetch_add(1, Ordering::Release);
        }
        Self { crew, number, leads: false, generation: 0, followers: Vec::new() }
    }

    fn is_claimed(&self) -> bool {
        self.number & CLAIMED != 0
    }

    /// Whether there is anybody to lead, or to be led by. A load in a process with one lane.
    #[inline]
    pub(crate) fn has_others(&self) -> bool {
        self.crew.count.load(Ordering::Relaxed) > usize::from(!self.is_claimed())
    }

    /// Whether a lane that has nothing to do may rest.
    pub(crate) fn may_rest(&self, now_ns: u64) -> bool {
        !self.is_claimed() && self.has_others() && self.is_led(now_ns)
    }

    /// Whether another lane leads.
    pub(crate) fn is_led(&self, now_ns: u64) -> bool {
        self.crew.is_led_by_another(self.number, now_ns)
    }

    /// Whether it leads others just now.
    pub(crate) fn has_followers(&self) -> bool {
        self.leads && self.crew.resting.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn begin_rest(&self) {
        self.crew.resting.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn end_rest(&self) {
        self.crew.resting.fetch_sub(1, Ordering::SeqCst);
    }

    /// Leads, where nobody else does: a turn for each lane that rests. True: one of them made progress.
    pub(crate) fn lead(&mut self, clock: impl Fn() -> u64) -> bool {
        let begin_ns = clock();
        if !self.crew.take_lead(self.number, begin_ns) {
            self.forget();
            return false;
        }
        self.leads = true;
        if self.crew.resting.load(Ordering::Relaxed) == 0 {
            return false;
        }
        self.look_around(begin_ns);
        let mut worked = false;
        let mut now_ns = begin_ns;
        for follower in &mut self.followers {
            if !follower.member.rests() {
                follower.active_ns = now_ns;
                continue;
            }
            let progress = follower.member.turn(now_ns);
            let after_ns = clock();
            self.crew.led_ns.store(after_ns, Ordering::Relaxed);
            if progress {
                (worked, follower.active_ns) = (true, after_ns);
            }
            if after_ns.saturating_sub(now_ns) > LONG_NS {
                follower.member.call(false);
            } else if after_ns.saturating_sub(follower.active_ns) > IDLE_NS {
                follower.active_ns = after_ns;
                follower.member.call(true);
            }
            now_ns = after_ns;
        }
        worked
    }

    /// Notices who came and went. Waits for nobody: whoever comes just now is seen the next time.
    fn look_around(&mut self, now_ns: u64) {
        let generation = self.crew.generation.load(Ordering::Acquire);
        if generation == self.generation {
            return;
        }
        let members = match self.crew.members.try_lock() {
            Ok(members) => members,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        self.followers.clear();
        let others = members.iter().filter(|(number, _)| *number != self.number);
        let follower = |member| Follower { member, active_ns: now_ns };
        self.followers.extend(others.filter_map(|(_, it)| it.upgrade()).map(follower));
        self.generation = generation;
    }

    /// Leads no more, if it did. Those that count on it go on by themselves: `idle` ones to sleep.
    pub(crate) fn step_down(&mut self, idle: bool) {
        if !std::mem::take(&mut self.leads) {
            return;
        }
        self.forget();
        let (set, fail) = (Ordering::SeqCst, Ordering::Relaxed);
        if self.crew.leader.compare_exchange(self.number, 0, set, fail).is_err()
            || self.crew.resting.load(Ordering::SeqCst) == 0
        {
            return;
        }
        for (_, member) in lock(&self.crew.members).iter() {
            if let Some(member) = member.upgrade().filter(|member| member.rests()) {
                member.call(idle);
            }
        }
    }

    /// Lets go of the others, which may end meanwhile.
    fn forget(&mut self) {
        self.leads = false;
        if !self.followers.is_empty() {
            self.followers.clear();
            self.generation = 0;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.step_down(false);
        if !self.is_claimed() {
            lock(&self.crew.members).retain(|(number, _)| *number != self.number);
            self.crew.count.fetch_sub(1, Ordering::Relaxed);
            self.crew.generation.fetch_add(1, Ordering::Release);
        }
    }
}
