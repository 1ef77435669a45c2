//! Engines, their network, the clock, and what happens next.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use corelane::sim::{Config, Node, Peer, TicketHandle, Trust};
use corelane::{Limits, RegionDescriptor};

use crate::memory::{CellRef, Space};
use crate::model::Model;
use crate::net::{Item, Net};
use crate::ports::{Event, Ports, Schedule, Trace, watch};
use crate::profile::Profile;
use crate::promise::Promise;
use crate::rng::Rng;

pub(crate) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A peer that an engine has loaded.
#[derive(Clone)]
pub(crate) struct Known {
    pub(crate) peer: Peer,
    pub(crate) incarnation: u128,
    pub(crate) connecting: bool,
    /// Which loading it is.
    pub(crate) loading: u64,
}

pub(crate) struct Engine {
    pub(crate) node: Option<Node>,
    pub(crate) incarnation: u128,
    pub(crate) generation: u32,
    pub(crate) honest: bool,
    pub(crate) alive: bool,
    /// Its machine answers nothing, not even that nobody listens.
    pub(crate) host_down: bool,
    pub(crate) stalled_until: Duration,
    pub(crate) stalls: Duration,
    timer: Option<Duration>,
    /// A step of its copies is scheduled.
    copying: bool,
    pub(crate) loaded: BTreeMap<usize, Known>,
    /// Transfers that it has posted and that have not been seen to end.
    pub(crate) in_flight: Vec<usize>,
    pub(crate) peak: usize,
    pub(crate) config: Config,
}

impl Engine {
    /// It has been made anew: nothing is set.
    pub(crate) fn reset_timer(&mut self) {
        self.timer = None;
        self.copying = false;
        self.peak = 0;
    }
}

/// A slow call that waits for its answer.
pub(crate) struct Pending {
    pub(crate) engine: usize,
    pub(crate) generation: u32,
    pub(crate) what: Call,
    pub(crate) ticket: TicketHandle,
    pub(crate) limit: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    Connect(usize),
    Leave,
    Deregister(CellRef),
}

/// One run.
pub(crate) struct World {
    pub(crate) profile: Profile,
    pub(crate) now: Duration,
    pub(crate) rng: Rng,
    pub(crate) net: Net,
    pub(crate) engines: Vec<Engine>,
    pub(crate) model: Model,
    pub(crate) schedule: Schedule,
    pub(crate) trace: Trace,
    pub(crate) pending: Vec<Pending>,
    pub(crate) descriptors: BTreeMap<u128, Vec<RegionDescriptor>>,
    pub(crate) actions_left: usize,
    pub(crate) faults_left: usize,
    pub(crate) resting: bool,
    /// A pause, a partition, a slow reader: silence may look like death.
    pub(crate) disturbed: bool,
    pub(crate) steps: u64,
    pub(crate) serial: u64,
    pub(crate) crashes: u64,
    pub(crate) notes_seen: u64,
    pub(crate) ticks: u64,
    pub(crate) rest_since: Duration,
    /// Since when nothing is left to do.
    pub(crate) quiet_since: Option<Duration>,
    /// Those that know each other have sessions.
    pub(crate) connected: bool,
    pub(crate) over: bool,
}

pub(crate) fn address(engine: usize) -> SocketAddr {
    (Ipv4Addr::new(10, (engine >> 16) as u8, (engine >> 8) as u8, engine as u8), 7000).into()
}

/// The engine that listens there.
fn engine_at(port: SocketAddr) -> Option<usize> {
    let SocketAddr::V4(port) = port else { return None };
    let [_, a, b, c] = port.ip().octets();
    Some(usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c))
}

/// Where nobody ever listens.
fn nowhere(engine: usize) -> SocketAddr {
    (Ipv4Addr::new(10, 255, (engine >> 8) as u8, engine as u8), 7000).into()
}

impl World {
    pub(crate) fn new(seed: u64, engines: Option<usize>, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let profile = Profile::draw(&mut rng, engines);
        let net = Net::new(profile.manner.clone(), Rng::new(rng.next()));
        let mut world = Self {
            now: Duration::from_secs(3600),
            net,
            engines: Vec::new(),
            model: Model::default(),
            schedule: Schedule::default(),
            trace: Trace { on: trace, lines: 0 },
            pending: Vec::new(),
            descriptors: BTreeMap::new(),
            actions_left: profile.actions,
            faults_left: profile.faults,
            resting: false,
            disturbed: false,
            steps: 0,
            serial: 0,
            crashes: 0,
            notes_seen: 0,
            ticks: 0,
            rest_since: Duration::ZERO,
            quiet_since: None,
            connected: false,
            over: false,
            profile,
            rng,
        };
        world.populate();
        world
    }

