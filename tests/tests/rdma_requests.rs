//! What is posted to an RDMA device, counted: requests, doorbells, completions. In the rig, or on a machine with a device.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane::{Access, LaneSpec, Operation, Peer, TransportKind};
use corelane_tests::{
    BOUND, Near, Target, end_of, from_hex, outcome, rdma_config, target, to_hex, transport,
};

const LEN: usize = 16 << 20;
const BLOCK: usize = 4096;
const BLOCKS: usize = LEN / BLOCK;

struct Pair {
    near: Near,
    far: Target,
    peer: Peer,
}

/// Requests, doorbells, completions.
type Counts = (u64, u64, u64);

impl Pair {
    fn new(near_len: usize) -> Self {
        let far = target!("far", LEN);
        let mut config = rdma_config();
        // Rails share nothing that is counted here.
        config.rdma.stripe_bytes = 1 << 30;
        let near = Near::named("near", config, near_len, Access::READ_WRITE);
        let peer = near.connect(&far.metadata);
        assert_eq!(transport(&near.engine, "far"), TransportKind::Rdma);
        Self { near, far, peer }
    }

    fn counts(&self) -> Counts {
        let totals = self.near.engine.stats().totals;
        (totals.requests_sent, totals.rdma_doorbells, totals.rdma_completions)
    }

    /// What one transfer of pairs of blocks costs.
    fn cost(&self, operation: Operation, pairs: impl Iterator<Item = (usize, usize)>) -> Counts {
        let (here, there): (Vec<_>, Vec<_>) = pairs
            .map(|(here, there)| {
                let here = self.near.region.segment((here * BLOCK) as u64, BLOCK as u64);
                (here, self.far.region.segment((there * BLOCK) as u64, BLOCK as u64))
            })
            .unzip();
        let transfer = self.near.transfer_of_lists(&self.peer, operation, &here, &there);
        let before = self.counts();
        end_of(&transfer).unwrap();
        let after = self.counts();
        (after.0 - before.0, after.1 - before.1, after.2 - before.2)
    }
}

