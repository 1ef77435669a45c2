//! The way to one peer's memory, for every thread that copies.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use smallvec::SmallVec;

use super::channel::{OwnedUse, SEVERAL, Use, Uses};
use super::cma::{self, Pid, ProcessMemory};
use super::copy::{STREAMING_BYTES, copy_lists};
use super::life::Life;
use super::shm::Mapping;
use super::table::{Refused, TableView};
use crate::error::Error;
use crate::gpu::DevicePlan;
use crate::plan::{Operation, PlanInner};
use crate::sys::{IoSegment, MAX_IO_SEGMENTS};
use crate::wire::frame::ServeStatus;
use crate::wire::{Access, RegionKey};

/// One contiguous range of the peer's up to these sizes goes through `/proc/PID/mem`. Measured: the second
/// copy that it makes is dearer from about 12 KiB on; a WRITE by the other way needs a call more.
const SMALL_READ: usize = 12 << 10;
const SMALL_WRITE: usize = 20 << 10;

/// A list of ranges for one call, on the stack: 16 KiB, of which only what is used is touched.
type CallList = SmallVec<[IoSegment; MAX_IO_SEGMENTS]>;

/// How the peer's address space is reached.
#[derive(Debug)]
pub(crate) enum Reach {
    /// It is ours.
    SameProcess,
    /// By system calls into its process.
    Process { pid: Pid, memory: Option<Arc<ProcessMemory>> },
    /// Not at all: only memory of its engine, which is mapped here.
    MappedOnly,
}

impl Reach {
    /// The file of the peer's address space, if it could be opened.
    pub(crate) fn process_memory(&self) -> Option<Arc<ProcessMemory>> {
        match self {
            Self::Process { memory, .. } => memory.clone(),
            Self::SameProcess | Self::MappedOnly => None,
        }
    }
}

/// Finds a way to the process at the other end of a Unix socket, which says that `value` lies at `addr`
/// there. The text says what is missing.
pub(crate) fn reach(
    pid: Option<Pid>,
    own: bool,
    nonce: (u64, [u8; 16]),
) -> (Reach, Option<String>) {
    let Some(pid) = pid else {
        let reason = "its process is not visible here: another PID namespace";
        return (Reach::MappedOnly, Some(reason.into()));
    };
    if own {
        return (Reach::SameProcess, None);
    }
    match cma::holds(pid, nonce.0, &nonce.1) {
        Ok(true) => {}
        Ok(false) => {
            let reason = "its process ID leads to another process from here";
            return (Reach::MappedOnly, Some(reason.into()));
        }
        Err(error) => {
            let hint = match error.raw_os_error() {
                Some(libc::EPERM) => {
                    " (another user, another user namespace, a container's seccomp filter, or \
                     kernel.yama.ptrace_scope: set it to 0, or give the option ptracer=any on both sides)"
                }
                Some(libc::ENOSYS) => {
                    " (this kernel, or a seccomp filter, has no process_vm_readv)"
                }
                _ => "",
            };
            return (Reach::MappedOnly, Some(format!("process_vm_readv: {error}{hint}")));
        }
    }
    // Without /proc everything goes by the process ID, with a look at the nonce.
    let memory = ProcessMemory::open(pid).ok().filter(|memory| memory.holds(nonce.0, &nonce.1));
    (Reach::Process { pid, memory: memory.map(Arc::new) }, None)
}

/// Memory of a peer's engine, mapped here.
#[derive(Debug)]
pub(crate) struct PeerMemory {
    map: Mapping,
    /// Where the peer has it.
    base: u64,
    len: u64,
    /// It is mapped for writing. The rights that the table names are the peer's word, which it may change at any time; this is what
    /// the kernel holds us to.
    writable: bool,
}

/// Mappings of memory of peers' engines in this process. The kernel gives a process 65,530 in all (`vm.max_map_count`), and
/// without any left nothing works any more.
static MAPPED: AtomicUsize = AtomicUsize::new(0);
const MAX_MAPPED: usize = 16_384;

impl Drop for PeerMemory {
    fn drop(&mut self) {
        MAPPED.fetch_sub(1, Ordering::Relaxed);
    }
}

impl PeerMemory {
    /// Memory that its owner has at `base`; `None`: this process has as many mappings as it may.
    pub(crate) fn new(map: Mapping, base: u64, len: u64, writable: bool) -> Option<Self> {
        let memory = Self { map, base, len, writable };
        // Counted before it is looked at: `drop` takes it back.
        (MAPPED.fetch_add(1, Ordering::Relaxed) < MAX_MAPPED).then_some(memory)
    }

