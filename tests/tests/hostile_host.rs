//! A peer on the same host that was let in, and shares memory, descriptors and indices that no engine would.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use corelane::{Access, Operation, Peer};
use corelane_tests::hostile::{
    Frame, Header, Hello, HostilePeer, Identity, Verdict, frame, knock_locally, send_with,
    shake_with,
};
use corelane_tests::shared_memory::word::{ASLEEP, CLOSED, HEAD, RING, SLOT, USES};
use corelane_tests::shared_memory::{CHANNEL, LAYOUT, Map, magic_of, memfd, sealed};
use corelane_tests::{
    Near, Random, Target, end_of, eventually, local_config, mappings_of, open_files,
    resident_bytes_of, target, threads_of,
};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::eventfd::EventFd;

const LEN: usize = 1 << 20;
const MEMORY: u64 = 48 << 20;
/// Descriptors for watching a process that says that it still copies: two for each of 16 sessions; and some that come and go.
const LEFT_BEHIND: usize = 2 * 16 + 8;

/// An engine in another process, which a well-behaved peer uses all the time.
struct Victim {
    far: Target,
    identity: Identity,
    near: Near,
    peer: Peer,
    files: usize,
    threads: usize,
    mappings: usize,
    memory: u64,
    magics: [u64; 2],
    number: u128,
}

impl Victim {
    fn new(settings: &str) -> Self {
        let far = target!("far", LEN, "read", settings);
        let near = Near::new(local_config(), LEN);
        let peer = near.connect(&far.metadata);
        let pid = far.process.id();
        let mut victim = Self {
            identity: Identity::of(&far.metadata),
            far,
            near,
            peer,
            files: 0,
            threads: 0,
            mappings: 0,
            memory: 0,
            magics: [0; 2],
            number: 0,
        };
        // The layouts are those that it uses itself.
        let honest = victim.connect();
        let (link, attach, fds) = honest;
        assert_eq!((attach.kind, attach.status, fds.len()), (frame::ATTACH, LAYOUT, 2));
        for (index, fd) in fds.into_iter().enumerate() {
            victim.magics[index] = magic_of(fd.as_fd());
        }
        link.stream.end();
        drop(link);
        victim.assert_serves();
        victim.files = open_files(pid);
        victim.threads = threads_of(pid);
        victim.mappings = mappings_of(pid);
        victim.memory = resident_bytes_of(pid);
        victim
    }

    /// A session, and what the engine shares with us on it.
    #[track_caller]
    fn connect(&mut self) -> (HostilePeer, Header, Vec<OwnedFd>) {
        self.number += 1;
        let from = self.invented();
        let stream = knock_locally(self.identity.incarnation);
        let mut link = HostilePeer::connect(stream, &from, &self.identity);
        let (header, fds) = link.receive_with().unwrap();
        (link, header, fds)
    }

    /// Who connects now.
    fn invented(&self) -> Identity {
        Identity::invented(&format!("hostile-{}", self.number), 1000 + self.number)
    }

    fn table(&self) -> File {
        let words = [self.magics[0], 1, 16];
        memfd(&words.map(u64::to_le_bytes).concat(), (8 + 16 * 8) * 8, sealed())
    }

    fn channel(&self) -> File {
        memfd(&self.magics[1].to_le_bytes(), CHANNEL as u64, sealed())
    }

    /// A session with shared memory both ways, as honest engines have it.
    #[track_caller]
    fn attach(&mut self) -> Attached {
        let (mut link, theirs, fds) = self.connect();
        let (table, channel) = (self.table(), self.channel());
        let attach = Header { status: LAYOUT, id: 4096, key: 5, ..Header::new(frame::ATTACH) };
        assert!(link.send_with(&attach, &[table.as_fd(), channel.as_fd()]));
        assert_eq!(link.receive().unwrap().0.kind, frame::ATTACHED);
        assert!(link.send(&Header::new(frame::ATTACHED), &[]));
        link.ping(1).unwrap();
        let ours = Map::of(&channel, CHANNEL);
        let their_map = Map::of(&fds[1], CHANNEL);
        Attached { link, theirs, fds, ours, their_map }
    }

