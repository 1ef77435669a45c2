//! Peers that die, stop, go and come back. Every transfer with them ends, with the status that says that the peer is gone;
//! what comes back under the same name works once its metadata is loaded anew.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::{Duration, Instant};

use corelane_nixl_tests::{
    Agent, Notify, Operation, Request, Settings, Status, TCP, Target, assert_quiet, collect,
    params, peer_process, range, target,
};
use corelane_tests::{BOUND, Buffer, open_files, to_hex};

const LEN: usize = 16 << 20;

/// An agent with a buffer, `initiator`, which knows the target.
fn initiator(target: &mut Target, settings: &Settings) -> (Agent, Buffer) {
    let (agent, near) = (Agent::with("initiator", settings), Buffer::new(LEN));
    agent.register(&near);
    target.introduce_to(&agent);
    (agent, near)
}

fn whole<'a>(
    agent: &'a Agent,
    near: &Buffer,
    target: &Target,
    operation: Operation,
) -> Request<'a> {
    let lists = ([range(near, 0, LEN)], [target.range(0, LEN)]);
    agent.prepare(operation, &lists.0, &target.name, &lists.1).unwrap()
}

/// The peer is forgotten, by NIXL itself (as up to 1.4) or by its caller (since), and what was prepared for it stays refused.
#[track_caller]
fn forget(agent: &Agent, peer: &str, request: &Request<'_>) {
    let repeated = request.run();
    assert!([Err(Status::REMOTE_DISCONNECT), Err(Status::NOT_FOUND)].contains(&repeated));
    drop_peer(agent, peer);
    assert_eq!(request.post(Notify::None), Status::NOT_FOUND);
    assert_eq!(agent.notify(peer, b"x"), Err(Status::NOT_FOUND));
}

/// The peer is forgotten, as above.
#[track_caller]
fn drop_peer(agent: &Agent, peer: &str) {
    if agent.knows(peer) {
        agent.invalidate(peer).unwrap();
    }
    assert!(!agent.knows(peer));
}

/// A new process under the same name, and a transfer of all its bytes.
#[track_caller]
fn works_again(agent: &Agent, near: &Buffer, name: &str) {
    let mut target = target!(name, LEN);
    target.introduce_to(agent);
    near.poison(0, LEN);
    whole(agent, near, &target, Operation::Read).run_with(Notify::With(b"again")).unwrap();
    near.assert_pattern(1, 0, LEN, 0);
    target.assert_notifications(agent.name(), &[b"again"]);
}

#[test]
fn a_peer_killed_between_prepare_and_post() {
    let mut far = target!("target", LEN);
    let (agent, near) = initiator(&mut far, &Settings::default());
    let request = whole(&agent, &near, &far, Operation::Read);
    let name = far.name.clone();
    drop(far);
    assert_eq!(request.run_with(Notify::With(b"x")), Err(Status::REMOTE_DISCONNECT));
    assert_eq!(request.status(), Status::REMOTE_DISCONNECT);
    forget(&agent, &name, &request);
    works_again(&agent, &near, &name);
}

#[test]
fn a_connected_peer_killed_between_two_posts() {
    for settings in [Settings::default(), params(&[TCP])] {
        let mut far = target!("target", LEN);
        let (agent, near) = initiator(&mut far, &settings);
        let request = whole(&agent, &near, &far, Operation::Read);
        request.run().unwrap();
        far.process.end();
        assert_eq!(request.run(), Err(Status::REMOTE_DISCONNECT));
        forget(&agent, "target", &request);
        works_again(&agent, &near, "target");
    }
}

#[test]
fn a_peer_killed_after_post() {
    for operation in [Operation::Read, Operation::Write] {
        let mut far = target!("target", LEN);
        let (agent, near) = initiator(&mut far, &params(&[TCP, ("liveness_ms", "60000")]));
        let request = whole(&agent, &near, &far, operation);
        request.run_with(Notify::None).unwrap();
        near.fill(4, 0, LEN, 0);
        // It cannot be served, so it is in flight when the peer dies.
        far.process.freeze();
        assert_eq!(request.post(Notify::None), Status::IN_PROGRESS);
        far.process.kill();
        assert_eq!(request.wait(), Err(Status::REMOTE_DISCONNECT), "{operation:?}");
        for _ in 0..100 {
            assert_eq!(request.status(), Status::REMOTE_DISCONNECT);
        }
        forget(&agent, "target", &request);
        if operation == Operation::Write {
            near.assert_pattern(4, 0, LEN, 0);
        }
        works_again(&agent, &near, "target");
    }
}

