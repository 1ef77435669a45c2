//! Peers on the same host that are kept from each other: by users, by what a process allows, by namespaces. What works is
//! used, and the log says why no more does.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane::{Operation, RegionDescriptor, TransportKind};
use corelane_tests::{
    Near, PeerProcess, end_of, eventually, from_hex, local_config, not_run, peer_process, to_hex,
};

const LEN: usize = 3 << 20;
/// Nobody.
const USER: u32 = 65_534;
const OTHER_USER: u32 = 65_533;

fn alloc(process: &mut PeerProcess, id: &str, access: &str) -> RegionDescriptor {
    let bytes = from_hex(&process.ask(&format!("alloc {id} {LEN} {access}"))).unwrap();
    RegionDescriptor::from_bytes(&bytes).unwrap()
}

/// A process of another user; `None`, and the test says so: this one may not make such.
fn of_user(id: u32, dumpable: bool) -> Option<PeerProcess> {
    let mut process = peer_process!();
    if let Err(error) = process.try_ask(&format!("become-user {id}")) {
        assert!(error.contains("permitted"), "{error}");
        not_run(&format!("becoming another user: {error}"));
        return None;
    }
    process.ask(&format!("dumpable {}", u32::from(dumpable)));
    Some(process)
}

/// Two peers, each a process, of which `near` copies from and to `far`.
struct Couple {
    near: PeerProcess,
    far: PeerProcess,
    region: String,
}

impl Couple {
    fn new(mut near: PeerProcess, mut far: PeerProcess, settings: &str) -> Self {
        near.ask("keep-log");
        let metadata = far.engine("far", "");
        let region = to_hex(&far.region("r", LEN, "read-write").to_bytes());
        far.ask(&format!("fill r 1 0 {LEN} 0"));
        near.engine("near", settings);
        near.region("r", LEN, "local");
        near.load(&metadata);
        Self { near, far, region }
    }

    /// Reads and writes of several sizes to one of the peer's regions.
    #[track_caller]
    fn copy(&mut self, id: &str, descriptor: &str) {
        for len in [64, 5000, 100_000, LEN] {
            self.far.ask(&format!("fill {id} 1 0 {LEN} 0"));
            self.near.ask(&format!("poison r 0 {LEN}"));
            self.near.ask(&format!("read far r 0 {descriptor} 0 {len} 01"));
            self.near.ask(&format!("check r 1 0 {len} 0"));
            self.near.ask(&format!("fill r 2 0 {len} 0"));
            self.near.ask(&format!("write far r 0 {descriptor} 0 {len} 02"));
            assert_eq!(self.far.ask("take 2"), "near:01 near:02");
            self.far.ask(&format!("check {id} 2 0 {len} 0"));
            if len < LEN {
                self.far.ask(&format!("check {id} 1 {len} {} {len}", LEN - len));
            }
        }
    }

    fn served(&mut self) -> u64 {
        self.far.number("served")
    }

    /// Works by the next transport, and the log says once why.
    #[track_caller]
    fn assert_fallen_back(&mut self, reason: &str) {
        let region = self.region.clone();
        self.copy("r", &region);
        assert_eq!(self.near.ask("transport far"), "tcp");
        assert!(self.served() > 0);
        let lines = self.near.ask("log connected peer=\"far\"");
        assert_eq!(lines.matches("connected").count(), 1, "{lines}");
        assert!(lines.contains(reason), "{lines}");
    }

    /// Memory of the peer's engine is copied all the same: it is mapped.
    #[track_caller]
    fn assert_maps(&mut self, access: &str) {
        let region = alloc(&mut self.far, "m", access);
        let descriptor = to_hex(&region.to_bytes());
        // The message about it may still be on its way: until then it is memory like other.
        let read = format!("read far r 0 {descriptor} 0 64");
        eventually("the memory is mapped", || {
            let served = self.served();
            self.near.try_ask(&read).is_ok() && self.served() == served
        });
        let served = self.served();
        self.copy("m", &descriptor);
        assert_eq!(self.served(), served, "the peer was asked to serve");
    }
}

#[test]
fn processes_of_one_user_without_privileges_reach_each_other() {
    let Some(near) = of_user(USER, true) else { return };
    let Some(far) = of_user(USER, true) else { return };
    let mut couple = Couple::new(near, far, "");
    let region = couple.region.clone();
    couple.copy("r", &region);
    assert_eq!(couple.near.ask("transport far"), "local");
    assert_eq!(couple.served(), 0);
    couple.assert_maps("read-write");
}

#[test]
fn a_process_that_lets_nobody_in_is_reached_by_the_next_transport() {
    let Some(near) = of_user(USER, true) else { return };
    let Some(far) = of_user(USER, false) else { return };
    let mut couple = Couple::new(near, far, "");
    couple.assert_fallen_back("ptrace");
    couple.assert_maps("read-write");
}

#[test]
fn a_process_of_another_user_is_reached_by_the_next_transport() {
    let Some(near) = of_user(USER, true) else { return };
    let Some(far) = of_user(OTHER_USER, true) else { return };
    let mut couple = Couple::new(near, far, "");
    couple.assert_fallen_back("another user");
    couple.assert_maps("read-write");
}

#[test]
fn a_process_with_privileges_is_reached_by_one_without_by_the_next_transport() {
    let Some(near) = of_user(USER, true) else { return };
    let mut couple = Couple::new(near, peer_process!(), "");
    couple.assert_fallen_back("ptrace");
}

