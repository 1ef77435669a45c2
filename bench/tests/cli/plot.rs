//! `corelane-bench plot`: reports of files, and files that are none.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::common::{Bench, Ran, command, run};

/// A result of a moment's measuring.
fn measured(bench: &Bench) -> Value {
    let options =
        "loopback --backend raw-tcp --scenario sizes --sizes 64,4KiB --rounds 1 --duration 20ms";
    bench.results(options).1
}

fn write(bench: &Bench, name: &str, value: &Value) -> PathBuf {
    let path = bench.path(name);
    std::fs::write(&path, value.to_string()).expect("writes");
    path
}

fn plot(bench: &Bench, files: &[&Path], options: &str) -> Ran {
    let mut command: Command = command("plot");
    run(command
        .args(files)
        .arg("--out")
        .arg(bench.path("plot.html"))
        .args(options.split_whitespace()))
}

#[test]
fn a_result_is_drawn_again_and_several_are_compared() {
    let bench = Bench::new();
    let result = measured(&bench);
    let (before, after) =
        (write(&bench, "before.json", &result), write(&bench, "after.json", &result));
    let own = std::fs::read_to_string(bench.path("report.html")).expect("the run's own report");
    assert!(own.contains("read/64B") && own.contains("write/4KiB"), "{own}");
    let ran = plot(&bench, &[&before], "");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(std::fs::read_to_string(bench.path("plot.html")).expect("a report"), own);
    let ran = plot(&bench, &[&before, &after], "");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("plot.html"), "{}", ran.stdout);
    let page = std::fs::read_to_string(bench.path("plot.html")).expect("a report");
    assert!(page.contains("before: raw-tcp") && page.contains("after: raw-tcp"));
    assert!(page.contains("after / before") && page.contains("<td>1.00</td>"), "{page}");
    let row = ran.stdout.lines().find(|line| line.starts_with("read/64B"));
    let cells: Vec<&str> = row.unwrap_or_default().split_whitespace().collect();
    assert_eq!(cells, ["read/64B", "raw-tcp", "1.00", "1.00", "1.00"], "{}", ran.stdout);
}

#[test]
fn files_and_folders_of_one_name_are_told_apart() {
    let bench = Bench::new();
    let result = measured(&bench);
    let mut files = Vec::new();
    for (folder, speed) in [("before/nixl", 1.0), ("after/nixl", 0.5)] {
        std::fs::create_dir_all(bench.path(folder)).expect("creates");
        let mut result = result.clone();
        for row in result["series"].as_array_mut().expect("series") {
            let p50 = row["latency_us"]["p50"].as_f64().expect("a figure");
            row["latency_us"]["p50"] = (p50 * speed).into();
        }
        files.push(write(&bench, &format!("{folder}/results.json"), &result));
    }
    let ran = plot(&bench, &[&files[0], &files[1]], "");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let row = ran.stdout.lines().find(|line| line.starts_with("read/64B")).unwrap_or_default();
    assert!(row.contains(" 0.50 "), "{}", ran.stdout);
    let page = std::fs::read_to_string(bench.path("plot.html")).expect("a report");
    for label in ["before/nixl: raw-tcp", "after/nixl: raw-tcp"] {
        // A line in each of two charts of cases and in those by size, with a dot for each size.
        assert!(page.matches(&format!("{label}, 64B:")).count() >= 2, "{label}: {page}");
    }
}

#[test]
fn results_of_other_machines_are_compared_only_when_asked_to() {
    let bench = Bench::new();
    let result = measured(&bench);
    let mut other = result.clone();
    other["environment"]["initiator"]["cpu_model"] = "Another processor".into();
    other["environment"]["initiator"]["clock"] = "another boot".into();
    let (here, there) = (write(&bench, "here.json", &result), write(&bench, "there.json", &other));
    let ran = plot(&bench, &[&here, &there], "");
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""));
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("different machines") && ran.stderr.contains("--across-machines"),
        "{}",
        ran.stderr
    );
    assert!(!bench.path("plot.html").exists());
    assert_eq!(plot(&bench, &[&here, &there], "--across-machines").code, 0);
    // Another boot of the same machine is the same machine.
    other["environment"]["initiator"]["cpu_model"] =
        result["environment"]["initiator"]["cpu_model"].clone();
    let later = write(&bench, "later.json", &other);
    assert_eq!(plot(&bench, &[&here, &later], "").code, 0);
    // One that is built alike is not, whichever side ran on it.
    for side in ["initiator", "target"] {
        let mut twin = result.clone();
        twin["environment"][side]["clock"] = "another boot".into();
        twin["environment"][side]["host_id"] = "0123456789abcdef".into();
        let mut own = result.clone();
        own["environment"][side]["host_id"] = "fedcba9876543210".into();
        let (own, twin) = (write(&bench, "own.json", &own), write(&bench, "twin.json", &twin));
        let ran = plot(&bench, &[&own, &twin], "");
        assert_eq!(ran.code, 2, "{side}: {}", ran.stdout);
        assert!(ran.stderr.contains("different machines"), "{}", ran.stderr);
    }
}

#[test]
fn what_is_no_result_is_refused_in_one_line() {
    let bench = Bench::new();
    let result = measured(&bench);
    let mut old = result.clone();
    old["schema_version"] = 1.into();
    let mut foreign = result.clone();
    foreign["schema"] = "criterion".into();
    let mut broken = result;
    broken["series"][0]["latency_us"] = "fast".into();
    std::fs::write(bench.path("text.json"), "no JSON at all").expect("writes");
    for (file, expected) in [
        (write(&bench, "old.json", &old), "version 1"),
        (write(&bench, "foreign.json", &foreign), "criterion"),
        (write(&bench, "broken.json", &broken), "schema"),
        (bench.path("text.json"), "no JSON"),
        (bench.path("missing.json"), "cannot read"),
    ] {
        let ran = plot(&bench, &[&file], "");
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{expected}: {}", ran.stderr);
        assert!(!bench.path("plot.html").exists());
    }
    assert_eq!(run(&mut command("plot")).code, 2);
}

#[test]
fn pictures_need_a_build_that_draws_them() {
    let bench = Bench::new();
    let file = write(&bench, "result.json", &measured(&bench));
    let ran = plot(&bench, &[&file], &format!("--png {}", bench.path("pictures").display()));
    if cfg!(feature = "png") {
        let fonts = ran.code == 0;
        assert!(fonts || ran.stderr.contains("no font"), "{}", ran.stderr);
        assert_eq!(bench.path("pictures/read-64B.png").is_file(), fonts);
    } else {
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        assert!(ran.stderr.contains("--features png"), "{}", ran.stderr);
        assert!(!bench.path("plot.html").exists() && !bench.path("pictures").exists());
    }
}
