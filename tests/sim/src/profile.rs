//! What a run is like. Each seed draws its own weights, so that some do much of one thing and none of another.

use std::time::Duration;

use corelane::sim::Way;

use crate::net::Manner;
use crate::rng::Rng;

/// What applications do, with weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Post,
    PostAgain,
    Cancel,
    Notify,
    Take,
    Register,
    Deregister,
    Forge,
    Connect,
    Disconnect,
    Unload,
    Unmap,
    Shutdown,
}

/// What befalls them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Cut,
    CloseOneSide,
    Silence,
    Partition,
    Stall,
    Slow,
    Crash,
    HostDown,
    Flood,
    Rail,
}

#[derive(Debug, Clone)]
pub(crate) struct Profile {
    pub(crate) engines: usize,
    pub(crate) friends: usize,
    pub(crate) impostor: bool,
    pub(crate) regions: usize,
    pub(crate) way: Way,
    /// Of each engine, whether it hears that queue pairs are gone.
    pub(crate) deaf_percent: u64,
    pub(crate) manner: Manner,
    pub(crate) liveness: Duration,
    pub(crate) operation_timeout: Duration,
    pub(crate) stream_idle: Duration,
    pub(crate) linger: Duration,
    pub(crate) streams: usize,
    pub(crate) transfers: usize,
    pub(crate) pending: (usize, usize),
    pub(crate) unacknowledged: (usize, usize),
    pub(crate) half_open: usize,
    pub(crate) dead_address: bool,
    /// Longest notification, drawn now and then.
    pub(crate) long_note: usize,
    pub(crate) actions: usize,
    pub(crate) faults: usize,
    pub(crate) pause_us: u64,
    pub(crate) action_weights: Vec<(Action, u64)>,
    pub(crate) fault_weights: Vec<(Fault, u64)>,
    /// A run of many small postings in a row, after which every queue must be short again.
    pub(crate) burst: usize,
    /// Applications take notifications as soon as they are there.
    pub(crate) eager: bool,
}

impl Profile {
    pub(crate) fn draw(rng: &mut Rng, engines: Option<usize>) -> Self {
        let drawn = rng.pick(&[2, 2, 2, 3, 3, 4, 6]);
        let engines = engines.unwrap_or(drawn);
        let delay = rng.pick(&[40, 300, 2000]);
        let capacity = rng.pick(&[700, 4000, 64 << 10]);
        let quick = capacity > 700 && delay < 2000;
        let way = match rng.below(100) {
            0..30 => Way::Ring,
            30..42 => Way::Copies,
            42..58 => Way::Wired,
            _ => Way::Sockets,
        };
        let few = |rng: &mut Rng, percent| rng.chance(percent);
        let mut weights = |all: &[(Action, u64)]| -> Vec<(Action, u64)> {
            all.iter()
                .map(|(action, weight)| (*action, weight * rng.pick(&[0, 1, 1, 2, 4])))
                .collect()
        };
        let mut action_weights = weights(&[
            (Action::Post, 30),
            (Action::PostAgain, 12),
            (Action::Cancel, 8),
            (Action::Notify, 20),
            (Action::Take, 15),
            (Action::Register, 3),
            (Action::Deregister, 4),
            (Action::Forge, 3),
            (Action::Connect, 2),
            (Action::Disconnect, 1),
            (Action::Unload, 1),
            (Action::Unmap, 1),
            (Action::Shutdown, 1),
        ]);
        action_weights.push((Action::Post, 5));
        let calm = rng.chance(15);
        let faults = [
            (Fault::Cut, 10),
            (Fault::CloseOneSide, 6),
            (Fault::Silence, 4),
            (Fault::Partition, 3),
            (Fault::Stall, 4),
            (Fault::Slow, 4),
            (Fault::Crash, 4),
            (Fault::HostDown, 1),
            (Fault::Flood, 2),
        ];
        let mut fault_weights: Vec<(Fault, u64)> = faults
            .iter()
            .map(|(fault, weight)| {
                let weight = if calm { 0 } else { weight * rng.pick(&[0, 0, 1, 2, 4]) };
                (*fault, weight)
            })
            .collect();
        let (mut more_faults, mut deaf_percent) = (0, 0);
        if way == Way::Wired && rng.chance(75) {
            // What can happen to queue pairs takes some of them at work.
            fault_weights.push((Fault::Rail, 60));
            more_faults = 10;
            // Aside, so that all else of the run is the same.
            deaf_percent = rng.clone().pick(&[0, 0, 60]);
        }
        Self {
            engines,
            friends: if engines <= 6 { engines + 1 } else { 4 },
            impostor: engines > 2 && few(rng, 25),
            regions: 1 + rng.index(3),
            way,
            deaf_percent,
            manner: Manner { delay_us: (5, 5 + delay), capacity, chunk: (capacity / 2).min(4000) },
            liveness: Duration::from_millis(if quick { rng.pick(&[200, 500, 3000]) } else { 3000 }),
            operation_timeout: Duration::from_millis(rng.pick(&[30_000, 30_000, 5000, 30])),
            stream_idle: Duration::from_millis(rng.pick(&[3, 10_000])),
            linger: Duration::from_millis(rng.pick(&[0, 20, 1000])),
            streams: 1 + rng.index(3),
            transfers: rng.pick(&[4, 64]),
            pending: rng.pick(&[(2, 200), (16, 100_000), (1 << 16, 64 << 20)]),
            unacknowledged: rng.pick(&[(8, 20_000), (1 << 16, 64 << 20)]),
            half_open: if engines > 6 { 256 } else { rng.pick(&[3, 256]) },
            dead_address: rng.chance(15),
            long_note: if quick { rng.pick(&[100, 5000, 70_000]) } else { 100 },
            actions: if engines > 6 { 4 * engines } else { rng.pick(&[80, 160, 320]) },
            faults: more_faults + if rng.chance(25) { 0 } else { 2 + rng.index(8) },
            pause_us: rng.pick(&[50, 500, 4000]),
            action_weights,
            fault_weights,
            eager: rng.chance(40),
            burst: if rng.chance(6) { 90 } else { 0 },
        }
    }
}

/// Draws one of those, or none when all weigh nothing.
pub(crate) fn draw<T: Copy>(rng: &mut Rng, all: &[(T, u64)]) -> Option<T> {
    let total = all.iter().map(|(_, weight)| weight).sum();
    let mut left = rng.below(total);
    for (item, weight) in all {
        if left < *weight {
            return Some(*item);
        }
        left -= weight;
    }
    None
}
