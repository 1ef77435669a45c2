//! What comes behind a peer of this host that has ended: another process of its ID, another program in its process,
//! other memory at its addresses. An error, never a crash, or a byte in the wrong place.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::Duration;

use corelane::{Access, Engine, LaneSpec, Operation, Peer, Region, Transfer, TransportKind};
use corelane_tests::{Buffer, Target, end_of, local_config, outcome, target};

const LEN: usize = 1 << 20;

/// One of each way: by the file of the process, by its ID, scattered, and shared with the lane.
const SHAPES: [(usize, usize); 4] = [(1, 64), (1, 200_000), (40, 3000), (1, LEN)];

struct Initiator {
    engine: Engine,
    memory: Buffer,
    region: Region,
}

impl Initiator {
    fn new(name: &str) -> Self {
        let engine = Engine::new(name, local_config()).unwrap();
        let memory = Buffer::new(LEN + 4096);
        let region = memory.register(&engine, Access::LOCAL);
        Self { engine, memory, region }
    }

    fn transfer(
        &self,
        peer: &Peer,
        far: &Target,
        operation: Operation,
        (count, len): (usize, usize),
    ) -> Transfer {
        let place = |i: usize| (i * len * 2) as u64 % (LEN - len + 1) as u64;
        let local: Vec<_> =
            (0..count).map(|i| self.region.segment((i * len) as u64, len as u64)).collect();
        let remote: Vec<_> = (0..count).map(|i| far.region.segment(place(i), len as u64)).collect();
        self.engine.prepare(operation, peer, &local, &remote).unwrap().transfer()
    }
}

/// Takes the next process IDs until `wanted` comes: for `run`, in a child. `None`: this process may not do that.
fn fork_as(wanted: libc::pid_t, run: &mut dyn FnMut() -> i32) -> Option<libc::pid_t> {
    for _ in 0..200 {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (wanted - 1).to_string()).ok()?;
        // SAFETY: the child only makes system calls and writes to memory of its own.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "fork");
        if child == 0 {
            // SAFETY: getpid and _exit have no preconditions.
            unsafe { libc::_exit(if libc::getpid() == wanted { run() } else { 0 }) };
        }
        if child == wanted {
            return Some(child);
        }
        let mut status = 0;
        // SAFETY: our own child.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
    }
    panic!("process ID {wanted} does not come again");
}

const FILL: u8 = 0xa7;

/// The life of a process that has another's ID, and memory of its own at the same address: 0, if none of it changed.
fn impostor(base: u64, ready: [libc::c_int; 2], done: [libc::c_int; 2]) -> i32 {
    // SAFETY: a fresh mapping at a place that this process does not use; its bytes are touched by nobody else, or
    // that is just what is looked for.
    unsafe {
        // The parent's ends, or their closing would not be seen; and nothing lasts for ever.
        libc::close(ready[0]);
        libc::close(done[1]);
        libc::alarm(60);
        let place = base as usize as *mut libc::c_void;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let map = libc::mmap(place, LEN, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if map != place {
            return 2;
        }
        libc::memset(map, libc::c_int::from(FILL), LEN);
        let byte = 1u8;
        libc::write(ready[1], (&raw const byte).cast(), 1);
        let mut end = 0u8;
        libc::read(done[0], (&raw mut end).cast(), 1);
        let bytes = map.cast::<u8>();
        for offset in 0..LEN {
            if bytes.add(offset).read_volatile() != FILL {
                return 1;
            }
        }
    }
    0
}

fn pipe() -> [libc::c_int; 2] {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0, "pipe");
    ends
}

/// The lane is kept from seeing that the peer is gone, so that the thread that posts goes on copying.
#[test]
fn a_process_that_has_the_id_of_a_peer_that_died_is_neither_read_nor_written() {
    if std::fs::OpenOptions::new().write(true).open("/proc/sys/kernel/ns_last_pid").is_err() {
        eprintln!("not tested: this user may not choose process IDs");
        return;
    }
    let mut tried = 0;
    for strict in [false, true] {
        for shape in SHAPES {
            for operation in [Operation::Read, Operation::Write] {
                tried += usize::from(reuse_a_process_id(operation, shape, strict));
            }
        }
    }
    assert!(tried > 4, "the addresses were never free");
}

