use super::*;
use clap::Parser;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    nixl: NixlArgs,
}

fn parse(options: &str) -> Result<NixlArgs, String> {
    let words = std::iter::once("nixl").chain(options.split_whitespace());
    Line::try_parse_from(words).map(|line| line.nixl).map_err(|error| error.to_string())
}

fn plan(options: &str) -> Result<NixlPlan, String> {
    parse(options).expect("parses").plan()
}

#[test]
fn the_defaults_measure_everything() {
    let plan = plan("--vs UCX@UCX_TLS=tcp").expect("a plan");
    let ids: Vec<String> = plan.cases.iter().map(NixlCase::id).collect();
    assert_eq!(ids.len(), 2 * 4 + 2 * 2 + 1 + 2 + 1, "{ids:?}");
    let labels: Vec<String> = plan.backends.iter().map(ToString::to_string).collect();
    assert_eq!(labels, ["CORELANE", "UCX@UCX_TLS=tcp"]);
    assert_eq!(plan.arena_bytes, (64 << 20) + 64 * 4096 + 4096);
}

#[test]
fn a_sweep_is_that_of_nixlbench() {
    let ids = |options: &str| -> Vec<String> {
        plan(options).expect("a plan").cases.iter().map(NixlCase::id).collect()
    };
    let options = "--op_type READ --start_block_size 4096 --max_block_size 16384 --start_batch_size 1 --max_batch_size 2 \
                   --num_iter 10 --warmup_iter 5 --num_threads 1 --initiator_seg_type DRAM --target_seg_type DRAM --check_consistency";
    assert_eq!(
        ids(options),
        [
            "read/4KiB",
            "read/8KiB",
            "read/16KiB",
            "kv/read/2x4KiB",
            "kv/read/2x8KiB",
            "kv/read/2x16KiB"
        ]
    );
    assert_eq!(ids("--op_type write --start_block_size 1048576"), ["write/1MiB"]);
    assert_eq!(
        ids("--scenario kv --op read --model llama-3.1-8b --sequence-length 64"),
        ["kv/read/256x32KiB"]
    );
}

#[test]
fn threads_have_cores_in_turn_and_the_targets_last() {
    let cores = |options: &str, allowed: &[usize]| {
        parse(&format!("--scenario sizes {options}")).expect("parses").thread_cores(allowed)
    };
    assert!(cores("", &[0, 1]).is_empty());
    assert_eq!(cores("--num_threads 3", &[0, 1]), [0, 1, 0]);
    assert_eq!(cores("--num_threads 4 --pin target=0", &[0, 1, 2, 3]), [1, 2, 3, 0]);
    assert_eq!(cores("--num_threads 3 --pin initiator=2,target=0", &[0, 1, 2]), [2, 1, 0]);
    assert_eq!(cores("--num_threads 2 --pin target=5", &[5]), [5, 5]);
    let plan = plan("--num_threads 4 --start_block_size 4096").expect("a plan");
    assert!(plan.cases.iter().all(|case| case.threads == 4));
}

#[test]
fn pins_name_a_side_each() {
    let pin = |initiator, target| Ok(Pin { initiator, target });
    assert_eq!("none".parse(), pin(None, None));
    assert_eq!("initiator=0,target=1".parse(), pin(Some(0), Some(1)));
    assert_eq!("target=3".parse(), pin(None, Some(3)));
    for text in ["", "0", "initiator", "initiator=x", "lane=1", "target=1,target=2"] {
        assert!(text.parse::<Pin>().is_err(), "{text}");
    }
}

#[test]
fn bare_copies_have_no_environment_of_their_own() {
    let options = parse("--plugin-dir /a").expect("parses");
    let ours = Contender::Nixl(options.choice.backends()[0].clone());
    assert!(!options.environment(&ours).is_empty());
    assert_eq!(options.environment(&Contender::Raw(RawKind::RawCma)), []);
}

#[test]
fn who_sleeps_depends_on_option_and_backend() {
    let spec = |text: &str| Contender::Nixl(text.parse().expect("parses"));
    use NixlTargetApp::{Poll, Sleep, SleepAll};
    assert!(!Poll.sleeps(&spec("CORELANE")) && !Sleep.sleeps(&spec("UCX")));
    assert!(Sleep.sleeps(&spec("CORELANE")) && SleepAll.sleeps(&spec("UCX")));
    assert!(Poll.sleeps(&Contender::Raw(RawKind::RawMemcpy)));
}

#[test]
fn baselines_come_last_and_leave_scenario_post_out() {
    let plan = plan("--vs UCX --vs UCX@UCX_TLS=tcp --baseline raw-cma,raw-memcpy").expect("a plan");
    let labels: Vec<String> = plan.backends.iter().map(ToString::to_string).collect();
    assert_eq!(labels, ["CORELANE", "UCX", "UCX@UCX_TLS=tcp", "raw-cma", "raw-memcpy"]);
    let runs =
        |backend: usize| plan.cases.iter().filter(|case| plan.backends[backend].runs(case)).count();
    assert_eq!((runs(0), runs(3)), (plan.cases.len(), plan.cases.len() - 3));
}

#[test]
fn contradictions_are_found_before_anything_starts() {
    for (options, expected) in [
        ("--vs CORELANE", "named twice"),
        ("--vs UCX --vs UCX", "named twice"),
        ("--baseline raw-cma --baseline raw-cma", "named twice"),
        ("--sizes 1GiB --max-memory 64MiB", "--max-memory"),
        ("--nixl-libs /nowhere/at/all", "--nixl-libs"),
        ("--plugin-dir /nowhere/at/all", "--plugin-dir"),
        ("--num_threads 2", "--num_threads 2 is for --scenario sizes,kv"),
        ("--num_threads 2 --scenario sizes,notify", "--num_threads"),
        ("--num_threads 2 --scenario sizes --baseline raw-cma", "--baseline"),
        ("--scenario trace", "--trace FILE"),
        ("--trace /nowhere.csv", "--scenario trace"),
        ("--scenario trace --trace /nowhere.csv", "/nowhere.csv"),
        ("--baseline raw-gpu", "raw-gpu"),
        ("--initiator_seg_type VRAM --baseline raw-cma", "raw-gpu"),
        ("--initiator_seg_type VRAM --gpus 4000", "GPU"),
        ("--start_block_size 8192 --max_block_size 4096", "--max_block_size"),
    ] {
        let message = plan(options).expect_err(options);
        assert!(message.contains(expected), "{options}: {message}");
    }
    for options in [
        "--backend @A=1",
        "--param x",
        "--baseline raw-tcp",
        "--pin 3",
        "--notification 8",
        "--rounds 0",
        "--scenario everything",
        "--target-app snore",
        "--op sideways",
        "--model gpt-9",
        "--start_block_size 12parsecs",
        "--num_iter 0",
        "--num_threads 0",
        "--num_threads 65",
        "--trace-speed 0",
        "--format xml",
        "--sabotage rare",
        "--target_seg_type BLK",
    ] {
        assert!(parse(options).is_err(), "{options}");
    }
}
