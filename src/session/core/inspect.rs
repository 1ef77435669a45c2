//! What the simulator looks at.

use super::{Core, Phase};
use crate::sim::Levels;
use crate::sim::coverage::SessionState;
use crate::wire::hello::LinkKind;

impl Core {
    pub(crate) fn session_state(&self) -> SessionState {
        match self.phase {
            Phase::Idle => SessionState::Idle,
            Phase::Connecting => SessionState::Connecting,
            Phase::Up if !self.confirmed => SessionState::Unconfirmed,
            Phase::Up => SessionState::Up,
            Phase::Leaving { connecting: false, .. } => SessionState::Leaving,
            Phase::Leaving { connecting: true, .. } => SessionState::LeavingConnecting,
        }
    }

    pub(crate) fn levels(&self) -> Levels {
        let outstanding = |kind| {
            let links = self.links.iter().filter(|link| link.kind == kind);
            links.map(|link| link.outstanding).max().unwrap_or(0)
        };
        let (on_wire, on_wire_bytes, longest_on_wire) = self.outbox.on_wire();
        let (ready, ready_bytes, held_bytes, counted, abandoned) = self.inbox.levels();
        Levels {
            active: self.active.len(),
            requests: self.requests.len(),
            deadlines: self.deadlines.len(),
            queued: self.latency.len() + self.bulk.len(),
            links: self.links.len(),
            control: self.control.len(),
            replies: self.links.iter().map(|link| link.replies.len()).max().unwrap_or(0),
            bulk_outstanding: outstanding(LinkKind::Bulk),
            session_outstanding: outstanding(LinkKind::Session),
            outbox: self.outbox.len(),
            on_wire,
            on_wire_bytes,
            longest_on_wire,
            ready,
            ready_bytes,
            held_bytes,
            counted,
            abandoned,
            is_up: matches!(self.phase, Phase::Up) && self.session_link().is_some(),
            session: self.session,
        }
    }
}
