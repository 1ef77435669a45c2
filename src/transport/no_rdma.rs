//! Transport `rdma` where it was not built (feature `rdma`): there are no devices.

#![expect(
    clippy::unused_self,
    clippy::unnecessary_wraps,
    reason = "stands in for what has devices"
)]

use std::sync::Arc;

use crate::config::{GpuRdma, RdmaConfig};
use crate::error::Result as EngineResult;
use crate::gpu::{Allocation, Device};
use crate::wire::{Access, RailKeys};

/// What is near all of several memories: nothing.
pub(crate) fn near_all(_: impl Iterator<Item = u32>) -> u32 {
    0
}

/// What devices tell: nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) enum AsyncEvent {}

/// The queue pairs to a peer: there are none.
#[derive(Debug)]
pub(crate) enum Link {}

/// The RDMA side of a lane.
#[derive(Debug)]
pub(crate) struct LaneRdma;

impl LaneRdma {
    pub(crate) fn new(_: Arc<Rails>) -> Self {
        Self
    }

    pub(crate) fn clear(&mut self) {}
}

/// The RDMA devices of an engine.
#[derive(Debug, Default)]
pub(crate) struct Rails {}

impl Rails {
    pub(crate) fn open(_: &RdmaConfig, _: Option<usize>) -> Result<Self, String> {
        Err("this corelane was built without it (cargo feature `rdma`)".into())
    }

    pub(crate) fn is_empty(&self) -> bool {
        true
    }

    pub(crate) fn first_node(&self) -> Option<usize> {
        None
    }

    pub(crate) fn names(&self) -> String {
        String::new()
    }

    /// # Safety
    /// Always safe: nothing is registered.
    pub(crate) unsafe fn register(&self, _: u64, _: u64, _: Access) -> Registrations {
        Registrations::default()
    }
}

impl Rails {
    /// # Safety
    /// Always safe: nothing is registered.
    pub(crate) unsafe fn register_gpu(
        &self,
        _: &Allocation,
        _: (u64, u64),
        _: Access,
        _: GpuRdma,
        _: bool,
    ) -> EngineResult<Registrations> {
        Ok(Registrations::default())
    }
}

/// A region on the rails of its engine.
#[derive(Debug, Default)]
pub(crate) struct Registrations(RailKeys);

impl Registrations {
    pub(crate) fn key(&self, _: usize) -> u32 {
        0
    }

    pub(crate) fn flush(&self) -> Option<&'static Device> {
        None
    }

    pub(crate) fn is_some(&self) -> bool {
        false
    }

    pub(crate) fn near(&self) -> u32 {
        0
    }

    pub(crate) fn why_refused(&self) -> Option<&str> {
        None
    }

    pub(crate) fn remote_keys(&self) -> &RailKeys {
        &self.0
    }

    pub(crate) fn give_back(&self) {}
}
