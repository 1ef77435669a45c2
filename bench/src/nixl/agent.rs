//! NIXL's C API as the two sides use it: an agent with one backend and one registered arena.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nixl_sys::{
    Agent, AgentConfig, MemType, MemoryRegion, NixlDescriptor, NotificationMap, OptArgs, Params,
    RegistrationHandle, ThreadSync, XferDescList, XferOp, XferRequest, XferStatus,
};

use super::driver::{Driver, Transferred};
use super::timing::{Length, Times, time_in_threads};
use super::wire::NixlSystem;
use crate::arena::Arena;
use crate::case::Operation;
use crate::clock::now_ns;
use crate::measure::OPERATION_TIMEOUT_NS;
use crate::parent::Refusal;
use crate::vram::Vram;

/// Unfinished polls between two looks at the clock: a hang is noticed, and the loop stays what is measured.
const POLLS_PER_LOOK: u32 = 4096;

/// The arena as NIXL registers it.
struct Registered(Arena);

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registered({} bytes)", self.0.len())
    }
}

impl MemoryRegion for Registered {
    unsafe fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr()
    }

    fn size(&self) -> usize {
        self.0.len()
    }
}

impl NixlDescriptor for Registered {
    fn mem_type(&self) -> MemType {
        self.0.vram().map_or(MemType::Dram, |_| MemType::Vram)
    }

    fn device_id(&self) -> u64 {
        self.0.vram().map_or(0, |vram| u64::from(vram.gpu()))
    }
}

/// An agent with one backend and the arena.
pub(crate) struct NixlAgent {
    agent: Agent,
    /// Name of its backend.
    backend: String,
    only_backend: OptArgs,
    /// Agents that were introduced, and where their arenas begin.
    peers: Vec<(String, u64)>,
    notifications: NotificationMap,
    arena: Arena,
    /// The peers' GPU, where their memory is one's.
    their_gpu: Option<u32>,
    _registration: RegistrationHandle,
}

impl NixlAgent {
    /// Creates agent and backend and registers memory. The process's number in the agent's name tells it from those of
    /// other processes.
    pub(crate) fn new(name: &str, system: &NixlSystem, arena_bytes: usize) -> Result<Self> {
        Self::with_memory(name, system, Arena::new(arena_bytes.max(4096))?, None)
    }

    /// As [`NixlAgent::new`], of any memory on either side.
    pub(crate) fn with_memory(
        name: &str,
        system: &NixlSystem,
        arena: Arena,
        their_gpu: Option<u32>,
    ) -> Result<Self> {
        if nixl_sys::is_stub() {
            bail!(Refusal(
                "libnixl_capi.so cannot be loaded: name the folder of the NIXL wheel that holds it \
                 (site-packages/.nixl_cu12.mesonpy.libs) with --nixl-libs DIR or in LD_LIBRARY_PATH"
                    .to_owned()
            ));
        }
        let name = format!("{name}-{}", std::process::id());
        let config = AgentConfig {
            enable_prog_thread: system.prog_thread,
            // What an application of several threads asks for.
            thread_sync: if system.threads { ThreadSync::Rw } else { ThreadSync::None },
            ..AgentConfig::default()
        };
        let agent = Agent::new_configured(&name, &config).context("creating a NIXL agent")?;
        refuse_unknown(&agent, &system.backend)?;
        let parameters = Params::from(
            system.parameters.iter().map(|(key, value)| (key.as_str(), value.as_str())),
        )
        .context("a parameter of the backend")?;
        let Ok(backend) = agent.create_backend(&system.backend, &parameters) else {
            bail!(Refusal(format!(
                "NIXL has the plugin {} but could not create its backend: the messages above say why",
                system.backend
            )));
        };
        let mut only_backend = OptArgs::new().context("optional arguments")?;
        only_backend.add_backend(&backend).context("optional arguments")?;
        let registration = agent
            .register_memory(&Registered(arena.clone()), Some(&only_backend))
            .with_context(|| format!("registering {} bytes", arena.len()))?;
        let notifications = NotificationMap::new().context("a list of notifications")?;
        Ok(Self {
            agent,
            backend: system.backend.clone(),
            only_backend,
            peers: Vec::new(),
            notifications,
            arena,
            their_gpu,
            _registration: registration,
        })
    }

    /// Introduces one more peer, whose arena begins at `address` there; gives its number.
    pub(crate) fn introduce(&mut self, metadata: &[u8], address: u64) -> Result<usize> {
        let name = self.agent.load_remote_md(metadata).context("loading the peer's metadata")?;
        self.peers.push((name, address));
        Ok(self.peers.len() - 1)
    }

