//! A second process with one agent and one region.

use corelane_tests::{PeerProcess, from_hex, to_hex};

use crate::{Agent, Range};

/// A peer process whose agent has one region, `r`.
#[derive(Debug)]
pub struct Target {
    /// The process.
    pub process: PeerProcess,
    /// Its agent's name.
    pub name: String,
    /// Where its region begins, in its own memory.
    pub address: u64,
}

impl Target {
    /// Sets the process up: an agent with `params` (`key=value`, with blanks between), a region that holds pattern 1.
    #[track_caller]
    pub fn start(process: PeerProcess, name: &str, len: usize, params: &str) -> Self {
        let mut target = Self { process, name: name.to_owned(), address: 0 };
        target.agent(len, params);
        target
    }

    /// Makes the agent and its region, once more where it was destroyed.
    #[track_caller]
    pub fn agent(&mut self, len: usize, params: &str) {
        self.process.ask(&format!("agent {} {params}", self.name));
        self.address = self.process.number(&format!("region r {len}"));
        if len > 0 {
            self.process.ask(&format!("fill r 1 0 {len} 0"));
        }
    }

    /// What others need to know of it.
    #[track_caller]
    pub fn metadata(&mut self) -> Vec<u8> {
        from_hex(&self.process.ask("metadata")).expect("hexadecimal")
    }

    /// Makes it known to an agent; not the other way round.
    #[track_caller]
    pub fn introduce_to(&mut self, agent: &Agent) {
        assert_eq!(agent.load(&self.metadata()).as_deref(), Ok(self.name.as_str()));
    }

    /// Makes an agent known to it.
    #[track_caller]
    pub fn load(&mut self, agent: &Agent) {
        self.process.ask(&format!("load {}", to_hex(&agent.metadata())));
    }

    /// A range of its region.
    pub fn range(&self, offset: usize, len: usize) -> Range {
        (self.address + offset as u64, len)
    }

    /// Panics unless bytes of its region are pattern `seed` from the pattern's byte `at` on.
    #[track_caller]
    pub fn assert_pattern(&mut self, seed: u64, offset: usize, len: usize, at: u64) {
        self.process.ask(&format!("check r {seed} {offset} {len} {at}"));
    }

    /// Takes notifications, which must be `expected` from `from`, in this order.
    #[track_caller]
    pub fn assert_notifications(&mut self, from: &str, expected: &[&[u8]]) {
        let answer = self.process.ask(&format!("take {}", expected.len()));
        let wanted: Vec<_> = expected.iter().map(|p| format!("{from}:{}", to_hex(p))).collect();
        assert_eq!(answer.split_whitespace().collect::<Vec<_>>(), wanted);
    }
}

/// A range of a buffer.
pub fn range(buffer: &corelane_tests::Buffer, offset: usize, len: usize) -> Range {
    (buffer.segment(offset, len).addr, len)
}
