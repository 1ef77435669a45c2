//! Who hands a transfer to the kernel: the thread that posts it, or the lane. Alone in its binary, since it changes how
//! threads of this process are scheduled.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::Duration;

use corelane::{Access, AssistMode, Engine, LaneSpec, Operation, Spin};
use corelane_tests::{Buffer, allowed_cores, end_of, outcome, pin_process, target, tcp_config};

const LEN: usize = 4096;

/// The lanes of this process run when nobody else wants their core, and never push another thread from it.
fn let_lanes_go_last() {
    let mut found = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        if !std::fs::read_to_string(path.join("comm")).unwrap().starts_with("corelane-") {
            continue;
        }
        let id: i32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let priority = libc::sched_param { sched_priority: 0 };
        // SAFETY: a thread of this process; the kernel only reads the parameter.
        let result = unsafe { libc::sched_setscheduler(id, libc::SCHED_IDLE, &raw const priority) };
        assert_eq!(result, 0, "SCHED_IDLE for a thread of our own");
        found += 1;
    }
    assert!(found > 0, "no thread is a lane");
}

/// How many of `tries` postings had sent their request when `post` returned.
fn sent_at_once(far: &corelane_tests::Target, inline_bytes: usize, tries: u64) -> u64 {
    let mut config = tcp_config();
    config.inline_bytes = inline_bytes;
    config.assist = AssistMode::Always;
    config.lanes = LaneSpec::Cores(vec![allowed_cores()[0]]);
    config.spin = Spin::For(Duration::ZERO);
    let engine = Engine::new("near", config).unwrap();
    let memory = Buffer::new(LEN);
    let region = memory.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let (local, remote) = ([region.segment(0, LEN as u64)], [far.region.segment(0, LEN as u64)]);
    let transfer = engine.prepare(Operation::Read, &peer, &local, &remote).unwrap().transfer();
    end_of(&transfer).unwrap();
    let_lanes_go_last();
    let mut count = 0;
    for _ in 0..tries {
        // The lane sleeps, and this thread begins with a fresh time slice.
        std::thread::sleep(Duration::from_millis(1));
        let before = engine.stats().totals.requests_sent;
        transfer.post().unwrap();
        count += engine.stats().totals.requests_sent - before;
        outcome(&transfer).unwrap();
        memory.assert_pattern(1, 0, LEN, 0);
        memory.poison(0, LEN);
    }
    engine.shutdown().unwrap();
    count
}

#[test]
fn a_transfer_of_at_most_so_many_bytes_is_sent_by_the_thread_that_posts_it() {
    const TRIES: u64 = 200;
    let far = target!("far", LEN);
    // The lane has no other core to run on while this thread runs.
    pin_process(allowed_cores()[0]);
    let counts = [0, LEN - 1, LEN, LEN + 1, usize::MAX]
        .map(|inline_bytes| sent_at_once(&far, inline_bytes, TRIES));
    // Now and then this thread is stopped between two lines, and the lane runs.
    for never in &counts[..2] {
        assert!(*never <= TRIES / 4, "{counts:?} of {TRIES}");
    }
    for always in &counts[2..] {
        assert!(*always >= TRIES * 3 / 4, "{counts:?} of {TRIES}");
    }
}
