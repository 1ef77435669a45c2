//! The GPUs as one lane uses them: its own streams, and copies in flight.

use std::ffi::c_void;
use std::ptr;
use std::time::{Duration, Instant};

use super::super::GpuError;
use super::api::{SUCCESS, Stream};
use super::device::{self, Device};
use super::memory::HostMemory;
use super::table::{Tile, Tiles};

/// Copies of one lane on one GPU at the same time; further ones wait.
const SLOTS: usize = 64;
const LINE: usize = 64;
/// A stream for small transfers, and these for large ones.
const BULK_STREAMS: usize = 3;
const WARP: u32 = 32;
const MAX_WARPS: u32 = 32;
/// How often the driver is asked about a copy whose flag is not there: only it tells of errors.
const ASK_EVERY: Duration = Duration::from_millis(1);
/// Ranges that the copy engine is given at a time, some 2 us each: then the lane has others to look after.
const RANGES_AT_ONCE: usize = 32;
/// How long a lane waits for a GPU that it sets up by itself: others wait for it meanwhile.
const SET_UP_PATIENCE: Duration = Duration::from_secs(1);
/// How long a lane that ends waits for its streams. By then it has waited for its copies.
const DROP_PATIENCE: Duration = Duration::from_secs(1);

/// One lane's part of one GPU.
struct LaneDevice {
    device: &'static Device,
    /// Null until it is made.
    streams: [Stream; 1 + BULK_STREAMS],
    /// A line for each slot: the kernel stores the copy's number there.
    flags: HostMemory,
    /// A number for each slot, in the GPU's memory: blocks that have ended. 0 until it is made.
    counters: u64,
    free: Vec<u8>,
    next: u32,
    next_bulk: usize,
}

// SAFETY: the handles may be used by any thread; a lane's state is used by one at a time.
unsafe impl Send for LaneDevice {}

/// What is to be copied.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) device: &'static Device,
    /// Ranges for the kernel.
    pub(crate) tiles: Tiles,
    /// Ranges for the copy engine: to, from, length.
    pub(crate) large: &'a [(u64, u64, u64)],
    /// At most so many blocks of threads: one takes a multiprocessor.
    pub(crate) blocks: u32,
    pub(crate) bulk: bool,
}

/// A copy that is under way.
#[derive(Debug)]
#[must_use]
pub(crate) struct Flight {
    device: u32,
    slot: u8,
    value: u32,
    stream: u8,
    asked: Instant,
    /// Ranges that the copy engine has been given.
    given: usize,
    stage: Stage,
}

impl Flight {
    /// Whether the copy engine is still to be given ranges: `poll` wants what the copy was started with.
    pub(crate) fn wants_more(&self) -> bool {
        matches!(self.stage, Stage::Giving)
    }
}

#[derive(Debug)]
enum Stage {
    /// More ranges are to be given.
    Giving,
    /// The flag is stored behind all.
    Signalled,
    /// The driver refused some of it, or the rest is not wanted. Over when the flag is stored.
    Cut(GpuError),
    /// As before, but nothing stores the flag: over when the stream has nothing to do.
    Unsignalled(GpuError),
}

/// All that a lane has of GPUs; nothing until the first copy.
#[derive(Default)]
pub(crate) struct LaneGpu {
    devices: Vec<LaneDevice>,
}

impl LaneGpu {
    /// Starts a copy; `None`: as many as may be are under way. Nothing waits.
    ///
    /// # Errors
    /// The driver's: nothing is being copied.
    ///
    /// # Safety
    /// Nothing but this copy writes the ranges that it writes, and all ranges stay what they are until `poll` has said
    /// that it has ended.
    pub(crate) unsafe fn launch(
        &mut self,
        launch: &Launch<'_>,
    ) -> Result<Option<Flight>, GpuError> {
        let device = launch.device;
        if let Some(lost) = device.lost() {
            return Err(lost.clone());
        }
        let index = self.device(device)?;
        let part = &mut self.devices[index];
        let Some(slot) = part.free.pop() else { return Ok(None) };
        part.next = part.next.wrapping_add(1).max(1);
        let value = part.next;
        let stream = if launch.bulk {
            part.next_bulk = (part.next_bulk + 1) % BULK_STREAMS;
            1 + part.next_bulk as u8
        } else {
            0
        };
        let (device, asked) = (device.ordinal(), Instant::now());
        let mut flight =
            Flight { device, slot, value, stream, asked, given: 0, stage: Stage::Giving };
        // SAFETY: the caller's promise.
        match unsafe { part.go_on(launch, &mut flight) } {
            Err(error) if flight.given == 0 || part.device.lost().is_some() => {
                part.free.push(slot);
                Err(error)
            }
            Err(error) => {
                part.cut(&mut flight, error);
                Ok(Some(flight))
            }
            Ok(()) => Ok(Some(flight)),
        }
    }

    /// Takes into use what another thread has made. It comes back if there is such a part already.
    pub(crate) fn take_part(&mut self, LanePart(part): LanePart) -> Option<LanePart> {
        if self.devices.iter().any(|known| known.device.ordinal() == part.device.ordinal()) {
            return Some(LanePart(part));
        }
        self.devices.push(part);
        None
    }

