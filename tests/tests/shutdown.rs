//! Shutting down: bounded, whatever is going on, and final.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use corelane::{Access, Engine, Error, LocalEngine, Operation, Status, Transfer};
use corelane_tests::{
    BOUND, Buffer, Configuration, Target, end_of, eventually, kind, needs_the_peer, outcome,
    over_each_transport, target,
};

over_each_transport!(
    a_shutdown_ends_all_transfers_and_their_memory_is_left_alone,
    an_engine_that_is_shut_down_says_so_to_every_call,
    threads_that_post_and_poll_survive_a_shutdown_from_several_threads,
    the_last_handle_shuts_the_engine_down,
    tasks_on_a_lane_do_not_keep_an_engine_from_shutting_down,
    a_task_on_a_lane_can_shut_its_engine_down,
);

const LEN: usize = 8 << 20;

fn reads(engine: &Engine, far: &Target, memory: &Buffer, count: usize) -> Vec<Transfer> {
    let peer = engine.load_peer(&far.metadata).unwrap();
    let region = memory.register(engine, Access::LOCAL);
    (0..count)
        .map(|i| {
            let len = if i % 2 == 0 { LEN as u64 } else { 100 };
            let (local, remote) = ([region.segment(0, len)], [far.region.segment(0, len)]);
            engine.prepare(Operation::Read, &peer, &local, &remote).unwrap().transfer()
        })
        .collect()
}

fn a_shutdown_ends_all_transfers_and_their_memory_is_left_alone(config: Configuration) {
    let mut patient = config();
    patient.liveness = BOUND;
    let far = target!("far", LEN, "read-write", "liveness_ms=60000");
    for frozen in [false, true] {
        let engine = Engine::new("near", patient.clone()).unwrap();
        let memory = Buffer::new(LEN);
        let transfers = reads(&engine, &far, &memory, 30);
        end_of(&transfers[0]).unwrap();
        if frozen {
            far.process.freeze();
        }
        for transfer in &transfers {
            transfer.post().unwrap();
        }
        let start = std::time::Instant::now();
        engine.shutdown().unwrap();
        assert!(start.elapsed() < BOUND);
        memory.poison(0, LEN);
        let mut failed = 0;
        for transfer in &transfers {
            match transfer.status() {
                Status::Done => {}
                Status::Failed(error) => {
                    let kind = kind(&error);
                    assert!(matches!(kind, "Shutdown" | "Cancelled"), "{kind}: {error}");
                    failed += 1;
                }
                other => panic!("{other:?} after the shutdown"),
            }
            let _ = outcome(transfer);
        }
        let answers = !frozen || !needs_the_peer(&patient);
        assert!(failed > 0 || answers, "a frozen peer cannot have answered");
        if frozen {
            far.process.thaw();
        }
        // Another engine has the same peer send the same bytes; nothing comes here.
        let other = Engine::new("other", config()).unwrap();
        let elsewhere = Buffer::new(LEN);
        end_of(&reads(&other, &far, &elsewhere, 1)[0]).unwrap();
        elsewhere.assert_pattern(1, 0, LEN, 0);
        memory.assert_poison(0, LEN);
    }
}

fn an_engine_that_is_shut_down_says_so_to_every_call(config: Configuration) {
    let far = target!("far", LEN);
    let engine = Engine::new("near", config()).unwrap();
    let memory = Buffer::new(LEN);
    let region = memory.register(&engine, Access::LOCAL);
    let transfers = reads(&engine, &far, &memory, 2);
    end_of(&transfers[0]).unwrap();
    let peer = engine.peer("far").unwrap();
    engine.shutdown().unwrap();
    engine.shutdown().unwrap();
    let segments = || ([region.segment(0, 8)], [far.region.segment(0, 8)]);
    let (local, remote) = segments();
    // SAFETY: refused, so never used.
    let registered = unsafe { engine.register(memory.address(0) as *mut u8, 8, Access::LOCAL) };
    let errors: Vec<Error> = vec![
        registered.unwrap_err(),
        engine.load_peer(&far.metadata).unwrap_err(),
        engine.prepare(Operation::Read, &peer, &local, &remote).unwrap_err(),
        engine.notifications().unwrap_err(),
        engine.spawn_on(&peer, |_: LocalEngine| async {}).map(drop).unwrap_err(),
        peer.connect(BOUND).unwrap_err(),
        peer.notify(b"too late").unwrap_err(),
        peer.disconnect().unwrap_err(),
        transfers[1].post().unwrap_err(),
        transfers[1].post_with_notification(b"too late").unwrap_err(),
    ];
    for error in errors {
        assert_eq!(kind(&error), "Shutdown", "{error}");
    }
    assert!(matches!(transfers[0].status(), Status::Done), "what was done stays done");
    // Its memory is free, and giving it back is no error.
    engine.deregister(&region).unwrap();
    assert!(!engine.metadata().is_empty() && engine.stats().totals.completed > 0);
}

