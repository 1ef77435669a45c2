//! Peers that have connected by themselves, for applications that want to be told.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use super::PeerShared;

/// The queue behind `Engine::accept`. Never touched once a peer is connected.
#[derive(Debug)]
pub(crate) struct Arrivals {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Whether strangers are let in.
    open: bool,
    waiting: VecDeque<Arc<PeerShared>>,
    wakers: Vec<Waker>,
}

/// What a look at the queue finds.
#[derive(Debug)]
pub(crate) enum Arrival {
    Peer(Arc<PeerShared>),
    None,
    /// Nobody will arrive.
    Closed,
}

impl Arrivals {
    pub(crate) fn new() -> Self {
        let state = State { open: true, waiting: VecDeque::new(), wakers: Vec::new() };
        Self { state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_open(&self) -> bool {
        self.lock().open
    }

    /// Lets strangers in, or not. Whoever waits looks again.
    pub(crate) fn set_open(&self, open: bool) {
        let wakers = {
            let mut state = self.lock();
            state.open = open;
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Announces a peer, once. Peers that nobody asks for leave again when they are forgotten, so
    /// that the queue is never longer than the table of peers.
    pub(crate) fn push(&self, peer: &Arc<PeerShared>) {
        if !peer.announce() {
            return;
        }
        let wakers = {
            let mut state = self.lock();
            state.waiting.push_back(peer.clone());
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn forget(&self, peer: &Arc<PeerShared>) {
        self.lock().waiting.retain(|known| !Arc::ptr_eq(known, peer));
    }

    pub(crate) fn take(&self) -> Arrival {
        let mut state = self.lock();
        match state.waiting.pop_front() {
            Some(peer) => Arrival::Peer(peer),
            None if state.open => Arrival::None,
            None => Arrival::Closed,
        }
    }

    /// Wakes `waker` at the next arrival; false: there is something to see now.
    pub(crate) fn register(&self, waker: &Waker) -> bool {
        let mut state = self.lock();
        if !state.waiting.is_empty() || !state.open {
            return false;
        }
        state.wakers.retain(|known| !known.will_wake(waker));
        state.wakers.push(waker.clone());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;

    fn peer(name: &str) -> Arc<PeerShared> {
        Arc::new(PeerShared::new(name.into(), 1, 0, None, &Limits::default()))
    }

    #[test]
    fn a_peer_is_announced_once_and_in_order() {
        let arrivals = Arrivals::new();
        let (a, b) = (peer("a"), peer("b"));
        arrivals.push(&a);
        arrivals.push(&b);
        arrivals.push(&a);
        assert!(matches!(arrivals.take(), Arrival::Peer(first) if Arc::ptr_eq(&first, &a)));
        arrivals.push(&a);
        arrivals.forget(&b);
        assert!(matches!(arrivals.take(), Arrival::None));
        assert!(arrivals.register(Waker::noop()));
    }

    #[test]
    fn a_closed_queue_gives_what_it_has_and_then_says_so() {
        let arrivals = Arrivals::new();
        arrivals.push(&peer("a"));
        arrivals.set_open(false);
        assert!(!arrivals.is_open() && !arrivals.register(Waker::noop()));
        assert!(matches!(arrivals.take(), Arrival::Peer(_)));
        assert!(matches!(arrivals.take(), Arrival::Closed));
        arrivals.set_open(true);
        assert!(matches!(arrivals.take(), Arrival::None));
    }
}
