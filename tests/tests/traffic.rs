//! Traffic beside traffic: small beside bulk, the living beside the stuck and the dead.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::Duration;

use corelane::{Access, Engine, Error, Operation, Region, Status, Transfer};
use corelane_tests::{
    BOUND, Buffer, Configuration, Target, collect, end_of, eventually, kind, outcome,
    over_each_transport, peer_process, target, tcp_config, to_hex,
};

over_each_transport!(
    small_transfers_complete_while_a_bulk_transfer_is_in_flight,
    an_initiator_that_is_killed_lets_go_of_the_targets_memory,
    memory_that_a_stopped_initiator_writes_is_given_back_or_busy,
    what_is_refused_again_and_again_holds_up_nothing_else,
    notifications_to_a_dead_peer_are_given_up_and_their_room_is_free_again,
    waiting_for_notifications_ends_with_the_first_or_with_the_time,
    tasks_on_a_lane_await_notifications_and_answer_them,
);

const LEN: usize = 64 << 20;

struct Near {
    memory: Buffer,
    region: Region,
    engine: Engine,
}

impl Near {
    fn new(config: Configuration, len: usize) -> Self {
        Self::named("near", config, len)
    }

    fn named(name: &str, config: Configuration, len: usize) -> Self {
        let mut config = config();
        config.liveness = BOUND;
        let engine = Engine::new(name, config).expect("an engine");
        let memory = Buffer::new(len);
        let region = memory.register(&engine, Access::READ_WRITE);
        Self { memory, region, engine }
    }

    /// The first `len` bytes of the target, to or from `offset` here.
    fn transfer(&self, far: &Target, operation: Operation, offset: usize, len: usize) -> Transfer {
        let peer = self.engine.load_peer(&far.metadata).expect("a peer");
        let local = [self.region.segment(offset as u64, len as u64)];
        let remote = [far.region.segment(0, len as u64)];
        self.engine.prepare(operation, &peer, &local, &remote).expect("a plan").transfer()
    }
}

fn small_transfers_complete_while_a_bulk_transfer_is_in_flight(config: Configuration) {
    // Soft-RoCE moves bulk within the call that posts it: on a busy machine a lane says nothing for seconds.
    let far = target!("far", LEN, "read-write", "liveness_ms=60000");
    let near = Near::new(config, LEN + 4096);
    let small = near.transfer(&far, Operation::Read, LEN, 4096);
    for operation in [Operation::Read, Operation::Write] {
        let bulk = near.transfer(&far, operation, 0, LEN);
        end_of(&bulk).unwrap();
        end_of(&small).unwrap();
        let mut beside = 0;
        for _ in 0..5 {
            bulk.post().unwrap();
            // Each of them waits for a chunk of the 256 at most; at the end of the line, for all.
            loop {
                end_of(&small).unwrap();
                if !matches!(bulk.status(), Status::InProgress) {
                    break;
                }
                beside += 1;
            }
            outcome(&bulk).unwrap();
        }
        assert!(beside >= 8, "{beside} small reads beside 5 bulk transfers ({operation:?})");
    }
    near.memory.assert_pattern(1, 0, LEN, 0);
}

#[test]
fn a_peer_that_is_stuck_holds_up_nobody_else_on_its_lane() {
    let settings = "liveness_ms=60000";
    let [stuck, healthy] =
        ["stuck", "healthy"].map(|name| target!(name, LEN / 4, "read-write", settings));
    let near = Near::new(tcp_config, LEN);
    // More than all buffers of the way take.
    let waiting: Vec<Transfer> = [Operation::Read, Operation::Write]
        .into_iter()
        .flat_map(|op| (0..8).map(move |i| (op, i)))
        .map(|(op, i)| near.transfer(&stuck, op, LEN / 2, if i % 2 == 0 { LEN / 4 } else { 100 }))
        .collect();
    let peers = [&stuck, &healthy].map(|far| near.engine.load_peer(&far.metadata).unwrap());
    assert_eq!(peers[0].lane(), peers[1].lane());
    near.memory.fill(1, LEN / 2, LEN / 4, 0);
    end_of(&waiting[0]).unwrap();
    stuck.process.freeze();
    for transfer in &waiting {
        transfer.post().unwrap();
    }
    while peers[0].notify(&[0; 100_000]).is_ok() {}
    for _ in 0..20 {
        for (operation, len) in
            [(Operation::Read, 100), (Operation::Read, LEN / 4), (Operation::Write, LEN / 4)]
        {
            end_of(&near.transfer(&healthy, operation, 0, len)).unwrap();
        }
        near.memory.assert_pattern(1, 0, LEN / 4, 0);
    }
    assert!(waiting.iter().any(|transfer| matches!(transfer.status(), Status::InProgress)));
    stuck.process.thaw();
    for transfer in &waiting {
        outcome(transfer).unwrap();
    }
    near.memory.assert_pattern(1, LEN / 2, LEN / 4, 0);
}