#[test]
fn a_peer_killed_under_many_transfers_ends_all_of_them() {
    let mut far = target!("target", LEN);
    let (agent, near) = initiator(&mut far, &params(&[TCP]));
    let requests: Vec<_> = (0..64)
        .map(|i| {
            let (at, len) = (i * (LEN / 64), LEN / 64);
            let lists = ([range(&near, at, len)], [far.range(at, len)]);
            agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap()
        })
        .collect();
    requests[0].run().unwrap();
    far.process.freeze();
    for request in &requests {
        assert_eq!(request.post(Notify::With(b"never")), Status::IN_PROGRESS);
    }
    far.process.kill();
    let mut ends: Vec<_> = requests.iter().map(|request| request.wait().unwrap_err()).collect();
    // The first that is asked about makes NIXL forget the peer; its word for the others is its own.
    assert_eq!(ends.remove(0), Status::REMOTE_DISCONNECT);
    assert!(
        ends.iter().all(|end| [Status::REMOTE_DISCONNECT, Status::NOT_FOUND].contains(end)),
        "{ends:?}"
    );
    drop(requests);
    drop_peer(&agent, "target");
    works_again(&agent, &near, "target");
}

#[test]
fn a_peer_stopped_past_the_liveness_timeout() {
    let mut far = target!("target", LEN);
    let (agent, near) = initiator(&mut far, &params(&[TCP, ("liveness_ms", "300")]));
    let request = whole(&agent, &near, &far, Operation::Read);
    request.run().unwrap();
    far.process.freeze();
    assert_eq!(request.run(), Err(Status::REMOTE_DISCONNECT));
    forget(&agent, "target", &request);
    near.poison(0, LEN);
    far.process.thaw();
    // The same peer, alive again: reloading its metadata is all that it takes.
    far.introduce_to(&agent);
    near.assert_poison(0, LEN);
    let request = whole(&agent, &near, &far, Operation::Read);
    request.run_with(Notify::With(b"back")).unwrap();
    near.assert_pattern(1, 0, LEN, 0);
    far.assert_notifications("initiator", &[b"back"]);
}

#[test]
fn a_peer_stopped_for_a_moment_is_waited_for() {
    let mut far = target!("target", LEN);
    let (agent, near) = initiator(&mut far, &params(&[TCP, ("liveness_ms", "20000")]));
    let request = whole(&agent, &near, &far, Operation::Read);
    request.run().unwrap();
    near.poison(0, LEN);
    far.process.freeze();
    assert_eq!(request.post(Notify::With(b"n")), Status::IN_PROGRESS);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(request.status(), Status::IN_PROGRESS);
    far.process.thaw();
    request.wait().unwrap();
    near.assert_pattern(1, 0, LEN, 0);
    far.assert_notifications("initiator", &[b"n"]);
}

#[test]
fn a_peer_that_dies_before_anybody_connects() {
    let mut far = target!("target", LEN);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(LEN));
    agent.register(&near);
    let metadata = far.metadata();
    let name = far.name.clone();
    let remote = far.range(0, 4096);
    drop(far);
    // Loading connects to nobody, so it works.
    assert_eq!(agent.load(&metadata).as_deref(), Ok("target"));
    let request = agent.prepare(Operation::Read, &[range(&near, 0, 4096)], &name, &[remote]);
    // Preparing starts to connect and does not wait for it.
    let request = request.unwrap();
    assert_eq!(request.run(), Err(Status::REMOTE_DISCONNECT));
    forget(&agent, &name, &request);
    // Connecting itself says the same.
    assert_eq!(agent.load(&metadata).as_deref(), Ok("target"));
    assert_eq!(agent.connect(&name), Err(Status::REMOTE_DISCONNECT));
    agent.invalidate(&name).unwrap();
    works_again(&agent, &near, &name);
}

