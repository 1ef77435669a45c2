//! A transfer that is copied by whoever has time: its lane, other lanes, the thread that waits for it.
//!
//! Chunks are claimed by a counter. Whoever claims one copies it and counts it done; the last one tells the
//! lane. To end it early the claims are closed: what was claimed by then is waited for, and after that
//! nothing touches its memory any more.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use arc_swap::ArcSwapOption;

use crate::error::Error;
use crate::transport::local::LocalPath;

/// No chunk has this number, nor one that claims beyond it could reach.
const CLOSED: u32 = 1 << 30;

/// How long a transfer waits while all places for copies to its peer are taken: each is free again within 100 us, or, where many threads
/// share few cores, some time slices.
const PLACE_PATIENCE: Duration = Duration::from_secs(5);

/// What came of an attempt to copy a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chunk {
    /// None is left.
    None,
    /// All places for copies to the peer are taken: later.
    Busy,
    /// It has been copied, or has failed; `last`: tell the lane, nothing may be left.
    Copied { last: bool },
}

/// The counters of a posting.
#[derive(Debug)]
struct Claims {
    /// The next chunk to claim.
    next: AtomicU32,
    done: AtomicU32,
    /// Nothing is left to be done when `done` is this.
    target: AtomicU32,
}

impl Claims {
    fn new() -> Self {
        Self { next: AtomicU32::new(CLOSED), done: AtomicU32::new(0), target: AtomicU32::new(0) }
    }

    /// Begins anew. Nobody copies now: it is quiet.
    fn open(&self, total: u32) {
        self.done.store(0, Ordering::SeqCst);
        self.target.store(total, Ordering::SeqCst);
        // The last: whoever claims sees all that was set before.
        self.next.store(0, Ordering::SeqCst);
    }

    fn claim(&self, total: u32) -> Option<u32> {
        if self.next.load(Ordering::Relaxed) >= total {
            return None;
        }
        let chunk = self.next.fetch_add(1, Ordering::SeqCst);
        (chunk < total).then_some(chunk)
    }

    /// Counts a claimed chunk; true: it may have been the last.
    fn finish(&self) -> bool {
        let done = self.done.fetch_add(1, Ordering::SeqCst) + 1;
        done == self.target.load(Ordering::SeqCst)
    }

    /// No more claims; true: nothing is left.
    fn close(&self, total: u32) -> bool {
        let next = self.next.swap(CLOSED, Ordering::SeqCst);
        if next < CLOSED {
            self.target.store(next.min(total), Ordering::SeqCst);
        }
        self.is_quiet()
    }

    fn is_quiet(&self) -> bool {
        self.done.load(Ordering::SeqCst) == self.target.load(Ordering::SeqCst)
    }
}

/// The copying of one posting.
#[derive(Debug)]
pub(crate) struct CopyJob {
    claims: Claims,
    path: ArcSwapOption<LocalPath>,
    error: Mutex<Option<Error>>,
    /// Since when no place is free to copy in, and whether there is anything in it.
    busy_since: Mutex<Option<Instant>>,
    was_busy: AtomicBool,
}

impl CopyJob {
    pub(crate) fn new() -> Self {
        Self {
            claims: Claims::new(),
            path: ArcSwapOption::empty(),
            error: Mutex::new(None),
            busy_since: Mutex::new(None),
            was_busy: AtomicBool::new(false),
        }
    }

