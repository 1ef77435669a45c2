//! The committed PTX, and what a copy costs where there is a GPU.

use std::fmt::Write;
use std::time::{Duration, Instant};

use super::api;
use super::device::Device;
use super::lane::{LaneGpu, Launch};
use super::table::{Table, Tile};

#[test]
fn the_committed_ptx_was_made_of_the_kernel() {
    use sha2::{Digest, Sha256};
    fn digest(bytes: &[u8]) -> String {
        let mut digest = String::new();
        for byte in Sha256::digest(bytes) {
            let _ = write!(digest, "{byte:02x}");
        }
        digest
    }
    let source = digest(include_bytes!("kernel.cu"));
    let (head, ptx) = include_str!("kernel.ptx").split_once('\n').unwrap();
    let (made_of, made) = head.split_once(", of which came ").unwrap();
    assert!(made_of.ends_with(&source), "kernel.cu has changed: run scripts/build-gpu-kernel.sh");
    assert_eq!(made, digest(ptx.as_bytes()), "kernel.ptx was changed by hand");
    assert!(ptx.contains(".target sm_70") && ptx.contains(".entry corelane_copy("));
}

#[test]
fn a_process_without_a_driver_is_told_so() {
    if api::loaded().is_err() {
        assert!(Device::get(0).is_err() && !super::gpu_is_present());
        assert_eq!(super::is_device_memory(4096), None);
    }
}

