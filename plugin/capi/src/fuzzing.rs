//! A fuzz target for what operators and callers write: options as text. Not part of the API: only with feature `fuzzing`,
//! for the crate in `fuzz/`, and in this crate's tests, which run the inputs of `fuzz/corpus/`.

use corelane::LaneSpec;

use crate::options::{level_of, resolve};

/// Lines `NAME=VALUE`, those after an empty line from the environment. What is accepted is within the bounds that the options
/// state, and means the same when it is given back.
pub fn options(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (call, environment) = text.split_once("\n\n").unwrap_or((text, ""));
    let given: Vec<(&str, &str)> =
        call.lines().filter_map(|line| line.split_once('=')).take(64).collect();
    let variable = |name: &str| {
        let named = |line: &str| {
            Some(line.split_once('=')?.1.to_owned()).filter(|_| line.starts_with(name))
        };
        environment.lines().find_map(named)
    };
    let level = level_of(&given, variable);
    let Ok(resolved) = resolve(&given, variable) else { return };
    let settings = resolved.settings;
    assert_eq!(level, Some(settings.log_level));
    let config = &settings.config;
    assert!((1..=64).contains(&config.streams));
    assert!((4 << 10..=16 << 20).contains(&config.chunk_bytes));
    let lanes = match &config.lanes {
        LaneSpec::Auto { count } | LaneSpec::Unpinned { count } => *count,
        LaneSpec::Cores(cores) => cores.len(),
    };
    assert!((1..=256).contains(&lanes));
    assert!(config.liveness.as_millis() >= 50 && config.liveness.as_secs() <= 86_400);
    assert!(config.rdma.service_level <= 15 && config.rdma.retry_count <= 6);
    assert!((1..=31).contains(&config.rdma.timeout));
    assert!((1..=3).contains(&config.transports.len()));
    assert!(!config.listen.ports.is_empty());
    let values: Vec<(&str, &str)> =
        resolved.values.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let Ok(again) = resolve(&values, |_| None) else {
        panic!("refused when given back: {values:?}")
    };
    assert_eq!(again.settings, settings);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_of_the_corpus_is_answered() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/options");
        let mut inputs = 0;
        for input in std::fs::read_dir(corpus).unwrap() {
            let path = input.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            let outcome = std::panic::catch_unwind(|| options(&bytes));
            assert!(outcome.is_ok(), "{}", path.display());
            inputs += 1;
        }
        assert!(inputs > 0);
    }
}
