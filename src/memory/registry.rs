//! All regions of an engine, for the control plane: registration and `prepare`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, Result};
use crate::gpu::Allocation;
use crate::transport::local::OwnMemory;
use crate::transport::rdma::Registrations;
use crate::wire::{RegionDescriptor, RegionKey};

/// A registered region. Lanes, plans and the application share it.
#[derive(Debug)]
pub(crate) struct RegionInner {
    pub(crate) descriptor: RegionDescriptor,
    /// Copies that threads other than lanes make now; lanes count theirs by themselves.
    copies: AtomicU32,
    backing: Backing,
    /// On the rails of the engine.
    pub(crate) registrations: Registrations,
}

/// What a region is made of.
#[derive(Debug)]
pub(crate) enum Backing {
    /// The application's host memory.
    Application,
    /// Memory of the engine.
    Engine(OwnMemory),
    /// The application's memory of a GPU.
    Gpu(Allocation),
}

/// No more copies may begin.
const CLOSED: u32 = 1 << 31;
/// A GPU may touch the memory for ever. What is below are copies under way.
const ABANDONED: u32 = 1 << 30;

/// A region that a thread copies from or to; it stays registered until this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct RegionCopy<'a>(&'a RegionInner);

impl Drop for RegionCopy<'_> {
    fn drop(&mut self) {
        self.0.copies.fetch_sub(1, Ordering::AcqRel);
    }
}

/// As `RegionCopy`, for a copy that outlives the call.
#[derive(Debug)]
#[must_use]
pub(crate) struct OwnedRegionCopy(Arc<RegionInner>);

impl OwnedRegionCopy {
    /// `None`: the region is being deregistered.
    pub(crate) fn begin(region: &Arc<RegionInner>) -> Option<Self> {
        std::mem::forget(region.begin_copy()?);
        Some(Self(region.clone()))
    }
}

impl Drop for OwnedRegionCopy {
    fn drop(&mut self) {
        drop(RegionCopy(&self.0));
    }
}

impl RegionInner {
    pub(crate) fn new(
        descriptor: RegionDescriptor,
        backing: Backing,
        registrations: Registrations,
    ) -> Self {
        Self { descriptor, copies: AtomicU32::new(0), backing, registrations }
    }

    /// The memory of the engine that the region is.
    pub(crate) fn memory(&self) -> Option<&OwnMemory> {
        if let Backing::Engine(memory) = &self.backing { Some(memory) } else { None }
    }

    /// The memory of a GPU that the region is.
    pub(crate) fn gpu(&self) -> Option<&Allocation> {
        if let Backing::Gpu(allocation) = &self.backing { Some(allocation) } else { None }
    }

    /// Begins a copy; `None`: the region is being deregistered. Two uncontended atomic operations.
    #[inline]
    pub(crate) fn begin_copy(&self) -> Option<RegionCopy<'_>> {
        let copy = RegionCopy(self);
        let before = self.copies.fetch_add(1, Ordering::AcqRel);
        (before & CLOSED == 0).then_some(copy)
    }

    /// Something may touch it for ever: it is never quiet again.
    pub(crate) fn abandon(&self) {
        self.copies.fetch_or(ABANDONED, Ordering::AcqRel);
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.copies.load(Ordering::Acquire) & ABANDONED != 0
    }

    /// Lets no copy begin any more; true: none is under way.
    pub(crate) fn close_to_copies(&self) -> bool {
        self.copies.fetch_or(CLOSED, Ordering::AcqRel) & !CLOSED == 0
    }

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
    /// One was given up: still not found, to be deregistered again.
    Busy,
}

struct Entry {
    region: Arc<RegionInner>,
    state: State,
}

/// Regions by slot and by address. Behind a lock of the engine; never touched by a lane.
pub(crate) struct Registry {
    entries: slab::Slab<Entry>,
    /// Live regions by (base, slot), in one map for each power of two of their lengths: overlapping
    /// and repeated registrations are all there, and a long region does not make the search among
    /// short ones long.
    by_length: [BTreeSet<(u64, usize)>; 64],
    /// One bit for each of these maps that is not empty.
    used: u64,
    limit: usize,
}

/// The map of regions of this length.
fn length_class(len: u64) -> usize {
    len.max(1).ilog2() as usize
}

impl Registry {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            entries: slab::Slab::new(),
            by_length: std::array::from_fn(|_| BTreeSet::new()),
            used: 0,
            limit,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Adds a region; `make` gets its slot.
    pub(crate) fn insert(
        &mut self,
        make: impl FnOnce(u32) -> RegionDescriptor,
        backing: Backing,
        registrations: Registrations,
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
        let region = Arc::new(RegionInner::new(make(slot as u32), backing, registrations));
        vacant.insert(Entry { region: region.clone(), state: State::Live });
        self.publish(&region);
        Ok(region)
    }

    fn publish(&mut self, region: &RegionInner) {
        let class = length_class(region.descriptor.len);
        self.by_length[class].insert((region.descriptor.base, region.slot()));
        self.used |= 1 << class;
    }

