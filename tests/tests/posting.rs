//! Posting: again and again, many at once, from many threads, on a lane; and taking it back.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Duration;

use corelane::{Access, Engine, EngineConfig, LocalEngine, Operation, Peer, Plan, Region, Status};
use corelane_tests::{
    BOUND, Buffer, Configuration, Passing, Proxy, Target, cut_short, end_of, eventually,
    fill_block, kind, local_config, needs_the_peer, outcome, over_each_transport, target,
    tcp_config,
};

over_each_transport!(
    a_transfer_can_be_posted_thousands_of_times,
    a_finished_transfer_answers_the_same_however_often_it_is_asked,
    more_transfers_than_the_limit_wait_for_their_turn_and_all_complete,
    thousands_of_transfers_can_be_in_flight,
    many_threads_can_post_at_once,
    a_cancelled_read_writes_nothing_after_its_end,
    a_cancelled_write_reads_nothing_after_its_end,
    dropping_a_transfer_in_flight_cancels_it,
    cancelling_what_is_not_in_flight_changes_nothing,
    code_on_a_lane_awaits_its_transfers,
    an_executor_elsewhere_is_woken_by_the_end_of_a_transfer,
);

/// An engine with memory, and a second process.
struct Pair {
    far: Target,
    near: Buffer,
    region: Region,
    peer: Peer,
    engine: Engine,
}

impl Pair {
    fn new(len: usize, config: EngineConfig, settings: &str) -> Self {
        let far = target!("target", len, "read-write", settings);
        let engine = Engine::new("initiator", config).unwrap();
        let near = Buffer::new(len);
        let region = near.register(&engine, Access::LOCAL);
        let peer = engine.load_peer(&far.metadata).unwrap();
        Self { far, near, region, peer, engine }
    }

    /// The same range on both sides.
    fn plan(&self, operation: Operation, offset: usize, len: usize) -> Plan {
        let local = [self.region.segment(offset as u64, len as u64)];
        let remote = [self.far.region.segment(offset as u64, len as u64)];
        self.engine.prepare(operation, &self.peer, &local, &remote).unwrap()
    }
}

fn a_transfer_can_be_posted_thousands_of_times(config: Configuration) {
    let mut pair = Pair::new(4096, config(), "");
    let (read, write) = (
        pair.plan(Operation::Read, 0, 4096).transfer(),
        pair.plan(Operation::Write, 0, 4096).transfer(),
    );
    for round in 0..10_000u64 {
        fill_block(&pair.near, 0, 4096, round);
        end_of(&write).unwrap();
        pair.near.poison(0, 4096);
        end_of(&read).unwrap();
        assert!(corelane_tests::block_holds(&pair.near, 0, 4096, round), "round {round}");
    }
    // Over `local` the peer has no part in it.
    let served = if needs_the_peer(&config()) { 20_000 } else { 0 };
    assert_eq!(pair.far.process.number("served"), served);
    let totals = pair.engine.stats().totals;
    assert_eq!((totals.posted, totals.completed, totals.failed), (20_000, 20_000, 0));
}

fn a_finished_transfer_answers_the_same_however_often_it_is_asked(config: Configuration) {
    let pair = Pair::new(4096, config(), "");
    let transfer = pair.plan(Operation::Read, 0, 4096).transfer();
    assert!(matches!(transfer.status(), Status::Idle));
    end_of(&transfer).unwrap();
    for _ in 0..1000 {
        assert!(matches!(transfer.status(), Status::Done));
        transfer.wait(Duration::ZERO).unwrap();
    }
    pair.engine.deregister(&pair.region).unwrap();
    let error = end_of(&transfer).unwrap_err();
    for _ in 0..1000 {
        let Status::Failed(again) = transfer.status() else { panic!("no longer failed") };
        assert_eq!(again.to_string(), error.to_string());
    }
}

fn more_transfers_than_the_limit_wait_for_their_turn_and_all_complete(config: Configuration) {
    let mut config = config();
    config.limits.transfers = 8;
    let pair = Pair::new(1 << 20, config, "");
    for len in [1024, 256 << 10] {
        pair.near.poison(0, 1 << 20);
        let count = (1 << 20) / len * 4;
        let transfers: Vec<_> = (0..count)
            .map(|i| pair.plan(Operation::Read, i * len % (1 << 20), len).transfer())
            .collect();
        for transfer in &transfers {
            transfer.post().unwrap();
        }
        for transfer in &transfers {
            outcome(transfer).unwrap();
        }
        pair.near.assert_pattern(1, 0, 1 << 20, 0);
    }
}

