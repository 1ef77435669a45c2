//! Rounds: the processes of every case on every contender, in turn, again and again.

use std::io::{IsTerminal as _, Write as _};

use anyhow::{Context as _, anyhow};

use super::options::{Contender, Direction, PeersArgs, PeersCase, PeersPlan};
use super::processes::{Processes, unexpected};
use super::report::{PeersResults, SCHEMA, SCHEMA_VERSION};
use super::tally::PeersTally;
use super::wire::{
    Address, Kind, Link, NodeSetup, Order, PeerOutcome, Reply, Resources, SLOTS, Setup,
};
use crate::case::Operation;
use crate::clock::now_ns;
use crate::cpu::Usage;
use crate::manifest::Host;
use crate::memory::ensure_available;
use crate::nixl::ensure_driver;
use crate::pinning::allowed_cores;
use crate::plot;
use crate::report::{Output, RunInfo, Started, write_atomically};
use crate::session::Failure;

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
    /// Version of NIXL; empty where there is none.
    pub(crate) nixl: String,
}

/// `corelane-bench many-peers`.
pub(crate) fn measure(options: &PeersArgs) -> Result<(), Failure> {
    let plan = options.plan(&allowed_cores()?).map_err(Failure::Options)?;
    if plan.is_nixl() {
        ensure_driver()?;
    }
    // The hub has as much as all peers together.
    let most = plan.cases.iter().filter_map(PeersCase::hub_bytes).max().unwrap_or(0);
    ensure_available(most.saturating_mul(2), most).map_err(Failure::Options)?;
    let output = Output::prepare(&options.out_dir, options.json.as_deref())
        .map_err(|error| Failure::Options(format!("{error:#}")))?;
    let started = Started::now();
    // Before the run: what disturbs the machine then is not the run itself.
    let environment = Host::describe();
    let mut tallies: Vec<PeersTally> = Vec::new();
    for &case in &plan.cases {
        let tally = |contender: &Contender| PeersTally::new(case, contender.to_string());
        tallies.extend(plan.contenders.iter().map(tally));
    }
    let measured = run_rounds(options, &plan, &mut tallies, &started);
    let failure = measured.as_ref().err().map(ToString::to_string);
    let run = RunInfo::new((SCHEMA, SCHEMA_VERSION), &started, failure);
    let results = PeersResults::new(options, &plan, &tallies, (run, environment));
    if results.series.is_empty() {
        output.forsake();
        return measured;
    }
    for (series, tally) in results.series.iter().zip(tallies.iter().filter(|it| it.has_rounds())) {
        let (histogram, begun) = (tally.histogram(), results.run.started_unix_s);
        output.histograms(
            &series.hgrm,
            histogram,
            begun,
            options.duration,
            tally.round_points(),
        )?;
    }
    let json = serde_json::to_vec_pretty(&results).context("encoding the results")?;
    write_atomically(&output.json, &json)?;
    output.report(&plot::page(&plot::of_peers(&results)))?;
    let mut out = std::io::stdout().lock();
    write!(out, "{}{}{}", results.header(), results.tables(), results.files(&output))
        .context("writing to standard output")?;
    measured
}

fn run_rounds(
    options: &PeersArgs,
    plan: &PeersPlan,
    tallies: &mut [PeersTally],
    started: &Started,
) -> Result<(), Failure> {
    if let [_, _, ..] = plan.contenders[..] {
        for contender in &plan.contenders {
            probe(options, plan, contender)?;
        }
    }
    let contenders = plan.contenders.len();
    let runs = tallies.len() * usize::from(options.rounds);
    for round in 0..usize::from(options.rounds) {
        for (at, tally) in tallies.iter_mut().enumerate() {
            let (case, contender) =
                (&plan.cases[at / contenders], &plan.contenders[at % contenders]);
            let name = match contenders {
                1 => case.id(),
                _ => format!("{}, {contender}", case.id()),
            };
            if std::io::stderr().is_terminal() || at == 0 {
                crate::say!(
                    "[{:5.1} s] {}/{runs}, round {}: {name}",
                    started.elapsed().as_secs_f64(),
                    round * plan.cases.len() * contenders + at + 1,
                    round + 1
                );
            }
            let outcome =
                run_case(options, plan, contender, case).map_err(|failure| match failure {
                    Failure::Run(error) => {
                        error.context(format!("{name}, round {}", round + 1)).into()
                    }
                    refused => refused,
                })?;
            tally.add(&outcome, options.duration)?;
        }
    }
    Ok(())
}

