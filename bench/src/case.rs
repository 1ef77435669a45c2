//! What is measured: cases (one shape of one operation) and runs (one case, one backend, one round).

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::measure::{LoadShape, READ_SLOTS};
use crate::raw_local::RawKind;
use crate::units::Bytes;

/// Groups of cases, as `--scenario` names them.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scenario {
    /// One-sided latency by size
    Sizes,
    /// Scattered KV-cache blocks, many in one transfer
    Kv,
    /// Notifications, free-standing and behind a write
    Notify,
    /// A window of outstanding transfers
    Throughput,
    /// Small reads at a rate, alone and beside back-to-back large writes from the same caller
    DecodeUnderPrefill,
}

/// What one operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Operation {
    /// One-sided read from the target's memory
    Read,
    /// One-sided write into the target's memory
    Write,
    /// A notification that the target's application answers with one
    #[value(skip)]
    Notify,
    /// A write with a notification bound to it, answered by the target's application
    #[value(skip)]
    WriteNotify,
}

impl Operation {
    /// Whether the target's application takes part.
    pub(crate) fn notifies(self) -> bool {
        matches!(self, Self::Notify | Self::WriteNotify)
    }

    /// Whether blocks are moved.
    pub(crate) fn moves_data(self) -> bool {
        self != Self::Notify
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Notify => "notify",
            Self::WriteNotify => "write+notify",
        })
    }
}

/// Who moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Backend {
    /// The engine
    Corelane,
    /// A bare pair of TCP sockets, polled without yielding: the floor of this kernel
    RawTcp,
    /// Bare `process_vm_readv` and `process_vm_writev` within one host: the floor of the kernel's copies
    RawCma,
    /// Bare memcpy in memory that both processes map: the floor of this machine
    RawMemcpy,
    /// Bare `cuMemcpyAsync` between memory of GPUs, a call a block: the floor of the driver
    RawGpu,
}

impl Backend {
    /// The way in which a baseline of one host copies; `None` for what goes through sockets or the engine.
    pub(crate) fn local_kind(self) -> Option<RawKind> {
        match self {
            Self::Corelane | Self::RawTcp => None,
            Self::RawCma => Some(RawKind::RawCma),
            Self::RawMemcpy => Some(RawKind::RawMemcpy),
            Self::RawGpu => Some(RawKind::RawGpu),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Corelane => "corelane",
            Self::RawTcp => "raw-tcp",
            Self::RawCma => "raw-cma",
            Self::RawMemcpy => "raw-memcpy",
            Self::RawGpu => "raw-gpu",
        })
    }
}

/// Where the application runs that posts and polls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum App {
    /// As an async task on the lane
    Lane,
    /// On a thread of its own that polls without yielding
    Thread,
}

/// Whose memory the engines transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Memory {
    /// The application's own, registered
    Registered,
    /// Allocated by the engine, so that a peer on the same host can map it
    Engine,
    /// Of GPUs, see --gpus
    Vram,
}

/// What the target's application does while it is not needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TargetApp {
    /// Sleeps: the target's lane serves alone
    Sleep,
    /// Polls for notifications in a loop, without yielding
    Poll,
    /// Waits for notifications, asleep: each has to wake it, and its lane if that has parked
    Wait,
}

/// A deliberately broken engine: proves that the verification can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Sabotage {
    /// Completes every transfer without moving a byte
    Noop,
    /// Moves bytes in the first pass only
    Stale,
    /// Completes one operation in fifty without moving a byte
    Rare,
}

/// One shape of one operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    pub(crate) scenario: Scenario,
    pub(crate) operation: Operation,
    /// Blocks per operation; 0 where no data moves.
    pub(crate) blocks: usize,
    pub(crate) block_bytes: usize,
    /// Operations outstanding at a time.
    pub(crate) window: usize,
    /// Bytes of each notification; 0 where none is sent.
    pub(crate) notification_bytes: usize,
    /// Scenario `decode-under-prefill`: how many of these operations, and what runs beside them.
    pub(crate) load: Option<LoadShape>,
}

/// Memory that the slots of a case may cover together: small enough to stay in a private cache, so that rotating
/// through slots (which lets every operation be verified) does not turn a latency test into one of memory.
const SLOT_MEMORY: usize = 1 << 20;
/// Enough operations for a pass to be long beside what a pause disturbs: a lane changes its way of waiting within the
/// first milliseconds of load, and a percentile must not be about those only.
const MAX_SLOTS: usize = 1024;
/// From here on an operation is long beside any disturbance, and verifying it is too.
const LARGE: usize = 512 << 10;
/// Up to here every operation is verified.
const VERIFY_ALL: usize = 4 << 10;
/// Operations without verification behind a verified pass, for sizes whose slots alone make no long pass.
const PLAIN_OPERATIONS: u64 = 256;

