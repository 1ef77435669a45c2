//! A caller's hand-over: submit, the lane handles the message, the caller sees it. No network.

mod common;

use std::{hint::spin_loop, sync::atomic::Ordering};

use common::*;
use corelane_runtime::{AssistMode, Spin, placement};
use criterion::{Criterion, criterion_group, criterion_main};

/// Target: at most 400 ns p50.
fn on_different_cores(criterion: &mut Criterion) {
    let cores = placement::allowed_cores().expect("affinity mask");
    let &[caller, lane_core, ..] = cores.cores() else {
        return println!("handover/different-cores: not run, one core only");
    };
    let (lane, seen) = lane(Some(lane_core), Spin::Forever, AssistMode::Never);
    pinned(caller, || {
        let mut number = 0;
        measure(criterion, "handover/different-cores", || {
            number += 1;
            lane.submit(number).expect("submit");
            while seen.load(Ordering::Acquire) != number {
                spin_loop();
            }
        });
    });
    stop(&lane);
}

/// Target: at most 5 us p50.
fn on_one_core(criterion: &mut Criterion) {
    let core = placement::allowed_cores().expect("affinity mask").cores()[0];
    let (lane, seen) = lane(Some(core), Spin::default(), AssistMode::Auto);
    pinned(core, || {
        let mut number = 0;
        measure(criterion, "handover/one-core", || {
            number += 1;
            lane.submit(number).expect("submit");
            while seen.load(Ordering::Acquire) != number {
                lane.assist();
            }
        });
    });
    stop(&lane);
}

criterion_group! { name = benches; config = quick(); targets = on_different_cores, on_one_core }
criterion_main!(benches);
