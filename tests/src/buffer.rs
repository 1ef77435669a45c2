//! Memory that engines and tests look at together, and what is in it.

use std::sync::OnceLock;

use corelane::{Access, Engine, Error, LocalSegment, Region};

use crate::Random;

/// What memory holds that nobody has written.
pub const POISON: u8 = 0xEE;

/// Prime, so that bytes which land at a wrong page, block or chunk are the wrong bytes.
const PERIOD: usize = 65_521;

fn table() -> &'static [u8] {
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut random = Random::new(0x7ab1e);
        (0..PERIOD).map(|_| random.next() as u8).collect()
    })
}

/// Calls `each(position, bytes)` for the pieces of pattern `seed` that make up `len` bytes from byte `at` on.
fn pieces(seed: u64, at: u64, len: usize, mut each: impl FnMut(usize, &[u8]) -> bool) {
    let shift = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
    let (mut position, mut done) = (((shift + at) % PERIOD as u64) as usize, 0);
    while done < len {
        let take = (PERIOD - position).min(len - done);
        if !each(done, &table()[position..position + take]) {
            return;
        }
        done += take;
        position = 0;
    }
}

/// `len` bytes of pattern `seed` from its byte `at` on.
pub fn pattern(seed: u64, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    pieces(seed, at, len, |_, piece| {
        bytes.extend_from_slice(piece);
        true
    });
    bytes
}

/// Memory with pages of its own, poisoned at first, unmapped when it is dropped. It is only looked at through raw
/// pointers, since engines and other processes write to it.
#[derive(Debug)]
pub struct Buffer {
    base: *mut u8,
    len: usize,
    /// Whose memory it is, if it is no mapping of its own.
    engine: Option<corelane::Buffer>,
}

