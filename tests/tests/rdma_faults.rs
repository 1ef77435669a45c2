//! RDMA goes wrong: peers are killed, packets lost, links and devices taken away. In the rig, whose devices nobody else uses.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use corelane::{
    Access, Engine, EngineConfig, LaneSpec, Operation, Peer, Spin, Transfer, TransportKind,
};
use corelane_tests::{
    BOUND, Buffer, Near, Random, Target, collect, end_of, eventually, kind, outcome, rdma_config,
    target, transport,
};

const LEN: usize = 4 << 20;
/// 134 ms, and six more tries: what is lost is sent again soon, and an emulated core that stands still is no lost link.
const TIMEOUT: u8 = 15;

/// The devices, for one test at a time. As they were, when it is dropped.
struct Rig {
    _alone: MutexGuard<'static, ()>,
    repairs: Vec<&'static str>,
}

/// Panics outside of the rig, where faults must not be provoked: `tests/rdma/suite.sh` leaves this program out there.
fn rig() -> Rig {
    static ALONE: Mutex<()> = Mutex::new(());
    let in_rig = std::env::var_os("CORELANE_RDMA_RIG").is_some();
    assert!(in_rig, "devices are broken in the rig only: tests/rdma/rig.sh exec");
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // A link that was down has its addresses back a moment after it is up.
    eventually("both devices are there", || ["rxe0", "rxe1"].iter().all(|device| is_ready(device)));
    Rig { _alone: alone, repairs: Vec::new() }
}

fn is_ready(device: &str) -> bool {
    let read = |file| {
        let path = format!("/sys/class/infiniband/{device}/ports/1/{file}");
        std::fs::read_to_string(path).unwrap_or_default()
    };
    read("state").contains("ACTIVE") && read("gids/1").contains("ffff")
}

fn run(command: &str) -> (bool, String) {
    let words: Vec<&str> = command.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    let told = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&told).into_owned())
}

impl Rig {
    /// Runs a command that breaks something, and another at the end that repairs it.
    fn break_by(&mut self, command: &str, repair: &'static str) {
        let (done, told) = run(command);
        assert!(done, "{command}: {told}");
        self.repairs.push(repair);
    }

    fn repair(&mut self) {
        for repair in self.repairs.drain(..).rev() {
            let (done, told) = run(repair);
            assert!(done, "{repair}: {told}");
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for repair in self.repairs.drain(..).rev() {
            run(repair);
        }
    }
}

fn over(devices: &str, transports: &[TransportKind]) -> EngineConfig {
    let mut config = rdma_config();
    config.transports = transports.to_vec();
    config.rdma.devices = devices.split(',').map(str::to_owned).collect();
    config.rdma.stripe_bytes = 64 << 10;
    config.rdma.timeout = TIMEOUT;
    config
}

struct Pair {
    near: Near,
    far: Target,
    peer: Peer,
}

impl Pair {
    fn new(config: EngineConfig, far_devices: &str) -> Self {
        let settings =
            format!("rdma_devices={far_devices} rdma_timeout={TIMEOUT} liveness_ms=20000");
        let far = target!("far", LEN, "read-write", &settings);
        let near = Near::named("near", config, LEN, Access::READ_WRITE);
        let peer = near.connect(&far.metadata);
        assert_eq!(transport(&near.engine, "far"), TransportKind::Rdma);
        Self { near, far, peer }
    }

    fn transfer(&self, operation: Operation, len: usize) -> Transfer {
        self.near.transfer(&self.peer, operation, (0, 0), &self.far.region, len)
    }

