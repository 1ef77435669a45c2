//! `accept`, `stop_accept` and `start_listener`.

use std::time::Duration;

use crate::api::*;

fn accept(engine: &Engine, timeout_ms: i64) -> Result<corelane_conn_t, corelane_status> {
    let mut conn = 7;
    match c!(corelane_accept(engine.0, timeout_ms, &raw mut conn)) {
        CORELANE_OK => Ok(conn),
        status => {
            assert_eq!(conn, 0, "a handle with {status:?}");
            assert!(!last_error().is_empty());
            Err(status)
        }
    }
}

fn name_of(conn: corelane_conn_t) -> String {
    let name = filled(|b, capacity, len| c!(corelane_conn_name(conn, b, capacity, len)));
    String::from_utf8(name).unwrap()
}

#[test]
fn a_peer_that_connects_by_itself_is_returned_once_and_can_be_used() {
    let (target, initiator) = (Engine::new("target"), Engine::new("initiator"));
    assert_eq!(accept(&target, 0), Err(CORELANE_ERR_TIMEOUT));
    assert_eq!(accept(&target, 20), Err(CORELANE_ERR_TIMEOUT));
    let to_target = initiator.load(&target.metadata());
    ok(corelane_connect(to_target, BOUND_MS));
    let conn = accept(&target, BOUND_MS).unwrap();
    assert_eq!(name_of(conn), "initiator");
    assert_eq!(accept(&target, 20), Err(CORELANE_ERR_TIMEOUT), "a second time");
    // Who was accepted can be answered, although its metadata was never loaded.
    send(conn, b"welcome");
    assert_eq!(initiator.collect(1), [("target".to_owned(), b"welcome".to_vec())]);
    let memory = Buffer::with_pattern(8, 4096);
    let region = initiator.register(&memory, CORELANE_ACCESS_REMOTE_READ);
    let desc = target.import(&descriptor_of(region));
    let own = Buffer::new(4096);
    target.register(&own, CORELANE_ACCESS_LOCAL);
    let mut xfer = 0;
    ok(c!(corelane_read(conn, own.address(0), desc, memory.address(0), 4096, &raw mut xfer)));
    assert_eq!(ended(xfer), CORELANE_OK);
    own.assert_pattern(8, 0, 4096, 0);
    ok(corelane_conn_destroy(conn));
    refused(corelane_conn_destroy(conn), CORELANE_ERR_INVALID_HANDLE);
}

#[test]
fn waiting_for_a_peer_ends_with_it_with_stop_and_with_the_engine() {
    for end in 0..3 {
        let (target, initiator) = (Engine::new("target"), Engine::new("initiator"));
        let to_target = initiator.load(&target.metadata());
        std::thread::scope(|scope| {
            let waiters: Vec<_> = [-1, BOUND_MS]
                .map(|timeout| {
                    scope.spawn({
                        let target = &target;
                        move || accept(target, timeout)
                    })
                })
                .into();
            std::thread::sleep(Duration::from_millis(50));
            if end == 0 {
                send(to_target, b"hello");
            } else if end == 1 {
                ok(corelane_stop_accept(target.0));
            } else {
                ok(corelane_engine_destroy(target.0));
            }
            if end == 0 {
                corelane_tests::eventually("one has returned", || {
                    waiters.iter().any(|w| w.is_finished())
                });
                ok(corelane_stop_accept(target.0));
            }
            let answers: Vec<_> = waiters.into_iter().map(|w| w.join().unwrap()).collect();
            let (peers, errors): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
            assert_eq!(peers.len(), usize::from(end == 0));
            let expected = if end == 2 { CORELANE_ERR_SHUTDOWN } else { CORELANE_ERR_CANCELLED };
            assert!(errors.iter().all(|error| *error == Err(expected)), "{end}: {errors:?}");
        });
    }
}

#[test]
fn a_listener_that_was_stopped_refuses_strangers_only() {
    let (target, known) = (Engine::new("target"), Engine::new("known"));
    let to_target = known.load(&target.metadata());
    // What it says is seen there after its arrival.
    send(to_target, b"here I am");
    assert_eq!(target.collect(1).len(), 1);
    ok(corelane_stop_accept(target.0));
    ok(corelane_stop_accept(target.0));
    // Who came before is still handed out; then it is over.
    assert_eq!(name_of(accept(&target, BOUND_MS).unwrap()), "known");
    assert_eq!(accept(&target, BOUND_MS), Err(CORELANE_ERR_CANCELLED));
    assert_eq!(accept(&target, -1), Err(CORELANE_ERR_CANCELLED));
    let loaded = Engine::new("loaded");
    target.load(&loaded.metadata());
    for round in 0..3 {
        let stranger = Engine::new("stranger");
        let conn = stranger.load(&target.metadata());
        refused(corelane_connect(conn, BOUND_MS), CORELANE_ERR_CONNECT);
        // Words that say what to do.
        assert!(last_error().contains("accept"), "{}", last_error());
        // Who is known goes on, and may come again.
        send(to_target, &[round]);
        assert_eq!(target.collect(1), [("known".to_owned(), vec![round])]);
        let to_target = loaded.load(&target.metadata());
        ok(corelane_connect(to_target, BOUND_MS));
        ok(c!(corelane_disconnect(to_target, std::ptr::null_mut())));
    }
    ok(corelane_start_listener(target.0));
    ok(corelane_start_listener(target.0));
    let stranger = Engine::new("stranger");
    let conn = stranger.load(&target.metadata());
    ok(corelane_connect(conn, BOUND_MS));
    let names: Vec<_> = std::iter::from_fn(|| accept(&target, 200).ok()).map(name_of).collect();
    assert!(names.contains(&"stranger".to_owned()), "{names:?}");
    send(conn, b"in");
    assert_eq!(target.collect(1), [("stranger".to_owned(), b"in".to_vec())]);
}
