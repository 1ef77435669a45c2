//! What should be: transfers, notifications and memory as the applications know them.

use std::collections::BTreeMap;
use std::time::Duration;

use corelane::sim::{State, Touch, TransferHandle};
use corelane::{Access, Error, Operation};

use crate::memory::{CELL, CellRef, Role, Space};
use crate::promise::{Promise, Violation};
use crate::rng::pattern;

/// A posting slot, and its last posting.
pub(crate) struct Transfer {
    pub(crate) engine: usize,
    pub(crate) incarnation: u128,
    pub(crate) to: usize,
    pub(crate) to_incarnation: u128,
    pub(crate) operation: Operation,
    /// Here and there; there is none there where the request has to be refused.
    pub(crate) cells: Vec<(CellRef, Option<CellRef>)>,
    pub(crate) len: usize,
    /// What its bytes are made of.
    pub(crate) tag: u64,
    pub(crate) handle: TransferHandle,
    pub(crate) posted: Duration,
    /// When it must have ended.
    pub(crate) limit: Duration,
    pub(crate) ended: bool,
    pub(crate) done: bool,
    /// Its engine has died or shut down: nobody asks any more.
    pub(crate) orphan: bool,
    pub(crate) note: Option<usize>,
    /// It names memory that it must not touch.
    pub(crate) forged: bool,
    pub(crate) cancelled: Option<Duration>,
}

impl Transfer {
    pub(crate) fn is_in_flight(&self) -> bool {
        matches!(self.handle.state(), State::Posted)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoteKind {
    Free,
    Bound(usize),
}

/// A notification that an engine has taken.
pub(crate) struct Note {
    pub(crate) from: usize,
    pub(crate) from_incarnation: u128,
    pub(crate) to: usize,
    pub(crate) to_incarnation: u128,
    pub(crate) kind: NoteKind,
    /// Which loading of its peer it was handed to: of a peer that is loaded anew, the one before may still be flushed.
    pub(crate) loading: u64,
    pub(crate) len: usize,
    pub(crate) seen: bool,
}

/// What two incarnations have gone through, as seen by the first.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Pair {
    /// A session may have ended, so that notifications may have been dropped.
    pub(crate) may_drop: bool,
    /// The receiver threw away what it had.
    pub(crate) forgot: bool,
    /// The last free-standing one that was seen.
    pub(crate) last_free: Option<(u64, usize)>,
}

#[derive(Default)]
pub(crate) struct Model {
    pub(crate) spaces: Vec<Space>,
    pub(crate) incarnations: Vec<u128>,
    pub(crate) transfers: Vec<Transfer>,
    pub(crate) notes: Vec<Note>,
    pub(crate) pairs: BTreeMap<(u128, u128), Pair>,
    pub(crate) violation: Option<Violation>,
    pub(crate) bytes_moved: u64,
}

/// Bytes of a notification: its number, and a pattern.
pub(crate) fn note_bytes(id: usize, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|at| pattern(id as u64, at)).collect();
    bytes[..8].copy_from_slice(&(id as u64).to_le_bytes());
    bytes
}

impl Model {
    /// The engine that is this incarnation now.
    pub(crate) fn engine_of(&self, incarnation: u128) -> Option<usize> {
        // Its low bits say which it would be.
        let index = (incarnation as u32).checked_sub(1)? as usize;
        self.incarnations.get(index).filter(|known| **known == incarnation).map(|_| index)
    }

    pub(crate) fn fail(&mut self, promise: Promise, text: impl Into<String>) {
        if self.violation.is_none() {
            self.violation = Some(Violation { promise, text: text.into() });
        }
    }

    pub(crate) fn pair(&mut self, from: u128, to: u128) -> &mut Pair {
        self.pairs.entry((from, to)).or_default()
    }

    /// A session between the two may end, whoever ends it.
    pub(crate) fn may_drop(&mut self, a: u128, b: u128) {
        self.pair(a, b).may_drop = true;
        self.pair(b, a).may_drop = true;
    }

    fn byte(transfer: &Transfer, cell: usize, offset: usize) -> u8 {
        pattern(transfer.tag + cell as u64, offset)
    }

    /// Fills the source of a transfer, and gives its cells their roles.
    pub(crate) fn begin(&mut self, number: usize) {
        let transfer = &self.transfers[number];
        let (engine, to, len) = (transfer.engine, transfer.to, transfer.len);
        let read = transfer.operation == Operation::Read;
        let same = self.incarnations[to] == transfer.to_incarnation;
        let (tag, cells) = (transfer.tag, transfer.cells.clone());
        for (index, (own, theirs)) in cells.into_iter().enumerate() {
            let byte = |offset| pattern(tag + index as u64, offset);
            let own_role = if read {
                Role::Target { transfer: number, own: true }
            } else {
                self.spaces[engine].fill(own, len, byte);
                Role::Source { transfer: number, own: true }
            };
            if let Some(role) = self.spaces[engine].cell_mut(own) {
                *role = own_role;
            }
            let Some(theirs) = theirs.filter(|_| same) else { continue };
            let role = if read {
                self.spaces[to].fill(theirs, len, byte);
                Role::Source { transfer: number, own: false }
            } else {
                Role::Target { transfer: number, own: false }
            };
            if let Some(place) = self.spaces[to].cell_mut(theirs) {
                *place = role;
            }
        }
    }

