//! Transfers and every status that they can have.

use std::time::Duration;

use corelane_tests::peer_process;

use crate::api::*;
use crate::remote::{LEN, Remote};

#[test]
fn the_life_of_a_transfer() {
    let mut remote = Remote::over_tcp("far", "liveness_ms=60000", &[("liveness_ms", "60000")]);
    let near = &remote.near;
    let xfer = near.prepare(CORELANE_READ, LEN as u64);
    for _ in 0..3 {
        assert_eq!(corelane_xfer_status(xfer), CORELANE_ERR_NOT_POSTED);
        assert_eq!(corelane_xfer_wait(xfer, BOUND_MS), CORELANE_ERR_NOT_POSTED);
        assert_eq!(error_of(xfer), "");
    }
    ok(corelane_cancel(xfer));
    assert_eq!(corelane_xfer_status(xfer), CORELANE_ERR_NOT_POSTED);
    ok(corelane_connect(near.conn, BOUND_MS));

    // In progress as long as the peer does not answer.
    remote.far.process.freeze();
    ok(corelane_post(xfer));
    for _ in 0..3 {
        assert_eq!(corelane_xfer_peek(xfer), CORELANE_IN_PROGRESS);
        assert_eq!(corelane_xfer_status(xfer), CORELANE_IN_PROGRESS);
        assert_eq!(corelane_xfer_wait(xfer, 10), CORELANE_IN_PROGRESS);
        assert_eq!(corelane_xfer_wait(xfer, 0), CORELANE_IN_PROGRESS);
        assert_eq!(error_of(xfer), "");
        refused(corelane_post(xfer), CORELANE_ERR_BUSY);
        let payload = b"never";
        let status = c!(corelane_post_notify(xfer, payload.as_ptr().cast(), payload.len()));
        refused(status, CORELANE_ERR_BUSY);
    }
    let mut stats = corelane_peer_stats::default();
    ok(c!(corelane_conn_stats(near.conn, &raw mut stats, size_of_val(&stats))));
    assert_eq!((stats.connected, stats.in_flight), (1, 1));

    // Done, and the same however often it is asked.
    remote.far.process.thaw();
    assert_eq!(ended(xfer), CORELANE_OK);
    near.memory.assert_pattern(1, 0, LEN, 0);
    for _ in 0..1000 {
        assert_eq!(corelane_xfer_status(xfer), CORELANE_OK);
        assert_eq!(corelane_xfer_peek(xfer), CORELANE_OK);
    }
    let served = remote.far.process.number("served");
    assert_eq!(near.engine.stats().completed, 1);

    // Cancelling what has ended changes nothing; posting again does.
    ok(corelane_cancel(xfer));
    assert_eq!(corelane_xfer_status(xfer), CORELANE_OK);
    near.memory.poison(0, LEN);
    assert_eq!(run(xfer), CORELANE_OK);
    near.memory.assert_pattern(1, 0, LEN, 0);
    assert!(remote.far.process.number("served") > served);
    ok(corelane_release(xfer, 0));
    refused(corelane_xfer_status(xfer), CORELANE_ERR_INVALID_HANDLE);
    refused(corelane_xfer_peek(xfer), CORELANE_ERR_INVALID_HANDLE);
}

#[test]
fn a_cancelled_transfer_says_so_and_can_be_posted_again() {
    let remote = Remote::over_tcp("far", "liveness_ms=60000", &[("liveness_ms", "60000")]);
    let near = &remote.near;
    ok(corelane_connect(near.conn, BOUND_MS));
    for operation in [CORELANE_READ, CORELANE_WRITE] {
        let xfer = near.prepare(operation, LEN as u64);
        remote.far.process.freeze();
        ok(corelane_post(xfer));
        assert_eq!(corelane_xfer_wait(xfer, 20), CORELANE_IN_PROGRESS);
        ok(corelane_cancel(xfer));
        ok(corelane_cancel(xfer));
        remote.far.process.thaw();
        let status = ended(xfer);
        assert_eq!(status, CORELANE_ERR_CANCELLED, "{}", error_of(xfer));
        if operation == CORELANE_READ {
            near.memory.poison(0, LEN);
            assert_eq!(run(xfer), CORELANE_OK);
            near.memory.assert_pattern(1, 0, LEN, 0);
        } else {
            assert_eq!(run(xfer), CORELANE_OK);
        }
        ok(corelane_release(xfer, 0));
    }
}

