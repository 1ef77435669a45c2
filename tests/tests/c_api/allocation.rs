//! Memory that the engine allocates: `corelane_alloc` and `corelane_free`.

use std::ffi::c_void;
use std::ptr::null_mut;

use corelane_tests::{Target, pattern, target, to_hex};

use crate::api::*;
use crate::remote::LEN;

/// Memory of an engine.
struct Allocation {
    addr: *mut c_void,
    len: usize,
    region: corelane_region_t,
}

impl Allocation {
    #[track_caller]
    fn new(engine: &Engine, len: usize, access: u32) -> Self {
        let (mut addr, mut region) = (null_mut(), 0);
        ok(c!(corelane_alloc(engine.0, len, access, &raw mut addr, &raw mut region)));
        assert!(!addr.is_null() && region != 0);
        assert_eq!(addr as usize % 4096, 0, "not at the start of a page");
        Self { addr, len, region }
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: as many bytes as the library said; the tests look when nobody writes.
        unsafe { std::slice::from_raw_parts(self.addr.cast::<u8>(), self.len) }.to_vec()
    }

    fn fill(&self, byte: u8) {
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(self.addr.cast::<u8>(), byte, self.len) };
    }

    fn segment(&self) -> corelane_local_segment {
        let (addr, len) = (self.addr as u64, self.len as u64);
        corelane_local_segment { addr, len, region: self.region }
    }

    /// What of shared memory this process has mapped at its address: the number of the file.
    fn inode(&self) -> u64 {
        let found = mapped().into_iter().find(|(range, _)| range.contains(&(self.addr as u64)));
        found.expect("it is mapped").1
    }
}

/// Mappings of memory of engines: addresses, and the number of the file.
fn mapped() -> Vec<(std::ops::Range<u64>, u64)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (start, end) = words[0].split_once('-').unwrap();
        let hex = |text| u64::from_str_radix(text, 16).unwrap();
        (hex(start)..hex(end), words[4].parse().unwrap())
    };
    maps.lines().filter(|line| line.contains("memfd:corelane-memory")).map(parse).collect()
}

fn is_mapped(inode: u64) -> bool {
    mapped().iter().any(|(_, known)| *known == inode)
}

/// A transfer between an allocation and the region of a peer.
#[track_caller]
fn prepare(
    engine: &Engine,
    conn: corelane_conn_t,
    far: &Target,
    operation: u32,
    own: &Allocation,
) -> corelane_xfer_t {
    let desc = engine.import(&far.region.to_bytes());
    let local = own.segment();
    let addr = far.region.segment(0, 0).addr;
    let remote = corelane_remote_segment { desc, addr, len: local.len };
    let mut xfer = 0;
    ok(c!(corelane_prepare(
        conn,
        operation,
        &raw const local,
        &raw const remote,
        1,
        &raw mut xfer
    )));
    xfer
}

#[test]
fn bytes_of_another_process_arrive_and_leave_over_every_transport() {
    for transports in ["local", "tcp", "local,tcp"] {
        let settings = format!("transports={transports}");
        let mut far = target!("far", LEN, "read-write", &settings);
        let near = Engine::with("near", &[("transports", transports)]);
        let memory = Allocation::new(&near, LEN, 3);
        assert!(memory.bytes().iter().all(|byte| *byte == 0), "not zeros");
        far.process.load(&near.metadata());
        let descriptor = to_hex(&descriptor_of(memory.region));
        far.process.ask(&format!("write near r 0 {descriptor} 0 {LEN}"));
        assert!(memory.bytes() == pattern(1, 0, LEN), "{transports}: written by the peer");
        // The peer reads what we write here; then it is ours to read and to write.
        memory.fill(0xA5);
        far.process.ask(&format!("read near r 0 {descriptor} 0 {LEN}"));
        assert!(far.process.dump("r", 0, LEN).iter().all(|byte| *byte == 0xA5), "{transports}");
        far.process.ask(&format!("fill r 2 0 {LEN} 0"));
        let conn = near.load(&far.metadata);
        let read = prepare(&near, conn, &far, CORELANE_READ, &memory);
        assert_eq!(run(read), CORELANE_OK, "{}", error_of(read));
        assert!(memory.bytes() == pattern(2, 0, LEN), "{transports}: read from the peer");
        memory.fill(0x5A);
        let write = prepare(&near, conn, &far, CORELANE_WRITE, &memory);
        assert_eq!(run(write), CORELANE_OK, "{}", error_of(write));
        assert!(far.process.dump("r", 0, LEN).iter().all(|byte| *byte == 0x5A), "{transports}");
        ok(corelane_free(memory.region));
    }
}

