//! Reads and writes between two processes, byte by byte.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane::{Access, Engine, LocalBlocks, Operation, RemoteBlocks};
use corelane_tests::{
    Buffer, Configuration, POISON, Random, end_of, over_each_transport, pattern, target,
};

over_each_transport!(
    a_read_fetches_exactly_the_bytes_asked_for,
    a_write_stores_exactly_the_bytes_asked_for,
    short_vectors_of_a_small_transfer_land_where_they_belong,
    long_vectors_of_a_bulk_transfer_land_where_they_belong,
    a_few_large_ranges_land_where_they_belong,
    ten_thousand_descriptors_land_where_they_belong,
    strided_blocks_land_where_they_belong_both_ways,
    transfers_of_no_bytes_complete_and_move_nothing,
    one_source_range_can_be_read_to_many_places,
    overlapping_destinations_stay_inside_their_ranges,
    one_gibibyte_arrives_in_one_transfer,
    two_processes_read_from_and_write_to_each_other_at_the_same_time,
);

/// Around the borders of pages, of the latency class and of chunks; none a multiple of a word but some.
const LENGTHS: [usize; 18] = [
    1, 2, 7, 64, 333, 4095, 4096, 4097, 65_535, 65_536, 65_537, 131_071, 262_143, 262_144, 262_145,
    1_048_579, 4_194_305, 16_777_216,
];

fn a_read_fetches_exactly_the_bytes_asked_for(config: Configuration) {
    let far = target!("target", 17 << 20);
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::new(17 << 20);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    for (round, &len) in LENGTHS.iter().enumerate() {
        let (to, from) = (round * 13 + 1, round * 7 + 3);
        let plan = engine
            .prepare(
                Operation::Read,
                &peer,
                &[region.segment(to as u64, len as u64)],
                &[far.region.segment(from as u64, len as u64)],
            )
            .unwrap();
        assert_eq!(plan.bytes(), len as u64);
        end_of(&plan.transfer()).unwrap();
        near.assert_pattern(1, to, len, from as u64);
        near.assert_poison(0, to);
        near.assert_poison(to + len, near.len() - to - len);
        near.poison(to, len);
    }
}

fn a_write_stores_exactly_the_bytes_asked_for(config: Configuration) {
    let mut far = target!("target", 17 << 20);
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::with_pattern(2, 17 << 20);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    for (round, &len) in LENGTHS.iter().enumerate() {
        far.process.ask(&format!("poison r 0 {}", 17 << 20));
        let (from, to) = (round * 11 + 5, round * 3 + 1);
        let plan = engine
            .prepare(
                Operation::Write,
                &peer,
                &[region.segment(from as u64, len as u64)],
                &[far.region.segment(to as u64, len as u64)],
            )
            .unwrap();
        end_of(&plan.transfer()).unwrap();
        far.assert_pattern(2, to, len, from as u64);
        far.assert_poison(0, to);
        far.assert_poison(to + len, (17 << 20) - to - len);
    }
    near.assert_pattern(2, 0, near.len(), 0);
}

/// Disjoint ranges of random lengths (some empty) in random order, covering about half of `space`.
fn scattered(random: &mut Random, lengths: &[usize], space: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    random.shuffle(&mut order);
    let slack = (space - lengths.iter().sum::<usize>()) / lengths.len();
    let mut offsets = vec![0; lengths.len()];
    let mut position = 0;
    for index in order {
        position += random.below(slack + 1);
        offsets[index] = position;
        position += lengths[index];
    }
    offsets
}

fn lengths(random: &mut Random, count: usize, largest: usize) -> Vec<usize> {
    (0..count).map(|i| if i % 17 == 3 { 0 } else { random.below(largest) + 1 }).collect()
}

