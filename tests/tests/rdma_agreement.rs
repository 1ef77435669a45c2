//! Queue pairs are agreed on with a peer that gives up whenever it likes. In the rig, or on a machine with a device: of the peer there
//! is only the socket.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::sync::mpsc;
use std::time::Duration;

use corelane::{Access, Engine, EngineConfig, Error, Operation, TransportKind};
use corelane_tests::hostile::{
    Header, Hello, HostilePeer, HostileTarget, Identity, RDMA, TCP, Verdict, frame, knock, shake,
};
use corelane_tests::{
    BOUND, DescriptorField, Near, engine_on_a_known_port, forge_descriptor, local_config, outcome,
    tcp_config,
};

/// `status` of the frames.
const OFFER: u16 = 1;
const ANSWER: u16 = 2;
const REFUSED: u16 = 3;
const UP: u16 = 1;
const DOWN: u16 = 2;
const NONE: u16 = 3;

/// Bytes of memory.
const LEN: usize = 1 << 20;

/// After so many failures transfers go another way.
const MAX_FAILURES: u64 = 5;

fn config() -> EngineConfig {
    let mut config = local_config();
    config.transports = vec![TransportKind::Rdma, TransportKind::Tcp];
    // What nobody answers is not given up amid the test.
    config.connect_timeout = BOUND;
    config
}

fn rdma(status: u16, generation: u64) -> Header {
    Header { status, aux: generation, ..Header::new(frame::RDMA) }
}

/// What the engine says next about queue pairs.
#[track_caller]
fn next(link: &mut HostilePeer) -> Header {
    loop {
        let (header, _) = link.receive().expect("the engine goes on");
        match header.kind {
            frame::PING => {
                link.send(&Header { id: header.id, ..Header::new(frame::PONG) }, &[]);
            }
            frame::NOTIFY => acknowledge(link, &header),
            frame::QUEUE_PAIR | frame::RDMA => return header,
            _ => {}
        }
    }
}

fn acknowledge(link: &mut HostilePeer, notification: &Header) {
    link.send(&Header { aux: notification.aux + 1, ..Header::new(frame::ACK) }, &[]);
}

/// Takes all offers of a generation.
#[track_caller]
fn all_offers(link: &mut HostilePeer) -> Vec<Header> {
    let mut all = vec![next(link)];
    let count = all[0].aux >> 40 & 0xff;
    while (all.len() as u64) < count {
        all.push(next(link));
    }
    assert!(all.iter().all(|offer| (offer.kind, offer.status) == (frame::QUEUE_PAIR, OFFER)));
    all
}

/// The same; the answer is its number.
#[track_caller]
fn offers(link: &mut HostilePeer) -> u64 {
    all_offers(link)[0].aux & 0xffff_ffff
}

/// Has the first of the queue pairs that the engine offers connected with itself, and waits until it is up.
#[track_caller]
fn close_the_circle(link: &mut HostilePeer) {
    for (index, offer) in all_offers(link).into_iter().enumerate() {
        let status = if index == 0 { ANSWER } else { REFUSED };
        assert!(link.send(&Header { status, ..offer }, &[]));
    }
    let up = next(link);
    assert_eq!((up.kind, up.status, up.id), (frame::RDMA, UP, 1));
}

/// What a hostile target, with this incarnation, does to an engine that connects to it.
fn connected_to(incarnation: u128, attack: impl FnOnce(HostilePeer)) {
    let mut target = HostileTarget::new(Identity::invented("far", incarnation));
    target.transports = TCP | RDMA;
    let engine = Engine::new("near", config()).unwrap();
    let peer = engine.load_peer(&target.metadata()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| peer.connect(BOUND));
        attack(target.session());
    });
}

/// The peer's ends are lost before this side knows whether its own work: it must neither go up nor wait for ever.
#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn what_the_peer_gives_up_before_it_works_is_confirmed_and_offered_anew_a_few_times() {
    connected_to(900, |mut link| {
        let first = offers(&mut link);
        for generation in first..first + MAX_FAILURES {
            assert!(link.send(&rdma(DOWN, generation), &[]));
            let answer = next(&mut link);
            assert_eq!((answer.kind, answer.status), (frame::RDMA, DOWN));
            assert_eq!(answer.aux, generation);
            if generation + 1 < first + MAX_FAILURES {
                assert_eq!(offers(&mut link), generation + 1);
            }
        }
        assert_eq!((next(&mut link).status, "the last"), (NONE, "the last"));
        // It has given up: nobody answers for ever.
        assert!(link.send(&rdma(DOWN, first + MAX_FAILURES - 1), &[]));
        let after = link.ping(1).unwrap();
        assert!(after.iter().all(|(header, _)| header.kind != frame::RDMA), "{after:?}");
        drop(link);
    });
}

