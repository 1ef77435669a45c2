//! The commands of `corelane-nixl-peer`.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use corelane_tests::{BOUND, Buffer, Slots, block_holds, from_hex, pin_process, to_hex};

use crate::{
    Agent, Engine, Message, Notify, Operation, Settings, Status, accepts, assert_quiet, layout,
};

type Answer = Result<String, String>;

#[derive(Default)]
struct Script {
    agent: Option<Arc<Agent>>,
    engine: Option<Engine>,
    regions: HashMap<String, Arc<Buffer>>,
    hammers: Vec<(Arc<AtomicBool>, JoinHandle<Answer>)>,
}

/// Reads commands and answers them until standard input ends.
pub fn run_script() {
    // SAFETY: prctl with these arguments only sets a flag of this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let mut script = Script::default();
    let (input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    for line in input.lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words.first() {
            Some(&"exit") => return,
            Some(command) => script.run(command, &Words(&words[1..])),
            None => Err("an empty command".into()),
        };
        let line = match answer {
            Ok(answer) => format!("ok {answer}"),
            Err(error) => format!("error {}", error.replace('\n', " ")),
        };
        if writeln!(output, "{line}").and_then(|()| output.flush()).is_err() {
            return;
        }
    }
}

/// The arguments of a command.
struct Words<'a>(&'a [&'a str]);

impl Words<'_> {
    fn text(&self, index: usize) -> Result<&str, String> {
        self.0.get(index).copied().ok_or(format!("argument {index} is missing"))
    }

    fn number<T: std::str::FromStr>(&self, index: usize) -> Result<T, String> {
        let text = self.text(index)?;
        text.parse().map_err(|_| format!("`{text}` is no number"))
    }

    fn bytes(&self, index: usize) -> Result<Vec<u8>, String> {
        from_hex(self.text(index)?).ok_or_else(|| format!("argument {index} is not hexadecimal"))
    }
}

fn told(status: Status) -> String {
    status.to_string()
}

fn done(result: Result<(), Status>) -> Answer {
    result.map_err(told).map(|()| String::new())
}

impl Script {
    fn run(&mut self, command: &str, words: &Words<'_>) -> Answer {
        match command {
            // CORE
            "pin" => {
                pin_process(words.number(0)?);
                Ok(String::new())
            }
            // NAME [PARAMETER=VALUE...], and `progress=off` for NIXL's own thread
            "agent" => self.start_agent(words),
            "destroy" => self.destroy(),
            // PLUGIN LIBRARY
            "accepts" => {
                let (plugin, library) = (words.text(0)?, words.text(1)?);
                Ok(accepts(Path::new(plugin), Path::new(library)).to_string())
            }
            // PLUGIN KIND
            "layout" => Ok(layout(Path::new(words.text(0)?), words.text(1)?)),
            // NAME [PARAMETER=VALUE...]
            "engine" => {
                let params: Vec<_> =
                    words.0[1..].iter().filter_map(|w| w.split_once('=')).collect();
                let engine = Engine::new(words.text(0)?, &params);
                let info = to_hex(&engine.conn_info());
                self.engine = Some(engine);
                Ok(info)
            }
            // ID LEN
            "engine-region" => {
                let engine = self.engine.as_ref().ok_or("no engine yet")?;
                let memory = Arc::new(Buffer::with_pattern(1, words.number(1)?));
                let metadata = engine.register((memory.address(0), memory.len()), 0);
                let data = to_hex(&engine.public_data(metadata.map_err(told)?));
                let address = memory.address(0);
                self.regions.insert(words.text(0)?.to_owned(), memory);
                Ok(format!("{address} {data}"))
            }
            // ID LEN
            "region" => {
                let memory = Arc::new(Buffer::new(words.number(1)?));
                self.agent()?.register(&memory);
                let address = memory.address(0).to_string();
                self.regions.insert(words.text(0)?.to_owned(), memory);
                Ok(address)
            }
            // ID
            "register" => {
                self.agent()?.register(&*self.memory(words.text(0)?)?);
                Ok(String::new())
            }
            // ID
            "deregister" => done(self.agent()?.deregister(&*self.memory(words.text(0)?)?)),
            "metadata" => Ok(to_hex(&self.agent()?.metadata())),
            // METADATA
            "load" => self.agent()?.load(&words.bytes(0)?).map_err(told),
            // NAME
            "connect" => done(self.agent()?.connect(words.text(0)?)),
            "invalidate" => done(self.agent()?.invalidate(words.text(0)?)),
            // NAME BYTES
            "notify" => {
                done(self.agent()?.notify(words.text(0)?, &words.bytes(1).unwrap_or_default()))
            }
            // COUNT
            "take" => self.take(words.number(0)?),
            "quiet" => {
                assert_quiet(self.agent()?);
                Ok(String::new())
            }
            // COUNT PEER...
            "exchange" => {
                exchange(self.agent()?, &words.0[1..], words.number(0)?).map(|()| String::new())
            }
            // PEER LOCAL OFFSET REMOTE-ADDRESS LEN [NOTIFICATION]
            "read" => self.transfer(Operation::Read, words),
            "write" => self.transfer(Operation::Write, words),
            // PEER LOCAL REMOTE-ADDRESS
            "hammer-reads" => self.hammer(Operation::Read, words),
            "hammer-writes" => self.hammer(Operation::Write, words),
            "stop-hammers" => self.stop_hammers(),
            // LOCAL BLOCK_BYTES COUNT PEER
            "watch" => self.watch(words),
            _ => self.look(command, words),
        }
    }

