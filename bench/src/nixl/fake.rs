//! A driver for tests: both sides in this process, transfers are over when they are posted.

use std::cell::Cell;

use anyhow::{Result, bail};

use super::driver::{Driver, Transferred};
use super::timing::{Length, Times};
use crate::arena::Arena;
use crate::case::Operation;

/// The initiator, which reaches the target's arena directly.
pub(super) struct Fake {
    pub(super) here: Arena,
    pub(super) there: Arena,
    pub(super) transfers: Cell<u64>,
}

/// The blocks of a transfer, on both sides.
pub(super) struct FakePrepared {
    operation: Operation,
    blocks: Vec<(u64, u64)>,
    len: usize,
}

impl Fake {
    pub(super) fn new(len: usize) -> Self {
        let arena = || Arena::new(len.max(4096)).expect("map");
        Self { here: arena(), there: arena(), transfers: Cell::new(0) }
    }

    /// The target, which sees the same memory from the other side.
    pub(super) fn target(&self) -> Self {
        Self { here: self.there.clone(), there: self.here.clone(), transfers: Cell::new(0) }
    }
}

impl Driver for Fake {
    const PREPARES: bool = false;

    type Prepared = FakePrepared;
    type Request = ();

    fn arena(&self) -> &Arena {
        &self.here
    }

    fn metadata(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn meet(&mut self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }

    fn prepare(
        &self,
        operation: Operation,
        (local, remote): (&[u64], &[u64]),
        len: usize,
    ) -> Result<FakePrepared> {
        let blocks = local.iter().copied().zip(remote.iter().copied()).collect();
        Ok(FakePrepared { operation, blocks, len })
    }

    fn request(&self, _: &FakePrepared) -> Result<()> {
        Ok(())
    }

    fn transfer(&self, prepared: &FakePrepared) -> Result<Transferred> {
        let FakePrepared { operation, blocks, len } = prepared;
        for &(local, remote) in blocks {
            self.here.with_block(local, *len, |local| {
                self.there.with_block(remote, *len, |remote| match operation {
                    Operation::Write => remote.copy_from_slice(local),
                    _ => local.copy_from_slice(remote),
                });
            });
        }
        self.transfers.set(self.transfers.get() + 1);
        Ok(Transferred { posted_ns: None, completed_ns: 100 })
    }

    fn time_in_threads(
        &self,
        _: &[Vec<FakePrepared>],
        _: &[usize],
        _: Length,
        _: (impl FnOnce(), impl FnOnce()),
    ) -> Result<Times> {
        bail!("one thread only")
    }

    fn post(&self, prepared: &FakePrepared) -> Result<bool> {
        self.transfer(prepared).map(|_| true)
    }

    fn is_finished(&self, _: &FakePrepared) -> Result<bool> {
        Ok(true)
    }

    fn notify(&mut self, _: &str) -> Result<()> {
        bail!("no notifications")
    }

    fn await_answer(&mut self, _: &str) -> Result<()> {
        bail!("no notifications")
    }

    fn answer(&mut self, _: impl FnMut(&[u8], u64)) -> Result<()> {
        Ok(())
    }
}
