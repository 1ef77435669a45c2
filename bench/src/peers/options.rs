//! Command line of `many-peers`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::wire::SLOTS;
use crate::case::Operation;
use crate::engine_side::parse_transport;
use crate::nixl::{BackendArgs, BackendSpec, ensure_distinct};
use crate::pinning;
use crate::units::{Bytes, parse_bytes, parse_duration};

/// Who posts the transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Direction {
    /// One engine posts to all peers
    FromOne,
    /// All peers post to one engine
    ToOne,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FromOne => "from-one",
            Self::ToOne => "to-one",
        })
    }
}

/// One shape of the scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PeersCase {
    pub(crate) direction: Direction,
    pub(crate) operation: Operation,
    pub(crate) block_bytes: usize,
    pub(crate) peers: usize,
}

impl PeersCase {
    /// What all numbers of peers have in common: `many-peers/to-one/read/4KiB`.
    pub(crate) fn group(&self) -> String {
        let Self { direction, operation, block_bytes, .. } = self;
        format!("many-peers/{direction}/{operation}/{}", Bytes(*block_bytes))
    }

    /// Memory of the hub; `None` when that is beyond counting.
    pub(crate) fn hub_bytes(&self) -> Option<usize> {
        self.block_bytes.checked_next_multiple_of(64)?.checked_mul(SLOTS * self.peers)
    }

    /// A stable name: `many-peers/to-one/read/4KiB/x16`.
    pub(crate) fn id(&self) -> String {
        format!("{}/x{}", self.group(), self.peers)
    }
}

#[derive(Debug, Args)]
pub(crate) struct PeersArgs {
    /// Numbers of peers, up to 256
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=256), default_value = "1,4,16", help_heading = "Cases")]
    pub(crate) peers: Vec<u16>,
    /// Who posts
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Direction::FromOne, Direction::ToOne], help_heading = "Cases")]
    pub(crate) direction: Vec<Direction>,
    /// Direction of the bytes, as those who post see it
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Operation::Read, Operation::Write], help_heading = "Cases")]
    pub(crate) operation: Vec<Operation>,
    /// Bytes of a transfer
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = parse_bytes, default_value = "4KiB", help_heading = "Cases")]
    pub(crate) sizes: Vec<usize>,

    #[command(flatten)]
    pub(crate) choice: BackendArgs,
    /// Transports that bare engines may use, e.g. tcp,local [default: tcp]
    #[arg(long, value_name = "TRANSPORTS", value_delimiter = ',', value_parser = parse_transport, help_heading = "System")]
    pub(crate) transport: Vec<String>,
    /// Processes that the peers are spread over, each with one application thread [default: one for each core but one]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "System")]
    pub(crate) processes: Option<u16>,
    /// Core of the hub: of a bare engine's lane [default: chosen from the affinity mask], or of the application's thread
    /// beside a backend [default: not pinned]
    #[arg(long, value_name = "CORE", help_heading = "System")]
    pub(crate) hub_core: Option<usize>,
    /// Core of all peers, likewise
    #[arg(long, value_name = "CORE", help_heading = "System")]
    pub(crate) peer_core: Option<usize>,

    /// Times that every case is run, in turn with all others
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000), help_heading = "Method")]
    pub(crate) rounds: u16,
    /// Time for one case in one round
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "1s", help_heading = "Method")]
    pub(crate) duration: Duration,
    /// Most memory per process
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "4GiB", help_heading = "Method")]
    pub(crate) max_memory: usize,
    /// Moves nothing and says that it did, to test the verification
    #[arg(long, hide = true)]
    pub(crate) sabotage: bool,

    /// Directory of results.json, report.html and the histograms (*.hgrm, *.hlog)
    #[arg(
        long,
        value_name = "DIR",
        default_value = "corelane-bench-results/many-peers",
        help_heading = "Output"
    )]
    pub(crate) out_dir: PathBuf,
    /// Where to write results.json instead
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(crate) json: Option<PathBuf>,
}

/// What is measured, with a column and lines of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// Engines without NIXL.
    Engines,
    /// Agents of NIXL with one backend.
    Agents(BackendSpec),
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Engines => f.write_str("corelane"),
            Self::Agents(spec) => spec.fmt(f),
        }
    }
}

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct PeersPlan {
    pub(crate) cases: Vec<PeersCase>,
    /// The one that ratios are about comes first.
    pub(crate) contenders: Vec<Contender>,
    /// Of bare engines.
    pub(crate) transports: Vec<String>,
    pub(crate) hub_core: Option<usize>,
    pub(crate) peer_core: Option<usize>,
    pub(crate) processes: usize,
}

impl PeersPlan {
    /// Whether agents of NIXL are measured.
    pub(crate) fn is_nixl(&self) -> bool {
        self.contenders != [Contender::Engines]
    }
}

