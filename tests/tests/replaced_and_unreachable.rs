//! Peers that are replaced, unloaded or out of reach, and registrations that overlap.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::{Duration, Instant};

use corelane::{Access, DescriptorPair, Engine, Error, LocalSegment, Operation, Region};
use corelane_tests::{
    Buffer, Configuration, Near, Target, end_of, eventually, kind, local_config, outcome,
    over_each_transport, peer_process, target, tcp_config, transport,
};

over_each_transport!(
    a_transfer_that_waits_for_a_connection_past_its_timeout_says_that_there_is_none,
    unloading_a_silent_peer_need_not_wait_for_its_acknowledgements,
    a_peer_loaded_again_while_its_goodbye_is_under_way_is_served_and_loses_nothing,
    an_engine_whose_name_was_given_to_another_is_heard_no_more,
    taking_notifications_ends_although_more_arrive,
    a_peer_that_connects_again_before_its_old_link_is_closed_is_served,
);

const LEN: usize = 1 << 20;
/// Nothing here takes so long unless it waits for the wrong thing.
const FAR_TOO_LONG: Duration = Duration::from_secs(60);

fn plan(engine: &Engine, far: &Target, region: &Region) -> corelane::Plan {
    let peer = engine.load_peer(&far.metadata).unwrap();
    let (local, remote) = (region.segment(0, 100), far.region.segment(0, 100));
    engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap()
}

fn a_transfer_that_waits_for_a_connection_past_its_timeout_says_that_there_is_none(
    config: Configuration,
) {
    let mut config = config();
    config.operation_timeout = Duration::from_millis(300);
    config.connect_timeout = FAR_TOO_LONG;
    let engine = Engine::new("near", config).unwrap();
    let memory = Buffer::new(LEN);
    let region = memory.register(&engine, Access::LOCAL);
    let far = target!("far", LEN);
    far.process.freeze();
    let error = end_of(&plan(&engine, &far, &region).transfer()).unwrap_err();
    assert_eq!(kind(&error), "Connect", "{error}");
    assert!(error.is_disconnect(), "{error}");
    far.process.thaw();
}

#[test]
fn the_attempt_after_a_lost_link_has_its_own_time() {
    let mut config = tcp_config();
    config.liveness = Duration::from_secs(1);
    config.reconnect_timeout = Duration::from_millis(300);
    config.connect_timeout = FAR_TOO_LONG * 2;
    config.operation_timeout = FAR_TOO_LONG * 3;
    let engine = Engine::new("near", config).unwrap();
    let memory = Buffer::new(LEN);
    let region = memory.register(&engine, Access::LOCAL);
    let far = target!("far", LEN);
    let plan = plan(&engine, &far, &region);
    end_of(&plan.transfer()).unwrap();
    far.process.freeze();
    let started = Instant::now();
    let transfers: Vec<_> = (0..300).map(|_| plan.transfer()).collect();
    transfers.iter().for_each(|transfer| transfer.post().unwrap());
    for transfer in &transfers {
        let error = transfer.wait(FAR_TOO_LONG).unwrap_err();
        assert!(error.is_disconnect(), "{error}");
    }
    assert!(started.elapsed() < FAR_TOO_LONG, "the connect timeout counted");
    far.process.thaw();
}

/// The stopped process finds the end of the old link and the beginning of the new one in the same moment.
fn a_peer_that_connects_again_before_its_old_link_is_closed_is_served(config: Configuration) {
    const ROUNDS: u64 = 8;
    let mut config = config();
    config.liveness = Duration::from_secs(1);
    config.connect_timeout = FAR_TOO_LONG;
    config.operation_timeout = FAR_TOO_LONG / 2;
    let near = Near::new(config, LEN);
    let mut far = target!("far", LEN);
    let peer = near.connect(&far.metadata);
    let way = transport(&near.engine, "far");
    let read = near.transfer(&peer, Operation::Read, (0, 0), &far.region, 4096);
    for round in 0..ROUNDS {
        end_of(&read).unwrap();
        near.memory.poison(0, 4096);
        peer.notify(&[round as u8, 0]).unwrap();
        // Not the number of the round: a process that gets no core for so long is silent, too.
        let silences = || near.engine.stats().totals.liveness_timeouts;
        let before = silences();
        far.process.freeze();
        eventually("the silence is noticed", || silences() > before);
        peer.notify(&[round as u8, 1]).unwrap();
        read.post().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        far.process.thaw();
        outcome(&read).unwrap();
        near.memory.assert_pattern(1, 0, 4096, 0);
        assert_eq!(transport(&near.engine, "far"), way);
    }
    let mut expected = String::new();
    for round in 0..ROUNDS {
        use std::fmt::Write;
        write!(expected, "near:{round:02x}00 near:{round:02x}01 ").unwrap();
    }
    let seen = far.process.ask(&format!("take {}", 2 * ROUNDS));
    assert_eq!(seen, expected.trim_end());
}

