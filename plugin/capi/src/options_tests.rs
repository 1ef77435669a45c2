//! Tests of the options.

use super::*;

fn settings(given: &[(&str, &str)]) -> Result<Settings, String> {
    resolve(given, |_| None).map(|resolved| resolved.settings).map_err(|failure| failure.message)
}

#[test]
fn defaults_are_those_of_the_engine() {
    let Settings { config, log_level } = settings(&[]).unwrap();
    assert_eq!(config, EngineConfig::default());
    assert_eq!(log_level, LevelFilter::INFO);
}

#[test]
fn every_option_reaches_the_configuration() {
    let all = [
        ("lanes", "1,3-5"),
        ("spin_us", "inf"),
        ("assist", "never"),
        ("transports", "tcp"),
        ("strict_writes", "true"),
        ("ptracer", "any"),
        ("rdma_devices", "mlx5_0:2, rxe0"),
        ("rdma_gid_index", "3"),
        ("rdma_service_level", "4"),
        ("rdma_traffic_class", "104"),
        ("rdma_timeout", "18"),
        ("rdma_retry_count", "5"),
        ("rdma_bulk_queue_pairs", "2"),
        ("rdma_stripe_bytes", "64K"),
        ("rdma_relaxed_ordering", "false"),
        ("rdma_on_demand_paging", "true"),
        ("gpu_multiprocessors", "24"),
        ("gpu_copy_engine_bytes", "8M"),
        ("gpu_staging_bytes", "64M"),
        ("gpu_rdma", "peermem"),
        ("listen", "127.0.0.1, ::1"),
        ("interface", "eth0"),
        ("port_range", "18500-18599"),
        ("advertise", "10.0.0.1:0,[::1]:7"),
        ("streams", "4"),
        ("chunk_bytes", "1M"),
        ("latency_bytes", "4096"),
        ("inline_bytes", "0"),
        ("inline_copy_bytes", "2M"),
        ("liveness_ms", "200"),
        ("operation_timeout_ms", "201"),
        ("connect_timeout_ms", "202"),
        ("reconnect_ms", "203"),
        ("linger_ms", "204"),
        ("deregister_timeout_ms", "205"),
        ("stream_idle_ms", "206"),
        ("log_level", "error"),
    ];
    assert_eq!(all.len(), OPTIONS.len(), "an option is not tested");
    let s = settings(&all).unwrap();
    let c = &s.config;
    assert_eq!(c.lanes, LaneSpec::Cores(vec![1, 3, 4, 5]));
    assert_eq!(c.spin, Spin::Forever);
    assert_eq!(c.assist, AssistMode::Never);
    assert_eq!(c.transports, [TransportKind::Tcp]);
    assert!(c.strict_writes && c.any_tracer);
    let rdma = corelane::RdmaConfig {
        devices: vec!["mlx5_0:2".into(), "rxe0".into()],
        gid_index: Some(3),
        service_level: 4,
        traffic_class: 104,
        timeout: 18,
        retry_count: 5,
        bulk_queue_pairs: 2,
        stripe_bytes: 64 << 10,
        relaxed_ordering: false,
        on_demand_paging: true,
    };
    assert_eq!(c.rdma, rdma);
    let gpu = corelane::GpuConfig {
        multiprocessors: 24,
        copy_engine_bytes: 8 << 20,
        staging_bytes: 64 << 20,
        rdma: corelane::GpuRdma::PeerMem,
    };
    assert_eq!(c.gpu, gpu);
    assert_eq!(c.listen.addresses.len(), 2);
    assert_eq!(c.listen.interface.as_deref(), Some("eth0"));
    assert_eq!(c.listen.ports, 18500..=18599);
    assert_eq!(c.listen.advertise[1], "[::1]:7".parse().unwrap());
    assert_eq!((c.streams, c.chunk_bytes, c.latency_bytes, c.inline_bytes), (4, 1 << 20, 4096, 0));
    assert_eq!(c.inline_copy_bytes, 2 << 20);
    let waits = [
        c.liveness,
        c.operation_timeout,
        c.connect_timeout,
        c.reconnect_timeout,
        c.linger,
        c.deregister_timeout,
        c.stream_idle,
    ];
    assert_eq!(waits.map(|wait| wait.as_millis()), [200, 201, 202, 203, 204, 205, 206]);
    assert_eq!(s.log_level, LevelFilter::ERROR);
}

