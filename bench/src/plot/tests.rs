use super::changes::Changes;
use super::charts::{Chart, charts};
use super::page;
use super::svg::with_fixed_colours;
use super::view::{LineView, RatioView, Step, View};
use crate::measure::{Points, histogram, points_of};
use crate::nixl::{Fault, FaultKind, SegmentType};
use crate::report::{Percentiles, Spread, load_of_backend};

fn line(label: &str, points: &Points) -> LineView {
    let mut all = histogram();
    crate::measure::restore(&mut all, points).expect("in range");
    LineView {
        label: label.to_owned(),
        points: points_of(&all),
        latency_us: Percentiles::of(&all),
        gigabytes_per_s: Some(1.5),
        cpu_us_per_operation: Some((9.0, 0.0)),
    }
}

/// Names that must be escaped, a distribution of one value, one over many decades, and nothing at all.
fn view() -> View {
    let spread = |values: &[f64]| Spread::of(values.to_vec()).expect("values");
    let mut view = View { title: "a < b & \"c\"".to_owned(), ..View::default() };
    view.notes.push("<script>alert(1)</script>".to_owned());
    view.environments
        .push(("Host".to_owned(), vec![("Kernel".to_owned(), "Linux\u{1}".to_owned())]));
    let wide: Points = (0..60).map(|n| (100 << (n / 2), 1 << (30 - n / 2))).collect();
    for size in [64, 4096, 1 << 20] {
        let case = view.case(&format!("read/{size}B"), Some(Step::bytes("read".to_owned(), size)));
        case.lines.push(line("CORELANE", &vec![(9_000 + size as u64, 100)]));
        case.lines.push(line("UCX@UCX_TLS=tcp,<x>", &wide));
    }
    let empty = view.case("kv/read/1x1B", None);
    empty.lines.push(line("CORELANE", &Vec::new()));
    let long = "decode-under-prefill/4096000000001B@1000000+67108863B/loaded";
    for id in ["read/64B", "read/4096B", "notify/16B/round-trip", long] {
        view.ratios.push(RatioView {
            id: id.to_owned(),
            of: "CORELANE / UCX@UCX_TLS=tcp,<x>".to_owned(),
            p50: spread(&[0.5, 0.6, 0.7]),
            p99: spread(&[0.001, 3.0]),
        });
    }
    view.loads.push(load_of_backend("CORELANE"));
    view.faults.push(Fault {
        backend: "CORELANE".to_owned(),
        kind: FaultKind::Kill,
        reads_ended: 7,
        longest_stall_ms: 0.5,
        detected_ms: Some(0.4),
        error: "remote <disconnect>".to_owned(),
        recovered_ms: None,
        recovery_error: String::new(),
    });
    view
}

fn numbers(document: &roxmltree::Document<'_>) -> Vec<f64> {
    let geometric = ["x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r"];
    let mut found = Vec::new();
    for node in document.descendants().filter(roxmltree::Node::is_element) {
        for attribute in node.attributes() {
            if geometric.contains(&attribute.name()) {
                found.push(attribute.value().parse().expect("a number"));
            } else if attribute.name() == "d" {
                let parts =
                    attribute.value().split(['M', 'L', ' ']).filter(|part| !part.is_empty());
                found.extend(parts.map(|part| part.parse::<f64>().expect("a number")));
            }
        }
    }
    found
}

#[test]
fn the_report_is_well_formed_and_shows_every_case() {
    let view = view();
    let page = page(&view);
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let document = roxmltree::Document::parse_with_options(&page, options)
        .unwrap_or_else(|error| panic!("{error}:\n{page}"));
    for id in ["read/64B", "read/4096B", "read/1048576B", "kv/read/1x1B"] {
        let figure = document.descendants().find(|node| node.attribute("id") == Some(id));
        let figure = figure.unwrap_or_else(|| panic!("no {id}"));
        let lines = figure
            .descendants()
            .filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "path")));
        assert!(lines.count() > 0, "{id} has no line");
    }
    let places = numbers(&document);
    assert!(places.len() > 500 && places.iter().all(|place| place.is_finite()));
    assert!(
        places.iter().all(|place| (-1.0..=2_000.0).contains(place)),
        "something is far outside"
    );
    assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    assert!(!page.contains("<script"), "text became markup");
    for outside in ["http://", "https://", "src=", "@import", "url("] {
        let found = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!found.contains(outside), "needs something from outside: {outside}");
    }
    assert!(page.contains("prefers-color-scheme:dark") && page.contains("90.0%"));
    assert!(page.contains("remote &lt;disconnect&gt;") && page.contains("400 us"));
}

