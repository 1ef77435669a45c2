//! A process of `many-peers`: its nodes, and the one thread that posts for all of them.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use hdrhistogram::Histogram;

use super::node::{Blocks, EngineNode, Node};
use super::wire::{Kind, Link, NodeSetup, Order, PeerOutcome, Reply, Resources, SLOTS, Setup};
use crate::case::Operation;
use crate::clock::now_ns;
use crate::cpu::Usage;
use crate::measure::{OPERATION_TIMEOUT_NS, histogram, points_of};
use crate::parent::{Parent, Refusal};
use crate::pinning::sleep_then_spin_until;

/// Rounds over all peers between two looks whether anything still ends.
const ROUNDS_PER_LOOK: u32 = 4096;
/// Polls of nodes between two looks for an order, which would be a cost of their own otherwise.
const POLLS_PER_LOOK: usize = 256;

/// Obeys the parent until its orders end.
pub(crate) fn serve() -> Result<()> {
    let parent = Parent::connect(std::io::stdin())?;
    let Some(order) = parent.wait()? else { return Ok(()) };
    let Order::Setup(setup) = order else { bail!("expected to be set up first, not {order:?}") };
    match &setup.kind {
        Kind::Engines { transports } => {
            let core = setup.core;
            let start = |node: &NodeSetup, bytes| EngineNode::start(node, core, transports, bytes);
            tell(&parent, Side::start(&setup, false, start).and_then(|side| side.obey(&parent, "")))
        }
        #[cfg(feature = "nixl")]
        Kind::Agents { system, polls } => {
            use crate::nixl::{NixlAgent, nixl_version};
            let start = |node: &NodeSetup, bytes| NixlAgent::new(&node.name, system, bytes);
            let work = || {
                let side = Side::start(&setup, *polls, start)?;
                // After the backends have started their threads: only the application's own thread is placed.
                setup.core.map_or(Ok(()), crate::pinning::pin_current_thread)?;
                side.obey(&parent, &nixl_version())
            };
            crate::parent::leave(&tell(&parent, work()))
        }
        #[cfg(not(feature = "nixl"))]
        Kind::Agents { system, .. } => {
            let why = format!("this build cannot drive {} through NIXL", system.backend);
            tell(&parent, Err(Refusal(why).into()))
        }
    }
}

/// Tells the parent what went wrong, if anything did.
fn tell(parent: &Parent<Order>, ended: Result<()>) -> Result<()> {
    let Err(error) = ended else { return Ok(()) };
    let message = format!("{error:#}");
    parent.reply(&if error.is::<Refusal>() {
        Reply::Refused(message)
    } else {
        Reply::Failed(message)
    })
}

struct Side<N: Node> {
    /// First, so that nothing refers to a node that is gone.
    links: Vec<Posting<N::Transfer>>,
    nodes: Vec<N>,
    setup: Setup,
    /// Whether peers are served only while somebody polls.
    polls: bool,
    used_at_begin: Usage,
}

impl<N: Node> Side<N> {
    fn start(
        setup: &Setup,
        polls: bool,
        start: impl Fn(&NodeSetup, usize) -> Result<N>,
    ) -> Result<Self> {
        let bytes = |node: &NodeSetup| node.peers * SLOTS * stride(setup.block_bytes);
        let nodes: Vec<N> =
            setup.nodes.iter().map(|node| start(node, bytes(node))).collect::<Result<_>>()?;
        Ok(Self {
            links: Vec::new(),
            nodes,
            setup: setup.clone(),
            polls,
            used_at_begin: Usage::default(),
        })
    }

    /// Obeys orders until they end, and then takes the memory back and stops the nodes; both must work.
    fn obey(mut self, parent: &Parent<Order>, nixl: &str) -> Result<()> {
        let addresses = self.nodes.iter().map(Node::address).collect::<Result<_>>()?;
        let (resources, nixl) = (Resources::own()?, nixl.to_owned());
        parent.reply(&Reply::Ready { addresses, resources, nixl })?;
        while let Some(order) = self.next(parent)? {
            parent.reply(&self.answer(order)?)?;
        }
        self.links.clear();
        self.nodes.iter_mut().try_for_each(Node::close)
    }

    /// The next order, while peers are served.
    fn next(&mut self, parent: &Parent<Order>) -> Result<Option<Order>> {
        if !self.polls {
            return parent.wait();
        }
        loop {
            for _ in 0..POLLS_PER_LOOK.div_ceil(self.nodes.len().max(1)) {
                self.nodes.iter_mut().try_for_each(Node::progress)?;
            }
            if let Some(order) = parent.poll()? {
                return Ok(order);
            }
        }
    }

    fn answer(&mut self, order: Order) -> Result<Reply> {
        match order {
            Order::Setup(_) => bail!("set up twice"),
            Order::Meet { links, operation } => self.meet(&links, operation).map(|()| Reply::Met),
            Order::Begin { sequence, source } => {
                self.begin(sequence, source);
                Ok(Reply::Begun)
            }
            Order::Run { start_ns, duration_ns } => self.run(start_ns, duration_ns).map(Reply::Ran),
            Order::End { sequence, source } => {
                let used = Usage::own().since(self.used_at_begin);
                self.end(sequence, source)?;
                Ok(Reply::Ended { resources: Resources::own()?, used })
            }
        }
    }

