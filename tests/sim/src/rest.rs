//! The end of a run: faults are over, everything comes to an end, and nothing is left over.

use std::time::Duration;

use corelane::sim::Levels;

use crate::model::NoteKind;
use crate::ports::Event;
use crate::promise::Promise;
use crate::world::{Call, World, ms};

/// By when everything must have ended: what waits longest are operation timeouts of 30 s, and the kernel's own.
const REST: Duration = Duration::from_secs(60);

impl World {
    /// Applications and faults have had their time.
    pub(crate) fn rest(&mut self) {
        self.say(&|| "the rest begins".to_owned());
        self.resting = true;
        self.rest_since = self.now;
        self.net.partitions.clear();
        for conn in &mut self.net.conns {
            for end in &mut conn.ends {
                end.slow = None;
            }
        }
        for engine in &mut self.engines {
            if engine.stalled_until > self.now {
                engine.stalled_until = self.now;
            }
        }
        self.look_at_wires();
        self.schedule.at(self.now + ms(20), Event::Tick);
    }

    pub(crate) fn tick(&mut self) {
        self.ticks += 1;
        self.look_at_pending();
        for engine in 0..self.engines.len() {
            for _ in 0..1000 {
                self.take(engine, usize::MAX);
                if self.engines[engine].node.as_ref().is_none_or(|node| node.pending().0 == 0) {
                    break;
                }
            }
            self.check_engine(engine);
        }
        self.meet();
        if self.model.violation.is_some() || self.over {
            return;
        }
        let left = self.what_is_left();
        let waits = matches!(left, Some((Promise::NothingLeft, _)));
        if left.is_some() || !self.connected {
            self.quiet_since = None;
        }
        let since = *self.quiet_since.get_or_insert(self.now);
        // A while of silence, in which connections stay up by pings.
        let enough = if self.disturbed { ms(40) } else { self.profile.liveness * 3 };
        if self.now - since >= enough {
            return self.finish();
        }
        if self.now > self.rest_since + REST {
            let (promise, text) = match left {
                Some(left) if self.connected => left,
                _ => (Promise::Meet, "engines that know each other have no session".to_owned()),
            };
            return self.model.fail(promise, format!("at rest: {text}"));
        }
        // Where something waits for the application, it looks more often.
        let pause = match self.ticks {
            0..20 => ms(10),
            20..400 if waits => ms(100),
            _ => ms(100).max(self.profile.liveness / 2),
        };
        self.schedule.at(self.now + pause, Event::Tick);
    }

    /// Pairs of which the first has loaded the second, as it is now.
    fn pairs(&self) -> Vec<(usize, usize)> {
        let all = self.engines.iter().enumerate();
        all.flat_map(|(index, engine)| engine.loaded.keys().map(move |other| (index, *other)))
            .filter(|(engine, other)| self.knows(*engine, *other))
            .collect()
    }

    /// Whether the first has loaded the second, as it is now, and is let in there.
    fn knows(&self, index: usize, other: usize) -> bool {
        let (engine, target) = (&self.engines[index], &self.engines[other]);
        let Some(known) = engine.loaded.get(&other) else { return false };
        let live = engine.alive && target.alive && engine.honest && target.honest;
        // Where a name is loaded, only that incarnation may use it.
        let there = target.loaded.get(&index);
        let welcome = there.is_none_or(|known| known.incarnation == engine.incarnation);
        live && welcome && known.incarnation == target.incarnation
    }

    /// Lets those that know each other connect once more.
    fn meet(&mut self) {
        self.connected = true;
        for (engine, other) in self.pairs() {
            let known = &self.engines[engine].loaded[&other];
            if known.peer.is_connected() && self.is_up(engine, other) && self.is_up(other, engine) {
                continue;
            }
            self.connected = false;
            if !known.connecting && !known.peer.is_connected() {
                self.connect(engine, other);
            }
        }
    }

    fn is_up(&self, engine: usize, other: usize) -> bool {
        let incarnation = self.engines[other].incarnation;
        let node = self.engines[engine].node.as_ref();
        node.is_some_and(|node| {
            node.levels().any(|(peer, levels)| peer == incarnation && levels.is_up)
        })
    }