fn thousands_of_transfers_can_be_in_flight(config: Configuration) {
    let pair = Pair::new(4096 * 1000, config(), "");
    let transfers: Vec<_> =
        (0..4000).map(|i| pair.plan(Operation::Read, i * 1000, 1000).transfer()).collect();
    for _ in 0..3 {
        pair.near.poison(0, pair.near.len());
        for transfer in &transfers {
            transfer.post().unwrap();
        }
        for transfer in &transfers {
            outcome(transfer).unwrap();
        }
        pair.near.assert_pattern(1, 0, 4_000_000, 0);
        pair.near.assert_poison(4_000_000, pair.near.len() - 4_000_000);
    }
}

fn many_threads_can_post_at_once(config: Configuration) {
    let mut config = config();
    config.limits.transfers = 6;
    let pair = Pair::new(1 << 20, config, "");
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let pair = &pair;
            scope.spawn(move || {
                let (offset, len) = (thread << 17, if thread % 2 == 0 { 1 << 17 } else { 777 });
                let transfer = pair.plan(Operation::Read, offset, len).transfer();
                for round in 0..500 {
                    pair.near.poison(offset, len);
                    end_of(&transfer).unwrap();
                    if let Err(wrong) = pair.near.check(1, offset, len, offset as u64) {
                        panic!("thread {thread}, round {round}: {wrong}");
                    }
                }
            });
        }
    });
}

#[test]
fn one_transfer_is_posted_once_at_a_time() {
    let mut config = tcp_config();
    config.liveness = BOUND;
    let pair = Pair::new(4096, config, "liveness_ms=60000");
    let transfer = pair.plan(Operation::Read, 0, 4096).transfer();
    end_of(&transfer).unwrap();
    pair.far.process.freeze();
    transfer.post().unwrap();
    assert_eq!(kind(&transfer.post().unwrap_err()), "Busy");
    assert_eq!(kind(&transfer.post_with_notification(b"x").unwrap_err()), "Busy");
    assert!(matches!(transfer.status(), Status::InProgress));
    // Giving up waiting ends nothing.
    assert_eq!(kind(&transfer.wait(Duration::from_millis(20)).unwrap_err()), "Timeout");
    assert!(matches!(transfer.status(), Status::InProgress));
    pair.far.process.thaw();
    outcome(&transfer).unwrap();
    end_of(&transfer).unwrap();
}

#[test]
fn a_peer_that_does_not_answer_in_time_fails_the_transfer_and_is_usable_again() {
    let mut config = tcp_config();
    config.liveness = BOUND;
    config.operation_timeout = Duration::from_secs(1);
    let pair = Pair::new(4 << 20, config, "liveness_ms=60000");
    let transfers = [100, 4 << 20].map(|len| pair.plan(Operation::Read, 0, len).transfer());
    for transfer in &transfers {
        // A busy machine may take longer than this engine waits.
        eventually("the peer serves", || end_of(transfer).is_ok());
    }
    for transfer in &transfers {
        pair.far.process.freeze();
        assert_eq!(kind(&end_of(transfer).unwrap_err()), "Timeout");
        pair.near.poison(0, 4 << 20);
        pair.far.process.thaw();
        // The answers that come now are for nobody.
        eventually("the peer serves again", || {
            end_of(&pair.plan(Operation::Read, 1 << 20, 64).transfer()).is_ok()
        });
        pair.near.assert_poison(0, 1 << 20);
        pair.near.assert_poison((1 << 20) + 64, (3 << 20) - 64);
    }
    let again = pair.plan(Operation::Read, 0, 4 << 20).transfer();
    eventually("bulk works again", || end_of(&again).is_ok());
    pair.near.assert_pattern(1, 0, 4 << 20, 0);
}

#[test]
fn a_silent_peer_is_given_up_after_the_liveness_timeout_and_is_usable_again() {
    let mut config = tcp_config();
    config.liveness = Duration::from_secs(1);
    let pair = Pair::new(4096, config, "liveness_ms=1000");
    let transfer = pair.plan(Operation::Read, 0, 4096).transfer();
    end_of(&transfer).unwrap();
    pair.far.process.freeze();
    let error = end_of(&transfer).unwrap_err();
    assert!(error.is_disconnect(), "{error}");
    assert!(error.to_string().contains("target"), "{error}");
    pair.near.poison(0, 4096);
    pair.far.process.thaw();
    eventually("it is served again", || end_of(&transfer).is_ok());
    pair.near.assert_pattern(1, 0, 4096, 0);
}

