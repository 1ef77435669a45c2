//! `Engine`: registered memory.

use std::sync::Arc;

use super::{Engine, Message};
#[cfg(doc)]
use crate::config::EngineConfig;
use crate::error::{Error, Result};
use crate::memory::Region;
use crate::sync::{Ticket, deadline};
use crate::sys;
use crate::wire::{Access, MemoryKind, RegionDescriptor, RegionKey};

impl Engine {
    /// Registers memory: makes it usable in plans and, as far as `access` goes, by peers that get
    /// its descriptor. Costs a message to each lane; nothing is pinned or touched.
    ///
    /// Ranges may overlap and repeat.
    ///
    /// # Safety
    /// The memory must stay mapped, and must not be used through Rust references in ways that
    /// conflict with the transfers that the application and its peers start, until
    /// [`deregister`](Self::deregister) has returned `Ok` or the engine is shut down.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] (null, empty, wraps around), [`Error::Limit`], [`Error::Shutdown`].
    pub unsafe fn register(&self, ptr: *mut u8, len: usize, access: Access) -> Result<Region> {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.register_kind(ptr as u64, len as u64, MemoryKind::Dram, access) }
    }

    /// As [`register`](Self::register), for memory of any kind, by address.
    ///
    /// # Safety
    /// As for [`register`](Self::register).
    ///
    /// # Errors
    /// As for [`register`](Self::register).
    pub unsafe fn register_kind(
        &self,
        base: u64,
        len: u64,
        kind: MemoryKind,
        access: Access,
    ) -> Result<Region> {
        let shared = &self.shared;
        shared.check()?;
        if base == 0 || len == 0 || base.checked_add(len).is_none() || len > isize::MAX as u64 {
            return Err(Error::InvalidArgument(format!(
                "a region of {len} bytes at {base:#x} is null, empty or wraps around"
            )));
        }
        let random = sys::random::<12>().map_err(|e| Error::io("reading random bytes", e))?;
        let mut wide = [0; 16];
        wide[..12].copy_from_slice(&random);
        let random = u128::from_le_bytes(wide);
        let incarnation = shared.identity.incarnation;
        let region = shared.registry_mut().insert(|slot| RegionDescriptor {
            incarnation,
            key: RegionKey::new(slot, random),
            base,
            len,
            kind,
            access,
        })?;
        for lane in shared.lanes() {
            if lane.submit(Message::AddRegion(region.clone())).is_err() {
                let mut registry = shared.registry_mut();
                registry.close(&region);
                registry.remove(&region);
                return Err(shared.dead());
            }
        }
        Ok(Region { inner: region })
    }

    /// Takes a registration back. When it returns `Ok`, nothing of this engine or of a peer touches
    /// the memory any more, and descriptors of it are refused.
    ///
    /// # Errors
    /// [`Error::Busy`] when accesses in progress did not end within
    /// [`deregister_timeout`](EngineConfig::deregister_timeout): the region is kept, try again.
    /// [`Error::InvalidArgument`] when it is not registered here (any more).
    pub fn deregister(&self, region: &Region) -> Result<()> {
        let shared = &self.shared;
        shared.check_process()?;
        shared.check_may_wait("deregister")?;
        if !shared.registry_mut().close(&region.inner) {
            return Err(Error::InvalidArgument(format!(
                "{region:?} is not registered with this engine (any more)"
            )));
        }
        let deadline = deadline(shared.config.deregister_timeout);
        let tickets: Vec<Arc<Ticket<()>>> = shared.lanes().iter().map(|_| Ticket::new()).collect();
        for (lane, ticket) in shared.lanes().iter().zip(&tickets) {
            let message = Message::CloseRegion(region.inner.clone(), ticket.clone());
            if lane.submit(message).is_err() {
                // A lane that is gone touches nothing.
                ticket.complete(());
            }
        }
        let quiet = shared.lanes().iter().zip(&tickets).all(|(lane, ticket)| {
            let assist = || {
                lane.assist();
            };
            ticket.wait(deadline, assist).is_some() || !lane.is_alive()
        });
        if quiet {
            shared.registry_mut().remove(&region.inner);
            return Ok(());
        }
        for lane in shared.lanes() {
            let _ = lane.submit(Message::ReopenRegion(region.inner.clone()));
        }
        shared.registry_mut().reopen(&region.inner);
        Err(Error::Busy {
            what: "the region",
            hint: "; transfers or peers still use it: wait for them, cancel them, or try again",
        })
    }

    /// A region of this engine that holds all of `len` bytes at `addr`, if one is registered. With
    /// several, the one that starts last.
    pub fn region_at(&self, addr: u64, len: u64) -> Option<Region> {
        self.shared.check_process().ok()?;
        let inner = self.shared.registry().find(addr, len)?.clone();
        Some(Region { inner })
    }
}
