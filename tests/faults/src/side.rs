//! A side: a process with one engine under load. The survivor lives through all rounds, a victim through one.

use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use corelane::{Access, Engine, Error, Operation, Peer, Region, RegionDescriptor};
use corelane_tests::{
    BOUND, apply, fill_block, from_hex, local_config, open_files, resident_bytes, threads, to_hex,
};
use serde::{Deserialize, Serialize};

use crate::board::{Board, Control, SideBoard, doing, now_ns, outcome};
use crate::churn;
use crate::load::{
    self, BULK, CONNECTION, RETURN_BYTES, RETURN_READ, RETURN_WRITE, SMALL, SPARE_BYTES, return_at,
};
use crate::memory::{Pool, Set};
use crate::notes::{self, bound_payload};
use crate::phase::Phase;

pub(crate) const SURVIVOR: usize = 0;
pub(crate) const VICTIM: usize = 1;

/// What is done to the victim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Strike {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, for less than the liveness timeout.
    Short,
    /// SIGSTOP, for longer.
    Long,
}

/// What may be wrong in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Something does not end in time.
    Hang,
    /// Bytes that should not be there, or a notification without its bytes.
    Wrong,
    /// Memory written after its transfer or registration had ended.
    Late,
    Lost,
    Doubled,
    /// An error where none may be.
    Failed,
}

