//! The span data inside a zTOC ("zinfo").
//!
//! gzip: the number of checkpoints (i32) and the span size (i64), then for each checkpoint a record:
//! compressed offset (i64), uncompressed offset (i64), bits (u8), window (32768 bytes); little-endian
//! and packed. Version 1 leaves out the first checkpoint, version 2 does not; only the length tells.
//! It tells of a third form as well, which is Hermes' own: the windows lie in a blob of their own, each
//! compressed for itself and one after the other, and a record ends with the size of that frame (u32) and
//! its sha256 (32 bytes), both zero where the span has no window.
//! Plain tar: a flatbuffer of version, span size and size.

use std::ops::Range;

use oci::Digest;

use super::{Checkpoint, Compression, SpanParts, SpanTable, WINDOW_SIZE, WindowFrame};
use crate::flatbuffer::{Builder, Table};

/// Span data that cannot be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadZinfo(pub(crate) &'static str);

const HEADER_LEN: usize = 12;
/// Where in a record the window begins.
const WINDOW_AT: usize = 17;
/// The length of a checkpoint's record.
pub(crate) const RECORD_LEN: usize = 32785;
const _: () = assert!(RECORD_LEN == WINDOW_AT + WINDOW_SIZE, "a record ends with its window");
/// The length of a checkpoint's record if its window is apart.
const APART_LEN: usize = 53;
const _: () = assert!(APART_LEN == WINDOW_AT + 4 + 32, "a record ends with size and digest");

/// What a zTOC says about its spans outside the zinfo.
#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) compressed_size: u64,
    pub(crate) uncompressed_size: u64,
    pub(crate) digests: Vec<Digest>,
    /// Where in the zTOC the zinfo lies.
    pub(crate) zinfo: Range<u64>,
}

impl SpanTable {
    /// Reads and checks the span data.
    pub(crate) fn parse(
        compression: Compression,
        zinfo: &[u8],
        surroundings: Surroundings,
    ) -> Result<Self, BadZinfo> {
        let Surroundings { compressed_size, uncompressed_size, digests, zinfo: place } =
            surroundings;
        let Parsed { span_size, checkpoints, unrecorded, apart } = match compression {
            Compression::Gzip => parse_gzip(zinfo)?,
            Compression::Uncompressed => parse_plain(zinfo, compressed_size, digests.len())?,
        };
        Self::try_from(SpanParts {
            compression,
            span_size,
            compressed_size,
            uncompressed_size,
            checkpoints,
            digests,
            zinfo: place,
            unrecorded,
            apart,
        })
    }
}

/// Where in a zinfo the window of a record lies.
pub(super) fn window_offset(record: u32) -> u64 {
    let start = u64::from(record).saturating_mul(to_u64(RECORD_LEN));
    start.saturating_add(to_u64(HEADER_LEN)).saturating_add(to_u64(WINDOW_AT))
}

/// The head of a gzip zinfo.
pub(crate) fn gzip_header(count: u32, span_size: u64) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    let (first, second) = header.split_at_mut(4);
    first.copy_from_slice(&count.to_le_bytes());
    second.copy_from_slice(&span_size.to_le_bytes());
    header
}

/// Appends a checkpoint's record, which ends with `window`.
pub(crate) fn gzip_record(zinfo: &mut Vec<u8>, point: &Checkpoint, window: &[u8]) {
    zinfo.extend_from_slice(&point.compressed.to_le_bytes());
    zinfo.extend_from_slice(&point.uncompressed.to_le_bytes());
    zinfo.push(point.bits);
    zinfo.extend_from_slice(window);
}

/// Appends a checkpoint's record whose window is apart: the size of its frame and the sha256, or nothing.
pub(crate) fn apart_record(zinfo: &mut Vec<u8>, point: &Checkpoint, frame: Option<(u32, Digest)>) {
    let (size, digest) = frame.unwrap_or((0, Digest::from_bytes([0; 32])));
    gzip_record(zinfo, point, &size.to_le_bytes());
    zinfo.extend_from_slice(digest.as_bytes());
}

/// The zinfo of a plain tar.
pub(crate) fn plain_zinfo(span_size: u64, size: u64) -> Vec<u8> {
    let mut builder = Builder::default();
    let mut table = builder.table();
    table.uint(0, 2);
    table.long(1, span_size);
    table.long(2, size);
    let root = table.end();
    builder.finish(root, Vec::new()).expect("a table of twenty bytes")
}

/// What a zinfo says.
#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    span_size: u64,
    checkpoints: Vec<Checkpoint>,
    unrecorded: u32,
    apart: Option<Vec<Option<WindowFrame>>>,
}

