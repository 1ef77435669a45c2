//! Many rounds, several at a time, and the table of what came out.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use corelane::TransportKind;
use corelane_tests::Random;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};

use crate::phase::Phase;
use crate::round::{Contest, Outcome, Rules};
use crate::side::{Kind, Strike};
use crate::usage::Samples;

/// What a campaign is asked to do.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// How the sides reach each other: `local` or `tcp`.
    #[arg(long, default_value = "tcp")]
    transport: TransportKind,
    #[arg(long, default_value_t = 60)]
    rounds: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this phase; otherwise all take turns.
    #[arg(long)]
    phase: Option<Phase>,
    /// Liveness timeout in milliseconds.
    #[arg(long, default_value_t = 500)]
    liveness: u64,
    /// Rounds at a time, each with processes of its own.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Bounds of time are multiplied by this: for machines that have other things to do. Not the half of the liveness timeout in which
    /// the last death has to be noticed.
    #[arg(long, default_value_t = 1.0)]
    slack: f64,
    /// Every so many rounds the victim has 1 GiB of resident memory beside its own; 0: never.
    #[arg(long, default_value_t = 0)]
    ballast_every: usize,
    /// Fewest rounds of each phase in which the victim was struck while the board showed that phase.
    #[arg(long, default_value_t = 0)]
    confirmed: usize,
    /// One line of JSON for each round: seed, phase, what happened.
    #[arg(long)]
    log: Option<PathBuf>,
}

#[derive(Debug)]
struct Row {
    rounds: usize,
    confirmed: usize,
    counts: [usize; KINDS.len()],
    detection: Histogram<u64>,
    /// The same, less what is nobody's fault: over tcp what the kernel takes to take the victim's memory away.
    judged: Histogram<u64>,
}

const KINDS: [(Kind, &str); 5] = [
    (Kind::Hang, "hangs"),
    (Kind::Wrong, "wrong bytes"),
    (Kind::Late, "late writes"),
    (Kind::Lost, "lost"),
    (Kind::Doubled, "doubled"),
];

impl Row {
    fn new() -> Result<Self> {
        let detection = Histogram::new_with_bounds(1, 600_000_000, 3)?;
        let judged = detection.clone();
        Ok(Self { rounds: 0, confirmed: 0, counts: [0; KINDS.len()], detection, judged })
    }

    fn add(&mut self, other: &Self) -> Result<()> {
        self.rounds += other.rounds;
        self.confirmed += other.confirmed;
        self.detection.add(&other.detection)?;
        self.judged.add(&other.judged)?;
        self.counts.iter_mut().zip(other.counts).for_each(|(sum, count)| *sum += count);
        Ok(())
    }
}

struct Results {
    transport: TransportKind,
    rows: Vec<(Phase, Row)>,
    with_ballast: Histogram<u64>,
    completed: u64,
    notifications: u64,
    busy: u64,
    /// Rounds in which transfers failed and may have for want of a core.
    excused: usize,
    problems: Vec<String>,
    /// The round that took longest to notice the strike: how long, and what is to be known about it.
    slowest: (u64, String),
    failed: usize,
    seeds: Vec<(u64, Phase)>,
    usage: Vec<Samples>,
    log: Option<BufWriter<File>>,
}

impl Results {
    fn new(
        transport: TransportKind,
        rows: Vec<(Phase, Row)>,
        log: Option<BufWriter<File>>,
    ) -> Result<Self> {
        Ok(Self {
            transport,
            rows,
            with_ballast: Row::new()?.detection,
            completed: 0,
            notifications: 0,
            busy: 0,
            excused: 0,
            problems: Vec::new(),
            slowest: (0, String::new()),
            failed: 0,
            seeds: Vec::new(),
            usage: Vec::new(),
            log,
        })
    }

    fn row(&mut self, phase: Phase) -> Option<&mut Row> {
        self.rows.iter_mut().find(|(known, _)| *known == phase).map(|(_, row)| row)
    }

    fn problem(&mut self, phase: Phase, kind: Kind, text: String) {
        match KINDS.iter().position(|(known, _)| *known == kind) {
            Some(index) => {
                if let Some(row) = self.row(phase) {
                    row.counts[index] += 1;
                }
            }
            None => self.failed += 1,
        }
        self.problems.push(text);
    }

