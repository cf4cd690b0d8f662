//! The PAX forms of GNU sparse files, as far as they stand in records.
//!
//! Version 0.0 repeats a pair of records for each piece (the tar reader joins them, as Go's does),
//! 0.1 has one record with all of them, 1.0 has the map at the start of the data.

use crate::toc::{SparseMap, TocEntry};

/// The key of the map: `offset,length,offset,length,...` in decimal.
pub(crate) const MAP: &[u8] = b"GNU.sparse.map";
pub(crate) const NUM_BLOCKS: &[u8] = b"GNU.sparse.numblocks";
pub(crate) const MAJOR: &[u8] = b"GNU.sparse.major";
pub(crate) const MINOR: &[u8] = b"GNU.sparse.minor";
pub(crate) const NAME: &[u8] = b"GNU.sparse.name";
pub(crate) const SIZE: &[u8] = b"GNU.sparse.size";
pub(crate) const REAL_SIZE: &[u8] = b"GNU.sparse.realsize";

/// Records that contradict themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadSparse;

/// What the PAX records of an entry say about its sparseness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PaxSparse {
    /// An ordinary file (or a version that nobody knows, which Go also takes as ordinary).
    No,
    /// The pieces, not validated yet.
    Pieces(Vec<(u64, u64)>),
    /// Version 1.0: the map is in the data.
    InData,
}

type Records = [(Vec<u8>, Vec<u8>)];

/// The value of a record; empty if there is none.
pub(crate) fn value<'a>(pax: &'a Records, key: &[u8]) -> &'a [u8] {
    find(pax, key).unwrap_or_default()
}

fn find<'a>(pax: &'a Records, key: &[u8]) -> Option<&'a [u8]> {
    pax.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_slice())
}

/// A decimal number as Go's `ParseInt` takes it, if not negative.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    let number: i64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    u64::try_from(number).ok()
}

/// Reads the records by the rules of Go's archive/tar; a map that [`complete_records`] added to a
/// version 1.0 file counts too.
pub(crate) fn from_records(pax: &Records) -> Result<PaxSparse, BadSparse> {
    let map = find(pax, MAP);
    match (value(pax, MAJOR), value(pax, MINOR)) {
        (b"0", b"0" | b"1") => counted_pieces(pax).map(PaxSparse::Pieces),
        (b"1", b"0") => match map {
            None => Ok(PaxSparse::InData),
            Some(map) => pieces(map).map(PaxSparse::Pieces),
        },
        (b"", b"") if map.is_some_and(|map| !map.is_empty()) => {
            counted_pieces(pax).map(PaxSparse::Pieces)
        }
        _ => Ok(PaxSparse::No),
    }
}

/// The size of the file that a sparse entry makes, if a record tells it.
pub(crate) fn logical_size(pax: &Records) -> Result<Option<u64>, BadSparse> {
    let text = match value(pax, SIZE) {
        b"" => value(pax, REAL_SIZE),
        text => text,
    };
    if text.is_empty() { Ok(None) } else { decimal(text).map(Some).ok_or(BadSparse) }
}

fn counted_pieces(pax: &Records) -> Result<Vec<(u64, u64)>, BadSparse> {
    let pieces = pieces(value(pax, MAP))?;
    let count = decimal(value(pax, NUM_BLOCKS)).ok_or(BadSparse)?;
    if usize::try_from(count) == Ok(pieces.len()) { Ok(pieces) } else { Err(BadSparse) }
}

fn pieces(map: &[u8]) -> Result<Vec<(u64, u64)>, BadSparse> {
    if map.is_empty() {
        return Ok(Vec::new());
    }
    let mut numbers = map.split(|&byte| byte == b',').map(|text| decimal(text).ok_or(BadSparse));
    let mut pieces = Vec::new();
    while let Some(offset) = numbers.next() {
        pieces.push((offset?, numbers.next().ok_or(BadSparse)??));
    }
    Ok(pieces)
}