    /// Whether all bytes of a transfer are where they belong, as far as there is such a place still.
    pub(crate) fn has_arrived(&self, number: usize) -> bool {
        let transfer = &self.transfers[number];
        let read = transfer.operation == Operation::Read;
        transfer.cells.iter().enumerate().all(|(index, (own, theirs))| {
            let bytes = if read {
                self.spaces[transfer.engine].bytes(*own, transfer.len)
            } else {
                if self.incarnations[transfer.to] != transfer.to_incarnation {
                    return true;
                }
                theirs.and_then(|theirs| self.spaces[transfer.to].bytes(theirs, transfer.len))
            };
            bytes.is_none_or(|bytes| {
                bytes.iter().enumerate().all(|(at, byte)| *byte == Self::byte(transfer, index, at))
            })
        })
    }

    /// A posting was seen to have ended.
    pub(crate) fn ended(&mut self, number: usize, now: Duration) {
        let transfer = &mut self.transfers[number];
        transfer.ended = true;
        transfer.done = matches!(transfer.handle.state(), State::Done);
        let (begun, ended) = transfer.handle.begun_and_ended();
        if begun != ended {
            let text =
                format!("transfer {number} was posted {begun} times and ended {ended} times");
            return self.fail(Promise::EndsOnce, text);
        }
        let (done, forged) = (transfer.done, transfer.forged);
        if done && forged {
            let text =
                format!("transfer {number} is done, though it asks for what it must not have");
            return self.fail(Promise::Admitted, text);
        }
        if done && !self.has_arrived(number) {
            let text = format!("transfer {number} is done at {now:?} and its bytes are not there");
            return self.fail(Promise::Data, text);
        }
        if !done {
            self.spoil(number);
        }
    }

    /// The cells of a failed transfer are not used again.
    fn spoil(&mut self, number: usize) {
        let transfer = &self.transfers[number];
        let same = self.incarnations[transfer.to] == transfer.to_incarnation;
        let (engine, to) = (transfer.engine, transfer.to);
        let write = transfer.operation == Operation::Write;
        // Whatever else it failed of, the peer may still have to take what it was sent.
        let quiet = matches!(transfer.handle.state(), State::Failed(Error::Cancelled));
        for (_, theirs) in transfer.cells.clone() {
            if let Some(theirs) = theirs.filter(|_| same && write)
                && let Some(role) = self.spaces[to].cell_mut(theirs)
            {
                *role = Role::Spoilt { transfer: number, quiet };
            }
        }
        let _ = engine;
    }

