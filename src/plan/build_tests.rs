//! Plans against a model: the bytes that the pieces name, in order, are the bytes that were asked for.

use proptest::prelude::*;

use super::*;
use crate::config::Limits;
use crate::plan::{LocalBlocks, RemoteBlocks};
use crate::wire::RegionKey;
use crate::wire::frame::{MAX_BODY, segments};

const PEER: u128 = 77;

fn descriptor(
    incarnation: u128,
    slot: u32,
    base: u64,
    len: u64,
    access: Access,
) -> RegionDescriptor {
    RegionDescriptor {
        incarnation,
        key: RegionKey::new(slot, 99),
        base,
        len,
        kind: MemoryKind::Dram,
        access,
        rail_keys: crate::wire::RailKeys::new(),
        device: None,
    }
}

struct World {
    registry: Registry,
    peer: Arc<PeerShared>,
    remote: Vec<RegionDescriptor>,
}

/// Two adjacent local regions at 0x10000 and two adjacent remote ones at 0x80000, 64 KiB each.
fn world() -> World {
    let mut registry = Registry::new(10);
    for base in [0x10000, 0x20000] {
        registry
            .insert(
                |s| descriptor(1, s, base, 0x10000, Access::LOCAL),
                crate::memory::Backing::Application,
                crate::transport::rdma::Registrations::default(),
            )
            .unwrap();
    }
    let remote = [0x80000, 0x90000]
        .iter()
        .enumerate()
        .map(|(i, base)| descriptor(PEER, i as u32, *base, 0x10000, Access::READ_WRITE))
        .collect();
    let peer = PeerShared::new("p".into(), PEER, 0, None, &Limits::default());
    World { registry, peer: Arc::new(peer), remote }
}

impl World {
    fn builder(&self, operation: Operation, chunk_bytes: u64) -> PlanBuilder<'_> {
        PlanBuilder {
            operation,
            peer: &self.peer,
            registry: &self.registry,
            chunk_bytes,
            latency_bytes: 4096,
            max_descriptors: 10_000,
            local: true,
            rdma: true,
        }
    }

    fn build(&self, pairs: &[(u64, u64, u64)], chunk: u64) -> Result<PlanInner> {
        let local: Vec<_> =
            pairs.iter().map(|&(addr, _, len)| LocalSegment { addr, len }).collect();
        let remote: Vec<_> = pairs
            .iter()
            .map(|&(_, addr, len)| RemoteSegment {
                region: &self.remote[usize::from(addr >= 0x90000)],
                addr,
                len,
            })
            .collect();
        self.builder(Operation::Read, chunk).build(&local[..], &remote[..])
    }
}

/// Every (local address, remote address) that a plan moves, byte by byte.
fn bytes_of(plan: &PlanInner) -> Vec<(u64, u64)> {
    let mut all = Vec::new();
    for (index, piece) in plan.pieces.iter().enumerate() {
        let body = plan.body(index as u32);
        assert_eq!(body.len(), piece.header.body as usize);
        assert!(body.len() <= MAX_BODY);
        let local =
            plan.local(index as u32).iter().flat_map(|s| s.addr()..s.addr() + s.len() as u64);
        let remote = segments(&piece.header, body).flat_map(|s| {
            let s = s.unwrap();
            s.addr..s.addr + s.len
        });
        let pairs: Vec<_> = local.zip(remote).collect();
        assert_eq!(pairs.len() as u64, piece.header.len);
        assert!(plan.local(index as u32).len() <= MAX_SEGMENTS);
        all.extend(pairs);
    }
    all
}

#[test]
fn one_small_descriptor_is_one_request_without_a_table() {
    let plan = world().build(&[(0x10010, 0x80020, 64)], 4096).unwrap();
    assert_eq!((plan.pieces.len(), plan.class, plan.bytes), (1, Class::Latency, 64));
    let header = plan.pieces[0].header;
    assert_eq!((header.segments, header.body, header.addr), (0, 0, 0x80020));
}

#[test]
fn neighbours_merge_but_never_across_registrations() {
    let blocks: Vec<_> = (0..32).map(|i| (0x1f000 + i * 256, 0x8f000 + i * 256, 256)).collect();
    let plan = world().build(&blocks, 1 << 20).unwrap();
    assert_eq!(plan.local(0).len(), 2, "one segment on each side of the border");
    assert_eq!(plan.pieces[0].header.segments, 2);
    assert_eq!(plan.regions.len(), 2);
    assert_eq!(bytes_of(&plan).len(), 32 * 256);
}

#[test]
fn scattered_on_one_side_merges_on_the_other() {
    let blocks: Vec<_> = (0..16).map(|i| (0x10000 + i * 64, 0x80000 + i * 128, 64)).collect();
    let plan = world().build(&blocks, 1 << 20).unwrap();
    assert_eq!(plan.local(0).len(), 1);
    assert_eq!(plan.pieces[0].header.segments, 16);
}