#[test]
fn forms_of_lanes_and_sizes() {
    assert_eq!(lanes("auto:3"), Ok(LaneSpec::Auto { count: 3 }));
    assert_eq!(lanes("unpinned"), Ok(LaneSpec::Unpinned { count: 1 }));
    assert_eq!(lanes("unpinned:2"), Ok(LaneSpec::Unpinned { count: 2 }));
    for wrong in ["", "auto:", "auto:x", "core:1", "3-1", "1,,2", "-1", "0-100000", "1;2"] {
        assert!(lanes(wrong).is_err(), "{wrong}");
    }
    assert_eq!(bytes("3g"), Ok(3 << 30));
    for wrong in ["", "K", "1.5M", "-1", "99999999999G", "1KB", "ß"] {
        assert!(bytes(wrong).is_err(), "{wrong}");
    }
    assert_eq!(ports("7"), Ok(7..=7));
    for wrong in ["", "8-7", "65536", "a-b", "1-2-3"] {
        assert!(ports(wrong).is_err(), "{wrong}");
    }
    for (option, wrong) in [
        ("liveness_ms", "49"),
        ("operation_timeout_ms", "0"),
        ("linger_ms", "86400001"),
        ("streams", "65"),
        ("chunk_bytes", "4095"),
        ("lanes", "auto:0"),
        ("lanes", "1,1"),
    ] {
        let refused = settings(&[(option, wrong)]).unwrap_err();
        assert!(refused.contains(&format!("option `{option}` is `{wrong}`")), "{refused}");
    }
}

#[test]
fn transports_are_those_that_are_named_and_there() {
    use TransportKind::{Local, Rdma, Tcp};
    for (text, kinds) in [
        ("local", vec![Local]),
        ("tcp", vec![Tcp]),
        ("local,tcp", vec![Local, Tcp]),
        (" tcp , local ", vec![Tcp, Local]),
        ("local,rdma,tcp", vec![Local, Rdma, Tcp]),
        ("rdma,local", vec![Rdma, Local]),
        ("rdma", vec![Rdma]),
    ] {
        assert_eq!(settings(&[("transports", text)]).unwrap().config.transports, kinds, "{text}");
    }
    let refusal = |text| settings(&[("transports", text)]).unwrap_err();
    for (wrong, why) in [
        ("udp", "a comma list out of local,rdma,tcp is needed"),
        ("local,,tcp", "a comma list out of local,rdma,tcp is needed"),
        ("tcp,tcp", "tcp is named twice"),
        ("local,tcp, local", "local is named twice"),
    ] {
        assert_eq!(refusal(wrong), format!("option `transports` is `{wrong}`: {why}"));
    }
}

#[test]
fn strict_writes_and_ptracer_are_off_unless_asked_for() {
    let told = |given: &[(&str, &str)], variables: &[(&str, &str)]| {
        let of = |name: &str| variables.iter().find(|(known, _)| *known == name);
        let config = resolve(given, |name| Some(of(name)?.1.to_owned())).unwrap().settings.config;
        (config.strict_writes, config.any_tracer)
    };
    assert_eq!(told(&[], &[]), (false, false));
    assert_eq!(told(&[("strict_writes", "true")], &[]), (true, false));
    assert_eq!(told(&[("ptracer", "any")], &[]), (false, true));
    let variables = [("CORELANE_STRICT_WRITES", "true"), ("CORELANE_PTRACER", "any")];
    assert_eq!(told(&[], &variables), (true, true));
    assert_eq!(told(&[("strict_writes", "false"), ("ptracer", "")], &variables), (false, true));
    assert_eq!(told(&[("strict_writes", ""), ("ptracer", "unchanged")], &variables), (true, false));
    for (option, wrong, allowed) in [
        ("strict_writes", "yes", "true or false"),
        ("strict_writes", "1", "true or false"),
        ("strict_writes", "True", "true or false"),
        ("ptracer", "all", "any or unchanged"),
        ("ptracer", "1234", "any or unchanged"),
        ("ptracer", "true", "any or unchanged"),
    ] {
        let refused = settings(&[(option, wrong)]).unwrap_err();
        assert_eq!(refused, format!("option `{option}` is `{wrong}`: {allowed} is needed"));
    }
}

