//! From outcomes to what people and programs read: a table, ratios, histogram files, results.json, five lines.

mod costs;
mod files;
mod hgrm;
mod hlog;
mod load;
mod results;
mod run_info;
mod summary;
mod table;
mod tally;
mod versus;

pub(crate) use costs::{Cost, Costs};
pub(crate) use files::{Output, ensure_writable, hgrm_name, write_atomically};
#[cfg(test)]
pub(crate) use load::tests::{load as load_of_backend, outcome as load_outcome};
pub(crate) use load::{Load, LoadTally, load_table};
pub(crate) use results::{
    Environment, Options, Percentiles, Results, SCHEMA, SCHEMA_VERSION, Series, Spread,
};
pub(crate) use run_info::{RunInfo, Started};
pub(crate) use summary::summary;
pub(crate) use table::{align, comparison_table, series_table};
pub(crate) use tally::{Row, Tally, comparisons};
pub(crate) use versus::Versus;