    fn populate(&mut self) {
        let count = self.profile.engines;
        for index in 0..count {
            let honest = index + 1 < count || !self.profile.impostor;
            let (incarnation, secret) = (self.incarnation(index), self.secret());
            let config = self.config(index, incarnation, secret, honest);
            let node = Node::new(config.clone(), self.now);
            self.engines.push(Engine {
                node: Some(node),
                incarnation,
                generation: 1,
                honest,
                alive: true,
                host_down: false,
                stalled_until: Duration::ZERO,
                stalls: Duration::ZERO,
                timer: None,
                copying: false,
                loaded: BTreeMap::new(),
                in_flight: Vec::new(),
                peak: 0,
                config,
            });
            self.model.spaces.push(Space::default());
            self.model.incarnations.push(incarnation);
        }
        for engine in 0..count {
            for _ in 0..self.profile.regions {
                self.register(engine);
            }
            let friends = self.profile.friends.min(count);
            for _ in 0..friends {
                let other = self.rng.index(count);
                if other != engine || self.rng.chance(20) {
                    self.load(engine, other);
                }
            }
        }
        let at = self.now + ms(1);
        self.schedule.at(at, Event::Act);
        let first = self.now + Duration::from_micros(self.rng.between(100, 20_000));
        self.schedule.at(first, Event::Fault);
    }

    /// Another incarnation of an engine; its low bits say of which.
    pub(crate) fn incarnation(&mut self, index: usize) -> u128 {
        (u128::from(self.rng.next()) << 32) | (index as u128 + 1)
    }

    pub(crate) fn secret(&mut self) -> [u8; 32] {
        let mut secret = [0; 32];
        for part in secret.chunks_mut(8) {
            part.copy_from_slice(&self.rng.next().to_le_bytes());
        }
        secret
    }

    fn config(
        &mut self,
        index: usize,
        incarnation: u128,
        secret: [u8; 32],
        honest: bool,
    ) -> Config {
        let is_deaf = self.profile.deaf_percent > 0 && self.rng.chance(self.profile.deaf_percent);
        let profile = &self.profile;
        let mut addresses = vec![address(index)];
        if profile.dead_address {
            addresses.insert(0, nowhere(index));
        }
        Config {
            name: format!("e{index}"),
            incarnation,
            secret,
            addresses,
            liveness: profile.liveness,
            operation_timeout: profile.operation_timeout,
            connect_timeout: ms(2000),
            reconnect_timeout: ms(1000),
            stream_idle: profile.stream_idle,
            linger: profile.linger,
            streams: profile.streams,
            chunk_bytes: 1024,
            latency_bytes: 256,
            limits: Limits {
                peers: 4096,
                regions: 32,
                descriptors: 10_000,
                transfers: profile.transfers,
                pending_notifications: profile.pending.0,
                pending_notification_bytes: profile.pending.1,
                unacknowledged_notifications: profile.unacknowledged.0,
                unacknowledged_bytes: profile.unacknowledged.1,
                half_open: profile.half_open,
            },
            way: profile.way,
            is_deaf,
            trust: if honest { Trust::Honest } else { Trust::Impostor },
        }
    }

    pub(crate) fn say(&mut self, text: &dyn Fn() -> String) {
        self.trace.say(self.now, None, text);
    }