fn run_case(
    options: &PeersArgs,
    plan: &PeersPlan,
    contender: &Contender,
    case: &PeersCase,
) -> Result<PeersOutcome, Failure> {
    let Begun { mut processes, addresses, hub: before, nixl } =
        start(options, plan, contender, case)?;
    let all: Vec<usize> = (0..processes.len()).collect();
    let posting: Vec<usize> = match case.direction {
        Direction::FromOne => vec![0],
        Direction::ToOne => all[1..].to_vec(),
    };
    for &at in &posting {
        let links = links(case, &addresses, at);
        match processes.ask(at, &Order::Meet { links, operation: case.operation })? {
            Reply::Met => {}
            other => return Err(unexpected(&other)),
        }
    }
    // Those who post write, or the others are read from.
    let is_source = |at: usize| posting.contains(&at) == (case.operation == Operation::Write);
    let mut outcome =
        PeersOutcome { peers: Vec::new(), before, after: before, used: Usage::default(), nixl };
    for (sequence, duration) in [(1, std::time::Duration::ZERO), (2, options.duration)] {
        processes.ask_all(&all, |at| Order::Begin { sequence, source: is_source(at) })?;
        let duration_ns = duration.as_nanos() as u64;
        let start_ns = now_ns() + START_DELAY_NS;
        let mut peers = Vec::new();
        let order = |_| Order::Run { start_ns, duration_ns };
        for reply in processes.ask_all_for(&posting, order, duration)? {
            let Reply::Ran(outcomes) = reply else { return Err(unexpected(&reply)) };
            peers.extend(outcomes);
        }
        peers.sort_unstable_by_key(|outcome| outcome.peer);
        outcome.peers = peers;
        let ended = processes.ask_all(&all, |at| Order::End { sequence, source: is_source(at) })?;
        let Some(Reply::Ended { resources, used }) = ended.first() else {
            return Err(anyhow!("the hub did not end a pass").into());
        };
        if duration.is_zero() {
            // Everything is connected and used, and nothing of the measurement itself has been allocated.
            outcome.after = *resources;
        }
        outcome.used = *used;
    }
    Ok(outcome)
}

/// All processes, ready.
struct Begun {
    processes: Processes,
    /// Where the nodes of each process are.
    addresses: Vec<Vec<Address>>,
    /// What the hub holds without peers.
    hub: Resources,
    nixl: String,
}

fn start(
    options: &PeersArgs,
    plan: &PeersPlan,
    contender: &Contender,
    case: &PeersCase,
) -> Result<Begun, Failure> {
    let mut begun = Begun {
        processes: Processes::new(environment(options, contender)),
        addresses: Vec::new(),
        hub: Resources::default(),
        nixl: String::new(),
    };
    let sides = 1 + plan.processes.min(case.peers);
    for at in 0..sides {
        let nodes = if at == 0 {
            vec![NodeSetup { name: "hub".to_owned(), peers: case.peers, first_index: 0 }]
        } else {
            let node = |peer| NodeSetup {
                name: format!("peer-{peer}"),
                peers: 1,
                first_index: (peer * SLOTS) as u64,
            };
            peers_of(case, sides - 1, at - 1).map(node).collect()
        };
        let setup = Setup {
            kind: kind(options, plan, contender),
            core: if at == 0 { plan.hub_core } else { plan.peer_core },
            nodes,
            block_bytes: case.block_bytes,
            sabotage: options.sabotage,
        };
        let name = if at == 0 { "hub".to_owned() } else { format!("peers {at}") };
        let name = match contender {
            Contender::Engines => name,
            Contender::Agents(spec) => format!("{spec} {name}"),
        };
        match begun.processes.start(&name, setup)? {
            Reply::Ready { addresses, resources, nixl } => {
                begun.addresses.push(addresses);
                if at == 0 {
                    (begun.hub, begun.nixl) = (resources, nixl);
                }
            }
            other => return Err(unexpected(&other)),
        }
    }
    Ok(begun)
}

/// Whether a contender can be had at all: what is wrong with the last of several must not show after all others have run.
fn probe(options: &PeersArgs, plan: &PeersPlan, contender: &Contender) -> Result<(), Failure> {
    let setup = Setup {
        kind: kind(options, plan, contender),
        core: plan.hub_core,
        nodes: vec![NodeSetup { name: "hub".to_owned(), peers: 1, first_index: 0 }],
        block_bytes: 64,
        sabotage: false,
    };
    let mut processes = Processes::new(environment(options, contender));
    processes.start(&format!("{contender} hub"), setup).map(drop)
}

fn kind(options: &PeersArgs, plan: &PeersPlan, contender: &Contender) -> Kind {
    match contender {
        Contender::Engines => Kind::Engines { transports: plan.transports.clone() },
        Contender::Agents(spec) => Kind::Agents {
            system: options.choice.system(spec),
            polls: !spec.serves_alone() && !options.choice.prog_thread,
        },
    }
}

fn environment(options: &PeersArgs, contender: &Contender) -> Vec<(String, String)> {
    match contender {
        Contender::Engines => Vec::new(),
        Contender::Agents(spec) => options.choice.environment(spec),
    }
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
        for (node, peer) in peers_of(case, processes, process).enumerate() {
            let blocks = peer * SLOTS;
            if at == 0 {
                let address = addresses[1 + process][node].clone();
                links.push(Link { node: 0, peer, address, local: blocks, remote: 0 });
            } else if at == 1 + process {
                let address = addresses[0][0].clone();
                links.push(Link { node, peer, address, local: 0, remote: blocks });
            }
        }
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::wire::Memory;

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
        let address = |name: String| Address { metadata: name, memory: Memory::At(0) };
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
            assert_eq!((link.address.metadata.as_str(), link.node), ("hub", peer / processes));
        }
    }
}
