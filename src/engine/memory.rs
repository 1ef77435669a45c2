//! `Engine`: registered memory.

use std::sync::Arc;

use std::time::Instant;

use super::{Engine, EngineShared, Message};
#[cfg(doc)]
use crate::config::EngineConfig;
use crate::config::TransportKind;
use crate::error::{Error, Result};
use crate::gpu;
use crate::memory::{Backing, Buffer, Region, RegionInner};
use crate::sync::{Ticket, deadline};
use crate::sys;
use crate::transport::local::{OwnMemory, node_of};
use crate::wire::{Access, MemoryKind, RegionDescriptor, RegionKey};

impl Engine {
    /// Registers memory: makes it usable in plans and, as far as `access` goes, by peers that get
    /// its descriptor. Costs a message to each lane, and where there are RDMA devices, a call for each of them that pins
    /// every page (some 0.3 us a page); else nothing is pinned, and nothing is touched.
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

    /// As [`register`](Self::register), for memory of any kind, by address. The first memory of a GPU costs some milliseconds for each
    /// lane, and up to 5 s for each where the GPU does not answer: this thread makes what the lanes need there.
    ///
    /// # Safety
    /// As for [`register`](Self::register).
    ///
    /// # Errors
    /// As for [`register`](Self::register); [`Error::Gpu`] where there is no driver, or no such GPU.
    pub unsafe fn register_kind(
        &self,
        base: u64,
        len: u64,
        kind: MemoryKind,
        access: Access,
    ) -> Result<Region> {
        self.shared.check()?;
        if base == 0 || len == 0 || base.checked_add(len).is_none() || len > isize::MAX as u64 {
            return Err(Error::InvalidArgument(format!(
                "a region of {len} bytes at {base:#x} is null, empty or wraps around"
            )));
        }
        let backing = match kind {
            MemoryKind::Vram { device } => Backing::Gpu(gpu::allocation_of(base, len, device)?),
            MemoryKind::Dram => {
                if let Some(device) = gpu::holds_device_memory(base, len) {
                    return Err(Error::InvalidArgument(format!(
                        "{len} bytes at {base:#x} are memory of GPU {device}: register them as such"
                    )));
                }
                Backing::Application
            }
        };
        self.add_region(base, len, kind, access, backing)
    }

    fn add_region(
        &self,
        base: u64,
        len: u64,
        kind: MemoryKind,
        access: Access,
        backing: Backing,
    ) -> Result<Region> {
        let shared = &self.shared;
        let random = sys::random::<12>().map_err(|e| Error::io("reading random bytes", e))?;
        let mut wide = [0; 16];
        wide[..12].copy_from_slice(&random);
        let random = u128::from_le_bytes(wide);
        let incarnation = shared.identity.incarnation;
        let registrations = match backing {
            // SAFETY: whoever registers memory of a GPU keeps it allocated likewise.
            Backing::Gpu(ref allocation) => unsafe {
                let way = shared.config.gpu.rdma;
                let sockets = shared.identity.transports & TransportKind::Tcp.bit() != 0;
                shared.rails.register_gpu(allocation, (base, len), access, way, sockets)?
            },
            // SAFETY: whoever registers memory keeps it mapped until it has been deregistered, or the engine's own keeps
            // itself. Pages are pinned here, outside all locks.
            _ => unsafe { shared.rails.register(base, len, access) },
        };
        let rail_keys = registrations.remote_keys().clone();
        let device = match &backing {
            Backing::Gpu(allocation) => Some(Box::new(allocation.describe(access))),
            Backing::Application | Backing::Engine(_) => None,
        };
        let describe = |slot| RegionDescriptor {
            incarnation,
            key: RegionKey::new(slot, random),
            base,
            len,
            kind,
            access,
            rail_keys,
            device,
        };
        if let Backing::Gpu(allocation) = &backing {
            shared.equip_lanes(allocation.device());
        }
        let region = shared.registry_mut().insert(describe, backing, registrations)?;
        for lane in shared.lanes() {
            if lane.submit(Message::AddRegion(region.clone())).is_err() {
                let mut registry = shared.registry_mut();
                registry.close(&region);
                registry.remove(&region);
                return Err(shared.dead());
            }
        }
        shared.publish(&region);
        Ok(Region { inner: region })
    }