#[test]
fn a_transfer_released_in_flight_is_busy_until_its_memory_is_quiet() {
    let remote = Remote::over_tcp("far", "liveness_ms=60000", &[("liveness_ms", "60000")]);
    let near = &remote.near;
    for round in 0..20 {
        ok(corelane_connect(near.conn, BOUND_MS));
        let operation = if round % 2 == 0 { CORELANE_READ } else { CORELANE_WRITE };
        let xfer = near.prepare(operation, LEN as u64);
        let frozen = round % 3 == 0;
        if frozen {
            remote.far.process.freeze();
        }
        ok(corelane_post(xfer));
        if frozen {
            assert_eq!(corelane_xfer_wait(xfer, 10), CORELANE_IN_PROGRESS);
        }
        match corelane_release(xfer, 0) {
            CORELANE_OK => {}
            CORELANE_ERR_BUSY => {
                assert!(last_error().contains("again"), "{}", last_error());
                // The handle is kept.
                let status = corelane_xfer_status(xfer);
                let allowed = [CORELANE_IN_PROGRESS, CORELANE_ERR_CANCELLED, CORELANE_OK];
                assert!(allowed.contains(&status), "{status:?}");
                let status = corelane_release(xfer, 100);
                assert!([CORELANE_OK, CORELANE_ERR_BUSY].contains(&status), "{status:?}");
                if frozen {
                    remote.far.process.thaw();
                }
                if status == CORELANE_ERR_BUSY {
                    let waits = if round % 2 == 0 { BOUND_MS } else { -1 };
                    ok(corelane_release(xfer, waits));
                }
            }
            other => panic!("{other:?}: {}", last_error()),
        }
        if frozen {
            remote.far.process.thaw();
        }
        // Freed, and quiet: what is written here now stays.
        refused(corelane_release(xfer, BOUND_MS), CORELANE_ERR_INVALID_HANDLE);
        near.memory.poison(0, LEN);
        std::thread::sleep(Duration::from_millis(10));
        near.memory.assert_poison(0, LEN);
    }
    // The peer is served as before. (Writes have poisoned its memory.)
    near.memory.fill(9, 0, LEN, 0);
    let (write, read) =
        (near.prepare(CORELANE_WRITE, LEN as u64), near.prepare(CORELANE_READ, LEN as u64));
    assert_eq!(run(write), CORELANE_OK);
    near.memory.poison(0, LEN);
    assert_eq!(run(read), CORELANE_OK);
    near.memory.assert_pattern(9, 0, LEN, 0);
}

