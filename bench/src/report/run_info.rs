//! What every `results.json` begins with, and the clocks that it needs.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// When a run began, by the two clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Started {
    unix_s: u64,
    instant: Instant,
}

impl Started {
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self { unix_s: since.map_or(0, |since| since.as_secs()), instant: Instant::now() }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.instant.elapsed()
    }
}

/// Which schema the file is of, and how the run went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunInfo {
    /// What tells the file from those of other subcommands.
    pub(crate) schema: String,
    /// Grows when a field changes its meaning or goes away, not when one is added.
    pub(crate) schema_version: u32,
    /// False when a run failed: the series are those that had been measured by then.
    pub(crate) complete: bool,
    pub(crate) failure: Option<String>,
    /// Seconds since 1970 at the start.
    pub(crate) started_unix_s: u64,
    pub(crate) elapsed_s: f64,
}

impl RunInfo {
    /// Of a run that ends now; `failure` says why before it was complete.
    pub(crate) fn new(
        (schema, schema_version): (&str, u32),
        started: &Started,
        failure: Option<String>,
    ) -> Self {
        Self {
            schema: schema.to_owned(),
            schema_version,
            complete: failure.is_none(),
            failure,
            started_unix_s: started.unix_s,
            elapsed_s: started.elapsed().as_secs_f64(),
        }
    }

    /// Of a complete run, for tests.
    #[cfg(test)]
    pub(crate) fn complete(schema: &str, schema_version: u32) -> Self {
        Self {
            schema: schema.to_owned(),
            schema_version,
            complete: true,
            failure: None,
            started_unix_s: 1_700_000_000,
            elapsed_s: 12.5,
        }
    }
}
