//! The percentile distribution text of HdrHistogram, which its plotter and most tools of the field read.

use std::fmt::Write as _;

use hdrhistogram::Histogram;

/// Steps per halving of the distance to 100%, as `outputPercentileDistribution` of the Java original uses.
const TICKS_PER_HALF_DISTANCE: u32 = 5;
const SUB_BUCKETS: u32 = 2048;

/// Values in microseconds.
pub(crate) fn percentile_distribution(histogram: &Histogram<u64>) -> String {
    let us = |ns: f64| ns / 1e3;
    let mut text = format!(
        "{:>12} {:>14} {:>10} {:>14}\n\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    );
    let mut total = 0;
    for step in histogram.iter_quantiles(TICKS_PER_HALF_DISTANCE) {
        total += step.count_since_last_iteration();
        let quantile = step.quantile_iterated_to();
        let value = us(step.value_iterated_to() as f64);
        let _ = if quantile < 1.0 {
            writeln!(
                text,
                "{value:12.3} {quantile:2.12} {total:10} {:14.2}",
                1.0 / (1.0 - quantile)
            )
        } else {
            writeln!(text, "{value:12.3} {quantile:2.12} {total:10}")
        };
    }
    let buckets = u32::from(histogram.buckets());
    let _ = write!(
        text,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]\n\
         #[Max     = {:12.3}, Total count    = {:12}]\n\
         #[Buckets = {buckets:12}, SubBuckets     = {SUB_BUCKETS:12}]\n",
        us(histogram.mean()),
        us(histogram.stdev()),
        us(histogram.max() as f64),
        histogram.len(),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distribution() -> String {
        let mut histogram = crate::measure::histogram();
        (1..=10_000u64).for_each(|n| histogram.record(n * 100).expect("in range"));
        percentile_distribution(&histogram)
    }

    #[test]
    fn the_header_and_footer_are_those_of_the_original() {
        let text = distribution();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("       Value     Percentile TotalCount 1/(1-Percentile)"));
        assert_eq!(lines.next(), Some(""));
        let footer: Vec<&str> = text.lines().filter(|line| line.starts_with("#[")).collect();
        assert_eq!(footer.len(), 3);
        assert!(footer[0].starts_with("#[Mean    =      500."), "{}", footer[0]);
        assert!(footer[0].contains(", StdDeviation   = "));
        assert!(
            footer[1].starts_with("#[Max     =     10")
                && footer[1].ends_with("Total count    =        10000]")
        );
        assert!(footer[2].ends_with("SubBuckets     =         2048]"));
    }

    /// What the public plotter does with a line: split at white space, keep four numbers.
    #[test]
    fn the_body_can_be_plotted() {
        let text = distribution();
        let rows: Vec<Vec<f64>> = text
            .lines()
            .skip(2)
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                line.split_whitespace().map(|field| field.parse().expect("a number")).collect()
            })
            .collect();
        assert!(rows.len() > 20);
        let (last, body) = rows.split_last().expect("rows");
        assert_eq!((last.len(), last[1], last[2]), (3, 1.0, 10_000.0));
        for row in body {
            assert_eq!(row.len(), 4);
            assert!((row[3] - 1.0 / (1.0 - row[1])).abs() / row[3] < 0.02, "{row:?}");
        }
        assert!(rows.windows(2).all(|pair| pair[0][0] <= pair[1][0] && pair[0][1] <= pair[1][1]));
    }

    #[test]
    fn an_empty_histogram_is_still_a_file() {
        let text = percentile_distribution(&crate::measure::histogram());
        assert!(text.contains("Total count    =            0]"));
    }
}
