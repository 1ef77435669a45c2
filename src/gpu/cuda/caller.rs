//! A stream for copies that callers' threads start, one at a time.

use super::super::GpuError;
use super::api::Stream;
use super::device::Device;

/// How often a poll asks: what is around it takes as long as asking once.
const LOOKS: usize = 3;

/// One of its own: what a lane has under way in its streams is not waited for, nor the other way round.
#[derive(Debug)]
pub(crate) struct CallerStream {
    device: &'static Device,
    stream: Stream,
}

// SAFETY: the handle may be used by any thread; its user sees to it that one at a time does.
unsafe impl Send for CallerStream {}

impl CallerStream {
    /// # Errors
    /// The driver's.
    pub(crate) fn new(device: &'static Device) -> Result<Self, GpuError> {
        let _entered = device.enter()?;
        Ok(Self { device, stream: device.new_stream()? })
    }

    /// Gives one range to the copy engine: to, from, length.
    ///
    /// # Errors
    /// The driver's: nothing is being copied.
    ///
    /// # Safety
    /// Nothing but this copy writes what it writes, and both ranges stay what they are until `poll` has said that it has ended.
    pub(crate) unsafe fn copy(&mut self, range: (u64, u64, u64)) -> Result<(), GpuError> {
        let _entered = self.device.enter()?;
        let (to, from, len) = range;
        // SAFETY: the caller's promise.
        let status = unsafe { (self.device.api.copy_async)(to, from, len as usize, self.stream) };
        self.device.check("cuMemcpyAsync", status)
    }

    /// Whether the copy has ended: `None`, it has not. Some calls of the driver, 0.5 us. A write behind the copy, which could be
    /// looked for without one, would cost the thread that starts it a call of 1 us, and is not seen sooner.
    pub(crate) fn poll(&self) -> Option<Result<(), GpuError>> {
        let _entered = match self.device.enter() {
            Ok(entered) => entered,
            Err(lost) => return Some(Err(lost)),
        };
        (0..LOOKS).find_map(|_| self.device.query(self.stream).transpose())
    }

    /// What is under way is not waited for any longer, though it may go on: nothing that it touches may be given back, and nothing
    /// else may be begun. The answer is what its user is told.
    pub(crate) fn give_up(&self) -> GpuError {
        self.device.set_stuck();
        self.device.does_not_answer()
    }
}

impl Drop for CallerStream {
    fn drop(&mut self) {
        // What a GPU does not let go of stays as it is, and so does all of one that is lost.
        if self.device.is_stuck() || !matches!(self.poll(), Some(Ok(()))) {
            return;
        }
        if let Ok(_entered) = self.device.enter() {
            // SAFETY: nothing runs in it. An error leaves nothing to be done.
            unsafe { (self.device.api.stream_destroy)(self.stream) };
        }
    }
}
