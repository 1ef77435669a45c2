//! Handles: numbers that name objects of this library, checked at every use.
//!
//! The top four bits say what kind of object it is, the rest is a key of a generation-checked slab:
//! a number that was freed, or never given out, finds nothing. (A slot is reused 2^25 times before
//! one of its numbers comes back.)

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use corelane::{Buffer, Engine, Peer, RegionDescriptor};
use sharded_slab::{Config, Entry, Slab};

use crate::allocation::Memory;
use crate::status::Failure;
use crate::transfer::Posting;

/// An engine. 0 is never valid.
pub type corelane_engine_t = u64;
/// A peer of an engine: a remote engine whose metadata was loaded, or that connected by itself. 0 is
/// never valid.
pub type corelane_conn_t = u64;
/// Registered memory of an engine: the application's, or the engine's own. 0 is never valid.
pub type corelane_region_t = u64;
/// The descriptor of a peer's registered memory. 0 is never valid.
pub type corelane_desc_t = u64;
/// A prepared transfer: can be posted again and again. 0 is never valid.
pub type corelane_xfer_t = u64;

pub(crate) struct Bits;

impl Config for Bits {
    /// Threads that have made handles and still live.
    const MAX_THREADS: usize = 4096;
    /// 2 million objects per thread that makes them.
    const MAX_PAGES: usize = 16;
    const RESERVED_BITS: usize = 4;
}

const TAG_SHIFT: u32 = 60;

/// All objects of one kind.
pub(crate) struct Table<T> {
    slab: Slab<T, Bits>,
    tag: u64,
    what: &'static str,
}

/// An object in use; it is freed once nobody uses it any more.
pub(crate) type InUse<'a, T> = Entry<'a, T, Bits>;

impl<T> Table<T> {
    fn new(tag: u64, what: &'static str) -> Self {
        Self { slab: Slab::new_with_config::<Bits>(), tag: tag << TAG_SHIFT, what }
    }

    pub(crate) fn insert(&self, value: T) -> Result<u64, Failure> {
        match self.slab.insert(value) {
            Some(key) => Ok(key as u64 | self.tag),
            None => Err(Failure::limit(format!("no more {} handles can be made", self.what))),
        }
    }

    /// Kind of the objects, in words.
    pub(crate) fn what(&self) -> &'static str {
        self.what
    }

    fn key(&self, handle: u64) -> Option<usize> {
        (handle >> TAG_SHIFT << TAG_SHIFT == self.tag).then_some((handle & !self.tag) as usize)
    }

    #[inline]
    pub(crate) fn get(&self, handle: u64) -> Result<InUse<'_, T>, Failure> {
        self.key(handle)
            .and_then(|key| self.slab.get(key))
            .ok_or_else(|| Failure::handle(self.what, handle))
    }

    /// Frees the object as soon as nobody uses it; false: it was freed before.
    pub(crate) fn remove(&self, handle: u64) -> bool {
        self.key(handle).is_some_and(|key| self.slab.remove(key))
    }
}

