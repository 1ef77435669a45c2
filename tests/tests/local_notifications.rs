//! Notifications between engines of one host: through the ring, in order when it is full, around it when they are long, and past the
//! end of a session.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::Duration;

use corelane::{Access, EngineConfig, Error, LaneSpec, Operation, Spin};
use corelane_tests::{
    BOUND, Buffer, Near, Slots, Target, collect, end_of, eventually, exchange, exchange_sizes,
    fill_block, local_config, outcome, peer_process, sized_payload, target, to_hex, watch,
};

fn connected(config: EngineConfig, settings: &str) -> (Near, corelane::Peer, Target) {
    let mut far = target!("far", 4096, "read-write", settings);
    let near = Near::new(config, 4096);
    let peer = near.connect_locally(&far.metadata);
    far.process.load(&near.engine.metadata());
    assert_eq!(far.process.ask("transport near"), "local");
    (near, peer, far)
}

/// A lane that sleeps whenever it can.
fn sleepy() -> EngineConfig {
    let mut config = local_config();
    config.spin = Spin::For(Duration::ZERO);
    config
}

#[test]
fn a_hundred_thousand_small_ones_in_both_directions_arrive_once_and_in_order() {
    const COUNT: usize = 100_000;
    let (near, peer, mut far) = connected(local_config(), "");
    far.process.send(&format!("exchange near {COUNT}"));
    exchange(&near.engine, &peer, COUNT).unwrap();
    far.process.answer().unwrap();
    assert_eq!(near.engine.stats().notifications_received, COUNT as u64);
}

#[test]
fn a_hundred_thousand_of_all_lengths_in_both_directions_arrive_once_and_in_order() {
    const COUNT: usize = 100_000;
    for (config, settings) in [(local_config(), ""), (sleepy(), "spin=0")] {
        let (near, peer, mut far) = connected(config, settings);
        far.process.send(&format!("exchange-sizes near {COUNT} 1"));
        exchange_sizes(&near.engine, &peer, COUNT, 1).unwrap();
        far.process.answer().unwrap();
        assert_eq!(near.engine.stats().notifications_received, COUNT as u64);
    }
}

#[test]
fn all_lengths_arrive_in_order_within_one_process_and_with_several_lanes() {
    const COUNT: usize = 30_000;
    let mut config = local_config();
    config.lanes = LaneSpec::Unpinned { count: 2 };
    let near = Near::new(config.clone(), 4096);
    let far = Near::named("far", config, 4096, Access::LOCAL);
    let to_far = near.connect_locally(&far.engine.metadata());
    let to_near = far.connect_locally(&near.engine.metadata());
    std::thread::scope(|scope| {
        let other = scope.spawn(|| exchange_sizes(&far.engine, &to_near, COUNT, 2));
        exchange_sizes(&near.engine, &to_far, COUNT, 2).unwrap();
        other.join().unwrap().unwrap();
    });
}

/// Sends all lengths to a receiver that takes nothing for so long that the ring, then the receiver's queue, then the
/// sender's buffer are full; again and again.
fn overflow(far_settings: &str, freeze: bool) {
    let (near, peer, mut far) = connected(local_config(), far_settings);
    let mut sent = 0;
    for round in 0..6 {
        if freeze {
            far.process.freeze();
        }
        let before = sent;
        // Until it is full, or far beyond what the ring holds.
        while sent < before + 20_000 {
            match peer.notify(&sized_payload(3, sent)) {
                Ok(()) => sent += 1,
                Err(Error::Backpressure { .. }) => break,
                Err(other) => panic!("{other}"),
            }
        }
        assert!(sent - before > 100, "round {round}: {} sent", sent - before);
        if freeze {
            far.process.thaw();
        }
        far.process.ask(&format!("take-sizes {} 3 {before}", sent - before));
    }
    assert_eq!(far.process.number("received"), sent as u64);
    assert_eq!(near.engine.stats().totals.notifications_sent, sent as u64);
    assert_eq!(near.engine.stats().totals.notifications_dropped, 0);
}

#[test]
fn order_holds_when_the_receiver_does_not_collect() {
    overflow("pending=1000", false);
}

#[test]
fn order_holds_when_the_receivers_queue_is_tiny() {
    overflow("pending=7 pending_bytes=100000", false);
}

#[test]
fn order_holds_when_the_receiver_stands_still() {
    overflow("liveness_ms=60000", true);
}

