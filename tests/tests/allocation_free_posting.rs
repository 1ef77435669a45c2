//! Posting and completing a prepared transfer allocates nothing. Alone in its binary, since it counts what all threads
//! of the process allocate.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane::{Access, AssistMode, Engine, Operation};
use corelane_tests::{
    Beside, Buffer, Configuration, CountingAllocator, assert_allocation_free, end_of,
    exempt_harness, local_config, rdma_config, target, tcp_config,
};

#[global_allocator]
static ALLOCATIONS: CountingAllocator = CountingAllocator::new();

#[test]
fn posting_and_completing_a_prepared_transfer_allocates_nothing() {
    allocates_nothing(&[local_config, tcp_config]);
}

mod rdma {
    #[test]
    #[ignore = "needs an RDMA device: tests/run.sh rdma"]
    fn posting_and_completing_a_prepared_transfer_allocates_nothing() {
        super::allocates_nothing(&[super::rdma_config]);
    }
}

fn allocates_nothing(configurations: &[Configuration]) {
    exempt_harness();
    let counted = ALLOCATIONS.count();
    drop(std::hint::black_box(vec![1u8; 100]));
    assert!(ALLOCATIONS.count() > counted, "the allocator does not count");
    let modes = [AssistMode::Auto, AssistMode::Always, AssistMode::Never];
    let each = modes
        .into_iter()
        .flat_map(|mode| configurations.iter().map(move |config| (mode, config())));
    for (assist, mut config) in each {
        config.assist = assist;
        let transports = config.transports.clone();
        let far = target!("far", 64 << 10);
        let engine = Engine::new("near", config).unwrap();
        let near = Buffer::new(64 << 10);
        let region = near.register(&engine, Access::LOCAL);
        let peer = engine.load_peer(&far.metadata).unwrap();
        for (count, len) in [(1, 64), (1, 4096), (16, 256)] {
            let local: Vec<_> = (0..count).map(|i| region.segment(i * 2048, len)).collect();
            let remote: Vec<_> = (0..count).map(|i| far.region.segment(i * 1024, len)).collect();
            let transfers = [Operation::Read, Operation::Write].map(|operation| {
                engine.prepare(operation, &peer, &local, &remote).unwrap().transfer()
            });
            let run = |rounds: usize| {
                for _ in 0..rounds {
                    for transfer in &transfers {
                        end_of(transfer).unwrap();
                    }
                }
            };
            run(500);
            let what =
                format!("20 transfers of {count} x {len} B, assist {assist:?}, {transports:?}");
            let beside = match assist {
                AssistMode::Auto => Beside::Surroundings,
                _ => Beside::Nothing,
            };
            assert_allocation_free(&what, beside, || ALLOCATIONS.count(), || run(10));
            near.assert_pattern(1, 0, len as usize, 0);
        }
        assert_eq!(engine.stats().totals.failed, 0);
    }
}
