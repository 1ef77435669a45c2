//! The public form of a registered region.

use smallvec::SmallVec;

use super::{Reader, Writer, checksum};
use crate::error::{Error, Result};

/// What kind of memory a region is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Host memory.
    Dram,
    /// Memory of the GPU with this ordinal.
    Vram {
        /// CUDA device ordinal.
        device: u32,
    },
}

/// What peers may do with a region. The own engine may always do both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Access(u8);

impl Access {
    /// Only this engine's own transfers.
    pub const LOCAL: Self = Self(0);
    /// Peers may read.
    pub const REMOTE_READ: Self = Self(1);
    /// Peers may write.
    pub const REMOTE_WRITE: Self = Self(2);
    /// Peers may read and write.
    pub const READ_WRITE: Self = Self(3);

    /// For shared memory: bits that mean nothing are ignored.
    pub(crate) fn from_bits_truncate(bits: u8) -> Self {
        Self(bits & (Self::READ_WRITE.0 | Self::READ_WRITE.0 << 2))
    }

    /// In shared memory, rights to GPU memory are other bits: no copy of host memory goes there.
    pub(crate) fn of_device(self) -> Self {
        Self(self.0 << 2)
    }

    pub(crate) fn bits(self) -> u8 {
        self.0
    }

    /// Whether all of `other` is allowed.
    pub fn allows(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Names a region to the engine that registered it. The low 32 bits are its slot, the rest is
/// random: a key cannot be guessed from another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RegionKey(pub(crate) u128);

impl RegionKey {
    pub(crate) fn new(slot: u32, random: u128) -> Self {
        Self(random << 32 | u128::from(slot))
    }

    /// Its slot, as shared memory names it.
    pub(crate) fn place(self) -> u32 {
        self.0 as u32
    }

    pub(crate) fn slot(self) -> usize {
        self.0 as u32 as usize
    }

    /// Tells whether somebody knows the key, without giving it away.
    pub(crate) fn digest(self) -> u128 {
        use sha2::{Digest, Sha256};
        let hash =
            Sha256::new_with_prefix(b"corelane region key").chain_update(self.0.to_le_bytes());
        let hash: [u8; 32] = hash.finalize().into();
        let mut short = [0; 16];
        short.copy_from_slice(&hash[..16]);
        // Never what an empty slot has.
        u128::from_le_bytes(short).max(1)
    }
}

impl std::fmt::Debug for RegionKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RegionKey(slot {})", self.slot())
    }
}

/// A region as a peer sees it: where it is, how long, and the key that opens it.
///
/// Who holds a descriptor (and the owner's metadata) can access the region as far as its
/// [`Access`] goes: hand it out like a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionDescriptor {
    pub(crate) incarnation: u128,
    pub(crate) key: RegionKey,
    pub(crate) base: u64,
    pub(crate) len: u64,
    pub(crate) kind: MemoryKind,
    pub(crate) access: Access,
    /// Of GPU memory: where it is, for peers that reach it.
    pub(crate) device: Option<Box<DeviceMemory>>,
    /// Its key on each of the owner's rails, for transport `rdma`; 0: it is not registered there.
    pub(crate) rail_keys: RailKeys,
}

/// The allocation that a region of GPU memory lies in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeviceMemory {
    /// Of the GPU, whatever its number is in another process.
    pub(crate) uuid: [u8; 16],
    /// Of the host that the handle is good on.
    pub(crate) host: u64,
    /// First byte, in the owner's address space.
    pub(crate) base: u64,
    pub(crate) len: u64,
    /// What opens the allocation in another process; `None`: nothing does.
    pub(crate) handle: Option<[u8; 64]>,
}

/// A key for each rail of an engine.
pub(crate) type RailKeys = SmallVec<[u32; 2]>;

/// More rails than any host has.
pub(crate) const MAX_RAILS: usize = 16;

const MAGIC: u32 = u32::from_le_bytes(*b"CLRD");
const FORMAT: u8 = 1;

impl RegionDescriptor {
    /// Address of the first byte, in the owner's address space.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the region has no bytes (never so for a registered one).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Kind of memory.
    pub fn kind(&self) -> MemoryKind {
        self.kind
    }