#[test]
fn a_receiver_that_sleeps_is_woken_by_every_single_one() {
    const COUNT: usize = 300;
    // One lane each that sleeps at once, and callers that sleep in the kernel.
    let (near, peer, mut far) = connected(sleepy(), "spin=0");
    for number in 0..COUNT {
        if number % 50 == 0 {
            // Asleep for certain.
            std::thread::sleep(Duration::from_millis(30));
        }
        far.process.send("take 1");
        peer.notify(&[number as u8; 3]).unwrap();
        assert_eq!(far.process.answer().unwrap(), format!("near:{}", to_hex(&[number as u8; 3])));
        far.process.send(&format!("notify near {}", to_hex(&[number as u8; 5])));
        let mut all = Vec::new();
        while all.is_empty() {
            all = near.engine.wait_notifications(BOUND).unwrap();
            assert!(!all.is_empty(), "number {number} wakes nobody");
        }
        assert_eq!(*all[0].payload, [number as u8; 5]);
        far.process.answer().unwrap();
    }
}

/// Writes blocks, each with a notification, into slots that the receiver gives back by notifications of its own; the
/// receiver looks at each block at the moment that it sees the notification.
fn blocks_before_notifications(config: EngineConfig, block: usize, engine_memory: bool) {
    const SLOTS: usize = 8;
    let count = (64 << 20) / block;
    let count = count.clamp(30, 4000);
    let mut far = peer_process!();
    let metadata = far.engine("far", "");
    let kind = if engine_memory { "alloc" } else { "region" };
    let answer = far.ask(&format!("{kind} slots {} write", SLOTS * block));
    let bytes = corelane_tests::from_hex(&answer).unwrap();
    let remote = corelane::RegionDescriptor::from_bytes(&bytes).unwrap();
    let near = Near::new(config, SLOTS * block);
    let peer = near.connect_locally(&metadata);
    far.load(&near.engine.metadata());
    let transfers: Vec<_> = (0..SLOTS)
        .map(|slot| {
            let place = slot * block;
            near.transfer(&peer, Operation::Write, (place, place), &remote, block)
        })
        .collect();
    far.send(&format!("watch slots {block} {count} near"));
    let mut free: u64 = (1 << SLOTS) - 1;
    for number in 0..count as u64 {
        while free == 0 {
            for notification in near.engine.wait_notifications(BOUND).unwrap() {
                free |= u64::from_le_bytes(notification.payload[..].try_into().unwrap());
            }
        }
        let slot = u64::from(free.trailing_zeros());
        free &= !(1 << slot);
        let transfer = &transfers[slot as usize];
        if number >= SLOTS as u64 {
            outcome(transfer).unwrap();
        }
        fill_block(&near.memory, slot as usize * block, block, number);
        transfer.post_with_notification(&Slots { number, slot }.to_bytes()).unwrap();
    }
    far.answer().unwrap();
}

#[test]
fn a_written_block_is_there_when_its_notification_is_seen() {
    let mut by_lanes = local_config();
    by_lanes.inline_bytes = 0;
    let mut two_lanes = local_config();
    two_lanes.lanes = LaneSpec::Unpinned { count: 2 };
    for config in [local_config(), by_lanes, two_lanes, sleepy()] {
        for block in [64, 4096, 24_000, 1 << 20, 5 << 20] {
            blocks_before_notifications(config.clone(), block, false);
            // Written past the caches, and in place: the notification must not overtake that.
            blocks_before_notifications(config.clone(), block, true);
        }
    }
}

#[test]
fn a_block_written_within_the_process_is_there_when_its_notification_is_seen() {
    const SLOTS: usize = 4;
    for block in [64, 4096, 17 << 20] {
        let count = ((256 << 20) / block).clamp(8, 4000);
        let near = Near::new(local_config(), SLOTS * block);
        let far = Near::named("far", local_config(), SLOTS * block, Access::READ_WRITE);
        let peer = near.connect_locally(&far.engine.metadata());
        let back = far.connect_locally(&near.engine.metadata());
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                watch(&far.engine, &far.memory, block, count, |free| {
                    back.notify(&free.to_le_bytes()).map_err(|error| error.to_string())
                })
            });
            let mut free: u64 = (1 << SLOTS) - 1;
            for number in 0..count as u64 {
                while free == 0 {
                    for notification in near.engine.wait_notifications(BOUND).unwrap() {
                        free |= u64::from_le_bytes(notification.payload[..].try_into().unwrap());
                    }
                }
                let slot = u64::from(free.trailing_zeros());
                free &= !(1 << slot);
                let at = slot as usize * block;
                fill_block(&near.memory, at, block, number);
                let remote = far.region.descriptor();
                let write = near.transfer(&peer, Operation::Write, (at, at), remote, block);
                write.post_with_notification(&Slots { number, slot }.to_bytes()).unwrap();
                outcome(&write).unwrap();
            }
            watcher.join().unwrap().unwrap();
        });
    }
}

