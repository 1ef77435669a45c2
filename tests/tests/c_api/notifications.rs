//! Notifications.

use std::ffi::{c_char, c_void};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use corelane_tests::{eventually, pattern};

use crate::api::*;

const MAX: usize = 16 << 20;

#[test]
fn notifications_of_every_size_arrive_once_and_in_order() {
    let (near, far) = (Engine::new("near"), Engine::new("far"));
    let conn = near.load(&far.metadata());
    let sizes = [0, 1, 0, 7, 100, 4096, 65_536, 65_537, 1 << 20, 0, MAX, 3];
    for (seed, len) in sizes.into_iter().enumerate() {
        send(conn, &pattern(seed as u64, 0, len));
    }
    let all = far.collect(sizes.len());
    assert_eq!(all.len(), sizes.len());
    for (seed, ((from, payload), len)) in all.iter().zip(sizes).enumerate() {
        assert_eq!(from, "near");
        assert!(*payload == pattern(seed as u64, 0, len), "number {seed}, of {len} bytes");
    }
    // The sender's name was never loaded here.
    assert_eq!(far.stats().notifications_received, sizes.len() as u64);
    assert_eq!(near.stats().notifications_sent, sizes.len() as u64);
}

#[test]
fn one_byte_too_many_is_a_limit_and_moves_nothing() {
    let pair = Pair::new(4096);
    let big = vec![7; MAX + 1];
    let bytes = big.as_ptr().cast();
    refused(c!(corelane_send_notif(pair.near.conn, bytes, big.len())), CORELANE_ERR_LIMIT);
    let xfer = pair.near.prepare(CORELANE_READ, 4096);
    refused(c!(corelane_post_notify(xfer, bytes, big.len())), CORELANE_ERR_LIMIT);
    assert_eq!(corelane_xfer_status(xfer), CORELANE_ERR_NOT_POSTED);
    pair.near.memory.assert_poison(0, 4096);
    ok(c!(corelane_post_notify(xfer, bytes, MAX)));
    assert_eq!(ended(xfer), CORELANE_OK);
    let all = pair.far.collect(1);
    assert!(all.len() == 1 && all[0].1 == big[..MAX]);
    refused(c!(corelane_post_notify(xfer, bytes, big.len())), CORELANE_ERR_LIMIT);
    assert_eq!(corelane_xfer_status(xfer), CORELANE_OK, "the last posting's answer stands");
}

#[test]
fn an_engine_can_notify_itself() {
    let engine = Engine::new("narcissus");
    let conn = engine.load(&engine.metadata());
    for round in 0..100u32 {
        send(conn, &round.to_le_bytes());
    }
    send(conn, b"");
    let all = engine.collect(101);
    for (round, (from, payload)) in all.iter().enumerate() {
        assert_eq!(from, "narcissus");
        let expected = if round < 100 { (round as u32).to_le_bytes().to_vec() } else { vec![] };
        assert_eq!(*payload, expected);
    }
    // And move bytes from itself to itself.
    let (from, to) = (Buffer::with_pattern(3, 100_000), Buffer::new(100_000));
    let region = engine.register(&from, CORELANE_ACCESS_REMOTE_READ);
    engine.register(&to, CORELANE_ACCESS_LOCAL);
    let desc = engine.import(&descriptor_of(region));
    let mut xfer = 0;
    let (here, there) = (to.address(0), from.address(0));
    ok(c!(corelane_read(conn, here, desc, there, 100_000, &raw mut xfer)));
    assert_eq!(ended(xfer), CORELANE_OK);
    to.assert_pattern(3, 0, 100_000, 0);
}

#[test]
fn a_notification_of_a_posting_comes_after_its_data() {
    let pair = Pair::new(1 << 20);
    let near = &pair.near;
    let xfer = near.prepare(CORELANE_WRITE, 1 << 20);
    for round in 2..20u64 {
        near.memory.fill(round, 0, 1 << 20, 0);
        let payload = round.to_le_bytes();
        ok(c!(corelane_post_notify(xfer, payload.as_ptr().cast(), payload.len())));
        let all = pair.far.collect(1);
        pair.far_memory.assert_pattern(round, 0, 1 << 20, 0);
        assert_eq!(all, [("near".to_owned(), payload.to_vec())]);
        assert_eq!(ended(xfer), CORELANE_OK);
        // Reposting without one sends none.
        assert_eq!(run(xfer), CORELANE_OK);
    }
    assert!(pair.far.collect(0).is_empty());
    assert_eq!(pair.far.stats().notifications_received, 18);
}

#[test]
fn waiting_for_notifications_ends_with_the_first_or_with_the_time() {
    let (near, far) = (Engine::new("near"), Engine::new("far"));
    let conn = near.load(&far.metadata());
    let wait = |timeout_ms| {
        let (mut list, mut count) = (Vec::<(String, Vec<u8>)>::new(), 7);
        let start = Instant::now();
        let context = (&raw mut list).cast();
        ok(c!(corelane_wait_notifs(far.0, timeout_ms, Some(take), context, &raw mut count)));
        assert_eq!(count, list.len());
        (list, start.elapsed())
    };
    assert!(wait(0).0.is_empty());
    let (list, took) = wait(50);
    assert!(list.is_empty() && took >= Duration::from_millis(50), "{took:?}");
    std::thread::scope(|scope| {
        // Negative: as long as it takes.
        let waiting = [-1, i64::MIN, i64::MAX, BOUND_MS].map(|timeout| {
            let waiter = scope.spawn(move || wait(timeout).0);
            std::thread::sleep(Duration::from_millis(20));
            send(conn, b"now");
            waiter.join().unwrap()
        });
        for list in waiting {
            assert_eq!(list, [("near".to_owned(), b"now".to_vec())]);
        }
    });
}

