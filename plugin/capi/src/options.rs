//! Options as text: of a call, else of the environment (`CORELANE_<OPTION>`), else the default.

use std::ffi::{CString, c_char};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::LazyLock;
use std::time::Duration;

use corelane::{AssistMode, EngineConfig, GpuRdma, LaneSpec, Spin, TransportKind};
use tracing::level_filters::LevelFilter;

use crate::raw;
use crate::status::{Failure, corelane_status, run};

/// One option and its value, as `corelane_engine_create` takes them.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct corelane_option {
    /// Name, as `corelane_option_at` lists them.
    pub name: *const c_char,
    /// Value; an empty one stands for the environment's or the default.
    pub value: *const c_char,
}

/// What is to be known of an option. All strings live as long as the process.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct corelane_option_info {
    /// Name; the environment variable is `CORELANE_` and the name in capitals.
    pub name: *const c_char,
    /// Value that is in effect where none is given.
    pub default_value: *const c_char,
    /// What it means, its unit and the values that it takes.
    pub description: *const c_char,
}

/// All that options say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) config: EngineConfig,
    pub(crate) log_level: LevelFilter,
}

type Apply = fn(&mut Settings, &str) -> Result<(), String>;

/// Text is kept with its final zero byte, for C.
struct Spec {
    name: &'static str,
    default: &'static str,
    description: &'static str,
    apply: Apply,
}

/// Text without its final zero byte.
fn bare(text: &'static str) -> &'static str {
    text.strip_suffix('\0').unwrap_or(text)
}

impl Spec {
    fn name(&self) -> &'static str {
        bare(self.name)
    }

    fn default(&self) -> &'static str {
        bare(self.default)
    }

    fn variable(&self) -> String {
        format!("CORELANE_{}", self.name().to_ascii_uppercase())
    }
}

macro_rules! options {
    ($($name:literal = $default:literal, $description:literal, $apply:expr;)*) => {
        static OPTIONS: &[Spec] = &[$(Spec {
            name: concat!($name, "\0"),
            default: concat!($default, "\0"),
            description: concat!($description, "\0"),
            apply: $apply,
        },)*];
    };
}

