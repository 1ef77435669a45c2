//! Memory behind the handle of a region: the application's, or the engine's.

use std::sync::{Mutex, MutexGuard, PoisonError};

use corelane::{Buffer, Region};

/// What the handle of a region stands for.
pub(crate) struct Memory {
    region: Region,
    /// The engine's own, while nobody is freeing it; `None`: of the application.
    allocation: Option<Mutex<Option<Buffer>>>,
}

impl Memory {
    pub(crate) fn registered(region: Region) -> Self {
        Self { region, allocation: None }
    }

    pub(crate) fn allocated(buffer: Buffer) -> Self {
        Self { region: buffer.region().clone(), allocation: Some(Mutex::new(Some(buffer))) }
    }

    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    pub(crate) fn is_allocated(&self) -> bool {
        self.allocation.is_some()
    }

    fn buffer(&self) -> Option<MutexGuard<'_, Option<Buffer>>> {
        let buffer = self.allocation.as_ref()?;
        Some(buffer.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes the engine's memory, to free it; `None`: there is none, or somebody is freeing it.
    pub(crate) fn take_buffer(&self) -> Option<Buffer> {
        self.buffer()?.take()
    }

    /// After a `take_buffer`, if it could not be freed.
    pub(crate) fn put_back(&self, buffer: Buffer) {
        if let Some(mut place) = self.buffer() {
            *place = Some(buffer);
        }
    }
}

/// What an engine allocated and its application did not free, as the engine ends; `quiet`: nothing
/// touches it any more.
pub(crate) fn end_with_engine(buffers: Vec<Buffer>, quiet: bool) {
    for buffer in buffers {
        if quiet {
            drop(buffer);
        } else {
            // Somebody may still write there: the addresses must never be another's.
            std::mem::forget(buffer);
        }
    }
}
