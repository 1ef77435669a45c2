//! What the applications do.

use std::time::Duration;

use corelane::sim::{Node, Peer, Way};
use corelane::{Access, Operation, RegionDescriptor};

use crate::memory::{CELL, CELLS, CellRef};
use crate::model::{Note, NoteKind, Transfer, note_bytes};
use crate::ports::Event;
use crate::profile::{Action, draw};
use crate::promise::Promise;
use crate::world::{Known, World, ms};

impl World {
    /// Engines that do something now.
    pub(crate) fn awake(&self) -> Vec<usize> {
        let all = self.engines.iter().enumerate();
        all.filter(|(_, e)| e.alive && e.honest && e.stalled_until <= self.now)
            .map(|(index, _)| index)
            .collect()
    }

    pub(crate) fn act(&mut self) {
        if self.actions_left == 0 {
            return self.rest();
        }
        self.actions_left -= 1;
        let pause = Duration::from_micros(self.rng.below(self.profile.pause_us));
        self.schedule.at(self.now + pause, Event::Act);
        let awake = self.awake();
        if awake.is_empty() {
            return;
        }
        if self.profile.impostor && self.rng.chance(8) {
            self.pretend();
        }
        let engine = self.rng.pick(&awake);
        let weights = std::mem::take(&mut self.profile.action_weights);
        let action = draw(&mut self.rng, &weights);
        self.profile.action_weights = weights;
        match action.unwrap_or(Action::Post) {
            Action::Post if self.profile.burst > 0 && self.rng.chance(20) => self.burst(engine),
            Action::Post => self.post(engine, false),
            Action::PostAgain => self.post_again(engine),
            Action::Cancel => self.cancel(engine),
            Action::Notify => {
                for _ in 0..1 + self.rng.index(4) {
                    self.notify(engine);
                }
            }
            Action::Take => self.take(engine, 8),
            Action::Register => self.register(engine),
            Action::Deregister => self.deregister(engine),
            Action::Forge => self.post(engine, true),
            Action::Connect => {
                if let Some(other) = self.any_loaded(engine) {
                    self.connect(engine, other);
                }
            }
            Action::Disconnect => self.disconnect(engine),
            Action::Unload => self.unload(engine),
            Action::Unmap => self.unmap(engine),
            Action::Shutdown => self.shut_down(engine),
        }
    }

    /// The impostor connects to somebody.
    fn pretend(&mut self) {
        let impostor = self.engines.len() - 1;
        let up = self.engines[impostor].alive && self.engines[impostor].stalled_until <= self.now;
        if up && let Some(other) = self.any_loaded(impostor) {
            self.connect(impostor, other);
        }
    }

    pub(crate) fn any_loaded(&mut self, engine: usize) -> Option<usize> {
        let all: Vec<usize> = self.engines[engine].loaded.keys().copied().collect();
        (!all.is_empty()).then(|| self.rng.pick(&all))
    }

    // Transfers.

    /// The incarnation that an engine means by a peer, and its handle.
    fn target(&mut self, engine: usize) -> Option<(usize, Known)> {
        let other = self.any_loaded(engine)?;
        Some((other, self.engines[engine].loaded[&other].clone()))
    }

    fn limit(&self, to_incarnation: u128) -> Duration {
        let timeout = self.profile.operation_timeout;
        let own = self.now + timeout + timeout / 5 + ms(100);
        if self.model.engine_of(to_incarnation).is_some() {
            own
        } else {
            own.min(self.death_limit())
        }
    }

    /// By when whatever depends on a peer that is dead now has ended.
    pub(crate) fn death_limit(&self) -> Duration {
        self.now + self.profile.liveness * 3 / 2 + ms(2000 + 1000 + 200)
    }

    fn post(&mut self, engine: usize, forged: bool) {
        let Some((other, known)) = self.target(engine) else { return };
        let operation = self.rng.pick(&[Operation::Read, Operation::Write]);
        let len = match self.rng.below(4) {
            0 => 1 + self.rng.index(256),
            1 => 64,
            _ => 1 + self.rng.index(CELL),
        };
        let cells = if self.rng.chance(20) { 2 } else { 1 };
        self.post_one(engine, other, &known, operation, len, cells, forged);
    }

