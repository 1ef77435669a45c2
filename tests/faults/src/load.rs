//! The load of a side: transfers of every kind to the other side, each posted again as soon as it has ended.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use corelane::{Error, LocalSegment, Operation, Region, RegionDescriptor, Status, Transfer};
use corelane_tests::{BOUND, Buffer, block_holds, check_either_block, fill_block};

use crate::board::{BLOCKS, Control, SlotBoard, now_ns, outcome};
use crate::notes::bound_payload;
use crate::side::{Kind, Shared};
use crate::usage::Waits;

/// What the other side reads, with the pattern of its round.
pub(crate) const SOURCE_BYTES: usize = 2 << 20;
pub(crate) const SPARE_BYTES: usize = 16 << 10;
pub(crate) const CHURNS: usize = 32;
pub(crate) const CHURN_BYTES: usize = 128 << 10;

/// Slots that `load` does not post: those of `churn`, the connection itself, and what shows that a session is back.
pub(crate) const CHURN_READ: usize = 7;
pub(crate) const CHURN_WRITE: usize = 8;
pub(crate) const CONNECTION: usize = 9;
pub(crate) const RETURN_READ: usize = 10;
pub(crate) const RETURN_WRITE: usize = 11;
pub(crate) const SMALL: [usize; 5] = [0, 1, 2, 3, 6];
/// Slots whose transfers are in flight for long.
pub(crate) const BULK: [usize; 2] = [4, 5];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Read,
    /// What has landed is looked at in the end.
    Write,
    /// With a notification, at whose sight the bytes are looked at.
    Bound,
}

#[derive(Debug, Clone, Copy)]
struct Spec {
    way: Way,
    len: usize,
    pieces: usize,
}

const fn spec(way: Way, len: usize, pieces: usize) -> Spec {
    Spec { way, len, pieces }
}

const SPECS: [Spec; 7] = [
    spec(Way::Read, 512, 1),
    spec(Way::Bound, 4096, 1),
    spec(Way::Read, 64 << 10, 64),
    spec(Way::Bound, 16 << 10, 32),
    spec(Way::Read, 2 << 20, 1),
    spec(Way::Bound, 1 << 20, 1),
    spec(Way::Write, 24 << 10, 1),
];

/// Where the own memory of what is not in `SPECS` lies: two churn transfers and two of the return.
pub(crate) fn extra_at() -> usize {
    SPECS.iter().map(|spec| spec.len).sum()
}

pub(crate) fn local_bytes() -> usize {
    extra_at() + 2 * CHURN_BYTES + SPARE_BYTES
}

fn written(slot: usize) -> usize {
    match SPECS[slot].way {
        Way::Read => 0,
        Way::Write | Way::Bound => SPECS[slot].len * BLOCKS,
    }
}

/// Where a place of a slot lies in the memory that is written to.
fn block_at(slot: usize, block: usize) -> usize {
    SOURCE_BYTES + (0..slot).map(written).sum::<usize>() + block * SPECS[slot].len
}

pub(crate) fn served_bytes() -> usize {
    block_at(SPECS.len() - 1, BLOCKS)
}

/// Bytes of what shows that a session is back.
pub(crate) const RETURN_BYTES: usize = SPARE_BYTES / 8;

/// Where they are written to: behind the half that is read.
pub(crate) fn return_at(block: usize) -> usize {
    SPARE_BYTES / 2 + block * RETURN_BYTES
}

/// Whether a block of the other side has arrived here as it was sent.
pub(crate) fn arrived(shared: &Shared, slot: usize, block: usize, number: u64) -> bool {
    match slot {
        // The second half of the spare memory: `come_back`.
        RETURN_WRITE if block < BLOCKS => {
            block_holds(&shared.set.spare, return_at(block), RETURN_BYTES, number)
        }
        slot if slot < SPECS.len() && block < BLOCKS && SPECS[slot].way != Way::Read => {
            block_holds(&shared.set.served, block_at(slot, block), SPECS[slot].len, number)
        }
        _ => false,
    }
}

