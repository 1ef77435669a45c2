//! The backend without an agent: calls in any order, from any thread, and what lives how long.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::atomic::{AtomicBool, Ordering};

use corelane_nixl_tests::{
    Couple, Engine, MetaDescriptor, Operation, Range, Status, descriptor, range,
};
use corelane_tests::{Buffer, Random, eventually};

const LEN: usize = Couple::LEN;

#[track_caller]
fn arrives(engine: &Engine, from: &str, payload: &[u8]) {
    let mut got = Vec::new();
    eventually("a notification", || {
        got.extend(engine.notifications());
        !got.is_empty()
    });
    assert!(got.len() == 1 && got[0].from == from && got[0].payload == payload, "{got:?}");
}

#[test]
fn the_same_bytes_on_every_call() {
    let couple = Couple::new(&[]);
    let (info, data) = (couple.b().conn_info(), couple.b().public_data(couple.exported));
    couple.reads();
    for _ in 0..100 {
        assert!(couple.b().conn_info() == info);
        assert!(couple.b().public_data(couple.exported) == data);
    }
    assert!(!info.is_empty() && !data.is_empty());
    assert_ne!(couple.a.conn_info(), info);
}

#[test]
fn regions_are_loaded_before_the_connection_info() {
    let (near, far) = (Buffer::new(4096), Buffer::with_pattern(1, 4096));
    let (a, b) = (Engine::new("a", &[]), Engine::new("b", &[]));
    let (here, exported) = (
        a.register(range(&near, 0, 4096), 0).unwrap(),
        b.register(range(&far, 0, 4096), 0).unwrap(),
    );
    let there = a.load_remote(range(&far, 0, 4096), 3, &b.public_data(exported), "b").unwrap();
    let lists =
        ([descriptor(range(&near, 0, 4096), here)], [descriptor(range(&far, 0, 4096), there)]);
    assert_eq!(a.prepare(Operation::Read, &lists.0, &lists.1, "b"), Err(Status::NOT_FOUND));
    assert_eq!(a.load_conn_info("b", &b.conn_info()), Status::SUCCESS);
    let handle = a.prepare(Operation::Read, &lists.0, &lists.1, "b").unwrap();
    assert!(a.post(Operation::Read, &lists.0, &lists.1, "b", handle, None).0 >= 0);
    assert_eq!(a.wait(handle), Status::SUCCESS);
    near.assert_pattern(1, 0, 4096, 0);
    assert_eq!(a.release(handle), Status::SUCCESS);
    assert_eq!([a.unload(there), a.disconnect("b")], [Status::SUCCESS; 2]);
}

#[test]
fn connection_info_for_a_known_name_replaces_what_was_known() {
    let mut couple = Couple::new(&[]);
    couple.reads();
    couple.b = None;
    // Nobody told the first engine to disconnect.
    let b = Engine::new("b", &[]);
    couple.exported = b.register(range(&couple.far, 0, LEN), 0).unwrap();
    assert_eq!(couple.a.load_conn_info("b", &b.conn_info()), Status::SUCCESS);
    assert_eq!(couple.a.unload(couple.there), Status::SUCCESS);
    let data = b.public_data(couple.exported);
    couple.there = couple.a.load_remote(range(&couple.far, 0, LEN), 0, &data, "b").unwrap();
    couple.b = Some(b);
    couple.reads();
    // The same info again changes nothing.
    assert_eq!(couple.a.load_conn_info("b", &couple.b().conn_info()), Status::SUCCESS);
    couple.reads();
}

#[test]
fn what_was_unloaded_after_prepare_is_not_needed_to_post() {
    let couple = Couple::new(&[]);
    let handle = couple.prepare(Operation::Read);
    assert_eq!(couple.a.unload(couple.there), Status::SUCCESS);
    // NIXL posts with the lists that it has kept, pointers to what is gone included.
    assert!(couple.post(Operation::Read, handle, Some(b"posted")).0 >= 0);
    assert_eq!(couple.a.wait(handle), Status::SUCCESS);
    couple.near.assert_pattern(1, 0, LEN, 0);
    arrives(couple.b(), "a", b"posted");
    assert_eq!(couple.a.release(handle), Status::SUCCESS);
    assert_eq!(couple.a.disconnect("b"), Status::SUCCESS);
}

#[test]
fn asking_and_releasing_after_unload_and_disconnect() {
    for posted in [false, true] {
        for ended in [false, true] {
            let couple = Couple::new(&[("linger_ms", "100"), ("operation_timeout_ms", "5000")]);
            let handle = couple.prepare(Operation::Read);
            if posted {
                assert!(couple.post(Operation::Read, handle, None).0 >= 0);
                if ended {
                    assert_eq!(couple.a.wait(handle), Status::SUCCESS);
                }
            }
            assert_eq!(couple.a.unload(couple.there), Status::SUCCESS);
            assert_eq!(couple.a.disconnect("b"), Status::SUCCESS);
            if posted {
                let end = couple.a.wait(handle);
                let allowed: &[Status] =
                    if ended { &[Status::SUCCESS] } else { &[Status::SUCCESS, Status::CANCELED] };
                assert!(allowed.contains(&end), "{end}");
                assert_eq!(couple.a.check(handle), end);
            }
            couple.a.release_for_good(handle);
            couple.near.poison(0, LEN);
            std::thread::sleep(std::time::Duration::from_millis(5));
            couple.near.assert_poison(0, LEN);
        }
    }
}

