//! An agent with the backend under test.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::{null, null_mut};

use corelane_tests::Buffer;

use crate::capi::{self, Handle};
use crate::cxx::{CxxAgent, CxxString, functions};
use crate::{Message, Operation, Range, Request, Status, backend, require_nixl};

/// How an agent is made.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whether NIXL asks for a progress thread, as Python's NIXL does.
    pub progress_thread: bool,
    /// Whether the agent locks (`NIXL_THREAD_SYNC_RW`). Without, as by default, it is for its callers to see that nobody
    /// changes what it knows (metadata, regions, peers) while others use it; the backend copes with everything.
    pub locking: bool,
    /// Whether NIXL measures each transfer.
    pub telemetry: bool,
    /// The backend's parameters.
    pub params: Vec<(String, String)>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { progress_thread: true, locking: false, telemetry: false, params: Vec::new() }
    }
}

/// The parameter of a backend that moves bytes with the help of its peers, and not by itself: one that stands still is
/// waited for.
pub const TCP: (&str, &str) = ("transports", "tcp");

/// Settings with parameters of the backend.
pub fn params(list: &[(&str, &str)]) -> Settings {
    let params = list.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    Settings { params, ..Settings::default() }
}

/// A NIXL agent, under sync mode NONE unless told otherwise, with one backend. Destroyed when dropped; its requests go before it.
#[derive(Debug)]
pub struct Agent {
    handle: Handle,
    backend: Handle,
    name: String,
}

// SAFETY: with sync mode NONE NIXL leaves it to the backend that any thread may call at any time, and that is tested.
unsafe impl Send for Agent {}
// SAFETY: as above.
unsafe impl Sync for Agent {}

impl Drop for Agent {
    fn drop(&mut self) {
        // SAFETY: both handles are ours, and nothing uses them afterwards.
        unsafe {
            if !self.backend.is_null() {
                capi::nixl_capi_destroy_backend(self.backend);
            }
            capi::nixl_capi_destroy_agent(self.handle);
        }
    }
}

/// Calls into the C API that cannot fail by any fault of the backend.
#[track_caller]
fn must(status: c_int) {
    assert_eq!(status, 0, "a call into NIXL's C API");
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("text without zero bytes")
}

impl Agent {
    /// An agent with default settings.
    #[track_caller]
    pub fn new(name: &str) -> Self {
        Self::with(name, &Settings::default())
    }

    /// An agent whose backend must come up.
    #[track_caller]
    pub fn with(name: &str, settings: &Settings) -> Self {
        Self::try_with(name, settings)
            .unwrap_or_else(|| panic!("{} was not created with {settings:?}", backend()))
    }

    /// An agent, or `None` where its backend could not be created.
    #[track_caller]
    pub fn try_with(name: &str, settings: &Settings) -> Option<Self> {
        let mut agent = Self::bare(name, settings);
        let plugin = c_string(&backend());
        let params = parameters(&settings.params);
        // SAFETY: live handles, strings that end with zero, and a place for the result.
        let created = unsafe {
            let created = capi::nixl_capi_create_backend(
                agent.handle,
                plugin.as_ptr(),
                params,
                &raw mut agent.backend,
            );
            capi::nixl_capi_destroy_params(params);
            created
        };
        (created == 0).then_some(agent)
    }

