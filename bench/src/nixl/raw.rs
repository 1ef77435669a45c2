//! A baseline in the place of NIXL: bare copies and a mailbox in shared memory, in the same processes' roles.

use anyhow::{Context as _, Result, bail, ensure};

use super::driver::{Driver, Transferred};
use super::timing::{Length, Times};
use super::wire::{Role, Setup};
use crate::arena::Arena;
use crate::case::Operation;
use crate::clock::now_ns;
use crate::parent::Refusal;
use crate::pinning;
use crate::raw_local::{Copies, Direction, Mailbox, Offer, RawAddress, RawKind, Reached};
use crate::vram::Vram;

/// One side of the baseline.
pub(crate) struct RawSide {
    kind: RawKind,
    arena: Arena,
    one_core: bool,
    side: Side,
}

enum Side {
    Target {
        offer: Offer,
        mailbox: Mailbox,
    },
    /// Has nothing until it is introduced.
    Initiator(Option<(Reached, Mailbox, i32)>),
}

impl RawSide {
    /// Maps the memory; what it takes to reach the other side comes with the introduction.
    pub(crate) fn new(kind: RawKind, setup: &Setup) -> Result<Self> {
        let one_core = pinning::allowed_cores()?.len() == 1;
        let (arena, memory) = match (kind, setup.role) {
            (RawKind::RawMemcpy, Role::Target) => {
                let (arena, memory) = Arena::shared(setup.arena_bytes.max(4096))?;
                (arena, Some(memory))
            }
            _ => (setup.arena()?, None),
        };
        let side = match setup.role {
            Role::Initiator => Side::Initiator(None),
            Role::Target => {
                let (offer, mailbox) = Offer::new(&arena, memory, one_core)?;
                Side::Target { offer, mailbox }
            }
        };
        Ok(Self { kind, arena, one_core, side })
    }

    fn reached(&self) -> Result<&Reached> {
        match &self.side {
            Side::Initiator(Some((reached, ..))) => Ok(reached),
            _ => bail!("no target was introduced; this is a bug of corelane-bench"),
        }
    }
}

impl Driver for RawSide {
    const PREPARES: bool = false;

    type Prepared = Copies;
    type Request = ();

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn metadata(&self) -> Result<Vec<u8>> {
        match &self.side {
            Side::Initiator(_) => Ok(Vec::new()),
            Side::Target { offer, .. } => {
                serde_json::to_vec(offer.address()).context("encoding an address")
            }
        }
    }

    fn meet(&mut self, metadata: &[u8], _address: u64) -> Result<()> {
        if let Side::Initiator(target) = &mut self.side {
            let address: RawAddress =
                serde_json::from_slice(metadata).context("the target's address")?;
            let pid = address.pid();
            let gpu = self.arena.vram().map(Vram::gpu);
            let (reached, mailbox) = Reached::new(self.kind, address, gpu, self.one_core)
                .map_err(|error| Refusal(format!("{}: {error:#}", self.kind)))?;
            *target = Some((reached, mailbox, pid));
        }
        Ok(())
    }

    fn prepare(
        &self,
        operation: Operation,
        places: (&[u64], &[u64]),
        block_bytes: usize,
    ) -> Result<Copies> {
        let direction = match operation {
            Operation::Write => Direction::Write,
            _ => Direction::Read,
        };
        self.reached()?.copies(direction, &self.arena, places, block_bytes)
    }

    fn request(&self, _prepared: &Copies) -> Result<()> {
        bail!("a baseline has no requests; this is a bug of corelane-bench")
    }

    #[inline]
    fn transfer(&self, prepared: &Copies) -> Result<Transferred> {
        let started = now_ns();
        prepared.run()?;
        Ok(Transferred { posted_ns: None, completed_ns: now_ns() - started })
    }

    fn time_in_threads(
        &self,
        _: &[Vec<Copies>],
        _: &[usize],
        _: Length,
        _: (impl FnOnce(), impl FnOnce()),
    ) -> Result<Times> {
        bail!("a baseline has one thread; this is a bug of corelane-bench")
    }

    #[inline]
    fn post(&self, prepared: &Copies) -> Result<bool> {
        prepared.run()?;
        Ok(true)
    }

    fn is_finished(&self, _prepared: &Copies) -> Result<bool> {
        Ok(true)
    }

    #[inline]
    fn notify(&mut self, text: &str) -> Result<()> {
        match &mut self.side {
            Side::Initiator(Some((_, mailbox, _))) => mailbox.send(text.as_bytes()),
            _ => bail!("only an introduced initiator notifies; this is a bug of corelane-bench"),
        }
    }

    #[inline]
    fn await_answer(&mut self, text: &str) -> Result<()> {
        let Side::Initiator(Some((_, mailbox, pid))) = &mut self.side else {
            bail!("only an introduced initiator waits; this is a bug of corelane-bench");
        };
        let answer = mailbox.receive(*pid)?;
        ensure!(
            answer == text.as_bytes(),
            "verification failed: sent the notification {text}, received {:?}",
            String::from_utf8_lossy(answer)
        );
        Ok(())
    }

    #[inline]
    fn answer(&mut self, seen: impl FnMut(&[u8], u64)) -> Result<()> {
        let Side::Target { mailbox, .. } = &mut self.side else { return Ok(()) };
        mailbox.send_back(seen)
    }
}
