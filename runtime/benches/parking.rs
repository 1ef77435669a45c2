//! Waking a parked lane (target: at most 60 us p50), and what a parked lane costs (target: under 1% of a core).

mod common;

use std::{
    hint::spin_loop,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use common::*;
use corelane_runtime::{AssistMode, Spin, placement};
use criterion::{Criterion, criterion_group, criterion_main};

fn wake_a_parked_lane(criterion: &mut Criterion) {
    let cores = placement::allowed_cores().expect("affinity mask");
    let caller = cores.cores()[0];
    let lane_core = *cores.cores().last().expect("a core");
    let (lane, seen) = lane(Some(lane_core), Spin::For(Duration::ZERO), AssistMode::Never);
    pinned(caller, || {
        let mut number = 0;
        measure_custom(criterion, "parking/wake", || {
            let parks = lane.stats().parks;
            number += 1;
            std::thread::sleep(Duration::from_micros(200));
            let begin = Instant::now();
            lane.submit(number).expect("submit");
            while seen.load(Ordering::Acquire) != number {
                spin_loop();
            }
            let took = begin.elapsed();
            while lane.stats().parks == parks {
                std::thread::yield_now();
            }
            took
        });
    });
    stop(&lane);
}

/// CPU time of this process, whose only busy thread could be the lane's.
fn cpu_time() -> Duration {
    // SAFETY: a valid structure to write to.
    unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }
}

/// Criterion's unit is time: here CPU time per second of idling, so 10 ms are 1%.
fn idle_parked_lane(criterion: &mut Criterion) {
    let (lane, _) = lane(None, Spin::default(), AssistMode::Auto);
    std::thread::sleep(Duration::from_millis(50));
    let mut group = criterion.benchmark_group("parking");
    group.sample_size(10).measurement_time(Duration::from_secs(2));
    group.bench_function("idle-cpu-time-per-second", |bencher| {
        bencher.iter_custom(|iterations| {
            let idle = Duration::from_millis(100);
            let before = cpu_time();
            std::thread::sleep(idle);
            let used = (cpu_time() - before).as_secs_f64() / idle.as_secs_f64();
            Duration::from_secs_f64(used).max(Duration::from_nanos(1)) * iterations as u32
        });
    });
    group.finish();
    let (before, begin) = (cpu_time(), Instant::now());
    std::thread::sleep(Duration::from_secs(1));
    let share = (cpu_time() - before).as_secs_f64() / begin.elapsed().as_secs_f64();
    println!("parking/idle: {:.4}% of a core\n", share * 100.0);
    stop(&lane);
}

criterion_group! { name = benches; config = quick(); targets = wake_a_parked_lane, idle_parked_lane }
criterion_main!(benches);