    fn meet(&mut self, links: &[Link], operation: Operation) -> Result<()> {
        let stride = stride(self.setup.block_bytes);
        for link in links {
            let node = self.nodes.get_mut(link.node).context("no such node")?;
            let place = |block: usize| (block * stride) as u64;
            let places = (0..SLOTS)
                .map(|slot| (place(link.local + slot), place(link.remote + slot)))
                .collect();
            let blocks = Blocks { operation, places, bytes: self.setup.block_bytes };
            let transfers =
                node.meet(link, &blocks).with_context(|| format!("meeting peer {}", link.peer))?;
            let Link { peer, node, .. } = *link;
            self.links.push(Posting { peer, node, transfers, posted: 0, posted_ns: 0, over: None });
        }
        Ok(())
    }

    fn begin(&mut self, sequence: u64, source: bool) {
        let len = self.setup.block_bytes;
        for (node, offset, index) in self.blocks() {
            if source {
                node.arena().fill(offset, len, sequence, index);
            } else {
                node.arena().poison(offset, len);
            }
        }
        self.used_at_begin = Usage::own();
    }

    fn end(&self, sequence: u64, source: bool) -> Result<()> {
        if source {
            return Ok(());
        }
        let len = self.setup.block_bytes;
        for (node, offset, index) in self.blocks() {
            node.arena().check(offset, len, sequence, index).map_err(|mismatch| {
                let peer = index as usize / SLOTS;
                anyhow!("verification failed: block {index}, of peer {peer}: {mismatch}")
            })?;
        }
        Ok(())
    }

    /// All blocks: whose, where, and what their pattern is made of.
    fn blocks(&self) -> impl Iterator<Item = (&N, u64, u64)> {
        let stride = stride(self.setup.block_bytes) as u64;
        self.nodes.iter().zip(&self.setup.nodes).flat_map(move |(node, setup)| {
            let of_block = move |block| (node, block * stride, setup.first_index + block);
            (0..(setup.peers * SLOTS) as u64).map(of_block)
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
        let (nodes, sabotage) = (&self.nodes, self.setup.sabotage);
        for link in &mut self.links {
            link.posted = 0;
            link.post(&nodes[link.node], sabotage)?;
        }
        let (mut live, mut rounds, mut progress_ns) = (self.links.len(), 0u32, now_ns());
        let mut done = vec![false; live];
        while live > 0 {
            for (at, link) in self.links.iter_mut().enumerate() {
                if done[at] {
                    continue;
                }
                let node = &nodes[link.node];
                let Some(ended_ns) = link.ended_ns(node)? else { continue };
                progress_ns = ended_ns;
                if let Some((latency, in_time)) = outcomes.get_mut(at) {
                    latency.saturating_record(ended_ns - link.posted_ns);
                    *in_time += u64::from(ended_ns <= end_ns);
                }
                if ended_ns < end_ns || link.posted < SLOTS {
                    link.post(node, sabotage)?;
                } else {
                    done[at] = true;
                    live -= 1;
                }
            }
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(ROUNDS_PER_LOOK) {
                let waited = now_ns().saturating_sub(progress_ns);
                ensure!(waited < OPERATION_TIMEOUT_NS, "no transfer has ended within 30 s");
            }
        }
        let of_link = |link: &Posting<N::Transfer>,
                       (latency, operations): (Histogram<u64>, u64)| {
            PeerOutcome { peer: link.peer, operations, latency: points_of(&latency) }
        };
        let outcomes = self.links.iter().zip(outcomes);
        Ok(outcomes.map(|(link, outcome)| of_link(link, outcome)).collect())
    }
}

/// The transfers of one peer, of which one is outstanding.
struct Posting<T> {
    peer: usize,
    /// Which of the process's nodes posts.
    node: usize,
    transfers: Vec<T>,
    /// Since the pass began.
    posted: usize,
    posted_ns: u64,
    /// When the one posted last was over, where posting it told.
    over: Option<u64>,
}

impl<T> Posting<T> {
    #[inline]
    fn post(&mut self, node: &impl Node<Transfer = T>, sabotage: bool) -> Result<()> {
        let transfer = &self.transfers[self.posted % SLOTS];
        self.posted += 1;
        self.posted_ns = now_ns();
        let over = sabotage
            || node.post(transfer).with_context(|| format!("posting to peer {}", self.peer))?;
        self.over = over.then(now_ns);
        Ok(())
    }

    /// When the transfer that was posted last was seen to be over, if it is.
    #[inline]
    fn ended_ns(&self, node: &impl Node<Transfer = T>) -> Result<Option<u64>> {
        if self.over.is_some() {
            return Ok(self.over);
        }
        let finished = node.is_finished(&self.transfers[(self.posted - 1) % SLOTS]);
        let finished = finished.with_context(|| format!("the transfer of peer {}", self.peer))?;
        Ok(finished.then(now_ns))
    }
}

/// From the start of a block to that of the next.
fn stride(block_bytes: usize) -> usize {
    block_bytes.next_multiple_of(64)
}
