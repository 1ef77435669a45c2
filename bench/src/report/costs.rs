//! What an operation costs both processes in CPU time and context switches.

use serde::{Deserialize, Serialize};

use crate::cpu::Usage;

const GIB: f64 = (1u64 << 30) as f64;

/// Of both sides.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Costs {
    pub(crate) initiator: Cost,
    pub(crate) target: Cost,
}

/// Of one process, all its threads together, polling included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cost {
    /// `None` where no payload was moved.
    pub(crate) cpu_s_per_gib: Option<f64>,
    pub(crate) cpu_s_per_million_operations: f64,
    /// Threads that gave way: asleep, or by sched_yield.
    pub(crate) voluntary_switches_per_operation: f64,
    /// Threads that were made to.
    pub(crate) involuntary_switches_per_operation: f64,
}

impl Costs {
    /// `None` without an operation.
    pub(crate) fn of(initiator: Usage, target: Usage, operations: u64, bytes: u64) -> Option<Self> {
        let cost = |used: Usage| {
            let per_operation = |count: u64| count as f64 / operations as f64;
            let seconds = used.cpu_ns as f64 / 1e9;
            Cost {
                cpu_s_per_gib: (bytes > 0).then(|| seconds / (bytes as f64 / GIB)),
                cpu_s_per_million_operations: seconds / operations as f64 * 1e6,
                voluntary_switches_per_operation: per_operation(used.voluntary_switches),
                involuntary_switches_per_operation: per_operation(used.involuntary_switches),
            }
        };
        (operations > 0).then(|| Self { initiator: cost(initiator), target: cost(target) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_per_gib_and_per_operation() {
        let used = |cpu_ns| Usage { cpu_ns, voluntary_switches: 50, involuntary_switches: 5 };
        let costs = Costs::of(used(2_000_000_000), used(1_000_000_000), 100, 1 << 31);
        let Costs { initiator, target } = costs.expect("operations");
        assert_eq!((initiator.cpu_s_per_gib, target.cpu_s_per_gib), (Some(1.0), Some(0.5)));
        assert_eq!(target.cpu_s_per_million_operations, 10_000.0);
        assert_eq!(initiator.voluntary_switches_per_operation, 0.5);
        assert_eq!(initiator.involuntary_switches_per_operation, 0.05);
        assert_eq!(Costs::of(used(1), used(1), 0, 0), None);
        let nothing_moved = Costs::of(used(1), used(1), 1, 0).expect("an operation");
        assert_eq!(nothing_moved.target.cpu_s_per_gib, None);
    }
}
