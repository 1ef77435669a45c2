//! Peers of this host whose memory is out of reach: the next transport, and the reason.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::process::{Command, Stdio};

use corelane::{Access, Engine, Error, Operation, Region, TransportKind};
use corelane_tests::{Buffer, PeerProcess, Target, end_of, local_config, to_hex};

const LEN: usize = 300_000;
const NOBODY: &str = "65534";

/// The peer's process, started by `wrapper`; `None`, and a word about it: this user, or this system, cannot do that.
fn elsewhere(wrapper: &[&str]) -> Option<PeerProcess> {
    let command = || {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(env!("CARGO_BIN_EXE_corelane-test-peer"));
        command
    };
    // Without commands it ends at once. Another user may not even see the binary.
    let can = command().stdin(Stdio::null()).output().is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("not tested: `{}` is not possible here", wrapper.join(" "));
        return None;
    }
    Some(PeerProcess::start_by(&mut command()))
}

struct Near {
    engine: Engine,
    memory: Buffer,
    region: Region,
}

impl Near {
    fn new() -> Self {
        let engine = Engine::new("near", local_config()).unwrap();
        let memory = Buffer::with_pattern(2, LEN);
        let region = memory.register(&engine, Access::READ_WRITE);
        Self { engine, memory, region }
    }

    fn run(&self, far: &Target, operation: Operation) -> Result<(), Error> {
        let peer = self.engine.load_peer(&far.metadata)?;
        let (local, remote) =
            (self.region.segment(0, LEN as u64), far.region.segment(0, LEN as u64));
        end_of(&self.engine.prepare(operation, &peer, &[local], &[remote])?.transfer())
    }

    /// The peer reads from here: by requests, since it cannot reach this process.
    fn assert_read_by_requests(&self, far: &mut Target) {
        let served = self.engine.stats().totals.requests_served;
        far.process.load(&self.engine.metadata());
        far.process.region("own", LEN, "local");
        let descriptor = to_hex(&self.region.descriptor().to_bytes());
        far.process.ask(&format!("read near own 0 {descriptor} 0 {LEN}"));
        far.process.ask(&format!("check own 2 0 {LEN} 0"));
        assert!(self.engine.stats().totals.requests_served > served);
    }
}

#[test]
fn a_peer_that_cannot_see_our_process_asks_for_the_bytes() {
    let Some(process) = elsewhere(&["unshare", "--pid", "--fork", "--kill-child"]) else { return };
    let mut far = Target::start(process, "far", LEN, "read-write", "");
    let near = Near::new();
    near.assert_read_by_requests(&mut far);
    // The other way it is seen, and reached.
    near.run(&far, Operation::Read).unwrap();
    near.memory.assert_pattern(1, 0, LEN, 0);
    assert_eq!(near.engine.stats().peers[0].transport, Some(TransportKind::Local));
}

#[test]
fn a_peer_of_another_user_asks_for_the_bytes_or_says_what_is_missing() {
    let user = ["setpriv", "--reuid", NOBODY, "--clear-groups"];
    let Some(process) = elsewhere(&user) else { return };
    let mut far = Target::start(process, "far", LEN, "read-write", "");
    let near = Near::new();
    near.assert_read_by_requests(&mut far);
    near.run(&far, Operation::Write).unwrap();
    far.assert_pattern(2, 0, LEN, 0);

    // Without the next transport there is none.
    let Some(process) = elsewhere(&user) else { return };
    let mut strict = Target::start(process, "strict", LEN, "read-write", "transports=local");
    strict.process.load(&near.engine.metadata());
    let descriptor = to_hex(&near.region.descriptor().to_bytes());
    let error = strict.process.try_ask(&format!("read near r 0 {descriptor} 0 {LEN}")).unwrap_err();
    assert!(error.starts_with("Connect") && error.contains("tcp"), "{error}");
}

#[test]
fn a_peer_in_another_network_is_not_on_this_host() {
    let Some(process) = elsewhere(&["unshare", "--net"]) else { return };
    // Its loopback interface is down: nothing leads there.
    let far = Target::start(process, "far", LEN, "read-write", "");
    let near = Near::new();
    let error = near.run(&far, Operation::Read).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    near.memory.assert_pattern(2, 0, LEN, 0);
}
