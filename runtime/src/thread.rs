//! The lane's thread: start, the loop of turns, tasks, sleeping, and the end.

use std::{
    cell::{Cell, RefCell},
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    sync::{Arc, atomic::Ordering, mpsc::SyncSender},
    time::{Duration, Instant},
};

use slab::Slab;

use crate::{
    Cx, Driver, LaneConfig, LaneError,
    error::panic_message,
    executor::{Executor, yield_to_tasks},
    placement,
    policy::{Idle, Policy},
    pump::{COOL_EVERY_NS, Intent, Pump, TICK_BITS},
    ring::{Doorbell, Ring, WordOp},
    shared::{Core, DEDICATED, DRIVEN_NS, ENDED, Shared, Turn, lock},
    sleep::LaneState,
    task::{Job, LaneLocal},
};

/// While tasks live, a spinning lane looks after glommio's I/O and timers this often.
const PASS_EVERY_NS: u64 = 2_000_000;
/// While tasks live, a parked lane looks after glommio's I/O and timers this often.
const PARK_WITH_TASKS_NS: u64 = 4_000_000;
/// How long a stand-by sleeps before it looks whether callers still drive. Looking costs the caller on this core some
/// microseconds; a caller that has left costs everybody else what is left of the sleep. So: the first, doubling up to
/// the second, and beyond it a sixteenth of the time that callers have been driving, up to the third.
const STANDBY_FIRST_NS: u64 = 200_000;
const STANDBY_DOUBLING_NS: u64 = 2_000_000;
const STANDBY_MAX_NS: u64 = 10_000_000;
const STANDBY_SHARE: u64 = 16;
/// The most where the lane had work when it stood by: a caller that leaves its bulk half way must not stop it for long.
const STANDBY_BUSY_NS: u64 = 1_000_000;
/// A stand-by that begins this soon after the last goes on where that was.
const STANDBY_AGAIN_NS: u64 = 5_000_000;

type Started<D> = SyncSender<Result<Arc<Shared<D>>, LaneError>>;

/// Runs `f` with all signals blocked, so that a thread that it makes never takes one.
pub(crate) fn with_signals_blocked<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: valid structures; sigfillset initialises the one, pthread_sigmask the other.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        let blocked = libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before) == 0;
        let result = f();
        if blocked {
            libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        }
        result
    }
}

