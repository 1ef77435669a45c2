//! What a lane promises: messages, descriptors, timers, parking, assisting, stopping.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use common::*;
use corelane_runtime::*;

/// Waits for 500 messages of each of three senders, which send their number and then 0, 1, 2...
fn assert_all_in_order(seen: &Seen) {
    wait_until("all messages", || seen.messages.lock().unwrap().len() == 1500);
    let messages = seen.messages.lock().unwrap().clone();
    for sender in 0..3 {
        let own = messages.iter().filter(|m| *m >> 32 == sender).map(|m| m & 0xffff_ffff);
        assert!(own.eq(0..500));
    }
}

#[test]
fn messages_of_a_sender_arrive_in_order_from_many_threads() {
    for config in all_configs() {
        let (lane, seen) = start(LaneConfig { inbox_slots: 8, ..config });
        let senders: Vec<_> = (0..3u64)
            .map(|sender| {
                let lane = lane.clone();
                std::thread::spawn(move || {
                    (0..500).for_each(|n| submit(&lane, Ask::Note(sender << 32 | n)));
                })
            })
            .collect();
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        assert_all_in_order(&seen);
        lane.stop(STOP).unwrap();
        assert_eq!(lane.stats().messages, 1500);
    }
}

#[test]
fn a_parked_lane_wakes_for_messages_with_nobody_assisting() {
    for config in all_configs() {
        let (lane, seen) = start(config);
        for number in 1..100 {
            std::thread::sleep(Duration::from_micros(number * 20 % 700));
            submit(&lane, Ask::Note(number));
            wait_until("message", || seen.last.load(Ordering::Acquire) == number);
        }
        lane.stop(STOP).unwrap();
    }
}

struct Word(AtomicU32);

impl SharedWord for Word {
    fn word(&self) -> &AtomicU32 {
        &self.0
    }
}

/// As another process would.
fn wake(word: &AtomicU32) {
    // SAFETY: a word that lives; nothing is written.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

#[test]
fn a_lane_that_sleeps_is_woken_by_a_word_and_by_none_that_it_does_not_watch_any_more() {
    for config in all_configs() {
        let (lane, seen) = start(config);
        let [word, other, changed] = [7, 7, 8].map(|value| Arc::new(Word(AtomicU32::new(value))));
        let (tell, told) = std::sync::mpsc::channel();
        let watched = [word.clone(), other.clone(), changed.clone()];
        submit(
            &lane,
            Ask::Run(Box::new(move |cx| {
                let [word, other, changed] = watched;
                let watch = cx.watch_word(other, 7, 2);
                let can = cx.watch_word(word, 7, 1).is_some();
                cx.watch_word(changed, 7, 3);
                watch.into_iter().for_each(|watch| cx.unwatch_word(watch));
                tell.send(can).unwrap();
            })),
        );
        if told.recv().unwrap() {
            wait_until("a word that holds something else", || {
                seen.words.lock().unwrap()[..] == [3]
            });
            std::thread::sleep(Duration::from_millis(20));
            wake(&other.0);
            word.0.store(9, Ordering::Release);
            // It may not sleep in it yet.
            wait_until("a word that is woken", || {
                wake(&word.0);
                seen.words.lock().unwrap()[..] == [3, 1]
            });
        } else {
            eprintln!("skipped: the rings of this kernel cannot wait for words (Linux 6.7)");
        }
        lane.stop(STOP).unwrap();
        assert_eq!(Arc::strong_count(&other), 1);
    }
}

#[test]
fn descriptors_are_served_hot_quiet_and_parked() {
    for config in all_configs() {
        for start_as in [Start::Hot, Start::Quiet] {
            let (lane, _) = start(LaneConfig { max_hot_fds: 1, ..config.clone() });
            let mut ours = Vec::new();
            for _ in 0..3 {
                let (a, b) = UnixStream::pair().unwrap();
                b.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                submit(&lane, Ask::Echo(a, start_as));
                ours.push(b);
            }
            for round in 0..20u8 {
                std::thread::sleep(Duration::from_micros(u64::from(round) * 40));
                for (number, stream) in ours.iter_mut().enumerate() {
                    let data = [round, number as u8];
                    let mut back = [0; 2];
                    stream.write_all(&data).unwrap();
                    stream.read_exact(&mut back).unwrap();
                    assert_eq!(back, data);
                }
            }
            lane.stop(STOP).unwrap();
        }
    }
}

#[test]
fn a_removed_descriptor_closes_at_once_although_it_was_watched() {
    for assist in [AssistMode::Always, AssistMode::Never] {
        let (lane, _) = start(config(assist, Spin::default()));
        let (theirs, mut ours) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        submit(&lane, Ask::Echo(theirs, Start::Quiet));
        // The lane parks with the descriptor armed in its ring.
        std::thread::sleep(Duration::from_millis(20));
        submit(&lane, Ask::Close);
        // On a caller's thread where that is allowed: the lane's ring has to let go all the same.
        lane.assist();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0, "end of stream");
        lane.stop(STOP).unwrap();
    }
}

