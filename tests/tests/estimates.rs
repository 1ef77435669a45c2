//! How long transfers are expected to take; and options that only show in who does something and when it is given up:
//! `inline_bytes` (see also `inline_bytes.rs`), `reconnect_timeout`.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use corelane::{
    Access, AssistMode, Engine, EngineConfig, LocalBlocks, Operation, Peer, Plan, Region,
    RegionDescriptor, RemoteBlocks,
};
use corelane_tests::{
    BOUND, Buffer, Configuration, Passing, Proxy, end_of, engine_on_a_known_port, eventually, kind,
    local_config, outcome, over_each_transport, rounds, target, tcp_config,
};

over_each_transport!(
    an_estimate_is_between_what_memory_allows_and_the_longest_that_was_seen,
    a_size_that_was_never_moved_is_estimated_from_its_neighbours,
    a_shape_borrows_the_history_of_another_until_it_has_its_own,
    a_peer_that_has_restarted_has_no_history,
    transfers_of_any_inline_size_move_the_same_bytes,
);

const LEN: usize = 16 << 20;
const BLOCK: u64 = 4096;

struct Near {
    memory: Buffer,
    region: Region,
    engine: Engine,
}

impl Near {
    fn new(config: EngineConfig) -> Self {
        let engine = Engine::new("near", config).unwrap();
        let memory = Buffer::new(LEN);
        let region = memory.register(&engine, Access::LOCAL);
        Self { memory, region, engine }
    }

    fn plan(&self, peer: &Peer, there: &RegionDescriptor, what: Shape) -> Plan {
        let Shape { operation, bytes, scattered } = what;
        if !scattered {
            let (local, remote) = ([self.region.segment(0, bytes)], [there.segment(0, bytes)]);
            return self.engine.prepare(operation, peer, &local, &remote).unwrap();
        }
        // Every second block: no two of them are neighbours.
        let indices: Vec<u32> = (0..(bytes / BLOCK) as u32).map(|i| i * 2).collect();
        let blocks = LocalBlocks {
            base: self.memory.address(0),
            stride: BLOCK,
            block_bytes: BLOCK,
            indices: &indices,
        };
        let remote = RemoteBlocks {
            region: there,
            base: there.segment(0, 1).addr,
            stride: BLOCK,
            block_bytes: BLOCK,
            indices: &indices,
        };
        self.engine.prepare_blocks(operation, peer, &blocks, &remote).unwrap()
    }
}

/// A configuration, changed.
fn changed(config: Configuration, change: impl FnOnce(&mut EngineConfig)) -> EngineConfig {
    let mut config = config();
    change(&mut config);
    config
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    operation: Operation,
    bytes: u64,
    scattered: bool,
}

const fn read(bytes: u64) -> Shape {
    Shape { operation: Operation::Read, bytes, scattered: false }
}

const SHAPES: [Shape; 7] = [
    read(64),
    read(16 << 10),
    read(1 << 20),
    read(8 << 20),
    Shape { scattered: true, ..read(1 << 20) },
    Shape { scattered: true, ..read(8 << 20) },
    Shape { operation: Operation::Write, ..read(4 << 20) },
];

/// Posts so many times; the longest that one took, as its caller saw it.
fn longest(plan: &Plan, times: usize) -> Duration {
    let transfer = plan.transfer();
    let took = (0..times).map(|_| {
        let start = Instant::now();
        end_of(&transfer).unwrap();
        start.elapsed()
    });
    took.max().unwrap()
}

/// No memory is faster, bytes per nanosecond.
const FASTEST: u64 = 1000;

#[test]
fn nothing_is_estimated_before_a_transfer_has_ended_well() {
    let far = target!("far", LEN);
    let near = Near::new(tcp_config());
    let peer = near.engine.load_peer(&far.metadata).unwrap();
    let plans: Vec<Plan> = SHAPES.map(|shape| near.plan(&peer, &far.region, shape)).into();
    peer.connect(BOUND).unwrap();
    for plan in &plans {
        assert_eq!(plan.estimate(), None, "connecting is no transfer");
    }
    // Neither is one that failed, or was cancelled.
    let mut doomed = target!("doomed", LEN);
    let to_doomed = near.engine.load_peer(&doomed.metadata).unwrap();
    let plan = near.plan(&to_doomed, &doomed.region, read(64));
    doomed.process.ask("deregister r");
    assert_eq!(kind(&end_of(&plan.transfer()).unwrap_err()), "Permission");
    assert_eq!(plan.estimate(), None, "a refusal");
    doomed.process.freeze();
    let transfer = plan.transfer();
    transfer.post().unwrap();
    transfer.cancel();
    assert_eq!(kind(&outcome(&transfer).unwrap_err()), "Cancelled");
    assert_eq!(plan.estimate(), None, "a cancelled one");
    doomed.process.thaw();

    // One is enough for all shapes, and says nothing about other peers.
    end_of(&plans[2].transfer()).unwrap();
    for plan in &plans {
        let estimate = plan.estimate().unwrap();
        assert!(!estimate.duration.is_zero() && !estimate.margin.is_zero(), "{estimate:?}");
    }
    assert_eq!(plan.estimate(), None, "another peer");
}