    /// An agent without a backend.
    #[track_caller]
    pub fn bare(name: &str, settings: &Settings) -> Self {
        require_nixl();
        let config = capi::AgentConfig {
            progress_thread: settings.progress_thread,
            listen_thread: false,
            listen_port: 0,
            thread_sync: if settings.locking { 2 } else { 0 },
            workers: 1,
            progress_delay_us: 0,
            listen_delay_us: 100_000,
            telemetry: settings.telemetry,
        };
        let (mut handle, c_name) = (null_mut(), c_string(name));
        // SAFETY: a string that ends with zero, a whole configuration, and a place for the result.
        must(unsafe {
            capi::nixl_capi_create_configured_agent(c_name.as_ptr(), &config, &raw mut handle)
        });
        Self { handle, backend: null_mut(), name: name.to_owned() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn handle(&self) -> Handle {
        self.handle
    }

    pub(crate) fn cxx(&self) -> CxxAgent {
        // SAFETY: the first field of the handle's structure is the C++ agent.
        unsafe { *self.handle.cast::<CxxAgent>() }
    }

    /// The options of the backend with their defaults, and the kinds of memory, as the plugin tells them.
    #[track_caller]
    pub fn plugin_options(&self) -> (Vec<(String, String)>, Vec<i32>) {
        let (mut mems, mut params, mut iterator) = (null_mut(), null_mut(), null_mut());
        let plugin = c_string(&backend());
        let (mut list, mut kinds) = (Vec::new(), Vec::new());
        // SAFETY: live handles, places for results; texts are copied before the iterator moves on.
        unsafe {
            must(capi::nixl_capi_get_plugin_params(
                self.handle,
                plugin.as_ptr(),
                &raw mut mems,
                &raw mut params,
            ));
            must(capi::nixl_capi_params_create_iterator(params, &raw mut iterator));
            let (mut key, mut value, mut more) = (null(), null(), true);
            while more {
                let status = capi::nixl_capi_params_iterator_next(
                    iterator,
                    &raw mut key,
                    &raw mut value,
                    &raw mut more,
                );
                if status != 0 || key.is_null() {
                    break;
                }
                list.push((copied(key), copied(value)));
            }
            capi::nixl_capi_params_destroy_iterator(iterator);
            capi::nixl_capi_destroy_params(params);
            let mut size = 0;
            must(capi::nixl_capi_mem_list_size(mems, &raw mut size));
            for index in 0..size {
                let mut kind = 0;
                must(capi::nixl_capi_mem_list_get(mems, index, &raw mut kind));
                kinds.push(kind);
            }
            capi::nixl_capi_destroy_mem_list(mems);
        }
        (list, kinds)
    }

    // --- memory

    /// Registers all of a buffer.
    #[track_caller]
    pub fn register(&self, buffer: &Buffer) {
        self.register_ranges(&[(buffer.address(0), buffer.len())], 0).expect("registering memory");
    }

    /// Registers ranges, as memory of device `device` (of main memory any number will do).
    pub fn register_ranges(&self, ranges: &[Range], device: u64) -> Result<(), Status> {
        let list = RegistrationList::new(ranges, device);
        // SAFETY: a live agent and a list of its own kind; no options.
        Status(unsafe { (functions().register)(self.cxx(), list.cxx(), null()) }).success()
    }

    /// Takes registrations back.
    pub fn deregister_ranges(&self, ranges: &[Range], device: u64) -> Result<(), Status> {
        let list = RegistrationList::new(ranges, device);
        // SAFETY: as above.
        Status(unsafe { (functions().deregister)(self.cxx(), list.cxx(), null()) }).success()
    }

    /// Takes the registration of a buffer back.
    pub fn deregister(&self, buffer: &Buffer) -> Result<(), Status> {
        self.deregister_ranges(&[(buffer.address(0), buffer.len())], 0)
    }

    /// Which of the ranges the backend knows.
    #[track_caller]
    pub fn query(&self, ranges: &[Range]) -> Vec<bool> {
        let list = RegistrationList::new(ranges, 0);
        let args = OptionalArgs::new(None);
        let mut response = null_mut();
        // SAFETY: live handles and places for the results.
        unsafe {
            must(capi::nixl_capi_opt_args_add_backend(args.0, self.backend));
            must(capi::nixl_capi_create_query_resp_list(&raw mut response));
            must(capi::nixl_capi_query_mem(self.handle, list.0, response, args.0));
            let mut size = 0;
            must(capi::nixl_capi_query_resp_list_size(response, &raw mut size));
            let known = |index| {
                let mut known = false;
                must(capi::nixl_capi_query_resp_list_has_value(response, index, &raw mut known));
                known
            };
            let answer = (0..size).map(known).collect();
            capi::nixl_capi_destroy_query_resp_list(response);
            answer
        }
    }

    // --- metadata

    /// What another agent needs to know of this one.
    #[track_caller]
    pub fn metadata(&self) -> Vec<u8> {
        let (mut data, mut len) = (null_mut(), 0);
        // SAFETY: a live agent and places for the result.
        must(unsafe { capi::nixl_capi_get_local_md(self.handle, &raw mut data, &raw mut len) });
        taken(data, len)
    }

    /// The same for some ranges only, without how to connect. No ranges: only how to connect.
    #[track_caller]
    pub fn partial_metadata(&self, ranges: &[Range]) -> Vec<u8> {
        let list = RegistrationList::new(ranges, 0);
        let (mut data, mut len) = (null_mut(), 0);
        // SAFETY: live handles and places for the result; no options.
        must(unsafe {
            capi::nixl_capi_get_local_partial_md(
                self.handle,
                list.0,
                &raw mut data,
                &raw mut len,
                null_mut(),
            )
        });
        taken(data, len)
    }

    /// Makes another agent known to this one; the answer is its name. By the C API, since NIXL throws at some metadata:
    /// that, and more, is `BACKEND` here.
    pub fn load(&self, metadata: &[u8]) -> Result<String, Status> {
        let mut name = null_mut();
        // SAFETY: a live agent, bytes to read, a place for the result.
        let status = unsafe {
            capi::nixl_capi_load_remote_md(
                self.handle,
                metadata.as_ptr().cast(),
                metadata.len(),
                &raw mut name,
            )
        };
        match status {
            0 => {
                // SAFETY: a string from malloc, which is ours now.
                let text = unsafe { copied(name) };
                // SAFETY: as above; it was copied.
                unsafe { libc::free(name.cast()) };
                Ok(text)
            }
            -1 => Err(Status::INVALID_PARAM),
            -6 => Err(Status::NOT_FOUND),
            _ => Err(Status::BACKEND),
        }
    }

    /// Makes each of two agents known to the other.
    #[track_caller]
    pub fn exchange_metadata(&self, other: &Self) {
        assert_eq!(self.load(&other.metadata()).as_deref(), Ok(other.name()));
        assert_eq!(other.load(&self.metadata()).as_deref(), Ok(self.name()));
    }

    /// Forgets another agent.
    pub fn invalidate(&self, peer: &str) -> Result<(), Status> {
        let name = CxxString::reading(peer.as_bytes());
        // SAFETY: a live agent and a string to read.
        Status(unsafe { (functions().invalidate)(self.cxx(), &name) }).success()
    }

    /// Whether NIXL knows another agent.
    pub fn knows(&self, peer: &str) -> bool {
        let name = c_string(peer);
        // SAFETY: a live agent and a string that ends with zero; no list is allowed.
        let status =
            unsafe { capi::nixl_capi_check_remote_md(self.handle, name.as_ptr(), null_mut()) };
        status == 0
    }

    /// Connects to another agent, or to itself.
    pub fn connect(&self, peer: &str) -> Result<(), Status> {
        let name = CxxString::reading(peer.as_bytes());
        // SAFETY: a live agent and a string to read; no options.
        Status(unsafe { (functions().connect)(self.cxx(), &name, null()) }).success()
    }

    // --- notifications

    /// Sends a free-standing notification.
    pub fn notify(&self, peer: &str, payload: &[u8]) -> Result<(), Status> {
        let (name, payload) = (CxxString::reading(peer.as_bytes()), CxxString::reading(payload));
        // SAFETY: a live agent and strings to read; no options.
        Status(unsafe { (functions().notify)(self.cxx(), &name, &payload, null()) }).success()
    }

    /// The notifications that have come, in their order for each sender.
    #[track_caller]
    pub fn notifications(&self) -> Vec<Message> {
        let (mut map, mut senders, mut messages) = (null_mut(), 0, Vec::new());
        // SAFETY: live handles and places for results; names and payloads are copied while the map lives.
        unsafe {
            must(capi::nixl_capi_create_notif_map(&raw mut map));
            let status = capi::nixl_capi_get_notifs(self.handle, map, null_mut());
            assert_eq!(status, 0, "getting notifications");
            must(capi::nixl_capi_notif_map_size(map, &raw mut senders));
            for sender in 0..senders {
                let (mut name, mut count) = (null(), 0);
                must(capi::nixl_capi_notif_map_get_agent_at(map, sender, &raw mut name));
                must(capi::nixl_capi_notif_map_get_notifs_size(map, name, &raw mut count));
                for index in 0..count {
                    let (mut data, mut len) = (null(), 0);
                    must(capi::nixl_capi_notif_map_get_notif(
                        map,
                        name,
                        index,
                        &raw mut data,
                        &raw mut len,
                    ));
                    let payload = std::slice::from_raw_parts(data.cast::<u8>(), len).to_vec();
                    messages.push(Message { from: copied(name), payload });
                }
            }
            capi::nixl_capi_destroy_notif_map(map);
        }
        messages
    }

    // --- transfers

    /// Prepares a transfer between ranges of this agent and as many of a peer.
    pub fn prepare(
        &self,
        operation: Operation,
        local: &[Range],
        peer: &str,
        remote: &[Range],
    ) -> Result<Request<'_>, Status> {
        Request::prepare(self, operation, local, peer, remote, None)
    }

    /// The same, with a notification that every posting carries which says nothing else.
    pub fn prepare_with_notification(
        &self,
        operation: Operation,
        local: &[Range],
        peer: &str,
        remote: &[Range],
        payload: &[u8],
    ) -> Result<Request<'_>, Status> {
        Request::prepare(self, operation, local, peer, remote, Some(payload))
    }

