//! What the library writes to standard error, in processes of their own: a level and standard error
//! are a whole process's.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use corelane_capi::*;

/// No wait of a test is longer.
const BOUND: Duration = Duration::from_secs(60);
const CHILD: &str = "CORELANE_TEST_LOG";

/// What a child runs instead of its test.
fn in_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// The test `name` of this binary in a process of its own, killed when it is dropped.
struct Process {
    child: Child,
    input: ChildStdin,
    said: mpsc::Receiver<String>,
}

impl Process {
    fn start(name: &str, stderr: impl Into<Stdio>) -> Self {
        Self::start_with(&[], name, stderr)
    }

    fn start_with(variables: &[(&str, &str)], name: &str, stderr: impl Into<Stdio>) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, "1")
            .env("CORELANE_LISTEN", "127.0.0.1")
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, said) = mpsc::channel();
        let pass_on = move |output: ChildStdout| {
            for line in BufReader::new(output).lines() {
                let _ = sender.send(line.unwrap());
            }
        };
        std::thread::spawn(move || pass_on(output));
        Self { child, input, said }
    }

    /// Waits until the child has called [`stop_here`].
    #[track_caller]
    fn wait(&self) {
        while self.said.recv_timeout(BOUND).expect("the child hangs, or has failed") != "HERE" {}
    }

    fn go_on(&mut self) {
        self.input.write_all(b"\n").unwrap();
    }

    /// Waits for the end.
    #[track_caller]
    fn finish(mut self) {
        // The channel closes when the child's standard output does.
        while match self.said.recv_timeout(BOUND) {
            Ok(_) => true,
            Err(mpsc::RecvTimeoutError::Disconnected) => false,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("the child hangs"),
        } {}
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tells the parent that this child is here, and waits for its word.
fn stop_here() {
    println!("\nHERE");
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

fn pipe() -> (File, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors, which nobody else has.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (File::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    }
}

fn set_nonblocking(fd: &impl AsRawFd, nonblocking: bool) {
    let flags = if nonblocking { libc::O_NONBLOCK } else { 0 };
    // SAFETY: plain integers.
    assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) }, 0);
}

/// All that the test `name` writes to standard error.
#[track_caller]
fn lines_of(name: &str) -> Vec<String> {
    lines_with(&[], name)
}

/// The same, with environment variables.
#[track_caller]
fn lines_with(variables: &[(&str, &str)], name: &str) -> Vec<String> {
    let (mut log, end) = pipe();
    let process = Process::start_with(variables, name, end);
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        text
    });
    process.finish();
    reader.join().unwrap().lines().map(str::to_owned).collect()
}

fn with<'a>(lines: &'a [String], words: &[&str]) -> Vec<&'a str> {
    let has = |line: &&str| words.iter().all(|word| line.contains(word));
    lines.iter().map(String::as_str).filter(has).collect()
}

/// Creates an engine, or is refused.
fn create(options: &[(&str, &str)]) -> Result<corelane_engine_t, corelane_status> {
    let texts: Vec<_> = options
        .iter()
        .map(|(name, value)| [name, value].map(|text| std::ffi::CString::new(*text).unwrap()))
        .collect();
    let options: Vec<_> = texts
        .iter()
        .map(|[name, value]| corelane_option { name: name.as_ptr(), value: value.as_ptr() })
        .collect();
    let mut engine = 0;
    // SAFETY: all pointers are valid for their lengths.
    let status = unsafe {
        corelane_engine_create(
            c"near".as_ptr(),
            4,
            options.as_ptr(),
            options.len(),
            &raw mut engine,
        )
    };
    if status == corelane_status::CORELANE_OK { Ok(engine) } else { Err(status) }
}

fn destroy(engine: corelane_engine_t) {
    assert_eq!(corelane_engine_destroy(engine), corelane_status::CORELANE_OK);
}

#[test]
fn a_full_standard_error_stops_nobody_and_is_told_how_much_it_missed() {
    if in_child() {
        let engine = create(&[("log_level", "info")]).unwrap();
        for number in 0..50 {
            tracing::warn!(peer = %number, "lost");
        }
        // Complaints take the same way.
        assert_eq!(corelane_connect(7, 0), corelane_status::CORELANE_ERR_INVALID_HANDLE);
        destroy(engine);
        stop_here();
        tracing::warn!("first that is read");
        tracing::warn!("second that is read");
        return;
    }
    let (mut log, mut end) = pipe();
    set_nonblocking(&end, true);
    let mut filler = File::from(end);
    while filler.write(&[b'.'; 4096]).is_ok() {}
    assert_eq!(filler.write(b".").unwrap_err().kind(), ErrorKind::WouldBlock);
    end = filler.into();
    // As standard error usually is: whoever writes waits.
    set_nonblocking(&end, false);
    let name = "a_full_standard_error_stops_nobody_and_is_told_how_much_it_missed";
    let mut process = Process::start(name, end);
    process.wait();
    let mut before = vec![0; 1 << 20];
    let len = log.read(&mut before).unwrap();
    assert!(before[..len].iter().all(|byte| *byte == b'.'), "a line, or part of one");
    process.go_on();
    let mut after = String::new();
    process.finish();
    log.read_to_string(&mut after).unwrap();
    let after: Vec<_> = after.trim_start_matches('.').lines().collect();
    assert_eq!(after.len(), 2, "{after:?}");
    let (_, dropped) = after[0].split_once("WARN  first that is read dropped_lines=").unwrap();
    // `engine started`, 50 and the complaint; others may be added.
    assert!((52..60).contains(&dropped.parse::<u32>().unwrap()), "{dropped}");
    assert!(after[1].ends_with("WARN  second that is read"), "{after:?}");
}

