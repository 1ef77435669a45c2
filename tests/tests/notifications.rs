//! What notifications promise: whole, once, in order, bounded.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane::{Access, Engine, Error, MAX_NOTIFICATION_BYTES, Notification, Operation, Status};
use corelane_tests::{
    BOUND, Buffer, Configuration, collect, end_of, eventually, exchange, kind, outcome,
    over_each_transport, pattern, peer_process, target, to_hex,
};

over_each_transport!(
    an_empty_notification_arrives_with_its_senders_name,
    notifications_of_all_sizes_arrive_whole_and_in_order,
    the_largest_notification_can_be_bound_to_a_transfer,
    a_notification_that_is_too_large_is_refused_before_anything_moves,
    notifications_of_each_thread_arrive_in_its_order,
    fifty_thousand_notifications_wait_for_a_receiver_that_does_not_poll,
    a_receiver_that_does_not_poll_stops_its_sender_and_loses_nothing,
    the_bound_on_pending_bytes_stops_the_sender_too,
    a_bound_notification_that_finds_no_room_moves_no_data,
    reads_and_liveness_go_on_while_notifications_are_stopped,
    both_sides_can_notify_at_the_same_time,
    a_disconnect_flushes_the_notifications_before_it,
    a_shutdown_flushes_the_notifications_before_it,
    a_notification_that_was_taken_counts_as_acknowledged_by_the_goodbye,
    a_disconnect_from_a_stopped_receiver_says_how_many_are_dropped,
);

fn engines(config: Configuration, names: [&str; 2]) -> [Engine; 2] {
    names.map(|name| Engine::new(name, config()).unwrap())
}

fn an_empty_notification_arrives_with_its_senders_name(config: Configuration) {
    let mut far = peer_process!();
    let metadata = far.engine("receiver", "");
    let engine = Engine::new("sender", config()).unwrap();
    engine.load_peer(&metadata).unwrap().notify(b"").unwrap();
    assert_eq!(far.ask("take 1"), "sender:");
}

fn notifications_of_all_sizes_arrive_whole_and_in_order(config: Configuration) {
    let [sender, receiver] = engines(config, ["sender", "receiver"]);
    let peer = sender.load_peer(&receiver.metadata()).unwrap();
    let sizes =
        [0, 1, 63, 4096, 65_535, 65_536, 65_537, 262_145, 1 << 20, MAX_NOTIFICATION_BYTES, 3];
    for (seed, &size) in sizes.iter().enumerate() {
        peer.notify(&pattern(seed as u64, 0, size)).unwrap();
    }
    for (seed, notification) in collect(&receiver, sizes.len()).iter().enumerate() {
        let Notification { from, payload, .. } = notification;
        assert_eq!(&**from, "sender");
        assert!(*payload == pattern(seed as u64, 0, sizes[seed]), "{} bytes", sizes[seed]);
    }
}

fn the_largest_notification_can_be_bound_to_a_transfer(config: Configuration) {
    let mut far = target!("target", 4096);
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::with_pattern(2, 4096);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let transfer = engine
        .prepare(
            Operation::Write,
            &peer,
            &[region.segment(0, 4096)],
            &[far.region.segment(0, 4096)],
        )
        .unwrap()
        .transfer();
    let payload = pattern(9, 0, MAX_NOTIFICATION_BYTES);
    transfer.post_with_notification(&payload).unwrap();
    outcome(&transfer).unwrap();
    let taken = far.process.ask("take 1");
    assert!(taken == format!("initiator:{}", to_hex(&payload)));
    far.assert_pattern(2, 0, 4096, 0);
}

fn a_notification_that_is_too_large_is_refused_before_anything_moves(config: Configuration) {
    let mut far = target!("target", 4096);
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::new(4096);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let transfer = engine
        .prepare(Operation::Read, &peer, &[region.segment(0, 4096)], &[far.region.segment(0, 4096)])
        .unwrap()
        .transfer();
    let payload = vec![0; MAX_NOTIFICATION_BYTES + 1];
    for error in [peer.notify(&payload), transfer.post_with_notification(&payload)] {
        let error = error.unwrap_err();
        assert_eq!(kind(&error), "Limit");
        assert!(error.to_string().contains("16777216"), "{error}");
    }
    assert!(matches!(transfer.status(), Status::Idle));
    // Both go on.
    end_of(&transfer).unwrap();
    peer.notify(b"x").unwrap();
    assert_eq!(far.process.ask("take 1"), "initiator:78");
    assert_eq!(far.process.number("received"), 1);
}

fn notifications_of_each_thread_arrive_in_its_order(config: Configuration) {
    const THREADS: u64 = 6;
    const EACH: u64 = 3000;
    let [sender, receiver] = engines(config, ["sender", "receiver"]);
    let peer = sender.load_peer(&receiver.metadata()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let peer = peer.clone();
            scope.spawn(move || {
                for number in 0..EACH {
                    let mut payload = [thread.to_le_bytes(), number.to_le_bytes()].concat();
                    // Some are long enough to be cut into frames.
                    payload.resize(if number % 1000 == 7 { 300_000 } else { 16 }, 0);
                    peer.notify(&payload).unwrap();
                }
            });
        }
        let mut next = [0; THREADS as usize];
        for notification in collect(&receiver, (THREADS * EACH) as usize) {
            let word = |i: usize| {
                u64::from_le_bytes(notification.payload[i * 8..i * 8 + 8].try_into().unwrap())
            };
            let (thread, number) = (word(0) as usize, word(1));
            assert_eq!(number, next[thread], "of thread {thread}");
            next[thread] += 1;
        }
    });
    assert!(receiver.notifications().unwrap().is_empty());
}

