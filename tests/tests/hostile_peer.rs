//! A peer that was let in, and misbehaves in every field of every message.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::io::{Read, Write};
use std::time::Duration;

use corelane::{Access, Operation, Peer, RegionDescriptor};
use corelane_tests::hostile::{
    Frame, Header, Hello, HostilePeer, HostileTarget, Identity, Verdict, frame, hear, knock,
    knock_locally, say, shake,
};
use corelane_tests::{
    BOUND, DescriptorField, Near, Random, Target, end_of, eventually, forge_descriptor,
    listening_ports, local_config, open_files, outcome, pattern, resident_bytes_of, target,
    tcp_config, threads_of,
};

const LEN: usize = 1 << 20;
/// What an engine may have grown by after all that is done to it here.
const MEMORY: u64 = 48 << 20;

/// An engine in another process, which a well-behaved peer uses all the time.
struct Victim {
    far: Target,
    identity: Identity,
    port: u16,
    key: u128,
    near: Near,
    peer: Peer,
    files: usize,
    threads: usize,
    memory: u64,
}

impl Victim {
    fn new(settings: &str) -> Self {
        let far = target!("far", LEN, "read", settings);
        let near = Near::new(
            if settings.contains("transports=tcp") { tcp_config() } else { local_config() },
            LEN,
        );
        let peer = near.connect(&far.metadata);
        let pid = far.process.id();
        let key = far.region.to_bytes()[28..44].try_into().unwrap();
        let mut victim = Self {
            identity: Identity::of(&far.metadata),
            port: listening_ports(pid)[0],
            key: u128::from_le_bytes(key),
            far,
            near,
            peer,
            files: 0,
            threads: 0,
            memory: 0,
        };
        victim.assert_serves();
        victim.files = open_files(pid);
        victim.threads = threads_of(pid);
        victim.memory = resident_bytes_of(pid);
        victim
    }

    fn attack(&self, from: &Identity) -> HostilePeer {
        HostilePeer::connect(knock(self.port), from, &self.identity)
    }

    fn attack_locally(&self, from: &Identity) -> HostilePeer {
        HostilePeer::connect(knock_locally(self.identity.incarnation), from, &self.identity)
    }

    #[track_caller]
    fn assert_serves(&self) {
        for len in [64, 100_000] {
            self.near.memory.poison(0, LEN);
            let read =
                self.near.transfer(&self.peer, Operation::Read, (0, 0), &self.far.region, len);
            end_of(&read).unwrap();
            self.near.memory.assert_pattern(1, 0, len, 0);
            self.near.memory.assert_poison(len, LEN - len);
        }
    }

    /// Serves, has the bytes that it had, and holds nothing of who attacked it.
    #[track_caller]
    fn assert_whole(&mut self) {
        self.assert_serves();
        self.far.assert_pattern(1, 0, LEN, 0);
        let pid = self.far.process.id();
        eventually("its descriptors are closed", || open_files(pid) <= self.files + 2);
        assert!(threads_of(pid) <= self.threads, "threads were left");
        let memory = resident_bytes_of(pid);
        assert!(memory < self.memory + MEMORY, "from {} to {memory} bytes", self.memory);
    }

    fn read(&self, offset: u64, len: u64) -> Header {
        let addr = self.far.region.base() + offset;
        Header { len, key: self.key, addr, id: 5, ..Header::new(frame::READ) }
    }

    /// All that the engine says to a peer: data only of the region, and only as it is.
    #[track_caller]
    fn assert_discloses_nothing(&self, asked: &Header, frames: &[Frame]) {
        for (header, payload) in frames {
            if header.kind == frame::DATA {
                let region: &RegionDescriptor = &self.far.region;
                assert!(asked.kind == frame::READ && asked.key == self.key, "{asked:?}");
                assert!(region.contains(asked.addr, asked.len) && header.len == asked.len);
                assert_eq!(*payload, pattern(1, asked.addr - region.base(), payload.len()));
            }
        }
    }
}

