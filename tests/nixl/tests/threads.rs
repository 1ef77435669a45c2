//! Calls from many threads at once. Under sync mode NONE an agent does not lock: whatever uses what it knows may be called by
//! all threads at once, and that is what several of these tests do. Whatever changes what it knows (metadata, regions,
//! peers) may not, since its own tables would break; the agents of those tests lock for themselves, and the backend
//! is called concurrently all the same. `virtual_functions.rs` calls everything at once without an agent.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use corelane_nixl_tests::{
    Agent, Notify, Operation, Settings, Status, assert_quiet, collect, exchange, range, target,
};
use corelane_tests::{BOUND, Buffer, Random, pin_process};

#[test]
fn threads_with_requests_of_their_own() {
    let (threads, len) = (8, 64 << 10);
    let mut far = target!("target", threads * len);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(threads * len));
    agent.register(&near);
    far.introduce_to(&agent);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (agent, near, far) = (&agent, &near, &far);
            scope.spawn(move || {
                let mut random = Random::new(thread as u64);
                for _ in 0..200 {
                    let at = random.below(len);
                    let size = 1 + random.below(len - at);
                    let here = range(near, thread * len + at, size);
                    let there = far.range(thread * len + at, size);
                    near.poison(thread * len, len);
                    let request =
                        agent.prepare(Operation::Read, &[here], "target", &[there]).unwrap();
                    request.run_with(Notify::With(&[thread as u8])).unwrap();
                    near.assert_pattern(1, thread * len + at, size, (thread * len + at) as u64);
                    near.assert_poison(thread * len, at);
                }
            });
        }
    });
    // Each notification once.
    let answer = far.process.ask(&format!("take {}", threads * 200));
    for thread in 0..threads {
        let word = format!("initiator:{thread:02x}");
        assert_eq!(answer.split_whitespace().filter(|w| **w == word).count(), 200);
    }
    far.process.ask("quiet");
}

#[test]
fn one_request_asked_by_many_threads() {
    let mut far = target!("target", 4 << 20);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(4 << 20));
    agent.register(&near);
    far.introduce_to(&agent);
    let lists = ([range(&near, 0, 4 << 20)], [far.range(0, 4 << 20)]);
    let request = agent.prepare(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    for _ in 0..20 {
        near.poison(0, near.len());
        assert!(request.post(Notify::With(b"n")).0 >= 0);
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| request.wait().unwrap());
            }
        });
        near.assert_pattern(1, 0, near.len(), 0);
        far.assert_notifications("initiator", &[b"n"]);
    }
    far.process.ask("quiet");
}

#[test]
fn notifications_taken_by_several_threads_come_once() {
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    a.exchange_metadata(&b);
    let (senders, count) = (4u8, 1000u64);
    let (got, taken) = (Mutex::new(Vec::new()), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for sender in 0..senders {
            let a = &a;
            scope.spawn(move || {
                for number in 0..count {
                    let payload = [&[sender], number.to_le_bytes().as_slice()].concat();
                    a.notify("b", &payload).unwrap();
                }
            });
        }
        for _ in 0..3 {
            scope.spawn(|| {
                let deadline = Instant::now() + BOUND;
                while taken.load(Ordering::Relaxed) < u64::from(senders) * count {
                    assert!(Instant::now() < deadline, "{taken:?} notifications taken");
                    let new = b.notifications();
                    taken.fetch_add(new.len() as u64, Ordering::Relaxed);
                    got.lock().unwrap().extend(new);
                    std::thread::yield_now();
                }
            });
        }
    });
    let mut payloads: Vec<_> = got.into_inner().unwrap().into_iter().map(|m| m.payload).collect();
    payloads.sort();
    payloads.dedup();
    assert_eq!(payloads.len() as u64, u64::from(senders) * count);
    assert_quiet(&b);
}

