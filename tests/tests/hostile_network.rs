//! A network that lies: garbage at the listener, half handshakes, floods, replays, cuts, altered bytes.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use corelane::{Access, Engine, Operation, Peer, Region, Status, Transfer};
use corelane_tests::{
    BOUND, Buffer, Passing, Proxy, Random, Target, end_of, engine_on_a_known_port, eventually,
    listening_ports, open_files, outcome, target, tcp_config,
};

const LEN: usize = 1 << 20;

struct Near {
    memory: Buffer,
    region: Region,
    engine: Engine,
}

impl Near {
    fn new(name: &str) -> Self {
        let engine = Engine::new(name, tcp_config()).unwrap();
        let memory = Buffer::new(LEN);
        let region = memory.register(&engine, Access::LOCAL);
        Self { memory, region, engine }
    }

    fn reads(&self, far: &Target) -> [Transfer; 2] {
        let peer = self.engine.load_peer(&far.metadata).unwrap();
        [64, LEN as u64].map(|len| {
            let (local, remote) = ([self.region.segment(0, len)], [far.region.segment(0, len)]);
            self.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap().transfer()
        })
    }

    #[track_caller]
    fn assert_served_by(&self, far: &Target) {
        for transfer in self.reads(far) {
            self.memory.poison(0, LEN);
            end_of(&transfer).unwrap();
            self.memory.assert_pattern(1, 0, transfer.plan().bytes() as usize, 0);
        }
    }
}

fn knock(port: u16) -> TcpStream {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the listener accepts")
}

#[test]
fn garbage_at_the_listener_disturbs_nobody() {
    let far = target!("far", LEN);
    let near = Near::new("near");
    near.assert_served_by(&far);
    let port = listening_ports(far.process.id())[0];
    let files = open_files(far.process.id());
    let mut random = Random::new(5);
    for round in 0..300 {
        let mut stream = knock(port);
        let len = random.below(if round % 10 == 0 { 100_000 } else { 300 });
        let mut bytes = random.bytes(len);
        if round % 3 == 0 {
            // Lengths that promise a lot.
            bytes.iter_mut().take(16).for_each(|byte| *byte = 0xff);
        }
        // The engine may hang up in the middle.
        let _ = stream.write_all(&bytes);
        if round % 30 == 0 {
            near.assert_served_by(&far);
        }
    }
    near.assert_served_by(&far);
    Near::new("newcomer").assert_served_by(&far);
    eventually("the connections are gone", || open_files(far.process.id()) <= files + 4);
}

#[test]
fn half_handshakes_held_open_are_bounded_and_keep_nobody_out() {
    let far = target!("far", LEN, "read-write", "half_open=16");
    let near = Near::new("near");
    near.assert_served_by(&far);
    let port = listening_ports(far.process.id())[0];
    let files = open_files(far.process.id());
    let mut held = Vec::new();
    for i in 0..400 {
        let mut stream = knock(port);
        // Nothing, or some bytes of a beginning.
        let _ = stream.write_all(&b"CLHE\x01\x00\x00\x00"[..i % 9]);
        held.push(stream);
        if i % 100 == 50 {
            near.assert_served_by(&far);
            Near::new(&format!("newcomer-{i}")).assert_served_by(&far);
        }
    }
    eventually("only so many are kept", || open_files(far.process.id()) <= files + 16 + 8);
    near.assert_served_by(&far);
    Near::new("last").assert_served_by(&far);
    drop(held);
    eventually("none is kept", || open_files(far.process.id()) <= files + 8);
}

#[test]
fn a_half_handshake_is_dropped_after_the_connect_timeout() {
    let far = target!("far", LEN, "read-write", "connect_ms=200");
    let port = listening_ports(far.process.id())[0];
    let mut stream = knock(port);
    stream.set_read_timeout(Some(BOUND)).unwrap();
    // Whatever it says first, it hangs up.
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
    Near::new("near").assert_served_by(&far);
}

#[test]
fn a_flood_of_connections_leaves_transfers_and_newcomers_alone() {
    let far = target!("far", LEN, "read-write", "half_open=32");
    let near = Near::new("near");
    near.assert_served_by(&far);
    let port = listening_ports(far.process.id())[0];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flooding = scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                if let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                    let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
                    count += 1;
                }
            }
            count
        });
        for round in 0..10 {
            near.assert_served_by(&far);
            let newcomer = Near::new(&format!("newcomer-{round}"));
            let peer = newcomer.engine.load_peer(&far.metadata).unwrap();
            eventually("a newcomer connects", || peer.connect(BOUND).is_ok());
            newcomer.assert_served_by(&far);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(flooding.join().unwrap() > 0);
    });
    near.assert_served_by(&far);
}

