//! What befalls engines and network.

use std::time::Duration;

use crate::memory::Space;
use crate::net::Item;
use crate::ports::{Event, watch};
use crate::profile::{Fault, draw};
use crate::world::{Engine, World, address, ms};
use corelane::sim::{Node, Way};

/// When the kernel gives up a connection on which nothing gets through; later than all timeouts of the engines.
const GIVEN_UP: Duration = Duration::from_secs(40);

impl World {
    pub(crate) fn fault(&mut self) {
        if self.faults_left == 0 || self.resting {
            return;
        }
        self.faults_left -= 1;
        let span = self.profile.pause_us * self.profile.actions as u64 / 2 + 500;
        let pause = Duration::from_micros(self.rng.below(span / 4 + 1) + 50);
        self.schedule.at(self.now + pause, Event::Fault);
        let weights = self.profile.fault_weights.clone();
        match draw(&mut self.rng, &weights) {
            None => {}
            Some(Fault::Cut) => {
                if let Some(conn) = self.any_conn() {
                    self.say(&|| format!("connection {conn} breaks"));
                    self.net.cut(conn, self.now);
                    self.watch_both(conn);
                }
            }
            Some(Fault::CloseOneSide) => self.lose_one_side(),
            Some(Fault::Silence) => {
                if let Some(conn) = self.any_conn() {
                    self.say(&|| format!("connection {conn} goes silent"));
                    self.disturbed = true;
                    self.net.conns[conn].silent = true;
                    self.schedule.at(self.now + GIVEN_UP, Event::GiveUp(conn));
                }
            }
            Some(Fault::Partition) => self.partition(),
            Some(Fault::Stall) => self.stall(),
            Some(Fault::Slow) => {
                if let Some(conn) = self.any_conn() {
                    let side = self.rng.index(2);
                    let pause = ms(self.rng.between(1, 120));
                    self.say(&|| format!("connection {conn}: side {side} reads slowly"));
                    self.disturbed = true;
                    self.net.conns[conn].ends[side].slow = Some(pause);
                }
            }
            Some(Fault::Crash) => self.crash_any(false),
            Some(Fault::HostDown) => self.crash_any(true),
            Some(Fault::Rail) => {
                self.net.rail_fails = self.rng.chance(60);
                if self.net.rail_fails {
                    return;
                }
                if let Some(conn) = self.any_conn() {
                    self.say(&|| format!("connection {conn}: its rail fails"));
                    self.rail_fails(conn);
                }
            }
            Some(Fault::Flood) => self.flood(),
        }
    }

    fn any_conn(&mut self) -> Option<usize> {
        let open: Vec<usize> = (0..self.net.conns.len())
            .filter(|conn| self.net.conns[*conn].ends.iter().any(|end| !end.closed))
            .collect();
        (!open.is_empty()).then(|| self.rng.pick(&open))
    }

    fn watch_both(&mut self, conn: usize) {
        for side in 0..2 {
            watch(&mut self.net, &mut self.schedule, conn, side);
        }
    }

    /// One side learns that the connection is lost, the other hears nothing any more.
    fn lose_one_side(&mut self) {
        let Some(conn) = self.any_conn() else { return };
        let side = self.rng.index(2);
        self.say(&|| format!("connection {conn} is lost on side {side} only"));
        self.disturbed = true;
        self.net.put(conn, 1 - side, self.now, Item::Reset);
        self.watch_both(conn);
        self.net.conns[conn].ends[1 - side].inbound.clear();
        self.net.conns[conn].ends[1 - side].inbound_bytes = 0;
        self.net.conns[conn].half_open = true;
        self.schedule.at(self.now + GIVEN_UP, Event::GiveUp(conn));
    }

    fn partition(&mut self) {
        let count = self.engines.len();
        let (a, b) = (self.rng.index(count), self.rng.index(count));
        if a == b {
            return;
        }
        self.say(&|| format!("engines {a} and {b} cannot reach each other"));
        self.disturbed = true;
        self.net.partitions.push((a, b));
        let liveness = self.profile.liveness.as_millis() as u64;
        let span = self.rng.pick(&[liveness / 4, liveness * 2, 4000]);
        self.schedule.at(self.now + ms(self.rng.between(1, span + 2)), Event::Heal(a, b));
    }

