//! Memory of GPUs on the rails (`GPUDirect` RDMA): by dmabuf, or by the kernel module that makes a GPU's addresses known to verbs.

use std::sync::atomic::Ordering;

use smallvec::SmallVec;

use super::rails::{Rail, Rails, Registrations};
use crate::config::GpuRdma;
use crate::error::{Error, Result};
use crate::gpu::{Allocation, DmaBuf, GpuError, Visibility};
use crate::verbs::{MemoryAccess, MemoryRegion};
use crate::wire::Access;

/// A range of a GPU's memory that is being registered.
struct Range<'a> {
    base: u64,
    len: usize,
    access: MemoryAccess,
    /// What the driver has exported it as; `None`: it was not asked to.
    exported: Option<std::result::Result<&'a DmaBuf, &'a GpuError>>,
}

impl Rails {
    /// Registers memory of a GPU on every rail, in the way that is asked for. Where `Auto` finds none, the memory is reached
    /// by other transports, and the log says why, once.
    ///
    /// # Safety
    /// The memory stays allocated until the registrations have been given back.
    ///
    /// # Errors
    /// [`Error::Gpu`]: the one way that is allowed fails.
    pub(crate) unsafe fn register_gpu(
        &self,
        memory: &Allocation,
        (base, len): (u64, u64),
        access: Access,
        way: GpuRdma,
    ) -> Result<Registrations> {
        if self.is_empty() || way == GpuRdma::Off {
            return Ok(Registrations::default());
        }
        let visibility = match memory.device().visibility() {
            Ok(visibility) => visibility,
            Err(error) => return self.without(way, &error.0).map(|()| Registrations::default()),
        };
        let exported = (way != GpuRdma::PeerMem).then(|| memory.export(base, len));
        let range = Range {
            base,
            len: usize::try_from(len)
                .map_err(|_| Error::InvalidArgument(format!("a region of {len} bytes")))?,
            // Pages of a GPU are not faulted in.
            access: MemoryAccess { on_demand: false, ..self.access(access) },
            exported: exported.as_ref().map(|exported| exported.as_ref()),
        };
        let mut made = SmallVec::new();
        let mut named = "";
        for rail in self.all() {
            // SAFETY: the caller's promise.
            match unsafe { range.register(rail, way) } {
                Ok((region, name)) => {
                    made.push(Some(region));
                    named = name;
                }
                Err(reason) => {
                    self.without(way, &format!("{}: {reason}", rail.name()))?;
                    made.push(None);
                }
            }
        }
        if named.is_empty() {
            return Ok(Registrations::default());
        }
        let synchronised = memory.synchronise_calls(base, len);
        if !self.has_gpu.swap(true, Ordering::Relaxed) {
            tracing::info!(way = named, ?visibility, "RDMA devices reach GPU memory");
            if let Err(error) = synchronised {
                let hint = "copies within the GPU that the application makes must be waited for before a transfer";
                tracing::warn!(%error, hint, "CU_POINTER_ATTRIBUTE_SYNC_MEMOPS cannot be set");
            }
        }
        let flush = (visibility == Visibility::AfterFlush).then(|| memory.device());
        Ok(Registrations::new(made, 0).flushed_by(flush))
    }

    /// Devices do not reach GPU memory, for this reason.
    fn without(&self, way: GpuRdma, reason: &str) -> Result<()> {
        if way != GpuRdma::Auto {
            let what = format!("registering GPU memory for RDMA, gpu_rdma={}", way.name());
            return Err(Error::Gpu { what, reason: reason.to_owned() });
        }
        if !self.complained_of_gpu.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                reason,
                "RDMA devices do not reach GPU memory, which goes through pinned host memory and sockets"
            );
        }
        Ok(())
    }
}

impl Range<'_> {
    /// The registration, and by which way it was made.
    ///
    /// # Safety
    /// As for `Rails::register_gpu`.
    unsafe fn register(
        &self,
        rail: &Rail,
        way: GpuRdma,
    ) -> std::result::Result<(MemoryRegion, &'static str), String> {
        let mut reasons: SmallVec<[String; 2]> = SmallVec::new();
        match self.exported {
            Some(Ok(buffer)) => {
                let (fd, offset) = (buffer.fd(), buffer.offset());
                // SAFETY: what may be written is the application's decision, as with any region.
                let made = unsafe {
                    MemoryRegion::of_dmabuf(&rail.pd, fd, offset, self.len, self.base, self.access)
                };
                match made {
                    Ok(region) => return Ok((region, GpuRdma::DmaBuf.name())),
                    Err(error) => reasons.push(format!("dmabuf: {error}")),
                }
            }
            Some(Err(error)) => reasons.push(format!("dmabuf: {error}")),
            None => {}
        }
        if way != GpuRdma::DmaBuf {
            // SAFETY: the caller's promise. Without the kernel module the address is one that nothing can be pinned at.
            let made = unsafe { MemoryRegion::new(&rail.pd, self.base, self.len, self.access) };
            match made {
                Ok(region) => return Ok((region, GpuRdma::PeerMem.name())),
                Err(error) => reasons.push(format!("nvidia_peermem: {error}")),
            }
        }
        Err(reasons.join("; "))
    }
}
