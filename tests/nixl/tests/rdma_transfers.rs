//! NIXL over RDMA: transfers, their notifications, and peers that die, between agents that may use nothing else. What the
//! devices and TCP have carried meanwhile is counted, by the kernel. `tests/run.sh nixl-rdma` runs these tests where there
//! are devices, and the other tests of transfers and notifications under `CORELANE_TRANSPORTS=rdma`.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use corelane_nixl_tests::{
    Agent, Notify, Operation, Settings, Status, Target, params, range, target,
};
use corelane_tests::{BOUND, Buffer};

const LEN: usize = 8 << 20;
/// The longest payload of a packet; of a segment on the loopback device, nearly.
const PACKET: usize = 4096;
const SEGMENT: usize = 64 << 10;
const RDMA: &str = "transports=rdma";

fn rdma() -> Settings {
    params(&[("transports", "rdma")])
}

/// What the devices and TCP of this machine have carried so far.
#[derive(Debug, Clone, Copy)]
struct Carried {
    rdma_packets: u64,
    tcp_segments: u64,
}

impl Carried {
    fn now() -> Self {
        Self { rdma_packets: rdma_packets(), tcp_segments: tcp_segments() }
    }

    fn since(self) -> Self {
        let now = Self::now();
        Self {
            rdma_packets: now.rdma_packets - self.rdma_packets,
            tcp_segments: now.tcp_segments - self.tcp_segments,
        }
    }
}

/// What devices call packets sent (soft-RoCE, others), or requests that came in (mlx5, whose other counters leave out what
/// does not pass the port).
fn rdma_packets() -> u64 {
    const NAMES: [&str; 4] = [
        "hw_counters/sent_pkts",
        "hw_counters/rx_read_requests",
        "hw_counters/rx_write_requests",
        "counters/port_xmit_packets",
    ];
    let folders = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten();
    let devices = folders("/sys/class/infiniband".into());
    devices
        .flat_map(|device| folders(device.path().join("ports")))
        .flat_map(|port| NAMES.map(|name| port.path().join(name)))
        .filter_map(|file| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok())
        .sum()
}

/// Segments that TCP has sent. The file has a line of names and a line of values.
fn tcp_segments() -> u64 {
    let text = fs::read_to_string("/proc/net/snmp").unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.split_whitespace().position(|name| name == "OutSegs").unwrap();
    values.split_whitespace().nth(place).unwrap().parse().unwrap()
}

/// Since what is counted is the machine's, one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Panics unless these bytes went over RDMA, in packets as long as any, and not over TCP.
#[track_caller]
fn assert_went_over_rdma(carried: Carried, bytes: usize) {
    assert!(bytes >= LEN, "too few to tell data from the session's own frames");
    // Only of soft-RoCE it is known that all packets are counted, and that nobody else uses TCP.
    let in_rig = std::env::var_os("CORELANE_RDMA_RIG").is_some();
    let least = if in_rig { (bytes / PACKET) as u64 } else { 1 };
    assert!(carried.rdma_packets >= least, "{carried:?} of {bytes} bytes");
    if in_rig {
        let most = (bytes / SEGMENT / 2) as u64;
        assert!(carried.tcp_segments < most, "{carried:?} of {bytes} bytes");
    }
}

struct Pair {
    far: Target,
    agent: Agent,
    near: Buffer,
    _alone: MutexGuard<'static, ()>,
}

impl Pair {
    /// An agent and a process with another, of which the first knows the second, connected.
    fn new(settings: &Settings, far_params: &str) -> Self {
        let one = alone();
        let mut far = target!("target", LEN, far_params);
        let (agent, near) = (Agent::with("initiator", settings), Buffer::new(LEN));
        agent.register(&near);
        far.introduce_to(&agent);
        agent.connect("target").unwrap();
        Self { far, agent, near, _alone: one }
    }

    #[track_caller]
    fn run(&self, operation: Operation, here: usize, there: usize, len: usize) {
        let lists = ([range(&self.near, here, len)], [self.far.range(there, len)]);
        self.agent.transfer(operation, &lists.0, "target", &lists.1).unwrap();
    }

