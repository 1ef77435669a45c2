//! Virtual time: what can happen next, and the choice of what does.

use std::time::{Duration, Instant};

use super::net::Handshake;
use super::world::{Connector, World, ms};
use crate::session::core::{Core, Event};
use crate::sync::SlotState;
use crate::wire::hello::LinkKind;

/// What can happen next.
#[derive(Clone, Copy)]
enum Action {
    Hello(usize),
    Answer(usize),
    Flush(usize, usize),
    Deliver(usize, usize),
    Fin(usize, usize),
    Events(usize),
    Timeout(usize),
    Retry(usize),
}

impl World {
    fn handle_events(&mut self, node: usize) {
        while let Some(event) = self.nodes[node].core.poll_event() {
            match event {
                Event::Connect { kind: LinkKind::Session, .. } => {
                    self.abort_connect(node);
                    let deadline = self.now + ms(3000);
                    let wire = self.wires.len();
                    self.nodes[node].connector = Some(Connector { deadline, retry: None, wire });
                    self.attempt(node, LinkKind::Session);
                }
                Event::Connect { kind: LinkKind::Bulk, .. } => self.attempt(node, LinkKind::Bulk),
                Event::AbortConnect => self.abort_connect(node),
                Event::Close { link, reason, after_flush } => {
                    let (wire, side) = ((link >> 1) as usize - 1, (link & 1) as usize);
                    if after_flush {
                        for _ in 0..50 {
                            self.flush(wire, side);
                        }
                    }
                    self.close_end(wire, side, &reason);
                }
                Event::StopWired { .. } => panic!("no transfer of this world goes by RDMA"),
                Event::Left => self.nodes[node].left += 1,
                Event::Forget => {}
            }
        }
    }

    fn abort_connect(&mut self, node: usize) {
        if let Some(connector) = self.nodes[node].connector.take()
            && !self.wires[connector.wire].ends[0].open
        {
            self.close_end(connector.wire, 0, "aborted");
        }
    }

    fn runs(&self, node: usize) -> bool {
        self.nodes[node].alive && self.nodes[node].stopped.is_none_or(|until| until <= self.now)
    }

    fn wire_actions(&self, index: usize, out: &mut Vec<(Instant, Action)>) {
        let wire = &self.wires[index];
        if wire.ends.iter().all(|end| end.closed) {
            return;
        }
        match &wire.handshake {
            Handshake::Hello { at, .. } if !wire.silent => out.push((*at, Action::Hello(index))),
            Handshake::Answer { at, .. } if !wire.silent => {
                out.push((*at, Action::Answer(index)));
            }
            _ => {}
        }
        if !matches!(wire.handshake, Handshake::Over) && !wire.ends[0].closed {
            // Given up by the connect timeout.
            out.push((wire.began + ms(3000), Action::Fin(index, 1)));
        }
        for side in 0..2 {
            let (end, other) = (&wire.ends[side], &wire.ends[1 - side]);
            if end.open && end.dirty && end.in_pipe() < self.net.capacity && self.runs(end.node) {
                out.push((self.now, Action::Flush(index, side)));
            }
            if other.closed || !self.runs(other.node) || wire.silent {
                continue;
            }
            match (end.pipe.front(), end.fin) {
                (Some((at, _)), _) if other.open => out.push((*at, Action::Deliver(index, side))),
                (None, Some(at)) if !matches!(wire.handshake, Handshake::Hello { .. }) => {
                    out.push((at, Action::Fin(index, side)));
                }
                _ => {}
            }
        }
    }

    fn actions(&self) -> Vec<(Instant, Action)> {
        let mut out = Vec::new();
        for wire in 0..self.wires.len() {
            self.wire_actions(wire, &mut out);
        }
        for node in 0..2 {
            if !self.nodes[node].alive {
                continue;
            }
            let earliest = self.nodes[node].stopped.unwrap_or(self.now).max(self.now);
            let core = &self.nodes[node].core;
            if !core.events.is_empty() {
                out.push((earliest, Action::Events(node)));
            }
            if let Some(at) = core.next_timeout() {
                out.push((at.max(earliest), Action::Timeout(node)));
            }
            if let Some(at) = self.nodes[node].connector.as_ref().and_then(|c| c.retry) {
                out.push((at.max(earliest), Action::Retry(node)));
            }
        }
        out
    }

    /// One thing happens; false: nothing will before `until`.
    fn step(&mut self, until: Instant) -> bool {
        let all = self.actions();
        let ready: Vec<Action> =
            all.iter().filter(|(at, _)| *at <= self.now).map(|(_, action)| *action).collect();
        if ready.is_empty() {
            let stopped = self.nodes.iter().filter_map(|node| node.stopped);
            let next = all.iter().map(|(at, _)| *at).chain(stopped.filter(|at| *at > self.now));
            match next.min() {
                Some(at) if at <= until => self.now = at,
                _ => {
                    self.now = until;
                    return false;
                }
            }
            return true;
        }
        let action = ready[self.rng.below(ready.len() as u64) as usize];
        self.act(action);
        true
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Hello(wire) => self.hello_arrives(wire),
            Action::Answer(wire) => self.answer_arrives(wire),
            Action::Flush(wire, side) => {
                self.handle_events(self.wires[wire].ends[side].node);
                if self.wires[wire].ends[side].open {
                    self.flush(wire, side);
                }
            }
            Action::Deliver(wire, side) => self.deliver(wire, side),
            Action::Fin(wire, side) => {
                let other = &self.wires[wire].ends[1 - side];
                if other.open {
                    self.close_end(wire, 1 - side, "the peer closed the connection");
                } else if side == 1 && !other.closed {
                    self.attempt_failed(wire, "it closed the connection", None);
                } else {
                    self.close_end(wire, 1 - side, "closed");
                }
            }
            Action::Events(node) => self.handle_events(node),
            Action::Timeout(node) => self.call(node, Core::on_timeout),
            Action::Retry(node) => {
                let wire = self.wires.len();
                let now = self.now;
                if let Some(connector) = &mut self.nodes[node].connector {
                    if now >= connector.deadline {
                        let wire = connector.wire;
                        connector.retry = None;
                        return self.attempt_failed(wire, "given up", None);
                    }
                    (connector.retry, connector.wire) = (None, wire);
                    self.attempt(node, LinkKind::Session);
                }
            }
        }
    }

    /// Runs for a while.
    pub(super) fn run(&mut self, duration: Duration) {
        let until = self.now + duration;
        let mut steps = 0;
        while self.now < until && self.step(until) {
            steps += 1;
            assert!(steps < 3_000_000, "no end at {:?}", self.elapsed());
        }
    }

    /// Runs until `done` says so; panics after 100 simulated seconds.
    pub(super) fn run_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let until = self.now + Duration::from_secs(100);
        while !done(self) {
            assert!(self.step(until) && self.now < until, "never: {what}");
        }
    }

    pub(super) fn run_to_end(&mut self, transfer: usize) {
        self.run_until("a transfer ends", |w| w.state(transfer) != SlotState::Posted);
    }
}
