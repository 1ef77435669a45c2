//! A plan as RDMA requests: which ranges of the peer's memory go with which ranges of ours.
//!
//! Independent of queue pairs, rails and keys, so that it survives reconnects and serves any rail: 40 bytes a descriptor that
//! has no neighbour, read in order when it is posted, and turned into work requests in a list that stays in the cache. (Work
//! requests prebuilt in the plan would be 144 bytes each, and of one rail.)

use smallvec::SmallVec;

use crate::memory::RemoteSegment;
use crate::wire::RailKeys;

/// Longest run and piece: what their 32-bit lengths, and every device's RC messages, can hold.
const MAX_RUN: u64 = 1 << 30;

/// A contiguous range of the peer's memory, within one registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    /// Index of its keys.
    pub(crate) region: u32,
    /// The first of its pieces; it has all up to those of the next run.
    pub(crate) pieces: u32,
}

/// A contiguous range of our memory, within one registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LocalPiece {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    /// Index of its region in the plan.
    pub(crate) region: u32,
}

/// The requests of a plan. Empty where the peer cannot be reached by RDMA.
#[derive(Debug, Default)]
pub(crate) struct RdmaRequests {
    pub(crate) runs: Box<[Run]>,
    pub(crate) pieces: Box<[LocalPiece]>,
    /// The keys of the peer's regions, one for each of its rails.
    pub(crate) keys: Box<[RailKeys]>,
    /// A bit for each of our rails that is near the memory; 0: all are the same to it.
    pub(crate) near: u32,
}

impl RdmaRequests {
    /// Whether the peer has registered all that the plan touches on this rail of its.
    pub(crate) fn is_open_on(&self, rail: usize) -> bool {
        self.keys.iter().all(|keys| keys.get(rail).is_some_and(|key| *key != 0))
    }
}

/// Builds the requests, one pair of ranges after the other.
#[derive(Debug, Default)]
pub(super) struct RdmaBuilder {
    runs: Vec<Run>,
    pieces: Vec<LocalPiece>,
    keys: Vec<RailKeys>,
    /// Which region of the peer each of them belongs to.
    known: SmallVec<[u128; 4]>,
}

impl RdmaBuilder {
    pub(super) fn new(descriptors: usize) -> Self {
        Self {
            runs: Vec::with_capacity(descriptors),
            pieces: Vec::with_capacity(descriptors),
            ..Self::default()
        }
    }

    /// Adds `remote`, which is read into or written from as many bytes at `local`, of the region with index `region`.
    pub(super) fn add(&mut self, local: u64, region: usize, remote: &RemoteSegment<'_>) {
        let keys = self.keys_of(remote);
        let mut done = 0;
        while done < remote.len {
            let len = (remote.len - done).min(MAX_RUN);
            self.add_run(remote.addr + done, len, keys);
            self.add_piece(local + done, len, region as u32);
            done += len;
        }
    }

    fn keys_of(&mut self, remote: &RemoteSegment<'_>) -> u32 {
        let key = remote.region.key.0;
        // Segments of one region stand together.
        if let Some(index) = self.known.iter().rposition(|known| *known == key) {
            return index as u32;
        }
        self.known.push(key);
        self.keys.push(remote.region.rail_keys.clone());
        self.known.len() as u32 - 1
    }

    fn add_run(&mut self, addr: u64, len: u64, region: u32) {
        if let Some(last) = self.runs.last_mut()
            && last.region == region
            && last.addr + u64::from(last.len) == addr
            && u64::from(last.len) + len <= MAX_RUN
        {
            last.len += len as u32;
            return;
        }
        self.runs.push(Run { addr, len: len as u32, region, pieces: self.pieces.len() as u32 });
    }

    fn add_piece(&mut self, addr: u64, len: u64, region: u32) {
        let first = self.runs.last().map_or(0, |run| run.pieces as usize);
        if let Some(last) = self.pieces.get_mut(first..).and_then(<[_]>::last_mut)
            && last.region == region
            && last.addr + u64::from(last.len) == addr
            && u64::from(last.len) + len <= MAX_RUN
        {
            last.len += len as u32;
            return;
        }
        self.pieces.push(LocalPiece { addr, len: len as u32, region });
    }

    /// The requests, of memory that is near these rails.
    pub(super) fn finish(self, near: u32) -> RdmaRequests {
        RdmaRequests {
            runs: self.runs.into_boxed_slice(),
            pieces: self.pieces.into_boxed_slice(),
            keys: self.keys.into_boxed_slice(),
            near,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Access, MemoryKind, RegionDescriptor, RegionKey};

    fn region(slot: u32, base: u64, len: u64) -> RegionDescriptor {
        RegionDescriptor {
            incarnation: 1,
            key: RegionKey::new(slot, 9),
            base,
            len,
            kind: MemoryKind::Dram,
            access: Access::READ_WRITE,
            rail_keys: [10 + slot, 0].into_iter().collect(),
            device: None,
        }
    }

    #[test]
    fn neighbours_become_one_request() {
        let far = region(0, 0, 1 << 40);
        let mut builder = RdmaBuilder::new(4096);
        for block in 0..4096 {
            builder.add(0x10_0000 + block * 4096, 0, &far.segment(block * 4096, 4096));
        }
        let requests = builder.finish(0);
        assert_eq!(requests.runs[..], [Run { addr: 0, len: 16 << 20, region: 0, pieces: 0 }]);
        assert_eq!(requests.pieces.len(), 1);
        assert!(requests.is_open_on(0) && !requests.is_open_on(1) && !requests.is_open_on(2));
    }

    #[test]
    fn a_run_has_the_pieces_that_are_scattered_here() {
        let far = region(0, 0, 1 << 20);
        let other = region(1, 0, 1 << 20);
        let mut builder = RdmaBuilder::new(8);
        // Scattered here, together there; then a gap there; then another region that goes on where the first stopped.
        builder.add(1000, 0, &far.segment(0, 100));
        builder.add(5000, 0, &far.segment(100, 100));
        builder.add(5100, 0, &far.segment(200, 100));
        builder.add(5200, 0, &far.segment(400, 100));
        builder.add(5300, 1, &other.segment(500, 100));
        let requests = builder.finish(0);
        let lens: Vec<_> = requests.runs.iter().map(|r| (r.addr, r.len, r.region)).collect();
        assert_eq!(lens, [(0, 300, 0), (400, 100, 0), (500, 100, 1)]);
        let pieces: Vec<_> = requests.pieces.iter().map(|p| (p.addr, p.len, p.region)).collect();
        assert_eq!(pieces, [(1000, 100, 0), (5000, 200, 0), (5200, 100, 0), (5300, 100, 1)]);
        assert_eq!(requests.runs.iter().map(|run| run.pieces).collect::<Vec<_>>(), [0, 2, 3]);
    }

    #[test]
    fn what_is_too_long_for_one_request_is_cut() {
        let far = region(0, 0, 1 << 40);
        let mut builder = RdmaBuilder::new(1);
        builder.add(0, 0, &far.segment(0, 5 << 30));
        let requests = builder.finish(0);
        assert_eq!(requests.runs.len(), 5);
        assert!(requests.pieces.iter().all(|piece| piece.len == 1 << 30));
    }
}
