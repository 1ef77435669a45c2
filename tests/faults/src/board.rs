//! The board: memory of the watch that both sides write down on what they are doing, so that the watch sees it without
//! asking them, and still sees it when they are dead or stopped.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Slots of a side: transfers that are posted again and again. Their numbers are in `load.rs`.
pub(crate) const SLOTS: usize = 12;
/// Places in the peer's memory for each slot that writes.
pub(crate) const BLOCKS: usize = 4;

/// What the sides shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
pub(crate) enum Control {
    /// Nothing yet.
    Wait,
    /// Post.
    Run,
    /// Show that the session is back.
    Return,
    /// Post no more, but take notifications.
    Stop,
    /// End the threads.
    Over,
}

/// What the side does that no slot shows: bits of `doing`.
pub(crate) mod doing {
    pub(crate) const CONNECTED: u64 = 1;
    pub(crate) const HANDSHAKE: u64 = 2;
    pub(crate) const RECONNECT: u64 = 4;
    pub(crate) const DEREGISTER: u64 = 8;
}

/// How the last posting of a slot ended.
pub(crate) mod outcome {
    pub(crate) const DONE: u64 = 1;
    pub(crate) const FAILED: u64 = 2;
}

/// Posted and not ended: `posted_ns > ended_ns`.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct SlotBoard {
    pub(crate) posted_ns: AtomicU64,
    pub(crate) ended_ns: AtomicU64,
    pub(crate) outcome: AtomicU64,
    /// It is posted no more.
    pub(crate) stopped: AtomicU64,
    /// Number of the block that was written last, and where it lies.
    pub(crate) number: AtomicU64,
    pub(crate) block: AtomicU64,
    pub(crate) completed: AtomicU64,
    /// For each place: the number of the last block that was posted there, and of the last that is known to be there.
    pub(crate) placed: [AtomicU64; BLOCKS],
    pub(crate) held: [AtomicU64; BLOCKS],
    /// For each place: the number of the last block whose notification the *receiver* has seen.
    pub(crate) seen: [AtomicU64; BLOCKS],
}

impl SlotBoard {
    pub(crate) fn in_flight(&self) -> bool {
        // The end first: a posting that comes between makes it look in flight, which it then is.
        let ended = self.ended_ns.load(Ordering::SeqCst);
        self.posted_ns.load(Ordering::SeqCst) > ended
    }
}

/// Bytes of a region descriptor on the board.
const DESCRIPTOR_WORDS: usize = 64;

#[derive(Debug)]
#[repr(C)]
pub(crate) struct SideBoard {
    pub(crate) doing: AtomicU64,
    /// Notifications that the peer's engine has not acknowledged.
    pub(crate) unacknowledged: AtomicU64,
    /// Free-standing notifications: about to be sent, taken by the engine.
    pub(crate) sending: AtomicU64,
    pub(crate) sent: AtomicU64,
    /// Of the other side: received, number of the last one, missing between, no newer than an earlier one.
    pub(crate) received: AtomicU64,
    pub(crate) last: AtomicU64,
    pub(crate) missing: AtomicU64,
    pub(crate) doubled: AtomicU64,
    /// That this side's engine says it has dropped.
    pub(crate) dropped: AtomicU64,
    /// Threads that post and send no more.
    pub(crate) senders_ended: AtomicU64,
    pub(crate) slots: [SlotBoard; SLOTS],
    /// The descriptor of the region that comes and goes: even number while it is whole.
    churn_version: AtomicU64,
    churn_len: AtomicU64,
    churn: [AtomicU64; DESCRIPTOR_WORDS],
}

impl SideBoard {
    pub(crate) fn set(&self, bits: u64) {
        self.doing.fetch_or(bits, Ordering::SeqCst);
    }

