//! Handles of the C API that are zero, freed, of another kind, of another engine, or made up.
//!
//! Alone in its binary, and one test at a time: what one makes up may be what another has.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

// The other tests of the C API use the rest of it.
#[allow(dead_code)]
#[path = "c_api/api.rs"]
mod api;

use std::sync::{Mutex, MutexGuard, PoisonError};

use api::*;
use corelane_tests::Random;

/// A call of a function that takes a handle: its name, and the call with everything else right.
type Call<'a> = (&'static str, Box<dyn Fn(u64) -> corelane_status + 'a>);

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One live handle of each kind.
struct Zoo {
    pair: Pair,
    xfer: corelane_xfer_t,
    // Given back last.
    _alone: MutexGuard<'static, ()>,
}

const KINDS: [&str; 5] = ["engine", "connection", "region", "descriptor", "transfer"];

impl Zoo {
    fn new() -> Self {
        let alone = alone();
        let pair = Pair::new(4096);
        let xfer = pair.near.prepare(CORELANE_READ, 64);
        Self { pair, xfer, _alone: alone }
    }

    fn handles(&self) -> [u64; 5] {
        let near = &self.pair.near;
        [near.engine.0, near.conn, near.region, near.desc, self.xfer]
    }
}

unsafe extern "C" fn nobody(
    _: *mut std::ffi::c_void,
    _: *const std::ffi::c_char,
    _: usize,
    _: *const std::ffi::c_void,
    _: usize,
) {
    unreachable!("a notification of an engine that does not exist");
}

