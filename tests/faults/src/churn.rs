//! Memory that comes and goes while the other side uses it.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use corelane::{Access, Error, Operation, Region, RegionDescriptor, Transfer};
use corelane_tests::{BOUND, Random};

use crate::board::{Control, doing};
use crate::load::{CHURN_BYTES, CHURN_READ, CHURN_WRITE, extra_at, follow};
use crate::side::{Kind, Shared};

fn pattern_of(side: usize, seed: u64, number: u64) -> u64 {
    (seed << 8 | number) * 2 + side as u64
}

/// Takes a registration back, however long accesses hold it up; false: it is kept.
pub(crate) fn take_back(shared: &Shared, region: &Region, what: &str) -> bool {
    let start = Instant::now();
    loop {
        match shared.engine.deregister(region) {
            Ok(()) => return true,
            Err(Error::Busy { .. }) if start.elapsed() < BOUND => {
                shared.busy.fetch_add(1, SeqCst);
            }
            Err(error) => {
                shared.problem(Kind::Hang, format!("deregistering {what}: {error}"));
                return false;
            }
        }
    }
}

/// Registers and deregisters one piece of memory after another.
pub(crate) fn come_and_go(shared: &Arc<Shared>) {
    let mut random = Random::new(shared.seed ^ 0xc4a7);
    let own = shared.own();
    for (index, memory) in shared.set.churn.iter().enumerate() {
        while shared.board.control() == Control::Wait || !shared.may_post() {
            std::thread::sleep(Duration::from_micros(100));
        }
        if shared.board.control() != Control::Run {
            return;
        }
        memory.fill(pattern_of(shared.side, shared.seed, index as u64 + 1), 0, CHURN_BYTES, 0);
        let region = memory.register(&shared.engine, Access::READ_WRITE);
        own.announce(&region.descriptor().to_bytes());
        std::thread::sleep(Duration::from_micros(random.below(2000) as u64));
        own.set(doing::DEREGISTER);
        let back = take_back(shared, &region, "memory that comes and goes");
        own.clear(doing::DEREGISTER);
        if !back {
            return;
        }
        memory.poison(0, CHURN_BYTES);
    }
}

/// Reads and writes what the other side registers, until it is gone or the other side is.
pub(crate) fn use_it(shared: &Arc<Shared>, local: &Region) {
    use_what_comes(shared, local);
    post_nothing(shared);
}

/// Says that the slots of memory that comes and goes are posted no more.
pub(crate) fn post_nothing(shared: &Shared) {
    [CHURN_READ, CHURN_WRITE]
        .iter()
        .for_each(|&slot| shared.own().slots[slot].stopped.store(1, SeqCst));
}

fn use_what_comes(shared: &Shared, local: &Region) {
    let mut version = 0;
    while shared.board.control() <= Control::Run {
        // Before the look at what is announced: whoever has been struck announces nothing after that is worth waiting for.
        let last = shared.gives_up();
        let next = shared.other().announced(version);
        if last && next.is_none() {
            return;
        }
        let Some((newer, descriptor)) = next.filter(|_| shared.may_post()) else {
            std::thread::sleep(Duration::from_micros(50));
            continue;
        };
        version = newer;
        let descriptor = match RegionDescriptor::from_bytes(&descriptor) {
            Ok(descriptor) => descriptor,
            Err(error) => return shared.problem(Kind::Failed, format!("a descriptor: {error}")),
        };
        match transfers(shared, local, &descriptor) {
            Ok(pair) => use_one(shared, &pair, version / 2),
            Err(error) => shared.failed("preparing", &error),
        }
        if shared.gives_up() {
            return;
        }
    }
}

fn transfers(
    shared: &Shared,
    local: &Region,
    remote: &RegionDescriptor,
) -> Result<[Transfer; 2], Error> {
    let prepare = |operation, at: usize| -> Result<Transfer, Error> {
        let mine = local.segment(at as u64, CHURN_BYTES as u64);
        let there = remote.segment(0, CHURN_BYTES as u64);
        Ok(shared.engine.prepare(operation, &shared.peer, &[mine], &[there])?.transfer())
    };
    let at = extra_at();
    Ok([prepare(Operation::Read, at)?, prepare(Operation::Write, at + CHURN_BYTES)?])
}

/// Until it is refused.
fn use_one(shared: &Shared, [read, write]: &[Transfer; 2], number: u64) {
    let pattern = pattern_of(1 - shared.side, shared.seed, number);
    let (memory, at) = (&shared.set.local, extra_at());
    // The bytes that are there already: whoever reads meanwhile sees no others.
    memory.fill(pattern, at + CHURN_BYTES, CHURN_BYTES, 0);
    while shared.board.control() <= Control::Run {
        let result = follow(shared, CHURN_READ, read, None);
        if result.is_ok()
            && let Err(why) = memory.check(pattern, at, CHURN_BYTES, 0)
        {
            shared.problem(Kind::Wrong, format!("READ of memory that went away: {why}"));
        }
        memory.poison(at, CHURN_BYTES);
        match result.and_then(|()| follow(shared, CHURN_WRITE, write, None)) {
            Ok(()) => {}
            // Gone, as it is to be.
            Err(Error::Permission { .. }) => return,
            Err(error) => return shared.failed("memory that comes and goes", &error),
        }
    }
}
