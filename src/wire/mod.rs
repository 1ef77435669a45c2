//! Every byte format of the engine: one small, total decoder each.
//!
//! Bytes from outside are hostile. A decoder of this module gives a value or a typed error for any
//! input: it never panics, never allocates more than the limit it states, and never reads past the
//! end. Integers are little-endian.

mod codec;
pub(crate) mod frame;
pub(crate) mod hello;
mod metadata;
pub(crate) mod rdma;
mod region;

pub(crate) use codec::{Reader, Writer};
pub(crate) use metadata::Metadata;
pub use region::{Access, MemoryKind, RegionDescriptor};
pub(crate) use region::{DeviceMemory, MAX_RAILS, RailKeys, RegionKey};

/// The first 32 bits of the SHA-256 of `bytes`: tells damaged bytes from whole ones (not from
/// forged ones: that is what the keyed proof of the handshake is for).
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(bytes);
    u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]])
}
