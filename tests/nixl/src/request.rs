//! A prepared transfer.

use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::time::Instant;

use corelane_tests::BOUND;

use crate::agent::OptionalArgs;
use crate::capi::{self, Handle};
use crate::cxx::{CxxRequest, CxxString, functions};
use crate::{Agent, Range, Status};

/// The direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// From the peer's memory into this agent's.
    Read = 0,
    /// From this agent's memory into the peer's.
    Write = 1,
}

/// What a posting says about its notification.
#[derive(Debug, Clone, Copy)]
pub enum Notify<'a> {
    /// Nothing: the one of the preparation, or of the posting before, is carried over by NIXL.
    Carried,
    /// There is none.
    None,
    /// This one.
    With(&'a [u8]),
}

/// A request of an agent. Released when dropped; `std::mem::forget` leaves it to the agent's end.
#[derive(Debug)]
pub struct Request<'a> {
    agent: &'a Agent,
    request: CxxRequest,
}

// SAFETY: a request may be posted, asked and released by any thread, one at a time.
unsafe impl Send for Request<'_> {}
// SAFETY: asking is allowed to several threads at once; that is one of the things tested.
unsafe impl Sync for Request<'_> {}

impl<'a> Request<'a> {
    pub(crate) fn prepare(
        agent: &'a Agent,
        operation: Operation,
        local: &[Range],
        peer: &str,
        remote: &[Range],
        notification: Option<&[u8]>,
    ) -> Result<Self, Status> {
        let (local, remote) = (TransferList::new(local), TransferList::new(remote));
        let args = notification.map(|payload| OptionalArgs::new(Some(payload)));
        let (operation, peer) = (operation as i32, CxxString::reading(peer.as_bytes()));
        let mut request = null_mut();
        // SAFETY: a live agent, lists of its own kind, a string to read, a place for the result.
        let status = Status(unsafe {
            (functions().create_request)(
                agent.cxx(),
                &raw const operation,
                local.cxx(),
                remote.cxx(),
                &peer,
                &raw mut request,
                args.as_ref().map_or(null(), |args| args.0.cast_const()),
            )
        });
        status.success().map(|()| Self { agent, request })
    }

    /// Posts it; the answer is NIXL's.
    pub fn post(&self, notify: Notify<'_>) -> Status {
        let args = match notify {
            Notify::Carried => None,
            Notify::None => Some(OptionalArgs::new(None)),
            Notify::With(payload) => Some(OptionalArgs::new(Some(payload))),
        };
        let args = args.as_ref().map_or(null(), |args| args.0.cast_const());
        // SAFETY: a live agent and its request.
        Status(unsafe { (functions().post)(self.agent.cxx(), self.request, args) })
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        // SAFETY: a live agent and its request.
        Status(unsafe { (functions().status)(self.agent.cxx(), self.request) })
    }

    /// Waits for its end. Panics if there is none.
    #[track_caller]
    pub fn wait(&self) -> Result<(), Status> {
        let deadline = Instant::now() + BOUND;
        loop {
            match self.status() {
                Status::IN_PROGRESS => {
                    assert!(Instant::now() < deadline, "a transfer without end");
                    std::thread::yield_now();
                }
                end => return end.success(),
            }
        }
    }

    /// Posts it as `notify` says and waits for its end.
    #[track_caller]
    pub fn run_with(&self, notify: Notify<'_>) -> Result<(), Status> {
        match self.post(notify) {
            Status::SUCCESS | Status::IN_PROGRESS => self.wait(),
            error => Err(error),
        }
    }

    /// Posts it without a word on notifications and waits for its end.
    #[track_caller]
    pub fn run(&self) -> Result<(), Status> {
        self.run_with(Notify::Carried)
    }

    /// Releases it. `Err` is the status of a release that has to be asked for again, and the request.
    pub fn release(mut self) -> Result<(), (Status, Self)> {
        match self.release_once() {
            Status::SUCCESS => Ok(()),
            status => Err((status, self)),
        }
    }

    fn release_once(&mut self) -> Status {
        // SAFETY: a live agent and its request, which is forgotten when it is gone.
        let status = Status(unsafe { (functions().release)(self.agent.cxx(), self.request) });
        if status == Status::SUCCESS {
            self.request = null_mut();
        }
        status
    }

    /// What the transfer would take, in microseconds, and the margin of error.
    pub fn estimate(&self) -> Result<(i64, i64), Status> {
        let (mut duration, mut margin, mut method) = (-1, -1, -1);
        // SAFETY: a live agent, its request and places for the results; no options.
        let status = Status(unsafe {
            (functions().estimate)(
                self.agent.cxx(),
                self.request,
                &raw mut duration,
                &raw mut margin,
                &raw mut method,
                null(),
            )
        });
        status.success().map(|()| (duration, margin))
    }

    /// The same through the C API, whose status is a coarser one.
    pub fn estimate_by_the_c_api(&self) -> Result<(i64, i64), i32> {
        let (mut duration, mut margin, mut method) = (-1, -1, -1);
        let mut handle = self.request;
        // SAFETY: the C API's handle is a structure with the C++ request in its only field; places for the results.
        let status = unsafe {
            capi::nixl_capi_estimate_xfer_cost(
                self.agent.handle(),
                (&raw mut handle).cast(),
                null_mut(),
                &raw mut duration,
                &raw mut margin,
                &raw mut method,
            )
        };
        if status == 0 { Ok((duration, margin)) } else { Err(status) }
    }

    /// What NIXL has measured of the last posting: start, microseconds of the post and of the whole, bytes,
    /// descriptors. `Err` is a status of the C API.
    pub fn telemetry(&self) -> Result<[u64; 5], i32> {
        let (mut handle, mut values) = (self.request, [0; 5]);
        // SAFETY: as above.
        let status = unsafe {
            capi::nixl_capi_get_xfer_telemetry(
                self.agent.handle(),
                (&raw mut handle).cast(),
                &raw mut values,
            )
        };
        if status == 0 { Ok(values) } else { Err(status) }
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        // The second call waits until the memory is quiet.
        if !self.request.is_null() && self.release_once() != Status::SUCCESS {
            self.release_once();
        }
    }
}

/// A list of descriptors of main memory to move.
struct TransferList(Handle);

impl TransferList {
    #[track_caller]
    fn new(ranges: &[Range]) -> Self {
        let mut list = null_mut();
        // SAFETY: a place for the result, then a live handle.
        unsafe {
            assert_eq!(capi::nixl_capi_create_xfer_dlist(0, &raw mut list), 0);
            for &(addr, len) in ranges {
                let added = capi::nixl_capi_xfer_dlist_add_desc(list, addr as usize, len, 0);
                assert_eq!(added, 0);
            }
        }
        Self(list)
    }

    fn cxx(&self) -> *const c_void {
        // SAFETY: the first field of the handle's structure is the C++ list.
        unsafe { *self.0.cast::<*const c_void>() }
    }
}

impl Drop for TransferList {
    fn drop(&mut self) {
        // SAFETY: our own handle, not used again.
        unsafe { capi::nixl_capi_destroy_xfer_dlist(self.0) };
    }
}
