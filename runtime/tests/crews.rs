//! Lanes of one process without cores of their own: one of them turns the others.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use common::*;
use corelane_runtime::*;

/// Lanes that stay awake for long, so that several are, and the other ends of a stream that each echoes on.
struct Fleet {
    lanes: Vec<Lane<Probe>>,
    seen: Vec<Arc<Seen>>,
    streams: Vec<UnixStream>,
    rounds: u8,
}

impl Fleet {
    fn start(count: usize) -> Self {
        let mut fleet =
            Self { lanes: Vec::new(), seen: Vec::new(), streams: Vec::new(), rounds: 0 };
        for _ in 0..count {
            let spin = Spin::For(Duration::from_millis(100));
            let (lane, seen) = start(config(AssistMode::Auto, spin));
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            submit(&lane, Ask::Echo(theirs, Start::Quiet));
            fleet.lanes.push(lane);
            fleet.seen.push(seen);
            fleet.streams.push(ours);
        }
        fleet
    }

    /// Some bytes to each of these lanes, and then the same from each.
    fn exchange(&mut self, with: impl Fn(usize) -> bool) {
        self.rounds = self.rounds.wrapping_add(1);
        let bytes = |lane: usize| [self.rounds, lane as u8, !self.rounds];
        let mut streams: Vec<_> =
            self.streams.iter().enumerate().filter(|(lane, _)| with(*lane)).collect();
        for (lane, stream) in &mut streams {
            stream.write_all(&bytes(*lane)).unwrap();
        }
        for (lane, stream) in &mut streams {
            let mut answer = [0; 3];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, bytes(*lane));
        }
    }

    fn sum(&self, figure: impl Fn(LaneStats) -> u64) -> u64 {
        self.lanes.iter().map(|lane| figure(lane.stats())).sum()
    }

    /// Exchanges until a lane has been turned by another so often.
    fn exchange_until_led(&mut self, turns: u64) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let before = self.sum(|stats| stats.led_turns);
        while self.sum(|stats| stats.led_turns) < before + turns {
            assert!(Instant::now() < deadline, "no lane turns another");
            self.exchange(|_| true);
        }
    }

    fn stop(self) {
        for lane in self.lanes {
            lane.stop(Duration::from_secs(1)).unwrap();
        }
    }
}

#[test]
fn one_lane_turns_those_that_have_little_to_do() {
    let mut fleet = Fleet::start(6);
    fleet.exchange_until_led(500);
    assert!(fleet.sum(|stats| stats.rests) > 0);
    fleet.stop();
}

#[test]
fn all_park_when_there_is_nothing_to_do_and_wake_up_again() {
    let mut fleet = Fleet::start(4);
    for _ in 0..3 {
        fleet.exchange_until_led(20);
        // Before the last exchange: one that had its answer early may park before the others have theirs.
        let parks: Vec<u64> = fleet.lanes.iter().map(|lane| lane.stats().parks).collect();
        fleet.exchange(|_| true);
        wait_until("all parked", || {
            fleet.lanes.iter().zip(&parks).all(|(lane, before)| lane.stats().parks > *before)
        });
        fleet.exchange(|_| true);
    }
    fleet.stop();
}

#[test]
fn messages_and_timers_of_a_lane_that_rests_are_not_late_for_ever() {
    let mut fleet = Fleet::start(3);
    for number in 1..=50 {
        fleet.exchange_until_led(5);
        for (lane, seen) in fleet.lanes.iter().zip(&fleet.seen) {
            submit(lane, Ask::Note(number));
            submit(lane, Ask::Timer(Instant::now() + Duration::from_millis(2), number));
            wait_until("the message", || seen.last.load(Ordering::Acquire) == number);
        }
        for seen in &fleet.seen {
            let fired = |token| seen.timers.lock().unwrap().iter().any(|(it, _)| *it == token);
            wait_until("the timer", || fired(number));
        }
    }
    fleet.stop();
}

#[test]
fn whoever_ends_or_panics_leaves_the_others_served() {
    let mut fleet = Fleet::start(6);
    fleet.exchange_until_led(50);
    // One of them leads, whichever it is.
    for gone in 0..5 {
        if gone % 2 == 0 {
            submit(&fleet.lanes[gone], Ask::Panic("on purpose"));
            wait_until("the panic", || fleet.seen[gone].panic.lock().unwrap().is_some());
        } else {
            fleet.lanes[gone].stop(Duration::from_secs(1)).unwrap();
        }
        for _ in 0..50 {
            fleet.exchange(|lane| lane > gone);
        }
    }
    assert!(fleet.lanes.pop().unwrap().stop(Duration::from_secs(1)).is_ok());
}

/// Whoever holds the leader up holds nobody else up: the others take over.
#[test]
fn a_leader_that_is_held_up_loses_its_place() {
    let mut fleet = Fleet::start(5);
    for held_up in 0..5 {
        fleet.exchange_until_led(20);
        let (goes_on, goes_on_there) = {
            let flag = Arc::new(AtomicBool::new(false));
            (flag.clone(), flag)
        };
        let (entered, its) = std::sync::mpsc::channel();
        let wait = move |_: &mut Cx<'_>| {
            entered.send(std::thread::current().id()).unwrap();
            while !goes_on_there.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_micros(100));
            }
        };
        submit(&fleet.lanes[held_up], Ask::Run(Box::new(wait)));
        its.recv_timeout(Duration::from_secs(20)).unwrap();
        // If it is held up on the leader's thread, the leader's own lane is, too: all but two are served in any case.
        let others: Vec<usize> = (0..5).filter(|lane| *lane != held_up).collect();
        for &lane in &others {
            fleet.streams[lane].write_all(&[lane as u8; 3]).unwrap();
            fleet.streams[lane].set_nonblocking(true).unwrap();
        }
        let mut answers = [const { Vec::new() }; 5];
        let mut read = |fleet: &mut Fleet, enough: usize| {
            wait_until("the answers", || {
                for &lane in &others {
                    let mut some = [0; 8];
                    if let Ok(len) = fleet.streams[lane].read(&mut some) {
                        answers[lane].extend_from_slice(&some[..len]);
                    }
                }
                answers.iter().filter(|answer| answer.len() >= 3).count() >= enough
            });
        };
        read(&mut fleet, 3);
        goes_on.store(true, Ordering::Release);
        read(&mut fleet, 4);
        for &lane in &others {
            assert_eq!(answers[lane], [lane as u8; 3]);
            fleet.streams[lane].set_nonblocking(false).unwrap();
        }
    }
    fleet.stop();
}
