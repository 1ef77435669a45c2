//! Round trips of 64 bytes over loopback TCP between two processes: lanes against a raw spinning pair, in interleaved
//! rounds, under the conditions that too few cores bring. Prints microseconds, and the median of the per-round ratios.
//!
//! `cargo run --release -p corelane-runtime --example tcp_pair [rounds] [scenario...]`

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use corelane_runtime::{
    AssistMode, Cx, Driver, FdId, Interest, Lane, LaneConfig, Readiness, Spin, Start,
    histogram::Histogram, placement,
};

const SIZE: usize = 64;
const ROUND: Duration = Duration::from_millis(400);

fn try_receive(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    // SAFETY: the buffer is writable for its length.
    let received = unsafe {
        libc::recv(stream.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT)
    };
    match received {
        1.. => Ok(Some(received as usize)),
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            error => Err(error),
        },
    }
}

/// Echoes what arrives; and posts requests and publishes the answer's number.
struct Peer {
    stream: Option<(TcpStream, FdId)>,
    answered: Arc<AtomicU64>,
    posted: u64,
    is_server: bool,
    closed: Arc<AtomicBool>,
}

impl Driver for Peer {
    type Message = u64;

    fn on_message(&mut self, cx: &mut Cx<'_>, number: u64) {
        let Some((stream, id)) = &mut self.stream else { return };
        self.posted = number;
        stream.write_all(&[7; SIZE]).expect("send");
        cx.make_hot(*id);
    }

    fn on_fd(&mut self, cx: &mut Cx<'_>, _: u64, _: Readiness) -> bool {
        let Some((stream, id)) = &mut self.stream else { return false };
        let mut buffer = [0; SIZE];
        match try_receive(stream, &mut buffer) {
            Ok(None) => false,
            Ok(Some(len)) if self.is_server => stream.write_all(&buffer[..len]).is_ok(),
            Ok(Some(_)) => {
                self.answered.store(self.posted, Ordering::Release);
                true
            }
            Err(_) => {
                cx.remove_fd(*id);
                self.stream = None;
                self.closed.store(true, Ordering::Release);
                false
            }
        }
    }

