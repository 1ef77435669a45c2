//! Arguments: null, not aligned, empty, huge, not UTF-8, out of range; and buffers that are too small.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use crate::api::*;

const HUGE: [usize; 3] = [usize::MAX, isize::MAX as usize + 1, usize::MAX / 8];

/// Panics unless a call is refused as a bad argument.
#[track_caller]
fn invalid(status: corelane_status) {
    refused(status, CORELANE_ERR_INVALID_ARGUMENT);
}

#[test]
fn a_null_or_unaligned_place_for_an_answer_is_refused() {
    let pair = Pair::new(4096);
    let near = &pair.near;
    let (engine, conn) = (near.engine.0, near.conn);
    let (metadata, descriptor) = (pair.far.metadata(), descriptor_of(pair.far_region));
    let (memory, (local, remote)) = (pointer(&near.memory), near.segments(0, 64));
    let xfer = near.prepare(CORELANE_READ, 64);
    assert_eq!(run(xfer), CORELANE_OK);
    let indices = [0u32, 1];
    let own = corelane_local_blocks {
        base: local.addr,
        stride: 64,
        block_bytes: 64,
        indices: indices.as_ptr(),
        count: 2,
    };
    let theirs = corelane_remote_blocks {
        desc: near.desc,
        base: remote.addr,
        stride: 64,
        block_bytes: 64,
        indices: indices.as_ptr(),
        count: 2,
    };
    let (own, theirs) = (&raw const own, &raw const theirs);
    let (local, remote) = (&raw const local, &raw const remote);
    let mut room = [0u64; 4];
    let untouched = room;
    for place in [null_mut(), unaligned::<u64>(&mut room)] {
        let (name, len) = chars(b"name");
        invalid(c!(corelane_engine_create(name, len, NO_OPTIONS, 0, place)));
        invalid(c!(corelane_accept(engine, 0, place)));
        invalid(c!(corelane_reg(engine, memory, 64, 0, 0, 0, place)));
        let bytes = descriptor.as_ptr().cast();
        invalid(c!(corelane_import_descriptor(engine, bytes, descriptor.len(), place)));
        let bytes = metadata.as_ptr().cast();
        invalid(c!(corelane_load_peer(engine, bytes, metadata.len(), place)));
        let (name, len) = chars(b"far");
        invalid(c!(corelane_load_peer_as(engine, name, len, bytes, metadata.len(), place)));
        invalid(c!(corelane_prepare(conn, CORELANE_READ, local, remote, 1, place)));
        invalid(c!(corelane_prepare_strided(conn, CORELANE_READ, own, theirs, place)));
        let (here, there) = (near.memory.address(0), near.remote);
        invalid(c!(corelane_read(conn, here, near.desc, there, 64, place)));
        invalid(c!(corelane_write(conn, here, near.desc, there, 64, place)));
        invalid(c!(corelane_readv(conn, local, remote, 1, place)));
        invalid(c!(corelane_writev(conn, local, remote, 1, place)));
        invalid(c!(corelane_read_strided(conn, own, theirs, place)));
        invalid(c!(corelane_write_strided(conn, own, theirs, place)));
        let mut duration = 0u64;
        invalid(c!(corelane_estimate(xfer, place, &raw mut duration)));
        invalid(c!(corelane_estimate(xfer, &raw mut duration, place)));
    }
    for place in [null_mut(), unaligned::<usize>(&mut room)] {
        let mut buffer = [0u8; 1024];
        let (start, size) = (buffer.as_mut_ptr().cast::<c_void>(), buffer.len());
        invalid(c!(corelane_get_metadata(engine, start, size, place)));
        invalid(c!(corelane_get_option(engine, c"lanes".as_ptr(), start, size, place)));
        invalid(c!(corelane_get_descriptor(near.region, start, size, place)));
        invalid(c!(corelane_conn_name(conn, start, size, place)));
        invalid(c!(corelane_xfer_error(xfer, start, size, place)));
        assert_eq!(buffer, [0; 1024], "bytes without their length");
    }
    for place in [null_mut(), unaligned::<corelane_region_info>(&mut room)] {
        invalid(c!(corelane_query_memory(engine, memory, 64, place)));
        invalid(c!(corelane_descriptor_info(near.desc, place)));
    }
    for place in [null_mut(), unaligned::<corelane_option_info>(&mut room)] {
        invalid(c!(corelane_option_at(0, place)));
    }
    invalid(c!(corelane_stats(engine, null_mut(), size_of::<corelane_engine_stats>())));
    invalid(c!(corelane_conn_stats(conn, null_mut(), size_of::<corelane_peer_stats>())));
    assert_eq!(room, untouched);
    // Nothing was done by halves.
    let stats = near.engine.stats();
    assert_eq!((stats.posted, stats.regions, stats.peers), (1, 1, 1));
    assert_eq!(run(xfer), CORELANE_OK);
}

