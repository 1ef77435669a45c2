//! Records which compiler and which revision built the harness: a figure without them cannot be compared with another.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // This log grows with every commit, unlike HEAD, which only names the branch.
    if Path::new("../.git/logs/HEAD").exists() {
        println!("cargo::rerun-if-changed=../.git/logs/HEAD");
    }
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let version = output_of(Command::new(rustc).arg("--version"));
    println!("cargo::rustc-env=BENCH_RUSTC={}", version.unwrap_or_default());
    let revision =
        output_of(Command::new("git").args(["rev-parse", "--verify", "--quiet", "HEAD"]));
    println!("cargo::rustc-env=BENCH_GIT_REVISION={}", revision.unwrap_or_default());
    let profile = std::env::var("PROFILE").unwrap_or_default();
    println!("cargo::rustc-env=BENCH_PROFILE={profile}");
}

/// The first line a command prints, if it succeeds and prints one.
fn output_of(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().next().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty())
}
