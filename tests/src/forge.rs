//! What an attacker, or another version of corelane, could make of the bytes that engines publish.

use std::ops::Range;

use corelane::RegionDescriptor;
use sha2::{Digest, Sha256};

/// Both formats end in the first four bytes of the SHA-256 of what comes before.
fn seal(bytes: &mut [u8]) {
    let body = bytes.len() - 4;
    let digest = Sha256::digest(&bytes[..body]);
    bytes[body..].copy_from_slice(&digest[..4]);
}

/// A field of a region descriptor's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DescriptorField {
    /// What peers may do: bit 0 read, bit 1 write.
    Access,
    /// The owner's incarnation.
    Incarnation,
    /// The random part of the key.
    KeySecret,
    /// The slot in the key.
    KeySlot,
    /// Address of the first byte.
    Base,
    /// Length in bytes.
    Len,
    /// The key of the owner's device with this number.
    DeviceKey(usize),
}

impl DescriptorField {
    fn place(self) -> Range<usize> {
        match self {
            Self::Access => 6..7,
            Self::Incarnation => 12..28,
            Self::KeySlot => 28..32,
            Self::KeySecret => 32..44,
            Self::Base => 44..52,
            Self::Len => 52..60,
            // Behind how many there are.
            Self::DeviceKey(device) => 61 + 4 * device..65 + 4 * device,
        }
    }
}

/// Of how many devices a descriptor has keys.
pub fn device_keys(descriptor: &RegionDescriptor) -> usize {
    usize::from(descriptor.to_bytes()[60])
}

/// A descriptor with one field changed (`change` gets and gives its low 64 bits) and a matching checksum.
pub fn forge_descriptor(
    original: &RegionDescriptor,
    field: DescriptorField,
    change: impl FnOnce(u64) -> u64,
) -> RegionDescriptor {
    let mut bytes = original.to_bytes();
    let place = field.place();
    let width = place.len().min(8);
    let mut word = [0; 8];
    word[..width].copy_from_slice(&bytes[place.start..place.start + width]);
    let changed = change(u64::from_le_bytes(word)).to_le_bytes();
    bytes[place.start..place.start + width].copy_from_slice(&changed[..width]);
    seal(&mut bytes);
    RegionDescriptor::from_bytes(&bytes).expect("a forged descriptor with a good checksum")
}

/// Metadata with changed bytes and a matching checksum.
pub fn forge_metadata(original: &[u8], change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = original.to_vec();
    let body = bytes.len() - 4;
    change(&mut bytes[..body]);
    seal(&mut bytes);
    bytes
}

/// Metadata (of an engine with one IPv4 address) with another secret.
pub fn forge_secret(original: &[u8]) -> Vec<u8> {
    // Behind the secret: transports 4, count 2, one address 7.
    forge_metadata(original, |body| {
        let end = body.len() - 13;
        body[end - 32] ^= 1;
    })
}
