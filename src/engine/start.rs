//! Starting an engine.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use corelane_runtime::{Lane, LaneConfig, placement};

use super::shared::{FORKS, RUNNING};
use super::{EngineShared, LaneDriver};
use crate::config::{EngineConfig, LaneSpec, TransportKind};
use crate::error::{Error, Result};
use crate::memory::Registry;
use crate::notification::NotificationQueue;
use crate::peer::{Arrivals, PeerTable};
use crate::session::handshake::Identity;
use crate::stats::{Counters, InlineCounters};
use crate::sys;
use crate::transport::addresses;
use crate::transport::local::{Accessors, Table};
use crate::transport::rdma::Rails;
use crate::wire::Metadata;

/// The core of one lane, and the lock that keeps other engines off it.
struct Place {
    core: Option<usize>,
    claim: Option<placement::CoreClaim>,
}

/// Where the lanes go. Cores that were asked for are taken even if another engine has claimed them; those that are chosen are near
/// the first RDMA device, if there is one.
fn places(spec: &LaneSpec, rails: &Rails) -> Vec<Place> {
    let free = |core: Option<usize>| Place { core, claim: None };
    match spec {
        LaneSpec::Unpinned { count } => (0..*count).map(|_| free(None)).collect(),
        LaneSpec::Cores(cores) => cores
            .iter()
            .map(|&core| Place {
                core: Some(core),
                claim: placement::claim_core(core).ok().flatten(),
            })
            .collect(),
        LaneSpec::Auto { count } => {
            let near = rails.first_node().and_then(placement::cores_of_numa_node);
            let claim = || match &near {
                Some(near) => placement::auto_core_near(near),
                None => placement::auto_core(),
            };
            (0..*count)
                .map(|_| match claim().ok().flatten() {
                    Some(claim) => Place { core: Some(claim.core()), claim: Some(claim) },
                    None => free(None),
                })
                .collect()
        }
    }
}

/// The RDMA devices, where they are allowed. That there are none is an error only where they were asked for by name, or
/// nothing else is allowed.
fn open_rails(config: &EngineConfig) -> Result<Rails> {
    if !config.transports.contains(&TransportKind::Rdma) {
        return Ok(Rails::default());
    }
    let node = match &config.lanes {
        LaneSpec::Cores(cores) => cores.first().copied().and_then(crate::transport::local::node_of),
        LaneSpec::Auto { .. } | LaneSpec::Unpinned { .. } => None,
    };
    match Rails::open(&config.rdma, node) {
        Ok(rails) => Ok(rails),
        Err(reason) if !config.rdma.devices.is_empty() => {
            Err(Error::Config(format!("rdma_devices={}: {reason}", config.rdma.devices.join(","))))
        }
        Err(reason) if config.transports == [TransportKind::Rdma] => Err(Error::Config(format!(
            "transports=rdma allows nothing else, and there is no RDMA: {reason}; add local, tcp or both"
        ))),
        Err(reason) => {
            // Whoever has devices in the machine and meets TCP finds here why.
            tracing::info!("no RDMA: {reason}");
            Ok(Rails::default())
        }
    }
}

