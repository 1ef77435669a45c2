//! The target's process: opens cases for an initiator, renews and checks memory between passes.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::answering::Ledger;
use crate::arena::{self, Arena};
use crate::case::{Backend, Operation, RunSpec};
use crate::control::{self, Ask, Control, PROTOCOL, Reply, TargetAddress};
use crate::cpu::{Burners, Usage};
use crate::engine_side::EngineTarget;
use crate::layout::{BULK_INDEX, Layout};
use crate::manifest::Host;
use crate::parent::Refusal;
use crate::pinning;
use crate::raw_local::RawLocalTarget;
use crate::raw_tcp::RawTarget;
use crate::units::from_hex;

/// How the target's process is placed and bounded.
#[derive(Clone, Debug)]
pub(crate) struct ServerOptions {
    pub(crate) listen: SocketAddr,
    /// Cores for lanes, of which a run takes as many as it wants; a baseline's thread takes the first.
    pub(crate) cores: Vec<usize>,
    pub(crate) max_memory: usize,
    /// Ends after the first initiator.
    pub(crate) once: bool,
    /// Says where it listens as one line of JSON instead of prose.
    pub(crate) announce: bool,
}

/// What `announce` prints.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Announcement {
    pub(crate) listening: SocketAddr,
}

/// How long a server waits for the next question of a connected initiator before it frees itself for another.
const IDLE_LIMIT: Duration = Duration::from_secs(600);

/// Serves initiators, one after the other.
pub(crate) fn run(options: &ServerOptions) -> Result<()> {
    let listener = TcpListener::bind(options.listen)
        .with_context(|| format!("cannot listen on {}: choose another --listen", options.listen))?;
    let listening = listener.local_addr().context("the control listener's address")?;
    let mut stdout = std::io::stdout();
    if options.announce {
        control::write_line(&mut stdout, &Announcement { listening })?;
    } else {
        writeln!(
            stdout,
            "listening on {listening}, lane on core {}; stop with ctrl-c",
            pinning::first(&options.cores)?
        )
        .context("writing to standard output")?;
    }
    let mut memory = None;
    loop {
        let (stream, peer) = listener.accept().context("accepting an initiator")?;
        let served = serve(stream, options, &mut memory);
        if options.once {
            return served;
        }
        match served {
            Ok(()) => writeln!(stdout, "{peer} is done").context("writing to standard output")?,
            Err(error) => crate::say!("corelane-bench: {peer}: {error:#}"),
        }
    }
}

/// Serves one initiator until it closes its connection.
fn serve(stream: TcpStream, options: &ServerOptions, memory: &mut Option<Arena>) -> Result<()> {
    let mut control = Control::new(stream, Some(IDLE_LIMIT))?;
    let mut greeted = false;
    let mut open: Option<OpenCase> = None;
    while let Some(ask) = control.next()? {
        let answer = match ask {
            Ask::Hello { .. } => {
                greeted = true;
                Ok(Reply::Welcome { protocol: PROTOCOL, host: Box::new(Host::describe()) })
            }
            _ if !greeted => bail!("a control connection that does not begin with a greeting"),
            Ask::Open { spec } => {
                // Closed first: two engines at a time would share the lane's core.
                drop(open.take());
                OpenCase::open(*spec, control.local_ip()?, options, memory).map(
                    |(case, address)| {
                        let placement = case.placement.clone();
                        open = Some(case);
                        Reply::Opened { address, placement }
                    },
                )
            }
            Ask::Introduce { metadata } => with(&mut open, |case| case.introduce(&metadata)),
            Ask::Begin { sequence, slots } => with(&mut open, |case| case.begin(sequence, slots)),
            Ask::End { sequence, slots, notifications } => {
                with(&mut open, |case| case.end(sequence, slots, notifications))
            }
            Ask::Close => open.take().map_or(Ok(()), OpenCase::close).map(|()| Reply::Closed),
        };
        control.reply(&answer.unwrap_or_else(|error| {
            let message = format!("{error:#}");
            if error.is::<Refusal>() {
                Reply::Refused { message }
            } else {
                Reply::Failed { message }
            }
        }))?;
    }
    Ok(())
}

fn with(
    open: &mut Option<OpenCase>,
    act: impl FnOnce(&mut OpenCase) -> Result<Reply>,
) -> Result<Reply> {
    open.as_mut().context("no case is open").and_then(act)
}

