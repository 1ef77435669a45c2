//! How packets get to a port of a device, and which of our ports is best for a queue pair of the peer.

use std::cmp::Reverse;
use std::net::{IpAddr, Ipv6Addr};

use smallvec::SmallVec;

use crate::transport::addresses;
use crate::verbs::{Device, Gid};

/// Bits of an address that name its network, where nothing tells how many: a /24 in its IPv6 form, and what IPv6 and InfiniBand have.
const BITS_IPV4: u32 = 120;
const BITS_OTHER: u32 = 64;

/// The address of a port, which may change while queue pairs use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) gid_index: u8,
    pub(crate) gid: Gid,
    pub(crate) lid: u16,
    /// The code of verbs.
    pub(crate) mtu: u8,
    /// How many bits of the GID name the network.
    network_bits: u32,
}

impl Address {
    /// Asks the device; the GID at `gid_index`, or the best. System calls.
    ///
    /// # Errors
    /// The port is down, or has no such address.
    pub(super) fn read(device: &Device, port: u8, gid_index: Option<u8>) -> Result<Self, String> {
        let state = device.port(port)?;
        let name = device.name();
        if !state.active {
            return Err(format!("{name}:{port} is not active"));
        }
        let gid_index = match gid_index {
            Some(index) => index,
            None if !state.ethernet => 0,
            None => {
                let gid = |index| device.gid(port, index);
                choose_gid(state.gids, gid, |index| device.is_roce_v2(port, index))
            }
        };
        let gid = device.gid(port, gid_index);
        if state.ethernet && gid.is_none() {
            return Err(format!("{name}:{port} has no GID at index {gid_index}"));
        }
        let gid = gid.unwrap_or_default();
        let network_bits = network_bits(gid, state.ethernet);
        Ok(Self { gid_index, gid, lid: state.lid, mtu: state.mtu, network_bits })
    }
}

/// RoCE v2 with an IPv4 address, where there is one: what networks route. `gids`: how many places there are.
fn choose_gid(gids: u32, gid: impl Fn(u8) -> Option<Gid>, is_v2: impl Fn(u8) -> bool) -> u8 {
    // Drivers have 256 places and more; later ones cannot be asked for.
    let places = (0..=u8::MAX).take(gids as usize);
    let v2: SmallVec<[(u8, Gid); 16]> = places
        .filter_map(|index| gid(index).map(|gid| (index, gid)))
        .filter(|(index, _)| is_v2(*index))
        .collect();
    let chosen = v2.iter().find(|(_, gid)| ipv4(*gid).is_some()).or(v2.first());
    chosen.map_or(0, |(index, _)| *index)
}

fn ipv4(gid: Gid) -> Option<std::net::Ipv4Addr> {
    Ipv6Addr::from(gid.0).to_ipv4_mapped()
}

/// As the network interface with this address has it.
fn network_bits(gid: Gid, ethernet: bool) -> u32 {
    let ip = Ipv6Addr::from(gid.0).to_canonical();
    let own =
        if ethernet { addresses::own_addresses(None).unwrap_or_default() } else { Vec::new() };
    let known = own.iter().find(|own| own.ip == ip).map(|own| own.prefix);
    // A network of one address says nothing of its neighbours.
    match (ip, known) {
        (IpAddr::V4(_), Some(bits @ 1..32)) => 96 + bits,
        (IpAddr::V4(_), _) => BITS_IPV4,
        (IpAddr::V6(_), Some(bits @ 1..128)) => bits,
        (IpAddr::V6(_), _) => BITS_OTHER,
    }
}

/// A rail of ours that a queue pair of the peer could be connected to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub(crate) rail: usize,
    pub(crate) address: Address,
    /// How many other rails of the peer are connected to it.
    pub(crate) others: usize,
}

