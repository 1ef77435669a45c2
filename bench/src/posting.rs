//! `corelane-bench posting`: what a transfer over RDMA costs before and after the device, measured with a device that does
//! nothing (`libcorelane_noop_verbs.so`). No bytes move; everything else is the engine as it is.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use corelane::{
    Access, AssistMode, Engine, EngineConfig, LaneSpec, Operation, Peer, Region, Status, Transfer,
    TransportKind,
};
use hdrhistogram::Histogram;

use crate::arena::Arena;
use crate::engine_side::PATIENCE;

const VARIABLE: &str = "CORELANE_LIBIBVERBS";
const PROVIDER: &str = "libcorelane_noop_verbs.so";
const BLOCK: u64 = 4096;
/// More than any cache holds.
const COLD_BYTES: usize = 256 << 20;

#[derive(Debug, Args)]
pub(crate) struct PostingArgs {
    /// The provider that does nothing [default: beside this program]
    #[arg(long, value_name = "FILE")]
    provider: Option<PathBuf>,
    /// Descriptors of a transfer, as a comma list
    #[arg(long, value_delimiter = ',', default_value = "1,16,256,4096")]
    descriptors: Vec<usize>,
    /// Only with what the last transfer has left in the caches
    #[arg(long)]
    warm: bool,
    /// Time for each figure
    #[arg(long, value_name = "TIME", value_parser = crate::units::parse_duration, default_value = "1s")]
    duration: Duration,
}

/// Starts this program once more with the provider in its environment, where the engine looks for it.
pub(crate) fn run(options: &PostingArgs) -> Result<()> {
    if std::env::var_os(VARIABLE).is_some() {
        return measure(options);
    }
    let own = std::env::current_exe().context("looking for this program")?;
    let provider = match &options.provider {
        Some(path) => path.clone(),
        None => own.with_file_name(PROVIDER),
    };
    ensure!(
        provider.exists(),
        "{} is not there: cargo build --release -p corelane-noop-verbs",
        provider.display()
    );
    let error = Command::new(own).args(std::env::args_os().skip(1)).env(VARIABLE, provider).exec();
    Err(error).context("starting this program once more")
}

struct Pair {
    near: Engine,
    peer: Peer,
    own: Region,
    _far: Engine,
    there: Region,
}

impl Pair {
    fn new(memory: &Arena) -> Result<Self> {
        let config = || {
            let mut config = EngineConfig::default();
            config.lanes = LaneSpec::Unpinned { count: 1 };
            config.assist = AssistMode::Always;
            config.transports = vec![TransportKind::Rdma];
            config.listen.addresses = vec![std::net::Ipv4Addr::LOCALHOST.into()];
            config
        };
        let (near, far) = (Engine::new("near", config())?, Engine::new("far", config())?);
        let register = |engine: &Engine| {
            // SAFETY: the memory outlives the engines, and nothing is moved.
            unsafe { engine.register(memory.as_ptr(), memory.len(), Access::READ_WRITE) }
        };
        let (own, there) = (register(&near)?, register(&far)?);
        let peer = near.load_peer(&far.metadata())?;
        peer.connect(PATIENCE)?;
        let pair = Self { near, peer, own, _far: far, there };
        let deadline = Instant::now() + PATIENCE;
        while pair.transport() != Some(TransportKind::Rdma) {
            ensure!(Instant::now() < deadline, "no RDMA: {:?}", pair.near.stats().peers);
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(pair)
    }

    fn transport(&self) -> Option<TransportKind> {
        self.near.stats().peers.first().and_then(|peer| peer.transport)
    }

    /// Blocks without a neighbour on either side: a work request each.
    fn transfer(&self, descriptors: usize) -> Result<Transfer> {
        let (local, remote): (Vec<_>, Vec<_>) = (0..descriptors as u64)
            .map(|i| 2 * i * BLOCK)
            .map(|at| (self.own.segment(at, BLOCK), self.there.descriptor().segment(at, BLOCK)))
            .unzip();
        Ok(self.near.prepare(Operation::Read, &self.peer, &local, &remote)?.transfer())
    }
}

fn once(transfer: &Transfer) -> Result<Duration> {
    let start = Instant::now();
    transfer.post()?;
    loop {
        match transfer.status() {
            Status::InProgress => {}
            Status::Done => return Ok(start.elapsed()),
            other => bail!("a transfer ended: {other:?}"),
        }
    }
}

/// Throws everything else out of the caches.
fn cool(buffer: &mut [u64]) {
    for word in buffer.iter_mut().step_by(8) {
        *word = word.wrapping_add(1);
    }
}

fn measure(options: &PostingArgs) -> Result<()> {
    let most = options.descriptors.iter().copied().max().unwrap_or(1);
    ensure!((1..=1 << 20).contains(&most), "1 to 1048576 descriptors are possible");
    let memory = Arena::new(2 * most * BLOCK as usize)?;
    let pair = Pair::new(&memory)?;
    let mut buffer = vec![0u64; COLD_BYTES / 8];
    println!(
        "post to completion, a device that does nothing, the caller's thread driving the lane; 4 KiB blocks without neighbours"
    );
    println!("descriptors  caches   requests  doorbells   p50 us   p99 us   ns a request");
    for &descriptors in &options.descriptors {
        ensure!(descriptors > 0, "a transfer has a descriptor at least");
        let transfer = pair.transfer(descriptors)?;
        for cold in [false, true].into_iter().filter(|cold| !(*cold && options.warm)) {
            let before = pair.near.stats().totals;
            let mut times = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
            let start = Instant::now();
            while start.elapsed() < options.duration || times.len() < 20 {
                if cold {
                    cool(&mut buffer);
                }
                let took = once(&transfer)?;
                times.saturating_record(took.as_nanos() as u64);
            }
            let after = pair.near.stats().totals;
            let each = |total: u64| total / times.len();
            let p50 = times.value_at_quantile(0.5);
            println!(
                "{descriptors:>11}  {:<6}  {:>9}  {:>9}  {:>7.2}  {:>7.2}  {:>13.1}",
                if cold { "cold" } else { "warm" },
                each(after.requests_sent - before.requests_sent),
                each(after.rdma_doorbells - before.rdma_doorbells),
                p50 as f64 / 1e3,
                times.value_at_quantile(0.99) as f64 / 1e3,
                p50 as f64 / descriptors as f64,
            );
        }
    }
    Ok(())
}