/// Looks at what the other side has written without a notification: the last one that it knows to be done.
pub(crate) fn check_unbound(shared: &Shared) {
    let from = shared.other();
    for (slot, _) in SPECS.iter().enumerate().filter(|(_, spec)| spec.way == Way::Write) {
        let board = &from.slots[slot];
        let (number, block) = (board.number.load(SeqCst), board.block.load(SeqCst) as usize);
        let done = board.outcome.load(SeqCst) == outcome::DONE && !board.in_flight();
        if done && !arrived(shared, slot, block, number) {
            shared.problem(Kind::Wrong, format!("WRITE {number} of slot {slot} is not there"));
        }
    }
}

/// Looks at every place that the other side writes to, those of failed WRITEs included: what is there must be the last block that arrived,
/// or what of the one after it may have come.
pub(crate) fn check_places(shared: &Shared) {
    let from = shared.other();
    for (slot, spec) in SPECS.iter().enumerate().filter(|(_, spec)| spec.way != Way::Read) {
        for block in 0..BLOCKS {
            let board = &from.slots[slot];
            let (placed, held) = (board.placed[block].load(SeqCst), board.held[block].load(SeqCst));
            let (at, served) = (block_at(slot, block), &shared.set.served);
            let found = match placed {
                0 => served.check_poison(at, spec.len),
                new => check_either_block(served, at, spec.len, held, new),
            };
            if let Err(why) = found {
                shared.problem(Kind::Wrong, format!("place {block} of slot {slot}: {why}"));
            }
        }
    }
}

/// Looks at all that READs have written to: nothing may have come there since their ends.
pub(crate) fn check_rest(shared: &Shared) {
    let mut at = 0;
    let mut places = Vec::new();
    for (slot, spec) in SPECS.iter().enumerate() {
        if spec.way == Way::Read {
            places.push((slot, at, spec.len));
        }
        at += spec.len;
    }
    places.push((CHURN_READ, at, CHURN_BYTES));
    places.push((RETURN_READ, local_bytes() - SPARE_BYTES, SPARE_BYTES / 2));
    for (slot, at, len) in places {
        // One that never ends has been told already.
        if !shared.own().slots[slot].in_flight() {
            must_be_poison(shared, slot, at, len);
        }
    }
}

/// What has come to the own memory of a READ that has ended was written late.
pub(crate) fn must_be_poison(shared: &Shared, slot: usize, at: usize, len: usize) {
    let memory = &shared.set.local;
    if let Err(why) = memory.check_poison(at, len) {
        shared.problem(Kind::Late, format!("after the end of a READ of slot {slot}: {why}"));
        memory.poison(at, len);
    }
}

/// One of the load's transfers.
pub(crate) struct Slot {
    index: usize,
    spec: Spec,
    local_at: usize,
    source_at: usize,
    /// One for each place; of a READ one.
    transfers: Vec<Transfer>,
    block: usize,
    number: u64,
    posted: Option<Instant>,
}

/// Prepares a part of the load of a side.
fn slots(
    shared: &Shared,
    local: &Region,
    remote: &RegionDescriptor,
    wanted: &[usize],
) -> Result<Vec<Slot>, Error> {
    let mut at = 0;
    let mut slots = Vec::new();
    for (index, &spec) in SPECS.iter().enumerate() {
        // Another part of the source in each round.
        let free = SOURCE_BYTES - spec.len;
        let source_at = if free == 0 { 0 } else { shared.seed as usize % free };
        let places: Vec<usize> = match spec.way {
            Way::Read => vec![source_at],
            Way::Write | Way::Bound => (0..BLOCKS).map(|block| block_at(index, block)).collect(),
        };
        let piece = spec.len / spec.pieces;
        let mine: Vec<LocalSegment> = (0..spec.pieces)
            .map(|i| local.segment((at + i * piece) as u64, piece as u64))
            .collect();
        let operation = if spec.way == Way::Read { Operation::Read } else { Operation::Write };
        let transfer = |&place: &usize| {
            // From the last piece to the first, so that neighbours are none.
            let there: Vec<_> = (0..spec.pieces)
                .map(|i| {
                    remote.segment((place + (spec.pieces - 1 - i) * piece) as u64, piece as u64)
                })
                .collect();
            Ok(shared.engine.prepare(operation, &shared.peer, &mine, &there)?.transfer())
        };
        let transfers = places.iter().map(transfer).collect::<Result<_, Error>>()?;
        if wanted.contains(&index) {
            slots.push(Slot {
                index,
                spec,
                local_at: at,
                source_at,
                transfers,
                block: 0,
                number: 0,
                posted: None,
            });
        }
        at += spec.len;
    }
    Ok(slots)
}

