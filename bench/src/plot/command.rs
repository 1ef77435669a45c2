//! `corelane-bench plot`: one report of one or several result files.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::Value;

use super::changes::Changes;
use super::from_results::{of_engine, of_nixl, of_peers};
use super::html::page;
use super::view::View;
use crate::manifest::Host;
use crate::nixl::{self, NixlResults};
use crate::peers::{self, PeersResults};
use crate::report::{self, Environment, Results, ensure_writable, write_atomically};
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
    /// The initiator's first, then the target's where that may be another.
    hosts: Vec<Host>,
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
    let names = names_of(&options.results);
    let files: Vec<Read> = options
        .results
        .iter()
        .zip(names)
        .map(|(path, name)| read(path, name).map_err(Failure::Options))
        .collect::<Result<_, _>>()?;
    let Some((first, others)) = files.split_first() else {
        return Err(Failure::Options("no results to plot".to_owned()));
    };
    if let Some(other) = others.iter().find(|other| !same_machines(&first.hosts, &other.hosts))
        && !options.across_machines
    {
        let machines = |file: &Read| -> String {
            let named =
                file.hosts.iter().map(|it| format!("{}, {} cores", it.cpu_model, it.cores_online));
            let mut named: Vec<String> = named.collect();
            named.dedup();
            named.join(" and ")
        };
        return Err(Failure::Options(format!(
            "{} and {} are of different machines ({}; {}): ratios between them mean nothing; --across-machines draws them all the same",
            first.name,
            other.name,
            machines(first),
            machines(other),
        )));
    }
    ensure_writable(&options.out).map_err(refuse)?;
    let view = if others.is_empty() { first.view.clone() } else { together(&files) };
    #[cfg(feature = "png")]
    if let Some(directory) = &options.png {
        super::png::write(&view, directory).map_err(refuse)?;
    }
    write_atomically(&options.out, page(&view).as_bytes())?;
    let tables: Vec<String> = view.changes.iter().map(|it| it.table() + "\n").collect();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}{}", tables.concat(), options.out.display())
        .context("writing to standard output")
        .map_err(Failure::Run)
}

fn together(files: &[Read]) -> View {
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    let mut view = View { title: names.join(" and "), ..View::default() };
    for file in files {
        view.add(&file.name, file.view.clone());
    }
    if let Some((first, others)) = files.split_first() {
        let changes =
            |other: &Read| Changes::between((&first.name, &first.view), (&other.name, &other.view));
        view.changes = others.iter().map(changes).collect();
    }
    view
}

/// Reads a file; the message says what it is instead of results.
fn read(path: &Path, name: String) -> Result<Read, String> {
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
    let (view, hosts) = if schema == nixl::SCHEMA {
        let results: NixlResults = serde_json::from_value(value).map_err(broken)?;
        (of_nixl(&results), vec![results.environment])
    } else if schema == peers::SCHEMA {
        let results: PeersResults = serde_json::from_value(value).map_err(broken)?;
        (of_peers(&results), vec![results.environment])
    } else {
        let results: Results = serde_json::from_value(value).map_err(broken)?;
        let Environment { initiator, target } = results.environment.clone();
        (of_engine(&results), vec![initiator, target])
    };
    Ok(Read { name, hosts, view })
}

/// What tells a file's lines from those of others: its name, or its folder's where it is called `results.json`; as many folders
/// before it as it takes to tell it from the rest.
fn names_of(paths: &[PathBuf]) -> Vec<String> {
    let parts: Vec<Vec<String>> = paths.iter().map(|path| parts_of(path)).collect();
    let name = |at: usize, depth: usize| -> String {
        let parts = &parts[at];
        parts[parts.len() - depth.min(parts.len())..].join("/")
    };
    let mut names: Vec<String> = Vec::new();
    for (at, own) in parts.iter().enumerate() {
        let alone = |depth: &usize| {
            let own = name(at, *depth);
            (0..paths.len()).all(|other| other == at || name(other, *depth) != own)
        };
        let depth = (1..=own.len()).find(alone);
        names.push(name(at, depth.unwrap_or(1)));
    }
    // A file that is given twice, or one that no folder tells from another.
    let numbered = |(at, name): (usize, &String)| {
        let before = names[..at].iter().filter(|other| *other == name).count();
        if before == 0 { name.clone() } else { format!("{name} ({})", before + 1) }
    };
    names.iter().enumerate().map(numbered).collect()
}

/// The folders of a file, outer ones first, and at the end its name, unless that is what all are called.
fn parts_of(path: &Path) -> Vec<String> {
    let whole = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let folders = whole.parent().into_iter().flat_map(Path::components);
    let mut parts: Vec<String> = folders
        .filter_map(|part| match part {
            std::path::Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
            _ => None,
        })
        .collect();
    if stem != "results" || parts.is_empty() {
        parts.push(stem);
    }
    parts
}

/// Whether two runs can be of the same machines, that of the initiator and that of the target.
fn same_machines(one: &[Host], other: &[Host]) -> bool {
    one.iter().zip(other).all(|(one, other)| same_machine(one, other))
}

/// Whether two runs can be of one machine. Within one boot they are; else what is built in must be equal.
fn same_machine(one: &Host, other: &Host) -> bool {
    let built_in = |host: &Host| {
        (host.cpu_model.clone(), host.architecture.clone(), host.cores_online, host.numa_nodes)
    };
    // Two machines may be built alike. Not all have a number, and files from before have none.
    let same_id = |one: &Host, other: &Host| {
        one.host_id.is_empty() || other.host_id.is_empty() || one.host_id == other.host_id
    };
    // A kernel takes a little for itself, not always as much.
    let memory = one.memory_bytes.abs_diff(other.memory_bytes) < one.memory_bytes / 50 + 1;
    (!one.clock.is_empty() && one.clock == other.clock)
        || (built_in(one) == built_in(other) && memory && same_id(one, other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_names_that_tell_them_apart() {
        let named =
            |paths: &[&str]| names_of(&paths.iter().map(PathBuf::from).collect::<Vec<PathBuf>>());
        assert_eq!(named(&["/a/results.json", "/b/results.json"]), ["a", "b"]);
        assert_eq!(named(&["/a/one.json", "/a/two.json"]), ["one", "two"]);
        assert_eq!(
            named(&["/before/nixl/results.json", "/after/nixl/results.json"]),
            ["before/nixl", "after/nixl"]
        );
        assert_eq!(
            named(&["/x/1/nixl/results.json", "/y/1/nixl/results.json", "/x/1/other.json"]),
            ["x/1/nixl", "y/1/nixl", "other"]
        );
        assert_eq!(named(&["/a/b.json", "/c/b.json"]), ["a/b", "c/b"]);
        // One whose folders are all of another's.
        assert_eq!(named(&["/b/results.json", "/a/b/results.json"]), ["b", "a/b"]);
        assert_eq!(named(&["/a/b.json", "/a/b.json"]), ["b", "b (2)"]);
    }
}