fn fifty_thousand_notifications_wait_for_a_receiver_that_does_not_poll(config: Configuration) {
    const COUNT: usize = 50_000;
    let mut far = peer_process!();
    let metadata = far.engine("receiver", "");
    let engine = Engine::new("sender", config()).unwrap();
    let peer = engine.load_peer(&metadata).unwrap();
    for number in 0..COUNT as u64 {
        peer.notify(&number.to_le_bytes()).unwrap();
    }
    eventually("all are at the receiver", || far.number("received") == COUNT as u64);
    far.ask(&format!("take-flood {COUNT}"));
    assert_eq!(far.number("received"), COUNT as u64);
}

fn a_receiver_that_does_not_poll_stops_its_sender_and_loses_nothing(config: Configuration) {
    const COUNT: u64 = 10_000;
    let mut far = peer_process!();
    let metadata = far.engine("receiver", "pending=300");
    let mut config = config();
    config.limits.unacknowledged_notifications = 500;
    let engine = Engine::new("sender", config).unwrap();
    let peer = engine.load_peer(&metadata).unwrap();
    let mut sent = 0u64;
    let mut refusals = 0;
    // Far more than both bounds together; each time the sender is stopped, the receiver takes some.
    while sent < COUNT {
        match peer.notify(&sent.to_le_bytes()) {
            Ok(()) => sent += 1,
            Err(error @ Error::Backpressure { .. }) => {
                assert!(error.to_string().contains("receiver"), "{error}");
                refusals += 1;
                if refusals == 1 {
                    // It stays stopped, and what is under way is bounded.
                    eventually("the receiver is full", || far.number("received") >= 300);
                    assert!(sent <= 300 + 500, "{sent} under way");
                    far.send(&format!("take-flood {COUNT}"));
                }
                std::thread::yield_now();
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(refusals > 0);
    far.answer().expect("all of them, once, in order");
    assert_eq!(far.number("received"), COUNT);
}

fn the_bound_on_pending_bytes_stops_the_sender_too(config: Configuration) {
    let mut far = peer_process!();
    let metadata = far.engine("receiver", "pending_bytes=100000");
    let mut config = config();
    config.limits.unacknowledged_bytes = 200_000;
    let engine = Engine::new("sender", config).unwrap();
    let peer = engine.load_peer(&metadata).unwrap();
    let mut sent = 0;
    let error = loop {
        match peer.notify(&pattern(sent, 0, 10_000)) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent <= 30, "the sender is never stopped");
    };
    assert_eq!(kind(&error), "Backpressure");
    let expected: Vec<String> =
        (0..sent).map(|seed| format!("sender:{}", to_hex(&pattern(seed, 0, 10_000)))).collect();
    assert!(far.ask(&format!("take {sent}")) == expected.join(" "));
    eventually("the sender goes on", || peer.notify(b"on").is_ok());
    assert_eq!(far.ask("take 1"), "sender:6f6e");
}

fn a_bound_notification_that_finds_no_room_moves_no_data(config: Configuration) {
    let mut far = target!("target", 4096, "read-write", "pending=1");
    let mut config = config();
    config.limits.unacknowledged_notifications = 2;
    let engine = Engine::new("initiator", config).unwrap();
    let near = Buffer::with_pattern(2, 4096);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let transfer = engine
        .prepare(
            Operation::Write,
            &peer,
            &[region.segment(0, 4096)],
            &[far.region.segment(0, 4096)],
        )
        .unwrap()
        .transfer();
    let mut sent = 0;
    while peer.notify(b"n").is_ok() {
        sent += 1;
        assert!(sent < 10, "the sender is never stopped");
        if sent == 1 {
            eventually("the first is there", || far.process.number("received") == 1);
        }
    }
    let error = transfer.post_with_notification(b"bound").unwrap_err();
    assert_eq!(kind(&error), "Backpressure");
    far.assert_pattern(1, 0, 4096, 0);
    // Without a notification it runs, and with one again when there is room.
    end_of(&transfer).unwrap();
    far.assert_pattern(2, 0, 4096, 0);
    assert_eq!(far.process.ask(&format!("take {sent}")).split(' ').count(), sent);
    eventually("room for a notification", || transfer.post_with_notification(b"bound").is_ok());
    outcome(&transfer).unwrap();
    assert_eq!(far.process.ask("take 1"), "initiator:626f756e64");
}

fn reads_and_liveness_go_on_while_notifications_are_stopped(config: Configuration) {
    let mut far = target!("target", 4096, "read-write", "pending=4 liveness_ms=2000");
    let mut config = config();
    config.liveness = std::time::Duration::from_secs(2);
    let engine = Engine::new("initiator", config).unwrap();
    let near = Buffer::new(4096);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let transfer = engine
        .prepare(Operation::Read, &peer, &[region.segment(0, 4096)], &[far.region.segment(0, 4096)])
        .unwrap()
        .transfer();
    for number in 0..20u64 {
        peer.notify(&number.to_le_bytes()).unwrap();
    }
    let start = std::time::Instant::now();
    // Longer than a peer may be silent.
    while start.elapsed() < std::time::Duration::from_secs(5) {
        near.poison(0, 4096);
        end_of(&transfer).unwrap();
        near.assert_pattern(1, 0, 4096, 0);
    }
    assert_eq!(engine.stats().totals.liveness_timeouts, 0);
    assert!(far.process.number("received") < 20);
    far.process.ask("take-flood 20");
}

fn both_sides_can_notify_at_the_same_time(config: Configuration) {
    const COUNT: usize = 20_000;
    let mut far = peer_process!();
    let metadata = far.engine("far", "pending=200 unacknowledged=500");
    let mut config = config();
    config.limits.pending_notifications = 200;
    config.limits.unacknowledged_notifications = 500;
    let engine = Engine::new("near", config).unwrap();
    let peer = engine.load_peer(&metadata).unwrap();
    far.load(&engine.metadata());
    far.send(&format!("exchange near {COUNT}"));
    exchange(&engine, &peer, COUNT).expect("all, once, in order");
    far.answer().expect("all, once, in order");
}

fn a_disconnect_flushes_the_notifications_before_it(config: Configuration) {
    let mut far = peer_process!();
    let metadata = far.engine("receiver", "");
    let engine = Engine::new("sender", config()).unwrap();
    let peer = engine.load_peer(&metadata).unwrap();
    for round in 0..20 {
        for number in 0..100u64 {
            peer.notify(&number.to_le_bytes()).unwrap();
        }
        assert_eq!(peer.disconnect().unwrap(), 0, "notifications dropped in round {round}");
        far.ask("take-flood 100");
    }
    assert_eq!(engine.stats().totals.notifications_dropped, 0);
}

fn a_shutdown_flushes_the_notifications_before_it(config: Configuration) {
    let mut far = peer_process!();
    let metadata = far.engine("receiver", &format!("connect_ms={}", BOUND.as_millis()));
    let mut config = config();
    // Who cannot agree on queue pairs in time tries again half a minute later, and a shutdown does not wait for that.
    config.connect_timeout = BOUND;
    for _ in 0..10 {
        let engine = Engine::new("sender", config.clone()).unwrap();
        let peer = engine.load_peer(&metadata).unwrap();
        for number in 0..100u64 {
            peer.notify(&number.to_le_bytes()).unwrap();
        }
        engine.shutdown().unwrap();
        far.ask("take-flood 100");
    }
    assert_eq!(far.number("received"), 1000);
}

fn a_notification_that_was_taken_counts_as_acknowledged_by_the_goodbye(config: Configuration) {
    let [sender, receiver] = engines(config, ["sender", "receiver"]);
    let peer = sender.load_peer(&receiver.metadata()).unwrap();
    let back = receiver.load_peer(&sender.metadata()).unwrap();
    for _ in 0..50 {
        peer.notify(b"last words").unwrap();
        collect(&receiver, 1);
        back.disconnect().unwrap();
        eventually("the sender has heard of it", || !peer.is_connected());
    }
    let stats = sender.stats();
    assert!(stats.peers.iter().all(|peer| peer.unacknowledged == 0));
    assert_eq!(stats.totals.notifications_dropped, 0);
    assert_eq!(receiver.stats().notifications_received, 50);
}

fn a_disconnect_from_a_stopped_receiver_says_how_many_are_dropped(config: Configuration) {
    let mut far = peer_process!();
    let metadata = far.engine("receiver", "pending=10");
    let mut config = config();
    config.linger = std::time::Duration::from_millis(100);
    let engine = Engine::new("sender", config).unwrap();
    let peer = engine.load_peer(&metadata).unwrap();
    for number in 0..100u64 {
        peer.notify(&number.to_le_bytes()).unwrap();
    }
    // On a slow machine even this takes longer than lingering.
    eventually("the receiver has taken ten", || engine.stats().peers[0].unacknowledged <= 90);
    let dropped = peer.disconnect().unwrap();
    assert!((1..=90).contains(&dropped), "{dropped} dropped");
    assert_eq!(engine.stats().totals.notifications_dropped, dropped as u64);
    // What was there stays there, in order, and a new session begins.
    peer.notify(b"again").unwrap();
    let mut taken = Vec::new();
    while taken.last().is_none_or(|last: &String| !last.ends_with(&to_hex(b"again"))) {
        taken.extend(far.ask("take 1").split(' ').map(str::to_owned));
    }
    taken.pop();
    assert!(taken.len() >= 10 && taken.len() + dropped >= 100, "{} taken", taken.len());
    for (number, notification) in taken.iter().enumerate() {
        assert_eq!(*notification, format!("sender:{}", to_hex(&(number as u64).to_le_bytes())));
    }
}