    fn translate(&self, segment: &IoSegment) -> Option<IoSegment> {
        let offset = segment.addr().checked_sub(self.base)?;
        let end = offset.checked_add(segment.len() as u64)?;
        let fits = end <= self.len && end <= self.map.len() as u64;
        fits.then(|| IoSegment::new(self.map.addr() + offset, segment.len() as u64))
    }
}

type PeerMemories = HashMap<RegionKey, Arc<PeerMemory>>;

/// What a path is made of.
#[derive(Debug)]
pub(crate) struct PathParts {
    pub(crate) peer: Arc<str>,
    pub(crate) reach: Reach,
    /// Why its memory cannot be reached as a whole.
    pub(crate) reason: Option<String>,
    pub(crate) table: TableView,
    /// Where it is seen that its process dies.
    pub(crate) life: Option<Life>,
    pub(crate) uses: Uses,
    /// Where a value of the peer's lies in its memory, and which.
    pub(crate) nonce: (u64, [u8; 16]),
    /// WRITEs must not reach another process even for an instant.
    pub(crate) strict_writes: bool,
}

/// The way to a peer's memory.
#[derive(Debug)]
pub(crate) struct LocalPath {
    parts: PathParts,
    mapped: ArcSwap<PeerMemories>,
}

/// Why a chunk was not copied.
#[derive(Debug)]
pub(crate) enum CopyError {
    /// Too many threads copy at once: try again.
    Busy,
    Failed(Error),
}

impl From<Error> for CopyError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl LocalPath {
    pub(crate) fn new(parts: PathParts) -> Self {
        Self { parts, mapped: ArcSwap::default() }
    }

    /// Adds or replaces memory of the peer's engine.
    pub(crate) fn map(&self, key: RegionKey, memory: PeerMemory) {
        let memory = Arc::new(memory);
        self.mapped.rcu(|known| {
            let mut known = PeerMemories::clone(known);
            known.insert(key, memory.clone());
            known
        });
    }

    pub(crate) fn unmap(&self, key: RegionKey) {
        self.mapped.rcu(|known| {
            let mut known = PeerMemories::clone(known);
            known.remove(&key);
            known
        });
    }

    pub(crate) fn mapped_regions(&self) -> usize {
        self.mapped.load().len()
    }

    /// Whether every plan of this peer can go this way.
    pub(crate) fn reaches_all(&self) -> bool {
        !matches!(self.parts.reach, Reach::MappedOnly)
    }

