//! The regions as one lane sees them: no lock on the way to a byte.

use std::sync::Arc;

use smallvec::SmallVec;

use super::RegionInner;
use super::flushes::Flushes;
use crate::gpu::Device;
use crate::sync::Ticket;
use crate::sys::IoSegment;
use crate::wire::frame::{ServeStatus, WireSegment};
use crate::wire::{Access, MemoryKind, RegionKey};

struct Entry {
    region: Arc<RegionInner>,
    /// Requests and transfers of this lane that touch the region now.
    users: u32,
    /// Somebody waits for `users` to reach zero; nothing new may start.
    closing: Option<Arc<Ticket<()>>>,
}

/// The GPU that has to be flushed when peers have written to a region, if they may.
fn flushed(region: &RegionInner) -> Option<&'static Device> {
    region.registrations.flush().filter(|_| region.descriptor.access.allows(Access::REMOTE_WRITE))
}

/// The memory of one admitted request, in order. Short lists, the common case, are inline.
pub(crate) type Segments = SmallVec<[IoSegment; 4]>;

/// Long segment lists kept for the next requests that need one.
const SPARE_LISTS: usize = 64;

/// This lane's copy of the region table, kept up to date by messages.
#[derive(Default)]
pub(crate) struct LaneRegions {
    slots: Vec<Option<Entry>>,
    /// A region of GPU memory was there.
    has_gpu: bool,
    /// GPUs that have to be told before they see what devices of peers have written to their memory.
    flushes: Flushes,
    spare: Vec<Segments>,
}

/// Proof that a region is counted as in use; must be given back to [`LaneRegions::release`].
#[derive(Debug)]
#[must_use]
pub(crate) struct RegionUse {
    slot: u32,
}

/// The regions that one request or transfer uses. One or two are the rule.
pub(crate) type RegionUses = SmallVec<[RegionUse; 2]>;

impl LaneRegions {
    pub(crate) fn add(&mut self, region: Arc<RegionInner>) {
        let slot = region.slot();
        if self.slots.len() <= slot {
            self.slots.resize_with(slot + 1, || None);
        }
        self.has_gpu |= region.descriptor.kind != MemoryKind::Dram;
        if let Some(device) = flushed(&region) {
            self.flushes.add(device);
        }
        self.slots[slot] = Some(Entry { region, users: 0, closing: None });
    }

    /// Makes what peers have written by RDMA visible to kernels that are launched from now on. Nothing, for most GPUs. What fails is
    /// said in the log, once.
    #[inline]
    pub(crate) fn flush(&mut self) {
        self.flushes.flush();
    }

    /// A region is used no more, and leaves.
    fn forget(&mut self, slot: usize) {
        if let Some(entry) = self.slots.get_mut(slot).and_then(Option::take)
            && let Some(device) = flushed(&entry.region)
        {
            self.flushes.remove(&device);
        }
    }

    /// Refuses new uses, for good; completes `ticket` when the last one has ended, perhaps at once. A second
    /// call takes the place of the first, whose caller waits no more.
    pub(crate) fn close(&mut self, region: &Arc<RegionInner>, ticket: Arc<Ticket<()>>) {
        match self.entry(region.key()) {
            Some(entry) if entry.users > 0 && mutated!(ClosedBeforeTheLastUse) => {
                entry.closing = Some(Ticket::new());
                ticket.complete(());
            }
            Some(entry) if entry.users > 0 => entry.closing = Some(ticket),
            Some(_) => {
                self.forget(region.slot());
                ticket.complete(());
            }
            None => ticket.complete(()),
        }
    }

    fn entry(&mut self, key: RegionKey) -> Option<&mut Entry> {
        // The key is compared as a whole and without early exit: it is what a peer has to know.
        self.slots
            .get_mut(key.slot())?
            .as_mut()
            .filter(|entry| (entry.region.key().0 ^ key.0) == 0 || mutated!(KeyIgnored))
    }

    /// Requests and transfers that use a region now.
    #[cfg(feature = "sim")]
    pub(crate) fn users(&self, region: &RegionInner) -> u32 {
        let entry = self.slots.get(region.slot()).and_then(Option::as_ref);
        entry.filter(|entry| entry.region.key().0 == region.key().0).map_or(0, |entry| entry.users)
    }

    /// Counts a use of one of this engine's own regions by its own transfer.
    pub(crate) fn use_own(&mut self, region: &RegionInner) -> Option<RegionUse> {
        let entry = self.entry(region.key()).filter(|entry| entry.closing.is_none())?;
        entry.users += 1;
        Some(RegionUse { slot: region.slot() as u32 })
    }

    /// Checks one segment that a peer asks for. On success the region is counted as used, unless
    /// `uses` shows that this request counts it already.
    pub(crate) fn admit(
        &mut self,
        segment: &WireSegment,
        needs: Access,
        uses: &mut RegionUses,
    ) -> Result<IoSegment, ServeStatus> {
        let key = RegionKey(segment.key);
        let entry = self
            .entry(key)
            .filter(|e| e.closing.is_none() || mutated!(ClosingAdmits))
            .ok_or(ServeStatus::UnknownKey)?;
        let descriptor = &entry.region.descriptor;
        if !descriptor.access.allows(needs) && !mutated!(PermissionIgnored) {
            return Err(ServeStatus::Denied);
        }
        if !descriptor.contains(segment.addr, segment.len) && !mutated!(BoundsIgnored) {
            return Err(ServeStatus::OutOfBounds);
        }
        let slot = key.slot() as u32;
        // Segments of one key stand together, so looking at the last use is enough in practice;
        // counting a region twice is harmless.
        if uses.last().is_none_or(|last| last.slot != slot) {
            entry.users += 1;
            uses.push(RegionUse { slot });
        }
        Ok(IoSegment::new(segment.addr, segment.len))
    }