fn an_initiator_that_is_killed_lets_go_of_the_targets_memory(config: Configuration) {
    let near = Near::new(config, LEN / 8);
    let descriptor = to_hex(&near.region.descriptor().to_bytes());
    let healthy = target!("healthy", 4096);
    for round in 0..6 {
        let mut victim = peer_process!();
        victim.engine(&format!("victim-{round}"), "");
        victim.load(&near.engine.metadata());
        for (i, command) in
            ["hammer-reads", "hammer-writes"].into_iter().cycle().take(4).enumerate()
        {
            victim.region(&format!("r{i}"), LEN / 8, "local");
            victim.ask(&format!("{command} near r{i} {descriptor}"));
        }
        eventually("the victim is at it", || victim.number("completed") > 12);
        victim.kill();
        end_of(&near.transfer(&healthy, Operation::Read, 0, 4096)).unwrap();
        drop(victim);
        eventually("the victim is gone", || {
            let name = format!("victim-{round}");
            near.engine.stats().peers.iter().all(|peer| peer.name != name || !peer.connected)
        });
    }
    near.engine.deregister(&near.region).unwrap();
    near.memory.poison(0, LEN / 8);
    let other = Near::named("other", config, 4096);
    end_of(&other.transfer(&healthy, Operation::Read, 0, 4096)).unwrap();
    near.memory.assert_poison(0, LEN / 8);
}

/// What a stopped process has begun nobody can take from it: its memory is quiet, or its owner is told that it is not.
fn memory_that_a_stopped_initiator_writes_is_given_back_or_busy(config: Configuration) {
    let mut config = config();
    config.liveness = BOUND;
    config.deregister_timeout = Duration::from_millis(100);
    let engine = Engine::new("near", config).unwrap();
    let memory = Buffer::new(LEN / 8);
    let mut writer = peer_process!();
    writer.engine("writer", "liveness_ms=60000");
    writer.load(&engine.metadata());
    writer.region("r", LEN / 8, "local");
    writer.ask(&format!("fill r 1 0 {} 0", LEN / 8));
    for _ in 0..10 {
        let region = memory.register(&engine, Access::REMOTE_WRITE);
        let descriptor = to_hex(&region.descriptor().to_bytes());
        let (before, failed) = (writer.number("completed"), writer.number("failed"));
        for _ in 0..2 {
            writer.ask(&format!("hammer-writes near r {descriptor}"));
        }
        eventually("the writer is at it", || writer.number("completed") > before + 4);
        writer.freeze();
        let given_back = engine.deregister(&region);
        if given_back.is_ok() {
            memory.poison(0, LEN / 8);
        }
        writer.thaw();
        if let Err(error) = given_back {
            assert_eq!(kind(&error), "Busy", "{error}");
            eventually("it is given back", || engine.deregister(&region).is_ok());
            memory.poison(0, LEN / 8);
        }
        eventually("each hammer is refused", || writer.number("failed") == failed + 2);
        let error = writer.try_ask("stop-hammers").unwrap_err();
        assert!(error.contains("Permission"), "{error}");
        memory.assert_poison(0, LEN / 8);
    }
}

/// A device that refuses an access takes the queue pair down: that says nothing against the way, which is not given up.
fn what_is_refused_again_and_again_holds_up_nothing_else(config: Configuration) {
    let (near, far) = (Near::new(config, 4096), Near::named("far", config, 4096));
    // Whoever of them has opened the connection.
    for (from, to) in [(&near, &far), (&far, &near)] {
        let peer = from.engine.load_peer(&to.engine.metadata()).unwrap();
        let write = |remote: &Region| {
            let local = [from.region.segment(0, 4096)];
            let remote = [remote.descriptor().segment(0, 4096)];
            from.engine.prepare(Operation::Write, &peer, &local, &remote).unwrap().transfer()
        };
        let allowed = write(&to.region);
        let other = Buffer::new(4096);
        for round in 0..12 {
            let region = other.register(&to.engine, Access::REMOTE_WRITE);
            let refused = write(&region);
            to.engine.deregister(&region).unwrap();
            other.poison(0, 4096);
            from.memory.fill(round, 0, 4096, 0);
            let error = end_of(&refused).unwrap_err();
            assert_eq!(kind(&error), "Permission", "{error}");
            end_of(&allowed).unwrap();
            to.memory.assert_pattern(round, 0, 4096, 0);
            other.assert_poison(0, 4096);
        }
    }
}

fn notifications_to_a_dead_peer_are_given_up_and_their_room_is_free_again(config: Configuration) {
    let mut config = config();
    config.limits.unacknowledged_notifications = 50;
    config.connect_timeout = Duration::from_millis(500);
    let engine = Engine::new("near", config).unwrap();
    let mut far = peer_process!();
    let metadata = far.engine("far", "pending=10");
    let peer = engine.load_peer(&metadata).unwrap();
    while peer.notify(b"unheard").is_ok() {}
    drop(far);
    eventually("nothing waits for the dead", || {
        engine.stats().peers.iter().all(|peer| peer.unacknowledged == 0)
    });
    eventually("who sends more is told", || {
        matches!(peer.notify(b"unheard"), Err(Error::Connect { .. }))
    });
    let mut far = peer_process!();
    let peer = engine.load_peer(&far.engine("far", "")).unwrap();
    peer.notify(b"hello").unwrap();
    assert_eq!(far.ask("take 1"), format!("near:{}", to_hex(b"hello")));
}

