//! What applications ask for and wait for: memory, peers, sessions.

use std::time::Duration;

use corelane::Access;
use corelane::sim::{Node, Way};

use crate::memory::{CELL, CELLS, CellRef, Region, Role};
use crate::ports::Event;
use crate::promise::Promise;
use crate::world::{Call, Known, Pending, World, ms};

impl World {
    pub(crate) fn register(&mut self, engine: usize) {
        if self.model.spaces[engine].regions.len() >= 6 {
            return;
        }
        let base = self.model.spaces[engine].reserve();
        let access = self.rng.pick(&[
            Access::READ_WRITE,
            Access::READ_WRITE,
            Access::READ_WRITE,
            Access::REMOTE_READ,
            Access::REMOTE_WRITE,
        ]);
        let len = (CELL * CELLS) as u64;
        let made = self.with_node(engine, |node, ports| node.register(base, len, access, ports));
        let Some(Ok(handle)) = made else { return };
        let descriptor = handle.descriptor();
        let incarnation = self.engines[engine].incarnation;
        self.descriptors.entry(incarnation).or_default().push(descriptor.clone());
        self.serial += 1;
        self.say(&|| format!("engine {engine} registers {base:#x}"));
        self.model.spaces[engine].regions.insert(
            base,
            Region {
                base,
                serial: self.serial,
                bytes: vec![0; CELL * CELLS],
                cells: vec![Role::Free; CELLS],
                access,
                handle,
                descriptor,
                closing: None,
                mapped: true,
            },
        );
    }

    pub(crate) fn deregister(&mut self, engine: usize) {
        let open = self.model.spaces[engine].regions.values().filter(|r| r.closing.is_none());
        let all: Vec<u64> = open.map(|region| region.base).collect();
        if all.is_empty() {
            return;
        }
        let base = self.rng.pick(&all);
        self.deregister_at(engine, base);
    }

    pub(crate) fn deregister_at(&mut self, engine: usize, base: u64) {
        let now = self.now;
        let Some(region) = self.model.spaces[engine].regions.get_mut(&base) else { return };
        region.closing = Some(now);
        let (handle, serial) = (region.handle.clone(), region.serial);
        self.say(&|| format!("engine {engine} deregisters {base:#x}"));
        let ticket = self.with_node(engine, |node, _| node.deregister(&handle)).flatten();
        if let Some(ticket) = ticket {
            // Those that use it end by their own timeouts.
            let limit = now + Duration::from_secs(45);
            let what = Call::Deregister(CellRef { base, serial, index: 0 });
            self.pend(engine, what, ticket, limit);
        }
        self.look_at_pending();
    }

    pub(crate) fn unmap(&mut self, engine: usize) {
        let all: Vec<u64> = self.model.spaces[engine].regions.keys().copied().collect();
        // A device goes on with the memory that was there when it was registered.
        if all.is_empty() || self.profile.way == Way::Wired {
            return;
        }
        let base = self.rng.pick(&all);
        self.say(&|| format!("engine {engine} unmaps {base:#x}"));
        if let Some(region) = self.model.spaces[engine].regions.get_mut(&base) {
            region.mapped = false;
        }
    }

    fn pend(
        &mut self,
        engine: usize,
        what: Call,
        ticket: corelane::sim::TicketHandle,
        limit: Duration,
    ) {
        let generation = self.engines[engine].generation;
        let limit = limit + self.engines[engine].stalled_until.saturating_sub(self.now);
        self.pending.push(Pending { engine, generation, what, ticket, limit });
    }

    /// Calls that have been answered.
    pub(crate) fn look_at_pending(&mut self) {
        let mut index = 0;
        while let Some(pending) = self.pending.get(index) {
            let engine = pending.engine;
            let known = &self.engines[engine];
            let same = known.generation == pending.generation && known.alive;
            if same && !pending.ticket.is_complete() {
                let limit = pending.limit + known.stalls;
                if limit < self.now {
                    let text = format!("engine {engine}: {:?} has no answer", pending.what);
                    self.model.fail(Promise::EndsInTime, text);
                }
                index += 1;
                continue;
            }
            let pending = self.pending.swap_remove(index);
            if !same {
                continue;
            }
            match pending.what {
                Call::Connect(other) => {
                    if let Some(known) = self.engines[engine].loaded.get_mut(&other) {
                        known.connecting = false;
                    }
                }
                Call::Leave => {}
                Call::Deregister(cell) => self.deregistered(engine, cell),
            }
        }
    }

