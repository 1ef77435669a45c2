//! What tests tell the driver, and what they ask it.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use crate::stream;

pub(crate) const GLOBAL: c_int = 0;
pub(crate) const RELAXED: c_int = 2;
const CAPTURE_UNSUPPORTED: c_int = 900;

#[derive(Default)]
struct Call {
    made: u64,
    /// After so many that are not, so many more are refused, with this.
    refused: (u64, u64, c_int),
}

static CALLS: LazyLock<Mutex<HashMap<String, Call>>> = LazyLock::new(Mutex::default);
/// Captures in global mode that go on in this process.
static CAPTURES: AtomicUsize = AtomicUsize::new(0);
/// One of them was spoilt by a call that it does not allow.
static SPOILT: AtomicBool = AtomicBool::new(false);

thread_local! {
    static MODE: Cell<c_int> = const { Cell::new(GLOBAL) };
}

/// Counts a call; the answer is the error that it is refused with.
pub(crate) fn begin(name: &str) -> Option<c_int> {
    let mut calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    if !calls.contains_key(name) {
        calls.insert(name.to_owned(), Call::default());
    }
    let call = calls.get_mut(name)?;
    let (before, count, status) = &mut call.refused;
    if *before == 0 && *count > 0 {
        *count -= 1;
        return Some(*status);
    }
    *before = before.saturating_sub(1);
    call.made += 1;
    None
}

/// A call that may be unsafe while a graph is captured: the error that it is refused with.
pub(crate) fn refuse_amid_capture() -> c_int {
    if CAPTURES.load(Ordering::Acquire) == 0 || MODE.get() == RELAXED {
        return 0;
    }
    SPOILT.store(true, Ordering::Release);
    CAPTURE_UNSUPPORTED
}

pub(crate) fn exchange_mode(mode: c_int) -> c_int {
    MODE.replace(mode)
}

pub(crate) fn begin_capture() {
    SPOILT.store(false, Ordering::Release);
    CAPTURES.fetch_add(1, Ordering::AcqRel);
}

/// Whether it has captured what it should have.
pub(crate) fn end_capture() -> bool {
    CAPTURES.fetch_sub(1, Ordering::AcqRel);
    !SPOILT.load(Ordering::Acquire)
}

/// Tells tests which driver they have.
#[unsafe(no_mangle)]
#[allow(missing_docs)]
pub(crate) extern "C" fn corelane_fake_cuda() {}

/// A GPU does nothing while it is held.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn corelane_fake_hold(gpu: c_int, held: c_int) {
    stream::hold(gpu as usize, held != 0);
}

/// A GPU is lost by an error, after so much more work.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn corelane_fake_lose(gpu: c_int, status: c_int, after: u64) {
    stream::lose(gpu as usize, status, after);
}

/// # Safety
/// A text that ends in a zero.
unsafe fn text(name: *const c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// After `before` more calls of a function, `count` fail with `status`.
///
/// # Safety
/// The name ends in a zero.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn corelane_fake_refuse(
    name: *const c_char,
    status: c_int,
    before: u64,
    count: u64,
) {
    // SAFETY: the caller's promise.
    let name = unsafe { text(name) };
    let mut calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    calls.entry(name).or_default().refused = (before, count, status);
}

/// How many calls of a function were made, without those that were refused.
///
/// # Safety
/// The name ends in a zero.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn corelane_fake_calls(name: *const c_char) -> u64 {
    // SAFETY: the caller's promise.
    let name = unsafe { text(name) };
    let calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    calls.get(&name).map_or(0, |call| call.made)
}

/// How many calls of a function are still to be refused.
///
/// # Safety
/// The name ends in a zero.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn corelane_fake_to_refuse(name: *const c_char) -> u64 {
    // SAFETY: the caller's promise.
    let name = unsafe { text(name) };
    let calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    calls.get(&name).map_or(0, |call| call.refused.1)
}
