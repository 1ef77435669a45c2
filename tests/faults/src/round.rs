//! One round, as the watch sees it: a victim comes, works, is struck, and what then happens is judged by the board.

use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use corelane::TransportKind;
use corelane_tests::{PeerProcess, Random};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::board::{Board, Control, SideBoard, doing, now_ns, outcome};
use crate::cut::cut_sockets;
use crate::load::{CONNECTION, RETURN_WRITE};
use crate::memory::Late;
use crate::phase::Phase;
use crate::side::{Begun, Kind, Meeting, Order, SURVIVOR, Strike, Usage, VICTIM, Verdict};

/// What all rounds have in common.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) transport: TransportKind,
    pub(crate) liveness: Duration,
    /// What bounds of time are multiplied by.
    pub(crate) slack: f64,
}

impl Rules {
    /// How long after the strike a transfer may still be in flight.
    fn bound(&self) -> Duration {
        (self.liveness.mul_f64(1.2) + Duration::from_millis(100)).mul_f64(self.slack)
    }

    fn settings(&self) -> String {
        let ms = self.liveness.as_millis();
        format!(
            "transports={} liveness_ms={ms} connect_ms={ms} reconnect_ms={ms} deregister_ms=200 linger_ms=200",
            self.transport
        )
    }
}

/// What came out of a round.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) round: usize,
    pub(crate) seed: u64,
    pub(crate) phase: Phase,
    pub(crate) strike: Strike,
    /// The board said so just before the signal, and just after.
    pub(crate) in_phase: [bool; 2],
    /// From the signal to the end of the last transfer, in us; none where none had to end.
    pub(crate) detection_us: Option<u64>,
    /// To the first error, and to the last end of each slot that was posted after the strike or in flight then.
    pub(crate) first_error_us: Option<u64>,
    pub(crate) ends_us: Vec<i64>,
    /// How much of that the threads that post could not run, since others had the cores: the one that waited longest, of the survivor
    /// and, unless it was killed, the victim.
    pub(crate) waited_us: u64,
    /// Transfers that failed, on both sides.
    pub(crate) failed: u64,
    /// Some did in a short stop, and others had the cores for the rest of the liveness timeout.
    pub(crate) excused: bool,
    /// To the end of the victim's process, by the watch's own waiting.
    pub(crate) exited_us: Option<u64>,
    pub(crate) stopped_ms: u64,
    /// Resident bytes of the victim.
    pub(crate) resident: u64,
    pub(crate) completed: u64,
    pub(crate) notifications: u64,
    pub(crate) busy: u64,
    pub(crate) problems: Vec<(Kind, String)>,
    pub(crate) errors: Vec<String>,
}

/// A survivor, and those that have been its victims.
pub(crate) struct Contest {
    rules: Rules,
    board: &'static Board,
    path: String,
    survivor: PeerProcess,
    /// Stopped victims live on for a second, to see whether they write where they may not.
    retired: Vec<(Instant, PeerProcess)>,
}

fn ask<T: DeserializeOwned>(process: &mut PeerProcess, order: &Order) -> Result<T> {
    Ok(serde_json::from_str(&tell(process, order)?)?)
}

fn tell(process: &mut PeerProcess, order: &Order) -> Result<String> {
    process.try_ask(&serde_json::to_string(order)?).map_err(|why| anyhow!("{order:?}: {why}"))
}

fn start(
    path: &str,
    side: usize,
    name: &str,
    settings: &str,
    ballast: usize,
) -> Result<PeerProcess> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["side", "--board", path, "--side", &side.to_string(), "--name", name])
        .args(["--settings", settings, "--ballast", &ballast.to_string()])
        .stderr(Stdio::inherit());
    PeerProcess::start_command(&mut command).context("starting a side")
}

/// Waits until something is so; whether it is.
fn within(limit: Duration, mut so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !so() {
        if Instant::now() >= deadline {
            return so();
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    true
}

fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::thread::yield_now();
    }
}

/// Threads of a side that post or send: two of the load, one of the notifications.
const SENDERS: u64 = 3;

/// Nothing hangs that takes no longer, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(20);

impl Contest {
    pub(crate) fn new(rules: Rules, job: usize) -> Result<Self> {
        let (board, path) = Board::create()?;
        let name = format!("survivor{job}");
        let survivor = start(&path, SURVIVOR, &name, &rules.settings(), 0)?;
        Ok(Self { rules, board, path, survivor, retired: Vec::new() })
    }

    pub(crate) fn usage(&mut self) -> Result<Usage> {
        ask(&mut self.survivor, &Order::Usage)
    }

    /// What was written late by the time at which nothing may write any more.
    pub(crate) fn late(&mut self) -> Result<Vec<Late>> {
        let mut late: Vec<Late> = ask(&mut self.survivor, &Order::Late)?;
        for (_, mut victim) in self.retired.drain(..) {
            late.extend(ask::<Vec<Late>>(&mut victim, &Order::Late)?);
        }
        Ok(late)
    }

