//! Memory of GPUs on the rails (`GPUDirect` RDMA): by dmabuf, or by the kernel module that makes a GPU's addresses known to verbs.

use std::sync::atomic::{AtomicBool, Ordering};

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

/// What the log has been told: each once.
#[derive(Debug, Default)]
pub(super) struct Told {
    reached: AtomicBool,
    partly: AtomicBool,
    not_reached: AtomicBool,
    not_synchronised: AtomicBool,
}

/// What becomes of a rail when GPU memory is registered.
#[derive(Default)]
struct Outcome {
    /// Rails that have it, and how.
    reached: Vec<String>,
    /// Those that have not, and why.
    refused: Vec<String>,
}

impl Rails {
    /// Registers memory of a GPU on every rail, in the way that is asked for. Transfers of it go over the rails that take it. Where
    /// `Auto` finds none, the memory is reached by other transports, of which `sockets` says whether they are allowed, and the log
    /// says why, once.
    ///
    /// # Safety
    /// The memory stays allocated until the registrations have been given back.
    ///
    /// # Errors
    /// [`Error::Gpu`]: the one way that is allowed fails, on all rails or on one that was asked for by name.
    pub(crate) unsafe fn register_gpu(
        &self,
        memory: &Allocation,
        (base, len): (u64, u64),
        access: Access,
        way: GpuRdma,
        sockets: bool,
    ) -> Result<Registrations> {
        if self.is_empty() {
            return Ok(Registrations::default());
        }
        if way == GpuRdma::Off {
            return Ok(Registrations::without("gpu_rdma=off"));
        }
        let visibility = match memory.device().visibility() {
            Ok(visibility) => visibility,
            Err(error) => return self.without(way, &error.0, sockets),
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
        let mut outcome = Outcome::default();
        for rail in self.all() {
            // SAFETY: the caller's promise.
            match unsafe { range.register(rail, way) } {
                Ok((region, name)) => {
                    made.push(Some(region));
                    outcome.reached.push(format!("{} by {name}", rail.name()));
                }
                Err(reason) => {
                    let reason = format!("{}: {reason}", rail.name());
                    if way != GpuRdma::Auto && self.are_named() {
                        return Err(forced(way, &reason));
                    }
                    outcome.refused.push(reason);
                    made.push(None);
                }
            }
        }
        let refused = outcome.refused.join("; ");
        if outcome.reached.is_empty() {
            return self.without(way, &refused, sockets);
        }
        self.tell(&outcome, visibility, memory.synchronise_calls(base, len));
        let flush = (visibility == Visibility::AfterFlush).then(|| memory.device());
        let refused = (!refused.is_empty()).then(|| refused.into());
        let near = self.near_gpu(memory.device());
        Ok(Registrations::new(made, near).flushed_by(flush).refused_because(refused))
    }

    /// Devices do not reach GPU memory, for this reason.
    fn without(&self, way: GpuRdma, reason: &str, sockets: bool) -> Result<Registrations> {
        if way != GpuRdma::Auto {
            return Err(forced(way, reason));
        }
        if !self.told_of_gpu.not_reached.swap(true, Ordering::Relaxed) {
            if sockets {
                tracing::warn!(
                    reason,
                    "RDMA devices do not reach GPU memory, which goes through pinned host memory and sockets"
                );
            } else {
                tracing::warn!(
                    reason,
                    "RDMA devices do not reach GPU memory, which goes to no other host: transport `tcp` is not allowed"
                );
            }
        }
        Ok(Registrations::without(reason))
    }

    /// Says once which devices reach GPU memory and which do not, and that it is not so synchronous as it should be.
    fn tell(
        &self,
        outcome: &Outcome,
        visibility: Visibility,
        synchronised: std::result::Result<(), GpuError>,
    ) {
        let told = &self.told_of_gpu;
        let rails = outcome.reached.join(", ");
        if outcome.refused.is_empty() {
            if !told.reached.swap(true, Ordering::Relaxed) {
                tracing::info!(rails, ?visibility, "RDMA devices reach GPU memory");
            }
        } else if !told.partly.swap(true, Ordering::Relaxed) {
            let without = outcome.refused.join("; ");
            tracing::warn!(
                rails,
                without,
                ?visibility,
                "some RDMA devices reach GPU memory, and transfers of it go over these only"
            );
        }
        if let Err(error) = synchronised
            && !told.not_synchronised.swap(true, Ordering::Relaxed)
        {
            let hint = "copies within the GPU that the application makes must be waited for before a transfer";
            tracing::warn!(%error, hint, "CU_POINTER_ATTRIBUTE_SYNC_MEMOPS cannot be set");
        }
    }
}

/// The one way that is allowed fails.
fn forced(way: GpuRdma, reason: &str) -> Error {
    let what = format!("registering GPU memory for RDMA, gpu_rdma={}", way.name());
    Error::Gpu { what, reason: reason.to_owned() }
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
                Err(error) => {
                    // Without the module these are addresses of nothing.
                    let hint = match error.raw_os_error() {
                        Some(libc::EFAULT) => " (`modprobe nvidia_peermem` where it is not loaded)",
                        _ => "",
                    };
                    reasons.push(format!("nvidia_peermem: {error}{hint}"));
                }
            }
        }
        Err(reasons.join("; "))
    }
}
