//! Notifications that meet the end of their peer or of their engine: each one that was taken counts.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use corelane::{Engine, Error, Peer};
use corelane_tests::{BOUND, Configuration, eventually, kind, over_local_and_tcp, peer_process};

over_local_and_tcp!(
    what_is_taken_while_its_peer_is_unloaded_is_counted_as_dropped,
    what_is_taken_while_its_engine_is_shut_down_is_counted_as_dropped,
);

const THREADS: usize = 3;

/// Threads notify a peer that stands still, until they are told that there is an end: how many notifications were taken.
fn notify_until(config: Configuration, end: fn(&Engine, &Peer), expected: &str) {
    for round in 0..12u64 {
        let mut config = config();
        // Who stands still takes nothing, and is not waited for.
        (config.liveness, config.linger) = (BOUND * 5, Duration::ZERO);
        let engine = Engine::new("near", config).unwrap();
        let mut far = peer_process!();
        let metadata = far.engine("far", "liveness_ms=300000");
        let peer = engine.load_peer(&metadata).unwrap();
        peer.connect(BOUND).unwrap();
        far.freeze();
        let taken = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    loop {
                        match peer.notify(&[7; 24]) {
                            Ok(()) => {
                                taken.fetch_add(1, Ordering::Relaxed);
                            }
                            // Its buffer is full.
                            Err(Error::Backpressure { .. }) => std::thread::yield_now(),
                            Err(error) => return assert_eq!(kind(&error), expected),
                        }
                    }
                });
            }
            eventually("some are taken", || taken.load(Ordering::Relaxed) > 50);
            std::thread::sleep(Duration::from_micros(round * 300));
            end(&engine, &peer);
        });
        let dropped = || engine.stats().totals.notifications_dropped;
        let taken = taken.into_inner();
        eventually("all of them are counted", || dropped() >= taken);
        assert_eq!(dropped(), taken);
        far.thaw();
    }
}

fn what_is_taken_while_its_peer_is_unloaded_is_counted_as_dropped(config: Configuration) {
    let unload = |engine: &Engine, peer: &Peer| {
        engine.unload_peer(peer).unwrap();
    };
    notify_until(config, unload, "Cancelled");
}

fn what_is_taken_while_its_engine_is_shut_down_is_counted_as_dropped(config: Configuration) {
    notify_until(config, |engine, _| engine.shutdown().unwrap(), "Shutdown");
}