    /// Prepares the transfer of blocks of one length between offsets of our arena and a peer's.
    pub(crate) fn prepare_with(
        &self,
        peer: usize,
        operation: Operation,
        (local, remote): (&[u64], &[u64]),
        block_bytes: usize,
    ) -> Result<Prepared> {
        let (_, address) = self.peer(peer)?;
        let list =
            |base: u64, gpu: Option<u32>, offsets: &[u64]| -> Result<XferDescList<'static>> {
                let kind = gpu.map_or(MemType::Dram, |_| MemType::Vram);
                let mut list = XferDescList::new(kind).context("a descriptor list")?;
                for offset in offsets {
                    list.add_desc((base + offset) as usize, block_bytes, gpu.unwrap_or(0).into());
                }
                // nixl-sys hands the descriptors over when it is first asked for the list: not in the timed call.
                let _ = list.as_ptr();
                Ok(list)
            };
        let mut prepared = Prepared {
            peer,
            operation: match operation {
                Operation::Write => XferOp::Write,
                _ => XferOp::Read,
            },
            local: list(self.arena.as_ptr() as u64, self.arena.vram().map(Vram::gpu), local)?,
            remote: list(*address, self.their_gpu, remote)?,
            request: None,
        };
        prepared.request = Some(self.request(&prepared)?);
        Ok(prepared)
    }

    /// Lets the backend go on with what peers want of it: some do nothing unless they are polled.
    #[inline]
    pub(crate) fn progress(&mut self) -> Result<()> {
        self.poll_notifications().map(drop)
    }

    fn peer(&self, number: usize) -> Result<&(String, u64)> {
        self.peers.get(number).context("no peer was introduced; this is a bug of corelane-bench")
    }

    /// Notifications that arrived since the last call, with their senders.
    #[inline]
    fn poll_notifications(&mut self) -> Result<Vec<(String, Vec<String>)>> {
        self.agent
            .get_notifications(&mut self.notifications, None)
            .context("polling for notifications")?;
        if self.notifications.is_empty().context("a list of notifications")? {
            return Ok(Vec::new());
        }
        let taken = self.notifications.take_notifs().context("reading notifications")?;
        Ok(taken.into_iter().collect())
    }
}

impl Driver for NixlAgent {
    const PREPARES: bool = true;

    type Prepared = Prepared;
    type Request = XferRequest;

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn metadata(&self) -> Result<Vec<u8>> {
        self.agent.get_local_md().map_err(|error| {
            let backend = &self.backend;
            Refusal(format!(
                "{backend} is no backend for transfers between agents: it has no metadata ({error})"
            ))
            .into()
        })
    }

    fn meet(&mut self, metadata: &[u8], address: u64) -> Result<()> {
        // The one that is there already is gone, or it would not be introduced again.
        self.peers.clear();
        self.introduce(metadata, address).map(drop)
    }

    fn prepare(
        &self,
        operation: Operation,
        places: (&[u64], &[u64]),
        block_bytes: usize,
    ) -> Result<Prepared> {
        self.prepare_with(0, operation, places, block_bytes)
    }

    fn request(&self, prepared: &Prepared) -> Result<XferRequest> {
        let Prepared { operation, local, remote, .. } = prepared;
        let (peer, _) = self.peer(prepared.peer)?;
        self.agent
            .create_xfer_req(*operation, local, remote, peer, Some(&self.only_backend))
            .context("preparing a transfer")
    }

    #[inline]
    fn transfer(&self, prepared: &Prepared) -> Result<Transferred> {
        transfer(&self.agent, prepared.request()?)
    }

    /// Only NIXL's handles are shared: descriptor lists are for the thread that prepares.
    fn time_in_threads(
        &self,
        lists: &[Vec<Prepared>],
        cores: &[usize],
        length: Length,
        looks: (impl FnOnce(), impl FnOnce()),
    ) -> Result<Times> {
        let lists: Vec<Vec<&XferRequest>> = lists
            .iter()
            .map(|list| list.iter().map(Prepared::request).collect())
            .collect::<Result<_>>()?;
        let agent = &self.agent;
        time_in_threads(&lists, cores, length, |request| transfer(agent, request), looks)
    }

    #[inline]
    fn post(&self, prepared: &Prepared) -> Result<bool> {
        let unfinished =
            self.agent.post_xfer_req(prepared.request()?, None).context("posting a transfer")?;
        Ok(!unfinished)
    }

    #[inline]
    fn is_finished(&self, prepared: &Prepared) -> Result<bool> {
        let request = prepared.request()?;
        let status = self.agent.get_xfer_status(request).context("the status of a transfer")?;
        Ok(status != XferStatus::InProgress)
    }

    fn notify(&mut self, text: &str) -> Result<()> {
        let (peer, _) = self.peer(0)?;
        self.agent.send_notification(peer, text.as_bytes(), None).context("sending a notification")
    }

