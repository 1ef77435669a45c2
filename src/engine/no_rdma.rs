//! What a lane does for transport `rdma` where it was not built: nothing.

use corelane_runtime::Cx;

use super::lane::LaneDriver;
use crate::session::LinkId;
use crate::transport::rdma::AsyncEvent;
use crate::wire::frame::{FrameKind, Header};
use crate::wire::rdma::RdmaFrame;

#[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "stands in for what looks at it")]
impl LaneDriver {
    pub(super) fn rdma_start(&mut self, _: &mut Cx<'_>) {}

    pub(super) fn rdma_attach(&mut self, _: usize, _: LinkId, _: &mut Cx<'_>) -> bool {
        false
    }

    pub(super) fn on_rdma_frame(
        &mut self,
        slot: usize,
        _: LinkId,
        header: &Header,
        _: &mut Cx<'_>,
    ) -> Result<(), String> {
        if header.kind == FrameKind::QueuePair
            && let Some(peer) = self.peers.get_mut(slot)
        {
            peer.core.tell(RdmaFrame::None.encode());
            self.mark(slot);
        }
        Ok(())
    }

    pub(super) fn rdma_timer(&mut self, _: usize, _: &mut Cx<'_>) {}

    pub(super) fn rdma_detach(&mut self, _: usize, _: &str, _: &mut Cx<'_>) {}

    pub(super) fn rdma_flush(&mut self, _: usize, _: &mut Cx<'_>) -> bool {
        false
    }

    pub(super) fn stop_wired(&mut self, _: usize, _: u64, _: bool, _: &mut Cx<'_>) {}

    pub(super) fn poll_rdma(&mut self, _: &mut Cx<'_>) -> bool {
        false
    }

    pub(super) fn drain_rdma(&mut self, _: &mut Cx<'_>) {}

    pub(super) fn rdma_before_sleep(&mut self, _: &mut Cx<'_>) -> bool {
        true
    }

    pub(super) fn on_rdma_fd(&mut self, _: u64, _: &mut Cx<'_>) -> bool {
        false
    }

    pub(super) fn on_rdma_event(&mut self, _: &str, event: AsyncEvent, _: &mut Cx<'_>) {
        match event {}
    }
}
