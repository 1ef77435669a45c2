//! Shared memory as docs/protocol.md has it, made and changed by hand.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Layout of all shared memory.
pub const LAYOUT: u16 = 3;
/// A channel's length in bytes.
pub const CHANNEL: usize = 4096 + 512 * 128;
/// The words of a channel, and those between two slots of its ring.
#[allow(missing_docs, reason = "named as in docs/protocol.md")]
pub mod word {
    pub const CLOSED: usize = 4;
    pub const ASLEEP: usize = 8;
    pub const HEAD: usize = 16;
    pub const USES: usize = 32;
    pub const RING: usize = 512;
    pub const SLOT: usize = 16;
}
/// The places for copies in a channel, and the words from one to the next.
pub const USE_COUNT: usize = 32;
/// See [`USE_COUNT`].
pub const USE_WORDS: usize = 8;

/// The seals that all shared memory has.
pub fn sealed() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

/// A memfd with these bytes at its start.
#[track_caller]
pub fn memfd(bytes: &[u8], len: u64, seals: SealFlag) -> File {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"hostile", flags).expect("a memfd"));
    file.set_len(len).expect("any length");
    file.write_all_at(bytes, 0).expect("a memfd takes bytes");
    if !seals.is_empty() {
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("seals");
    }
    file
}

/// The word that shared memory begins with.
#[track_caller]
pub fn magic_of(fd: BorrowedFd<'_>) -> u64 {
    let file = File::from(fd.try_clone_to_owned().expect("a descriptor"));
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 0).expect("a first word");
    u64::from_le_bytes(word)
}

/// Shared memory, mapped here.
#[derive(Debug)]
pub struct Map(*mut AtomicU64, usize);

// SAFETY: it is only touched as atomic words.
unsafe impl Sync for Map {}
// SAFETY: as above.
unsafe impl Send for Map {}

impl Map {
    /// The first `len` bytes.
    #[track_caller]
    pub fn of(fd: &impl AsRawFd, len: usize) -> Self {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        assert!(start != libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self(start.cast(), len)
    }

    /// As words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: a page-aligned mapping that lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.0, self.1 / 8) }
    }

    /// Where it is mapped.
    pub fn addr(&self) -> u64 {
        self.0 as usize as u64
    }

    /// Writes a word.
    pub fn set(&self, word: usize, value: u64) {
        self.words()[word].store(value, Ordering::SeqCst);
    }

    /// Reads a word.
    pub fn get(&self, word: usize) -> u64 {
        self.words()[word].load(Ordering::SeqCst)
    }

    /// Puts a message into a slot of the ring; `length` is what it says.
    pub fn put(&self, position: u64, kind: u64, length: u64, seq: u64, ack: u64) {
        let slot = word::RING + (position % 512) as usize * word::SLOT;
        self.set(slot + 1, kind | length << 32);
        self.set(slot + 2, seq);
        self.set(slot + 3, ack);
        self.set(slot, position + 1);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, and nothing borrows from it any more.
        unsafe { libc::munmap(self.0.cast(), self.1) };
    }
}
