//! What nobody does on purpose: floods, twins, names that are too long, initiators that die or stop in the middle of a write.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::{Duration, Instant};

use corelane_nixl_tests::{
    Agent, Notify, Operation, Settings, Status, TCP, Target, assert_quiet, collect, params,
    peer_process, range, target,
};
use corelane_tests::{BOUND, Buffer, PeerProcess, Random, to_hex};

#[test]
fn a_receiver_that_takes_nothing_stops_its_sender_and_nothing_is_lost() {
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    let (near, far) = (Buffer::with_pattern(2, 4096), Buffer::new(4096));
    a.register(&near);
    b.register(&far);
    a.exchange_metadata(&b);
    let mut accepted = 0u64;
    let refusal = loop {
        // Nothing of it waits for the receiver; that the test ends says so.
        match a.notify("b", &accepted.to_le_bytes()) {
            Ok(()) => accepted += 1,
            Err(status) => break status,
        }
        assert!(accepted < 10_000_000, "there is no limit");
    };
    assert_eq!(refusal, Status::REPOST_ACTIVE, "after {accepted}");
    // A posting whose notification has no room is refused before any byte moves; without one it works.
    let lists = ([range(&near, 0, 4096)], [range(&far, 0, 4096)]);
    let request = a.prepare(Operation::Write, &lists.0, "b", &lists.1).unwrap();
    let mut refused = 0;
    for _ in 0..100 {
        match request.run_with(Notify::With(b"bound")) {
            Ok(()) => break,
            Err(status) => {
                assert_eq!(status, Status::REPOST_ACTIVE);
                far.assert_poison(0, 4096);
                refused += 1;
            }
        }
    }
    if refused == 100 {
        request.run_with(Notify::None).unwrap();
    }
    far.assert_pattern(2, 0, 4096, 0);
    let mut next = 0u64;
    let mut bound = 0;
    while next < accepted {
        for message in collect(&b, 1) {
            if message.payload == b"bound" {
                bound += 1;
            } else {
                assert_eq!(message.payload, next.to_le_bytes(), "in order and once");
                next += 1;
            }
        }
    }
    assert!(a.knows("b"));
    a.notify("b", b"again").unwrap();
    let wanted = usize::from(refused < 100) - bound + 1;
    assert!(collect(&b, wanted).iter().any(|m| m.payload == b"again"));
    assert_quiet(&b);
}

#[test]
fn large_notifications_to_a_receiver_that_takes_nothing() {
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    a.exchange_metadata(&b);
    let mut accepted = 0u8;
    while accepted < 200 && a.notify("b", &vec![accepted; 4 << 20]).is_ok() {
        accepted += 1;
    }
    assert!((8..200).contains(&accepted), "{accepted} times 4 MiB were taken");
    let got = {
        let mut got = Vec::new();
        while got.len() < usize::from(accepted) {
            got.extend(collect(&b, 1));
        }
        got
    };
    for (number, message) in got.iter().enumerate() {
        assert!(
            message.payload.len() == 4 << 20
                && message.payload.iter().all(|&byte| usize::from(byte) == number),
            "notification {number}"
        );
    }
    a.notify("b", b"again").unwrap();
    assert_eq!(collect(&b, 1)[0].payload, b"again");
    assert_quiet(&b);
}

#[test]
fn empty_descriptors_are_answered_and_harmless() {
    let mut far = target!("target", 4096);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(4096));
    agent.register(&near);
    far.introduce_to(&agent);
    for lists in [
        (vec![range(&near, 0, 0)], vec![far.range(0, 0)]),
        (
            vec![range(&near, 0, 0), range(&near, 0, 64), range(&near, 64, 0)],
            vec![far.range(0, 0), far.range(0, 64), far.range(4095, 0)],
        ),
        (vec![], vec![]),
    ] {
        near.poison(0, 4096);
        // Refused, or done as far as there is something to do.
        match agent.prepare(Operation::Read, &lists.0, "target", &lists.1) {
            Ok(request) => {
                request.run_with(Notify::With(b"n")).unwrap();
                far.assert_notifications("initiator", &[b"n"]);
                near.assert_poison(64, 4032);
            }
            Err(status) => {
                assert!([Status::INVALID_PARAM, Status::NOT_FOUND].contains(&status), "{status}");
            }
        }
    }
    let lists = ([range(&near, 0, 4096)], [far.range(0, 4096)]);
    agent.transfer(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    near.assert_pattern(1, 0, 4096, 0);
    far.process.ask("quiet");
}

