//! Peers that die, come back, connect at the same time, or claim a name.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::Barrier;

use corelane::{Access, Engine, Error, Operation, Plan, Transfer};
use corelane_tests::{
    BOUND, Buffer, Configuration, Target, collect, end_of, eventually, from_hex, kind,
    listening_ports, needs_the_peer, outcome, over_each_transport, peer_process, target, to_hex,
};

over_each_transport!(
    every_transfer_to_a_killed_peer_ends_in_an_error_and_others_are_served,
    a_peer_that_is_killed_does_not_disturb_transfers_with_others,
    a_peer_restarted_under_its_name_needs_new_metadata_and_gets_it,
    an_engine_made_again_in_one_process_is_another_incarnation,
    a_target_serves_an_initiator_whose_metadata_it_never_loaded,
    both_sides_may_connect_at_the_same_time,
    a_plan_can_be_posted_after_a_disconnect,
    a_disconnect_ends_the_transfers_in_flight_on_both_sides,
    an_unloaded_peer_is_forgotten,
    who_claims_a_loaded_name_without_its_secret_is_refused,
    two_initiators_with_one_name_are_never_mixed,
    a_peer_that_left_is_reported_to_who_posts_next,
);

const LEN: usize = 8 << 20;

struct Near {
    memory: Buffer,
    region: corelane::Region,
    engine: Engine,
}

impl Near {
    fn new(config: Configuration) -> Self {
        let engine = Engine::new("near", config()).unwrap();
        let memory = Buffer::new(LEN);
        let region = memory.register(&engine, Access::READ_WRITE);
        Self { memory, region, engine }
    }

    fn plan(&self, far: &Target, operation: Operation, len: usize) -> Plan {
        let peer = self.engine.load_peer(&far.metadata).unwrap();
        let local = [self.region.segment(0, len as u64)];
        let remote = [far.region.segment(0, len as u64)];
        self.engine.prepare(operation, &peer, &local, &remote).unwrap()
    }

    #[track_caller]
    fn assert_served_by(&self, far: &Target) {
        for len in [777, LEN] {
            self.memory.poison(0, LEN);
            end_of(&self.plan(far, Operation::Read, len).transfer()).unwrap();
            self.memory.assert_pattern(1, 0, len, 0);
        }
    }
}

fn every_transfer_to_a_killed_peer_ends_in_an_error_and_others_are_served(config: Configuration) {
    let near = Near::new(config);
    let healthy = target!("healthy", LEN);
    near.assert_served_by(&healthy);
    for round in 0..4 {
        let far = target!(&format!("victim-{round}"), LEN);
        let transfers: Vec<Transfer> = (0..40)
            .map(|i| {
                let operation = if i % 2 == 0 { Operation::Read } else { Operation::Write };
                near.plan(&far, operation, if i % 4 < 2 { LEN } else { 100 }).transfer()
            })
            .collect();
        end_of(&transfers[0]).unwrap();
        if round % 2 == 0 {
            // They wait at a process that will never answer again.
            far.process.freeze();
        }
        for transfer in &transfers {
            transfer.post().unwrap();
        }
        far.process.kill();
        let mut failed = 0;
        for transfer in &transfers {
            if let Err(error) = outcome(transfer) {
                assert!(error.is_disconnect(), "{error}");
                assert!(error.to_string().contains(&format!("victim-{round}")), "{error}");
                failed += 1;
            }
        }
        let answers = round % 2 == 1 || !needs_the_peer(&config());
        assert!(failed > 0 || answers, "a frozen process has answered");
        // Later ones as well, once it is really gone.
        far.process.end();
        let error = end_of(&transfers[0]).unwrap_err();
        assert!(error.is_disconnect(), "{error}");
        near.assert_served_by(&healthy);
    }
}

fn a_peer_that_is_killed_does_not_disturb_transfers_with_others(config: Configuration) {
    let near = Near::new(config);
    let healthy = target!("healthy", LEN);
    let transfer = near.plan(&healthy, Operation::Read, LEN).transfer();
    for round in 0..5 {
        let victim = target!(&format!("victim-{round}"), LEN);
        let other = near.plan(&victim, Operation::Write, LEN).transfer();
        end_of(&other).unwrap();
        other.post().unwrap();
        transfer.post().unwrap();
        victim.process.kill();
        outcome(&transfer).unwrap();
        // Done, or the victim's end; but an end.
        let _ = outcome(&other);
    }
    near.assert_served_by(&healthy);
}

