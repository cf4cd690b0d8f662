//! Times as zTOCs write them: RFC 3339 with up to nine fractional digits, as Go's `MarshalText`.

use crate::toc::Mtime;

const DAY: i64 = 86_400;

/// The text of a time in UTC; empty outside the years 0 to 9999, which RFC 3339 cannot write (Go
/// writes an empty text there as well).
pub(crate) fn format(time: Mtime) -> String {
    let days = time.seconds.div_euclid(DAY);
    let second = time.seconds.rem_euclid(DAY);
    let Some((year, month, day)) = civil_from_days(days) else { return String::new() };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if time.nanos != 0 {
        let fraction = format!(".{:09}", time.nanos);
        text.push_str(fraction.trim_end_matches('0'));
    }
    text.push('Z');
    text
}

/// Reads such a text, with any offset from UTC.
pub(crate) fn parse(text: &[u8]) -> Option<Mtime> {
    let (date, rest) = text.split_at_checked(10)?;
    let (&t, rest) = rest.split_first()?;
    let (clock, rest) = rest.split_at_checked(8)?;
    let [y0, y1, y2, y3, b'-', m0, m1, b'-', d0, d1] = *date else { return None };
    let [h0, h1, b':', n0, n1, b':', s0, s1] = *clock else { return None };
    let days = days_from_civil(number(&[y0, y1, y2, y3])?, number(&[m0, m1])?, number(&[d0, d1])?)?;
    let (hour, minute, second) = (number(&[h0, h1])?, number(&[n0, n1])?, number(&[s0, s1])?);
    if !matches!(t, b'T' | b't') || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (nanos, zone) = fraction(rest)?;
    let local = days.checked_mul(DAY)?.checked_add(clock_seconds(hour, minute)?)?;
    let seconds = local.checked_add(second)?.checked_sub(zone_seconds(zone)?)?;
    Some(Mtime { seconds, nanos })
}

/// Splits `.123Z` into nanoseconds and the zone.
fn fraction(text: &[u8]) -> Option<(u32, &[u8])> {
    let Some(digits) = text.strip_prefix(b".") else { return Some((0, text)) };
    let len = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, zone) = digits.split_at_checked(len)?;
    if digits.is_empty() {
        return None;
    }
    let padded: Vec<u8> = digits.iter().copied().chain([b'0'; 9]).take(9).collect();
    Some((u32::try_from(number(&padded)?).ok()?, zone))
}

fn zone_seconds(zone: &[u8]) -> Option<i64> {
    match *zone {
        [b'Z' | b'z'] => Some(0),
        [sign @ (b'+' | b'-'), h0, h1, b':', m0, m1] => {
            let seconds = clock_seconds(number(&[h0, h1])?, number(&[m0, m1])?)?;
            if sign == b'-' { seconds.checked_neg() } else { Some(seconds) }
        }
        _ => None,
    }
}

fn clock_seconds(hour: i64, minute: i64) -> Option<i64> {
    hour.checked_mul(3600)?.checked_add(minute.checked_mul(60)?)
}

fn number(digits: &[u8]) -> Option<i64> {
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The proleptic Gregorian date of a day counted from 1970-01-01, if its year is 0 to 9999.
///
/// The years begin in March here, so that the leap day is the last of its year: 400 of them have
/// 146,097 days, and five months in turn have 153.
fn civil_from_days(days: i64) -> Option<(i64, i64, i64)> {
    // 719,468 days lie between 0000-03-01 and 1970-01-01.
    let days = days.checked_add(719_468)?;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = of_era
        .checked_sub(of_era / 1460)?
        .checked_add(of_era / 36_524)?
        .checked_sub(of_era / 146_096)?
        / 365;
    let leap_days = (year_of_era / 4).checked_sub(year_of_era / 100)?;
    let of_year = of_era.checked_sub(year_of_era.checked_mul(365)?.checked_add(leap_days)?)?;
    let march_month = of_year.checked_mul(5)?.checked_add(2)? / 153;
    let before_month = march_month.checked_mul(153)?.checked_add(2)? / 5;
    let day = of_year.checked_sub(before_month)?.checked_add(1)?;
    let month =
        if march_month < 10 { march_month.checked_add(3)? } else { march_month.checked_sub(9)? };
    let year =
        era.checked_mul(400)?.checked_add(year_of_era)?.checked_add(i64::from(month <= 2))?;
    (0..=9999).contains(&year).then_some((year, month, day))
}

/// The inverse of [`civil_from_days`]; `None` for what is no date.
fn days_from_civil(year: i64, month: i64, day: i64) -> Option<i64> {
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let march_year = year.checked_sub(i64::from(month <= 2))?;
    let era = march_year.div_euclid(400);
    let year_of_era = march_year.rem_euclid(400);
    let march_month = month.checked_add(9)? % 12;
    let before_month = march_month.checked_mul(153)?.checked_add(2)? / 5;
    let leap_days = (year_of_era / 4).checked_sub(year_of_era / 100)?;
    let of_era = year_of_era.checked_mul(365)?.checked_add(leap_days)?.checked_add(before_month)?;
    let days =
        era.checked_mul(146_097)?.checked_add(of_era)?.checked_add(day)?.checked_sub(719_469)?;
    // The 31st of a short month comes back as another date.
    (civil_from_days(days)? == (year, month, day)).then_some(days)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(seconds: i64, nanos: u32, text: &str) {
        let time = Mtime { seconds, nanos };
        assert_eq!(format(time), text);
        assert_eq!(parse(text.as_bytes()), Some(time));
    }

    #[test]
    fn known_times() {
        check(0, 0, "1970-01-01T00:00:00Z");
        check(-1, 500_000_000, "1969-12-31T23:59:59.5Z");
        check(951_782_400, 1, "2000-02-29T00:00:00.000000001Z");
        check(1_792_410_896, 120_000_000, "2026-10-19T11:54:56.12Z");
        check(-62_135_596_800, 0, "0001-01-01T00:00:00Z");
        check(253_402_300_799, 999_999_999, "9999-12-31T23:59:59.999999999Z");
    }

    #[test]
    fn offsets_are_taken_off() {
        let time = Some(Mtime { seconds: 3600, nanos: 0 });
        assert_eq!(parse(b"1970-01-01T03:00:00+02:00"), time);
        assert_eq!(parse(b"1969-12-31T23:30:00-01:30"), time);
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "1970-01-01",
            "1970-02-30T00:00:00Z",
            "1970-13-01T00:00:00Z",
            "1970-01-01T24:00:00Z",
            "1970-01-01T00:00:00",
            "1970-01-01T00:00:00.Z",
            "1970-01-01T00:00:00+2",
            "197x-01-01T00:00:00Z",
        ] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
        assert_eq!(format(Mtime { seconds: i64::MAX, nanos: 0 }), "");
        assert_eq!(format(Mtime { seconds: i64::MIN, nanos: 0 }), "");
    }

    proptest! {
        #[test]
        fn every_time_comes_back(
            seconds in -62_167_219_200_i64..253_402_300_800,
            nanos in 0..1_000_000_000_u32,
        ) {
            let time = Mtime { seconds, nanos };
            prop_assert_eq!(parse(format(time).as_bytes()), Some(time));
        }

        #[test]
        fn any_bytes_are_answered(text in proptest::collection::vec(any::<u8>(), 0..40)) {
            parse(&text);
        }
    }
}
