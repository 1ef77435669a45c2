//! The C++ side of NIXL as far as its C API does not show it: strings, and the status codes of the agent itself.
//!
//! The C API's handles are structures whose first field points to the C++ object, and its optional arguments start with
//! the C++ ones. The functions are looked up by their mangled names in the library that the C API has loaded.

use std::ffi::{CString, c_char, c_int, c_void};
use std::marker::PhantomPinned;
use std::pin::Pin;
use std::sync::OnceLock;

/// A `std::string` of libstdc++: pointer, length, and the capacity or up to 15 bytes in place. What it points to
/// outside itself comes from malloc, which is libstdc++'s `operator new`, and is given back with it.
#[repr(C)]
pub(crate) struct CxxString {
    data: *mut u8,
    len: usize,
    place: [u64; 2],
    _pinned: PhantomPinned,
}

impl CxxString {
    /// A copy of `bytes`, with the zero behind them that C++ promises its readers.
    pub(crate) fn reading(bytes: &[u8]) -> Self {
        // SAFETY: a fresh allocation of one byte more than is copied into it.
        let data = unsafe {
            let data = libc::malloc(bytes.len() + 1).cast::<u8>();
            assert!(!data.is_null(), "no memory");
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), data, bytes.len());
            data.add(bytes.len()).write(0);
            data
        };
        Self { data, len: bytes.len(), place: [bytes.len() as u64, 0], _pinned: PhantomPinned }
    }

    /// An empty string that C++ may write to.
    pub(crate) fn empty() -> Pin<Box<Self>> {
        let mut string = Box::new(Self {
            data: std::ptr::null_mut(),
            len: 0,
            place: [0; 2],
            _pinned: PhantomPinned,
        });
        string.data = (&raw mut string.place).cast();
        Box::into_pin(string)
    }

    /// A copy of its bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        // SAFETY: a string's own pointer and length, whoever wrote them last.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }.to_vec()
    }
}

impl Drop for CxxString {
    fn drop(&mut self) {
        if self.data != (&raw mut self.place).cast::<u8>() {
            // SAFETY: its own allocation, not used again.
            unsafe { libc::free(self.data.cast()) };
        }
    }
}

/// An agent of NIXL's C++ API.
pub(crate) type CxxAgent = *mut c_void;
/// Its request for a transfer.
pub(crate) type CxxRequest = *mut c_void;

/// What is asked of the C++ agent.
pub(crate) struct Functions {
    pub(crate) create_request: unsafe extern "C" fn(
        CxxAgent,
        *const c_int,
        *const c_void,
        *const c_void,
        *const CxxString,
        *mut CxxRequest,
        *const c_void,
    ) -> c_int,
    pub(crate) post: unsafe extern "C" fn(CxxAgent, CxxRequest, *const c_void) -> c_int,
    pub(crate) status: unsafe extern "C" fn(CxxAgent, CxxRequest) -> c_int,
    pub(crate) release: unsafe extern "C" fn(CxxAgent, CxxRequest) -> c_int,
    pub(crate) notify:
        unsafe extern "C" fn(CxxAgent, *const CxxString, *const CxxString, *const c_void) -> c_int,
    pub(crate) invalidate: unsafe extern "C" fn(CxxAgent, *const CxxString) -> c_int,
    pub(crate) connect: unsafe extern "C" fn(CxxAgent, *const CxxString, *const c_void) -> c_int,
    pub(crate) register: unsafe extern "C" fn(CxxAgent, *const c_void, *const c_void) -> c_int,
    pub(crate) deregister: unsafe extern "C" fn(CxxAgent, *const c_void, *const c_void) -> c_int,
    pub(crate) estimate: unsafe extern "C" fn(
        CxxAgent,
        CxxRequest,
        *mut i64,
        *mut i64,
        *mut c_int,
        *const c_void,
    ) -> c_int,
}

const STRING: &str = "NSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE";

/// The functions of the NIXL that is loaded.
pub(crate) fn functions() -> &'static Functions {
    static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
    FUNCTIONS.get_or_init(|| {
        let library = open("libnixl.so");
        // SAFETY: the mangled names carry the types of all arguments; `this` comes first, references are pointers.
        unsafe {
            Functions {
                create_request: function(library, "_ZNK9nixlAgent13createXferReqERK14nixl_xfer_op_tRK12nixlDescListI13nixlBasicDescES7_RK{S}RP12nixlXferReqHPK21nixlAgentOptionalArgs"),
                post: function(library, "_ZNK9nixlAgent11postXferReqEP12nixlXferReqHPK21nixlAgentOptionalArgs"),
                status: function(library, "_ZNK9nixlAgent13getXferStatusEP12nixlXferReqH"),
                release: function(library, "_ZNK9nixlAgent14releaseXferReqEP12nixlXferReqH"),
                notify: function(library, "_ZNK9nixlAgent8genNotifERK{S}S7_PK21nixlAgentOptionalArgs"),
                invalidate: function(library, "_ZN9nixlAgent18invalidateRemoteMDERK{S}"),
                connect: function(library, "_ZN9nixlAgent14makeConnectionERK{S}PK21nixlAgentOptionalArgs"),
                register: function(library, "_ZN9nixlAgent11registerMemERK12nixlDescListI12nixlBlobDescEPK21nixlAgentOptionalArgs"),
                deregister: function(library, "_ZN9nixlAgent13deregisterMemERK12nixlDescListI12nixlBlobDescEPK21nixlAgentOptionalArgs"),
                estimate: function(library, "_ZNK9nixlAgent16estimateXferCostEPK12nixlXferReqHRNSt6chrono8durationIlSt5ratioILl1ELl1000000EEEES8_R11nixl_cost_tPK21nixlAgentOptionalArgs"),
            }
        }
    })
}

/// Loads a library for good.
///
/// # Panics
///
/// When it cannot be loaded; with the loader's words.
#[track_caller]
pub(crate) fn open(name: &str) -> *mut c_void {
    let file = CString::new(name).expect("a name without zero bytes");
    // SAFETY: loading NIXL or the plugin under test, which is what this is all about.
    let library = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!library.is_null(), "loading {name}: {}", last_error());
    library
}

/// Finds a function of type `F`; `{S}` stands for the type `std::string`.
///
/// # Safety
///
/// `F` must be the type of a pointer to the function of that name.
#[track_caller]
pub(crate) unsafe fn function<F: Copy>(library: *mut c_void, name: &str) -> F {
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>(), "a pointer to a function");
    let address = find(library, name);
    // SAFETY: as large as a pointer, and of the right type as this function asks.
    unsafe { std::mem::transmute_copy(&address) }
}

#[track_caller]
fn find(library: *mut c_void, name: &str) -> *mut c_void {
    let name = name.replace("{S}", STRING);
    let symbol = CString::new(name.as_str()).expect("a name without zero bytes");
    // SAFETY: a handle of dlopen and a string that ends with zero.
    let function = unsafe { libc::dlsym(library, symbol.as_ptr()) };
    assert!(!function.is_null(), "this NIXL has no {name}");
    function
}

fn last_error() -> String {
    // SAFETY: dlerror gives null or a string that lives until this thread's next call.
    unsafe {
        let text: *const c_char = libc::dlerror();
        if text.is_null() {
            return String::new();
        }
        std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}