#[test]
fn a_notification_to_a_dead_peer_blocks_nobody() {
    let mut far = target!("target", LEN);
    let (agent, near) = initiator(&mut far, &Settings::default());
    agent.notify("target", b"alive").unwrap();
    far.assert_notifications("initiator", &[b"alive"]);
    drop(far);
    let deadline = Instant::now() + BOUND;
    while agent.notify("target", &[0; 1000]).is_ok() {
        assert!(Instant::now() < deadline, "a dead peer takes notifications for ever");
        std::thread::yield_now();
    }
    drop_peer(&agent, "target");
    works_again(&agent, &near, "target");
}

/// Two agents of this process: `a`, which stays, and `b`, which goes and comes.
struct Couple {
    a: Agent,
    near: Buffer,
    far: Buffer,
}

impl Couple {
    fn new() -> Self {
        let (a, near) = (Agent::new("a"), Buffer::new(1 << 20));
        a.register(&near);
        Self { a, near, far: Buffer::with_pattern(1, 1 << 20) }
    }

    fn other(&self) -> Agent {
        let b = Agent::new("b");
        b.register(&self.far);
        assert_eq!(self.a.load(&b.metadata()).as_deref(), Ok("b"));
        b
    }

    fn request(&self, operation: Operation) -> Request<'_> {
        let lists = ([range(&self.near, 0, 1 << 20)], [range(&self.far, 0, 1 << 20)]);
        self.a.prepare(operation, &lists.0, "b", &lists.1).unwrap()
    }

    #[track_caller]
    fn works(&self, b: &Agent, seed: u64) {
        self.far.fill(seed, 0, self.far.len(), 0);
        let request = self.request(Operation::Read);
        request.run_with(Notify::With(&seed.to_le_bytes())).unwrap();
        self.near.assert_pattern(seed, 0, self.near.len(), 0);
        let got = collect(b, 1);
        assert!(got.len() == 1 && got[0].payload == seed.to_le_bytes() && got[0].from == "a");
    }
}

#[test]
fn an_agent_destroyed_between_prepare_and_post_comes_back_under_its_name() {
    let couple = Couple::new();
    let b = couple.other();
    couple.works(&b, 2);
    let request = couple.request(Operation::Read);
    drop(b);
    assert_eq!(request.run_with(Notify::With(b"x")), Err(Status::REMOTE_DISCONNECT));
    forget(&couple.a, "b", &request);
    let b = couple.other();
    couple.works(&b, 3);
    // What was prepared for the one before is not posted to this one.
    assert_eq!(request.post(Notify::None), Status::NOT_FOUND);
    assert_quiet(&b);
}

#[test]
fn an_agent_destroyed_before_anybody_connected() {
    let couple = Couple::new();
    let b = couple.other();
    let request = couple.request(Operation::Read);
    drop(b);
    couple.near.poison(0, couple.near.len());
    assert_eq!(request.run(), Err(Status::REMOTE_DISCONNECT));
    couple.near.assert_poison(0, couple.near.len());
    drop_peer(&couple.a, "b");
    let b = couple.other();
    couple.works(&b, 3);
}

#[test]
fn an_agent_destroyed_after_post_comes_back_under_its_name() {
    let couple = Couple::new();
    for round in 0..20 {
        let b = couple.other();
        let request = couple.request(Operation::Read);
        assert!(request.post(Notify::None).0 >= 0);
        drop(b);
        // It was done in time, or it was not. (An agent takes its regions back before it ends.)
        match request.wait() {
            Ok(()) => couple.near.assert_pattern(1, 0, couple.near.len(), 0),
            Err(status) => assert!(
                [Status::REMOTE_DISCONNECT, Status::NOT_ALLOWED].contains(&status),
                "round {round}: {status}"
            ),
        }
        let again = request.run();
        let gone = [Err(Status::REMOTE_DISCONNECT), Err(Status::NOT_FOUND)];
        assert!(gone.contains(&again), "round {round}: {again:?}");
        drop(request);
        drop_peer(&couple.a, "b");
    }
    let b = couple.other();
    couple.works(&b, 7);
}