enum Serving {
    Engine(Box<EngineTarget>),
    RawTcp(#[expect(dead_code, reason = "kept alive while the case is open")] RawTarget),
    RawLocal(#[expect(dead_code, reason = "kept alive while the case is open")] RawLocalTarget),
}

/// A case that is being served. Fields drop in this order: first whoever touches the memory, then the memory.
struct OpenCase {
    serving: Serving,
    burners: Burners,
    spec: RunSpec,
    layout: Layout,
    arena: Arena,
    ledger: Ledger,
    used_at_begin: Usage,
    placement: String,
}

impl OpenCase {
    fn open(
        spec: RunSpec,
        ip: IpAddr,
        options: &ServerOptions,
        memory: &mut Option<Arena>,
    ) -> Result<(Self, TargetAddress)> {
        spec.validate(options.max_memory).map_err(anyhow::Error::msg)?;
        let layout = Layout::new(&spec);
        let limit = options.max_memory + (1 << 20);
        arena::ensure_within(layout.arena_bytes, limit)?;
        let ledger = Ledger::new();
        ledger.set_paused(true);
        let core = pinning::first(&options.cores)?;
        if spec.needs_other_memory() {
            // What was kept for other cases would stand beside this one's.
            *memory = None;
        }
        let mut own = || arena::grow(memory, layout.arena_bytes, limit);
        let (serving, arena, address, placement) = match spec.backend {
            Backend::RawTcp => {
                let arena = own()?;
                let target = RawTarget::start(ip, arena.clone(), Some(core), ledger.clone())?;
                let address = TargetAddress::RawTcp { port: target.port() };
                (Serving::RawTcp(target), arena, address, format!("thread on core {core}"))
            }
            Backend::RawCma | Backend::RawMemcpy | Backend::RawGpu => {
                let (arena, file) = match spec.backend {
                    Backend::RawMemcpy => {
                        let (arena, file) = Arena::shared(layout.arena_bytes)?;
                        (arena, Some(file))
                    }
                    Backend::RawGpu => (Arena::of_gpu(spec.gpus[1], layout.arena_bytes)?, None),
                    _ => (own()?, None),
                };
                let one_core = pinning::allowed_cores()?.len() == 1;
                let (mut target, mailbox) = RawLocalTarget::start(&arena, file, one_core)?;
                let answers = spec.case.operation.notifies();
                if answers {
                    target.answer(mailbox, arena.clone(), Some(core), ledger.clone())?;
                }
                let placement =
                    if answers { format!("thread on core {core}") } else { "asleep".to_owned() };
                let address = TargetAddress::RawLocal(target.address().clone());
                (Serving::RawLocal(target), arena, address, placement)
            }
            Backend::Corelane => {
                let cores = pinning::lanes(&options.cores, spec.lanes)?;
                let bytes = layout.arena_bytes;
                let target = EngineTarget::start(&spec, bytes, own, cores, ip, ledger.clone())?;
                let (address, placement) = (target.address(), target.placement(&spec));
                let arena = target.arena().clone();
                (Serving::Engine(Box::new(target)), arena, address, placement)
            }
        };
        let burners = if spec.burn {
            Burners::start(pinning::lanes(&options.cores, spec.lanes)?)?
        } else {
            Burners::none()
        };
        let case = Self {
            serving,
            burners,
            spec,
            layout,
            arena,
            ledger,
            used_at_begin: Usage::default(),
            placement,
        };
        Ok((case, address))
    }

    fn introduce(&mut self, metadata: &str) -> Result<Reply> {
        let metadata =
            from_hex(metadata).context("the client sent metadata that is not hexadecimal")?;
        match &mut self.serving {
            Serving::Engine(target) => target.introduce(&self.spec, &metadata)?,
            Serving::RawTcp(_) | Serving::RawLocal(_) => {}
        }
        Ok(Reply::Ready)
    }

    fn close(mut self) -> Result<()> {
        match &mut self.serving {
            Serving::Engine(target) => target.close(),
            Serving::RawTcp(_) | Serving::RawLocal(_) => Ok(()),
        }
    }

    /// Offsets of the blocks of the first `slots` slots, with the index that their pattern is made of.
    fn blocks(&self, slots: usize) -> Result<impl Iterator<Item = (u64, u64)> + '_> {
        ensure!(slots <= self.layout.slots.len(), "{slots} slots of {}", self.layout.slots.len());
        let blocks = self.layout.blocks().take(slots * self.spec.case.blocks);
        Ok(blocks.map(|(index, _, remote)| (index, remote)))
    }

    fn begin(&mut self, sequence: u64, slots: usize) -> Result<Reply> {
        let len = self.layout.block_bytes;
        for (index, offset) in self.blocks(slots)? {
            match self.spec.case.operation {
                Operation::Read => self.arena.fill(offset, len, sequence, index),
                _ => self.arena.poison(offset, len),
            }
        }
        if let Some((at, len)) = self.layout.bulk {
            self.arena.poison(at, len);
        }
        self.ledger.set_paused(false);
        self.used_at_begin = self.burners.net_usage();
        Ok(Reply::Ready)
    }

    fn end(&mut self, sequence: u64, slots: usize, notifications: u64) -> Result<Reply> {
        let usage = self.burners.net_usage().since(self.used_at_begin);
        self.ledger.set_paused(true);
        let one_way = self.ledger.settle(notifications)?;
        if self.spec.case.operation != Operation::Read {
            for (index, offset) in self.blocks(slots)? {
                self.arena.check(offset, self.layout.block_bytes, sequence, index).map_err(|mismatch| {
                    anyhow::anyhow!(
                        "verification failed: {}: block {index} in the target's memory: {mismatch}",
                        self.spec.case.id()
                    )
                })?;
            }
        }
        if let Some((at, len)) = self.layout.bulk {
            self.arena.check(at, len, sequence, BULK_INDEX).map_err(|mismatch| {
                anyhow::anyhow!(
                    "verification failed: {}: the large write: {mismatch}",
                    self.spec.case.id()
                )
            })?;
        }
        Ok(Reply::Ended { usage, one_way })
    }
}
