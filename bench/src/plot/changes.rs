//! Two results beside each other: what became of every figure that both have.

use std::fmt::Write as _;

use super::svg::escape;
use super::view::{LineView, View};
use crate::report::align;

/// One line of a case in two results.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Change {
    pub(crate) id: String,
    /// Of which backend.
    pub(crate) label: String,
    /// Of the later result to the first; below 1 the later one is faster.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// Of their GB/s; above 1 the later one is.
    pub(crate) rate: Option<f64>,
}

/// All changes from the first result to another.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Changes {
    /// What is divided by what.
    pub(crate) of: String,
    pub(crate) rows: Vec<Change>,
}

impl Changes {
    /// Compares every line that both have, by case and backend; the names are those of the results.
    pub(crate) fn between((first, before): (&str, &View), (name, after): (&str, &View)) -> Self {
        let mut rows = Vec::new();
        for case in &after.cases {
            let same = before.cases.iter().find(|other| other.id == case.id);
            for line in &case.lines {
                let same =
                    same.and_then(|same| same.lines.iter().find(|it| it.label == line.label));
                rows.extend(same.and_then(|same| change(&case.id, same, line)));
            }
        }
        Self { of: format!("{name} / {first}"), rows }
    }

    const TITLES: [&'static str; 5] = ["case", "backend", "p50 ratio", "p99 ratio", "GB/s ratio"];

    fn cells(row: &Change) -> [String; 5] {
        let ratio = |ratio: f64| {
            if ratio < 0.1 { format!("{ratio:.3}") } else { format!("{ratio:.2}") }
        };
        let rate = row.rate.map_or_else(|| "-".to_owned(), ratio);
        [row.id.clone(), row.label.clone(), ratio(row.p50), ratio(row.p99), rate]
    }

    fn explanation(&self) -> String {
        if self.rows.is_empty() {
            return format!("{}: no case of the same backend is in both.", self.of);
        }
        format!(
            "Each ratio is {}, of all rounds together: the two ran at different times, not in turn. Below 1 the first named is \
             faster; of GB/s, above 1.",
            self.of
        )
    }

    /// For a terminal.
    pub(crate) fn table(&self) -> String {
        let mut rows = vec![Self::TITLES.map(str::to_owned).to_vec()];
        rows.extend(self.rows.iter().map(|row| Self::cells(row).to_vec()));
        let table = if self.rows.is_empty() { String::new() } else { align(&rows, 2) };
        format!("{table}{}\n", self.explanation())
    }

    /// For a report.
    pub(crate) fn html(&self) -> String {
        let mut text = format!("<p class=\"note\">{}</p>\n", escape(&self.explanation()));
        if self.rows.is_empty() {
            return text;
        }
        text += "<div class=\"wide\"><table><thead><tr>";
        for title in Self::TITLES {
            let _ = write!(text, "<th>{title}</th>");
        }
        text += "</tr></thead>\n<tbody>";
        for row in &self.rows {
            let [id, cells @ ..] = Self::cells(row);
            let _ = write!(text, "<tr><th>{}</th>", escape(&id));
            for cell in &cells {
                let _ = write!(text, "<td>{}</td>", escape(cell));
            }
            text += "</tr>\n";
        }
        text + "</tbody></table></div>\n"
    }
}

fn change(id: &str, before: &LineView, after: &LineView) -> Option<Change> {
    let ratio = |after: f64, before: f64| (after > 0.0 && before > 0.0).then(|| after / before);
    Some(Change {
        id: id.to_owned(),
        label: after.label.clone(),
        p50: ratio(after.latency_us.p50, before.latency_us.p50)?,
        p99: ratio(after.latency_us.p99, before.latency_us.p99)?,
        rate: after.gigabytes_per_s.zip(before.gigabytes_per_s).and_then(|(a, b)| ratio(a, b)),
    })
}
