//! What the parent and its processes say to each other: one JSON value per line, silent during a pass.

use std::fs;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::case::Operation;
use crate::cpu::Usage;
use crate::measure::Points;
use crate::nixl::NixlSystem;
use crate::parent::Parent;

/// Places of a peer that its transfers rotate through, so that every one of them can be verified.
pub(crate) const SLOTS: usize = 16;

/// A node of a process: an engine, or an agent of NIXL.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NodeSetup {
    pub(crate) name: String,
    /// Peers that it has, with [`SLOTS`] blocks for each.
    pub(crate) peers: usize,
    /// What the pattern of its first block is made of; blocks that are copied to each other have equal ones.
    pub(crate) first_index: u64,
}

/// What the nodes are, all of one kind.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    Engines {
        transports: Vec<String>,
    },
    Agents {
        system: NixlSystem,
        /// Whether this thread has to poll while it posts nothing, because the backend moves nothing otherwise.
        polls: bool,
    },
}

/// All that a process needs to know to begin.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) kind: Kind,
    /// Of engines, the core of all lanes; of agents, that of the application's thread.
    pub(crate) core: Option<usize>,
    pub(crate) nodes: Vec<NodeSetup>,
    pub(crate) block_bytes: usize,
    pub(crate) sabotage: bool,
}

/// Where a node is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Address {
    /// In hexadecimal.
    pub(crate) metadata: String,
    pub(crate) memory: Memory,
}

/// A node's memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Memory {
    /// Descriptor of an engine's region, in hexadecimal.
    Region(String),
    /// Where an agent's arena begins there.
    At(u64),
}

/// A peer that a process posts to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Link {
    /// Which of the process's nodes posts.
    pub(crate) node: usize,
    /// Number of the peer (not of the hub) that this is about.
    pub(crate) peer: usize,
    pub(crate) address: Address,
    /// First of the blocks on either side.
    pub(crate) local: usize,
    pub(crate) remote: usize,
}

/// What the parent asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// Must come first.
    Setup(Setup),
    /// Who posts: connect, and prepare the transfers.
    Meet { links: Vec<Link>, operation: Operation },
    /// Fill the blocks if they are the source, poison them otherwise.
    Begin { sequence: u64, source: bool },
    /// Who posts: from `start_ns` on; with no duration every block once, untimed.
    Run { start_ns: u64, duration_ns: u64 },
    /// Check the blocks if they are the destination.
    End { sequence: u64, source: bool },
}

/// What is answered, one reply per order.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    Ready {
        addresses: Vec<Address>,
        resources: Resources,
        /// Version of NIXL; empty where there is none.
        nixl: String,
    },
    Met,
    Begun,
    Ran(Vec<PeerOutcome>),
    Ended {
        resources: Resources,
        /// Of the processors, since the pass began.
        used: Usage,
    },
    /// The user asked for something that cannot be.
    Refused(String),
    /// It went wrong.
    Failed(String),
}

/// What one peer got in a timed pass.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeerOutcome {
    pub(crate) peer: usize,
    /// Transfers that ended before the time was over.
    pub(crate) operations: u64,
    /// Of all transfers that were begun before, from just before posting to the moment at which the end was seen.
    pub(crate) latency: Points,
}

/// What a process holds, but for what it has for its parent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Resources {
    /// Resident memory, what it maps of others included.
    pub(crate) resident_bytes: u64,
    pub(crate) descriptors: u64,
    pub(crate) threads: u64,
}

impl Resources {
    /// Of this process.
    pub(crate) fn own() -> Result<Self> {
        let status = fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
        let number = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let word = line.and_then(|line| line.split_whitespace().next());
            let word = word.with_context(|| format!("no {name} in /proc/self/status"))?;
            word.parse().with_context(|| format!("{name} {word}"))
        };
        // One is the directory that is being listed.
        let descriptors =
            fs::read_dir("/proc/self/fd").context("/proc/self/fd")?.count() as u64 - 1;
        let own = |number: u64, of_harness: u64| number.saturating_sub(of_harness);
        Ok(Self {
            resident_bytes: number("VmRSS:")? * 1024,
            descriptors: own(descriptors, Parent::<Order>::DESCRIPTORS),
            threads: own(number("Threads:")?, Parent::<Order>::THREADS),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};
    use std::thread;

    use super::*;
    use crate::arena::Arena;

    #[test]
    fn memory_descriptors_and_threads_that_are_taken_show() {
        // What a runner of tests leaves open, and on which thread it runs them, is its own affair: only what is taken
        // here is counted.
        let before = Resources::own().expect("reads");
        let arena = Arena::new(64 << 20).expect("map");
        let files: Vec<fs::File> =
            (0..100).map(|_| fs::File::open("/dev/null").expect("opens")).collect();
        let end = Arc::new(Barrier::new(21));
        let threads: Vec<_> = (0..20)
            .map(|_| {
                let end = Arc::clone(&end);
                thread::spawn(move || end.wait())
            })
            .collect();
        let after = Resources::own().expect("reads");
        // Other tests of this process take and give back a little meanwhile.
        assert!(after.resident_bytes > before.resident_bytes + (32 << 20), "{before:?} {after:?}");
        assert!(after.descriptors > before.descriptors + 50, "{before:?} {after:?}");
        assert!(after.threads > before.threads + 10, "{before:?} {after:?}");
        end.wait();
        for thread in threads {
            thread.join().expect("a thread that only waits");
        }
        drop((arena, files));
    }
}
