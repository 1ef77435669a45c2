//! Registered memory of the simulated engines, and the generator of all choices.

use std::sync::Arc;

use crate::memory::RegionInner;
use crate::sys::IoSegment;

/// `SplitMix64`: one seed, one run.
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`; 0 for 0.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// A buffer that is only touched through its address, as registered memory is.
pub(super) struct Buffer {
    base: *mut u8,
    len: usize,
    pub(super) region: Arc<RegionInner>,
}

impl Buffer {
    pub(super) fn new(len: usize, register: impl FnOnce(u64, u64) -> Arc<RegionInner>) -> Self {
        let base = Box::into_raw(vec![0u8; len].into_boxed_slice()).cast::<u8>();
        let region = register(base as u64, len as u64);
        Self { base, len, region }
    }

    pub(super) fn addr(&self) -> u64 {
        self.base as u64
    }

    fn offset_of(&self, segment: IoSegment) -> Option<usize> {
        let offset = usize::try_from(segment.addr().checked_sub(self.addr())?).ok()?;
        (offset <= self.len && segment.len() <= self.len - offset).then_some(offset)
    }

    pub(super) fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len);
        let mut bytes = vec![0; len];
        // SAFETY: the range lies inside the allocation, checked above, which lives as long as
        // `self`; nobody holds a reference into it.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(offset), bytes.as_mut_ptr(), len) };
        bytes
    }

    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: as for `read`; `bytes` is another allocation. One thread only.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), bytes.len());
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let whole = std::ptr::slice_from_raw_parts_mut(self.base, self.len);
        // SAFETY: `base` and `len` are those of the boxed slice that `new` leaked.
        drop(unsafe { Box::from_raw(whole) });
    }
}

fn find(buffers: &[Buffer], segment: IoSegment) -> (&Buffer, usize) {
    let mut found = buffers.iter().filter_map(|b| b.offset_of(segment).map(|at| (b, at)));
    found.next().unwrap_or_else(|| panic!("{segment:?} is no registered memory of this engine"))
}

/// Up to `max` bytes at `skip` of what the segments name.
pub(super) fn gather(
    buffers: &[Buffer],
    segments: &[IoSegment],
    mut skip: usize,
    max: usize,
) -> Vec<u8> {
    let mut out = Vec::new();
    for segment in segments {
        if skip >= segment.len() {
            skip -= segment.len();
            continue;
        }
        let len = (segment.len() - skip).min(max - out.len());
        let (buffer, at) = find(buffers, *segment);
        out.extend(buffer.read(at + skip, len));
        skip = 0;
    }
    out
}

/// Puts `bytes` at `skip` of what the segments name.
pub(super) fn scatter(
    buffers: &[Buffer],
    segments: &[IoSegment],
    mut skip: usize,
    mut bytes: &[u8],
) {
    for segment in segments {
        if skip >= segment.len() {
            skip -= segment.len();
            continue;
        }
        let len = (segment.len() - skip).min(bytes.len());
        let (now, rest) = bytes.split_at(len);
        let (buffer, at) = find(buffers, *segment);
        buffer.write(at + skip, now);
        (bytes, skip) = (rest, 0);
    }
    assert!(bytes.is_empty(), "a payload is longer than its destination");
}
