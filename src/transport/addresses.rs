//! Which addresses an engine binds and advertises, and in which order a peer's are tried.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::config::Listen;
use crate::error::{Error, Result};

/// Where the other end of a link is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Remote {
    Inet(SocketAddr),
    /// On this host: the Unix socket of this incarnation.
    Unix(u128),
}

impl Remote {
    pub(crate) fn is_unix(self) -> bool {
        matches!(self, Self::Unix(_))
    }
}

impl std::fmt::Display for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Unix(_) => f.write_str("unix socket"),
        }
    }
}

/// The abstract Unix socket of an engine. Its name is no secret: who connects must prove to hold the
/// metadata, and who answers to be the engine. Abstract names are those of the network namespace.
fn unix_address(incarnation: u128) -> io::Result<SockAddr> {
    SockAddr::unix(format!("\0corelane-{incarnation:032x}"))
}

/// The listener for peers on this host.
pub(crate) fn listen_unix(incarnation: u128) -> Result<OwnedFd> {
    let listen = || -> io::Result<OwnedFd> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
        socket.bind(&unix_address(incarnation)?)?;
        socket.listen(1024)?;
        Ok(socket.into())
    };
    listen().map_err(|e| Error::io("listening on a Unix socket for peers on this host", e))
}

/// An address of this host and the length of its network's prefix in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OwnAddress {
    pub(crate) ip: IpAddr,
    pub(crate) prefix: u32,
}

/// The addresses of the interfaces that are up: of one interface, or of all.
pub(crate) fn own_addresses(interface: Option<&str>) -> Result<Vec<OwnAddress>> {
    let all = nix::ifaddrs::getifaddrs()
        .map_err(|e| Error::io("listing the network interfaces", e.into()))?;
    let (mut found, mut known) = (Vec::new(), false);
    for one in all {
        if interface.is_some_and(|wanted| wanted != one.interface_name) {
            continue;
        }
        known = true;
        if !one.flags.contains(nix::net::if_::InterfaceFlags::IFF_UP) {
            continue;
        }
        let (Some(address), netmask) = (one.address, one.netmask) else { continue };
        let ip = |storage: &nix::sys::socket::SockaddrStorage| -> Option<IpAddr> {
            let v4 = storage.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
            v4.or_else(|| storage.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
        };
        let Some(own) = ip(&address) else { continue };
        let prefix = match netmask.as_ref().and_then(ip) {
            Some(IpAddr::V4(mask)) => u32::from(mask).count_ones(),
            Some(IpAddr::V6(mask)) => u128::from(mask).count_ones(),
            None => 128,
        };
        found.push(OwnAddress { ip: own, prefix });
    }
    match interface {
        Some(name) if !known => {
            Err(Error::Config(format!("there is no network interface `{name}`")))
        }
        Some(name) if found.is_empty() => {
            Err(Error::Config(format!("the network interface `{name}` has no address or is down")))
        }
        _ => Ok(found),
    }
}

/// The network interface that has the local address of a connected socket. For the log; lists all
/// interfaces.
pub(crate) fn interface_of(socket: &OwnedFd) -> Option<String> {
    let local = socket2::SockRef::from(socket).local_addr().ok()?.as_socket()?.ip().to_canonical();
    nix::ifaddrs::getifaddrs().ok()?.find_map(|one| {
        let address = one.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        let v6 = || address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip()));
        (v4.or_else(v6)? == local).then_some(one.interface_name)
    })
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => (ip.segments()[0] & 0xffc0) == 0xfe80,
    }
}

/// A listening socket and what peers are told about it.
pub(crate) struct Listener {
    pub(crate) socket: OwnedFd,
    pub(crate) bound: SocketAddr,
}

/// A killed process keeps its ports for some milliseconds after it is gone (its ring is taken
/// down later): a supervisor that restarts it at once should not see an error.
const RESTART_PATIENCE: Duration = Duration::from_millis(300);