    fn device(&mut self, device: &'static Device) -> Result<usize, GpuError> {
        let known = |part: &LaneDevice| part.device.ordinal() == device.ordinal();
        if let Some(known) = self.devices.iter().position(known) {
            return Ok(known);
        }
        self.devices.push(LaneDevice::new(device, SET_UP_PATIENCE)?);
        Ok(self.devices.len() - 1)
    }

    /// Whether a copy has ended: `None`, it has not. A load; once a millisecond, a call of the driver. Of what the copy engine
    /// has not been given yet, it is given more of `rest`, which is what the copy was started with; without that the copy ends
    /// in an error when what was begun has ended.
    pub(crate) fn poll(
        &mut self,
        flight: &mut Flight,
        rest: Option<&Launch<'_>>,
    ) -> Option<Result<(), GpuError>> {
        let part = self.devices.iter_mut().find(|part| part.device.ordinal() == flight.device)?;
        let ended = part.poll(flight, rest)?;
        part.free.push(flight.slot);
        Some(ended)
    }

    /// A copy is not waited for any longer, though it may go on: nothing that it touches may be given back. The answer is what
    /// its users are told.
    pub(crate) fn give_up(&self, flight: &Flight) -> GpuError {
        let part = self.devices.iter().find(|part| part.device.ordinal() == flight.device);
        part.map_or_else(
            || GpuError("a copy of an unknown GPU".into()),
            |part| {
                part.device.set_stuck();
                part.device.does_not_answer()
            },
        )
    }
}

/// What one lane needs on one GPU: streams, and places where copies say that they have ended.
pub(crate) struct LanePart(LaneDevice);

impl Device {
    /// Makes such a part, for a lane that is not to wait for that: some milliseconds, and 5 s where the GPU does not answer.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn lane_part(device: &'static Self) -> Result<LanePart, GpuError> {
        LaneDevice::new(device, device::SET_UP_PATIENCE).map(LanePart)
    }
}

impl LaneDevice {
    fn new(device: &'static Device, patience: Duration) -> Result<Self, GpuError> {
        let _entered = device.enter()?;
        let flags = HostMemory::new(device, SLOTS * LINE)?;
        let streams = [ptr::null_mut(); 1 + BULK_STREAMS];
        let free = (0..SLOTS as u8).rev().collect();
        // Whatever fails from here on, what was made before it is given back.
        let mut part = Self { device, streams, flags, counters: 0, free, next: 0, next_bulk: 0 };
        // SAFETY: room for one address.
        let status = unsafe { (device.api.memory_alloc)(&raw mut part.counters, SLOTS * LINE) };
        if let Err(error) = device.check("cuMemAlloc", status) {
            part.counters = 0;
            return Err(error);
        }
        for stream in &mut part.streams {
            *stream = device.new_stream()?;
        }
        let (counters, zeros) = (part.counters, part.flags.address());
        device.set_up(patience, |stream| {
            // Not by a memset, which is a kernel and waits for a model's that has every multiprocessor.
            // SAFETY: both were just allocated, with so many bytes.
            let status = unsafe { (device.api.copy_async)(counters, zeros, SLOTS * LINE, stream) };
            device.check("cuMemcpyAsync of zeros", status)
        })?;
        Ok(part)
    }

    /// Gives the driver the next part of a copy.
    ///
    /// # Safety
    /// As for `LaneGpu::launch`.
    unsafe fn go_on(&self, launch: &Launch<'_>, flight: &mut Flight) -> Result<(), GpuError> {
        let _entered = self.device.enter()?;
        let stream = self.streams[flight.stream as usize];
        let left = launch.large.get(flight.given..).unwrap_or(&[]);
        for &(to, from, len) in left.iter().take(RANGES_AT_ONCE) {
            // SAFETY: the caller's promise.
            let status = unsafe { (self.device.api.copy_async)(to, from, len as usize, stream) };
            self.device.check("cuMemcpyAsync", status)?;
            flight.given += 1;
        }
        if flight.given >= launch.large.len() {
            // SAFETY: the caller's promise.
            unsafe { self.finish(launch.tiles, launch.blocks, flight) }?;
            flight.stage = Stage::Signalled;
        }
        Ok(())
    }

    /// Of what the driver has been given the end is waited for, and no more follows.
    fn cut(&self, flight: &mut Flight, error: GpuError) {
        let tiles =
            Tiles { address: 0, count: 0, first: Tile { to: 0, from: 0, len: 0, reserved: 0 } };
        // SAFETY: it copies nothing.
        let signalled =
            self.device.enter().and_then(|_entered| unsafe { self.finish(tiles, 1, flight) });
        flight.stage =
            if signalled.is_ok() { Stage::Cut(error) } else { Stage::Unsignalled(error) };
    }

