//! Every input of the corpus, and of the seeds that it began with, in every ordinary run of the tests.

use std::path::PathBuf;

use super::decoders::sealed;
use super::session::World;
use super::{TARGETS, stream};
use crate::wire::frame::{FLAG_COUNTED, FLAG_VOID, FrameKind, Header};
use crate::wire::hello::{Auth, Challenge, Message, Refusal, Welcome};
use crate::wire::rdma::{MESSAGE_BYTES, QueuePairFrame, RdmaFrame, RdmaMessage, Verdict};
use crate::wire::{Access, MAX_RAILS, MemoryKind, Metadata, RailKeys, RegionDescriptor, RegionKey};

fn corpus() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus"))
}

/// Something of everything that an engine writes, by target and name.
fn seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut all = Vec::new();
    let mut add = |target, name: &str, bytes: Vec<u8>| all.push((target, name.to_owned(), bytes));
    let unsealed = |bytes: Vec<u8>| bytes[..bytes.len() - 4].to_vec();
    let metadata = Metadata {
        name: "prefill-0".into(),
        incarnation: 7 << 100 | 5,
        secret: [9; 32],
        transports: 3,
        addresses: vec!["10.0.0.1:5000".parse().unwrap(), "[fe80::1]:5001".parse().unwrap()],
    };
    add("metadata", "two-addresses", unsealed(metadata.encode()));
    add("metadata", "sealed", metadata.encode());
    let long = Metadata { name: "n".repeat(1024), addresses: Vec::new(), ..metadata.clone() };
    add("metadata", "long-name", unsealed(long.encode()));
    let many = Metadata { addresses: vec![metadata.addresses[0]; 256], ..metadata };
    add("metadata", "most-addresses", unsealed(many.encode()));

    let region = RegionDescriptor {
        incarnation: 3,
        key: RegionKey::new(17, 0x00ab_cdef),
        base: 0x7000_0000,
        len: 4096,
        kind: MemoryKind::Vram { device: 2 },
        access: Access::READ_WRITE,
        rail_keys: [7, 0, 9].into_iter().collect(),
        device: Some(Box::new(crate::wire::DeviceMemory {
            uuid: [3; 16],
            host: 77,
            base: 0x7000_0000 - 512,
            len: 5000,
            handle: Some([9; 64]),
        })),
    };
    add("descriptor", "vram-three-rails", unsealed(region.to_bytes()));
    add("descriptor", "sealed", region.to_bytes());
    let (kind, rail_keys) = (MemoryKind::Dram, RailKeys::new());
    let dram =
        RegionDescriptor { kind, rail_keys, access: Access::LOCAL, device: None, ..region.clone() };
    add("descriptor", "dram-no-rail", unsealed(dram.to_bytes()));
    let rail_keys = vec![1; MAX_RAILS].into_iter().collect();
    let wide = RegionDescriptor { rail_keys, base: u64::MAX - 4096, ..dram };
    add("descriptor", "most-rails-at-the-end", unsealed(wide.to_bytes()));

    let hello = crate::wire::hello::tests::hello();
    let challenge =
        Challenge { version: 1, transports: 1, target: 5, nonce: [1; 32], proof: [2; 32] };
    let welcome = Welcome { resumed: true, session: 1, expects: 3, liveness_ms: 3000 };
    let messages = [
        ("hello", Message::Hello(hello)),
        ("challenge", Message::Challenge(challenge)),
        ("auth", Message::Auth(Auth { proof: [3; 32], own_proof: [4; 32] })),
        ("welcome", Message::Welcome(welcome)),
        ("refused", Message::Refused(Refusal::NameInUse)),
    ];
    for (name, message) in messages {
        add("hello", name, message.body());
    }

    // To whom, which letter (three recorded ones come first), how it is altered.
    add("handshake", "honest", vec![1, 0, 19, 0, 1, 19, 0, 0, 17, 0]);
    add("handshake", "initiator-not-known", vec![0, 0, 19, 0, 1, 19, 0, 0, 17, 0]);
    add("handshake", "replayed", vec![0, 0, 16, 0, 0, 22, 0]);
    add("handshake", "altered-hello", vec![1, 0, 19, 1, 9, 0, 1, 19, 0, 0, 17, 0]);
    add("handshake", "invented", [&[1, 0, 1, 1, 5, 2][..], &[0; 5]].concat());

    for (name, bytes) in frames() {
        add("frame", name, bytes);
    }
    for (name, bytes) in rdma() {
        add("rdma", name, bytes);
    }
    for (name, bytes) in conversations() {
        add("stream", name, bytes);
    }
    // The peer opens a session, writes and notifies; this engine opens one, reads and is answered.
    let accepted = [&[8, 0, 1, 0, 0][..], &[0xb8, 0x0b, 0, 0], &[1; 8], &[1, 1]].concat();
    let write = [0, 0, 9, 99, 2, 1, 5, 7, 64, 0, 0, 16, 0, 0, 0, 1, 9];
    let notify = [0, 0, 9, 99, 4, 0, 0, 0, 20, 0, 0, 0, 0, 1, 1, 9];
    let sent = [12, 0, 7, 1];
    add("session", "served", [&accepted[..], &write, &notify, &sent, &write, &sent].concat());
    let opened =
        [&[10, 0, 1, 0, 0, 0, 0, 1, 0, 9, 1, 1, 0, 0][..], &[0xb8, 0x0b, 0, 0, 1]].concat();
    let answer = [0, 0, 9, 99, 1, 0, 0, 0, 64, 0, 0, 0, 1, 9];
    add("session", "asking", [&opened[..], &sent, &answer, &[15, 0, 4], &sent].concat());
    add("ring", "messages", (0..36).flat_map(|i| [3, i * 7, i % 16, 9, 5, 6, 7]).collect());
    add("ring", "forged", [&[3, 9, 0, 1, 0, 0, 1, 0, 1, 255, 255, 0, 0][..], &[9; 40]].concat());
    add("ring", "lying-consumer", vec![3, 9, 0, 2, 200, 0, 6, 5, 3, 1, 1]);
    add("table", "honest", [&[3, 7][..], &[1; 60], &[255; 60], &[0; 200]].concat());
    all
}