#[test]
fn the_notification_of_a_read_comes_when_the_data_is_here() {
    let (near, peer, mut far) = connected(local_config(), "");
    let len = 3 << 20;
    let region = far.process.region("big", len, "read");
    let memory = Buffer::new(len);
    let local = memory.register(&near.engine, Access::LOCAL);
    for round in 0..40_usize {
        let size = [8, 4096, 100_000, len][round % 4];
        far.process.ask(&format!("fill big {round} 0 {len} 0"));
        let (to, from) = ([local.segment(0, size as u64)], [region.segment(0, size as u64)]);
        let read = near.engine.prepare(Operation::Read, &peer, &to, &from).unwrap().transfer();
        read.post_with_notification(&[round as u8]).unwrap();
        // The peer overwrites at once what has been fetched.
        assert_eq!(far.process.ask("take 1"), format!("near:{}", to_hex(&[round as u8])));
        far.process.ask(&format!("poison big 0 {len}"));
        outcome(&read).unwrap();
        memory.assert_pattern(round as u64, 0, size, 0);
    }
}

#[test]
fn the_notification_of_a_failed_transfer_is_never_seen() {
    let (near, peer, mut far) = connected(local_config(), "");
    let gone = far.process.region("gone", 4096, "read-write");
    far.process.ask("deregister gone");
    for operation in [Operation::Read, Operation::Write] {
        let transfer = near.transfer(&peer, operation, (0, 0), &gone, 100);
        for _ in 0..100 {
            transfer.post_with_notification(b"never").unwrap();
            outcome(&transfer).unwrap_err();
        }
    }
    peer.notify(b"the only one").unwrap();
    assert_eq!(far.process.ask("take 1"), format!("near:{}", to_hex(b"the only one")));
    assert_eq!(far.process.number("received"), 1);
    eventually("their places are free again", || {
        near.engine.stats().peers.iter().all(|peer| peer.unacknowledged == 0)
    });
}

/// What is sent before a disconnect arrives, all of it, before the other side knows of the end; and the next session
/// begins anew, with no number missing and none twice.
#[test]
fn sessions_that_come_and_go_neither_lose_nor_repeat() {
    let (near, peer, mut far) = connected(local_config(), "");
    let mut sent = 0;
    for round in 0..30 {
        let before = sent;
        for _ in 0..200 + round * 10 {
            peer.notify(&sized_payload(4, sent)).unwrap();
            sent += 1;
        }
        assert_eq!(peer.disconnect().unwrap(), 0, "nothing is dropped");
        far.process.ask(&format!("take-sizes {} 4 {before}", sent - before));
    }
    assert_eq!(far.process.number("received"), sent as u64);
    end_of(&near.transfer(&peer, Operation::Read, (0, 0), &far.region, 4096)).unwrap();
}

/// A receiver that dies takes with it what it has not taken; its successor gets what is sent to it, from the first on.
#[test]
fn a_receiver_that_restarts_begins_with_what_is_sent_to_it() {
    let near = Near::new(local_config(), 4096);
    for round in 0..20 {
        let mut far = target!("far", 4096);
        let peer = near.connect_locally(&far.metadata);
        for number in 0..3000 {
            peer.notify(&sized_payload(round, number)).unwrap();
        }
        far.process.ask(&format!("take-sizes 1500 {round} 0"));
        if round % 2 == 0 {
            far.process.end();
        } else {
            far.process.ask("shutdown");
        }
        drop(far);
        eventually("notifications are refused", || peer.notify(b"?").is_err());
        near.engine.unload_peer(&peer).unwrap();
    }
    assert_eq!(near.engine.stats().pending_notifications, 0);
    assert_eq!(collect(&near.engine, 0).len(), 0);
}
