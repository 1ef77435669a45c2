//! An engine whose application does something else, or whose lane has much to copy, is no silent peer.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::{Duration, Instant};

use corelane::{Access, Operation, Status};
use corelane_tests::{
    Configuration, Near, Target, end_of, local_config, over_local_and_tcp, target,
};

over_local_and_tcp!(an_application_that_calls_nothing_for_long_is_no_silent_peer,);

/// Far longer than a lane waits for a core on a busy machine, far shorter than what is watched.
const LIVENESS: Duration = Duration::from_millis(1500);
const WATCHED: Duration = Duration::from_secs(5);
const LEN: usize = 4 << 10;

/// Nobody was called silent, and no session has begun anew.
#[track_caller]
fn assert_undisturbed(near: &Near) {
    let totals = near.engine.stats().totals;
    assert_eq!((totals.liveness_timeouts, totals.links_down), (0, 0));
}

fn an_application_that_calls_nothing_for_long_is_no_silent_peer(config: Configuration) {
    let mut settings = config();
    settings.liveness = LIVENESS;
    let near = Near::new(settings, LEN);
    let mut far = target!("far", LEN);
    let peer = near.connect(&far.metadata);
    far.process.load(&near.engine.metadata());
    let ms = WATCHED.as_millis() / 2;
    for busy in [true, false] {
        // It has just called, and helped its lane where cores are few, so that the lane stands by.
        far.process.ask("notify near 6869");
        assert_eq!(corelane_tests::collect(&near.engine, 1)[0].payload, b"hi");
        if busy {
            far.process.ask(&format!("spin {ms}"));
        } else {
            // It waits for its next order.
            std::thread::sleep(WATCHED / 2);
        }
        assert!(peer.is_connected());
        assert_undisturbed(&near);
        end_of(&near.transfer(&peer, Operation::Read, (0, 0), &far.region, LEN)).unwrap();
        near.memory.assert_pattern(1, 0, LEN, 0);
    }
    assert_undisturbed(&near);
}

#[test]
fn a_lane_that_copies_hundreds_of_mebibytes_answers_its_other_peers() {
    const LARGE: usize = 256 << 20;
    const TRANSFERS: usize = 400;
    let mut config = local_config();
    // All of it by the lane.
    config.inline_bytes = 0;
    let copying = Near::named("copying", config, LARGE, Access::READ_WRITE);
    let far: Target = target!("far", LARGE);
    let peer = copying.connect_locally(&far.metadata);
    let mut config = local_config();
    config.liveness = LIVENESS;
    let watch = Near::named("watch", config, LEN, Access::LOCAL);
    let copier = watch.connect(&copying.engine.metadata());
    let region = copying.region.descriptor();
    end_of(&watch.transfer(&copier, Operation::Read, (0, 0), region, LEN)).unwrap();
    // More than it can do in the time.
    let all: Vec<_> = (0..TRANSFERS)
        .map(|_| copying.transfer(&peer, Operation::Read, (0, 0), &far.region, LARGE))
        .collect();
    end_of(&all[0]).unwrap();
    copying.memory.assert_pattern(1, 0, LARGE, 0);
    copying.memory.poison(0, LARGE);
    all.iter().for_each(|transfer| transfer.post().unwrap());
    let start = Instant::now();
    while start.elapsed() < WATCHED {
        std::thread::sleep(Duration::from_millis(50));
        assert!(copier.is_connected(), "after {:?}", start.elapsed());
    }
    assert!(matches!(all[TRANSFERS - 1].status(), Status::InProgress), "it had more to do");
    assert_undisturbed(&watch);
    assert_undisturbed(&copying);
    all.iter().for_each(|transfer| transfer.cancel());
    for transfer in &all {
        // Those that take turns may all have been under way.
        let _ = corelane_tests::outcome(transfer);
    }
    copying.memory.check_poison(0, LARGE).unwrap_err();
    end_of(&all[0]).unwrap();
    copying.memory.assert_pattern(1, 0, LARGE, 0);
    end_of(&watch.transfer(&copier, Operation::Read, (0, 0), region, LEN)).unwrap();
    watch.memory.assert_pattern(1, 0, LEN, 0);
}
