use super::*;

pub(crate) fn options() -> CaseOptions {
    CaseOptions {
        scenarios: vec![Scenario::Throughput, Scenario::Sizes, Scenario::Kv, Scenario::Notify],
        operations: vec![Operation::Read, Operation::Write],
        sizes: vec![64, 4096],
        shapes: vec![(256, 16 << 10)],
        notification_bytes: 32,
        throughput_sizes: vec![64 << 10],
        window: 16,
        decode_bytes: 4096,
        load: LoadShape { reads_per_s: 1000, bulk_bytes: 1 << 20 },
    }
}

/// A closed-loop run of `case` on the engine.
pub(crate) fn spec(case: Case) -> RunSpec {
    RunSpec {
        case,
        backend: Backend::Corelane,
        run: 0,
        duration: Duration::from_millis(1),
        min_ops: 1,
        rate: None,
        seed: 42,
        app: App::Thread,
        target_app: TargetApp::Sleep,
        transports: vec!["tcp".to_owned()],
        rdma_devices: Vec::new(),
        server_rdma_devices: Vec::new(),
        memory: Memory::Registered,
        gpus: [0, 0],
        lanes: 1,
        spin: None,
        burn: false,
        sabotage: None,
    }
}

#[test]
fn ids_are_readable_and_unique() {
    let ids: Vec<String> = cases(&options()).iter().map(Case::id).collect();
    assert_eq!(
        ids,
        [
            "read/64B",
            "read/4KiB",
            "write/64B",
            "write/4KiB",
            "kv/read/256x16KiB",
            "kv/write/256x16KiB",
            "notify/32B",
            "write+notify/4KiB",
            "throughput/read/64KiB/w16",
            "throughput/write/64KiB/w16",
        ]
    );
}

#[test]
fn repeated_options_do_not_repeat_cases() {
    let mut twice = options();
    twice.scenarios = vec![Scenario::Sizes, Scenario::Sizes];
    twice.sizes = vec![64, 64];
    assert_eq!(cases(&twice).len(), 2);
}

#[test]
fn small_cases_verify_every_operation_and_windows_never_share_a_slot() {
    for case in cases(&options()) {
        assert!(case.slots() >= case.window, "{}", case.id());
        if case.scenario == Scenario::Sizes {
            assert!(case.slots() >= 256 && case.plain_ops_per_pass() == 0, "{}", case.id());
        }
    }
}

#[test]
fn contents_differ_between_runs_and_passes() {
    let case = cases(&options()).remove(0);
    let spec = |run| RunSpec { run, ..spec(case.clone()) };
    assert_ne!(spec(0).sequence(1), spec(1).sequence(1));
    assert_ne!(spec(0).sequence(1), spec(0).sequence(2));
    assert_ne!(spec(0).sequence(0), 0);
    assert_eq!(spec(0).validate(1 << 20), Ok(()));
}

#[test]
fn runs_that_make_no_sense_are_refused() {
    let good = Case {
        scenario: Scenario::Kv,
        operation: Operation::Read,
        blocks: 4096,
        block_bytes: 4096,
        window: 1,
        notification_bytes: 0,
        load: None,
    };
    assert_eq!(spec(good.clone()).validate(64 << 20), Ok(()));
    assert!(spec(good.clone()).validate(16 << 20).is_err(), "the pool is twice as large");
    for bad in [
        Case { window: 0, ..good.clone() },
        Case { window: usize::MAX, ..good.clone() },
        Case { blocks: 0, ..good.clone() },
        Case { blocks: usize::MAX, ..good.clone() },
        Case { block_bytes: usize::MAX, ..good.clone() },
        Case { block_bytes: usize::MAX / 2, ..good.clone() },
        Case { notification_bytes: 1 << 30, ..good.clone() },
        Case { operation: Operation::Notify, ..good.clone() },
        Case { load: Some(LoadShape { reads_per_s: 1, bulk_bytes: 64 << 20 }), ..good.clone() },
    ] {
        assert!(spec(bad.clone()).validate(64 << 20).is_err(), "{bad:?}");
    }
    let rate = RunSpec { rate: Some(f64::NAN), ..spec(good) };
    assert!(rate.validate(64 << 20).is_err());
}
