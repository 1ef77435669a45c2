//! When an idle lane spins, yields its core, stands by or parks, and whether it is dedicated.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use crate::{
    AssistMode, Driver, LaneConfig, Spin,
    core_watch::{CoreWatch, Courtesy},
    placement::{self, CoreClaim},
    shared::{DEDICATED, DRIVEN_NS, Shared},
};

/// A dedicated lane reads the clock every so many turns only.
const CLOCK_EVERY: u32 = 8;
const EVALUATE_EVERY_NS: u64 = 1_000_000_000;
/// Calls of `assist` between two idle turns of the lane that mean that callers drive.
const DRIVING_CALLS: u64 = 2;
/// Allowed cores per lane from which on a lane with a claimed core is dedicated.
const CORES_PER_LANE: usize = 4;
/// Gaps between turns that are worth remembering.
const GAP_NS: u64 = 100_000;
/// After a yield that came back late (another thread holds on to this core) an idle lane parks at once for so long: a
/// sleeping thread gets its core back in microseconds, a yielding one after a time slice. Shorter at first, so that a
/// passing disturbance does not make every packet of a tenth of a second pay for a wake-up.
const PARK_AT_ONCE_FIRST_NS: u64 = 10_000_000;
const PARK_AT_ONCE_MAX_NS: u64 = 100_000_000;

/// A late yield counts if another came at most so long before it: a few time slices.
const LATE_AGAIN_NS: u64 = 20_000_000;

/// Lanes of this process that never park.
static SPINNING_LANES: AtomicUsize = AtomicUsize::new(0);

/// What an idle lane does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Idle {
    Turn,
    Standby,
    Park,
}

pub(crate) struct Policy {
    /// None: never parks.
    spin_ns: Option<u64>,
    assist: AssistMode,
    claim: Option<CoreClaim>,
    counts_as_spinning: bool,
    dedicated: bool,
    turns_since_clock: u32,
    /// The clock was read between turns; the next turn need not.
    fresh_ns: Option<u64>,
    idle_since_ns: Option<u64>,
    last_turn_ns: Option<u64>,
    seen_calls: u64,
    park_at_once_until_ns: u64,
    park_at_once_for_ns: u64,
    /// When the last late yield came back.
    late_yield_ns: Option<u64>,
    /// Tasks ran between the last two turns: the lane is polled by its own tasks, as by a caller that assists.
    has_busy_tasks: bool,
    watch: CoreWatch,
    evaluate_at_ns: u64,
    throttled: Option<u64>,
}

impl Policy {
    pub(crate) fn new(config: &LaneConfig) -> Self {
        let (spin_ns, counts_as_spinning) = match config.spin {
            Spin::For(time) => (Some(time.as_nanos().min(u64::MAX as u128) as u64), false),
            Spin::Forever => match spin_is_affordable() {
                true => (None, true),
                false => (Some(Duration::from_micros(50).as_nanos() as u64), false),
            },
        };
        Self {
            spin_ns,
            assist: config.assist,
            claim: config.claim.clone(),
            counts_as_spinning,
            dedicated: false,
            turns_since_clock: 0,
            fresh_ns: None,
            idle_since_ns: None,
            last_turn_ns: None,
            seen_calls: 0,
            park_at_once_until_ns: 0,
            park_at_once_for_ns: 0,
            late_yield_ns: None,
            has_busy_tasks: false,
            watch: CoreWatch::NEW,
            evaluate_at_ns: 0,
            throttled: None,
        }
    }

    pub(crate) fn is_dedicated(&self) -> bool {
        self.dedicated
    }

    /// Decides whether the lane is dedicated. Reads files in automatic mode: not for the hot path.
    pub(crate) fn evaluate<D: Driver>(&mut self, shared: &Shared<D>) {
        self.dedicated = match self.assist {
            AssistMode::Always => false,
            AssistMode::Never => true,
            AssistMode::Auto if self.spin_ns.is_none() => true,
            AssistMode::Auto => self.has_enough_cores(),
        };
        if self.dedicated {
            shared.mode.fetch_or(DEDICATED, Ordering::AcqRel);
        } else {
            shared.mode.fetch_and(!DEDICATED, Ordering::AcqRel);
        }
    }

    fn has_enough_cores(&mut self) -> bool {
        let Some(claim) = &self.claim else { return false };
        let claimed_core = claim.core();
        // The lane's own thread is pinned: the process's mask is what its main thread has.
        let Ok(allowed) = placement::process_cores() else { return false };
        let lanes = placement::claimed_cores(&allowed).len().max(1);
        let before = std::mem::replace(&mut self.throttled, placement::throttled_periods());
        let is_throttled = matches!((before, self.throttled), (Some(a), Some(b)) if b > a);
        allowed.contains(claimed_core) && allowed.len() >= CORES_PER_LANE * lanes && !is_throttled
    }

    /// The clock for the next turn, if it need not be read in it. None: the turn reads it when it needs it.
    pub(crate) fn clock_for_turn<D: Driver>(&mut self, shared: &Shared<D>) -> Option<u64> {
        if let Some(now_ns) = self.fresh_ns.take() {
            return Some(self.note_turn(shared, now_ns));
        }
        self.turns_since_clock += 1;
        if self.dedicated && self.turns_since_clock < CLOCK_EVERY {
            return None;
        }
        Some(self.note_turn(shared, shared.clock_ns()))
    }

