//! Metadata, names, addresses and ports that cannot be used: each a typed error that says what to do.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use corelane::{Access, Engine, EngineConfig, Error, LaneSpec, Operation, Peer};
use corelane_tests::{
    BOUND, Buffer, Passing, Proxy, Random, allowed_cores, collect, end_of, engine_on_a_known_port,
    forge_metadata, forge_secret, kind, listening_ports, local_config, peer_process, tcp_config,
};

#[track_caller]
fn assert_error(result: Result<impl std::fmt::Debug, Error>, variants: &[&str], words: &[&str]) {
    let error = result.expect_err("an error");
    assert!(variants.contains(&kind(&error)), "{}: {error}", kind(&error));
    for word in words {
        assert!(error.to_string().contains(word), "`{error}` does not say `{word}`");
    }
}

/// An engine with memory that it lets others read and write.
struct Owner {
    memory: Buffer,
    region: corelane::Region,
    engine: Engine,
}

impl Owner {
    fn new(name: &str, config: EngineConfig) -> Self {
        Self::with(Engine::new(name, config).unwrap())
    }

    fn with(engine: Engine) -> Self {
        let memory = Buffer::with_pattern(1, 8192);
        let region = memory.register(&engine, Access::READ_WRITE);
        Self { memory, region, engine }
    }

    /// Reads 4 KiB through `peer` of `engine`.
    fn read_by(&self, engine: &Engine, peer: &Peer) -> Result<(), Error> {
        let memory = Buffer::new(4096);
        let region = memory.register(engine, Access::LOCAL);
        let remote = [self.region.descriptor().segment(0, 4096)];
        let plan = engine.prepare(Operation::Read, peer, &[region.segment(0, 4096)], &remote)?;
        let ended = end_of(&plan.transfer());
        match ended {
            Ok(()) => memory.assert_pattern(1, 0, 4096, 0),
            Err(_) => memory.assert_poison(0, 4096),
        }
        engine.deregister(&region).unwrap();
        ended
    }

    /// It still serves.
    #[track_caller]
    fn assert_serves(&self, engine: &Engine) {
        let peer = engine.load_peer(&self.engine.metadata()).unwrap();
        self.read_by(engine, &peer).unwrap();
        self.memory.assert_pattern(1, 0, 8192, 0);
    }
}

#[test]
fn what_is_no_metadata_is_refused() {
    let owner = Owner::new("owner", local_config());
    let engine = Engine::new("engine", local_config()).unwrap();
    let mut random = Random::new(1);
    assert_error(engine.load_peer(b""), &["Malformed"], &["metadata"]);
    assert_error(engine.load_peer(b"{\"agent\": \"x\"}"), &["Malformed"], &["metadata"]);
    for len in 1..500 {
        assert_error(engine.load_peer(&random.bytes(len)), &["Malformed"], &["metadata"]);
    }
    assert_error(engine.load_peer(&vec![0x43; 1 << 24]), &["Malformed"], &["metadata"]);
    assert!(engine.stats().peers.is_empty());
    owner.assert_serves(&engine);
}

#[test]
fn metadata_that_was_cut_or_altered_is_refused() {
    let owner = Owner::new("owner", local_config());
    let engine = Engine::new("engine", local_config()).unwrap();
    let metadata = owner.engine.metadata();
    assert_eq!(metadata, owner.engine.metadata());
    for len in 0..metadata.len() {
        assert_error(engine.load_peer(&metadata[..len]), &["Malformed"], &["metadata"]);
    }
    for bit in 0..metadata.len() * 8 {
        let mut altered = metadata.clone();
        altered[bit / 8] ^= 1 << (bit % 8);
        assert_error(engine.load_peer(&altered), &["Malformed"], &["metadata"]);
    }
    assert_error(engine.load_peer(&[&metadata[..], b"\n"].concat()), &["Malformed"], &[]);
    assert!(engine.stats().peers.is_empty());
    owner.assert_serves(&engine);
}

#[test]
fn metadata_of_another_version_is_refused_and_named() {
    let owner = Owner::new("owner", local_config());
    let engine = Engine::new("engine", local_config()).unwrap();
    let newer = forge_metadata(&owner.engine.metadata(), |bytes| bytes[4] = 200);
    assert_error(engine.load_peer(&newer), &["Malformed"], &["200", "version"]);
    owner.assert_serves(&engine);
}

