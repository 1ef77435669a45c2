//! What is measured: a node with memory that its peers read and write, and the engine as one.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use corelane::{
    Access, Engine, EngineConfig, LaneSpec, Listen, Operation as Direction, Region,
    RegionDescriptor, Status, Transfer,
};

use super::wire::{Address, Link, Memory, NodeSetup};
use crate::arena::Arena;
use crate::case::Operation;
use crate::engine_side::not_started;
use crate::units::{from_hex, to_hex};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// What is transferred from or to one peer.
pub(super) struct Blocks {
    pub(super) operation: Operation,
    /// Where each lies, here and there.
    pub(super) places: Vec<(u64, u64)>,
    pub(super) bytes: usize,
}

/// One of the two kinds of nodes. The loops over them are compiled for each, so that none pays for the other.
pub(super) trait Node {
    /// A transfer that can be posted again and again.
    type Transfer;

    /// The memory that peers read and write.
    fn arena(&self) -> &Arena;

    /// What peers need to reach it.
    fn address(&self) -> Result<Address>;

    /// Introduces a peer and prepares a transfer of each block.
    fn meet(&mut self, link: &Link, blocks: &Blocks) -> Result<Vec<Self::Transfer>>;

    /// Posts a transfer; true where it is known to be over already.
    fn post(&self, transfer: &Self::Transfer) -> Result<bool>;

    /// Whether a posted transfer is over; fails when it failed.
    fn is_finished(&self, transfer: &Self::Transfer) -> Result<bool>;

    /// Lets it go on with what peers want of it.
    fn progress(&mut self) -> Result<()>;

    /// Takes the memory back and stops what runs.
    fn close(&mut self) -> Result<()>;
}

/// An engine and its memory.
pub(super) struct EngineNode {
    engine: Engine,
    region: Region,
    arena: Arena,
}

impl EngineNode {
    /// Starts an engine, with a lane on `core`, and registers so much memory.
    pub(super) fn start(
        setup: &NodeSetup,
        core: Option<usize>,
        transports: &[String],
        bytes: usize,
    ) -> Result<Self> {
        let mut config = EngineConfig::default();
        if let Some(core) = core {
            config.lanes = LaneSpec::Cores(vec![core]);
        }
        config.transports =
            transports.iter().map(|name| name.parse()).collect::<Result<_, corelane::Error>>()?;
        config.listen = Listen { addresses: vec![Ipv4Addr::LOCALHOST.into()], ..Listen::default() };
        let engine = Engine::new(&setup.name, config)
            .map_err(|error| not_started(format!("starting the engine {}", setup.name), &error))?;
        let arena = Arena::new(bytes)?;
        // SAFETY: the arena stays mapped as long as this value's handle to it, and `close` deregisters it before that
        // is dropped. Blocks are touched only between passes, when no transfer is in flight.
        let region = unsafe { engine.register(arena.as_ptr(), arena.len(), Access::READ_WRITE) }?;
        Ok(Self { engine, region, arena })
    }
}

impl Node for EngineNode {
    type Transfer = Transfer;

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn address(&self) -> Result<Address> {
        Ok(Address {
            metadata: to_hex(&self.engine.metadata()),
            memory: Memory::Region(to_hex(&self.region.descriptor().to_bytes())),
        })
    }

    fn meet(&mut self, link: &Link, blocks: &Blocks) -> Result<Vec<Transfer>> {
        let direction = match blocks.operation {
            Operation::Read => Direction::Read,
            _ => Direction::Write,
        };
        let Memory::Region(descriptor) = &link.address.memory else {
            bail!("an engine cannot reach the memory of an agent");
        };
        let bytes = |hex: &str| from_hex(hex).context("an address that is no hexadecimal");
        let remote = RegionDescriptor::from_bytes(&bytes(descriptor)?)?;
        let peer = self.engine.load_peer(&bytes(&link.address.metadata)?)?;
        peer.connect(CONNECT_TIMEOUT).with_context(|| format!("connecting peer {}", link.peer))?;
        let prepare = |&(here, there): &(u64, u64)| -> Result<Transfer> {
            let len = blocks.bytes as u64;
            let (local, remote) = ([self.region.segment(here, len)], [remote.segment(there, len)]);
            Ok(self.engine.prepare(direction, &peer, &local, &remote)?.transfer())
        };
        blocks.places.iter().map(prepare).collect()
    }

    #[inline]
    fn post(&self, transfer: &Transfer) -> Result<bool> {
        transfer.post()?;
        Ok(false)
    }

    #[inline]
    fn is_finished(&self, transfer: &Transfer) -> Result<bool> {
        match transfer.status() {
            Status::InProgress => Ok(false),
            Status::Done => Ok(true),
            Status::Failed(error) => Err(error.into()),
            Status::Idle => bail!("the engine forgot the transfer"),
        }
    }

    /// Its lane does without.
    fn progress(&mut self) -> Result<()> {
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        let released = self.engine.deregister(&self.region);
        self.engine.shutdown().context("stopping an engine")?;
        released.context("deregistering the memory")
    }
}
