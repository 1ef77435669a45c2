//! What a figure depends on besides the code: machine, kernel, placement, build.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::utsname::uname;
use serde::{Deserialize, Serialize};

use crate::clock::{self, Noise};
use crate::pinning::{self, Cores};
use crate::units::fingerprint;

/// One host as one process of the run sees it. Both sides report theirs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Host {
    pub(crate) cpu_model: String,
    pub(crate) architecture: String,
    pub(crate) cores_online: usize,
    /// Affinity mask of the process, in the notation `0,1`.
    pub(crate) cores_allowed: String,
    pub(crate) numa_nodes: usize,
    pub(crate) kernel: String,
    /// Frequency governor of the allowed cores; `not exposed` on most virtual machines.
    pub(crate) governor: String,
    pub(crate) memory_bytes: u64,
    pub(crate) transparent_huge_pages: String,
    /// `cpu.max` of the process's control group; `none` when nothing limits it.
    pub(crate) cpu_quota: String,
    pub(crate) corelane_version: String,
    /// Revision that the build was made from; empty outside of a repository.
    pub(crate) git_revision: String,
    pub(crate) rustc: String,
    pub(crate) build_profile: String,
    /// Tells the machine from others of its kind: a fingerprint of its machine-id; empty where it has none.
    #[serde(default)]
    pub(crate) host_id: String,
    /// Equal for processes that share one monotonic clock, so that one-way times can be taken.
    pub(crate) clock: String,
    pub(crate) noise: Noise,
}

impl Host {
    /// Describes this host and watches its noise for 20 ms.
    pub(crate) fn describe() -> Self {
        let allowed = pinning::allowed_cores().unwrap_or_default();
        Self {
            cpu_model: cpu_model(),
            architecture: std::env::consts::ARCH.to_owned(),
            cores_online: read("/sys/devices/system/cpu/online")
                .parse::<Cores>()
                .map_or(allowed.len(), |cores| cores.0.len()),
            cores_allowed: Cores(allowed.clone()).to_string(),
            numa_nodes: read("/sys/devices/system/node/online")
                .parse::<Cores>()
                .map_or(1, |nodes| nodes.0.len()),
            kernel: uname().map_or_else(
                |_| String::new(),
                |name| {
                    format!(
                        "{} {}",
                        name.sysname().to_string_lossy(),
                        name.release().to_string_lossy()
                    )
                },
            ),
            governor: governor(&allowed),
            memory_bytes: memory_bytes(),
            transparent_huge_pages: selected(&read("/sys/kernel/mm/transparent_hugepage/enabled")),
            cpu_quota: cpu_quota(),
            corelane_version: crate::engine_side::version().to_owned(),
            git_revision: env!("BENCH_GIT_REVISION").to_owned(),
            rustc: env!("BENCH_RUSTC").to_owned(),
            build_profile: env!("BENCH_PROFILE").to_owned(),
            host_id: host_id(),
            clock: clock::clock_identity(),
            noise: clock::measure_noise(std::time::Duration::from_millis(20)),
        }
    }
}

impl Host {
    /// What the figures were taken on, in a few words.
    pub(crate) fn machine(&self) -> String {
        format!("{}, {} cores, {}", self.cpu_model, self.cores_online, self.kernel)
    }

    /// How quiet it was before the run.
    pub(crate) fn quiet(&self) -> String {
        let Noise { timer_overhead_ns, gaps_over_20us_per_second, .. } = self.noise;
        format!(
            "clock read {timer_overhead_ns} ns, {gaps_over_20us_per_second:.0} interruptions over 20 us per second"
        )
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// The word in brackets of a sysfs choice such as `always [madvise] never`.
fn selected(choices: &str) -> String {
    let inside = choices.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or_else(|| "not exposed".to_owned(), |(word, _)| word.to_owned())
}

fn cpu_model() -> String {
    let info = read("/proc/cpuinfo");
    let field = |name: &str| {
        info.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        })
    };
    // aarch64 kernels name an implementer and a part number instead of a model.
    field("model name")
        .or_else(|| {
            Some(format!("implementer {} part {}", field("CPU implementer")?, field("CPU part")?))
        })
        .unwrap_or_else(|| "unknown".to_owned())
}

fn governor(cores: &[usize]) -> String {
    let mut governors: Vec<String> = cores
        .iter()
        .map(|core| read(&format!("/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor")))
        .filter(|governor| !governor.is_empty())
        .collect();
    governors.sort_unstable();
    governors.dedup();
    if governors.is_empty() { "not exposed".to_owned() } else { governors.join(",") }
}

/// Not the number itself, which is a secret of the machine to some.
fn host_id() -> String {
    match read("/etc/machine-id") {
        id if id.is_empty() => id,
        id => fingerprint(&id),
    }
}

fn memory_bytes() -> u64 {
    let info = read("/proc/meminfo");
    let kib = info.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok()
    });
    kib.map_or(0, |kib: u64| kib * 1024)
}

/// The folders of the process's own control group and of those above it, up to the root.
pub(crate) fn control_groups() -> Vec<PathBuf> {
    const ROOT: &str = "/sys/fs/cgroup";
    let membership = read("/proc/self/cgroup");
    let group = membership.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let own = Path::new(ROOT).join(group.trim_start_matches('/'));
    own.ancestors().take_while(|path| path.starts_with(ROOT)).map(Path::to_path_buf).collect()
}

/// The tightest `cpu.max` from the process's own control group up to the root.
fn cpu_quota() -> String {
    let mut tightest: Option<f64> = None;
    for path in control_groups() {
        let quota = read(&path.join("cpu.max").to_string_lossy());
        if let Some((quota, period)) = quota.split_once(' ')
            && let (Ok(quota), Ok(period)) = (quota.parse::<f64>(), period.parse::<f64>())
        {
            tightest = Some(tightest.map_or(quota / period, |cores| cores.min(quota / period)));
        }
    }
    tightest.map_or_else(|| "none".to_owned(), |cores| format!("{cores:.2} cores"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_described() {
        let host = Host::describe();
        assert!(host.kernel.starts_with("Linux "), "{host:?}");
        assert!(
            host.cores_online >= 1 && host.memory_bytes > 1 << 20 && !host.cpu_model.is_empty()
        );
        assert!(host.rustc.starts_with("rustc "));
        let json = serde_json::to_string(&host).expect("encodes");
        assert_eq!(serde_json::from_str::<Host>(&json).expect("decodes"), host);
    }

    #[test]
    fn sysfs_choices() {
        assert_eq!(selected("always [madvise] never"), "madvise");
        assert_eq!(selected(""), "not exposed");
    }
}
