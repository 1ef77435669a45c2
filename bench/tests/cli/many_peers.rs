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
    ] {
        let bench = Bench::new();
        let ran = bench.run(&format!("many-peers {given}"));
        assert_eq!((ran.code, ran.stderr.lines().count()), (2, 1), "{given}: {}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{given}: {}", ran.stderr);
        assert!(bench.files().is_empty(), "{given}");
    }
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
