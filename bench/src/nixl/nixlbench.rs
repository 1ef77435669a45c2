//! The options of NIXL's own benchmark that mean the same here, and its table.

use std::fmt;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::report::{NixlResults, NixlSeries};
use super::tally::Part;
use crate::case::Operation;
use crate::units::parse_bytes;

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Our own table
    Table,
    /// The columns of nixlbench
    Nixlbench,
}

/// Kinds of memory that can be measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum SegmentType {
    #[default]
    #[value(name = "DRAM")]
    Dram,
    /// Of a GPU, see --gpus
    #[value(name = "VRAM")]
    Vram,
}

/// The memory of both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Memories {
    pub(crate) initiator: SegmentType,
    pub(crate) target: SegmentType,
    /// Of those whose memory is VRAM.
    pub(crate) gpus: [u32; 2],
}

impl Memories {
    fn sides(self) -> [(SegmentType, u32); 2] {
        [(self.initiator, self.gpus[0]), (self.target, self.gpus[1])]
    }

    /// What tells cases from those with other memory: `vram0-vram1`, initiator first; `None` where it is the usual one.
    pub(crate) fn tag(self) -> Option<String> {
        let name = |(kind, gpu): (SegmentType, u32)| match kind {
            SegmentType::Dram => "dram".to_owned(),
            SegmentType::Vram => format!("vram{gpu}"),
        };
        let [initiator, target] = self.sides();
        let usual = initiator.0 == SegmentType::Dram && target.0 == SegmentType::Dram;
        (!usual).then(|| format!("{}-{}", name(initiator), name(target)))
    }
}

impl fmt::Display for Memories {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |(kind, gpu): (SegmentType, u32)| match kind {
            SegmentType::Dram => "DRAM".to_owned(),
            SegmentType::Vram => format!("VRAM of GPU {gpu}"),
        };
        match self.sides().map(name) {
            [initiator, target] if initiator == target => write!(f, "{initiator} on both sides"),
            [initiator, target] => write!(f, "initiator's {initiator}, target's {target}"),
        }
    }
}

/// Named as nixlbench names them.
#[derive(Clone, Debug, Args)]
pub(crate) struct NixlbenchArgs {
    /// Smallest block of a sweep that doubles it; replaces the scenarios
    #[arg(long = "start_block_size", alias = "start-block-size", value_name = "SIZE", value_parser = parse_bytes, help_heading = "As nixlbench")]
    pub(crate) start_block_size: Option<usize>,
    /// Largest block of the sweep [default: the smallest]
    #[arg(long = "max_block_size", alias = "max-block-size", value_name = "SIZE", value_parser = parse_bytes, help_heading = "As nixlbench")]
    pub(crate) max_block_size: Option<usize>,
    /// Fewest blocks in a transfer of the sweep, doubled too [default: 1]
    #[arg(long = "start_batch_size", alias = "start-batch-size", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "As nixlbench")]
    pub(crate) start_batch_size: Option<u32>,
    /// Most blocks in a transfer of the sweep [default: the fewest]
    #[arg(long = "max_batch_size", alias = "max-batch-size", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "As nixlbench")]
    pub(crate) max_batch_size: Option<u32>,
    /// Timed transfers of a case in a round, of all threads together, instead of --duration
    #[arg(long = "num_iter", alias = "num-iter", value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "As nixlbench")]
    pub(crate) num_iter: Option<u64>,
    /// Untimed transfers before them [default: 16]
    #[arg(
        long = "warmup_iter",
        alias = "warmup-iter",
        value_name = "N",
        help_heading = "As nixlbench"
    )]
    pub(crate) warmup_iter: Option<u64>,
    /// Threads of the initiator, all with one agent, each with transfers of its own and pinned to a core; for `sizes`, `kv` and
    /// sweeps
    #[arg(long = "num_threads", alias = "num-threads", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64), help_heading = "As nixlbench")]
    pub(crate) num_threads: u16,
    /// Memory of the initiator
    #[arg(
        long = "initiator_seg_type",
        alias = "initiator-seg-type",
        value_enum,
        ignore_case = true,
        default_value = "DRAM",
        value_name = "TYPE",
        help_heading = "As nixlbench"
    )]
    pub(crate) initiator_seg_type: SegmentType,
    /// Memory of the target
    #[arg(
        long = "target_seg_type",
        alias = "target-seg-type",
        value_enum,
        ignore_case = true,
        default_value = "DRAM",
        value_name = "TYPE",
        help_heading = "As nixlbench"
    )]
    pub(crate) target_seg_type: SegmentType,
    /// Accepted; every run is verified, with it or without
    #[arg(long = "check_consistency", alias = "check-consistency", help_heading = "As nixlbench")]
    pub(crate) check_consistency: bool,
    /// Columns of the table
    #[arg(long, value_enum, default_value = "table", help_heading = "Output")]
    pub(crate) format: Format,
}

