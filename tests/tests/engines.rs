//! Engines beside each other: in one process, on one lane, on one core; and an engine with itself.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use corelane::{
    Access, AssistMode, Engine, EngineConfig, LaneSpec, Operation, Region, Spin, Transfer,
};
use corelane_tests::{
    BOUND, Buffer, Configuration, PeerProcess, Target, allowed_cores, collect, end_of, eventually,
    outcome, over_each_transport, pin_process, target, to_hex,
};

over_each_transport!(
    two_engines_in_one_process_never_see_each_others_notifications,
    an_engine_transfers_with_itself_and_notifies_itself,
    ten_peers_share_one_lane,
    engines_and_processes_that_share_one_core_all_complete,
    lanes_pinned_to_one_core_all_complete,
    lanes_that_never_park_and_take_no_help_complete_on_one_core,
    transfers_complete_beside_threads_that_burn_the_core,
    several_lanes_of_one_engine_share_its_peers_and_its_notifications,
);

struct Side {
    memory: Buffer,
    region: Region,
    engine: Engine,
}

impl Side {
    fn new(name: &str, seed: u64, len: usize, config: EngineConfig) -> Self {
        let engine = Engine::new(name, config).unwrap();
        let memory = Buffer::with_pattern(seed, len);
        let region = memory.register(&engine, Access::READ_WRITE);
        Self { memory, region, engine }
    }

    /// A read of the beginning of another engine's region to `offset` here.
    fn fetch(&self, from: &Side, offset: usize, len: usize) -> Transfer {
        let peer = self.engine.load_peer(&from.engine.metadata()).unwrap();
        let local = [self.region.segment(offset as u64, len as u64)];
        let remote = [from.region.descriptor().segment(0, len as u64)];
        self.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap().transfer()
    }
}

fn two_engines_in_one_process_never_see_each_others_notifications(config: Configuration) {
    let (a, b) = (Side::new("a", 1, 4096, config()), Side::new("b", 2, 4096, config()));
    let mut far = target!("far", 4096);
    for side in [&a, &b] {
        far.process.load(&side.engine.metadata());
    }
    let (to_a, to_b) = (
        b.engine.load_peer(&a.engine.metadata()).unwrap(),
        a.engine.load_peer(&b.engine.metadata()).unwrap(),
    );
    for round in 0..200u64 {
        to_a.notify(&[b"for a".as_slice(), &round.to_le_bytes()].concat()).unwrap();
        to_b.notify(&[b"for b".as_slice(), &round.to_le_bytes()].concat()).unwrap();
        far.process.ask(&format!("notify a {}", to_hex(b"for a")));
        far.process.ask(&format!("notify b {}", to_hex(b"for b")));
    }
    for (side, expected, from) in [(&a, b"for a", "b"), (&b, b"for b", "a")] {
        let (mut near, mut distant) = (0, 0);
        for notification in collect(&side.engine, 400) {
            assert_eq!(&notification.payload[..5], expected);
            match &*notification.from {
                "far" => distant += 1,
                name => {
                    assert_eq!(name, from);
                    assert_eq!(notification.payload[5..], u64::to_le_bytes(near));
                    near += 1;
                }
            }
        }
        assert_eq!((near, distant), (200, 200));
        assert!(side.engine.notifications().unwrap().is_empty());
    }
}

fn an_engine_transfers_with_itself_and_notifies_itself(config: Configuration) {
    const LEN: usize = 3 << 20;
    let side = Side::new("narcissus", 1, 2 * LEN, config());
    for (round, len) in [100, LEN, 4096, LEN].into_iter().enumerate() {
        side.memory.poison(LEN, LEN);
        end_of(&side.fetch(&side, LEN, len)).unwrap();
        side.memory.assert_pattern(1, LEN, len, 0);
        let peer = side.engine.load_peer(&side.engine.metadata()).unwrap();
        side.memory.fill(round as u64 + 5, LEN, len, 0);
        let plan = side.engine.prepare(
            Operation::Write,
            &peer,
            &[side.region.segment(LEN as u64, len as u64)],
            &[side.region.descriptor().segment(0, len as u64)],
        );
        let transfer = plan.unwrap().transfer();
        transfer.post_with_notification(b"echo").unwrap();
        outcome(&transfer).unwrap();
        side.memory.assert_pattern(round as u64 + 5, 0, len, 0);
        let notification = collect(&side.engine, 1).remove(0);
        assert_eq!((&*notification.from, &notification.payload[..]), ("narcissus", &b"echo"[..]));
        side.memory.fill(1, 0, LEN, 0);
    }
    side.engine.shutdown().unwrap();
}