/// Binds as configured; all sockets get the same port where that is possible.
pub(crate) fn listen(config: &Listen) -> Result<Vec<Listener>> {
    let wanted: Vec<IpAddr> = if !config.addresses.is_empty() {
        config.addresses.clone()
    } else if let Some(interface) = &config.interface {
        let own = own_addresses(Some(interface))?;
        own.iter().map(|own| own.ip).filter(|ip| !is_link_local(*ip)).collect()
    } else {
        vec![IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)]
    };
    let everywhere = config.addresses.is_empty() && config.interface.is_none();
    let patience = Instant::now() + RESTART_PATIENCE;
    let (address, error) = loop {
        let mut last = None;
        for port in config.ports.clone() {
            match bind_all(&wanted, port, everywhere) {
                Ok(listeners) => return Ok(listeners),
                Err((address, error)) if error.kind() == io::ErrorKind::AddrInUse => {
                    last = Some((address, error));
                }
                Err((address, error)) => {
                    return Err(Error::io(format!("listening on {address}"), error));
                }
            }
        }
        if Instant::now() >= patience {
            break last.ok_or_else(|| Error::Config("the port range is empty".into()))?;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let (first, end) = (config.ports.start(), config.ports.end());
    let hint = if first == end {
        "; choose another port, or 0 to let the kernel choose".to_owned()
    } else {
        format!("; every port of {first}..={end} is taken: give a wider range")
    };
    Err(Error::io(format!("listening on {address}{hint}"), error))
}

/// Binds every address. `everywhere`: one family is enough (a kernel without IPv6).
fn bind_all(
    wanted: &[IpAddr],
    port: u16,
    everywhere: bool,
) -> std::result::Result<Vec<Listener>, (SocketAddr, io::Error)> {
    let mut port = port;
    let mut listeners: Vec<Listener> = Vec::new();
    let mut refused = None;
    for ip in wanted {
        let address = SocketAddr::new(*ip, port);
        match bind(address) {
            Ok(listener) => {
                port = listener.bound.port();
                listeners.push(listener);
            }
            Err(error) if everywhere && error.kind() != io::ErrorKind::AddrInUse => {
                refused = Some((address, error));
            }
            Err(error) => return Err((address, error)),
        }
    }
    match (listeners.is_empty(), refused) {
        (true, Some(refused)) => Err(refused),
        _ => Ok(listeners),
    }
}

fn bind(address: SocketAddr) -> io::Result<Listener> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // A restarted server may take its port back from connections in TIME_WAIT: both need the option.
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(1024)?;
    let bound = socket.local_addr()?.as_socket().unwrap_or(address);
    Ok(Listener { socket: socket.into(), bound })
}

/// What metadata says: the configured addresses, or every usable one of the bound interfaces.
/// Loopback is listed only where nothing else is, or where it was asked for.
pub(crate) fn advertised(config: &Listen, listeners: &[Listener]) -> Result<Vec<SocketAddr>> {
    let port = listeners.first().map_or(0, |listener| listener.bound.port());
    if !config.advertise.is_empty() {
        let with_port = |a: &SocketAddr| match a.port() {
            0 => SocketAddr::new(a.ip(), port),
            _ => *a,
        };
        return Ok(config.advertise.iter().map(with_port).collect());
    }
    let own = own_addresses(config.interface.as_deref())?;
    let mut found = Vec::new();
    for listener in listeners {
        let bound = listener.bound;
        if !bound.ip().is_unspecified() {
            found.push(bound);
            continue;
        }
        for own in own.iter().filter(|own| own.ip.is_ipv6() == bound.is_ipv6()) {
            if !own.ip.is_loopback() && !is_link_local(own.ip) {
                found.push(SocketAddr::new(own.ip, bound.port()));
            }
        }
    }
    if found.is_empty() {
        for listener in listeners {
            let ip: IpAddr = match listener.bound.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            found.push(SocketAddr::new(ip, listener.bound.port()));
        }
    }
    found.dedup();
    Ok(found)
}

/// The order in which a peer's addresses are tried: those in a subnet of ours first, IPv4 before
/// IPv6 within a group, otherwise as the peer lists them.
pub(crate) fn preferred(addresses: &[SocketAddr], own: &[OwnAddress]) -> Vec<SocketAddr> {
    let shared = |ip: IpAddr| own.iter().any(|own| same_subnet(ip, *own));
    let mut sorted = addresses.to_vec();
    sorted.sort_by_key(|address| (!shared(address.ip()), address.is_ipv6()));
    sorted
}

