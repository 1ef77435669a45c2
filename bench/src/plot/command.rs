//! `corelane-bench plot`: one report of one or several result files.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::Value;

use super::from_results::{of_engine, of_nixl, of_peers};
use super::html::page;
use super::view::View;
use crate::manifest::Host;
use crate::nixl::{self, NixlResults};
use crate::peers::{self, PeersResults};
use crate::report::{self, Results, ensure_writable, write_atomically};
use crate::session::Failure;

#[derive(Debug, Args)]
pub(crate) struct PlotArgs {
    /// Results of `loopback`, `client`, `nixl` or `many-peers`; several are drawn into the same charts
    #[arg(required = true, value_name = "RESULTS.json")]
    pub(crate) results: Vec<PathBuf>,
    /// Where to write the report
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    pub(crate) out: PathBuf,
    /// Also write every chart as PNG into this directory (a build with the feature `png`)
    #[arg(long, value_name = "DIR")]
    pub(crate) png: Option<PathBuf>,
    /// Compare results even of different machines: the figures then say as much about these as about what was measured
    #[arg(long)]
    pub(crate) across_machines: bool,
}

/// A result file, read and understood.
struct Read {
    name: String,
    host: Host,
    view: View,
}

/// Draws; whatever is wrong with a file is found before anything is written.
pub(crate) fn plot(options: &PlotArgs) -> Result<(), Failure> {
    let refuse = |error: anyhow::Error| Failure::Options(format!("{error:#}"));
    if options.png.is_some() && !cfg!(feature = "png") {
        return Err(Failure::Options(
            "this build draws no PNG: build it with `cargo build --release --package corelane-bench --features png`"
                .to_owned(),
        ));
    }
    let files: Vec<Read> = options
        .results
        .iter()
        .map(|path| read(path).map_err(Failure::Options))
        .collect::<Result<_, _>>()?;
    let Some((first, others)) = files.split_first() else {
        return Err(Failure::Options("no results to plot".to_owned()));
    };
    if let Some(other) = others.iter().find(|other| !same_machine(&first.host, &other.host))
        && !options.across_machines
    {
        return Err(Failure::Options(format!(
            "{} and {} are of different machines ({}, {} cores; {}, {} cores): ratios between them mean nothing; \
             --across-machines draws them all the same",
            first.name,
            other.name,
            first.host.cpu_model,
            first.host.cores_online,
            other.host.cpu_model,
            other.host.cores_online,
        )));
    }
    ensure_writable(&options.out).map_err(refuse)?;
    let view = if others.is_empty() { first.view.clone() } else { together(&files) };
    #[cfg(feature = "png")]
    if let Some(directory) = &options.png {
        super::png::write(&view, directory).map_err(refuse)?;
    }
    write_atomically(&options.out, page(&view).as_bytes())?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", options.out.display())
        .context("writing to standard output")
        .map_err(Failure::Run)
}

fn together(files: &[Read]) -> View {
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    let mut view = View { title: names.join(" and "), ..View::default() };
    for file in files {
        view.add(&file.name, file.view.clone());
    }
    view
}

/// Reads a file; the message says what it is instead of results.
fn read(path: &Path) -> Result<Read, String> {
    let shown = path.display();
    let text =
        std::fs::read_to_string(path).map_err(|error| format!("cannot read {shown}: {error}"))?;
    let value: Value =
        serde_json::from_str(&text).map_err(|error| format!("{shown} is no JSON: {error}"))?;
    let schema = value["schema"].as_str().unwrap_or("none");
    let version = value["schema_version"].as_u64().unwrap_or(0);
    let known = match schema {
        report::SCHEMA => report::SCHEMA_VERSION,
        nixl::SCHEMA => nixl::SCHEMA_VERSION,
        peers::SCHEMA => peers::SCHEMA_VERSION,
        _ => {
            return Err(format!(
                "{shown} is no result of corelane-bench: its schema is '{schema}'"
            ));
        }
    };
    if version != u64::from(known) {
        return Err(format!(
            "{shown} has version {version} of schema {schema}, this corelane-bench reads version {known}: measure again, \
             or use the corelane-bench that wrote it"
        ));
    }
    let broken = |error: serde_json::Error| format!("{shown} does not hold to its schema: {error}");
    let (view, host) = if schema == nixl::SCHEMA {
        let results: NixlResults = serde_json::from_value(value).map_err(broken)?;
        (of_nixl(&results), results.environment)
    } else if schema == peers::SCHEMA {
        let results: PeersResults = serde_json::from_value(value).map_err(broken)?;
        (of_peers(&results), results.environment)
    } else {
        let results: Results = serde_json::from_value(value).map_err(broken)?;
        (of_engine(&results), results.environment.initiator)
    };
    Ok(Read { name: name_of(path), host, view })
}

/// What tells a file's lines from another's: its name, or its folder's where all are called `results.json`.
fn name_of(path: &Path) -> String {
    let text =
        |part: Option<&std::ffi::OsStr>| part.map(|part| part.to_string_lossy().into_owned());
    let stem = text(path.file_stem()).unwrap_or_default();
    if stem != "results" {
        return stem;
    }
    let folder = path.parent().and_then(|folder| std::fs::canonicalize(folder).ok());
    folder.and_then(|folder| text(folder.file_name())).unwrap_or(stem)
}

/// Whether two runs can be of one machine. Within one boot they are; else what is built in must be equal.
fn same_machine(one: &Host, other: &Host) -> bool {
    let built_in = |host: &Host| {
        (host.cpu_model.clone(), host.architecture.clone(), host.cores_online, host.numa_nodes)
    };
    // A kernel takes a little for itself, not always as much.
    let memory = one.memory_bytes.abs_diff(other.memory_bytes) < one.memory_bytes / 50 + 1;
    (!one.clock.is_empty() && one.clock == other.clock)
        || (built_in(one) == built_in(other) && memory)
}
