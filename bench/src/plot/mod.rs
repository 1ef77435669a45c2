//! Charts of result files: `report.html` beside every run's results, and `corelane-bench plot` for later.
//!
//! ```text
//!   results.json ──from_results──> View ──charts──> SVG ──html──> report.html
//!                                                    └──png──> one file a chart, on request
//! ```

mod axis;
mod changes;
mod charts;
mod command;
mod from_results;
mod html;
#[cfg(feature = "png")]
mod png;
mod svg;
mod view;

pub(crate) use command::{PlotArgs, plot};
pub(crate) use from_results::{of_engine, of_nixl, of_peers};
pub(crate) use html::page;

#[cfg(test)]
mod tests;
