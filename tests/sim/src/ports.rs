//! What an engine sees of the world.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::time::Duration;

use corelane::Operation;
use corelane::sim::{Completion, Copied, Memory, Outside, RingLook, Shared, Touch, Work};

use crate::model::Model;
use crate::net::{Item, Net, RING_SLOTS};
use crate::promise::Promise;
use crate::rng::Rng;

/// What happens at an instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Event {
    /// A connection is asked for at its target.
    Arrive(usize),
    OpenFailed(usize, bool),
    Opened(usize),
    Inbound(usize, usize),
    Writable(usize, usize),
    Ring(usize, usize),
    /// A thread of an engine goes on with a copy.
    Copy(usize, u32),
    /// A device has something to do for an end of a connection, or to tell it.
    Wire(usize, usize),
    WireTold(usize, usize),
    /// A side finds out that the rail of its queue pair has failed.
    WireFailed(usize, usize, u32),
    Timer(usize, u32),
    /// The kernel gives up a connection on which nothing gets through.
    GiveUp(usize),
    Act,
    Fault,
    Heal(usize, usize),
    Restart(usize),
    /// An engine that was told to shut down is gone.
    Gone(usize, u32),
    /// By now this engine must have noticed the death of that incarnation.
    MustKnow(usize, u32, u128),
    /// An engine loads the metadata of another.
    Load(usize, usize),
    Tick,
}

/// Events in order of time, and of their making.
#[derive(Default)]
pub(crate) struct Schedule {
    heap: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    made: u64,
}

impl Schedule {
    pub(crate) fn at(&mut self, at: Duration, event: Event) {
        self.made += 1;
        self.heap.push(Reverse((at, self.made, event)));
    }

    pub(crate) fn next(&mut self) -> Option<(Duration, Event)> {
        self.heap.pop().map(|Reverse((at, _, event))| (at, event))
    }
}

/// The lines of a trace.
#[derive(Default)]
pub(crate) struct Trace {
    pub(crate) on: bool,
    pub(crate) lines: u64,
}

impl Trace {
    pub(crate) fn say(&mut self, now: Duration, engine: Option<usize>, text: &dyn Fn() -> String) {
        if self.on {
            self.lines += 1;
            let who =
                engine.map_or_else(|| "world".to_owned(), |engine| format!("engine {engine}"));
            println!("{:>12.6} {who:<10} {}", now.as_secs_f64(), text());
        }
    }
}

pub(crate) struct Ports<'w> {
    pub(crate) engine: usize,
    pub(crate) generation: u32,
    pub(crate) now: Duration,
    pub(crate) net: &'w mut Net,
    pub(crate) model: &'w mut Model,
    pub(crate) schedule: &'w mut Schedule,
    pub(crate) rng: &'w mut Rng,
    pub(crate) trace: &'w mut Trace,
    pub(crate) honest: bool,
}

impl Ports<'_> {
    pub(crate) fn conn(&self, link: u64) -> Option<(usize, usize)> {
        self.net.find(self.engine, self.generation, link)
    }
}

/// Lets an end look at what is on its way, when the first of it is there.
pub(crate) fn watch(net: &mut Net, schedule: &mut Schedule, conn: usize, side: usize) {
    let end = &mut net.conns[conn].ends[side];
    if !end.scheduled
        && let Some((at, _)) = end.inbound.front()
    {
        end.scheduled = true;
        schedule.at(*at, Event::Inbound(conn, side));
    }
}

impl Memory for Ports<'_> {
    fn read(&mut self, touch: Touch, addr: u64, into: &mut [u8]) {
        if let Some((base, offset)) =
            self.model.touch(self.engine, self.now, touch, addr, into.len(), None)
        {
            let region = &self.model.spaces[self.engine].regions[&base];
            into.copy_from_slice(&region.bytes[offset..offset + into.len()]);
        }
    }

    fn write(&mut self, touch: Touch, addr: u64, bytes: &[u8]) -> bool {
        let found = self.model.touch(self.engine, self.now, touch, addr, bytes.len(), Some(bytes));
        let Some((base, offset)) = found else { return false };
        if let Some(region) = self.model.spaces[self.engine].regions.get_mut(&base) {
            region.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        true
    }

    fn is_mapped(&self, addr: u64, len: u64) -> bool {
        let space = &self.model.spaces[self.engine];
        // What is not registered is found out by the touch itself.
        space.find(addr, len as usize).is_none_or(|(base, _)| space.regions[&base].mapped)
    }
}

