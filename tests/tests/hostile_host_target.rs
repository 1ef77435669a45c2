//! A target on the same host that an engine connects to, and that lies about what it shares.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use corelane::{Access, Error, Operation, Peer, RegionDescriptor, Status};
use corelane_tests::hostile::{Header, HostilePeer, HostileTarget, Identity, frame};
use corelane_tests::shared_memory::{
    CHANNEL, LAYOUT, Map, USE_COUNT, USE_WORDS, magic_of, memfd, sealed, word,
};
use corelane_tests::{
    BOUND, DescriptorField, Near, Target, end_of, forge_descriptor, kind, local_config, target,
};
use sha2::{Digest, Sha256};

const LEN: usize = 1 << 20;
/// Of 64 KiB, so that there is a lot of it on either side of what it claims.
const SHARED: usize = 64 << 10;
const READ: u16 = 1;
const READ_WRITE: u16 = 3;
/// How long a transfer waits for a place to copy in.
const PATIENCE: Duration = Duration::from_secs(5);
/// A place for a region in the table.
const SLOT: u64 = 3;

/// What the target says of its one region.
#[derive(Clone, Copy)]
struct Claims {
    /// In the table.
    rights: u16,
    base: i64,
    len: u64,
    /// In SHARE.
    shared_rights: u16,
    shared_base: i64,
    shared_len: u64,
    /// How long the memory is that comes with SHARE.
    bytes: u64,
}

const HONEST: Claims = Claims {
    rights: READ_WRITE,
    base: 0,
    len: SHARED as u64,
    shared_rights: READ_WRITE,
    shared_base: 0,
    shared_len: SHARED as u64,
    bytes: SHARED as u64,
};

/// An engine that has a liar for a peer, and an honest one beside it.
struct Victim {
    near: Near,
    far: Target,
    honest: Peer,
    number: u128,
}

/// A session with the liar.
struct Liar {
    peer: Peer,
    region: RegionDescriptor,
    /// Its memory as it sees that itself.
    memory: Map,
    /// The channel in which the engine announces its copies.
    channel: Map,
    thread: JoinHandle<()>,
    /// What it says lies in its memory.
    _nonce: Box<[u8; 16]>,
}

/// Answers whatever asks whether it lives, until the engine leaves.
fn stay(mut link: HostilePeer) {
    while let Some((header, _)) = link.receive() {
        if header.kind == frame::PING {
            link.send(&Header { id: header.id, ..Header::new(frame::PONG) }, &[]);
        }
    }
}

impl Victim {
    fn new(inline: bool) -> Self {
        let mut config = local_config();
        if !inline {
            config.inline_bytes = 0;
        }
        let far = target!("far", LEN, "read-write", "");
        let near = Near::named("near", config, LEN, Access::READ_WRITE);
        let honest = near.connect_locally(&far.metadata);
        Self { near, far, honest, number: 0 }
    }

    /// Connects to a target that makes these claims.
    fn connect(&mut self, claims: &Claims) -> Liar {
        self.number += 1;
        let own = Identity::of(&self.near.engine.metadata()).incarnation;
        // A descriptor is forged out of one of ours, of which the low half of the incarnation can be changed.
        let incarnation = own >> 64 << 64 | (self.number + 1000);
        let identity = Identity::invented(&format!("liar-{}", self.number), incarnation);
        let target = HostileTarget::on_this_host(identity);
        let metadata = target.metadata();
        let shared = memfd(&[0x5a; SHARED], claims.bytes, sealed());
        let memory = Map::of(&shared, SHARED);
        let region = self.forged(incarnation as u64, memory.addr(), claims);
        let (told, tells) = std::sync::mpsc::channel();
        let nonce = Box::new([0xa7; 16]);
        let (base, at, bytes) = (memory.addr(), nonce.as_ptr() as u64, region.to_bytes());
        let claims = *claims;
        let thread = std::thread::spawn(move || {
            let mut link = target.session();
            let (attach, fds) = link.receive_with().unwrap();
            assert_eq!(attach.kind, frame::ATTACH);
            let table = table(magic_of(fds[0].as_fd()), &bytes, base, &claims);
            let own = memfd(&magic_of(fds[1].as_fd()).to_le_bytes(), CHANNEL as u64, sealed());
            let attach = Header {
                status: LAYOUT,
                id: at,
                key: u128::from_le_bytes([0xa7; 16]),
                ..Header::new(frame::ATTACH)
            };
            link.send_with(&attach, &[table.as_fd(), own.as_fd()]);
            let share = Header {
                status: claims.shared_rights,
                id: claims.shared_len,
                key: key_of(&bytes),
                addr: base.wrapping_add_signed(claims.shared_base),
                ..Header::new(frame::SHARE)
            };
            link.send_with(&share, &[shared.as_fd()]);
            // The last: from now on it is up, with what was shared before.
            link.send(&Header::new(frame::ATTACHED), &[]);
            told.send(fds).unwrap();
            stay(link);
        });
        let peer = self.near.connect_locally(&metadata);
        let fds: Vec<OwnedFd> = tells.recv().unwrap();
        let channel = Map::of(&fds[1], CHANNEL);
        Liar { peer, region, memory, channel, thread, _nonce: nonce }
    }