#[test]
fn access_is_what_was_asked_for() {
    let mut far = target!("far", 4096);
    let near = Engine::new("near");
    let readable = Allocation::new(&near, 4096, CORELANE_ACCESS_REMOTE_READ);
    far.process.load(&near.metadata());
    let descriptor = to_hex(&descriptor_of(readable.region));
    far.process.ask(&format!("read near r 0 {descriptor} 0 4096"));
    far.process.try_ask(&format!("write near r 0 {descriptor} 0 4096")).unwrap_err();
    assert!(readable.bytes().iter().all(|byte| *byte == 0), "written without permission");
    let mut info =
        corelane_region_info { addr: 0, len: 0, kind: 9, device: 9, access: 9, reserved: 9 };
    ok(c!(corelane_query_memory(near.0, readable.addr, 4096, &raw mut info)));
    assert_eq!((info.addr, info.len), (readable.addr as u64, 4096));
    assert_eq!((info.kind, info.access), (CORELANE_MEMORY_DRAM, CORELANE_ACCESS_REMOTE_READ));
}

#[test]
fn a_region_is_as_long_as_was_asked_for() {
    let engine = Engine::new("near");
    let memory = Allocation::new(&engine, 5000, 0);
    let mut info = [0u64; 8];
    let info = info.as_mut_ptr().cast();
    ok(c!(corelane_query_memory(engine.0, memory.addr, 5000, info)));
    refused(c!(corelane_query_memory(engine.0, memory.addr, 5001, info)), CORELANE_ERR_NOT_FOUND);
}

#[test]
fn memory_is_freed_once_and_nobody_reaches_it_afterwards() {
    let mut far = target!("far", 4096);
    let near = Engine::new("near");
    let (memory, kept) = (Allocation::new(&near, 4096, 3), Allocation::new(&near, 4096, 3));
    let inode = memory.inode();
    assert_ne!((inode, memory.region), (kept.inode(), kept.region));
    far.process.load(&near.metadata());
    let descriptor = to_hex(&descriptor_of(memory.region));
    let write = format!("write near r 0 {descriptor} 0 4096");
    far.process.ask(&write);
    assert_eq!(near.stats().regions, 2);
    ok(corelane_free(memory.region));
    assert_eq!(near.stats().regions, 1);
    assert!(!is_mapped(inode), "it is still mapped");
    let told = far.process.try_ask(&write).unwrap_err();
    assert!(told.starts_with("Permission"), "{told}");
    for _ in 0..3 {
        refused(corelane_free(memory.region), CORELANE_ERR_INVALID_HANDLE);
    }
    refused(corelane_mr_destroy(memory.region), CORELANE_ERR_INVALID_HANDLE);
    // The other one is as it was.
    assert!(is_mapped(kept.inode()));
    far.process.ask(&format!("write near r 0 {} 0 4096", to_hex(&descriptor_of(kept.region))));
    assert!(kept.bytes() == pattern(1, 0, 4096));
    ok(corelane_free(kept.region));
}

#[test]
fn memory_of_the_engine_and_of_the_application_are_given_back_each_its_way() {
    let engine = Engine::new("near");
    let memory = Allocation::new(&engine, 4096, 3);
    let own = Buffer::new(4096);
    let region = engine.register(&own, 3);
    // It may be registered again, as a part, by the application.
    let mut part = 0;
    ok(c!(corelane_reg(engine.0, memory.addr, 64, CORELANE_MEMORY_DRAM, 0, 0, &raw mut part)));
    refused(corelane_mr_destroy(memory.region), CORELANE_ERR_INVALID_ARGUMENT);
    assert!(last_error().contains("corelane_free"), "{}", last_error());
    for of_the_application in [region, part] {
        refused(corelane_free(of_the_application), CORELANE_ERR_INVALID_ARGUMENT);
        assert!(last_error().contains("corelane_mr_destroy"), "{}", last_error());
        ok(corelane_mr_destroy(of_the_application));
    }
    memory.fill(1);
    ok(corelane_free(memory.region));
}

