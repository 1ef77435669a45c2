//! Posting, posting again, asking again, releasing.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::Duration;

use corelane_nixl_tests::{
    Agent, Notify, Operation, Request, Settings, Status, TCP, assert_quiet, collect, params, range,
    target,
};
use corelane_tests::{Buffer, Random, eventually};

/// A pair of agents in this process, a buffer each; the second holds pattern 1.
struct Pair {
    a: Agent,
    b: Agent,
    near: Buffer,
    far: Buffer,
}

impl Pair {
    fn new(len: usize, settings: &Settings) -> Self {
        let (near, far) = (Buffer::new(len), Buffer::with_pattern(1, len));
        let (a, b) = (Agent::with("a", settings), Agent::with("b", settings));
        a.register(&near);
        b.register(&far);
        a.exchange_metadata(&b);
        Self { a, b, near, far }
    }

    fn whole(&self, operation: Operation) -> Request<'_> {
        let lists =
            ([range(&self.near, 0, self.near.len())], [range(&self.far, 0, self.far.len())]);
        self.a.prepare(operation, &lists.0, "b", &lists.1).unwrap()
    }
}

#[test]
fn a_request_is_posted_a_thousand_times() {
    let pair = Pair::new(8192, &Settings::default());
    let request = pair.whole(Operation::Read);
    for round in 0..1000 {
        pair.far.fill(round, 0, 8192, 0);
        request.run().unwrap();
        pair.near.assert_pattern(round, 0, 8192, 0);
    }
}

#[test]
fn a_request_that_was_never_posted_says_so_and_is_released() {
    let pair = Pair::new(64, &Settings::default());
    let request = pair.whole(Operation::Read);
    assert_eq!(request.status(), Status::NOT_POSTED);
    request.release().map_err(|(status, _)| status).unwrap();
    pair.near.assert_poison(0, 64);
    drop(pair.whole(Operation::Write));
    pair.far.assert_pattern(1, 0, 64, 0);
}

#[test]
fn asking_after_the_end_gives_the_same_answer() {
    let pair = Pair::new(64, &Settings::default());
    let request = pair.whole(Operation::Read);
    request.run().unwrap();
    pair.near.poison(0, 64);
    for _ in 0..1000 {
        assert_eq!(request.status(), Status::SUCCESS);
    }
    // And moves nothing again.
    pair.near.assert_poison(0, 64);
}

#[test]
fn a_copy_by_the_posting_thread_is_over_when_posting_returns() {
    for by_poster in [true, false] {
        let mut far = target!("target", 4096);
        let settings = params(&[("inline_copy_bytes", if by_poster { "1M" } else { "0" })]);
        let (agent, near) = (Agent::with("initiator", &settings), Buffer::new(4096));
        agent.register(&near);
        far.introduce_to(&agent);
        let lists = ([range(&near, 0, 4096)], [far.range(0, 4096)]);
        let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
        request.run_with(Notify::None).unwrap();
        for _ in 0..10 {
            near.poison(0, 4096);
            let posted = request.post(Notify::None);
            if by_poster {
                assert_eq!(posted, Status::SUCCESS);
            } else {
                assert!(posted.0 >= 0, "{posted:?}");
                request.wait().unwrap();
            }
            near.assert_pattern(1, 0, 4096, 0);
            // And is asked for with the same answer.
            assert_eq!(request.status(), Status::SUCCESS);
        }
    }
}

#[test]
fn many_requests_at_once() {
    let len = 1 << 20;
    let pair = Pair::new(len, &Settings::default());
    let block = 4096;
    let requests: Vec<_> = (0..len / block)
        .map(|i| {
            let at = i * block;
            let lists =
                ([range(&pair.near, at, block)], [range(&pair.far, len - at - block, block)]);
            pair.a.prepare(Operation::Read, &lists.0, "b", &lists.1).unwrap()
        })
        .collect();
    for _ in 0..5 {
        pair.near.poison(0, len);
        for request in &requests {
            assert!(request.post(Notify::None).0 >= 0);
        }
        for (i, request) in requests.iter().enumerate().rev() {
            request.wait().unwrap();
            let at = i * block;
            pair.near.assert_pattern(1, at, block, (len - at - block) as u64);
        }
    }
}

