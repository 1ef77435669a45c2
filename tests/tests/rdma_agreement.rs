//! Queue pairs are agreed on with a peer that gives up whenever it likes. In the rig, or on a machine with a device: of the peer there
//! is only the socket.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane::{Engine, EngineConfig, TransportKind};
use corelane_tests::hostile::{
    Header, Hello, HostilePeer, HostileTarget, Identity, RDMA, TCP, Verdict, frame, knock, shake,
};
use corelane_tests::{BOUND, engine_on_a_known_port, local_config};

/// `status` of the frames.
const OFFER: u16 = 1;
const UP: u16 = 1;
const DOWN: u16 = 2;
const NONE: u16 = 3;

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
            frame::QUEUE_PAIR | frame::RDMA => return header,
            _ => {}
        }
    }
}

/// Takes all offers of a generation; the answer is its number.
#[track_caller]
fn offers(link: &mut HostilePeer) -> u64 {
    let mut left = None;
    loop {
        let offer = next(link);
        assert_eq!((offer.kind, offer.status), (frame::QUEUE_PAIR, OFFER));
        let count = offer.aux >> 40 & 0xff;
        let now = left.unwrap_or(count) - 1;
        if now == 0 {
            return offer.aux & 0xffff_ffff;
        }
        left = Some(now);
    }
}

/// The peer's ends are lost before this side knows whether its own work: it must neither go up nor wait for ever.
#[test]
#[ignore = "needs an RDMA device: tests/run.sh rdma"]
fn what_the_peer_gives_up_before_it_works_is_confirmed_and_offered_anew_a_few_times() {
    let mut target = HostileTarget::new(Identity::invented("far", 900));
    target.transports = TCP | RDMA;
    let engine = Engine::new("near", config()).unwrap();
    let peer = engine.load_peer(&target.metadata()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| peer.connect(BOUND));
        let mut link = target.session();
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
