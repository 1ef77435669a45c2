//! Calls that must not wait for a peer: the peer is stopped, and every timeout is longer than these tests may take.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane_nixl_tests::{
    Agent, Notify, Operation, Settings, Status, assert_quiet, params, range, target,
};
use corelane_tests::{Buffer, to_hex};

const LEN: usize = 32 << 20;
const BOTH: [&str; 2] = ["local", "tcp"];

fn patient(transports: &str) -> Settings {
    params(&[
        ("transports", transports),
        ("liveness_ms", "600000"),
        ("operation_timeout_ms", "600000"),
        ("connect_timeout_ms", "600000"),
    ])
}

#[test]
fn loading_preparing_posting_and_asking() {
    for transports in BOTH {
        let mut far = target!("target", LEN);
        let metadata = far.metadata();
        far.process.freeze();
        let (agent, near) = (Agent::with("initiator", &patient(transports)), Buffer::new(LEN));
        agent.register(&near);
        assert_eq!(agent.load(&metadata).as_deref(), Ok("target"));
        let lists = ([range(&near, 0, LEN)], [far.range(0, LEN)]);
        let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
        assert_eq!(request.post(Notify::With(b"bound")), Status::IN_PROGRESS);
        agent.notify("target", b"free").unwrap();
        for _ in 0..1000 {
            assert_eq!(request.status(), Status::IN_PROGRESS);
            assert!(agent.notifications().is_empty());
        }
        far.process.thaw();
        request.wait().unwrap();
        near.assert_pattern(1, 0, LEN, 0);
        let answer = far.process.ask("take 2");
        for payload in [b"bound".as_slice(), b"free"] {
            assert!(answer.contains(&format!("initiator:{}", to_hex(payload))), "{answer}");
        }
        far.process.ask("quiet");
    }
}

#[test]
fn notifying_before_and_after_there_is_a_connection() {
    for (connected, transports) in [false, true].into_iter().flat_map(|c| BOTH.map(|t| (c, t))) {
        let mut far = target!("target", 64);
        let agent = Agent::with("initiator", &patient(transports));
        far.introduce_to(&agent);
        if connected {
            agent.connect("target").unwrap();
        }
        far.process.freeze();
        let payloads: Vec<[u8; 8]> = (0..2000u64).map(u64::to_le_bytes).collect();
        for payload in &payloads {
            agent.notify("target", payload).unwrap();
        }
        far.process.thaw();
        let expected: Vec<&[u8]> = payloads.iter().map(<[u8; 8]>::as_slice).collect();
        far.assert_notifications("initiator", &expected);
        far.process.ask("quiet");
    }
}

#[test]
fn the_first_release_returns_at_once_and_the_second_waits_for_quiet_memory() {
    let mut far = target!("target", LEN);
    let (agent, near) = (Agent::with("initiator", &patient("tcp")), Buffer::new(LEN));
    agent.register(&near);
    far.introduce_to(&agent);
    let lists = ([range(&near, 0, LEN)], [far.range(0, LEN)]);
    let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    request.run_with(Notify::None).unwrap();
    far.process.freeze();
    assert_eq!(request.post(Notify::With(b"never")), Status::IN_PROGRESS);
    // While the peer is stopped.
    let left = request.release();
    far.process.thaw();
    if let Err((status, request)) = left {
        assert_eq!(status, Status::REPOST_ACTIVE);
        request.release().map_err(|(status, _)| status).unwrap();
    }
    near.poison(0, LEN);
    std::thread::sleep(std::time::Duration::from_millis(200));
    near.assert_poison(0, LEN);
    far.process.ask("quiet");
    // The connection is as good as before.
    agent.transfer(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    near.assert_pattern(1, 0, LEN, 0);
}

#[test]
fn other_peers_and_the_agent_itself() {
    let (mut stopped, mut good) = (target!("stopped", LEN), target!("good", LEN));
    let (agent, near) = (Agent::with("initiator", &patient("tcp")), Buffer::new(LEN));
    agent.register(&near);
    stopped.introduce_to(&agent);
    good.introduce_to(&agent);
    stopped.process.freeze();
    let half = LEN / 2;
    let waiting = {
        let lists = ([range(&near, 0, half)], [stopped.range(0, half)]);
        agent.prepare(Operation::Read, &lists.0, "stopped", &lists.1).unwrap()
    };
    assert_eq!(waiting.post(Notify::None), Status::IN_PROGRESS);
    for round in 0..10u8 {
        let lists = ([range(&near, half, half)], [good.range(0, half)]);
        near.poison(half, half);
        agent.transfer(Operation::Read, &lists.0, "good", &lists.1).unwrap();
        near.assert_pattern(1, half, half, 0);
        agent.notify("good", &[round]).unwrap();
        good.assert_notifications("initiator", &[&[round]]);
        agent.notify("initiator", &[round]).unwrap();
        assert_eq!(corelane_nixl_tests::collect(&agent, 1)[0].payload, [round]);
    }
    assert_eq!(waiting.status(), Status::IN_PROGRESS);
    stopped.process.thaw();
    waiting.wait().unwrap();
    near.assert_pattern(1, 0, half, 0);
    assert_quiet(&agent);
}