    pub(crate) fn clear(&self, bits: u64) {
        self.doing.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(crate) fn is_doing(&self, bits: u64) -> bool {
        self.doing.load(Ordering::SeqCst) & bits != 0
    }

    /// Publishes the descriptor of a region that will go away again. One writer.
    pub(crate) fn announce(&self, descriptor: &[u8]) {
        assert!(descriptor.len() <= DESCRIPTOR_WORDS * 8, "a longer descriptor than foreseen");
        self.churn_version.fetch_add(1, Ordering::SeqCst);
        for (word, bytes) in self.churn.iter().zip(descriptor.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(whole), Ordering::SeqCst);
        }
        self.churn_len.store(descriptor.len() as u64, Ordering::SeqCst);
        self.churn_version.fetch_add(1, Ordering::SeqCst);
    }

    /// The version of the last announcement with its descriptor, if there is a newer one than `than`.
    pub(crate) fn announced(&self, than: u64) -> Option<(u64, Vec<u8>)> {
        let version = self.churn_version.load(Ordering::SeqCst);
        if version == than || version % 2 == 1 {
            return None;
        }
        let len = self.churn_len.load(Ordering::SeqCst) as usize;
        let mut bytes: Vec<u8> = self
            .churn
            .iter()
            .take(len.div_ceil(8))
            .flat_map(|word| word.load(Ordering::SeqCst).to_le_bytes())
            .collect();
        bytes.truncate(len);
        (self.churn_version.load(Ordering::SeqCst) == version).then_some((version, bytes))
    }
}

#[derive(Debug)]
#[repr(C)]
pub(crate) struct Board {
    /// When the signal was sent in this round; 0: not yet.
    pub(crate) signal_ns: AtomicU64,
    control: AtomicU64,
    pub(crate) sides: [SideBoard; 2],
}

// Everything is an atomic word, for which all zeros are a value.
const WORDS: usize = size_of::<Board>() / size_of::<AtomicU64>();

impl Board {
    /// A new board, full of zeros, and the path by which other processes of this user find it while this one lives.
    pub(crate) fn create() -> io::Result<(&'static Self, String)> {
        // SAFETY: the name is a string that ends in NUL.
        let fd = unsafe { libc::memfd_create(c"board".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: made above, and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size_of::<Self>() as u64)?;
        let board = Self::map(&file)?;
        let path = format!("/proc/{}/fd/{fd}", std::process::id());
        // Kept open for those who come by the path.
        std::mem::forget(file);
        Ok((board, path))
    }

    /// The board of another process.
    pub(crate) fn open(path: &str) -> io::Result<&'static Self> {
        Self::map(&OpenOptions::new().read(true).write(true).open(path)?)
    }

    fn map(file: &File) -> io::Result<&'static Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping of a file that is as long as the board.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Self>(),
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: aligned to a page, long enough, never unmapped; every byte pattern is a board, all of whose words are
        // atomics, as they have to be since others write them.
        Ok(unsafe { &*base.cast::<Self>() })
    }

    /// All zeros again. While nobody runs.
    pub(crate) fn reset(&self) {
        // SAFETY: `repr(C)` and made of nothing but `AtomicU64`, so that it is an array of them.
        let words = unsafe { &*std::ptr::from_ref(self).cast::<[AtomicU64; WORDS]>() };
        words.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    pub(crate) fn control(&self) -> Control {
        match self.control.load(Ordering::SeqCst) {
            0 => Control::Wait,
            1 => Control::Run,
            2 => Control::Return,
            3 => Control::Stop,
            _ => Control::Over,
        }
    }

    pub(crate) fn order(&self, control: Control) {
        self.control.store(control as u64, Ordering::SeqCst);
    }

    pub(crate) fn signalled(&self) -> bool {
        self.signal_ns.load(Ordering::SeqCst) != 0
    }
}

/// Nanoseconds on the clock that all processes of this host share.
pub(crate) fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is ours to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_process_writes_another_reads() {
        let (board, path) = Board::create().unwrap();
        let other = Board::open(&path).unwrap();
        board.sides[1].announce(b"a descriptor of 25 bytes!");
        let (version, bytes) = other.sides[1].announced(0).unwrap();
        assert_eq!(bytes, b"a descriptor of 25 bytes!");
        assert!(other.sides[1].announced(version).is_none());
        board.order(Control::Stop);
        assert_eq!(other.control(), Control::Stop);
        board.reset();
        assert_eq!(other.control(), Control::Wait);
        assert!(other.sides[1].announced(0).is_none());
    }
}
