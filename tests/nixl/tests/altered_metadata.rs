//! What a backend is given of a peer, altered in any way, with and without a checksum that matches: refused, or it leads nowhere.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane_nixl_tests::{Couple, Operation, Status, descriptor, range};
use corelane_tests::{Random, forge_metadata};

const LEN: usize = Couple::LEN;

/// Any change: bytes, length, parts that move.
fn altered(random: &mut Random, good: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len().max(1));
        match random.below(6) {
            0 | 1 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            2 => bytes.truncate(at),
            3 => {
                let count = 1 + random.below(40);
                let new = random.bytes(count);
                bytes.splice(at..at, new);
            }
            4 => {
                let end = (at + 1 + random.below(40)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
            _ => {
                let from = random.below(bytes.len().max(1));
                let len = random.below(64).min(bytes.len() - from).min(bytes.len() - at);
                bytes.copy_within(from..from + len, at);
            }
        }
    }
    bytes
}

#[test]
fn altered_connection_info_and_regions_are_refused_or_lead_nowhere() {
    let couple = Couple::new(&[
        ("connect_timeout_ms", "300"),
        ("operation_timeout_ms", "3000"),
        ("linger_ms", "10"),
        ("log_level", "off"),
    ]);
    let (info, data) = (couple.b().conn_info(), couple.b().public_data(couple.exported));
    let (mut random, mut tried) = (Random::new(5), 0);
    for _ in 0..2000 {
        let bad = altered(&mut random, &info);
        match couple.a.load_conn_info("c", &bad) {
            Status::SUCCESS if tried < 15 => {
                tried += 1;
                let end = couple.a.connect("c");
                assert!([Status::SUCCESS, Status::REMOTE_DISCONNECT].contains(&end), "{end}");
                assert_eq!(couple.a.disconnect("c"), Status::SUCCESS);
            }
            Status::SUCCESS => assert_eq!(couple.a.disconnect("c"), Status::SUCCESS),
            status => assert!(
                [Status::INVALID_PARAM, Status::MISMATCH].contains(&status),
                "connection info: {status}"
            ),
        }
        let bad = altered(&mut random, &data);
        match couple.a.load_remote(range(&couple.far, 0, LEN), 0, &bad, "b") {
            Ok(there) => {
                // What is taken is what was there before: all of it is under a checksum.
                assert!(bad == data, "altered bytes of a region were taken");
                assert_eq!(couple.a.unload(there), Status::SUCCESS);
            }
            Err(status) => assert!(
                [Status::INVALID_PARAM, Status::MISMATCH].contains(&status),
                "a region: {status}"
            ),
        }
    }
    couple.reads();
}

#[test]
fn forged_connection_info_and_regions_with_good_checksums_do_no_harm() {
    let couple = Couple::new(&[
        ("connect_timeout_ms", "200"),
        ("operation_timeout_ms", "2000"),
        ("linger_ms", "10"),
        ("log_level", "off"),
    ]);
    let (info, data) = (couple.b().conn_info(), couple.b().public_data(couple.exported));
    let (mut random, mut connected, mut posted) = (Random::new(6), 0, 0);
    for _ in 0..1500 {
        let bad = forge_metadata(&info, |body| {
            let at = random.below(body.len());
            body[at] = random.next() as u8;
        });
        match couple.a.load_conn_info("c", &bad) {
            Status::SUCCESS => {
                if connected < 15 {
                    connected += 1;
                    let end = couple.a.connect("c");
                    assert!([Status::SUCCESS, Status::REMOTE_DISCONNECT].contains(&end), "{end}");
                }
                assert_eq!(couple.a.disconnect("c"), Status::SUCCESS);
            }
            status => assert!(
                [Status::INVALID_PARAM, Status::MISMATCH].contains(&status),
                "connection info: {status}"
            ),
        }
        let bad = forge_metadata(&data, |body| {
            let at = random.below(body.len());
            body[at] = random.next() as u8;
        });
        let there = match couple.a.load_remote(range(&couple.far, 0, LEN), 0, &bad, "b") {
            Ok(there) => there,
            Err(status) => {
                let known = [Status::INVALID_PARAM, Status::MISMATCH, Status::REMOTE_DISCONNECT];
                assert!(known.contains(&status), "a region: {status}");
                continue;
            }
        };
        let local = [couple.local(0, 4096)];
        let remote = [descriptor(range(&couple.far, 0, 4096), there)];
        match couple.a.prepare(Operation::Write, &local, &remote, "b") {
            Ok(handle) => {
                // A key that nobody gave away opens nothing; what has no meaning may be anything.
                couple.near.poison(0, 4096);
                let end = match couple.a.post(Operation::Write, &local, &remote, "b", handle, None)
                {
                    Status::IN_PROGRESS => couple.a.wait(handle),
                    end => end,
                };
                if end != Status::SUCCESS {
                    let known =
                        [Status::NOT_ALLOWED, Status::INVALID_PARAM, Status::REMOTE_DISCONNECT];
                    assert!(known.contains(&end), "a transfer: {end}");
                }
                posted += 1;
                couple.a.release_for_good(handle);
            }
            Err(status) => {
                let known = [
                    Status::NOT_ALLOWED,
                    Status::INVALID_PARAM,
                    Status::REMOTE_DISCONNECT,
                    Status::NOT_FOUND,
                ];
                assert!(known.contains(&status), "a preparation: {status}");
            }
        }
        assert_eq!(couple.a.unload(there), Status::SUCCESS);
    }
    assert!(posted > 0, "no forged region got as far as its owner");
    couple.far.fill(1, 0, LEN, 0);
    assert_eq!(couple.a.load_conn_info("b", &info), Status::SUCCESS);
    couple.reads();
}
