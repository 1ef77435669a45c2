//! What the tests call: the functions of the C API, and little helpers around them.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{null, null_mut};

pub(crate) use corelane_capi::corelane_status::{self, *};
pub(crate) use corelane_capi::*;
pub(crate) use corelane_tests::{BOUND, Buffer};

/// As long as anything may take, in the unit of the API.
pub(crate) const BOUND_MS: i64 = BOUND.as_millis() as i64;

/// Calls an unsafe function of the API.
macro_rules! c {
    ($function:ident($($argument:expr),* $(,)?)) => {{
        // The arguments are evaluated as safe code.
        #[allow(clippy::macro_metavars_in_unsafe, unused_unsafe)]
        // SAFETY: the pointers that tests pass are valid for the lengths they pass with them, or of the kinds that the
        // API promises to refuse: null, not aligned, impossibly long.
        let status = unsafe { $function($($argument),*) };
        status
    }};
}
pub(crate) use c;

/// The words of this thread's last failure.
pub(crate) fn last_error() -> String {
    // SAFETY: a string that lives until this thread's next failed call.
    unsafe { CStr::from_ptr(corelane_last_error()) }.to_str().unwrap().to_owned()
}

/// Panics unless a call succeeded.
#[track_caller]
pub(crate) fn ok(status: corelane_status) {
    assert_eq!(status, CORELANE_OK, "{}", last_error());
}

/// Panics unless a call failed with `expected`, and said why.
#[track_caller]
pub(crate) fn refused(status: corelane_status, expected: corelane_status) {
    assert_eq!(status, expected, "{}", last_error());
    assert!(!last_error().is_empty(), "{expected:?} without words");
}

/// A string without its length, and one with it.
pub(crate) fn c_string(text: &str) -> CString {
    CString::new(text).unwrap()
}

pub(crate) fn chars(bytes: &[u8]) -> (*const c_char, usize) {
    (bytes.as_ptr().cast(), bytes.len())
}

/// An engine on the loopback address that logs nothing, with options of its own.
pub(crate) fn try_create(
    name: &[u8],
    options: &[(&str, &str)],
    engine: &mut corelane_engine_t,
) -> corelane_status {
    let quiet = [("listen", "127.0.0.1"), ("log_level", "off")];
    let strings: Vec<(CString, CString)> = quiet
        .iter()
        .chain(options)
        .map(|(name, value)| (c_string(name), c_string(value)))
        .collect();
    let options: Vec<corelane_option> = strings
        .iter()
        .map(|(name, value)| corelane_option { name: name.as_ptr(), value: value.as_ptr() })
        .collect();
    let (name, len) = chars(name);
    c!(corelane_engine_create(name, len, options.as_ptr(), options.len(), engine))
}

/// An engine that is destroyed at the end of the test, if it still exists.
pub(crate) struct Engine(pub(crate) corelane_engine_t);

impl Drop for Engine {
    fn drop(&mut self) {
        // The test may have destroyed it.
        let _ = corelane_engine_destroy(self.0);
    }
}

/// Calls a function that fills a buffer: once for the length, once for the bytes.
#[track_caller]
pub(crate) fn filled(fill: impl Fn(*mut c_void, usize, *mut usize) -> corelane_status) -> Vec<u8> {
    let mut len = usize::MAX;
    match fill(null_mut(), 0, &raw mut len) {
        // Nothing to copy needs no room.
        CORELANE_OK => assert_eq!(len, 0),
        status => assert_eq!(status, CORELANE_ERR_BUFFER_TOO_SMALL, "{}", last_error()),
    }
    let mut bytes = vec![0; len];
    ok(fill(bytes.as_mut_ptr().cast(), bytes.len(), &raw mut len));
    assert_eq!(len, bytes.len());
    bytes
}

impl Engine {
    #[track_caller]
    pub(crate) fn new(name: &str) -> Self {
        Self::with(name, &[])
    }

    #[track_caller]
    pub(crate) fn with(name: &str, options: &[(&str, &str)]) -> Self {
        let mut engine = 0;
        ok(try_create(name.as_bytes(), options, &mut engine));
        assert_ne!(engine, 0);
        Self(engine)
    }

    #[track_caller]
    pub(crate) fn metadata(&self) -> Vec<u8> {
        filled(|buffer, capacity, len| c!(corelane_get_metadata(self.0, buffer, capacity, len)))
    }

    #[track_caller]
    pub(crate) fn load(&self, metadata: &[u8]) -> corelane_conn_t {
        let mut conn = 0;
        ok(c!(corelane_load_peer(self.0, metadata.as_ptr().cast(), metadata.len(), &raw mut conn)));
        assert_ne!(conn, 0);
        conn
    }

    #[track_caller]
    pub(crate) fn register(&self, memory: &Buffer, access: u32) -> corelane_region_t {
        let mut region = 0;
        ok(c!(corelane_reg(
            self.0,
            pointer(memory),
            memory.len(),
            CORELANE_MEMORY_DRAM,
            0,
            access,
            &raw mut region
        )));
        assert_ne!(region, 0);
        region
    }

