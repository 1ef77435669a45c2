//! Runs the real binary.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The backends under test. Everything must hold for all: the baselines are measured by the same harness.
pub(crate) const BACKENDS: [&str; 4] = ["raw-tcp", "raw-cma", "raw-memcpy", "corelane"];

/// A fresh directory and the command that writes its results there.
pub(crate) struct Bench {
    /// Where results go; removed at the end.
    pub(crate) directory: tempfile::TempDir,
}

/// What a run printed and how it ended.
pub(crate) struct Ran {
    /// Exit code.
    pub(crate) code: i32,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

/// The binary with its arguments, split at white space.
pub(crate) fn command(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-bench"));
    command.args(arguments.split_whitespace()).env_remove("RUST_LOG");
    command
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Ran {
    let Output { status, stdout, stderr } = command.output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Ran { code: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
}

impl Bench {
    /// A fresh directory.
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory") }
    }

    /// Runs a subcommand, which writes into this directory.
    pub(crate) fn run(&self, arguments: &str) -> Ran {
        run(command(arguments).arg("--out-dir").arg(self.directory.path()))
    }

    /// Runs a subcommand that must succeed, and returns its results.json.
    pub(crate) fn results(&self, arguments: &str) -> (Ran, serde_json::Value) {
        let ran = self.run(arguments);
        assert_eq!(ran.code, 0, "{arguments}:\n{}\n{}", ran.stdout, ran.stderr);
        let json = std::fs::read(self.directory.path().join("results.json")).expect("results.json");
        (ran, serde_json::from_slice(&json).expect("valid JSON"))
    }

    /// Names of the files in the directory, sorted.
    pub(crate) fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).expect("lists");
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.expect("an entry").file_name().into_string().expect("UTF-8")
        };
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }

    /// A path in the directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        Path::new(self.directory.path()).join(name)
    }
}
