//! Rounds: the processes of every case, in turn, again and again.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use super::options::{Direction, PeersArgs, PeersCase, PeersPlan};
use super::report::{PeersResults, PeersTally};
use super::wire::{Address, EngineSetup, Link, Order, PeerOutcome, Reply, Resources, SLOTS, Setup};
use crate::case::Operation;
use crate::clock::now_ns;
use crate::cpu::Usage;
use crate::pinning::allowed_cores;
use crate::plot;
use crate::process::Helper;
use crate::report::{Output, write_atomically};
use crate::session::Failure;

/// Starting engines, connecting all of them, filling and checking.
const PATIENCE: Duration = Duration::from_secs(120);
/// From the order to the moment at which all begin.
const START_DELAY_NS: u64 = 30_000_000;

/// What one round of one case showed.
pub(crate) struct PeersOutcome {
    /// One for each peer, in their order.
    pub(crate) peers: Vec<PeerOutcome>,
    /// Of the hub's process: without peers, and with all of them connected and used.
    pub(crate) before: Resources,
    pub(crate) after: Resources,
    /// What the hub's process used of the processors during the timed pass.
    pub(crate) used: Usage,
}

/// `corelane-bench many-peers`.
pub(crate) fn measure(options: &PeersArgs) -> Result<(), Failure> {
    let plan = options.plan(&allowed_cores()?).map_err(Failure::Options)?;
    let output = Output::prepare(&options.out_dir, options.json.as_deref())
        .map_err(|error| Failure::Options(format!("{error:#}")))?;
    let mut tallies: Vec<PeersTally> = plan.cases.iter().copied().map(PeersTally::new).collect();
    let begin = Instant::now();
    let failure = run_rounds(options, &plan, &mut tallies, begin).err();
    let results = PeersResults::new(options, &plan, &tallies, begin.elapsed(), failure.as_ref());
    if results.series.is_empty() {
        output.forsake();
        return Err(Failure::Run(failure.unwrap_or_else(|| anyhow!("nothing was measured"))));
    }
    for (series, tally) in results.series.iter().zip(tallies.iter().filter(|it| it.has_rounds())) {
        let histogram = tally.histogram();
        let started = results.started_unix_s;
        output.histograms(
            &series.hgrm,
            histogram,
            started,
            options.duration,
            tally.round_points(),
        )?;
    }
    let json = serde_json::to_vec_pretty(&results).context("encoding the results")?;
    write_atomically(&output.json, &json)?;
    output.report(&plot::page(&plot::of_peers(&results)))?;
    let mut out = std::io::stdout().lock();
    write!(out, "{}{}{}", results.header(), results.table(), results.files(&output))
        .context("writing to standard output")?;
    failure.map_or(Ok(()), |error| Err(Failure::Run(error)))
}

fn run_rounds(
    options: &PeersArgs,
    plan: &PeersPlan,
    tallies: &mut [PeersTally],
    begin: Instant,
) -> Result<()> {
    let runs = plan.cases.len() * usize::from(options.rounds);
    for round in 0..usize::from(options.rounds) {
        for (at, case) in plan.cases.iter().enumerate() {
            let id = case.id();
            if std::io::stderr().is_terminal() || at == 0 {
                crate::say!(
                    "[{:5.1} s] {}/{runs}, round {}: {id}",
                    begin.elapsed().as_secs_f64(),
                    round * plan.cases.len() + at + 1,
                    round + 1
                );
            }
            let outcome = run_case(options, plan, case)
                .with_context(|| format!("{id}, round {}", round + 1))?;
            tallies[at].add(&outcome, options.duration)?;
        }
    }
    Ok(())
}

/// The hub's process, then those of the peers.
struct Processes {
    helpers: Vec<Helper<Reply>>,
}

impl Processes {
    fn ask(&mut self, which: usize, order: &Order) -> Result<Reply> {
        self.helpers[which].send(order)?;
        self.answer(which)
    }

    fn answer(&mut self, which: usize) -> Result<Reply> {
        match self.helpers[which].receive(PATIENCE)? {
            Reply::Failed(message) => Err(self.helpers[which].blame(message)),
            reply => Ok(reply),
        }
    }

    /// Tells all of `which`, and then waits for all of them.
    fn ask_all(&mut self, which: &[usize], order: impl Fn(usize) -> Order) -> Result<Vec<Reply>> {
        for &at in which {
            self.helpers[at].send(&order(at))?;
        }
        which.iter().map(|&at| self.answer(at)).collect()
    }
}

