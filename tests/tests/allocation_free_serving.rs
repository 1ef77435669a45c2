//! Serving the transfers of others allocates nothing either, counted in the process that serves.

use corelane::{Access, Engine, Operation};
use corelane_tests::{Beside, Buffer, assert_allocation_free, end_of, target, tcp_config};

#[test]
fn serving_reads_and_writes_allocates_nothing() {
    for settings in ["", "assist=always", "assist=never"] {
        let mut far = target!("far", 64 << 10, "read-write", settings);
        let engine = Engine::new("near", tcp_config()).unwrap();
        let near = Buffer::with_pattern(1, 64 << 10);
        let region = near.register(&engine, Access::LOCAL);
        let peer = engine.load_peer(&far.metadata).unwrap();
        for (count, len) in [(1, 64), (16, 256)] {
            let local: Vec<_> = (0..count).map(|i| region.segment(i * 1024, len)).collect();
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
            let served = far.process.number("served");
            let what = format!("serving 20 transfers of {count} x {len} B");
            let beside = if settings.is_empty() { Beside::Surroundings } else { Beside::Nothing };
            assert_allocation_free(&what, beside, || far.process.number("allocations"), || run(10));
            assert_eq!(far.process.number("served"), served + 2000);
        }
        // It does count: a new connection allocates.
        let before = far.process.number("allocations");
        peer.disconnect().unwrap();
        peer.connect(corelane_tests::BOUND).unwrap();
        assert!(far.process.number("allocations") > before);
    }
}