    #[track_caller]
    fn assert_serves(&self) {
        for len in [64, 300_000] {
            self.near.memory.poison(0, LEN);
            let read =
                self.near.transfer(&self.peer, Operation::Read, (0, 0), &self.far.region, len);
            end_of(&read).unwrap();
            self.near.memory.assert_pattern(1, 0, len, 0);
        }
        // Not only copied by this side: its lane answers, too.
        let other = Near::named("other", local_config(), 4096, Access::LOCAL);
        let peer = other.connect(&self.far.metadata);
        let read = other.transfer(&peer, Operation::Read, (0, 8192), &self.far.region, 4096);
        end_of(&read).unwrap();
        other.memory.assert_pattern(1, 0, 4096, 8192);
    }

    #[track_caller]
    fn assert_whole(&mut self) {
        self.assert_serves();
        self.far.assert_pattern(1, 0, LEN, 0);
        let pid = self.far.process.id();
        eventually("its descriptors are closed", || open_files(pid) <= self.files + LEFT_BEHIND);
        eventually("what was mapped is unmapped", || {
            mappings_of(pid) <= self.mappings + LEFT_BEHIND
        });
        assert!(threads_of(pid) <= self.threads, "threads were left");
        let memory = resident_bytes_of(pid);
        assert!(memory < self.memory + MEMORY, "from {} to {memory} bytes", self.memory);
    }
}

struct Attached {
    link: HostilePeer,
    theirs: Header,
    fds: Vec<OwnedFd>,
    /// The channel that we write.
    ours: Map,
    /// The channel that the engine writes.
    their_map: Map,
}

#[test]
fn descriptors_that_are_no_shared_memory_are_refused() {
    let mut victim = Victim::new("");
    let bell = EventFd::new().unwrap();
    let (table, channel) = (victim.table(), victim.channel());
    let magics = victim.magics;
    let words = |magic: u64| magic.to_le_bytes();
    let (pipe, _other_end) = std::io::pipe().unwrap();
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let no_seals = SealFlag::empty();
    let may_shrink = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    let bad_tables = [
        memfd(&words(magics[0]), 4096, no_seals),
        memfd(&words(magics[0]), 4096, may_shrink),
        memfd(&words(magics[0]), 4096, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW),
        memfd(&words(magics[0]), 8, sealed()),
        memfd(&words(magics[0]), 1 << 40, sealed()),
        memfd(&words(magics[0] ^ 1), 4096, sealed()),
        memfd(b"", 0, sealed()),
    ];
    let bad_channels = [
        memfd(&words(magics[1]), CHANNEL as u64, no_seals),
        memfd(&words(magics[1]), CHANNEL as u64, may_shrink),
        memfd(&words(magics[1]), CHANNEL as u64 - 1, sealed()),
        memfd(&words(magics[1]), CHANNEL as u64 + 4096, sealed()),
        memfd(&words(magics[1] ^ 1), CHANNEL as u64, sealed()),
        // Sealed against the writing that an engine does.
        memfd(&words(magics[1]), CHANNEL as u64, sealed() | SealFlag::F_SEAL_WRITE),
    ];
    let good = [table.as_fd(), channel.as_fd()];
    let mut cases: Vec<Vec<BorrowedFd<'_>>> = vec![
        vec![],
        vec![good[0]],
        vec![good[1]],
        vec![good[1], good[0]],
        vec![good[0], good[0]],
        vec![good[0], good[1], good[0]],
        vec![good[0], good[1], bell.as_fd()],
        vec![good[0], null.as_fd()],
        vec![good[0], pipe.as_fd()],
        vec![good[0], bell.as_fd()],
        vec![pipe.as_fd(), good[1]],
        vec![null.as_fd(), good[1]],
    ];
    cases.extend(bad_tables.iter().map(|bad| vec![bad.as_fd(), good[1]]));
    cases.extend(bad_channels.iter().map(|bad| vec![good[0], bad.as_fd()]));
    let attach = Header { status: LAYOUT, id: 4096, key: 5, ..Header::new(frame::ATTACH) };
    for (number, fds) in cases.iter().enumerate() {
        let (mut link, _, _) = victim.connect();
        link.send_with(&attach, fds);
        // Refused or cut off; and never taken.
        let taken = |frames: &[Frame]| {
            frames.iter().any(|(header, _)| header.kind == frame::ATTACHED && header.status == 0)
        };
        match link.ping(9) {
            Ok(frames) | Err(frames) => assert!(!taken(&frames), "case {number}"),
        }
        victim.assert_serves();
    }
    // Another layout; and fields that say where our memory is, which it is not.
    for status in [0, 1, LAYOUT - 1, LAYOUT + 1, 0xffff] {
        let (mut link, _, _) = victim.connect();
        link.send_with(&Header { status, ..attach }, &good);
        let Ok(frames) = link.ping(9) else { continue };
        assert!(frames.iter().all(|(h, _)| h.kind != frame::ATTACHED || h.status == 1), "{status}");
    }
    for (id, key) in [(0, 0), (u64::MAX, 5), (u64::MAX - 8, u128::MAX), (1 << 47, 5)] {
        let (mut link, _, _) = victim.connect();
        link.send_with(&Header { id, key, ..attach }, &good);
        let _ = link.ping(9);
    }
    // A second time.
    let mut attached = victim.attach();
    attached.link.send_with(&attach, &good);
    assert!(attached.link.ping(9).is_err());
    drop(attached);
    victim.assert_whole();
}

