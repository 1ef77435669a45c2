//! Output files: complete or not there at all.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;

use super::hgrm::percentile_distribution;
use super::hlog::interval_log;
use crate::measure::Points;
use crate::units::fingerprint;

/// Where the files of a run go. Checked before anything is measured: a minute of measuring must not end in
/// "permission denied".
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(crate) directory: PathBuf,
    pub(crate) json: PathBuf,
    /// Directories that were made for it, outer ones first.
    made: Vec<PathBuf>,
}

impl Output {
    /// Takes the directories away again that were made for results which there are none of.
    pub(crate) fn forsake(&self) {
        for directory in self.made.iter().rev() {
            // One that holds something is somebody's.
            let _ = fs::remove_dir(directory);
        }
    }

    /// Where the report goes.
    pub(crate) fn report_path(&self) -> PathBuf {
        self.directory.join("report.html")
    }

    /// Writes the report.
    pub(crate) fn report(&self, page: &str) -> Result<()> {
        write_atomically(&self.report_path(), page.as_bytes())
    }

    /// Writes the histogram of a series as percentile distribution under the name `hgrm`, and its rounds as interval log
    /// beside it.
    pub(crate) fn histograms(
        &self,
        hgrm: &str,
        histogram: &Histogram<u64>,
        started_unix_s: u64,
        round: Duration,
        rounds: &[Points],
    ) -> Result<()> {
        let path = self.directory.join(hgrm);
        write_atomically(&path, percentile_distribution(histogram).as_bytes())?;
        let log = interval_log(started_unix_s, round, rounds)?;
        write_atomically(&path.with_extension("hlog"), &log)
    }

    /// Creates the directories and proves that they can be written to.
    pub(crate) fn prepare(directory: &Path, json: Option<&Path>) -> Result<Self> {
        let json = json.map_or_else(|| directory.join("results.json"), Path::to_path_buf);
        let mut made: Vec<PathBuf> = [directory, parent(&json)]
            .into_iter()
            .flat_map(Path::ancestors)
            .filter(|place| !place.as_os_str().is_empty() && !place.exists())
            .map(Path::to_path_buf)
            .collect();
        made.sort_unstable();
        made.dedup();
        let output = Self { directory: directory.to_path_buf(), json, made };
        prove_writable(directory)?;
        ensure_writable(&output.json)?;
        Ok(output)
    }
}

/// Characters of an id, or of a backend's label, in the name of a file.
const LONGEST_PART: usize = 100;

/// Name of a series' file: a backend's label may hold whatever its variables do.
pub(crate) fn hgrm_name(id: &str, backend: &str) -> String {
    // Names that are cut still have to differ.
    let plain = |text: &str| -> String {
        let known = |c: char| c.is_ascii_alphanumeric() || "+-_.=@,".contains(c);
        let all: String = text.chars().map(|c| if known(c) { c } else { '-' }).collect();
        match all.get(LONGEST_PART..) {
            None | Some("") => all,
            Some(_) => format!("{}-{}", &all[..LONGEST_PART - 17], fingerprint(text)),
        }
    };
    format!("{}.{}.hgrm", plain(id), plain(backend))
}

/// Fails when a file of that name cannot be written; creates the directories above it.
pub(crate) fn ensure_writable(json: &Path) -> Result<()> {
    prove_writable(parent(json))?;
    anyhow::ensure!(!json.is_dir(), "{} is a directory: --json names a file", json.display());
    Ok(())
}

fn prove_writable(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create the directory {}", directory.display()))?;
    let probe = directory.join(format!(".corelane-bench-{}", std::process::id()));
    fs::write(&probe, b"")
        .and_then(|()| fs::remove_file(&probe))
        .with_context(|| format!("cannot write into {}", directory.display()))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}

/// Writes a file under a temporary name beside its own and renames it: readers see the old one or the new one.
pub(crate) fn write_atomically(path: &Path, contents: &[u8]) -> Result<()> {
    let name = path.file_name().context("a file without a name")?.to_string_lossy();
    let temporary = parent(path).join(format!(".{name}.{}.tmp", std::process::id()));
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_data()))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The failure itself is reported below.
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_replaced_whole_and_leave_nothing_behind() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("results.json");
        write_atomically(&path, b"old").expect("writes");
        write_atomically(&path, b"new").expect("replaces");
        assert_eq!(fs::read(&path).expect("reads"), b"new");
        assert_eq!(fs::read_dir(directory.path()).expect("lists").count(), 1);
        let blocked = directory.path().join("missing").join("file");
        assert!(write_atomically(&blocked, b"x").is_err());
    }

    #[test]
    fn names_of_files_differ_where_labels_do() {
        assert_eq!(hgrm_name("read/64B", "UCX@UCX_TLS=tcp"), "read-64B.UCX@UCX_TLS=tcp.hgrm");
        let label = |end: &str| format!("CORELANE@NIXL_PLUGIN_DIR={}{end}", "/a-folder".repeat(12));
        let (one, other) = (label("/x"), label("/y"));
        let names = [&one, &other].map(|label| hgrm_name("read/64B", label));
        assert_ne!(names[0], names[1]);
        assert!(names.iter().all(|name| name.len() == "read-64B..hgrm".len() + 100), "{names:?}");
        assert_eq!(hgrm_name("read/64B", &"x".repeat(100)).matches('x').count(), 100);
    }

    #[test]
    fn an_unusable_place_is_noticed_before_measuring() {
        let directory = tempfile::tempdir().expect("a directory");
        let output = Output::prepare(&directory.path().join("a/b"), None).expect("creates");
        assert_eq!(output.json, directory.path().join("a/b/results.json"));
        output.forsake();
        assert!(!directory.path().join("a").exists(), "nothing was written");
        let file = directory.path().join("file");
        fs::write(&file, b"").expect("writes");
        assert!(Output::prepare(&file, None).is_err());
        assert!(Output::prepare(directory.path(), Some(directory.path())).is_err());
    }
}
