//! Many threads that do everything at once, also to what others are destroying.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use corelane_tests::Random;

use crate::api::*;

/// Handles that all threads use, whoever made them, and whether or not they are still valid.
struct Board {
    slots: Vec<AtomicU64>,
}

impl Board {
    fn new(len: usize) -> Self {
        Self { slots: (0..len).map(|_| AtomicU64::new(0)).collect() }
    }

    fn put(&self, random: &mut Random, handle: u64) {
        self.slots[random.below(self.slots.len())].store(handle, Ordering::Relaxed);
    }

    fn get(&self, random: &mut Random) -> u64 {
        self.slots[random.below(self.slots.len())].load(Ordering::Relaxed)
    }
}

struct Boards {
    engines: Board,
    conns: Board,
    regions: Board,
    allocations: Board,
    descs: Board,
    xfers: Board,
    memory: Buffer,
    metadata: Vec<u8>,
    descriptor: Vec<u8>,
    /// Where the peer's memory is.
    remote: u64,
}

/// What a call may answer here, of what is documented for it.
#[track_caller]
fn one_of(status: corelane_status, allowed: &[corelane_status]) {
    let always = [CORELANE_OK, CORELANE_ERR_INVALID_HANDLE, CORELANE_ERR_SHUTDOWN];
    assert!(always.contains(&status) || allowed.contains(&status), "{status:?}: {}", last_error());
}

const ENDS: [corelane_status; 7] = [
    CORELANE_IN_PROGRESS,
    CORELANE_ERR_NOT_POSTED,
    CORELANE_ERR_CANCELLED,
    CORELANE_ERR_REMOTE_DISCONNECT,
    CORELANE_ERR_CONNECT,
    CORELANE_ERR_NOT_REGISTERED,
    CORELANE_ERR_TIMEOUT,
];

fn anything(boards: &Boards, random: &mut Random) {
    let b = boards;
    let (engine, conn) = (b.engines.get(random), b.conns.get(random));
    let (desc, xfer) = (b.descs.get(random), b.xfers.get(random));
    let mut handle = 7;
    let place = &raw mut handle;
    let local = corelane_local_segment { addr: b.memory.address(0), len: 4096, region: 0 };
    let remote = corelane_remote_segment { desc, addr: b.remote, len: 4096 };
    match random.below(26) {
        0..=2 => {
            let at = pointer(&b.memory);
            let status = c!(corelane_reg(engine, at, b.memory.len(), 0, 0, 3, place));
            one_of(status, &[]);
            b.regions.put(random, handle);
        }
        3..=4 => {
            let at = b.metadata.as_ptr().cast();
            one_of(c!(corelane_load_peer(engine, at, b.metadata.len(), place)), &[]);
            b.conns.put(random, handle);
        }
        5..=6 => {
            let at = b.descriptor.as_ptr().cast();
            one_of(c!(corelane_import_descriptor(engine, at, b.descriptor.len(), place)), &[]);
            b.descs.put(random, handle);
        }
        7..=9 => {
            let (l, r) = (&raw const local, &raw const remote);
            let status = c!(corelane_prepare(conn, random.below(2) as u32, l, r, 1, place));
            one_of(status, &[CORELANE_ERR_NOT_REGISTERED, CORELANE_ERR_CONNECT]);
            b.xfers.put(random, handle);
        }
        10..=12 => one_of(corelane_post(xfer), &[CORELANE_ERR_BUSY, CORELANE_ERR_CANCELLED]),
        13 => {
            let status = c!(corelane_post_notify(xfer, b.descriptor.as_ptr().cast(), 8));
            one_of(status, &[CORELANE_ERR_BUSY, CORELANE_ERR_CANCELLED, CORELANE_ERR_BACKPRESSURE]);
        }
        14 => one_of(corelane_xfer_status(xfer), &ENDS),
        15 => one_of(corelane_xfer_wait(xfer, random.below(5) as i64), &ENDS),
        16 => one_of(corelane_cancel(xfer), &[]),
        17..=18 => one_of(corelane_release(xfer, random.below(5) as i64), &[CORELANE_ERR_BUSY]),
        19 => one_of(
            corelane_mr_destroy(b.regions.get(random)),
            &[
                CORELANE_ERR_BUSY,
                // Another thread is at it.
                CORELANE_ERR_INVALID_ARGUMENT,
            ],
        ),
        20 => one_of(corelane_descriptor_destroy(desc), &[]),
        21 => match random.below(4) {
            0 => one_of(corelane_unload_peer(conn, random.below(20) as i64), &[]),
            1 => one_of(c!(corelane_disconnect(conn, std::ptr::null_mut())), &[]),
            _ => one_of(corelane_conn_destroy(conn), &[]),
        },
        22 => {
            let mut list: Vec<(String, Vec<u8>)> = Vec::new();
            let context = (&raw mut list).cast();
            one_of(c!(corelane_get_notifs(engine, Some(take), context, std::ptr::null_mut())), &[]);
            let status = c!(corelane_send_notif(conn, b.descriptor.as_ptr().cast(), 8));
            one_of(
                status,
                &[CORELANE_ERR_BACKPRESSURE, CORELANE_ERR_CANCELLED, CORELANE_ERR_CONNECT],
            );
        }
        23 => {
            let mut addr = std::ptr::null_mut();
            one_of(c!(corelane_alloc(engine, 1 << 16, 3, &raw mut addr, place)), &[]);
            b.allocations.put(random, handle);
        }
        24 => {
            one_of(corelane_free(b.allocations.get(random)), &[CORELANE_ERR_BUSY]);
        }
        _ => {
            let mut stats = corelane_engine_stats::default();
            one_of(c!(corelane_stats(engine, &raw mut stats, size_of_val(&stats))), &[]);
            let mut stats = corelane_peer_stats::default();
            let status = c!(corelane_conn_stats(conn, &raw mut stats, size_of_val(&stats)));
            one_of(status, &[CORELANE_ERR_NOT_FOUND]);
        }
    }
}