    /// Hides a region from new plans; false: it is not registered, or another thread deregisters it now.
    pub(crate) fn close(&mut self, region: &Arc<RegionInner>) -> bool {
        match self.entry(region) {
            Some(entry) if entry.state != State::Closing => entry.state = State::Closing,
            _ => return false,
        }
        let class = length_class(region.descriptor.len);
        self.by_length[class].remove(&(region.descriptor.base, region.slot()));
        if self.by_length[class].is_empty() {
            self.used &= !(1 << class);
        }
        true
    }

    /// A closed region could not be removed in time: it may be closed again.
    pub(crate) fn give_up(&mut self, region: &Arc<RegionInner>) {
        if let Some(entry) = self.entry(region) {
            entry.state = State::Busy;
        }
    }

    fn entry(&mut self, region: &Arc<RegionInner>) -> Option<&mut Entry> {
        self.entries.get_mut(region.slot()).filter(|entry| Arc::ptr_eq(&entry.region, region))
    }

    /// Forgets a closed region: its slot may be used again (under another key).
    pub(crate) fn remove(&mut self, region: &Arc<RegionInner>) {
        if self.entry(region).is_some() {
            self.entries.remove(region.slot());
        }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<RegionInner>> {
        self.entries.iter().map(|(_, entry)| &entry.region)
    }

    /// Whether the region is registered, and not about to leave.
    pub(crate) fn is_live(&self, region: &Arc<RegionInner>) -> bool {
        self.entries
            .get(region.slot())
            .is_some_and(|entry| Arc::ptr_eq(&entry.region, region) && entry.state == State::Live)
    }

    /// A live region that holds all of `len` bytes at `addr`: of several, the one that starts last.
    pub(crate) fn find(&self, addr: u64, len: u64) -> Option<&Arc<RegionInner>> {
        let mut best: Option<&Arc<RegionInner>> = None;
        let mut left = self.used;
        while left != 0 {
            let class = left.trailing_zeros() as usize;
            left &= left - 1;
            let found = self.find_in(class, addr, len);
            let base = |region: &Arc<RegionInner>| region.descriptor.base;
            if found.is_some_and(|found| best.is_none_or(|best| base(found) > base(best))) {
                best = found;
            }
        }
        best
    }

    fn find_in(&self, class: usize, addr: u64, len: u64) -> Option<&Arc<RegionInner>> {
        // No region of this class that starts earlier reaches the address.
        let first = addr.saturating_sub(u64::MAX >> (63 - class));
        let near = self.by_length[class].range((first, 0)..=(addr, usize::MAX)).rev();
        near.filter_map(|&(_, slot)| self.entries.get(slot))
            .map(|entry| &entry.region)
            .find(|region| region.descriptor.contains(addr, len))
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
            rail_keys: crate::wire::RailKeys::new(),
            device: None,
        }
    }

    #[test]
    fn overlapping_repeated_and_adjacent_registrations_are_told_apart() {
        let mut registry = Registry::new(10);
        let wide = registry
            .insert(|s| descriptor(s, 1000, 1000), Backing::Application, Registrations::default())
            .unwrap();
        let narrow = registry
            .insert(|s| descriptor(s, 1500, 10), Backing::Application, Registrations::default())
            .unwrap();
        let again = registry
            .insert(|s| descriptor(s, 1500, 10), Backing::Application, Registrations::default())
            .unwrap();
        assert!(Arc::ptr_eq(registry.find(1505, 100).unwrap(), &wide));
        assert!(registry.find(1995, 10).is_none(), "past the end of everything");
        assert!(registry.close(&again) && !registry.close(&again));
        registry.remove(&again);
        assert!(Arc::ptr_eq(registry.find(1505, 5).unwrap(), &narrow));
        assert!(registry.close(&wide));
        assert!(registry.find(1600, 1).is_none());
        registry.give_up(&wide);
        assert!(registry.find(1600, 1).is_none() && !registry.is_live(&wide));
        assert!(registry.close(&wide) && !registry.close(&wide));
        registry.remove(&wide);
        assert_eq!(registry.len(), 1);
    }

    #[test]
    fn the_limit_is_a_typed_error() {
        let mut registry = Registry::new(1);
        registry
            .insert(|s| descriptor(s, 0, 1), Backing::Application, Registrations::default())
            .unwrap();
        assert!(matches!(
            registry.insert(
                |s| descriptor(s, 0, 1),
                Backing::Application,
                Registrations::default()
            ),
            Err(Error::Limit { .. })
        ));
    }

    proptest! {
        #[test]
        fn finds_a_covering_region_exactly_when_there_is_one(
            regions in proptest::collection::vec((0u64..100, 1u64..40), 0..12),
            addr in 0u64..150, len in 0u64..40,
        ) {
            let mut registry = Registry::new(100);
            for &(base, size) in &regions {
                registry.insert(|s| descriptor(s, base, size), Backing::Application, Registrations::default()).unwrap();
            }
            let expected = regions.iter().any(|&(b, s)| addr >= b && addr + len <= b + s);
            prop_assert_eq!(registry.find(addr, len).is_some(), expected);
        }
    }
}
