//! Metadata: the same every time, in any order, and harmless whatever is in it.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane_nixl_tests::{
    Agent, Operation, Status, backend, collect, params, peer_process, range, target,
};
use corelane_tests::{Buffer, Random, open_files, to_hex};

fn couple() -> (Agent, Agent, Buffer, Buffer) {
    let (near, far) = (Buffer::new(8192), Buffer::with_pattern(1, 8192));
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    a.register(&near);
    b.register(&far);
    (a, b, near, far)
}

#[track_caller]
fn reads(a: &Agent, near: &Buffer, far: &Buffer) {
    near.poison(0, near.len());
    a.transfer(Operation::Read, &[range(near, 0, 8192)], "b", &[range(far, 0, 8192)]).unwrap();
    near.assert_pattern(1, 0, 8192, 0);
}

#[test]
fn it_is_the_same_every_time() {
    let (a, b, near, far) = couple();
    let first = b.metadata();
    for _ in 0..100 {
        assert!(b.metadata() == first);
    }
    a.load(&first).unwrap();
    reads(&a, &near, &far);
    // Also after somebody has connected.
    assert!(b.metadata() == first);
}

#[test]
fn loading_it_again_changes_nothing() {
    let (b, far) = (Agent::new("b"), Buffer::with_pattern(1, 8192));
    b.register(&far);
    // A process of its own, since its open files are counted.
    let mut process = peer_process!();
    process.ask("agent a");
    process.ask("region r 8192");
    let load = format!("load {}", to_hex(&b.metadata()));
    let files = open_files(process.id());
    for _ in 0..200 {
        assert_eq!(process.ask(&load), "b");
    }
    assert_eq!(open_files(process.id()), files, "loading connects to nobody");
    for _ in 0..2 {
        process.ask("poison r 0 8192");
        process.ask(&format!("read b r 0 {} 8192", far.address(0)));
        process.ask("check r 1 0 8192 0");
        assert_eq!(process.ask(&load), "b");
    }
}

#[test]
fn regions_may_come_before_the_way_to_reach_them() {
    let (a, b, near, far) = couple();
    let regions = b.partial_metadata(&[range(&far, 0, 8192)]);
    assert_eq!(a.load(&regions).as_deref(), Ok("b"));
    assert_eq!(a.load(&b.partial_metadata(&[])).as_deref(), Ok("b"));
    reads(&a, &near, &far);
}

#[test]
fn regions_may_come_after_the_connection() {
    let (a, b, near, far) = couple();
    assert_eq!(a.load(&b.partial_metadata(&[])).as_deref(), Ok("b"));
    a.connect("b").unwrap();
    a.notify("b", b"connected").unwrap();
    assert_eq!(collect(&b, 1)[0].payload, b"connected");
    assert_eq!(a.load(&b.partial_metadata(&[range(&far, 0, 8192)])).as_deref(), Ok("b"));
    reads(&a, &near, &far);
    // A region that is registered later is known after loading once more.
    let later = Buffer::with_pattern(2, 8192);
    b.register(&later);
    assert_eq!(a.load(&b.metadata()).as_deref(), Ok("b"));
    a.transfer(Operation::Read, &[range(&near, 0, 8192)], "b", &[range(&later, 0, 8192)]).unwrap();
    near.assert_pattern(2, 0, 8192, 0);
}

#[test]
fn connecting_is_explicit_or_left_to_the_first_transfer() {
    let mut far = target!("target", 4096);
    for explicit in [true, false] {
        let (agent, near) = (Agent::new("initiator"), Buffer::new(4096));
        agent.register(&near);
        far.introduce_to(&agent);
        if explicit {
            agent.connect("target").unwrap();
            agent.connect("target").unwrap();
        }
        let lists = ([range(&near, 0, 4096)], [far.range(0, 4096)]);
        agent.transfer(Operation::Read, &lists.0, "target", &lists.1).unwrap();
        near.assert_pattern(1, 0, 4096, 0);
    }
}

#[test]
fn truncated_metadata_never_does_harm() {
    let (a, b, near, far) = couple();
    let good = b.metadata();
    for len in 0..good.len() {
        let _ = a.load(&good[..len]);
        let _ = a.invalidate("b");
    }
    assert_eq!(a.load(&good).as_deref(), Ok("b"));
    reads(&a, &near, &far);
}

