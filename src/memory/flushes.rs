//! GPUs that have to be told before their kernels see what devices of peers have written.

use smallvec::SmallVec;

use crate::gpu::{Device, GpuError};

/// What is flushed.
pub(super) trait Flushed {
    fn ordinal(&self) -> u32;
    fn flush_writes(&self) -> Result<(), GpuError>;
    /// It never will be again.
    fn is_lost(&self) -> bool;
}

impl Flushed for &'static Device {
    fn ordinal(&self) -> u32 {
        Device::ordinal(self)
    }

    #[cfg(feature = "rdma")]
    fn flush_writes(&self) -> Result<(), GpuError> {
        Device::flush_writes(self)
    }

    #[cfg(not(feature = "rdma"))]
    fn flush_writes(&self) -> Result<(), GpuError> {
        Ok(())
    }

    fn is_lost(&self) -> bool {
        self.lost().is_some()
    }
}

#[derive(Debug)]
struct Entry<D> {
    device: D,
    /// Of its memory, that peers may write.
    regions: u32,
    /// The last time failed: that has been said.
    failing: bool,
}

/// The GPUs of one lane's regions that are flushed: few, mostly none.
#[derive(Debug)]
pub(super) struct Flushes<D = &'static Device>(SmallVec<[Entry<D>; 1]>);

impl<D> Default for Flushes<D> {
    fn default() -> Self {
        Self(SmallVec::new())
    }
}

impl<D: Flushed> Flushes<D> {
    /// A region of this GPU's memory is there.
    pub(super) fn add(&mut self, device: D) {
        match self.0.iter_mut().find(|known| known.device.ordinal() == device.ordinal()) {
            Some(known) => known.regions += 1,
            None => self.0.push(Entry { device, regions: 1, failing: false }),
        }
    }

    /// One is there no more.
    pub(super) fn remove(&mut self, device: &D) {
        let same = |known: &Entry<D>| known.device.ordinal() == device.ordinal();
        if let Some(at) = self.0.iter().position(same) {
            self.0[at].regions -= 1;
            if self.0[at].regions == 0 {
                self.0.swap_remove(at);
            }
        }
    }

    /// Flushes all. A failure is said once, until one goes well; a GPU that is lost runs no kernel that could miss anything.
    #[inline]
    pub(super) fn flush(&mut self) {
        if !self.0.is_empty() {
            self.0.retain(|entry| entry.flush() || !entry.device.is_lost());
        }
    }
}

impl<D: Flushed> Entry<D> {
    /// False: it has failed.
    fn flush(&mut self) -> bool {
        let outcome = self.device.flush_writes();
        let failed = outcome.is_err();
        if let Err(error) = outcome
            && !self.failing
        {
            let gpu = self.device.ordinal();
            tracing::error!(%error, gpu, "what peers have written is not flushed; their notifications are delivered");
        }
        self.failing = failed;
        !failed
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[derive(Default)]
    struct Gpu {
        ordinal: u32,
        flushes: Cell<u32>,
        fails: Cell<bool>,
        lost: Cell<bool>,
    }

    impl Flushed for &Gpu {
        fn ordinal(&self) -> u32 {
            self.ordinal
        }

        fn flush_writes(&self) -> Result<(), GpuError> {
            self.flushes.set(self.flushes.get() + 1);
            if self.fails.get() { Err(GpuError("no".into())) } else { Ok(()) }
        }

        fn is_lost(&self) -> bool {
            self.lost.get()
        }
    }

    #[test]
    fn a_gpu_is_flushed_once_until_its_last_region_is_gone() {
        let (one, other) = (Gpu::default(), Gpu { ordinal: 1, ..Gpu::default() });
        let mut flushes = Flushes::default();
        for device in [&one, &other, &one] {
            flushes.add(device);
        }
        flushes.flush();
        flushes.remove(&&one);
        flushes.flush();
        assert_eq!((one.flushes.get(), other.flushes.get()), (2, 2));
        flushes.remove(&&one);
        flushes.flush();
        assert_eq!((one.flushes.get(), other.flushes.get()), (2, 3));
        flushes.remove(&&other);
        flushes.flush();
        assert_eq!(other.flushes.get(), 3);
        flushes.add(&other);
        flushes.flush();
        assert_eq!(other.flushes.get(), 4, "it is there again");
    }

    #[test]
    fn one_that_is_lost_is_flushed_no_more_and_one_that_failed_is() {
        let (lost, busy) = (Gpu::default(), Gpu { ordinal: 1, ..Gpu::default() });
        let mut flushes = Flushes::default();
        flushes.add(&lost);
        flushes.add(&busy);
        for gpu in [&lost, &busy] {
            gpu.fails.set(true);
        }
        lost.lost.set(true);
        for _ in 0..5 {
            flushes.flush();
        }
        assert_eq!((lost.flushes.get(), busy.flushes.get()), (1, 5));
        // Its regions go as those of others do.
        flushes.remove(&&lost);
        flushes.remove(&&busy);
        flushes.flush();
        assert_eq!((lost.flushes.get(), busy.flushes.get()), (1, 5));
    }
}