    /// Prepares, posts, waits and releases.
    pub fn transfer(
        &self,
        operation: Operation,
        local: &[Range],
        peer: &str,
        remote: &[Range],
    ) -> Result<(), Status> {
        self.prepare(operation, local, peer, remote)?.run()
    }
}

/// The bytes that the C API has allocated for us.
fn taken(data: *mut c_void, len: usize) -> Vec<u8> {
    // SAFETY: the C API gave `len` bytes from malloc, which are ours now.
    unsafe {
        let bytes = std::slice::from_raw_parts(data.cast::<u8>(), len).to_vec();
        libc::free(data);
        bytes
    }
}

/// A copy of a text of the C API's.
///
/// # Safety
///
/// `text` must be a live string that ends with zero.
unsafe fn copied(text: *const c_char) -> String {
    // SAFETY: as this function asks.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn parameters(list: &[(String, String)]) -> Handle {
    let mut params = null_mut();
    // SAFETY: a place for the result, then a live handle and strings that end with zero.
    unsafe {
        must(capi::nixl_capi_create_params(&raw mut params));
        for (key, value) in list {
            let (key, value) = (c_string(key), c_string(value));
            must(capi::nixl_capi_params_add(params, key.as_ptr(), value.as_ptr()));
        }
    }
    params
}

