//! The devices of an engine, and its memory on them.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::address::Address;
use super::gpu::Told;
use super::near::Nodes;
use super::slots::Slots;
use crate::config::RdmaConfig;
use crate::gpu::Device;
use crate::verbs::{self, Device as VerbsDevice, MemoryAccess, MemoryRegion, ProtectionDomain};
use crate::wire::{Access, MAX_RAILS, RailKeys};

/// Rails that are chosen without being asked for, at most: those of one NUMA node.
const MAX_CHOSEN: usize = 8;

/// How often a rail's address is asked for at most, while connections fail.
const SUSPECT_PAUSE: Duration = Duration::from_millis(500);

/// A port of a device that this engine uses.
#[derive(Debug)]
pub(crate) struct Rail {
    pub(crate) device: Arc<VerbsDevice>,
    pub(crate) pd: Arc<ProtectionDomain>,
    pub(crate) port: u8,
    pub(crate) ethernet: bool,
    pub(crate) max_msg_sz: u32,
    /// The index that the options ask for.
    gid_index: Option<u8>,
    address: Mutex<Address>,
    /// When it was asked for because something had failed.
    suspected: Mutex<Option<Instant>>,
    /// The device is gone: no queue pair is made on it any more.
    dead: AtomicBool,
    /// Its port is down, as far as its events say.
    down: AtomicBool,
}

impl Rail {
    /// `mlx5_0:1`, as in the options.
    pub(crate) fn name(&self) -> String {
        format!("{}:{}", self.device.name(), self.port)
    }

    /// The same with its NUMA node, where that is known.
    fn place(&self) -> String {
        match self.device.numa_node() {
            Some(node) => format!("{}@node{node}", self.name()),
            None => self.name(),
        }
    }

    pub(crate) fn is_usable(&self) -> bool {
        !self.dead.load(Ordering::Relaxed) && !self.down.load(Ordering::Relaxed)
    }

    pub(crate) fn set_dead(&self) {
        self.dead.store(true, Ordering::Relaxed);
    }

    pub(crate) fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Relaxed);
    }

    /// How packets get here, for queue pairs that are made now.
    pub(crate) fn address(&self) -> Address {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device has said that its address may have changed: asks for it. System calls. Queue pairs that there are keep the one
    /// they were made with.
    pub(crate) fn look_up_address(&self) {
        // Amid a change there may be none for a moment: what comes next is told again.
        let Ok(new) = Address::read(&self.device, self.port, self.gid_index) else { return };
        let mut address = self.address.lock().unwrap_or_else(PoisonError::into_inner);
        if *address != new {
            tracing::info!(
                rail = self.name(),
                gid = %new.gid,
                gid_index = new.gid_index,
                lid = new.lid,
                "the address of a rail has changed"
            );
            *address = new;
        }
    }

    /// Something on it has failed: the same, once for all connections that fail together.
    pub(crate) fn suspect_address(&self, now: Instant) {
        let mut last = self.suspected.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = |last: Instant| now.saturating_duration_since(last) >= SUSPECT_PAUSE;
        if last.is_none_or(is_over) {
            *last = Some(now);
            drop(last);
            self.look_up_address();
        }
    }

    fn open(device: &Arc<VerbsDevice>, port: u8, config: &RdmaConfig) -> Result<Self, String> {
        let state = device.port(port)?;
        let name = device.name();
        let address = Address::read(device, port, config.gid_index)?;
        let pd = ProtectionDomain::new(device)
            .map_err(|e| format!("a protection domain of {name}: {e}"))?;
        Ok(Self {
            device: device.clone(),
            pd,
            port,
            ethernet: state.ethernet,
            max_msg_sz: state.max_msg_sz,
            gid_index: config.gid_index,
            address: Mutex::new(address),
            suspected: Mutex::new(None),
            dead: AtomicBool::new(false),
            down: AtomicBool::new(false),
        })
    }
}

/// The rails of an engine, in order of preference.
#[derive(Debug, Default)]
pub(crate) struct Rails {
    all: Vec<Rail>,
    nodes: Nodes,
    slots: Slots,
    relaxed_ordering: bool,
    on_demand: bool,
    /// That memory could not be registered is said once.
    complained: AtomicBool,
    /// The same of GPU memory, and more.
    pub(super) told_of_gpu: Told,
    /// The devices were asked for by name.
    named: bool,
}