fn frames() -> Vec<(&'static str, Vec<u8>)> {
    let new = Header::new;
    let plain = |header: Header| header.encode().to_vec();
    let table = |kind, flags| {
        let mut bytes = Header {
            len: 24,
            segments: 2,
            keys: 1,
            body: 48,
            flags,
            id: 1 << 32 | 7,
            aux: 9,
            ..new(kind)
        }
        .encode()
        .to_vec();
        bytes.extend(RegionKey::new(0, 77).0.to_le_bytes());
        for (addr, len) in [(1000u64, 8u32), (2000, 16)] {
            bytes.extend(addr.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend(0u32.to_le_bytes());
        }
        bytes
    };
    let one = Header { len: 64, key: 77 << 32, addr: 4096, id: 3, ..new(FrameKind::Read) };
    let mut notify = Header { len: 5, addr: 5, aux: 2, ..new(FrameKind::Notify) };
    notify.set_acknowledges(7);
    vec![
        ("read-one", plain(one)),
        ("read-table", table(FrameKind::Read, 0)),
        ("write-one", plain(Header { kind: FrameKind::Write, ..one })),
        ("write-table-counted", table(FrameKind::Write, FLAG_COUNTED)),
        ("data", plain(Header { len: 64, id: 3, ..new(FrameKind::Data) })),
        ("status", plain(Header { status: 2, id: 3, ..new(FrameKind::Status) })),
        ("notify", plain(notify)),
        ("notify-void", plain(Header { flags: FLAG_VOID, ..new(FrameKind::Notify) })),
        ("ack", plain(Header { aux: 4, ..new(FrameKind::Ack) })),
        ("ping", plain(Header { id: 8, ..new(FrameKind::Ping) })),
        ("attach", plain(Header { status: 1, id: 4096, key: 5, ..new(FrameKind::Attach) })),
        ("share", plain(Header { status: 3, id: 4096, key: 5, ..new(FrameKind::Share) })),
    ]
}

fn rdma() -> Vec<(&'static str, Vec<u8>)> {
    let pair = QueuePairFrame {
        verdict: Verdict::Offer,
        generation: 0xdead_beef,
        index: 2,
        count: 3,
        rail: 1,
        receives: 32,
        number: 0x00ab_cdef,
        psn: 0x0012_3456,
        mtu: 5,
        ethernet: true,
        gid: [9; 16],
        lid: 77,
        max_rd_atomic: 16,
        max_dest_rd_atomic: 128,
        max_msg_sz: 1 << 30,
    };
    let message = |message: RdmaMessage<'_>| {
        let mut buffer = [0; MESSAGE_BYTES];
        let len = message.encode(7, &mut buffer);
        buffer[..len].to_vec()
    };
    vec![
        ("offer", pair.encode().encode().to_vec()),
        ("up", RdmaFrame::Up { generation: 1, working: 5 }.encode().encode().to_vec()),
        ("down", RdmaFrame::Down { generation: 1, expects: 5 }.encode().encode().to_vec()),
        ("none", RdmaFrame::None.encode().encode().to_vec()),
        ("message-hello", message(RdmaMessage::Hello)),
        ("message-notify", message(RdmaMessage::Notify { seq: 1, ack: 2, payload: b"text" })),
        ("message-ack", message(RdmaMessage::Ack(3))),
        ("message-bound", message(RdmaMessage::Bound { payload: &[7; 488] })),
        ("message-credits", message(RdmaMessage::Credits)),
        ("message-ack-request", message(RdmaMessage::AckRequest)),
    ]
}

