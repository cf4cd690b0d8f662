//! PAX records: `<length> <key>=<value>\n`, read by their length, as values may hold anything.

use std::collections::BTreeMap;

use crate::sparse;
use crate::toc::Mtime;

/// Records of one entry, sorted by key, each key once.
pub(super) type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// Reads the body of an `x` record. As in Go, the later of two records with the same key counts, and
/// the pairs of sparse version 0.0 become the single map of version 0.1. `None` if it is malformed.
pub(super) fn parse(mut body: &[u8]) -> Option<Records> {
    let mut records = BTreeMap::new();
    let mut sparse_numbers: Vec<&[u8]> = Vec::new();
    while !body.is_empty() {
        let (key, value, rest) = record(body)?;
        body = rest;
        match key {
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let offset_is_due = sparse_numbers.len().is_multiple_of(2);
                if (key == b"GNU.sparse.offset") != offset_is_due || value.contains(&b',') {
                    return None;
                }
                sparse_numbers.push(value);
            }
            _ => {
                records.insert(key.to_vec(), value.to_vec());
            }
        }
    }
    if !sparse_numbers.is_empty() {
        records.insert(sparse::MAP.to_vec(), sparse_numbers.join(&b','));
    }
    Some(records.into_iter().collect())
}

/// Splits off one record: its key, its value and what follows.
fn record(body: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = body.iter().position(|&byte| byte == b' ')?;
    let len = integer(body.get(..space)?)?;
    let len = usize::try_from(len).ok().filter(|&len| len >= 5)?;
    let (whole, rest) = body.split_at_checked(len)?;
    let text = whole.get(space.checked_add(1)?..)?.strip_suffix(b"\n")?;
    let equals = text.iter().position(|&byte| byte == b'=')?;
    let (key, value) = (text.get(..equals)?, text.get(equals.checked_add(1)?..)?);
    let valid = match key {
        b"" => false,
        b"path" | b"linkpath" | b"uname" | b"gname" => !value.contains(&0),
        _ => !key.contains(&0),
    };
    valid.then_some((key, value, rest))
}