#[test]
fn every_way_to_start_a_transfer_moves_the_same_bytes() {
    let pair = Pair::new(1 << 20);
    let near = &pair.near;
    let block = 4096u64;
    let there: Vec<u32> = (0..256).map(|i| i * 37 % 256).collect();
    let here: Vec<u32> = (0..256).rev().collect();
    let locals: Vec<_> = here
        .iter()
        .map(|i| corelane_local_segment {
            addr: near.memory.address(0) + u64::from(*i) * block,
            len: block,
            region: 0,
        })
        .collect();
    let remotes: Vec<_> = there
        .iter()
        .map(|i| corelane_remote_segment {
            desc: near.desc,
            addr: near.remote + u64::from(*i) * block,
            len: block,
        })
        .collect();
    let own = corelane_local_blocks {
        base: near.memory.address(0),
        stride: block,
        block_bytes: block,
        indices: here.as_ptr(),
        count: here.len(),
    };
    let theirs = corelane_remote_blocks {
        desc: near.desc,
        base: near.remote,
        stride: block,
        block_bytes: block,
        indices: there.as_ptr(),
        count: there.len(),
    };
    let (l, r) = (locals.as_ptr(), remotes.as_ptr());
    let (own, theirs) = (&raw const own, &raw const theirs);
    let conn = near.conn;
    for number in 0..4 {
        let (mut read, mut write) = (0, 0);
        let (to_read, to_write) = (&raw mut read, &raw mut write);
        match number {
            0 => {
                ok(c!(corelane_readv(conn, l, r, 256, to_read)));
                assert_eq!(ended(read), CORELANE_OK);
                ok(c!(corelane_prepare(conn, CORELANE_WRITE, l, r, 256, to_write)));
            }
            1 => {
                ok(c!(corelane_read_strided(conn, own, theirs, to_read)));
                assert_eq!(ended(read), CORELANE_OK);
                ok(c!(corelane_prepare_strided(conn, CORELANE_WRITE, own, theirs, to_write)));
            }
            2 => {
                ok(c!(corelane_prepare(conn, CORELANE_READ, l, r, 256, to_read)));
                assert_eq!(run(read), CORELANE_OK);
                ok(c!(corelane_writev(conn, l, r, 256, to_write)));
                assert_eq!(ended(write), CORELANE_OK);
            }
            _ => {
                ok(c!(corelane_prepare_strided(conn, CORELANE_READ, own, theirs, to_read)));
                assert_eq!(run(read), CORELANE_OK);
                ok(c!(corelane_write_strided(conn, own, theirs, to_write)));
                assert_eq!(ended(write), CORELANE_OK);
            }
        }
        let seed = number + 1;
        for (here, there) in here.iter().zip(&there) {
            let (at, from) = (*here as usize * 4096, u64::from(*there) * block);
            near.memory.assert_pattern(seed, at, 4096, from);
        }
        // The other pattern goes the same way back.
        for (here, there) in here.iter().zip(&there) {
            near.memory.fill(seed + 1, *here as usize * 4096, 4096, u64::from(*there) * block);
        }
        assert_eq!(run(write), CORELANE_OK);
        pair.far_memory.assert_pattern(seed + 1, 0, 1 << 20, 0);
        near.memory.poison(0, 1 << 20);
        ok(corelane_release(read, 0));
        ok(corelane_release(write, 0));
    }
    let (mut xfer, addr) = (0, near.memory.address(100));
    ok(c!(corelane_read(conn, addr, near.desc, near.remote + 7, 1001, &raw mut xfer)));
    assert_eq!(ended(xfer), CORELANE_OK);
    near.memory.assert_pattern(5, 100, 1001, 7);
    near.memory.assert_poison(0, 100);
    near.memory.assert_poison(1101, 5000);
    ok(c!(corelane_write(conn, addr, near.desc, near.remote, 1001, &raw mut xfer)));
    assert_eq!(ended(xfer), CORELANE_OK);
    pair.far_memory.assert_pattern(5, 0, 1001, 7);
}

