//! What is told of runs.

use std::time::Instant;

use corelane::sim::Mutation;
use corelane::sim::coverage::{
    Arrival, Coverage, Event, InboxState, SessionState, TransferEvent, TransferState,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::promise::{Promise, Violation};
use crate::runs::{Many, Outcome, many};

fn bar(count: u64) -> ProgressBar {
    let bar = ProgressBar::new(count);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {eta} left") {
        bar.set_style(style);
    }
    bar
}

/// Runs seeds of the protocol as it is.
pub(crate) fn clean_runs(
    from: u64,
    count: u64,
    jobs: usize,
    engines: Option<usize>,
    coverage: bool,
) -> bool {
    let (bar, began) = (bar(count), Instant::now());
    let Many { total, ran, first, coverage: reached } =
        many(from, count, jobs, None, engines, &|| bar.inc(1));
    bar.finish_and_clear();
    tell_totals(&total, ran, began);
    if let Some((seed, Violation { promise, text })) = first {
        println!("seed {seed} breaks \"{}\": {text}", promise.name());
        println!("replay it: cargo run -p corelane-sim -- --seed {seed}");
        return false;
    }
    println!("every promise is kept");
    !coverage || tell_coverage(&reached)
}

fn tell_totals(total: &Outcome, ran: u64, began: Instant) {
    println!(
        "{ran} seeds in {:.1} s: {} engines ({} died), {} steps, {:.1} hours of virtual time",
        began.elapsed().as_secs_f64(),
        total.engines,
        total.crashes,
        total.steps,
        total.virtual_ms as f64 / 3_600_000.0,
    );
    println!(
        "{} postings ({} transfers ended well at last), {} bytes moved; {} notifications sent, {} seen",
        total.transfers, total.done, total.bytes, total.notes, total.seen
    );
}

/// Prints a table of counts; the answer is what was expected and never reached.
fn table(
    title: &str,
    rows: &[&'static str],
    columns: &[&'static str],
    counts: &[Vec<u64>],
    is_expected: &dyn Fn(usize, usize) -> bool,
) -> Vec<String> {
    let mut missing = Vec::new();
    let (mut expected, mut reached) = (0, 0);
    println!("\n{title}");
    let width = columns.iter().map(|column| column.len()).max().unwrap_or(0);
    print!("{:width$}", "");
    for row in rows {
        print!("  {row:>20}");
    }
    println!();
    for (column, name) in columns.iter().enumerate() {
        print!("{name:width$}");
        for (row, state) in rows.iter().enumerate() {
            let count = counts[row][column];
            let wanted = is_expected(row, column);
            expected += u32::from(wanted);
            reached += u32::from(wanted && count > 0);
            let shown = match (wanted, count) {
                (true, 0) => "MISSING".to_owned(),
                (false, 0) => "-".to_owned(),
                (true, count) => count.to_string(),
                (false, count) => format!("({count})"),
            };
            print!("  {shown:>20}");
            if wanted && count == 0 {
                missing.push(format!("{state} x {name}"));
            }
        }
        println!();
    }
    println!("{reached} of {expected} expected pairs were reached");
    missing
}

fn tell_coverage(reached: &Coverage) -> bool {
    let mut missing = table(
        "Sessions: state x event",
        &SessionState::ALL.iter().map(|s| s.name()).collect::<Vec<_>>(),
        &Event::ALL.iter().map(|e| e.name()).collect::<Vec<_>>(),
        &reached.sessions,
        &|state, event| crate::expected::session(SessionState::ALL[state], Event::ALL[event]),
    );
    missing.extend(table(
        "Transfers: state x event",
        &TransferState::ALL.iter().map(|s| s.name()).collect::<Vec<_>>(),
        &TransferEvent::ALL.iter().map(|e| e.name()).collect::<Vec<_>>(),
        &reached.transfers,
        &|state, event| {
            crate::expected::transfer(TransferState::ALL[state], TransferEvent::ALL[event])
        },
    ));
    missing.extend(table(
        "Notifications that arrive: state of the receiver x event",
        &InboxState::ALL.iter().map(|s| s.name()).collect::<Vec<_>>(),
        &Arrival::ALL.iter().map(|e| e.name()).collect::<Vec<_>>(),
        &reached.arrivals,
        &|_, _| true,
    ));
    if !missing.is_empty() {
        println!("\nnever reached: {}", missing.join(", "));
    }
    missing.is_empty()
}

pub(crate) fn list_mutations() {
    let width = Mutation::ALL.iter().map(|m| m.name().len()).max().unwrap_or(0);
    for mutation in Mutation::ALL {
        println!("{:width$}  {:<16} {}", mutation.name(), mutation.breaks(), mutation.describe());
    }
    println!("\nPromises:");
    for promise in Promise::ALL {
        println!("{:<16} {}", promise.name(), promise.text());
    }
}

pub(crate) fn all_mutations(from: u64, count: u64, jobs: usize) -> bool {
    some_mutations(Mutation::ALL, from, count, jobs)
}

/// Runs each variant until it is found out; true: all are, and every promise was broken by two of them.
pub(crate) fn some_mutations(variants: &[Mutation], from: u64, count: u64, jobs: usize) -> bool {
    let mut hits = vec![0; Promise::ALL.len()];
    let mut missed = Vec::new();
    println!("| variant | written to break | found out | at seed | runs |");
    println!("|---|---|---|---|---|");
    for variant in variants {
        let found = many(from, count, jobs, Some(*variant), None, &|| {});
        match found.first {
            Some((seed, Violation { promise, .. })) => {
                hits[promise as usize] += 1;
                println!(
                    "| `{}`: {} | {} | {} | {seed} | {} |",
                    variant.name(),
                    variant.describe(),
                    variant.breaks(),
                    promise.name(),
                    found.ran
                );
            }
            None => {
                missed.push(variant.name());
                println!(
                    "| `{}`: {} | {} | **not found out** | | {} |",
                    variant.name(),
                    variant.describe(),
                    variant.breaks(),
                    found.ran
                );
            }
        }
    }
    if variants.len() < Mutation::ALL.len() {
        return missed.is_empty();
    }
    println!("\n| promise | found broken by |\n|---|---|");
    let mut rare = Vec::new();
    for (promise, hits) in Promise::ALL.iter().zip(&hits) {
        println!("| {} | {hits} variants |", promise.name());
        if *hits < 2 {
            rare.push(promise.name());
        }
    }
    if !missed.is_empty() {
        println!("\nnot found out: {}", missed.join(", "));
    }
    if !rare.is_empty() {
        println!("\nhit less than twice: {}", rare.join(", "));
    }
    missed.is_empty() && rare.is_empty()
}