    /// Many small transfers, one after the other.
    fn burst(&mut self, engine: usize) {
        let Some((other, known)) = self.target(engine) else { return };
        let number = self.model.transfers.len();
        self.post_one(engine, other, &known, Operation::Read, 16, 1, false);
        if self.model.transfers.len() == number {
            return;
        }
        for _ in 0..self.profile.burst {
            let handle = self.model.transfers[number].handle.clone();
            self.with_node(engine, |node, _| node.cancel(&handle));
            if self.model.transfers[number].is_in_flight() {
                break;
            }
            self.repost(engine, number, false);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "what a posting is made of")]
    fn post_one(
        &mut self,
        engine: usize,
        other: usize,
        known: &Known,
        operation: Operation,
        len: usize,
        cells: usize,
        forged: bool,
    ) {
        let needs = match operation {
            Operation::Read => Access::REMOTE_READ,
            Operation::Write => Access::REMOTE_WRITE,
        };
        let same = self.engines[other].incarnation == known.incarnation;
        let mut here = self.model.spaces[engine].free_cells(Access::LOCAL);
        let mut pairs: Vec<(CellRef, Option<CellRef>, RegionDescriptor, u64)> = Vec::new();
        for _ in 0..cells {
            if here.is_empty() {
                return;
            }
            let index = self.rng.index(here.len());
            let own = here.swap_remove(index);
            let taken = |cell: &CellRef| {
                pairs.iter().any(|(a, b, ..)| a == cell || b.as_ref() == Some(cell))
            };
            if forged || !same {
                let Some((descriptor, offset)) = self.wrong(known.incarnation, other, needs, same)
                else {
                    return;
                };
                pairs.push((own, None, descriptor, offset));
                continue;
            }
            let mut there = self.model.spaces[other].free_cells(needs);
            there.retain(|cell| !taken(cell) && (other != engine || *cell != own));
            if there.is_empty() {
                return;
            }
            let theirs = self.rng.pick(&there);
            here.retain(|cell| other != engine || *cell != theirs);
            let descriptor = self.model.spaces[other].regions[&theirs.base].descriptor.clone();
            pairs.push((own, Some(theirs), descriptor, (theirs.index * CELL) as u64));
        }
        // In blocks, so that some requests need a table.
        let block = self.rng.pick(&[len, 700, 90]).max(len / 40 + 1);
        let mut list = Vec::new();
        for (index, (own, _, descriptor, offset)) in pairs.iter().enumerate() {
            let local = own.base + (own.index * CELL) as u64;
            let remote = descriptor.base() + offset;
            for start in (0..len).step_by(block) {
                let (at, size) = (start as u64, block.min(len - start) as u64);
                list.push((local + at, index, remote + at, size));
            }
        }
        if self.rng.chance(50) {
            list.reverse();
        }
        let descriptors: Vec<RegionDescriptor> = pairs.iter().map(|pair| pair.2.clone()).collect();
        let Some(node) = &self.engines[engine].node else { return };
        let Ok(plan) = node.plan(&known.peer, operation, &descriptors, &list) else { return };
        let number = self.model.transfers.len();
        self.model.transfers.push(Transfer {
            engine,
            incarnation: self.engines[engine].incarnation,
            to: other,
            to_incarnation: known.incarnation,
            operation,
            cells: pairs.iter().map(|(own, theirs, ..)| (*own, *theirs)).collect(),
            len,
            tag: 0,
            handle: Node::transfer(&plan),
            posted: self.now,
            limit: Duration::ZERO,
            ended: true,
            done: false,
            orphan: false,
            note: None,
            forged: forged && same,
            cancelled: None,
        });
        let bound = self.rng.chance(50);
        self.repost(engine, number, bound);
    }

