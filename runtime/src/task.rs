//! Futures that live on a lane.

use std::{
    cell::{Cell, RefCell},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    rc::Rc,
    sync::{Arc, Condvar, Mutex},
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use slab::Slab;

use crate::{
    Cx, Driver, Lane, TaskError, TimerId,
    error::panic_message,
    executor::{Executor, Hosted},
    shared::{Shared, Wakeup, lock},
};

/// Makes a task, on the lane's thread and inside the executor.
pub(crate) type Job<D> = Box<dyn FnOnce(&Rc<LaneLocal<D>>) + Send>;

/// What belongs to the lane's thread alone: whether it holds the token, and its tasks.
pub(crate) struct LaneLocal<D: Driver> {
    pub(crate) shared: Arc<Shared<D>>,
    /// The lane's thread holds the token.
    pub(crate) holds_token: Cell<bool>,
    /// The lane's thread is inside a turn or a `LocalLane::with`.
    pub(crate) entered: Cell<bool>,
    pub(crate) tasks: RefCell<Slab<Option<Hosted>>>,
    pub(crate) ended_tasks: RefCell<Vec<usize>>,
    pub(crate) alive: Cell<usize>,
    /// Not zero while the executor is to come to an end of its run: each task is polled at most once then.
    pub(crate) drain: Cell<u64>,
    pub(crate) drains: Cell<u64>,
    /// Tasks that wanted more polls during a drain.
    pub(crate) deferred: RefCell<Vec<Waker>>,
    /// A task ran since the lane last looked.
    pub(crate) task_ran: Cell<bool>,
}

impl<D: Driver> LaneLocal<D> {
    /// Runs `f` on the pump, if nobody else does just now.
    pub(crate) fn enter<R>(&self, f: impl FnOnce(&mut crate::shared::Core<D>) -> R) -> Option<R> {
        if self.entered.get() {
            return None;
        }
        let held = self.holds_token.get();
        if !held && !self.shared.token.try_acquire() {
            return None;
        }
        /// Gives everything back, also when `f` panics.
        struct Leave<'a, D: Driver>(&'a LaneLocal<D>, bool);
        impl<D: Driver> Drop for Leave<'_, D> {
            fn drop(&mut self) {
                self.0.entered.set(false);
                if !self.1 {
                    self.0.shared.token.release();
                }
            }
        }
        self.entered.set(true);
        let leave = Leave(self, held);
        // SAFETY: this thread holds the token, and `entered` keeps a second reference away.
        let result = unsafe { self.shared.token.with(f) };
        drop(leave);
        Some(result)
    }

    /// From here on each task is polled once at most, so that a `run` of the executor ends although tasks are busy.
    pub(crate) fn begin_drain(&self) {
        self.drains.set(self.drains.get() + 1);
        self.drain.set(self.drains.get());
    }

    /// Inside the executor: tasks may run freely again.
    pub(crate) fn end_drain(&self) {
        self.drain.set(0);
        let deferred = std::mem::take(&mut *self.deferred.borrow_mut());
        deferred.into_iter().for_each(Waker::wake);
    }

    /// Lets go of the handles of tasks that have ended.
    pub(crate) fn forget_ended_tasks(&self) {
        let mut ended = self.ended_tasks.borrow_mut();
        let mut tasks = self.tasks.borrow_mut();
        for key in ended.drain(..) {
            drop(tasks.try_remove(key));
        }
    }

    fn spawn<T: 'static>(
        self: &Rc<Self>,
        future: impl Future<Output = T> + 'static,
        result: Arc<TaskResult<T>>,
    ) {
        // The executor polls a new task at once, and it may add tasks itself: nothing is borrowed meanwhile.
        let key = self.tasks.borrow_mut().insert(None);
        let hosted = Executor::host(HostedTask {
            future: Some(Box::pin(future)),
            result,
            waker: None,
            drained: 0,
            alive: Alive::new(self.clone(), key),
        });
        self.tasks.borrow_mut()[key] = Some(hosted);
    }
}

/// Counts a task as alive.
struct Alive<D: Driver> {
    local: Rc<LaneLocal<D>>,
    key: usize,
}

impl<D: Driver> Alive<D> {
    fn new(local: Rc<LaneLocal<D>>, key: usize) -> Self {
        local.alive.set(local.alive.get() + 1);
        Self { local, key }
    }
}

impl<D: Driver> Drop for Alive<D> {
    fn drop(&mut self) {
        self.local.alive.set(self.local.alive.get() - 1);
        // A task must not drop its own handle: the lane does, between turns.
        self.local.ended_tasks.borrow_mut().push(self.key);
    }
}

