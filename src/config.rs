//! What an engine can be told; the defaults are right for an inference server.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::error::{Error, Result};
pub use corelane_runtime::{AssistMode, Spin};

/// Which cores an engine's lanes run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneSpec {
    /// `count` lanes, each on a core of the affinity mask that no other engine of this host has
    /// claimed; unpinned where none is free.
    Auto {
        /// Number of lanes, at least 1.
        count: usize,
    },
    /// One lane on each of these cores.
    Cores(Vec<usize>),
    /// `count` lanes that the kernel may move.
    Unpinned {
        /// Number of lanes, at least 1.
        count: usize,
    },
}

impl LaneSpec {
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Auto { count } | Self::Unpinned { count } => *count,
            Self::Cores(cores) => cores.len(),
        }
    }
}

/// How bytes move to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum TransportKind {
    /// Between engines of one host: copies by the initiator, notifications in shared memory.
    Local,
    /// RDMA READ and WRITE over reliable connections, where both hosts have a verbs device.
    Rdma,
    /// Requests over TCP, served by the remote lane straight out of registered memory.
    Tcp,
}

impl TransportKind {
    /// The name used in options and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
        }
    }

    pub(crate) fn bit(self) -> u32 {
        match self {
            Self::Tcp => 1,
            Self::Local => 2,
            Self::Rdma => 4,
        }
    }
}

impl std::fmt::Display for TransportKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for TransportKind {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "local" => Ok(Self::Local),
            "rdma" => Ok(Self::Rdma),
            "tcp" => Ok(Self::Tcp),
            other => {
                Err(Error::Config(format!("unknown transport `{other}` (known: local, rdma, tcp)")))
            }
        }
    }
}

/// How transport `rdma` uses the verbs devices of this host. What is not said here follows from the devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaConfig {
    /// Devices with their ports, such as `mlx5_0:1` or `rxe0` (port 1), in order of preference: each is a rail, and large
    /// transfers use all of them. Empty: the devices with an active port that are nearest to the lanes' cores.
    pub devices: Vec<String>,
    /// Index of the GID to use; `None`: the first RoCE v2 one with an IPv4 address, else the first of RoCE v2, else 0.
    pub gid_index: Option<u8>,
    /// Service level (InfiniBand) or priority, 0..=15.
    pub service_level: u8,
    /// Traffic class of the packets: for RoCE v2 the DSCP in the upper six bits.
    pub traffic_class: u8,
    /// How long a packet may stay unacknowledged before it is sent again: 4.096 us times two to the power of this, 1..=31.
    /// Default 14, 67 ms.
    pub timeout: u8,
    /// How often it is sent again before the peer counts as gone, 0..=6 (7 would be for ever). Default 6.
    pub retry_count: u8,
    /// Queue pairs for large transfers, to each peer on each rail, 1..=16; small ones and notifications have one of their own.
    /// Default 1.
    pub bulk_queue_pairs: usize,
    /// Bytes that one work request of a transfer that uses several rails moves at most. Default 1 MiB.
    pub stripe_bytes: usize,
    /// Let the device write payload out of order where it can, which is faster on some platforms; completions still come
    /// last. Default true.
    pub relaxed_ordering: bool,
    /// Register memory without pinning it (on-demand paging), where the device can. Default false.
    pub on_demand_paging: bool,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        Self {
            devices: Vec::new(),
            gid_index: None,
            service_level: 0,
            traffic_class: 0,
            timeout: 14,
            retry_count: 6,
            bulk_queue_pairs: 1,
            stripe_bytes: 1 << 20,
            relaxed_ordering: true,
            on_demand_paging: false,
        }
    }
}

impl RdmaConfig {
    fn validate(&self) -> Result<()> {
        let bounds = [
            ("rdma.service_level", u64::from(self.service_level), 0..=15),
            ("rdma.timeout", u64::from(self.timeout), 1..=31),
            ("rdma.retry_count", u64::from(self.retry_count), 0..=6),
            ("rdma.bulk_queue_pairs", self.bulk_queue_pairs as u64, 1..=16),
            ("rdma.stripe_bytes", self.stripe_bytes as u64, 4096..=1 << 30),
        ];
        for (name, value, range) in bounds {
            if !range.contains(&value) {
                let (low, high) = range.into_inner();
                return Err(Error::Config(format!("{name}={value} is outside {low}..={high}")));
            }
        }
        Ok(())
    }
}

