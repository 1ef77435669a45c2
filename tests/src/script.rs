//! The commands of `corelane-test-peer`.

use std::collections::HashMap;
use std::ffi::CString;
use std::io::{BufRead, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use corelane::{Access, Engine, Error, Operation, Peer, Region, RegionDescriptor};

use crate::{
    BOUND, Buffer, Cuda, GpuBuffer, GpuKernels, Log, POISON, apply, children, end_of, exchange,
    exchange_sizes, exempt_this_thread, from_hex, kind, limits, local_config, outcome, pattern,
    pin_process, to_hex, transport, watch,
};

use crate::streams::{flood, take_flood, take_sizes};

type Answer = Result<String, String>;

fn told(error: Error) -> String {
    format!("{} {error}", kind(&error)).replace('\n', " ")
}

#[derive(Default)]
struct Script {
    engine: Option<Engine>,
    peers: HashMap<String, Peer>,
    regions: HashMap<String, (Arc<Buffer>, Region)>,
    mapped: HashMap<String, Arc<Buffer>>,
    gpu: HashMap<String, (GpuBuffer, Region)>,
    kernels: Option<GpuKernels>,
    hammers: Vec<(Arc<AtomicBool>, JoinHandle<Answer>)>,
    log: Option<Log>,
    taken: Vec<OwnedFd>,
}

/// Reads commands and answers them until standard input ends. The calling thread's allocations are not counted by
/// `allocations`, which counts those of the process.
pub fn run_script(allocations: impl Fn() -> u64) {
    exempt_this_thread();
    // SAFETY: prctl with these arguments only sets a flag of this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let mut script = Script::default();
    let (input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    for line in input.lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words.first() {
            Some(&"allocations") => Ok(allocations().to_string()),
            Some(&"exit") => return,
            // PROGRAM: it goes on with standard input in this process's place.
            Some(&"exec") => {
                let _ = writeln!(output, "ok").and_then(|()| output.flush());
                Err(Command::new(words[1]).exec().to_string())
            }
            Some(command) => script.run(command, &Words(&words[1..])),
            None => Err("an empty command".into()),
        };
        let line = match answer {
            Ok(answer) => format!("ok {answer}"),
            Err(error) => format!("error {error}"),
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

    fn number(&self, index: usize) -> Result<usize, String> {
        let text = self.text(index)?;
        text.parse().map_err(|_| format!("`{text}` is no number"))
    }

    fn bytes(&self, index: usize) -> Result<Vec<u8>, String> {
        from_hex(self.text(index)?).ok_or_else(|| format!("argument {index} is not hexadecimal"))
    }

    fn descriptor(&self, index: usize) -> Result<RegionDescriptor, String> {
        RegionDescriptor::from_bytes(&self.bytes(index)?).map_err(told)
    }
}

impl Script {
    fn run(&mut self, command: &str, words: &Words<'_>) -> Answer {
        match command {
            // NAME [SETTING...]
            "engine" => self.start_engine(words),
            // ID LEN ACCESS
            "region" => self.add_region(words),
            "alloc" => self.allocate(words),
            // ID LEN ACCESS GPU
            "gpu-region" => self.add_gpu_region(words),
            // ID OFFSET LEN: registered once more, in part
            "gpu-part" => self.add_gpu_part(words),
            // ID SEED OFFSET LEN AT
            "gpu-fill" => {
                let bytes =
                    pattern(words.number(1)? as u64, words.number(4)? as u64, words.number(3)?);
                self.gpu(words)?.write(words.number(2)?, &bytes);
                Ok(String::new())
            }
            "gpu-check" => {
                let (offset, len) = (words.number(2)?, words.number(3)?);
                let expected = pattern(words.number(1)? as u64, words.number(4)? as u64, len);
                let found = self.gpu(words)?.read(offset, len);
                match found.iter().zip(&expected).position(|(found, expected)| found != expected) {
                    None => Ok(String::new()),
                    Some(at) => Err(format!(
                        "byte {} is {:#x}, and not {:#x}",
                        offset + at,
                        found[at],
                        expected[at]
                    )),
                }
            }
            // ID OFFSET LEN
            "gpu-poison" => {
                let poison = vec![POISON; words.number(2)?];
                self.gpu(words)?.write(words.number(1)?, &poison);
                Ok(String::new())
            }
            "gpu-check-poison" => {
                let found = self.gpu(words)?.read(words.number(1)?, words.number(2)?);
                let whole = found.iter().all(|byte| *byte == POISON);
                whole.then(String::new).ok_or("bytes outside of the range were written".into())
            }
            // ID WORDS SEED: by a kernel
            "gpu-kernel-fill" => {
                let (id, count, seed) = (words.text(0)?, words.number(1)?, words.number(2)?);
                let (memory, _) = self.gpu.get(id).ok_or("no such region")?;
                let kernels =
                    self.kernels.get_or_insert_with(|| GpuKernels::new(memory.gpu(), &[]));
                kernels.fill(memory, count as u32, seed as u32);
                Ok(String::new())
            }
            // ID: it is deregistered and freed
            "gpu-drop" => {
                let (mut memory, region) =
                    self.gpu.remove(words.text(0)?).ok_or("no such region")?;
                self.engine()?.deregister(&region).map_err(told)?;
                memory.free();
                Ok(String::new())
            }
            // GPU STATUS AFTER
            "gpu-lose" => {
                let fake = Cuda::fake().ok_or("the driver cannot be told to")?;
                let (gpu, status) = (words.number(0)? as u32, words.number(1)? as i32);
                fake.lose(gpu, status, words.number(2)? as u64);
                Ok(String::new())
            }
            // FUNCTION STATUS COUNT
            "gpu-refuse" => {
                let fake = Cuda::fake().ok_or("the driver cannot be told to")?;
                let name = CString::new(words.text(0)?).map_err(|error| error.to_string())?;
                fake.refuse(&name, words.number(1)? as i32, words.number(2)? as u64);
                Ok(String::new())
            }
            // ID ADDRESS LEN
            "map" => self.map(words),
            // ID SEED OFFSET LEN AT
            "fill" => {
                let memory = self.memory(words.text(0)?)?;
                let (seed, at) = (words.number(1)? as u64, words.number(4)? as u64);
                memory.fill(seed, words.number(2)?, words.number(3)?, at);
                Ok(String::new())
            }
            // ID SEED OFFSET LEN AT
            "check" => {
                let memory = self.memory(words.text(0)?)?;
                let (seed, at) = (words.number(1)? as u64, words.number(4)? as u64);
                memory.check(seed, words.number(2)?, words.number(3)?, at).map(|()| String::new())
            }
            // ID OFFSET LEN
            "poison" => {
                self.memory(words.text(0)?)?.poison(words.number(1)?, words.number(2)?);
                Ok(String::new())
            }
            "check-poison" => {
                let memory = self.memory(words.text(0)?)?;
                memory.check_poison(words.number(1)?, words.number(2)?).map(|()| String::new())
            }
            // ID OFFSET LEN FILE
            "dump" => {
                let memory = self.memory(words.text(0)?)?;
                let bytes = memory.snapshot(words.number(1)?, words.number(2)?);
                std::fs::write(words.text(3)?, bytes)
                    .map(|()| String::new())
                    .map_err(|error| error.to_string())
            }
            // ID
            "deregister" => {
                let (_, region) = self.regions.get(words.text(0)?).ok_or("no such region")?;
                self.engine()?.deregister(region).map_err(told).map(|()| String::new())
            }
            "free" => self.free(words),
            "unmap" => {
                self.memory(words.text(0)?)?.unmap();
                Ok(String::new())
            }
            // PROGRAM [ARGUMENT...]
            "exec" => {
                use std::os::unix::process::CommandExt;
                Err(std::process::Command::new(words.text(0)?)
                    .args(&words.0[1..])
                    .exec()
                    .to_string())
            }
            // RESOURCE BYTES: the soft limit
            "limit" => limits::set(words.text(0)?, words.number(1)?).map(|()| String::new()),
            // LEFT: all descriptors but so many are taken
            "use-up-descriptors" => {
                self.taken = limits::use_up_descriptors(words.number(0)?)?;
                Ok(self.taken.len().to_string())
            }
            "give-descriptors-back" => {
                self.taken.clear();
                Ok(String::new())
            }
            // METADATA
            "load" => {
                let peer = self.engine()?.load_peer(&words.bytes(0)?).map_err(told)?;
                let name = peer.name().to_owned();
                self.peers.insert(name.clone(), peer);
                Ok(name)
            }
            // NAME
            "connect" => self.peer(words)?.connect(BOUND).map_err(told).map(|()| String::new()),
            "disconnect" => {
                self.peer(words)?.disconnect().map_err(told).map(|dropped| dropped.to_string())
            }
            // NAME BYTES
            "notify" => {
                let payload = words.bytes(1).unwrap_or_default();
                self.peer(words)?.notify(&payload).map_err(told).map(|()| String::new())
            }
            // NAME COUNT
            "flood" => flood(self.peer(words)?, words.number(1)?),
            "exchange" => exchange(self.engine()?, self.peer(words)?, words.number(1)?)
                .map(|()| String::new()),
            // NAME COUNT SEED
            "exchange-sizes" => exchange_sizes(
                self.engine()?,
                self.peer(words)?,
                words.number(1)?,
                words.number(2)? as u64,
            )
            .map(|()| String::new()),
            // NAME
            "transport" => Ok(transport(self.engine()?, words.text(0)?).to_string()),
            // COUNT
            "take" => self.take(words.number(0)?),
            // COUNT SEED FIRST
            "take-sizes" => take_sizes(
                self.engine()?,
                words.number(0)?,
                words.number(1)? as u64,
                words.number(2)?,
            )
            .map(|()| String::new()),
            "take-flood" => take_flood(self.engine()?, words.number(0)?),
            // PEER LOCAL OFFSET DESCRIPTOR OFFSET LEN [NOTIFICATION]
            "read" => self.transfer(Operation::Read, words),
            "write" => self.transfer(Operation::Write, words),
            // PEER LOCAL DESCRIPTOR
            "hammer-reads" => self.hammer(Operation::Read, words),
            "hammer-writes" => self.hammer(Operation::Write, words),
            "stop-hammers" => self.stop_hammers(),
            // LOCAL BLOCK_BYTES COUNT PEER
            "watch" => self.watch(words),
            // CORE
            "pin" => {
                pin_process(words.number(0)?);
                Ok(String::new())
            }
            // MS; an application that is busy with something else, and calls no engine
            "spin" => {
                let until = Instant::now() + Duration::from_millis(words.number(0)? as u64);
                while Instant::now() < until {
                    std::hint::spin_loop();
                }
                Ok(String::new())
            }
            // ID; without privileges, and not dumpable afterwards, as the kernel wants it
            "become-user" => children::become_user(words.number(0)? as u32).map(|()| String::new()),
            // Before the engine is made
            "own-network" => children::leave_network().map(|()| String::new()),
            "dumpable" => children::set_dumpable(words.number(0)? == 1).map(|()| String::new()),
            // A child that keeps all that it has inherited and does nothing: its process ID
            "fork" => children::fork_idle().map(|id| id.to_string()),
            "fork-heir" => children::fork_heir().map(|id| id.to_string()),
            // NAME: that the lane of this peer ends is not told by the words of its life
            "end-unheard" => {
                let forget = |_| async { children::forget_robust_futexes() };
                let task = self.engine()?.spawn_on(self.peer(words)?, forget).map_err(told)?;
                task.wait().map_err(|error| error.to_string())?.map(|()| String::new())
            }
            // From now on
            "keep-log" => {
                self.log = Some(Log::keep());
                Ok(String::new())
            }
            // WORD...: the lines that hold all of them
            "log" => Ok(self.log.as_ref().ok_or("no log is kept")?.lines(words.0).join(" | ")),
            "shutdown" => self.engine()?.shutdown().map_err(told).map(|()| String::new()),
            "completed" => Ok(self.engine()?.stats().totals.completed.to_string()),
            "rdma-failures" => Ok(self.engine()?.stats().totals.rdma_failures.to_string()),
            "failed" => Ok(self.engine()?.stats().totals.failed.to_string()),
            "served" => Ok(self.engine()?.stats().totals.requests_served.to_string()),
            "refused" => Ok(self.engine()?.stats().totals.requests_refused.to_string()),
            "received" => Ok(self.engine()?.stats().notifications_received.to_string()),
            other => Err(format!("unknown command `{other}`")),
        }
    }

    fn engine(&self) -> Result<&Engine, String> {
        self.engine.as_ref().ok_or("no engine yet".into())
    }

    fn peer(&self, words: &Words<'_>) -> Result<&Peer, String> {
        self.peers.get(words.text(0)?).ok_or("no such peer".into())
    }

    fn memory(&self, id: &str) -> Result<Arc<Buffer>, String> {
        let registered = self.regions.get(id).map(|(memory, _)| memory);
        registered.or(self.mapped.get(id)).cloned().ok_or(format!("no region `{id}`"))
    }

    fn start_engine(&mut self, words: &Words<'_>) -> Answer {
        let mut config = local_config();
        apply(&mut config, &words.0[1..].join(" "))?;
        let engine = Engine::new(words.text(0)?, config).map_err(told)?;
        let metadata = to_hex(&engine.metadata());
        self.engine = Some(engine);
        Ok(metadata)
    }

    fn add_region(&mut self, words: &Words<'_>) -> Answer {
        let access = access(words.text(2)?)?;
        let memory = Arc::new(Buffer::new(words.number(1)?));
        let region = memory.register(self.engine()?, access);
        let descriptor = to_hex(&region.descriptor().to_bytes());
        self.regions.insert(words.text(0)?.to_owned(), (memory, region));
        Ok(descriptor)
    }

    /// As `region`, of memory of a GPU.
    fn add_gpu_region(&mut self, words: &Words<'_>) -> Answer {
        let (len, access) = (words.number(1)?, access(words.text(2)?)?);
        let memory = GpuBuffer::new(words.number(3)? as u32, len);
        let region = memory.register(self.engine()?, access).map_err(told)?;
        let descriptor = to_hex(&region.descriptor().to_bytes());
        self.gpu.insert(words.text(0)?.to_owned(), (memory, region));
        Ok(descriptor)
    }

    fn add_gpu_part(&self, words: &Words<'_>) -> Answer {
        let part = (words.number(1)?, words.number(2)?);
        let memory = self.gpu(words)?;
        let region =
            memory.register_part(self.engine()?, part, Access::READ_WRITE).map_err(told)?;
        Ok(to_hex(&region.descriptor().to_bytes()))
    }

    fn gpu(&self, words: &Words<'_>) -> Result<&GpuBuffer, String> {
        let id = words.text(0)?;
        self.gpu.get(id).map(|(memory, _)| memory).ok_or(format!("no GPU region `{id}`"))
    }

    /// As `region`, of memory of the engine.
    fn allocate(&mut self, words: &Words<'_>) -> Answer {
        let (len, access) = (words.number(1)?, access(words.text(2)?)?);
        let (memory, region) = Buffer::of_engine(self.engine()?, len, access);
        let descriptor = to_hex(&region.descriptor().to_bytes());
        self.regions.insert(words.text(0)?.to_owned(), (Arc::new(memory), region));
        Ok(descriptor)
    }

    /// Gives memory of the engine back.
    fn free(&mut self, words: &Words<'_>) -> Answer {
        let id = words.text(0)?.to_owned();
        let (memory, region) = self.regions.remove(&id).ok_or("no such region")?;
        let memory = Arc::into_inner(memory).ok_or("somebody uses it")?;
        match memory.free(self.engine()?) {
            Ok(()) => Ok(String::new()),
            Err((error, memory)) => {
                self.regions.insert(id, (Arc::new(memory), region));
                Err(told(error))
            }
        }
    }

    /// Memory that is not registered, at a given address.
    fn map(&mut self, words: &Words<'_>) -> Answer {
        let (address, len) = (words.number(1)? as u64, words.number(2)?);
        let memory = Buffer::mapped(address, len).map_err(|error| error.to_string())?;
        self.mapped.insert(words.text(0)?.to_owned(), Arc::new(memory));
        Ok(String::new())
    }

    fn take(&self, count: usize) -> Answer {
        let mut all = Vec::new();
        let deadline = Instant::now() + BOUND;
        while all.len() < count {
            if Instant::now() > deadline {
                return Err(format!("{} of {count} notifications: {all:?}", all.len()));
            }
            let taken = self.engine()?.take_notifications(|n| {
                all.push(format!("{}:{}", n.from, to_hex(&n.payload)));
            });
            if taken.map_err(told)? == 0 {
                std::thread::yield_now();
            }
        }
        Ok(all.join(" "))
    }

    fn transfer(&self, operation: Operation, words: &Words<'_>) -> Answer {
        let (offset, len) = (words.number(2)?, words.number(5)?);
        let local = match self.gpu.get(words.text(1)?) {
            Some((memory, _)) => memory.segment(offset, len),
            None => self.memory(words.text(1)?)?.segment(offset, len),
        };
        let descriptor = words.descriptor(3)?;
        let remote = descriptor.segment(words.number(4)? as u64, local.len);
        let plan = self
            .engine()?
            .prepare(operation, self.peer(words)?, &[local], &[remote])
            .map_err(told)?;
        let transfer = plan.transfer();
        match words.bytes(6) {
            Ok(payload) => transfer.post_with_notification(&payload),
            Err(_) => transfer.post(),
        }
        .map_err(told)?;
        outcome(&transfer).map_err(told).map(|()| String::new())
    }

    fn hammer(&mut self, operation: Operation, words: &Words<'_>) -> Answer {
        let memory = self.memory(words.text(1)?)?;
        let descriptor = words.descriptor(2)?;
        let plan = self
            .engine()?
            .prepare(
                operation,
                self.peer(words)?,
                &[memory.segment(0, memory.len())],
                &[descriptor.segment(0, memory.len() as u64)],
            )
            .map_err(told)?;
        let go_on = Arc::new(AtomicBool::new(true));
        let (asked, transfer) = (go_on.clone(), plan.transfer());
        let thread = std::thread::spawn(move || {
            let mut count = 0;
            while asked.load(Ordering::Relaxed) {
                end_of(&transfer).map_err(|error| format!("{count} {}", told(error)))?;
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

    fn watch(&self, words: &Words<'_>) -> Answer {
        let memory = self.memory(words.text(0)?)?;
        let peer = self.peers.get(words.text(3)?).ok_or("no such peer")?;
        watch(self.engine()?, &memory, words.number(1)?, words.number(2)?, |free| {
            peer.notify(&free.to_le_bytes()).map_err(told)
        })
        .map(|()| String::new())
    }
}

fn access(name: &str) -> Result<Access, String> {
    match name {
        "local" => Ok(Access::LOCAL),
        "read" => Ok(Access::REMOTE_READ),
        "write" => Ok(Access::REMOTE_WRITE),
        "read-write" => Ok(Access::READ_WRITE),
        other => Err(format!("unknown access `{other}`")),
    }
}
