//! A process of `many-peers`: its engines, and the one thread that posts for all of them.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use corelane::{
    Access, Engine, EngineConfig, LaneSpec, Listen, Operation as Direction, Region,
    RegionDescriptor, Status, Transfer,
};
use hdrhistogram::Histogram;

use super::wire::{Address, EngineSetup, Link, Order, PeerOutcome, Reply, Resources, SLOTS, Setup};
use crate::arena::Arena;
use crate::case::Operation;
use crate::clock::now_ns;
use crate::control::{read_line, write_line};
use crate::cpu::Usage;
use crate::measure::{OPERATION_TIMEOUT_NS, histogram, points_of};
use crate::pinning::sleep_then_spin_until;
use crate::units::{from_hex, to_hex};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Rounds over all peers between two looks whether anything still ends.
const ROUNDS_PER_LOOK: u32 = 4096;

/// Obeys the parent until its orders end.
pub(crate) fn serve() -> Result<()> {
    let mut stdout = std::io::stdout();
    let mut stdin = std::io::stdin().lock();
    let mut side: Option<Side> = None;
    while let Some(order) = read_line::<Order>(&mut stdin).context("the parent's orders")? {
        let reply = obey(&mut side, order);
        write_line(
            &mut stdout,
            &reply.unwrap_or_else(|error| Reply::Failed(format!("{error:#}"))),
        )?;
    }
    side.map_or(Ok(()), Side::close)
}

fn obey(side: &mut Option<Side>, order: Order) -> Result<Reply> {
    if let Order::Setup(setup) = order {
        let (made, addresses) = Side::new(&setup)?;
        *side = Some(made);
        return Ok(Reply::Ready { addresses, resources: Resources::own()? });
    }
    let side = side.as_mut().context("expected to be set up first")?;
    match order {
        Order::Setup(_) => bail!("set up twice"),
        Order::Meet { links, operation } => side.meet(&links, operation).map(|()| Reply::Met),
        Order::Begin { sequence, source } => {
            side.begin(sequence, source);
            Ok(Reply::Begun)
        }
        Order::Run { start_ns, duration_ns } => side.run(start_ns, duration_ns).map(Reply::Ran),
        Order::End { sequence, source } => {
            let used = Usage::own().since(side.used_at_begin);
            side.end(sequence, source)?;
            Ok(Reply::Ended { resources: Resources::own()?, used })
        }
    }
}

/// An engine and its memory.
struct Node {
    engine: Engine,
    region: Region,
    arena: Arena,
    blocks: usize,
    first_index: u64,
}

struct Side {
    /// First, so that nothing refers to an engine that is gone.
    links: Vec<Posting>,
    nodes: Vec<Node>,
    block_bytes: usize,
    sabotage: bool,
    used_at_begin: Usage,
}

impl Side {
    fn new(setup: &Setup) -> Result<(Self, Vec<Address>)> {
        let nodes: Vec<Node> =
            setup.engines.iter().map(|engine| Node::start(engine, setup)).collect::<Result<_>>()?;
        let addresses = nodes.iter().map(Node::address).collect();
        let side = Self {
            links: Vec::new(),
            nodes,
            block_bytes: setup.block_bytes,
            sabotage: setup.sabotage,
            used_at_begin: Usage::default(),
        };
        Ok((side, addresses))
    }

    fn meet(&mut self, links: &[Link], operation: Operation) -> Result<()> {
        let direction = match operation {
            Operation::Read => Direction::Read,
            _ => Direction::Write,
        };
        let (stride, len) = (stride(self.block_bytes), self.block_bytes as u64);
        for link in links {
            let node = self.nodes.get(link.engine).context("no such engine")?;
            let bytes = |hex: &str| from_hex(hex).context("an address that is no hexadecimal");
            let remote = RegionDescriptor::from_bytes(&bytes(&link.address.descriptor)?)?;
            let peer = node.engine.load_peer(&bytes(&link.address.metadata)?)?;
            peer.connect(CONNECT_TIMEOUT)
                .with_context(|| format!("connecting peer {}", link.peer))?;
            let prepare = |slot: usize| -> Result<Transfer> {
                let local = [node.region.segment(((link.local + slot) * stride) as u64, len)];
                let there = [remote.segment(((link.remote + slot) * stride) as u64, len)];
                Ok(node.engine.prepare(direction, &peer, &local, &there)?.transfer())
            };
            let transfers = (0..SLOTS).map(prepare).collect::<Result<_>>()?;
            self.links.push(Posting { peer: link.peer, transfers, posted: 0, posted_ns: 0 });
        }
        Ok(())
    }

    fn begin(&mut self, sequence: u64, source: bool) {
        let len = self.block_bytes;
        for (node, offset, index) in self.blocks() {
            if source {
                node.arena.fill(offset, len, sequence, index);
            } else {
                node.arena.poison(offset, len);
            }
        }
        self.used_at_begin = Usage::own();
    }

    fn end(&self, sequence: u64, source: bool) -> Result<()> {
        if source {
            return Ok(());
        }
        for (node, offset, index) in self.blocks() {
            node.arena.check(offset, self.block_bytes, sequence, index).map_err(|mismatch| {
                let peer = index as usize / SLOTS;
                anyhow!("verification failed: block {index}, of peer {peer}: {mismatch}")
            })?;
        }
        Ok(())
    }

