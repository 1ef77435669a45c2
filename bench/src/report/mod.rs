//! From outcomes to what people and programs read: a table, ratios, histogram files, results.json, five lines.

mod files;
mod hgrm;
mod results;
mod summary;
mod table;
mod tally;

pub(crate) use files::{Output, ensure_writable, write_atomically};
pub(crate) use hgrm::percentile_distribution;
pub(crate) use results::{
    Environment, Options, Percentiles, Results, SCHEMA_VERSION, Series, Spread,
};
pub(crate) use summary::summary;
pub(crate) use table::{align, comparison_table, difference, series_table};
pub(crate) use tally::{Tally, comparisons};