#[test]
fn forged_metadata_with_a_good_checksum_never_panics() {
    let owner = Owner::new("owner", local_config());
    let mut config = local_config();
    config.limits.peers = 1 << 16;
    let engine = Engine::new("engine", config).unwrap();
    let metadata = owner.engine.metadata();
    let mut refused = 0;
    for position in 0..metadata.len() - 4 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let forged = forge_metadata(&metadata, |bytes| bytes[position] = value);
            // Some of it is metadata, of a peer that does not exist.
            refused += usize::from(engine.load_peer(&forged).is_err());
        }
    }
    assert!(refused > 0);
    owner.assert_serves(&engine);
}

#[test]
fn a_wrong_secret_opens_nothing() {
    let owner = Owner::new("owner", local_config());
    let forged = forge_secret(&owner.engine.metadata());
    let engine = Engine::new("engine", local_config()).unwrap();
    let peer = engine.load_peer(&forged).unwrap();
    assert_error(peer.connect(BOUND), &["Connect"], &["owner"]);
    assert_error(owner.read_by(&engine, &peer), &["Connect"], &["owner"]);
    assert!(!peer.is_connected());
    // It may take the notification, but never deliver it.
    let _ = peer.notify(b"let me in");
    assert_error(peer.connect(BOUND), &["Connect"], &["owner"]);
    assert!(owner.engine.notifications().unwrap().is_empty());
    assert_eq!(owner.engine.stats().notifications_received, 0);
    assert!(owner.engine.stats().totals.links_refused > 0);
    owner.assert_serves(&Engine::new("honest", local_config()).unwrap());
    // The right metadata under the same name is accepted afterwards.
    owner.assert_serves(&engine);
}

#[test]
fn the_metadata_of_an_engine_that_is_gone_does_not_open_its_successor() {
    let (first, port) = engine_on_a_known_port("owner", local_config());
    let first = Owner::with(first);
    let old = first.engine.metadata();
    first.engine.shutdown().unwrap();
    let mut config = local_config();
    config.listen.ports = port..=port;
    let second = Owner::new("owner", config);
    let engine = Engine::new("engine", local_config()).unwrap();
    let peer = engine.load_peer(&old).unwrap();
    assert_error(peer.connect(BOUND), &["Connect"], &["owner"]);
    let descriptor = second.region.descriptor();
    let memory = Buffer::new(8);
    let region = memory.register(&engine, Access::LOCAL);
    let plan = engine.prepare(
        Operation::Read,
        &peer,
        &[region.segment(0, 8)],
        &[descriptor.segment(0, 8)],
    );
    assert_error(plan, &["StaleDescriptor"], &["owner", "metadata"]);
    second.assert_serves(&engine);
}

/// An engine that says that it listens at `address`.
fn owner_elsewhere(address: SocketAddr) -> Owner {
    let mut config = local_config();
    config.listen.advertise = vec![address];
    Owner::new("elsewhere", config)
}

#[test]
fn a_peer_that_refuses_connections_is_named_with_its_address() {
    // Bound, but not listening: nobody else can take the port.
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = socket.local_addr().unwrap();
    drop(socket);
    let owner = owner_elsewhere(address);
    let engine = Engine::new("engine", tcp_config()).unwrap();
    let peer = engine.load_peer(&owner.engine.metadata()).unwrap();
    let address = address.to_string();
    assert_error(peer.connect(BOUND), &["Connect"], &["elsewhere", &address, "refused"]);
    assert_error(owner.read_by(&engine, &peer), &["Connect"], &["elsewhere", &address]);
    let stats = engine.stats();
    assert!(stats.peers[0].last_error.as_ref().is_some_and(|error| error.contains(&address)));
    Owner::new("other", tcp_config()).assert_serves(&engine);
}

#[test]
fn a_peer_that_accepts_and_says_nothing_times_out() {
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let owner = owner_elsewhere(silent.local_addr().unwrap());
    let mut config = tcp_config();
    config.connect_timeout = Duration::from_millis(300);
    let engine = Engine::new("engine", config).unwrap();
    let peer = engine.load_peer(&owner.engine.metadata()).unwrap();
    assert_error(peer.connect(BOUND), &["Connect", "Timeout"], &["elsewhere"]);
    assert_error(owner.read_by(&engine, &peer), &["Connect", "Timeout"], &["elsewhere"]);
    // The caller's own limit, if that is shorter.
    assert_error(peer.connect(Duration::from_millis(1)), &["Connect", "Timeout"], &["elsewhere"]);
    Owner::new("other", tcp_config()).assert_serves(&engine);
}

