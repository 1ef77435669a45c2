//! Engines of one host that copy by themselves: what [`crate::engine`] does for transport `local`, with the copies cut into
//! steps that the world puts between those of others. Tables, announcements and waiting are the real ones, in real shared
//! memory; only the bytes are the world's.

use std::collections::VecDeque;
use std::sync::Arc;

use super::coverage::Event as Input;
use super::node::{Node, Outside};
use crate::error::Error;
use crate::sys::IoSegment;
use crate::transfer::TransferShared;
use crate::transport::local::{
    self, Accessor, Accessors, CopyError, InProgress, LocalPath, OwnedUse, PathParts, PeerProcess,
    Pid, SharedFd, Table, TableView, Uses,
};
use crate::wire::RegionDescriptor;
use crate::wire::frame::ServeStatus;

/// Threads of an engine that copy.
const COPIERS: usize = 3;
/// Bytes of a step.
const STEP: u64 = 1500;

/// What one engine lets another map.
#[derive(Debug, Clone)]
pub struct Shared {
    table: SharedFd,
    channel: SharedFd,
}

/// What a step of a copy came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// The bytes are there.
    Done,
    /// The other process is gone.
    Gone,
    /// Memory of this engine is not mapped.
    OwnFault,
    /// Memory of the other is not mapped.
    PeerFault,
}

/// The shared memory of one session.
pub(super) struct Attachment {
    pub(super) link: u64,
    uses: Uses,
    theirs: Option<TableView>,
}

/// What an engine has in common with others of its host.
pub(super) struct Neighbours {
    limit: usize,
    /// Made when it is needed first.
    table: Option<Table>,
    accessors: Accessors,
    /// Whose they are.
    known: Vec<(u128, Arc<Accessor>)>,
    waiting: VecDeque<Arc<TransferShared>>,
    copying: Vec<Copying>,
    published: Vec<RegionDescriptor>,
}

/// A chunk on its way.
struct Copying {
    shared: Arc<TransferShared>,
    path: Arc<LocalPath>,
    announced: Option<OwnedUse>,
    left: VecDeque<(u64, u64, usize)>,
}

/// Pairs of ranges of the same length, here and there.
fn pairs(local: &[IoSegment], remote: &[IoSegment]) -> VecDeque<(u64, u64, usize)> {
    let mut pairs = VecDeque::new();
    let (mut local, mut remote) = (local.to_vec(), remote.to_vec());
    local.reverse();
    remote.reverse();
    while let (Some(here), Some(there)) = (local.pop(), remote.pop()) {
        let len = here.len().min(there.len());
        pairs.push_back((here.addr(), there.addr(), len));
        for (list, segment) in [(&mut local, here), (&mut remote, there)] {
            if segment.len() > len {
                list.push(segment.advanced(len));
            }
        }
    }
    pairs
}

impl Neighbours {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            table: None,
            accessors: Accessors::default(),
            known: Vec::new(),
            waiting: VecDeque::new(),
            copying: Vec::new(),
            published: Vec::new(),
        }
    }

    pub(super) fn publish(&mut self, region: &RegionDescriptor) {
        match &self.table {
            Some(table) => table.publish(region),
            None => self.published.push(region.clone()),
        }
    }

    /// Takes a region's key away; the answer are the copies that may have seen it.
    pub(super) fn close(&mut self, region: &RegionDescriptor) -> InProgress {
        self.published.retain(|known| known.key != region.key);
        if let Some(table) = &self.table {
            table.close(region);
        }
        self.accessors.in_progress(Some(region.key.place()))
    }

    pub(super) fn shut(&self) {
        if let Some(table) = &self.table {
            table.shut();
        }
    }

    fn table(&mut self) -> Result<&Table, String> {
        if self.table.is_none() {
            let table = Table::create(self.limit).map_err(|error| error.to_string())?;
            self.published.drain(..).for_each(|region| table.publish(&region));
            self.table = Some(table);
        }
        self.table.as_ref().ok_or_else(|| "no table".into())
    }
}

impl Node {
    /// A session is up: what the peer is to map.
    pub(super) fn share(&mut self, slot: usize, link: u64, out: &mut dyn Outside) {
        let made = self.neighbours.table().map(Table::fd).and_then(|table| {
            let (producer, channel) = local::create_channel().map_err(|error| error.to_string())?;
            Ok((producer.uses(), Shared { table, channel }))
        });
        let Ok((uses, shared)) = made else { return };
        out.share(link, shared);
        self.peers[slot].local = Some(Attachment { link, uses, theirs: None });
    }

    /// Maps what the peer has shared.
    pub(super) fn take_shared(
        &mut self,
        slot: usize,
        link: u64,
        out: &mut dyn Outside,
    ) -> Result<(), String> {
        let shared = out.shared(link).ok_or("descriptors are missing")?;
        let theirs = TableView::open(&*shared.table)?;
        let uses = local::open_channel(&*shared.channel)?.uses();
        let process = PeerProcess::new(None, None, None, false);
        let accessor = Arc::new(Accessor::new(None, uses, process));
        let peer = &mut self.peers[slot];
        self.neighbours.known.push((peer.core.peer.incarnation, accessor.clone()));
        if !self.neighbours.accessors.add(accessor) {
            return Err("too many sessions ended with copies".into());
        }
        if let Some(attachment) = peer.local.as_mut() {
            attachment.theirs = Some(theirs);
        }
        Ok(())
    }

