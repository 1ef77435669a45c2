//! What callers pass: pointers that are checked as far as they can be.

use std::ffi::c_void;

use crate::status::{Failure, corelane_status};

/// `count` values at `pointer`; null is allowed for none.
///
/// # Safety
/// `pointer` is null, or points to `count` values that nobody changes while the answer is used.
pub(crate) unsafe fn slice<'a, T>(
    pointer: *const T,
    count: usize,
    what: &str,
) -> Result<&'a [T], Failure> {
    if count == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(Failure::argument(format!("{what} is null or not aligned")));
    }
    if count > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Failure::argument(format!("{what} has an impossible length of {count}")));
    }
    // SAFETY: the caller's promise; null, alignment and size are checked.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// # Safety
/// As for [`slice`].
pub(crate) unsafe fn bytes<'a>(
    pointer: *const c_void,
    len: usize,
    what: &str,
) -> Result<&'a [u8], Failure> {
    // SAFETY: the caller's promise, passed on.
    unsafe { slice(pointer.cast::<u8>(), len, what) }
}

/// # Safety
/// As for [`slice`].
pub(crate) unsafe fn text<'a>(
    pointer: *const std::ffi::c_char,
    len: usize,
    what: &str,
) -> Result<&'a str, Failure> {
    // SAFETY: the caller's promise, passed on.
    let bytes = unsafe { bytes(pointer.cast(), len, what)? };
    std::str::from_utf8(bytes).map_err(|_| Failure::argument(format!("{what} is not UTF-8")))
}

/// A string that ends with a zero byte.
///
/// # Safety
/// `pointer` is null or such a string.
pub(crate) unsafe fn string<'a>(
    pointer: *const std::ffi::c_char,
    what: &str,
) -> Result<&'a str, Failure> {
    if pointer.is_null() {
        return Err(Failure::argument(format!("{what} is null")));
    }
    // SAFETY: not null, and the caller's promise.
    unsafe { std::ffi::CStr::from_ptr(pointer) }
        .to_str()
        .map_err(|_| Failure::argument(format!("{what} is not UTF-8")))
}

/// Stores a result.
///
/// # Safety
/// `place` is null or points to room for a `T`.
pub(crate) unsafe fn store<T>(place: *mut T, value: T, what: &str) -> Result<(), Failure> {
    if place.is_null() || !place.is_aligned() {
        return Err(Failure::argument(format!("{what} is null or not aligned")));
    }
    // SAFETY: checked above, and the caller's promise.
    unsafe { place.write(value) };
    Ok(())
}

/// As [`store`], where the caller may not want the result.
///
/// # Safety
/// As for [`store`].
pub(crate) unsafe fn store_if_wanted<T>(place: *mut T, value: T) {
    if !place.is_null() && place.is_aligned() {
        // SAFETY: checked above, and the caller's promise.
        unsafe { place.write(value) };
    }
}

/// Copies `data` into the caller's buffer and stores its length, which is also the way to ask for
/// the length: with a buffer of 0 bytes.
///
/// # Safety
/// `buffer` is null or points to `capacity` bytes; `len` is null or points to a `size_t`.
pub(crate) unsafe fn fill(
    data: &[u8],
    buffer: *mut c_void,
    capacity: usize,
    len: *mut usize,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe { store(len, data.len(), "the place for the length")? };
    if capacity < data.len() {
        return Err(Failure::new(
            corelane_status::CORELANE_ERR_BUFFER_TOO_SMALL,
            format!("{} bytes are needed, the buffer has {capacity}", data.len()),
        ));
    }
    if data.is_empty() {
        return Ok(());
    }
    if buffer.is_null() {
        return Err(Failure::argument("the buffer is null"));
    }
    // SAFETY: `buffer` has room for `capacity` bytes by the caller's promise, and is no part of
    // `data`, which this library owns.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), buffer.cast::<u8>(), data.len()) };
    Ok(())
}

/// A timeout in milliseconds; negative: none.
pub(crate) fn timeout(milliseconds: i64) -> std::time::Duration {
    match u64::try_from(milliseconds) {
        Ok(milliseconds) => std::time::Duration::from_millis(milliseconds),
        Err(_) => std::time::Duration::MAX,
    }
}