/// It answers pings, so that it is alive, and never does its part of sharing memory.
#[test]
fn a_peer_that_does_not_share_memory_is_not_waited_for_without_end() {
    let mut victim = Victim::new("connect_ms=400 liveness_ms=800");
    for (shares, answers) in [(false, false), (false, true), (true, false)] {
        let (mut link, _, _) = victim.connect();
        let (table, channel) = (victim.table(), victim.channel());
        if shares {
            let attach = Header { status: LAYOUT, id: 4096, key: 5, ..Header::new(frame::ATTACH) };
            link.send_with(&attach, &[table.as_fd(), channel.as_fd()]);
        }
        if answers {
            link.send(&Header::new(frame::ATTACHED), &[]);
        }
        let mut number = 0;
        eventually("the link is closed", || {
            number += 1;
            link.ping(number).is_err()
        });
        victim.assert_serves();
    }
    // Who has done it is served for longer than that.
    let mut attached = victim.attach();
    for number in 0..40 {
        std::thread::sleep(Duration::from_millis(50));
        attached.link.ping(number).unwrap();
    }
    drop(attached);
    victim.assert_whole();
}

#[test]
fn more_descriptors_than_any_frame_has_end_the_link() {
    let mut victim = Victim::new("");
    let pid = victim.far.process.id();
    let null = File::open("/dev/null").unwrap();
    let many = [null.as_fd(); 10];
    let (link, _, _) = victim.connect();
    let header = Header::new(frame::ATTACH).encode();
    let mut most = 0;
    // With each byte of one header.
    for byte in &header[..63] {
        if !send_with(&link.stream, &[*byte], &many) {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
        most = most.max(open_files(pid).saturating_sub(victim.files));
    }
    println!("{most} descriptors held");
    assert!(most < 64, "{most} descriptors of a peer are held");
    drop(link);
    // With frames that carry none, and with payload.
    for kind in [frame::PING, frame::SHARE, frame::UNSHARE, frame::NOTIFY, frame::READ] {
        let (mut link, _, _) = victim.connect();
        for _ in 0..100 {
            if !link.send_with(&Header { len: 4, addr: 4, ..Header::new(kind) }, &many) {
                break;
            }
        }
        eventually("they are closed", || open_files(pid) <= victim.files + 16);
    }
    victim.assert_whole();
}

#[test]
fn garbage_in_the_ring_ends_the_link() {
    let mut victim = Victim::new("");
    let mut random = Random::new(9);
    let huge = [4097, 1 << 16, 0x7fff_ffff, 0xffff_ffff];
    type Garble<'a> = Box<dyn Fn(&Attached) + 'a>;
    let mut cases: Vec<(String, Garble<'_>)> = Vec::new();
    for length in huge {
        cases.push((format!("{length} bytes"), Box::new(move |a| a.ours.put(0, 1, length, 0, 0))));
    }
    for kind in [0, 3, 4, 0xff] {
        cases.push((format!("kind {kind}"), Box::new(move |a| a.ours.put(0, kind, 0, 0, 0))));
    }
    for seq in [1, u64::MAX] {
        cases.push((format!("number {seq}"), Box::new(move |a| a.ours.put(0, 1, 4, seq, 0))));
    }
    cases.push((
        "twice".into(),
        Box::new(|a| {
            a.ours.put(0, 1, 4, 0, 0);
            a.ours.put(1, 1, 4, 0, 0);
        }),
    ));
    for ack in [1, 1 << 40, u64::MAX] {
        cases.push((format!("ack {ack}"), Box::new(move |a| a.ours.put(0, 2, 0, 0, ack))));
    }
    cases.push(("ack with payload".into(), Box::new(|a| a.ours.put(0, 2, 8, 0, 0))));
    for (what, garble) in &cases {
        let mut attached = victim.attach();
        garble(&attached);
        eventually(what, || attached.link.ping(3).is_err());
    }
    // Noise everywhere, while it looks.
    for _ in 0..20 {
        let attached = victim.attach();
        for _ in 0..20_000 {
            let word = random.below(CHANNEL / 8);
            attached.ours.set(word, random.next() >> (random.below(8) * 8));
        }
        for position in 0..512 {
            let (kind, length) = (random.below(4) as u64, random.below(5000) as u64);
            attached.ours.put(position, kind, length, random.below(3) as u64, 0);
        }
        victim.assert_serves();
    }
    victim.assert_whole();
}

#[test]
fn lies_about_what_was_taken_end_the_link() {
    let mut victim = Victim::new("");
    let region = victim.far.region.clone();
    for lie in [1, 2, 512, 1 << 32, u64::MAX] {
        let mut attached = victim.attach();
        attached.their_map.set(HEAD, lie);
        attached.their_map.set(ASLEEP, lie);
        // Have it write: an acknowledgement of a notification.
        attached.ours.put(0, 1, 8, 0, 0);
        let _ = attached.link.ping(2);
        eventually("it has noticed", || {
            let number = attached.their_map.words()[RING].load(Ordering::SeqCst);
            attached.link.ping(3).is_err() || number == 0
        });
        victim.assert_serves();
    }
    // Its own ring overwritten, and uses that never end or that are all taken.
    let attached = victim.attach();
    for word in USES..CHANNEL / 8 {
        attached.their_map.set(word, u64::MAX);
    }
    for word in 0..32 {
        attached.ours.set(USES + word * 8, 1);
    }
    victim.assert_serves();
    drop(attached);
    assert_eq!(region, victim.far.region);
    victim.assert_whole();
}

/// Who says that it sleeps is woken by every message. One that then takes nothing from its socket, or the wakings of which find no room,
/// blocks nobody; and nothing that an engine hands out could be made to.
#[test]
fn a_peer_that_is_woken_and_never_wakes_holds_up_nobody() {
    let mut victim = Victim::new("");
    let mut attached = victim.attach();
    let files = attached.fds.iter().map(|fd| {
        std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd)))
            .unwrap()
    });
    for file in files {
        // Both may be written to without a system call, and not waited for.
        assert!(file.to_string_lossy().starts_with("/memfd:"), "{}", file.display());
    }
    attached.their_map.set(ASLEEP, 1);
    let mut taken = 0;
    // More than a socket takes.
    for number in 0..700 {
        attached.ours.put(number, 1, 8, number, 0);
        if attached.ours.get(ASLEEP) != 0 {
            attached.link.send(&Header::new(frame::PONG), &[]);
        }
        eventually("it acknowledges", || {
            let slot = RING + (taken % 512) as usize * SLOT;
            attached.their_map.get(slot) == taken + 1
        });
        taken += 1;
        attached.their_map.set(HEAD, taken);
    }
    victim.assert_serves();
    drop(attached);
    victim.assert_whole();
}