    /// The way to the peer's memory, where there is one.
    pub(super) fn local_path(&mut self, slot: usize) -> Option<Arc<LocalPath>> {
        let peer = &mut self.peers[slot];
        let attachment = peer.local.as_mut()?;
        let (reach, reason) = local::reach(Some(Pid::own()), true, (0, [0; 16]));
        Some(Arc::new(LocalPath::new(PathParts {
            peer: peer.core.peer.name.clone(),
            reach,
            reason,
            table: attachment.theirs.take()?,
            life: None,
            uses: attachment.uses.clone(),
            nonce: (0, [0; 16]),
            strict_writes: false,
        })))
    }

    /// The process of this incarnation has died, and the kernel says so.
    pub fn process_has_died(&mut self, incarnation: u128) {
        for (_, accessor) in self.neighbours.known.iter().filter(|known| known.0 == incarnation) {
            accessor.process.set_disconnected();
        }
        self.neighbours.known.retain(|known| known.0 != incarnation);
    }

    /// This engine's process dies: what it has announced is never taken back.
    pub fn die(self) {
        for copying in self.neighbours.copying {
            if let Some(announced) = copying.announced {
                announced.never_ends();
            }
        }
    }

    /// Takes up what a core has to copy.
    pub(super) fn take_copies(&mut self, slot: usize) {
        while let Some(transfer) = self.peers.get_mut(slot).and_then(|peer| peer.core.next_copy()) {
            self.neighbours.waiting.push_back(transfer);
        }
    }

    /// Chunks that wait or are on their way.
    pub fn copies(&self) -> usize {
        self.neighbours.waiting.len() + self.neighbours.copying.len()
    }

    /// A step of one of the threads that copy.
    pub fn copy_some(&mut self, out: &mut dyn Outside) {
        if self.neighbours.copying.len() < COPIERS
            && let Some(transfer) = self.neighbours.waiting.pop_front()
        {
            self.claim_chunk(transfer);
        }
        let count = self.neighbours.copying.len() as u64;
        if count > 0 {
            let index = (out.random() % count) as usize;
            let most = 1 + out.random() % STEP;
            self.copy_step(index, most as usize, out);
        }
    }

    fn claim_chunk(&mut self, shared: Arc<TransferShared>) {
        let plan = shared.plan.clone();
        let Some((chunk, path)) = shared.copy.claim(plan.parts()) else { return };
        let left = pairs(plan.chunk_local(chunk), plan.chunk_remote(chunk));
        // Others may take the next.
        self.neighbours.waiting.push_back(shared.clone());
        self.neighbours.copying.push(Copying { shared, path, announced: None, left });
    }

    fn copy_step(&mut self, index: usize, most: usize, out: &mut dyn Outside) {
        let copying = &mut self.neighbours.copying[index];
        let plan = copying.shared.plan.clone();
        if copying.announced.is_none() {
            match copying.path.begin_on_device(&plan) {
                Ok(announced) => copying.announced = Some(announced),
                Err(CopyError::Busy) => {}
                Err(CopyError::Failed(error)) => self.end_chunk(index, Err(error)),
            }
            return;
        }
        let Some((local, remote, len)) = copying.left.pop_front() else {
            return self.end_chunk(index, Ok(()));
        };
        let some = len.min(most);
        if some < len {
            copying.left.push_front((local + some as u64, remote + some as u64, len - some));
        }
        let peer = &plan.peer;
        match out.copy(peer.incarnation, plan.operation, local, remote, some) {
            Copied::Done => {}
            Copied::Gone => self.end_chunk(index, Err(peer.gone("its process has ended"))),
            Copied::OwnFault => self.end_chunk(index, Err(Error::Fault { addr: local })),
            Copied::PeerFault => {
                let (peer, reason) = (peer.name.clone(), ServeStatus::Fault.reason());
                self.end_chunk(index, Err(Error::Permission { peer, reason }));
            }
        }
    }

    fn end_chunk(&mut self, index: usize, outcome: Result<(), Error>) {
        let Copying { shared, announced, .. } = self.neighbours.copying.swap_remove(index);
        drop(announced);
        let last = shared.copy.finish(outcome, shared.plan.parts());
        if last && let Some(slot) = self.slot_of(&shared.plan.peer) {
            self.with_core(slot, Input::Copied, |core, env| core.copied(&shared, env));
        }
    }

    /// Lets the threads that copy come to the end of their chunks: they take microseconds, and are waited for.
    pub(super) fn finish_copies(&mut self, out: &mut dyn Outside) {
        self.neighbours.waiting.clear();
        while !self.neighbours.copying.is_empty() {
            self.copy_step(0, usize::MAX, out);
        }
    }
}
