//! Peers that come by themselves: `accept`, `stop_accepting`, `start_accepting`; `region_at`; `load_peer_as`.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::Duration;

use corelane::{Access, Engine, Error, Operation, Peer};
use corelane_tests::{
    BOUND, Buffer, Configuration, PeerProcess, collect, end_of, eventually, kind, local_config,
    over_each_transport, peer_process,
};

over_each_transport!(
    a_process_that_connects_is_returned_once_and_can_be_read_from,
    processes_are_returned_in_the_order_in_which_they_came,
    who_leaves_before_being_accepted_is_not_waited_for,
    who_came_and_is_gone_refuses_notifications_and_those_taken_before_are_counted,
    waiting_ends_with_a_peer_with_stop_and_with_the_engine,
    a_closed_door_keeps_strangers_out_and_friends_in,
    a_closed_door_does_not_close_the_way_out,
);

const LEN: usize = 1 << 20;
const SOON: Duration = Duration::from_millis(50);

fn engine(name: &str, config: Configuration) -> Engine {
    Engine::new(name, config()).unwrap()
}

/// A second process with an engine and a region of pattern 1, which knows `engine`; and its region's descriptor.
fn process_that_knows(engine: &Engine, name: &str) -> (PeerProcess, corelane::RegionDescriptor) {
    let mut process = peer_process!();
    process.engine(name, "");
    let region = process.region("r", LEN, "read-write");
    process.ask(&format!("fill r 1 0 {LEN} 0"));
    process.load(&engine.metadata());
    (process, region)
}

#[track_caller]
fn assert_kind<T: std::fmt::Debug>(result: Result<T, Error>, expected: &str) -> String {
    let error = result.unwrap_err();
    assert_eq!(kind(&error), expected, "{error}");
    error.to_string()
}

/// Returns when the lane has ended what it was doing: it answers then.
fn settle(engine: &Engine) {
    let memory = Buffer::new(1);
    let region = memory.register(engine, Access::LOCAL);
    engine.deregister(&region).unwrap();
}

fn read(engine: &Engine, peer: &Peer, from: &corelane::RegionDescriptor) -> Result<(), Error> {
    let memory = Buffer::new(LEN);
    let region = memory.register(engine, Access::LOCAL);
    let local = [region.segment(0, LEN as u64)];
    let plan = engine.prepare(Operation::Read, peer, &local, &[from.segment(0, LEN as u64)])?;
    end_of(&plan.transfer())?;
    memory.assert_pattern(1, 0, LEN, 0);
    engine.deregister(&region)
}

fn a_process_that_connects_is_returned_once_and_can_be_read_from(config: Configuration) {
    let target = engine("target", config);
    assert_kind(target.accept(Duration::ZERO), "Timeout");
    assert_kind(target.accept(SOON), "Timeout");
    let (mut process, region) = process_that_knows(&target, "stranger");
    process.ask("connect target");
    let peer = target.accept(BOUND).unwrap();
    assert_eq!(peer.name(), "stranger");
    assert!(peer.is_connected());
    assert!(target.peer("stranger").is_none(), "its metadata was never loaded");
    // The other side's memory over the connection that it has made.
    read(&target, &peer, &region).unwrap();
    // More connections of one session are no news.
    assert_kind(target.accept(SOON), "Timeout");
    peer.notify(b"hello").unwrap();
    // A process of that name that comes later is another one.
    drop(process);
    eventually("its end is noticed", || !peer.is_connected());
    assert!(read(&target, &peer, &region).unwrap_err().is_disconnect());
    let (mut process, region) = process_that_knows(&target, "stranger");
    process.ask("connect target");
    let second = target.accept(BOUND).unwrap();
    assert_eq!(second.name(), "stranger");
    read(&target, &second, &region).unwrap();
    assert!(read(&target, &peer, &region).is_err(), "the handle of the first one");
}

fn processes_are_returned_in_the_order_in_which_they_came(config: Configuration) {
    let target = engine("target", config);
    let mut processes: Vec<_> = (0..4)
        .map(|i| {
            let (mut process, region) = process_that_knows(&target, &format!("number-{i}"));
            process.ask("connect target");
            (process, region)
        })
        .collect();
    // Nobody needs to be accepted to be served.
    processes[3].0.ask("notify target 6869");
    assert_eq!(collect(&target, 1)[0].payload, b"hi");
    for (i, (_, region)) in processes.iter().enumerate() {
        let peer = target.accept(BOUND).unwrap();
        assert_eq!(peer.name(), format!("number-{i}"));
        read(&target, &peer, region).unwrap();
    }
    assert_kind(target.accept(SOON), "Timeout");
}

fn who_leaves_before_being_accepted_is_not_waited_for(config: Configuration) {
    let target = engine("target", config);
    for _ in 0..3 {
        let (mut process, _) = process_that_knows(&target, "short");
        process.ask("notify target 6279");
        assert_eq!(collect(&target, 1)[0].payload, b"by");
        process.ask("shutdown");
        drop(process);
        eventually("it is forgotten", || target.stats().peers.is_empty());
        settle(&target);
    }
    match target.accept(SOON) {
        Err(error) => assert_eq!(kind(&error), "Timeout"),
        Ok(peer) => panic!("`{}` is gone and was returned", peer.name()),
    }
    let (mut process, region) = process_that_knows(&target, "long");
    process.ask("connect target");
    let peer = target.accept(BOUND).unwrap();
    assert_eq!(peer.name(), "long");
    read(&target, &peer, &region).unwrap();
}

