//! Servers and clients as separate programs, and what becomes of processes when others die.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::common::{BACKENDS, Bench, command, run};

/// A server on a port of its own; killed at the end of the test.
struct Server {
    child: Child,
    address: String,
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    fn start(options: &str) -> Self {
        let mut child = command(&format!("server --listen 127.0.0.1:0 {options}"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("a line");
        let address = line.split([' ', ',']).nth(2).expect("an address").to_owned();
        Self { child, address, _stdout: stdout }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().expect("kills");
        self.child.wait().expect("reaps");
    }
}

fn is_alive(pid: u32) -> bool {
    // A zombie is dead, whoever still has to reap it.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_server_serves_one_client_after_the_other() {
    let server = Server::start("");
    for backend in BACKENDS {
        let bench = Bench::new();
        let (_, results) = bench.results(&format!(
            "client --connect {} --backend {backend} --quick --duration 20ms --scenario sizes,notify --sizes 64",
            server.address
        ));
        let ids = results["series"].as_array().expect("series").len();
        assert_eq!(ids, 2 + 4, "one-way times too: it is one host");
        assert!(
            results["environment"]["target"]["kernel"]
                .as_str()
                .is_some_and(|kernel| kernel.contains("Linux"))
        );
    }
}

/// As on a machine that has other things to do: for longer than engines wait for each other unless they are told to.
#[test]
fn a_server_that_stands_still_for_seconds_is_waited_for() {
    let server = Server::start("");
    let pid = server.child.id();
    let threads =
        move || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, std::iter::Iterator::count);
    let signal = move |signal| {
        let server = nix::unistd::Pid::from_raw(pid.cast_signed());
        nix::sys::signal::kill(server, signal).expect("a signal to the server");
    };
    let before = threads();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Its engine is there, and the client is about to connect to it.
            eventually("the target's engine", || threads() > before);
            signal(Signal::SIGSTOP);
            std::thread::sleep(Duration::from_secs(4));
            signal(Signal::SIGCONT);
        });
        let bench = Bench::new();
        let (_, results) = bench.results(&format!(
            "client --connect {} --duration 500ms --rounds 1 --scenario sizes --sizes 64 --operation read",
            server.address
        ));
        assert_eq!(results["complete"], true);
    });
}

#[test]
fn garbage_on_the_control_port_does_not_disturb_the_server() {
    let server = Server::start("");
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"{\"open\":{}}\n", b"\n", &[0xFF; 9000]] {
        let mut stream = TcpStream::connect(&server.address).expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        stream.write_all(garbage).expect("sends");
        stream.shutdown(std::net::Shutdown::Write).expect("ends");
        // The server hangs up; a reset is as good as an end.
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let bench = Bench::new();
    bench.results(&format!(
        "client --connect {} --backend raw-tcp --duration 20ms --rounds 1 --scenario sizes --sizes 64",
        server.address
    ));
}

#[test]
fn a_server_does_not_lend_more_memory_than_it_was_told() {
    let server = Server::start("--max-memory 1MiB");
    let bench = Bench::new();
    let ran = bench.run(&format!(
        "client --connect {} --backend raw-tcp --scenario sizes --sizes 4MiB",
        server.address
    ));
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("--max-memory"), "{}", ran.stderr);
}

#[test]
fn a_missing_server_is_explained() {
    let bench = Bench::new();
    for (address, expected) in [
        ("127.0.0.1:1", "is `corelane-bench server` running there?"),
        ("nowhere", "cannot resolve 'nowhere'"),
    ] {
        let mut client =
            command(&format!("client --connect {address} --scenario sizes --sizes 64"));
        let ran = run(client.arg("--out-dir").arg(bench.path("out")));
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{}", ran.stderr);
        assert!(bench.files().is_empty(), "something is left: {:?}", bench.files());
    }
}

#[test]
fn a_port_in_use_is_explained() {
    let server = Server::start("");
    let ran = run(&mut command(&format!("server --listen {}", server.address)));
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains("cannot listen on") && ran.stderr.lines().count() == 1,
        "{}",
        ran.stderr
    );
}

/// Not every kernel lists the children of a process, but each process names its parent.
fn children(parent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent_of = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, fields) = stat.rsplit_once(')')?;
        fields.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    numbers.filter(|pid| parent_of(pid) == Some(parent)).collect()
}

fn long_run(bench: &Bench) -> (Child, Vec<u32>) {
    let options =
        "loopback --backend raw-tcp --scenario sizes --sizes 64 --duration 2s --rounds 100";
    let mut child = command(options)
        .arg("--out-dir")
        .arg(bench.directory.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    // The first line of progress: both children are measuring.
    let mut line = String::new();
    BufReader::new(child.stderr.take().expect("piped")).read_line(&mut line).expect("a line");
    let pids = children(child.id());
    assert_eq!(pids.len(), 2, "a server and a client: {line}");
    (child, pids)
}

#[test]
fn no_process_outlives_a_killed_coordinator() {
    let bench = Bench::new();
    let (mut coordinator, pids) = long_run(&bench);
    coordinator.kill().expect("kills");
    coordinator.wait().expect("reaps");
    eventually("children outlive their parent", || pids.iter().all(|&pid| !is_alive(pid)));
    assert!(bench.files().is_empty(), "half-written files: {:?}", bench.files());
}

#[test]
fn a_killed_server_ends_the_run_with_an_error() {
    let bench = Bench::new();
    let (mut coordinator, pids) = long_run(&bench);
    let server = pids
        .iter()
        .find(|pid| {
            fs::read_to_string(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.contains("server"))
        })
        .expect("a server");
    let server = nix::unistd::Pid::from_raw(*server as i32);
    nix::sys::signal::kill(server, Signal::SIGKILL).expect("kill");
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = coordinator.try_wait().expect("waits") {
            break status;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "the run hangs");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(1));
    eventually("the client outlives the run", || pids.iter().all(|&pid| !is_alive(pid)));
}
