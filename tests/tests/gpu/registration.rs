//! GPU memory is registered with RDMA devices: which way is taken, and what is said. On devices that move nothing
//! (`bench/noop-verbs`), with whatever driver there is; what moves, tests/rdma_gpu.rs shows.

use std::process::Command;

use super::*;

/// The libibverbs of those devices.
const LIBRARY: &str = "CORELANE_NOOP_VERBS";

/// A process with such devices; `None`: there is no GPU, or no library.
fn process(variables: &[(&str, &str)], settings: &str) -> Option<PeerProcess> {
    gpus(1)?;
    let Some(library) = std::env::var_os(LIBRARY) else {
        eprintln!("SKIPPED: {LIBRARY} names no library");
        return None;
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-test-peer"));
    command.env("CORELANE_LIBIBVERBS", library).envs(variables.iter().copied());
    let mut process = PeerProcess::start_command(&mut command).unwrap();
    process.ask("keep-log");
    process.engine("one", &format!("transports=rdma,tcp {settings}"));
    Some(process)
}

/// The keys of a region on the rails of its engine, out of the public form of the region.
fn keys(descriptor: &str) -> Vec<u32> {
    let bytes = from_hex(descriptor).unwrap();
    // Behind the header, incarnation, key, first byte and length.
    let (count, rest) = bytes[60..].split_first().unwrap();
    let all = rest.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
    all.take(usize::from(*count)).collect()
}

#[test]
fn a_range_of_any_place_and_length_is_exported_and_registered() {
    let Some(mut one) = process(&[], "gpu_rdma=dmabuf") else { return };
    for len in [1, 4095, 4096, 4097, (2 << 20) + 1, 5 << 20] {
        let found = keys(&one.ask(&format!("gpu-region r{len} {len} read-write 0")));
        assert!(found.len() == 1 && found[0] != 0, "{len} bytes: {found:?}");
    }
    // One allocation, registered in parts that begin and end anywhere.
    for (offset, len) in [(0, 1), (511, 1), (4095, 2), (4096, 4096), (70_001, 130_003)] {
        let found = keys(&one.ask(&format!("gpu-part r5242880 {offset} {len}")));
        assert!(found.len() == 1 && found[0] != 0, "{len} bytes at {offset}: {found:?}");
    }
    let said = one.ask("log RDMA devices reach GPU memory");
    assert!(said.contains("dmabuf") && !said.contains("SYNC_MEMOPS"), "{said}");
    assert_eq!(said.matches("reach GPU memory").count(), 1, "{said}");
    assert_eq!(one.ask("log SYNC_MEMOPS"), "");
}

#[test]
fn devices_are_not_asked_where_they_are_forbidden() {
    let Some(mut one) = process(&[], "gpu_rdma=off") else { return };
    assert_eq!(keys(&one.ask("gpu-region r 4096 read-write 0")), []);
    assert_eq!(one.ask("log GPU memory"), "");
    let host = keys(&one.ask("region h 4096 read-write"));
    assert!(host.len() == 1 && host[0] != 0, "{host:?}");
}

#[test]
fn what_is_not_exported_takes_the_other_way_or_fails_where_that_is_forbidden() {
    let without = [("FAKE_CUDA_NO_DMABUF", "1")];
    let Some(mut one) = process(&without, "") else { return };
    if !Cuda::get().unwrap().is_fake() {
        return eprintln!("SKIPPED: a real driver exports it");
    }
    assert_ne!(keys(&one.ask("gpu-region r 4096 read-write 0")), [0]);
    assert!(one.ask("log RDMA devices reach GPU memory").contains("peermem"));
    let mut one = process(&without, "gpu_rdma=dmabuf").unwrap();
    let error = one.try_ask("gpu-region r 4096 read-write 0").unwrap_err();
    assert!(error.contains("gpu_rdma=dmabuf") && error.contains("exports no dmabuf"), "{error}");
    one.ask("region h 4096 read-write");
}

#[test]
fn a_gpu_that_sees_nothing_in_order_and_cannot_be_flushed_is_not_registered() {
    let blind = [("FAKE_CUDA_ORDERING", "none,flush,native")];
    let Some(mut one) = process(&blind, "") else { return };
    if !Cuda::get().unwrap().is_fake() {
        return eprintln!("SKIPPED: takes the driver of tests/fake-cuda");
    }
    for region in 0..3 {
        assert_eq!(keys(&one.ask(&format!("gpu-region r{region} 4096 read-write 0"))), []);
    }
    let said = one.ask("log do not reach GPU memory");
    assert_eq!(said.matches("cannot flush it").count(), 1, "{said}");
    let other = keys(&one.ask("gpu-region s 4096 read-write 1"));
    assert!(other.len() == 1 && other[0] != 0, "{other:?}");
    let mut one = process(&blind, "gpu_rdma=peermem").unwrap();
    let error = one.try_ask("gpu-region r 4096 read-write 0").unwrap_err();
    assert!(error.contains("cannot flush it"), "{error}");
}

#[test]
fn calls_that_cannot_be_made_synchronous_are_said_once_whichever_region_is_the_first() {
    let Some(mut one) = process(&[], "") else { return };
    if !Cuda::get().unwrap().is_fake() {
        return eprintln!("SKIPPED: takes the driver of tests/fake-cuda");
    }
    one.ask("gpu-region r 4096 read-write 0");
    assert_eq!(one.ask("log SYNC_MEMOPS"), "");
    one.ask("gpu-refuse cuPointerSetAttribute 801 2");
    for region in ["s", "t", "u"] {
        one.ask(&format!("gpu-region {region} 4096 read-write 0"));
    }
    let said = one.ask("log SYNC_MEMOPS");
    assert_eq!(said.matches("cannot be set").count(), 1, "{said}");
}
