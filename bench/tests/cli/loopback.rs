//! `corelane-bench loopback` from the outside: two real processes, every backend.

use crate::common::{BACKENDS, Bench};

#[test]
fn every_scenario_is_measured_and_verified() {
    for backend in BACKENDS {
        let bench = Bench::new();
        let (ran, results) =
            bench.results(&format!("loopback --quick --budget 2s --backend {backend}"));
        assert_eq!(results["schema"], "corelane-bench");
        assert_eq!((&results["schema_version"], &results["complete"]), (&1.into(), &true.into()));
        let series = results["series"].as_array().expect("series");
        let ids: Vec<&str> = series.iter().map(|row| row["id"].as_str().expect("an id")).collect();
        for id in [
            "read/64B",
            "write/1MiB",
            "kv/read/256x16KiB",
            "kv/write/4096x4KiB",
            "notify/32B/one-way",
            "notify/32B/round-trip",
            "write+notify/4KiB/round-trip",
            "throughput/read/64KiB/w16",
        ] {
            assert!(ids.contains(&id), "{id} is missing from {ids:?}");
        }
        for row in series {
            let (id, latency) = (&row["id"], &row["latency_us"]);
            assert!(row["operations"].as_u64() > Some(0), "{id}");
            assert!(row["verified_operations"].as_u64() > Some(0), "{id}");
            let at = |name: &str| latency[name].as_f64().expect("a number");
            assert!(at("min") > 0.0, "{id} took no time");
            assert!(
                at("p50") <= at("p99") && at("p99") <= at("p99.9") && at("p99.9") <= at("max"),
                "{id}"
            );
            let hgrm = std::fs::read_to_string(bench.path(row["hgrm"].as_str().expect("a name")));
            assert!(hgrm.expect("the histogram's file").contains("#[Mean"), "{id}");
            // All operations of small cases are verified, and those of the warm-up besides.
            if row["block_bytes"].as_u64() <= Some(4096) && row["scenario"] == "sizes" {
                assert!(row["verified_operations"].as_u64() > row["operations"].as_u64(), "{id}");
            }
        }
        assert_eq!(
            bench.files().len(),
            series.len() + 1,
            "no file but results.json and one per series"
        );
        let summary: Vec<&str> = ran.stdout.lines().rev().take(5).collect();
        assert!(
            summary[0].starts_with("files") && summary[4].starts_with("small"),
            "{}",
            ran.stdout
        );
        assert!(
            !ran.stdout.contains('\u{1b}') && !ran.stderr.contains('\u{1b}'),
            "plain lines outside of a terminal"
        );
    }
}

#[test]
fn an_engine_that_moves_nothing_fails_and_says_so() {
    for backend in BACKENDS {
        for sabotage in ["noop", "stale", "rare"] {
            for case in [
                "sizes --operation read",
                "sizes --operation write",
                "kv --kv 4x4KiB",
                "throughput",
            ] {
                if sabotage == "rare" && case.starts_with("kv") {
                    // With four slots, one operation in fifty is never reached.
                    continue;
                }
                let bench = Bench::new();
                let ran = bench.run(&format!(
                    "loopback --duration 20ms --rounds 1 --sizes 64,4KiB --throughput-sizes 4KiB --window 64 \
                     --backend {backend} --sabotage {sabotage} --scenario {case}"
                ));
                let context =
                    format!("{backend}, {sabotage}, {case}:\n{}\n{}", ran.stdout, ran.stderr);
                assert_eq!(ran.code, 1, "{context}");
                assert!(ran.stderr.contains("verification failed"), "{context}");
                assert!(ran.stderr.contains("nothing was written there"), "{context}");
                assert!(bench.files().iter().all(|name| !name.contains("tmp")), "{context}");
            }
        }
    }
}

#[test]
fn a_notification_ahead_of_its_data_fails() {
    for backend in BACKENDS {
        let bench = Bench::new();
        let options = "--scenario notify --rounds 1 --duration 20ms --sabotage noop";
        let ran = bench.run(&format!("loopback --backend {backend} {options}"));
        assert_eq!(ran.code, 1, "{}", ran.stdout);
        assert!(ran.stderr.contains("before the data it is bound to"), "{}", ran.stderr);
    }
}