/// How RDMA devices get at GPU memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum GpuRdma {
    /// By dmabuf, else by the kernel module `nvidia_peermem`, else not at all: then it goes as over sockets, through pinned host
    /// memory. Why is logged once.
    #[default]
    Auto,
    /// By dmabuf only: registering memory for which that fails fails.
    DmaBuf,
    /// By `nvidia_peermem` only, likewise.
    PeerMem,
    /// Not at all.
    Off,
}

impl GpuRdma {
    /// The name used in options and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::DmaBuf => "dmabuf",
            Self::PeerMem => "peermem",
            Self::Off => "off",
        }
    }
}

impl std::str::FromStr for GpuRdma {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        [Self::Auto, Self::DmaBuf, Self::PeerMem, Self::Off]
            .into_iter()
            .find(|way| way.name() == s)
            .ok_or_else(|| {
                Error::Config(format!(
                    "unknown way of RDMA to GPU memory `{s}` (known: auto, dmabuf, peermem, off)"
                ))
            })
    }
}

/// How GPU memory is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuConfig {
    /// At most so many multiprocessors of a GPU take part in a copy: what a model that computes at the same time goes
    /// without, for as long as the copy takes. Default 16 (docs/benchmarks.md).
    pub multiprocessors: u32,
    /// Contiguous ranges of at least so many bytes go by the copy engine, which takes no multiprocessor, and so does a range
    /// that is a transfer of its own, however small. Default 4 MiB.
    pub copy_engine_bytes: usize,
    /// Pinned host memory of each lane for GPU memory that goes over sockets, half of it for what is received; transfers that
    /// find none free wait. It is taken as it is needed, and kept. Default 32 MiB.
    pub staging_bytes: usize,
    /// How RDMA devices get at the memory that is registered (`GPUDirect` RDMA). Default: by whatever works.
    pub rdma: GpuRdma,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self {
            multiprocessors: 16,
            copy_engine_bytes: 4 << 20,
            staging_bytes: 32 << 20,
            rdma: GpuRdma::Auto,
        }
    }
}

impl GpuConfig {
    pub(crate) fn settings(&self) -> crate::gpu::Settings {
        crate::gpu::Settings {
            multiprocessors: self.multiprocessors,
            copy_engine_bytes: self.copy_engine_bytes as u64,
        }
    }

    fn validate(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::Config(why));
        if !(1..=1024).contains(&self.multiprocessors) {
            return refuse(format!(
                "gpu_multiprocessors={} is outside 1..=1024",
                self.multiprocessors
            ));
        }
        if !(64 << 10..=1 << 40).contains(&self.copy_engine_bytes) {
            let bytes = self.copy_engine_bytes;
            return refuse(format!(
                "gpu_copy_engine_bytes={bytes} is outside 65536..=1099511627776"
            ));
        }
        if !(8 << 20..=1 << 30).contains(&self.staging_bytes) {
            let bytes = self.staging_bytes;
            return refuse(format!("gpu_staging_bytes={bytes} is outside 8388608..=1073741824"));
        }
        Ok(())
    }
}

/// Where an engine listens and what it tells peers about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// Addresses to bind; empty: every interface, IPv4 and IPv6.
    pub addresses: Vec<IpAddr>,
    /// Only the addresses of this network interface are bound and advertised.
    pub interface: Option<String>,
    /// Ports to try, in order; `0..=0` lets the kernel choose.
    pub ports: RangeInclusive<u16>,
    /// What metadata says instead of the bound addresses (NAT, Kubernetes). Port 0 stands for the
    /// bound port.
    pub advertise: Vec<SocketAddr>,
}

impl Default for Listen {
    fn default() -> Self {
        Self { addresses: Vec::new(), interface: None, ports: 0..=0, advertise: Vec::new() }
    }
}