/// This side has given up, and the peer finds out when it uses what it took to work.
#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn who_has_given_up_still_confirms_that_nothing_is_left() {
    let (engine, port) = engine_on_a_known_port("near", config());
    let (from, to) = (Identity::invented("far", 901), Identity::of(&engine.metadata()));
    let hello = Hello { transports: TCP | RDMA, ..Hello::honest(&from, &to, 1) };
    let mut stream = knock(port);
    let verdict = shake(&mut stream, &hello.encode(), &from.secret, &to.secret);
    let Verdict::Welcome(session) = verdict else { panic!("{verdict:?}") };
    let mut link = HostilePeer { stream, session };
    let gid = std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets();
    for generation in [1, 2] {
        let offer = Header {
            status: OFFER,
            // The first and only one, with 64 receives.
            aux: generation | 1 << 40 | 64 << 56,
            // Number and first packet number, an MTU of 1024, Ethernet.
            id: 17 | 5 << 24 | 3 << 48 | 1 << 56,
            key: u128::from_le_bytes(gid),
            addr: 1 << 16 | 1 << 24 | 4096 << 32,
            ..Header::new(frame::QUEUE_PAIR)
        };
        assert!(link.send(&offer, &[]));
        // It has one for it, or refuses: there is nothing at the address.
        let answer = next(&mut link);
        assert_eq!((answer.kind, answer.aux & 0xffff_ffff), (frame::QUEUE_PAIR, generation));
        // None of those that are up is there.
        assert!(link.send(&Header { id: 0, ..rdma(UP, generation) }, &[]));
        assert!(link.send(&rdma(DOWN, generation), &[]));
        assert_eq!(next(&mut link), rdma(DOWN, generation));
    }
}

/// A hostile target that an engine has memory of, which no device opens; `number` is the lower half of its incarnation.
fn target_with_memory(far: &Near, number: u64) -> (HostileTarget, corelane::RegionDescriptor) {
    // A forged descriptor keeps the upper half of the incarnation.
    let upper = Identity::of(&far.engine.metadata()).incarnation >> 64 << 64;
    let identity = Identity::invented("hostile", upper | u128::from(number));
    let mut target = HostileTarget::new(identity);
    target.transports = TCP | RDMA;
    let descriptor = far.region.descriptor();
    (target, forge_descriptor(descriptor, DescriptorField::Incarnation, |_| number))
}

/// The device refuses an access, the engine destroys its queue pairs and says so. Its peer lives, and never says the same.
#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn a_peer_that_never_says_its_queue_pairs_are_gone_is_given_up() {
    let mut config = config();
    // As long as agreeing may take where two processors are emulated beside other work.
    config.connect_timeout = Duration::from_secs(10);
    config.operation_timeout = 4 * BOUND;
    let near = Near::new(config.clone(), LEN);
    let far = Near::named("far", config, LEN, Access::READ_WRITE);
    let (target, remote) = target_with_memory(&far, 902);
    let peer = near.engine.load_peer(&target.metadata()).unwrap();
    let (tell_up, is_up) = mpsc::channel();
    let (tell_down, is_down) = mpsc::channel();
    std::thread::scope(|scope| {
        let hostile = scope.spawn(|| {
            let mut link = target.session();
            close_the_circle(&mut link);
            tell_up.send(()).unwrap();
            let down = next(&mut link);
            assert_eq!((down.kind, down.status), (frame::RDMA, DOWN));
            tell_down.send(()).unwrap();
            // Alive, and no word of it.
            while let Some((header, _)) = link.receive() {
                assert_ne!(header.kind, frame::NOTIFY, "nobody knows what this side has");
                if header.kind == frame::PING {
                    link.send(&Header { id: header.id, ..Header::new(frame::PONG) }, &[]);
                }
            }
            // It is left, and comes again.
            let mut link = target.session();
            loop {
                let (header, payload) = link.receive().expect("the engine goes on");
                if header.kind == frame::NOTIFY {
                    acknowledge(&mut link, &header);
                    return payload;
                }
            }
        });
        peer.connect(BOUND).unwrap();
        is_up.recv_timeout(2 * BOUND).expect("queue pairs are up");
        let write = near.transfer(&peer, Operation::Write, (0, 0), &remote, 4096);
        write.post().unwrap();
        is_down.recv_timeout(2 * BOUND).expect("they are gone");
        peer.notify(b"kept").unwrap();
        let error = outcome(&write).unwrap_err();
        assert!(matches!(error, Error::RemoteDisconnect { .. }), "{error}");
        for part in ["hostile", "queue pairs are gone"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert_eq!(hostile.join().unwrap(), b"kept");
    });
    far.memory.assert_poison(0, LEN);
}