    /// Commands that only concern memory.
    fn look(&self, command: &str, words: &Words<'_>) -> Answer {
        let memory = self.memory(words.text(0).map_err(|_| format!("no command `{command}`"))?)?;
        match command {
            // ID SEED OFFSET LEN AT
            "fill" => {
                memory.fill(words.number(1)?, words.number(2)?, words.number(3)?, words.number(4)?);
                Ok(String::new())
            }
            // ID SEED OFFSET LEN AT
            "check" => memory
                .check(words.number(1)?, words.number(2)?, words.number(3)?, words.number(4)?)
                .map(|()| String::new()),
            // ID OFFSET LEN
            "poison" => {
                memory.poison(words.number(1)?, words.number(2)?);
                Ok(String::new())
            }
            "check-poison" => {
                memory.check_poison(words.number(1)?, words.number(2)?).map(|()| String::new())
            }
            // ID OFFSET LEN FILE
            "dump" => {
                let bytes = memory.snapshot(words.number(1)?, words.number(2)?);
                std::fs::write(words.text(3)?, bytes)
                    .map(|()| String::new())
                    .map_err(|error| error.to_string())
            }
            other => Err(format!("unknown command `{other}`")),
        }
    }

    fn agent(&self) -> Result<&Agent, String> {
        self.agent.as_deref().ok_or("no agent yet".into())
    }

    fn memory(&self, id: &str) -> Result<Arc<Buffer>, String> {
        self.regions.get(id).cloned().ok_or(format!("no region `{id}`"))
    }

    fn start_agent(&mut self, words: &Words<'_>) -> Answer {
        let mut settings = Settings::default();
        for word in &words.0[1..] {
            match word.split_once('=') {
                Some(("progress", "off")) => settings.progress_thread = false,
                Some((key, value)) => settings.params.push((key.to_owned(), value.to_owned())),
                None => return Err(format!("`{word}` is no parameter")),
            }
        }
        let agent = Agent::try_with(words.text(0)?, &settings).ok_or("no backend was created")?;
        self.agent = Some(Arc::new(agent));
        Ok(String::new())
    }

    fn destroy(&mut self) -> Answer {
        let agent = self.agent.take().ok_or("no agent")?;
        Arc::try_unwrap(agent).map(drop).map_err(|_| "the agent is in use")?;
        self.regions.clear();
        Ok(String::new())
    }

    fn take(&self, count: usize) -> Answer {
        let mut all = Vec::new();
        let deadline = Instant::now() + BOUND;
        while all.len() < count {
            if Instant::now() > deadline {
                return Err(format!("{} of {count} notifications", all.len()));
            }
            let new = self.agent()?.notifications();
            if new.is_empty() {
                std::thread::yield_now();
            }
            all.extend(new.iter().map(|m| format!("{}:{}", m.from, to_hex(&m.payload))));
        }
        Ok(all.join(" "))
    }

    fn transfer(&self, operation: Operation, words: &Words<'_>) -> Answer {
        let (offset, len) = (words.number(2)?, words.number(4)?);
        let local = self.memory(words.text(1)?)?.address(offset);
        let (peer, remote) = (words.text(0)?, words.number(3)?);
        let request = self.agent()?.prepare(operation, &[(local, len)], peer, &[(remote, len)]);
        let request = request.map_err(told)?;
        match words.bytes(5) {
            Ok(payload) => done(request.run_with(Notify::With(&payload))),
            Err(_) => done(request.run_with(Notify::None)),
        }
    }

