//! The interval log of HdrHistogram: one interval a round, for HistogramLogAnalyzer and its like.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::IntervalLogWriterBuilder;

use crate::measure::{Points, histogram, restore};

/// Values are in nanoseconds; the column of maxima, which readers only look at, in milliseconds. Rounds are not timed one
/// by one: they are shown as if they followed one another, each `duration` long.
pub(crate) fn interval_log(
    started_unix_s: u64,
    duration: Duration,
    rounds: &[Points],
) -> Result<Vec<u8>> {
    let mut log = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let start: SystemTime = UNIX_EPOCH + Duration::from_secs(started_unix_s);
    let mut writer = IntervalLogWriterBuilder::new()
        .add_comment("corelane-bench: latency in ns, one interval a round")
        .with_start_time(start)
        .with_base_time(start)
        .with_max_value_divisor(1e6)
        .begin_log_with(&mut log, &mut serializer)
        .context("an interval log")?;
    for (number, points) in rounds.iter().enumerate() {
        let mut round = histogram();
        restore(&mut round, points)?;
        let at = duration * u32::try_from(number).unwrap_or(u32::MAX);
        writer
            .write_histogram(&round, at, duration, None)
            .map_err(|error| anyhow::anyhow!("an interval log: {error:?}"))?;
    }
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::Histogram;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    #[test]
    fn what_was_written_is_read_back() {
        let rounds = [vec![(10_000, 5), (20_000, 1)], vec![(15_000, 7)]];
        let log = interval_log(1_700_000_000, Duration::from_millis(400), &rounds).expect("writes");
        let mut read = Vec::new();
        for entry in IntervalLogIterator::new(&log) {
            if let LogEntry::Interval(interval) = entry.expect("parses") {
                let bytes = base64_of(interval.encoded_histogram());
                let histogram: Histogram<u64> =
                    Deserializer::new().deserialize(&mut bytes.as_slice()).expect("decodes");
                read.push((interval.start_timestamp(), histogram.len(), histogram.max() / 1000));
            }
        }
        let ms = Duration::from_millis;
        assert_eq!(read, [(ms(0), 6, 20), (ms(400), 7, 15)]);
    }

    /// Decodes standard base64, so that the test needs no crate for it.
    fn base64_of(text: &str) -> Vec<u8> {
        const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let (mut bits, mut count, mut bytes) = (0u32, 0, Vec::new());
        for c in text.bytes().filter(|&c| c != b'=') {
            let value = ALPHABET.iter().position(|&known| known == c).expect("base64");
            bits = (bits << 6) | value as u32;
            count += 6;
            if count >= 8 {
                count -= 8;
                bytes.push((bits >> count) as u8);
            }
        }
        bytes
    }
}
