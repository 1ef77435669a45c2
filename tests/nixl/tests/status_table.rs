//! Which status a caller gets for what: the table of docs/nixl.md, row by row. Asked of the backend itself, since an agent
//! has its own words for some of it.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane_nixl_tests::{
    Engine, Handle, MetaDescriptor, Metadata, Operation, Status, TCP, descriptor, peer_process,
    range,
};
use corelane_tests::{Buffer, PeerProcess, forge_secret, free_port, from_hex};

const LEN: usize = 8 << 20;

/// An engine, `a`, that knows `b` in another process.
struct Setup {
    a: Engine,
    process: PeerProcess,
    info: Vec<u8>,
    near: Buffer,
    far: (u64, usize),
    data: Vec<u8>,
    here: Metadata,
    there: Metadata,
}

impl Setup {
    fn new(ours: &[(&str, &str)], theirs: &str) -> Self {
        let mut process = peer_process!();
        let info = from_hex(&process.ask(&format!("engine b {theirs}"))).unwrap();
        let answer = process.ask(&format!("engine-region r {LEN}"));
        let (address, data) = answer.split_once(' ').unwrap();
        let (far, data) = ((address.parse().unwrap(), LEN), from_hex(data).unwrap());
        let (a, near) = (Engine::new("a", ours), Buffer::new(LEN));
        let here = a.register(range(&near, 0, LEN), 0).unwrap();
        assert_eq!(a.load_conn_info("b", &info), Status::SUCCESS);
        let there = a.load_remote(far, 0, &data, "b").unwrap();
        Self { a, process, info, near, far, data, here, there }
    }

    fn lists(&self) -> ([MetaDescriptor; 1], [MetaDescriptor; 1]) {
        ([descriptor(range(&self.near, 0, LEN), self.here)], [descriptor(self.far, self.there)])
    }

    fn prepare(&self) -> Result<Handle, Status> {
        let (local, remote) = self.lists();
        self.a.prepare(Operation::Read, &local, &remote, "b")
    }

    fn post(&self, handle: Handle) -> Status {
        let (local, remote) = self.lists();
        self.a.post(Operation::Read, &local, &remote, "b", handle, None)
    }

    /// How a posting ends.
    #[track_caller]
    fn end(&self, handle: Handle) -> Status {
        match self.post(handle) {
            Status::IN_PROGRESS | Status::SUCCESS => {
                let end = self.a.wait(handle);
                // The same answer, however often.
                for _ in 0..10 {
                    assert_eq!(self.a.check(handle), end);
                }
                end
            }
            error => error,
        }
    }

    /// The end of a transfer, from nothing.
    #[track_caller]
    fn transfer(&self) -> Status {
        match self.prepare() {
            Ok(handle) => {
                let end = self.end(handle);
                self.a.release_for_good(handle);
                end
            }
            Err(status) => status,
        }
    }

    #[track_caller]
    fn assert_works(&self) {
        self.near.poison(0, LEN);
        assert_eq!(self.transfer(), Status::SUCCESS);
        self.near.assert_pattern(1, 0, LEN, 0);
    }

    /// A new process that is `b`, loaded in the place of the one before, is read.
    #[track_caller]
    fn assert_works_with_another(mut self) {
        self.process = peer_process!();
        self.info = from_hex(&self.process.ask("engine b")).unwrap();
        let answer = self.process.ask(&format!("engine-region r {LEN}"));
        let (address, data) = answer.split_once(' ').unwrap();
        self.far.0 = address.parse().unwrap();
        self.data = from_hex(data).unwrap();
        self.a.unload(self.there);
        self.a.disconnect("b");
        assert_eq!(self.a.load_conn_info("b", &self.info), Status::SUCCESS);
        self.there = self.a.load_remote(self.far, 0, &self.data, "b").unwrap();
        self.assert_works();
    }
}

// --- REMOTE_DISCONNECT

#[test]
fn a_dead_peer() {
    for transports in ["local", "tcp"] {
        let setup = Setup::new(&[("transports", transports)], "");
        setup.assert_works();
        let handle = setup.prepare().unwrap();
        setup.process.end();
        assert_eq!(setup.end(handle), Status::REMOTE_DISCONNECT);
        // Whoever asks for more gets the same.
        assert_eq!(setup.transfer(), Status::REMOTE_DISCONNECT);
        assert_eq!(setup.a.connect("b"), Status::REMOTE_DISCONNECT);
        setup.a.release_for_good(handle);
        setup.assert_works_with_another();
    }
}

