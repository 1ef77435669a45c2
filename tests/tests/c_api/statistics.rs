//! Counters, into structures of other versions.

use crate::api::*;

const ENGINE: usize = size_of::<corelane_engine_stats>();
const PEER: usize = size_of::<corelane_peer_stats>();

#[test]
fn counters_count() {
    // What this side copies by itself, the peer does not see.
    let ways = [("tcp", 3, (10_000, 5_000, 20)), ("local", 1, (0, 0, 0))];
    for (transports, way, served) in ways {
        let pair = Pair::with(1 << 20, &[("transports", transports)]);
        let near = &pair.near;
        let (read, write) = (near.prepare(CORELANE_READ, 1000), near.prepare(CORELANE_WRITE, 500));
        for _ in 0..10 {
            assert_eq!(run(read), CORELANE_OK);
            assert_eq!(run(write), CORELANE_OK);
        }
        send(near.conn, b"0123456789");
        corelane_tests::eventually("the notification is there", || {
            pair.far.stats().pending_notifications == 1
        });
        let (here, there) = (near.engine.stats(), pair.far.stats());
        assert_eq!((here.posted, here.completed, here.failed), (20, 20, 0));
        assert_eq!((here.bytes_read, here.bytes_written), (10_000, 5_000));
        let counted = (there.bytes_served_read, there.bytes_served_write, there.requests_served);
        assert_eq!((counted, there.requests_refused), (served, 0));
        assert_eq!((here.notifications_sent, there.notifications_received), (1, 1));
        assert_eq!(there.pending_notification_bytes, 10);
        assert_eq!((here.regions, here.peers, here.connected_peers, here.lanes), (1, 1, 1, 1));
        assert_eq!((there.regions, there.peers, there.connected_peers), (1, 1, 1));
        // Not the first, which found no connection yet.
        let copied = if way == 1 { 19..=20 } else { 0..=0 };
        assert!(copied.contains(&here.copied_by_callers), "{}", here.copied_by_callers);
        assert_eq!((here.rdma_doorbells, here.rdma_completions, here.rdma_failures), (0, 0, 0));
        let mut peer = corelane_peer_stats::default();
        ok(c!(corelane_conn_stats(near.conn, &mut peer, PEER)));
        assert_eq!((peer.connected, peer.transport), (1, way));
        assert!(here.links_up >= 1 && here.send_calls > 0 && there.receive_calls > 0);
        assert_eq!(pair.far.collect(1).len(), 1);
        assert_eq!(pair.far.stats().pending_notifications, 0);
        ok(c!(corelane_disconnect(near.conn, std::ptr::null_mut())));
        assert_eq!(near.engine.stats().connected_peers, 0);
    }
}

#[test]
fn a_caller_of_another_version_gets_what_it_has_room_for() {
    let pair = Pair::new(4096);
    assert_eq!(run(pair.near.prepare(CORELANE_READ, 1000)), CORELANE_OK);
    let whole = pair.near.engine.stats();
    for size in [0, 1, 7, 8, 24, ENGINE - 8, ENGINE - 1, ENGINE, ENGINE + 1, ENGINE + 64, 4096] {
        let mut room = [0xEEEE_EEEE_EEEE_EEEEu64; 512];
        ok(c!(corelane_stats(pair.near.engine.0, room.as_mut_ptr().cast(), size)));
        // SAFETY: any bytes are valid as bytes.
        let bytes: [u8; 4096] = unsafe { std::mem::transmute(room) };
        let told = size.min(ENGINE);
        assert!(bytes[told..].iter().all(|byte| *byte == 0xEE), "more than {told} bytes");
        let first: Vec<u64> = room[..told / 8].to_vec();
        let expected = [whole.posted, whole.completed, whole.failed, whole.bytes_read];
        let known = first.len().min(4);
        assert_eq!(first[..known], expected[..known], "size {size}");
        if told == ENGINE {
            assert_eq!(room[ENGINE / 8 - 1], whole.rdma_failures);
            assert_eq!(room[ENGINE / 8 - 5], whole.lanes);
        }
    }
    for size in [0, 1, 8, PEER - 1, PEER, PEER + 8, 4096] {
        let mut room = [0xEEEE_EEEE_EEEE_EEEEu64; 512];
        ok(c!(corelane_conn_stats(pair.near.conn, room.as_mut_ptr().cast(), size)));
        if size >= 8 {
            assert_eq!(room[0], 1, "connected");
        }
        assert!(
            room[size.min(PEER).div_ceil(8)..].iter().all(|word| *word == 0xEEEE_EEEE_EEEE_EEEE)
        );
    }
}