/// Wakes a task from any thread at once: glommio alone would see a foreign wake-up of a parked lane only when its next
/// pass is due.
pub(crate) struct TaskWaker {
    inner: Waker,
    wakeup: Arc<Wakeup>,
    home: std::thread::ThreadId,
}

impl TaskWaker {
    pub(crate) fn wake_here(&self) {
        self.inner.wake_by_ref();
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if std::thread::current().id() == self.home {
            self.wake_here();
            return;
        }
        let wakeup = self.wakeup.clone();
        lock(&wakeup.woken).push(self);
        wakeup.call_attention();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if std::thread::current().id() == self.home {
            self.wake_here();
        } else {
            self.clone().wake();
        }
    }
}

struct HostedTask<D: Driver, F: Future> {
    future: Option<Pin<Box<F>>>,
    result: Arc<TaskResult<F::Output>>,
    /// The executor's waker never changes for one task; the one made from it is kept.
    waker: Option<(Waker, Waker)>,
    /// The last drain in which the task was polled.
    drained: u64,
    alive: Alive<D>,
}

impl<D: Driver, F: Future> Future for HostedTask<D, F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let local = &this.alive.local;
        local.task_ran.set(true);
        let drain = local.drain.get();
        if drain != 0 && std::mem::replace(&mut this.drained, drain) == drain {
            local.deferred.borrow_mut().push(cx.waker().clone());
            return Poll::Pending;
        }
        if this.waker.as_ref().is_none_or(|(inner, _)| !inner.will_wake(cx.waker())) {
            let waker = TaskWaker {
                inner: cx.waker().clone(),
                wakeup: local.shared.wakeup.clone(),
                home: std::thread::current().id(),
            };
            this.waker = Some((cx.waker().clone(), Arc::new(waker).into()));
        }
        let (Some(future), Some((_, waker))) = (&mut this.future, &this.waker) else {
            return Poll::Ready(());
        };
        let mut cx = Context::from_waker(waker);
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut cx)));
        let output = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(output)) => Ok(output),
            Err(payload) => Err(TaskError::Panicked(panic_message(&*payload))),
        };
        // The future may panic in its drop, too.
        let future = this.future.take();
        _ = catch_unwind(AssertUnwindSafe(|| drop(future)));
        this.result.set(output);
        Poll::Ready(())
    }
}

impl<D: Driver, F: Future> Unpin for HostedTask<D, F> {}

impl<D: Driver, F: Future> Drop for HostedTask<D, F> {
    fn drop(&mut self) {
        let future = self.future.take();
        _ = catch_unwind(AssertUnwindSafe(|| drop(future)));
        self.result.set(Err(TaskError::LaneStopped));
    }
}

struct TaskResult<T> {
    state: Mutex<ResultState<T>>,
    changed: Condvar,
}

struct ResultState<T> {
    output: Option<Result<T, TaskError>>,
    done: bool,
    waker: Option<Waker>,
}