/// Reads, then writes, `count` ranges of up to `largest` bytes, scattered over both sides.
fn vector_both_ways(config: Configuration, count: usize, largest: usize) {
    let mut random = Random::new(count as u64);
    let lengths = lengths(&mut random, count, largest);
    let space = count * largest;
    let (here, there) =
        (scattered(&mut random, &lengths, space), scattered(&mut random, &lengths, space));

    let mut far = target!("target", space);
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::new(space);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let local: Vec<_> = here
        .iter()
        .zip(&lengths)
        .map(|(&offset, &len)| region.segment(offset as u64, len as u64))
        .collect();
    let remote: Vec<_> = there
        .iter()
        .zip(&lengths)
        .map(|(&offset, &len)| far.region.segment(offset as u64, len as u64))
        .collect();

    let plan = engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
    assert_eq!(plan.descriptors(), count);
    assert_eq!(plan.bytes(), lengths.iter().sum::<usize>() as u64);
    end_of(&plan.transfer()).unwrap();
    let mut expected = vec![POISON; space];
    for ((&to, &from), &len) in here.iter().zip(&there).zip(&lengths) {
        expected[to..to + len].copy_from_slice(&pattern(1, from as u64, len));
    }
    near.assert_image(&expected);

    near.fill(3, 0, space, 0);
    far.process.ask(&format!("poison r 0 {space}"));
    let plan = engine.prepare(Operation::Write, &peer, &local, &remote).unwrap();
    end_of(&plan.transfer()).unwrap();
    let mut expected = vec![POISON; space];
    for ((&from, &to), &len) in here.iter().zip(&there).zip(&lengths) {
        expected[to..to + len].copy_from_slice(&pattern(3, from as u64, len));
    }
    let found = far.process.dump("r", 0, space);
    let wrong = (0..space).find(|&i| found[i] != expected[i]);
    assert!(wrong.is_none(), "byte {wrong:?} of the target is wrong");
}

fn short_vectors_of_a_small_transfer_land_where_they_belong(config: Configuration) {
    vector_both_ways(config, 37, 999);
}

fn long_vectors_of_a_bulk_transfer_land_where_they_belong(config: Configuration) {
    vector_both_ways(config, 1500, 3001);
}

fn a_few_large_ranges_land_where_they_belong(config: Configuration) {
    vector_both_ways(config, 5, 1_000_003);
}

fn ten_thousand_descriptors_land_where_they_belong(config: Configuration) {
    vector_both_ways(config, 10_000, 401);
}

fn strided_blocks_land_where_they_belong_both_ways(config: Configuration) {
    let mut far = target!("target", 4 << 20);
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::new(4 << 20);
    let _region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let mut random = Random::new(4);
    // Lengths and strides that differ on both sides, aligned and not; whole pages that merge.
    for (block, here, there, count) in [
        (4096, 4096, 4096, 1000),
        (1001, 1003, 2047, 2000),
        (16_384, 20_001, 16_384, 200),
        (1, 2, 1, 5000),
    ] {
        let mut indices: Vec<u32> = (0..count).collect();
        random.shuffle(&mut indices);
        let mut remote_indices = indices.clone();
        random.shuffle(&mut remote_indices);
        let local = LocalBlocks {
            base: near.address(1),
            stride: here,
            block_bytes: block,
            indices: &indices,
        };
        let remote = RemoteBlocks {
            region: &far.region,
            base: far.region.base() + 3,
            stride: there,
            block_bytes: block,
            indices: &remote_indices,
        };
        near.poison(0, near.len());
        let plan = engine.prepare_blocks(Operation::Read, &peer, &local, &remote).unwrap();
        assert_eq!(plan.descriptors(), count as usize);
        end_of(&plan.transfer()).unwrap();
        let mut expected = vec![POISON; near.len()];
        for (&to, &from) in indices.iter().zip(&remote_indices) {
            let (to, from) = (1 + to as usize * here as usize, 3 + u64::from(from) * there);
            expected[to..to + block as usize].copy_from_slice(&pattern(1, from, block as usize));
        }
        near.assert_image(&expected);

        near.fill(5, 0, near.len(), 0);
        far.process.ask(&format!("poison r 0 {}", 4 << 20));
        let plan = engine.prepare_blocks(Operation::Write, &peer, &local, &remote).unwrap();
        end_of(&plan.transfer()).unwrap();
        let mut expected = vec![POISON; 4 << 20];
        for (&from, &to) in indices.iter().zip(&remote_indices) {
            let (from, to) = (1 + u64::from(from) * here, 3 + to as usize * there as usize);
            expected[to..to + block as usize].copy_from_slice(&pattern(5, from, block as usize));
        }
        assert!(far.process.dump("r", 0, 4 << 20) == expected, "blocks of {block} bytes");
        far.process.ask(&format!("fill r 1 0 {} 0", 4 << 20));
    }
}

fn transfers_of_no_bytes_complete_and_move_nothing(config: Configuration) {
    let mut far = target!("target", 4096);
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::new(4096);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    for operation in [Operation::Read, Operation::Write] {
        // At the end of a region as well as inside.
        let local = [region.segment(5, 0), region.segment(4096, 0)];
        let remote = [far.region.segment(4096, 0), far.region.segment(7, 0)];
        let transfer = engine.prepare(operation, &peer, &local, &remote).unwrap().transfer();
        end_of(&transfer).unwrap();
        transfer.post_with_notification(b"nothing").unwrap();
        corelane_tests::outcome(&transfer).unwrap();
        assert_eq!(far.process.ask("take 1"), "initiator:6e6f7468696e67");
    }
    near.assert_poison(0, 4096);
    far.assert_pattern(1, 0, 4096, 0);
}

