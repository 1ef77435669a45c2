//! Transfers: postings of a plan.

mod copy_job;
mod issued;

use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use corelane_runtime::Assist;
use smallvec::SmallVec;

pub(crate) use self::copy_job::Chunk;
use self::copy_job::CopyJob;
pub(crate) use self::issued::{Issuer, Look, gpu_failed};

use crate::config::MAX_NOTIFICATION_BYTES;
use crate::engine::{EngineShared, Message};
use crate::error::{Error, Result};
use crate::peer::Estimate;
use crate::plan::{Operation, PlanInner};
use crate::sync::{Patience, Slot, SlotState, deadline, sleep_until_woken};
use crate::transport::local::CopyError;

/// A transfer of more chunks is none that a caller copies within `post`: each is a call of up to a thousand
/// ranges.
const INLINE_CHUNKS: usize = 2;

/// What caller and lane share of one transfer.
#[derive(Debug)]
pub(crate) struct TransferShared {
    pub(crate) slot: Slot,
    pub(crate) plan: Arc<PlanInner>,
    /// Who copies what of it, where the initiator copies by itself.
    pub(crate) copy: CopyJob,
    notification: Mutex<Option<Arc<[u8]>>>,
    /// Where the lane keeps it while it is in flight; written and read by the lane.
    lane_key: AtomicU32,
}

impl TransferShared {
    pub(crate) fn new(plan: Arc<PlanInner>) -> Self {
        Self {
            slot: Slot::new(),
            plan,
            copy: CopyJob::new(),
            notification: Mutex::new(None),
            lane_key: AtomicU32::new(u32::MAX),
        }
    }

    pub(crate) fn notification(&self) -> impl std::ops::DerefMut<Target = Option<Arc<[u8]>>> + '_ {
        self.notification.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take_notification(&self) -> Option<Arc<[u8]>> {
        self.notification().take()
    }

    pub(crate) fn set_lane_key(&self, key: usize) {
        self.lane_key.store(key as u32, Ordering::Relaxed);
    }

    pub(crate) fn lane_key(&self) -> usize {
        self.lane_key.load(Ordering::Relaxed) as usize
    }
}

/// A prepared list of descriptors, bound to one peer. Cheap to clone; any thread.
///
/// It outlives connections: posting it after a reconnect works. It keeps no memory registered:
/// posting it after one of its regions was deregistered fails.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) inner: Arc<PlanInner>,
    pub(crate) engine: Arc<EngineShared>,
}

impl Plan {
    /// Payload in bytes.
    pub fn bytes(&self) -> u64 {
        self.inner.bytes
    }

    /// Descriptors it was prepared from.
    pub fn descriptors(&self) -> usize {
        self.inner.descriptors
    }

    /// Requests it was cut into.
    pub fn requests(&self) -> usize {
        self.inner.on_device().map_or(self.inner.pieces.len(), |_| 1)
    }

    /// Direction.
    pub fn operation(&self) -> Operation {
        self.inner.operation
    }

    /// How long a posting is expected to take, from what transfers to this peer have taken so far;
    /// `None` before any has ended. Costs some hundred loads.
    pub fn estimate(&self) -> Option<Estimate> {
        let plan = &self.inner;
        plan.peer.history.estimate(plan.operation, plan.bytes, plan.descriptors)
    }

    /// A posting slot. Allocates once; the transfer can be posted again and again. One plan may
    /// have several, in flight at the same time.
    pub fn transfer(&self) -> Transfer {
        Transfer {
            shared: Arc::new(TransferShared::new(self.inner.clone())),
            engine: self.engine.clone(),
        }
    }
}

/// Where a transfer stands.
#[derive(Debug, Clone)]
pub enum Status {
    /// Never posted.
    Idle,
    /// Posted and not ended.
    InProgress,
    /// All bytes are where they belong.
    Done,
    /// Ended in an error; the destination's bytes are unspecified.
    Failed(Error),
}

