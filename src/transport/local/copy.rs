//! Copies inside this process's address space: between registered regions, and mapped ones.

use crate::sys::IoSegment;

/// Plans of so many bytes are copied past the caches: they would push everything else out, and nobody
/// reads so much soon. Measured: from 16 MiB on it is faster, too.
pub(crate) const STREAMING_BYTES: u64 = 16 << 20;
/// Shorter ranges are not worth the fence.
const STREAMING_RANGE: usize = 4096;

/// Copies the ranges of `from`, as one stream of bytes, to the ranges of `to`.
///
/// # Safety
/// All ranges are mapped; those of `to` may be overwritten now.
pub(crate) unsafe fn copy_lists(to: &[IoSegment], from: &[IoSegment], streaming: bool) {
    let (mut to, mut from) = (to.iter().copied(), from.iter().copied());
    let (mut t, mut f) = (to.next(), from.next());
    while let (Some(target), Some(source)) = (t, f) {
        let len = target.len().min(source.len());
        // SAFETY: the caller's promise; `len` is within both ranges.
        unsafe { copy(target.addr(), source.addr(), len, streaming) };
        t = if len == target.len() { to.next() } else { Some(target.advanced(len)) };
        f = if len == source.len() { from.next() } else { Some(source.advanced(len)) };
    }
    if streaming {
        finish_streaming();
    }
}

/// # Safety
/// Both ranges are mapped; the target may be overwritten now.
unsafe fn copy(to: u64, from: u64, len: usize, streaming: bool) {
    let (target, source) = (to as usize as *mut u8, from as usize as *const u8);
    if streaming && len >= STREAMING_RANGE && to.abs_diff(from) >= len as u64 {
        // SAFETY: the caller's promise, and the ranges do not overlap.
        unsafe { stream(target, source, len) };
    } else {
        // SAFETY: the caller's promise. Ranges may overlap: an agent may copy within a region of its own.
        unsafe { std::ptr::copy(source, target, len) };
    }
}

/// # Safety
/// Both ranges are mapped and do not overlap; the target may be overwritten now.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(mut to: *mut u8, mut from: *const u8, mut len: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    let head = (to as usize).wrapping_neg() & 15;
    let head = head.min(len);
    // SAFETY: all that is touched is within the two ranges; the target of a streaming store is aligned
    // by the head. SSE2 is part of x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, head);
        (to, from, len) = (to.add(head), from.add(head), len - head);
        while len >= 64 {
            #[expect(clippy::cast_ptr_alignment, reason = "unaligned loads")]
            let source = from.cast::<__m128i>();
            let a = _mm_loadu_si128(source);
            let b = _mm_loadu_si128(source.add(1));
            let c = _mm_loadu_si128(source.add(2));
            let d = _mm_loadu_si128(source.add(3));
            #[expect(clippy::cast_ptr_alignment, reason = "aligned by the head")]
            let target = to.cast::<__m128i>();
            _mm_stream_si128(target, a);
            _mm_stream_si128(target.add(1), b);
            _mm_stream_si128(target.add(2), c);
            _mm_stream_si128(target.add(3), d);
            (to, from, len) = (to.add(64), from.add(64), len - 64);
        }
        std::ptr::copy_nonoverlapping(from, to, len);
    }
}

/// # Safety
/// As above. The C library's copy streams by itself where that pays.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
}

/// Streaming stores are not ordered with what follows until this.
fn finish_streaming() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64; no memory is touched.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segments(memory: &mut [u8], ranges: &[(usize, usize)]) -> Vec<IoSegment> {
        let base = memory.as_mut_ptr() as u64;
        ranges.iter().map(|&(at, len)| IoSegment::new(base + at as u64, len as u64)).collect()
    }

    proptest! {
        #[test]
        fn lists_of_any_shape_are_one_stream(
            cuts in proptest::collection::vec((0usize..5000, 0usize..5000), 1..12),
            shift in 0usize..64, streaming: bool,
        ) {
            let total: usize = cuts.iter().map(|cut| cut.0).sum();
            let mut source: Vec<u8> = (0..total + 64).map(|i| (i * 7 + i / 256) as u8).collect();
            let mut target = vec![0u8; total + 128];
            let mut at = 0;
            let from: Vec<(usize, usize)> =
                cuts.iter().map(|cut| { at += cut.0; (at - cut.0, cut.0) }).collect();
            let mut at = shift;
            let mut left = total;
            let mut to: Vec<(usize, usize)> = Vec::new();
            for cut in &cuts {
                let len = cut.1.min(left);
                to.push((at, len));
                (at, left) = (at + len, left - len);
            }
            to.push((at, left));
            let (from, to) = (segments(&mut source, &from), segments(&mut target, &to));
            // SAFETY: both vectors are live, and their ranges inside them.
            unsafe { copy_lists(&to, &from, streaming) };
            prop_assert_eq!(&target[shift..shift + total], &source[..total]);
            prop_assert!(target[..shift].iter().chain(&target[shift + total..]).all(|b| *b == 0));
        }
    }

    #[test]
    fn large_ranges_stream_whatever_their_alignment() {
        let mut source: Vec<u8> = (0..1u32 << 20).map(|i| (i * 13 + i / 251) as u8).collect();
        for (from, to, len) in [(0, 0, 1 << 19), (1, 7, 100_001), (15, 64, 4096), (3, 3, 4097)] {
            let mut target = vec![0u8; 1 << 20];
            let (f, t) =
                (segments(&mut source, &[(from, len)]), segments(&mut target, &[(to, len)]));
            // SAFETY: both vectors are live, and the ranges inside them.
            unsafe { copy_lists(&t, &f, true) };
            assert_eq!(target[to..to + len], source[from..from + len]);
            assert!(target[..to].iter().chain(&target[to + len..]).all(|b| *b == 0));
        }
    }

    #[test]
    fn overlapping_ranges_stay_inside() {
        let mut memory: Vec<u8> = (0..20_000u32).map(|i| i as u8).collect();
        let expected: Vec<u8> = memory[..10_000].to_vec();
        let all = segments(&mut memory, &[(0, 10_000), (100, 10_000)]);
        // SAFETY: the vector is live, and the ranges inside it.
        unsafe { copy_lists(&all[1..], &all[..1], true) };
        assert_eq!(memory[100..10_100], expected);
    }
}