/// The best: in the network of the peer's rail; of several, or without one, that which fewest of its other rails have, so that no
/// rail is idle; then the one whose address has most in common, or its number. `rails`: how many there are.
pub(crate) fn nearest(
    candidates: impl Iterator<Item = Candidate>,
    rails: usize,
    theirs: Gid,
    their_rail: usize,
) -> Option<usize> {
    let bits = |gid: Gid| u128::from_be_bytes(gid.0);
    let best = candidates.max_by_key(|one| {
        let of_network = one.address.network_bits;
        // What is behind the network's part says nothing.
        let common = (bits(one.address.gid) ^ bits(theirs)).leading_zeros().min(of_network);
        let within = if common == of_network { of_network } else { 0 };
        let same_number = one.rail == their_rail % rails.max(1);
        (within, Reverse(one.others), common, same_number, Reverse(one.rail))
    });
    best.map(|one| one.rail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(text: &str) -> Gid {
        let ip: IpAddr = text.parse().unwrap();
        Gid(match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        })
    }

    /// A table as drivers have them: each address once for RoCE v1 and once for v2, link-local first.
    fn table(places: u32, addresses: &[&str]) -> u8 {
        let addresses: Vec<Gid> = addresses.iter().map(|text| gid(text)).collect();
        let gid = |index: u8| addresses.get(usize::from(index) / 2).copied();
        choose_gid(places, gid, |index| index % 2 == 1)
    }

    #[test]
    fn an_ipv4_address_of_roce_v2_is_preferred_however_large_the_table_is() {
        for places in [6, 16, 255, 256, 257, 1024, u32::MAX] {
            let all = ["fe80::1", "fd00::1", "10.9.0.1", "10.9.0.2"];
            assert_eq!(table(places, &all), 5, "{places} places");
            assert_eq!(table(places, &all[..2]), 1, "{places} places");
            assert_eq!(table(places, &[]), 0, "{places} places");
        }
        assert_eq!(table(0, &["fe80::1"]), 0);
        assert_eq!(table(1, &["fe80::1"]), 0, "only v1");
    }

    /// The rails of ours that rails of a peer get, when each offers two queue pairs. Ours: address and bits of its network; those
    /// without one are not usable.
    fn assigned(ours: &[Option<(&str, u32)>], theirs: &[&str]) -> Vec<usize> {
        let mut made: Vec<(usize, usize)> = Vec::new();
        let mut answer = Vec::new();
        for (their_rail, their_address) in theirs.iter().enumerate() {
            let choose = |made: &[(usize, usize)]| {
                let candidates = ours.iter().enumerate().filter_map(|(rail, own)| {
                    let (text, network_bits) = (*own)?;
                    let gid = gid(text);
                    let others =
                        made.iter().filter(|(own, peer)| *own == rail && *peer != their_rail);
                    let address = Address { gid_index: 0, gid, lid: 0, mtu: 5, network_bits };
                    Some(Candidate { rail, address, others: others.count() })
                });
                nearest(candidates, ours.len(), gid(their_address), their_rail).unwrap()
            };
            let rail = choose(&made);
            made.push((rail, their_rail));
            assert_eq!(choose(&made), rail, "the second goes where the first went");
            answer.push(rail);
        }
        answer
    }

    #[test]
    fn rails_of_one_network_get_one_each() {
        let ours = [Some(("10.0.0.3", 120)), Some(("10.0.0.4", 120))];
        assert_eq!(assigned(&ours, &["10.0.0.1", "10.0.0.2"]), [0, 1]);
        assert_eq!(
            assigned(&ours, &["10.0.0.1", "10.0.0.2", "10.0.0.5", "10.0.0.6"]),
            [0, 1, 0, 1]
        );
        assert_eq!(assigned(&ours, &["10.0.0.4"]), [0], "by number: the same address is another's");
        let four = ["fe80::a", "fe80::b", "fe80::c", "fe80::d"].map(|text| Some((text, 64)));
        assert_eq!(assigned(&four, &["fe80::d", "fe80::c", "fe80::b", "fe80::a"]), [0, 1, 2, 3]);
        let one_down = [None, four[1], four[2], four[3]];
        let mut got = assigned(&one_down, &["fe80::1", "fe80::2", "fe80::3"]);
        got.sort_unstable();
        assert_eq!(got, [1, 2, 3]);
    }

    #[test]
    fn rails_of_different_networks_get_their_own_in_whatever_order_they_are() {
        let ours = [Some(("10.0.1.2", 120)), Some(("10.0.0.2", 120))];
        assert_eq!(assigned(&ours, &["10.0.0.1", "10.0.1.1"]), [1, 0]);
        assert_eq!(assigned(&ours, &["10.0.1.1", "10.0.1.3"]), [0, 0], "the other is not reached");
        // Cables without a switch: networks of four addresses.
        let cables = [Some(("10.0.0.6", 126)), Some(("10.0.0.2", 126))];
        assert_eq!(assigned(&cables, &["10.0.0.1", "10.0.0.5"]), [1, 0]);
    }

    #[test]
    fn rails_behind_a_router_are_all_used_too() {
        let ours = [Some(("10.0.2.1", 120)), Some(("10.0.4.1", 120))];
        let mut got = assigned(&ours, &["10.0.0.1", "10.0.0.2"]);
        got.sort_unstable();
        assert_eq!(got, [0, 1]);
        // What is more alike goes together.
        let ours = [Some(("192.168.1.1", 120)), Some(("10.0.1.1", 120))];
        assert_eq!(assigned(&ours, &["10.0.0.1", "192.168.0.1"]), [1, 0]);
    }
}
