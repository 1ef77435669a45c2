//! Views of the result files: of `loopback` and `client`, and of `nixl`.

use super::view::{ALONE, Along, BESIDE, LineView, PeersView, RatioView, SLOWEST, Step, View};
use crate::case::{Memory, Scenario};
use crate::manifest::Host;
use crate::nixl::{NixlResults, Part};
use crate::peers::{PeerFigures, PeersResults};
use crate::report::{Costs, Results, Versus};

/// Of `loopback` and `client`.
pub(crate) fn of_engine(results: &Results) -> View {
    let Results { options, environment, .. } = results;
    let mut view = View {
        title: format!("corelane-bench: {}", options.backend),
        notes: failure(results.run.failure.as_deref()),
        loads: results.loads.clone(),
        ..View::default()
    };
    let loop_ = options.rate.map_or_else(
        || "closed loop".to_owned(),
        |rate| format!("open loop at {rate} operations per second and pair"),
    );
    view.notes.push(format!(
        "{} rounds of {:.0} ms a case, interleaved; {loop_}; transport {}, {} lane(s).",
        options.rounds, options.duration_ms, options.transport, options.lanes
    ));
    view.notes.extend(options.models.iter().map(|model| format!("{model}.")));
    let mut placements: Vec<String> =
        results.series.iter().map(|row| format!("{}: {}.", row.backend, row.placement)).collect();
    placements.sort_unstable();
    placements.dedup();
    view.notes.extend(placements);
    view.environments.push(("Initiator".to_owned(), described(&environment.initiator)));
    if environment.target.clock != environment.initiator.clock {
        view.environments.push(("Target".to_owned(), described(&environment.target)));
    }
    let tag = (options.memory == Memory::Vram)
        .then(|| format!("vram{}-vram{}", options.gpus[0], options.gpus[1]));
    for row in &results.series {
        let sized = row.scenario == Scenario::Sizes;
        let step = sized.then(|| {
            Step::bytes(tagged(&row.operation.to_string(), tag.as_deref()), row.block_bytes)
        });
        let (id, label) = load_line(&row.id, &row.backend.to_string());
        let id = tagged(&id, tag.as_deref());
        view.case(&id, step).lines.push(LineView {
            label,
            points: row.histogram_ns.clone(),
            latency_us: row.latency_us,
            gigabytes_per_s: row.gigabytes_per_s,
            cpu_us_per_operation: cpu(row.costs),
        });
    }
    view.ratios.extend(results.comparisons.iter().map(|row| RatioView {
        id: tagged(&row.id, tag.as_deref()),
        of: format!("{} / {}", row.backend, row.baseline),
        p50: row.p50_ratio,
        p99: row.p99_ratio,
    }));
    view
}

/// Of `nixl`.
pub(crate) fn of_nixl(results: &NixlResults) -> View {
    let mut view = View {
        title: format!("corelane-bench nixl: {}", results.options.backend),
        faults: results.faults.clone(),
        notes: failure(results.run.failure.as_deref()),
        loads: results.loads.clone(),
        ..View::default()
    };
    view.notes.extend(results.header().lines().skip(1).map(|line| format!("{line}.")));
    let mut environment = described(&results.environment);
    environment.insert(0, ("NIXL".to_owned(), results.options.nixl.clone()));
    view.environments.push(("Both sides".to_owned(), environment));
    let tag = results.options.memory.tag();
    for row in results.series.iter().filter(|row| row.is_shown()) {
        let bytes = row.blocks * row.block_bytes;
        let sized = row.part == Part::Completion && row.blocks == 1;
        let step = sized.then(|| {
            Step::bytes(tagged(&row.operation.to_string(), tag.as_deref()), row.block_bytes)
        });
        let (id, label) = load_line(&row.id, &row.backend);
        let id = tagged(&id, tag.as_deref());
        let moved = row.part == Part::Completion && row.latency_us.mean > 0.0;
        view.case(&id, step).lines.push(LineView {
            label,
            points: row.histogram_ns.clone(),
            latency_us: row.latency_us,
            gigabytes_per_s: moved.then(|| match row.operations_per_s {
                Some(per_s) => bytes as f64 * per_s / 1e9,
                None => bytes as f64 / row.latency_us.mean / 1e3,
            }),
            cpu_us_per_operation: cpu(row.costs),
        });
    }
    let shown = |id: &str| results.series.iter().any(|row| row.id == id && row.is_shown());
    let ratios = results.comparisons.iter().filter(|row| shown(&row.id));
    let ratios = ratios.map(ratio_of);
    view.ratios
        .extend(ratios.map(|ratio| RatioView { id: tagged(&ratio.id, tag.as_deref()), ..ratio }));
    view
}

