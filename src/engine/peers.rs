//! `Engine`: peers that come, are loaded, and go.

use std::time::{Duration, Instant};

use super::{Engine, Message};
#[cfg(doc)]
use crate::config::EngineConfig;
use crate::error::{Error, Result};
use crate::peer::{Arrival, Loaded, Peer};
use crate::sync::{Ticket, deadline, sleep_until_woken};
use crate::wire::Metadata;

impl Engine {
    /// Waits for a peer that connects by itself, and that was not returned here before. Never
    /// needed: such peers are served, and their notifications arrive, whether or not anybody asks.
    ///
    /// # Errors
    /// [`Error::Timeout`]; [`Error::Cancelled`] once [`stop_accepting`](Self::stop_accepting) was
    /// called and nobody is left to return; [`Error::Shutdown`].
    pub fn accept(&self, timeout: Duration) -> Result<Peer> {
        let shared = &self.shared;
        shared.check()?;
        shared.check_may_wait("accept")?;
        let deadline = deadline(timeout);
        loop {
            match shared.arrivals.take() {
                Arrival::Peer(peer) => return Ok(Peer { shared: peer, engine: shared.clone() }),
                Arrival::None => {}
                Arrival::Closed => {
                    shared.check()?;
                    return Err(Error::Cancelled);
                }
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(Error::Timeout {
                    what: "waiting for a peer",
                    peer: shared.name.clone(),
                    after: timeout,
                });
            }
            shared.wake_lanes();
            sleep_until_woken(deadline - now, |waker| shared.arrivals.register(waker));
            shared.check()?;
        }
    }

    /// Refuses peers that are not known yet, and ends [`accept`](Self::accept). Peers that are
    /// known go on, and may connect again.
    ///
    /// # Errors
    /// [`Error::Shutdown`].
    pub fn stop_accepting(&self) -> Result<()> {
        self.shared.check()?;
        self.shared.arrivals.set_open(false);
        Ok(())
    }

    /// Accepts new peers again; an engine does from its creation.
    ///
    /// # Errors
    /// [`Error::Shutdown`].
    pub fn start_accepting(&self) -> Result<()> {
        self.shared.check()?;
        self.shared.arrivals.set_open(true);
        Ok(())
    }

    /// Makes a peer known by its metadata. Cheap: nothing is connected. Loading the same metadata
    /// again gives the same peer; other metadata under a known name replaces it: the session with
    /// the engine that had the name before ends, and its transfers in [`Error::RemoteDisconnect`].
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Limit`], [`Error::Config`] when no transport is shared.
    pub fn load_peer(&self, metadata: &[u8]) -> Result<Peer> {
        self.load(Metadata::decode(metadata)?)
    }

    /// As [`load_peer`](Self::load_peer), for an application that knows the peer by a name of its
    /// own: nothing is loaded when the metadata belongs to another.
    ///
    /// # Errors
    /// Those of `load_peer`; [`Error::InvalidArgument`] for metadata of another agent.
    pub fn load_peer_as(&self, name: &str, metadata: &[u8]) -> Result<Peer> {
        let metadata = Metadata::decode(metadata)?;
        if metadata.name != name {
            return Err(Error::InvalidArgument(format!(
                "this is the metadata of `{}` and not of `{name}`",
                metadata.name
            )));
        }
        self.load(metadata)
    }

    fn load(&self, metadata: Metadata) -> Result<Peer> {
        let shared = &self.shared;
        shared.check()?;
        if metadata.transports & shared.identity.transports == 0 {
            return Err(Error::Config(format!(
                "`{}` offers no transport that is allowed here; compare `transports` on both sides",
                metadata.name
            )));
        }
        let Loaded { peer, replaced, .. } = shared.peers().load(metadata)?;
        // Also when another thread was first: its message may not have been sent yet.
        self.submit(peer.lane, Message::AddPeer(peer.clone()))?;
        if let Some(old) = replaced {
            self.submit(old.lane, Message::Retire(old))?;
        }
        Ok(Peer { shared: peer, engine: shared.clone() })
    }

    /// The peer that was loaded under this name.
    pub fn peer(&self, name: &str) -> Option<Peer> {
        self.shared.check_process().ok()?;
        let shared = self.shared.peers().named(name).cloned()?;
        Some(Peer { shared, engine: self.shared.clone() })
    }

    /// Disconnects a peer (see [`Peer::disconnect`]) and forgets it. Its plans can be posted no
    /// more: their transfers end in [`Error::Cancelled`].
    ///
    /// # Errors
    /// Those of [`Peer::disconnect`]. The peer is forgotten all the same.
    pub fn unload_peer(&self, peer: &Peer) -> Result<usize> {
        let limit = self.shared.config.linger + Duration::from_secs(2);
        let dropped = self.unload_peer_within(peer, limit)?;
        if dropped.is_none() {
            self.submit(peer.shared.lane, Message::RemovePeer(peer.shared.clone()))?;
        }
        dropped.ok_or_else(|| Error::Timeout {
            what: "disconnecting",
            peer: peer.shared.name.clone(),
            after: limit,
        })
    }

    /// As [`unload_peer`](Self::unload_peer), and waits for the flush of notifications during at
    /// most `patience`: `None` when it goes on by itself, for at most
    /// [`linger`](EngineConfig::linger). The peer is forgotten in any case: its name and its
    /// metadata may be loaded anew.
    ///
    /// # Errors
    /// [`Error::Shutdown`].
    pub fn unload_peer_within(&self, peer: &Peer, patience: Duration) -> Result<Option<usize>> {
        self.shared.check()?;
        self.shared.check_may_wait("unload_peer")?;
        self.shared.peers().remove(&peer.shared);
        peer.shared.set_unloaded();
        let ticket = Ticket::new();
        self.submit(peer.shared.lane, Message::Unload(peer.shared.clone(), ticket.clone()))?;
        let lane = self.shared.lane(peer.shared.lane)?;
        let assist = || {
            lane.assist();
        };
        Ok(ticket.wait(deadline(patience), assist))
    }
}
