//! The executor of builds with `--cfg loom`, in which glommio's dependencies do not compile.
//!
//! It runs tasks, but has no I/O and no timers of its own. It exists so that crates above this one keep compiling when
//! they model-check structures of theirs.

use std::{
    cell::RefCell,
    pin::{Pin, pin},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

pub(crate) const MEMLOCK_NEEDED_BYTES: u64 = 0;

struct Slot {
    future: RefCell<Option<Pin<Box<dyn Future<Output = ()>>>>>,
    woken: Arc<Woken>,
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

impl Slot {
    fn poll(&self) -> bool {
        if !self.woken.0.swap(false, Ordering::AcqRel) {
            return false;
        }
        let Some(mut future) = self.future.borrow_mut().take() else { return false };
        let waker = Waker::from(self.woken.clone());
        if future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            *self.future.borrow_mut() = Some(future);
        }
        true
    }
}

thread_local! {
    static TASKS: RefCell<Vec<Rc<Slot>>> = const { RefCell::new(Vec::new()) };
}

pub(crate) struct Executor;

pub(crate) struct Hosted(Rc<Slot>);

impl Executor {
    pub(crate) fn new() -> Result<Self, String> {
        Ok(Self)
    }

    pub(crate) fn run<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        loop {
            if let Poll::Ready(output) =
                future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            {
                return output;
            }
            self.pass();
        }
    }

    pub(crate) fn pass(&self) -> bool {
        let tasks = TASKS.with_borrow(Clone::clone);
        let ran = tasks.iter().filter(|task| task.poll()).count() > 0;
        TASKS.with_borrow_mut(|tasks| tasks.retain(|task| task.future.borrow().is_some()));
        ran
    }

    pub(crate) fn host(future: impl Future<Output = ()> + 'static) -> Hosted {
        let slot = Rc::new(Slot {
            future: RefCell::new(Some(Box::pin(future))),
            woken: Arc::new(Woken(AtomicBool::new(true))),
        });
        TASKS.with_borrow_mut(|tasks| tasks.push(slot.clone()));
        Hosted(slot)
    }

    pub(crate) fn shut_down(self, tasks: Vec<Hosted>) {
        for task in tasks {
            let future = task.0.future.borrow_mut().take();
            drop(future);
        }
        let rest = TASKS.take();
        drop(rest);
    }
}

pub(crate) async fn yield_to_tasks() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
