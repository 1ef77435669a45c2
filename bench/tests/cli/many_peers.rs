//! `many-peers`.

use crate::common::{Bench, command, run};

const SHORT: &str = "many-peers --duration 50ms --rounds 1";

#[test]
fn every_peer_is_served_and_counted() {
    for transport in ["tcp", "local"] {
        let bench = Bench::new();
        let (ran, results) = bench.results(&format!(
            "{SHORT} --transport {transport} --peers 1,3 --sizes 64,100KiB --processes 2"
        ));
        assert_eq!(results["schema"], "corelane-bench-many-peers");
        assert_eq!(results["options"]["transport"], transport);
        let series = results["series"].as_array().expect("series");
        // Both ways, reads and writes, two sizes, two numbers of peers.
        assert_eq!(series.len(), 2 * 2 * 2 * 2, "{}", ran.stdout);
        for row in series {
            let peers = row["per_peer"].as_array().expect("peers");
            assert_eq!(peers.len() as u64, row["peers"].as_u64().expect("a number"));
            for peer in peers {
                let points = peer["histogram_ns"].as_array().expect("points").iter();
                let samples: u64 = points.map(|point| point[1].as_u64().expect("a count")).sum();
                // Each went through all its places, however long that took.
                assert!(samples >= 16, "{row}");
            }
            let fairness = row["fairness"]["median"].as_f64().expect("a figure");
            assert!(fairness > 0.0 && fairness <= 1.0 + 1e-9, "{row}");
            assert!(row["hub_threads"].as_u64() > Some(1), "{row}");
            if transport == "tcp" {
                assert!(row["hub_descriptors_per_peer"]["median"].as_f64() >= Some(1.0), "{row}");
            }
        }
        for part in ["fairness", "fds/peer", "many-peers/to-one/write/64B/x3", "report.html"] {
            assert!(ran.stdout.contains(part), "{part}: {}", ran.stdout);
        }
        let report = std::fs::read_to_string(bench.path("report.html")).expect("a report");
        assert!(report.contains("One engine with many peers"), "{report}");
        assert!(report.contains("the slowest of them"), "{report}");
    }
}

#[test]
fn a_verification_of_many_peers_can_fail() {
    for direction in ["from-one", "to-one"] {
        for operation in ["read", "write"] {
            let bench = Bench::new();
            let ran = bench.run(&format!(
                "{SHORT} --peers 2 --direction {direction} --operation {operation} --sabotage"
            ));
            assert_eq!(ran.code, 1, "{}", ran.stdout);
            assert!(ran.stderr.contains("verification failed"), "{}", ran.stderr);
            assert!(ran.stderr.contains("nothing was written there"), "{}", ran.stderr);
            assert!(bench.files().is_empty(), "something half-written: {:?}", bench.files());
        }
    }
}

#[test]
fn bad_options_of_many_peers_are_one_line_and_exit_code_2() {
    for (given, expected) in [
        ("--peers 0", "--peers"),
        ("--peers 1000", "--peers"),
        ("--hub-core 1000", "core 1000"),
        ("--transport pigeon", "pigeon"),
        ("--direction sideways", "sideways"),
        ("--sizes 1GiB --peers 64", "--max-memory"),
        ("--backend @UCX_TLS=tcp", "--backend"),
        ("--vs UCX@UCX_TLS", "KEY=VALUE"),
        ("--vs CORELANE", "named twice"),
        ("--vs UCX --transport tcp", "--transport is for bare engines"),
        ("--prog-thread", "--prog-thread is for backends of NIXL"),
        ("--param lanes=1", "--param is for backends of NIXL"),
        ("--vs UCX --plugin-dir /nowhere/at/all", "--plugin-dir"),
        ("--vs UCX --peer-core 1000", "core 1000"),
    ] {
        let bench = Bench::new();
        let ran = bench.run(&format!("many-peers {given}"));
        assert_eq!((ran.code, ran.stderr.lines().count()), (2, 1), "{given}: {}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{given}: {}", ran.stderr);
        assert!(bench.files().is_empty(), "{given}");
    }
}

#[test]
fn a_missing_nixl_is_named_with_its_remedy() {
    let bench = Bench::new();
    let out = bench.path("out");
    let mut command = command("many-peers --vs UCX --rounds 1 --out-dir");
    command.arg(&out).env_remove("LD_LIBRARY_PATH").env_remove("NIXL_PLUGIN_DIR");
    let ran = run(&mut command);
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    let remedy = if cfg!(feature = "nixl") { "--nixl-libs DIR" } else { "--features nixl" };
    let line = ran.stderr.lines().last().unwrap_or_default();
    assert!(line.starts_with("corelane-bench: ") && line.contains(remedy), "{}", ran.stderr);
    assert!(ran.stdout.is_empty() && !out.exists(), "something half-written");
}

#[test]
fn its_processes_are_hidden_and_its_results_are_drawn_again() {
    assert!(!run(&mut command("--help")).stdout.contains("peers-side"));
    let bench = Bench::new();
    bench.results(&format!("{SHORT} --peers 2 --direction to-one --operation read"));
    let mut plot = command("plot results.json --out again.html");
    let ran = run(plot.current_dir(bench.directory.path()));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let again = std::fs::read_to_string(bench.path("again.html")).expect("a report");
    assert!(again.contains("many-peers/to-one/read/4KiB"), "{again}");
}

