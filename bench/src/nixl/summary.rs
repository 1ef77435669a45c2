//! The five figures at the end of `nixl`, those that people ask for first.

use super::report::{NixlResults, NixlSeries};
use super::tally::Part;
use crate::case::Operation;
use crate::units::microseconds;

/// A line for each figure, whether measured or not.
pub(crate) fn summary(results: &NixlResults) -> [String; 5] {
    let ours = || results.series.iter().filter(|row| row.backend == results.options.backend);
    let read = |row: &&NixlSeries| row.operation == Operation::Read;
    let completed = || ours().filter(|row| row.part == Part::Completion);
    let small =
        completed().filter(|row| row.blocks == 1).min_by_key(|row| (!read(row), row.block_bytes));
    let list = completed()
        .filter(|row| row.blocks > 1)
        .max_by_key(|row| (read(row), row.blocks, row.id.starts_with("kv/")));
    let notification = ours().find(|row| row.part == Part::RoundTrip);
    let post = ours().filter(|row| row.part == Part::Post && row.blocks > 1);
    let post = post.max_by_key(|row| (read(row), row.blocks, row.id.starts_with("post/")));
    let beside = ours().find(|row| row.part == Part::Loaded);
    [
        ("small", small),
        ("KV blocks", list),
        ("notification", notification),
        ("posting", post),
        ("beside bulk", beside),
    ]
    .map(|(name, row)| {
        let text = row.map_or_else(|| "not measured".to_owned(), |row| describe(row, results));
        format!("{name:<14}{text}")
    })
}

fn describe(row: &NixlSeries, results: &NixlResults) -> String {
    let us = |value: f64| microseconds((value * 1e3).round() as u64);
    let latency = &row.latency_us;
    let mut text = format!("{} p50 {} us, p99 {}", row.id, us(latency.p50), us(latency.p99));
    if row.part == Part::Loaded {
        text += &format!(", p99.9 {}", us(latency.p999));
        let loads = results.loads.iter().filter(|load| row.id.starts_with(&load.id));
        for load in loads {
            let (served, kept) = (load.served_share * 100.0, load.bulk_share.median * 100.0);
            text += &if load.backend == row.backend {
                format!(", {served:.1}% served, bulk keeps {kept:.0}%")
            } else {
                format!("; {} serves {served:.1}%", load.backend)
            };
        }
    }
    let compared = results.comparisons.iter().filter(|comparison| comparison.id == row.id);
    let ratios: Vec<String> =
        compared.map(|row| format!("{} x {}", ratio(row.ratios.p50.median), row.vs)).collect();
    if !ratios.is_empty() {
        text += &format!(" (p50 {})", ratios.join(", "));
    }
    text
}

fn ratio(value: f64) -> String {
    if value < 0.1 { format!("{value:.4}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use crate::nixl::report::tests::compared;

    #[test]
    fn every_figure_has_its_line() {
        let lines = compared().summary();
        assert_eq!(
            lines[0],
            "small         read/64B p50 6.00 us, p99 6.00 (p50 0.55 x UCX@UCX_TLS=tcp)"
        );
        assert!(lines[2].contains("notify/16B/round-trip p50 8.0"), "{}", lines[2]);
        assert_eq!(lines[4], "beside bulk   not measured");
    }
}
