//! All regions of an engine, for the control plane: registration and `prepare`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::wire::{RegionDescriptor, RegionKey};

/// A registered region. Lanes, plans and the application share it.
#[derive(Debug)]
pub(crate) struct RegionInner {
    pub(crate) descriptor: RegionDescriptor,
}

impl RegionInner {
    pub(crate) fn slot(&self) -> usize {
        self.descriptor.key.slot()
    }

    pub(crate) fn key(&self) -> RegionKey {
        self.descriptor.key
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Live,
    /// A deregistration is under way: not found by new plans.
    Closing,
}

struct Entry {
    region: Arc<RegionInner>,
    state: State,
}

/// Regions by slot and by address. Behind a lock of the engine; never touched by a lane.
pub(crate) struct Registry {
    entries: slab::Slab<Entry>,
    /// Live regions by (base, slot): overlapping and repeated registrations are all there.
    by_base: BTreeMap<(u64, usize), u64>,
    /// No live region is longer: bounds the search for one that covers an address.
    longest: u64,
    limit: usize,
}

impl Registry {
    pub(crate) fn new(limit: usize) -> Self {
        Self { entries: slab::Slab::new(), by_base: BTreeMap::new(), longest: 0, limit }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Adds a region; `make` gets its slot.
    pub(crate) fn insert(
        &mut self,
        make: impl FnOnce(u32) -> RegionDescriptor,
    ) -> Result<Arc<RegionInner>> {
        if self.entries.len() >= self.limit {
            return Err(Error::Limit {
                what: "registered regions",
                value: self.entries.len() as u64 + 1,
                limit: self.limit as u64,
            });
        }
        let vacant = self.entries.vacant_entry();
        let slot = vacant.key();
        let region = Arc::new(RegionInner { descriptor: make(slot as u32) });
        vacant.insert(Entry { region: region.clone(), state: State::Live });
        self.publish(&region);
        Ok(region)
    }

    fn publish(&mut self, region: &RegionInner) {
        let d = &region.descriptor;
        self.by_base.insert((d.base, region.slot()), d.len);
        self.longest = self.longest.max(d.len);
    }

    /// Hides a live region from new plans; false: it is not registered, or already closing.
    pub(crate) fn close(&mut self, region: &Arc<RegionInner>) -> bool {
        match self.entries.get_mut(region.slot()) {
            Some(entry) if Arc::ptr_eq(&entry.region, region) && entry.state == State::Live => {
                entry.state = State::Closing;
                self.by_base.remove(&(region.descriptor.base, region.slot()));
                true
            }
            _ => false,
        }
    }

    /// Takes back a `close`.
    pub(crate) fn reopen(&mut self, region: &Arc<RegionInner>) {
        if let Some(entry) = self.entries.get_mut(region.slot())
            && Arc::ptr_eq(&entry.region, region)
        {
            entry.state = State::Live;
            self.publish(region);
        }
    }

    /// Forgets a closed region: its slot may be used again (under another key).
    pub(crate) fn remove(&mut self, region: &Arc<RegionInner>) {
        let slot = region.slot();
        if self.entries.get(slot).is_some_and(|entry| Arc::ptr_eq(&entry.region, region)) {
            self.entries.remove(slot);
        }
        if self.by_base.is_empty() {
            self.longest = 0;
        }
    }

    /// A live region that holds all of `len` bytes at `addr`.
    pub(crate) fn find(&self, addr: u64, len: u64) -> Option<&Arc<RegionInner>> {
        let nearest = self.by_base.range(..=(addr, usize::MAX)).rev();
        for (&(base, slot), _) in nearest {
            if addr - base > self.longest {
                return None;
            }
            let entry = self.entries.get(slot)?;
            if entry.region.descriptor.contains(addr, len) {
                return Some(&entry.region);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Access, MemoryKind};
    use proptest::prelude::*;

    fn descriptor(slot: u32, base: u64, len: u64) -> RegionDescriptor {
        RegionDescriptor {
            incarnation: 1,
            key: RegionKey::new(slot, 99),
            base,
            len,
            kind: MemoryKind::Dram,
            access: Access::READ_WRITE,
        }
    }

    #[test]
    fn overlapping_repeated_and_adjacent_registrations_are_told_apart() {
        let mut registry = Registry::new(10);
        let wide = registry.insert(|s| descriptor(s, 1000, 1000)).unwrap();
        let narrow = registry.insert(|s| descriptor(s, 1500, 10)).unwrap();
        let again = registry.insert(|s| descriptor(s, 1500, 10)).unwrap();
        assert!(Arc::ptr_eq(registry.find(1505, 100).unwrap(), &wide));
        assert!(registry.find(1995, 10).is_none(), "past the end of everything");
        assert!(registry.close(&again) && !registry.close(&again));
        registry.remove(&again);
        assert!(Arc::ptr_eq(registry.find(1505, 5).unwrap(), &narrow));
        assert!(registry.close(&wide));
        assert!(registry.find(1600, 1).is_none());
        registry.reopen(&wide);
        assert!(registry.find(1600, 1).is_some());
    }

    #[test]
    fn the_limit_is_a_typed_error() {
        let mut registry = Registry::new(1);
        registry.insert(|s| descriptor(s, 0, 1)).unwrap();
        assert!(matches!(registry.insert(|s| descriptor(s, 0, 1)), Err(Error::Limit { .. })));
    }

    proptest! {
        #[test]
        fn finds_a_covering_region_exactly_when_there_is_one(
            regions in proptest::collection::vec((0u64..100, 1u64..40), 0..12),
            addr in 0u64..150, len in 0u64..40,
        ) {
            let mut registry = Registry::new(100);
            for &(base, size) in &regions {
                registry.insert(|s| descriptor(s, base, size)).unwrap();
            }
            let expected = regions.iter().any(|&(b, s)| addr >= b && addr + len <= b + s);
            prop_assert_eq!(registry.find(addr, len).is_some(), expected);
        }
    }
}