options! {
    "lanes" = "auto",
        "cores of the lanes: auto, auto:N, unpinned, unpinned:N, or a list of cores such as 2,4-6",
        |s, v| { s.config.lanes = lanes(v)?; Ok(()) };
    "spin_us" = "50",
        "microseconds that an idle lane polls before it sleeps; inf: for ever (dedicated cores only)",
        |s, v| { s.config.spin = spin(v)?; Ok(()) };
    "assist" = "auto",
        "whether waiting callers drive a lane themselves: auto (where cores are few), always, never",
        |s, v| { s.config.assist = assist(v)?; Ok(()) };
    "transports" = "local,rdma,tcp",
        "comma list out of local,rdma,tcp: what may be used, to each peer the best that works; \
         this version has local and tcp",
        |s, v| { s.config.transports = transports(v)?; Ok(()) };
    "strict_writes" = "false",
        "true: over local, write only by ways that cannot reach another process which was given the \
         process ID of a peer that has just ended, at half the speed from 64 KiB on; false",
        |s, v| { s.config.strict_writes = switch(v)?; Ok(()) };
    "ptracer" = "unchanged",
        "any: let every process of this user reach into this one, which local needs on both sides \
         where kernel.yama.ptrace_scope is 1, for the whole process and its life; unchanged",
        |s, v| { s.config.any_tracer = any_tracer(v)?; Ok(()) };
    "rdma_devices" = "",
        "comma list of RDMA devices and ports such as mlx5_0:1, the first for small transfers; empty: those \
         near the lanes",
        |s, v| { s.config.rdma.devices = names(v)?; Ok(()) };
    "rdma_gid_index" = "auto",
        "index of the GID; auto: RoCE v2 with an IPv4 address where there is one",
        |s, v| { s.config.rdma.gid_index = gid_index(v)?; Ok(()) };
    "rdma_service_level" = "0",
        "service level of RDMA packets, 0 to 15",
        |s, v| { s.config.rdma.service_level = within(v, 0, 15)?; Ok(()) };
    "rdma_traffic_class" = "0",
        "traffic class of RDMA packets, 0 to 255; RoCE v2: the DSCP is its upper six bits",
        |s, v| { s.config.rdma.traffic_class = within(v, 0, 255)?; Ok(()) };
    "rdma_timeout" = "14",
        "RDMA packets are sent again after 4.096 us times two to the power of this, 1 to 31",
        |s, v| { s.config.rdma.timeout = within(v, 1, 31)?; Ok(()) };
    "rdma_retry_count" = "6",
        "how often RDMA packets are sent again before the way counts as broken, 0 to 6",
        |s, v| { s.config.rdma.retry_count = within(v, 0, 6)?; Ok(()) };
    "rdma_bulk_queue_pairs" = "1",
        "queue pairs for large transfers to one peer on each device, 1 to 16",
        |s, v| { s.config.rdma.bulk_queue_pairs = within(v, 1, 16)?.into(); Ok(()) };
    "rdma_stripe_bytes" = "1M",
        "bytes of one request of a transfer that several devices share, 4K to 1G",
        |s, v| { s.config.rdma.stripe_bytes = bytes_within(v, 4 << 10, 1 << 30)?; Ok(()) };
    "rdma_relaxed_ordering" = "true",
        "true: devices may write payload out of order; false",
        |s, v| { s.config.rdma.relaxed_ordering = switch(v)?; Ok(()) };
    "rdma_on_demand_paging" = "false",
        "true: register memory for RDMA without pinning it, where the device can; false",
        |s, v| { s.config.rdma.on_demand_paging = switch(v)?; Ok(()) };
    "gpu_multiprocessors" = "16",
        "multiprocessors of a GPU that a copy takes part of at most, 1 to 1024",
        |s, v| { s.config.gpu.multiprocessors = multiprocessors(v)?; Ok(()) };
    "gpu_copy_engine_bytes" = "4M",
        "contiguous ranges of GPU memory of at least so many bytes go by the copy engine, 64K to 1024G",
        |s, v| { s.config.gpu.copy_engine_bytes = bytes_within(v, 64 << 10, 1 << 40)?; Ok(()) };
    "gpu_staging_bytes" = "32M",
        "pinned host memory of each lane for GPU memory that goes over sockets, 8M to 1G",
        |s, v| { s.config.gpu.staging_bytes = bytes_within(v, 8 << 20, 1 << 30)?; Ok(()) };
    "gpu_rdma" = "auto",
        "how RDMA devices get at GPU memory: auto (dmabuf, else peermem, else through pinned host memory and \
         sockets), dmabuf or peermem (only that: registering fails where it does), off",
        |s, v| { s.config.gpu.rdma = gpu_rdma(v)?; Ok(()) };
    "listen" = "",
        "comma list of IP addresses to listen on; empty: all",
        |s, v| { s.config.listen.addresses = list(v, "an IP address")?; Ok(()) };
    "interface" = "",
        "network interface to listen on and to advertise; empty: all",
        |s, v| { s.config.listen.interface = (!v.is_empty()).then(|| v.to_owned()); Ok(()) };
    "port_range" = "0",
        "ports to try in order, such as 18500-18599; 0: any",
        |s, v| { s.config.listen.ports = ports(v)?; Ok(()) };
    "advertise" = "",
        "comma list of ADDRESS:PORT to tell peers instead (NAT, Kubernetes); port 0: the one bound",
        |s, v| { s.config.listen.advertise = list::<SocketAddr>(v, "ADDRESS:PORT")?; Ok(()) };
    "streams" = "2",
        "TCP streams for the bulk transfers to one peer, 1 to 64",
        |s, v| { s.config.streams = streams(v)?; Ok(()) };
    "chunk_bytes" = "256K",
        "bytes of one request of a bulk transfer, 4K to 16M",
        |s, v| { s.config.chunk_bytes = bytes_within(v, 4 << 10, 16 << 20)?; Ok(()) };
    "latency_bytes" = "64K",
        "transfers of at most so many bytes go ahead of bulk",
        |s, v| { s.config.latency_bytes = bytes(v)?; Ok(()) };
    "inline_bytes" = "64K",
        "transfers of at most so many bytes are started by the thread that posts them; 0: never",
        |s, v| { s.config.inline_bytes = bytes(v)?; Ok(()) };
    "inline_copy_bytes" = "1M",
        "transfers on one host of at most so many bytes are copied by the thread that posts them; 0: never",
        |s, v| { s.config.inline_copy_bytes = bytes(v)?; Ok(()) };
    "liveness_ms" = "3000",
        "milliseconds of silence after which a peer is dead, at least 50; the smaller of both sides counts",
        |s, v| { s.config.liveness = milliseconds(v, 50)?; Ok(()) };
    "operation_timeout_ms" = "30000",
        "milliseconds after which a transfer fails",
        |s, v| { s.config.operation_timeout = milliseconds(v, 1)?; Ok(()) };
    "connect_timeout_ms" = "3000",
        "milliseconds for connecting and its handshake",
        |s, v| { s.config.connect_timeout = milliseconds(v, 1)?; Ok(()) };
    "reconnect_ms" = "1000",
        "milliseconds for connecting again after a connection was lost",
        |s, v| { s.config.reconnect_timeout = milliseconds(v, 1)?; Ok(()) };
    "linger_ms" = "1000",
        "milliseconds that disconnecting waits for notifications to be acknowledged",
        |s, v| { s.config.linger = milliseconds(v, 0)?; Ok(()) };
    "deregister_timeout_ms" = "5000",
        "milliseconds that deregistering waits for accesses in progress",
        |s, v| { s.config.deregister_timeout = milliseconds(v, 0)?; Ok(()) };
    "stream_idle_ms" = "10000",
        "milliseconds after which an idle bulk stream is closed",
        |s, v| { s.config.stream_idle = milliseconds(v, 0)?; Ok(()) };
    "log_level" = "info",
        "off, error, warn, info, debug or trace; on standard error, for the whole process",
        |s, v| { s.log_level = level(v)?; Ok(()) };
}