#[test]
fn posting_while_in_flight_is_refused_and_harmless() {
    let far = target!("target", 32 << 20);
    let settings = params(&[TCP, ("liveness_ms", "60000")]);
    let (agent, near) = (Agent::with("initiator", &settings), Buffer::new(32 << 20));
    agent.register(&near);
    let mut far = far;
    far.introduce_to(&agent);
    let lists = ([range(&near, 0, near.len())], [far.range(0, near.len())]);
    let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    request.run_with(Notify::None).unwrap();
    near.poison(0, near.len());
    far.process.freeze();
    assert_eq!(request.post(Notify::With(b"one")), Status::IN_PROGRESS);
    for _ in 0..10 {
        assert_eq!(request.post(Notify::With(b"two")), Status::REPOST_ACTIVE);
        assert_eq!(request.status(), Status::IN_PROGRESS);
    }
    far.process.thaw();
    request.wait().unwrap();
    near.assert_pattern(1, 0, near.len(), 0);
    far.assert_notifications("initiator", &[b"one"]);
    far.process.ask("quiet");
}

#[test]
fn telemetry_of_finished_transfers_never_fails() {
    let pair = Pair::new(64 << 10, &Settings { telemetry: true, ..Settings::default() });
    let request = pair.whole(Operation::Read);
    for _ in 0..100 {
        request.run().unwrap();
        let [_, _, _, bytes, descriptors] = request.telemetry().expect("telemetry");
        assert_eq!((bytes, descriptors), (64 << 10, 1));
    }
}

/// Releases once, and again where that has to be.
fn release(request: Request<'_>) {
    if let Err((status, request)) = request.release() {
        assert_eq!(status, Status::REPOST_ACTIVE);
        request.release().map_err(|(status, _)| status).expect("the second release");
    }
}

#[test]
fn after_a_release_in_flight_the_memory_is_quiet() {
    let len = 8 << 20;
    let mut far = target!("target", len);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(len));
    agent.register(&near);
    far.introduce_to(&agent);
    let mut random = Random::new(11);
    for round in 0..60 {
        let lists = ([range(&near, 0, len)], [far.range(0, len)]);
        let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
        assert!(request.post(Notify::None).0 >= 0, "round {round}");
        for _ in 0..random.below(2000) {
            std::hint::spin_loop();
        }
        release(request);
        near.poison(0, len);
        std::thread::sleep(Duration::from_millis(5));
        near.assert_poison(0, len);
    }
    agent
        .transfer(Operation::Read, &[range(&near, 0, len)], "target", &[far.range(0, len)])
        .unwrap();
    near.assert_pattern(1, 0, len, 0);
}

#[test]
fn a_release_while_the_peer_is_stopped_is_bounded_and_leaves_the_memory_quiet() {
    let len = 32 << 20;
    let mut far = target!("target", len);
    let settings = params(&[TCP, ("liveness_ms", "60000"), ("operation_timeout_ms", "1000")]);
    let (agent, near) = (Agent::with("initiator", &settings), Buffer::new(len));
    agent.register(&near);
    far.introduce_to(&agent);
    let lists = ([range(&near, 0, len)], [far.range(0, len)]);
    let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    eventually("the peer serves", || request.run_with(Notify::None).is_ok());
    far.process.freeze();
    assert_eq!(request.post(Notify::None), Status::IN_PROGRESS);
    std::thread::sleep(Duration::from_millis(50));
    release(request);
    near.poison(0, len);
    far.process.thaw();
    std::thread::sleep(Duration::from_millis(300));
    near.assert_poison(0, len);
}

#[test]
fn a_release_in_flight_sends_no_notification_afterwards() {
    let mut far = target!("target", 32 << 20);
    let settings = params(&[TCP, ("liveness_ms", "60000"), ("operation_timeout_ms", "1000")]);
    let (agent, near) = (Agent::with("initiator", &settings), Buffer::new(32 << 20));
    agent.register(&near);
    far.introduce_to(&agent);
    let lists = ([range(&near, 0, near.len())], [far.range(0, near.len())]);
    let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    eventually("the peer serves", || request.run_with(Notify::None).is_ok());
    far.process.freeze();
    assert_eq!(request.post(Notify::With(b"never")), Status::IN_PROGRESS);
    release(request);
    far.process.thaw();
    far.process.ask("quiet");
}

#[test]
fn an_agent_that_ends_with_a_transfer_in_flight_leaves_the_memory_quiet() {
    let len = 16 << 20;
    let mut far = target!("target", len);
    let near = Buffer::new(len);
    for round in 0..10 {
        let agent = Agent::new("initiator");
        agent.register(&near);
        far.introduce_to(&agent);
        let lists = ([range(&near, 0, len)], [far.range(0, len)]);
        let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
        assert!(request.post(Notify::None).0 >= 0, "round {round}");
        // Nobody releases it.
        std::mem::forget(request);
        drop(agent);
        near.poison(0, len);
        std::thread::sleep(Duration::from_millis(10));
        near.assert_poison(0, len);
    }
}