/// Posts a transfer and follows it on the board.
fn post(board: &SlotBoard, post: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
    board.posted_ns.store(now_ns(), SeqCst);
    post().inspect_err(|_| board.ended_ns.store(now_ns(), SeqCst))
}

fn ended(board: &SlotBoard, how: u64) {
    board.outcome.store(how, SeqCst);
    if how == outcome::DONE {
        board.completed.fetch_add(1, SeqCst);
    }
    board.ended_ns.store(now_ns(), SeqCst);
}

/// Posts a transfer and waits for its end.
pub(crate) fn follow(
    shared: &Shared,
    index: usize,
    transfer: &Transfer,
    payload: Option<&[u8]>,
) -> Result<(), Error> {
    let board = &shared.own().slots[index];
    post(board, || match payload {
        Some(payload) => transfer.post_with_notification(payload),
        None => transfer.post(),
    })?;
    let result = transfer.wait(BOUND);
    if matches!(transfer.status(), Status::InProgress) {
        shared.problem(Kind::Hang, format!("a transfer of slot {index} does not end"));
    }
    ended(board, if result.is_ok() { outcome::DONE } else { outcome::FAILED });
    result
}

impl Slot {
    fn board<'a>(&self, shared: &'a Shared) -> &'a SlotBoard {
        &shared.own().slots[self.index]
    }

    fn local<'a>(&self, shared: &'a Shared) -> &'a Buffer {
        &shared.set.local
    }

    fn may_be_posted(&mut self, shared: &Shared) -> bool {
        let board = self.board(shared);
        if board.stopped.load(SeqCst) != 0 {
            return false;
        }
        let lies_here = self.number > 0 && board.block.load(SeqCst) as usize == self.block;
        let unseen = board.seen[self.block].load(SeqCst) != board.number.load(SeqCst);
        if self.spec.way != Way::Bound || !lies_here || !unseen {
            return true;
        }
        // Whoever is struck looks at nothing; what lies there must stay, in case that it does later.
        if shared.gives_up() {
            self.leave_place(shared);
        }
        false
    }

    /// Takes another place, or stops when there is none.
    fn leave_place(&mut self, shared: &Shared) {
        if self.block + 1 < self.transfers.len() {
            self.block += 1;
        } else {
            self.board(shared).stopped.store(1, SeqCst);
        }
    }

    /// Whether it was posted.
    fn begin(&mut self, shared: &Shared) -> bool {
        if !self.may_be_posted(shared) {
            return false;
        }
        let (board, len) = (self.board(shared), self.spec.len);
        let transfer = &self.transfers[self.block];
        let result = match self.spec.way {
            Way::Read => {
                must_be_poison(shared, self.index, self.local_at, len);
                post(board, || transfer.post())
            }
            Way::Write | Way::Bound => {
                let number = self.number + 1;
                fill_block(self.local(shared), self.local_at, len, number);
                let (old_number, old_block) = (board.number.load(SeqCst), board.block.load(SeqCst));
                board.number.store(number, SeqCst);
                board.block.store(self.block as u64, SeqCst);
                let placed = board.placed[self.block].swap(number, SeqCst);
                let payload = bound_payload(self.index, self.block, number);
                let result = post(board, || match self.spec.way {
                    Way::Bound => transfer.post_with_notification(&payload),
                    _ => transfer.post(),
                });
                match &result {
                    Ok(()) => self.number = number,
                    Err(_) => {
                        board.number.store(old_number, SeqCst);
                        board.block.store(old_block, SeqCst);
                        board.placed[self.block].store(placed, SeqCst);
                    }
                }
                result
            }
        };
        match result {
            Ok(()) => self.posted = Some(Instant::now()),
            // Nothing has been started: later.
            Err(Error::Backpressure { .. }) => return false,
            Err(error) => self.failed(shared, &error),
        }
        true
    }

    fn done(&mut self, shared: &Shared) {
        if self.spec.way != Way::Read {
            self.board(shared).held[self.block].store(self.number, SeqCst);
        }
        ended(self.board(shared), outcome::DONE);
        if self.spec.way == Way::Read {
            self.check(shared);
            self.local(shared).poison(self.local_at, self.spec.len);
        }
    }

    fn check(&self, shared: &Shared) {
        let piece = self.spec.len / self.spec.pieces;
        for i in 0..self.spec.pieces {
            let (here, there) = (i * piece, (self.spec.pieces - 1 - i) * piece);
            let at = (self.source_at + there) as u64;
            let wrong = self.local(shared).check(
                shared.pattern_of_other(),
                self.local_at + here,
                piece,
                at,
            );
            if let Err(why) = wrong {
                return shared.problem(Kind::Wrong, format!("READ of slot {}: {why}", self.index));
            }
        }
    }

    fn failed(&mut self, shared: &Shared, error: &Error) {
        let board = self.board(shared);
        ended(board, outcome::FAILED);
        if self.spec.way == Way::Read {
            self.local(shared).poison(self.local_at, self.spec.len);
        }
        shared.failed(&format!("slot {}", self.index), error);
        // Nobody knows what has become of this place.
        if shared.gives_up() {
            board.stopped.store(1, SeqCst);
        } else if self.spec.way != Way::Read {
            self.leave_place(shared);
        }
    }

    /// Looks at a transfer in flight; true: it has ended, or was given up.
    fn look(&mut self, shared: &Shared) -> bool {
        let Some(since) = self.posted else { return false };
        let status = self.transfers[self.block].status();
        match status {
            Status::Done => self.done(shared),
            Status::Failed(error) => self.failed(shared, &error),
            Status::Idle | Status::InProgress if since.elapsed() < BOUND => return false,
            Status::Idle | Status::InProgress => {
                let index = self.index;
                shared.problem(Kind::Hang, format!("a transfer of slot {index} does not end"));
                self.board(shared).stopped.store(1, SeqCst);
            }
        }
        self.posted = None;
        true
    }
}