    /// Allocates memory that peers on this host can map, and registers it: a peer that reads or writes it copies
    /// plainly, without a system call (transport `local`). For transfers that this side begins, that holds where the *peer's*
    /// memory is of its engine. `len` zero bytes, in huge pages where some are reserved, on the NUMA node of the first lane.
    /// Takes all the memory now: some 0.3 ms a MiB.
    ///
    /// A forked child does not have it: at these addresses nothing is mapped there, and touching it is a SIGSEGV.
    ///
    /// To be given back by [`free`](Self::free), or when the [`Buffer`] is dropped; until then it keeps the engine
    /// alive, as any handle does.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] (no bytes), [`Error::Io`] (not so much memory), [`Error::Limit`],
    /// [`Error::Shutdown`].
    pub fn alloc(&self, len: usize, access: Access) -> Result<Buffer> {
        let shared = &self.shared;
        shared.check()?;
        if len == 0 {
            return Err(Error::InvalidArgument("memory of no bytes".into()));
        }
        let core = shared.lanes().first().and_then(corelane_runtime::Lane::core);
        let memory = OwnMemory::allocate(len, core.and_then(node_of))
            .map_err(|e| Error::io(format!("allocating {len} bytes of shared memory"), e))?;
        let base = memory.as_ptr() as usize as u64;
        let region =
            self.add_region(base, len as u64, MemoryKind::Dram, access, Backing::Engine(memory))?;
        Ok(Buffer { region, engine: self.clone(), freed: false })
    }

    /// Gives memory of the engine back. Nothing touches it any more when this returns `Ok`; its pages go when the
    /// last plan that names it is dropped.
    ///
    /// # Errors
    /// Those of [`deregister`](Self::deregister); with `Busy`, the buffer comes back, to be freed again.
    pub fn free(&self, mut buffer: Buffer) -> std::result::Result<(), (Error, Buffer)> {
        match self.deregister(&buffer.region) {
            Ok(()) => {
                buffer.freed = true;
                Ok(())
            }
            Err(error) => Err((error, buffer)),
        }
    }

    /// Takes a registration back. When it returns `Ok`, nothing of this engine or of a peer touches
    /// the memory any more, and descriptors of it are refused.
    ///
    /// # Errors
    /// [`Error::Busy`] when accesses in progress did not end within
    /// [`deregister_timeout`](EngineConfig::deregister_timeout): they go on, nothing new begins
    /// (but what peers do by RDMA, whom only `Ok` shuts out), the region is kept: try again.
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
        if let Some(table) = &shared.table {
            table.close(region.descriptor());
        }
        region.inner.close_to_copies();
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
        if quiet && shared.wait_for_copies_of(&region.inner, deadline) {
            // Peers that use it by RDMA are refused by the device from here on.
            region.inner.registrations.give_back();
            shared.registry_mut().remove(&region.inner);
            return Ok(());
        }
        // It stays closed: who goes on without this memory's being quiet at least gets nothing new in it, but by RDMA, of
        // which no lane takes part.
        shared.registry_mut().give_up(&region.inner);
        let hint = if region.inner.is_abandoned() {
            "; a GPU does not end a copy that it began there: keep the memory, and start the process again"
        } else {
            "; transfers or peers still use it: wait for them, or cancel them, and deregister it again"
        };
        Err(Error::Busy { what: "the region", hint })
    }

    /// A region of this engine that holds all of `len` bytes at `addr`, if one is registered. With
    /// several, the one that starts last.
    pub fn region_at(&self, addr: u64, len: u64) -> Option<Region> {
        self.shared.check_process().ok()?;
        let inner = self.shared.registry().find(addr, len)?.clone();
        Some(Region { inner })
    }
}

impl EngineShared {
    /// Lets peers on this host see a region.
    fn publish(&self, region: &RegionInner) {
        if let Some(table) = &self.table
            && region.descriptor.access != Access::LOCAL
        {
            table.publish(&region.descriptor);
        }
    }

    /// After a region was closed: waits until no thread of this process and no peer of this host copies
    /// any more what had begun before.
    fn wait_for_copies_of(&self, region: &RegionInner, deadline: Instant) -> bool {
        while !region.close_to_copies() {
            if region.is_abandoned() || Instant::now() >= deadline {
                return false;
            }
            std::thread::yield_now();
        }
        self.accessors.wait_until_quiet(Some(region.descriptor.key.place()), deadline)
    }
}