/// What peers send on a session link, behind two bytes: over which socket, and how long the pieces are.
fn conversations() -> Vec<(&'static str, Vec<u8>)> {
    let key = RegionKey::new(0, 77).0;
    let mut writes = vec![0, 255];
    for (kind, payload) in [(FrameKind::Write, &[7; 40][..]), (FrameKind::Read, &[])] {
        let addr = u64::from_le_bytes(stream::place(8));
        writes.extend(Header { len: 40, key, addr, ..Header::new(kind) }.encode());
        writes.extend(payload);
    }
    let mut notifications = vec![0, 30];
    for aux in 0..3 {
        notifications
            .extend(Header { aux, len: 9, addr: 9, ..Header::new(FrameKind::Notify) }.encode());
        notifications.extend(b"some text");
    }
    notifications.extend(Header::new(FrameKind::Goodbye).encode());
    let mut control = vec![1, 63];
    let kinds = [FrameKind::Ping, FrameKind::Attach, FrameKind::Pong, FrameKind::Unshare];
    for kind in kinds.into_iter().chain([FrameKind::QueuePair, FrameKind::Rdma]) {
        control.extend(Header::new(kind).encode());
    }
    vec![("writes", writes), ("notifications", notifications), ("control", control)]
}

/// Writes the seeds with `CORELANE_UPDATE_CORPUS=1`, after a change of a format.
#[test]
fn the_corpus_holds_what_engines_write() {
    let update = std::env::var_os("CORELANE_UPDATE_CORPUS").is_some();
    for (target, name, bytes) in seeds() {
        let file = corpus().join(target).join(format!("seed-{name}"));
        if update {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, &bytes).unwrap();
        }
        let there = std::fs::read(&file).unwrap_or_default();
        let hint = "run this test with CORELANE_UPDATE_CORPUS=1";
        assert!(there == bytes, "{} is of another format: {hint}", file.display());
    }
}

#[test]
fn every_input_of_the_corpus_is_answered() {
    for (name, target) in TARGETS {
        let inputs: Vec<_> = std::fs::read_dir(corpus().join(name)).unwrap().collect();
        assert!(!inputs.is_empty(), "no inputs for {name}");
        for input in inputs {
            let path = input.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            let outcome = std::panic::catch_unwind(|| target(&bytes));
            assert!(outcome.is_ok(), "{}", path.display());
        }
    }
}

#[test]
fn the_seeds_of_decoders_are_accepted() {
    for (target, name, bytes) in seeds() {
        let accepted = match target {
            "metadata" => {
                [bytes.clone(), sealed(&bytes)].iter().any(|b| Metadata::decode(b).is_ok())
            }
            "descriptor" => [bytes.clone(), sealed(&bytes)]
                .iter()
                .any(|b| RegionDescriptor::from_bytes(b).is_ok()),
            "hello" => Message::decode(&bytes).is_some(),
            "frame" => Header::decode(bytes.first_chunk().unwrap()).is_ok(),
            _ => true,
        };
        assert!(accepted, "{target}/{name}");
    }
}

#[test]
fn a_frame_of_a_conversation_reaches_registered_memory() {
    let (_, bytes) = conversations().swap_remove(0);
    let served = |bytes: &[u8]| {
        let mut world = World::new();
        stream::run(bytes, &mut world);
        world.counters.requests_served.get()
    };
    assert_eq!(served(&bytes), 2);
    let mut other_key = bytes;
    other_key[2 + 50] ^= 1;
    assert_eq!(served(&other_key), 1);
}
