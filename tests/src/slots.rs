//! Blocks that carry a number in every word, and the slots that they travel in: for tests of what a notification
//! promises about the data it follows.

use std::time::Instant;

use corelane::Engine;

use crate::{BOUND, Buffer, POISON};

/// Writes `number` into every word of a block (`len` is a multiple of 8).
pub fn fill_block(memory: &Buffer, offset: usize, len: usize, number: u64) {
    memory.write(offset, &number.to_le_bytes().repeat(len / 8));
}

/// Whether every word of a block is `number`; looks at the memory as it is now.
pub fn block_holds(memory: &Buffer, offset: usize, len: usize, number: u64) -> bool {
    let bytes = memory.snapshot(offset, len);
    bytes[..8] == number.to_le_bytes() && bytes[8..] == bytes[..len - 8]
}

/// Whether every byte is one of the block `old` (0: or poison, as before any), or of the block `new`, which may have arrived there in
/// part; if not, where it is neither.
pub fn check_either_block(
    memory: &Buffer,
    offset: usize,
    len: usize,
    old: u64,
    new: u64,
) -> Result<(), String> {
    let bytes = memory.snapshot(offset, len);
    let before = if old == 0 { [POISON; 8] } else { old.to_le_bytes() };
    let after = new.to_le_bytes();
    let is_neither =
        |(at, byte): &(usize, &u8)| **byte != before[at % 8] && **byte != after[at % 8];
    match bytes.iter().enumerate().find(is_neither) {
        None => Ok(()),
        Some((at, byte)) => {
            Err(format!("byte {at} is {byte:#04x}, neither of block {old} nor of block {new}"))
        }
    }
}

/// A notification's payload: which block, in which slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slots {
    /// Number of the block.
    pub number: u64,
    /// Slot that it lies in.
    pub slot: u64,
}

impl Slots {
    /// As bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..].copy_from_slice(&self.slot.to_le_bytes());
        bytes
    }

    /// From bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (number, slot) = bytes.split_first_chunk::<8>()?;
        let slot = u64::from_le_bytes(slot.try_into().ok()?);
        Some(Self { number: u64::from_le_bytes(*number), slot })
    }
}

/// Takes the notifications of blocks `0..count`, each exactly once, and looks at each block in `memory` at the moment
/// its notification is seen. `release` gets the slots that may be used again, as a bit mask.
pub fn watch(
    engine: &Engine,
    memory: &Buffer,
    block_bytes: usize,
    count: usize,
    mut release: impl FnMut(u64) -> Result<(), String>,
) -> Result<(), String> {
    let mut seen = vec![false; count];
    let mut left = count;
    let mut progress = Instant::now();
    while left > 0 {
        let (mut free, mut wrong) = (0, None);
        let taken = engine.take_notifications(|notification| {
            let checked = Slots::from_bytes(&notification.payload)
                .ok_or("a notification of other bytes".to_owned())
                .and_then(|block| {
                    free |= 1 << block.slot;
                    examine(memory, block_bytes, block, &mut seen)
                });
            if let Err(why) = checked {
                wrong.get_or_insert(why);
            }
        });
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        match taken.map_err(|error| error.to_string())? {
            0 if progress.elapsed() > BOUND => {
                return Err(format!("{left} notifications missing after {BOUND:?}"));
            }
            0 => std::thread::yield_now(),
            taken => {
                progress = Instant::now();
                left = left.checked_sub(taken).ok_or("more notifications than blocks")?;
                release(free)?;
            }
        }
    }
    Ok(())
}

fn examine(
    memory: &Buffer,
    block_bytes: usize,
    block: Slots,
    seen: &mut [bool],
) -> Result<(), String> {
    let Slots { number, slot } = block;
    // The block first: this is the moment.
    if !block_holds(memory, slot as usize * block_bytes, block_bytes, number) {
        let found = memory.word(slot as usize * block_bytes);
        return Err(format!(
            "notification {number} came before its data: slot {slot} begins with block {found:#x}"
        ));
    }
    match seen.get_mut(number as usize) {
        Some(seen) if !*seen => *seen = true,
        Some(_) => return Err(format!("notification {number} came twice")),
        None => return Err(format!("notification {number} was never sent")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_of_two_blocks_in_any_parts_and_of_no_third() {
        let memory = Buffer::new(64);
        check_either_block(&memory, 0, 64, 0, 5).unwrap();
        fill_block(&memory, 8, 16, 5);
        check_either_block(&memory, 0, 64, 0, 5).unwrap();
        check_either_block(&memory, 0, 64, 4, 5).unwrap_err();
        fill_block(&memory, 0, 64, 0x0101);
        memory.write(11, &0x0202_u64.to_le_bytes()[..1]);
        let third = check_either_block(&memory, 0, 64, 0x0101, 5).unwrap_err();
        assert!(third.contains("byte 11"), "{third}");
    }
}
