//! Scenario `fault`: a target that dies, or stops, while it is read from. When does the initiator learn of it, and when does
//! it read again?

use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::ValueEnum;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::backend::Contender;
use super::case::{NixlCase, NixlScenario};
use super::options::{NixlArgs, NixlPlan};
use super::pair::NixlPair;
use crate::case::Operation;
use crate::clock::now_ns;
use crate::report::{Spread, align};
use crate::session::Failure;

/// What a process says of bytes that are not those expected.
pub(crate) const VERIFICATION_FAILED: &str = "verification failed";

/// What happens to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FaultKind {
    /// SIGKILL; another target takes its place afterwards
    Kill,
    /// SIGSTOP; SIGCONT afterwards
    Stop,
}

impl FaultKind {
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
        }
    }
}

/// What became of a fault in one round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Fault {
    pub(crate) backend: String,
    pub(crate) kind: FaultKind,
    /// Reads that ended before one failed, or the time was over.
    pub(crate) reads_ended: u64,
    /// The longest time without the end of a read until then: a target that is stopped may still be read from, by copies
    /// that need nobody there.
    pub(crate) longest_stall_ms: f64,
    /// From the signal to the moment at which a transfer told of an error; `None` where none did in time.
    pub(crate) detected_ms: Option<f64>,
    /// As the backend tells it.
    pub(crate) error: String,
    /// From the introduction of the new target, or from SIGCONT, to the end of the first verified read; `None` where there
    /// was none.
    pub(crate) recovered_ms: Option<f64>,
    pub(crate) recovery_error: String,
}

/// What the initiator saw while its target went away.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Watched {
    pub(crate) ended: u64,
    pub(crate) longest_stall_ns: u64,
    /// When a transfer failed; `None` where the time was over first.
    pub(crate) failed_ns: Option<u64>,
    pub(crate) error: String,
}

/// The read that is repeated.
pub(crate) fn case() -> NixlCase {
    NixlCase {
        scenario: NixlScenario::Fault,
        operation: Operation::Read,
        blocks: 1,
        block_bytes: 4096,
        notification_bytes: 0,
        load: None,
        trace: None,
        threads: 1,
    }
}

/// Runs one fault on processes of its own.
pub(crate) fn run(
    kind: FaultKind,
    backend: &Contender,
    options: &NixlArgs,
    plan: &NixlPlan,
    nixl: &mut String,
) -> Result<Fault, Failure> {
    let case = case();
    let mut pair = NixlPair::start(backend, options, plan)?;
    nixl.clone_from(&pair.nixl);
    pair.measure(&case, Duration::ZERO, options.iterations())?;
    let limit = options.fault_timeout;
    pair.watch(&case, options.fault_at + limit)?;
    std::thread::sleep(options.fault_at);
    let at = now_ns();
    pair.signal_target(match kind {
        FaultKind::Kill => Signal::SIGKILL,
        FaultKind::Stop => Signal::SIGSTOP,
    })?;
    let watched = pair.watched(options.fault_at + limit)?;
    let begin;
    let recovered = match kind {
        FaultKind::Kill => {
            pair.replace_target(backend, options, plan)?;
            begin = now_ns();
            pair.introduce().and_then(|()| pair.read_once(&case))
        }
        FaultKind::Stop => {
            begin = now_ns();
            pair.signal_target(Signal::SIGCONT)?;
            pair.read_once(&case)
        }
    };
    let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
    let (recovered_ns, recovery_error) = recovery(recovered)?;
    Ok(Fault {
        backend: backend.to_string(),
        kind,
        reads_ended: watched.ended,
        longest_stall_ms: watched.longest_stall_ns as f64 / 1e6,
        detected_ms: watched.failed_ns.map(|failed| ms(at, failed)),
        error: watched.error,
        recovered_ms: recovered_ns.map(|ended| ms(begin, ended)),
        recovery_error,
    })
}

/// When the first read ended, or why there was none. That a backend does not read again is a result; that it reads something
/// else is the end of the run.
fn recovery(read: Result<u64, Failure>) -> Result<(Option<u64>, String), Failure> {
    let message = match &read {
        Ok(ended_ns) => return Ok((Some(*ended_ns), String::new())),
        Err(Failure::Options(message)) => message.clone(),
        Err(Failure::Run(error)) => format!("{error:#}"),
    };
    if message.contains(VERIFICATION_FAILED) {
        return Err(anyhow!("after the target was gone: {message}").into());
    }
    Ok((None, message))
}

