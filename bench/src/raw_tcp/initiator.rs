//! The side that asks.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{ACK_LEN, Kind, REQUEST_LEN, Request, configure, receive, send_all, try_receive};
use crate::arena::Arena;
use crate::case::{MAX_NOTIFICATION, Operation};
use crate::clock::now_ns;
use crate::layout::{Layout, WARM_LEN};
use crate::measure::{Initiator, OPERATION_TIMEOUT_NS, Stamp};

/// One connection to a [`super::RawTarget`]; answers come in the order of the requests.
pub(crate) struct RawInitiator {
    pub(super) stream: TcpStream,
    arena: Arena,
    operation: Operation,
    /// Per slot, where its bytes lie here and there; the last one is for warming up.
    slots: Vec<Place>,
    in_flight: VecDeque<usize>,
    /// Bytes of the oldest answer that have arrived.
    have: usize,
    ack: [u8; ACK_LEN],
}

#[derive(Clone, Copy)]
struct Place {
    local: u64,
    remote: u64,
    len: usize,
}

impl RawInitiator {
    pub(crate) fn connect(
        address: SocketAddr,
        arena: Arena,
        operation: Operation,
        layout: &Layout,
    ) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))
            .with_context(|| format!("cannot connect the raw TCP pair to {address}"))?;
        configure(&stream)?;
        let mut slots: Vec<Place> = layout
            .slots
            .iter()
            .map(|slot| Place {
                local: slot.local.first().copied().unwrap_or_default(),
                remote: slot.remote.first().copied().unwrap_or_default(),
                // Gaps included, which blocks of odd sizes have between them.
                len: match (slot.local.first(), slot.local.last()) {
                    (Some(first), Some(last)) => (last - first) as usize + layout.block_bytes,
                    _ => 0,
                },
            })
            .collect();
        slots.push(Place { local: 0, remote: 0, len: WARM_LEN });
        let fits = |place: &Place| arena.contains(place.local, place.len as u64);
        ensure!(slots.iter().all(fits), "the layout does not fit the arena");
        let in_flight = VecDeque::with_capacity(slots.len());
        Ok(Self { stream, arena, operation, slots, in_flight, have: 0, ack: [0; ACK_LEN] })
    }

    fn request(kind: Kind, place: Place, notification_len: usize) -> [u8; REQUEST_LEN] {
        let notification_len = notification_len as u64;
        Request { kind, offset: place.remote, len: place.len as u64, notification_len }.encode()
    }
}

impl Initiator for RawInitiator {
    fn post(&mut self, slot: usize) -> Result<()> {
        let place = self.slots[slot];
        let stream = &self.stream;
        match self.operation {
            Operation::Read => send_all(stream, [&Self::request(Kind::Read, place, 0)])?,
            _ => {
                let header = Self::request(Kind::Write, place, 0);
                self.arena.with_block(place.local, place.len, |block| {
                    send_all(stream, [&header, block])
                })?;
            }
        }
        self.in_flight.push_back(slot);
        Ok(())
    }

    fn post_with_notification(&mut self, slot: usize, payload: &[u8]) -> Result<()> {
        ensure!(payload.len() <= MAX_NOTIFICATION, "notification too long for the baseline");
        let (place, stream) = (self.slots[slot], &self.stream);
        let header = Self::request(Kind::WriteNotify, place, payload.len());
        self.arena.with_block(place.local, place.len, |block| {
            send_all(stream, [&header, block, payload])
        })?;
        self.in_flight.push_back(slot);
        Ok(())
    }

    #[inline]
    fn poll_finished(&mut self) -> Result<Option<usize>> {
        let Some(&slot) = self.in_flight.front() else { return Ok(None) };
        let (have, stream) = (self.have, &self.stream);
        let (len, received) = if self.operation == Operation::Read {
            let place = self.slots[slot];
            let rest = place.local + have as u64;
            let received = self
                .arena
                .with_block(rest, place.len - have, |block| try_receive(stream, block))?;
            (place.len, received)
        } else {
            (ACK_LEN, try_receive(stream, &mut self.ack[have..])?)
        };
        let Some(received) = received else { return Ok(None) };
        self.have += received;
        if self.have < len {
            return Ok(None);
        }
        self.have = 0;
        Ok(self.in_flight.pop_front())
    }

    async fn finished(&mut self) -> Result<usize> {
        // An answered bound write has nothing more to come: its answer is its acknowledgement.
        if self.operation == Operation::WriteNotify {
            return self.in_flight.pop_front().context("nothing was posted");
        }
        let mut polls = 0u32;
        let mut deadline = u64::MAX;
        loop {
            if let Some(slot) = self.poll_finished()? {
                return Ok(slot);
            }
            polls = polls.wrapping_add(1);
            if polls.is_multiple_of(4096) {
                let now = now_ns();
                if deadline == u64::MAX {
                    deadline = now + OPERATION_TIMEOUT_NS;
                }
                ensure!(now < deadline, "the raw TCP pair did not answer within 30 s");
            }
        }
    }

    fn notify(&mut self, payload: &[u8]) -> Result<()> {
        ensure!(payload.len() <= MAX_NOTIFICATION, "notification too long for the baseline");
        let nowhere = Place { local: 0, remote: 0, len: 0 };
        let header = Self::request(Kind::Notify, nowhere, payload.len());
        send_all(&self.stream, [&header, payload])
    }

    async fn answer(&mut self) -> Result<u64> {
        let mut answer = [0; Stamp::LEN];
        receive(&self.stream, &mut answer)?;
        Ok(Stamp::decode(&answer).context("a short answer")?.sequence)
    }

    async fn idle_until(&mut self, at_ns: u64) {
        crate::pinning::sleep_then_spin_until(at_ns);
    }

    async fn relax(&mut self) {}
}
