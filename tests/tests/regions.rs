//! Registered memory: what is checked before and while it is used, and how it is given back.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::atomic::{AtomicBool, Ordering};

use corelane::{
    Access, Engine, EngineConfig, Error, LocalSegment, Operation, Peer, RegionDescriptor,
};
use corelane_tests::{
    Buffer, Configuration, DescriptorField, Target, device_keys, end_of, eventually,
    forge_descriptor, kind, local_config, needs_the_peer, outcome, over_each_transport, target,
    to_hex,
};

over_each_transport!(
    a_region_without_the_right_cannot_be_accessed,
    forged_descriptors_open_nothing,
    a_plan_with_one_refused_descriptor_among_good_ones_fails_and_leaves_the_connection_usable,
    a_deregistered_region_is_refused_by_its_owner,
    a_plan_cannot_be_posted_after_its_own_region_was_deregistered,
    deregistering_memory_that_own_transfers_use_waits_or_says_busy,
    deregistering_memory_that_a_peer_uses_waits_and_then_refuses_it,
    registering_and_deregistering_goes_on_beside_transfers,
);

const LEN: usize = 4 << 20;
/// A small transfer and a bulk one.
const SIZES: [u64; 2] = [1000, LEN as u64];

struct Pair {
    far: Target,
    near: Buffer,
    region: corelane::Region,
    peer: Peer,
    engine: Engine,
}

impl Pair {
    fn new(access: &str) -> Self {
        Self::with(access, local_config())
    }

    fn with(access: &str, config: EngineConfig) -> Self {
        let far = target!("target", LEN, access, "");
        let engine = Engine::new("initiator", config).unwrap();
        let near = Buffer::new(LEN);
        let region = near.register(&engine, Access::LOCAL);
        let peer = engine.load_peer(&far.metadata).unwrap();
        Self { far, near, region, peer, engine }
    }

    /// One transfer at the beginning of both regions.
    fn run(&self, operation: Operation, remote: &RegionDescriptor, len: u64) -> Result<(), Error> {
        self.run_at(operation, remote, 0, len)
    }

    fn run_at(
        &self,
        operation: Operation,
        remote: &RegionDescriptor,
        offset: u64,
        len: u64,
    ) -> Result<(), Error> {
        let (local, remote) = ([self.region.segment(0, len)], [remote.segment(offset, len)]);
        let plan = self.engine.prepare(operation, &self.peer, &local, &remote)?;
        end_of(&plan.transfer())
    }

    /// The engines still serve: a read and a check of what it read.
    #[track_caller]
    fn assert_served(&self) {
        for len in SIZES {
            self.near.poison(0, LEN);
            self.run(Operation::Read, &self.far.region, len).unwrap();
            self.near.assert_pattern(1, 0, len as usize, 0);
        }
        self.near.poison(0, LEN);
    }
}

#[track_caller]
fn assert_error(result: Result<impl std::fmt::Debug, Error>, variant: &str, words: &[&str]) {
    let error = result.expect_err(variant);
    assert_eq!(kind(&error), variant, "{error}");
    for word in words {
        assert!(error.to_string().contains(word), "`{error}` does not say `{word}`");
    }
}

#[test]
fn memory_that_is_not_registered_is_refused() {
    let pair = Pair::new("read-write");
    let other = Buffer::new(100);
    let prepare = |local: LocalSegment| {
        let remote = [pair.far.region.segment(0, local.len)];
        pair.engine.prepare(Operation::Read, &pair.peer, &[local], &remote)
    };
    let address = format!("{:#x}", other.address(0));
    assert_error(prepare(other.segment(0, 100)), "NotRegistered", &[&address, "register"]);
    // Across the end, before the beginning, around the end of the address space, of another engine.
    let base = pair.near.address(0);
    for local in [
        LocalSegment { addr: base + LEN as u64 - 10, len: 11 },
        LocalSegment { addr: base - 1, len: 10 },
        LocalSegment { addr: u64::MAX - 5, len: 10 },
        LocalSegment { addr: 0, len: 10 },
    ] {
        let error = prepare(local).expect_err("outside of all regions");
        assert!(
            matches!(kind(&error), "NotRegistered" | "OutOfBounds" | "InvalidArgument"),
            "{error}"
        );
    }
    let another = Engine::new("another", local_config()).unwrap();
    let elsewhere = other.register(&another, Access::READ_WRITE);
    assert_error(prepare(elsewhere.segment(0, 100)), "NotRegistered", &[]);
    pair.assert_served();
    other.assert_poison(0, 100);
}