    /// Memory of the engine, whose address nobody needs.
    #[track_caller]
    pub(crate) fn allocate(&self, len: usize, access: u32) -> corelane_region_t {
        let (mut addr, mut region) = (null_mut(), 0);
        ok(c!(corelane_alloc(self.0, len, access, &raw mut addr, &raw mut region)));
        assert!(!addr.is_null() && region != 0);
        region
    }

    #[track_caller]
    pub(crate) fn import(&self, descriptor: &[u8]) -> corelane_desc_t {
        let mut desc = 0;
        ok(c!(corelane_import_descriptor(
            self.0,
            descriptor.as_ptr().cast(),
            descriptor.len(),
            &raw mut desc
        )));
        assert_ne!(desc, 0);
        desc
    }

    #[track_caller]
    pub(crate) fn option(&self, name: &str) -> String {
        let name = c_string(name);
        let value = filled(|buffer, capacity, len| {
            c!(corelane_get_option(self.0, name.as_ptr(), buffer, capacity, len))
        });
        String::from_utf8(value).unwrap()
    }

    #[track_caller]
    pub(crate) fn stats(&self) -> corelane_engine_stats {
        let mut stats = corelane_engine_stats::default();
        ok(c!(corelane_stats(self.0, &raw mut stats, size_of_val(&stats))));
        stats
    }

    /// Notifications that arrive within the bound, at least `count`: from whom, and what.
    #[track_caller]
    pub(crate) fn collect(&self, count: usize) -> Vec<(String, Vec<u8>)> {
        let mut all = Vec::new();
        let deadline = std::time::Instant::now() + BOUND;
        while all.len() < count {
            assert!(std::time::Instant::now() < deadline, "{} of {count} notifications", all.len());
            let mut new = 0;
            let before = all.len();
            ok(c!(corelane_wait_notifs(
                self.0,
                100,
                Some(take),
                (&raw mut all).cast(),
                &raw mut new
            )));
            assert_eq!(new, all.len() - before);
        }
        all
    }
}

/// A taker of notifications whose context is a list of them.
pub(crate) unsafe extern "C" fn take(
    context: *mut c_void,
    from: *const c_char,
    from_len: usize,
    payload: *const c_void,
    payload_len: usize,
) {
    // SAFETY: the library passes what it promises, and the context that the test gave it.
    unsafe {
        let list = &mut *context.cast::<Vec<(String, Vec<u8>)>>();
        let from = std::slice::from_raw_parts(from.cast::<u8>(), from_len);
        let payload = std::slice::from_raw_parts(payload.cast::<u8>(), payload_len);
        list.push((String::from_utf8(from.to_vec()).unwrap(), payload.to_vec()));
    }
}

/// The first byte of a buffer.
pub(crate) fn pointer(memory: &Buffer) -> *mut c_void {
    memory.address(0) as *mut c_void
}

#[track_caller]
pub(crate) fn descriptor_of(region: corelane_region_t) -> Vec<u8> {
    filled(|buffer, capacity, len| c!(corelane_get_descriptor(region, buffer, capacity, len)))
}

#[track_caller]
pub(crate) fn error_of(xfer: corelane_xfer_t) -> String {
    let words =
        filled(|buffer, capacity, len| c!(corelane_xfer_error(xfer, buffer, capacity, len)));
    String::from_utf8(words).unwrap()
}

#[track_caller]
pub(crate) fn send(conn: corelane_conn_t, payload: &[u8]) {
    ok(c!(corelane_send_notif(conn, payload.as_ptr().cast(), payload.len())));
}

/// Posts and waits; the status in which it ended.
#[track_caller]
pub(crate) fn run(xfer: corelane_xfer_t) -> corelane_status {
    ok(corelane_post(xfer));
    ended(xfer)
}

/// Waits; the status in which it ended, which asking again does not change.
#[track_caller]
pub(crate) fn ended(xfer: corelane_xfer_t) -> corelane_status {
    let status = corelane_xfer_wait(xfer, BOUND_MS);
    assert_ne!(status, CORELANE_IN_PROGRESS, "it has not ended");
    for _ in 0..3 {
        assert_eq!(corelane_xfer_status(xfer), status);
        assert_eq!(corelane_xfer_wait(xfer, 0), status);
        assert_eq!(error_of(xfer).is_empty(), status == CORELANE_OK);
    }
    status
}

/// An engine with memory, and what another engine lets it use of its own.
pub(crate) struct Side {
    pub(crate) memory: Buffer,
    pub(crate) region: corelane_region_t,
    pub(crate) conn: corelane_conn_t,
    pub(crate) desc: corelane_desc_t,
    /// The other side's first byte.
    pub(crate) remote: u64,
    pub(crate) engine: Engine,
}

