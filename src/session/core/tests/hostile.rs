//! A peer that breaks the rules is cut off, and nothing of it stays behind.

use super::memory::Rng;
use super::net::link_id;
use super::world::{CHUNK, World, ms};
use crate::plan::Operation::{Read, Write};
use crate::session::core::{Dest, Event, LinkId, MAX_OUTSTANDING, ProtocolError, TxPayload};
use crate::sync::SlotState;
use crate::wire::Access;
use crate::wire::frame::{FLAG_COUNTED, FLAG_VOID, FrameKind, HEADER_BYTES, Header, MAX_PAYLOAD};
use crate::wire::hello::LinkKind;
use crate::wire::rdma::RdmaFrame;

const LEN: usize = 12 * CHUNK;

/// Engine 0 is under test; engine 1 is the peer whose frames are forged. Its own core is frozen.
fn world(seed: u64) -> (World, LinkId) {
    let mut w = World::new(seed, true);
    for node in 0..2 {
        w.register(node, 4 * LEN, Access::READ_WRITE);
    }
    w.connect();
    w.run(ms(10));
    let link = link_id(w.open_wires(LinkKind::Session)[0], 0);
    (w, link)
}

/// As `world`, with a bulk link opened by engine 0 and one opened by engine 1.
fn world_with_bulk(seed: u64) -> (World, LinkId, LinkId, LinkId) {
    let (mut w, session) = world(seed);
    for node in 0..2 {
        let t = w.move_bytes(node, Read, (0, 0), (0, 0), LEN, None);
        w.run_to_end(t);
    }
    w.run(ms(10));
    let wires = w.open_wires(LinkKind::Bulk);
    let link = |node: usize| {
        let wire = *wires.iter().find(|wire| w.wires[**wire].ends[0].node == node).unwrap();
        link_id(wire, node)
    };
    let (ours, theirs) = (link(0), link(1));
    (w, session, ours, theirs)
}

/// The forged frame, as the receiver of the driver hands it over.
fn frame(w: &mut World, link: LinkId, header: Header, body: &[u8]) -> Result<Dest, ProtocolError> {
    let header = Header::decode(&header.encode())?;
    w.call(0, |core, env| core.on_frame(link, &header, body, env))
}