/// A reusable posting slot of a [`Plan`].
///
/// Any thread may call any method. Every posting ends exactly once, and after its end nothing reads
/// or writes its local memory. Dropping a transfer in flight cancels it; its memory must stay
/// registered and mapped until [`Engine::deregister`](crate::Engine::deregister) has returned.
#[derive(Debug)]
pub struct Transfer {
    shared: Arc<TransferShared>,
    engine: Arc<EngineShared>,
}

impl Transfer {
    /// The plan that is posted.
    pub fn plan(&self) -> Plan {
        Plan { inner: self.shared.plan.clone(), engine: self.engine.clone() }
    }

    /// Starts the transfer. Costs one message to the lane; a small transfer is handed to the kernel
    /// before this returns when the caller may drive the lane, and one range that a GPU copies to its copy engine, which takes
    /// 2 to 7 us. Allocates nothing.
    ///
    /// # Errors
    /// [`Error::Busy`] while it is in flight, [`Error::Shutdown`]. All that has to do with the peer
    /// is reported by [`status`](Self::status).
    pub fn post(&self) -> Result<()> {
        self.start(None)
    }

    /// As [`post`](Self::post), and the peer's application sees `payload` as a notification once
    /// all bytes have arrived: for a write after the data has landed there, for a read after it has
    /// landed here.
    ///
    /// # Errors
    /// Those of `post`; [`Error::Backpressure`] when too many notifications to this peer are not
    /// acknowledged, [`Error::Limit`] above 16 MiB. Then no data has moved.
    pub fn post_with_notification(&self, payload: &[u8]) -> Result<()> {
        check_notification(payload)?;
        self.start(Some(payload))
    }

    fn start(&self, notification: Option<&[u8]>) -> Result<()> {
        self.engine.check()?;
        let (shared, peer) = (&self.shared, &self.shared.plan.peer);
        let Some(before) = shared.slot.begin() else {
            return Err(Error::Busy {
                what: "the transfer",
                hint: "; wait for its end, or use another transfer of the same plan",
            });
        };
        if let Err(error) = self.reserve(notification) {
            shared.slot.abort(before);
            return Err(error);
        }
        if self.engine.config.copied_by_callers().is_some_and(|most| shared.plan.bytes <= most)
            && let Some(outcome) = self.copy_here()
        {
            self.end_here(outcome);
            return Ok(());
        }
        if shared.plan.issuer().is_some_and(|issuer| self.issue(issuer)) {
            return Ok(());
        }
        if let Err(error) = self.enter() {
            if let Some(payload) = shared.take_notification() {
                peer.release(1, payload.len());
            }
            shared.slot.abort(before);
            return Err(error);
        }
        let message = Message::Post(shared.clone());
        let small = shared.plan.bytes <= self.engine.config.inline_bytes as u64;
        let submitted = if small {
            self.engine.hand_over(peer.lane, message)
        } else {
            self.engine.lane(peer.lane)?.submit(message)
        };
        if let Err(refused) = submitted {
            drop(refused);
            if let Some(payload) = shared.take_notification() {
                peer.release(1, payload.len());
            }
            peer.leave();
            shared.slot.abort(before);
            return Err(self.engine.dead());
        }
        Ok(())
    }

    /// Takes the notification's place in the resend buffer before any data moves.
    fn reserve(&self, notification: Option<&[u8]>) -> Result<()> {
        if let Some(payload) = notification {
            self.shared.plan.peer.reserve(payload.len())?;
            *self.shared.notification() = Some(payload.into());
        }
        Ok(())
    }

    /// Ends a transfer that this thread has copied. Its notification goes first: whoever sees the end may
    /// post again.
    fn end_here(&self, outcome: Result<()>) {
        let (shared, peer) = (&self.shared, &self.shared.plan.peer);
        if let Some(payload) = shared.take_notification() {
            let len = payload.len();
            let message = || Message::Notify(Box::new((peer.clone(), payload)));
            let sent = outcome.is_ok() && self.engine.hand_over(peer.lane, message()).is_ok();
            if !sent {
                peer.release(1, len);
            }
        }
        shared.slot.complete(outcome);
    }

