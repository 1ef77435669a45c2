//! How much CPU the cgroup lets us use.

use std::{fs, path::Path};

/// The CPU time per second that the tightest cgroup above this process grants, in cores (cgroup v2 `cpu.max`, v1
/// `cpu.cfs_quota_us`). None: no limit, or no readable cgroup file system. Reads a few files.
pub fn cpu_quota() -> Option<f64> {
    quota_in(Path::new("/sys/fs/cgroup"), &own_cgroups()?)
}

/// How many scheduling periods of this process's own cgroup were cut short so far. None: not readable.
pub fn throttled_periods() -> Option<u64> {
    throttled_in(Path::new("/sys/fs/cgroup"), &own_cgroups()?)
}

fn own_cgroups() -> Option<String> {
    fs::read_to_string("/proc/self/cgroup").ok()
}

/// The folders of the process's CPU cgroup, from its own to the root.
fn folders(root: &Path, cgroups: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for line in cgroups.lines() {
        // hierarchy-id:controllers:path; version 2 has id 0 and no controllers.
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let bases: &[&str] = if id == "0" && controllers.is_empty() {
            &["", "unified"]
        } else if controllers.split(',').any(|name| name == "cpu") {
            &["cpu", "cpu,cpuacct"]
        } else {
            continue;
        };
        for base in bases {
            let base = root.join(base);
            let own = base.join(path.trim_start_matches('/'));
            // In a container the path is the host's, while what is mounted is the container's own folder.
            for folder in own.ancestors().take_while(|folder| folder.starts_with(&base)) {
                found.push(folder.to_path_buf());
            }
        }
    }
    found
}

fn quota_in(root: &Path, cgroups: &str) -> Option<f64> {
    folders(root, cgroups)
        .iter()
        .filter_map(|folder| {
            if let Ok(text) = fs::read_to_string(folder.join("cpu.max")) {
                let mut words = text.split_whitespace();
                let quota: f64 = words.next()?.parse().ok()?; // "max" is no number: no limit
                let period: f64 = words.next()?.parse().ok()?;
                return (period > 0.0).then(|| quota / period);
            }
            let read = |file| -> Option<f64> {
                fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()
            };
            let (quota, period) = (read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?);
            (quota > 0.0 && period > 0.0).then(|| quota / period)
        })
        .reduce(f64::min)
}

fn throttled_in(root: &Path, cgroups: &str) -> Option<u64> {
    folders(root, cgroups).iter().find_map(|folder| {
        let text = fs::read_to_string(folder.join("cpu.stat")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("nr_throttled ")?.trim().parse().ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_files(name: &str, files: &[(&str, &str)], check: impl FnOnce(&Path)) {
        let root =
            std::env::temp_dir().join(format!("corelane-cgroup-{name}-{}", std::process::id()));
        for (file, text) in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        check(&root);
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn version_2_takes_the_tightest_folder() {
        let files = [
            ("a/cpu.max", "150000 100000\n"),
            ("a/b/cpu.max", "max 100000\n"),
            ("a/b/cpu.stat", "nr_periods 9\nnr_throttled 3\n"),
        ];
        with_files("v2", &files, |root| {
            assert_eq!(quota_in(root, "0::/a/b\n"), Some(1.5));
            assert_eq!(quota_in(root, "0::/\n"), None);
            assert_eq!(throttled_in(root, "0::/a/b\n"), Some(3));
        });
    }

    #[test]
    fn version_1_and_a_container_view() {
        let files = [
            ("cpu/cpu.cfs_quota_us", "50000\n"),
            ("cpu/cpu.cfs_period_us", "100000\n"),
            ("cpu/free/cpu.cfs_quota_us", "-1\n"),
            ("cpu/free/cpu.cfs_period_us", "100000\n"),
        ];
        with_files("v1", &files, |root| {
            let cgroups = "5:memory:/x\n2:cpu,cpuacct:/docker/0123\n0::/\n";
            assert_eq!(quota_in(root, cgroups), Some(0.5));
            assert_eq!(quota_in(root, "2:cpu:/free\n"), Some(0.5));
            assert_eq!(quota_in(root, "5:memory:/x\ngarbage\n"), None);
        });
    }
}