#[test]
fn a_terminal_that_nobody_reads_stops_nobody() {
    if in_child() {
        let engine = create(&[("log_level", "debug")]).unwrap();
        for number in 0..2000 {
            tracing::debug!(number, padding = "x".repeat(number % 500), "perhaps lost");
        }
        destroy(engine);
        stop_here();
        return;
    }
    // SAFETY: plain integers and a buffer of its length; the descriptors are new and ours.
    let (mut log, end) = unsafe {
        let log = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        assert!(log >= 0 && libc::grantpt(log) == 0 && libc::unlockpt(log) == 0);
        let mut name = [0; 64];
        assert_eq!(libc::ptsname_r(log, name.as_mut_ptr(), name.len()), 0);
        let end = libc::open(name.as_ptr(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        assert!(end >= 0);
        (File::from_raw_fd(log), OwnedFd::from_raw_fd(end))
    };
    let mut process = Process::start("a_terminal_that_nobody_reads_stops_nobody", end);
    process.wait();
    let mut first = [0; 200];
    log.read_exact(&mut first).unwrap();
    let first = String::from_utf8_lossy(&first);
    assert!(first.contains(" corelane INFO  engine started"), "{first}");
    process.go_on();
    process.finish();
}

#[test]
fn a_standard_error_without_a_reader_is_no_signal() {
    if in_child() {
        // SAFETY: what a program in C begins with; Rust ignores the signal.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        stop_here();
        destroy(create(&[("log_level", "info")]).unwrap());
        return;
    }
    let (log, end) = pipe();
    let name = "a_standard_error_without_a_reader_is_no_signal";
    let mut process = Process::start(name, end);
    process.wait();
    drop(log);
    process.go_on();
    process.finish();
}

#[test]
fn every_line_is_one_short_write() {
    if in_child() {
        create(&[("log_level", "info"), ("transports", "local,tcp")]).unwrap();
        tracing::warn!(peer = "ß".repeat(10_000), "long");
        tracing::info!(peer = "a\nb", number = 7, "not\nsplit\u{1b}[2J");
        return;
    }
    let (here, there) = UnixDatagram::pair().unwrap();
    here.set_read_timeout(Some(BOUND)).unwrap();
    // A datagram is what one write wrote.
    Process::start("every_line_is_one_short_write", OwnedFd::from(there)).finish();
    let line = || {
        let mut room = vec![0; 1 << 20];
        let len = here.recv(&mut room).unwrap();
        let text = String::from_utf8(room[..len].to_vec()).unwrap();
        assert!(len <= 4000 && text.find('\n') == Some(len - 1), "{text}");
        text
    };
    let started = line();
    assert!(started.contains(" corelane INFO  engine started agent=\"near\" lanes="), "{started}");
    let long = line();
    assert!(long.contains(" corelane WARN  long peer=\"ßßß") && long.ends_with("ß...\n"), "{long}");
    let odd = line();
    let expected = " corelane INFO  not\\nsplit\\u{1b}[2J peer=\"a\\nb\" number=7\n";
    assert!(odd.ends_with(expected), "{odd}");
}

#[test]
fn an_engine_without_rdma_says_why_unless_it_is_not_to_have_any() {
    if in_child() {
        // What is said by default.
        let engines = [(); 2].map(|()| create(&[]).unwrap());
        let other = create(&[("transports", "local,tcp")]).unwrap();
        engines.into_iter().chain([other]).for_each(destroy);
        return;
    }
    // On every machine.
    const NO_LIBRARY: &str = "libnone-of-corelane.so.1";
    let name = "an_engine_without_rdma_says_why_unless_it_is_not_to_have_any";
    let lines = lines_with(&[("CORELANE_LIBIBVERBS", NO_LIBRARY)], name);
    assert_eq!(with(&lines, &[" INFO  engine started"]).len(), 3, "{lines:?}");
    let said = with(&lines, &[" INFO  no RDMA: "]);
    assert_eq!(said.len(), 2, "{lines:?}");
    // Or it was built without.
    let missing = format!("no RDMA: {NO_LIBRARY} not found");
    let why =
        [missing.as_str(), "no RDMA: this corelane was built without it (cargo feature `rdma`)"];
    assert!(said.iter().all(|line| why.iter().any(|why| line.ends_with(why))), "{said:?}");
}

#[test]
fn the_same_complaint_is_written_once_and_others_are_written_too() {
    if in_child() {
        let engine = create(&[("log_level", "warn")]).unwrap();
        for _ in 0..200 {
            assert_eq!(corelane_connect(7, 0), corelane_status::CORELANE_ERR_INVALID_HANDLE);
        }
        assert_eq!(corelane_connect(8, 0), corelane_status::CORELANE_ERR_INVALID_HANDLE);
        assert_eq!(corelane_mr_destroy(7), corelane_status::CORELANE_ERR_INVALID_HANDLE);
        destroy(engine);
        return;
    }
    let lines = lines_of("the_same_complaint_is_written_once_and_others_are_written_too");
    assert_eq!(with(&lines, &["WARN", "0x7", "corelane_connect"]).len(), 1, "{lines:?}");
    assert_eq!(with(&lines, &["WARN", "0x8", "corelane_connect"]).len(), 1, "{lines:?}");
    assert_eq!(with(&lines, &["WARN", "0x7", "corelane_mr_destroy"]).len(), 1, "{lines:?}");
    assert_eq!(with(&lines, &["WARN"]).len(), 3, "{lines:?}");
}

#[test]
fn complaints_that_all_differ_are_bounded_too() {
    if in_child() {
        let engine = create(&[("log_level", "warn")]).unwrap();
        for handle in 1..=10_000 {
            let status = corelane_connect(handle, 0);
            assert_eq!(status, corelane_status::CORELANE_ERR_INVALID_HANDLE);
        }
        destroy(engine);
        return;
    }
    let lines = lines_of("complaints_that_all_differ_are_bounded_too");
    // 20, and what was earned in the time that it took.
    assert!((20..1000).contains(&lines.len()), "{}", lines.len());
}

#[test]
fn a_line_of_the_engine_is_repeated_a_few_times_for_each_peer() {
    if in_child() {
        let engine = create(&[("log_level", "debug")]).unwrap();
        for number in 0..300 {
            let peer = ["a", "b", "c"][number % 3];
            tracing::warn!(peer, number, "cannot connect");
            tracing::info!(peer, number, "disconnected");
            tracing::debug!(peer, "in detail");
            tracing::warn!(number, "of nobody");
        }
        destroy(engine);
        return;
    }
    let lines = lines_of("a_line_of_the_engine_is_repeated_a_few_times_for_each_peer");
    for peer in ["a", "b", "c"] {
        let peer = format!("peer={peer:?}");
        let count = |words: &str| with(&lines, &[&peer, words]).len();
        // More only where the loop took longer than the limit remembers.
        for words in ["cannot connect", "disconnected"] {
            assert!((5..100).contains(&count(words)), "{words}: {lines:?}");
        }
        assert_eq!(count("in detail"), 100, "debug is not limited");
    }
    assert!((5..100).contains(&with(&lines, &["of nobody"]).len()), "{lines:?}");
}

#[test]
fn what_was_suppressed_is_told_by_the_next_line() {
    if in_child() {
        let engine = create(&[("log_level", "info")]).unwrap();
        let warn = |number| tracing::warn!(peer = "a", number, "cannot connect");
        (0..1000).for_each(warn);
        std::thread::sleep(Duration::from_secs(6));
        warn(1000);
        destroy(engine);
        return;
    }
    let lines = lines_of("what_was_suppressed_is_told_by_the_next_line");
    let last = with(&lines, &["number=1000"]);
    let (_, suppressed) = last[0].split_once(" suppressed=").unwrap();
    assert!(suppressed.parse::<u32>().unwrap() > 0, "{lines:?}");
}

#[test]
fn who_asks_for_silence_gets_it_even_when_refused() {
    if in_child() {
        create(&[("log_level", "off"), ("streams", "many")]).unwrap_err();
        return;
    }
    let lines = lines_of("who_asks_for_silence_gets_it_even_when_refused");
    assert_eq!(lines, Vec::<String>::new());
}

#[test]
fn a_refused_engine_leaves_the_level_as_it_is() {
    if in_child() {
        // The first is refused aloud.
        create(&[("streams", "many")]).unwrap_err();
        let quiet = create(&[("log_level", "off")]).unwrap();
        create(&[("streams", "few")]).unwrap_err();
        create(&[("log_level", "info"), ("interface", "no-such-interface")]).unwrap_err();
        tracing::error!("unwanted");
        let chatty = create(&[("log_level", "info")]).unwrap();
        create(&[("streams", "none")]).unwrap_err();
        create(&[("log_level", "off"), ("interface", "no-such-interface")]).unwrap_err();
        tracing::info!("wanted");
        tracing::debug!("unwanted");
        destroy(quiet);
        destroy(chatty);
        return;
    }
    let lines = lines_of("a_refused_engine_leaves_the_level_as_it_is");
    assert_eq!(with(&lines, &["WARN", "`many`"]).len(), 1, "{lines:?}");
    assert_eq!(with(&lines, &["`few`"]), Vec::<&str>::new());
    assert_eq!(with(&lines, &["WARN", "`none`"]).len(), 1, "{lines:?}");
    assert_eq!(with(&lines, &["INFO", "engine started"]).len(), 1, "{lines:?}");
    assert_eq!(with(&lines, &["INFO  wanted"]).len(), 1, "{lines:?}");
    assert_eq!(with(&lines, &["unwanted"]), Vec::<&str>::new());
}