#[test]
fn a_peer_that_dies_in_the_middle() {
    let setup = Setup::new(&[TCP, ("liveness_ms", "60000")], "");
    setup.assert_works();
    let handle = setup.prepare().unwrap();
    setup.process.freeze();
    assert_eq!(setup.post(handle), Status::IN_PROGRESS);
    setup.process.kill();
    assert_eq!(setup.a.wait(handle), Status::REMOTE_DISCONNECT);
    setup.a.release_for_good(handle);
    setup.assert_works_with_another();
}

#[test]
fn a_peer_that_refuses_connections() {
    let setup = Setup::new(&[], "");
    setup.process.end();
    assert_eq!(setup.a.connect("b"), Status::REMOTE_DISCONNECT);
    assert_eq!(setup.transfer(), Status::REMOTE_DISCONNECT);
    setup.assert_works_with_another();
}

#[test]
fn a_peer_out_of_reach() {
    // An address that is for documentation.
    let setup = Setup::new(&[TCP, ("connect_timeout_ms", "500")], "advertise=198.51.100.1:9");
    assert_eq!(setup.transfer(), Status::REMOTE_DISCONNECT);
    assert_eq!(setup.a.connect("b"), Status::REMOTE_DISCONNECT);
    setup.assert_works_with_another();
}

#[test]
fn a_silent_peer() {
    let setup = Setup::new(&[TCP, ("liveness_ms", "1000")], "");
    setup.assert_works();
    let handle = setup.prepare().unwrap();
    setup.process.freeze();
    assert_eq!(setup.post(handle), Status::IN_PROGRESS);
    assert_eq!(setup.a.wait(handle), Status::REMOTE_DISCONNECT);
    setup.a.release_for_good(handle);
    setup.assert_works_with_another();
}

#[test]
fn a_peer_that_was_silent_before_anybody_connected() {
    let setup = Setup::new(&[("liveness_ms", "300"), ("connect_timeout_ms", "1000")], "");
    setup.process.freeze();
    assert_eq!(setup.transfer(), Status::REMOTE_DISCONNECT);
    setup.assert_works_with_another();
}

#[test]
fn a_restarted_peer() {
    let port = free_port();
    let theirs = format!("listen=127.0.0.1 port_range={port}");
    let mut setup = Setup::new(&[TCP], &theirs);
    setup.assert_works();
    let handle = setup.prepare().unwrap();
    setup.process = peer_process!();
    corelane_tests::eventually("the port is free again", || {
        setup.process.try_ask(&format!("engine b {theirs}")).is_ok()
    });
    assert_eq!(setup.end(handle), Status::REMOTE_DISCONNECT);
    setup.a.release_for_good(handle);
    setup.assert_works_with_another();
}

#[test]
fn a_peer_that_is_gone() {
    let (a, b) = (Engine::new("a", &[]), Engine::new("b", &[]));
    let (near, far) = (Buffer::new(4096), Buffer::with_pattern(1, 4096));
    let here = a.register(range(&near, 0, 4096), 0).unwrap();
    let exported = b.register(range(&far, 0, 4096), 0).unwrap();
    assert_eq!(a.load_conn_info("b", &b.conn_info()), Status::SUCCESS);
    assert_eq!(a.connect("b"), Status::SUCCESS);
    let there = a.load_remote(range(&far, 0, 4096), 0, &b.public_data(exported), "b").unwrap();
    let lists =
        ([descriptor(range(&near, 0, 4096), here)], [descriptor(range(&far, 0, 4096), there)]);
    let handle = a.prepare(Operation::Read, &lists.0, &lists.1, "b").unwrap();
    drop(b);
    let posted = a.post(Operation::Read, &lists.0, &lists.1, "b", handle, None);
    let end = if posted.0 < 0 { posted } else { a.wait(handle) };
    assert_eq!(end, Status::REMOTE_DISCONNECT);
    near.assert_poison(0, 4096);
    a.release_for_good(handle);
}

#[test]
fn a_peer_that_refuses_the_secret() {
    let setup = Setup::new(&[("log_level", "error")], "listen=127.0.0.1 log_level=error");
    // Another peer's name for the same address, with a secret that is not its own.
    let forged = forge_secret(&setup.info);
    assert_eq!(setup.a.load_conn_info("b", &forged), Status::SUCCESS);
    assert_eq!(setup.transfer(), Status::REMOTE_DISCONNECT);
    assert_eq!(setup.a.connect("b"), Status::REMOTE_DISCONNECT);
    // The true one still opens the door.
    assert_eq!(setup.a.load_conn_info("b", &setup.info), Status::SUCCESS);
    setup.assert_works();
}

// --- BACKEND