/// Every function of the API that takes a handle, by kind; all else is as it should be. Waits are long: a bad handle
/// is no reason to wait.
#[allow(clippy::too_many_lines)] // One line each.
fn calls(of: &Zoo) -> [Vec<Call<'static>>; 5] {
    let near = &of.pair.near;
    let (conn, desc) = (near.conn, near.desc);
    let ((local, remote), bytes) = (near.segments(0, 64), *b"payload!");
    let (metadata, descriptor) = (of.pair.far.metadata(), descriptor_of(of.pair.far_region));
    let place = || [0u8; 512];
    macro_rules! call {
        ($name:literal, $handle:ident, $body:expr) => {
            ($name, Box::new(move |$handle| $body) as Box<dyn Fn(u64) -> corelane_status>)
        };
    }
    let metadata_too = metadata.clone();
    let engine = vec![
        call!("engine_destroy", h, corelane_engine_destroy(h)),
        call!("get_metadata", h, {
            let (mut b, mut len) = (place(), 0);
            c!(corelane_get_metadata(h, b.as_mut_ptr().cast(), b.len(), &raw mut len))
        }),
        call!("get_option", h, {
            let (mut b, mut len) = (place(), 0);
            let name = c"lanes".as_ptr();
            c!(corelane_get_option(h, name, b.as_mut_ptr().cast(), b.len(), &raw mut len))
        }),
        call!("accept", h, c!(corelane_accept(h, BOUND_MS, &mut 0))),
        call!("stop_accept", h, corelane_stop_accept(h)),
        call!("start_listener", h, corelane_start_listener(h)),
        call!("reg", h, {
            let mut region = 7;
            let memory = local.addr as *mut std::ffi::c_void;
            let status =
                c!(corelane_reg(h, memory, 64, CORELANE_MEMORY_DRAM, 0, 0, &raw mut region));
            assert_eq!(region, 0);
            status
        }),
        call!("alloc", h, {
            let (mut addr, mut region) = (std::ptr::dangling_mut(), 7);
            let status = c!(corelane_alloc(h, 64, 0, &raw mut addr, &raw mut region));
            assert!(addr.is_null() && region == 0);
            status
        }),
        call!("query_memory", h, {
            let mut b = [0u64; 8];
            c!(corelane_query_memory(h, local.addr as *const _, 8, b.as_mut_ptr().cast()))
        }),
        call!("import_descriptor", h, {
            let bytes = descriptor.as_ptr().cast();
            c!(corelane_import_descriptor(h, bytes, descriptor.len(), &mut 0))
        }),
        call!("get_notifs", h, {
            c!(corelane_get_notifs(h, Some(nobody), std::ptr::null_mut(), &mut 0))
        }),
        call!("wait_notifs", h, {
            let context = std::ptr::null_mut();
            c!(corelane_wait_notifs(h, BOUND_MS, Some(nobody), context, &mut 0))
        }),
        call!("load_peer", h, {
            c!(corelane_load_peer(h, metadata.as_ptr().cast(), metadata.len(), &mut 0))
        }),
        call!("load_peer_as", h, {
            let ((name, len), all) = (chars(b"far"), &metadata_too);
            let bytes = all.as_ptr().cast();
            c!(corelane_load_peer_as(h, name, len, bytes, all.len(), &mut 0))
        }),
        call!("stats", h, {
            let mut stats = corelane_engine_stats::default();
            c!(corelane_stats(h, &raw mut stats, size_of_val(&stats)))
        }),
    ];
    let mut connection = vec![
        call!("send_notif", h, c!(corelane_send_notif(h, bytes.as_ptr().cast(), bytes.len()))),
        call!("conn_name", h, {
            let (mut b, mut len) = (place(), 0);
            c!(corelane_conn_name(h, b.as_mut_ptr().cast(), b.len(), &raw mut len))
        }),
        call!("connect", h, corelane_connect(h, BOUND_MS)),
        call!("disconnect", h, c!(corelane_disconnect(h, &mut 0))),
        call!("unload_peer", h, corelane_unload_peer(h, BOUND_MS)),
        call!("conn_destroy", h, corelane_conn_destroy(h)),
        call!("conn_stats", h, {
            let mut stats = corelane_peer_stats::default();
            c!(corelane_conn_stats(h, &raw mut stats, size_of_val(&stats)))
        }),
    ];
    let region = vec![
        call!("mr_destroy", h, corelane_mr_destroy(h)),
        call!("free", h, corelane_free(h)),
        call!("get_descriptor", h, {
            let (mut b, mut len) = (place(), 0);
            c!(corelane_get_descriptor(h, b.as_mut_ptr().cast(), b.len(), &raw mut len))
        }),
    ];
    let mut descriptors = vec![
        call!("descriptor_info", h, {
            let mut b = [0u64; 8];
            c!(corelane_descriptor_info(h, b.as_mut_ptr().cast()))
        }),
        call!("descriptor_destroy", h, corelane_descriptor_destroy(h)),
    ];
    for number in Lists::FUNCTIONS {
        let lists = move || Lists { conn, local, remote, indices: [0, 1] };
        let run = move |lists: Lists| {
            let (_, status, xfer) = lists.call(number);
            assert_eq!(xfer, 0, "a handle of a call that failed");
            status
        };
        connection.push(call!("prepare and its like", h, run(Lists { conn: h, ..lists() })));
        descriptors.push(call!("prepare and its like", h, {
            run(Lists { remote: corelane_remote_segment { desc: h, ..remote }, ..lists() })
        }));
    }
    assert_ne!(desc, 0);
    let transfer = vec![
        call!("post", h, corelane_post(h)),
        call!("post_notify", h, c!(corelane_post_notify(h, bytes.as_ptr().cast(), bytes.len()))),
        call!("xfer_status", h, corelane_xfer_status(h)),
        call!("xfer_peek", h, corelane_xfer_peek(h)),
        call!("xfer_wait", h, corelane_xfer_wait(h, BOUND_MS)),
        call!("xfer_error", h, {
            let (mut b, mut len) = (place(), 0);
            c!(corelane_xfer_error(h, b.as_mut_ptr().cast(), b.len(), &raw mut len))
        }),
        call!("cancel", h, corelane_cancel(h)),
        call!("release", h, corelane_release(h, BOUND_MS)),
        call!("estimate", h, c!(corelane_estimate(h, &mut 0, &mut 0))),
    ];
    [engine, connection, region, descriptors, transfer]
}