#[test]
fn a_range_past_the_end_of_a_remote_region_is_refused() {
    let mut pair = Pair::new("read-write");
    let len = LEN as u64;
    for (offset, size) in [(0, len + 1), (len, 1), (len - 1, 2), (len + 1, 1), (len << 20, 1)] {
        let local = [pair.region.segment(0, size.min(len))];
        let mut remote = [pair.far.region.segment(offset, size.min(len))];
        if size > len {
            remote = [pair.far.region.segment(1, len)];
        }
        for operation in [Operation::Read, Operation::Write] {
            let plan = pair.engine.prepare(operation, &pair.peer, &local, &remote);
            assert_error(plan, "OutOfBounds", &["remote"]);
        }
    }
    pair.far.assert_pattern(1, 0, LEN, 0);
    pair.assert_served();
}

#[test]
fn lists_that_do_not_match_are_refused() {
    let pair = Pair::new("read-write");
    let (region, far) = (&pair.region, &pair.far.region);
    let prepare = |local: &[LocalSegment], remote: &[corelane::RemoteSegment<'_>]| {
        pair.engine.prepare(Operation::Write, &pair.peer, local, remote)
    };
    let counts = prepare(&[region.segment(0, 8), region.segment(8, 8)], &[far.segment(0, 16)]);
    assert_error(counts, "InvalidArgument", &["2", "1"]);
    assert_error(prepare(&[], &[far.segment(0, 16)]), "InvalidArgument", &[]);
    let lengths = prepare(
        &[region.segment(0, 8), region.segment(8, 9)],
        &[far.segment(0, 8), far.segment(8, 8)],
    );
    assert_error(lengths, "InvalidArgument", &["9", "8"]);
    let indices = [0, 1, 2];
    let local = corelane::LocalBlocks {
        base: pair.near.address(0),
        stride: 8,
        block_bytes: 8,
        indices: &indices,
    };
    let remote = corelane::RemoteBlocks {
        region: far,
        base: far.base(),
        stride: 8,
        block_bytes: 8,
        indices: &indices[..2],
    };
    let blocks =
        |local, remote| pair.engine.prepare_blocks(Operation::Write, &pair.peer, &local, &remote);
    assert_error(blocks(local, remote), "InvalidArgument", &["3", "2"]);
    let wide = corelane::RemoteBlocks { block_bytes: 16, indices: &indices, ..remote };
    assert_error(blocks(local, wide), "InvalidArgument", &["16", "8"]);
    let wrapping = corelane::LocalBlocks { stride: u64::MAX / 2, ..local };
    let whole = corelane::RemoteBlocks { indices: &indices, ..remote };
    assert_error(blocks(wrapping, whole), "InvalidArgument", &[]);
    pair.assert_served();
}

#[test]
fn a_peer_of_another_engine_is_refused() {
    let pair = Pair::new("read-write");
    let another = Engine::new("another", local_config()).unwrap();
    let foreign = another.load_peer(&pair.far.metadata).unwrap();
    let local = [pair.region.segment(0, 8)];
    let plan =
        pair.engine.prepare(Operation::Read, &foreign, &local, &[pair.far.region.segment(0, 8)]);
    assert_error(plan, "InvalidArgument", &["another engine"]);
    pair.assert_served();
}

#[test]
fn what_is_no_memory_cannot_be_registered() {
    let engine = Engine::new("engine", local_config()).unwrap();
    for (base, len) in [(0, 4096), (4096, 0), (u64::MAX - 10, 11), (4096, usize::MAX)] {
        // SAFETY: nothing is transferred.
        let region = unsafe { engine.register(base as *mut u8, len, Access::LOCAL) };
        assert_error(region, "InvalidArgument", &[]);
    }
    assert_eq!(engine.stats().regions, 0);
}