/// Announcements of copies lie in memory that the initiator writes: whoever says that he copies keeps the region that he names from being
/// given back, or all of them, but only as long as he lives; and where he has left, he is told to begin nothing more.
#[test]
fn copies_that_never_end_hold_up_the_regions_that_they_name() {
    let mut victim = Victim::new("deregister_ms=50");
    let slot = |region: &corelane::RegionDescriptor| {
        u32::from_le_bytes(region.to_bytes()[28..32].try_into().unwrap())
    };
    let mut attached = victim.attach();
    let process = &mut victim.far.process;
    let regions = ["a", "b", "c"].map(|id| process.region(id, 4096, "read-write"));
    let busy = |of: u32| u64::from(of) << 1 | 1;
    attached.ours.set(USES, busy(slot(&regions[0])));
    process.ask("deregister b");
    assert!(process.try_ask("deregister a").unwrap_err().contains("Busy"));
    attached.ours.set(USES, busy(u32::MAX));
    assert!(process.try_ask("deregister c").unwrap_err().contains("Busy"));
    assert_eq!(attached.ours.get(CLOSED), 0);
    attached.link.ping(1).unwrap();
    attached.link.stream.end();
    let closed = || attached.ours.get(CLOSED) == 1;
    eventually("it is told that the session is over", closed);
    assert!(process.try_ask("deregister c").unwrap_err().contains("Busy"), "it still copies");
    attached.ours.set(USES, 1 << 33);
    for id in ["a", "c"] {
        process.ask(&format!("deregister {id}"));
    }
    drop(attached);
    victim.assert_whole();
}

