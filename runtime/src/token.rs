//! The token: whoever holds it may touch the pump. Try-lock only; nobody ever blocks on it.

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicBool, Ordering, UnsafeCell};

pub(crate) struct Token<T> {
    held: CachePadded<AtomicBool>,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached only by the holder of the token, and acquire/release order one holder after the other, so
// sharing the token moves the value between threads: `T: Send` is what that needs.
unsafe impl<T: Send> Sync for Token<T> {}
// SAFETY: the token owns its value.
unsafe impl<T: Send> Send for Token<T> {}

impl<T> Token<T> {
    /// The token starts out held by its maker, who must `release` it.
    pub(crate) fn new_held(value: T) -> Self {
        Self { held: CachePadded::new(AtomicBool::new(true)), value: UnsafeCell::new(value) }
    }

    /// True: the calling thread now holds the token and has to `release` it.
    #[inline]
    pub(crate) fn try_acquire(&self) -> bool {
        // The load first: a failing attempt then leaves the cache line shared.
        !self.held.load(Ordering::Relaxed)
            && self.held.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Whether somebody held it just now.
    #[inline]
    pub(crate) fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    /// Gives up the token. The caller must hold it.
    #[inline]
    pub(crate) fn release(&self) {
        self.held.store(false, Ordering::Release);
    }

    /// Runs `f` on the value.
    ///
    /// # Safety
    /// The calling thread holds the token, and is not already inside `with` for it.
    #[inline]
    pub(crate) unsafe fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        // SAFETY: the caller holds the token and no other reference to the value is alive.
        self.value.with_mut(|value| f(unsafe { &mut *value }))
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::{sync::Arc, thread};

    use super::*;

    /// loom's cell reports two accesses that are not ordered.
    #[test]
    fn loom_holders_exclude_and_see_each_other() {
        loom::model(|| {
            let token = Arc::new(Token::new_held(0u32));
            let others: Vec<_> = (0..2)
                .map(|_| {
                    let token = token.clone();
                    thread::spawn(move || {
                        if !token.try_acquire() {
                            return 0;
                        }
                        // SAFETY: this thread holds the token.
                        unsafe { token.with(|value| *value += 1) };
                        token.release();
                        1
                    })
                })
                .collect();
            token.release();
            let mut count: u32 = others.into_iter().map(|other| other.join().unwrap()).sum();
            assert!(token.try_acquire());
            // SAFETY: this thread holds the token.
            count -= unsafe { token.with(|value| *value) };
            assert_eq!(count, 0);
        });
    }
}