/// Bounds of everything that could grow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Peers known at the same time; a further one is refused.
    pub peers: usize,
    /// Registered regions; a further registration is refused.
    pub regions: usize,
    /// Descriptors in one plan, after expansion; a longer list is refused.
    pub descriptors: usize,
    /// Transfers in flight per peer; a further `post` yields until one has ended.
    pub transfers: usize,
    /// Notifications received and not yet taken by the application; then senders are stopped.
    pub pending_notifications: usize,
    /// Their bytes, likewise.
    pub pending_notification_bytes: usize,
    /// Notifications to one peer that it has not acknowledged; a further one is refused with
    /// [`Error::Backpressure`].
    pub unacknowledged_notifications: usize,
    /// Their bytes, likewise.
    pub unacknowledged_bytes: usize,
    /// Connections that have not finished their handshake; the oldest is dropped for a new one.
    pub half_open: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            peers: 4096,
            regions: 65_536,
            descriptors: 1 << 20,
            transfers: 4096,
            pending_notifications: 65_536,
            pending_notification_bytes: 64 << 20,
            unacknowledged_notifications: 65_536,
            unacknowledged_bytes: 64 << 20,
            half_open: 256,
        }
    }
}

/// The largest notification payload in bytes.
pub const MAX_NOTIFICATION_BYTES: usize = 16 << 20;

/// Everything an engine can be told. `EngineConfig::default()` is meant to be right.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineConfig {
    /// Cores of the lanes. Default: one lane, placed automatically.
    pub lanes: LaneSpec,
    /// How long an idle lane polls before it parks. Default 50 us.
    pub spin: Spin,
    /// Whether callers' threads drive a lane while they wait. Default: where cores are too few.
    pub assist: AssistMode,
    /// The transports that may be used; to one peer, the best that both sides allow and that works.
    /// Default: all.
    pub transports: Vec<TransportKind>,
    /// Transport `rdma`.
    pub rdma: RdmaConfig,
    /// GPU memory.
    pub gpu: GpuConfig,
    /// Transport `local`: write to a peer's process only by ways on which no other process could be
    /// reached, had the peer just ended and its process ID been given to another. Half the speed from
    /// 64 KiB on. Default false: such a write begins within a microsecond after a look that it is the
    /// peer's.
    pub strict_writes: bool,
    /// Transport `local`: let any process of the same user reach into this one, where the Yama security
    /// module (`kernel.yama.ptrace_scope=1`) would otherwise forbid it. For the whole process. Default
    /// false.
    pub any_tracer: bool,
    /// Listening addresses.
    pub listen: Listen,
    /// TCP streams that carry the bulk transfers to one peer. Default 2 (docs/benchmarks.md).
    pub streams: usize,
    /// Bytes of one request of a bulk transfer: what a small transfer waits for at most.
    pub chunk_bytes: usize,
    /// Transfers of at most this many bytes use the latency stream.
    pub latency_bytes: usize,
    /// Transfers of at most this many bytes are started by the thread that posts them, where
    /// [`assist`](Self::assist) lets it drive the lane. So are, up to 128 MiB, transfers of one contiguous range that a GPU copies
    /// within a host, unless `assist` is `Never` or [`inline_copy_bytes`](Self::inline_copy_bytes) 0: for 2 to 7 us of that thread.
    /// 0: always by the lane. Default 64 KiB.
    pub inline_bytes: usize,
    /// Transport `local`: transfers of at most this many bytes are copied by the thread that posts them,
    /// and are over when `post` returns: 70 us for 1 MiB, the default. Larger ones are copied by the lanes,
    /// and by whoever waits for them. With 0 here or in [`inline_bytes`](Self::inline_bytes) only lanes copy.
    pub inline_copy_bytes: usize,
    /// A peer that is silent for so long, and 50 ms more in which its lane may wait for a core, is dead. Default 3 s, at least 50 ms.
    pub liveness: Duration,
    /// A transfer that takes longer fails. Default 30 s.
    pub operation_timeout: Duration,
    /// Connecting and handshake together. Default 3 s.
    pub connect_timeout: Duration,
    /// How long the one attempt to connect again may take after a link was lost. Default 1 s.
    pub reconnect_timeout: Duration,
    /// How long `disconnect` and `shutdown` wait for notifications to be acknowledged, and for peers to write no more of
    /// WRITEs that they have cancelled. Default 1 s.
    pub linger: Duration,
    /// How long `deregister` waits for accesses in progress. Default 5 s.
    pub deregister_timeout: Duration,
    /// Bulk streams that carry nothing for so long are closed. Default 10 s.
    pub stream_idle: Duration,
    /// Bounds.
    pub limits: Limits,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            lanes: LaneSpec::Auto { count: 1 },
            spin: Spin::For(Duration::from_micros(50)),
            assist: AssistMode::Auto,
            transports: vec![TransportKind::Local, TransportKind::Rdma, TransportKind::Tcp],
            rdma: RdmaConfig::default(),
            gpu: GpuConfig::default(),
            strict_writes: false,
            any_tracer: false,
            listen: Listen::default(),
            streams: 2,
            chunk_bytes: 256 << 10,
            latency_bytes: 64 << 10,
            inline_bytes: 64 << 10,
            inline_copy_bytes: 1 << 20,
            liveness: Duration::from_secs(3),
            operation_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(3),
            reconnect_timeout: Duration::from_secs(1),
            linger: Duration::from_secs(1),
            deregister_timeout: Duration::from_secs(5),
            stream_idle: Duration::from_secs(10),
            limits: Limits::default(),
        }
    }
}

