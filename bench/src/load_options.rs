//! Options of scenario `decode-under-prefill`, which `loopback`, `client` and `nixl` share.

use std::time::Duration;

use clap::Args;

use crate::measure::LoadShape;
use crate::units::{parse_bytes, parse_duration};

#[derive(Clone, Debug, Args)]
pub(crate) struct LoadArgs {
    /// Bytes of the small reads of scenario `decode-under-prefill`
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "4KiB", help_heading = "Cases")]
    pub(crate) decode_bytes: usize,
    /// How many of them are due per second, whatever became of the ones before
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "Cases")]
    pub(crate) decode_rate: u32,
    /// Bytes of the large writes beside them, back to back
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "64MiB", help_heading = "Cases")]
    pub(crate) prefill_bytes: usize,
    /// Time of each of the three phases (reads alone, writes alone, both), in every round
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "2s", help_heading = "Cases")]
    pub(crate) phase_duration: Duration,
}

impl LoadArgs {
    /// Of one phase, refused where a process would be given up before it ends.
    pub(crate) fn phase_duration(&self) -> Result<Duration, String> {
        const LONGEST: Duration = Duration::from_secs(60);
        if self.phase_duration > LONGEST {
            return Err(format!("--phase-duration is at most {} s", LONGEST.as_secs()));
        }
        Ok(self.phase_duration)
    }

    pub(crate) fn shape(&self) -> LoadShape {
        LoadShape { reads_per_s: self.decode_rate, bulk_bytes: self.prefill_bytes }
    }
}
