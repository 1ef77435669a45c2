use super::*;
use crate::answering::Ledger;
use crate::arena::Arena;
use crate::case::Operation;
use crate::layout::{Layout, Slot};
use crate::measure::{Initiator as _, Stamp};
use std::net::{IpAddr, Ipv4Addr};
use std::pin::pin;
use std::task::{Context as TaskContext, Poll, Waker};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).as_mut().poll(&mut TaskContext::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("the raw pair polls"),
    }
}

struct Pair {
    initiator: RawInitiator,
    here: Arena,
    there: Arena,
    ledger: Ledger,
    _target: RawTarget,
}

fn pair(operation: Operation, block_bytes: usize) -> Pair {
    let (here, there) = (Arena::new(1 << 20).expect("map"), Arena::new(1 << 20).expect("map"));
    let ledger = Ledger::new();
    let target = RawTarget::start(LOCALHOST, there.clone(), None, ledger.clone()).expect("listen");
    let slot = |at: u64| Slot { local: vec![4096 + at], remote: vec![8192 + at] };
    let slots = (0..4).map(|index| slot(index * block_bytes as u64)).collect();
    let layout = Layout { slots, block_bytes, arena_bytes: 1 << 20, bulk: None };
    let address = (LOCALHOST, target.port()).into();
    let initiator =
        RawInitiator::connect(address, here.clone(), operation, &layout).expect("connect");
    Pair { initiator, here, there, ledger, _target: target }
}

#[test]
fn requests_round_trip_and_garbage_is_refused() {
    let request =
        Request { kind: Kind::WriteNotify, offset: 77, len: 1 << 40, notification_len: 32 };
    let mut bytes = request.encode();
    assert_eq!(Request::decode(&bytes).expect("valid"), request);
    bytes[8] = 9;
    assert!(Request::decode(&bytes).is_err());
    assert!(Request::decode(&[0xFF; REQUEST_LEN]).is_err());
    let long = Request { notification_len: u64::MAX, ..request };
    assert!(Request::decode(&long.encode()).is_err());
}

#[test]
fn reads_and_writes_move_the_bytes_of_their_slot() {
    for block_bytes in [64, 4096, 100_000] {
        let mut read = pair(Operation::Read, block_bytes);
        read.there.fill(8192 + block_bytes as u64, block_bytes, 5, 1);
        read.initiator.post(1).expect("post");
        assert_eq!(ready(read.initiator.finished()).expect("finish"), 1);
        assert_eq!(read.here.check(4096 + block_bytes as u64, block_bytes, 5, 1), Ok(()));

        let mut write = pair(Operation::Write, block_bytes);
        write.here.fill(4096, block_bytes, 6, 0);
        write.initiator.post(0).expect("post");
        assert_eq!(ready(write.initiator.finished()).expect("finish"), 0);
        assert_eq!(write.there.check(8192, block_bytes, 6, 0), Ok(()));
    }
}

#[test]
fn answers_come_in_the_order_of_the_requests() {
    let mut pair = pair(Operation::Read, 4096);
    (0..4).for_each(|slot| pair.initiator.post(slot).expect("post"));
    for slot in 0..4 {
        assert_eq!(ready(pair.initiator.finished()).expect("finish"), slot);
    }
    assert_eq!(pair.initiator.poll_finished().expect("idle"), None);
}

#[test]
fn notifications_are_answered_and_booked() {
    let mut pair = pair(Operation::WriteNotify, 4096);
    pair.here.fill(4096, 4096, 9, 0);
    let last = pair.here.load_word(4096 + 4088).expect("aligned");
    let stamp =
        Stamp { sequence: 0, sent_ns: now_ns(), last_word_at: 8192 + 4088, last_word: last };
    let mut payload = [0; 48];
    stamp.encode(&mut payload);
    pair.initiator.post_with_notification(0, &payload).expect("post");
    assert_eq!(ready(pair.initiator.answer()).expect("answer"), 0);
    assert_eq!(ready(pair.initiator.finished()).expect("finished"), 0);
    assert_eq!(pair.ledger.settle(1).expect("booked").len(), 1);
}

#[test]
fn a_request_outside_of_the_memory_ends_the_pair_with_its_reason() {
    let pair = pair(Operation::Read, 64);
    let request = Request { kind: Kind::Read, offset: 1 << 20, len: 64, notification_len: 0 };
    send_all(&pair.initiator.stream, [&request.encode()]).expect("send");
    assert!(receive(&pair.initiator.stream, &mut [0; 64]).is_err());
    // The stream is closed before the reason is booked: it is waited for as a notification would be.
    let failure = pair.ledger.settle(1).expect_err("refused").to_string();
    assert!(failure.contains("outside of the target's memory"), "{failure}");
}
