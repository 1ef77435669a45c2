//! How transfers end that do not end well.

use std::time::Duration;

use corelane_tests::{eventually, target};

use crate::api::*;
use crate::remote::{LEN, Remote};

/// What stands for a peer that is gone, or cannot be reached any more.
const GONE: [corelane_status; 2] = [CORELANE_ERR_REMOTE_DISCONNECT, CORELANE_ERR_CONNECT];

#[test]
fn a_permission_that_was_not_given_is_refused_here_or_there() {
    let mut remote = Remote::new("far", "", &[]);
    let near = &remote.near;
    for (access, operation) in
        [("read", CORELANE_WRITE), ("write", CORELANE_READ), ("local", CORELANE_READ)]
    {
        let region = remote.far.process.region(access, 4096, access);
        let desc = near.engine.import(&region.to_bytes());
        let (local, there) = near.segments(0, 64);
        let there = corelane_remote_segment { desc, addr: region.segment(0, 64).addr, ..there };
        let mut xfer = 7;
        let status = c!(corelane_prepare(
            near.conn,
            operation,
            &raw const local,
            &raw const there,
            1,
            &raw mut xfer
        ));
        refused(status, CORELANE_ERR_PERMISSION);
        assert_eq!(xfer, 0);
    }
    // A region that is registered no more is refused by its owner.
    let xfer = near.prepare(CORELANE_READ, 4096);
    assert_eq!(run(xfer), CORELANE_OK);
    remote.far.process.ask("deregister r");
    near.memory.poison(0, 4096);
    assert_eq!(run(xfer), CORELANE_ERR_PERMISSION);
    assert!(error_of(xfer).contains("far"), "{}", error_of(xfer));
    near.memory.assert_poison(0, 4096);
    assert_eq!(run(xfer), CORELANE_ERR_PERMISSION);
}

#[test]
fn a_transfer_to_a_killed_peer_ends_in_its_error() {
    for (transports, frozen) in [("local", false), ("tcp", false), ("tcp", true)] {
        let Remote { near, far } = Remote::new("victim", "", &[("transports", transports)]);
        let xfers: Vec<_> = (0..20)
            .map(|i| near.prepare(i % 2, if i % 4 < 2 { LEN as u64 } else { 100 }))
            .collect();
        assert_eq!(run(xfers[0]), CORELANE_OK);
        if frozen {
            far.process.freeze();
        }
        xfers.iter().for_each(|xfer| ok(corelane_post(*xfer)));
        far.process.kill();
        let mut failed = 0;
        for xfer in &xfers {
            let status = ended(*xfer);
            if status != CORELANE_OK {
                assert!(GONE.contains(&status), "{status:?}: {}", error_of(*xfer));
                assert!(error_of(*xfer).contains("victim"), "{}", error_of(*xfer));
                failed += 1;
            }
        }
        assert!(failed > 0 || !frozen, "a frozen process has answered");
        // Until it is gone, its memory can still be copied from.
        far.process.end();
        for xfer in &xfers {
            let status = run(*xfer);
            assert!(GONE.contains(&status), "{status:?}");
            ok(corelane_release(*xfer, 0));
        }
        let status = corelane_connect(near.conn, BOUND_MS);
        assert!(GONE.contains(&status), "{status:?}");
    }
}

#[test]
fn a_descriptor_of_a_peer_that_has_restarted_is_stale() {
    let mut remote = Remote::new("phoenix", "", &[]);
    let xfer = remote.near.prepare(CORELANE_READ, 64);
    assert_eq!(run(xfer), CORELANE_OK);
    let old = remote.far.region.to_bytes();
    remote.far = target!("phoenix", LEN);
    let near = &mut remote.near;
    near.conn = near.engine.load(&remote.far.metadata);
    for number in Lists::FUNCTIONS {
        let (name, status, handle) = Lists::of(near).call(number);
        assert_eq!((status, handle), (CORELANE_ERR_STALE_DESCRIPTOR, 0), "{name}");
        assert!(last_error().contains("phoenix"), "{name}: {}", last_error());
    }
    // The transfer of before belongs to the engine of before.
    assert_eq!(run(xfer), CORELANE_ERR_REMOTE_DISCONNECT, "{}", error_of(xfer));
    let stale = near.engine.import(&old);
    ok(corelane_descriptor_destroy(stale));
    near.desc = near.engine.import(&remote.far.region.to_bytes());
    near.remote = remote.far.region.segment(0, 64).addr;
    near.memory.poison(0, LEN);
    assert_eq!(run(near.prepare(CORELANE_READ, 64)), CORELANE_OK);
    near.memory.assert_pattern(1, 0, 64, 0);
}

