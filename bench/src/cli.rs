//! Command line: what may be asked, with which defaults.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::case::{
    App, Backend, CaseOptions, MAX_LANES, MAX_NOTIFICATION, Memory, Operation, RunSpec, Sabotage,
    Scenario, TargetApp, cases,
};
use crate::coordinator::{Plan, duration_per_run};
use crate::engine_side::parse_transport;
use crate::load_options::LoadArgs;
use crate::measure::Stamp;
use crate::models::ModelArgs;
use crate::nixl::NixlArgs;
use crate::peers::PeersArgs;
use crate::pinning::{Cores, MaybeCore};
use crate::plot::PlotArgs;
use crate::posting::PostingArgs;
use crate::units::{parse_bytes, parse_duration, parse_rate, parse_shape};
use crate::vram;

/// Port of `server` and `client` when none is given.
pub(crate) const DEFAULT_PORT: u16 = 7471;

/// Measures corelane: latency and throughput between two processes, every operation's data verified.
#[derive(Debug, Parser)]
#[command(name = "corelane-bench", version, max_term_width = 110)]
#[command(after_help = "Examples:
  corelane-bench loopback                                  both sides on this host, all scenarios
  corelane-bench loopback --baseline raw-tcp --scenario sizes --sizes 64,4KiB
  corelane-bench loopback --baseline raw-cma,raw-memcpy    beside the bare copies of one host
  corelane-bench loopback --app lane --rate 20k            open loop, application on the lane
  corelane-bench server --listen 0.0.0.0:7471              on one host ...
  corelane-bench client --connect HOST:7471                ... and on another
  corelane-bench nixl --backend CORELANE --vs UCX@UCX_TLS=tcp --nixl-libs DIR
  corelane-bench many-peers --peers 1,4,16                 one engine with many peers
  corelane-bench many-peers --vs UCX                       the same through NIXL, beside its UCX
  corelane-bench plot before/results.json after/results.json

Exit codes: 0 measured and verified, 1 failed (also: verification failed), 2 bad options.
docs/benchmarks.md explains the method and every figure.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Ends this process when the one that started it does
    #[arg(long, global = true, hide = true)]
    pub(crate) parent_pid: Option<i32>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serves the target's side for clients on other hosts
    Server(ServerArgs),
    /// Measures against a server on another host
    Client(ClientArgs),
    /// Starts both sides on this host as pinned processes and measures between them
    Loopback(LoopbackArgs),
    /// Measures backends of NIXL side by side, through its C API
    Nixl(Box<NixlArgs>),
    /// Measures one engine with many peers, or agents of NIXL: what each gets, and what each costs
    ManyPeers(PeersArgs),
    /// Draws a report of result files, or compares several
    Plot(PlotArgs),
    /// Measures what posting RDMA requests costs, with a device that does nothing
    Posting(PostingArgs),
    /// A process of `nixl`: one side of a pair
    #[cfg(feature = "nixl")]
    #[command(hide = true)]
    NixlSide,
    /// A process of `many-peers`
    #[command(hide = true)]
    PeersSide,
    /// The client process of `loopback`
    #[command(hide = true)]
    Worker(WorkerArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ServerArgs {
    /// Address of the control connection; whoever reaches it can make this process use memory and CPU
    #[arg(long, value_name = "IP:PORT", default_value_t = SocketAddr::from(([127, 0, 0, 1], DEFAULT_PORT)))]
    pub(crate) listen: SocketAddr,
    /// Cores of the lanes [default: chosen from the affinity mask]
    #[arg(long, value_name = "CORES")]
    pub(crate) core: Option<Cores>,
    /// Most memory that a client may ask for
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "4GiB")]
    pub(crate) max_memory: usize,
    /// Ends after the first client
    #[arg(long)]
    pub(crate) once: bool,
    /// Prints the address as JSON
    #[arg(long, hide = true)]
    pub(crate) announce: bool,
}

#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    #[arg(long)]
    pub(crate) connect: String,
    #[arg(long)]
    pub(crate) core: Cores,
    #[arg(long)]
    pub(crate) caller_core: MaybeCore,
    #[arg(long)]
    pub(crate) max_memory: usize,
}

