//! Whether a peer's process is dying, known before the kernel takes its memory away.
//!
//! A process that is killed ends thread by thread. Of each, the kernel first writes into the robust futexes that it holds
//! that their owner has died. What an address space holds is freed by the last of them, 60 ms for each GiB, and only
//! then are sockets closed and pidfds readable. So the first lane of an engine holds some robust futexes, in memory that
//! only the engine can write, where its peers watch them. Each peer watches the one that its incarnation falls to: the kernel
//! wakes one of those who wait.
//!
//! They are robust mutexes of the C library, since that owns the one list of them that a thread has. The list leads through the
//! mutexes themselves: memory that a peer can write must never hold them.
//!
//! An engine that lies about its life harms itself: it is taken for dead, or its death is noticed later.

use std::io;
use std::mem::size_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use corelane_runtime::SharedWord;

use super::shm::Mapping;

/// A line each.
const STRIDE: usize = 64;
const COUNT: usize = 32;
/// What the words of an engine take.
pub(super) const BYTES: usize = STRIDE * COUNT;
/// Where in a mutex its futex is.
const WORD: usize = if cfg!(target_env = "musl") { 4 } else { 0 };

const _: () = assert!(size_of::<libc::pthread_mutex_t>() <= STRIDE);

/// The futexes of an engine, held by the thread that took them until it drops this or ends.
#[derive(Debug)]
pub(crate) struct Held {
    map: Arc<Mapping>,
    start: usize,
    count: usize,
}

impl Held {
    /// Takes all of them, `BYTES` at `start` of memory that nobody else writes and that is zero.
    pub(super) fn take(map: Arc<Mapping>, start: usize) -> io::Result<Self> {
        if !start.is_multiple_of(STRIDE) || start.saturating_add(BYTES) > map.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut held = Self { map, start, count: 0 };
        for index in 0..COUNT {
            let mutex = held.mutex(index);
            // SAFETY: inside the mapping, aligned, and zero: nobody has made a mutex of it. It stays mapped while this
            // thread holds it: `held` sees to that.
            unsafe { lock_robust(mutex)? };
            held.count = index + 1;
            if let Some(word) = held.map.word32(start + index * STRIDE + WORD) {
                // Peers cannot say that they wait: without this, the kernel wakes none of them.
                word.fetch_or(libc::FUTEX_WAITERS, Ordering::AcqRel);
            }
        }
        Ok(held)
    }

    fn mutex(&self, index: usize) -> *mut libc::pthread_mutex_t {
        self.map.as_ptr().wrapping_add(self.start + index * STRIDE).cast()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut all = true;
        for index in 0..self.count {
            // SAFETY: a mutex that `take` has made and that was never destroyed. Of another thread's it says so.
            all &= unsafe { libc::pthread_mutex_unlock(self.mutex(index)) } == 0;
        }
        if !all {
            // The list of some thread still leads through this memory.
            std::mem::forget(self.map.clone());
        }
    }
}

/// Makes a robust mutex that processes share, and locks it.
///
/// # Safety
/// `mutex` points to memory for one, in which there is none, and which stays as long as it is locked.
unsafe fn lock_robust(mutex: *mut libc::pthread_mutex_t) -> io::Result<()> {
    let check = |code| match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    };
    let mut attributes = std::mem::MaybeUninit::uninit();
    let attributes = attributes.as_mut_ptr();
    // SAFETY: the attributes are made by the first call and destroyed by the last; `mutex` by the caller's promise.
    unsafe {
        check(libc::pthread_mutexattr_init(attributes))?;
        let made = check(libc::pthread_mutexattr_setrobust(attributes, libc::PTHREAD_MUTEX_ROBUST))
            .and_then(|()| {
                let shared = libc::PTHREAD_PROCESS_SHARED;
                check(libc::pthread_mutexattr_setpshared(attributes, shared))
            })
            .and_then(|()| check(libc::pthread_mutex_init(mutex, attributes)))
            .and_then(|()| check(libc::pthread_mutex_lock(mutex)));
        libc::pthread_mutexattr_destroy(attributes);
        made
    }
}

/// What a peer's engine says about its life.
#[derive(Debug, Clone)]
pub(crate) struct Life {
    map: Arc<Mapping>,
    offset: usize,
}

impl Life {
    /// The word that a reader has to watch, of those at `start`; `None`: there are none.
    pub(super) fn of(map: &Arc<Mapping>, start: u64, reader: u128) -> Option<Self> {
        let start = usize::try_from(start).ok().filter(|start| *start != 0)?;
        let offset = start.checked_add((reader % COUNT as u128) as usize * STRIDE + WORD)?;
        map.word32(offset)?;
        Some(Self { map: map.clone(), offset })
    }