#[test]
fn the_call_wins_over_the_environment_which_wins_over_the_default() {
    let environment = |name: &str| (name == "CORELANE_STREAMS").then(|| "5".to_owned());
    let streams =
        |given: &[(&str, &str)]| resolve(given, environment).unwrap().settings.config.streams;
    assert_eq!(streams(&[]), 5);
    assert_eq!(streams(&[("streams", "7")]), 7);
    assert_eq!(streams(&[("streams", " ")]), 5, "an empty value says nothing");
    let resolved = resolve(&[("streams", "7"), ("linger_ms", " 5 ")], environment).unwrap();
    assert!(resolved.values.contains(&("streams", "7".into())));
    assert!(resolved.values.contains(&("linger_ms", "5".into())));
    assert_eq!(resolved.values.len(), OPTIONS.len());
}

#[test]
fn what_is_wrong_is_refused_with_its_source_and_what_would_be_right() {
    let unknown = settings(&[("stream", "4")]).unwrap_err();
    assert!(unknown.contains("`stream`") && unknown.contains("streams, chunk_bytes"), "{unknown}");
    let malformed = settings(&[("assist", "sometimes")]).unwrap_err();
    assert!(malformed.contains("auto, always or never"), "{malformed}");
    let environment = |name: &str| (name == "CORELANE_SPIN_US").then(|| "soon".to_owned());
    let from_environment = resolve(&[], environment).err().unwrap().message;
    assert!(from_environment.contains("variable CORELANE_SPIN_US is `soon`"), "{from_environment}");
    assert!(!from_environment.contains("option `spin_us`"), "{from_environment}");
    let told = |explicit| resolve(&[("spin_us", explicit)], environment).err().unwrap().message;
    // It cannot be told whether the caller passes on what it was told of the environment.
    for same in ["soon", " soon "] {
        let told = told(same);
        let either = "option `spin_us`, or environment variable CORELANE_SPIN_US, is `soon`: ";
        assert!(told.starts_with(either), "{told}");
    }
    let other = told("later");
    assert!(other.starts_with("option `spin_us` is `later`: "), "{other}");
}

#[test]
fn the_level_is_understood_whatever_else_is_not() {
    let environment = |name: &str| match name {
        "CORELANE_LOG_LEVEL" => Some("debug".to_owned()),
        "CORELANE_STREAMS" => Some("many".to_owned()),
        _ => None,
    };
    let wrong = [("stream", "4"), ("assist", "sometimes")];
    assert_eq!(level_of(&wrong, environment), Some(LevelFilter::DEBUG));
    assert_eq!(level_of(&[("log_level", "off"), wrong[0]], environment), Some(LevelFilter::OFF));
    assert_eq!(level_of(&[("log_level", "loud")], environment), None);
    assert_eq!(level_of(&wrong, |_| None), Some(LevelFilter::INFO));
}

#[test]
fn mistyped_variables_are_noticed() {
    let names = ["CORELANE_STREAM", "CORELANE_STREAMS", "CORELANE_NO_INSTALL", "HOME"];
    let strange: Vec<_> = strange_variables(names.into_iter().map(str::to_owned)).collect();
    assert_eq!(strange, ["CORELANE_STREAM"]);
}