#[test]
fn posting_what_was_not_prepared_is_refused() {
    let couple = Couple::new(&[]);
    let handle = couple.prepare(Operation::Read);
    let (l, r) = (|at, len| couple.local(at, len), |at, len| couple.remote(at, len));
    let post = |local: &[MetaDescriptor], remote: &[MetaDescriptor]| {
        couple.a.post(Operation::Read, local, remote, "b", handle, Some(b"never"))
    };
    for (local, remote) in [
        (vec![], vec![]),
        (vec![l(0, LEN)], vec![]),
        (vec![l(0, LEN), l(0, 1)], vec![r(0, LEN), r(0, 1)]),
        (vec![l(0, LEN)], vec![r(0, LEN), r(0, 1)]),
        (vec![l(0, LEN - 1)], vec![r(0, LEN - 1)]),
        (vec![l(0, LEN)], vec![r(0, LEN - 1)]),
    ] {
        assert_eq!(post(&local, &remote), Status::INVALID_PARAM, "{local:?} {remote:?}");
    }
    couple.near.assert_poison(0, LEN);
    assert!(couple.post(Operation::Read, handle, Some(b"this")).0 >= 0);
    assert_eq!(couple.a.wait(handle), Status::SUCCESS);
    couple.near.assert_pattern(1, 0, LEN, 0);
    arrives(couple.b(), "a", b"this");
    assert_eq!(couple.a.release(handle), Status::SUCCESS);
    assert!(couple.b().notifications().is_empty());
}

#[test]
fn an_engine_moves_within_itself() {
    let (engine, memory) = (Engine::new("a", &[]), Buffer::with_pattern(1, 8192));
    let registered = engine.register(range(&memory, 0, 8192), 0).unwrap();
    let local = engine.load_local(registered).unwrap();
    assert_eq!(engine.connect("a"), Status::SUCCESS);
    let lists = (
        [descriptor(range(&memory, 4096, 4096), registered)],
        [descriptor(range(&memory, 0, 4096), local)],
    );
    let handle = engine.prepare(Operation::Read, &lists.0, &lists.1, "a").unwrap();
    assert!(engine.post(Operation::Read, &lists.0, &lists.1, "a", handle, Some(b"me")).0 >= 0);
    assert_eq!(engine.wait(handle), Status::SUCCESS);
    memory.assert_pattern(1, 4096, 4096, 0);
    arrives(&engine, "a", b"me");
    // For its own metadata: unloadMD, then deregisterMem, then what is left of the request.
    assert_eq!(engine.unload(local), Status::SUCCESS);
    assert_eq!(engine.deregister(registered), Status::SUCCESS);
    assert_eq!(engine.check(handle), Status::SUCCESS);
    engine.release_for_good(handle);
    assert_eq!(engine.disconnect("a"), Status::SUCCESS);
    assert_eq!(engine.connect("a"), Status::SUCCESS);
}

#[test]
fn deregistering_waits_until_the_memory_is_quiet() {
    for round in 0..20 {
        let couple = Couple::new(&[]);
        couple.reads();
        let handle = couple.prepare(Operation::Read);
        assert!(couple.post(Operation::Read, handle, None).0 >= 0, "round {round}");
        assert_eq!(couple.a.deregister(couple.here), Status::SUCCESS);
        couple.near.poison(0, LEN);
        std::thread::sleep(std::time::Duration::from_millis(3));
        couple.near.assert_poison(0, LEN);
        let _ = couple.a.wait(handle);
        couple.a.release_for_good(handle);
    }
}

#[test]
fn an_engine_is_destroyed_with_everything_still_there() {
    for _ in 0..10 {
        let couple = Couple::new(&[]);
        for _ in 0..10 {
            let handle = couple.prepare(Operation::Read);
            assert!(couple.post(Operation::Read, handle, Some(b"n")).0 >= 0);
        }
        let _idle = couple.prepare(Operation::Write);
        // Nothing was released, unloaded, deregistered or disconnected.
        let Couple { a, near, b, .. } = couple;
        drop(a);
        near.poison(0, LEN);
        std::thread::sleep(std::time::Duration::from_millis(3));
        near.assert_poison(0, LEN);
        drop(b);
    }
}

