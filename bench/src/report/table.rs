//! Aligned tables.

use super::results::{Comparison, Percentiles, Series};
use crate::case::Backend;
use crate::units::microseconds;

/// One row per series.
pub(crate) fn series_table(series: &[Series]) -> String {
    let title = |text: &str| text.to_owned();
    let header = [
        "case",
        "backend",
        "ops",
        "p50 us",
        "p90",
        "p99",
        "p99.9",
        "p99.99",
        "max",
        "GB/s",
        "ops/s",
        "cpu s/GiB i",
        "t",
    ];
    let mut rows = vec![header.map(title).to_vec()];
    for row in series {
        let Percentiles { p50, p90, p99, p999, p9999, max, .. } = row.latency_us;
        let mut cells = vec![row.id.clone(), row.backend.to_string(), row.operations.to_string()];
        cells.extend(
            [p50, p90, p99, p999, p9999, max].map(|us| microseconds((us * 1e3).round() as u64)),
        );
        cells.push(optional(row.gigabytes_per_s, three_figures));
        cells.push(optional(row.operations_per_s, |rate| format!("{rate:.0}")));
        cells.push(optional(row.cpu_s_per_gib.map(|cpu| cpu.initiator), three_figures));
        cells.push(optional(row.cpu_s_per_gib.map(|cpu| cpu.target), three_figures));
        rows.push(cells);
    }
    align(&rows, 2)
}

/// One row per series that this baseline has too; empty without any.
pub(crate) fn comparison_table(comparisons: &[Comparison], baseline: Backend) -> String {
    let compared: Vec<&Comparison> =
        comparisons.iter().filter(|row| row.baseline == baseline).collect();
    let Some(first) = compared.first() else { return String::new() };
    let mut rows = vec![vec![
        format!("{} / {baseline}", first.backend),
        "p50 ratio".to_owned(),
        "lowest".to_owned(),
        "highest".to_owned(),
        "p50 diff us".to_owned(),
        "p99 ratio".to_owned(),
        "p99.9 ratio".to_owned(),
        "ops/s ratio".to_owned(),
        "rounds".to_owned(),
    ]];
    for row in compared {
        let ratio = |value: f64| format!("{value:.2}");
        rows.push(vec![
            row.id.clone(),
            ratio(row.p50_ratio.median),
            ratio(row.p50_ratio.min),
            ratio(row.p50_ratio.max),
            difference(row.p50_difference_us.median),
            ratio(row.p99_ratio.median),
            ratio(row.p999_ratio.median),
            optional(row.rate_ratio.map(|spread| spread.median), ratio),
            row.rounds.to_string(),
        ]);
    }
    align(&rows, 1)
}

/// A difference of microseconds, with its sign.
pub(crate) fn difference(us: f64) -> String {
    if us.abs() < 100.0 { format!("{us:+.2}") } else { format!("{us:+.0}") }
}

fn optional(value: Option<f64>, format: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), format)
}

/// Three significant figures without exponents.
fn three_figures(value: f64) -> String {
    match value {
        _ if value >= 100.0 => format!("{value:.0}"),
        _ if value >= 10.0 => format!("{value:.1}"),
        _ if value >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Pads every column to its widest cell; the first `left` columns to the left, figures to the right.
pub(crate) fn align(rows: &[Vec<String>], left: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let width = widths[column];
            line += &if column < left {
                format!("{gap}{cell:<width$}")
            } else {
                format!("{gap}{cell:>width$}")
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::tests::{results, series};

    #[test]
    fn columns_line_up_whatever_their_width() {
        let mut long = series("throughput/write/64KiB/w16", Backend::RawTcp, 12_345.678);
        long.gigabytes_per_s = None;
        long.cpu_s_per_gib = None;
        let table = series_table(&[series("read/64B", Backend::Corelane, 9.123), long]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 3);
        let column = |name: &str| lines[0].find(name).expect("in the header") + name.len();
        for (name, cells) in
            [("p50 us", ["9.12", "12346"]), ("p99", ["18.25", "24691"]), ("GB/s", ["0.007", "-"])]
        {
            let end = column(name);
            for (line, cell) in lines[1..].iter().zip(cells) {
                assert!(line[..end].ends_with(&format!(" {cell}")), "{name}: {line}");
            }
        }
        assert!(lines.iter().all(|line| line.len() == line.trim_end().len()));
    }

    #[test]
    fn ratios_have_two_decimals_and_nothing_to_compare_prints_nothing() {
        let table = comparison_table(&results().comparisons, Backend::RawTcp);
        assert!(table.starts_with("corelane / raw-tcp"), "{table}");
        assert!(table.contains("1.05") && table.contains("1.20"), "{table}");
        assert!(table.contains("p99.9 ratio") && table.contains(" +0.50 "), "{table}");
        assert_eq!(comparison_table(&results().comparisons, Backend::RawCma), "");
    }

    #[test]
    fn differences_have_a_sign() {
        assert_eq!([0.456, -3.0, 1234.5].map(difference), ["+0.46", "-3.00", "+1234"]);
    }

    #[test]
    fn figures_keep_three_digits() {
        assert_eq!(
            [123.4, 12.34, 1.234, 0.01234].map(three_figures),
            ["123", "12.3", "1.23", "0.012"]
        );
    }
}
