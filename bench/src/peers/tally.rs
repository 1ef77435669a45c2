//! Adds up the outcomes of a case on a backend over the rounds.

use std::time::Duration;

use anyhow::Result;
use hdrhistogram::Histogram;

use super::options::PeersCase;
use super::report::{PeerFigures, PeersSeries};
use super::run::PeersOutcome;
use crate::measure::{Points, histogram, points_of, restore};
use crate::report::{Percentiles, Spread, hgrm_name};

/// Adds up the rounds of a case on a backend.
pub(crate) struct PeersTally {
    case: PeersCase,
    backend: String,
    nixl: String,
    all: Histogram<u64>,
    rounds: Vec<Percentiles>,
    round_points: Vec<Points>,
    peers: Vec<(u64, Histogram<u64>)>,
    rates: Vec<f64>,
    fairness: Vec<f64>,
    least_share: Vec<f64>,
    kib: Vec<f64>,
    descriptors: Vec<f64>,
    resident_mib: Vec<f64>,
    cpu_us: Vec<f64>,
    hub_descriptors: u64,
    hub_threads: u64,
}

impl PeersTally {
    pub(crate) fn new(case: PeersCase, backend: String) -> Self {
        Self {
            case,
            backend,
            nixl: String::new(),
            all: histogram(),
            rounds: Vec::new(),
            round_points: Vec::new(),
            peers: (0..case.peers).map(|_| (0, histogram())).collect(),
            rates: Vec::new(),
            fairness: Vec::new(),
            least_share: Vec::new(),
            kib: Vec::new(),
            descriptors: Vec::new(),
            resident_mib: Vec::new(),
            cpu_us: Vec::new(),
            hub_descriptors: 0,
            hub_threads: 0,
        }
    }

    /// Version of NIXL; empty where there is none.
    pub(crate) fn nixl(&self) -> &str {
        &self.nixl
    }

    pub(crate) fn has_rounds(&self) -> bool {
        !self.rates.is_empty()
    }

    /// Latencies of all rounds and peers.
    pub(crate) fn histogram(&self) -> &Histogram<u64> {
        &self.all
    }

    pub(crate) fn round_points(&self) -> &[Points] {
        &self.round_points
    }

    /// Adds a round.
    pub(crate) fn add(&mut self, outcome: &PeersOutcome, duration: Duration) -> Result<()> {
        let numbers: Vec<usize> = outcome.peers.iter().map(|peer| peer.peer).collect();
        anyhow::ensure!(
            numbers.iter().copied().eq(0..self.case.peers),
            "outcomes of the peers {numbers:?} instead of {}",
            self.case.peers
        );
        let mut round = histogram();
        for (peer, (operations, latency)) in outcome.peers.iter().zip(&mut self.peers) {
            *operations += peer.operations;
            restore(latency, &peer.latency)?;
            restore(&mut round, &peer.latency)?;
        }
        self.rounds.push(Percentiles::of(&round));
        self.nixl.clone_from(&outcome.nixl);
        let points = points_of(&round);
        restore(&mut self.all, &points)?;
        self.round_points.push(points);
        let counts: Vec<u64> = outcome.peers.iter().map(|peer| peer.operations).collect();
        let total: u64 = counts.iter().sum();
        self.rates.push(total as f64 / duration.as_secs_f64());
        let (index, least) = fairness(&counts);
        self.fairness.push(index);
        self.least_share.push(least);
        let (before, after) = (outcome.before, outcome.after);
        let each =
            |after: u64, before: u64| (after as f64 - before as f64) / self.case.peers as f64;
        self.kib.push(each(after.resident_bytes, before.resident_bytes) / 1024.0);
        self.descriptors.push(each(after.descriptors, before.descriptors));
        self.resident_mib.push(after.resident_bytes as f64 / (1u64 << 20) as f64);
        self.cpu_us.push(outcome.used.cpu_ns as f64 / 1e3 / total.max(1) as f64);
        (self.hub_descriptors, self.hub_threads) = (after.descriptors, after.threads);
        Ok(())
    }

