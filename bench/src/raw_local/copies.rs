//! Copies between two processes, prepared once and run again and again.

use anyhow::{Result, anyhow, bail};
use libc::iovec;
use nix::errno::Errno;

use super::RawAddress;
use crate::arena::Arena;
use crate::vram::PeerCopies;

/// Segments that the kernel takes in one call, on each side (`UIO_MAXIOV`).
const MAX_SEGMENTS: usize = 1024;
/// Bytes of one call: the kernel moves 2 GiB less a page at most and would report a shorter copy.
const MAX_BYTES: usize = 1 << 30;

/// Which way bytes go, as the initiator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

/// The copies of one operation.
pub(crate) struct Copies {
    way: Way,
    /// Keep mapped what the lists point into.
    _here: Arena,
    _there: Option<Arena>,
}

enum Way {
    Kernel { direction: Direction, pid: i32, calls: Vec<Call> },
    Memcpy(Vec<Block>),
    Gpu(PeerCopies),
}

/// One system call.
#[derive(Default)]
struct Call {
    local: Vec<iovec>,
    remote: Vec<iovec>,
    bytes: usize,
}

/// One block, in this process's address space.
struct Block {
    from: *const u8,
    to: *mut u8,
    len: usize,
}

impl Copies {
    /// By `process_vm_readv` or `process_vm_writev`, of blocks that lie inside (checked by the caller).
    pub(super) fn by_kernel(
        direction: Direction,
        here: &Arena,
        there: &RawAddress,
        blocks: impl Iterator<Item = (u64, u64)>,
        block_bytes: usize,
    ) -> Self {
        let mut calls: Vec<Call> = Vec::new();
        for (local, remote) in blocks {
            let mut done = 0;
            while done < block_bytes {
                let full =
                    |call: &Call| call.local.len() == MAX_SEGMENTS || call.bytes == MAX_BYTES;
                if calls.last().is_none_or(full) {
                    calls.push(Call::default());
                }
                let Some(call) = calls.last_mut() else { continue };
                let iov_len = (block_bytes - done).min(MAX_BYTES - call.bytes);
                let at = |base: u64, offset: u64| iovec {
                    iov_base: (base + offset + done as u64) as *mut libc::c_void,
                    iov_len,
                };
                call.local.push(at(here.as_ptr() as u64, local));
                call.remote.push(at(there.start, remote));
                call.bytes += iov_len;
                done += iov_len;
            }
        }
        let way = Way::Kernel { direction, pid: there.pid, calls };
        Self { way, _here: here.clone(), _there: None }
    }

    /// By memcpy, of blocks that lie inside (checked by the caller).
    pub(super) fn by_memcpy(
        direction: Direction,
        here: &Arena,
        there: &Arena,
        blocks: impl Iterator<Item = (u64, u64)>,
        len: usize,
    ) -> Self {
        let block = |(local, remote): (u64, u64)| {
            let local = here.as_ptr().wrapping_add(local as usize);
            let remote = there.as_ptr().wrapping_add(remote as usize);
            match direction {
                Direction::Read => Block { from: remote, to: local, len },
                Direction::Write => Block { from: local, to: remote, len },
            }
        };
        let way = Way::Memcpy(blocks.map(block).collect());
        Self { way, _here: here.clone(), _there: Some(there.clone()) }
    }

    /// By the driver of GPUs, of blocks that lie inside (checked by the caller).
    pub(super) fn by_gpu(
        direction: Direction,
        here: &Arena,
        there: &Arena,
        blocks: impl Iterator<Item = (u64, u64)>,
        len: usize,
    ) -> Result<Self> {
        let (Some(own), Some(other)) = (here.vram(), there.vram()) else {
            bail!("raw-gpu moves memory of GPUs only");
        };
        let (ends, blocks) = match direction {
            Direction::Read => ((own, other), blocks.collect()),
            Direction::Write => ((other, own), blocks.map(|(here, there)| (there, here)).collect()),
        };
        let way = Way::Gpu(PeerCopies::new(own.gpu(), ends, blocks, len)?);
        Ok(Self { way, _here: here.clone(), _there: Some(there.clone()) })
    }

    /// Moves the bytes; they are there when it returns.
    #[inline]
    pub(crate) fn run(&self) -> Result<()> {
        match &self.way {
            Way::Gpu(copies) => copies.run()?,
            Way::Memcpy(blocks) => {
                for block in blocks {
                    // SAFETY: both ends lie in memory (checked when the list was made) that this value keeps mapped, in
                    // two different arenas. The harness touches blocks only between passes, and the target never then.
                    unsafe { std::ptr::copy_nonoverlapping(block.from, block.to, block.len) };
                }
            }
            Way::Kernel { direction, pid, calls } => {
                for call in calls {
                    let moved = call.run(*direction, *pid);
                    if moved != call.bytes as isize {
                        return Err(refusal(moved, *pid, call.bytes));
                    }
                }
            }
        }
        Ok(())
    }

    /// System calls that one run makes.
    #[cfg(test)]
    pub(super) fn calls(&self) -> usize {
        match &self.way {
            Way::Kernel { calls, .. } => calls.len(),
            Way::Memcpy(_) | Way::Gpu(_) => 0,
        }
    }
}

impl Call {
    #[inline]
    fn run(&self, direction: Direction, pid: i32) -> isize {
        let function = match direction {
            Direction::Read => libc::process_vm_readv,
            Direction::Write => libc::process_vm_writev,
        };
        let (local, remote) = (self.local.as_slice(), self.remote.as_slice());
        // SAFETY: the local segments lie in an arena (checked when the list was made) that the owner of this call keeps
        // mapped, and nothing else touches these blocks meanwhile. The kernel checks the remote ones.
        unsafe {
            function(
                pid,
                local.as_ptr(),
                local.len() as libc::c_ulong,
                remote.as_ptr(),
                remote.len() as libc::c_ulong,
                0,
            )
        }
    }
}

/// Why a call moved less than it should have, and what to do.
#[cold]
fn refusal(moved: isize, pid: i32, wanted: usize) -> anyhow::Error {
    if moved >= 0 {
        return anyhow!("process {pid}: the kernel copied {moved} of {wanted} bytes");
    }
    explain(Errno::last(), pid)
}

pub(super) fn explain(errno: Errno, pid: i32) -> anyhow::Error {
    match errno {
        Errno::EPERM => anyhow!(
            "the kernel refuses copies from and to process {pid} (EPERM): both must be processes of one user, and \
             kernel.yama.ptrace_scope 0 or 1; in a container allow process_vm_readv and process_vm_writev, for example \
             by the capability SYS_PTRACE; or leave raw-cma out"
        ),
        Errno::ENOSYS => anyhow!(
            "the kernel has no process_vm_readv (ENOSYS): use one with CONFIG_CROSS_MEMORY_ATTACH and a sandbox that \
             lets it through, or leave raw-cma out"
        ),
        Errno::ESRCH => anyhow!(
            "there is no process {pid} (ESRCH): it has ended, or lives in another PID namespace"
        ),
        errno => anyhow!("copying from or to process {pid}: {errno}"),
    }
}
