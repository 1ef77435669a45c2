//! Scenario `trace`: requests that arrive when those of a recording did, each as long as it was there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::models::ModelArgs;
use crate::units::{parse_bytes, parse_duration};

/// Requests beyond this are refused: they travel to both processes in one message.
const MAX_REQUESTS: usize = 50_000;
/// A file of more bytes is no recording of so few requests.
const MAX_FILE: u64 = 64 << 20;

#[derive(Clone, Debug, Args)]
pub(crate) struct TraceArgs {
    /// Recording of scenario `trace`: CSV or JSONL with `timestamp` (ms) or `time_s`, and `bytes` or `input_length` (tokens)
    #[arg(long, value_name = "FILE", help_heading = "Cases")]
    pub(crate) trace: Option<PathBuf>,
    /// How many times as fast as it was recorded
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = parse_speed, help_heading = "Cases")]
    pub(crate) trace_speed: f64,
    /// Time of each round, after which requests of the recording are left out
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "10s", help_heading = "Cases")]
    pub(crate) trace_limit: Duration,
    /// Bytes of a block, where the recording has bytes
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "32KiB", help_heading = "Cases")]
    pub(crate) trace_block: usize,
}

fn parse_speed(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(speed) if (0.001..=1e6).contains(&speed) => Ok(speed),
        _ => Err("expected a factor from 0.001 to 1000000".to_owned()),
    }
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Request {
    /// From the beginning of the replay.
    pub(crate) at_ns: u64,
    pub(crate) blocks: usize,
}

/// A recording, ready to be replayed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trace {
    /// The file's name without what is behind its last dot.
    pub(crate) name: String,
    pub(crate) block_bytes: usize,
    pub(crate) requests: Vec<Request>,
}

impl Trace {
    /// Blocks of the longest request.
    pub(crate) fn most_blocks(&self) -> usize {
        self.requests.iter().map(|request| request.blocks).max().unwrap_or(0)
    }

    /// When the last request arrives.
    pub(crate) fn duration(&self) -> Duration {
        Duration::from_nanos(self.requests.last().map_or(0, |request| request.at_ns))
    }
}

/// How a recording was replayed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Replay {
    pub(crate) name: String,
    pub(crate) requests: usize,
    pub(crate) block_bytes: usize,
    pub(crate) speed: f64,
    pub(crate) limit_ms: f64,
}

impl Replay {
    pub(crate) fn of(trace: &Trace, options: &TraceArgs) -> Self {
        Self {
            name: trace.name.clone(),
            requests: trace.requests.len(),
            block_bytes: trace.block_bytes,
            speed: options.trace_speed,
            limit_ms: options.trace_limit.as_secs_f64() * 1e3,
        }
    }
}

/// Reads a recording; the message names the line that is wrong.
pub(crate) fn read(path: &Path, options: &TraceArgs, model: &ModelArgs) -> Result<Trace, String> {
    let shown = path.display();
    let metadata = std::fs::metadata(path).map_err(|error| format!("--trace {shown}: {error}"))?;
    if metadata.len() > MAX_FILE {
        return Err(format!("--trace {shown}: more than {} MiB", MAX_FILE >> 20));
    }
    let text =
        std::fs::read_to_string(path).map_err(|error| format!("--trace {shown}: {error}"))?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name = stem.chars().map(|c| if known(c) { c } else { '-' }).take(40).collect();
    parse(&text, options, model)
        .map(|(block_bytes, requests)| Trace { name, block_bytes, requests })
        .map_err(|error| format!("--trace {shown}: {error}"))
}

/// What a line says of a request: seconds, and bytes or tokens.
struct Entry {
    seconds: f64,
    amount: Amount,
}

enum Amount {
    Bytes(u64),
    Tokens(u32),
}

fn parse(
    text: &str,
    options: &TraceArgs,
    model: &ModelArgs,
) -> Result<(usize, Vec<Request>), String> {
    let mut lines = text
        .lines()
        .enumerate()
        .map(|(number, line)| (number + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty())
        .peekable();
    let Some(&(_, first)) = lines.peek() else { return Err("no request".to_owned()) };
    let columns: Option<Vec<&str>> = (!first.starts_with('{')).then(|| {
        lines.next();
        first.split(',').map(str::trim).collect()
    });
    let (mut requests, mut block_bytes, mut begin, mut last) = (Vec::new(), None, None, 0.0);
    for (number, line) in lines {
        let entry = match &columns {
            Some(columns) => of_csv(columns, line),
            None => of_json(line),
        }
        .map_err(|error| format!("line {number}: {error}"))?;
        let start = *begin.get_or_insert(entry.seconds);
        if entry.seconds < last {
            return Err(format!("line {number}: arrives before the one above it"));
        }
        last = entry.seconds;
        let at = (entry.seconds - start) / options.trace_speed;
        if at > options.trace_limit.as_secs_f64() {
            break;
        }
        let (blocks, bytes) = match entry.amount {
            Amount::Bytes(bytes) => {
                let blocks = bytes.div_ceil(options.trace_block as u64).max(1);
                (usize::try_from(blocks).unwrap_or(usize::MAX), options.trace_block)
            }
            Amount::Tokens(tokens) => model.shape_of_request(tokens.max(1)).ok_or_else(|| {
                format!("line {number}: has tokens: say of which model by one --model")
            })?,
        };
        if *block_bytes.get_or_insert(bytes) != bytes {
            return Err(format!("line {number}: has tokens where others have bytes"));
        }
        if requests.len() == MAX_REQUESTS {
            return Err(format!(
                "more than {MAX_REQUESTS} requests: choose a shorter --trace-limit"
            ));
        }
        requests.push(Request { at_ns: (at * 1e9) as u64, blocks });
    }
    let block_bytes = block_bytes.ok_or("no request")?;
    Ok((block_bytes, requests))
}

fn of_csv(columns: &[&str], line: &str) -> Result<Entry, String> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    entry(|name| {
        let at = columns.iter().position(|column| column.eq_ignore_ascii_case(name))?;
        fields.get(at).map(|field| field.parse().map_err(|_| format!("{name} is '{field}'")))
    })
}