#[test]
fn long_lists_are_cut_at_the_segment_limit() {
    let blocks: Vec<_> = (0..2500).map(|i| (0x10000 + i * 16, 0x80000 + i * 16, 8)).collect();
    let plan = world().build(&blocks, 1 << 20).unwrap();
    assert_eq!(plan.pieces.len(), 3);
    assert_eq!(bytes_of(&plan).len(), 2500 * 8);
    assert_eq!(plan.class, Class::Bulk);
}

#[test]
fn zero_length_descriptors_move_nothing() {
    let plan = world().build(&[(0x10000, 0x80000, 0), (0x20000, 0x8ffff, 0)], 4096).unwrap();
    assert!(plan.pieces.is_empty() && plan.bytes == 0 && plan.descriptors == 2);
}

#[test]
fn bad_lists_are_typed_errors() {
    let world = world();
    let refused = |pairs: &[(u64, u64, u64)]| world.build(pairs, 4096).unwrap_err();
    assert!(matches!(refused(&[]), Error::InvalidArgument(_)));
    assert!(matches!(refused(&[(0x5000, 0x80000, 8)]), Error::NotRegistered { addr: 0x5000, .. }));
    assert!(matches!(refused(&[(0x1fffc, 0x80000, 8)]), Error::OutOfBounds { side: "local", .. }));
    assert!(matches!(refused(&[(0x10000, 0x8fffc, 8)]), Error::OutOfBounds { side: "remote", .. }));
    assert!(matches!(refused(&[(u64::MAX, 0x80000, 8)]), Error::InvalidArgument(_)));
    assert!(matches!(refused(&[(0x10000, u64::MAX, 8)]), Error::InvalidArgument(_)));
}

#[test]
fn counts_lengths_permission_and_incarnation_are_checked() {
    let world = world();
    let local = [LocalSegment { addr: 0x10000, len: 8 }; 2];
    let remote = world.remote[0].segment(0, 8);
    let build = |op, local: &[LocalSegment], remote: &[RemoteSegment<'_>]| {
        world.builder(op, 4096).build(local, remote).unwrap_err()
    };
    assert!(build(Operation::Read, &local, &[remote]).to_string().contains("2 local and 1 remote"));
    let longer = RemoteSegment { len: 9, ..remote };
    assert!(build(Operation::Read, &local[..1], &[longer]).to_string().contains("descriptor 0"));
    let read_only = RegionDescriptor { access: Access::REMOTE_READ, ..world.remote[0].clone() };
    let error = build(Operation::Write, &local[..1], &[read_only.segment(0, 8)]);
    assert!(matches!(error, Error::Permission { .. }));
    let old = RegionDescriptor { incarnation: 5, ..world.remote[0].clone() };
    let error = build(Operation::Read, &local[..1], &[old.segment(0, 8)]);
    assert!(matches!(error, Error::StaleDescriptor { .. }));
    let many = vec![LocalSegment { addr: 0x10000, len: 1 }; 10_001];
    let far = vec![world.remote[0].segment(0, 1); 10_001];
    assert!(matches!(build(Operation::Read, &many, &far), Error::Limit { .. }));
}

#[test]
fn strided_lists_equal_their_expansion() {
    let world = world();
    let indices = [5, 1, 2, 3, 40];
    let local = LocalBlocks { base: 0x10000, stride: 512, block_bytes: 256, indices: &indices };
    let remote = RemoteBlocks {
        region: &world.remote[0],
        base: 0x80000,
        stride: 256,
        block_bytes: 256,
        indices: &indices,
    };
    let strided = world.builder(Operation::Read, 4096).build(&local, &remote).unwrap();
    let pairs: Vec<_> = indices
        .iter()
        .map(|&i| (0x10000 + u64::from(i) * 512, 0x80000 + u64::from(i) * 256, 256))
        .collect();
    assert_eq!(bytes_of(&strided), bytes_of(&world.build(&pairs, 4096).unwrap()));
    let wraps = LocalBlocks { stride: u64::MAX, ..local };
    assert!(wraps.check().is_err());
}

proptest! {
    #[test]
    fn every_byte_is_moved_once_and_in_order(
        pairs in proptest::collection::vec((0u64..0x1f000, 0u64..0x1f000, 0u64..3000), 1..40),
        chunk in 1u64..5000,
    ) {
        let world = world();
        // Ranges inside one registration on both sides.
        let inside = |offset: u64, len: u64| offset / 0x10000 == (offset + len.max(1) - 1) / 0x10000;
        let pairs: Vec<_> = pairs
            .into_iter()
            .filter(|&(l, r, len)| inside(l, len) && inside(r, len))
            .map(|(l, r, len)| (0x10000 + l, 0x80000 + r, len))
            .collect();
        prop_assume!(!pairs.is_empty());
        let plan = world.build(&pairs, chunk).unwrap();
        let expected: Vec<_> = pairs
            .iter()
            .flat_map(|&(l, r, len)| (0..len).map(move |i| (l + i, r + i)))
            .collect();
        prop_assert_eq!(bytes_of(&plan), expected);
        prop_assert!(plan.pieces.iter().all(|piece| piece.header.len <= chunk));
    }
}
