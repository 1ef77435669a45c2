//! The charts of a report.

use super::axis::{LogAxis, TailAxis, number, rate_label, time_label};
use super::svg::{Anchor, Svg, line_style, width_of};
use super::view::{ALONE, Along, CaseView, LineView, RatioView, SLOWEST, View, backend_of};
use crate::measure::Points;
use crate::report::Spread;

const WIDTH: f64 = 640.0;
const LEFT: f64 = 66.0;
const RIGHT: f64 = WIDTH - 20.0;
/// Height of the field between the axes.
const FIELD: f64 = 230.0;
const LEGEND_LINE: f64 = 18.0;
/// Longer labels are cut; the whole text is in the line's tooltip and in the table.
const LONGEST_LABEL: usize = 52;

/// A chart with its name, which is that of its file too.
pub(crate) struct Chart {
    #[cfg_attr(
        not(any(feature = "png", test)),
        expect(dead_code, reason = "only files of their own need it")
    )]
    pub(crate) name: String,
    pub(crate) svg: String,
}

/// Every chart of a view: those over all cases first.
pub(crate) fn charts(view: &View) -> (Vec<Chart>, Vec<Chart>) {
    let labels = view.labels();
    let mut overviews = Vec::new();
    let mut kinds: Vec<(&String, Along)> = Vec::new();
    for step in view.cases.iter().filter_map(|case| case.step.as_ref()) {
        let kind = (&step.kind, step.along);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    for kind in kinds {
        overviews.extend(by_step(view, kind, &labels));
    }
    let mut ofs: Vec<&String> = Vec::new();
    for ratio in &view.ratios {
        if !ofs.contains(&&ratio.of) {
            ofs.push(&ratio.of);
        }
    }
    for of in ofs {
        overviews.push(ratios(of, view.ratios.iter().filter(|ratio| &ratio.of == of)));
    }
    let cases = view.cases.iter().map(|case| percentiles(case, &labels)).collect();
    (overviews, cases)
}

/// Room for a title and the legend above the field; gives the field's upper edge.
fn head(svg: &mut Svg, title: &str, lines: &[(String, String, &str)]) -> f64 {
    svg.title((12.0, 22.0), title);
    let places = legend_places(lines.iter().map(|(label, ..)| label.as_str()));
    for ((label, colour, dashes), (x, row)) in lines.iter().zip(&places) {
        let y = 44.0 + row * LEGEND_LINE;
        svg.path(&[(*x, y - 4.0), (x + 26.0, y - 4.0)], colour, dashes, label);
        svg.text((x + 32.0, y), Anchor::Start, "--ink", &cut(label));
    }
    top_below(&places)
}

fn top_below(places: &[(f64, f64)]) -> f64 {
    44.0 + (places.last().map_or(-1.0, |place| place.1) + 1.0) * LEGEND_LINE
}

/// Column and row of every entry of a legend, wrapped.
fn legend_places<'a>(labels: impl Iterator<Item = &'a str>) -> Vec<(f64, f64)> {
    let (mut x, mut row) = (12.0, 0.0);
    labels
        .map(|label| {
            let width = 32.0 + width_of(&cut(label)) + 18.0;
            if x > 12.0 && x + width > WIDTH {
                (x, row) = (12.0, row + 1.0);
            }
            let place = (x, row);
            x += width;
            place
        })
        .collect()
}

fn cut(label: &str) -> String {
    cut_to(label, LONGEST_LABEL)
}

/// In the middle, since the ends of labels tell them apart: a backend at the beginning, what of it at the end.
pub(super) fn cut_to(label: &str, most: usize) -> String {
    if label.chars().count() <= most {
        return label.to_owned();
    }
    let end: Vec<char> = label.chars().rev().take(most / 2 - 1).collect();
    label.chars().take(most - 1 - end.len()).chain(['…']).chain(end.into_iter().rev()).collect()
}