/// Longest agent name in bytes.
pub const MAX_AGENT_NAME: usize = 1024;

impl EngineConfig {
    /// Up to which size callers' threads copy by themselves; `None`: they do not.
    #[inline]
    pub(crate) fn copied_by_callers(&self) -> Option<u64> {
        let copies = self.inline_bytes != 0 && self.inline_copy_bytes != 0;
        copies.then_some(self.inline_copy_bytes as u64)
    }

    pub(crate) fn validate(&self, agent_name: &str) -> Result<()> {
        let refuse = |why: String| Err(Error::Config(why));
        if agent_name.is_empty() || agent_name.len() > MAX_AGENT_NAME {
            return refuse(format!(
                "the agent name has {} bytes; 1..={MAX_AGENT_NAME} are allowed",
                agent_name.len()
            ));
        }
        if self.lanes.count() == 0 || self.lanes.count() > 256 {
            return refuse(format!("{} lanes asked for; 1..=256 are possible", self.lanes.count()));
        }
        if let LaneSpec::Cores(cores) = &self.lanes {
            let mut sorted = cores.clone();
            sorted.sort_unstable();
            sorted.dedup();
            if sorted.len() != cores.len() {
                return refuse("a core is named twice in the list of lanes".into());
            }
        }
        if self.transports.is_empty() {
            return refuse("the list of transports is empty (known: local, rdma, tcp)".into());
        }
        self.rdma.validate()?;
        self.gpu.validate()?;
        if !(1..=64).contains(&self.streams) {
            return refuse(format!("streams={} is outside 1..=64", self.streams));
        }
        if !(4096..=16 << 20).contains(&self.chunk_bytes) {
            return refuse(format!("chunk_bytes={} is outside 4096..=16777216", self.chunk_bytes));
        }
        if self.latency_bytes > self.chunk_bytes {
            return refuse(format!(
                "latency_bytes={} is above chunk_bytes={}",
                self.latency_bytes, self.chunk_bytes
            ));
        }
        if self.liveness < Duration::from_millis(50) {
            return refuse(format!("liveness={:?} is below 50 ms", self.liveness));
        }
        let waits = [self.operation_timeout, self.connect_timeout, self.reconnect_timeout];
        if waits.iter().any(Duration::is_zero) {
            return refuse(
                "operation_timeout, connect_timeout and reconnect_timeout must not be zero".into(),
            );
        }
        let day = Duration::from_hours(24);
        let durations = [
            ("liveness", self.liveness),
            ("operation_timeout", self.operation_timeout),
            ("connect_timeout", self.connect_timeout),
            ("reconnect_timeout", self.reconnect_timeout),
            ("linger", self.linger),
            ("deregister_timeout", self.deregister_timeout),
            ("stream_idle", self.stream_idle),
        ];
        if let Some((name, value)) = durations.iter().find(|(_, value)| *value > day) {
            return refuse(format!("{name}={value:?} is longer than a day"));
        }
        if self.listen.ports.is_empty() {
            return refuse("the port range is empty".into());
        }
        let limits = &self.limits;
        let counts =
            [limits.peers, limits.regions, limits.descriptors, limits.transfers, limits.half_open];
        if counts.contains(&0) {
            return refuse("a limit is zero".into());
        }
        if limits.regions > 1 << 24 || limits.peers > 1 << 20 || limits.transfers > 1 << 20 {
            return refuse("a limit is beyond what the engine can number".into());
        }
        Ok(())
    }
}