    fn deregistered(&mut self, engine: usize, cell: CellRef) {
        let Some(region) = self.model.spaces[engine].regions.get(&cell.base) else { return };
        let handle = region.handle.clone();
        self.say(&|| format!("engine {engine} has deregistered {:#x}", cell.base));
        if let Some(node) = &mut self.engines[engine].node {
            node.deregistered(&handle);
        }
        self.model.spaces[engine].give_back(cell.base);
    }

    /// An engine gets the metadata of another, as it is now.
    pub(crate) fn load(&mut self, engine: usize, other: usize) {
        if !self.engines[engine].alive || !self.engines[other].alive {
            return;
        }
        let Some(metadata) = self.engines[other].node.as_ref().map(Node::metadata) else { return };
        let incarnation = self.engines[other].incarnation;
        let before = self.engines[engine].loaded.get(&other).map(|known| known.incarnation);
        if let Some(before) = before.filter(|before| *before != incarnation) {
            let own = self.engines[engine].incarnation;
            self.model.may_drop(own, before);
        }
        self.say(&|| format!("engine {engine} loads engine {other}, {incarnation:x}"));
        if let Some(Ok(peer)) = self.with_node(engine, |node, _| node.load(&metadata)) {
            self.serial += 1;
            let loading = match self.engines[engine].loaded.get(&other) {
                Some(known) if known.incarnation == incarnation => known.loading,
                _ => self.serial,
            };
            let known = Known { peer, incarnation, connecting: false, loading };
            self.engines[engine].loaded.insert(other, known);
        }
    }

    pub(crate) fn connect(&mut self, engine: usize, other: usize) {
        let Some(known) = self.engines[engine].loaded.get_mut(&other) else { return };
        known.connecting = true;
        let peer = known.peer.clone();
        self.say(&|| format!("engine {engine} connects to {other}"));
        let ticket = self.with_node(engine, |node, _| node.connect(&peer));
        if let Some(ticket) = ticket {
            let limit = self.now + ms(2000 + 1000 + 200);
            self.pend(engine, Call::Connect(other), ticket, limit);
        }
        self.look_at_pending();
    }

    pub(crate) fn disconnect(&mut self, engine: usize) {
        let Some(other) = self.any_loaded(engine) else { return };
        let known = self.engines[engine].loaded[&other].clone();
        let own = self.engines[engine].incarnation;
        self.model.may_drop(own, known.incarnation);
        self.say(&|| format!("engine {engine} disconnects {other}"));
        let ticket = self.with_node(engine, |node, _| node.disconnect(&known.peer));
        if let Some(ticket) = ticket {
            let limit = self.now + self.profile.linger + ms(100);
            self.pend(engine, Call::Leave, ticket, limit);
        }
        self.look_at_pending();
    }

    pub(crate) fn unload(&mut self, engine: usize) {
        let Some(other) = self.any_loaded(engine) else { return };
        let Some(known) = self.engines[engine].loaded.remove(&other) else { return };
        let own = self.engines[engine].incarnation;
        self.model.may_drop(own, known.incarnation);
        self.model.pair(known.incarnation, own).forgot = true;
        self.say(&|| format!("engine {engine} unloads {other}"));
        let ticket = self.with_node(engine, |node, _| node.unload(&known.peer));
        if let Some(ticket) = ticket {
            let limit = self.now + self.profile.linger + ms(100);
            self.pend(engine, Call::Leave, ticket, limit);
        }
        if self.rng.chance(70) {
            let after = Duration::from_micros(self.rng.below(5000));
            self.schedule.at(self.now + after, Event::Load(engine, other));
        }
        self.look_at_pending();
    }
}