const BOTH: [Operation; 2] = [Operation::Read, Operation::Write];

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn blocks_without_a_neighbour_take_a_request_each_and_one_doorbell_and_completion_a_chain() {
    let pair = Pair::new(2 * LEN);
    for operation in BOTH {
        // Every other block here, backwards there.
        let (requests, doorbells, completions) =
            pair.cost(operation, (0..BLOCKS).map(|i| (2 * i, BLOCKS - 1 - i)));
        assert_eq!(requests, BLOCKS as u64);
        assert_eq!(completions, doorbells);
        // Chains of 32, shorter where the queue pair had no room for more.
        let least = BLOCKS as u64 / 32;
        assert!((least..2 * least).contains(&doorbells), "{doorbells} doorbells");
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn neighbours_take_as_few_requests_as_the_longest_message_allows() {
    let pair = Pair::new(LEN);
    for operation in BOTH {
        let (requests, doorbells, completions) = pair.cost(operation, (0..BLOCKS).map(|i| (i, i)));
        // Soft-RoCE takes 8 MiB, devices 1 or 2 GiB.
        assert!(requests <= 2, "{requests} requests");
        assert_eq!((doorbells, completions), (1, 1));
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn blocks_that_are_together_there_and_scattered_here_share_requests() {
    let pair = Pair::new(LEN);
    for operation in BOTH {
        let (requests, ..) = pair.cost(operation, (0..64).map(|i| (2 * i, i)));
        // Sixteen pieces to a request, where the device takes so many.
        assert!(requests <= 64 / 8, "{requests} requests for 64 blocks in one range there");
        let (requests, ..) = pair.cost(operation, (0..64).map(|i| (i, 2 * i)));
        assert_eq!(requests, 64, "a request has one range there");
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_bound_notification_goes_with_the_data_in_one_doorbell() {
    let mut pair = Pair::new(LEN);
    let len = 100_000;
    let transfer = pair.near.transfer(&pair.peer, Operation::Write, (0, 0), &pair.far.region, len);
    pair.near.memory.fill(7, 0, len, 0);
    let before = pair.counts();
    transfer.post_with_notification(b"here it is").unwrap();
    outcome(&transfer).unwrap();
    let after = pair.counts();
    // The WRITE, and the SEND behind it.
    assert_eq!((after.0 - before.0, after.1 - before.1, after.2 - before.2), (2, 1, 1));
    assert_eq!(pair.far.process.ask("take 1"), format!("near:{}", to_hex(b"here it is")));
    pair.far.assert_pattern(7, 0, len, 0);
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn many_more_notifications_than_credits_arrive_in_order_beside_bound_ones() {
    let mut pair = Pair::new(LEN);
    pair.far.process.load(&pair.near.engine.metadata());
    let write = pair.near.transfer(&pair.peer, Operation::Write, (0, 0), &pair.far.region, 4096);
    for round in 0..50u8 {
        for number in 0..10u8 {
            pair.peer.notify(&[round, number]).unwrap();
        }
        write.post_with_notification(&[round, 255]).unwrap();
        outcome(&write).unwrap();
        // Too long for a queue pair: over the socket, and in order with the others.
        pair.peer.notify(&[round; 600]).unwrap();
    }
    let taken = pair.far.process.ask(&format!("take {}", 50 * 12));
    let mut free: Vec<(u8, u8)> = Vec::new();
    let mut bound = 0;
    for notification in taken.split_whitespace() {
        let bytes = from_hex(notification.strip_prefix("near:").unwrap()).unwrap();
        match bytes[..] {
            [round, 255] => {
                assert_eq!(usize::from(round), bound);
                bound += 1;
            }
            [round, number] => free.push((round, number)),
            _ => free.push((bytes[0], 10)),
        }
    }
    let expected: Vec<_> = (0..50).flat_map(|round| (0..11).map(move |n| (round, n))).collect();
    assert_eq!(free, expected);
    assert_eq!(bound, 50);
}

/// A WRITE of another peer's is done when the hub's device has it, and the notification behind it waits in the hub's completion queue.
#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn notifications_behind_writes_outlive_the_peer_however_many_wait_before_them() {
    const EACH: usize = 24;
    let settings = "unpinned=1 spin=0 liveness_ms=120000";
    let mut hub = target!("hub", LEN, "read-write", settings);
    let sides: Vec<(String, Near, Peer)> = (0..8)
        .map(|number| {
            let mut config = rdma_config();
            config.liveness = BOUND;
            config.lanes = LaneSpec::Unpinned { count: 1 };
            let name = format!("side-{number}");
            let near = Near::named(&name, config, BLOCK, Access::LOCAL);
            let peer = near.connect(&hub.metadata);
            assert_eq!(transport(&near.engine, "hub"), TransportKind::Rdma);
            (name, near, peer)
        })
        .collect();
    let post = |(_, near, peer): &(String, Near, Peer), number: usize| {
        let write = near.transfer(peer, Operation::Write, (0, 0), &hub.region, 64);
        write.post_with_notification(&[number as u8]).unwrap();
        outcome(&write).unwrap();
    };
    for side in &sides {
        post(side, 0);
    }
    let first = hub.process.ask(&format!("take {}", sides.len()));
    assert_eq!(first.split_whitespace().count(), sides.len());
    hub.process.freeze();
    for side in &sides {
        (1..=EACH).for_each(|number| post(side, number));
    }
    // The last to post is the first to leave: its goodbye is read when the hub goes on.
    sides.last().unwrap().1.engine.shutdown().unwrap();
    hub.process.thaw();
    let taken = hub.process.ask(&format!("take {}", sides.len() * EACH));
    for (name, ..) in &sides {
        let from = format!("{name}:");
        let of_side = taken.split_whitespace().filter_map(|one| one.strip_prefix(&from));
        let numbers: Vec<_> = of_side.map(|one| from_hex(one).unwrap()).collect();
        let expected: Vec<_> = (1..=EACH).map(|number| vec![number as u8]).collect();
        assert_eq!(numbers, expected, "{name}");
    }
}