fn within(text: &str, least: u8, most: u8) -> Result<u8, String> {
    match number(text) {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(format!("a number from {least} to {most} is needed")),
    }
}

fn multiprocessors(text: &str) -> Result<u32, String> {
    match number(text) {
        Ok(number) if (1..=1024).contains(&number) => Ok(number),
        _ => Err("a number from 1 to 1024 is needed".into()),
    }
}

fn gid_index(text: &str) -> Result<Option<u8>, String> {
    if text == "auto" {
        return Ok(None);
    }
    number(text).map(Some).map_err(|_| "auto or a number from 0 to 255 is needed".to_owned())
}

fn names(text: &str) -> Result<Vec<String>, String> {
    list(text, "a device such as mlx5_0:1")
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "a number is needed".to_owned())
}

/// A day.
const LONGEST_MS: u64 = 86_400_000;

fn milliseconds(text: &str, least: u64) -> Result<Duration, String> {
    match number(text) {
        Ok(number) if (least..=LONGEST_MS).contains(&number) => Ok(Duration::from_millis(number)),
        _ => Err(format!("a number of milliseconds from {least} to {LONGEST_MS} is needed")),
    }
}

fn bytes_within(text: &str, least: usize, most: usize) -> Result<usize, String> {
    match bytes(text)? {
        bytes if (least..=most).contains(&bytes) => Ok(bytes),
        _ => Err(format!("{least} to {most} bytes are possible")),
    }
}

fn streams(text: &str) -> Result<usize, String> {
    match number(text) {
        Ok(streams @ 1..=64) => Ok(streams),
        _ => Err("a number from 1 to 64 is needed".into()),
    }
}

fn bytes(text: &str) -> Result<usize, String> {
    let wrong = || "a number of bytes is needed, such as 65536, 64K, 1M or 1G".to_owned();
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: usize = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

fn list<T: std::str::FromStr>(text: &str, what: &str) -> Result<Vec<T>, String> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(|item| item.parse().map_err(|_| format!("`{item}` is not {what}")))
        .collect()
}