    /// Why some plans cannot go this way.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.parts.reason.as_deref()
    }

    /// What the log calls it.
    pub(crate) fn method(&self) -> &'static str {
        match &self.parts.reach {
            Reach::SameProcess => "memcpy",
            Reach::Process { memory: Some(_), .. } => "process_vm, /proc/PID/mem",
            Reach::Process { .. } => "process_vm",
            Reach::MappedOnly => "memory of the engine only",
        }
    }

    /// Whether this plan can go this way.
    #[inline]
    pub(crate) fn carries(&self, plan: &PlanInner) -> bool {
        !plan.chunks.is_empty() && (self.reaches_all() || maps_all(plan, &self.mapped.load()))
    }

    /// Takes a place for a copy of this plan. `None`: all are taken, by threads of this process that copy, each for some 100 us,
    /// or because the peer says so: they are in memory that it can write.
    pub(crate) fn begin(&self, plan: &PlanInner) -> Option<Use<'_>> {
        self.parts.uses.begin(region_of(plan))
    }

    /// Copies one chunk of a plan, on this thread. Costs what the copy costs, one atomic operation and
    /// some loads; allocates nothing.
    ///
    /// # Safety
    /// The plan's own memory is registered, and stays so until this returns.
    pub(crate) unsafe fn copy(&self, plan: &PlanInner, chunk: usize) -> Result<(), CopyError> {
        let in_use = self.begin(plan).ok_or(CopyError::Busy)?;
        // SAFETY: the caller's promise.
        unsafe { self.copy_in(in_use, plan, chunk) }.map_err(CopyError::Failed)
    }

    /// As `copy`, in a place that `begin` has given.
    ///
    /// # Safety
    /// As for `copy`.
    pub(crate) unsafe fn copy_in(
        &self,
        in_use: Use<'_>,
        plan: &PlanInner,
        chunk: usize,
    ) -> Result<(), Error> {
        let (local, remote) = (plan.chunk_local(chunk), plan.chunk_remote(chunk));
        // From the beginning of `in_use` to its drop the peer keeps what the table says is there.
        if self.parts.life.as_ref().is_some_and(Life::has_ended) {
            // Not only in vain: who is the last to use its address space has to take all of its memory away.
            return Err(self.gone("its process has ended"));
        }
        self.check(plan)?;
        let streaming = plan.bytes >= STREAMING_BYTES;
        // SAFETY: own memory by the caller's promise. The peer's is registered with the rights that were
        // just checked, and it waits for `in_use` before it takes the registration back.
        let outcome = unsafe {
            if matches!(self.parts.reach, Reach::SameProcess) {
                copy_within(plan.operation, local, remote, streaming);
                Ok(())
            } else {
                match self.copy_mapped(plan, local, remote, streaming) {
                    Ok(false) => self.copy_process(plan, local, remote),
                    Ok(true) => Ok(()),
                    Err(refused) => Err(refused),
                }
            }
        };
        drop(in_use);
        outcome
    }

    /// Why a plan with GPU memory cannot go this way; `None`: it can.
    pub(crate) fn obstacle(&self, plan: &DevicePlan) -> Option<String> {
        // Addresses were translated when the plan was made; only now it is known whose process it is.
        let own = matches!(self.parts.reach, Reach::SameProcess);
        (own != plan.same_process)
            .then(|| "the peer's engine belongs to another process".to_owned())
    }

    /// Begins a copy of GPU memory, which ends when the answer is dropped: until then the peer keeps what its table
    /// says is there.
    pub(crate) fn begin_on_device(&self, plan: &PlanInner) -> Result<OwnedUse, CopyError> {
        let in_use = self.parts.uses.begin_owned(region_of(plan)).ok_or(CopyError::Busy)?;
        let needs = needs(plan.operation);
        let on_gpu = plan.on_device().is_some_and(|device| device.remote_on_gpu);
        self.check_rights(plan, if on_gpu { needs.of_device() } else { needs })?;
        Ok(in_use)
    }

    fn check(&self, plan: &PlanInner) -> Result<(), Error> {
        self.check_rights(plan, needs(plan.operation))
    }

    fn check_rights(&self, plan: &PlanInner, needs: Access) -> Result<(), Error> {
        if self.parts.uses.is_closed() {
            // Nobody there waits for what begins now.
            return Err(self.gone("it has left this connection"));
        }
        for range in &plan.remote_ranges {
            self.parts.table.check(range, needs).map_err(|refused| match refused {
                Refused::Shut => self.gone("its engine is shut down"),
                Refused::Region(status) => self.refused(status),
            })?;
        }
        Ok(())
    }

    fn refused(&self, status: ServeStatus) -> Error {
        Error::Permission { peer: self.parts.peer.clone(), reason: status.reason() }
    }

    fn gone(&self, reason: &str) -> Error {
        Error::RemoteDisconnect { peer: self.parts.peer.clone(), reason: reason.into() }
    }

    /// Copies through mappings of the peer's memory; false: they do not hold all of the chunk.
    ///
    /// # Errors
    /// The peer has shared for reading only what its table lets us write to: no engine does, and writing would be a SIGSEGV.
    ///
    /// # Safety
    /// As for `copy`.
    unsafe fn copy_mapped(
        &self,
        plan: &PlanInner,
        local: &[IoSegment],
        remote: &[IoSegment],
        streaming: bool,
    ) -> Result<bool, Error> {
        let mapped = self.mapped.load();
        if !maps_all(plan, &mapped) {
            return Ok(false);
        }
        let mut here = CallList::new();
        for segment in remote {
            // One range, mostly: the first fits.
            let found = plan.remote_ranges.iter().find_map(|range| {
                let memory = mapped.get(&range.key)?;
                Some((memory.translate(segment)?, memory.writable))
            });
            let Some((found, writable)) = found else { return Ok(false) };
            if plan.operation == Operation::Write && !writable {
                return Err(self.refused(ServeStatus::Denied));
            }
            here.push(found);
        }
        // SAFETY: the mappings are held by `mapped`, and those that are copied to are mapped for writing.
        unsafe { copy_within(plan.operation, local, &here, streaming) };
        Ok(true)
    }

    /// # Safety
    /// As for `copy`.
    unsafe fn copy_process(
        &self,
        plan: &PlanInner,
        local: &[IoSegment],
        remote: &[IoSegment],
    ) -> Result<(), Error> {
        let Reach::Process { pid, memory } = &self.parts.reach else {
            return Err(self.gone("its process cannot be reached"));
        };
        let bytes: usize = remote.iter().map(IoSegment::len).sum();
        let small = match plan.operation {
            Operation::Read => SMALL_READ,
            Operation::Write => SMALL_WRITE,
        };
        let call = Call { path: self, plan, pid: *pid, local, remote };
        // SAFETY: the caller's promise.
        unsafe {
            match (plan.operation, memory) {
                (_, Some(memory)) if remote.len() == 1 && bytes <= small => {
                    call.by_file(memory, bytes)
                }
                (Operation::Write, Some(memory)) if self.parts.strict_writes => {
                    call.by_file(memory, bytes)
                }
                (Operation::Read, _) => call.read(bytes),
                (Operation::Write, memory) => call.write(memory.as_deref(), bytes),
            }
        }
    }
}

