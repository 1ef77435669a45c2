//! What a lane's thread and everyone who holds its handle share, and one turn of the pump.

use std::{
    cell::Cell,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use crossbeam_utils::CachePadded;

use crate::{
    Cx, Driver,
    error::panic_message,
    inbox::{Inbox, PushError},
    pump::{Pump, TICK_BITS, TimerKind},
    ring::{Doorbell, Ring},
    sleep::{LaneState, Sleep},
    stats::Counters,
    task::{Job, TaskWaker},
    token::Token,
    words::{WordEnd, WordTable},
};

/// Messages, and timers, handled per turn: a turn stays short under any load.
const BATCH: usize = 64;

/// A caller's turn this recent means that callers drive the pump.
pub(crate) const DRIVEN_NS: u64 = 50_000;

/// All that the token protects.
pub(crate) struct Core<D: Driver> {
    /// None once the lane has ended.
    pub(crate) driver: Option<D>,
    pub(crate) pump: Pump,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    Progress,
    Idle,
    /// The lane is dead or has stopped.
    Ended,
}

/// Bits of [`Shared::mode`].
pub(crate) const DEDICATED: u32 = 1;
pub(crate) const ENDED: u32 = 2;

/// How callers tell the lane that they turn its pump.
#[derive(Default)]
pub(crate) struct Drive {
    /// Calls of `assist` so far. Several callers may lose counts to each other, which does not matter.
    pub(crate) calls: AtomicU64,
    /// When the last turn of a caller began, in nanoseconds of the lane's clock.
    pub(crate) last_turn_ns: AtomicU64,
    /// A caller that polls without pause finds the lane's thread in its turns again and again.
    pub(crate) wanted: AtomicBool,
}

/// Wakes the lane's thread. Shared with the wakers of its tasks.
pub(crate) struct Wakeup {
    pub(crate) sleep: Sleep,
    pub(crate) doorbell: Arc<Doorbell>,
    /// Work that is in no inbox: jobs, woken tasks, a stop, ring work of a caller's turn.
    pub(crate) attention: AtomicBool,
    pub(crate) woken: Mutex<Vec<Arc<TaskWaker>>>,
}

impl Wakeup {
    /// The lane's thread has to look at something other than its inbox.
    pub(crate) fn call_attention(&self) {
        self.attention.store(true, Ordering::Release);
        let state = self.sleep.look();
        if self.sleep.claim_wake(state) {
            self.doorbell.ring();
        }
    }
}

/// How a lane's life ends.
#[derive(Default)]
pub(crate) struct Life {
    pub(crate) finished: bool,
    pub(crate) thread: Option<JoinHandle<()>>,
    pub(crate) failure: Option<String>,
}

pub(crate) struct Shared<D: Driver> {
    pub(crate) name: String,
    pub(crate) core: Option<usize>,
    pub(crate) epoch: Instant,
    /// The epoch in nanoseconds of a clock that all lanes of the process share.
    pub(crate) epoch_ns: u64,
    pub(crate) mode: CachePadded<AtomicU32>,
    pub(crate) inbox: Inbox<D::Message>,
    pub(crate) token: Token<Core<D>>,
    pub(crate) drive: CachePadded<Drive>,
    pub(crate) wakeup: Arc<Wakeup>,
    /// Messages of a thread that may not wait for room: it is itself inside a turn, or the lane's. Each with the inbox
    /// position behind which it belongs.
    spill: Mutex<VecDeque<(usize, D::Message)>>,
    has_spill: AtomicBool,
    pub(crate) jobs: Mutex<Vec<Job<D>>>,
    pub(crate) stop_requested: AtomicBool,
    /// Nanoseconds of the lane's clock.
    pub(crate) stop_deadline_ns: AtomicU64,
    pub(crate) life: Mutex<Life>,
    pub(crate) life_changed: Condvar,
    pub(crate) counters: Counters,
}

/// Where the clock that all lanes share begins.
static PROCESS_EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

thread_local! {
    /// The lane whose thread this is.
    static OWN_LANE: Cell<*const ()> = const { Cell::new(std::ptr::null()) };
    /// The lane in whose turn this thread is.
    static IN_TURN: Cell<*const ()> = const { Cell::new(std::ptr::null()) };
}

/// A poisoned lock only means that some other code panicked: the data behind ours is always whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: Driver> Shared<D> {
    /// The token is held by the calling thread, the lane's.
    pub(crate) fn new(
        name: String,
        core: Option<usize>,
        epoch: Instant,
        inbox_slots: usize,
        doorbell: Arc<Doorbell>,
        state: Core<D>,
    ) -> Self {
        Self {
            name,
            core,
            epoch,
            epoch_ns: crate::pump::nanos_since(*PROCESS_EPOCH, epoch),
            mode: CachePadded::new(AtomicU32::new(0)),
            inbox: Inbox::new(inbox_slots),
            token: Token::new_held(state),
            drive: CachePadded::default(),
            wakeup: Arc::new(Wakeup {
                sleep: Sleep::new(),
                doorbell,
                attention: AtomicBool::new(false),
                woken: Mutex::default(),
            }),
            spill: Mutex::default(),
            has_spill: AtomicBool::new(false),
            jobs: Mutex::default(),
            stop_requested: AtomicBool::new(false),
            stop_deadline_ns: AtomicU64::new(u64::MAX),
            life: Mutex::default(),
            life_changed: Condvar::new(),
            counters: Counters::default(),
        }
    }

    pub(crate) fn clock_ns(&self) -> u64 {
        crate::pump::nanos_since(self.epoch, Instant::now())
    }

    pub(crate) fn has_mode(&self, bits: u32) -> bool {
        self.mode.load(Ordering::Acquire) & bits != 0
    }

    pub(crate) fn identity(&self) -> *const () {
        std::ptr::from_ref(self).cast()
    }

    pub(crate) fn adopt_thread(&self) {
        OWN_LANE.set(self.identity());
    }

    pub(crate) fn is_lane_thread(&self) -> bool {
        OWN_LANE.get() == self.identity()
    }

    /// Whether this thread is a lane's, this or another, or inside a turn of one: lanes never wait for lanes, or two of
    /// them could wait for each other.
    pub(crate) fn must_not_wait_for_room(&self) -> bool {
        !OWN_LANE.get().is_null() || !IN_TURN.get().is_null()
    }

    /// Whether this thread must not wait for the lane, because the lane waits for it.
    pub(crate) fn must_not_wait(&self) -> bool {
        self.is_lane_thread() || IN_TURN.get() == self.identity()
    }

    /// Queues a message and wakes the lane if nobody else would see it. Err: full, or ended.
    pub(crate) fn push(&self, message: D::Message) -> Result<(), PushError<D::Message>> {
        let message = if self.must_not_wait_for_room() {
            match self.push_or_spill(message)? {
                Some(message) => message,
                None => return Ok(()),
            }
        } else {
            message
        };
        self.inbox.push(message)?;
        self.ring_for_message();
        Ok(())
    }

    /// For a thread that may not wait: Some(message) if it may go to the inbox.
    fn push_or_spill(
        &self,
        message: D::Message,
    ) -> Result<Option<D::Message>, PushError<D::Message>> {
        if !self.has_spill.load(Ordering::Acquire) {
            match self.inbox.push(message) {
                Ok(()) => {
                    self.ring_for_message();
                    return Ok(None);
                }
                Err(PushError::Closed(message)) => return Err(PushError::Closed(message)),
                Err(PushError::Full(message)) => return self.spill(message),
            }
        }
        self.spill(message)
    }

    fn spill(&self, message: D::Message) -> Result<Option<D::Message>, PushError<D::Message>> {
        let mut spill = lock(&self.spill);
        if self.has_mode(ENDED) {
            return Err(PushError::Closed(message));
        }
        spill.push_back((self.inbox.positions().0, message));
        self.has_spill.store(true, Ordering::Release);
        drop(spill);
        self.wakeup.call_attention();
        Ok(None)
    }

    /// The oldest spilled message whose turn has come.
    fn unspill(&self) -> Option<D::Message> {
        let mut spill = lock(&self.spill);
        let (_, head) = self.inbox.positions();
        let reached = spill.front().is_some_and(|(position, _)| {
            (head.wrapping_sub(*position).wrapping_mul(2)) as isize >= 0
        });
        let message = if reached { spill.pop_front().map(|(_, message)| message) } else { None };
        self.has_spill.store(!spill.is_empty(), Ordering::Release);
        message
    }

    pub(crate) fn ring_for_message(&self) {
        let state = self.wakeup.sleep.look();
        match state {
            LaneState::Awake => return,
            // Whoever drives the pump will see the message; the lane looks again within ten milliseconds anyway.
            LaneState::Standby => {
                let last = self.drive.last_turn_ns.load(Ordering::Relaxed);
                if self.clock_ns().saturating_sub(last) <= DRIVEN_NS {
                    return;
                }
            }
            LaneState::Parked => {}
        }
        if self.wakeup.sleep.claim_wake(state) {
            self.counters.doorbells.fetch_add(1, Ordering::Relaxed);
            self.wakeup.doorbell.ring();
        }
    }

    /// Whether the lane's thread, about to sleep, has work after all.
    pub(crate) fn has_pending(&self) -> bool {
        self.inbox.has_values() || self.wakeup.attention.load(Ordering::Acquire)
    }

    /// One turn of the pump, on the lane's thread (with its ring) or on a caller's. A panic of the driver ends the lane.
    ///
    /// # Safety
    /// The calling thread holds the token and is in no other turn of this lane.
    pub(crate) unsafe fn turn(&self, ring: Option<&mut Ring>, now_ns: Option<u64>) -> Turn {
        if self.has_mode(ENDED) {
            return Turn::Ended;
        }
        let outer = IN_TURN.replace(self.identity());
        // SAFETY: the caller's promise.
        let result = unsafe {
            self.token.with(|core| {
                core.pump.begin_turn(ring.is_some());
                if let Some(now_ns) = now_ns {
                    core.pump.set_now_ns(now_ns);
                }
                let turned = catch_unwind(AssertUnwindSafe(|| core.turn(self, ring)));
                turned.unwrap_or_else(|payload| {
                    self.die(core, &panic_message(&*payload));
                    Turn::Ended
                })
            })
        };
        IN_TURN.set(outer);
        result
    }

    /// With the token: the lane panicked.
    pub(crate) fn die(&self, core: &mut Core<D>, message: &str) {
        lock(&self.life).failure.get_or_insert_with(|| message.to_owned());
        self.mode.fetch_or(ENDED, Ordering::AcqRel);
        tracing::error!(lane = %self.name, panic = message, "the lane panicked and is dead");
        if let Some(driver) = &mut core.driver {
            // A second panic in here adds nothing.
            _ = catch_unwind(AssertUnwindSafe(|| driver.on_panic(message)));
        }
        self.wakeup.call_attention();
    }

    /// With the token, at the end: every accepted message goes back to the driver, then the driver is dropped.
    pub(crate) fn abandon(&self, core: &mut Core<D>) {
        self.mode.fetch_or(ENDED, Ordering::AcqRel);
        self.inbox.close();
        let Some(mut driver) = core.driver.take() else { return };
        let mut give_back = |message| {
            _ = catch_unwind(AssertUnwindSafe(|| driver.on_abandoned(message)));
        };
        // SAFETY: the caller holds the token.
        unsafe { self.inbox.drain(&mut give_back) };
        let spilled = std::mem::take(&mut *lock(&self.spill));
        spilled.into_iter().for_each(|(_, message)| give_back(message));
        _ = catch_unwind(AssertUnwindSafe(|| drop(driver)));
    }
}

