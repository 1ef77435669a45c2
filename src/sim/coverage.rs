//! Which states of the protocol have met which events.

use std::cell::RefCell;

use crate::error::Error;
use crate::wire::frame::FrameKind;

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident => $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(missing_docs)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// As tables show it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

named! {
    /// Where the session of a core stands.
    SessionState {
        Idle => "idle",
        Connecting => "connecting",
        Unconfirmed => "up, unheard",
        Up => "up",
        Leaving => "leaving",
        LeavingConnecting => "leaving, connecting",
    }
}

named! {
    /// What happens to a session.
    Event {
        Post => "post", Cancel => "cancel", Notify => "notify", Connect => "connect",
        Leave => "leave", Retire => "retire", Abort => "abort", Drain => "drain", Time => "time",
        Accept => "session asked for", AcceptFailed => "welcome not sent", SessionUp => "accepted",
        Welcomed => "welcomed", ConnectFailed => "cannot connect",
        AcceptBulk => "stream asked for", BulkUp => "stream up", BulkFailed => "no stream",
        SessionDown => "session link down", BulkDown => "stream down",
        Read => "READ", Data => "DATA", Write => "WRITE", Status => "STATUS", NotifyFrame => "NOTIFY",
        Ack => "ACK", Ping => "PING", Pong => "PONG", Goodbye => "GOODBYE", Abandon => "ABANDON",
        Payload => "end of payload", SendFault => "unmapped, sending",
        RingMessage => "ring message", LocalResolved => "ring attached", Copied => "copied",
        RdmaResolved => "queue pairs decided", RdmaDown => "queue pairs down", WiredEnded => "work ended",
        WiredBack => "work given back", WireMessage => "queue pair message",
    }
}

named! {
    /// Where a transfer stands.
    TransferState {
        Waiting => "nothing sent",
        Partly => "some requests sent",
        Asked => "all requests sent",
        Ending => "ending, not quiet",
    }
}

named! {
    /// What happens to a transfer.
    TransferEvent {
        Answered => "answered",
        Refused => "refused",
        Faulted => "memory fault",
        Cancelled => "cancelled",
        Timeout => "operation timeout",
        Lost => "link or session lost",
        Unreachable => "cannot connect",
        Stopped => "engine stopped",
        Flushed => "last frame sent",
    }
}

named! {
    /// What happens to a notification at its receiver.
    Arrival {
        Whole => "whole",
        Fragment => "fragment",
        BoundBeforeData => "bound, before its data",
        BoundAfterData => "bound, after its data",
        BoundFailed => "bound, a piece was refused",
        Void => "void",
        Abandoned => "piece of an abandoned transfer",
    }
}

named! {
    /// What the receiver's side of the session is in.
    InboxState {
        Open => "room",
        Backlogged => "application full",
    }
}

impl Event {
    pub(super) fn of_frame(kind: FrameKind) -> Self {
        match kind {
            FrameKind::Read => Self::Read,
            FrameKind::Data => Self::Data,
            FrameKind::Write => Self::Write,
            FrameKind::Status => Self::Status,
            FrameKind::Notify => Self::NotifyFrame,
            FrameKind::Ack => Self::Ack,
            FrameKind::Pong => Self::Pong,
            FrameKind::Goodbye => Self::Goodbye,
            FrameKind::Abandon => Self::Abandon,
            _ => Self::Ping,
        }
    }
}

impl TransferEvent {
    pub(crate) fn of_error(error: &Error) -> Self {
        match error {
            Error::Permission { .. } => Self::Refused,
            Error::Fault { .. } => Self::Faulted,
            Error::Cancelled => Self::Cancelled,
            Error::Timeout { .. } => Self::Timeout,
            Error::RemoteDisconnect { .. } => Self::Lost,
            Error::Connect { .. } => Self::Unreachable,
            _ => Self::Stopped,
        }
    }
}

/// How often each state has met each event.
#[derive(Debug, Clone)]
pub struct Coverage {
    /// Sessions.
    pub sessions: Vec<Vec<u64>>,
    /// Transfers.
    pub transfers: Vec<Vec<u64>>,
    /// Notifications.
    pub arrivals: Vec<Vec<u64>>,
}

impl Default for Coverage {
    fn default() -> Self {
        let table = |rows: usize, columns: usize| vec![vec![0; columns]; rows];
        Self {
            sessions: table(SessionState::ALL.len(), Event::ALL.len()),
            transfers: table(TransferState::ALL.len(), TransferEvent::ALL.len()),
            arrivals: table(InboxState::ALL.len(), Arrival::ALL.len()),
        }
    }
}

impl Coverage {
    /// Adds the counts of another run.
    pub fn add(&mut self, other: &Self) {
        let tables = [
            (&mut self.sessions, &other.sessions),
            (&mut self.transfers, &other.transfers),
            (&mut self.arrivals, &other.arrivals),
        ];
        for (ours, theirs) in tables {
            for (ours, theirs) in ours.iter_mut().flatten().zip(theirs.iter().flatten()) {
                *ours += theirs;
            }
        }
    }
}

thread_local! {
    static COVERAGE: RefCell<Coverage> = RefCell::default();
}

/// Takes what this thread has reached since the last call.
pub fn take() -> Coverage {
    COVERAGE.take()
}

pub(crate) fn session(state: SessionState, event: Event) {
    COVERAGE.with_borrow_mut(|c| c.sessions[state as usize][event as usize] += 1);
}

pub(crate) fn transfer(state: TransferState, event: TransferEvent) {
    COVERAGE.with_borrow_mut(|c| c.transfers[state as usize][event as usize] += 1);
}

pub(crate) fn arrival(state: InboxState, event: Arrival) {
    COVERAGE.with_borrow_mut(|c| c.arrivals[state as usize][event as usize] += 1);
}
