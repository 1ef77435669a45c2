//! Where the blocks of a case lie. Both sides compute it, so it is never sent.

use super::case::NixlCase;
use crate::layout::shuffle;
use crate::pattern::mix;

/// What is moved on the page that no block is in.
pub(crate) const NUDGE_BYTES: usize = 64;

/// Block offsets of all transfers of a case, transfer after transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NixlLayout {
    /// Offsets in the initiator's arena.
    pub(crate) local: Vec<u64>,
    /// Offsets in the target's arena.
    pub(crate) remote: Vec<u64>,
    /// Where the large write of a load lies, on both sides.
    pub(crate) bulk: u64,
    /// Where there is a page that no block is in, on both sides.
    pub(crate) nudge: u64,
}

impl NixlLayout {
    /// Lays out a case. Blocks of a list are in random order, independently on the two sides, and never touch each
    /// other: NIXL merges neighbours before a backend sees them, and a list that it merged is another test.
    pub(crate) fn new(case: &NixlCase, seed: u64) -> Self {
        let wanted = case.all_slots() * case.blocks;
        let distance = case.distance();
        let order = |side: u64| -> Vec<u64> {
            let mut places: Vec<u64> = (0..wanted as u64).collect();
            if case.blocks > 1 {
                shuffle(&mut places, mix(seed) ^ side);
            }
            places.into_iter().map(|place| place * distance as u64).collect()
        };
        // Behind the blocks, on a page of its own.
        let bulk = (wanted * distance).next_multiple_of(4096);
        let bulk_bytes = case.load.map_or(0, |load| load.bulk_bytes);
        let nudge = (bulk + bulk_bytes).next_multiple_of(4096) as u64;
        Self { local: order(1), remote: order(2), bulk: bulk as u64, nudge }
    }

    /// Offsets of one transfer, on both sides.
    pub(crate) fn slot(&self, slot: usize, blocks: usize) -> (&[u64], &[u64]) {
        let range = slot * blocks..(slot + 1) * blocks;
        (&self.local[range.clone()], &self.remote[range])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nixl::case::tests::all;

    #[test]
    fn scattered_blocks_never_touch_and_stay_in_the_arena() {
        for case in all().iter().filter(|case| case.blocks > 1) {
            let layout = NixlLayout::new(case, 42);
            let arena = case.arena_bytes().expect("small") as u64;
            for side in [&layout.local, &layout.remote] {
                let mut sorted = side.clone();
                sorted.sort_unstable();
                let len = case.block_bytes as u64;
                assert!(sorted.windows(2).all(|pair| pair[0] + len < pair[1]), "{}", case.id());
                assert!(sorted.last().is_some_and(|last| last + len <= arena), "{}", case.id());
                assert!(side.windows(2).any(|pair| pair[0] > pair[1]), "in order: {}", case.id());
            }
            assert!(layout.nudge >= arena - 4096 && layout.nudge + NUDGE_BYTES as u64 <= arena);
            assert_ne!(layout.local, layout.remote);
            assert_eq!(layout, NixlLayout::new(case, 42), "both sides must agree");
        }
    }

    #[test]
    fn transfers_of_one_block_have_places_of_their_own() {
        for case in all().iter().filter(|case| case.blocks == 1) {
            let layout = NixlLayout::new(case, 42);
            assert_eq!(layout.local.len(), case.all_slots());
            let last = case.all_slots() - 1;
            assert_eq!(layout.slot(last, 1), (&layout.local[last..], &layout.remote[last..]));
            let len = case.block_bytes as u64;
            assert!(layout.remote.windows(2).all(|pair| pair[0] + len <= pair[1]), "{}", case.id());
        }
    }
}