    fn note_turn<D: Driver>(&mut self, shared: &Shared<D>, now_ns: u64) -> u64 {
        self.turns_since_clock = 0;
        self.watch.turn(now_ns);
        if let Some(last) = self.last_turn_ns.replace(now_ns) {
            let gap = now_ns.saturating_sub(last);
            if gap > GAP_NS
                && let Ok(mut gaps) = shared.counters.gaps.try_lock()
            {
                gaps.record(gap);
            }
        }
        now_ns
    }

    /// Whether tasks ran since the last turn: the lane is not idle then.
    pub(crate) fn tasks_are_busy(&mut self, busy: bool) {
        self.has_busy_tasks = busy;
    }

    /// The lane slept.
    pub(crate) fn woke<D: Driver>(&mut self, shared: &Shared<D>) {
        self.idle_since_ns = None;
        self.last_turn_ns = None;
        self.fresh_ns = Some(shared.clock_ns());
        self.seen_calls = shared.drive.calls.load(Ordering::Relaxed);
        // Who asked for the turns while the thread slept had them; whoever still wants them asks again.
        shared.drive.wanted.store(false, Ordering::Relaxed);
    }

    /// After a turn at `now_ns`. One load of what callers seldom write, where none of them waits.
    pub(crate) fn decide<D: Driver>(
        &mut self,
        shared: &Shared<D>,
        now_ns: u64,
        progress: bool,
        has_tasks: bool,
        must_poll: impl FnOnce() -> bool,
        may_hand_over: impl FnOnce() -> bool,
    ) -> Idle {
        if shared.drive.wanted.load(Ordering::Relaxed) {
            shared.drive.wanted.store(false, Ordering::Relaxed);
            if !self.dedicated && !has_tasks && may_hand_over() {
                return Idle::Standby;
            }
        }
        if progress || self.has_busy_tasks {
            self.idle_since_ns = None;
            return Idle::Turn;
        }
        if !self.dedicated && !has_tasks {
            let calls = shared.drive.calls.load(Ordering::Relaxed);
            let driven = calls.wrapping_sub(std::mem::replace(&mut self.seen_calls, calls));
            if driven >= DRIVING_CALLS {
                return Idle::Standby;
            }
        }
        let since = *self.idle_since_ns.get_or_insert(now_ns);
        let Some(spin_ns) = self.spin_ns else { return Idle::Turn };
        let is_over = now_ns - since >= spin_ns || now_ns < self.park_at_once_until_ns;
        if !is_over || must_poll() {
            return Idle::Turn;
        }
        if now_ns >= self.evaluate_at_ns {
            self.evaluate_at_ns = now_ns + EVALUATE_EVERY_NS;
            if self.assist == AssistMode::Auto && self.claim.is_some() {
                self.evaluate(shared);
            }
        }
        // Callers that drive would be woken for in vain: a parked lane watches its descriptors.
        let last_ns = shared.drive.last_turn_ns.load(Ordering::Relaxed);
        let is_driven = last_ns != 0 && shared.clock_ns().saturating_sub(last_ns) <= DRIVEN_NS;
        if is_driven && !self.dedicated && !has_tasks { Idle::Standby } else { Idle::Park }
    }

    /// Between idle turns, without the token unless dedicated.
    pub(crate) fn pause<D: Driver>(&mut self, shared: &Shared<D>, now_ns: u64) {
        let polls_on = self.dedicated
            || (self.has_busy_tasks && self.watch.courtesy(now_ns) == Courtesy::None);
        if polls_on {
            std::hint::spin_loop();
        } else {
            self.yield_core(shared);
        }
    }

    /// Yields the core, and notes how long it was away.
    pub(crate) fn yield_core<D: Driver>(&mut self, shared: &Shared<D>) {
        let before = shared.clock_ns();
        std::thread::yield_now();
        let after = shared.clock_ns();
        self.fresh_ns = Some(after);
        if self.watch.yielded(before, after) {
            shared.counters.late_yields.add(1);
            // One late yield may be the hypervisor's doing; a thread that holds on to the core makes each one late.
            let last_ns = self.late_yield_ns.replace(after);
            if last_ns.is_none_or(|last_ns| before.saturating_sub(last_ns) > LATE_AGAIN_NS) {
                return;
            }
            // Late again as soon as it was tried again: the other thread is there to stay.
            let is_repeated = before <= self.park_at_once_until_ns + self.park_at_once_for_ns;
            self.park_at_once_for_ns = match is_repeated {
                true => {
                    (self.park_at_once_for_ns * 2).clamp(PARK_AT_ONCE_FIRST_NS, PARK_AT_ONCE_MAX_NS)
                }
                false => PARK_AT_ONCE_FIRST_NS,
            };
            self.park_at_once_until_ns = after + self.park_at_once_for_ns;
        }
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if self.counts_as_spinning {
            SPINNING_LANES.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Whether the cgroup's quota allows one more lane that never parks. Counts it if so; says so once if not.
fn spin_is_affordable() -> bool {
    let lanes = SPINNING_LANES.fetch_add(1, Ordering::AcqRel) + 1;
    match placement::cpu_quota() {
        Some(quota) if quota < lanes as f64 => {
            SPINNING_LANES.fetch_sub(1, Ordering::AcqRel);
            static ONCE: std::sync::Once = std::sync::Once::new();
            ONCE.call_once(|| {
                tracing::warn!(
                    quota,
                    lanes,
                    "the cgroup's cpu.max grants less CPU than lanes that never park would use: they spin for 50 us only; raise the limit or configure a finite spin"
                );
            });
            false
        }
        _ => true,
    }
}
