//! Engines come and go without leaving anything behind. Alone in its binary, since it counts what the process has.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane::{Access, Engine, Operation};
use corelane_tests::{
    Buffer, collect, end_of, eventually, local_config, mappings, open_files, resident_bytes,
    target, tcp_config, threads,
};

#[test]
fn a_hundred_engines_one_after_another_leak_no_file_thread_or_memory() {
    const LEN: usize = 300_000;
    let far = target!("far", LEN);
    let memory = Buffer::new(LEN);
    let mut before = None;
    for round in 0..110 {
        let config = if round % 4 < 2 { local_config() } else { tcp_config() };
        let engine = Engine::new("near", config).unwrap();
        let region = memory.register(&engine, Access::LOCAL);
        let peer = engine.load_peer(&far.metadata).unwrap();
        for len in [10, LEN as u64] {
            memory.poison(0, LEN);
            let plan = engine.prepare(
                Operation::Read,
                &peer,
                &[region.segment(0, len)],
                &[far.region.segment(0, len)],
            );
            end_of(&plan.unwrap().transfer()).unwrap();
            memory.assert_pattern(1, 0, len as usize, 0);
        }
        // Every other one is shut down by its last handle, with all that belongs to it still there.
        let transfer = plan_to_itself(&engine, &memory);
        if round % 2 == 0 {
            engine.shutdown().unwrap();
        } else {
            drop((peer, region, engine));
        }
        drop(transfer);
        if round == 9 {
            // Warm: what is allocated once is there.
            eventually("the threads are gone", || threads() <= 4);
            before =
                Some((open_files(std::process::id()), threads(), mappings(), resident_bytes()));
        }
    }
    let (files, tasks, maps, resident) = before.unwrap();
    eventually("files and threads are gone", || {
        open_files(std::process::id()) <= files && threads() <= tasks
    });
    let grown = mappings().saturating_sub(maps);
    assert!(grown < 20, "{grown} more mappings after 100 engines");
    let grown = resident_bytes().saturating_sub(resident);
    assert!(grown < 16 << 20, "{grown} more bytes after 100 engines");

    // Side by side, too.
    let engines: Vec<Engine> =
        (0..20).map(|i| Engine::new(&format!("engine-{i}"), local_config()).unwrap()).collect();
    for pair in engines.windows(2) {
        pair[0].load_peer(&pair[1].metadata()).unwrap().notify(b"hello").unwrap();
        assert_eq!(&*collect(&pair[1], 1)[0].from, pair[0].agent_name());
    }
    drop(engines);
    eventually("files and threads are gone", || {
        open_files(std::process::id()) <= files && threads() <= tasks
    });
}

/// A transfer that was posted and ended, and outlives its engine.
fn plan_to_itself(engine: &Engine, memory: &Buffer) -> corelane::Transfer {
    let peer = engine.load_peer(&engine.metadata()).unwrap();
    let region = memory.register(engine, Access::READ_WRITE);
    let plan = engine.prepare(
        Operation::Write,
        &peer,
        &[region.segment(0, 1000)],
        &[region.descriptor().segment(2000, 1000)],
    );
    let transfer = plan.unwrap().transfer();
    end_of(&transfer).unwrap();
    transfer
}