    /// What the application is told of the region.
    fn forged(&self, incarnation: u64, base: u64, claims: &Claims) -> RegionDescriptor {
        let fields = [
            (DescriptorField::Incarnation, incarnation),
            (DescriptorField::Access, READ_WRITE.into()),
            (DescriptorField::KeySlot, SLOT),
            (DescriptorField::Base, base.wrapping_add_signed(claims.base)),
            (DescriptorField::Len, claims.len),
        ];
        let own = self.near.region.descriptor().clone();
        fields
            .into_iter()
            .fold(own, |region, (field, value)| forge_descriptor(&region, field, |_| value))
    }

    fn copy(&self, liar: &Liar, operation: Operation, there: u64, len: usize) -> Result<(), Error> {
        let local = self.near.region.segment(0, len as u64);
        let remote = liar.region.segment(there, len as u64);
        end_of(&self.near.engine.prepare(operation, &liar.peer, &[local], &[remote])?.transfer())
    }

    /// Its honest peer is served as ever, through its lane, too.
    #[track_caller]
    fn assert_works(&self) {
        for len in [64, 300_000, LEN] {
            self.near.memory.poison(0, LEN);
            let (read, region) = (Operation::Read, &self.far.region);
            end_of(&self.near.transfer(&self.honest, read, (0, 0), region, len)).unwrap();
            self.near.memory.assert_pattern(1, 0, len, 0);
        }
    }

    #[track_caller]
    fn leave(&self, liar: Liar) {
        self.near.engine.unload_peer(&liar.peer).unwrap();
        liar.thread.join().unwrap();
    }
}

/// The key in the bytes of a descriptor.
fn key_of(descriptor: &[u8]) -> u128 {
    u128::from_le_bytes(descriptor[28..44].try_into().unwrap())
}

/// A region table with that region.
fn table(magic: u64, descriptor: &[u8], base: u64, claims: &Claims) -> File {
    let digest = Sha256::new_with_prefix(b"corelane region key")
        .chain_update(key_of(descriptor).to_le_bytes())
        .finalize();
    let digest = |half: usize| u64::from_le_bytes(digest[half * 8..][..8].try_into().unwrap());
    let mut words = vec![0u64; 8 + 16 * 8];
    words[..3].copy_from_slice(&[magic, 1, 16]);
    let base = base.wrapping_add_signed(claims.base);
    let slot = [digest(0), digest(1), base, claims.len, claims.rights.into()];
    words[8 + SLOT as usize * 8..][..5].copy_from_slice(&slot);
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memfd(&bytes, bytes.len() as u64, sealed())
}

#[test]
fn an_honest_table_and_share_carry_bytes_both_ways() {
    for inline in [true, false] {
        let mut victim = Victim::new(inline);
        let liar = victim.connect(&HONEST);
        victim.near.memory.fill(7, 0, SHARED, 0);
        victim.copy(&liar, Operation::Write, 0, SHARED).unwrap();
        victim.near.memory.poison(0, SHARED);
        victim.copy(&liar, Operation::Read, 0, SHARED).unwrap();
        victim.near.memory.assert_pattern(7, 0, SHARED, 0);
        victim.leave(liar);
        victim.assert_works();
    }
}

/// What is mapped for reading must not be written to, whatever the table says.
#[test]
fn memory_that_is_shared_for_reading_is_not_written_to() {
    for inline in [true, false] {
        let mut victim = Victim::new(inline);
        let liar = victim.connect(&Claims { shared_rights: READ, ..HONEST });
        victim.copy(&liar, Operation::Read, 0, SHARED).unwrap();
        victim.near.memory.fill(7, 0, SHARED, 0);
        for len in [1, 64, SHARED] {
            let error = victim.copy(&liar, Operation::Write, 0, len).unwrap_err();
            assert_eq!(kind(&error), "Permission", "{error}");
        }
        assert!((0..SHARED / 8).all(|word| liar.memory.get(word) == 0x5a5a_5a5a_5a5a_5a5a));
        victim.assert_works();
        victim.leave(liar);
        victim.assert_works();
    }
}

