//! Peers: remote engines.

mod arrivals;
mod history;
mod shared;
mod table;

pub(crate) use arrivals::{Arrival, Arrivals};
pub use history::Estimate;
pub(crate) use shared::{NO_SLOT, PeerShared};
pub(crate) use table::{Loaded, PeerTable, home_lane};

use std::sync::Arc;
use std::time::Duration;

use crate::engine::{EngineShared, Message};
use crate::error::{Error, Result};
use crate::sync::{Ticket, deadline};
use crate::transfer::check_notification;

/// A remote engine, known by its metadata. Cheap to clone; any thread.
#[derive(Clone, Debug)]
pub struct Peer {
    pub(crate) shared: Arc<PeerShared>,
    pub(crate) engine: Arc<EngineShared>,
}

impl Peer {
    /// Agent name of the peer.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Whether a session is up now.
    pub fn is_connected(&self) -> bool {
        self.shared.connected.load(std::sync::atomic::Ordering::Acquire)
    }

    /// The lane of this engine that owns the peer's connections.
    pub fn lane(&self) -> usize {
        self.shared.lane
    }

    /// Connects now and waits for it. Never needed: the first transfer or notification connects.
    ///
    /// # Errors
    /// [`Error::Connect`] with every address and what it said, [`Error::Timeout`] after `timeout`.
    pub fn connect(&self, timeout: Duration) -> Result<()> {
        self.engine.check()?;
        if self.is_connected() {
            return Ok(());
        }
        self.engine.check_may_wait("connect")?;
        let ticket = Ticket::new();
        let lane = self.engine.lane(self.shared.lane)?;
        lane.submit(Message::Connect(self.shared.clone(), ticket.clone()))
            .map_err(|_| self.engine.dead())?;
        let assist = || {
            lane.assist();
        };
        ticket.wait(deadline(timeout), assist).unwrap_or_else(|| {
            Err(Error::Timeout {
                what: "connecting",
                peer: self.shared.name.clone(),
                after: timeout,
            })
        })
    }

    /// Sends `payload` to the peer's application: exactly once within the session, in the order in
    /// which this thread sends. Returns at once; connects if need be.
    ///
    /// # Errors
    /// [`Error::Backpressure`] when too many are not acknowledged, [`Error::Limit`] above 16 MiB;
    /// [`Error::Connect`] within a second after an attempt to connect has failed; afterwards one
    /// notification is taken, with which the next attempt is made. [`Error::RemoteDisconnect`] for a
    /// peer that connected by itself, whose metadata was never loaded, and which has left or did not
    /// come back within 30 s. [`Error::Cancelled`] once the peer was unloaded.
    pub fn notify(&self, payload: &[u8]) -> Result<()> {
        check_notification(payload)?;
        self.engine.check()?;
        if let Some(error) = self.shared.unreachable() {
            return Err(error);
        }
        self.shared.reserve(payload.len())?;
        let message = Message::Notify(Box::new((self.shared.clone(), payload.into())));
        if self.engine.hand_over(self.shared.lane, message).is_err() {
            self.shared.release(1, payload.len());
            return Err(self.engine.dead());
        }
        Ok(())
    }

    /// Ends the session: transfers in flight are cancelled, notifications are flushed for at most
    /// `linger`, within which the peer also has to say that it writes no more of WRITEs (else they end in
    /// [`Error::RemoteDisconnect`]). The answer is how many notifications were dropped. The peer stays usable: the next
    /// transfer connects again, in a new session.
    ///
    /// # Errors
    /// [`Error::Shutdown`].
    pub fn disconnect(&self) -> Result<usize> {
        self.engine.check()?;
        self.engine.check_may_wait("disconnect")?;
        let ticket = Ticket::new();
        let lane = self.engine.lane(self.shared.lane)?;
        lane.submit(Message::Disconnect(self.shared.clone(), ticket.clone()))
            .map_err(|_| self.engine.dead())?;
        let limit = self.engine.config.linger + Duration::from_secs(2);
        let assist = || {
            lane.assist();
        };
        ticket.wait(deadline(limit), assist).ok_or_else(|| Error::Timeout {
            what: "disconnecting",
            peer: self.shared.name.clone(),
            after: limit,
        })
    }
}