/// Each session that ends with copies in progress is watched until its process ends: no more than some of them.
#[test]
fn copies_that_never_end_are_bounded_over_many_sessions() {
    let mut victim = Victim::new("");
    for _ in 0..100 {
        let (mut link, _, _) = victim.connect();
        let (table, channel) = (victim.table(), victim.channel());
        let ours = Map::of(&channel, CHANNEL);
        ours.set(USES, 1);
        let attach = Header { status: LAYOUT, ..Header::new(frame::ATTACH) };
        link.send_with(&attach, &[table.as_fd(), channel.as_fd()]);
        let _ = link.ping(1);
    }
    victim.assert_whole();
}

/// What a ring holds, and what the lane takes of it in some turns before it sees that the link is at its end. Without a
/// bound, it would go on for ever.
const MOST_TAKEN: u64 = 512 + 64 * 64;

/// Fills a ring as fast as it is emptied while `watch` does something; that is given how much was taken so far.
fn endlessly(ring: &Map, watch: impl FnOnce(&dyn Fn() -> u64)) {
    let stop = AtomicBool::new(false);
    let head = || ring.words()[HEAD].load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        // Several, so that one of them always runs; they write the same.
        for _ in 0..4 {
            scope.spawn(|| {
                // Acknowledgements of nothing, which say nothing wrong, in every slot and again.
                while !stop.load(Ordering::Relaxed) {
                    let taken = head();
                    for position in taken..taken + 512 {
                        ring.put(position, 2, 0, 0, 0);
                    }
                }
            });
        }
        let watched = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| watch(&head)));
        stop.store(true, Ordering::Relaxed);
        watched.unwrap();
    });
}

/// A ring that is filled as fast as it is emptied holds up nobody: not while the link is up, nor when it ends.
#[test]
fn a_ring_that_never_ends_keeps_the_lane_from_nothing() {
    let mut victim = Victim::new("");
    for _ in 0..5 {
        let attached = victim.attach();
        endlessly(&attached.ours, |head| {
            victim.assert_serves();
            let begun = head();
            eventually("it takes messages", || head() > begun + 1000);
            // The link ends while the lane stands still: it sees so in the next turn.
            victim.far.process.freeze();
            attached.link.stream.end();
            let before = head();
            victim.far.process.thaw();
            for _ in 0..20 {
                victim.assert_serves();
            }
            let taken = head() - before;
            assert!(taken <= MOST_TAKEN, "{taken} messages were taken after the end of the link");
        });
    }
    victim.assert_whole();
}