#[test]
fn charts_of_sizes_ratios_and_cases_are_drawn() {
    let (overviews, cases) = charts(&view());
    let names: Vec<&str> = overviews.iter().map(|chart| chart.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "read: median latency by size",
            "read: p99 latency by size",
            "read: bandwidth by size, one transfer at a time",
            "CORELANE / UCX@UCX_TLS=tcp,<x>: ratio of latencies"
        ]
    );
    assert_eq!(cases.len(), 4);
    for chart in overviews.iter().chain(&cases) {
        let fixed = with_fixed_colours(&chart.svg);
        roxmltree::Document::parse(&fixed)
            .unwrap_or_else(|error| panic!("{}: {error}", chart.name));
        assert!(!fixed.contains("var("), "{} keeps a variable", chart.name);
    }
}

/// Labels of one axis must not run into each other.
#[test]
fn labels_do_not_overlap() {
    let peers = super::of_peers(&crate::peers::compared());
    for view in [view(), peers] {
        let (overviews, cases) = charts(&view);
        overviews.iter().chain(&cases).for_each(assert_apart);
    }
}

fn assert_apart(chart: &Chart) {
    let document = roxmltree::Document::parse(&chart.svg).expect("well-formed");
    let text = document.descendants().filter(|node| node.tag_name().name() == "text");
    let boxes: Vec<(f64, f64, f64, String)> = text
        .map(|node| {
            let at = |name| {
                node.attribute(name).and_then(|text| text.parse::<f64>().ok()).expect("a place")
            };
            let label = node.text().unwrap_or_default().to_owned();
            let width = label.chars().count() as f64 * 6.0;
            let left = match node.attribute("text-anchor") {
                Some("start") => at("x"),
                Some("middle") => at("x") - width / 2.0,
                _ => at("x") - width,
            };
            (left, left + width, at("y"), label)
        })
        .collect();
    for (number, one) in boxes.iter().enumerate() {
        assert!(one.0 >= 0.0 && one.1 <= 640.0, "{}: '{}' is cut off", chart.name, one.3);
        for other in &boxes[number + 1..] {
            let apart = one.1 <= other.0 || other.1 <= one.0 || (one.2 - other.2).abs() >= 12.0;
            assert!(apart, "{}: '{}' runs into '{}'", chart.name, one.3, other.3);
        }
    }
}

#[test]
fn several_results_are_told_apart_by_name() {
    let mut both = View { title: "both".to_owned(), ..View::default() };
    both.add("before", view());
    both.add("after", view());
    assert_eq!(both.cases.len(), 4, "cases of one name share a chart");
    let labels = both.labels();
    assert!(labels.contains(&"before: CORELANE".to_owned()), "{labels:?}");
    assert!(labels.contains(&"after: CORELANE".to_owned()), "{labels:?}");
    assert!(page(&both).contains("after: UCX@UCX_TLS=tcp"));
}

#[test]
fn figures_of_gpus_and_of_host_memory_never_share_a_chart() {
    let host = crate::nixl::nixl_compared();
    let mut gpus = host.clone();
    gpus.options.memory.initiator = SegmentType::Vram;
    gpus.options.memory.target = SegmentType::Vram;
    gpus.options.memory.gpus = [0, 1];
    let (host, gpus) = (super::of_nixl(&host), super::of_nixl(&gpus));
    let ids = |view: &View| -> Vec<String> {
        view.cases
            .iter()
            .map(|case| case.id.clone())
            .chain(view.ratios.iter().map(|it| it.id.clone()))
            .collect()
    };
    assert!(ids(&gpus).contains(&"read/64B/vram0-vram1".to_owned()), "{:?}", ids(&gpus));
    assert!(ids(&gpus).iter().all(|id| !ids(&host).contains(id)));
    let kinds =
        |view: &View| view.cases.iter().find_map(|case| Some(case.step.as_ref()?.kind.clone()));
    assert_ne!(kinds(&gpus), kinds(&host), "one line in the charts by size");
    assert!(Changes::between(("host", &host), ("gpus", &gpus)).rows.is_empty());
}