fn waiting_for_notifications_ends_with_the_first_or_with_the_time(config: Configuration) {
    let near = Near::new(config, 4096);
    assert!(near.engine.wait_notifications(Duration::ZERO).unwrap().is_empty());
    assert!(near.engine.wait_notifications(Duration::from_millis(30)).unwrap().is_empty());
    let mut far = peer_process!();
    far.engine("far", "");
    far.load(&near.engine.metadata());
    for number in 0..300u64 {
        far.send(&format!("notify near {}", to_hex(&number.to_le_bytes())));
        let all = near.engine.wait_notifications(BOUND).unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!((&*all[0].from, &*all[0].payload), ("far", &number.to_le_bytes()[..]));
        far.answer().unwrap();
    }
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| near.engine.wait_notifications(2 * BOUND));
        std::thread::sleep(Duration::from_millis(20));
        let start = std::time::Instant::now();
        near.engine.shutdown().unwrap();
        assert_eq!(kind(&waiting.join().unwrap().unwrap_err()), "Shutdown");
        assert!(start.elapsed() < BOUND);
    });
}

fn tasks_on_a_lane_await_notifications_and_answer_them(config: Configuration) {
    const COUNT: u64 = 2000;
    let (asker, answerer) =
        (Near::named("asker", config, 4096), Near::named("answerer", config, 4096));
    let back = answerer.engine.load_peer(&asker.engine.metadata()).unwrap();
    let engine = answerer.engine.clone();
    let answering = answerer.engine.spawn_on(&back.clone(), move |_| async move {
        let mut answered = 0;
        while answered < COUNT {
            engine.notified().await?;
            let mut payloads = Vec::new();
            engine.take_notifications(|notification| payloads.push(notification.payload))?;
            for payload in payloads {
                back.notify(&payload)?;
                answered += 1;
            }
        }
        Ok::<_, Error>(())
    });
    let answering = answering.unwrap();
    let peer = asker.engine.load_peer(&answerer.engine.metadata()).unwrap();
    for number in 0..COUNT {
        peer.notify(&number.to_le_bytes()).unwrap();
        assert_eq!(collect(&asker.engine, 1)[0].payload, number.to_le_bytes());
    }
    answering.wait().unwrap().unwrap();
}

#[test]
fn what_would_stop_a_lane_is_an_error_on_it() {
    let far = target!("far", LEN / 8, "read-write", "liveness_ms=60000");
    let near = Near::new(tcp_config, LEN / 8);
    let transfer = near.transfer(&far, Operation::Read, 0, LEN / 8);
    end_of(&transfer).unwrap();
    let peer = near.engine.peer("far").unwrap();
    let (engine, region, inner) = (near.engine.clone(), near.region.clone(), peer.clone());
    far.process.freeze();
    transfer.post().unwrap();
    let blocked = near.engine.spawn_on(&peer, move |_| async move {
        [
            transfer.wait(BOUND).err(),
            engine.wait_notifications(BOUND).err(),
            inner.disconnect().err(),
            engine.deregister(&region).err(),
        ]
    });
    let errors = blocked.unwrap().wait().unwrap();
    for (i, error) in errors.iter().enumerate() {
        let error = error.as_ref().unwrap_or_else(|| panic!("call {i} has stopped the lane"));
        assert_eq!(kind(error), "InvalidArgument", "call {i}: {error}");
    }
    far.process.thaw();
    end_of(&near.transfer(&far, Operation::Read, 0, 4096)).unwrap();
}

#[test]
fn a_task_on_a_lane_that_posts_too_many_transfers_is_told_so() {
    let far = target!("far", 4096, "read-write", "liveness_ms=60000");
    let mut config = tcp_config();
    config.limits.transfers = 4;
    config.liveness = BOUND;
    let engine = Engine::new("near", config).unwrap();
    let memory = Buffer::new(4096);
    let region = memory.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let plan = engine
        .prepare(Operation::Read, &peer, &[region.segment(0, 99)], &[far.region.segment(0, 99)])
        .unwrap();
    end_of(&plan.transfer()).unwrap();
    far.process.freeze();
    let transfers: Vec<Transfer> = (0..5).map(|_| plan.transfer()).collect();
    let posting = engine.spawn_on(&peer, move |_| async move {
        let refused: Vec<_> = transfers.iter().map(|transfer| transfer.post().err()).collect();
        (transfers, refused)
    });
    let (transfers, refused) = posting.unwrap().wait().unwrap();
    assert!(refused[..4].iter().all(Option::is_none), "{refused:?}");
    assert_eq!(kind(refused[4].as_ref().expect("a fifth transfer is refused")), "Busy");
    far.process.thaw();
    for transfer in &transfers[..4] {
        outcome(transfer).unwrap();
    }
    end_of(&transfers[4]).unwrap();
    memory.assert_pattern(1, 0, 99, 0);
}