impl Case {
    /// A stable name: `read/64B`, `kv/read/4096x4KiB`, `notify/32B`, `throughput/write/64KiB/w16`.
    pub(crate) fn id(&self) -> String {
        let Self { operation, blocks, window, .. } = self;
        let size = Bytes(self.block_bytes);
        match self.scenario {
            Scenario::Sizes => format!("{operation}/{size}"),
            Scenario::Kv => format!("kv/{operation}/{blocks}x{size}"),
            Scenario::Notify if self.operation.moves_data() => format!("{operation}/{size}"),
            Scenario::Notify => format!("{operation}/{}", Bytes(self.notification_bytes)),
            Scenario::Throughput => format!("throughput/{operation}/{size}/w{window}"),
            Scenario::DecodeUnderPrefill => crate::nixl::load_id(size, self.load),
        }
    }

    /// Payload of one operation, without notifications.
    pub(crate) fn bytes(&self) -> usize {
        self.blocks * self.block_bytes
    }

    /// Distinct places that operations rotate through; each can be verified on its own.
    pub(crate) fn slots(&self) -> usize {
        if !self.operation.moves_data() {
            return MAX_SLOTS;
        }
        if self.load.is_some() {
            return READ_SLOTS;
        }
        (SLOT_MEMORY / self.bytes().max(1)).clamp(1, MAX_SLOTS).max(self.window)
    }

    /// Operations between two verified passes: none where verifying everything is cheap next to the operations.
    pub(crate) fn plain_ops_per_pass(&self) -> u64 {
        let slots = self.slots() as u64;
        let bytes = self.bytes();
        if self.load.is_some() {
            return 0;
        }
        if self.scenario == Scenario::Throughput {
            // Long, because a window that fills and drains is not yet throughput.
            slots * 64
        } else if bytes <= VERIFY_ALL {
            0
        } else if bytes < LARGE {
            PLAIN_OPERATIONS
        } else {
            slots * 3
        }
    }
}

/// One case on one backend in one round: all that both processes need to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunSpec {
    pub(crate) case: Case,
    pub(crate) backend: Backend,
    /// Distinguishes the contents of this run from those of every other.
    pub(crate) run: u32,
    pub(crate) duration: Duration,
    /// Operations to do even when the duration is over.
    pub(crate) min_ops: u64,
    /// Operations per second of an open loop; `None` for a closed loop.
    pub(crate) rate: Option<f64>,
    /// Shuffles the scattered blocks; equal seeds give equal layouts.
    pub(crate) seed: u64,
    pub(crate) app: App,
    pub(crate) target_app: TargetApp,
    /// Transports of the engines, by name.
    pub(crate) transports: Vec<String>,
    /// RDMA devices of the initiator's and of the target's engine; none: those that it finds.
    pub(crate) rdma_devices: Vec<String>,
    pub(crate) server_rdma_devices: Vec<String>,
    pub(crate) memory: Memory,
    /// The initiator's and the target's, where memory of GPUs is moved.
    pub(crate) gpus: [u32; 2],
    /// Lanes of each engine.
    pub(crate) lanes: usize,
    /// Idle policy of the lanes, in the engine's notation: microseconds or `inf`.
    pub(crate) spin: Option<String>,
    /// Runs a CPU-bound thread beside each lane, on its core.
    pub(crate) burn: bool,
    pub(crate) sabotage: Option<Sabotage>,
}

/// Bytes and counts beyond which a run is refused, whoever asks for it.
const MAX_BLOCKS: usize = 1_000_000;
const MAX_WINDOW: usize = 4096;
pub(crate) const MAX_LANES: usize = 256;
/// The longest notification that is measured.
pub(crate) const MAX_NOTIFICATION: usize = 64 << 10;

impl RunSpec {
    /// Refuses runs whose memory would exceed `max_memory` on one side, or whose numbers make no sense. A server must
    /// not trust the run that a client sends it.
    pub(crate) fn validate(&self, max_memory: usize) -> Result<(), String> {
        let case = &self.case;
        if case.window == 0 || case.window > MAX_WINDOW {
            return Err(format!("a window of {} (1 to {MAX_WINDOW})", case.window));
        }
        if case.notification_bytes > MAX_NOTIFICATION {
            return Err(format!(
                "notifications of {} bytes (at most {MAX_NOTIFICATION})",
                case.notification_bytes
            ));
        }
        if case.blocks > MAX_BLOCKS
            || case.operation.moves_data() != (case.blocks > 0 && case.block_bytes > 0)
        {
            return Err(format!("{} blocks of {} bytes", case.blocks, case.block_bytes));
        }
        if case.load.is_some() && (self.backend != Backend::Corelane || case.blocks != 1) {
            return Err(format!(
                "{} cannot run scenario decode-under-prefill, which has two transfers under way at a time",
                self.backend
            ));
        }
        let on_gpus = match self.backend {
            Backend::Corelane => self.memory == Memory::Vram,
            backend => backend == Backend::RawGpu,
        };
        if on_gpus != (self.memory == Memory::Vram) {
            return Err(format!(
                "{} and --memory vram: beside memory of GPUs there is the baseline raw-gpu, which is for such memory only",
                self.backend
            ));
        }
        if self.lanes == 0 || self.lanes > MAX_LANES {
            return Err(format!("{} lanes (1 to {MAX_LANES})", self.lanes));
        }
        if self.rate.is_some_and(|rate| !(rate > 0.0 && rate < 1e9)) {
            return Err("a rate that is no rate".to_owned());
        }
        match self.memory_bytes() {
            Some(needed) if needed <= max_memory => Ok(()),
            _ => Err(format!(
                "{} needs more memory than --max-memory allows ({})",
                case.id(),
                Bytes(max_memory)
            )),
        }
    }

