//! The backend's options: as parameters, as environment variables, and refused when they make no sense.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use corelane_nixl_tests::{Agent, Operation, Settings, backend, params, range, require_nixl};
use corelane_tests::{Buffer, allowed_cores, free_port, listening_ports};

const OPTIONS: [&str; 37] = [
    "lanes",
    "spin_us",
    "assist",
    "transports",
    "strict_writes",
    "ptracer",
    "rdma_devices",
    "rdma_gid_index",
    "rdma_service_level",
    "rdma_traffic_class",
    "rdma_timeout",
    "rdma_retry_count",
    "rdma_bulk_queue_pairs",
    "rdma_stripe_bytes",
    "rdma_relaxed_ordering",
    "rdma_on_demand_paging",
    "gpu_multiprocessors",
    "gpu_copy_engine_bytes",
    "gpu_staging_bytes",
    "gpu_rdma",
    "listen",
    "interface",
    "port_range",
    "advertise",
    "streams",
    "chunk_bytes",
    "latency_bytes",
    "inline_bytes",
    "inline_copy_bytes",
    "liveness_ms",
    "operation_timeout_ms",
    "connect_timeout_ms",
    "reconnect_ms",
    "linger_ms",
    "deregister_timeout_ms",
    "stream_idle_ms",
    "log_level",
];

/// A process with variables of its own, whose logs are kept.
struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start(variables: &[(&str, &str)]) -> Self {
        require_nixl();
        let mut child = Command::new(env!("CARGO_BIN_EXE_corelane-nixl-peer"))
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the process starts");
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, output }
    }

    /// Whether a command succeeds. (It ends of itself: a test that hangs here is ended by its caller.)
    fn does(&mut self, command: &str) -> bool {
        writeln!(self.input, "{command}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the process ended on `{command}`");
        line.starts_with("ok")
    }

    /// What a command that succeeds answers.
    fn answer(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.strip_prefix("ok ").unwrap_or_else(|| panic!("{command}: {line}")).trim().to_owned()
    }

    fn ports(&self) -> Vec<u16> {
        listening_ports(self.child.id())
    }

    /// Ends it; the answer is what it has logged.
    fn log(mut self) -> String {
        let mut log = String::new();
        let _ = writeln!(self.input, "destroy\nexit");
        drop(self.input);
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {log}");
        log
    }
}

/// Whether an agent comes up with these variables and parameters, and what was logged.
fn attempt(variables: &[(&str, &str)], parameters: &str) -> (bool, String) {
    let mut process = Process::start(variables);
    let created = process.does(&format!("agent a {parameters}"));
    if !created {
        // The process is as good as before.
        assert!(process.does("agent b log_level=off port_range=0"), "a good agent after a bad one");
    }
    (created, process.log())
}

#[test]
fn all_options_are_listed_and_their_defaults_are_accepted() {
    let agent = Agent::bare("a", &Settings::default());
    let (mut listed, kinds) = agent.plugin_options();
    let mut names: Vec<&str> = listed.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    let mut expected = OPTIONS;
    expected.sort_unstable();
    assert_eq!(names, expected);
    assert!(kinds.contains(&0), "main memory");
    // The same with every default said aloud.
    listed.sort();
    let settings = Settings { params: listed, ..Settings::default() };
    let (near, far) = (Buffer::new(4096), Buffer::with_pattern(1, 4096));
    let (a, b) = (Agent::with("a", &settings), Agent::with("b", &settings));
    a.register(&near);
    b.register(&far);
    a.exchange_metadata(&b);
    a.transfer(Operation::Read, &[range(&near, 0, 4096)], "b", &[range(&far, 0, 4096)]).unwrap();
    near.assert_pattern(1, 0, 4096, 0);
}

#[test]
fn unknown_options_are_refused_with_the_list_of_valid_ones() {
    let (created, log) = attempt(&[], "liveness=3000");
    assert!(!created, "{log}");
    for name in OPTIONS {
        assert!(log.contains(name), "{name} is not in: {log}");
    }
}