impl Rails {
    /// Opens the devices that are asked for, or those near `node`.
    ///
    /// # Errors
    /// Why there is no rail; with devices that were asked for, what is wrong with the first that cannot be used.
    pub(crate) fn open(config: &RdmaConfig, node: Option<usize>) -> Result<Self, String> {
        let known = verbs::devices()?;
        let all = if config.devices.is_empty() {
            Self::choose(config, &known, node)?
        } else {
            config.devices.iter().map(|name| named(name, config)).collect::<Result<_, _>>()?
        };
        if all.len() > MAX_RAILS {
            return Err(format!("{} devices are asked for; {MAX_RAILS} are possible", all.len()));
        }
        // Whoever names devices wants them used, whatever memory is near.
        let (nodes, slots) = if config.devices.is_empty() {
            let names = all.iter().map(|rail| rail.device.name());
            let nodes = all.iter().map(|rail| rail.device.numa_node()).collect();
            (Nodes::new(nodes), Slots::new(Path::new("/sys"), names))
        } else {
            (Nodes::default(), Slots::default())
        };
        Ok(Self {
            all,
            nodes,
            slots,
            relaxed_ordering: config.relaxed_ordering,
            on_demand: config.on_demand_paging,
            complained: AtomicBool::new(false),
            told_of_gpu: Told::default(),
            named: !config.devices.is_empty(),
        })
    }

    fn choose(
        config: &RdmaConfig,
        known: &[String],
        node: Option<usize>,
    ) -> Result<Vec<Rail>, String> {
        if known.is_empty() {
            return Err("there is no RDMA device".into());
        }
        let mut found: Vec<(u32, Rail)> = Vec::new();
        let mut reasons = Vec::new();
        for name in known {
            let device = match VerbsDevice::open(name) {
                Ok(device) => device,
                Err(reason) => {
                    reasons.push(reason);
                    continue;
                }
            };
            let distance = distance(node, device.numa_node());
            for port in 1..=device.limits().ports {
                match Rail::open(&device, port, config) {
                    Ok(rail) => found.push((distance, rail)),
                    Err(reason) => reasons.push(reason),
                }
            }
        }
        let near = nearest(found);
        if near.is_empty() { Err(reasons.join("; ")) } else { Ok(near) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// A bit for each rail that is near a GPU; 0: all are the same to it.
    pub(super) fn near_gpu(&self, gpu: &Device) -> u32 {
        self.slots.near(gpu.pci_address().as_deref(), &self.nodes)
    }

    /// Whether the devices were asked for by name.
    pub(super) fn are_named(&self) -> bool {
        self.named
    }

    pub(crate) fn all(&self) -> &[Rail] {
        &self.all
    }

    pub(crate) fn get(&self, rail: usize) -> Option<&Rail> {
        self.all.get(rail)
    }

    /// What the log calls them.
    pub(crate) fn names(&self) -> String {
        self.all.iter().map(Rail::place).collect::<Vec<_>>().join(",")
    }

    /// The NUMA node of the first rail, which has the small transfers: where lanes had best be.
    pub(crate) fn first_node(&self) -> Option<usize> {
        self.all.first().and_then(|rail| rail.device.numa_node())
    }

    /// Registers memory on every rail; where that fails the memory is reached by other transports.
    ///
    /// # Safety
    /// The memory stays mapped until the registrations have been given back.
    pub(crate) unsafe fn register(&self, base: u64, len: u64, access: Access) -> Registrations {
        let mut made = SmallVec::new();
        for rail in &self.all {
            // SAFETY: the caller's promise.
            let region = unsafe { self.register_on(rail, base, len, access) };
            if let Err(error) = &region
                && !self.complained.swap(true, Ordering::Relaxed)
            {
                let hint = match error.raw_os_error() {
                    Some(libc::ENOMEM) => " (raise RLIMIT_MEMLOCK: `ulimit -l unlimited`)",
                    _ => "",
                };
                tracing::warn!(
                    rail = rail.name(),
                    len,
                    "memory cannot be registered for RDMA and is reached by other transports: {error}{hint}"
                );
            }
            made.push(region.ok());
        }
        // The pages are there by now: registering has pinned them.
        Registrations::new(made, self.nodes.near(base, len))
    }

    /// What devices are told of a region's rights.
    pub(super) fn access(&self, access: Access) -> MemoryAccess {
        MemoryAccess {
            local_write: true,
            remote_read: access.allows(Access::REMOTE_READ),
            remote_write: access.allows(Access::REMOTE_WRITE),
            relaxed_ordering: self.relaxed_ordering,
            on_demand: self.on_demand,
        }
    }

    /// # Safety
    /// As for `register`.
    unsafe fn register_on(
        &self,
        rail: &Rail,
        base: u64,
        len: u64,
        access: Access,
    ) -> io::Result<MemoryRegion> {
        let len = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let wanted = self.access(access);
        // SAFETY: the caller's promise, as for the others.
        let register = |access| unsafe { MemoryRegion::new(&rail.pd, base, len, access) };
        let mut outcome = register(wanted);
        if outcome.is_err() && wanted.on_demand {
            outcome = register(MemoryAccess { on_demand: false, ..wanted });
        }
        if outcome.is_err() && !wanted.remote_write {
            // Memory that may not be written at all can still be read by peers.
            let read_only = MemoryAccess { local_write: false, on_demand: false, ..wanted };
            if let Ok(region) = register(read_only) {
                return Ok(region);
            }
        }
        outcome
    }
}

/// How far a device's NUMA node is from the one that is asked for.
fn distance(wanted: Option<usize>, its: Option<usize>) -> u32 {
    match (wanted, its) {
        (Some(wanted), Some(its)) if wanted == its => 0,
        (Some(_), Some(_)) => 2,
        // Not known, or all the same.
        _ => 1,
    }
}

/// The nearest of what was found, in the order of the devices.
fn nearest<T>(found: Vec<(u32, T)>) -> Vec<T> {
    let least = found.iter().map(|(distance, _)| *distance).min();
    let near = found.into_iter().filter(|(distance, _)| Some(*distance) == least);
    near.map(|(_, one)| one).take(MAX_CHOSEN).collect()
}

fn named(name: &str, config: &RdmaConfig) -> Result<Rail, String> {
    let (device, port) = match name.split_once(':') {
        None => (name, 1),
        Some((device, port)) => {
            let port = port.parse().map_err(|_| format!("`{name}` names no port: DEVICE:1"))?;
            (device, port)
        }
    };
    Rail::open(&VerbsDevice::open(device)?, port, config)
}

/// A region on the rails of its engine.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    regions: Mutex<SmallVec<[Option<MemoryRegion>; 2]>>,
    local: RailKeys,
    remote: RailKeys,
    near: u32,
    flush: Option<&'static Device>,
    /// Why it is not on a rail, where that is known and was asked for.
    refused: Option<Box<str>>,
}

impl Registrations {
    pub(super) fn new(regions: SmallVec<[Option<MemoryRegion>; 2]>, near: u32) -> Self {
        let keys = |key: fn(&MemoryRegion) -> u32| -> RailKeys {
            regions.iter().map(|region| region.as_ref().map_or(0, key)).collect()
        };
        let (local, remote) = (keys(MemoryRegion::lkey), keys(MemoryRegion::rkey));
        Self { regions: Mutex::new(regions), local, remote, near, flush: None, refused: None }
    }

