//! One side of a host is killed or stopped at any moment: the other gets errors, and its memory back.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use corelane::{Access, EngineConfig, Error, Operation, Peer, RegionDescriptor, Transfer};
use corelane_tests::{
    BOUND, Buffer, Near, PeerProcess, Random, end_of, eventually, kind, local_config, peer_process,
    skipped, sockets_of, target, to_hex,
};

/// What a transfer to a peer that has been killed may end in, if not well.
#[track_caller]
fn assert_death(error: &Error) {
    // `Backpressure`: nobody acknowledges notifications any more, and that is noticed next.
    let expected = ["RemoteDisconnect", "Connect", "Backpressure"];
    assert!(expected.contains(&kind(error)), "{}: {error}", kind(error));
}

const SIZES: [usize; 7] = [64, 4096, 15_000, 70_000, 600_000, 1_500_000, 5 << 20];
const LEN: usize = 5 << 20;

/// Transfers of every size and direction; in lists, too.
fn transfers(near: &Near, peer: &Peer, remote: &RegionDescriptor) -> Vec<Transfer> {
    let mut all = Vec::new();
    for (index, &size) in SIZES.iter().enumerate() {
        let here = index * LEN;
        all.push(near.transfer(peer, Operation::Read, (here, 0), remote, size));
        all.push(near.transfer(peer, Operation::Write, (here, 0), remote, size));
        let piece = size / 64;
        let local = |i: usize| near.region.segment((here + i * piece) as u64, piece as u64);
        let there = |i: usize| remote.segment(((63 - i) * piece) as u64, piece as u64);
        let local: Vec<_> = (0..64).map(local).collect();
        let remote: Vec<_> = (0..64).map(there).collect();
        for operation in [Operation::Read, Operation::Write] {
            all.push(near.transfer_of_lists(peer, operation, &local, &remote));
        }
    }
    all
}

/// Posts until the peer's death is noticed. Panics if a transfer does not end.
fn post_until_dead(transfers: &[Transfer], seed: u64) {
    let mut random = Random::new(seed);
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < BOUND, "the death of the peer is not noticed");
        let transfer = &transfers[random.below(transfers.len())];
        let posted = match random.below(3) {
            0 => transfer.post_with_notification(&seed.to_le_bytes()),
            _ => transfer.post(),
        };
        let ended = match posted {
            // Not `outcome`: another thread may have posted it again by the time at which it asks.
            Ok(()) => match transfer.wait(BOUND) {
                Err(Error::Timeout { .. }) => panic!("a transfer does not end"),
                ended => ended,
            },
            // Another thread has posted it.
            Err(Error::Busy { .. }) => Ok(()),
            Err(Error::Backpressure { .. }) => {
                std::thread::yield_now();
                Ok(())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            return assert_death(&error);
        }
    }
}

/// One life of a peer. The peer's own notifications are not taken by it: so its queues fill, too.
fn one_death(near: &Near, binary: PeerProcess, round: usize) {
    let mut random = Random::new(round as u64);
    let name = format!("victim{round}");
    let mut process = binary;
    let metadata = process.engine(&name, "");
    let remote = process.region("r", LEN, "read-write");
    let peer = near.connect_locally(&metadata);
    let transfers = transfers(near, &peer, &remote);
    // From before the first byte to amid the largest copies.
    let delay = Duration::from_micros(random.below(3000) as u64);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let transfers = &transfers;
            scope.spawn(move || post_until_dead(transfers, (round * 2 + thread) as u64));
        }
        let start = Instant::now();
        while start.elapsed() < delay {
            std::hint::spin_loop();
        }
        process.kill();
    });
    // Whatever is posted afterwards fails: as soon as the last thread of the peer has ended. A large copy may have failed
    // before, since it goes by the process ID, which is the first thread's.
    for transfer in &transfers {
        let start = Instant::now();
        let error = loop {
            match end_of(transfer) {
                Err(error) => break error,
                Ok(()) => assert!(start.elapsed() < BOUND, "bytes of the dead"),
            }
        };
        assert_death(&error);
    }
    let error = eventually_refused(&peer);
    assert_death(&error);
    drop(transfers);
    near.engine.unload_peer(&peer).unwrap();
}

fn eventually_refused(peer: &Peer) -> Error {
    let mut refused = None;
    eventually("notifications are refused", || {
        refused = peer.notify(b"anybody there?").err();
        refused.is_some()
    });
    refused.unwrap()
}

