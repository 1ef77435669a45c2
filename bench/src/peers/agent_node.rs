//! An agent of NIXL as a node.

use anyhow::{Context as _, Result, bail};

use super::node::{Blocks, Node};
use super::wire::{Address, Link, Memory};
use crate::arena::Arena;
use crate::nixl::{Driver, NixlAgent, Prepared};
use crate::units::{from_hex, to_hex};

impl Node for NixlAgent {
    type Transfer = Prepared;

    fn arena(&self) -> &Arena {
        Driver::arena(self)
    }

    fn address(&self) -> Result<Address> {
        let memory = Memory::At(Driver::arena(self).as_ptr() as u64);
        Ok(Address { metadata: to_hex(&self.metadata()?), memory })
    }

    fn meet(&mut self, link: &Link, blocks: &Blocks) -> Result<Vec<Prepared>> {
        let Memory::At(address) = link.address.memory else {
            bail!("an agent cannot reach the memory of an engine");
        };
        let metadata =
            from_hex(&link.address.metadata).context("metadata that is no hexadecimal")?;
        let peer = self.introduce(&metadata, address)?;
        let Blocks { operation, places, bytes } = blocks;
        let prepare =
            |&(here, there)| self.prepare_with(peer, *operation, (&[here], &[there]), *bytes);
        places.iter().map(prepare).collect()
    }

    /// Asks once what became of it: some backends tell that they have copied when they post, others when they are asked,
    /// and after a turn over all peers this would be the larger part of the latency.
    #[inline]
    fn post(&self, transfer: &Prepared) -> Result<bool> {
        Ok(Driver::post(self, transfer)? || Driver::is_finished(self, transfer)?)
    }

    #[inline]
    fn is_finished(&self, transfer: &Prepared) -> Result<bool> {
        Driver::is_finished(self, transfer)
    }

    #[inline]
    fn progress(&mut self) -> Result<()> {
        NixlAgent::progress(self)
    }

    /// The process ends without, as those of `nixl` do.
    fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