    fn add(&mut self, outcome: &Outcome) -> Result<()> {
        if let Some(log) = &mut self.log {
            writeln!(log, "{}", serde_json::to_string(outcome)?)?;
        }
        self.seeds.push((outcome.seed, outcome.phase));
        self.completed += outcome.completed;
        self.notifications += outcome.notifications;
        self.busy += outcome.busy;
        self.excused += usize::from(outcome.excused);
        let excused = match self.transport {
            TransportKind::Local => 0,
            // 80 ms for each GiB.
            _ => outcome.resident / ((1 << 30) / 80_000),
        };
        if let Some(us) = outcome.detection_us {
            if outcome.resident > 1 << 30 {
                self.with_ballast.saturating_record(us.max(1));
            }
            if us > self.slowest.0 {
                let Outcome { round, seed, phase, waited_us, .. } = outcome;
                let (us_ms, waited) = (ms(us), ms(*waited_us));
                let of = format!("round {round} (seed {seed}, {})", phase.name());
                let text = format!(
                    "the slowest: {of}, {us_ms} ms; a thread that posts waited {waited} ms for a core"
                );
                self.slowest = (us, text);
            }
        }
        if let Some(row) = self.row(outcome.phase) {
            row.rounds += 1;
            row.confirmed += usize::from(outcome.in_phase == [true; 2]);
            if let Some(us) = outcome.detection_us {
                row.detection.saturating_record(us.max(1));
                row.judged.saturating_record(us.saturating_sub(excused).max(1));
            }
        }
        for (kind, what) in &outcome.problems {
            let Outcome { round, seed, phase, strike, .. } = outcome;
            let text = format!(
                "round {round} (seed {seed}, {}, {strike:?}): {kind:?}: {what}",
                phase.name()
            );
            self.problem(*phase, *kind, text);
        }
        Ok(())
    }

    fn add_late(&mut self, late: Vec<(u64, String)>) {
        for (seed, what) in late {
            let phase =
                self.seeds.iter().find(|(known, _)| *known == seed).map(|(_, phase)| *phase);
            self.problem(phase.unwrap_or(Phase::Idle), Kind::Late, format!("seed {seed}: {what}"));
        }
    }
}

/// Runs a campaign; false: something was not as it must be.
pub(crate) fn run(options: &Options, stall: bool) -> Result<bool> {
    if options.transport == TransportKind::Rdma {
        bail!("faults of RDMA are tested in its rig: tests/run.sh rdma");
    }
    let phases = options.phase.map_or(Phase::ALL.to_vec(), |phase| vec![phase]);
    let log = match &options.log {
        Some(path) => Some(BufWriter::new(File::create(path).context("creating the log")?)),
        None => None,
    };
    let rows = phases.iter().map(|&phase| Ok((phase, Row::new()?))).collect::<Result<_>>()?;
    let results = Mutex::new(Results::new(options.transport, rows, log)?);
    let (next, progress) = (AtomicUsize::new(0), progress(options, stall)?);
    std::thread::scope(|scope| {
        let job = |job| {
            let (next, progress, results, phases) = (&next, &progress, &results, &phases);
            scope.spawn(move || work(options, stall, job, phases, next, progress, results))
        };
        let jobs: Vec<_> = (0..options.jobs.max(1)).map(job).collect();
        for job in jobs {
            match job.join() {
                Ok(result) => result?,
                Err(_) => bail!("a process did not answer as it must"),
            }
        }
        Ok(())
    })?;
    progress.finish_and_clear();
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    report(options, stall, results)
}

fn progress(options: &Options, stall: bool) -> Result<ProgressBar> {
    let bar = ProgressBar::new(options.rounds as u64);
    let style = "{prefix:14} {bar:30} {pos:>5}/{len:<5} {elapsed:>5}, {eta:>5} left  {msg}";
    bar.set_style(ProgressStyle::with_template(style)?);
    bar.set_prefix(format!("{} {}", name(stall), options.transport));
    Ok(bar)
}

fn name(stall: bool) -> &'static str {
    if stall { "stall" } else { "kill" }
}