#[test]
fn a_transfer_that_waits_for_its_connection_can_be_cancelled() {
    // Nothing ever answers behind this address.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::new(Passing::Whole);
    proxy.aim(silent.local_addr().unwrap().port());
    let mut config = local_config();
    config.listen.advertise = vec![proxy.address()];
    let owner = Engine::new("silent", config).unwrap();
    let memory = Buffer::new(4096);
    let remote = memory.register(&owner, Access::READ_WRITE);

    let mut config = tcp_config();
    config.connect_timeout = BOUND;
    let engine = Engine::new("initiator", config).unwrap();
    let near = Buffer::new(4096);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&owner.metadata()).unwrap();
    for operation in [Operation::Read, Operation::Write] {
        let remote = [remote.descriptor().segment(0, 4096)];
        let plan = engine.prepare(operation, &peer, &[region.segment(0, 4096)], &remote).unwrap();
        let transfer = plan.transfer();
        transfer.post_with_notification(b"never").unwrap();
        assert!(matches!(transfer.status(), Status::InProgress));
        transfer.cancel();
        assert_eq!(kind(&outcome(&transfer).unwrap_err()), "Cancelled");
    }
    assert!(owner.notifications().unwrap().is_empty());
    memory.assert_poison(0, 4096);
}

/// Cancels bulk transfers after they have begun; `after` is called at their end.
fn cancel_in_the_middle(config: Configuration, operation: Operation, after: impl Fn(&mut Pair)) {
    const LEN: usize = 32 << 20;
    let mut pair = Pair::new(LEN, config(), "");
    let mut cancelled = 0;
    for round in 0..12 {
        let transfer = pair.plan(operation, 0, LEN).transfer();
        let moved = |engine: &Engine| {
            let totals = engine.stats().totals;
            totals.bytes_read + totals.bytes_written
        };
        let before = moved(&pair.engine);
        transfer.post().unwrap();
        while moved(&pair.engine) < before + round * (1 << 20) {
            if !matches!(transfer.status(), Status::InProgress) {
                break;
            }
        }
        transfer.cancel();
        cancelled += u32::from(cut_short(&transfer));
        after(&mut pair);
    }
    assert!(cancelled > 0, "every transfer was faster than its cancelling");
    // The same slot, and another transfer, go on.
    if operation == Operation::Read {
        let transfer = pair.plan(operation, 0, LEN).transfer();
        transfer.post().unwrap();
        transfer.cancel();
        let _ = outcome(&transfer);
        end_of(&transfer).unwrap();
        pair.near.assert_pattern(1, 0, LEN, 0);
    }
}

fn a_cancelled_read_writes_nothing_after_its_end(config: Configuration) {
    cancel_in_the_middle(config, Operation::Read, |pair| {
        pair.near.poison(0, 32 << 20);
        // What was under way comes through the same streams, before these.
        for _ in 0..20 {
            end_of(&pair.plan(Operation::Read, 0, 1 << 20).transfer()).unwrap();
            pair.near.assert_pattern(1, 0, 1 << 20, 0);
        }
        pair.near.assert_poison(1 << 20, 31 << 20);
    });
}

fn a_cancelled_write_reads_nothing_after_its_end(config: Configuration) {
    cancel_in_the_middle(config, Operation::Write, |pair| {
        // Whatever leaves from now on is pattern 8; the target has poison or pattern 3, never that.
        pair.near.fill(8, 0, 32 << 20, 0);
        for _ in 0..20 {
            let end = 31 << 20;
            end_of(&pair.plan(Operation::Write, end, 1 << 20).transfer()).unwrap();
        }
        let there = pair.far.process.dump("r", 0, 31 << 20);
        for page in 0..(31 << 20) / 4096 {
            let bytes = &there[page * 4096..(page + 1) * 4096];
            assert!(
                pair.near.snapshot(page * 4096, 4096) != bytes,
                "page {page} was read after the end"
            );
        }
        pair.near.fill(3, 0, 32 << 20, 0);
    });
}

