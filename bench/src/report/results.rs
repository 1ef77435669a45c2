//! `results.json`: everything of a run that another program may want, under a versioned schema.
//!
//! Consumers should check [`SCHEMA_VERSION`]: it grows when a field changes its meaning or goes away, not when one is
//! added. docs/benchmarks.md describes every field.

use serde::{Deserialize, Serialize};

use super::costs::Costs;
use super::load::Load;
use super::run_info::RunInfo;
use crate::case::{App, Backend, Memory, Operation, Scenario, TargetApp};
use crate::manifest::Host;
use crate::measure::Points;

/// Name of the schema.
pub(crate) const SCHEMA: &str = "corelane-bench";
/// Version of the layout below.
pub(crate) const SCHEMA_VERSION: u32 = 2;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Results {
    #[serde(flatten)]
    pub(crate) run: RunInfo,
    pub(crate) options: Options,
    pub(crate) environment: Environment,
    pub(crate) series: Vec<Series>,
    pub(crate) comparisons: Vec<Comparison>,
    /// Of scenario `decode-under-prefill`, one for each backend.
    #[serde(default)]
    pub(crate) loads: Vec<Load>,
}

/// The options in effect, defaults filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Options {
    /// Names with commas between them.
    pub(crate) transport: String,
    pub(crate) memory: Memory,
    /// The initiator's and the target's, with memory of GPUs.
    #[serde(default)]
    pub(crate) gpus: [u32; 2],
    /// Of each engine.
    pub(crate) lanes: usize,
    pub(crate) backend: Backend,
    pub(crate) baselines: Vec<Backend>,
    pub(crate) rounds: usize,
    /// Of one case on one backend in one round.
    pub(crate) duration_ms: f64,
    pub(crate) rate: Option<f64>,
    pub(crate) app: App,
    pub(crate) target_app: TargetApp,
    pub(crate) engines: usize,
    pub(crate) burn: bool,
    pub(crate) spin: Option<String>,
    pub(crate) seed: u64,
    /// What the shapes of scenario `kv` stand for.
    #[serde(default)]
    pub(crate) models: Vec<String>,
}

/// Both hosts, as the processes on them see them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Environment {
    pub(crate) initiator: Host,
    pub(crate) target: Host,
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) id: String,
    pub(crate) backend: Backend,
    pub(crate) scenario: Scenario,
    pub(crate) operation: Operation,
    pub(crate) blocks: usize,
    pub(crate) block_bytes: usize,
    pub(crate) window: usize,
    pub(crate) notification_bytes: usize,
    /// Initiator-target pairs that ran at the same time; their operations are added up.
    pub(crate) pairs: usize,
    pub(crate) placement: String,
    pub(crate) operations: u64,
    pub(crate) verified_operations: u64,
    /// Due in an open loop but cut off; counted in the percentiles with the time they had waited.
    pub(crate) unserved_operations: u64,
    /// Latency; in an open loop from the intended start.
    pub(crate) latency_us: Percentiles,
    /// Open loop only: latency from the actual start.
    pub(crate) service_us: Option<Percentiles>,
    pub(crate) gigabytes_per_s: Option<f64>,
    pub(crate) operations_per_s: Option<f64>,
    /// CPU time of each process per GiB moved.
    pub(crate) cpu_s_per_gib: Option<CpuCost>,
    /// The same and more per operation; `None` for one-way times.
    #[serde(default)]
    pub(crate) costs: Option<Costs>,
    pub(crate) rounds: Vec<Round>,
    /// File name of the percentile distribution, next to the other outputs.
    pub(crate) hgrm: String,
    /// Non-empty histogram buckets as [nanoseconds, count].
    pub(crate) histogram_ns: Points,
}

/// Latency percentiles in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Percentiles {
    pub(crate) min: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    #[serde(rename = "p99.9")]
    pub(crate) p999: f64,
    #[serde(rename = "p99.99")]
    pub(crate) p9999: f64,
    pub(crate) max: f64,
    pub(crate) mean: f64,
    pub(crate) stddev: f64,
}

impl Percentiles {
    /// Reads the percentiles off a histogram of nanoseconds.
    pub(crate) fn of(histogram: &hdrhistogram::Histogram<u64>) -> Self {
        let us = |ns: u64| ns as f64 / 1e3;
        let at = |quantile| us(histogram.value_at_quantile(quantile));
        if histogram.is_empty() {
            return Self::default();
        }
        Self {
            min: us(histogram.min()),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            p9999: at(0.9999),
            max: us(histogram.max()),
            mean: histogram.mean() / 1e3,
            stddev: histogram.stdev() / 1e3,
        }
    }
}

