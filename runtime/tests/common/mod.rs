//! A driver that tells what happens to it.

#![allow(unreachable_pub, dead_code, clippy::unwrap_used)] // Each test binary uses its part.

use std::{
    io::{ErrorKind, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use corelane_runtime::*;

/// What a test sees of its [`Probe`].
#[derive(Default)]
pub struct Seen {
    pub messages: Mutex<Vec<u64>>,
    pub last: AtomicU64,
    pub timers: Mutex<Vec<(u64, Instant)>>,
    pub words: Mutex<Vec<u64>>,
    pub abandoned: Mutex<Vec<u64>>,
    pub panic: Mutex<Option<String>>,
    pub stops: AtomicU64,
    pub dropped_on: Mutex<Option<std::thread::ThreadId>>,
    pub must_poll: AtomicBool,
    /// Every turn takes a tenth of a millisecond and makes progress.
    pub working: AtomicBool,
    pub keeps_turns: AtomicBool,
}

pub enum Ask {
    Note(u64),
    Timer(Instant, u64),
    Panic(&'static str),
    /// Takes the stream and echoes on it.
    Echo(UnixStream, Start),
    /// All streams are calm from now on.
    Calm,
    /// Forgets all streams.
    Close,
    Run(Box<dyn FnOnce(&mut Cx<'_>) + Send>),
}

pub struct Probe {
    pub seen: Arc<Seen>,
    pub stop_turns: u64,
    streams: Vec<(UnixStream, FdId)>,
}

impl Probe {
    pub fn new(seen: Arc<Seen>) -> Self {
        Self { seen, stop_turns: 0, streams: Vec::new() }
    }
}

impl Driver for Probe {
    type Message = Box<Ask>;

    fn on_message(&mut self, cx: &mut Cx<'_>, ask: Box<Ask>) {
        match *ask {
            Ask::Note(number) => {
                self.seen.messages.lock().unwrap().push(number);
                self.seen.last.store(number, Ordering::Release);
            }
            Ask::Timer(deadline, token) => _ = cx.set_timer(deadline, token),
            Ask::Panic(text) => panic!("{text}"),
            Ask::Echo(stream, start) => {
                stream.set_nonblocking(true).unwrap();
                let token = self.streams.len() as u64;
                let id = cx.add_fd(stream.as_raw_fd(), token, Interest::READABLE, start);
                self.streams.push((stream, id));
            }
            Ask::Calm => self.streams.iter().for_each(|(_, id)| cx.set_calm(*id, true)),
            Ask::Close => self.streams.drain(..).for_each(|(_, id)| cx.remove_fd(id)),
            Ask::Run(f) => f(cx),
        }
    }

    fn on_fd(&mut self, _: &mut Cx<'_>, token: u64, readiness: Readiness) -> bool {
        assert!(readiness.may_read());
        let (stream, _) = &mut self.streams[token as usize];
        let mut buffer = [0; 256];
        match stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(len) => stream.write_all(&buffer[..len]).is_ok(),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                false
            }
        }
    }

    fn on_timer(&mut self, cx: &mut Cx<'_>, token: u64) {
        let now = cx.now();
        self.seen.timers.lock().unwrap().push((token, now));
    }

    fn on_word(&mut self, _: &mut Cx<'_>, token: u64) {
        self.seen.words.lock().unwrap().push(token);
    }

    fn on_turn(&mut self, _: &mut Cx<'_>) -> bool {
        let working = self.seen.working.load(Ordering::Relaxed);
        if working {
            std::thread::sleep(Duration::from_micros(100));
        }
        working
    }

    fn may_hand_over(&self) -> bool {
        !self.seen.keeps_turns.load(Ordering::Relaxed)
    }

    fn must_poll(&self) -> bool {
        self.seen.must_poll.load(Ordering::Relaxed)
    }

    fn on_stop(&mut self, _: &mut Cx<'_>) -> bool {
        self.seen.stops.fetch_add(1, Ordering::Relaxed) >= self.stop_turns
    }

    fn on_abandoned(&mut self, ask: Box<Ask>) {
        if let Ask::Note(number) = *ask {
            self.seen.abandoned.lock().unwrap().push(number);
        }
    }

    fn on_panic(&mut self, message: &str) {
        *self.seen.panic.lock().unwrap() = Some(message.to_owned());
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        *self.seen.dropped_on.lock().unwrap() = Some(std::thread::current().id());
    }
}

pub fn start(config: LaneConfig) -> (Lane<Probe>, Arc<Seen>) {
    start_with(config, 0)
}

pub fn start_with(config: LaneConfig, stop_turns: u64) -> (Lane<Probe>, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let its = seen.clone();
    let lane =
        Lane::start(config, move |_| Probe { seen: its, stop_turns, streams: Vec::new() }).unwrap();
    (lane, seen)
}

pub fn config(assist: AssistMode, spin: Spin) -> LaneConfig {
    LaneConfig { assist, spin, ..LaneConfig::default() }
}

/// Spinning and parking, shared and dedicated.
pub fn all_configs() -> impl Iterator<Item = LaneConfig> {
    let spins = [Spin::For(Duration::ZERO), Spin::default(), Spin::Forever];
    [AssistMode::Auto, AssistMode::Always, AssistMode::Never]
        .into_iter()
        .flat_map(move |assist| spins.map(|spin| config(assist, spin)))
}

pub fn submit(lane: &Lane<Probe>, ask: Ask) {
    assert!(lane.submit(Box::new(ask)).is_ok(), "the lane has stopped");
}

pub fn hand_over(lane: &Lane<Probe>, ask: Ask) {
    assert!(lane.hand_over(Box::new(ask)).is_ok(), "the lane has stopped");
}

/// What a lane may take to stop, on a machine that has other things to do.
pub const STOP: Duration = Duration::from_secs(10);

/// Keeps whoever runs it in there until [`Gate::open`].
pub struct Gate {
    inside: std::sync::mpsc::Receiver<()>,
    open: std::sync::mpsc::Sender<()>,
}

impl Gate {
    /// Has the lane's driver stand at a gate; it stands there when this returns.
    pub fn hold(lane: &Lane<Probe>) -> Self {
        let ((tell, inside), (open, opened)) =
            (std::sync::mpsc::channel(), std::sync::mpsc::channel());
        let stand = move |_: &mut Cx<'_>| {
            tell.send(()).unwrap();
            // Who drops the gate opens it, too.
            let _ = opened.recv();
        };
        submit(lane, Ask::Run(Box::new(stand)));
        let gate = Self { inside, open };
        gate.inside.recv_timeout(STOP).unwrap();
        gate
    }

    pub fn open(self) {
        self.open.send(()).unwrap();
    }
}

pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

pub fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}