fn threads_that_post_and_poll_survive_a_shutdown_from_several_threads(config: Configuration) {
    let far = target!("far", LEN);
    // The peer takes none of the notifications: where its room is full, a shutdown waits for this long.
    let mut config = config();
    config.linger = Duration::from_secs(1);
    for _ in 0..5 {
        let engine = Engine::new("near", config.clone()).unwrap();
        let memory = Buffer::new(LEN);
        let transfers = reads(&engine, &far, &memory, 6);
        end_of(&transfers[0]).unwrap();
        let down = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for transfer in &transfers {
                scope.spawn(|| {
                    loop {
                        match end_of(transfer) {
                            Ok(()) => assert!(!down.load(Ordering::SeqCst)),
                            Err(error) => {
                                let kind = kind(&error);
                                assert!(matches!(kind, "Shutdown" | "Cancelled"), "{error}");
                                if kind == "Shutdown" {
                                    break;
                                }
                            }
                        }
                    }
                });
            }
            let peer = engine.peer("far").unwrap();
            scope.spawn(move || while peer.notify(b"on and on").is_ok() {});
            scope.spawn(|| while engine.notifications().is_ok() {});
            let before = engine.stats().totals.completed;
            eventually("all are at it", || engine.stats().totals.completed > before + 20);
            for _ in 0..3 {
                scope.spawn(|| engine.shutdown().unwrap());
            }
        });
        engine.shutdown().unwrap();
        down.store(true, Ordering::SeqCst);
        assert_eq!(kind(&end_of(&transfers[0]).unwrap_err()), "Shutdown");
    }
}

fn the_last_handle_shuts_the_engine_down(config: Configuration) {
    let mut far = target!("far", 4096);
    let engine = Engine::new("near", config()).unwrap();
    far.process.load(&engine.metadata());
    far.process.ask("connect near");
    let clone = engine.clone();
    drop(engine);
    clone.notifications().unwrap();
    far.process.ask("notify near 01");
    assert_eq!(corelane_tests::collect(&clone, 1).len(), 1);
    drop(clone);
    let error = far.process.try_ask("connect near");
    if error.is_ok() {
        // It may not have heard of it yet, but it will.
        eventually("the peer is gone", || far.process.try_ask("connect near").is_err());
    }
}

fn tasks_on_a_lane_do_not_keep_an_engine_from_shutting_down(config: Configuration) {
    let far = target!("far", LEN);
    let engine = Engine::new("near", config()).unwrap();
    let memory = Buffer::new(LEN);
    let transfer = reads(&engine, &far, &memory, 1).remove(0);
    let peer = engine.peer("far").unwrap();
    let sleeping = engine.spawn_on(&peer, |local: LocalEngine| async move {
        loop {
            local.sleep(BOUND).await;
        }
    });
    let busy = engine.spawn_on(&peer, |local: LocalEngine| async move {
        loop {
            // Fails at the end; the task does not care.
            let _ = transfer.post();
            let _ = transfer.completed().await;
            local.yield_now().await;
        }
    });
    let tasks: [corelane::Task<()>; 2] = [sleeping.unwrap(), busy.unwrap()];
    eventually("they run", || engine.stats().totals.completed > 10);
    engine.shutdown().unwrap();
    for task in tasks {
        assert!(task.wait().is_err(), "a task that never returns has returned");
    }
}

fn a_task_on_a_lane_can_shut_its_engine_down(config: Configuration) {
    let far = target!("far", LEN);
    let engine = Engine::new("near", config()).unwrap();
    let memory = Buffer::new(LEN);
    let transfers = reads(&engine, &far, &memory, 4);
    end_of(&transfers[0]).unwrap();
    for transfer in &transfers {
        transfer.post().unwrap();
    }
    let (peer, inner) = (engine.peer("far").unwrap(), engine.clone());
    // It may be cut short by what it asks for.
    let _ = engine.spawn_on(&peer, move |_| async move { inner.shutdown() }).unwrap().wait();
    eventually("the engine is shut down", || engine.notifications().is_err());
    for transfer in &transfers {
        let _ = outcome(transfer);
    }
    engine.shutdown().unwrap();
    assert_eq!(kind(&end_of(&transfers[0]).unwrap_err()), "Shutdown");
}