impl PeersArgs {
    /// The plan that these options ask for on a machine with these cores, or what is wrong with them.
    pub(crate) fn plan(&self, allowed: &[usize]) -> Result<PeersPlan, String> {
        let contenders = self.contenders()?;
        let (mut hub_core, mut peer_core) = (self.hub_core, self.peer_core);
        let mut transports = self.transport.clone();
        if contenders == [Contender::Engines] {
            let (hub, peers) = pinning::default_cores(allowed);
            hub_core = hub_core.or(Some(hub));
            peer_core = peer_core.or(Some(peers));
            if transports.is_empty() {
                transports.push("tcp".to_owned());
            }
        }
        pinning::ensure_allowed(hub_core.as_slice(), allowed, "--hub-core")?;
        pinning::ensure_allowed(peer_core.as_slice(), allowed, "--peer-core")?;
        let mut counts: Vec<usize> = self.peers.iter().map(|&count| usize::from(count)).collect();
        counts.sort_unstable();
        let mut cases: Vec<PeersCase> = Vec::new();
        for &direction in &self.direction {
            for &operation in &self.operation {
                for &block_bytes in &self.sizes {
                    for &peers in &counts {
                        let case = PeersCase { direction, operation, block_bytes, peers };
                        if !cases.contains(&case) {
                            cases.push(case);
                        }
                    }
                }
            }
        }
        for case in &cases {
            if case.hub_bytes().is_none_or(|needed| needed > self.max_memory) {
                return Err(format!(
                    "{} needs more memory than --max-memory allows ({})",
                    case.id(),
                    Bytes(self.max_memory)
                ));
            }
        }
        let spare = allowed.len().saturating_sub(1).max(1);
        let processes = self.processes.map_or(spare, usize::from);
        Ok(PeersPlan { cases, contenders, transports, hub_core, peer_core, processes })
    }

    fn contenders(&self) -> Result<Vec<Contender>, String> {
        if !self.choice.names_one() {
            return match self.choice.detail() {
                None => Ok(vec![Contender::Engines]),
                Some(option) => Err(format!(
                    "{option} is for backends of NIXL: name one with --backend or --vs"
                )),
            };
        }
        if !self.transport.is_empty() {
            return Err(
                "--transport is for bare engines: give it to the backend, --backend CORELANE@transports=tcp"
                    .to_owned(),
            );
        }
        let contenders: Vec<Contender> =
            self.choice.backends().into_iter().map(Contender::Agents).collect();
        ensure_distinct(&contenders)?;
        self.choice.check_folders()?;
        Ok(contenders)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        peers: PeersArgs,
    }

    fn plan(words: &str) -> Result<PeersPlan, String> {
        let words = std::iter::once("many-peers").chain(words.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        line.peers.plan(&[0, 1, 2, 3])
    }

    #[test]
    fn cases_are_every_combination_once() {
        let given = "--peers 4,1,4 --direction to-one --operation write --sizes 64,1MiB";
        let ids: Vec<String> =
            plan(given).expect("a plan").cases.iter().map(PeersCase::id).collect();
        let group = "many-peers/to-one/write";
        assert_eq!(
            ids,
            ["64B/x1", "64B/x4", "1MiB/x1", "1MiB/x4"].map(|id| format!("{group}/{id}"))
        );
        assert_eq!(plan("").expect("a plan").cases.len(), 12);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (given, expected) in [
            ("--peers 0", "--peers"),
            ("--peers 257", "--peers"),
            ("--hub-core 9", "--hub-core"),
            ("--peer-core 9", "--peer-core"),
            ("--sizes 1GiB --peers 16", "--max-memory"),
            ("--transport pigeon", "pigeon"),
            ("--transport tcp --vs UCX", "--transport is for bare engines"),
            ("--prog-thread", "--prog-thread is for backends"),
            ("--param lanes=1", "--param is for backends"),
            ("--plugin-dir /", "--plugin-dir is for backends"),
            ("--vs CORELANE", "named twice"),
            ("--backend UCX --nixl-libs /nowhere/at/all", "--nixl-libs"),
            ("--processes 0", "--processes"),
        ] {
            let refused = plan(given).expect_err(given);
            assert!(refused.contains(expected), "{given}: {refused}");
        }
    }

    #[test]
    fn engines_are_measured_unless_a_backend_is_named() {
        let engines = plan("").expect("a plan");
        assert_eq!((engines.contenders, engines.hub_core), (vec![Contender::Engines], Some(1)));
        assert_eq!(engines.transports, ["tcp"]);
        let agents = plan("--vs UCX --vs UCX@UCX_TLS=tcp --peer-core 2").expect("a plan");
        let labels: Vec<String> = agents.contenders.iter().map(ToString::to_string).collect();
        assert_eq!(labels, ["CORELANE", "UCX", "UCX@UCX_TLS=tcp"]);
        assert_eq!((agents.hub_core, agents.peer_core), (None, Some(2)));
        assert!(agents.transports.is_empty());
    }

    #[test]
    fn processes_leave_the_hub_a_core() {
        assert_eq!(plan("").expect("a plan").processes, 3);
        assert_eq!(plan("--processes 7").expect("a plan").processes, 7);
    }
}