    /// Something that has not ended yet.
    fn what_is_left(&self) -> Option<(Promise, String)> {
        for (index, engine) in self.engines.iter().enumerate() {
            if !engine.alive || !engine.honest {
                continue;
            }
            if let Some(number) = engine.in_flight.first() {
                let text = format!("engine {index}: transfer {number} has not ended");
                return Some((Promise::EndsInTime, text));
            }
            let Some(node) = &engine.node else { continue };
            if node.pending().0 > 0 {
                return Some((Promise::NothingLost, format!("engine {index}: notifications wait")));
            }
            for (peer, levels) in node.levels() {
                if levels.is_up && self.model.engine_of(peer).is_none() {
                    let text = format!("engine {index} still has a session with {peer:x}");
                    return Some((Promise::Dead, text));
                }
                let reachable = self.is_reachable(index, peer);
                if let Some(what) = left_over(&levels, reachable) {
                    let text = format!("engine {index}, peer {peer:x}: {what}: {levels:?}");
                    return Some((Promise::NothingLeft, text));
                }
                let budget = node.peer(peer).map_or((0, 0), |peer| peer.unacknowledged());
                if reachable && budget != (0, 0) {
                    let text = format!("engine {index}, peer {peer:x}: budget {budget:?} is taken");
                    return Some((Promise::NothingLeft, text));
                }
                let in_flight = node.peer(peer).map_or(0, |peer| peer.in_flight());
                if in_flight > 0 {
                    let text = format!("engine {index}: {in_flight} places are taken");
                    return Some((Promise::NothingLeft, text));
                }
            }
            let mut regions = self.model.spaces[index].regions.values();
            if let Some(region) = regions.find(|region| node.is_used(&region.handle)) {
                let text = format!("engine {index}: region {:#x} is in use", region.base);
                return Some((Promise::NothingLeft, text));
            }
            if node.half_open() > 0 {
                return Some((Promise::NothingLeft, format!("engine {index}: half-open links")));
            }
        }
        // Those that connect are asked again and again.
        let mut pending = self.pending.iter();
        if let Some(pending) = pending.find(|call| !matches!(call.what, Call::Connect(_))) {
            let text = format!("engine {}: {:?} waits", pending.engine, pending.what);
            return Some((Promise::EndsInTime, text));
        }
        None
    }

    /// Whether an engine and the one with that incarnation can have a session.
    fn is_reachable(&self, engine: usize, incarnation: u128) -> bool {
        let Some(other) = self.model.engine_of(incarnation) else { return false };
        self.knows(engine, other) || self.knows(other, engine)
    }

    /// Everything has come to rest: what was promised about the whole of it.
    fn finish(&mut self) {
        self.check_lost();
        for (engine, other) in self.pairs() {
            let sessions = self.sessions_between(engine, other);
            if sessions != 1 && engine != other {
                let text = format!("engines {engine} and {other} have {sessions} sessions");
                self.model.fail(Promise::Meet, text);
            }
        }
        for number in 0..self.model.transfers.len() {
            let (begun, ended) = self.model.transfers[number].handle.begun_and_ended();
            if begun != ended && !self.model.transfers[number].orphan {
                let text = format!("transfer {number} was posted {begun} times and ended {ended}");
                self.model.fail(Promise::EndsOnce, text);
            }
        }
        self.over = true;
    }

    fn sessions_between(&self, engine: usize, other: usize) -> usize {
        let incarnation = self.engines[other].incarnation;
        let Some(node) = &self.engines[engine].node else { return 0 };
        node.levels().filter(|(peer, levels)| *peer == incarnation && levels.is_up).count()
    }

    fn check_lost(&mut self) {
        let mut lost: Vec<u64> = vec![0; self.engines.len()];
        for id in 0..self.model.notes.len() {
            let note = &self.model.notes[id];
            let sender = &self.engines[note.from];
            let alive = sender.alive && sender.incarnation == note.from_incarnation;
            let heard = self.model.incarnations[note.to] == note.to_incarnation
                && self.engines[note.to].honest;
            let must = match note.kind {
                NoteKind::Free => true,
                NoteKind::Bound(number) => {
                    let transfer = &self.model.transfers[number];
                    transfer.note == Some(id) && transfer.done
                }
            };
            // Those to a peer that does not let it in wait for better times.
            let reachable = alive && self.is_reachable(note.from, note.to_incarnation);
            if note.seen || !must || !reachable || !heard {
                continue;
            }
            let (from, to) = (note.from, note.to);
            let pair = *self.model.pair(note.from_incarnation, note.to_incarnation);
            if !pair.may_drop {
                let note = &self.model.notes[id];
                let text = format!(
                    "notification {id} ({:?}) of engine {from} to engine {to} was never seen",
                    note.kind
                );
                return self.model.fail(Promise::NothingLost, text);
            }
            lost[from] += u64::from(!pair.forgot);
        }
        for (engine, lost) in lost.into_iter().enumerate() {
            let dropped = self.engines[engine].node.as_ref().map_or(0, |node| node.dropped());
            if lost > dropped {
                let text = format!(
                    "engine {engine}: {lost} notifications were never seen, {dropped} count as dropped"
                );
                self.model.fail(Promise::NothingLost, text);
            }
        }
    }

    pub(crate) fn rest_is_over(&self) -> bool {
        self.over
    }
}

/// What of a peer's state should be gone at rest.
fn left_over(levels: &Levels, reachable: bool) -> Option<&'static str> {
    [
        ("transfers", levels.active > 0),
        (
            "transfers that wait",
            levels.queued > 0 && levels.active == 0 && levels.is_up && levels.session == 0,
        ),
        ("requests", levels.requests > 0),
        ("answers owed", levels.replies > 0),
        ("counted transfers", levels.counted > 0),
        ("bytes held for data", levels.held_bytes > 0),
        ("notifications that wait", levels.ready > 0),
        ("notifications kept", levels.outbox > 0 && reachable),
    ]
    .into_iter()
    .find_map(|(what, left)| left.then_some(what))
}