#[test]
fn a_null_or_unaligned_input_is_refused() {
    let pair = Pair::new(4096);
    let (engine, conn) = (pair.near.engine.0, pair.near.conn);
    let (local, remote) = pair.near.segments(0, 64);
    let mut handle = 7;
    let place = &raw mut handle;
    let mut room = [0u64; 4];

    invalid(c!(corelane_engine_create(null(), 4, NO_OPTIONS, 0, place)));
    let (name, len) = chars(b"name");
    invalid(c!(corelane_engine_create(name, len, NO_OPTIONS, 1, place)));
    invalid(c!(corelane_engine_create(name, len, unaligned(&mut room), 1, place)));
    let nameless = corelane_option { name: null(), value: c"tcp".as_ptr() };
    let valueless = corelane_option { name: c"lanes".as_ptr(), value: null() };
    let ugly = corelane_option { name: c"\xff".as_ptr(), value: c"1".as_ptr() };
    let worse = corelane_option { name: c"lanes".as_ptr(), value: c"\xc3".as_ptr() };
    for option in [nameless, valueless, ugly, worse] {
        invalid(c!(corelane_engine_create(name, len, &raw const option, 1, place)));
    }

    let (mut buffer, mut filled) = ([0u8; 64], 0);
    let start = buffer.as_mut_ptr().cast();
    invalid(c!(corelane_get_option(engine, null(), start, 64, &raw mut filled)));
    invalid(c!(corelane_get_option(engine, c"\xff".as_ptr(), start, 64, &raw mut filled)));

    invalid(c!(corelane_reg(engine, null_mut(), 64, 0, 0, 0, place)));
    invalid(c!(corelane_import_descriptor(engine, null(), 64, place)));
    invalid(c!(corelane_load_peer(engine, null(), 64, place)));
    let metadata = pair.far.metadata();
    let bytes: *const c_void = metadata.as_ptr().cast();
    invalid(c!(corelane_load_peer_as(engine, null(), 3, bytes, metadata.len(), place)));
    let (name, len) = chars(b"far");
    invalid(c!(corelane_load_peer_as(engine, name, len, null(), metadata.len(), place)));
    invalid(c!(corelane_send_notif(conn, null(), 1)));
    let nobody = None;
    invalid(c!(corelane_get_notifs(engine, nobody, null_mut(), null_mut())));
    invalid(c!(corelane_wait_notifs(engine, BOUND_MS, nobody, null_mut(), null_mut())));

    let (local, remote) = (&raw const local, &raw const remote);
    for number in 0..3 {
        let call = |local, remote| match number {
            0 => c!(corelane_prepare(conn, CORELANE_READ, local, remote, 1, place)),
            1 => c!(corelane_readv(conn, local, remote, 1, place)),
            _ => c!(corelane_writev(conn, local, remote, 1, place)),
        };
        invalid(call(null(), remote));
        invalid(call(local, null()));
        invalid(call(unaligned(&mut room), remote));
        invalid(call(local, unaligned(&mut room)));
    }
    let indices = [0u32, 1, 2];
    let good = corelane_local_blocks {
        base: pair.near.memory.address(0),
        stride: 64,
        block_bytes: 64,
        indices: indices.as_ptr(),
        count: 2,
    };
    let theirs = corelane_remote_blocks {
        desc: pair.near.desc,
        base: pair.near.remote,
        stride: 64,
        block_bytes: 64,
        indices: indices.as_ptr(),
        count: 2,
    };
    let strided: [fn(_, *const corelane_local_blocks, *const corelane_remote_blocks, _) -> _; 3] = [
        |conn, own, theirs, place| {
            c!(corelane_prepare_strided(conn, CORELANE_READ, own, theirs, place))
        },
        |conn, own, theirs, place| c!(corelane_read_strided(conn, own, theirs, place)),
        |conn, own, theirs, place| c!(corelane_write_strided(conn, own, theirs, place)),
    ];
    for call in strided {
        invalid(call(conn, null(), &raw const theirs, place));
        invalid(call(conn, &raw const good, null(), place));
        invalid(call(conn, unaligned(&mut room), &raw const theirs, place));
        invalid(call(conn, &raw const good, unaligned(&mut room), place));
        let wrong = [
            corelane_local_blocks { indices: null(), ..good },
            corelane_local_blocks { indices: unaligned(&mut room), ..good },
            corelane_local_blocks { count: 3, ..good },
            corelane_local_blocks { count: 0, ..good },
            corelane_local_blocks { count: usize::MAX, ..good },
            corelane_local_blocks { block_bytes: 32, ..good },
        ];
        for own in &wrong {
            invalid(call(conn, &raw const *own, &raw const theirs, place));
            assert_eq!(handle, 0);
        }
        let wrong = [
            corelane_remote_blocks { indices: null(), ..theirs },
            corelane_remote_blocks { count: 3, ..theirs },
            corelane_remote_blocks { count: usize::MAX, ..theirs },
        ];
        for theirs in &wrong {
            invalid(call(conn, &raw const good, &raw const *theirs, place));
            assert_eq!(handle, 0);
        }
    }
    let xfer = pair.near.prepare(CORELANE_READ, 64);
    invalid(c!(corelane_post_notify(xfer, null(), 1)));
    assert_eq!(corelane_xfer_status(xfer), CORELANE_ERR_NOT_POSTED);
    assert_eq!(pair.near.engine.stats().posted, 0);
    assert!(pair.far.collect(0).is_empty());
}

