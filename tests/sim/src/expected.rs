//! Which states are expected to meet which events.

use corelane::sim::coverage::{Event, SessionState, TransferEvent, TransferState};

pub(crate) fn session(_state: SessionState, _event: Event) -> bool {
    true
}

pub(crate) fn transfer(_state: TransferState, _event: TransferEvent) -> bool {
    true
}