impl<D: Driver> Core<D> {
    fn turn(&mut self, shared: &Shared<D>, ring: Option<&mut Ring>) -> Turn {
        let Some(driver) = &mut self.driver else { return Turn::Ended };
        let pump = &mut self.pump;
        let counters = &shared.counters;
        let mut progress = false;

        let mut messages = 0;
        while messages < BATCH {
            // SAFETY: a turn runs with the token held.
            let message = match unsafe { shared.inbox.pop() } {
                Some(message) => message,
                None => break,
            };
            driver.on_message(&mut Cx { pump }, message);
            messages += 1;
        }
        if shared.has_spill.load(Ordering::Acquire) {
            while messages < 2 * BATCH
                && let Some(message) = shared.unspill()
            {
                driver.on_message(&mut Cx { pump }, message);
                messages += 1;
            }
        }
        if messages > 0 {
            counters.messages.add(messages as u64);
            progress = true;
            // What was asked for goes out before descriptors are tried: 0.3 us each.
            driver.on_turn(&mut Cx { pump });
        }

        if let Some(ring) = ring
            && ring.has_completions()
        {
            let now_ns = pump.now_ns();
            let mut fired = 0;
            let reaped = ring.reap(|user_data, result| {
                let known = if WordTable::is_word(user_data) {
                    pump.words.completed(user_data, result)
                } else {
                    pump.fds.poll_completed(user_data, result, now_ns)
                };
                fired += u64::from(known);
            });
            if let Err(error) = reaped {
                tracing::error!(lane = %shared.name, %error, "the lane's ring failed");
            }
            counters.polls_fired.add(fired);
            progress |= fired > 0;
        }
        if pump.words.has_ended() {
            while let Some((token, end)) = pump.words.pop_ended() {
                let cx = &mut Cx { pump };
                match end {
                    WordEnd::Fired => driver.on_word(cx, token),
                    WordEnd::Lost(error) => driver.on_word_lost(cx, token, &error),
                }
            }
        }

        pump.fds.ask(crate::ring::ready_now);
        // Backwards: whatever the driver removes or adds meanwhile, no descriptor is missed.
        let mut position = pump.fds.hot_count();
        while position > 0 {
            position -= 1;
            let Some((id, token, readiness)) = pump.fds.visit(position) else { continue };
            counters.fd_calls.add(1);
            if driver.on_fd(&mut Cx { pump }, token, readiness) {
                progress = true;
                let now_ns = pump.recent_ns();
                pump.fds.made_progress(id, now_ns);
            }
        }

        if !pump.wheel.is_current(pump.recent_ns() >> TICK_BITS) {
            progress |= Self::fire_timers(driver, pump, counters);
        }
        progress |= driver.on_turn(&mut Cx { pump });
        if progress { Turn::Progress } else { Turn::Idle }
    }

    #[cold]
    fn fire_timers(driver: &mut D, pump: &mut Pump, counters: &Counters) -> bool {
        let now_ns = pump.now_ns();
        // Timers that are set meanwhile wait for the next turn, so a timer that sets itself again cannot hold this one.
        let due = pump.wheel.advance(now_ns >> TICK_BITS).min(BATCH);
        let mut fired = 0;
        for _ in 0..due {
            match pump.wheel.pop_due() {
                Some(TimerKind::Driver(token)) => driver.on_timer(&mut Cx { pump }, token),
                Some(TimerKind::Sleeper(key)) => {
                    if let Some(waker) = pump.take_sleeper(key) {
                        waker.wake();
                    }
                }
                None => break,
            }
            fired += 1;
        }
        counters.timers.add(fired);
        fired > 0
    }
}