/// Whose copy it is, by its place in the peer's table.
fn region_of(plan: &PlanInner) -> u32 {
    match &plan.remote_ranges[..] {
        [range] => range.key.place(),
        _ => SEVERAL,
    }
}

fn needs(operation: Operation) -> Access {
    match operation {
        Operation::Read => Access::REMOTE_READ,
        Operation::Write => Access::REMOTE_WRITE,
    }
}

/// # Safety
/// All ranges are mapped here; those that are copied to may be overwritten now.
unsafe fn copy_within(
    operation: Operation,
    local: &[IoSegment],
    remote: &[IoSegment],
    streaming: bool,
) {
    let (to, from) = match operation {
        Operation::Read => (local, remote),
        Operation::Write => (remote, local),
    };
    // SAFETY: the caller's promise.
    unsafe { copy_lists(to, from, streaming) };
}

/// One chunk between this process and another.
struct Call<'a> {
    path: &'a LocalPath,
    plan: &'a PlanInner,
    pid: Pid,
    local: &'a [IoSegment],
    remote: &'a [IoSegment],
}

/// Whether all that a plan touches at the peer is mapped here.
fn maps_all(plan: &PlanInner, mapped: &PeerMemories) -> bool {
    !mapped.is_empty() && plan.remote_ranges.iter().all(|range| mapped.contains_key(&range.key))
}

/// What is left of a list after its first `done` bytes.
fn rest(segments: &[IoSegment], mut done: usize, out: &mut CallList) {
    for segment in segments {
        if done >= segment.len() {
            done -= segment.len();
        } else {
            out.push(segment.advanced(done));
            done = 0;
        }
    }
}