/// Through NIXL, which `tests/run.sh nixl` provides.
#[cfg(feature = "nixl")]
mod with_nixl {
    use super::*;

    #[test]
    #[ignore = "needs NIXL with the plugin: tests/run.sh nixl"]
    fn backends_run_the_same_cases_and_are_compared() {
        let bench = Bench::new();
        let (ran, results) = bench.results(
            "many-peers --duration 50ms --rounds 2 --vs UCX --vs UCX@UCX_TLS=tcp --peers 1,3 --sizes 100KiB --processes 2",
        );
        assert_eq!(results["options"]["backend"], "CORELANE");
        assert!(results["options"]["nixl"].as_str().is_some_and(|version| !version.is_empty()));
        let series = results["series"].as_array().expect("series");
        // Both ways, reads and writes, two numbers of peers.
        let cases = 2 * 2 * 2;
        for backend in ["CORELANE", "UCX", "UCX@UCX_TLS=tcp"] {
            let rows: Vec<_> = series.iter().filter(|row| row["backend"] == backend).collect();
            assert_eq!(rows.len(), cases, "{backend}: {}", ran.stdout);
            for row in rows {
                let peers = row["per_peer"].as_array().expect("peers");
                assert_eq!(peers.len() as u64, row["peers"].as_u64().expect("a number"));
                for peer in peers {
                    let points = peer["histogram_ns"].as_array().expect("points").iter();
                    let samples: u64 =
                        points.map(|point| point[1].as_u64().expect("a count")).sum();
                    // Each went through all its places in both rounds.
                    assert!(samples >= 32, "{row}");
                }
                let hgrm = row["hgrm"].as_str().expect("a name");
                assert!(hgrm.contains(backend) && bench.path(hgrm).is_file(), "{hgrm}");
            }
        }
        let comparisons = results["comparisons"].as_array().expect("comparisons");
        assert_eq!(comparisons.len(), 2 * cases);
        for row in comparisons {
            assert_eq!(
                (&row["backend"], &row["ratios"]["rounds"]),
                (&"CORELANE".into(), &2.into())
            );
            assert!(row["ratios"]["p99"]["median"].as_f64() > Some(0.0), "{row}");
        }
        assert!(ran.stdout.contains("p99 ratio"), "{}", ran.stdout);
        let report = std::fs::read_to_string(bench.path("report.html")).expect("a report");
        for part in
            ["UCX@UCX_TLS=tcp, slowest peer", "latency by number of peers", "CORELANE / UCX:"]
        {
            assert!(report.contains(part), "{part}: {report}");
        }
    }

    #[test]
    #[ignore = "needs NIXL with the plugin: tests/run.sh nixl"]
    fn progress_threads_serve_in_place_of_a_polling_application() {
        let bench = Bench::new();
        let (ran, results) =
            bench.results(&format!("{SHORT} --backend UCX@UCX_TLS=tcp --prog-thread --peers 3"));
        assert_eq!(results["series"].as_array().map(Vec::len), Some(4), "{}", ran.stdout);
        assert_eq!(results["options"]["prog_thread"], true);
        assert!(results["comparisons"].as_array().is_some_and(Vec::is_empty));
        assert!(ran.stdout.contains("progress threads on"), "{}", ran.stdout);
        assert!(!ran.stdout.contains("ratio"), "{}", ran.stdout);
    }

    #[test]
    #[ignore = "needs NIXL with the plugin: tests/run.sh nixl"]
    fn a_verification_of_every_backend_can_fail() {
        for backend in ["CORELANE", "UCX"] {
            for direction in ["from-one", "to-one"] {
                for operation in ["read", "write"] {
                    let bench = Bench::new();
                    let ran = bench.run(&format!(
                        "{SHORT} --backend {backend} --peers 2 --direction {direction} --operation {operation} --sabotage"
                    ));
                    assert_eq!(ran.code, 1, "{}", ran.stdout);
                    let line = ran.stderr.lines().last().unwrap_or_default();
                    assert!(line.contains(&format!("the {backend} ")), "{}", ran.stderr);
                    assert!(line.contains("verification failed"), "{}", ran.stderr);
                    assert!(line.contains("nothing was written there"), "{}", ran.stderr);
                    assert!(bench.files().is_empty(), "half-written: {:?}", bench.files());
                }
            }
        }
    }

    #[test]
    #[ignore = "needs NIXL with the plugin: tests/run.sh nixl"]
    fn a_backend_that_is_not_there_is_noticed_before_measuring() {
        let bench = Bench::new();
        let ran = bench.run(&format!("{SHORT} --backend UCX --vs PIGEON"));
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        let line = ran.stderr.lines().last().unwrap_or_default();
        assert!(line.contains("NIXL finds no plugin PIGEON"), "{}", ran.stderr);
        assert!(ran.stdout.is_empty() && bench.files().is_empty(), "{:?}", bench.files());
    }
}
