//! What is drawn: the same for every kind of result file.

use super::changes::Changes;
use crate::measure::Points;
use crate::nixl::Fault;
use crate::peers::PeersSeries;
use crate::report::{Load, Percentiles, Spread};
use crate::units::Bytes;

/// What is behind a backend's name in the label of a load's reads.
pub(crate) const ALONE: &str = ", reads alone";
pub(crate) const BESIDE: &str = ", beside writes";

/// What is behind it in the label of the peer that fared worst.
pub(crate) const SLOWEST: &str = ", slowest peer";

/// The backend that a line is of.
pub(crate) fn backend_of(label: &str) -> &str {
    [ALONE, BESIDE, SLOWEST].iter().find_map(|what| label.strip_suffix(what)).unwrap_or(label)
}

/// One or several results, ready to be drawn.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    pub(crate) title: String,
    /// A sentence each: how it was measured, what went wrong.
    pub(crate) notes: Vec<String>,
    /// One table of names and values for each result.
    pub(crate) environments: Vec<(String, Vec<(String, String)>)>,
    pub(crate) cases: Vec<CaseView>,
    pub(crate) ratios: Vec<RatioView>,
    /// From the first of several results to each of the others.
    pub(crate) changes: Vec<Changes>,
    pub(crate) loads: Vec<Load>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) peers: Vec<PeersView>,
}

/// One number of peers of one engine.
#[derive(Clone, Debug)]
pub(crate) struct PeersView {
    pub(crate) label: String,
    pub(crate) series: PeersSeries,
}

/// Everything that was measured of one case.
#[derive(Clone, Debug)]
pub(crate) struct CaseView {
    pub(crate) id: String,
    pub(crate) lines: Vec<LineView>,
    /// Where the case is one of several that differ in one number.
    pub(crate) step: Option<Step>,
}

/// One of several cases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// What all have in common.
    pub(crate) kind: String,
    pub(crate) along: Along,
    pub(crate) value: usize,
}

/// What they differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Along {
    Bytes,
    Peers,
}

impl Along {
    /// How its axis is called, in a title and below it.
    pub(crate) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Bytes => ("size", "size of a transfer"),
            Self::Peers => ("number of peers", "number of peers"),
        }
    }

    /// What stands at a place of the axis.
    pub(crate) fn label(self, value: usize) -> String {
        match self {
            Self::Bytes => Bytes(value).to_string(),
            Self::Peers => value.to_string(),
        }
    }
}

impl Step {
    /// One size of several.
    pub(crate) fn bytes(kind: String, value: usize) -> Self {
        Self { kind, along: Along::Bytes, value }
    }
}

/// One backend's latencies.
#[derive(Clone, Debug)]
pub(crate) struct LineView {
    pub(crate) label: String,
    pub(crate) points: Points,
    pub(crate) latency_us: Percentiles,
    pub(crate) gigabytes_per_s: Option<f64>,
    /// CPU time per operation of the initiator and the target, in microseconds (or seconds per million of them).
    pub(crate) cpu_us_per_operation: Option<(f64, f64)>,
}

/// One case against another backend.
#[derive(Clone, Debug)]
pub(crate) struct RatioView {
    pub(crate) id: String,
    /// What is divided by what.
    pub(crate) of: String,
    pub(crate) p50: Spread,
    pub(crate) p99: Spread,
}

impl View {
    /// The lines of a case, which is begun where there is none of that name.
    pub(crate) fn case(&mut self, id: &str, step: Option<Step>) -> &mut CaseView {
        let at = self.cases.iter().position(|case| case.id == id).unwrap_or_else(|| {
            self.cases.push(CaseView { id: id.to_owned(), lines: Vec::new(), step });
            self.cases.len() - 1
        });
        &mut self.cases[at]
    }

    /// Every backend that has a line, in order of appearance: one has the same colour in all charts.
    pub(crate) fn labels(&self) -> Vec<String> {
        let mut labels: Vec<String> = Vec::new();
        for line in self.cases.iter().flat_map(|case| &case.lines) {
            let backend = backend_of(&line.label);
            if !labels.iter().any(|known| known == backend) {
                labels.push(backend.to_owned());
            }
        }
        labels
    }

    /// Adds another result, whose lines are told from ours by a name.
    pub(crate) fn add(&mut self, name: &str, other: Self) {
        let named = |label: &str| format!("{name}: {label}");
        self.notes.extend(other.notes.iter().map(|note| named(note)));
        self.environments
            .extend(other.environments.into_iter().map(|(title, rows)| (named(&title), rows)));
        for case in other.cases {
            let lines = case.lines.into_iter();
            let lines = lines.map(|line| LineView { label: named(&line.label), ..line });
            self.case(&case.id, case.step).lines.extend(lines);
        }
        let ratios = other.ratios.into_iter();
        self.ratios.extend(ratios.map(|ratio| RatioView { of: named(&ratio.of), ..ratio }));
        let loads = other.loads.into_iter();
        self.loads.extend(loads.map(|load| Load { backend: named(&load.backend), ..load }));
        let faults = other.faults.into_iter();
        self.faults.extend(faults.map(|fault| Fault { backend: named(&fault.backend), ..fault }));
        let peers = other.peers.into_iter();
        self.peers.extend(peers.map(|row| PeersView { label: named(&row.label), ..row }));
    }
}