    /// Writes, reads back, and checks every byte.
    fn works(&mut self, len: usize, seed: u64) {
        self.near.memory.fill(seed, 0, len, 0);
        end_of(&self.transfer(Operation::Write, len)).unwrap();
        self.far.assert_pattern(seed, 0, len, 0);
        self.near.memory.poison(0, len);
        end_of(&self.transfer(Operation::Read, len)).unwrap();
        self.near.memory.assert_pattern(seed, 0, len, 0);
    }
}

/// All objects on all devices, by kind.
fn resources() -> String {
    let (done, told) = run("rdma resource show");
    assert!(done, "{told}");
    told
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_peer_that_is_killed_amid_transfers_ends_them_in_an_error() {
    let _rig = rig();
    let mut random = Random::new(5);
    for _ in 0..12 {
        let pair = Pair::new(over("rxe0", &[TransportKind::Rdma]), "rxe1");
        let mut transfers = Vec::new();
        for len in [64, 4096, 100_000, LEN] {
            for operation in [Operation::Read, Operation::Write] {
                transfers.push(pair.transfer(operation, len));
            }
        }
        let from = Instant::now();
        let after = Duration::from_micros(random.below(30_000) as u64);
        let mut killed = false;
        loop {
            if !killed && from.elapsed() > after {
                pair.far.process.kill();
                killed = true;
            }
            for transfer in &transfers {
                let _ = transfer.post_with_notification(b"gone?");
            }
            let ends: Vec<_> = transfers.iter().map(outcome).collect();
            if let Some(error) = ends.into_iter().find_map(Result::err) {
                let expected = ["RemoteDisconnect", "Connect", "Backpressure"];
                assert!(expected.contains(&kind(&error)), "{error}");
                if killed {
                    break;
                }
                // An emulated machine that gets no core may keep a queue pair waiting for longer than its retries last.
            }
            assert!(from.elapsed() < BOUND, "the death of the peer is not noticed");
        }
        // Nothing touches the memory any more.
        pair.near.memory.poison(0, LEN);
        pair.near.engine.deregister(&pair.near.region).unwrap();
        pair.near.memory.assert_poison(0, LEN);
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn packets_that_are_lost_cost_time_and_nothing_else() {
    let mut rig = rig();
    let mut pair = Pair::new(over("rxe0", &[TransportKind::Rdma]), "rxe1");
    rig.break_by("tc qdisc add dev va root netem loss 1%", "tc qdisc del dev va root");
    rig.break_by("tc qdisc add dev vb root netem loss 1%", "tc qdisc del dev vb root");
    for (seed, len) in [(1, 64), (2, 4096), (3, 200_000), (4, 64), (5, 1 << 20)] {
        pair.works(len, seed);
    }
    for number in 0..100u8 {
        pair.peer.notify(&[number]).unwrap();
    }
    let expected: Vec<String> = (0..100).map(|number| format!("near:{number:02x}")).collect();
    assert_eq!(pair.far.process.ask("take 100"), expected.join(" "));
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_link_that_goes_down_leaves_tcp() {
    let mut rig = rig();
    let mut pair = Pair::new(over("rxe0", &[TransportKind::Rdma, TransportKind::Tcp]), "rxe1");
    pair.works(LEN, 1);
    rig.break_by("ip link set va down", "ip link set va up");
    for seed in 2..6 {
        pair.works(100_000, seed);
        pair.peer.notify(&[seed as u8]).unwrap();
    }
    assert_eq!(pair.far.process.ask("take 4"), "near:02 near:03 near:04 near:05");
    assert_eq!(transport(&pair.near.engine, "far"), TransportKind::Tcp);
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn notifications_that_a_lost_link_had_swallowed_arrive_once() {
    let mut rig = rig();
    let mut pair = Pair::new(over("rxe0", &[TransportKind::Rdma, TransportKind::Tcp]), "rxe1");
    for number in 0..200u8 {
        if number == 100 {
            rig.break_by("ip link set va down", "ip link set va up");
        }
        while pair.peer.notify(&[number]).is_err() {
            std::thread::yield_now();
        }
    }
    let expected: Vec<String> = (0..200u8).map(|number| format!("near:{number:02x}")).collect();
    assert_eq!(pair.far.process.ask("take 200"), expected.join(" "));
}

/// Packets that a device of soft-RoCE has sent.
fn packets(device: &str) -> u64 {
    let file = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts");
    std::fs::read_to_string(file).unwrap().trim().parse().unwrap()
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn rails_share_a_large_transfer() {
    let _rig = rig();
    let mut pair = Pair::new(over("rxe0,rxe1", &[TransportKind::Rdma]), "rxe0,rxe1");
    let devices = ["rxe0", "rxe1"];
    let before = devices.map(packets);
    for seed in 1..4 {
        pair.works(LEN, seed);
    }
    let sent: Vec<_> =
        devices.iter().zip(before).map(|(device, old)| packets(device) - old).collect();
    // Both ways there and back: each device has sent about half of all bytes, and not only acknowledgements.
    assert!(sent.iter().all(|some| *some >= sent.iter().sum::<u64>() / 4), "{sent:?} packets");
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_rail_that_goes_down_leaves_the_other() {
    let mut rig = rig();
    // A third device. (`rdma link del` of one in use waits for its users: soft-RoCE cannot be taken away.)
    rig.break_by("ip link add spare mtu 4200 type dummy", "ip link del spare");
    run("ip addr add 10.9.1.1/24 dev spare");
    run("ip link set spare up");
    rig.break_by("rdma link add rxe2 type rxe netdev spare", "rdma link del rxe2");
    {
        let mut pair = Pair::new(over("rxe0,rxe2", &[TransportKind::Rdma]), "rxe0,rxe2");
        pair.works(LEN, 1);
        run("ip link set spare down");
        for seed in 2..5 {
            pair.works(LEN, seed);
        }
        assert_eq!(transport(&pair.near.engine, "far"), TransportKind::Rdma);
        assert!(pair.near.engine.stats().totals.rdma_failures > 0, "nothing has failed");
    }
    rig.repair();
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_device_whose_address_changes_is_used_with_the_new_one() {
    let mut rig = rig();
    let mut pair = Pair::new(over("rxe0", &[TransportKind::Rdma]), "rxe1");
    pair.works(100_000, 1);
    rig.break_by("ip address del 10.9.0.1/24 dev va", "ip address add 10.9.0.1/24 dev va");
    rig.break_by("ip address add 10.9.0.7/24 dev va", "ip address del 10.9.0.7/24 dev va");
    eventually("the device has its new address", || {
        // Not in the place of the old one, which queue pairs hold.
        let gid = |place| format!("/sys/class/infiniband/rxe0/ports/1/gids/{place}");
        let read = |place| std::fs::read_to_string(gid(place)).unwrap_or_default();
        (0..16).any(|place| read(place).contains("0a09:0007"))
    });
    for seed in 2..5 {
        pair.works(100_000, seed);
    }
    assert_eq!(transport(&pair.near.engine, "far"), TransportKind::Rdma);
    assert!(pair.near.engine.stats().totals.rdma_failures > 0, "the old queue pairs went on");
    drop(pair);
    rig.repair();
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn sixty_four_connections_of_one_engine_work_and_leave_nothing_behind() {
    let _rig = rig();
    let before = resources();
    {
        let config = || {
            let mut config = over("rxe0", &[TransportKind::Rdma]);
            config.lanes = LaneSpec::Unpinned { count: 1 };
            config.spin = Spin::For(Duration::ZERO);
            config.liveness = BOUND;
            config
        };
        let near = Near::named("near", config(), 64 * 4096, Access::READ_WRITE);
        let others: Vec<_> = (0..64)
            .map(|number: usize| {
                let engine = Engine::new(&format!("other-{number}"), config()).unwrap();
                let memory = Buffer::new(4096);
                memory.fill(number as u64, 0, 4096, 0);
                let region = memory.register(&engine, Access::READ_WRITE);
                let peer = near.connect(&engine.metadata());
                (engine, memory, region, peer)
            })
            .collect();
        let transfers: Vec<_> = others
            .iter()
            .enumerate()
            .map(|(number, (_, _, region, peer))| {
                let here = number * 4096;
                near.transfer(peer, Operation::Read, (here, 0), region.descriptor(), 4096)
            })
            .collect();
        for transfer in &transfers {
            transfer.post_with_notification(b"read").unwrap();
        }
        for (number, transfer) in transfers.iter().enumerate() {
            outcome(transfer).unwrap();
            near.memory.assert_pattern(number as u64, number * 4096, 4096, 0);
        }
        for (number, (engine, ..)) in others.iter().enumerate() {
            assert_eq!(collect(engine, 1)[0].payload, b"read", "{number}");
            assert_eq!(transport(&near.engine, &format!("other-{number}")), TransportKind::Rdma);
        }
        for (engine, ..) in &others {
            engine.shutdown().unwrap();
        }
        near.engine.shutdown().unwrap();
    }
    eventually("all that was made on the devices is gone", || resources() == before);
}
