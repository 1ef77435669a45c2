//! From outcomes to what people and programs read: a table, ratios, histogram files, results.json, five lines.

mod costs;
mod files;
mod hgrm;
mod load;
mod results;
mod summary;
mod table;
mod tally;

pub(crate) use costs::Costs;
pub(crate) use files::{Output, ensure_writable, write_atomically};
pub(crate) use hgrm::percentile_distribution;
#[cfg(test)]
pub(crate) use load::tests::outcome as load_outcome;
pub(crate) use load::{Load, LoadTally, load_table};
pub(crate) use results::{
    Environment, Options, Percentiles, Results, SCHEMA_VERSION, Series, Spread,
};
pub(crate) use summary::summary;
pub(crate) use table::{align, comparison_table, difference, series_table};
pub(crate) use tally::{Tally, comparisons};