fn work(
    options: &Options,
    stall: bool,
    job: usize,
    phases: &[Phase],
    next: &AtomicUsize,
    progress: &ProgressBar,
    results: &Mutex<Results>,
) -> Result<()> {
    let rules = Rules {
        transport: options.transport,
        liveness: Duration::from_millis(options.liveness),
        slack: options.slack,
    };
    let mut contest = Contest::new(rules.clone(), job)?;
    let mut samples = Samples::new(format!("survivor {job}"));
    let locked = || results.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let round = next.fetch_add(1, SeqCst);
        if round >= options.rounds {
            break;
        }
        let phase = phases[round % phases.len()];
        let strike = match (stall, (round / phases.len()) % 2) {
            (false, _) => Strike::Kill,
            (true, 0) => Strike::Short,
            (true, _) => Strike::Long,
        };
        let seed = Random::new(options.seed.wrapping_mul(1_000_003) + round as u64).next() >> 20;
        let heavy =
            options.ballast_every > 0 && round % options.ballast_every == options.ballast_every - 1;
        match contest.round(round, seed, phase, strike, if heavy { 1024 } else { 0 }) {
            Ok(outcome) => locked().add(&outcome)?,
            Err(error) => {
                let text =
                    format!("round {round} (seed {seed}, {}, {strike:?}): {error:#}", phase.name());
                locked().problem(phase, Kind::Failed, text);
                // Nobody knows what state its processes are in.
                contest = Contest::new(rules.clone(), job)?;
                samples = Samples::new(format!("survivor {job}"));
                continue;
            }
        }
        let late = contest.late_so_far()?;
        locked().add_late(late);
        samples.add(contest.usage()?);
        progress.set_message(phase.name());
        progress.inc(1);
    }
    let late = contest.late()?;
    let mut results = locked();
    results.add_late(late);
    results.usage.push(samples);
    Ok(())
}

/// Milliseconds of microseconds.
fn ms(us: u64) -> String {
    format!("{:.2}", us as f64 / 1000.0)
}

fn report(options: &Options, stall: bool, mut results: Results) -> Result<bool> {
    let mut all = Row::new()?;
    println!(
        "{} over {}: {} rounds, seed {}, liveness {} ms, {} at a time",
        name(stall),
        options.transport,
        options.rounds,
        options.seed,
        options.liveness,
        options.jobs
    );
    print!("{:<16}{:>7}{:>11}", "phase", "rounds", "confirmed");
    KINDS.iter().for_each(|(_, title)| print!("{title:>13}"));
    println!("{:>14}{:>10}{:>10}", "detected p50", "p99", "max, ms");
    for (phase, row) in &results.rows {
        print_row(phase.name(), row);
        all.add(row)?;
    }
    print_row("all", &all);
    println!(
        "{} transfers and {} notifications arrived; deregistration was held up {} times",
        results.completed, results.notifications, results.busy
    );
    let mut good = results.problems.is_empty();
    if stall {
        let rounds = results.seeds.len();
        println!(
            "{} of {rounds} rounds: transfers failed in a short stop amid waits for a core",
            results.excused
        );
        // A machine on which that is common shows nothing.
        good &= results.excused < 3 || results.excused * 10 <= rounds;
    }
    for row in &results.rows {
        if row.1.confirmed < options.confirmed {
            good = false;
            println!("only {} rounds confirmed in phase {}", row.1.confirmed, row.0.name());
        }
    }
    if !stall {
        println!("{}", results.slowest.1);
        histogram(&all.detection);
        good &= judge_detection(options, &results, &all);
    }
    for samples in &mut results.usage {
        good &= samples.report();
    }
    results.problems.iter().take(40).for_each(|problem| println!("{problem}"));
    println!(
        "{}: {} problems, of them {} errors where none may be",
        if good { "good" } else { "BAD" },
        results.problems.len(),
        results.failed
    );
    Ok(good)
}

fn print_row(name: &str, row: &Row) {
    print!("{name:<16}{:>7}{:>11}", row.rounds, row.confirmed);
    row.counts.iter().for_each(|count| print!("{count:>13}"));
    let at = |quantile| ms(row.detection.value_at_quantile(quantile));
    println!("{:>14}{:>10}{:>10}", at(0.5), at(0.99), ms(row.detection.max()));
}