fn p50(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

/// `cargo test --release -p corelane --lib gpu::cuda::tests::costs -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, on a machine with a GPU"]
fn costs() {
    let Ok(device) = Device::get(0) else { return eprintln!("SKIPPED: no GPU") };
    costs_of(device, device);
    if let Ok(other) = Device::get(1) {
        eprintln!("from GPU 1:");
        device.reach(other).unwrap();
        costs_of(device, other);
    }
}

fn costs_of(device: &'static Device, other: &'static Device) {
    const LEN: usize = 256 << 20;
    let mut memory = [0u64; 2];
    for (memory, device) in memory.iter_mut().zip([device, other]) {
        let _entered = device.enter().unwrap();
        // SAFETY: room for one address.
        assert_eq!(unsafe { (device.api.memory_alloc)(memory, LEN) }, 0);
    }
    let [to, from] = memory;
    let began = Instant::now();
    for _ in 0..10_000 {
        drop(device.enter().unwrap());
    }
    eprintln!("entering and leaving the context: {:?}", began.elapsed() / 10_000);
    let allocation = super::allocation_of(to, LEN as u64, 0).unwrap();
    let began = Instant::now();
    for _ in 0..10_000 {
        assert!(allocation.is_live());
    }
    eprintln!("looking whether an allocation is live: {:?}", began.elapsed() / 10_000);
    let mut lane = LaneGpu::default();
    assert!(lane.take_part(Device::lane_part(device).unwrap()).is_none());
    let mut run = |tiles: &[Tile], large: &[(u64, u64, u64)], blocks: u32| {
        let table = Table::new(device, tiles.to_vec()).unwrap();
        let (mut posts, mut ends) = (Vec::new(), Vec::new());
        for _ in 0..200 {
            let launch = Launch { device, tiles: table.tiles(), large, blocks, bulk: true };
            let began = Instant::now();
            // SAFETY: the memory is this test's.
            let mut flight = unsafe { lane.launch(&launch) }.unwrap().unwrap();
            posts.push(began.elapsed());
            while lane.poll(&mut flight, None).is_none() {}
            ends.push(began.elapsed());
        }
        (p50(posts), p50(ends))
    };
    let tile = |at: u64, len: u32| Tile { to: to + at, from: from + at, len, reserved: 0 };
    let (post, end) = run(&[], &[], 1);
    eprintln!("nothing, flag written by the stream: launch {post:.1} us, end {end:.1} us");
    for blocks in [4, 8, 16, 32, 64, 132] {
        // 4096 blocks of 4 KiB, at the even places.
        let scattered: Vec<Tile> = (0..4096).map(|at| tile(at * 8192, 4096)).collect();
        let (_, many) = run(&scattered, &[], blocks);
        let (_, one) = run(&[tile(0, 4096)], &[], blocks);
        let mut ends = String::new();
        for mib in [1u64, 4, 16, 64] {
            let piece = (mib * 128).next_power_of_two().clamp(4 << 10, 64 << 10);
            let tiles: Vec<Tile> =
                (0..(mib << 20) / piece).map(|at| tile(at * piece, piece as u32)).collect();
            let (_, end) = run(&tiles, &[], blocks);
            let _ = write!(ends, "  {mib} MiB {end:.1}");
        }
        eprintln!("{blocks:>3} blocks: 4 KiB {one:.1}  4096 x 4 KiB {many:.1}{ends} us");
    }
    for len in [4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64u64 << 20] {
        let (post, end) = run(&[], &[(to, from, len)], 1);
        let (_, kernel) = match len {
            0..1_000_000 => run(&[tile(0, len as u32)], &[], 16),
            _ => (0.0, f64::NAN),
        };
        eprintln!(
            "copy engine: {len:>8} B: launch {post:.1}, end {end:.1} us; one warp {kernel:.1}"
        );
    }
    let two = [(to, from, 64 << 10), (to + (1 << 20), from + (1 << 20), 64 << 10)];
    let (post, end) = run(&[], &two, 1);
    eprintln!("copy engine: 2 x 64 KiB: launch {post:.1}, end {end:.1} us");
    ways_to_see_the_end(device, tile(0, 4096));
    ends_of_the_copy_engine(device, to, from);
}

/// What a copy of one range by the copy engine costs beyond itself, by what tells of its end.
fn ends_of_the_copy_engine(device: &'static Device, to: u64, from: u64) {
    let _entered = device.enter().unwrap();
    let stream = device.new_stream().unwrap();
    let flags = super::memory::HostMemory::new(device, 64).unwrap();
    let flag = flags.address() as usize as *const u32;
    for by_flag in [false, true] {
        for len in [4 << 10, 64 << 10, 1 << 20] {
            let (mut copied, mut posted, mut ended) = (Vec::new(), Vec::new(), Vec::new());
            for value in 1..=1000u32 {
                let value = value + len as u32;
                let began = Instant::now();
                // SAFETY: the memory is this test's.
                assert_eq!(unsafe { (device.api.copy_async)(to, from, len, stream) }, 0);
                copied.push(began.elapsed());
                if by_flag {
                    // SAFETY: the flag is this test's.
                    let status =
                        unsafe { (device.api.stream_write)(stream, flags.address(), value, 0) };
                    assert_eq!(status, 0);
                }
                posted.push(began.elapsed());
                // SAFETY: our own host memory, and a living stream.
                while unsafe {
                    if by_flag {
                        flag.read_volatile() != value
                    } else {
                        (device.api.stream_query)(stream) != 0
                    }
                } {}
                ended.push(began.elapsed());
            }
            let how = if by_flag { "written by the stream" } else { "cuStreamQuery" };
            let (copied, posted, ended) = (p50(copied), p50(posted), p50(ended));
            eprintln!(
                "copy engine, {len:>7} B, {how}: copy called {copied:.2}, posted {posted:.2}, end {ended:.2} us"
            );
        }
    }
}

/// By the flag, or by asking for the stream.
fn ways_to_see_the_end(device: &'static Device, tile: Tile) {
    let stream = {
        let _entered = device.enter().unwrap();
        device.new_stream().unwrap()
    };
    let _entered = device.enter().unwrap();
    let mut asked = Vec::new();
    let table = Table::new(device, vec![tile]).unwrap();
    let flags = super::memory::HostMemory::new(device, 64).unwrap();
    let mut counter = 0;
    // SAFETY: room for one address.
    assert_eq!(unsafe { (device.api.memory_alloc)(&raw mut counter, 64) }, 0);
    // SAFETY: both were just allocated, the flags as zeros, and the stream is new.
    unsafe { (device.api.copy_async)(counter, flags.address(), 64, stream) };
    for by_flag in [true, false] {
        asked.clear();
        for value in 1..=500u32 {
            let value = if by_flag { value } else { value + 1000 };
            let began = Instant::now();
            let (mut tiles, mut count, mut arrived, mut done, mut value) =
                (table.tiles().address, 1u32, counter, flags.address(), value);
            let mut only = table.tiles().first;
            let mut arguments: [*mut std::ffi::c_void; 6] = [
                (&raw mut tiles).cast(),
                (&raw mut count).cast(),
                (&raw mut arrived).cast(),
                (&raw mut done).cast(),
                (&raw mut value).cast(),
                (&raw mut only).cast(),
            ];
            // SAFETY: the kernel's arguments; all memory is this test's.
            let status = unsafe {
                (device.api.launch)(
                    device.kernel(),
                    1,
                    1,
                    1,
                    32,
                    1,
                    1,
                    0,
                    stream,
                    arguments.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            assert_eq!(status, 0);
            let flag = flags.address() as usize as *const u32;
            // SAFETY: our own host memory, and a living stream.
            while unsafe {
                if by_flag {
                    flag.read_volatile() != value
                } else {
                    (device.api.stream_query)(stream) != 0
                }
            } {}
            asked.push(began.elapsed());
        }
        let how = if by_flag { "flag in host memory" } else { "cuStreamQuery" };
        eprintln!("4 KiB, end seen by {how}: {:.1} us", p50(asked.clone()));
    }
}
