//! One backend of NIXL against another: ratios within the rounds, and their median.

use serde::{Deserialize, Serialize};

use super::results::{Percentiles, Spread};
use super::table::difference;

/// The first backend against another, in one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Versus {
    pub(crate) id: String,
    pub(crate) backend: String,
    pub(crate) vs: String,
    pub(crate) ratios: Ratios,
    /// Of the per-round differences of p50, in microseconds; above 0 the first takes longer.
    pub(crate) p50_difference_us: Spread,
    /// Of the per-round ratios of operations per second, where those were compared; above 1 the first is faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rate_ratio: Option<Spread>,
}

/// Median and range of the per-round ratios of three percentiles; below 1 the first is faster.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ratios {
    pub(crate) rounds: usize,
    pub(crate) p50: Spread,
    pub(crate) p99: Spread,
    #[serde(rename = "p99.9")]
    pub(crate) p999: Spread,
}

impl Versus {
    /// Compares two backends by their rounds; `None` without a round that both have.
    pub(crate) fn of(
        id: &str,
        (backend, ours): (&str, &[Percentiles]),
        (vs, theirs): (&str, &[Percentiles]),
    ) -> Option<Self> {
        Some(Self {
            id: id.to_owned(),
            backend: backend.to_owned(),
            vs: vs.to_owned(),
            ratios: Ratios::of(ours, theirs)?,
            p50_difference_us: Spread::of(
                ours.iter().zip(theirs).map(|(ours, theirs)| ours.p50 - theirs.p50).collect(),
            )?,
            rate_ratio: None,
        })
    }

    /// The same with the operations per second of each round.
    pub(crate) fn with_rates(self, ours: &[f64], theirs: &[f64]) -> Self {
        let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        Self { rate_ratio: Spread::of(ratios), ..self }
    }

    /// Titles of the columns that [`Versus::cells`] fills, in all of these rows.
    pub(crate) fn titles(rows: &[Self]) -> Vec<String> {
        let rates = rows.iter().any(|row| row.rate_ratio.is_some()).then_some("ops/s ratio");
        let figures = ["p50 ratio", "p99 ratio", "p99.9 ratio", "p50 diff us"].into_iter();
        figures.chain(rates).flat_map(|figure| [figure, "min..max"].map(str::to_owned)).collect()
    }

    /// The figures of a row, median and range in turn.
    pub(crate) fn cells(&self) -> Vec<String> {
        let mut cells = Vec::new();
        let ratio = |spread: Spread| {
            let Spread { median, min, max, .. } = spread;
            [ratio(median), format!("{}..{}", ratio(min), ratio(max))]
        };
        for spread in [self.ratios.p50, self.ratios.p99, self.ratios.p999] {
            cells.extend(ratio(spread));
        }
        let us = self.p50_difference_us;
        cells.push(difference(us.median));
        cells.push(format!("{}..{}", difference(us.min), difference(us.max)));
        cells.extend(self.rate_ratio.into_iter().flat_map(ratio));
        cells
    }

    /// The sentence below a table with such rows.
    pub(crate) fn explanation(backend: &str, rows: &[Self]) -> String {
        let rates = match rows.iter().any(|row| row.rate_ratio.is_some()) {
            true => format!(" Of operations per second, {backend} does more above 1."),
            false => String::new(),
        };
        // By the sign test: the median is outside where all rounds are on one side of it.
        let rounds = rows.iter().map(|row| row.ratios.rounds).min().unwrap_or(0);
        let sure = match i32::try_from(rounds) {
            Ok(rounds @ 2..) => {
                let percent = 100.0 * (1.0 - 0.5f64.powi(rounds - 1));
                format!(" Of {rounds} rounds, min..max holds the true median with {percent:.1}%.")
            }
            _ => String::new(),
        };
        format!(
            "\nA ratio is {backend} / that row's backend, the median of the per-round ratios; below 1 {backend} is faster. The \
             difference is {backend} - that row's, likewise.{rates}{sure}\n"
        )
    }
}

impl Ratios {
    /// Ratios are taken within a round, where both ran in turn under the same conditions, and only then summarised.
    fn of(ours: &[Percentiles], theirs: &[Percentiles]) -> Option<Self> {
        let ratios = |at: fn(&Percentiles) -> f64| {
            Spread::of(
                ours.iter().zip(theirs).map(|(ours, theirs)| at(ours) / at(theirs)).collect(),
            )
        };
        Some(Self {
            rounds: ours.len().min(theirs.len()),
            p50: ratios(|round| round.p50)?,
            p99: ratios(|round| round.p99)?,
            p999: ratios(|round| round.p999)?,
        })
    }
}

/// Two decimals, and what makes small ones differ.
fn ratio(value: f64) -> String {
    if value < 0.1 { format!("{value:.3}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(p50: &[f64]) -> Vec<Percentiles> {
        let round = |&p50: &f64| Percentiles {
            p50,
            p99: p50 * 2.0,
            p999: p50 * 4.0,
            ..Percentiles::default()
        };
        p50.iter().map(round).collect()
    }

    #[test]
    fn ratios_are_taken_per_round_and_then_their_median() {
        // The third round was disturbed for both, the second for ours only.
        let (ours, theirs) = (rounds(&[6.0, 40.0, 60.0]), rounds(&[10.0, 10.0, 100.0]));
        let versus = Versus::of("read/64B", ("A", &ours), ("B", &theirs)).expect("rounds");
        let Ratios { rounds, p50, p999, .. } = versus.ratios;
        assert_eq!(rounds, 3);
        assert!((p50.median - 0.6).abs() < 1e-9, "{versus:?}");
        assert!((p50.min - 0.6).abs() < 1e-9 && (p50.max - 4.0).abs() < 1e-9, "{versus:?}");
        assert!((p999.median - 0.6).abs() < 1e-9, "{versus:?}");
        // -4, 30 and -40 us.
        assert!((versus.p50_difference_us.median + 4.0).abs() < 1e-9, "{versus:?}");
        let cells = versus.cells();
        assert_eq!(cells.len(), Versus::titles(std::slice::from_ref(&versus)).len());
        assert_eq!(cells[..2], ["0.60", "0.60..4.00"]);
        assert_eq!(cells[6..], ["-4.00", "-40.00..+30.00"]);
        let versus = versus.with_rates(&[5.0, 100.0, 30.0], &[100.0, 50.0, 10.0]);
        let cells = versus.cells();
        assert_eq!(cells[8..], ["2.00", "0.050..3.00"]);
        assert_eq!(cells.len(), Versus::titles(std::slice::from_ref(&versus)).len());
        let text = Versus::explanation("A", &[versus]);
        assert!(text.contains("Of 3 rounds, min..max holds the true median with 75.0%."), "{text}");
    }

    #[test]
    fn nothing_measured_has_no_ratio() {
        assert_eq!(Versus::of("read/64B", ("A", &rounds(&[6.0])), ("B", &[])), None);
    }
}
