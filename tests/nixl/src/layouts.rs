//! The structures of NIXL's plugin interface and what they hold of C++: as in the wheels 1.0.0 .. 1.5.1 (docs/nixl.md).

use std::ffi::{c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use crate::Range;
use crate::cxx::{CxxString, function, open};

/// A `std::vector`.
#[repr(C)]
pub(crate) struct CxxVector<T> {
    pub(crate) begin: *mut T,
    pub(crate) end: *mut T,
    pub(crate) limit: *mut T,
}

impl<T> CxxVector<T> {
    pub(crate) fn empty() -> Self {
        Self { begin: null_mut(), end: null_mut(), limit: null_mut() }
    }

    pub(crate) fn reading(items: &[T]) -> Self {
        let range = items.as_ptr_range();
        Self {
            begin: range.start.cast_mut(),
            end: range.end.cast_mut(),
            limit: range.end.cast_mut(),
        }
    }

    pub(crate) fn items(&self) -> &[T] {
        if self.begin.is_null() {
            return &[];
        }
        // SAFETY: begin and end bound the items, whoever wrote them.
        unsafe { std::slice::from_raw_parts(self.begin, self.end.offset_from_unsigned(self.begin)) }
    }

    /// Gives the array back, not what its items own.
    pub(crate) fn free(&self) {
        // SAFETY: libstdc++'s `operator new` is malloc; not used again.
        unsafe { libc::free(self.begin.cast()) };
    }
}

/// A `std::unordered_map<std::string, std::string>` that is only read.
#[repr(C)]
pub(crate) struct CxxMap {
    pub(crate) buckets: *const *const MapNode,
    pub(crate) bucket_count: usize,
    pub(crate) first: *const MapNode,
    pub(crate) len: usize,
    pub(crate) max_load: f32,
    pub(crate) next_resize: usize,
    pub(crate) single_bucket: *const MapNode,
}

#[repr(C)]
pub(crate) struct MapNode {
    pub(crate) next: *const MapNode,
    pub(crate) key: CxxString,
    pub(crate) value: CxxString,
    pub(crate) hash: usize,
}

/// A map, and what it points to.
pub(crate) struct Parameters {
    pub(crate) map: Box<CxxMap>,
    pub(crate) _nodes: Vec<MapNode>,
}

impl Parameters {
    pub(crate) fn new(list: &[(&str, &str)]) -> Self {
        let mut nodes: Vec<MapNode> = list
            .iter()
            .map(|(key, value)| MapNode {
                next: null(),
                key: CxxString::reading(key.as_bytes()),
                value: CxxString::reading(value.as_bytes()),
                hash: hash(key.as_bytes()),
            })
            .collect();
        for index in 1..nodes.len() {
            nodes[index - 1].next = &raw const nodes[index];
        }
        let mut map = Box::new(CxxMap {
            buckets: null(),
            bucket_count: 1,
            first: if nodes.is_empty() { null() } else { nodes.as_ptr() },
            len: nodes.len(),
            max_load: 1.0,
            next_resize: 0,
            single_bucket: null(),
        });
        // A bucket holds what comes before its first node.
        if !nodes.is_empty() {
            map.single_bucket = (&raw const map.first).cast();
        }
        map.buckets = &raw const map.single_bucket;
        Self { map, _nodes: nodes }
    }
}

/// libstdc++'s hash of a string.
pub(crate) fn hash(bytes: &[u8]) -> usize {
    static FUNCTION: OnceLock<unsafe extern "C" fn(*const u8, usize, usize) -> usize> =
        OnceLock::new();
    let function = FUNCTION.get_or_init(|| {
        let library = open("libstdc++.so.6");
        // SAFETY: the mangled name carries the types.
        unsafe { function(library, "_ZSt11_Hash_bytesPKvmm") }
    });
    // SAFETY: bytes and their number.
    unsafe { function(bytes.as_ptr(), bytes.len(), 0xc70f_6907) }
}

#[repr(C)]
pub(crate) struct InitParams {
    pub(crate) local_agent: CxxString,
    pub(crate) kind: CxxString,
    pub(crate) params: *const CxxMap,
    pub(crate) progress_thread: bool,
    pub(crate) progress_delay_us: u64,
    pub(crate) sync_mode: c_int,
    pub(crate) telemetry: bool,
}

#[repr(C)]
pub(crate) struct Plugin {
    pub(crate) api_version: c_int,
    pub(crate) create: unsafe extern "C" fn(*const InitParams) -> *mut Object,
    pub(crate) destroy: unsafe extern "C" fn(*mut Object),
    pub(crate) name: unsafe extern "C" fn() -> *const c_char,
    pub(crate) version: unsafe extern "C" fn() -> *const c_char,
    pub(crate) options: *const c_void,
    pub(crate) mems: *const c_void,
}

/// The engine as C++ sees it: the pointer to its virtual functions comes first.
#[repr(C)]
pub(crate) struct Object {
    pub(crate) functions: *const *const c_void,
}

#[repr(C)]
pub(crate) struct BlobDescriptor {
    pub(crate) addr: u64,
    pub(crate) len: usize,
    pub(crate) device: u64,
    pub(crate) blob: CxxString,
}

/// A range and the metadata that the engine has given for it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct MetaDescriptor {
    /// Address.
    pub addr: u64,
    /// Bytes.
    pub len: usize,
    /// Device.
    pub device: u64,
    /// What registerMem's `loadLocalMD`, or `loadRemoteMD`, gave.
    pub metadata: Metadata,
}

#[repr(C)]
pub(crate) struct List<T> {
    pub(crate) functions: *const c_void,
    pub(crate) kind: c_int,
    pub(crate) items: CxxVector<T>,
}

impl<T> List<T> {
    pub(crate) fn reading(items: &[T]) -> Self {
        Self { functions: null(), kind: 0, items: CxxVector::reading(items) }
    }
}

#[repr(C)]
pub(crate) struct OptionalArgs {
    pub(crate) notification: CxxString,
    pub(crate) has_notification: bool,
    pub(crate) custom: CxxString,
}

/// A `nixlBackendMD *`.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata(pub(crate) *mut c_void);

/// A `nixlBackendReqH *`.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handle(pub(crate) *mut c_void);

// SAFETY: what a pointer is good for is the engine's business, from any thread.
unsafe impl Send for Metadata {}
// SAFETY: as above.
unsafe impl Sync for Metadata {}
// SAFETY: as above.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

const _: () = {
    assert!(size_of::<CxxString>() == 32 && size_of::<CxxMap>() == 56);
    assert!(size_of::<InitParams>() == 96 && size_of::<Plugin>() == 56);
    assert!(std::mem::offset_of!(InitParams, params) == 64);
    assert!(std::mem::offset_of!(InitParams, telemetry) == 92);
    assert!(size_of::<BlobDescriptor>() == 56 && size_of::<MetaDescriptor>() == 32);
    assert!(size_of::<List<MetaDescriptor>>() == 40);
    assert!(size_of::<OptionalArgs>() == 72);
    assert!(std::mem::offset_of!(OptionalArgs, custom) == 40);
};

/// A descriptor of a range for which the engine has given `metadata`.
pub fn descriptor((addr, len): Range, metadata: Metadata) -> MetaDescriptor {
    MetaDescriptor { addr, len, device: 0, metadata }
}