fn a_peer_restarted_under_its_name_needs_new_metadata_and_gets_it(config: Configuration) {
    let near = Near::new(config);
    let first = target!("phoenix", LEN);
    let port = listening_ports(first.process.id())[0];
    near.assert_served_by(&first);
    let old = near.engine.load_peer(&first.metadata).unwrap();
    let old_plan = near.plan(&first, Operation::Read, 100).transfer();
    let (old_metadata, old_descriptor) = (first.metadata.clone(), first.region.clone());
    drop(first);
    // The kernel may need a moment to take the dead process's listener away.
    let mut process = peer_process!();
    let command = format!("engine phoenix port={port}");
    let mut metadata = Err(String::new());
    eventually("the port is free", || {
        metadata = process.try_ask(&command);
        metadata.is_ok()
    });
    let region = process.region("r", LEN, "read-write");
    process.ask(&format!("fill r 1 0 {LEN} 0"));
    let metadata = from_hex(&metadata.unwrap()).unwrap();
    let second = Target { process, metadata, region };
    // The old metadata leads to the right address and the wrong incarnation.
    near.memory.poison(0, LEN);
    let error = end_of(&old_plan).unwrap_err();
    assert!(error.is_disconnect(), "{error}");
    let error = old.connect(BOUND).unwrap_err();
    assert!(error.is_disconnect(), "{error}");
    near.memory.assert_poison(0, LEN);
    near.assert_served_by(&second);
    let peer = near.engine.load_peer(&second.metadata).unwrap();
    let plan = near.engine.prepare(
        Operation::Read,
        &peer,
        &[near.region.segment(0, 8)],
        &[old_descriptor.segment(0, 8)],
    );
    assert_eq!(kind(&plan.unwrap_err()), "StaleDescriptor");
    // The old handle stays an error; the new one is what the name means now.
    assert!(end_of(&old_plan).is_err());
    near.assert_served_by(&second);
    assert_ne!(old_metadata, second.metadata);
    assert_eq!(near.engine.peer("phoenix").unwrap().name(), "phoenix");
    near.engine.peer("phoenix").unwrap().connect(BOUND).unwrap();
}

fn an_engine_made_again_in_one_process_is_another_incarnation(config: Configuration) {
    let near = Near::new(config);
    for round in 0..20 {
        let engine = Engine::new("again", config()).unwrap();
        let memory = Buffer::with_pattern(round, 4096);
        let region = memory.register(&engine, Access::REMOTE_READ);
        let peer = near.engine.load_peer(&engine.metadata()).unwrap();
        let remote = [region.descriptor().segment(0, 4096)];
        let plan =
            near.engine.prepare(Operation::Read, &peer, &[near.region.segment(0, 4096)], &remote);
        let transfer = plan.unwrap().transfer();
        end_of(&transfer).unwrap();
        near.memory.assert_pattern(round, 0, 4096, 0);
        engine.shutdown().unwrap();
        assert!(end_of(&transfer).unwrap_err().is_disconnect());
    }
}

fn a_target_serves_an_initiator_whose_metadata_it_never_loaded(config: Configuration) {
    let near = Near::new(config);
    near.memory.fill(4, 0, LEN, 0);
    let mut far = peer_process!();
    far.engine("stranger", "");
    far.region("local", LEN, "local");
    far.load(&near.engine.metadata());
    let descriptor = to_hex(&near.region.descriptor().to_bytes());
    far.ask(&format!("read near local 0 {descriptor} 0 {LEN}"));
    far.ask(&format!("check local 4 0 {LEN} 0"));
    far.ask(&format!("fill local 5 0 {LEN} 0"));
    far.ask(&format!("write near local 0 {descriptor} 0 {LEN} 626f756e64"));
    let bound = collect(&near.engine, 1).remove(0);
    assert_eq!((&*bound.from, &bound.payload[..]), ("stranger", &b"bound"[..]));
    near.memory.assert_pattern(5, 0, LEN, 0);
    far.ask("notify near 66726565");
    let free = collect(&near.engine, 1).remove(0);
    assert_eq!((&*free.from, &free.payload[..]), ("stranger", &b"free"[..]));
    assert!(near.engine.peer("stranger").is_none(), "it was never loaded");
}