    /// A descriptor that does not give what is asked: of another time, another key, longer, or open for more.
    fn wrong(
        &mut self,
        incarnation: u128,
        other: usize,
        needs: Access,
        same: bool,
    ) -> Option<(RegionDescriptor, u64)> {
        let known = self.descriptors.get(&incarnation)?;
        if known.is_empty() {
            return None;
        }
        let index = self.rng.index(known.len());
        let descriptor = known[index].clone();
        let offset = (self.rng.index(CELLS) * CELL) as u64;
        let live = self.model.spaces[other]
            .regions
            .values()
            .find(|region| same && region.descriptor == descriptor);
        let Some(region) = live else {
            // It was deregistered, or its engine is gone.
            let opened = Node::forge(&descriptor, 0, descriptor.len(), Access::READ_WRITE);
            return Some((opened, offset));
        };
        if region.closing.is_some() {
            // Too late. Devices are let in until the region is gone.
            return (self.profile.way != Way::Wired).then_some((descriptor, offset));
        }
        if !region.access.allows(needs) {
            return Some((Node::forge(&descriptor, 0, descriptor.len(), needs), offset));
        }
        if self.rng.chance(50) {
            let bits = 1 << self.rng.between(32, 120);
            return Some((Node::forge(&descriptor, bits, descriptor.len(), needs), offset));
        }
        let beyond = descriptor.len();
        Some((Node::forge(&descriptor, 0, 2 * beyond, needs), beyond))
    }

    fn post_again(&mut self, engine: usize) {
        let incarnation = self.engines[engine].incarnation;
        let again: Vec<usize> = (0..self.model.transfers.len())
            .filter(|number| {
                let t = &self.model.transfers[*number];
                let seen = t.note.is_none_or(|note| self.model.notes[note].seen);
                t.incarnation == incarnation && t.ended && t.done && seen && self.is_whole(*number)
            })
            .collect();
        if !again.is_empty() {
            let number = self.rng.pick(&again);
            let bound = self.rng.chance(50);
            self.repost(engine, number, bound);
        }
    }

    /// The memory of a transfer is still registered, here and there.
    fn is_whole(&self, number: usize) -> bool {
        let t = &self.model.transfers[number];
        t.to_incarnation == self.engines[t.to].incarnation
            && t.cells.iter().all(|(own, theirs)| {
                let open = |engine: usize, cell: CellRef| {
                    let region = self.model.spaces[engine].regions.get(&cell.base);
                    region
                        .is_some_and(|r| r.serial == cell.serial && r.closing.is_none() && r.mapped)
                };
                open(t.engine, *own) && theirs.is_some_and(|theirs| open(t.to, theirs))
            })
    }

    fn repost(&mut self, engine: usize, number: usize, bound: bool) {
        let tag = self.rng.next();
        let now = self.now;
        let (to, to_incarnation) =
            (self.model.transfers[number].to, self.model.transfers[number].to_incarnation);
        let limit = self.limit(to_incarnation) - self.engines[engine].stalls.min(now);
        let note =
            bound.then(|| self.new_note(engine, to, to_incarnation, NoteKind::Bound(number)));
        let transfer = &mut self.model.transfers[number];
        (transfer.tag, transfer.note) = (tag, note);
        (transfer.posted, transfer.limit) = (now, limit);
        (transfer.ended, transfer.done, transfer.cancelled) = (false, false, None);
        let handle = transfer.handle.clone();
        self.model.begin(number);
        let bytes = note.map(|note| note_bytes(note, self.model.notes[note].len));
        self.trace.say(now, Some(engine), &|| {
            let t = &self.model.transfers[number];
            format!(
                "posts {:?} {number} of {} x {} bytes to engine {to}, notification {note:?}",
                t.operation,
                t.cells.len(),
                t.len
            )
        });
        let posted = self.with_node(engine, |node, _| node.post(&handle, bytes.as_deref()));
        if let Some(Err(_)) = posted {
            // It was never taken.
            if let Some(note) = note {
                self.model.notes.pop();
                debug_assert_eq!(note, self.model.notes.len());
            }
            let transfer = &mut self.model.transfers[number];
            (transfer.note, transfer.ended, transfer.done) = (None, true, false);
            return;
        }
        self.engines[engine].in_flight.push(number);
        let count = self.engines[engine].in_flight.len();
        self.engines[engine].peak = self.engines[engine].peak.max(count);
        self.check_engine(engine);
    }

