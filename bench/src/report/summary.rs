//! The lines at the end: the five figures that people ask for first, and where the rest is.

use std::path::Path;

use super::load::Load;
use super::results::{Results, Series};
use crate::case::{Operation, Scenario};
use crate::units::microseconds;

/// Exactly six lines, whatever was measured.
pub(crate) fn summary(results: &Results, json: &Path, directory: &Path) -> [String; 6] {
    let ours = || results.series.iter().filter(|row| row.backend == results.options.backend);
    let smallest = |operation| {
        ours()
            .filter(|row| row.scenario == Scenario::Sizes && row.operation == operation)
            .min_by_key(|row| row.block_bytes)
    };
    let longest_list = |operation| {
        ours()
            .filter(|row| row.scenario == Scenario::Kv && row.operation == operation)
            .max_by_key(|row| row.blocks)
    };
    let notification = ours().filter(|row| row.scenario == Scenario::Notify);
    let fastest = ours().filter(|row| row.scenario == Scenario::Throughput).max_by(|a, b| {
        a.gigabytes_per_s.unwrap_or(0.0).total_cmp(&b.gigabytes_per_s.unwrap_or(0.0))
    });
    let line = |name: &str, parts: Vec<String>| {
        let parts = if parts.is_empty() { "not measured".to_owned() } else { parts.join("; ") };
        format!("{name:<14}{parts}")
    };
    let latency = |row: &Series| describe(row, results);
    let both = [Operation::Read, Operation::Write];
    let small = both.into_iter().filter_map(smallest).map(latency).collect();
    let lists = both.into_iter().filter_map(longest_list).map(latency).collect();
    let verified: u64 = results.series.iter().map(|row| row.verified_operations).sum();
    [
        line("small", small),
        line("KV blocks", lists),
        line(
            "notification",
            notification.filter(|row| row.operation == Operation::Notify).map(latency).collect(),
        ),
        line("throughput", fastest.map(latency).into_iter().collect()),
        line("beside bulk", results.loads.iter().map(|load| beside(load, results)).collect()),
        format!(
            "{:<14}{}, {}, and {} histograms (*.hgrm, *.hlog) beside; {verified} operations verified",
            "files",
            directory.join("report.html").display(),
            json.display(),
            results.series.len(),
        ),
    ]
}

fn beside(load: &Load, results: &Results) -> String {
    let id = format!("{}/loaded", load.id);
    let loaded =
        results.series.iter().find(|row| row.id == id && row.backend.to_string() == load.backend);
    let p999 = loaded.map_or(0.0, |row| row.latency_us.p999);
    format!(
        "{id} p99.9 {} us, {:.1}% served, bulk keeps {:.0}%",
        microseconds((p999 * 1e3).round() as u64),
        load.served_share * 100.0,
        load.bulk_share.median * 100.0
    )
}

fn describe(row: &Series, results: &Results) -> String {
    let us = |value: f64| microseconds((value * 1e3).round() as u64);
    let mut text =
        format!("{} p50 {} us, p99 {}", row.id, us(row.latency_us.p50), us(row.latency_us.p99));
    if let Some(rate) = row.gigabytes_per_s.filter(|&rate| rate >= 0.1) {
        text += &format!(", {rate:.2} GB/s");
    }
    let compared = results.comparisons.iter().filter(|comparison| comparison.id == row.id);
    let ratios: Vec<String> =
        compared.map(|row| format!("{:.2} x {}", row.p50_ratio.median, row.baseline)).collect();
    if !ratios.is_empty() {
        text += &format!(" ({})", ratios.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::tests::results;

    #[test]
    fn the_lines_name_the_figures_and_the_files() {
        let lines = summary(&results(), Path::new("out/results.json"), Path::new("out"));
        assert_eq!(lines[0], "small         read/64B p50 9.10 us, p99 18.20 (1.05 x raw-tcp)");
        assert_eq!(lines[1], "KV blocks     not measured");
        assert_eq!(lines[4], "beside bulk   not measured");
        let mut loaded = results();
        loaded.loads.push(crate::report::load_of_backend("corelane"));
        let lines_loaded = summary(&loaded, Path::new("r"), Path::new("o"));
        assert!(lines_loaded[4].ends_with("90.0% served, bulk keeps 75%"), "{}", lines_loaded[4]);
        assert!(
            lines[5].contains("out/results.json") && lines[5].contains("2 histograms"),
            "{}",
            lines[5]
        );
    }
}