fn ten_peers_share_one_lane(config: Configuration) {
    const LEN: usize = 300_000;
    let hub = Side::new("hub", 100, 10 * LEN, config());
    let descriptor = to_hex(&hub.region.descriptor().to_bytes());
    let mut peers: Vec<Target> = (0..10).map(|i| target!(&format!("peer-{i}"), LEN)).collect();
    for (i, far) in peers.iter_mut().enumerate() {
        far.process.load(&hub.engine.metadata());
        far.process.ask(&format!("fill r {i} 0 {LEN} 0"));
    }
    for round in 0..5 {
        hub.memory.poison(0, 10 * LEN);
        // All read at once, small and bulk ...
        let transfers: Vec<Transfer> = peers
            .iter()
            .enumerate()
            .flat_map(|(i, far)| {
                let peer = hub.engine.load_peer(&far.metadata).unwrap();
                [(0, 1000), (1000, LEN - 1000)].map(|(offset, len)| {
                    let local = [hub.region.segment((i * LEN + offset) as u64, len as u64)];
                    let remote = [far.region.segment(offset as u64, len as u64)];
                    let plan = hub.engine.prepare(Operation::Read, &peer, &local, &remote);
                    plan.unwrap().transfer()
                })
            })
            .collect();
        for transfer in &transfers {
            transfer.post().unwrap();
        }
        for transfer in &transfers {
            outcome(transfer).unwrap();
        }
        for i in 0..10 {
            hub.memory.assert_pattern(i as u64, i * LEN, LEN, 0);
        }
        // ... then all write at once, each to its own part.
        for (i, far) in peers.iter_mut().enumerate() {
            far.process.ask(&format!("fill r {} 0 {LEN} 0", 50 + round));
            let offset = i * LEN;
            far.process.send(&format!("write hub r 0 {descriptor} {offset} {LEN} 0{i}"));
        }
        for far in &mut peers {
            far.process.answer().unwrap();
        }
        let mut senders: Vec<(String, Vec<u8>)> =
            collect(&hub.engine, 10).into_iter().map(|n| (n.from.to_string(), n.payload)).collect();
        senders.sort();
        for (i, sender) in senders.iter().enumerate() {
            assert_eq!(*sender, (format!("peer-{i}"), vec![i as u8]));
            hub.memory.assert_pattern(50 + round, i * LEN, LEN, 0);
        }
        for (i, far) in peers.iter_mut().enumerate() {
            far.process.ask(&format!("fill r {i} 0 {LEN} 0"));
        }
    }
    let stats = hub.engine.stats();
    assert_eq!(stats.lanes.len(), 1);
    assert_eq!(stats.peers.iter().filter(|peer| peer.connected && peer.lane == 0).count(), 10);
}

/// Three engines and two processes on one core: everything with everything. On a busy machine one may not get to answer for seconds.
fn crowd_on_one_core(rounds: usize, config: impl Fn(usize) -> (EngineConfig, String)) {
    const LEN: usize = 400_000;
    let core = allowed_cores()[0];
    pin_process(core);
    let config = |core| {
        let (mut config, words) = config(core);
        (config.connect_timeout, config.liveness) = (BOUND, BOUND);
        let ms = BOUND.as_millis();
        (config, format!("connect_ms={ms} liveness_ms={ms} {words}"))
    };
    let sides: Vec<Side> = (0..3)
        .map(|i| Side::new(&format!("near-{i}"), i as u64, 8 * LEN, config(core).0))
        .collect();
    let mut fars: Vec<Target> =
        (0..2).map(|i| target!(&format!("far-{i}"), LEN, "read-write", &config(core).1)).collect();
    for far in &mut fars {
        for side in &sides {
            far.process.load(&side.engine.metadata());
            let descriptor = to_hex(&side.region.descriptor().to_bytes());
            let id = side.engine.agent_name();
            far.process.region(id, 1000, "local");
            far.process.ask(&format!("hammer-reads {id} {id} {descriptor}"));
        }
    }
    std::thread::scope(|scope| {
        for (i, side) in sides.iter().enumerate() {
            let (sides, fars) = (&sides, &fars);
            scope.spawn(move || {
                let mut transfers = vec![
                    (side.fetch(&sides[(i + 1) % 3], LEN, LEN), (i as u64 + 1) % 3, LEN, LEN),
                    (side.fetch(&sides[(i + 2) % 3], 2 * LEN, 99), (i as u64 + 2) % 3, 2 * LEN, 99),
                ];
                for (far, place, len) in [(0, 3 * LEN, LEN), (1, 4 * LEN, 99)] {
                    let peer = side.engine.load_peer(&fars[far].metadata).unwrap();
                    let local = [side.region.segment(place as u64, len as u64)];
                    let remote = [fars[far].region.segment(0, len as u64)];
                    let plan = side.engine.prepare(Operation::Read, &peer, &local, &remote);
                    transfers.push((plan.unwrap().transfer(), 1, place, len));
                }
                for _ in 0..rounds {
                    for (transfer, _, place, len) in &transfers {
                        side.memory.poison(*place, *len);
                        transfer.post().unwrap();
                    }
                    for (transfer, seed, place, len) in &transfers {
                        outcome(transfer).unwrap();
                        side.memory.assert_pattern(*seed, *place, *len, 0);
                    }
                }
            });
        }
    });
    for far in &mut fars {
        let counts = far.process.ask("stop-hammers");
        assert!(counts.split(' ').all(|count| count != "0"), "a hammer starved: {counts}");
        for i in 0..3 {
            far.process.ask(&format!("check near-{i} {i} 0 1000 0"));
        }
    }
    for side in &sides {
        side.engine.shutdown().unwrap();
    }
}