fn unloading_a_silent_peer_need_not_wait_for_its_acknowledgements(config: Configuration) {
    let mut config = config();
    config.linger = FAR_TOO_LONG * 2;
    config.liveness = FAR_TOO_LONG * 2;
    let engine = Engine::new("near", config).unwrap();
    let mut far = peer_process!();
    let metadata = far.engine("far", "");
    let peer = engine.load_peer(&metadata).unwrap();
    peer.connect(FAR_TOO_LONG).unwrap();
    far.freeze();
    peer.notify(b"nobody reads this").unwrap();
    let started = Instant::now();
    let dropped = engine.unload_peer_within(&peer, Duration::from_millis(20)).unwrap();
    assert_eq!(dropped, None, "the flush goes on by itself");
    assert!(started.elapsed() < FAR_TOO_LONG);
    assert!(engine.peer("far").is_none());
    assert!(matches!(peer.notify(b"late"), Err(Error::Cancelled)));
    far.thaw();
    eventually("what was said before is heard", || far.number("received") == 1);
}

/// Twice over: the second goodbye is that of a connection which cannot be made yet, and which the third must not replace.
fn a_peer_loaded_again_while_its_goodbye_is_under_way_is_served_and_loses_nothing(
    config: Configuration,
) {
    let mut config = config();
    config.linger = FAR_TOO_LONG * 2;
    config.liveness = FAR_TOO_LONG * 2;
    config.connect_timeout = FAR_TOO_LONG;
    config.operation_timeout = FAR_TOO_LONG;
    let near = Near::new(config, LEN);
    let mut far = target!("far", LEN);
    let mut peer = near.connect(&far.metadata);
    far.process.freeze();
    for said in [1u8, 2] {
        peer.notify(&[said]).unwrap();
        let dropped = near.engine.unload_peer_within(&peer, Duration::from_millis(20)).unwrap();
        assert_eq!(dropped, None, "the flush goes on by itself");
        peer = near.engine.load_peer(&far.metadata).unwrap();
    }
    let read = near.transfer(&peer, Operation::Read, (0, 0), &far.region, 4096);
    near.memory.poison(0, 4096);
    read.post().unwrap();
    far.process.thaw();
    outcome(&read).unwrap();
    near.memory.assert_pattern(1, 0, 4096, 0);
    peer.notify(&[3]).unwrap();
    let mut heard = Vec::new();
    while heard.last().is_none_or(|last| last != "near:03") {
        let more = far.process.ask("take 1");
        heard.extend(more.split(' ').map(str::to_owned));
    }
    assert_eq!(heard, ["near:01", "near:02", "near:03"]);
    assert_eq!(near.engine.stats().totals.notifications_dropped, 0);
}

fn an_engine_whose_name_was_given_to_another_is_heard_no_more(config: Configuration) {
    let near = Engine::new("near", config()).unwrap();
    let (first, second) =
        (Engine::new("far", config()).unwrap(), Engine::new("far", config()).unwrap());
    let memory = Buffer::new(LEN);
    let region = memory.register(&first, Access::READ_WRITE);
    let own = Buffer::new(LEN);
    let own_region = own.register(&near, Access::LOCAL);
    let old = near.load_peer(&first.metadata()).unwrap();
    let plan = near
        .prepare(
            Operation::Read,
            &old,
            &[own_region.segment(0, 64)],
            &[region.descriptor().segment(0, 64)],
        )
        .unwrap();
    end_of(&plan.transfer()).unwrap();
    first.load_peer(&near.metadata()).unwrap().notify(b"from the first").unwrap();
    let heard = near.wait_notifications(FAR_TOO_LONG).unwrap();
    assert_eq!(heard[0].payload, b"from the first");

    near.load_peer(&second.metadata()).unwrap();
    let error = end_of(&plan.transfer()).unwrap_err();
    assert!(matches!(error, Error::RemoteDisconnect { .. }), "{error}");
    let from_first = first.load_peer(&near.metadata()).unwrap();
    eventually("the first is told", || from_first.notify(b"again").is_err());
    second.load_peer(&near.metadata()).unwrap().notify(b"from the second").unwrap();
    let heard = near.wait_notifications(FAR_TOO_LONG).unwrap();
    assert!(heard.iter().all(|one| one.payload == b"from the second"), "{heard:?}");
}