#[test]
fn a_failed_run_leaves_its_reason_in_the_results() {
    let bench = Bench::new();
    let ran = bench.run(
        "loopback --backend raw-tcp --scenario sizes --sizes 64 --duration 20ms --sabotage noop",
    );
    assert_eq!(ran.code, 1);
    let json = std::fs::read(bench.path("results.json")).expect("results.json");
    let results: serde_json::Value = serde_json::from_slice(&json).expect("valid JSON");
    assert_eq!(results["complete"], false);
    assert!(results["failure"].as_str().expect("a reason").contains("verification failed"));
}

#[test]
fn the_baseline_is_compared_round_by_round() {
    let bench = Bench::new();
    let (ran, results) = bench.results(
        "loopback --baseline raw-tcp --rounds 3 --duration 30ms --scenario sizes,kv --sizes 64 --kv 16x4KiB --operation read",
    );
    let comparisons = results["comparisons"].as_array().expect("comparisons");
    assert_eq!(comparisons.len(), 2);
    for row in comparisons {
        assert_eq!((&row["rounds"], &row["baseline"]), (&3.into(), &"raw-tcp".into()));
        let at = |name: &str| row["p50_ratio"][name].as_f64().expect("a number");
        assert!(at("min") > 0.0 && at("min") <= at("median") && at("median") <= at("max"), "{row}");
    }
    assert!(
        ran.stdout.contains("corelane / raw-tcp") && ran.stdout.contains("x raw-tcp)"),
        "{}",
        ran.stdout
    );
}

#[test]
fn an_open_loop_keeps_its_rate_and_reports_both_times() {
    for backend in BACKENDS {
        let bench = Bench::new();
        let (ran, results) = bench.results(&format!(
            "loopback --backend {backend} --scenario sizes,notify --sizes 64 --operation read --rate 500 --duration 400ms --rounds 1"
        ));
        assert!(ran.stdout.contains("open loop at 500"), "{}", ran.stdout);
        for row in results["series"].as_array().expect("series") {
            if row["id"].as_str().is_some_and(|id| id.ends_with("one-way")) {
                continue;
            }
            // A busy machine may serve late, so only the schedule itself can be relied on: never faster than asked,
            // and everything that was due is accounted for.
            let rate = row["operations_per_s"].as_f64().expect("a rate");
            assert!(rate < 700.0, "{backend}: asked for 500, got {rate}");
            let count = |name: &str| row[name].as_u64().expect("a count");
            assert!(count("operations") + count("unserved_operations") >= 100, "{row}");
            let (response, service) = (&row["latency_us"]["mean"], &row["service_us"]["mean"]);
            assert!(response.as_f64() >= service.as_f64(), "{row}");
        }
    }
}

#[test]
fn an_overloaded_open_loop_says_so() {
    let bench = Bench::new();
    let (ran, results) = bench.results(
        "loopback --backend raw-tcp --scenario sizes --sizes 1MiB --operation read --rate 200k --duration 40ms --rounds 1",
    );
    let row = &results["series"][0];
    assert!(row["unserved_operations"].as_u64() > Some(0), "{row}");
    assert!(ran.stdout.contains("is overloaded"), "{}", ran.stdout);
    assert!(row["latency_us"]["p50"].as_f64() > row["service_us"]["p50"].as_f64(), "{row}");
}

#[test]
fn applications_on_lanes_polling_targets_and_burners() {
    for options in [
        "--app lane",
        "--app thread --target-app poll",
        "--app lane --target-app poll",
        "--burn",
        "--spin 0",
    ] {
        let bench = Bench::new();
        let (ran, results) = bench.results(&format!(
            "loopback {options} --scenario sizes,kv,notify,throughput --sizes 64,64KiB --kv 64x4KiB --duration 40ms --rounds 1"
        ));
        let series = results["series"].as_array().expect("series");
        assert_eq!(series.len(), 4 + 2 + 4 + 4, "{options}: {}", ran.stdout);
        let placement = series[0]["placement"].as_str().expect("a placement");
        let expected = if options.contains("app lane") {
            "application on the lane"
        } else {
            "application on an unpinned"
        };
        assert!(placement.contains(expected), "{options}: {placement}");
        assert_eq!(placement.contains("CPU-bound"), options == "--burn", "{placement}");
    }
}

#[test]
fn several_pairs_run_at_the_same_time() {
    for backend in BACKENDS {
        let bench = Bench::new();
        let (_, results) = bench.results(&format!(
            "loopback --backend {backend} --engines 4 --scenario sizes --sizes 64 --operation read --duration 50ms --rounds 1"
        ));
        assert_eq!(
            (&results["series"][0]["pairs"], &results["options"]["engines"]),
            (&2.into(), &4.into())
        );
    }
}
