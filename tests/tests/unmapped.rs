//! Registered memory that its owner has unmapped or protected: an error for who uses it, and nothing worse.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane::{Access, Engine, Error, Operation, Peer};
use corelane_tests::{
    Buffer, Configuration, end_of, kind, over_each_transport, target, tcp_config,
};

over_each_transport!(
    memory_that_the_initiator_has_unmapped_is_its_own_error,
    memory_that_its_owner_has_unmapped_is_refused_to_peers_and_the_owner_lives,
);

const LEN: usize = 4 << 20;
const SIZES: [u64; 3] = [100, 64 << 10, LEN as u64];

fn run(
    engine: &Engine,
    peer: &Peer,
    operation: Operation,
    local: corelane::LocalSegment,
    remote: corelane::RemoteSegment<'_>,
) -> Result<(), Error> {
    end_of(&engine.prepare(operation, peer, &[local], &[remote])?.transfer())
}

fn memory_that_the_initiator_has_unmapped_is_its_own_error(config: Configuration) {
    if config().transports == [corelane::TransportKind::Rdma] {
        // A device has pinned the pages: they are there until the region is deregistered.
        return;
    }
    let mut far = target!("far", LEN);
    let engine = Engine::new("near", config()).unwrap();
    let peer = engine.load_peer(&far.metadata).unwrap();
    let good = Buffer::new(LEN);
    let good_region = good.register(&engine, Access::LOCAL);
    for len in SIZES {
        for operation in [Operation::Read, Operation::Write] {
            let gone = Buffer::new(LEN);
            let region = gone.register(&engine, Access::LOCAL);
            gone.unmap();
            let (local, remote) = (region.segment(0, len), far.region.segment(0, len));
            let error = run(&engine, &peer, operation, local, remote).unwrap_err();
            assert_eq!(kind(&error), "Fault", "{operation:?} of {len}: {error}");
            assert!(error.to_string().contains("unmapped"), "{error}");
            engine.deregister(&region).unwrap();

            good.poison(0, LEN);
            let local = good_region.segment(0, len);
            run(&engine, &peer, Operation::Read, local, far.region.segment(0, len)).unwrap();
            good.assert_pattern(1, 0, len as usize, 0);
        }
    }
    far.assert_pattern(1, 0, LEN, 0);
}

fn memory_that_its_owner_has_unmapped_is_refused_to_peers_and_the_owner_lives(
    config: Configuration,
) {
    if config().transports == [corelane::TransportKind::Rdma] {
        // A device has pinned the pages: they are there until the region is deregistered.
        return;
    }
    let mut far = target!("far", LEN);
    let engine = Engine::new("near", config()).unwrap();
    let peer = engine.load_peer(&far.metadata).unwrap();
    let near = Buffer::new(LEN);
    let region = near.register(&engine, Access::LOCAL);
    for len in SIZES {
        for operation in [Operation::Read, Operation::Write] {
            let gone = far.process.region("gone", LEN, "read-write");
            far.process.ask("unmap gone");
            let error =
                run(&engine, &peer, operation, region.segment(0, len), gone.segment(0, len))
                    .unwrap_err();
            let typed = matches!(kind(&error), "Permission" | "Fault" | "RemoteDisconnect");
            let told = error.to_string().contains("unmapped");
            assert!(typed && told, "{operation:?} of {len}: {error}");
            far.process.ask("deregister gone");

            near.poison(0, LEN);
            let (local, remote) = (region.segment(0, len), far.region.segment(0, len));
            run(&engine, &peer, Operation::Read, local, remote).unwrap();
            near.assert_pattern(1, 0, len as usize, 0);
        }
    }
    far.assert_pattern(1, 0, LEN, 0);
}

#[test]
fn memory_that_may_not_be_written_fails_writes_and_serves_reads() {
    let engine = Engine::new("near", tcp_config()).unwrap();
    let owner = Engine::new("owner", tcp_config()).unwrap();
    let peer = engine.load_peer(&owner.metadata()).unwrap();
    let (fixed, near) = (Buffer::with_pattern(1, LEN), Buffer::with_pattern(2, LEN));
    let region = fixed.register(&owner, Access::READ_WRITE);
    let local = near.register(&engine, Access::LOCAL);
    fixed.make_read_only();
    for len in SIZES {
        let segments = || (local.segment(0, len), region.descriptor().segment(0, len));
        let (here, there) = segments();
        let error = run(&engine, &peer, Operation::Write, here, there).unwrap_err();
        assert!(matches!(kind(&error), "Permission" | "Fault"), "{error}");
        fixed.assert_pattern(1, 0, LEN, 0);
        let (here, there) = segments();
        run(&engine, &peer, Operation::Read, here, there).unwrap();
        near.assert_pattern(1, 0, len as usize, 0);
        near.fill(2, 0, LEN, 0);
    }
    near.make_read_only();
    let writable = Buffer::new(LEN);
    let remote = writable.register(&owner, Access::READ_WRITE);
    for len in SIZES {
        let segments = || (local.segment(0, len), remote.descriptor().segment(0, len));
        let (here, there) = segments();
        let error = run(&engine, &peer, Operation::Read, here, there).unwrap_err();
        assert_eq!(kind(&error), "Fault", "{error}");
        near.assert_pattern(2, 0, LEN, 0);
        let (here, there) = segments();
        run(&engine, &peer, Operation::Write, here, there).unwrap();
        writable.assert_pattern(2, 0, len as usize, 0);
    }
}

/// Behind a notification the engine receives ahead: bytes of a WRITE that come with it reach memory
/// by another way.
#[test]
fn a_write_right_behind_a_notification_lands_and_unmapped_memory_is_still_an_error() {
    let near = Engine::new("near", tcp_config()).unwrap();
    let far = Engine::new("far", tcp_config()).unwrap();
    let peer = far.load_peer(&near.metadata()).unwrap();
    let source = Buffer::new(LEN);
    source.fill(7, 0, LEN, 0);
    let source_region = source.register(&far, Access::LOCAL);
    for (round, len) in [1, 100, 2000, 3968, 5000, 65_536, 1_000_000].into_iter().enumerate() {
        let landing = Buffer::new(LEN);
        landing.poison(0, LEN);
        let region = landing.register(&near, Access::READ_WRITE);
        let write = |offset: u64| {
            let local =
                [source_region.segment(0, len / 2), source_region.segment(len / 2, len - len / 2)];
            let remote = region.descriptor();
            let remote = [
                remote.segment(offset, len / 2),
                remote.segment(offset + len / 2 + 64, len - len / 2),
            ];
            let plan = far.prepare(Operation::Write, &peer, &local, &remote).unwrap();
            for _ in 0..3 {
                peer.notify(b"ahead").unwrap();
            }
            end_of(&plan.transfer())
        };
        for _ in 0..20 {
            write(4096).unwrap();
        }
        let (half, whole) = ((len / 2) as usize, len as usize);
        landing.assert_poison(0, 4096);
        landing.assert_pattern(7, 4096, half, 0);
        landing.assert_poison(4096 + half, 64);
        landing.assert_pattern(7, 4096 + half + 64, whole - half, half as u64);
        landing.assert_poison(4096 + whole + 64, LEN - 4096 - whole - 64);
        landing.unmap();
        for _ in 0..5 {
            let error = write(4096).unwrap_err();
            assert_eq!(kind(&error), "Permission", "{len} bytes: {error}");
        }
        near.deregister(&region).unwrap();
        let heard = near.notifications().unwrap().len();
        assert!(heard <= 75, "round {round}: {heard} notifications");
    }
}
