use super::copies::explain;
use super::*;
use crate::answering::Ledger;
use crate::arena::Arena;
use crate::case::{MAX_NOTIFICATION, Operation};
use crate::layout::{Layout, Slot};
use crate::measure::Initiator as _;
use crate::measure::Stamp;
use crate::polling::complete_now;
use nix::errno::Errno;

const KINDS: [RawKind; 2] = [RawKind::RawCma, RawKind::RawMemcpy];
const LEN: usize = 1 << 20;

fn memory(kind: RawKind, len: usize) -> (Arena, Option<File>) {
    match kind {
        RawKind::RawCma => (Arena::new(len).expect("map"), None),
        RawKind::RawMemcpy => {
            let (arena, file) = Arena::shared(len).expect("map");
            (arena, Some(file))
        }
        RawKind::RawGpu => (Arena::of_gpu(0, len).expect("a GPU"), None),
    }
}

struct Pair {
    initiator: RawLocalInitiator,
    here: Arena,
    there: Arena,
    ledger: Ledger,
    _target: RawLocalTarget,
}

/// Both sides in this one process, which is a process like any other to the kernel.
fn pair(kind: RawKind, operation: Operation, block_bytes: usize) -> Pair {
    let here = Arena::new(LEN).expect("map");
    let (there, file) = memory(kind, LEN);
    let ledger = Ledger::new();
    let (mut target, mailbox) = RawLocalTarget::start(&there, file, false).expect("offers");
    target.answer(mailbox, there.clone(), None, ledger.clone()).expect("a thread");
    let step = 2 * block_bytes as u64;
    // Two blocks in each slot, in different orders on the two sides.
    let slot = |at: u64| Slot {
        local: vec![4096 + at * step, 4096 + (at + 4) * step],
        remote: vec![8192 + (at + 4) * step, 8192 + at * step],
    };
    let layout =
        Layout { slots: (0..4).map(slot).collect(), block_bytes, arena_bytes: LEN, bulk: None };
    let address = target.address().clone();
    let initiator =
        RawLocalInitiator::reach(kind, address, &here, operation, &layout, false).expect("reaches");
    Pair { initiator, here, there, ledger, _target: target }
}

#[test]
fn reads_and_writes_move_the_blocks_of_their_slot() {
    for kind in KINDS {
        for block_bytes in [64, 100, 4096, 60_000] {
            let step = 2 * block_bytes as u64;
            let local = [4096 + step, 4096 + 5 * step];
            let remote = [8192 + 5 * step, 8192 + step];

            let mut read = pair(kind, Operation::Read, block_bytes);
            for (index, offset) in remote.into_iter().enumerate() {
                read.there.fill(offset, block_bytes, 5, index as u64);
            }
            read.initiator.post(1).expect("posts");
            assert_eq!(complete_now(read.initiator.finished()).expect("finished"), 1);
            for (index, offset) in local.into_iter().enumerate() {
                assert_eq!(read.here.check(offset, block_bytes, 5, index as u64), Ok(()), "{kind}");
            }

            let mut write = pair(kind, Operation::Write, block_bytes);
            for (index, offset) in local.into_iter().enumerate() {
                write.here.fill(offset, block_bytes, 6, index as u64);
            }
            write.initiator.post(1).expect("posts");
            assert_eq!(write.initiator.poll_finished().expect("finished"), Some(1));
            for (index, offset) in remote.into_iter().enumerate() {
                assert_eq!(
                    write.there.check(offset, block_bytes, 6, index as u64),
                    Ok(()),
                    "{kind}"
                );
            }
            assert_eq!(write.initiator.poll_finished().expect("idle"), None);
        }
    }
}

#[test]
fn notifications_of_every_length_are_answered_and_booked() {
    for kind in KINDS {
        let mut pair = pair(kind, Operation::WriteNotify, 4096);
        for (sequence, len) in [Stamp::LEN, 56, 57, MAX_NOTIFICATION].into_iter().enumerate() {
            let sequence = sequence as u64;
            pair.here.fill(4096, 4096, 9 + sequence, 0);
            let last_word = pair.here.load_word(4096 + 4088).expect("aligned");
            let last_word_at = 8192 + 4 * 8192 + 4088;
            let stamp = Stamp { sequence, sent_ns: now_ns(), last_word_at, last_word };
            let mut payload = vec![0xAB; len];
            stamp.encode(&mut payload);
            pair.initiator.post_with_notification(0, &payload).expect("posts");
            assert_eq!(complete_now(pair.initiator.answer()).expect("answered"), sequence);
            assert_eq!(complete_now(pair.initiator.finished()).expect("finished"), 0);
            assert_eq!(pair.ledger.settle(sequence + 1).expect("booked and intact").len(), 1);
        }
        assert!(pair.initiator.notify(&[0; MAX_NOTIFICATION + 1]).is_err());
    }
}