    /// Whether a region of GPU memory is there, or was.
    #[inline]
    pub(crate) fn has_gpu(&self) -> bool {
        self.has_gpu
    }

    /// What kind of memory a request is in; `None`: in several.
    pub(crate) fn kind_of(&self, uses: &RegionUses) -> Option<MemoryKind> {
        let mut kinds = self.used(uses).map(|region| region.descriptor.kind);
        let first = kinds.next().unwrap_or(MemoryKind::Dram);
        kinds.all(|kind| kind == first).then_some(first)
    }

    /// The regions of a request.
    pub(crate) fn used<'a>(
        &'a self,
        uses: &'a RegionUses,
    ) -> impl Iterator<Item = &'a RegionInner> + 'a {
        let entry = |of: &RegionUse| self.slots.get(of.slot as usize)?.as_ref();
        uses.iter().filter_map(entry).map(|entry| &*entry.region)
    }

    /// An empty list for `len` segments; allocates only until enough lists go around.
    pub(crate) fn segments(&mut self, len: usize) -> Segments {
        let mut list = match self.spare.pop() {
            Some(list) if len > list.inline_size() => list,
            other => {
                self.spare.extend(other);
                Segments::new()
            }
        };
        list.reserve(len);
        list
    }

    /// Takes a list back.
    pub(crate) fn recycle(&mut self, mut list: Segments) {
        if list.spilled() && self.spare.len() < SPARE_LISTS {
            list.clear();
            self.spare.push(list);
        }
    }

    pub(crate) fn release(&mut self, uses: impl IntoIterator<Item = RegionUse>) {
        for RegionUse { slot } in uses {
            let Some(Some(entry)) = self.slots.get_mut(slot as usize) else {
                debug_assert!(false, "a used region was forgotten");
                continue;
            };
            entry.users -= 1;
            if entry.users == 0
                && let Some(ticket) = entry.closing.take()
            {
                self.forget(slot as usize);
                ticket.complete(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::RegionDescriptor;

    fn region(slot: u32, access: Access) -> Arc<RegionInner> {
        let descriptor = RegionDescriptor {
            incarnation: 1,
            key: RegionKey::new(slot, 77),
            base: 1000,
            len: 100,
            kind: MemoryKind::Dram,
            access,
            rail_keys: crate::wire::RailKeys::new(),
            device: None,
        };
        Arc::new(RegionInner::new(
            descriptor,
            crate::memory::Backing::Application,
            crate::transport::rdma::Registrations::default(),
        ))
    }

    fn segment(of: &RegionInner, addr: u64, len: u64) -> WireSegment {
        WireSegment { key: of.key().0, addr, len }
    }

    #[test]
    fn key_bounds_and_permission_are_checked() {
        let mut table = LaneRegions::default();
        let readable = region(3, Access::REMOTE_READ);
        table.add(readable.clone());
        let mut uses = RegionUses::new();
        let mut admit = |segment: WireSegment, needs| table.admit(&segment, needs, &mut uses);
        let read = Access::REMOTE_READ;
        assert!(admit(segment(&readable, 1000, 100), read).is_ok());
        assert!(admit(segment(&readable, 1100, 0), read).is_ok());
        let refused = |r: Result<IoSegment, ServeStatus>| r.unwrap_err();
        assert_eq!(refused(admit(segment(&readable, 1001, 100), read)), ServeStatus::OutOfBounds);
        assert_eq!(refused(admit(segment(&readable, 999, 1), read)), ServeStatus::OutOfBounds);
        assert_eq!(
            refused(admit(segment(&readable, 1000, 1), Access::REMOTE_WRITE)),
            ServeStatus::Denied
        );
        let mut forged = segment(&readable, 1000, 1);
        forged.key ^= 1 << 90;
        assert_eq!(refused(admit(forged, read)), ServeStatus::UnknownKey);
        let elsewhere = WireSegment { key: RegionKey::new(900, 77).0, ..forged };
        assert_eq!(refused(admit(elsewhere, read)), ServeStatus::UnknownKey);
        table.release(uses);
    }

    #[test]
    fn closing_waits_for_the_last_use_and_refuses_new_ones() {
        let mut table = LaneRegions::default();
        let own = region(0, Access::READ_WRITE);
        table.add(own.clone());
        let first = table.use_own(&own).unwrap();
        let ticket = Ticket::new();
        table.close(&own, ticket.clone());
        assert!(!ticket.is_complete());
        assert!(table.use_own(&own).is_none());
        table.release([first]);
        assert!(ticket.is_complete());
        assert!(table.use_own(&own).is_none(), "gone for good");
    }

    #[test]
    fn long_lists_go_around() {
        let mut table = LaneRegions::default();
        let mut list = table.segments(100);
        list.push(IoSegment::new(1, 1));
        let place = list.as_ptr();
        table.recycle(list);
        table.recycle(Segments::new());
        assert!(!table.segments(1).spilled(), "a short list needs none");
        let again = table.segments(50);
        assert!(again.is_empty() && again.as_ptr() == place);
    }

    #[test]
    fn a_close_that_is_repeated_completes_the_ticket_that_somebody_waits_for() {
        let mut table = LaneRegions::default();
        let own = region(0, Access::READ_WRITE);
        table.add(own.clone());
        let used = table.use_own(&own).unwrap();
        let (given_up, waited_for) = (Ticket::new(), Ticket::new());
        table.close(&own, given_up);
        table.close(&own, waited_for.clone());
        assert!(table.use_own(&own).is_none() && !waited_for.is_complete());
        table.release([used]);
        assert!(waited_for.is_complete());
    }
}
