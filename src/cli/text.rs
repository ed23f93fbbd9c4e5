//! Sizes, durations and times as people read and write them.

use std::time::Duration;

use bytesize::ByteSize;

use crate::base::Timestamp;

/// Milliseconds of the units that people write.
const UNITS_MS: [(&str, u64); 15] = [
    ("ms", 1),
    ("s", 1_000),
    ("sec", 1_000),
    ("second", 1_000),
    ("seconds", 1_000),
    ("m", 60_000),
    ("min", 60_000),
    ("minute", 60_000),
    ("minutes", 60_000),
    ("h", 3_600_000),
    ("hour", 3_600_000),
    ("hours", 3_600_000),
    ("d", 86_400_000),
    ("day", 86_400_000),
    ("days", 86_400_000),
];

/// Reads `1s`, `500ms`, `5min`, `2h`, `1h30min`, `7d`; a plain number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || "write a time as in 1s, 500ms, 5min, 2h or 7d".to_owned();
    let text = text.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    let mut total_ms = 0u64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (number, after) = rest.split_at(digits);
        let after = after.trim_start();
        let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let (unit, next) = after.split_at(letters);
        let unit_ms = UNITS_MS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?.1;
        let number: u64 = number.parse().map_err(|_| bad())?;
        let part = number.checked_mul(unit_ms).ok_or_else(bad)?;
        total_ms = total_ms.checked_add(part).ok_or_else(bad)?;
        rest = next.trim_start();
    }
    if text.is_empty() {
        return Err(bad());
    }
    Ok(Duration::from_millis(total_ms))
}

/// `1.2 GiB`.
pub fn bytes(n: u64) -> String {
    ByteSize(n).display().iec().to_string()
}

/// A duration in its largest one or two units: `340 ms`, `22 s`, `5 min`, `3 h 20 min`, `4 d`.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0 => format!("{} ms", d.as_millis()),
        1..=119 => format!("{s} s"),
        120..=7199 => format!("{} min", s / 60),
        7200..=172_799 => match (s / 3600, s / 60 % 60) {
            (h, 0) => format!("{h} h"),
            (h, min) => format!("{h} h {min} min"),
        },
        _ => format!("{} d", s / 86_400),
    }
}

/// A duration far below a second: `800 ns`, `2.4 us`, `1.9 ms`.
pub fn brief(d: Duration) -> String {
    let ns = d.as_nanos() as f64;
    match d.as_nanos() {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} us", ns / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns / 1e6),
        _ => duration(d),
    }
}

/// `22 s ago`; `now` within a second; `in 3 s` for what is to come.
pub fn ago(now: Timestamp, then: Timestamp) -> String {
    let past = now.since(then);
    let coming = then.since(now);
    if coming >= Duration::from_secs(1) {
        return format!("in {}", duration(coming));
    }
    if past < Duration::from_secs(1) {
        return "now".to_owned();
    }
    format!("{} ago", duration(past))
}

/// Local date and time to the second.
pub fn local(t: Timestamp) -> String {
    match jiff::Timestamp::from_millisecond(t.0) {
        Ok(t) => t.to_zoned_datetime(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_) => t.to_string(),
    }
}

/// `1 disk`, `2 disks`.
pub fn count(n: u64, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        let cases = [
            ("1s", 1_000),
            ("30", 30_000),
            ("500ms", 500),
            ("5min", 300_000),
            ("2h", 7_200_000),
            ("1h30min", 5_400_000),
            ("1 h 30 m", 5_400_000),
            ("7d", 604_800_000),
        ];
        for (text, ms) in cases {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for bad in ["", "s", "1x", "1.5s", "-1s", "1s5", "99999999999999999999s", "\u{b2}s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ages_are_in_words() {
        let now = Timestamp(1_000_000_000);
        let cases = [
            (0, "now"),
            (22_000, "22 s ago"),
            (119_000, "119 s ago"),
            (5 * 60_000, "5 min ago"),
            (12_000_000, "3 h 20 min ago"),
            (4 * 86_400_000, "4 d ago"),
            (-3_000, "in 3 s"),
        ];
        for (ms, words) in cases {
            assert_eq!(ago(now, Timestamp(now.0 - ms)), words);
        }
        assert_eq!(bytes(1 << 30), "1.0 GiB");
        assert_eq!(count(1, "disk") + &count(2, "disk"), "1 disk2 disks");
    }
}