    fn on_timer(&mut self, _: &mut Cx<'_>, _: u64) {}

    fn on_turn(&mut self, _: &mut Cx<'_>) -> bool {
        false
    }

    fn on_panic(&mut self, message: &str) {
        eprintln!("lane: {message}");
    }
}

struct Node {
    lane: Lane<Peer>,
    answered: Arc<AtomicU64>,
    closed: Arc<AtomicBool>,
}

fn node(stream: TcpStream, core: Option<usize>, is_server: bool) -> Node {
    let config = LaneConfig {
        name: if is_server { "server" } else { "client" }.to_owned(),
        core,
        spin: Spin::default(),
        assist: AssistMode::Auto,
        ..LaneConfig::default()
    };
    let (answered, closed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (answers, ends) = (answered.clone(), closed.clone());
    let lane = Lane::start(config, move |cx| {
        let id = cx.add_fd(stream.as_raw_fd(), 0, Interest::READABLE, Start::Hot);
        let stream = Some((stream, id));
        Peer { stream, answered: answers, posted: 0, is_server, closed: ends }
    })
    .expect("lane");
    Node { lane, answered, closed }
}

fn serve(how: &str, core: Option<usize>, polls: bool, burns: bool) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    println!("{}", listener.local_addr().expect("address").port());
    let (mut stream, _) = listener.accept().expect("accept");
    stream.set_nodelay(true).expect("nodelay");
    if burns {
        burn(core);
    }
    if how == "raw" {
        core.map(placement::pin_thread);
        let mut buffer = [0; SIZE];
        loop {
            match try_receive(&stream, &mut buffer) {
                Ok(None) => std::hint::spin_loop(),
                Ok(Some(len)) => stream.write_all(&buffer[..len]).expect("send"),
                Err(_) => return,
            }
        }
    }
    let node = node(stream, core, true);
    while !node.closed.load(Ordering::Acquire) {
        if polls {
            node.lane.assist();
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    if std::env::var_os("SHOW").is_some() {
        eprintln!("server {:?}", node.lane.stats());
    }
    node.lane.stop(Duration::from_secs(1)).expect("stop");
}

fn burn(core: Option<usize>) {
    std::thread::spawn(move || {
        core.map(placement::pin_thread);
        loop {
            std::hint::spin_loop();
        }
    });
}

struct Server(Child, TcpStream);

fn server(how: &str, core: usize, options: &[&str]) -> Server {
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args(["serve", how, &core.to_string()])
        .args(options)
        .stdout(Stdio::piped())
        .spawn()
        .expect("server");
    let mut line = String::new();
    let mut out = child.stdout.take().expect("stdout");
    let mut byte = [0];
    while out.read(&mut byte).is_ok_and(|len| len == 1) && byte[0] != b'\n' {
        line.push(byte[0] as char);
    }
    let stream = TcpStream::connect(("127.0.0.1", line.parse().expect("port"))).expect("connect");
    stream.set_nodelay(true).expect("nodelay");
    Server(child, stream)
}

impl Server {
    fn end(mut self) {
        drop(self.1);
        self.0.wait().expect("server");
    }
}

/// Repeats `trip` for the time of a round.
fn measure(mut trip: impl FnMut()) -> Histogram {
    let mut histogram = Histogram::new();
    let begin = Instant::now();
    for number in 0u64.. {
        let before = Instant::now();
        trip();
        if number > 200 || before - begin > ROUND / 4 {
            histogram.record(before.elapsed().as_nanos() as u64);
        }
        if before - begin > ROUND {
            break;
        }
    }
    histogram
}

fn raw_round() -> Histogram {
    let server = server("raw", 1, &[]);
    let mut stream = server.1.try_clone().expect("clone");
    let histogram = std::thread::spawn(move || {
        placement::pin_thread(0).expect("pin");
        let mut buffer = [0; SIZE];
        measure(|| {
            stream.write_all(&[7; SIZE]).expect("send");
            while try_receive(&stream, &mut buffer).expect("receive").is_none() {
                std::hint::spin_loop();
            }
        })
    })
    .join()
    .expect("client");
    server.end();
    histogram
}

/// `pairs` lanes on core 0 against as many on core 1, each in its own process or thread.
fn lane_round(scenario: &str) -> Histogram {
    let has = |option: &str| scenario.contains(option);
    let mut options = Vec::new();
    if has("target-polls") {
        options.push("polls");
    }
    if has("burner") {
        options.push("burns");
    }
    let pairs = if has("8-engines") { 4 } else { 1 };
    let on_lane = has("on-lane");
    let pinned_caller = has("pinned");
    let burns = has("burner");
    let threads: Vec<_> = (0..pairs)
        .map(|pair| {
            let (client_core, server_core) = if pair % 2 == 0 { (0, 1) } else { (1, 0) };
            let server = server("lane", server_core, &options);
            std::thread::spawn(move || {
                let node = node(server.1.try_clone().expect("clone"), Some(client_core), false);
                if burns {
                    burn(Some(client_core));
                }
                if pinned_caller {
                    placement::pin_thread(client_core).expect("pin");
                }
                let mut number = 0;
                let histogram = if on_lane {
                    let answered = node.answered.clone();
                    node.lane
                        .spawn(move |lane| async move {
                            let mut histogram = Histogram::new();
                            let begin = Instant::now();
                            while begin.elapsed() < ROUND {
                                number += 1;
                                let before = Instant::now();
                                lane.lane().submit(number).expect("submit");
                                while answered.load(Ordering::Acquire) != number {
                                    lane.yield_now().await;
                                }
                                histogram.record(before.elapsed().as_nanos() as u64);
                            }
                            histogram
                        })
                        .wait()
                        .expect("task")
                } else {
                    measure(|| {
                        number += 1;
                        node.lane.submit(number).expect("submit");
                        while node.answered.load(Ordering::Acquire) != number {
                            node.lane.assist();
                        }
                    })
                };
                if std::env::var_os("SHOW").is_some() {
                    eprintln!("client {:?}", node.lane.stats());
                }
                node.lane.stop(Duration::from_secs(1)).expect("stop");
                drop(node);
                server.end();
                histogram
            })
        })
        .collect();
    let mut all = Histogram::new();
    threads.into_iter().for_each(|thread| all.merge(&thread.join().expect("client")));
    all
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|word| word == "serve") {
        let has = |option: &str| arguments.iter().any(|word| word == option);
        return serve(&arguments[1], arguments[2].parse().ok(), has("polls"), has("burns"));
    }
    let rounds = arguments.first().and_then(|word| word.parse().ok()).unwrap_or(5);
    let mut scenarios: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    if scenarios.is_empty() {
        scenarios = vec!["foreign", "pinned", "on-lane", "target-polls", "8-engines", "burner"];
    }
    let mut ratios = vec![Vec::new(); scenarios.len()];
    let mut all = vec![Histogram::new(); scenarios.len() + 1];
    for _ in 0..rounds {
        let raw = raw_round();
        all[scenarios.len()].merge(&raw);
        for (index, scenario) in scenarios.iter().enumerate() {
            let round = lane_round(scenario);
            ratios[index].push(round.value_at(0.5) as f64 / raw.value_at(0.5) as f64);
            all[index].merge(&round);
        }
    }
    let show = |name: &str, histogram: &Histogram| {
        let p = histogram.percentiles();
        let [p50, p90, p99, p999, max] =
            [p.p50, p.p90, p.p99, p.p999, p.max].map(|ns| ns as f64 / 1e3);
        print!(
            "{name:14} n={:<8} p50 {p50:8.2} p90 {p90:8.2} p99 {p99:9.2} p99.9 {p999:9.2} max {max:9.2} us",
            p.count
        );
    };
    show("raw", &all[scenarios.len()]);
    println!();
    for (index, scenario) in scenarios.iter().enumerate() {
        show(scenario, &all[index]);
        ratios[index].sort_by(f64::total_cmp);
        println!("  ratio {:.2}", ratios[index][ratios[index].len() / 2]);
    }
}
