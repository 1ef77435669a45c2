//! Networks that fail: hosts that vanish without a word, connections that are reset, and buffers that nobody empties.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::io;
use std::process::Command;
use std::time::{Duration, Instant};

use corelane_tests::{
    BOUND, PeerProcess, eventually, not_run, peer_process, reset, sockets_of, to_hex,
};

const LEN: usize = 8 << 20;
/// Transfers end by this, and by nothing that comes sooner or takes longer.
const LIVENESS: &str =
    "transports=tcp liveness_ms=500 connect_ms=500 reconnect_ms=500 operation_ms=600000";

/// Two processes, each on a host of its own as far as the network is concerned, and a cable between them.
struct Hosts {
    near: PeerProcess,
    far: PeerProcess,
    region: String,
}

fn run_in(process: &PeerProcess, command: &str) -> io::Result<()> {
    let namespace = format!("--net=/proc/{}/ns/net", process.id());
    let output =
        Command::new("nsenter").arg(namespace).args(command.split_whitespace()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// Says why a test cannot run here.
fn not_here(what: &str, reason: &str) {
    not_run(&format!("a network namespace with a cable: {what}: {reason}"));
}

impl Hosts {
    /// `None`, and it says so: networks cannot be made here.
    fn new() -> Option<Self> {
        let (mut near, mut far) = (peer_process!(), peer_process!());
        for process in [&mut near, &mut far] {
            if let Err(error) = process.try_ask("own-network") {
                not_here("unshare", &error);
                return None;
            }
        }
        let cable = format!("ip link add cable type veth peer name cable netns {}", far.id());
        if let Err(error) = run_in(&near, &cable) {
            not_here("nsenter, ip, veth", &error.to_string());
            return None;
        }
        for (process, address) in [(&near, "10.77.0.1/24"), (&far, "10.77.0.2/24")] {
            run_in(process, "ip link set lo up").unwrap();
            run_in(process, &format!("ip address add {address} dev cable")).unwrap();
            run_in(process, "ip link set cable up").unwrap();
        }
        let metadata = far.engine("far", &format!("{LIVENESS} listen=10.77.0.2"));
        let region = to_hex(&far.region("r", LEN, "read-write").to_bytes());
        far.ask(&format!("fill r 1 0 {LEN} 0"));
        near.engine("near", &format!("{LIVENESS} listen=10.77.0.1"));
        near.region("r", LEN, "local");
        near.load(&metadata);
        let mut hosts = Self { near, far, region };
        hosts.assert_reached();
        Some(hosts)
    }

    /// Packets get lost on their way from now on, in both directions, and nobody is told.
    fn cut(&self) {
        run_in(&self.far, "ip link set cable down").unwrap();
    }

    fn mend(&self) {
        run_in(&self.far, "ip link set cable up").unwrap();
    }

    #[track_caller]
    fn assert_reached(&mut self) {
        self.near.ask(&format!("poison r 0 {LEN}"));
        self.near.ask(&format!("read far r 0 {} 0 {LEN}", self.region));
        self.near.ask(&format!("check r 1 0 {LEN} 0"));
    }

    /// Reads and writes, small and large, without end.
    fn begin_load(&mut self) {
        for (id, len) in [("small", 64), ("medium", 100_000), ("large", LEN)] {
            self.near.region(id, len, "local");
            self.near.ask(&format!("hammer-reads far {id} {}", self.region));
            self.near.ask(&format!("hammer-writes far {id} {}", self.region));
        }
        let before = self.near.number("completed");
        eventually("transfers", || self.near.number("completed") > before + 20);
    }

    /// All transfers under load have ended, and not because they were asked to.
    #[track_caller]
    fn assert_disconnected(&mut self) {
        let start = Instant::now();
        eventually("transfers fail", || self.near.number("failed") >= 6);
        assert!(start.elapsed() < BOUND);
        let error = self.near.try_ask("stop-hammers").unwrap_err();
        assert!(["RemoteDisconnect", "Connect"].iter().any(|kind| error.contains(kind)), "{error}");
    }
}

#[test]
fn a_host_that_vanishes_without_a_word_ends_transfers_after_the_liveness_timeout() {
    let Some(mut hosts) = Hosts::new() else { return };
    hosts.begin_load();
    hosts.cut();
    // Its sockets say goodbye to nobody.
    hosts.far.kill();
    hosts.assert_disconnected();
    // Nobody reads or writes this memory any more: it is taken back at once.
    for id in ["small", "medium", "large"] {
        hosts.near.ask(&format!("deregister {id}"));
    }
}

#[test]
fn a_cable_that_is_mended_in_time_loses_nothing() {
    let Some(mut hosts) = Hosts::new() else { return };
    for _ in 0..3 {
        hosts.cut();
        std::thread::sleep(Duration::from_millis(100));
        hosts.mend();
        hosts.assert_reached();
    }
}

#[test]
fn a_cable_that_is_mended_later_is_used_again() {
    let Some(mut hosts) = Hosts::new() else { return };
    hosts.begin_load();
    hosts.cut();
    hosts.assert_disconnected();
    hosts.mend();
    eventually("they meet again", || hosts.near.try_ask("connect far").is_ok());
    // WRITEs of the load have changed it.
    hosts.far.ask(&format!("fill r 1 0 {LEN} 0"));
    hosts.assert_reached();
}

/// What the vanished side asked for sits in sockets of the other: it is given up at the liveness timeout, and its memory free.
#[test]
fn the_memory_that_a_vanished_host_was_reading_is_given_back() {
    let Some(mut hosts) = Hosts::new() else { return };
    hosts.begin_load();
    hosts.cut();
    hosts.near.kill();
    eventually("the region is given back", || hosts.far.try_ask("deregister r").is_ok());
}

/// Both sides of a connection may be the one that resets it, in the middle of anything.
#[test]
fn connections_that_are_reset_in_the_middle_of_transfers_come_back() {
    for round in 0..10u64 {
        let (mut near, mut far) = (peer_process!(), peer_process!());
        let metadata = far.engine("far", "transports=tcp");
        let region = to_hex(&far.region("r", LEN, "read-write").to_bytes());
        far.ask(&format!("fill r 1 0 {LEN} 0"));
        near.engine("near", "transports=tcp");
        near.region("r", LEN, "local");
        near.load(&metadata);
        near.ask("connect far");
        near.send(&format!("read far r 0 {region} 0 {LEN}"));
        std::thread::sleep(Duration::from_micros(300 * round));
        let whose = if round % 2 == 0 { far.id() } else { near.id() };
        let resets = sockets_of(whose).iter().filter(|socket| reset(socket)).count();
        assert!(resets > 0, "no connection");
        // A READ is begun again on the next link.
        near.answer().unwrap();
        near.ask(&format!("check r 1 0 {LEN} 0"));
        // A WRITE in the middle of which a link is lost may have come to anything; the next one is whole.
        near.ask(&format!("fill r 2 0 {LEN} 0"));
        near.send(&format!("write far r 0 {region} 0 {LEN}"));
        sockets_of(whose).iter().for_each(|socket| {
            reset(socket);
        });
        let mut written = near.answer();
        // It may have been done before the resets were noticed: those that came first, and these. One may have met the
        // connection that was just being made.
        for _ in 0..3 {
            if let Err(error) = &written {
                let expected = error.contains("RemoteDisconnect") || error.starts_with("Connect ");
                assert!(expected, "{error}");
            }
            written = near.try_ask(&format!("write far r 0 {region} 0 {LEN}"));
        }
        written.unwrap();
        far.ask(&format!("check r 2 0 {LEN} 0"));
    }
}

/// Its kernel takes bytes until its buffers are full, and acknowledges them.
#[test]
fn a_peer_that_stops_reading_ends_transfers_and_disturbs_no_other() {
    let mut near = peer_process!();
    near.engine("near", LIVENESS);
    near.region("r", LEN, "local");
    let mut others = Vec::new();
    for name in ["far", "healthy"] {
        let mut process = peer_process!();
        let metadata = process.engine(name, LIVENESS);
        let region = to_hex(&process.region("r", LEN, "read-write").to_bytes());
        near.load(&metadata);
        near.ask(&format!("connect {name}"));
        others.push((process, region));
    }
    let (far, healthy) = (&others[0], &others[1]);
    near.ask(&format!("hammer-writes far r {}", far.1));
    far.0.freeze();
    // Others are served while the buffers fill, and after they are full.
    for _ in 0..20 {
        near.ask(&format!("write healthy r 0 {} 0 100000", healthy.1));
    }
    eventually("transfers fail", || near.number("failed") >= 1);
    let error = near.try_ask("stop-hammers").unwrap_err();
    assert!(error.contains("RemoteDisconnect"), "{error}");
    near.ask("deregister r");
    far.0.thaw();
}
