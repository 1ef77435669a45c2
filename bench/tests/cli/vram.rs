//! Memory of GPUs: measured where there is a driver (tests/run.sh fake-gpu has one whose GPUs are threads), and refused elsewhere.

use std::ffi::{c_int, c_uint};

use libloading::os::unix::Library;

use crate::common::{Bench, run};

/// What this machine has of GPUs.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// As in images for machines with GPUs, and where a GPU is out of order.
    DriverOnly,
    Gpu,
}

fn found() -> Found {
    // SAFETY: loading runs the initialisers of the driver.
    let Ok(driver) = (unsafe { Library::new("libcuda.so.1") }) else { return Found::Nothing };
    let mut count = 0;
    // SAFETY: types as in the driver's manual.
    let works = unsafe {
        let init = driver.get::<unsafe extern "C" fn(c_uint) -> c_int>(b"cuInit");
        let count_gpus =
            driver.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDeviceGetCount");
        match (init, count_gpus) {
            (Ok(init), Ok(count_gpus)) => init(0) == 0 && count_gpus(&raw mut count) == 0,
            _ => false,
        }
    };
    if works && count > 0 { Found::Gpu } else { Found::DriverOnly }
}

/// Says so where there is none.
fn has_gpu() -> bool {
    let found = found();
    if found != Found::Gpu {
        eprintln!("SKIPPED: no GPU with a driver ({found:?})");
    }
    found == Found::Gpu
}

#[test]
fn vram_is_measured_and_verified_beside_bare_copies() {
    if !has_gpu() {
        return;
    }
    for transport in ["local", "tcp"] {
        let bench = Bench::new();
        let (ran, results) = bench.results(&format!(
            "loopback --memory vram --gpus 0 --baseline raw-gpu --rounds 1 --duration 20ms --transport {transport} \
             --scenario sizes,kv,notify,decode-under-prefill --sizes 64,5MiB --kv 64x4KiB --phase-duration 100ms --prefill-bytes 1MiB"
        ));
        let series = results["series"].as_array().expect("series");
        for (id, backends) in [
            ("read/64B", 2),
            ("write/5MiB", 2),
            ("kv/read/64x4KiB", 2),
            ("kv/write/64x4KiB", 2),
            ("write+notify/4KiB/round-trip", 2),
        ] {
            let rows: Vec<_> = series.iter().filter(|row| row["id"] == id).collect();
            assert_eq!(rows.len(), backends, "{id} of {}", ran.stdout);
            for row in rows {
                assert!(row["verified_operations"].as_u64() > Some(0), "{row}");
            }
        }
        assert!(!results["loads"].as_array().expect("loads").is_empty(), "{}", ran.stdout);
        assert!(ran.stdout.contains("memory of GPUs"), "{}", ran.stdout);
    }
}

#[test]
fn wrong_bytes_in_vram_are_found() {
    if !has_gpu() {
        return;
    }
    let bench = Bench::new();
    let ran = bench.run(
        "loopback --memory vram --rounds 1 --duration 30ms --transport local --scenario sizes --sizes 4KiB \
         --sabotage noop",
    );
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("verification failed"), "{}", ran.stderr);
}

#[test]
fn what_cannot_be_measured_in_vram_is_told_in_one_line() {
    let mut refused = vec![
        ("loopback --backend raw-gpu", "--memory vram"),
        ("loopback --gpus none", "--gpus"),
        ("loopback --memory vram --gpus 4000", "GPU"),
    ];
    refused.push(match found() {
        Found::Nothing => ("loopback --memory vram", "libcuda.so.1 not found"),
        Found::DriverOnly => ("loopback --memory vram", "GPU"),
        Found::Gpu => ("loopback --memory vram --baseline raw-cma", "raw-gpu"),
    });
    for (arguments, expected) in refused {
        let bench = Bench::new();
        let ran =
            run(crate::common::command(arguments).arg("--out-dir").arg(bench.directory.path()));
        assert_eq!(ran.code, 2, "{arguments}: {}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{arguments}: {}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{arguments}: {}", ran.stderr);
    }
}