fn both_sides_may_connect_at_the_same_time(config: Configuration) {
    let engines = ["left", "right"].map(|name| Engine::new(name, config()).unwrap());
    let buffers = [1, 2].map(|seed| Buffer::with_pattern(seed, 4096));
    let fetched = [0, 1].map(|_| Buffer::new(4096));
    let regions: Vec<_> =
        (0..2).map(|i| buffers[i].register(&engines[i], Access::READ_WRITE)).collect();
    let fetched_regions: Vec<_> =
        (0..2).map(|i| fetched[i].register(&engines[i], Access::LOCAL)).collect();
    let metadata = [engines[0].metadata(), engines[1].metadata()];
    const ROUNDS: u64 = 60;
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        for side in 0..2 {
            let (engine, other) = (&engines[side], 1 - side);
            let (regions, local) = (&regions, &fetched_regions[side]);
            let (fetched, metadata, barrier) = (&fetched[side], &metadata, &barrier);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let peer = engine.load_peer(&metadata[other]).unwrap();
                    barrier.wait();
                    if round % 3 == 0 {
                        peer.connect(BOUND).unwrap();
                    }
                    peer.notify(&round.to_le_bytes()).unwrap();
                    fetched.poison(0, 4096);
                    let remote = [regions[other].descriptor().segment(0, 4096)];
                    let local = [local.segment(0, 4096)];
                    let plan = engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
                    end_of(&plan.transfer()).unwrap();
                    fetched.assert_pattern(other as u64 + 1, 0, 4096, 0);
                    assert_eq!(collect(engine, 1)[0].payload, round.to_le_bytes());
                    // Whoever comes first ends the session for both.
                    barrier.wait();
                    if round % 2 == side as u64 {
                        assert_eq!(peer.disconnect().unwrap(), 0);
                    }
                    eventually("the session is over", || !peer.is_connected());
                    barrier.wait();
                }
            });
        }
    });
}

fn a_plan_can_be_posted_after_a_disconnect(config: Configuration) {
    let near = Near::new(config);
    let mut far = target!("far", LEN);
    far.process.load(&near.engine.metadata());
    let peer = near.engine.load_peer(&far.metadata).unwrap();
    let transfers = [500, LEN].map(|len| near.plan(&far, Operation::Read, len).transfer());
    for round in 0..20 {
        for transfer in &transfers {
            near.memory.poison(0, LEN);
            end_of(transfer).unwrap();
            near.memory.assert_pattern(1, 0, transfer.plan().bytes() as usize, 0);
        }
        assert!(peer.is_connected());
        if round % 2 == 0 {
            assert_eq!(peer.disconnect().unwrap(), 0);
            assert!(!peer.is_connected());
        } else {
            assert_eq!(far.process.ask("disconnect near"), "0");
            eventually("this side has heard of it", || !peer.is_connected());
        }
    }
}

fn a_disconnect_ends_the_transfers_in_flight_on_both_sides(config: Configuration) {
    let near = Near::new(config);
    let mut far = target!("far", LEN);
    far.process.load(&near.engine.metadata());
    let peer = near.engine.load_peer(&far.metadata).unwrap();
    for by_peer in [false, true] {
        let transfers: Vec<_> = (0..30)
            .map(|i| {
                near.plan(&far, Operation::Read, if i % 3 == 0 { 100 } else { LEN }).transfer()
            })
            .collect();
        for transfer in &transfers {
            transfer.post().unwrap();
        }
        let links = near.engine.stats().totals.links_up;
        if by_peer {
            far.process.ask("disconnect near");
        } else {
            peer.disconnect().unwrap();
        }
        let mut failed = 0;
        for transfer in &transfers {
            if let Err(error) = outcome(transfer) {
                assert!(matches!(kind(&error), "Cancelled" | "RemoteDisconnect"), "{error}");
                failed += 1;
            }
        }
        assert!(failed > 0 || by_peer, "nothing was in flight");
        // What its lane takes up before it has heard of that ends with the rest; for what it takes up later, it connects again.
        eventually("it knows that the session is over", || {
            !peer.is_connected() || near.engine.stats().totals.links_up > links
        });
        near.memory.poison(0, LEN);
        near.assert_served_by(&far);
    }
}

