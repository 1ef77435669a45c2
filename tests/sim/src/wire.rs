//! Queue pairs of devices: what is posted is carried out in order, packet by packet, by hardware that goes on while its engine
//! stands still. When a rail fails, the two sides learn it at times of their own, and packets that are in the network still
//! land, if there is a queue pair that takes them.

use std::collections::VecDeque;
use std::time::Duration;

use corelane::Access;
use corelane::sim::{Completion, Range, Touch, Work};

use crate::memory::CELL;
use crate::ports::{Event, Ports, Schedule};
use crate::world::{World, ms};

/// Bytes of a packet.
const PACKET: usize = 900;

/// What moves at a time.
#[derive(Debug)]
enum Packet {
    Read(Range),
    Write(Range, Vec<u8>),
    Send(Vec<u8>),
}

/// A packet, of which work, and whether it is the last of it.
#[derive(Debug)]
struct Sent {
    generation: u32,
    number: u64,
    last: bool,
    packet: Packet,
}

/// What comes back to who has posted.
#[derive(Debug)]
enum Back {
    Bytes(u32, Range, Vec<u8>),
    Done(u32, u64),
}

/// One end of the queue pairs of a connection.
#[derive(Debug, Default)]
pub(crate) struct WireEnd {
    pub(crate) generation: Option<u32>,
    /// Nothing of this generation or an older one gets through any more.
    broken: u32,
    unsent: VecDeque<Sent>,
    network: VecDeque<(Duration, Sent)>,
    back: VecDeque<(Duration, Back)>,
    completions: VecDeque<Completion>,
    scheduled: bool,
}

fn pieces(ranges: &[Range]) -> impl Iterator<Item = Range> + '_ {
    ranges.iter().flat_map(|range| {
        let starts = (0..range.len).step_by(PACKET);
        starts.map(|at| Range {
            local: range.local + at as u64,
            remote: range.remote + at as u64,
            len: PACKET.min(range.len - at),
            key: range.key,
        })
    })
}

impl Ports<'_> {
    pub(crate) fn set_pair(&mut self, link: u64, generation: Option<u32>) {
        let Some((conn, side)) = self.conn(link) else { return };
        let end = &mut self.net.conns[conn].ends[side].wire;
        end.generation = generation;
        end.unsent.clear();
    }

    pub(crate) fn post_work(&mut self, link: u64, number: u64, work: Work) {
        let Some((conn, side)) = self.conn(link) else { return };
        let end = &mut self.net.conns[conn].ends[side].wire;
        let Some(generation) = end.generation else { return };
        if end.broken >= generation {
            let found = self.now + ms(self.rng.between(0, 20));
            return self.schedule.at(found, Event::WireFailed(conn, side, generation));
        }
        let packets: Vec<Packet> = match work {
            Work::Read(ranges) => pieces(&ranges).map(Packet::Read).collect(),
            // Its bytes are fetched when it is sent.
            Work::Write(ranges) => {
                pieces(&ranges).map(|range| Packet::Write(range, Vec::new())).collect()
            }
            Work::Send(bytes) => vec![Packet::Send(bytes)],
        };
        let count = packets.len();
        end.unsent.extend(packets.into_iter().enumerate().map(|(index, packet)| Sent {
            generation,
            number,
            last: index + 1 == count,
            packet,
        }));
        wake(self.schedule, end, self.now, conn, side);
    }

    pub(crate) fn next_completion(&mut self, link: u64) -> Option<Completion> {
        let (conn, side) = self.conn(link)?;
        self.net.conns[conn].ends[side].wire.completions.pop_front()
    }
}

fn wake(schedule: &mut Schedule, end: &mut WireEnd, now: Duration, conn: usize, side: usize) {
    if !std::mem::replace(&mut end.scheduled, true) {
        schedule.at(now + Duration::from_micros(1), Event::Wire(conn, side));
    }
}

impl World {
    fn wire_end(&mut self, conn: usize, side: usize) -> &mut WireEnd {
        &mut self.net.conns[conn].ends[side].wire
    }

