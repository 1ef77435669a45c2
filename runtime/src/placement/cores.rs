//! Lists of cores, the affinity mask, NUMA nodes.

use std::{fmt, fs, io, path::Path, str::FromStr};

/// A set of cores, printed and parsed the way the kernel does it: `0,2-5`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct CoreList(Vec<usize>);

/// The kernel's own limit is 8192; a larger number is a typing error.
const MAX_CORE: usize = 65_535;

/// A text that is no [`CoreList`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no list of cores ({problem}): write numbers and ranges, for example 0,2-5")]
pub struct ParseCoreListError {
    text: String,
    problem: &'static str,
}

impl CoreList {
    /// The cores, ascending, each once.
    pub fn cores(&self) -> &[usize] {
        &self.0
    }

    /// Whether `core` is in the list.
    pub fn contains(&self, core: usize) -> bool {
        self.0.binary_search(&core).is_ok()
    }

    /// How many cores there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<usize> for CoreList {
    fn from_iter<I: IntoIterator<Item = usize>>(cores: I) -> Self {
        let mut cores: Vec<_> = cores.into_iter().collect();
        cores.sort_unstable();
        cores.dedup();
        Self(cores)
    }
}

impl FromStr for CoreList {
    type Err = ParseCoreListError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |problem| ParseCoreListError { text: text.to_owned(), problem };
        let number = |part: &str| {
            let part = part.trim();
            if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(error("a number is missing"));
            }
            match part.parse::<usize>() {
                Ok(core) if core <= MAX_CORE => Ok(core),
                _ => Err(error("a number is too large")),
            }
        };
        let mut cores = Vec::new();
        for part in text.trim().split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(error("a range runs backwards"));
            }
            cores.extend(first..=last);
        }
        Ok(cores.into_iter().collect())
    }
}

impl fmt::Display for CoreList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_slice();
        let mut separator = "";
        while let Some(first) = rest.first().copied() {
            let run =
                rest.iter().zip(first..).take_while(|(core, expected)| **core == *expected).count();
            let last = first + run - 1;
            match run {
                1 => write!(f, "{separator}{first}")?,
                _ => write!(f, "{separator}{first}-{last}")?,
            }
            separator = ",";
            rest = &rest[run..];
        }
        Ok(())
    }
}

/// The cores on which the calling thread may run (its affinity mask, which the cgroup's cpuset narrows).
pub fn allowed_cores() -> io::Result<CoreList> {
    affinity_of(0)
}

/// The cores on which the process's main thread may run: a pinned lane asks what the others have.
pub(crate) fn process_cores() -> io::Result<CoreList> {
    affinity_of(std::process::id() as libc::pid_t)
}

fn affinity_of(thread: libc::pid_t) -> io::Result<CoreList> {
    let mut words = [0u64; (MAX_CORE + 1) / 64];
    // SAFETY: the kernel writes at most as many bytes as it is told. The raw call, unlike libc's wrapper, is not limited
    // to 1024 cores.
    let bytes = unsafe {
        libc::syscall(libc::SYS_sched_getaffinity, thread, size_of_val(&words), words.as_mut_ptr())
    };
    if bytes < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((0..bytes as usize * 8).filter(|core| words[core / 64] >> (core % 64) & 1 == 1).collect())
}