#[test]
fn very_long_names_work_or_are_refused_when_the_backend_is_made() {
    for len in [255, 256, 1000, 70_000] {
        let name = "n".repeat(len);
        let Some(b) = Agent::try_with(&name, &Settings::default()) else {
            assert!(len > 255, "a name of {len} bytes is refused");
            continue;
        };
        let a = Agent::new("a");
        a.exchange_metadata(&b);
        b.notify("a", b"hello").unwrap();
        assert_eq!(collect(&a, 1)[0].from, name);
        a.notify(&name, b"hello").unwrap();
        assert_eq!(collect(&b, 1)[0].payload, b"hello");
    }
}

#[test]
fn of_two_initiators_with_one_name_the_first_is_served() {
    let (target, memory) = (Agent::new("target"), Buffer::with_pattern(1, 1 << 20));
    target.register(&memory);
    let metadata = to_hex(&target.metadata());
    let mut twins: Vec<PeerProcess> = (0..2).map(|_| peer_process!()).collect();
    for twin in &mut twins {
        twin.ask("agent twin");
        twin.ask("region own 1048576");
        twin.ask(&format!("load {metadata}"));
    }
    let read = format!("read target own 0 {} 1048576", memory.address(0));
    twins[0].ask(&format!("{read} 00"));
    for _ in 0..10 {
        // Who is connected keeps the name, and does not notice the other.
        assert_eq!(twins[1].try_ask(&format!("{read} 01")), Err("REMOTE_DISCONNECT".into()));
        let _ = twins[1].try_ask("invalidate target");
        twins[1].ask(&format!("load {metadata}"));
        twins[0].ask("poison own 0 1048576");
        twins[0].ask(&format!("{read} 02"));
        twins[0].ask("check own 1 0 1048576 0");
    }
    let got = collect(&target, 11);
    assert!(got.iter().all(|message| message.from == "twin" && message.payload != [1]));
    twins.remove(0);
    // Once it is gone, the name is free.
    corelane_tests::eventually("the other twin is served", || {
        let _ = twins[0].try_ask("invalidate target");
        twins[0].ask(&format!("load {metadata}"));
        twins[0].try_ask(&format!("{read} 03")).is_ok()
    });
    assert_eq!(collect(&target, 1)[0].payload, [3]);
    assert_quiet(&target);
}

/// A process that writes into memory of ours without end.
fn hammered(settings: &Settings) -> (Agent, Buffer, Target) {
    let len = 8 << 20;
    let (agent, memory) = (Agent::with("target", settings), Buffer::new(len));
    agent.register(&memory);
    let mut writer = target!("writer", len);
    writer.load(&agent);
    writer.process.ask(&format!("hammer-writes target r {}", memory.address(0)));
    let deadline = Instant::now() + BOUND;
    while memory.check(1, 0, len, 0).is_err() {
        assert!(Instant::now() < deadline, "nothing is written");
        std::thread::yield_now();
    }
    (agent, memory, writer)
}

#[track_caller]
fn assert_quiet_memory(memory: &Buffer) {
    memory.poison(0, memory.len());
    std::thread::sleep(Duration::from_millis(50));
    memory.assert_poison(0, memory.len());
}

#[test]
fn a_target_takes_its_memory_back_while_it_is_written() {
    for settings in [Settings::default(), params(&[TCP])] {
        let (agent, memory, mut writer) = hammered(&settings);
        agent.deregister(&memory).unwrap();
        assert_quiet_memory(&memory);
        let answer = writer.process.try_ask("stop-hammers").unwrap_err();
        assert!(answer.contains("NOT_ALLOWED"), "{answer}");
    }
}

