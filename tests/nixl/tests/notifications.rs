//! Notifications through NIXL: exactly once, whole, in order, from the right agent, and never before their data.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use corelane_nixl_tests::{
    Agent, Message, Notify, Operation, Settings, assert_quiet, collect, exchange, range, target,
};
use corelane_tests::{BOUND, Buffer, Random, Slots, fill_block, pattern};

const MAX: usize = 16 << 20;

fn payloads(messages: &[Message]) -> Vec<&[u8]> {
    messages.iter().map(|message| message.payload.as_slice()).collect()
}

#[test]
fn one_before_any_transfer_reaches_another_process() {
    let mut far = target!("target", 64);
    let agent = Agent::new("initiator");
    far.introduce_to(&agent);
    agent.notify("target", b"first").unwrap();
    far.assert_notifications("initiator", &[b"first"]);
    far.process.ask("quiet");
}

#[test]
fn a_target_that_knows_nobody_serves_and_sees_who_it_was() {
    let mut far = target!("target", 4096);
    let (agent, near) = (Agent::new("some initiator/0"), Buffer::new(4096));
    agent.register(&near);
    far.introduce_to(&agent);
    let (local, remote) = (range(&near, 0, 4096), far.range(0, 4096));
    let request = agent.prepare(Operation::Read, &[local], "target", &[remote]).unwrap();
    request.run_with(Notify::With(b"read")).unwrap();
    near.assert_pattern(1, 0, 4096, 0);
    near.fill(2, 0, 4096, 0);
    let request = agent.prepare(Operation::Write, &[local], "target", &[remote]).unwrap();
    request.run_with(Notify::With(b"written")).unwrap();
    agent.notify("target", b"free").unwrap();
    // A bound notification and a free-standing one have no order.
    let answer = far.process.ask("take 3");
    let mut words: Vec<&str> = answer.split("some initiator/0:").map(str::trim).collect();
    words.sort_unstable();
    let mut wanted = [b"read".as_slice(), b"written", b"free"].map(corelane_tests::to_hex);
    wanted.sort();
    assert_eq!(words, [&[String::new()], wanted.as_slice()].concat());
    far.assert_pattern(2, 0, 4096, 0);
}

#[test]
fn empty_ones_arrive_free_standing_and_bound() {
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    let (near, far) = (Buffer::new(64), Buffer::with_pattern(1, 64));
    a.register(&near);
    b.register(&far);
    a.exchange_metadata(&b);
    a.notify("b", b"").unwrap();
    assert_eq!(collect(&b, 1), [Message { from: "a".into(), payload: Vec::new() }]);
    let lists = ([range(&near, 0, 64)], [range(&far, 0, 64)]);
    let request = a.prepare(Operation::Read, &lists.0, "b", &lists.1).unwrap();
    request.run_with(Notify::With(b"")).unwrap();
    assert_eq!(collect(&b, 1), [Message { from: "a".into(), payload: Vec::new() }]);
    assert_quiet(&b);
    assert_quiet(&a);
}

#[test]
fn an_agent_notifies_itself() {
    let (agent, memory) = (Agent::new("alone"), Buffer::with_pattern(1, 128));
    agent.notify("alone", b"to myself").unwrap();
    agent.notify("alone", b"").unwrap();
    let got = collect(&agent, 2);
    assert_eq!(payloads(&got), [b"to myself".as_slice(), b""]);
    assert!(got.iter().all(|message| message.from == "alone"));
    agent.register(&memory);
    let lists = ([range(&memory, 0, 64)], [range(&memory, 64, 64)]);
    let request = agent.prepare(Operation::Write, &lists.0, "alone", &lists.1).unwrap();
    request.run_with(Notify::With(b"moved")).unwrap();
    assert_eq!(payloads(&collect(&agent, 1)), [b"moved"]);
    memory.assert_pattern(1, 64, 64, 0);
    assert_quiet(&agent);
}

#[test]
fn large_ones_arrive_whole_and_too_large_ones_are_refused() {
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    assert_eq!(a.load(&b.metadata()).as_deref(), Ok("b"));
    for len in [1 << 20, (1 << 20) + 1, 3 << 20, MAX - 4096, MAX - 1] {
        let payload = pattern(len as u64, 0, len);
        a.notify("b", &payload).unwrap();
        let got = collect(&b, 1);
        assert!(got.len() == 1 && got[0].payload == payload, "the notification of {len} bytes");
    }
    let too_large = vec![7; MAX + 1];
    a.notify("b", &too_large).unwrap_err();
    a.notify("a", &too_large).unwrap_err();
    // Refused, and nothing else: the peer is still good.
    a.notify("b", b"after").unwrap();
    assert_eq!(payloads(&collect(&b, 1)), [b"after"]);
    assert!(a.knows("b"));
    assert_quiet(&b);
}

