//! Options of an engine.

use std::ffi::CStr;

use crate::api::*;

/// Every option as the library lists it: name, default, description.
fn listed() -> Vec<[String; 3]> {
    (0..corelane_option_count())
        .map(|index| {
            let mut info = corelane_option_info {
                name: std::ptr::null(),
                default_value: std::ptr::null(),
                description: std::ptr::null(),
            };
            ok(c!(corelane_option_at(index, &raw mut info)));
            [info.name, info.default_value, info.description].map(|text| {
                // SAFETY: strings that live as long as the process.
                unsafe { CStr::from_ptr(text) }.to_str().unwrap().to_owned()
            })
        })
        .collect()
}

/// Panics unless no engine is made, and the message has all these words.
#[track_caller]
fn assert_refused(options: &[(&str, &str)], words: &[&str]) {
    let mut engine = 7;
    let status = try_create(b"near", options, &mut engine);
    assert_eq!((status, engine), (CORELANE_ERR_CONFIG, 0), "{options:?}: {}", last_error());
    for word in words {
        assert!(last_error().contains(word), "{options:?} without `{word}`: {}", last_error());
    }
}

#[test]
fn every_option_is_listed_with_default_and_description() {
    let options = listed();
    let names: Vec<&str> = options.iter().map(|[name, _, _]| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "lanes",
            "spin_us",
            "assist",
            "transports",
            "strict_writes",
            "ptracer",
            "rdma_devices",
            "rdma_gid_index",
            "rdma_service_level",
            "rdma_traffic_class",
            "rdma_timeout",
            "rdma_retry_count",
            "rdma_bulk_queue_pairs",
            "rdma_stripe_bytes",
            "rdma_relaxed_ordering",
            "rdma_on_demand_paging",
            "gpu_multiprocessors",
            "gpu_copy_engine_bytes",
            "gpu_staging_bytes",
            "gpu_rdma",
            "listen",
            "interface",
            "port_range",
            "advertise",
            "streams",
            "chunk_bytes",
            "latency_bytes",
            "inline_bytes",
            "inline_copy_bytes",
            "liveness_ms",
            "operation_timeout_ms",
            "connect_timeout_ms",
            "reconnect_ms",
            "linger_ms",
            "deregister_timeout_ms",
            "stream_idle_ms",
            "log_level",
        ]
    );
    for [name, _, description] in &options {
        assert!(!description.is_empty(), "{name}");
    }
    for beyond in [options.len(), usize::MAX] {
        let mut info = [7usize; 3];
        let status = c!(corelane_option_at(beyond, info.as_mut_ptr().cast()));
        refused(status, CORELANE_ERR_NOT_FOUND);
        assert_eq!(info, [7; 3]);
    }
}

#[test]
fn an_engine_says_which_values_are_in_effect() {
    let given = [
        ("lanes", "unpinned:2"),
        ("spin_us", "inf"),
        ("assist", "never"),
        ("transports", "rdma,tcp"),
        ("strict_writes", "true"),
        ("ptracer", ""),
        ("streams", " 3 "),
        ("chunk_bytes", "128K"),
        ("latency_bytes", ""),
        ("liveness_ms", "500"),
        ("log_level", "off"),
    ];
    let engine = Engine::with("near", &given);
    for (name, value) in given {
        let expected = match value.trim() {
            "" if name == "ptracer" => "unchanged",
            "" => "64K",
            value => value,
        };
        assert_eq!(engine.option(name), expected, "{name}");
    }
    assert_eq!(engine.stats().lanes, 2);
    for [name, default, _] in listed() {
        if !given.iter().any(|(known, _)| *known == name) && name != "listen" {
            assert_eq!(engine.option(&name), default, "{name}");
        }
    }
    assert_eq!(engine.option("listen"), "127.0.0.1");
    let mut len = 7;
    for unknown in [c"", c"Lanes", c"lanes ", c"no_such_option"] {
        let status = c!(corelane_get_option(
            engine.0,
            unknown.as_ptr(),
            std::ptr::null_mut(),
            0,
            &raw mut len
        ));
        refused(status, CORELANE_ERR_NOT_FOUND);
    }
}

#[test]
fn an_unknown_option_is_refused_with_the_list_of_all() {
    let all = listed();
    let names: Vec<&str> = all.iter().map(|[name, _, _]| name.as_str()).collect();
    for unknown in ["lane", "", " lanes", "LANES", "spin_us\n", "CORELANE_LANES", "käse"] {
        for value in ["1", ""] {
            assert_refused(&[(unknown, value)], &names);
            assert_refused(&[("streams", "2"), (unknown, value)], &[unknown]);
        }
    }
}