fn one_source_range_can_be_read_to_many_places(config: Configuration) {
    let far = target!("target", 300_000);
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::new(3_000_000);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    for len in [100, 50_000] {
        // Overlapping sources, one of them several times.
        let places: Vec<(u64, u64)> = (0..40).map(|i| (i * 70_001, (i / 2) * 1003)).collect();
        let local: Vec<_> = places.iter().map(|&(to, _)| region.segment(to, len)).collect();
        let remote: Vec<_> =
            places.iter().map(|&(_, from)| far.region.segment(from, len)).collect();
        end_of(&engine.prepare(Operation::Read, &peer, &local, &remote).unwrap().transfer())
            .unwrap();
        for &(to, from) in &places {
            near.assert_pattern(1, to as usize, len as usize, from);
        }
    }
}

fn overlapping_destinations_stay_inside_their_ranges(config: Configuration) {
    let mut far = target!("target", 1 << 20);
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::new(1 << 20);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    for (len, step) in [(900, 300), (90_000, 30_000)] {
        // 8 ranges, each overlapping its neighbours; all from one place, so that the last bytes are known.
        let local: Vec<_> = (0..8).map(|i| region.segment(101 + i * step, len)).collect();
        let remote: Vec<_> = (0..8).map(|_| far.region.segment(77, len)).collect();
        near.poison(0, near.len());
        end_of(&engine.prepare(Operation::Read, &peer, &local, &remote).unwrap().transfer())
            .unwrap();
        let end = 101 + (7 * step + len) as usize;
        near.assert_poison(0, 101);
        near.assert_poison(end, near.len() - end);
        // Only one range reaches the first and the last bytes.
        near.assert_pattern(1, 101, step as usize, 77);
        near.assert_pattern(1, end - step as usize, step as usize, 77 + len - step);

        far.process.ask(&format!("poison r 0 {}", 1 << 20));
        near.fill(6, 0, near.len(), 0);
        let local: Vec<_> = (0..8).map(|_| region.segment(77, len)).collect();
        let remote: Vec<_> = (0..8).map(|i| far.region.segment(101 + i * step, len)).collect();
        end_of(&engine.prepare(Operation::Write, &peer, &local, &remote).unwrap().transfer())
            .unwrap();
        far.assert_poison(0, 101);
        far.assert_poison(end, (1 << 20) - end);
        far.assert_pattern(6, 101, step as usize, 77);
        far.process.ask(&format!("fill r 1 0 {} 0", 1 << 20));
    }
}

fn one_gibibyte_arrives_in_one_transfer(config: Configuration) {
    const LEN: usize = 1 << 30;
    let far = target!("target", LEN, "read", "");
    let engine = Engine::new("initiator", config()).unwrap();
    let near = Buffer::new(LEN);
    let region = near.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let plan = engine
        .prepare(
            Operation::Read,
            &peer,
            &[region.segment(0, LEN as u64)],
            &[far.region.segment(0, LEN as u64)],
        )
        .unwrap();
    end_of(&plan.transfer()).unwrap();
    near.assert_pattern(1, 0, LEN, 0);
    assert!(engine.stats().totals.bytes_read >= LEN as u64);
}

fn two_processes_read_from_and_write_to_each_other_at_the_same_time(config: Configuration) {
    const LEN: usize = 3_000_001;
    let mut far = target!("far", LEN);
    let engine = Engine::new("near", config()).unwrap();
    let (shared, fetched) = (Buffer::with_pattern(7, LEN), Buffer::new(LEN));
    let region = shared.register(&engine, Access::READ_WRITE);
    let fetched_region = fetched.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    far.process.load(&engine.metadata());
    far.process.region("fetched", LEN, "local");
    let descriptor = corelane_tests::to_hex(&region.descriptor().to_bytes());
    let plan = engine
        .prepare(
            Operation::Read,
            &peer,
            &[fetched_region.segment(0, LEN as u64)],
            &[far.region.segment(0, LEN as u64)],
        )
        .unwrap();
    let transfer = plan.transfer();
    for _ in 0..20 {
        fetched.poison(0, LEN);
        transfer.post().unwrap();
        far.process.ask(&format!("read near fetched 0 {descriptor} 0 {LEN}"));
        corelane_tests::outcome(&transfer).unwrap();
        fetched.assert_pattern(1, 0, LEN, 0);
        far.process.ask(&format!("check fetched 7 0 {LEN} 0"));
    }
}
