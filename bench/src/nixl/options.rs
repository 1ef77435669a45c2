//! Command line of `nixl`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::backend::Contender;
use super::case::{NixlCase, NixlCaseOptions, NixlScenario, cases};
use super::choice::{BackendArgs, ensure_distinct};
use super::fault::{self, FaultKind};
use super::nixlbench::{Memories, NixlbenchArgs, SegmentType};
use super::trace::{self, TraceArgs};
use super::wire::Iterations;
use crate::case::{MAX_NOTIFICATION, Operation, Sabotage};
use crate::cli::parse_gpus;
use crate::load_options::LoadArgs;
use crate::models::ModelArgs;
use crate::pinning::lane_order;
use crate::raw_local::RawKind;
use crate::units::{Bytes, parse_bytes, parse_duration, parse_shape};
use crate::vram;

/// What the target's application does while no notification has to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NixlTargetApp {
    /// Polls for notifications without pausing
    Poll,
    /// Sleeps 1 ms between polls, where the backend is known to serve alone (CORELANE)
    Sleep,
    /// Sleeps 1 ms between polls whatever the backend
    SleepAll,
}

impl NixlTargetApp {
    /// Whether the application of a target of `backend` sleeps. Nobody is needed there for bare copies.
    pub(crate) fn sleeps(self, backend: &Contender) -> bool {
        match (self, backend) {
            (_, Contender::Raw(_)) | (Self::SleepAll, _) => true,
            (Self::Poll, _) => false,
            (Self::Sleep, Contender::Nixl(spec)) => spec.serves_alone(),
        }
    }
}

/// Direction of transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Directions {
    /// The initiator reads from the target
    Read,
    /// The initiator writes into the target
    Write,
    /// One after the other
    Both,
}

impl Directions {
    fn operations(self) -> Vec<Operation> {
        match self {
            Self::Read => vec![Operation::Read],
            Self::Write => vec![Operation::Write],
            Self::Both => vec![Operation::Read, Operation::Write],
        }
    }
}

/// Cores of the two application threads, written `initiator=0,target=1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pin {
    pub(crate) initiator: Option<usize>,
    pub(crate) target: Option<usize>,
}

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pin = Self::default();
        if text == "none" {
            return Ok(pin);
        }
        for part in text.split(',') {
            let expected = || "expected initiator=CORE,target=CORE or none".to_owned();
            let (role, core) = part.split_once('=').ok_or_else(expected)?;
            let place = match role.trim() {
                "initiator" => &mut pin.initiator,
                "target" => &mut pin.target,
                _ => return Err(expected()),
            };
            let core = core.trim().parse().map_err(|_| format!("'{core}' is not a core number"))?;
            if place.replace(core).is_some() {
                return Err(format!("names the {} twice", role.trim()));
            }
        }
        Ok(pin)
    }
}