    fn cancel(&mut self, engine: usize) {
        let all = self.engines[engine].in_flight.clone();
        if all.is_empty() {
            return;
        }
        let number = self.rng.pick(&all);
        let handle = self.model.transfers[number].handle.clone();
        self.say(&|| format!("engine {engine} cancels {number}"));
        self.with_node(engine, |node, _| node.cancel(&handle));
        let now = self.now;
        let transfer = &mut self.model.transfers[number];
        transfer.cancelled.get_or_insert(now);
        // What a thread is amid of is waited for.
        let by_engine = matches!(self.profile.way, Way::Sockets | Way::Ring);
        let at_once = by_engine && transfer.operation == Operation::Read;
        if at_once && transfer.is_in_flight() {
            let text = format!("engine {engine}: READ {number} goes on though it was cancelled");
            self.model.fail(Promise::EndsInTime, text);
        }
    }

    // Notifications.

    fn new_note(&mut self, from: usize, to: usize, to_incarnation: u128, kind: NoteKind) -> usize {
        let len = match self.rng.below(12) {
            0 => self.profile.long_note,
            1 => 4096.min(self.profile.long_note),
            n => 8 + n as usize,
        };
        let from_incarnation = self.engines[from].incarnation;
        let seen = false;
        let loading = self.engines[from].loaded.get(&to).map_or(0, |known| known.loading);
        self.model.notes.push(Note {
            from,
            from_incarnation,
            to,
            to_incarnation,
            kind,
            loading,
            len,
            seen,
        });
        self.model.notes.len() - 1
    }

    fn notify(&mut self, engine: usize) {
        let Some((other, incarnation, peer)) = self.listener(engine) else { return };
        let id = self.new_note(engine, other, incarnation, NoteKind::Free);
        let bytes = note_bytes(id, self.model.notes[id].len);
        self.say(&|| {
            format!("engine {engine} sends notification {id} of {} bytes to {other}", bytes.len())
        });
        let sent = self.with_node(engine, |node, _| node.notify(&peer, &bytes));
        if !matches!(sent, Some(Ok(()))) {
            self.model.notes.pop();
        }
    }

    /// A peer that was loaded, or one that has connected by itself.
    fn listener(&mut self, engine: usize) -> Option<(usize, u128, Peer)> {
        if self.rng.chance(70) {
            let (other, known) = self.target(engine)?;
            return Some((other, known.incarnation, known.peer));
        }
        let other = self.rng.index(self.engines.len());
        let incarnation = self.engines[other].incarnation;
        let node = self.engines[engine].node.as_ref()?;
        let peer = node.peer(incarnation).filter(Peer::is_connected)?;
        (other != engine && self.engines[other].honest).then_some((other, incarnation, peer))
    }

    pub(crate) fn take(&mut self, engine: usize, most: usize) {
        self.take_some(engine, most);
        self.with_node(engine, |node, _| node.drain());
    }

    /// What has just arrived is seen before anything else happens.
    pub(crate) fn take_at_once(&mut self, engine: usize) {
        self.take_some(engine, usize::MAX);
    }

    fn take_some(&mut self, engine: usize, most: usize) {
        let mut taken = Vec::new();
        if let Some(node) = &mut self.engines[engine].node {
            for _ in 0..most {
                let Some((_, bytes)) = node.take_notification() else { break };
                taken.push(bytes);
            }
        }
        self.notes_seen += taken.len() as u64;
        for bytes in taken {
            self.model.take(engine, &bytes);
        }
    }
}
