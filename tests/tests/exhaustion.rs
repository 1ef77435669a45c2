//! Descriptors, or memory that may be locked, are used up: whoever asks for more gets an error that says so, and what is there goes on.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane_tests::{PeerProcess, peer_process, to_hex};

const LEN: usize = 1 << 20;
/// Attempts to connect are short: those that cannot succeed are waited for.
const SETTINGS: &str = "connect_ms=500 reconnect_ms=500";

/// A process with an engine of one transport, and a region of known bytes.
struct Party {
    process: PeerProcess,
    metadata: Vec<u8>,
    region: String,
}

impl Party {
    fn new(name: &str, transport: &str) -> Self {
        let mut process = peer_process!();
        let metadata = process.engine(name, &format!("transports={transport} {SETTINGS}"));
        let region = to_hex(&process.region("r", LEN, "read-write").to_bytes());
        process.ask(&format!("fill r 1 0 {LEN} 0"));
        process.region("own", LEN, "local");
        Self { process, metadata, region }
    }

    /// Reads and writes of two sizes, byte for byte.
    #[track_caller]
    fn assert_reaches(&mut self, name: &str, region: &str) {
        for len in [100, LEN] {
            self.process.ask(&format!("poison own 0 {LEN}"));
            self.process.ask(&format!("read {name} own 0 {region} 0 {len}"));
            self.process.ask(&format!("check own 1 0 {len} 0"));
            self.process.ask(&format!("write {name} own 0 {region} 0 {len}"));
        }
    }
}

fn each_transport(test: impl Fn(&str)) {
    for transport in ["tcp", "local"] {
        println!("{transport}");
        test(transport);
    }
}

#[test]
fn who_cannot_accept_for_want_of_descriptors_serves_those_it_has_and_accepts_later() {
    each_transport(|transport| {
        let mut far = Party::new("far", transport);
        let mut friend = Party::new("friend", transport);
        friend.process.load(&far.metadata);
        friend.assert_reaches("far", &far.region);
        let mut late = Party::new("late", transport);
        late.process.load(&far.metadata);
        far.process.ask("use-up-descriptors 0");
        let error = late.process.try_ask("connect far").unwrap_err();
        assert!(error.contains("Connect"), "{error}");
        friend.assert_reaches("far", &far.region);
        far.process.ask("give-descriptors-back");
        late.process.ask("connect far");
        late.assert_reaches("far", &far.region);
        friend.assert_reaches("far", &far.region);
    });
}

#[test]
fn who_cannot_connect_for_want_of_descriptors_is_told_and_keeps_its_peers() {
    each_transport(|transport| {
        let far = Party::new("far", transport);
        let other = Party::new("other", transport);
        let mut near = Party::new("near", transport);
        near.process.load(&far.metadata);
        near.process.load(&other.metadata);
        near.assert_reaches("far", &far.region);
        near.process.ask("use-up-descriptors 0");
        let error = near.process.try_ask("connect other").unwrap_err();
        assert!(error.contains("Connect") && error.contains("os error 24"), "{error}");
        near.assert_reaches("far", &far.region);
        near.process.ask("give-descriptors-back");
        near.process.ask("connect other");
        near.assert_reaches("other", &other.region);
    });
}

/// A session takes several descriptors, on this host those that are sent, too: it may break off after any of them.
#[test]
fn sessions_that_get_only_some_of_their_descriptors_harm_nobody() {
    each_transport(|transport| {
        let mut far = Party::new("far", transport);
        let mut friend = Party::new("friend", transport);
        friend.process.load(&far.metadata);
        friend.assert_reaches("far", &far.region);
        for left in 1..10 {
            let mut late = Party::new(&format!("late{left}"), transport);
            late.process.load(&far.metadata);
            far.process.ask(&format!("use-up-descriptors {left}"));
            let read = format!("read far own 0 {} 0 {LEN}", far.region);
            match late.process.try_ask(&read) {
                Ok(_) => drop(late.process.ask(&format!("check own 1 0 {LEN} 0"))),
                Err(error) => {
                    let known = ["Connect", "RemoteDisconnect"].iter().any(|k| error.contains(k));
                    assert!(known, "{left} left: {error}");
                }
            }
            friend.assert_reaches("far", &far.region);
            far.process.ask("give-descriptors-back");
            // A session that came up without shared memory stays so until it is ended (docs/reliability.md).
            late.process.ask("disconnect far");
            late.assert_reaches("far", &far.region);
        }
    });
}

#[test]
fn an_engine_that_cannot_be_made_says_which_limit_to_raise() {
    let mut process = peer_process!();
    process.ask("limit memlock 65536");
    let error = process.try_ask("engine e").unwrap_err();
    assert!(error.contains("locked memory") && error.contains("ulimit -l"), "{error}");
    process.ask("limit memlock 8388608");
    for left in 0..16 {
        process.ask(&format!("use-up-descriptors {left}"));
        let error = process.try_ask("engine e").unwrap_err();
        assert!(error.contains("ulimit -n") || error.contains("os error 24"), "{error}");
        process.ask("give-descriptors-back");
    }
    process.engine("e", "");
}

#[test]
fn memory_is_registered_and_peers_are_met_where_nothing_more_may_be_locked() {
    each_transport(|transport| {
        let mut far = Party::new("far", transport);
        let mut near = Party::new("near", transport);
        far.process.ask("limit memlock 0");
        near.process.ask("limit memlock 0");
        near.process.load(&far.metadata);
        near.assert_reaches("far", &far.region);
        let another = to_hex(&far.process.region("another", LEN, "read-write").to_bytes());
        far.process.ask(&format!("fill another 1 0 {LEN} 0"));
        near.assert_reaches("far", &another);
    });
}

/// That no connection can be made now does not say that nobody is there: what waits for the peer is kept.
#[test]
fn notifications_wait_until_there_are_descriptors_to_connect_with() {
    each_transport(|transport| {
        let mut far = Party::new("far", transport);
        let mut near = Party::new("near", transport);
        near.process.load(&far.metadata);
        near.process.ask("use-up-descriptors 0");
        near.process.ask(&format!("notify far {}", to_hex(b"kept")));
        let error = near.process.try_ask("connect far").unwrap_err();
        assert!(error.contains("Connect") && error.contains("os error 24"), "{error}");
        near.process.ask("give-descriptors-back");
        assert_eq!(far.process.ask("take 1"), format!("near:{}", to_hex(b"kept")));
    });
}