#[derive(Debug, Args)]
pub(crate) struct NixlArgs {
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [NixlScenario::All], help_heading = "Cases")]
    pub(crate) scenario: Vec<NixlScenario>,
    /// Direction of the transfers
    #[arg(long, value_enum, ignore_case = true, default_value = "both", aliases = ["operation", "op_type"], help_heading = "Cases")]
    pub(crate) op: Directions,
    /// Sizes of scenario `sizes` [default: 64,4KiB,64KiB,1MiB]
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = parse_bytes, help_heading = "Cases")]
    pub(crate) sizes: Vec<usize>,
    /// Block lists of scenario `kv`, COUNTxSIZE [default: 256x16KiB,4096x4KiB]
    #[arg(long, value_name = "SHAPES", value_delimiter = ',', value_parser = parse_shape, help_heading = "Cases")]
    pub(crate) kv: Vec<(usize, usize)>,
    /// Bytes of a notification, at least 16
    #[arg(long, value_name = "SIZE", value_parser = parse_notification, default_value = "16", help_heading = "Cases")]
    pub(crate) notification: usize,

    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) trace: TraceArgs,
    #[command(flatten)]
    pub(crate) nixlbench: NixlbenchArgs,
    /// What happens to the target in scenario `fault`
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [FaultKind::Kill, FaultKind::Stop], help_heading = "Cases")]
    pub(crate) fault: Vec<FaultKind>,
    /// When it happens, from the first read on
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "200ms", help_heading = "Cases")]
    pub(crate) fault_at: Duration,
    /// How long its being noticed is waited for
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "5s", help_heading = "Cases")]
    pub(crate) fault_timeout: Duration,

    #[command(flatten)]
    pub(crate) choice: BackendArgs,
    /// Also run these in the same rounds: bare copies between two processes, without NIXL
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "System")]
    pub(crate) baseline: Vec<RawKind>,
    /// GPUs of the initiator and of the target where their memory is VRAM, as INITIATOR or INITIATOR,TARGET
    #[arg(long, value_name = "GPUS", value_parser = parse_gpus, default_value = "0", help_heading = "System")]
    pub(crate) gpus: [u32; 2],
    /// What the target's application does while no notification has to be answered
    #[arg(long, value_enum, default_value_t = NixlTargetApp::Poll, help_heading = "System")]
    pub(crate) target_app: NixlTargetApp,
    /// Cores of the two application threads: initiator=CORE,target=CORE, or `none`
    #[arg(long, value_name = "CORES", default_value = "none", help_heading = "System")]
    pub(crate) pin: Pin,

    /// Times that every case is run, each in new processes, in turn with the other backends
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000), help_heading = "Method")]
    pub(crate) rounds: u16,
    /// Time for one case on one backend in one round
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "400ms", help_heading = "Method")]
    pub(crate) duration: Duration,
    /// Order of the scattered blocks
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Method")]
    pub(crate) seed: u64,
    /// Most memory per process
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "4GiB", help_heading = "Method")]
    pub(crate) max_memory: usize,
    /// Breaks the initiator on purpose, to test the verification
    #[arg(long, value_parser = parse_sabotage, hide = true)]
    pub(crate) sabotage: Option<Sabotage>,

    /// Directory of results.json, report.html and the histograms (*.hgrm, *.hlog)
    #[arg(
        long,
        value_name = "DIR",
        default_value = "corelane-bench-results/nixl",
        help_heading = "Output"
    )]
    pub(crate) out_dir: PathBuf,
    /// Where to write results.json instead
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(crate) json: Option<PathBuf>,
}

fn parse_notification(text: &str) -> Result<usize, String> {
    let bytes = parse_bytes(text)?;
    if (16..=MAX_NOTIFICATION).contains(&bytes) {
        return Ok(bytes);
    }
    Err(format!("must be between 16 and {MAX_NOTIFICATION} bytes"))
}

/// What is checked here is what a place holds after the last transfer, so that one of many that moves nothing is not seen.
fn parse_sabotage(text: &str) -> Result<Sabotage, String> {
    match Sabotage::from_str(text, false)? {
        Sabotage::Rare => Err("is for `loopback`".to_owned()),
        mode => Ok(mode),
    }
}

/// What is to be done, checked.
#[derive(Clone, Debug)]
pub(crate) struct NixlPlan {
    pub(crate) cases: Vec<NixlCase>,
    pub(crate) faults: Vec<FaultKind>,
    /// The one that ratios are about comes first.
    pub(crate) backends: Vec<Contender>,
    /// Memory that the largest case needs on either side.
    pub(crate) arena_bytes: usize,
    /// Of the initiator's threads where there are several; chosen when the affinity mask is known.
    pub(crate) thread_cores: Vec<usize>,
}

impl NixlPlan {
    /// Memory of both processes together, and of the one that has more; that of GPUs is not counted.
    pub(crate) fn memory_bytes(&self, gpus: [Option<u32>; 2]) -> (usize, usize) {
        let sides = gpus.iter().filter(|gpu| gpu.is_none()).count();
        let most = if sides > 0 { self.arena_bytes } else { 0 };
        (self.arena_bytes.saturating_mul(sides), most)
    }
}