#[test]
fn malformed_values_are_refused_by_name() {
    let bad = [
        ("lanes", "x"),
        ("lanes", "99999"),
        ("lanes", "2-1"),
        ("lanes", "auto:0"),
        ("spin_us", "fast"),
        ("spin_us", "-1"),
        ("assist", "perhaps"),
        ("transports", "tcp,carrier-pigeon"),
        ("transports", ","),
        ("strict_writes", "yes"),
        ("ptracer", "all"),
        ("listen", "localhost.invalid"),
        ("listen", "1.2.3.4.5"),
        ("interface", "no-such-interface0"),
        ("port_range", "70000"),
        ("port_range", "2000-1000"),
        ("advertise", "1.2.3.4"),
        ("streams", "0"),
        ("chunk_bytes", "12Q"),
        ("chunk_bytes", "0"),
        ("latency_bytes", "18446744073709551616"),
        ("inline_bytes", "1.5K"),
        ("inline_copy_bytes", "1MB"),
        ("liveness_ms", "soon"),
        ("liveness_ms", "0"),
        ("operation_timeout_ms", "0"),
        ("connect_timeout_ms", "-5"),
        ("reconnect_ms", "99999999999999999999"),
        ("log_level", "loud"),
    ];
    let mut wrong = Vec::new();
    for (name, value) in bad {
        let variable = format!("CORELANE_{}", name.to_uppercase());
        let (created, log) = attempt(&[], &format!("{name}={value}"));
        let mut process = Process::start(&[(&variable, value)]);
        let created_by_environment = process.does("agent a");
        let other_log = process.log();
        // A core is named as that of a lane.
        let word = name.trim_end_matches('s');
        if created || created_by_environment {
            wrong.push(format!("{name}={value} was accepted"));
        } else if !log.contains(word)
            || !(other_log.contains(word) || other_log.contains(&variable))
        {
            wrong.push(format!("{name}={value} is not named: {log} {other_log}"));
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn a_refused_access_is_logged_once_with_its_reason() {
    let mut far = Process::start(&[("CORELANE_LOG_LEVEL", "warn")]);
    let mut near = Process::start(&[("CORELANE_LOG_LEVEL", "warn")]);
    assert!(far.does("agent far") && near.does("agent near"));
    let address = far.answer("region r 4096");
    assert!(near.does("region r 4096"));
    let metadata = far.answer("metadata");
    assert!(near.does(&format!("load {metadata}")) && far.does("deregister r"));
    assert!(!near.does(&format!("read far r 0 {address} 4096")));
    let log = near.log();
    let ours: Vec<&str> = log.lines().filter(|line| line.contains(" corelane ")).collect();
    assert!(ours.len() == 1 && ours[0].contains("far") && ours[0].contains("key"), "{ours:#?}");
}

#[test]
fn a_value_that_is_refused_comes_with_those_that_are_valid() {
    let (created, log) = attempt(&[], "transports=tcp,carrier-pigeon");
    assert!(!created);
    for name in ["local", "rdma", "tcp", "carrier-pigeon"] {
        assert!(log.contains(name), "{name} is not in: {log}");
    }
    let (created, log) = attempt(&[], "log_level=loud");
    assert!(!created);
    for name in ["off", "error", "warn", "info", "debug", "trace"] {
        assert!(log.contains(name), "{name} is not in: {log}");
    }
}

#[test]
fn good_values_are_accepted() {
    let core = allowed_cores()[0];
    let good = [
        format!("lanes={core}"),
        "lanes=auto:1".into(),
        "lanes=unpinned".into(),
        "lanes=unpinned:2 spin_us=0".into(),
        "assist=never".into(),
        "assist=always".into(),
        "transports=tcp".into(),
        "transports=local,rdma,tcp".into(),
        "listen=127.0.0.1".into(),
        "interface=lo".into(),
        "streams=2 chunk_bytes=256K latency_bytes=64k inline_bytes=0".into(),
        "liveness_ms=50 operation_timeout_ms=1000 connect_timeout_ms=500 reconnect_ms=100 linger_ms=0".into(),
        "deregister_timeout_ms=1000 stream_idle_ms=100 log_level=trace".into(),
    ];
    for parameters in good {
        let list: Vec<(&str, &str)> =
            parameters.split_whitespace().filter_map(|word| word.split_once('=')).collect();
        let settings = params(&list);
        let (near, far) = (Buffer::new(1 << 20), Buffer::with_pattern(1, 1 << 20));
        let (a, b) = (Agent::with("a", &settings), Agent::with("b", &settings));
        a.register(&near);
        b.register(&far);
        a.exchange_metadata(&b);
        let whole = |buffer| [range(buffer, 0, 1 << 20)];
        let moved = a.transfer(Operation::Read, &whole(&near), "b", &whole(&far));
        assert_eq!(moved, Ok(()), "{parameters}");
        near.assert_pattern(1, 0, 1 << 20, 0);
    }
}

#[test]
fn the_environment_sets_options_and_a_parameter_wins() {
    let (first, second) = (free_port(), free_port());
    let from_environment = first.to_string();
    let mut process = Process::start(&[("CORELANE_PORT_RANGE", &from_environment)]);
    assert!(process.does("agent a"));
    assert!(process.ports().contains(&first), "{:?}", process.ports());
    assert!(process.does("destroy"));
    assert!(process.does(&format!("agent a port_range={second}")));
    let ports = process.ports();
    assert!(ports.contains(&second) && !ports.contains(&first), "{ports:?}");
    assert!(process.does("destroy"));
    // An empty parameter says nothing.
    assert!(process.does("agent a port_range="));
    assert!(process.ports().contains(&first), "{:?}", process.ports());
}

#[test]
fn one_line_says_how_the_engine_runs_and_one_says_how_it_is_connected() {
    let mut far = Process::start(&[]);
    assert!(far.does("agent far log_level=off listen=127.0.0.1"));
    let address = far.answer("region r 64");
    let metadata = far.answer("metadata");
    for transport in ["local", "tcp"] {
        let mut process = Process::start(&[]);
        assert!(process.does(&format!("agent a log_level=info transports={transport}")));
        assert!(process.does(&format!("load {metadata}")));
        assert!(process.does("region r 64"));
        // By then it is known which way the bytes go.
        assert!(process.does(&format!("read far r 0 {address} 64")));
        let log = process.log();
        let ours: Vec<&str> = log.lines().filter(|line| line.contains(" corelane ")).collect();
        let says = |words: &[&str]| {
            ours.iter().filter(|line| words.iter().all(|word| line.contains(word))).count()
        };
        assert!(
            says(&["lane", "core", transport]) >= 1,
            "no line on lanes, cores, transports: {log}"
        );
        assert!(says(&["far", transport]) >= 1, "no line on the connection: {log}");
    }
}

#[test]
fn it_can_be_silent() {
    let (created, log) = attempt(&[("CORELANE_LOG_LEVEL", "off")], "");
    assert!(created);
    let ours: Vec<&str> = log.lines().filter(|line| line.contains(" corelane ")).collect();
    assert_eq!(ours, Vec::<&str>::new());
}

#[test]
fn an_orderly_life_logs_no_warning() {
    let mut far = Process::start(&[("CORELANE_LOG_LEVEL", "warn")]);
    let mut near = Process::start(&[("CORELANE_LOG_LEVEL", "warn")]);
    assert!(far.does("agent far"));
    assert!(near.does("agent near"));
    let address = far.answer("region r 65536");
    assert!(near.does("region r 65536"));
    let metadata = far.answer("metadata");
    assert!(near.does(&format!("load {metadata}")));
    assert!(near.does(&format!("read far r 0 {address} 65536 00")));
    assert!(near.does("notify near 01"));
    assert!(far.does("take 1"));
    assert!(near.does("take 1"));
    for (name, process) in [("near", near), ("far", far)] {
        let log = process.log();
        let ours: Vec<&str> = log.lines().filter(|line| line.contains(" corelane ")).collect();
        assert_eq!(ours, Vec::<&str>::new(), "{name}");
    }
}

#[test]
fn nixl_lists_the_backend_beside_its_own() {
    let agent = nixl_sys::Agent::new("a").unwrap();
    let plugins = agent.get_available_plugins().unwrap();
    let names: Vec<String> = plugins.iter().map(|name| name.unwrap().to_owned()).collect();
    assert!(names.contains(&backend()), "{names:?}");
    assert!(names.iter().any(|name| name == "UCX"), "UCX stays visible: {names:?}");
}