#[test]
fn memory_is_asked_about() {
    let (engine, memory) = (Engine::new("a", &[]), Buffer::new(10_000));
    let one = engine.register(range(&memory, 100, 1000), 0).unwrap();
    let two = engine.register(range(&memory, 5000, 1000), 0).unwrap();
    let questions: Vec<Range> = [(100, 1000), (99, 10), (1099, 2), (2000, 10), (5500, 500)]
        .map(|(at, len)| range(&memory, at, len))
        .to_vec();
    assert_eq!(engine.query(&questions), [true, false, false, false, true]);
    assert_eq!(engine.query(&[]), Vec::<bool>::new());
    assert_eq!(engine.query(&[(u64::MAX, 2), (0, usize::MAX)]), [false, false]);
    assert_eq!([engine.deregister(one), engine.deregister(two)], [Status::SUCCESS; 2]);
    assert_eq!(engine.query(&questions), [false; 5]);
}

#[test]
fn memory_views_are_not_supported() {
    let couple = Couple::new(&[]);
    assert_eq!(couple.a.memory_views(&[couple.local(0, 64)]), [Status::NOT_SUPPORTED; 2]);
}

#[test]
fn an_estimate_needs_history() {
    let couple = Couple::new(&[]);
    let handle = couple.prepare(Operation::Read);
    let lists = ([couple.local(0, LEN)], [couple.remote(0, LEN)]);
    let estimate = || couple.a.estimate(Operation::Read, &lists.0, &lists.1, "b", handle);
    assert_eq!(estimate(), Err(Status::NOT_SUPPORTED));
    couple.reads();
    let (duration, margin, method) = estimate().unwrap();
    assert!(duration > 0 && margin >= 0 && method == 0, "{duration} {margin} {method}");
    assert_eq!(couple.a.release(handle), Status::SUCCESS);
}

#[test]
fn any_order_from_any_thread() {
    let couple = Couple::new(&[("linger_ms", "50"), ("operation_timeout_ms", "5000")]);
    let (info, data) = (couple.b().conn_info(), couple.b().public_data(couple.exported));
    let stop = AtomicBool::new(false);
    let known = [Status::SUCCESS, Status::CANCELED, Status::NOT_FOUND, Status::REMOTE_DISCONNECT];
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (couple, stop, info, data) = (&couple, &stop, &info, &data);
            scope.spawn(move || {
                let mut random = Random::new(thread as u64);
                let (at, len) = (thread * (LEN / 4), LEN / 4);
                while !stop.load(Ordering::Relaxed) {
                    let Ok(there) = couple.a.load_remote(range(&couple.far, 0, LEN), 0, data, "b")
                    else {
                        panic!("loading a region");
                    };
                    let local = [couple.local(at, len)];
                    let remote = [descriptor(range(&couple.far, at, len), there)];
                    let handle = match couple.a.prepare(Operation::Read, &local, &remote, "b") {
                        Ok(handle) => handle,
                        Err(status) => {
                            assert_eq!(status, Status::NOT_FOUND);
                            couple.a.load_conn_info("b", info);
                            couple.a.unload(there);
                            continue;
                        }
                    };
                    let unload_first = random.below(2) == 0;
                    if unload_first {
                        assert_eq!(couple.a.unload(there), Status::SUCCESS);
                    }
                    let posted = couple.a.post(Operation::Read, &local, &remote, "b", handle, None);
                    if random.below(3) > 0 && posted.0 >= 0 {
                        let end = couple.a.wait(handle);
                        assert!(known.contains(&end), "{end}");
                        if end == Status::SUCCESS {
                            couple.near.assert_pattern(1, at, len, at as u64);
                        }
                    }
                    couple.a.release_for_good(handle);
                    couple.near.poison(at, len);
                    if !unload_first {
                        assert_eq!(couple.a.unload(there), Status::SUCCESS);
                    }
                    couple.near.assert_poison(at, len);
                }
            });
        }
        // Everything else beside it.
        for thread in 0..2 {
            let (couple, stop, info, data) = (&couple, &stop, &info, &data);
            scope.spawn(move || {
                let (mut random, spare) = (Random::new(100 + thread), Buffer::new(1 << 16));
                let b = couple.b();
                while !stop.load(Ordering::Relaxed) {
                    let engine = if random.below(2) == 0 { &couple.a } else { b };
                    let at = random.below(1 << 15);
                    let one = range(&spare, at, 1 + random.below(1 << 15));
                    let registered = engine.register(one, 0).unwrap();
                    let local = engine.load_local(registered).unwrap();
                    assert!(!engine.public_data(registered).is_empty());
                    assert_eq!(engine.query(&[one]), [true]);
                    assert!(b.conn_info() == *info && b.public_data(couple.exported) == *data);
                    let status = couple.a.notify("b", &[thread as u8; 100]);
                    assert!(known.contains(&status), "{status}");
                    assert!(couple.b().notifications().iter().all(|m| m.payload.len() == 100));
                    assert!(couple.a.notifications().is_empty());
                    assert_eq!(engine.unload(local), Status::SUCCESS);
                    assert_eq!(engine.deregister(registered), Status::SUCCESS);
                }
            });
        }
        for round in 0..60 {
            std::thread::sleep(std::time::Duration::from_millis(40));
            if round % 4 == 3 {
                couple.a.disconnect("b");
            } else {
                couple.a.connect("b");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(couple.a.load_conn_info("b", &info), Status::SUCCESS);
    couple.reads();
}
