//! The `Range` header, of a single range (RFC 9110, 14.1.2).

/// A range as it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RangeHeader {
    /// `bytes=first-last`, or `bytes=first-` with no last.
    From { first: u64, last: Option<u64> },
    /// `bytes=-len`: the last bytes.
    Suffix { len: u64 },
}

/// What that means for a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Requested {
    Whole,
    Part { start: u64, end: u64 },
    Unsatisfiable,
}

impl RangeHeader {
    /// `None` if it is malformed or of several ranges: such a header may be ignored.
    pub(super) fn parse(value: &str) -> Option<Self> {
        let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| text.parse::<u64>().ok()).flatten()
        };
        if first.is_empty() {
            return Some(Self::Suffix { len: number(last)? });
        }
        let first = number(first)?;
        if last.is_empty() {
            return Some(Self::From { first, last: None });
        }
        let last = number(last).filter(|&last| last >= first)?;
        Some(Self::From { first, last: Some(last) })
    }

    /// First and last byte; an open range ends at `u64::MAX`.
    pub(super) fn first_and_last(self) -> Option<(u64, u64)> {
        match self {
            Self::From { first, last } => Some((first, last.unwrap_or(u64::MAX))),
            Self::Suffix { .. } => None,
        }
    }

    /// The part of a blob of `len` bytes.
    pub(super) fn of(self, len: u64) -> Requested {
        match self {
            Self::From { first, .. } if first >= len => Requested::Unsatisfiable,
            Self::From { first, last } => {
                let end = last.map_or(len, |last| last.saturating_add(1).min(len));
                Requested::Part { start: first, end }
            }
            Self::Suffix { len: 0 } => Requested::Unsatisfiable,
            Self::Suffix { .. } if len == 0 => Requested::Unsatisfiable,
            Self::Suffix { len: suffix } => {
                Requested::Part { start: len.saturating_sub(suffix), end: len }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{RangeHeader, Requested};

    #[track_caller]
    fn check(header: &str, len: u64, expected: Requested) {
        let requested = RangeHeader::parse(header).map_or(Requested::Whole, |range| range.of(len));
        assert_eq!(requested, expected, "{header} of {len}");
    }

    #[test]
    fn ranges_are_cut_to_the_blob_or_refused() {
        let part = |start, end| Requested::Part { start, end };
        check("bytes=0-0", 10, part(0, 1));
        check("bytes=2-5", 10, part(2, 6));
        check("bytes=2-50", 10, part(2, 10));
        check("bytes=2-18446744073709551615", 10, part(2, 10));
        check("bytes=9-", 10, part(9, 10));
        check("bytes=-3", 10, part(7, 10));
        check("bytes=-30", 10, part(0, 10));
        check("bytes=10-", 10, Requested::Unsatisfiable);
        check("bytes=10-12", 10, Requested::Unsatisfiable);
        check("bytes=-0", 10, Requested::Unsatisfiable);
        check("bytes=0-", 0, Requested::Unsatisfiable);
        check("bytes=-1", 0, Requested::Unsatisfiable);
    }

    #[test]
    fn what_is_not_one_range_is_ignored() {
        for header in [
            "bytes=5-2",
            "bytes=a-b",
            "bytes=-",
            "bytes=",
            "items=0-1",
            "bytes=0-1,3-4",
            "bytes=+1-2",
        ] {
            check(header, 10, Requested::Whole);
        }
    }
}
