use super::*;
use crate::case::Memory;
use clap::CommandFactory as _;

fn measure(options: &[&str]) -> MeasureArgs {
    let words = ["corelane-bench", "loopback"].iter().chain(options);
    match Cli::try_parse_from(words).expect("valid options").command {
        Command::Loopback(arguments) => arguments.measure,
        other => panic!("parsed as {other:?}"),
    }
}

fn error(options: &[&str]) -> String {
    let words = ["corelane-bench"].iter().chain(options);
    one_line(&Cli::try_parse_from(words).expect_err("these options are bad"))
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn defaults_measure_everything_within_the_budget() {
    let plan = measure(&[]).plan().expect("a plan");
    assert_eq!(plan.cases.len(), 22 + 4 + 2 + 4);
    assert_eq!((plan.rounds, plan.baselines.len()), (5, 0));
    let planned = plan.template.duration * (plan.cases.len() * plan.rounds) as u32;
    assert!(planned <= Duration::from_secs(61), "{planned:?}");
    let compared = measure(&["--baseline", "raw-tcp"]).plan().expect("a plan");
    assert_eq!(compared.backends(), [Backend::Corelane, Backend::RawTcp]);
    assert!(compared.template.duration < plan.template.duration);
}

#[test]
fn several_baselines_share_the_rounds() {
    let all = [Backend::Corelane, Backend::RawTcp, Backend::RawCma, Backend::RawMemcpy];
    for options in [
        &["--baseline", "raw-tcp,raw-cma,raw-memcpy"][..],
        &["--baseline", "raw-tcp,raw-cma", "--baseline", "raw-memcpy"],
    ] {
        assert_eq!(measure(options).plan().expect("a plan").backends(), all);
    }
    let alone = measure(&["--backend", "raw-cma"]).plan().expect("a plan");
    assert_eq!(alone.backends(), [Backend::RawCma]);
}

#[test]
fn transports_memory_and_lanes_reach_the_run() {
    let run = measure(&["--memory", "engine", "--lanes", "3"]).plan().expect("a plan").template;
    assert_eq!(
        (run.transports, run.memory, run.lanes),
        (vec!["tcp".to_owned()], Memory::Engine, 3)
    );
    let run = measure(&[]).plan().expect("a plan").template;
    assert_eq!((run.memory, run.lanes), (Memory::Registered, 1));
}

#[test]
fn options_replace_the_defaults() {
    let options = measure(&[
        "--scenario",
        "kv,sizes",
        "--operation",
        "read",
        "--sizes",
        "64,8KiB",
        "--kv",
        "16x1KiB",
        "--rate",
        "10k",
        "--app",
        "lane",
        "--duration",
        "100ms",
        "--spin",
        "inf",
    ]);
    let plan = options.plan().expect("a plan");
    let ids: Vec<String> = plan.cases.iter().map(crate::case::Case::id).collect();
    assert_eq!(ids, ["read/64B", "read/8KiB", "kv/read/16x1KiB"]);
    assert_eq!(plan.template.rate, Some(10_000.0));
    assert_eq!(plan.template.duration, Duration::from_millis(100));
}

#[test]
fn bad_options_give_one_line_that_names_the_option() {
    for (options, expected) in [
        (&["loopback", "--sizes", "64,huge"][..], "--sizes"),
        (&["loopback", "--scenario", "everything"], "everything"),
        (&["loopback", "--rate", "fast"], "--rate"),
        (&["loopback", "--engines", "3"], "engines come in pairs"),
        (&["loopback", "--server-cores", "5-2"], "--server-cores"),
        (&["loopback", "--spin", "soon"], "--spin"),
        (&["loopback", "--notification", "8"], "between 32"),
        (&["loopback", "--duration", "5"], "needs a unit"),
        (&["loopback", "--transport", "carrier-pigeon"], "--transport"),
        (&["loopback", "--transport", "tcp,carrier-pigeon"], "carrier-pigeon"),
        (&["loopback", "--baseline", "raw-tcp,raw-pigeon"], "raw-pigeon"),
        (&["loopback", "--memory", "borrowed"], "--memory"),
        (&["loopback", "--lanes", "0"], "1 to 256"),
        (&["loopback", "--rounds", "0"], "--rounds"),
        (&["loopback", "--frobnicate"], "--frobnicate"),
        (&["client"], "--connect"),
        (&["server", "--listen", "nowhere"], "--listen"),
        (&["measure"], "measure"),
    ] {
        let line = error(options);
        assert!(line.contains(expected), "{options:?}: {line}");
        assert!(!line.contains('\n') && line.starts_with("corelane-bench: "), "{line}");
    }
}

#[test]
fn contradictions_are_found_before_anything_starts() {
    let plan = |options: &[&str]| measure(options).plan();
    assert!(
        plan(&["--backend", "raw-tcp", "--baseline", "raw-tcp"])
            .expect_err("itself")
            .contains("itself")
    );
    for (options, expected) in [
        (&["--baseline", "raw-cma,corelane"][..], "itself"),
        (&["--baseline", "raw-cma,raw-tcp,raw-cma"], "names raw-cma twice"),
        (&["--transport", "tcp,tcp"], "names tcp twice"),
    ] {
        let message = plan(options).expect_err("a contradiction");
        assert!(message.contains(expected), "{options:?}: {message}");
    }
    let too_large = plan(&["--sizes", "1GiB", "--max-memory", "64MiB"]).expect_err("too large");
    assert!(too_large.contains("--max-memory"), "{too_large}");
}
