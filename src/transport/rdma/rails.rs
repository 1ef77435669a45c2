//! The devices of an engine, and its memory on them.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use smallvec::SmallVec;

use super::gpu::Told;
use super::near::Nodes;
use super::slots::Slots;
use crate::config::RdmaConfig;
use crate::gpu::Device;
use crate::verbs::{
    self, Device as VerbsDevice, Gid, MemoryAccess, MemoryRegion, ProtectionDomain,
};
use crate::wire::{Access, MAX_RAILS, RailKeys};

/// Rails that are chosen without being asked for, at most: those of one NUMA node.
const MAX_CHOSEN: usize = 8;

/// A port of a device that this engine uses.
#[derive(Debug)]
pub(crate) struct Rail {
    pub(crate) device: Arc<VerbsDevice>,
    pub(crate) pd: Arc<ProtectionDomain>,
    pub(crate) port: u8,
    pub(crate) gid_index: u8,
    pub(crate) gid: Gid,
    pub(crate) ethernet: bool,
    pub(crate) lid: u16,
    pub(crate) mtu: u8,
    pub(crate) max_msg_sz: u32,
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

    fn open(device: &Arc<VerbsDevice>, port: u8, config: &RdmaConfig) -> Result<Self, String> {
        let state = device.port(port)?;
        let name = device.name();
        if !state.active {
            return Err(format!("{name}:{port} is not active"));
        }
        let gid_index = match config.gid_index {
            Some(index) => index,
            None if !state.ethernet => 0,
            None => {
                let gid = |index| device.gid(port, index);
                choose_gid(state.gids, gid, |index| device.is_roce_v2(port, index))
            }
        };
        let gid = device.gid(port, gid_index);
        if state.ethernet && gid.is_none() {
            return Err(format!("{name}:{port} has no GID at index {gid_index}"));
        }
        let pd = ProtectionDomain::new(device)
            .map_err(|e| format!("a protection domain of {name}: {e}"))?;
        Ok(Self {
            device: device.clone(),
            pd,
            port,
            gid_index,
            gid: gid.unwrap_or_default(),
            ethernet: state.ethernet,
            lid: state.lid,
            mtu: state.mtu,
            max_msg_sz: state.max_msg_sz,
            dead: AtomicBool::new(false),
            down: AtomicBool::new(false),
        })
    }
}

/// RoCE v2 with an IPv4 address, where there is one: what networks route. `gids`: how many places there are.
fn choose_gid(gids: u32, gid: impl Fn(u8) -> Option<Gid>, is_v2: impl Fn(u8) -> bool) -> u8 {
    // Drivers have 256 places and more; later ones cannot be asked for.
    let places = (0..=u8::MAX).take(gids as usize);
    let v2: SmallVec<[(u8, Gid); 16]> = places
        .filter_map(|index| gid(index).map(|gid| (index, gid)))
        .filter(|(index, _)| is_v2(*index))
        .collect();
    let is_v4 = |gid: &Gid| std::net::Ipv6Addr::from(gid.0).to_ipv4_mapped().is_some();
    let chosen = v2.iter().find(|(_, gid)| is_v4(gid)).or(v2.first());
    chosen.map_or(0, |(index, _)| *index)
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
        let mut found: Vec<(usize, Rail)> = Vec::new();
        let mut reasons = Vec::new();
        for name in known {
            let device = match VerbsDevice::open(name) {
                Ok(device) => device,
                Err(reason) => {
                    reasons.push(reason);
                    continue;
                }
            };
            let distance = match (node, device.numa_node()) {
                (Some(ours), Some(its)) if ours == its => 0,
                (Some(_), Some(_)) => 2,
                _ => 1,
            };
            for port in 1..=device.limits().ports {
                match Rail::open(&device, port, config) {
                    Ok(rail) => found.push((distance, rail)),
                    Err(reason) => reasons.push(reason),
                }
            }
        }
        let nearest = found.iter().map(|(distance, _)| *distance).min();
        let mut near: Vec<Rail> = found
            .into_iter()
            .filter(|(distance, _)| Some(*distance) == nearest)
            .map(|(_, rail)| rail)
            .collect();
        near.truncate(MAX_CHOSEN);
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

    /// A table as drivers have them: each address once for RoCE v1 and once for v2, link-local first.
    fn table(places: u32, addresses: &[&str]) -> u8 {
        let addresses: Vec<std::net::Ipv6Addr> =
            addresses.iter().map(|text| text.parse().unwrap()).collect();
        let gid = |index: u8| Some(Gid(addresses.get(usize::from(index) / 2)?.octets()));
        choose_gid(places, gid, |index| index % 2 == 1)
    }

    #[test]
    fn an_ipv4_address_of_roce_v2_is_preferred_however_large_the_table_is() {
        for places in [6, 16, 255, 256, 257, 1024, u32::MAX] {
            let all = ["fe80::1", "fd00::1", "::ffff:10.9.0.1", "::ffff:10.9.0.2"];
            assert_eq!(table(places, &all), 5, "{places} places");
            assert_eq!(table(places, &all[..2]), 1, "{places} places");
            assert_eq!(table(places, &[]), 0, "{places} places");
        }
        assert_eq!(table(0, &["fe80::1"]), 0);
        assert_eq!(table(1, &["fe80::1"]), 0, "only v1");
    }
}
