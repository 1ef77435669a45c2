//! Lanes leave nothing behind. Alone in its process, because it counts descriptors and threads.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use corelane_runtime::*;

#[test]
fn starting_and_stopping_200_lanes_leaks_no_descriptor_and_no_thread() {
    // The first lane makes what the process keeps (glommio's statics).
    let (lane, _) = start(LaneConfig::default());
    lane.stop(STOP).unwrap();
    drop(lane);
    std::thread::sleep(Duration::from_millis(50));
    let before = (open_fds(), threads());
    for round in 0..25 {
        // Eight side by side; every other round ends without stop, by a task that never ends, or by a panic.
        let lanes: Vec<_> = (0..8)
            .map(|n| {
                let assist = if n % 2 == 0 { AssistMode::Always } else { AssistMode::Never };
                start(config(assist, Spin::default())).0
            })
            .collect();
        for (number, lane) in lanes.iter().enumerate() {
            submit(lane, Ask::Note(1));
            match (round + number) % 4 {
                0 => _ = lane.spawn(|_| std::future::pending::<()>()),
                1 => {
                    _ = lane
                        .spawn(|_| async { glommio::timer::sleep(Duration::from_secs(9)).await })
                }
                2 => submit(lane, Ask::Panic("on purpose")),
                _ => lane.stop(Duration::from_secs(5)).unwrap(),
            }
        }
        for lane in lanes {
            if round % 2 == 0 {
                _ = lane.stop(Duration::from_secs(5));
            }
        }
    }
    wait_until("all threads and descriptors gone", || {
        open_fds() <= before.0 && threads() <= before.1
    });
}