/// How close an estimate is depends on the machine, and on who else uses it. What holds on all of them: it is a mean of
/// times that the callers saw, too, and no shorter than memory allows.
fn an_estimate_is_between_what_memory_allows_and_the_longest_that_was_seen(config: Configuration) {
    let far = target!("far", LEN);
    let near = Near::new(config());
    let peer = near.engine.load_peer(&far.metadata).unwrap();
    for shape in SHAPES {
        let plan = near.plan(&peer, &far.region, shape);
        let mut most = Duration::ZERO;
        for _ in 0..rounds(10) {
            most = most.max(longest(&plan, 5));
            let estimate = plan.estimate().unwrap();
            let least = Duration::from_nanos(shape.bytes / FASTEST);
            assert!(
                (least..=most).contains(&estimate.duration) && !estimate.margin.is_zero(),
                "{shape:?}: {estimate:?}, expected {least:?} to {most:?}"
            );
        }
    }
}

fn a_size_that_was_never_moved_is_estimated_from_its_neighbours(config: Configuration) {
    let far = target!("far", LEN);
    let near = Near::new(config());
    let peer = near.engine.load_peer(&far.metadata).unwrap();
    let [small, between, large] =
        [1 << 20, 4 << 20, 8 << 20].map(|bytes| near.plan(&peer, &far.region, read(bytes)));
    longest(&small, 31);
    longest(&large, 31);
    let [low, middle, high] =
        [&small, &between, &large].map(|plan| plan.estimate().unwrap().duration);
    assert!(
        low.min(high) <= middle && middle <= low.max(high),
        "1, 4 and 8 MiB: {low:?}, {middle:?}, {high:?}"
    );
}

fn a_shape_borrows_the_history_of_another_until_it_has_its_own(config: Configuration) {
    let far = target!("far", LEN);
    let near = Near::new(config());
    let peer = near.engine.load_peer(&far.metadata).unwrap();
    let whole = near.plan(&peer, &far.region, read(4 << 20));
    let scattered = near.plan(&peer, &far.region, Shape { scattered: true, ..read(4 << 20) });
    longest(&whole, 31);
    // And says that it is in doubt.
    let borrowed = scattered.estimate().unwrap();
    assert_eq!(borrowed.duration, whole.estimate().unwrap().duration);
    assert!(borrowed.margin >= borrowed.duration, "{borrowed:?}");
    let most = longest(&scattered, 1);
    let own = scattered.estimate().unwrap();
    assert!(own.duration <= most && own.margin < own.duration, "{own:?}, {most:?} seen");
}

fn a_peer_that_has_restarted_has_no_history(config: Configuration) {
    let first = target!("phoenix", LEN);
    let near = Near::new(config());
    let peer = near.engine.load_peer(&first.metadata).unwrap();
    let old = near.plan(&peer, &first.region, read(1 << 20));
    longest(&old, 5);
    assert!(old.estimate().is_some());
    // A connection that ended and came back is the same peer still.
    peer.disconnect().unwrap();
    assert!(old.estimate().is_some());
    drop(first);
    let second = target!("phoenix", LEN);
    let peer = near.engine.load_peer(&second.metadata).unwrap();
    let new = near.plan(&peer, &second.region, read(1 << 20));
    assert_eq!(new.estimate(), None);
    end_of(&new.transfer()).unwrap();
    assert!(new.estimate().is_some());
    // So has one that was forgotten and is loaded again.
    near.engine.unload_peer(&peer).unwrap();
    let peer = near.engine.load_peer(&second.metadata).unwrap();
    let again = near.plan(&peer, &second.region, read(1 << 20));
    assert_eq!(again.estimate(), None);
}

