//! Engines of one host that are shut down amid copies, and processes that fork.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use corelane::{Access, EngineConfig, LaneSpec, Operation, TransportKind};
use corelane_tests::{
    BOUND, Buffer, Near, Random, collect, end_of, in_forked_child, kind, local_config, outcome,
    peer_process, to_hex, transport,
};

const LEN: usize = 24 << 20;
const SIZES: [usize; 5] = [64, 30_000, 1 << 20, 3 << 20, LEN];

/// Two engines in this process; `victim` says which of them is shut down while the other's memory is copied from and to.
fn shut_down_amid_copies(config: &EngineConfig, initiator_goes: bool, rounds: u64) {
    for round in 0..rounds {
        let near = Near::new(config.clone(), LEN);
        let far = Near::named("far", local_config(), LEN, Access::READ_WRITE);
        let peer = near.connect_locally(&far.engine.metadata());
        let remote = far.region.descriptor().clone();
        let down = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (near, peer, remote, down) = (&near, &peer, &remote, &down);
                scope.spawn(move || {
                    let mut random = Random::new(round * 10 + thread);
                    loop {
                        let operation = [Operation::Read, Operation::Write][random.below(2)];
                        let len = SIZES[random.below(SIZES.len())];
                        let (local, far) =
                            ([near.region.segment(0, len as u64)], [remote.segment(0, len as u64)]);
                        let was_down = down.load(Ordering::SeqCst);
                        let ended = near
                            .engine
                            .prepare(operation, peer, &local, &far)
                            .and_then(|plan| end_of(&plan.transfer()));
                        if let Err(error) = ended {
                            let expected = ["RemoteDisconnect", "Connect", "Shutdown", "Cancelled"];
                            assert!(expected.contains(&kind(&error)), "{error}");
                            break;
                        }
                        assert!(!was_down, "a copy after the end");
                    }
                });
            }
            let goes = if initiator_goes { &near } else { &far };
            std::thread::sleep(Duration::from_micros(Random::new(round).below(4000) as u64));
            goes.engine.shutdown().unwrap();
            // From now on it is this test's alone: whoever still copies sees a fault, or changes it.
            goes.memory.unmap();
            down.store(true, Ordering::SeqCst);
        });
    }
}

fn with_two_lanes() -> EngineConfig {
    let mut config = local_config();
    config.lanes = LaneSpec::Unpinned { count: 2 };
    config
}

#[test]
fn a_target_in_the_same_process_can_be_shut_down_amid_copies() {
    shut_down_amid_copies(&local_config(), false, 50);
}

#[test]
fn an_initiator_in_the_same_process_can_be_shut_down_amid_copies() {
    shut_down_amid_copies(&local_config(), true, 50);
}

#[test]
fn engines_of_several_lanes_can_be_shut_down_amid_copies() {
    shut_down_amid_copies(&with_two_lanes(), false, 25);
    shut_down_amid_copies(&with_two_lanes(), true, 25);
}

#[test]
fn an_engine_can_be_shut_down_amid_copies_within_itself() {
    for round in 0..50 {
        let near = Near::named("near", local_config(), LEN, Access::READ_WRITE);
        let peer = near.connect_locally(&near.engine.metadata());
        let half = LEN / 2;
        std::thread::scope(|scope| {
            for operation in [Operation::Read, Operation::Write] {
                let remote = near.region.descriptor();
                let transfer = near.transfer(&peer, operation, (0, half), remote, half);
                scope.spawn(move || while end_of(&transfer).is_ok() {});
            }
            std::thread::sleep(Duration::from_micros(Random::new(round).below(4000) as u64));
            near.engine.shutdown().unwrap();
            near.memory.unmap();
        });
    }
}

#[test]
fn a_target_in_another_process_can_be_shut_down_amid_copies() {
    for round in 0..50 {
        let near = Near::new(local_config(), LEN);
        let mut far = corelane_tests::target!("far", LEN);
        let peer = near.connect_locally(&far.metadata);
        std::thread::scope(|scope| {
            for (operation, len) in
                [(Operation::Read, LEN), (Operation::Write, LEN), (Operation::Write, 30_000)]
            {
                let transfer = near.transfer(&peer, operation, (0, 0), &far.region, len);
                scope.spawn(move || {
                    let error = loop {
                        if let Err(error) = end_of(&transfer) {
                            break error;
                        }
                    };
                    let expected = ["RemoteDisconnect", "Connect"];
                    assert!(expected.contains(&kind(&error)), "{error}");
                });
            }
            std::thread::sleep(Duration::from_micros(Random::new(round).below(4000) as u64));
            far.process.ask("shutdown");
            far.process.ask("unmap r");
        });
    }
}