#[test]
fn each_side_goes_as_far_as_it_can() {
    // Root reaches the other, and not the other way round.
    let Some(mut far) = of_user(USER, true) else { return };
    let near = Near::named("near", local_config(), LEN, corelane::Access::READ_WRITE);
    let metadata = far.engine("far", "");
    let region = far.region("r", LEN, "read-write");
    far.ask(&format!("fill r 1 0 {LEN} 0"));
    let peer = near.connect_locally(&metadata);
    let read = near.transfer(&peer, Operation::Read, (0, 0), &region, LEN);
    end_of(&read).unwrap();
    near.memory.assert_pattern(1, 0, LEN, 0);
    assert_eq!(far.number("served"), 0);
    far.load(&near.engine.metadata());
    let descriptor = to_hex(&near.region.descriptor().to_bytes());
    far.ask(&format!("poison r 0 {LEN}"));
    far.ask(&format!("read near r 0 {descriptor} 0 {LEN}"));
    far.ask(&format!("check r 1 0 {LEN} 0"));
    assert_eq!(far.ask("transport near"), "tcp");
    assert!(near.engine.stats().totals.requests_served > 0);
}

#[test]
fn where_only_local_is_allowed_and_does_not_work_the_error_says_why() {
    let Some(near) = of_user(USER, true) else { return };
    let Some(far) = of_user(USER, false) else { return };
    let mut couple = Couple::new(near, far, "transports=local");
    for command in ["read", "write"] {
        for len in [64, LEN] {
            let request = format!("{command} far r 0 {} 0 {len}", couple.region);
            let error = couple.near.try_ask(&request).unwrap_err();
            assert!(error.starts_with("Connect "), "{error}");
            assert!(error.contains("ptrace"), "{error}");
        }
    }
    couple.far.ask(&format!("check r 1 0 {LEN} 0"));
    couple.near.ask(&format!("check-poison r 0 {LEN}"));
    // What is mapped goes all the same.
    couple.assert_maps("read-write");
}

/// A process in namespaces of its own; `None`, and the test has said so.
fn isolated(options: &[&str]) -> Option<PeerProcess> {
    let mut words = vec!["unshare", "--kill-child"];
    words.extend(options);
    words.push(env!("CARGO_BIN_EXE_corelane-test-peer"));
    match PeerProcess::start_by(&words) {
        Ok(process) => Some(process),
        Err(reason) => {
            not_run(&format!("unshare {}: {reason}", options.join(" ")));
            None
        }
    }
}

#[test]
fn a_peer_in_a_pid_namespace_below_this_one_is_reached_directly() {
    // From above its process can be seen, by a number of ours.
    let Some(far) = isolated(&["--pid", "--fork"]) else { return };
    let mut couple = Couple::new(peer_process!(), far, "");
    let region = couple.region.clone();
    couple.copy("r", &region);
    assert_eq!(couple.near.ask("transport far"), "local");
    couple.assert_maps("read-write");
}

#[test]
fn a_peer_that_cannot_be_seen_from_its_pid_namespace_is_reached_by_the_next_transport() {
    for mount_proc in [false, true] {
        let mut options = vec!["--pid", "--fork"];
        if mount_proc {
            options.push("--mount-proc");
        }
        let Some(near) = isolated(&options) else { return };
        let mut couple = Couple::new(near, peer_process!(), "");
        couple.assert_fallen_back("PID namespace");
        couple.assert_maps("read-write");
    }
}

#[test]
fn peers_of_two_pid_namespaces_reach_each_other_by_the_next_transport() {
    let Some(near) = isolated(&["--pid", "--fork"]) else { return };
    let Some(far) = isolated(&["--pid", "--fork"]) else { return };
    let mut couple = Couple::new(near, far, "");
    couple.assert_fallen_back("PID namespace");
    couple.assert_maps("read-write");
    // Killed: its memory is given back although nobody can see whether it lives.
    alloc(&mut couple.near, "theirs", "read-write");
    drop(couple.far);
    couple.near.ask("free theirs");
}

#[test]
fn a_process_id_that_names_another_process_here_is_not_believed() {
    // With the /proc of the namespace above, paths of process IDs lead to strangers.
    let Some(near) = isolated(&["--pid", "--fork", "--user", "--map-root-user"]) else { return };
    let mut couple = Couple::new(near, peer_process!(), "");
    couple.assert_fallen_back("PID namespace");
}

#[test]
fn a_peer_in_another_user_namespace_is_reached_from_it_by_the_next_transport() {
    let Some(near) = isolated(&["--user", "--map-root-user"]) else { return };
    let mut couple = Couple::new(near, peer_process!(), "");
    couple.assert_fallen_back("user namespace");
    couple.assert_maps("read-write");
}

#[test]
fn a_peer_in_another_mount_namespace_is_reached_directly() {
    let Some(far) = isolated(&["--mount"]) else { return };
    let mut couple = Couple::new(peer_process!(), far, "");
    let region = couple.region.clone();
    couple.copy("r", &region);
    assert_eq!(couple.near.ask("transport far"), "local");
}

#[test]
fn a_peer_in_another_network_namespace_is_not_taken_for_a_neighbour() {
    // Without a network between them nothing reaches it: and the error says what was tried.
    let Some(mut far) = isolated(&["--net"]) else { return };
    let metadata = far.engine("far", "");
    let region = far.region("r", LEN, "read-write");
    let near = Near::new(local_config(), LEN);
    let peer = near.engine.load_peer(&metadata).unwrap();
    let read = near.transfer(&peer, Operation::Read, (0, 0), &region, LEN);
    let error = end_of(&read).unwrap_err();
    assert_eq!(corelane_tests::kind(&error), "Connect", "{error}");
    let stats = near.engine.stats();
    assert!(stats.peers.iter().all(|peer| peer.transport != Some(TransportKind::Local)));
    near.memory.assert_poison(0, LEN);
}
