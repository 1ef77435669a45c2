//! Axes: from values to places, and where to write which numbers.

/// A logarithmic axis of a quantity.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogAxis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl LogAxis {
    /// An axis that shows all positive `values`, from place `from` to place `to`.
    pub(crate) fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (low, high) = values
            .filter(|value| value.is_finite() && *value > 0.0)
            .fold((f64::MAX, 0.0f64), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = if low > high { (1.0, 10.0) } else { (low, high) };
        // Something is always between the ends, and nothing lies on them.
        let (low, high) = (low / 1.15, high * 1.15);
        let (low, high) = if high / low < 2.0 { (low / 1.3, high * 1.3) } else { (low, high) };
        Self { low, high, from, to }
    }

    /// The place of a value; what does not fit is at the edge.
    pub(crate) fn at(&self, value: f64) -> f64 {
        let share =
            (value.max(self.low).min(self.high) / self.low).ln() / (self.high / self.low).ln();
        self.from + share * (self.to - self.from)
    }

    /// Values to label: decades, and where there are few of them 2 and 5 of each, or finer.
    pub(crate) fn ticks(&self) -> Vec<f64> {
        let decades = (self.high / self.low).log10();
        let steps: &[f64] = match decades {
            _ if decades > 3.0 => &[1.0],
            _ if decades > 1.2 => &[1.0, 2.0, 5.0],
            _ if decades > 0.55 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
            _ => &[1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        };
        let first = self.low.log10().floor() as i32;
        let last = self.high.log10().ceil() as i32;
        (first..=last)
            .flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)))
            .filter(|value| (self.low..=self.high).contains(value))
            .collect()
    }
}

/// The percentile axis of HdrHistogram's plots: every step to the right is a tenth of the operations left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TailAxis {
    /// Nines at the right end.
    nines: f64,
    from: f64,
    to: f64,
}

impl TailAxis {
    /// An axis for `count` operations: as far as they say anything, and at least to 99%.
    pub(crate) fn for_count(count: u64, from: f64, to: f64) -> Self {
        Self { nines: (count.max(1) as f64).log10().clamp(2.0, 7.0), from, to }
    }

    /// The place of the quantile with this share above it.
    pub(crate) fn at(&self, above: f64) -> f64 {
        let nines = if above > 0.0 { (-above.log10()).clamp(0.0, self.nines) } else { self.nines };
        self.from + nines / self.nines * (self.to - self.from)
    }

    /// Share above, and label.
    pub(crate) fn ticks(&self) -> Vec<(f64, String)> {
        let mut ticks = vec![(1.0, "0".to_owned()), (0.5, "50%".to_owned())];
        for nines in 1..=self.nines.floor() as usize {
            let label = match nines {
                1 => "90%".to_owned(),
                2 => "99%".to_owned(),
                more => format!("99.{}%", "9".repeat(more - 2)),
            };
            ticks.push((10f64.powi(-(nines as i32)), label));
        }
        ticks
    }
}

/// Microseconds with a unit that fits.
pub(crate) fn time_label(us: f64) -> String {
    let (value, unit) = match us {
        _ if us >= 1e6 => (us / 1e6, "s"),
        _ if us >= 1e3 => (us / 1e3, "ms"),
        _ if us >= 1.0 => (us, "us"),
        _ => (us * 1e3, "ns"),
    };
    format!("{} {unit}", number(value))
}

/// Gigabytes per second with a unit that fits.
pub(crate) fn rate_label(gigabytes_per_s: f64) -> String {
    match gigabytes_per_s {
        rate if rate >= 1.0 => format!("{} GB/s", number(rate)),
        rate if rate >= 1e-3 => format!("{} MB/s", number(rate * 1e3)),
        rate => format!("{} kB/s", number(rate * 1e6)),
    }
}

/// A number without what it does not need.
pub(crate) fn number(value: f64) -> String {
    let text = match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    };
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_axis_keeps_its_values_inside_and_labels_some() {
        for values in [vec![1.0], vec![3.0, 3.1], vec![0.2, 9e6], vec![], vec![f64::NAN, 0.0]] {
            let axis = LogAxis::around(values.iter().copied(), 300.0, 20.0);
            let ticks = axis.ticks();
            assert!((2..=16).contains(&ticks.len()), "{values:?}: {ticks:?}");
            for value in values.iter().copied().filter(|value| *value > 0.0).chain(ticks) {
                assert!((20.0..=300.0).contains(&axis.at(value)), "{value}");
            }
            assert!(axis.at(0.0).is_finite() && axis.at(f64::INFINITY).is_finite());
        }
    }

    #[test]
    fn the_tail_ends_where_the_operations_do() {
        let axis = TailAxis::for_count(20_000, 0.0, 100.0);
        let labels: Vec<String> = axis.ticks().into_iter().map(|tick| tick.1).collect();
        assert_eq!(labels, ["0", "50%", "90%", "99%", "99.9%", "99.99%"]);
        assert_eq!((axis.at(1.0), axis.at(0.0)), (0.0, 100.0));
        assert!(axis.at(0.1) < axis.at(0.01));
        assert_eq!(TailAxis::for_count(1, 0.0, 1.0).ticks().len(), 4);
    }

    #[test]
    fn labels_are_short_and_have_units() {
        let labels: Vec<String> = [0.05, 1.5, 20.0, 1500.0, 2e6].map(time_label).into();
        assert_eq!(labels, ["50 ns", "1.5 us", "20 us", "1.5 ms", "2 s"]);
        let labels: Vec<String> = [12.0, 0.05, 0.00002].map(rate_label).into();
        assert_eq!(labels, ["12 GB/s", "50 MB/s", "20 kB/s"]);
    }
}