    fn hammer(&mut self, operation: Operation, words: &Words<'_>) -> Answer {
        let agent = self.agent.clone().ok_or("no agent yet")?;
        let memory = self.memory(words.text(1)?)?;
        let (peer, remote) = (words.text(0)?.to_owned(), words.number(2)?);
        let go_on = Arc::new(AtomicBool::new(true));
        let asked = go_on.clone();
        let thread = std::thread::spawn(move || {
            let (local, remote) = ((memory.address(0), memory.len()), (remote, memory.len()));
            let request = agent.prepare(operation, &[local], &peer, &[remote]).map_err(told)?;
            let mut count = 0;
            while asked.load(Ordering::Relaxed) {
                request.run().map_err(|status| format!("{count} {status}"))?;
                count += 1;
            }
            Ok(count.to_string())
        });
        self.hammers.push((go_on, thread));
        Ok(String::new())
    }

    /// The counts of the transfers that were done; the error of the first hammer that met one.
    fn stop_hammers(&mut self) -> Answer {
        let mut counts = Vec::new();
        for (go_on, thread) in self.hammers.drain(..) {
            go_on.store(false, Ordering::Relaxed);
            counts.push(thread.join().map_err(|_| "a hammer panicked".to_owned())??);
        }
        Ok(counts.join(" "))
    }

    /// Takes the notifications of blocks `0..count`, each exactly once, looks at each block when its notification is
    /// seen, and says by a notification of 8 bytes that its slot may be used again.
    fn watch(&self, words: &Words<'_>) -> Answer {
        let memory = self.memory(words.text(0)?)?;
        let (block_bytes, count, peer) = (words.number(1)?, words.number(2)?, words.text(3)?);
        let (mut seen, mut left) = (vec![false; count], count);
        let mut progress = Instant::now();
        while left > 0 {
            let new = self.agent()?.notifications();
            if new.is_empty() {
                if progress.elapsed() > BOUND {
                    return Err(format!("{left} notifications are missing"));
                }
                std::thread::yield_now();
                continue;
            }
            progress = Instant::now();
            for message in &new {
                let slot = examine(&memory, block_bytes, message, &mut seen)?;
                left -= 1;
                self.agent()?.notify(peer, &slot.to_le_bytes()).map_err(told)?;
            }
        }
        Ok(String::new())
    }
}

fn examine(
    memory: &Buffer,
    block_bytes: usize,
    message: &Message,
    seen: &mut [bool],
) -> Result<u64, String> {
    let Slots { number, slot } =
        Slots::from_bytes(&message.payload).ok_or("a notification of other bytes")?;
    if !block_holds(memory, slot as usize * block_bytes, block_bytes, number) {
        let found = memory.word(slot as usize * block_bytes);
        return Err(format!(
            "notification {number} came before its data: slot {slot} begins with block {found:#x}"
        ));
    }
    match seen.get_mut(number as usize) {
        Some(seen) if !*seen => *seen = true,
        Some(_) => return Err(format!("notification {number} came twice")),
        None => return Err(format!("notification {number} was never sent")),
    }
    Ok(slot)
}

/// Sends the numbers below `count` to each of the peers and takes as many of each, which must come in order and once:
/// all at the same time.
pub fn exchange(agent: &Agent, peers: &[&str], count: u64) -> Result<(), String> {
    let mut sent = 0u64;
    let mut received: HashMap<String, u64> =
        peers.iter().map(|&peer| (peer.to_owned(), 0)).collect();
    let mut progress = Instant::now();
    while sent < count || received.values().any(|&got| got < count) {
        let mut moved = false;
        if sent < count {
            for peer in peers {
                agent.notify(peer, &sent.to_le_bytes()).map_err(|e| format!("to {peer}: {e}"))?;
            }
            sent += 1;
            moved = true;
        }
        for Message { from, payload } in agent.notifications() {
            let next = received.get_mut(&from).ok_or_else(|| format!("from a stranger, {from}"))?;
            if payload != next.to_le_bytes() {
                return Err(format!("{payload:?} from {from} instead of {next}"));
            }
            *next += 1;
            moved = true;
        }
        if moved {
            progress = Instant::now();
        } else if progress.elapsed() > BOUND {
            return Err(format!("stuck: {sent} sent, {received:?} received of {count}"));
        } else {
            std::thread::yield_now();
        }
    }
    Ok(())
}