fn lanes(text: &str) -> Result<LaneSpec, String> {
    const WRONG: &str = "auto, auto:N, unpinned, unpinned:N (N from 1 to 256) or a list of \
                         different cores such as 2,4-6 is needed";
    let number = |text: &str| text.parse::<usize>().map_err(|_| WRONG.to_owned());
    let count = |text: &str| {
        number(text).and_then(|n| match n {
            1..=256 => Ok(n),
            _ => Err(WRONG.to_owned()),
        })
    };
    match text.split_once(':').unwrap_or((text, "1")) {
        ("auto", n) => return Ok(LaneSpec::Auto { count: count(n)? }),
        ("unpinned", n) => return Ok(LaneSpec::Unpinned { count: count(n)? }),
        _ => {}
    }
    let mut cores = Vec::new();
    for item in text.split(',').map(str::trim) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last - first >= 256 {
            return Err(WRONG.into());
        }
        for core in first..=last {
            if cores.contains(&core) || cores.len() == 256 {
                return Err(WRONG.into());
            }
            cores.push(core);
        }
    }
    Ok(LaneSpec::Cores(cores))
}

fn spin(text: &str) -> Result<Spin, String> {
    if text == "inf" {
        return Ok(Spin::Forever);
    }
    let micros = number(text).map_err(|_| "a number of microseconds or inf is needed")?;
    Ok(Spin::For(Duration::from_micros(micros)))
}

fn assist(text: &str) -> Result<AssistMode, String> {
    match text {
        "auto" => Ok(AssistMode::Auto),
        "always" => Ok(AssistMode::Always),
        "never" => Ok(AssistMode::Never),
        _ => Err("auto, always or never is needed".into()),
    }
}

fn gpu_rdma(text: &str) -> Result<GpuRdma, String> {
    text.parse().map_err(|_| "auto, dmabuf, peermem or off is needed".into())
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("true or false is needed".into()),
    }
}

fn any_tracer(text: &str) -> Result<bool, String> {
    match text {
        "any" => Ok(true),
        "unchanged" => Ok(false),
        _ => Err("any or unchanged is needed".into()),
    }
}

/// The transports that are asked for. Where there is no RDMA device, the engine goes without that one.
fn transports(text: &str) -> Result<Vec<TransportKind>, String> {
    let names: Vec<&str> = text.split(',').map(str::trim).collect();
    let mut kinds = Vec::new();
    for (index, name) in names.iter().enumerate() {
        if names[..index].contains(name) {
            return Err(format!("{name} is named twice"));
        }
        match name.parse() {
            Ok(kind) => kinds.push(kind),
            Err(_) => return Err("a comma list out of local,rdma,tcp is needed".into()),
        }
    }
    Ok(kinds)
}

fn ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| {
        text.trim().parse::<u16>().map_err(|_| "a port or a range such as 18500-18599 is needed")
    };
    let range = port(first)?..=port(last)?;
    if range.is_empty() {
        return Err("the range is empty".into());
    }
    Ok(range)
}

fn level(text: &str) -> Result<LevelFilter, String> {
    Ok(match text {
        "off" => LevelFilter::OFF,
        "error" => LevelFilter::ERROR,
        "warn" => LevelFilter::WARN,
        "info" => LevelFilter::INFO,
        "debug" => LevelFilter::DEBUG,
        "trace" => LevelFilter::TRACE,
        _ => return Err("off, error, warn, info, debug or trace is needed".into()),
    })
}

/// Where a value comes from.
enum Source {
    Call,
    Environment,
    /// Both say the same.
    Either,
    Default,
}

impl Source {
    fn of(&self, spec: &Spec) -> String {
        let (name, variable) = (spec.name(), spec.variable());
        match self {
            Self::Call => format!("option `{name}`"),
            Self::Environment => format!("environment variable {variable}"),
            Self::Either => format!("option `{name}`, or environment variable {variable},"),
            Self::Default => format!("default of `{name}`"),
        }
    }
}

