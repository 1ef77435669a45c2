//! The handle of a lane, for any thread.

use std::{
    cell::Cell,
    fmt,
    sync::{Arc, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

use crate::{
    Cx, Driver, LaneConfig, LaneError, LaneStats, LaneTask, LocalLane, SubmitError, TrySubmitError,
    core_watch::{CoreWatch, Courtesy},
    inbox::PushError,
    shared::{DEDICATED, DRIVEN_NS, ENDED, Shared, Turn, lock},
    task, thread,
};

/// How long `stop` waits beyond its deadline for the thread itself to end.
const STOP_GRACE: Duration = Duration::from_millis(500);

/// A lane: a thread, pinned if so configured, that drives a [`Driver`]. This is its handle, for any thread; clones name
/// the same lane. When the last clone is dropped (a [`LocalLane`] that a task keeps counts as one) the lane stops by
/// itself, without waiting.
pub struct Lane<D: Driver> {
    shared: Arc<Shared<D>>,
    _last: Arc<StopOnDrop<D>>,
}

struct StopOnDrop<D: Driver>(Arc<Shared<D>>);

impl<D: Driver> Drop for StopOnDrop<D> {
    fn drop(&mut self) {
        request_stop(&self.0, Duration::ZERO);
    }
}

impl<D: Driver> Clone for Lane<D> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), _last: self._last.clone() }
    }
}

impl<D: Driver> fmt::Debug for Lane<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane")
            .field("name", &self.name())
            .field("core", &self.core())
            .field("alive", &self.is_alive())
            .finish()
    }
}

/// What [`Lane::assist`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assist {
    /// A turn on this thread made progress: look again.
    Worked,
    /// A turn on this thread found nothing to do.
    Idle,
    /// The lane or another caller is turning the pump; this thread has yielded its core once.
    Busy,
    /// The lane has a core of its own: just poll.
    Dedicated,
    /// The lane has stopped or died.
    Stopped,
}

thread_local! {
    /// What this thread learned about its core while it assisted.
    static ASSISTING: Cell<CoreWatch> = const { Cell::new(CoreWatch::NEW) };
    /// The lane that was busy when this thread last asked for a turn, and when it came back from yielding: callers that look
    /// at several lanes by turns leave each its own thread.
    static BUSY: Cell<(*const (), u64)> = const { Cell::new((std::ptr::null(), 0)) };
}

impl<D: Driver> Lane<D> {
    /// Starts a lane. `make` makes its driver on the new thread, which is pinned by then, so what it allocates is local to
    /// that core's memory. Blocks until `make` has returned: a few milliseconds.
    ///
    /// The thread blocks all signals. Nothing is left behind when it fails.
    pub fn start(
        config: LaneConfig,
        make: impl FnOnce(&mut Cx<'_>) -> D + Send + 'static,
    ) -> Result<Self, LaneError> {
        crate::preflight::check_core(config.core)?;
        let (answer, started) = mpsc::sync_channel(1);
        let builder = std::thread::Builder::new().name(config.name.clone().replace('\0', "_"));
        let spawned = thread::with_signals_blocked(|| {
            builder.spawn(move || thread::run(config, make, &answer))
        });
        let handle = spawned.map_err(|error| match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => crate::preflight::out_of_fds(error),
            _ => LaneError::SpawnThread(error),
        })?;
        match started.recv() {
            Ok(Ok(shared)) => {
                lock(&shared.life).thread = Some(handle);
                Ok(Self { _last: Arc::new(StopOnDrop(shared.clone())), shared })
            }
            Ok(Err(error)) => {
                _ = handle.join();
                Err(error)
            }
            Err(mpsc::RecvError) => {
                let message =
                    handle.join().err().map(|payload| crate::error::panic_message(&*payload));
                Err(LaneError::Executor(
                    message.unwrap_or_else(|| "the thread ended early".to_owned()),
                ))
            }
        }
    }

    /// Hands `message` to the driver, in the order in which this thread submits. Rings the lane's doorbell only if it
    /// sleeps and nobody drives it. About 50 ns, 1-2 us with the doorbell.
    ///
    /// While the inbox is full this waits for room, assisting the lane where that is allowed; a call from the lane's own
    /// thread or from inside a turn does not wait: such a message goes to an overflow list. Err: the lane has stopped or
    /// died, and the message comes back.
    pub fn submit(&self, message: D::Message) -> Result<(), SubmitError<D::Message>> {
        let mut message = message;
        loop {
            match self.shared.push(message) {
                Ok(()) => return Ok(()),
                Err(PushError::Closed(back)) => return Err(SubmitError(back)),
                Err(PushError::Full(back)) => message = back,
            }
            // The lane may have gone to sleep between two pushes of others.
            if !matches!(self.assist(), Assist::Worked | Assist::Busy) {
                std::thread::yield_now();
            }
        }
    }

