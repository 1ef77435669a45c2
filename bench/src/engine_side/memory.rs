//! The memory of one engine during one run: the application's own, registered, or the engine's.

use std::ptr::NonNull;

use anyhow::{Context as _, Result};
use corelane::{Access, Engine, MemoryKind, Region};

use crate::arena::Arena;
use crate::case::{Memory, RunSpec};

/// An arena that an engine may transfer.
pub(super) struct EngineMemory {
    pub(super) arena: Arena,
    pub(super) region: Region,
    /// Registered by us, hence ours to deregister.
    registered: bool,
}

impl EngineMemory {
    /// Memory of the kind that the run asks for; `own` provides the application's.
    pub(super) fn provide(
        engine: &Engine,
        spec: &RunSpec,
        gpu: u32,
        len: usize,
        access: Access,
        own: impl FnOnce() -> Result<Arena>,
    ) -> Result<Self> {
        match spec.memory {
            Memory::Registered => {
                let arena = own()?;
                // SAFETY: the arena stays mapped as long as this value's handle to it. The owners of engine and memory
                // deregister it or stop the engine before they drop that. The harness touches blocks only between
                // passes, when no transfer is in flight.
                let region = unsafe { engine.register(arena.as_ptr(), arena.len(), access) }?;
                Ok(Self { arena, region, registered: true })
            }
            Memory::Vram => {
                let arena = Arena::of_gpu(gpu, len)?;
                let (base, len) = (arena.as_ptr() as u64, arena.len() as u64);
                // SAFETY: as above.
                let region = unsafe {
                    engine.register_kind(base, len, MemoryKind::Vram { device: gpu }, access)
                }?;
                Ok(Self { arena, region, registered: true })
            }
            Memory::Engine => {
                let (arena, region) = allocate(engine, len, access)?;
                Ok(Self { arena, region, registered: false })
            }
        }
    }

    /// Takes registered memory back; the engine's own goes with the last handle to its arena.
    pub(super) fn release(&self, engine: &Engine) -> Result<()> {
        if !self.registered {
            return Ok(());
        }
        engine.deregister(&self.region).context("deregistering the memory")
    }
}

/// Memory of the engine, as an arena that frees it with its last handle.
fn allocate(engine: &Engine, len: usize, access: Access) -> Result<(Arena, Region)> {
    let buffer = engine.alloc(len, access)?;
    let region = buffer.region().clone();
    let (start, len) = (NonNull::new(buffer.as_mut_ptr()).context("no memory")?, buffer.len());
    // SAFETY: `len` zeroed bytes at the start of a page, readable and writable until the buffer is dropped, which the
    // arena does with its last handle. Only the transfers of the harness touch them besides.
    let arena = unsafe { Arena::owned_by(start, len, buffer) };
    Ok((arena, region))
}