/// Settings, and every option with the value that is in effect.
pub(crate) struct Resolved {
    pub(crate) settings: Settings,
    pub(crate) values: Vec<(&'static str, String)>,
}

/// Puts together what the call says, what `environment` says, and the defaults.
pub(crate) fn resolve(
    given: &[(&str, &str)],
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Resolved, Failure> {
    for (name, _) in given {
        if !OPTIONS.iter().any(|spec| spec.name() == *name) {
            return Err(config(format!(
                "unknown option `{name}`; the options are {}",
                all_names()
            )));
        }
    }
    let mut settings = Settings { config: EngineConfig::default(), log_level: LevelFilter::INFO };
    let mut values = Vec::with_capacity(OPTIONS.len());
    for spec in OPTIONS {
        let explicit = given
            .iter()
            .rev()
            .find(|(name, value)| *name == spec.name() && !value.trim().is_empty());
        let environment = environment(&spec.variable()).filter(|value| !value.trim().is_empty());
        let (value, source) = match (explicit, &environment) {
            // Some callers pass on what `corelane_option_at` told them of the environment.
            (Some((_, value)), Some(same)) if same.trim() == value.trim() => {
                (*value, Source::Either)
            }
            (Some((_, value)), _) => (*value, Source::Call),
            (None, Some(value)) => (value.as_str(), Source::Environment),
            (None, None) => (spec.default(), Source::Default),
        };
        let value = value.trim().to_owned();
        (spec.apply)(&mut settings, &value)
            .map_err(|why| config(format!("{} is `{value}`: {why}", source.of(spec))))?;
        values.push((spec.name(), value));
    }
    Ok(Resolved { settings, values })
}

/// The level of the log, if that at least can be understood.
pub(crate) fn level_of(
    given: &[(&str, &str)],
    environment: impl Fn(&str) -> Option<String>,
) -> Option<LevelFilter> {
    let given: Vec<_> = given.iter().copied().filter(|(name, _)| *name == "log_level").collect();
    let environment = |name: &str| environment(name).filter(|_| name == "CORELANE_LOG_LEVEL");
    Some(resolve(&given, environment).ok()?.settings.log_level)
}

fn config(message: String) -> Failure {
    Failure::new(corelane_status::CORELANE_ERR_CONFIG, message)
}

fn all_names() -> String {
    let names: Vec<&str> = OPTIONS.iter().map(Spec::name).collect();
    names.join(", ")
}

/// Variables of the environment that begin like options and are none, perhaps mistyped.
pub(crate) fn strange_variables(
    names: impl Iterator<Item = String>,
) -> impl Iterator<Item = String> {
    // Those of the scripts and tests of this repository.
    const OTHERS: [&str; 4] = ["NO_INSTALL", "PLUGIN", "TEST_", "UPDATE_"];
    names.filter(|name| {
        name.strip_prefix("CORELANE_").is_some_and(|rest| {
            !OPTIONS.iter().any(|spec| spec.name().eq_ignore_ascii_case(rest))
                && !OTHERS.iter().any(|other| rest.starts_with(other))
        })
    })
}

/// How many options there are.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_option_count() -> usize {
    OPTIONS.len()
}

/// Describes option `index`, below `corelane_option_count()`. The default is the one in effect
/// without an explicit value: the environment's where the environment had one when this was first
/// called, as it is, even if no engine can be made with it.
///
/// Any thread. Errors: `CORELANE_ERR_NOT_FOUND` beyond the last option;
/// `CORELANE_ERR_INVALID_ARGUMENT` without a place for the answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_option_at(
    index: usize,
    info: *mut corelane_option_info,
) -> corelane_status {
    // The environment is read once, so that the strings can live as long as the process.
    static EFFECTIVE: LazyLock<Vec<CString>> = LazyLock::new(|| {
        OPTIONS
            .iter()
            .map(|spec| {
                std::env::var(spec.variable())
                    .ok()
                    .and_then(|value| CString::new(value.trim()).ok())
                    .filter(|value| !value.is_empty())
                    .unwrap_or_else(|| CString::new(spec.default()).unwrap_or_default())
            })
            .collect()
    });
    run("corelane_option_at", || {
        let missing = || {
            Failure::new(
                corelane_status::CORELANE_ERR_NOT_FOUND,
                format!("there is no option {index}; there are {}", OPTIONS.len()),
            )
        };
        let spec = OPTIONS.get(index).ok_or_else(missing)?;
        let value = corelane_option_info {
            name: spec.name.as_ptr().cast(),
            default_value: EFFECTIVE[index].as_ptr(),
            description: spec.description.as_ptr().cast(),
        };
        // SAFETY: the caller's promise.
        unsafe { raw::store(info, value, "info") }
    })
}

#[cfg(test)]
#[path = "options_tests.rs"]
mod tests;
