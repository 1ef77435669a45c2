//! Shared memory that another process may write to at any time.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Choices;
use crate::transport::local::{
    MAX_RING_PAYLOAD, Mapping, Message, Pushed, RemoteRange, Table, TableView, create_channel,
    open_channel,
};
use crate::wire::{Access, MemoryKind, RailKeys, RegionDescriptor, RegionKey};

/// Both ends of a channel, while somebody changes the words between them.
pub fn ring(bytes: &[u8]) {
    let Ok((mut producer, fd)) = create_channel() else { return };
    let Ok(mut consumer) = open_channel(&*fd) else { return };
    let Ok(other) = Mapping::received(fd.as_fd(), 1..=usize::MAX, true, false) else { return };
    let words = other.words();
    let mut choices = Choices::new(bytes);
    let mut forged = false;
    let (mut pushed, mut taken) = (0u64, 0u64);
    let mut copies = Vec::new();
    for _ in 0..256 {
        if choices.is_empty() {
            break;
        }
        match choices.u8() % 10 {
            0 => {
                let word = usize::from(choices.u16()) % words.len();
                words[word].store(choices.u64(), Ordering::SeqCst);
                forged = true;
            }
            // What says which message a slot holds, and the three words behind it.
            1 => {
                let slot = 512 + usize::from(choices.u16() % 512) * 16;
                words[slot].store(u64::from(choices.u16()), Ordering::SeqCst);
                let (kind, len) = (u64::from(choices.u8() % 4), u64::from(choices.u32()));
                words[slot + 1].store(kind | len << 32, Ordering::SeqCst);
                words[slot + 2].store(choices.u64(), Ordering::SeqCst);
                forged = true;
            }
            // How far the consumer says it is.
            2 => {
                words[16].store(u64::from(choices.u16()), Ordering::SeqCst);
                forged = true;
            }
            3 | 4 => {
                let payload =
                    vec![pushed as u8; usize::from(choices.u16()) % (MAX_RING_PAYLOAD + 1)];
                let message =
                    Message::Notify { seq: pushed, ack: pushed / 2, payload: &payload[..] };
                match producer.push(&message) {
                    Ok(Pushed::Seen | Pushed::Asleep) => pushed += 1,
                    Ok(Pushed::Full) => {}
                    Err(_) => assert!(forged, "an honest ring is broken"),
                }
            }
            5 => assert!(producer.has_room().is_ok() || forged),
            6 => assert!(producer.is_empty().is_ok() || forged),
            7 => {
                let uses = producer.uses();
                let region = choices.u32();
                let place = uses.begin(region);
                assert!(place.is_some() || forged);
                copies
                    .extend(consumer.uses().in_progress((choices.u8() & 1 == 0).then_some(region)));
                drop(place);
                consumer.uses().still(&mut copies);
                assert!(copies.is_empty() || forged);
                assert!(copies.len() <= 32 * 256);
            }
            _ => match consumer.pop() {
                Ok(Some(Message::Notify { seq, payload, .. })) => {
                    assert!(payload.len() <= MAX_RING_PAYLOAD);
                    if !forged {
                        assert_eq!(seq, taken);
                        assert!(payload.iter().all(|byte| *byte == taken as u8));
                        taken += 1;
                    }
                }
                Ok(Some(Message::Ack(_))) => assert!(forged),
                Ok(None) => {}
                Err(_) => {
                    assert!(forged, "an honest ring is broken");
                    return;
                }
            },
        }
    }
}

const SLOTS: usize = 16;

/// A region table whose words are the peer's: what is let through lies in what they say, and needs their digest.
pub fn table(bytes: &[u8]) {
    let Ok(own) = Table::create(SLOTS) else { return };
    // The owner has the only mapping that can be written: a hostile one forges before it seals.
    let mut choices = Choices::new(bytes);
    let key = RegionKey::new(u32::from(choices.u8()), u128::from(choices.u64()));
    let region = RegionDescriptor {
        incarnation: 1,
        key,
        base: choices.u64() >> (choices.u8() % 64),
        len: choices.u64() >> (choices.u8() % 64),
        kind: MemoryKind::Dram,
        access: Access::from_bits_truncate(choices.u8()),
        rail_keys: RailKeys::new(),
        device: None,
    };
    own.publish(&region);
    let fd = own.fd();
    let Ok(view) = TableView::open(&*fd) else { panic!("an honest table is refused") };
    check(&view, &region, &mut choices, key.slot() < SLOTS);
    let Some(forged) = forged_table(&mut choices) else { return };
    let Ok(view) = TableView::open(&forged) else { return };
    for _ in 0..8 {
        let range = range(&mut choices, key);
        // Any answer will do, as long as there is one.
        let _ = view.check(&range, Access::REMOTE_READ);
    }
}

fn range(choices: &mut Choices<'_>, key: RegionKey) -> RemoteRange {
    let (start, end) = (choices.u64(), choices.u64());
    let key = if choices.u8() < 200 { key } else { RegionKey(u128::from(choices.u64())) };
    RemoteRange { key, digest: key.digest(), start, end }
}

fn check(view: &TableView, region: &RegionDescriptor, choices: &mut Choices<'_>, published: bool) {
    for _ in 0..8 {
        let range = range(choices, region.key);
        for needs in [Access::REMOTE_READ, Access::REMOTE_WRITE] {
            let admitted = view.check(&range, needs).is_ok();
            let rightly = published
                && range.key == region.key
                && region.access.allows(needs)
                && range.start <= range.end
                && range.start >= region.base
                && range.end - region.base <= region.len;
            assert_eq!(admitted, rightly, "{range:?} of {region:?}");
        }
    }
}

/// A memfd of any bytes and any length, sealed as an honest one or not.
fn forged_table(choices: &mut Choices<'_>) -> Option<OwnedFd> {
    let (has_magic, is_sealed) = (choices.u8() & 3 != 0, choices.u8() & 3 != 0);
    let mut bytes = choices.bytes(4096).to_vec();
    if has_magic && let Some(start) = bytes.first_chunk_mut::<8>() {
        let honest = File::from(Table::create(1).ok()?.fd().try_clone().ok()?);
        honest.read_exact_at(start, 0).ok()?;
    }
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"corelane-forged", flags).ok()?);
    file.write_all_at(&bytes, 0).ok()?;
    if is_sealed {
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).ok()?;
    }
    Some(file.into())
}
