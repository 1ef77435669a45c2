//! The GPUs as one lane uses them: its own streams, and copies in flight.

use std::ffi::c_void;
use std::ptr;
use std::time::{Duration, Instant};

use super::super::GpuError;
use super::api::{NOT_READY, SUCCESS, Stream};
use super::device::Device;
use super::memory::HostMemory;
use super::table::Tiles;

/// Copies of one lane on one GPU at the same time; further ones wait.
const SLOTS: usize = 64;
const LINE: usize = 64;
/// A stream for small transfers, and these for large ones.
const BULK_STREAMS: usize = 3;
const WARP: u32 = 32;
const MAX_WARPS: u32 = 32;
/// How often the driver is asked about a copy whose flag is not there: only it tells of errors.
const ASK_EVERY: Duration = Duration::from_millis(1);

/// One lane's part of one GPU.
struct LaneDevice {
    device: &'static Device,
    streams: [Stream; 1 + BULK_STREAMS],
    /// A line for each slot: the kernel stores the copy's number there.
    flags: HostMemory,
    /// A number for each slot, in the GPU's memory: blocks that have ended.
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
}

/// All that a lane has of GPUs; nothing until the first copy.
#[derive(Default)]
pub(crate) struct LaneGpu {
    devices: Vec<LaneDevice>,
}

impl LaneGpu {
    /// Starts a copy; `None`: as many as may be are under way. Nothing waits.
    ///
    /// # Safety
    /// Nothing but this copy writes the ranges that it writes, and all ranges stay what they are until `poll` has said
    /// that it has ended.
    pub(crate) unsafe fn launch(
        &mut self,
        launch: &Launch<'_>,
    ) -> Result<Option<Flight>, GpuError> {
        let device = launch.device;
        let index = self.device(device)?;
        let part = &mut self.devices[index];
        let Some(slot) = part.free.pop() else { return Ok(None) };
        part.next = part.next.wrapping_add(1).max(1);
        let value = part.next;
        let stream = if launch.bulk {
            part.next_bulk = (part.next_bulk + 1) % BULK_STREAMS;
            1 + part.next_bulk
        } else {
            0
        };
        // SAFETY: the caller's promise.
        let launched = unsafe { part.enqueue(launch, slot, value, part.streams[stream]) };
        match launched {
            Ok(()) => {
                let (device, stream) = (device.ordinal(), stream as u8);
                Ok(Some(Flight { device, slot, value, stream, asked: Instant::now() }))
            }
            Err(error) => {
                // Copies may have been enqueued before the kernel was refused.
                part.settle(stream);
                part.free.push(slot);
                Err(error)
            }
        }
    }

    /// Makes streams and what else is needed on a GPU, unless they are there.
    pub(crate) fn prepare(&mut self, device: &'static Device) -> Result<(), GpuError> {
        self.device(device).map(drop)
    }

    fn device(&mut self, device: &'static Device) -> Result<usize, GpuError> {
        let known = |part: &LaneDevice| part.device.ordinal() == device.ordinal();
        if let Some(known) = self.devices.iter().position(known) {
            return Ok(known);
        }
        self.devices.push(LaneDevice::new(device)?);
        Ok(self.devices.len() - 1)
    }

    /// Whether a copy has ended: `None`, it has not. A load; once a millisecond, a call of the driver.
    pub(crate) fn poll(&mut self, flight: &mut Flight) -> Option<Result<(), GpuError>> {
        let part = self.devices.iter_mut().find(|part| part.device.ordinal() == flight.device)?;
        let ended = part.poll(flight)?;
        part.free.push(flight.slot);
        Some(ended)
    }
}

