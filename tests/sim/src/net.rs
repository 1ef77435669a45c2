//! The network: streams of bytes between engines, in order within a stream, in any order between them, and all that can happen
//! to them.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::rng::Rng;
use crate::wire::WireEnd;

/// What travels in one direction of a connection.
#[derive(Debug)]
pub(crate) enum Item {
    Bytes(Vec<u8>),
    /// The other end has closed, and nothing follows.
    Fin,
    /// What was under way is lost.
    Reset,
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) engine: usize,
    /// Of the engine: a restart makes another.
    pub(crate) generation: u32,
    /// As the engine calls it; 0: not accepted yet.
    pub(crate) link: u64,
    pub(crate) closed: bool,
    /// What is on its way to this end.
    pub(crate) inbound: VecDeque<(Duration, Item)>,
    pub(crate) inbound_bytes: usize,
    /// An event to look at `inbound` is under way.
    pub(crate) scheduled: bool,
    last: Duration,
    /// Messages in the ring that this end reads.
    pub(crate) ring: VecDeque<Vec<u8>>,
    /// It reads a little at a time, with this pause between.
    pub(crate) slow: Option<Duration>,
    /// What the other end has handed over to be mapped.
    pub(crate) shared: Option<corelane::sim::Shared>,
    /// Its queue pairs.
    pub(crate) wire: WireEnd,
}

impl End {
    fn new(engine: usize, generation: u32, link: u64) -> Self {
        Self {
            engine,
            generation,
            link,
            closed: false,
            inbound: VecDeque::new(),
            inbound_bytes: 0,
            scheduled: false,
            last: Duration::ZERO,
            ring: VecDeque::new(),
            slow: None,
            shared: None,
            wire: WireEnd::default(),
        }
    }
}

/// A connection; end 0 has opened it.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) ends: [End; 2],
    pub(crate) port: std::net::SocketAddr,
    /// Nothing gets through any more, and nobody is told.
    pub(crate) silent: bool,
    /// One end has lost it: the next thing that it is told is the last that gets through.
    pub(crate) half_open: bool,
}

/// How the network of a world behaves.
#[derive(Debug, Clone)]
pub(crate) struct Manner {
    pub(crate) delay_us: (u64, u64),
    /// Bytes under way in one direction of a connection.
    pub(crate) capacity: usize,
    /// Bytes that one call moves at most.
    pub(crate) chunk: usize,
}

pub(crate) struct Net {
    pub(crate) manner: Manner,
    pub(crate) conns: Vec<Conn>,
    /// Pairs of engines that cannot reach each other now.
    pub(crate) partitions: Vec<(usize, usize)>,
    pub(crate) rng: Rng,
    /// The rail of the next queue pair that sends something of a WRITE fails.
    pub(crate) rail_fails: bool,
    /// The connection and side that an engine calls so.
    names: HashMap<(usize, u32, u64), (usize, usize)>,
}

/// Messages of a ring.
pub(crate) const RING_SLOTS: usize = 64;

impl Net {
    pub(crate) fn new(manner: Manner, rng: Rng) -> Self {
        Self {
            manner,
            conns: Vec::new(),
            partitions: Vec::new(),
            rng,
            rail_fails: false,
            names: HashMap::new(),
        }
    }

    pub(crate) fn delay(&mut self) -> Duration {
        let (from, to) = self.manner.delay_us;
        Duration::from_micros(self.rng.between(from, to))
    }

    pub(crate) fn dial(
        &mut self,
        engine: usize,
        generation: u32,
        link: u64,
        port: std::net::SocketAddr,
    ) -> usize {
        let ends = [End::new(engine, generation, link), End::new(usize::MAX, 0, 0)];
        self.conns.push(Conn { ends, port, silent: false, half_open: false });
        let conn = self.conns.len() - 1;
        self.names.insert((engine, generation, link), (conn, 0));
        conn
    }

    pub(crate) fn is_cut(&self, a: usize, b: usize) -> bool {
        self.partitions.iter().any(|&(x, y)| (x, y) == (a, b) || (x, y) == (b, a))
    }

    /// The target has accepted it as `link`.
    pub(crate) fn accepted(&mut self, conn: usize, engine: usize, generation: u32, link: u64) {
        let end = &mut self.conns[conn].ends[1];
        (end.engine, end.generation, end.link) = (engine, generation, link);
        self.names.insert((engine, generation, link), (conn, 1));
    }

    /// The connection and side that an engine calls `link`.
    pub(crate) fn find(&self, engine: usize, generation: u32, link: u64) -> Option<(usize, usize)> {
        self.names.get(&(engine, generation, link)).copied()
    }

    /// Puts something on the way from `side`.
    pub(crate) fn put(&mut self, conn: usize, side: usize, now: Duration, item: Item) {
        if self.conns[conn].silent || self.conns[conn].half_open {
            return;
        }
        let delay = self.delay();
        let to = &mut self.conns[conn].ends[1 - side];
        if to.closed {
            return;
        }
        let at = (now + delay).max(to.last);
        to.last = at;
        if let Item::Bytes(bytes) = &item {
            to.inbound_bytes += bytes.len();
        }
        if matches!(item, Item::Reset) {
            to.inbound.clear();
            to.inbound_bytes = 0;
        }
        to.inbound.push_back((at, item));
    }

    /// One end gives up. Closed with bytes unread, or by chance, the connection is reset.
    pub(crate) fn close(&mut self, conn: usize, side: usize, now: Duration) {
        let end = &mut self.conns[conn].ends[side];
        if std::mem::replace(&mut end.closed, true) {
            return;
        }
        let unread = !end.inbound.is_empty();
        end.inbound.clear();
        end.inbound_bytes = 0;
        let reset = unread && self.rng.chance(50);
        self.put(conn, side, now, if reset { Item::Reset } else { Item::Fin });
    }

    /// The connection breaks: what is under way is lost, both ends learn it.
    pub(crate) fn cut(&mut self, conn: usize, now: Duration) {
        for side in 0..2 {
            if !self.conns[conn].ends[side].closed {
                self.put(conn, 1 - side, now, Item::Reset);
            }
        }
    }

    pub(crate) fn room(&mut self, conn: usize, side: usize) -> usize {
        let known = &self.conns[conn];
        if known.silent || known.half_open {
            // The sender's buffer fills up and stays full.
            return 0;
        }
        self.manner.capacity.saturating_sub(known.ends[1 - side].inbound_bytes)
    }
}