/// An engine behind a proxy, its memory, and another engine that knows it.
struct Behind {
    memory: Buffer,
    region: Region,
    engine: Engine,
    near: Near,
    peer: Peer,
    proxy: Proxy,
}

impl Behind {
    fn new(passing: Passing) -> Self {
        let proxy = Proxy::new(passing);
        let mut config = tcp_config();
        config.listen.advertise = vec![proxy.address()];
        config.liveness = Duration::from_millis(500);
        let (engine, port) = engine_on_a_known_port("behind", config);
        proxy.aim(port);
        let memory = Buffer::with_pattern(1, LEN);
        let region = memory.register(&engine, Access::READ_WRITE);
        let mut config = tcp_config();
        config.liveness = Duration::from_millis(500);
        config.connect_timeout = Duration::from_millis(500);
        config.operation_timeout = Duration::from_secs(2);
        let near = {
            let engine = Engine::new("near", config).unwrap();
            let memory = Buffer::new(LEN);
            let region = memory.register(&engine, Access::LOCAL);
            Near { memory, region, engine }
        };
        let peer = near.engine.load_peer(&engine.metadata()).unwrap();
        Self { memory, region, engine, near, peer, proxy }
    }

    fn transfer(&self, operation: Operation, len: usize) -> Transfer {
        // Some bytes around it stay untouched on both sides.
        let local = [self.near.region.segment(4096, len as u64)];
        let remote = [self.region.descriptor().segment(4096, len as u64)];
        let plan = self.near.engine.prepare(operation, &self.peer, &local, &remote);
        plan.unwrap().transfer()
    }

    /// A read that must succeed, now or after some attempts.
    #[track_caller]
    fn assert_serves(&self) {
        self.memory.fill(1, 0, LEN, 0);
        for len in [64, LEN / 2] {
            let transfer = self.transfer(Operation::Read, len);
            eventually("it is served", || {
                self.near.memory.poison(0, LEN);
                end_of(&transfer).is_ok()
            });
            self.near.memory.assert_pattern(1, 4096, len, 4096);
        }
    }
}

/// The session lives, and one of its streams takes no more: what waits in its socket to be sent holds memory in use, which
/// only the kernel's bound for the stream ends. The other side is patient.
#[test]
fn a_stream_that_takes_nothing_more_holds_memory_no_longer_than_a_silent_peer() {
    const LEN: usize = 64 << 20;
    /// Of the stream and of the session, which is to outlive it on a machine that has other things to do.
    const SILENCE: Duration = Duration::from_secs(3);
    let proxy = Proxy::new(Passing::Whole);
    let mut config = tcp_config();
    config.listen.advertise = vec![proxy.address()];
    config.liveness = SILENCE;
    let (owner, port) = engine_on_a_known_port("owner", config);
    proxy.aim(port);
    let memory = Buffer::with_pattern(1, LEN);
    let region = memory.register(&owner, Access::READ_WRITE);
    let mut config = tcp_config();
    config.liveness = SILENCE;
    config.operation_timeout = BOUND * 10;
    // More than sockets hold.
    (config.streams, config.chunk_bytes) = (1, 8 << 20);
    let near = corelane_tests::Near::new(config, LEN);
    let peer = near.connect(&owner.metadata());
    // Streams come after the session.
    proxy.set(Passing::HeldAfter(1 << 20));
    let transfer = near.transfer(&peer, Operation::Read, (0, 0), region.descriptor(), LEN);
    transfer.post().unwrap();
    eventually("streams move bytes", || proxy.passed() > 1 << 20);
    assert!(matches!(transfer.status(), Status::InProgress));
    eventually("the memory is given back", || owner.deregister(&region).is_ok());
    assert!(peer.is_connected(), "it was the session's end that gave it back");
}

#[test]
fn bytes_that_arrive_one_by_one_are_put_together() {
    let behind = Behind::new(Passing::Crumbs(1));
    let transfer = behind.transfer(Operation::Read, 3000);
    // On a busy machine so many small steps may take longer than this engine waits.
    eventually("it is served", || end_of(&transfer).is_ok());
    behind.near.memory.assert_pattern(1, 4096, 3000, 4096);
    behind.proxy.set(Passing::Crumbs(1009));
    behind.proxy.cut();
    behind.assert_serves();
    behind.peer.notify(&[7; 100_000]).unwrap();
    assert_eq!(corelane_tests::collect(&behind.engine, 1)[0].payload, [7; 100_000]);
}

#[test]
fn connections_cut_at_any_point_of_the_handshake_are_an_error_and_no_more() {
    let behind = Behind::new(Passing::CutAfter(0));
    for limit in (0..120).chain((120..600).step_by(17)) {
        behind.proxy.set(Passing::CutAfter(limit));
        // The later ones come far enough to connect.
        let _ = behind.peer.connect(BOUND);
        behind.proxy.cut();
    }
    behind.proxy.set(Passing::Whole);
    behind.assert_serves();
}