fn parse_gzip(zinfo: &[u8]) -> Result<Parsed, BadZinfo> {
    let (count, rest) = zinfo.split_first_chunk().ok_or(BadZinfo("the span data is cut"))?;
    let (span_size, records) = rest.split_first_chunk().ok_or(BadZinfo("the span data is cut"))?;
    let span_size = unsigned(*span_size)?;
    let count = u32::from_le_bytes(*count);
    // No number of records has the length of another number of those with a window.
    let len_apart = u64::from(count).saturating_mul(to_u64(APART_LEN));
    if count > 0 && len_apart == to_u64(records.len()) {
        return parse_apart(span_size, records);
    }
    let recorded = to_u64(records.len() / RECORD_LEN);
    let unrecorded = match u64::from(count).checked_sub(recorded) {
        _ if count == 0 || count > u32::MAX >> 1 => {
            return Err(BadZinfo("impossible number of checkpoints"));
        }
        Some(unrecorded @ 0..=1) if records.len() % RECORD_LEN == 0 => unrecorded,
        _ => return Err(BadZinfo("the span data has not the length that its count demands")),
    };
    let mut checkpoints = Vec::with_capacity(records.len() / RECORD_LEN);
    if unrecorded == 1 {
        // Version 1 knew only gzip headers without a name.
        checkpoints.push(Checkpoint { compressed: 10, uncompressed: 0, bits: 0 });
    }
    for record in records.chunks_exact(RECORD_LEN) {
        checkpoints.push(parse_record(record).ok_or(BadZinfo("the span data is cut"))??);
    }
    let unrecorded = u32::from(unrecorded == 1);
    Ok(Parsed { span_size, checkpoints, unrecorded, apart: None })
}

fn parse_apart(span_size: u64, records: &[u8]) -> Result<Parsed, BadZinfo> {
    let cut = BadZinfo("the span data is cut");
    let (mut checkpoints, mut frames, mut end) = (Vec::new(), Vec::new(), 0_u64);
    for record in records.chunks_exact(APART_LEN) {
        let point = parse_record(record).ok_or(cut)??;
        let (size, digest) = parse_frame(record).ok_or(cut)?;
        if size > WindowFrame::MOST_BYTES || (size == 0) != (point.uncompressed == 0) {
            return Err(BadZinfo("impossible size of a window apart"));
        }
        let start = end;
        end = end.saturating_add(size);
        frames.push((size > 0).then_some(WindowFrame { range: start..end, digest }));
        checkpoints.push(point);
    }
    Ok(Parsed { span_size, checkpoints, unrecorded: 0, apart: Some(frames) })
}

/// The size and the digest at the end of a record.
fn parse_frame(record: &[u8]) -> Option<(u64, Digest)> {
    let (size, rest) = record.get(WINDOW_AT..)?.split_first_chunk()?;
    let (digest, _) = rest.split_first_chunk()?;
    Some((u64::from(u32::from_le_bytes(*size)), Digest::from_bytes(*digest)))
}

fn parse_record(record: &[u8]) -> Option<Result<Checkpoint, BadZinfo>> {
    let (compressed, rest) = record.split_first_chunk()?;
    let (uncompressed, rest) = rest.split_first_chunk()?;
    let &bits = rest.first()?;
    Some(unsigned(*compressed).and_then(|compressed| {
        Ok(Checkpoint { compressed, uncompressed: unsigned(*uncompressed)?, bits })
    }))
}

fn parse_plain(zinfo: &[u8], size: u64, digests: usize) -> Result<Parsed, BadZinfo> {
    let malformed = |_out| BadZinfo("the span data of a plain layer is malformed");
    let table = Table::root(zinfo).map_err(malformed)?;
    let span_size = u64::try_from(table.long(6).map_err(malformed)?).unwrap_or(0);
    if table.long(8).map_err(malformed)?.cast_unsigned() != size {
        return Err(BadZinfo("the span data is for a layer of another size"));
    }
    // Counted before anything is allocated for them.
    if span_size == 0 {
        return Err(BadZinfo("the span size is not positive"));
    }
    let count = size.div_ceil(span_size);
    if count != to_u64(digests) {
        return Err(BadZinfo("the numbers of spans and digests differ"));
    }
    let offsets = (0..count).map(|index| index.saturating_mul(span_size));
    let point = |offset| Checkpoint { compressed: offset, uncompressed: offset, bits: 0 };
    let checkpoints = offsets.map(point).collect();
    Ok(Parsed { span_size, checkpoints, unrecorded: 0, apart: None })
}