#[test]
fn timers_are_never_early_and_fire_spinning_and_parked() {
    for config in all_configs() {
        let (lane, seen) = start(config);
        let begin = Instant::now();
        let deadlines: Vec<_> =
            [0, 1, 5, 5, 17, 70, 71].map(|ms| begin + Duration::from_millis(ms)).into();
        for (token, deadline) in deadlines.iter().enumerate() {
            submit(&lane, Ask::Timer(*deadline, token as u64));
        }
        wait_until("all timers", || seen.timers.lock().unwrap().len() == deadlines.len());
        for (token, fired) in seen.timers.lock().unwrap().iter() {
            let deadline = deadlines[*token as usize];
            assert!(*fired >= deadline, "timer {token} was early");
            assert!(*fired < deadline + Duration::from_secs(5), "timer {token} was late");
        }
        lane.stop(STOP).unwrap();
    }
}

#[test]
fn a_timer_set_in_a_callers_turn_wakes_a_parked_lane() {
    let (lane, seen) = start(config(AssistMode::Always, Spin::For(Duration::ZERO)));
    for token in 0..10 {
        std::thread::sleep(Duration::from_millis(3));
        submit(&lane, Ask::Timer(Instant::now() + Duration::from_millis(5), token));
        // Whoever takes the message, nobody assists afterwards.
        lane.assist();
        wait_until("timer", || seen.timers.lock().unwrap().len() as u64 == token + 1);
    }
    lane.stop(STOP).unwrap();
}

#[test]
fn callers_drive_a_shared_lane_and_it_stands_by() {
    let (lane, seen) = start(config(AssistMode::Always, Spin::default()));
    let mut number = 0;
    let begin = Instant::now();
    // On a busy machine a caller may get no core for as long as that takes.
    let has_driven = |number| {
        let stats = lane.stats();
        let driven = stats.assisted_turns > number / 2 && stats.standbys > 0;
        assert!(driven || begin.elapsed() < STOP, "of {number}: {stats:?}");
        driven && begin.elapsed() > Duration::from_millis(300)
    };
    while number == 0 || number % 100 != 0 || !has_driven(number) {
        number += 1;
        submit(&lane, Ask::Note(number));
        while seen.last.load(Ordering::Acquire) != number {
            assert!(matches!(lane.assist(), Assist::Worked | Assist::Idle | Assist::Busy));
        }
    }
    // Nobody drives any more: the lane takes over within its stand-by.
    submit(&lane, Ask::Note(0));
    wait_until("take-over", || seen.last.load(Ordering::Acquire) == 0);
    lane.stop(STOP).unwrap();
}

fn start_at_work() -> (Lane<Probe>, Arc<Seen>) {
    let (lane, seen) = start(config(AssistMode::Always, Spin::default()));
    seen.working.store(true, Ordering::Relaxed);
    submit(&lane, Ask::Note(1));
    wait_until("work", || lane.stats().turns > 10);
    (lane, seen)
}

