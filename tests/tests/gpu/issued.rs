//! Copies of one range, which callers begin within `post`: on a GPU that can be held, so that it is seen what waits for them.

use super::*;
use corelane::AssistMode;
use corelane_tests::collect;

const LEN: usize = 5000;

struct Sides {
    near: GpuSide,
    far: GpuSide,
    peer: Peer,
    /// Copies that callers had begun when the test began.
    before: u64,
}

/// Two engines of this process, GPU 0.
fn sides(config: EngineConfig) -> Sides {
    let by_callers = config.inline_bytes > 0
        && config.inline_copy_bytes > 0
        && config.assist != AssistMode::Never;
    let (near, far) = (side(config, 0), GpuSide::new("far", local_config(), 0));
    far.memory.write(0, &pattern(1, 0, GPU_LEN));
    let peer = near.connect(&far.engine.metadata());
    let mut both = Sides { near, far, peer, before: 0 };
    // Connected is one thing, and the way to the peer's memory found another.
    if by_callers {
        let transfer = both.transfer(Operation::Read, 0);
        eventually("callers begin copies", || {
            end_of(&transfer).unwrap();
            both.begun_by_callers() > 0
        });
        both.before = both.begun_by_callers();
        both.near.memory.poison();
    }
    both
}

impl Sides {
    fn transfer(&self, operation: Operation, at: usize) -> Transfer {
        let local = self.near.memory.segment(at, LEN);
        let remote = self.far.region.descriptor().segment(at as u64 + 7, LEN as u64);
        let plan = self.near.engine.prepare(operation, &self.peer, &[local], &[remote]).unwrap();
        plan.transfer()
    }

    fn begun_by_callers(&self) -> u64 {
        self.near.engine.stats().totals.copied_by_callers - self.before
    }

    #[track_caller]
    fn assert_read(&self, at: usize) {
        let expected = pattern(1, at as u64 + 7, LEN);
        assert_bytes(&self.near.memory.read(at, LEN), &expected, "what was read");
    }
}

fn is_in_progress(transfer: &Transfer) -> bool {
    matches!(transfer.status(), Status::InProgress)
}

/// Lets a GPU go on after a while, from another thread.
fn let_go_soon(fake: FakeCuda) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        fake.hold(0, false);
    })
}

#[test]
fn a_copy_of_one_range_has_begun_when_post_returns() {
    let Some(fake) = fake("issued::a_copy_of_one_range_has_begun_when_post_returns") else {
        return;
    };
    let copies = || fake.calls(c"cuMemcpyAsync");
    let both = sides(local_config());
    let transfer = both.transfer(Operation::Read, 100);
    for round in 1..=20 {
        both.near.memory.poison();
        fake.hold(0, true);
        let before = copies();
        transfer.post().unwrap();
        assert_eq!(copies(), before + 1);
        assert!(is_in_progress(&transfer), "the GPU is held");
        fake.hold(0, false);
        outcome(&transfer).unwrap();
        both.assert_read(100);
        assert_eq!(both.begun_by_callers(), round);
    }
}

#[test]
fn where_callers_are_not_to_copy_they_begin_none() {
    let Some(_) = fake("issued::where_callers_are_not_to_copy_they_begin_none") else { return };
    let ways: [fn(&mut EngineConfig); 3] = [
        |config| config.inline_bytes = 0,
        |config| config.inline_copy_bytes = 0,
        |config| config.assist = AssistMode::Never,
    ];
    for way in ways {
        let mut config = local_config();
        way(&mut config);
        let both = sides(config);
        for _ in 0..10 {
            both.near.memory.poison();
            end_of(&both.transfer(Operation::Read, 100)).unwrap();
            both.assert_read(100);
        }
        assert_eq!(both.begun_by_callers(), 0, "all is the lane's");
    }
}

#[test]
fn further_copies_meanwhile_are_the_lanes() {
    let Some(fake) = fake("issued::further_copies_meanwhile_are_the_lanes") else { return };
    let both = sides(local_config());
    let all: Vec<Transfer> = (0..40).map(|at| both.transfer(Operation::Read, at * 6000)).collect();
    fake.hold(0, true);
    all.iter().for_each(|one| one.post().unwrap());
    assert!(all.iter().all(is_in_progress), "the GPU is held");
    fake.hold(0, false);
    for (at, one) in all.iter().enumerate() {
        outcome(one).unwrap();
        both.assert_read(at * 6000);
    }
    assert_eq!(both.begun_by_callers(), 1);
}

#[test]
fn a_copy_that_nobody_asks_about_ends_and_its_notification_goes() {
    let Some(fake) = fake("issued::a_copy_that_nobody_asks_about_ends_and_its_notification_goes")
    else {
        return;
    };
    let both = sides(local_config());
    both.near.memory.write(0, &pattern(2, 0, LEN));
    let write = both.transfer(Operation::Write, 0);
    for _ in 0..20 {
        fake.hold(0, true);
        write.post_with_notification(b"written").unwrap();
        std::thread::sleep(Duration::from_millis(2));
        assert!(both.far.engine.notifications().unwrap().is_empty(), "before the data");
        fake.hold(0, false);
        assert_eq!(collect(&both.far.engine, 1)[0].payload, b"written");
        assert_bytes(&both.far.memory.read(7, LEN), &pattern(2, 0, LEN), "at the notification");
        eventually("the transfer is done", || matches!(write.peek(), Status::Done));
        both.far.memory.poison();
    }
    assert_eq!(both.begun_by_callers(), 20);
}