#[test]
fn null_is_fine_where_nothing_is_there_or_nothing_is_wanted() {
    let pair = Pair::new(4096);
    let (near, conn) = (&pair.near, pair.near.conn);
    ok(c!(corelane_send_notif(conn, null(), 0)));
    let xfer = near.prepare(CORELANE_READ, 64);
    ok(c!(corelane_post_notify(xfer, null(), 0)));
    assert_eq!(ended(xfer), CORELANE_OK);
    assert_eq!(pair.far.collect(2), vec![("near".to_owned(), vec![]); 2]);
    let mut list: Vec<(String, Vec<u8>)> = Vec::new();
    ok(c!(corelane_get_notifs(near.engine.0, Some(take), (&raw mut list).cast(), null_mut())));
    ok(c!(corelane_wait_notifs(near.engine.0, 0, Some(take), (&raw mut list).cast(), null_mut())));
    assert!(list.is_empty());
    ok(c!(corelane_disconnect(conn, null_mut())));
    let mut len = 7;
    ok(c!(corelane_xfer_error(xfer, null_mut(), 0, &raw mut len)));
    assert_eq!(len, 0);
    ok(c!(corelane_get_option(near.engine.0, c"interface".as_ptr(), null_mut(), 0, &raw mut len)));
    assert_eq!(len, 0);
}

#[test]
fn impossible_lengths_are_refused() {
    let pair = Pair::new(4096);
    let (engine, conn) = (pair.near.engine.0, pair.near.conn);
    let memory = pointer(&pair.near.memory);
    let mut handle = 7;
    let place = &raw mut handle;
    invalid(c!(corelane_reg(engine, memory, 0, 0, 0, 0, place)));
    let (name, _) = chars(b"name");
    for huge in HUGE {
        if huge > isize::MAX as usize {
            invalid(c!(corelane_reg(engine, memory, huge, 0, 0, 0, place)));
            invalid(c!(corelane_engine_create(name, huge, NO_OPTIONS, 0, place)));
            invalid(c!(corelane_import_descriptor(engine, memory, huge, place)));
            invalid(c!(corelane_load_peer(engine, memory, huge, place)));
            invalid(c!(corelane_load_peer_as(engine, name, huge, memory, 64, place)));
            invalid(c!(corelane_send_notif(conn, memory, huge)));
        }
        let (local, remote) = pair.near.segments(0, 64);
        let (l, r) = (&raw const local, &raw const remote);
        invalid(c!(corelane_prepare(conn, CORELANE_READ, l, r, huge, place)));
        invalid(c!(corelane_readv(conn, l, r, huge, place)));
        invalid(c!(corelane_writev(conn, l, r, huge, place)));
        let none = corelane_option { name: c"lanes".as_ptr(), value: c"auto".as_ptr() };
        invalid(c!(corelane_engine_create(name, 4, &raw const none, huge, place)));
        assert_eq!(handle, 0);
        // Ranges that wrap around, or leave their region by far.
        let far = near_status(&pair, huge as u64);
        assert!(
            [CORELANE_ERR_INVALID_ARGUMENT, CORELANE_ERR_OUT_OF_BOUNDS].contains(&far),
            "{far:?}"
        );
    }
    let mut info = [0u64; 8];
    let info = info.as_mut_ptr().cast();
    for len in HUGE {
        refused(c!(corelane_query_memory(engine, memory, len, info)), CORELANE_ERR_NOT_FOUND);
    }
    let empty = (null::<corelane_local_segment>(), null::<corelane_remote_segment>());
    invalid(c!(corelane_prepare(conn, CORELANE_READ, empty.0, empty.1, 0, place)));
    invalid(c!(corelane_readv(conn, empty.0, empty.1, 0, place)));
    assert_eq!(pair.near.engine.stats().regions, 1);
}

