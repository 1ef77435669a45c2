//! Notifications that were taken for a peer which was gone before its lane got them.

use std::sync::Arc;

use crate::peer::PeerShared;
use crate::stats::Counters;

/// Those of one turn that go to one peer are said in one line.
#[derive(Default)]
pub(super) struct Strays {
    peer: Option<Arc<PeerShared>>,
    count: usize,
    bytes: usize,
}

impl Strays {
    /// Gives back the room of a notification of so many bytes, and counts it.
    pub(super) fn drop_one(&mut self, peer: &Arc<PeerShared>, bytes: usize, counters: &Counters) {
        peer.release(1, bytes);
        counters.notifications_dropped.add(1);
        if self.peer.as_ref().is_some_and(|known| !Arc::ptr_eq(known, peer)) {
            self.say();
        }
        self.peer = Some(peer.clone());
        self.count += 1;
        self.bytes += bytes;
    }

    /// Logs what was dropped since.
    pub(super) fn say(&mut self) {
        let Some(peer) = self.peer.take() else { return };
        let (notifications, bytes) = (self.count, self.bytes);
        (self.count, self.bytes) = (0, 0);
        tracing::warn!(
            peer = &*peer.name,
            notifications,
            bytes,
            "dropped notifications whose peer was gone before they were sent"
        );
    }
}

impl Drop for Strays {
    fn drop(&mut self) {
        self.say();
    }
}