pub(super) fn start(agent_name: &str, config: EngineConfig) -> Result<Arc<EngineShared>> {
    let random = |what| move |e| Error::io(format!("reading random bytes for {what}"), e);
    let incarnation = u128::from_le_bytes(sys::random().map_err(random("the incarnation"))?).max(1);
    let secret = sys::random().map_err(random("the secret"))?;
    let mut transports =
        config.transports.iter().fold(0, |bits, kind: &TransportKind| bits | kind.bit());
    let rails = open_rails(&config)?;
    if rails.is_empty() {
        transports &= !TransportKind::Rdma.bit();
    }
    let identity = Identity {
        name: agent_name.to_owned(),
        incarnation,
        secret,
        transports,
        liveness_ms: config.liveness.as_millis().min(u128::from(u32::MAX)) as u32,
    };
    let lanes = config.lanes.count();
    let allowed = |kind: TransportKind| transports & kind.bit() != 0;
    let (mut listeners, mut advertised) = (Vec::new(), Vec::new());
    if allowed(TransportKind::Tcp) || allowed(TransportKind::Rdma) {
        let bound = addresses::listen(&config.listen)?;
        advertised = addresses::advertised(&config.listen, &bound)?;
        listeners.extend(bound.into_iter().map(|listener| listener.socket));
    }
    let mut table = None;
    if allowed(TransportKind::Local) {
        if config.any_tracer {
            let told = |e| Error::io("ptracer=any", e);
            crate::transport::local::allow_any_tracer().map_err(told)?;
        }
        let told = |e| Error::io("making shared memory for peers on this host", e);
        table = Some(Table::create(config.limits.regions).map_err(told)?);
        listeners.push(addresses::listen_unix(incarnation)?);
        super::shared::set_of_this_process(incarnation);
    }
    let metadata = Metadata {
        name: agent_name.to_owned(),
        incarnation,
        secret,
        transports,
        addresses: advertised.clone(),
    };
    let shared = Arc::new(EngineShared {
        name: agent_name.into(),
        identity,
        notifications: NotificationQueue::new(
            config.limits.pending_notifications,
            config.limits.pending_notification_bytes,
        ),
        metadata: OnceLock::from(metadata.encode()),
        registry: RwLock::new(Registry::new(config.limits.regions)),
        peers: Mutex::new(PeerTable::new(lanes, config.limits.clone())),
        arrivals: Arrivals::new(),
        lanes: OnceLock::new(),
        counters: (0..lanes).map(|_| Arc::new(Counters::default())).collect(),
        inline: InlineCounters::default(),
        issuers: Mutex::default(),
        given: Mutex::default(),
        table,
        accessors: Accessors::default(),
        rails: Arc::new(rails),
        forks: FORKS.load(Ordering::Relaxed),
        state: AtomicU32::new(RUNNING),
        config,
    });
    start_lanes(&shared, listeners)?;
    let cores: Vec<String> = shared
        .lanes()
        .iter()
        .map(|lane| lane.core().map_or("unpinned".into(), |core| core.to_string()))
        .collect();
    let transport_names: Vec<&str> = shared
        .config
        .transports
        .iter()
        .filter(|kind| allowed(**kind))
        .map(|kind| kind.name())
        .collect();
    tracing::info!(
        agent = agent_name,
        lanes = shared.lanes().len(),
        cores = %cores.join(", "),
        transports = %transport_names.join(","),
        rails = shared.rails.names(),
        addresses = ?advertised,
        "engine started"
    );
    Ok(shared)
}

fn start_lanes(shared: &Arc<EngineShared>, listeners: Vec<OwnedFd>) -> Result<()> {
    let mut listeners = Some(listeners);
    let mut started: Vec<Lane<LaneDriver>> = Vec::new();
    for (index, place) in places(&shared.config.lanes, &shared.rails).into_iter().enumerate() {
        let config = LaneConfig {
            name: format!("corelane-{index}"),
            core: place.core,
            claim: place.claim,
            spin: shared.config.spin,
            assist: shared.config.assist,
            // Trying an idle socket costs 0.3 us a turn: only the last one in use is worth it.
            max_hot_fds: 1,
            ..LaneConfig::default()
        };
        let (engine, listening) = (shared.clone(), listeners.take().unwrap_or_default());
        let lane = Lane::start(config, move |cx| LaneDriver::new(engine, index, listening, cx));
        match lane {
            Ok(lane) => started.push(lane),
            Err(error) => {
                for lane in started {
                    let _ = lane.stop(std::time::Duration::from_secs(1));
                }
                return Err(error.into());
            }
        }
    }
    let _ = shared.lanes.set(started);
    Ok(())
}