fn run_case(options: &PeersArgs, plan: &PeersPlan, case: &PeersCase) -> Result<PeersOutcome> {
    let (mut processes, addresses, before) = start(options, plan, case)?;
    let all: Vec<usize> = (0..processes.helpers.len()).collect();
    let posting: Vec<usize> = match case.direction {
        Direction::FromOne => vec![0],
        Direction::ToOne => all[1..].to_vec(),
    };
    for &at in &posting {
        let links = links(case, &addresses, at);
        expect_met(processes.ask(at, &Order::Meet { links, operation: case.operation })?)?;
    }
    // Those who post write, or the others are read from.
    let is_source = |at: usize| posting.contains(&at) == (case.operation == Operation::Write);
    let mut outcome =
        PeersOutcome { peers: Vec::new(), before, after: before, used: Usage::default() };
    for (sequence, duration) in [(1, Duration::ZERO), (2, options.duration)] {
        processes.ask_all(&all, |at| Order::Begin { sequence, source: is_source(at) })?;
        let duration_ns = duration.as_nanos() as u64;
        let start_ns = now_ns() + START_DELAY_NS;
        let mut peers = Vec::new();
        for reply in processes.ask_all(&posting, |_| Order::Run { start_ns, duration_ns })? {
            let Reply::Ran(outcomes) = reply else { return Err(unexpected(&reply)) };
            peers.extend(outcomes);
        }
        peers.sort_unstable_by_key(|outcome| outcome.peer);
        outcome.peers = peers;
        let ended = processes.ask_all(&all, |at| Order::End { sequence, source: is_source(at) })?;
        let Some(Reply::Ended { resources, used }) = ended.first() else {
            return Err(anyhow!("the hub did not end a pass"));
        };
        if duration.is_zero() {
            // Everything is connected and used, and nothing of the measurement itself has been allocated.
            outcome.after = *resources;
        }
        outcome.used = *used;
    }
    Ok(outcome)
}

/// Starts all processes; returns the addresses of their engines too, and what the hub holds without peers.
fn start(
    options: &PeersArgs,
    plan: &PeersPlan,
    case: &PeersCase,
) -> Result<(Processes, Vec<Vec<Address>>, Resources)> {
    let sides = 1 + plan.processes.min(case.peers);
    let mut processes = Processes { helpers: Vec::new() };
    let mut addresses = Vec::new();
    let mut hub = Resources::default();
    for at in 0..sides {
        let name = if at == 0 { "hub".to_owned() } else { format!("peers {at}") };
        processes.helpers.push(Helper::start(&name, &["peers-side".to_owned()])?);
        let engines = if at == 0 {
            vec![EngineSetup { name: "hub".to_owned(), peers: case.peers, first_index: 0 }]
        } else {
            let engine = |peer| EngineSetup {
                name: format!("peer-{peer}"),
                peers: 1,
                first_index: (peer * SLOTS) as u64,
            };
            peers_of(case, sides - 1, at - 1).map(engine).collect()
        };
        let setup = Setup {
            engines,
            core: if at == 0 { plan.hub_core } else { plan.peer_core },
            transports: options.transport.clone(),
            block_bytes: case.block_bytes,
            sabotage: options.sabotage,
        };
        match processes.ask(at, &Order::Setup(setup))? {
            Reply::Ready { addresses: of_side, resources } => {
                addresses.push(of_side);
                if at == 0 {
                    hub = resources;
                }
            }
            other => return Err(unexpected(&other)),
        }
    }
    Ok((processes, addresses, hub))
}

/// Which peers live in a process; in turn, so that all have as many, give or take one.
fn peers_of(case: &PeersCase, processes: usize, process: usize) -> impl Iterator<Item = usize> {
    (process..case.peers).step_by(processes)
}

/// Whom a process posts to.
fn links(case: &PeersCase, addresses: &[Vec<Address>], at: usize) -> Vec<Link> {
    let processes = addresses.len() - 1;
    let mut links: Vec<Link> = Vec::new();
    for process in 0..processes {
        for (engine, peer) in peers_of(case, processes, process).enumerate() {
            let blocks = peer * SLOTS;
            if at == 0 {
                let address = addresses[1 + process][engine].clone();
                links.push(Link { engine: 0, peer, address, local: blocks, remote: 0 });
            } else if at == 1 + process {
                let address = addresses[0][0].clone();
                links.push(Link { engine, peer, address, local: 0, remote: blocks });
            }
        }
    }
    links
}

fn expect_met(reply: Reply) -> Result<()> {
    match reply {
        Reply::Met => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &Reply) -> anyhow::Error {
    anyhow!("unexpected reply {reply:?}; this is a bug of corelane-bench")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(peers: usize) -> PeersCase {
        PeersCase {
            direction: Direction::ToOne,
            operation: Operation::Read,
            block_bytes: 64,
            peers,
        }
    }

    #[test]
    fn every_peer_lives_in_one_process_and_has_blocks_of_its_own_at_the_hub() {
        let (case, processes) = (case(7), 3);
        let address = |name: String| Address { metadata: name, descriptor: String::new() };
        let mut addresses = vec![vec![address("hub".to_owned())]];
        for process in 0..processes {
            let peers = peers_of(&case, processes, process);
            addresses.push(peers.map(|peer| address(peer.to_string())).collect());
        }
        let mut from_hub = links(&case, &addresses, 0);
        from_hub.sort_unstable_by_key(|link| link.peer);
        for (peer, link) in from_hub.iter().enumerate() {
            assert_eq!((link.peer, link.local, link.remote), (peer, peer * SLOTS, 0));
            assert_eq!(link.address.metadata, peer.to_string());
        }
        assert_eq!(from_hub.len(), 7);
        let mut to_hub: Vec<Link> =
            (1..=processes).flat_map(|at| links(&case, &addresses, at)).collect();
        to_hub.sort_unstable_by_key(|link| link.peer);
        assert_eq!(to_hub.len(), 7);
        for (peer, link) in to_hub.iter().enumerate() {
            assert_eq!((link.peer, link.local, link.remote), (peer, 0, peer * SLOTS));
            assert_eq!((link.address.metadata.as_str(), link.engine), ("hub", peer / processes));
        }
    }
}
