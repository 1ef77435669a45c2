//! A second process, driven line by line.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};

use corelane::RegionDescriptor;

use crate::BOUND;

/// Bytes as text.
pub fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Text as bytes.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |c: u8| (c as char).to_digit(16).map(|d| d as u8);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect()
}

/// A running `corelane-test-peer`. Killed when dropped, or when the thread that started it is gone.
#[derive(Debug)]
pub struct PeerProcess {
    child: Child,
    input: ChildStdin,
    /// Locked so that what holds a process can be shared between threads.
    answers: Mutex<Receiver<String>>,
}

impl PeerProcess {
    /// Starts the binary.
    pub fn start(binary: &str) -> Self {
        Self::start_command(&mut Command::new(binary)).expect("the peer process starts")
    }

    /// Starts the binary by another program; that is what signals go to.
    ///
    /// # Errors
    /// What the other program says, if it does not start the binary.
    pub fn start_by(words: &[&str]) -> Result<Self, String> {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stderr(Stdio::piped());
        let mut process = Self::start_command(&mut command).map_err(|error| error.to_string())?;
        // Any command: it answers, or its output ends.
        let _ = writeln!(process.input, "allocations").and_then(|()| process.input.flush());
        let answers = process.answers.get_mut().expect("nobody panicked while receiving");
        if answers.recv_timeout(BOUND).is_ok() {
            return Ok(process);
        }
        let mut reason = String::new();
        if let Some(mut errors) = process.child.stderr.take() {
            let _ = errors.read_to_string(&mut reason);
        }
        Err(reason.trim().to_owned())
    }

    /// Starts any program that answers each line of its standard input with one that begins with `ok` or `error`.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_command(command: &mut Command) -> std::io::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().expect("its standard input");
        let output = BufReader::new(child.stdout.take().expect("its standard output"));
        let (lines, answers) = channel();
        std::thread::spawn(move || {
            // Ends with the process, or with the test.
            for line in output.lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, input, answers: Mutex::new(answers) })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a command without waiting for the answer.
    #[track_caller]
    pub fn send(&mut self, command: &str) {
        writeln!(self.input, "{command}").expect("the peer process reads its commands");
        self.input.flush().expect("the peer process reads its commands");
    }

    /// The answer to the oldest unanswered command.
    #[track_caller]
    pub fn answer(&mut self) -> Result<String, String> {
        // Longer than the bound of the peer's own waiting, which says more.
        let answers = self.answers.get_mut().expect("nobody panicked while receiving");
        let line = answers.recv_timeout(BOUND + BOUND / 2).expect("an answer of the peer");
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("ok", rest) => Ok(rest.to_owned()),
            ("error", rest) => Err(rest.to_owned()),
            _ => panic!("the peer process said: {line}"),
        }
    }

    /// Sends a command and waits for its answer.
    #[track_caller]
    pub fn try_ask(&mut self, command: &str) -> Result<String, String> {
        self.send(command);
        self.answer()
    }

    /// Sends a command that must succeed.
    #[track_caller]
    pub fn ask(&mut self, command: &str) -> String {
        self.try_ask(command).unwrap_or_else(|error| {
            let command: String = command.chars().take(80).collect();
            panic!("the peer process on `{command}`: {error}")
        })
    }

    /// Creates its engine; the answer is the metadata.
    #[track_caller]
    pub fn engine(&mut self, name: &str, settings: &str) -> Vec<u8> {
        from_hex(&self.ask(&format!("engine {name} {settings}"))).expect("metadata")
    }

    /// Maps and registers a region of poison.
    #[track_caller]
    pub fn region(&mut self, id: &str, len: usize, access: &str) -> RegionDescriptor {
        let bytes = from_hex(&self.ask(&format!("region {id} {len} {access}"))).expect("hex");
        RegionDescriptor::from_bytes(&bytes).expect("a descriptor")
    }

    /// Makes an engine known to it.
    #[track_caller]
    pub fn load(&mut self, metadata: &[u8]) {
        self.ask(&format!("load {}", to_hex(metadata)));
    }

    /// The bytes of one of its regions.
    #[track_caller]
    pub fn dump(&mut self, id: &str, offset: usize, len: usize) -> Vec<u8> {
        let file = std::env::temp_dir().join(format!("corelane-test-dump-{}", self.id()));
        self.ask(&format!("dump {id} {offset} {len} {}", file.display()));
        let bytes = std::fs::read(&file).expect("the dump");
        std::fs::remove_file(&file).expect("removing the dump");
        bytes
    }

    /// A number that it counts.
    #[track_caller]
    pub fn number(&mut self, command: &str) -> u64 {
        self.ask(command).parse().expect("a number")
    }

    /// Waits until it has stopped, or ended: `state` of waitid. It stays to be waited for.
    fn wait_for(&self, state: i32) {
        // SAFETY: an all-zero value is valid, and overwritten by the kernel.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let options = state | libc::WNOWAIT;
        // SAFETY: our own child; `info` is ours to write to.
        let result = unsafe { libc::waitid(libc::P_PID, self.id(), &raw mut info, options) };
        assert_eq!(result, 0, "waiting for the process");
    }

    fn signal(&self, signal: i32) {
        // SAFETY: a signal to our own child, which has not been waited for.
        let result = unsafe { libc::kill(self.child.id() as i32, signal) };
        assert_eq!(result, 0, "signal {signal}");
    }

    /// Stops it from running (SIGSTOP), and waits until all its threads have stopped.
    pub fn freeze(&self) {
        self.signal(libc::SIGSTOP);
        self.wait_for(libc::WSTOPPED);
    }

    /// Lets it run again (SIGCONT).
    pub fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }

    /// Kills it (SIGKILL), without waiting for its end.
    pub fn kill(&self) {
        self.signal(libc::SIGKILL);
    }

    /// Kills it, and waits for its end: its memory is out of reach, too.
    pub fn end(&self) {
        self.kill();
        self.wait_for_end();
    }

    /// Waits until it has ended.
    pub fn wait_for_end(&self) {
        self.wait_for(libc::WEXITED);
    }
}

impl Drop for PeerProcess {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A second process with one engine and one region, `r`.
#[derive(Debug)]
pub struct Target {
    /// The process.
    pub process: PeerProcess,
    /// Its engine's metadata.
    pub metadata: Vec<u8>,
    /// Its region, which holds pattern 1 at first.
    pub region: RegionDescriptor,
}

impl Target {
    /// Sets the process up.
    #[track_caller]
    pub fn start(
        mut process: PeerProcess,
        name: &str,
        len: usize,
        access: &str,
        settings: &str,
    ) -> Self {
        let metadata = process.engine(name, settings);
        let region = process.region("r", len, access);
        process.ask(&format!("fill r 1 0 {len} 0"));
        Self { process, metadata, region }
    }

    /// Panics unless bytes of its region are as in [`Buffer::check`](crate::Buffer::check).
    #[track_caller]
    pub fn assert_pattern(&mut self, seed: u64, offset: usize, len: usize, at: u64) {
        self.process.ask(&format!("check r {seed} {offset} {len} {at}"));
    }

    /// Panics unless bytes of its region are poison.
    #[track_caller]
    pub fn assert_poison(&mut self, offset: usize, len: usize) {
        self.process.ask(&format!("check-poison r {offset} {len}"));
    }
}