    /// As `late`, of the victims whose second is over.
    pub(crate) fn late_so_far(&mut self) -> Result<Vec<Late>> {
        let mut late = Vec::new();
        let over = |since: &Instant| since.elapsed() > Duration::from_millis(1200);
        while self.retired.first().is_some_and(|(since, _)| over(since)) {
            let (_, mut victim) = self.retired.remove(0);
            late.extend(ask::<Vec<Late>>(&mut victim, &Order::Late)?);
        }
        Ok(late)
    }

    pub(crate) fn round(
        &mut self,
        round: usize,
        seed: u64,
        phase: Phase,
        strike: Strike,
        ballast: usize,
    ) -> Result<Outcome> {
        self.board.reset();
        let mut outcome = Outcome {
            round,
            seed,
            phase,
            strike,
            in_phase: [false; 2],
            detection_us: None,
            first_error_us: None,
            ends_us: Vec::new(),
            waited_us: 0,
            failed: 0,
            excused: false,
            exited_us: None,
            stopped_ms: 0,
            resident: 0,
            completed: 0,
            notifications: 0,
            busy: 0,
            problems: Vec::new(),
            errors: Vec::new(),
        };
        let mut random = Random::new(seed);
        let name = format!("victim{round}");
        let mut victim = start(&self.path, VICTIM, &name, &self.rules.settings(), ballast)?;
        self.introduce(&mut victim, phase, strike, seed, &mut random)?;
        self.provoke(&victim, phase, &mut random)?;
        outcome.resident = resident_of(victim.id());
        outcome.in_phase[0] = phase.is_now(self.board);
        let signal = now_ns();
        match strike {
            Strike::Kill => victim.kill(),
            Strike::Short | Strike::Long => victim.freeze(),
        }
        outcome.in_phase[1] = phase.is_now(self.board);
        // Last, because it ends the silence of phase idle.
        self.board.signal_ns.store(signal, SeqCst);
        match strike {
            Strike::Kill => std::thread::scope(|scope| {
                let exit = scope.spawn(|| {
                    victim.wait_for_end();
                    now_ns()
                });
                self.watch_ends(signal, &mut outcome);
                outcome.exited_us = exit.join().ok().map(|exit| (exit - signal) / 1000);
            }),
            Strike::Short => self.watch_short(&victim, &mut outcome, &mut random),
            Strike::Long => self.watch_long(&victim, signal, &mut outcome, &mut random)?,
        }
        if strike == Strike::Kill {
            victim.end();
        } else {
            self.settle(strike, &mut outcome);
        }
        self.board.order(Control::Over);
        self.judge(strike, &mut outcome);
        self.add_verdict(SURVIVOR, &mut victim, &mut outcome)?;
        if strike != Strike::Kill {
            self.add_verdict(VICTIM, &mut victim, &mut outcome)?;
            self.retired.push((Instant::now(), victim));
        }
        self.judge_short(&mut outcome);
        Ok(outcome)
    }

    /// Both sides learn of each other, and begin.
    fn introduce(
        &mut self,
        victim: &mut PeerProcess,
        phase: Phase,
        strike: Strike,
        seed: u64,
        random: &mut Random,
    ) -> Result<()> {
        let ours: Begun = ask(&mut self.survivor, &Order::Begin { seed })?;
        let theirs: Begun = ask(victim, &Order::Begin { seed })?;
        // One of them connects, or both at once.
        let who = random.below(3);
        let meeting =
            |other, initiates| Order::Meet(Box::new(Meeting { other, phase, strike, initiates }));
        tell(victim, &meeting(ours, who != 0))?;
        tell(&mut self.survivor, &meeting(theirs, who != 1))?;
        if phase != Phase::Handshake {
            tell(if who == 1 { victim } else { &mut self.survivor }, &Order::Connect)?;
        }
        if phase == Phase::Handshake {
            // Whoever is connected to gets the processor when the watch says so: handshakes are shorter than the time
            // slices of a busy machine.
            let target = if who == 1 { &self.survivor } else { &*victim };
            target.freeze();
            self.board.order(Control::Run);
            let initiator = &self.board.sides[if who == 1 { VICTIM } else { SURVIVOR }];
            within(PATIENCE, || initiator.is_doing(doing::HANDSHAKE));
            spin(Duration::from_micros(random.below(500) as u64));
            target.thaw();
        }
        self.board.order(Control::Run);
        Ok(())
    }

