//! Options that cannot be met: one line, exit code 2, nothing started.

use crate::common::{Bench, command, run};

#[test]
fn bad_options_are_one_line_and_exit_code_2() {
    for arguments in [
        "loopback --sizes 12parsecs",
        "loopback --engines 3",
        "loopback --nonsense",
        "loopback --server-cores 1000",
        "loopback --caller-core 1000",
        "loopback --max-memory 1MiB",
        "loopback --backend raw-tcp --baseline raw-tcp",
        "loopback --backend raw-cma --baseline raw-tcp,raw-cma",
        "loopback --baseline raw-tcp,raw-tcp",
        "loopback --baseline raw-pigeon",
        "loopback --transport pigeon",
        "loopback --transport tcp,pigeon",
        "loopback --memory borrowed",
        "loopback --lanes none",
        "loopback --scenario decode-under-prefill --backend raw-cma",
        "loopback --scenario decode-under-prefill --prefill-bytes 1TiB",
        "loopback --scenario decode-under-prefill --prefill-bytes 8GiB",
        "loopback --phase-duration 2m",
        "loopback --decode-rate 0",
        "client",
        "server --core 1000",
        "fly",
        "",
    ] {
        let bench = Bench::new();
        let mut command = command(arguments);
        if arguments.starts_with("loopback") {
            command.arg("--out-dir").arg(bench.directory.path());
        }
        let ran = run(&mut command);
        assert_eq!(ran.code, 2, "{arguments}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{arguments}");
        if !arguments.is_empty() {
            assert_eq!(ran.stderr.lines().count(), 1, "{arguments}: {}", ran.stderr);
            assert!(ran.stderr.starts_with("corelane-bench: "), "{arguments}: {}", ran.stderr);
        }
        assert!(bench.files().is_empty(), "{arguments}");
    }
}

/// Pages are touched at once: a machine that runs out of them would end processes that have nothing to do with it.
#[test]
fn more_memory_than_there_is_is_refused_before_any_is_taken() {
    for arguments in [
        "loopback --scenario sizes --sizes 1000000GiB --max-memory 9000000GiB",
        "many-peers --peers 1 --sizes 1000000GiB --max-memory 90000000GiB",
    ] {
        let bench = Bench::new();
        let ran = bench.run(arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{arguments}: {}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{arguments}: {}", ran.stderr);
        assert!(ran.stderr.contains("memory and the machine has"), "{arguments}: {}", ran.stderr);
        assert!(bench.files().is_empty(), "{arguments}");
    }
}

/// A configuration that the engine refuses is the user's to put right.
#[test]
fn devices_that_there_are_not_are_bad_options_too() {
    for arguments in [
        "loopback --transport rdma --rdma-devices nowhere_0 --scenario sizes --sizes 64 --rounds 1 --duration 20ms",
        "loopback --transport tcp,rdma --server-rdma-devices nowhere_0 --scenario sizes --sizes 64 --rounds 1 --duration 20ms",
    ] {
        let bench = Bench::new();
        let ran = run(command(arguments).arg("--out-dir").arg(bench.path("out")));
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{arguments}: {}", ran.stderr);
        let last = ran.stderr.lines().last().unwrap_or_default();
        let named = if cfg!(feature = "rdma") { "nowhere_0" } else { "rdma" };
        assert!(last.contains(named), "{arguments}: {}", ran.stderr);
        assert!(bench.files().is_empty(), "{arguments}: {:?}", bench.files());
    }
}

#[test]
fn an_output_that_cannot_be_written_is_noticed_first() {
    let bench = Bench::new();
    std::fs::write(bench.path("file"), b"").expect("writes");
    let begin = std::time::Instant::now();
    let ran = run(command("loopback --out-dir").arg(bench.path("file")));
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(ran.stderr.contains("cannot create the directory"), "{}", ran.stderr);
    assert!(begin.elapsed() < std::time::Duration::from_secs(10), "noticed only after measuring");
}

#[test]
fn help_describes_every_public_option_and_hides_the_others() {
    let ran = run(&mut command("loopback --help"));
    assert_eq!(ran.code, 0);
    for option in [
        "--scenario",
        "--sizes",
        "--kv",
        "--window",
        "--baseline",
        "--rounds",
        "--app",
        "--target-app",
        "--engines",
        "--burn",
        "--rate",
        "--transport",
        "--memory",
        "--lanes",
        "--out-dir",
        "--json",
        "--server-cores",
        "--client-cores",
        "--caller-core",
    ] {
        assert!(ran.stdout.contains(option), "{option}");
    }
    assert!(!ran.stdout.contains("--sabotage") && !ran.stdout.contains("--parent-pid"));
    assert_eq!(run(&mut command("--version")).code, 0);
}

#[test]
fn json_goes_where_it_is_asked_to() {
    let bench = Bench::new();
    let options = "loopback --backend raw-tcp --scenario sizes --sizes 64 --rounds 1 --duration 20ms --transport tcp";
    let ran = run(command(options)
        .arg("--json")
        .arg(bench.path("deep/OUT"))
        .arg("--out-dir")
        .arg(bench.path("histograms")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(
        bench.path("deep/OUT").is_file()
            && bench.path("histograms/read-64B.raw-tcp.hgrm").is_file()
    );
    assert!(!bench.path("histograms/results.json").exists());
}
