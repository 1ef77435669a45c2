//! Streams of notifications, and how they must arrive: in order and once.

use std::time::Instant;

use corelane::{Engine, Error, Peer};

use crate::{BOUND, Random, kind, pattern};

fn told(error: &Error) -> String {
    format!("{} {error}", kind(error)).replace('\n', " ")
}

/// Sends `COUNT` numbers, waiting where the peer is full; the answer is how often it was.
pub(crate) fn flood(peer: &Peer, count: usize) -> Result<String, String> {
    let mut full = 0u64;
    let mut progress = Instant::now();
    for number in 0..count as u64 {
        loop {
            match peer.notify(&number.to_le_bytes()) {
                Ok(()) => break,
                Err(Error::Backpressure { .. }) if progress.elapsed() < BOUND => {
                    full += 1;
                    std::thread::yield_now();
                }
                Err(error) => return Err(told(&error)),
            }
        }
        progress = Instant::now();
    }
    Ok(full.to_string())
}

/// Takes the numbers that `flood` sends, which must come in order and once.
pub(crate) fn take_flood(engine: &Engine, count: usize) -> Result<String, String> {
    let (mut next, mut wrong) = (0u64, None);
    let mut progress = Instant::now();
    while next < count as u64 {
        let taken = engine.take_notifications(|notification| {
            if notification.payload != next.to_le_bytes() {
                wrong.get_or_insert(format!("{:?} instead of {next}", notification.payload));
            }
            next += 1;
        });
        match taken.map_err(|error| told(&error))? {
            0 if progress.elapsed() > BOUND => return Err(format!("only {next} of {count}")),
            0 => std::thread::yield_now(),
            _ => progress = Instant::now(),
        }
    }
    wrong.map_or(Ok(String::new()), Err)
}

/// Sends the numbers below `count` and takes as many, which must come in order and once: both at the same time.
pub fn exchange(engine: &Engine, peer: &Peer, count: usize) -> Result<(), String> {
    exchange_payloads(engine, peer, count, |number| (number as u64).to_le_bytes().to_vec())
}

/// The notification of a number in a stream of many lengths: around the bounds of what the shared-memory ring takes, and
/// sometimes large. Mostly small: so much is in the ring when one that does not fit overtakes it, or does not.
pub fn sized_payload(seed: u64, number: usize) -> Vec<u8> {
    const LENGTHS: [usize; 10] = [0, 1, 8, 95, 96, 97, 100, 1000, 4095, 4096];
    let mut random = Random::new(seed ^ (number as u64) << 20);
    let len = match random.below(400) {
        0 => 1 << 20,
        1..4 => 4097 + random.below(60_000),
        other => LENGTHS[other % LENGTHS.len()],
    };
    pattern(seed, number as u64, len)
}

/// Takes `count` notifications of the stream of `sized_payload`, from number `first` on, in order and once.
pub(crate) fn take_sizes(
    engine: &Engine,
    count: usize,
    seed: u64,
    first: usize,
) -> Result<(), String> {
    let (mut taken, mut wrong) = (0, None);
    let mut progress = Instant::now();
    while taken < count {
        let before = taken;
        engine
            .take_notifications(|notification| {
                if *notification.payload != sized_payload(seed, first + taken) {
                    let len = notification.payload.len();
                    let number = first + taken;
                    wrong.get_or_insert(format!("{len} other bytes instead of number {number}"));
                }
                taken += 1;
            })
            .map_err(|error| told(&error))?;
        if taken > before {
            progress = Instant::now();
        } else if progress.elapsed() > BOUND {
            return Err(format!("only {taken} of {count}"));
        } else {
            std::thread::yield_now();
        }
    }
    wrong.map_or(Ok(()), Err)
}

/// As `exchange`, of payloads of many lengths.
pub fn exchange_sizes(engine: &Engine, peer: &Peer, count: usize, seed: u64) -> Result<(), String> {
    exchange_payloads(engine, peer, count, |number| sized_payload(seed, number))
}

fn exchange_payloads(
    engine: &Engine,
    peer: &Peer,
    count: usize,
    payload: impl Fn(usize) -> Vec<u8>,
) -> Result<(), String> {
    let (mut sent, mut received, mut wrong) = (0, 0, None);
    let mut progress = Instant::now();
    let mut next = payload(0);
    while sent < count || received < count {
        let before = (sent, received);
        if sent < count {
            match peer.notify(&next) {
                Ok(()) => {
                    sent += 1;
                    next = payload(sent);
                }
                Err(Error::Backpressure { .. }) => {}
                Err(error) => return Err(told(&error)),
            }
        }
        let taken = engine.take_notifications(|notification| {
            if *notification.payload != payload(received) {
                let len = notification.payload.len();
                wrong.get_or_insert(format!("{len} other bytes instead of number {received}"));
            }
            received += 1;
        });
        taken.map_err(|error| told(&error))?;
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        if (sent, received) != before {
            progress = Instant::now();
        } else if progress.elapsed() > BOUND {
            return Err(format!("stuck: {sent} sent, {received} received of {count}"));
        } else {
            std::thread::yield_now();
        }
    }
    Ok(())
}