/// Grid and labels of a vertical axis; labels that would touch are left out.
fn vertical(svg: &mut Svg, axis: &LogAxis, label: impl Fn(f64) -> String) {
    let mut last = f64::MAX;
    for value in axis.ticks() {
        let y = axis.at(value);
        svg.line((LEFT, y), (RIGHT, y), "--grid", 1.0);
        if last - y >= 15.0 {
            svg.text((LEFT - 8.0, y + 4.0), Anchor::End, "--muted", &label(value));
            last = y;
        }
    }
}

fn frame(svg: &mut Svg, top: f64, bottom: f64, below: &str) {
    svg.line((LEFT, top), (LEFT, bottom), "--muted", 1.0);
    svg.line((LEFT, bottom), (RIGHT, bottom), "--muted", 1.0);
    svg.text(((LEFT + RIGHT) / 2.0, bottom + 38.0), Anchor::Middle, "--muted", below);
}

/// Places of a distribution on the two axes: for each value the share of operations above it, largest last. The line
/// ends where its operations do: no share is smaller than one of them.
fn tail_of(points: &Points) -> Vec<(f64, f64)> {
    let total: u64 = points.iter().map(|point| point.1).sum();
    let mut below = 0u64;
    let mut tail = Vec::with_capacity(points.len() * 2);
    for &(ns, count) in points {
        let us = ns as f64 / 1e3;
        let share = |below: u64| (total - below).max(1) as f64 / total as f64;
        tail.push((share(below), us));
        below += count;
        tail.push((share(below), us));
    }
    tail
}

/// Latency by percentile.
fn percentiles(case: &CaseView, labels: &[String]) -> Chart {
    let styles: Vec<(String, &str)> =
        case.lines.iter().map(|line| style_of(&line.label, labels)).collect();
    let legend: Vec<_> = case
        .lines
        .iter()
        .zip(&styles)
        .map(|(line, (colour, dashes))| (line.label.clone(), colour.clone(), *dashes))
        .collect();
    let places = legend_places(legend.iter().map(|(label, ..)| label.as_str()));
    let top = top_below(&places);
    let bottom = top + FIELD;
    let mut svg = Svg::new(WIDTH, bottom + 48.0);
    head(&mut svg, &case.id, &legend);
    let count = |line: &LineView| line.points.iter().map(|point| point.1).sum::<u64>();
    let tail = TailAxis::for_count(case.lines.iter().map(count).max().unwrap_or(0), LEFT, RIGHT);
    let values = case.lines.iter().flat_map(|line| &line.points).map(|point| point.0 as f64 / 1e3);
    let axis = LogAxis::around(values, bottom, top + 8.0);
    vertical(&mut svg, &axis, time_label);
    for (above, label) in tail.ticks() {
        let x = tail.at(above);
        svg.line((x, top), (x, bottom), "--grid", 1.0);
        // The last may be too wide for the margin.
        let x = x.min(WIDTH - 4.0 - width_of(&label) / 2.0);
        svg.text((x, bottom + 18.0), Anchor::Middle, "--muted", &label);
    }
    frame(
        &mut svg,
        top,
        bottom,
        "percentile of the operations (each step holds a tenth of the last)",
    );
    for (line, (colour, dashes)) in case.lines.iter().zip(&styles) {
        let points: Vec<(f64, f64)> = tail_of(&line.points)
            .into_iter()
            .map(|(above, us)| (tail.at(above), axis.at(us)))
            .collect();
        let title = format!(
            "{}: p50 {}, p99 {}, p99.9 {}, max {}",
            line.label,
            time_label(line.latency_us.p50),
            time_label(line.latency_us.p99),
            time_label(line.latency_us.p999),
            time_label(line.latency_us.max)
        );
        svg.path(&thinned(&points), colour, dashes, &title);
    }
    Chart { name: case.id.clone(), svg: svg.finish(&format!("{}: latency by percentile", case.id)) }
}

