//! This side of a test: an engine with one region.

use corelane::{
    Access, Engine, EngineConfig, LocalSegment, Operation, Peer, Region, RegionDescriptor,
    RemoteSegment, Transfer, TransportKind,
};

use crate::{Buffer, eventually};

/// Which way an engine's transfers to a peer go, as soon as that is known.
#[track_caller]
pub fn transport(engine: &Engine, peer: &str) -> TransportKind {
    let mut found = None;
    eventually("the transport is known", || {
        let stats = engine.stats();
        found = stats.peers.iter().find(|known| known.name == peer).and_then(|peer| peer.transport);
        found.is_some()
    });
    found.expect("the loop has ended")
}

/// An engine, and memory that it has registered.
#[derive(Debug)]
pub struct Near {
    /// The engine.
    pub engine: Engine,
    /// Its memory, poison at first.
    pub memory: Buffer,
    /// The registration of all of it.
    pub region: Region,
}

impl Near {
    /// An engine with `len` bytes that only it uses.
    #[track_caller]
    pub fn new(config: EngineConfig, len: usize) -> Self {
        Self::named("near", config, len, Access::LOCAL)
    }

    /// An engine of a given name with `len` bytes.
    #[track_caller]
    pub fn named(name: &str, config: EngineConfig, len: usize, access: Access) -> Self {
        let engine = Engine::new(name, config).expect("an engine");
        let memory = Buffer::new(len);
        let region = memory.register(&engine, access);
        Self { engine, memory, region }
    }

    /// Makes a peer known and connects to it.
    #[track_caller]
    pub fn connect(&self, metadata: &[u8]) -> Peer {
        let peer = self.engine.load_peer(metadata).expect("metadata of the peer");
        peer.connect(crate::BOUND).expect("a connection");
        peer
    }

    /// As `connect`, and copies go over transport `local`.
    #[track_caller]
    pub fn connect_locally(&self, metadata: &[u8]) -> Peer {
        let peer = self.connect(metadata);
        assert_eq!(transport(&self.engine, peer.name()), TransportKind::Local);
        peer
    }

    /// A transfer between one range here and one there.
    #[track_caller]
    pub fn transfer(
        &self,
        peer: &Peer,
        operation: Operation,
        (here, there): (usize, usize),
        remote: &RegionDescriptor,
        len: usize,
    ) -> Transfer {
        let local = self.region.segment(here as u64, len as u64);
        let remote = remote.segment(there as u64, len as u64);
        self.transfer_of_lists(peer, operation, &[local], &[remote])
    }

    /// A transfer of many ranges.
    #[track_caller]
    pub fn transfer_of_lists(
        &self,
        peer: &Peer,
        operation: Operation,
        local: &[LocalSegment],
        remote: &[RemoteSegment<'_>],
    ) -> Transfer {
        self.engine.prepare(operation, peer, local, remote).expect("a plan").transfer()
    }
}