    /// Checks a touch of registered memory; `None`: it is not mapped.
    pub(crate) fn touch(
        &mut self,
        engine: usize,
        now: Duration,
        touch: Touch,
        addr: u64,
        len: usize,
        write: Option<&[u8]>,
    ) -> Option<(u64, usize)> {
        let Some((base, offset)) = self.spaces[engine].find(addr, len) else {
            let text =
                format!("engine {engine}: {touch:?} touches {addr:#x}, which is not registered");
            self.fail(Promise::QuietAfterEnd, text);
            return None;
        };
        let region = &self.spaces[engine].regions[&base];
        if !region.mapped {
            return None;
        }
        let (cell, last) = (offset / CELL, (offset + len.max(1) - 1) / CELL);
        let role = region.cells[cell];
        let (closing, access) = (region.closing, region.access);
        let verb = if write.is_some() { "writes" } else { "reads" };
        let what = format!("engine {engine}: {touch:?} {verb} {len} bytes at {addr:#x}, {role:?}");
        let (number, own) = match (role, write.is_some()) {
            (Role::Source { transfer, own }, false) | (Role::Target { transfer, own }, true) => {
                (transfer, own)
            }
            (Role::Spoilt { transfer, quiet: true }, true) => {
                let text = format!("{what}, after the end of {transfer}, which was cancelled");
                self.fail(Promise::QuietAfterEnd, text);
                return None;
            }
            // Its late frames, which were under way.
            (Role::Spoilt { transfer, quiet: false }, true) => (transfer, false),
            // What a peer reads is harmless as long as it may.
            (_, false) if matches!(touch, Touch::Served(_) | Touch::Device(_)) => {
                if !access.allows(Access::REMOTE_READ) {
                    self.fail(Promise::Admitted, what);
                }
                return Some((base, offset));
            }
            _ => {
                let forged = self.transfers.iter().any(|t| t.forged && t.to == engine && !t.ended);
                let promise = if forged { Promise::Admitted } else { Promise::QuietAfterEnd };
                self.fail(promise, format!("{what}, which nothing has to touch"));
                return None;
            }
        };
        let transfer = &self.transfers[number];
        let wrong = if cell != last {
            Some((Promise::Data, "and leaves its cell"))
        } else {
            match touch {
                Touch::Own if !own => Some((Promise::Data, "of another engine's transfer")),
                Touch::Own if !transfer.is_in_flight() => {
                    Some((Promise::QuietAfterEnd, "after the end of its transfer"))
                }
                Touch::Own => None,
                Touch::Served(peer) | Touch::Device(peer)
                    if own || peer != transfer.incarnation =>
                {
                    // Where the peer asks for what it must not have, it has got it.
                    let asks = |t: &Transfer| t.forged && (t.incarnation, t.to) == (peer, engine);
                    let forged = self.transfers.iter().any(|t| asks(t) && !t.ended);
                    let promise = if forged { Promise::Admitted } else { Promise::Data };
                    Some((promise, "of somebody else's transfer"))
                }
                Touch::Served(_) | Touch::Device(_)
                    if write.is_some() && transfer.ended && transfer.done =>
                {
                    Some((Promise::QuietAfterEnd, "after the transfer was done"))
                }
                Touch::Served(_) if closing.is_some_and(|since| since < transfer.posted) => {
                    Some((Promise::Admitted, "though deregistration began before it"))
                }
                // A device takes what comes until the region is gone.
                Touch::Served(_) | Touch::Device(_) => {
                    let needs =
                        if write.is_some() { Access::REMOTE_WRITE } else { Access::REMOTE_READ };
                    (!access.allows(needs)).then_some((Promise::Admitted, "without permission"))
                }
            }
        };
        if let Some((promise, why)) = wrong {
            self.fail(promise, format!("{what} {why} ({number}) at {now:?}"));
            return None;
        }
        if let Some(bytes) = write {
            let index = transfer.cells.iter().position(|(here, there)| {
                let cell_ref = if own { Some(*here) } else { *there };
                cell_ref.is_some_and(|c| c.base == base && c.index == cell)
            });
            let start = offset % CELL;
            let right = index.is_some_and(|index| {
                let mut all = bytes.iter().enumerate();
                start + len <= transfer.len
                    && all.all(|(at, byte)| *byte == Self::byte(transfer, index, start + at))
            });
            if !right {
                self.fail(Promise::Data, format!("{what}: other bytes than transfer {number} has"));
                return None;
            }
            self.bytes_moved += len as u64;
        }
        Some((base, offset))
    }

    /// An application has taken a notification.
    pub(crate) fn take(&mut self, engine: usize, bytes: &[u8]) {
        let id = bytes.first_chunk::<8>().map_or(usize::MAX, |id| u64::from_le_bytes(*id) as usize);
        let incarnation = self.incarnations[engine];
        let Some(note) = self.notes.get(id) else {
            return self
                .fail(Promise::Data, format!("engine {engine} sees a notification never sent"));
        };
        let what = format!(
            "engine {engine} sees notification {id} of engine {} ({:?})",
            note.from, note.kind
        );
        if bytes != note_bytes(id, note.len) {
            return self.fail(Promise::Data, format!("{what} with other bytes"));
        }
        if (note.to, note.to_incarnation) != (engine, incarnation) {
            return self.fail(Promise::NotifiedOnce, format!("{what}, which is not for it"));
        }
        if note.seen {
            return self.fail(Promise::NotifiedOnce, format!("{what} again"));
        }
        let (kind, from, loading) = (note.kind, note.from_incarnation, note.loading);
        self.notes[id].seen = true;
        match kind {
            NoteKind::Free => {
                let pair = self.pair(from, incarnation);
                // What waited for an application that unloads the peer comes when it comes.
                let forgot = pair.forgot;
                let last = pair.last_free.replace((loading, id));
                if let Some((_, last)) = last.filter(|l| l.0 == loading && l.1 > id && !forgot) {
                    self.fail(Promise::InOrder, format!("{what} after {last}"));
                }
            }
            NoteKind::Bound(number) => {
                let transfer = &self.transfers[number];
                if transfer.operation == Operation::Read
                    && !matches!(transfer.handle.state(), State::Done)
                {
                    let text = format!("{what}, and its READ {number} is not done");
                    return self.fail(Promise::AfterData, text);
                }
                if transfer.operation == Operation::Write && !self.has_arrived(number) {
                    let text = format!("{what}, and the data of WRITE {number} is not there");
                    self.fail(Promise::AfterData, text);
                }
            }
        }
    }
}