/// The same line without points that nobody could see.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut kept: Vec<(f64, f64)> = Vec::new();
    for (at, &(x, y)) in points.iter().enumerate() {
        let near = kept.last().is_some_and(|(a, b)| (x - a).abs() < 0.3 && (y - b).abs() < 0.3);
        if !near || at + 1 == points.len() {
            kept.push((x, y));
        }
    }
    kept
}

fn style_of(label: &str, labels: &[String]) -> (String, &'static str) {
    let backend = backend_of(label);
    let style = line_style(labels.iter().position(|known| known == backend).unwrap_or(0));
    let dashed = label.ends_with(ALONE) || label.ends_with(SLOWEST);
    if dashed { (style.0, "6 3") } else { style }
}

/// Latency and bandwidth against the number in which the cases of a kind differ.
fn by_step(view: &View, (kind, along): (&String, Along), labels: &[String]) -> Vec<Chart> {
    let of_kind = |case: &&CaseView| {
        case.step.as_ref().is_some_and(|step| &step.kind == kind && step.along == along)
    };
    let cases: Vec<&CaseView> = view.cases.iter().filter(of_kind).collect();
    let steps: Vec<usize> =
        cases.iter().filter_map(|case| Some(case.step.as_ref()?.value)).collect();
    let series = |figure: &dyn Fn(&LineView) -> Option<f64>| -> Vec<(String, Vec<(usize, f64)>)> {
        let of_label = |label: &String| {
            let mut points: Vec<(usize, f64)> = Vec::new();
            for case in &cases {
                let line = case.lines.iter().find(|line| &line.label == label);
                let value = line.and_then(figure).filter(|value| *value > 0.0);
                points.extend(value.and_then(|value| Some((case.step.as_ref()?.value, value))));
            }
            points.sort_unstable_by_key(|point| point.0);
            (label.clone(), points)
        };
        labels.iter().map(of_label).filter(|(_, points)| !points.is_empty()).collect()
    };
    let p50 = series(&|line| Some(line.latency_us.p50));
    let p99 = series(&|line| Some(line.latency_us.p99));
    let rate = series(&|line| line.gigabytes_per_s);
    let mut charts = Vec::new();
    let by = along.names().0;
    let bandwidth = match along {
        Along::Bytes => format!("{kind}: bandwidth by {by}, one transfer at a time"),
        Along::Peers => format!("{kind}: bandwidth by {by}"),
    };
    for (name, lines, times) in [
        (format!("{kind}: median latency by {by}"), p50, true),
        (format!("{kind}: p99 latency by {by}"), p99, true),
        (bandwidth, rate, false),
    ] {
        if lines.is_empty() || steps.len() < 2 {
            continue;
        }
        charts.push(step_chart(&name, (along, &steps), &lines, labels, times));
    }
    charts
}

