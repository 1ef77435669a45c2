//! Peers on this host that die: their engines' words are watched by the lane's ring, and looked at every turn.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use corelane_runtime::{Cx, TimerId};

use super::Theirs;
use crate::engine::lane::{DEATH_TIMER, LaneDriver};
use crate::session::LinkId;
use crate::transport::local::{self, PeerCredentials};

/// Wakes that say nothing, after which a word is not watched any more: who can see it can wake those who watch it.
const MAX_IDLE_WAKES: u32 = 64;

/// How often a process is asked about, while nothing of its is watched yet.
const SUSPICION: Duration = Duration::from_millis(2);

fn ask_soon(slot: usize, cx: &mut Cx<'_>) -> TimerId {
    let next = cx.now() + SUSPICION;
    cx.set_timer(next, DEATH_TIMER | slot as u64)
}

impl Theirs {
    /// Watches the word of the peer's life on behalf of a session's link.
    fn watch_life(&mut self, link: LinkId, cx: &mut Cx<'_>) {
        if let Some(life) = &self.life
            && let Some(held) = life.held()
        {
            self.watch = cx.watch_word(Arc::new(life.clone()), held, link);
        }
    }
}

impl LaneDriver {
    fn theirs_of(&mut self, slot: usize) -> Option<(LinkId, &mut Theirs)> {
        let attachment = self.peers.get_mut(slot)?.local.as_mut()?;
        Some((attachment.link, attachment.theirs.as_mut()?))
    }

    pub(super) fn begin_to_watch(&mut self, slot: usize, cx: &mut Cx<'_>) {
        if let Some((link, theirs)) = self.theirs_of(slot) {
            theirs.watch_life(link, cx);
        }
    }

    pub(super) fn end_watch(&mut self, slot: usize, cx: &mut Cx<'_>) {
        if let Some(watch) = self.theirs_of(slot).and_then(|(_, theirs)| theirs.watch.take()) {
            cx.unwatch_word(watch);
        }
    }

    /// Something is expected of the process at the other end of a Unix socket, which has not shown yet how it dies: it is asked for
    /// from time to time. Its socket would take a connection, and answer nothing, for as long as the kernel takes
    /// its memory away.
    pub(in crate::engine) fn suspect(&mut self, slot: usize, link: LinkId, cx: &mut Cx<'_>) {
        let Some(link) = self.link(link).filter(|link| link.remote.is_unix()) else { return };
        let pid = PeerCredentials::of(link.fd.as_fd()).ok().and_then(|peer| peer.pid);
        let (Some(pid), Some(peer)) = (pid, self.peers.get_mut(slot)) else { return };
        if pid.is_own() {
            return;
        }
        match &mut peer.suspect {
            // One timer, whoever it is about.
            Some((suspect, _)) => *suspect = pid,
            None => peer.suspect = Some((pid, ask_soon(slot, cx))),
        }
    }

    /// Time to ask whether a process is still there of which something is expected.
    pub(in crate::engine) fn death_timer(&mut self, slot: usize, cx: &mut Cx<'_>) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let Some((pid, _)) = peer.suspect.take() else { return };
        let attaching = peer.local.as_ref().filter(|attachment| attachment.theirs.is_none());
        let link = attaching.map(|attachment| attachment.link);
        if link.is_none() && peer.connector.is_none() {
            return;
        }
        if !local::has_no_address_space(pid) {
            peer.suspect = Some((pid, ask_soon(slot, cx)));
            return;
        }
        if let Some(link) = link {
            self.receive_last(link, cx);
            self.close_link(link, "its process has ended", cx);
        }
        self.cannot_connect_to_the_dead(slot, cx);
    }

    /// The ring has been woken by the word that a session's link watches.
    pub(in crate::engine) fn on_life(&mut self, link: LinkId, cx: &mut Cx<'_>) {
        let Some(slot) = self.link(link).and_then(|link| link.phase.peer()) else { return };
        match self.theirs_of(slot) {
            Some((known, theirs)) if known == link => {
                theirs.watch = None;
                theirs.idle_wakes += 1;
                if !self.look_for_death(slot, cx)
                    && let Some((_, theirs)) = self.theirs_of(slot)
                    && theirs.idle_wakes <= MAX_IDLE_WAKES
                {
                    theirs.watch_life(link, cx);
                }
            }
            _ => {}
        }
    }

    /// The ring cannot watch the word of a session's link: what is left is to look every turn, as with an older kernel.
    pub(in crate::engine) fn on_life_unwatched(
        &mut self,
        link: LinkId,
        error: &std::io::Error,
        cx: &mut Cx<'_>,
    ) {
        let Some(slot) = self.link(link).and_then(|link| link.phase.peer()) else { return };
        let Some((known, theirs)) = self.theirs_of(slot) else { return };
        if known != link {
            return;
        }
        theirs.watch = None;
        if !self.look_for_death(slot, cx) {
            let peer = self.peers.get(slot).map(|peer| peer.core.peer.name.clone());
            tracing::warn!(
                peer = peer.as_deref(),
                %error,
                "the peer's death may be noticed late: the kernel does not watch it"
            );
        }
    }

    /// Ends the session of a peer whose process is dying; true: it is. One load.
    #[inline]
    pub(super) fn look_for_death(&mut self, slot: usize, cx: &mut Cx<'_>) -> bool {
        let Some((link, theirs)) = self.theirs_of(slot) else { return false };
        let Some(life) = theirs.life.as_ref().filter(|life| life.has_ended()) else { return false };
        life.tell_others();
        // What it has sent before is ours, a goodbye above all.
        self.receive_last(link, cx);
        self.close_link(link, "its process has ended", cx);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::EngineConfig;
    use crate::engine::Engine;
    use crate::peer::PeerShared;
    use crate::transport::local::Pid;

    /// Whoever gets the place of a peer that was removed is not asked about on its behalf.
    #[test]
    fn a_peer_that_is_removed_leaves_no_timer_behind() {
        let engine = Engine::new("a", EngineConfig::default()).unwrap();
        let (name, limits) = ("b".into(), engine.shared.config.limits.clone());
        let peer = Arc::new(PeerShared::new(name, 7, 0, None, &limits));
        let lane = engine.shared.lane(0).unwrap();
        let is_set = lane.spawn(move |lane| async move {
            loop {
                let peer = peer.clone();
                let asked = lane.with(move |driver, cx| {
                    let slot = driver.add_peer(&peer, false);
                    let later = cx.now() + Duration::from_hours(1);
                    let timer = cx.set_timer(later, DEATH_TIMER | slot as u64);
                    driver.peers[slot].suspect = Some((Pid::own(), timer));
                    driver.remove_peer(slot, cx);
                    // What was cancelled cannot be cancelled.
                    cx.cancel_timer(timer)
                });
                match asked {
                    Some(asked) => return asked,
                    None => lane.yield_now().await,
                }
            }
        });
        assert!(!is_set.wait().unwrap(), "the timer goes on");
    }
}
