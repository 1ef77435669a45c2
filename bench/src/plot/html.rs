//! The report: one file that needs nothing else.

use std::fmt::Write as _;

use super::axis::{rate_label, time_label};
use super::changes::Changes;
use super::charts::charts;
use super::svg::{PALETTE, escape};
use super::view::{PeersView, View};
use crate::nixl::FaultKind;
use crate::report::Percentiles;
use crate::units::Bytes;

/// The whole page.
pub(crate) fn page(view: &View) -> String {
    let (overviews, cases) = charts(view);
    let mut body = String::new();
    for note in &view.notes {
        let _ = writeln!(body, "<p class=\"note\">{}</p>", escape(note));
    }
    if !view.loads.is_empty() {
        body += "<h2>Small reads beside large writes</h2>\n";
        body += &loads(view);
    }
    if !view.faults.is_empty() {
        body += "<h2>Targets that died or stopped</h2>\n";
        body += &faults(view);
    }
    if !view.peers.is_empty() {
        body += "<h2>One engine with many peers</h2>\n";
        body += &peers(view);
    }
    if !view.changes.is_empty() {
        body += "<h2>Compared</h2>\n";
        body.extend(view.changes.iter().map(Changes::html));
    }
    if !overviews.is_empty() {
        body += "<h2>Overview</h2>\n<div class=\"charts\">\n";
        for chart in &overviews {
            let _ = writeln!(body, "<figure>{}</figure>", chart.svg);
        }
        body += "</div>\n";
    }
    if !cases.is_empty() {
        body += "<h2>Latency by case</h2>\n";
    }
    body += "<div class=\"charts\">\n";
    for (case, chart) in view.cases.iter().zip(&cases) {
        let mut rows = String::new();
        for line in &case.lines {
            let at = &line.latency_us;
            let _ = write!(rows, "<tr><th>{}</th>", escape(&line.label));
            for us in [at.p50, at.p90, at.p99, at.p999, at.max] {
                let _ = write!(rows, "<td>{}</td>", time_label(us));
            }
            let optional = |value: Option<f64>, label: fn(f64) -> String| {
                value.map_or_else(|| "–".to_owned(), label)
            };
            let _ = writeln!(
                rows,
                "<td>{}</td><td>{}</td><td>{}</td></tr>",
                optional(line.gigabytes_per_s, rate_label),
                optional(line.cpu_us_per_operation.map(|cpu| cpu.0), time_label),
                optional(line.cpu_us_per_operation.map(|cpu| cpu.1), time_label),
            );
        }
        let _ = writeln!(
            body,
            "<figure id=\"{id}\">{svg}\n<div class=\"wide\"><table><thead><tr><th></th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th>\
             <th>max</th><th>rate</th><th>CPU/op, initiator</th><th>target</th></tr></thead>\n<tbody>{rows}</tbody></table></div></figure>",
            id = escape(&case.id),
            svg = chart.svg,
        );
    }
    body += "</div>\n<h2>Environment</h2>\n";
    for (title, rows) in &view.environments {
        let _ = writeln!(body, "<h3>{}</h3>\n<table class=\"environment\"><tbody>", escape(title));
        for (name, value) in rows {
            let _ = writeln!(body, "<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(value));
        }
        body += "</tbody></table>\n";
    }
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>{title}</title>\n\
         <style>\n{style}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n",
        title = escape(&view.title),
        style = style(),
    )
}

fn faults(view: &View) -> String {
    let mut rows = String::new();
    for fault in &view.faults {
        let what = match fault.kind {
            FaultKind::Kill => "SIGKILL",
            FaultKind::Stop => "SIGSTOP",
        };
        let time =
            |ms: Option<f64>| ms.map_or_else(|| "never".to_owned(), |ms| time_label(ms * 1e3));
        let why = if fault.error.is_empty() { &fault.recovery_error } else { &fault.error };
        let _ = writeln!(
            rows,
            "<tr><th>{}</th><td>{what}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&fault.backend),
            time_label(fault.longest_stall_ms * 1e3),
            time(fault.detected_ms),
            time(fault.recovered_ms),
            escape(why)
        );
    }
    format!(
        "<div class=\"wide\"><table><thead><tr><th></th><th>what</th><th>longest time without a read</th><th>noticed after</th><th>reads again after</th><th>as</th></tr></thead>\n\
         <tbody>{rows}</tbody></table></div>\n"
    )
}