/// Whoever had something up says which notifications have come over it before anything else.
#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn what_is_up_is_not_given_up_without_a_word() {
    connected_to(904, |mut link| {
        close_the_circle(&mut link);
        assert!(link.send(&rdma(NONE, 0), &[]));
        while link.receive().is_some() {}
    });
}

/// Only one side may find out that nothing gets through: the one that posts.
#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn the_side_that_does_not_offer_gives_up_after_a_few_failures_too() {
    let mut config = config();
    (config.rdma.timeout, config.rdma.retry_count) = (8, 1);
    let (engine, port) = engine_on_a_known_port("near", config.clone());
    let gid = gid_of_a_device(config);
    let (from, to) = (Identity::invented("far", 905), Identity::of(&engine.metadata()));
    let peer = engine.load_peer(&from.metadata_with(1, TCP | RDMA)).unwrap();
    let hello = Hello { transports: TCP | RDMA, ..Hello::honest(&from, &to, 1) };
    let mut stream = knock(port);
    let verdict = shake(&mut stream, &hello.encode(), &from.secret, &to.secret);
    let Verdict::Welcome(session) = verdict else { panic!("{verdict:?}") };
    let mut link = HostilePeer { stream, session };
    for generation in 1..=MAX_FAILURES {
        let offer = Header {
            status: OFFER,
            aux: generation | 1 << 40 | 64 << 56,
            // No queue pair of this device has the number.
            id: 0xff_fff1 | 5 << 24 | 3 << 48 | 1 << 56,
            key: gid,
            addr: 1 << 16 | 1 << 24 | 4096 << 32,
            ..Header::new(frame::QUEUE_PAIR)
        };
        assert!(link.send(&offer, &[]));
        let answer = next(&mut link);
        assert_eq!((answer.kind, answer.status), (frame::QUEUE_PAIR, ANSWER));
        assert!(link.send(&Header { id: 1, ..rdma(UP, generation) }, &[]));
        for (header, _) in link.ping(generation).unwrap() {
            if header.kind == frame::NOTIFY {
                acknowledge(&mut link, &header);
            }
        }
        peer.notify(b"over what leads nowhere").unwrap();
        let down = next(&mut link);
        assert_eq!((down.kind, down.status, down.aux), (frame::RDMA, DOWN, generation));
        // All before this one have come over the socket.
        assert!(link.send(&Header { id: generation - 1, ..rdma(DOWN, generation) }, &[]));
    }
    assert_eq!((next(&mut link).status, "the last"), (NONE, "the last"));
}

/// The address of a device, out of what an engine offers.
#[track_caller]
fn gid_of_a_device(mut config: EngineConfig) -> u128 {
    config.listen.ports = 0..=0;
    let mut target = HostileTarget::new(Identity::invented("asks", 906));
    target.transports = TCP | RDMA;
    let engine = Engine::new("offers", config).unwrap();
    let peer = engine.load_peer(&target.metadata()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| peer.connect(BOUND));
        all_offers(&mut target.session())[0].key
    })
}

/// What is made for such an offer would be in the way of what this side offers, and nobody would ever destroy it.
#[test]
#[cfg_attr(not(feature = "rdma"), ignore = "RDMA is not built")]
fn who_has_not_opened_the_link_offers_nothing() {
    let target = HostileTarget::new(Identity::invented("far", 907));
    let engine = Engine::new("near", tcp_config()).unwrap();
    let peer = engine.load_peer(&target.metadata()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| peer.connect(BOUND));
        let mut link = target.session();
        link.ping(1).unwrap();
        let offer = Header {
            status: OFFER,
            aux: 1 | 1 << 40 | 64 << 56,
            id: 17 | 5 << 24 | 3 << 48 | 1 << 56,
            addr: 1 << 16 | 1 << 24 | 4096 << 32,
            ..Header::new(frame::QUEUE_PAIR)
        };
        assert!(link.send(&offer, &[]));
        while let Some((header, _)) = link.receive() {
            assert_ne!(header.kind, frame::RDMA, "an answer");
        }
    });
}
