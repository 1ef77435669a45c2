//! Log lines on standard error: `... corelane INFO  engine started agent="decode-0" ...`.
//!
//! They come from lanes and from callers that drive lanes, so they never wait, neither for a reader
//! of standard error nor for each other, and take no lock that a forked child could find held.

mod limit;
mod line;

use std::fmt::{self, Write};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Once;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use limit::{Budget, Limiter};
use line::Line;

/// From the quietest. The level in effect is an index, or `UNSET`.
const LEVELS: [LevelFilter; 6] = [
    LevelFilter::OFF,
    LevelFilter::ERROR,
    LevelFilter::WARN,
    LevelFilter::INFO,
    LevelFilter::DEBUG,
    LevelFilter::TRACE,
];
const UNSET: u8 = u8::MAX;
static LEVEL: AtomicU8 = AtomicU8::new(UNSET);

fn code(level: LevelFilter) -> u8 {
    LEVELS.iter().position(|known| *known == level).map_or(UNSET, |index| index as u8)
}

fn decode(code: u8) -> Option<LevelFilter> {
    LEVELS.get(code as usize).copied()
}

/// Makes the level that was just stored count.
fn apply() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // Not where a program in Rust has set up its own `tracing`: that stays.
        let _ = tracing::subscriber::set_global_default(Lines);
    });
    tracing::callsite::rebuild_interest_cache();
}

/// Writes log lines from now on, of this level and above; returns the level before, if there was
/// one. The level is the process's: the last engine that is created sets it.
pub(crate) fn set_level(level: LevelFilter) -> Option<LevelFilter> {
    let before = LEVEL.swap(code(level), Ordering::Relaxed);
    if before != code(level) {
        apply();
    }
    decode(before)
}

/// Sets a level where none was set before.
pub(crate) fn set_first_level(level: LevelFilter) {
    if LEVEL.compare_exchange(UNSET, code(level), Ordering::Relaxed, Ordering::Relaxed).is_ok() {
        apply();
    }
}

/// Takes back a level that was set, unless there is another meanwhile, or there was none before.
pub(crate) fn take_back(level: LevelFilter, before: Option<LevelFilter>) {
    let Some(before) = before else { return };
    let (level, before) = (code(level), code(before));
    if LEVEL.compare_exchange(level, before, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
        apply();
    }
}

/// Says why a call failed. Bounded in rate: a caller that repeats a mistake does not flood the log.
/// The same message of the same function is counted, and the number told when it comes up again some
/// seconds later.
pub(crate) fn complain(function: &'static str, message: &str) {
    static SAID: Limiter = Limiter::new(1);
    static BUDGET: Budget = Budget::new();
    static SUPPRESSED: AtomicU64 = AtomicU64::new(0);
    let now = limit::now();
    let Some(repeated) = SAID.admit(limit::key_of((function, message)), now) else { return };
    if !BUDGET.spend(now) {
        SUPPRESSED.fetch_add(repeated + 1, Ordering::Relaxed);
        return;
    }
    let count = |number: u64| (number > 0).then_some(number);
    tracing::warn!(
        call = function,
        repeated = count(repeated),
        suppressed = count(SUPPRESSED.swap(0, Ordering::Relaxed)),
        "{message}"
    );
}

/// Writes all events of the process, and no spans, for there are none.
struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let level = decode(LEVEL.load(Ordering::Relaxed)).unwrap_or(LevelFilter::OFF);
        metadata.is_event() && *metadata.level() <= level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        decode(LEVEL.load(Ordering::Relaxed))
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        /// The same about the same peer, per window.
        static SAID: Limiter = Limiter::new(5);
        let metadata = event.metadata();
        // What is asked for beyond `info` is wanted whole; complaints have limits of their own.
        let limited = *metadata.level() <= Level::INFO && metadata.target() != module_path!();
        let mut suppressed = 0;
        if limited {
            match SAID.admit(subject(event), limit::now()) {
                Some(held) => suppressed = held,
                None => return,
            }
        }
        let mut line = Line::new();
        // A line cannot fail: what is too long is cut.
        let _ = SystemTime.format_time(&mut Writer::new(&mut line));
        let _ = write!(line, " corelane {:<5}", metadata.level());
        event.record(&mut Fields(&mut line));
        line::send(line, suppressed);
    }
}

/// What an event is about: the place in the code, and the peer or agent that it names.
fn subject(event: &Event<'_>) -> u64 {
    struct Subject(DefaultHasher);

    impl Write for Subject {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0.write(text.as_bytes());
            Ok(())
        }
    }

    impl Visit for Subject {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            if matches!(field.name(), "peer" | "agent") {
                let _ = write!(self, "{value:?}");
            }
        }
    }

    let mut subject = Subject(DefaultHasher::new());
    event.metadata().callsite().hash(&mut subject.0);
    event.record(&mut subject);
    subject.0.finish()
}

/// Writes the fields of an event: the message as it is, the others with their names.
struct Fields<'a>(&'a mut Line);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