#[test]
fn a_peer_that_lives_and_does_not_answer_is_a_timeout() {
    let options = [("liveness_ms", "60000"), ("operation_timeout_ms", "200")];
    let remote = Remote::over_tcp("slow", "liveness_ms=60000", &options);
    let near = &remote.near;
    ok(corelane_connect(near.conn, BOUND_MS));
    remote.far.process.freeze();
    for len in [64, LEN as u64] {
        let xfer = near.prepare(CORELANE_READ, len);
        assert_eq!(run(xfer), CORELANE_ERR_TIMEOUT, "{len} bytes: {}", error_of(xfer));
        assert!(error_of(xfer).contains("slow"), "{}", error_of(xfer));
        ok(corelane_release(xfer, BOUND_MS));
    }
    remote.far.process.thaw();
    let xfer = near.prepare(CORELANE_READ, 64);
    eventually("it is served again", || run(xfer) == CORELANE_OK);
}

#[test]
fn a_silent_peer_is_gone_after_the_liveness_timeout() {
    let remote = Remote::over_tcp("silent", "liveness_ms=1000", &[("liveness_ms", "1000")]);
    let near = &remote.near;
    let xfer = near.prepare(CORELANE_READ, LEN as u64);
    assert_eq!(run(xfer), CORELANE_OK);
    let before = near.engine.stats().liveness_timeouts;
    remote.far.process.freeze();
    let status = run(xfer);
    assert!(GONE.contains(&status), "{status:?}: {}", error_of(xfer));
    assert_eq!(near.engine.stats().liveness_timeouts, before + 1);
    remote.far.process.thaw();
}

#[test]
fn nobody_there_cannot_be_connected() {
    let nobody = Engine::new("nobody");
    let memory = Buffer::new(4096);
    let region = nobody.register(&memory, 3);
    let (metadata, descriptor) = (nobody.metadata(), descriptor_of(region));
    drop(nobody);
    let near = Side::new(&[], 4096, &metadata, &descriptor);
    refused(corelane_connect(near.conn, BOUND_MS), CORELANE_ERR_CONNECT);
    assert!(last_error().contains("nobody"), "{}", last_error());
    assert!(last_error().contains("127.0.0.1"), "the address: {}", last_error());
    let xfer = near.prepare(CORELANE_READ, 64);
    assert_eq!(run(xfer), CORELANE_ERR_CONNECT, "{}", error_of(xfer));
    // Connecting does not wait longer than it is told to, either.
    let status = corelane_connect(near.conn, 0);
    assert!(GONE.contains(&status), "{status:?}");
}

#[test]
fn disconnecting_cancels_and_unloading_ends_transfers() {
    let remote = Remote::over_tcp(
        "far",
        "liveness_ms=60000",
        &[("liveness_ms", "60000"), ("linger_ms", "100")],
    );
    let near = &remote.near;
    let xfer = near.prepare(CORELANE_READ, LEN as u64);
    for _ in 0..3 {
        ok(corelane_connect(near.conn, BOUND_MS));
        remote.far.process.freeze();
        ok(corelane_post(xfer));
        assert_eq!(corelane_xfer_wait(xfer, 10), CORELANE_IN_PROGRESS);
        let mut dropped = 7;
        ok(c!(corelane_disconnect(near.conn, &raw mut dropped)));
        assert_eq!(dropped, 0);
        assert_eq!(ended(xfer), CORELANE_ERR_CANCELLED);
        remote.far.process.thaw();
        // The peer stays known: posting connects again.
        near.memory.poison(0, LEN);
        assert_eq!(run(xfer), CORELANE_OK);
        near.memory.assert_pattern(1, 0, LEN, 0);
    }
    let other = near.engine.load(&remote.far.metadata);
    ok(corelane_unload_peer(near.conn, -1));
    refused(corelane_unload_peer(near.conn, -1), CORELANE_ERR_INVALID_HANDLE);
    for _ in 0..2 {
        assert_eq!(run(xfer), CORELANE_ERR_CANCELLED, "{}", error_of(xfer));
    }
    let mut stats = corelane_peer_stats::default();
    let status = c!(corelane_conn_stats(other, &raw mut stats, size_of_val(&stats)));
    refused(status, CORELANE_ERR_NOT_FOUND);
    ok(corelane_conn_destroy(other));
    ok(corelane_release(xfer, 0));
    // Known anew, it is served anew.
    let conn = near.engine.load(&remote.far.metadata);
    let mut again = 0;
    ok(c!(corelane_read(conn, near.memory.address(0), near.desc, near.remote, 64, &raw mut again)));
    assert_eq!(ended(again), CORELANE_OK);
}