impl Call<'_> {
    /// Through the file of its address space, range by range: no other process can be reached.
    ///
    /// # Safety
    /// As for `LocalPath::copy`.
    unsafe fn by_file(&self, memory: &ProcessMemory, bytes: usize) -> Result<(), Error> {
        let operation = self.plan.operation;
        let mut done = 0;
        while done < bytes {
            let (mut local, mut remote) = (CallList::new(), CallList::new());
            rest(self.remote, done, &mut remote);
            let Some(range) = remote.first() else { break };
            rest(self.local, done, &mut local);
            cut(&mut local, range.len());
            let moved = match operation {
                // SAFETY: the caller's promise.
                Operation::Read => unsafe { memory.read(&local, range.addr()) },
                Operation::Write => {
                    self.still_open()?;
                    memory.write(&local, range.addr())
                }
            };
            match moved {
                Ok(0) => return Err(self.path.gone("its process has ended")),
                Ok(n) => done += n,
                Err(error) => return Err(self.failed(&error, operation, done)),
            }
        }
        Ok(())
    }

    /// By the process ID. The last range of each call is the peer's nonce: what was read is the peer's if
    /// that is.
    ///
    /// # Safety
    /// As for `LocalPath::copy`.
    unsafe fn read(&self, bytes: usize) -> Result<(), Error> {
        let (addr, expected) = self.path.parts.nonce;
        let mut done = 0;
        while done < bytes {
            let mut nonce = [0u8; 16];
            let (mut local, mut remote) = (CallList::new(), CallList::new());
            rest(self.local, done, &mut local);
            rest(self.remote, done, &mut remote);
            local.push(IoSegment::of_mut(&mut nonce));
            remote.push(IoSegment::new(addr, nonce.len() as u64));
            // SAFETY: the caller's promise; `nonce` is ours.
            let moved = unsafe { cma::read(self.pid, &local, &remote) };
            match moved {
                Ok(n) if n == bytes - done + nonce.len() => {
                    return if nonce == expected {
                        Ok(())
                    } else {
                        Err(self.path.gone("it has left this connection"))
                    };
                }
                Ok(0) => {
                    let fault = io::Error::from_raw_os_error(libc::EFAULT);
                    return Err(self.failed(&fault, Operation::Read, done));
                }
                // Something in the middle is not mapped: the next call tells what.
                Ok(n) => done = (done + n).min(bytes),
                Err(error) => return Err(self.failed(&error, Operation::Read, done)),
            }
        }
        // All bytes are here, but the nonce was not.
        self.confirm()
    }

    /// By the process ID, after a look at the nonce: should the process end and another get its ID between
    /// these two calls, that one would be written to. `strict_writes` is for who cannot have that.
    ///
    /// # Safety
    /// As for `LocalPath::copy`.
    unsafe fn write(&self, memory: Option<&ProcessMemory>, bytes: usize) -> Result<(), Error> {
        let (addr, expected) = self.path.parts.nonce;
        let mut done = 0;
        while done < bytes {
            let (mut local, mut remote) = (CallList::new(), CallList::new());
            rest(self.local, done, &mut local);
            rest(self.remote, done, &mut remote);
            match memory {
                Some(memory) if memory.holds(addr, &expected) => {}
                Some(memory) if memory.is_empty() => {
                    return Err(self.path.gone("its process has ended"));
                }
                Some(_) => return Err(self.path.gone("it has left this connection")),
                None => self.confirm()?,
            }
            self.still_open()?;
            match cma::write(self.pid, &local, &remote) {
                Ok(0) => {
                    let fault = io::Error::from_raw_os_error(libc::EFAULT);
                    return Err(self.failed(&fault, Operation::Write, done));
                }
                Ok(n) => done += n,
                Err(error) => return Err(self.failed(&error, Operation::Write, done)),
            }
        }
        Ok(())
    }

    /// Looks at the peer's table once more before a call that writes: a process that was stopped here for
    /// longer than the peer could wait must not write into what the peer has taken back. Some loads.
    #[inline]
    fn still_open(&self) -> Result<(), Error> {
        self.path.check(self.plan)
    }

    /// The process ID still is the peer's.
    fn confirm(&self) -> Result<(), Error> {
        let (addr, expected) = self.path.parts.nonce;
        match cma::holds(self.pid, addr, &expected) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.path.gone("it has left this connection")),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                Err(self.path.gone("its process has ended, and its process ID belongs to another"))
            }
            Err(error) => Err(self.failed(&error, Operation::Read, 0)),
        }
    }

    /// What a failed call means. Slow: it finds out whose memory is missing.
    #[cold]
    fn failed(&self, error: &io::Error, operation: Operation, done: usize) -> Error {
        match error.raw_os_error() {
            Some(libc::EFAULT | libc::EIO) => self.blame(operation, done),
            Some(libc::ESRCH) => self.path.gone("its process has ended"),
            Some(libc::EPERM | libc::EACCES) => Error::Permission {
                peer: self.path.parts.peer.clone(),
                reason: "the kernel does not let this process into the peer's memory any more",
            },
            _ => self.path.gone(&format!("its memory cannot be reached: {error}")),
        }
    }

    fn blame(&self, operation: Operation, done: usize) -> Error {
        let own = Pid::own();
        let remote = || first_unreadable(self.pid, self.remote, done);
        let local = || first_unreadable(own, self.local, done);
        let theirs = self.path.refused(ServeStatus::Fault);
        match operation {
            _ if remote().is_some() => self.confirm().err().unwrap_or(theirs),
            // Readable there, so that it is ours that cannot be written.
            Operation::Read => {
                let first = || self.local.first().map_or(0, IoSegment::addr);
                Error::Fault { addr: local().unwrap_or_else(first) }
            }
            Operation::Write => match local() {
                Some(addr) => Error::Fault { addr },
                None => theirs,
            },
        }
    }
}

/// Shortens a list to its first `bytes`.
fn cut(segments: &mut CallList, mut bytes: usize) {
    let mut keep = 0;
    for segment in segments.iter_mut() {
        if bytes == 0 {
            break;
        }
        if segment.len() > bytes {
            *segment = IoSegment::new(segment.addr(), bytes as u64);
        }
        bytes -= segment.len();
        keep += 1;
    }
    segments.truncate(keep);
}

/// The first address behind the first `done` bytes whose page cannot be read.
fn first_unreadable(pid: Pid, segments: &[IoSegment], done: usize) -> Option<u64> {
    const PAGE: u64 = 4096;
    let mut left = CallList::new();
    rest(segments, done, &mut left);
    for segment in &left {
        let end = segment.addr() + segment.len() as u64;
        let mut at = segment.addr();
        while at < end {
            let mut byte = [0u8];
            let into = [IoSegment::of_mut(&mut byte)];
            // SAFETY: `byte` is ours.
            if unsafe { cma::read(pid, &into, &[IoSegment::new(at, 1)]) }.is_err() {
                return Some(at);
            }
            at = (at / PAGE + 1) * PAGE;
        }
    }
    None
}

#[cfg(test)]
#[path = "path_tests.rs"]
mod tests;