    /// A transfer of little to a peer on this host is over before `post` returns: this thread copies it. What
    /// comes with it (a notification, which has its order) is the lane's. `None`: the lane's as a whole.
    fn copy_here(&self) -> Option<Result<()>> {
        let (shared, engine) = (&self.shared, &*self.engine);
        let plan = &*shared.plan;
        // One load where there is no such way.
        let path = plan.peer.path();
        let path = path
            .as_ref()
            .filter(|path| plan.chunks.len() <= INLINE_CHUNKS && path.carries(plan))?;
        let mut held: SmallVec<[_; 2]> = SmallVec::new();
        for region in &plan.regions {
            held.push(region.begin_copy()?);
        }
        let began = Instant::now();
        let mut outcome = Ok(());
        for chunk in 0..plan.chunks.len() {
            // SAFETY: `held` keeps the plan's own regions registered.
            match unsafe { path.copy(plan, chunk) } {
                Ok(()) => {}
                // Other threads take all the places: the lane, which has patience, begins anew.
                Err(CopyError::Busy) => return None,
                // Whether the peer has said goodbye, the lane finds out before it tells anybody.
                Err(CopyError::Failed(error)) if error.is_disconnect() => return None,
                Err(CopyError::Failed(error)) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        drop(held);
        match &outcome {
            Ok(()) => {
                engine.inline.completed(plan.operation, plan.bytes);
                // For estimates; two looks at the clock are 40 ns.
                let took = began.elapsed();
                plan.peer.history.record(plan.operation, plan.bytes, plan.descriptors, took);
            }
            Err(_) => engine.inline.failed(),
        }
        Some(outcome)
    }

    /// Takes a place among the transfers in flight to the peer; yields while there is none.
    fn enter(&self) -> Result<()> {
        let peer = &self.shared.plan.peer;
        if peer.try_enter() {
            return Ok(());
        }
        let deadline = deadline(self.engine.config.operation_timeout);
        let lane = self.engine.lane(peer.lane)?;
        let busy = Error::Busy {
            what: "every transfer slot of the peer",
            hint: "; wait for transfers to end, or raise limits.transfers",
        };
        if self.engine.check_may_wait("post").is_err() {
            // Waiting here would stop a lane that has to end them.
            return Err(busy);
        }
        loop {
            if !matches!(lane.assist(), Assist::Worked) {
                std::thread::yield_now();
            }
            if peer.try_enter() {
                return Ok(());
            }
            self.engine.check()?;
            if Instant::now() > deadline {
                return Err(busy);
            }
        }
    }

    /// Where the transfer stands. Of a finished one: one load. Of an unfinished one: one load, and
    /// where cores are few a turn of the lane on this thread; of one that `post` has given to a GPU, 0.5 us of the driver. The
    /// same answer however often asked.
    pub fn status(&self) -> Status {
        let mut state = self.shared.slot.state();
        if state == SlotState::Posted && self.engine.check().is_ok() {
            self.help();
            self.engine.drive(self.shared.plan.peer.lane);
            state = self.shared.slot.state();
        }
        self.describe(state)
    }

    /// Where the transfer stands, and no more: one load, nothing is helped along. Who waits for the end asks
    /// [`status`](Self::status), or nobody may bring it about where cores are few.
    pub fn peek(&self) -> Status {
        self.describe(self.shared.slot.state())
    }

    /// Copies a chunk of the transfer on this thread, which waits for it anyway; false: there is none. Not on
    /// a lane, which has its own share. One load when there is nothing to copy.
    fn help(&self) -> bool {
        let shared = &self.shared;
        if let Some(issuer) = shared.plan.issuer() {
            return self.look_at_issued(issuer);
        }
        if self.engine.config.copied_by_callers().is_none() || self.engine.is_lane_thread() {
            return false;
        }
        match shared.copy_chunk() {
            Chunk::None | Chunk::Busy => false,
            Chunk::Copied { last } => {
                if last && let Ok(lane) = self.engine.lane(shared.plan.peer.lane) {
                    // A lane that is gone has ended the transfer itself.
                    let _ = lane.submit(Message::Copied(shared.clone()));
                }
                true
            }
        }
    }

    fn describe(&self, state: SlotState) -> Status {
        match state {
            SlotState::Idle => Status::Idle,
            SlotState::Posted => match self.lost() {
                None => Status::InProgress,
                Some(error) => Status::Failed(error),
            },
            SlotState::Done => Status::Done,
            SlotState::Failed => {
                Status::Failed(self.shared.slot.error().unwrap_or(Error::Shutdown))
            }
        }
    }

    /// Why nobody will end this transfer: the process has forked, or its lane died with it in hand.
    fn lost(&self) -> Option<Error> {
        if let Err(error) = self.engine.check_process() {
            return Some(error);
        }
        let lane = self.engine.lane(self.shared.plan.peer.lane).ok()?;
        if lane.is_alive() || !lane.has_finished() {
            return None;
        }
        // Ended meanwhile, perhaps: then that is the answer, at the next look.
        (self.shared.slot.state() == SlotState::Posted).then(|| self.engine.dead())
    }

    /// Waits for the end: polls for a millisecond after the last progress, then sleeps.
    ///
    /// # Errors
    /// The transfer's own error, or [`Error::Timeout`] after `timeout` (it then goes on).
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        let deadline = deadline(timeout);
        let lane = self.engine.lane(self.shared.plan.peer.lane)?;
        self.engine.check_may_wait("wait")?;
        let mut patience = Patience::new();
        loop {
            match self.describe(self.shared.slot.state()) {
                Status::Idle => return Err(never_posted()),
                Status::Done => return Ok(()),
                Status::Failed(error) => return Err(error),
                Status::InProgress => {}
            }
            let helped = self.help();
            let worked = matches!(lane.assist(), Assist::Worked) || helped;
            let now = Instant::now();
            if now >= deadline {
                let peer = self.shared.plan.peer.name.clone();
                return Err(Error::Timeout { what: "a transfer", peer, after: timeout });
            }
            if worked {
                patience.renew(now);
            } else if patience.is_over(now) {
                lane.wake();
                sleep_until_woken(deadline - now, |waker| self.shared.slot.register(waker));
            }
        }
    }

    /// The end as a future, for code on a lane and for async callers. One transfer has one waker:
    /// the last future polled is woken, or the thread that called [`wait`](Self::wait) last.
    pub fn completed(&self) -> impl Future<Output = Result<()>> + '_ {
        std::future::poll_fn(move |context| {
            loop {
                match self.describe(self.shared.slot.state()) {
                    Status::Idle => return Poll::Ready(Err(never_posted())),
                    Status::Done => return Poll::Ready(Ok(())),
                    Status::Failed(error) => return Poll::Ready(Err(error)),
                    Status::InProgress => {}
                }
                if self.shared.slot.register(context.waker()) {
                    self.engine.wake_lanes();
                    return Poll::Pending;
                }
            }
        })
    }

    /// Asks for the end: requests that are not sent are dropped. The transfer ends (in
    /// [`Error::Cancelled`], or done if it was faster) as soon as nothing touches its local memory
    /// any more, and the peer writes nothing more of a WRITE: poll [`status`](Self::status). A WRITE ends in why, such as
    /// [`Error::Timeout`] or [`Error::RemoteDisconnect`], where the peer does not say so; its memory may then still be written.
    pub fn cancel(&self) {
        if self.shared.slot.state() == SlotState::Posted
            && self.engine.check_process().is_ok()
            && let Ok(lane) = self.engine.lane(self.shared.plan.peer.lane)
        {
            // A lane that is gone has ended the transfer itself.
            let _ = lane.submit(Message::Cancel(self.shared.clone()));
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.cancel();
    }
}

fn never_posted() -> Error {
    Error::InvalidArgument("the transfer was never posted".into())
}

pub(crate) fn check_notification(payload: &[u8]) -> Result<()> {
    if payload.len() > MAX_NOTIFICATION_BYTES {
        return Err(Error::Limit {
            what: "bytes of a notification",
            value: payload.len() as u64,
            limit: MAX_NOTIFICATION_BYTES as u64,
        });
    }
    Ok(())
}