/// What vLLM does: one thread meets peers and prepares, one transfers, one polls, one registers; here all at once, and
/// agents come and go beside them.
fn everything_at_once(progress_thread: bool) {
    let len = 1 << 20;
    let settings = Settings { progress_thread, locking: true, ..Settings::default() };
    let (a, near) = (Agent::with("a", &settings), Buffer::new(len));
    a.register(&near);
    let mut far = target!("target", len);
    far.introduce_to(&a);
    let metadata = far.metadata();
    far.load(&a);
    let (stop, spare) = (AtomicBool::new(false), Buffer::with_pattern(5, len));
    let moved = AtomicU64::new(0);
    std::thread::scope(|scope| {
        // Reads, byte for byte.
        scope.spawn(|| {
            let half = len / 2;
            while !stop.load(Ordering::Relaxed) {
                near.poison(0, half);
                let (local, remote) = (range(&near, 0, half), far.range(0, half));
                let request = a.prepare(Operation::Read, &[local], "target", &[remote]).unwrap();
                request.run().unwrap();
                near.assert_pattern(1, 0, half, 0);
                moved.fetch_add(1, Ordering::Relaxed);
            }
        });
        // Metadata, again and again.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(a.load(&metadata).as_deref(), Ok("target"));
                assert!(a.knows("target"));
                assert!(!a.metadata().is_empty());
                a.connect("target").unwrap();
            }
        });
        // Peers that come and go.
        scope.spawn(|| {
            let mut life = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let b = Agent::with("b", &settings);
                let memory = Buffer::with_pattern(life, 4096);
                b.register(&memory);
                assert_eq!(a.load(&b.metadata()).as_deref(), Ok("b"));
                let (local, remote) = (range(&near, len - 4096, 4096), range(&memory, 0, 4096));
                a.transfer(Operation::Read, &[local], "b", &[remote]).unwrap();
                near.assert_pattern(life, len - 4096, 4096, 0);
                a.notify("b", b"bye").unwrap();
                assert_eq!(collect(&b, 1)[0].payload, b"bye");
                a.invalidate("b").unwrap();
                life += 1;
            }
        });
        // Memory.
        scope.spawn(|| {
            let mut random = Random::new(3);
            while !stop.load(Ordering::Relaxed) {
                let at = random.below(len - 1);
                let one = range(&spare, at, 1 + random.below(len - at));
                a.register_ranges(&[one], 0).unwrap();
                assert_eq!(a.query(&[one]), [true]);
                a.deregister_ranges(&[one], 0).unwrap();
            }
        });
        // Notifications to oneself.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                a.notify("a", b"self").unwrap();
                assert!(collect(&a, 1).iter().all(|m| m.payload == b"self"));
            }
        });
        std::thread::sleep(Duration::from_secs(6));
        stop.store(true, Ordering::Relaxed);
    });
    assert!(moved.load(Ordering::Relaxed) > 0);
    let lists = ([range(&near, 0, len)], [far.range(0, len)]);
    a.transfer(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    near.assert_pattern(1, 0, len, 0);
}

#[test]
fn every_verb_at_once() {
    everything_at_once(true);
}

#[test]
fn every_verb_at_once_without_a_progress_thread() {
    everything_at_once(false);
}

#[test]
fn a_peer_forgotten_while_others_use_it() {
    let mut far = target!("target", 1 << 20);
    let settings = Settings { locking: true, ..Settings::default() };
    let (agent, near) = (Agent::with("initiator", &settings), Buffer::new(1 << 20));
    agent.register(&near);
    let metadata = far.metadata();
    agent.load(&metadata).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (agent, near, far, stop) = (&agent, &near, &far, &stop);
            scope.spawn(move || {
                let (at, len) = (thread * (256 << 10), 256 << 10);
                while !stop.load(Ordering::Relaxed) {
                    let lists = ([range(near, at, len)], [far.range(at, len)]);
                    let end = agent
                        .prepare(Operation::Read, &lists.0, "target", &lists.1)
                        .and_then(|request| request.run());
                    match end {
                        Ok(()) => near.assert_pattern(1, at, len, at as u64),
                        Err(status) => {
                            let known =
                                [Status::NOT_FOUND, Status::CANCELED, Status::REMOTE_DISCONNECT];
                            assert!(known.contains(&status), "{status}");
                        }
                    }
                }
            });
        }
        for _ in 0..60 {
            std::thread::sleep(Duration::from_millis(30));
            let _ = agent.invalidate("target");
            let _ = agent.load(&metadata);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let _ = agent.invalidate("target");
    assert_eq!(agent.load(&metadata).as_deref(), Ok("target"));
    let lists = ([range(&near, 0, 1 << 20)], [far.range(0, 1 << 20)]);
    agent.transfer(Operation::Read, &lists.0, "target", &lists.1).unwrap();
    near.assert_pattern(1, 0, 1 << 20, 0);
}

#[test]
fn both_sides_at_once_on_one_core() {
    let core = corelane_nixl_tests::shared_core();
    // Only this thread and those it starts.
    std::thread::spawn(move || {
        pin_process(core);
        let (a, b) = (Agent::new("a"), Agent::new("b"));
        a.exchange_metadata(&b);
        std::thread::scope(|scope| {
            scope.spawn(|| exchange(&b, &["a"], 500).unwrap());
            exchange(&a, &["b"], 500).unwrap();
        });
    })
    .join()
    .unwrap();
}