#[test]
fn a_malformed_value_is_refused_with_what_is_valid() {
    let size = "64K";
    let number = "number";
    let bad: &[(&str, &[&str], &[&str])] = &[
        (
            "lanes",
            &["two", "auto:", "auto:x", "1-", "-", "3-1", "0-9999999", "pinned:2", "1;2"],
            &["auto", "unpinned", "2,4-6"],
        ),
        ("spin_us", &["-1", "soon", "1.5", "10us", "infinite"], &["microseconds", "inf"]),
        ("assist", &["maybe", "AUTO", "on"], &["auto", "always", "never"]),
        ("transports", &["udp", "tcp,udp", ",", "tcp,tcp", "TCP", "tcp;rdma"], &["tcp"]),
        ("transports", &["locale", "local tcp", "Local", "local,"], &["local,rdma,tcp"]),
        ("strict_writes", &["yes", "1", "TRUE", "true,false"], &["true or false"]),
        ("ptracer", &["yes", "1", "Any", "all"], &["any or unchanged"]),
        ("rdma_devices", &["mlx5_99", "rxe0:x", "no:1"], &["rdma_devices"]),
        ("rdma_gid_index", &["x", "-1", "256"], &["auto"]),
        ("rdma_service_level", &["x", "16"], &["0 to 15"]),
        ("rdma_traffic_class", &["x", "256"], &["0 to 255"]),
        ("rdma_timeout", &["0", "32", "1s"], &["1 to 31"]),
        ("rdma_retry_count", &["7", "-1"], &["0 to 6"]),
        ("rdma_bulk_queue_pairs", &["0", "17"], &["1 to 16"]),
        ("rdma_stripe_bytes", &["1K", "2G", "x"], &[]),
        ("rdma_relaxed_ordering", &["yes"], &["true or false"]),
        ("rdma_on_demand_paging", &["1"], &["true or false"]),
        ("gpu_multiprocessors", &["0", "1025", "-1", "all"], &["1 to 1024"]),
        ("gpu_copy_engine_bytes", &["1K", "2T", "x"], &[]),
        ("gpu_staging_bytes", &["4M", "2G", "x"], &[]),
        ("gpu_rdma", &["true", "dmabuf,peermem", "DMABUF"], &["auto, dmabuf, peermem or off"]),
        ("listen", &["localhost", "1.2.3", "127.0.0.1:80", "::1::"], &["IP address"]),
        ("port_range", &["x", "5-1", "1-70000", "-1", "65536", "1-2-3"], &[]),
        ("advertise", &["10.0.0.1", "host:80", "10.0.0.1:99999"], &["ADDRESS:PORT"]),
        ("streams", &["x", "-1", "1.0", "0", "65", "99999999999999999999"], &[]),
        ("chunk_bytes", &["x", "-1", "4KB", "K", "99999999999G", "1", "1G", "0x1000"], &[]),
        ("latency_bytes", &["x", "-1", "64 KiB", "1e6"], &[size]),
        ("inline_bytes", &["x", "-1", "64k!"], &[size]),
        ("inline_copy_bytes", &["x", "-1", "1MiB"], &[size]),
        ("liveness_ms", &["x", "-1", "49", "0", "1s"], &[]),
        ("operation_timeout_ms", &["x", "-1", "0", "99999999999999"], &[]),
        ("connect_timeout_ms", &["x", "-1", "0", "99999999999999"], &[]),
        ("reconnect_ms", &["x", "-1", "0", "99999999999999"], &[]),
        ("linger_ms", &["x", "-1", "1.5"], &[number]),
        ("deregister_timeout_ms", &["x", "-1", "never"], &[number]),
        ("stream_idle_ms", &["x", "-1", "never"], &[number]),
        ("log_level", &["loud", "INFO", "3"], &["off", "error", "warn", "info", "debug", "trace"]),
    ];
    for (name, values, valid) in bad {
        for value in *values {
            assert_refused(&[(name, value)], valid);
            // Which of the options it was.
            let stem = name.trim_end_matches("_ms").trim_end_matches("_bytes");
            assert!(last_error().contains(stem), "{name}={value}: {}", last_error());
        }
    }
    assert_refused(&[("interface", "no-such-nic")], &["no-such-nic"]);
}

#[test]
fn the_last_of_repeated_options_counts() {
    let engine = Engine::with("near", &[("streams", "3"), ("streams", "5"), ("streams", "")]);
    assert_eq!(engine.option("streams"), "5");
    assert_refused(&[("streams", "3"), ("streams", "x")], &["streams"]);
}

#[test]
fn a_port_in_use_and_a_core_that_is_not_ours_are_told_apart() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut engine = 7;
    let status = try_create(b"near", &[("port_range", &port)], &mut engine);
    refused(status, CORELANE_ERR_IO);
    assert!(last_error().contains(&port), "{}", last_error());
    assert_eq!(engine, 0);
    let status = try_create(b"near", &[("lanes", "1023")], &mut engine);
    refused(status, CORELANE_ERR_LANE);
    assert!(last_error().contains("1023"), "{}", last_error());
    assert_eq!(engine, 0);
}
