//! What of the times of a session is agreed on, and what is chance.

use std::collections::BTreeSet;
use std::time::Duration;

use super::super::ConnectFailure;
use super::world::{World, ms};
use crate::plan::Operation::Read;
use crate::wire::Access;
use crate::wire::hello::LinkKind;

#[test]
fn the_smaller_liveness_timeout_of_both_sides_counts_for_both() {
    for (ours, theirs) in [(3000, 500), (500, 3000), (500, 500)] {
        let mut w = World::new(1, false);
        for node in 0..2 {
            w.register(node, 64, Access::READ_WRITE);
        }
        (w.liveness, w.liveness_of_b) = (ms(ours), Some(ms(theirs)));
        w.connect();
        for node in 0..2 {
            let agreed = w.nodes[node].core.liveness_timeout();
            assert_eq!(agreed, Some(ms(500)), "{ours} and {theirs}, of engine {node}");
        }
        w.partition();
        let (start, read) = (w.now, w.move_bytes(0, Read, (0, 0), (0, 0), 64, None));
        w.run_to_end(read);
        let took = w.now - start;
        assert!(w.error(read).is_disconnect() && took <= ms(500 * 6 / 5 + 100), "{took:?}");
        w.run(ms(700));
        assert!(!w.is_up(0) && !w.is_up(1), "the one that waits for nothing, too");
    }
}

/// How long an engine of this incarnation waits before each further attempt to connect, and what that is spread about.
fn pauses(incarnation: u128) -> Vec<(Duration, Duration)> {
    let mut w = World::new(1, false);
    w.restart(0, incarnation);
    let failure = ConnectFailure { reason: "no".into(), handshake: None, refused: false };
    w.notify(0, b"patient");
    (0..8)
        .map(|_| {
            w.call(0, |core, env| {
                core.connect_failed(LinkKind::Session, &failure, env);
                let Some((Some(at), pause)) = core.retry else { panic!("no further attempt") };
                core.connect(false);
                (at - env.now, pause)
            })
        })
        .collect()
}

#[test]
fn attempts_to_connect_are_spread_by_a_quarter_and_each_engine_by_its_own() {
    let all: Vec<_> = (1000..1050).map(pauses).collect();
    for of_one in &all {
        let steps: Vec<u128> = of_one.iter().map(|(_, pause)| pause.as_millis()).collect();
        assert_eq!(steps, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        for (wait, pause) in of_one {
            assert!(*wait >= *pause * 3 / 4 && *wait <= *pause * 5 / 4, "{wait:?} for {pause:?}");
        }
    }
    for attempt in 0..8 {
        let waits: BTreeSet<Duration> = all.iter().map(|of_one| of_one[attempt].0).collect();
        assert!(waits.len() > 25, "attempt {attempt}: {} waits of 50 engines", waits.len());
        let pause = all[0][attempt].1;
        let (first, last) = (waits.first().unwrap(), waits.last().unwrap());
        assert!(*first < pause * 9 / 10 && *last > pause * 11 / 10, "{first:?} to {last:?}");
    }
    let of_one: BTreeSet<u128> =
        all[0].iter().map(|(wait, pause)| wait.as_nanos() * 1024 / pause.as_nanos()).collect();
    assert!(of_one.len() > 4, "another for each attempt: {of_one:?}");
}