fn who_came_and_is_gone_refuses_notifications_and_those_taken_before_are_counted(
    config: Configuration,
) {
    let target = engine("target", config);
    for _ in 0..3 {
        let (mut process, region) = process_that_knows(&target, "stranger");
        process.ask("connect target");
        let peer = target.accept(BOUND).unwrap();
        let before = target.stats().totals.notifications_dropped;
        let mut taken = 0;
        // Amid this one it says goodbye.
        let leaves = std::thread::spawn(move || process.ask("shutdown"));
        eventually("it refuses", || match peer.notify(b"too late, perhaps") {
            Ok(()) => {
                taken += 1;
                false
            }
            Err(error) => kind(&error) == "RemoteDisconnect",
        });
        leaves.join().unwrap();
        eventually("it is forgotten", || target.stats().peers.is_empty());
        settle(&target);
        // The handle of one that is forgotten.
        for _ in 0..3 {
            assert_kind(peer.notify(b"too late"), "RemoteDisconnect");
        }
        assert_kind(read(&target, &peer, &region), "RemoteDisconnect");
        let dropped = target.stats().totals.notifications_dropped - before;
        assert!(dropped <= taken, "{dropped} of {taken}");
    }
}

fn waiting_ends_with_a_peer_with_stop_and_with_the_engine(config: Configuration) {
    for end in ["peer", "stop", "shutdown"] {
        let target = engine("target", config);
        let (mut process, _) = process_that_knows(&target, "stranger");
        std::thread::scope(|scope| {
            let waiters = [BOUND, Duration::MAX].map(|timeout| {
                let target = &target;
                scope.spawn(move || target.accept(timeout))
            });
            std::thread::sleep(SOON);
            match end {
                "peer" => {
                    process.ask("connect target");
                    let returned = || waiters.iter().any(|waiter| waiter.is_finished());
                    eventually("one has returned", returned);
                    target.stop_accepting().unwrap();
                }
                "stop" => target.stop_accepting().unwrap(),
                _ => target.shutdown().unwrap(),
            }
            let mut peers = 0;
            for waiter in waiters {
                match waiter.join().unwrap() {
                    Ok(peer) => {
                        assert_eq!(peer.name(), "stranger");
                        peers += 1;
                    }
                    Err(error) => {
                        let expected = if end == "shutdown" { "Shutdown" } else { "Cancelled" };
                        assert_eq!(kind(&error), expected, "{end}: {error}");
                    }
                }
            }
            assert_eq!(peers, usize::from(end == "peer"));
        });
        if end == "shutdown" {
            assert_kind(target.accept(BOUND), "Shutdown");
            assert_kind(target.stop_accepting(), "Shutdown");
            assert_kind(target.start_accepting(), "Shutdown");
        }
    }
}

fn a_closed_door_keeps_strangers_out_and_friends_in(config: Configuration) {
    let target = engine("target", config);
    let (mut known, known_region) = process_that_knows(&target, "known");
    known.ask("notify target 6b");
    assert_eq!(collect(&target, 1)[0].payload, b"k");
    let mut loaded = peer_process!();
    let metadata = loaded.engine("loaded", "");
    loaded.load(&target.metadata());
    target.load_peer(&metadata).unwrap();
    target.stop_accepting().unwrap();
    target.stop_accepting().unwrap();
    // Who was there is still returned.
    let peer = target.accept(BOUND).unwrap();
    assert_eq!(peer.name(), "known");
    assert_kind(target.accept(BOUND), "Cancelled");

    let (mut stranger, _) = process_that_knows(&target, "stranger");
    let refused = target.stats().totals.links_refused;
    for command in ["connect target", "connect target"] {
        let error = stranger.try_ask(command).unwrap_err();
        assert!(error.starts_with("Connect"), "{error}");
        assert!(error.contains("accept"), "words that say why: {error}");
    }
    assert!(target.stats().totals.links_refused > refused);
    // Friends go on: the session that is there, and a new one of who was loaded.
    read(&target, &peer, &known_region).unwrap();
    known.ask("notify target 6b");
    assert_eq!(collect(&target, 1)[0].payload, b"k");
    for _ in 0..2 {
        loaded.ask("notify target 6c");
        assert_eq!(collect(&target, 1)[0].payload, b"l");
        loaded.ask("disconnect target");
    }

    // Open again, for the same stranger as well.
    target.start_accepting().unwrap();
    target.start_accepting().unwrap();
    eventually("the stranger is let in", || stranger.try_ask("connect target").is_ok());
    stranger.ask("notify target 73");
    assert_eq!(collect(&target, 1)[0].payload, b"s");
    let mut names = Vec::new();
    while let Ok(peer) = target.accept(Duration::from_millis(200)) {
        names.push(peer.name().to_owned());
    }
    assert!(names.contains(&"stranger".to_owned()), "{names:?}");
}

