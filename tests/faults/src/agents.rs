//! Processes with several agents that transfer to each other for a long time: the soak, and false deaths.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use corelane::{Access, Engine, Error, Operation, Peer, Region, RegionDescriptor};
use corelane_tests::{BOUND, Buffer, PeerProcess, Random, apply, from_hex, local_config, to_hex};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::side::Usage;
use crate::usage::Samples;

const LEN: usize = 1 << 20;

/// What the watch tells a process of agents.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// Answer: the cards of all its agents.
    Cards,
    /// Agents of others that are there now. What is gone is unloaded.
    Meet(Vec<Card>),
    /// Answer: [`Report`], of all that has happened so far.
    Report,
}

/// How an agent is found.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Card {
    name: String,
    metadata: String,
    region: String,
}

#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Report {
    usage: Usage,
    completed: u64,
    failed: u64,
    liveness_timeouts: u64,
    wrong: Vec<String>,
    last_error: Option<String>,
}

/// An engine with memory that others read and write, and its acquaintances.
struct Agent {
    name: String,
    engine: Engine,
    served: Buffer,
    region: Region,
    memory: Buffer,
    own: Region,
    known: HashMap<String, (Peer, RegionDescriptor)>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Role {
    /// Names of its agents, with commas between.
    #[arg(long)]
    names: String,
    #[arg(long)]
    settings: String,
    /// Threads that only burn time.
    #[arg(long, default_value_t = 0)]
    busy: usize,
}

fn seed_of(name: &str) -> u64 {
    name.bytes().fold(7, |seed: u64, byte| seed.wrapping_mul(31) + u64::from(byte))
}

/// Whether a transfer may end so when its peer dies: not in a timeout, which would be a hang, and in nothing that blames this side.
fn is_of_a_death(error: &Error) -> bool {
    matches!(error, Error::RemoteDisconnect { .. } | Error::Connect { .. })
}

impl Agent {
    fn new(name: &str, settings: &str) -> Result<Self> {
        let mut config = local_config();
        apply(&mut config, settings).map_err(|why| anyhow!(why))?;
        let engine = Engine::new(name, config)?;
        let served = Buffer::with_pattern(seed_of(name), LEN);
        let memory = Buffer::new(LEN);
        let region = served.register(&engine, Access::READ_WRITE);
        let own = memory.register(&engine, Access::LOCAL);
        let known = HashMap::new();
        Ok(Self { name: name.into(), engine, served, region, memory, own, known })
    }

    fn card(&self) -> Card {
        Card {
            name: self.name.clone(),
            metadata: to_hex(&self.engine.metadata()),
            region: to_hex(&self.region.descriptor().to_bytes()),
        }
    }

