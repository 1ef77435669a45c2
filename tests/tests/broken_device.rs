//! A device breaks: its requests end in errors of its own, or their ends are never told. On devices that move nothing
//! (`bench/noop-verbs`), so that any machine has them.

#![cfg(feature = "rdma")]
#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::path::PathBuf;
use std::process::Command;

use corelane::RegionDescriptor;
use corelane_tests::{PeerProcess, Target, to_hex};

const LEN: usize = 4 << 20;

/// What every build of the workspace leaves beside the programs; `None`: it was not built.
fn library() -> Option<PathBuf> {
    let program = std::env::current_exe().unwrap();
    let library = program.parent().unwrap().with_file_name("libcorelane_noop_verbs.so");
    if library.exists() {
        return Some(library);
    }
    assert!(std::env::var_os("CI").is_none(), "{} is not there", library.display());
    eprintln!("SKIPPED: cargo build -p corelane-noop-verbs");
    None
}

fn process(library: &PathBuf, variables: &[(&str, &str)]) -> PeerProcess {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-test-peer"));
    command.env("CORELANE_LIBIBVERBS", library).envs(variables.iter().copied());
    PeerProcess::start_command(&mut command).unwrap()
}

/// Two processes, of which the first has a device with this fault.
struct Pair {
    near: PeerProcess,
    own: RegionDescriptor,
    far: Target,
}

impl Pair {
    fn new(fault: &str, count: u32) -> Option<Self> {
        let library = library()?;
        let settings = "transports=rdma,tcp liveness_ms=20000";
        let far = Target::start(process(&library, &[]), "far", LEN, "read-write", settings);
        let count = count.to_string();
        let faults = [("NOOP_VERBS_FAULT", fault), ("NOOP_VERBS_FAULTS", &count)];
        let mut near = process(&library, &faults);
        near.engine("near", settings);
        let own = near.region("n", LEN, "local");
        near.ask(&format!("fill n 7 0 {LEN} 0"));
        near.load(&far.metadata);
        near.ask("connect far");
        assert_eq!(near.ask("transport far"), "rdma");
        Some(Self { near, own, far })
    }

    fn write(&mut self, len: usize) -> Result<String, String> {
        let region = to_hex(&self.far.region.to_bytes());
        self.near.try_ask(&format!("write far n 0 {region} 0 {len}"))
    }
}

#[test]
fn a_device_that_fails_every_transfer_is_left_for_tcp_and_blames_nobody() {
    // LOC_QP_OP_ERR, FATAL_ERR, GENERAL_ERR.
    for status in [2, 19, 21] {
        let Some(mut pair) = Pair::new(&format!("status:{status}"), u32::MAX) else { return };
        let mut errors = 0;
        while let Err(error) = pair.write(100_000) {
            assert!(error.contains("RemoteDisconnect"), "{error}");
            let reason = format!("the device's own error, work completion status {status}");
            assert!(error.contains(&reason), "{error}");
            errors += 1;
            assert!(errors < 5, "it is used for ever: {error}");
        }
        assert_eq!(pair.near.ask("transport far"), "tcp");
        pair.far.assert_pattern(7, 0, 100_000, 0);
    }
}

#[test]
fn memory_of_this_side_that_the_device_has_no_access_to_is_a_fault_of_that_transfer() {
    // LOC_PROT_ERR.
    let Some(mut pair) = Pair::new("status:4", 1) else { return };
    let error = pair.write(4096).unwrap_err();
    assert!(error.contains("Fault") && !error.contains("refused"), "{error}");
    let (_, address) = error.split_once("0x").expect("an address");
    let digits: String = address.chars().take_while(char::is_ascii_hexdigit).collect();
    let address = u64::from_str_radix(&digits, 16).unwrap();
    assert!((pair.own.base()..pair.own.base() + 4096).contains(&address), "{error}");
    pair.write(4096).unwrap();
    assert_eq!(pair.near.ask("transport far"), "rdma");
}

#[test]
fn a_completion_queue_that_breaks_is_left_for_another() {
    // Found by polling it, and told by an event.
    for fault in ["poll", "event"] {
        for len in [64, LEN] {
            let Some(mut pair) = Pair::new(fault, 2) else { return };
            // Posted again, and once more, and then carried out.
            pair.write(len).unwrap_or_else(|error| panic!("{fault}: {error}"));
            pair.write(len).unwrap();
            assert_eq!(pair.near.number("rdma-failures"), 2, "{fault}");
            assert_eq!(pair.near.ask("transport far"), "rdma");
        }
    }
}