#[test]
fn memory_in_use_is_freed_when_it_is_quiet() {
    let options =
        [("transports", "tcp"), ("liveness_ms", "60000"), ("deregister_timeout_ms", "50")];
    let far = target!("far", LEN, "read-write", "liveness_ms=60000");
    let near = Engine::with("near", &options);
    let memory = Allocation::new(&near, LEN, 0);
    let inode = memory.inode();
    let conn = near.load(&far.metadata);
    ok(corelane_connect(conn, BOUND_MS));
    let xfer = prepare(&near, conn, &far, CORELANE_READ, &memory);
    far.process.freeze();
    ok(corelane_post(xfer));
    assert_eq!(corelane_xfer_wait(xfer, 10), CORELANE_IN_PROGRESS);
    for _ in 0..2 {
        refused(corelane_free(memory.region), CORELANE_ERR_BUSY);
        assert!(is_mapped(inode));
    }
    // Kept: the descriptor is as it was, and the transfer goes on.
    assert!(!descriptor_of(memory.region).is_empty());
    far.process.thaw();
    assert_eq!(ended(xfer), CORELANE_OK, "{}", error_of(xfer));
    assert!(memory.bytes() == pattern(1, 0, LEN));
    ok(corelane_free(memory.region));
    refused(corelane_free(memory.region), CORELANE_ERR_INVALID_HANDLE);
    assert_eq!(run(xfer), CORELANE_ERR_NOT_REGISTERED, "{}", error_of(xfer));
    // What was prepared with it goes last.
    ok(corelane_release(xfer, BOUND_MS));
    assert!(!is_mapped(inode), "it is still mapped");
}

#[test]
fn memory_that_was_not_freed_goes_with_its_engine() {
    for transports in ["local", "tcp"] {
        let options = [("transports", transports), ("liveness_ms", "60000")];
        let settings = format!("transports={transports} liveness_ms=60000");
        let mut far = target!("far", LEN, "read-write", &settings);
        let near = Engine::with("near", &options);
        let all: Vec<Allocation> =
            (0..4).map(|i| Allocation::new(&near, LEN >> i, i as u32)).collect();
        let inodes: Vec<u64> = all.iter().map(Allocation::inode).collect();
        let conn = near.load(&far.metadata);
        let unposted = prepare(&near, conn, &far, CORELANE_WRITE, &all[1]);
        let xfer = prepare(&near, conn, &far, CORELANE_READ, &all[0]);
        assert_eq!(run(xfer), CORELANE_OK, "{}", error_of(xfer));
        far.process.load(&near.metadata());
        let descriptor = to_hex(&descriptor_of(all[3].region));
        let write = format!("write near r 0 {descriptor} 0 64");
        far.process.ask(&write);
        // In the middle of a transfer, where the peer has a part in it.
        far.process.freeze();
        ok(corelane_post(xfer));
        ok(corelane_engine_destroy(near.0));
        for (memory, inode) in all.iter().zip(&inodes) {
            assert!(!is_mapped(*inode), "{transports}: it is still mapped");
            refused(corelane_free(memory.region), CORELANE_ERR_INVALID_HANDLE);
        }
        refused(corelane_xfer_status(unposted), CORELANE_ERR_INVALID_HANDLE);
        far.process.thaw();
        far.process.try_ask(&write).unwrap_err();
    }
}

#[test]
fn what_cannot_be_allocated_is_refused() {
    let engine = Engine::new("near");
    let (mut addr, mut region) = (null_mut(), 7);
    let mut room = [0u64; 4];
    for place in [null_mut(), unaligned::<*mut c_void>(&mut room)] {
        let status = c!(corelane_alloc(engine.0, 64, 0, place, &raw mut region));
        refused(status, CORELANE_ERR_INVALID_ARGUMENT);
    }
    for place in [null_mut(), unaligned::<u64>(&mut room)] {
        let status = c!(corelane_alloc(engine.0, 64, 0, &raw mut addr, place));
        refused(status, CORELANE_ERR_INVALID_ARGUMENT);
    }
    assert_eq!(room, [0; 4]);
    let mut alloc = |len, access| {
        (addr, region) = (std::ptr::dangling_mut(), 7);
        let status = c!(corelane_alloc(engine.0, len, access, &raw mut addr, &raw mut region));
        assert!(addr.is_null() && region == 0, "an answer of a call that failed");
        status
    };
    refused(alloc(0, 0), CORELANE_ERR_INVALID_ARGUMENT);
    for access in [4, 1 << 31, u32::MAX] {
        refused(alloc(64, access), CORELANE_ERR_INVALID_ARGUMENT);
    }
    for huge in [usize::MAX, usize::MAX - 4095, isize::MAX as usize + 1, usize::MAX / 8] {
        refused(alloc(huge, 3), CORELANE_ERR_IO);
        assert!(last_error().contains(&huge.to_string()), "{}", last_error());
    }
    assert_eq!(engine.stats().regions, 0);
    assert!(mapped().is_empty() || std::env::var_os("NEXTEST").is_none(), "a mapping is left");
}