fn of_json(line: &str) -> Result<Entry, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
    entry(|name| {
        let field = value.get(name)?;
        Some(field.as_f64().ok_or_else(|| format!("{name} is {field}")))
    })
}

fn entry(field: impl Fn(&str) -> Option<Result<f64, String>>) -> Result<Entry, String> {
    let valid = |value: f64, name: &str| {
        if value.is_finite() && (0.0..1e15).contains(&value) {
            Ok(value)
        } else {
            Err(format!("{name} is {value}"))
        }
    };
    let seconds = match (field("time_s"), field("timestamp")) {
        (Some(seconds), _) => valid(seconds?, "time_s")?,
        (None, Some(ms)) => valid(ms?, "timestamp")? / 1e3,
        (None, None) => return Err("neither time_s nor timestamp (ms)".to_owned()),
    };
    let amount = match (field("bytes"), field("input_length")) {
        (Some(bytes), _) => Amount::Bytes(valid(bytes?, "bytes")? as u64),
        (None, Some(tokens)) => {
            let tokens = valid(tokens?, "input_length")?;
            if tokens > 10e6 {
                return Err(format!("input_length is {tokens}"));
            }
            Amount::Tokens(tokens as u32)
        }
        (None, None) => return Err("neither bytes nor input_length (tokens)".to_owned()),
    };
    Ok(Entry { seconds, amount })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        trace: TraceArgs,
        #[command(flatten)]
        model: ModelArgs,
    }

    fn parsed(text: &str, options: &str) -> Result<(usize, Vec<Request>), String> {
        let words = std::iter::once("x").chain(options.split_whitespace());
        let line = Line::parse_from(words);
        parse(text, &line.trace, &line.model)
    }

    fn request(at_ms: u64, blocks: usize) -> Request {
        Request { at_ns: at_ms * 1_000_000, blocks }
    }

    #[test]
    fn csv_with_bytes_counts_from_the_first_arrival() {
        let text = "time_s, client, bytes\n5.0,a,65536\n\n5.5,b,1\n6.0,c,98305\n";
        let expected = vec![request(0, 2), request(500, 1), request(1000, 4)];
        assert_eq!(parsed(text, ""), Ok((32 << 10, expected)));
        let fast = parsed(text, "--trace-speed 10 --trace-block 64KiB --trace-limit 60ms");
        assert_eq!(fast, Ok((64 << 10, vec![request(0, 1), request(50, 1)])));
    }

    #[test]
    fn jsonl_with_tokens_takes_a_model() {
        let text = "{\"timestamp\": 0, \"input_length\": 17, \"hash_ids\": [1]}\n{\"timestamp\": 3000, \"input_length\": 16}";
        let expected = vec![request(0, 32 * 2 * 2), request(3000, 32 * 2)];
        assert_eq!(parsed(text, "--model llama-3.1-8b"), Ok((32 << 10, expected)));
        assert!(parsed(text, "").expect_err("no model").contains("line 1: has tokens"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, expected) in [
            ("", "no request"),
            ("time_s,bytes\n", "no request"),
            ("time_s,bytes\n0,1\nnow,1", "line 3: time_s is 'now'"),
            ("time_s,bytes\n2,1\n1,1", "line 3: arrives before"),
            ("time_s,bytes\n0,-1", "line 2: bytes is -1"),
            ("time_s,bytes\n0,NaN", "line 2: bytes is NaN"),
            ("when,bytes\n0,1", "line 2: neither time_s"),
            ("time_s,length\n0,1", "line 2: neither bytes"),
            ("time_s,bytes\n0", "line 2: neither bytes"),
            ("{\"timestamp\": \"noon\", \"bytes\": 1}", "line 1: timestamp is"),
            ("{\"timestamp\": 1", "line 1: "),
        ] {
            let message = parsed(text, "").expect_err(text);
            assert!(message.contains(expected), "{text}: {message}");
        }
    }
}
