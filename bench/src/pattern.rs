//! The bytes that are moved, and how they are told from bytes that were not.
//!
//! Every block carries the sequence number of the pass that wrote it and its own index, in clear in its first two
//! words and mixed into all others. So a block that was not written (poison), that is from an earlier pass (stale) or
//! that belongs elsewhere (misplaced) is recognised, and so is a single wrong byte. Filling and checking are a handful
//! of adds per 8 bytes: verification of 64 MiB must not dominate a run.

use std::fmt;

/// What a destination is filled with before a verified operation.
pub(crate) const POISON: u8 = 0xDB;

const POISON_WORD: u64 = u64::from_le_bytes([POISON; 8]);
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// The pattern of one block: a pure function of the pass, the block and the position.
#[derive(Clone, Copy)]
struct Pattern {
    sequence: u64,
    index: u64,
    base: u64,
}

impl Pattern {
    fn new(sequence: u64, index: u64) -> Self {
        Self { sequence, index, base: mix(mix(sequence) ^ index.rotate_left(32)) }
    }

    #[inline]
    fn word(self, position: usize) -> u64 {
        match position {
            0 => self.sequence,
            1 => self.index,
            _ => self.base.wrapping_add((position as u64).wrapping_mul(STEP)),
        }
    }
}

/// The finaliser of splitmix64: every input bit changes every output bit with probability one half.
pub(crate) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(STEP);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Writes the pattern of block `index` of pass `sequence`.
pub(crate) fn fill(block: &mut [u8], sequence: u64, index: u64) {
    let pattern = Pattern::new(sequence, index);
    let (words, tail) = block.as_chunks_mut::<8>();
    let positions = words.len();
    for (position, word) in words.iter_mut().enumerate() {
        *word = pattern.word(position).to_le_bytes();
    }
    if !tail.is_empty() {
        let last = pattern.word(positions).to_le_bytes();
        tail.copy_from_slice(&last[..tail.len()]);
    }
}

/// Overwrites a destination so that bytes which nobody writes are recognised.
pub(crate) fn poison(block: &mut [u8]) {
    block.fill(POISON);
}

/// Checks a block against [`fill`] with the same arguments, byte for byte.
pub(crate) fn check(block: &[u8], sequence: u64, index: u64) -> Result<(), Mismatch> {
    let pattern = Pattern::new(sequence, index);
    let (words, tail) = block.as_chunks::<8>();
    // The common case is a match: one pass without branches in it, which the compiler vectorises.
    let difference = words.iter().enumerate().fold(0, |difference, (position, word)| {
        difference | (u64::from_le_bytes(*word) ^ pattern.word(position))
    });
    let last = pattern.word(words.len()).to_le_bytes();
    if difference == 0 && tail == &last[..tail.len()] {
        return Ok(());
    }
    Err(Mismatch::locate(block, pattern))
}

/// The first wrong byte of a block, and what the block seems to hold instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    offset: usize,
    expected: u8,
    found: u8,
    cause: Cause,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Cause {
    Unwritten,
    Stale { sequence: u64, wanted: u64 },
    Misplaced { index: u64, wanted: u64 },
    Corrupt,
}

impl Mismatch {
    fn locate(block: &[u8], pattern: Pattern) -> Self {
        let expected = |offset: usize| pattern.word(offset / 8).to_le_bytes()[offset % 8];
        let offset =
            (0..block.len()).find(|&offset| block[offset] != expected(offset)).unwrap_or_default();
        let word = |position: usize| {
            block.as_chunks::<8>().0.get(position).map(|word| u64::from_le_bytes(*word))
        };
        let at_offset = offset / 8;
        let cause = match (word(0), word(1)) {
            _ if word(at_offset) == Some(POISON_WORD) => Cause::Unwritten,
            (Some(sequence), _)
                if at_offset == 0 && Pattern::new(sequence, pattern.index).fits(block) =>
            {
                Cause::Stale { sequence, wanted: pattern.sequence }
            }
            (Some(sequence), Some(index))
                if at_offset < 2 && Pattern::new(sequence, index).fits(block) =>
            {
                Cause::Misplaced { index, wanted: pattern.index }
            }
            _ if block[offset..].iter().all(|&byte| byte == POISON) => Cause::Unwritten,
            _ => Cause::Corrupt,
        };
        Self { offset, expected: expected(offset), found: block[offset], cause }
    }
}