/// CPU seconds per GiB of payload.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CpuCost {
    pub(crate) initiator: f64,
    pub(crate) target: f64,
}

/// One round of a series.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Round {
    pub(crate) operations: u64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    #[serde(rename = "p99.9_us")]
    pub(crate) p999_us: f64,
    pub(crate) operations_per_s: Option<f64>,
}

/// A series against the same series of the baseline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Comparison {
    pub(crate) id: String,
    pub(crate) backend: Backend,
    pub(crate) baseline: Backend,
    pub(crate) rounds: usize,
    /// Of the per-round ratios p50 / p50.
    pub(crate) p50_ratio: Spread,
    /// Of the per-round ratios p99 / p99.
    pub(crate) p99_ratio: Spread,
    /// Of the per-round ratios p99.9 / p99.9.
    #[serde(rename = "p99.9_ratio")]
    pub(crate) p999_ratio: Spread,
    /// Of the per-round differences p50 - p50, in microseconds.
    pub(crate) p50_difference_us: Spread,
    /// Of the per-round ratios of operations per second; above 1 is faster than the baseline.
    pub(crate) rate_ratio: Option<Spread>,
}

/// Median and range of per-round values, and how sure the median is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// The interval of two of the values that holds the true median with probability `confidence`, whatever the
    /// distribution: the narrowest symmetric one of at least 95%, else the whole range, which is less sure.
    #[serde(default)]
    pub(crate) low: f64,
    #[serde(default)]
    pub(crate) high: f64,
    #[serde(default)]
    pub(crate) confidence: f64,
}

impl Spread {
    /// `None` without values. The median of an even number is the mean of the middle two.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.retain(|value| value.is_finite());
        values.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            (values[middle - 1] + values[middle]) / 2.0
        };
        let (cut, confidence) = median_interval(values.len());
        let (low, high) = (values[cut], values[values.len() - 1 - cut]);
        Some(Self { median, min, max, low, high, confidence })
    }
}