#[test]
fn connections_cut_in_the_middle_of_transfers_lose_no_byte_silently() {
    let behind = Behind::new(Passing::Whole);
    for round in 0..30u64 {
        behind.memory.fill(round, 0, LEN, 0);
        behind.near.memory.poison(0, LEN);
        let len = if round % 2 == 0 { 900_000 } else { 5000 };
        let transfer = behind.transfer(Operation::Read, len);
        let before = behind.proxy.passed();
        transfer.post().unwrap();
        while behind.proxy.passed() < before + round * 20_000 {
            if !matches!(transfer.status(), corelane::Status::InProgress) {
                break;
            }
        }
        behind.proxy.cut();
        match outcome(&transfer) {
            Ok(()) => behind.near.memory.assert_pattern(round, 4096, len, 4096),
            Err(error) => assert!(error.is_disconnect(), "{error}"),
        }
        behind.near.memory.assert_poison(0, 4096);
        behind.near.memory.assert_poison(4096 + len, LEN - 4096 - len);
        behind.assert_serves();
    }
}

#[test]
fn notifications_cut_on_their_way_arrive_once_or_are_counted_as_dropped() {
    let behind = Behind::new(Passing::Whole);
    let mut taken = Vec::new();
    let mut take = |engine: &Engine| {
        engine.take_notifications(|n| taken.push(u64::from_le_bytes(n.payload.try_into().unwrap())))
    };
    for number in 0..5000u64 {
        eventually("there is room", || behind.peer.notify(&number.to_le_bytes()).is_ok());
        take(&behind.engine).unwrap();
        if number % 250 == 100 {
            behind.proxy.cut();
        }
    }
    eventually("nothing is under way", || {
        take(&behind.engine).unwrap();
        let stats = behind.near.engine.stats();
        stats.peers.iter().all(|peer| peer.unacknowledged == 0)
    });
    take(&behind.engine).unwrap();
    assert!(taken.windows(2).all(|pair| pair[0] < pair[1]), "twice, or out of order: {taken:?}");
    let dropped = behind.near.engine.stats().totals.notifications_dropped;
    assert!(taken.len() as u64 + dropped >= 5000, "{} and {dropped} dropped", taken.len());
}

#[test]
fn altered_bytes_cause_errors_and_no_more() {
    let behind = Behind::new(Passing::Whole);
    let bystander = target!("bystander", LEN);
    let mut random = Random::new(11);
    for round in 0..60 {
        // From the first byte of the handshake to the frames behind it.
        let position = if round < 30 { round * 8 } else { 200 + random.below(2000) as u64 };
        behind.proxy.set(Passing::Flipped(position));
        behind.proxy.cut();
        let transfers = [(Operation::Read, 100), (Operation::Write, 200_000)]
            .map(|(operation, len)| behind.transfer(operation, len));
        for transfer in &transfers {
            // Whatever it is, it is an end; payload itself has no checksum.
            if transfer.post_with_notification(b"n").is_ok() {
                let _ = outcome(transfer);
            }
        }
        // A notification or two may be altered too.
        let _ = behind.engine.notifications().unwrap();
    }
    // Nothing was written outside of what was asked for.
    behind.near.memory.assert_poison(0, 4096);
    behind.memory.assert_pattern(1, 0, 4096, 0);
    behind.memory.assert_pattern(1, 4096 + 200_000, LEN - 4096 - 200_000, 4096 + 200_000);
    behind.proxy.set(Passing::Whole);
    behind.proxy.cut();
    behind.assert_serves();
    behind.near.assert_served_by(&bystander);
}

#[test]
fn a_recorded_conversation_cannot_be_replayed() {
    let behind = Behind::new(Passing::Whole);
    let transfer = behind.transfer(Operation::Write, 1000);
    behind.near.memory.fill(2, 0, LEN, 0);
    transfer.post_with_notification(b"once").unwrap();
    outcome(&transfer).unwrap();
    assert_eq!(corelane_tests::collect(&behind.engine, 1)[0].payload, b"once");
    behind.near.engine.shutdown().unwrap();
    behind.memory.fill(3, 0, LEN, 0);
    let recorded = behind.proxy.recorded();
    assert!(recorded.iter().any(|bytes| bytes.len() > 1000), "the write was recorded");
    let refused = behind.engine.stats().totals.links_refused;
    for bytes in recorded.iter().filter(|bytes| !bytes.is_empty()) {
        let mut stream = TcpStream::connect(behind.proxy.address()).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        stream.write_all(bytes).unwrap();
        // Until the engine hangs up.
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert!(behind.engine.stats().totals.links_refused > refused);
    assert!(behind.engine.notifications().unwrap().is_empty());
    behind.memory.assert_pattern(3, 0, LEN, 0);
}