/// Panics unless every function refuses the handle, or every one but those of the kind it is of.
#[track_caller]
fn assert_refused(calls: &[Vec<Call<'_>>; 5], handle: u64, kind: Option<usize>) {
    for (_, calls) in calls.iter().enumerate().filter(|(number, _)| kind != Some(*number)) {
        for (name, call) in calls {
            let status = call(handle);
            assert_eq!(
                status,
                CORELANE_ERR_INVALID_HANDLE,
                "{name}({handle:#x}): {}",
                last_error()
            );
            let words = last_error();
            // It is an argument's kind that is named: where all are dead, it may be another argument's.
            assert!(KINDS.iter().any(|kind| words.contains(kind)), "{name}({handle:#x}): {words}");
        }
    }
}

#[test]
fn every_function_refuses_handles_that_are_none() {
    let zoo = Zoo::new();
    let calls = calls(&zoo);
    for handle in [0, 1, 7, u64::MAX, u64::MAX >> 4, 1 << 60, 5 << 60, i64::MAX as u64] {
        if !zoo.handles().contains(&handle) && !is_of_far(&zoo, handle) {
            assert_refused(&calls, handle, None);
        }
    }
    let mut random = Random::new(17);
    for _ in 0..1000 {
        // With the mark of a kind, and without.
        let handle = random.next();
        assert_refused(&calls, handle, None);
        assert_refused(&calls, handle >> 4 | (handle % 5 + 1) << 60, None);
    }
    ok(corelane_release(zoo.xfer, BOUND_MS));
}

#[test]
fn every_function_refuses_a_live_handle_of_another_kind() {
    let zoo = Zoo::new();
    let calls = calls(&zoo);
    for (kind, handle) in zoo.handles().into_iter().enumerate() {
        assert_refused(&calls, handle, Some(kind));
        for other in (0..5).filter(|other| *other != kind) {
            // The right mark on the wrong number. (It may be the right number of both kinds.)
            let forged = handle & (u64::MAX >> 4) | (other as u64 + 1) << 60;
            if !zoo.handles().contains(&forged) && !is_of_far(&zoo, forged) {
                assert_refused(&calls, forged, None);
            }
        }
    }
    // None of them came to harm.
    assert_eq!(run(zoo.xfer), CORELANE_OK);
    zoo.pair.near.memory.assert_pattern(1, 0, 64, 0);
}

fn is_of_far(zoo: &Zoo, handle: u64) -> bool {
    handle == zoo.pair.far.0 || handle == zoo.pair.far_region
}

#[test]
fn a_handle_with_a_flipped_bit_is_no_handle() {
    let zoo = Zoo::new();
    let calls = calls(&zoo);
    for handle in zoo.handles() {
        for bit in 0..64 {
            let forged = handle ^ 1 << bit;
            if !zoo.handles().contains(&forged) && !is_of_far(&zoo, forged) {
                assert_refused(&calls, forged, None);
            }
        }
    }
    assert_eq!(run(zoo.xfer), CORELANE_OK);
}

#[test]
fn a_freed_handle_is_none_and_is_not_given_out_again() {
    let zoo = Zoo::new();
    let calls = calls(&zoo);
    let near = &zoo.pair.near;
    let far_metadata = zoo.pair.far.metadata();
    let far_descriptor = descriptor_of(zoo.pair.far_region);
    let mut freed = Vec::new();
    for _ in 0..50 {
        let region = near.engine.register(&near.memory, 0);
        ok(corelane_mr_destroy(region));
        let allocated = near.engine.allocate(4096, 0);
        ok(corelane_free(allocated));
        let (conn, desc) = (near.engine.load(&far_metadata), near.engine.import(&far_descriptor));
        ok(corelane_conn_destroy(conn));
        ok(corelane_descriptor_destroy(desc));
        let xfer = near.prepare(CORELANE_READ, 64);
        ok(corelane_release(xfer, 0));
        freed.extend([region, allocated, conn, desc, xfer]);
    }
    for handle in &freed {
        assert_refused(&calls, *handle, None);
    }
    let live = zoo.handles();
    let count = freed.len();
    freed.extend(live);
    freed.sort_unstable();
    freed.dedup();
    assert_eq!(freed.len(), count + live.len(), "a number was given out twice");
    assert_eq!(run(zoo.xfer), CORELANE_OK);
}

#[test]
fn handles_die_with_their_engine() {
    let zoo = Zoo::new();
    let calls = calls(&zoo);
    let near = &zoo.pair.near;
    let unposted = near.prepare(CORELANE_WRITE, 8);
    let allocated = near.engine.allocate(4096, 3);
    let unloaded = near.engine.load(&zoo.pair.far.metadata());
    ok(corelane_unload_peer(unloaded, 0));
    assert_eq!(run(zoo.xfer), CORELANE_ERR_CANCELLED, "its peer was unloaded");
    ok(corelane_engine_destroy(near.engine.0));
    for handle in zoo.handles().into_iter().chain([unposted, unloaded, allocated]) {
        assert_refused(&calls, handle, None);
    }
    // The other engine is not touched.
    assert_eq!(zoo.pair.far.stats().regions, 1);
    ok(corelane_mr_destroy(zoo.pair.far_region));
    ok(corelane_engine_destroy(zoo.pair.far.0));
    refused(corelane_mr_destroy(zoo.pair.far_region), CORELANE_ERR_INVALID_HANDLE);
}

#[test]
fn objects_of_different_engines_do_not_mix() {
    let _alone = alone();
    let (ours, theirs) = (Pair::new(4096), Pair::new(4096));
    // The same peer and the same bytes, imported by another engine.
    let imported = theirs.near.engine.import(&descriptor_of(ours.far_region));
    for number in Lists::FUNCTIONS {
        let mut lists = Lists::of(&ours.near);
        lists.remote.desc = imported;
        let (name, status, xfer) = lists.call(number);
        assert_eq!((status, xfer), (CORELANE_ERR_INVALID_HANDLE, 0), "{name}: {}", last_error());
        assert!(last_error().contains("another engine"), "{name}: {}", last_error());
        // Another engine's memory is not registered here.
        let mut lists = Lists::of(&ours.near);
        lists.local.addr = theirs.near.memory.address(0);
        let (name, status, xfer) = lists.call(number);
        assert_eq!((status, xfer), (CORELANE_ERR_NOT_REGISTERED, 0), "{name}: {}", last_error());
        // A peer of another engine, with that engine's descriptor.
        let mut lists = Lists::of(&ours.near);
        (lists.conn, lists.remote.desc) = (theirs.near.conn, theirs.near.desc);
        let (name, status, xfer) = lists.call(number);
        assert_ne!(status, CORELANE_OK, "{name}");
        assert_eq!(xfer, 0, "{name}");
        let (name, status, xfer) = Lists::of(&ours.near).call(number);
        assert_eq!(status, CORELANE_OK, "{name}: {}", last_error());
        ok(corelane_release(xfer, BOUND_MS));
    }
}

#[test]
fn a_list_with_one_bad_descriptor_is_refused_as_a_whole() {
    let _alone = alone();
    let pair = Pair::new(4096);
    let (local, remote) = pair.near.segments(0, 16);
    let locals = [local; 64];
    for bad in [0, 1, 31, 63] {
        let mut remotes = [remote; 64];
        remotes[bad].desc = pair.near.conn;
        let mut xfer = 7;
        let status = c!(corelane_readv(
            pair.near.conn,
            locals.as_ptr(),
            remotes.as_ptr(),
            locals.len(),
            &raw mut xfer
        ));
        refused(status, CORELANE_ERR_INVALID_HANDLE);
        assert_eq!(xfer, 0);
    }
    assert_eq!(pair.near.engine.stats().posted, 0);
    pair.near.memory.assert_poison(0, 4096);
}

#[test]
fn transfers_keep_what_they_need_of_descriptors_and_connections() {
    let _alone = alone();
    let pair = Pair::new(4096);
    let xfer = pair.near.prepare(CORELANE_READ, 4096);
    ok(corelane_descriptor_destroy(pair.near.desc));
    ok(corelane_conn_destroy(pair.near.conn));
    for _ in 0..3 {
        pair.near.memory.poison(0, 4096);
        assert_eq!(run(xfer), CORELANE_OK);
        pair.near.memory.assert_pattern(1, 0, 4096, 0);
    }
    ok(corelane_release(xfer, BOUND_MS));
    assert_eq!(corelane_release(xfer, BOUND_MS), CORELANE_ERR_INVALID_HANDLE);
}
