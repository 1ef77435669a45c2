//! How far a run is: a bar on a terminal, a line per scenario and round elsewhere.
//!
//! Drawn only between runs, by the coordinator, and never by a ticking thread: a redraw in the middle of a
//! measurement would show up in it.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use clap::ValueEnum as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::case::{Case, Scenario};

/// Reports progress on standard error, so that the table can be piped.
pub(crate) struct Progress {
    shown: Shown,
    measured: Duration,
}

enum Shown {
    Bar(ProgressBar),
    Lines {
        last: Option<(usize, Scenario)>,
        begin: Instant,
    },
    #[cfg(test)]
    Nothing,
}

impl Progress {
    /// Progress of a plan with `runs` runs.
    pub(crate) fn new(runs: usize) -> Self {
        let shown = if std::io::stderr().is_terminal() {
            let bar =
                ProgressBar::with_draw_target(Some(runs as u64), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {elapsed}  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            Shown::Bar(bar)
        } else {
            Shown::Lines { last: None, begin: Instant::now() }
        };
        Self { shown, measured: Duration::ZERO }
    }

    /// Reports nothing.
    #[cfg(test)]
    pub(crate) fn silent() -> Self {
        Self { shown: Shown::Nothing, measured: Duration::ZERO }
    }

    /// A case begins.
    pub(crate) fn case(&mut self, round: usize, rounds: usize, case: &Case) {
        match &mut self.shown {
            Shown::Bar(bar) => {
                bar.set_message(format!("round {}/{rounds}  {}", round + 1, case.id()))
            }
            Shown::Lines { last, begin } => {
                let here = (round, case.scenario);
                if last.replace(here) != Some(here) {
                    let value = case.scenario.to_possible_value();
                    let scenario = value.map_or_else(String::new, |it| it.get_name().to_owned());
                    crate::say!(
                        "[{:5.1} s] round {}/{rounds}: {scenario}",
                        begin.elapsed().as_secs_f64(),
                        round + 1
                    );
                }
            }
            #[cfg(test)]
            Shown::Nothing => {}
        }
    }

    /// A run of the current case has ended.
    pub(crate) fn ran(&mut self, took: Duration) {
        self.measured += took;
        if let Shown::Bar(bar) = &self.shown {
            bar.inc(1);
        }
    }

    /// Everything has ended.
    pub(crate) fn finish(&mut self) {
        match &self.shown {
            Shown::Bar(bar) => bar.finish_and_clear(),
            Shown::Lines { begin, .. } => {
                let (total, measured) =
                    (begin.elapsed().as_secs_f64(), self.measured.as_secs_f64());
                crate::say!("[{total:5.1} s] done, {measured:.1} s of it in runs");
            }
            #[cfg(test)]
            Shown::Nothing => {}
        }
    }
}