    /// The same, of memory that has to be flushed by its GPU.
    pub(super) fn flushed_by(self, flush: Option<&'static Device>) -> Self {
        Self { flush, ..self }
    }

    /// Of memory that is on no rail, for this reason.
    pub(super) fn without(reason: &str) -> Self {
        Self::default().refused_because(Some(reason.into()))
    }

    /// The same, of memory that is not on all rails.
    pub(super) fn refused_because(self, refused: Option<Box<str>>) -> Self {
        Self { refused, ..self }
    }

    /// Why memory of a GPU is not on all rails.
    pub(crate) fn why_refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// The GPU that has to be told before it sees what devices have written here; `None`: no GPU, or one that sees it by itself.
    #[inline]
    pub(crate) fn flush(&self) -> Option<&'static Device> {
        self.flush
    }

    /// The key for our own work requests on a rail; 0: it is not registered there. Stays the same when it has been
    /// given back: transfers count the region as used before they ask.
    #[inline]
    pub(crate) fn key(&self, rail: usize) -> u32 {
        self.local.get(rail).copied().unwrap_or(0)
    }

    /// Whether it is registered on any rail.
    pub(crate) fn is_some(&self) -> bool {
        self.local.iter().any(|key| *key != 0)
    }

    /// A bit for each rail that is near the memory; 0: all are the same to it.
    pub(crate) fn near(&self) -> u32 {
        self.near
    }

    /// The keys for peers.
    pub(crate) fn remote_keys(&self) -> &RailKeys {
        &self.remote
    }

    /// Gives the registrations back: when this returns no device touches the memory any more.
    pub(crate) fn give_back(&self) {
        let regions =
            std::mem::take(&mut *self.regions.lock().unwrap_or_else(PoisonError::into_inner));
        drop(regions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of devices on these nodes are chosen, for lanes on `wanted`.
    fn chosen(wanted: Option<usize>, nodes: &[Option<usize>]) -> Vec<usize> {
        let found = nodes.iter().enumerate().map(|(device, its)| (distance(wanted, *its), device));
        nearest(found.collect())
    }

    #[test]
    fn devices_of_the_lanes_own_node_come_first_and_those_of_others_last() {
        let nodes = [Some(0), Some(1), None, Some(1), Some(0)];
        assert_eq!(chosen(Some(1), &nodes), [1, 3]);
        assert_eq!(chosen(Some(0), &nodes), [0, 4]);
        assert_eq!(chosen(Some(2), &nodes), [2], "not known is better than far");
        assert_eq!(chosen(Some(2), &[Some(1), Some(0)]), [0, 1], "far is better than none");
        assert_eq!(chosen(Some(1), &[]), []);
    }

    #[test]
    fn without_a_wish_all_devices_are_chosen_as_far_as_there_is_use_for_them() {
        assert_eq!(chosen(None, &[Some(1), None, Some(0)]), [0, 1, 2]);
        assert_eq!(chosen(None, &[Some(0); 20]), (0..MAX_CHOSEN).collect::<Vec<_>>());
        assert_eq!(chosen(Some(3), &[Some(3); 9]).len(), MAX_CHOSEN);
    }
}