// SAFETY: a buffer is a range of memory without thread affinity; all access is through raw pointers.
unsafe impl Send for Buffer {}
// SAFETY: as above; races between the test and an engine are what the tests look for, byte by byte.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` bytes of poison.
    pub fn new(len: usize) -> Self {
        Self::mapped(0, len).expect("mapping memory")
    }

    /// `len` bytes of poison at an address that must be free; 0: anywhere.
    ///
    /// # Errors
    /// Something else is there.
    pub fn mapped(address: u64, len: usize) -> std::io::Result<Self> {
        let fixed = if address == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
        // SAFETY: a fresh anonymous mapping, which replaces none.
        let base = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                len.max(1),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        if len >= 4 << 20 {
            // Fewer page faults; where there are no huge pages, nothing is lost.
            // SAFETY: advice on our own mapping.
            unsafe { libc::madvise(base, len, libc::MADV_HUGEPAGE) };
        }
        let buffer = Self { base: base.cast(), len, engine: None };
        buffer.poison(0, len);
        Ok(buffer)
    }

    /// Memory of an engine, registered by it, full of poison.
    pub fn of_engine(engine: &Engine, len: usize, access: Access) -> (Self, Region) {
        let memory = engine.alloc(len, access).expect("memory of the engine");
        let region = memory.region().clone();
        let buffer = Self { base: memory.as_mut_ptr(), len, engine: Some(memory) };
        buffer.poison(0, len);
        (buffer, region)
    }

    /// Gives memory of an engine back to it.
    ///
    /// # Errors
    /// Those of [`Engine::free`], with the memory as it was.
    pub fn free(mut self, engine: &Engine) -> Result<(), (Error, Self)> {
        let memory = self.engine.take().expect("memory of an engine");
        let (base, len) = (self.base, self.len);
        // Nothing of its own that a drop could give back.
        std::mem::forget(self);
        engine
            .free(memory)
            .map_err(|(error, memory)| (error, Self { base, len, engine: Some(memory) }))
    }

    /// `len` bytes of pattern `seed`.
    pub fn with_pattern(seed: u64, len: usize) -> Self {
        let buffer = Self::new(len);
        buffer.fill(seed, 0, len, 0);
        buffer
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of a byte.
    pub fn address(&self, offset: usize) -> u64 {
        self.at(offset, 0) as u64
    }

    /// A range of it for a list of descriptors.
    pub fn segment(&self, offset: usize, len: usize) -> LocalSegment {
        LocalSegment { addr: self.address(offset), len: len as u64 }
    }

    /// Registers all of it.
    pub fn register(&self, engine: &Engine, access: Access) -> Region {
        // SAFETY: tests keep buffers until their engines are done with them; no references into them exist.
        unsafe { engine.register(self.base, self.len, access) }.expect("registering memory")
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset, "{offset}+{len} of {}", self.len);
        // SAFETY: inside the mapping, as checked above.
        unsafe { self.base.add(offset) }
    }

    /// Writes bytes.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` has checked the range; `bytes` is no part of the mapping, which has no references.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Writes `len` bytes of pattern `seed`, from its byte `at` on.
    pub fn fill(&self, seed: u64, offset: usize, len: usize, at: u64) {
        pieces(seed, at, len, |done, piece| {
            self.write(offset + done, piece);
            true
        });
    }

    /// Overwrites a range with poison.
    pub fn poison(&self, offset: usize, len: usize) {
        let to = self.at(offset, len);
        // SAFETY: `at` has checked the range.
        unsafe { std::ptr::write_bytes(to, POISON, len) };
    }

    /// A copy of a range.
    pub fn snapshot(&self, offset: usize, len: usize) -> Vec<u8> {
        let from = self.at(offset, len);
        let mut copy = vec![0; len];
        // SAFETY: `at` has checked the range; the copy is fresh.
        unsafe { std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), len) };
        copy
    }

    /// The word at `offset`.
    pub fn word(&self, offset: usize) -> u64 {
        // SAFETY: `at` has checked the range; any alignment is fine.
        unsafe { self.at(offset, 8).cast::<u64>().read_unaligned() }
    }

    fn equals(&self, offset: usize, expected: &[u8]) -> bool {
        let here = self.at(offset, expected.len());
        // SAFETY: both ranges are mapped and as long as said.
        unsafe { libc::memcmp(here.cast(), expected.as_ptr().cast(), expected.len()) == 0 }
    }

    /// Whether `len` bytes at `offset` are pattern `seed` from its byte `at` on; if not, what is wrong where.
    pub fn check(&self, seed: u64, offset: usize, len: usize, at: u64) -> Result<(), String> {
        let mut wrong = None;
        pieces(seed, at, len, |done, piece| {
            if !self.equals(offset + done, piece) {
                wrong = Some(self.difference(offset + done, piece));
            }
            wrong.is_none()
        });
        wrong.map_or(Ok(()), |wrong| Err(format!("pattern {seed}: {wrong}")))
    }

    fn difference(&self, offset: usize, expected: &[u8]) -> String {
        let found = self.snapshot(offset, expected.len());
        let first = (0..found.len()).find(|&i| found[i] != expected[i]).unwrap_or(0);
        let bad = (0..found.len()).filter(|&i| found[i] != expected[i]).count();
        let poison = found.iter().filter(|&&byte| byte == POISON).count();
        format!(
            "byte {} is {:#04x} instead of {:#04x}; of {} bytes from {offset} on, {bad} are wrong and {poison} poison",
            offset + first,
            found[first],
            expected[first],
            found.len(),
        )
    }

    /// Panics unless `len` bytes at `offset` are pattern `seed` from its byte `at` on.
    #[track_caller]
    pub fn assert_pattern(&self, seed: u64, offset: usize, len: usize, at: u64) {
        if let Err(wrong) = self.check(seed, offset, len, at) {
            panic!("{wrong}");
        }
    }

    /// Whether a range is all poison; if not, where it is not.
    pub fn check_poison(&self, offset: usize, len: usize) -> Result<(), String> {
        let chunk = [POISON; 4096];
        for start in (offset..offset + len).step_by(chunk.len()) {
            let expected = &chunk[..chunk.len().min(offset + len - start)];
            if !self.equals(start, expected) {
                return Err(format!("poison: {}", self.difference(start, expected)));
            }
        }
        Ok(())
    }

    /// Panics unless a range is all poison.
    #[track_caller]
    pub fn assert_poison(&self, offset: usize, len: usize) {
        if let Err(wrong) = self.check_poison(offset, len) {
            panic!("{wrong}");
        }
    }

    /// Panics unless the whole buffer is `expected`.
    #[track_caller]
    pub fn assert_image(&self, expected: &[u8]) {
        assert_eq!(self.len, expected.len());
        assert!(self.equals(0, expected), "{}", self.difference(0, expected));
    }

    /// Takes the pages away, whoever may have them registered; the addresses stay reserved: they lead behind the end of
    /// an empty file, so that not even a debugger finds anything there.
    pub fn unmap(&self) {
        // SAFETY: the name is a string that ends in NUL.
        let empty = unsafe { libc::memfd_create(c"empty".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(empty >= 0, "memfd_create");
        // SAFETY: replaces this buffer's own mapping. Later access by the test itself would be a fault, and does not
        // happen: tests drop such buffers untouched.
        let result = unsafe {
            libc::mmap(
                self.base.cast(),
                self.len,
                libc::PROT_NONE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                empty,
                0,
            )
        };
        assert_ne!(result, libc::MAP_FAILED, "taking pages away");
        // SAFETY: made above; the mapping keeps the file.
        unsafe { libc::close(empty) };
    }

    /// Takes the right to write away.
    pub fn make_read_only(&self) {
        // SAFETY: this buffer's own mapping.
        let result = unsafe { libc::mprotect(self.base.cast(), self.len, libc::PROT_READ) };
        assert_eq!(result, 0, "mprotect");
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.engine.is_some() {
            return;
        }
        // SAFETY: the mapping made in `mapped`; tests end their transfers first.
        unsafe { libc::munmap(self.base.cast(), self.len.max(1)) };
    }
}
