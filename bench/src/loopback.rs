//! Both sides on this host: one server and one client process per pair, pinned, started from this executable.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::case::RunSpec;
use crate::client::{Client, ClientOptions, Outcome};
use crate::control::{read_line, write_line};
use crate::coordinator::Pair;
use crate::manifest::Host;
use crate::parent::Refusal;
use crate::pinning::Cores;
use crate::process::Helper;
use crate::server::Announcement;

/// Starting a process and greeting takes milliseconds; seconds only on a machine in trouble.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Added to a run's own duration before its process is given up.
const RUN_PATIENCE: Duration = Duration::from_secs(120);

/// Where one pair runs.
#[derive(Clone, Debug)]
pub(crate) struct Placement {
    pub(crate) server_cores: Cores,
    pub(crate) client_cores: Cores,
    pub(crate) caller_core: Option<usize>,
}

/// What the coordinator tells a client process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Order {
    Prepare(Box<RunSpec>),
    Go,
}

/// What a client process tells the coordinator.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Report {
    /// Connected; with what both sides say about themselves.
    Hello {
        initiator: Box<Host>,
        target: Box<Host>,
    },
    Prepared,
    Outcome(Box<Outcome>),
    Failed(String),
    /// The user asked for something that cannot be.
    Refused(String),
}

impl Report {
    fn of(error: &anyhow::Error) -> Self {
        let message = format!("{error:#}");
        if error.is::<Refusal>() { Self::Refused(message) } else { Self::Failed(message) }
    }
}

/// A server and a client process.
pub(crate) struct LoopbackPair {
    // The client first: it says goodbye to the server.
    client: Helper<Report>,
    _server: Helper<Announcement>,
    duration: Duration,
    hosts: (Host, Host),
}

impl LoopbackPair {
    /// Starts both processes and waits until they know each other.
    pub(crate) fn start(number: usize, placement: Placement, max_memory: usize) -> Result<Self> {
        let Placement { server_cores, client_cores, caller_core } = placement;
        let memory = max_memory.to_string();
        let mut server: Helper<Announcement> = Helper::start(
            &format!("server {number}"),
            &words(&[
                "server",
                "--once",
                "--announce",
                "--listen",
                "127.0.0.1:0",
                "--core",
                &server_cores.to_string(),
                "--max-memory",
                &memory,
            ]),
        )?;
        let listening: SocketAddr = server.receive(START_PATIENCE)?.listening;
        let caller = caller_core.map_or_else(|| "none".to_owned(), |core| core.to_string());
        let mut client: Helper<Report> = Helper::start(
            &format!("client {number}"),
            &words(&[
                "worker",
                "--connect",
                &listening.to_string(),
                "--core",
                &client_cores.to_string(),
                "--caller-core",
                &caller,
                "--max-memory",
                &memory,
            ]),
        )?;
        let hosts = match client.receive(START_PATIENCE)? {
            Report::Hello { initiator, target } => (*initiator, *target),
            Report::Failed(message) => bail!("{message}"),
            Report::Refused(message) => bail!(Refusal(message)),
            other => bail!("unexpected greeting {other:?}"),
        };
        Ok(Self { client, _server: server, duration: Duration::ZERO, hosts })
    }

    /// Initiator's and target's host.
    pub(crate) fn hosts(&self) -> &(Host, Host) {
        &self.hosts
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

impl Pair for LoopbackPair {
    fn prepare(&mut self, spec: &RunSpec) -> Result<()> {
        self.duration = spec.duration;
        self.client.send(&Order::Prepare(Box::new(spec.clone())))?;
        match self.client.receive(RUN_PATIENCE)? {
            Report::Prepared => Ok(()),
            Report::Failed(message) => bail!("{message}"),
            Report::Refused(message) => bail!(Refusal(message)),
            other => bail!("unexpected report {other:?}"),
        }
    }

    fn start(&mut self) -> Result<()> {
        self.client.send(&Order::Go)
    }

    fn collect(&mut self) -> Result<Outcome> {
        match self.client.receive(self.duration * 4 + RUN_PATIENCE)? {
            Report::Outcome(outcome) => Ok(*outcome),
            Report::Failed(message) => bail!("{message}"),
            other => bail!("unexpected report {other:?}"),
        }
    }
}

/// The client process of a pair: obeys its parent until its input ends.
pub(crate) fn work(options: ClientOptions) -> Result<()> {
    let mut stdout = std::io::stdout();
    let mut stdin = std::io::stdin().lock();
    let mut client = match Client::connect(options) {
        Ok((client, target)) => {
            let initiator = Box::new(Host::describe());
            write_line(&mut stdout, &Report::Hello { initiator, target })?;
            client
        }
        Err(error) => return write_line(&mut stdout, &Report::of(&error)),
    };
    while let Some(order) = read_line::<Order>(&mut stdin).context("the parent's orders")? {
        let report = match order {
            Order::Prepare(spec) => client.prepare(*spec).map(|()| Report::Prepared),
            Order::Go => client.measure().map(|outcome| Report::Outcome(Box::new(outcome))),
        };
        write_line(&mut stdout, &report.unwrap_or_else(|error| Report::of(&error)))?;
    }
    Ok(())
}
