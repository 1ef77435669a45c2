//! Sizes, durations and rates as people write them, both ways.

use std::fmt;
use std::time::Duration;

/// Parses `64`, `4KiB`, `4k`, `1MiB`, `2GiB`. All prefixes are binary, as KV-cache and page sizes are.
pub(crate) fn parse_bytes(text: &str) -> Result<usize, String> {
    let (number, suffix) = split_number(text);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return Err(format!("unknown unit '{suffix}' (use B, KiB, MiB or GiB)")),
    };
    let value: usize = number.parse().map_err(|_| "not a whole number of bytes".to_owned())?;
    let bytes = value.checked_mul(1 << shift).ok_or("too large")?;
    if bytes == 0 {
        return Err("must be at least 1 byte".to_owned());
    }
    Ok(bytes)
}

/// Parses `2s`, `500ms`, `250us`, `1.5s`, `2m`. A bare number is refused: seconds or milliseconds would be a guess.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, suffix) = split_number(text);
    let scale = match suffix {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "" => return Err("needs a unit (us, ms, s or m)".to_owned()),
        _ => return Err(format!("unknown unit '{suffix}' (use us, ms, s or m)")),
    };
    let value: f64 = number.parse().map_err(|_| "not a number".to_owned())?;
    let seconds = value * scale;
    if !(1e-6..=86_400.0).contains(&seconds) {
        return Err("must be between 1us and 1440m".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Parses operations per second: `1000`, `10k`, `1.5M`.
pub(crate) fn parse_rate(text: &str) -> Result<f64, String> {
    let (number, suffix) = split_number(text);
    let scale = match suffix {
        "" => 1.0,
        "k" | "K" => 1e3,
        "M" => 1e6,
        _ => return Err(format!("unknown unit '{suffix}' (use none, k or M)")),
    };
    let value: f64 = number.parse().map_err(|_| "not a number".to_owned())?;
    let rate = value * scale;
    if !(0.1..=1e8).contains(&rate) {
        return Err("must be between 0.1 and 100M operations per second".to_owned());
    }
    Ok(rate)
}

/// Parses a block shape such as `4096x4KiB`.
pub(crate) fn parse_shape(text: &str) -> Result<(usize, usize), String> {
    let (count, size) = text.split_once('x').ok_or("expected COUNTxSIZE, as in 4096x4KiB")?;
    let count: usize = count.trim().parse().map_err(|_| "the count is not a number".to_owned())?;
    if !(1..=1_000_000).contains(&count) {
        return Err("the count must be between 1 and 1000000".to_owned());
    }
    Ok((count, parse_bytes(size)?))
}

/// Sixteen digits that a text has in common with no other that matters.
pub(crate) fn fingerprint(text: &str) -> String {
    // FNV-1a, the same on every machine and in every build.
    let hash = text.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    format!("{:016x}", crate::pattern::mix(hash))
}

fn split_number(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

/// Bytes with the largest binary unit that divides them: `64B`, `4KiB`, `64MiB`.
pub(crate) struct Bytes(pub(crate) usize);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0;
        match bytes {
            0 => write!(f, "0B"),
            _ if bytes.is_multiple_of(1 << 30) => write!(f, "{}GiB", bytes >> 30),
            _ if bytes.is_multiple_of(1 << 20) => write!(f, "{}MiB", bytes >> 20),
            _ if bytes.is_multiple_of(1 << 10) => write!(f, "{}KiB", bytes >> 10),
            _ => write!(f, "{bytes}B"),
        }
    }
}

/// Microseconds with about four significant figures, as the tables print them.
pub(crate) fn microseconds(nanoseconds: u64) -> String {
    let us = nanoseconds as f64 / 1e3;
    match us {
        _ if us < 100.0 => format!("{us:.2}"),
        _ if us < 10_000.0 => format!("{us:.1}"),
        _ => format!("{us:.0}"),
    }
}

/// Lower-case hexadecimal, for the binary values that travel in the control protocol's JSON.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The inverse of [`to_hex`]; `None` for anything else.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_through_their_display() {
        for bytes in [1, 64, 100, 1 << 10, 4096, 65_536, 1 << 20, 64 << 20, 3 << 30] {
            assert_eq!(parse_bytes(&Bytes(bytes).to_string()), Ok(bytes));
        }
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        for text in
            ["", "0", "x", "4XiB", "-1", "1.5KiB", "99999999999999999999", "99999999999999GiB"]
        {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("250us"), Ok(Duration::from_micros(250)));
        for text in ["5", "0s", "fast", "1h", "1e9s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_and_shapes() {
        assert_eq!(parse_rate("10k"), Ok(10_000.0));
        assert!(parse_rate("0").is_err() && parse_rate("NaN").is_err());
        assert_eq!(parse_shape("4096x4KiB"), Ok((4096, 4096)));
        assert!(parse_shape("4096").is_err() && parse_shape("0x4KiB").is_err());
    }

    #[test]
    fn microseconds_keep_four_figures() {
        assert_eq!(microseconds(9_123), "9.12");
        assert_eq!(microseconds(123_456), "123.5");
        assert_eq!(microseconds(12_345_678), "12346");
    }

    #[test]
    fn hex_round_trips_and_rejects_garbage() {
        assert_eq!(from_hex(&to_hex(&[0, 1, 254, 255])), Some(vec![0, 1, 254, 255]));
        assert!(from_hex("abc").is_none() && from_hex("zz").is_none() && from_hex("éé").is_none());
    }
}