/// The thread's main function.
pub(crate) fn run<D: Driver>(
    config: LaneConfig,
    make: impl FnOnce(&mut Cx<'_>) -> D,
    started: &Started<D>,
) {
    let (thread, executor) = match start(config, make) {
        Ok(parts) => parts,
        Err(error) => {
            _ = started.send(Err(error));
            return;
        }
    };
    let shared = thread.local.shared.clone();
    let sent = started.send(Ok(shared.clone()));
    if sent.is_ok() {
        thread.live(executor);
    }
    let mut life = lock(&shared.life);
    life.finished = true;
    shared.life_changed.notify_all();
}

fn start<D: Driver>(
    config: LaneConfig,
    make: impl FnOnce(&mut Cx<'_>) -> D,
) -> Result<(LaneThread<D>, Executor), LaneError> {
    if let Some(core) = config.core {
        placement::pin_thread(core).map_err(|source| LaneError::Pin { core, source })?;
    }
    crate::preflight::check_thread()?;
    let executor = Executor::new().map_err(LaneError::Executor)?;
    let doorbell = Arc::new(Doorbell::new().map_err(crate::preflight::out_of_fds)?);
    let ring = Ring::new(doorbell.clone()).map_err(LaneError::Ring)?;
    let epoch = Instant::now();
    let mut pump = Pump::new(epoch, config.expected_fds, ring.can_wait_for_words());
    let driver = catch_unwind(AssertUnwindSafe(|| make(&mut Cx { pump: &mut pump })))
        .map_err(|payload| LaneError::MakeDriver(panic_message(&*payload)))?;
    let policy = Policy::new(&config);
    let state = Core { driver: Some(driver), pump };
    let shared =
        Arc::new(Shared::new(config.name, config.core, epoch, config.inbox_slots, doorbell, state));
    shared.adopt_thread();
    let local = Rc::new(LaneLocal {
        shared,
        holds_token: Cell::new(true),
        entered: Cell::new(false),
        tasks: RefCell::new(Slab::new()),
        ended_tasks: RefCell::default(),
        alive: Cell::new(0),
        drain: Cell::new(0),
        drains: Cell::new(0),
        deferred: RefCell::default(),
        task_ran: Cell::new(false),
    });
    let thread = LaneThread {
        local,
        ring,
        policy,
        max_hot_fds: config.max_hot_fds,
        cool_at_ns: 0,
        turn_ns: 0,
        jobs: Vec::new(),
        standby: Standby { for_ns: STANDBY_FIRST_NS, ..Standby::default() },
    };
    Ok((thread, executor))
}

/// Where the last stand-by was when it ended.
#[derive(Default)]
struct Standby {
    since_ns: u64,
    for_ns: u64,
    ended_ns: u64,
    /// There was work at its beginning.
    is_busy: bool,
}

struct LaneThread<D: Driver> {
    local: Rc<LaneLocal<D>>,
    ring: Ring,
    policy: Policy,
    max_hot_fds: usize,
    cool_at_ns: u64,
    /// The clock of the last turn.
    turn_ns: u64,
    /// Tasks that are still to be made.
    jobs: Vec<Job<D>>,
    standby: Standby,
}

/// What the loop does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Turn,
    Standby,
    /// Asleep until an event, or this many nanoseconds have passed.
    Park(Option<u64>),
    End,
}

impl<D: Driver> LaneThread<D> {
    fn live(mut self, executor: Executor) {
        self.policy.evaluate(&self.local.shared);
        loop {
            self.take_attention();
            let has_tasks = self.local.alive.get() > 0 || !self.jobs.is_empty();
            let next = if has_tasks { executor.run(self.turn_among_tasks()) } else { self.turn() };
            self.local.forget_ended_tasks();
            match next {
                Next::Turn => {}
                Next::Standby => self.stand_by(),
                Next::Park(timeout) => {
                    if self.local.alive.get() > 0 {
                        self.local.task_ran.set(false);
                        self.local.begin_drain();
                        if executor.pass() || self.local.task_ran.get() {
                            continue;
                        }
                    }
                    self.park(timeout);
                }
                Next::End => break,
            }
        }
        self.end(executor);
    }

    /// Turns inside the executor, so that tasks run between turns and are woken directly.
    async fn turn_among_tasks(&mut self) -> Next {
        self.local.end_drain();
        let mut pass_at_ns = None;
        loop {
            self.take_attention();
            for job in self.jobs.drain(..) {
                job(&self.local);
            }
            let next = self.turn();
            if next != Next::Turn || self.local.alive.get() == 0 {
                return next;
            }
            self.local.task_ran.set(false);
            yield_to_tasks().await;
            self.policy.tasks_are_busy(self.local.task_ran.get());
            // glommio looks after its own I/O and timers at the start of a run only.
            if self.turn_ns >= *pass_at_ns.get_or_insert(self.turn_ns + PASS_EVERY_NS) {
                self.local.begin_drain();
                return Next::Turn;
            }
            if !self.local.ended_tasks.borrow().is_empty() {
                self.local.forget_ended_tasks();
            }
        }
    }

    fn take_attention(&mut self) {
        let wakeup = &self.local.shared.wakeup;
        if !wakeup.attention.load(Ordering::Relaxed) {
            return;
        }
        // Cleared before the work is looked for: what comes later raises it again.
        wakeup.attention.swap(false, Ordering::AcqRel);
        self.jobs.append(&mut lock(&self.local.shared.jobs));
        let woken = std::mem::take(&mut *lock(&wakeup.woken));
        for waker in woken {
            waker.wake_here();
        }
    }

    /// One turn, and the decision what to do next. Leaves the token with the lane only if it is dedicated.
    fn turn(&mut self) -> Next {
        let local = self.local.clone();
        let shared = &*local.shared;
        if !local.holds_token.get() {
            if !shared.token.try_acquire() {
                // A caller is turning the pump.
                self.policy.yield_core(shared);
                return Next::Turn;
            }
            local.holds_token.set(true);
        }
        local.entered.set(true);
        // SAFETY: this thread holds the token and was in no turn.
        let turn = unsafe { shared.turn(Some(&mut self.ring), self.policy.clock_for_turn(shared)) };
        shared.counters.turns.add(1);
        let next = match turn {
            Turn::Ended => Next::End,
            Turn::Progress | Turn::Idle => self.after_turn(shared, turn == Turn::Progress),
        };
        local.entered.set(false);
        let keep = next == Next::Turn && self.policy.is_dedicated();
        if !keep {
            local.holds_token.set(false);
            shared.token.release();
        }
        if next == Next::Turn && turn == Turn::Idle {
            self.policy.pause(shared, self.turn_ns);
        }
        next
    }

    /// With the token held.
    fn after_turn(&mut self, shared: &Shared<D>, progress: bool) -> Next {
        if shared.stop_requested.load(Ordering::Relaxed) {
            return self.stop_turn(shared);
        }
        // SAFETY: called between turns by the holder of the token.
        unsafe {
            shared.token.with(|core| {
                let pump = &mut core.pump;
                let now_ns = pump.recent_ns();
                self.turn_ns = now_ns;
                if now_ns >= self.cool_at_ns {
                    self.cool_at_ns = now_ns + COOL_EVERY_NS;
                    pump.fds.cool_idle(now_ns, self.max_hot_fds, false);
                }
                pump.intent = Intent::Turn;
                let has_tasks = self.local.alive.get() > 0;
                let must_poll = || core.driver.as_ref().is_some_and(Driver::must_poll);
                let may_hand_over = || core.driver.as_ref().is_some_and(Driver::may_hand_over);
                let decision = self.policy.decide(
                    shared,
                    now_ns,
                    progress,
                    has_tasks,
                    must_poll,
                    may_hand_over,
                );
                let next = match decision {
                    Idle::Turn => Next::Turn,
                    Idle::Standby => {
                        pump.intent = Intent::Standby;
                        // What has to be polled makes no progress until it ends.
                        self.standby.is_busy =
                            progress || core.driver.as_ref().is_some_and(Driver::must_poll);
                        Next::Standby
                    }
                    Idle::Park
                        if core
                            .driver
                            .as_mut()
                            .is_some_and(|driver| !driver.before_sleep(&mut Cx { pump })) =>
                    {
                        Next::Turn
                    }
                    Idle::Park => {
                        pump.fds.cool_idle(now_ns, 0, true);
                        let until_tick = pump.wheel.next_tick().unwrap_or(u64::MAX);
                        pump.intent = Intent::Park { until_tick };
                        let timer_ns = (until_tick != u64::MAX)
                            .then(|| (until_tick << TICK_BITS).saturating_sub(shared.clock_ns()));
                        let task_ns = has_tasks.then_some(PARK_WITH_TASKS_NS);
                        Next::Park(timer_ns.into_iter().chain(task_ns).min())
                    }
                };
                if pump.has_ring_work() {
                    self.queue_ring_work(shared, pump);
                    if !matches!(next, Next::Park(_)) {
                        self.report(shared, Ring::submit);
                    }
                }
                next
            })
        }
    }

    /// With the token held: the driver finishes what it can, until the deadline.
    fn stop_turn(&mut self, shared: &Shared<D>) -> Next {
        let deadline = shared.stop_deadline_ns.load(Ordering::Acquire);
        // SAFETY: called between turns by the holder of the token.
        unsafe {
            shared.token.with(|core| {
                let Some(driver) = &mut core.driver else { return Next::End };
                let mut cx = Cx { pump: &mut core.pump };
                let stopped = catch_unwind(AssertUnwindSafe(|| driver.on_stop(&mut cx)));
                let stopped = match stopped {
                    Ok(stopped) => stopped,
                    Err(payload) => {
                        shared.die(core, &panic_message(&*payload));
                        true
                    }
                };
                self.queue_ring_work(shared, &mut core.pump);
                self.report(shared, Ring::submit);
                if stopped || shared.clock_ns() >= deadline { Next::End } else { Next::Turn }
            })
        }
    }

    fn queue_ring_work(&mut self, shared: &Shared<D>, pump: &mut Pump) {
        while let Some(op) = pump.fds.next_ring_op() {
            self.report(shared, |ring| ring.queue(op));
        }
        while let Some(op) = pump.words.next_ring_op() {
            let queued = self.ring.queue_word(&op);
            if let (Err(error), WordOp::Wait { user_data, .. }) = (&queued, &op) {
                pump.words.completed(*user_data, -error.raw_os_error().unwrap_or(libc::EIO));
            }
            self.report(shared, |_| queued);
        }
    }

    fn report(&mut self, shared: &Shared<D>, f: impl FnOnce(&mut Ring) -> std::io::Result<()>) {
        if let Err(error) = f(&mut self.ring) {
            tracing::error!(lane = %shared.name, %error, "the lane's ring failed");
        }
    }

    /// Sleeps without the token until an event, the timeout, or new work.
    fn park(&mut self, timeout_ns: Option<u64>) {
        let local = self.local.clone();
        let shared = &*local.shared;
        shared.counters.parks.add(1);
        self.sleep(shared, LaneState::Parked, timeout_ns);
        self.policy.woke(shared);
    }

    /// Sleeps while callers turn the pump; hot descriptors stay unwatched, for watching them would wake this thread for
    /// every packet.
    fn stand_by(&mut self) {
        let local = self.local.clone();
        let shared = &*local.shared;
        let begin_ns = shared.clock_ns();
        if begin_ns.saturating_sub(self.standby.ended_ns) > STANDBY_AGAIN_NS {
            let is_busy = self.standby.is_busy;
            self.standby =
                Standby { since_ns: begin_ns, for_ns: STANDBY_FIRST_NS, ended_ns: 0, is_busy };
        }
        let Standby { since_ns, for_ns, is_busy, .. } = self.standby;
        let most_ns = if is_busy { STANDBY_BUSY_NS } else { STANDBY_MAX_NS };
        let mut for_ns = for_ns.min(most_ns);
        loop {
            shared.counters.standbys.add(1);
            self.sleep(shared, LaneState::Standby, Some(for_ns));
            let last = shared.drive.last_turn_ns.load(Ordering::Relaxed);
            let now_ns = shared.clock_ns();
            // A turn that began longer ago may still be under way.
            let driven = now_ns.saturating_sub(last) <= DRIVEN_NS || shared.token.is_held();
            if !driven
                || self.ring.has_completions()
                || shared.wakeup.attention.load(Ordering::Acquire)
            {
                break;
            }
            let share_ns = (now_ns.saturating_sub(since_ns) / STANDBY_SHARE).min(STANDBY_MAX_NS);
            for_ns = (2 * for_ns).min(STANDBY_DOUBLING_NS).max(share_ns).min(most_ns);
        }
        self.standby = Standby { since_ns, for_ns, ended_ns: shared.clock_ns(), is_busy };
        self.policy.woke(shared);
    }

    fn sleep(&mut self, shared: &Shared<D>, how: LaneState, timeout_ns: Option<u64>) {
        let sleep = &shared.wakeup.sleep;
        sleep.announce(how);
        // In a stand-by messages are for the callers that drive.
        let pending = match how {
            LaneState::Standby => shared.wakeup.attention.load(Ordering::Acquire),
            _ => shared.has_pending(),
        };
        if pending {
            self.report(shared, Ring::submit);
        } else {
            let timeout = timeout_ns.map(Duration::from_nanos);
            self.report(shared, |ring| ring.sleep(timeout));
        }
        sleep.awake();
    }

    fn end(mut self, executor: Executor) {
        let shared = self.local.shared.clone();
        // Callers leave soon: a turn is short.
        while !self.local.holds_token.get() {
            if shared.token.try_acquire() {
                self.local.holds_token.set(true);
            } else {
                std::thread::yield_now();
            }
        }
        shared.mode.fetch_and(!DEDICATED, Ordering::AcqRel);
        shared.mode.fetch_or(ENDED, Ordering::AcqRel);
        // Tasks first: what they drop may still want the driver.
        let jobs = std::mem::take(&mut *lock(&shared.jobs));
        drop(jobs);
        self.jobs.clear();
        let tasks = std::mem::take(&mut *self.local.tasks.borrow_mut());
        executor.shut_down(tasks.into_iter().filter_map(|(_, task)| task).collect());
        self.local.entered.set(true);
        // SAFETY: this thread holds the token and is in no turn.
        unsafe { shared.token.with(|core| shared.abandon(core)) };
        // The token stays held: nobody enters an ended lane.
    }
}
