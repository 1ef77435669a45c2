//! Rounds: every case on every backend, in turn, again and again, so that what changes on the machine during a run
//! hits all of them alike.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::case::{Backend, Case, Memory, RunSpec};
use crate::client::{Client, Outcome};
use crate::progress::Progress;
use crate::report::Tally;

/// An initiator-target pair that the coordinator drives.
pub(crate) trait Pair {
    /// Opens a run on both sides.
    fn prepare(&mut self, spec: &RunSpec) -> Result<()>;
    /// Begins to measure; returns at once where the pair lives in other processes.
    fn start(&mut self) -> Result<()>;
    /// Waits for the end of the measurement.
    fn collect(&mut self) -> Result<Outcome>;
}

/// A pair whose initiator is this very process.
impl Pair for Client {
    fn prepare(&mut self, spec: &RunSpec) -> Result<()> {
        self.prepare(spec.clone())
    }

    fn start(&mut self) -> Result<()> {
        Ok(())
    }

    fn collect(&mut self) -> Result<Outcome> {
        self.measure()
    }
}

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) cases: Vec<Case>,
    pub(crate) rounds: usize,
    pub(crate) baselines: Vec<Backend>,
    /// Of each phase of a load, in the place of the template's duration.
    pub(crate) phase_duration: Duration,
    /// Everything of a run except case, backend and number.
    pub(crate) template: RunSpec,
}

impl Plan {
    /// The backends, candidate first.
    pub(crate) fn backends(&self) -> Vec<Backend> {
        std::iter::once(self.template.backend).chain(self.baselines.iter().copied()).collect()
    }

    /// Whether a backend can run a case: a baseline has one transfer under way at a time, a load has two.
    pub(crate) fn runs(&self, case: &Case, backend: Backend) -> bool {
        case.load.is_none() || !self.is_baseline(backend)
    }

    /// Memory that the largest case takes in one process; none of this kind where it is that of GPUs.
    pub(crate) fn memory_bytes(&self) -> usize {
        if self.template.memory == Memory::Vram {
            return 0;
        }
        let backends = self.backends();
        let specs = self.cases.iter().flat_map(|case| {
            let of = |&backend: &Backend| RunSpec {
                case: case.clone(),
                backend,
                ..self.template.clone()
            };
            backends.iter().filter(|&&it| self.runs(case, it)).map(of)
        });
        specs.filter_map(|spec| spec.memory_bytes()).max().unwrap_or(0)
    }

    /// Runs of all rounds.
    pub(crate) fn runs_in_all(&self) -> usize {
        let backends = self.backends();
        let of_case = |case: &Case| backends.iter().filter(|&&it| self.runs(case, it)).count();
        self.rounds * self.cases.iter().map(of_case).sum::<usize>()
    }

    fn is_baseline(&self, backend: Backend) -> bool {
        self.baselines.contains(&backend)
    }
}

/// The share of `budget` that one case on one backend gets in one round.
pub(crate) fn duration_per_run(
    budget: Duration,
    cases: usize,
    rounds: usize,
    backends: usize,
) -> Duration {
    let runs = (cases * rounds * backends).max(1);
    (budget / u32::try_from(runs).unwrap_or(u32::MAX))
        .clamp(Duration::from_millis(20), Duration::from_secs(2))
}

/// Runs the plan. What was measured before a failure is returned with it.
pub(crate) fn run(
    plan: &Plan,
    pairs: &mut [Box<dyn Pair>],
    progress: &mut Progress,
) -> (Vec<Tally>, Option<anyhow::Error>) {
    let backends = plan.backends();
    let mut tallies: Vec<Tally> = plan
        .cases
        .iter()
        .flat_map(|case| backends.iter().map(|&backend| Tally::new(case.clone(), backend)))
        .collect();
    let failure = run_rounds(plan, &backends, &mut tallies, pairs, progress).err();
    progress.finish();
    (tallies, failure)
}

/// Who runs when in a round, the first of which is number 0. Alternating who goes first: a drift within a round then favours
/// nobody.
pub(crate) fn in_turn(round: usize, backends: usize) -> impl Iterator<Item = usize> {
    (0..backends).map(move |turn| if round.is_multiple_of(2) { turn } else { backends - 1 - turn })
}

fn run_rounds(
    plan: &Plan,
    backends: &[Backend],
    tallies: &mut [Tally],
    pairs: &mut [Box<dyn Pair>],
    progress: &mut Progress,
) -> Result<()> {
    let mut number = 0;
    for round in 0..plan.rounds {
        for (at, case) in plan.cases.iter().enumerate() {
            progress.case(round, plan.rounds, case);
            for which in in_turn(round, backends.len()) {
                let backend = backends[which];
                if !plan.runs(case, backend) {
                    continue;
                }
                number += 1;
                let spec = spec_of(plan, case, backend, number);
                // A baseline is one undisturbed pair, whatever load the candidate is put under.
                let pairs = if plan.is_baseline(backend) { &mut pairs[..1] } else { &mut *pairs };
                let started = Instant::now();
                let outcomes = run_on(pairs, &spec)
                    .with_context(|| format!("{} on {backend}, round {}", case.id(), round + 1))?;
                tallies[at * backends.len() + which].add_round(&outcomes)?;
                progress.ran(started.elapsed());
            }
        }
    }
    Ok(())
}