    /// Memory that it takes on either side; `None` when that is beyond counting.
    pub(crate) fn memory_bytes(&self) -> Option<usize> {
        let case = &self.case;
        // Twice for the pool of scattered blocks, once more for rounding to cache lines and the warm-up page.
        let stride = case.block_bytes.checked_next_multiple_of(64)?;
        let bytes = stride.checked_mul(case.blocks)?;
        bytes
            .checked_mul(case.slots() * if self.scattered() { 2 } else { 1 })?
            .checked_add(case.load.map_or(0, |load| load.bulk_bytes))
    }

    /// Content tag of a pass, never the same for two passes of one invocation.
    pub(crate) fn sequence(&self, pass: u32) -> u64 {
        (u64::from(self.run) << 32) | (u64::from(pass) + 1)
    }

    /// Whether the target's memory, and with engine memory both sides', is another kind than the anonymous mapping that
    /// a process keeps from case to case.
    pub(crate) fn needs_other_memory(&self) -> bool {
        match self.backend {
            Backend::Corelane => self.memory != Memory::Registered,
            Backend::RawMemcpy | Backend::RawGpu => true,
            Backend::RawTcp | Backend::RawCma => false,
        }
    }

    /// Whether blocks are scattered on both sides; raw TCP moves as many bytes in one piece.
    pub(crate) fn scattered(&self) -> bool {
        self.backend != Backend::RawTcp && self.case.blocks > 1
    }
}

/// Which cases to run, as the options say.
#[derive(Clone, Debug)]
pub(crate) struct CaseOptions {
    pub(crate) scenarios: Vec<Scenario>,
    pub(crate) operations: Vec<Operation>,
    pub(crate) sizes: Vec<usize>,
    pub(crate) shapes: Vec<(usize, usize)>,
    pub(crate) notification_bytes: usize,
    pub(crate) throughput_sizes: Vec<usize>,
    pub(crate) window: usize,
    /// Bytes of the reads of scenario `decode-under-prefill`, and what runs beside them.
    pub(crate) decode_bytes: usize,
    pub(crate) load: LoadShape,
}

/// All cases of an invocation, in the order in which they run and are printed.
pub(crate) fn cases(options: &CaseOptions) -> Vec<Case> {
    let mut scenarios = options.scenarios.clone();
    scenarios.sort_unstable();
    scenarios.dedup();
    let mut cases = Vec::new();
    for scenario in scenarios {
        let load = (scenario == Scenario::DecodeUnderPrefill).then_some(options.load);
        let mut add = |operation, blocks, block_bytes, window, notification_bytes| {
            let case =
                Case { scenario, operation, blocks, block_bytes, window, notification_bytes, load };
            if !cases.contains(&case) {
                cases.push(case);
            }
        };
        match scenario {
            Scenario::Notify => {
                add(Operation::Notify, 0, 0, 1, options.notification_bytes);
                add(Operation::WriteNotify, 1, 4096, 1, options.notification_bytes);
            }
            Scenario::DecodeUnderPrefill => add(Operation::Read, 1, options.decode_bytes, 1, 0),
            _ => {
                for &operation in &options.operations {
                    match scenario {
                        Scenario::Sizes => {
                            options.sizes.iter().for_each(|&size| add(operation, 1, size, 1, 0));
                        }
                        Scenario::Kv => {
                            options
                                .shapes
                                .iter()
                                .for_each(|&(count, size)| add(operation, count, size, 1, 0));
                        }
                        Scenario::Throughput => {
                            let sizes = options.throughput_sizes.iter();
                            sizes.for_each(|&size| add(operation, 1, size, options.window, 0));
                        }
                        Scenario::Notify | Scenario::DecodeUnderPrefill => {}
                    }
                }
            }
        }
    }
    cases
}

#[cfg(test)]
pub(crate) mod tests;