#[test]
fn a_message_arrives_once_and_whole() {
    let (mut target, file) = Mailbox::create(false).expect("creates");
    let mut initiator = Mailbox::open(&file, true).expect("opens");
    assert_eq!(target.try_receive(), None);
    for text in [&b""[..], b"one", b"one"] {
        initiator.send(text).expect("sends");
        assert_eq!(target.try_receive(), Some(text));
        assert_eq!(target.try_receive(), None);
        target.send(b"answer").expect("sends");
        assert_eq!(initiator.receive(1).expect("answered"), b"answer");
        initiator.send(b"back").expect("sends");
        target.send_back(|_, _| {}).expect("sends");
        target.send_back(|_, _| {}).expect("nothing has arrived");
        assert_eq!(initiator.try_receive(), Some(&b"back"[..]));
    }
}

#[test]
fn long_lists_take_a_call_for_every_1024_segments() {
    let here = Arena::new(LEN).expect("map");
    let there = Arena::new(LEN).expect("map");
    let (offer, _mailbox) = Offer::new(&there, None, false).expect("offers");
    let address = offer.address().clone();
    let (reached, _mailbox) = Reached::new(RawKind::RawCma, address, None, false).expect("reaches");
    for (blocks, calls) in [(1, 1), (1024, 1), (1025, 2), (4096, 4)] {
        let local: Vec<u64> = (0..blocks).map(|block| block * 128).collect();
        let remote: Vec<u64> = local.iter().rev().copied().collect();
        local.iter().enumerate().for_each(|(n, &at)| here.fill(at, 100, 7, n as u64));
        let copies = reached.copies(Direction::Write, &here, (&local, &remote), 100);
        let copies = copies.expect("inside");
        assert_eq!(copies.calls(), calls);
        copies.run().expect("copies");
        for (index, &at) in remote.iter().enumerate() {
            assert_eq!(there.check(at, 100, 7, index as u64), Ok(()));
        }
    }
    let outside = [LEN as u64 - 99];
    assert!(reached.copies(Direction::Read, &here, (&[0], &outside), 100).is_err());
    assert!(reached.copies(Direction::Read, &here, (&outside, &[0]), 100).is_err());
}

#[test]
fn another_process_than_the_target_is_noticed() {
    for kind in KINDS {
        let (arena, file) = memory(kind, 4096);
        let (offer, _mailbox) = Offer::new(&arena, file, false).expect("offers");
        let wrong = RawAddress { token: offer.address().token ^ 1, ..offer.address().clone() };
        let error =
            Reached::new(kind, wrong, None, false).err().expect("not the target").to_string();
        assert!(error.contains("PID namespace"), "{error}");
        // No process has a number beyond the kernel's largest.
        let gone = RawAddress { pid: i32::MAX, ..offer.address().clone() };
        let error = Reached::new(kind, gone, None, false).err().expect("nobody").to_string();
        assert!(error.contains("cannot open the shared memory"), "{error}");
    }
}

#[test]
fn refusals_say_what_to_do_in_one_line() {
    for (errno, expected) in [
        (Errno::EPERM, "ptrace_scope"),
        (Errno::ENOSYS, "CONFIG_CROSS_MEMORY_ATTACH"),
        (Errno::ESRCH, "PID namespace"),
        (Errno::EFAULT, "EFAULT"),
    ] {
        let line = explain(errno, 77).to_string();
        assert!(line.contains(expected) && !line.contains('\n'), "{line}");
    }
}

#[test]
fn a_memory_that_is_gone_is_an_error() {
    let here = Arena::new(4096).expect("map");
    let there = Arena::new(4096).expect("map");
    let (offer, _mailbox) = Offer::new(&there, None, false).expect("offers");
    let address = offer.address().clone();
    let (reached, _mailbox) = Reached::new(RawKind::RawCma, address, None, false).expect("reaches");
    let elsewhere = RawAddress { start: 4096, ..reached.address.clone() };
    let reached = Reached { address: elsewhere, ..reached };
    let copies = reached.copies(Direction::Read, &here, (&[0], &[0]), 64).expect("inside");
    let error = copies.run().expect_err("nothing is mapped there").to_string();
    assert!(error.contains("EFAULT"), "{error}");
}