impl<T> TaskResult<T> {
    fn new() -> Arc<Self> {
        let state = ResultState { output: None, done: false, waker: None };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    /// The first result counts.
    fn set(&self, output: Result<T, TaskError>) {
        let mut state = lock(&self.state);
        if state.done {
            return;
        }
        state.done = true;
        state.output = Some(output);
        let waker = state.waker.take();
        drop(state);
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The result of a task on a lane: a future, or something to wait for. Dropping it lets the task go on.
pub struct LaneTask<T> {
    result: Arc<TaskResult<T>>,
}

impl<T> LaneTask<T> {
    /// Blocks the calling thread until the task has ended. Never call it on the lane's own thread: await there.
    pub fn wait(self) -> Result<T, TaskError> {
        let mut state = lock(&self.result.state);
        loop {
            if let Some(output) = state.output.take() {
                return output;
            }
            state =
                self.result.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Like [`wait`](Self::wait), for at most `timeout`: then the handle comes back, and the task goes on.
    pub fn wait_timeout(self, timeout: Duration) -> Result<Result<T, TaskError>, Self> {
        let start = Instant::now();
        let mut state = lock(&self.result.state);
        loop {
            if let Some(output) = state.output.take() {
                return Ok(output);
            }
            let Some(left) = timeout.checked_sub(start.elapsed()).filter(|left| !left.is_zero())
            else {
                drop(state);
                return Err(self);
            };
            state = match self.result.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Whether the task has ended.
    pub fn is_done(&self) -> bool {
        lock(&self.result.state).done
    }
}

impl<T> Future for LaneTask<T> {
    type Output = Result<T, TaskError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = lock(&self.result.state);
        match state.output.take() {
            Some(output) => Poll::Ready(output),
            // Polled again after it was ready: a mistake of the caller that must not hang.
            None if state.done => Poll::Ready(Err(TaskError::LaneStopped)),
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// A job that was dropped unrun still has to end its task.
struct ResultGuard<T>(Option<Arc<TaskResult<T>>>);

impl<T> Drop for ResultGuard<T> {
    fn drop(&mut self) {
        if let Some(result) = self.0.take() {
            result.set(Err(TaskError::LaneStopped));
        }
    }
}

/// A job for the lane, and the handle of what it will give.
pub(crate) fn job<D, F, Fut, T>(lane: Lane<D>, make: F) -> (Job<D>, LaneTask<T>)
where
    D: Driver,
    F: FnOnce(LocalLane<D>) -> Fut + Send + 'static,
    Fut: Future<Output = T> + 'static,
    T: Send + 'static,
{
    let result = TaskResult::new();
    let task = LaneTask { result: result.clone() };
    let mut guard = ResultGuard(Some(result));
    let job = Box::new(move |local: &Rc<LaneLocal<D>>| {
        let Some(result) = guard.0.take() else { return };
        let local_lane = LocalLane { lane, local: local.clone() };
        match catch_unwind(AssertUnwindSafe(|| make(local_lane))) {
            Ok(future) => local.spawn(future, result),
            Err(payload) => result.set(Err(TaskError::Panicked(panic_message(&*payload)))),
        }
    });
    (job, task)
}

/// A lane as its own tasks see it: no hand-over, no doorbell. Stays on the lane's thread.
pub struct LocalLane<D: Driver> {
    lane: Lane<D>,
    local: Rc<LaneLocal<D>>,
}

impl<D: Driver> Clone for LocalLane<D> {
    fn clone(&self) -> Self {
        Self { lane: self.lane.clone(), local: self.local.clone() }
    }
}

impl<D: Driver> LocalLane<D> {
    /// Runs `f` on the driver. None: a caller turns the pump just now (try again after a
    /// [`yield_now`](Self::yield_now), or submit a message), the call is nested in another one, or the lane has ended.
    pub fn with<R>(&self, f: impl FnOnce(&mut D, &mut Cx<'_>) -> R) -> Option<R> {
        self.local
            .enter(|core| {
                core.pump.begin_turn(true);
                let driver = core.driver.as_mut()?;
                Some(f(driver, &mut Cx { pump: &mut core.pump }))
            })
            .flatten()
    }

    /// The lane.
    pub fn lane(&self) -> &Lane<D> {
        &self.lane
    }

    /// Adds a task that stays on this lane. Unlike tasks of glommio's own `spawn_local`, it counts as the lane's: the
    /// lane keeps serving it, wakes up for it at once, and is not held up by it when it polls without end (one of
    /// glommio's own can keep the lane from turning for 100 ms).
    pub fn spawn_local<T: 'static>(
        &self,
        future: impl Future<Output = T> + 'static,
    ) -> LaneTask<T> {
        let result = TaskResult::new();
        self.local.spawn(future, result.clone());
        LaneTask { result }
    }

    /// Ends after `duration` on the lane's timer wheel: never early, late by up to a tick (1.05 ms).
    pub fn sleep(&self, duration: Duration) -> Sleep<D> {
        let now = Instant::now();
        // Longer than any lane lives.
        const FAR: Duration = Duration::from_hours(24 * 365);
        let deadline = now.checked_add(duration.min(FAR)).unwrap_or(now);
        Sleep { local: self.local.clone(), deadline, timer: None }
    }

    /// Lets the lane turn its pump, and other tasks run, once.
    pub async fn yield_now(&self) {
        crate::executor::yield_to_tasks().await;
    }
}

/// The future of [`LocalLane::sleep`].
pub struct Sleep<D: Driver> {
    local: Rc<LaneLocal<D>>,
    deadline: Instant,
    timer: Option<(u32, TimerId)>,
}

impl<D: Driver> Future for Sleep<D> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            return Poll::Ready(());
        }
        let (deadline, timer) = (self.deadline, self.timer);
        let entered = self.local.enter(|core| match timer {
            Some((key, id)) => {
                core.pump.set_sleeper_waker(key, cx.waker());
                (key, id)
            }
            None => core.pump.add_sleeper(deadline, cx.waker().clone()),
        });
        match entered {
            Some(timer) => self.timer = Some(timer),
            // A caller turns the pump: try again in a moment.
            None => cx.waker().wake_by_ref(),
        }
        Poll::Pending
    }
}

impl<D: Driver> Drop for Sleep<D> {
    fn drop(&mut self) {
        if let Some((_, id)) = self.timer.take() {
            // If a caller turns the pump just now the timer stays: it wakes nobody, once.
            self.local.enter(|core| core.pump.remove_sleeper(id));
        }
    }
}