#[test]
fn large_ones_travel_with_transfers_between_processes() {
    let mut far = target!("target", 4096);
    let (agent, near) = (Agent::new("initiator"), Buffer::new(4096));
    agent.register(&near);
    far.introduce_to(&agent);
    near.fill(6, 0, 4096, 0);
    let payload = pattern(3, 0, 1 << 20);
    let lists = ([range(&near, 0, 4096)], [far.range(0, 4096)]);
    let request = agent.prepare(Operation::Write, &lists.0, "target", &lists.1).unwrap();
    request.run_with(Notify::With(&payload)).unwrap();
    far.assert_notifications("initiator", &[&payload]);
    far.assert_pattern(6, 0, 4096, 0);
    // A posting whose notification is too large is refused before any byte moves.
    near.fill(7, 0, 4096, 0);
    request.run_with(Notify::With(&vec![1; MAX + 1])).unwrap_err();
    far.assert_pattern(6, 0, 4096, 0);
    request.run_with(Notify::None).unwrap();
    far.assert_pattern(7, 0, 4096, 0);
    far.process.ask("quiet");
}

#[test]
fn each_posting_says_which_notification_it_carries() {
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    let (near, far) = (Buffer::new(64), Buffer::with_pattern(1, 64));
    a.register(&near);
    b.register(&far);
    a.exchange_metadata(&b);
    let lists = ([range(&near, 0, 64)], [range(&far, 0, 64)]);
    let request =
        a.prepare_with_notification(Operation::Read, &lists.0, "b", &lists.1, b"prepared").unwrap();
    // Preparing sends nothing.
    assert_quiet(&b);
    request.run().unwrap();
    assert_eq!(payloads(&collect(&b, 1)), [b"prepared"]);
    request.run_with(Notify::With(b"another")).unwrap();
    assert_eq!(payloads(&collect(&b, 1)), [b"another"]);
    request.run_with(Notify::None).unwrap();
    assert_quiet(&b);
    request.run_with(Notify::With(b"again")).unwrap();
    assert_eq!(payloads(&collect(&b, 1)), [b"again"]);
    assert_quiet(&b);
}

#[test]
fn asking_again_sends_nothing_twice() {
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    let (near, far) = (Buffer::new(4096), Buffer::with_pattern(1, 4096));
    a.register(&near);
    b.register(&far);
    a.exchange_metadata(&b);
    let lists = ([range(&near, 0, 4096)], [range(&far, 0, 4096)]);
    let request = a.prepare(Operation::Read, &lists.0, "b", &lists.1).unwrap();
    for round in 0..50u64 {
        request.run_with(Notify::With(&round.to_le_bytes())).unwrap();
        for _ in 0..20 {
            assert_eq!(request.wait(), Ok(()));
        }
        assert_eq!(payloads(&collect(&b, 1)), [round.to_le_bytes()]);
    }
    assert_quiet(&b);
}

#[test]
fn one_arrives_although_nobody_asks_about_its_transfer() {
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    let (near, far) = (Buffer::with_pattern(4, 1 << 20), Buffer::new(1 << 20));
    a.register(&near);
    b.register(&far);
    a.exchange_metadata(&b);
    let lists = ([range(&near, 0, near.len())], [range(&far, 0, far.len())]);
    let request = a.prepare(Operation::Write, &lists.0, "b", &lists.1).unwrap();
    request.post(Notify::With(b"there"));
    // Only the receiver does anything.
    assert_eq!(payloads(&collect(&b, 1)), [b"there"]);
    far.assert_pattern(4, 0, far.len(), 0);
    request.wait().unwrap();
}

#[test]
fn those_of_one_thread_keep_their_order_and_come_once() {
    let mut far = target!("target", 64);
    let agent = Agent::new("initiator");
    far.introduce_to(&agent);
    far.load(&agent);
    far.process.send("exchange 5000 initiator");
    exchange(&agent, &["target"], 5000).unwrap();
    far.process.answer().unwrap();
    assert_quiet(&agent);
    far.process.ask("quiet");
}