#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// Control address of a `corelane-bench server`
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) connect: String,
    /// Cores of the lanes [default: chosen from the affinity mask]
    #[arg(long, value_name = "CORES")]
    pub(crate) core: Option<Cores>,
    /// Core of the application's thread, or `none` for unpinned
    #[arg(long, value_name = "CORE", default_value = "none")]
    pub(crate) caller_core: MaybeCore,
    #[command(flatten)]
    pub(crate) measure: MeasureArgs,
}

#[derive(Debug, Args)]
pub(crate) struct LoopbackArgs {
    /// Lane cores of the servers, used in turn, e.g. 0,2-5 [default: chosen from the affinity mask]
    #[arg(long, value_name = "CORES")]
    pub(crate) server_cores: Option<Cores>,
    /// Lane cores of the clients, used in turn [default: chosen from the affinity mask]
    #[arg(long, value_name = "CORES")]
    pub(crate) client_cores: Option<Cores>,
    /// Core of the application's thread, or `none` for unpinned
    #[arg(long, value_name = "CORE", default_value = "none")]
    pub(crate) caller_core: MaybeCore,
    /// Engines, one per process, all active at once in pairs; an even number
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = parse_engines)]
    pub(crate) engines: usize,
    #[command(flatten)]
    pub(crate) measure: MeasureArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MeasureArgs {
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Scenario::Sizes, Scenario::Kv, Scenario::Notify, Scenario::Throughput], help_heading = "Cases")]
    pub(crate) scenario: Vec<Scenario>,
    /// Directions of sizes, kv and throughput
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Operation::Read, Operation::Write], help_heading = "Cases")]
    pub(crate) operation: Vec<Operation>,
    /// Sizes of scenario `sizes` [default: 64,256,1KiB,4KiB,16KiB,64KiB,256KiB,1MiB,4MiB,16MiB,64MiB]
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = parse_bytes, help_heading = "Cases")]
    pub(crate) sizes: Vec<usize>,
    /// Block lists of scenario `kv`, COUNTxSIZE [default: 256x16KiB,4096x4KiB]
    #[arg(long, value_name = "SHAPES", value_delimiter = ',', value_parser = parse_shape, help_heading = "Cases")]
    pub(crate) kv: Vec<(usize, usize)>,
    /// Bytes of a notification, at least 32
    #[arg(long, value_name = "SIZE", value_parser = parse_notification, default_value = "32", help_heading = "Cases")]
    pub(crate) notification: usize,
    /// Sizes of scenario `throughput` [default: 64KiB,1MiB]
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = parse_bytes, help_heading = "Cases")]
    pub(crate) throughput_sizes: Vec<usize>,
    /// Outstanding transfers of scenario `throughput`
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Cases")]
    pub(crate) window: u16,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,

    /// What moves the bytes
    #[arg(long, value_enum, default_value_t = Backend::Corelane, help_heading = "System")]
    pub(crate) backend: Backend,
    /// Transports that the engine may use, e.g. tcp
    #[arg(long, value_name = "TRANSPORTS", value_delimiter = ',', value_parser = parse_transport, default_value = "tcp", help_heading = "System")]
    pub(crate) transport: Vec<String>,
    /// RDMA devices that the engines use, e.g. mlx5_0:1 [default: those near the lanes]
    #[arg(long, value_name = "DEVICES", value_delimiter = ',', help_heading = "System")]
    pub(crate) rdma_devices: Vec<String>,
    /// RDMA devices of the server's engine, where they are others
    #[arg(long, value_name = "DEVICES", value_delimiter = ',', help_heading = "System")]
    pub(crate) server_rdma_devices: Vec<String>,
    /// Whose memory the engines transfer
    #[arg(long, value_enum, default_value_t = Memory::Registered, help_heading = "System")]
    pub(crate) memory: Memory,
    /// GPUs of the initiator and of the target with `--memory vram`, as INITIATOR or INITIATOR,TARGET
    #[arg(long, value_name = "GPUS", value_parser = parse_gpus, default_value = "0", help_heading = "System")]
    pub(crate) gpus: [u32; 2],
    /// Lanes of each engine
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_lanes, help_heading = "System")]
    pub(crate) lanes: usize,
    /// Also run these in interleaved rounds, and print the ratios to each
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "System")]
    pub(crate) baseline: Vec<Backend>,
    /// Where the initiator's application runs
    #[arg(long, value_enum, default_value_t = App::Thread, help_heading = "System")]
    pub(crate) app: App,
    /// What the target's application does while it is not needed
    #[arg(long, value_enum, default_value_t = TargetApp::Sleep, help_heading = "System")]
    pub(crate) target_app: TargetApp,
    /// How long idle lanes spin before they park: microseconds or `inf` [default: the engine's]
    #[arg(long, value_name = "US", value_parser = parse_spin, help_heading = "System")]
    pub(crate) spin: Option<String>,
    /// Run a CPU-bound thread beside each lane, on its core
    #[arg(long, help_heading = "System")]
    pub(crate) burn: bool,

    /// Times that every case is run, in turn with all others
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000), help_heading = "Method")]
    pub(crate) rounds: u16,
    /// Time for all runs together, shared out equally
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "60s", help_heading = "Method")]
    pub(crate) budget: Duration,
    /// Time for one case on one backend in one round, instead of a share of --budget
    #[arg(long, value_name = "TIME", value_parser = parse_duration, help_heading = "Method")]
    pub(crate) duration: Option<Duration>,
    /// Open loop: operations per second and pair, latency counted from the intended start [default: closed loop]
    #[arg(long, value_name = "OPS", value_parser = parse_rate, help_heading = "Method")]
    pub(crate) rate: Option<f64>,
    /// Order of the scattered blocks
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Method")]
    pub(crate) seed: u64,
    /// A few seconds for a first look: fewer sizes and rounds
    #[arg(long, help_heading = "Method")]
    pub(crate) quick: bool,
    /// Most memory per process
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "4GiB", help_heading = "Method")]
    pub(crate) max_memory: usize,
    /// Breaks the engine on purpose, to test the verification
    #[arg(long, value_enum, hide = true)]
    pub(crate) sabotage: Option<Sabotage>,

    /// Directory of results.json, report.html and the histograms (*.hgrm, *.hlog)
    #[arg(
        long,
        value_name = "DIR",
        default_value = "corelane-bench-results",
        help_heading = "Output"
    )]
    pub(crate) out_dir: PathBuf,
    /// Where to write results.json instead
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(crate) json: Option<PathBuf>,
}

