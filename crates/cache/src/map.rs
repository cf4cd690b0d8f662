//! The presence map on disk: which spans of a layer are there, with a checksum each.
//!
//! All numbers are little-endian.
//!
//! ```text
//! 0   8   "HERMESPM"
//! 8   4   version, 1
//! 12  4   number of spans, n
//! 16  8   length of the uncompressed layer in bytes
//! 24  32  sha256 of the index that the spans are from
//! 56  4   crc32c of the table of starts
//! 60  4   crc32c of bytes 0..60
//! 64  8n  where each span starts in the uncompressed layer
//! ..      zeros up to a multiple of 16
//!     16n one record for each span
//! ```
//!
//! A record of 16 zero bytes says that the span is missing. Another record is 8 bytes of origin, the
//! crc32c of the span's bytes, and a guard: crc32c over index, span number, origin and checksum. One
//! whose guard is wrong says that the span is missing, too. A record never crosses a 512-byte sector,
//! so it is written whole or not at all.

use oci::Digest;

/// Why the bytes of a map cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// They do not start like a map.
    #[error("the presence map has no valid header")]
    Header,
    /// They were written by a later version.
    #[error("the presence map has version {found}, this program knows 1")]
    Version {
        /// The version found.
        found: u32,
    },
    /// There are more or fewer bytes than the header announces.
    #[error("the presence map has a wrong length")]
    Length,
    /// The spans do not fit the layer or their checksum.
    #[error("the presence map's spans are damaged")]
    Spans,
}

/// Who vouches for the bytes of a present span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// They had reached the disk when the record was written.
    Disk,
    /// They were written during the boot with this tag, and are in doubt after another.
    Boot(BootTag),
}

/// A short name for one boot of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BootTag(u64);

impl BootTag {
    /// No boot's tag: what bears it is in doubt for ever.
    pub(crate) const NONE: Self = Self(1);

    pub(crate) fn of(boot_id: &str) -> Self {
        let digest = Digest::of(boot_id.as_bytes());
        let mut tag = [0; 8];
        tag.copy_from_slice(digest.as_bytes().split_at(8).0);
        // 0 and 1 have other meanings.
        Self(u64::from_le_bytes(tag).max(2))
    }
}

/// What the map says of a present span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) origin: Origin,
    /// crc32c of the span's uncompressed bytes.
    pub(crate) crc: u32,
}

/// A presence map as it lies on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    pub(crate) bytes: u64,
    pub(crate) index: Digest,
    pub(crate) starts: Vec<u64>,
    pub(crate) records: Vec<Option<Record>>,
}

const MAGIC: &[u8; 8] = b"HERMESPM";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 64;
pub(crate) const RECORD_LEN: usize = 16;

/// 16 million spans are 64 TiB of 4 MiB spans; a header that says more is not believed.
pub(crate) const MAX_SPANS: u32 = 1 << 24;

/// The longest possible map in bytes.
pub(crate) const MAX_MAP_LEN: u64 = 64 + 16 + 24 * (1 << 24);

impl Map {
    /// A map that says that every span is missing.
    pub(crate) fn empty(bytes: u64, index: Digest, starts: Vec<u64>) -> Self {
        let records = vec![None; starts.len()];
        Self { bytes, index, starts, records }
    }

    /// Whether each span is present, in their order.
    pub fn present(&self) -> impl Iterator<Item = bool> {
        self.records.iter().map(Option::is_some)
    }

    /// The bytes of the file.
    ///
    /// # Panics
    /// Never: no map has more than 2^24 spans.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let count = u32::try_from(self.starts.len()).expect("a shape has at most MAX_SPANS spans");
        let starts: Vec<u8> = self.starts.iter().flat_map(|start| start.to_le_bytes()).collect();
        let mut out =
            Vec::with_capacity(records_at(self.starts.len()) + RECORD_LEN * self.starts.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(self.index.as_bytes());
        out.extend_from_slice(&crc32c::crc32c(&starts).to_le_bytes());
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(&starts);
        out.resize(records_at(self.starts.len()), 0);
        for (span, record) in (0..).zip(&self.records) {
            out.extend_from_slice(&encode_record(&self.index, span, *record));
        }
        out
    }

