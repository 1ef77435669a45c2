//! `Engine`: preparing transfers.

use std::sync::Arc;

use super::{Engine, Message};
use crate::error::{Error, Result};
use crate::memory::{LocalSegment, RemoteSegment};
use crate::peer::Peer;
use crate::plan::{
    DescriptorPair, Device, LocalBlocks, LocalList, Operation, PlanBuilder, PlanInner,
    RemoteBlocks, RemoteList,
};
use crate::sync::Ticket;
use crate::transfer::Plan;

impl Engine {
    /// Prepares a transfer of `local[i]` from or to `remote[i]`, for every `i`. All checks, merging
    /// and splitting happen here, once; some tens of nanoseconds a descriptor.
    ///
    /// Starts connecting if need be, without waiting.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], [`Error::NotRegistered`], [`Error::OutOfBounds`],
    /// [`Error::Permission`], [`Error::StaleDescriptor`], [`Error::Limit`]; with GPU memory [`Error::Gpu`] and
    /// [`Error::NoTransport`].
    pub fn prepare(
        &self,
        operation: Operation,
        peer: &Peer,
        local: &[LocalSegment],
        remote: &[RemoteSegment<'_>],
    ) -> Result<Plan> {
        self.build(operation, peer, local, remote)
    }

    /// As [`prepare`](Self::prepare), for lists of blocks.
    ///
    /// # Errors
    /// As for [`prepare`](Self::prepare).
    pub fn prepare_blocks(
        &self,
        operation: Operation,
        peer: &Peer,
        local: &LocalBlocks<'_>,
        remote: &RemoteBlocks<'_>,
    ) -> Result<Plan> {
        local.check()?;
        remote.check()?;
        self.build(operation, peer, local, remote)
    }

    /// As [`prepare`](Self::prepare), for `count` pairs that are asked for one after the other, so
    /// that no lists have to be made. `pair` may refuse with an error, which is returned.
    ///
    /// # Errors
    /// As for [`prepare`](Self::prepare).
    pub fn prepare_pairs<'d>(
        &self,
        operation: Operation,
        peer: &Peer,
        count: usize,
        pair: impl FnMut(usize) -> Result<DescriptorPair<'d>>,
    ) -> Result<Plan> {
        self.build_with(operation, peer, |builder| builder.build_pairs(count, pair))
    }

    fn build<'d>(
        &self,
        operation: Operation,
        peer: &Peer,
        local: &(impl LocalList + ?Sized),
        remote: &(impl RemoteList<'d> + ?Sized),
    ) -> Result<Plan> {
        self.build_with(operation, peer, |builder| builder.build(local, remote))
    }

    fn build_with(
        &self,
        operation: Operation,
        peer: &Peer,
        build: impl FnOnce(&PlanBuilder<'_>) -> Result<PlanInner>,
    ) -> Result<Plan> {
        let shared = &self.shared;
        shared.check()?;
        if !Arc::ptr_eq(&peer.engine, shared) {
            return Err(Error::InvalidArgument("the peer belongs to another engine".into()));
        }
        let registry = shared.registry();
        let builder = PlanBuilder {
            operation,
            peer: &peer.shared,
            registry: &registry,
            chunk_bytes: shared.config.chunk_bytes as u64,
            latency_bytes: shared.config.latency_bytes as u64,
            max_descriptors: shared.config.limits.descriptors,
            local: shared.may_be_local(&peer.shared),
            rdma: shared.may_be_rdma(&peer.shared),
        };
        let mut inner = build(&builder)?;
        drop(registry);
        if let Some(Device::Listed(listed)) = inner.device.take() {
            // Not under the lock: mapping memory of another process takes its time.
            let ready = if shared.may_be_local(&peer.shared) {
                let same_process = super::shared::is_of_this_process(peer.shared.incarnation);
                listed.finish(same_process, shared.config.gpu.settings())
            } else {
                let reason = "transport `local` is not allowed by both sides".to_owned();
                Err(Error::NoTransport { peer: peer.shared.name.clone(), reason })
            };
            inner.device = Some(match ready {
                Ok(ready) => {
                    // Mostly it has that since memory of this GPU was registered.
                    shared.equip_lane(peer.shared.lane, ready.device());
                    let issuer = ready.only_range().and_then(|_| shared.issuer(ready.device()));
                    Device::Ready(Box::new(ready), issuer)
                }
                Err(Error::NoTransport { reason, .. })
                    if shared.may_be_framed(&peer.shared) || inner.may_be_wired() =>
                {
                    Device::Elsewhere(reason)
                }
                Err(Error::NoTransport { reason, peer: name }) => {
                    let rdma = shared.may_be_rdma(&peer.shared).then(|| inner.why_not_wired());
                    let rdma = rdma.map(|why| format!("transport `rdma`: {why}; "));
                    let rdma = rdma.unwrap_or_default();
                    let reason = format!(
                        "{rdma}transport `tcp` is not allowed by both sides; within a host: {reason}"
                    );
                    return Err(Error::NoTransport { peer: name, reason });
                }
                Err(error) => return Err(error),
            });
        }
        let plan = Plan { inner: Arc::new(inner), engine: shared.clone() };
        if !peer.is_connected() {
            let warm_up = Message::Connect(peer.shared.clone(), Ticket::new());
            self.submit(peer.shared.lane, warm_up)?;
        }
        Ok(plan)
    }
}
