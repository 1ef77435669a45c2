//! `corelane-bench nixl` where it cannot measure: one clear line, exit code 2, nothing half-written. None of these tests
//! needs NIXL.

use std::process::Command;

use crate::common::{Bench, Ran, command, run};

/// The subcommand as on a machine without NIXL, with folders of the test in place of the words LIBS and JSON.
fn nixl(bench: &Bench, arguments: &str) -> Command {
    let arguments = arguments
        .replace("LIBS", &bench.path("libs").to_string_lossy())
        .replace("JSON", &bench.path("out/results.json").to_string_lossy());
    let mut command = command(&format!("nixl {arguments}"));
    command.current_dir(bench.directory.path());
    command.env_remove("LD_LIBRARY_PATH").env_remove("NIXL_PLUGIN_DIR");
    command
}

fn last_line(ran: &Ran) -> &str {
    ran.stderr.lines().last().unwrap_or_default()
}

#[test]
fn bad_options_are_one_line_and_exit_code_2() {
    for (arguments, expected) in [
        ("--backend @UCX_TLS=tcp", "--backend"),
        ("--vs UCX@UCX_TLS", "KEY=VALUE"),
        ("--vs CORELANE", "named twice"),
        ("--baseline raw-tcp", "--baseline"),
        ("--baseline raw-cma,raw-cma", "named twice"),
        ("--param lanes", "KEY=VALUE"),
        ("--scenario everything", "everything"),
        ("--sizes 12parsecs", "--sizes"),
        ("--sizes 1GiB --max-memory 1MiB", "--max-memory"),
        ("--notification 4", "between 16"),
        ("--pin 1", "--pin"),
        ("--pin target=1000", "core 1000"),
        ("--target-app snore", "snore"),
        ("--rounds 0", "--rounds"),
        ("--scenario fault --fault explode", "explode"),
        ("--fault-timeout soon", "--fault-timeout"),
        ("--num_threads 4", "--num_threads 4 is for"),
        ("--num_threads 4 --scenario sizes --baseline raw-cma", "--baseline"),
        ("--num_threads 0 --scenario sizes", "--num_threads"),
        ("--scenario notify --start_block_size 4096", "--scenario"),
        ("--kv 2x4KiB --start_block_size 4096", "--kv"),
        ("--sizes 4KiB --max_batch_size 4", "--sizes"),
        ("--initiator_seg_type VRAM --gpus 4000", "GPU"),
        ("--target_seg_type BLK", "--target_seg_type"),
        ("--start_block_size 1GiB --max_block_size 8GiB", "--max-memory"),
        ("--model gpt-9", "gpt-9"),
        ("--decode-rate 0", "--decode-rate"),
        ("--nixl-libs LIBS", "--nixl-libs"),
        ("--plugin-dir LIBS", "--plugin-dir"),
    ] {
        let bench = Bench::new();
        let ran = run(&mut nixl(&bench, arguments));
        assert_eq!(ran.code, 2, "{arguments}: {}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{arguments}: {}", ran.stderr);
        assert!(ran.stderr.starts_with("corelane-bench: "), "{arguments}: {}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{arguments}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{arguments}");
        assert!(bench.files().is_empty(), "{arguments}");
    }
}

#[test]
fn a_recording_that_is_none_is_refused_with_its_line() {
    let bench = Bench::new();
    std::fs::write(bench.path("bad.csv"), "time_s,bytes\n0,4096\nsoon,4096\n").expect("writes");
    for (file, expected) in [("bad.csv", "line 3: time_s is 'soon'"), ("none.csv", "none.csv")] {
        let ran = run(&mut nixl(&bench, &format!("--scenario trace --trace {file}")));
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{}", ran.stderr);
        assert_eq!(bench.files(), ["bad.csv"]);
    }
}

#[test]
fn what_is_missing_is_named_with_its_remedy() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("libs")).expect("creates");
    let ran = run(&mut nixl(&bench, "--nixl-libs LIBS --rounds 1 --json JSON"));
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    let remedy = if cfg!(feature = "nixl") { "--nixl-libs DIR" } else { "--features nixl" };
    assert!(last_line(&ran).starts_with("corelane-bench: "), "{}", ran.stderr);
    assert!(last_line(&ran).contains(remedy), "{}", ran.stderr);
    assert_eq!(ran.stdout, "");
    assert_eq!(bench.files(), ["libs"], "something half-written");
}

#[test]
fn help_describes_the_options_and_hides_the_processes() {
    let ran = run(&mut command("nixl --help"));
    assert_eq!(ran.code, 0);
    for option in [
        "--backend",
        "--vs",
        "--baseline",
        "--param",
        "--scenario",
        "--sizes",
        "--kv",
        "--op",
        "--rounds",
        "--duration",
        "--prog-thread",
        "--target-app",
        "--pin",
        "--json",
        "--out-dir",
        "--format",
        "--model",
        "--fault",
        "--num_iter",
        "--start_block_size",
        "--nixl-libs",
        "--plugin-dir",
    ] {
        assert!(ran.stdout.contains(option), "{option}");
    }
    assert!(!run(&mut command("--help")).stdout.contains("nixl-side"));
}