    /// Reads the bytes of the file. A span whose record is damaged counts as missing.
    ///
    /// # Errors
    /// They are no map, or one of which nothing can be used.
    pub fn decode(file: &[u8]) -> Result<Self, MapError> {
        let header: &[u8; HEADER_LEN] = file.first_chunk().ok_or(MapError::Header)?;
        let (covered, crc) = header.split_at(HEADER_LEN - 4);
        if !header.starts_with(MAGIC) || crc32c::crc32c(covered).to_le_bytes() != *crc {
            return Err(MapError::Header);
        }
        let version = le_u32(header, 8);
        if version != VERSION {
            return Err(MapError::Version { found: version });
        }
        let count = le_u32(header, 12);
        if count > MAX_SPANS {
            return Err(MapError::Spans);
        }
        let count = usize::try_from(count).map_err(|_too_many| MapError::Spans)?;
        if file.len() != records_at(count) + RECORD_LEN * count {
            return Err(MapError::Length);
        }
        let table = file.get(HEADER_LEN..HEADER_LEN + 8 * count).ok_or(MapError::Length)?;
        let records = file.get(records_at(count)..).ok_or(MapError::Length)?;
        let bytes = le_u64(header, 16);
        let starts: Vec<u64> =
            table.as_chunks().0.iter().map(|start| u64::from_le_bytes(*start)).collect();
        if crc32c::crc32c(table) != le_u32(header, 56) || !is_shape(bytes, &starts) {
            return Err(MapError::Spans);
        }
        let mut index = [0; 32];
        index.copy_from_slice(header.split_at(24).1.split_at(32).0);
        let index = Digest::from_bytes(index);
        let records = (0..)
            .zip(records.as_chunks().0)
            .map(|(span, record)| decode_record(&index, span, record))
            .collect();
        Ok(Self { bytes, index, starts, records })
    }
}

/// Whether spans that start at `starts` can make up `bytes` bytes.
pub(crate) fn is_shape(bytes: u64, starts: &[u64]) -> bool {
    u32::try_from(starts.len()).is_ok_and(|count| count <= MAX_SPANS)
        && starts.first().map_or(bytes == 0, |first| *first == 0)
        && starts.is_sorted()
        && starts.last().is_none_or(|last| *last <= bytes)
}

/// Where the record of a span lies in the file.
pub(crate) fn record_offset(count: usize, span: u32) -> u64 {
    let base = u64::try_from(records_at(count)).expect("a map is shorter than 2^64 bytes");
    base + u64::from(span) * 16
}

pub(crate) fn encode_record(index: &Digest, span: u32, record: Option<Record>) -> [u8; RECORD_LEN] {
    let mut out = [0; RECORD_LEN];
    let Some(record) = record else { return out };
    let origin = match record.origin {
        Origin::Disk => 0,
        Origin::Boot(tag) => tag.0,
    };
    let (head, tail) = out.split_at_mut(8);
    head.copy_from_slice(&origin.to_le_bytes());
    let (crc, guard) = tail.split_at_mut(4);
    crc.copy_from_slice(&record.crc.to_le_bytes());
    guard.copy_from_slice(&guard_of(index, span, origin, record.crc).to_le_bytes());
    out
}

fn decode_record(index: &Digest, span: u32, bytes: &[u8; RECORD_LEN]) -> Option<Record> {
    let (origin, crc, guard) = (le_u64(bytes, 0), le_u32(bytes, 8), le_u32(bytes, 12));
    if guard != guard_of(index, span, origin, crc) {
        return None;
    }
    let origin = if origin == 0 { Origin::Disk } else { Origin::Boot(BootTag(origin)) };
    Some(Record { origin, crc })
}