#[test]
fn notifications_that_cannot_be_flushed_are_counted_at_the_disconnect() {
    let options = [("liveness_ms", "60000"), ("linger_ms", "50")];
    let remote = Remote::over_tcp("far", "liveness_ms=60000", &options);
    let near = &remote.near;
    ok(corelane_connect(near.conn, BOUND_MS));
    remote.far.process.freeze();
    for _ in 0..5 {
        send(near.conn, b"lost");
    }
    let mut dropped = 0;
    ok(c!(corelane_disconnect(near.conn, &raw mut dropped)));
    assert_eq!(dropped, 5);
    assert_eq!(near.engine.stats().notifications_dropped, 5);
    remote.far.process.thaw();
}

#[test]
fn memory_that_was_unmapped_is_a_fault() {
    // Within a process, `local` copies as the process itself would.
    let pair = Pair::with(1 << 20, &[("transports", "tcp")]);
    let near = &pair.near;
    let xfer = near.prepare(CORELANE_READ, 1 << 20);
    assert_eq!(run(xfer), CORELANE_OK);
    near.memory.unmap();
    assert_eq!(run(xfer), CORELANE_ERR_FAULT, "{}", error_of(xfer));
    ok(corelane_release(xfer, 0));
    ok(corelane_mr_destroy(near.region));
    pair.far_memory.assert_pattern(1, 0, 1 << 20, 0);
}

#[test]
fn memory_in_use_is_deregistered_when_it_is_quiet() {
    let options = [("liveness_ms", "60000"), ("deregister_timeout_ms", "50")];
    let remote = Remote::over_tcp("far", "liveness_ms=60000", &options);
    let near = &remote.near;
    ok(corelane_connect(near.conn, BOUND_MS));
    let xfer = near.prepare(CORELANE_READ, LEN as u64);
    remote.far.process.freeze();
    ok(corelane_post(xfer));
    assert_eq!(corelane_xfer_wait(xfer, 10), CORELANE_IN_PROGRESS);
    refused(corelane_mr_destroy(near.region), CORELANE_ERR_BUSY);
    // Kept: the descriptor is as it was, and the transfer goes on.
    assert!(!descriptor_of(near.region).is_empty());
    remote.far.process.thaw();
    assert_eq!(ended(xfer), CORELANE_OK);
    near.memory.assert_pattern(1, 0, LEN, 0);
    ok(corelane_mr_destroy(near.region));
    refused(corelane_mr_destroy(near.region), CORELANE_ERR_INVALID_HANDLE);
    assert_eq!(run(xfer), CORELANE_ERR_NOT_REGISTERED, "{}", error_of(xfer));
}

#[test]
fn transfers_in_flight_end_with_their_engine() {
    let remote = Remote::over_tcp("far", "liveness_ms=60000", &[("liveness_ms", "60000")]);
    let near = &remote.near;
    ok(corelane_connect(near.conn, BOUND_MS));
    let xfer = near.prepare(CORELANE_READ, LEN as u64);
    remote.far.process.freeze();
    ok(corelane_post(xfer));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(move || corelane_xfer_wait(xfer, -1));
        std::thread::sleep(Duration::from_millis(50));
        ok(corelane_engine_destroy(near.engine.0));
        let status = waiter.join().unwrap();
        let allowed = [CORELANE_ERR_SHUTDOWN, CORELANE_ERR_CANCELLED];
        assert!(allowed.contains(&status), "{status:?}");
    });
    refused(corelane_xfer_status(xfer), CORELANE_ERR_INVALID_HANDLE);
    near.memory.poison(0, LEN);
    remote.far.process.thaw();
    std::thread::sleep(Duration::from_millis(20));
    near.memory.assert_poison(0, LEN);
}
