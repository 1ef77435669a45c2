//! Peers on this host that die: their engines' words are watched by the lane's ring, and looked at every turn.

use std::sync::Arc;

use corelane_runtime::Cx;

use super::Theirs;
use crate::engine::lane::LaneDriver;
use crate::session::LinkId;

/// Wakes that say nothing, after which a word is not watched any more: who can see it can wake those who watch it.
const MAX_IDLE_WAKES: u32 = 64;

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
