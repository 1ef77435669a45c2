//! The processes of a case, as their parent sees them.

use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::wire::{Order, Reply, Setup};
use crate::process::Helper;
use crate::session::Failure;

/// Starting nodes, connecting all of them, filling and checking.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long one is waited for until the others are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The hub's process, then those of the peers.
pub(super) struct Processes {
    environment: Vec<(String, String)>,
    helpers: Vec<Helper<Reply>>,
}

impl Processes {
    /// None yet; all will have this environment on top of ours.
    pub(super) fn new(environment: Vec<(String, String)>) -> Self {
        Self { environment, helpers: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.helpers.len()
    }

    /// Starts one more and waits until it is ready.
    pub(super) fn start(&mut self, name: &str, setup: Setup) -> Result<Reply, Failure> {
        let arguments = ["peers-side".to_owned()];
        self.helpers.push(Helper::start_with(name, &arguments, &self.environment)?);
        self.ask(self.helpers.len() - 1, &Order::Setup(setup))
    }

    /// Tells one and waits for its reply.
    pub(super) fn ask(&mut self, which: usize, order: &Order) -> Result<Reply, Failure> {
        let mut replies = self.ask_all(&[which], |_| order.clone())?;
        replies.pop().ok_or_else(|| anyhow!("no reply; this is a bug of corelane-bench").into())
    }

    /// Tells all of `which`, and then waits for all of them.
    pub(super) fn ask_all(
        &mut self,
        which: &[usize],
        order: impl Fn(usize) -> Order,
    ) -> Result<Vec<Reply>, Failure> {
        self.ask_all_for(which, order, Duration::ZERO)
    }

    /// As [`Processes::ask_all`], for orders that take a known time.
    pub(super) fn ask_all_for(
        &mut self,
        which: &[usize],
        order: impl Fn(usize) -> Order,
        duration: Duration,
    ) -> Result<Vec<Reply>, Failure> {
        for &at in which {
            self.helpers[at].send(&order(at))?;
        }
        let deadline = Instant::now() + PATIENCE + duration;
        let mut replies: Vec<Option<Reply>> = which.iter().map(|_| None).collect();
        while let Some(awaited) = replies.iter().position(Option::is_none) {
            replies[awaited] = self.receive(which[awaited], LOOK)?;
            if replies[awaited].is_some() {
                continue;
            }
            // What another says tells more than the silence of those that wait for it.
            for at in 0..self.helpers.len() {
                let Some(reply) = self.receive(at, Duration::ZERO)? else { continue };
                let asked = which.iter().position(|&asked| asked == at);
                match asked.map(|place| &mut replies[place]) {
                    Some(place @ None) => *place = Some(reply),
                    _ => return Err(unexpected(&reply)),
                }
            }
            if Instant::now() > deadline {
                let waited = (PATIENCE + duration).as_secs();
                let message = format!("no answer within {waited} s");
                return Err(self.helpers[which[awaited]].blame(message).into());
            }
        }
        Ok(replies.into_iter().flatten().collect())
    }

    fn receive(&mut self, which: usize, patience: Duration) -> Result<Option<Reply>, Failure> {
        let helper = &mut self.helpers[which];
        match helper.receive_within(patience)? {
            Some(Reply::Refused(message)) => Err(Failure::Options(message)),
            Some(Reply::Failed(message)) => Err(helper.blame(message).into()),
            reply => Ok(reply),
        }
    }
}

pub(super) fn unexpected(reply: &Reply) -> Failure {
    anyhow!("unexpected reply {reply:?}; this is a bug of corelane-bench").into()
}
