//! The peer's process ends, and another gets its process ID, with memory at the same addresses: that one is not touched,
//! and what it holds is not taken for the peer's. The peer's own words are kept from telling that it has died, a child keeps its
//! sockets open, and silence is not heard for long: so the engine still takes it for alive when it looks at the process.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use corelane::{EngineConfig, Error, Operation, Peer, RegionDescriptor, Transfer};
use corelane_tests::{
    BOUND, Killed, Near, PeerProcess, Target, end_of, kind, local_config, not_run, outcome,
    pattern, skipped, start_with_id, target, wait_for_process, writable_ranges,
};

const LEN: usize = 4 << 20;
/// Through `/proc`, in one call, by the caller, by the lane.
const SIZES: [usize; 6] = [1, 4096, 16_000, 70_000, 1 << 20, LEN];
/// What the other process holds.
const OTHER: u64 = 9;

fn initiator(strict_writes: bool, inline: bool) -> EngineConfig {
    let mut config = local_config();
    config.strict_writes = strict_writes;
    if !inline {
        config.inline_bytes = 0;
    }
    // It is not to be told by silence that the peer is gone.
    config.liveness = BOUND;
    // A child of the dead peer's keeps its listening socket open, too, and accepts nothing.
    config.connect_timeout = Duration::from_millis(50);
    config
}

/// Of each size and operation, one range and many.
fn transfers(near: &Near, peer: &Peer, remote: &RegionDescriptor) -> Vec<Transfer> {
    let mut all = Vec::new();
    for operation in [Operation::Write, Operation::Read] {
        for len in SIZES {
            all.push(near.transfer(peer, operation, (0, 0), remote, len));
            if len >= 4096 {
                let piece = (len / 128) as u64;
                let local: Vec<_> =
                    (0..64).map(|i| near.region.segment(i * piece * 2, piece)).collect();
                let remote: Vec<_> =
                    (0..64).map(|i| remote.segment((63 - i) * piece * 2, piece)).collect();
                all.push(near.transfer_of_lists(peer, operation, &local, &remote));
            }
        }
    }
    all
}

#[track_caller]
fn assert_gone(ended: Result<(), Error>, transfer: &Transfer) {
    let (operation, bytes) = (transfer.plan().operation(), transfer.plan().bytes());
    let error = ended.expect_err(&format!("{operation:?} of {bytes} bytes in the wrong process"));
    let expected = ["RemoteDisconnect", "Connect"];
    assert!(expected.contains(&kind(&error)), "{operation:?} of {bytes}: {error}");
}

/// From now on the peer's death tells nobody: a child keeps its sockets open until the answer is dropped, and the kernel does
/// not know what it should write into the words of its life.
fn keep_death_secret(near: &Near, far: &mut Target) -> Killed {
    far.process.load(&near.engine.metadata());
    far.process.ask("end-unheard near");
    Killed(far.process.number("fork") as u32)
}

/// The moment that these tests are about: nothing but a look at the process itself can tell that the peer is gone.
#[track_caller]
fn assert_unnoticed(peer: &Peer) {
    assert!(peer.is_connected(), "the engine knows that the peer has died, before it has looked");
}

/// What an impostor has to know of the peer while that lives.
struct Likeness {
    id: u32,
    region: RegionDescriptor,
    memory: Vec<(u64, u64)>,
}

impl Likeness {
    fn of(far: &Target) -> Self {
        let id = far.process.id();
        Self { id, region: far.region.clone(), memory: writable_ranges(id) }
    }

    /// A process with the ID that the dead peer had. `None`, and the test has said so: it cannot be had.
    fn reborn(&self) -> Option<Impostor> {
        match start_with_id(env!("CARGO_BIN_EXE_corelane-test-peer"), self.id) {
            Ok(process) => {
                let process = process.expect("the process ID stays free for a moment");
                Some(Impostor::new(process, self))
            }
            Err(error) => {
                skipped("choosing a process ID", &error);
                None
            }
        }
    }
}

/// A process that is not the peer, with a pattern of its own where the peer had its region, and with memory wherever else
/// the peer had some: so that no access fails for want of memory.
struct Impostor {
    process: PeerProcess,
    /// Its own libraries may happen to lie there: then there is nothing to look at.
    mapped: bool,
}

impl Impostor {
    fn new(mut process: PeerProcess, likeness: &Likeness) -> Self {
        let base = likeness.region.base();
        let mapped = process.try_ask(&format!("map other {base} {LEN}")).is_ok();
        if mapped {
            process.ask(&format!("fill other {OTHER} 0 {LEN} 0"));
        }
        for (address, len) in likeness.memory.iter().filter(|(_, len)| *len <= 1 << 20) {
            // Where it has something else already, it has something.
            let _ = process.try_ask(&format!("map at{address} {address} {len}"));
        }
        Self { process, mapped }
    }

    #[track_caller]
    fn assert_untouched(&mut self) {
        if self.mapped {
            self.process.ask(&format!("check other {OTHER} 0 {LEN} 0"));
        }
    }
}

