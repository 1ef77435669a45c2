//! A forked child has its parent's engine only in name. Alone in its binary, since it forks.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane::{Access, Engine, Error, Operation, Status};
use corelane_tests::{
    BOUND, Buffer, Configuration, collect, end_of, in_forked_child, kind, over_each_transport,
    target, to_hex,
};

over_each_transport!(a_forked_childs_engine_answers_with_errors_and_leaves_the_parents_alone,);

fn a_forked_childs_engine_answers_with_errors_and_leaves_the_parents_alone(config: Configuration) {
    const LEN: usize = 1 << 20;
    let mut far = target!("far", LEN);
    let engine = Engine::new("near", config()).unwrap();
    far.process.load(&engine.metadata());
    let memory = Buffer::new(LEN);
    let region = memory.register(&engine, Access::LOCAL);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let plan = |len| {
        let (local, remote) = ([region.segment(0, len)], [far.region.segment(0, len)]);
        engine.prepare(Operation::Read, &peer, &local, &remote)
    };
    let (small, bulk) = (plan(100).unwrap().transfer(), plan(LEN as u64).unwrap().transfer());
    end_of(&small).unwrap();
    end_of(&bulk).unwrap();
    for round in 0..5 {
        bulk.post().unwrap();
        let code = in_forked_child(|| {
            // SAFETY: refused, so never used.
            let registered =
                unsafe { engine.register(memory.address(0) as *mut u8, 8, Access::LOCAL) };
            let errors: [Option<Error>; 11] = [
                registered.err(),
                engine.deregister(&region).err(),
                engine.load_peer(&far.metadata).err(),
                plan(8).err(),
                engine.notifications().err(),
                peer.notify(b"child").err(),
                peer.connect(BOUND).err(),
                peer.disconnect().err(),
                small.post().err(),
                small.post_with_notification(b"child").err(),
                engine.shutdown().err(),
            ];
            for (i, error) in errors.iter().enumerate() {
                if error.as_ref().map(kind) != Some("Shutdown") {
                    return i as i32 + 1;
                }
            }
            // What the parent has in flight is nothing to wait for here.
            if bulk.wait(BOUND).is_ok() && !matches!(bulk.status(), Status::Done) {
                return 50;
            }
            if matches!(bulk.status(), Status::InProgress) {
                return 51;
            }
            bulk.cancel();
            0
        });
        assert_eq!(code, 0, "the child's engine (codes 1..=11: the call of that number)");
        corelane_tests::outcome(&bulk).unwrap();
        memory.assert_pattern(1, 0, LEN, 0);
        for transfer in [&small, &bulk] {
            memory.poison(0, LEN);
            end_of(transfer).unwrap();
            memory.assert_pattern(1, 0, transfer.plan().bytes() as usize, 0);
        }
        far.process.ask(&format!("notify near {}", to_hex(&[round])));
        assert_eq!(collect(&engine, 1)[0].payload, [round]);
    }

    // A child that drops everything it has inherited ends nothing of the parent's.
    let handles = (engine.clone(), peer.clone(), region.clone(), plan(64).unwrap().transfer());
    let mut inherited = Some((engine.clone(), handles));
    let code = in_forked_child(|| {
        drop(inherited.take());
        0
    });
    assert_eq!(code, 0);
    end_of(&bulk).unwrap();
    assert!(peer.is_connected());
    assert_eq!(engine.stats().totals.links_down, 0, "the child has closed a connection");

    // A child can have an engine of its own.
    let code = in_forked_child(|| {
        let Ok(own) = Engine::new("child", config()) else { return 1 };
        let Ok(to_far) = own.load_peer(&far.metadata) else { return 2 };
        if to_far.connect(BOUND).is_err() {
            return 3;
        }
        if own.shutdown().is_err() {
            return 4;
        }
        0
    });
    assert_eq!(code, 0, "the child's own engine (1 new, 2 load, 3 connect, 4 shutdown)");
    end_of(&bulk).unwrap();
    engine.shutdown().unwrap();
}