    fn meet(&mut self, cards: &[Card]) -> Result<()> {
        let gone: Vec<String> = self
            .known
            .iter()
            .filter(|(name, _)| !cards.iter().any(|card| card.name == **name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            if let Some((peer, _)) = self.known.remove(&name) {
                self.engine.unload_peer_within(&peer, Duration::ZERO)?;
            }
        }
        for card in cards.iter().filter(|card| card.name != self.name) {
            let bytes = |hex: &str| from_hex(hex).context("hexadecimal");
            let peer = self.engine.load_peer(&bytes(&card.metadata)?)?;
            let region = RegionDescriptor::from_bytes(&bytes(&card.region)?)?;
            self.known.insert(card.name.clone(), (peer, region));
        }
        Ok(())
    }

    /// One READ of some length from somebody, a WRITE of the same bytes, and a notification.
    fn work(&self, random: &mut Random, report: &mut Report) -> Result<()> {
        let names: Vec<&String> = self.known.keys().collect();
        if names.is_empty() {
            return Ok(());
        }
        let name = names[random.below(names.len())];
        let (peer, region) = &self.known[name];
        let len = [64, 4096, 60_000, LEN][random.below(4)];
        let at = random.below(LEN - len + 1) as u64;
        let segment = || [self.own.segment(at, len as u64)];
        let there = [region.segment(at, len as u64)];
        for operation in [Operation::Read, Operation::Write] {
            let transfer = self.engine.prepare(operation, peer, &segment(), &there)?.transfer();
            let result = transfer.post().and_then(|()| transfer.wait(BOUND));
            match result {
                Ok(()) => report.completed += 1,
                Err(error) => {
                    report.failed += 1;
                    if !is_of_a_death(&error) {
                        report.wrong.push(format!("{} with {name}: {error}", self.name));
                    }
                    report.last_error = Some(error.to_string());
                    break;
                }
            }
            if operation == Operation::Read
                && let Err(why) = self.memory.check(seed_of(name), at as usize, len, at)
            {
                report.wrong.push(format!("{} from {name}: {why}", self.name));
                break;
            }
        }
        self.memory.poison(at as usize, len);
        // To a peer that is gone it is refused.
        let _ = peer.notify(name.as_bytes());
        self.take(report)
    }

    fn take(&self, report: &mut Report) -> Result<()> {
        for notification in self.engine.notifications()? {
            if notification.payload != self.name.as_bytes() {
                report.wrong.push(format!("{}: a notification for another", self.name));
            }
        }
        Ok(())
    }
}

/// Runs a process of agents until its standard input ends.
pub(crate) fn run_role(role: &Role) -> Result<()> {
    // SAFETY: prctl with these arguments only sets a flag of this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    for _ in 0..role.busy {
        std::thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    let names = role.names.split(',').filter(|name| !name.is_empty());
    let mut agents =
        names.map(|name| Agent::new(name, &role.settings)).collect::<Result<Vec<_>>>()?;
    let (lines, orders) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                break;
            }
        }
    });
    let (mut report, mut random) = (Report::default(), Random::new(seed_of(&role.names)));
    loop {
        let line = match orders.try_recv() {
            Ok(line) => line,
            Err(std::sync::mpsc::TryRecvError::Disconnected) => return Ok(()),
            Err(std::sync::mpsc::TryRecvError::Empty) => {
                for agent in &agents {
                    agent.work(&mut random, &mut report)?;
                }
                std::thread::sleep(Duration::from_micros(500));
                continue;
            }
        };
        let answer = match serde_json::from_str(&line)? {
            Order::Cards => {
                serde_json::to_string(&agents.iter().map(Agent::card).collect::<Vec<_>>())?
            }
            Order::Meet(cards) => {
                agents.iter_mut().try_for_each(|agent| agent.meet(&cards))?;
                String::new()
            }
            Order::Report => {
                report.usage = Usage::now();
                for agent in &agents {
                    // What is written there are the bytes that were read there.
                    if let Err(why) = agent.served.check(seed_of(&agent.name), 0, LEN, 0) {
                        report.wrong.push(format!("memory of {}: {why}", agent.name));
                    }
                }
                let timeouts = |agent: &Agent| agent.engine.stats().totals.liveness_timeouts;
                report.liveness_timeouts = agents.iter().map(timeouts).sum();
                serde_json::to_string(&report)?
            }
        };
        println!("ok {answer}");
        std::io::stdout().flush()?;
    }
}

/// A process of agents, as the watch has it.
struct Member {
    process: PeerProcess,
    cards: Vec<Card>,
}

impl Member {
    fn start(names: &[String], settings: &str, busy: usize) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["agents", "--names", &names.join(","), "--settings", settings]);
        command.args(["--busy", &busy.to_string()]).stderr(Stdio::inherit());
        let mut process = PeerProcess::start_command(&mut command)?;
        let cards = serde_json::from_str(&tell(&mut process, &Order::Cards)?)?;
        Ok(Self { process, cards })
    }

    fn report(&mut self) -> Result<Report> {
        Ok(serde_json::from_str(&tell(&mut self.process, &Order::Report)?)?)
    }
}

fn tell(process: &mut PeerProcess, order: &Order) -> Result<String> {
    process.try_ask(&serde_json::to_string(order)?).map_err(|why| anyhow!(why))
}

fn introduce(members: &mut [&mut Member]) -> Result<()> {
    let cards: Vec<Card> = members.iter().flat_map(|member| member.cards.clone()).collect();
    members
        .iter_mut()
        .try_for_each(|member| tell(&mut member.process, &Order::Meet(cards.clone())).map(|_| ()))
}

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How long, such as `90s` or `30m`.
    #[arg(long, default_value = "60s", value_parser = duration)]
    duration: Duration,
    /// Transports that the agents may use, with commas between.
    #[arg(long, default_value = "local,tcp")]
    transports: String,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Liveness timeout in milliseconds. Default: 500 for a soak, 50 to look for false deaths.
    #[arg(long)]
    liveness: Option<u64>,
}

fn duration(text: &str) -> Result<Duration> {
    let (number, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = number.parse().context("a number of seconds")?;
    match unit {
        "" | "s" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_mins(number)),
        "h" => Ok(Duration::from_hours(number)),
        other => bail!("`{other}` is no unit: s, m or h"),
    }
}

fn bar(prefix: &'static str, duration: Duration) -> Result<ProgressBar> {
    let bar = ProgressBar::new(duration.as_secs());
    bar.set_style(ProgressStyle::with_template("{prefix:10} {bar:30} {pos:>5}/{len:<5} s  {msg}")?);
    bar.set_prefix(prefix);
    Ok(bar)
}