fn a_closed_door_does_not_close_the_way_out(config: Configuration) {
    let engine = engine("inside", config);
    engine.stop_accepting().unwrap();
    let mut far = peer_process!();
    let metadata = far.engine("far", "");
    let region = far.region("r", LEN, "read-write");
    far.ask(&format!("fill r 1 0 {LEN} 0"));
    let peer = engine.load_peer(&metadata).unwrap();
    read(&engine, &peer, &region).unwrap();
    // Not even to itself.
    let own = engine.load_peer(&engine.metadata()).unwrap();
    own.notify(b"me").unwrap();
    assert_eq!(collect(&engine, 1)[0].payload, b"me");
    assert_kind(engine.accept(BOUND), "Cancelled");
}

#[test]
fn a_region_is_found_by_any_range_inside_it() {
    let engine = engine("near", local_config);
    let memory = Buffer::new(LEN);
    let base = memory.address(0);
    assert!(engine.region_at(base, 1).is_none());
    let whole = memory.register(&engine, Access::READ_WRITE);
    for (offset, len) in [(0, LEN), (0, 1), (LEN - 1, 1), (4097, 5000), (LEN / 2, LEN / 2)] {
        let found = engine.region_at(base + offset as u64, len as u64).unwrap();
        assert_eq!(found.descriptor().to_bytes(), whole.descriptor().to_bytes());
    }
    for (addr, len) in [
        (base, LEN as u64 + 1),
        (base - 1, 1),
        (base - 1, 2),
        (base + LEN as u64, 1),
        (base + 1, LEN as u64),
        (base, u64::MAX),
        (u64::MAX, 2),
        (u64::MAX, u64::MAX),
        (0, 1),
    ] {
        assert!(engine.region_at(addr, len).is_none(), "{len} bytes at {addr:#x}");
    }
    // With several, the one that starts last and holds the range.
    // SAFETY: inside the buffer, which outlives the engine's use of it.
    let inner =
        unsafe { engine.register((base + 4096) as *mut u8, 4096, Access::REMOTE_READ) }.unwrap();
    let is = |addr: u64, len: u64, region: &corelane::Region| {
        let found = engine.region_at(addr, len).unwrap();
        assert_eq!(found.descriptor().to_bytes(), region.descriptor().to_bytes());
    };
    is(base + 4096, 4096, &inner);
    is(base + 8191, 1, &inner);
    is(base + 4096, 4097, &whole);
    is(base + 4095, 2, &whole);
    engine.deregister(&inner).unwrap();
    is(base + 4096, 4096, &whole);
    // What is found is as good as what was given out at the registration.
    let found = engine.region_at(base, 1).unwrap();
    engine.deregister(&found).unwrap();
    assert!(engine.region_at(base, 1).is_none());
    assert_kind(engine.deregister(&whole), "InvalidArgument");
    let again = memory.register(&engine, Access::LOCAL);
    is(base, 1, &again);
    engine.shutdown().unwrap();
}

#[test]
fn metadata_is_loaded_under_its_own_name_only() {
    let engine = engine("near", local_config);
    let mut far = peer_process!();
    let metadata = far.engine("far", "");
    let region = far.region("r", LEN, "read-write");
    far.ask(&format!("fill r 1 0 {LEN} 0"));
    for wrong in ["", "fa", "far ", "Far", "near", "far\0"] {
        let words = assert_kind(engine.load_peer_as(wrong, &metadata), "InvalidArgument");
        assert!(words.contains("`far`"), "{words}");
        assert!(engine.stats().peers.is_empty() && engine.peer("far").is_none(), "it was loaded");
    }
    assert_kind(engine.load_peer_as("far", &metadata[1..]), "Malformed");
    assert_kind(engine.load_peer_as("far", b""), "Malformed");
    let peer = engine.load_peer_as("far", &metadata).unwrap();
    assert_eq!((peer.name(), engine.stats().peers.len()), ("far", 1));
    read(&engine, &peer, &region).unwrap();
    // A refused load takes nothing away from who is known.
    let mut other = peer_process!();
    let strange = other.engine("other", "");
    assert_kind(engine.load_peer_as("far", &strange), "InvalidArgument");
    read(&engine, &peer, &region).unwrap();
    assert!(engine.peer("other").is_none());
    // Another incarnation of the name replaces it.
    let mut second = peer_process!();
    let metadata = second.engine("far", "");
    let there = second.region("r", LEN, "read-write");
    second.ask(&format!("fill r 1 0 {LEN} 0"));
    let replaced = engine.load_peer_as("far", &metadata).unwrap();
    read(&engine, &replaced, &there).unwrap();
    assert_kind(read(&engine, &replaced, &region), "StaleDescriptor");
    // The process that had the name keeps its session as long as that lasts, and gets no other.
    drop(far);
    eventually("its end is noticed", || !peer.is_connected());
    assert!(read(&engine, &peer, &region).unwrap_err().is_disconnect());
    read(&engine, &replaced, &there).unwrap();
}
