//! What the parent and its two processes say to each other: one JSON value per line, silent during a pass.

use serde::{Deserialize, Serialize};

use super::case::NixlCase;
use super::fault::Watched;
#[cfg(feature = "nixl")]
use crate::arena::Arena;
use crate::case::Sabotage;
use crate::cpu::Usage;
use crate::measure::{LoadOutcome, Points};
use crate::raw_local::RawKind;

/// The two processes of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    Initiator,
    Target,
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Initiator => "initiator",
            Self::Target => "target",
        }
    }
}

/// What moves the bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum System {
    Nixl(NixlSystem),
    /// A baseline, without NIXL.
    Raw(RawKind),
}

/// A backend of NIXL.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NixlSystem {
    pub(crate) backend: String,
    pub(crate) parameters: Vec<(String, String)>,
    pub(crate) prog_thread: bool,
    /// Several threads call the agent at the same time.
    pub(crate) threads: bool,
}

/// All that a process needs to know before it can be introduced to the other.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) role: Role,
    pub(crate) system: System,
    /// Core of the application's thread.
    pub(crate) core: Option<usize>,
    /// Initiator: those of the threads that post and poll, where there are several.
    pub(crate) thread_cores: Vec<usize>,
    /// Target: sleep between polls where no notification has to be answered.
    pub(crate) sleeps: bool,
    pub(crate) arena_bytes: usize,
    /// Its own GPU and the other side's, where the memory is one's.
    pub(crate) gpus: [Option<u32>; 2],
    pub(crate) seed: u64,
    /// Initiator: says of transfers that they are over without moving their bytes.
    pub(crate) sabotage: Option<Sabotage>,
}

#[cfg(feature = "nixl")]
impl Setup {
    /// The memory of this side.
    pub(crate) fn arena(&self) -> anyhow::Result<Arena> {
        let len = self.arena_bytes.max(4096);
        self.gpus[0].map_or_else(|| Arena::new(len), |gpu| Arena::of_gpu(gpu, len))
    }
}

/// What the parent asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// Must come first.
    Setup(Setup),
    /// Who is on the other side; metadata in hexadecimal.
    Meet { metadata: String, address: u64, pid: i32 },
    /// Target: renew the source of reads, poison the destination of writes, answer notifications.
    Begin { case: NixlCase, sequence: u64 },
    /// Initiator: the case again and again until a transfer fails, at most for that long.
    Watch { case: NixlCase, limit_ns: u64 },
    /// Target: check the destination of writes.
    End { case: NixlCase, sequence: u64 },
    /// Initiator: every transfer once, untimed; then, with a duration, contents renewed, until it is over, timed. Then check.
    Run { case: NixlCase, sequence: u64, duration_ns: u64, iterations: Iterations },
}

/// How many transfers a timed pass makes, where that does not follow from its duration.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Iterations {
    pub(crate) timed: Option<u64>,
    pub(crate) warm: Option<u64>,
}

impl Iterations {
    /// What one of so many threads has to make of them, rounded up.
    #[cfg(feature = "nixl")]
    pub(crate) fn share(self, threads: usize) -> Self {
        let share = |all: Option<u64>| all.map(|all| all.div_ceil(threads.max(1) as u64));
        Self { timed: share(self.timed), warm: share(self.warm) }
    }
}

/// What is answered, one reply per order.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    Ready {
        metadata: String,
        address: u64,
        pid: i32,
        /// Version of NIXL; empty where there is none.
        nixl: String,
        /// Of the backend and its NIXL: `NAME on CORES`.
        threads: Vec<String>,
    },
    Met,
    Begun,
    /// With how long the measured notifications of the pass travelled.
    Ended {
        one_way: Points,
    },
    Ran(Box<Outcome>),
    Watched(Watched),
    /// The user asked for something that cannot be.
    Refused {
        message: String,
    },
    /// It went wrong.
    Failed {
        message: String,
    },
}

/// What the initiator measured in one pass.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) operations: u64,
    /// When the first untimed transfer ended; 0 where that was not looked at.
    pub(crate) first_ended_ns: u64,
    /// From the beginning of the first of them to the end of the last, where that was measured.
    pub(crate) elapsed_ns: u64,
    /// From just before posting to the moment at which the end was seen; of notifications, to the answer.
    pub(crate) completion: Points,
    /// The caller's time in postXfer; empty where posting is all there is.
    pub(crate) post: Points,
    /// The caller's time in createXferReq.
    pub(crate) prepare: Points,
    /// From just before sending a notification to the moment at which the target's application held it.
    pub(crate) one_way: Points,
    /// Of scenario `decode-under-prefill`, which has nothing of the above.
    pub(crate) load: Option<LoadOutcome>,
    /// Payload that was moved while `used` was counted.
    pub(crate) bytes: u64,
    /// What both processes used of the processors meanwhile.
    pub(crate) used_initiator: Usage,
    pub(crate) used_target: Usage,
}