    /// The lane begins it.
    pub(crate) fn open(&self, path: Arc<LocalPath>, chunks: usize) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.path.store(Some(path));
        self.has_place();
        self.claims.open(chunks as u32);
    }

    /// The way to copy what may be claimed now; `None`: there is nothing. One load then.
    #[inline]
    pub(crate) fn path_to_claim(&self, chunks: usize) -> Option<Arc<LocalPath>> {
        let is_left = self.claims.next.load(Ordering::Relaxed) < chunks as u32;
        if is_left { self.path.load_full() } else { None }
    }

    /// A place was free to copy in.
    #[inline]
    pub(crate) fn has_place(&self) {
        if self.was_busy.load(Ordering::Relaxed) {
            *self.busy_since.lock().unwrap_or_else(PoisonError::into_inner) = None;
            self.was_busy.store(false, Ordering::Relaxed);
        }
    }

    /// No place was free; true: for too long.
    pub(crate) fn is_out_of_patience(&self) -> bool {
        let now = Instant::now();
        let mut since = self.busy_since.lock().unwrap_or_else(PoisonError::into_inner);
        self.was_busy.store(true, Ordering::Relaxed);
        now.duration_since(*since.get_or_insert(now)) >= PLACE_PATIENCE
    }

    /// Takes a chunk, and the way to copy it. It has to be given to `finish`. One load when there is none.
    #[inline]
    pub(crate) fn claim(&self, chunks: usize) -> Option<(usize, Arc<LocalPath>)> {
        let chunk = self.claims.claim(chunks as u32)?;
        let Some(path) = self.path.load_full() else {
            debug_assert!(false, "a chunk was claimed of a job that was never opened");
            self.claims.finish();
            return None;
        };
        Some((chunk as usize, path))
    }

    /// A claimed chunk has been copied, or not. True: tell the lane, nothing is left.
    pub(crate) fn finish(&self, outcome: Result<(), Error>, chunks: usize) -> bool {
        if let Err(error) = outcome {
            self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            self.claims.close(chunks as u32);
        }
        self.claims.finish()
    }

    /// Ends it early; true: nothing is being copied any more.
    pub(crate) fn close(&self, chunks: usize) -> bool {
        self.claims.close(chunks as u32)
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.claims.is_quiet()
    }

    /// It is to end early: what was claimed and not begun need not be.
    pub(crate) fn is_closed(&self) -> bool {
        self.claims.next.load(Ordering::SeqCst) >= CLOSED
    }

    /// The way to copy it.
    pub(crate) fn path(&self) -> Option<Arc<LocalPath>> {
        self.path.load_full()
    }

    pub(crate) fn error(&self) -> Option<Error> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// It has ended: the way is not kept any longer than it is needed.
    pub(crate) fn reset(&self) {
        self.path.store(None);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_chunk_is_claimed_once_and_the_last_one_says_so() {
        let claims = Claims::new();
        assert!(claims.claim(3).is_none() && claims.is_quiet());
        claims.open(3);
        assert!(!claims.is_quiet());
        assert_eq!([(); 4].map(|()| claims.claim(3)), [Some(0), Some(1), Some(2), None]);
        assert_eq!([(); 3].map(|()| claims.finish()), [false, false, true]);
        assert!(claims.is_quiet());
    }

    #[test]
    fn closing_waits_for_what_was_claimed() {
        let claims = Claims::new();
        claims.open(10);
        claims.claim(10).unwrap();
        claims.claim(10).unwrap();
        assert!(!claims.close(10));
        assert!(claims.claim(10).is_none());
        assert!(!claims.finish() && !claims.close(10));
        assert!(claims.finish() && claims.is_quiet() && claims.close(10));
    }

    #[test]
    fn many_threads_share_the_chunks_of_many_postings() {
        const CHUNKS: u32 = 50;
        let claims = Arc::new(Claims::new());
        let copied = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (claims, copied, stop) = (claims.clone(), copied.clone(), stop.clone());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        if claims.claim(CHUNKS).is_some() {
                            copied.fetch_add(1, Ordering::Relaxed);
                            claims.finish();
                        } else {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        for posting in 1..=300 {
            claims.open(CHUNKS);
            let closed = posting % 7 == 0;
            if closed {
                claims.close(CHUNKS);
            }
            while !claims.is_quiet() {
                std::thread::yield_now();
            }
            if !closed {
                assert_eq!(copied.swap(0, Ordering::SeqCst), CHUNKS as usize);
            }
            copied.store(0, Ordering::SeqCst);
        }
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap();
        }
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test --release --lib loom`
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;

    #[test]
    fn loom_closing_sees_every_claim_and_quiet_is_told() {
        loom::model(|| {
            let claims = Arc::new(Claims::new());
            claims.open(2);
            let worker = {
                let claims = claims.clone();
                loom::thread::spawn(move || {
                    let mut told = false;
                    while claims.claim(2).is_some() {
                        told |= claims.finish();
                    }
                    told
                })
            };
            let quiet = claims.close(2);
            let told = worker.join().unwrap();
            assert!(claims.is_quiet());
            assert!(quiet || told, "somebody tells the lane");
            assert!(claims.claim(2).is_none());
        });
    }
}
