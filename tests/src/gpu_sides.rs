//! Engines with a region of GPU memory, and what they exchange.

use corelane::{Access, Engine, EngineConfig, Operation, Peer, Region, RegionDescriptor};

use crate::{BOUND, GpuBuffer, POISON, PeerProcess, end_of, from_hex, pattern};

/// Bytes of each region.
pub const GPU_LEN: usize = (24 << 20) + 1000;

/// An engine of this process.
#[derive(Debug)]
pub struct GpuSide {
    /// It has one region.
    pub engine: Engine,
    /// Poison at first.
    pub memory: GpuBuffer,
    /// All of the memory.
    pub region: Region,
}

impl GpuSide {
    /// Starts it, with memory of that GPU.
    pub fn new(name: &str, config: EngineConfig, gpu: u32) -> Self {
        let engine = Engine::new(name, config).expect("an engine");
        let memory = GpuBuffer::new(gpu, GPU_LEN);
        let region = memory.register(&engine, Access::READ_WRITE).expect("registered");
        Self { engine, memory, region }
    }

    /// Connects it with a peer.
    pub fn connect(&self, metadata: &[u8]) -> Peer {
        let peer = self.engine.load_peer(metadata).expect("metadata");
        peer.connect(BOUND).expect("connected");
        peer
    }

    /// Copies one range, `here` in this side's memory and `there` in the peer's.
    pub fn copy(
        &self,
        peer: &Peer,
        operation: Operation,
        (here, there): (usize, usize),
        remote: &RegionDescriptor,
        len: usize,
    ) {
        let local = self.memory.segment(here, len);
        let remote = remote.segment(there as u64, len as u64);
        let plan = self.engine.prepare(operation, peer, &[local], &[remote]).expect("a plan");
        end_of(&plan.transfer()).expect("copied");
    }

    /// Reads ranges of these lengths, each from places that are these further apart from being aligned, and writes them: all
    /// bytes and nothing around them.
    pub fn exchange_lengths(
        &self,
        peer: &Peer,
        far: &mut FarGpu,
        lengths: impl IntoIterator<Item = usize>,
        shifts: &[usize],
    ) {
        for (round, len) in lengths.into_iter().enumerate() {
            for shift in shifts {
                let (here, there) = (round * 16 + 64, round * 16 + 32 + shift);
                self.copy(peer, Operation::Read, (here, there), &far.region, len);
                let found = self.memory.read(0, here + len + 64);
                assert_bytes(&found[here..here + len], &pattern(1, there as u64, len), "read");
                let around = found[..here].iter().chain(&found[here + len..]);
                let whole = around.copied().all(|byte| byte == POISON);
                assert!(whole, "bytes around {len} were written");
                self.memory.poison();
            }
            let (here, there) = (round * 16 + 3, round * 16 + 32);
            self.memory.write(here, &pattern(2, here as u64, len));
            far.process.ask(&format!("gpu-poison r 0 {GPU_LEN}"));
            self.copy(peer, Operation::Write, (here, there), &far.region, len);
            far.process.ask(&format!("gpu-check r 2 {there} {len} {here}"));
            far.process.ask(&format!("gpu-check-poison r 0 {there}"));
            far.process.ask(&format!("gpu-check-poison r {} 64", there + len));
            far.process.ask(&format!("gpu-fill r 1 0 {GPU_LEN} 0"));
            self.memory.poison();
        }
    }

    /// As [`exchange_lengths`](Self::exchange_lengths), in lists of two blocks, which a kernel copies where they are not long.
    pub fn exchange_lists(
        &self,
        peer: &Peer,
        far: &mut FarGpu,
        lengths: impl IntoIterator<Item = usize>,
        shifts: &[usize],
    ) {
        for (round, len) in lengths.into_iter().enumerate() {
            assert!(2 * len + 2000 <= GPU_LEN);
            let places = |first: usize, gap: usize| [first, first + len + gap];
            for shift in shifts {
                let (here, there) =
                    (places(round * 16 + 64, 33), places(round * 16 + 32 + shift, 70));
                self.copy_blocks(peer, Operation::Read, (here, there), &far.region, len);
                let end = here[1] + len;
                let mut expected = vec![POISON; end + 64];
                for (here, there) in here.into_iter().zip(there) {
                    expected[here..here + len].copy_from_slice(&pattern(1, there as u64, len));
                }
                assert_bytes(&self.memory.read(0, end + 64), &expected, "read and around");
                self.memory.poison();
            }
            let (here, there) = (places(round * 16 + 3, 50), places(round * 16 + 32, 64));
            self.memory.write(0, &pattern(2, 0, here[1] + len));
            far.process.ask(&format!("gpu-poison r 0 {}", there[1] + len + 64));
            self.copy_blocks(peer, Operation::Write, (here, there), &far.region, len);
            for (here, there) in here.into_iter().zip(there) {
                far.process.ask(&format!("gpu-check r 2 {there} {len} {here}"));
                far.process.ask(&format!("gpu-check-poison r {} 64", there + len));
            }
            far.process.ask(&format!("gpu-check-poison r 0 {}", there[0]));
            far.process.ask(&format!("gpu-fill r 1 0 {} 0", there[1] + len + 64));
            self.memory.poison();
        }
    }

    fn copy_blocks(
        &self,
        peer: &Peer,
        operation: Operation,
        (here, there): ([usize; 2], [usize; 2]),
        remote: &RegionDescriptor,
        len: usize,
    ) {
        let local = here.map(|at| self.memory.segment(at, len));
        let remote = there.map(|at| remote.segment(at as u64, len as u64));
        let plan = self.engine.prepare(operation, peer, &local, &remote).expect("a plan");
        end_of(&plan.transfer()).expect("copied");
    }
}

/// A second process with an engine and one region of a GPU, `r`, which holds pattern 1.
#[derive(Debug)]
pub struct FarGpu {
    /// The process.
    pub process: PeerProcess,
    /// Of its engine.
    pub metadata: Vec<u8>,
    /// Of `r`.
    pub region: RegionDescriptor,
}

impl FarGpu {
    /// Starts the engine in that process, with memory of that GPU.
    pub fn new(mut process: PeerProcess, gpu: u32, settings: &str) -> Self {
        let metadata = process.engine("far", settings);
        let region = process.ask(&format!("gpu-region r {GPU_LEN} read-write {gpu}"));
        let region = from_hex(&region).expect("hexadecimal");
        process.ask(&format!("gpu-fill r 1 0 {GPU_LEN} 0"));
        let region = RegionDescriptor::from_bytes(&region).expect("a descriptor");
        Self { process, metadata, region }
    }
}

/// Panics where bytes are not those expected, and says where the first one is.
#[track_caller]
pub fn assert_bytes(found: &[u8], expected: &[u8], what: &str) {
    let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!(wrong, None, "{what}: the first wrong byte");
    assert_eq!(found.len(), expected.len(), "{what}");
}
