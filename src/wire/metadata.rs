//! The metadata string of an engine: who it is, its secret, and where it listens.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Reader, Writer, checksum};
use crate::config::MAX_AGENT_NAME;
use crate::error::{Error, Result};

const MAGIC: u32 = u32::from_le_bytes(*b"CLMD");
const FORMAT: u16 = 1;
/// More addresses than any host lists; a longer list is refused.
const MAX_ADDRESSES: usize = 256;

/// What `Engine::metadata` encodes.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Metadata {
    pub(crate) name: String,
    pub(crate) incarnation: u128,
    /// Proven in the handshake; never logged.
    pub(crate) secret: [u8; 32],
    pub(crate) transports: u32,
    pub(crate) addresses: Vec<SocketAddr>,
}

impl std::fmt::Debug for Metadata {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metadata")
            .field("name", &self.name)
            .field("incarnation", &format_args!("{:032x}", self.incarnation))
            .field("transports", &self.transports)
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl Metadata {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(MAGIC).u16(FORMAT).string(&self.name).u128(self.incarnation).raw(&self.secret);
        w.u32(self.transports).u16(self.addresses.len().min(MAX_ADDRESSES) as u16);
        for address in self.addresses.iter().take(MAX_ADDRESSES) {
            match address.ip() {
                IpAddr::V4(ip) => w.u8(4).raw(&ip.octets()),
                IpAddr::V6(ip) => w.u8(6).raw(&ip.octets()),
            };
            w.u16(address.port());
        }
        let sum = checksum(w.as_bytes());
        w.u32(sum);
        w.finish()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let bad = |why: &str| Error::malformed("metadata", why);
        let Some((payload, sum)) = bytes.split_last_chunk::<4>() else {
            return Err(bad("it is too short"));
        };
        let mut r = Reader::new(payload);
        if r.u32() != Some(MAGIC) {
            return Err(bad(
                "these bytes are not corelane metadata (was another backend's given?)",
            ));
        }
        match r.u16() {
            Some(FORMAT) => {}
            Some(other) => {
                return Err(bad(&format!(
                    "it has format {other}, this version reads {FORMAT}: use the same corelane \
                     version on both sides"
                )));
            }
            None => return Err(bad("it is too short")),
        }
        if checksum(payload) != u32::from_le_bytes(*sum) {
            return Err(bad("its checksum is wrong: it was cut or altered on the way"));
        }
        Self::decode_fields(&mut r).ok_or_else(|| bad("its fields are inconsistent"))
    }

    fn decode_fields(r: &mut Reader<'_>) -> Option<Self> {
        let name = r.string(MAX_AGENT_NAME).filter(|name| !name.is_empty())?.to_owned();
        let incarnation = r.u128()?;
        let secret = r.array::<32>()?;
        let transports = r.u32()?;
        let count = usize::from(r.u16()?);
        if count > MAX_ADDRESSES {
            return None;
        }
        let mut addresses = Vec::with_capacity(count);
        for _ in 0..count {
            let ip = match r.u8()? {
                4 => IpAddr::V4(Ipv4Addr::from(r.array::<4>()?)),
                6 => IpAddr::V6(Ipv6Addr::from(r.array::<16>()?)),
                _ => return None,
            };
            addresses.push(SocketAddr::new(ip, r.u16()?));
        }
        r.is_empty().then_some(Self { name, incarnation, secret, transports, addresses })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Metadata {
        Metadata {
            name: "prefill-0".into(),
            incarnation: 7 << 100 | 5,
            secret: [9; 32],
            transports: 1,
            addresses: vec!["10.0.0.1:5000".parse().unwrap(), "[fe80::1]:5001".parse().unwrap()],
        }
    }

    #[test]
    fn survives_the_round_trip() {
        assert_eq!(Metadata::decode(&sample().encode()).unwrap(), sample());
    }

    #[test]
    fn every_truncation_and_every_altered_byte_is_refused() {
        let bytes = sample().encode();
        for len in 0..bytes.len() {
            assert!(Metadata::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        for at in 0..bytes.len() {
            let mut altered = bytes.clone();
            altered[at] ^= 0x40;
            assert!(Metadata::decode(&altered).is_err(), "byte {at}");
        }
    }

    #[test]
    fn another_format_says_so() {
        let mut bytes = sample().encode();
        bytes[4] = 9;
        let message = Metadata::decode(&bytes).unwrap_err().to_string();
        assert!(message.contains("format 9"), "{message}");
    }

    #[test]
    fn debug_output_hides_the_secret() {
        assert!(!format!("{:?}", sample()).contains("9, 9"));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_value_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Metadata::decode(&bytes);
            let mut framed = MAGIC.to_le_bytes().to_vec();
            framed.extend(FORMAT.to_le_bytes());
            framed.extend(&bytes);
            let sum = checksum(&framed);
            framed.extend(sum.to_le_bytes());
            if let Ok(value) = Metadata::decode(&framed) {
                prop_assert_eq!(value.encode(), framed);
            }
        }
    }
}
