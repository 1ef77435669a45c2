//! What the two sides drive: an agent of NIXL, or a bare baseline in its place.

use anyhow::Result;

use super::timing::{Length, Times};
use crate::arena::Arena;
use crate::case::Operation;

/// One side of a pair. The measuring loops are compiled for each kind, so that none pays for another.
pub(crate) trait Driver {
    /// Whether preparing is something to measure.
    const PREPARES: bool;

    /// A transfer that can be posted again and again.
    type Prepared;
    /// One more request over the same blocks; dropping it releases it.
    type Request;

    /// The memory that is transferred from and into.
    fn arena(&self) -> &Arena;

    /// What the other side needs to be introduced.
    fn metadata(&self) -> Result<Vec<u8>>;

    /// Introduces the other side, whose arena begins at `address` there.
    fn meet(&mut self, metadata: &[u8], address: u64) -> Result<()>;

    /// Prepares the transfer of blocks of one length between offsets of the two arenas.
    fn prepare(
        &self,
        operation: Operation,
        places: (&[u64], &[u64]),
        block_bytes: usize,
    ) -> Result<Self::Prepared>;

    /// Prepares the same transfer once more, from lists that are ready.
    fn request(&self, prepared: &Self::Prepared) -> Result<Self::Request>;

    /// Told at the beginning of a pass, whose first transfers are untimed.
    fn begin_pass(&self) {}

    /// Told between those and the timed ones, when contents have been renewed.
    fn timing(&self) {}

    /// Posts a prepared transfer and polls without yielding until it is over.
    fn transfer(&self, prepared: &Self::Prepared) -> Result<Transferred>;

    /// Warms up and times each list of transfers on a thread of its own, as
    /// [`time_in_threads`](super::timing::time_in_threads) does.
    fn time_in_threads(
        &self,
        lists: &[Vec<Self::Prepared>],
        cores: &[usize],
        length: Length,
        looks: (impl FnOnce(), impl FnOnce()),
    ) -> Result<Times>;

    /// Posts a prepared transfer; true where it is over already.
    fn post(&self, prepared: &Self::Prepared) -> Result<bool>;

    /// Whether a posted transfer is over.
    fn is_finished(&self, prepared: &Self::Prepared) -> Result<bool>;

    /// Sends a notification to the other side.
    fn notify(&mut self, text: &str) -> Result<()>;

    /// Waits, polling, for the answer to a notification: exactly one, and with the same text.
    fn await_answer(&mut self, text: &str) -> Result<()>;

    /// Sends every notification that has arrived back. `seen` is told of each afterwards, and since when it was held.
    fn answer(&mut self, seen: impl FnMut(&[u8], u64)) -> Result<()>;
}

/// Times of one transfer.
pub(crate) struct Transferred {
    /// The caller's time in posting; `None` where posting is all there is.
    pub(crate) posted_ns: Option<u64>,
    pub(crate) completed_ns: u64,
}
