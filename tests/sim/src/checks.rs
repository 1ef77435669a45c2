//! What is checked after every step of an engine.

use corelane::sim::{Config, Levels, Peer};

use crate::ports::Event;
use crate::promise::Promise;
use crate::world::{World, ms};

impl World {
    /// What there is to be seen of an engine after a step of its.
    pub(crate) fn check_engine(&mut self, engine: usize) {
        if corelane::sim::take_double_ends() > 0 {
            self.model.fail(Promise::EndsOnce, format!("engine {engine}: a posting ended twice"));
        }
        let now = self.now;
        let mut index = 0;
        while let Some(&number) = self.engines[engine].in_flight.get(index) {
            let transfer = &self.model.transfers[number];
            if !transfer.is_in_flight() {
                self.engines[engine].in_flight.swap_remove(index);
                self.model.ended(number, now);
                self.trace.say(now, Some(engine), &|| {
                    format!(
                        "transfer {number} has ended: {:?}",
                        self.model.transfers[number].handle.state()
                    )
                });
                continue;
            }
            if transfer.cancelled.is_some_and(|at| at + ms(1000) < now) && !self.disturbed {
                let text = format!("engine {engine}: {number} was cancelled a second ago");
                return self.model.fail(Promise::EndsInTime, text);
            }
            if transfer.limit + self.engines[engine].stalls < now {
                let (operation, to) = (transfer.operation, transfer.to);
                let text = format!(
                    "engine {engine}: {operation:?} {number} to engine {to}, posted at {:?}, has not ended by {now:?}",
                    transfer.posted
                );
                self.model.fail(Promise::EndsInTime, text);
            }
            index += 1;
        }
        if self.profile.eager && self.engines[engine].node.is_some() {
            self.take_at_once(engine);
        }
        let known = &self.engines[engine];
        let Some(node) = &known.node else { return };
        let bounds = Bounds { peak: known.peak, config: &known.config };
        for (peer, levels) in node.levels() {
            if let Some(over) = bounds.over(&levels) {
                let text = format!("engine {engine}, peer {peer:x}: {over}: {levels:?}");
                self.model.fail(Promise::Bounded, text);
            }
        }
        let (count, bytes) = node.pending();
        let limits = &known.config.limits;
        let over =
            bytes > limits.pending_notification_bytes || count > limits.pending_notifications;
        if over && count > 1 {
            let text = format!("engine {engine}: {count} notifications of {bytes} bytes wait");
            self.model.fail(Promise::Bounded, text);
        }
        if node.half_open() > limits.half_open {
            let text = format!("engine {engine}: {} links without a handshake", node.half_open());
            self.model.fail(Promise::Bounded, text);
        }
        if !self.disturbed && node.liveness_timeouts() > 0 && known.honest {
            let text = format!("engine {engine} has given up a peer that was there");
            self.model.fail(Promise::Alive, text);
        }
        if !known.honest {
            return;
        }
        for known in known.loaded.values() {
            let other = self.model.engine_of(known.incarnation);
            let other = other.filter(|other| !self.engines[*other].honest);
            if let Some(other) = other.filter(|_| known.peer.is_connected()) {
                let text = format!("engine {engine} has a session with the impostor {other}");
                self.model.fail(Promise::Trusted, text);
            }
        }
        // The last one is, if any.
        let strangers = self.engines.last().into_iter().filter(|other| !other.honest);
        let node = self.engines[engine].node.as_ref();
        let known = strangers.filter_map(|other| node?.peer(other.incarnation));
        let let_in = known.filter(Peer::is_connected).count();
        if let_in > 0 {
            self.model.fail(Promise::Trusted, format!("engine {engine} has let in an impostor"));
        }
    }

    pub(crate) fn must_know(&mut self, engine: usize, generation: u32, incarnation: u128) {
        let known = &self.engines[engine];
        if known.generation != generation || !known.alive {
            return;
        }
        if known.stalled_until + self.profile.liveness * 2 > self.now {
            let at = known.stalled_until + self.profile.liveness * 2 + ms(100);
            return self.schedule.at(at, Event::MustKnow(engine, generation, incarnation));
        }
        let peer = known.node.as_ref().and_then(|node| node.peer(incarnation));
        if peer.is_some_and(|peer| peer.is_connected()) {
            let text = format!("engine {engine} still takes {incarnation:x} for connected");
            self.model.fail(Promise::Dead, text);
        }
    }
}

/// What the levels of an engine must keep to.
struct Bounds<'c> {
    peak: usize,
    config: &'c Config,
}

impl Bounds<'_> {
    /// What is over its bound.
    fn over(&self, levels: &Levels) -> Option<&'static str> {
        const WINDOW_BYTES: usize = 1 << 20;
        const WINDOW_COUNT: usize = 4096;
        const OUTSTANDING: usize = 128;
        let limits = &self.config.limits;
        let alone = levels.on_wire <= 1;
        [
            ("deadlines", levels.deadlines > 66 + 2 * self.peak),
            ("transfers", levels.active > limits.transfers),
            ("answers owed", levels.replies > OUTSTANDING),
            ("requests on a stream", levels.bulk_outstanding > 16),
            ("requests on the session's link", levels.session_outstanding > OUTSTANDING),
            ("requests", levels.requests > OUTSTANDING + 16 * 2 * levels.links.max(1) + 128),
            ("frames that go first", levels.control > 4 * OUTSTANDING),
            ("notifications kept", levels.outbox > limits.unacknowledged_notifications),
            ("notifications on the wire", levels.on_wire > WINDOW_COUNT),
            ("bytes on the wire", levels.on_wire_bytes > WINDOW_BYTES && !alone),
            ("notifications that wait", levels.ready > 2 * WINDOW_COUNT),
            ("transfers that are counted", levels.counted > 4 * self.config.limits.transfers),
            ("abandoned transfers", levels.abandoned > 4096),
            ("links", levels.links > 2 * (1 + 2 * self.config.streams)),
        ]
        .into_iter()
        .find_map(|(what, over)| over.then_some(what))
    }
}