/// How many rounds took how long, in steps of a factor of two.
fn histogram(detection: &Histogram<u64>) {
    println!("{:>10}{:>8}", "up to ms", "rounds");
    let mut low = 0;
    for step in 0..24 {
        let high = 125u64 << step;
        let count = detection.count_between(low, high - 1);
        if count > 0 {
            let bar = "#".repeat((count * 50).div_ceil(detection.len()) as usize);
            println!("{:>10}{count:>8} {bar}", ms(high));
        }
        low = high;
    }
}

/// From so many rounds on, the last hundredth of them says more than what else the machine had to do in one of them.
const ROUNDS_FOR_P99: u64 = 500;

/// The death of a peer is seen, and not waited for: in each phase half of the rounds have to be as fast as that is, and not one so
/// slow that a timeout may have ended it.
fn judge_detection(options: &Options, results: &Results, all: &Row) -> bool {
    let at = |histogram: &Histogram<u64>, quantile| histogram.value_at_quantile(quantile);
    if !results.with_ballast.is_empty() {
        let (count, with) = (results.with_ballast.len(), &results.with_ballast);
        let (p50, p99) = (ms(at(with, 0.5)), ms(at(with, 0.99)));
        println!(
            "victims with 1 GiB more: {count} rounds, p50 {p50}, p99 {p99}, max {} ms",
            ms(with.max())
        );
    }
    let (less, target) = match options.transport {
        TransportKind::Local => ("", 10_000.0),
        _ => (" less 80 ms for each resident GiB", 50_000.0),
    };
    let bound = (target * options.slack) as u64;
    let mut good = true;
    let mut judge = |what: &str, us: u64, bound: u64| {
        let within = if us <= bound { "within" } else { "NOT within" };
        println!("detection{less}: {what} {} ms, {within} {}", ms(us), ms(bound));
        good &= us <= bound;
    };
    for (phase, row) in results.rows.iter().filter(|(_, row)| !row.judged.is_empty()) {
        judge(&format!("p50 of {}", phase.name()), at(&row.judged, 0.5), bound);
    }
    if all.judged.len() >= ROUNDS_FOR_P99 {
        judge("p99", at(&all.judged, 0.99), bound);
    }
    // Those of connecting and of connecting again are as long.
    judge("max", all.judged.max(), options.liveness * 1000 / 2);
    good
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a campaign is good in which deaths are noticed after so many milliseconds, of liveness 5 s and slack 10.
    fn is_good(phases: &[&[u64]]) -> bool {
        let options = Options {
            transport: TransportKind::Local,
            rounds: 0,
            seed: 1,
            phase: None,
            liveness: 5000,
            jobs: 1,
            slack: 10.0,
            ballast_every: 0,
            confirmed: 0,
            log: None,
        };
        let (mut rows, mut all) = (Vec::new(), Row::new().unwrap());
        for (phase, rounds) in Phase::ALL.into_iter().zip(phases) {
            let mut row = Row::new().unwrap();
            rounds.iter().for_each(|ms| row.judged.record(ms * 1000).unwrap());
            all.add(&row).unwrap();
            rows.push((phase, row));
        }
        judge_detection(&options, &Results::new(options.transport, rows, None).unwrap(), &all)
    }

    #[test]
    fn a_machine_that_stalls_is_borne_and_a_death_that_a_timeout_notices_is_not() {
        let fast = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
        assert!(is_good(&[&fast, &[3, 3, 640, 3, 1031, 3, 505, 3]]));
        assert!(!is_good(&[&fast, &[3, 3, 3, 5001]]), "by the liveness timeout");
        assert!(!is_good(&[&fast, &[3, 400, 400, 400]]), "slow in one phase, most of the time");
        assert!(is_good(&[&[3; 600]]));
        let some_slow: Vec<u64> =
            (0..600).map(|round| if round % 50 == 0 { 400 } else { 3 }).collect();
        assert!(!is_good(&[&some_slow]), "two of a hundred, which so many rounds show");
    }
}
