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
    /// Bounds of time are multiplied by this: for machines that have other things to do.
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
        Ok(Self { rounds: 0, confirmed: 0, counts: [0; KINDS.len()], detection })
    }
}

struct Results {
    rows: Vec<(Phase, Row)>,
    /// Less what the kernel takes to take the victim's memory away.
    beyond_memory: Histogram<u64>,
    with_ballast: Histogram<u64>,
    completed: u64,
    notifications: u64,
    busy: u64,
    problems: Vec<String>,
    failed: usize,
    seeds: Vec<(u64, Phase)>,
    usage: Vec<Samples>,
    log: Option<BufWriter<File>>,
}

impl Results {
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
        if let Some(us) = outcome.detection_us {
            // 80 ms for each GiB.
            let memory = outcome.resident / ((1 << 30) / 80_000);
            self.beyond_memory.saturating_record(us.saturating_sub(memory).max(1));
            if outcome.resident > 1 << 30 {
                self.with_ballast.saturating_record(us.max(1));
            }
        }
        if let Some(row) = self.row(outcome.phase) {
            row.rounds += 1;
            row.confirmed += usize::from(outcome.in_phase == [true; 2]);
            if let Some(us) = outcome.detection_us {
                row.detection.saturating_record(us.max(1));
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
    let results = Mutex::new(Results {
        rows,
        beyond_memory: Row::new()?.detection,
        with_ballast: Row::new()?.detection,
        completed: 0,
        notifications: 0,
        busy: 0,
        problems: Vec::new(),
        failed: 0,
        seeds: Vec::new(),
        usage: Vec::new(),
        log,
    });
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
        all.rounds += row.rounds;
        all.confirmed += row.confirmed;
        all.detection.add(&row.detection)?;
        all.counts.iter_mut().zip(row.counts).for_each(|(sum, count)| *sum += count);
    }
    print_row("all", &all);
    println!(
        "{} transfers and {} notifications arrived; deregistration was held up {} times",
        results.completed, results.notifications, results.busy
    );
    let mut good = results.problems.is_empty();
    for row in &results.rows {
        if row.1.confirmed < options.confirmed {
            good = false;
            println!("only {} rounds confirmed in phase {}", row.1.confirmed, row.0.name());
        }
    }
    if !stall {
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
    let (what, p99, target) = match options.transport {
        TransportKind::Local => ("p99", at(&all.detection, 0.99), 10_000.0),
        _ => ("p99 less 80 ms for each resident GiB", at(&results.beyond_memory, 0.99), 50_000.0),
    };
    let good = p99 as f64 <= target * options.slack;
    let bound = ms((target * options.slack) as u64);
    println!(
        "detection: {what} {} ms, {} {bound}",
        ms(p99),
        if good { "within" } else { "NOT within" }
    );
    good
}
