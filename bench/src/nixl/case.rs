//! What `nixl` measures.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::trace::Trace;
use crate::case::Operation;
use crate::measure::{LoadShape, READ_SLOTS};
use crate::units::Bytes;

/// Groups of cases, as `--scenario` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NixlScenario {
    /// One block, by size
    Sizes,
    /// Scattered KV-cache blocks, many in one transfer
    Kv,
    /// A notification that the target's application answers with one
    Notify,
    /// The caller's own time: preparing and posting a scattered list
    Post,
    /// Small reads at a rate, alone and beside back-to-back large writes from the same caller
    DecodeUnderPrefill,
    /// A target that dies or stops: when it is noticed, and when reads work again (named only)
    Fault,
    /// Requests as a recording has them: --trace (named only)
    Trace,
    /// All of them but `fault` and `trace`
    #[serde(skip)]
    All,
}

impl NixlScenario {
    /// The scenarios meant, in the order in which they run, without repetition.
    pub(crate) fn expand(given: &[Self]) -> Vec<Self> {
        let every = [Self::Sizes, Self::Kv, Self::Notify, Self::Post, Self::DecodeUnderPrefill];
        let wanted = |scenario: &Self| given.contains(scenario) || given.contains(&Self::All);
        every.into_iter().filter(wanted).collect()
    }
}

/// One shape of one operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NixlCase {
    pub(crate) scenario: NixlScenario,
    /// Read, write, or notify.
    pub(crate) operation: Operation,
    /// Descriptors of one transfer; 0 where no data moves.
    pub(crate) blocks: usize,
    pub(crate) block_bytes: usize,
    /// Bytes of a notification; 0 where none is sent.
    pub(crate) notification_bytes: usize,
    /// Scenario `decode-under-prefill`: how many of these transfers, and what runs beside them.
    pub(crate) load: Option<LoadShape>,
    /// Scenario `trace`: what is replayed. `blocks` are then those of the longest request.
    pub(crate) trace: Option<Trace>,
    /// Threads of the initiator that post and poll, each with transfers of its own.
    pub(crate) threads: usize,
}

/// Transfers that operations rotate through together stay within this much memory: a test of latency must not turn
/// into one of memory.
const SLOT_MEMORY: usize = 1 << 20;
const MAX_SLOTS: usize = 16;

impl NixlCase {
    /// A stable name: `read/64B`, `kv/read/4096x4KiB`, `notify/16B`, `post/read/4096x4KiB`.
    pub(crate) fn id(&self) -> String {
        let Self { operation, blocks, .. } = self;
        let size = Bytes(self.block_bytes);
        match self.scenario {
            NixlScenario::Kv => format!("kv/{operation}/{blocks}x{size}"),
            NixlScenario::Post => format!("post/{operation}/{blocks}x{size}"),
            NixlScenario::Notify => format!("notify/{}", Bytes(self.notification_bytes)),
            NixlScenario::DecodeUnderPrefill => load_id(size, self.load),
            NixlScenario::Trace => {
                format!("trace/{}", self.trace.as_ref().map_or("", |trace| &trace.name))
            }
            NixlScenario::Sizes | NixlScenario::Fault | NixlScenario::All => {
                format!("{operation}/{size}")
            }
        }
    }

    /// Payload of one transfer; with a load, of one read.
    pub(crate) fn bytes(&self) -> usize {
        self.blocks * self.block_bytes
    }

    /// Prepared transfers that a thread's operations rotate through, each with places of its own.
    pub(crate) fn slots(&self) -> usize {
        match self.bytes() {
            0 => 0,
            _ if self.load.is_some() => READ_SLOTS,
            _ if self.trace.is_some() || self.scenario == NixlScenario::Fault => 1,
            bytes => (SLOT_MEMORY / self.threads.max(1) / bytes).clamp(1, MAX_SLOTS),
        }
    }

    /// The prepared transfers of all threads, thread after thread.
    pub(crate) fn all_slots(&self) -> usize {
        self.slots() * self.threads
    }

    /// From the start of a block to that of the next in memory: scattered ones leave a gap as large as themselves.
    pub(crate) fn distance(&self) -> usize {
        let stride = self.block_bytes.next_multiple_of(64);
        if self.blocks > 1 { 2 * stride } else { stride }
    }

    /// Bytes of memory that the case needs on either side; `None` when that is beyond counting.
    pub(crate) fn arena_bytes(&self) -> Option<usize> {
        // Before anything else: all other figures of a case may overflow when this one does.
        self.block_bytes.checked_next_multiple_of(64)?.checked_mul(2)?.checked_mul(self.blocks)?;
        let slots = self.distance().checked_mul(self.blocks)?.checked_mul(self.all_slots())?;
        if slots == 0 {
            return Some(0);
        }
        let bulk_bytes = self.load.map_or(0, |load| load.bulk_bytes);
        let all = slots.checked_next_multiple_of(4096)?.checked_add(bulk_bytes)?;
        // And a page that no block is in.
        all.checked_next_multiple_of(4096)?.checked_add(4096)
    }
}

/// What to make cases of.
#[derive(Clone, Debug)]
pub(crate) struct NixlCaseOptions {
    pub(crate) scenarios: Vec<NixlScenario>,
    pub(crate) operations: Vec<Operation>,
    pub(crate) sizes: Vec<usize>,
    pub(crate) shapes: Vec<(usize, usize)>,
    pub(crate) notification_bytes: usize,
    /// Bytes of the reads of scenario `decode-under-prefill`, and what runs beside them.
    pub(crate) decode_bytes: usize,
    pub(crate) load: LoadShape,
    pub(crate) threads: usize,
}