fn near_status(pair: &Pair, len: u64) -> corelane_status {
    let (local, remote) = pair.near.segments(0, len);
    let mut xfer = 0;
    c!(corelane_readv(pair.near.conn, &raw const local, &raw const remote, 1, &raw mut xfer))
}

#[test]
fn names_have_1_to_1024_bytes_of_utf_8() {
    let mut engine = 7;
    let long = vec![b'x'; 1025];
    let halves: &[&[u8]] = &[b"\xff\xfe", b"abc\xc3", b"\xed\xa0\x80", b"caf\xe9", b"\xc0\x80"];
    for bad in halves.iter().copied().chain([&b""[..], &long]) {
        let status = try_create(bad, &[], &mut engine);
        let allowed = [CORELANE_ERR_INVALID_ARGUMENT, CORELANE_ERR_CONFIG];
        assert!(allowed.contains(&status), "{status:?} for {} bytes", bad.len());
        assert!(!last_error().is_empty());
        assert_eq!(engine, 0);
        let near = Engine::new("near");
        let (name, len) = chars(bad);
        let metadata = near.metadata();
        let bytes = metadata.as_ptr().cast();
        let mut conn = 7;
        invalid(c!(corelane_load_peer_as(near.0, name, len, bytes, metadata.len(), &raw mut conn)));
        assert_eq!(conn, 0);
    }
    for good in ["n", "a name with spaces", "kärnan-0", "名前", &"x".repeat(1024)] {
        let mut far = 0;
        ok(try_create(good.as_bytes(), &[], &mut far));
        let far = Engine(far);
        let near = Engine::new("near");
        let conn = near.load(&far.metadata());
        let name =
            filled(|buffer, capacity, len| c!(corelane_conn_name(conn, buffer, capacity, len)));
        assert_eq!(name, good.as_bytes());
        // The sender's name is given with its length.
        let to_near = far.load(&near.metadata());
        send(to_near, b"from me");
        assert_eq!(near.collect(1), [(good.to_owned(), b"from me".to_vec())]);
    }
    // A name may even have a zero byte inside: it has a length.
    let inside = Engine::new("near");
    let mut far = 0;
    ok(try_create(b"a\0b", &[], &mut far));
    let far = Engine(far);
    let conn = inside.load(&far.metadata());
    let name = filled(|b, capacity, len| c!(corelane_conn_name(conn, b, capacity, len)));
    assert_eq!(name, b"a\0b");
}

#[test]
fn numbers_without_a_meaning_are_refused() {
    let pair = Pair::new(4096);
    let (engine, memory) = (pair.near.engine.0, pointer(&pair.near.memory));
    let mut handle = 7;
    let place = &raw mut handle;
    for bad in [4, 5, 7, 1 << 31, u32::MAX] {
        invalid(c!(corelane_reg(engine, memory, 64, CORELANE_MEMORY_DRAM, 0, bad, place)));
        invalid(c!(corelane_reg(engine, memory, 64, bad, 0, 0, place)));
        let (local, remote) = pair.near.segments(0, 64);
        let (l, r) = (&raw const local, &raw const remote);
        invalid(c!(corelane_prepare(pair.near.conn, bad, l, r, 1, place)));
        assert_eq!(handle, 0);
    }
    for access in 0..4 {
        let region = pair.near.engine.register(&pair.near.memory, access);
        let desc = pair.near.engine.import(&descriptor_of(region));
        let mut info =
            corelane_region_info { addr: 0, len: 0, kind: 9, device: 9, access: 9, reserved: 9 };
        ok(c!(corelane_descriptor_info(desc, &raw mut info)));
        let expected = corelane_region_info {
            addr: pair.near.memory.address(0),
            len: 4096,
            kind: CORELANE_MEMORY_DRAM,
            device: 0,
            access,
            reserved: 0,
        };
        assert_eq!(info, expected);
        ok(corelane_mr_destroy(region));
    }
}