/// Never 0, so that 16 zero bytes are no valid record.
fn guard_of(index: &Digest, span: u32, origin: u64, crc: u32) -> u32 {
    let mut guard = crc32c::crc32c(index.as_bytes());
    guard = crc32c::crc32c_append(guard, &span.to_le_bytes());
    guard = crc32c::crc32c_append(guard, &origin.to_le_bytes());
    crc32c::crc32c_append(guard, &crc.to_le_bytes()).max(1)
}

const fn records_at(count: usize) -> usize {
    (HEADER_LEN + 8 * count).next_multiple_of(RECORD_LEN)
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(bytes.split_at(at).1.split_at(4).0);
    u32::from_le_bytes(number)
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(bytes.split_at(at).1.split_at(8).0);
    u64::from_le_bytes(number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> impl Strategy<Value = Option<Record>> {
        let origin = prop_oneof![
            Just(Origin::Disk),
            "[a-z]{0,4}".prop_map(|id| Origin::Boot(BootTag::of(&id)))
        ];
        prop::option::of((origin, any::<u32>()).prop_map(|(origin, crc)| Record { origin, crc }))
    }

    fn map() -> impl Strategy<Value = Map> {
        (any::<[u8; 32]>(), prop::collection::vec((0_u64..9000, record()), 0..40), 0_u64..9000)
            .prop_map(|(index, spans, rest)| {
                let (mut starts, records): (Vec<u64>, Vec<_>) = spans.into_iter().unzip();
                starts.sort_unstable();
                if let Some(first) = starts.first_mut() {
                    *first = 0;
                }
                let bytes = starts.last().map_or(0, |last| last + rest);
                Map { bytes, index: Digest::from_bytes(index), starts, records }
            })
    }

    proptest! {
        #[test]
        fn a_map_is_read_as_it_was_written(map in map()) {
            prop_assert_eq!(Map::decode(&map.encode()), Ok(map));
        }

        #[test]
        fn a_flipped_bit_makes_no_span_present_that_was_not(map in map(), at: prop::sample::Index, bit in 0..8_u32) {
            let mut bytes = map.encode();
            bytes[at.index(map.encode().len())] ^= 1 << bit;
            if let Ok(found) = Map::decode(&bytes) {
                prop_assert_eq!(found.starts, map.starts);
                prop_assert_eq!(found.bytes, map.bytes);
                for (found, written) in found.records.iter().zip(&map.records) {
                    prop_assert!(found.is_none() || found == written);
                }
            }
        }

        #[test]
        fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Map::decode(&bytes).is_err());
        }

        #[test]
        fn cut_or_longer_files_are_refused(map in map(), len in 0_usize..2000) {
            let mut bytes = map.encode();
            prop_assume!(len != bytes.len());
            bytes.resize(len, 0);
            prop_assert!(Map::decode(&bytes).is_err());
        }
    }

    #[test]
    fn a_later_version_is_named() {
        let mut bytes = Map::empty(0, Digest::of(b""), Vec::new()).encode();
        bytes[8] = 2;
        let crc = crc32c::crc32c(&bytes[..60]).to_le_bytes();
        bytes[60..64].copy_from_slice(&crc);
        assert_eq!(Map::decode(&bytes), Err(MapError::Version { found: 2 }));
    }

    #[test]
    fn a_header_that_announces_too_much_allocates_nothing() {
        let mut bytes = Map::empty(0, Digest::of(b""), Vec::new()).encode();
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]).to_le_bytes();
        bytes[60..64].copy_from_slice(&crc);
        assert_eq!(Map::decode(&bytes), Err(MapError::Spans));
    }

    #[test]
    fn no_boot_has_the_tag_of_another_meaning() {
        assert_ne!(BootTag::of(""), BootTag::NONE);
        assert_ne!(BootTag::of("a"), BootTag::of("b"));
        let zero = encode_record(&Digest::of(b""), 0, None);
        assert_eq!(decode_record(&Digest::of(b""), 0, &zero), None);
    }
}