    /// The row of it; `None` without a round.
    pub(crate) fn series(&self) -> Option<PeersSeries> {
        let spread = |values: &[f64]| Spread::of(values.to_vec());
        let id = self.case.id();
        let figures = |(operations, latency): &(u64, Histogram<u64>)| PeerFigures {
            operations: *operations,
            latency_us: Percentiles::of(latency),
            histogram_ns: points_of(latency),
        };
        let PeersCase { direction, operation, block_bytes, peers } = self.case;
        Some(PeersSeries {
            hgrm: hgrm_name(&id, &self.backend),
            id,
            backend: self.backend.clone(),
            group: self.case.group(),
            direction,
            operation,
            block_bytes,
            peers,
            operations: self.peers.iter().map(|peer| peer.0).sum(),
            operations_per_s: spread(&self.rates)?,
            latency_us: Percentiles::of(&self.all),
            rounds: self.rounds.clone(),
            rounds_operations_per_s: self.rates.clone(),
            fairness: spread(&self.fairness)?,
            least_share: spread(&self.least_share)?,
            per_peer: self.peers.iter().map(figures).collect(),
            hub_kib_per_peer: spread(&self.kib)?,
            hub_descriptors_per_peer: spread(&self.descriptors)?,
            hub_resident_mib: spread(&self.resident_mib)?,
            hub_descriptors: self.hub_descriptors,
            hub_threads: self.hub_threads,
            hub_cpu_us_per_operation: spread(&self.cpu_us)?,
            histogram_ns: points_of(&self.all),
        })
    }
}

/// Jain's index of what each got, and the least of it as a share of the mean. Nobody getting anything is fair.
fn fairness(counts: &[u64]) -> (f64, f64) {
    let sum: f64 = counts.iter().map(|&count| count as f64).sum();
    let squares: f64 = counts.iter().map(|&count| (count as f64).powi(2)).sum();
    if squares == 0.0 {
        return (1.0, 1.0);
    }
    let (number, least) = (counts.len() as f64, counts.iter().min().copied().unwrap_or(0));
    (sum * sum / (number * squares), least as f64 * number / sum)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::case::Operation;
    use crate::cpu::Usage;
    use crate::peers::options::Direction;
    use crate::peers::wire::{PeerOutcome, Resources};

    pub(crate) fn case(peers: usize) -> PeersCase {
        PeersCase {
            direction: Direction::ToOne,
            operation: Operation::Read,
            block_bytes: 4096,
            peers,
        }
    }

    pub(crate) fn round(counts: &[u64]) -> PeersOutcome {
        let before = Resources { resident_bytes: 10 << 20, descriptors: 20, threads: 4 };
        let peers = counts.len() as u64;
        let outcome = |(peer, &operations): (usize, &u64)| PeerOutcome {
            peer,
            operations,
            latency: vec![(10_000 * (peer as u64 + 1), operations.max(1))],
        };
        PeersOutcome {
            peers: counts.iter().enumerate().map(outcome).collect(),
            before,
            after: Resources {
                resident_bytes: before.resident_bytes + peers * (100 << 10),
                descriptors: before.descriptors + 3 * peers,
                threads: 4,
            },
            used: Usage { cpu_ns: 1_000_000, ..Usage::default() },
            nixl: "1.5.1".to_owned(),
        }
    }

    fn series(counts: &[u64]) -> PeersSeries {
        let mut tally = PeersTally::new(case(counts.len()), "corelane".to_owned());
        for _ in 0..2 {
            tally.add(&round(counts), Duration::from_secs(1)).expect("in range");
        }
        tally.series().expect("rounds")
    }

    #[test]
    fn a_peer_that_gets_nothing_shows() {
        let (one, four) = (series(&[100]), series(&[40, 40, 40, 0]));
        assert_eq!((one.fairness.median, one.least_share.median), (1.0, 1.0));
        assert!((four.fairness.median - 0.75).abs() < 1e-9 && four.least_share.median == 0.0);
        assert_eq!((four.operations, four.operations_per_s.median), (240, 120.0));
        assert_eq!(four.per_peer[3].operations, 0);
        // What the peer had to wait is there all the same.
        let (least, most) = four.range(|at| at.p50);
        assert!((least - 10.0).abs() < 0.1 && (most - 40.0).abs() < 0.1, "{least} {most}");
        assert!(four.slowest().is_some_and(|peer| (peer.latency_us.p50 - 40.0).abs() < 0.1));
    }

    #[test]
    fn resources_are_those_that_a_peer_adds() {
        let four = series(&[40, 40, 40, 0]);
        assert_eq!(four.hub_kib_per_peer.median, 100.0);
        assert_eq!((four.hub_descriptors_per_peer.median, four.hub_descriptors), (3.0, 32));
        assert!((four.hub_cpu_us_per_operation.median - 1000.0 / 120.0).abs() < 1e-9);
    }

    #[test]
    fn outcomes_of_other_peers_are_refused() {
        let mut tally = PeersTally::new(case(2), "corelane".to_owned());
        assert!(tally.add(&round(&[1]), Duration::from_secs(1)).is_err());
        assert!(!tally.has_rounds() && tally.series().is_none());
    }

    #[test]
    fn fairness_is_one_for_equals_and_the_share_for_a_single_winner() {
        assert_eq!(fairness(&[7, 7, 7]), (1.0, 1.0));
        assert_eq!(fairness(&[9, 0, 0]), (1.0 / 3.0, 0.0));
        assert_eq!(fairness(&[0, 0]), (1.0, 1.0));
    }
}