fn parse_engines(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(engines @ 2..=256) if engines % 2 == 0 => Ok(engines),
        _ => Err("engines come in pairs: an even number from 2 to 256".to_owned()),
    }
}

fn parse_lanes(text: &str) -> Result<usize, String> {
    let lanes = text.parse().ok().filter(|lanes| (1..=MAX_LANES).contains(lanes));
    lanes.ok_or_else(|| format!("expected a number from 1 to {MAX_LANES}"))
}

fn parse_notification(text: &str) -> Result<usize, String> {
    let bytes = parse_bytes(text)?;
    if (Stamp::LEN..=MAX_NOTIFICATION).contains(&bytes) {
        return Ok(bytes);
    }
    Err(format!("must be between {} and {MAX_NOTIFICATION} bytes", Stamp::LEN))
}

pub(crate) fn parse_gpus(text: &str) -> Result<[u32; 2], String> {
    let (initiator, target) = text.split_once(',').unwrap_or((text, text));
    let gpu = |text: &str| text.trim().parse().map_err(|_| format!("'{text}' is no GPU's number"));
    Ok([gpu(initiator)?, gpu(target)?])
}

fn parse_spin(text: &str) -> Result<String, String> {
    match text.parse::<u32>() {
        Ok(us) if us <= 10_000_000 => Ok(text.to_owned()),
        _ if text == "inf" => Ok(text.to_owned()),
        _ => Err("expected microseconds (0 parks at once) or 'inf'".to_owned()),
    }
}