    /// The last part of a copy, which stores its flag. The thread has entered.
    ///
    /// # Safety
    /// As for `LaneGpu::launch`.
    unsafe fn finish(&self, tiles: Tiles, blocks: u32, flight: &Flight) -> Result<(), GpuError> {
        let api = self.device.api;
        let stream = self.streams[flight.stream as usize];
        let (offset, mut value) = (u64::from(flight.slot) * LINE as u64, flight.value);
        let mut flag = self.flags.address() + offset;
        if tiles.count == 0 {
            // No kernel: it would wait for a multiprocessor, behind a model's that has them all.
            // SAFETY: a line of the flags, which stay until the lane's end. The write comes behind the copies, and with
            // a fence.
            let status = unsafe { (api.stream_write)(stream, flag, value, 0) };
            if status == SUCCESS {
                return Ok(());
            }
            // A driver that does not do that has the kernel do it, unless it is lost.
        }
        let Tiles { address: mut tiles, mut count, first: mut only } = tiles;
        let mut counter = self.counters + offset;
        let blocks = count.clamp(1, blocks.max(1));
        let warps = count.div_ceil(blocks).clamp(1, MAX_WARPS);
        let mut arguments: [*mut c_void; 6] = [
            (&raw mut tiles).cast(),
            (&raw mut count).cast(),
            (&raw mut counter).cast(),
            (&raw mut flag).cast(),
            (&raw mut value).cast(),
            (&raw mut only).cast(),
        ];
        // SAFETY: the arguments have the kernel's types, and are copied by the call; the table stays (the caller's
        // promise), and so do counter and flag, until the lane's end, which waits for what is under way.
        let status = unsafe {
            (api.launch)(
                self.device.kernel(),
                blocks,
                1,
                1,
                warps * WARP,
                1,
                1,
                0,
                stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.device.check("cuLaunchKernel", status)
    }

    fn flag(&self, slot: u8) -> u32 {
        let flag = self.flags.address() + u64::from(slot) * LINE as u64;
        // SAFETY: within the flags. The GPU stores it as a whole.
        let value = unsafe { ptr::read_volatile(flag as usize as *const u32) };
        // What the copy has stored in host memory is read after this.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        value
    }

    fn poll(&self, flight: &mut Flight, rest: Option<&Launch<'_>>) -> Option<Result<(), GpuError>> {
        if let Some(ended) = self.signalled(flight) {
            return Some(ended);
        }
        if let Some(lost) = self.device.lost() {
            return Some(Err(lost.clone()));
        }
        if matches!(flight.stage, Stage::Giving) {
            // SAFETY: as when it was started.
            let given = rest.map(|launch| unsafe { self.go_on(launch, flight) });
            match given {
                Some(Ok(())) => {}
                Some(Err(error)) => self.cut(flight, error),
                None => self.cut(flight, GpuError("the rest was not wanted any more".into())),
            }
            return None;
        }
        let now = Instant::now();
        if now - flight.asked < ASK_EVERY {
            return None;
        }
        flight.asked = now;
        let stream = self.streams[flight.stream as usize];
        match self.device.enter().and_then(|_entered| self.device.query(stream)) {
            Ok(None) => None,
            // The device is lost.
            Err(error) => Some(Err(error)),
            Ok(Some(())) => self.signalled(flight).or_else(|| {
                Some(Err(match &flight.stage {
                    Stage::Cut(error) | Stage::Unsignalled(error) => error.clone(),
                    _ => GpuError("a copy ended without saying so".into()),
                }))
            }),
        }
    }

    /// What the flag says; `None`: it is not stored yet.
    fn signalled(&self, flight: &Flight) -> Option<Result<(), GpuError>> {
        let outcome = match &flight.stage {
            Stage::Signalled => Ok(()),
            Stage::Cut(error) => Err(error),
            Stage::Giving | Stage::Unsignalled(_) => return None,
        };
        (self.flag(flight.slot) == flight.value).then(|| outcome.map_err(Clone::clone))
    }

    /// Whether nothing runs in its streams, after some patience.
    fn is_quiet(&self) -> bool {
        let Ok(_entered) = self.device.enter() else { return false };
        let patience = Instant::now() + DROP_PATIENCE;
        self.streams.iter().filter(|stream| !stream.is_null()).all(|stream| {
            loop {
                match self.device.query(*stream) {
                    Ok(Some(())) => return true,
                    Ok(None) if Instant::now() < patience => std::thread::yield_now(),
                    Ok(None) | Err(_) => return false,
                }
            }
        })
    }
}

impl Drop for LaneDevice {
    fn drop(&mut self) {
        // What a GPU does not let go of stays as it is, and so does all of one that is lost.
        if self.device.is_stuck() {
            return;
        }
        if !self.is_quiet() {
            if self.device.lost().is_none() {
                self.device.set_stuck();
            }
            return;
        }
        if let Ok(_entered) = self.device.enter() {
            for stream in self.streams.iter().filter(|stream| !stream.is_null()) {
                // SAFETY: nothing runs in it. An error leaves nothing to be done.
                unsafe { (self.device.api.stream_destroy)(*stream) };
            }
            if self.counters != 0 {
                // SAFETY: no kernel is left that counts there.
                unsafe { (self.device.api.memory_free)(self.counters) };
            }
        }
    }
}