/// Name of a case of scenario `decode-under-prefill`.
pub(crate) fn load_id(size: Bytes, load: Option<LoadShape>) -> String {
    let (rate, bulk) = load.map_or((0, 0), |load| (load.reads_per_s, load.bulk_bytes));
    format!("decode-under-prefill/{size}@{rate}+{}", Bytes(bulk))
}

/// The list whose posting costs the most of those that people have: scenario `post`.
const POSTED_SHAPE: (usize, usize) = (4096, 4096);

/// All cases, in the order in which they run and are printed.
pub(crate) fn cases(options: &NixlCaseOptions) -> Vec<NixlCase> {
    let mut cases: Vec<NixlCase> = Vec::new();
    for scenario in NixlScenario::expand(&options.scenarios) {
        let shapes: Vec<(usize, usize)> = match scenario {
            NixlScenario::Sizes => options.sizes.iter().map(|&size| (1, size)).collect(),
            NixlScenario::Kv => options.shapes.clone(),
            NixlScenario::Post => vec![POSTED_SHAPE],
            NixlScenario::Notify
            | NixlScenario::DecodeUnderPrefill
            | NixlScenario::Fault
            | NixlScenario::Trace
            | NixlScenario::All => Vec::new(),
        };
        let mut add = |case: NixlCase| {
            if !cases.contains(&case) {
                cases.push(case);
            }
        };
        for &operation in &options.operations {
            for &(blocks, block_bytes) in &shapes {
                let notification_bytes = 0;
                let load = None;
                add(NixlCase {
                    scenario,
                    operation,
                    blocks,
                    block_bytes,
                    notification_bytes,
                    load,
                    trace: None,
                    threads: options.threads,
                });
            }
        }
        if scenario == NixlScenario::Notify {
            let notification_bytes = options.notification_bytes;
            let operation = Operation::Notify;
            add(NixlCase {
                scenario,
                operation,
                blocks: 0,
                block_bytes: 0,
                notification_bytes,
                load: None,
                trace: None,
                threads: 1,
            });
        }
        if scenario == NixlScenario::DecodeUnderPrefill {
            add(NixlCase {
                scenario,
                operation: Operation::Read,
                blocks: 1,
                block_bytes: options.decode_bytes,
                notification_bytes: 0,
                load: Some(options.load),
                trace: None,
                threads: 1,
            });
        }
    }
    cases
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn all() -> Vec<NixlCase> {
        cases(&NixlCaseOptions {
            scenarios: vec![NixlScenario::All],
            operations: vec![Operation::Read, Operation::Write],
            sizes: vec![64, 1 << 20],
            shapes: vec![(256, 16 << 10)],
            notification_bytes: 16,
            decode_bytes: 4096,
            load: LoadShape { reads_per_s: 1000, bulk_bytes: 64 << 20 },
            threads: 1,
        })
    }

    #[test]
    fn every_scenario_has_its_cases() {
        let ids: Vec<String> = all().iter().map(NixlCase::id).collect();
        assert_eq!(
            ids,
            [
                "read/64B",
                "read/1MiB",
                "write/64B",
                "write/1MiB",
                "kv/read/256x16KiB",
                "kv/write/256x16KiB",
                "notify/16B",
                "post/read/4096x4KiB",
                "post/write/4096x4KiB",
                "decode-under-prefill/4KiB@1000+64MiB",
            ]
        );
    }

    #[test]
    fn scenarios_are_not_repeated() {
        use NixlScenario::{All, DecodeUnderPrefill, Kv, Notify, Post, Sizes};
        assert_eq!(NixlScenario::expand(&[Kv, Sizes, Kv]), [Sizes, Kv]);
        assert_eq!(NixlScenario::expand(&[All, Kv]), [Sizes, Kv, Notify, Post, DecodeUnderPrefill]);
        assert_eq!(NixlScenario::expand(&[]), []);
    }

    #[test]
    fn slots_are_few_and_only_where_data_moves() {
        let slots: Vec<usize> = all().iter().map(NixlCase::slots).collect();
        assert_eq!(slots, [16, 1, 16, 1, 1, 1, 0, 1, 1, 64]);
    }

    #[test]
    fn every_thread_has_places_of_its_own() {
        let slots = |case: &NixlCase, threads| {
            let case = NixlCase { threads, ..case.clone() };
            (case.slots(), case.all_slots(), case.arena_bytes())
        };
        let all = all();
        assert_eq!(slots(&all[0], 4), (16, 64, Some(64 * 64 + 4096)));
        assert_eq!(slots(&all[1], 4), (1, 4, Some((4 << 20) + 4096)));
    }

    #[test]
    fn memory_includes_gaps_and_never_overflows() {
        let bytes: Vec<Option<usize>> = all().iter().map(NixlCase::arena_bytes).collect();
        assert_eq!(bytes[0], Some(4096 + 4096));
        assert_eq!(bytes[4], Some(2 * 256 * (16 << 10) + 4096));
        assert_eq!(bytes[6], Some(0));
        assert_eq!(bytes[9], Some(64 * 4096 + (64 << 20) + 4096));
        let load = LoadShape { reads_per_s: 1, bulk_bytes: usize::MAX };
        assert_eq!(NixlCase { load: Some(load), ..all()[9].clone() }.arena_bytes(), None);
        for block_bytes in [usize::MAX, usize::MAX / 2, usize::MAX / 64] {
            assert_eq!(NixlCase { block_bytes, ..all()[4].clone() }.arena_bytes(), None);
        }
    }
}