/// A decimal number, possibly signed.
pub(super) fn integer(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A time: seconds with an optional fraction, of which nine digits count.
pub(super) fn time(text: &[u8]) -> Option<Mtime> {
    let mut halves = text.splitn(2, |&byte| byte == b'.');
    let whole = halves.next()?;
    let fraction = halves.next().unwrap_or_default();
    let seconds = integer(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits: Vec<u8> = fraction.iter().copied().chain([b'0'; 9]).take(9).collect();
    let nanos = u32::try_from(integer(&digits)?).ok()?;
    // -1.25 is a quarter of a second before -1, that is 0.75 after -2.
    Some(if whole.starts_with(b"-") && nanos > 0 {
        Mtime { seconds: seconds.checked_sub(1)?, nanos: 1_000_000_000_u32.checked_sub(nanos)? }
    } else {
        Mtime { seconds, nanos }
    })
}

/// A sparse map that holds something else than numbers.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadMap;

/// The map of sparse version 1.0, block by block: a count, then as many pairs, each number on a
/// line of its own.
#[derive(Debug, Default)]
pub(super) struct SparseMapText {
    text: Vec<u8>,
    lines: usize,
    /// How many lines there must be, once the first is known.
    wanted: Option<usize>,
}

impl SparseMapText {
    /// Adds a block; the pieces once all lines are there.
    pub(super) fn push(&mut self, block: &[u8]) -> Result<Option<Vec<(u64, u64)>>, BadMap> {
        self.text.extend_from_slice(block);
        let lines = block.iter().filter(|&&byte| byte == b'\n').count();
        self.lines = self.lines.saturating_add(lines);
        if self.wanted.is_none() && self.lines > 0 {
            let pairs = self.numbers().next().ok_or(BadMap)??.checked_mul(2).ok_or(BadMap)?;
            let pairs = usize::try_from(pairs).map_err(|_wide| BadMap)?;
            self.wanted = Some(pairs.checked_add(1).ok_or(BadMap)?);
        }
        match self.wanted {
            Some(wanted) if self.lines >= wanted => self.pieces(wanted / 2).map(Some),
            _ => Ok(None),
        }
    }

    /// How many bytes were pushed.
    pub(super) fn len(&self) -> usize {
        self.text.len()
    }

    fn numbers(&self) -> impl Iterator<Item = Result<u64, BadMap>> {
        self.text.split(|&byte| byte == b'\n').map(|line| sparse::decimal(line).ok_or(BadMap))
    }

    fn pieces(&self, count: usize) -> Result<Vec<(u64, u64)>, BadMap> {
        let mut numbers = self.numbers().skip(1);
        let mut pieces = Vec::new();
        for _ in 0..count {
            let offset = numbers.next().ok_or(BadMap)??;
            pieces.push((offset, numbers.next().ok_or(BadMap)??));
        }
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(key: &str, value: &str) -> (Vec<u8>, Vec<u8>) {
        (key.into(), value.into())
    }

    #[test]
    fn values_may_hold_newlines_and_equals_signs() {
        let body = b"15 a=x\n9 b=y\n\n\n9 c==\n\n\n";
        assert_eq!(parse(body), None, "the last record's length is wrong");
        let body = b"15 a=x\n9 b=y\n\n\n7 c==\n\n";
        let expected = vec![pair("a", "x\n9 b=y\n\n"), pair("c", "=\n")];
        assert_eq!(parse(body), Some(expected));
    }

    #[test]
    fn the_later_record_counts_and_keys_are_sorted() {
        let expected = vec![pair("a", "3"), pair("b", "2")];
        assert_eq!(parse(b"6 a=1\n6 b=2\n6 a=3\n"), Some(expected));
    }

    #[test]
    fn malformed_records_are_refused() {
        for body in [
            "6 a=1",
            "7 a=1\n",
            "5 a=1\n",
            "4 =\n",
            "6 ab1\n",
            "6 =ab\n",
            "-6 a=1\n",
            " a=1\n",
            "x",
            "9 \0ab=1\n",
            "12 path=a\0b\n",
            "99999999999999999999 a=1\n",
        ] {
            assert_eq!(parse(body.as_bytes()), None, "{body:?}");
        }
    }

    #[test]
    fn sparse_pairs_become_a_map() {
        let body = b"22 GNU.sparse.offset=1\n24 GNU.sparse.numbytes=2\n";
        assert_eq!(parse(body), None, "lengths are one short");
        let body = b"23 GNU.sparse.offset=1\n25 GNU.sparse.numbytes=2\n";
        assert_eq!(parse(body), Some(vec![pair("GNU.sparse.map", "1,2")]));
        assert_eq!(parse(b"25 GNU.sparse.numbytes=2\n"), None);
    }

    #[test]
    fn times() {
        let check = |text: &str, expected: Option<(i64, u32)>| {
            let expected = expected.map(|(seconds, nanos)| Mtime { seconds, nanos });
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        };
        check("1", Some((1, 0)));
        check("1.", Some((1, 0)));
        check("1.5", Some((1, 500_000_000)));
        check("1.0000000019", Some((1, 1)));
        check("-1.25", Some((-2, 750_000_000)));
        check("-0.25", Some((-1, 750_000_000)));
        check("", None);
        check("1.x", None);
        check("1.5.5", None);
    }

    #[test]
    fn sparse_maps_of_version_1() {
        let check = |text: &str, expected| {
            assert_eq!(SparseMapText::default().push(text.as_bytes()), expected, "{text:?}");
        };
        check("2\n0\n512\n", Ok(None));
        check("2\n0\n512\n1024\n1\n\0\0", Ok(Some(vec![(0, 512), (1024, 1)])));
        check("0\n\0", Ok(Some(vec![])));
        check("x\n", Err(BadMap));
        check("9223372036854775807\n", Ok(None));
        check("9223372036854775808\n", Err(BadMap));
        check("1\n-1\n5\n", Err(BadMap));
    }
}