#[test]
fn ranges_outside_registered_memory_are_refused() {
    let pair = Pair::new(4096);
    let near = &pair.near;
    let strange = Buffer::new(4096);
    let try_read = |local: corelane_local_segment, remote: corelane_remote_segment| {
        let mut xfer = 7;
        let status =
            c!(corelane_readv(near.conn, &raw const local, &raw const remote, 1, &raw mut xfer));
        assert!(status == CORELANE_OK || xfer == 0, "{status:?} with a handle");
        status
    };
    let (local, remote) = near.segments(0, 4096);
    let elsewhere = corelane_local_segment { addr: strange.address(0), len: 4096, region: 0 };
    refused(try_read(elsewhere, remote), CORELANE_ERR_NOT_REGISTERED);
    let (long, _) = near.segments(1, 4096);
    refused(try_read(long, remote), CORELANE_ERR_OUT_OF_BOUNDS);
    for wrong in [
        corelane_remote_segment { addr: remote.addr + 1, ..remote },
        corelane_remote_segment { addr: remote.addr - 1, ..remote },
        corelane_remote_segment { addr: 0, ..remote },
    ] {
        refused(try_read(local, wrong), CORELANE_ERR_OUT_OF_BOUNDS);
    }
    for wrapping in [u64::MAX, u64::MAX - 4095, u64::MAX - 4094] {
        let status = try_read(local, corelane_remote_segment { addr: wrapping, ..remote });
        assert_ne!(status, CORELANE_OK);
        let status = try_read(corelane_local_segment { addr: wrapping, ..local }, remote);
        assert_ne!(status, CORELANE_OK);
    }
    let short = corelane_remote_segment { len: 4095, ..remote };
    refused(try_read(local, short), CORELANE_ERR_INVALID_ARGUMENT);
    // Strides that leave the region, or the address space.
    let indices = [0u32, u32::MAX];
    for stride in [1, 4096, u64::MAX / 2, u64::MAX] {
        let own = corelane_local_blocks {
            base: near.memory.address(0),
            stride,
            block_bytes: 64,
            indices: indices.as_ptr(),
            count: 2,
        };
        let theirs = corelane_remote_blocks {
            desc: near.desc,
            base: near.remote,
            stride,
            block_bytes: 64,
            indices: indices.as_ptr(),
            count: 2,
        };
        let mut xfer = 7;
        let status =
            c!(corelane_read_strided(near.conn, &raw const own, &raw const theirs, &raw mut xfer));
        let allowed = [
            CORELANE_ERR_INVALID_ARGUMENT,
            CORELANE_ERR_NOT_REGISTERED,
            CORELANE_ERR_OUT_OF_BOUNDS,
        ];
        assert!(allowed.contains(&status) && xfer == 0, "stride {stride}: {status:?}");
    }
    assert_eq!(near.engine.stats().posted, 0);
    near.memory.assert_poison(0, 4096);
    // Nothing to move is nothing wrong.
    let (local, remote) = near.segments(4096, 0);
    let mut xfer = 0;
    let status =
        c!(corelane_readv(near.conn, &raw const local, &raw const remote, 1, &raw mut xfer));
    ok(status);
    assert_eq!(ended(xfer), CORELANE_OK);
    near.memory.assert_poison(0, 4096);
}

#[test]
fn all_who_wait_for_a_transfer_see_its_end() {
    let remote = Remote::over_tcp("far", "liveness_ms=60000", &[("liveness_ms", "60000")]);
    let near = &remote.near;
    ok(corelane_connect(near.conn, BOUND_MS));
    let xfer = near.prepare(CORELANE_READ, LEN as u64);
    remote.far.process.freeze();
    ok(corelane_post(xfer));
    std::thread::scope(|scope| {
        let waiters: Vec<_> = [-1, i64::MIN, i64::MAX, BOUND_MS]
            .map(|timeout| scope.spawn(move || corelane_xfer_wait(xfer, timeout)))
            .into();
        std::thread::sleep(Duration::from_millis(50));
        remote.far.process.thaw();
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), CORELANE_OK);
        }
    });
    near.memory.assert_pattern(1, 0, LEN, 0);
}

