//! The plugin without an agent: what NIXL calls, called directly. An agent checks much before it asks its backend and
//! translates what comes back, so some of what a backend promises can only be seen here.

use std::ffi::{c_int, c_void};
use std::ptr::{null, null_mut};
use std::time::Instant;

use corelane_tests::BOUND;

use crate::cxx::CxxString;
use crate::layouts::{
    BlobDescriptor, CxxVector, Handle, InitParams, List, MetaDescriptor, Metadata, Object,
    OptionalArgs, Parameters,
};
use crate::plugin::plugin;
use crate::{Message, Operation, Range, Status};

/// The virtual functions, by their place behind the two destructors' (`abi.rs` compares the places with a wheel's).
mod slot {
    pub(super) const SUPPORTS_REMOTE: usize = 2;
    pub(super) const SUPPORTS_LOCAL: usize = 3;
    pub(super) const SUPPORTS_NOTIF: usize = 4;
    pub(super) const SUPPORTED_MEMS: usize = 5;
    pub(super) const REGISTER: usize = 6;
    pub(super) const DEREGISTER: usize = 7;
    pub(super) const CONNECT: usize = 8;
    pub(super) const DISCONNECT: usize = 9;
    pub(super) const UNLOAD: usize = 10;
    pub(super) const PREPARE: usize = 11;
    pub(super) const POST: usize = 12;
    pub(super) const CHECK: usize = 13;
    pub(super) const RELEASE: usize = 14;
    pub(super) const VIEW_OF_REMOTE: usize = 15;
    pub(super) const VIEW_OF_LOCAL: usize = 16;
    pub(super) const RELEASE_VIEW: usize = 17;
    pub(super) const PUBLIC_DATA: usize = 18;
    pub(super) const CONN_INFO: usize = 19;
    pub(super) const LOAD_CONN_INFO: usize = 20;
    pub(super) const LOAD_REMOTE: usize = 21;
    pub(super) const LOAD_LOCAL: usize = 22;
    pub(super) const GET_NOTIFS: usize = 23;
    pub(super) const NOTIFY: usize = 24;
    pub(super) const QUERY: usize = 25;
    pub(super) const ESTIMATE: usize = 26;
}

/// An engine of the plugin, without an agent around it.
#[derive(Debug)]
pub struct Engine(*mut Object);

// SAFETY: any thread may call at any time; that is tested.
unsafe impl Send for Engine {}
// SAFETY: as above.
unsafe impl Sync for Engine {}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: our own engine, not used again.
        unsafe { (plugin().destroy)(self.0) };
    }
}

/// Calls virtual function `$slot` of an engine: argument types in brackets, then the arguments.
macro_rules! call {
    ($engine:expr, $slot:expr, [$($kind:ty),*] -> $result:ty, $($argument:expr),*) => {{
        let object = $engine.0;
        // SAFETY: a live engine with the functions of the interface, called with the types that it declares.
        unsafe {
            let function = *(*object).functions.add($slot);
            let function = std::mem::transmute::<
                *const c_void,
                unsafe extern "C" fn(*mut Object, $($kind),*) -> $result,
            >(function);
            function(object, $($argument),*)
        }
    }};
}

impl Engine {
    /// An engine for the agent `name`.
    ///
    /// # Panics
    ///
    /// Where the plugin creates none.
    #[track_caller]
    pub fn new(name: &str, params: &[(&str, &str)]) -> Self {
        let parameters = Parameters::new(params);
        let init = InitParams {
            local_agent: CxxString::reading(name.as_bytes()),
            kind: CxxString::reading(b"CORELANE"),
            params: &raw const *parameters.map,
            progress_thread: true,
            progress_delay_us: 0,
            sync_mode: 0,
            telemetry: false,
        };
        // SAFETY: parameters as an agent would pass them.
        let engine = unsafe { (plugin().create)(&raw const init) };
        assert!(!engine.is_null(), "no engine with {params:?}");
        Self(engine)
    }

    /// What it supports: remote, local, notifications.
    pub fn supports(&self) -> [bool; 3] {
        [slot::SUPPORTS_REMOTE, slot::SUPPORTS_LOCAL, slot::SUPPORTS_NOTIF]
            .map(|slot| call!(self, slot, [] -> bool,))
    }

    /// The kinds of memory.
    pub fn memory_kinds(&self) -> Vec<i32> {
        let object = self.0;
        // SAFETY: a vector is returned into the place that the caller gives.
        let kinds = unsafe {
            let function = *(*object).functions.add(slot::SUPPORTED_MEMS);
            let function = std::mem::transmute::<
                *const c_void,
                unsafe extern "C" fn(*mut Object) -> CxxVector<c_int>,
            >(function);
            function(object)
        };
        let list = kinds.items().to_vec();
        kinds.free();
        list
    }

    /// What a peer needs to connect.
    #[track_caller]
    pub fn conn_info(&self) -> Vec<u8> {
        let string = CxxString::empty();
        let place = (&raw const *string).cast_mut();
        let status = Status(call!(self, slot::CONN_INFO, [*mut CxxString] -> c_int, place));
        assert_eq!(status, Status::SUCCESS, "getConnInfo");
        string.bytes()
    }