    fn value(&self) -> u32 {
        self.map.word32(self.offset).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Whether the thread that held it has ended without giving it back: the process is dying, or has become another
    /// program. One load.
    #[inline]
    pub(crate) fn has_ended(&self) -> bool {
        self.value() & libc::FUTEX_OWNER_DIED != 0
    }

    /// What the word holds while the engine lives; `None`: nobody holds it, so that nothing will be heard of it.
    pub(crate) fn held(&self) -> Option<u32> {
        let value = self.value();
        (value & libc::FUTEX_TID_MASK != 0 && value & libc::FUTEX_OWNER_DIED == 0).then_some(value)
    }

    /// Wakes all others that watch the same word: the kernel has woken one.
    pub(crate) fn tell_others(&self) {
        // SAFETY: the word is mapped; nothing is written.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.word().as_ptr(),
                libc::FUTEX_WAKE,
                libc::c_int::MAX,
            );
        }
    }
}

impl SharedWord for Life {
    fn word(&self) -> &AtomicU32 {
        static NOBODY: AtomicU32 = AtomicU32::new(0);
        // Checked when it was made.
        self.map.word32(self.offset).unwrap_or(&NOBODY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::local::table::{Table, TableView};

    /// A table whose words a thread holds until it is told to end, with or without giving them back.
    fn holder(gives_back: bool) -> (TableView, impl FnOnce()) {
        let table = Table::create(4).unwrap();
        let view = TableView::open(&*table.fd()).unwrap();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        let (taken, is_taken) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let held = table.hold_lives().unwrap();
            taken.send(()).unwrap();
            ends.recv().unwrap();
            if gives_back {
                drop(held);
            } else {
                std::mem::forget(held);
            }
        });
        is_taken.recv().unwrap();
        let finish = move || {
            end.send(()).unwrap();
            thread.join().unwrap();
        };
        (view, finish)
    }

    #[test]
    fn who_ends_without_a_word_is_known_to_have_died() {
        let (view, finish) = holder(false);
        let lives: Vec<_> = (0..64).map(|reader| view.life(reader).unwrap()).collect();
        assert!(lives.iter().all(|life| life.held().is_some() && !life.has_ended()));
        finish();
        // Joined is a thread when the kernel has cleared its ID, behind its robust futexes.
        assert!(lives.iter().all(|life| life.held().is_none() && life.has_ended()));
    }

    #[test]
    fn who_gives_back_what_he_held_has_not_died() {
        let (view, finish) = holder(true);
        let life = view.life(7).unwrap();
        assert!(life.held().is_some());
        finish();
        assert!(life.held().is_none() && !life.has_ended());
    }

    #[test]
    fn one_of_those_who_wait_is_woken_and_wakes_the_others() {
        let (view, finish) = holder(false);
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let life = view.life(5).unwrap();
                std::thread::spawn(move || {
                    while let Some(held) = life.held() {
                        let none = std::ptr::null::<libc::timespec>();
                        let word = life.word().as_ptr();
                        // SAFETY: a word that stays mapped, and no time limit.
                        unsafe {
                            libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, held, none)
                        };
                    }
                    life.tell_others();
                    life.has_ended()
                })
            })
            .collect();
        finish();
        assert!(waiters.into_iter().all(|waiter| waiter.join().unwrap()));
    }

    #[test]
    fn words_that_another_thread_holds_stay_mapped() {
        let table = Table::create(4).unwrap();
        let view = TableView::open(&*table.fd()).unwrap();
        let (give, given) = std::sync::mpsc::channel();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            give.send(table.hold_lives().unwrap()).unwrap();
            drop(table);
            ends.recv().unwrap();
        });
        drop(given.recv().unwrap());
        let life = view.life(0).unwrap();
        assert!(life.held().is_some());
        end.send(()).unwrap();
        thread.join().unwrap();
        assert!(life.has_ended(), "the kernel could not write any more");
    }

    #[test]
    fn where_a_peer_says_that_its_words_are_is_checked() {
        let fd = super::super::shm::create(c"test", 4096, false).unwrap();
        let map = Arc::new(Mapping::new(std::os::fd::AsFd::as_fd(&fd), 4096, true).unwrap());
        for start in [0, 1, 2, 3, 4096, u64::MAX, u64::MAX - 3, 4096 - 60] {
            let life = Life::of(&map, start, 1);
            assert!(life.is_none(), "{start}");
        }
        assert!(Life::of(&map, 4096 - 128, 1).is_some());
        assert!(Life::of(&map, 4096 - 64, 1).is_none());
    }
}
