//! Which rails are near a GPU: those behind its PCI switch, whose bytes pass no processor; else those of its NUMA node.

use std::path::{Component, Path, PathBuf};

use super::near::Nodes;
use crate::verbs::numa_node;

/// A root of the PCI bus and a port of it: who shares that much is behind the same switch.
const SAME_SWITCH: usize = 2;

/// Where the rails of an engine are on the PCI bus.
#[derive(Debug, Default)]
pub(super) struct Slots {
    sysfs: PathBuf,
    /// The folder of each rail's device, by its way through the bus. Empty: they were asked for by name.
    rails: Vec<Option<PathBuf>>,
}

impl Slots {
    /// Of RDMA devices with these names.
    pub(super) fn new<'a>(sysfs: &Path, devices: impl Iterator<Item = &'a str>) -> Self {
        let class = sysfs.join("class/infiniband");
        let place = |name| class.join(name).join("device").canonicalize().ok();
        Self { sysfs: sysfs.to_owned(), rails: devices.map(place).collect() }
    }

    /// A bit for each rail that is near the GPU at this address of the bus (`0000:3b:00.0`); 0: all are the same to it. Some system
    /// calls where there are several.
    pub(super) fn near(&self, address: Option<&str>, nodes: &Nodes) -> u32 {
        if self.rails.len() < 2 {
            return 0;
        }
        let Some(gpu) = address.and_then(|address| self.gpu(address)) else { return 0 };
        let shared =
            |rail: &Option<PathBuf>| rail.as_ref().map_or(0, |rail| shared_path(rail, &gpu));
        let shared: Vec<usize> = self.rails.iter().map(shared).collect();
        let most = shared.iter().copied().max().unwrap_or(0);
        if most < SAME_SWITCH {
            return nodes.near_node_of(numa_node(&gpu));
        }
        let near = (0..).zip(&shared).filter(|(_, shared)| **shared == most);
        near.fold(0, |mask, (rail, _)| mask | 1 << rail)
    }

    fn gpu(&self, address: &str) -> Option<PathBuf> {
        let is_part = |letter: char| letter.is_ascii_hexdigit() || letter == ':' || letter == '.';
        // The kernel writes them small; a name and no way to other folders.
        let address = address.to_ascii_lowercase();
        if !address.chars().all(is_part) || !address.contains(':') {
            return None;
        }
        self.sysfs.join("bus/pci/devices").join(address).canonicalize().ok()
    }
}

/// How many steps through the PCI bus two devices have in common, its root included.
fn shared_path(one: &Path, other: &Path) -> usize {
    let is_root = |part: &Component<'_>| part.as_os_str().as_encoded_bytes().starts_with(b"pci");
    let both = one.components().zip(other.components());
    let common = both.take_while(|(one, other)| one == other).map(|(one, _)| one);
    common.skip_while(|part| !is_root(part)).count()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Two sockets. The first has a switch with a GPU and two rails, behind whose second bridge is another GPU, and a root port with
    /// a rail of its own; the second has a rail and a GPU, on different root ports.
    struct Tree(PathBuf);

    const DEVICES: [(&str, &str, usize); 8] = [
        ("rail0", "pci0000:10/0000:10:00.0/0000:11:00.0/0000:12:00.0/0000:13:00.0", 0),
        ("rail1", "pci0000:10/0000:10:00.0/0000:11:00.0/0000:12:00.0/0000:13:00.1", 0),
        ("gpu a", "pci0000:10/0000:10:00.0/0000:11:00.0/0000:12:00.0/0000:14:00.0", 0),
        ("gpu b", "pci0000:10/0000:10:00.0/0000:11:00.0/0000:12:01.0/0000:1b:00.0", 0),
        ("rail2", "pci0000:10/0000:10:01.0/0000:20:00.0", 0),
        ("gpu c", "pci0000:30/0000:30:00.0/0000:31:00.0", 0),
        ("rail3", "pci0000:80/0000:80:00.0/0000:81:00.0", 1),
        ("gpu d", "pci0000:80/0000:80:01.0/0000:90:00.0", 1),
    ];

    impl Tree {
        fn new(name: &str) -> Self {
            let name = format!("corelane-{name}-{}", std::process::id());
            let sysfs = std::env::temp_dir().join(name);
            for (name, path, node) in DEVICES {
                let folder = sysfs.join("devices").join(path);
                fs::create_dir_all(&folder).unwrap();
                fs::write(folder.join("numa_node"), format!("{node}\n")).unwrap();
                let bus = sysfs.join("bus/pci/devices");
                fs::create_dir_all(&bus).unwrap();
                symlink(&folder, bus.join(folder.file_name().unwrap())).unwrap();
                if name.starts_with("rail") {
                    let class = sysfs.join("class/infiniband").join(name);
                    fs::create_dir_all(&class).unwrap();
                    symlink(&folder, class.join("device")).unwrap();
                }
            }
            Self(sysfs)
        }

        fn near(&self, rails: &[&str], address: &str) -> u32 {
            let slots = Slots::new(&self.0, rails.iter().copied());
            let node =
                |rail: &&str| numa_node(&self.0.join("class/infiniband").join(rail).join("device"));
            slots.near(Some(address), &Nodes::new(rails.iter().map(node).collect()))
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const ALL: [&str; 4] = ["rail0", "rail1", "rail2", "rail3"];

    #[test]
    fn a_gpu_prefers_the_rails_of_its_switch_then_of_its_node() {
        let tree = Tree::new("slots");
        assert_eq!(tree.near(&ALL, "0000:14:00.0"), 0b0011, "below the same bridge");
        assert_eq!(
            tree.near(&ALL, "0000:1B:00.0"),
            0b0011,
            "the same switch, as the driver writes it"
        );
        assert_eq!(tree.near(&ALL, "0000:31:00.0"), 0b0111, "no switch: the node");
        assert_eq!(tree.near(&ALL, "0000:90:00.0"), 0b1000, "only the root is shared: the node");
        assert_eq!(
            tree.near(&["rail2", "rail1"], "0000:14:00.0"),
            0b10,
            "of one node, one is nearer"
        );
    }

    #[test]
    fn what_is_not_known_is_no_preference() {
        let tree = Tree::new("no-slots");
        for address in ["0000:99:00.0", "", "..", "../../../devices", "0000:14:00.0/.."] {
            assert_eq!(tree.near(&ALL, address), 0, "{address}");
        }
        assert_eq!(tree.near(&["rail0"], "0000:14:00.0"), 0, "one rail");
        assert_eq!(
            tree.near(&["rail0", "rail2"], "0000:90:00.0"),
            0,
            "neither is of its node more than the other"
        );
        assert_eq!(tree.near(&["soft0", "soft1"], "0000:14:00.0"), 0, "devices that are on no bus");
        assert_eq!(tree.near(&["soft0", "rail0"], "0000:14:00.0"), 0b10);
        assert_eq!(Slots::new(&tree.0, ALL.into_iter()).near(None, &Nodes::default()), 0);
        assert_eq!(Slots::default().near(Some("0000:14:00.0"), &Nodes::default()), 0, "named");
    }
}