fn same_subnet(ip: IpAddr, own: OwnAddress) -> bool {
    match (ip, own.ip) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let shift = 32 - own.prefix.min(32);
            (u64::from(u32::from(a)) >> shift) == (u64::from(u32::from(b)) >> shift)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let shift = 128 - own.prefix.min(128);
            shift == 128 || (u128::from(a) >> shift) == (u128::from(b) >> shift)
        }
        _ => false,
    }
}

/// What every connection gets: no delay of small frames, and an end when the other host is gone
/// without a word (the session's liveness is faster).
pub(crate) fn set_up(socket: &socket2::SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(10))
        .with_interval(Duration::from_secs(3))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}

/// A stream for bulk ends when what it has sent is not taken for so long: it has no liveness of its own, and what waits in
/// its socket holds memory in use. Not sooner than the kernel sends anything again.
pub(crate) fn bound_stream(stream: &OwnedFd, liveness: Duration) -> io::Result<()> {
    const LEAST: Duration = Duration::from_millis(500);
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(liveness.max(LEAST)))
}

/// Starts a non-blocking connect; the socket becomes writable when it has ended. On this host it ends at
/// once.
pub(crate) fn connect(remote: Remote) -> io::Result<OwnedFd> {
    let address = match remote {
        Remote::Inet(address) => address,
        Remote::Unix(incarnation) => {
            let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
            socket.connect(&unix_address(incarnation)?)?;
            return Ok(socket.into());
        }
    };
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    set_up(&socket2::SockRef::from(&socket))?;
    match socket.connect(&SockAddr::from(address)) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(e) => return Err(e),
    }
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_of_this_host_is_found_by_its_incarnation() {
        let incarnation = u128::from(std::process::id()) << 64 | 0x4d;
        assert!(connect(Remote::Unix(incarnation)).is_err());
        let listener = listen_unix(incarnation).unwrap();
        assert!(listen_unix(incarnation).is_err());
        connect(Remote::Unix(incarnation)).unwrap();
        drop(listener);
        assert!(connect(Remote::Unix(incarnation)).is_err());
    }

    #[test]
    fn a_shared_subnet_comes_first() {
        let own = [OwnAddress { ip: "10.1.2.3".parse().unwrap(), prefix: 24 }];
        let addresses: Vec<SocketAddr> =
            ["[2001:db8::1]:1", "192.168.0.1:1", "10.1.2.9:1"].map(|a| a.parse().unwrap()).into();
        let sorted = preferred(&addresses, &own);
        assert_eq!(sorted[0], addresses[2]);
        assert_eq!(sorted[2], addresses[0]);
        let anywhere = [OwnAddress { ip: "::1".parse().unwrap(), prefix: 0 }];
        assert_eq!(preferred(&addresses, &anywhere).len(), 3);
    }

    #[test]
    fn a_port_in_use_is_named_and_a_range_goes_on() {
        let localhost =
            Listen { addresses: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)], ..Listen::default() };
        let first = listen(&localhost).unwrap();
        let taken = first[0].bound.port();
        let same = Listen { ports: taken..=taken, ..localhost.clone() };
        let message = listen(&same).err().unwrap().to_string();
        assert!(
            message.contains(&taken.to_string()) && message.contains("another port"),
            "{message}"
        );
        if taken < u16::MAX {
            let range = Listen { ports: taken..=taken.saturating_add(50), ..localhost };
            assert_ne!(listen(&range).unwrap()[0].bound.port(), taken);
        }
    }

    #[test]
    fn advertised_addresses_are_usable_ones() {
        let listeners = listen(&Listen::default()).unwrap();
        let found = advertised(&Listen::default(), &listeners).unwrap();
        assert!(!found.is_empty());
        assert!(found.iter().all(|a| a.port() != 0 && !a.ip().is_unspecified()));
        let nat = Listen { advertise: vec!["203.0.113.7:0".parse().unwrap()], ..Listen::default() };
        let listeners = listen(&nat).unwrap();
        let port = listeners[0].bound.port();
        assert_eq!(
            advertised(&nat, &listeners).unwrap(),
            [SocketAddr::new("203.0.113.7".parse().unwrap(), port)]
        );
        let missing = Listen { interface: Some("nosuch0".into()), ..Listen::default() };
        assert!(matches!(listen(&missing), Err(Error::Config(_))));
    }
}