    /// Calls an engine, lets it do what follows, and checks what is to be seen of it.
    pub(crate) fn with_node<R>(
        &mut self,
        engine: usize,
        call: impl FnOnce(&mut Node, &mut Ports<'_>) -> R,
    ) -> Option<R> {
        let mut node = self.engines[engine].node.take()?;
        let known = &self.engines[engine];
        let mut ports = Ports {
            engine,
            generation: known.generation,
            now: self.now,
            net: &mut self.net,
            model: &mut self.model,
            schedule: &mut self.schedule,
            rng: &mut self.rng,
            trace: &mut self.trace,
            honest: known.honest,
        };
        node.set_time(self.now);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let answer = call(&mut node, &mut ports);
            node.turn(&mut ports);
            answer
        }));
        let answer = match outcome {
            Ok(answer) => {
                let next = node.next_timeout();
                self.engines[engine].node = Some(node);
                self.set_timer(engine, next);
                self.watch_copies(engine);
                Some(answer)
            }
            Err(panic) => {
                self.engines[engine].node = Some(node);
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&t| t.to_owned()));
                let text = text.unwrap_or_else(|| "panicked".to_owned());
                // What it had done by then may say more than that.
                self.check_engine(engine);
                self.model.fail(Promise::Rules, format!("engine {engine} panicked: {text}"));
                None
            }
        };
        self.check_engine(engine);
        answer
    }

    fn set_timer(&mut self, engine: usize, next: Option<Duration>) {
        let known = &mut self.engines[engine];
        let Some(next) = next else { return };
        if known.timer.is_none_or(|at| next < at) {
            let at = next.max(self.now + Duration::from_micros(1));
            known.timer = Some(at);
            self.schedule.at(at, Event::Timer(engine, known.generation));
        }
    }

    /// Until when an engine does nothing, if it does nothing now.
    pub(crate) fn stalled(&self, engine: usize) -> Option<Duration> {
        let until = self.engines[engine].stalled_until;
        (until > self.now).then_some(until)
    }

    /// Runs until nothing is left to do; false: a promise was broken.
    pub(crate) fn run(&mut self) -> bool {
        while self.model.violation.is_none() {
            let Some((at, event)) = self.schedule.next() else { break };
            self.now = self.now.max(at);
            self.steps += 1;
            self.step(event);
            if self.resting && self.rest_is_over() {
                break;
            }
        }
        self.model.violation.is_none()
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Arrive(conn) => self.arrive(conn),
            Event::OpenFailed(conn, refused) => self.open_failed(conn, refused),
            Event::Opened(conn) => self.opened(conn),
            Event::Inbound(conn, side) => self.inbound(conn, side),
            Event::Writable(conn, side) => self.writable(conn, side),
            Event::Ring(conn, side) => self.ring(conn, side),
            Event::Wire(conn, side) => self.wire(conn, side),
            Event::WireTold(conn, side) => self.wire_told(conn, side),
            Event::WireFailed(conn, side, generation) => self.wire_failed(conn, side, generation),
            Event::Copy(engine, generation) => self.copy(engine, generation),
            Event::Timer(engine, generation) => self.timer(engine, generation),
            Event::GiveUp(conn) => {
                let known = &mut self.net.conns[conn];
                (known.silent, known.half_open) = (false, false);
                self.net.cut(conn, self.now);
                for side in 0..2 {
                    watch(&mut self.net, &mut self.schedule, conn, side);
                }
            }
            Event::Act => self.act(),
            Event::Fault => self.fault(),
            Event::Heal(a, b) => self.heal(a, b),
            Event::Restart(engine) => self.restart(engine),
            Event::Gone(engine, generation) => {
                if self.engines[engine].generation == generation {
                    self.gone(engine);
                }
            }
            Event::MustKnow(engine, generation, incarnation) => {
                self.must_know(engine, generation, incarnation);
            }
            Event::Load(engine, other) => self.load(engine, other),
            Event::Tick => self.tick(),
        }
    }

    /// The engine behind an end, if it is the one that the connection was made with.
    pub(crate) fn owner(&self, conn: usize, side: usize) -> Option<(usize, u64)> {
        let end = &self.net.conns[conn].ends[side];
        let engine = self.engines.get(end.engine)?;
        let same = engine.alive && engine.generation == end.generation && !end.closed;
        same.then_some((end.engine, end.link))
    }

    fn arrive(&mut self, conn: usize) {
        let Some((from, _)) = self.owner(conn, 0) else { return };
        let port = self.net.conns[conn].port;
        let target = engine_at(port).filter(|engine| *engine < self.engines.len());
        let delay = self.net.delay();
        let Some(target) = target else {
            return self.schedule.at(self.now + delay, Event::OpenFailed(conn, true));
        };
        if self.net.is_cut(from, target) || self.engines[target].host_down {
            // It is asked again.
            return self.schedule.at(self.now + ms(150), Event::Arrive(conn));
        }
        if !self.engines[target].alive {
            return self.schedule.at(self.now + delay, Event::OpenFailed(conn, true));
        }
        if let Some(until) = self.stalled(target) {
            return self.schedule.at(until, Event::Arrive(conn));
        }
        let generation = self.engines[target].generation;
        if let Some(link) = self.with_node(target, |node, ports| node.accept(ports)) {
            self.net.accepted(conn, target, generation, link);
            self.schedule.at(self.now + delay, Event::Opened(conn));
        }
    }

    fn open_failed(&mut self, conn: usize, refused: bool) {
        let Some((engine, link)) = self.owner(conn, 0) else { return };
        if let Some(until) = self.stalled(engine) {
            return self.schedule.at(until, Event::OpenFailed(conn, refused));
        }
        self.with_node(engine, |node, ports| node.open_failed(link, refused, ports));
    }

    fn opened(&mut self, conn: usize) {
        let Some((engine, link)) = self.owner(conn, 0) else { return };
        if let Some(until) = self.stalled(engine) {
            return self.schedule.at(until, Event::Opened(conn));
        }
        self.with_node(engine, |node, ports| node.opened(link, ports));
    }

    fn inbound(&mut self, conn: usize, side: usize) {
        self.net.conns[conn].ends[side].scheduled = false;
        let Some((engine, link)) = self.owner(conn, side) else { return };
        let other = self.net.conns[conn].ends[1 - side].engine;
        let later = if let Some(until) = self.stalled(engine) {
            Some(until)
        } else if self.net.is_cut(engine, other) {
            Some(self.now + ms(20))
        } else {
            None
        };
        if let Some(later) = later {
            self.net.conns[conn].ends[side].scheduled = true;
            return self.schedule.at(later, Event::Inbound(conn, side));
        }
        if self.net.conns[conn].silent {
            return;
        }
        let most = self.rng.between(1, self.profile.manner.chunk as u64 + 1) as usize;
        let end = &mut self.net.conns[conn].ends[side];
        let slow = end.slow;
        let Some((at, item)) = end.inbound.pop_front() else { return };
        if at > self.now {
            end.inbound.push_front((at, item));
            return watch(&mut self.net, &mut self.schedule, conn, side);
        }
        match item {
            Item::Bytes(mut bytes) => {
                let most = if slow.is_some() { most.min(200) } else { most };
                if bytes.len() > most {
                    let rest = bytes.split_off(most);
                    end.inbound.push_front((at, Item::Bytes(rest)));
                }
                end.inbound_bytes -= bytes.len();
                self.with_node(engine, |node, ports| node.receive(link, &bytes, ports));
                let wake = self.now + self.net.delay();
                self.schedule.at(wake, Event::Writable(conn, 1 - side));
            }
            Item::Fin => {
                let reason = "the peer closed the connection";
                self.with_node(engine, |node, ports| node.closed(link, reason, ports));
            }
            Item::Reset => {
                self.with_node(engine, |node, ports| node.closed(link, "reset", ports));
            }
        }
        match slow {
            Some(pause) if !self.net.conns[conn].ends[side].inbound.is_empty() => {
                let end = &mut self.net.conns[conn].ends[side];
                end.scheduled = true;
                self.schedule.at(self.now + pause, Event::Inbound(conn, side));
            }
            _ => watch(&mut self.net, &mut self.schedule, conn, side),
        }
    }

    fn writable(&mut self, conn: usize, side: usize) {
        let Some((engine, link)) = self.owner(conn, side) else { return };
        if let Some(until) = self.stalled(engine) {
            return self.schedule.at(until, Event::Writable(conn, side));
        }
        self.with_node(engine, |node, _| node.writable(link));
    }

    fn ring(&mut self, conn: usize, side: usize) {
        let Some((engine, link)) = self.owner(conn, side) else { return };
        if let Some(until) = self.stalled(engine) {
            return self.schedule.at(until, Event::Ring(conn, side));
        }
        let most = 1 + self.rng.index(8);
        self.with_node(engine, |node, ports| node.look_at_ring(link, most, ports));
        if !self.net.conns[conn].ends[side].ring.is_empty() {
            let at = self.now + Duration::from_micros(self.rng.between(1, 100));
            self.schedule.at(at, Event::Ring(conn, side));
        }
    }

    fn copy(&mut self, engine: usize, generation: u32) {
        if self.engines[engine].generation != generation || !self.engines[engine].alive {
            return;
        }
        if let Some(until) = self.stalled(engine) {
            return self.schedule.at(until, Event::Copy(engine, generation));
        }
        self.engines[engine].copying = false;
        self.with_node(engine, |node, ports| node.copy_some(ports));
        // Somebody may wait for its end.
        self.look_at_pending();
    }

    /// Lets the threads of an engine that copy go on.
    fn watch_copies(&mut self, engine: usize) {
        let known = &mut self.engines[engine];
        let waits = known.node.as_ref().is_some_and(|node| node.copies() > 0);
        if waits && !std::mem::replace(&mut known.copying, true) {
            let generation = known.generation;
            let at = self.now + Duration::from_micros(self.rng.between(1, 200));
            self.schedule.at(at, Event::Copy(engine, generation));
        }
    }

    fn timer(&mut self, engine: usize, generation: u32) {
        if self.engines[engine].generation != generation || !self.engines[engine].alive {
            return;
        }
        if let Some(until) = self.stalled(engine) {
            self.engines[engine].timer = Some(until);
            return self.schedule.at(until, Event::Timer(engine, generation));
        }
        self.engines[engine].timer = None;
        self.with_node(engine, |node, ports| node.on_time(ports));
    }
}