impl NixlArgs {
    /// The plan that these options ask for, or what is wrong with them.
    pub(crate) fn plan(&self) -> Result<NixlPlan, String> {
        let sweep = self.nixlbench.sweep()?;
        let shapes = match (&self.kv[..], &self.model.shapes()[..]) {
            ([], []) => vec![(256, 16 << 10), (4096, 4 << 10)],
            (given, models) => [given, models].concat(),
        };
        if sweep.is_some() {
            self.ensure_only_a_sweep()?;
        }
        let others = |it: &NixlScenario| !matches!(it, NixlScenario::Sizes | NixlScenario::Kv);
        if self.threads() > 1 && sweep.is_none() && self.scenario.iter().any(others) {
            return Err(format!(
                "--num_threads {} is for --scenario sizes,kv and for sweeps: others have one caller",
                self.threads()
            ));
        }
        if self.threads() > 1 && !self.baseline.is_empty() {
            return Err("--num_threads: a --baseline has one thread".to_owned());
        }
        // A sweep as nixlbench makes it is all that is asked for.
        let (scenarios, sizes, shapes) = match sweep {
            None => {
                let usual = [64, 4 << 10, 64 << 10, 1 << 20];
                let sizes = if self.sizes.is_empty() { &usual } else { &self.sizes[..] };
                (self.scenario.clone(), sizes.to_vec(), shapes)
            }
            Some(shapes) => {
                let (one, many): (Vec<_>, Vec<_>) =
                    shapes.into_iter().partition(|&(blocks, _)| blocks == 1);
                let sizes = one.into_iter().map(|(_, bytes)| bytes).collect();
                (vec![NixlScenario::Sizes, NixlScenario::Kv], sizes, many)
            }
        };
        let mut cases = cases(&NixlCaseOptions {
            scenarios,
            operations: self.op.operations(),
            sizes,
            shapes,
            notification_bytes: self.notification,
            decode_bytes: self.load.decode_bytes,
            load: self.load.shape(),
            threads: self.threads(),
        });
        cases.extend(self.trace_case()?);
        let faults = if self.scenario.contains(&NixlScenario::Fault) {
            self.fault.clone()
        } else {
            Vec::new()
        };
        if cases.is_empty() && faults.is_empty() {
            return Err("nothing to measure: no --scenario, or no size".to_owned());
        }
        let mut arena = fault::case().arena_bytes().unwrap_or(0);
        for case in &cases {
            match case.arena_bytes() {
                Some(bytes) if bytes <= self.max_memory => arena = arena.max(bytes),
                _ => {
                    return Err(format!(
                        "{} needs more memory than --max-memory allows ({})",
                        case.id(),
                        Bytes(self.max_memory)
                    ));
                }
            }
        }
        self.load.phase_duration()?;
        let mut backends: Vec<Contender> =
            self.choice.backends().into_iter().map(Contender::Nixl).collect();
        backends.extend(self.baseline.iter().copied().map(Contender::Raw));
        self.check_memory()?;
        ensure_distinct(&backends)?;
        self.choice.check_folders()?;
        Ok(NixlPlan { cases, faults, backends, arena_bytes: arena, thread_cores: Vec::new() })
    }

    /// A sweep says all that is to be measured: what names something else would be left out.
    fn ensure_only_a_sweep(&self) -> Result<(), String> {
        use NixlScenario::{All, Kv, Sizes};
        let given = [
            (self.scenario.iter().any(|it| ![All, Kv, Sizes].contains(it)), "--scenario"),
            (!self.sizes.is_empty(), "--sizes"),
            (!self.kv.is_empty(), "--kv"),
            (!self.model.shapes().is_empty(), "--model"),
        ];
        given.into_iter().find(|(given, _)| *given).map_or(Ok(()), |(_, option)| {
            Err(format!(
                "{option} beside a sweep (--start_block_size and its like), which is all that is measured: leave one of them out"
            ))
        })
    }