impl Options {
    fn settings(&self, liveness: u64, index: usize) -> String {
        // So that agents of one run reach each other in different ways.
        let all: Vec<&str> = self.transports.split(',').collect();
        let own =
            if index.is_multiple_of(2) { self.transports.as_str() } else { all[all.len() - 1] };
        format!("transports={own} liveness_ms={} linger_ms=200", self.liveness.unwrap_or(liveness))
    }
}

/// Twenty agents in five processes, of which three live through it all and two die and return again and again.
pub(crate) fn soak(options: &Options) -> Result<bool> {
    let name = |process: usize, life: usize| {
        (0..4).map(|agent| format!("agent{}-{life}", process * 4 + agent)).collect::<Vec<_>>()
    };
    let settings = |process: usize| options.settings(500, process);
    let mut lasting = (0..3)
        .map(|process| Member::start(&name(process, 0), &settings(process), 0))
        .collect::<Result<Vec<_>>>()?;
    let mut samples: Vec<Samples> =
        (0..3).map(|process| Samples::new(format!("process {process}"))).collect();
    let (mut random, mut lives) = (Random::new(options.seed), 0);
    let mut mortal = Vec::new();
    let (start, bar) = (Instant::now(), bar("soak", options.duration)?);
    while start.elapsed() < options.duration {
        while mortal.len() < 2 {
            lives += 1;
            let process = 3 + lives % 2;
            mortal.push(Member::start(&name(process, lives), &settings(process), 0)?);
        }
        introduce(&mut lasting.iter_mut().chain(&mut mortal).collect::<Vec<_>>())?;
        std::thread::sleep(Duration::from_millis(500 + random.below(2500) as u64));
        for (member, samples) in lasting.iter_mut().zip(&mut samples) {
            samples.add(member.report()?.usage);
        }
        // One of them, amid whatever it does.
        mortal.remove(0).process.kill();
        bar.set_position(start.elapsed().as_secs());
        bar.set_message(format!("{lives} lives"));
    }
    bar.finish_and_clear();
    let mut good = true;
    for (index, member) in lasting.iter_mut().enumerate() {
        let report = member.report()?;
        println!(
            "process {index}: {:>9} transfers arrived, {:>6} failed as peers died",
            report.completed, report.failed
        );
        good &= report.wrong.is_empty() && report.completed > 0;
        report.wrong.iter().for_each(|wrong| println!("{wrong}"));
    }
    for samples in &samples {
        good &= samples.report();
    }
    let (took, verdict) = (start.elapsed(), if good { "good" } else { "BAD" });
    println!(
        "{verdict}: {took:.0?}, 20 agents at a time, {} processes killed",
        lives - mortal.len()
    );
    Ok(good)
}

/// Agents with a short liveness timeout beside four times as many busy threads as there are cores.
pub(crate) fn liveness(options: &Options) -> Result<bool> {
    let cores = std::thread::available_parallelism()?.get();
    let mut members = (0..4)
        .map(|index| Member::start(&[format!("agent{index}")], &options.settings(50, index), cores))
        .collect::<Result<Vec<_>>>()?;
    introduce(&mut members.iter_mut().collect::<Vec<_>>())?;
    let (start, bar) = (Instant::now(), bar("liveness", options.duration)?);
    while start.elapsed() < options.duration {
        std::thread::sleep(Duration::from_secs(1));
        bar.set_position(start.elapsed().as_secs());
    }
    bar.finish_and_clear();
    println!("{:<10}{:>12}{:>10}{:>16}", "agent", "transfers", "failed", "silent peers");
    let mut good = true;
    for (index, member) in members.iter_mut().enumerate() {
        let report = member.report()?;
        let Report { completed, failed, liveness_timeouts, .. } = &report;
        println!("{index:<10}{completed:>12}{failed:>10}{liveness_timeouts:>16}");
        good &=
            *failed == 0 && *liveness_timeouts == 0 && *completed > 0 && report.wrong.is_empty();
        report.last_error.iter().chain(&report.wrong).for_each(|error| println!("  {error}"));
    }
    println!(
        "{}: {:.0?}, {} busy threads on {cores} cores",
        if good { "good" } else { "BAD" },
        start.elapsed(),
        4 * cores
    );
    Ok(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_ends_transfers_and_a_timeout_is_a_hang() {
        let peer: std::sync::Arc<str> = "p".into();
        let gone = Error::RemoteDisconnect { peer: peer.clone(), reason: String::new() };
        assert!(is_of_a_death(&gone));
        let hang = Error::Timeout { what: "a transfer", peer, after: BOUND };
        assert!(!is_of_a_death(&hang) && !is_of_a_death(&Error::Backend("a lane".into())));
    }
}