#[test]
fn limits_on_regions_peers_and_descriptors_hold() {
    let mut config = local_config();
    config.limits.regions = 3;
    config.limits.peers = 1;
    config.limits.descriptors = 10;
    let engine = Engine::new("engine", config).unwrap();
    let memory = Buffer::new(4096);
    let regions: Vec<_> = (0..3).map(|_| memory.register(&engine, Access::READ_WRITE)).collect();
    // SAFETY: `memory` outlives the engine's use of it.
    let fourth = unsafe { engine.register(memory.address(0) as *mut u8, 10, Access::LOCAL) };
    assert_error(fourth, "Limit", &["3"]);
    engine.deregister(&regions[2]).unwrap();
    memory.register(&engine, Access::LOCAL);

    let others = ["a", "b"].map(|name| Engine::new(name, local_config()).unwrap());
    let peer = engine.load_peer(&others[0].metadata()).unwrap();
    assert_error(engine.load_peer(&others[1].metadata()), "Limit", &["1"]);

    let far = memory.register(&others[0], Access::READ_WRITE);
    let prepare = |count: usize| {
        let local = vec![regions[0].segment(0, 1); count];
        let remote = vec![far.descriptor().segment(0, 1); count];
        engine.prepare(Operation::Read, &peer, &local, &remote)
    };
    assert_error(prepare(11), "Limit", &["11", "10"]);
    end_of(&prepare(10).unwrap().transfer()).unwrap();
}

fn a_region_without_the_right_cannot_be_accessed(config: Configuration) {
    for (access, refused, allowed) in
        [("read", Operation::Write, Operation::Read), ("write", Operation::Read, Operation::Write)]
    {
        let mut pair = Pair::with(access, config());
        assert_error(pair.run(refused, &pair.far.region, 8), "Permission", &["target"]);
        pair.far.assert_pattern(1, 0, LEN, 0);
        pair.near.assert_poison(0, LEN);
        // The owner checks too: a forged descriptor does not help.
        let forged = forge_descriptor(&pair.far.region, DescriptorField::Access, |_| 3);
        for len in SIZES {
            assert_error(pair.run(refused, &forged, len), "Permission", &["target"]);
        }
        pair.far.assert_pattern(1, 0, LEN, 0);
        pair.near.assert_poison(0, LEN);
        pair.run(allowed, &pair.far.region, LEN as u64).unwrap();
    }
    let pair = Pair::with("local", config());
    for operation in [Operation::Read, Operation::Write] {
        let forged = forge_descriptor(&pair.far.region, DescriptorField::Access, |_| 3);
        assert_error(pair.run(operation, &pair.far.region, 8), "Permission", &[]);
        assert_error(pair.run(operation, &forged, 8), "Permission", &[]);
    }
}

fn forged_descriptors_open_nothing(config: Configuration) {
    // There the device checks accesses, by the keys of its own that the descriptor has besides (docs/security.md).
    let by_device = config().transports == [corelane::TransportKind::Rdma];
    let mut pair = Pair::with("read-write", config());
    let region = pair.far.region.clone();
    let forge = |field, change: &dyn Fn(u64) -> u64| forge_descriptor(&region, field, change);
    let key = |change: u64| {
        let mut forged = region.clone();
        for device in 0..device_keys(&region) {
            let field = DescriptorField::DeviceKey(device);
            forged = forge_descriptor(&forged, field, |key| key ^ change);
        }
        forged
    };
    let keys = if by_device {
        assert!(device_keys(&region) > 0, "no device has the region");
        [1, 1 << 8, 1 << 31, 0x5a5a_5a5a].map(key).to_vec()
    } else {
        let secrets =
            [0, 13, 63].map(|bit| forge(DescriptorField::KeySecret, &|secret| secret ^ (1 << bit)));
        let slots = [1, 2, 65_535, 1 << 24, u64::from(u32::MAX)]
            .map(|slot| forge(DescriptorField::KeySlot, &|old| old ^ slot));
        [secrets.as_slice(), slots.as_slice()].concat()
    };
    for len in SIZES {
        for operation in [Operation::Read, Operation::Write] {
            for key in &keys {
                assert_error(pair.run(operation, key, len), "Permission", &["target"]);
            }
            let longer = forge(DescriptorField::Len, &|len| len * 2);
            assert_error(
                pair.run_at(operation, &longer, LEN as u64 - 10, len),
                "Permission",
                &["target"],
            );
            let lower = forge(DescriptorField::Base, &|base| base - 2 * LEN as u64);
            assert_error(pair.run(operation, &lower, len), "Permission", &["target"]);
            let stranger = forge(DescriptorField::Incarnation, &|word| word ^ 1);
            assert_error(pair.run(operation, &stranger, len), "StaleDescriptor", &["target"]);
        }
    }
    pair.near.assert_poison(0, LEN);
    pair.far.assert_pattern(1, 0, LEN, 0);
    // Over `local` the initiator itself refuses them.
    if needs_the_peer(&config()) {
        assert!(pair.far.process.number("refused") > 0);
    }
    pair.assert_served();
}