/// Of `many-peers`. Of engines a case for each direction, operation and size, in it a line for each number of peers; of
/// backends of NIXL a case for each number of peers too, in it a line for each backend. Where there are several peers,
/// the one that fared worst has a line of its own.
pub(crate) fn of_peers(results: &PeersResults) -> View {
    let mut view = View {
        title: "corelane-bench many-peers".to_owned(),
        notes: failure(results.run.failure.as_deref()),
        ..View::default()
    };
    view.notes.extend(results.header().lines().skip(1).map(|line| format!("{line}.")));
    view.notes.retain(|note| note.len() > 1);
    let backends = results.options.backend.is_some();
    let mut environment = described(&results.environment);
    if backends {
        environment.insert(0, ("NIXL".to_owned(), results.options.nixl.clone()));
    }
    view.environments.push(("All processes".to_owned(), environment));
    for row in &results.series {
        let count =
            if row.peers == 1 { "1 peer".to_owned() } else { format!("{} peers", row.peers) };
        let most = results.series.iter().filter(|other| other.group == row.group);
        let is_most = most.map(|other| other.peers).max() == Some(row.peers);
        let (case, label, slowest) = if backends {
            let step = Step { kind: row.group.clone(), along: Along::Peers, value: row.peers };
            let slowest = format!("{}{SLOWEST}", row.backend);
            (view.case(&row.id, Some(step)), row.backend.clone(), Some(slowest))
        } else {
            let slowest = is_most.then(|| format!("{count}, the slowest of them"));
            (view.case(&row.group, None), count, slowest)
        };
        let moved = row.operations_per_s.median * row.block_bytes as f64 / 1e9;
        case.lines.push(LineView {
            label,
            points: row.histogram_ns.clone(),
            latency_us: row.latency_us,
            gigabytes_per_s: Some(moved),
            cpu_us_per_operation: None,
        });
        if let (Some(PeerFigures { latency_us, histogram_ns, .. }), Some(label)) =
            (row.slowest(), slowest)
            && row.peers > 1
        {
            case.lines.push(LineView {
                label,
                points: histogram_ns.clone(),
                latency_us: *latency_us,
                gigabytes_per_s: None,
                cpu_us_per_operation: None,
            });
        }
        let label = if backends { format!("{}, {}", row.id, row.backend) } else { row.id.clone() };
        view.peers.push(PeersView { label, series: row.clone() });
    }
    view.ratios.extend(results.comparisons.iter().map(ratio_of));
    view
}

/// The name of a case, which is another one with other memory: figures of GPUs and of host memory say nothing of each other.
fn tagged(id: &str, tag: Option<&str>) -> String {
    tag.map_or_else(|| id.to_owned(), |tag| format!("{id}/{tag}"))
}

fn ratio_of(row: &Versus) -> RatioView {
    RatioView {
        id: row.id.clone(),
        of: format!("{} / {}", row.backend, row.vs),
        p50: row.ratios.p50,
        p99: row.ratios.p99,
    }
}

/// Reads alone and beside writes belong into one chart: their case, and what the line is called there.
fn load_line(id: &str, backend: &str) -> (String, String) {
    if let Some(case) = id.strip_suffix("/idle") {
        return (case.to_owned(), format!("{backend}{ALONE}"));
    }
    match id.strip_suffix("/loaded") {
        Some(case) => (case.to_owned(), format!("{backend}{BESIDE}")),
        None => (id.to_owned(), backend.to_owned()),
    }
}

fn cpu(costs: Option<Costs>) -> Option<(f64, f64)> {
    let Costs { initiator, target } = costs?;
    Some((initiator.cpu_s_per_million_operations, target.cpu_s_per_million_operations))
}

fn failure(failure: Option<&str>) -> Vec<String> {
    failure.map(|why| format!("Not complete: {why}.")).into_iter().collect()
}

fn described(host: &Host) -> Vec<(String, String)> {
    let Host { noise, .. } = host;
    let row = |name: &str, value: String| (name.to_owned(), value);
    vec![
        row("Processor", format!("{} ({})", host.cpu_model, host.architecture)),
        row("Cores", format!("{} online, {} allowed", host.cores_online, host.cores_allowed)),
        row("NUMA nodes", host.numa_nodes.to_string()),
        row("Memory", format!("{:.1} GiB", host.memory_bytes as f64 / (1u64 << 30) as f64)),
        row("Kernel", host.kernel.clone()),
        row("Frequency governor", host.governor.clone()),
        row("Transparent huge pages", host.transparent_huge_pages.clone()),
        row("CPU quota", host.cpu_quota.clone()),
        row("corelane", format!("{} {}", host.corelane_version, host.git_revision)),
        row("Build", format!("{}, {}", host.rustc, host.build_profile)),
        row("One clock reading", format!("{} ns", noise.timer_overhead_ns)),
        row(
            "Noise before the run",
            format!(
                "{:.0} interruptions over 20 us per second, the longest {:.0} us",
                noise.gaps_over_20us_per_second, noise.longest_gap_us
            ),
        ),
    ]
}