#[test]
fn a_waiter_is_told_when_its_engine_is_destroyed() {
    for timeout in [-1, BOUND_MS] {
        let engine = Engine::new("near");
        let handle = engine.0;
        std::thread::scope(|scope| {
            let waiter = scope.spawn(move || {
                let status =
                    c!(corelane_wait_notifs(handle, timeout, Some(take), null_mut(), null_mut()));
                (status, last_error())
            });
            std::thread::sleep(Duration::from_millis(50));
            ok(corelane_engine_destroy(handle));
            let (status, words) = waiter.join().unwrap();
            assert_eq!(status, CORELANE_ERR_SHUTDOWN, "{words}");
        });
    }
}

/// What a callback does that calls back.
struct Echo {
    engine: corelane_engine_t,
    back: corelane_conn_t,
    seen: usize,
    inner: Vec<(String, Vec<u8>)>,
}

unsafe extern "C" fn echo(
    context: *mut c_void,
    _: *const c_char,
    _: usize,
    payload: *const c_void,
    len: usize,
) {
    // SAFETY: the context that the test gave, whose thread is this one.
    let echo = unsafe { &mut *context.cast::<Echo>() };
    echo.seen += 1;
    ok(c!(corelane_send_notif(echo.back, payload, len)));
    let _ = corelane_xfer_status(echo.back);
    let mut stats = corelane_engine_stats::default();
    ok(c!(corelane_stats(echo.engine, &raw mut stats, size_of_val(&stats))));
    let inner = (&raw mut echo.inner).cast();
    ok(c!(corelane_get_notifs(echo.engine, Some(take), inner, null_mut())));
}

#[test]
fn a_callback_may_call_the_library() {
    let (near, far) = (Engine::new("near"), Engine::new("far"));
    let conn = near.load(&far.metadata());
    let back = far.load(&near.metadata());
    for round in 0..50u8 {
        send(conn, &[round; 100]);
    }
    let mut context = Echo { engine: far.0, back, seen: 0, inner: Vec::new() };
    let deadline = Instant::now() + BOUND;
    while context.seen + context.inner.len() < 50 {
        assert!(Instant::now() < deadline, "{} seen", context.seen);
        let at = (&raw mut context).cast();
        ok(c!(corelane_wait_notifs(far.0, 100, Some(echo), at, null_mut())));
    }
    assert_eq!(context.seen + context.inner.len(), 50);
    assert!(context.seen > 0);
    let echoed = near.collect(context.seen);
    assert_eq!(echoed.len(), context.seen);
    assert!(echoed.iter().all(|(from, payload)| from == "far" && payload.len() == 100));
}

unsafe extern "C" fn destroy(
    context: *mut c_void,
    _: *const c_char,
    _: usize,
    _: *const c_void,
    _: usize,
) {
    // SAFETY: the test's handle.
    let engine = unsafe { *context.cast::<corelane_engine_t>() };
    let _ = corelane_engine_destroy(engine);
}

#[test]
fn a_callback_may_destroy_its_engine() {
    for waits in [false, true] {
        let (near, far) = (Engine::new("near"), Engine::new("far"));
        let conn = near.load(&far.metadata());
        for _ in 0..5 {
            send(conn, b"stop");
        }
        let deadline = Instant::now() + BOUND;
        let mut handle = far.0;
        loop {
            assert!(Instant::now() < deadline);
            let context = (&raw mut handle).cast();
            let mut count = 0;
            let status = if waits {
                c!(corelane_wait_notifs(far.0, 100, Some(destroy), context, &raw mut count))
            } else {
                c!(corelane_get_notifs(far.0, Some(destroy), context, &raw mut count))
            };
            if status == CORELANE_OK && count == 0 {
                continue;
            }
            // The notifications that it has taken are taken; the engine is gone.
            assert!([CORELANE_OK, CORELANE_ERR_SHUTDOWN].contains(&status), "{status:?}");
            break;
        }
        refused(corelane_stop_accept(far.0), CORELANE_ERR_INVALID_HANDLE);
        refused(corelane_connect(near.load(&far_metadata_of_nobody()), 1), CORELANE_ERR_CONNECT);
    }
}

/// Metadata of an engine that has ended.
fn far_metadata_of_nobody() -> Vec<u8> {
    Engine::new("nobody").metadata()
}

#[test]
fn a_full_queue_is_backpressure_and_drains() {
    let (near, far) = (Engine::new("near"), Engine::new("far"));
    let conn = near.load(&far.metadata());
    let payload = vec![5; 1 << 20];
    let mut sent = 0;
    let full = loop {
        match c!(corelane_send_notif(conn, payload.as_ptr().cast(), payload.len())) {
            CORELANE_OK => sent += 1,
            other => break other,
        }
        assert!(sent < 100_000, "an endless queue");
    };
    refused(full, CORELANE_ERR_BACKPRESSURE);
    assert_eq!(far.collect(sent).len(), sent);
    eventually("there is room again", || {
        c!(corelane_send_notif(conn, payload.as_ptr().cast(), 10)) == CORELANE_OK
    });
    assert_eq!(far.collect(1), [("near".to_owned(), payload[..10].to_vec())]);
}
