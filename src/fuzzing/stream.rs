//! A link's bytes, through a real socket and the receiver, in pieces of any size.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::Choices;
use super::session::World;
use crate::session::{Env, LinkId};
use crate::transport::link::{Flow, Scratch};
use crate::transport::receive::Receiver;

const LINK: LinkId = 1;
/// Stands in an input for an address, which differs from run to run: six bytes and the offset in the first region.
const PLACE: [u8; 6] = *b"REGION";

/// The eight bytes of an input that stand for this offset in the engine's first region.
#[cfg(test)]
pub(super) fn place(offset: u16) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..6].copy_from_slice(&PLACE);
    bytes[6..].copy_from_slice(&offset.to_le_bytes());
    bytes
}

fn with_addresses(bytes: &[u8], base: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut at = 0;
    while let Some(token) = bytes.get_mut(at..at + 8) {
        if token[..6] == PLACE {
            let offset = u16::from_le_bytes([token[6], token[7]]);
            token.copy_from_slice(&base.wrapping_add(u64::from(offset)).to_le_bytes());
            at += 7;
        }
        at += 1;
    }
    bytes
}

/// A session link that says anything.
pub fn stream(bytes: &[u8]) {
    let mut world = World::new();
    run(bytes, &mut world);
    world.assert_unused();
}

pub(super) fn run(bytes: &[u8], world: &mut World) {
    let mut choices = Choices::new(bytes);
    let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
    if ours.set_nonblocking(true).is_err() || theirs.set_nonblocking(true).is_err() {
        return;
    }
    let (unix, pieces) = (choices.u8() & 1 == 1, usize::from(choices.u8()) + 1);
    let fd = OwnedFd::from(ours);
    let said = with_addresses(choices.rest, world.base());
    let now = std::time::Instant::now();
    let World { core, regions, queue, counters, .. } = world;
    let mut env = Env { now, clock: None, regions, notifications: queue, counters };
    core.session_up(LINK, 3000, false, false, &mut env);
    let (mut receiver, mut scratch) = (Receiver::new(unix), Scratch::new(0));
    'all: for piece in said.chunks(pieces) {
        let Ok(()) = theirs.write_all(piece) else { break };
        for _ in 0..1000 {
            match receiver.receive(&fd, LINK, true, core, &mut env, &mut scratch) {
                Ok(Flow::Progress) => {}
                Ok(Flow::Idle | Flow::Blocked) => break,
                Err(_) => break 'all,
            }
            assert!(receiver.take_local().is_empty() || unix, "shared memory over a network");
            let _ = receiver.take_rdma();
        }
        // A reader that keeps up.
        while let Some(frame) = core.poll_transmit(LINK, false, &mut env) {
            core.on_sent(frame.sent, &mut env);
        }
        while env.notifications.pop().is_some() {}
    }
    receiver.abandon(&mut env);
    core.link_down(LINK, "gone", &mut env);
}