fn a_plan_with_one_refused_descriptor_among_good_ones_fails_and_leaves_the_connection_usable(
    config: Configuration,
) {
    let mut pair = Pair::with("read-write", config());
    for (count, len) in [(10, 100), (64, 65_536)] {
        let gone = pair.far.process.region("gone", LEN, "read-write");
        let local: Vec<_> = (0..count).map(|i| pair.region.segment(i * len, len)).collect();
        let remote: Vec<_> = (0..count)
            .map(|i| if i == count - 2 { &gone } else { &pair.far.region }.segment(i * len, len))
            .collect();
        let plans = [Operation::Read, Operation::Write]
            .map(|operation| pair.engine.prepare(operation, &pair.peer, &local, &remote).unwrap());
        pair.near.fill(1, 0, LEN, 0);
        for plan in &plans {
            end_of(&plan.transfer()).unwrap();
        }
        pair.near.fill(1, 0, LEN, 0);
        pair.far.process.ask("deregister gone");
        pair.far.process.ask(&format!("poison gone 0 {LEN}"));
        for plan in &plans {
            assert_error(end_of(&plan.transfer()), "Permission", &["target"]);
        }
        pair.far.process.ask(&format!("check-poison gone 0 {LEN}"));
        pair.assert_served();
    }
}

#[test]
fn every_damaged_descriptor_is_refused() {
    let pair = Pair::new("read-write");
    let bytes = pair.far.region.to_bytes();
    assert_eq!(RegionDescriptor::from_bytes(&bytes).unwrap(), pair.far.region);
    for len in 0..bytes.len() {
        assert_error(RegionDescriptor::from_bytes(&bytes[..len]), "Malformed", &["descriptor"]);
    }
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert_error(RegionDescriptor::from_bytes(&damaged), "Malformed", &["descriptor"]);
    }
    let longer = [&bytes[..], &[0]].concat();
    assert_error(RegionDescriptor::from_bytes(&longer), "Malformed", &["descriptor"]);
}

fn a_deregistered_region_is_refused_by_its_owner(config: Configuration) {
    let mut pair = Pair::with("read-write", config());
    let old = pair.far.region.clone();
    let plans = SIZES.map(|len| {
        [Operation::Read, Operation::Write].map(|operation| {
            let (local, remote) = ([pair.region.segment(0, len)], [old.segment(0, len)]);
            pair.engine.prepare(operation, &pair.peer, &local, &remote).unwrap().transfer()
        })
    });
    pair.near.fill(1, 0, LEN, 0);
    for transfer in plans.iter().flatten() {
        end_of(transfer).unwrap();
    }
    pair.far.process.ask("deregister r");
    // Another region takes its slot, in the same process.
    let new = pair.far.process.region("new", LEN, "read-write");
    pair.near.poison(0, LEN);
    for transfer in plans.iter().flatten() {
        assert_error(end_of(transfer), "Permission", &["target"]);
    }
    pair.near.assert_poison(0, LEN);
    pair.far.assert_pattern(1, 0, LEN, 0);
    pair.far.process.ask(&format!("check-poison new 0 {LEN}"));
    assert!(pair.far.process.try_ask("deregister r").unwrap_err().starts_with("InvalidArgument"));
    pair.far.process.ask(&format!("fill new 1 0 {LEN} 0"));
    pair.far.region = new;
    pair.assert_served();
}