#[test]
fn an_estimate_needs_a_history() {
    let pair = Pair::new(1 << 20);
    let near = &pair.near;
    let xfer = near.prepare(CORELANE_READ, 1 << 20);
    let (mut duration, mut margin) = (7, 7);
    for _ in 0..2 {
        let status = c!(corelane_estimate(xfer, &raw mut duration, &raw mut margin));
        refused(status, CORELANE_ERR_NOT_FOUND);
        assert_eq!((duration, margin), (7, 7));
    }
    for _ in 0..20 {
        assert_eq!(run(xfer), CORELANE_OK);
    }
    ok(c!(corelane_estimate(xfer, &raw mut duration, &raw mut margin)));
    assert!((1_000..60_000_000_000).contains(&duration), "{duration} ns for 1 MiB");
    assert!((1..60_000_000_000).contains(&margin), "{margin} ns");
    // Of the other direction and of other sizes, too.
    let other = near.prepare(CORELANE_WRITE, 64);
    ok(c!(corelane_estimate(other, &raw mut duration, &raw mut margin)));
    assert!(duration > 0 && margin > 0);
    // Another engine of this process has a history of its own.
    let stranger = Pair::new(4096);
    let xfer = stranger.near.prepare(CORELANE_READ, 64);
    let status = c!(corelane_estimate(xfer, &raw mut duration, &raw mut margin));
    refused(status, CORELANE_ERR_NOT_FOUND);
}

#[test]
fn a_peer_process_of_the_c_api_serves_rust_and_the_other_way_round() {
    // What the other tests of this file do one way, in the other direction: here is the target.
    // What is served is counted where it is served.
    for (transports, bytes_served, refused) in [("tcp", LEN as u64, 1), ("local", 0, 0)] {
        let engine = Engine::with("c-target", &[("transports", transports)]);
        let memory = Buffer::with_pattern(6, LEN);
        let region = engine.register(&memory, 3);
        let mut far = peer_process!();
        far.engine("rust-initiator", "");
        far.region("own", LEN, "local");
        far.load(&engine.metadata());
        let descriptor = corelane_tests::to_hex(&descriptor_of(region));
        far.ask(&format!("read c-target own 0 {descriptor} 0 {LEN} 68656c6c6f"));
        far.ask(&format!("check own 6 0 {LEN} 0"));
        assert_eq!(engine.collect(1), [("rust-initiator".to_owned(), b"hello".to_vec())]);
        let stats = engine.stats();
        assert_eq!((stats.bytes_served_read, stats.requests_refused), (bytes_served, 0));
        ok(corelane_mr_destroy(region));
        let error = far.try_ask(&format!("read c-target own 0 {descriptor} 0 64")).unwrap_err();
        assert!(error.starts_with("Permission"), "{error}");
        assert_eq!(engine.stats().requests_refused, refused);
    }
}

#[test]
fn a_transfer_depends_on_the_registration_that_it_names() {
    let pair = Pair::new(4096);
    let near = &pair.near;
    let second = near.engine.register(&near.memory, CORELANE_ACCESS_LOCAL);
    let (local, remote) = near.segments(0, 64);
    let read = |region| {
        let local = corelane_local_segment { region, ..local };
        let mut xfer = 7;
        let status = c!(corelane_prepare(
            near.conn,
            CORELANE_READ,
            &raw const local,
            &raw const remote,
            1,
            &raw mut xfer
        ));
        (status, xfer)
    };
    let [(CORELANE_OK, by_first), (CORELANE_OK, by_second)] = [near.region, second].map(read)
    else {
        panic!("{}", last_error());
    };
    assert_eq!([by_first, by_second].map(run), [CORELANE_OK; 2]);
    ok(corelane_mr_destroy(second));
    assert_eq!(run(by_first), CORELANE_OK);
    assert_eq!(run(by_second), CORELANE_ERR_NOT_REGISTERED, "{}", error_of(by_second));
    // One that is none, one of another kind, one of another engine.
    for wrong in [second, 7, near.conn, near.desc, near.engine.0, pair.far_region] {
        assert_eq!(read(wrong), (CORELANE_ERR_INVALID_HANDLE, 0), "{wrong:#x}: {}", last_error());
    }
    // Registered, but not for this range.
    let elsewhere = Buffer::new(4096);
    let other = near.engine.register(&elsewhere, CORELANE_ACCESS_LOCAL);
    let (status, xfer) = read(other);
    let allowed = [CORELANE_ERR_OUT_OF_BOUNDS, CORELANE_ERR_NOT_REGISTERED];
    assert!(allowed.contains(&status) && xfer == 0, "{status:?}: {}", last_error());
}