/// How many of `n` sorted independent values may be cut off at either end so that the rest spans the true median with at
/// least 95%, and with which probability it does. It misses with that of at most `cut` heads, or tails, in `n` throws.
fn median_interval(n: usize) -> (usize, f64) {
    let (mut chance, mut missed) = (0.5f64.powi(n.min(1000) as i32), 0.0);
    let mut best = (0, 1.0 - 2.0 * chance);
    for cut in 0..n / 2 {
        missed += chance;
        let confidence = 1.0 - 2.0 * missed;
        if cut > 0 && confidence < 0.95 {
            break;
        }
        best = (cut, confidence);
        chance *= (n - cut) as f64 / (cut + 1) as f64;
    }
    (best.0, best.1.max(0.0))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn series(id: &str, backend: Backend, p50: f64) -> Series {
        Series {
            id: id.to_owned(),
            backend,
            scenario: Scenario::Sizes,
            operation: Operation::Read,
            blocks: 1,
            block_bytes: 64,
            window: 1,
            notification_bytes: 0,
            pairs: 1,
            placement: "initiator: lane on core 1; target: lane on core 0".to_owned(),
            operations: 1000,
            verified_operations: 1064,
            unserved_operations: 0,
            latency_us: Percentiles {
                p50,
                p90: p50,
                p99: p50 * 2.0,
                max: 123.456,
                ..Percentiles::default()
            },
            service_us: None,
            gigabytes_per_s: Some(0.0071),
            operations_per_s: Some(111_000.0),
            cpu_s_per_gib: Some(CpuCost { initiator: 140.0, target: 130.0 }),
            costs: None,
            rounds: vec![Round {
                operations: 500,
                p50_us: p50,
                p99_us: p50 * 2.0,
                p999_us: p50 * 3.0,
                operations_per_s: Some(111_000.0),
            }],
            hgrm: format!("{}.{backend}.hgrm", id.replace('/', "-")),
            histogram_ns: vec![(9000, 999), (123_456, 1)],
        }
    }

    pub(crate) fn results() -> Results {
        let ratio = Spread::of(vec![1.0, 1.05, 1.2]).expect("values");
        Results {
            run: RunInfo::complete(SCHEMA, SCHEMA_VERSION),
            options: Options {
                transport: "tcp".to_owned(),
                memory: Memory::Registered,
                gpus: [0, 0],
                lanes: 1,
                backend: Backend::Corelane,
                baselines: vec![Backend::RawTcp],
                rounds: 5,
                duration_ms: 200.0,
                rate: None,
                app: App::Thread,
                target_app: TargetApp::Sleep,
                engines: 2,
                burn: false,
                spin: None,
                seed: 42,
                models: Vec::new(),
            },
            environment: Environment::default(),
            series: vec![
                series("read/64B", Backend::Corelane, 9.1),
                series("read/64B", Backend::RawTcp, 8.6),
            ],
            comparisons: vec![Comparison {
                id: "read/64B".to_owned(),
                backend: Backend::Corelane,
                baseline: Backend::RawTcp,
                rounds: 5,
                p50_ratio: ratio,
                p99_ratio: ratio,
                p999_ratio: ratio,
                p50_difference_us: Spread::of(vec![-0.1, 0.5, 0.9]).expect("values"),
                rate_ratio: Some(ratio),
            }],
            loads: Vec::new(),
        }
    }

    #[test]
    fn results_survive_a_round_trip() {
        let results = results();
        let json = serde_json::to_string_pretty(&results).expect("encodes");
        assert_eq!(serde_json::from_str::<Results>(&json).expect("decodes"), results);
    }

    #[test]
    fn the_documented_names_are_in_the_file() {
        let value = serde_json::to_value(results()).expect("encodes");
        assert_eq!(value["schema"], "corelane-bench");
        assert_eq!(value["schema_version"], 2);
        let row = &value["series"][0];
        for name in ["p50", "p90", "p99", "p99.9", "p99.99", "max"] {
            assert!(row["latency_us"][name].is_number(), "{name}");
        }
        assert_eq!(row["backend"], "corelane");
        assert_eq!(row["histogram_ns"][0][0], 9000);
        assert_eq!(value["options"]["baselines"][0], "raw-tcp");
        assert_eq!(row["rounds"][0]["p99.9_us"], 9.1 * 3.0);
        let comparison = &value["comparisons"][0];
        assert_eq!(comparison["p50_ratio"]["median"], 1.05);
        assert_eq!(comparison["p99.9_ratio"]["median"], 1.05);
        assert_eq!(comparison["p50_difference_us"]["min"], -0.1);
    }

    #[test]
    fn medians_of_odd_even_and_no_values() {
        let median = |values: &[f64]| Spread::of(values.to_vec()).map(|spread| spread.median);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[f64::NAN, f64::INFINITY, 7.0]), Some(7.0));
        assert_eq!(median(&[]), None);
        let spread = Spread::of(vec![2.0, 9.0, 1.0]).expect("values");
        assert_eq!((spread.min, spread.max), (1.0, 9.0));
    }

    #[test]
    fn the_interval_of_the_median_is_that_of_the_sign_test() {
        // Tabulated: five values span the median with 93.75%, six with 96.9%; of ten the second and the ninth do with
        // 97.9%, of twenty the sixth and the fifteenth with 95.9%.
        for (n, cut, confidence) in [
            (1, 0, 0.0),
            (2, 0, 0.5),
            (5, 0, 0.9375),
            (6, 0, 0.96875),
            (10, 1, 0.978_5),
            (20, 5, 0.958_6),
        ] {
            let (found, sure) = median_interval(n);
            assert_eq!(found, cut, "{n}");
            assert!((sure - confidence).abs() < 1e-3, "{n}: {sure}");
        }
        let spread = Spread::of((1..=10).map(f64::from).collect()).expect("values");
        assert_eq!((spread.low, spread.high, spread.min), (2.0, 9.0, 1.0));
    }

    #[test]
    fn percentiles_of_a_known_distribution() {
        let mut histogram = crate::measure::histogram();
        (1..=1000u64).for_each(|us| histogram.record(us * 1000).expect("in range"));
        let percentiles = Percentiles::of(&histogram);
        assert!((percentiles.p50 - 500.0).abs() < 1.0 && (percentiles.p99 - 990.0).abs() < 1.0);
        assert!((percentiles.mean - 500.5).abs() < 1.0 && (percentiles.max - 1000.0).abs() < 1.0);
        assert_eq!(Percentiles::of(&crate::measure::histogram()), Percentiles::default());
    }
}