    /// A device has something to do for what an end has posted.
    pub(crate) fn wire(&mut self, conn: usize, side: usize) {
        let now = self.now;
        let delay = Duration::from_micros(self.rng.between(1, 150));
        self.wire_end(conn, side).scheduled = false;
        self.wire_send(conn, side, now + delay);
        while let Some((at, _)) = self.wire_end(conn, side).network.front()
            && *at <= now
        {
            let Some((_, sent)) = self.wire_end(conn, side).network.pop_front() else { break };
            self.wire_land(conn, side, sent);
        }
        while let Some((at, _)) = self.wire_end(conn, side).back.front()
            && *at <= now
        {
            let Some((_, back)) = self.wire_end(conn, side).back.pop_front() else { break };
            self.wire_back(conn, side, back);
        }
        let end = self.wire_end(conn, side);
        let next = [end.network.front().map(|f| f.0), end.back.front().map(|f| f.0)];
        let unsent = (!end.unsent.is_empty()).then_some(now + delay);
        if let Some(at) = next.into_iter().chain([unsent]).flatten().min() {
            end.scheduled = true;
            self.schedule.at(at.max(now + Duration::from_micros(1)), Event::Wire(conn, side));
        }
    }

    fn wire_send(&mut self, conn: usize, side: usize, lands: Duration) {
        let Some(mut sent) = self.wire_end(conn, side).unsent.pop_front() else { return };
        let engine = self.net.conns[conn].ends[side].engine;
        if let Packet::Write(range, bytes) = &mut sent.packet {
            let found =
                self.model.touch(engine, self.now, Touch::Own, range.local, range.len, None);
            let Some((base, offset)) = found else { return };
            let region = &self.model.spaces[engine].regions[&base];
            *bytes = region.bytes[offset..offset + range.len].to_vec();
        }
        let end = self.wire_end(conn, side);
        let at = end.network.back().map_or(lands, |(last, _)| lands.max(*last));
        let write = matches!(sent.packet, Packet::Write(..));
        end.network.push_back((at, sent));
        if write && std::mem::take(&mut self.net.rail_fails) {
            self.say(&|| format!("connection {conn}: its rail fails amid a WRITE"));
            self.rail_fails(conn);
        }
    }

    /// A packet arrives at the other device.
    fn wire_land(&mut self, conn: usize, side: usize, sent: Sent) {
        let Sent { generation, number, last, packet } = sent;
        let (from, to) = (&self.net.conns[conn].ends[side], &self.net.conns[conn].ends[1 - side]);
        let (initiator, target) = (from.engine, to.engine);
        let lives = |engine: usize, number: u32| {
            self.engines.get(engine).is_some_and(|e| e.alive && e.generation == number)
        };
        let there = lives(target, to.generation) && to.wire.generation == Some(generation);
        let incarnation = self.engines.get(initiator).map_or(0, |engine| engine.incarnation);
        if !there {
            // Nobody answers.
            return self.wire_error(conn, side, generation, None);
        }
        let open = |range: &Range, needs| {
            let node = self.engines[target].node.as_ref();
            node.is_some_and(|node| node.opens(range.key, range.remote, range.len as u64, needs))
        };
        let touch = Touch::Device(incarnation);
        let now = self.now;
        match packet {
            Packet::Read(range) => {
                if !open(&range, Access::REMOTE_READ) {
                    return self.wire_error(conn, side, generation, Some(number));
                }
                let found = self.model.touch(target, now, touch, range.remote, range.len, None);
                let Some((base, offset)) = found else { return };
                let region = &self.model.spaces[target].regions[&base];
                let bytes = region.bytes[offset..offset + range.len].to_vec();
                self.answer(conn, side, Back::Bytes(generation, range, bytes));
            }
            Packet::Write(range, bytes) => {
                if !open(&range, Access::REMOTE_WRITE) {
                    return self.wire_error(conn, side, generation, Some(number));
                }
                let touched = (range.remote, range.len);
                let found =
                    self.model.touch(target, now, touch, touched.0, touched.1, Some(&bytes));
                let Some((base, offset)) = found else { return };
                if let Some(region) = self.model.spaces[target].regions.get_mut(&base) {
                    region.bytes[offset..offset + range.len].copy_from_slice(&bytes);
                }
            }
            Packet::Send(bytes) => {
                self.tell_engine(conn, 1 - side, Completion::Received(bytes));
            }
        }
        if last && self.wire_end(conn, side).broken < generation {
            self.answer(conn, side, Back::Done(generation, number));
        }
    }