    pub(crate) fn heal(&mut self, a: usize, b: usize) {
        self.say(&|| format!("engines {a} and {b} reach each other again"));
        if let Some(index) = self.net.partitions.iter().position(|pair| *pair == (a, b)) {
            self.net.partitions.swap_remove(index);
        }
    }

    fn stall(&mut self) {
        let engine = self.rng.index(self.engines.len());
        let liveness = self.profile.liveness.as_millis() as u64;
        let span = self.rng.pick(&[liveness / 8, liveness, liveness * 3]);
        let pause = ms(self.rng.between(1, span + 2));
        self.say(&|| format!("engine {engine} is not scheduled for {pause:?}"));
        self.disturbed = true;
        self.engines[engine].stalled_until = self.now + pause;
        self.engines[engine].stalls += pause;
    }

    fn crash_any(&mut self, host: bool) {
        let mut engine = self.rng.index(self.engines.len());
        // One that is amid a copy, if there is any.
        let copies = |engine: &Engine| engine.node.as_ref().is_some_and(|node| node.copies() > 0);
        let copying = self.engines.iter().position(copies);
        if let Some(copying) = copying.filter(|_| self.rng.chance(60)) {
            engine = copying;
        }
        if self.engines[engine].alive {
            self.crash(engine, host);
            if copying == Some(engine) {
                let others = self.awake();
                others.into_iter().for_each(|other| self.deregister(other));
            }
            if self.rng.chance(60) {
                let pause = ms(self.rng.pick(&[1, 30, 1000]));
                self.schedule.at(self.now + pause, Event::Restart(engine));
            }
        }
    }

    /// The process dies, or with it all of its machine.
    pub(crate) fn crash(&mut self, engine: usize, host: bool) {
        self.say(&|| {
            format!("engine {engine} dies{}", if host { " with its machine" } else { "" })
        });
        self.crashes += 1;
        let now = self.now;
        // Those that share memory are on one machine.
        let host = host && self.profile.way != Way::Copies;
        self.disturbed |= host;
        if let Some(node) = self.engines[engine].node.take() {
            node.die();
        }
        self.leave_world(engine, host);
        let (generation, incarnation) =
            (self.engines[engine].generation, self.engines[engine].incarnation);
        for conn in 0..self.net.conns.len() {
            for side in 0..2 {
                let end = &self.net.conns[conn].ends[side];
                if (end.engine, end.generation) != (engine, generation) || end.closed {
                    continue;
                }
                if host {
                    self.net.conns[conn].silent = true;
                    self.schedule.at(now + GIVEN_UP, Event::GiveUp(conn));
                    self.net.conns[conn].ends[side].closed = true;
                    self.wire_dies(conn, side);
                    continue;
                }
                self.net.conns[conn].ends[side].closed = true;
                self.wire_dies(conn, side);
                let item = if self.rng.chance(50) { Item::Reset } else { Item::Fin };
                self.net.put(conn, side, now, item);
            }
            self.watch_both(conn);
        }
        for node in self.engines.iter_mut().filter_map(|known| known.node.as_mut()) {
            node.process_has_died(incarnation);
        }
        let limit = self.death_limit();
        for transfer in &mut self.model.transfers {
            if transfer.to_incarnation == incarnation && !transfer.ended {
                let stalls = self.engines[transfer.engine].stalls;
                transfer.limit = transfer.limit.min(limit.saturating_sub(stalls));
            }
        }
        for other in 0..self.engines.len() {
            let generation = self.engines[other].generation;
            let at = now + self.profile.liveness * 3 / 2 + ms(100);
            self.schedule.at(at, Event::MustKnow(other, generation, incarnation));
        }
    }