#[test]
fn large_and_small_ones_of_one_thread_keep_their_order() {
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    assert_eq!(a.load(&b.metadata()).as_deref(), Ok("b"));
    let mut random = Random::new(8);
    let sizes: Vec<usize> =
        (0..200).map(|_| [0, 1, 30, 4096, 100_000, 2 << 20][random.below(6)]).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for (index, &len) in sizes.iter().enumerate() {
                // All of them are more than the resend buffer holds: it may be full for a while.
                let (payload, deadline) = (pattern(index as u64, 0, len), Instant::now() + BOUND);
                while let Err(status) = a.notify("b", &payload) {
                    assert!(Instant::now() < deadline, "{status:?}");
                    std::thread::yield_now();
                }
            }
            done.store(true, Ordering::Release);
        });
        let (mut next, deadline) = (0, Instant::now() + BOUND);
        while next < sizes.len() {
            assert!(Instant::now() < deadline, "{next} of {} arrived", sizes.len());
            for message in b.notifications() {
                let expected = pattern(next as u64, 0, sizes[next]);
                assert!(message.payload == expected, "number {next}, of {} bytes", sizes[next]);
                next += 1;
            }
        }
    });
    assert!(done.load(Ordering::Acquire));
    assert_quiet(&b);
}

#[test]
fn agents_of_one_process_never_see_each_others() {
    let (a, b, c) = (Agent::new("a"), Agent::new("b"), Agent::new("c"));
    a.exchange_metadata(&b);
    a.exchange_metadata(&c);
    for round in 0..100u8 {
        a.notify("b", &[1, round]).unwrap();
        a.notify("c", &[2, round]).unwrap();
        b.notify("a", &[3, round]).unwrap();
    }
    let to_b = collect(&b, 100);
    let to_c = collect(&c, 100);
    let to_a = collect(&a, 100);
    for (round, ((b, c), a)) in to_b.iter().zip(&to_c).zip(&to_a).enumerate() {
        let round = round as u8;
        assert_eq!([b, c, a].map(|m| m.payload.clone()), [[1, round], [2, round], [3, round]]);
        assert_eq!([&b.from, &c.from, &a.from], ["a", "a", "b"]);
    }
    for agent in [&a, &b, &c] {
        assert_quiet(agent);
    }
}

#[test]
fn one_is_kept_until_somebody_asks() {
    let (a, b) = (Agent::new("a"), Agent::new("b"));
    a.exchange_metadata(&b);
    for number in 0..1000u64 {
        a.notify("b", &number.to_le_bytes()).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    let got = collect(&b, 1000);
    for (number, message) in got.iter().enumerate() {
        assert_eq!(message.payload, (number as u64).to_le_bytes());
    }
    assert_quiet(&b);
}

/// Writes numbered blocks into slots of the target, whose process looks at each when its notification comes.
fn never_before_its_data(block: usize, slots: usize, count: u64, threads: bool) {
    let mut far = target!("target", block * slots);
    let settings = Settings { progress_thread: threads, ..Settings::default() };
    let (agent, near) = (Agent::with("initiator", &settings), Buffer::new(block * slots));
    agent.register(&near);
    far.introduce_to(&agent);
    far.load(&agent);
    let requests: Vec<_> = (0..slots)
        .map(|slot| {
            let (local, remote) =
                (range(&near, slot * block, block), far.range(slot * block, block));
            agent.prepare(Operation::Write, &[local], "target", &[remote]).unwrap()
        })
        .collect();
    far.process.send(&format!("watch r {block} {count} initiator"));
    let (mut free, mut next): (Vec<usize>, u64) = ((0..slots).collect(), 0);
    let mut progress = Instant::now();
    while next < count || free.len() < slots {
        while next < count
            && let Some(slot) = free.pop()
        {
            if next >= slots as u64 {
                requests[slot].wait().unwrap();
            }
            fill_block(&near, slot * block, block, next);
            let payload = Slots { number: next, slot: slot as u64 }.to_bytes();
            let posted = requests[slot].post(Notify::With(&payload));
            assert!(posted.0 >= 0, "block {next}: {posted}");
            next += 1;
        }
        let released = agent.notifications();
        if released.is_empty() {
            assert!(progress.elapsed() < BOUND, "stuck at block {next} of {count}");
            std::thread::yield_now();
            continue;
        }
        progress = Instant::now();
        free.extend(
            released
                .iter()
                .map(|m| u64::from_le_bytes(m.payload.as_slice().try_into().unwrap()) as usize),
        );
    }
    far.process.answer().unwrap();
}

#[test]
fn a_bound_one_never_comes_before_small_data() {
    never_before_its_data(64, 16, 3000, true);
}

#[test]
fn a_bound_one_never_comes_before_large_data() {
    never_before_its_data(1 << 20, 4, 200, true);
}

#[test]
fn a_bound_one_never_comes_before_its_data_without_a_progress_thread() {
    never_before_its_data(16 << 10, 8, 1000, false);
}