/// Checks pieces against the file they make and the bytes that the archive holds for them; drops
/// empty ones.
pub(crate) fn checked_map(
    mut pieces: Vec<(u64, u64)>,
    logical_size: u64,
    archived: Option<u64>,
) -> Result<SparseMap, BadSparse> {
    if i64::try_from(logical_size).is_err() {
        return Err(BadSparse);
    }
    let (mut end, mut sum) = (0_u64, 0_u64);
    for &(offset, len) in &pieces {
        if offset < end {
            return Err(BadSparse);
        }
        end = offset.checked_add(len).ok_or(BadSparse)?;
        // Disjoint and within the file, so the sum cannot overflow either.
        sum = sum.saturating_add(len);
    }
    if end > logical_size || archived.is_some_and(|archived| sum > archived) {
        return Err(BadSparse);
    }
    pieces.retain(|&(_, len)| len > 0);
    Ok(SparseMap { pieces, logical_size })
}

/// How many bytes the archive holds for the pieces of a map.
pub(crate) fn archived_size(map: &SparseMap) -> u64 {
    map.pieces.iter().fold(0, |sum, &(_, len)| sum.saturating_add(len))
}

/// Adds the records that a zTOC needs to carry the map of an entry: it has no other place for one.
///
/// Only for files in the old GNU form, of which SOCI can build no zTOC at all, and in PAX version
/// 1.0, whose zTOC by SOCI lacks the map and is refused by SOCI itself.
pub(crate) fn complete_records(entry: &mut TocEntry) {
    let Some(map) = &entry.sparse else { return };
    if find(&entry.pax, MAP).is_some() {
        return;
    }
    let numbers: Vec<String> = map.pieces.iter().map(|(at, len)| format!("{at},{len}")).collect();
    let mut add = |key: &[u8], value: String| match entry
        .pax
        .binary_search_by(|(present, _)| present.as_slice().cmp(key))
    {
        Ok(_present) => {}
        Err(place) => entry.pax.insert(place, (key.to_vec(), value.into_bytes())),
    };
    add(MAP, numbers.join(","));
    add(NUM_BLOCKS, numbers.len().to_string());
    add(SIZE, map.logical_size.to_string());
    add(MAJOR, "0".to_owned());
    add(MINOR, "1".to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(pairs: &[(&str, &str)]) -> Vec<(Vec<u8>, Vec<u8>)> {
        pairs.iter().map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec())).collect()
    }

    #[track_caller]
    fn check(pairs: &[(&str, &str)], expected: &PaxSparse) {
        assert_eq!(from_records(&records(pairs)).as_ref(), Ok(expected));
    }

    #[test]
    fn records_of_each_version() {
        let two = PaxSparse::Pieces(vec![(0, 512), (4096, 1)]);
        check(&[], &PaxSparse::No);
        check(&[("GNU.sparse.map", "0,512,4096,1"), ("GNU.sparse.numblocks", "2")], &two);
        check(&[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0")], &PaxSparse::InData);
        let with_map = [
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.map", "0,512,4096,1"),
            ("GNU.sparse.minor", "0"),
        ];
        check(&with_map, &two);
        check(&[("GNU.sparse.major", "2")], &PaxSparse::No);
    }

    #[test]
    fn contradictions_are_refused() {
        for (map, count) in
            [("0,512", "2"), ("0,512,3", "1"), ("0,-1", "1"), ("0,x", "1"), ("0,1", "")]
        {
            let pairs = [("GNU.sparse.map", map), ("GNU.sparse.numblocks", count)];
            assert_eq!(from_records(&records(&pairs)), Err(BadSparse), "{map} {count}");
        }
    }

    #[test]
    fn pieces_must_ascend_and_fit() {
        assert_eq!(checked_map(vec![(0, 5), (4, 1)], 10, None), Err(BadSparse));
        assert_eq!(checked_map(vec![(8, 5)], 10, None), Err(BadSparse));
        assert_eq!(checked_map(vec![(8, u64::MAX)], 10, None), Err(BadSparse));
        assert_eq!(checked_map(vec![(0, 5)], 10, Some(4)), Err(BadSparse));
        let map = SparseMap { pieces: vec![(0, 5)], logical_size: 10 };
        assert_eq!(checked_map(vec![(0, 5), (10, 0)], 10, Some(5)), Ok(map));
    }
}