/// Initiator: reads until a transfer fails, at most for `limit_ns`.
#[cfg(feature = "nixl")]
pub(crate) fn watch<D: super::driver::Driver>(
    agent: &D,
    case: &NixlCase,
    limit_ns: u64,
    seed: u64,
) -> Result<Watched> {
    let layout = super::layout::NixlLayout::new(case, seed);
    let prepared = agent.prepare(case.operation, layout.slot(0, case.blocks), case.block_bytes)?;
    let end = now_ns() + limit_ns;
    let mut watched =
        Watched { ended: 0, longest_stall_ns: 0, failed_ns: None, error: String::new() };
    let mut last = now_ns();
    let read = || -> Result<bool> {
        if agent.post(&prepared)? {
            return Ok(true);
        }
        while now_ns() < end {
            if agent.is_finished(&prepared)? {
                return Ok(true);
            }
        }
        Ok(false)
    };
    while now_ns() < end {
        match read() {
            Ok(true) => {
                let now = now_ns();
                watched.ended += 1;
                watched.longest_stall_ns = watched.longest_stall_ns.max(now - last);
                last = now;
            }
            Ok(false) => break,
            Err(error) => {
                watched.failed_ns = Some(now_ns());
                watched.error = format!("{error:#}");
                break;
            }
        }
    }
    watched.longest_stall_ns = watched.longest_stall_ns.max(now_ns() - last);
    Ok(watched)
}

/// A row for each backend and kind; empty without faults.
pub(crate) fn table(faults: &[Fault], limit: Duration) -> String {
    let header = [
        "fault",
        "backend",
        "rounds",
        "longest stall ms",
        "detected ms",
        "min..max",
        "recovered ms",
        "min..max",
        "as",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let mut seen: Vec<(FaultKind, &str)> = Vec::new();
    for fault in faults {
        let group = (fault.kind, fault.backend.as_str());
        if seen.contains(&group) {
            continue;
        }
        seen.push(group);
        let of_group: Vec<&Fault> =
            faults.iter().filter(|other| (other.kind, other.backend.as_str()) == group).collect();
        let mut cells =
            vec![fault.kind.name().to_owned(), fault.backend.clone(), of_group.len().to_string()];
        let stall = of_group.iter().map(|fault| fault.longest_stall_ms).fold(0.0, f64::max);
        cells.push(format!("{stall:.2}"));
        let detected = of_group.iter().map(|fault| fault.detected_ms);
        let never = format!("not in {} s", limit.as_secs_f64());
        cells.extend(spread(detected.collect(), &never));
        let recovered = of_group.iter().map(|fault| fault.recovered_ms);
        cells.extend(spread(recovered.collect(), "never"));
        let why = of_group.iter().find_map(|fault| {
            [&fault.error, &fault.recovery_error].into_iter().find(|text| !text.is_empty())
        });
        cells.push(why.map_or_else(|| "-".to_owned(), |why| why.chars().take(80).collect()));
        rows.push(cells);
    }
    if rows.len() == 1 { String::new() } else { align(&rows, 2) }
}

/// Median and range; a round without a figure has more weight than any that has one.
fn spread(values: Vec<Option<f64>>, never: &str) -> [String; 2] {
    let missing = values.iter().filter(|value| value.is_none()).count();
    match Spread::of(values.into_iter().flatten().collect()) {
        Some(spread) if missing == 0 => {
            [format!("{:.2}", spread.median), format!("{:.2}..{:.2}", spread.min, spread.max)]
        }
        Some(spread) => {
            [never.to_owned(), format!("{missing} x, else {:.2}..{:.2}", spread.min, spread.max)]
        }
        None => [never.to_owned(), "-".to_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(backend: &str, detected_ms: Option<f64>) -> Fault {
        Fault {
            backend: backend.to_owned(),
            kind: FaultKind::Kill,
            reads_ended: 5,
            longest_stall_ms: 0.25,
            detected_ms,
            error: detected_ms.map_or_else(String::new, |_| "remote disconnect".to_owned()),
            recovered_ms: detected_ms.map(|_| 12.0),
            recovery_error: String::new(),
        }
    }

    #[test]
    fn wrong_bytes_after_a_fault_fail_the_run_and_a_backend_that_is_gone_does_not() {
        let run = |message: &str| recovery(Err(Failure::Run(anyhow!("{message}"))));
        let gone = run("the UCX initiator ended unexpectedly").expect("a result");
        assert_eq!(gone, (None, "the UCX initiator ended unexpectedly".to_owned()));
        let wrong = run("the UCX initiator: read/4KiB: verification failed: block 0: corrupt");
        assert!(wrong.is_err_and(|why| why.to_string().contains("block 0: corrupt")));
        assert_eq!(recovery(Ok(7)).expect("read"), (Some(7), String::new()));
    }

    #[test]
    fn a_round_that_noticed_nothing_is_not_averaged_away() {
        let faults = [
            fault("CORELANE", Some(0.5)),
            fault("CORELANE", Some(1.5)),
            fault("UCX", Some(9.0)),
            fault("UCX", None),
            fault("OTHER", None),
        ];
        let table = table(&faults, Duration::from_secs(5));
        let row = |backend: &str| {
            table.lines().find(|line| line.contains(backend)).unwrap_or_else(|| panic!("{table}"))
        };
        assert!(
            row("CORELANE").contains("1.00") && row("CORELANE").contains("0.50..1.50"),
            "{table}"
        );
        assert!(row("CORELANE").contains("remote disconnect"), "{table}");
        assert!(
            row("UCX").contains("not in 5 s") && row("UCX").contains("1 x, else 9.00..9.00"),
            "{table}"
        );
        assert!(row("OTHER").contains("never"), "{table}");
        assert_eq!(super::table(&[], Duration::from_secs(1)), "");
    }
}
