//! Why a peer that might be on this host is not reached there: said once, with the line that says how it is reached.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::Duration;

use corelane::TransportKind;
use corelane_tests::hostile::{HostileTarget, Identity, LOCAL, Stream, TCP, frame, hear};
use corelane_tests::{BOUND, Log, Near, eventually, kind, local_config};
use socket2::{Domain, SockAddr, Socket, Type};

#[test]
fn the_reason_is_in_the_line_that_says_how_a_peer_is_reached_instead() {
    let log = Log::keep();
    let near = Near::new(local_config(), 4096);
    // It says that it allows `local`, and is not where one looks for it.
    let mut target = HostileTarget::new(Identity::invented("elsewhere", 77));
    target.transports = TCP | LOCAL;
    let metadata = target.metadata();
    let thread = std::thread::spawn(move || {
        let mut link = target.session();
        while link.receive().is_some_and(|(header, _)| header.kind != frame::GOODBYE) {}
    });
    let peer = near.connect(&metadata);
    let line = &["connected", "elsewhere", "transport=\"tcp\""];
    eventually("it is said how it is reached", || !log.lines(line).is_empty());
    let lines = log.lines(line);
    assert_eq!(lines.len(), 1, "{lines:?}");
    let reason = "no engine of this host and network namespace has its incarnation";
    assert!(lines[0].contains(reason) && lines[0].contains("Connection refused"), "{lines:?}");
    near.engine.unload_peer(&peer).unwrap();
    thread.join().unwrap();
}

/// Who does not get through to a peer that lives tries again, for as long as it may take to connect.
#[test]
fn a_peer_that_too_many_connect_to_is_tried_again() {
    let identity = Identity::invented("crowded", 78);
    let address = SockAddr::unix(format!("\0corelane-{:032x}", identity.incarnation)).unwrap();
    let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    listener.bind(&address).unwrap();
    listener.listen(0).unwrap();
    listener.set_read_timeout(Some(BOUND)).unwrap();
    // As many as may wait.
    let mut crowd = Vec::new();
    loop {
        let one = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).unwrap();
        match one.connect(&address) {
            Ok(()) => crowd.push(one),
            Err(error) => break assert_eq!(error.raw_os_error(), Some(libc::EAGAIN)),
        }
    }
    let mut config = local_config();
    config.transports = vec![TransportKind::Local];
    config.connect_timeout = BOUND;
    let near = Near::new(config, 4096);
    let peer = near.engine.load_peer(&identity.metadata_with(9, LOCAL)).unwrap();
    let error = peer.connect(Duration::from_millis(300)).unwrap_err();
    assert_eq!(kind(&error), "Timeout", "{error}");
    // The crowd goes in, and the engine comes behind it.
    for _ in &crowd {
        listener.accept().unwrap();
    }
    drop(crowd);
    let (link, _) = listener.accept().unwrap();
    link.set_read_timeout(Some(BOUND)).unwrap();
    let mut link = Stream::Unix(link.into());
    assert!(hear(&mut link).is_some_and(|hello| hello.starts_with(b"CLNE")), "a hello");
}
