//! Backends as the command line names them: `UCX@UCX_TLS=tcp,sm,ucx_error_handling_mode=none`.

use std::fmt;
use std::str::FromStr;

use super::case::{NixlCase, NixlScenario};
use crate::raw_local::RawKind;

/// A backend of NIXL with what it is configured by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BackendSpec {
    /// As written by the user; names it in tables and files.
    pub(crate) label: String,
    /// As NIXL knows it.
    pub(crate) name: String,
    /// Environment variables of its processes.
    pub(crate) environment: Vec<(String, String)>,
    /// Parameters that it is created with.
    pub(crate) parameters: Vec<(String, String)>,
}

impl BackendSpec {
    /// Ours, as it is by default.
    pub(crate) fn corelane() -> Self {
        let name = "CORELANE".to_owned();
        Self { label: name.clone(), name, environment: Vec::new(), parameters: Vec::new() }
    }

    /// Whether the target's backend serves transfers while its application sleeps. A backend of which this is not
    /// known gets a polling application.
    pub(crate) fn serves_alone(&self) -> bool {
        self.name == "CORELANE"
    }
}

impl FromStr for BackendSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, variables) = match text.split_once('@') {
            None => (text, None),
            Some((name, variables)) => (name, Some(variables)),
        };
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || !name.chars().all(known) {
            return Err(format!("'{name}' is no backend's name: expected NAME[@KEY=VALUE,...]"));
        }
        let mut settings: Vec<(String, String)> = Vec::new();
        for piece in variables.into_iter().flat_map(|variables| variables.split(',')) {
            match (piece.split_once('='), settings.last_mut()) {
                (Some((variable, value)), _) if !variable.is_empty() => {
                    settings.push((variable.to_owned(), value.to_owned()));
                }
                // A value may hold commas: what has no `=` of its own goes on with the value before it.
                (None, Some((_, value))) => *value = format!("{value},{piece}"),
                _ => return Err(format!("'{piece}' is not KEY=VALUE")),
            }
        }
        // Environment variables are in capitals; parameters of NIXL's backends are not.
        let (environment, parameters) =
            settings.into_iter().partition(|(key, _)| !key.contains(|c: char| c.is_lowercase()));
        Ok(Self { label: text.to_owned(), name: name.to_owned(), environment, parameters })
    }
}

impl fmt::Display for BackendSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

/// What is measured in a round: a backend of NIXL, or a baseline beside them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    Nixl(BackendSpec),
    Raw(RawKind),
}

impl Contender {
    /// Whether the case is one that it can run: preparing, posting and what runs at the same time are NIXL's.
    pub(crate) fn runs(&self, case: &NixlCase) -> bool {
        // A bare copy is over when it was posted: nothing can run beside it.
        let of_nixl = [NixlScenario::Post, NixlScenario::DecodeUnderPrefill, NixlScenario::Trace];
        matches!(self, Self::Nixl(_)) || !of_nixl.contains(&case.scenario)
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nixl(spec) => spec.fmt(f),
            Self::Raw(kind) => kind.fmt(f),
        }
    }
}

/// Parses `KEY=VALUE`.
pub(crate) fn parse_parameter(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(text: &str) -> Vec<(String, String)> {
        text.parse::<BackendSpec>().expect("parses").environment
    }

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    #[test]
    fn a_backend_may_carry_environment_variables() {
        let spec: BackendSpec = "UCX@UCX_TLS=tcp".parse().expect("parses");
        assert_eq!((spec.name.as_str(), spec.label.as_str()), ("UCX", "UCX@UCX_TLS=tcp"));
        assert_eq!(spec.environment, [pair("UCX_TLS", "tcp")]);
        assert_eq!(environment("CORELANE"), []);
        assert_eq!(environment("A@X=1,Y="), [pair("X", "1"), pair("Y", "")]);
    }

    #[test]
    fn keys_in_small_letters_are_parameters() {
        let spec: BackendSpec = "UCX@UCX_TLS=tcp,sm,num_workers=2,A=b".parse().expect("parses");
        assert_eq!(spec.environment, [pair("UCX_TLS", "tcp,sm"), pair("A", "b")]);
        assert_eq!(spec.parameters, [pair("num_workers", "2")]);
    }

    #[test]
    fn values_may_hold_commas_and_equal_signs() {
        assert_eq!(
            environment("UCX@UCX_TLS=tcp,sm,UCX_LOG_LEVEL=error,K=a=b"),
            [pair("UCX_TLS", "tcp,sm"), pair("UCX_LOG_LEVEL", "error"), pair("K", "a=b")]
        );
    }

    #[test]
    fn what_is_no_backend_is_refused() {
        for text in ["", "@A=1", "UCX@", "UCX@A", "UCX@=1", "U CX", "UCX;rm"] {
            assert!(text.parse::<BackendSpec>().is_err(), "{text}");
        }
    }

    #[test]
    fn parameters_are_pairs() {
        assert_eq!(parse_parameter("lanes=auto:2"), Ok(pair("lanes", "auto:2")));
        assert_eq!(parse_parameter("interface="), Ok(pair("interface", "")));
        assert!(parse_parameter("lanes").is_err() && parse_parameter("=1").is_err());
    }

    #[test]
    fn only_a_backend_that_serves_by_itself_may_sleep() {
        let alone = |text: &str| text.parse::<BackendSpec>().expect("parses").serves_alone();
        assert!(alone("CORELANE") && alone("CORELANE@CORELANE_LANES=0"));
        assert!(!alone("UCX") && !alone("LIBFABRIC"));
    }
}