    fn answer(&mut self, conn: usize, side: usize, back: Back) {
        let at = self.now + Duration::from_micros(self.rng.between(1, 150));
        let end = self.wire_end(conn, side);
        let at = end.back.back().map_or(at, |(last, _)| at.max(*last));
        end.back.push_back((at, back));
    }

    fn wire_back(&mut self, conn: usize, side: usize, back: Back) {
        let known = &self.net.conns[conn].ends[side];
        let (engine, current) = (known.engine, known.wire.generation);
        match back {
            Back::Bytes(generation, ..) | Back::Done(generation, _)
                if current != Some(generation) => {}
            Back::Done(_, number) => self.tell_engine(conn, side, Completion::Done(number)),
            Back::Bytes(_, range, bytes) => {
                let (local, len) = (range.local, range.len);
                let found =
                    self.model.touch(engine, self.now, Touch::Own, local, len, Some(&bytes));
                if let Some((base, offset)) = found
                    && let Some(region) = self.model.spaces[engine].regions.get_mut(&base)
                {
                    region.bytes[offset..offset + len].copy_from_slice(&bytes);
                }
            }
        }
    }

    /// The queue pair of this end is in error: nothing more of it is sent.
    fn wire_error(&mut self, conn: usize, side: usize, generation: u32, refused: Option<u64>) {
        let end = self.wire_end(conn, side);
        if end.broken >= generation {
            return;
        }
        end.broken = generation;
        end.unsent.retain(|sent| sent.generation != generation);
        end.network.retain(|(_, sent)| sent.generation != generation);
        if end.generation == Some(generation) {
            self.tell_engine(conn, side, Completion::Failed(refused));
        }
    }

    fn tell_engine(&mut self, conn: usize, side: usize, completion: Completion) {
        self.wire_end(conn, side).completions.push_back(completion);
        let at = self.now + Duration::from_micros(self.rng.between(1, 80));
        self.schedule.at(at, Event::WireTold(conn, side));
    }

    pub(crate) fn wire_told(&mut self, conn: usize, side: usize) {
        let Some((engine, link)) = self.owner(conn, side) else { return };
        if let Some(until) = self.stalled(engine) {
            return self.schedule.at(until, Event::WireTold(conn, side));
        }
        if !self.wire_end(conn, side).completions.is_empty() {
            self.with_node(engine, |node, ports| node.look_at_wire(link, ports));
        }
    }

    /// A rail fails: what is in the network may be lost, or late; both sides find out, each at a time of its own.
    pub(crate) fn rail_fails(&mut self, conn: usize) {
        let now = self.now;
        for side in 0..2 {
            let late = ms(self.rng.between(0, 40));
            let lost = self.rng.chance(40);
            let end = self.wire_end(conn, side);
            let Some(generation) = end.generation else { continue };
            if end.broken >= generation {
                continue;
            }
            let posted = !(end.unsent.is_empty() && end.network.is_empty() && end.back.is_empty());
            end.broken = generation;
            end.unsent.clear();
            if lost {
                end.network.clear();
            }
            for (at, _) in &mut end.network {
                *at += late;
            }
            // Neither data nor acknowledgements come back.
            end.back.clear();
            if posted {
                let found = now + ms(self.rng.between(0, 20));
                self.schedule.at(found, Event::WireFailed(conn, side, generation));
            }
        }
    }

    pub(crate) fn wire_failed(&mut self, conn: usize, side: usize, generation: u32) {
        if self.wire_end(conn, side).generation == Some(generation) {
            self.tell_engine(conn, side, Completion::Failed(None));
        }
    }

    /// Engines that stood still look at what their devices have told them.
    pub(crate) fn look_at_wires(&mut self) {
        for conn in 0..self.net.conns.len() {
            for side in 0..2 {
                if !self.wire_end(conn, side).completions.is_empty() {
                    self.schedule.at(self.now, Event::WireTold(conn, side));
                }
            }
        }
    }

    /// The devices of a process that has died belong to nobody: what is in the network lands where it is taken.
    pub(crate) fn wire_dies(&mut self, conn: usize, side: usize) {
        let end = self.wire_end(conn, side);
        end.generation = None;
        end.unsent.clear();
        end.back.clear();
        end.completions.clear();
    }
}

const _: () = assert!(PACKET < CELL);