/// False: the child could not have memory there.
fn reuse_a_process_id(operation: Operation, shape: (usize, usize), strict: bool) -> bool {
    let mut config = local_config();
    config.strict_writes = strict;
    // Callers never turn the lane.
    config.assist = corelane::AssistMode::Never;
    config.lanes = LaneSpec::Unpinned { count: 1 };
    let engine = Engine::new("near", config).unwrap();
    let memory = Buffer::new(LEN + 4096);
    let region = memory.register(&engine, Access::LOCAL);
    let near = Initiator { engine, memory, region };
    let far = target!("far", LEN);
    let peer = near.engine.load_peer(&far.metadata).unwrap();
    let transfer = near.transfer(&peer, &far, operation, shape);
    end_of(&transfer).unwrap();
    let transport = |stats: corelane::EngineStats| stats.peers[0].transport;
    assert_eq!(transport(near.engine.stats()), Some(TransportKind::Local));

    let (stuck, is_stuck) = std::sync::mpsc::channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    drop(near.engine.spawn_on(&peer, move |_| async move {
        stuck.send(()).unwrap();
        let _ = released.recv();
    }));
    is_stuck.recv().unwrap();
    let victim = far.process.id().cast_signed();
    let base = far.region.base();
    far.process.kill();
    drop(far);
    let (ready, done) = (pipe(), pipe());
    let child = fork_as(victim, &mut || impostor(base, ready, done)).unwrap();
    // SAFETY: our own descriptors; a child that ends closes its ends, and the read returns.
    let began = unsafe {
        libc::close(ready[1]);
        let mut byte = 0u8;
        libc::read(ready[0], (&raw mut byte).cast(), 1) == 1
    };
    if began {
        let posted = transfer.post();
        // It may be over already, or waits for the lane to find out.
        drop(release);
        let error = posted.and_then(|()| outcome(&transfer)).unwrap_err();
        let gone = error.is_disconnect() || matches!(error, corelane::Error::Connect { .. });
        assert!(gone, "{operation:?} {shape:?}: {error:?}");
    } else {
        drop(release);
    }
    let mut status = 0;
    // SAFETY: our own descriptors and our own child.
    unsafe {
        libc::close(done[1]);
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        libc::close(ready[0]);
        libc::close(done[0]);
    }
    assert!(libc::WIFEXITED(status));
    match libc::WEXITSTATUS(status) {
        0 => assert!(began),
        1 => panic!("{operation:?} {shape:?} has written into another process"),
        _ => assert!(!began),
    }
    near.memory.assert_poison(LEN, 4096);
    began
}

#[test]
fn a_peer_that_becomes_another_program_is_gone() {
    for shape in SHAPES {
        let near = Initiator::new("near");
        let mut far = target!("far", LEN);
        let peer = near.engine.load_peer(&far.metadata).unwrap();
        let transfers = [Operation::Read, Operation::Write]
            .map(|operation| near.transfer(&peer, &far, operation, shape));
        transfers.iter().for_each(|transfer| end_of(transfer).unwrap());
        far.process.send("exec sleep 60");
        let comm = format!("/proc/{}/comm", far.process.id());
        corelane_tests::eventually("it is another program", || {
            transfers.iter().for_each(|transfer| drop(end_of(transfer)));
            std::fs::read_to_string(&comm).unwrap().trim() == "sleep"
        });
        for transfer in &transfers {
            let error = end_of(transfer).unwrap_err();
            let gone = error.is_disconnect() || matches!(error, corelane::Error::Connect { .. });
            assert!(gone, "{error:?}");
        }
    }
}

/// Both engines live here: what is read is unmapped as soon as its engine is gone, so that a copy that went on would
/// be a crash.
#[test]
fn an_engine_that_is_destroyed_during_a_copy_in_its_process_is_left_in_peace() {
    const LARGE: usize = 16 << 20;
    for round in 0..30 {
        let owner = Engine::new("owner", local_config()).unwrap();
        let near = Engine::new("near", local_config()).unwrap();
        let (theirs, ours) = (Buffer::new(LARGE), Buffer::new(LARGE));
        let remote = theirs.register(&owner, Access::READ_WRITE);
        let local = ours.register(&near, Access::LOCAL);
        let peer = near.load_peer(&owner.metadata()).unwrap();
        let len = if round % 2 == 0 { LARGE } else { 900_000 } as u64;
        let segments = ([local.segment(0, len)], [remote.descriptor().segment(0, len)]);
        let plans = [Operation::Read, Operation::Write]
            .map(|operation| near.prepare(operation, &peer, &segments.0, &segments.1).unwrap());
        end_of(&plans[0].transfer()).unwrap();
        std::thread::scope(|scope| {
            let copying = scope.spawn(move || {
                let transfers = plans.map(|plan| plan.transfer());
                for number in 0.. {
                    if end_of(&transfers[number % 2]).is_err() {
                        return number;
                    }
                }
                0
            });
            std::thread::sleep(Duration::from_micros(100 * round));
            if round % 3 == 2 {
                // The side that copies.
                near.shutdown().unwrap();
                drop(ours);
            } else {
                owner.shutdown().unwrap();
                drop(theirs);
            }
            copying.join().unwrap();
        });
    }
}