fn spec_of(plan: &Plan, case: &Case, backend: Backend, run: u32) -> RunSpec {
    let baseline = plan.is_baseline(backend);
    RunSpec {
        case: case.clone(),
        backend,
        run,
        duration: if case.load.is_some() { plan.phase_duration } else { plan.template.duration },
        burn: plan.template.burn && !baseline,
        sabotage: plan.template.sabotage.filter(|_| !baseline),
        ..plan.template.clone()
    }
}

fn run_on(pairs: &mut [Box<dyn Pair>], spec: &RunSpec) -> Result<Vec<Outcome>> {
    // All are open before the first one starts: opening is not part of anybody's load.
    for pair in &mut *pairs {
        pair.prepare(spec)?;
    }
    for pair in &mut *pairs {
        pair.start()?;
    }
    pairs.iter_mut().map(|pair| pair.collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::cases;
    use crate::case::tests::{options, spec};
    use std::cell::RefCell;
    use std::rc::Rc;

    type Log = Rc<RefCell<Vec<(usize, Backend, String, bool)>>>;

    struct Fake {
        index: usize,
        log: Log,
        fail_at: Option<usize>,
    }

    impl Pair for Fake {
        fn prepare(&mut self, spec: &RunSpec) -> Result<()> {
            self.log.borrow_mut().push((self.index, spec.backend, spec.case.id(), spec.burn));
            anyhow::ensure!(self.fail_at != Some(self.log.borrow().len()), "boom");
            Ok(())
        }
        fn start(&mut self) -> Result<()> {
            Ok(())
        }
        fn collect(&mut self) -> Result<Outcome> {
            Ok(Outcome {
                operations: 1,
                response: vec![(1000, 1)],
                span_ns: 1000,
                ..Outcome::default()
            })
        }
    }

    fn plan() -> Plan {
        let cases = cases(&options())[..2].to_vec();
        let template = RunSpec { burn: true, ..spec(cases[0].clone()) };
        Plan {
            cases,
            rounds: 2,
            baselines: vec![Backend::RawTcp],
            phase_duration: Duration::from_millis(9),
            template,
        }
    }

    fn run_fakes(count: usize, fail_at: Option<usize>) -> (Log, Vec<Tally>, Option<anyhow::Error>) {
        let log = Log::default();
        let mut pairs: Vec<Box<dyn Pair>> = (0..count)
            .map(|index| Box::new(Fake { index, log: Rc::clone(&log), fail_at }) as Box<dyn Pair>)
            .collect();
        let (tallies, failure) = run(&plan(), &mut pairs, &mut Progress::silent());
        (log, tallies, failure)
    }

    #[test]
    fn rounds_are_interleaved_and_the_first_backend_alternates() {
        let (log, tallies, failure) = run_fakes(1, None);
        assert!(failure.is_none());
        let order: Vec<(Backend, String)> =
            log.borrow().iter().map(|(_, b, id, _)| (*b, id.clone())).collect();
        let row = |backend, id: &str| (backend, id.to_owned());
        let (ours, raw) = (Backend::Corelane, Backend::RawTcp);
        assert_eq!(
            order,
            [
                row(ours, "read/64B"),
                row(raw, "read/64B"),
                row(ours, "read/4KiB"),
                row(raw, "read/4KiB"),
                row(raw, "read/64B"),
                row(ours, "read/64B"),
                row(raw, "read/4KiB"),
                row(ours, "read/4KiB"),
            ]
        );
        assert_eq!(tallies.len(), 4);
        assert!(tallies.iter().all(|tally| tally.series()[0].series.rounds.len() == 2));
    }

    #[test]
    fn the_baseline_runs_alone_and_undisturbed() {
        let (log, ..) = run_fakes(3, None);
        let log = log.borrow();
        assert!(log.iter().all(|&(index, backend, _, burn)| {
            if backend == Backend::RawTcp { index == 0 && !burn } else { burn }
        }));
        assert_eq!(log.iter().filter(|entry| entry.1 == Backend::Corelane).count(), 3 * 4);
    }

    #[test]
    fn a_failure_names_its_run_and_keeps_what_was_measured() {
        let (_, tallies, failure) = run_fakes(1, Some(3));
        let failure = format!("{:#}", failure.expect("the third run fails"));
        assert!(
            failure.contains("read/4KiB on corelane, round 1") && failure.contains("boom"),
            "{failure}"
        );
        assert_eq!(tallies[0].series().len(), 1);
        assert!(tallies[2].series().is_empty());
    }

    #[test]
    fn the_budget_is_shared_within_bounds() {
        assert_eq!(duration_per_run(Duration::from_secs(60), 30, 5, 2), Duration::from_millis(200));
        assert_eq!(duration_per_run(Duration::from_secs(60), 1, 1, 1), Duration::from_secs(2));
        assert_eq!(duration_per_run(Duration::from_secs(1), 100, 10, 2), Duration::from_millis(20));
    }
}