impl NixlbenchArgs {
    /// Blocks and their bytes, both doubling; `None` where no sweep was asked for.
    pub(crate) fn sweep(&self) -> Result<Option<Vec<(usize, usize)>>, String> {
        let batches = self.start_batch_size.is_some() || self.max_batch_size.is_some();
        if self.start_block_size.is_none() && self.max_block_size.is_none() && !batches {
            return Ok(None);
        }
        let ends = |start: Option<usize>, most: Option<usize>, default: usize, name: &str| {
            let start = start.unwrap_or_else(|| default.min(most.unwrap_or(default)));
            let most = most.unwrap_or(start);
            if start > most {
                return Err(format!("--max_{name} {most} is below --start_{name} {start}"));
            }
            let doubled = std::iter::successors(Some(start), |size| size.checked_mul(2));
            Ok(doubled.take_while(|&size| size <= most).collect::<Vec<usize>>())
        };
        let whole = |number: Option<u32>| number.map(|number| number as usize);
        let sizes = ends(self.start_block_size, self.max_block_size, 4096, "block_size")?;
        let batches =
            ends(whole(self.start_batch_size), whole(self.max_batch_size), 1, "batch_size")?;
        let of_size = |&size: &usize| batches.iter().map(move |&batch| (batch, size));
        Ok(Some(sizes.iter().flat_map(of_size).collect()))
    }
}

/// The table of nixlbench: one row per block and batch size, for each backend and direction. `Avg Lat.` is for one block
/// of a batch, all others are for a transfer.
pub(crate) fn table(results: &NixlResults) -> String {
    let mut text = String::new();
    let mut heads: Vec<(&str, Operation)> = Vec::new();
    let rows = || results.series.iter().filter(|row| row.part == Part::Completion);
    for row in rows() {
        let head = (row.backend.as_str(), row.operation);
        if !heads.contains(&head) {
            heads.push(head);
        }
    }
    for (backend, operation) in heads {
        text += &format!("\n{backend}, {}\n", operation.to_string().to_uppercase());
        text += &cells("Block Size (B)", &HEADER);
        text += &format!("{}\n", "-".repeat(20 + 15 * HEADER.len()));
        for row in rows().filter(|row| row.backend == backend && row.operation == operation) {
            text += &cells(&row.block_bytes.to_string(), &figures(row, results));
        }
    }
    text + &left_out(results)
}

/// Names what has no row.
fn left_out(results: &NixlResults) -> String {
    let other =
        |row: &&NixlSeries| !matches!(row.part, Part::Completion | Part::Post | Part::Prepare);
    let mut names: Vec<&str> =
        results.series.iter().filter(other).map(|row| row.id.as_str()).collect();
    names.extend((!results.faults.is_empty()).then_some("fault"));
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return String::new();
    }
    format!(
        "\nNot transfers one after the other, so not above: {}. `--format table` has them.\n",
        names.join(", ")
    )
}

const HEADER: [&str; 9] = [
    "Batch Size",
    "B/W (GB/Sec)",
    "Avg Lat. (us)",
    "Avg Prep (us)",
    "P99 Prep (us)",
    "Avg Post (us)",
    "P99 Post (us)",
    "Avg Tx (us)",
    "P99 Tx (us)",
];

fn cells(first: &str, rest: &[impl AsRef<str>]) -> String {
    let mut line = format!("{first:<20}");
    for cell in rest {
        line += &format!("{:<15}", cell.as_ref());
    }
    format!("{}\n", line.trim_end())
}

fn figures(row: &NixlSeries, results: &NixlResults) -> Vec<String> {
    let part = |part: Part| {
        let of_case = |other: &&NixlSeries| {
            let case = |row: &NixlSeries| {
                (row.backend.clone(), row.operation, row.blocks, row.block_bytes)
            };
            other.part == part && case(other) == case(row)
        };
        let found = results.series.iter().find(of_case);
        found.map_or((0.0, 0.0), |row| (row.latency_us.mean, row.latency_us.p99))
    };
    let bytes = (row.blocks * row.block_bytes) as f64;
    let mean = row.latency_us.mean;
    let (prepare, post) = (part(Part::Prepare), part(Part::Post));
    // Of all threads together; `Avg Tx` is what each of them sees.
    let rate = match row.operations_per_s {
        Some(per_s) => bytes * per_s / 1e9,
        None if mean > 0.0 => bytes / mean / 1e3,
        None => 0.0,
    };
    let mut cells = vec![row.blocks.to_string(), format!("{rate:.6}")];
    let each = mean / row.blocks.max(1) as f64;
    let times = [each, prepare.0, prepare.1, post.0, post.1, mean, row.latency_us.p99];
    cells.extend(times.map(|us| format!("{us:.1}")));
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nixl::report::tests::compared;

    #[test]
    fn the_table_is_read_as_that_of_nixlbench() {
        let text = table(&compared());
        let header = text.lines().find(|line| line.starts_with("Block Size")).expect("a header");
        assert!(header.contains("Block Size (B)      Batch Size     B/W (GB/Sec)   Avg Lat. (us)"));
        let rows: Vec<Vec<f64>> = text
            .lines()
            .filter(|line| line.starts_with("64 "))
            .map(|line| {
                line.split_whitespace().map(|cell| cell.parse().expect("a number")).collect()
            })
            .collect();
        assert!(text.contains("not above: notify/16B/one-way, notify/16B/round-trip."), "{text}");
        assert_eq!(rows.len(), 2, "{text}");
        assert_eq!(text.matches("Block Size").count(), 2, "one table for each backend: {text}");
        assert!(rows.iter().all(|row| row.len() == 10 && row[1] == 1.0), "{text}");
        // 64 bytes in 6 us; the transfer of one block is the block's.
        assert!((rows[0][2] - 0.010_6).abs() < 0.001 && (rows[0][3] - rows[0][8]).abs() < 0.2);
    }
}