/// Otherwise the two share the core where there is no other, and whoever has it keeps it for a time slice.
#[test]
fn a_lane_at_work_leaves_its_turns_to_a_caller_that_only_waits() {
    let (lane, seen) = start_at_work();
    let assist_until = |what: &str, done: &dyn Fn() -> bool| {
        let end = Instant::now() + Duration::from_secs(10);
        while !done() {
            assert!(Instant::now() < end, "never: {what}");
            // Looking at the figures takes long; who waits does nothing in between.
            (0..100).for_each(|_| _ = lane.assist());
        }
    };
    let before = lane.stats();
    assist_until("handed over", &|| {
        let now = lane.stats();
        now.standbys > before.standbys && now.assisted_turns > before.assisted_turns + 20
    });
    // The caller has left; the work goes on.
    let before = lane.stats();
    wait_until("taken back", || lane.stats().turns > before.turns + 10);
    seen.working.store(false, Ordering::Relaxed);
    lane.stop(Duration::from_secs(1)).unwrap();
}

#[test]
fn a_lane_at_work_keeps_its_turns_from_callers_that_look_in_or_where_it_must() {
    let (lane, seen) = start_at_work();
    let before = lane.stats();
    for _ in 0..100 {
        lane.assist();
        std::thread::sleep(Duration::from_micros(200));
    }
    seen.keeps_turns.store(true, Ordering::Relaxed);
    (0..1000).for_each(|_| _ = lane.assist());
    assert_eq!(lane.stats().standbys, before.standbys);
    seen.working.store(false, Ordering::Relaxed);
    lane.stop(Duration::from_secs(1)).unwrap();
}

/// Otherwise it costs each turn of a caller a system call, for as long as callers drive.
#[test]
fn a_calm_descriptor_goes_quiet_while_callers_drive_and_is_still_heard() {
    let (lane, _) = start(config(AssistMode::Always, Spin::default()));
    let drive_until = |what: &str, done: &mut dyn FnMut() -> bool| {
        let end = Instant::now() + Duration::from_secs(10);
        while !done() {
            assert!(Instant::now() < end, "never: {what}");
            (0..1000).for_each(|_| _ = lane.assist());
        }
    };
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    submit(&lane, Ask::Echo(theirs, Start::Hot));
    submit(&lane, Ask::Calm);
    for _ in 0..3 {
        let mut before = lane.stats();
        drive_until("quiet", &mut || {
            let after = lane.stats();
            let turns = after.assisted_turns - before.assisted_turns;
            let calls = after.fd_calls - before.fd_calls;
            before = after;
            turns > 100 && calls < turns / 10
        });
        ours.write_all(b"?").unwrap();
        drive_until("echo", &mut || ours.read(&mut [0]).is_ok());
    }
    lane.stop(STOP).unwrap();
}

/// Without spinning there is nothing between a caller that drives and a lane that watches by itself.
#[test]
fn a_lane_that_is_told_that_nobody_drives_parks_and_stands_by_no_more() {
    let (lane, seen) = start(config(AssistMode::Always, Spin::For(Duration::ZERO)));
    let mut after_waking = 0;
    for number in 1..=40 {
        for _ in 0..2000 {
            lane.assist();
        }
        hand_over(&lane, Ask::Note(number));
        wait_until("message", || seen.last.load(Ordering::Acquire) == number);
        while !matches!(lane.assist(), Assist::Idle) {}
        let before = lane.stats();
        lane.wake();
        wait_until("parked", || lane.stats().parks > before.parks);
        after_waking += lane.stats().standbys - before.standbys;
    }
    assert!(after_waking < 20, "stood by {after_waking} times for nobody");
    lane.stop(STOP).unwrap();
}