/// Nor when its owner connects again, and what the ring holds still belongs to the session so far.
#[test]
fn a_ring_that_never_ends_keeps_no_newer_link_waiting() {
    let mut victim = Victim::new("");
    for round in 0..5 {
        let attached = victim.attach();
        let from = victim.invented();
        endlessly(&attached.ours, |head| {
            let begun = head();
            eventually("it takes messages", || head() > begun + 1000);
            let mut stream = knock_locally(victim.identity.incarnation);
            // Newer than all that were made here before.
            let hello = Hello::honest(&from, &victim.identity, 1 << 40 | round);
            let mut before = 0;
            // Who it is, it says while the lane stands still, which finds that in one of its next turns.
            let around = |say_who: &mut dyn FnMut() -> bool| {
                victim.far.process.freeze();
                before = head();
                let said = say_who();
                victim.far.process.thaw();
                said
            };
            let secrets = (&from.secret, &victim.identity.secret);
            let verdict = shake_with(&mut stream, &hello.encode(), secrets.0, secrets.1, around);
            assert!(matches!(verdict, Verdict::Welcome(_)), "{verdict:?}");
            let taken = head() - before;
            assert!(taken <= MOST_TAKEN, "{taken} messages were taken of the session before");
        });
        victim.assert_serves();
    }
    victim.assert_whole();
}

#[test]
fn shared_regions_that_are_none_are_not_mapped_and_bounded() {
    let mut victim = Victim::new("");
    let pid = victim.far.process.id();
    let good = memfd(b"", 4096, sealed());
    let open = memfd(b"", 4096, SealFlag::empty());
    let share =
        Header { status: 3, id: 4096, key: 7 << 32, addr: 1 << 20, ..Header::new(frame::SHARE) };
    let cases = [
        (Header { id: 0, ..share }, &good),
        (Header { id: 4097, ..share }, &good),
        (Header { id: u64::MAX, ..share }, &good),
        (Header { addr: u64::MAX, ..share }, &good),
        (Header { status: 0xffff, ..share }, &good),
        (share, &open),
    ];
    for (header, fd) in cases {
        let mut attached = victim.attach();
        attached.link.send_with(&header, &[fd.as_fd()]);
        let _ = attached.link.ping(2);
        victim.assert_serves();
    }
    let mut early = victim.connect().0;
    early.send_with(&share, &[good.as_fd()]);
    assert!(early.ping(2).is_err(), "before ATTACH");
    // Without number.
    let mut attached = victim.attach();
    let mut sent = 0u32;
    for number in 0..70_000u32 {
        let key = u128::from(number) << 32;
        if !attached.link.send_with(&Header { key, ..share }, &[good.as_fd()]) {
            break;
        }
        sent += 1;
    }
    let _ = attached.link.ping(3);
    let mapped = mappings_of(pid).saturating_sub(victim.mappings);
    println!("{sent} regions shared, {mapped} mapped");
    // The kernel lets a process have 65,530 mappings in all.
    assert!(mapped < 32_000, "{mapped} mappings");
    victim.assert_serves();
    drop(attached);
    victim.assert_whole();
}

/// What the engine shares cannot be cut short or written to by who gets it.
#[test]
fn what_is_shared_cannot_be_cut_short_or_altered() {
    let mut victim = Victim::new("");
    let attached = victim.attach();
    assert_eq!(attached.theirs.kind, frame::ATTACH);
    for fd in &attached.fds {
        let file = File::from(fd.try_clone().unwrap());
        let len = file.metadata().unwrap().len();
        for other in [0, len / 2, len + 4096] {
            assert!(file.set_len(other).is_err(), "its length was changed to {other}");
        }
        assert!(fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
        assert_eq!(file.metadata().unwrap().len(), len);
    }
    let table = File::from(attached.fds[0].try_clone().unwrap());
    assert!(table.write_at(&[0; 8], 8).is_err(), "the region table can be written to");
    // Holes read as zeros: keys that are gone.
    let punched = nix::fcntl::fallocate(
        &table,
        nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
            | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE,
        0,
        4096,
    );
    assert!(punched.is_err(), "the region table can be emptied");
    victim.assert_serves();
    drop(attached);
    victim.assert_whole();
}