#[test]
fn every_figure_that_two_results_have_is_compared() {
    let result = |label: &str, us: u64, rate: Option<f64>| {
        let mut view = View::default();
        let mut line = line(label, &vec![(us * 1000, 100)]);
        line.gigabytes_per_s = rate;
        view.case("read/64B", None).lines.push(line.clone());
        view.case(&format!("only/{us}"), None).lines.push(line);
        view
    };
    let before = result("CORELANE", 10, Some(2.0));
    let changes = |after: &View| Changes::between(("before", &before), ("after", after));
    let Changes { of, rows } = changes(&result("CORELANE", 5, Some(5.0)));
    assert_eq!(of, "after / before");
    let [row] = &rows[..] else { panic!("one case is in both: {rows:?}") };
    assert_eq!((row.id.as_str(), row.label.as_str()), ("read/64B", "CORELANE"));
    assert!((row.p50 - 0.5).abs() < 0.01 && (row.p99 - 0.5).abs() < 0.01, "{row:?}");
    assert_eq!(row.rate, Some(2.5));
    let slower = changes(&result("CORELANE", 20, None)).table();
    assert!(slower.contains("2.00") && slower.contains("after / before"), "{slower}");
    assert!(slower.lines().nth(1).is_some_and(|row| row.ends_with(" -")), "{slower}");
    let others = changes(&result("UCX", 5, None));
    assert!(others.rows.is_empty() && others.table().contains("no case"), "{}", others.table());
    let view = View { changes: vec![changes(&result("CORELANE", 5, Some(5.0)))], ..view() };
    assert!(page(&view).contains("<td>0.50</td><td>0.50</td><td>2.50</td>"));
}

#[test]
fn labels_that_are_too_long_still_differ_in_their_ends() {
    let label = "CORELANE@transports=tcp,NIXL_PLUGIN_DIR=/a/folder/far/away/from/here";
    let slowest = format!("{label}, slowest peer");
    let [one, other] = [label, &slowest].map(|label| super::charts::cut_to(label, 52));
    assert_eq!(one.chars().count(), 52);
    assert_eq!(other.chars().count(), 52);
    assert!(
        one.starts_with("CORELANE@transports=tcp,") && one.ends_with("/away/from/here"),
        "{one}"
    );
    assert!(other.ends_with(", slowest peer"), "{other}");
    assert_eq!(super::charts::cut_to(label, label.len()), label);
}

#[test]
fn many_peers_of_backends_have_a_line_each_in_every_chart() {
    let view = super::of_peers(&crate::peers::compared());
    let labels: Vec<Vec<&str>> = view
        .cases
        .iter()
        .map(|case| case.lines.iter().map(|line| line.label.as_str()).collect())
        .collect();
    let (ours, theirs) = ("CORELANE", "UCX@UCX_TLS=tcp");
    assert_eq!(
        labels,
        [
            vec![ours, theirs],
            vec![ours, "CORELANE, slowest peer", theirs, "UCX@UCX_TLS=tcp, slowest peer"]
        ]
    );
    assert_eq!(view.labels(), [ours, theirs], "a backend has one colour");
    let names: Vec<String> = charts(&view).0.into_iter().map(|chart| chart.name).collect();
    let group = "many-peers/to-one/read/4KiB";
    assert_eq!(
        names,
        [
            format!("{group}: median latency by number of peers"),
            format!("{group}: p99 latency by number of peers"),
            format!("{group}: bandwidth by number of peers"),
            format!("{ours} / {theirs}: ratio of latencies")
        ]
    );
    assert!(page(&view).contains("many-peers/to-one/read/4KiB/x4, UCX@UCX_TLS=tcp"));
    let engines = super::of_peers(&crate::peers::engines());
    let lines: Vec<&str> = engines.cases[0].lines.iter().map(|line| line.label.as_str()).collect();
    assert_eq!(lines, ["1 peer", "4 peers", "4 peers, the slowest of them"]);
}

#[cfg(feature = "png")]
#[test]
fn every_chart_becomes_a_picture() {
    let directory = tempfile::tempdir().expect("a directory");
    if let Err(error) = super::png::write(&view(), directory.path()) {
        // A machine without fonts cannot show that they work.
        assert!(error.to_string().contains("no font"), "{error:#}");
        return;
    }
    let files = std::fs::read_dir(directory.path()).expect("lists");
    let pictures: Vec<Vec<u8>> =
        files.map(|file| std::fs::read(file.expect("a file").path()).expect("reads")).collect();
    assert_eq!(pictures.len(), 8);
    assert!(pictures.iter().all(|picture| picture.starts_with(b"\x89PNG") && picture.len() > 2000));
}