#[test]
fn what_is_handed_over_is_handled_in_order_whoever_holds_the_token() {
    for config in all_configs() {
        let (lane, seen) = start(LaneConfig { inbox_slots: 4, ..config });
        std::thread::scope(|scope| {
            for sender in 0..3u64 {
                let lane = &lane;
                scope.spawn(move || {
                    (0..500).for_each(|n| hand_over(lane, Ask::Note(sender << 32 | n)));
                });
            }
        });
        assert_all_in_order(&seen);
        lane.stop(STOP).unwrap();
        assert!(lane.hand_over(Box::new(Ask::Note(0))).is_err());
    }
}

#[test]
fn a_dedicated_lane_is_never_driven_by_callers() {
    for config in
        [config(AssistMode::Never, Spin::default()), config(AssistMode::Auto, Spin::Forever)]
    {
        let (lane, seen) = start(config);
        wait_until("dedicated", || lane.assist() == Assist::Dedicated);
        submit(&lane, Ask::Note(1));
        wait_until("message", || seen.last.load(Ordering::Acquire) == 1);
        assert!(lane.stats().dedicated);
        assert_eq!(lane.stats().assisted_turns, 0);
        lane.stop(STOP).unwrap();
        assert_eq!(lane.assist(), Assist::Stopped);
    }
}

#[test]
fn an_idle_lane_parks_unless_it_must_poll() {
    let (lane, seen) = start(config(AssistMode::Always, Spin::default()));
    wait_until("parked", || lane.stats().parks > 0);
    std::thread::sleep(Duration::from_millis(20));
    let (before, begin) = (lane.stats(), Instant::now());
    std::thread::sleep(Duration::from_millis(100));
    let turns = lane.stats().turns - before.turns;
    // Of a sleep that may have been longer.
    let ms = begin.elapsed().as_millis() as u64;
    assert!(turns < ms / 5, "an idle lane turns: {turns} times in {ms} ms");
    seen.must_poll.store(true, Ordering::Relaxed);
    submit(&lane, Ask::Note(1));
    wait_until("message", || seen.last.load(Ordering::Acquire) == 1);
    let (turns, parks) = (lane.stats().turns, lane.stats().parks);
    // However slowly: a busy machine gives a lane that yields few turns.
    wait_until("turns", || lane.stats().turns - turns > 20);
    assert_eq!(lane.stats().parks, parks);
    lane.stop(STOP).unwrap();
}

#[test]
fn a_lane_may_submit_to_itself_although_its_inbox_is_full() {
    for assist in [AssistMode::Always, AssistMode::Never] {
        let (lane, seen) = start(LaneConfig { inbox_slots: 4, ..config(assist, Spin::default()) });
        let own = lane.clone();
        submit(
            &lane,
            Ask::Run(Box::new(move |_| (1..=100).for_each(|n| submit(&own, Ask::Note(n))))),
        );
        wait_until("own messages", || seen.last.load(Ordering::Acquire) == 100);
        assert!(seen.messages.lock().unwrap().iter().copied().eq(1..=100));
        lane.stop(STOP).unwrap();
    }
}

#[test]
fn try_submit_gives_back_what_does_not_fit() {
    let (lane, _) =
        start(LaneConfig { inbox_slots: 2, ..config(AssistMode::Never, Spin::default()) });
    let gate = Gate::hold(&lane);
    let results: Vec<_> = (0..3).map(|n| lane.try_submit(Box::new(Ask::Note(n)))).collect();
    assert!(results[0].is_ok() && results[1].is_ok());
    assert!(matches!(results[2], Err(TrySubmitError::Full(_))));
    gate.open();
    lane.stop(STOP).unwrap();
    assert!(matches!(lane.try_submit(Box::new(Ask::Note(9))), Err(TrySubmitError::Stopped(_))));
}