/// The peer is killed in secret, and its process ID given to another. Then everything is posted: all at once, or one by one.
fn reuse(config: EngineConfig, at_once: bool) {
    for round in 0..3 {
        let mut far = target!("far", LEN, "read-write", "liveness_ms=60000");
        let near = Near::new(config.clone(), LEN);
        let peer = near.connect_locally(&far.metadata);
        let transfers = transfers(&near, &peer, &far.region);
        end_of(&transfers[0]).unwrap();
        let _holder = keep_death_secret(&near, &mut far);
        let likeness = Likeness::of(&far);
        drop(far);
        let Some(mut other) = likeness.reborn() else { return };
        assert_unnoticed(&peer);
        let first = round * 5 % transfers.len();
        let order = || transfers[first..].iter().chain(&transfers[..first]);
        if at_once {
            for transfer in order() {
                transfer.post().unwrap();
            }
            for transfer in order() {
                assert_gone(outcome(transfer), transfer);
            }
        } else {
            for transfer in order() {
                assert_gone(end_of(transfer), transfer);
            }
        }
        other.assert_untouched();
    }
}

#[test]
fn a_process_with_the_dead_peers_id_is_not_touched() {
    reuse(initiator(false, true), false);
}

#[test]
fn a_process_with_the_dead_peers_id_is_not_touched_by_transfers_in_a_row() {
    reuse(initiator(false, true), true);
}

#[test]
fn a_process_with_the_dead_peers_id_is_not_touched_by_lanes() {
    reuse(initiator(false, false), true);
}

#[test]
fn a_process_with_the_dead_peers_id_is_not_touched_by_strict_writes() {
    reuse(initiator(true, true), false);
}

/// Every transfer is the first one that could notice: what the others found out does not help it.
#[test]
fn each_kind_of_transfer_finds_out_by_itself() {
    let count = {
        let far = target!("far", LEN);
        let near = Near::new(local_config(), LEN);
        let peer = near.connect_locally(&far.metadata);
        transfers(&near, &peer, &far.region).len()
    };
    for index in 0..count {
        let mut far = target!("far", LEN, "read-write", "liveness_ms=60000");
        let near = Near::new(initiator(index % 2 == 0, true), LEN);
        let peer = near.connect_locally(&far.metadata);
        let transfer = transfers(&near, &peer, &far.region).remove(index);
        let _holder = keep_death_secret(&near, &mut far);
        let likeness = Likeness::of(&far);
        drop(far);
        let Some(mut other) = likeness.reborn() else { return };
        assert_unnoticed(&peer);
        assert_gone(end_of(&transfer), &transfer);
        other.assert_untouched();
    }
}

/// The worst case: the process that gets the ID is a grandchild of the peer, with a copy of all of the peer's memory.
#[test]
fn a_descendant_of_the_dead_peer_with_its_id_is_not_the_peer() {
    for (operation, len) in [
        (Operation::Read, LEN),
        (Operation::Read, 70_000),
        (Operation::Read, 4096),
        (Operation::Write, LEN),
        (Operation::Write, 4096),
    ] {
        let mut far = target!("far", LEN, "read-write", "liveness_ms=60000");
        let near = Near::new(initiator(false, true), LEN);
        let peer = near.connect_locally(&far.metadata);
        let transfer = near.transfer(&peer, operation, (0, 0), &far.region, len);
        end_of(&transfer).unwrap();
        far.process.ask(&format!("fill r {OTHER} 0 {LEN} 0"));
        let id = far.process.id();
        far.process.load(&near.engine.metadata());
        far.process.ask("end-unheard near");
        // Waits until its parent is gone, and then forks until its own child has that ID.
        let heir = Killed(far.process.number("fork-heir") as u32);
        let region = far.region.clone();
        drop(far);
        if !wait_for_process(id, heir.0) {
            not_run("choosing a process ID: the peer's child may not, or it was taken");
            return;
        }
        let _impostor = Killed(id);
        assert_unnoticed(&peer);
        assert_gone(end_of(&transfer), &transfer);
        let memory = File::open(format!("/proc/{id}/mem")).unwrap();
        let mut bytes = vec![0; LEN];
        memory.read_exact_at(&mut bytes, region.base()).unwrap();
        assert!(bytes == pattern(OTHER, 0, LEN), "the descendant's memory has changed");
    }
}

#[test]
fn a_peer_that_becomes_another_program_is_gone_and_that_program_is_not_touched() {
    for inline in [true, false] {
        for strict in [false, true] {
            let mut far = target!("far", LEN, "read-write", "liveness_ms=60000");
            let near = Near::new(initiator(strict, inline), LEN);
            let peer = near.connect_locally(&far.metadata);
            let transfers = transfers(&near, &peer, &far.region);
            end_of(&transfers[0]).unwrap();
            // A child keeps descriptors of the same sockets, which exec does not close there.
            let _holder = inline.then(|| keep_death_secret(&near, &mut far));
            let likeness = Likeness::of(&far);
            far.process.ask(concat!("exec ", env!("CARGO_BIN_EXE_corelane-test-peer")));
            let mut other = Impostor::new(far.process, &likeness);
            if inline {
                assert_unnoticed(&peer);
            }
            for transfer in &transfers {
                assert_gone(end_of(transfer), transfer);
            }
            other.assert_untouched();
            // The new program is a peer as any other.
            let metadata = other.process.engine("far-again", "");
            let region = other.process.region("r", LEN, "read-write");
            other.process.ask(&format!("fill r 1 0 {LEN} 0"));
            let again = near.connect_locally(&metadata);
            end_of(&near.transfer(&again, Operation::Read, (0, 0), &region, LEN)).unwrap();
            near.memory.assert_pattern(1, 0, LEN, 0);
        }
    }
}
