//! Lengths of time as Go writes them: `12h0m0s`.

use std::time::Duration;

/// Reads one that is not negative, and not longer than some five hundred years.
pub(super) fn parse(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut sum: Option<Duration> = None;
    while !rest.is_empty() {
        let number = rest.find(|char: char| !char.is_ascii_digit() && char != '.')?;
        let (number, unit) = rest.split_at(number);
        let unit_len = unit.find(|char: char| char.is_ascii_digit() || char == '.');
        let (unit, after) = unit.split_at(unit_len.unwrap_or(unit.len()));
        sum = Some(sum.unwrap_or_default().checked_add(part(number, unit)?)?);
        rest = after;
    }
    sum.filter(|sum| *sum <= LONGEST)
}

fn part(number: &str, unit: &str) -> Option<Duration> {
    let (_, nanoseconds) = UNITS.iter().find(|(name, _)| *name == unit)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut total = whole.checked_mul(*nanoseconds)?;
    let mut worth = *nanoseconds;
    for digit in fraction.chars() {
        worth /= 10;
        total = total.checked_add(u64::from(digit.to_digit(10)?) * worth)?;
    }
    Some(Duration::from_nanos(total))
}

const UNITS: &[(&str, u64)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Go's longest is half of it; sums with the present time do not overflow.
const LONGEST: Duration = Duration::from_nanos(u64::MAX);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_read_as_go_reads_them() {
        for (text, expected) in [
            ("0", Some(0)),
            ("0s", Some(0)),
            ("12h", Some(43_200_000)),
            ("12h0m0s", Some(43_200_000)),
            ("1h15m30.918s", Some(4_530_918)),
            ("+5ms", Some(5)),
            (".5s", Some(500)),
            ("1.s", Some(1000)),
            ("2000µs", Some(2)),
            ("", None),
            ("5", None),
            ("s", None),
            (".s", None),
            ("-1s", None),
            ("1d", None),
            ("1.2.3s", None),
            ("1h x", None),
            ("99999999999999999999h", None),
            ("18446744073709551615h", None),
        ] {
            assert_eq!(parse(text), expected.map(Duration::from_millis), "{text}");
        }
    }
}
