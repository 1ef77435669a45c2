//! Which states are expected to meet which events: all that can, but for a few that take an accident within an accident.

use corelane::sim::coverage::{Event, SessionState, TransferEvent, TransferState};

/// Whether runs must reach this.
pub(crate) fn session(state: SessionState, event: Event) -> bool {
    use Event as E;
    use SessionState as S;
    let on_a_link = matches!(
        event,
        E::Read
            | E::Data
            | E::Write
            | E::Status
            | E::NotifyFrame
            | E::Ack
            | E::Ping
            | E::Pong
            | E::Goodbye
            | E::Abandon
            | E::Payload
            | E::SendFault
            | E::RingMessage
            | E::LocalResolved
    );
    let no_link = matches!(state, S::Idle | S::Connecting | S::LeavingConnecting);
    let impossible = match (state, event) {
        // Without a link there are no frames: what is counted came with the one that closed it, and is thrown away.
        _ if on_a_link && no_link => true,
        // The first frame of the session's link is a PING, and with it the peer is heard.
        (
            S::Unconfirmed,
            E::NotifyFrame
            | E::Ack
            | E::Pong
            | E::Goodbye
            | E::Abandon
            | E::RingMessage
            | E::LocalResolved,
        ) => true,
        // Nothing is in flight without a link or an attempt to have one.
        (S::Idle | S::LeavingConnecting, E::Cancel) => true,
        // To accept an attempt ends the own, and the link before.
        (_, E::SessionUp | E::AcceptFailed) => !matches!(state, S::Idle | S::Leaving),
        // Only an attempt has an outcome.
        (_, E::Welcomed | E::ConnectFailed) => {
            !matches!(state, S::Connecting | S::LeavingConnecting)
        }
        (S::LeavingConnecting, E::SessionDown) => true,
        _ => false,
    };
    let rare = matches!(
        (state, event),
        (S::Unconfirmed, E::Abort)
            | (S::Leaving, E::AcceptFailed)
            | (S::Connecting, E::SessionDown)
            | (S::LeavingConnecting, E::AcceptBulk | E::BulkUp | E::BulkDown | E::Retire)
            | (S::Leaving | S::Unconfirmed, E::Retire)
            // A link that is replaced is closed at once: only a stream of this session can be faster than its first frame.
            | (S::Unconfirmed, E::Data | E::Write | E::Status | E::Payload)
    ) || (state != S::Up
        && matches!(
            event,
            E::Copied
                | E::RdmaResolved
                | E::RdmaDown
                | E::WiredEnded
                | E::WiredBack
                | E::WireMessage
        ));
    !impossible && !rare
}

/// Whether runs must reach this.
pub(crate) fn transfer(state: TransferState, event: TransferEvent) -> bool {
    use TransferEvent as E;
    use TransferState as S;
    let impossible = match (state, event) {
        // Nothing was asked for.
        (S::Waiting, E::Answered | E::Refused | E::Faulted) => true,
        // Nothing can be asked for without a link, and a lost link ends what was.
        (S::Asked, E::Unreachable) => true,
        // What its answers say is not looked at.
        (S::Ending, E::Refused | E::Faulted | E::Unreachable) => true,
        (_, E::Flushed) => state != S::Ending,
        _ => false,
    };
    let rare = matches!((state, event), (S::Partly, E::Stopped | E::Unreachable));
    !impossible && !rare
}