/// Where the backend's connection info lies within an agent's metadata: a length of eight bytes and then the bytes, behind
/// the backend's name. (NIXL itself does not survive every change of the bytes around it.)
fn connection_info(metadata: &[u8]) -> std::ops::Range<usize> {
    let mark = format!("{}|c", backend());
    let start = metadata
        .windows(mark.len())
        .position(|window| window == mark.as_bytes())
        .expect("the backend's name")
        + mark.len();
    let len = u64::from_le_bytes(metadata[start..start + 8].try_into().unwrap()) as usize;
    assert!(len > 16 && metadata[start + 8 + len] == b'|', "{len} bytes of connection info");
    start + 8..start + 8 + len
}

/// Changes a few bytes of the backend's.
fn altered(random: &mut Random, good: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let place = connection_info(good);
    for _ in 0..=random.below(3) {
        let at = place.start + random.below(place.len());
        match random.below(3) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            _ => {
                // One part over another.
                let from = place.start + random.below(place.len());
                let len = random.below(64).min(place.end - from).min(place.end - at);
                bytes.copy_within(from..from + len, at);
            }
        }
    }
    bytes
}

/// Loads altered metadata of `b` into `a`; where it is taken, tries what a caller would try.
fn survives(seed: u64, rounds: usize) {
    let settings = params(&[
        ("connect_timeout_ms", "300"),
        ("operation_timeout_ms", "2000"),
        ("linger_ms", "10"),
        ("log_level", "error"),
    ]);
    let (near, far) = (Buffer::new(8192), Buffer::with_pattern(1, 8192));
    let (a, b) = (Agent::with("a", &settings), Agent::with("b", &settings));
    a.register(&near);
    b.register(&far);
    let good = b.metadata();
    let mut random = Random::new(seed);
    let (mut taken, mut tried) = (0, 0);
    for _ in 0..rounds {
        let Ok(name) = a.load(&altered(&mut random, &good)) else {
            continue;
        };
        taken += 1;
        // Some changes are harmless, and some lead to nobody: whatever it is, there is an end and a status.
        if tried < 12 {
            tried += 1;
            let lists = ([range(&near, 0, 64)], [range(&far, 0, 64)]);
            near.poison(0, 64);
            match a.transfer(Operation::Read, &lists.0, &name, &lists.1) {
                Ok(()) => near.assert_pattern(1, 0, 64, 0),
                Err(status) => {
                    let known = [
                        Status::REMOTE_DISCONNECT,
                        Status::NOT_FOUND,
                        Status::NOT_ALLOWED,
                        Status::INVALID_PARAM,
                    ];
                    assert!(known.contains(&status), "{status}, {taken} taken");
                }
            }
        }
        if a.knows(&name) {
            a.invalidate(&name).unwrap();
        }
    }
    let _ = a.invalidate("b");
    assert_eq!(a.load(&good).as_deref(), Ok("b"));
    reads(&a, &near, &far);
}

#[test]
fn altered_metadata_never_does_harm() {
    survives(1, 1500);
}

#[test]
fn differently_altered_metadata_never_does_harm() {
    survives(2, 1500);
}

#[test]
fn noise_is_no_metadata() {
    let (a, b, near, far) = couple();
    let mut random = Random::new(3);
    for round in 0..500 {
        let len = random.below(4000);
        let noise = random.bytes(len);
        assert!(a.load(&noise).is_err(), "round {round}");
    }
    a.load(b"").unwrap_err();
    a.load(b"nixl").unwrap_err();
    assert_eq!(a.load(&b.metadata()).as_deref(), Ok("b"));
    reads(&a, &near, &far);
}

#[test]
fn an_agent_does_not_load_itself() {
    let (a, _b, _near, _far) = couple();
    assert_eq!(a.load(&a.metadata()), Err(Status::INVALID_PARAM));
    assert_eq!(a.invalidate("a"), Err(Status::INVALID_PARAM));
    assert_eq!(a.invalidate("nobody"), Err(Status::NOT_FOUND));
    assert_eq!(a.connect("nobody"), Err(Status::NOT_FOUND));
    assert_eq!(a.notify("nobody", b"x"), Err(Status::NOT_FOUND));
}

#[test]
fn names_are_any_text() {
    let long = "n".repeat(200);
    for name in ["with blank", "ünïcode", "a/b:c|d", "x", long.as_str()] {
        let (near, far) = (Buffer::new(64), Buffer::with_pattern(1, 64));
        let (a, b) = (Agent::new("a"), Agent::new(name));
        a.register(&near);
        b.register(&far);
        a.exchange_metadata(&b);
        a.transfer(Operation::Read, &[range(&near, 0, 64)], name, &[range(&far, 0, 64)]).unwrap();
        near.assert_pattern(1, 0, 64, 0);
        b.notify("a", b"hello").unwrap();
        assert_eq!(collect(&a, 1)[0].from, name);
    }
}