#[cfg(feature = "nixl")]
mod with_the_driver {
    use super::*;

    #[test]
    fn a_place_that_cannot_be_written_is_noticed_before_measuring() {
        let bench = Bench::new();
        std::fs::write(bench.path("out"), b"").expect("writes");
        let ran = run(&mut nixl(&bench, "--json JSON"));
        assert_eq!(ran.code, 2, "{}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        assert!(ran.stderr.contains("cannot create the directory"), "{}", ran.stderr);
    }

    /// A library of the right name without the functions: the bindings abort the process that asks for one.
    #[test]
    fn a_process_that_dies_is_reported_with_its_backend() {
        let bench = Bench::new();
        std::fs::create_dir(bench.path("libs")).expect("creates");
        let library = bench.path("libs/libnixl_capi.so");
        let built = Command::new("g++")
            .args(["-shared", "-x", "c++", "/dev/null", "-o"])
            .arg(&library)
            .status()
            .expect("the compiler that built the bindings is there");
        assert!(built.success() && library.is_file());
        let ran = run(&mut nixl(&bench, "--vs UCX --nixl-libs LIBS --rounds 1 --json JSON"));
        assert_eq!(ran.code, 1, "{}", ran.stderr);
        let line = last_line(&ran);
        assert!(
            line.contains("CORELANE") && line.contains("ended unexpectedly: signal"),
            "{}",
            ran.stderr
        );
        assert_eq!(ran.stdout, "");
        assert!(!bench.path("out/results.json").exists());
    }
}

/// Through NIXL, which `tests/run.sh nixl` provides.
#[cfg(feature = "nixl")]
mod with_nixl {
    use super::*;

    const SHORT: &str =
        "nixl --rounds 1 --duration 20ms --phase-duration 50ms --prefill-bytes 1MiB";

    #[test]
    #[ignore = "needs NIXL with the plugin: tests/run.sh nixl"]
    fn a_backend_for_files_is_no_backend_for_transfers() {
        for arguments in ["--backend POSIX", "--vs POSIX"] {
            let bench = Bench::new();
            let mut command = command(&format!("{SHORT} {arguments} --scenario sizes --sizes 64"));
            let ran = run(command.arg("--out-dir").arg(bench.path("out")));
            assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
            assert!(
                last_line(&ran).contains("POSIX is no backend for transfers"),
                "{}",
                ran.stderr
            );
            assert!(bench.files().is_empty(), "{:?}", bench.files());
        }
    }

    #[test]
    #[ignore = "needs NIXL with the plugin: tests/run.sh nixl"]
    fn results_tell_the_threads_of_each_backend_and_what_they_are_of() {
        let bench = Bench::new();
        let (_, results) = bench.results(&format!(
            "{SHORT} --vs UCX --scenario sizes --sizes 4KiB --op read --num_threads 2 --warmup_iter 3"
        ));
        assert_eq!(results["options"]["warmup_iter"], 3);
        assert_eq!(results["options"]["memory"]["target"], "DRAM");
        let threads = &results["threads"];
        assert_eq!(
            (&threads[0]["backend"], &threads[1]["backend"]),
            (&"CORELANE".into(), &"UCX".into())
        );
        let ours = threads[0]["target"].as_array().expect("threads");
        assert!(
            ours.iter().any(|it| it.as_str().is_some_and(|it| it.contains("lane"))),
            "{threads}"
        );
    }

    #[test]
    #[ignore = "needs NIXL with the plugin: tests/run.sh nixl"]
    fn timed_transfers_that_move_nothing_fail_the_verification() {
        for sabotage in ["noop", "stale"] {
            for case in [
                "sizes --sizes 64 --op read",
                "sizes --sizes 64 --op write",
                "sizes --sizes 4KiB --op read --num_threads 2",
                "sizes --sizes 4KiB --op write --num_threads 2",
                "kv --kv 16x4KiB --op read",
                "decode-under-prefill",
            ] {
                let bench = Bench::new();
                let ran = bench.run(&format!("{SHORT} --sabotage {sabotage} --scenario {case}"));
                let all = format!("{sabotage}, {case}:\n{}\n{}", ran.stdout, ran.stderr);
                assert_eq!(ran.code, 1, "{all}");
                assert!(last_line(&ran).contains("verification failed"), "{all}");
                assert!(bench.files().is_empty(), "half-written: {:?}", bench.files());
            }
        }
    }
}