/// What is wrong with it, and the frames with their payload.
type Conversation<'a> = (&'a str, Vec<(Header, &'a [u8])>);

/// Sets a field of a header.
type Change = (&'static str, fn(&mut Header, u128), &'static [u128]);

const U16: &[u128] = &[0, 1, 2, 3, 4, 5, 9, 0xff, 0x7fff, 0xffff];
const U32: &[u128] = &[0, 1, 2, 15, 16, 32, 1000, 1001, 32_000, 32_001, 1 << 31, 0xffff_ffff];
const U64: &[u128] = &[
    0,
    1,
    2,
    63,
    127,
    128,
    4096,
    LEN as u128,
    LEN as u128 + 1,
    16 << 20,
    (16 << 20) + 1,
    1 << 32,
    1 << 63,
    u64::MAX as u128 - 1,
    u64::MAX as u128,
];
const U128: &[u128] = &[0, 1, 1 << 32, 1 << 64, u128::MAX];

const CHANGES: &[Change] = &[
    ("flags", |h, v| h.flags = v as u8, &[0, 1, 2, 3, 4, 0x80, 0xff]),
    ("status", |h, v| h.status = v as u16, U16),
    ("body", |h, v| h.body = v as u32, U32),
    ("len", |h, v| h.len = v as u64, U64),
    ("id", |h, v| h.id = v as u64, U64),
    ("aux", |h, v| h.aux = v as u64, U64),
    ("segments", |h, v| h.segments = v as u32, U32),
    ("keys", |h, v| h.keys = v as u32, U32),
    ("key", |h, v| h.key = v, U128),
    ("key bit", |h, v| h.key ^= 1 << v, &[0, 5, 31, 32, 64, 127]),
    ("addr", |h, v| h.addr = v as u64, U64),
    (
        "addr off",
        |h, v| h.addr = h.addr.wrapping_add(v as u64),
        &[1, 1 << 20, (1 << 20) - 100, u64::MAX as u128],
    ),
];

/// Each type with each field at and past its bounds. Afterwards a PING and the end: the engine cuts the peer off, or ignores
/// the frame, and never waits for ever.
fn every_field(victim: &mut Victim, attack: impl Fn(&Victim, &Identity) -> HostilePeer) {
    let mut tried = 0;
    for kind in (0..=18).chain([0x7f, 0x80, 0xff]) {
        let honest = Header { kind, ..victim.read(100, 200) };
        for (field, change, values) in CHANGES {
            for value in *values {
                let mut header = honest;
                change(&mut header, *value);
                let from = Identity::invented("hostile", 1000 + tried);
                let mut peer = attack(victim, &from);
                // What it promises, as far as it is little.
                let promised = u64::from(header.body).saturating_add(header.len).min(70_000);
                let filler = vec![0xaa; promised as usize];
                peer.send(&header, &filler);
                peer.send(&Header { id: 99, ..Header::new(frame::PING) }, &[]);
                let frames = peer.end();
                assert!(frames.len() < 1000, "{kind} {field} {value}");
                victim.assert_discloses_nothing(&header, &frames);
                tried += 1;
            }
        }
        victim.assert_serves();
    }
    println!("{tried} frames");
    victim.assert_whole();
}

#[test]
fn every_field_of_every_frame_over_tcp() {
    every_field(&mut Victim::new("transports=tcp"), Victim::attack);
}

#[test]
fn every_field_of_every_frame_on_one_host() {
    every_field(&mut Victim::new(""), Victim::attack_locally);
}

#[test]
fn every_field_of_a_hello() {
    let mut victim = Victim::new("transports=tcp");
    let from = Identity::invented("hostile", 500);
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    let mut case = |name: &str, change: &dyn Fn(&mut Hello)| {
        let mut hello = Hello::honest(&from, &victim.identity, 1);
        change(&mut hello);
        cases.push((name.to_owned(), hello.encode()));
    };
    for versions in [(0, 0), (2, 2), (2, 1), (0, u16::MAX), (u16::MAX, u16::MAX)] {
        case(&format!("versions {versions:?}"), &|hello| hello.versions = versions);
    }
    for kind in [0, 2, 3, 0xff] {
        case(&format!("kind {kind}"), &|hello| hello.kind = kind);
    }
    for transports in [0, 2, 4, u32::MAX] {
        case(&format!("transports {transports}"), &|hello| hello.transports = transports);
    }
    for who in [0, 1, u128::MAX, victim.identity.incarnation] {
        case(&format!("initiator {who}"), &|hello| hello.initiator = who);
        case(&format!("target {who}"), &|hello| hello.target = who);
    }
    for number in [0, 1, u64::MAX - 1, u64::MAX] {
        case(&format!("session {number}"), &|hello| hello.session = number);
        case(&format!("attempt {number}"), &|hello| hello.attempt = number);
        case(&format!("expects {number}"), &|hello| hello.expects = number);
        case(&format!("liveness {number}"), &|hello| hello.liveness_ms = number as u32);
    }
    let names: [&[u8]; 7] =
        [b"", b"near", b"far", b"\xff\xfe", b"a\0b", &[b'n'; 1024], &[b'n'; 1025]];
    for name in names {
        case(&format!("name of {} bytes", name.len()), &|hello| hello.name = name.to_vec());
    }
    let honest = Hello::honest(&from, &victim.identity, 1).encode();
    for at in 0..honest.len() {
        let mut altered = honest.clone();
        altered[at] ^= 0xff;
        cases.push((format!("byte {at}"), altered));
    }
    for len in [0, 1, 4, 5, honest.len() - 1] {
        cases.push((format!("{len} bytes"), honest[..len].to_vec()));
    }
    cases.push(("longer".into(), [&honest[..], b"x"].concat()));
    cases.push(("longest".into(), vec![b'C'; 0xffff]));
    let mut welcome = 0;
    for (name, hello) in &cases {
        let mut stream = knock(victim.port);
        match shake(&mut stream, hello, &from.secret, &victim.identity.secret) {
            Verdict::Welcome(_) => welcome += 1,
            Verdict::Refused(reason) => assert!((1..=10).contains(&reason), "{name}"),
            Verdict::HungUp => {}
        }
    }
    println!("{} hellos, {welcome} of them good enough", cases.len());
    // Numbers, nonces and names that are only strange.
    assert!(welcome > 0 && welcome < cases.len() * 3 / 4);
    victim.assert_whole();
}

#[test]
fn nobody_takes_the_name_or_the_place_of_another() {
    let mut victim = Victim::new("transports=tcp");
    // By name, and by name and incarnation, without the secret of the engine that has them.
    victim.far.process.load(&victim.near.engine.metadata());
    let honest = Identity::of(&victim.near.engine.metadata());
    let impostors = [
        Identity::invented("near", 7),
        Identity { secret: [0; 32], ..honest.clone() },
        Identity { name: "other".into(), secret: [0; 32], ..honest },
    ];
    for (attempt, impostor) in impostors.iter().enumerate() {
        let hello = Hello::honest(impostor, &victim.identity, u64::MAX - attempt as u64);
        let mut stream = knock(victim.port);
        let verdict =
            shake(&mut stream, &hello.encode(), &impostor.secret, &victim.identity.secret);
        assert!(matches!(verdict, Verdict::Refused(4 | 5)), "{verdict:?}");
        victim.assert_serves();
    }
    victim.assert_whole();
}

#[test]
fn proofs_that_are_guessed_replayed_or_reflected_are_refused() {
    let mut victim = Victim::new("transports=tcp");
    let from = Identity::invented("hostile", 500);
    let hello = Hello::honest(&from, &victim.identity, 1).encode();
    let mut random = Random::new(3);
    // An auth that was good once.
    let mut stream = knock(victim.port);
    say(&mut stream, &hello);
    let challenge = hear(&mut stream).unwrap();
    let mut recorded = b"CLNE\x03".to_vec();
    for (secret, label) in [
        (victim.identity.secret, corelane_tests::hostile::INITIATOR),
        (from.secret, corelane_tests::hostile::INITIATOR_OWN),
    ] {
        recorded.extend(corelane_tests::hostile::proof(&secret, label, &hello, &challenge));
    }
    say(&mut stream, &recorded);
    assert_eq!(hear(&mut stream).unwrap()[4], 4, "it is welcome");
    drop(stream);
    for round in 0..1000 {
        let mut stream = knock(victim.port);
        say(&mut stream, &hello);
        let challenge = hear(&mut stream).unwrap();
        let auth = match round % 4 {
            0 => recorded.clone(),
            // The target's own proof, sent back to it.
            1 => [&b"CLNE\x03"[..], &challenge[59..91], &challenge[59..91]].concat(),
            2 => [&b"CLNE\x03"[..], &[0; 64]].concat(),
            _ => [&b"CLNE\x03"[..], &random.bytes(64)].concat(),
        };
        say(&mut stream, &auth);
        match hear(&mut stream) {
            Some(answer) => assert_eq!(answer[4..], [5, 4], "round {round}"),
            None => panic!("round {round}: hung up without a word"),
        }
        assert_eq!(hear(&mut stream), None);
    }
    victim.assert_whole();
}

#[test]
fn ten_thousand_guessed_keys_open_nothing() {
    let mut victim = Victim::new("transports=tcp");
    let mut peer = victim.attack(&Identity::invented("hostile", 500));
    let mut random = Random::new(7);
    const GUESSES: usize = 10_000;
    for batch in 0..GUESSES / 100 {
        for guess in 0..100 {
            let noise = u128::from(random.next()) << 64 | u128::from(random.next());
            let key = match guess % 3 {
                0 => noise,
                // The right slot, which is no secret.
                1 => noise << 32 | victim.key & 0xffff_ffff,
                // All of it but for one bit.
                _ => victim.key ^ 1 << random.below(128),
            };
            let write = guess % 2 == 1;
            let mut header = Header { key, id: guess, ..victim.read(0, 8) };
            if write {
                header.kind = frame::WRITE;
            }
            assert!(peer.send(&header, if write { &[0xaa; 8] } else { &[] }));
        }
        let answers = peer.ping(batch as u64).expect("wrong keys are no breach of the protocol");
        assert_eq!(answers.len(), 100);
        for (header, _) in answers {
            assert_eq!((header.kind, header.status), (frame::STATUS, 1), "{header:?}");
        }
    }
    // The right one opens reading, as a check of the guesses; and not writing.
    peer.send(&victim.read(0, 8), &[]);
    let answers = peer.ping(1 << 40).unwrap();
    assert_eq!(answers[0].1, pattern(1, 0, 8));
    peer.send(&Header { kind: frame::WRITE, ..victim.read(0, 8) }, &[0xaa; 8]);
    assert_eq!(peer.ping(1 << 41).unwrap()[0].0.status, 3);
    victim.assert_whole();
}

#[test]
fn frames_in_the_wrong_order_or_direction_end_the_link() {
    let mut victim = Victim::new("transports=tcp");
    let notify = |aux| Header { aux, len: 4, addr: 4, ..Header::new(frame::NOTIFY) };
    let cases: [Conversation<'_>; 12] = [
        (
            "an answer to nothing",
            vec![(Header { id: 1, len: 4, ..Header::new(frame::DATA) }, b"abcd")],
        ),
        ("a status of nothing", vec![(Header::new(frame::STATUS), b"")]),
        (
            "an acknowledgement of nothing",
            vec![(Header { aux: 1, ..Header::new(frame::ACK) }, b"")],
        ),
        ("a gap", vec![(notify(1), b"gap.")]),
        ("the same again", vec![(notify(0), b"once"), (notify(0), b"once")]),
        ("a fragment from the middle", vec![(Header { id: 4, addr: 8, ..notify(0) }, b"half")]),
        ("a void one with bytes", vec![(Header { flags: 2, ..notify(0) }, b"void")]),
        ("a longer fragment than the whole", vec![(Header { addr: 3, ..notify(0) }, b"long")]),
        ("shared memory", vec![(Header { status: 1, ..Header::new(frame::ATTACH) }, b"")]),
        ("sharing", vec![(Header::new(frame::SHARE), b"")]),
        ("unsharing", vec![(Header::new(frame::UNSHARE), b"")]),
        ("attached", vec![(Header::new(frame::ATTACHED), b"")]),
    ];
    for (number, (what, frames)) in cases.iter().enumerate() {
        let from = Identity::invented("hostile", 600 + number as u128);
        let mut peer = victim.attack(&from);
        for (header, payload) in frames {
            peer.send(header, payload);
        }
        assert!(peer.ping(1).is_err(), "{what}: still connected");
    }
    // Before a handshake, in the middle of one, and one within a session.
    let from = Identity::invented("hostile", 700);
    let hello = Hello::honest(&from, &victim.identity, 1).encode();
    let mut early = knock(victim.port);
    let _ = early.write_all(&victim.read(0, 8).encode());
    assert_eq!(hear(&mut early), None);
    let mut twice = knock(victim.port);
    say(&mut twice, &hello);
    hear(&mut twice).unwrap();
    say(&mut twice, &hello);
    assert_eq!(hear(&mut twice), None);
    let mut within = victim.attack(&from);
    say(&mut within.stream, &hello);
    say(&mut within.stream, &hello);
    assert!(within.ping(1).is_err());
    // Frames behind a goodbye.
    let mut gone = victim.attack(&from);
    gone.send(&Header::new(frame::GOODBYE), &[]);
    gone.send(&victim.read(0, 8), &[]);
    assert!(!gone.end().iter().any(|(header, _)| header.kind == frame::DATA));
    victim.assert_whole();
}

/// Bulk links belong to a session, and carry nothing but requests of who opened them.
#[test]
fn bulk_links_carry_nothing_else_and_are_bounded() {
    let mut victim = Victim::new("transports=tcp");
    let from = Identity::invented("hostile", 500);
    let session = victim.attack(&from);
    let bulk = |number: u64| {
        let mut hello = Hello::honest(&from, &victim.identity, 10);
        (hello.kind, hello.session) = (2, number);
        let mut stream = knock(victim.port);
        let verdict = shake(&mut stream, &hello.encode(), &from.secret, &victim.identity.secret);
        (verdict, HostilePeer { stream, session: number })
    };
    for number in [0, session.session ^ 1, u64::MAX] {
        assert!(matches!(bulk(number).0, Verdict::Refused(_)));
    }
    let kinds = [
        frame::DATA,
        frame::STATUS,
        frame::NOTIFY,
        frame::ACK,
        frame::PING,
        frame::PONG,
        frame::GOODBYE,
        frame::ABANDON,
        frame::ATTACH,
        frame::SHARE,
    ];
    for kind in kinds {
        let (verdict, mut link) = bulk(session.session);
        assert_eq!(verdict, Verdict::Welcome(session.session));
        link.send(&Header { kind, ..victim.read(0, 8) }, &[0; 8]);
        assert_eq!(link.receive(), None, "{kind}");
    }
    let mut held = Vec::new();
    let refused = (0..200).find(|_| {
        let (verdict, link) = bulk(session.session);
        held.push(link);
        verdict != Verdict::Welcome(session.session)
    });
    assert!(refused.is_some_and(|count| count <= 64), "{refused:?}");
    drop((session, held));
    victim.assert_whole();
}

/// Floods of everything that is answered, by a peer that reads none of the answers.
#[test]
fn a_peer_that_asks_and_never_reads_is_bounded() {
    let mut victim = Victim::new("transports=tcp");
    let floods: [(&str, Header); 7] = [
        ("pings", Header::new(frame::PING)),
        ("reads", victim.read(0, LEN as u64)),
        ("refused reads", Header { key: 0, ..victim.read(0, 8) }),
        ("queue pairs", Header { status: 1, ..Header::new(frame::QUEUE_PAIR) }),
        (
            "offers",
            Header {
                status: 1,
                aux: 1 << 40 | 1 << 56,
                id: 5 << 48,
                addr: 4096 << 32,
                ..Header::new(frame::QUEUE_PAIR)
            },
        ),
        ("RDMA down", Header { status: 2, ..Header::new(frame::RDMA) }),
        ("abandoned transfers", Header::new(frame::ABANDON)),
    ];
    for (number, (what, header)) in floods.into_iter().enumerate() {
        let name = format!("hostile-{number}");
        let before = resident_bytes_of(victim.far.process.id());
        let mut peer = victim.attack(&Identity::invented(&name, 500 + number as u128));
        peer.stream.set_patience(Duration::from_secs(3));
        let mut sent = 0;
        // 64 MiB of frames, if they are all taken.
        let batch: Vec<u8> = (0..1024u64)
            .flat_map(|i| {
                Header {
                    aux: header.aux ^ if what == "abandoned transfers" { i } else { 0 },
                    ..header
                }
                .encode()
            })
            .collect();
        let end = loop {
            match peer.stream.write_all(&batch) {
                Ok(()) if sent < 1 << 20 => sent += 1024,
                end => break end,
            }
        };
        victim.assert_serves();
        let grown = resident_bytes_of(victim.far.process.id()).saturating_sub(before);
        println!("{what}: {sent} frames taken, {grown} bytes more, then {end:?}");
        assert!(grown < 4 << 20, "{what}: {grown} bytes after {sent} frames");
    }
    victim.assert_whole();
}

#[test]
fn notifications_that_the_application_does_not_take_are_bounded() {
    let mut victim = Victim::new("transports=tcp pending=100 pending_bytes=1000000");
    let mut peer = victim.attack(&Identity::invented("hostile", 500));
    peer.stream.set_patience(Duration::from_millis(500));
    let payload = vec![0x55; 60_000];
    let mut taken = 0u64;
    loop {
        let len = payload.len() as u64;
        let notify = Header { aux: taken, len, addr: len, ..Header::new(frame::NOTIFY) };
        if !peer.send(&notify, &payload) {
            break;
        }
        taken += 1;
        assert!(taken < 10_000, "it takes any number");
    }
    drop(peer);
    // Bound ones whose data never comes.
    let mut peer = victim.attack(&Identity::invented("hostile", 501));
    peer.stream.set_patience(Duration::from_millis(500));
    let mut held = 0u64;
    loop {
        let len = payload.len() as u64;
        let key = u128::from(held) | 3 << 64;
        let bound =
            Header { aux: held, flags: 1, len, addr: len, key, ..Header::new(frame::NOTIFY) };
        if !peer.send(&bound, &payload) {
            break;
        }
        held += 1;
        assert!(held < 10_000, "it holds any number");
    }
    drop(peer);
    println!("{taken} notifications taken, {held} held");
    // What waited for its data is freed with the session, but may stay with the allocator.
    victim.memory += 64 << 20;
    victim.assert_whole();
}

// --- the other direction: the engine connects to somebody who is hostile

#[test]
fn a_target_that_misbehaves_in_every_field_of_its_handshake_is_given_up() {
    let near = {
        let mut config = tcp_config();
        config.connect_timeout = Duration::from_secs(2);
        Near::new(config, LEN)
    };
    let far = target!("far", LEN);
    let honest = near.connect(&far.metadata);
    let mut tried = 0;
    let mut attempt = |change: &(dyn Fn(&HostileTarget, &[u8]) -> Vec<u8> + Sync),
                       then: Option<&[u8]>| {
        let target =
            HostileTarget::new(Identity::invented(&format!("hostile-{tried}"), 900 + tried));
        tried += 1;
        let peer = near.engine.load_peer(&target.metadata()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, hello) = target.accept();
                say(&mut stream, &change(&target, &hello));
                if let Some(then) = then {
                    hear(&mut stream);
                    say(&mut stream, then);
                }
                // Until the engine hangs up.
                let _ = stream.read(&mut [0; 64]);
                drop(stream);
                // Later attempts find nobody.
            });
            let error = peer.connect(BOUND).unwrap_err();
            assert!(error.to_string().contains("hostile-"), "{error}");
        });
        near.engine.unload_peer(&peer).unwrap();
    };
    for at in (0..91).chain([91]) {
        attempt(
            &|target, hello| {
                let mut challenge = target.challenge(hello);
                if at < challenge.len() {
                    challenge[at] ^= 0xff;
                } else {
                    challenge.push(0);
                }
                challenge
            },
            None,
        );
    }
    // What the initiator said comes back to it; and a welcome without any proof.
    attempt(&|_, hello| hello.to_vec(), None);
    attempt(&|_, _| [&b"CLNE\x04\0"[..], &[1; 20]].concat(), None);
    for reason in [0, 1, 5, 10, 11, 0xff] {
        attempt(&|_, _| vec![b'C', b'L', b'N', b'E', 5, reason], None);
    }
    // A resumed session that never was, an answer that is none, another challenge.
    let good = |target: &HostileTarget, hello: &[u8]| target.challenge(hello);
    attempt(&good, Some(&[&b"CLNE\x04\x01"[..], &[1; 20]].concat()));
    attempt(&good, Some(&[&b"CLNE\x04\x02"[..], &[1; 20]].concat()));
    attempt(&good, Some(b"CLNE\x04"));
    attempt(&good, Some(b"CLNE\x09"));
    println!("{tried} targets");
    let read = near.transfer(&honest, Operation::Read, (0, 0), &far.region, 100_000);
    end_of(&read).unwrap();
    near.memory.assert_pattern(1, 0, 100_000, 0);
}

