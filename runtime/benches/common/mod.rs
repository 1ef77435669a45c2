//! What the benches share: a lane that publishes each message's number, and percentiles beside Criterion's mean.

#![allow(unreachable_pub, dead_code)] // Each bench uses its part.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use corelane_runtime::{
    AssistMode, Cx, Driver, Lane, LaneConfig, Readiness, Spin, histogram::Histogram, placement,
};
use criterion::Criterion;

pub struct Publisher(Arc<AtomicU64>);

impl Driver for Publisher {
    type Message = u64;

    fn on_message(&mut self, _: &mut Cx<'_>, number: u64) {
        self.0.store(number, Ordering::Release);
    }

    fn on_fd(&mut self, _: &mut Cx<'_>, _: u64, _: Readiness) -> bool {
        false
    }

    fn on_timer(&mut self, _: &mut Cx<'_>, _: u64) {}

    fn on_turn(&mut self, _: &mut Cx<'_>) -> bool {
        false
    }

    fn on_panic(&mut self, message: &str) {
        eprintln!("the lane panicked: {message}");
    }
}

pub fn lane(
    core: Option<usize>,
    spin: Spin,
    assist: AssistMode,
) -> (Lane<Publisher>, Arc<AtomicU64>) {
    let seen = Arc::new(AtomicU64::new(0));
    let publisher = Publisher(seen.clone());
    let config = LaneConfig { core, spin, assist, ..LaneConfig::default() };
    let lane = Lane::start(config, move |_| publisher).expect("lane");
    std::thread::sleep(Duration::from_millis(20));
    (lane, seen)
}

pub fn stop(lane: &Lane<Publisher>) {
    lane.stop(Duration::from_secs(1)).expect("stop");
}

/// Runs `f` with this thread pinned to `core`.
pub fn pinned(core: usize, f: impl FnOnce()) {
    // SAFETY: a valid set to write to and to read from.
    unsafe {
        let mut before: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of_val(&before), &mut before);
        placement::pin_thread(core).expect("pin");
        f();
        libc::sched_setaffinity(0, size_of_val(&before), &before);
    }
}

pub fn quick() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20)
}

/// Lets Criterion time `trip`, and prints percentiles of the single trips too.
pub fn measure(criterion: &mut Criterion, name: &str, mut trip: impl FnMut()) {
    measure_custom(criterion, name, || {
        let begin = Instant::now();
        trip();
        begin.elapsed()
    });
}

/// Likewise, for a trip that times itself.
pub fn measure_custom(criterion: &mut Criterion, name: &str, mut trip: impl FnMut() -> Duration) {
    let mut histogram = Histogram::new();
    criterion.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| {
            (0..iterations)
                .map(|_| {
                    let took = trip();
                    histogram.record(took.as_nanos() as u64);
                    took
                })
                .sum()
        });
    });
    let p = histogram.percentiles();
    if p.count == 0 {
        return; // Filtered out on the command line.
    }
    let us = |ns: u64| ns as f64 / 1e3;
    println!(
        "{name}: n={} p50 {:.2} p99 {:.2} p99.9 {:.2} max {:.2} us\n",
        p.count,
        us(p.p50),
        us(p.p99),
        us(p.p999),
        us(p.max)
    );
}