#[test]
fn an_operation_that_takes_too_long_while_the_peer_lives() {
    let setup = Setup::new(&[TCP, ("liveness_ms", "60000"), ("operation_timeout_ms", "700")], "");
    setup.assert_works();
    let handle = setup.prepare().unwrap();
    setup.process.freeze();
    assert_eq!(setup.post(handle), Status::IN_PROGRESS);
    assert_eq!(setup.a.wait(handle), Status::BACKEND);
    setup.near.poison(0, LEN);
    setup.process.thaw();
    std::thread::sleep(std::time::Duration::from_millis(200));
    setup.near.assert_poison(0, LEN);
    // The peer is not forgotten, and the request is good for another posting.
    assert_eq!(setup.end(handle), Status::SUCCESS);
    setup.near.assert_pattern(1, 0, LEN, 0);
    setup.a.release_for_good(handle);
}

// --- NOT_FOUND

#[test]
fn an_unknown_agent() {
    let setup = Setup::new(&[], "");
    let (local, remote) = setup.lists();
    assert_eq!(setup.a.connect("nobody"), Status::NOT_FOUND);
    assert_eq!(setup.a.notify("nobody", b"x"), Status::NOT_FOUND);
    assert_eq!(setup.a.prepare(Operation::Read, &local, &remote, "nobody"), Err(Status::NOT_FOUND));
    assert_eq!(setup.a.disconnect("b"), Status::SUCCESS);
    assert_eq!(setup.a.notify("b", b"x"), Status::NOT_FOUND);
    assert_eq!(setup.a.connect("b"), Status::NOT_FOUND);
    assert_eq!(setup.a.load_conn_info("b", &setup.info), Status::SUCCESS);
    setup.assert_works();
}

// --- INVALID_PARAM

#[test]
fn bad_descriptors_bounds_and_counts() {
    let setup = Setup::new(&[], "");
    let l = |at, len| {
        let (addr, _) = range(&setup.near, 0, LEN);
        descriptor((addr.wrapping_add(at), len), setup.here)
    };
    let r = |at: u64, len| descriptor((setup.far.0.wrapping_add(at), len), setup.there);
    let end = LEN as u64;
    let cases: Vec<(Vec<MetaDescriptor>, Vec<MetaDescriptor>)> = vec![
        (vec![], vec![]),
        (vec![l(0, 8)], vec![]),
        (vec![], vec![r(0, 8)]),
        (vec![l(0, 8), l(8, 8)], vec![r(0, 8)]),
        (vec![l(0, 8)], vec![r(0, 9)]),
        (vec![l(0, 8), l(8, 8)], vec![r(0, 8), r(8, 7)]),
        (vec![l(end - 7, 8)], vec![r(0, 8)]),
        (vec![l(0, 8)], vec![r(end - 7, 8)]),
        (vec![l(u64::MAX, 8)], vec![r(0, 8)]),
        (vec![l(0, 8)], vec![r(u64::MAX, 8)]),
        (vec![l(0, usize::MAX)], vec![r(0, usize::MAX)]),
        (vec![l(end, 1)], vec![r(0, 1)]),
        (vec![l(0, LEN + 1)], vec![r(0, LEN + 1)]),
    ];
    for (local, remote) in cases {
        let result = setup.a.prepare(Operation::Write, &local, &remote, "b");
        assert_eq!(result, Err(Status::INVALID_PARAM), "{local:x?} {remote:x?}");
    }
    setup.assert_works();
}

#[test]
fn metadata_that_is_none() {
    let setup = Setup::new(&[("log_level", "off")], "");
    for info in [&b""[..], b"x", &setup.info[..setup.info.len() - 1], &setup.data] {
        let status = setup.a.load_conn_info("c", info);
        assert!([Status::INVALID_PARAM, Status::MISMATCH].contains(&status), "{status}");
        assert_eq!(setup.a.connect("c"), Status::NOT_FOUND);
    }
    for data in [&b""[..], b"x", &setup.data[..setup.data.len() - 1], &setup.info] {
        let status = setup.a.load_remote(setup.far, 0, data, "b").unwrap_err();
        assert!([Status::INVALID_PARAM, Status::MISMATCH].contains(&status), "{status}");
    }
    // A description of other memory than it is said to be.
    let (addr, len) = setup.far;
    for wrong in [(addr + 1, len), (addr, len + 1), (0, len), (addr, usize::MAX)] {
        match setup.a.load_remote(wrong, 0, &setup.data, "b") {
            Err(status) => assert_eq!(status, Status::INVALID_PARAM, "{wrong:x?}"),
            Ok(there) => {
                let local = [descriptor(range(&setup.near, 0, LEN), setup.here)];
                let outside = [descriptor((wrong.0.wrapping_add(1), LEN), there)];
                let result = setup.a.prepare(Operation::Write, &local, &outside, "b");
                assert_eq!(result, Err(Status::INVALID_PARAM), "{wrong:x?}");
                setup.a.unload(there);
            }
        }
    }
    setup.assert_works();
}