    /// All blocks: whose, where, and what their pattern is made of.
    fn blocks(&self) -> impl Iterator<Item = (&Node, u64, u64)> {
        let stride = stride(self.block_bytes) as u64;
        self.nodes.iter().flat_map(move |node| {
            let of_block = move |block| (node, block * stride, node.first_index + block);
            (0..node.blocks as u64).map(of_block)
        })
    }

    /// One transfer outstanding for each peer, all begun at the same moment, until the time is over and each has been
    /// through all its places.
    fn run(&mut self, start_ns: u64, duration_ns: u64) -> Result<Vec<PeerOutcome>> {
        let mut outcomes: Vec<(Histogram<u64>, u64)> = Vec::new();
        if duration_ns > 0 {
            outcomes.extend(self.links.iter().map(|_| (histogram(), 0)));
        }
        let end_ns = start_ns + duration_ns;
        sleep_then_spin_until(start_ns);
        let sabotage = self.sabotage;
        for link in &mut self.links {
            link.posted = 0;
            link.post(sabotage)?;
        }
        let (mut live, mut rounds, mut progress_ns) = (self.links.len(), 0u32, now_ns());
        let mut ended = vec![false; live];
        while live > 0 {
            for (at, link) in self.links.iter_mut().enumerate() {
                if ended[at] || !link.is_over(sabotage)? {
                    continue;
                }
                let now = now_ns();
                progress_ns = now;
                if let Some((latency, in_time)) = outcomes.get_mut(at) {
                    latency.saturating_record(now - link.posted_ns);
                    *in_time += u64::from(now <= end_ns);
                }
                if now < end_ns || link.posted < SLOTS {
                    link.post(sabotage)?;
                } else {
                    ended[at] = true;
                    live -= 1;
                }
            }
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(ROUNDS_PER_LOOK) {
                let waited = now_ns().saturating_sub(progress_ns);
                ensure!(waited < OPERATION_TIMEOUT_NS, "no transfer has ended within 30 s");
            }
        }
        let outcome = |(link, (latency, operations)): (&Posting, (Histogram<u64>, u64))| {
            PeerOutcome { peer: link.peer, operations, latency: points_of(&latency) }
        };
        Ok(self.links.iter().zip(outcomes).map(outcome).collect())
    }

    /// Takes the memory back and stops the engines; both must work.
    fn close(mut self) -> Result<()> {
        self.links.clear();
        self.nodes.iter().try_for_each(Node::close)
    }
}

impl Node {
    fn start(setup: &EngineSetup, all: &Setup) -> Result<Self> {
        let mut config = EngineConfig::default();
        config.lanes = LaneSpec::Cores(vec![all.core]);
        config.transports = all
            .transports
            .iter()
            .map(|name| name.parse())
            .collect::<Result<_, corelane::Error>>()?;
        config.listen = Listen { addresses: vec![Ipv4Addr::LOCALHOST.into()], ..Listen::default() };
        let engine = Engine::new(&setup.name, config)
            .with_context(|| format!("starting the engine {}", setup.name))?;
        let blocks = setup.peers * SLOTS;
        let arena = Arena::new(blocks * stride(all.block_bytes))?;
        // SAFETY: the arena stays mapped as long as this value's handle to it, and `close` deregisters it before that
        // is dropped. Blocks are touched only between passes, when no transfer is in flight.
        let region = unsafe { engine.register(arena.as_ptr(), arena.len(), Access::READ_WRITE) }?;
        Ok(Self { engine, region, arena, blocks, first_index: setup.first_index })
    }

    fn address(&self) -> Address {
        Address {
            metadata: to_hex(&self.engine.metadata()),
            descriptor: to_hex(&self.region.descriptor().to_bytes()),
        }
    }

    fn close(&self) -> Result<()> {
        let released = self.engine.deregister(&self.region);
        self.engine.shutdown().context("stopping an engine")?;
        released.context("deregistering the memory")
    }
}

/// The transfers of one peer, of which one is outstanding.
struct Posting {
    peer: usize,
    transfers: Vec<Transfer>,
    /// Since the pass began.
    posted: usize,
    posted_ns: u64,
}

impl Posting {
    #[inline]
    fn post(&mut self, sabotage: bool) -> Result<()> {
        let transfer = &self.transfers[self.posted % SLOTS];
        self.posted += 1;
        self.posted_ns = now_ns();
        if !sabotage {
            transfer.post().with_context(|| format!("posting to peer {}", self.peer))?;
        }
        Ok(())
    }

    /// Whether the transfer that was posted last has ended.
    #[inline]
    fn is_over(&self, sabotage: bool) -> Result<bool> {
        if sabotage {
            return Ok(true);
        }
        match self.transfers[(self.posted - 1) % SLOTS].status() {
            Status::InProgress => Ok(false),
            Status::Done => Ok(true),
            Status::Failed(error) => {
                Err(error).with_context(|| format!("the transfer of peer {} failed", self.peer))
            }
            Status::Idle => bail!("the engine forgot the transfer of peer {}", self.peer),
        }
    }
}

/// From the start of a block to that of the next.
fn stride(block_bytes: usize) -> usize {
    block_bytes.next_multiple_of(64)
}