fn step_chart(
    name: &str,
    (along, steps): (Along, &[usize]),
    lines: &[(String, Vec<(usize, f64)>)],
    labels: &[String],
    times: bool,
) -> Chart {
    let label = |value: f64| {
        if times { time_label(value) } else { rate_label(value) }
    };
    let legend: Vec<_> = lines
        .iter()
        .map(|(label, _)| {
            let (colour, dashes) = style_of(label, labels);
            (label.clone(), colour, dashes)
        })
        .collect();
    let top = top_below(&legend_places(legend.iter().map(|(label, ..)| label.as_str())));
    let bottom = top + FIELD;
    let mut svg = Svg::new(WIDTH, bottom + 48.0);
    head(&mut svg, name, &legend);
    let values = lines.iter().flat_map(|(_, points)| points).map(|point| point.1);
    let axis = LogAxis::around(values, bottom, top + 8.0);
    let across = LogAxis::around(steps.iter().map(|&step| step as f64), LEFT, RIGHT);
    vertical(&mut svg, &axis, label);
    let mut steps = steps.to_vec();
    steps.sort_unstable();
    steps.dedup();
    let mut end = f64::MIN;
    for step in steps {
        let (x, text) = (across.at(step as f64), along.label(step));
        svg.line((x, top), (x, bottom), "--grid", 1.0);
        if x - width_of(&text) / 2.0 > end {
            svg.text((x, bottom + 18.0), Anchor::Middle, "--muted", &text);
            end = x + width_of(&text) / 2.0 + 4.0;
        }
    }
    frame(&mut svg, top, bottom, along.names().1);
    for ((name, points), (_, colour, dashes)) in lines.iter().zip(&legend) {
        let places: Vec<(f64, f64)> =
            points.iter().map(|&(step, value)| (across.at(step as f64), axis.at(value))).collect();
        svg.path(&places, colour, dashes, name);
        for (&place, &(step, value)) in places.iter().zip(points) {
            let title = format!("{name}, {}: {}", along.label(step), label(value));
            svg.dot(place, 3.5, colour, &title);
        }
    }
    Chart { name: name.to_owned(), svg: svg.finish(name) }
}

/// Ratios with their range over the rounds: one row a case, p50 above p99.
fn ratios<'a>(of: &str, rows: impl Iterator<Item = &'a RatioView>) -> Chart {
    const ROW: f64 = 30.0;
    const LONGEST_ID: usize = 46;
    let rows: Vec<&RatioView> = rows.collect();
    let name = format!("{of}: ratio of latencies");
    let legend = [
        ("p50".to_owned(), "--line0".to_owned(), ""),
        ("p99; bars: lowest to highest round".to_owned(), "--line1".to_owned(), ""),
    ];
    let longest = rows.iter().map(|row| width_of(&cut_to(&row.id, LONGEST_ID)));
    let left = longest.fold(60.0, f64::max) + 20.0;
    let top = top_below(&legend_places(legend.iter().map(|(label, ..)| label.as_str())));
    let bottom = top + 8.0 + ROW * rows.len() as f64;
    let mut svg = Svg::new(WIDTH, bottom + 48.0);
    head(&mut svg, &name, &legend);
    let spreads = rows.iter().flat_map(|row| [row.p50, row.p99]);
    let values = spreads.flat_map(|spread| [spread.min, spread.max]).chain([0.9, 1.1]);
    let axis = LogAxis::around(values, left, RIGHT);
    let mut end = f64::MIN;
    for value in axis.ticks() {
        let (x, text) = (axis.at(value), number(value));
        svg.line((x, top), (x, bottom), "--grid", 1.0);
        if x - width_of(&text) / 2.0 > end {
            svg.text((x, bottom + 18.0), Anchor::Middle, "--muted", &text);
            end = x + width_of(&text) / 2.0 + 6.0;
        }
    }
    svg.line((axis.at(1.0), top), (axis.at(1.0), bottom), "--ink", 1.5);
    let below = "below 1 (left of the dark line) the first is faster";
    svg.text(((left + RIGHT) / 2.0, bottom + 38.0), Anchor::Middle, "--muted", below);
    for (number, row) in rows.iter().enumerate() {
        let y = top + 8.0 + ROW * (number as f64 + 0.5);
        let id = cut_to(&row.id, LONGEST_ID);
        svg.text((left - 10.0, y + 4.0), Anchor::End, "--ink", &id);
        for (spread, y, colour, what) in
            [(row.p50, y - 5.0, "--line0", "p50"), (row.p99, y + 5.0, "--line1", "p99")]
        {
            let Spread { median, min, max, .. } = spread;
            svg.line((axis.at(min), y), (axis.at(max), y), colour, 2.0);
            let title = format!("{}: {what} ratio {median:.2} ({min:.2} to {max:.2})", row.id);
            svg.dot((axis.at(median), y), 4.0, colour, &title);
        }
    }
    Chart { svg: svg.finish(&name), name }
}
