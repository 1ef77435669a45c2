//! What a peer was about when it was struck.

use std::sync::atomic::Ordering::SeqCst;

use serde::{Deserialize, Serialize};

use crate::board::{Board, doing};
use crate::load::{BULK, CONNECTION};

/// A phase that rounds provoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// While one side connects to the other.
    Handshake,
    /// Amid the bytes of a bulk transfer.
    MidChunk,
    /// Notifications are sent and not acknowledged.
    Acknowledgement,
    /// A side takes back memory that the other uses.
    Deregistration,
    /// The sockets between them were cut, and they connect again.
    Reconnect,
    /// Nothing is in flight.
    Idle,
}

impl Phase {
    pub(crate) const ALL: [Self; 6] = [
        Self::Handshake,
        Self::MidChunk,
        Self::Acknowledgement,
        Self::Deregistration,
        Self::Reconnect,
        Self::Idle,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::MidChunk => "mid-chunk",
            Self::Acknowledgement => "acknowledgement",
            Self::Deregistration => "deregistration",
            Self::Reconnect => "reconnect",
            Self::Idle => "idle",
        }
    }

    /// Whether the board says that it is this phase now.
    pub(crate) fn is_now(self, board: &Board) -> bool {
        let either = |bits| board.sides.iter().any(|side| side.is_doing(bits));
        match self {
            Self::Handshake => either(doing::HANDSHAKE),
            Self::Reconnect => either(doing::RECONNECT),
            Self::Deregistration => either(doing::DEREGISTER),
            Self::MidChunk => {
                board.sides.iter().any(|side| BULK.iter().any(|&slot| side.slots[slot].in_flight()))
            }
            Self::Acknowledgement => {
                board.sides.iter().any(|side| side.unacknowledged.load(SeqCst) > 0)
            }
            Self::Idle => board
                .sides
                .iter()
                .all(|side| side.slots[..CONNECTION].iter().all(|slot| !slot.in_flight())),
        }
    }
}
