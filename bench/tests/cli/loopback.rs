//! `corelane-bench loopback` from the outside: two real processes, every backend.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::common::{BACKENDS, Bench, command, run};

#[test]
fn every_scenario_is_measured_and_verified() {
    for backend in BACKENDS {
        let bench = Bench::new();
        let (ran, results) =
            bench.results(&format!("loopback --quick --budget 2s --backend {backend}"));
        assert_eq!(results["schema"], "corelane-bench");
        assert_eq!((&results["schema_version"], &results["complete"]), (&2.into(), &true.into()));
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
            2 * series.len() + 2,
            "no file but results.json, report.html and two per series"
        );
        let summary: Vec<&str> = ran.stdout.lines().rev().take(6).collect();
        assert!(
            summary[0].starts_with("files") && summary[5].starts_with("small"),
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
fn several_baselines_run_in_the_same_rounds() {
    let bench = Bench::new();
    let (ran, results) = bench.results(
        "loopback --baseline raw-cma,raw-memcpy --baseline raw-tcp --rounds 2 --duration 30ms --scenario sizes,kv,notify \
         --sizes 64 --kv 1100x100 --operation read",
    );
    let comparisons = results["comparisons"].as_array().expect("comparisons");
    let ids =
        ["read/64B", "kv/read/1100x100B", "notify/32B/one-way", "write+notify/4KiB/round-trip"];
    for baseline in ["raw-cma", "raw-memcpy", "raw-tcp"] {
        for id in ids {
            let row = comparisons
                .iter()
                .find(|row| row["baseline"] == baseline && row["id"] == id)
                .unwrap_or_else(|| panic!("no {id} against {baseline}"));
            assert_eq!((&row["rounds"], &row["backend"]), (&2.into(), &"corelane".into()));
            assert!(row["p99.9_ratio"]["median"].as_f64() > Some(0.0), "{row}");
            let (ours, theirs) =
                (round_p50(&results, id, "corelane"), round_p50(&results, id, baseline));
            let differences = [ours[0] - theirs[0], ours[1] - theirs[1]];
            let spread = &row["p50_difference_us"];
            let at = |name: &str| spread[name].as_f64().expect("a number");
            assert!((at("min") - differences[0].min(differences[1])).abs() < 1e-6, "{row}");
            assert!((at("median") - (differences[0] + differences[1]) / 2.0).abs() < 1e-6, "{row}");
        }
        assert!(ran.stdout.contains(&format!("corelane / {baseline}")), "{}", ran.stdout);
    }
    assert_eq!(results["options"]["baselines"].as_array().map(Vec::len), Some(3));
    assert!(
        ran.stdout.contains("p50 diff us") && ran.stdout.contains("x raw-memcpy, "),
        "{}",
        ran.stdout
    );
}

fn round_p50(results: &serde_json::Value, id: &str, backend: &str) -> Vec<f64> {
    let series = results["series"].as_array().expect("series");
    let row = series.iter().find(|row| row["id"] == id && row["backend"] == backend);
    let rounds = row.expect("a series")["rounds"].as_array().expect("rounds");
    rounds.iter().map(|round| round["p50_us"].as_f64().expect("a number")).collect()
}

/// Makes a system call fail in the program and in all processes that it starts.
fn forbid(command: &mut Command, call: libc::c_long, errno: i32) {
    let filter = move || {
        // Program for the kernel: compare the call's number, which comes first, then allow or fail.
        let step = |code: u32, jt, k| libc::sock_filter { code: code as u16, jt, jf: 0, k };
        let mut program = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, call as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
            step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        ];
        let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
        // SAFETY: both calls take plain numbers and a program that lives until they return.
        let refused = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) != 0
        };
        if refused { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec the closure only makes system calls; it allocates nothing and takes no lock.
    unsafe { command.pre_exec(filter) };
}

#[test]
fn a_kernel_that_refuses_to_copy_is_explained_in_one_line() {
    for (call, option, errno, expected) in [
        (libc::SYS_process_vm_readv, "read", libc::EPERM, "ptrace_scope"),
        (libc::SYS_process_vm_writev, "write", libc::EPERM, "leave raw-cma out"),
        (libc::SYS_process_vm_readv, "read", libc::ENOSYS, "CONFIG_CROSS_MEMORY_ATTACH"),
    ] {
        let bench = Bench::new();
        let options = "--backend raw-cma --scenario sizes --sizes 64 --rounds 1 --duration 20ms";
        let mut command = command(&format!("loopback {options} --operation {option}"));
        forbid(command.arg("--out-dir").arg(bench.directory.path()), call, errno);
        let ran = run(&mut command);
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        let reasons: Vec<&str> =
            ran.stderr.lines().filter(|line| line.starts_with("corelane-bench: ")).collect();
        assert_eq!(reasons.len(), 1, "{}", ran.stderr);
        assert!(reasons[0].contains("raw-cma") && reasons[0].contains(expected), "{}", reasons[0]);
    }
}

#[test]
fn memory_of_the_engine_is_measured_over_every_transport() {
    for transport in ["local", "tcp"] {
        let bench = Bench::new();
        let (ran, results) = bench.results(&format!(
            "loopback --memory engine --transport {transport} --scenario sizes --sizes 64,1MiB --rounds 2 --duration 20ms"
        ));
        assert!(ran.stdout.contains("memory of the engine"), "{}", ran.stdout);
        // Every engine was shut down before its memory went: nobody had to wait, or leave it behind.
        assert!(!ran.stderr.contains("WARN"), "{}", ran.stderr);
        assert_eq!(results["options"]["memory"], "engine");
        let series = results["series"].as_array().expect("series");
        assert_eq!(series.len(), 4, "{transport}");
        for row in series {
            for count in ["operations", "verified_operations"] {
                assert!(row[count].as_u64() > Some(0), "{transport}: {count}");
            }
        }
    }
}

#[test]
fn several_lanes_have_a_core_each() {
    let allowed = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).expect("a mask");
    let cores = (0..nix::sched::CpuSet::count())
        .filter(|&core| allowed.is_set(core).expect("in range"))
        .count();
    let bench = Bench::new();
    let options =
        "loopback --scenario sizes --sizes 64 --rounds 1 --duration 20ms --operation read";
    let ran = bench.run(&format!("{options} --lanes {}", cores + 1));
    assert_eq!((ran.code, ran.stderr.lines().count()), (2, 1), "{}", ran.stderr);
    assert!(ran.stderr.contains("needs a core for each lane"), "{}", ran.stderr);
    if cores >= 2 {
        let (ran, results) = bench.results(&format!("{options} --lanes 2"));
        assert_eq!(results["options"]["lanes"], 2);
        assert!(ran.stdout.contains("2 lanes on cores"), "{}", ran.stdout);
    }
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

#[test]
fn reads_beside_writes_are_measured_alone_and_loaded() {
    let bench = Bench::new();
    let (ran, results) = bench.results(
        "loopback --scenario decode-under-prefill --phase-duration 200ms --prefill-bytes 4MiB --rounds 2",
    );
    let id = "decode-under-prefill/4KiB@1000+4MiB";
    let series = results["series"].as_array().expect("series");
    let ids: Vec<&str> = series.iter().map(|row| row["id"].as_str().expect("an id")).collect();
    assert_eq!(ids, [format!("{id}/idle"), format!("{id}/loaded")]);
    let load = &results["loads"][0];
    assert_eq!((&load["id"], &load["backend"]), (&id.into(), &"corelane".into()));
    // 1000 a second for 200 ms, twice: all of them were due, whatever became of them.
    assert_eq!(load["reads_due"], 400);
    assert!(load["served_share"].as_f64() > Some(0.0));
    assert!(load["bulk_alone_gb_per_s"]["median"].as_f64() > Some(0.0));
    assert!(load["bulk_share"]["confidence"].as_f64() == Some(0.5), "two rounds: {load}");
    let points = series[1]["histogram_ns"].as_array().expect("points").iter();
    assert_eq!(points.map(|point| point[1].as_u64().expect("a count")).sum::<u64>(), 400);
    assert!(ran.stdout.contains("small reads beside large writes"), "{}", ran.stdout);
}

#[test]
fn a_verification_of_reads_beside_writes_can_fail() {
    let bench = Bench::new();
    let ran = bench.run(
        "loopback --scenario decode-under-prefill --phase-duration 100ms --prefill-bytes 1MiB --rounds 1 --sabotage noop",
    );
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    assert!(ran.stderr.contains("verification failed"), "{}", ran.stderr);
}