/// The core on which the calling thread runs just now.
pub fn current_core() -> Option<usize> {
    // SAFETY: no arguments.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// Pins the calling thread to `core`.
pub fn pin_thread(core: usize) -> io::Result<()> {
    if core > MAX_CORE {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut words = [0u64; (MAX_CORE + 1) / 64];
    words[core / 64] = 1 << (core % 64);
    // SAFETY: the kernel reads as many bytes as it is told.
    let result = unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(&words), words.as_ptr())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The NUMA node of a network device (`eth0`) or of an RDMA device (`mlx5_0`), from sysfs. None: there is no such device,
/// it is virtual, or the machine has one node only.
pub fn numa_node_of_nic(name: &str) -> Option<usize> {
    numa_node_of_nic_in(Path::new("/sys"), name)
}

fn numa_node_of_nic_in(sysfs: &Path, name: &str) -> Option<usize> {
    // A name is one path component; anything else is no device name.
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return None;
    }
    ["class/net", "class/infiniband"].iter().find_map(|class| {
        let node =
            fs::read_to_string(sysfs.join(class).join(name).join("device/numa_node")).ok()?;
        // -1 means that the firmware does not say.
        node.trim().parse().ok()
    })
}

/// The NUMA node of a core, from sysfs. None: no such core, or a kernel without NUMA.
pub fn numa_node_of_core(core: usize) -> Option<usize> {
    let folder = fs::read_dir(format!("/sys/devices/system/cpu/cpu{core}")).ok()?;
    folder
        .flatten()
        .find_map(|entry| entry.file_name().to_str()?.strip_prefix("node")?.parse().ok())
}

/// The cores of a NUMA node, from sysfs. None: no such node, or one without cores.
pub fn cores_of_numa_node(node: usize) -> Option<CoreList> {
    cores_of_numa_node_in(Path::new("/sys"), node)
}

fn cores_of_numa_node_in(sysfs: &Path, node: usize) -> Option<CoreList> {
    let file = sysfs.join(format!("devices/system/node/node{node}/cpulist"));
    fs::read_to_string(file).ok()?.parse().ok()
}

/// How far memory of NUMA node `to` is from what is attached to `from`, as firmware tells and sysfs repeats: 10 for the same node,
/// more for others. None: one of them is not there.
pub fn numa_distance(from: usize, to: usize) -> Option<u32> {
    numa_distance_in(Path::new("/sys"), from, to)
}

fn numa_distance_in(sysfs: &Path, from: usize, to: usize) -> Option<u32> {
    let nodes = sysfs.join("devices/system/node");
    // One number for each node that is online, in their order, which need not be without gaps.
    let online: CoreList = fs::read_to_string(nodes.join("online")).ok()?.parse().ok()?;
    let place = online.cores().iter().position(|node| *node == to)?;
    let distances = fs::read_to_string(nodes.join(format!("node{from}/distance"))).ok()?;
    distances.split_whitespace().nth(place)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn examples_parse_and_print() {
        let list: CoreList = " 0, 2-5 ,3 ".parse().unwrap();
        assert_eq!(list.cores(), [0, 2, 3, 4, 5]);
        assert_eq!(list.to_string(), "0,2-5");
        assert!(list.contains(4) && !list.contains(1));
    }

    #[test]
    fn bad_lists_say_how_to_write_one() {
        for bad in
            ["", ",", "1,", "a", "-1", "1-", "5-2", "1--2", "+1", "99999999999999999999", "70000"]
        {
            let error = bad.parse::<CoreList>().unwrap_err();
            assert!(error.to_string().contains("for example 0,2-5"), "{error}");
        }
    }

    #[test]
    fn the_affinity_mask_holds_the_current_core() {
        let allowed = allowed_cores().unwrap();
        assert!(allowed.contains(current_core().unwrap()));
    }

    #[test]
    fn pinning_moves_the_thread_and_refuses_nonsense() {
        std::thread::spawn(|| {
            for core in allowed_cores().unwrap().cores() {
                pin_thread(*core).unwrap();
                assert_eq!(current_core(), Some(*core));
            }
            assert!(pin_thread(MAX_CORE).is_err());
            assert!(pin_thread(usize::MAX).is_err());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn numa_nodes_come_from_sysfs() {
        let sysfs = std::env::temp_dir().join(format!("corelane-sysfs-{}", std::process::id()));
        for (device, node) in [
            ("class/net/eth0", "1\n"),
            ("class/infiniband/mlx5_0", "0\n"),
            ("class/net/veth", "-1\n"),
        ] {
            let folder = sysfs.join(device).join("device");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("numa_node"), node).unwrap();
        }
        assert_eq!(numa_node_of_nic_in(&sysfs, "eth0"), Some(1));
        assert_eq!(numa_node_of_nic_in(&sysfs, "mlx5_0"), Some(0));
        for none in ["veth", "eth1", "", "..", "../net/eth0"] {
            assert_eq!(numa_node_of_nic_in(&sysfs, none), None, "{none}");
        }
        fs::remove_dir_all(&sysfs).unwrap();
    }

    #[test]
    fn nodes_have_cores_and_distances() {
        let sysfs = std::env::temp_dir().join(format!("corelane-nodes-{}", std::process::id()));
        let nodes = sysfs.join("devices/system/node");
        // Two sockets, the first of which is two nodes; number 1 is offline, and 3 has memory but no core.
        for (node, cpulist, distance) in
            [(0, "0-3,8-11\n", "10 12 32\n"), (2, "4-7\n", "12 10 32\n"), (3, "\n", "32 32 10\n")]
        {
            let folder = nodes.join(format!("node{node}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("cpulist"), cpulist).unwrap();
            fs::write(folder.join("distance"), distance).unwrap();
        }
        fs::write(nodes.join("online"), "0,2-3\n").unwrap();
        let cores = |node| cores_of_numa_node_in(&sysfs, node).map(|list| list.to_string());
        assert_eq!(
            [0, 1, 2, 3].map(cores),
            [Some("0-3,8-11".into()), None, Some("4-7".into()), None]
        );
        let distance = |from, to| numa_distance_in(&sysfs, from, to);
        assert_eq!(
            (distance(0, 0), distance(0, 2), distance(0, 3)),
            (Some(10), Some(12), Some(32))
        );
        assert_eq!((distance(3, 2), distance(2, 3)), (Some(32), Some(32)));
        assert_eq!((distance(0, 1), distance(1, 0)), (None, None));
        fs::remove_dir_all(&sysfs).unwrap();
    }

    proptest! {
        #[test]
        fn any_set_survives_printing_and_parsing(cores in proptest::collection::btree_set(0usize..300, 1..60)) {
            let list: CoreList = cores.iter().copied().collect();
            let back: CoreList = list.to_string().parse().unwrap();
            prop_assert_eq!(back.cores(), cores.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn any_text_parses_or_fails_cleanly(text in "[0-9,\\- a]{0,12}") {
            if let Ok(list) = text.parse::<CoreList>() {
                prop_assert!(!list.is_empty());
            }
        }
    }
}