impl Side {
    /// An engine named `near` that knows a peer by its metadata, and the descriptor of its region.
    #[track_caller]
    pub(crate) fn new(
        options: &[(&str, &str)],
        len: usize,
        metadata: &[u8],
        descriptor: &[u8],
    ) -> Self {
        let engine = Engine::with("near", options);
        let memory = Buffer::new(len);
        let region = engine.register(&memory, 3);
        let conn = engine.load(metadata);
        let desc = engine.import(descriptor);
        let mut info =
            corelane_region_info { addr: 0, len: 0, kind: 9, device: 9, access: 9, reserved: 9 };
        ok(c!(corelane_descriptor_info(desc, &raw mut info)));
        Self { memory, region, conn, desc, remote: info.addr, engine }
    }

    /// Ranges of both sides that begin at `offset`.
    pub(crate) fn segments(
        &self,
        offset: u64,
        len: u64,
    ) -> (corelane_local_segment, corelane_remote_segment) {
        let addr = self.memory.address(0) + offset;
        (
            corelane_local_segment { addr, len, region: 0 },
            corelane_remote_segment { desc: self.desc, addr: self.remote + offset, len },
        )
    }

    #[track_caller]
    pub(crate) fn prepare(&self, operation: u32, len: u64) -> corelane_xfer_t {
        let (local, remote) = self.segments(0, len);
        let mut xfer = 0;
        ok(c!(corelane_prepare(
            self.conn,
            operation,
            &raw const local,
            &raw const remote,
            1,
            &raw mut xfer
        )));
        assert_ne!(xfer, 0);
        xfer
    }
}

/// Two engines in this process: what one side can use of the other, whose memory holds pattern 1.
pub(crate) struct Pair {
    pub(crate) near: Side,
    pub(crate) far_memory: Buffer,
    pub(crate) far_region: corelane_region_t,
    pub(crate) far: Engine,
}

impl Pair {
    #[track_caller]
    pub(crate) fn new(len: usize) -> Self {
        Self::with(len, &[])
    }

    #[track_caller]
    pub(crate) fn with(len: usize, options: &[(&str, &str)]) -> Self {
        let far = Engine::with("far", options);
        let far_memory = Buffer::with_pattern(1, len);
        let far_region = far.register(&far_memory, 3);
        let near = Side::new(options, len, &far.metadata(), &descriptor_of(far_region));
        Self { near, far_memory, far_region, far }
    }
}

/// Every function that takes a connection and lists of ranges, with the right arguments but for what the caller
/// changes: `conn`, `local` lists, `remote` lists.
pub(crate) struct Lists {
    pub(crate) conn: corelane_conn_t,
    pub(crate) local: corelane_local_segment,
    pub(crate) remote: corelane_remote_segment,
    pub(crate) indices: [u32; 2],
}

impl Lists {
    pub(crate) fn of(side: &Side) -> Self {
        let (local, remote) = side.segments(0, 64);
        Self { conn: side.conn, local, remote, indices: [0, 1] }
    }

    /// Calls the function of this number, of 8; the handle that it stored.
    pub(crate) fn call(&self, number: usize) -> (&'static str, corelane_status, corelane_xfer_t) {
        let (conn, local, remote) = (self.conn, &raw const self.local, &raw const self.remote);
        let own = corelane_local_blocks {
            base: self.local.addr,
            stride: 64,
            block_bytes: self.local.len,
            indices: self.indices.as_ptr(),
            count: self.indices.len(),
        };
        let theirs = corelane_remote_blocks {
            desc: self.remote.desc,
            base: self.remote.addr,
            stride: 64,
            block_bytes: self.remote.len,
            indices: self.indices.as_ptr(),
            count: self.indices.len(),
        };
        let (own, theirs) = (&raw const own, &raw const theirs);
        let (desc, here, there) = (self.remote.desc, self.local.addr, self.remote.addr);
        let mut xfer = 0xdead;
        let place = &raw mut xfer;
        let (name, status) = match number {
            0 => ("prepare", c!(corelane_prepare(conn, CORELANE_READ, local, remote, 1, place))),
            1 => (
                "prepare_strided",
                c!(corelane_prepare_strided(conn, CORELANE_WRITE, own, theirs, place)),
            ),
            2 => ("read", c!(corelane_read(conn, here, desc, there, self.local.len, place))),
            3 => ("write", c!(corelane_write(conn, here, desc, there, self.local.len, place))),
            4 => ("readv", c!(corelane_readv(conn, local, remote, 1, place))),
            5 => ("writev", c!(corelane_writev(conn, local, remote, 1, place))),
            6 => ("read_strided", c!(corelane_read_strided(conn, own, theirs, place))),
            _ => ("write_strided", c!(corelane_write_strided(conn, own, theirs, place))),
        };
        (name, status, xfer)
    }

    pub(crate) const FUNCTIONS: std::ops::Range<usize> = 0..8;
}

/// A pointer that is not null and not aligned for anything longer than a byte.
pub(crate) fn unaligned<T>(place: &mut [u64; 4]) -> *mut T {
    place.as_mut_ptr().cast::<u8>().wrapping_add(1).cast()
}

/// No options.
pub(crate) const NO_OPTIONS: *const corelane_option = null();