/// What the watch tells a side, a line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Memory for a round. Answer: [`Begun`].
    Begin {
        seed: u64,
    },
    /// The other side; the threads start, and wait for the board. Answer: nothing.
    Meet(Box<Meeting>),
    Connect,
    /// Deregisters what the other side uses, if nothing holds that up. Answer: whether it is back.
    Withdraw,
    /// Ends the round. Answer: [`Verdict`].
    Finish,
    /// Answer: what was written late, a list.
    Late,
    /// Answer: [`Usage`].
    Usage,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Begun {
    pub(crate) metadata: String,
    pub(crate) served: String,
    pub(crate) spare: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Meeting {
    pub(crate) other: Begun,
    pub(crate) phase: Phase,
    pub(crate) strike: Strike,
    /// Whether it connects, or is connected to.
    pub(crate) initiates: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) problems: Vec<(Kind, String)>,
    /// Errors of transfers and notifications, whether or not they may be.
    pub(crate) errors: Vec<String>,
    pub(crate) failed: u64,
    /// How often deregistration was held up.
    pub(crate) busy: u64,
    /// How long a thread that posts could not run after the strike, the one that had to wait longest.
    pub(crate) waited_us: u64,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Usage {
    pub(crate) resident: u64,
    pub(crate) files: usize,
    pub(crate) threads: usize,
}

impl Usage {
    pub(crate) fn now() -> Self {
        Self {
            resident: resident_bytes(),
            files: open_files(std::process::id()),
            threads: threads(),
        }
    }

    /// As if these bytes, which are resident, were not there.
    fn without(self, bytes: usize) -> Self {
        Self { resident: self.resident.saturating_sub(bytes as u64), ..self }
    }
}

/// Errors that are kept word by word.
const MAX_TEXTS: usize = 12;

/// What the threads of a side share during a round.
pub(crate) struct Shared {
    pub(crate) board: &'static Board,
    pub(crate) side: usize,
    pub(crate) engine: Engine,
    pub(crate) peer: Peer,
    pub(crate) seed: u64,
    pub(crate) phase: Phase,
    pub(crate) set: Set,
    pub(crate) busy: AtomicU64,
    strike: Strike,
    initiates: bool,
    was_connected: AtomicBool,
    withdrawn: AtomicBool,
    failures: AtomicU64,
    waited_us: AtomicU64,
    problems: Mutex<Vec<(Kind, String)>>,
    errors: Mutex<Vec<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pattern_of(side: usize, seed: u64) -> u64 {
    seed.wrapping_mul(2) + side as u64
}

impl Shared {
    pub(crate) fn own(&self) -> &SideBoard {
        &self.board.sides[self.side]
    }

    pub(crate) fn other(&self) -> &SideBoard {
        &self.board.sides[1 - self.side]
    }

    /// What the other side serves for reading.
    pub(crate) fn pattern_of_other(&self) -> u64 {
        pattern_of(1 - self.side, self.seed)
    }

    /// Whether this side may do what connects: the board says that it does, or it is done, or its turn has come anyway.
    pub(crate) fn may_connect(&self) -> bool {
        let connects = self.initiates && self.own().is_doing(doing::HANDSHAKE);
        connects || self.was_connected.load(SeqCst) || self.board.signalled()
    }

    /// Whether transfers may be posted.
    pub(crate) fn may_post(&self) -> bool {
        self.may_connect() && (self.phase != Phase::Idle || self.board.signalled())
    }

    /// Whether an error is the end: the peer is dead, or long silent.
    pub(crate) fn gives_up(&self) -> bool {
        self.strike != Strike::Short && self.board.signalled()
    }

    pub(crate) fn is_withdrawn(&self) -> bool {
        self.withdrawn.load(SeqCst)
    }

    /// A thread that posts got no core for so long, after the strike.
    pub(crate) fn has_waited(&self, time: Duration) {
        self.waited_us.fetch_max(time.as_micros() as u64, SeqCst);
    }

    pub(crate) fn problem(&self, kind: Kind, what: String) {
        let mut problems = lock(&self.problems);
        if problems.len() < MAX_TEXTS {
            problems.push((kind, format!("{}: {what}", ["survivor", "victim"][self.side])));
        }
    }

    pub(crate) fn failed(&self, what: &str, error: &Error) {
        self.failures.fetch_add(1, SeqCst);
        let mut errors = lock(&self.errors);
        if errors.len() < MAX_TEXTS {
            errors.push(format!("{what}: {error}"));
        }
    }
}

/// A round of this side.
struct Round {
    shared: Arc<Shared>,
    local: Region,
    served: Region,
    spare: Region,
    threads: Vec<JoinHandle<()>>,
}

/// A round that has not met the other side yet.
struct Opening {
    seed: u64,
    set: Set,
    local: Region,
    served: Region,
    spare: Region,
}

struct Process {
    board: &'static Board,
    side: usize,
    engine: Engine,
    pool: Pool,
    late: Vec<(u64, String)>,
    opening: Option<Opening>,
    round: Option<Round>,
}

/// How a side begins.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Path of the board.
    #[arg(long)]
    pub(crate) board: String,
    /// 0: survivor, 1: victim.
    #[arg(long)]
    pub(crate) side: usize,
    #[arg(long)]
    pub(crate) name: String,
    #[arg(long)]
    pub(crate) settings: String,
    /// MiB of resident memory beside.
    #[arg(long, default_value_t = 0)]
    pub(crate) ballast: usize,
}

/// Runs a side until its standard input ends.
pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { board, side, name, settings, ballast } = options;
    // SAFETY: prctl with these arguments only sets a flag of this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let ballast = ballast_of(*ballast);
    let mut config = local_config();
    apply(&mut config, settings).map_err(|why| anyhow!(why))?;
    let mut process = Process {
        board: Board::open(board).context("opening the board")?,
        side: *side,
        engine: Engine::new(name, config)?,
        pool: Pool::default(),
        late: Vec::new(),
        opening: None,
        round: None,
    };
    for line in std::io::stdin().lock().lines() {
        let order = serde_json::from_str(&line?)?;
        let answer = match process.obey(order) {
            Ok(answer) => format!("ok {answer}"),
            Err(error) => format!("error {error:#}").replace('\n', " "),
        };
        let mut output = std::io::stdout().lock();
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
    drop(ballast);
    Ok(())
}

/// Memory that is resident, page by page, as that of an inference server is.
fn ballast_of(mebibytes: usize) -> Vec<u8> {
    let mut memory = Vec::with_capacity(mebibytes << 20);
    memory.resize(mebibytes << 20, 0x5a);
    memory
}

impl Process {
    fn obey(&mut self, order: Order) -> Result<String> {
        Ok(match order {
            Order::Begin { seed } => serde_json::to_string(&self.begin(seed)?)?,
            Order::Meet(meeting) => {
                self.meet(&meeting)?;
                String::new()
            }
            Order::Connect => {
                let round = self.round.as_ref().context("no round")?;
                // No fault yet: on a machine that is busy, an attempt may take longer than rounds allow it to.
                let start = Instant::now();
                while let Err(error) = round.shared.peer.connect(BOUND) {
                    if start.elapsed() > BOUND {
                        return Err(error.into());
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                String::new()
            }
            Order::Withdraw => self.withdraw()?.to_string(),
            Order::Finish => serde_json::to_string(&self.finish()?)?,
            Order::Late => {
                self.late.extend(self.pool.check_all());
                serde_json::to_string(&std::mem::take(&mut self.late))?
            }
            Order::Usage => serde_json::to_string(&Usage::now().without(self.pool.bytes()))?,
        })
    }

    fn begin(&mut self, seed: u64) -> Result<Begun> {
        let (set, late) = self.pool.take();
        self.late.extend(late);
        set.served.fill(pattern_of(self.side, seed), 0, load::SOURCE_BYTES, 0);
        set.spare.fill(pattern_of(self.side, seed), 0, SPARE_BYTES / 2, 0);
        let local = set.local.register(&self.engine, Access::LOCAL);
        let served = set.served.register(&self.engine, Access::READ_WRITE);
        let spare = set.spare.register(&self.engine, Access::READ_WRITE);
        let begun = Begun {
            metadata: to_hex(&self.engine.metadata()),
            served: to_hex(&served.descriptor().to_bytes()),
            spare: to_hex(&spare.descriptor().to_bytes()),
        };
        self.opening = Some(Opening { seed, set, local, served, spare });
        Ok(begun)
    }

    fn meet(&mut self, meeting: &Meeting) -> Result<()> {
        let Opening { seed, set, local, served, spare } =
            self.opening.take().context("no round")?;
        let bytes = |hex: &str| from_hex(hex).context("hexadecimal");
        let peer = self.engine.load_peer(&bytes(&meeting.other.metadata)?)?;
        let theirs = RegionDescriptor::from_bytes(&bytes(&meeting.other.served)?)?;
        let their_spare = RegionDescriptor::from_bytes(&bytes(&meeting.other.spare)?)?;
        let shared = Arc::new(Shared {
            board: self.board,
            side: self.side,
            engine: self.engine.clone(),
            peer,
            seed,
            phase: meeting.phase,
            set,
            busy: AtomicU64::new(0),
            strike: meeting.strike,
            initiates: meeting.initiates,
            was_connected: AtomicBool::new(false),
            withdrawn: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            waited_us: AtomicU64::new(0),
            problems: Mutex::default(),
            errors: Mutex::default(),
        });
        let threads = start(&shared, &local, &theirs, their_spare)?;
        self.round = Some(Round { shared, local, served, spare, threads });
        Ok(())
    }

    fn withdraw(&mut self) -> Result<bool> {
        let round = self.round.as_ref().context("no round")?;
        let shared = &round.shared;
        // From now on, nothing is expected there.
        shared.withdrawn.store(true, SeqCst);
        match shared.engine.deregister(&round.served) {
            Ok(()) => {
                shared.set.served.poison(0, shared.set.served.len());
                Ok(true)
            }
            Err(Error::Busy { .. }) => {
                shared.busy.fetch_add(1, SeqCst);
                shared.withdrawn.store(false, SeqCst);
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn finish(&mut self) -> Result<Verdict> {
        let Round { shared, local, served, spare, threads } =
            self.round.take().context("no round")?;
        for thread in threads {
            if thread.join().is_err() {
                shared.problem(Kind::Failed, "a thread panicked".into());
            }
        }
        let Set { local: own, served: lent, spare: more, .. } = &shared.set;
        let mut lent_is_back = true;
        if !shared.is_withdrawn() {
            if shared.strike != Strike::Kill {
                load::check_unbound(&shared);
            }
            load::check_places(&shared);
            lent_is_back = churn::take_back(&shared, &served, "the served memory");
            lent.poison(0, lent.len());
        }
        let more_is_back = churn::take_back(&shared, &spare, "the spare memory");
        more.poison(0, more.len());
        churn::take_back(&shared, &local, "the own memory");
        if self.side == SURVIVOR {
            shared.engine.unload_peer_within(&shared.peer, Duration::from_millis(100))?;
        }
        // Last, so that what comes late has had the time to.
        load::check_rest(&shared);
        for (memory, is_back) in [(lent, lent_is_back), (more, more_is_back)] {
            if is_back && let Err(why) = memory.check_poison(0, memory.len()) {
                let what = format!("memory that was taken back: {why}");
                shared.problem(Kind::Late, what);
            }
        }
        [own, lent, more].iter().for_each(|memory| memory.poison(0, memory.len()));
        let shared = Arc::into_inner(shared).context("a thread still runs")?;
        let set = shared.set;
        self.pool.give_back(shared.seed, set);
        Ok(Verdict {
            problems: shared.problems.into_inner().unwrap_or_else(PoisonError::into_inner),
            errors: shared.errors.into_inner().unwrap_or_else(PoisonError::into_inner),
            failed: shared.failures.into_inner(),
            busy: shared.busy.into_inner(),
            waited_us: shared.waited_us.into_inner(),
        })
    }
}

/// Starts the threads of a round, which wait for the board.
fn start(
    shared: &Arc<Shared>,
    local: &Region,
    theirs: &RegionDescriptor,
    their_spare: RegionDescriptor,
) -> Result<Vec<JoinHandle<()>>> {
    type Work = Box<dyn FnOnce(&Arc<Shared>) + Send>;
    let spawn = |name: &str, work: Work| {
        let shared = shared.clone();
        std::thread::Builder::new().name(name.into()).spawn(move || work(&shared))
    };
    let driver = |name: &str, wanted: &'static [usize]| {
        let (local, theirs) = (local.clone(), theirs.clone());
        spawn(name, Box::new(move |shared| load::drive(shared, &local, &theirs, wanted)))
    };
    let own = local.clone();
    let mut threads = vec![
        driver("small", &SMALL)?,
        driver("bulk", &BULK)?,
        spawn("notes", Box::new(notes::exchange))?,
        spawn("monitor", Box::new(monitor))?,
        spawn("return", Box::new(move |shared| come_back(shared, &own, &their_spare)))?,
    ];
    if shared.phase == Phase::Deregistration {
        let own = local.clone();
        threads.push(spawn("come-and-go", Box::new(churn::come_and_go))?);
        threads.push(spawn("use", Box::new(move |shared| churn::use_it(shared, &own)))?);
    } else {
        churn::post_nothing(shared);
    }
    Ok(threads)
}

/// Writes on the board whether the sides are connected.
fn monitor(shared: &Arc<Shared>) {
    let own = shared.own();
    let slot = &own.slots[CONNECTION];
    loop {
        let control = shared.board.control();
        let connected = shared.peer.is_connected();
        if connected && !own.is_doing(doing::CONNECTED) {
            shared.was_connected.store(true, SeqCst);
            slot.posted_ns.store(now_ns(), SeqCst);
            own.set(doing::CONNECTED);
            own.clear(doing::HANDSHAKE | doing::RECONNECT);
        } else if !connected && own.is_doing(doing::CONNECTED) {
            slot.ended_ns.store(now_ns(), SeqCst);
            slot.outcome.store(outcome::FAILED, SeqCst);
            own.clear(doing::CONNECTED);
            own.set(doing::RECONNECT);
        } else if !connected && control == Control::Run && shared.initiates {
            let first = !shared.was_connected.load(SeqCst);
            own.set(if first { doing::HANDSHAKE } else { doing::RECONNECT });
        }
        if control == Control::Over {
            return;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// How long a session may take to be back.
const RETURN_WITHIN: Duration = Duration::from_secs(15);

/// When asked to, shows that transfers and bound notifications work again.
fn come_back(shared: &Arc<Shared>, local: &Region, spare: &RegionDescriptor) {
    while shared.board.control() < Control::Return {
        std::thread::sleep(Duration::from_micros(500));
    }
    if shared.board.control() != Control::Return {
        return;
    }
    if let Err(error) = try_to_come_back(shared, local, spare) {
        shared.problem(Kind::Failed, format!("the session does not come back: {error}"));
    }
    shared.own().slots[RETURN_WRITE].stopped.store(1, SeqCst);
}

fn try_to_come_back(
    shared: &Shared,
    local: &Region,
    spare: &RegionDescriptor,
) -> Result<(), Error> {
    let mine = load::local_bytes() - SPARE_BYTES;
    let (half, memory) = (SPARE_BYTES / 2, &shared.set.local);
    let segment = |offset: usize, len: usize| local.segment(offset as u64, len as u64);
    let read = shared
        .engine
        .prepare(
            Operation::Read,
            &shared.peer,
            &[segment(mine, half)],
            &[spare.segment(0, half as u64)],
        )?
        .transfer();
    let start = Instant::now();
    while let Err(error) = load::follow(shared, RETURN_READ, &read, None) {
        // What had come by then is no business of the next attempt.
        memory.poison(mine, half);
        if start.elapsed() > RETURN_WITHIN {
            return Err(error);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    if let Err(why) = memory.check(shared.pattern_of_other(), mine, half, 0) {
        shared.problem(Kind::Wrong, format!("READ of a session that is back: {why}"));
    }
    memory.poison(mine, half);
    let board = &shared.own().slots[RETURN_WRITE];
    let mut last = Ok(());
    for block in 0..crate::board::BLOCKS {
        let number = block as u64 + 1;
        fill_block(memory, mine + half, RETURN_BYTES, number);
        let there = spare.segment(return_at(block) as u64, RETURN_BYTES as u64);
        let from = segment(mine + half, RETURN_BYTES);
        let write =
            shared.engine.prepare(Operation::Write, &shared.peer, &[from], &[there])?.transfer();
        board.number.store(number, SeqCst);
        board.block.store(block as u64, SeqCst);
        last = load::follow(
            shared,
            RETURN_WRITE,
            &write,
            Some(&bound_payload(RETURN_WRITE, block, number)),
        );
        if last.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    last
}