fn peers(view: &View) -> String {
    let mut rows = String::new();
    for PeersView { label, series } in &view.peers {
        let range = |figure: fn(&Percentiles) -> f64| {
            let (least, most) = series.range(figure);
            format!("{} to {}", time_label(least), time_label(most))
        };
        let _ = writeln!(
            rows,
            "<tr><th>{}</th><td>{:.0}</td><td>{}</td><td>{}</td><td>{:.3}</td><td>{:.0}%</td><td>{:.0} KiB</td><td>{:.1}</td><td>{}</td><td>{}</td></tr>",
            escape(label),
            series.operations_per_s.median,
            range(|at| at.p50),
            range(|at| at.p99),
            series.fairness.median,
            series.least_share.median * 100.0,
            series.hub_kib_per_peer.median,
            series.hub_descriptors_per_peer.median,
            series.hub_threads,
            time_label(series.hub_cpu_us_per_operation.median),
        );
    }
    format!(
        "<div class=\"wide\"><table><thead><tr><th></th><th>transfers/s</th><th>p50, best to worst peer</th><th>p99, best to worst peer</th>\
         <th>fairness (Jain)</th><th>least peer, of the mean</th><th>memory a peer</th><th>descriptors a peer</th><th>threads</th>\
         <th>hub's CPU/op</th></tr></thead>\n<tbody>{rows}</tbody></table></div>\n"
    )
}

fn loads(view: &View) -> String {
    let mut rows = String::new();
    for load in &view.loads {
        let _ = writeln!(
            rows,
            "<tr><th>{}</th><td>{}</td><td>{}</td><td>{:.1}%</td><td>{:.2} GB/s</td><td>{:.2} GB/s</td><td>{:.0}%</td></tr>",
            escape(&load.backend),
            escape(&format!("{} reads, {}/s", Bytes(load.read_bytes), load.reads_per_s)),
            escape(&format!("{} writes", Bytes(load.bulk_bytes))),
            load.served_share * 100.0,
            load.bulk_alone_gb_per_s.median,
            load.bulk_beside_gb_per_s.median,
            load.bulk_share.median * 100.0,
        );
    }
    format!(
        "<div class=\"wide\"><table><thead><tr><th></th><th>reads</th><th>beside</th><th>reads served in time</th><th>writes alone</th>\
         <th>writes beside reads</th><th>kept</th></tr></thead>\n<tbody>{rows}</tbody></table></div>\n"
    )
}

fn style() -> String {
    let colours = |dark: bool| {
        PALETTE.iter().fold(String::new(), |mut text, (name, light, night)| {
            let _ = write!(text, "{name}:{};", if dark { night } else { light });
            text
        })
    };
    format!(
        ":root{{color-scheme:light dark;{}}}\n@media (prefers-color-scheme:dark){{:root{{{}}}}}\n\
         body{{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,'DejaVu Sans',sans-serif;max-width:1360px;margin:2em auto;padding:0 1.2em}}\n\
         h1{{font-size:1.5em}}h2{{font-size:1.2em;margin-top:2em}}h3{{font-size:1em}}\n\
         .note{{color:var(--muted);margin:.3em 0}}\n\
         .charts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(620px,100%),1fr));gap:1.2em}}\n\
         figure{{margin:0;padding:1em;background:var(--panel);border-radius:8px;min-width:0}}\n\
         svg{{max-width:100%;height:auto;display:block}}\n\
         .wide{{overflow-x:auto}}\n\
         table{{border-collapse:collapse;font-size:13px;margin-top:.6em}}\n\
         th,td{{padding:.2em .5em;text-align:right;white-space:nowrap}}\n\
         th:first-child{{text-align:left;font-weight:500}}\n\
         thead th{{color:var(--muted);font-weight:400;border-bottom:1px solid var(--grid);white-space:normal;vertical-align:bottom}}\n\
         .environment td{{text-align:left;white-space:normal}}\n",
        colours(false),
        colours(true),
    )
}
