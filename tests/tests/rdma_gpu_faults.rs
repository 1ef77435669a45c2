//! GPU memory by RDMA, when the link goes down: what was under way and what comes later goes through pinned memory and sockets. In the
//! rig, whose devices nobody else uses; alone in its program.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::process::Command;

use corelane::{
    Access, Engine, Operation, Peer, Region, RegionDescriptor, Transfer, TransportKind,
};
use corelane_tests::{
    BOUND, GpuBuffer, PeerProcess, end_of, eventually, from_hex, gpus, outcome, pattern,
    peer_process, rdma_config, transport,
};

const LEN: usize = 3 << 20;

struct Pair {
    engine: Engine,
    memory: GpuBuffer,
    _region: Region,
    far: PeerProcess,
    theirs: RegionDescriptor,
    peer: Peer,
}

impl Pair {
    fn new() -> Self {
        let mut far = peer_process!();
        let settings = "transports=rdma,tcp rdma_devices=rxe1 rdma_timeout=15 liveness_ms=20000";
        let metadata = far.engine("far", settings);
        let bytes = from_hex(&far.ask(&format!("gpu-region r {LEN} read-write 0"))).unwrap();
        let theirs = RegionDescriptor::from_bytes(&bytes).unwrap();
        let mut config = rdma_config();
        config.transports = vec![TransportKind::Rdma, TransportKind::Tcp];
        config.rdma.devices = vec!["rxe0".into()];
        config.rdma.timeout = 11;
        let engine = Engine::new("near", config).unwrap();
        let memory = GpuBuffer::new(0, LEN);
        let region = memory.register(&engine, Access::READ_WRITE).unwrap();
        let peer = engine.load_peer(&metadata).unwrap();
        peer.connect(BOUND).unwrap();
        assert_eq!(transport(&engine, "far"), TransportKind::Rdma);
        Self { engine, memory, _region: region, far, theirs, peer }
    }

    fn transfer(
        &self,
        operation: Operation,
        (here, there): (usize, usize),
        len: usize,
    ) -> Transfer {
        let local = self.memory.segment(here, len);
        let remote = self.theirs.segment(there as u64, len as u64);
        self.engine.prepare(operation, &self.peer, &[local], &[remote]).unwrap().transfer()
    }

    /// Writes, reads back, and checks every byte.
    fn works(&mut self, len: usize, seed: u64) {
        self.memory.write(0, &pattern(seed, 0, len));
        end_of(&self.transfer(Operation::Write, (0, 7), len)).unwrap();
        self.far.ask(&format!("gpu-check r {seed} 7 {len} 0"));
        self.memory.poison();
        end_of(&self.transfer(Operation::Read, (1, 7), len)).unwrap();
        assert!(self.memory.read(1, len) == pattern(seed, 0, len), "what was read back");
    }
}

/// The cable is cut until this is dropped.
struct Cut;

impl Cut {
    fn new() -> Self {
        ip("down");
        Self
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        ip("up");
    }
}

fn ip(state: &str) {
    let done = Command::new("ip").args(["link", "set", "va", state]).status();
    assert!(done.is_ok_and(|status| status.success()), "ip link set va {state}");
}

#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_link_that_goes_down_leaves_pinned_memory_and_sockets() {
    if std::env::var_os("CORELANE_RDMA_RIG").is_none() {
        return eprintln!("SKIPPED: not in the rig, nothing is broken here");
    }
    gpus(1).expect("the rig runs this with tests/fake-cuda: tests/run.sh rdma");
    eventually("both devices are there", || {
        let is_ready = |device| {
            let gid = format!("/sys/class/infiniband/{device}/ports/1/gids/1");
            std::fs::read_to_string(gid).is_ok_and(|gid| gid.contains("ffff"))
        };
        is_ready("rxe0") && is_ready("rxe1")
    });
    let mut pair = Pair::new();
    pair.works(LEN - 7, 1);
    let by_devices = pair.engine.stats().totals.rdma_doorbells;
    assert!(by_devices > 0, "it went another way");
    // Amid a READ: it is begun again.
    pair.far.ask(&format!("gpu-fill r 2 0 {LEN} 0"));
    let read = pair.transfer(Operation::Read, (0, 0), LEN);
    read.post().unwrap();
    let cut = Cut::new();
    outcome(&read).unwrap();
    assert!(pair.memory.read(0, LEN) == pattern(2, 0, LEN), "what was read across the cut");
    for seed in 3..6 {
        pair.works(700_000, seed);
    }
    assert_eq!(transport(&pair.engine, "far"), TransportKind::Tcp);
    drop(cut);
}