#[test]
fn a_target_takes_its_memory_back_from_an_initiator_that_died() {
    for settings in [Settings::default(), params(&[TCP])] {
        let (agent, memory, writer) = hammered(&settings);
        writer.process.kill();
        agent.deregister(&memory).unwrap();
        assert_quiet_memory(&memory);
        // And serves the next one.
        agent.register(&memory);
        let mut writer = target!("writer", memory.len());
        writer.load(&agent);
        let (at, len) = (memory.address(0), memory.len());
        writer.process.ask(&format!("write target r 0 {at} {len} 01"));
        memory.assert_pattern(1, 0, len, 0);
        assert_eq!(collect(&agent, 1)[0].payload, [1]);
    }
}

#[test]
fn a_target_takes_its_memory_back_from_an_initiator_that_is_stopped() {
    // Over `local` it writes by itself. Stopped amid that, it does not let go of the memory: the agent goes on
    // without, and once it runs again it finds the region closed.
    let by_itself = [("deregister_timeout_ms", "50"), ("operation_timeout_ms", "100")];
    let over_tcp = [TCP, ("liveness_ms", "1000"), ("deregister_timeout_ms", "20000")];
    for settings in [params(&over_tcp), params(&by_itself), params(&by_itself), params(&by_itself)]
    {
        let (agent, memory, mut writer) = hammered(&settings);
        writer.process.freeze();
        agent.deregister(&memory).unwrap();
        assert_quiet_memory(&memory);
        writer.process.thaw();
        assert_quiet_memory(&memory);
        // Its transfers have ended, one way or the other.
        writer.process.try_ask("stop-hammers").unwrap_err();
    }
}

#[test]
fn a_target_ends_while_it_is_written() {
    for settings in [Settings::default(), params(&[TCP])] {
        let (agent, memory, mut writer) = hammered(&settings);
        drop(agent);
        assert_quiet_memory(&memory);
        let answer = writer.process.try_ask("stop-hammers").unwrap_err();
        let words = ["REMOTE_DISCONNECT", "NOT_ALLOWED"];
        assert!(words.iter().any(|word| answer.contains(word)), "{answer}");
    }
}

#[test]
fn many_agents_of_one_process_know_each_other_and_go_in_any_order() {
    let count = 16;
    let agents: Vec<Agent> = (0..count).map(|i| Agent::new(&format!("m{i}"))).collect();
    let buffers: Vec<Buffer> = (0..count).map(|i| Buffer::with_pattern(i, 64 << 10)).collect();
    for (agent, buffer) in agents.iter().zip(&buffers) {
        agent.register(buffer);
    }
    let metadata: Vec<_> = agents.iter().map(Agent::metadata).collect();
    let near = Buffer::new(64 << 10);
    for (i, agent) in agents.iter().enumerate() {
        agent.register(&near);
        for (j, other) in metadata.iter().enumerate().filter(|(j, _)| *j != i) {
            agent.load(other).unwrap();
            let name = format!("m{j}");
            let lists = ([range(&near, 0, 64 << 10)], [range(&buffers[j], 0, 64 << 10)]);
            near.poison(0, near.len());
            let request = agent.prepare(Operation::Read, &lists.0, &name, &lists.1).unwrap();
            request.run_with(Notify::With(&[i as u8])).unwrap();
            near.assert_pattern(j as u64, 0, near.len(), 0);
        }
    }
    for agent in &agents {
        assert_eq!(collect(agent, count as usize - 1).len(), count as usize - 1);
    }
    let mut left: Vec<Option<Agent>> = agents.into_iter().map(Some).collect();
    let mut order: Vec<usize> = (0..left.len()).collect();
    Random::new(21).shuffle(&mut order);
    for (gone, &i) in order.iter().enumerate() {
        left[i] = None;
        // Those that stay go on.
        if let Some(&[i, j]) = order.get(gone + 1..gone + 3).and_then(|two| two.first_chunk()) {
            let (a, name) = (left[i].as_ref().unwrap(), format!("m{j}"));
            let lists = ([range(&near, 0, 64 << 10)], [range(&buffers[j], 0, 64 << 10)]);
            near.poison(0, near.len());
            a.transfer(Operation::Read, &lists.0, &name, &lists.1).unwrap();
            near.assert_pattern(j as u64, 0, near.len(), 0);
        }
    }
}