fn unsigned(bytes: [u8; 8]) -> Result<u64, BadZinfo> {
    u64::try_from(i64::from_le_bytes(bytes)).map_err(|_negative| BadZinfo("a negative offset"))
}

fn to_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zinfo(points: &[Checkpoint], recorded: &[Checkpoint]) -> Vec<u8> {
        let mut zinfo = gzip_header(u32::try_from(points.len()).unwrap(), 4096).to_vec();
        for point in recorded {
            gzip_record(&mut zinfo, point, &[7; WINDOW_SIZE]);
        }
        zinfo
    }

    #[test]
    fn both_versions_are_read() {
        let points = [
            Checkpoint { compressed: 10, uncompressed: 0, bits: 0 },
            Checkpoint { compressed: 50, uncompressed: 5000, bits: 3 },
        ];
        let check = |recorded: &[Checkpoint], unrecorded| {
            let found = parse_gzip(&zinfo(&points, recorded)).unwrap();
            let checkpoints = points.to_vec();
            let expected = Parsed { span_size: 4096, checkpoints, unrecorded, apart: None };
            assert_eq!(found, expected);
        };
        check(&points, 0);
        check(&points[1..], 1);
        parse_gzip(&zinfo(&points, &[])).unwrap_err();
        parse_gzip(&zinfo(&points[1..], &points)).unwrap_err();
    }

    #[test]
    fn windows_may_be_apart() {
        let first = Checkpoint { compressed: 10, uncompressed: 0, bits: 0 };
        let points = [
            first,
            Checkpoint { compressed: 50, uncompressed: 5000, bits: 3 },
            Checkpoint { compressed: 90, uncompressed: 9000, bits: 0 },
        ];
        let digest = Digest::of(b"a frame");
        let zinfo = |frames: [Option<(u32, Digest)>; 3]| {
            let mut zinfo = gzip_header(3, 4096).to_vec();
            points
                .iter()
                .zip(frames)
                .for_each(|(point, frame)| apart_record(&mut zinfo, point, frame));
            zinfo
        };
        let good = zinfo([None, Some((70, digest)), Some((30, digest))]);
        let found = parse_gzip(&good).unwrap();
        assert_eq!(found.checkpoints, points);
        let frame = |range| Some(WindowFrame { range, digest });
        assert_eq!(found.apart, Some(vec![None, frame(0..70), frame(70..100)]));
        let check = |frames| parse_gzip(&zinfo(frames)).unwrap_err();
        check([None, None, Some((30, digest))]);
        check([Some((70, digest)), Some((70, digest)), Some((30, digest))]);
        check([None, Some((65_537, digest)), Some((30, digest))]);
        parse_gzip(&good[..good.len() - 1]).unwrap_err();
        parse_gzip(&[&good[..], &[0]].concat()).unwrap_err();
    }

    #[test]
    fn counts_and_lengths_must_agree() {
        let first = Checkpoint { compressed: 10, uncompressed: 0, bits: 0 };
        let good = zinfo(&[first], &[first]);
        parse_gzip(&good).unwrap();
        let check = |zinfo: &[u8]| parse_gzip(zinfo).unwrap_err();
        check(&[]);
        check(&good[..11]);
        check(&good[..good.len() - 1]);
        check(&[&good[..], &[0]].concat());
        // Zero checkpoints, and numbers that would wrap in 32 bits.
        for count in [0_u32, 2 + 131_072, 131_057 * 2, u32::MAX, 1 << 31] {
            check(&[&count.to_le_bytes(), &good[4..]].concat());
        }
        check(&[&0_u32.to_le_bytes(), &good[4..12]].concat());
        // A negative offset.
        check(&[&good[..12], &[0xff; 8], &good[20..]].concat());
    }

    #[test]
    fn plain_data_must_match_the_layer() {
        let plain = plain_zinfo(100, 250);
        let offsets: Vec<_> = parse_plain(&plain, 250, 3)
            .unwrap()
            .checkpoints
            .iter()
            .map(|point| point.compressed)
            .collect();
        assert_eq!(offsets, [0, 100, 200]);
        parse_plain(&plain, 251, 3).unwrap_err();
        parse_plain(&plain, 250, 2).unwrap_err();
        parse_plain(&plain_zinfo(0, 250), 250, 0).unwrap_err();
        parse_plain(&plain_zinfo(1, 1 << 62), 1 << 62, 3).unwrap_err();
        parse_plain(&plain[..plain.len() / 2], 250, 3).unwrap_err();
        assert_eq!(parse_plain(&plain_zinfo(125, 250), 250, 2).unwrap().checkpoints.len(), 2);
    }
}