impl Pattern {
    /// Whether the third word, the first that mixes everything, agrees too: two numbers alone could be chance.
    fn fits(self, block: &[u8]) -> bool {
        block.as_chunks::<8>().0.get(2).is_none_or(|word| u64::from_le_bytes(*word) == self.word(2))
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { offset, expected, found, cause } = self;
        write!(f, "byte {offset} is {found:#04x} instead of {expected:#04x}: ")?;
        match cause {
            Cause::Unwritten => {
                write!(f, "still the poison from before, so nothing was written there")
            }
            Cause::Stale { sequence, wanted } => {
                write!(f, "stale, from pass {sequence:#x} instead of pass {wanted:#x}")
            }
            Cause::Misplaced { index, wanted } => {
                write!(
                    f,
                    "misplaced, these are the bytes of block {index} instead of block {wanted}"
                )
            }
            Cause::Corrupt => write!(f, "corrupt"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(len: usize, sequence: u64, index: u64) -> Vec<u8> {
        let mut block = vec![0; len];
        fill(&mut block, sequence, index);
        block
    }

    #[test]
    fn every_length_matches_itself() {
        for len in (0..200).chain([4096, 65_537]) {
            assert_eq!(check(&filled(len, 7, 3), 7, 3), Ok(()), "{len}");
        }
    }

    #[test]
    fn every_single_wrong_byte_is_found_where_it_is() {
        for len in [1, 7, 8, 13, 64, 77] {
            for offset in 0..len {
                let mut block = filled(len, 9, 1);
                block[offset] ^= 0x40;
                let mismatch = check(&block, 9, 1).expect_err("a flipped bit must be seen");
                assert_eq!(mismatch.offset, offset, "len {len}");
            }
        }
    }

    #[test]
    fn an_unwritten_destination_is_named_so() {
        let mut block = vec![0; 64];
        poison(&mut block);
        let text = check(&block, 5, 2).expect_err("poison").to_string();
        assert!(text.contains("nothing was written"), "{text}");
        let mut half = filled(64, 5, 2);
        poison(&mut half[32..]);
        let text = check(&half, 5, 2).expect_err("half poison").to_string();
        assert!(text.starts_with("byte 32") && text.contains("nothing was written"), "{text}");
    }

    #[test]
    fn stale_and_misplaced_blocks_are_told_apart() {
        let stale = check(&filled(64, 4, 2), 5, 2).expect_err("stale").to_string();
        assert!(stale.contains("stale, from pass 0x4"), "{stale}");
        let misplaced = check(&filled(64, 5, 8), 5, 2).expect_err("misplaced").to_string();
        assert!(misplaced.contains("block 8 instead of block 2"), "{misplaced}");
        let mut corrupt = filled(64, 5, 2);
        corrupt[40] ^= 1;
        assert!(check(&corrupt, 5, 2).expect_err("corrupt").to_string().ends_with("corrupt"));
    }

    #[test]
    fn neighbouring_passes_and_blocks_share_no_word() {
        let words = |sequence, index| -> Vec<u64> {
            filled(512, sequence, index)
                .as_chunks::<8>()
                .0
                .iter()
                .skip(2)
                .map(|w| u64::from_le_bytes(*w))
                .collect()
        };
        let here = words(1, 1);
        for (sequence, index) in [(1, 2), (2, 1), (2, 2), (0, 1)] {
            assert!(words(sequence, index).iter().all(|word| !here.contains(word)));
        }
    }
}