#[test]
fn threads_may_use_what_others_destroy() {
    const THREADS: u64 = 6;
    let far = Engine::new("far");
    let far_memory = Buffer::with_pattern(1, 1 << 20);
    let far_region = far.register(&far_memory, 3);
    let boards = Boards {
        engines: Board::new(4),
        conns: Board::new(8),
        regions: Board::new(8),
        allocations: Board::new(8),
        descs: Board::new(8),
        xfers: Board::new(16),
        memory: Buffer::new(1 << 20),
        metadata: far.metadata(),
        descriptor: descriptor_of(far_region),
        remote: far_memory.address(0),
    };
    let stop = AtomicBool::new(false);
    let busy = AtomicU64::new(0);
    let made = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|seed| {
                let (boards, stop, busy) = (&boards, &stop, &busy);
                scope.spawn(move || {
                    let mut random = Random::new(seed);
                    while !stop.load(Ordering::Relaxed) {
                        anything(boards, &mut random);
                        busy.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        // Engines come and go under their hands.
        let mut made = Vec::new();
        let start = Instant::now();
        while made.len() < 40 || (busy.load(Ordering::Relaxed) < 20_000 && start.elapsed() < BOUND)
        {
            if workers.iter().any(|worker| worker.is_finished()) {
                break;
            }
            let mut engine = 0;
            let options = [("linger_ms", "10"), ("deregister_timeout_ms", "100")];
            ok(try_create(format!("near-{}", made.len()).as_bytes(), &options, &mut engine));
            made.push(engine);
            let slot = &boards.engines.slots[made.len() % boards.engines.slots.len()];
            let old = slot.swap(engine, Ordering::Relaxed);
            if old != 0 {
                ok(corelane_engine_destroy(old));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Relaxed);
        made
    });
    for slot in &boards.engines.slots {
        match slot.load(Ordering::Relaxed) {
            0 => {}
            engine => ok(corelane_engine_destroy(engine)),
        }
    }
    for engine in made {
        refused(corelane_engine_destroy(engine), CORELANE_ERR_INVALID_HANDLE);
    }
    // With the engines, all that was made of them is gone, whoever made it while they were destroyed.
    for xfer in &boards.xfers.slots {
        assert_eq!(corelane_xfer_status(xfer.load(Ordering::Relaxed)), CORELANE_ERR_INVALID_HANDLE);
    }
    for conn in &boards.conns.slots {
        assert_eq!(
            corelane_conn_destroy(conn.load(Ordering::Relaxed)),
            CORELANE_ERR_INVALID_HANDLE
        );
    }
    for desc in &boards.descs.slots {
        let status = corelane_descriptor_destroy(desc.load(Ordering::Relaxed));
        assert_eq!(status, CORELANE_ERR_INVALID_HANDLE);
    }
    for region in &boards.allocations.slots {
        let status = corelane_free(region.load(Ordering::Relaxed));
        assert_eq!(status, CORELANE_ERR_INVALID_HANDLE);
    }
    // And the one that all of them talked to is as well as before.
    let near = Side::new(&[], 4096, &boards.metadata, &boards.descriptor);
    let xfer = near.prepare(CORELANE_WRITE, 4096);
    assert_eq!(run(xfer), CORELANE_OK);
}

#[test]
fn nothing_is_made_of_an_engine_that_is_being_destroyed() {
    let descriptor = {
        let engine = Engine::new("far");
        let memory = Buffer::new(64);
        descriptor_of(engine.register(&memory, 3))
    };
    for _ in 0..100 {
        let engine = Engine::with("near", &[("linger_ms", "10")]);
        let (handle, barrier) = (engine.0, Barrier::new(4));
        let made: Vec<u64> = std::thread::scope(|scope| {
            let makers: Vec<_> = (0..3)
                .map(|_| {
                    let (barrier, descriptor) = (&barrier, &descriptor);
                    scope.spawn(move || {
                        let mut all = Vec::new();
                        barrier.wait();
                        loop {
                            let (mut desc, at) = (0, descriptor.as_ptr().cast());
                            let len = descriptor.len();
                            match c!(corelane_import_descriptor(handle, at, len, &raw mut desc)) {
                                CORELANE_OK => all.push(desc),
                                status => {
                                    refused(status, CORELANE_ERR_INVALID_HANDLE);
                                    return all;
                                }
                            }
                        }
                    })
                })
                .collect();
            barrier.wait();
            std::thread::sleep(Duration::from_micros(300));
            ok(corelane_engine_destroy(handle));
            makers.into_iter().flat_map(|maker| maker.join().unwrap()).collect()
        });
        let alive = made
            .iter()
            .filter(|desc| corelane_descriptor_destroy(**desc) != CORELANE_ERR_INVALID_HANDLE)
            .count();
        assert_eq!(alive, 0, "of {} descriptors that outlived their engine", made.len());
    }
}

#[test]
fn two_threads_free_an_object_once() {
    let pair = Pair::new(4096);
    let near = &pair.near;
    let (metadata, descriptor) = (pair.far.metadata(), descriptor_of(pair.far_region));
    for round in 0..300 {
        let handle = match round % 6 {
            0 => near.engine.load(&metadata),
            1 => near.engine.import(&descriptor),
            2 => near.engine.register(&near.memory, 0),
            3 => near.prepare(CORELANE_READ, 64),
            4 => near.engine.allocate(4096, 3),
            _ => {
                if round % 60 != 5 {
                    continue;
                }
                let mut engine = 0;
                ok(try_create(b"short-lived", &[], &mut engine));
                engine
            }
        };
        let free = || match round % 6 {
            0 => corelane_conn_destroy(handle),
            1 => corelane_descriptor_destroy(handle),
            2 => corelane_mr_destroy(handle),
            3 => corelane_release(handle, BOUND_MS),
            4 => corelane_free(handle),
            _ => corelane_engine_destroy(handle),
        };
        let barrier = Barrier::new(2);
        let answers: Vec<_> = std::thread::scope(|scope| {
            let threads = [0, 1].map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    free()
                })
            });
            threads.map(|thread| thread.join().unwrap()).into()
        });
        let freed = answers.iter().filter(|status| **status == CORELANE_OK).count();
        assert_eq!(freed, 1, "{:?}: {answers:?}", round % 6);
        refused(free(), CORELANE_ERR_INVALID_HANDLE);
    }
}

