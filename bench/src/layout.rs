//! Where the blocks of a case lie on either side. Both processes compute it from the run, so it is never sent.

use crate::case::RunSpec;
use crate::pattern::mix;

/// Bytes in front of all slots: the target of warm-up operations, which must not touch the slots.
const WARM_BYTES: u64 = 4096;
/// Size of one warm-up operation.
pub(crate) const WARM_LEN: usize = 64;

/// What the pattern of the large write of a load is made of in the place of a block's index.
pub(crate) const BULK_INDEX: u64 = 1 << 32;

/// Block offsets of one slot, the same number on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Offsets in the initiator's arena.
    pub(crate) local: Vec<u64>,
    /// Offsets in the target's arena.
    pub(crate) remote: Vec<u64>,
}

/// All slots of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) slots: Vec<Slot>,
    pub(crate) block_bytes: usize,
    /// Arena length that holds every block, on either side.
    pub(crate) arena_bytes: usize,
    /// Where the large write of a load lies, on both sides, and its length.
    pub(crate) bulk: Option<(u64, usize)>,
}

impl Layout {
    /// Lays out the slots of a run.
    ///
    /// Scattered blocks are drawn from a pool twice as large, independently on the two sides and in random order, as a
    /// paged KV cache hands out its pages: neighbours of a list are no neighbours in memory.
    pub(crate) fn new(spec: &RunSpec) -> Self {
        let case = &spec.case;
        let (slots, blocks) = (case.slots(), case.blocks);
        // A block keeps the alignment that an allocator would give it.
        let stride = case.block_bytes.next_multiple_of(64) as u64;
        let wanted = slots * blocks;
        let pool = if spec.scattered() { wanted * 2 } else { wanted };
        let order = |side: u64| -> Vec<u64> {
            let mut order: Vec<u64> = (0..pool as u64).collect();
            if spec.scattered() {
                shuffle(&mut order, mix(spec.seed) ^ side);
            }
            order.iter().map(|&place| WARM_BYTES + place * stride).collect()
        };
        let (local, remote) = (order(1), order(2));
        let slots = (0..slots)
            .map(|slot| {
                let range = slot * blocks..(slot + 1) * blocks;
                Slot { local: local[range.clone()].to_vec(), remote: remote[range].to_vec() }
            })
            .collect();
        let end = WARM_BYTES as usize + pool * stride as usize;
        let bulk = case.load.map(|load| (end.next_multiple_of(4096) as u64, load.bulk_bytes));
        let arena_bytes = bulk.map_or(end, |(at, len)| at as usize + len);
        Self { slots, block_bytes: case.block_bytes, arena_bytes, bulk }
    }

    /// Every block as (index, local offset, remote offset); the index is what the pattern is made of.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let pairs = self.slots.iter().flat_map(|slot| slot.local.iter().zip(&slot.remote));
        pairs.enumerate().map(|(index, (&local, &remote))| (index as u64, local, remote))
    }
}

/// Fisher-Yates with splitmix64: the order is part of the measurement, so it must not change with a library's version.
pub(crate) fn shuffle(values: &mut [u64], seed: u64) {
    let mut state = seed;
    for last in (1..values.len()).rev() {
        state = mix(state);
        values.swap(last, (state % (last as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{Backend, Case, Operation, Scenario};
    use std::collections::BTreeSet;

    fn spec(backend: Backend, blocks: usize, block_bytes: usize) -> RunSpec {
        let scenario = Scenario::Kv;
        let operation = Operation::Read;
        let case = Case {
            scenario,
            operation,
            blocks,
            block_bytes,
            window: 1,
            notification_bytes: 0,
            load: None,
        };
        RunSpec { backend, ..crate::case::tests::spec(case) }
    }

    #[test]
    fn scattered_blocks_never_overlap_and_are_not_neighbours() {
        let layout = Layout::new(&spec(Backend::Corelane, 4096, 4096));
        for side in [|slot: &Slot| slot.local.clone(), |slot: &Slot| slot.remote.clone()] {
            let offsets: Vec<u64> = layout.slots.iter().flat_map(side).collect();
            assert_eq!(offsets.iter().collect::<BTreeSet<_>>().len(), 4096);
            assert!(
                offsets.iter().all(|&o| o >= WARM_BYTES && o + 4096 <= layout.arena_bytes as u64)
            );
            let neighbours = offsets.windows(2).filter(|pair| pair[1] == pair[0] + 4096).count();
            assert!(neighbours < 16, "{neighbours} of 4095 lie behind their predecessor");
        }
        assert_ne!(layout.slots[0].local, layout.slots[0].remote);
    }

    #[test]
    fn equal_seeds_give_equal_layouts_and_the_baseline_is_contiguous() {
        let here = Layout::new(&spec(Backend::Corelane, 256, 16_384));
        assert_eq!(here, Layout::new(&spec(Backend::Corelane, 256, 16_384)));
        let raw = Layout::new(&spec(Backend::RawTcp, 256, 16_384));
        assert!(raw.slots[0].local.windows(2).all(|pair| pair[1] == pair[0] + 16_384));
    }

    #[test]
    fn odd_sizes_keep_their_alignment() {
        let layout = Layout::new(&spec(Backend::Corelane, 1, 100));
        assert!(layout.blocks().all(|(_, local, remote)| local % 64 == 0 && remote % 64 == 0));
        assert_eq!(layout.slots.len(), 1024);
    }
}