    /// Nothing of an engine is left that could see how anything ends.
    pub(crate) fn leave_world(&mut self, engine: usize, host: bool) {
        let incarnation = self.engines[engine].incarnation;
        self.engines[engine].alive = false;
        self.engines[engine].host_down = host;
        self.engines[engine].node = None;
        self.engines[engine].in_flight.clear();
        self.engines[engine].loaded.clear();
        self.model.incarnations[engine] = 0;
        self.model.spaces[engine] = Space::default();
        for transfer in &mut self.model.transfers {
            transfer.orphan |= transfer.incarnation == incarnation;
        }
        let others: Vec<u128> = self.engines.iter().map(|other| other.incarnation).collect();
        for other in others {
            self.model.may_drop(incarnation, other);
        }
    }

    /// Another incarnation takes its place, at the same addresses of network and memory.
    pub(crate) fn restart(&mut self, engine: usize) {
        if self.engines[engine].alive || self.resting {
            return;
        }
        let (number, secret) = (self.incarnation(engine), self.secret());
        let known = &mut self.engines[engine];
        known.generation += 1;
        known.incarnation = number;
        (known.config.incarnation, known.config.secret) = (number, secret);
        known.node = Some(Node::new(known.config.clone(), self.now));
        (known.alive, known.host_down) = (true, false);
        known.reset_timer();
        self.model.incarnations[engine] = number;
        self.say(&|| format!("engine {engine} starts again as {number:x}"));
        for _ in 0..self.profile.regions {
            self.register(engine);
        }
        let count = self.engines.len();
        let percent = if count > 6 { 400 / count as u64 } else { 70 };
        for other in 0..count {
            let pause = Duration::from_micros(self.rng.below(20_000));
            if self.rng.chance(percent) {
                self.schedule.at(self.now + pause, Event::Load(engine, other));
            }
            if self.rng.chance(percent) {
                self.schedule.at(self.now + pause, Event::Load(other, engine));
            }
        }
    }

    /// An engine that says goodbye, and is gone.
    pub(crate) fn shut_down(&mut self, engine: usize) {
        if self.engines.len() < 3 && !self.rng.chance(30) {
            return;
        }
        self.say(&|| format!("engine {engine} shuts down"));
        let incarnation = self.engines[engine].incarnation;
        let others: Vec<u128> = self.engines.iter().map(|other| other.incarnation).collect();
        for other in others {
            self.model.may_drop(incarnation, other);
        }
        self.with_node(engine, |node, _| node.shut_down());
        // At once, or after the time that it has for goodbyes.
        if self.rng.chance(50) {
            let until = self.now + self.profile.linger + ms(50);
            self.schedule.at(until, Event::Gone(engine, self.engines[engine].generation));
        } else {
            self.gone(engine);
        }
    }

    /// The last moment of an engine that has shut down: all that was posted has ended.
    pub(crate) fn gone(&mut self, engine: usize) {
        if !self.engines[engine].alive {
            return;
        }
        self.with_node(engine, |node, ports| node.abort(ports));
        for number in self.engines[engine].in_flight.clone() {
            let text =
                format!("engine {engine} has shut down, and transfer {number} has not ended");
            self.model.fail(crate::promise::Promise::EndsInTime, text);
        }
        self.leave_world(engine, false);
        if self.rng.chance(50) {
            let pause = ms(self.rng.pick(&[1, 30]));
            self.schedule.at(self.now + pause, Event::Restart(engine));
        }
    }

    /// Somebody connects and says nothing.
    fn flood(&mut self) {
        let target = self.rng.index(self.engines.len());
        self.say(&|| format!("strangers connect to engine {target}"));
        for _ in 0..6 {
            if !self.engines[target].alive || self.engines[target].stalled_until > self.now {
                return;
            }
            let conn = self.net.dial(usize::MAX, 0, 0, address(target));
            let generation = self.engines[target].generation;
            if let Some(link) = self.with_node(target, |node, ports| node.accept(ports)) {
                self.net.accepted(conn, target, generation, link);
                let bytes = (0..self.rng.index(90)).map(|_| self.rng.next() as u8).collect();
                if self.rng.chance(60) {
                    self.net.put(conn, 0, self.now, Item::Bytes(bytes));
                    self.watch_both(conn);
                }
            }
        }
    }
}