/// What lies beside and behind the mapped memory is not touched: whoever says that there is more of it than there is has
/// transfers that fail, or that read its own process.
#[test]
fn lies_about_where_memory_is_and_how_long_end_in_errors() {
    let huge = 1 << 40;
    let cases = [
        Claims { len: huge, ..HONEST },
        Claims { len: huge, shared_len: SHARED as u64 - 1, ..HONEST },
        Claims { len: huge, shared_len: SHARED as u64 + 1, ..HONEST },
        Claims { len: huge, shared_len: huge, ..HONEST },
        Claims { base: -huge.cast_signed(), len: 2 * huge, ..HONEST },
        Claims { base: -huge.cast_signed(), len: 2 * huge, shared_base: -4096, ..HONEST },
        Claims { base: -huge.cast_signed(), len: 2 * huge, shared_base: 4096, ..HONEST },
        Claims { bytes: 4096, shared_len: SHARED as u64, ..HONEST },
        Claims { rights: 0, ..HONEST },
        Claims { rights: READ, ..HONEST },
        Claims { rights: 0xff, shared_rights: 0xffff, ..HONEST },
    ];
    let mut victim = Victim::new(true);
    for (number, claims) in cases.iter().enumerate() {
        let liar = victim.connect(claims);
        let offset = claims.base.unsigned_abs();
        let check = |operation, there| {
            if let Err(error) = victim.copy(&liar, operation, there, 64) {
                let expected = ["Permission", "RemoteDisconnect", "Fault"];
                assert!(expected.contains(&kind(&error)), "case {number}: {error}");
            }
        };
        // It may reach memory of the liar's process, which is this one.
        let far_out = [0, 1 << 20, 1 << 30, huge / 2, claims.len - 64];
        let near_by = [offset, offset + SHARED as u64 - 64, offset + SHARED as u64 - 1];
        for there in far_out.into_iter().chain(near_by).filter(|there| there + 64 <= claims.len) {
            check(Operation::Read, there);
        }
        check(Operation::Write, offset);
        check(Operation::Write, offset + SHARED as u64 - 64);
        victim.assert_works();
        victim.leave(liar);
    }
    victim.assert_works();
}

/// Announcements of copies lie in memory that the target can write: when it takes all places, its transfers wait and
/// fail; the lane, and with it everybody else, does not.
#[test]
fn a_target_that_takes_all_places_for_copies_holds_up_only_its_own_transfers() {
    let mut victim = Victim::new(false);
    let liar = victim.connect(&HONEST);
    for place in 0..USE_COUNT {
        liar.channel.set(word::USES + place * USE_WORDS, 1);
    }
    let local = victim.near.region.segment(0, SHARED as u64);
    let remote = liar.region.segment(0, SHARED as u64);
    let plan = victim.near.engine.prepare(Operation::Read, &liar.peer, &[local], &[remote]);
    let held = plan.unwrap().transfer();
    let begun = Instant::now();
    held.post().unwrap();
    victim.assert_works();
    if begun.elapsed() < PATIENCE / 2 {
        // The lane has not waited for it before it served the others.
        assert!(matches!(held.peek(), Status::InProgress), "{:?}", held.peek());
    }
    let error = held.wait(BOUND).unwrap_err();
    assert_eq!(kind(&error), "Busy", "{error}");
    // Given back, they are as good as ever.
    for place in 0..USE_COUNT {
        liar.channel.set(word::USES + place * USE_WORDS, 2);
    }
    victim.copy(&liar, Operation::Read, 0, SHARED).unwrap();
    victim.leave(liar);
    victim.assert_works();
}

/// Whoever has left a session says so in memory that both have, long before its end of the socket may tell.
#[test]
fn nothing_is_copied_from_or_to_who_has_left() {
    for inline in [true, false] {
        let mut victim = Victim::new(inline);
        let liar = victim.connect(&HONEST);
        victim.copy(&liar, Operation::Read, 0, SHARED).unwrap();
        liar.channel.set(word::CLOSED, 1);
        victim.near.memory.fill(7, 0, SHARED, 0);
        for (operation, len) in
            [(Operation::Read, 64), (Operation::Write, 64), (Operation::Write, SHARED)]
        {
            let error = victim.copy(&liar, operation, 0, len).unwrap_err();
            assert_eq!(kind(&error), "RemoteDisconnect", "{error}");
        }
        assert!((0..SHARED / 8).all(|word| liar.memory.get(word) == 0x5a5a_5a5a_5a5a_5a5a));
        victim.near.memory.assert_pattern(7, 0, SHARED, 0);
        victim.assert_works();
        victim.leave(liar);
        victim.assert_works();
    }
}
