//! Registered memory: any number of ranges, overlapping, repeated, and coming and going.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane_nixl_tests::{Agent, Notify, Operation, Range, Status, range, target};
use corelane_tests::{Buffer, Random};

#[test]
fn thousands_of_regions() {
    let (count, size) = (4000, 1024);
    let (near, far) = (Buffer::new(count * size), Buffer::with_pattern(1, count * size));
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    let ranges: Vec<Range> = (0..count).map(|i| range(&far, i * size, size)).collect();
    a.register(&near);
    b.register_ranges(&ranges, 0).unwrap();
    assert_eq!(a.load(&b.metadata()).as_deref(), Ok("b"));
    // In another order than they were registered.
    let mut order: Vec<usize> = (0..count).collect();
    Random::new(5).shuffle(&mut order);
    let local: Vec<Range> = (0..count).map(|i| range(&near, i * size, size)).collect();
    let remote: Vec<Range> = order.iter().map(|&i| ranges[i]).collect();
    a.transfer(Operation::Read, &local, "b", &remote).unwrap();
    for (place, &i) in order.iter().enumerate() {
        near.assert_pattern(1, place * size, size, (i * size) as u64);
    }
    b.deregister_ranges(&ranges, 0).unwrap();
    assert_eq!(a.transfer(Operation::Read, &local, "b", &remote), Err(Status::NOT_ALLOWED));
}

#[test]
fn overlapping_and_repeated_registrations() {
    let (near, far) = (Buffer::new(1 << 16), Buffer::with_pattern(1, 1 << 16));
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    a.register(&near);
    let part = |at, len| range(&far, at, len);
    // The whole, a part, a part that laps over that part, the same once more, the same address with other lengths.
    let all = [
        part(0, 1 << 16),
        part(4096, 8192),
        part(8192, 8192),
        part(4096, 8192),
        part(0, 100),
        part(0, 50_000),
    ];
    for one in all {
        b.register_ranges(&[one], 0).unwrap();
    }
    assert_eq!(a.load(&b.metadata()).as_deref(), Ok("b"));
    // What is asked for is what was registered: NIXL itself does not find a part of a range that others overlap.
    for (at, len) in [(0, 1 << 16), (4096, 8192), (8192, 8192), (0, 100), (0, 50_000)] {
        near.poison(0, near.len());
        a.transfer(Operation::Read, &[range(&near, at, len)], "b", &[part(at, len)]).unwrap();
        near.assert_poison(0, at);
        near.assert_pattern(1, at, len, at as u64);
        near.assert_poison(at + len, near.len() - at - len);
    }
    // Taking some of them away leaves the others.
    for one in [all[1], all[4], all[2]] {
        b.deregister_ranges(&[one], 0).unwrap();
    }
    a.invalidate("b").unwrap();
    assert_eq!(a.load(&b.metadata()).as_deref(), Ok("b"));
    near.poison(0, near.len());
    let all_of_it = range(&near, 0, 1 << 16);
    a.transfer(Operation::Read, &[all_of_it], "b", &[part(0, 1 << 16)]).unwrap();
    near.assert_pattern(1, 0, 1 << 16, 0);
    for one in [all[0], all[3], all[5]] {
        b.deregister_ranges(&[one], 0).unwrap();
    }
    assert_eq!(
        a.transfer(Operation::Read, &[all_of_it], "b", &[part(0, 1 << 16)]),
        Err(Status::NOT_ALLOWED)
    );
}

#[test]
fn registering_and_deregistering_ten_thousand_times() {
    let (agent, memory) = (Agent::new("a"), Buffer::with_pattern(1, 1 << 16));
    let mut random = Random::new(17);
    let mut known: Vec<Range> = Vec::new();
    for _ in 0..10_000 {
        if known.len() < 50 && random.below(2) == 0 {
            let at = random.below(1 << 15);
            // Different starts or lengths, so that what is given back is what was taken.
            let one = range(&memory, at, 1 + random.below(1 << 15));
            if !known.contains(&one) {
                agent.register_ranges(&[one], 0).unwrap();
                known.push(one);
            }
        } else if !known.is_empty() {
            let one = known.swap_remove(random.below(known.len()));
            agent.deregister_ranges(&[one], 0).unwrap();
        }
    }
    // It still knows what is there and what is not.
    assert_eq!(agent.query(&known), vec![true; known.len()]);
    agent.deregister_ranges(&known, 0).unwrap();
    assert_eq!(agent.query(&known), vec![false; known.len()]);
}