impl Outside for Ports<'_> {
    fn random(&mut self) -> u64 {
        self.rng.next()
    }

    fn open(&mut self, link: u64, address: SocketAddr) {
        let conn = self.net.dial(self.engine, self.generation, link, address);
        let at = self.now + self.net.delay();
        self.schedule.at(at, Event::Arrive(conn));
    }

    fn room(&mut self, link: u64) -> usize {
        let Some((conn, side)) = self.conn(link) else { return 0 };
        let room = self.net.room(conn, side);
        let budget = 1 + self.rng.index(self.net.manner.chunk);
        if budget < room {
            let at = self.now + Duration::from_micros(self.rng.between(1, 30));
            self.schedule.at(at, Event::Writable(conn, side));
        }
        room.min(budget)
    }

    fn send(&mut self, link: u64, bytes: Vec<u8>) {
        let Some((conn, side)) = self.conn(link) else { return };
        self.net.put(conn, side, self.now, Item::Bytes(bytes));
        watch(self.net, self.schedule, conn, 1 - side);
    }

    fn is_broken(&self, link: u64) -> bool {
        self.conn(link).is_some_and(|(conn, side)| self.net.conns[conn].ends[1 - side].closed)
    }

    fn close(&mut self, link: u64) {
        let Some((conn, side)) = self.conn(link) else { return };
        self.net.close(conn, side, self.now);
        watch(self.net, self.schedule, conn, 1 - side);
    }

    fn ring(&mut self, link: u64) -> RingLook {
        let Some((conn, side)) = self.conn(link) else {
            return RingLook { has_room: false, is_empty: true };
        };
        let waiting = self.net.conns[conn].ends[1 - side].ring.len();
        RingLook { has_room: waiting < RING_SLOTS, is_empty: waiting == 0 }
    }

    fn ring_push(&mut self, link: u64, message: Vec<u8>) {
        let Some((conn, side)) = self.conn(link) else { return };
        let end = &mut self.net.conns[conn].ends[1 - side];
        end.ring.push_back(message);
        let at = self.now + Duration::from_micros(self.rng.between(1, 60));
        self.schedule.at(at, Event::Ring(conn, 1 - side));
    }

    fn ring_pop(&mut self, link: u64) -> Option<Vec<u8>> {
        let (conn, side) = self.conn(link)?;
        let message = self.net.conns[conn].ends[side].ring.pop_front()?;
        // The other side looks whether there is room again.
        let at = self.now + Duration::from_micros(self.rng.between(1, 60));
        self.schedule.at(at, Event::Ring(conn, 1 - side));
        Some(message)
    }

    fn share(&mut self, link: u64, shared: Shared) {
        if let Some((conn, side)) = self.conn(link) {
            self.net.conns[conn].ends[1 - side].shared = Some(shared);
        }
    }

    fn shared(&mut self, link: u64) -> Option<Shared> {
        let (conn, side) = self.conn(link)?;
        self.net.conns[conn].ends[side].shared.take()
    }

    fn copy(
        &mut self,
        peer: u128,
        operation: Operation,
        local: u64,
        remote: u64,
        len: usize,
    ) -> Copied {
        let Some(target) = self.model.engine_of(peer) else { return Copied::Gone };
        let read = operation == Operation::Read;
        let (own, served) = (Touch::Own, Touch::Served(self.model.incarnations[self.engine]));
        let (here, there) = ((self.engine, own, local), (target, served, remote));
        let (from, to) = if read { (there, here) } else { (here, there) };
        let fault = |engine: usize| {
            if engine == target && engine != self.engine {
                Copied::PeerFault
            } else {
                Copied::OwnFault
            }
        };
        let (engine, touch, addr) = from;
        let Some((base, offset)) = self.model.touch(engine, self.now, touch, addr, len, None)
        else {
            return fault(engine);
        };
        let bytes = self.model.spaces[engine].regions[&base].bytes[offset..offset + len].to_vec();
        let (engine, touch, addr) = to;
        let found = self.model.touch(engine, self.now, touch, addr, len, Some(&bytes));
        let Some((base, offset)) = found else { return fault(engine) };
        if let Some(region) = self.model.spaces[engine].regions.get_mut(&base) {
            region.bytes[offset..offset + len].copy_from_slice(&bytes);
        }
        Copied::Done
    }

    fn pair(&mut self, link: u64, generation: Option<u32>) {
        self.set_pair(link, generation);
    }

    fn post(&mut self, link: u64, number: u64, work: Work) {
        self.post_work(link, number, work);
    }

    fn completion(&mut self, link: u64) -> Option<Completion> {
        self.next_completion(link)
    }

    fn broken(&mut self, peer: u128, reason: &str) {
        // What is said on a link that this side closes already is nobody's fault.
        let fault = self.honest && !reason.contains("a link that is closing");
        if fault && self.model.engine_of(peer).is_some() {
            let text = format!("engine {}: {reason}", self.engine);
            self.model.fail(Promise::Rules, text);
        }
    }

    fn note(&mut self, text: &dyn Fn() -> String) {
        self.trace.say(self.now, Some(self.engine), text);
    }
}