    /// Loads a peer's connection info.
    pub fn load_conn_info(&self, peer: &str, info: &[u8]) -> Status {
        let (peer, info) = (CxxString::reading(peer.as_bytes()), CxxString::reading(info));
        Status(call!(
            self, slot::LOAD_CONN_INFO, [*const CxxString, *const CxxString] -> c_int, &peer, &info
        ))
    }

    /// Connects.
    pub fn connect(&self, peer: &str) -> Status {
        let peer = CxxString::reading(peer.as_bytes());
        Status(call!(self, slot::CONNECT, [*const CxxString] -> c_int, &peer))
    }

    /// Disconnects.
    pub fn disconnect(&self, peer: &str) -> Status {
        let peer = CxxString::reading(peer.as_bytes());
        Status(call!(self, slot::DISCONNECT, [*const CxxString] -> c_int, &peer))
    }

    /// Registers memory.
    pub fn register(&self, (addr, len): Range, device: u64) -> Result<Metadata, Status> {
        let descriptor = BlobDescriptor { addr, len, device, blob: CxxString::reading(&[]) };
        let (kind, mut metadata) = (0, Metadata(null_mut()));
        let status = Status(call!(
            self, slot::REGISTER, [*const BlobDescriptor, *const c_int, *mut Metadata] -> c_int,
            &descriptor, &raw const kind, &raw mut metadata
        ));
        status.success().map(|()| metadata)
    }

    /// Takes a registration back.
    pub fn deregister(&self, metadata: Metadata) -> Status {
        Status(call!(self, slot::DEREGISTER, [Metadata] -> c_int, metadata))
    }

    /// The public form of a registration.
    #[track_caller]
    pub fn public_data(&self, metadata: Metadata) -> Vec<u8> {
        let string = CxxString::empty();
        let place = (&raw const *string).cast_mut();
        let status = Status(
            call!(self, slot::PUBLIC_DATA, [Metadata, *mut CxxString] -> c_int, metadata, place),
        );
        assert_eq!(status, Status::SUCCESS, "getPublicData");
        string.bytes()
    }

    /// Loads a peer's registration.
    pub fn load_remote(
        &self,
        (addr, len): Range,
        device: u64,
        data: &[u8],
        peer: &str,
    ) -> Result<Metadata, Status> {
        let descriptor = BlobDescriptor { addr, len, device, blob: CxxString::reading(data) };
        let (kind, mut metadata) = (0, Metadata(null_mut()));
        let peer = CxxString::reading(peer.as_bytes());
        let status = Status(call!(
            self, slot::LOAD_REMOTE,
            [*const BlobDescriptor, *const c_int, *const CxxString, *mut Metadata] -> c_int,
            &descriptor, &raw const kind, &peer, &raw mut metadata
        ));
        status.success().map(|()| metadata)
    }

    /// Loads a registration of its own, for transfers within the agent.
    pub fn load_local(&self, registered: Metadata) -> Result<Metadata, Status> {
        let mut metadata = Metadata(null_mut());
        let status = Status(call!(
            self, slot::LOAD_LOCAL, [Metadata, *mut Metadata] -> c_int, registered, &raw mut metadata
        ));
        status.success().map(|()| metadata)
    }

    /// Forgets what was loaded.
    pub fn unload(&self, metadata: Metadata) -> Status {
        Status(call!(self, slot::UNLOAD, [Metadata] -> c_int, metadata))
    }

    /// Prepares a transfer.
    pub fn prepare(
        &self,
        operation: Operation,
        local: &[MetaDescriptor],
        remote: &[MetaDescriptor],
        peer: &str,
    ) -> Result<Handle, Status> {
        let mut handle = Handle(null_mut());
        let status =
            self.submit(slot::PREPARE, operation, [local, remote], peer, &mut handle, None);
        status.success().map(|()| handle)
    }

    /// Posts a transfer.
    pub fn post(
        &self,
        operation: Operation,
        local: &[MetaDescriptor],
        remote: &[MetaDescriptor],
        peer: &str,
        mut handle: Handle,
        notification: Option<&[u8]>,
    ) -> Status {
        self.submit(slot::POST, operation, [local, remote], peer, &mut handle, notification)
    }

    fn submit(
        &self,
        slot: usize,
        operation: Operation,
        lists: [&[MetaDescriptor]; 2],
        peer: &str,
        handle: &mut Handle,
        notification: Option<&[u8]>,
    ) -> Status {
        let [local, remote] = lists.map(List::reading);
        let (operation, peer) = (operation as c_int, CxxString::reading(peer.as_bytes()));
        let args = OptionalArgs {
            notification: CxxString::reading(notification.unwrap_or_default()),
            has_notification: notification.is_some(),
            custom: CxxString::reading(&[]),
        };
        type Lists = *const List<MetaDescriptor>;
        Status(call!(
            self, slot,
            [*const c_int, Lists, Lists, *const CxxString, *mut Handle, *const OptionalArgs] -> c_int,
            &raw const operation, &local, &remote, &peer, handle, &args
        ))
    }

