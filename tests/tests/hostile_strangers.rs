//! Strangers: connections that were not let in, in numbers, and slowly.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::io::Write;
use std::time::Duration;

use corelane::{Access, EngineConfig, Operation};
use corelane_tests::hostile::{Hello, Identity, Stream, hear, knock, knock_locally, say};
use corelane_tests::{
    Configuration, Near, Target, end_of, eventually, listening_ports, local_config, open_files,
    resident_bytes_of, target, tcp_config, threads_of,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const LEN: usize = 1 << 20;

struct Victim {
    far: Target,
    identity: Identity,
    config: Configuration,
    /// `None`: it is reached on its host only.
    port: Option<u16>,
    near: Near,
    files: usize,
    threads: usize,
    memory: u64,
}

impl Victim {
    fn new(config: Configuration, settings: &str) -> Self {
        let far = target!("far", LEN, "read", settings);
        let near = Near::new(config(), LEN);
        let pid = far.process.id();
        let identity = Identity::of(&far.metadata);
        let over_network = config().transports == tcp_config().transports;
        let port = over_network.then(|| listening_ports(pid)[0]);
        let (files, threads, memory) = (0, 0, 0);
        let mut victim = Self { far, identity, config, port, near, files, threads, memory };
        victim.assert_serves();
        victim.files = open_files(pid);
        victim.threads = threads_of(pid);
        victim.memory = resident_bytes_of(pid);
        victim
    }

    fn knock(&self) -> Stream {
        match self.port {
            Some(port) => knock(port),
            None => knock_locally(self.identity.incarnation),
        }
    }

    fn config(&self) -> EngineConfig {
        (self.config)()
    }

    #[track_caller]
    fn assert_serves(&self) {
        let peer = self.near.connect(&self.far.metadata);
        self.near.memory.poison(0, LEN);
        let read = self.near.transfer(&peer, Operation::Read, (0, 0), &self.far.region, 100_000);
        end_of(&read).unwrap();
        self.near.memory.assert_pattern(1, 0, 100_000, 0);
    }

    /// Somebody who has the metadata gets in, at the first attempt or a later one.
    #[track_caller]
    fn assert_lets_in(&self, name: &str) {
        let newcomer = Near::named(name, self.config(), 4096, Access::LOCAL);
        let peer = newcomer.engine.load_peer(&self.far.metadata).unwrap();
        eventually("a newcomer connects", || peer.connect(Duration::from_secs(5)).is_ok());
        let read = newcomer.transfer(&peer, Operation::Read, (0, 4096), &self.far.region, 4096);
        end_of(&read).unwrap();
        newcomer.memory.assert_pattern(1, 0, 4096, 4096);
    }

    #[track_caller]
    fn assert_holds_at_most(&self, more: usize) {
        let pid = self.far.process.id();
        eventually("only so many are kept", || open_files(pid) <= self.files + more);
        assert!(threads_of(pid) <= self.threads);
        let grown = resident_bytes_of(pid).saturating_sub(self.memory);
        assert!(grown < 16 << 20, "{grown} bytes for connections that said nothing");
    }
}

/// As many descriptors as this process may have, and how many connections that leaves room for.
fn connections() -> usize {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let wanted = most.min(20_000);
    setrlimit(Resource::RLIMIT_NOFILE, wanted, most).unwrap();
    ((wanted as usize).saturating_sub(300)).min(4000)
}

fn thousands_that_say_nothing(config: Configuration, settings: &str) {
    let victim = Victim::new(config, settings);
    let count = connections();
    let mut held = Vec::with_capacity(count);
    for number in 0..count {
        held.push(victim.knock());
        if number % 1000 == 500 {
            victim.assert_serves();
            victim.assert_lets_in(&format!("newcomer-{number}"));
            // The default of `limits.half_open`, and what newcomers leave for a moment.
            victim.assert_holds_at_most(256 + 16);
        }
    }
    println!("{count} connections, {} held", open_files(victim.far.process.id()) - victim.files);
    victim.assert_serves();
    // All are hung up on, without a word of theirs.
    for stream in &mut held {
        assert_eq!(hear(stream), None);
    }
    victim.assert_holds_at_most(8);
    victim.assert_lets_in("last");
}

#[test]
fn thousands_of_connections_that_say_nothing_over_tcp() {
    thousands_that_say_nothing(tcp_config, "transports=tcp connect_ms=1000");
}

#[test]
fn thousands_of_connections_that_say_nothing_on_one_host() {
    thousands_that_say_nothing(local_config, "connect_ms=1000");
}

#[test]
fn a_handshake_a_byte_at_a_time_is_hung_up_on_in_time() {
    const SLOW: usize = 100;
    let victim = Victim::new(tcp_config, "transports=tcp connect_ms=700");
    let from = Identity::invented("slow", 1);
    let hello = Hello::honest(&from, &victim.identity, 1).encode();
    let message = [&(hello.len() as u16).to_le_bytes()[..], &hello].concat();
    let mut slow: Vec<Stream> = (0..SLOW).map(|_| victim.knock()).collect();
    // A byte every 30 ms: four seconds for all of it, if that were waited for.
    let mut said = vec![0; SLOW];
    for (number, byte) in message.iter().enumerate() {
        for (stream, said) in slow.iter_mut().zip(&mut said) {
            if *said == number && stream.write_all(&[*byte]).is_ok() {
                *said += 1;
            }
        }
        std::thread::sleep(Duration::from_millis(30));
        if number % 20 == 10 {
            victim.assert_serves();
            victim.assert_lets_in(&format!("newcomer-{number}"));
        }
    }
    assert!(said.iter().all(|said| *said < message.len()), "one was waited for");
    for stream in &mut slow {
        assert_eq!(hear(stream), None);
    }
    victim.assert_holds_at_most(8);
}

#[test]
fn a_handshake_that_stops_anywhere_is_hung_up_on() {
    let victim = Victim::new(tcp_config, "transports=tcp connect_ms=500");
    let from = Identity::invented("half", 1);
    let hello = Hello::honest(&from, &victim.identity, 1).encode();
    let message = [&(hello.len() as u16).to_le_bytes()[..], &hello].concat();
    let mut stopped: Vec<Stream> = Vec::new();
    for len in 0..=message.len() {
        let mut stream = victim.knock();
        stream.write_all(&message[..len]).unwrap();
        stopped.push(stream);
    }
    // Challenged, and then: a part of an answer.
    for len in 0..71 {
        let mut stream = victim.knock();
        say(&mut stream, &hello);
        assert!(hear(&mut stream).is_some());
        let auth = [&[69u8, 0][..], b"CLNE\x03", &[1; 64]].concat();
        stream.write_all(&auth[..len]).unwrap();
        stopped.push(stream);
    }
    victim.assert_lets_in("newcomer");
    for stream in &mut stopped {
        // Some were challenged; then, or at once, nothing more comes.
        while hear(stream).is_some() {}
    }
    victim.assert_holds_at_most(8);
    victim.assert_serves();
}
