//! All that knows glommio. Replacing the executor touches this file only.
//!
//! The executor hosts on-lane tasks; the pump is not one of its tasks. While such tasks live, the lane turns the pump
//! inside `run`, yielding to them after each turn; otherwise the executor is not entered at all. Each `run` begins with a
//! full pass over glommio's rings and timers. It never parks for long: the pump does that.

use std::{cell::Cell, rc::Rc, task::Poll, time::Duration};

use glommio::{LocalExecutor, LocalExecutorBuilder, Placement, Task, executor, spawn_local, timer};

/// What glommio refuses to start below.
pub(crate) const MEMLOCK_NEEDED_BYTES: u64 = 512 * 1024;

/// A known flaw of glommio: if its preemption timer fires before the first task of a pass, it parks with runnable tasks.
/// With a long period that takes a thread that is stopped for so long just then; the heartbeat bounds it even so.
const PREEMPT: Duration = Duration::from_millis(100);
/// Timers that are always set while tasks live, so that a park always ends. Several, because the first may have fired
/// already, with the task that sets it again among those that the flaw keeps from running.
const HEARTBEATS: [Duration; 4] = [
    Duration::from_millis(20),
    Duration::from_millis(250),
    Duration::from_secs(2),
    Duration::from_secs(20),
];

async fn heartbeat() {
    loop {
        let mut timers = HEARTBEATS.map(|period| Box::pin(timer::sleep(period)));
        std::future::poll_fn(|context| {
            let fired = timers.iter_mut().filter_map(|timer| match timer.as_mut().poll(context) {
                Poll::Ready(()) => Some(()),
                Poll::Pending => None,
            });
            // All of them are polled: that is what sets them.
            if fired.count() > 0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

pub(crate) struct Executor {
    inner: LocalExecutor,
    has_heartbeat: Cell<bool>,
    heartbeat: Cell<Option<Task<()>>>,
}

/// A task on the executor, to be cancelled before the executor ends.
pub(crate) struct Hosted(Task<()>);

impl Executor {
    /// On the lane's thread, which is pinned already.
    pub(crate) fn new() -> Result<Self, String> {
        // glommio panics on some failures; a lane's start has to return them.
        let made = std::panic::catch_unwind(|| {
            LocalExecutorBuilder::new(Placement::Unbound)
                .io_memory(64 * 1024)
                .ring_depth(64)
                .preempt_timer(PREEMPT)
                .make()
                .map_err(|error| error.to_string())
        });
        let inner = made.unwrap_or_else(|payload| Err(crate::error::panic_message(&*payload)))?;
        Ok(Self { inner, has_heartbeat: Cell::new(false), heartbeat: Cell::new(None) })
    }

    /// Runs `future` beside the hosted tasks until it ends, beginning with a full pass.
    pub(crate) fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.inner.run(async {
            if !self.has_heartbeat.replace(true) {
                self.heartbeat.set(Some(spawn_local(heartbeat())));
            }
            future.await
        })
    }

    /// A full pass: starts queued I/O, fires timers, runs what is runnable. True: it ran hosted tasks, so there may be
    /// more to do.
    pub(crate) fn pass(&self) -> bool {
        let count = || async { executor().executor_stats().tasks_executed() };
        let before = self.run(count());
        // The statistics are those of the last finished round, and the counting task is itself one of it.
        self.run(count()) > before + 1
    }

    /// Inside `run`: adds a task.
    pub(crate) fn host(future: impl Future<Output = ()> + 'static) -> Hosted {
        Hosted(spawn_local(future))
    }

    /// Ends all tasks: they are dropped at the await they are at.
    pub(crate) fn shut_down(self, tasks: Vec<Hosted>) {
        if !self.has_heartbeat.get() {
            return; // It never ran.
        }
        let heartbeat = Rc::new(Cell::new(self.heartbeat.take()));
        self.inner.run(async move {
            for task in tasks {
                task.0.cancel().await;
            }
            if let Some(heartbeat) = heartbeat.take() {
                heartbeat.cancel().await;
            }
        });
    }
}

/// Inside `run`: lets the hosted tasks run.
pub(crate) async fn yield_to_tasks() {
    executor().yield_now().await;
}
