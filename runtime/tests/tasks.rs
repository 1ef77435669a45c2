//! On-lane tasks.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    future::poll_fn,
    sync::{Arc, Mutex, atomic::Ordering},
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use common::*;
use corelane_runtime::*;

#[test]
fn a_5_ms_timer_fires_within_10_ms_spinning_and_parked() {
    for config in all_configs() {
        let (lane, _) = start(config.clone());
        let late = |own: bool| {
            let task = lane.spawn(move |lane| async move {
                let mut shortest = Duration::MAX;
                // The best of many: this is no measurement, and other tests and programs run beside it.
                for _ in 0..100 {
                    if shortest < Duration::from_millis(10) {
                        break;
                    }
                    let begin = Instant::now();
                    match own {
                        true => lane.sleep(Duration::from_millis(5)).await,
                        false => glommio::timer::sleep(Duration::from_millis(5)).await,
                    }
                    assert!(begin.elapsed() >= Duration::from_millis(5), "early");
                    shortest = shortest.min(begin.elapsed());
                }
                shortest
            });
            task.wait().unwrap()
        };
        for own in [true, false] {
            let took = late(own);
            assert!(took < Duration::from_millis(10), "{config:?} own {own}: {took:?}");
        }
        lane.stop(STOP).unwrap();
    }
}

#[test]
fn a_task_reaches_the_driver_without_a_hand_over() {
    for config in all_configs() {
        let (lane, seen) = start(config);
        let turned = lane.spawn(|lane| async move {
            assert!(lane.lane().is_lane_thread());
            let nested = lane.with(|_, _| lane.with(|_, _| ()).is_none());
            let mut set = None;
            while set.is_none() {
                set = lane.with(|_, cx| cx.set_timer(Instant::now(), 77));
                lane.yield_now().await;
            }
            nested
        });
        assert_ne!(turned.wait().unwrap(), Some(false), "a nested call must not enter");
        wait_until("timer", || seen.timers.lock().unwrap().iter().any(|(token, _)| *token == 77));
        lane.stop(STOP).unwrap();
    }
}

#[test]
fn a_foreign_wakeup_reaches_a_parked_lane() {
    for config in all_configs() {
        let (lane, _) = start(config);
        let waker: Arc<Mutex<Option<Waker>>> = Arc::default();
        let its = waker.clone();
        let task = lane.spawn(move |_| async move {
            let mut polls = 0;
            poll_fn(move |cx| {
                polls += 1;
                *its.lock().unwrap() = Some(cx.waker().clone());
                if polls > 20 { Poll::Ready(polls) } else { Poll::Pending }
            })
            .await
        });
        for _ in 0..20 {
            wait_until("poll", || waker.lock().unwrap().is_some());
            std::thread::sleep(Duration::from_micros(300));
            let waker = waker.lock().unwrap().take().unwrap();
            waker.wake();
        }
        assert_eq!(task.wait(), Ok(21));
        lane.stop(STOP).unwrap();
    }
}

#[test]
fn messages_and_descriptors_are_served_beside_a_busy_task() {
    for config in all_configs() {
        let (lane, seen) = start(config);
        let watched = seen.clone();
        let task = lane.spawn(|lane| async move {
            while watched.last.load(Ordering::Acquire) < 100 {
                lane.yield_now().await;
            }
        });
        for number in 1..=100 {
            submit(&lane, Ask::Note(number));
            wait_until("message", || seen.last.load(Ordering::Acquire) >= number);
        }
        task.wait().unwrap();
        lane.stop(STOP).unwrap();
    }
}

#[test]
fn a_panicking_task_ends_alone() {
    let (lane, _) = start(LaneConfig::default());
    let panics = lane.spawn(|_| async { panic!("task on purpose") });
    assert_eq!(panics.wait(), Err::<(), _>(TaskError::Panicked("task on purpose".to_owned())));
    let early = lane.spawn(|_| -> std::future::Ready<()> { panic!("no future") });
    assert_eq!(early.wait(), Err(TaskError::Panicked("no future".to_owned())));
    assert_eq!(lane.spawn(|_| async { 5 }).wait(), Ok(5));
    lane.stop(STOP).unwrap();
}

#[test]
fn stop_drops_tasks_and_tells_who_waits() {
    struct OnDrop(Arc<Mutex<bool>>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            *self.0.lock().unwrap() = true;
        }
    }
    for config in all_configs() {
        let (lane, _) = start(config);
        let dropped = Arc::new(Mutex::new(false));
        let guard = OnDrop(dropped.clone());
        let task = lane.spawn(move |lane| async move {
            let _guard = guard;
            lane.sleep(Duration::from_secs(1000)).await;
        });
        let child = lane.spawn(|lane| async move {
            let child = lane.spawn_local(std::future::pending::<()>());
            lane.yield_now().await;
            child.await
        });
        std::thread::sleep(Duration::from_millis(10));
        lane.stop(STOP).unwrap();
        assert_eq!(task.wait(), Err(TaskError::LaneStopped));
        assert!(matches!(
            child.wait(),
            Err(TaskError::LaneStopped) | Ok(Err(TaskError::LaneStopped))
        ));
        assert!(*dropped.lock().unwrap());
        assert_eq!(lane.spawn(|_| async {}).wait(), Err(TaskError::LaneStopped));
    }
}

#[test]
fn a_parked_lane_with_a_sleeping_task_wakes_rarely() {
    let (lane, _) = start(config(AssistMode::Always, Spin::For(Duration::ZERO)));
    let task = lane.spawn(|lane| async move { lane.sleep(Duration::from_secs(2)).await });
    std::thread::sleep(Duration::from_millis(50));
    let (before, begin) = (lane.stats().parks, Instant::now());
    let (mut parks, mut ms) = (0, 0);
    // Its heartbeat goes on, if late where others take the core.
    wait_until("ten parks", || {
        (parks, ms) = (lane.stats().parks - before, begin.elapsed().as_millis() as u64);
        parks >= 10 && ms >= 200
    });
    assert!(parks < ms, "{parks} parks in {ms} ms");
    task.wait().unwrap();
    lane.stop(STOP).unwrap();
}
