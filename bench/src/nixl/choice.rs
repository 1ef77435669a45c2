//! Which backends of NIXL are compared, and where NIXL is: what every subcommand that drives them is told.

use std::fmt::Display;
use std::path::PathBuf;

use clap::Args;

use super::backend::{BackendSpec, parse_parameter};
use super::wire::NixlSystem;
use crate::session::Failure;

/// How much the plugin CORELANE says.
const LOG_LEVEL: &str = "CORELANE_LOG_LEVEL";

#[derive(Clone, Debug, Default, Args)]
pub(crate) struct BackendArgs {
    /// The backend of NIXL that ratios are about [default: CORELANE]: NAME[@KEY=VALUE[,KEY=VALUE]...];
    /// a KEY in capitals is an environment variable, another a parameter of the backend
    #[arg(long, value_name = "BACKEND", help_heading = "System")]
    pub(crate) backend: Option<BackendSpec>,
    /// A backend to compare it with; may be given several times
    #[arg(long, value_name = "BACKEND", help_heading = "System")]
    pub(crate) vs: Vec<BackendSpec>,
    /// A parameter of --backend, KEY=VALUE; may be given several times
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = parse_parameter, help_heading = "System")]
    pub(crate) parameters: Vec<(String, String)>,
    /// Agents with a progress thread of their own, as Python's are by default
    #[arg(long, help_heading = "System")]
    pub(crate) prog_thread: bool,
    /// Folder of libnixl_capi.so [default: as the loader finds it]
    #[arg(long, value_name = "DIR", help_heading = "System")]
    pub(crate) nixl_libs: Option<PathBuf>,
    /// Folder of the plugins [default: NIXL_PLUGIN_DIR, else NIXL's own]
    #[arg(long, value_name = "DIR", help_heading = "System")]
    pub(crate) plugin_dir: Option<PathBuf>,
}

impl BackendArgs {
    /// Whether a backend was named.
    pub(crate) fn names_one(&self) -> bool {
        self.backend.is_some() || !self.vs.is_empty()
    }

    /// An option that means nothing where no backend was named.
    pub(crate) fn detail(&self) -> Option<&'static str> {
        let given = [
            (!self.parameters.is_empty(), "--param"),
            (self.prog_thread, "--prog-thread"),
            (self.nixl_libs.is_some(), "--nixl-libs"),
            (self.plugin_dir.is_some(), "--plugin-dir"),
        ];
        given.into_iter().find(|(given, _)| *given).map(|(_, option)| option)
    }

    /// The backends, the one that ratios are about first.
    pub(crate) fn backends(&self) -> Vec<BackendSpec> {
        let first = self.backend.clone().unwrap_or_else(BackendSpec::corelane);
        std::iter::once(first).chain(self.vs.iter().cloned()).collect()
    }

    /// Refuses folders that are none.
    pub(crate) fn check_folders(&self) -> Result<(), String> {
        for (option, folder) in
            [("--nixl-libs", &self.nixl_libs), ("--plugin-dir", &self.plugin_dir)]
        {
            if let Some(folder) = folder.as_ref().filter(|folder| !folder.is_dir()) {
                return Err(format!("{option}: {} is no folder", folder.display()));
            }
        }
        Ok(())
    }

    /// Environment of a backend's processes, on top of ours.
    pub(crate) fn environment(&self, backend: &BackendSpec) -> Vec<(String, String)> {
        let mut environment = Vec::new();
        // Not a line for each peer of every round.
        if std::env::var_os(LOG_LEVEL).is_none() {
            environment.push((LOG_LEVEL.to_owned(), "warn".to_owned()));
        }
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        if let Some(folder) = &self.nixl_libs {
            let before = std::env::var("LD_LIBRARY_PATH").ok().filter(|path| !path.is_empty());
            let path =
                before.map_or_else(|| text(folder), |before| format!("{}:{before}", text(folder)));
            environment.push(("LD_LIBRARY_PATH".to_owned(), path));
        }
        if let Some(folder) = &self.plugin_dir {
            environment.push(("NIXL_PLUGIN_DIR".to_owned(), text(folder)));
        }
        environment.extend(backend.environment.iter().cloned());
        environment
    }

    /// What an agent is made of.
    pub(crate) fn system(&self, backend: &BackendSpec) -> NixlSystem {
        let mut parameters = backend.parameters.clone();
        if Some(backend) == self.backends().first() {
            parameters.extend(self.parameters.iter().cloned());
        }
        let backend = backend.name.clone();
        NixlSystem { backend, parameters, prog_thread: self.prog_thread, threads: false }
    }
}

/// Refuses to compare something with itself.
pub(crate) fn ensure_distinct(names: &[impl Display]) -> Result<(), String> {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let twin = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name));
    twin.map_or(Ok(()), |(_, name)| {
        Err(format!("{name} is named twice: there is nothing to compare"))
    })
}

/// Refuses to drive NIXL in a build that cannot.
pub(crate) fn ensure_driver() -> Result<(), Failure> {
    if cfg!(feature = "nixl") {
        return Ok(());
    }
    Err(Failure::Options(
        "this build cannot drive NIXL: build it with `cargo build --release --package corelane-bench --features nixl`, \
         which needs libclang"
            .to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        choice: BackendArgs,
    }

    fn parse(options: &str) -> BackendArgs {
        let words = std::iter::once("line").chain(options.split_whitespace());
        Line::try_parse_from(words).expect("parses").choice
    }

    #[test]
    fn variables_of_a_backend_come_last_and_win() {
        let choice = parse("--plugin-dir /a --vs UCX@NIXL_PLUGIN_DIR=/b");
        let value = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let backends = choice.backends();
        let mut environment = choice.environment(&backends[1]);
        environment.retain(|(name, _)| name != LOG_LEVEL);
        assert_eq!(environment, [value("NIXL_PLUGIN_DIR", "/a"), value("NIXL_PLUGIN_DIR", "/b")]);
        let ours = choice.environment(&backends[0]);
        assert_eq!(ours.last(), Some(&value("NIXL_PLUGIN_DIR", "/a")));
        assert!(ours.contains(&value(LOG_LEVEL, "warn")) || std::env::var_os(LOG_LEVEL).is_some());
    }

    #[test]
    fn parameters_are_for_the_first_backend_alone() {
        let choice = parse("--param lanes=1 --vs UCX@num_workers=2 --prog-thread");
        let backends = choice.backends();
        let value = |name: &str, value: &str| vec![(name.to_owned(), value.to_owned())];
        let systems: Vec<NixlSystem> = backends.iter().map(|it| choice.system(it)).collect();
        assert_eq!(systems[0].parameters, value("lanes", "1"));
        assert_eq!(systems[1].parameters, value("num_workers", "2"));
        assert!(systems.iter().all(|system| system.prog_thread));
        assert_eq!(systems[0].backend, "CORELANE");
    }

    #[test]
    fn what_is_only_a_detail_is_known() {
        assert_eq!((parse("").names_one(), parse("").detail()), (false, None));
        assert!(parse("--vs UCX").names_one() && parse("--backend UCX").names_one());
        for option in ["--param a=b", "--prog-thread", "--nixl-libs /a", "--plugin-dir /a"] {
            let name = option.split(' ').next();
            assert_eq!(parse(option).detail(), name);
        }
        assert!(ensure_distinct(&["a", "b"]).is_ok());
        assert!(ensure_distinct(&["a", "b", "a"]).is_err_and(|why| why.starts_with("a is named")));
    }
}