/// A target's answers to a READ: whatever comes, the transfer ends, and only its own range is written to.
#[test]
fn answers_that_do_not_fit_end_the_transfer_and_write_nowhere_else() {
    let near = Near::named("near", tcp_config(), LEN, Access::LOCAL);
    let far = target!("far", LEN);
    let honest = near.connect(&far.metadata);
    type Answer = fn(&Header) -> (Header, usize);
    let answers: &[(&str, Answer)] = &[
        ("longer", |r| (Header { id: r.id, len: r.len + 1, ..Header::new(frame::DATA) }, 5000)),
        ("shorter", |r| (Header { id: r.id, len: r.len - 1, ..Header::new(frame::DATA) }, 4095)),
        ("huge", |r| (Header { id: r.id, len: 16 << 20, ..Header::new(frame::DATA) }, 70_000)),
        ("past the limit", |r| (Header { id: r.id, len: u64::MAX, ..Header::new(frame::DATA) }, 0)),
        ("another id", |r| (Header { id: r.id ^ 1, len: r.len, ..Header::new(frame::DATA) }, 4096)),
        ("another stamp", |r| {
            (Header { id: r.id ^ 1 << 32, len: r.len, ..Header::new(frame::DATA) }, 4096)
        }),
        ("status ok", |r| (Header { id: r.id, ..Header::new(frame::STATUS) }, 0)),
        ("no status", |r| (Header { id: r.id, status: 99, ..Header::new(frame::STATUS) }, 0)),
        ("unknown key", |r| (Header { id: r.id, status: 1, ..Header::new(frame::STATUS) }, 0)),
        ("with a body", |r| {
            (Header { id: r.id, len: r.len, body: 16, ..Header::new(frame::DATA) }, 4112)
        }),
        ("half", |r| (Header { id: r.id, len: r.len, ..Header::new(frame::DATA) }, 2000)),
        ("nothing", |_| (Header::new(frame::PONG), 0)),
    ];
    for (number, (what, answer)) in answers.iter().enumerate() {
        // A forged descriptor keeps the upper half of the incarnation.
        let incarnation = Identity::of(&far.metadata).incarnation >> 64 << 64;
        let target =
            HostileTarget::new(Identity::invented("hostile", incarnation | (900 + number as u128)));
        let peer = near.engine.load_peer(&target.metadata()).unwrap();
        let incarnation = DescriptorField::Incarnation;
        let remote = forge_descriptor(&far.region, incarnation, |_| 900 + number as u64);
        near.memory.poison(0, LEN);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut link = target.session();
                let request = loop {
                    let Some((header, _)) = link.receive() else { return };
                    if header.kind == frame::READ {
                        break header;
                    }
                };
                let (header, payload) = answer(&request);
                link.send(&header, &vec![0xbb; payload]);
                drop(link);
            });
            let read = near.transfer(&peer, Operation::Read, (8192, 0), &remote, 4096);
            read.post().unwrap();
            assert!(outcome(&read).is_err(), "{what}");
        });
        near.memory.assert_poison(0, 8192);
        near.memory.assert_poison(8192 + 4096, LEN - 8192 - 4096);
        near.engine.unload_peer(&peer).unwrap();
        let read = near.transfer(&honest, Operation::Read, (0, 0), &far.region, 100_000);
        end_of(&read).unwrap();
        near.memory.assert_pattern(1, 0, 100_000, 0);
    }
}