fn transfers_of_any_inline_size_move_the_same_bytes(config: Configuration) {
    let mut far = target!("far", LEN);
    for inline_bytes in [0, 1, 4096, 64 << 10, LEN, usize::MAX] {
        for assist in [AssistMode::Auto, AssistMode::Always, AssistMode::Never] {
            let near = Near::new(changed(config, |c| {
                c.inline_bytes = inline_bytes;
                c.assist = assist;
            }));
            let peer = near.engine.load_peer(&far.metadata).unwrap();
            for bytes in [1, 4096, 4097, 64 << 10, (64 << 10) + 1, 1 << 20] {
                let transfer = near.plan(&peer, &far.region, read(bytes)).transfer();
                for _ in 0..3 {
                    near.memory.poison(0, bytes as usize);
                    end_of(&transfer).unwrap();
                    near.memory.assert_pattern(1, 0, bytes as usize, 0);
                }
            }
            near.engine.shutdown().unwrap();
        }
    }
    far.assert_pattern(1, 0, LEN, 0);
}

/// Accepts connections and says nothing, until it is dropped.
struct Mute {
    port: u16,
}

impl Mute {
    fn new() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // Reads until the other side gives up; ends with the process.
                std::thread::spawn(move || {
                    std::io::copy(&mut stream.take(u64::MAX), &mut std::io::sink())
                });
            }
        });
        Self { port }
    }
}

const FOR_EVER: Duration = Duration::from_hours(20);

/// A target behind a proxy that can be cut and aimed elsewhere.
fn behind_a_proxy(config: EngineConfig) -> (Proxy, u16, Engine) {
    let proxy = Proxy::new(Passing::Whole);
    let mut config = config;
    config.listen.advertise = vec![proxy.address()];
    let (engine, port) = engine_on_a_known_port("far", config);
    proxy.aim(port);
    (proxy, port, engine)
}

#[test]
fn connecting_again_is_given_up_after_its_own_timeout() {
    let (proxy, port, far) = behind_a_proxy(tcp_config());
    let memory = Buffer::with_pattern(1, LEN);
    let region = memory.register(&far, Access::REMOTE_READ);
    let near = Near::new(changed(tcp_config, |c| {
        c.connect_timeout = FOR_EVER;
        c.reconnect_timeout = Duration::from_millis(200);
        c.operation_timeout = FOR_EVER;
    }));
    let peer = near.engine.load_peer(&far.metadata()).unwrap();
    let transfer = near.plan(&peer, region.descriptor(), read(64)).transfer();
    end_of(&transfer).unwrap();
    let mute = Mute::new();
    proxy.aim(mute.port);
    proxy.cut();
    eventually("the session is over", || !peer.is_connected());
    // Somebody answers the phone and is silent: that ends after the 200 ms of a lost link, not after 20 hours.
    eventually("it was given up", || {
        near.engine.stats().peers.iter().any(|peer| peer.last_error.is_some())
    });
    proxy.aim(port);
}

#[test]
fn connecting_for_the_first_time_has_the_other_timeout() {
    let (proxy, port, far) = behind_a_proxy(tcp_config());
    let mute = Mute::new();
    proxy.aim(mute.port);
    let near = Near::new(changed(tcp_config, |c| {
        c.connect_timeout = Duration::from_millis(200);
        c.reconnect_timeout = FOR_EVER;
        c.operation_timeout = FOR_EVER;
    }));
    let peer = near.engine.load_peer(&far.metadata()).unwrap();
    assert_eq!(kind(&peer.connect(FOR_EVER).unwrap_err()), "Connect");
    proxy.aim(port);
    eventually("it is connected", || peer.connect(BOUND).is_ok());
}

#[test]
fn a_link_that_was_cut_is_made_again() {
    let (proxy, _, far) = behind_a_proxy(tcp_config());
    let memory = Buffer::with_pattern(1, LEN);
    let region = memory.register(&far, Access::REMOTE_READ);
    let near = Near::new(changed(tcp_config, |c| {
        c.reconnect_timeout = BOUND;
    }));
    let peer = near.engine.load_peer(&far.metadata()).unwrap();
    let transfer = near.plan(&peer, region.descriptor(), read(64)).transfer();
    for _ in 0..5 {
        end_of(&transfer).unwrap();
        proxy.cut();
        eventually("transfers work again", || end_of(&transfer).is_ok());
    }
    near.memory.assert_pattern(1, 0, 64, 0);
}

#[test]
fn a_timeout_of_zero_is_refused() {
    let refused = changed(local_config, |c| {
        c.reconnect_timeout = Duration::ZERO;
    });
    let error = Engine::new("near", refused).unwrap_err();
    assert_eq!(kind(&error), "Config");
    assert!(error.to_string().contains("reconnect_timeout"), "{error}");
    let refused = changed(local_config, |c| {
        c.reconnect_timeout = Duration::MAX;
    });
    assert_eq!(kind(&Engine::new("near", refused).unwrap_err()), "Config");
}