#[test]
fn one_name_lives_many_lives() {
    let couple = Couple::new();
    for life in 0..30 {
        let b = couple.other();
        couple.works(&b, life + 10);
        drop(b);
        if life % 3 > 0 {
            assert_eq!(couple.request(Operation::Read).run(), Err(Status::REMOTE_DISCONNECT));
        }
        drop_peer(&couple.a, "b");
    }
}

#[test]
fn a_name_that_came_back_unnoticed_is_refused_until_it_is_forgotten() {
    let couple = Couple::new();
    let b = couple.other();
    couple.works(&b, 2);
    drop(b);
    let b = Agent::new("b");
    b.register(&couple.far);
    // NIXL itself takes no new connection info for a name that it knows.
    couple.a.load(&b.metadata()).unwrap_err();
    couple.a.invalidate("b").unwrap();
    assert_eq!(couple.a.load(&b.metadata()).as_deref(), Ok("b"));
    couple.works(&b, 3);
}

#[test]
fn forgetting_a_peer_ends_what_is_in_flight_with_it() {
    let mut far = target!("target", LEN);
    let (agent, near) = initiator(
        &mut far,
        &params(&[
            TCP,
            ("liveness_ms", "60000"),
            ("operation_timeout_ms", "2000"),
            ("linger_ms", "100"),
        ]),
    );
    let request = whole(&agent, &near, &far, Operation::Read);
    request.run_with(Notify::None).unwrap();
    far.process.freeze();
    assert_eq!(request.post(Notify::None), Status::IN_PROGRESS);
    agent.invalidate("target").unwrap();
    // The agent's word for a request whose peer it does not know.
    assert_eq!(request.status(), Status::NOT_FOUND);
    if let Err((status, request)) = request.release() {
        assert_eq!(status, Status::REPOST_ACTIVE);
        request.release().map_err(|(status, _)| status).unwrap();
    }
    near.poison(0, LEN);
    far.process.thaw();
    std::thread::sleep(Duration::from_millis(100));
    near.assert_poison(0, LEN);
    far.introduce_to(&agent);
    whole(&agent, &near, &far, Operation::Read).run().unwrap();
    near.assert_pattern(1, 0, LEN, 0);
}

#[test]
fn a_peer_forgotten_and_loaded_again_a_hundred_times() {
    let (target, memory) = (Agent::new("target"), Buffer::with_pattern(1, LEN));
    target.register(&memory);
    // A process of its own, since its open files are counted.
    let mut process = peer_process!();
    process.ask("agent initiator");
    process.ask("region r 4096");
    let load = format!("load {}", to_hex(&target.metadata()));
    let mut files = 0;
    for round in 0..100 {
        process.ask(&load);
        let at = memory.address(round);
        process.ask(&format!("read target r 0 {at} 4096 {round:02x}"));
        process.ask(&format!("check r 1 0 4096 {round}"));
        assert_eq!(collect(&target, 1)[0].payload, [round as u8]);
        process.ask("invalidate target");
        if round == 20 {
            files = open_files(process.id());
        }
    }
    corelane_tests::eventually("no more open files than after twenty rounds", || {
        open_files(process.id()) <= files
    });
}

#[test]
fn one_dead_peer_does_not_disturb_another() {
    let (mut good, mut bad) = (target!("good", LEN), target!("bad", LEN));
    let (agent, near) = initiator(&mut good, &params(&[TCP]));
    bad.introduce_to(&agent);
    let doomed = whole(&agent, &near, &bad, Operation::Read);
    doomed.run().unwrap();
    let request = whole(&agent, &near, &good, Operation::Read);
    bad.process.freeze();
    assert_eq!(doomed.post(Notify::None), Status::IN_PROGRESS);
    for _ in 0..20 {
        request.run().unwrap();
    }
    bad.process.kill();
    for _ in 0..20 {
        request.run().unwrap();
    }
    assert_eq!(doomed.wait(), Err(Status::REMOTE_DISCONNECT));
    near.poison(0, LEN);
    request.run().unwrap();
    near.assert_pattern(1, 0, LEN, 0);
}