/// A child has copies of all that its parent knows, also of which engines are its own.
#[test]
fn a_forked_childs_engine_reads_the_parents_memory_and_not_its_own_copy() {
    const LEN: usize = 3 << 20;
    let parent = Near::named("parent", local_config(), LEN, Access::READ_WRITE);
    parent.memory.fill(1, 0, LEN, 0);
    let descriptor = parent.region.descriptor().clone();
    let metadata = parent.engine.metadata();
    // So that the child inherits an engine that knows itself as a peer in the same process.
    parent.connect_locally(&metadata);
    let (change, changed) = std::io::pipe().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The fork is over when the child says so: what changes now changes in the parent only.
            collect(&parent.engine, 1);
            parent.memory.fill(2, 0, LEN, 0);
            (&changed).write_all(b"!").unwrap();
        });
        let code = in_forked_child(|| {
            let child = Near::new(local_config(), LEN);
            let Ok(peer) = child.engine.load_peer(&metadata) else { return 1 };
            if peer.connect(BOUND).is_err() {
                return 2;
            }
            if transport(&child.engine, "parent") != TransportKind::Local {
                return 3;
            }
            peer.notify(b"begun").unwrap();
            (&change).read_exact(&mut [0]).unwrap();
            for len in [64, 4096, 100_000, LEN] {
                let read = child.transfer(&peer, Operation::Read, (0, 0), &descriptor, len);
                if end_of(&read).is_err() {
                    return 4;
                }
                if child.memory.check(2, 0, len, 0).is_err() {
                    return 5;
                }
            }
            child.memory.fill(3, 0, LEN, 0);
            let write = child.transfer(&peer, Operation::Write, (0, 0), &descriptor, LEN);
            if end_of(&write).is_err() {
                return 6;
            }
            // Its own copy of the parent's memory is as it was.
            if parent.memory.check(1, 0, LEN, 0).is_err() {
                return 7;
            }
            i32::from(child.engine.shutdown().is_err()) * 8
        });
        let answers = "1 load, 2 connect, 3 transport, 4 read, 5 bytes, 6 write, 7 its own memory";
        assert_eq!(code, 0, "{answers}");
    });
    parent.memory.assert_pattern(3, 0, LEN, 0);
}

#[test]
fn a_forked_child_can_drop_all_that_it_inherits() {
    let mut far = corelane_tests::target!("far", 1 << 20);
    let mut near = Some(Near::named("near", local_config(), 1 << 20, Access::READ_WRITE));
    let engine_memory = {
        let near = near.as_ref().unwrap();
        near.connect_locally(&far.metadata);
        far.process.load(&near.engine.metadata());
        far.process.ask("connect near");
        Buffer::of_engine(&near.engine, 1 << 20, Access::READ_WRITE)
    };
    let mut engine_memory = Some(engine_memory);
    let code = in_forked_child(|| {
        // The last handles, here.
        drop(engine_memory.take());
        drop(near.take());
        0
    });
    assert_eq!(code, 0);
    let near = near.unwrap();
    let descriptor = to_hex(&near.region.descriptor().to_bytes());
    near.memory.fill(5, 0, 1 << 20, 0);
    far.process.ask(&format!("read near r 0 {descriptor} 0 {}", 1 << 20));
    far.assert_pattern(5, 0, 1 << 20, 0);
    let (memory, region) = engine_memory.unwrap();
    memory.fill(6, 0, 1 << 20, 0);
    let descriptor = to_hex(&region.descriptor().to_bytes());
    far.process.ask(&format!("read near r 0 {descriptor} 0 {}", 1 << 20));
    far.assert_pattern(6, 0, 1 << 20, 0);
    assert_eq!(near.engine.stats().totals.links_down, 0);
}

#[test]
fn engines_that_come_and_go_under_one_name_are_told_apart() {
    let near = Near::new(local_config(), 1 << 20);
    let mut process = peer_process!();
    for round in 0..20 {
        let metadata = process.engine("far", "");
        let region = process.region("r", 1 << 20, "read-write");
        process.ask(&format!("fill r {round} 0 {} 0", 1 << 20));
        let peer = near.connect_locally(&metadata);
        let transfer = near.transfer(&peer, Operation::Read, (0, 0), &region, 1 << 20);
        end_of(&transfer).unwrap();
        near.memory.assert_pattern(round, 0, 1 << 20, 0);
        if round % 2 == 0 {
            process.ask("shutdown");
        } else {
            process = peer_process!();
        }
        let error = loop {
            transfer.post().unwrap();
            if let Err(error) = outcome(&transfer) {
                break error;
            }
        };
        assert!(error.is_disconnect(), "{error}");
        near.engine.unload_peer(&peer).unwrap();
    }
}