    /// Reads all of the target, looks at each byte, and at which way they came.
    #[track_caller]
    fn assert_reads_over_rdma(&self) {
        self.near.poison(0, LEN);
        let before = Carried::now();
        self.run(Operation::Read, 0, 0, LEN);
        assert_went_over_rdma(before.since(), LEN);
        self.near.assert_pattern(1, 0, LEN, 0);
    }
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh nixl-rdma"]
fn reads_and_writes_of_all_sizes_go_over_rdma() {
    let mut pair = Pair::new(&rdma(), RDMA);
    let before = Carried::now();
    let sizes = [(1, 3), (64, 0), (4096, 4095), (65_537, 13), (LEN - 1, 1)];
    for (size, offset) in sizes {
        pair.near.poison(0, LEN);
        pair.run(Operation::Read, offset, offset, size);
        pair.near.assert_poison(0, offset);
        pair.near.assert_pattern(1, offset, size, offset as u64);
        pair.near.assert_poison(offset + size, LEN - offset - size);
    }
    for (seed, (size, offset)) in (2..).zip(sizes) {
        pair.near.fill(seed, offset, size, 0);
        pair.run(Operation::Write, offset, offset, size);
        pair.far.assert_pattern(seed, offset, size, 0);
    }
    assert_went_over_rdma(before.since(), sizes.iter().map(|(size, _)| 2 * size).sum());
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh nixl-rdma"]
fn lists_of_thousands_of_blocks_go_over_rdma() {
    const BLOCKS: usize = LEN / PACKET;
    let mut pair = Pair::new(&rdma(), RDMA);
    // Backwards there: no block has a neighbour.
    let here: Vec<_> = (0..BLOCKS).map(|i| range(&pair.near, i * PACKET, PACKET)).collect();
    let there: Vec<_> = (0..BLOCKS).rev().map(|i| pair.far.range(i * PACKET, PACKET)).collect();
    let before = Carried::now();
    pair.agent.transfer(Operation::Read, &here, "target", &there).unwrap();
    assert_went_over_rdma(before.since(), LEN);
    for block in 0..BLOCKS {
        let at = ((BLOCKS - 1 - block) * PACKET) as u64;
        pair.near.assert_pattern(1, block * PACKET, PACKET, at);
    }
    pair.near.fill(7, 0, LEN, 0);
    let before = Carried::now();
    pair.agent.transfer(Operation::Write, &here, "target", &there).unwrap();
    assert_went_over_rdma(before.since(), LEN);
    for block in [0, 1, BLOCKS / 2, BLOCKS - 1] {
        let at = (BLOCKS - 1 - block) * PACKET;
        pair.far.assert_pattern(7, at, PACKET, (block * PACKET) as u64);
    }
}

/// Of small transfers, each with a notification, as many as there are blocks: the notification and what acknowledges it
/// would take a segment of TCP each.
#[test]
#[ignore = "needs an RDMA device: tests/run.sh nixl-rdma"]
fn notifications_go_over_rdma_with_their_data_and_without() {
    const COUNT: usize = 500;
    let mut pair = Pair::new(&rdma(), RDMA);
    pair.near.fill(5, 0, LEN, 0);
    let lists = ([range(&pair.near, 0, 4096)], [pair.far.range(0, 4096)]);
    let request = pair.agent.prepare(Operation::Write, &lists.0, "target", &lists.1).unwrap();
    let before = Carried::now();
    for number in 0..COUNT {
        let (bound, free) = (format!("bound {number}"), format!("free {number}"));
        request.run_with(Notify::With(bound.as_bytes())).unwrap();
        pair.far.assert_notifications("initiator", &[bound.as_bytes()]);
        pair.agent.notify("target", free.as_bytes()).unwrap();
        pair.far.assert_notifications("initiator", &[free.as_bytes()]);
    }
    let carried = before.since();
    pair.far.assert_pattern(5, 0, 4096, 0);
    assert!(carried.rdma_packets >= 1, "{carried:?}");
    if std::env::var_os("CORELANE_RDMA_RIG").is_some() {
        // Of each round a packet of data and two of notifications, at least.
        assert!(carried.rdma_packets >= 3 * COUNT as u64, "{carried:?}");
        assert!(carried.tcp_segments < COUNT as u64, "{carried:?}");
    }
    // Longer than the devices' receive buffers: over the session, whole and once.
    let long = corelane_tests::pattern(3, 0, 1 << 20);
    request.run_with(Notify::With(&long)).unwrap();
    pair.far.assert_notifications("initiator", &[&long]);
    pair.far.process.ask("quiet");
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh nixl-rdma"]
fn rdma_comes_before_tcp_where_both_may_be_used() {
    let settings = params(&[("transports", "rdma,tcp")]);
    let pair = Pair::new(&settings, "transports=rdma,tcp");
    pair.assert_reads_over_rdma();
    drop(pair);
    // And is not used where the peer may not: then it is TCP that carries them.
    let pair = Pair::new(&settings, "transports=tcp");
    let before = Carried::now();
    pair.run(Operation::Read, 0, 0, LEN);
    let carried = before.since();
    pair.near.assert_pattern(1, 0, LEN, 0);
    assert!(carried.tcp_segments >= (LEN / SEGMENT / 2) as u64, "{carried:?}");
    assert!(carried.rdma_packets < (LEN / PACKET) as u64, "{carried:?}");
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh nixl-rdma"]
fn a_peer_that_may_only_use_tcp_is_refused_and_not_reached_by_tcp() {
    let _alone = alone();
    let mut far = target!("target", LEN, "transports=tcp");
    let (agent, near) = (Agent::with("initiator", &rdma()), Buffer::new(LEN));
    agent.register(&near);
    let loaded = agent.load(&far.metadata());
    if loaded.is_ok() {
        let lists = ([range(&near, 0, LEN)], [far.range(0, LEN)]);
        agent.transfer(Operation::Read, &lists.0, "target", &lists.1).unwrap_err();
    }
    near.assert_poison(0, LEN);
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh nixl-rdma"]
fn a_killed_peer_ends_the_transfers_in_flight_and_its_successor_is_reached_over_rdma() {
    for operation in [Operation::Read, Operation::Write] {
        let mut pair = Pair::new(&rdma(), RDMA);
        pair.assert_reads_over_rdma();
        let (agent, near) = (&pair.agent, &pair.near);
        near.fill(4, 0, LEN, 0);
        let requests: Vec<_> = (0..8)
            .map(|_| {
                let lists = ([range(near, 0, LEN)], [pair.far.range(0, LEN)]);
                agent.prepare(operation, &lists.0, "target", &lists.1).unwrap()
            })
            .collect();
        for request in &requests {
            assert!(request.post(Notify::With(b"perhaps")).0 >= 0);
        }
        pair.far.process.kill();
        // The first may be over before the peer's queue pairs are gone; again and again they cannot be.
        let deadline = Instant::now() + BOUND;
        let ends: Vec<_> = requests
            .iter()
            .map(|request| {
                loop {
                    match request.wait().and_then(|()| request.run()) {
                        Ok(()) => assert!(Instant::now() < deadline, "the dead do not answer"),
                        Err(end) => break end,
                    }
                }
            })
            .collect();
        assert!(ends.contains(&Status::REMOTE_DISCONNECT), "{operation:?}: {ends:?}");
        assert!(
            ends.iter().all(|end| [Status::REMOTE_DISCONNECT, Status::NOT_FOUND].contains(end)),
            "{operation:?}: {ends:?}"
        );
        if operation == Operation::Write {
            near.assert_pattern(4, 0, LEN, 0);
        }
        drop(requests);
        // Quiet: nothing of the dead arrives any more.
        near.poison(0, LEN);
        std::thread::sleep(Duration::from_millis(100));
        near.assert_poison(0, LEN);
        if agent.knows("target") {
            agent.invalidate("target").unwrap();
        }
        pair.far = target!("target", LEN, RDMA);
        pair.far.introduce_to(&pair.agent);
        pair.assert_reads_over_rdma();
    }
}