fn a_plan_cannot_be_posted_after_its_own_region_was_deregistered(config: Configuration) {
    let pair = Pair::with("read-write", config());
    let other = Buffer::with_pattern(2, LEN);
    let region = other.register(&pair.engine, Access::LOCAL);
    for len in SIZES {
        let region = other.register(&pair.engine, Access::LOCAL);
        let transfers = [Operation::Read, Operation::Write].map(|operation| {
            let local = [region.segment(0, len)];
            let remote = [pair.far.region.segment(0, len)];
            pair.engine.prepare(operation, &pair.peer, &local, &remote).unwrap().transfer()
        });
        pair.engine.deregister(&region).unwrap();
        for transfer in &transfers {
            let error = end_of(transfer).expect_err("memory that is not registered any more");
            assert!(matches!(kind(&error), "NotRegistered" | "InvalidArgument"), "{error}");
        }
    }
    other.assert_pattern(2, 0, LEN, 0);
    pair.engine.deregister(&region).unwrap();
    assert_error(pair.engine.deregister(&region), "InvalidArgument", &["registered"]);
    pair.assert_served();
}

fn deregistering_memory_that_own_transfers_use_waits_or_says_busy(config: Configuration) {
    let pair = Pair::with("read-write", config());
    for _ in 0..10 {
        let memory = Buffer::new(LEN);
        let region = memory.register(&pair.engine, Access::LOCAL);
        let transfers: Vec<_> = (0..4)
            .map(|_| {
                let local = [region.segment(0, LEN as u64)];
                let remote = [pair.far.region.segment(0, LEN as u64)];
                let plan = pair.engine.prepare(Operation::Read, &pair.peer, &local, &remote);
                plan.unwrap().transfer()
            })
            .collect();
        for transfer in &transfers {
            transfer.post().unwrap();
        }
        loop {
            match pair.engine.deregister(&region) {
                Ok(()) => break,
                Err(error) => assert_error(Err::<(), _>(error), "Busy", &["region"]),
            }
        }
        // Nothing touches it any more, from the moment at which the call returned.
        memory.poison(0, LEN);
        for transfer in &transfers {
            // Done before, or ended by the deregistration.
            if let Err(error) = outcome(transfer) {
                assert!(matches!(kind(&error), "NotRegistered" | "Cancelled"), "{error}");
            }
        }
        pair.run(Operation::Read, &pair.far.region, LEN as u64).unwrap();
        memory.assert_poison(0, LEN);
    }
    pair.assert_served();
}

fn deregistering_memory_that_a_peer_uses_waits_and_then_refuses_it(config: Configuration) {
    for command in ["hammer-reads", "hammer-writes"] {
        for len in SIZES {
            let mut far = target!("far", len as usize);
            let engine = Engine::new("owner", config()).unwrap();
            far.process.load(&engine.metadata());
            let memory = Buffer::new(len as usize);
            let region = memory.register(&engine, Access::READ_WRITE);
            let descriptor = to_hex(&region.descriptor().to_bytes());
            for _ in 0..3 {
                far.process.ask(&format!("{command} owner r {descriptor}"));
            }
            eventually("the peer is at it", || far.process.number("completed") > 50);
            let start = std::time::Instant::now();
            while let Err(error) = engine.deregister(&region) {
                assert_error(Err::<(), _>(error), "Busy", &["region"]);
                assert!(start.elapsed() < corelane_tests::BOUND, "busy for ever");
            }
            memory.poison(0, len as usize);
            eventually("each hammer is refused", || far.process.number("failed") == 3);
            let error = far.process.try_ask("stop-hammers").unwrap_err();
            assert!(error.contains("Permission"), "{error}");
            memory.assert_poison(0, len as usize);
        }
    }
}

fn registering_and_deregistering_goes_on_beside_transfers(config: Configuration) {
    let pair = Pair::with("read-write", config());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let memory = Buffer::new(1 << 16);
                let region = memory.register(&pair.engine, Access::READ_WRITE);
                pair.engine.deregister(&region).unwrap();
            }
        });
        for _ in 0..300 {
            pair.near.poison(0, 5000);
            pair.run(Operation::Read, &pair.far.region, 5000).unwrap();
            pair.near.assert_pattern(1, 0, 5000, 0);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(pair.engine.stats().regions, 1);
}