fn deaths(config: EngineConfig, rounds: usize) {
    const AT_ONCE: usize = 3;
    let next = AtomicUsize::new(0);
    let healthy = target!("healthy", 1 << 20);
    let near = Near::new(config, 2 << 20);
    let healthy_peer = near.connect_locally(&healthy.metadata);
    let check = |thread: usize| {
        let places = (thread * 500_000, 1000);
        end_of(&near.transfer(&healthy_peer, Operation::Read, places, &healthy.region, 500_000))
            .unwrap();
        near.memory.assert_pattern(1, places.0, 500_000, 1000);
        near.memory.poison(places.0, 500_000);
    };
    std::thread::scope(|scope| {
        for thread in 0..AT_ONCE {
            let (next, near, check) = (&next, &near, &check);
            scope.spawn(move || {
                let memory = Buffer::new(SIZES.len() * LEN);
                let region = memory.register(&near.engine, Access::LOCAL);
                let mine = Near { engine: near.engine.clone(), memory, region };
                loop {
                    let round = next.fetch_add(1, Ordering::Relaxed);
                    if round >= rounds {
                        break;
                    }
                    one_death(&mine, peer_process!(), round);
                    if round % 20 == 0 {
                        // Others do not notice.
                        check(thread);
                    }
                }
                mine.engine.deregister(&mine.region).unwrap();
            });
        }
    });
    (0..AT_ONCE).for_each(check);
}

#[test]
fn a_target_killed_at_any_of_a_thousand_moments_gives_errors() {
    deaths(local_config(), 1000);
}

#[test]
fn a_target_killed_while_lanes_write_strictly_gives_errors() {
    let mut config = local_config();
    config.strict_writes = true;
    config.inline_bytes = 0;
    deaths(config, 100);
}

#[test]
fn an_initiator_killed_at_any_of_two_hundred_moments_holds_nothing_back() {
    const LEN: usize = 4 << 20;
    let mut config = local_config();
    // So long would deregistration take, should it have to wait for the dead.
    config.deregister_timeout = BOUND * 3;
    let near = Near::new(config, 4096);
    let healthy = target!("healthy", LEN);
    let healthy_peer = near.connect_locally(&healthy.metadata);
    for round in 0..200 {
        let mut random = Random::new(round);
        let allocated = round % 4 == 3;
        let (memory, region) = if allocated {
            Buffer::of_engine(&near.engine, LEN, Access::READ_WRITE)
        } else {
            let memory = Buffer::new(LEN);
            let region = memory.register(&near.engine, Access::READ_WRITE);
            (memory, region)
        };
        let descriptor = to_hex(&region.descriptor().to_bytes());
        let mut victim = peer_process!();
        // Of other names: that a peer is dead, its name still taken, is not always known yet.
        victim
            .engine(&format!("victim{round}"), if round % 3 == 0 { "inline_bytes=0" } else { "" });
        victim.load(&near.engine.metadata());
        victim.ask("connect near");
        for (name, len) in [("small", 3000), ("medium", 100_000), ("large", LEN)] {
            victim.region(name, len, "local");
            victim.ask(&format!("hammer-reads near {name} {descriptor}"));
            victim.ask(&format!("hammer-writes near {name} {descriptor}"));
        }
        std::thread::sleep(Duration::from_micros(random.below(3000) as u64));
        if round % 2 == 0 {
            victim.kill();
        } else {
            // Its memory is gone, and it is no child of anybody any more.
            drop(victim);
        }
        let start = Instant::now();
        near.engine.deregister(&region).unwrap();
        assert!(start.elapsed() < BOUND, "waiting for the dead");
        if allocated {
            // Given back already.
            drop(memory);
        } else {
            memory.poison(0, LEN);
            end_of(&near.transfer(&healthy_peer, Operation::Read, (0, 0), &healthy.region, 4096))
                .unwrap();
            near.memory.assert_pattern(1, 0, 4096, 0);
            memory.assert_poison(0, LEN);
        }
    }
    assert_eq!(near.engine.stats().regions, 1);
}

/// Rings can wait for futexes from Linux 6.7 on.
fn rings_wait_for_words() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 7) {
        let what = format!("idle peers are not watched on Linux {}", release.trim());
        skipped(&what, &std::io::Error::from_raw_os_error(libc::ENOSYS));
    }
    version >= (6, 7)
}

/// Neither a closed socket nor silence says that these peers are dead.
fn unconcerned() -> EngineConfig {
    let mut config = local_config();
    config.liveness = BOUND * 4;
    config.operation_timeout = BOUND * 4;
    config
}

#[test]
fn the_death_of_idle_peers_is_noticed_though_their_sockets_stay_open() {
    if !rings_wait_for_words() {
        return;
    }
    let mut victim = peer_process!();
    let metadata = victim.engine("victim", "liveness_ms=60000");
    let remote = victim.region("r", LEN, "read-write");
    // Several watch the same process; with 40 of them, some watch the same word of it.
    let near: Vec<_> = (0..40)
        .map(|index| Near::named(&format!("near{index}"), unconcerned(), 4096, Access::READ_WRITE))
        .collect();
    let peers: Vec<_> = near.iter().map(|near| near.connect_locally(&metadata)).collect();
    for (near, peer) in near.iter().zip(&peers) {
        end_of(&near.transfer(peer, Operation::Read, (0, 0), &remote, 4096)).unwrap();
    }
    let sockets = sockets_of(victim.id());
    assert!(sockets.len() > peers.len());
    victim.kill();
    eventually("all of them notice", || peers.iter().all(|peer| !peer.is_connected()));
    drop(sockets);
}