#[test]
fn memory_is_described_where_it_is_registered_and_nowhere_else() {
    let engine = Engine::new("near");
    let memory = Buffer::new(8192);
    let region = engine.register(&memory, CORELANE_ACCESS_REMOTE_READ);
    let mut info =
        corelane_region_info { addr: 0, len: 0, kind: 9, device: 9, access: 9, reserved: 9 };
    let query = |offset: u64, len, info: &mut corelane_region_info| {
        let at = memory.address(0).wrapping_add(offset) as *const c_void;
        c!(corelane_query_memory(engine.0, at, len, info))
    };
    for (offset, len) in [(0, 8192), (0, 1), (8191, 1), (4096, 4096)] {
        ok(query(offset, len, &mut info));
        assert_eq!((info.addr, info.len), (memory.address(0), 8192));
        assert_eq!((info.kind, info.device, info.access, info.reserved), (0, 0, 1, 0));
    }
    let before = info;
    for (offset, len) in [(0, 8193), (8192, 1), (8191, 2), (0u64.wrapping_sub(1), 1)] {
        refused(query(offset, len, &mut info), CORELANE_ERR_NOT_FOUND);
    }
    let null_page = c!(corelane_query_memory(engine.0, null(), 1, &raw mut info));
    refused(null_page, CORELANE_ERR_NOT_FOUND);
    assert_eq!(info, before, "an answer of a call that failed");
    ok(corelane_mr_destroy(region));
    refused(query(0, 1, &mut info), CORELANE_ERR_NOT_FOUND);
}

#[test]
fn the_last_error_belongs_to_its_thread_and_stays_until_the_next() {
    let engine = Engine::new("near");
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let engine = &engine;
            scope.spawn(move || {
                assert_eq!(last_error(), "", "a thread that has done nothing wrong");
                for round in 0..200u64 {
                    let handle = 0x2_0000 + thread * 1000 + round;
                    refused(corelane_connect(handle, 0), CORELANE_ERR_INVALID_HANDLE);
                    let words = last_error();
                    assert!(words.contains(&format!("{handle:#x}")), "{words}");
                    // A call that succeeds leaves it.
                    let mut stats = corelane_engine_stats::default();
                    ok(c!(corelane_stats(engine.0, &raw mut stats, size_of_val(&stats))));
                    assert_eq!(last_error(), words);
                }
            });
        }
    });
}

#[test]
fn every_number_has_a_name_as_a_status() {
    // SAFETY: a string that is never freed.
    let name = |status: i32| unsafe { std::ffi::CStr::from_ptr(corelane_status_name(status)) };
    let mut names: Vec<_> = (-24..=1).map(name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 26, "statuses of one name");
    for strange in [i32::MIN, -1000, -25, 2, 77, i32::MAX] {
        assert!(!names.contains(&name(strange)) && !name(strange).is_empty());
    }
    // SAFETY: as above.
    let version = unsafe { std::ffi::CStr::from_ptr(corelane_version()) };
    assert_eq!(version.to_str().unwrap(), env!("CARGO_PKG_VERSION"));
}

/// With a driver whose GPUs are threads, tests/gpu_faults.rs asks, too.
#[test]
fn memory_of_a_gpu_is_supported_where_there_is_one() {
    assert_eq!(corelane_memory_supported(CORELANE_MEMORY_DRAM), CORELANE_OK);
    invalid(corelane_memory_supported(77));
    let vram = corelane_memory_supported(CORELANE_MEMORY_VRAM);
    if corelane_tests::gpus(1).is_some() {
        assert_eq!(vram, CORELANE_OK);
    } else if !std::path::Path::new("/dev/nvidia0").exists() {
        refused(vram, CORELANE_ERR_NOT_SUPPORTED);
    }
}