    /// What its owner allows.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Whether `len` bytes at `addr` lie inside.
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        addr >= self.base && len <= self.len && addr - self.base <= self.len - len
    }

    /// The bytes to hand to a peer; the same on every call.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (kind, device) = match self.kind {
            MemoryKind::Dram => (0, 0),
            MemoryKind::Vram { device } => (1, device),
        };
        let mut w = Writer::new();
        w.u32(MAGIC).u8(FORMAT).u8(kind).u8(self.access.0).u8(0).u32(device);
        w.u128(self.incarnation).u128(self.key.0).u64(self.base).u64(self.len);
        w.u8(self.rail_keys.len() as u8);
        for key in &self.rail_keys {
            w.u32(*key);
        }
        if let Some(memory) = &self.device {
            w.raw(&memory.uuid).u64(memory.host).u64(memory.base).u64(memory.len);
            w.u8(u8::from(memory.handle.is_some()));
            if let Some(handle) = &memory.handle {
                w.raw(handle);
            }
        }
        let sum = checksum(w.as_bytes());
        w.u32(sum);
        w.finish()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// [`Error::Malformed`] for anything else: other bytes, another format, damage.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let bad = |why: &str| Error::malformed("region descriptor", why);
        let Some((payload, sum)) = bytes.split_last_chunk::<4>() else {
            return Err(bad("it is too short"));
        };
        let mut r = Reader::new(payload);
        if r.u32() != Some(MAGIC) {
            return Err(bad("these bytes are not a corelane region descriptor"));
        }
        match r.u8() {
            Some(FORMAT) => {}
            other => return Err(bad(&format!("unknown format {other:?}"))),
        }
        if checksum(payload) != u32::from_le_bytes(*sum) {
            return Err(bad("its checksum is wrong: it was cut or altered on the way"));
        }
        Self::decode_fields(&mut r).ok_or_else(|| bad("its fields are inconsistent"))
    }

    fn decode_fields(r: &mut Reader<'_>) -> Option<Self> {
        let kind = r.u8()?;
        let access = Access(r.u8().filter(|bits| *bits <= 3)?);
        r.u8().filter(|pad| *pad == 0)?;
        let device = r.u32()?;
        let kind = match (kind, device) {
            (0, 0) => MemoryKind::Dram,
            (1, device) => MemoryKind::Vram { device },
            _ => return None,
        };
        let (incarnation, key) = (r.u128()?, RegionKey(r.u128()?));
        let (base, len) = (r.u64()?, r.u64()?);
        base.checked_add(len)?;
        let rails = usize::from(r.u8()?);
        if rails > MAX_RAILS {
            return None;
        }
        let rail_keys = (0..rails).map(|_| r.u32()).collect::<Option<RailKeys>>()?;
        let device = match kind {
            MemoryKind::Dram => None,
            MemoryKind::Vram { .. } => Some(Box::new(DeviceMemory::decode(r, base, len)?)),
        };
        r.is_empty().then_some(Self {
            incarnation,
            key,
            base,
            len,
            kind,
            access,
            device,
            rail_keys,
        })
    }
}

impl DeviceMemory {
    /// Reads the allocation of a region, which must lie inside.
    fn decode(r: &mut Reader<'_>, region: u64, region_len: u64) -> Option<Self> {
        let (uuid, host) = (r.array()?, r.u64()?);
        let (base, len) = (r.u64()?, r.u64()?);
        let end = base.checked_add(len)?;
        let handle = match r.u8()? {
            0 => None,
            1 => Some(r.array()?),
            _ => return None,
        };
        let inside = region >= base && region.checked_add(region_len)? <= end;
        // Memory without a handle may be several allocations in a row.
        (inside || handle.is_none()).then_some(Self { uuid, host, base, len, handle })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> RegionDescriptor {
        RegionDescriptor {
            incarnation: 3,
            key: RegionKey::new(17, 0x00ab_cdef),
            base: 0x7000_0000,
            len: 4096,
            kind: MemoryKind::Vram { device: 2 },
            access: Access::READ_WRITE,
            rail_keys: [7, 0, 9].into_iter().collect(),
            device: Some(Box::new(DeviceMemory {
                uuid: [3; 16],
                host: 77,
                base: 0x7000_0000 - 512,
                len: 5000,
                handle: Some([9; 64]),
            })),
        }
    }

    #[test]
    fn survives_the_round_trip() {
        let kind = MemoryKind::Dram;
        let dram = RegionDescriptor { kind, access: Access::LOCAL, device: None, ..sample() };
        let mut unnamed = sample();
        unnamed.device.as_mut().unwrap().handle = None;
        for descriptor in [sample(), dram, unnamed] {
            assert_eq!(RegionDescriptor::from_bytes(&descriptor.to_bytes()).unwrap(), descriptor);
        }
        assert_eq!(sample().key.slot(), 17);
    }

    #[test]
    fn every_truncation_and_every_altered_byte_is_refused() {
        let bytes = sample().to_bytes();
        for len in 0..bytes.len() {
            assert!(RegionDescriptor::from_bytes(&bytes[..len]).is_err(), "{len} bytes");
        }
        for at in 0..bytes.len() {
            let mut altered = bytes.clone();
            altered[at] ^= 1;
            assert!(RegionDescriptor::from_bytes(&altered).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_region_outside_of_its_allocation_is_refused() {
        for (base, len) in [(0x7000_0001, 5000), (0x7000_0000, 4095), (u64::MAX, 2)] {
            let mut altered = sample();
            let memory = altered.device.as_mut().unwrap();
            (memory.base, memory.len) = (base, len);
            assert!(RegionDescriptor::from_bytes(&altered.to_bytes()).is_err(), "{base:#x}, {len}");
        }
    }

    #[test]
    fn containment_does_not_wrap() {
        let d = RegionDescriptor { base: u64::MAX - 10, len: 10, ..sample() };
        assert!(d.contains(u64::MAX - 10, 10));
        assert!(d.contains(u64::MAX, 0));
        assert!(!d.contains(u64::MAX, 1));
        assert!(!d.contains(u64::MAX - 5, u64::MAX));
        assert!(!d.contains(0, 1));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_value_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = RegionDescriptor::from_bytes(&bytes);
            let mut framed = MAGIC.to_le_bytes().to_vec();
            framed.push(FORMAT);
            framed.extend(&bytes);
            let sum = checksum(&framed);
            framed.extend(sum.to_le_bytes());
            if let Ok(value) = RegionDescriptor::from_bytes(&framed) {
                prop_assert_eq!(value.to_bytes(), framed);
            }
        }
    }
}
