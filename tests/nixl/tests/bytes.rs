//! Reads and writes through NIXL move exactly the bytes that were asked for.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane_nixl_tests::{Agent, Notify, Operation, Status, range, target};
use corelane_tests::{Buffer, Random, pattern};

/// Two agents of this process; each has registered its buffer and knows the other.
fn pair(names: [&str; 2], buffers: [&Buffer; 2]) -> [Agent; 2] {
    let agents = names.map(Agent::new);
    for (agent, buffer) in agents.iter().zip(buffers) {
        agent.register(buffer);
    }
    agents[0].exchange_metadata(&agents[1]);
    agents
}

#[test]
fn reads_and_writes_between_agents_of_one_process() {
    let (near, far) = (Buffer::new(1 << 20), Buffer::with_pattern(1, 1 << 20));
    let [a, b] = pair(["one", "two"], [&near, &far]);
    a.transfer(Operation::Read, &[range(&near, 4096, 300_000)], "two", &[range(&far, 1, 300_000)])
        .unwrap();
    near.assert_poison(0, 4096);
    near.assert_pattern(1, 4096, 300_000, 1);
    near.assert_poison(304_096, near.len() - 304_096);
    far.assert_pattern(1, 0, far.len(), 0);

    near.fill(2, 0, near.len(), 0);
    a.transfer(Operation::Write, &[range(&near, 10, 70_001)], "two", &[range(&far, 7, 70_001)])
        .unwrap();
    far.assert_pattern(1, 0, 7, 0);
    far.assert_pattern(2, 7, 70_001, 10);
    far.assert_pattern(1, 70_008, far.len() - 70_008, 70_008);
    // And the other way, over the same pair.
    b.transfer(Operation::Read, &[range(&far, 0, 64)], "one", &[range(&near, 5, 64)]).unwrap();
    far.assert_pattern(2, 0, 64, 5);
}

#[test]
fn reads_and_writes_between_processes() {
    let len = 4 << 20;
    let mut far = target!("target", len);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(len));
    agent.register(&near);
    far.introduce_to(&agent);
    for (size, offset) in [(1, 3), (64, 0), (4096, 4095), (65_537, 13), (len, 0)] {
        near.poison(0, len);
        let ranges = (range(&near, offset, size), far.range(offset, size));
        agent.transfer(Operation::Read, &[ranges.0], "target", &[ranges.1]).unwrap();
        near.assert_poison(0, offset);
        near.assert_pattern(1, offset, size, offset as u64);
        near.assert_poison(offset + size, len - offset - size);
    }
    near.fill(9, 0, len, 0);
    agent
        .transfer(Operation::Write, &[range(&near, 0, 99_999)], "target", &[far.range(50, 99_999)])
        .unwrap();
    far.assert_pattern(1, 0, 50, 0);
    far.assert_pattern(9, 50, 99_999, 0);
    far.assert_pattern(1, 100_049, len - 100_049, 100_049);
}

#[test]
fn an_agent_moves_bytes_within_itself() {
    let (agent, here) = (Agent::new("alone"), Buffer::with_pattern(3, 64 << 10));
    let there = Buffer::new(64 << 10);
    agent.register(&here);
    agent.register(&there);
    let (from, to) = (range(&here, 100, 5000), range(&there, 200, 5000));
    agent.transfer(Operation::Write, &[from], "alone", &[to]).unwrap();
    there.assert_poison(0, 200);
    there.assert_pattern(3, 200, 5000, 100);
    there.assert_poison(5200, there.len() - 5200);
    let (from, to) = (range(&here, 7, 60_000), range(&there, 0, 60_000));
    agent.transfer(Operation::Read, &[to], "alone", &[from]).unwrap();
    there.assert_pattern(3, 0, 60_000, 7);
}

/// Cuts `len` bytes into `count` pieces with gaps and in random order; the pieces of two lists pair up by length.
fn scattered(random: &mut Random, count: usize, len: usize) -> Vec<(usize, usize, usize)> {
    let slot = len / count;
    let mut places: Vec<usize> = (0..count).collect();
    random.shuffle(&mut places);
    (0..count)
        .map(|index| {
            let size = 1 + random.below(slot);
            let gap = |random: &mut Random| random.below(slot - size + 1);
            (index * slot + gap(random), places[index] * slot + gap(random), size)
        })
        .collect()
}