#[test]
fn stop_runs_the_drivers_end_once_and_is_idempotent() {
    for config in all_configs() {
        let (lane, seen) = start_with(config, 5);
        submit(&lane, Ask::Note(1));
        let others: Vec<_> = (0..3)
            .map(|_| {
                let lane = lane.clone();
                std::thread::spawn(move || lane.stop(Duration::from_secs(5)))
            })
            .collect();
        lane.stop(Duration::from_secs(5)).unwrap();
        others.into_iter().for_each(|other| other.join().unwrap().unwrap());
        assert_eq!(seen.stops.load(Ordering::Relaxed), 6);
        assert!(!lane.is_alive());
        assert!(lane.submit(Box::new(Ask::Note(2))).is_err());
        let dropped_on = seen.dropped_on.lock().unwrap().unwrap();
        assert_ne!(dropped_on, std::thread::current().id());
    }
}

#[test]
fn stop_is_bounded_when_the_driver_never_ends_or_blocks() {
    let (lane, seen) = start_with(LaneConfig::default(), u64::MAX);
    let begin = Instant::now();
    lane.stop(Duration::from_millis(500)).unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(500));
    assert!(seen.stops.load(Ordering::Relaxed) > 1);

    let (lane, _) = start(LaneConfig::default());
    let gate = Gate::hold(&lane);
    // It comes back although nobody opens.
    let error = lane.stop(Duration::from_millis(10)).unwrap_err();
    assert!(matches!(error, LaneError::StopTimedOut { .. }), "{error}");
    gate.open();
    lane.stop(STOP).unwrap();
}

#[test]
fn stop_from_a_turn_does_not_wait_for_itself() {
    let (lane, _) = start(config(AssistMode::Always, Spin::default()));
    let own = lane.clone();
    submit(&lane, Ask::Run(Box::new(move |_| own.stop(Duration::from_secs(9)).unwrap())));
    wait_until("end", || !lane.is_alive());
    lane.stop(STOP).unwrap();
}

#[test]
fn dropping_the_last_handle_stops_the_lane() {
    let (lane, seen) = start(LaneConfig::default());
    let second = lane.clone();
    drop(lane);
    std::thread::sleep(Duration::from_millis(20));
    assert!(second.is_alive());
    drop(second);
    wait_until("end", || seen.dropped_on.lock().unwrap().is_some());
}

#[test]
fn a_panic_ends_one_lane_only_and_every_message_is_accounted_for() {
    for config in all_configs() {
        let (lane, seen) = start(config.clone());
        let (other, other_seen) = start(config);
        submit(&lane, Ask::Note(1));
        wait_until("message", || seen.last.load(Ordering::Acquire) == 1);
        submit(&lane, Ask::Panic("on purpose"));
        let mut accepted = 1;
        while lane.submit(Box::new(Ask::Note(2))).is_ok() {
            accepted += 1;
        }
        wait_until("end", || seen.dropped_on.lock().unwrap().is_some());
        assert_eq!(seen.panic.lock().unwrap().as_deref(), Some("on purpose"));
        assert_eq!(lane.failure().as_deref(), Some("on purpose"));
        assert_eq!(lane.assist(), Assist::Stopped);
        let handled = seen.messages.lock().unwrap().len() + seen.abandoned.lock().unwrap().len();
        assert_eq!(handled, accepted);
        let error = lane.stop(STOP).unwrap_err();
        assert!(error.to_string().contains("on purpose"), "{error}");

        submit(&other, Ask::Note(7));
        wait_until("the other lane", || other_seen.last.load(Ordering::Acquire) == 7);
        other.stop(STOP).unwrap();
    }
}

#[test]
fn a_panic_on_a_callers_thread_stays_in_the_lane() {
    let (lane, seen) = start(config(AssistMode::Always, Spin::For(Duration::ZERO)));
    submit(&lane, Ask::Panic("assisted"));
    while lane.assist() != Assist::Stopped {}
    wait_until("end", || seen.dropped_on.lock().unwrap().is_some());
    assert_eq!(seen.panic.lock().unwrap().as_deref(), Some("assisted"));
}