    /// The GPU of each side, initiator first, where its memory is one's.
    pub(crate) fn vram(&self) -> [Option<u32>; 2] {
        let Memories { initiator, target, gpus } = self.memories();
        let of = |kind: SegmentType, gpu| (kind == SegmentType::Vram).then_some(gpu);
        [of(initiator, gpus[0]), of(target, gpus[1])]
    }

    /// The memory of both sides.
    pub(crate) fn memories(&self) -> Memories {
        let NixlbenchArgs { initiator_seg_type, target_seg_type, .. } = self.nixlbench;
        Memories { initiator: initiator_seg_type, target: target_seg_type, gpus: self.gpus }
    }

    fn check_memory(&self) -> Result<(), String> {
        let sides = self.vram();
        let on_gpus = sides.iter().flatten().count();
        let misfit = |kind: &&RawKind| on_gpus != if **kind == RawKind::RawGpu { 2 } else { 0 };
        if let Some(kind) = self.baseline.iter().find(misfit) {
            return Err(format!(
                "--baseline {kind}: raw-gpu is for VRAM on both sides, all others for DRAM on both"
            ));
        }
        let missing = sides.iter().flatten().find_map(|&gpu| vram::ensure_gpu(gpu).err());
        missing.map_or(Ok(()), |error| Err(format!("{error:#}")))
    }

    /// The case of a recording, where scenario `trace` is asked for.
    fn trace_case(&self) -> Result<Option<NixlCase>, String> {
        match (&self.trace.trace, self.scenario.contains(&NixlScenario::Trace)) {
            (None, false) => Ok(None),
            (None, true) => Err("--scenario trace needs a recording: --trace FILE".to_owned()),
            (Some(_), false) => Err("--trace is for --scenario trace".to_owned()),
            (Some(path), true) => {
                let trace = trace::read(path, &self.trace, &self.model)?;
                Ok(Some(NixlCase {
                    scenario: NixlScenario::Trace,
                    operation: Operation::Read,
                    blocks: trace.most_blocks(),
                    block_bytes: trace.block_bytes,
                    notification_bytes: 0,
                    load: None,
                    trace: Some(trace),
                    threads: 1,
                }))
            }
        }
    }

    /// Threads of the initiator that post and poll.
    pub(crate) fn threads(&self) -> usize {
        usize::from(self.nixlbench.num_threads)
    }

    /// The core of each of them where there are several: those of the mask in turn, beginning with the one that `--pin` gives the
    /// initiator, and with the one that it gives the target at the end.
    pub(crate) fn thread_cores(&self, allowed: &[usize]) -> Vec<usize> {
        if self.threads() < 2 {
            return Vec::new();
        }
        let second = |core: &usize| Some(*core) == self.pin.target;
        let first = allowed.iter().copied().find(|core| !second(core)).or(allowed.first().copied());
        let Some(first) = self.pin.initiator.or(first) else { return Vec::new() };
        let order = lane_order(allowed, first, self.pin.target.unwrap_or(first), false);
        order.into_iter().cycle().take(self.threads()).collect()
    }

    /// Transfers of a pass where their number was given.
    pub(crate) fn iterations(&self) -> Iterations {
        let NixlbenchArgs { num_iter, warmup_iter, .. } = self.nixlbench;
        Iterations { timed: num_iter, warm: warmup_iter }
    }

    /// Time for a case on one backend in one round; of a load, for each of its phases.
    pub(crate) fn duration_of(&self, case: &NixlCase) -> Duration {
        match &case.trace {
            Some(trace) => trace.duration().max(Duration::from_millis(1)),
            None if case.load.is_some() => self.load.phase_duration,
            None => self.duration,
        }
    }

    /// Environment of a backend's processes, on top of ours.
    pub(crate) fn environment(&self, backend: &Contender) -> Vec<(String, String)> {
        match backend {
            Contender::Nixl(spec) => self.choice.environment(spec),
            Contender::Raw(_) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
