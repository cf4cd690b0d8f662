//! Dates as they stand in HTTP headers and in signed URLs.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Reads an HTTP date: `Wed, 21 Oct 2015 07:28:00 GMT`. The two obsolete forms are not read.
pub(crate) fn parse_http_date(text: &str) -> Option<SystemTime> {
    let (_weekday, rest) = text.split_once(", ")?;
    let mut parts = rest.split(' ');
    let day = number(parts.next()?)?;
    let month_name = parts.next()?;
    let month = (1..).zip(MONTHS).find(|(_, name)| *name == month_name)?.0;
    let year = number(parts.next()?)?;
    let mut time = parts.next()?.split(':').map(number);
    let time = (time.next()??, time.next()??, time.next()??);
    instant((year, month, day), time)
}

/// Reads ISO 8601 in UTC, with or without separators: `2026-01-31T12:00:00Z`, `20260131T120000Z`,
/// and the date alone.
pub(crate) fn parse_iso_date(text: &str) -> Option<SystemTime> {
    let digits: String = text.chars().filter(|char| !matches!(char, '-' | ':')).collect();
    let (date, time) = digits.split_once('T').unwrap_or((&digits, "000000Z"));
    let time = time.strip_suffix('Z')?.split('.').next()?;
    let pair = |text: &str, at: usize| number(text.get(at..at + 2)?);
    if date.len() != 8 {
        return None;
    }
    let date = (number(date.get(..4)?)?, pair(date, 4)?, pair(date, 6)?);
    let seconds = if time.len() > 4 { pair(time, 4)? } else { 0 };
    instant(date, (pair(time, 0)?, pair(time, 2)?, seconds))
}

fn number(text: &str) -> Option<u64> {
    let all_digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if all_digits { text.parse().ok() } else { None }
}

fn instant(date: (u64, u64, u64), time: (u64, u64, u64)) -> Option<SystemTime> {
    let ((year, month, day), (hour, minute, second)) = (date, time);
    let in_bounds = (1970..=9999).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if !in_bounds {
        return None;
    }
    // Years counted from March, so that the leap day comes last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    let days = days.checked_sub(DAYS_FROM_YEAR_0_TO_EPOCH)?;
    let seconds = days * 86_400 + hour * 3_600 + minute * 60 + second;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// From the first of March of the year 0 to the first of January 1970.
const DAYS_FROM_YEAR_0_TO_EPOCH: u64 = 719_468;

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(time: Option<SystemTime>) -> Option<u64> {
        Some(time?.duration_since(UNIX_EPOCH).unwrap().as_secs())
    }

    #[test]
    fn dates_are_read() {
        for (text, expected) in [
            ("Wed, 21 Oct 2015 07:28:00 GMT", Some(1_445_412_480)),
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0)),
            ("Thu, 29 Feb 2024 23:59:59 GMT", Some(1_709_251_199)),
            ("Wed, 21 Foo 2015 07:28:00 GMT", None),
            ("Wednesday, 21-Oct-15 07:28:00 GMT", None),
            ("Wed, 21 Oct 2015", None),
            ("", None),
        ] {
            assert_eq!(seconds(parse_http_date(text)), expected, "{text}");
        }
        for (text, expected) in [
            ("20151021T072800Z", Some(1_445_412_480)),
            ("2015-10-21T07:28:00Z", Some(1_445_412_480)),
            ("2015-10-21T07:28:00.123Z", Some(1_445_412_480)),
            ("2015-10-21T07:28Z", Some(1_445_412_480)),
            ("2015-10-21", Some(1_445_385_600)),
            ("2015-10-21T07:28:00+01:00", None),
            ("2015-13-21T07:28:00Z", None),
            ("1969-10-21T07:28:00Z", None),
            ("20151021T0728é0Z", None),
            ("", None),
        ] {
            assert_eq!(seconds(parse_iso_date(text)), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,40}|[0-9TZ:.\\- ,a-zA-Z]{0,30}") {
            let _: (Option<SystemTime>, Option<SystemTime>) =
                (parse_http_date(&text), parse_iso_date(&text));
        }
    }
}