    #[inline]
    fn await_answer(&mut self, text: &str) -> Result<()> {
        let begin = now_ns();
        let mut polls = 0u32;
        loop {
            let arrived = self.poll_notifications()?;
            if let [(_, texts)] = arrived.as_slice()
                && texts.as_slice() == [text]
            {
                return Ok(());
            }
            if !arrived.is_empty() {
                bail!("verification failed: sent the notification {text}, received {arrived:?}");
            }
            polls += 1;
            if polls.is_multiple_of(POLLS_PER_LOOK) && now_ns() - begin > OPERATION_TIMEOUT_NS {
                bail!(
                    "a notification was not answered within {} s",
                    OPERATION_TIMEOUT_NS / 1_000_000_000
                );
            }
        }
    }

    #[inline]
    fn answer(&mut self, mut seen: impl FnMut(&[u8], u64)) -> Result<()> {
        let arrived = self.poll_notifications()?;
        if arrived.is_empty() {
            return Ok(());
        }
        let arrived_ns = now_ns();
        for text in arrived.iter().flat_map(|(_, texts)| texts) {
            self.notify(text)?;
            // Behind the answer, so that the booking is part of nobody's round trip.
            seen(text.as_bytes(), arrived_ns);
        }
        Ok(())
    }
}

/// A transfer that can be posted again and again.
pub(crate) struct Prepared {
    peer: usize,
    operation: XferOp,
    local: XferDescList<'static>,
    remote: XferDescList<'static>,
    request: Option<XferRequest>,
}

impl Prepared {
    #[inline]
    fn request(&self) -> Result<&XferRequest> {
        self.request.as_ref().context("a transfer that was never prepared")
    }
}

/// Posts a transfer and polls without yielding until it is over.
#[inline]
fn transfer(agent: &Agent, request: &XferRequest) -> Result<Transferred> {
    let started = now_ns();
    let unfinished = agent.post_xfer_req(request, None).context("posting a transfer")?;
    let posted = now_ns();
    if unfinished {
        let mut polls = 0u32;
        while agent.get_xfer_status(request).context("the status of a transfer")?
            == XferStatus::InProgress
        {
            polls += 1;
            if polls.is_multiple_of(POLLS_PER_LOOK) && now_ns() - started > OPERATION_TIMEOUT_NS {
                bail!("a transfer did not end within {} s", OPERATION_TIMEOUT_NS / 1_000_000_000);
            }
        }
    }
    let completed = now_ns();
    Ok(Transferred { posted_ns: Some(posted - started), completed_ns: completed - started })
}

/// Says which plugins there are when the one asked for is not among them.
fn refuse_unknown(agent: &Agent, backend: &str) -> Result<()> {
    let plugins = agent.get_available_plugins().context("listing the plugins of NIXL")?;
    let mut names: Vec<String> =
        plugins.iter().filter_map(|name| name.ok().map(str::to_owned)).collect();
    names.sort_unstable();
    if names.iter().any(|name| name == backend) {
        return Ok(());
    }
    let place =
        std::env::var("NIXL_PLUGIN_DIR").unwrap_or_else(|_| "its own plugin folder".to_owned());
    bail!(Refusal(format!(
        "NIXL finds no plugin {backend} in {place}, only {}: name the right folder with --plugin-dir DIR",
        names.join(", ")
    )))
}

/// Version of the NIXL in use, from the wheel that its library came from; `unknown` for one built by hand.
pub(crate) fn nixl_version() -> String {
    library_folder().as_deref().and_then(wheel_version).unwrap_or_else(|| "unknown".to_owned())
}

fn library_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps.lines().find_map(|line| {
        let path = line.split_whitespace().nth(5)?;
        path.ends_with("/libnixl_capi.so").then(|| PathBuf::from(path))
    })?;
    path.parent().map(Path::to_path_buf)
}

/// `site-packages/.nixl_cu12.mesonpy.libs` stands beside `site-packages/nixl_cu12-1.5.1.dist-info`.
fn wheel_version(libraries: &Path) -> Option<String> {
    let folder = libraries.file_name()?.to_str()?;
    let package = folder.strip_prefix('.')?.split('.').next()?;
    let prefix = format!("{package}-");
    let entries = std::fs::read_dir(libraries.parent()?).ok()?;
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).find_map(|name| {
        let version = name.strip_prefix(&prefix)?.strip_suffix(".dist-info")?;
        Some(version.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_that_of_the_wheel_beside_the_libraries() {
        let place = tempfile::tempdir().expect("a directory");
        for folder in [
            ".nixl_cu12.mesonpy.libs",
            "nixl_cu12-1.5.1.dist-info",
            "nixl-9.9.9.dist-info",
            "numpy",
        ] {
            std::fs::create_dir(place.path().join(folder)).expect("creates");
        }
        let version = wheel_version(&place.path().join(".nixl_cu12.mesonpy.libs"));
        assert_eq!(version.as_deref(), Some("1.5.1"));
        assert_eq!(wheel_version(&place.path().join("lib")), None);
    }
}
