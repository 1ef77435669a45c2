//! A notification is never seen before the data of the transfer that it is bound to.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use corelane::{Access, Engine, Error, Operation, Plan, Status, TransportKind};
use corelane_tests::{
    BOUND, Buffer, Configuration, Slots, fill_block, outcome, over_each_transport, rounds, target,
    to_hex, watch,
};

over_each_transport!(
    many_small_writes_arrive_before_their_notifications,
    writes_of_many_pages_arrive_before_their_notifications,
    bulk_writes_over_several_streams_arrive_before_their_notifications,
    small_reads_have_arrived_before_the_peer_is_notified,
    bulk_reads_have_arrived_before_the_peer_is_notified,
    a_transfer_that_fails_sends_no_notification,
);

/// Bytes that one rail moves at a time of a transfer that several share.
const STRIPE: usize = 256 << 10;

/// Posts blocks `0..count` through as many transfers as there are plans. `fill` writes a block's source just before; a
/// slot is used again when `released` has named it. `check` runs while there is nothing to do.
fn post_blocks(
    plans: &[Plan],
    count: u64,
    mut fill: impl FnMut(usize, u64),
    mut released: impl FnMut() -> u64,
) {
    let transfers: Vec<_> = plans.iter().map(Plan::transfer).collect();
    let all = u64::MAX >> (64 - plans.len());
    let (mut free, mut next) = (all, 0);
    let mut progress = Instant::now();
    while next < count || free != all {
        let news = released();
        assert_eq!(free & news, 0, "a notification for a slot that is free");
        free |= news;
        if news == 0 && (free == 0 || next == count) {
            assert!(progress.elapsed() < BOUND, "stuck at block {next}: no slot is released");
            std::thread::yield_now();
            continue;
        }
        progress = Instant::now();
        while free != 0 && next < count {
            let slot = free.trailing_zeros() as usize;
            free &= !(1 << slot);
            // The peer may have seen it before this side has.
            if !matches!(transfers[slot].status(), Status::Idle) {
                outcome(&transfers[slot])
                    .unwrap_or_else(|error| panic!("a block before {next}: {error}"));
            }
            fill(slot, next);
            let payload = Slots { number: next, slot: slot as u64 }.to_bytes();
            while let Err(error) = transfers[slot].post_with_notification(&payload) {
                assert!(matches!(error, Error::Backpressure { .. }), "{error}");
                std::thread::yield_now();
            }
            next += 1;
        }
    }
    for transfer in &transfers {
        outcome(transfer).unwrap();
    }
}

/// Writes from this process; the other one looks at each block when its notification comes.
fn writes(config: Configuration, block: usize, slots: usize, count: u64) {
    let mut far = target!("target", block * slots);
    let mut config = config();
    // A block of bulk is several stripes, which rails share.
    config.rdma.stripe_bytes = STRIPE;
    let over_rails = config.transports == [TransportKind::Rdma]
        && std::env::var_os("CORELANE_RDMA_RIG").is_some();
    let engine = Engine::new("initiator", config).unwrap();
    far.process.load(&engine.metadata());
    let near = Buffer::new(block * slots);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let plan = |slot: usize| {
        let offset = (slot * block) as u64;
        let local = [region.segment(offset, block as u64)];
        let remote = [far.region.segment(offset, block as u64)];
        engine.prepare(Operation::Write, &peer, &local, &remote).unwrap()
    };
    let plans: Vec<Plan> = (0..slots).map(plan).collect();
    far.process.send(&format!("watch r {block} {count} initiator"));
    let mut failed = Instant::now();
    post_blocks(
        &plans,
        count,
        |slot, number| fill_block(&near, slot * block, block, number),
        || {
            let mut released = 0;
            let taken = engine.take_notifications(|notification| {
                released |= u64::from_le_bytes(notification.payload.try_into().unwrap());
            });
            if taken.unwrap() > 0 {
                failed = Instant::now();
            } else if failed.elapsed() > BOUND / 2 {
                far.process.answer().expect("the watching process");
                failed = Instant::now();
            }
            released
        },
    );
    far.process.answer().expect("every notification after its data");
    // The rig has two devices: each stripe is a chain of its own, and no notification goes behind one.
    if over_rails && block > STRIPE {
        let chains = count * (block / STRIPE) as u64;
        let doorbells = engine.stats().totals.rdma_doorbells;
        assert!(doorbells >= chains, "{doorbells} doorbells, {chains} stripes");
    }
}

fn many_small_writes_arrive_before_their_notifications(config: Configuration) {
    writes(config, 256, 64, rounds(100_000));
}

fn writes_of_many_pages_arrive_before_their_notifications(config: Configuration) {
    writes(config, 60_000, 16, 3000);
}

fn bulk_writes_over_several_streams_arrive_before_their_notifications(config: Configuration) {
    writes(config, 1 << 20, 8, rounds(500));
}

/// Reads between two engines of this process: the peer's notification comes after the data is in this side's memory.
fn reads(config: Configuration, block: usize, slots: usize, count: u64) {
    let initiator = Engine::new("initiator", config()).unwrap();
    let target = Engine::new("target", config()).unwrap();
    let (source, fetched) = (Buffer::new(block * slots), Buffer::new(block * slots));
    let source_region = source.register(&target, Access::REMOTE_READ);
    let region = fetched.register(&initiator, Access::LOCAL);
    let peer = initiator.load_peer(&target.metadata()).unwrap();
    let plan = |slot: usize| {
        let offset = (slot * block) as u64;
        let local = [region.segment(offset, block as u64)];
        let remote = [source_region.descriptor().segment(offset, block as u64)];
        initiator.prepare(Operation::Read, &peer, &local, &remote).unwrap()
    };
    let plans: Vec<Plan> = (0..slots).map(plan).collect();
    let released = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            watch(&target, &fetched, block, count as usize, |free| {
                released.fetch_or(free, Ordering::SeqCst);
                Ok(())
            })
        });
        post_blocks(
            &plans,
            count,
            |slot, number| {
                fetched.poison(slot * block, block);
                fill_block(&source, slot * block, block, number);
            },
            || {
                let released = released.swap(0, Ordering::SeqCst);
                if released == 0 && watching.is_finished() {
                    std::thread::yield_now();
                }
                released
            },
        );
        watching.join().unwrap().expect("every notification after its data");
    });
}

fn small_reads_have_arrived_before_the_peer_is_notified(config: Configuration) {
    reads(config, 256, 64, 20_000);
}

fn bulk_reads_have_arrived_before_the_peer_is_notified(config: Configuration) {
    reads(config, 1 << 20, 8, rounds(300));
}

fn a_transfer_that_fails_sends_no_notification(config: Configuration) {
    let mut far = target!("target", 4096);
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::new(2 << 20);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let gone = far.process.region("gone", 2 << 20, "read-write");
    let transfers = [1, 2 << 20].map(|len| {
        [Operation::Read, Operation::Write].map(|operation| {
            let local = [region.segment(0, len)];
            let remote = [gone.segment(0, len)];
            engine.prepare(operation, &peer, &local, &remote).unwrap().transfer()
        })
    });
    far.process.ask("deregister gone");
    for transfer in transfers.iter().flatten() {
        transfer.post_with_notification(b"never").unwrap();
        outcome(transfer).unwrap_err();
    }
    peer.notify(b"after").unwrap();
    assert_eq!(far.process.ask("take 1"), format!("initiator:{}", to_hex(b"after")));
    assert_eq!(far.process.number("received"), 1);
}
