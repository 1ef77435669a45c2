//! All peers of an engine, for the control plane.

use std::collections::HashMap;
use std::sync::Arc;

use super::PeerShared;
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::wire::Metadata;
use crate::wire::hello::Refusal;

/// The lane that owns a peer: the same whoever connects.
pub(crate) fn home_lane(incarnation: u128, lanes: usize) -> usize {
    ((incarnation as u64 ^ (incarnation >> 64) as u64) % lanes.max(1) as u64) as usize
}

/// What loading metadata came to.
pub(crate) struct Loaded {
    pub(crate) peer: Arc<PeerShared>,
    /// The peer that had the name before.
    pub(crate) replaced: Option<Arc<PeerShared>>,
}

/// Peers by incarnation, and the names that the application has loaded.
pub(crate) struct PeerTable {
    by_incarnation: HashMap<u128, Arc<PeerShared>>,
    loaded: HashMap<Arc<str>, u128>,
    lanes: usize,
    limits: Limits,
}

impl PeerTable {
    pub(crate) fn new(lanes: usize, limits: Limits) -> Self {
        Self { by_incarnation: HashMap::new(), loaded: HashMap::new(), lanes, limits }
    }

    fn is_full(&self) -> bool {
        self.by_incarnation.len() >= self.limits.peers
    }

    /// Adds the metadata of a peer.
    pub(crate) fn load(&mut self, metadata: Metadata) -> Result<Loaded> {
        let incarnation = metadata.incarnation;
        let metadata = Arc::new(metadata);
        let peer = match self.by_incarnation.get(&incarnation) {
            Some(known) => {
                known.set_metadata(metadata);
                known.set_unreachable(None);
                known.clone()
            }
            None if self.is_full() => {
                return Err(Error::Limit {
                    what: "peers",
                    value: self.by_incarnation.len() as u64 + 1,
                    limit: self.limits.peers as u64,
                });
            }
            None => {
                let name: Arc<str> = metadata.name.as_str().into();
                let lane = home_lane(incarnation, self.lanes);
                let peer = PeerShared::new(name, incarnation, lane, Some(metadata), &self.limits);
                let peer = Arc::new(peer);
                self.by_incarnation.insert(incarnation, peer.clone());
                peer
            }
        };
        let before = self.loaded.insert(peer.name.clone(), incarnation);
        let replaced = before
            .filter(|before| *before != incarnation)
            // Taken out at once: should it connect again, the name is not its own any more.
            .and_then(|before| self.by_incarnation.remove(&before));
        if let Some(replaced) = &replaced {
            replaced.replace();
        }
        Ok(Loaded { peer, replaced })
    }

    /// The peer behind an incoming link, which has proven that it holds our metadata.
    pub(crate) fn admit(
        &mut self,
        name: &str,
        incarnation: u128,
    ) -> Result<(Arc<PeerShared>, bool), Refusal> {
        if let Some(known) = self.by_incarnation.get(&incarnation) {
            return if &*known.name == name {
                Ok((known.clone(), false))
            } else {
                Err(Refusal::Proof)
            };
        }
        // Where a name's metadata is loaded, only who has its secret may use the name; and a name
        // that is alive belongs to who has it.
        let taken = self.loaded.contains_key(name)
            || self.by_incarnation.values().any(|peer| {
                &*peer.name == name && peer.connected.load(std::sync::atomic::Ordering::Acquire)
            });
        if taken {
            return Err(Refusal::NameInUse);
        }
        if self.is_full() {
            return Err(Refusal::Limit);
        }
        let lane = home_lane(incarnation, self.lanes);
        let peer = Arc::new(PeerShared::new(name.into(), incarnation, lane, None, &self.limits));
        self.by_incarnation.insert(incarnation, peer.clone());
        Ok((peer, true))
    }

    pub(crate) fn contains(&self, incarnation: u128) -> bool {
        self.by_incarnation.contains_key(&incarnation)
    }

    /// The secret of an incarnation whose metadata is loaded.
    pub(crate) fn secret_of(&self, incarnation: u128) -> Option<[u8; 32]> {
        self.by_incarnation.get(&incarnation)?.metadata().map(|metadata| metadata.secret)
    }

    /// The loaded peer of this name.
    pub(crate) fn named(&self, name: &str) -> Option<&Arc<PeerShared>> {
        self.by_incarnation.get(self.loaded.get(name)?)
    }

    /// Removes a peer that is not loaded (any more); false: it is.
    pub(crate) fn forget(&mut self, peer: &Arc<PeerShared>) -> bool {
        let forget = !peer.is_loaded();
        if forget {
            self.remove(peer);
        }
        forget
    }

    pub(crate) fn remove(&mut self, peer: &Arc<PeerShared>) {
        let known = self.by_incarnation.get(&peer.incarnation);
        if known.is_some_and(|known| Arc::ptr_eq(known, peer)) {
            self.by_incarnation.remove(&peer.incarnation);
        }
        if self.loaded.get(&peer.name) == Some(&peer.incarnation) {
            self.loaded.remove(&peer.name);
        }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<PeerShared>> {
        self.by_incarnation.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(name: &str, incarnation: u128) -> Metadata {
        Metadata {
            name: name.into(),
            incarnation,
            secret: [1; 32],
            transports: 1,
            addresses: vec![],
        }
    }

    #[test]
    fn a_loaded_name_admits_only_its_own_incarnation() {
        let mut table = PeerTable::new(1, Limits::default());
        let Loaded { peer: loaded, .. } = table.load(metadata("a", 1)).unwrap();
        assert!(Arc::ptr_eq(&table.admit("a", 1).unwrap().0, &loaded));
        assert_eq!(table.admit("a", 2).unwrap_err(), Refusal::NameInUse);
        assert_eq!(table.admit("b", 1).unwrap_err(), Refusal::Proof);
        let again = table.load(metadata("a", 2)).unwrap();
        assert!(Arc::ptr_eq(again.replaced.as_ref().unwrap(), &loaded));
        assert!(table.forget(&loaded) && !table.forget(&again.peer));
        assert_eq!(table.named("a").unwrap().incarnation, 2);
        assert!(table.admit("a", 2).is_ok());
    }

    #[test]
    fn a_live_name_cannot_be_taken_over_but_a_dead_one_can() {
        let mut table = PeerTable::new(1, Limits::default());
        let (first, _) = table.admit("a", 1).unwrap();
        first.connected.store(true, std::sync::atomic::Ordering::Release);
        assert_eq!(table.admit("a", 2).unwrap_err(), Refusal::NameInUse);
        first.connected.store(false, std::sync::atomic::Ordering::Release);
        assert!(table.admit("a", 2).is_ok());
    }

    #[test]
    fn an_inbound_peer_gets_its_metadata_later() {
        let mut table = PeerTable::new(1, Limits::default());
        let (inbound, _) = table.admit("a", 1).unwrap();
        assert!(table.secret_of(1).is_none());
        let Loaded { peer: loaded, .. } = table.load(metadata("a", 1)).unwrap();
        assert!(Arc::ptr_eq(&inbound, &loaded));
        assert_eq!(table.secret_of(1), Some([1; 32]));
        table.remove(&loaded);
        assert!(table.named("a").is_none());
    }

    #[test]
    fn the_limit_holds_for_both_directions() {
        let mut table = PeerTable::new(1, Limits { peers: 1, ..Limits::default() });
        table.load(metadata("a", 1)).unwrap();
        assert!(matches!(table.load(metadata("b", 2)), Err(Error::Limit { .. })));
        assert_eq!(table.admit("b", 2).unwrap_err(), Refusal::Limit);
    }
}