const SIZES: [usize; 11] = [
    64,
    256,
    1 << 10,
    4 << 10,
    16 << 10,
    64 << 10,
    256 << 10,
    1 << 20,
    4 << 20,
    16 << 20,
    64 << 20,
];
const QUICK_SIZES: [usize; 3] = [64, 4 << 10, 1 << 20];

impl MeasureArgs {
    /// The plan that these options ask for, or what is wrong with them.
    pub(crate) fn plan(&self) -> Result<Plan, String> {
        fn or<T: Clone>(given: &[T], default: &[T]) -> Vec<T> {
            if given.is_empty() { default.to_vec() } else { given.to_vec() }
        }
        let cases = cases(&CaseOptions {
            scenarios: self.scenario.clone(),
            operations: self.operation.clone(),
            sizes: or(&self.sizes, if self.quick { &QUICK_SIZES } else { &SIZES }),
            shapes: match &self.model.shapes()[..] {
                [] => or(&self.kv, &[(256, 16 << 10), (4096, 4 << 10)]),
                models => [&self.kv[..], models].concat(),
            },
            notification_bytes: self.notification,
            throughput_sizes: or(
                &self.throughput_sizes,
                if self.quick { &[64 << 10] } else { &[64 << 10, 1 << 20] },
            ),
            window: usize::from(self.window),
            decode_bytes: self.load.decode_bytes,
            load: self.load.shape(),
        });
        let Some(first) = cases.first() else {
            return Err("nothing to measure: no --scenario, or no size".to_owned());
        };
        if self.baseline.contains(&self.backend) {
            return Err(format!(
                "--baseline {} compares it with itself: choose another --backend",
                self.backend
            ));
        }
        if let Some(twice) = repeated(&self.baseline) {
            return Err(format!("--baseline names {twice} twice"));
        }
        if let Some(twice) = repeated(&self.transport) {
            return Err(format!("--transport names {twice} twice"));
        }
        let rounds = if self.quick { 2 } else { usize::from(self.rounds) };
        let budget = if self.quick { Duration::from_secs(3) } else { self.budget };
        let backends = 1 + self.baseline.len();
        let duration = self
            .duration
            .unwrap_or_else(|| duration_per_run(budget, cases.len(), rounds, backends));
        let template = RunSpec {
            case: first.clone(),
            backend: self.backend,
            run: 0,
            duration,
            min_ops: 3,
            rate: self.rate,
            seed: self.seed,
            app: self.app,
            target_app: self.target_app,
            transports: self.transport.clone(),
            rdma_devices: self.rdma_devices.clone(),
            server_rdma_devices: match &self.server_rdma_devices[..] {
                [] => self.rdma_devices.clone(),
                devices => devices.to_vec(),
            },
            memory: self.memory,
            gpus: self.gpus,
            lanes: self.lanes,
            spin: self.spin.clone(),
            burn: self.burn,
            sabotage: self.sabotage,
        };
        // A baseline may scatter its blocks, and so need more memory, where the candidate does not.
        for &backend in std::iter::once(&self.backend).chain(&self.baseline) {
            for case in &cases {
                if case.load.is_some() && backend != self.backend {
                    continue;
                }
                let spec = RunSpec { case: case.clone(), backend, ..template.clone() };
                spec.validate(self.max_memory)?;
            }
        }
        if self.memory == Memory::Vram {
            vram::ensure_gpu(self.gpus[0]).map_err(|error| format!("{error:#}"))?;
        }
        let phase_duration = self.load.phase_duration()?;
        let baselines = self.baseline.clone();
        Ok(Plan { cases, rounds, baselines, phase_duration, template })
    }
}

fn repeated<T: PartialEq>(values: &[T]) -> Option<&T> {
    values
        .iter()
        .enumerate()
        .find(|(at, value)| values[..*at].contains(value))
        .map(|(_, value)| value)
}

/// One line instead of clap's paragraph: what is wrong, and what would be right if clap knows it.
pub(crate) fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut parts: Vec<&str> = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        if !line.is_empty() {
            parts.push(line);
        }
    }
    let text = parts.join(" ");
    format!("corelane-bench: {} (see --help)", text.strip_prefix("error: ").unwrap_or(&text))
}

#[cfg(test)]
mod tests;