/// Posts slots again and again until the round ends, and waits for the end of what is then in flight.
pub(crate) fn drive(
    shared: &Arc<Shared>,
    local: &Region,
    remote: &RegionDescriptor,
    wanted: &[usize],
) {
    // Preparing connects already: that, too, waits for its turn.
    while !(shared.may_connect() || shared.board.control() >= Control::Stop) {
        std::thread::sleep(Duration::from_micros(50));
    }
    let mut slots = match slots(shared, local, remote, wanted) {
        Ok(slots) => slots,
        Err(error) => {
            shared.problem(Kind::Failed, format!("preparing the load: {error}"));
            return wanted
                .iter()
                .for_each(|&slot| shared.own().slots[slot].stopped.store(1, SeqCst));
        }
    };
    let waits = Waits::of_this_thread();
    let (mut before, mut waited) = (Duration::ZERO, Duration::ZERO);
    loop {
        if !shared.board.signalled() {
            before = waits.so_far();
        } else if slots.iter().any(|slot| slot.board(shared).stopped.load(SeqCst) == 0) {
            waited = waits.so_far().saturating_sub(before);
        }
        let control = shared.board.control();
        let posting = control == Control::Run && shared.may_post();
        let mut worked = false;
        for slot in &mut slots {
            worked |= if slot.posted.is_some() {
                slot.look(shared)
            } else {
                posting && slot.begin(shared)
            };
        }
        if control >= Control::Stop && slots.iter().all(|slot| slot.posted.is_none()) {
            shared.has_waited(waited);
            shared.own().senders_ended.fetch_add(1, SeqCst);
            return;
        }
        if !worked {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