#[test]
fn transfers_to_a_peer_that_dies_end_though_its_sockets_stay_open() {
    let near = Near::new(unconcerned(), SIZES.len() * LEN);
    for round in 0..10 {
        let mut victim = peer_process!();
        let metadata = victim.engine(&format!("victim{round}"), "liveness_ms=60000");
        let remote = victim.region("r", LEN, "read-write");
        let peer = near.connect_locally(&metadata);
        let transfers = transfers(&near, &peer, &remote);
        let sockets = sockets_of(victim.id());
        std::thread::scope(|scope| {
            scope.spawn(|| post_until_dead(&transfers, round));
            std::thread::sleep(Duration::from_micros(round * 300));
            victim.kill();
        });
        eventually("the session is over", || !peer.is_connected());
        for transfer in &transfers {
            assert_death(&end_of(transfer).unwrap_err());
        }
        drop((sockets, transfers));
        near.engine.unload_peer(&peer).unwrap();
    }
}

/// The word of its life says that it has ended only if it has: an engine that is shut down says goodbye.
#[test]
fn an_engine_that_is_shut_down_has_said_goodbye_and_its_process_lives_on() {
    let near = Near::new(unconcerned(), 4096);
    let mut other = peer_process!();
    for round in 0..5 {
        let metadata = other.engine(&format!("other{round}"), "");
        let peer = near.connect_locally(&metadata);
        other.ask("shutdown");
        eventually("the session is over", || !peer.is_connected());
        let error = peer.connect(BOUND).unwrap_err();
        assert!(!error.to_string().contains("process has ended"), "{error}");
        near.engine.unload_peer(&peer).unwrap();
    }
}

/// The kernel closes a dead process's sockets once it has taken its memory away, 60 ms for each GiB: until then they would
/// take a connection, and answer nothing.
#[test]
fn nobody_connects_again_to_a_process_that_is_known_to_have_ended() {
    let near = Near::new(local_config(), LEN);
    for round in 0..10 {
        let mut victim = peer_process!();
        let metadata = victim.engine(&format!("victim{round}"), "");
        let remote = victim.region("r", LEN, "read-write");
        let peer = near.connect_locally(&metadata);
        let transfer = near.transfer(&peer, Operation::Read, (0, 0), &remote, 4096);
        end_of(&transfer).unwrap();
        victim.kill();
        let start = Instant::now();
        while end_of(&transfer).is_ok() {
            assert!(start.elapsed() < BOUND, "bytes of the dead");
        }
        eventually("the session is over", || !peer.is_connected());
        let error = end_of(&transfer).unwrap_err();
        assert_eq!(kind(&error), "Connect", "{error}");
        assert!(error.to_string().contains("its process has ended"), "{error}");
        near.engine.unload_peer(&peer).unwrap();
    }
}

#[test]
fn a_stopped_initiator_makes_deregistration_busy_until_it_runs_again() {
    const LEN: usize = 64 << 20;
    let mut config = local_config();
    config.deregister_timeout = Duration::from_millis(50);
    config.liveness = BOUND;
    let near = Near::named("near", config, LEN, Access::READ_WRITE);
    let mut copier = peer_process!();
    copier.engine("copier", "liveness_ms=60000");
    copier.load(&near.engine.metadata());
    copier.region("r", LEN, "local");
    let (mut busy, mut free) = (0, 0);
    // Most of its time it copies: when it is stopped, it mostly is amid a copy.
    for _ in 0..100 {
        let region = near.memory.register(&near.engine, Access::READ_WRITE);
        let other = near.memory.register(&near.engine, Access::READ_WRITE);
        let descriptor = to_hex(&region.descriptor().to_bytes());
        let before = copier.number("completed");
        copier.ask(&format!("hammer-writes near r {descriptor}"));
        eventually("it copies", || copier.number("completed") > before);
        copier.freeze();
        let first = near.engine.deregister(&region);
        near.engine.deregister(&other).expect("nobody copies from or to it");
        match &first {
            Ok(()) => free += 1,
            Err(Error::Busy { .. }) => {
                busy += 1;
                // The region is as good as before: it can be used, and be asked back again.
                let again = near.engine.deregister(&region).unwrap_err();
                assert_eq!(kind(&again), "Busy", "{again}");
            }
            Err(other) => panic!("{other}"),
        }
        copier.thaw();
        if first.is_err() {
            eventually("it is given back", || near.engine.deregister(&region).is_ok());
        }
        near.memory.poison(0, LEN);
        // It may be stopped before it has tried once more.
        if let Err(error) = copier.try_ask("stop-hammers") {
            assert!(error.contains("Permission"), "{error}");
        }
        near.memory.assert_poison(0, LEN);
        if busy >= 3 && free + busy >= 5 {
            return;
        }
    }
    panic!("never stopped amid a copy: busy {busy} times, free {free} times");
}
