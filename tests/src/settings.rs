//! Configurations of engines.

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use corelane::{AssistMode, Engine, EngineConfig, Error, LaneSpec, Spin, TransportKind};

/// The defaults, listening on the loopback address only. Who says goodbye to a living peer is not hurried: on a slow machine
/// the first connection alone can take longer than lingering does.
pub fn local_config() -> EngineConfig {
    let mut config = EngineConfig::default();
    config.linger = Duration::from_secs(20);
    config.listen.addresses = vec![Ipv4Addr::LOCALHOST.into()];
    config
}

/// As `local_config`, for engines that do without `local`: what goes over a network, on one host.
pub fn tcp_config() -> EngineConfig {
    let mut config = local_config();
    config.transports = vec![TransportKind::Tcp];
    config
}

/// As `local_config`, for engines that reach each other by RDMA only.
pub fn rdma_config() -> EngineConfig {
    let mut config = local_config();
    config.transports = vec![TransportKind::Rdma];
    config
}

/// How an engine of a test begins: `local_config`, `rdma_config` or `tcp_config`.
pub type Configuration = fn() -> EngineConfig;

/// Whether a peer that stands still holds transfers up: not where this side copies by itself, or devices do.
pub fn needs_the_peer(config: &EngineConfig) -> bool {
    config.transports == [TransportKind::Tcp]
}

/// An engine whose port is known: one that was free a moment ago.
pub fn engine_on_a_known_port(name: &str, mut config: EngineConfig) -> (Engine, u16) {
    for _ in 0..100 {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = free.local_addr().expect("its address").port();
        drop(free);
        config.listen.ports = port..=port;
        match Engine::new(name, config.clone()) {
            Ok(engine) => return (engine, port),
            // Somebody else was faster.
            Err(Error::Io { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    panic!("no port stays free");
}

/// Applies settings such as `port=4711 liveness_ms=500`.
pub fn apply(config: &mut EngineConfig, settings: &str) -> Result<(), String> {
    for setting in settings.split_whitespace() {
        let (key, value) = setting.split_once('=').ok_or(format!("`{setting}` has no value"))?;
        set(config, key, value).ok_or(format!("`{setting}` cannot be used"))?;
    }
    Ok(())
}

fn set(config: &mut EngineConfig, key: &str, value: &str) -> Option<()> {
    let limits = &mut config.limits;
    let number = || value.parse::<usize>().ok();
    let millis = || value.parse().ok().map(Duration::from_millis);
    match key {
        "streams" => config.streams = number()?,
        "chunk_bytes" => config.chunk_bytes = number()?,
        "latency_bytes" => config.latency_bytes = number()?,
        "inline_bytes" => config.inline_bytes = number()?,
        "inline_copy_bytes" => config.inline_copy_bytes = number()?,
        "strict_writes" => config.strict_writes = value.parse().ok()?,
        "liveness_ms" => config.liveness = millis()?,
        "operation_ms" => config.operation_timeout = millis()?,
        "connect_ms" => config.connect_timeout = millis()?,
        "reconnect_ms" => config.reconnect_timeout = millis()?,
        "linger_ms" => config.linger = millis()?,
        "deregister_ms" => config.deregister_timeout = millis()?,
        "stream_idle_ms" => config.stream_idle = millis()?,
        "half_open" => limits.half_open = number()?,
        "transfers" => limits.transfers = number()?,
        "pending" => limits.pending_notifications = number()?,
        "pending_bytes" => limits.pending_notification_bytes = number()?,
        "unacknowledged" => limits.unacknowledged_notifications = number()?,
        "unacknowledged_bytes" => limits.unacknowledged_bytes = number()?,
        "port" => {
            let port = value.parse().ok()?;
            config.listen.ports = port..=port;
        }
        "listen" => config.listen.addresses = vec![value.parse().ok()?],
        "rdma_devices" => config.rdma.devices = value.split(',').map(str::to_owned).collect(),
        "rdma_timeout" => config.rdma.timeout = value.parse().ok()?,
        "rdma_bulk_queue_pairs" => config.rdma.bulk_queue_pairs = number()?,
        "rdma_stripe_bytes" => config.rdma.stripe_bytes = number()?,
        "gpu_rdma" => config.gpu.rdma = value.parse().ok()?,
        "core" => config.lanes = LaneSpec::Cores(vec![number()?]),
        "transports" => {
            let kind = |name: &str| name.parse().ok();
            config.transports = value.split(',').map(kind).collect::<Option<_>>()?;
        }
        "unpinned" => config.lanes = LaneSpec::Unpinned { count: number()? },
        "spin" => {
            config.spin = match value {
                "forever" => Spin::Forever,
                micros => Spin::For(Duration::from_micros(micros.parse().ok()?)),
            }
        }
        "assist" => {
            config.assist = match value {
                "never" => AssistMode::Never,
                "always" => AssistMode::Always,
                _ => return None,
            }
        }
        _ => return None,
    }
    Some(())
}