fn taking_notifications_ends_although_more_arrive(config: Configuration) {
    let engine = Engine::new("near", config()).unwrap();
    let myself = engine.load_peer(&engine.metadata()).unwrap();
    (0..10).for_each(|_| myself.notify(b"one").unwrap());
    eventually("ten are there", || engine.stats().pending_notifications == 10);
    let mut more = 0;
    let taken = engine
        .take_notifications(|_| {
            let before = engine.stats().notifications_received;
            myself.notify(b"another").unwrap();
            eventually("it is there", || engine.stats().notifications_received > before);
            more += 1;
        })
        .unwrap();
    assert_eq!((taken, more), (10, 10));
    assert_eq!(engine.notifications().unwrap().len(), 10);
}

#[test]
fn a_plan_depends_on_the_registration_that_it_names_and_on_no_other() {
    let engine = Engine::new("near", local_config()).unwrap();
    let far = target!("far", LEN);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let memory = Buffer::new(LEN);
    let wide = memory.register(&engine, Access::LOCAL);
    // SAFETY: inside `memory`, which outlives the engine's use of it.
    let narrow =
        unsafe { engine.register(memory.address(4096) as *mut u8, 8192, Access::LOCAL).unwrap() };
    let prepare = |region: Option<&Region>| {
        engine.prepare_pairs(Operation::Read, &peer, 2, |index| {
            let offset = 4096 * index as u64;
            Ok(DescriptorPair {
                local: LocalSegment { addr: memory.address(4096) + offset, len: 4096 },
                region,
                remote: far.region.segment(offset, 4096),
            })
        })
    };
    let (by_wide, by_narrow) = (prepare(Some(&wide)).unwrap(), prepare(Some(&narrow)).unwrap());
    let (any, strangers) = (prepare(None).unwrap(), Buffer::new(LEN));
    for plan in [&by_wide, &by_narrow, &any] {
        end_of(&plan.transfer()).unwrap();
    }
    engine.deregister(&narrow).unwrap();
    memory.poison(0, LEN);
    end_of(&by_wide.transfer()).unwrap();
    memory.assert_pattern(1, 4096, 8192, 0);
    let error = end_of(&by_narrow.transfer()).unwrap_err();
    assert_eq!(kind(&error), "NotRegistered", "{error}");
    assert_eq!(kind(&prepare(Some(&narrow)).unwrap_err()), "NotRegistered");
    let elsewhere = strangers.register(&engine, Access::LOCAL);
    assert_eq!(kind(&prepare(Some(&elsewhere)).unwrap_err()), "OutOfBounds");
}

#[test]
fn a_plan_may_touch_thousands_of_regions() {
    let engine = Engine::new("near", local_config()).unwrap();
    let far = target!("far", LEN);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let memory = Buffer::new(LEN);
    let whole = memory.register(&engine, Access::LOCAL);
    let regions: Vec<Region> = (0..4096)
        // SAFETY: inside `memory`, which outlives the engine's use of it.
        .map(|i| unsafe {
            engine.register(memory.address(i * 256) as *mut u8, 100, Access::LOCAL).unwrap()
        })
        .collect();
    engine.deregister(&whole).unwrap();
    let local: Vec<_> = regions.iter().map(|region| region.segment(0, 100)).collect();
    let remote: Vec<_> = (0..4096).map(|i| far.region.segment(i * 256, 100)).collect();
    memory.poison(0, LEN);
    let transfer = engine.prepare(Operation::Read, &peer, &local, &remote).unwrap().transfer();
    end_of(&transfer).unwrap();
    for i in 0..4096 {
        memory.assert_pattern(1, i * 256, 100, i as u64 * 256);
        memory.assert_poison(i * 256 + 100, 156);
    }
    engine.deregister(&regions[4095]).unwrap();
    assert_eq!(kind(&end_of(&transfer).unwrap_err()), "NotRegistered");
}