/// A list of descriptors of main memory to register, to ask about or to describe.
struct RegistrationList(Handle);

impl RegistrationList {
    #[track_caller]
    fn new(ranges: &[Range], device: u64) -> Self {
        let mut list = null_mut();
        // SAFETY: a place for the result, then a live handle; no metadata comes with a descriptor.
        unsafe {
            must(capi::nixl_capi_create_reg_dlist(0, &raw mut list));
            for &(addr, len) in ranges {
                must(capi::nixl_capi_reg_dlist_add_desc(
                    list,
                    addr as usize,
                    len,
                    device,
                    null(),
                    0,
                ));
            }
        }
        Self(list)
    }

    fn cxx(&self) -> *const c_void {
        // SAFETY: the first field of the handle's structure is the C++ list.
        unsafe { *self.0.cast::<*const c_void>() }
    }
}

impl Drop for RegistrationList {
    fn drop(&mut self) {
        // SAFETY: our own handle, not used again.
        unsafe { capi::nixl_capi_destroy_reg_dlist(self.0) };
    }
}

/// Optional arguments: with a notification, or expressly without.
pub(crate) struct OptionalArgs(pub(crate) Handle);

impl OptionalArgs {
    #[track_caller]
    pub(crate) fn new(notification: Option<&[u8]>) -> Self {
        let mut args = null_mut();
        // SAFETY: a place for the result, then a live handle and bytes to read.
        unsafe {
            must(capi::nixl_capi_create_opt_args(&raw mut args));
            if let Some(payload) = notification {
                must(capi::nixl_capi_opt_args_set_notif_msg(
                    args,
                    payload.as_ptr().cast(),
                    payload.len(),
                ));
                must(capi::nixl_capi_opt_args_set_has_notif(args, true));
            }
        }
        Self(args)
    }
}

impl Drop for OptionalArgs {
    fn drop(&mut self) {
        // SAFETY: our own handle, not used again.
        unsafe { capi::nixl_capi_destroy_opt_args(self.0) };
    }
}
