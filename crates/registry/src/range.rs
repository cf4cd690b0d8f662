//! Byte ranges in HTTP: what is asked for, and what an answer says that it holds.

use std::ops::Range;

/// What a `Content-Range` header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ContentRange {
    /// The bytes that follow; `None` in an answer of status 416.
    pub(crate) range: Option<Range<u64>>,
    /// The size of the whole.
    pub(crate) size: Option<u64>,
}

/// The value of a `Range` header for a range that is not empty.
pub(crate) fn request_header(range: &Range<u64>) -> String {
    format!("bytes={}-{}", range.start, range.end.saturating_sub(1))
}

/// Reads `bytes 0-9/100`, `bytes 0-9/*` or `bytes */100`.
pub(crate) fn parse_content_range(header: &str) -> Option<ContentRange> {
    let (unit, rest) = header.trim().split_once(' ')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (range, size) = rest.trim().split_once('/')?;
    let size = if size == "*" { None } else { Some(number(size)?) };
    if range == "*" {
        return Some(ContentRange { range: None, size });
    }
    let (first, last) = range.split_once('-')?;
    let (start, end) = (number(first)?, number(last)?.checked_add(1)?);
    let within = start < end && size.is_none_or(|size| end <= size);
    within.then_some(ContentRange { range: Some(start..end), size })
}

fn number(text: &str) -> Option<u64> {
    // `parse` alone would take a plus sign.
    if text.starts_with('+') { None } else { text.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(header: &str, expected: Option<(Option<Range<u64>>, Option<u64>)>) {
        let expected = expected.map(|(range, size)| ContentRange { range, size });
        assert_eq!(parse_content_range(header), expected, "{header}");
    }

    #[test]
    fn content_ranges_are_read() {
        check("bytes 0-9/100", Some((Some(0..10), Some(100))));
        check("Bytes 5-5/6", Some((Some(5..6), Some(6))));
        check("bytes 0-9/*", Some((Some(0..10), None)));
        check("bytes */100", Some((None, Some(100))));
        for malformed in [
            "",
            "bytes",
            "bytes=0-9/100",
            "bytes 0-9",
            "bytes 9-0/100",
            "bytes 0-100/100",
            "bytes -9/100",
            "bytes +0-9/100",
            "bytes 0-18446744073709551615/*",
            "items 0-9/100",
        ] {
            check(malformed, None);
        }
    }

    #[test]
    fn the_last_byte_asked_for_is_included() {
        assert_eq!(request_header(&(0..1)), "bytes=0-0");
        assert_eq!(request_header(&(10..20)), "bytes=10-19");
    }
}
