//! What an engine does to the process that it lives in: no signal ends it, and no descriptor of the engine's goes to a program that it
//! starts.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use corelane::{Access, AssistMode, Engine, EngineConfig, Operation};
use corelane_tests::hostile::{HostilePeer, Identity, knock_locally};
use corelane_tests::{
    BOUND, Buffer, Configuration, collect, end_of, eventually, local_config, over_local_and_tcp,
    peer_process, target,
};

over_local_and_tcp!(
    peers_that_are_killed_amid_transfers_leave_a_process_alive_that_ignores_no_signal,
    no_descriptor_of_an_engine_is_left_to_a_program_that_its_process_starts,
);

const LEN: usize = 8 << 20;

/// As in a program in C: the standard library of Rust ignores this signal, as does Python's.
fn let_broken_pipes_kill() {
    // SAFETY: the handler is the kernel's.
    let before = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    assert_ne!(before, libc::SIG_ERR);
}

/// A lane's own thread takes no signals: the turns in question are those of a caller.
fn driven_by_callers(mut config: EngineConfig) -> EngineConfig {
    config.assist = AssistMode::Always;
    config
}

fn peers_that_are_killed_amid_transfers_leave_a_process_alive_that_ignores_no_signal(
    config: Configuration,
) {
    let_broken_pipes_kill();
    let engine = Engine::new("near", driven_by_callers(config())).unwrap();
    let memory = Buffer::new(LEN);
    let region = memory.register(&engine, Access::LOCAL);
    for round in 0..8 {
        let far = target!("far", LEN);
        let peer = engine.load_peer(&far.metadata).unwrap();
        let transfer = |operation| {
            let (local, remote) =
                ([region.segment(0, LEN as u64)], [far.region.segment(0, LEN as u64)]);
            engine.prepare(operation, &peer, &local, &remote).unwrap().transfer()
        };
        let all: Vec<_> =
            [Operation::Write, Operation::Read, Operation::Write].map(transfer).into();
        end_of(&all[0]).unwrap();
        all.iter().for_each(|transfer| transfer.post().unwrap());
        std::thread::sleep(Duration::from_micros(round * 400));
        far.process.kill();
        // Something to send is always there.
        eventually("its end is noticed", || {
            let _ = peer.notify(&[7; 10_000]);
            !peer.is_connected()
        });
        for transfer in &all {
            // Some may have been faster.
            let _ = corelane_tests::outcome(transfer);
        }
        engine.unload_peer(&peer).unwrap();
    }
}

#[test]
fn a_peer_that_stops_taking_bytes_is_left_and_its_socket_sends_no_signal() {
    let_broken_pipes_kill();
    let mut config = driven_by_callers(local_config());
    // Asked whether it is there a quarter of that later: that is what is sent to it.
    config.liveness = Duration::from_millis(400);
    let engine = Engine::new("near", config).unwrap();
    let own = Identity::of(&engine.metadata());
    for round in 0..4 {
        let name = format!("deaf-{round}");
        let other = Identity::invented(&name, 100 + round);
        let mut deaf = HostilePeer::connect(knock_locally(own.incarnation), &other, &own);
        let peer = engine.accept(BOUND).unwrap();
        // Before, nothing is said to it.
        deaf.ping(1).unwrap();
        // Callers drive the lane from now on, which stands by.
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(5) {
            engine.notifications().unwrap();
        }
        deaf.stream.stop_hearing();
        while peer.is_connected() {
            assert!(start.elapsed() < BOUND, "it is not left");
            let _ = peer.notify(b"to nobody");
            engine.notifications().unwrap();
        }
    }
}

/// Every descriptor of this process that a program it starts would get, and what it is.
fn inherited() -> BTreeMap<u32, String> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap() {
        let number = entry.unwrap().file_name();
        let number = number.to_str().unwrap();
        // One that another thread has closed meanwhile is gone.
        let Ok(info) = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")) else {
            continue;
        };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let flags = i32::from_str_radix(flags, 8).unwrap();
        if flags & libc::O_CLOEXEC == 0 {
            let what = std::fs::read_link(format!("/proc/self/fd/{number}"));
            let what = what.map(|path| path.display().to_string()).unwrap_or_default();
            found.insert(number.parse().unwrap(), what);
        }
    }
    found
}

fn no_descriptor_of_an_engine_is_left_to_a_program_that_its_process_starts(config: Configuration) {
    let before = inherited();
    let engine = Engine::new("near", config()).unwrap();
    let memory = Buffer::with_pattern(1, LEN);
    let region = memory.register(&engine, Access::READ_WRITE);
    // Sockets that connect, bulk streams, what comes with them on this host, and what watches its process.
    let far = target!("far", LEN);
    let peer = engine.load_peer(&far.metadata).unwrap();
    let (local, remote) = ([region.segment(0, LEN as u64)], [far.region.segment(0, LEN as u64)]);
    for operation in [Operation::Read, Operation::Write] {
        end_of(&engine.prepare(operation, &peer, &local, &remote).unwrap().transfer()).unwrap();
    }
    peer.notify(b"by the ring").unwrap();
    // Sockets that are accepted.
    let mut other = peer_process!();
    other.engine("other", "");
    other.load(&engine.metadata());
    other.ask("notify near 6869");
    assert_eq!(collect(&engine, 1)[0].payload, b"hi");
    let accepted = engine.accept(BOUND).unwrap();
    accepted.notify(b"to who came").unwrap();
    // Memory that the engine has made, and shares.
    let (shared, _shared_region) = Buffer::of_engine(&engine, LEN, Access::READ_WRITE);
    let ours = corelane_tests::open_files(std::process::id());
    assert!(ours > before.len() + 5, "{ours} descriptors are not those of an engine with peers");
    for (number, what) in inherited() {
        assert_eq!(before.get(&number), Some(&what), "descriptor {number} is left to programs");
    }
    shared.free(&engine).map_err(|(error, _)| error).unwrap();
}