#[test]
fn asking_about_memory_answers_for_each_descriptor() {
    let (agent, memory) = (Agent::new("a"), Buffer::new(8192));
    let (first, second) = (range(&memory, 0, 1000), range(&memory, 4096, 1000));
    assert_eq!(agent.query(&[first]), [false]);
    agent.register_ranges(&[first, second], 0).unwrap();
    let inside = range(&memory, 10, 900);
    let between = range(&memory, 2000, 100);
    let over_the_end = range(&memory, 900, 200);
    let wraps = (u64::MAX - 4, 100);
    let list = [inside, between, second, over_the_end, wraps, first];
    assert_eq!(agent.query(&list), [true, false, true, false, false, true]);
    assert_eq!(agent.query(&[]), Vec::<bool>::new());
    agent.deregister_ranges(&[first], 0).unwrap();
    assert_eq!(agent.query(&[first, second]), [false, true]);
}

#[test]
fn any_device_number_names_main_memory() {
    let (near, far) = (Buffer::new(4096), Buffer::with_pattern(1, 4096));
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    a.register(&near);
    for device in [0, 1, 7, u64::MAX] {
        b.register_ranges(&[range(&far, 0, 4096)], device).unwrap();
    }
    assert_eq!(a.load(&b.metadata()).as_deref(), Ok("b"));
    a.transfer(Operation::Read, &[range(&near, 0, 4096)], "b", &[range(&far, 0, 4096)]).unwrap();
    near.assert_pattern(1, 0, 4096, 0);
    for device in [7, u64::MAX, 1, 0] {
        b.deregister_ranges(&[range(&far, 0, 4096)], device).unwrap();
    }
}

#[test]
fn stale_keys_are_refused_and_nothing_moves() {
    let mut far = target!("target", 1 << 20);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(1 << 20));
    agent.register(&near);
    far.introduce_to(&agent);
    let lists = ([range(&near, 0, 1 << 20)], [far.range(0, 1 << 20)]);
    let read = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    let write = agent.prepare(Operation::Write, &lists.0, "target", &lists.1).unwrap();
    read.run().unwrap();
    far.process.ask("deregister r");
    near.poison(0, near.len());
    for request in [&read, &write] {
        assert_eq!(request.run_with(Notify::With(b"never")), Err(Status::NOT_ALLOWED));
        assert_eq!(request.status(), Status::NOT_ALLOWED);
    }
    near.assert_poison(0, near.len());
    far.assert_pattern(1, 0, 1 << 20, 0);
    // Registered again it has another key; the old one opens nothing.
    far.process.ask("register r");
    assert_eq!(read.run(), Err(Status::NOT_ALLOWED));
    // A refusal is no reason to forget a peer, and a request may be posted again after any error.
    assert!(agent.knows("target"));
    agent.invalidate("target").unwrap();
    far.introduce_to(&agent);
    agent.transfer(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    near.assert_pattern(1, 0, 1 << 20, 0);
    far.process.ask("quiet");
}

#[test]
fn a_target_deregisters_while_it_is_read() {
    let len = 8 << 20;
    let mut far = target!("target", len);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(len));
    agent.register(&near);
    for _ in 0..15 {
        far.introduce_to(&agent);
        let lists = ([range(&near, 0, len)], [far.range(0, len)]);
        let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
        near.poison(0, len);
        assert!(request.post(Notify::None).0 >= 0);
        far.process.ask("deregister r");
        match request.wait() {
            Ok(()) => near.assert_pattern(1, 0, len, 0),
            Err(status) => assert_eq!(status, Status::NOT_ALLOWED),
        }
        drop(request);
        far.process.ask("register r");
        agent.invalidate("target").unwrap();
    }
    far.introduce_to(&agent);
    let lists = ([range(&near, 0, len)], [far.range(0, len)]);
    agent.transfer(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    near.assert_pattern(1, 0, len, 0);
}

#[test]
fn local_memory_that_was_deregistered_is_not_written_by_a_later_post() {
    let mut far = target!("target", 4096);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(4096));
    agent.register(&near);
    far.introduce_to(&agent);
    let lists = ([range(&near, 0, 4096)], [far.range(0, 4096)]);
    let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    agent.deregister(&near).unwrap();
    assert!(request.run().is_err());
    near.assert_poison(0, 4096);
    drop(request);
    agent.register(&near);
    agent.transfer(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    near.assert_pattern(1, 0, 4096, 0);
}

#[test]
fn an_empty_region_and_a_refused_one_leave_the_agent_usable() {
    let (agent, memory) = (Agent::new("a"), Buffer::with_pattern(1, 4096));
    // Whatever the answer is, it is an answer.
    let _ = agent.register_ranges(&[(memory.address(0), 0)], 0);
    let _ = agent.register_ranges(&[(0, 0)], 0);
    agent.register_ranges(&[(u64::MAX - 10, 100)], 0).unwrap_err();
    agent.deregister_ranges(&[(memory.address(8), 8)], 0).unwrap_err();
    let there = Buffer::new(4096);
    agent.register(&memory);
    agent.register(&there);
    let lists = ([range(&memory, 0, 4096)], [range(&there, 0, 4096)]);
    agent.transfer(Operation::Write, &lists.0, "a", &lists.1).unwrap();
    there.assert_pattern(1, 0, 4096, 0);
}