impl LaneDevice {
    fn new(device: &'static Device) -> Result<Self, GpuError> {
        let _entered = device.enter()?;
        let flags = HostMemory::new(device, SLOTS * LINE)?;
        let mut counters = 0;
        // SAFETY: room for one address.
        let status = unsafe { (device.api.memory_alloc)(&raw mut counters, SLOTS * LINE) };
        device.api.check("cuMemAlloc", status)?;
        let mut streams = [ptr::null_mut(); 1 + BULK_STREAMS];
        for stream in &mut streams {
            *stream = device.new_stream()?;
        }
        device.set_up(|stream| {
            // SAFETY: it was just allocated.
            let status =
                unsafe { (device.api.memory_set_async)(counters, 0, SLOTS * LINE, stream) };
            device.api.check("cuMemsetD8Async", status)
        })?;
        let free = (0..SLOTS as u8).rev().collect();
        Ok(Self { device, streams, flags, counters, free, next: 0, next_bulk: 0 })
    }

    /// # Safety
    /// As for `LaneGpu::launch`.
    unsafe fn enqueue(
        &self,
        launch: &Launch<'_>,
        slot: u8,
        value: u32,
        stream: Stream,
    ) -> Result<(), GpuError> {
        let api = self.device.api;
        let _entered = self.device.enter()?;
        for &(to, from, len) in launch.large {
            // SAFETY: the caller's promise.
            let status = unsafe { (api.copy_async)(to, from, len as usize, stream) };
            api.check("cuMemcpyAsync", status)?;
        }
        let offset = u64::from(slot) * LINE as u64;
        let flag = self.flags.address() + offset;
        if launch.tiles.count == 0 {
            // No kernel: it would wait for a multiprocessor, behind a model's that has them all.
            // SAFETY: a line of the flags, which stay until the lane's end. The write comes behind the copies, and with
            // a fence.
            if unsafe { (api.stream_write)(stream, flag, value, 0) } == SUCCESS {
                return Ok(());
            }
            // A driver that does not do that has the kernel do it.
        }
        let Tiles { address: mut tiles, mut count, first: mut only } = launch.tiles;
        let (mut counter, mut flag, mut value) = (self.counters + offset, flag, value);
        let blocks = count.clamp(1, launch.blocks.max(1));
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
        api.check("cuLaunchKernel", status)
    }

    fn flag(&self, slot: u8) -> u32 {
        let flag = self.flags.address() + u64::from(slot) * LINE as u64;
        // SAFETY: within the flags. The GPU stores it as a whole.
        let value = unsafe { ptr::read_volatile(flag as usize as *const u32) };
        // What the copy has stored in host memory is read after this.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        value
    }

    fn poll(&self, flight: &mut Flight) -> Option<Result<(), GpuError>> {
        if self.flag(flight.slot) == flight.value {
            return Some(Ok(()));
        }
        let now = Instant::now();
        if now - flight.asked < ASK_EVERY {
            return None;
        }
        flight.asked = now;
        let ended = self.ask(flight.stream as usize)?;
        if self.flag(flight.slot) == flight.value {
            return Some(Ok(()));
        }
        Some(ended.and(Err(GpuError("a copy ended without saying so".into()))))
    }

    /// What the driver says of a stream; `None`: it is working.
    fn ask(&self, stream: usize) -> Option<Result<(), GpuError>> {
        let entered = self.device.enter();
        if let Err(error) = entered {
            return Some(Err(error));
        }
        // SAFETY: a living stream.
        match unsafe { (self.device.api.stream_query)(self.streams[stream]) } {
            NOT_READY => None,
            SUCCESS => Some(Ok(())),
            error => Some(Err(self.device.api.error("cuStreamQuery", error))),
        }
    }

    /// Waits until nothing runs in a stream. Only after an error, and at a lane's end.
    fn settle(&self, stream: usize) {
        if let Ok(_entered) = self.device.enter() {
            // SAFETY: a living stream.
            unsafe { (self.device.api.stream_synchronize)(self.streams[stream]) };
        }
    }
}

impl Drop for LaneDevice {
    fn drop(&mut self) {
        for stream in 0..self.streams.len() {
            self.settle(stream);
        }
        if let Ok(_entered) = self.device.enter() {
            for stream in self.streams {
                // SAFETY: nothing runs in it. An error leaves nothing to be done.
                unsafe { (self.device.api.stream_destroy)(stream) };
            }
            // SAFETY: no kernel is left that counts there.
            unsafe { (self.device.api.memory_free)(self.counters) };
        }
    }
}
