//! Notifications: free-standing ones are numbered, bound ones say which block lies where.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use corelane::Error;
use corelane_tests::Random;

use crate::board::{BLOCKS, Control, SLOTS};
use crate::load::{RETURN_WRITE, arrived};
use crate::phase::Phase;
use crate::side::{Kind, Shared};

const NUMBERED: u8 = b'N';
const BOUND: u8 = b'B';

/// The payload of a notification that follows a block.
pub(crate) fn bound_payload(slot: usize, block: usize, number: u64) -> [u8; 11] {
    let mut payload = [0; 11];
    payload[0] = BOUND;
    payload[1] = slot as u8;
    payload[2] = block as u8;
    payload[3..].copy_from_slice(&number.to_le_bytes());
    payload
}

fn numbered_payload(number: u64, len: usize) -> Vec<u8> {
    let mut payload = vec![number as u8; 9 + len];
    payload[0] = NUMBERED;
    payload[1..9].copy_from_slice(&number.to_le_bytes());
    payload
}

/// Takes what has come; how many.
fn take(shared: &Shared) -> usize {
    let mut taken = 0;
    let result = shared.engine.take_notifications(|notification| {
        // Of a peer of an earlier round: that one's end has been judged.
        if *notification.from == *shared.peer.name() {
            received(shared, &notification.payload);
        }
        taken += 1;
    });
    if let Err(error) = result {
        shared.problem(Kind::Failed, format!("taking notifications: {error}"));
    }
    taken
}

fn received(shared: &Shared, payload: &[u8]) {
    let wrong = || shared.problem(Kind::Wrong, format!("a notification of {payload:02x?}"));
    let Some((&kind, rest)) = payload.split_first() else { return wrong() };
    match kind {
        NUMBERED => {
            let Some((number, rest)) = rest.split_first_chunk() else { return wrong() };
            let number = u64::from_le_bytes(*number);
            if rest.iter().any(|&byte| byte != number as u8) {
                return wrong();
            }
            count(shared, number);
        }
        BOUND if rest.len() == 10 => {
            let (slot, block) = (usize::from(rest[0]), usize::from(rest[1]));
            let mut number = [0; 8];
            number.copy_from_slice(&rest[2..]);
            if slot >= SLOTS || block >= BLOCKS {
                return wrong();
            }
            see(shared, slot, block, u64::from_le_bytes(number));
        }
        _ => wrong(),
    }
}

fn count(shared: &Shared, number: u64) {
    let own = shared.own();
    let last = own.last.load(SeqCst);
    if number <= last {
        own.doubled.fetch_add(1, SeqCst);
        return shared.problem(Kind::Doubled, format!("notification {number} after {last}"));
    }
    if number > shared.other().sending.load(SeqCst) {
        return shared.problem(Kind::Wrong, format!("notification {number} was never sent"));
    }
    own.missing.fetch_add(number - last - 1, SeqCst);
    own.last.store(number, SeqCst);
    own.received.fetch_add(1, SeqCst);
}

fn see(shared: &Shared, slot: usize, block: usize, number: u64) {
    // The bytes first: this is the moment.
    let here = arrived(shared, slot, block, number);
    let seen = &shared.other().slots[slot].seen[block];
    let last = seen.load(SeqCst);
    if number <= last {
        return shared.problem(
            Kind::Doubled,
            format!("the notification of block {number} of slot {slot} after {last}"),
        );
    }
    // Memory that was taken back has been poisoned since.
    if !here && (slot == RETURN_WRITE || !shared.is_withdrawn()) {
        shared.problem(
            Kind::Wrong,
            format!("the notification of block {number} of slot {slot} without its data"),
        );
    }
    seen.store(number, SeqCst);
}

/// How a side sends.
struct Sender {
    random: Random,
    /// Longest payload, and how many at a time.
    bytes: usize,
    burst: usize,
    stopped: bool,
    next: Instant,
}

impl Sender {
    fn new(shared: &Shared) -> Self {
        let flood = shared.phase == Phase::Acknowledgement;
        let (bytes, burst) = if flood { (9000, 48) } else { (600, 2) };
        let random = Random::new(shared.seed ^ 0x5e4d);
        Self { random, bytes, burst, stopped: false, next: Instant::now() }
    }

    /// Sends some; whether it did.
    fn send(&mut self, shared: &Shared) -> bool {
        if self.stopped || Instant::now() < self.next {
            return false;
        }
        self.next = Instant::now() + Duration::from_millis(1);
        let own = shared.own();
        for _ in 0..self.burst {
            let number = own.sent.load(SeqCst) + 1;
            let len = self.random.below(self.bytes);
            own.sending.store(number, SeqCst);
            match shared.peer.notify(&numbered_payload(number, len)) {
                Ok(()) => own.sent.store(number, SeqCst),
                // Not taken: the number is free.
                Err(Error::Backpressure { .. }) => break,
                Err(error) => {
                    shared.failed("a notification", &error);
                    self.stopped = shared.gives_up();
                    break;
                }
            }
        }
        true
    }
}

/// Sends and takes notifications until the round is over.
pub(crate) fn exchange(shared: &Arc<Shared>) {
    let mut sender = Sender::new(shared);
    let before = shared.engine.stats().totals.notifications_dropped;
    let mut look = Instant::now();
    let mut may_send = true;
    loop {
        let control = shared.board.control();
        if control >= Control::Stop && std::mem::take(&mut may_send) {
            shared.own().senders_ended.fetch_add(1, SeqCst);
        }
        let mut worked = take(shared) > 0;
        if control == Control::Run && shared.may_post() && shared.phase != Phase::Idle {
            worked |= sender.send(shared);
        }
        if Instant::now() >= look {
            publish(shared, before);
            let pause = if shared.phase == Phase::Acknowledgement { 200 } else { 3000 };
            look = Instant::now() + Duration::from_micros(pause);
        }
        if control == Control::Over {
            return;
        }
        if !worked {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

fn publish(shared: &Shared, dropped_before: u64) {
    let stats = shared.engine.stats();
    let own = shared.own();
    let peer = stats.peers.iter().find(|peer| peer.name == shared.peer.name());
    own.unacknowledged.store(peer.map_or(0, |peer| peer.unacknowledged as u64), SeqCst);
    own.dropped.store(stats.totals.notifications_dropped - dropped_before, SeqCst);
}
