//! A network that takes its time: everything arrives, late.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::{Duration, Instant};

use corelane::{Access, Engine, Operation};
use corelane_tests::{
    BOUND, Buffer, Near, Passing, Proxy, collect, end_of, engine_on_a_known_port, tcp_config,
};

const LEN: usize = 8 << 20;
/// Each way.
const DELAY: Duration = Duration::from_millis(250);
const LIVENESS: Duration = Duration::from_secs(3);

fn config() -> corelane::EngineConfig {
    let mut config = tcp_config();
    (config.liveness, config.connect_timeout, config.operation_timeout) = (LIVENESS, BOUND, BOUND);
    config
}

/// An engine that is reached through the proxy only.
fn far_away(proxy: &Proxy) -> Engine {
    let mut config = config();
    config.listen.advertise = vec![proxy.address()];
    let (engine, port) = engine_on_a_known_port("far", config);
    proxy.aim(port);
    engine
}

#[test]
fn on_a_long_way_nothing_is_lost_and_nobody_is_taken_for_dead() {
    let proxy = Proxy::new(Passing::Delayed(DELAY));
    let far = far_away(&proxy);
    let memory = Buffer::with_pattern(1, LEN);
    let region = memory.register(&far, Access::READ_WRITE);
    let near = Near::new(config(), LEN);
    let start = Instant::now();
    let peer = near.connect(&far.metadata());
    assert!(start.elapsed() > 4 * DELAY, "the way is as long as it is meant to be");
    for len in [64, LEN] {
        near.memory.poison(0, LEN);
        let read = near.transfer(&peer, Operation::Read, (0, 0), region.descriptor(), len);
        end_of(&read).unwrap();
        near.memory.assert_pattern(1, 0, len, 0);
        near.memory.assert_poison(len, LEN - len);
    }
    // A bound notification overtakes no byte of its data, and free-standing ones keep their order.
    near.memory.fill(2, 0, LEN, 0);
    let write = near.transfer(&peer, Operation::Write, (0, 0), region.descriptor(), LEN);
    write.post_with_notification(b"written").unwrap();
    assert_eq!(collect(&far, 1)[0].payload, b"written");
    memory.assert_pattern(2, 0, LEN, 0);
    corelane_tests::outcome(&write).unwrap();
    for number in 0..500u32 {
        peer.notify(&number.to_le_bytes()).unwrap();
    }
    let seen: Vec<Vec<u8>> = collect(&far, 500).into_iter().map(|note| note.payload).collect();
    let sent: Vec<Vec<u8>> = (0..500u32).map(|number| number.to_le_bytes().into()).collect();
    assert_eq!(seen, sent);
    // Quiet for longer than the liveness timeout: questions and answers are under way all the time.
    std::thread::sleep(LIVENESS + LIVENESS / 4);
    assert!(peer.is_connected());
    for engine in [&near.engine, &far] {
        assert_eq!(engine.stats().totals.liveness_timeouts, 0);
    }
    near.memory.poison(0, LEN);
    end_of(&near.transfer(&peer, Operation::Read, (0, 0), region.descriptor(), 64)).unwrap();
    near.memory.assert_pattern(2, 0, 64, 0);
}

#[test]
fn a_read_that_is_cancelled_on_a_long_way_is_quiet_though_its_bytes_still_come() {
    let proxy = Proxy::new(Passing::Delayed(DELAY));
    let far = far_away(&proxy);
    let memory = Buffer::with_pattern(1, LEN);
    let region = memory.register(&far, Access::READ_WRITE);
    let near = Near::new(config(), LEN);
    let peer = near.connect(&far.metadata());
    for len in [64, LEN] {
        let read = near.transfer(&peer, Operation::Read, (0, 0), region.descriptor(), len);
        let before = proxy.passed();
        read.post().unwrap();
        // The request is on its way, and then the answer.
        corelane_tests::eventually("the request arrives", || proxy.passed() > before);
        read.cancel();
        let _ = corelane_tests::outcome(&read);
        near.memory.poison(0, LEN);
        std::thread::sleep(3 * DELAY);
        near.memory.assert_poison(0, LEN);
        end_of(&read).unwrap();
        near.memory.assert_pattern(1, 0, len, 0);
    }
}
