//! Copies of GPUs that callers have begun, as their lane sees them: it ends those that nobody asks about, and waits for what has
//! to be over before a peer or the engine is left.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use corelane_runtime::Cx;

use super::EngineShared;
use super::gpu::PATIENCE;
use super::lane::LaneDriver;
use crate::peer::PeerShared;
use crate::transfer::{Issuer, Look, TransferShared};

/// Who waits for a transfer asks oftener; a look is a call of the driver.
const LOOK_EVERY: Duration = Duration::from_micros(10);

/// Where something may be under way.
pub(super) struct Issuers {
    known: Vec<Arc<Issuer>>,
    next_look: Instant,
}

impl Issuers {
    pub(super) fn new() -> Self {
        Self { known: Vec::with_capacity(8), next_look: Instant::now() }
    }

    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.known.is_empty()
    }

    /// Waits until nothing is under way for a lane that ends; what a GPU does not end is abandoned.
    pub(super) fn settle(&mut self, engine: &EngineShared, lane: usize, patience: Duration) {
        for issuer in self.known.drain(..) {
            settle_for(&issuer, engine, lane, patience);
        }
    }
}

/// Waits until nothing is under way here for a lane that ends.
pub(super) fn settle_for(issuer: &Issuer, engine: &EngineShared, lane: usize, patience: Duration) {
    let patience = Instant::now() + patience;
    issuer.settle_or_abandon(engine, patience, |transfer| transfer.plan.peer.lane == lane);
}

impl LaneDriver {
    /// A caller has begun a copy.
    pub(super) fn watch_issuer(&mut self, issuer: Arc<Issuer>) {
        if self.issuers.known.is_empty() {
            // Else the next look stays where it is: those who post oftener must not put it off.
            self.issuers.next_look = Instant::now() + LOOK_EVERY;
        }
        if !self.issuers.known.iter().any(|known| Arc::ptr_eq(known, &issuer)) {
            self.issuers.known.push(issuer);
        }
    }

    /// True: something has ended.
    pub(super) fn look_at_issuers(&mut self, cx: &mut Cx<'_>) -> bool {
        let now = Instant::now();
        if now < self.issuers.next_look {
            return false;
        }
        self.issuers.next_look = now + LOOK_EVERY;
        let (mut ended, mut at) = (false, 0);
        let (engine, lane) = (self.engine.clone(), self.index);
        while let Some(issuer) = self.issuers.known.get(at).cloned() {
            let is_meant = |transfer: &TransferShared| transfer.plan.peer.lane == lane;
            let look = issuer.look(&engine, is_meant, |peer, payload| {
                self.notify_of_issued(peer, payload, cx);
                Ok(())
            });
            if look == Look::UnderWay {
                at += 1;
            } else {
                // The next one comes with a message.
                self.issuers.known.swap_remove(at);
            }
            ended |= look == Look::Ended;
        }
        ended
    }

    /// Nothing more is begun with a peer: waits for what is under way, that its notification may be sent, but not for longer than
    /// notifications are waited for, and GPUs at all. The other peers of the lane wait as well: for 2 ms at most, if the GPU works.
    pub(super) fn settle_issued_of(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let patience = self.engine.config.linger.min(PATIENCE);
        self.wait_for_issued(slot, patience, cx);
    }

    /// As before, with a peer that is about to be forgotten: what a GPU does not end is abandoned.
    pub(super) fn settle_or_abandon_issued_of(
        &mut self,
        slot: usize,
        patience: Duration,
        cx: &mut Cx<'_>,
    ) {
        for (issuer, peer) in self.wait_for_issued(slot, patience, cx) {
            let is_meant = |transfer: &TransferShared| Arc::ptr_eq(&transfer.plan.peer, &peer);
            issuer.abandon(&self.engine, is_meant);
        }
    }

    /// Those that have not ended in time.
    fn wait_for_issued(
        &mut self,
        slot: usize,
        patience: Duration,
        cx: &mut Cx<'_>,
    ) -> Vec<(Arc<Issuer>, Arc<PeerShared>)> {
        let Some(peer) = self.peers.get(slot).map(|peer| peer.core.peer.clone()) else {
            return Vec::new();
        };
        let engine = self.engine.clone();
        let patience = Instant::now() + patience;
        let mut late = Vec::new();
        // Also those of which this lane has no message yet. Whoever begins one looks for the way after it has taken the place, and
        // the way is gone: it finds that, or this finds its copy.
        fence(Ordering::SeqCst);
        let issuers = engine.issuers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for issuer in issuers {
            let is_meant = |transfer: &TransferShared| Arc::ptr_eq(&transfer.plan.peer, &peer);
            let settled = issuer.settle(&engine, patience, is_meant, |peer, payload| {
                self.notify_of_issued(peer, payload, cx);
                Ok(())
            });
            if !settled {
                late.push((issuer, peer.clone()));
            }
        }
        late
    }

    fn notify_of_issued(&mut self, peer: &Arc<PeerShared>, payload: Arc<[u8]>, cx: &mut Cx<'_>) {
        match self.slot_of(peer) {
            Some(slot) => {
                self.with_core(slot, cx, |core, env| core.notify(payload, env));
            }
            None => peer.release(1, payload.len()),
        }
    }
}
