//! How a lane is to behave.

use std::{fmt, str::FromStr, time::Duration};

use crate::placement::CoreClaim;

/// Configuration of one lane. Start from [`LaneConfig::default`].
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// Name of the thread (the kernel keeps 15 bytes) and of the lane in logs. Default: `lane`.
    pub name: String,
    /// The core to pin the lane's thread to. Default: not pinned.
    pub core: Option<usize>,
    /// The lock that makes `core` this lane's own on this host ([`crate::placement::claim_core`]); held as long as the
    /// lane lives. Without it [`AssistMode::Auto`] takes the core as shared. Default: none.
    pub claim: Option<CoreClaim>,
    /// How long an idle lane polls before it parks. Default: 50 us.
    pub spin: Spin,
    /// Whether waiting callers may turn the lane's pump. Default: [`AssistMode::Auto`].
    pub assist: AssistMode,
    /// Slots of the inbox; rounded up to a power of two. Default: 4096.
    pub inbox_slots: usize,
    /// How many idle descriptors stay hot (polled every turn, about 0.3 us each) while the lane spins. Default: 4.
    pub max_hot_fds: usize,
    /// Slots for descriptors and timers allocated at the start; more are allocated when needed. Default: 1024.
    pub expected_fds: usize,
}

impl Default for LaneConfig {
    fn default() -> Self {
        Self {
            name: "lane".to_owned(),
            core: None,
            claim: None,
            spin: Spin::default(),
            assist: AssistMode::Auto,
            inbox_slots: 4096,
            max_hot_fds: 4,
            expected_fds: 1024,
        }
    }
}

/// How long an idle lane polls before it parks.
///
/// Parses from microseconds or `inf`: `"50"`, `"0"`, `"inf"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spin {
    /// Polls this long, then parks; zero parks at once.
    For(Duration),
    /// Never parks: only for a core that nothing else needs.
    Forever,
}

impl Default for Spin {
    fn default() -> Self {
        Self::For(Duration::from_micros(50))
    }
}

/// A text that is no [`Spin`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no spin time: give microseconds (for example 50), 0 to park at once, or inf")]
pub struct ParseSpinError(String);

impl FromStr for Spin {
    type Err = ParseSpinError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "inf" => Ok(Self::Forever),
            number => match number.parse::<u32>() {
                Ok(micros) => Ok(Self::For(Duration::from_micros(micros.into()))),
                Err(_) => Err(ParseSpinError(text.to_owned())),
            },
        }
    }
}

impl fmt::Display for Spin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::For(time) => write!(f, "{}", time.as_micros()),
            Self::Forever => f.write_str("inf"),
        }
    }
}

/// Whether waiting callers may turn a lane's pump on their own threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AssistMode {
    /// They may, unless the lane has a claimed core of its own, the host has at least four allowed cores per lane, and
    /// the cgroup does not throttle us. Looked at again about once a second while the lane is idle.
    #[default]
    Auto,
    /// They may, always.
    Always,
    /// They may not: the lane is dedicated and never gives its pump away.
    Never,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spin_parses_and_prints() {
        for (text, spin) in [
            ("50", Spin::For(Duration::from_micros(50))),
            ("0", Spin::For(Duration::ZERO)),
            ("inf", Spin::Forever),
        ] {
            assert_eq!(text.parse::<Spin>(), Ok(spin));
            assert_eq!(spin.to_string(), text);
        }
        for bad in ["", "-1", "5us", "1.5", "forever"] {
            let error = bad.parse::<Spin>().unwrap_err();
            assert!(error.to_string().contains("microseconds"), "{error}");
        }
    }
}
