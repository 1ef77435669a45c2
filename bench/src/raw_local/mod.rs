//! Baselines of one host: what kernel and memory alone give two processes, without an engine between them.
//!
//! `raw-cma` moves the bytes by `process_vm_readv` and `process_vm_writev` (cross memory attach), as many segments in a
//! call as the kernel takes; `raw-memcpy` by memcpy in memory that both processes map. Lists are built beforehand, and nothing
//! but the copies is timed: no request, no answer, no check. The target's process sleeps meanwhile. Notifications go
//! through a [`Mailbox`] in shared memory that both sides poll.

mod copies;
mod initiator;
mod mailbox;
mod target;

pub(crate) use copies::{Copies, Direction};
pub(crate) use initiator::RawLocalInitiator;
pub(crate) use mailbox::Mailbox;
pub(crate) use target::RawLocalTarget;

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::arena::Arena;
use crate::clock::now_ns;
use crate::layout::WARM_LEN;
use crate::pattern::mix;
use crate::vram::{Vram, VramAddress};

/// How a baseline moves its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::enum_variant_names, reason = "as users name them")]
pub(crate) enum RawKind {
    /// Bare `process_vm_readv` and `process_vm_writev`: the floor of this kernel's cross-process copies
    RawCma,
    /// Bare memcpy in memory that both processes map: the floor of this machine
    RawMemcpy,
    /// Bare `cuMemcpyAsync` between memory of GPUs, a call a block: the floor of the driver
    RawGpu,
}

impl fmt::Display for RawKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RawCma => "raw-cma",
            Self::RawMemcpy => "raw-memcpy",
            Self::RawGpu => "raw-gpu",
        })
    }
}

/// Where an initiator finds a target's memory and mailbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RawAddress {
    pid: i32,
    /// The first byte, in the target's address space.
    start: u64,
    len: usize,
    /// Descriptors of the target's: its mailbox, and its memory where that is a file.
    mailbox: i32,
    memory: Option<i32>,
    /// Where it is memory of a GPU.
    vram: Option<VramAddress>,
    /// Content tag of the first bytes, which tells this target from another process of the same number.
    token: u64,
}

impl RawAddress {
    /// The target's process.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }
}

/// What a target keeps open while it may be reached.
pub(crate) struct Offer {
    address: RawAddress,
    _files: Vec<File>,
}

impl Offer {
    /// Lets initiators reach `arena`, which is `memory` where that is a file, and a new mailbox, whose other end is
    /// returned. With `one_core` it gives way while it waits.
    pub(crate) fn new(
        arena: &Arena,
        memory: Option<File>,
        one_core: bool,
    ) -> Result<(Self, Mailbox)> {
        let (mailbox, file) = Mailbox::create(one_core)?;
        allow_any_tracer();
        let token = mix(now_ns() ^ mix(u64::from(std::process::id())));
        arena.fill(0, WARM_LEN, token, 0);
        let address = RawAddress {
            pid: std::process::id().cast_signed(),
            start: arena.as_ptr() as u64,
            len: arena.len(),
            mailbox: file.as_raw_fd(),
            memory: memory.as_ref().map(AsRawFd::as_raw_fd),
            vram: arena.vram().map(Vram::address).transpose()?,
            token,
        };
        let files = [Some(file), memory].into_iter().flatten().collect();
        Ok((Self { address, _files: files }, mailbox))
    }

    pub(crate) fn address(&self) -> &RawAddress {
        &self.address
    }
}

/// A target's memory as an initiator reaches it.
pub(crate) struct Reached {
    address: RawAddress,
    /// The target's memory in this process, where it is mapped.
    mapped: Option<Arena>,
}

impl Reached {
    /// Finds the target, proves that it is the right one and may be read, and opens its mailbox. `gpu`: the one that copies.
    pub(crate) fn new(
        kind: RawKind,
        address: RawAddress,
        gpu: Option<u32>,
        one_core: bool,
    ) -> Result<(Self, Mailbox)> {
        let mailbox = Mailbox::open(&open(address.pid, address.mailbox)?, one_core)?;
        let mapped = match (kind, address.memory) {
            (RawKind::RawCma, _) => None,
            (RawKind::RawMemcpy, Some(memory)) => {
                Some(Arena::of_file(&open(address.pid, memory)?, address.len)?)
            }
            (RawKind::RawMemcpy, None) => bail!("the target's memory is no file"),
            (RawKind::RawGpu, _) => {
                let vram = address.vram.as_ref().context("the target's memory is of no GPU")?;
                let gpu = gpu.context("the initiator's memory is of no GPU")?;
                Some(Arena::of_other_gpu(vram, gpu, address.len)?)
            }
        };
        let reached = Self { address, mapped };
        let scratch = match reached.mapped.as_ref().and_then(Arena::vram) {
            Some(there) => Arena::of_gpu(there.gpu(), WARM_LEN)?,
            None => Arena::new(WARM_LEN)?,
        };
        reached.copies(Direction::Read, &scratch, (&[0], &[0]), WARM_LEN)?.run()?;
        if scratch.check(0, WARM_LEN, reached.address.token, 0).is_err() {
            bail!(
                "process {} is not the target: {kind} needs both processes in one PID namespace",
                reached.address.pid
            );
        }
        Ok((reached, mailbox))
    }

    /// Prepares the copies of blocks of one length between offsets of `arena` and of the target's memory.
    pub(crate) fn copies(
        &self,
        direction: Direction,
        arena: &Arena,
        (local, remote): (&[u64], &[u64]),
        block_bytes: usize,
    ) -> Result<Copies> {
        let len = block_bytes as u64;
        let within = |offset: &u64| {
            offset.checked_add(len).is_some_and(|end| end <= self.address.len as u64)
        };
        ensure!(
            local.iter().all(|&offset| arena.contains(offset, len)) && remote.iter().all(within),
            "the layout does not fit the arena"
        );
        let blocks = local.iter().copied().zip(remote.iter().copied());
        Ok(match &self.mapped {
            None => Copies::by_kernel(direction, arena, &self.address, blocks, block_bytes),
            Some(there) if there.vram().is_some() => {
                Copies::by_gpu(direction, arena, there, blocks, block_bytes)?
            }
            Some(there) => Copies::by_memcpy(direction, arena, there, blocks, block_bytes),
        })
    }
}

/// Opens a file of another process by its descriptor there.
fn open(pid: i32, descriptor: i32) -> Result<File> {
    let path = format!("/proc/{pid}/fd/{descriptor}");
    File::options().read(true).write(true).open(path).with_context(|| {
        format!(
            "cannot open the shared memory of process {pid}: both must be processes of one user in one PID namespace"
        )
    })
}

/// Lets every process of this user reach this one's memory where Yama is set to children only (ptrace_scope 1).
fn allow_any_tracer() {
    // SAFETY: the call takes plain numbers and changes a permission of this process only. Kernels without Yama know no
    // such option and need none; whether the memory can be reached shows when it is.
    let _ = unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
}

#[cfg(test)]
mod tests;