/// An engine and what was made with it.
pub(crate) struct EngineEntry {
    pub(crate) engine: Engine,
    /// Every option with the value in effect.
    pub(crate) options: Vec<(&'static str, String)>,
    /// Handles that die with the engine; `None` once it has begun to.
    children: Mutex<Option<HashSet<u64>>>,
    /// Somebody is destroying it: nobody else may.
    ending: AtomicBool,
}

impl EngineEntry {
    pub(crate) fn new(engine: Engine, options: Vec<(&'static str, String)>) -> Self {
        Self {
            engine,
            options,
            children: Mutex::new(Some(HashSet::new())),
            ending: AtomicBool::new(false),
        }
    }

    fn children(&self) -> std::sync::MutexGuard<'_, Option<HashSet<u64>>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the engine as being destroyed; false: it was.
    pub(crate) fn ends(&self) -> bool {
        !self.ending.swap(true, Ordering::AcqRel)
    }

    /// The handles that die now; none is added any more.
    pub(crate) fn take_children(&self) -> HashSet<u64> {
        self.children().take().unwrap_or_default()
    }
}

/// An object that belongs to an engine.
pub(crate) struct Owned<T> {
    pub(crate) owner: corelane_engine_t,
    pub(crate) value: T,
    /// Somebody is freeing it: nobody else may.
    freed: AtomicBool,
}

macro_rules! tables {
    ($($table:ident: $type:ty = $tag:literal, $what:literal;)*) => {
        $(pub(crate) static $table: LazyLock<Table<$type>> =
            LazyLock::new(|| Table::new($tag, $what));)*
    };
}

tables! {
    ENGINES: EngineEntry = 1, "engine";
    CONNS: Owned<Peer> = 2, "connection";
    REGIONS: Owned<Memory> = 3, "region";
    DESCRIPTORS: Owned<RegionDescriptor> = 4, "descriptor";
    XFERS: Owned<Posting> = 5, "transfer";
}

/// Adds an object of an engine.
pub(crate) fn adopt<T>(
    table: &Table<Owned<T>>,
    owner: corelane_engine_t,
    value: T,
) -> Result<u64, Failure> {
    let entry = ENGINES.get(owner)?;
    let handle = table.insert(Owned { owner, value, freed: AtomicBool::new(false) })?;
    if let Some(children) = &mut *entry.children() {
        children.insert(handle);
        return Ok(handle);
    }
    table.remove(handle);
    Err(Failure::handle("engine", owner))
}

/// Frees an object of an engine; false: it was freed before.
pub(crate) fn free<T>(table: &Table<Owned<T>>, handle: u64) -> bool {
    let Ok(object) = table.get(handle) else { return false };
    if object.freed.swap(true, Ordering::AcqRel) {
        return false;
    }
    let owner = object.owner;
    table.remove(handle);
    drop(object);
    // In a forked child, a thread of the parent may hold the lock for ever.
    if let Ok(entry) = ENGINES.get(owner)
        && entry.engine.check_usable().is_ok()
        && let Some(children) = &mut *entry.children()
    {
        children.remove(&handle);
    }
    true
}

/// Frees whatever the handle names. Memory of the engine is only taken: the caller gives it back once
/// nothing touches it any more.
pub(crate) fn free_any(handle: u64) -> Option<Buffer> {
    let buffer = REGIONS.get(handle).ok().and_then(|region| region.value.take_buffer());
    let _ = CONNS.remove(handle)
        || REGIONS.remove(handle)
        || DESCRIPTORS.remove(handle)
        || XFERS.remove(handle);
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_finds_its_object_until_it_is_freed() {
        let table = Table::<u32>::new(7, "number");
        let handle = table.insert(5).unwrap();
        assert_eq!(*table.get(handle).unwrap(), 5);
        assert!(table.remove(handle) && !table.remove(handle));
        assert!(table.get(handle).is_err());
        let next = table.insert(6).unwrap();
        assert_ne!(next, handle, "the slot is the same, its generation is not");
        assert!(table.get(handle).is_err());
    }

    #[test]
    fn a_handle_of_another_kind_or_a_made_up_one_finds_nothing() {
        let (numbers, others) = (Table::<u32>::new(7, "number"), Table::<u32>::new(8, "other"));
        let handle = numbers.insert(5).unwrap();
        others.insert(6).unwrap();
        assert!(others.get(handle).is_err());
        for made_up in [0, 1, u64::MAX, handle ^ 1, handle | 1 << 50, handle.swap_bytes()] {
            assert!(numbers.get(made_up).is_err(), "{made_up:#x}");
            assert!(!numbers.remove(made_up));
        }
    }

    #[test]
    fn an_object_in_use_outlives_its_removal() {
        let table = Table::<String>::new(7, "text");
        let handle = table.insert("in use".into()).unwrap();
        let entry = table.get(handle).unwrap();
        assert!(table.remove(handle));
        assert!(table.get(handle).is_err());
        assert_eq!(*entry, "in use");
    }

    #[test]
    fn many_threads_can_make_and_free_handles() {
        let table = Table::<usize>::new(7, "number");
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let table = &table;
                scope.spawn(move || {
                    for round in 0..2000 {
                        let value = thread * 10_000 + round;
                        let handle = table.insert(value).unwrap();
                        assert_eq!(*table.get(handle).unwrap(), value);
                        assert!(table.remove(handle));
                    }
                });
            }
        });
    }
}