#[test]
fn a_cancelled_write_is_not_written_by_the_peer_after_its_end() {
    const LEN: usize = 8 << 20;
    let mut config = tcp_config();
    config.liveness = BOUND;
    let mut pair = Pair::new(LEN, config, "liveness_ms=60000");
    end_of(&pair.plan(Operation::Write, 0, LEN).transfer()).unwrap();
    // What sockets take as a whole, and what they do not.
    for len in [4096, 256 << 10, LEN] {
        let transfer = pair.plan(Operation::Write, 0, len).transfer();
        pair.far.process.freeze();
        let sent = pair.engine.stats().totals.requests_sent;
        transfer.post().unwrap();
        eventually("requests are sent", || {
            let _ = transfer.status();
            pair.engine.stats().totals.requests_sent > sent
        });
        transfer.cancel();
        for _ in 0..100 {
            let status = transfer.status();
            assert!(matches!(status, Status::InProgress), "{len}: {status:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        pair.far.process.thaw();
        assert!(cut_short(&transfer), "{len}");
        // Its owner uses the memory for something else.
        pair.far.process.ask(&format!("poison r 0 {LEN}"));
        std::thread::sleep(Duration::from_secs(1));
        pair.far.assert_poison(0, LEN);
    }
    end_of(&pair.plan(Operation::Write, 0, LEN).transfer()).unwrap();
}

fn dropping_a_transfer_in_flight_cancels_it(config: Configuration) {
    let pair = Pair::new(16 << 20, config(), "");
    for _ in 0..20 {
        let transfer = pair.plan(Operation::Read, 0, 16 << 20).transfer();
        transfer.post().unwrap();
        drop(transfer);
    }
    // When the region is given back, nothing writes to it any more.
    pair.engine.deregister(&pair.region).unwrap();
    pair.near.poison(0, 16 << 20);
    let other = Buffer::new(4096);
    let region = other.register(&pair.engine, Access::LOCAL);
    let plan = pair.engine.prepare(
        Operation::Read,
        &pair.peer,
        &[region.segment(0, 4096)],
        &[pair.far.region.segment(0, 4096)],
    );
    let transfer = plan.unwrap().transfer();
    for _ in 0..500 {
        end_of(&transfer).unwrap();
    }
    other.assert_pattern(1, 0, 4096, 0);
    pair.near.assert_poison(0, 16 << 20);
    let in_flight: usize = pair.engine.stats().peers.iter().map(|peer| peer.in_flight).sum();
    assert_eq!(in_flight, 0);
}

fn cancelling_what_is_not_in_flight_changes_nothing(config: Configuration) {
    let pair = Pair::new(4096, config(), "");
    let transfer = pair.plan(Operation::Read, 0, 4096).transfer();
    transfer.cancel();
    assert!(matches!(transfer.status(), Status::Idle));
    for _ in 0..200 {
        end_of(&transfer).unwrap();
        transfer.cancel();
        assert!(matches!(transfer.status(), Status::Done));
    }
}

#[test]
fn streams_that_were_closed_because_they_were_idle_open_again() {
    let mut config = tcp_config();
    config.stream_idle = Duration::from_millis(2);
    let pair = Pair::new(1 << 20, config, "stream_idle_ms=2");
    let (read, write) = (
        pair.plan(Operation::Read, 0, 1 << 20).transfer(),
        pair.plan(Operation::Write, 0, 1 << 20).transfer(),
    );
    let mut closed = 0;
    for round in 0..150u64 {
        fill_block(&pair.near, 0, 1 << 20, round);
        end_of(&write).unwrap();
        pair.near.poison(0, 1 << 20);
        end_of(&read).unwrap();
        assert!(corelane_tests::block_holds(&pair.near, 0, 1 << 20, round), "round {round}");
        // Around the limit: before it, while they are being closed, after it.
        std::thread::sleep(Duration::from_micros(round * 97 % 5000));
        closed = pair.engine.stats().totals.links_down;
    }
    assert!(closed > 0, "no stream was ever closed");
}

fn code_on_a_lane_awaits_its_transfers(config: Configuration) {
    let pair = Pair::new(2 << 20, config(), "");
    let tasks: Vec<_> = (0..10)
        .map(|task| {
            let (offset, len) =
                if task % 2 == 0 { (task << 17, 1 << 17) } else { (task << 17, 99) };
            let transfer = pair.plan(Operation::Read, offset, len).transfer();
            pair.engine
                .spawn_on(&pair.peer, move |local: LocalEngine| async move {
                    for round in 0..100 {
                        transfer.post()?;
                        transfer.completed().await?;
                        if round % 10 == 0 {
                            local.sleep(Duration::from_micros(100)).await;
                        } else {
                            local.yield_now().await;
                        }
                    }
                    Ok::<_, corelane::Error>((offset, len))
                })
                .unwrap()
        })
        .collect();
    for task in tasks {
        let (offset, len) = task.wait().unwrap().unwrap();
        pair.near.assert_pattern(1, offset, len, offset as u64);
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn an_executor_elsewhere_is_woken_by_the_end_of_a_transfer(config: Configuration) {
    let pair = Pair::new(1 << 20, config(), "");
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    for (round, len) in [64, 1 << 20].into_iter().cycle().take(300).enumerate() {
        let transfer = pair.plan(Operation::Read, 0, len).transfer();
        transfer.post().unwrap();
        let mut end = std::pin::pin!(transfer.completed());
        let ended = loop {
            if let Poll::Ready(ended) = end.as_mut().poll(&mut Context::from_waker(&waker)) {
                break ended;
            }
            let start = std::time::Instant::now();
            std::thread::park_timeout(BOUND);
            assert!(start.elapsed() < BOUND, "round {round}: never woken");
        };
        ended.unwrap();
        pair.near.assert_pattern(1, 0, len, 0);
    }
}