    /// Like [`submit`](Self::submit), but gives the message back instead of waiting for room.
    pub fn try_submit(&self, message: D::Message) -> Result<(), TrySubmitError<D::Message>> {
        self.shared.push(message).map_err(|error| match error {
            PushError::Full(message) => TrySubmitError::Full(message),
            PushError::Closed(message) => TrySubmitError::Stopped(message),
        })
    }

    /// As [`submit`](Self::submit) and [`assist`](Self::assist) in one: where the lane has no core of its own and
    /// nobody turns its pump, the message is handled on this thread before this returns, and nobody is woken for it. Saves
    /// a fence and a look at the clock, 30 ns.
    pub fn hand_over(&self, message: D::Message) -> Result<(), SubmitError<D::Message>> {
        let shared = &*self.shared;
        if shared.mode.load(Ordering::Relaxed) != 0
            || shared.must_not_wait_for_room()
            || !shared.token.try_acquire()
        {
            return self.submit(message);
        }
        let calls = &shared.drive.calls;
        calls.store(calls.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        if let Err(error) = shared.inbox.push(message) {
            shared.token.release();
            return match error {
                PushError::Full(message) => self.submit(message),
                PushError::Closed(message) => Err(SubmitError(message)),
            };
        }
        self.turn_on_caller(shared.clock_ns());
        if shared.has_pending() {
            // There was more than one turn takes.
            shared.ring_for_message();
        }
        Ok(())
    }

    /// "I am waiting for this lane": where it has no core of its own, this may run one turn of its pump on the calling
    /// thread. Call it in the loop that waits; it yields the core itself where that is right. One relaxed load when the
    /// lane is dedicated.
    #[inline]
    pub fn assist(&self) -> Assist {
        let mode = self.shared.mode.load(Ordering::Relaxed);
        if mode == DEDICATED { Assist::Dedicated } else { self.assist_shared(mode) }
    }

    fn assist_shared(&self, mode: u32) -> Assist {
        let shared = &*self.shared;
        if mode & ENDED != 0 {
            return Assist::Stopped;
        }
        let calls = &shared.drive.calls;
        calls.store(calls.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        let before_ns = shared.clock_ns();
        // On the lane's own thread the lane itself turns, when the calling task yields.
        if shared.is_lane_thread() {
            std::thread::yield_now();
            return Assist::Busy;
        }
        if !shared.token.try_acquire() {
            // Who was here a moment ago does nothing but wait: it may have the pump, instead of sharing a core with the lane's
            // thread, which under load has something to do for a whole time slice. One clock reading after the yield.
            let (lane, left_ns) = BUSY.get();
            if lane == shared.identity() && before_ns.saturating_sub(left_ns) <= DRIVEN_NS {
                shared.drive.wanted.store(true, Ordering::Relaxed);
            }
            std::thread::yield_now();
            BUSY.set((shared.identity(), shared.clock_ns()));
            return Assist::Busy;
        }
        self.turn_on_caller(before_ns)
    }

    /// The token was just acquired.
    fn turn_on_caller(&self, before_ns: u64) -> Assist {
        let shared = &*self.shared;
        shared.drive.last_turn_ns.store(before_ns, Ordering::Relaxed);
        // SAFETY: the token was just acquired, so this thread is in no turn of this lane.
        let (turn, needs_lane) = unsafe {
            let turn = shared.turn(None, Some(before_ns));
            let needs_lane = shared.token.with(|core| {
                core.pump.cool_calm();
                core.pump.needs_lane()
            });
            (turn, needs_lane)
        };
        shared.counters.assisted_turns.add(1);
        shared.token.release();
        if needs_lane {
            shared.wakeup.call_attention();
        }
        let mut watch = ASSISTING.get();
        watch.turn(before_ns + shared.epoch_ns);
        let assist = match turn {
            Turn::Progress => Assist::Worked,
            Turn::Ended => Assist::Stopped,
            Turn::Idle => {
                be_courteous(&mut watch, before_ns + shared.epoch_ns, || {
                    shared.clock_ns() + shared.epoch_ns
                });
                Assist::Idle
            }
        };
        ASSISTING.set(watch);
        assist
    }

    /// "I stop driving and go to sleep": a lane that stands by because callers drive it takes over at once. A system call
    /// if it sleeps.
    pub fn wake(&self) {
        if self.shared.mode.load(Ordering::Relaxed) & (DEDICATED | ENDED) == 0 {
            // Or it would stand by for this thread, which is gone. Others that drive say so again with their next turn.
            self.shared.drive.last_turn_ns.store(0, Ordering::Relaxed);
            self.shared.wakeup.call_attention();
        }
    }

    /// Runs a task on the lane. `make` is called on the lane's thread; its future stays there and may use glommio's
    /// own I/O and timers (seen within 2 ms while the lane spins, 4 ms while it is parked). Allocates; not for the hot
    /// path. When the lane stops, the future is dropped at the await it is at.
    pub fn spawn<F, Fut, T>(&self, make: F) -> LaneTask<T>
    where
        F: FnOnce(LocalLane<D>) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (job, task) = task::job(self.clone(), make);
        let mut jobs = lock(&self.shared.jobs);
        if self.shared.has_mode(ENDED) {
            drop(jobs);
            // Dropping the job ends its task with an error.
            drop(job);
            return task;
        }
        jobs.push(job);
        drop(jobs);
        self.shared.wakeup.call_attention();
        task
    }

    /// Stops the lane: the driver's [`on_stop`](Driver::on_stop) runs until it is done or `deadline` has passed, tasks are
    /// dropped, messages that are left go to [`on_abandoned`](Driver::on_abandoned), the driver is dropped, the thread is
    /// joined. Idempotent, from any thread; from the lane's own thread, or from inside one of its turns, it only requests
    /// the stop. Returns half a second after the deadline at the latest.
    pub fn stop(&self, deadline: Duration) -> Result<(), LaneError> {
        let shared = &*self.shared;
        request_stop(shared, deadline);
        if shared.must_not_wait() {
            return Ok(());
        }
        let give_up = Instant::now() + deadline + STOP_GRACE;
        let mut life = lock(&shared.life);
        while !life.finished {
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LaneError::StopTimedOut { name: shared.name.clone() });
            }
            life = match shared.life_changed.wait_timeout(life, left) {
                Ok((life, _)) => life,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        let thread = life.thread.take();
        let failure = life.failure.clone();
        drop(life);
        if let Some(thread) = thread {
            _ = thread.join();
        }
        match failure {
            Some(message) => Err(LaneError::Panicked { name: shared.name.clone(), message }),
            None => Ok(()),
        }
    }

    /// The core that the lane is pinned to.
    pub fn core(&self) -> Option<usize> {
        self.shared.core
    }

    /// The lane's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The lane's counters. Some loads and a lock that the lane takes only when it was held up.
    pub fn stats(&self) -> LaneStats {
        let (tail, head) = self.shared.inbox.positions();
        LaneStats {
            inbox_used: tail.wrapping_sub(head).min(usize::MAX / 4),
            dedicated: self.shared.has_mode(DEDICATED),
            ..self.shared.counters.snapshot()
        }
    }

    /// Whether the calling thread is the lane's.
    pub fn is_lane_thread(&self) -> bool {
        self.shared.is_lane_thread()
    }

    /// Whether the lane accepts messages: it was neither stopped nor has it died.
    pub fn is_alive(&self) -> bool {
        !self.shared.has_mode(ENDED)
    }

    /// Whether the lane's thread has done its last: nothing that it held will be given back any more. Takes a lock.
    pub fn has_finished(&self) -> bool {
        lock(&self.shared.life).finished
    }

    /// The message of the panic that ended the lane.
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared.life).failure.clone()
    }
}

/// After an idle turn on a caller's thread.
#[inline]
fn be_courteous(watch: &mut CoreWatch, now_ns: u64, clock_ns: impl Fn() -> u64) {
    match watch.courtesy(now_ns) {
        Courtesy::None => {}
        Courtesy::Yield => {
            let before_ns = clock_ns();
            std::thread::yield_now();
            watch.yielded(before_ns, clock_ns());
        }
        Courtesy::Nap => {
            std::thread::sleep(Duration::from_nanos(1));
            watch.napped(clock_ns());
        }
    }
}

fn request_stop<D: Driver>(shared: &Shared<D>, deadline: Duration) {
    let ns = shared.clock_ns().saturating_add(deadline.as_nanos().min(u64::MAX as u128) as u64);
    // Several stops: the first sets the deadline, later ones can only bring it forward.
    shared.stop_deadline_ns.fetch_min(ns, Ordering::AcqRel);
    shared.stop_requested.store(true, Ordering::Release);
    shared.wakeup.call_attention();
}