// --- NOT_ALLOWED

#[test]
fn a_stale_key() {
    let (a, b) = (Engine::new("a", &[]), Engine::new("b", &[]));
    let (near, far) = (Buffer::new(4096), Buffer::with_pattern(1, 4096));
    let here = a.register(range(&near, 0, 4096), 0).unwrap();
    let exported = b.register(range(&far, 0, 4096), 0).unwrap();
    assert_eq!(a.load_conn_info("b", &b.conn_info()), Status::SUCCESS);
    let there = a.load_remote(range(&far, 0, 4096), 0, &b.public_data(exported), "b").unwrap();
    assert_eq!(b.deregister(exported), Status::SUCCESS);
    let lists =
        ([descriptor(range(&near, 0, 4096), here)], [descriptor(range(&far, 0, 4096), there)]);
    for operation in [Operation::Read, Operation::Write] {
        let handle = a.prepare(operation, &lists.0, &lists.1, "b").unwrap();
        for _ in 0..3 {
            let posted = a.post(operation, &lists.0, &lists.1, "b", handle, Some(b"never"));
            let end = if posted.0 < 0 { posted } else { a.wait(handle) };
            assert_eq!(end, Status::NOT_ALLOWED);
        }
        a.release_for_good(handle);
    }
    near.assert_poison(0, 4096);
    far.assert_pattern(1, 0, 4096, 0);
    assert!(b.notifications().is_empty());
}

// --- REPOST_ACTIVE

#[test]
fn a_peer_that_takes_no_notifications() {
    const PAYLOAD: usize = 16 << 20;
    let setup = Setup::new(&[TCP, ("liveness_ms", "60000")], "");
    setup.assert_works();
    let (handle, payload) = (setup.prepare().unwrap(), vec![7; PAYLOAD]);
    setup.process.freeze();
    let mut taken = 0;
    let full = loop {
        match setup.a.notify("b", &payload) {
            Status::SUCCESS => taken += 1,
            status => break status,
        }
    };
    assert_eq!((full, taken), (Status::REPOST_ACTIVE, (64 << 20) / PAYLOAD));
    // Nor a transfer that carries one, of which nothing moves.
    setup.near.poison(0, LEN);
    let (local, remote) = setup.lists();
    let posted = setup.a.post(Operation::Read, &local, &remote, "b", handle, Some(b"no room"));
    assert_eq!(posted, Status::REPOST_ACTIVE);
    setup.process.thaw();
    corelane_tests::eventually("there is room again", || {
        setup.a.notify("b", b"again") == Status::SUCCESS
    });
    setup.near.assert_poison(0, LEN);
    assert_eq!(setup.end(handle), Status::SUCCESS);
    setup.near.assert_pattern(1, 0, LEN, 0);
    setup.a.release_for_good(handle);
}

// --- CANCELED

#[test]
fn our_own_disconnect() {
    let params =
        [TCP, ("liveness_ms", "60000"), ("operation_timeout_ms", "2000"), ("linger_ms", "50")];
    let setup = Setup::new(&params, "");
    setup.assert_works();
    let handle = setup.prepare().unwrap();
    setup.process.freeze();
    assert_eq!(setup.post(handle), Status::IN_PROGRESS);
    assert_eq!(setup.a.disconnect("b"), Status::SUCCESS);
    assert_eq!(setup.a.wait(handle), Status::CANCELED);
    setup.near.poison(0, LEN);
    setup.process.thaw();
    std::thread::sleep(std::time::Duration::from_millis(100));
    setup.near.assert_poison(0, LEN);
    setup.a.release_for_good(handle);
    assert_eq!(setup.a.load_conn_info("b", &setup.info), Status::SUCCESS);
    setup.assert_works();
}

#[test]
fn our_own_release() {
    let params = [TCP, ("liveness_ms", "60000"), ("operation_timeout_ms", "2000")];
    let setup = Setup::new(&params, "");
    setup.assert_works();
    let handle = setup.prepare().unwrap();
    setup.process.freeze();
    assert_eq!(setup.post(handle), Status::IN_PROGRESS);
    // The handle is kept where the memory is not quiet at once.
    match setup.a.release(handle) {
        Status::SUCCESS => {}
        status => {
            assert_eq!(status, Status::REPOST_ACTIVE);
            assert_eq!(setup.a.wait(handle), Status::CANCELED);
            assert_eq!(setup.a.release(handle), Status::SUCCESS);
        }
    }
    setup.near.poison(0, LEN);
    setup.process.thaw();
    std::thread::sleep(std::time::Duration::from_millis(100));
    setup.near.assert_poison(0, LEN);
}
