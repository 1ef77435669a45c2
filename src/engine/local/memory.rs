//! Memory of the engine, shared with peers on this host.

use super::{Theirs, frame};
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::engine::lane::LaneDriver;
use crate::memory::RegionInner;
use crate::sys;
use crate::transport::local::{Mapping, PeerMemory};
use crate::wire::Access;
use crate::wire::RegionKey;
use crate::wire::frame::{FrameKind, Header};

impl LaneDriver {
    /// Tells a peer of all memory of this engine that it may map.
    pub(super) fn share_all(&mut self, slot: usize) {
        let regions: Vec<Arc<RegionInner>> = self
            .engine
            .registry()
            .all()
            .filter(|region| region.memory().is_some())
            .cloned()
            .collect();
        for region in regions {
            self.share(slot, &region);
        }
    }

    pub(super) fn share(&mut self, slot: usize, region: &RegionInner) {
        let descriptor = &region.descriptor;
        let Some(memory) = region.memory().filter(|_| descriptor.access != Access::LOCAL) else {
            return;
        };
        let Some(attachment) = self.peers.get_mut(slot).and_then(|peer| peer.local.as_mut()) else {
            return;
        };
        let Ok(fd) = memory.fd_for_peers(descriptor.access.allows(Access::REMOTE_WRITE)) else {
            // It is reached as other memory is.
            return;
        };
        let mut share = frame(FrameKind::Share, u16::from(descriptor.access.bits()));
        share.header.key = descriptor.key.0;
        share.header.addr = descriptor.base;
        share.header.id = descriptor.len;
        share.fds.push(fd);
        attachment.outgoing.push_back(share);
        self.mark(slot);
    }

    pub(in crate::engine) fn share_with_all(&mut self, region: &RegionInner) {
        for slot in self.rings.clone() {
            self.share(slot, region);
        }
    }

    pub(in crate::engine) fn unshare_with_all(&mut self, region: &RegionInner) {
        if region.memory().is_none() {
            return;
        }
        for slot in self.rings.clone() {
            if let Some(attachment) = self.peers.get_mut(slot).and_then(|peer| peer.local.as_mut())
            {
                let mut unshare = frame(FrameKind::Unshare, 0);
                unshare.header.key = region.descriptor.key.0;
                attachment.outgoing.push_back(unshare);
                self.mark(slot);
            }
        }
    }
}

pub(super) fn take_share(theirs: &Theirs, header: &Header, fds: &sys::Fds) -> Result<(), String> {
    let [fd] = &fds[..] else { return Err("SHARE without its descriptor".into()) };
    let writable = header.status & u16::from(Access::REMOTE_WRITE.bits()) != 0;
    let len = usize::try_from(header.id).map_err(|_| "SHARE of more than fits".to_owned())?;
    let most = len.saturating_add(4 << 20);
    match Mapping::received(fd.as_fd(), len.max(1)..=most, writable, theirs.same_user) {
        Ok(map) => {
            if let Some(memory) = PeerMemory::new(map, header.addr, header.id, writable) {
                theirs.path.map(RegionKey(header.key), memory);
            }
        }
        // It is reached as other memory is.
        Err(reason) => tracing::debug!(reason, "memory of a peer's engine is not mapped"),
    }
    Ok(())
}
