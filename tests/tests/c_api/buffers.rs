//! Bytes that the library gives, and bytes that it takes.

use std::ffi::c_void;
use std::ptr::null_mut;

use crate::api::*;

/// Calls a function with every capacity around the length of what it has to say.
fn assert_buffers(what: &str, fill: impl Fn(*mut c_void, usize, *mut usize) -> corelane_status) {
    let expected = filled(&fill);
    assert!(!expected.is_empty(), "{what}");
    for capacity in [0, 1, expected.len() - 1] {
        let (mut buffer, mut len) = (vec![0xEE; expected.len() + 8], usize::MAX);
        let status = fill(buffer.as_mut_ptr().cast(), capacity, &raw mut len);
        assert_eq!(status, CORELANE_ERR_BUFFER_TOO_SMALL, "{what} into {capacity}");
        assert!(last_error().contains(&expected.len().to_string()), "{}", last_error());
        assert_eq!(len, expected.len(), "{what} into {capacity}");
        assert!(buffer.iter().all(|byte| *byte == 0xEE), "{what}: a part was copied");
    }
    for capacity in [expected.len(), expected.len() + 1, expected.len() + 8] {
        let (mut buffer, mut len) = (vec![0xEE; expected.len() + 8], usize::MAX);
        ok(fill(buffer.as_mut_ptr().cast(), capacity, &raw mut len));
        assert_eq!((len, &buffer[..len]), (expected.len(), &expected[..]), "{what}");
        assert_eq!(buffer[len..], [0xEE; 8], "{what}: bytes behind the answer");
    }
    let mut len = 0;
    refused(fill(null_mut(), expected.len(), &raw mut len), CORELANE_ERR_INVALID_ARGUMENT);
    refused(fill(null_mut(), usize::MAX, &raw mut len), CORELANE_ERR_INVALID_ARGUMENT);
    // Any alignment will do for bytes.
    let mut buffer = vec![0xEE; expected.len() + 1];
    ok(fill(buffer[1..].as_mut_ptr().cast(), expected.len(), &raw mut len));
    assert_eq!(buffer[1..], expected);
}

#[test]
fn a_buffer_gets_all_or_nothing_and_the_length() {
    let pair = Pair::new(4096);
    let (near, conn) = (&pair.near, pair.near.conn);
    let engine = near.engine.0;
    let xfer = near.prepare(CORELANE_READ, 64);
    ok(corelane_unload_peer(near.engine.load(&pair.far.metadata()), -1));
    assert_eq!(run(xfer), CORELANE_ERR_CANCELLED);
    assert_buffers("metadata", |b, size, len| c!(corelane_get_metadata(engine, b, size, len)));
    assert_buffers("an option", |b, size, len| {
        c!(corelane_get_option(engine, c"transports".as_ptr(), b, size, len))
    });
    assert_buffers("a descriptor", |b, size, len| {
        c!(corelane_get_descriptor(near.region, b, size, len))
    });
    assert_buffers("a name", |b, size, len| c!(corelane_conn_name(conn, b, size, len)));
    assert_buffers("an error", |b, size, len| c!(corelane_xfer_error(xfer, b, size, len)));
}

#[test]
fn metadata_and_descriptors_are_the_same_bytes_on_every_call() {
    let pair = Pair::new(4096);
    let (metadata, descriptor) = (pair.far.metadata(), descriptor_of(pair.far_region));
    assert_eq!(run(pair.near.prepare(CORELANE_READ, 64)), CORELANE_OK);
    ok(corelane_stop_accept(pair.far.0));
    for _ in 0..3 {
        assert_eq!(
            (pair.far.metadata(), descriptor_of(pair.far_region)),
            (metadata.clone(), descriptor.clone())
        );
    }
}

#[test]
fn damaged_metadata_and_descriptors_are_malformed() {
    let pair = Pair::new(4096);
    let engine = pair.near.engine.0;
    let (metadata, descriptor) = (pair.far.metadata(), descriptor_of(pair.far_region));
    let load: fn(u64, &[u8], *mut u64) -> corelane_status = |engine, bytes, place| {
        c!(corelane_load_peer(engine, bytes.as_ptr().cast(), bytes.len(), place))
    };
    let load_as: fn(u64, &[u8], *mut u64) -> corelane_status = |engine, bytes, place| {
        let ((name, n), at) = (chars(b"far"), bytes.as_ptr().cast());
        c!(corelane_load_peer_as(engine, name, n, at, bytes.len(), place))
    };
    let import: fn(u64, &[u8], *mut u64) -> corelane_status = |engine, bytes, place| {
        c!(corelane_import_descriptor(engine, bytes.as_ptr().cast(), bytes.len(), place))
    };
    for (good, other, call) in [
        (&metadata, &descriptor, load),
        (&metadata, &descriptor, load_as),
        (&descriptor, &metadata, import),
    ] {
        let mut handle = 7;
        let mut malformed = |bytes: &[u8], what: &str| {
            let status = call(engine, bytes, &raw mut handle);
            assert_eq!((status, handle), (CORELANE_ERR_MALFORMED, 0), "{what}: {}", last_error());
        };
        for len in 0..good.len() {
            malformed(&good[..len], &format!("the first {len} bytes"));
        }
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            malformed(&bytes, &format!("bit {bit} flipped"));
        }
        malformed(&[&good[..], &[0]].concat(), "a byte more");
        malformed(&[&good[..], &good[..]].concat(), "twice");
        malformed(other, "the other kind");
        malformed(&vec![0; 1 << 20], "zeros");
        malformed(&vec![0xff; 1 << 20], "ones");
        ok(call(engine, good, &raw mut handle));
    }
    let mut conn = 7;
    let ((name, n), bytes) = (chars(b"fare"), metadata.as_ptr().cast());
    let status = c!(corelane_load_peer_as(engine, name, n, bytes, metadata.len(), &raw mut conn));
    refused(status, CORELANE_ERR_INVALID_ARGUMENT);
    assert!(last_error().contains("`far`") && last_error().contains("`fare`"), "{}", last_error());
    assert_eq!(run(pair.near.prepare(CORELANE_READ, 4096)), CORELANE_OK);
    pair.near.memory.assert_pattern(1, 0, 4096, 0);
}