    /// Waits for the phase, and for a moment in it.
    fn provoke(&self, victim: &PeerProcess, phase: Phase, random: &mut Random) -> Result<()> {
        let now = || phase.is_now(self.board);
        if phase != Phase::Handshake {
            // Under way, all of it.
            let busy = |side: &SideBoard| {
                side.slots[..7].iter().any(|slot| slot.completed.load(SeqCst) > 0)
            };
            within(PATIENCE, || phase == Phase::Idle || self.board.sides.iter().all(busy));
            spin(Duration::from_micros(random.below(30_000) as u64));
        }
        if phase == Phase::Reconnect {
            cut_sockets(victim.id())?;
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        while !now() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let longest = match phase {
            Phase::Handshake => 800,
            Phase::Reconnect => 400,
            Phase::Deregistration => 50,
            _ => 1500,
        };
        spin(Duration::from_micros(random.below(longest) as u64));
        if !matches!(phase, Phase::Handshake | Phase::Reconnect) {
            // It may have passed; these come again.
            let deadline = Instant::now() + Duration::from_secs(1);
            while !now() && Instant::now() < deadline {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }

    /// The survivor's transfers must end, all of them.
    fn watch_ends(&self, signal: u64, outcome: &mut Outcome) {
        let side = &self.board.sides[SURVIVOR];
        let bound = self.rules.bound();
        // Looking at rest is not enough: a thread that has not looked at the board since may be about to post.
        let over = || {
            side.slots[..CONNECTION].iter().all(|slot| slot.stopped.load(SeqCst) == 1)
                && side.slots[..=CONNECTION].iter().all(|slot| !slot.in_flight())
        };
        let ended = within(bound + PATIENCE, over);
        let mut last = signal;
        for (index, slot) in side.slots[..=CONNECTION].iter().enumerate() {
            let (posted, ended) = (slot.posted_ns.load(SeqCst), slot.ended_ns.load(SeqCst));
            let from = posted.max(signal);
            if posted > ended {
                outcome.problems.push((Kind::Hang, format!("slot {index} is in flight for ever")));
                continue;
            }
            if ended > from && Duration::from_nanos(ended - from) > bound {
                let took = Duration::from_nanos(ended - from);
                outcome.problems.push((Kind::Hang, format!("slot {index} ended after {took:?}")));
            }
            outcome.ends_us.push((ended as i64 - signal as i64) / 1000);
            if slot.outcome.load(SeqCst) == outcome::FAILED && ended > signal {
                let us = (ended - signal) / 1000;
                outcome.first_error_us =
                    Some(outcome.first_error_us.map_or(us, |first| first.min(us)));
            }
            // Of one that was posted after the strike, its own time counts where peers only stand still.
            // The state of the connection is looked at by a thread that need not hurry, unless there is nothing else.
            if index == CONNECTION && outcome.phase != Phase::Idle {
                continue;
            }
            last = last.max(if outcome.strike == Strike::Kill {
                ended
            } else {
                signal + (ended.saturating_sub(from))
            });
        }
        if !ended && outcome.problems.is_empty() {
            outcome.problems.push((Kind::Hang, "transfers to it go on".into()));
        }
        outcome.detection_us = Some((last - signal) / 1000);
    }

    /// Stopped for less than the liveness timeout: nothing happens.
    fn watch_short(&self, victim: &PeerProcess, outcome: &mut Outcome, random: &mut Random) {
        let most = self.rules.liveness.as_micros() as usize * 6 / 10;
        let pause = Duration::from_micros((5000 + random.below(most)) as u64);
        std::thread::sleep(pause);
        outcome.stopped_ms = (now_ns() - self.board.signal_ns.load(SeqCst)) / 1_000_000;
        victim.thaw();
        std::thread::sleep(Duration::from_millis(20 + random.below(40) as u64));
    }

    fn watch_long(
        &mut self,
        victim: &PeerProcess,
        signal: u64,
        outcome: &mut Outcome,
        random: &mut Random,
    ) -> Result<()> {
        self.watch_ends(signal, outcome);
        let least = self.rules.liveness.mul_f64(1.1).as_nanos() as u64;
        std::thread::sleep(Duration::from_nanos((signal + least).saturating_sub(now_ns())));
        // Every other time its memory is taken back while the victim stands still, perhaps amid a copy.
        if random.below(2) == 0 {
            let back: bool = ask(&mut self.survivor, &Order::Withdraw)?;
            outcome.busy += u64::from(!back);
        }
        outcome.stopped_ms = (now_ns() - signal) / 1_000_000;
        victim.thaw();
        let thawed = now_ns();
        self.board.order(Control::Return);
        let side = &self.board.sides[VICTIM];
        let in_flight = || side.slots[..CONNECTION].iter().any(|slot| slot.in_flight());
        let bound = self.rules.bound();
        if !within(bound, || !in_flight()) {
            let took = Duration::from_nanos(now_ns() - thawed);
            outcome
                .problems
                .push((Kind::Hang, format!("the victim's transfers still go on after {took:?}")));
        }
        let back = |side: &SideBoard| side.slots[RETURN_WRITE].stopped.load(SeqCst) == 1;
        if !within(PATIENCE, || self.board.sides.iter().all(back)) {
            outcome.problems.push((Kind::Hang, "the session does not come back".into()));
        }
        Ok(())
    }

    /// Both sides send nothing more, and what was sent arrives.
    fn settle(&self, strike: Strike, outcome: &mut Outcome) {
        self.board.order(Control::Stop);
        let arrived = || {
            (0..2).all(|from| {
                let (from, to) = (&self.board.sides[from], &self.board.sides[1 - from]);
                // A slot that looks quiet may be about to be posted, and a notification to be sent, by a thread that
                // has not looked at the board since.
                let quiet = from.senders_ended.load(SeqCst) == SENDERS
                    && from.slots[..CONNECTION].iter().all(|slot| !slot.in_flight());
                let dropped = if strike == Strike::Long { from.dropped.load(SeqCst) } else { 0 };
                let sent = from.sent.load(SeqCst);
                quiet && to.received.load(SeqCst) + dropped >= sent && unseen(from, strike) == 0
            })
        };
        within(PATIENCE, arrived);
        for (index, name) in ["survivor", "victim"].iter().enumerate() {
            let (from, to) = (&self.board.sides[index], &self.board.sides[1 - index]);
            let (sent, received) = (from.sent.load(SeqCst), to.received.load(SeqCst));
            let dropped = if strike == Strike::Long { from.dropped.load(SeqCst) } else { 0 };
            let lost = sent.saturating_sub(received + dropped);
            if lost > 0 {
                let what = format!(
                    "{received} of {sent} notifications of the {name} arrived, {dropped} were dropped"
                );
                outcome.problems.push((Kind::Lost, what));
            }
            let unseen = unseen(from, strike);
            if unseen > 0 {
                let what =
                    format!("{unseen} notifications bound to WRITEs of the {name} did not arrive");
                outcome.problems.push((Kind::Lost, what));
            }
        }
    }

    fn judge(&self, strike: Strike, outcome: &mut Outcome) {
        for (index, name) in ["survivor", "victim"].iter().enumerate() {
            let (own, other) = (&self.board.sides[index], &self.board.sides[1 - index]);
            outcome.completed +=
                own.slots.iter().map(|slot| slot.completed.load(SeqCst)).sum::<u64>();
            outcome.notifications += own.received.load(SeqCst);
            let (missing, dropped) = (own.missing.load(SeqCst), other.dropped.load(SeqCst));
            let may_miss = if strike == Strike::Long { dropped } else { 0 };
            if missing > may_miss {
                let what =
                    format!("the {name} missed {missing} notifications, {dropped} were dropped");
                outcome.problems.push((Kind::Lost, what));
            }
        }
    }

    fn add_verdict(
        &mut self,
        side: usize,
        victim: &mut PeerProcess,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let process = if side == SURVIVOR { &mut self.survivor } else { victim };
        let verdict: Verdict = ask(process, &Order::Finish)?;
        outcome.failed += verdict.failed;
        outcome.problems.extend(verdict.problems);
        outcome.errors.extend(verdict.errors);
        outcome.busy += verdict.busy;
        outcome.waited_us = outcome.waited_us.max(verdict.waited_us);
        Ok(())
    }

    /// While a link is cut, transfers may fail; a stop within the liveness timeout is no reason to, unless others had the cores for
    /// the rest of it.
    fn judge_short(&self, outcome: &mut Outcome) {
        let silent =
            Duration::from_millis(outcome.stopped_ms) + Duration::from_micros(outcome.waited_us);
        if outcome.strike != Strike::Short
            || outcome.phase == Phase::Reconnect
            || outcome.failed == 0
        {
            return;
        }
        outcome.excused = silent >= self.rules.liveness;
        if !outcome.excused {
            let what = format!("{} failed: {}", outcome.failed, outcome.errors.join(" | "));
            outcome.problems.push((Kind::Failed, what));
        }
    }
}

/// Blocks of a side that are done and whose notification the other side has not seen.
fn unseen(from: &SideBoard, strike: Strike) -> usize {
    let bound = |index: usize| match strike {
        Strike::Short => [1, 3, 5].contains(&index),
        // What was lost with the session is lost.
        Strike::Long | Strike::Kill => index == RETURN_WRITE,
    };
    let is_unseen = |index: usize| {
        let slot = &from.slots[index];
        let block = slot.block.load(SeqCst) as usize;
        slot.outcome.load(SeqCst) == outcome::DONE
            && slot.seen[block].load(SeqCst) < slot.number.load(SeqCst)
    };
    (0..from.slots.len()).filter(|&index| bound(index) && is_unseen(index)).count()
}

fn resident_of(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}