/// The forged frame and as many bytes of payload as it promises.
fn whole_frame(w: &mut World, link: LinkId, header: Header) -> Result<(), ProtocolError> {
    match frame(w, link, header, &[])? {
        Dest::None => Ok(()),
        dest => w.call(0, |core, env| core.on_payload(link, dest, None, env)),
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: Result<T, ProtocolError>) {
    if let Ok(accepted) = outcome {
        panic!("accepted: {accepted:?}");
    }
}

/// Closes all links as the driver does after an error, and looks for what stayed behind.
fn finish(mut w: World) {
    for wire in 0..w.wires.len() {
        for side in 0..2 {
            w.close_end(wire, side, "protocol error");
        }
    }
    w.run(ms(1000));
    assert_eq!(w.nodes[0].peer.in_flight(), 0);
    w.assert_quiet();
}

fn new(kind: FrameKind) -> Header {
    Header::new(kind)
}

/// The id of the next request that engine 0 sends on this link.
fn next_request(w: &mut World, link: LinkId) -> (u64, u64) {
    loop {
        let frame = w.quiet_call(0, |core, env| core.poll_transmit(link, false, env)).unwrap();
        let header = Header::decode(&frame.header).unwrap();
        w.call(0, |core, env| core.on_sent(frame.sent, env));
        if matches!(header.kind, FrameKind::Read | FrameKind::Write) {
            return (header.id, header.len);
        }
    }
}

#[test]
fn answers_to_nothing_are_refused() {
    for kind in [FrameKind::Data, FrameKind::Status] {
        for id in [0, 1, 7 << 32, u64::MAX, 1 << 32 | 1] {
            let (mut w, session, ours, _) = world_with_bulk(1);
            refused(frame(&mut w, session, Header { id, ..new(kind) }, &[]));
            refused(frame(&mut w, ours, Header { id, ..new(kind) }, &[]));
            finish(w);
        }
    }
}

#[test]
fn answers_that_do_not_fit_their_request_are_refused() {
    let bad: [fn(u64, u64) -> Header; 6] = [
        |id, len| Header { len: len - 1, id, ..new(FrameKind::Data) },
        |id, len| Header { id, len: len + 1, ..new(FrameKind::Data) },
        |id, _| Header { id, len: 0, ..new(FrameKind::Data) },
        |id, len| Header { id: id ^ 1 << 32, len, ..new(FrameKind::Data) },
        |id, _| Header { id, status: 0, ..new(FrameKind::Status) },
        |id, _| Header { id, status: 99, ..new(FrameKind::Status) },
    ];
    for header in bad {
        let (mut w, session) = world(2);
        w.move_bytes(0, Read, (0, 0), (0, 0), 64, None);
        let (id, len) = next_request(&mut w, session);
        refused(frame(&mut w, session, header(id, len), &[]));
        finish(w);
    }
    // DATA for a WRITE, and an answer on another link than the request went out on.
    let (mut w, session, ours, _) = world_with_bulk(3);
    w.move_bytes(0, Write, (0, 0), (0, 0), 64, None);
    let (id, len) = next_request(&mut w, session);
    refused(frame(&mut w, session, Header { len, id, ..new(FrameKind::Data) }, &[]));
    refused(frame(&mut w, ours, Header { id, ..new(FrameKind::Status) }, &[]));
    finish(w);
}

#[test]
fn an_answer_before_its_write_was_sent_is_refused() {
    let (mut w, session) = world(4);
    w.move_bytes(0, Write, (0, 0), (0, 0), 64, None);
    let sent = w.quiet_call(0, |core, env| core.poll_transmit(session, false, env)).unwrap();
    assert!(matches!(sent.payload, TxPayload::Plan(..)));
    let id = Header::decode(&sent.header).unwrap().id;
    refused(frame(&mut w, session, Header { id, ..new(FrameKind::Status) }, &[]));
    w.call(0, |core, env| core.on_sent(sent.sent, env));
    finish(w);
}

#[test]
fn a_second_answer_is_refused() {
    let (mut w, session) = world(5);
    let t = w.move_bytes(0, Write, (0, 0), (0, 0), 64, None);
    let (id, _) = next_request(&mut w, session);
    let answer = Header { id, ..new(FrameKind::Status) };
    assert!(frame(&mut w, session, answer, &[]).is_ok());
    assert!(w.is_done(t));
    refused(frame(&mut w, session, answer, &[]));
    finish(w);
}

#[test]
fn more_requests_than_allowed_are_refused() {
    let (mut w, session, _, theirs) = world_with_bulk(6);
    let descriptor = w.nodes[0].buffers[0].region.descriptor.clone();
    let (key, addr) = (descriptor.key.0, descriptor.base);
    for link in [session, theirs] {
        for kind in [FrameKind::Read, FrameKind::Write] {
            let request = Header { len: 8, key, addr, ..new(kind) };
            let mut accepted = 0;
            while whole_frame(&mut w, link, request).is_ok() {
                accepted += 1;
                assert!(accepted <= MAX_OUTSTANDING, "no bound");
            }
            assert_eq!(accepted == 0, kind == FrameKind::Write, "both count together");
        }
    }
    finish(w);
}

#[test]
fn frames_on_the_wrong_kind_of_link_are_refused() {
    use FrameKind::{Abandon, Ack, Data, Goodbye, Notify, Ping, Pong, Status};
    let (mut w, _, ours, theirs) = world_with_bulk(7);
    for kind in [Notify, Ack, Ping, Pong, Goodbye, Abandon] {
        refused(frame(&mut w, ours, new(kind), &[]));
        refused(frame(&mut w, theirs, new(kind), &[]));
    }
    for kind in [FrameKind::Read, FrameKind::Write] {
        refused(frame(&mut w, ours, new(kind), &[]));
    }
    for kind in [Data, Status] {
        refused(frame(&mut w, theirs, new(kind), &[]));
    }
    refused(frame(&mut w, link_id(1000, 0), new(Ping), &[]));
    finish(w);
}

#[test]
fn notifications_out_of_sequence_and_impossible_ones_are_refused() {
    let good = Header { len: 4, addr: 4, ..new(FrameKind::Notify) };
    let bad = [
        Header { aux: 1, ..good },
        Header { aux: u64::MAX, ..good },
        Header { id: 1, ..good },
        Header { id: u64::MAX - 2, ..good },
        Header { addr: 3, ..good },
        Header { addr: u64::MAX, ..good },
        Header { len: 0, ..good },
        Header { len: MAX_PAYLOAD, addr: MAX_PAYLOAD + 1, ..good },
        Header { len: MAX_PAYLOAD + 1, addr: MAX_PAYLOAD + 1, ..good },
        Header { flags: FLAG_VOID, ..good },
    ];
    for header in bad {
        let (mut w, session) = world(8);
        refused(frame(&mut w, session, header, &[]));
        assert!(whole_frame(&mut w, session, good).is_ok());
        refused(frame(&mut w, session, good, &[]));
        assert_eq!(w.take(0).len(), 1);
        finish(w);
    }
}

#[test]
fn a_notification_window_that_is_ignored_is_refused() {
    let (mut w, session) = world(9);
    w.nodes[0].queue = crate::notification::NotificationQueue::new(1, 1 << 20);
    let mut outcome = Ok(());
    for aux in 0..10_000 {
        outcome = whole_frame(
            &mut w,
            session,
            Header { aux, len: 2000, addr: 2000, ..new(FrameKind::Notify) },
        );
        if outcome.is_err() {
            assert!((500..600).contains(&aux), "{aux}");
            break;
        }
    }
    refused(outcome);
    w.take(0);
    finish(w);
}

#[test]
fn bound_notifications_that_never_get_their_data_are_bounded() {
    let (mut w, session) = world(10);
    let mut accepted: u64 = 0;
    loop {
        let header = Header {
            aux: accepted,
            len: 1 << 20,
            addr: 1 << 20,
            flags: FLAG_COUNTED,
            key: u128::from(accepted) | 5 << 64,
            ..new(FrameKind::Notify)
        };
        if whole_frame(&mut w, session, header).is_err() {
            break;
        }
        accepted += 1;
        assert!(accepted < 100, "held without bound");
    }
    assert!(accepted >= 16);
    finish(w);
}

#[test]
fn acknowledging_what_was_never_sent_is_refused() {
    let (mut w, session) = world(11);
    refused(frame(&mut w, session, Header { aux: 1, ..new(FrameKind::Ack) }, &[]));
    w.notify(0, b"queued but not sent");
    refused(frame(&mut w, session, Header { aux: 1, ..new(FrameKind::Ack) }, &[]));
    refused(frame(&mut w, session, Header { aux: u64::MAX, ..new(FrameKind::Ack) }, &[]));
    assert_eq!(w.nodes[0].peer.unacknowledged().0, 1);
    assert!(frame(&mut w, session, Header { aux: 0, ..new(FrameKind::Ack) }, &[]).is_ok());
    finish(w);
}

#[test]
fn unanswered_pings_are_bounded_and_failed_transfers_do_not_count_as_pings() {
    let (mut w, session) = world(12);
    for _ in 0..3 * MAX_OUTSTANDING {
        w.quiet_call(0, |core, _| {
            core.control.push_back(Header::new(FrameKind::Abandon));
        });
    }
    for _ in 0..2 * MAX_OUTSTANDING {
        assert!(frame(&mut w, session, new(FrameKind::Ping), &[]).is_ok());
    }
    refused(frame(&mut w, session, new(FrameKind::Ping), &[]));
    finish(w);
}

#[test]
fn answers_about_queue_pairs_that_nobody_reads_are_bounded() {
    let (mut w, session) = world(15);
    for _ in 0..100_000 {
        w.quiet_call(0, |core, _| core.tell(RdmaFrame::None.encode()));
    }
    assert!(w.nodes[0].core.control.len() < 1000, "{}", w.nodes[0].core.control.len());
    let closes = |event: &Event| matches!(event, Event::Close { link, .. } if *link == session);
    assert!(w.quiet_call(0, |core, _| core.poll_event()).is_some_and(|event| closes(&event)));
    finish(w);
}

#[test]
fn segment_tables_that_do_not_add_up_are_refused_and_hold_no_region() {
    let (mut w, session) = world(13);
    let descriptor = w.nodes[0].buffers[0].region.descriptor.clone();
    let table = |entries: &[(u64, u32, u32)]| {
        let mut body = descriptor.key.0.to_le_bytes().to_vec();
        for (addr, len, key) in entries {
            body.extend(addr.to_le_bytes());
            body.extend(len.to_le_bytes());
            body.extend(key.to_le_bytes());
        }
        body
    };
    let base = descriptor.base;
    let cases: [(u64, Vec<u8>); 4] = [
        (9, table(&[(base, 4, 0), (base, 4, 0)])),
        (7, table(&[(base, 4, 0), (base, 4, 0)])),
        // The second segment names a key that is not in the table, after the first was admitted.
        (8, table(&[(base, 4, 0), (base, 4, 1)])),
        (8, table(&[(base, u32::MAX, 0), (base, 4, u32::MAX)])),
    ];
    for (len, body) in cases {
        for kind in [FrameKind::Read, FrameKind::Write] {
            let header = Header { len, segments: 2, keys: 1, body: body.len() as u32, ..new(kind) };
            refused(frame(&mut w, session, header, &body));
        }
    }
    w.run(ms(20));
    w.assert_quiet();
    finish(w);
}

#[test]
fn after_goodbye_nothing_of_the_session_counts() {
    let (mut w, session) = world(14);
    let t = w.move_bytes(0, Read, (0, 0), (0, 0), 64, None);
    w.notify(0, b"lost");
    assert!(frame(&mut w, session, new(FrameKind::Goodbye), &[]).is_ok());
    assert!(w.error(t).is_disconnect());
    assert_eq!(w.nodes[0].peer.unacknowledged(), (0, 0));
    assert!(frame(&mut w, session, Header { aux: 1, ..new(FrameKind::Ack) }, &[]).is_ok());
    w.notify(0, b"for the next session");
    finish_after_goodbye(w);
}

fn finish_after_goodbye(mut w: World) {
    w.run(ms(500));
    assert_eq!(w.take(1), [b"for the next session"]);
    w.assert_quiet();
}

/// A frame that is nearly right for this link.
fn nearly(w: &mut World, rng: &mut Rng, wire: usize) -> (Header, Vec<u8>) {
    use FrameKind::{Abandon, Ack, Data, Goodbye, Notify, Ping, Pong, Status, Write};
    let descriptor = w.nodes[0].buffers[0].region.descriptor.clone();
    let small = |rng: &mut Rng| [0, 1, 2, 8, 64, 200, 1024, 4096][rng.below(8) as usize];
    let all =
        [Notify, Notify, Ack, Ping, Pong, Abandon, FrameKind::Read, Write, Data, Status, Goodbye];
    let bulk = w.wires[wire].kind == LinkKind::Bulk;
    let fitting: &[FrameKind] = match (bulk, w.wires[wire].ends[0].node) {
        (true, 0) => &[Data, Status],
        (true, _) => &[FrameKind::Read, Write],
        (false, _) => &all[..10],
    };
    let from = if rng.chance(2) { &all[..] } else { fitting };
    let mut header = new(from[rng.below(from.len() as u64) as usize]);
    header.flags = rng.below(4) as u8;
    header.status = [0, 0, 1, 2, 3, 4, 9][rng.below(7) as usize];
    header.len = small(rng);
    header.id = small(rng);
    header.aux = rng.below(6);
    header.addr = if rng.chance(80) { descriptor.base + small(rng) } else { small(rng) };
    header.key = if rng.chance(80) { descriptor.key.0 } else { u128::from(rng.next()) };
    match header.kind {
        Notify => {
            if rng.chance(95) {
                header.aux = w.nodes[0].core.inbox.expects();
            }
            header.flags &= FLAG_COUNTED;
            (header.id, header.addr) = (0, header.len + u64::from(rng.chance(5)));
            header.key = u128::from(rng.below(6)) | u128::from(rng.below(4)) << 64;
        }
        Ack if rng.chance(95) => header.aux = 0,
        Data | Status if rng.chance(97) => {
            let asked: Vec<usize> =
                (0..w.asked.len()).filter(|at| w.asked[*at].0 == wire).collect();
            if asked.is_empty() {
                header.kind = if bulk { header.kind } else { Ping };
            } else {
                let pick = asked[rng.below(asked.len() as u64) as usize];
                let (_, request) = w.asked.swap_remove(pick);
                (header.id, header.len) = (request.id, request.len);
                let read = request.kind == FrameKind::Read;
                header.kind = if read && rng.chance(70) { Data } else { Status };
                header.status = if read { 1 + rng.below(4) as u16 } else { rng.below(3) as u16 };
            }
        }
        _ => {}
    }
    let mut body = Vec::new();
    if matches!(header.kind, FrameKind::Read | FrameKind::Write) && rng.chance(40) {
        (header.segments, header.keys) = (1 + rng.below(4) as u32, 1);
        body.extend(descriptor.key.0.to_le_bytes());
        header.len = 0;
        for _ in 0..header.segments {
            let len = small(rng);
            header.len += len;
            body.extend((descriptor.base + small(rng)).to_le_bytes());
            body.extend((len as u32).to_le_bytes());
            body.extend((u32::from(rng.chance(2))).to_le_bytes());
        }
        header.len += u64::from(rng.chance(2));
        header.body = body.len() as u32;
    }
    (header, body)
}

#[test]
fn any_frames_in_any_order_give_an_error_or_nothing_but_never_a_panic() {
    for seed in 0..250 {
        let (mut w, _, _, _) = world_with_bulk(seed);
        let mut rng = Rng::new(seed + 7777);
        w.nodes[1].stopped = Some(w.now + ms(100_000));
        w.net.capacity = 1 << 20;
        w.asked.clear();
        for step in 0..120u8 {
            let open: Vec<(usize, usize)> = (0..w.wires.len())
                .flat_map(|wire| [(wire, 0), (wire, 1)])
                .filter(|(wire, side)| {
                    w.wires[*wire].ends[*side].open && w.wires[*wire].ends[*side].node == 0
                })
                .collect();
            let Some(&(wire, side)) = open.get(rng.below(open.len() as u64) as usize) else {
                break;
            };
            match rng.below(10) {
                0 => {
                    let operation = if rng.chance(50) { Read } else { Write };
                    let len = if rng.chance(50) { 64 } else { 3 * CHUNK };
                    let notification: Option<&[u8]> = rng.chance(50).then_some(b"n");
                    w.move_bytes(0, operation, (0, 0), (0, 0), len, notification);
                }
                1 => w.notify(0, b"text"),
                2 if !w.posted.is_empty() => {
                    let t = rng.below(w.posted.len() as u64) as usize;
                    w.cancel(t);
                }
                _ => {
                    let (header, body) = nearly(&mut w, &mut rng, wire);
                    let mut bytes = header.encode().to_vec();
                    if rng.chance(3) {
                        let at = rng.below(HEADER_BYTES as u64) as usize;
                        bytes[at] ^= 1 << rng.below(8);
                    }
                    bytes.extend(body);
                    if header.kind.has_payload() {
                        bytes.extend(vec![step; header.len as usize]);
                    }
                    if let Err(reason) = w.receive(wire, side, &bytes) {
                        w.close_end(wire, side, &reason);
                    }
                }
            }
            w.run(ms(rng.below(2)));
        }
        w.kill(1);
        w.run(ms(40_000));
        let leave = w.leave(0, ms(100));
        w.run(ms(500));
        assert!(leave.is_complete());
        assert!(w.posted.iter().all(|p| p.shared.slot.state() != SlotState::Posted));
        w.assert_quiet();
    }
}