/// Moves scattered pieces and compares both memories, whole, with images made by hand.
fn moves_scattered(operation: Operation, count: usize, len: usize, seed: u64) {
    let mut far = target!("target", len);
    let (agent, near) = (Agent::new("initiator"), Buffer::with_pattern(2, len));
    agent.register(&near);
    far.introduce_to(&agent);
    let pieces = scattered(&mut Random::new(seed), count, len);
    let local: Vec<_> = pieces.iter().map(|&(at, _, size)| range(&near, at, size)).collect();
    let remote: Vec<_> = pieces.iter().map(|&(_, at, size)| far.range(at, size)).collect();
    let (mut here, mut there) = (pattern(2, 0, len), pattern(1, 0, len));
    for &(at, from, size) in &pieces {
        match operation {
            Operation::Read => here[at..at + size].copy_from_slice(&there[from..from + size]),
            Operation::Write => there[from..from + size].copy_from_slice(&here[at..at + size]),
        }
    }
    let request = agent.prepare(operation, &local, "target", &remote).unwrap();
    request.run().unwrap();
    near.assert_image(&here);
    assert!(far.process.dump("r", 0, len) == there, "the target's memory, byte by byte");
    // Once more with other bytes at the source: nothing of the first posting is left over.
    match operation {
        Operation::Read => {
            far.process.ask(&format!("fill r 5 0 {len} 0"));
            let source = pattern(5, 0, len);
            for &(at, from, size) in &pieces {
                here[at..at + size].copy_from_slice(&source[from..from + size]);
            }
        }
        Operation::Write => {
            near.fill(5, 0, len, 0);
            here = pattern(5, 0, len);
            for &(at, from, size) in &pieces {
                there[from..from + size].copy_from_slice(&here[at..at + size]);
            }
        }
    }
    request.run_with(Notify::None).unwrap();
    near.assert_image(&here);
    let dump = far.process.dump("r", 0, len);
    match operation {
        Operation::Read => assert!(dump == pattern(5, 0, len), "a read leaves its source alone"),
        Operation::Write => assert!(dump == there, "the target's memory, byte by byte"),
    }
}

#[test]
fn many_scattered_reads() {
    moves_scattered(Operation::Read, 4096, 8 << 20, 1);
}

#[test]
fn many_scattered_writes() {
    moves_scattered(Operation::Write, 4096, 8 << 20, 2);
}

#[test]
fn twenty_thousand_small_descriptors() {
    moves_scattered(Operation::Read, 20_000, 2 << 20, 3);
}

#[test]
fn few_large_descriptors() {
    moves_scattered(Operation::Write, 3, 24 << 20, 4);
}

#[test]
fn descriptors_may_repeat_their_source() {
    let mut far = target!("target", 4096);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(4096 * 16));
    agent.register(&near);
    far.introduce_to(&agent);
    let local: Vec<_> = (0..16).map(|i| range(&near, i * 4096, 4096)).collect();
    let remote: Vec<_> = (0..16).map(|_| far.range(0, 4096)).collect();
    agent.transfer(Operation::Read, &local, "target", &remote).unwrap();
    for i in 0..16 {
        near.assert_pattern(1, i * 4096, 4096, 0);
    }
}

#[test]
fn wrong_counts_lengths_and_bounds_are_refused_and_change_nothing() {
    let mut far = target!("target", 8192);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(8192));
    agent.register(&near);
    far.introduce_to(&agent);
    let prepare = |local: &[_], remote: &[_]| {
        agent.prepare(Operation::Write, local, "target", remote).map(drop)
    };
    let base = far.address;
    let (l, r) = (|at, len| range(&near, at, len), |at, len| (base + at, len));
    assert_eq!(prepare(&[l(0, 8), l(8, 8)], &[r(0, 8)]), Err(Status::INVALID_PARAM));
    assert_eq!(prepare(&[l(0, 8)], &[r(0, 9)]), Err(Status::INVALID_PARAM));
    // The agent itself knows what lies outside registrations, and has its own word for it.
    let outside = (near.address(0) + 8190, 16);
    prepare(&[outside], &[r(0, 16)]).unwrap_err();
    prepare(&[l(0, 16)], &[(base + 8190, 16)]).unwrap_err();
    prepare(&[l(0, 16)], &[(u64::MAX - 7, 16)]).unwrap_err();
    assert_eq!(
        agent.prepare(Operation::Read, &[l(0, 8)], "nobody", &[r(0, 8)]).map(drop),
        Err(Status::NOT_FOUND)
    );
    far.assert_pattern(1, 0, 8192, 0);
    agent.transfer(Operation::Read, &[l(0, 8192)], "target", &[r(0, 8192)]).unwrap();
    near.assert_pattern(1, 0, 8192, 0);
}