/// Posts a transfer while another thread releases it, at most `most` times; how often that was accepted.
fn post_until_freed(xfer: corelane_xfer_t, most: usize) -> usize {
    let mut posted = 0;
    while posted < most {
        match corelane_post(xfer) {
            CORELANE_OK => posted += 1,
            CORELANE_ERR_BUSY | CORELANE_ERR_CANCELLED => std::hint::spin_loop(),
            status => {
                refused(status, CORELANE_ERR_INVALID_HANDLE);
                break;
            }
        }
    }
    posted
}

#[test]
fn a_transfer_that_was_released_moves_nothing_whoever_posts_it() {
    const LEN: usize = 1 << 20;
    let pair = Pair::new(LEN);
    let near = &pair.near;
    let mut posted = 0;
    for round in 0..500u64 {
        let xfer = near.prepare(CORELANE_READ, LEN as u64);
        let barrier = Barrier::new(2);
        std::thread::scope(|scope| {
            let poster = scope.spawn(|| {
                barrier.wait();
                post_until_freed(xfer, 1)
            });
            barrier.wait();
            (0..round % 50 * 10).for_each(|_| std::hint::spin_loop());
            ok(corelane_release(xfer, -1));
            // From here on the memory is ours.
            near.memory.poison(0, LEN);
            posted += poster.join().unwrap();
        });
        let mut stats = corelane_peer_stats::default();
        corelane_tests::eventually("nothing is in flight", || {
            ok(c!(corelane_conn_stats(near.conn, &raw mut stats, size_of_val(&stats))));
            stats.in_flight == 0
        });
        near.memory.assert_poison(0, LEN);
    }
    assert!(posted > 0, "the poster was never first");
}

#[test]
fn a_release_ends_although_another_thread_posts_again_and_again() {
    let pair = Pair::new(1 << 20);
    for _ in 0..20 {
        let xfer = pair.near.prepare(CORELANE_READ, 1 << 20);
        let stop = AtomicBool::new(false);
        let status = std::thread::scope(|scope| {
            scope.spawn(|| {
                // The handle is freed in the end; if it is not, this thread gives way, and the test says so.
                while !stop.load(Ordering::Relaxed) {
                    post_until_freed(xfer, 1);
                }
            });
            std::thread::sleep(Duration::from_millis(2));
            let status = corelane_release(xfer, 10_000);
            stop.store(true, Ordering::Relaxed);
            status
        });
        ok(status);
    }
}
