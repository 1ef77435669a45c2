//! Log lines on standard error: `corelane INFO engine started agent="decode-0" ...`.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::{LookupSpan, Registry};
use tracing_subscriber::reload;

struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> fmt::Result {
        SystemTime.format_time(&mut writer)?;
        write!(writer, " corelane {:<5} ", event.metadata().level())?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

type Level = reload::Handle<LevelFilter, Registry>;

/// Writes log lines from now on, of this level and above. The level is the process's: the last
/// engine that is created sets it. A program in Rust that has set up its own `tracing` keeps it.
pub(crate) fn set_level(level: LevelFilter) {
    static LEVEL: OnceLock<Option<Level>> = OnceLock::new();
    let handle = LEVEL.get_or_init(|| {
        let (filter, handle) = reload::Layer::new(level);
        let lines = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(std::io::stderr)
            .event_format(Line);
        let subscriber = tracing_subscriber::registry().with(filter).with(lines);
        tracing::subscriber::set_global_default(subscriber).is_ok().then_some(handle)
    });
    if let Some(handle) = handle {
        let _ = handle.modify(|filter| *filter = level);
    }
}

/// Lines that may come at once, and how long one more takes to be earned.
const BURST: u32 = 20;
const REFILL: Duration = Duration::from_millis(500);

struct Budget {
    left: u32,
    since: Instant,
}

/// Says why a call failed. Bounded in rate: a caller that repeats a mistake does not flood the log.
pub(crate) fn complain(function: &'static str, message: &str) {
    static SUPPRESSED: AtomicU64 = AtomicU64::new(0);
    static BUDGET: OnceLock<Mutex<Budget>> = OnceLock::new();
    let now = Instant::now();
    let budget = BUDGET.get_or_init(|| Mutex::new(Budget { left: BURST, since: now }));
    let mut budget = match budget.try_lock() {
        Ok(budget) => budget,
        Err(std::sync::TryLockError::Poisoned(budget)) => budget.into_inner(),
        Err(std::sync::TryLockError::WouldBlock) => return,
    };
    let earned = now.saturating_duration_since(budget.since).as_millis() / REFILL.as_millis();
    if earned > 0 {
        budget.left = BURST.min(budget.left.saturating_add(earned.min(100) as u32));
        budget.since = now;
    }
    if budget.left == 0 {
        SUPPRESSED.fetch_add(1, Ordering::Relaxed);
        return;
    }
    budget.left -= 1;
    drop(budget);
    match SUPPRESSED.swap(0, Ordering::Relaxed) {
        0 => tracing::warn!(call = function, "{message}"),
        suppressed => {
            tracing::warn!(call = function, suppressed, "{message}");
        }
    }
}
