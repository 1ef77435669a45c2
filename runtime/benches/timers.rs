//! How late a 5 ms timer of an on-lane task is, spinning and parked (target: fires within 10 ms).

mod common;

use std::time::{Duration, Instant};

use common::*;
use corelane_runtime::{AssistMode, Spin};
use criterion::{Criterion, criterion_group, criterion_main};

fn timer_lateness(criterion: &mut Criterion) {
    for (state, spin) in [("spinning", Spin::Forever), ("parked", Spin::For(Duration::ZERO))] {
        for (kind, own) in [("lane", true), ("glommio", false)] {
            let (lane, _) = lane(None, spin, AssistMode::Always);
            let name = format!("timers/5ms-late/{state}/{kind}");
            measure_custom(criterion, &name, || {
                let task = lane.spawn(move |lane| async move {
                    let deadline = Instant::now() + Duration::from_millis(5);
                    match own {
                        true => lane.sleep(Duration::from_millis(5)).await,
                        false => glommio::timer::sleep(Duration::from_millis(5)).await,
                    }
                    Instant::now().saturating_duration_since(deadline)
                });
                task.wait().expect("task")
            });
            stop(&lane);
        }
    }
}

criterion_group! { name = benches; config = quick().sample_size(10); targets = timer_lateness }
criterion_main!(benches);