fn engines_and_processes_that_share_one_core_all_complete(config: Configuration) {
    crowd_on_one_core(30, |_| (config(), String::new()));
}

fn lanes_pinned_to_one_core_all_complete(config: Configuration) {
    crowd_on_one_core(30, |core| {
        let mut config = config();
        config.lanes = LaneSpec::Cores(vec![core]);
        (config, format!("core={core}"))
    });
}

fn lanes_that_never_park_and_take_no_help_complete_on_one_core(config: Configuration) {
    crowd_on_one_core(2, |core| {
        let mut config = config();
        config.lanes = LaneSpec::Cores(vec![core]);
        config.spin = Spin::Forever;
        config.assist = AssistMode::Never;
        (config, format!("core={core} spin=forever assist=never"))
    });
}

fn transfers_complete_beside_threads_that_burn_the_core(config: Configuration) {
    let stop = AtomicBool::new(false);
    pin_process(allowed_cores()[0]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let far = target!("far", 1 << 20);
        let near = Side::new("near", 7, 1 << 20, config());
        let peer = near.engine.load_peer(&far.metadata).unwrap();
        for len in [64, 1 << 20] {
            let local = [near.region.segment(0, len)];
            let remote = [far.region.segment(0, len)];
            let plan = near.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
            let transfer = plan.transfer();
            for _ in 0..20 {
                near.memory.poison(0, len as usize);
                end_of(&transfer).unwrap();
                near.memory.assert_pattern(1, 0, len as usize, 0);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

fn several_lanes_of_one_engine_share_its_peers_and_its_notifications(config: Configuration) {
    let mut config = config();
    config.lanes = LaneSpec::Unpinned { count: 3 };
    let hub = Side::new("hub", 9, 1 << 20, config);
    let mut peers: Vec<Target> = Vec::new();
    let mut lanes = HashSet::new();
    // Which lane a peer has is drawn at random: once in 243 times six have the same.
    while peers.len() < 6 || (lanes.len() == 1 && peers.len() < 30) {
        let mut far = target!(&format!("peer-{}", peers.len()), 1 << 20);
        far.process.load(&hub.engine.metadata());
        let peer = hub.engine.load_peer(&far.metadata).unwrap();
        lanes.insert(peer.lane());
        for len in [10, 1 << 20] {
            hub.memory.poison(0, 1 << 20);
            let local = [hub.region.segment(0, len)];
            let plan =
                hub.engine.prepare(Operation::Read, &peer, &local, &[far.region.segment(0, len)]);
            end_of(&plan.unwrap().transfer()).unwrap();
            hub.memory.assert_pattern(1, 0, len as usize, 0);
        }
        far.process.ask("notify hub 01");
        peers.push(far);
    }
    assert_eq!(collect(&hub.engine, peers.len()).len(), peers.len());
    assert!(lanes.len() > 1, "all peers are on one lane of three");
    eventually("no transfer is left", || {
        hub.engine.stats().peers.iter().all(|peer| peer.in_flight == 0)
    });
    hub.engine.deregister(&hub.region).unwrap();
}

#[test]
fn without_libibverbs_an_engine_goes_without_rdma_and_says_so_where_nothing_else_is_allowed() {
    for (library, reason) in [
        ("/nowhere/libibverbs.so.1", "/nowhere/libibverbs.so.1 not found"),
        ("libc.so.6", "libc.so.6: ibv_get_device_list is missing in it"),
    ] {
        let variable = format!("CORELANE_LIBIBVERBS={library}");
        let binary = env!("CARGO_BIN_EXE_corelane-test-peer");
        let mut process = PeerProcess::start_by(&["env", &variable, binary]).unwrap();
        for (settings, hint) in [
            ("transports=rdma", "add local, tcp or both"),
            ("rdma_devices=mlx5_0:1", "rdma_devices=mlx5_0:1"),
        ] {
            let error = process.try_ask(&format!("engine alone {settings}")).unwrap_err();
            if cfg!(feature = "rdma") {
                assert!(error.contains(reason), "{error}");
            }
            assert!(error.contains(hint), "{error}");
        }
        // What is allowed besides is there.
        process.engine("together", "transports=local,rdma,tcp");
    }
}