#[test]
fn memory_is_quiet_once_it_is_deregistered() {
    let len = 16 << 20;
    let mut far = target!("target", len);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(len));
    far.introduce_to(&agent);
    for round in 0..20 {
        agent.register(&near);
        let lists = ([range(&near, 0, len)], [far.range(0, len)]);
        let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
        assert!(request.post(Notify::None).0 >= 0, "round {round}");
        agent.deregister(&near).unwrap();
        near.poison(0, len);
        std::thread::sleep(Duration::from_millis(5));
        near.assert_poison(0, len);
        // Whatever its end is, there is one.
        let _ = request.wait();
    }
}

/// A read that cannot be served, of an agent that gives up after a second.
fn with_a_stuck_read(end: impl FnOnce(Agent, &Buffer, &str)) {
    let len = 32 << 20;
    let mut far = target!("target", len);
    let settings = params(&[TCP, ("liveness_ms", "60000"), ("operation_timeout_ms", "1000")]);
    let (agent, near) = (Agent::with("initiator", &settings), Buffer::new(len));
    agent.register(&near);
    far.introduce_to(&agent);
    let lists = ([range(&near, 0, len)], [far.range(0, len)]);
    let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    eventually("the peer serves", || request.run_with(Notify::None).is_ok());
    far.process.freeze();
    assert_eq!(request.post(Notify::With(b"never")), Status::IN_PROGRESS);
    std::mem::forget(request);
    end(agent, &near, "target");
    near.poison(0, len);
    far.process.thaw();
    std::thread::sleep(Duration::from_millis(300));
    near.assert_poison(0, len);
    far.process.ask("quiet");
}

#[test]
fn deregistering_while_the_peer_is_stopped_is_bounded_and_leaves_the_memory_quiet() {
    with_a_stuck_read(|agent, near, _| {
        agent.deregister(near).unwrap();
        // What happens to the agent afterwards is not the question.
        std::mem::forget(agent);
    });
}

#[test]
fn destroying_while_the_peer_is_stopped_is_bounded_and_leaves_the_memory_quiet() {
    with_a_stuck_read(|agent, _, _| drop(agent));
}

#[test]
fn forgetting_while_the_peer_is_stopped_is_bounded_and_leaves_the_memory_quiet() {
    with_a_stuck_read(|agent, near, peer| {
        agent.invalidate(peer).unwrap();
        agent.deregister(near).unwrap();
    });
}

#[test]
fn an_estimate_is_there_after_the_first_transfer_and_no_longer_than_the_longest() {
    let len = 16 << 20;
    let mut far = target!("target", len);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(len));
    agent.register(&near);
    far.introduce_to(&agent);
    let prepare = |size| {
        let lists = ([range(&near, 0, size)], [(far.address, size)]);
        agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap()
    };
    let request = prepare(4096);
    assert_eq!(request.estimate(), Err(Status::NOT_SUPPORTED));
    request.estimate_by_the_c_api().unwrap_err();
    for size in [64, 4096, 256 << 10, 4 << 20, 16 << 20] {
        let request = prepare(size);
        let took = (0..25).map(|_| {
            let start = std::time::Instant::now();
            request.run_with(Notify::None).unwrap();
            start.elapsed().as_micros() as u64
        });
        let most = took.max().unwrap();
        let (estimate, _) = request.estimate_by_the_c_api().expect("an estimate");
        // No memory moves a terabyte in a second. Whole microseconds: one more is rounding.
        let least = size as u64 / 1_000_000;
        assert!(
            (least..=most + 1).contains(&(estimate as u64)),
            "{size} bytes: {estimate} us, expected {least} to {most}"
        );
    }
}

#[test]
fn a_write_that_was_released_before_it_was_posted_again_starts_anew() {
    let pair = Pair::new(4096, &Settings::default());
    pair.near.fill(5, 0, 4096, 0);
    for _ in 0..200 {
        pair.far.poison(0, 4096);
        let request = pair.whole(Operation::Write);
        request.run_with(Notify::With(b"w")).unwrap();
        release(request);
        pair.far.assert_pattern(5, 0, 4096, 0);
        assert_eq!(collect(&pair.b, 1).len(), 1);
    }
    assert_quiet(&pair.b);
}