fn an_unloaded_peer_is_forgotten(config: Configuration) {
    let near = Near::new(config);
    let far = target!("far", LEN);
    let peer = near.engine.load_peer(&far.metadata).unwrap();
    assert_eq!(near.engine.load_peer(&far.metadata).unwrap().name(), "far");
    assert_eq!(near.engine.stats().peers.len(), 1);
    let transfer = near.plan(&far, Operation::Read, 100).transfer();
    end_of(&transfer).unwrap();
    near.engine.unload_peer(&peer).unwrap();
    assert!(near.engine.peer("far").is_none());
    near.memory.poison(0, LEN);
    end_of(&transfer).unwrap_err();
    near.memory.assert_poison(0, LEN);
    near.assert_served_by(&far);
}

fn who_claims_a_loaded_name_without_its_secret_is_refused(config: Configuration) {
    let near = Near::new(config);
    near.memory.fill(4, 0, LEN, 0);
    let descriptor = to_hex(&near.region.descriptor().to_bytes());
    let [mut alice, mut mallory] = [0, 1].map(|_| peer_process!());
    let metadata = alice.engine("alice", "");
    near.engine.load_peer(&metadata).unwrap();
    mallory.engine("alice", "");
    for process in [&mut alice, &mut mallory] {
        process.load(&near.engine.metadata());
        process.region("local", 4096, "local");
    }
    for _ in 0..3 {
        let error = mallory
            .try_ask(&format!("read near local 0 {descriptor} 0 4096 6d616c6c6f7279"))
            .unwrap_err();
        assert!(error.starts_with("Connect"), "{error}");
        mallory.ask("check-poison local 0 4096");
        alice.ask(&format!("read near local 0 {descriptor} 0 4096 616c696365"));
        alice.ask("check local 4 0 4096 0");
        assert_eq!(collect(&near.engine, 1)[0].payload, b"alice");
    }
    assert!(near.engine.notifications().unwrap().is_empty());
    near.memory.assert_pattern(4, 0, LEN, 0);
}

fn two_initiators_with_one_name_are_never_mixed(config: Configuration) {
    let near = Near::new(config);
    near.memory.fill(4, 0, LEN, 0);
    let descriptor = to_hex(&near.region.descriptor().to_bytes());
    let mut twins = [0, 1].map(|_| {
        let mut twin = peer_process!();
        twin.engine("twin", "");
        twin.load(&near.engine.metadata());
        twin.region("local", 4096, "local");
        twin
    });
    let read = |i: usize| format!("read near local 0 {descriptor} 0 4096 0{i}");
    for _ in 0..3 {
        // Who came first has the name, for as long as it is there.
        twins[0].ask(&read(0));
        twins[0].ask("check local 4 0 4096 0");
        let error = twins[1].try_ask(&read(1)).unwrap_err();
        assert!(error.starts_with("Connect") && error.contains("name"), "{error}");
        twins[1].ask("check-poison local 0 4096");
        assert_eq!(collect(&near.engine, 1)[0].payload, [0]);
    }
    // A process that takes the place of a dead one is served.
    let [first, mut second] = twins;
    drop(first);
    eventually("the second twin is served", || second.try_ask(&read(1)).is_ok());
    second.ask("check local 4 0 4096 0");
    assert_eq!(collect(&near.engine, 1)[0].payload, [1]);
}

fn a_peer_that_left_is_reported_to_who_posts_next(config: Configuration) {
    let near = Near::new(config);
    let mut far = target!("far", LEN);
    let transfer = near.plan(&far, Operation::Read, 100).transfer();
    end_of(&transfer).unwrap();
    far.process.ask("shutdown");
    let error: Error = end_of(&transfer).unwrap_err();
    assert!(error.is_disconnect() && error.to_string().contains("far"), "{error}");
    // Who copies sees in the peer's table that it has left, perhaps before the lane has read its goodbye.
    let peer = near.engine.peer("far").unwrap();
    eventually("it is not connected", || !peer.is_connected());
    eventually("the reason is told", || {
        let stats = near.engine.stats();
        stats.peers.iter().any(|peer| peer.name == "far" && peer.last_error.is_some())
    });
}