#[test]
fn a_peer_is_left_after_what_was_begun_with_it_and_told_of_that() {
    let Some(fake) = fake("issued::a_peer_is_left_after_what_was_begun_with_it_and_told_of_that")
    else {
        return;
    };
    for unload in [false, true] {
        let mut config = local_config();
        config.linger = BOUND;
        let both = sides(config);
        both.near.memory.write(0, &pattern(2, 0, LEN));
        let write = both.transfer(Operation::Write, 0);
        fake.hold(0, true);
        write.post_with_notification(b"written").unwrap();
        let helper = let_go_soon(fake);
        let dropped = if unload {
            both.near.engine.unload_peer(&both.peer).unwrap()
        } else {
            both.peer.disconnect().unwrap()
        };
        assert_eq!(dropped, 0);
        outcome(&write).unwrap();
        assert_eq!(both.begun_by_callers(), 1);
        assert_eq!(collect(&both.far.engine, 1)[0].payload, b"written");
        assert_bytes(&both.far.memory.read(7, LEN), &pattern(2, 0, LEN), "before the goodbye");
        helper.join().unwrap();
    }
}

#[test]
fn memory_is_kept_while_a_copy_of_it_is_under_way() {
    let Some(fake) = fake("issued::memory_is_kept_while_a_copy_of_it_is_under_way") else { return };
    let mut config = local_config();
    config.deregister_timeout = Duration::from_millis(50);
    let both = sides(config);
    let transfer = both.transfer(Operation::Read, 0);
    fake.hold(0, true);
    transfer.post().unwrap();
    let helper = let_go_soon(fake);
    both.far.engine.deregister(&both.far.region).unwrap();
    both.assert_read(0);
    helper.join().unwrap();
    outcome(&transfer).unwrap();

    let (near, far) = (&both.near, GpuSide::new("another", local_config(), 0));
    far.memory.write(0, &pattern(1, 0, LEN + 7));
    let peer = near.connect(&far.engine.metadata());
    let (local, remote) =
        (near.memory.segment(0, LEN), far.region.descriptor().segment(7, LEN as u64));
    let plan = near.engine.prepare(Operation::Read, &peer, &[local], &[remote]).unwrap();
    let transfer = plan.transfer();
    let begun = both.begun_by_callers();
    eventually("callers begin copies", || {
        end_of(&transfer).unwrap();
        both.begun_by_callers() > begun
    });
    both.near.memory.poison();
    let begun = both.begun_by_callers();
    fake.hold(0, true);
    transfer.post().unwrap();
    // What has begun is waited for, also by who has given its handle up.
    transfer.cancel();
    drop(transfer);
    let error = near.engine.deregister(&near.region).unwrap_err();
    assert_eq!(kind(&error), "Busy", "{error}");
    fake.hold(0, false);
    eventually("it is quiet", || near.engine.deregister(&near.region).is_ok());
    both.assert_read(0);
    assert_eq!(both.begun_by_callers(), begun + 1);
}

#[test]
fn an_engine_ends_after_what_its_callers_have_begun() {
    let Some(fake) = fake("issued::an_engine_ends_after_what_its_callers_have_begun") else {
        return;
    };
    let both = sides(local_config());
    let transfer = both.transfer(Operation::Read, 0);
    fake.hold(0, true);
    transfer.post().unwrap();
    let helper = let_go_soon(fake);
    both.near.engine.shutdown().unwrap();
    both.assert_read(0);
    outcome(&transfer).unwrap();
    helper.join().unwrap();
}

#[test]
fn a_copy_that_the_driver_refuses_is_the_lanes() {
    let Some(fake) = fake("issued::a_copy_that_the_driver_refuses_is_the_lanes") else { return };
    let both = sides(local_config());
    let transfer = both.transfer(Operation::Read, 0);
    fake.refuse(c"cuMemcpyAsync", OUT_OF_MEMORY, 1);
    end_of(&transfer).unwrap();
    both.assert_read(0);
    assert_eq!(both.begun_by_callers(), 0);
    fake.refuse(c"cuMemcpyAsync", OUT_OF_MEMORY, 2);
    let error = end_of(&transfer).unwrap_err();
    assert!(error.to_string().contains("out of memory"), "{error}");
    end_of(&transfer).unwrap();
    assert_eq!(both.begun_by_callers(), 1);
}

#[test]
fn threads_that_post_at_the_same_time_get_what_they_asked_for() {
    if gpus(1).is_none() {
        return;
    }
    let both = sides(local_config());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let both = &both;
            scope.spawn(move || {
                let at = thread * 100_000;
                let transfer = both.transfer(Operation::Read, at);
                for round in 0..200 {
                    end_of(&transfer).unwrap();
                    if round % 20 == 0 {
                        both.assert_read(at);
                        both.near.memory.write(at, &[0; LEN]);
                    }
                }
            });
        }
    });
    assert!(both.begun_by_callers() > 0);
}