#[test]
fn a_port_that_speaks_another_protocol_is_refused() {
    use std::io::Write;
    let web = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let owner = owner_elsewhere(web.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in web.incoming().flatten() {
            // The engine may have hung up already.
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let engine = Engine::new("engine", tcp_config()).unwrap();
    let peer = engine.load_peer(&owner.engine.metadata()).unwrap();
    assert_error(peer.connect(BOUND), &["Connect"], &["elsewhere"]);
    assert_error(owner.read_by(&engine, &peer), &["Connect"], &["elsewhere"]);
    Owner::new("other", tcp_config()).assert_serves(&engine);
}

#[test]
fn another_engine_at_the_peers_address_is_refused() {
    let (impostor, port) = engine_on_a_known_port("elsewhere", tcp_config());
    let impostor = Owner::with(impostor);
    let owner = {
        let proxy = Proxy::new(Passing::Whole);
        proxy.aim(port);
        let owner = owner_elsewhere(proxy.address());
        let engine = Engine::new("engine", tcp_config()).unwrap();
        let peer = engine.load_peer(&owner.engine.metadata()).unwrap();
        assert_error(peer.connect(BOUND), &["Connect"], &["elsewhere"]);
        assert_error(owner.read_by(&engine, &peer), &["Connect"], &["elsewhere"]);
        owner
    };
    assert_eq!(owner.engine.stats().totals.links_up, 0);
    impostor.assert_serves(&Engine::new("engine", tcp_config()).unwrap());
}

#[test]
fn a_port_in_use_is_named_and_the_next_of_a_range_is_taken() {
    let mut far = peer_process!();
    far.engine("first", "");
    let port = listening_ports(far.id())[0];
    for _ in 0..5 {
        let mut config = local_config();
        config.listen.ports = port..=port;
        assert_error(Engine::new("second", config), &["Io"], &[&port.to_string(), "127.0.0.1"]);
    }
    assert_eq!(far.try_ask(&format!("engine second port={port}")).unwrap_err()[..2], *"Io");
    // With a choice, the next port is taken.
    let mut config = local_config();
    config.listen.ports = port..=port.saturating_add(50).max(port);
    let second = Owner::new("second", config);
    assert_eq!(listening_ports(far.id()), [port]);
    second.assert_serves(&Engine::new("engine", local_config()).unwrap());
}

#[test]
fn names_have_a_length() {
    let long = "n".repeat(1024);
    for name in ["", &format!("{long}n")] {
        assert_error(Engine::new(name, local_config()), &["Config"], &["name", "1024"]);
    }
    for name in [&long, "ключ / 🔑\n\0\"", "x"] {
        let sender = Engine::new(name, local_config()).unwrap();
        let receiver = Engine::new("receiver", local_config()).unwrap();
        let peer = sender.load_peer(&receiver.metadata()).unwrap();
        peer.notify(b"hello").unwrap();
        assert_eq!(&*collect(&receiver, 1)[0].from, name);
        assert_eq!(receiver.load_peer(&sender.metadata()).unwrap().name(), name);
    }
}

#[test]
fn unusable_configurations_are_refused_with_the_setting_named() {
    type Change = fn(&mut EngineConfig);
    let changes: [(Change, &str); 10] = [
        (|config| config.lanes = LaneSpec::Cores(vec![]), "lanes"),
        (|config| config.lanes = LaneSpec::Unpinned { count: 0 }, "lanes"),
        (|config| config.transports.clear(), "transports"),
        (|config| config.streams = 0, "streams"),
        (|config| config.chunk_bytes = 0, "chunk_bytes"),
        (|config| config.latency_bytes = usize::MAX, "latency_bytes"),
        (|config| config.liveness = Duration::ZERO, "liveness"),
        (|config| config.operation_timeout = Duration::ZERO, "operation_timeout"),
        (|config| config.limits.transfers = 0, "limit"),
        #[expect(clippy::reversed_empty_ranges)]
        (|config| config.listen.ports = 5..=4, "port"),
    ];
    for (change, name) in changes {
        let mut config = local_config();
        change(&mut config);
        assert_error(Engine::new("engine", config), &["Config"], &[name]);
    }
}

#[test]
fn a_core_that_is_not_allowed_and_an_address_that_is_not_ours_are_named() {
    let outside = (0..).find(|core| !allowed_cores().contains(core)).unwrap();
    let mut config = local_config();
    config.lanes = LaneSpec::Cores(vec![outside]);
    assert_error(Engine::new("engine", config), &["Lane", "Config"], &[&outside.to_string()]);
    let mut config = local_config();
    // Reserved for documentation: no machine has it.
    config.listen.addresses = vec![Ipv4Addr::new(192, 0, 2, 1).into()];
    assert_error(Engine::new("engine", config), &["Io", "Config"], &["192.0.2.1"]);
    let mut config = local_config();
    config.listen.addresses = Vec::new();
    config.listen.interface = Some("no-such-nic".into());
    assert_error(Engine::new("engine", config), &["Io", "Config"], &["no-such-nic"]);
}