    /// How a transfer stands.
    pub fn check(&self, handle: Handle) -> Status {
        Status(call!(self, slot::CHECK, [Handle] -> c_int, handle))
    }

    /// Waits for a transfer's end.
    #[track_caller]
    pub fn wait(&self, handle: Handle) -> Status {
        let deadline = Instant::now() + BOUND;
        loop {
            match self.check(handle) {
                Status::IN_PROGRESS => {
                    assert!(Instant::now() < deadline, "a transfer without end");
                    std::thread::yield_now();
                }
                end => return end,
            }
        }
    }

    /// Releases a request.
    pub fn release(&self, handle: Handle) -> Status {
        Status(call!(self, slot::RELEASE, [Handle] -> c_int, handle))
    }

    /// Releases a request for good, asking again where that is needed.
    #[track_caller]
    pub fn release_for_good(&self, handle: Handle) {
        match self.release(handle) {
            Status::SUCCESS => {}
            Status::REPOST_ACTIVE => assert_eq!(self.release(handle), Status::SUCCESS),
            other => panic!("releaseReqH: {other}"),
        }
    }

    /// Sends a notification.
    pub fn notify(&self, peer: &str, payload: &[u8]) -> Status {
        let (peer, payload) = (CxxString::reading(peer.as_bytes()), CxxString::reading(payload));
        Status(call!(
            self, slot::NOTIFY, [*const CxxString, *const CxxString] -> c_int, &peer, &payload
        ))
    }

    /// The notifications that have come.
    #[track_caller]
    pub fn notifications(&self) -> Vec<Message> {
        let mut list = CxxVector::<[CxxString; 2]>::empty();
        let status = Status(call!(
            self, slot::GET_NOTIFS, [*mut CxxVector<[CxxString; 2]>] -> c_int, &raw mut list
        ));
        assert_eq!(status, Status::SUCCESS, "getNotifs");
        let messages = list
            .items()
            .iter()
            .map(|pair| {
                let [from, payload] = pair;
                let message = Message {
                    from: String::from_utf8_lossy(&from.bytes()).into_owned(),
                    payload: payload.bytes(),
                };
                // SAFETY: the vector's items, which nobody uses again.
                unsafe { std::ptr::drop_in_place((&raw const *pair).cast_mut()) };
                message
            })
            .collect();
        list.free();
        messages
    }

    /// Which ranges it knows.
    #[track_caller]
    pub fn query(&self, ranges: &[Range]) -> Vec<bool> {
        let descriptors: Vec<_> = ranges
            .iter()
            .map(|&(addr, len)| BlobDescriptor {
                addr,
                len,
                device: 0,
                blob: CxxString::reading(&[]),
            })
            .collect();
        let list = List::reading(&descriptors);
        // An optional map: the map, and whether it is there. (What the maps hold is not given back: a few bytes.)
        let mut answer = CxxVector::<[u64; 8]>::empty();
        let status = Status(call!(
            self, slot::QUERY, [*const List<BlobDescriptor>, *mut CxxVector<[u64; 8]>] -> c_int,
            &list, &raw mut answer
        ));
        assert_eq!(status, Status::SUCCESS, "queryMem");
        let known = answer.items().iter().map(|words| words[7].to_le_bytes()[0] != 0).collect();
        answer.free();
        known
    }

    /// What a transfer would take: microseconds, margin, method.
    pub fn estimate(
        &self,
        operation: Operation,
        local: &[MetaDescriptor],
        remote: &[MetaDescriptor],
        peer: &str,
        handle: Handle,
    ) -> Result<(i64, i64, i32), Status> {
        let lists = [local, remote].map(List::reading);
        let (operation, peer) = (operation as c_int, CxxString::reading(peer.as_bytes()));
        let (mut duration, mut margin, mut method) = (-1, -1, -1);
        type Lists = *const List<MetaDescriptor>;
        let status = Status(call!(
            self, slot::ESTIMATE,
            [*const c_int, Lists, Lists, *const CxxString, *const Handle, *mut i64, *mut i64, *mut c_int,
             *const c_void] -> c_int,
            &raw const operation, &lists[0], &lists[1], &peer, &raw const handle, &raw mut duration,
            &raw mut margin, &raw mut method, null()
        ));
        status.success().map(|()| (duration, margin, method))
    }

    /// Asks for views of memory, of a peer's and of its own; releases one that was never made.
    pub fn memory_views(&self, local: &[MetaDescriptor]) -> [Status; 2] {
        let (remote, local) = (List::<[u8; 64]>::reading(&[]), List::reading(local));
        let mut view: *mut c_void = null_mut();
        let of_remote = call!(
            self, slot::VIEW_OF_REMOTE,
            [*const List<[u8; 64]>, *mut *mut c_void, *const c_void] -> c_int,
            &remote, &raw mut view, null()
        );
        let of_local = call!(
            self, slot::VIEW_OF_LOCAL,
            [*const List<MetaDescriptor>, *mut *mut c_void, *const c_void] -> c_int,
            &local, &raw mut view, null()
        );
        call!(self, slot::RELEASE_VIEW, [*mut c_void] -> (), null_mut());
        [of_remote, of_local].map(Status)
    }
}
